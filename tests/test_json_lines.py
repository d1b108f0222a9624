"""With --json every command prints JSON and nothing else, on both streams, whatever goes wrong."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests import seam as est
from tests.commands import COMMAND, write_script
from tests.fleet import Fleet

CALLS: dict[str, list[list[str]]] = {
    "serve": [["--role", "king"]],
    "trigger": [["all", "master"], ["all", "master", "--detach"], ["all", "nope"], ["nobody", "master"], ["all"]],
    "plan": [["all", "master"], ["all", "nope"]],
    "rollback": [["all", "--yes"], ["all"]],
    "mcp": [],  # speaks another protocol
    "cancel": [["last", "--yes"], ["last"]],
    "logs": [[], ["-f"], ["last", "127.0.0.2"], ["20261122-210501-7f3a"]],
    "history": [[], ["--stats"]],
    "status": [[]],
    "health": [[]],
    "switch": [["blue"]],
    "release": [["master"]],
    "deploy": [["master"]],
    "upgrade": [["all"]],
    "freeze": [["--for", "1s"]],
    "thaw": [[]],
    "watch": [[], ["pause"], ["resume"]],
    "notify": [["test"]],
    "forget": [["127.0.0.2"]],
    "config": [["check"], ["show"], ["init"], ["convert", "--dry-run"]],
    "whitelist": [["list"], ["add", "127.0.0.1"], ["remove", "9.9.9.9"]],
    "setup": [["--dry-run"], ["--firewall"]],
    "doctor": [[]],
    "build": [["-o", "x.pyz"]],
    "demo": [[]],
    "completion": [["bash"]],
    "self-test": [[]],
    "prove-detached": [],
    "run-job": [],
    "nursery": [],
}


def test_every_command_prints_json_lines(fleet: Callable[..., Fleet], tmp_path: Path) -> None:
    """Also where the configuration is broken and its last valid settings are used, and where the master is gone."""
    assert set(CALLS) == {command.name for command in est.COMMANDS}, "a new command belongs here"
    one = fleet(hosts=2, command=COMMAND)
    write_script("echo fine\n", *one.hosts)

    def ask(*words: str) -> list[Any]:
        done = one.cli("--json", *words)
        said = []
        for line in [*done.out.splitlines(), *done.err.splitlines()]:
            try:
                said.append(json.loads(line))
            except ValueError:
                raise AssertionError((words, line)) from None
        assert said, words
        return said

    for name, calls in CALLS.items():
        for words in calls:
            if name not in ("build", "deploy"):  # of a checkout; beside the daemon
                ask(name, *words)
    good = one.master.config.read_text()
    one.master.config.write_text("{")
    for name in ("status", "health", "history", "logs", "trigger"):
        words = CALLS[name][0]
        said = ask(name, *words)
        told = [event["text"] for event in said if event.get("event") == "notice"]
        assert any("the last valid settings of this host are used" in text for text in told), (name, said)
    one.master.config.write_text(good)
    one.stop(one.master)
    for name in ("status", "health", "history", "logs", "cancel", "trigger", "plan"):
        ask(name, *CALLS[name][0])
    [found, notice] = ask("history", "--stats")
    assert found["stats"] and "this is what" in notice["text"]
