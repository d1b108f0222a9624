"""The blue/green round: a data node with HAProxy, two workers, targets by their role, and what goes wrong."""

from __future__ import annotations

import hashlib
import json
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import pytest

from tests import seam
from tests.browser import Browser
from tests.commands import COMMAND, GATE, GATED, Watched, detach, job_of, log_of, open_gate, wait_state, write_script
from tests.fleet import ROOT, Fleet, Host, Result, need, run, wait_for
from tests.haproxy import Proxy
from tests.seam import Clearance, GuardError, JobRecord, Kind, LogWriter, Runner, StateFolder
from tests.stores import certificate, mariadb, valkey
from tests.terminal import Terminal

BLUE, GREEN = "127.0.0.2", "127.0.0.3"


@pytest.fixture
def proxy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Proxy]:
    found = Proxy(tmp_path_factory.mktemp("haproxy"))  # not below tmp_path, where the fleet's end kills everything
    try:
        yield found.start()
    finally:
        found.close()


class Round:
    """A master that is the data node, blue and green; blue is active."""

    def __init__(
        self,
        proxy: Proxy,
        fleet: Callable[..., Fleet],
        *more: dict[str, Any],
        token: str = "",
        rule: dict[str, Any] | None = None,
    ) -> None:
        checks = [
            *more,
            {"name": "well", "command": ["sh", "-c", "test ! -e ../sick || { echo sick; exit 1; }"]},
            *({"name": c, "http": f"http://127.0.0.1:{proxy.ports[c]}/", "contains": c, "hosts": [f"yq-{c}"]} for c in
              ("blue", "green")),
        ]  # fmt: skip
        self.settings: dict[str, Any] = {
            "hosts": {
                "127.0.0.1": {"name": "yq-data", "deploy": False},
                BLUE: {"name": "yq-blue", "color": "blue"},
                GREEN: {"name": "yq-green", "color": "green"},
            },
            "haproxy": rule or proxy.rule,
            "health": checks,
        }
        self.proxy = proxy
        self.fleet = fleet(hosts=3, command=COMMAND, config=self.settings, start=False)
        self.fleet.start(env={"ESTELLE_TOKEN": token} if token else None)
        self.data, self.blue, self.green = self.fleet.hosts
        write_script("echo deployed\n", self.blue, self.green)
        self.cli = self.fleet.cli

    def rows(self) -> dict[str, Any]:
        """`status` by colour."""
        code, out, err = self.cli("status", "--json")
        assert code == 0, err
        return {row["color"]: row for row in json.loads(out)["hosts"] if row["color"]}

    def traffic(self) -> dict[str, str]:
        return {color: row["traffic"] for color, row in self.rows().items()}

    def commit(self, text: str) -> str:
        return self.fleet.origin.commit({"app.txt": text})

    def configure(self, **settings: Any) -> None:
        """Commit new settings and let the hosts that deploy have them."""
        path = self.fleet.origin.seed / "config/updater.json"
        self.fleet.origin.commit({"config/updater.json": json.dumps(json.loads(path.read_text()) | settings)})

    def wait_begun(self, run: str) -> None:
        """Until green's command runs."""
        wait_for(lambda: self.green_log(run).count("begun"), lambda: f"the command runs\n{self.green_log(run)}")

    def green_log(self, run: str) -> str:
        with suppress(FileNotFoundError):
            return log_of(self.fleet, run, self.green).decode()
        return ""

    def fail_over(self) -> None:
        self.proxy.stop_worker("blue")
        wait_for(lambda: self.proxy.answers() == "green", "HAProxy fails over")


@pytest.fixture
def one(proxy: Proxy, fleet: Callable[..., Fleet]) -> Round:
    return Round(proxy, fleet)


def test_release_there_and_back(one: Round):
    first, second = one.commit("1"), None
    code, out, err = one.cli("release", "master")
    assert code == 5 and "no terminal" in err and one.fleet.runs() == [], out
    code, out, err = one.cli("release", "master", "--yes")
    assert code == 0, out + err
    assert one.proxy.answers() == "green"
    assert f"active: green ({GREEN}) {first[:7]}" in out and f"standby: blue ({BLUE})" in out
    assert "git pull origin master..." in out and "proof..." in out  # both runs are seen
    rows = one.rows()
    assert rows["green"]["commit"] == first != rows["blue"]["commit"]
    assert {c: row["traffic"] for c, row in rows.items()} == {"blue": "standby", "green": "active"}

    second = one.commit("2")
    code, out, err = one.cli("release", "master", "--yes", "--json")
    assert code == 0, out + err
    events = [json.loads(line) for line in out.splitlines()]
    end = events[-1]
    assert (end["event"], end["ok"], end["color"]) == ("release", True, "blue")
    assert {row["color"]: (row["traffic"], row["commit"]) for row in end["hosts"]} == {
        "blue": ("active", second), "green": ("standby", first)
    }  # fmt: skip
    assert [event["ok"] for event in events if event["event"] == "done"] == [True, True]
    assert one.proxy.answers() == "blue"
    code, out, _ = one.cli("status")
    assert "blue active" in out and "green standby" in out, out


def test_a_hotfix_on_the_active_is_not_dropped_in_silence(one: Round):
    """Compared with the active: a commit that BRANCH lacks is refused with --yes, and said in the question."""
    origin = one.fleet.origin
    origin.commit({"fix.txt": "1"}, "hotfix", "stop the double order")
    assert one.cli("trigger", "active", "hotfix").code == 0
    one.commit("1")
    runs = len(one.fleet.runs())
    code, _, err = one.cli("release", "master", "--yes")
    assert code == 5 and len(one.fleet.runs()) == runs, err
    assert f"1 commit of the active (blue, {BLUE}) would be left behind: " in err
    assert "stop the double order" in err and " release master --force` leaves them" in err
    assert "1 new compared with the active" in err
    process, terminal = ask_person(one, "release", "master")
    said = read_until(terminal, "switch the traffic to green?")
    code, _ = answer(process, terminal, "n")
    assert code == 5 and "would be left behind" in said.replace("\r", "").splitlines()[-2], said
    assert one.proxy.answers() == "blue"
    origin.git("switch", "--quiet", "master")
    origin.git("cherry-pick", "hotfix")
    origin.git("push", "--quiet", "origin", "master")
    code, out, err = one.cli("release", "master", "--yes")
    assert code == 0, "the same change under another id is there: " + out + err
    one.commit("2")
    assert one.cli("trigger", "active", "master").code == 0
    code, out, err = one.cli("release", "hotfix", "--yes", "--force")
    assert code == 0 and "would be left behind" in err, out + err
    assert one.proxy.answers() == "blue"
    deployed, switched = json.loads(one.cli("history", "-n", "2", "--json").out)["runs"][::-1]
    for row in (deployed, switched):
        (told,) = [line for line in row["hosts"][0]["warnings"] if "left behind" in line]
        assert told.startswith(f"left behind: 2 commits of the active (green, {GREEN}): "), told
    assert one.proxy.answers() == "blue"
    options = [json.loads((folder / "run.json").read_text())["options"] for folder in one.fleet.runs()]
    assert [found.get("force") for found in options if found.get("alone")][-1] is True


def test_a_switch_says_what_it_leaves_behind(one: Round):
    """It asks nothing and is never refused for it: going back by it is the way out of a bad release. By the clones
    alone where they have both commits, whatever the remote does."""
    one.commit("1")
    assert one.cli("trigger", "all", "master").code == 0
    one.fleet.origin.commit({"fix.txt": "1"}, message="stop the double order")
    assert one.cli("trigger", "active", "master").code == 0
    away = one.fleet.origin.bare.with_name("away")
    one.fleet.origin.bare.rename(away)
    code, out, err = one.cli("switch", "green")
    assert code == 0 and one.proxy.answers() == "green", out + err
    (told,) = [line for line in out.splitlines() if line.startswith("[127.0.0.1] ⚠ left behind")]
    assert f"left behind: 1 commit of the active (blue, {BLUE}): " in told and "stop the double order" in told
    code, out, err = one.cli("switch", "blue", "--dry-run")
    assert code == 0 and "⚠ nobody can say what of the active" in out, "green's clone has not that commit: " + out + err
    away.rename(one.fleet.origin.bare)
    code, out, err = one.cli("switch", "blue")
    assert code == 0 and "left behind" not in out, out + err


def test_a_freeze_holds_the_whole_round_and_force_is_on_record(one: Round, pyz: Path):
    """By hand, for every kind of order; forced, each is done all the same, with who and past what."""
    for text in "12":
        one.commit(text)
        deploy_by_hand(one, one.green)
    path = one.data.config
    digest = hashlib.sha256(pyz.read_bytes()).hexdigest()
    path.write_text(json.dumps(json.loads(path.read_text()) | {"updater": {"sha256": digest}}))
    wait_for(lambda: "new settings" in one.data.stderr, "the settings are in force")
    before = one.fleet.runs()
    assert one.cli("freeze", "market", "--for", "1h").code == 0
    orders = [
        ("release", "master", "--yes"),
        ("switch", "green"),
        ("rollback", "standby", "--yes"),
        ("upgrade", BLUE),
    ]
    for order in orders:
        code, out, err = one.cli(*order)
        assert code == 5 and f"market holds every {order[0]} back: " in err and "frozen by market until" in err, (
            order,
            out,
            err,
        )
        assert one.fleet.runs() == before and one.proxy.answers() == "blue", order
    one.commit("3")
    code, out, err = one.cli("release", "master", "--yes", "--force")
    assert code == 0 and one.proxy.answers() == "green", out + err
    assert one.cli("switch", "blue", "--force").code == 0
    code, out, err = one.cli("rollback", "standby", "--yes", "--force")
    assert code == 0, out + err
    kinds = []
    for folder in one.fleet.runs()[len(before) :]:
        record = json.loads((folder / "run.json").read_text())
        kinds.append(record["kind"])
        assert "frozen by market until" in record["options"]["past_freeze"][0] and record["by"], record
    assert kinds == ["deploy", "switch", "switch", "rollback"], kinds


def test_targets_by_role(one: Round):
    commit = one.commit("1")
    code, out, err = one.cli("trigger", "standby", "master")
    assert code == 0 and f"[{GREEN}]" in out and f"[{BLUE}]" not in out, out + err
    assert one.rows()["green"]["commit"] == commit
    code, out, _ = one.cli("health", "active", "--json")
    assert code == 0 and {row["host"] for row in json.loads(out)["checks"]} == {BLUE}
    code, out, _ = one.cli("health", "standby")
    assert code == 0 and GREEN in out and BLUE not in out
    one.commit("2")
    assert one.cli("trigger", "standby", "master").code == 0
    code, out, err = one.cli("rollback", "standby", "--yes")
    assert code == 0 and one.rows()["green"]["commit"] == commit, out + err
    expects = json.loads((one.fleet.runs()[-1] / "run.json").read_text())["options"]["expects"]
    assert expects == {GREEN: "standby"}, "should the traffic move, it ends"

    assert one.proxy.process  # nobody knows: nothing may be guessed
    os.killpg(one.proxy.process.pid, signal.SIGSTOP)
    code, _, err = one.cli("trigger", "standby", "master")
    os.killpg(one.proxy.process.pid, signal.SIGCONT)
    assert code == 4 and "nobody knows which host is standby" in err


def test_a_job_ends_where_the_traffic_moved(one: Round):
    """At its start, after it waited in the queue; and before its last step, which would restart the active one."""
    one.configure(deploy={"command": list(COMMAND), "restart": ["estelle-test.service"]})
    write_script(GATED, one.green)
    running = detach(one.fleet, "standby")
    one.wait_begun(running)
    queued = detach(one.fleet, "standby", "master")
    wait_state(one.fleet, queued, one.green, "queued")
    code, _, err = one.cli("release", "master", "--yes")
    assert code == 5 and running in err, "a release begins with nothing under way"
    one.fail_over()
    open_gate(one.green)
    for name, steps in ((running, 1), (queued, 0)):
        job = wait_state(one.fleet, name, one.green, "failed")
        log = one.green_log(name)
        assert (job["error"], job["step"]) == ("traffic moved", "check traffic"), log
        assert log.count("../script...") == steps and "systemctl" not in log
        assert "now it is active" in log
    assert one.traffic() == {"blue": "down", "green": "active"}
    code, out, _ = one.cli("status")
    assert "failed over to green" in out, out
    code, _, err = one.cli("switch", "green")
    assert code == 0, err
    assert one.traffic() == {"blue": "down", "green": "active"} and "failed over" not in one.cli("status").out


def test_a_job_waits_for_the_word_over_a_new_connection(one: Round):
    write_script(GATED, one.green)
    one.configure(deploy={"command": list(COMMAND), "restart": ["estelle-test.service"]})
    run = detach(one.fleet, "standby")
    one.wait_begun(run)
    one.fleet.kill(one.data)
    open_gate(one.green)
    wait_for(lambda: job_of(one.fleet, run, one.green, one.green).get("step") == "check traffic", "it asks")
    one.fleet.start(one.data)
    job = wait_state(one.fleet, run, one.green, "failed", timeout_s=60)
    assert job["step"].startswith("systemctl restart"), job  # the word came; there is no such unit here


def test_a_job_that_learns_nothing_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(seam.program, "TRAFFIC_S", 0.3)
    state = StateFolder(tmp_path)
    state.create()
    run = "20261122-210501-7f3a"
    runner = Runner(state, run, GREEN, tmp_path / "config/updater.json")
    runner.job = JobRecord(run, GREEN, "0" * 32, Kind.DEPLOY, "master", options={"expects": {GREEN: "standby"}})
    state.log_file(run, GREEN).parent.mkdir(parents=True)
    runner.log = LogWriter(state.log_file(run, GREEN), lambda: None)
    with pytest.raises(GuardError, match="nobody said within"):
        Clearance(runner).confirm_traffic()
    old = {"at": runner.job.revision, "is": "standby"}  # a word on an earlier question is none on this one
    state.traffic_file(run, GREEN).write_text(json.dumps(old))
    with pytest.raises(GuardError, match="nobody said within"):
        Clearance(runner).confirm_traffic()
    runner.job = JobRecord(run, GREEN, "0" * 32, Kind.DEPLOY, "master")
    Clearance(runner).confirm_traffic()  # nothing was expected
    runner.poke._socket.close()


def test_an_unhealthy_standby_gets_no_traffic(one: Round):
    commit = one.commit("1")
    (one.green.folder / "sick").touch()
    code, out, err = one.cli("release", "master", "--yes", "--wait", "1")
    assert code == 5 and f"{GREEN}: well: exit 1: sick" in err, out + err
    assert one.proxy.answers() == "blue" and one.rows()["green"]["commit"] == commit
    code, _, err = one.cli("switch", "green")
    assert code == 5 and "sick" in err
    code, out, err = one.cli("release", "master", "--yes", "--force", "--wait", "1")
    assert code == 0 and "forced: the standby is not healthy: " in err and "forced by" in out, out + err
    assert one.proxy.answers() == "green"
    (one.green.folder / "sick").unlink()
    assert one.cli("switch", "blue").code == 0
    one.proxy.stop_worker("green")
    code, _, err = one.cli("release", "master", "--yes", "--wait", "1")
    assert code == 5 and "refused" in err and "down for HAProxy" in err
    assert one.proxy.answers() == "blue"


def test_colours_that_are_crossed_are_nobodys(one: Round):
    """Else a deployment for the standby would go to the worker that has the traffic."""
    text = one.proxy.file.read_text()
    for color, address in (("blue", GREEN), ("green", BLUE)):
        port = one.proxy.ports[color]
        text = text.replace(f"server {color} 127.0.0.1:{port} check", f"server {color} {address}:{port}")
    one.proxy.file.write_text(text)
    one.proxy.reload()
    said = f"HAProxy's server for blue is at {GREEN}, and that is {GREEN}, whose color is green"
    status = json.loads(one.cli("status", "--json").out)
    assert any(said in line for line in status["warnings"]) and {row["traffic"] for row in status["hosts"]} == {None}
    for words, expected in (
        (("trigger", "standby", "master"), 4),
        (("release", "master", "--yes"), 4),
        (("switch", "standby"), 5),
        (("switch", "green", "--force"), 5),
    ):
        code, out, err = one.cli(*words)
        assert (code, out) == (expected, "") and said in err, (code, out, err)
    assert one.proxy.file.read_text() == text

    hosts = [
        seam.HostRef("b", BLUE, "b", "1", online=True, color="blue"),
        seam.HostRef("g", GREEN, "g", "2", online=True, color="green"),
    ]
    forwarded = {"blue": {"address": f"{BLUE}:2000"}, "green": {"address": f"{BLUE}:2001"}}
    assert seam.crossed_colors(forwarded, hosts) == [], "by one machine: the ports tell them apart"
    assert seam.crossed_colors(forwarded | {"blue": {"address": "192.0.2.1:1"}}, hosts)


def test_a_failed_deployment_gets_no_traffic(one: Round):
    write_script("exit 7\n", one.green)
    code, out, _ = one.cli("release", "master", "--yes")
    assert code == 1 and "✗ 실패" in out and one.proxy.answers() == "blue"
    assert len(one.fleet.runs()) == 1


def test_a_dead_commander_switches_nothing(one: Round):
    write_script(f"echo begun\n{GATE}", one.green)
    release = Watched(one.fleet, "release", "master", "--yes", "--json")
    run = release.run
    one.wait_begun(run)
    os.killpg(release.process.pid, signal.SIGKILL)
    release.process.wait()
    open_gate(one.green)
    wait_state(one.fleet, run, one.green, "succeeded")
    assert len(one.fleet.runs()) == 1  # and nobody is left who could order a switch
    assert one.proxy.answers() == "blue"


def ask_person(one: Round, *arguments: str) -> tuple[subprocess.Popen[bytes], int]:
    """A command at a terminal, and that terminal."""
    here, there = pty.openpty()
    argv, env, cwd = one.fleet._command(arguments, None, None, None)
    process = subprocess.Popen(argv, env=env, cwd=cwd, stdin=there, stdout=there, stderr=there, start_new_session=True)
    one.fleet.watched.append(process)
    os.close(there)
    return process, here


def read_until(terminal: int, text: str) -> str:
    seen = b""
    while text.encode() not in seen:
        seen += os.read(terminal, 4096)
    return seen.decode()


def answer(process: subprocess.Popen[bytes], terminal: int, text: str) -> tuple[int, str]:
    os.write(terminal, text.encode() + b"\n")
    seen = b""
    try:
        while data := os.read(terminal, 4096):
            seen += data
    except OSError:
        pass  # the other end is closed
    os.close(terminal)
    return process.wait(30), seen.decode()


def deploy_by_hand(one: Round, host: Host) -> None:
    assert one.cli("trigger", host.address, "master").code == 0


def test_the_person_decides_and_the_commit_must_still_be_the_one_shown(one: Round):
    commit = one.commit("1")
    process, terminal = ask_person(one, "release", "master")
    seen = read_until(terminal, "[y/N]")
    assert f"standby: green ({GREEN}) {commit[:7]}" in seen and f"active: blue ({BLUE})" in seen
    code, said = answer(process, terminal, "n")
    assert code == 5 and "the traffic stays where it is" in said and one.proxy.answers() == "blue"

    process, terminal = ask_person(one, "release", "master")
    read_until(terminal, "[y/N]")
    other = one.commit("2")
    deploy_by_hand(one, one.green)
    code, said = answer(process, terminal, "y")
    assert code == 5 and f"has commit {other}" in said and one.proxy.answers() == "blue"

    process, terminal = ask_person(one, "release", "master")
    read_until(terminal, "[y/N]")
    assert answer(process, terminal, "y")[0] == 0 and one.proxy.answers() == "green"


# ---------------------------------------------------------------------------- README's runbook and recipe


def readme_block(after: str) -> str:
    """The first block of commands after a text of README.md."""
    text = (ROOT / "README.md").read_text("utf-8")
    return text[text.index(after) :].split("```")[1].partition("\n")[2]


def test_a_person_sees_how_far_a_release_is(one: Round):
    """One block for the whole round: what is done, what is under way with its hosts, what is still to come."""
    write_script(f"echo deploying\n{GATED}", one.green)
    (one.green.folder / "sick").touch()
    argv, env, cwd = one.fleet._command(["release", "master"], None, None, None)
    seen = Terminal(argv, env, cwd)

    def row(start: str) -> str:
        return next((line for line in seen.shown() if line.startswith(start)), "")

    try:
        seen.until(lambda: "│ " in row("▸ 127.0.0.3"), "the deployment runs, and says something")
        rows = seen.shown()
        top = rows.index("release master")
        assert [line[:10].rstrip() for line in rows[top + 1 : top + 6]] == [
            *("▸ deploy", "▸ 127.0.0.", "· health", "· question", "· switch")
        ], rows
        open_gate(one.green)
        seen.until(lambda: "✗ 127.0.0.3: well: exit 1: sick" in row("▸ health"), "why it is not healthy")
        assert row("✓ deploy").split()[2:4] == ["127.0.0.3", "완료"], seen.shown()
        (one.green.folder / "sick").unlink()
        seen.until(lambda: any("switch the traffic to green?" in line for line in seen.shown()), "the question")
        assert not row("▸ health")
        seen.type("y\n")
        assert seen.wait() == 0
        lines = seen.all_lines()
        assert lines.count("[127.0.0.3] deploying") == 1
        left = [line for line in lines if re.match(r"[▸·✓] (deploy|health|question|switch|127)\b", line)]
        assert left == [] and one.traffic() == {"blue": "standby", "green": "active"}, lines
    finally:
        seen.close()


def test_the_traffic_is_switched_in_the_page(one: Round):
    """By the colour's own button: the plan, the colour typed, and the proof that HAProxy gives."""
    one.commit("2")
    deploy_by_hand(one, one.green)
    with Browser(one.fleet.env) as tab:
        tab.open(one.fleet.url.replace("ws:", "http:") + "/#traffic")
        button = "[...document.querySelectorAll('button')].find(each => each.textContent === 'Switch to {}…')"
        tab.wait(f"!{button.format('green')}.disabled")
        assert tab.js(f"{button.format('blue')}.disabled") and "It has the traffic already." in tab.text(".card.active")
        tab.js(f"{button.format('green')}.focus()")
        tab.key("Enter")
        tab.wait("document.activeElement.name === 'typed'")
        assert "green, standby" in tab.text("dialog")
        tab.type("gree")
        assert tab.js("document.querySelector('dialog .danger').disabled")
        tab.type("n")
        tab.wait("!document.querySelector('dialog .danger').disabled")
        tab.key("Enter")
        tab.wait("state.run?.record?.kind === 'switch' && document.querySelector('.headline .ok')")
        # the sign of the traffic's own headline is there before the run has ended
        wait_for(lambda: one.proxy.answers() == "green", "the traffic goes to green")
        tab.js("location.hash = '#traffic'")
        tab.wait("document.querySelector('.card.active h3').innerText === 'green'")
        assert "The traffic goes to green" in tab.text(".headline") and tab.errors == []


def test_runbook_application_failure(one: Round):
    one.commit("1")
    deploy_by_hand(one, one.blue)
    one.commit("2")
    deploy_by_hand(one, one.blue)
    one.fail_over()
    code, out, _ = one.cli("status")
    assert code == 0 and "HAProxy has failed over to green; `" in out and " switch green` makes that explicit" in out, (
        out
    )
    assert one.cli("switch", "green").code == 0
    one.proxy.start_worker("blue")
    wait_for(lambda: one.traffic() == {"blue": "standby", "green": "active"}, "blue stands by")
    assert one.cli("rollback", "standby", "--yes").code == 0
    assert one.rows()["blue"]["commit"] == one.fleet.origin.git("rev-parse", "master~1")
    assert one.cli("health", "standby").code == 0


def test_runbook_valkey_and_mariadb_failure(proxy: Proxy, fleet: Callable[..., Fleet]):
    folder = Path(tempfile.mkdtemp(prefix="est-mariadb-"))
    folder.chmod(0o755)
    with ExitStack() as stack:
        stack.callback(shutil.rmtree, folder)
        blue, green = ExitStack(), stack.enter_context(valkey())
        own = blue.enter_context(valkey())
        database = ExitStack()
        address = database.enter_context(mariadb(folder / "db"))
        one = Round(
            proxy, fleet,
            {"name": "valkey", "valkey": own, "hosts": ["yq-blue"]},
            {"name": "valkey", "valkey": green, "hosts": ["yq-green"]},
            {"name": "database", "mariadb": address, "hosts": ["yq-blue", "yq-green"]},
            {"name": "mariadb", "mariadb": address, "hosts": ["yq-data"]},
        )  # fmt: skip
        assert one.cli("health").code == 0
        blue.close()
        code, out, _ = one.cli("health", "active")
        assert code == 1 and re.search(r"✗ +127.0.0.2 +valkey .*refused", out), out
        assert one.cli("switch", "standby").code == 0 and proxy.answers() == "green"

        database.close()
        code, out, _ = one.cli("health", "yq-data")
        assert code == 1 and re.search(r"✗ +127.0.0.1 +mariadb", out), out
        code, _, err = one.cli("switch", "blue")
        assert code == 5 and "not healthy" in err and proxy.answers() == "green"


def test_runbook_data_node_failure(tmp_path: Path):
    """What README does to a copy of the data node's file makes one that serves from the worker itself."""
    need("haproxy")
    (line,) = (line for line in readme_block("**The data node is gone.**").splitlines() if line.startswith("sed "))
    shutil.copy(ROOT / "config/haproxy.cfg", tmp_path / "haproxy.cfg")
    subprocess.run(["sh", "-c", line.replace("/etc/haproxy/", f"{tmp_path}/")], check=True, timeout=20)
    text = (tmp_path / "haproxy.cfg").read_text()
    assert re.findall(r"(?m)^ *server (\w+ .*)$", text)[1:] == ["green 127.0.0.1:6000"]
    pem = certificate(tmp_path / "yquant.pem")
    (tmp_path / "haproxy.cfg").write_text(text.replace("/etc/haproxy/certs/yquant.pem", str(pem)))
    code, _, err = run(["haproxy", "-c", "-f", tmp_path / "haproxy.cfg"], os.environ)
    assert code == 0, err


def test_recipe_for_github_actions(proxy: Proxy, fleet: Callable[..., Fleet], tmp_path: Path):
    """The recipe's own commands, in a checkout: green for a good deployment, red for a failed one or a wrong token."""
    one = Round(proxy, fleet, token="a secret of the fleet")
    checkout = one.fleet.origin.clone(tmp_path / "checkout")
    (checkout / "estelle_updater.pyz").symlink_to(ROOT / "estelle_updater.py")
    recipe = readme_block("### From GitHub Actions")
    commands = "".join(line.strip() + "\n" for line in recipe.partition("run: |\n")[2].splitlines())
    assert commands.count("estelle_updater.pyz") == 2
    programs = Path(sys.executable).parent

    def act(token: str) -> Result:
        env = one.fleet.env | {"ESTELLE_TOKEN": token, "BRANCH": "master", "ESTELLE_BIND": "127.0.0.1"}
        env |= {"PATH": f"{programs}:{env['PATH']}", "ESTELLE_STATE": str(tmp_path / "runner")}
        return run(["bash", "-e", "-c", commands], env, checkout)

    code, out, err = act("a secret of the fleet")
    assert code == 0 and '"event": "done"' in out and GREEN in out, out + err
    assert act("not the secret of the fleet").code == 3
    write_script("exit 7\n", one.green)
    code, out, _ = act("a secret of the fleet")
    assert code == 1 and '"ok": false' in out
    assert proxy.answers() == "blue"


def test_without_a_socket_the_text_says_who_is_standby(proxy: Proxy, fleet: Callable[..., Fleet]):
    """As in the strategy's own example: one `backup` line decides, and what nobody saw is said."""
    settings = {key: value for key, value in proxy.rule.items() if "ocket" not in key}
    one = Round(proxy, fleet, rule=settings)
    commit = one.commit("1")
    code, out, err = one.cli("release", "master", "--yes")
    assert code == 0, out + err
    assert "⚠ not proved" in out and "add the line `stats socket " in out
    assert one.rows()["green"]["commit"] == commit
    wait_for(lambda: one.proxy.answers() == "green", "green answers")
