"""`trigger` and what belongs to it, as a person or a script uses it: what is printed, answered and recorded."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.commands import (
    COMMAND,
    FOREVER,
    GATED,
    STEP,
    STEPS,
    Watched,
    announced,
    detach,
    job_of,
    lines_of,
    log_of,
    module_fleet,
    open_gate,
    running,
    wait_state,
    write_script,
)
from tests.fleet import PNPM, VERSION, Fleet, Host, need, processes_of, run, wait_for

A, B, C = "127.0.0.1", "127.0.0.2", "127.0.0.3"
RUN_ID = r"[0-9]{8}-[0-9]{6}-[0-9a-f]{4}"
one_fleet = pytest.mark.xdist_group("trigger")  # one worker makes the fleet that most of these tests share


made = module_fleet("trigger", config={"hosts": {C: {"name": "office"}}})


@pytest.fixture
def one(made: Fleet) -> Iterator[Fleet]:
    """Three hosts, A is the master's, with nothing to do and a deployment that succeeds at once."""
    write_script("echo deploying\n", *made.hosts)
    yield made
    open_gate(*made.hosts)
    for name in unfinished(made):
        made.cli("cancel", name)
    wait_for(lambda: not unfinished(made), lambda: f"nothing runs: {unfinished(made)}")


def unfinished(fleet: Fleet) -> set[str]:
    """Runs whose record at the master is not final everywhere."""
    jobs = [json.loads(path.read_text()) for path in fleet.master.state.glob("runs/*/127*.json")]
    return {job["run"] for job in jobs if job["state"] in ("queued", "running")}


# What is printed


@one_fleet
def test_every_line_of_every_host(one: Fleet):
    write_script("echo 안녕; echo oops >&2; exit 3\n", one.hosts[1])
    one.origin.commit({"app.txt": "1"})
    code, out, err = one.cli("trigger", "all", "master")
    assert code == 1
    assert re.search(rf"^estelle-updater: run {RUN_ID}: master on {A}, {B}, {C}$", err, re.M)
    for host in (A, B, C):
        assert announced(out, host) == list(STEPS)
        assert "Fast-forward" in lines_of(out, host)
    assert lines_of(out, A)[-2:] == ["deploying", f"✓ 완료 {VERSION}"]
    assert lines_of(out, B)[-3:] == ["안녕", "oops", f"✗ 실패 {STEP} (exit 3)"]
    streamed, _, table = out.partition("\n\n")
    assert all(re.match(r"\[127\.0\.0\.[123]\] ", line) for line in streamed.splitlines())
    rows = table.splitlines()
    assert len(rows) == 4
    assert [(row.split()[0], row.endswith(("✓ 완료 v0301_4", f"✗ 실패 {STEP} (exit 3)"))) for row in rows[1:]] == [
        (A, True), (B, True), (C, True),
    ]  # fmt: skip


@one_fleet
def test_one_host_gets_no_table(one: Fleet):
    code, out, _ = one.cli("trigger", B, "master")
    assert code == 0
    assert out.splitlines()[-1] == f"[{B}] ✓ 완료 {VERSION}"
    assert len(lines_of(out, B)) == len(out.splitlines())


@one_fleet
def test_events(one: Fleet):
    write_script("printf 'a\\377b\\n\\ntail'; exit 7\n", one.hosts[1])
    answer = one.cli("trigger", f"{A},{B}", "master", "--json")
    assert answer.code == 1
    assert answer.err == ""
    events = [event for event in answer.events if event["event"] != "notice"]
    first, last = events[0], events[-1]
    name = first["run"]
    assert re.fullmatch(RUN_ID, name)
    assert first == first | {
        "event": "run", "target": f"{A},{B}", "branch": "master", "hosts": [A, B], "offline": [],
    }  # fmt: skip
    assert last == {"event": "done", "run": name, "ok": False}
    assert all(event["run"] == name for event in events)
    states = [event for event in events if event["event"] == "state"]
    assert all({"run", "host", "state", "step", "behind"} <= set(event) for event in states)
    assert {"event": "state", "run": name, "host": B, "state": "running", "step": STEP, "behind": None} in states
    # each that is announced has one event, also those that take less time than a word on the wire
    announced = ["git fetch origin", "git checkout master", "git pull origin master", STEP]
    assert [event["step"] for event in states if event["host"] == B and event["step"] in announced] == announced
    lines = [event["line"] for event in events if event["event"] == "log" and event["host"] == B]
    assert lines[-4:] == [f"{STEP}...", "a\ufffdb", "", "tail"]
    results = {event["host"]: event for event in events if event["event"] == "result"}
    head = one.origin.git("rev-parse", "master")
    for host, ok, state, version, step, exit_code in (
        (A, True, "succeeded", VERSION, None, 0),
        (B, False, "failed", None, STEP, 7),
    ):
        size = len(log_of(one, name, one.hosts[0] if host == A else one.hosts[1]))
        assert results[host]["seconds"] > 0
        assert results[host].items() >= {
            "ok": ok, "state": state, "version": version, "commit": head, "step": step, "exit": exit_code,
            "bytes": size,
        }.items()  # fmt: skip
        assert "error" in results[host]
    assert events.index(results[B]) > max(i for i, e in enumerate(events) if e["event"] == "log" and e["host"] == B)
    # the record tells the same story
    recorded = one.cli("logs", name, "--json")
    assert recorded.code == 0
    assert [e for e in recorded.events if e["event"] in ("run", "result", "done")] == [
        first, results[A], results[B], last,
    ]  # fmt: skip
    assert [e["line"] for e in recorded.events if e["event"] == "log" and e["host"] == B] == lines


@one_fleet
def test_a_long_line_comes_in_pieces(one: Fleet):
    write_script("head -c 200000 /dev/zero | tr '\\0' x; echo; echo after\n", one.hosts[1])
    logs = [event for event in one.cli("trigger", B, "master", "--json").events if event["event"] == "log"]
    start = next(i for i, event in enumerate(logs) if event["line"] == f"{STEP}...") + 1
    pieces, after = logs[start:-1], logs[-1]
    assert "".join(event["line"] for event in pieces) == "x" * 200_000
    assert [event.get("more", False) for event in pieces] == [True] * (len(pieces) - 1) + [False]
    assert max(len(event["line"]) for event in pieces) <= 64 << 10
    assert after["line"] == "after"


@one_fleet
def test_a_pipe_gets_every_byte(one: Fleet):
    data = (
        b"\0nul \xff\xfe invalid \xed\xa0\x80\r\n10%\r20%\r\n\x1b[2J\x1b]0;title\x07\x9b31m\n\n[127.0.0.3] forged\nno\r"
    )
    (one.hosts[1].folder / "data").write_bytes(data)
    write_script("cat ../data\n", one.hosts[1])
    watched = Watched(one, "trigger", B, "master")
    assert watched.end() == 0
    prefix = f"[{B}] ".encode()
    expected = prefix + data.replace(b"\n", b"\n" + prefix) + b"\n" + prefix + f"✓ 완료 {VERSION}\n".encode()
    _, announcement, rest = watched.data.partition(f"{STEP}...\n".encode())
    assert announcement
    assert rest == expected


@one_fleet
def test_logs_hold_what_the_commands_wrote(one: Fleet):
    for host in one.hosts:
        # without `=`: one in 200 such texts has a `?pw=` in it by chance, and that is masked
        data = os.urandom(400_000).replace(b"=", b"_").replace(b"\r\n", b"__")
        (host.folder / "data").write_bytes(data)
    write_script("cat ../data\n", *one.hosts)
    watched = Watched(one, "trigger", "all", "master")
    assert watched.end() == 0
    prefixes = {f"[{host.address}] ".encode(): host for host in one.hosts}
    said: dict[str, list[bytes]] = {host.address: [] for host in one.hosts}
    for line in watched.data.split(b"\n"):
        for prefix, host in prefixes.items():
            if line.startswith(prefix):
                said[host.address].append(line.removeprefix(prefix))
    for host in one.hosts:
        data = (host.folder / "data").read_bytes()
        log = log_of(one, watched.run, host)
        assert log.endswith(f"{STEP}...\n".encode() + data)
        assert log.startswith(b"git fetch origin...\n")
        assert log_of(one, watched.run, host, at=host) == log
        result = f"✓ 완료 {VERSION}".encode()
        assert b"\n".join(said[host.address]) == log.removesuffix(b"\n") + b"\n" + result
    assert one.cli("logs", watched.run, C).code == 0


def read_terminal(one: Fleet, *arguments: str, env: dict[str, str] | None = None) -> bytes:
    """What a command writes to a terminal."""
    ours, theirs = pty.openpty()
    process = one.popen(*arguments, stdout=theirs, stderr=subprocess.DEVNULL, env=env)
    os.close(theirs)
    data = b""
    with contextlib.suppress(OSError):  # how Linux says that nobody has the other end any more
        while more := os.read(ours, 65536):
            data += more
    os.close(ours)
    process.wait(20)
    return data.replace(b"\r\n", b"\n")


@one_fleet
def test_a_terminal_gets_text_and_colours_and_nothing_else(one: Fleet):
    data = (
        b"\x1b[31mred\x1b[0m\n10%\r20%\r\n\x1b[2J\x1b[1;1Hhome\n\x1b]0;title\x07titled\n\x1b]8;;http://x\x1b\\link\n"
        b"\x1bcreset\n\x1b[?1049halt\nbell\x07\x08\x08back\n\xc2\x9b2Jcsi\n\x1bP1$qm\x1b\\dcs\nnul\0\x7f\n"
        b"\xe2\x80\xaebidi\n\x1b[A\x1b[Kup\n\x1b(0set\n\xff\nsplit \x1b[\nend\x1b["
    )
    (one.hosts[1].folder / "data").write_bytes(data)
    write_script("cat ../data\n", one.hosts[1])
    shown = read_terminal(one, "trigger", B, "master", "--plain", env={"TERM": "xterm"}).decode()
    assert b"\r" not in shown.encode()
    plain = re.sub(r"\x1b\[[0-9;]*m", "", shown)
    assert not re.findall(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e]", plain)
    said = lines_of(plain, B)
    after = said[said.index(f"{STEP}...") + 1 :]
    assert after[:6] == ["red", "10%", "20%", "home", "titled", "link"]
    assert {"bellback", "csi", "dcs", "nul", "bidi", "up", "set", "\ufffd"} <= set(after)
    assert after[-1] == f"✓ 완료 {VERSION}"
    assert "\x1b[31mred\x1b[0m" in shown
    assert len(said) + 1 == len([line for line in plain.splitlines() if line]), "and how it ended"
    # the record has it all
    assert log_of(one, one.runs()[-1].name, one.hosts[1]).endswith(data)
    for options, env in (((), {"NO_COLOR": "1"}), (("--no-color",), {})):
        write_script("echo plain\n", one.hosts[1])
        assert b"\x1b" not in read_terminal(one, *options, "trigger", B, "master", "--plain", env=env)


@one_fleet
def test_a_program_can_not_fake_a_result(one: Fleet):
    write_script("echo '✓ 완료 v9999_9'; echo 'git fetch origin...'; exit 1\n", one.hosts[1])
    code, out, _ = one.cli("trigger", B, "master")
    assert code == 1
    assert lines_of(out, B)[-1] == f"✗ 실패 {STEP} (exit 1)"


# Watching


@one_fleet
def test_detach_then_follow(one: Fleet):
    write_script(GATED, *one.hosts)
    code, out, err = one.cli("trigger", "all", "master", "--detach")
    assert (code, err) == (0, "")
    assert re.fullmatch(RUN_ID + "\n", out)
    watched = Watched(one, "logs", out.strip(), "-f")
    for host in (A, B, C):
        watched.until(f"[{host}] begun")
    assert one.cli("logs", out.strip(), B).code == 0  # without -f it prints what there is
    assert f"[{B}] begun\n" in one.cli("logs", out.strip(), B).out
    open_gate(*one.hosts)
    assert watched.end() == 0
    for host in (A, B, C):
        assert announced(watched.out, host) == list(STEPS)
        assert lines_of(watched.out, host)[-3:] == ["begun", "ended", f"✓ 완료 {VERSION}"]
    only = one.cli("logs", out.strip(), "office")
    assert only.code == 0
    assert {line.split()[0] for line in only.out.splitlines()} == {f"[{C}]"}


@one_fleet
def test_detach_answers_json(one: Fleet):
    code, out, _ = one.cli("--json", "trigger", "--detach", B, "master")
    event = json.loads(out)
    assert (code, event["event"], event["hosts"]) == (0, "run", [B])
    wait_state(one, event["run"], B, "succeeded")


@one_fleet
@pytest.mark.parametrize("options", [(), ("--json",)])
def test_ctrl_c_stops_watching_only(one: Fleet, options: Sequence[str]):
    write_script(GATED, *one.hosts)
    watched = Watched(one, "trigger", "all", "master", *options)
    watched.until(lambda: watched.out.count("begun") == 3)
    watched.interrupt()
    assert watched.end() == 130
    assert f"logs {watched.run} -f" in watched.err
    assert f"cancel {watched.run}" in watched.err
    assert "Traceback" not in watched.err
    if options:
        assert json.loads(watched.err.splitlines()[-1])["event"] == "notice"
    follower = Watched(one, "logs", watched.run, "-f")
    open_gate(*one.hosts)
    assert follower.end() == 0
    assert [lines_of(follower.out, host)[-1] for host in (A, B, C)] == [f"✓ 완료 {VERSION}"] * 3


@one_fleet
@pytest.mark.parametrize("options", [(), ("--json",)])
def test_a_closed_stdout_stops_watching_only(one: Fleet, options: Sequence[str]):
    write_script(GATED, one.hosts[1])
    read, write = os.pipe()
    errors = one.tmp_path / "closed.err"
    with errors.open("wb") as file:
        process = one.popen("trigger", B, "master", *options, stdout=write, stderr=file)
    os.close(write)
    assert os.read(read, 10)
    os.close(read)  # as `| head -1` does
    name = wait_for(lambda: one.runs()[-1].name if len(one.runs()) else "", "the run exists")
    log = one.master.state / "runs" / name / f"{B}.log"
    wait_for(lambda: log.exists() and b"begun" in log.read_bytes(), "the deployment began")
    open_gate(one.hosts[1])
    assert process.wait(30) == 130
    assert f"logs {name} -f" in errors.read_text()
    assert "Traceback" not in errors.read_text()
    assert one.cli("logs", name, "-f").code == 0


@one_fleet
@pytest.mark.parametrize("words", [("status",), ("history",), ("--help",), ("logs", "RUN")])
def test_a_closed_stdout_makes_no_noise(one: Fleet, words: Sequence[str]):
    words = [one.runs()[-1].name if word == "RUN" and one.runs() else word for word in words]
    read, write = os.pipe()
    os.close(read)
    process = one.popen(*words, stdout=write, stderr=subprocess.PIPE)
    os.close(write)
    err = process.communicate(timeout=30)[1].decode()
    assert "Traceback" not in err
    assert "Exception" not in err


# Targets


@one_fleet
@pytest.mark.parametrize(
    ("target", "hosts"),
    [
        ("all", [A, B, C]),
        (B, [B]),
        ("127.0.0.2/31", [B, C]),
        ("office", [C]),
        (f"{C}/office", [C]),
        (f"{C},{A}", [A, C]),
        (f"office, {C},{B}", [B, C]),
        ("::ffff:127.0.0.2", [B]),
    ],
)  # fmt: skip
def test_targets(one: Fleet, target: str, hosts: list[str]):
    code, out, err = one.cli("trigger", target, "master", "--detach", "--json")
    assert code == 0, err
    event = json.loads(out)
    assert sorted(event["hosts"]) == hosts
    for host in hosts:
        wait_state(one, event["run"], host, "succeeded")


@one_fleet
@pytest.mark.parametrize(
    "target", ["9.9.9.9", "10.0.0.0/8", "nobody", "a b", "-", f"{B}/nobody", f"{A}/office", f"{B},nobody"]
)
def test_unknown_target(one: Fleet, target: str):
    runs = len(one.runs())
    code, out, err = one.cli("trigger", target, "master")
    assert (code, out) == (4, "")
    what, hint = err.splitlines()
    assert what.startswith("estelle-updater: error: ")
    assert hint.startswith("hint: ")
    assert target.split(",")[-1] in what
    assert len(one.runs()) == runs


@one_fleet
@pytest.mark.parametrize("target", ["121.x.x.x", "", ",", "127.0.0.999", "127.0.0.2/99"])
def test_no_target_at_all(one: Fleet, target: str):
    code, out, err = one.cli("trigger", target, "master")
    assert (code, out) == (2, "")
    assert len(err.splitlines()) == 2
    if target == "121.x.x.x":
        assert "no address" in err
        assert "write 121.0.0.7, or a network such as 121.0.0.0/24" in err


@one_fleet
def test_from_an_agents_host(one: Fleet):
    """A command on an agent's host is a commander of its own; the agent stays."""
    code, out, _ = one.cli("trigger", f"{A},{B}", "master", host=one.hosts[1])
    assert code == 0
    assert lines_of(out, A)[-1] == lines_of(out, B)[-1] == f"✓ 완료 {VERSION}"
    assert one.hosts[1].process and one.hosts[1].process.poll() is None
    assert "offline" not in one.master.stderr


# What can be deployed


@one_fleet
def test_refs(one: Fleet):
    origin, host = one.origin, one.hosts[1]
    try:
        config = origin.commit({"f.txt": "config"}, branch="config")  # a folder has this name too
        twin = origin.commit({"f.txt": "twin"}, branch="twin/한글")
        origin.commit({}, branch="other")
        tagged = origin.commit({"f.txt": "tagged"}, branch="other")
        origin.commit({"f.txt": "after"}, branch="other")
        origin.tag("v1.0", tagged)
        origin.tag("config", tagged)  # and a tag: the branch wins
        head = origin.git("rev-parse", "master")
        for branch, commit in (
            ("config", config), ("twin/한글", twin), ("v1.0", tagged), (head, head), ("config", config),
            (tagged, tagged), ("master", head),
        ):  # fmt: skip
            code, out, _ = one.cli("trigger", B, branch)
            assert code == 0, out
            assert announced(out, B) == [
                "git fetch origin...", f"git checkout {branch}...", f"git pull origin {branch}...", f"{STEP}...",
            ]  # fmt: skip
            assert origin.git("rev-parse", "HEAD", cwd=host.repo) == commit
        # a tag that moved
        moved = origin.commit({"f.txt": "moved"}, branch="other")
        origin.git("tag", "--force", "v1.0", moved)
        origin.git("push", "--quiet", "--force", "origin", "refs/tags/v1.0")
        assert one.cli("trigger", B, "v1.0").code == 0
        assert origin.git("rev-parse", "HEAD", cwd=host.repo) == moved
        # a branch that became a folder of branches
        origin.git("push", "--quiet", "origin", "--delete", "other")
        origin.git("push", "--quiet", "origin", f"{moved}:refs/heads/other/deeper")
        code, out, _ = one.cli("trigger", B, "other/deeper")
        assert code == 0, out
    finally:
        origin.commit({})
        assert one.cli("trigger", "all", "master").code == 0


@one_fleet
def test_what_git_says_is_explained(one: Fleet):
    origin, host = one.origin, one.hosts[1]
    code, out, _ = one.cli("trigger", B, "no-such-branch")
    assert code == 1
    assert lines_of(out, B)[-1] == "✗ 실패 git checkout no-such-branch (exit 128)"
    # a local change in the way
    origin.commit({"tracked.txt": "1"})
    assert one.cli("trigger", "all", "master").code == 0
    origin.commit({"tracked.txt": "2"})
    (host.repo / "tracked.txt").write_text("local")
    answer = one.cli("trigger", B, "master", "--json")
    assert answer.code == 1
    result = next(event for event in answer.events if event["event"] == "result")
    assert (result["step"], result["state"]) == ("git pull origin master", "failed")
    assert "local changes" in result["error"]
    assert any("tracked.txt" in event["line"] for event in answer.events if event["event"] == "log")
    # one that is not in the way is a warning
    origin.git("checkout", "--", "tracked.txt", cwd=host.repo)
    assert one.cli("trigger", B, "master").code == 0
    (host.repo / "tracked.txt").write_text("local")
    code, out, _ = one.cli("trigger", B, "master")
    assert code == 0
    assert any("tracked.txt" in line and "warning" in line for line in lines_of(out, B))
    wait_for(lambda: json.loads(one.cli("status", "--json").out)["hosts"][1]["dirty"] is True, "changes are seen")
    origin.git("checkout", "--", "tracked.txt", cwd=host.repo)
    # a force-pushed branch
    origin.git("commit", "--quiet", "--amend", "--allow-empty", "--message", "rewritten")
    origin.git("push", "--quiet", "--force", "origin", "master")
    answer = one.cli("trigger", B, "master", "--json")
    result = next(event for event in answer.events if event["event"] == "result")
    assert (answer.code, result["step"]) == (1, "git pull origin master")
    assert "fast-forward" in result["error"] or "commits that the remote has not" in result["error"]
    origin.git("fetch", "--quiet", cwd=host.repo)
    origin.git("reset", "--quiet", "--hard", "origin/master", cwd=host.repo)
    assert one.cli("trigger", "all", "master").code == 0


# Offline hosts


@one_fleet
def test_offline_hosts(one: Fleet):
    away = one.hosts[2]
    one.stop(away)
    wait_for(lambda: f"agent {C} is offline" in one.master.stderr, "the master notices")
    try:
        code, out, err = one.cli("trigger", C, "master")
        assert (code, out) == (4, "")
        assert "--wait" in err.splitlines()[1]
        code, out, _ = one.cli("trigger", "all", "master")
        assert code == 1
        assert lines_of(out, C) == ["✗ 오프라인"]
        assert lines_of(out, B)[-1] == f"✓ 완료 {VERSION}"
        answer = one.cli("trigger", f"{B},{C}", "master", "--wait", "1", "--json")
        assert answer.code == 1
        assert next(event for event in answer.events if event["event"] == "run")["offline"] == [C]
        result = next(event for event in answer.events if event["event"] == "result" and event["host"] == C)
        assert (result["state"], result["ok"], result["exit"]) == ("offline", False, None)
        watched = Watched(one, "trigger", f"{B},{C}", "master", "--wait", "60")
        watched.until(f"[{B}] ✓ 완료")
        one.start(away)
        assert watched.end() == 0
        assert lines_of(watched.out, C)[-1] == f"✓ 완료 {VERSION}"
    finally:
        if away.process and away.process.poll() is not None:
            one.start(away)


# Cancel, queue


@one_fleet
def test_cancel_kills_the_tree_on_every_host(one: Fleet):
    stubborn = "trap '' INT TERM HUP\n"
    leaf = "import os, time; os.setsid(); open('../leaf', 'w').write(str(os.getpid())); time.sleep(86400)"
    text = "rm -f ../leaf\nsleep 86401 &\n(sh -c \"trap '' INT TERM; sleep 86402; sleep 86403\") &\n"
    write_script(f'{text}{stubborn}python3 -c "{leaf}" &\necho begun\nwait\nsleep 86404\n', *one.hosts)
    watched = Watched(one, "trigger", "all", "master")
    watched.until(lambda: watched.out.count("begun") == 3 and all((h.folder / "leaf").exists() for h in one.hosts))
    name = watched.run
    code, out, err = one.cli("cancel", name)
    assert code == 0, err
    assert name in out
    assert watched.end() == 1
    for host in one.hosts:
        assert lines_of(watched.out, host.address)[-1] == "✗ 취소"
        assert re.search(rf"^estelle-updater: {host.address}: cancelled by \S+@{A}$", watched.err, re.MULTILINE)
        left = {p: c for p, c in processes_of(host.folder).items() if "sleep" in c or "setsid" in c}
        assert not left
    assert one.cli("cancel", name).code == 0  # once more: nothing to stop


@one_fleet
def test_what_is_cancelled_may_clean_up(one: Fleet):
    """Its leader goes at once; a child takes longer than its output is waited for, another has left the group."""
    b = one.hosts[1]
    slow = r"trap 'sleep 2; touch ../\$0; exit' TERM; touch ../\$0.up; while :; do sleep 0.1; done"
    write_script(f'rm -f ../near* ../far*\nsh -c "{slow}" near &\nsetsid sh -c "{slow}" far &\nsleep 86408\n', b)
    watched = Watched(one, "trigger", B, "master")
    watched.until(lambda: all((b.folder / name).exists() for name in ("near.up", "far.up")))
    assert one.cli("cancel", watched.run).code == 0
    assert watched.end() == 1
    assert lines_of(watched.out, B)[-1] == "✗ 취소"
    assert all((b.folder / name).exists() for name in ("near", "far"))


@one_fleet
def test_cancel_of_nothing(one: Fleet):
    code, out, err = one.cli("cancel", "20200101-000000-0000")
    assert (code, out, len(err.splitlines())) == (4, "", 2)
    name = detach(one, B)
    wait_state(one, name, B, "succeeded")
    code, out, _ = one.cli("cancel", name)
    assert code == 0
    assert "cancelling" not in out  # it is over: nothing is being cancelled
    assert job_of(one, name, B)["state"] == "succeeded"


@one_fleet
def test_queue(one: Fleet):
    write_script(GATED, *one.hosts)
    one.origin.commit({}, branch="hotfix")
    one.origin.git("switch", "--quiet", "master")
    first = Watched(one, "trigger", "all", "master", "--json")
    first.until(lambda: first.out.count("begun") == 3)
    second = Watched(one, "trigger", f"{A},{B}", "master", "--json")

    def behind(watched: Watched, host: str, of: Watched) -> bool:
        waits = {"event": "state", "run": watched.run, "host": host, "state": "queued", "step": None, "behind": of.run}
        return waits in watched.events

    second.until(lambda: behind(second, A, first) and behind(second, B, first))
    hotfix = Watched(one, "trigger", B, "hotfix", "--json")
    hotfix.until(lambda: behind(hotfix, B, first))
    row = json.loads(one.cli("status", "--json").out)["hosts"][1]
    assert (row["running"], row["queued"]) == (first.run, [second.run, hotfix.run])
    third = Watched(one, "trigger", B, "master", "--json")  # replaces what waits on B, and nothing else
    third.until(lambda: behind(third, B, first))
    ended = second.until(lambda: [e for e in second.events if e["event"] == "result"])[0]
    assert (ended["host"], ended["state"], ended["ok"]) == (B, "cancelled", False)
    assert ended["error"] == f"replaced by {third.run}"
    code, _, _ = one.cli("cancel", hotfix.run)
    assert code == 0
    assert hotfix.end() == 1  # at once, without waiting for the host
    open_gate(*one.hosts)
    assert [first.end(), second.end(), third.end()] == [0, 1, 0]
    result = next(e for e in second.events if e["event"] == "result" and e["host"] == A)
    assert result["state"] == "succeeded"
    folders = {folder.name: folder for folder in one.runs()}
    begun, ended = (json.loads((folders[watched.run] / f"{B}.json").read_text()) for watched in (third, first))
    assert ended["ended"] <= begun["started"]


@one_fleet
def test_batches(one: Fleet):
    write_script(GATED, *one.hosts)
    watched = Watched(one, "trigger", "all", "master", "--batch", "1", "--json")
    for index, host in enumerate(one.hosts):
        watched.until(f'"host": "{host.address}", "line": "begun"')
        assert watched.out.count('"begun"') == index + 1
        assert watched.out.count('"event": "result"') == index
        open_gate(host)
    assert watched.end() == 0
    write_script("exit 9\n", one.hosts[1])
    write_script("echo ok\n", one.hosts[0], one.hosts[2])
    watched = Watched(one, "trigger", "all", "master", "--batch", "1", "--json")
    assert watched.end() == 1
    states = {event["host"]: event["state"] for event in watched.events if event["event"] == "result"}
    assert states == {A: "succeeded", B: "failed", C: "cancelled"}


# Who is who


@one_fleet
def test_submitting_twice_is_one_run(one: Fleet):
    from websockets.sync.client import connect

    hello = {
        "verb": "hello", "role": "commander", "protocol": [1, 9], "version": "9.9", "machine": "", "name": "test",
        "nonce": "", "hobby": "unknown fields are ignored",
    }  # fmt: skip
    submit = {
        "verb": "submit", "run": "20260101-000000-abcd", "nonce": "11" * 16, "kind": "deploy", "target": B,
        "branch": "master",
    }  # fmt: skip

    def talk(*messages: dict[str, Any]) -> list[dict[str, Any]]:
        with connect(one.url, source_address=(A, 0), proxy=None, compression=None) as socket:
            socket.send(json.dumps(hello))
            assert json.loads(socket.recv(10))["verb"] == "welcome"
            answers = []
            for message in messages:
                socket.send(json.dumps(message))
                answers.append(json.loads(socket.recv(10)))
            return answers

    first, again = talk(submit, submit)
    (later,) = talk(submit)
    assert first == again == later
    assert (first["verb"], first["hosts"]) == ("run", [B])
    assert first["run"] != submit["run"], "the id's time is not now: it would stand among old runs"
    (taken,) = talk(submit | {"run": first["run"], "nonce": "22" * 16})
    assert taken["verb"] == "refuse"
    assert "taken" in taken["what"]
    for wrong in ({"branch": "--upload-pack=x"}, {"branch": "a..b"}, {"run": "../../evil"}, {"kind": "shell"}):
        with contextlib.suppress(Exception):  # or the connection ends
            (answer,) = talk(submit | {"run": "20260101-000000-abce"} | wrong)
            assert answer["verb"] == "refuse"
    wait_state(one, first["run"], B, "succeeded")
    assert not list(one.master.state.glob("runs/20260101-000000-*"))
    assert one.cli("status").code == 0


@one_fleet
def test_one_daemon_per_state_folder(one: Fleet):
    taken = one.hosts[1]
    options = ("--bind", "127.0.0.9", "--state", str(taken.state), "--config", str(taken.config))
    code, _, err = run([*one.program, "serve", *options], one.env, taken.repo)
    assert code == 2
    what, hint = [line for line in err.splitlines() if line.startswith(("estelle-updater: error", "hint"))]
    assert str(one.hosts[1].state) in what
    assert f"pid {one.hosts[1].process.pid}" in what  # type: ignore[union-attr]
    assert "--state" in hint
    assert one.cli("trigger", B, "master").code == 0


@one_fleet
def test_a_cloned_machine_id_is_refused(one: Fleet, tmp_path: Path):
    clone = Host("127.0.0.3", tmp_path)
    one.origin.clone(clone.repo)
    clone.state.mkdir()
    shutil.copy(one.hosts[1].state / "machine-id", clone.state)
    try:
        one.spawn(clone)
        wait_for(lambda: "delete machine-id" in clone.stderr, lambda: f"it is told the fix\n{clone.stderr}")
        assert "this machine id belongs to another host, and its key was not proven" in clone.stderr
        impostor = f"{clone.address} showed the machine id of {B} without its key: it was refused"
        assert impostor in one.master.stderr
        assert impostor.removesuffix(": it was refused") in one.cli("status").out, "the page and status tell it too"
        code, out, _ = one.cli("trigger", B, "master")
        assert code == 0, out
        assert one.hosts[1].stderr.count("welcomed") == 1
    finally:
        one.stop(clone)
        with contextlib.suppress(OSError):
            print(clone.stderr)


# Fleets of their own


def named(name: str) -> tuple[str, ...]:
    """What to put before a command so that it sees another host name."""
    need("unshare")
    if os.geteuid() != 0:
        pytest.skip("only root can give a process a host name of its own")
    return ("unshare", "--uts", "sh", "-c", f'hostname {name} && exec "$@"', "sh")


def test_hosts_behind_one_address(fleet: Callable[..., Fleet], tmp_path: Path):
    made = fleet(hosts=2, command=COMMAND, start=False)
    more = []
    for index, name in enumerate(("twin", "twin", "solo")):
        host = Host(B, tmp_path / f"more{index}", named(name))
        made.origin.clone(host.repo)
        more.append(host)
    made.agents[0].prefix = named("first")
    write_script("hostname\n", *made.hosts, *more)
    made.start(*made.hosts, *more)
    try:
        rows = {row["host"]: row for row in json.loads(made.cli("status", "--json").out)["hosts"]}
        ids = [(host.state / "machine-id").read_text().strip() for host in more[:2]]
        assert set(rows) == {A, f"{B}/first", f"{B}/solo", *rows.keys() & {r for r in rows if "~" in r}}
        twins = [label for label in rows if label.startswith(f"{B}/twin~")]
        assert len(twins) == 2
        assert all(any(machine.startswith(label.partition("~")[2]) for machine in ids) for label in twins)
        code, out, _ = made.cli("trigger", "all", "master")
        assert code == 0, out
        for label, name in ((f"{B}/first", "first"), (f"{B}/solo", "solo"), *((twin, "twin") for twin in twins)):
            assert lines_of(out, label)[-2:] == [name, f"✓ 완료 {VERSION}"]
        folder = made.runs()[-1]
        assert {path.name for path in folder.glob("*.log")} == {
            re.sub(r"[^A-Za-z0-9._-]", "_", label) + ".log" for label in rows
        }
        for target, labels in (
            (B, {label for label in rows if label != A}), (f"solo,{B}/First", {f"{B}/solo", f"{B}/first"}),
            (twins[0], {twins[0]}),
        ):  # fmt: skip
            _, out, err = made.cli("trigger", target, "master", "--detach", "--json")
            assert set(json.loads(out or "{}").get("hosts", [])) == labels, err
        code, out, err = made.cli("trigger", f"solo,{B}/twin", "master")
        assert (code, out) == (4, "") and "fits 2 machines: " in err and all(twin in err for twin in twins), err
    finally:
        for host in more:
            made.stop(host)


def test_settings_of_single_hosts(fleet: Callable[..., Fleet], tmp_path: Path):
    say = ["sh", "-c", 'echo "$GREETING|$FROM_FILE|$SECRET|$PWD"', "ignored"]
    hosts: dict[str, Any] = {
        B: {
            "name": "office", "repo": str(tmp_path / "elsewhere"), "command": say, "env": {"GREETING": "안녕 a=b"},
            "environmentFile": "config/environments.office.json",
        },
        C: {"command": [*say[:3]], "environmentFile": "config/environments.env", "env": {"FROM_FILE": "env wins"}},
    }  # fmt: skip
    made = fleet(command=COMMAND, config={"hosts": hosts}, start=False)
    made.origin.commit(
        {
            "config/environments.office.json": json.dumps({"FROM_FILE": "json", "SECRET": "correct horse"}),
            "config/environments.env": "# comment\n\nFROM_FILE=file\nexport GREETING='two words'\nSECRET=x=y\n",
        }
    )
    made.origin.clone(tmp_path / "elsewhere")
    write_script("env\n", made.master)
    made.env["ESTELLE_TOKEN"] = "t" * 32
    poison = {"pm_id": "1", "PM2_HOME": "/kept", "NODE_APP_INSTANCE": "0", "GIT_DIR": "/nowhere"}
    made.start(env=poison | {"PYTHONPATH": "", "NOTIFY_SOCKET": "/x", "INVOCATION_ID": "x", "KEPT": "yes"})
    code, out, _ = made.cli("trigger", "all", "master")
    assert code == 0, out
    assert lines_of(out, B)[-2] == f"안녕 a=b|json|***|{tmp_path / 'elsewhere'}"
    assert lines_of(out, C)[-2] == f"two words|env wins|x=y|{made.hosts[2].repo}"
    assert f"{' '.join(say)}..." in lines_of(out, B)
    seen = dict(line.split("=", 1) for line in lines_of(out, A) if re.match(r"\w+=", line))
    assert not {name for name in seen if re.match(r"ESTELLE_(?!RUN)|pm_|GIT_DIR|NODE_APP|NOTIFY|INVOC", name)}
    assert seen.items() >= {"PM2_HOME": "/kept", "KEPT": "yes", "CI": "true", "GIT_TERMINAL_PROMPT": "0"}.items()
    # the file is read after the pull: these settings arrive with the very commit that they are for
    settings = json.loads(made.master.config.read_text())
    settings["deploy"]["version"] = "VERSION"
    settings["hosts"][C]["command"] = ["echo", "new v0102_3", "v0102_4", "v01234_5"]
    made.origin.commit({"config/updater.json": json.dumps(settings), "VERSION": "plain 1.2\nsecond"}, branch="plain")
    code, out, _ = made.cli("trigger", C, "plain")
    assert (code, lines_of(out, C)[-2:]) == (0, ["new v0102_3 v0102_4 v01234_5", "✓ 완료 plain 1.2"])
    made.origin.commit({"config/updater.json": json.dumps(settings)}, branch="bare")
    code, out, _ = made.cli("trigger", f"{A},{C}", "bare")
    described = made.origin.git("describe", "--always", "bare")
    assert (code, lines_of(out, C)[-1], lines_of(out, A)[-1]) == (0, "✓ 완료 v0102_4", f"✓ 완료 {described}")
    # and where they are wrong or gone, nothing runs, and the next commit can repair them
    made.origin.commit({"config/updater.json": json.dumps(settings | {"masterUrl": 7})}, branch="wrong")
    made.origin.commit({"config/updater.json": None}, branch="gone")
    for branch, word in (("wrong", "masterUrl"), ("gone", "updater.json")):
        code, out, _ = made.cli("trigger", C, branch)
        assert code == 1
        assert lines_of(out, C)[-1] == "✗ 실패 config"
        assert any("error" in line and word in line for line in lines_of(out, C))
        assert "new v0102_3 v0102_4 v01234_5" not in lines_of(out, C)
    assert made.cli("trigger", C, "bare").code == 0


@pytest.mark.parametrize("healthy", [True, False])
def test_units_are_restarted_and_looked_at(fleet: Callable[..., Fleet], tmp_path: Path, healthy: bool):
    deploy = {"command": list(COMMAND), "restart": ["web", "engine"]}
    made = fleet(hosts=1, config={"deploy": deploy}, start=False)
    fake = tmp_path / "bin" / "systemctl"
    fake.parent.mkdir()
    fake.write_text(f'#!/bin/sh\necho "[$*]"\ncase "$*" in "is-active engine") exit {0 if healthy else 3};; esac\n')
    fake.chmod(0o755)
    write_script("printf unfinished\n", made.master)
    made.start(env={"PATH": f"{fake.parent}:{os.environ['PATH']}"})
    code, out, _ = made.cli("trigger", "all", "master")
    said = lines_of(out, A)
    at = said.index("unfinished")
    assert said[at + 1 : at + 3] == ["systemctl restart web engine...", "[restart web engine]"]
    assert "[is-active web]" in said and "[is-active engine]" in said  # asked about both at once, it wants only one
    if healthy:
        assert (code, said[-1]) == (0, f"✓ 완료 {VERSION}")
    else:
        assert code == 1
        assert re.fullmatch(r"✗ 실패 systemctl is-active engine \(exit 3\)", said[-1])


def test_step_timeout(fleet: Callable[..., Fleet]):
    made = fleet(hosts=2, config={"deploy": {"command": list(COMMAND), "timeout": 5}})
    write_script(FOREVER, made.agents[0])
    write_script("echo quick\n", made.master)
    code, out, _ = made.cli("trigger", "all", "master")
    assert code == 1
    assert lines_of(out, B)[-1] == f"✗ 시간 초과 {STEP}"
    assert lines_of(out, A)[-1] == f"✓ 완료 {VERSION}"
    assert not [c for c in processes_of(made.agents[0].folder).values() if "sleep" in c]


def test_real_pnpm(fleet: Callable[..., Fleet]):
    made = fleet(hosts=1, command=PNPM)
    made.origin.commit({"deploy.sh": "echo built by $npm_lifecycle_event; echo v0302_1\n", "config/version.json": None})
    code, out, _ = made.cli("trigger", "all", "master")
    assert code == 0, out
    assert "pnpm deploy:release..." in lines_of(out, A)
    assert "built by deploy:release" in lines_of(out, A)
    assert lines_of(out, A)[-1] == "✓ 완료 v0302_1"
    made.origin.commit({"deploy.sh": "exit 7\n"})
    code, out, _ = made.cli("trigger", "all", "master")
    assert (code, lines_of(out, A)[-1]) == (1, "✗ 실패 pnpm deploy:release (exit 7)")


def test_a_grandchild_that_keeps_the_pipe_delays_nothing(fleet: Callable[..., Fleet]):
    """A deployment that leaves a service running is over when its command is."""
    made = fleet(hosts=1, command=COMMAND)
    write_script("sleep 86400 &\necho started $!\n", made.master)
    code, out, _ = made.cli("trigger", "all", "master", timeout_s=30)
    assert code == 0
    pid = int(next(line for line in lines_of(out, A) if line.startswith("started")).split()[1])
    assert running(pid)  # and it was not killed: it is what was deployed


def test_the_port(fleet: Callable[..., Fleet]):
    """403 before anything else, 404 on other paths, 426 (or the page, once there is one) on its own."""
    made = fleet(hosts=1, command=COMMAND)
    base = f"http://{A}:{made.port}"
    need("curl")
    curl = ["curl", "--silent", "--interface", A, "--output", os.devnull, "--write-out", "%{http_code}", "-m", "10"]
    upgrade = [
        "-H", "Connection: Upgrade", "-H", "Upgrade: websocket", "-H", "Sec-WebSocket-Version: 13",
        "-H", "Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==",
    ]  # fmt: skip
    for words, status in (
        ([f"{base}/nothing"], "404"),
        ([f"{base}/"], "426"),
        ([*upgrade, "-H", "Origin: http://evil.example", f"{base}/"], "403"),
        ([*upgrade, "-H", "Host: evil.example", f"{base}/"], "403"),
        (["-H", "Host: evil.example", f"{base}/nothing"], "403"),
        (["--interface", "127.0.0.9", f"{base}/"], "403"),
    ):
        assert run([*curl, *words], made.env).out in (status, "200" if status == "426" else status), words


SYSTEMCTL = """#!/bin/sh
[ "$1" = --user ] && shift
echo "$*" >>"$0.log"
case "$1 $2" in
"show dying") # up at the first look, another life at every later one
    echo LoadState=loaded; echo ActiveState=active; echo InvocationID=$(wc -l <"$0.log")
    cut -d' ' -f1 /proc/uptime | sed 's/\\.//; s/$/0000/; s/^/ActiveEnterTimestampMonotonic=/' ;;
"show "*) echo LoadState=loaded; echo ActiveState=active; echo InvocationID=1; echo ActiveEnterTimestampMonotonic=1 ;;
esac
"""


def test_a_service_must_stay_up_in_one_life(fleet: Callable[..., Fleet], tmp_path: Path):
    """A unit that dies and is started again reads `active` at every second look; and one service alone."""
    deploy = {"command": list(COMMAND), "restart": ["web", "user:dying"], "settle": 1}
    made = fleet(hosts=1, config={"deploy": deploy}, start=False)
    fake = tmp_path / "bin" / "systemctl"
    fake.parent.mkdir()
    fake.write_text(SYSTEMCTL)
    fake.chmod(0o755)
    write_script("true\n", made.master)
    made.start(env={"PATH": f"{fake.parent}:{os.environ['PATH']}"})
    code, out, err = made.cli("trigger", "all", "master")
    said = lines_of(out, A)
    assert code == 1 and "systemctl --user restart dying..." in said, out + err
    assert said[-1].startswith("✗ 실패 restart user:dying"), out
    assert "it was started again within 1 s" in out + err
    fake.with_name("systemctl.log").unlink()
    code, out, err = made.cli("trigger", "all", "master", "--only", "web")
    assert code == 0, out + err
    asked = fake.with_name("systemctl.log").read_text()
    assert "restart web" in asked and "dying" not in asked
    code, out, err = made.cli("trigger", "all", "master", "--only", "nobody")
    assert code == 2 and "nobody is not in deploy.restart" in err and "web, user:dying" in err
