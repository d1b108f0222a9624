"""What a ✓ says is what is in the tree: whatever git's settings are, however an earlier job ended."""

from __future__ import annotations

import copy
import functools
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings, strategies as st

from tests import seam as est
from tests.fleet import PROGRAM, ROOT, Result, mounted, processes_of, run, unavailable, wait_for

HOST = "127.0.0.1"
COMMAND = {"deploy": {"command": ["sh", "deploy.sh"], "timeout": 60}}
SLOW = 'sh -c "while [ -e ../hold ]; do sleep 0.1; done; cat"'


class Clone:
    """An origin, whoever commits to it, and the host's clone, deployed by hand: no daemon is there."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.host, self.state = folder, folder / "host", folder / "state"
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("GIT_", "ESTELLE_"))}
        self.env = {**kept, "GIT_CONFIG_GLOBAL": str(folder / ".gitconfig"), "HOME": str(folder), "LC_ALL": "C"}
        for key, value in (("user.name", "x"), ("user.email", "x@y"), ("protocol.file.allow", "always")):
            self.git(folder, "config", "--global", key, value)
        self.git(folder, "init", "-q", "--bare", "-b", "master", "origin")
        self.git(folder, "clone", "-q", "origin", "seed")
        config = {"masterUrl": "ws://127.0.0.1:9900", "whitelist": [HOST], **COMMAND}
        self.commit({"config/updater.json": json.dumps(config), "deploy.sh": "echo deploying\n", "a": "one\n"})
        self.git(folder, "clone", "-q", "origin", "host")

    def git(self, where: Path, *args: str) -> str:
        argv = ["git", *args]
        done = subprocess.run(argv, cwd=where, env=self.env, check=True, stdout=-1, stderr=-3, timeout=60, text=True)
        return done.stdout.strip()

    def commit(self, files: dict[str, str], branch: str = "master") -> str:
        """A commit on top of what the seed has, pushed as `branch`."""
        seed = self.folder / "seed"
        for name, text in files.items():
            (seed / name).parent.mkdir(parents=True, exist_ok=True)
            (seed / name).write_text(text)
        self.git(seed, "add", "-A")
        self.git(seed, "commit", "-qm", "x", "--allow-empty")
        self.git(seed, "push", "-q", "origin", f"HEAD:refs/heads/{branch}")
        return self.git(seed, "rev-parse", "HEAD")

    def start(self, branch: str) -> subprocess.Popen[str]:
        words = ["--state", str(self.state), "--bind", HOST, "deploy", branch]
        argv = [*PROGRAM, *words]
        return subprocess.Popen(argv, cwd=self.host, env=self.env, stdout=-1, stderr=-1, text=True)

    def deploy(self, branch: str = "master") -> Result:
        with self.start(branch) as command:
            out, err = command.communicate(timeout=90)
        return Result(command.returncode, out, err)

    def deploy_with(self, command: list[str]) -> Result:
        """Deploy a commit that has another command."""
        config = json.loads((self.folder / "seed/config/updater.json").read_text())
        self.commit({"config/updater.json": json.dumps(config | {"deploy": {"command": command}})})
        return self.deploy()

    def second(self) -> Clone:
        """The same host with another state folder, as another user's daemon."""
        other = copy.copy(self)
        other.state = self.folder / "state2"
        return other

    def log(self, at: int = 0) -> str:
        """The log of a job, the first one by default; nothing before it begins."""
        files = sorted((self.state / "runs").glob(f"*/{HOST}.log"), key=lambda file: file.stat().st_ctime_ns)
        return "".join(file.read_text() for file in files[at : at + 1])

    def job(self) -> dict[str, object]:
        """The newest job's record."""
        files = sorted((self.state / "runs").glob(f"*/{HOST}.json"), key=lambda file: file.stat().st_mtime_ns)
        found: dict[str, object] = json.loads(files[-1].read_text())
        return found

    def cancel(self) -> None:
        """The newest job, as its daemon tells the runner."""
        (self.state / "runs" / str(self.job()["run"]) / f"{HOST}.cancel").touch()

    def head(self) -> str:
        return self.git(self.host, "rev-parse", "HEAD")

    def dirty(self) -> str:
        return self.git(self.host, "status", "--porcelain")


@pytest.fixture
def clone(tmp_path: Path) -> Clone:
    return Clone(tmp_path)


def test_personal_settings_decide_nothing_and_nothing_changes_on_a_failure(clone: Clone):
    first = clone.head()
    settings = ("merge.autoStash=true", "rebase.autoStash=true", "pull.rebase=true", "merge.verifySignatures=true")
    for setting in (*settings, "branch.autoSetupRebase=always", "submodule.recurse=true", "color.ui=always"):
        clone.git(clone.folder, "config", "--global", *setting.split("="))
    (clone.host / "a").write_text("mine\n")
    new = clone.commit({"a": "two\n", "결제/새.txt": "new\n"})
    code, out, err = clone.deploy()
    assert (code, clone.head(), (clone.host / "a").read_text()) == (1, first, "mine\n")
    assert f"[{HOST}] ⚠ local changes stay: a\n" in out
    assert f"nothing changed on {HOST}: it has {first[:7]}\n" in err
    assert "local changes are in the way" in err
    assert (clone.job()["changed"], clone.job()["began_command"]) == (False, False)
    clone.git(clone.host, "checkout", "-q", "a")
    assert clone.deploy().code == 0 and (clone.head(), clone.dirty()) == (new, "")
    job = clone.job()
    assert (job["before"], job["changed"], job["began_command"], job["warnings"]) == (first, True, True, [])
    (clone.host / "결제/새.txt").write_text("mine\n")
    code, out, _ = clone.deploy()
    assert code == 0 and f"[{HOST}] ⚠ local changes stay: 결제/새.txt\n" in out


def test_git_says_what_is_there_whatever_a_person_set(clone: Clone):
    hook = clone.folder / "watch"
    hook.write_text("#!/bin/sh\nprintf 'nothing\\0'\n")
    hook.chmod(0o755)
    settings = ("color.grep=always", "grep.lineNumber=true", "grep.column=true", f"core.fsmonitor={hook}")
    for setting in settings:
        clone.git(clone.folder, "config", "--global", *setting.split("="))
    # a strategy that merges where no merge is allowed, and a list that is gone
    for setting in ("pull.twohead=ours", "diff.orderFile=/nowhere"):
        clone.git(clone.host, "config", *setting.split("="))
    # options of one branch, and another content in place of what was pushed
    clone.git(clone.host, "config", "branch.master.mergeOptions", "--squash")
    clone.git(clone.host, "status")
    new = clone.commit({"a": "two\n"})
    clone.git(clone.host, "fetch", "-q")
    clone.git(clone.host, "replace", new, clone.head())
    assert clone.deploy().code == 0 and (clone.head(), (clone.host / "a").read_text()) == (new, "two\n")
    (clone.host / "a").write_text("mine\n")  # which the watcher does not tell
    assert f"[{HOST}] ⚠ local changes stay: a\n" in clone.deploy().out
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
    clone.commit({".gitattributes": "*.bin filter=lfs\n", "x.bin": pointer})
    code, _, err = clone.deploy()
    assert code == 1 and "files are only LFS pointers: x.bin" in err and f"nothing changed on {HOST}" in err


def test_what_git_ignores_is_somebodys_too(clone: Clone):
    """git overwrites an ignored file, and removes a folder of them, without a word."""
    host, seed = clone.host, clone.folder / "seed"
    clone.commit(
        {".gitignore": ".env\nuploads/\nkept/*\n!kept/.keep\nsame\nlib/build\n", "kept/.keep": "", "lib/x": "1"}
    )
    assert clone.deploy().code == 0
    old = clone.head()
    mine = {".env": "SECRET=1\n", "uploads/photo": "photo\n", "kept/photo": "photo\n", "lib/build": "build\n"}
    for name, text in (mine | {"same": "alike\n"}).items():
        (host / name).parent.mkdir(exist_ok=True)
        (host / name).write_text(text)
    clone.git(seed, "rm", "-rq", "kept")
    for name in ("uploads", "kept"):
        (seed / name).symlink_to("/data")
    (seed / ".gitignore").unlink()
    new = clone.commit({".env": "SECRET=example\n", "same": "alike\n"})
    code, out, err = clone.deploy()
    assert (code, clone.head()) == (1, old) and f"nothing changed on {HOST}" in err, out
    assert "git ignores what is here, and would overwrite it: .env, kept/photo, uploads/\n" in out
    for name, text in mine.items():
        assert (host / name).read_text() == text
    assert typed_hint(clone)
    code, out, _ = clone.deploy()
    assert (code, clone.head()) == (0, new), out
    kept = clone.folder / "host.kept"
    assert {path.name for path in kept.iterdir()} == {".env", "kept", "uploads"}
    assert (kept / "kept/photo").read_text() == "photo\n", "under its own name: another photo may follow"
    # files become a submodule: what was built there is in its way
    part = clone.folder / "part"
    clone.git(clone.folder, "clone", "-q", "origin", str(part))
    clone.git(seed, "rm", "-rqf", "lib")
    clone.git(seed, "submodule", "add", "-q", str(clone.folder / "origin"), "lib")
    clone.commit({})
    code, out, _ = clone.deploy()
    assert code == 1 and "lib becomes a submodule, and this is in its folder: lib/build\n" in out
    assert clone.head() == new and typed_hint(clone)
    assert clone.deploy().code == 0 and (host / "lib/a").exists()
    # and files again
    clone.git(seed, "rm", "-qf", "lib")
    shutil.rmtree(seed / ".git/modules/lib")
    new = clone.commit({"lib/a": "files\n"})
    code, out, _ = clone.deploy()
    assert code == 1 and "lib is a clone of its own here, and a folder of files in that commit\n" in out
    assert typed_hint(clone)
    assert clone.deploy().code == 0 and (clone.head(), (host / "lib/a").read_text()) == (new, "files\n")


def test_a_file_that_git_takes_for_unchanged_is_named(clone: Clone):
    """Another content, another kind, or gone: a tree that is not the commit is told, with what hides it from git."""
    place = clone.host / "a"

    def replaced(by: Callable[[], object]) -> Callable[[], None]:
        def change() -> None:
            place.unlink()
            by()

        return change

    changes: list[Callable[[], object]] = [
        lambda: place.write_text("mine\n"),
        place.unlink,
        replaced(lambda: place.symlink_to("deploy.sh")),
        replaced(place.mkdir),
    ]
    for number, change in enumerate(changes):
        option = ("--assume-unchanged", "--skip-worktree")[number % 2]
        clone.git(clone.host, "update-index", option, "a")
        if number < 2:
            assert "⚠" not in clone.deploy().out
        change()
        assert clone.dirty() == ""
        out = clone.deploy().out
        assert f"[{HOST}] ⚠ local changes stay: a\n" in out, out
        told = re.search(r"⚠ git status hides that these are changed: a; (git .*) ends that\n", out)
        assert told, out
        subprocess.run(told[1], shell=True, cwd=clone.folder, env=clone.env, check=True)
        assert clone.dirty()
        if place.is_dir():
            place.rmdir()
        clone.git(clone.host, "checkout", "-q", "a")
    tree = est.WorkTree(clone.host, clone.env, submodules=False)
    clone.git(clone.host, "update-index", "--chmod=+x", "a")
    clone.git(clone.host, "update-index", "--assume-unchanged", "a")
    for keeps, found in (("false", {}), ("true", {"a": " M"})):
        clone.git(clone.host, "config", "core.fileMode", keeps)
        assert tree.find_hidden() == found, "git may know of no modes here"
    clone.git(clone.host, "update-index", "--no-assume-unchanged", "a")
    clone.git(clone.host, "reset", "-q", "--hard")
    clone.git(clone.host, "update-index", "--skip-worktree", "a")
    clone.git(clone.host, "config", "core.sparseCheckout", "true")
    place.unlink()
    assert "⚠" not in clone.deploy().out, "left out of a sparse checkout"


def test_a_configuration_may_get_its_other_form(clone: Clone):
    """`config convert`, committed: who was started with the old name goes on with the new one."""
    seed, text = clone.folder / "seed", 'masterUrl = "ws://127.0.0.1:9900"\nwhitelist = ["127.0.0.1"]\n'
    daemon = est.ConfigFile(clone.host / "config/updater.json", est.StateFolder(clone.state))
    (seed / "config/updater.json").unlink()
    new = clone.commit({"config/updater.toml": text + '[deploy]\ncommand = ["sh", "-c", "echo other form"]\n'})
    code, out, err = clone.deploy()
    assert (code, clone.head()) == (0, new) and "other form\n" in out, err
    wait_for(daemon.reload, "the daemon sees it")
    assert daemon.problem is None and daemon.config.deploy.command[-1] == "echo other form"
    (clone.host / "config/updater.toml").write_text("whitelist = 1")
    wait_for(lambda: daemon.reload() or daemon.problem, "and that it is wrong")
    assert daemon.config.deploy.command[-1] == "echo other form", "the last valid one stays"


@pytest.mark.parametrize("begun", ["rebase", "bisect"])
def test_a_branch_that_is_kept_in_another_tree_is_known_before(clone: Clone, begun: str):
    """git keeps the branch until it is ended there, and calls the tree detached meanwhile."""
    other, first = clone.folder / "o t", clone.head()
    clone.git(clone.host, "checkout", "-q", "--detach")
    clone.git(clone.host, "worktree", "add", "-q", str(other), "master")
    new = clone.commit({"b": "1"})
    if begun == "bisect":
        clone.git(other, "bisect", "start")
        clone.git(other, "checkout", "-q", "--detach")
    else:
        argv = ["git", "-c", "sequence.editor=echo break >", "rebase", "-q", "-i", "HEAD"]
        subprocess.run(argv, cwd=other, env=clone.env, check=True, timeout=60)
    code, out, err = clone.deploy()
    assert (code, clone.head()) == (1, first) and f"nothing changed on {HOST}" in err
    assert f"hint: git -C '{other}' status, and end the {begun} that was begun there\n" in out
    assert "git checkout master...\n" not in out, "known before git was asked to do it"
    clone.git(other, begun, *(["reset"] if begun == "bisect" else ["--abort"]))
    clone.git(other, "checkout", "-q", "--detach")
    code, out, err = clone.deploy()
    assert (code, clone.head()) == (0, new), out + err


def test_only_what_stays_is_said_to_stay(clone: Clone):
    clone.commit({"b": "one\n", "c": "one\n"})
    assert clone.deploy().code == 0
    (clone.host / "a").unlink()
    (clone.host / "b").write_text("mine\n")
    (clone.host / "c").write_text("two\n")
    clone.git(clone.host, "add", "c")
    new = clone.commit({"a": "two\n", "c": "two\n"})
    code, out, _ = clone.deploy()
    assert (code, clone.head(), (clone.host / "a").read_text()) == (0, new, "two\n")
    assert f"[{HOST}] ⚠ local changes stay: b\n" in out and "As the commit has it by now: a, c\n" in out
    assert clone.job()["warnings"] == ["local changes stay: b"]


def test_a_new_submodule_that_can_not_be_read_is_known_before(clone: Clone):
    old, seed = clone.head(), clone.folder / "seed"
    clone.git(clone.folder, "clone", "-q", "--bare", "origin", "part")
    clone.git(seed, "submodule", "add", "-q", str(clone.folder / "part"), "lib")
    new = clone.commit({})
    (clone.folder / "part").rename(clone.folder / "away")
    code, out, err = clone.deploy()
    assert (code, clone.head()) == (1, old) and "submodule lib: its remote can't be read" in err, out
    assert f"nothing changed on {HOST}" in err
    (clone.folder / "away").rename(clone.folder / "part")
    assert clone.deploy().code == 0 and (clone.head(), (clone.host / "lib/a").exists()) == (new, True)


def test_a_hook_that_fetches_takes_nothing_from_the_result(clone: Clone):
    clone.commit({"side": "1"}, "side")
    hook = clone.host / ".git" / "hooks" / "post-merge"
    hook.parent.mkdir(exist_ok=True)
    hook.write_text("#!/bin/sh\ngit fetch -q origin side\n")
    hook.chmod(0o755)
    clone.git(clone.folder / "seed", "reset", "-q", "--hard", "HEAD~1")
    new = clone.commit({"a": "two\n"})
    code, _, err = clone.deploy()
    assert (code, clone.head()) == (0, new), err


def test_a_clone_whose_files_are_elsewhere_is_none(clone: Clone):
    """As after `cp -a` of a clone that had its files in another folder than its .git."""
    clone.commit({"a": "two\n"})
    (clone.folder / "elsewhere").mkdir()
    clone.git(clone.host, "config", "core.worktree", str(clone.folder / "elsewhere"))
    code, _, err = clone.deploy()
    assert code == 1 and f"git keeps the files of {clone.host} elsewhere" in err
    assert not any((clone.folder / "elsewhere").iterdir())
    assert typed_hint(clone) and clone.deploy().code == 0
    assert (clone.host / "a").read_text() == "two\n"


def typed_hint(clone: Clone) -> bool:
    """Type the newest job's advice, as it is printed."""
    log = max((clone.state / "runs").glob(f"*/{HOST}.log"), key=lambda file: file.stat().st_mtime_ns)
    hint = log.read_text().split("hint: ")[-1].splitlines()[0]
    line = re.sub(r".*(?:then: |as HEAD has them: |keep it: |by such a line: )", "", hint)
    subprocess.run(line, shell=True, check=True, cwd="/", env=clone.env, stdout=-3, stderr=-3, timeout=60)
    return True


@pytest.mark.parametrize("begun", ["merge", "revert", "cherry-pick", "rebase", "am", "stash"])
def test_what_somebody_began_is_ended_by_the_line_to_type(clone: Clone, begun: str):
    old, host = clone.head(), clone.host
    clone.commit({"a": "two\n"})
    new = clone.commit({"a": "three\n"})
    clone.git(host, "pull", "-q")
    (host / "a").write_text("mine\n")
    patch = clone.folder / "patch"
    patch.write_text(clone.git(host, "format-patch", "-1", "--stdout", "HEAD~1") + "\n")
    lines = {
        "merge": f"git checkout -qfb own {old}; echo own > a; git commit -qam own; git merge -q {new}",
        "revert": "git checkout -q a; git revert HEAD~1",
        "cherry-pick": "git checkout -q a; git cherry-pick HEAD~1",
        "rebase": f"git checkout -qfb own {old}; echo own > a; git commit -qam own; git rebase -q {new}",
        "am": f"git checkout -q a; git am -3 {patch}",
        "stash": f"git stash -q; git checkout -q {old}; git stash pop -q",
    }
    subprocess.run(lines[begun], shell=True, cwd=host, env=clone.env, stdout=-3, stderr=-3, timeout=60)
    if "UU a" not in clone.dirty() and "AA a" not in clone.dirty():
        pytest.fail(f"nothing is unmerged: {clone.dirty()}")
    code, _, err = clone.deploy()
    assert code == 1 and "a" in err
    assert typed_hint(clone)
    code, out, err = clone.deploy()
    assert (code, clone.head(), (host / "a").read_text()) == (0, new, "three\n"), out + err
    if begun == "stash":
        assert "mine" in clone.git(host, "stash", "show", "-p"), "nothing of somebody's is lost"


def begin_to_write(clone: Clone) -> tuple[str, subprocess.Popen[str]]:
    """A commit, and the command that deploys it: its git is in the middle of several files, until `hold` is gone."""
    for key, value in (("smudge", SLOW), ("clean", "cat"), ("required", "true")):
        clone.git(clone.host, "config", f"filter.slow.{key}", value)
    new = clone.commit({"a": "two\n", "b": "new\n", "c/d": "new\n", ".gitattributes": "z filter=slow\n", "z": "z\n"})
    (clone.host / "own").write_text("mine\n")
    hold = clone.folder / "hold"
    hold.touch()
    command = clone.start("master")
    wait_for(lambda: (clone.host / "c/d").exists(), "git is in the middle")
    wait_for(lambda: clone.job()["open_step"], "the step is recorded")
    return new, command


def test_a_tree_that_git_left_half_written_is_made_whole(clone: Clone):
    """The runner and its git are killed while a file of several is being written."""
    first = clone.head()
    new, command = begin_to_write(clone)
    kill_runner(clone, command)
    (clone.folder / "hold").unlink()
    assert (clone.head(), (clone.state / "transit.json").exists()) == (first, True)
    assert clone.dirty() != "?? own"
    (clone.host / "b").write_text("theirs\n")
    code, out, err = clone.deploy()
    assert code == 1 and "neither old nor new: b" in err and f"mv -i {clone.host}/b " in out
    assert (clone.host / "b").read_text() == "theirs\n" and not (clone.host / "c").exists()
    (clone.host / "b").write_text("ne")  # the beginning of what git was writing
    assert clone.deploy().code == 0
    assert (clone.head(), clone.dirty(), (clone.state / "transit.json").exists()) == (new, "?? own", False)


def test_a_folder_of_the_commit_is_nobody_s_file(clone: Clone):
    """In its place a file is to come, by way of another branch; git was killed on that way."""
    clone.commit({"x": "a file\n"}, "rel")
    clone.git(clone.folder / "seed", "rm", "-q", "x")
    clone.commit({"x/in": "a folder\n"})
    assert clone.deploy("rel").code == 0 and clone.deploy().code == 0
    tree = est.WorkTree(clone.host, clone.env, submodules=True)
    mark = tree.begin_transit(["HEAD", "rel"], ())
    clone.git(clone.host, "checkout", "-q", "rel")
    (clone.host / "x").unlink()
    assert tree.restore(mark["commits"], mark["kept"]) == []
    assert (clone.host / "x").read_text() == "a file\n"


@pytest.mark.parametrize("branch", ["master", "side"])
def test_a_tree_that_another_daemon_left_half_written_is_made_whole(clone: Clone, branch: str):
    """The mark is in the other's state folder; what is in this clone is the lock of the git that was killed."""
    first = clone.head()
    side = clone.commit({"side": "1"}, "side")
    clone.git(clone.folder / "seed", "reset", "-q", "--hard", first)
    new, command = begin_to_write(clone)
    # the gits at once, as when the power fails: one that ends by itself takes its lock with it
    [runner] = (int(pid) for pid in os.listdir("/proc") if pid.isdigit() and runs_job(int(pid), str(clone.state)))
    os.kill(runner, signal.SIGSTOP)
    for pid, words in processes_of(clone.folder).items():
        if re.match(r"\S*git ", words):
            os.kill(pid, signal.SIGKILL)
    kill_runner(clone, command)
    (clone.folder / "hold").unlink()
    assert clone.head() == first and clone.dirty() != "?? own" and (clone.host / ".git/index.lock").exists()
    (clone.host / "b").write_text("theirs\n")
    other = clone.second()
    code, out, err = other.deploy(branch)
    assert code == 1 and "neither old nor new: b" in err and clone.head() == first, out + err
    (clone.host / "b").write_text("ne")
    code, out, err = other.deploy(branch)
    assert code == 0, out + err
    assert (clone.head(), clone.dirty()) == (new if branch == "master" else side, "?? own")


def kill_runner(clone: Clone, command: subprocess.Popen[str]) -> None:
    """The runner alone, as the kernel does when memory is short: whoever waits for it buries it, with its git."""
    own = str(command.pid)
    pids = [int(pid) for pid in os.listdir("/proc") if pid.isdigit() and pid != own]
    os.kill(next(pid for pid in pids if runs_job(pid, str(clone.state))), signal.SIGKILL)
    out, _ = command.communicate(timeout=60)
    assert command.returncode == 1 and "runner died" in out


def runs_job(pid: int, state: str) -> bool:
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return False
    return b"run-job" in words and os.fsencode(state) in words


def holding(clone: Clone) -> set[int]:
    """The filters and hooks that hold git up. Restoring the tree runs a filter again: that one is not of the step."""
    found = processes_of(clone.folder)
    return {pid for pid, words in found.items() if "/hold" in words or "/hook" in words}


def test_a_cancel_while_git_writes_leaves_no_mixed_tree(clone: Clone):
    """What somebody wrote there in between is named and stays, and nothing is ✓ before that is settled."""
    for key, value in (("smudge", SLOW), ("clean", "cat"), ("required", "true")):
        clone.git(clone.host, "config", f"filter.slow.{key}", value)
    first, hold, mark = clone.head(), clone.folder / "hold", clone.state / "transit.json"
    new = clone.commit({"a": "two\n", "b": "new\n", "c/d": "new\n", ".gitattributes": "z filter=slow\n", "z": "z\n"})
    hold.touch()
    command = clone.start("master")
    wait_for((clone.host / "c/d").exists, "git is in the middle")
    held = wait_for(lambda: holding(clone), "the filter holds it up")
    assert (clone.host / "a").read_text() == "two\n", "the tree is mixed by now"
    (clone.host / "b").write_text("theirs\n")
    clone.cancel()
    wait_for(lambda: not held & holding(clone), "git is killed")
    hold.unlink()
    out, _ = command.communicate(timeout=60)
    assert command.returncode == 1 and f"[{HOST}] ✗ 취소" in out, out
    assert "neither old nor new: b" in out and f"mv -i {clone.host}/b " in out, "HEAD has no such file"
    left = (clone.head(), clone.dirty(), (clone.host / "b").read_text(), mark.exists())
    assert left == (first, "?? b", "theirs\n", True)
    code, out, err = clone.deploy()
    assert code == 1 and "neither old nor new: b" in err and "✓" not in out
    assert (clone.host / "b").read_text() == "theirs\n"
    assert typed_hint(clone)
    assert clone.deploy().code == 0
    assert (clone.head(), clone.dirty(), mark.exists()) == (new, "", False)


def test_a_disk_that_fills_while_git_writes_leaves_no_mixed_tree(tmp_path: Path):
    """Restoring needs room too: until there is some no job is ✓, and then the next one makes the tree whole."""
    (tmp_path / "host").mkdir()
    with mounted(tmp_path / "host", "size=2m"):
        clone = Clone(tmp_path)
        fill_up_under(clone)


def fill_up_under(clone: Clone) -> None:
    filler, mark = clone.host / ".git/filler", clone.state / "transit.json"
    first = clone.commit({"b": "old\n", "z": "old\n", ".gitattributes": "z filter=fills\n"})
    assert clone.deploy().code == 0
    # somebody else, just then: git has this lock while it writes the tree
    fills = 'sh -c "test ! -e .git/index.lock || cat /dev/zero >.git/filler 2>/dev/null; cat"'
    for key, value in (("smudge", fills), ("clean", "cat"), ("required", "true")):
        clone.git(clone.host, "config", f"filter.fills.{key}", value)
    new = clone.commit({"a": "two\n", "b": "new\n", "z": "new\n"})
    for step in ("git pull origin master", "check"):  # the second one finds what the first one could not restore
        code, out, err = clone.deploy()
        assert code == 1 and f"[{HOST}] ✗ 실패 {step}" in out and "✓" not in out, out
        assert "the disk is full" in err, err
        assert (clone.head(), clone.job()["changed"], mark.exists()) == (first, True, True)
    assert "nothing changed" not in err
    filler.unlink()
    clone.git(clone.host, "config", "filter.fills.smudge", "cat")
    code, out, err = clone.deploy()
    assert code == 0 and "restoring what git wrote" in out, out + err
    assert (clone.head(), clone.dirty(), mark.exists()) == (new, "", False)
    assert [(clone.host / name).read_text() for name in ("a", "b", "z")] == ["two\n", "new\n", "new\n"]


def test_a_step_that_fails_while_git_writes_leaves_no_mixed_tree(clone: Clone):
    for key, value in (("smudge", "false"), ("clean", "cat"), ("required", "true")):
        clone.git(clone.host, "config", f"filter.slow.{key}", value)
    first = clone.head()
    clone.commit({"a": "two\n", "b": "new\n", ".gitattributes": "z filter=slow\n", "z": "z\n"})
    code, _, err = clone.deploy()
    assert code == 1 and f"nothing changed on {HOST}" in err
    assert (clone.head(), clone.dirty(), (clone.state / "transit.json").exists()) == (first, "", False)


def test_a_failure_takes_nothing_that_another_branch_happens_to_have(clone: Clone):
    """A fetch brings all branches, and of the others git writes nothing into the tree."""
    first = clone.head()
    clone.commit({".env": "KEY=1\n", "notes": "theirs\n"}, "aaa")
    clone.git(clone.folder / "seed", "reset", "-q", "--hard", first)
    clone.commit({"a": "two\n"})
    clone.git(clone.host, "checkout", "-q", "--detach")  # then FETCH_HEAD begins with any of them
    (clone.host / ".git/info/exclude").write_text(".env\n")
    (clone.host / ".env").write_text("KEY=1\n")
    (clone.host / "notes").write_text("")
    hook = clone.host / ".git/hooks/post-checkout"
    hook.write_text("#!/bin/sh\nexit 1\n")
    hook.chmod(0o755)
    code, out, err = clone.deploy()
    assert (code, clone.head(), (clone.host / "a").read_text()) == (1, first, "one\n"), out + err
    assert (clone.host / ".env").read_text() == "KEY=1\n" and (clone.host / "notes").exists()


@pytest.mark.parametrize("end", ["hook", "kill"])
@pytest.mark.parametrize("way", ["folder to link", "link to folder"])
def test_what_is_behind_a_link_is_not_the_tree_s(clone: Clone, way: str, end: str):
    """A folder's files are elsewhere from a commit on, and a link leads there: what fails behind that, or in the midst
    of it, leaves the files elsewhere as they are, whether they are the commit's or not, and the tree as it was."""
    seed, elsewhere, hook = clone.folder / "seed", clone.folder / "elsewhere", clone.host / ".git/hooks/post-merge"
    texts = {"same": "same\n", "other": "theirs\n", "more": "theirs\n"}

    def be_folder() -> None:
        (seed / "data").unlink(missing_ok=True)
        clone.commit({"data/same": "same\n", "data/other": "ours\n", "z": "folder\n"})

    def be_link() -> None:
        shutil.rmtree(seed / "data", ignore_errors=True)
        (seed / "data").symlink_to(elsewhere)
        clone.commit({"z": "link\n"})

    elsewhere.mkdir()
    for name, text in texts.items():
        (elsewhere / name).write_text(text)
    clone.commit({".gitattributes": "z filter=slow\n"})
    steps = [be_folder, be_link] if way == "folder to link" else [be_link, be_folder]
    steps[0]()
    assert clone.deploy().code == 0
    first, new = clone.head(), (steps[1](), clone.git(seed, "rev-parse", "HEAD"))[1]
    for key, value in (("smudge", SLOW), ("clean", "cat"), ("required", "true")):
        clone.git(clone.host, "config", f"filter.slow.{key}", value)
    if end == "kill":
        (clone.folder / "hold").touch()
        command = clone.start("master")
        wait_for(lambda: (clone.host / "data").is_symlink() is (way == "folder to link"), "git is in the middle")
        wait_for(lambda: holding(clone), "the filter holds it up")
        kill_runner(clone, command)
        (clone.folder / "hold").unlink()
        assert clone.head() == first and clone.dirty()
    else:
        hook.write_text("#!/bin/sh\ngit commit --quiet --allow-empty -m x\n")
        hook.chmod(0o755)
        code, out, err = clone.deploy()
        assert code == 1 and "half written" not in out, out + err
        assert (clone.head(), clone.dirty(), (clone.state / "transit.json").exists()) == (first, "", False)
        hook.unlink()
    code, out, err = clone.deploy()
    assert code == 0, out + err
    assert (clone.head(), clone.dirty()) == (new, "")
    assert {file.name: file.read_text() for file in elsewhere.iterdir()} == texts


def test_a_branch_is_found_wherever_it_is(clone: Clone):
    """In a clone that was told to fetch another one only; beside a local branch whose name it extends."""
    origin = clone.folder / "origin"
    rel = clone.commit({"r": "1\n"}, "rel")
    assert clone.deploy("rel").code == 0 and clone.head() == rel
    clone.git(origin, "branch", "-D", "rel")
    deeper = clone.commit({"r": "2\n"}, "rel/1")
    code, out, _ = clone.deploy("rel/1")
    assert code == 0 and "The local branch rel makes way" in out and clone.head() == deeper
    # a branch with commits of its own stays, and the tree with it
    clone.git(clone.host, "checkout", "-q", "-b", "own")
    clone.git(clone.host, "commit", "-q", "--allow-empty", "-m", "mine")
    clone.commit({"r": "3\n"}, "own/1")
    code, out, _ = clone.deploy("own/1")
    assert code == 1 and f"hint: git -C {clone.host} branch -m own kept-own" in out
    assert clone.git(clone.host, "branch", "--show-current") == "own"
    for words in (
        ["rm", "-rf", "host"],
        ["git", "clone", "-q", "--depth=1", "-b", "master", f"file://{origin}", "host"],
    ):
        subprocess.run(words, cwd=clone.folder, env=clone.env, check=True, timeout=60)
    for _ in range(2):
        assert clone.deploy("rel/1").code == 0 and clone.head() == deeper
    assert clone.deploy("master").code == 0


def test_a_local_branch_that_is_ahead_is_no_success(clone: Clone):
    clone.git(clone.host, "commit", "-q", "--allow-empty", "-m", "mine")
    code, _, err = clone.deploy()
    assert code == 1 and "the local branch has 1 commit that the remote has not" in err
    assert f"nothing changed on {HOST}" in err


def test_submodules_are_what_the_commit_names(clone: Clone):
    seed = clone.folder / "seed"
    clone.git(clone.folder, "init", "-q", "-b", "master", "part")
    part = clone.folder / "part"

    def bump(text: str) -> None:
        (part / "p").write_text(text)
        clone.git(part, "add", "-A")
        clone.git(part, "commit", "-qm", text)

    bump("1")
    clone.git(seed, "submodule", "add", "-q", str(part), "sub")
    clone.commit({})
    code, out, _ = clone.deploy()
    assert code == 0 and f"[{HOST}] git submodule update --init --recursive...\n" in out
    assert (clone.host / "sub/p").read_text() == "1"
    bump("2")
    clone.git(seed / "sub", "pull", "-q", "origin", "master")
    clone.commit({})
    clone.git(clone.folder, "config", "--global", "submodule.recurse", "true")
    assert clone.deploy().code == 0
    assert ((clone.host / "sub/p").read_text(), clone.dirty()) == ("2", "")
    config = {
        "masterUrl": "ws://127.0.0.1:9900",
        "whitelist": [HOST],
        "deploy": {**COMMAND["deploy"], "submodules": False},
    }
    clone.commit({"config/updater.json": json.dumps(config)})
    assert clone.deploy().code == 0  # this one brings the setting
    bump("3")
    clone.git(seed / "sub", "pull", "-q", "origin", "master")
    clone.commit({})
    code, out, _ = clone.deploy()
    assert code == 0 and "⚠ submodules stay as they are: deploy.submodules is false" in out


@pytest.mark.parametrize("end", ["kill", "cancel", "timeout"])
def test_a_submodule_that_git_left_half_written_is_made_whole(clone: Clone, end: str):
    """Cut off while it is cloned, in its first checkout, and in a later one; in a submodule of a submodule too."""
    seed, hold, hook = clone.folder / "seed", clone.folder / "hold", clone.folder / "hook"
    inner, outer = clone.folder / "inner", clone.folder / "outer"
    config = json.loads((clone.host / "config/updater.json").read_text())
    config["deploy"]["timeout"] = 2 if end == "timeout" else 60
    config = json.dumps(config)

    def bump(place: Path, text: str) -> None:
        for name in ("a", "b", "z"):
            (place / name).write_text(text)
        (place / ".gitattributes").write_text("z filter=slow\n")
        clone.git(place, "add", "-A")
        clone.git(place, "commit", "-qm", text)

    def cut_off(is_in_the_middle: Callable[[], bool], what: str) -> None:
        """A job that ends while git stands in the middle of a submodule."""
        hold.touch()
        command = clone.start("master")
        wait_for(lambda: is_in_the_middle() or command.poll() is not None, what)
        assert command.poll() is None, command.communicate()
        wait_for(lambda: clone.job()["open_step"], "the step is recorded")
        if end == "kill":
            kill_runner(clone, command)
            hold.unlink()
            return
        held = wait_for(lambda: holding(clone), "something holds git up")
        if end == "cancel":
            clone.cancel()
        wait_for(lambda: not held & holding(clone), "the step has ended")
        hold.unlink()
        out, _ = command.communicate(timeout=60)
        assert command.returncode == 1 and "✓" not in out, out

    def holds(file: Path, text: str) -> bool:
        return file.read_text() == text

    def deploy_whole(text: str) -> None:
        code, out, err = clone.deploy()
        assert (code, clone.dirty()) == (0, ""), out + err
        for part in ("sub", "sub/in"):
            assert [(clone.host / part / name).read_text() for name in ("a", "b", "z")] == [text] * 3

    for place in (inner, outer):
        clone.git(clone.folder, "init", "-q", "-b", "master", str(place))
    bump(inner, "1")
    clone.git(outer, "submodule", "add", "-q", f"file://{inner}", "in")
    bump(outer, "1")
    clone.git(seed, "submodule", "add", "-q", f"file://{outer}", "sub")
    clone.git(seed, "submodule", "update", "-q", "--init", "--recursive")
    clone.commit({"config/updater.json": config})
    clone.git(clone.host, "pull", "-q")  # this one brings the deadline
    hook.write_text(f'#!/bin/sh\ntouch {hold}.seen; while [ -e {hold} ]; do sleep 0.1; done; exec "$@"\n')
    hook.chmod(0o755)
    clone.git(clone.folder, "config", "--global", "uploadpack.packObjectsHook", str(hook))
    cut_off(Path(f"{hold}.seen").exists, "git clones")
    if end == "kill":  # in the end also while git clears away what it had cloned
        shutil.rmtree(clone.host / ".git/modules/sub/objects", ignore_errors=True)
    clone.git(clone.folder, "config", "--global", "--unset", "uploadpack.packObjectsHook")
    for key, value in (("smudge", SLOW.replace("../hold", str(hold))), ("clean", "cat"), ("required", "true")):
        clone.git(clone.folder, "config", "--global", f"filter.slow.{key}", value)
    cut_off((clone.host / "sub/b").exists, "git writes the first time")
    deploy_whole("1")
    for text in ("2", "3") if end == "kill" else ("2",):
        bump(inner, text)
        clone.git(outer / "in", "pull", "-q", "origin", "master")
        bump(outer, text)
        clone.git(seed / "sub", "pull", "-q", "origin", "master")
        clone.git(seed / "sub", "submodule", "update", "-q")
        clone.commit({})
        part = clone.host / ("sub" if text == "2" else "sub/in")
        if text == "3":
            clone.git(clone.host / "sub", "config", "filter.slow.smudge", "cat")  # the next one stops in the inner one
        cut_off(functools.partial(holds, part / "b", text), f"git writes {part}")
        if text == "2" and end == "kill":
            (part / "a").write_text("mine")
            code, out, err = clone.deploy()
            assert code == 1 and "neither old nor new: sub/a" in err, err
            assert f"git -C {part} checkout HEAD -- a" in out
            clone.git(part, "checkout", "HEAD", "--", "a")
        deploy_whole(text)


def test_lfs_pointers_are_not_deployed(clone: Clone, tmp_path: Path):
    first = clone.head()
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 3\n"
    new = clone.commit({".gitattributes": "*.bin filter=lfs\n", "x.bin": pointer, "doc": pointer})
    code, out, err = clone.deploy()
    assert code == 1 and "files are only LFS pointers: x.bin" in err and "hint: install git-lfs here" in out
    assert clone.job()["began_command"] is False
    # a stand-in, as no package holds git-lfs
    (tmp_path / "bin").mkdir()
    lfs = tmp_path / "bin/git-lfs"
    lfs.write_text(
        "#!/bin/sh\ncase $1 in pull) [ ! -e ../down ] || exit 2; printf big >x.bin; git update-index x.bin;; "
        'checkout) printf big >x.bin; git update-index x.bin;; clean) printf "%s" "$POINTER";; esac\necho git-lfs\n'
    )
    lfs.chmod(0o755)
    clone.env |= {"PATH": f"{tmp_path / 'bin'}:{clone.env['PATH']}"}
    clone.git(
        clone.host,
        "config",
        "filter.lfs.clean",
        'f=$(cat); case $f in version*) echo "$f";; '
        "*) printf 'version https://git-lfs.github.com/spec/v1\\noid sha256:00\\nsize 3\\n';; esac",
    )
    clone.git(clone.host, "config", "filter.lfs.smudge", "cat")
    code, out, err = clone.deploy()
    assert code == 0, out + err
    assert f"[{HOST}] git lfs pull...\n" in out
    assert (clone.head(), (clone.host / "x.bin").read_text(), first != new) == (new, "big", True)
    # the server is down: what was there is there again, and no pointer to it
    (clone.folder / "down").touch()
    clone.commit({"x.bin": pointer.replace("sha256:00", "sha256:01")})
    code, out, err = clone.deploy()
    assert code == 1 and "✗ 실패 git lfs pull" in out and f"nothing changed on {HOST}" in err
    assert (clone.head(), (clone.host / "x.bin").read_text()) == (new, "big")


def test_what_git_s_own_connection_leaves_is_no_warning(clone: Clone):
    """An ssh that waits for the next connection holds git's stderr, at each job: a line of the log, and no ⚠."""
    leaves = "sleep 100 < /dev/null > /dev/null & exec git-upload-pack"
    clone.git(clone.host, "config", "remote.origin.uploadpack", leaves)
    new = clone.commit({"a": "two\n"})
    code, out, err = clone.deploy()
    pids = re.findall(r"left running: (\d+) sleep", clone.log())
    for pid in pids:
        os.kill(int(pid), signal.SIGKILL)
    assert (code, clone.head(), bool(pids)) == (0, new, True), out + err
    assert "⚠" not in out and not clone.job().get("warnings"), out


def test_a_talkative_command_fills_no_disk(clone: Clone):
    """The log has its beginning and its end, what follows it is where the record says, and the failure is explained."""
    keep = {"keep": {"jobMegabytes": 1}, "masterUrl": "ws://127.0.0.1:9900", "whitelist": [HOST], **COMMAND}
    script = "seq 1000000 1400000; echo 'error: No space left on device'; sleep 100 & echo '한 줄'; exit 3\n"
    clone.commit({"config/updater.json": json.dumps(keep), "deploy.sh": script})
    code, out, err = clone.deploy()
    assert code == 1 and "the disk is full" in out + err
    job = clone.job()
    log = next((clone.state / "runs").glob(f"*/{HOST}.log")).read_bytes()
    note = re.search(rb"\n\[\.\.\. (\d+) bytes not recorded\]\n", log)
    assert note and (job["size"], log.count(b"bytes not recorded")) == (len(log), 1)
    assert note.start() == 1 << 20, "the beginning"
    end = log[note.end() :]
    begin, length, _ = job["marks"][-1]  # type: ignore[index]
    whole = "".join(f"{n}\n" for n in range(1000000, 1400001)).encode()
    whole += "error: No space left on device\n한 줄\n".encode()
    head = log[begin + length : note.start()]
    assert whole.startswith(head) and len(head) + int(note[1]) + (64 << 10) == len(whole)
    assert end.startswith(whole[-(64 << 10) :]), "the end"
    assert re.search(r"warning: left running: \d+ sleep; its output is not recorded any more\n", end.decode())
    (pid,) = re.findall(r"left running: (\d+) sleep", str(job["warnings"]))
    os.kill(int(pid), signal.SIGKILL)


# Two daemons, one clone


def test_two_state_folders_never_deploy_in_one_clone_at_once(clone: Clone):
    """Each has a lock of its own, and both have the clone's."""
    other = clone.second()
    steps = clone.folder / "steps"
    gate = clone.folder / "go"
    script = f"echo begin >> {steps}\nuntil [ -e {gate} ]; do sleep 0.1; done\necho end >> {steps}\n"
    clone.commit({"deploy.sh": script})
    with clone.start("master") as first:
        wait_for(steps.exists, "the first one deploys")
        with other.start("master") as second:
            (waiting,) = wait_for(lambda: re.findall("Waiting: .*", other.log()), other.log)
            (pid,) = re.findall("pid (\\d+) with", waiting)
            there = f"the state folder {clone.state} deploys in this clone, {clone.host}."
            assert waiting == f"Waiting: pid {pid} with {there}"
            assert "run-job" in Path(f"/proc/{pid}/cmdline").read_text()
            assert other.job()["step"] == "check" and steps.read_text() == "begin\n"
            gate.touch()
            for command in (first, second):
                assert command.communicate(timeout=60)[1] is not None and command.returncode == 0
    assert steps.read_text() == "begin\nend\n" * 2

    gate.unlink()
    with clone.start("master") as first:
        wait_for(lambda: steps.read_text().count("begin") == 3, "it deploys")
        with other.start("master") as second:
            (pid,) = wait_for(lambda: re.findall("Waiting: pid (\\d+) ", other.log(at=1)), lambda: other.log(at=1))
            os.kill(int(pid), signal.SIGKILL)  # the runner: the lock goes with it
            gate.touch()
            first.communicate(timeout=60)
            second.communicate(timeout=60)
            assert (first.returncode, second.returncode) == (1, 0), other.log()


def test_a_clone_that_others_own_can_be_locked(clone: Clone):
    """Who may only read git's folder locks it all the same."""
    if os.geteuid() != 0:
        unavailable("only root can be another user")
    git = clone.host / ".git"
    lock, same = est.CloneLock(git), est.CloneLock(git)
    names = sorted(each.name for each in git.iterdir())
    assert lock.acquire() and not same.acquire()
    assert same.holder() == "another process", "this one has no state folder"
    # their folders are root's alone: it goes there before it is somebody else
    code = "import fcntl, os, sys; from pathlib import Path; from tests import seam as est; os.chdir(sys.argv[1])\n"
    code += "lock = est.CloneLock(Path()); os.setuid(65534); print(lock.acquire())"
    for expected in ("False", "True"):
        argv = [sys.executable, "-c", code, str(git)]
        done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
        assert done.stdout.split() == [expected], done.stderr
        lock.release()
    assert sorted(each.name for each in git.iterdir()) == names, "nothing of ours is in there"


def test_a_deployment_that_changes_nothing_asks_git_little(clone: Clone, tmp_path: Path):
    """git's start is what takes long: each question more is a longer wait on every host."""
    asked, real = tmp_path / "asked", shutil.which("git")
    (tmp_path / "bin").mkdir()
    git = tmp_path / "bin/git"
    git.write_text(f'#!/bin/sh\necho "$*" >> {asked}\nexec {real} "$@"\n')
    git.chmod(0o755)
    clone.env |= {"PATH": f"{tmp_path / 'bin'}:{clone.env['PATH']}"}

    def deploy_later() -> None:
        # not in the second in which the files were written: then git would look into them again
        later = time.time() + 5
        os.utime(clone.host / ".git/index", (later, later))
        asked.unlink()
        assert clone.deploy().code == 0

    assert clone.deploy().code == 0
    deploy_later()
    words = [re.sub(r"(-c \S+ )*", "", line, count=1) for line in asked.read_text().splitlines()]
    steps = [line for line in words if line.startswith(("fetch", "checkout", "merge"))]
    assert [line.split()[0] for line in steps] == ["fetch", "checkout"], "a merge would find nothing to do"
    # three of them are about whose state folder it is, which no daemon has settled here
    assert len(words) - len(steps) <= 3 + 1, words
    assert not any("status --porcelain" in line for line in words), words
    clone.git(clone.host, "config", "hook.mine.command", "true")
    deploy_later()
    assert asked.read_text().count("status --porcelain") == 1, "a hook may have written"
    # by hand nobody accepts an order first; each record more is a word to the master and to each who watches
    assert clone.job()["revision"] == 7, clone.job()


def test_files_that_git_disagrees_about_are_looked_at_together(clone: Clone):
    """A commit says how lines end, and nobody wrote its files anew: git calls them all changed, which they are not."""
    clone.git(clone.folder, "config", "--global", "core.safecrlf", "false")
    clone.commit({f"s/{number}.js": f"{number}\r\n" for number in range(300)})
    clone.commit({"s/same.txt": "1\n"})
    assert clone.deploy().code == 0
    clone.git(clone.host, "config", "core.autocrlf", "false")
    (clone.host / ".git/info/attributes").write_text("*.js text eol=lf\n")
    for file in (clone.host / "s").iterdir():
        os.utime(file, (1, 1))
    tree = est.WorkTree(clone.host, clone.env, submodules=True)
    (clone.host / "s/0.js").write_text("mine\n")
    changed = tree.changes().paths
    assert len(changed) == 300
    asked: list[tuple[str, ...]] = []
    ask = tree.ask

    def count(*words: str) -> bytes:
        asked.append(words)
        return ask(*words)

    tree.ask = count  # type: ignore[method-assign]
    assert set(changed) - tree.find_phantoms(changed) == {"s/0.js"}
    assert len(asked) < 10, "git's start is what takes long"
    phantoms = tree.less_phantoms(tree.changes()).phantoms
    assert len(phantoms) == 299
    commit = clone.commit({"s/1.js": "other\r\n"})
    clone.git(clone.host, "fetch", "-q")
    one = clone.host / "s/1.js"
    with pytest.raises(est.UpdaterError), tree.without_phantoms(phantoms, [commit]):
        assert not one.exists()
        raise est.UpdaterError("another git holds the lock")
    assert one.read_bytes() == b"1\r\n", "where git did not move, nothing is gone"
    one.write_bytes(b"by hand\r\n")
    with tree.without_phantoms(phantoms, [commit]):
        assert one.read_bytes() == b"by hand\r\n", "written since they were found: git has to refuse"
    one.write_bytes(b"1" * (est.PHANTOM_BYTES + 1))
    phantoms = tree.less_phantoms(tree.changes()).phantoms
    assert len(phantoms) == 298 and not tree.may_be_phantom("s/1.js"), "nobody reads a large file again and again"


def test_the_branch_is_read_without_a_question(clone: Clone, tmp_path: Path):
    host, linked = clone.host, tmp_path / "linked"
    assert est.read_branch(host) == "master"
    clone.git(host, "checkout", "-q", "-b", "a/b")
    assert est.read_branch(host) == "a/b" == clone.git(host, "branch", "--show-current")
    clone.git(host, "checkout", "-q", "--detach")
    assert est.read_branch(host) == "" == clone.git(host, "branch", "--show-current")
    clone.git(host, "worktree", "add", "-q", str(linked), "master")
    assert est.read_branch(linked) is None  # git has to be asked
    assert est.read_branch(host / "config") is None


def test_the_commit_is_read_without_a_question(clone: Clone, tmp_path: Path):
    """As git itself says it, or not at all."""
    host, linked = clone.host, tmp_path / "linked"

    def head(root: Path = host) -> str:
        return clone.git(root, "rev-parse", "HEAD")

    def check(*, known: bool, root: Path = host) -> None:
        assert est.read_head(root) == (head(root) if known else ""), root

    check(known=True)
    clone.git(host, "checkout", "-q", "-b", "a/b")
    clone.git(host, "commit", "-q", "--allow-empty", "-m", "x")
    check(known=True)
    clone.git(host, "pack-refs", "--all")
    check(known=False)
    clone.git(host, "commit", "-q", "--allow-empty", "-m", "beside what is packed")
    check(known=True)
    clone.git(host, "symbolic-ref", "refs/heads/link", "refs/heads/a/b")
    clone.git(host, "symbolic-ref", "HEAD", "refs/heads/link")
    check(known=False)
    clone.git(host, "checkout", "-q", "--detach")
    check(known=True)
    clone.git(host, "worktree", "add", "-q", str(linked), "master")
    check(known=False, root=linked)
    assert est.read_head(host / "config") == ""
    clone.git(host, "checkout", "-q", "--orphan", "none-yet")
    assert est.read_head(host) == ""
    clone.git(host, "checkout", "-q", "-f", "a/b")
    if os.geteuid() == 0:  # git may refuse another user's
        os.chown(host / ".git", 65534, 65534)
        assert est.read_head(host) == ""
        os.chown(host / ".git", 0, 0)
    check(known=True)

    clone.git(host, "fetch", "-q", "origin", "master")
    assert est.read_fetched(host) == clone.git(host, "rev-parse", "FETCH_HEAD")
    (host / ".git/FETCH_HEAD").unlink()
    assert est.read_fetched(host) == ""


def test_a_commit_is_described_without_a_question(clone: Clone, tmp_path: Path):
    """As git itself says it, or not at all."""
    host = clone.host

    def check(*, known: bool, root: Path = host) -> None:
        expected = clone.git(root, "describe", "--always")
        found = est.read_description(root, est.CloneSettings(root, clone.env))
        assert found == (expected if known else ""), root

    check(known=True)
    clone.git(host, "repack", "-q", "-a", "-d")
    check(known=True)
    clone.git(host, "config", "core.abbrev", "12")
    check(known=False)
    clone.git(host, "config", "--unset", "core.abbrev")
    clone.git(host, "tag", "light")
    check(known=False)
    clone.git(host, "pack-refs", "--all")
    clone.git(host, "checkout", "-q", "--detach")
    check(known=False)
    clone.git(host, "tag", "-d", "light")
    check(known=True)
    clone.git(host, "multi-pack-index", "write")
    check(known=False)
    (host / ".git/objects/pack/multi-pack-index").unlink()
    # so many objects that git takes a digit more: only their number matters, which the index says
    (index,) = (host / ".git/objects/pack").glob("*.idx")
    head = clone.git(host, "rev-parse", "HEAD")
    assert est.packed_like(index.parent, head[:7])[0] == [head]
    for packed in (0, 1, 5, 16383, 16384, 65535, 65536, 10**6):
        assert est.short_length(packed) == max(7, -(-len(f"{packed:b}") // 2))
    # another object that begins as the commit does: git itself says one digit more
    like = head[:7] + ("0" if head[7] != "0" else "1") + "0" * 32
    folder = host / ".git/objects" / head[:2]
    folder.mkdir(exist_ok=True)
    (folder / like[2:]).write_bytes(b"")
    assert clone.git(host, "describe", "--always") == head[:8]
    check(known=False)
    (folder / like[2:]).unlink()
    check(known=True)
    shared = tmp_path / "shared"
    clone.git(tmp_path, "clone", "-q", "--shared", str(host), str(shared))
    check(known=False, root=shared)


def test_that_nothing_is_changed_is_seen_without_a_question(clone: Clone):
    """As git itself says it, or not at all."""
    host = clone.host
    clone.commit({"a": "a\n", "s/b": "b\n", "s/t/c": "c\n", "empty": ""})
    assert clone.deploy().code == 0

    def check(*, known: bool, racy: bool = False, what: str = "") -> None:
        with suppress(subprocess.CalledProcessError):  # it fails where there are changes
            clone.git(host, "update-index", "-q", "--refresh")
        index = host / ".git/index"
        later = (host / "a").stat().st_mtime if racy else time.time() + 5
        os.utime(index, (later, later))
        found = est.is_unchanged(host, est.CloneSettings(host, clone.env))
        status = clone.git(host, "status", "--porcelain", "--untracked-files=no")
        assert not (found and status), (what, status)
        assert found is known, what

    check(known=True)
    check(known=False, racy=True, what="written in the same second")
    kept = (host / "a").stat()
    (host / "a").write_text("b\n")
    os.utime(host / "a", ns=(kept.st_atime_ns, kept.st_mtime_ns))
    check(known=False, what="of the same size and time")
    clone.git(host, "checkout", "-q", "a")
    check(known=True)
    (host / "a").chmod(0o755)
    check(known=False, what="a mode")
    (host / "a").chmod(0o644)
    os.utime(host / "a", (1, 1))  # within a second git sees no difference, and notes none
    check(known=True)
    (host / "a").unlink()
    check(known=False, what="gone")
    (host / "a").symlink_to("empty")
    check(known=False, what="a link")
    (host / "a").unlink()
    clone.git(host, "checkout", "-q", "a")
    (host / "s").rename(host / "r")
    (host / "s").symlink_to("r")
    check(known=False, what="files behind a link")
    (host / "s").unlink()
    (host / "r").rename(host / "s")
    check(known=True)
    (host / "a").write_text("staged\n")
    clone.git(host, "add", "a")
    check(known=False, what="staged")
    clone.git(host, "commit", "-q", "-m", "staged")
    check(known=True)
    clone.git(host, "reset", "-q", "--soft", "HEAD~1")
    check(known=False, what="staged as a whole")
    clone.git(host, "reset", "-q", "--hard", "ORIG_HEAD")
    check(known=True)
    (host / "new").write_text("new\n")
    clone.git(host, "add", "--intent-to-add", "new")
    check(known=False, what="to be added")
    clone.git(host, "rm", "-q", "--cached", "new")
    clone.git(host, "update-index", "--assume-unchanged", "a")
    (host / "a").write_text("hidden\n")
    check(known=False, what="hidden")
    clone.git(host, "update-index", "--no-assume-unchanged", "a")
    clone.git(host, "reset", "-q", "--hard")
    check(known=True)
    other = clone.git(host, "commit-tree", "-m", "x", "HEAD~1^{tree}")
    clone.git(host, "replace", "HEAD", other)
    check(known=False, what="a commit that stands for it")
    clone.git(host, "replace", "-d", "HEAD")
    clone.git(host, "config", "core.worktree", str(clone.folder))
    assert not est.is_unchanged(host, est.CloneSettings(host, clone.env)), "files elsewhere"
    clone.git(host, "config", "--unset", "core.worktree")
    check(known=True)
    clone.git(host, "repack", "-q", "-a", "-d")
    check(known=False, what="a packed commit")


def test_settings_are_kept_while_their_files_stay(clone: Clone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """As git itself says them, or not at all."""
    host, home = clone.host, clone.folder
    # by names that git looks for by itself: that one needs no variable
    env = {name: value for name, value in clone.env.items() if name != "GIT_CONFIG_GLOBAL"}
    env |= {"XDG_CONFIG_HOME": str(tmp_path / "xdg")}
    kept = est.KeptSettings()

    def told() -> bytes:
        return est.git_output(host, env, "config", "--null", "--list")

    def learn() -> bytes | None:
        with monkeypatch.context() as patch:
            patch.setattr(est.program, "SETTLED_NS", -(10**12))
            kept.learn(host, env)
        return kept.recall(host, env)

    assert kept.recall(host, env) is None
    assert learn() == told()
    clone.git(host, "config", "some.thing", "new")
    assert kept.recall(host, env) is None
    assert learn() == told() and b"some.thing" in told()
    # files that were not there
    (tmp_path / "xdg/git").mkdir(parents=True)
    (tmp_path / "xdg/git/config").write_text("[some]\n\tthing = else\n")
    assert kept.recall(host, env) is None
    assert learn() == told()
    (host / ".git/config.worktree").write_text("")
    assert kept.recall(host, env) is None
    assert learn() == told()
    assert kept.recall(host, {**env, "GIT_CONFIG_COUNT": "0"}) is None
    assert kept.recall(host, {**env, "HOME": "/nowhere"}) is None
    assert kept.recall(home / "seed", env) is None
    (host / ".git/refs").rename(host / ".git/away")
    assert kept.recall(host, env) is None, "git takes it for no clone"
    (host / ".git/away").rename(host / ".git/refs")
    assert kept.recall(host, env) == told()
    # another file, whatever it holds by then
    for key in ("include.path", "includeIf.onbranch:x.path"):
        clone.git(host, "config", key, str(tmp_path / "more"))
        assert learn() is None
        clone.git(host, "config", "--unset", key)
        assert learn() == told()
    # written a moment ago, so perhaps at this moment too
    (host / ".git/config").touch()
    kept.learn(host, env)
    assert kept.recall(host, env) is None


def test_a_hook_is_seen_also_where_nothing_moves(clone: Clone, tmp_path: Path):
    """The tree is looked at again, wherever the hook lies."""
    text = "#!/bin/sh\necho mine > a\n"
    for folder in (clone.host / ".git/hooks", tmp_path / "hooks"):
        assert clone.deploy().code == 0
        folder.mkdir(exist_ok=True)
        hook = folder / "post-checkout"
        hook.write_text(text)
        hook.chmod(0o755)
        code, out, _ = clone.deploy()
        assert code == 1 and "not what the commit says: a" in out, out
        hook.unlink()
        clone.git(clone.host, "checkout", "-q", "a")
        clone.git(clone.folder, "config", "--global", "core.hooksPath", str(tmp_path / "hooks"))


def test_branches_are_read_without_a_question(clone: Clone, tmp_path: Path):
    """As git itself says them, or not at all."""
    host, linked = clone.host, tmp_path / "linked"
    names = ("refs/remotes/origin/master", "refs/heads/master", "refs/heads/a/b", "refs/heads/gone", "refs/heads/a")

    def check(*, known: bool, root: Path = host) -> None:
        found = est.read_branches(root, names)
        assert (found is not None) is known
        if known:
            lines = clone.git(root, "for-each-ref", *names).splitlines()
            assert found == " ".join(line for line in lines if line.split()[2] in names).split()

    check(known=True)
    clone.git(host, "branch", "-q", "a/b")
    check(known=True)
    clone.git(host, "pack-refs", "--all")
    check(known=True)
    clone.git(host, "commit", "-q", "--allow-empty", "-m", "beside what is packed")
    clone.git(host, "branch", "-q", "-D", "a/b")
    check(known=True)
    packed = host / ".git/packed-refs"
    tip, small = clone.git(host, "rev-parse", "HEAD").strip(), packed.read_text()
    packed.write_text(small + "".join(f"{tip} refs/tags/v{number:0150}\n" for number in range(6000)))
    check(known=False)  # more than is read here: git knows
    packed.write_text(small)
    clone.git(host, "worktree", "add", "-q", "--detach", str(linked))
    check(known=False, root=linked)
    clone.git(host, "symbolic-ref", "refs/heads/a/b", "refs/heads/master")
    check(known=False)
    (host / ".git/refs/heads/a/b").unlink()
    os.mkfifo(host / ".git/refs/heads/a/b")
    os.mkfifo(host / ".git/FETCH_HEAD")
    check(known=False)  # and nobody waits for its writer
    assert est.read_fetched(host) == ""


def test_a_file_of_another_user_is_written_anew_too(clone: Clone, monkeypatch: pytest.MonkeyPatch):
    """Nobody but its owner may set its time, which says to git that it is to look; git itself replaces such a file."""
    clone.git(clone.host, "config", "core.autocrlf", "false")
    clone.commit({"a.txt": "1\n2\n"})
    assert clone.deploy().code == 0
    tree = est.WorkTree(clone.host, clone.env, submodules=False)
    before = est.Conversions(tree, will_change=True)
    clone.commit({".gitattributes": "*.txt eol=crlf\n"})

    def refuse(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "utime", refuse)
    clone.git(clone.host, "pull", "-q", "origin", "master")
    assert before.renew(()) == ["a.txt"]
    assert (clone.host / "a.txt").read_bytes() == b"1\r\n2\r\n"


def test_an_index_is_read_without_a_question(clone: Clone):
    """Its paths, and whether git was told to overlook some, as git says them; or nothing."""
    host = clone.host
    (host / "결제").mkdir()
    for number in range(1, 20):  # each length that is filled up to eight bytes
        (host / "결제" / ("x" * number)).write_text("")
    clone.git(host, "add", "-A")

    def check(*, flags: bool = False, known: bool = True) -> None:
        index = est.read_index(host)
        assert (index is not None) is known
        if index:
            listed = clone.git(host, "-c", "core.quotePath=false", "ls-files").splitlines()
            assert [path.decode() for path in index.paths] == listed
            assert (index.has_flags, index.has_attributes()) == (flags, "b/.gitattributes" in listed)

    check()
    for option in ("--assume-unchanged", "--skip-worktree"):
        clone.git(host, "update-index", option, "a")
        check(flags=True)
        clone.git(host, "update-index", option.replace("--", "--no-"), "a")
        check()
    (host / "b").mkdir()
    (host / "b/.gitattributes").write_text("* text\n")
    clone.git(host, "add", "-A")
    check()
    clone.git(host, "add", "-N", "deploy.sh")
    check()
    for how in (("--index-version", "4"), ("--split-index",)):
        clone.git(host, "update-index", *how)
        check(known=False)
        clone.git(host, "update-index", "--index-version", "2", "--no-split-index")
        check()
    file = host / ".git/index"
    whole = file.read_bytes()
    for torn in (whole[:-1], whole[:40], b"", bytes([*whole[:99], whole[99] ^ 1, *whole[100:]])):
        file.write_bytes(torn)
        assert est.read_index(host) is None


def test_an_end_elsewhere_is_seen_without_a_question(clone: Clone):
    """A hook of the checkout that commits: HEAD is no commit of the remote, whatever was read before."""
    assert clone.deploy().code == 0
    hook = clone.host / ".git/hooks/post-checkout"
    hook.parent.mkdir(exist_ok=True)
    hook.write_text("#!/bin/sh\ngit commit -q --allow-empty -m mine\n")
    hook.chmod(0o755)
    done = clone.deploy()
    assert done.code == 1 and "1 commit that the remote has not" in done.out + done.err, done


def test_the_end_of_a_talkative_command_outlives_its_runner(clone: Clone):
    """Killed while most of the output is not recorded: whoever buries it appends the end, behind how much is lost."""
    keep = {"keep": {"jobMegabytes": 1}, "masterUrl": "ws://127.0.0.1:9900", "whitelist": [HOST], **COMMAND}
    script = "seq 1000000 1400000; echo 'the last line'; touch ../said; exec sleep 100\n"
    clone.commit({"config/updater.json": json.dumps(keep), "deploy.sh": script})
    command = clone.start("master")
    wait_for((clone.folder / "said").exists, "all is said")
    (held,) = (clone.state / "runs").glob("*/*.end")
    wait_for(lambda: b"the last line" in held.read_bytes(), "the last line is held")
    kill_runner(clone, command)
    job, log = clone.job(), held.with_suffix("").read_bytes()
    note = re.search(rb"\n\[\.\.\. (\d+) bytes not recorded\]\n", log)
    assert note and (job["state"], job["size"], held.exists()) == ("lost", len(log), False)
    assert note.start() == 1 << 20, "the beginning"
    whole = "".join(f"{n}\n" for n in range(1000000, 1400001)).encode() + b"the last line\n"
    begin, length, _ = job["marks"][-1]  # type: ignore[index]
    head = log[begin + length : note.start()]
    assert whole.startswith(head) and log[note.end() :] == whole[-(64 << 10) :]
    assert len(head) + int(note[1]) + (64 << 10) == len(whole)


@given(st.lists(st.binary(max_size=300_000), max_size=12))
@settings(max_examples=25, deadline=None)
def test_a_held_end_is_the_end(tmp_path_factory: pytest.TempPathFactory, pieces: list[bytes]):
    held = est.HeldEnd(tmp_path_factory.mktemp("held") / "x.log")
    for piece in pieces:
        held.hold(piece)
    whole = b"".join(pieces)
    assert est.HeldEnd(held.path.with_suffix("")).read() == (max(0, len(whole) - (64 << 10)), whole[-(64 << 10) :])
    held.drop()
    assert not held.path.exists()


def test_doctor_says_what_a_commit_only_names_and_names_can_be_read(clone: Clone):
    """Submodules and LFS files, before a deployment meets them; a Korean name is no row of numbers."""
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 3\n"
    clone.git(clone.folder, "init", "-q", "-b", "master", "part")
    clone.git(clone.folder / "part", "commit", "-q", "--allow-empty", "-m", "x")
    clone.git(clone.folder / "seed", "submodule", "add", "-q", str(clone.folder / "part"), "부분")
    clone.commit({".gitattributes": "*.bin filter=lfs\n", "x.bin": pointer, "결제 함/새.txt": "1"})
    clone.git(clone.host, "pull", "-q")
    (clone.host / "결제 함/새.txt").write_text("mine")
    words = [*PROGRAM, "--state", str(clone.state), "--bind", HOST, "doctor"]
    said = subprocess.run(words, cwd=clone.host, env=clone.env, stdout=-1, timeout=60, text=True).stdout
    assert "local changes: 결제 함/새.txt\n" in said
    assert "each deployment also runs git submodule update --init --recursive (부분)\n" in said
    assert "files are only LFS pointers: x.bin" in said and "install git-lfs here" in said


def test_what_git_can_do_with_submodules_is_not_refused(clone: Clone):
    """By servers that give nothing by its id alone; over what it passes over; from the place that the operator set."""
    seed, host, part, inner = (clone.folder / name for name in ("seed", "host", "part", "inner"))
    clone.git(clone.folder, "config", "--global", "protocol.version", "0")

    def bump(place: Path, text: str) -> str:
        for name in ("a", "gone", "staged"):
            (place / name).write_text(text)
        clone.git(place, "add", "-A")
        clone.git(place, "commit", "-qm", text)
        return clone.git(place, "rev-parse", "HEAD")

    for place in (inner, part):
        clone.git(clone.folder, "init", "-q", "-b", "master", str(place))
        bump(place, "1")
    clone.git(part, "submodule", "add", "-q", str(inner), "in")
    bump(part, "2")
    clone.git(seed, "submodule", "add", "-q", "../part", "sub")
    clone.commit({})
    assert clone.deploy().code == 0 and (host / "sub/in/a").read_text() == "1"
    clone.git(clone.folder, "clone", "-q", "--bare", "part", "mirror")

    # not at the tip of a branch, and what is changed here is nothing that git would overwrite
    bump(inner, "3")
    clone.git(part / "in", "pull", "-q", "origin", "master")
    wanted = bump(part, "3")
    bump(part, "4")
    clone.git(seed / "sub", "fetch", "-q", "origin")
    clone.git(seed / "sub", "checkout", "-q", wanted)
    clone.commit({})
    (host / "sub/in/own").write_text("mine")
    clone.git(host / "sub/in", "add", "own")
    (host / "sub/gone").unlink()
    (host / "sub/staged").write_text("3")
    clone.git(host / "sub", "add", "staged")
    (host / "sub/a").write_text("mine")
    code, out, err = clone.deploy()
    assert code == 1 and "local changes in submodule sub are in the way: a;" in err + out.replace("\n", ";"), err
    clone.git(host / "sub", "checkout", "-q", "a")
    code, out, err = clone.deploy()
    assert code == 0 and (host / "sub/in/a").read_text() == "3", out + err
    assert "from where .gitmodules says" not in clone.log(at=2)

    # neither the operator's mirror nor the committed place has it, then the committed one alone
    mirror = str(clone.folder / "mirror")
    clone.git(host, "config", "submodule.sub.url", mirror)
    clone.git(host / "sub", "remote", "set-url", "origin", mirror)
    clone.git(seed / "sub", "submodule", "update", "-q", "--init")
    wanted = bump(seed / "sub", "5")
    clone.commit({})
    for name in ("gone", "staged"):
        clone.git(host / "sub", "checkout", "-q", "HEAD", "--", name)
    code, out, err = clone.deploy()
    assert code == 1 and f"submodule sub: its remote has no commit {wanted[:7]}" in err, out + err
    assert clone.git(host, "config", "submodule.sub.url") == mirror
    bump(seed / "sub", "6")
    clone.git(seed / "sub", "push", "-q", "origin", "HEAD:refs/heads/late")
    code, out, err = clone.deploy()
    assert code == 0 and (host / "sub/a").read_text() == "5", out + err
    assert "Submodule sub: from where .gitmodules says by now." in clone.log(at=4)


def test_a_submodule_that_answers_slowly_is_not_refused(clone: Clone):
    """Its step has more time than a question has."""

    def ask(*args: str) -> str:
        if "fetch" in args:
            raise est.UpdaterError("git fetch did not answer in 30 s")
        return {"rev-parse": "1" * 40, "remote": "origin"}.get(args[2], "")

    rule: Any = SimpleNamespace(submodules=True, remote="origin")
    ahead = est.ComingParts(est.Coming(clone.host, rule, clone.head(), ask, clone.head()))
    assert ahead.check_submodule("sub", "2" * 40) is None


def test_no_path_of_a_commit_holds_up_or_discards_a_tree(clone: Clone):
    """A submodule that is its own clone, refs that git can't read, and a FIFO where a file was."""
    tree = est.WorkTree(clone.host, clone.env, submodules=True)
    for folder in (".", "", "..", "config/..", str(clone.host)):
        (clone.host / ".gitmodules").write_text(f'[submodule "x"]\npath = {folder}\n')
        assert list(itertools.islice(tree.iter_parts(()), 3)) == [], folder

    clone.git(clone.folder, "clone", "-q", "--separate-git-dir", str(clone.folder / "modules"), "origin", "half")
    part = est.WorkTree(clone.folder / "half", clone.env, submodules=True)
    packed = clone.folder / "modules/packed-refs"
    clone.git(part.root, "pack-refs", "--all")
    whole = packed.read_text()
    packed.write_text(whole[:-20])
    assert not est.discard_half_clone(part) and packed.exists(), "git can't tell"
    packed.write_text("")
    clone.git(part.root, "update-ref", "--no-deref", "HEAD", clone.head())
    assert not est.discard_half_clone(part) and packed.exists(), "a commit is checked out"
    (clone.folder / "modules/HEAD").write_text("ref: refs/heads/master\n")
    assert est.discard_half_clone(part) and not packed.exists()

    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 3\n"
    package = '{"scripts": {}}'
    new = clone.commit({".gitattributes": "*.bin filter=lfs\n", "x.bin": pointer, "package.json": package})
    for name in ("x.bin", "package.json"):
        os.mkfifo(clone.host / name)
    clone.git(clone.host, "fetch", "-q")

    def ask(*args: str) -> str:
        return os.fsdecode(est.git_output(clone.host, clone.env, *args))

    rule: Any = SimpleNamespace(command=["pnpm", "run", "x"], environment_file=None)
    coming = est.Coming(clone.host, rule, new, ask)
    coming.find_fates()
    with ThreadPoolExecutor() as pool:
        try:
            rules = est.lfs_rules(ask("grep", "-F", "filter=lfs", new))
            assert pool.submit(est.Foresight(coming).find_pointers, rules).result(10) == ["x.bin"]
            missing = pool.submit(est.Needs(coming).check_script, rule.command).result(10)
        finally:  # or what hangs there would hold this process
            for name in ("x.bin", "package.json"):
                os.close(os.open(clone.host / name, os.O_RDWR | os.O_NONBLOCK))
    assert missing and missing.what == f"package.json of {new[:7]} has no script x"


@pytest.mark.parametrize(
    ("base", "url", "joined"),
    [
        ("https://x.kr/a/b.git", "../c.git", "https://x.kr/a/c.git"),
        ("https://x.kr/a/b.git/", "./../../c", "https://x.kr/c"),
        ("git@x.kr:a/b", "../c", "git@x.kr:a/c"),
        ("git@x.kr:b", "../c", "git@x.kr:c"),
    ],
)
def test_a_relative_submodule_is_where_git_looks_for_it(base: str, url: str, joined: str):
    assert est.join_url(base, url) == joined


@pytest.mark.parametrize(
    "lines",
    [
        "update = !id", "update = none", "update = Checkout", "update = !id\n\tupdate = none", "shallow = TRUE",
        "shallow = maybe", "shallow", "fetchRecurseSubmodules = on-demand", "fetchRecurseSubmodules = now",
        "ignore = nothing", "branch = -x", "[", 'x = "', "url = --upload-pack=id", "update = none\n# [", "shallow = 2k",
    ],
)  # fmt: skip
def test_a_gitmodules_that_git_dies_of_never_comes(lines: str, clone: Clone):
    """git itself is the judge: such a tree can't be looked at, and the commit that mends it could not come."""
    linked = clone.folder / "seed/sub"
    clone.git(clone.folder, "clone", "-q", "origin", str(linked))
    before = clone.commit({})
    new = clone.commit({".gitmodules": f'[submodule "sub"]\n\tpath = sub\n\turl = ./\n\t{lines}\n'})
    clone.git(clone.host, "fetch", "-q")

    def ask(*args: str) -> str:
        return os.fsdecode(est.git_output(clone.host, clone.env, *args))

    rule: Any = SimpleNamespace(submodules=False, command=["true"], environment_file=None)
    refused = est.Coming(clone.host, rule, new, ask).check_settings()
    assert est.Coming(clone.host, rule, before, ask).check_settings() == []
    argv = ["git", "-C", str(clone.host), "checkout", "-q", new]
    subprocess.run(argv, env=clone.env, stderr=-3, timeout=60)
    argv[3:] = ["status"]
    dies = subprocess.run(argv, env=clone.env, stdout=-3, stderr=-3, timeout=60).returncode
    assert bool(refused) == bool(dies), (lines, refused)
    assert all(f"can't read .gitmodules of {new[:7]}: " in one.what for one in refused)


def test_the_way_out_of_a_gitmodules_that_git_dies_of(clone: Clone):
    """Who brought a clone there by hand: no question gets past it, and what a failed job advises does."""
    clone.git(clone.folder, "clone", "-q", "origin", str(clone.folder / "seed/sub"))
    head = '[submodule "sub"]\n\tpath = sub\n\turl = ./\n'
    clone.commit({".gitmodules": f"{head}\tshallow = maybe\n"})
    clone.git(clone.host, "fetch", "-q")
    argv = ["git", "-C", str(clone.host), "reset", "-q", "--hard", "origin/master"]
    subprocess.run(argv, env=clone.env, stderr=-3, timeout=60)
    said = subprocess.run([*argv[:3], "fetch"], env=clone.env, capture_output=True, timeout=60).stderr
    advice = est.explain_step(["git", "fetch"], said) or ""
    assert "empty .gitmodules there, git fetch, and git reset --hard" in advice
    mended = clone.commit({".gitmodules": head})
    (clone.host / ".gitmodules").write_text("")
    clone.git(clone.host, "fetch", "-q")
    clone.git(clone.host, *argv[3:])
    assert clone.git(clone.host, "rev-parse", "HEAD").strip() == mended
    assert (clone.host / ".gitmodules").read_text() == head


@pytest.mark.parametrize(
    ("url", "allow", "asked"),
    [
        ("https://x.kr/lib", "", True),
        ("git@x.kr:lib", "", True),
        ("/srv/other", "", False),
        ("file:///srv/other", "", False),
        ("C:/lib", "", False),
        ("/srv/other", "always", True),
        ("ext::sh -c id", "always", False),
        ("--upload-pack=id", "always", False),
    ],
)
def test_no_commit_that_nobody_read_chooses_what_runs_or_is_read_here(url: str, allow: str, asked: bool, clone: Clone):
    """A plan asks where a submodule comes from only what git's own step would ask."""
    questions: list[tuple[str, ...]] = []

    def ask(*args: str) -> str:
        questions.append(args)
        known = {"protocol.file.allow": allow, "submodule.x.url": "https://x.kr/ours"}
        return known.get(args[-1], "")

    rule: Any = SimpleNamespace(submodules=True, remote="origin")
    coming = est.Coming(clone.host, rule, clone.head(), ask, clone.head())
    coming.settings = {"submodule.x.url": url}
    assert not est.SubmodulePlaces(coming).has_moved("x", "x", "2" * 40)
    assert any(url in words for words in questions) == asked


@pytest.mark.parametrize(
    ("url", "place"),
    [
        ("https://169.254.169.254/latest", "169.254.169.254"),
        ("http://user:word@inside.example:8080/x", "inside.example:8080"),
        ("git@elsewhere.example:lib", "elsewhere.example"),
        ("https://x.kr:8443/lib", "x.kr:8443"),
        ("https://OURS.kr/lib", ""),
        ("../lib", ""),
        ("/srv/lib", ""),
    ],
)
def test_a_plan_asks_no_machine_that_a_commit_brings_up(url: str, place: str, clone: Clone):
    """The host would send a request into its own network for whoever can push a branch; the job, which somebody has
    ordered, asks as git's own step does."""

    def ask(*args: str) -> str:
        return {"submodule.x.url": "https://ours.kr/x", "remote.origin.url": "https://x.kr/app"}.get(args[-1], "")

    rule: Any = SimpleNamespace(submodules=True, remote="origin")
    coming = est.Coming(clone.host, rule, clone.head(), ask, clone.head())
    coming.settings = {"submodule.x.url": url}
    assert est.SubmodulePlaces(coming, plans=True).new_place("x") == place
    assert est.SubmodulePlaces(coming).new_place("x") == ""


def test_a_server_s_refs_are_branches_and_no_refspecs(clone: Clone):
    fetched: list[str] = []

    def ask(*args: str) -> str:
        if "ls-remote" in args:
            return "1 refs/heads/a:refs/heads/master\n2 refs/heads/good\n3 refs/heads/-x\n4 refs/heads/b*\n"
        if "fetch" in args:
            fetched.extend(args)
        return ""

    rule: Any = SimpleNamespace(submodules=True, remote="origin")
    coming = est.Coming(clone.host, rule, clone.head(), ask, clone.head())
    coming.settings = {"submodule.x.url": "https://x.kr/lib"}
    assert not est.SubmodulePlaces(coming).has_moved("x", "x", "2" * 40)
    assert [word for word in fetched if word.startswith("refs/")] == ["refs/heads/good"]


def test_a_program_where_nothing_can_be_started_is_known_before(tmp_path: Path):
    """The clone is on a disk that is mounted noexec, and a commit brings a program: by its interpreter it runs."""
    (tmp_path / "host").mkdir()
    with mounted(tmp_path / "host", "noexec"):
        clone = Clone(tmp_path)
        first = clone.head()
        program = clone.folder / "seed" / "go"
        program.write_text("#!/bin/sh\necho going\n")
        program.chmod(0o755)
        for command, expected in ((["./go"], 1), (["sh", "go"], 0)):
            settings = {"masterUrl": "ws://127.0.0.1:9900", "whitelist": [HOST], "deploy": {"command": command}}
            clone.commit({"config/updater.json": json.dumps(settings)})
            code, out, err = clone.deploy()
            assert code == expected, out + err
            if expected:
                assert "./go is on a file system that is mounted noexec" in err and clone.head() == first, err


@pytest.mark.parametrize("program", ["/nowhere/at/all/x", "/dev/null/x", f"/{'x' * 300}/x", "sub/x"])
def test_where_a_program_will_be_can_be_asked_of_any_name(clone: Clone, program: str):
    code, out, err = clone.deploy_with([program])
    assert code == 1 and "internal error" not in err and program.rpartition("/")[2] in err, out + err


def test_no_variable_of_git_s_has_another_repository_asked(clone: Clone):
    """Whether an environment file that leads out of the clone was committed: then it is not read, whatever GIT_DIR the
    daemon was started with."""
    (clone.folder / "outside.env").write_text("SAID=outside\n")
    (clone.folder / "seed" / "own.env").symlink_to("../outside.env")
    settings = {"masterUrl": "ws://127.0.0.1:9900", "whitelist": [HOST], "deploy": {"command": ["sh", "deploy.sh"]}}
    settings["hosts"] = {HOST: {"environmentFile": "own.env"}}
    clone.commit({"config/updater.json": json.dumps(settings), "deploy.sh": "echo got $SAID\n"})
    for more in ({}, {"GIT_DIR": "/nowhere", "GIT_INDEX_FILE": "/nowhere"}):
        clone.env |= more
        words = ["--state", str(clone.state), "--bind", HOST, "deploy", "master"]
        code, out, err = run([*PROGRAM, *words], clone.env, cwd=clone.host)
        assert code == 1 and "link out of the repository" in out + err and "got" not in out, (more, out, err)
