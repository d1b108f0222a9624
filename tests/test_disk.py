"""Full and read-only disks, torn files, shortened logs: right results or clear ones, and no daemon dies of it."""

from __future__ import annotations

import itertools
import json
import os
import re
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from tests.commands import (
    COMMAND,
    GATE,
    GATED,
    STEP,
    Watched,
    detach,
    job_of,
    lines_of,
    log_of,
    open_gate,
    wait_state,
    write_script,
)  # fmt: skip
from tests.fleet import VERSION, Fleet, Host, kill_processes_of, mounted, processes_of, run, wait_for
from tests.seam import LOOK_S, log_size

A, B = "127.0.0.1", "127.0.0.2"
SIZE_KB = 1024  # the master has room for several times as much
pytestmark = pytest.mark.xdist_group("disk")
# More than the disk holds, in lines, before and after the gate
FLOOD = f"seq 1 300000\necho flooded > ../flooded\n{GATE}seq 1 1000\ntouch ../ended\n"
NOT_RECORDED = re.compile(rb"\n\[\.\.\. (\d+) bytes not recorded\]\n")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    """A master and two agents, each with a small disk of its own for its state."""
    fleet = Fleet(tmp_path_factory.mktemp("disk"), command=COMMAND)
    with ExitStack() as disks:
        for host in fleet.hosts:
            host.state.mkdir()
            size_kb = SIZE_KB * (8 if host is fleet.master else 1)
            disks.enter_context(mounted(host.state, f"size={size_kb}k"))
        try:
            fleet.start()
            yield fleet
        finally:
            fleet.stop_all()


@pytest.fixture
def one(made: Fleet) -> Iterator[Fleet]:
    write_script("echo fine\n", *made.hosts)
    for host in made.hosts:
        (host.folder / "flooded").unlink(missing_ok=True)
    alive = [host.process for host in made.hosts]
    yield made
    for host in made.hosts:
        (host.state / "filler").unlink(missing_ok=True)
        for path in host.state.glob("runs/*/*.log"):  # room for the next test
            path.write_bytes(b"")
    open_gate(*made.hosts)
    write_script("echo fine\n", *made.hosts)
    assert all(process.poll() in (None, 0, -9) for process in alive if process), "no daemon has died"
    made.wait_online()
    assert made.cli("trigger", "all", "master").code == 0, "all is well again"


def fill(host: Host) -> Path:
    """Leave no room on a host's disk."""
    path = host.state / "filler"
    with path.open("ab", buffering=0) as file:
        for size in (65536, 1):
            try:
                while True:
                    file.write(b"x" * size)
            except OSError:
                pass
    return path


def mount(host: Host, *options: str) -> None:
    code, _, err = run(["mount", *options, host.state], os.environ)
    assert code == 0, err


def recorded(log: bytes) -> tuple[int, int]:
    """Bytes of the deployment's output in a log, and how many it says are missing."""
    output = log.partition(f"{STEP}...\n".encode())[2]
    missing = sum(int(number) for number in NOT_RECORDED.findall(output))
    return len(NOT_RECORDED.sub(b"", output)), missing


def test_a_full_agent_says_how_much_is_missing(one: Fleet):
    """The disk fills up in the middle: the deployment itself goes on, and so does everybody else."""
    b = one.hosts[1]
    write_script(FLOOD, b)
    watched = Watched(one, "trigger", B, "master")
    wait_for((b.folder / "flooded").exists, "it wrote more than there is room")
    wait_for(lambda: log_size(b.state / f"runs/{watched.run}/{B}.log") > SIZE_KB * 512, "the disk is full")
    assert one.cli("trigger", A, "master").code == 0
    (b.folder / "ended").unlink(missing_ok=True)
    open_gate(b)
    wait_for((b.folder / "ended").exists, "the deployment is over")
    rows = json.loads(one.cli("status", "--json").out)["hosts"]
    at_work = {row["host"]: row["running"] for row in rows if row["running"]}
    assert at_work == {B: watched.run}, "its result waits for room"
    assert {row["host"]: row["problem"] for row in rows if row["problem"]} == {
        B: f"can't write to the state folder {b.state}: No space left on device"
    }, "and why is said"
    # what is shown at once is in the master's file a moment later: its host would say it again
    wait_state(one, watched.run, B, "running")
    mount(b, "-o", f"remount,size={2 * SIZE_KB}k")
    assert watched.end() == 0
    log = log_of(one, watched.run, b)
    whole = len("".join(f"{i}\n" for i in range(1, 300001))) + len("".join(f"{i}\n" for i in range(1, 1001)))
    written, missing = recorded(log)
    assert missing and written + missing == whole
    assert log_of(one, watched.run, b, at=b) == log
    assert lines_of(watched.out, B)[-1] == f"✓ 완료 {VERSION}"
    for path in b.state.glob("runs/*/*.log"):
        path.write_bytes(b"")
    mount(b, "-o", f"remount,size={SIZE_KB}k")


def test_a_full_agent_refuses_an_order_with_the_reason(one: Fleet):
    b = one.hosts[1]
    fill(b)
    one.kill(b)
    one.start(b)  # a daemon starts all the same
    one.wait_online(b)
    code, out, err = one.cli("trigger", f"{A},{B}", "master")
    assert code == 1
    assert lines_of(out, A)[-1] == f"✓ 완료 {VERSION}"
    assert lines_of(out, B)[-1] == "✗ 실패 start"
    assert f"can't write to {b.state}: No space left on device" in err
    assert b.process
    pid, daemon = b.process.pid, b.state / "daemon.json"
    assert json.loads(daemon.read_bytes())["pid"] != pid
    (b.state / "filler").unlink()
    wait_for(lambda: json.loads(daemon.read_bytes())["pid"] == pid, "it says where to poke it, once there is room")


def test_a_full_agent_can_be_cancelled(one: Fleet):
    b = one.hosts[1]
    write_script("echo begun; sleep 86411\n", b)
    watched = Watched(one, "trigger", B, "master")
    watched.until(f"[{B}] begun")
    fill(b)
    assert one.cli("cancel", watched.run).code == 0
    wait_for(lambda: not any("86411" in words for words in processes_of(b.folder).values()), "the step is killed")
    (b.state / "filler").unlink()
    assert watched.end() == 1
    assert lines_of(watched.out, B)[-1] == "✗ 취소"


def test_a_full_master_takes_nothing_new_and_fetches_the_rest(one: Fleet):
    a, b, _ = one.hosts
    write_script(GATED.replace("echo ended", "seq 1 20000; echo ended"), b)
    watched = Watched(one, "trigger", B, "master")
    watched.until(f"[{B}] begun")
    fill(a)
    code, _, err = one.cli("trigger", "all", "master")
    assert code == 1
    assert f"the master can't write to {a.state}: No space left on device" in err
    open_gate(b)
    wait_for(lambda: job_of(one, watched.run, b, at=b)["state"] == "succeeded", "the deployment ends")
    wait_for(lambda: f"can't write {a.state}" in a.stderr, "the master says so")
    assert watched.process.poll() is None
    (a.state / "filler").unlink()
    assert watched.end() == 0
    assert log_of(one, watched.run, b) == log_of(one, watched.run, b, at=b)
    assert lines_of(watched.out, B)[-2:] == ["ended", f"✓ 완료 {VERSION}"]


def test_what_was_cancelled_while_the_master_was_full_does_not_run(one: Fleet):
    a, b, _ = one.hosts
    write_script(f"echo x >> ../ran\n{GATED}", b)
    (b.folder / "ran").unlink(missing_ok=True)
    first = detach(one, B)
    wait_state(one, first, B, "running")
    one.origin.commit({}, branch="hotfix")
    second = detach(one, B, "hotfix")
    wait_for(lambda: job_of(one, second, B).get("behind"), "it is queued")
    fill(a)
    assert one.cli("cancel", second).code == 0
    assert job_of(one, second, B)["state"] == "queued"
    assert "✗ 취소" in one.cli("logs", second).out  # which loads it, should it have been forgotten
    (a.state / "filler").unlink()
    wait_state(one, second, B, "cancelled")
    one.kill(a)
    one.start(a)
    one.wait_online()
    open_gate(b)
    wait_state(one, first, B, "succeeded")
    assert one.cli("trigger", B, "master").code == 0
    assert (b.folder / "ran").read_text() == "x\nx\n"


def test_a_deployment_by_hand_reaches_a_master_that_was_full(one: Fleet):
    a, b, _ = one.hosts
    before, told = set(one.runs(b)), len(a.stderr)
    daemon = b.state / "daemon.json"
    facts = json.loads(daemon.read_bytes())
    daemon.write_text(json.dumps(facts | {"poke": 1}))  # and no poke arrives
    idle = time.monotonic()
    wait_for(lambda: time.monotonic() - idle > 2 * LOOK_S, "it has looked its last at the job before")
    fill(a)
    code, out, err = one.cli("deploy", "master", host=b)
    assert code == 0, out + err
    (made,) = set(one.runs(b)) - before
    wait_for(lambda: "can't write" in a.stderr[told:], "the master can't take it")
    (a.state / "filler").unlink()
    wait_state(one, made.name, B, "succeeded")
    assert one.cli("logs", made.name).out == out
    daemon.write_text(json.dumps(facts))


def test_a_read_only_state_folder(one: Fleet):
    """As a file system is after an error: nothing can be ordered there, all others can, and a new daemon says why."""
    b = one.hosts[1]
    mount(b, "--bind", str(b.state))  # over itself: a daemon that has files open does not keep this one writable
    mount(b, "-o", "remount,bind,ro")
    try:
        code, out, err = one.cli("trigger", f"{A},{B}", "master")
        assert code == 1
        assert lines_of(out, A)[-1] == f"✓ 완료 {VERSION}"
        assert f"can't write to {b.state}: Read-only file system" in err
        assert one.cli("status").code == 0
        assert one.stop(b) == 0
        code, _, err = one.cli("serve", host=b)
        assert code == 2
        assert f"can't write to the state folder {b.state}: Read-only file system" in err
    finally:
        run(["umount", b.state], os.environ)
        one.restart(b)


def test_a_power_loss_shortens_a_log_and_tears_a_state(one: Fleet):
    """The longer copy stays, and a job whose state is gone does not run again."""
    b = one.hosts[1]
    for tear, reason in ((False, "the runner died"), (True, "the record of this job is damaged; its log ends")):
        write_script("seq 1 100\necho begun >> ../begun\nsleep 86412\n", b)
        (b.folder / "begun").unlink(missing_ok=True)
        watched = Watched(one, "trigger", B, "master")
        watched.until(f"[{B}] 100\n")
        wait_for((b.folder / "begun").exists, "it began")
        one.kill(b)
        kill_processes_of(b.repo)
        folder = b.state / "runs" / watched.run
        os.truncate(folder / f"{B}.log", log_size(folder / f"{B}.log") - 50)
        if tear:
            os.truncate(folder / f"{B}.json", 60)
        one.start(b)
        assert watched.end() == 1
        assert lines_of(watched.out, B)[-1].startswith(f"✗ 연결 끊김 ({reason}")
        assert (folder / f"{B}.json.torn").exists() is tear
        assert b"\n100\n" in log_of(one, watched.run, b)
        assert (b.folder / "begun").read_text() == "begun\n"


def test_a_result_whose_log_was_shortened_is_not_waited_for(one: Fleet):
    a, b, _ = one.hosts
    write_script(GATED, b)
    watched = Watched(one, "trigger", B, "master")
    watched.until(f"[{B}] begun")
    one.kill(a)
    open_gate(b)
    wait_for(lambda: job_of(one, watched.run, b, at=b)["state"] == "succeeded", "it ends while the master is away")
    one.kill(b)
    log = b.state / "runs" / watched.run / f"{B}.log"
    os.truncate(log, log_size(log) - 4)
    one.start(a, b)
    assert watched.end() == 0
    assert lines_of(watched.out, B)[-3:-1] == ["en", "[estelle-updater: log incomplete: 4 bytes are lost]"]


def test_a_clone_that_takes_no_files_is_told_before_anything_changes(tmp_path: Path):
    """Without free inodes, or mounted read-only: by `plan` and by the job, in the words that `doctor` has."""
    one = Fleet(tmp_path, hosts=1)
    (host,) = one.hosts
    kept = tmp_path / "kept"
    host.repo.rename(kept)
    host.repo.mkdir()
    with mounted(host.repo, "nr_inodes=3000"):
        fillers = host.repo / ".git" / "fillers"
        try:
            assert run(["cp", "-a", f"{kept}/.", host.repo], os.environ).code == 0
            one.start()
            one.origin.commit({"app.txt": "1"})
            before = one.origin.git("rev-parse", "HEAD", cwd=host.repo)

            def told() -> tuple[dict[str, Any], str]:
                """What `plan` says of the host, and what a deployment does."""
                (row,) = json.loads(one.cli("plan", A, "master", "--json").out)["hosts"]
                return row, one.cli("trigger", A, "master").out

            fillers.mkdir()
            for number in itertools.count():
                try:
                    (fillers / str(number)).touch()
                except OSError:
                    break
            none_left = f"room for 0 more files at {host.repo}: no inodes are left"
            row, said = told()
            assert row["refused"] == [f"{none_left}; remove files from the disk of {host.repo}"], row
            assert f"error: {none_left}" in said and "✗ 실패 check" in said and "git fetch" not in said
            for number in range(100):
                (fillers / str(number)).unlink()
            (row,) = json.loads(one.cli("plan", A, "master", "--json").out)["hosts"]
            assert not row["refused"] and "more files at" in str(row["warnings"]), "few are only few"
            assert one.origin.git("rev-parse", "HEAD", cwd=host.repo) == before
            assert run(["mount", "-o", "remount,ro", str(host.repo)], os.environ).code == 0
            row, said = told()
            assert row["refused"][0].startswith(f"{host.repo} is mounted read-only; why is it so?"), row
            assert "is mounted read-only" in said and "✗ 실패 check" in said and "git fetch" not in said
        finally:
            one.stop_all()
            kill_processes_of(tmp_path)
