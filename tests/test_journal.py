"""Section 6: a log arrives whole whatever the link does, a state only moves forward, and the queue is fair."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings, strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tests import seam as est
from tests.seam import (
    FINAL,
    Inbox,
    JobRecord,
    RunRecord,
    SendCursor,
    State,
    accepts_chunk,
    accepts_job,
    decide_orders,
    replace,
)

quick = settings(deadline=None, max_examples=200, suppress_health_check=list(HealthCheck))
RUN = "20261122-210501-7f3a"
JOB = JobRecord(RUN, "127.0.0.2", "ab" * 16, est.Kind.DEPLOY, "master")

# States


def test_the_table_of_transitions() -> None:
    allowed = {
        "queued": "queued running succeeded failed cancelled timeout offline lost",
        "running": "running succeeded failed cancelled timeout lost",
    }
    for old in State:
        for new in State:
            before, after = replace(JOB, state=old, revision=3), replace(JOB, state=new, revision=4)
            assert accepts_job(before, after) == (new in allowed.get(old, "").split()), f"{old} -> {new}"
    assert set(est.NEXT_STATES) == set(State) and {State.QUEUED, State.RUNNING} | FINAL == set(State)


records = st.builds(
    lambda state, revision, provisional: replace(JOB, state=state, revision=revision, provisional=provisional),
    st.sampled_from(State), st.integers(0, 4), st.booleans(),
)  # fmt: skip


@quick
@given(records, records)
def test_only_a_higher_revision_counts_and_only_a_guess_of_the_master_is_taken_back(old: Any, new: Any) -> None:
    assert accepts_job(None, new)
    if accepts_job(old, new):
        guess_replaced = old.provisional and not new.provisional and new.revision == old.revision
        assert new.revision > old.revision or guess_replaced or new.state in FINAL
        assert old.state not in FINAL or (old.provisional and not new.provisional)
    elif old.provisional and not new.provisional:
        assert new.revision < old.revision, "what the host itself says now or later replaces the guess"


@quick
@given(st.integers(0, 2), st.integers(0, 2), st.sampled_from(sorted(FINAL - {State.OFFLINE})), st.randoms())
def test_words_of_a_host_that_arrive_twice_or_in_disorder_end_at_the_last(
    queued: int, running: int, last: State, chance: random.Random
) -> None:
    states = [State.QUEUED] * queued + [State.RUNNING] * running + [last]
    history = [replace(JOB, state=state, revision=number) for number, state in enumerate(states, 1)]
    known = JOB
    for record in chance.sample(history * 2, len(history) * 2):
        known = record if accepts_job(known, record) else known
        assert accepts_job(known, record) is False, "the same word twice changes nothing"
    assert known == history[-1]


def test_a_late_word_replaces_the_verdict_lost_and_a_fresh_one_does_not() -> None:
    running = replace(JOB, state=State.RUNNING, revision=5)
    guess = replace(running, state=State.LOST, provisional=True)
    verdict = replace(running, state=State.LOST)
    for late in (running, replace(running, state=State.SUCCEEDED, revision=6)):
        assert accepts_job(guess, late) and not accepts_job(verdict, late)
    assert not accepts_job(guess, replace(running, revision=4)) and not accepts_job(guess, guess)


def test_a_last_word_counts_also_after_a_power_loss_that_cost_the_host_its_revisions() -> None:
    running = replace(JOB, state=State.RUNNING, revision=5)
    assert accepts_job(running, replace(running, state=State.LOST, revision=2))
    assert not accepts_job(running, replace(running, revision=2))


def test_a_run_succeeds_when_every_host_does() -> None:
    done = replace(JOB, state=State.SUCCEEDED)
    assert est.run_ok([done, done])
    for state in set(State) - {State.SUCCEEDED}:
        assert not est.run_ok([done, replace(JOB, state=state), done])


def test_a_job_knows_enough_to_make_its_run_again() -> None:
    machines, addresses = {"a": "1", "b": "2"}, {"a": "10.0.0.1", "b": "10.0.0.2"}
    run = RunRecord(RUN, "", est.Kind.DEPLOY, "all", "master", ["a", "b"], machines, addresses, 5.5, "kim")
    job = est.job_of_run(run, "b")
    assert (job.run, job.host, job.machine, job.state, job.revision) == (RUN, "b", "2", State.QUEUED, 0)
    alone = replace(run, hosts=["b"], machines={"b": "2"}, addresses={"b": "10.0.0.2"})
    assert est.run_of_job(job) == alone and est.job_of_run(est.run_of_job(job), "b") == job


# Offsets


@quick
@given(st.integers(0, 20), st.integers(0, 20), st.integers(0, 20))
def test_a_chunk_is_written_only_exactly_at_the_end(size: int, offset: int, length: int) -> None:
    write, rewind = accepts_chunk(size, offset, length)
    assert write == (offset == size)
    if rewind:
        assert not write and offset + length > size, "what is here already needs no answer"
    elif not write:
        assert offset + length <= size, "a gap must not stay unnoticed"


def test_a_cursor_waits_for_the_reader_and_keeps_to_chunk_window_and_end() -> None:
    cursor = SendCursor(1, RUN, "h", 200_000)
    assert cursor.next_span(est.WINDOW_BYTES, est.CHUNK_BYTES) is None and cursor.unacked == 0
    cursor.on_have(1000, rewind=True)
    assert cursor.next_span(est.WINDOW_BYTES, est.CHUNK_BYTES) == (1000, est.CHUNK_BYTES)
    assert cursor.next_span(10, 100) == (1000, 10) and cursor.next_span(100, 10) == (1000, 10)
    assert cursor.next_span(0, 10) is None and cursor.next_span(-5, 10) is None
    cursor.sent = 199_990
    assert cursor.next_span(est.WINDOW_BYTES, est.CHUNK_BYTES) == (199_990, 10) and cursor.unacked == 198_990
    cursor.on_have(150_000, rewind=False)
    assert cursor.sent == 199_990 and cursor.unacked == 49_990
    cursor.on_have(120_000, rewind=True)
    assert cursor.sent == 120_000 and cursor.unacked == 0
    cursor.on_have(300_000, rewind=True)  # the reader's copy is the longer one: it stays
    assert cursor.next_span(est.WINDOW_BYTES, est.CHUNK_BYTES) is None and cursor.unacked == 0


def test_an_inbox_asks_once_for_what_is_missing_and_acknowledges_what_it_has() -> None:
    inbox = Inbox(4)
    assert inbox.ask(100, 7) == est.Have(4, 100, rewind=True, check=7)
    assert inbox.on_chunk(100, 150, gap=False) is None and inbox.unacked == 50
    assert inbox.on_chunk(200, 150, gap=True) == est.Have(4, 150, rewind=True) and inbox.unacked == 0
    assert inbox.on_chunk(250, 150, gap=True) is None, "all in flight behind the gap would ask again"
    assert inbox.on_chunk(140, 150, gap=True) == est.Have(4, 150, rewind=True)
    assert inbox.on_chunk(150, 160, gap=False) is None
    assert inbox.ack() == est.Have(4, 160) and inbox.ack() is None
    assert inbox.on_chunk(160, 160 + est.ACK_BYTES, gap=False) == est.Have(4, 160 + est.ACK_BYTES)


CHUNK, WINDOW = 7, 24
STREAM = random.Random(1).randbytes(4000)


class Relay(RuleBasedStateMachine):
    """A growing log, its copy, and a connection that dies at any moment with everything that is under way."""

    def __init__(self) -> None:
        super().__init__()
        self.source, self.sink = 0, b""  # how much of STREAM is written; what has arrived

    @initialize()
    def connect(self) -> None:
        self.cursor = SendCursor(3, RUN, "h", self.source)
        self.chunks: deque[bytes] = deque()
        self.haves: deque[str] = deque()
        self.inbox = Inbox(3)
        self.say(self.inbox.ask(len(self.sink)))

    def say(self, have: est.Have | None) -> None:
        if have:
            self.haves.append(est.encode_message(have))

    @rule(size=st.integers(1, 40))
    def the_log_grows(self, size: int) -> None:
        self.source = min(self.source + size, len(STREAM))

    @rule()
    def the_daemon_looks(self) -> None:
        self.cursor.size = self.source

    @rule(short=st.integers(0, 3))
    def send(self, short: int) -> None:
        if span := self.cursor.next_span(WINDOW - self.cursor.unacked, CHUNK):
            assert 0 < span[1] <= CHUNK
            data = STREAM[span[0] : span[0] + max(1, span[1] - short)]  # a read may give less
            self.cursor.sent = span[0] + len(data)
            self.chunks.append(est.encode_chunk(3, span[0], data))

    @precondition(lambda self: self.chunks)
    @rule(again=st.booleans(), room=st.integers(-20, 20))
    def a_chunk_arrives(self, again: bool = False, room: int = 20) -> None:
        channel, offset, data = est.decode_chunk(self.chunks[0] if again else self.chunks.popleft())
        assert channel == 3
        write, rewind = accepts_chunk(len(self.sink), offset, len(data))
        if write and room < len(data):  # a full disk takes a part, or nothing
            self.sink += data[: max(0, room)]
            rewind = True
        elif write:
            self.sink += data
        self.say(self.inbox.on_chunk(offset, len(self.sink), rewind))

    @precondition(lambda self: self.haves)
    @rule(again=st.booleans())
    def a_have_arrives(self, again: bool = False) -> None:
        have = est.decode_message(self.haves[0] if again else self.haves.popleft())
        self.cursor.on_have(have.size, have.rewind)

    @rule()
    def acknowledge(self) -> None:
        self.say(self.inbox.ack())

    @rule()
    def the_connection_dies(self) -> None:
        self.connect()

    @rule(lost=st.integers(1, 30))
    def the_sinks_host_loses_power(self, lost: int) -> None:
        self.sink = self.sink[: max(0, len(self.sink) - lost)]
        self.connect()

    @rule()
    def all_is_quiet(self) -> None:
        """Nothing new happens: what is there must arrive, in a number of steps that its size bounds."""
        self.cursor.size = self.source
        for _ in range(1000):
            self.send(0)
            if self.chunks:
                self.a_chunk_arrives()
            elif self.haves:
                self.a_have_arrives()
            elif self.inbox.unacked:
                self.acknowledge()
            else:
                break
        assert self.sink == STREAM[: self.source]

    @invariant()
    def the_copy_is_a_prefix_and_the_window_is_kept(self) -> None:
        assert self.sink == STREAM[: len(self.sink)] and len(self.sink) <= self.source
        assert 0 <= self.cursor.unacked <= WINDOW

    def teardown(self) -> None:
        self.all_is_quiet()


TestRelay = Relay.TestCase
TestRelay.settings = settings(quick, max_examples=100, stateful_step_count=50)

# The queue

MACHINES = "abcd"


def a_run(number: int, hosts: str, batch: int = 0) -> tuple[RunRecord, dict[str, JobRecord]]:
    """A run of the machines named by letters; a host's label is the capital letter."""
    labels = [letter.upper() for letter in hosts]
    run = RunRecord(
        f"20261122-210501-{number:04x}", "", est.Kind.DEPLOY, "all", f"b{number}", labels,
        dict(zip(labels, hosts, strict=True)), {}, number, batch=batch,
    )  # fmt: skip
    return run, {label: est.job_of_run(run, label) for label in labels}


def live(job: JobRecord) -> bool:
    return job.state is State.RUNNING or (job.state is State.QUEUED and job.ordered)


@st.composite
def queues(draw: Any) -> list[tuple[RunRecord, dict[str, JobRecord]]]:
    """Runs, oldest first, in any states, with at most one live job for each machine."""
    runs, taken = [], set()
    for number in range(draw(st.integers(1, 5))):
        hosts = "".join(draw(st.lists(st.sampled_from(MACHINES), unique=True, min_size=1)))
        run, jobs = a_run(number, hosts, draw(st.integers(0, 3)))
        run = replace(run, cancelled=draw(st.integers(0, 3)) == 3)
        for label, job in jobs.items():
            state = draw(st.sampled_from([State.QUEUED] * 4 + list(State)))
            job = replace(job, state=state, ordered=draw(st.booleans()))
            if live(job) and job.machine in taken:
                job = replace(job, state=State.QUEUED, ordered=False)
            taken |= {job.machine} if live(job) else set()
            jobs[label] = job
        runs.append((run, jobs))
    return runs


def earlier_batches(run: RunRecord, jobs: Mapping[str, JobRecord], label: str) -> Iterator[JobRecord]:
    for other in run.hosts:
        if run.batch and run.hosts.index(other) // run.batch < run.hosts.index(label) // run.batch:
            yield jobs[other]


@quick
@given(queues(), st.sets(st.sampled_from(MACHINES)), st.sets(st.sampled_from(MACHINES)))
def test_what_the_queue_does_with_each_waiting_job(runs: Any, online: set[str], busy: set[str]) -> None:
    order, end, wait = decide_orders(runs, online, busy)
    behind = {(job.run, job.host): other for job, other in wait}
    running = {job.machine: job.run for _, jobs in runs for job in jobs.values() if live(job)}
    first: dict[str, str] = {}
    for run, jobs in runs:
        for label, job in jobs.items():
            before = [other.state for other in earlier_batches(run, jobs, label)]
            verdict = None
            if job.state is State.QUEUED and not job.ordered:
                if run.cancelled or any(state in FINAL and state is not State.SUCCEEDED for state in before):
                    verdict = "end"
                elif holder := running.get(job.machine) or first.get(job.machine):
                    verdict = holder
                else:
                    first[job.machine] = job.run
                    due = all(state is State.SUCCEEDED for state in before)
                    verdict = "order" if due and job.machine in online and job.machine not in busy else "waits"
            assert (job in order) == (verdict == "order")
            assert (job in [ended for ended, _ in end]) == (verdict == "end")
            assert behind.get((job.run, label)) == (verdict if verdict not in ("order", "end", "waits") else None)
    assert all(reason for _, reason in end) and len({job.machine for job in order}) == len(order)


LOST, LATE, OFFLINE = (State.LOST, "the order was never acknowledged"), 601.0, (State.OFFLINE, "the host is offline")
GONE = (State.LOST, "no connection for 900 s")


@pytest.mark.parametrize(
    ("verdict", "changes", "run", "silent_s", "away_s", "age_s", "up_s"),
    [  # connected: only an order that nothing answers to has an end
        (None, {}, {}, LATE, 0.0, 9999.0, 9999.0),
        (None, {"ordered": True}, {}, 600.0, 0.0, 9999.0, 9999.0),
        (LOST, {"ordered": True}, {}, LATE, 0.0, 9999.0, 9999.0),
        (None, {"ordered": True, "revision": 1}, {}, LATE, 0.0, 9999.0, 9999.0),
        ((State.CANCELLED, LOST[1]), {"ordered": True}, {"cancelled": True}, 11.0, 0.0, 9999.0, 9999.0),
        (None, {"state": State.RUNNING}, {}, LATE, 0.0, 9999.0, 9999.0),
        # away: since it went, since the run began, and since the master could know
        (None, {"ordered": True}, {}, None, 600.0, 9999.0, 9999.0),
        (LOST, {"ordered": True}, {}, None, LATE, 9999.0, 9999.0),
        (OFFLINE, {}, {}, None, LATE, LATE, 1.0),
        (None, {}, {}, None, LATE, 1.0, 9999.0),
        (None, {}, {"wait_s": 700.0}, None, LATE, LATE, 9999.0),
        (OFFLINE, {}, {"wait_s": 5.0, "offline": ["127.0.0.2"]}, None, 6.0, 6.0, 9999.0),
        (None, {"behind": RUN}, {}, None, LATE, LATE, 1.0),
        (OFFLINE, {"behind": RUN}, {}, None, LATE, LATE, LATE),
        (None, {"state": State.RUNNING}, {}, None, 900.0, 9999.0, 9999.0),
        (None, {"state": State.RUNNING}, {}, None, 9999.0, 9999.0, 900.0),
        (GONE, {"state": State.RUNNING}, {}, None, 901.0, 9999.0, 901.0),
        *((None, {"state": state}, {}, None, 9999.0, 9999.0, 9999.0) for state in sorted(FINAL)),
    ],
)  # fmt: skip
def test_how_long_a_job_waits_for_its_host(
    verdict: Any, changes: Any, run: Any, silent_s: float | None, away_s: float, age_s: float, up_s: float
) -> None:
    record = replace(est.run_of_job(JOB), **run)
    assert est.decide_expiry(record, replace(JOB, **changes), silent_s, away_s, age_s, up_s) == verdict


@pytest.mark.parametrize(("cancelled_s", "is_lost"), [(0.0, False), (900.0, False), (901.0, True)])
def test_a_host_that_takes_no_cancel_is_not_waited_for_for_ever(cancelled_s: float, is_lost: bool) -> None:
    record, running = replace(est.run_of_job(JOB), cancelled=True), replace(JOB, ordered=True, state=State.RUNNING)
    verdict = est.decide_expiry(record, running, 9999.0, 0.0, 9999.0, 9999.0, cancelled_s)
    assert (verdict is not None) == is_lost and (verdict is None or verdict[0] is State.LOST)


def finish(job: JobRecord, chance: random.Random, surely: bool) -> JobRecord:
    """What a host makes of a live job in one tick."""
    if surely or chance.random() < 0.3:
        return replace(job, state=chance.choice([State.SUCCEEDED, State.SUCCEEDED, State.SUCCEEDED, State.FAILED]))
    return replace(job, state=State.RUNNING)


@pytest.mark.parametrize("seed", range(100))
def test_nobody_starves_and_no_machine_ever_has_two_jobs(seed: int) -> None:
    chance = random.Random(seed)
    runs: list[tuple[RunRecord, dict[str, JobRecord]]] = []
    begun: dict[str, list[str]] = {machine: [] for machine in MACHINES}
    for tick in range(60):
        calm = tick >= 25  # nothing new from now on, and every host is there
        if not calm and chance.random() < 0.3:
            runs.append(a_run(len(runs), "".join(chance.sample(MACHINES, chance.randrange(1, 5))), chance.randrange(4)))
        online = [machine for machine in MACHINES if calm or chance.random() < 0.6]
        order, end, _ = decide_orders(runs, online, "" if calm else chance.choice(MACHINES))
        changed = {(job.run, job.host): replace(job, ordered=True) for job in order}
        changed |= {(job.run, job.host): replace(job, state=State.CANCELLED) for job, _ in end}
        for job in order:
            begun[job.machine].append(job.run)
        for run, jobs in runs:
            jobs |= {host: changed.get((run.run, host), job) for host, job in jobs.items()}
        busy = [job.machine for _, jobs in runs for job in jobs.values() if live(job)]
        assert len(busy) == len(set(busy))
        for _, jobs in runs:
            jobs |= {host: finish(job, chance, calm) for host, job in jobs.items() if live(job)}
    assert all(job.state in FINAL for _, jobs in runs for job in jobs.values())
    assert all(order == sorted(set(order)) for order in begun.values()), "oldest first, and each once"


def test_batches_come_in_order_and_a_failure_ends_the_later_ones() -> None:
    run, jobs = a_run(1, "abcd", batch=2)
    assert decide_orders([(run, jobs)], MACHINES, "")[0] == [jobs["A"], jobs["B"]]
    jobs["A"] = replace(jobs["A"], state=State.SUCCEEDED)
    assert decide_orders([(run, jobs)], MACHINES, "") == ([jobs["B"]], [], [])
    done = jobs | {"B": replace(jobs["B"], state=State.SUCCEEDED)}
    assert decide_orders([(run, done)], MACHINES, "")[0] == [jobs["C"], jobs["D"]]
    for state in FINAL - {State.SUCCEEDED}:
        failed = jobs | {"B": replace(jobs["B"], state=state)}
        assert decide_orders([(run, failed)], MACHINES, "") == (
            [], [(jobs["C"], "an earlier batch did not succeed"), (jobs["D"], "an earlier batch did not succeed")], [],
        )  # fmt: skip


@pytest.mark.parametrize(("online", "busy"), [("bcd", ""), ("abcd", "a")])
def test_a_host_that_cannot_now_keeps_its_place(online: str, busy: str) -> None:
    old, new, other = a_run(1, "ab"), a_run(2, "a"), a_run(3, "b")
    order, end, behind = decide_orders([old, new, other], online, busy)
    assert (order, end) == ([old[1]["B"]], [])
    assert behind == [(new[1]["A"], old[0].run), (other[1]["B"], old[0].run)]
    assert decide_orders([old, new, other], "abcd", "")[0] == [old[1]["A"], old[1]["B"]]


def test_the_master_is_told_what_concerns_it() -> None:
    """Which process runs is the host's own affair; all else is worth a message."""
    record = est.JobRecord("20260101-000000-0000", "a", "n" * 32, est.Kind.DEPLOY, "master")
    opened = est.replace(record, revision=2, open_step="run/a/1", pipe="1:22")
    assert not est.concerns_master(record, opened)
    assert not est.concerns_master(opened, est.replace(opened, revision=3, open_step=None, pipe=None))
    own = {"revision", "open_step", "pipe"}
    for setting in est.fields(record):
        if setting.name not in own:
            assert est.concerns_master(opened, est.replace(opened, revision=3, **{setting.name: object()})), (
                setting.name
            )
