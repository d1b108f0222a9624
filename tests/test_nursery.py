"""Runners are forked from a process that has the program imported, and nothing depends on that process."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable
from pathlib import Path

from tests import seam as est
from tests.commands import COMMAND, GATED, detach, job_of, open_gate, running, wait_state, write_script
from tests.fleet import PROGRAM, Fleet, Host, processes_of, wait_for


def found(host: Host, word: str) -> int:
    """The process of a host whose command line has this word; 0 while there is none."""
    return next((pid for pid, command in processes_of(host.folder).items() if f" {word} " in command), 0)


def mapped_kib(pid: int, file: str) -> int:
    """How much of a file a process holds in memory."""
    held, within = 0, False
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        words = line.split()
        if "-" in words[0]:
            within = line.endswith(file)
        elif within and words[0] == "Rss:":
            held += int(words[1])
    return held


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
    assert mapped_kib(first, PROGRAM[1]) < 1000, "what it has read of its program it has no more use for"

    os.kill(first, signal.SIGKILL)
    wait_for(lambda: not running(first), "the nursery is dead")
    assert not deploy(one), "without it a runner is started as a program"
    assert wait_for(lambda: found(host, "nursery"), "another nursery") != first
    wait_for(lambda: deploy(one), "a forked runner again")

    second = wait_for(lambda: found(host, "nursery"), "a nursery")
    assert host.process
    host.process.kill()
    wait_for(lambda: not running(second), "a nursery ends with its daemon")


class Jobs:
    """Of a daemon that has none: what a poke has it do is all there is to see."""

    grown_bytes = 0
    active = list

    def __init__(self) -> None:
        self.poked = asyncio.Event()

    async def are_looked_at(self) -> bool:
        """Whether the records are, before long."""
        try:
            await asyncio.wait_for(self.poked.wait(), 2 * est.UNSAID_S)
        except TimeoutError:
            return False
        self.poked.clear()
        return True


async def try_pokes() -> None:
    jobs = Jobs()
    receiver = est.PokeReceiver(jobs)  # type: ignore[arg-type]
    receiver.datagram_received(est.LOG_POKE, None)
    assert not await jobs.are_looked_at(), "a line is all that is new"
    for _ in range(3):
        receiver.datagram_received(est.STEP_POKE, None)
    assert not jobs.poked.is_set(), "a step's begin waits for what comes soon"
    assert await jobs.are_looked_at()
    assert not await jobs.are_looked_at(), "all of them by one look"
    receiver.datagram_received(est.STEP_POKE, None)
    receiver.datagram_received(b"!", None)
    assert jobs.poked.is_set(), "a result does not wait"
    jobs.poked.clear()
    assert not await jobs.are_looked_at(), "that look has seen the step too"


def test_steps_that_begin_in_one_moment_are_told_together():
    asyncio.run(try_pokes())
