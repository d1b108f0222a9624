"""What goes wrong before anything starts: a line that says what, a line what to do, and the contract's exit code."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pytest

from tests import seam
from tests.fleet import PROGRAM, Fleet, Result, free_port, run

GOOD = {"masterUrl": "ws://127.0.0.1:9", "whitelist": ["127.0.0.1"]}
HOSTILE = [
    "-x", "--upload-pack=touch x", "a b", "a..b", "a@{1}", "a\nb", "$(touch x)", "a~1", "a^",
    "a:b", "refs/heads/", "/a", "a/", "a.lock", "@", "HEAD", "a//b", "a\\b", ".a", "x" * 10_000, "a\u202eb", "",
]  # fmt: skip


def est(folder: Path, *words: str, env: Mapping[str, str] | None = None, timeout_s: float = 30) -> Result:
    own = {"PATH": os.environ["PATH"], "HOME": str(folder), "ESTELLE_STATE": str(folder / "state")}
    return run([*PROGRAM, *words], own | dict(env or {}), folder, timeout_s)


def repository(folder: Path, config: object = GOOD, name: str = "updater.json") -> Path:
    run(["git", "init", "-q", "."], dict(os.environ), folder)
    (folder / "config").mkdir()
    text = config if isinstance(config, str) else json.dumps(config)
    (folder / "config" / name).write_text(text)
    return folder


def assert_refused(result: Result, code: int, *parts: str) -> None:
    """One line WHAT that holds the parts, one line HINT, the exit code, and nothing else."""
    assert result.code == code, (result.out, result.err)
    lines = result.err.splitlines()
    assert result.out == "" and "Traceback" not in result.err
    error = [line for line in lines if line.startswith("estelle-updater: error: ")]
    hint = [line for line in lines if line.startswith("hint: ")]
    assert len(error) == 1 and len(hint) == 1, result.err
    for part in parts:
        assert part in result.err, result.err


CONFIGURATIONS = {
    "no JSON": ("{", ["updater.json"]),
    "unknown key": (GOOD | {"whitelst": []}, ["whitelst", "whitelist"]),
    "no address": (GOOD | {"whitelist": ["121.x.x.x"]}, ["whitelist[0]", "121.x.x.x", "121.0.0.7"]),
    "wrong type": (GOOD | {"whitelist": "127.0.0.1"}, ["whitelist"]),
    "no masterUrl": ({"whitelist": []}, ["masterUrl"]),
    "wrong scheme": (GOOD | {"masterUrl": "http://1.2.3.4"}, ["masterUrl", "http://1.2.3.4"]),
    "a secret": (GOOD | {"token": "abc"}, ["token"]),
}


@pytest.mark.parametrize("name", CONFIGURATIONS)
@pytest.mark.parametrize("words", [["serve"], ["status"], ["trigger", "all", "master"]], ids=lambda words: words[0])
def test_configuration(tmp_path: Path, name: str, words: Sequence[str]) -> None:
    config, parts = CONFIGURATIONS[name]
    assert_refused(est(repository(tmp_path, config), *words), 2, *parts)


def test_several_problems_are_told_at_once(tmp_path: Path) -> None:
    repository(tmp_path, {"masterUrl": 5, "whitelist": ["x"], "nope": 1})
    result = est(tmp_path, "serve")
    assert_refused(result, 2, "masterUrl")
    assert "more" in result.err or ("whitelist" in result.err and "nope" in result.err)


def test_a_file_where_a_folder_should_be(tmp_path: Path) -> None:
    run(["git", "init", "-q", "."], dict(os.environ), tmp_path)
    (tmp_path / "config").write_text("")
    assert_refused(est(tmp_path, "config", "init", "--master", "ws://127.0.0.1:9"), 1, str(tmp_path / "config"))


def test_two_configurations_or_none(tmp_path: Path) -> None:
    assert_refused(est(tmp_path, "status"), 2, "config/updater.json", "--config")
    repository(tmp_path)
    (tmp_path / "config" / "updater.toml").write_text('masterUrl = "ws://127.0.0.1:9"\nwhitelist = []\n')
    assert_refused(est(tmp_path, "status"), 2, "updater.json", "updater.toml")
    (tmp_path / "config" / "updater.json").unlink()
    (tmp_path / "config" / "updater.toml").write_text("masterUrl = ")
    assert_refused(est(tmp_path, "status"), 2, "updater.toml")
    assert_refused(est(tmp_path, "status", "--config", str(tmp_path / "missing.json")), 2, "missing.json")


@pytest.mark.parametrize("branch", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_branch_names_reach_nobody(tmp_path: Path, branch: str) -> None:
    repository(tmp_path)
    for words in (["trigger", "all", "--", branch], ["deploy", "--", branch]):
        result = est(tmp_path, *words)
        assert result.code == 2 and "is no branch name" in result.err and "Traceback" not in result.err
    assert not (tmp_path / "state").exists(), "nothing was recorded, nothing started"


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["trigger"], ["TARGET"]),
        (["frobnicate"], ["frobnicate", "trigger"]),
        (["trigge"], ["did you mean trigger?"]),
        (["trigger", "all", "master", "--wait", "soon"], ["soon"]),
        (["trigger", "all", "master", "--batch", "0"], ["0"]),
        (["logs", "../../etc"], ["../../etc", "history"]),
        (["cancel", "nope"], ["nope"]),
        (["serve", "--listen", "here"], ["here", "9900"]),
        (["serve", "--role", "king"], ["king"]),
        (["--bind", "1.2.3.x", "status"], ["1.2.3.x"]),
        (["status", "--nope"], ["status has no option '--nope'", "status --help"]),
        (["status", "--jsn"], ["did you mean --json?"]),
        (["--jsn", "status"], ["did you mean --json?"]),
        (["trigger", "all", "master", "--wiat=3"], ["trigger has no option '--wiat=3'", "did you mean --wait?"]),
        (["trigger", "all", "master", "now"], ["trigger takes no further word: 'now'"]),
        (["trigger", "all"], ["BRANCH is missing", "for example: trigger all master"]),
        (["trigger", "10.0.0.7"], ["BRANCH is missing", "for example: trigger 10.0.0.7 master"]),
        (["rollback", "all", "--yes", "--to", ""], ["--to is empty", "leave it out"]),
        (["trigger", "all", "master", "--", "--force"], ["--force stands behind `--`", "put it before"]),
        (["logs", "last", "--tail", "9"], ["logs has no option '--tail'", "logs --help"]),
        (["status", "--config", "/etc/passwd"], ["is /etc/passwd meant?", "--config names"]),
        (["whitelist", "list", "10.0.0.7"], ["takes no ADDRESS"]),
        (["plan"], ["TARGET and BRANCH are missing", "for example: plan all master"]),
        (["freeze", "night"], ["--for is missing", "for example: freeze"]),
        (["switch", "gren"], ["'gren' is none of blue, green, standby", "did you mean green?"]),
        (["watch", "xyz"], ["'xyz' is none of pause, resume", "watch --help"]),
        ([], ["COMMAND is missing", "for example: status"]),
    ],
    ids=lambda value: " ".join(value)[:30],
)
def test_usage(tmp_path: Path, words: Sequence[str], parts: Sequence[str]) -> None:
    repository(tmp_path)
    assert_refused(est(tmp_path, *words), 2, *parts)


def test_each_example_is_a_command_line() -> None:
    for command in seam.COMMANDS:
        needs = [item for item in command.options if not item.names[0].startswith("-") and "nargs" not in item.settings]
        assert command.hidden or not needs or command.name in seam.EXAMPLES
    for name, example in seam.EXAMPLES.items():
        args = seam.make_parser().parse_args(example.split())
        assert args.command == name


def test_errors_as_json(tmp_path: Path) -> None:
    repository(tmp_path)
    for words, code in ((["frobnicate"], 2), (["status"], 3), (["trigger", "all", "-x"], 2)):
        result = est(tmp_path, "--json", *words)
        event = json.loads(result.err)
        assert (result.code, result.out) == (code, "")
        assert event["event"] == "error" and event["what"] and event["hint"] and event["exit"] == code


def test_no_master(tmp_path: Path) -> None:
    repository(tmp_path, GOOD | {"masterUrl": f"ws://127.0.0.1:{free_port()}"})
    for words in (["status"], ["trigger", "all", "master"], ["cancel", "20261122-210501-7f3a"]):
        assert_refused(est(tmp_path, *words), 3, "can't reach the master", "serve")


def test_a_port_in_use_and_a_state_folder_that_can_not_be(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        repository(tmp_path, GOOD | {"masterUrl": f"ws://127.0.0.1:{port}"})
        result = est(tmp_path, "serve", "--bind", "127.0.0.1", "--listen", f"127.0.0.1:{port}")
        assert result.code == 2 and f"can't listen on 127.0.0.1:{port}" in result.err and "hint: " in result.err
        assert "Traceback" not in result.err
    (tmp_path / "file").write_text("")
    result = est(tmp_path, "serve", "--state", str(tmp_path / "file"))
    assert_refused(result, 2, str(tmp_path / "file"), "--state")


def test_hosts_that_can_not_deploy_say_why(fleet: Callable[..., Fleet], tmp_path: Path) -> None:
    one = fleet(hosts=2)
    agent = one.agents[0]
    unknown = one.cli("trigger", agent.address, "no-such-branch")
    assert unknown.code == 1 and "✗ 실패 git checkout no-such-branch (exit 1" in unknown.out
    assert "no such branch, tag or commit" in unknown.err and "did you mean" not in unknown.err
    slip = one.cli("trigger", agent.address, "mastre")
    assert "no such branch, tag or commit on the remote; did you mean master?" in slip.err
    slip = one.cli("plan", agent.address, "mastre")
    assert "no such branch, tag or commit on the remote: mastre; did you mean master?" in slip.out
    for each in one.hosts:  # that have fetched from another one before
        one.origin.git("init", "--quiet", "--bare", str(tmp_path / "empty"), cwd=tmp_path)
        one.origin.git("remote", "set-url", "origin", str(tmp_path / "empty"), cwd=each.repo)
    for words in (("plan",), ("trigger",)):
        for branch in ("mastre", "master"):
            empty = one.cli(*words, agent.address, branch)
            said = "no such branch, tag or commit on the remote"
            assert said in empty.out + empty.err and "it has no branches yet: push one" in empty.out + empty.err, empty
            assert "did you mean" not in empty.out + empty.err
    for each in one.hosts:
        one.origin.git("remote", "set-url", "origin", str(one.origin.bare), cwd=each.repo)
    slip = one.cli("trigger", "al", "master")
    assert slip.code == 4 and "hint: did you mean all? known: 127.0.0." in slip.err
    assert one.cli("trigger", "127.0.0.77", "master").code == 4
    config = json.loads(agent.config.read_text())
    one.origin.commit({"config/updater.json": json.dumps(config | {"deploy": {"command": ["pnpmx", "go"]}})})
    missing = one.cli("trigger", agent.address, "master")
    assert missing.code == 1 and "pnpmx: not found in PATH" in missing.out
    assert f"[{agent.address}] ✗ 실패 pnpmx go (exit 127)" in missing.out
    elsewhere = {"hosts": {agent.address: {"repo": str(tmp_path / "nowhere")}}}
    agent.config.write_text(json.dumps(config | elsewhere))
    nowhere = one.cli("trigger", agent.address, "master")
    assert nowhere.code == 1 and "nowhere" in nowhere.out and "✗ 실패 check" in nowhere.out
    (tmp_path / "nowhere").mkdir()
    plain = one.cli("trigger", agent.address, "master")
    assert plain.code == 1 and "is no git checkout" in plain.out


def test_without_git(fleet: Callable[..., Fleet], tmp_path: Path) -> None:
    one = fleet(hosts=2, start=False)
    one.start(one.master)
    agent = one.agents[0]
    one.start(agent, env={"PATH": str(tmp_path / "empty")})
    assert "git: not found in PATH" in agent.stderr
    result = one.cli("trigger", agent.address, "master")
    assert result.code == 1 and "git: not found in PATH" in result.out


def test_refused_by_the_whitelist(fleet: Callable[..., Fleet]) -> None:
    one = fleet(hosts=1)
    result = one.cli("status", bind="127.0.0.66")
    assert_refused(result, 3, "127.0.0.66", "whitelist")
