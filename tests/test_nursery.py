"""Runners are forked from a process that has the program imported, and nothing depends on that process."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

from tests.commands import COMMAND, GATED, detach, job_of, open_gate, running, wait_state, write_script
from tests.fleet import Fleet, Host, processes_of, wait_for


def found(host: Host, word: str) -> int:
    """The process of a host whose command line has this word; 0 while there is none."""
    return next((pid for pid, command in processes_of(host.folder).items() if f" {word} " in command), 0)


def deploy(one: Fleet) -> bool:
    """Deploy through a gate; says whether the runner was forked, for whose command line there is more room than any
    started one's."""
    host = one.master
    write_script(GATED, host)
    run = detach(one)
    wait_state(one, run, host, "running")
    runner = wait_for(lambda: found(host, "run-job"), "a runner")
    words = Path(f"/proc/{runner}/cmdline").read_bytes()
    assert words.rstrip(b"\0").endswith(os.fsencode(f"\0{run}\0{host.address}")), words
    assert int(Path(f"/proc/{runner}/stat").read_text().rpartition(") ")[2].split()[1]) == 1, (
        "it left the daemon's tree"
    )
    open_gate(host)
    wait_state(one, run, host, "succeeded")
    assert job_of(one, run, host)["exit"] in (0, None)
    return words.endswith(b"\0" * 100)


def test_runners_come_from_the_nursery_and_do_without_it(fleet: Callable[..., Fleet]):
    one = fleet(hosts=1, command=COMMAND)
    host = one.master
    first = wait_for(lambda: found(host, "nursery"), "a nursery")
    wait_for(lambda: deploy(one), "a forked runner")

    os.kill(first, signal.SIGKILL)
    wait_for(lambda: not running(first), "the nursery is dead")
    assert not deploy(one), "without it a runner is started as a program"
    assert wait_for(lambda: found(host, "nursery"), "another nursery") != first
    wait_for(lambda: deploy(one), "a forked runner again")

    second = wait_for(lambda: found(host, "nursery"), "a nursery")
    assert host.process
    host.process.kill()
    wait_for(lambda: not running(second), "a nursery ends with its daemon")
