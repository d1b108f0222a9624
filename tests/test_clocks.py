"""A clock that jumps 9 hours ahead or 200 days back, or is another on each host: nothing is chosen, ended, or told by
it."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests import seam as est
from tests.seam import replace
from tests.test_notify import JOB, RUN, config_file, make_master, titles

HOUR_S = 3600.0
JUMPS = (9 * HOUR_S, -9 * HOUR_S, 200 * est.DAY_S, -200 * est.DAY_S)
Jump = Callable[[float], None]


@pytest.fixture
def jump(monkeypatch: pytest.MonkeyPatch) -> Jump:
    """Have the wall clock jump by so many seconds from where it really is."""
    real = time.time

    def to(by_s: float) -> None:
        monkeypatch.setattr(time, "time", lambda: real() + by_s)

    return to


def test_time_without_a_daemon_is_told_by_the_machines_boot(tmp_path: Path, jump: Jump) -> None:
    if not est.since_boot()[0]:
        pytest.skip("this system does not say which boot it is")
    lived = est.LivedClock(tmp_path / "lived.json")
    lived.save()
    before = lived.now()
    for by_s in JUMPS:
        jump(by_s)
        assert 0 <= est.LivedClock(tmp_path / "lived.json").now() - before < 60


def test_a_freeze_by_hand_lasts_as_long_as_it_was_meant_to(tmp_path: Path, jump: Jump) -> None:
    config = config_file(tmp_path)
    host = est.HostRef("h", "127.0.0.2", "h", "m", True)
    freezes = est.Freezes(config.state, config)
    freezes.freeze("sale", 2 * HOUR_S, "me")
    assert config.state.store.flush(10.0)
    for by_s in (0.0, *JUMPS):
        jump(by_s)
        state = est.StateFolder(config.state.root)
        for each in (freezes, est.Freezes(state, config)):  # the daemon that goes on, and one that was started anew
            (held,) = each.holding(est.Kind.DEPLOY, {}, [host])
            assert abs(held.ends - time.time() - 2 * HOUR_S) < 60, "and says when it ends by the clock as it is"


def test_a_running_job_is_no_older_than_its_order(tmp_path: Path, jump: Jump) -> None:
    state = est.StateFolder(tmp_path)
    state.create()
    (tmp_path / "lived.json").write_text(json.dumps({"lived": est.DAY_S}))
    job = replace(JOB, lived=state.lived.now() - 60, started=time.time() - 50)
    state.log_file(job.run, job.host).parent.mkdir(parents=True)
    state.log_file(job.run, job.host).write_text("begun")
    for by_s, running_s, silent_s in ((0.0, 50, 0), (est.DAY_S, 60, 60), (-est.DAY_S, 60, 0)):
        jump(by_s)
        ages = est.job_ages(state, job)
        assert abs(ages["running_s"] - running_s) < 10 and abs(ages["silent_s"] - silent_s) < 10, (by_s, ages)


def test_how_long_a_host_has_run_is_told_by_no_clock_of_its_own(tmp_path: Path, jump: Jump) -> None:
    """What the page and `status` of a silent host show: each host may be in another year, and so may the master."""

    async def look() -> None:
        master, _ = make_master(tmp_path)
        view, machine = est.FleetView(master), "b" * 32
        host = est.HostRef("127.0.0.2", "127.0.0.2", "h", machine, True)
        master.registry.machines[machine] = est.Machine(machine=machine, address="127.0.0.2", name="h")
        record = replace(RUN, hosts=[host.label], machines={host.label: machine})
        for off_s in (0.0, *JUMPS):
            waiting = replace(JOB, host=host.label, machine=machine, started=None, state=est.State.QUEUED)
            run = master.runs[record.run] = est.Run(record, {host.label: waiting}, 7 * est.DAY_S)
            run.put(replace(waiting, started=time.time() + off_s, state=est.State.RUNNING))
            for by_s in JUMPS:
                jump(by_s)
                row = view.status_row(host, [*run.jobs.values()], {}, {"servers": {}})
                assert 0 <= row["running_s"] < 60, (off_s, by_s)

    asyncio.run(look())


def test_an_accepted_order_expires_by_no_clock(tmp_path: Path, jump: Jump) -> None:
    state = est.StateFolder(tmp_path)
    state.create()
    own: Any = SimpleNamespace(state=state)
    (tmp_path / "lived.json").write_text(json.dumps({"lived": est.DAY_S}))
    state.lived.save()
    fresh = replace(JOB, lived=state.lived.now())
    old = replace(JOB, lived=state.lived.now() - 2 * est.ORDER_EXPIRES_S)
    state.save_job(fresh)
    for by_s in JUMPS:
        jump(by_s)
        assert not est.OwnJobs.is_old(own, fresh) and est.OwnJobs.is_old(own, old)


def test_an_accepted_order_expires_where_its_hosts_clock_is_lost(tmp_path: Path) -> None:
    """A torn lived.json: what the record says lies ahead of what is lived by now, and would for days."""
    state = est.StateFolder(tmp_path)
    state.create()
    own: Any = SimpleNamespace(state=state)
    (tmp_path / "lived.json").write_text("{")
    job = replace(JOB, lived=9 * est.DAY_S)
    state.save_job(job)
    assert not est.OwnJobs.is_old(own, job)
    os.utime(state.job_file(job.run, job.host), (time.time() - 3 * est.DAY_S,) * 2)
    assert est.OwnJobs.is_old(own, job)


def test_messages_wait_for_their_receiver_whatever_the_clock_does(tmp_path: Path, jump: Jump) -> None:
    async def look() -> None:
        _, notifier = make_master(tmp_path, notify=[{"url": "http://127.0.0.1:1", "on": ["failed"]}])
        spool = notifier.spool
        spool.receivers[est.receiver_id(spool.rules[0])] = est.Receiver(due=float("inf"))
        failed = replace(JOB, state=est.State.FAILED, ended=time.time())
        names = []
        for number, by_s in enumerate((0.0, *JUMPS)):
            jump(by_s)
            names.append(f"h{number}")
            notifier.tell_of_job(est.Run(RUN, {}), replace(failed, host=names[-1]))
            assert spool.send_due()
            spool.forget_told()
        assert [title.split("]")[0].strip("[") for title in titles(notifier)] == names, "in the order of their events"
        for path in spool.folder.glob("*.json"):
            os.utime(path)  # as an older program left them
        _, later = make_master(tmp_path, notify=[{"url": "http://127.0.0.1:1", "on": ["failed"]}])
        later.spool.receivers = spool.receivers
        assert later.spool.send_due() and len(titles(later)) == len(names)

    asyncio.run(look())


def test_the_masters_own_verdict_takes_no_host_by_its_clock(tmp_path: Path) -> None:
    async def look() -> None:
        master, _ = make_master(tmp_path)
        for number, (off_s, age_s) in enumerate(itertools.product((0.0, *JUMPS), (0.0, 60.0))):
            record = replace(RUN, run=f"20261122-210501-{number:04x}", hosts=[JOB.host], machines={JOB.host: "b" * 32})
            job = replace(JOB, run=record.run, machine="b" * 32, started=time.time() + off_s, state=est.State.RUNNING)
            run = est.Run(record, {job.host: job}, age_s)
            master.ledger.end(run, job, est.State.LOST, "no connection")
            seconds = est.seconds_of(run.jobs[job.host])
            assert seconds is not None and 0 <= seconds <= age_s + 5

    asyncio.run(look())
