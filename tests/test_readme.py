"""The README says what is true: its tables are the program's, its messages exist, its first day works."""

from __future__ import annotations

import ast
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path

import estelle_updater as est
from tests.fleet import ROOT, Fleet, free_port, processes_of, run, wait_for
from tests.readme import rewrite

README = (ROOT / "README.md").read_text("utf-8")
SOURCE = (ROOT / "estelle_updater.py").read_text("utf-8")


def table(heading: str) -> list[list[str]]:
    """The cells of the first table after a heading."""
    part = README.split(f"\n## {heading}\n", 1)[1].split("\n## ", 1)[0]
    rows = [line for line in part.splitlines() if line.startswith("|")][2:]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", row.strip().strip("|"))] for row in rows]


def test_generated_parts_are_current() -> None:
    assert rewrite(README) == README, "write them anew: python3 tests/readme.py"


def test_messages_exist() -> None:
    plain = re.sub(r'["\'] *\n\s*f?["\']', "", SOURCE)
    rows = table("When something is wrong")
    assert len(rows) > 15
    for message, advice in rows:
        assert advice
        for text in re.findall(r"`([^`]+)`", message):
            assert text in plain, text


def test_every_state_and_verdict_has_a_row() -> None:
    """What a job can end with, however it is said, tells its reader what to do next."""
    known = [text for row in table("When something is wrong") for text in re.findall(r"`([^`]+)`", row[0])]
    said = [text for _, text in est.KNOWN_FAILURES]
    job = est.JobRecord("20260101-000000-0000", "h", "0" * 32, est.Kind.DEPLOY, "master")
    for state in est.FINAL - {est.State.SUCCEEDED}:
        said.append(est.result_text(replace(job, state=state, step="step", error="why")))
    for node in ast.walk(ast.parse(SOURCE)):
        match node:
            case ast.Call(func=ast.Attribute(attr="end"), args=[_, _, _, verdict]):  # the master's
                said.append(ast.unparse(verdict))
            case ast.keyword(arg="error", value=ast.Constant(value=str()) | ast.JoinedStr() as verdict):
                said.append(ast.unparse(verdict))
            case ast.Assign(targets=[ast.Name("why")], value=ast.JoinedStr() as verdict):
                said.append(ast.unparse(verdict))
    without = [text for text in said if text != "reason" and not any(message in text for message in known)]
    assert len(said) > 20 and not without, without


def camel(name: str) -> str:
    return re.sub(r"_(\w)", lambda match: match[1].upper(), name.removesuffix("_s"))


def test_configuration_keys_are_the_program_s() -> None:
    keys = " ".join(row[0] for row in table("Configuration"))
    for rule, prefix in ((est.DeployRule, "deploy."), (est.KeepRule, "keep.")):
        for one in fields(rule):
            assert f"`{prefix}{camel(one.name)}`" in keys
    top = set(re.findall(r"`([a-zA-Z]+)[.`]", keys))
    known = {camel(one.name) for one in fields(est.Config)}
    assert top - {"role", "repo", "command", "environmentFile", "env", "color"} <= known, top - known


def test_the_smallest_configuration_is_valid() -> None:
    block = re.search(r"```json\n(.*?)```", README, re.DOTALL)
    assert block
    config = est.parse_config(block[1], "README.md", "json")
    assert config.whitelist == ("5.223.72.58", "121.0.0.7")


def test_the_first_day(tmp_path: Path, fleet: Callable[..., Fleet], pyz: Path) -> None:
    """Build (the fixture did), copy, configure, serve, trigger: the README's own lines in an empty home."""
    one = fleet(hosts=1, start=False)
    clone = one.master.repo
    shutil.copy(pyz, tmp_path / "estelle_updater.pyz")
    config = {"masterUrl": f"ws://127.0.0.1:{free_port()}", "whitelist": ["127.0.0.1"], "deploy": {"command": ["true"]}}
    one.origin.commit({"config/updater.json": json.dumps(config)})
    one.origin.git("pull", "--quiet", cwd=clone)
    commands = re.findall(r"^ +python3 estelle_updater\.pyz (.*)$", README, re.MULTILINE)
    assert commands[:3] == ["serve", "status", "trigger all master"]
    env = one.env | {"ESTELLE_STATE": str(tmp_path / "state")}
    program = [sys.executable, str(tmp_path / "estelle_updater.pyz")]
    with open(tmp_path / "serve.log", "wb") as log:
        daemon = subprocess.Popen([*program, "serve"], cwd=clone, env=env, stdin=subprocess.DEVNULL, stderr=log)
    try:
        wait_for(lambda: "listening on" in (tmp_path / "serve.log").read_text(), "the master listens")
        for command in commands[1:3]:
            result = run([*program, *shlex.split(command)], env, clone)
            assert result.code == 0, result.out + result.err
        assert "[127.0.0.1] ✓ 완료" in result.out
    finally:
        daemon.terminate()
        assert daemon.wait(20) == 0
    wait_for(lambda: os.getpid() in processes_of(tmp_path) or not processes_of(tmp_path), "nothing is left running")
