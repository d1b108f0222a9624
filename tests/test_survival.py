"""Whoever is killed in the middle of a deployment: it goes on, and its watcher sees all of it, each byte once."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.commands import (
    GATED,
    STEP,
    Watched,
    detach,
    job_of,
    lines_of,
    log_of,
    module_fleet,
    open_gate,
    wait_state,
    write_script,
)
from tests.fleet import VERSION, Fleet, Host, processes_of, wait_for

A, B, C = "127.0.0.1", "127.0.0.2", "127.0.0.3"
pytestmark = pytest.mark.xdist_group("survival")  # one fleet, whose daemons are killed and started again

# Writes all the time, and a copy of it, until the gate opens; a pipe's last reader is `tee`, so the copy is complete.
TALKING = (
    'n=0; { echo begun; until [ -e ../go ]; do n=$((n+1)); echo "line $n"; sleep 0.1; done; echo ended; }'
    " | tee ../copy\n"
)


made = module_fleet("survival")


@pytest.fixture
def one(made: Fleet) -> Iterator[Fleet]:
    write_script("echo deploying\n", *made.hosts)
    for host in made.hosts:
        (host.folder / "copy").unlink(missing_ok=True)
    yield made
    start_all(made)
    open_gate(*made.hosts)
    for folder in made.runs():
        if any(json.loads(path.read_text())["state"] in ("queued", "running") for path in folder.glob("127*.json")):
            made.cli("cancel", folder.name)


def start_all(one: Fleet) -> None:
    """Start the daemons that do not run, and wait until the master has all of them."""
    for host in one.hosts:
        if host.process and host.process.poll() is not None:
            one.start(host)

    def connected(host: Host) -> bool:
        said = one.master.stderr
        online = said.count(f"agent {host.address} (") > said.count(f"agent {host.address} is offline")
        return online and "welcomed" in host.stderr

    for host in one.agents:
        wait_for(lambda h=host: connected(h), lambda h=host: f"{h.address} is connected\n{h.stderr}")  # type: ignore[misc]


def said(host: Host) -> int:
    """How many lines a TALKING deployment has written by now."""
    path = host.folder / "copy"
    return len(path.read_bytes().splitlines()) if path.exists() else 0


def runners(host: Host) -> list[int]:
    """The processes that do a job on a host."""
    return [pid for pid, command in processes_of(host.folder).items() if " run-job " in command]


def children(host: Host, word: str) -> list[int]:
    """What the deployment of a host runs."""
    return [pid for pid, command in processes_of(host.repo).items() if word in command and "run-job" not in command]


def check_log(one: Fleet, run: str, host: Host, out: str) -> None:
    """Every byte is in both records and on the screen, once and in order."""
    copy = (host.folder / "copy").read_bytes()
    log = log_of(one, run, host)
    assert log.endswith(f"{STEP}...\n".encode() + copy)
    assert copy.endswith(b"ended\n")
    assert log_of(one, run, host, at=host) == log
    assert lines_of(out, host.address) == [*log.decode().splitlines(), f"✓ 완료 {VERSION}"]


@pytest.mark.parametrize("victims", ["agent", "master", "both", "all"])
def test_killed_daemons(one: Fleet, victims: str):
    a, b, c = one.hosts
    killed = {"agent": [b], "master": [a], "both": [b, a], "all": [c, b, a]}[victims]
    write_script(TALKING, *one.hosts)
    watched = Watched(one, "trigger", "all", "master")
    for host in one.hosts:
        watched.until(f"[{host.address}] line 2")
    for host in killed:
        one.kill(host)
    at = {host.address: said(host) for host in one.hosts}
    for host in one.hosts:
        wait_for(lambda h=host: said(h) > at[h.address] + 5, "the deployments go on")  # type: ignore[misc]
    assert watched.process.poll() is None
    one.start(*killed)
    for host in one.hosts:
        watched.until(f"[{host.address}] line {at[host.address] + 6}\n")  # by itself, while it runs
    open_gate(*one.hosts)
    assert watched.end() == 0
    for host in one.hosts:
        check_log(one, watched.run, host, watched.out)
    assert ("reconnecting" in watched.err) == (a in killed)
    assert one.cli("trigger", "all", "master").code == 0, "to its end: the next test writes other scripts"


def test_daemons_that_come_back_after_the_end(one: Fleet):
    """The result waits on disk, for the master and for whoever asks later."""
    a, b, _ = one.hosts
    write_script(TALKING, b)
    watched = Watched(one, "trigger", B, "master")
    watched.until(f"[{B}] line 2")
    one.kill(b)
    one.kill(a)
    open_gate(b)
    run = one.runs(b)[-1].name
    wait_for(lambda: job_of(one, run, b, at=b)["state"] == "succeeded", "the deployment ends without any daemon")
    one.start(a, b)
    assert watched.end() == 0
    check_log(one, run, b, watched.out)
    assert one.cli("logs", run).out == watched.out


@pytest.mark.parametrize("also_daemon", [False, True])
def test_a_killed_runner_is_lost(one: Fleet, also_daemon: bool):
    b = one.hosts[1]
    write_script("sleep 86401 & setsid sleep 86402 & (env -i setsid sleep 86406 &) ; echo begun; sleep 86403\n", b)
    watched = Watched(one, "trigger", f"{A},{B}", "master")
    watched.until(f"[{B}] begun")
    wait_for(lambda: len(children(b, "sleep 8640")) == 4, "all that it starts runs")
    if also_daemon:
        one.kill(b)
    for pid in runners(b):
        os.kill(pid, signal.SIGKILL)
    if also_daemon:
        one.start(b)
    assert watched.end() == 1
    assert lines_of(watched.out, B)[-1].startswith("✗ 연결 끊김 (")
    assert lines_of(watched.out, A)[-1] == f"✓ 완료 {VERSION}"
    assert not children(b, "sleep 8640")
    write_script("echo fine\n", b)
    assert one.cli("trigger", B, "master").code == 0


def test_a_deployment_by_hand_ends_what_a_dead_runner_left(one: Fleet):
    """No daemon looked after it."""
    b = one.hosts[1]
    write_script("sleep 86409 & echo begun; sleep 86409\n", b)
    run = detach(one, B)
    wait_for(lambda: len(children(b, "sleep 86409")) == 2, "all that it starts runs")
    one.kill(b)
    for pid in runners(b):
        os.kill(pid, signal.SIGKILL)
    write_script("echo fine\n", b)
    assert children(b, "sleep 86409")
    current = b.state / "current.json"
    known = current.read_text()
    assert one.cli("deploy", "master", host=b).code == 0
    assert not children(b, "sleep 86409")
    assert job_of(one, run, b, at=b)["state"] == "lost"
    for nonsense in ("[]", "{", '{"run": 5, "host": []}', known.replace(run, "../x")):
        current.write_text(nonsense)
        assert one.cli("deploy", "master", host=b).code == 0
    one.start(b)
    wait_state(one, run, B, "lost")


def test_a_killed_step_is_a_failure(one: Fleet):
    b = one.hosts[1]
    write_script("echo begun; kill -9 $$\n", b)
    code, out, _ = one.cli("trigger", B, "master")
    assert code == 1
    assert lines_of(out, B)[-1].startswith(f"✗ 실패 {STEP} (exit ")


def test_the_queue_outlives_the_master(one: Fleet):
    a, b, c = one.hosts
    one.origin.commit({}, branch="hotfix")
    one.stop(c)
    wait_for(lambda: f"agent {C} is offline" in a.stderr, "the master notices")
    write_script(GATED, a, b)
    first = detach(one, f"{A},{B}")
    wait_state(one, first, A, "running")
    wait_state(one, first, B, "running")
    second = detach(one, f"{A},{B},{C}", "hotfix", "--wait", "60")
    third = Watched(one, "trigger", f"{A},{B}", "master")
    third.until(lambda: "run " in third.err)
    one.kill(a)
    one.start(a)
    wait_for(lambda: f"agent {B} (" in a.stderr, "B is back")
    rows = {row["host"]: row for row in json.loads(one.cli("status", "--json").out)["hosts"]}
    for host in (A, B):
        assert rows[host]["running"] == first
        assert rows[host]["queued"] == [second, third.run]
    assert rows[C]["queued"] == [second]
    open_gate(a, b)
    one.start(c)
    assert third.end() == 0
    for host in (A, B, C):
        assert wait_state(one, second, host, "succeeded", "failed", "offline", "lost")["state"] == "succeeded"
    started = [job_of(one, run, A)["started"] for run in (first, second, third.run)]
    assert started == sorted(started)


def test_a_cancel_reaches_a_host_that_is_away(one: Fleet):
    b = one.hosts[1]
    write_script("echo begun; sleep 86404\n", b)
    watched = Watched(one, "trigger", f"{A},{B}", "master")
    watched.until(f"[{B}] begun")
    wait_state(one, watched.run, A, "succeeded")
    one.kill(b)
    wait_for(lambda: f"agent {B} is offline" in one.master.stderr, "the master notices")
    asked = one.cli("cancel", watched.run)
    text = f"cancelling {watched.run} on {B}; {B}: no connection, it stops once it is back\n"
    assert (asked.code, asked.out) == (0, text)
    one.kill(one.master)
    one.start(one.master, b)
    assert watched.end() == 1
    assert lines_of(watched.out, B)[-1] == "✗ 취소"
    assert f"{B}: cancelled by " in watched.err, "also where the master that was told is gone"
    assert not children(b, "sleep 86404")
    assert one.cli("cancel", watched.run).out == f"{watched.run} is over: there is nothing to cancel\n"
    assert one.cli("cancel") == (0, "nothing runs or waits: there is nothing to cancel\n", ""), "and nobody is asked"
    reader = one.popen("logs", "last")
    assert reader.stdout and reader.stderr
    reader.stdout.close()
    assert (reader.stderr.read(), reader.wait(20)) == (b"", 130), "who reads a log to a point needs no word of it"


def test_copies_that_differ_are_not_mixed(one: Fleet):
    """As after a power loss: the log ends with a line that says so, the result arrives all the same."""
    b = one.hosts[1]
    write_script(GATED, b)
    watched = Watched(one, "trigger", B, "master")
    watched.until(f"[{B}] begun")
    one.kill(b)
    log = b.state / "runs" / watched.run / f"{B}.log"
    with log.open("r+b") as file:
        file.write(b"GIT FETCH")
    before = log_of(one, watched.run, b)
    one.start(b)
    open_gate(b)
    assert watched.end() == 0
    after = log_of(one, watched.run, b)
    assert after.startswith(before)
    assert b"differs" in after
    assert b"ended" not in after
    assert lines_of(watched.out, B)[-1] == f"✓ 완료 {VERSION}"


def test_an_agent_waits_for_its_master_and_says_so_once(one: Fleet):
    a, b, _ = one.hosts
    one.stop(a)
    one.stop(b)
    with socket.socket() as port:  # somebody who hangs up: the tries can be counted
        port.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        port.bind((A, one.port))
        port.listen()
        port.settimeout(40)
        one.spawn(b)
        tries = 0
        while tries < 3:
            other, (address, _) = port.accept()
            other.close()
            tries += address == B
    start_all(one)
    complaints = [line.partition("warning")[2] for line in b.stderr.splitlines() if "warning" in line]
    told = [line for line in complaints if "Connect call failed" not in line]  # between two listeners: refused
    assert len(told) == 1 and len(complaints) <= 2, b.stderr
    assert b.stderr.count("welcomed") == 1
    assert one.cli("trigger", "all", "master").code == 0


def test_a_stopped_daemon_leaves_nothing_but_the_deployment(one: Fleet, tmp_path: Path):
    b = one.hosts[1]
    write_script(GATED, b)
    run = detach(one, B)
    wait_state(one, run, B, "running")
    wait_for(lambda: b"begun" in log_of(one, run, b, at=b), "it began")
    assert one.stop(b) == 0
    left = processes_of(b.state)
    assert len(left) == 1
    assert " run-job " in next(iter(left.values()))
    code, _, err = one.cli("deploy", "master", host=b)
    assert code == 5
    assert run in err
    open_gate(b)
    wait_for(lambda: not processes_of(b.state), "the runner ends")
    assert job_of(one, run, b, at=b)["state"] == "succeeded"
    one.start(b)
    wait_state(one, run, B, "succeeded")


def test_deploy_alone(one: Fleet):
    """Without a daemon at all; the master hears of it later, and the runner's death is noticed by its watcher."""
    b = one.hosts[1]
    one.stop(b)
    write_script(TALKING, b)
    watched = Watched(one, "deploy", "master", host=b)
    watched.until(lambda: said(b) > 3 and "line 2" in watched.out)
    watched.interrupt()
    assert watched.end() == 130
    assert f"logs {watched.run} -f" in watched.err
    follower = Watched(one, "logs", watched.run, "-f", host=b)
    follower.until("line 2")
    open_gate(b)
    assert follower.end() == 0
    assert lines_of(follower.out, follower.out[1 : follower.out.index("]")])[-2:] == ["ended", f"✓ 완료 {VERSION}"]
    write_script("echo begun; sleep 86405\n", b)
    for master in (one.master, None):  # it has not heard of the run; it can't be reached
        watched = Watched(one, "deploy", "master", host=b)
        watched.until("begun")
        watched.interrupt()
        assert watched.end() == 130
        told = re.search(rf"stop it: .* (cancel {watched.run})\n", watched.err)
        assert told
        if not master:
            one.stop(one.master)
        asked = one.cli(*told[1].split(), host=b)
        assert (asked.code, asked.out.split(" on ")[0]) == (0, f"cancelling {watched.run}"), asked.err
        (host,) = json.loads((b.state / "runs" / watched.run / "run.json").read_text())["hosts"]
        wait_for(lambda: job_of(one, watched.run, host, at=b)["state"] == "cancelled", "it ends")  # noqa: B023
        assert not children(b, "sleep 86405")
    one.start(one.master)
    watched = Watched(one, "deploy", "master", "--json", host=b)
    watched.until("begun")
    for pid in runners(b):
        os.kill(pid, signal.SIGKILL)
    assert watched.end() == 1
    result, done = [event for event in watched.events if event["event"] != "notice"][-2:]  # advice may follow
    assert (result["state"], done["event"], done["ok"]) == ("lost", "done", False)
    wait_for(lambda: not children(b, "sleep 86405"), "nothing of its step is left")
    one.start(b)
    known = wait_for(
        lambda: [
            host
            for run in json.loads(one.cli("history", "--json").out)["runs"]
            if run["run"] == watched.run
            for host in run["hosts"]  # the run is told first, then how it went
        ],
        "the master hears of it",
    )
    assert known[0]["state"] == "lost"
