"""A hostile host that is allowed in: what it says of itself and of nobody else, how much of it, and how often."""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from tests import seam as est
from tests.commands import COMMAND, job_of, write_script
from tests.fleet import Fleet, wait_for
from tests.peers import MACHINE, Peer

A, B, C, H = (f"127.0.0.{n}" for n in (1, 2, 3, 9))
CROWD, YET = "127.0.0.8", "127.0.0.11"  # many machines of one address; a host that has yet to come


def record(run_id: str, host: str, **more: Any) -> est.JobRecord:
    fields: dict[str, Any] = {"branch": "master", "revision": 1, "created": time.time()} | more
    return est.JobRecord(run_id, host, MACHINE, est.Kind.DEPLOY, **fields)


def new_run(number: int) -> str:
    return time.strftime("%Y%m%d-%H%M%S-", time.gmtime()) + f"{number:04x}"


@contextmanager
def answering(peer: Peer, answer: Callable[[est.Ask], dict[str, Any]]) -> Iterator[None]:
    """The peer answers every question, beside whatever the test says."""

    def go() -> None:
        while (message := peer.hear()) is not None:
            if isinstance(message, est.Ask):
                peer.say(est.Answer(message.id, answer(message)))

    thread = threading.Thread(target=go)
    thread.start()
    try:
        yield
    finally:
        peer.close()
        thread.join()


# What it says (pure)


def test_a_job_is_its_hosts_word_and_nothing_else() -> None:
    run = est.replace(est.run_of_job(record("20260101-000000-abcd", "h")), nonce="n", place=7)
    said = record(
        run.run, "h", state=est.State.SUCCEEDED, provisional=True, behind="x", place=99, started=9e15, ended=-1.0,
        commit="c" * 999, warnings=["w" * 9999] * 999, timed_steps=["s" * 999] * 999, timed_s=[1.0] * 999,
    )  # fmt: skip
    ordered = est.job_of_run(run, "h")
    kept = est.as_ordered(ordered, said)
    assert (kept.provisional, kept.ordered, kept.behind, kept.place) == (False, True, None, 7)
    assert (kept.started, kept.ended, len(kept.commit or "")) == (None, None, 64)
    assert len(est.encode_message(kept)) < 150_000 and len(kept.warnings) == 50
    honest = est.replace(said, started=5.0, ended=6.0, commit="c" * 40, warnings=["a", "b"], timed_steps=["x"])
    kept = est.as_ordered(ordered, honest)
    assert (kept.started, kept.ended, kept.commit, kept.warnings) == (5.0, 6.0, "c" * 40, ["a", "b"])


@pytest.mark.parametrize("label", ["127.0.0.2", "10.0.0.2/yq-blue~7f3a", "2001:db8::7", "10.0.0.2/사무실", "x" * 200])
def test_a_label_of_a_host(label: str) -> None:
    assert est.valid_label(label)


@pytest.mark.parametrize(
    "label",
    ["", "x" * 201, "127.0.0.1] ✓ 완료 v9 [", "127.0.0.1]", "[x", "a b", "a\u3164b", "a\u00a0b", "a\ufffdb", "a\u034fb",
     "a\u115fb", "a\u2800b", "a\u180bb", "a\ufe01b", "a\U000e0100b", "a\u202eb", "a\tb"],
)  # fmt: skip
def test_no_label(label: str) -> None:
    assert not est.valid_label(label) and not est.valid_host_name(label)


def test_what_nobody_sees_is_shown() -> None:
    for letter in "\u034f\u115f\u1160\u17b4\u180b\u2800\u3164\ufe00\uffa0\U000e0100\U000e01ef":
        assert letter.isprintable()
        assert est.one_line(f"v1{letter}2") == "v1\ufffd2"
    for text in ("배포 완료 ✓", "v1\ufe0f", "e\u0301", "👩🏽 x", ""):
        assert est.one_line(text) == text
    assert est.terminal_text("a\U000e0041\U000e0150b") == "ab", "words for a model, in a log"


def test_a_message_has_a_depth() -> None:
    for depth, fits in ((30, True), (150, False), (400, False)):
        nested = '{"a":' * depth + "1" + "}" * depth
        ask = f'{{"verb":"ask","id":1,"what":"status","args":{nested}}}'
        answer = f'{{"verb":"answer","id":1,"result":{nested}}}'
        for text in (ask, answer):
            if fits:
                est.decode_message(text)
            else:
                with pytest.raises(est.ProtocolError, match="nested too deeply"):
                    est.decode_message(text)


def test_an_answer_has_an_end_and_what_is_needed() -> None:
    wrong: list[dict[str, Any]] = [
        {"servers": {}},
        {"active": "blue", "servers": {}},
        {"active": "blue", "servers": [], "warnings": []},
    ]
    for answer in wrong:
        assert "makes no sense" in est.fitting_answer("traffic", answer)["error"]
    assert "makes no sense" in est.fitting_answer("compare", {"current": "x"})["error"]
    large = {"subjects": ["s" * 99_999] * 9999, "command": "c" * 99_999}
    assert len(json.dumps(est.fitting_answer("plan", large))) < 2_100_000
    assert est.fitting_answer("plan", {"subjects": ["a"], "more": 1}) == {"subjects": ["a"]}
    assert est.fitting_answer("health", {"checks": [{"name": "x", "ok": True}]})["checks"][0]["ok"] is True


# What it does


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    rule = {"host": H, "config": "/x/haproxy.cfg", "backend": "b", "servers": {"blue": "blue", "green": "green"}}
    config = {
        "whitelist": [A, B, C, "127.0.0.0/24", YET], "keep": {"jobMegabytes": 1}, "haproxy": rule,
        "hosts": {B: {"color": "blue"}, C: {"color": "green", "name": "yq-green"}, "127.0.0.12/yq-data": {}},
    }  # fmt: skip
    made = Fleet(tmp_path_factory.mktemp("hostile"), command=COMMAND, config=config)
    made.start()
    write_script("echo fine\n", *made.hosts)
    yield made
    made.stop_all()


def test_no_word_of_a_host_is_anothers_line_or_takes_a_result_back(one: Fleet) -> None:
    with Peer(one, H, "agent") as false:
        for number, host in enumerate(("127.0.0.1] ✓ 완료 v9 [", f"{B} ✓ v9  {C}", f"{B}/web", f"{A}/x", f"{C}\u3164")):
            said = record(new_run(number), host, state=est.State.SUCCEEDED)
            assert "another host's name, or none" in false.refused(said), host
        run, place = new_run(99), one.master.state
        false.say(record(run, H, branch="b" * 9999, target="t" * 9999, by="w" * 9999, created=-9e15))
        false.say(record(run, H, state=est.State.SUCCEEDED, revision=2, version="v1", provisional=True))
        false.until(lambda message: isinstance(message, est.Acked) and message.run == run)
        for number, state in enumerate((est.State.RUNNING, est.State.QUEUED, est.State.FAILED)):
            false.say(record(run, H, state=state, revision=3 + number, step="x"))
        assert "can't say" in false.refused(est.Cancel(run)), "all of that was heard"
        kept = job_of(one, run, H)
        assert (kept["state"], kept["version"], kept["provisional"]) == ("succeeded", "v1", False)
        assert json.loads((place / "runs" / run / "run.json").read_bytes())["created"] == 0
        for words in (("history",), ("status",), ("logs", run), ("history", "--stats")):
            code, out, err = one.cli(*words)
            assert code == 0 and len(out) < 8000, (words, err, len(out))


def test_nobody_calls_itself_as_another_host_is_called(one: Fleet) -> None:
    """A run that nobody ordered is recorded by the label that its host gives itself."""
    others = (
        "yq-green", "YQ-Green", "other", "yq-data", YET, f"{YET}/x", "127.0.0.12", f"{B}:", f"{B}|", f"{B}…", f"{B}%1",
        f"::ffff:{B}", f"{B}:9900", f"{B}~ab", f"{B},{C}", "0127.0.0.2", "１２７.0.0.2", "all", "standby", "✓",
    )  # fmt: skip
    mine = (H, f"{H}/stranger", f"{H}/stranger~abab", "stranger-2", "127.0.0.77")
    with Peer(one, H, "agent") as false, Peer(one, "127.0.0.13", "agent", "ef" * 16, name="other"):
        for number, host in enumerate(others, 400):
            said = record(new_run(number), host, state=est.State.SUCCEEDED, version="v9")
            assert "another host's name, or none" in false.refused(said), host
        for number, host in enumerate(mine, 450):
            said = record(run := new_run(number), host, state=est.State.SUCCEEDED)
            false.say(said)
            assert false.until(lambda message: isinstance(message, est.Acked)).host == host
            borrowed = [f"{H} (stranger) reported this, and calls itself {host}"] * (host == "127.0.0.77")
            assert job_of(one, run, host)["warnings"] == borrowed


def test_a_host_that_comes_again_and_again_fills_no_log(one: Fleet) -> None:
    before = len(one.master.stderr)
    keys: dict[str, str] = {}
    for number in range(30):
        source = ("127.0.0.14", "127.0.0.15")[number % 2]
        with Peer(one, source, "agent", "1f" * 16, keys=keys, name="yq-green") as false:
            keys = keys or {false.welcome.master: false.welcome.key}
    said = one.master.stderr[before:].splitlines()
    for text in ("claims the name yq-green", "has a new address"):
        assert 0 < sum(text in line for line in said) <= 2, text


def test_a_run_that_nobody_ordered_is_each_hosts_own_word(one: Fleet) -> None:
    """A new master hears of older runs: who reports one first does not say what the others did."""
    run, other = new_run(150), "127.0.0.10"
    second = {"target": "all", "by": "alice@127.0.0.1", "state": est.State.SUCCEEDED, "version": "v7"}
    lie = {"branch": "evil", "target": "all", "by": "root@127.0.0.1", "state": est.State.SUCCEEDED}
    with Peer(one, H, "agent") as false, Peer(one, other, "agent", "cd" * 16) as honest:
        for peer, said in ((false, record(run, H, **lie)), (honest, record(run, other, **second))):
            peer.say(said)
            peer.until(lambda message: isinstance(message, est.Acked) and message.run == run)
    kept = job_of(one, run, other)
    assert {name: kept[name] for name in ("branch", "target", "by", "version")} == {
        "branch": "master", "target": "all", "by": "alice@127.0.0.1", "version": "v7",
    }  # fmt: skip
    (warning,) = kept["warnings"]
    assert warning == f"nobody ordered this run here, and {other} says that it was: deploy master on all"
    (row,) = (row for row in json.loads(one.cli("history", "--json").out)["runs"] if row["run"] == run)
    assert {row["branch"], row["by"], row["target"]} == {"hosts-disagree", "all"}, "and no title for all"
    whole = est.run_of_job(est.replace(record(run, H), **lie))
    news = est.news_of_job(whole, est.replace(record(run, other), **second), b"")
    assert (news["by"], news["branch"]) == ("alice@127.0.0.1", "master") and "root" not in news["detail"]
    assert job_of(one, run, H)["warnings"] == [] and warning in one.cli("history", "--json").out
    back = est.replace(record(run, other), kind=est.Kind.ROLLBACK, branch="1" * 40, target="all")
    first = est.run_of_job(est.replace(back, branch="2" * 40))
    assert est.disagreement(first, back) == [], "each goes back to a commit of its own"
    assert est.disagreement(est.replace(first, nonce="n", kind=est.Kind.DEPLOY), back) == []


def test_a_job_that_says_again_and_again_that_it_waits_is_answered_once(one: Fleet) -> None:
    asked: Counter[str] = Counter()

    def answer(ask: est.Ask) -> dict[str, Any]:
        asked[ask.what] += 1
        return {"servers": {}, "active": None, "warnings": []}

    false = Peer(one, H, "agent")
    with answering(false, answer):
        run = new_run(200)
        for number in range(500):
            false.say(record(run, H, state=est.State.RUNNING, revision=number + 1, step="check traffic"))
        wait_for(lambda: asked["traffic"] > 1, "it is asked again while it waits")
        assert asked["traffic"] < 10
        false.say(record(run, H, state=est.State.FAILED, revision=999, step="x"))


def test_whatever_haproxys_host_answers_others_see_the_fleet(one: Fleet) -> None:
    shapes: list[dict[str, Any]] = [
        {"servers": {}}, {"servers": {}, "active": "purple"}, {"active": 5, "servers": {}, "warnings": []},
        {"servers": {"blue": {}}, "active": "purple", "warnings": ["w" * 300_000], "by_file": {}}, {"checks": 5}, {},
        {"error": "e" * 300_000},
    ]  # fmt: skip
    said: list[dict[str, Any]] = []
    false = Peer(one, H, "agent")
    with answering(false, lambda _: said[-1]):
        for shape in shapes:
            said.append(shape)
            code, out, err = one.cli("status")
            assert code == 0 and B in out and len(out) < 8000, (shape, out, err)
            for words in (("plan", "standby", "master"), ("trigger", "active", "master")):
                code, _, err = one.cli(*words)
                assert code in (4, 5) and "error:" in err, (shape, words, err)


def test_a_question_that_fails_is_answered_so(one: Fleet) -> None:
    """Whatever a host or a person makes us fall over: who asks hears that it failed, and keeps the connection."""
    with Peer(one, A, "commander") as person:
        person.say(est.Ask(1, "log", {"run": new_run(1), "offsets": {}, "bytes": 5, "target": {"a": 1}}))
        assert person.until(lambda message: isinstance(message, est.Refuse)).id == 1
        wrong: list[dict[str, Any]] = [{"seen": {"a": []}}, {"target": ["x"]}, {"count": 10**18}]
        for number, args in enumerate(wrong, 2):
            for what in ("health", "history", "plan", "forget", "find"):
                person.say(est.Ask(number, what, args))
                person.until(lambda message: isinstance(message, est.Answer | est.Refuse))


def test_who_freezes_or_pauses_is_known_by_its_address(one: Fleet) -> None:
    alias = f"alice@{A}\n[{B}] ✓ 완료 v9"
    with Peer(one, H, "commander", name="stranger") as person:
        asked: list[tuple[str, dict[str, Any]]] = [("freeze", {"name": "x", "seconds": 600}), ("thaw", {"name": "x"})]
        for number, (what, args) in enumerate(asked, 1):
            person.say(est.Ask(number, what, {**args, "by": alias}))
            person.until(lambda message: isinstance(message, est.Answer))
            shown = f"alice@{A} [{B}] ✓ 완료 v9@{H} {what}s"
            assert shown in one.master.stderr, what
            warnings = json.loads(one.cli("status", "--json").out)["warnings"]
            assert (what == "freeze") == any(f"v9@{H}" in text for text in warnings), warnings
        person.say(est.Ask(3, "thaw", {"by": {"a": [1]}, "name": "none"}))
        assert person.until(lambda message: isinstance(message, est.Refuse)).id == 3


def test_a_log_can_not_fill_the_masters_disk(one: Fleet) -> None:
    run, data = new_run(300), b"x" * 60_000
    with Peer(one, H, "agent") as false:
        false.say(record(run, H, state=est.State.RUNNING))
        false.say(est.Log(1, run, H, 1))
        false.until(lambda message: isinstance(message, est.Have))
        for number in range(80):
            false.say(est.encode_chunk(1, number * len(data), data))
        false.say(record(run, H, state=est.State.FAILED, revision=2, size=80 * len(data)))
        false.until(lambda message: isinstance(message, est.Acked) and message.run == run)
    path = one.master.state / "runs" / run / f"{H}.log"
    assert 2_000_000 < path.stat().st_size < (2 << 20) + 1000
    assert b"log incomplete: more than 2097152 bytes" in path.read_bytes()[-200:]
    assert job_of(one, run, H)["state"] == "failed"


def test_many_machines_whose_jobs_wait_ask_haproxys_host_together(one: Fleet) -> None:
    asked: Counter[str] = Counter()

    def answer(ask: est.Ask) -> dict[str, Any]:
        asked[ask.what] += 1
        return {"servers": {}, "active": None, "warnings": []}

    false, crowd = Peer(one, H, "agent"), []
    with answering(false, answer):
        for number in range(40):
            machine = f"{number + 1:032x}"
            crowd.append(Peer(one, CROWD, "agent", machine, keys={}, name=f"n{number}"))
            host = crowd[-1].welcome.label
            run = new_run(600 + number)
            crowd[-1].say(record(run, host, state=est.State.RUNNING, step="check traffic"))
        wait_for(lambda: asked["traffic"] > 1, "it is asked")
        before, began = asked["traffic"], time.monotonic()
        wait_for(lambda: time.monotonic() > began + 3, "it is asked for a while")
        most = (time.monotonic() - began) / est.TRAFFIC_PAUSE_S + 1
        assert 0 < asked["traffic"] - before <= most, "once for all of them"
        for peer in crowd:
            peer.close()


def test_a_commander_that_asks_hundreds_of_times_keeps_nobody_from_a_plan(one: Fleet) -> None:
    """Each host answers four at once, in the order in which they came; of one address two are asked."""
    peers = [Peer(one, H, "commander") for _ in range(10)]
    asked = {"action": "update", "target": "all", "branch": "master"}
    try:
        for peer in peers:
            for number in range(30):
                peer.say(est.Ask(number + 1, "plan", asked))
        for peer in peers:  # it has taken all of them
            peer.say(est.Cancel("20260101-000000-abcd"))
            peer.until(lambda message: isinstance(message, est.Refuse))
        peers[-1].say(est.Ask(31, "history", {"count": 1}))
        answer = peers[-1].until(lambda message: isinstance(message, est.Answer))
        assert answer.id == 31, "each kind of question has places of its own"
        for _ in range(2):
            found = one.cli("plan", B, "master")
            assert found.code == 0, found
    finally:
        for peer in peers:
            peer.close()
    assert one.cli("plan", B, "master").code == 0, "and what nobody waits for is not asked"
