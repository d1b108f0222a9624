"""The clone of somebody who set git up another way: plan, job and result say the same, and it is so."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from tests import seam as est
from tests.fleet import Fleet, need, unavailable, wait_for
from tests.test_tree import HOST, Clone

MakeFleet = Callable[..., Fleet]


class Setup:
    """One host's clone and its origin, made anew for each case: the daemon goes on."""

    def __init__(self, fleet: Fleet) -> None:
        self.fleet, self.git = fleet, fleet.origin.git
        self.repo, self.seed, self.folder = fleet.master.repo, fleet.origin.seed, fleet.tmp_path
        self.git("config", "--global", "protocol.file.allow", "always")
        self.places = (self.repo, self.seed, fleet.origin.bare)
        for place in self.places:
            shutil.copytree(place, f"{place}.first", symlinks=True)

    def reset(self) -> None:
        for place in self.places:
            shutil.rmtree(place)
            shutil.copytree(f"{place}.first", place, symlinks=True)

    def here(self, *words: str) -> str:
        """git in the host's clone."""
        return self.git(*words, cwd=self.repo)

    def push(self) -> None:
        self.git("add", "--all")
        self.git("commit", "--quiet", "--allow-empty", "-m", "x")
        self.git("push", "--quiet", "--force", "origin", "HEAD:master")

    def module(self, name: str) -> Path:
        """A repository with one commit on master, for a submodule."""
        place = self.folder / name
        shutil.rmtree(place, ignore_errors=True)
        self.git("init", "--quiet", "-b", "master", str(place))
        (place / "s.txt").write_text("one\n")
        self.git("add", ".", cwd=place)
        self.git("commit", "--quiet", "-m", "x", cwd=place)
        return place

    def plan(self, branch: str) -> tuple[int, dict[str, Any]]:
        answer = self.fleet.cli("plan", "all", branch, "--json")
        return answer.code, json.loads(answer.out)["hosts"][0]

    def both(self, branch: str) -> tuple[list[str], list[str], dict[str, Any]]:
        """What the plan refuses and warns of, and the result of the job, which has to end as the plan says; what is
        refused moves nothing, and says so in the plan's words."""
        code, row = self.plan(branch)
        before = self.here("rev-parse", "HEAD")
        run = self.fleet.cli("trigger", "all", branch, "--json")
        said = [event["line"] for event in run.events if event["event"] == "log"]
        result = next(event for event in run.events if event["event"] == "result")
        assert bool(code) == bool(run.code), (row, said)
        if code:
            assert self.here("rev-parse", "HEAD") == before and not result["changed"], said
            first = row["refused"][0].partition(";")[0]
            assert any(first in line for line in said), (first, said)
        return row["refused"], row["warnings"], result


@pytest.fixture
def setup(fleet: MakeFleet) -> Iterator[Setup]:
    yield Setup(fleet(hosts=1))


def test_what_is_no_commit_is_refused(setup: Setup) -> None:
    """By its id, by a tag, by a tag of the tag's kind; in `rollback --to` too. The id of a tag's own object is one."""
    tree, blob = setup.git("rev-parse", "HEAD^{tree}"), setup.git("rev-parse", "HEAD:deploy.sh")
    for name, object_ in (("on-tree", tree), ("on-blob", blob)):
        setup.git("tag", name, object_)
        setup.git("tag", "-a", "-m", "x", f"{name}-too", object_)
    setup.git("tag", "-a", "-m", "x", "good")
    setup.git("push", "--quiet", "--tags", "origin")
    for name in (tree, blob, "on-tree", "on-blob", "on-tree-too", "on-blob-too"):
        refused, _, _ = setup.both(name)
        assert len(refused) == 1
        assert refused[0].startswith(f"{name} names a file or a folder, and no commit; name a branch"), refused
    back = setup.fleet.cli("rollback", "all", "--to", tree, "--yes")
    assert back.code == 4 and f"{tree} names a file or a folder" in back.err, back
    for name in ("good", setup.git("rev-parse", "good")):
        assert setup.both(name)[0] == []


@pytest.mark.parametrize("moved", [False, True], ids=["", "moved tag"])
def test_how_a_clone_fetches_decides_nothing(setup: Setup, *, moved: bool) -> None:
    """Tags that were moved, refspecs of one's own, one's own branches and tags: a ✓ is the commit, and nothing of
    somebody's goes."""
    cases: list[tuple[str, str]] = [
        ("remote.origin.tagOpt", "--tags"),
        ("remote.origin.pruneTags", "true"),
        ("remote.origin.fetch", "+refs/heads/*:refs/heads/*"),
        ("remote.origin.fetch", "refs/heads/*:refs/remotes/elsewhere/*"),
        ("remote.origin.fetch", "+refs/*:refs/*"),
        ("pull.twohead", "ours"),
        ("diff.orderFile", "/nowhere"),
    ]
    if moved:
        cases = cases[:1]
    for key, value in cases:
        setup.reset()
        setup.git("tag", "v1")
        setup.git("push", "--quiet", "origin", "v1")
        setup.here("fetch", "--quiet", "--tags")
        setup.here("branch", "mine")
        setup.here("tag", "mine")
        setup.here("config", "--replace-all", key, value)
        setup.fleet.origin.commit({"side.txt": "1"}, "side")
        setup.git("switch", "--quiet", "master")
        newest = setup.fleet.origin.commit({"new.txt": "1"})
        if moved:
            setup.git("tag", "--force", "v1")
            setup.git("push", "--quiet", "--force", "origin", "v1")
        for branch, commit in (("master", newest), ("side", setup.git("rev-parse", "side")), ("v1", "")):
            refused, warnings, result = setup.both(branch)
            assert (refused, warnings) == ([], []), (key, value)
            assert not commit or result["commit"] == commit, (key, value)
        assert setup.here("rev-parse", "mine") == setup.fleet.origin.first
        assert setup.here("tag").split() == ["mine", "v1"], (key, value)
    if moved:
        assert setup.here("rev-parse", "HEAD") == newest


def test_what_no_checkout_can_do_the_plan_says(setup: Setup) -> None:
    """A clone that takes itself for bare, as some editors leave it; a setting that this git does not know."""
    for key, value, words in (
        ("core.bare", "true", "core.bare is true; git -C"),
        ("merge.conflictStyle", "newest", "unknown style 'newest'"),
        ("diff.context", "some", "bad numeric config value 'some'"),
        ("checkout.workers", "some", "--get-all checkout.workers says there where it is set"),
        ("merge.log", "some", "--get-all merge.log says there where it is set"),
        ("color.grep.match", "some", "--get-all color.grep.match says there where it is set"),
        ("rebase.autoStash", "some", ""),
        ("branch.sort", "some", ""),
        ("fetch.output", "some", ""),
        ("commit.cleanup", "some", ""),
        ("log.date", "some", ""),
    ):
        setup.reset()
        setup.here("config", key, value)
        setup.fleet.origin.commit({"a": "1"})
        refused, _, _ = setup.both("master")
        assert len(refused) == bool(words) and words in "".join(refused), refused


def test_a_filter_that_fails_is_known_before(setup: Setup) -> None:
    """One that has to work ends the job before the tree moves, whichever of its ways fails; another is a warning. Not
    one that nothing asks for, or that works by a file of the clone."""
    setup.fleet.origin.commit({"tools/seal": "#!/bin/sh\ncat\n", "x.sec": "1"})
    (setup.seed / "tools/seal").chmod(0o755)
    setup.push()
    assert setup.both("master")[0] == []
    for place in setup.places:
        shutil.rmtree(f"{place}.first")
        shutil.copytree(place, f"{place}.first", symlinks=True)
    good, bad = "tools/seal", "no-such-program"
    attributes = {".gitattributes": "[attr]sealed filter=own\n*.sec sealed\n"}
    for required, keys, files, what in (
        ("true", {"smudge": bad, "clean": good}, attributes, "smudge filter own failed; cannot run no-such-program"),
        ("true", {"smudge": good, "clean": "false"}, attributes, "clean filter 'own' failed; external filter 'false'"),
        ("true", {}, {**attributes, "y.sec": "2"}, "smudge filter own failed"),
        ("true", {"smudge": good, "clean": good}, attributes, ""),
        ("true", {"smudge": bad, "clean": bad}, {"x.sec": "2"}, ""),
        ("true", {"smudge": f"echo error: on stderr >&2; {good}", "clean": good}, attributes, ""),
        ("true", {"smudge": "sh bin/new", "clean": good}, {"bin/new": "cat\n", "y.sec": "2", **attributes}, ""),
        ("no", {"process": bad}, attributes, "cannot run no-such-program"),
        ("no", {}, attributes, ""),
    ):
        setup.reset()
        setup.here("config", "filter.own.required", required)
        for key, value in keys.items():
            setup.here("config", f"filter.own.{key}", value)
        setup.fleet.origin.commit(files)
        refused, warnings, result = setup.both("master")
        assert warnings == result["warnings"]
        if required == "true" and what:
            assert len(refused) == 1 and what in refused[0], refused
            assert refused[0].startswith("the filter own, which "), refused
            assert refused[0].endswith(" shows its commands, which have to work"), refused
        else:
            assert result["ok"] and bool(warnings) == bool(what), warnings
            assert all(what in text and "; git writes it as it is stored" in text for text in warnings)


def test_the_clone_s_hooks_are_named(setup: Setup) -> None:
    """What one does nobody knows before: the plan names them, and so does a job that one of them ends."""
    hooks = setup.repo / ".git" / "hooks"
    hooks.mkdir(exist_ok=True)

    def write(name: str, text: str) -> Path:
        (hooks / name).write_text(f"#!/bin/sh\n{text}\n")
        (hooks / name).chmod(0o755)
        return hooks / name

    post, merged = write("post-checkout", "exit 3"), write("post-merge", "exit 3")
    setup.fleet.origin.commit({"a": "1"})
    assert setup.plan("master")[1]["steps"] == [f"hooks of the clone ({post}, {merged})"]
    run = setup.fleet.cli("trigger", "all", "master", "--json")
    result = next(event for event in run.events if event["event"] == "result")
    assert result["error"] == f"hooks of the clone ({post}, {merged}) failed", result
    assert (run.code, result["step"], result["changed"]) == (1, "git checkout master", False)
    write("post-checkout", "command -v git-lfs || { echo configured for Git LFS but >&2; exit 2; }")
    if not shutil.which("git-lfs"):
        refused = setup.plan("master")[1]["refused"]
        run = setup.fleet.cli("trigger", "all", "master", "--json")
        result = next(event for event in run.events if event["event"] == "result")
        assert refused == [f"{result['error']}; or remove {post}"] and run.code == 1, refused
    post.unlink()
    write("reference-transaction", "exit 1")
    run = setup.fleet.cli("trigger", "all", "master", "--json")
    result = next(event for event in run.events if event["event"] == "result")
    assert result["error"].startswith("the clone's hook reference-transaction refuses"), result
    (hooks / "reference-transaction").unlink()
    setup.here("config", "core.hooksPath", "nowhere")
    assert setup.plan("master")[1]["steps"] == [] and setup.both("master")[2]["ok"]


def test_where_a_clone_s_own_refspecs_can_be_used() -> None:
    usual, heads = "+refs/heads/*:refs/remotes/origin/*", "refs/heads/*:refs/heads/*"
    tags = "+refs/tags/*:refs/tags/*"
    assert est.refspecs_to_use([], "origin") == ()
    assert est.refspecs_to_use([usual, "^refs/heads/x", "refs/heads/y"], "origin") == ()
    assert est.refspecs_to_use([usual, tags, "^refs/heads/x"], "origin") == (usual, "^refs/heads/x")
    assert est.refspecs_to_use([heads], "up") == ("+refs/heads/*:refs/remotes/up/*",)
    assert est.covers([usual], "origin", "a/b") and not est.covers([usual, "^refs/heads/a/*"], "origin", "a/b")
    assert not est.covers([usual], "up", "a/b") and not est.covers([heads], "origin", "a")
    assert est.covers(["refs/heads/r-*:refs/remotes/origin/r-*"], "origin", "r-1")
    pulls = "+refs/pull/*/head:refs/remotes/origin/pr/*"
    assert est.is_shared([usual, pulls], "origin", "pr/5") and not est.is_shared([usual, pulls], "origin", "prx/5")
    assert est.is_shared(["refs/heads/b:refs/remotes/origin/a"], "origin", "a")


def test_a_submodule_that_can_not_be_had_is_known_before(setup: Setup) -> None:
    """Its commit was never pushed: of one that is here, of a new one, of one within another."""
    inner, part = setup.module("inner"), setup.module("part")
    setup.git("submodule", "--quiet", "add", str(inner), "inner", cwd=part)
    setup.git("commit", "--quiet", "-m", "x", cwd=part)
    setup.git("submodule", "--quiet", "add", str(part), "sub")
    setup.git("submodule", "--quiet", "update", "--init", "--recursive")
    setup.push()
    assert setup.both("master")[0] == []

    def commit_only_here(place: Path) -> str:
        with (place / "s.txt").open("a") as file:
            file.write("more\n")
        setup.git("commit", "--quiet", "--all", "-m", "x", cwd=place)
        return setup.git("rev-parse", "--short=7", "HEAD", cwd=place)

    name = commit_only_here(setup.seed / "sub" / "inner")
    commit_only_here(setup.seed / "sub")
    setup.git("push", "--quiet", str(part), "HEAD:refs/heads/new", cwd=setup.seed / "sub")
    setup.push()
    lacks = "its remote has no commit {}; push it there, from where it was committed"
    assert setup.both("master")[0] == [f"submodule sub/inner: {lacks.format(name)}"]
    name = commit_only_here(setup.seed / "sub")
    setup.push()
    assert setup.both("master")[0] == [f"submodule sub: {lacks.format(name)}"]

    setup.git("reset", "--quiet", "--hard", setup.fleet.origin.first)
    setup.git("clean", "-ffdxq")
    setup.git("submodule", "--quiet", "add", str(inner), "new")
    name = commit_only_here(setup.seed / "new")
    setup.push()
    setup.here("reset", "--quiet", "--hard", setup.fleet.origin.first)
    for _ in range(2):
        assert setup.both("master")[0] == [f"submodule new: {lacks.format(name)}"]
    # what is left of a clone whose folder went knows it as little
    setup.git("clone", "--quiet", "--bare", str(inner), str(setup.repo / ".git/modules/new"))
    assert setup.both("master")[0] == [f"submodule new: {lacks.format(name)}"]
    setup.git("push", "--quiet", str(inner), "HEAD:refs/heads/new", cwd=setup.seed / "new")
    shutil.rmtree(setup.repo / ".git/modules/new")
    setup.here("clean", "-ffdxq")
    refused, _, result = setup.both("master")
    assert not refused and result["ok"] and (setup.repo / "new/s.txt").read_text() == "one\nmore\n"


def test_a_folder_that_is_no_submodule_is_named(setup: Setup) -> None:
    """A commit of another repository that nobody says the place of; one that was a submodule until now."""
    part = setup.module("part")
    setup.git("clone", "--quiet", str(part), "vendor")
    setup.push()
    nameless = "vendor: a submodule without an entry in .gitmodules"
    for _ in range(2):  # nothing comes any more, and it is as empty as before
        refused, warnings, result = setup.both("master")
        assert not refused and warnings == result["warnings"] == [f"{nameless}, so git leaves its folder as it is"]
    for name in ("sub", "two"):
        setup.git("submodule", "--quiet", "add", str(part), name)
    setup.push()
    assert setup.both("master")[0][0].startswith(f"{nameless}; commit git rm --cached")
    setup.git("rm", "--quiet", "--cached", "vendor")
    shutil.rmtree(setup.seed / "vendor")
    setup.push()
    assert setup.both("master")[1] == []
    setup.git("rm", "--quiet", "--force", "two")
    setup.git("mv", "sub", "renamed")
    setup.push()
    (setup.repo / "two" / "mine").write_text("somebody's")
    _, warnings, result = setup.both("master")
    assert warnings == result["warnings"] == ["no submodule any more, and git leaves its folder: sub, two"]
    assert (setup.repo / "two" / "mine").exists() and (setup.repo / "renamed" / "s.txt").exists()


def test_what_fails_behind_the_move_goes_back(setup: Setup) -> None:
    """A submodule that can't be written, when the branch has moved already: both are what they were, with what was
    changed in them, and nothing of a new one stays."""
    part = setup.module("part")
    setup.git("submodule", "--quiet", "add", str(part), "sub")
    setup.push()
    assert setup.both("master")[0] == []
    before = setup.here("rev-parse", "HEAD")
    for place in (setup.repo, setup.repo / "sub"):
        setup.git("config", "filter.sealed.smudge", "false", cwd=place)
        setup.git("config", "filter.sealed.required", "true", cwd=place)
    inside = Path(setup.git("rev-parse", "--absolute-git-dir", cwd=setup.repo / "sub"))
    (inside / "info").mkdir(exist_ok=True)
    (inside / "info" / "attributes").write_text("new.txt filter=sealed\n")
    (setup.repo / "package.json").write_text("{}")
    (part / "new.txt").write_text("two\n")
    setup.git("add", ".", cwd=part)
    setup.git("commit", "--quiet", "-m", "x", cwd=part)
    setup.git("pull", "--quiet", str(part), "master", cwd=setup.seed / "sub")
    setup.git("submodule", "--quiet", "add", str(setup.module("other")), "another")
    (setup.seed / "a.txt").write_text("new")
    setup.push()
    run = setup.fleet.cli("trigger", "all", "master")
    assert run.code == 1 and "✗ 실패 git submodule update --init --recursive" in run.out, run.out
    assert "nothing changed on 127.0.0.1: it has" in run.err
    assert setup.here("rev-parse", "HEAD") == before and setup.here("branch", "--show-current") == "master"
    assert setup.here("status", "--porcelain") == "M package.json"
    assert setup.here("submodule", "status").startswith(setup.git("rev-parse", "HEAD~1", cwd=part))
    assert (setup.repo / "package.json").read_text() == "{}" and not (setup.repo / "a.txt").exists()
    assert not (setup.repo / "another").exists()
    # where it was to come from is forgotten as well: the next commit may name another place
    assert "submodule.another." not in setup.git("config", "--list", "--name-only", cwd=setup.repo)
    assert "submodule.sub.url" in setup.git("config", "--list", "--name-only", cwd=setup.repo)
    (inside / "info" / "attributes").unlink()
    setup.here("checkout", "--quiet", "package.json")
    assert setup.both("master")[2]["ok"] and (setup.repo / "sub" / "new.txt").exists()
    assert (setup.repo / "another" / "s.txt").exists()


def test_new_line_ends_within_a_submodule_are_written(setup: Setup) -> None:
    """Also of its files that stay what they were; one that is somebody's stays."""
    part = setup.module("part")
    for name in ("run.bat", "mine.bat"):
        (part / name).write_text("one\ntwo\n")
    setup.git("add", ".", cwd=part)
    setup.git("commit", "--quiet", "-m", "x", cwd=part)
    setup.git("submodule", "--quiet", "add", str(part), "sub")
    setup.push()
    assert setup.both("master")[0] == []
    (setup.repo / "sub/mine.bat").write_text("mine\n")
    (part / ".gitattributes").write_text("*.bat eol=crlf\n")
    setup.git("add", ".", cwd=part)
    setup.git("commit", "--quiet", "-m", "x", cwd=part)
    setup.git("pull", "--quiet", str(part), "master", cwd=setup.seed / "sub")
    setup.push()
    assert setup.both("master")[0] == []
    assert (setup.repo / "sub/run.bat").read_bytes() == b"one\r\ntwo\r\n"
    assert (setup.repo / "sub/mine.bat").read_text() == "mine\n"


def holds(file: Path, text: str) -> bool:
    """Whether git has written it: for a moment before that there is no such file."""
    with suppress(FileNotFoundError):
        return file.read_bytes() == text.encode()
    return False


SLOW = 'sh -c "while [ -e ../hold ]; do sleep 0.1; done; cat"'


def test_a_filter_that_hangs_delays_no_cancel(tmp_path: Path) -> None:
    """To make the tree whole runs the same filter again: then that is the next job's, and nothing is ✓ before."""
    clone = Clone(tmp_path)
    for key, value in (("smudge", SLOW), ("clean", "cat"), ("required", "true")):
        clone.git(clone.host, "config", f"filter.slow.{key}", value)
    old = clone.commit({".gitattributes": "z filter=slow\n", "b": "old\n", "z": "old\n"})
    assert clone.deploy().code == 0
    new = clone.commit({"b": "new\n", "z": "new\n"})
    hold, mark = tmp_path / "hold", clone.state / "transit.json"
    hold.touch()
    command = clone.start("master")
    wait_for(lambda: holds(clone.host / "b", "new\n"), "git is in the middle")
    clone.cancel()
    asked = time.monotonic()
    out, _ = command.communicate(timeout=60)
    took_s = time.monotonic() - asked
    assert command.returncode == 1 and f"[{HOST}] ✗ 취소" in out, out
    assert took_s < 10 and mark.exists() and "the tree is half written" in str(clone.job()["warnings"]), (took_s, out)
    command = clone.start("master")
    wait_for(lambda: "restoring what git wrote" in clone.log(2), "the next one makes it whole")
    clone.cancel()
    asked = time.monotonic()
    out, _ = command.communicate(timeout=60)
    took_s = time.monotonic() - asked
    assert f"[{HOST}] ✗ 취소" in out and took_s < 10 and clone.head() == old, (took_s, out)
    hold.unlink()
    assert clone.deploy().code == 0
    assert (clone.head(), clone.dirty(), mark.exists()) == (new, "", False)


@pytest.mark.parametrize("name", ["index", "HEAD", "refs/heads/master", "refs/remotes/origin/master"])
def test_another_git_s_moment_is_waited_for(tmp_path: Path, name: str) -> None:
    """An editor or a prompt that looks at the clone just then holds a lock, and ends no deployment."""
    clone = Clone(tmp_path)
    new = clone.commit({"a": "two\n", "b": "new\n"})
    lock = clone.host / ".git" / f"{name}.lock"
    lock.touch()
    with subprocess.Popen(["git", "hash-object", "--stdin"], cwd=clone.host, stdin=-1, stdout=-3) as other:
        command = clone.start("master")
        wait_for(lambda: "Another git works in this clone: trying again." in clone.log(), "it waits")
        lock.unlink()
        out, _ = command.communicate(timeout=60)
        other.communicate()
    assert command.returncode == 0 and out.count("git fetch origin...") == 1, out
    assert (clone.head(), clone.dirty()) == (new, ""), out


def test_line_ends_that_a_killed_job_left_are_mended(tmp_path: Path) -> None:
    """Killed behind the pull, before it wrote anew what has other attributes by now: git calls the tree clean."""
    clone = Clone(tmp_path)
    old = clone.commit({"run.bat": "one\ntwo\n", "mine.bat": "1\n"})
    assert clone.deploy().code == 0
    new = clone.commit({".gitattributes": "*.bat eol=crlf\n"})
    (clone.host / "mine.bat").write_text("somebody's\n")
    clone.git(clone.host, "pull", "-q")
    mark = {"repo": str(clone.host), "commits": sorted((old, new)), "branch": "master", "from": old}
    more = {"kept": ["mine.bat"], "attributes": True, "submodules": {}, "homes": {}}
    (clone.state / "transit.json").write_text(json.dumps(mark | more))
    assert (clone.host / "run.bat").read_bytes() == b"one\ntwo\n" and clone.dirty() == "M mine.bat"
    assert clone.deploy().code == 0
    assert (clone.host / "run.bat").read_bytes() == b"one\r\ntwo\r\n"
    assert (clone.host / "mine.bat").read_text() == "somebody's\n" and clone.dirty() == "M mine.bat"


def test_a_ref_without_its_commit_is_no_missing_branch(tmp_path: Path) -> None:
    """As git gc --prune=now beside a fetch leaves it: a question that died of it found not nothing, but no answer."""
    clone = Clone(tmp_path)
    assert est.git_output(clone.host, clone.env, "for-each-ref", "refs/heads/side") == b""
    (clone.host / ".git/refs/heads/side").write_text("1" * 40 + "\n")
    with pytest.raises(est.UpdaterError, match="an object of git is missing"):
        est.git_output(clone.host, clone.env, "for-each-ref", "refs/heads/side")
    code, out, err = clone.deploy()
    assert code == 1 and "an object of git is missing" in err and "✗ 실패 git fetch origin" in out, err
    assert f"nothing changed on {HOST}" in err


@pytest.mark.parametrize("files", [2, 1])
def test_a_tree_that_an_ended_git_left_mixed_is_no_success(tmp_path: Path, files: int) -> None:
    """Ended politely it takes its lock with it: only what lies there tells. One file alone may be somebody's."""
    clone = Clone(tmp_path)
    for key, value in (("smudge", SLOW), ("clean", "cat"), ("required", "true")):
        clone.git(clone.host, "config", f"filter.slow.{key}", value)
    first = clone.head()
    (clone.host / "deploy.sh").write_text("echo mine\n")
    changed = {"a": "two\n", "b": "new\n", "c": "new\n"} if files > 1 else {"a": "two\n"}
    clone.commit({**changed, ".gitattributes": "z filter=slow\n", "z": "z\n"}, "side")
    clone.git(clone.host, "fetch", "-q")
    (clone.host / ".git/info/attributes").write_text("z filter=slow\n")
    (tmp_path / "hold").touch()
    with subprocess.Popen(["git", "checkout", "-q", "side"], cwd=clone.host, env=clone.env, stderr=-3) as git:
        wait_for(lambda: (clone.host / list(changed)[-1]).exists(), "git is in the middle")
        wait_for(lambda: holds(clone.host / "a", "two\n"), "git is in the middle")
        git.terminate()
    (tmp_path / "hold").unlink()
    if files == 1:
        (clone.host / ".gitattributes").unlink()
    assert not (clone.host / ".git/index.lock").exists() and clone.head() == first
    code, out, err = clone.deploy()
    if files == 1:
        assert code == 0 and f"[{HOST}] ⚠ local changes stay: a, deploy.sh" in out, out
        return
    assert code == 1 and "✓" not in out and "as they are in " in out and f"nothing changed on {HOST}" in err, out
    hint = re.search(r"hint: (git -C \S+ checkout HEAD -- .*)", out)
    assert hint, out
    subprocess.run(hint[1], shell=True, cwd=tmp_path, env=clone.env, check=True)
    code, out, err = clone.deploy()
    assert code == 0 and f"[{HOST}] ⚠ local changes stay: deploy.sh\n" in out, out
    assert clone.dirty() == "M deploy.sh" and clone.deploy("side").code == 0


def test_no_file_name_is_a_line_of_its_own(tmp_path: Path) -> None:
    """A name may hold anything: in the log, the result and a line to type it stays within its line."""
    clone = Clone(tmp_path)
    name = "x\n[127.0.0.1] ✓ 완료 v9999_9\n\x1b[2J'.txt"
    clone.commit({name: "1"})
    assert clone.deploy().code == 0
    (clone.host / name).write_text("mine")
    out = clone.deploy().out
    assert "⚠ local changes stay: x [127.0.0.1]" in out, out
    shown = clone.log(1)
    assert "v9999_9" in shown and "\n[127.0.0.1] ✓ 완료 v9999_9\n" not in shown and "\x1b" not in shown, shown
    typed = est.typed("printf", "%s", name)
    assert "\n" not in typed
    said = subprocess.run(["bash", "-c", typed], stdout=-1, check=True).stdout.decode()
    assert said == name and est.typed("a b") == "'a b'"


def test_what_can_not_be_replaced_is_known_before(setup: Setup) -> None:
    """A file that nobody may change, a folder, a file that is mounted: git would stop with the rest written."""
    need("chattr")
    setup.fleet.origin.commit({"a": "1", "d/x": "1"})
    assert setup.both("master")[0] == []
    setup.fleet.origin.commit({"a": "2", "d/x": "2", "d/e/y": "2", "b": "2"})
    for name, pin, free in (
        ("a", ["chattr", "+i"], ["chattr", "-i"]),
        ("d", ["chattr", "+i"], ["chattr", "-i"]),
        ("a", ["mount", "--bind", str(setup.repo / "d/x")], ["umount"]),
    ):
        place = str(setup.repo / name)
        if subprocess.run([*pin, place], stderr=-1, check=False).returncode:
            unavailable(f"{pin[0]} does not work here")
        try:
            refused, _, _ = setup.both("master")
        finally:
            subprocess.run([*free, place], check=True)
        assert len(refused) == 1, refused
        assert refused[0].startswith(f"what the commit changes can't be changed here: {name}; ls -ld {place}")
    assert setup.both("master")[2]["ok"]


def test_what_is_pushed_after_the_look_does_not_come(setup: Setup, tmp_path: Path) -> None:
    """Between fetch and merge somebody pushes: what nobody has judged would open the doors, and overwrite a file that
    git ignores. Nor do the merge options of the branch decide."""
    script, count = tmp_path / "upload-pack", tmp_path / "count"
    setup.here("config", "branch.master.mergeOptions", "--squash")
    (setup.seed / ".gitignore").write_text("kept.txt\n")
    setup.push()
    assert setup.both("master")[2]["ok"]
    (setup.repo / "kept.txt").write_text("somebody's")
    settings = json.loads((setup.seed / "config" / "updater.json").read_text())
    (setup.seed / "side.txt").write_text("1")
    setup.push()
    looked_at = setup.git("rev-parse", "HEAD")
    (setup.seed / "config" / "updater.json").write_text(json.dumps(settings | {"whitelist": ["0.0.0.0/0"]}))
    (setup.seed / "kept.txt").write_text("the remote's")
    setup.git("add", "--force", "kept.txt")
    setup.push()
    newest, bare = setup.git("rev-parse", "HEAD"), setup.fleet.origin.bare
    setup.git("update-ref", "refs/heads/master", looked_at, cwd=bare)
    push = f"git -C {bare} update-ref refs/heads/master {newest}"
    script.write_text(f'#!/bin/sh\ngit-upload-pack "$@"\ncode=$?\necho x >>{count}\n{push}\nexit $code\n')
    script.chmod(0o755)
    setup.here("config", "remote.origin.uploadpack", str(script))
    run = setup.fleet.cli("trigger", "all", "master")
    assert run.code == 0 and count.read_text() == "x\n", run
    assert setup.here("rev-parse", "HEAD") == looked_at, run.out
    assert (setup.repo / "kept.txt").read_text() == "somebody's"
    again = setup.fleet.cli("trigger", "all", "master")
    assert again.code == 5 and setup.here("rev-parse", "HEAD") == looked_at, again


def test_a_command_that_moves_head_is_told(setup: Setup) -> None:
    (setup.seed / "deploy.sh").write_text("git checkout -q --detach HEAD~1\n")
    setup.push()
    before, after = setup.git("rev-parse", "--short=7", "HEAD"), setup.git("rev-parse", "--short=7", "HEAD~1")
    _, _, result = setup.both("master")
    assert result["warnings"] == [f"HEAD was {before} before the command, and is {after} now"], result


def test_a_clone_that_git_can_not_read_is_said_to_be_unchanged(setup: Setup) -> None:
    """Its HEAD was emptied by a power loss, or is no file: nobody waits for it, and the last line says what it has."""
    head = setup.repo / ".git" / "HEAD"
    head.write_text("")
    run = setup.fleet.cli("trigger", "all", "master")
    assert run.code == 1 and "nothing changed on 127.0.0.1: it has v0301_4\n" in run.err, run.err
    head.unlink()
    os.mkfifo(head)
    assert est.read_branch(setup.repo) is None
    head.unlink()
    head.write_text("ref: refs/heads/master\n")
    assert setup.both("master")[2]["ok"]


def test_git_looks_whether_to_tidy_up_where_there_may_be_something_to_do(tmp_path: Path) -> None:
    clone = Clone(tmp_path)
    trace = clone.folder / "trace"
    clone.git(clone.folder, "config", "--global", "trace2.normalTarget", str(trace))

    def looks() -> bool:
        """Whether git does at a deployment."""
        trace.unlink(missing_ok=True)
        assert clone.deploy().code == 0, clone.log()
        text = trace.read_text()
        assert "fetch --prune" in text and "git-upload-pack" in text, text
        return "git maintenance run" in text or "git gc" in text

    assert not looks(), "a clone of a few objects"
    loose = clone.host / ".git/objects/17"
    loose.mkdir(exist_ok=True)
    for number in range(13):
        (loose / f"{number:038x}").touch()
    assert looks(), "half of what git begins at"
    shutil.rmtree(loose)
    assert not looks()
    for number in range(25):
        (clone.host / f".git/objects/pack/pack-{number:040x}.pack").touch()
    assert looks(), "packs"
    for pack in (clone.host / ".git/objects/pack").glob(f"pack-{0:030x}*"):
        pack.unlink()
    assert not looks()
    clone.git(clone.host, "config", "gc.auto", "1")
    assert looks(), "somebody's own setting"


def test_a_name_that_no_file_can_have_is_known_before(setup: Setup) -> None:
    """git would find out when it has written a part; a commit that takes the name away again can come."""
    entry = f"100644,{setup.git('rev-parse', 'HEAD:deploy.sh')},d/{'x' * 300}"
    setup.git("update-index", "--add", "--cacheinfo", entry)
    setup.git("commit", "--quiet", "-m", "x")
    setup.git("push", "--quiet", "origin", "HEAD:master")
    refused, _, _ = setup.both("master")
    assert len(refused) == 1 and refused[0].startswith("no file of this host can be called as the commit says: d/xxx")
    setup.push()
    assert setup.both("master")[2]["ok"]


def test_a_relative_submodule_counts_from_the_branch_s_remote(setup: Setup) -> None:
    """That is git's own way, whatever remote is deployed from: the plan has to look in the same place."""
    part, elsewhere = setup.module("part"), setup.folder / "elsewhere"
    setup.git("submodule", "--quiet", "add", str(part), "sub")
    setup.git("config", "-f", ".gitmodules", "submodule.sub.url", "../part")
    setup.push()
    shutil.copytree(setup.fleet.origin.bare, elsewhere / "origin.git")
    setup.here("remote", "add", "up", str(elsewhere / "origin.git"))
    setup.here("config", "branch.master.remote", "up")
    refused, _, _ = setup.both("master")
    assert len(refused) == 1 and f"git ls-remote {elsewhere}/part says why" in refused[0], refused
    shutil.copytree(part, elsewhere / "part")
    assert setup.both("master")[2]["ok"]


def store(setup: Setup, place: Path, name: str, text: bytes) -> None:
    """Commit a file as it is, whatever .gitattributes says, as a git that knew nothing of that did."""
    raw = place / "raw"
    raw.write_bytes(text)
    blob = setup.git("hash-object", "-w", "--no-filters", "raw", cwd=place)
    raw.unlink()
    setup.git("update-index", "--add", "--cacheinfo", f"100644,{blob},{name}", cwd=place)
    setup.git("commit", "--quiet", "-m", "x", cwd=place)


def test_a_file_that_git_alone_calls_changed_holds_up_nothing(setup: Setup) -> None:
    """Line ends that were committed against .gitattributes: no stash ends that, so no host would get past it. What is
    somebody's is kept all the same, in a submodule too."""
    part, seed = setup.module("part"), setup.seed
    for place in (part, seed):
        (place / ".gitattributes").write_text("*.txt text\n")
        setup.git("add", ".gitattributes", cwd=place)
        store(setup, place, "old.txt", b"1\r\n")
        store(setup, place, "mine.txt", b"1\r\n")
    setup.git("config", "--global", "core.safecrlf", "false")
    setup.git("submodule", "--quiet", "add", str(part), "sub")
    setup.git("commit", "--quiet", "-m", "sub")
    setup.git("push", "--quiet", "origin", "master")
    setup.both("master")

    def told() -> list[str]:
        for place in (setup.repo, setup.repo / "sub"):
            os.utime(place / "old.txt", (1, 1))
            os.utime(place / "mine.txt", (1, 1))
        assert "M old.txt" in setup.here("status", "--porcelain"), "git itself says so"
        refused, warnings, result = setup.both("master")
        return [*refused, *warnings, *result["warnings"]]

    assert told() == []
    store(setup, seed, "old.txt", b"2\r\n")
    store(setup, part, "old.txt", b"2\r\n")
    setup.git("fetch", "--quiet", str(part), "master", cwd=seed / "sub")
    setup.git("checkout", "--quiet", "--force", "FETCH_HEAD", cwd=seed / "sub")
    setup.git("add", "sub")
    setup.git("commit", "--quiet", "-m", "x")
    setup.git("push", "--quiet", "origin", "master")
    assert told() == []
    for place in (setup.repo, setup.repo / "sub"):
        assert (place / "old.txt").read_bytes() == b"2\r\n"
    (setup.repo / "mine.txt").write_bytes(b"mine\r\n")
    assert told() == ["local changes stay: mine.txt"]
    (setup.repo / "old.txt").chmod(0o755)  # the content is the commit's, and the file is not
    assert "local changes stay: mine.txt, old.txt" in told()[0]
    store(setup, seed, "old.txt", b"3\r\n")
    setup.git("push", "--quiet", "origin", "master")
    refused = setup.plan("master")[1]["refused"]
    assert refused[0].startswith("local changes are in the way of the incoming commits: old.txt; "), refused


def test_what_is_changed_in_a_submodule_is_named_whatever_hides_it(setup: Setup) -> None:
    """.gitmodules may tell git to say nothing of it, or somebody git to take it for unchanged."""
    part, seed = setup.module("part"), setup.seed
    setup.git("submodule", "--quiet", "add", str(part), "sub")
    setup.git("config", "--file", ".gitmodules", "submodule.sub.ignore", "all")
    setup.push()
    setup.both("master")
    sub = setup.repo / "sub"
    (sub / "s.txt").write_text("mine\n")
    assert setup.here("status", "--porcelain") == ""
    assert setup.both("master")[2]["warnings"] == ["local changes stay: sub"]
    setup.git("update-index", "--assume-unchanged", "s.txt", cwd=sub)
    refused, warnings, result = setup.both("master")
    hidden = "git status hides that these are changed: sub/s.txt; "
    assert (refused, len(warnings)) == ([], 1) and warnings[0].startswith(hidden)
    assert result["warnings"] == [*warnings, "local changes stay: sub/s.txt"]
    way_out = re.search(r"; (git .*) ends that", warnings[0])
    assert way_out and way_out[1].startswith(f"git -C {sub} ")
    (part / "s.txt").write_text("two\n")
    setup.git("commit", "--quiet", "-a", "-m", "x", cwd=part)
    setup.git("pull", "--quiet", str(part), "master", cwd=seed / "sub")
    setup.git("add", "--force", "sub")
    setup.push()
    refused, _, _ = setup.both("master")
    assert len(refused) == 1 and "local changes in submodule sub are in the way: s.txt" in refused[0]
    subprocess.run(way_out[1], shell=True, cwd=setup.folder, env=setup.fleet.env, check=True)
    setup.git("checkout", "--quiet", "s.txt", cwd=sub)
    assert setup.both("master")[0] == [] and (sub / "s.txt").read_text() == "two\n"


@pytest.mark.parametrize("what", ["rm deploy.sh", "git update-index --assume-unchanged a; echo hid > a"])
def test_what_a_hook_changes_is_no_success_and_not_nothing(setup: Setup, what: str) -> None:
    (setup.seed / "a").write_text("one\n")
    setup.push()
    setup.both("master")
    hook = setup.repo / ".git" / "hooks" / "post-merge"
    hook.parent.mkdir(exist_ok=True)
    hook.write_text(f"#!/bin/sh\n{what}\n")
    hook.chmod(0o755)
    (setup.seed / "a").write_text("two\n")
    setup.push()
    run = setup.fleet.cli("trigger", "all", "master", "--json")
    result = next(event for event in run.events if event["event"] == "result")
    assert run.code == 1 and result["error"].startswith("not what the commit says: "), result
    assert result["changed"], "a file is not what it was"
    hook.unlink()
    setup.here("update-index", "--no-assume-unchanged", "a")
    setup.here("checkout", "--quiet", "HEAD", "--", ".")
    assert setup.both("master")[2]["warnings"] == []


def test_each_of_git_s_two_ways_writes_what_the_attributes_say(setup: Setup) -> None:
    """From another branch to the local one, and on to the remote's: what the first one wrote, only the second one's
    attributes say how; and what git alone calls changed on the way holds up nothing."""
    setup.git("config", "--global", "core.safecrlf", "false")
    setup.git("switch", "--quiet", "--create", "rel")
    for name in ("new.txt", "same.txt"):
        (setup.seed / name).write_text("rel\n")
    (setup.seed / ".gitattributes").write_text("*.old text\n")
    setup.git("add", "--all")
    store(setup, setup.seed, "x.old", b"1\r\n")
    setup.git("push", "--quiet", "origin", "rel")
    setup.git("switch", "--quiet", "master")
    (setup.seed / "same.txt").write_text("master\n")
    setup.push()
    setup.both("rel")
    setup.both("master")
    setup.git("switch", "--quiet", "--force", "rel")
    (setup.seed / ".gitattributes").write_text("*.txt eol=crlf\n*.old text\n")
    setup.git("add", ".gitattributes")
    store(setup, setup.seed, "x.old", b"2\r\n")
    setup.git("push", "--quiet", "origin", "rel")
    refused, warnings, result = setup.both("rel")
    assert (refused, warnings, result["warnings"]) == ([], [], [])
    found = {name: (setup.repo / name).read_bytes() for name in ("new.txt", "same.txt", "x.old")}
    assert found == {"new.txt": b"rel\r\n", "same.txt": b"rel\r\n", "x.old": b"2\r\n"}
