"""Every Python of this machine that is new enough runs the program: help, a check, a deployment on two hosts."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.commands import new_host_line
from tests.fleet import MODULE, VERSION, Fleet, clean_env, run
from tests.pythons import OLDEST, find_pythons

FOUND = find_pythons()
OTHERS = {version: path for version, path in FOUND.items() if version != sys.version_info[:2]}


def names(versions: dict[tuple[int, int], str]) -> list[str]:
    return [f"{major}.{minor}" for major, minor in versions]


NEWER = {version: path for version, path in OTHERS.items() if version >= OLDEST}
OLDER = {version: path for version, path in OTHERS.items() if version < OLDEST}


def test_there_is_one_at_least() -> None:
    assert sys.version_info[:2] in FOUND or sys.prefix != sys.base_prefix, "the look for Pythons finds none"


# What `build` would make with this Python, of the files that another has fetched.
REBUILD = """
import sys, zipfile
sys.path.insert(0, sys.argv[1])
import estelle_updater
with zipfile.ZipFile(sys.argv[1]) as old, zipfile.ZipFile(sys.argv[2], "w") as new:
    for name in old.namelist():
        data = old.read(name)
        if name.endswith(".pyc"):
            source = name.removesuffix("c")
            data = estelle_updater._compile(old.read(source), source)
        new.writestr(zipfile.ZipInfo(name), data)
"""


@pytest.mark.parametrize("python", NEWER.values(), ids=names(NEWER))
def test_a_deployment_by_another_python(fleet: Callable[..., Fleet], pyz: Path, python: str, tmp_path: Path) -> None:
    """The zipapp of the tests' Python is compiled there once; the fleet has one of its own."""
    own = tmp_path / "own.pyz"
    made = run([python, "-c", REBUILD, pyz, own], clean_env(tmp_path / "home"))
    assert made.code == 0, made.err
    one = fleet(hosts=2, program=(python, str(own)))
    assert run([python, pyz, "--help"], one.env).out.startswith("usage: ")
    assert run([python, pyz, "config", "check"], one.env, one.master.repo).code == 0
    kept = Path(one.env["HOME"], ".cache/estelle-updater")
    assert len([*kept.iterdir()]) == 1, "its bytecode for the next start"
    one.origin.commit({"deploy.sh": "echo by another\n"})
    done = one.cli("trigger", "all", "master")
    assert done.code == 0, done.out + done.err
    for host in one.hosts:
        assert f"[{host.address}] by another\n" in done.out and f"[{host.address}] ✓ 완료 {VERSION}\n" in done.out
    rows = json.loads(one.cli("status", "--json").out)["hosts"]
    assert [row["online"] for row in rows] == [True, True]
    # the module by itself as well, as far as that goes without packages
    alone = run([python, str(MODULE), "config", "check"], one.env, one.master.repo)
    assert alone.code == 0, alone.err


@pytest.mark.parametrize("python", OLDER.values(), ids=names(OLDER))
def test_an_older_one_is_told_what_is_needed(tmp_path: Path, pyz: Path, python: str) -> None:
    for program in (pyz, MODULE):
        code, out, err = run([python, str(program), "status"], clean_env(tmp_path), tmp_path)
        assert code and not out and "python 3.11" in err.casefold(), err
    line = new_host_line("http://127.0.0.1:9").replace("python3", python, 1)
    done = run(["/bin/sh", "-c", line], clean_env(tmp_path), tmp_path)
    assert done.code and not done.out and not list(tmp_path.glob("*.pyz"))
