"""The zipapp on Windows (a real Windows Python under Wine): agent, master and commands, against Linux ones."""

from __future__ import annotations

import ast
import functools
import hashlib
import http.server
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import pytest

from tests.commands import Watched, job_of, log_of, new_host_line
from tests.fleet import MODULE, ROOT, VERSION, Fleet, Host, Result, is_listening, kill_processes_of, run, wait_for
from tests.machines import Windows, split_words, windows_git
from tests.terminal import Terminal
from tests.test_upgrade import NAME, NEW, variant, versions

WINE_S = 120.0  # Wine starts each process slowly
AGENT = "127.0.0.2"
DEPLOY = "@echo off\r\necho building %1\r\necho done\r\nexit /b 0\r\n"
BROKEN = "@echo off\r\necho broken\r\nexit /b 5\r\n"
ENDLESS = "@echo off\r\necho begun\r\n:again\r\necho alive>>..\\beat\r\nping -n 2 127.0.0.1 >nul\r\ngoto again\r\n"


MakeHosts = Callable[..., tuple[Fleet, "WindowsHost"]]


class WindowsHost:
    """A host of a fleet that runs under Wine: its daemon, and commands on it."""

    def __init__(self, windows: Windows, one: Fleet, host: Host, program: Path, git: Path) -> None:
        self.windows, self.one, self.host = windows, one, host
        self.program = host.folder / NAME
        shutil.copy(program, self.program)
        self.env = {"WINEPATH": f"{Windows.path(git)};{Windows.path(host.repo)}", "HOME": str(one.tmp_path / "home")}
        self.daemon: subprocess.Popen[bytes] | None = None
        self.said: list[bytes] = []
        self.readers: list[threading.Thread] = []

    def words(self, *words: str) -> list[Any]:
        where: list[Any] = ["--bind", self.host.address, "--state", self.host.state, "--config", self.host.config]
        return [self.program, *words, *where]

    def start(self) -> None:
        self.daemon = self.windows.popen(*self.words("serve"), env=self.env)
        for pipe in (self.daemon.stdout, self.daemon.stderr):
            self.readers.append(threading.Thread(target=self.read, args=(pipe,)))
            self.readers[-1].start()

    def read(self, pipe: IO[bytes]) -> None:
        """Until its end, which under Wine comes late: a runner that outlives the daemon still has a hold of it."""
        with pipe:
            self.said += iter(pipe.readline, b"")

    def run(self, *words: str, **env: str) -> Result:
        return self.windows.run(*self.words(*words), env=self.env | env, timeout_s=WINE_S)

    def end(self) -> None:
        """Kill the daemon, and nothing else."""
        if self.daemon:
            self.daemon.kill()
            self.daemon.wait()


@pytest.fixture
def git_folder(windows_python: Windows, tmp_path: Path) -> Iterator[Path]:
    """A folder with a `git.exe`."""
    with windows_git(windows_python, tmp_path / "bin") as folder:
        yield folder


@pytest.fixture
def windows_fleet(
    fleet: Callable[..., Fleet], windows_python: Windows, pyz: Path, git_folder: Path, tmp_path: Path
) -> Iterator[Callable[..., tuple[Fleet, WindowsHost]]]:
    """Makes two hosts, one of which runs under Wine and is started already: by default the agent."""
    made: list[WindowsHost] = []

    def make(index: int = 1, program: Path = pyz, on_master: Path = pyz, **options: Any) -> tuple[Fleet, WindowsHost]:
        repo = Windows.path(tmp_path / f"host{index + 1}" / "repo").replace("\\", "/" if index else "\\")
        own = {"command": ["deploy.cmd", "it"], "repo": repo}
        one = fleet(hosts=2, start=False, program=(sys.executable, str(on_master)), **options)
        settings = json.loads((one.origin.seed / "config/updater.json").read_text())
        settings["hosts"] = {one.hosts[index].address: own}
        one.origin.commit({"deploy.cmd": DEPLOY, "config/updater.json": json.dumps(settings)})
        for host in one.hosts:
            one.origin.git("pull", "--quiet", cwd=host.repo)
        made.append(WindowsHost(windows_python, one, one.hosts[index], program, git_folder))
        if index:
            one.start(one.master)
        made[-1].start()
        wait_for(
            lambda: AGENT in one.cli("status").out if index else is_listening(os.getpid(), one.port),
            "it serves",
            WINE_S,
        )
        return one, made[-1]

    yield make
    for one in made:
        one.end()
        kill_processes_of(tmp_path)
        for reader in one.readers:
            reader.join()
        print(b"".join(one.said).decode("utf-8", "replace"))
        for log in one.host.state.glob("*.log"):
            print(log, log.read_text(errors="replace"))


def test_a_command_line_is_told_apart() -> None:
    words = ["git", "", "a b", 'say "x"', "\\", "\\\\ \\", '\\"', "%(refname)", "refs/*:x^{}", "탭\t줄\n", '"']
    assert split_words(subprocess.list2cmdline(words)) == words


def test_version(windows_python: Windows, pyz: Path) -> None:
    result = windows_python.run(pyz, "--version")
    assert (result.code, result.out.split()[0]) == (0, "estelle-updater")


def test_doctor(windows_fleet: MakeHosts) -> None:
    """Each trap is looked at on Windows too; a runner really outlives its daemon's kill there."""
    _, windows = windows_fleet()
    result = windows.run("doctor", "--json")
    found = {check["name"]: check for check in json.loads(result.out)["checks"]}
    wrong = {name for name, check in found.items() if check["ok"] is False}
    assert wrong == {"service", "encoding"}, found  # cp1252, and no PM2 under Wine
    assert {"detachment", "access", "command", "disk", "clock", "master"} <= found.keys()
    result = windows.run("setup")
    assert result.code == 2 and "npm install -g pm2" in result.err


@pytest.mark.timeout(240)  # two deployments under Wine: 40 s each on a busy machine
def test_an_agent_fails_and_is_cancelled(windows_fleet: MakeHosts) -> None:
    one, windows = windows_fleet()
    row = next(row for row in json.loads(one.cli("status", "--json").out)["hosts"] if row["host"] == AGENT)
    assert row["platform"] == "win32" and row["online"]

    one.origin.commit({"deploy.cmd": BROKEN})
    failed = one.cli("trigger", AGENT, "master", timeout_s=WINE_S)
    assert failed.code == 1 and f"[{AGENT}] ✗ 실패 deploy.cmd it (exit 5)" in failed.out, failed.out + failed.err

    one.origin.commit({"deploy.cmd": ENDLESS})
    watcher = Watched(one, "trigger", AGENT, "master")
    watcher.until("begun", WINE_S)
    assert one.cli("cancel", watcher.run).code == 0
    assert watcher.end(WINE_S) == 1 and f"[{AGENT}] ✗ 취소" in watcher.out, watcher.out + watcher.err
    beat = windows.host.folder / "beat"

    def silent() -> bool:
        before = beat.stat().st_size
        time.sleep(4)  # it writes every second or two
        return beat.stat().st_size == before

    wait_for(silent, "nothing of the command is left", WINE_S)


def test_an_agent_that_is_killed_comes_back_with_every_byte(windows_fleet: MakeHosts) -> None:
    one, windows = windows_fleet()
    many = "for /L %%i in (1,1,500) do @echo {} %%i\r\n"
    wait = ":again\r\nif exist ..\\go goto on\r\nping -n 2 127.0.0.1 >nul\r\ngoto again\r\n:on\r\n"
    one.origin.commit({"deploy.cmd": "@echo off\r\n" + many.format("before") + wait + many.format("after")})
    watcher = Watched(one, "trigger", AGENT, "master")
    watcher.until("before 500", WINE_S)
    windows.end()
    (windows.host.folder / "go").touch()
    run = watcher.run
    wait_for(lambda: job_of(one, run, AGENT, windows.host).get("state") == "succeeded", "the runner goes on", WINE_S)
    windows.start()
    assert watcher.end(WINE_S) == 0, watcher.out + watcher.err
    lines = [line.removeprefix(f"[{AGENT}] ").rstrip() for line in watcher.out.splitlines()]
    expected = [f"{word} {number}" for word in ("before", "after") for number in range(1, 501)]
    assert [line for line in lines if re.fullmatch("(before|after) [0-9]+", line)] == expected
    assert log_of(one, run, windows.host) == log_of(one, run, windows.host, windows.host)


def test_an_agent_is_upgraded_and_deploys(windows_fleet: MakeHosts, pyz: Path, tmp_path: Path) -> None:
    variant(pyz, tmp_path / "old" / NAME, "0.0.9")
    new = tmp_path / "new" / NAME
    config = {"updater": {"sha256": variant(pyz, new, NEW)}}
    one, _ = windows_fleet(program=tmp_path / "old" / NAME, config=config, on_master=new)
    assert versions(one)[AGENT] == "0.0.9"
    done = one.cli("upgrade", AGENT, timeout_s=WINE_S)
    assert done.code == 0 and f"[{AGENT}] ✓ 완료 {NEW}" in done.out, done.out + done.err
    assert versions(one)[AGENT] == NEW
    done = one.cli("trigger", AGENT, "master", timeout_s=WINE_S)
    assert done.code == 0, done.out + done.err
    lines = done.out.splitlines()
    for line in ("git pull origin master...", "deploy.cmd it...", "building it", f"✓ 완료 {VERSION}"):
        assert f"[{AGENT}] {line}" in lines, done.out


def test_a_windows_master_and_its_commands(windows_fleet: MakeHosts) -> None:
    """Steps of a Linux agent on a Windows console, in pipes that nobody gave an encoding that knows Korean."""
    one, windows = windows_fleet(0)
    agent = one.agents[0]
    one.start(agent)
    one.origin.commit({"deploy.sh": "echo 배포 ✓\n"})
    done = windows.run("trigger", "all", "master", PYTHONIOENCODING="cp1252")
    assert done.code == 0, done.out + done.err
    for line in (f"[127.0.0.1] ✓ 완료 {VERSION}", f"[{AGENT}] ✓ 완료 {VERSION}", f"[{AGENT}] 배포 ✓"):
        assert line in done.out.splitlines(), done.out
    rows = {row["host"]: row for row in json.loads(one.cli("status", "--json", host=agent).out)["hosts"]}
    assert (rows["127.0.0.1"]["platform"], rows["127.0.0.1"]["role"]) == ("win32", "master")
    assert rows[AGENT]["platform"] == "linux" and rows[AGENT]["online"]
    refused = windows.run("trigger", "121.x.x.x", "master", PYTHONIOENCODING="cp949")
    assert refused.code == 2 and "121.0.0.7" in refused.err


CONSOLES = r"""
import io, os, sys
import estelle_updater as updater

class Console(io.TextIOWrapper):
    def isatty(self):
        return True

shown = []
for encoding in ("cp949", "cp1252", "cp437"):
    real, sys.stdout = sys.stdout, Console(io.BytesIO(), encoding=encoding)
    updater.Output(False).write("✓ 완료\n".encode())
    console, sys.stdout = sys.stdout, real
    shown.append(console.buffer.getvalue().decode(encoding).strip())
    sys.stderr = Console(io.BytesIO(), encoding=encoding)
    updater.log.info("완료 ✓")
    updater.print_error(updater.UpdaterError("실패 ✗"), updater.Args(json=False, verbose=False))
    sys.stderr = sys.__stderr__
assert shown == ["+ 완료", "+ ??", "+ ??"], shown  # the mark has a plain one, so that it says something
assert updater.default_state_folder(os.environ) == updater.Path(os.environ["LOCALAPPDATA"]) / "estelle-updater"
print("all good")
"""


def test_consoles_without_our_letters_and_the_place_of_the_state(windows_python: Windows, tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(CONSOLES, "utf-8")
    done = windows_python.run(tmp_path / "script.py", env={"PYTHONPATH": Windows.path(ROOT)})
    assert done.out.strip() == "all good", done.out + done.err


def test_the_line_for_a_new_host_under_windows(windows_python: Windows, tmp_path: Path) -> None:
    """README's line whole, as cmd.exe takes it: it starts the very file, and writes no other."""
    said = b"import sys\nprint('set up by', sys.argv[1:])\nsys.exit(3)\n"
    (tmp_path / "config").mkdir()
    (tmp_path / "handed").mkdir()
    config, handed = tmp_path / "config" / "updater.toml", tmp_path / "handed" / NAME
    good = f'[updater]\r\nsha256 = "{hashlib.sha256(said).hexdigest().upper()}"\r\n'
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(handed.parent))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        line = new_host_line(f"http://127.0.0.1:{server.server_port}")
        command = line.replace("python3", Windows.path(windows_python.python), 1)
        (tmp_path / "line.cmd").write_bytes(f"@{command}\r\n@exit /b %errorlevel%\r\n".encode())

        def typed(text: str, data: bytes = said) -> Result:
            config.write_bytes(text.encode())
            handed.write_bytes(data)
            return run(["wine", "cmd", "/c", "line.cmd"], env, tmp_path, WINE_S)

        env = {**windows_python.env, "USERPROFILE": Windows.path(tmp_path)}
        written = (tmp_path / "estelle-updater" / NAME).exists
        assert typed(good, said + b"#").code == 1 and not written(), "the file is another"
        for text in (good.replace("[", "# ["), good.replace('= "', '= "" # "'), "", "\ufeff" + good):
            assert typed(text).code == 1 and not written(), text
        done = typed(good)
        assert (done.code, done.out.strip()) == (3, "set up by ['--version']"), done.err
        server.shutdown()


COLOURS = r"""
import ctypes, json, sys
import estelle_updater as updater

api = ctypes.windll.kernel32
console = api.GetStdHandle(-11)

def mode():
    value = ctypes.c_uint32()
    return value.value if api.GetConsoleMode(console, ctypes.byref(value)) else None

api.SetConsoleMode(console, 3)  # as cmd.exe has it
before = mode()
output = updater.Output(True)
told = {"modes": [before, mode()], "escapes": output.escapes, "size": output.size()}
open(sys.argv[1], "w").write(json.dumps(told))
if output.terminal:
    output.write_lines(["✓ 완료 v1"])
"""


def test_a_console_is_told_to_take_escapes(windows_python: Windows, tmp_path: Path) -> None:
    """Wine makes a console of a terminal; a pipe is none, and gets no escapes."""
    script, told = tmp_path / "script.py", tmp_path / "told"
    script.write_text(COLOURS, "utf-8")
    env = windows_python.env | {"PYTHONPATH": Windows.path(ROOT)}
    console = Terminal(windows_python.command([script, told]), env, tmp_path, 90, 20)
    try:
        assert console.wait() == 0
        virtual_terminal = 4
        assert json.loads(told.read_text()) == {"modes": [3, 3 | virtual_terminal], "escapes": True, "size": [90, 20]}
        assert console.shown()[0] == "✓ 완료 v1" and console.screen.buffer[0][0].fg == "green"
    finally:
        console.close()
    piped = windows_python.run(script, told, env={"PYTHONPATH": Windows.path(ROOT)})
    assert (piped.code, piped.out) == (0, ""), piped.err
    assert json.loads(told.read_text()) == {"modes": [None, None], "escapes": False, "size": [80, 24]}


def test_no_console_window_pops_up() -> None:
    """Whatever a daemon or runner starts says so; `build` and `demo` are started on a console, and share it."""
    tree = ast.parse(MODULE.read_text("utf-8"))
    shown = []
    for function in (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)):
        for call in (node for node in ast.walk(function) if isinstance(node, ast.Call)):
            words = ast.unparse(call)
            if re.match(r"subprocess\.(run|Popen)\(", words) and not re.search(r"\*\*HIDDEN|creationflags=", words):
                shown.append(function.name)
    assert sorted(shown) == ["end", "start"]
