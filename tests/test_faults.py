"""A fault of ours, met while a word is taken: that word is refused, and the daemon that met it goes on."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

from tests.commands import detach, wait_state
from tests.fleet import MODULE, Fleet, wait_for

# The program itself, with a fault in it: the first word about a job can't be taken.
FAULTY = """
import sys
sys.path.insert(0, {folder!r})
import estelle_updater as program

real, met = program.Master.on_job, []

def on_job(self, agent, job):
    if not met:
        met.append(job)
        raise ZeroDivisionError("a fault")
    return real(self, agent, job)

program.Master.on_job = on_job
sys.exit(program.main(sys.argv[1:]))
"""


def test_a_word_of_the_masters_own_agent_does_not_end_the_master(fleet: Callable[..., Fleet], tmp_path: Path) -> None:
    one = fleet(hosts=1, start=False)
    faulty = tmp_path / "faulty.py"
    faulty.write_text(FAULTY.format(folder=str(MODULE.parent)))
    one.master.program = (sys.executable, str(faulty))
    one.start()
    run = detach(one)
    wait_for(lambda: "ZeroDivisionError('a fault')" in one.master.stderr, "the fault is met")
    wait_state(one, run, one.master, "succeeded")
    assert "a message of 127.0.0.1 failed" in one.master.stderr and "Traceback" not in one.master.stderr
    assert one.cli("status").code == 0
