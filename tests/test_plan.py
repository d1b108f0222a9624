"""`plan` says beforehand what a deployment would find, and changes nothing; `rollback` goes back to what worked."""

from __future__ import annotations

import json
import os
import pty
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, strategies as st

from tests import seam as est
from tests.commands import GATED, Watched, detach, open_gate, wait_state, write_script
from tests.fleet import Fleet, Host, wait_for

MakeFleet = Callable[..., Fleet]
COMMAND = ("sh", "../script")


def plan(fleet: Fleet, target: str, branch: str, code: int = 0) -> dict[str, dict[str, Any]]:
    """Each host's row."""
    answer = fleet.cli("plan", target, branch, "--json")
    assert answer.code == code, answer.out + answer.err
    return {row["host"]: row for row in json.loads(answer.out)["hosts"]}


def photograph(repo: Path) -> dict[str, bytes]:
    """Every file of a clone but git's objects: working tree, index, refs, FETCH_HEAD."""
    files = (path for path in repo.rglob("*") if path.is_file() and "objects" not in path.parts)
    return {str(path): path.read_bytes() for path in files}


def head(fleet: Fleet, host: Host) -> str:
    return fleet.origin.git("rev-parse", "HEAD", cwd=host.repo)


def test_plan_tells_what_would_arrive_and_what_is_in_the_way(fleet: MakeFleet) -> None:
    one = fleet(hosts=4, command=COMMAND, config={"deploy": {"command": list(COMMAND), "restart": ["app.service"]}})
    write_script("echo ok\n", *one.hosts)
    clean, dirty, diverged, gone = one.hosts
    first = head(one, clean)
    one.origin.git("branch", "other")
    one.origin.git("push", "--quiet", "origin", "other")
    one.origin.commit({"app.txt": "1", "pnpm-lock.yaml": "1"}, message="Add the app")
    second = one.origin.commit({"deploy.sh": "echo 2\n", "new.txt": "x"}, message="Say two")
    (dirty.repo / "deploy.sh").write_text("local\n")
    (dirty.repo / "package.json").write_text("{}")
    (dirty.repo / "new.txt").write_text("untracked\n")
    one.origin.git("-c", "user.name=x", "commit", "--quiet", "--allow-empty", "-m", "own", cwd=diverged.repo)
    one.stop(gone)
    before = [photograph(host.repo) for host in one.hosts]
    wait_for(lambda: not next(r for r in status(one) if r["host"] == gone.address)["online"], "the agent is gone")

    rows = plan(one, "all", "master", code=1)
    row = rows[clean.address]
    assert (row["current"], row["target"], row["commits"], row["leaving"]) == (first, second, 2, 0)
    assert [subject.split(" ", 1)[1] for subject in row["subjects"]] == ["Say two", "Add the app"]
    assert row["changed"] == ["app.txt", "deploy.sh", "new.txt", "pnpm-lock.yaml"] and row["lock_file"]
    assert row["restart"] == ["app.service"] and row["command"] == "sh ../script"
    assert not row["refused"] and not row["in_the_way"] and row["busy"] is None and row["disk_free_bytes"] > 0
    assert row["branch"] == "master" and row["expected_s"] is None and not row["diverged"]
    assert rows[dirty.address]["dirty"] == ["deploy.sh", "package.json"]
    assert rows[dirty.address]["in_the_way"] == ["deploy.sh", "new.txt"]
    assert rows[diverged.address]["diverged"] and "1 commit that the remote has not" in str(rows[diverged.address])
    assert rows[gone.address]["refused"] == ["the host is offline"]
    text = one.cli("plan", "all", "master").out
    assert f"{first[:7]} → {second[:7]}" in text and "✗ refused: local changes are in the way" in text

    assert plan(one, clean.address, "other")[clean.address]["commits"] == 0
    one.origin.git("tag", "--annotate", "--message=x", "v1", first)
    one.origin.git("push", "--quiet", "origin", "v1")
    for name, commit in ((second, second), (first, first), ("v1", first)):
        assert plan(one, clean.address, name)[clean.address]["target"] == commit
    missing = plan(one, clean.address, "no-such", code=1)[clean.address]
    assert "no such branch, tag or commit" in missing["refused"][0] and missing["target"] is None
    assert plan(one, clean.address, "0" * 40, code=1)[clean.address]["refused"]
    assert [photograph(host.repo) for host in one.hosts] == before, "nothing was changed"
    assert one.cli("plan", "nobody", "master").code == 4
    assert one.cli("plan", gone.address, "master").code == 4
    assert one.cli("plan", "all", "--", "-x").code == 2


def status(fleet: Fleet) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads(fleet.cli("status", "--json").out)["hosts"]
    return rows


def test_what_git_would_refuse_is_what_the_plan_says(fleet: MakeFleet) -> None:
    """The prophecy and the deed: for each state of a clone, plan's verdict is that of the deployment."""
    one = fleet(hosts=1, command=COMMAND)
    host = one.master
    write_script("echo ok\n", host)
    one.origin.commit({"side.txt": "1", "a.txt": "side"}, branch="side")
    package = '{"private": true, "scripts": {"deploy:release": "sh deploy.sh", "new": "true"}}'
    coming = {"a.txt": "1", "ignored.txt": "upstream", ".gitignore": "", "conf/x": "1", "package.json": package}
    one.origin.commit(coming)

    def staged() -> None:
        (host.repo / "a.txt").write_text("mine")
        one.origin.git("add", "a.txt", cwd=host.repo)

    def staged_alike() -> None:
        (host.repo / "package.json").write_text(package)
        one.origin.git("add", "package.json", cwd=host.repo)

    def hidden() -> None:
        (host.repo / "package.json").write_text("{}")
        one.origin.git("update-index", "--assume-unchanged", "package.json", cwd=host.repo)

    def ignored() -> None:
        (host.repo / ".git/info").mkdir(exist_ok=True)
        (host.repo / ".git/info/exclude").write_text("ignored.txt\n")
        (host.repo / "ignored.txt").write_text("somebody's")

    stages: list[tuple[str, Callable[[], object]]] = [
        ("side", lambda: (host.repo / "deploy.sh").write_text("mine\n")),
        ("master", lambda: (host.repo / "config" / "version.json").write_text("{}")),
        ("side", lambda: (host.repo / "side.txt").write_text("mine")),
        ("master", staged),
        ("master", lambda: (host.repo / ".gitignore").write_text("ignored.txt\n")),
        ("gone", lambda: one.origin.git("branch", "gone", cwd=host.repo)),
        ("master", lambda: one.origin.git("commit", "-q", "--allow-empty", "-m", "own", cwd=host.repo)),
        ("master", lambda: (host.repo / "package.json").unlink()),
        ("master", staged_alike),
        ("master", lambda: (host.repo / "conf").write_text("mine")),
        ("master", lambda: (host.repo / "conf").symlink_to("config")),
        ("master", ignored),
        ("master", hidden),
    ]
    verdicts = []
    for branch, prepare in stages:
        one.origin.git("reset", "--quiet", "--hard", one.origin.first, cwd=host.repo)
        one.origin.git("clean", "-fdxq", cwd=host.repo)
        prepare()
        answer = one.cli("plan", "all", branch)
        run = one.cli("trigger", "all", branch)
        assert (answer.code, run.code) in ((0, 0), (1, 1)), (branch, answer.out, run.out)
        verdicts.append(answer.code)
        if one.origin.git("branch", "--show-current", cwd=host.repo) != "master":
            one.origin.git("checkout", "--quiet", "--force", "master", cwd=host.repo)
    assert verdicts == [0, 0, 1, 1, 1, 1, 1, 0, 0, 1, 1, 1, 1]


def test_what_a_job_can_know_the_plan_says_and_nothing_moves(fleet: MakeFleet, tmp_path: Path) -> None:
    """Each trap before the first change: the plan refuses, the job refuses with the same words, and git wrote nothing.
    What may yet be true is refused by neither."""
    one = fleet(hosts=1, command=COMMAND)
    host, git, repo = one.master, one.origin.git, one.master.repo
    write_script("echo ok\n", host)
    settings = json.loads(host.config.read_text())
    git("config", "--global", "protocol.file.allow", "always")
    git("config", "--global", "user.name", "x")
    git("config", "--global", "user.email", "x@y")

    def command(
        *words: Any, branch: str, files: dict[str, Any] | None = None, mode: str = "-x", hosts: Any = ()
    ) -> None:
        """A commit with another command."""
        text = json.dumps(settings | {"deploy": {"command": list(words)}, "hosts": dict(hosts)})
        one.origin.commit({"config/updater.json": text, **(files or {})}, branch)
        if files and mode == "+x":
            for name in files:
                (one.origin.seed / name).chmod(0o755)
            git("commit", "--quiet", "--amend", "--all", "--no-edit")
            git("push", "--quiet", "--force", "origin", branch)
        git("switch", "--quiet", "master")

    package = json.dumps({"scripts": {"build": "true"}})
    new_path = {host.address: {"environmentFile": "new.env"}}
    for name in ("p/here-it-is", "p/pnpm"):
        (tmp_path / "p").mkdir(exist_ok=True)
        (tmp_path / name).write_text('#!/bin/sh\necho $0 "$@"\n')
        (tmp_path / name).chmod(0o755)
    command("no-such-program", "x", branch="program")
    command("pnpm", "deploy:release", branch="script", files={"package.json": package, "new.env": "PATH=/bin"})
    command("./bin/go", branch="mode", files={"bin/go": "#!/bin/sh\n"})
    command("bin/none", branch="file")
    command("sh", "none.sh", branch="text")
    command(*COMMAND, branch="environment", hosts=new_path)
    git("checkout", "-q", "-b", "invalid", "master")
    one.origin.commit({"config/updater.json": "{"}, "invalid")
    git("switch", "--quiet", "master")
    for branch in ("tree", "clash/1", "rewritten"):
        one.origin.commit({"side": branch}, branch)
        git("switch", "--quiet", "master")

    def own_clash() -> None:
        git("checkout", "-q", "-b", "clash", cwd=repo)
        git("commit", "-q", "--allow-empty", "-m", "mine", cwd=repo)
        git("checkout", "-q", "master", cwd=repo)

    def rewrite() -> None:
        git("branch", "-q", "rewritten", "origin/rewritten", cwd=repo)
        git("checkout", "-q", "rewritten")
        git("commit", "-q", "--amend", "-m", "other")
        git("push", "-q", "--force", "origin", "rewritten")

    def begin_merge() -> None:
        git("checkout", "-q", "rewritten", cwd=repo)
        git("reset", "--quiet", "--hard", "origin/rewritten", cwd=repo)
        git("merge", "-q", "--no-ff", "--no-commit", "origin/tree", "-X", "ours", cwd=repo)

    git("fetch", "-q", cwd=repo)
    two = host.folder / "two"
    traps: list[tuple[str, Callable[[], object], str]] = [
        ("program", lambda: None, "no-such-program: not found in PATH"),
        ("script", lambda: None, "has no script deploy:release; its scripts are: build"),
        ("mode", lambda: None, "./bin/go: not found, or not executable, in"),
        ("file", lambda: None, "bin/none: not found, or not executable, in"),
        ("text", lambda: None, "none.sh: not found in"),
        ("environment", lambda: None, "can't read environmentFile"),
        ("invalid", lambda: None, "config/updater.json"),
        ("tree", lambda: git("worktree", "add", "-q", "-b", "tree", "../two", "origin/tree", cwd=repo),
         f"tree is checked out in another work tree: {two}; git -C {two} checkout --detach"),
        ("clash/1", own_clash, f"no remote has its commits; git -C {repo} branch -m clash kept-clash"),
        ("rewritten", rewrite, "rewritten was force-pushed, and no fast-forward leads there: the local branch has 1"
         f" commit that the remote has not any more; git -C {repo} branch -f rewritten origin/rewritten"),
        ("master", begin_merge, f"a merge that somebody began in {repo} is not ended; git -C {repo} status, then"),
    ]  # fmt: skip
    for branch, prepare, words in traps:
        prepare()
        before, head_before = photograph(repo), head(one, host)
        before.pop(str(repo / ".git/FETCH_HEAD"), None)
        refused = plan(one, "all", branch, code=1)[host.address]["refused"]
        assert words in "; ".join(refused), branch
        run = one.cli("trigger", "all", branch)
        assert run.code == 1 and words.partition(";")[0] in run.out, (branch, run.out, run.err)
        assert head(one, host) == head_before and f"nothing changed on {host.address}" in run.err, branch
        assert f"git checkout {branch}..." not in run.out, branch
    git("merge", "--abort", cwd=repo)

    # the lines to type do what they say
    git("checkout", "-q", "master", cwd=repo)
    for typed in (["branch", "-f", "rewritten", "origin/rewritten"], ["branch", "-m", "clash", "kept-clash"]):
        git(*typed, cwd=repo)
    git("checkout", "-q", "--detach", cwd=host.folder / "two")
    # in what the commit brings, in the PATH that its environment gives, by a later command
    command("./bin/go", branch="mode", files={"bin/go": "#!/bin/sh\n"}, mode="+x")
    later = ["sh", "-c", "mkdir -p own; echo '#!/bin/sh' > own/late; chmod +x own/late"]
    command(later, ["own/late"], branch="later")
    command("here-it-is", "x", branch="path", files={"new.env": f"PATH={tmp_path / 'p'}:{os.environ['PATH']}\n"},
            hosts=new_path)  # fmt: skip
    command("pnpm", "deploy:release", branch="script", files={
        "package.json": json.dumps({"scripts": {"deploy:release": "x"}}),
        "new.env": f"PATH={tmp_path / 'p'}:{os.environ['PATH']}\n"}, hosts=new_path)  # fmt: skip
    for branch in ("rewritten", "clash/1", "tree", "mode", "later", "path", "script", "master"):
        row = plan(one, "all", branch)[host.address]
        assert ("own/late: not found" in str(row["warnings"])) == (branch == "later")
        run = one.cli("trigger", "all", branch)
        assert run.code == 0, (branch, row, run.out)


def test_plan_sees_the_incoming_configuration_and_a_running_job(fleet: MakeFleet) -> None:
    one = fleet(hosts=2, command=COMMAND)
    agent = one.agents[0]
    write_script(GATED, agent)
    run = detach(one, agent.address)
    wait_state(one, run, agent, "running")
    waiting = detach(one, agent.address, "other")
    good = json.loads(agent.config.read_text())
    config = good | {"deploy": {"command": ["sh", "x.sh"], "restart": ["b.service"]}}
    one.origin.commit({"config/updater.json": json.dumps(config), "x.sh": ""})
    row = plan(one, agent.address, "master")[agent.address]
    assert (row["busy"], row["queued"]) == (run, [waiting])
    assert (row["command"], row["restart"]) == ("sh x.sh", ["b.service"])
    one.origin.commit({"config/updater.json": "{"})
    assert "config/updater.json" in plan(one, agent.address, "master", code=1)[agent.address]["refused"][0]
    open_gate(agent)
    assert one.cli("logs", run, "-f").code == 0
    absent = {**good, "deploy": {"command": ["no-such-program", "x"]}}
    one.origin.commit({"config/updater.json": json.dumps(absent)})
    missing = plan(one, agent.address, "master", code=1)[agent.address]["refused"]
    assert [text.partition(";")[0] for text in missing] == ["no-such-program: not found in PATH"]
    one.origin.commit({"config/updater.json": json.dumps(good)})
    assert plan(one, agent.address, "master")[agent.address]["expected_s"] is not None
    # a job reads the file, which may have changed this very second
    agent.config.write_text(json.dumps(good | {"deploy": {"command": ["sh", "here.sh"]}}))
    assert plan(one, agent.address, "master", code=1)[agent.address]["command"] == "sh here.sh"
    one.origin.bare.rename(one.origin.bare.with_suffix(".away"))
    assert plan(one, agent.address, "master", code=1)[agent.address]["refused"]


def test_rollback_goes_back_one_step_after_the_other(fleet: MakeFleet) -> None:
    one = fleet(hosts=2, command=COMMAND)
    master, agent = one.hosts
    write_script("cat app.txt\n", *one.hosts)
    commits = [one.origin.first]
    for number in range(3):
        commits.append(one.origin.commit({"app.txt": str(number)}))
        assert one.cli("trigger", "all" if number else agent.address, "master").code == 0
    write_script("exit 3\n", agent)
    assert "rollback" not in one.cli("trigger", agent.address, "master").err, "it has what succeeded"
    broken = one.origin.commit({"app.txt": "broken"})
    failed = one.cli("trigger", "all", "master")
    assert failed.code == 1 and f"rollback {agent.address} " in failed.err, "the line to type"
    assert f"to what worked before (v0301_4 ({commits[3][:7]}))" in failed.err
    assert "✗ 실패 sh ../script (exit 3), 일부 변경" in one.cli("status").out
    again = one.cli("trigger", "--failed-of", "last")
    assert again.code == 1 and f"rollback {agent.address} " in again.err, "it is no new commit, and failed again"
    write_script("cat app.txt\n", agent)

    asked = one.cli("rollback", agent.address)
    assert asked.code == 5 and "--yes" in asked.err and commits[3][:7] in asked.err, "nobody to ask"
    assert head(one, agent) == broken
    back = one.cli("rollback", "--yes")
    assert back.code == 0, back.out + back.err
    assert f"{broken[:7]} never did" in back.err and f"before {broken[:7]} first did" in back.err, "it says why"
    assert "0 commits" not in back.err and back.err.count("1 commit taken back") == 2
    assert f": rollback to {commits[3][:7]} on " in back.err, "a full commit id is for programs"
    assert [head(one, host) for host in one.hosts] == [commits[3]] * 2
    assert one.cli("rollback", "--yes").code == 0
    assert [head(one, host) for host in one.hosts] == [commits[2]] * 2, "a rollback is no step forward"
    stuck = f"no commit succeeded before {commits[2][:7]}"
    some = one.cli("rollback", "--yes")
    assert some.code == 1 and stuck in some.err and f"[{agent.address}] ✓" in some.out, "the others are offered"
    assert [head(one, host) for host in one.hosts] == [commits[2], commits[1]]
    none = one.cli("rollback", master.address, "--yes")
    assert none.code == 4 and f"{master.address}: {stuck}" in none.err

    assert one.cli("rollback", "all", "--to", commits[3][:8], "--yes").code == 0
    assert [head(one, host) for host in one.hosts] == [commits[3]] * 2
    for nowhere in ("0" * 40, "0123456"):
        answer = one.cli("rollback", agent.address, "--to", nowhere, "--yes")
        assert answer.code == 4 and agent.address in answer.err, answer.err
    rows = json.loads(one.cli("history", "--json").out)["runs"]
    assert [row["kind"] for row in rows[:2]] == ["rollback", "deploy"] or rows[0]["kind"] == "rollback"

    typo = one.cli("trigger", "all", "mastre")
    assert typo.code == 1 and " rollback " not in typo.err
    assert f"nothing changed on {agent.address}: it has v0301_4 ({commits[3][:7]})\n" in typo.err
    assert "✗ 실패 git checkout mastre (exit 128), 변경 없음" in one.cli("status").out
    kept = one.cli("rollback", "all", "--yes")
    assert kept.code == 4 and [head(one, host) for host in one.hosts] == [commits[3]] * 2
    assert f"changed nothing: v0301_4 ({commits[3][:7]}) is what succeeded last" in kept.err
    further = f"rollback {master.address},{agent.address} --to {commits[2]}"
    assert further in kept.err, "who means the version before is told how"
    plan_of = json.loads(one.cli("rollback", "all", "--json", "--yes").err)
    assert plan_of["exit"] == 4 and further in plan_of["hint"]
    one.origin.commit({"config/version.json": json.dumps({"version": "v0302_1"})})
    write_script("exit 3\n", agent)
    assert one.cli("trigger", agent.address, "master").code == 1
    mixed = one.cli("rollback", "all")
    assert mixed.code == 5 and f"roll back {agent.address}?" not in mixed.err
    assert "v0302_1 → v0301_4" in mixed.err and "changed nothing" in mixed.err
    write_script("cat app.txt\n", agent)
    assert one.cli("rollback", "all", "--yes").code == 0
    assert [head(one, host) for host in one.hosts] == [commits[3]] * 2, "only what failed half-way goes back"

    write_script("kill -9 $PPID; sleep 86413\n", agent)  # the runner, as the kernel would where memory is short
    lost = one.cli("trigger", agent.address, "master")
    assert lost.code == 1 and "✗ 연결 끊김 (the runner died)" in lost.out
    assert f" rollback {agent.address} " in lost.err and f"(v0301_4 ({commits[3][:7]}))" in lost.err, lost.err
    assert "(the runner died), 일부 변경" in one.cli("status").out
    write_script("cat app.txt\n", agent)
    assert one.cli("rollback", agent.address, "--yes").code == 0
    assert head(one, agent) == commits[3]

    assert one.cli("trigger", master.address, "master").code == 0
    one.stop(agent)
    wait_for(lambda: not status(one)[1]["online"], "the agent is gone")
    part = one.cli("rollback", "--yes")
    assert part.code == 1 and "the host is offline" in part.err and head(one, master) == broken


def test_rollback_asks_at_a_terminal(fleet: MakeFleet) -> None:
    one = fleet(hosts=1, command=COMMAND)
    write_script("echo ok\n", one.master)
    assert one.cli("trigger", "all", "master").code == 0
    one.origin.commit({"a": "1"})
    assert one.cli("trigger", "all", "master").code == 0
    latest = head(one, one.master)
    for answer, code in (("n\n", 5), ("y\n", 0)):
        pid, terminal = pty.fork()
        if not pid:
            argv, env, cwd = one._command(["rollback"], None, None, None)
            os.chdir(cwd)
            os.execvpe(argv[0], argv, env)
        said = b""
        while b"[y/N]" not in said:
            said += os.read(terminal, 4096)
        assert head(one, one.master) == latest
        os.write(terminal, answer.encode())
        with pytest.raises(OSError):
            while os.read(terminal, 4096):
                pass
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == code
        os.close(terminal)
    assert head(one, one.master) == one.origin.first


def test_a_commit_id_is_short_for_people() -> None:
    asked = {"kind": "rollback", "branch": "61e06aea7fd2fe83bd217a71c95bc9fa0cca6afd", "target": "all"}
    assert est.order_text(asked) == "rollback to 61e06ae on all"


@given(st.lists(st.sampled_from("abcd"), max_size=8), st.sampled_from("abcde"))
def test_decide_rollback(successes: list[str], current: str) -> None:
    index = est.decide_rollback(successes, current)
    first = successes.index(current) if current in successes else len(successes)
    if index is None:
        assert first == 0
    else:
        assert index == first - 1 and current not in successes[: index + 1]


@pytest.mark.parametrize("path", ["pnpm-lock.yaml", "a/b/package-lock.json", "yarn.lock", "x/bun.lockb", "go.sum"])
def test_lock_files(path: str) -> None:
    assert est.LOCK_FILE.fullmatch(path)
    assert not est.LOCK_FILE.fullmatch(path + ".txt") and not est.LOCK_FILE.fullmatch("src/clock.yaml")


def test_a_plan_is_quick_and_in_parallel(fleet: MakeFleet) -> None:
    """A host whose remote hangs is answered for in time, and does not hold up the others."""
    one = fleet(hosts=3, command=COMMAND)
    hanging = one.agents[0]
    one.origin.git("config", "remote.origin.uploadpack", "sleep 60; git-upload-pack", cwd=hanging.repo)
    watched = Watched(one, "plan", "all", "master", "--json")
    assert watched.end() == 1
    rows = {row["host"]: row for row in json.loads(watched.out)["hosts"]}
    [why] = rows[hanging.address]["unknown"]
    assert re.search("did not answer|no answer", why) and why.endswith("; a plan waits no longer, a deployment does"), (
        why
    )
    assert not rows[hanging.address]["refused"]  # a remote that is slow is no reason against the commit
    refused = one.cli("trigger", "all", "master", "--plan", json.loads(watched.out)["plan"])
    assert refused.code == 5 and "says no" in refused.err, "an order by a plan is held to a commit, and there is none"
    assert not rows[one.agents[1].address]["refused"] and not rows[one.master.address]["refused"]
    # and one whose clone went says so, where `status` had nothing but dashes
    other = one.agents[1]
    other.repo.rename(other.folder / "away")
    assert f"! {other.address}: there is no folder {other.repo}" in one.cli("status").out


SLOW_FETCH = """
up=$PPID
for _ in 1 2; do
  if tr '\\0' '\\n' < /proc/$up/cmdline | grep -qx fetch; then touch {half}; sleep {seconds}; fi
  up=$(sed -n 's/^PPid:[^0-9]*//p' /proc/$up/status)
done
exec git-upload-pack "$@"
"""


def test_a_commit_that_takes_long_to_fetch_is_not_refused(fleet: MakeFleet, tmp_path: Path) -> None:
    """Of a large commit a plan knows the name in time and not the content: it says so, with neither a ✗ nor a ✓, and
    the order that it prints brings this very commit."""
    one = fleet(hosts=2, command=COMMAND)
    write_script("echo ok\n", *one.hosts)
    slow = one.agents[0]
    script = tmp_path / "upload-pack"
    half = slow.repo / ".git/objects/pack/tmp_pack_half"
    half.parent.mkdir(exist_ok=True)
    script.write_text(f"#!/bin/sh{SLOW_FETCH.format(seconds=6, half=half)}")
    script.chmod(0o755)
    one.origin.git("config", "remote.origin.uploadpack", str(script), cwd=slow.repo)
    commit = one.origin.commit({"large.bin": "x"})
    answer = one.cli("plan", "all", "master", "--json")
    told = json.loads(answer.out)
    rows = {row["host"]: row for row in told["hosts"]}
    row = rows[slow.address]
    assert (answer.code, told["ok"], row["refused"], row["target"]) == (1, False, [], commit), row
    assert row["unknown"] == ["git fetch did not answer in 4 s; a plan waits no longer, a deployment does"]
    assert (row["commits"], row["changed_count"]) == (None, None), "0 would say that nothing comes"
    assert not half.exists(), "each plan would leave as much again on the disk"
    shown = one.cli("plan", slow.address, "master")
    assert "✗" not in shown.out and "? not known yet: git fetch did not" in shown.out
    words = shown.out.splitlines()[-1].split(" trigger ")[1].split()
    done = one.cli("trigger", *words)
    assert (done.code, head(one, slow)) == (0, commit), done.out + done.err


def test_a_commit_that_opens_the_doors_needs_force(fleet: MakeFleet, tmp_path: Path) -> None:
    """What a new configuration changes is said beforehand, in the log and in the question; where it opens the doors
    wide, the master's host does not take it unless that is meant."""
    token = tmp_path / "token"
    token.write_text("0123456789abcdef0123")
    one = fleet(hosts=2, command=COMMAND, config={"tokenFile": str(token)})
    master, agent = one.hosts
    write_script("echo ok\n", *one.hosts)
    settings = json.loads(master.config.read_text())
    first = head(one, master)
    wide = settings | {
        "whitelist": [*settings["whitelist"], "0.0.0.0/1", "128.0.0.0/1"], "commanders": ["127.0.0.1"],
        "notify": [{"url": "http://hooks.example/services/geheim", "on": ["failed"]}],
        "deploy": {"command": ["sh", "../script", "more"]}, "updater": {"sha256": "ab" * 32},
        "health": [{"name": "own", "command": ["sh", "-c", "true"]}],
    }  # fmt: skip
    del wide["tokenFile"]
    opening = one.origin.commit({"config/updater.json": json.dumps(wide)})
    says = [
        "whitelist: lets in 0.0.0.0/1, 128.0.0.0/1", "commanders: no longer: 127.0.0.2",
        "tokenFile: nobody has to know the token any more", "updater.sha256: `upgrade` may install abababababab",
        "notify: tells json at hooks.example too", "command: sh ../script more instead of sh ../script",
        "health own: runs sh -c true",
    ]  # fmt: skip
    rows = plan(one, "all", "master", code=1)
    assert rows[master.address]["doors"] == rows[agent.address]["doors"]
    assert set(says) - set(rows[master.address]["doors"]) == set() and "geheim" not in str(rows)
    assert rows[agent.address]["refused"] == [] and rows[master.address]["exit"] == 5
    assert rows[master.address]["refused"] == [f"it opens the doors: {says[0]}; {says[2]}"]
    assert f"new configuration: {says[0]}" in one.cli("plan", "all", "master").out

    refused = one.cli("trigger", master.address, "master")
    assert refused.code == 5 and "opens the doors, and was not ordered with --force" in refused.err, refused
    assert head(one, master) == first
    folder = one.runs()[-1]
    assert json.loads((folder / "127.0.0.1.json").read_text())["error"].startswith("this commit opens the doors")
    one.origin.git("switch", "--quiet", "--create", "link")
    (one.origin.seed / "config" / "updater.json").unlink()
    (one.origin.seed / "config" / "updater.json").symlink_to("other/open.json")
    one.origin.commit({"config/other/open.json": json.dumps(wide)}, "link")
    assert one.cli("trigger", master.address, "link").code == 5, "a link to it is no way round"
    moved = {"config/updater.json": None, "config/updater.toml": est.render_config(wide, "toml")}
    one.origin.commit(moved, "moved")
    assert one.cli("trigger", master.address, "moved").code == 5, "nor is the file's other form"

    forced = one.cli("trigger", "all", "master", "--force")
    assert forced.code == 0 and f"⚠ new configuration: {says[0]}" in forced.out, forced
    assert head(one, master) == opening
    record = json.loads((one.runs()[-1] / "run.json").read_text())
    assert record["options"]["force"] and record["by"].endswith("@127.0.0.1")
    closed = one.origin.commit({"config/updater.json": json.dumps(settings)})
    wait_for(lambda: one.cli("trigger", master.address, "master").code == 0, "who closes them needs no force")
    assert head(one, master) == closed
    wait_for(lambda: master.stderr.count("new settings") == 2, lambda: f"in force again\n{master.stderr}")
    wait_for(lambda: one.cli("status").code == 0, "the master's token is that of the clone")
    back = one.cli("rollback", master.address, "--yes")
    assert back.code == 5 and "it opens the doors" in back.err, back
    assert head(one, master) == closed
    assert one.cli("rollback", master.address, "--yes", "--force").code == 0
    assert head(one, master) == opening
