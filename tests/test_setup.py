"""`setup` under PM2, from the copied file alone; what it does under systemd is in test_service.py."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests import seam as est
from tests.fleet import ROOT, Fleet, Host, Result, need, replace_program, run, wait_for

SERVICE = "estelle-updater"


class Pm2Site:
    """A host with a PM2 of its own, on which nothing but the .pyz was copied."""

    def __init__(self, fleet: Fleet, pyz: Path, folder: Path) -> None:
        self.fleet, self.folder = fleet, folder
        self.host: Host = fleet.agents[0]
        folder.mkdir()
        self.program = shutil.copy(pyz, folder)
        self.env = fleet.env | {"PM2_HOME": str(folder / "pm2")}

    def est(self, *words: str) -> Result:
        own = ("--bind", self.host.address, "--state", str(self.host.state))
        return run([sys.executable, self.program, *own, *words], self.env, self.host.repo, timeout_s=100)

    def apps(self) -> list[dict[str, Any]]:
        return list(json.loads(run(["pm2", "jlist"], self.env).out.splitlines()[-1]))


@pytest.fixture
def site(fleet: Callable[..., Fleet], tmp_path: Path, pyz: Path) -> Iterator[Pm2Site]:
    need("pm2", "node")
    one = fleet(hosts=2, start=False)
    one.start(one.master)
    site = Pm2Site(one, pyz, tmp_path / "Kim's copy")  # PM2 takes a path with a space for a line of bash
    yield site
    run(["pm2", "kill"], site.env)


def test_setup_again_and_remove(site: Pm2Site) -> None:
    before = sorted(site.host.repo.rglob("*"))
    code, out, err = site.est("setup", "--with", "pm2", "--dry-run")
    assert code == 0, err
    for text in (
        '"name": "estelle-updater"',
        f'"cwd": "{site.host.repo}"',
        "would run: pm2 start",
        "would run: pm2 save",
    ):
        assert text in out
    assert not (site.folder / "pm2").exists() and not site.host.state.exists()

    code, out, err = site.est("setup", "--with", "pm2")
    assert code == 0, out + err
    assert f"the agent has been welcomed by the master as {site.host.address}" in out
    assert "pm2 startup" in out
    (app,) = site.apps()
    assert (app["name"], app["pm2_env"]["status"], app["pm2_env"]["pm_cwd"]) == (SERVICE, "online", str(site.host.repo))
    assert SERVICE in (site.folder / "pm2" / "dump.pm2").read_text()

    command = Path(site.env["HOME"]) / ".local/bin/estelle-updater"
    assert f'export PATH="{command.parent}:$PATH"' in out
    code, said, err = run([command, "status", "--state", site.host.state], site.env, site.host.repo)
    assert (code, site.host.address in said) == (0, True), err
    found = site.env | {"PATH": f"{command.parent}:{site.env['PATH']}"}  # as the note says
    assert "usage: estelle-updater " in run([command, "--help"], found, site.folder).out
    out = run([command, "--help"], site.env, site.folder).out
    assert out.startswith("usage: ") and "usage: estelle-updater " not in out, "nobody would find it"
    code, out, err = site.est("setup")
    assert (code, "unchanged" in out) == (0, True), out + err
    assert site.apps()[0]["pid"] == app["pid"]
    replace_program(Path(site.program))
    code, out, err = site.est("setup")
    assert (code, "installed and started" in out) == (0, True), out + err
    assert site.apps()[0]["pid"] != app["pid"], "it runs the program that was copied there"
    assert "unchanged" in site.est("setup").out
    code, out, err = site.est("doctor")
    assert (code, "✓ service: PM2: saved" in out) == (0, True), out + err
    assert run(["pm2", "stop", SERVICE], site.env).code == 0
    wait_for(lambda: "✗ service: PM2: saved, not running" in site.est("doctor").out, "doctor sees it")
    assert "installed and started" in site.est("setup").out

    code, out, err = site.est("setup", "--remove")
    assert (code, "removed" in out) == (0, True), out + err
    assert site.apps() == []
    assert SERVICE not in (site.folder / "pm2" / "dump.pm2").read_text()
    assert "unchanged" in site.est("setup", "--remove").out
    assert not command.exists()
    assert sorted(site.host.repo.rglob("*")) == before, "nothing is written into the repository"


def test_says_why_the_master_does_not_welcome(site: Pm2Site) -> None:
    settings = json.loads(site.host.config.read_text())
    for host in (site.host, site.fleet.master):
        host.config.write_text(json.dumps(settings | {"whitelist": ["127.0.0.1"]}))
    site.fleet.restart(site.fleet.master)
    code, _, err = site.est("setup", "--with", "pm2")
    assert code == 1
    assert f"has not welcomed it: the master refused us: {site.host.address} is not in the whitelist" in err
    assert "hint: " in err


def test_says_how_where_there_is_neither(fleet: Callable[..., Fleet], tmp_path: Path, pyz: Path) -> None:
    one = fleet(hosts=1, start=False)
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "git").symlink_to(shutil.which("git") or "")
    env = one.env | {"PATH": str(tmp_path / "bin")}
    argv = [sys.executable, str(pyz), "--state", str(tmp_path / "state"), "setup"]
    code, _, err = run([*argv, "--with", "pm2"], env, one.master.repo)
    assert code == 2 and "there is no pm2 in PATH" in err and "npm install -g pm2" in err
    if not Path("/run/systemd/system").exists():
        code, _, err = run([*argv, "--with", "systemd"], env, one.master.repo)
        assert code == 2 and "systemd does not run this host" in err


def test_pm2_s_file_in_the_repository_is_what_setup_installs(tmp_path: Path) -> None:
    """By hand it finds what lies beside it; installed, it has this host's values, and the same settings."""
    need("node")

    def app(file: Path) -> dict[str, Any]:
        script = f"console.log(JSON.stringify(require({str(file)!r})))"
        (found,) = json.loads(run(["node", "-e", script], {"PATH": os.environ["PATH"]}, ROOT).out)["apps"]
        return dict(found)

    by_hand, installed = app(ROOT / "pm2.config.js"), tmp_path / "pm2.config.js"
    argv = [by_hand["interpreter"], by_hand["script"], by_hand["args"]]
    installed.write_text(est.render_pm2(argv, by_hand["cwd"]))
    assert app(installed) == by_hand | {"args": ["serve"]}
    installed.write_text(est.render_pm2(["p", "s", "serve", "--bind", "x"], "/else where"))
    other = {"interpreter": "p", "script": "s", "args": ["serve", "--bind", "x"], "cwd": "/else where"}
    assert app(installed) == by_hand | other


def test_a_copy_of_the_module_alone_says_what_it_lacks(fleet: Callable[..., Fleet], tmp_path: Path) -> None:
    one = fleet(hosts=1, start=False)
    alone = shutil.copy(ROOT / "estelle_updater.py", tmp_path)
    bare = tmp_path / "bin"
    bare.mkdir()
    (bare / "pm2").write_text("#!/bin/sh\n")
    (bare / "pm2").chmod(0o755)
    env = one.env | {"PATH": f"{bare}{os.pathsep}{one.env['PATH']}"}
    argv = [sys.executable, alone, "--state", str(tmp_path / "state"), "setup", "--with", "pm2", "--dry-run"]
    code, _, err = run(argv, env, one.master.repo)
    what = "error: pm2.config.js is missing: this is a copy of estelle_updater.py alone\n"
    assert (code, what in err, "hint: " in err) == (2, True, True), err
    code, _, err = run([sys.executable, alone, "build"], env, tmp_path)
    assert (code, "is missing: this is a copy" in err) == (2, True), err


def test_words_in_units() -> None:
    """A folder's name may have what systemd interprets."""
    text = est.render_unit(
        ["/usr/bin/python3", "/opt/my $x 100%/a.pyz"], "/srv/a b%c", "/bin", "u", ["/srv/a b%c", "-/h"]
    )
    assert 'ExecStart=/usr/bin/python3 "/opt/my $$x 100%%/a.pyz"\n' in text
    assert "WorkingDirectory=/srv/a b%%c\n" in text
    assert 'ReadWritePaths="/srv/a b%%c" -/h\n' in text
