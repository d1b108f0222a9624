"""Fixtures for the tests that use the real parts; fleet.py and machines.py hold the parts."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.fleet import MODULE, PROGRAM, Fleet, Origin, clean_env, kill_processes_of, made_once, need, run
from tests.machines import Network, Windows

LONG = (
    "test_watch", "test_projects", "test_json_lines", "test_upgrade", "test_plan", "test_tree", "test_self_update",
    "test_bench", "test_identity", "test_links", "test_moves", "test_pm2", "test_pythons", "test_release", "test_setup",
    "test_three_hosts", "test_service", "test_drips", "test_switch", "test_notify",
)  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """One worker runs all tests that use Windows: its prefix is made once, and the machine is not flooded with Wine.

    What one worker has to run in a row begins first, the longest row before all, and then the files whose tests take
    longest each: nobody waits for one of them at the end.
    """

    def order(item: pytest.Item) -> int:
        mark = item.get_closest_marker("xdist_group")
        if mark is not None:
            return int(mark.args != ("windows",))
        return 2 if item.path.stem in LONG else 3

    for item in items:
        if "windows_python" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.xdist_group("windows"))
    items.sort(key=order)


@pytest.fixture
def origin(tmp_path: Path) -> Origin:
    """A bare repository with one commit on master."""
    need("git")
    return Origin(tmp_path)


@pytest.fixture
def fleet(tmp_path: Path) -> Iterator[Callable[..., Fleet]]:
    """Makes and starts a fleet, with the arguments of `Fleet`; `start=False` leaves the starting to the test."""
    need("git")
    made: list[Fleet] = []

    def make(*, start: bool = True, **options: Any) -> Fleet:
        made.append(Fleet(tmp_path, **options))
        if start:
            made[-1].start()
        return made[-1]

    yield make
    for one in made:
        one.stop_all()
    kill_processes_of(tmp_path)


@pytest.fixture
def netns() -> Iterator[Callable[[int], Network]]:
    """Makes a network of N hosts, each a network namespace."""
    made: list[Network] = []

    def make(hosts: int = 3) -> Network:
        made.append(Network(hosts))
        return made[-1]

    yield make
    for one in made:
        one.close()


@pytest.fixture(scope="session")
def windows_python(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Windows]:
    """A real Windows Python under Wine."""
    installed = Path(os.environ.get("ESTELLE_TEST_WINDOWS", "/nonexistent"))
    windows = Windows(installed, tmp_path_factory.mktemp("windows"))
    yield windows
    windows.close()


@pytest.fixture(scope="session")
def pyz(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The zipapp under its own name, built once for all workers from the checkout, if tests/run has not done so."""

    def build(target: Path) -> None:
        if PROGRAM[1] != str(MODULE):
            shutil.copy(PROGRAM[1], target)
        else:
            argv = [sys.executable, str(MODULE), "build", "-o", str(target)]
            code, out, err = run(argv, clean_env(target.parent / "home"), timeout_s=300)
            assert code == 0, f"build failed with {code}\n{out}{err}"

    return made_once(tmp_path_factory, "estelle_updater.pyz", build)
