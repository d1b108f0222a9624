"""Commands that run while the test goes on, and deployments that wait for the test."""

from __future__ import annotations

import itertools
import json
import os
import re
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from tests.fleet import PROGRAM, ROOT, Fleet, Host, need, wait_for

PLACE = PROGRAM[1] if PROGRAM[1].endswith(".pyz") else str(ROOT)
COMMAND = ("sh", "../script")  # what a host deploys with: a file beside its clone, so that each test writes its own
STEP = " ".join(COMMAND)
STEPS = ("git fetch origin...", "git checkout master...", "git pull origin master...", f"{STEP}...")
GATE = "until [ -e ../go ]; do sleep 0.1; done\n"
GATED = f"echo begun\n{GATE}echo ended\n"
FOREVER = "echo begun\nsleep 86400\n"
# The program with other limits (JSON in LIMITS), or a fault at a chosen place (code in FAULT). Out of the zipapp: its
# runners are started as that, and the bare module would be compiled for each of them.
HURRIED = f"""
import json, os, sys
sys.path.insert(0, {PLACE!r})
import estelle_updater
estelle_updater.Service  # what `build` sets apart is there from now on, or it would come after these limits
vars(estelle_updater).update(json.loads(os.environ.get("LIMITS", "{{}}")))
exec(os.environ.get("FAULT", ""), vars(estelle_updater))
sys.exit(estelle_updater.main(sys.argv[1:]))
"""

_numbers = itertools.count(1)


def write_script(text: str, *hosts: Host) -> None:
    """What the next deployments of these hosts run."""
    for host in hosts:
        (host.folder / "go").unlink(missing_ok=True)
        (host.folder / "script").write_text(text)


def open_gate(*hosts: Host) -> None:
    """Let the deployments of these hosts that wait in GATE go on."""
    for host in hosts:
        (host.folder / "go").touch()


def lines_of(out: str, host: str) -> list[str]:
    """One host's lines without their prefix."""
    prefix = f"[{host}] "
    return [line.removeprefix(prefix) for line in out.splitlines() if line.startswith(prefix)]


def announced(out: str, host: str) -> list[str]:
    """The announcements among one host's lines."""
    return [line for line in lines_of(out, host) if line.endswith("...")]


def module_fleet(name: str, **options: Any) -> Any:
    """A fixture: one fleet for all tests of a module, which `ready` makes usable for each."""

    @pytest.fixture(scope="module", name="made")
    def fixture(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
        need("git", "tee")
        fleet = Fleet(tmp_path_factory.mktemp(name), command=COMMAND, **options)
        fleet.start()
        yield fleet
        fleet.stop_all()

    return fixture


def ready(made: Fleet) -> Iterator[Fleet]:
    """The body of a fixture: harmless scripts before a test, all daemons and nothing under way after it."""
    write_script("echo fine\n", *made.hosts)
    for host in made.hosts:
        (host.folder / "begun").unlink(missing_ok=True)
    yield made
    open_gate(*made.hosts)
    for host in made.hosts:
        if host.process and host.process.poll() is not None:
            made.start(host)
    made.wait_online()
    for folder in made.runs():
        if any(
            job_of(made, folder.name, path.stem).get("state") in ("queued", "running") for path in folder.glob("127*")
        ):
            made.cli("cancel", folder.name)


def again(one: Fleet, host: Host, **env: str) -> None:
    """Start a daemon once more, with other limits or a fault (see HURRIED)."""
    one.stop(host)
    one.start(host, env=env)
    one.wait_online()


class Watched:
    """A command that was started with `Fleet.popen`; what it writes is in files, which can be read while it runs."""

    def __init__(self, fleet: Fleet, *arguments: str, **options: Any) -> None:
        self.base = fleet.tmp_path / f"command{next(_numbers)}"
        self.arguments = arguments
        with open(self.base.with_suffix(".out"), "wb") as out, open(self.base.with_suffix(".err"), "wb") as err:
            self.process: subprocess.Popen[bytes] = fleet.popen(*arguments, stdout=out, stderr=err, **options)

    @property
    def data(self) -> bytes:
        """What it has written to standard output."""
        return self.base.with_suffix(".out").read_bytes()

    @property
    def out(self) -> str:
        return self.data.decode("utf-8", "replace")

    @property
    def err(self) -> str:
        return self.base.with_suffix(".err").read_text("utf-8", "replace")

    @property
    def events(self) -> list[dict[str, Any]]:
        """The whole lines of a `--json` answer so far."""
        return [json.loads(line) for line in self.out.splitlines(keepends=True) if line.endswith("\n")]

    def until(self, condition: str | Callable[[], Any], timeout_s: float = 30) -> Any:
        """Until a text is in its output, or a condition holds."""
        if isinstance(condition, str):
            text = condition
            condition = lambda: text in self.out  # noqa: E731
        what = f"`{' '.join(self.arguments)}` got there"
        return wait_for(condition, lambda: f"{what}\n{self.out}\n{self.err}", timeout_s)

    def interrupt(self) -> None:
        """Ctrl-C."""
        self.process.send_signal(signal.SIGINT)

    def end(self, timeout_s: float = 40) -> int:
        """Its exit code, when it ends by itself."""
        try:
            return self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            pytest.fail(f"`{' '.join(self.arguments)}` does not end\n{self.out}\n{self.err}")

    @property
    def run(self) -> str:
        """The id of the run that it follows, as standard error or the first event says."""

        def found() -> str | None:
            if "--json" in self.arguments:
                return next((event["run"] for event in self.events if event["event"] == "run"), None)
            return next((line.split()[2].rstrip(":") for line in self.err.splitlines() if ": run " in line), None)

        return str(self.until(found))


def detach(fleet: Fleet, target: str = "all", branch: str = "master", *options: str) -> str:
    """Start a deployment and leave it; returns the run's id."""
    code, out, err = fleet.cli("trigger", target, branch, "--detach", *options)
    assert code == 0, err
    return out.strip()


def job_of(fleet: Fleet, run: str, host: Host | str, at: Host | None = None) -> dict[str, Any]:
    """A host's recorded state of a run, as the master has it, or as another host has it; {} where there is none."""
    label = host if isinstance(host, str) else host.address
    name = "".join(c if c.isascii() and (c.isalnum() or c in "._-") else "_" for c in label)
    with suppress(OSError, ValueError):
        found: dict[str, Any] = json.loads(((at or fleet.master).state / "runs" / run / f"{name}.json").read_bytes())
        return found
    return {}


def log_of(fleet: Fleet, run: str, host: Host, at: Host | None = None) -> bytes:
    """A host's recorded log of a run."""
    return Path((at or fleet.master).state, "runs", run, f"{host.address}.log").read_bytes()


def wait_state(fleet: Fleet, run: str, host: Host | str, *states: str, timeout_s: float = 30) -> dict[str, Any]:
    """Until the master has recorded one of these states for a host."""
    return wait_for(
        lambda: job if (job := job_of(fleet, run, host)).get("state") in states else {},
        lambda: f"{host} is {' or '.join(states)}: {job_of(fleet, run, host)}",
        timeout_s,
    )


def running(pid: int) -> bool:
    """Whether a process lives; one that only waits to be reaped does not."""
    with suppress(OSError):
        return b") Z " not in Path(f"/proc/{pid}/stat").read_bytes()
    return False


def end_session(process: subprocess.Popen[bytes]) -> None:
    """Kill what a `popen` started, for good."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def new_host_line(url: str) -> str:
    """README's line for a new host, for this master; it asks for the version in place of a setup."""
    line: str
    (line,) = re.findall(r"(?m)^python3 -I -c .*$", (ROOT / "README.md").read_text("utf-8"))
    for ours, here in (("http://5.223.72.58:9900", url), ("'setup'", "'--version'")):
        assert line.count(ours) == 1
        line = line.replace(ours, here)
    return line
