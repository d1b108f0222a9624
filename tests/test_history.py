"""What is recorded can be read with the master, without it, on an agent; the configuration is followed live."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests import seam as est
from tests.fleet import VERSION, Fleet, Host, wait_for
from tests.seam import replace

MakeFleet = Callable[..., Fleet]


def history(fleet: Fleet, host: Host | None = None) -> list[dict[str, Any]]:
    result = fleet.cli("history", "--json", host=host)
    assert result.code == 0, result.err
    runs: list[dict[str, Any]] = json.loads(result.out)["runs"]
    return runs


def test_history_and_logs_with_and_without_the_master(fleet: MakeFleet) -> None:
    one = fleet(hosts=2)
    agent = one.agents[0]
    assert one.cli("trigger", "all", "master").code == 0
    one.origin.commit({"deploy.sh": "echo broken; exit 3\n"})
    failed = one.cli("trigger", agent.address, "master")
    assert failed.code == 1 and "✗ 실패 sh deploy.sh (exit 3)" in failed.out

    newest, first = history(one)
    assert [host["state"] for host in newest["hosts"]] == ["failed"]
    assert [(host["host"], host["version"]) for host in first["hosts"]] == [
        ("127.0.0.1", VERSION), ("127.0.0.2", VERSION),
    ]  # fmt: skip
    assert history(one, agent) == [newest, first], "any commander sees the same"
    assert len(json.loads(one.cli("history", "-n", "1", "--json").out)["runs"]) == 1
    stats = json.loads(one.cli("history", "--stats", "--json").out)["stats"]
    assert [(host["host"], host["runs"], host["ok"], host["steps"]) for host in stats] == [
        ("127.0.0.1", 1, 1, {}), ("127.0.0.2", 2, 1, {"sh deploy.sh": 1}),
    ]  # fmt: skip
    text = one.cli("history", "--stats", host=agent).out
    assert "1 failed" in text and "sh deploy.sh (1)" in text
    table = one.cli("history").out
    assert str(newest["run"]) in table and f"127.0.0.1 ✓ {VERSION}" in table and "✗ 실패 sh deploy.sh (exit 3)" in table
    shown = one.cli("logs", str(first["run"])).out
    assert one.cli("logs", str(first["run"]), agent.address).out.count("✓") == 1

    unknown = one.cli("logs", "last", "127.0.0.9")
    assert (unknown.code, unknown.out) == (4, "")
    assert unknown.err.splitlines()[0] == "estelle-updater: error: no such target: 127.0.0.9"
    assert [line.split(":")[0] for line in unknown.err.splitlines()] == ["estelle-updater", "hint"]

    before = json.loads(one.cli("status", "--json").out)["hosts"]
    one.restart(one.master)
    one.wait_online()
    rows = json.loads(one.cli("status", "--json").out)["hosts"]
    assert [row["last"] for row in rows] == [row["last"] for row in before] and rows[0]["last"]["ended"]
    assert [(row["last"]["run"], row["last"]["ok"]) for row in rows] == [(first["run"], True), (newest["run"], False)]
    assert "✗ 실패 sh deploy.sh (exit 3)" in one.cli("status").out, "a new commit alone is no success"

    one.stop(one.master)
    offline = one.cli("logs", str(first["run"]))
    assert (offline.code, sorted(offline.out.splitlines())) == (0, sorted(shown.splitlines()))
    assert "can't reach the master" in offline.err
    assert [run["run"] for run in history(one)] == [newest["run"], first["run"]]
    assert json.loads(one.cli("history", "--stats", "--json").out)["stats"] == stats
    own = history(one, agent)
    assert [run["run"] for run in own] == [newest["run"], first["run"]], "an agent knows its own jobs"
    assert [host["host"] for host in own[1]["hosts"]] == [agent.address]


HOSTS = {"127.0.0.1": "a" * 32, "127.0.0.2": "b" * 32}
SETTLED_S = est.INDEX_AFTER_S + 5


def record(state: est.StateFolder, number: int, *states: est.State, kind: est.Kind = est.Kind.DEPLOY) -> str:
    """A run of two hosts, a day after the one with the number before; its folder has lain still for a while."""
    created = 1_700_000_000.0 + 86400 * number
    run = f"202311{15 + number:02}-000000-{number:04x}"
    order = est.RunRecord(
        run, "n", kind, "all", "master", list(HOSTS), HOSTS, {h: h for h in HOSTS}, created, "me",
        place=number + 1, lived=86400.0 * number,
    )  # fmt: skip
    state.save_run(order)
    for host, end in zip(HOSTS, states, strict=True):
        ended = created + 10 + number if end in est.FINAL else None
        step = "sh deploy.sh" if end is est.State.FAILED else None
        job = replace(est.job_of_run(order, host), state=end, revision=3, started=created, ended=ended, step=step)
        state.save_job(job)
    os.utime(state.runs / run, (created, created))
    return run


@pytest.fixture
def state(tmp_path: Path) -> est.StateFolder:
    folder = est.StateFolder(tmp_path / "state")
    folder.create()
    return folder


OK, FAILED, RUNNING = est.State.SUCCEEDED, est.State.FAILED, est.State.RUNNING


def test_runs_of_one_second_are_in_the_order_in_which_the_master_took_them(state: est.StateFolder) -> None:
    names = [f"20231115-000000-{digits}" for digits in ("7777", "ffff", "0000")]
    for number, name in enumerate(names):
        order = est.RunRecord(name, "n", est.Kind.DEPLOY, "all", "master", [], {}, {}, 1_700_000_000 + number / 10)
        state.save_run(order)
    assert [row["run"] for row in state.history.newest(100)] == names[::-1]
    assert [state.history.newest(count)[-1]["run"] for count in (1, 2, 3)] == names[::-1]


def test_of_an_index_that_grows_the_rest_is_read(state: est.StateFolder, tmp_path: Path) -> None:
    """Whoever shows a few runs out of thousands reads no line twice, and none of another file's."""
    lines = [
        f'{{"run":"20231115-000000-{number:04}","stamp":{number},"place":{number},"created":1.0,"lived":2.0,'
        f'"over":true,"nonce":"n","machines":{{}}}}'
        for number in range(6)
    ]
    known = est.KnownLines(state.history.index)

    def places() -> list[int]:
        found = known.read()
        text = state.history.index.read_bytes()
        for run, line in found.items():
            assert json.loads(text[line.begin : line.begin + line.size])["run"] == run
        return [line.place for line in found.values()]

    assert known.read() == {}
    state.history.index.write_text("\n".join(lines[:2]) + "\n" + lines[2][:30])
    assert places() == [0, 1]
    with state.history.index.open("a") as file:
        file.write(lines[2][30:] + "\n\nno line\n" + lines[3] + "\n")
    assert places() == [0, 1, 2, 3]
    other = tmp_path / "other"
    other.write_text("\n".join(lines[1:]) + "\n")
    os.replace(other, state.history.index)
    assert places() == [1, 2, 3, 4, 5], "another file is read from its beginning"
    state.history.index.write_text(lines[5] + "\n")
    assert places() == [5]
    state.history.index.unlink()
    assert known.read() == {}


def test_no_clock_decides_the_order_or_what_is_kept(state: est.StateFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ids and times of another clock's: the place alone counts, and what was lived."""
    names = ["20990101-000000-0001", "20231115-000000-0002", "19990101-000000-0003", "20231116-000000-0004"]
    for number, name in enumerate(names):
        order = est.RunRecord(name, "n", est.Kind.DEPLOY, "all", "master", [], {}, {}, 4e9 - number * 1e9, "me",
                              place=number + 1, lived=100.0)  # fmt: skip
        state.save_run(order)
    assert [row["run"] for row in state.history.newest(9)] == names[::-1]
    assert state.history.next_place() == 5
    assert state.history.prune(est.KeepRule(runs=3, days=1), tuple, 200.0) == names[:1]
    lived = est.LivedClock(state.root / "lived.json")
    lived.save()
    before = lived.now()
    monkeypatch.setattr(time, "time", lambda: 9e9)
    assert lived.now() - before < 60
    assert est.LivedClock(state.root / "lived.json").now() - before < est.DAY_S + 60, "a day at most"
    monkeypatch.setattr(time, "time", lambda: 1.0)
    assert -1 < est.LivedClock(state.root / "lived.json").now() - before < 60


def spoil(state: est.StateFolder, run: str) -> None:
    """Make a run's records unreadable without a trace in its folder's times: who reads them then sees nothing."""
    for path in (state.runs / run).glob("*.json"):
        path.write_bytes(b"{")


def test_runs_that_are_over_are_read_from_the_index(state: est.StateFolder) -> None:
    runs = [record(state, number, OK, FAILED) for number in range(3)]
    open_run = record(state, 3, OK, RUNNING)
    first = state.history.newest(10)
    assert [row["run"] for row in first] == [open_run, *reversed(runs)]
    assert [host["state"] for host in first[1]["hosts"]] == ["succeeded", "failed"]
    spoil(state, runs[0])
    spoil(state, open_run)
    rows = state.history.newest(10)
    assert rows[:-1] == first[1:], "the open run was read from its folder, the others were not"
    assert (rows[-1]["run"], rows[-1]["by"]) == (open_run, ""), "of which no more than its files' names tell now"
    assert [json.loads(line)["run"] for line in state.history.index.read_text().splitlines() if line] == runs
    assert state.history.index.stat().st_mode & 0o777 == 0o600, "as everything beside it"


@pytest.mark.parametrize(
    "torn", [b"", b"{", b'{"run":"20231115-000000-0000","stamp":1,"over":tr', b"\xff\xfe{}\n\n[]\n"]
)
def test_the_index_may_be_lost_or_torn(state: est.StateFolder, torn: bytes) -> None:
    record(state, 0, OK, FAILED)
    rows = state.history.newest(10)
    state.history.index.write_bytes(torn)
    assert state.history.newest(10) == rows
    record(state, 1, OK, OK)
    assert state.history.newest(10)[1:] == rows
    for line in state.history.index.read_bytes().split(b"\n")[-2:-1]:
        assert json.loads(line)["over"]
    whole = state.history.index.read_bytes()
    state.history.index.write_bytes(whole[:-40])
    assert state.history.newest(10)[1:] == rows


TORN = [b"", b'{"run": "20231115-0', b"\xff\xfe", b"{}", b"[]"]


@pytest.mark.parametrize("torn", [*TORN, None])
@pytest.mark.parametrize("indexed", [True, False])
def test_a_run_whose_record_is_torn_or_gone_is_still_listed(
    state: est.StateFolder, torn: bytes | None, indexed: bool, capfd: pytest.CaptureFixture[str]
) -> None:
    first, second = record(state, 0, OK, FAILED), record(state, 1, OK, OK)
    rows = state.history.newest(10)
    if not indexed:
        state.history.index.unlink()
    path = state.run_file(first)
    path.unlink()
    if torn is not None:
        path.write_bytes(torn)
    found = state.history.newest(10)
    assert [row["run"] for row in found] == [second, first], "and in its place"
    assert found[1]["hosts"] == rows[1]["hosts"] and found[1]["target"] == "all"
    run = state.load_run(first)
    assert run and run.machines == HOSTS and run.hosts == list(HOSTS)
    asides = [file.read_bytes() for file in path.parent.glob("*.torn")]
    said = capfd.readouterr().err
    assert asides == ([] if torn is None else [torn])
    assert said.count(f"{path} is damaged; what is left of it is kept in run.json.torn") == len(asides)
    assert not state.has_run(first) and state.has_run(second)
    assert state.history.prune(est.KeepRule(runs=9, days=1), tuple, 86400.0) == [], "nothing is older for it"


@pytest.mark.parametrize("torn", TORN)
def test_a_job_whose_record_is_torn_ends_as_the_index_says_or_shows_its_log(
    state: est.StateFolder, torn: bytes
) -> None:
    run = record(state, 0, OK, FAILED)
    rows = state.history.newest(10)
    path = state.job_file(run, "127.0.0.2")
    path.write_bytes(torn)
    state.log_file(run, "127.0.0.2").write_bytes(b"sh deploy.sh...\nstep one\n\n")
    assert state.history.newest(10) == rows
    job = state.load_job(run, "127.0.0.2")
    assert job and (job.state, job.step, job.machine) == (FAILED, "sh deploy.sh", HOSTS["127.0.0.2"])
    state.history.index.unlink()
    row = state.history.newest(10)[0]
    assert [(host["host"], host["state"]) for host in row["hosts"]] == [
        ("127.0.0.1", "succeeded"),
        ("127.0.0.2", "lost"),
    ]
    assert row["hosts"][1]["error"] == "the record of this job is damaged; its log ends with: step one"
    assert state.load_job(run, "127.0.0.2") is None, "so that its host is asked"
    assert path.with_name("127.0.0.2.json.torn").read_bytes() == torn
    state.save_job(replace(job, revision=4))
    assert state.history.newest(10)[0]["hosts"] == rows[0]["hosts"]


def test_a_run_that_can_not_be_read_now_stays_listed(state: est.StateFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    run = record(state, 0, OK, FAILED)
    rows = state.history.newest(10)
    os.utime(state.runs / run)  # its line in the index is an older one

    def fails(*_: object) -> bytes:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(Path, "read_bytes", fails)
    assert state.history.newest(10) == rows
    with pytest.raises(OSError, match="can't be read now"):
        state.load_run(run)
    assert not list((state.runs / run).glob("*.torn"))


@pytest.mark.parametrize("torn", [b"", b"{", None])
def test_what_was_lived_is_never_less_than_what_was_recorded_by_it(state: est.StateFolder, torn: bytes | None) -> None:
    record(state, 3, OK, OK)
    file = state.root / "lived.json"
    state.lived.save()
    file.unlink()
    if torn is not None:
        file.write_bytes(torn)
    assert 0 <= est.StateFolder(state.root).lived.now() - 3 * 86400 < 60


def test_lists_that_can_not_be_read_now_are_not_replaced(
    state: est.StateFolder, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    state.save_key("one", "first")
    config = tmp_path / "config" / "updater.json"
    config.parent.mkdir()
    config.write_text('{"masterUrl": "ws://127.0.0.1:1", "whitelist": []}')
    registry = est.Registry(state, est.ConfigFile(config, state), "c" * 32)
    registry.file.write_text("{}")
    read = Path.read_bytes

    def fails(path: Path) -> bytes:
        if path in (state.keys_file, registry.file):
            raise OSError(5, "Input/output error")
        return read(path)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "read_bytes", fails)
        with pytest.raises(OSError, match="can't be read now"):
            state.save_key("two", "second")
        with pytest.raises(est.UsageError, match=r"can't read .*machines.json"):
            registry.recover()
    state.keys_file.write_bytes(b'{"one": "fir')
    state.save_key("two", "second")
    assert state.keys() == {"two": "second"}
    assert state.keys_file.with_name("keys.json.torn").read_bytes() == b'{"one": "fir'


def test_a_late_word_replaces_what_the_index_says(state: est.StateFolder) -> None:
    run = record(state, 0, OK, est.State.LOST)
    assert [host["state"] for host in state.history.newest(1)[0]["hosts"]] == ["succeeded", "lost"]
    job = state.load_job(run, "127.0.0.2")
    assert job
    state.save_job(replace(job, state=OK, revision=4))
    assert [host["state"] for host in state.history.newest(1)[0]["hosts"]] == ["succeeded", "succeeded"]


def test_what_the_master_has_not_acknowledged_is_not_over(state: est.StateFolder) -> None:
    run = record(state, 0, OK, OK)
    job = state.load_job(run, "127.0.0.1")
    assert job
    state.save_job(replace(job, machine=state.machine_id()))
    os.utime(state.runs / run, (1, 1))
    assert not state.history.rows()[0]["over"]


def recalled(state: est.StateFolder) -> tuple[list[str], int, dict[str, str], dict[str, dict[str, Any]]]:
    """What a daemon's start has to know, from all that is recorded."""
    rows = state.history.rows()
    last: dict[str, dict[str, Any]] = {}
    nonces: dict[str, str] = {}
    for row in reversed(rows):
        last |= est.attempts_of(row)
        nonces |= {row["nonce"]: row["run"]} if row["nonce"] else {}
    return [row["run"] for row in rows if not row["over"]], 1 + max(row["place"] for row in rows), nonces, last


def surveyed(state: est.StateFolder) -> tuple[list[str], int, dict[str, str], dict[str, dict[str, Any]]]:
    found = est.Survey(state.history)
    return found.open, found.next_place, found.nonces, found.last


def spoil_line(before: bytes, after: bytes) -> Callable[[est.StateFolder], object]:
    """Another text for a piece of every line."""

    def spoil_index(state: est.StateFolder) -> None:
        whole = state.history.index.read_bytes()
        assert before in whole
        state.history.index.write_bytes(whole.replace(before, after))

    return spoil_index


@pytest.mark.parametrize(
    "harm",
    [
        lambda state: state.history.index.unlink(),
        lambda state: state.history.index.write_bytes(state.history.index.read_bytes()[:-300]),
        spoil_line(b'"over":true,', b""),
        spoil_line(b'"nonce":"n",', b""),
        spoil_line(b'"hosts":[{"host":', b'"hosts":[{\0\0\0\0\0\0\0'),
        spoil_line(b'"stamp":17000', b'"stamp":16000'),
        spoil_line(b'"place":3,', b'"place":x,'),
    ],
    ids=["lost", "torn", "older", "much older", "zeros in it", "another time", "no number"],
)
def test_a_start_reads_of_the_index_what_the_folders_say(state: est.StateFolder, harm: Any) -> None:
    """Whatever became of the index: it is read anew from the folders, and never believed."""
    ends = [(OK, OK), (OK, FAILED), (FAILED, est.State.OFFLINE), (OK, est.State.OFFLINE), (RUNNING, FAILED)]
    runs = [record(state, number, *states) for number, states in enumerate(ends)]
    record(state, 5, OK, OK, kind=est.Kind.SWITCH)
    order = state.load_run(runs[0])
    assert order
    state.save_run(replace(order, nonce='a "b" \\ 끝'))
    os.utime(state.runs / runs[0], (1_700_000_000, 1_700_000_000))
    expected = recalled(state)
    assert expected[0] == [runs[4]] and expected[1] == 7 and len(expected[2]) == 2
    assert [job["run"] for job in expected[3].values()] == [runs[3], runs[4]]
    assert surveyed(state) == expected
    harm(state)
    assert surveyed(state) == expected
    assert surveyed(state) == expected, "and from the new lines"


def test_a_start_sees_what_happened_behind_the_index(state: est.StateFolder) -> None:
    """A folder that is gone, one that an older backup brought back, one that is new."""
    runs = [record(state, number, OK, OK) for number in range(4)]
    assert surveyed(state)[0] == []
    for name in (state.runs / runs[3]).iterdir():
        name.unlink()
    (state.runs / runs[3]).rmdir()
    job = state.load_job(runs[1], "127.0.0.1")
    assert job
    state.save_job(replace(job, state=RUNNING, ended=None))
    os.utime(state.runs / runs[1], (1, 1))
    runs.append(record(state, 4, FAILED, RUNNING))
    found = surveyed(state)
    assert found == recalled(state) and found[0] == [runs[4], runs[1]] and found[1] == 6
    assert [last["run"] for last in found[3].values()] == [runs[4], runs[2]]


def count_loads(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What is read as JSON from now on."""
    made: list[Any] = []
    loads = json.loads

    def count(text: Any) -> Any:
        made.append(text)
        return loads(text)

    monkeypatch.setattr(json, "loads", count)
    return made


def test_a_start_makes_no_rows_of_what_is_over(state: est.StateFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the newest deployment of each host says is enough, however many there were before."""
    for number in range(10):
        record(state, number, OK, OK)
    state.history.rows()
    made = count_loads(monkeypatch)
    assert len(surveyed(state)[3]) == 2
    assert len(made) == 1


def test_attempts_of_the_newest_runs_make_no_rows_of_the_others(
    state: est.StateFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = [record(state, number, OK, OK) for number in range(12)]
    state.history.rows()  # they are in the index now
    made = count_loads(monkeypatch)
    for newest in state.history.attempts(5).values():
        assert [each["run"] for each in newest] == runs[-5:]
    assert len(made) == 5
    for whole in state.history.attempts().values():
        assert [each["run"] for each in whole] == runs


def test_old_runs_go_but_not_the_last_success_of_a_host(state: est.StateFolder) -> None:
    runs = [
        record(state, 0, OK, OK, kind=est.Kind.SWITCH),
        record(state, 1, FAILED, OK),
        record(state, 2, OK, FAILED),
        record(state, 3, OK, FAILED),
        record(state, 4, FAILED, RUNNING),
        record(state, 5, FAILED, FAILED),
        record(state, 6, FAILED, FAILED),
    ]
    state.history.rows()
    keep = est.KeepRule(runs=1, days=36500)
    assert state.history.prune(keep, lambda: {runs[5]}, SETTLED_S) == [runs[2]]
    left = [runs[i] for i in (6, 5, 4, 3, 1, 0)]
    assert [row["run"] for row in state.history.newest(10)] == left
    assert [json.loads(line)["run"] for line in state.history.index.read_bytes().split(b"\n") if line] == sorted(
        {*left} - {runs[4]}
    )
    assert state.history.prune(keep, lambda: {runs[5]}, SETTLED_S) == []
    gone = state.history.prune(est.KeepRule(runs=500, days=1), tuple, 86400.0 * 20)
    assert gone == [runs[5]], "the newest stays"


def test_a_run_that_somebody_begins_to_follow_does_not_go(state: est.StateFolder) -> None:
    runs = [record(state, number, OK, OK) for number in range(4)]
    wanted = iter([(), (), {runs[1]}, {runs[1]}])
    assert state.history.prune(est.KeepRule(runs=1), lambda: next(wanted), SETTLED_S) == [runs[0], runs[2]]
    assert [row["run"] for row in state.history.newest(9)] == [runs[3], runs[1]]


def test_old_runs_go_where_all_take_too_much_of_the_disk(state: est.StateFolder) -> None:
    runs = [record(state, i, FAILED, FAILED) for i in range(4)]
    for run, megabytes in zip(runs, (1, 1, 2, 3), strict=True):
        (state.runs / run / "127.0.0.1.log").write_bytes(bytes(megabytes * 1_000_000))
    keep = est.KeepRule(megabytes=6)
    assert state.history.prune(keep, lambda: {runs[0]}, SETTLED_S) == [runs[1]]
    assert state.history.prune(est.KeepRule(megabytes=1), tuple, SETTLED_S) == [runs[0], runs[2]], "the newest stays"


def test_statistics(state: est.StateFolder) -> None:
    for number, ends in enumerate([(OK, OK), (OK, FAILED), (FAILED, est.State.OFFLINE), (OK, FAILED), (OK, OK)]):
        record(state, number, *ends)
    record(state, 5, RUNNING, OK)
    record(state, 6, OK, OK, kind=est.Kind.SWITCH)
    stats = est.run_stats(state.history.rows())
    assert [(one["host"], one["kind"], one["runs"], one["ok"], one["median_s"]) for one in stats] == [
        ("127.0.0.1", "deploy", 5, 4, 12.0), ("127.0.0.1", "switch", 1, 1, 16.0),
        ("127.0.0.2", "deploy", 6, 3, 14.0), ("127.0.0.2", "switch", 1, 1, 16.0),
    ]  # fmt: skip
    assert stats[2]["states"] == {"failed": 2, "offline": 1} and stats[2]["steps"] == {"sh deploy.sh": 2}


def test_a_deployment_by_hand_is_adopted_by_the_master(fleet: MakeFleet) -> None:
    one = fleet(hosts=2, start=False)
    agent = one.agents[0]
    one.origin.commit({"deploy.sh": "echo by hand\n"})
    alone = one.cli("deploy", "master", host=agent)
    assert alone.code == 0 and f"✓ 완료 {VERSION}" in alone.out and "by hand" in alone.out, alone.err
    assert one.cli("deploy", "no-such-branch", host=agent).code == 1
    one.start()
    wait_for(lambda: len(history(one)) == 2, "the master knows both runs")
    second = one.cli("deploy", "master", host=agent)
    assert second.code == 0, second.err
    wait_for(lambda: len(history(one)) == 3 and history(one)[0]["hosts"][0]["ok"], "and the third")
    run = str(history(one)[0]["run"])
    assert "by hand" in one.cli("logs", run).out


def test_a_host_that_a_job_holds_takes_no_second(fleet: MakeFleet) -> None:
    one = fleet(hosts=2)
    agent = one.agents[0]
    go = one.tmp_path / "go"
    one.origin.commit({"deploy.sh": f"echo waiting; while [ ! -e {go} ]; do sleep 0.1; done\n"})
    detached = one.cli("trigger", agent.address, "master", "--detach")
    run = detached.out.strip()
    wait_for(lambda: "waiting" in one.cli("logs", run).out, "the job runs")
    refused = one.cli("deploy", "master", host=agent)
    assert refused.code == 5 and run in refused.err and "Traceback" not in refused.err
    go.touch()
    assert one.cli("logs", run, "-f").code == 0


def test_forget(fleet: MakeFleet) -> None:
    one = fleet(hosts=2)
    agent = one.agents[0]
    online = one.cli("forget", agent.address)
    assert online.code == 5 and "online" in online.err
    one.stop(agent)
    assert one.cli("forget", "127.0.0.9").code == 4
    wait_for(lambda: one.cli("forget", agent.address).code == 0, "the host is offline and forgotten")
    assert one.cli("trigger", "all", "master").code == 0, "all is the master alone"
    one.start(agent)
    assert agent.address in one.cli("status").out, "a host that comes back is known again"


def edit(config: Path, **changes: object) -> None:
    config.write_text(json.dumps(json.loads(config.read_text()) | changes))


def test_the_configuration_is_followed_live(fleet: MakeFleet) -> None:
    one = fleet(hosts=2, start=False)
    whitelist = ["127.0.0.1"]
    edit(one.master.config, whitelist=whitelist)
    one.start(one.master)
    agent = one.agents[0]
    one.spawn(agent)
    wait_for(lambda: "refused" in agent.stderr and "127.0.0.2" in agent.stderr, "the agent is refused, and told why")
    edit(one.master.config, whitelist=[*whitelist, "127.0.0.2"])
    wait_for(lambda: "new settings" in one.master.stderr, "the new entry counts")
    one.restart(agent)
    edit(one.master.config, whitelist=whitelist)
    wait_for(lambda: "no longer on the whitelist" in one.master.stderr, "a removed entry cuts the link")

    good = one.master.config.read_text()
    one.master.config.write_text("{")
    wait_for(
        lambda: json.loads(one.cli("status", "--json", host=agent, bind="127.0.0.1").out)["master"]["problem"], "told"
    )
    one.master.config.unlink()
    assert one.cli("status", host=agent, bind="127.0.0.1").code == 0, "a missing file keeps the old settings"
    one.master.config.write_text(good)
    wait_for(
        lambda: not json.loads(one.cli("status", "--json", bind="127.0.0.1").out)["master"]["problem"],
        "all is well again",
    )


def test_a_branch_without_configuration_can_be_left_again(fleet: MakeFleet) -> None:
    """Regression: the job before the repair must not need what the repair brings."""
    one = fleet(hosts=1)
    good = one.origin.commit({"a.txt": "1"})
    config = one.master.config.read_text()
    one.origin.commit({"config/updater.json": None}, message="oops")
    broken = one.cli("trigger", "all", "master")
    assert broken.code == 1 and "✗ 실패 config" in broken.out, broken.out
    one.origin.commit({"config/updater.json": config}, message="repair")
    repaired = one.cli("trigger", "all", "master", env={"ESTELLE_CONFIG": str(_copy(one, config))})
    assert repaired.code == 0, repaired.out + repaired.err
    one.stop(one.master)
    assert good


def _copy(fleet: Fleet, text: str) -> Path:
    path = fleet.tmp_path / "config" / "updater.json"
    path.parent.mkdir()
    path.write_text(text)
    return path


def test_a_whitelist_that_shuts_out_the_commander_is_warned_of(fleet: MakeFleet) -> None:
    one = fleet(hosts=2)
    config = json.loads(one.agents[0].config.read_text()) | {"whitelist": ["127.0.0.1"]}
    one.origin.commit({"config/updater.json": json.dumps(config)})
    one.cli("trigger", "127.0.0.1", "master", host=one.agents[0])  # which may be cut off before it sees the line
    said = one.cli("logs", one.runs()[-1].name, "-f").out
    assert "warning: the whitelist has no entry for 127.0.0.2, where this run was asked for" in said
    wait_for(lambda: "no longer on the whitelist" in one.master.stderr, "it takes effect")
