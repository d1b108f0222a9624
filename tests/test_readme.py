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
from pathlib import Path

from tests import seam as est
from tests.fleet import ROOT, Fleet, free_port, processes_of, run, wait_for
from tests.readme import rewrite
from tests.seam import replace

README = (ROOT / "README.md").read_text("utf-8")
SOURCE = (ROOT / "estelle_updater.py").read_text("utf-8")


def table(heading: str) -> list[list[str]]:
    """The cells of the first table after a heading."""
    part = README.split(f"\n## {heading}\n", 1)[1].split("\n## ", 1)[0]
    lines = [line for line in part.splitlines() if line.startswith("|")]
    heads = {index for index, line in enumerate(lines) if line.startswith("| ---")}
    rows = [line for index, line in enumerate(lines) if not {index, index + 1} & heads]
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


def test_the_lines_for_ai_clients_start_the_server() -> None:
    part = README.split("\n## AI clients (MCP)\n", 1)[1].split("\n## ", 1)[0]
    blocks = [json.loads(block) for block in re.findall(r"```json\n(.*?)```", part, re.DOTALL)]
    assert [list(block) for block in blocks] == [["mcpServers"], ["servers"]]
    lines = [server["args"] for block in blocks for servers in block.values() for server in servers.values()]
    lines += [line.split()[1:] for line in re.findall(r"-- (python3 [^`]+)`", part)]
    for line in lines:
        args = est.make_parser().parse_args(line[1:])
        assert (args.command, args.config) == ("mcp", "/srv/app/config/updater.json")
    assert len(lines) == 3


def test_the_smallest_configuration_is_valid() -> None:
    block = re.search(r"```json\n(.*?)```", README, re.DOTALL)
    assert block
    config = est.parse_config(block[1], "README.md", "json")
    assert config.whitelist == ("5.223.72.58", "121.0.0.7")


def test_exit_codes_are_the_program_s() -> None:
    codes = {int(row[0]) for row in table("Commands") if row[0].isdigit()}
    kinds = [kind for kind in vars(est).values() if isinstance(kind, type) and issubclass(kind, est.UpdaterError)]
    assert codes == {0, 130} | {kind.exit_code for kind in kinds}


def test_the_first_day(tmp_path: Path, fleet: Callable[..., Fleet]) -> None:
    """Build, copy, configure, serve, trigger: the README's own lines, with loopback addresses for the example's."""
    one = fleet(hosts=1, start=False)
    clone, port = one.master.repo, free_port()
    one.origin.commit({"deploy.sh": "echo v0301_4", "config/updater.json": None, "package.json": None})
    one.origin.git("pull", "--quiet", cwd=clone)
    for name in ("estelle_updater.py", *est.PACKED):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    env, home = one.env | {"ESTELLE_STATE": str(tmp_path / "state")}, one.env["HOME"]
    commands = re.findall(r"^ +python3 ((?:~/estelle-updater/)?estelle_updater\.py.*)$", README, re.MULTILINE)
    words = ["build", "config", "serve", "doctor", "setup", "status", "trigger"]
    assert [line.split()[1] for line in commands[:7]] == words

    def type_in(line: str, folder: Path) -> tuple[int, str]:
        line = line.replace("5.223.72.58:9900", f"127.0.0.1:{port}").replace("121.0.0.7", "127.0.0.1")
        program, *words = shlex.split(line)
        result = run([sys.executable, program.replace("~", home), *words], env, folder)
        return result.code, result.out + result.err

    assert type_in(commands[0], tmp_path)[0] == 0  # the file appears where one builds
    (copy,) = re.findall(r"^ +(mkdir .* && cp .*)$", README, re.MULTILINE)
    assert run(["/bin/sh", "-c", copy], env, tmp_path).code == 0
    code, text = type_in(commands[1], clone)
    assert (code, "committed and pushed" in text) == (0, True), text
    with open(tmp_path / "serve.log", "wb") as log:
        program = [sys.executable, f"{home}/estelle-updater/estelle_updater.pyz", "serve"]
        daemon = subprocess.Popen(program, cwd=clone, env=env, stdin=subprocess.DEVNULL, stderr=log)
    try:
        wait_for(lambda: "listening on" in (tmp_path / "serve.log").read_text(), "the master listens")
        code, text = type_in(commands[3], clone)
        assert (code, "✗ service: it runs, but nothing starts it after a reboot" in text) == (1, True), text
        assert "estelle_updater.pyz setup\n" in text, "the fix"
        assert type_in(commands[5], clone)[0] == 0
        code, text = type_in(commands[6], clone)
        assert (code, "[127.0.0.1] ✓ 완료 v0301_4" in text) == (0, True), text
        est_ = "~/estelle-updater/estelle_updater.pyz"
        ends = {"trigger all nowhere": 1, "trigger all -- -x": 2, "trigger 10.9.9.9 master": 4, "forget 127.0.0.1": 5}
        assert {line: type_in(f"{est_} {line}", clone)[0] for line in ends} == ends
    finally:
        daemon.terminate()
        assert daemon.wait(20) == 0
    assert type_in(commands[5], clone)[0] == 3
    wait_for(lambda: os.getpid() in processes_of(tmp_path) or not processes_of(tmp_path), "nothing is left running")


def test_the_first_day_is_short_and_everything_is_found() -> None:
    first, *others = re.split(r"^# Part ", README, flags=re.MULTILINE)
    assert len(others) == 2 and len(first.splitlines()) <= 150, "part 1 is what a newcomer reads"
    headings = re.findall(r"^##+ (.+)$", README, re.MULTILINE)
    anchors = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
    links = set(re.findall(r"\]\(#([^)]+)\)", README))
    assert links <= anchors, links - anchors
    guides = [
        re.sub(r"[^\w\- ]", "", name.lower()).replace(" ", "-") for name in re.findall(r"^## (.+)$", README, re.M)
    ]
    assert {*guides} <= set(re.findall(r"\]\(#([^)]+)\)", first)), "the table of contents names each"
