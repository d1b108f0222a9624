"""Deploy on push: once per commit, over restarts, freezes, pauses, failures and a remote that is gone."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests import seam as est
from tests.fleet import Fleet, wait_for
from tests.test_notify import Receiver

FAILS = "echo broken; exit 3\n"


class Watching:
    """A fleet whose master watches master (deploy) and next (plan)."""

    def __init__(self, fleet: Fleet, news: Receiver) -> None:
        self.fleet, self.news = fleet, news

    def runs(self) -> list[dict[str, Any]]:
        """The recorded runs, newest first."""
        found: list[dict[str, Any]] = json.loads(self.fleet.cli("history", "--json").out)["runs"]
        return found

    def rows(self) -> dict[str, dict[str, Any]]:
        asked = self.fleet.cli("watch", "--json")
        assert asked.code == 0, asked.err
        answer = json.loads(asked.out)
        return {row["branch"]: row for row in answer["watches"]} | {"": answer}

    def ask_now(self) -> None:
        """A pause that ends has the remote asked at once, where `every` would be 15 s."""
        assert self.fleet.cli("watch", "pause").code == 0
        assert self.fleet.cli("watch", "resume").code == 0

    def remembers(self, commit: str) -> bool:
        """Whether the master's own file has a commit: cheaper to ask for many seconds than the master by a command."""
        path = self.fleet.master.state / "watches.json"
        return path.exists() and f'"{commit}"' in path.read_text()

    def first_look(self) -> None:
        wait_for(lambda: self.remembers(self.fleet.origin.first), "the first look")
        assert self.rows()["master"]["seen"] == self.fleet.origin.first

    def done(self, commit: str, branch: str = "master") -> dict[str, Any]:
        """The watch's row once it has done with a commit, and nothing of the run is left to do."""
        wait_for(lambda: self.remembers(commit), lambda: f"{commit} is done: {self.rows()}")

        def over() -> dict[str, Any]:
            row = self.rows()[branch]
            going = [host for host in row["hosts"] if host["state"] not in est.FINAL]
            return row if row["done"] == commit and not going else {}

        return wait_for(over, lambda: f"{commit} is done: {self.rows()}")


@pytest.fixture
def watching(fleet: Callable[..., Fleet]) -> Any:
    news = Receiver()
    watches = [{"branch": "master", "every": 15}, {"branch": "next", "then": "plan", "by": "planner"}]
    notify = [{"url": news.url + "/hook", "on": ["pushed", "failed", "succeeded"]}]
    one = fleet(hosts=2, config={"watch": watches, "notify": notify})
    yield Watching(one, news)
    news.close()


def test_a_push_is_deployed_once(watching: Watching) -> None:
    one, origin = watching.fleet, watching.fleet.origin
    watching.first_look()
    assert watching.runs() == [], "what was there before is no push"
    # by itself, within `every`
    pushed = origin.commit({"app.txt": "2"}, message="Fix <!channel> the login")
    row = watching.done(pushed)
    assert {host["host"]: host["commit"] for host in row["hosts"]} == {h.address: pushed for h in one.hosts}
    (run,) = watching.runs()
    assert (run["by"], run["target"], run["branch"]) == ("watch", "all", "master")
    said = f"pushed: {pushed[:7]} Tester: Fix <!channel> the login"

    def told() -> bool:
        events = [json.loads(body) for body in watching.news.bodies("/hook")]
        return {"pushed", "succeeded"} <= {one["event"] for one in events if one["pushed"] == said}

    wait_for(told, lambda: f"people are told: {watching.news.bodies('/hook')}")
    # a master that died before it could remember the run
    path = one.master.state / "watches.json"
    one.kill(one.master)
    past = json.loads(path.read_text())
    past["watches"]["master all"] = {"done": origin.first, "moves": 0}
    path.write_text(json.dumps(past))
    one.restart(one.master)
    one.wait_online()
    watching.done(pushed)
    assert [found["run"] for found in watching.runs()] == [run["run"]]
    # whoever was faster than the watch has deployed it
    assert one.cli("watch", "pause").code == 0
    by_hand = origin.commit({"app.txt": "3"})
    assert one.cli("trigger", "all", "master").code == 0
    assert one.cli("watch", "resume").code == 0
    assert watching.done(by_hand)["run"] is None and len(watching.runs()) == 2
    # a plan deploys nothing, and says how to go on
    planned = origin.commit({"app.txt": "4"}, "next")
    watching.ask_now()
    watching.done(planned, "next")
    assert len(watching.runs()) == 2
    again = origin.commit({"app.txt": "5"}, "next")
    watching.ask_now()
    watching.done(again, "next")
    wait_for(lambda: "trigger all next --plan" in str(watching.news.bodies("/hook")), "the plan is told")


def test_what_holds_a_push_back(watching: Watching) -> None:
    one, origin = watching.fleet, watching.fleet.origin
    watching.first_look()
    # a failed commit is not tried again, nor after a restart
    broken = origin.commit({"deploy.sh": FAILS})
    watching.ask_now()
    assert [host["state"] for host in watching.done(broken)["hosts"]] == ["failed", "failed"]
    one.restart(one.master)
    one.wait_online()
    watching.ask_now()
    wait_for(lambda: watching.rows()["master"]["seen"] == broken, "the remote is asked again")
    assert len(watching.runs()) == 1
    # which nobody would guess: what has to be typed stands where one looks
    run = watching.rows()["master"]["run"]
    addresses = ", ".join(host.address for host in one.hosts)
    left = f"master {broken[:7]} did not succeed on {addresses}; a watch orders no commit twice: "
    for command in ("status", "watch"):
        assert re.search(rf"! (watch: )?{left}`.* trigger --failed-of {run}`", one.cli(command).out)
    assert f"watch: master on all goes on from {broken[:7]}" in one.master.stderr
    # a freeze holds it
    assert one.cli("freeze", "market", "--for", "1h").code == 0
    mended = origin.commit({"deploy.sh": "echo fine\n"})
    watching.ask_now()
    wait_for(lambda: "frozen by market" in str(watching.rows()["master"]["held"]), "it is held")
    assert "watch master on all: market holds every deploy back" in one.cli("status").out
    assert len(watching.runs()) == 1
    assert one.cli("thaw").code == 0
    assert [host["state"] for host in watching.done(mended)["hosts"]] == ["succeeded", "succeeded"]
    assert "did not succeed" not in one.cli("status").out
    # paused, also over a restart
    assert "paused by" in one.cli("watch", "pause").out
    later = origin.commit({"app.txt": "later"})
    one.restart(one.master)
    one.wait_online()
    assert "watch is paused by" in one.cli("status").out and len(watching.runs()) == 2
    code, told, _ = one.cli("status", "--json")
    assert code == 0 and any("watch is paused by" in text for text in json.loads(told)["warnings"])
    # a remote that is gone
    gone = Path(f"{origin.bare}.gone")
    os.rename(origin.bare, gone)
    assert one.cli("watch", "resume").code == 0
    wait_for(lambda: "remote does not answer" in str(watching.rows()[""]["problem"]), "trouble is said")
    told = one.cli("watch").out
    assert "! the remote does not answer: " in told and "; it is asked again in " in told
    assert "watch resume" in told, "who has mended it need not wait"
    os.rename(gone, origin.bare)
    watching.ask_now()
    watching.done(later)
    assert len(watching.runs()) == 3 and watching.rows()[""]["problem"] is None


def test_no_question_beside_a_job(fleet: Callable[..., Fleet], tmp_path: Path) -> None:
    """A git of the watch in the clone would keep a job from clearing away locks that a dead git left."""
    one = fleet(hosts=1, start=False)
    state = est.StateFolder(one.master.state)
    state.create()
    config = est.ConfigFile(one.master.config, state)
    agent = est.Agent(state, config, "0" * 32, "", est.Nursery(state, one.master.config))
    asked = {"address": "127.0.0.1", "branches": ["master", "none"]}
    first = one.origin.first
    assert est.tell_remote(agent, asked) == {"heads": {"master": first}, "known": {"master": first, "none": ""}}
    new = one.origin.commit({"app.txt": "2"}, message="One")
    told = est.tell_pushed(agent, {"address": "127.0.0.1", "branch": "master", "old": first, "new": new})
    assert told == {"commits": 1, "leaving": 0, "subjects": [f"{new[:7]} Tester: One"]}
    lock = est.FileLock(state.job_lock)
    assert lock.acquire(timeout_s=5)
    assert est.tell_remote(agent, asked) == {"busy": True}
    lock.release()
    for wrong in ("-x", "a b"):
        with pytest.raises(est.UsageError):
            est.tell_remote(agent, {"branches": [wrong]})


def test_a_terminal_s_rows_break_in_no_address() -> None:
    jobs = [("192.0.2.11", "failed"), ("192.0.2.12/office", "succeeded")]
    hosts = [
        {"host": host, "state": state, "ok": state == "succeeded", "version": "v1", "step": "sh deploy.sh",
         "exit": 3, "error": None, "commit": None}
        for host, state in jobs
    ]  # fmt: skip
    row = {"branch": "결제-금액-반올림", "target": "192.0.2.11,192.0.2.12", "then": "deploy", "seen": "a" * 40,
           "at": 0.0, "run": "20261127-225148-c919", "plan": None, "held": None, "hosts": hosts}  # fmt: skip
    told = {"watches": [row, row | {"held": "market holds every deploy back"}], "problem": "gone", "paused": None}
    lines = est.watch_screen(told, 80)
    assert all(est.count_cells(line) <= 80 for line in lines), lines
    assert lines[2:5] == [
        "    20261127-225148-c919",
        "    192.0.2.11 ✗ 실패 sh deploy.sh (exit 3)",
        "    192.0.2.12/office ✓ v1",
    ]
    assert lines[1].startswith("✗ 결제-금액-반올림  192.0.2.11,192.0.2.12") and "! gone" in lines
    assert "    waits: market holds every deploy back" in lines
    running = {**hosts[1], "state": "running", "ok": False}
    for of, mark in (([], " "), (hosts[1:], "✓"), ([hosts[1], running], "▸"), ([hosts[0], running], "✗")):
        told = {"watches": [row | {"hosts": of}], "problem": None, "paused": None}
        assert est.watch_screen(told, 80)[1].startswith(f"{mark} 결제"), "a ✓ is what is on the hosts"


@pytest.mark.parametrize(
    ("watch", "said"),
    [
        ({}, "watch[0].branch: missing"),
        ({"branch": "-x"}, "branch's name"),
        ({"branch": "m", "every": 14}, "number of seconds, 15 at least"),
        ({"branch": "m", "then": "merge"}, "is no choice here"),
    ],
)
def test_what_is_no_watch(watch: dict[str, object], said: str) -> None:
    config = {"masterUrl": "ws://127.0.0.1:1", "whitelist": [], "watch": [watch]}
    with pytest.raises(est.ConfigError) as wrong:
        est.parse_config(json.dumps(config), "updater.json", "json")
    assert said in str(wrong.value.details if hasattr(wrong.value, "details") else wrong.value.what) + wrong.value.what


def test_what_is_hardly_meant() -> None:
    watches = [
        {"branch": "m", "target": "standby"},
        {"branch": "n", "target": "nobody"},
        {"branch": "n", "target": "nobody"},
    ]
    config = {"masterUrl": "ws://127.0.0.1:1", "whitelist": ["127.0.0.1"], "watch": watches}
    warnings = est.config_warnings(est.parse_config(json.dumps(config), "updater.json", "json"))
    assert "watch m: nobody knows who is standby without [haproxy]" in warnings
    assert 'watch n: "nobody" matches no host' in warnings
    assert "watch n: there is another one for nobody" in warnings
