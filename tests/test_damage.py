"""Orders that can't be taken, files that are torn, shortened or gone, a master that forgot everything: each ends in a
right result or a clear word, nothing runs that should not, and nobody waits for ever."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests import seam as updater
from tests.commands import (
    GATED,
    HURRIED,
    STEP,
    Watched,
    again,
    detach,
    job_of,
    lines_of,
    log_of,
    module_fleet,
    open_gate,
    ready,
    wait_state,
    write_script,
)  # fmt: skip
from tests.fleet import ROOT, VERSION, Fleet, Host, run, unavailable, wait_for

A, B, C = "127.0.0.1", "127.0.0.2", "127.0.0.3"
BEGIN = "echo x >> ../begun\n"
pytestmark = pytest.mark.xdist_group("damage")

made = module_fleet("damage", config={"whitelist": ["127.0.0.0/8"]}, program=(sys.executable, "-c", HURRIED))


@pytest.fixture
def one(made: Fleet) -> Iterator[Fleet]:
    yield from ready(made)


def begun(host: Host) -> str:
    path = host.folder / "begun"
    return path.read_text() if path.exists() else ""


def file_of(host: Host, run: str, label: str = B, suffix: str = "json") -> Path:
    return host.state / "runs" / run / f"{label}.{suffix}"


# Orders


def test_an_order_that_can_not_be_taken_has_failed(one: Fleet):
    b = one.hosts[1]
    lock = b.state / "job.lock"
    lock.touch()
    lock.rename(b.state / "aside")
    lock.symlink_to("elsewhere")  # which is never followed
    try:
        done = one.cli("trigger", f"{A},{B}", "master")
    finally:
        (b.state / "aside").rename(lock)
    assert done.code == 1 and lines_of(done.out, A)[-1] == f"✓ 완료 {VERSION}"
    assert lines_of(done.out, B)[-1] == "✗ 실패 start" and "job.lock" in done.err
    assert one.cli("trigger", B, "master").code == 0


@pytest.mark.parametrize("cancelled", [False, True])
def test_an_order_that_is_not_understood_blocks_nobody_for_ever(one: Fleet, cancelled: bool):
    a, b, _ = one.hosts
    again(one, a, LIMITS=json.dumps({"ORDER_EXPIRES_S": 60 if cancelled else 2, "ANSWER_S": 2 if cancelled else 60}))
    again(one, b, FAULT="def wrong(*_): raise ProtocolError('from the future')\nAgent.on_order = wrong")
    watched = Watched(one, "trigger", B, "master")
    if cancelled:
        wait_state(one, watched.run, B, "queued")
        assert one.cli("cancel", watched.run).code == 0
    assert watched.end() == 1
    wait_state(one, watched.run, B, "cancelled" if cancelled else "lost")
    assert "the order was never acknowledged" in watched.out + watched.err
    again(one, a)
    again(one, b)
    assert one.cli("trigger", B, "master").code == 0


def has_lived(path: Path) -> None:
    """The host was in use for three days more, since its daemon died."""
    clock = path.parents[2] / "lived.json"
    saved = json.loads(clock.read_text())
    assert saved["boot"], "else its end is told by the wall clock, and by a day at most"
    clock.write_text(json.dumps(saved | {"up": saved["up"] - 86400 * 3}))


def is_an_older_programs(path: Path) -> None:
    """Its record does not say when it was taken; its file does."""
    record = json.loads(path.read_text())
    assert record.pop("lived") > 0
    path.write_text(json.dumps(record))
    os.utime(path, (time.time() - 86400 * 3,) * 2)


@pytest.mark.parametrize("age", [has_lived, is_an_older_programs])
def test_an_order_accepted_days_ago_does_not_run(one: Fleet, age: Callable[[Path], None]):
    _, b, _ = one.hosts
    again(one, b, FAULT="def start(*_): os._exit(9)\nOwnJobs.start_runner = start")
    write_script(BEGIN, b)
    watched = Watched(one, "trigger", B, "master")
    assert b.process
    b.process.wait(30)
    path = file_of(b, watched.run)
    assert json.loads(path.read_text())["state"] == "queued"
    age(path)
    one.start(b)
    assert watched.end() == 1
    assert lines_of(watched.out, B)[-1] == "✗ 연결 끊김 (the order expired while this host was away)"
    assert one.cli("trigger", B, "master").code == 0 and begun(b) == "x\n"


def test_what_is_said_to_have_failed_does_not_run_after_a_restart(one: Fleet):
    """The disk takes the order, and then nothing more, not even that its runner does not start."""
    b = one.hosts[1]
    fault = """save = StateFolder.save_job
def full(self, record, **how):
    if record.state is not State.QUEUED:
        raise OSError(28, "No space left on device")
    save(self, record, **how)
StateFolder.save_job = full
def start_runner(*_): raise OSError(28, "No space left on device")
Nursery.order = lambda *_: False"""
    again(one, b, FAULT=fault, LIMITS='{"LAUNCH_S": 0.1}')
    write_script(BEGIN, b)
    done = one.cli("trigger", B, "master")
    assert (done.code, lines_of(done.out, B)[-1]) == (1, "✗ 실패 start")
    assert "No space left on device" in done.err
    again(one, b)
    assert one.cli("trigger", B, "master").code == 0 and begun(b) == "x\n"


def test_a_deployment_by_hand_that_meets_another_job_ends(one: Fleet):
    b = one.hosts[1]
    write_script(GATED, b)
    run = detach(one, B)
    wait_state(one, run, B, "running")
    blind = "FileLock.held_elsewhere = staticmethod(lambda path: 'job' in str(path) and time.monotonic() > SINCE)"
    hand = Watched(one, "deploy", "master", host=b, env={
        "FAULT": f"SINCE = time.monotonic() + 2\n{blind}", "LIMITS": '{"LAUNCH_S": 4, "JOB_LOCK_WAIT_S": 0.5}',
    })  # fmt: skip
    assert hand.end() == 1
    assert "another job holds this host" in hand.err
    open_gate(b)
    wait_state(one, run, B, "succeeded")


def test_a_runner_that_begins_while_it_is_looked_for_is_not_taken_for_dead(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Its lock was free when it was looked at, and its word says that it runs: it took it in between."""
    state = updater.StateFolder(tmp_path)
    state.create()
    queued = updater.JobRecord("20260101-000000-abcd", B, "ab" * 16, updater.Kind.DEPLOY, "master", ordered=True)
    state.save_job(queued)

    def look(path: Path) -> bool:
        if path == state.job_lock:
            state.save_job(updater.replace(queued, state=updater.State.RUNNING, revision=2))
        return False

    monkeypatch.setattr(updater.FileLock, "held_elsewhere", look)
    source = updater.FolderSource(state, queued.run, live=True)
    source.sizes = {B: 0}
    states = []
    for _ in range(2):
        states.append([event.state for event in source.read(B) if isinstance(event, updater.JobRecord)])
    assert states == [[updater.State.RUNNING], [updater.State.LOST]], (
        "one that ran before and after, with its lock free, died"
    )


# Files


def take_away(host: Host, run: str) -> None:
    """Remove a run's folder at once: what the daemon writes while it is emptied would keep it."""
    gone = (host.state / "runs" / run).rename(host.folder / "gone")
    shutil.rmtree(gone)


def test_a_log_that_shrank_on_the_master_is_fetched_again(one: Fleet):
    a, b, _ = one.hosts
    write_script("echo begun; until [ -e ../go ]; do sleep 0.1; done\n", b)  # it says nothing more
    watched = Watched(one, "trigger", B, "master")
    watched.until(f"[{B}] begun")
    take_away(a, watched.run)
    open_gate(b)
    assert watched.end() == 0
    assert log_of(one, watched.run, b) == log_of(one, watched.run, b, at=b)
    assert log_of(one, watched.run, b).endswith(b"begun\n")


def test_a_log_that_shrank_on_its_host_says_so(one: Fleet):
    b = one.hosts[1]
    write_script(GATED, b)
    watched = Watched(one, "trigger", B, "master")
    watched.until(f"[{B}] begun")
    os.truncate(file_of(b, watched.run, suffix="log"), 10)
    wait_for(lambda: b"log incomplete" in log_of(one, watched.run, b), "the master's copy ends with a word")
    open_gate(b)
    assert watched.end() == 0
    told = "[estelle-updater: log incomplete: the host has only 10 bytes of this log]"
    assert lines_of(watched.out, B)[-3:-1] == ["", told]


def test_a_cancel_reaches_a_job_whose_folder_is_gone(one: Fleet):
    b = one.hosts[1]
    write_script("echo begun; sleep 86421\n", b)
    watched = Watched(one, "trigger", B, "master")
    watched.until(f"[{B}] begun")
    take_away(b, watched.run)
    assert one.cli("cancel", watched.run).code == 0
    assert watched.end() == 1
    assert lines_of(watched.out, B)[-1] == "✗ 취소"


def test_a_job_whose_state_is_torn_while_its_daemon_is_away_is_found_again(one: Fleet):
    b = one.hosts[1]
    write_script(GATED, b)
    watched = Watched(one, "trigger", B, "master")
    watched.until(f"[{B}] begun")
    one.kill(b)
    os.truncate(file_of(b, watched.run), 0)
    (b.state / "history.jsonl").unlink(missing_ok=True)
    one.start(b)
    open_gate(b)
    assert watched.end() == 0
    assert lines_of(watched.out, B)[-2:] == ["ended", f"✓ 완료 {VERSION}"]


@pytest.mark.parametrize("ended", [False, True])
def test_a_state_that_is_torn_on_the_master_is_asked_for_again(one: Fleet, ended: bool):
    a, b, _ = one.hosts
    write_script(GATED, b)
    run = detach(one, B)
    wait_for(lambda: file_of(a, run, suffix="log").exists() and b"begun" in log_of(one, run, b), "it began")
    if ended:
        open_gate(b)
        wait_state(one, run, B, "succeeded")
    one.kill(a)
    os.truncate(file_of(a, run), 20)
    record = a.state / "runs" / run / "run.json"
    record.write_text(json.dumps(json.loads(record.read_text()) | {"created": time.time() - 7200}))
    one.start(a)
    watched = Watched(one, "logs", run, "-f")
    one.wait_online()
    open_gate(b)
    assert watched.end() == 0
    assert wait_state(one, run, B, "succeeded")["version"] == VERSION
    assert lines_of(watched.out, B)[-2:] == ["ended", f"✓ 완료 {VERSION}"]


@pytest.mark.parametrize("content", [b"", b'{"x": {"address": 5}}', None])
def test_a_list_of_hosts_that_is_gone_is_taken_from_the_runs(one: Fleet, content: bytes | None):
    a, b, _ = one.hosts
    assert one.cli("trigger", "all", "master").code == 0
    one.stop(b)
    one.stop(a)
    path = a.state / "machines.json"
    if content is None:
        path.unlink()
    else:
        path.write_bytes(content)
    one.start(a)
    if content and b"{" in content:
        assert one.cli("status").code == 0, "one bad entry is left out"
        return
    done = one.cli("trigger", "all", "master")
    assert done.code == 1 and lines_of(done.out, B)[-1] == "✗ 오프라인"
    assert f"can't read {path}" in a.stderr


@pytest.mark.parametrize("content", [b"", b"\xff" * 40, b"ab12"])
def test_a_damaged_machine_id_is_said(tmp_path: Path, content: bytes, capfd: pytest.CaptureFixture[str]):
    state = updater.StateFolder(tmp_path / "state")
    state.create()
    (state.root / "machine-id").write_bytes(content)
    new = state.machine_id()
    assert f"{state.root / 'machine-id'} is damaged: this is a new host from now on" in capfd.readouterr().err
    assert updater.StateFolder(state.root).machine_id() == new and not capfd.readouterr().err


def test_an_identity_that_can_not_be_read_now_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    state = updater.StateFolder(tmp_path / "state")
    state.create()
    first = state.machine_id()

    def fails(*_: object) -> bytes:
        raise OSError(24, "Too many open files")

    with monkeypatch.context() as patched:
        patched.setattr(Path, "read_bytes", fails)
        with pytest.raises(OSError, match="Too many"):
            updater.StateFolder(tmp_path / "state").machine_id()
    assert updater.StateFolder(tmp_path / "state").machine_id() == first


def test_settings_that_are_invalid_from_the_start_on_end_no_daemon(tmp_path: Path):
    state = updater.StateFolder(tmp_path / "state")
    state.create()
    path = tmp_path / "config" / "updater.json"
    path.parent.mkdir()
    path.write_text('{"masterUrl": "ws://127.0.0.1:1", "whitelist": []}')
    config = updater.ConfigFile(path, state)
    for keep in state.root.glob("last-config*"):
        keep.unlink()
    path.write_text("{")
    assert [config.reload() for _ in range(3)] == [False] * 3
    assert config.problem and config.config.whitelist == ()


def test_a_daemon_log_that_nobody_reads_does_not_stop_the_daemon(one: Fleet):
    """Its standard error is a full pipe, as under a PM2 that is stopped."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    with pytest.raises(BlockingIOError):
        while True:
            os.write(writer, b"x" * 4096)
    os.set_blocking(writer, True)
    b = one.hosts[1]
    one.stop(b)
    argv, env, cwd = one._command(("serve",), b, None, None)
    import subprocess

    with subprocess.Popen(argv, env=env, cwd=cwd, stdin=subprocess.DEVNULL, stderr=writer) as daemon:
        try:
            one.wait_online()
            assert one.cli("trigger", B, "master").code == 0
        finally:
            daemon.terminate()
            assert daemon.wait(30) == 0
            os.close(reader)
            os.close(writer)


# Masters and commanders


def test_a_new_master_takes_its_watchers_along(one: Fleet):
    """Its state folder is gone. It learns of the run from one host after the other, and those who watch with it."""
    a, b, c = one.hosts
    write_script(GATED, b, c)
    watched = [Watched(one, "trigger", f"{B},{C}", "master")]
    watched[0].until(lambda: all(f"[{host}] begun" in watched[0].out for host in (B, C)))
    run = watched[0].run
    watched.append(Watched(one, "logs", run, "-f", "--json", host=c))
    wait_for(lambda: watched[1].out.count("begun") == 2, "it watches too")
    one.kill(c)
    one.kill(a)
    shutil.rmtree(a.state)
    one.start(a)
    one.wait_online(b)
    one.start(c)
    open_gate(b, c)
    assert [each.end() for each in watched] == [0, 0], watched[0].err
    for host in (b, c):
        assert lines_of(watched[0].out, host.address)[-3:] == ["begun", "ended", f"✓ 완료 {VERSION}"]
        assert log_of(one, run, host) == log_of(one, run, host, at=host)
    results = [event["host"] for event in watched[1].events if event["event"] == "result"]
    assert sorted(results) == [B, C] and watched[1].events[-1] == {"event": "done", "run": run, "ok": True}


def test_a_watcher_that_is_shut_out_says_how_to_go_on(one: Fleet):
    """On a host that has a copy of the log, too: what was shown is not shown again."""
    a, b, _ = one.hosts
    write_script(GATED, b)
    run = detach(one, B)
    watched = Watched(one, "logs", run, "-f", host=b)
    watched.until("begun")
    before, applied = a.config.read_text(), a.stderr.count("new settings")
    a.config.write_text(json.dumps(json.loads(before) | {"whitelist": [A, C]}))
    try:
        assert watched.end() == 3
    finally:
        a.config.write_text(before)
    assert watched.out.count("begun") == 1
    assert "the master refused us" in watched.err and f"logs {run} -f" in watched.err
    open_gate(b)
    wait_for(lambda: a.stderr.count("new settings") == applied + 2, lambda: a.stderr)
    one.restart(b)


def test_a_daemon_that_hangs_is_seen_in_status(one: Fleet):
    b = one.hosts[1]
    assert b.process
    b.process.send_signal(signal.SIGSTOP)
    try:
        assert f"! {B}: no answer within 2 s" in one.cli("status").out
    finally:
        b.process.send_signal(signal.SIGCONT)


def test_what_a_stopped_commander_did_not_hear_was_no_silence(one: Fleet):
    b = one.hosts[1]
    write_script("until [ -e ../go ]; do echo talking; sleep 0.1; done\n", b)
    limits = {"SILENT_S": 1, "STOPPED_S": 1.9}
    watched = Watched(one, "trigger", B, "master", env={"LIMITS": json.dumps(limits)})
    watched.until("talking")
    before = len(watched.err)  # git may have been silent
    for _ in range(2):
        watched.process.send_signal(signal.SIGSTOP)
        size = len(log_of(one, watched.run, b))
        wait_for(lambda: len(log_of(one, watched.run, b)) > size + 500, "time passes")  # noqa: B023
        watched.process.send_signal(signal.SIGCONT)
        size = len(watched.data)
        wait_for(lambda: len(watched.data) > size + 500, "it goes on")  # noqa: B023
    open_gate(b)
    assert watched.end() == 0
    assert "silent for" not in watched.err[before:]


def test_long_lines_are_cut_between_characters(one: Fleet):
    text = "가나다라마바사아자차카타파하"
    write_script(f"printf '{text}%.0s' $(seq 9000); echo\n", one.hosts[1])
    watched = Watched(one, "trigger", B, "master", "--json")
    assert watched.end() == 0
    lines: list[dict[str, Any]] = [event for event in watched.events if event["event"] == "log"]
    pieces = lines[1 + [event["line"] for event in lines].index(f"{STEP}...") :]
    assert len(pieces) > 4 and all(event.get("more") for event in pieces[:-1])
    assert "".join(event["line"] for event in pieces) == text * 9000


@pytest.mark.parametrize("redirect", [">/dev/full", ">&-"])
def test_an_output_that_takes_nothing_ends_the_watching_only(one: Fleet, redirect: str):
    write_script("echo fine\n", one.hosts[1])
    argv, env, cwd = one._command(("trigger", B, "master"), None, None, None)
    from tests.fleet import run

    before = len(one.runs())
    done = run(["sh", "-c", f'exec "$@" {redirect}', "sh", *argv], env, cwd)
    assert done.code == (130 if "full" in redirect else 0), done.err
    assert "Traceback" not in done.err and "Exception ignored" not in done.err
    if "full" in redirect:
        assert "can't write the output: No space left on device" in done.err and " -f" in done.err
    assert len(one.runs()) == before + 1
    wait_state(one, one.runs()[-1].name, B, "succeeded")


UNREADABLE = """
import os, sys
from pathlib import Path
from estelle_updater import ConfigFile, StateFolder
path, state = Path("updater.json"), StateFolder(Path("state"))
state.create()
os.chown("state", 65534, 65534)
path.write_text('{"masterUrl": "ws://127.0.0.1:9900", "whitelist": []}')
config = ConfigFile(path, state)
path.write_text('{"masterUrl": "ws://127.0.0.1:9900", "whitelist": ["127.0.0.3"]}')
path.chmod(0)
os.seteuid(65534)
print(config.reload(), config.reload(), config.problem)
os.seteuid(0)
before = path.stat().st_ctime_ns
while path.stat().st_ctime_ns == before:  # the kernel's clock ticks only every few milliseconds
    path.chmod(0o644)
os.seteuid(65534)
print(config.reload(), config.reload(), config.problem, config.config.whitelist)
"""


def test_a_configuration_that_becomes_readable_is_read() -> None:
    """A pull by root, with a careful umask, and a chmod after it: neither time nor size changes."""
    if os.geteuid() != 0:
        unavailable("only root can become somebody who may not read a file")
    with tempfile.TemporaryDirectory() as folder:  # pytest's own is nobody else's
        Path(folder).chmod(0o755)
        done = run([sys.executable, "-c", UNREADABLE], os.environ | {"PYTHONPATH": str(ROOT)}, Path(folder))
    first, second = done.out.splitlines()
    assert first.startswith("False False can't read"), done
    assert second == "False True None ('127.0.0.3',)", done


# What goes wrong once must not be lost for ever, nor end the daemon


def test_what_is_done_by_hand_reaches_the_master_whatever_its_disk_does(one: Fleet):
    """It is slow to make the run's folder, which the log must not wait for; then no descriptor is left just as the
    result comes, and nothing new happens on the host that would tell it once more."""
    a, b, _ = one.hosts
    scarce = one.tmp_path / "scarce"
    fault = f"""write_file = Store._write_file
def slow(self, path, *rest):
    time.sleep(1 if path.name == "run.json" else 0)
    write_file(self, path, *rest)
Store._write_file = slow
load = StateFolder.load_run
def load_run(self, run):
    if os.path.exists({str(scarce)!r}):
        raise OSError(24, "Too many open files")
    return load(self, run)
StateFolder.load_run = load_run"""
    again(one, a, FAULT=fault)
    again(one, b, LIMITS='{"SAY_AGAIN_S": 1}')
    write_script("echo by hand\n", b)
    for is_scarce in (False, True):
        if is_scarce:
            scarce.touch()
        try:
            done = one.cli("deploy", "master", host=b)
            assert done.code == 0, done.err
            if is_scarce:
                wait_for(lambda: "Too many open files" in a.stderr, "the master could not take it")
        finally:
            scarce.unlink(missing_ok=True)
        path = newest_job(b)
        wait_for(lambda: json.loads(path.read_text())["acked"], "its host may forget it")  # noqa: B023
        run = path.parent.name
        assert job_of(one, run, B)["state"] == "succeeded"
        assert log_of(one, run, b) == (path.parent / f"{B}.log").read_bytes()
    assert "can't write" not in a.stderr, a.stderr


def newest_job(host: Host) -> Path:
    """The record of the newest job, on its host."""
    return max(host.state.glob(f"runs/*/{B}.json"), key=lambda path: path.parent.name)


def test_one_question_s_fault_ends_no_daemon(one: Fleet):
    """The master's own agent lives in its process: what ended that connection would end the master."""
    a = one.master
    ill = one.tmp_path / "ill"
    fault = f"""tell = QUESTIONS["status"]
def fall(*args):
    if os.path.exists({str(ill)!r}):
        raise RuntimeError("can't start new thread")
    return tell(*args)
QUESTIONS["status"] = fall"""
    again(one, a, FAULT=fault)
    ill.touch()
    rows = json.loads(one.cli("status", "--json").out)["hosts"]
    problems = {row["host"]: row["problem"] for row in rows}
    assert problems[A] == "this host can't answer that: RuntimeError" and problems[B] is None, problems
    assert "status could not be answered: RuntimeError" in a.stderr
    ill.unlink()
    assert a.process and a.process.poll() is None
    assert all(row["problem"] is None for row in json.loads(one.cli("status", "--json").out)["hosts"])


def test_a_file_that_can_not_be_read_now_ends_no_daemon(one: Fleet):
    """The record of a deployment by hand, just when the daemon looks for one."""
    _, b, _ = one.hosts
    scarce = one.tmp_path / "unreadable"
    fault = f"""load = StateFolder.load_job
def load_job(self, run, host):
    if os.path.exists({str(scarce)!r}):
        raise OSError(24, "Too many open files")
    return load(self, run, host)
StateFolder.load_job = load_job"""
    again(one, b, FAULT=fault)
    write_script(GATED, b)
    scarce.touch()
    try:
        hand = Watched(one, "deploy", "master", host=b)
        wait_for(lambda: "can't look for a deployment by hand" in b.stderr, "the daemon could not read it")
    finally:
        scarce.unlink()
    open_gate(b)
    assert hand.end() == 0
    assert b.process and b.process.poll() is None
    path = newest_job(b)
    wait_for(lambda: json.loads(path.read_text())["acked"], "the master has heard of it")
    assert b.stderr.count("can't look for a deployment by hand") == 1
