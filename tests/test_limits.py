"""What only happens after minutes or days, with the program's own limits made short; and what must stay bounded."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from tests import seam as updater
from tests.commands import (
    GATE,
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
from tests.fleet import VERSION, Fleet, processes_of, wait_for

A, B, C = "127.0.0.1", "127.0.0.2", "127.0.0.3"
PEAK = "import atexit; atexit.register(lambda: print('peak', *open('/proc/self/status'), file=sys.stderr))"
IMPATIENT = "SERVER_OPTIONS.update(ping_interval=1, ping_timeout=3)"  # and a send that blocks is given up after 1 s
# once the disk has kept a run, and before the store tells anybody so
DIES = """end = Store._end
def die(self, path, write, data, refused):
    if path.name == "run.json" and not refused:
        os._exit(9)
    end(self, path, write, data, refused)
Store._end = die"""
TALK = "until [ -e ../go ]; do echo talking; sleep 0.1; done\n"
BOUND_KB = 64 << 10  # over what a process of this program needs anyway
pytestmark = pytest.mark.xdist_group("limits")


made = module_fleet("limits", config={"whitelist": ["127.0.0.0/8"]}, program=(sys.executable, "-c", HURRIED))


@pytest.fixture
def one(made: Fleet) -> Iterator[Fleet]:
    yield from ready(made)


def hwm_kb(status: str) -> int:
    return int(next(line.split()[1] for line in status.splitlines() if line.strip().startswith("VmHWM")))


def peak_kb(pid: int) -> int:
    """The most memory that a process ever had."""
    return hwm_kb(Path(f"/proc/{pid}/status").read_text())


def test_a_silent_step_is_announced_while_others_talk(one: Fleet):
    write_script(TALK, one.hosts[0])
    write_script(f"echo last words\n{GATE}", one.hosts[1])
    watched = Watched(one, "trigger", f"{A},{B}", "master", env={"LIMITS": '{"SILENT_S": 2}'})
    watched.until(f"[{A}] talking")
    before = len(watched.err)  # git may have been silent
    watched.until(lambda: f"{B}: silent for " in watched.err and "; last line: last words\n" in watched.err)
    assert f"{A}: silent" not in watched.err[before:]
    open_gate(*one.hosts)
    assert watched.end() == 0


def test_a_silent_step_of_a_deployment_by_hand_is_announced(one: Fleet):
    b = one.hosts[1]
    write_script(f"echo last words\n{GATE}", b)
    watched = Watched(one, "deploy", "master", host=b, env={"LIMITS": '{"SILENT_S": 0.5}'})
    watched.until(lambda: re.search(r": silent for \d+ s; last line: last words\n", watched.err))
    open_gate(b)
    assert watched.end() == 0
    assert lines_of(watched.out, B)[-2:] == ["last words", f"✓ 완료 {VERSION}"]


def test_status_says_what_runs_waits_and_is_away(one: Fleet):
    a, _, c = one.hosts
    one.stop(c)
    wait_for(lambda: f"agent {C} is offline" in a.stderr, "the master notices")
    write_script(GATED, *one.hosts)
    first = detach(one, B)
    wait_state(one, first, B, "running")
    one.origin.commit({}, branch="hotfix")
    second = detach(one, B, "hotfix")
    wait_for(lambda: job_of(one, second, B).get("behind"), "it is queued")
    what = rf"{first} {STEP} for \d+ s, silent for \d+ s; {second} queued behind {first}"
    told = ""

    def tells() -> bool:
        nonlocal told
        told = one.cli("status", env={"LIMITS": '{"SILENT_S": 0.1}'}).out
        return re.search(what, told) is not None

    wait_for(tells, lambda: told)
    assert re.search(rf"^{C} .* no, since \d\d-\d\d \d\d:\d\d ", told, re.MULTILINE)


def test_the_master_dies_between_recording_and_answering(one: Fleet):
    a, b, _ = one.hosts
    again(one, a, FAULT=DIES)
    write_script("echo x >> ../begun\n", b)
    before = len(one.runs())
    watched = Watched(one, "trigger", B, "master", env={"LIMITS": '{"PATIENCE_S": 5}'})
    assert a.process
    assert a.process.wait(30) == 9
    assert len(one.runs()) == before + 1
    until = time.monotonic() + 6  # longer than an order waits that nobody has taken
    wait_for(lambda: time.monotonic() > until, "a service manager starts it again")
    assert watched.process.poll() is None
    one.start(a)
    assert watched.end() == 0
    assert len(one.runs()) == before + 1
    assert (b.folder / "begun").read_text() == "x\n"


def test_an_order_that_was_not_taken_expires(one: Fleet):
    """As for a host that is back after three days: neither what was sent to it nor what waited for it runs."""
    a, b, _ = one.hosts
    again(one, a, LIMITS='{"ORDER_EXPIRES_S": 5}')
    write_script("echo x >> ../begun\n", b)
    one.origin.commit({}, branch="hotfix")
    assert b.process
    b.process.send_signal(signal.SIGSTOP)  # the order reaches its kernel only
    sent = detach(one, B)
    waiting = detach(one, B, "hotfix")
    wait_for(lambda: job_of(one, sent, B).get("ordered"), "it is ordered")
    one.kill(b)
    assert wait_state(one, sent, B, "lost")["error"] == "the order was never acknowledged"
    assert wait_state(one, waiting, B, "offline")["error"] == "the host is offline"
    one.start(b)
    one.wait_online(b)
    assert one.cli("trigger", B, "master").code == 0
    assert (b.folder / "begun").read_text() == "x\n"
    assert [job_of(one, run, B)["state"] for run in (sent, waiting)] == ["lost", "offline"]


def test_batches_and_waiting_outlive_the_daemons(one: Fleet):
    a, b, c = one.hosts
    one.stop(c)
    wait_for(lambda: f"agent {C} is offline" in a.stderr, "the master notices")
    write_script(f"echo x >> ../begun\n{GATED}", *one.hosts)
    watched = Watched(one, "trigger", "all", "master", "--batch", "1", "--wait", "100")
    watched.until(f"[{A}] begun")
    one.kill(a)
    open_gate(a)
    one.start(a)
    watched.until(f"[{B}] begun")
    one.kill(b)
    one.kill(a)
    one.start(a, b)
    assert not (c.folder / "begun").exists()
    open_gate(b)
    wait_state(one, watched.run, B, "succeeded")
    assert job_of(one, watched.run, C)["state"] == "queued"
    one.start(c)
    watched.until(f"[{C}] begun")
    open_gate(c)
    assert watched.end() == 0
    assert [(host.folder / "begun").read_text() for host in one.hosts] == ["x\n"] * 3


def test_two_commanders_at_once_get_one_order_on_all_hosts(one: Fleet):
    one.origin.commit({}, branch="hotfix")
    one.origin.git("switch", "--quiet", "master")
    for _ in range(3):
        both = [Watched(one, "trigger", "all", branch, host=host)
                for branch, host in zip(("master", "hotfix"), one.hosts[1:], strict=True)]  # fmt: skip
        assert [watched.end() for watched in both] == [0, 0]
        began = [[job_of(one, watched.run, host)["started"] for watched in both] for host in one.hosts]
        assert len({first < second for first, second in began}) == 1, began


def test_a_stopped_terminal_slows_nobody_and_is_not_cut_off(one: Fleet):
    a, b, _ = one.hosts
    again(one, a, FAULT=IMPATIENT, LIMITS='{"SEND_S": 1}')
    assert a.process
    before = peak_kb(a.process.pid)
    write_script("yes 123456789 | head -n 2000000\n", b)  # 20 MB
    earlier = len(one.runs())
    stopped = one.popen("trigger", B, "master")  # nobody reads its output
    begun = ("running", "succeeded")  # it may take less time than a look does
    wait_for(lambda: len(one.runs()) > earlier and job_of(one, one.runs()[-1].name, B).get("state") in begun, "it runs")
    other = Watched(one, "logs", one.runs()[-1].name, "-f")
    assert other.end() == 0
    until = time.monotonic() + 8  # much longer than pings and sends are waited for
    wait_for(lambda: time.monotonic() > until and one.cli("status").code == 0, "time passes")
    assert peak_kb(a.process.pid) - before < BOUND_KB
    out, err = stopped.communicate(timeout=60)
    assert stopped.returncode == 0
    assert b"reconnecting" not in err
    assert out.decode() == other.out


def test_a_suspended_commander_goes_on_where_it_was(one: Fleet):
    a, b, _ = one.hosts
    again(one, a, FAULT=IMPATIENT, LIMITS='{"SEND_S": 1}')
    lines = 'seq -f "line %g" $n $((n+19)); n=$((n+20))'
    write_script(f"n=1; until [ -e ../go ]; do {lines}; sleep 0.1; done\n", b)
    watched = Watched(one, "trigger", B, "master")
    watched.until("line 10\n")
    watched.process.send_signal(signal.SIGSTOP)
    size = log_of(one, watched.run, b)
    wait_for(lambda: len(log_of(one, watched.run, b)) > len(size) + 4000, "the deployment goes on")
    watched.process.send_signal(signal.SIGCONT)
    open_gate(b)
    assert watched.end() == 0
    assert lines_of(watched.out, B)[:-1] == log_of(one, watched.run, b).decode().splitlines()


def test_a_send_that_nobody_takes_is_given_up(one: Fleet):
    """A peer that asks and does not read: long before its pings would be missed."""
    from websockets.exceptions import ConnectionClosed
    from websockets.sync.client import connect

    again(one, one.hosts[0], LIMITS='{"SEND_S": 1}')
    write_script("yes 123456789 | head -n 300000\n", one.hosts[1])
    code, out, _ = one.cli("trigger", B, "master", "--detach")
    assert code == 0
    wait_state(one, run := out.strip(), B, "succeeded")
    with connect(one.url, source_address=(A, 0), proxy=None, compression=None, max_queue=1) as socket:

        def send(message: object) -> None:
            socket.send(updater.encode_message(message))

        send(updater.Hello("commander", [1, 1], "1", "", "test", ""))
        send(updater.Follow(run))

        def cut_off() -> bool:
            try:
                send(updater.Have(1, 0, rewind=True))  # again, and again
            except (ConnectionClosed, OSError):
                return True
            return False

        wait_for(cut_off, "the master gives the connection up", 30)
    assert one.cli("logs", run).code == 0


def test_a_host_that_is_cut_off_for_long_releases_its_watchers(one: Fleet):
    a, b, _ = one.hosts
    again(one, a, LIMITS='{"LOST_S": 1}')
    write_script(GATED, b)
    watched = Watched(one, "trigger", B, "master")
    watched.until(f"[{B}] begun")
    one.kill(b)
    assert watched.end() == 1
    assert lines_of(watched.out, B)[-1] == "✗ 연결 끊김 (no connection for 1 s)"
    assert f"{B}: no connection; what runs there goes on" in watched.err
    open_gate(b)
    one.start(b)
    wait_state(one, watched.run, B, "succeeded")  # its late word
    assert lines_of(one.cli("logs", watched.run).out, B)[-1] == f"✓ 완료 {VERSION}"


def test_a_host_that_takes_no_cancel_releases_its_watchers(one: Fleet):
    a, b, _ = one.hosts
    again(one, a, LIMITS='{"LOST_S": 1}')
    again(one, b, FAULT="OwnJobs.cancel = lambda self, job, by: None")
    write_script(GATED, b)
    watched = Watched(one, "trigger", B, "master")
    watched.until(f"[{B}] begun")
    assert one.cli("cancel", watched.run).code == 0
    assert watched.end() == 1
    assert lines_of(watched.out, B)[-1] == "✗ 연결 끊김 (its host does not end it, though it was cancelled)"
    open_gate(b)
    wait_state(one, watched.run, B, "succeeded")  # its late word


def test_a_line_without_end_in_bounded_memory(one: Fleet):
    """Over what each process needs anyway: from source, a runner's nursery has compiled the program itself."""
    a, b, _ = one.hosts
    assert a.process and b.process
    pids = {"master": a.process.pid, "agent": b.process.pid}
    size = 50_000_000
    write_script(f"echo begun\n{GATE}rm ../go\nhead -c {size} /dev/zero | tr '\\0' x\n{GATE}", b)
    commander_kb = hwm_kb(one.cli("status", env={"FAULT": PEAK}).err.split("peak ")[1])
    watched = [Watched(one, "trigger", B, "master", env={"FAULT": PEAK})]
    run = watched[0].run
    watched.append(Watched(one, "logs", run, "-f", "--json", env={"FAULT": PEAK}))
    log = a.state / "runs" / run / f"{B}.log"
    watched[0].until(f"[{B}] begun")
    (pids["runner"],) = [pid for pid, command in processes_of(b.state).items() if " run-job " in command]
    before = {who: peak_kb(pid) for who, pid in pids.items()}
    open_gate(b)
    wait_for(lambda: updater.log_size(log) > size, "all of it is here", 120)
    grown = {who: peak_kb(pid) - before[who] for who, pid in pids.items()}
    open_gate(b)
    assert [each.end(120) for each in watched] == [0, 0]
    assert watched[0].out.count("x") == size
    assert sum(event["line"].count("x") for event in watched[1].events if event["event"] == "log") == size
    for number, each in enumerate(watched):
        grown[f"commander {number}"] = hwm_kb(each.err.split("peak ")[1]) - commander_kb
    print(before, commander_kb, grown)
    assert all(kb << 10 < size // 2 for kb in grown.values()), grown


def test_git_locks_are_removed_only_when_nobody_uses_them(one: Fleet):
    b = one.hosts[1]
    lock = b.repo / ".git" / "index.lock"
    lock.touch()
    code, out, _ = one.cli("trigger", B, "master")
    assert code == 0
    assert f"[{B}] warning: removed index.lock, left behind by a git that was killed\n" in out
    assert not lock.exists()
    one.origin.commit({"new.txt": "1"})
    lock.touch()
    with subprocess.Popen(["git", "hash-object", "--stdin"], cwd=b.repo, stdin=subprocess.PIPE, stdout=-3) as git:
        code, out, err = one.cli("trigger", B, "master")
        assert (code, lock.exists()) == (1, True)
        assert f"{B}: a git process left its lock file behind" in err
        git.communicate()
    assert one.cli("trigger", B, "master").code == 0


@pytest.mark.parametrize("deployed", ["clone/sub", "linked"])
def test_git_locks_of_the_clone_s_other_folders_are_in_use_too(tmp_path: Path, deployed: str):
    """What is deployed is a part of a clone, or a linked work tree; somebody runs git in the clone itself."""
    git, clone = tmp_path / "clone" / ".git", tmp_path / "clone"
    (clone / "sub").mkdir(parents=True)
    identity = ("-c", "user.name=x", "-c", "user.email=x@example.invalid")
    for words in (["init", "-q"], [*identity, "commit", "-qm", "x", "--allow-empty"], ["worktree", "add", "../linked"]):
        subprocess.run(["git", *words], cwd=clone, check=True, stderr=-3)
    runner = updater.Runner(updater.StateFolder(tmp_path), "run", "host", tmp_path)
    runner.poke._socket.close()
    runner.repo, runner.env = tmp_path / deployed, dict(os.environ)
    runner.log = updater.LogWriter(tmp_path / "log", lambda: None)
    places = ("index", "worktrees/linked/index", "modules/a/modules/b/index", "objects/info/commit-graphs/chain")
    locks = [git / f"{place}.lock" for place in places]
    for lock in locks:
        lock.parent.mkdir(parents=True, exist_ok=True)
        lock.touch()
    with subprocess.Popen(["git", "hash-object", "--stdin"], cwd=clone, stdin=subprocess.PIPE, stdout=-3) as other:
        updater.remove_git_locks(runner)
        assert all(lock.exists() for lock in locks)
        other.communicate()
    updater.remove_git_locks(runner)
    assert not any(lock.exists() for lock in locks)


def test_a_runner_keeps_no_dead_orphans(one: Fleet):
    """It adopts what its step leaves behind, and a long step may leave thousands: a user has only so many processes."""
    b = one.hosts[1]
    write_script(f"for n in 1 2 3 4 5 6 7 8 9; do (setsid true &) ; done; sleep 0.5\n{GATED}", b)
    watched = Watched(one, "trigger", B, "master")
    watched.until(f"[{B}] begun")
    (runner,) = [pid for pid, command in processes_of(b.state).items() if " run-job " in command]

    def dead() -> list[Path]:
        found = []
        for path in Path("/proc").glob("[0-9]*/stat"):
            with suppress(OSError):
                state, parent, *_ = path.read_text().rpartition(")")[2].split()
                found += [path] if (state, parent) == ("Z", str(runner)) else []
        return found

    wait_for(lambda: not dead(), "they are gone")
    open_gate(b)
    assert watched.end() == 0


AGENTS = 200


def test_two_hundred_agents_come_back(
    one: Fleet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
):
    """The agents' own code, all in one process; what is measured is printed."""
    welcomed: dict[int, list[float]] = {number: [] for number in range(AGENTS)}

    async def dial(number: int) -> None:
        state = updater.StateFolder(tmp_path / str(number))
        state.create()
        config = updater.ConfigFile(one.master.config, state)
        nursery = updater.Nursery(state, one.master.config)  # never opened: no orders come
        agent = updater.Agent(state, config, state.machine_id(), os.urandom(16).hex(), nursery)

        async def failed(_: bool) -> None: ...

        def heard(_: str) -> None:
            welcomed[number].append(time.monotonic())

        await updater.Dialer(agent, f"127.0.{1 + number // 100}.{1 + number % 100}", failed, heard).dial_forever()

    async def all_agents() -> None:
        dialing = asyncio.gather(*(dial(number) for number in range(AGENTS)))
        await asyncio.to_thread(over.wait, 300)
        dialing.cancel()
        with suppress(asyncio.CancelledError):
            await dialing

    over = threading.Event()
    monkeypatch.setattr(updater.DaemonLog, "_line", lambda *_: None)
    thread = threading.Thread(target=lambda: asyncio.run(all_agents()))
    thread.start()
    request.addfinalizer(thread.join)
    request.addfinalizer(over.set)
    wait_for(lambda: all(welcomed.values()), "all are welcomed", 120)
    one.kill(one.master)
    one.start(one.master)
    began = time.monotonic()
    wait_for(lambda: all(len(times) > 1 for times in welcomed.values()), "all are back", 120)
    waits = sorted(times[1] - began for times in welcomed.values())
    first, half, last = waits[0], waits[AGENTS // 2], waits[-1]
    print(f"{AGENTS} agents came back {first:.2f} to {last:.2f} s after the master, half within {half:.2f}")
    assert all(len(times) == 2 for times in welcomed.values()), "nobody was dropped again"
    rows = json.loads(one.cli("status", "--json").out)["hosts"]
    assert sum(row["online"] for row in rows) == AGENTS + 3
