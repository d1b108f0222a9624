"""The zipapp on Windows (a real Windows Python under Wine): an agent of a Linux master deploys and is cancelled."""

from __future__ import annotations

import json
import socketserver
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.fleet import VERSION, Fleet, wait_for
from tests.machines import Windows

WINE_S = 120.0  # Wine starts each process slowly
AGENT = "127.0.0.2"
# No package holds a Windows git: `git.cmd` asks this test's own server, which runs the real one on the same files.
GIT_CLIENT = """
import json, os, socket, sys
asked = socket.create_connection(("127.0.0.1", int(sys.argv[1])))
asked.sendall(json.dumps([os.getcwd(), sys.argv[2:]]).encode() + b"\\n")
code, out, err = json.loads(b"".join(iter(lambda: asked.recv(65536), b"")))
sys.stdout.buffer.write(out.encode("latin-1"))
sys.stderr.buffer.write(err.encode("latin-1"))
sys.exit(code)
"""
DEPLOY = "@echo off\r\necho building %1\r\necho done\r\nexit /b 0\r\n"
BROKEN = "@echo off\r\necho broken\r\nexit /b 5\r\n"
ENDLESS = "@echo off\r\necho begun\r\n:again\r\necho alive>>..\\beat\r\nping -n 2 127.0.0.1 >nul\r\ngoto again\r\n"


class GitServer(socketserver.StreamRequestHandler):
    """Runs git for `git.cmd`."""

    def handle(self) -> None:
        cwd, words = json.loads(self.rfile.readline())
        words = [word.replace("--format=(", "--format=%(") for word in words]  # cmd.exe takes the % of a .cmd's words
        argv = ["git", "-c", "safe.directory=*", *words]
        done = subprocess.run(argv, cwd=cwd[2:].replace("\\", "/"), capture_output=True, check=False)
        self.wfile.write(
            json.dumps([done.returncode, *(b.decode("latin-1") for b in (done.stdout, done.stderr))]).encode()
        )


@pytest.fixture
def windows_fleet(fleet: Callable[..., Fleet], windows_python: Windows, pyz: Path, tmp_path: Path) -> Iterator[Fleet]:
    """A Linux master and, on 127.0.0.2, an agent under Wine."""
    config = {
        "whitelist": ["127.0.0.1", AGENT],
        "hosts": {AGENT: {"command": ["deploy.cmd", "it"], "repo": Windows.path(tmp_path / "windows" / "repo")}},
    }
    one = fleet(hosts=1, config=config)
    one.origin.commit({"deploy.cmd": DEPLOY})
    folder = tmp_path / "windows"
    (folder / "bin").mkdir(parents=True)
    server = socketserver.ThreadingTCPServer(("127.0.0.1", 0), GitServer)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    client = folder / "bin" / "client.py"
    client.write_text(GIT_CLIENT)
    python, script = windows_python.path(windows_python.python), Windows.path(client)
    shim = f'@"{python}" "{script}" {server.server_address[1]} %*\r\n'
    (folder / "bin" / "git.cmd").write_bytes(shim.encode())
    one.origin.clone(folder / "repo")
    env = {
        "WINEPATH": f"{Windows.path(folder / 'bin')};{Windows.path(folder / 'repo')}",
        "HOME": str(tmp_path / "home"),
    }
    words: list[Any] = [pyz, "serve", "--bind", AGENT, "--state", folder / "state"]
    daemon = windows_python.popen(*words, "--config", folder / "repo" / "config" / "updater.json", env=env)
    one.watched.append(daemon)
    try:
        wait_for(lambda: AGENT in one.cli("status").out, "the agent under Wine is welcomed", WINE_S)
        yield one
    finally:
        server.shutdown()
        server.server_close()
        daemon.kill()
        out, err = daemon.communicate()
        print(f"--- under Wine\n{out.decode('utf-8', 'replace')}{err.decode('utf-8', 'replace')}")
        for log in (folder / "state").glob("runner.log"):
            print(log.read_text(errors="replace"))


def test_version(windows_python: Windows, pyz: Path) -> None:
    result = windows_python.run(pyz, "--version")
    assert (result.code, result.out.split()[0]) == (0, "estelle-updater")


def test_doctor(windows_fleet: Fleet, windows_python: Windows, pyz: Path) -> None:
    """Each trap is looked at on Windows too; a runner really outlives its daemon's kill there."""
    folder = windows_fleet.tmp_path / "windows"
    own: list[Any] = [
        "--bind",
        AGENT,
        "--state",
        folder / "state",
        "--config",
        folder / "repo" / "config" / "updater.json",
    ]
    env = {"WINEPATH": f"{Windows.path(folder / 'bin')};{Windows.path(folder / 'repo')}"}
    result = windows_python.run(pyz, *own, "doctor", "--json", env=env, timeout_s=WINE_S)
    found = {check["name"]: check for check in json.loads(result.out)["checks"]}
    wrong = {name for name, check in found.items() if check["ok"] is False}
    assert wrong == {"service", "encoding"}, found  # cp1252, and no PM2 under Wine
    assert {"detachment", "access", "command", "disk", "clock", "master"} <= found.keys()
    result = windows_python.run(pyz, *own, "setup", env=env, timeout_s=WINE_S)
    assert result.code == 2 and "npm install -g pm2" in result.err


def test_an_agent_deploys_fails_and_is_cancelled(windows_fleet: Fleet) -> None:
    one = windows_fleet
    row = next(row for row in json.loads(one.cli("status", "--json").out)["hosts"] if row["host"] == AGENT)
    assert row["platform"] == "win32" and row["online"]
    done = one.cli("trigger", AGENT, "master", timeout_s=WINE_S)
    assert done.code == 0, done.out + done.err
    lines = done.out.splitlines()
    for line in ("git pull origin master...", "deploy.cmd it...", "building it", f"✓ 완료 {VERSION}"):
        assert f"[{AGENT}] {line}" in lines, done.out

    one.origin.commit({"deploy.cmd": BROKEN})
    failed = one.cli("trigger", AGENT, "master", timeout_s=WINE_S)
    assert failed.code == 1 and f"[{AGENT}] ✗ 실패 deploy.cmd it (exit 5)" in failed.out, failed.out + failed.err

    one.origin.commit({"deploy.cmd": ENDLESS})
    watcher = one.popen("trigger", AGENT, "master", stderr=subprocess.DEVNULL)
    run = wait_for(lambda: one.runs()[-1].name if len(one.runs()) == 3 else "", "the run is recorded", WINE_S)
    wait_for(lambda: "begun" in one.cli("logs", run).out, "the command runs", WINE_S)
    assert one.cli("cancel", run).code == 0
    out, _ = watcher.communicate(timeout=WINE_S)
    assert watcher.returncode == 1 and f"[{AGENT}] ✗ 취소" in out.decode()
    beat = one.tmp_path / "windows" / "beat"

    def silent() -> bool:
        before = beat.stat().st_size
        time.sleep(4)  # it writes every second or two
        return beat.stat().st_size == before

    wait_for(silent, "nothing of the command is left", WINE_S)
