"""Hosts' clones that are unusual, or broken: `plan`, a job and `doctor` say the same of them, and what they advise
works as it is printed."""

from __future__ import annotations

import json
import os
import pwd
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.fleet import Fleet, need, run

MakeFleet = Callable[..., Fleet]
A = "127.0.0.1"


def look(one: Fleet, branch: str = "master") -> dict[str, Any]:
    """What `plan` says of the one host."""
    row: dict[str, Any] = json.loads(one.cli("plan", A, branch, "--json").out)["hosts"][0]
    return row


def refused_alike(one: Fleet, what: str, branch: str = "master") -> str:
    """The one line that `plan` refuses, whose beginning a job says as well, with what is advised in its hint."""
    (line,) = look(one, branch)["refused"]
    assert what in line, line
    done = one.cli("trigger", A, branch)
    said = re.sub(r"(?m)^\[[^\]]+\] ", "", done.out)
    assert done.code == 1, done.out
    (error,) = re.findall(r"(?m)^estelle-updater: error: (.*)", said)
    (hint,) = re.findall(r"(?m)^hint: (.*)", said)
    assert line == f"{error}; {hint}"
    advice: str = hint
    return advice


def type_in(one: Fleet, line: str) -> None:
    """The advice as a person's shell takes it."""
    done = run(["sh", "-c", line], one.env, one.tmp_path)
    assert done.code == 0, done


def deploy(one: Fleet, branch: str = "master") -> str:
    """A plan that promises, and a job that keeps it: HEAD is what the remote has."""
    row = look(one, branch)
    assert not row["refused"], row
    done = one.cli("trigger", A, branch)
    assert done.code == 0, done
    assert one.origin.git("rev-parse", "HEAD", cwd=one.master.repo) == row["target"]
    return done.out


def test_a_clone_that_was_spoilt_is_told_before_anything_moves_and_the_advice_mends_it(fleet: MakeFleet) -> None:
    one = fleet(hosts=1, start=False)
    repo, git = one.master.repo, one.origin.git
    mirror = one.tmp_path / "mirror.git"
    shutil.rmtree(repo)
    git("clone", "--quiet", "--bare", str(one.origin.bare), str(mirror))
    git("clone", "--quiet", "--shared", str(mirror), str(repo))
    git("remote", "set-url", "origin", str(one.origin.bare), cwd=repo)
    one.start()
    one.origin.commit({"app.txt": "1"})
    deploy(one)
    before = git("rev-parse", "HEAD", cwd=repo)
    one.origin.commit({"app.txt": "2"})
    # the clone that it takes objects from
    shutil.rmtree(mirror)
    advice = refused_alike(one, f"from {mirror}/objects, and that is not there")
    assert f"objects: git takes objects of {repo}" in one.cli("doctor").out
    _, _, line = advice.partition("have all objects here: ")
    type_in(one, line)
    deploy(one)
    # the remote
    git("remote", "rename", "origin", "up", cwd=repo)
    advice = refused_alike(one, "there is no remote origin")
    line, _, other = advice.partition(", or ")
    assert other == "set deploy.remote to up"
    type_in(one, line)
    deploy(one)
    # what git takes it for
    git("config", "core.bare", "true", cwd=repo)
    advice = refused_alike(one, "core.bare is true")
    assert "core.bare is true" in one.cli("doctor").out
    type_in(one, advice)
    deploy(one)
    # what git can't even read
    settings = repo / ".git" / "config"
    kept = settings.read_text()
    (one.tmp_path / "more").write_text("[broken\n")
    settings.write_text(f"{kept}[include]\n\tpath = {one.tmp_path}/more\n")
    advice = refused_alike(one, f"{repo} is no git checkout: bad config line 1 in file {one.tmp_path}/more")
    assert advice == "mend that, or clone anew beside, and swap"
    settings.write_text(kept)
    deploy(one)
    # a file of the command, which the commit has
    (repo / "deploy.sh").unlink()
    type_in(one, refused_alike(one, f"deploy.sh is gone from {repo}"))
    deploy(one)
    git("sparse-checkout", "set", "--no-cone", "/*", "!/deploy.sh", cwd=repo)
    one.origin.commit({"deploy.sh": "echo anew\n"})  # where it is moved, it stays out as well
    type_in(one, refused_alike(one, f"a sparse checkout leaves deploy.sh out of {repo}"))
    assert "anew" in deploy(one)
    # what git writes down of the tree
    git("update-index", "--split-index", cwd=repo)
    for shared in (repo / ".git").glob("sharedindex.*"):
        shared.unlink()
    (line,) = look(one)["refused"]
    assert "a file of git is empty or damaged" in line
    assert line in one.cli("trigger", A, "master").out
    assert git("merge-base", before, "HEAD", cwd=repo) == before


def test_a_work_tree_whose_clone_forgot_it_is_told_and_made_anew(fleet: MakeFleet) -> None:
    one = fleet(hosts=1, start=False)
    repo, git = one.master.repo, one.origin.git
    main = one.tmp_path / "main clone"
    repo.rename(main)
    git("checkout", "--quiet", "--detach", cwd=main)
    git("worktree", "add", "--quiet", str(repo), "master", cwd=main)
    one.start()
    deploy(one)
    moved = main.rename(one.tmp_path / "moved clone")
    advice = refused_alike(one, "its .git names")
    _, _, line = advice.partition("type there: ")
    type_in(one, f"cd '{moved}' && {line}")
    deploy(one)
    (repo / "kept.txt").write_text("mine")
    shutil.rmtree(moved / ".git" / "worktrees")
    line, _, kept = refused_alike(one, "its .git names").partition("; ")
    assert kept == f"what git does not know stays in {repo}.kept"
    type_in(one, line)
    assert (Path(f"{repo}.kept") / "kept.txt").read_text() == "mine"
    deploy(one)


def test_a_clone_without_a_commit_is_one(fleet: MakeFleet) -> None:
    one = fleet(hosts=1)
    repo, git = one.master.repo, one.origin.git
    git("symbolic-ref", "HEAD", "refs/heads/unborn", cwd=repo)
    row = look(one)
    assert (row["current"], row["refused"], row["commits"]) == (None, [], 1)
    assert "nothing → " in one.cli("plan", A, "master").out
    (host,) = json.loads(one.cli("status", "--json").out)["hosts"]
    assert host["commit"] is None
    deploy(one)
    shutil.rmtree(repo / ".git")
    git("init", "--quiet", cwd=repo)
    git("remote", "add", "origin", str(one.origin.bare), cwd=repo)
    (line,) = look(one)["refused"]
    assert line.startswith("local changes are in the way of the incoming commits: config/updater.json, ")
    assert one.cli("trigger", A, "master").code == 1


def test_a_branch_that_the_remote_has_no_more_is_none(fleet: MakeFleet) -> None:
    """What an earlier deployment left of it here hides no tag, and is not checked out on the way to a failure."""
    one = fleet(hosts=1)
    repo, git = one.master.repo, one.origin.git
    one.origin.commit({"app.txt": "old"}, branch="rel")
    deploy(one, "rel")
    deploy(one)
    git("push", "--quiet", "origin", ":rel")
    git("reflog", "expire", "--expire=now", "--all", cwd=repo)
    assert look(one, "rel")["refused"] == ["no such branch, tag or commit on the remote: rel"]
    done = one.cli("trigger", A, "rel")
    assert "no such branch, tag or commit on the remote" in done.err and f"nothing changed on {A}" in done.err
    went = git("reflog", "show", "HEAD", cwd=repo)
    assert not went, "the tree that serves was moved there and back"
    git("tag", "rel", "rel~1")
    git("push", "--quiet", "origin", "refs/tags/rel")
    deploy(one, "rel")
    assert not (repo / "app.txt").exists()


def test_files_are_as_gitattributes_has_them_by_now(fleet: MakeFleet) -> None:
    """git writes only what has another content, and leaves a script with the wrong line ends for ever."""
    one = fleet(hosts=1)
    repo = one.master.repo
    one.origin.commit({"a.txt": "a\nb\n", "mine.txt": "a\nb\n", "sub/c.txt": "c\n", ".gitattributes": "*.md text\n"})
    deploy(one)
    (repo / "mine.txt").write_bytes(b"mine\n")
    one.origin.commit({".gitattributes": "*.txt text eol=crlf\n"})
    assert "Written as .gitattributes says by now: a.txt, sub/c.txt\n" in deploy(one)
    assert ((repo / "a.txt").read_bytes(), (repo / "sub/c.txt").read_bytes()) == (b"a\r\nb\r\n", b"c\r\n")
    assert (repo / "mine.txt").read_bytes() == b"mine\n"
    one.origin.git("checkout", "--quiet", "--", "mine.txt", cwd=repo)
    assert "Written as" not in deploy(one), "nothing is written again"
    assert one.cli("rollback", A, "--yes").code == 0
    assert (repo / "a.txt").read_bytes() == b"a\nb\n"
    assert not one.origin.git("status", "--porcelain", cwd=repo)


def test_a_commit_without_its_files_is_fetched(fleet: MakeFleet) -> None:
    """What a fetch leaves that a full disk cut off."""
    one = fleet(hosts=1)
    repo, git = one.master.repo, one.origin.git
    later = []
    for number in "12":
        later.append(one.origin.commit({f"new{number}/app.txt": number}))
        raw = git("cat-file", "commit", later[-1])
        (one.tmp_path / "raw").write_text(f"{raw}\n")
        made = git("hash-object", "-t", "commit", "-w", "--literally", str(one.tmp_path / "raw"), cwd=repo)
        assert made == later[-1], "the commit alone is there"
    row = look(one)
    assert (row["refused"], row["changed"], row["commits"]) == ([], ["new1/app.txt", "new2/app.txt"], 2)
    shutil.rmtree(repo / ".git" / "objects" / later[0][:2])
    (one.tmp_path / "raw").write_text(f"{git('cat-file', 'commit', later[0])}\n")
    git("hash-object", "-t", "commit", "-w", "--literally", str(one.tmp_path / "raw"), cwd=repo)
    deploy(one, later[0])
    assert (repo / "new1/app.txt").read_text() == "1"


def test_a_folder_that_takes_no_files_is_told_before_git_writes_beside_it(fleet: MakeFleet) -> None:
    need("setpriv")
    one = fleet(hosts=1, start=False)
    less = "-dac_override,-dac_read_search"
    if os.geteuid() == 0:  # who may write everywhere
        one.master.prefix = ("setpriv", f"--bounding-set={less}", f"--inh-caps={less}")
    one.start()
    one.origin.commit({"a.txt": "1", "config/new/x": "1"})
    config = one.master.repo / "config"
    config.chmod(0o555)
    try:
        before = one.origin.git("rev-parse", "HEAD", cwd=one.master.repo)
        advice = refused_alike(one, f"this user may not change {config}")
        own, _, opened = advice.partition(" && ")
        assert (
            own == f"sudo chown -R {pwd.getpwuid(os.geteuid()).pw_name} {config}"
            and opened == f"sudo chmod u+rwX {config}"
        )
        assert one.origin.git("rev-parse", "HEAD", cwd=one.master.repo) == before
        assert not (one.master.repo / "a.txt").exists()
    finally:
        config.chmod(0o755)
    deploy(one)
    one.origin.commit({"a.txt": "2"})
    file = one.master.repo / "a.txt"
    file.chmod(0)  # as root's umask leaves what root has pulled by hand: git calls it changed, and a stash fails
    advice = refused_alike(one, f"this user may not change {file}")
    subprocess.run(advice.replace("sudo ", ""), shell=True, check=True)
    deploy(one)
    assert file.read_text() == "2" and not file.stat().st_mode & 0o111
