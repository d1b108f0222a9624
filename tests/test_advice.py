"""Advice is typed as it is printed: each line goes through a real shell, and does what it promises."""

from __future__ import annotations

import json
import os
import re
import shlex
import sys
import time
import tomllib
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar, cast

import pytest

from tests import seam as est
from tests.fleet import PROGRAM, Fleet, Origin, free_port, run, wait_for

NASTY = ["a b", "it's", '"q"', "-x", "a;b&c", "$HOME", "*", "새 폴더", "a\\b", "~x", "#x", "!x", "a\tb"]
# git takes these in a pattern
MAGIC = ["a*", "[a]b", ":x", "what?"]


def words_of(line: str) -> list[str]:
    """The words that a real shell makes of a line without operators."""
    told = run(["bash", "-c", f"printf '%s\\0' {line}"], os.environ)
    assert told.code == 0, (line, told.err)
    return told.out.split("\0")[:-1]


def type_in(folder: Path, line: str, env: dict[str, str]) -> str:
    """Type a line in a folder, as it is printed."""
    told = run(["bash", "-c", line], env, folder)
    assert told.code == 0, (line, told.out, told.err)
    return told.out


@pytest.mark.parametrize("name", NASTY + MAGIC)
def test_every_renderer_s_words_survive_the_shell(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One folder, file, host or branch of any name is one word of the line, and the same word."""
    repo = f"/srv/{name}"
    monkeypatch.setattr(sys, "argv", [f"/opt/{name}/e.pyz", "status", "--config", f"{repo}/c.toml", f"--state={name}"])
    renderers = {
        "typed": est.typed("git", "-C", repo, name),
        "advised": est.advised("trigger", "all", name),
        "pathspecs": f"git -- {est.pathspecs(name)}",
        "keep": est.keep_hint(repo, [name]),
        "free": est.free_hint(repo, [name], [name]),
        "whole": est.whole_hint(repo, est.Halfway("a" * 40, (name,), (name,))),
        "chown": est.chown_line(name, repo),
        "git's list": est.obstacles_hint(
            repo, f"error: The following untracked working tree files would\n\t{name}\nPlease\n".encode()
        ),
    }
    for what, line in renderers.items():
        found = []
        for command in line.split(" && "):
            found += words_of(command)
        whole = [word.removeprefix(":(literal)") for word in found]
        assert any(word == name or word.endswith(f"/{name}") for word in whole), (what, line)
        assert all(word == word.strip("'\"") or name in word for word in whole), (what, line)


def test_a_line_is_for_the_fleet_that_the_command_was_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Another project's clone is another fleet: what is typed there must not go to it."""
    given = ["--config", "/srv/a b/config/updater.toml", "--state=/var/x", "trigger", "--bind", "10.0.0.1", "all", "x"]
    assert est.given_options(given) == [
        *("--config", "/srv/a b/config/updater.toml", "--state", "/var/x", "--bind", "10.0.0.1"),
    ]
    assert est.given_options(["trigger", "all", "x", "--batch", "2", "--", "--config"]) == []
    assert est.given_options(["status", "--conf", "f"]) == ["--config", "f"], "argparse takes the beginning too"
    monkeypatch.setattr(sys, "argv", ["e.pyz", *given])
    job = est.JobRecord("20261127-000000-aaaa", "10.0.0.2", "m", est.Kind.DEPLOY, "x", est.State.FAILED, size=9)
    lines = est.next_commands(job.run, [job], {"10.0.0.2": "v1"}, 10)
    assert [words_of(line)[2:4] for line in lines] == [
        ["logs", job.run],
        ["rollback", "10.0.0.2"],
        ["trigger", "--failed-of"],
    ]
    for line in lines:
        assert words_of(line)[-6:] == est.given_options(given), line
    # the Python that runs this, not an older one that is called `python3`
    fake = tmp_path / "python3"
    fake.write_text("#!/bin/sh\nexit 9\n")
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    python = words_of(est.advised("status"))[0]
    assert type_in(tmp_path, est.typed(python, "-c", "print(7)"), dict(os.environ)) == "7\n"


def test_what_is_in_git_s_way_is_put_aside_and_nothing_else(tmp_path: Path) -> None:
    """Also two files of one name, a name that is a pattern, and one that is kept there already."""
    origin = Origin(tmp_path)
    origin.commit({"a*": "1", "ab": "1", "d/same": "1"})
    clone = origin.clone(tmp_path / "my clone's")
    origin.commit({"a*": "2", "d/same": "2", "same": "new", "n 새/same": "new", "-y": "new"})
    for name, text in {"a*": "mine", "d/same": "mine", "ab": "stays", "same": "S", "-y": "Y"}.items():
        (clone / name).write_text(text)
    (clone / "n 새").mkdir()
    (clone / "n 새/same").write_text("N")
    pull = ["git", "-c", "core.quotePath=false", "pull", "--ff-only"]
    refused = run(pull, origin.env, clone)
    assert refused.code, refused.out
    line = est.obstacles_hint(str(clone), refused.err.encode())
    type_in(tmp_path, line, origin.env)
    if run(pull, origin.env, clone).code:  # git lists one kind at a time
        refused = run(pull, origin.env, clone)
        type_in(tmp_path, est.obstacles_hint(str(clone), refused.err.encode()), origin.env)
    assert run(pull, origin.env, clone).code == 0
    kept = Path(f"{clone}.kept")
    texts = [(kept / name).read_text() for name in ("same", "n 새/same", "-y")]
    assert texts == ["S", "N", "Y"] and (clone / "same").read_text() == "new"
    assert (clone / "ab").read_text() == "stays", "its name only fits the pattern"
    origin.git("stash", "show", "--name-only", cwd=clone)
    # what is kept under that name is never overwritten without a word
    (clone / "same").write_text("second")
    run(["bash", "-c", est.keep_hint(str(clone), ["same"])], origin.env, tmp_path)
    assert (kept / "same").read_text() == "S"


def test_the_line_that_publishes_works_where_the_person_stands(tmp_path: Path) -> None:
    """In a subfolder, on a detached HEAD as a rollback leaves it, on a branch without an upstream."""
    settings = {"masterUrl": "ws://127.0.0.1:9900", "whitelist": ["127.0.0.1"]}
    origin = Origin(tmp_path)
    origin.commit({"my app/config/updater.json": json.dumps(settings), "my app/src/x": "1"})
    clone = origin.clone(tmp_path / "clone")
    count = 1

    def add(folder: Path) -> str:
        nonlocal count
        count += 1
        added = run([*PROGRAM, "whitelist", "add", f"127.0.0.{count}"], origin.env, folder)
        assert added.code == 0, added.err
        line = added.out.splitlines()[1]
        type_in(folder, line, origin.env)
        assert f"127.0.0.{count}" in origin.git("show", "HEAD:my app/config/updater.json", cwd=clone)
        assert "it takes effect with" in added.out
        return line

    def published(branch: str) -> bool:
        return f"127.0.0.{count}" in origin.git("show", f"{branch}:my app/config/updater.json", cwd=origin.bare)

    add(clone / "my app/src")
    assert published("master")
    origin.git("checkout", "--quiet", "--detach", cwd=clone)
    assert shlex.split(add(clone / "my app"))[:5] == ["git", "-C", str(clone), "checkout", "master"]
    assert published("master") and origin.git("branch", "--show-current", cwd=clone) == "master"
    origin.git("checkout", "--quiet", "-b", "own'branch", cwd=clone)
    assert " push -u origin " in add(clone / "my app")
    assert published("own'branch")
    # no remote: a push has no place to go, and only a person knows one
    origin.git("remote", "remove", "origin", cwd=clone)
    count += 1
    alone = run([*PROGRAM, "whitelist", "add", f"127.0.0.{count}"], origin.env, clone / "my app")
    line = alone.out.splitlines()[1]
    assert "REMOTE" not in line and line.count(" URL ") == 1
    type_in(clone, line.replace(" URL ", f" {shlex.quote(str(origin.bare))} "), origin.env)
    assert published("own'branch")
    # a remote that lets nobody write: the same by hand would leave the clone a commit ahead
    hook = origin.bare / "hooks/pre-receive"
    hook.write_text("#!/bin/sh\nexit 1\n")
    hook.chmod(0o755)
    refused = run([*PROGRAM, "whitelist", "add", "127.0.0.99", "--commit"], origin.env, clone / "my app")
    assert refused.code == 1 and "a clone that may" in refused.err and "git commit" not in refused.err


def test_again_is_the_same_again(fleet: Callable[..., Fleet]) -> None:
    """Who asked for one service does not get all of them restarted; and masterUrl's name is a target."""
    settings = {"deploy": {"command": ["sh", "deploy.sh"], "restart": ["user:first.service", "user:second.service"]}}
    one = fleet(hosts=1, config=settings, start=False)
    named = json.loads((one.origin.seed / "config/updater.json").read_text())
    named["masterUrl"] = one.url.replace("127.0.0.1", "localhost")
    one.origin.commit({"config/updater.json": json.dumps(named)})
    one.origin.git("pull", "--quiet", cwd=one.master.repo)
    one.start()
    failed = one.cli("trigger", "localhost", "master", "--only", "user:second.service")
    assert failed.code == 1 and "second.service" in failed.out and "first.service" not in failed.out
    (again,) = re.findall(r"trigger (--failed-of \S+)", failed.err)
    told = one.cli("trigger", *again.split())
    assert told.code == 1 and "second.service" in told.out and "first.service" not in told.out
    # without the master, what does it again is no order to the master
    one.stop(one.master)
    one.origin.commit({"deploy.sh": "exit 3\n"})
    alone = one.cli("deploy", "master")
    assert alone.code == 1 and "--failed-of" not in alone.err and re.search(r"deploy master  +again", alone.err)


def failed_job(error: str) -> est.JobRecord:
    words = ("20261127-000000-aaaa", "10.0.0.2", "m", est.Kind.DEPLOY, "x", est.State.FAILED)
    return est.JobRecord(*words, size=9, error=error)


def test_again_is_offered_only_where_it_may_help() -> None:
    """A branch that the remote has not: the same order has the same end."""
    typo, other = failed_job(f"{est.NO_BRANCH}; did you mean master?"), failed_job("disk full")

    def again(*jobs: est.JobRecord) -> bool:
        return any("--failed-of" in line for line in est.next_commands("r", jobs, {}, 0))

    assert (again(typo), again(other), again(typo, other)) == (False, True, True)


def test_on_windows_one_command_after_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its PowerShell takes no `&&`: no line that is made for such a host has one."""
    monkeypatch.setattr(est.program, "ON_WINDOWS", True)
    whole = est.whole_hint("C:/a b", est.Halfway("a" * 40, ("x",), ("y",)))
    assert whole == 'git -C "C:/a b" checkout HEAD -- x, then: git -C "C:/a b" clean -f -- y'
    assert "&&" not in est.free_hint("C:/r", ["a"], ["b", "c"]) + est.keep_hint("C:/r", ["a", "d/b"])
    monkeypatch.undo()
    assert est.in_turn("a", "b") == "a && b"


@pytest.mark.parametrize("asked", ["mastre", "MASTER", "refs/heads/master", "origin/master"])
def test_the_branch_that_was_nearly_written(asked: str) -> None:
    """As people write it who know git's names, and with the shift key held."""
    listed = "1 commit\trefs/remotes/origin/Master\n2 commit\trefs/remotes/origin/next\n"
    assert est.meant_branch(listed, "origin", asked) == "; did you mean Master?"


def test_a_model_is_told_only_what_it_may_call() -> None:
    """No plan names a run; a rollback is never done again by one, nor a typo."""
    row = {"host": "10.0.0.2", "ok": False, "error": "disk full"}
    answer = {"run": "R", "kind": est.Kind.DEPLOY, "branch": "master", "hosts": [row, row | {"ok": True}]}
    assert "update with failed_of R " in est.next_calls(answer, plans=False)
    assert est.next_calls(answer, plans=True).endswith("plan and update target 10.0.0.2, branch master")
    for change in ({"kind": est.Kind.ROLLBACK}, {"hosts": [row | {"error": est.NO_BRANCH}]}):
        assert est.next_calls(answer | change, plans=False) == "call logs with run R for more"


def test_only_a_host_that_can_be_the_master_is_told_so() -> None:
    """Each host has a loopback of its own, who has a --bind knows, and a token is no silence."""
    silent, wrong = est.UnreachableError("w", "hint"), est.ConfigError("w", "hint")
    far, near = (
        est.parse_config(json.dumps({"masterUrl": f"ws://{host}:9900", "whitelist": []}), "f", "json")
        for host in ("5.223.72.58", "127.0.0.1")
    )
    assert "behind a NAT" in est.reach_hint(silent, est.Role.AGENT, far, None)
    for args in ((wrong, est.Role.AGENT, far, None), (silent, est.Role.AGENT, near, None)):
        assert est.reach_hint(*args) == "hint"
    assert est.reach_hint(silent, est.Role.AGENT, far, "10.0.0.1") == "hint"


def test_a_master_that_may_not_listen_is_told_why(tmp_path: Path) -> None:
    """Not of another one where the address is another host's; nor of a lost list where there never was one."""
    origin = Origin(tmp_path)
    settings = {"masterUrl": f"ws://127.0.0.1:{free_port()}", "whitelist": [], "deploy": {"command": ["true"]}}
    origin.commit({"config/updater.json": json.dumps(settings)})
    clone = origin.clone(tmp_path / "clone")
    state = ["--state", str(tmp_path / "state"), "--bind", "127.0.0.1"]
    assert run([*PROGRAM, "deploy", "master", *state], origin.env, clone).code == 0
    told = run([*PROGRAM, "serve", "--listen", "192.0.2.99:9900", *state], origin.env, clone)
    assert told.code == 2 and "no address of this host" in told.err and "another master" not in told.err
    assert "forget" not in told.err and "machines.json" not in told.err


def test_a_branch_is_kept_by_a_name_that_is_free() -> None:
    """Nor by one that git can't have beside another."""
    assert est.name_to_keep("rel", ["rel", "master"]) == "kept-rel"
    assert est.name_to_keep("rel", ["rel", "kept-rel", "kept2-rel/x"]) == "kept3-rel"


def test_a_result_that_no_master_takes_holds_nobody_for_ever() -> None:
    """masterUrl may have moved meanwhile, and the host has to follow."""

    def job(state: est.State, ended_before_s: float) -> est.OwnJob:
        record = est.JobRecord("r", "h", "m", est.Kind.DEPLOY, "x", state, ended=time.time() - ended_before_s)
        return est.OwnJob(record)

    assert est.is_untold([job(est.State.SUCCEEDED, 5)])
    assert not est.is_untold([job(est.State.SUCCEEDED, 3600), job(est.State.FAILED, 999)])
    assert est.is_untold([job(est.State.SUCCEEDED, 3600), job(est.State.RUNNING, 3600)])


@pytest.mark.parametrize(
    ("body", "said"),
    [(b"", "HTTP 502 instead of a WebSocket"), (b"Bad\nGateway\n", "HTTP 502 instead of a WebSocket: Bad Gateway")],
)
def test_an_http_answer_without_words(body: bytes, said: str) -> None:
    """Nothing stands behind a colon."""
    assert est.refusal(502, body).what == said


def test_a_host_that_no_master_has_seen_is_called_by_an_address(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its bare name may be another host's, and the master would not take its result."""
    monkeypatch.setattr(est.program, "own_address", lambda: "10.1.2.3")
    monkeypatch.setattr("socket.gethostname", lambda: "debian")
    assert est.unseen_label() == "10.1.2.3/debian"
    monkeypatch.setattr("socket.gethostname", lambda: "a [b]")
    assert est.unseen_label() == "10.1.2.3"
    monkeypatch.setattr(est.program, "own_address", lambda: "127.0.0.1")
    assert est.unseen_label() == "a [b]"


def test_a_fault_of_ours_is_an_answer() -> None:
    """The host's queue would wait ten minutes for it."""
    said: dict[str, Any] = {}

    class Own:
        jobs: ClassVar[dict[tuple[str, str], Any]] = {}

        def accept(self, record: est.JobRecord, link: object) -> None:
            raise RuntimeError("a fault")

        def write(self, record: est.JobRecord, **changes: Any) -> None:
            said.update(changes)

    agent = SimpleNamespace(own=Own())
    order = est.Order(json.loads(json.dumps(vars(failed_job("")))))
    est.Agent.on_order(cast(est.Agent, agent), order, cast(Any, None))
    assert said["state"] is est.State.FAILED and "RuntimeError" in said["error"]
    said.clear()
    running = est.replace(est.decode_fields(est.JobRecord, order.job), state=est.State.RUNNING)
    Own.jobs[running.run, running.host] = SimpleNamespace(record=running)
    est.Agent.on_order(cast(est.Agent, agent), order, cast(Any, None))
    assert not said, "a job that runs here ends by itself"


def test_who_is_turned_away_needs_more_than_its_service(fleet: Callable[..., Fleet]) -> None:
    """A token that the master alone has got."""
    one = fleet(hosts=2)
    token = one.tmp_path / "token"
    token.write_text("a token that is long enough to be one\n")
    token.chmod(0o600)
    settings = json.loads((one.origin.seed / "config/updater.json").read_text())
    one.origin.commit({"config/updater.json": json.dumps({**settings, "tokenFile": str(token)})})
    # a line of the master's, typed where it is read
    lost = one.cli("logs", "20261122-210501-7f3a")
    (listed,) = re.findall("`(.*history.*)` lists the runs", lost.err)
    type_in(one.tmp_path, listed, one.env | {"ESTELLE_CONFIG": str(one.master.config)})
    told = one.cli("trigger", "127.0.0.1", "master")
    assert told.code == 0 and "a host without that file" in told.out
    wait_for(lambda: "agent 127.0.0.2 is offline" in one.master.stderr, "the agent is cut off")
    for command in ("trigger", "plan"):
        gone = one.cli(command, "127.0.0.2", "master")
        assert gone.code == 4 and "start its service" not in gone.err
        assert "127.0.0.2 is turned away" in gone.err and "tokenFile" in gone.err
    assert "127.0.0.2 is turned away" in one.cli("status").out
    assert "turned away" in one.cli("trigger", "all", "master").err
    # it comes back by what was said
    assert one.cli("deploy", "master", host=one.agents[0]).code == 0
    wait_for(lambda: one.cli("trigger", "127.0.0.2", "master").code == 0, "the agent is welcomed again")


def test_a_command_that_the_master_names_is_typed_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """A shell has a `history` of its own, and the master does not know where this program is."""
    monkeypatch.setattr(sys, "argv", ["/opt/a b/e.pyz", "logs", "--config", "/srv/it's/c.toml"])
    told = est.spelled("x; `forget 10.0.0.1` drops it, `history` lists; correct `config` in [haproxy], `level admin`")
    first, second = re.findall(r"`(\S+ [^`]*e\.pyz[^`]*)`", told)
    assert words_of(first)[1:] == ["/opt/a b/e.pyz", "forget", "10.0.0.1", "--config", "/srv/it's/c.toml"]
    assert words_of(second)[2] == "history" and told.endswith("correct `config` in [haproxy], `level admin`")


def test_what_to_write_into_the_configuration_is_read_there() -> None:
    """In both forms; a header and a key on one line are no TOML."""
    words = est.section_words("10.0.0.7/office pc", "role", "master")
    told = re.fullmatch(r"(.+) and below it (.+) \(in JSON: (.+)\)", words)
    assert told
    wanted = {"hosts": {"10.0.0.7/office pc": {"role": "master"}}}
    assert tomllib.loads(f"{told[1]}\n{told[2]}\n") == json.loads(f"{{{told[3]}}}") == wanted


def test_root_is_not_told_to_take_what_another_user_serves(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A chown to root would end the service of the user who has the clone."""
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert words_of(est.owner_fix(tmp_path, 0).partition(",")[0]) == ["sudo", "-u", "root", "-i"]
    nameless = est.owner_fix(tmp_path, 54321)
    assert words_of(nameless.partition(",")[0]) == ["sudo", "-u", "#54321", "-i"] and "chown" not in nameless
    monkeypatch.setattr(os, "geteuid", lambda: 54321)
    assert "chown -R 54321 " in est.owner_fix(tmp_path, 0)
