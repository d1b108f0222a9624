"""Whole machines for the tests: hosts as network namespaces, and Windows as a Wine prefix."""

from __future__ import annotations

import itertools
import os
import re
import shutil
import signal
import socketserver
import struct
import subprocess
import threading
import time
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from tests.fleet import Result, clean_env, kill_processes_of, need, run, unavailable, wait_for
from tests.windows.git_exe import render_git

_numbers = itertools.count()


class Network:
    """Hosts 1..N with the addresses 192.0.2.11.., each a network namespace, joined by a bridge in one more. Needs root.

    Nothing of it is visible outside: the same addresses serve any number of tests at once.
    """

    def __init__(self, hosts: int = 3) -> None:
        need("ip", "iptables")
        if os.geteuid() != 0:
            unavailable("network namespaces can only be made by root")
        self.hosts = hosts
        self._name = f"est{os.getpid()}-{next(_numbers)}"
        self._switch = f"{self._name}-sw"
        self._made: list[str] = []
        try:
            self._build()
        except BaseException:
            self.close()
            raise

    def _build(self) -> None:
        self._make(self._switch)
        self._ip("-n", self._switch, "link", "add", "br0", "type", "bridge")
        self._ip("-n", self._switch, "link", "set", "br0", "up")
        for i in range(1, self.hosts + 1):
            name, port = self.namespace(i), f"p{i}"
            self._make(name)
            peer = ("peer", "name", port, "netns", self._switch)
            self._ip("link", "add", "veth0", "netns", name, "type", "veth", *peer)
            self._ip("-n", self._switch, "link", "set", port, "master", "br0", "up")
            self._ip("-n", name, "link", "set", "lo", "up")
            self._ip("-n", name, "addr", "add", f"{self.address(i)}/24", "dev", "veth0")
            self._ip("-n", name, "link", "set", "veth0", "up")

    def _make(self, name: str) -> None:
        code, _, err = self._try("netns", "add", name)
        if code:
            unavailable(f"no network namespace can be made here: {err.strip()}")
        self._made.append(name)

    @staticmethod
    def _try(*words: str) -> Result:
        return run(["ip", *words], os.environ, timeout_s=20)

    def _ip(self, *words: str) -> None:
        code, _, err = self._try(*words)
        assert code == 0, f"ip {' '.join(words)}: {err}"

    def namespace(self, host: int) -> str:
        return f"{self._name}-{host}"

    def address(self, host: int) -> str:
        return f"192.0.2.{10 + host}"

    def prefix(self, host: int) -> tuple[str, ...]:
        """What to put before a command so that it runs on a host; the process id stays the command's own."""
        return ("ip", "netns", "exec", self.namespace(host))

    def run(self, host: int, argv: Sequence[str | Path], timeout_s: float = 60) -> Result:
        """Run a command on a host."""
        return run([*self.prefix(host), *argv], os.environ, timeout_s=timeout_s)

    def cut(self, host: int) -> None:
        """Pull a host's cable: what it sends or is sent vanishes without an error."""
        self._ip("-n", self._switch, "link", "set", f"p{host}", "down")

    def uncut(self, host: int) -> None:
        """Put the cable back; traffic flows within about a second."""
        self._ip("-n", self._switch, "link", "set", f"p{host}", "up")

    def cut_way(self, sender: int, receiver: int, undo: bool = False, reset: bool = False) -> None:
        """Drop what one host sends to one other, or reset it; the way back and everybody else are not touched."""
        verdict = ["-p", "tcp", "-j", "REJECT", "--reject-with", "tcp-reset"] if reset else ["-j", "DROP"]
        rule = ["INPUT", "-s", self.address(sender), *verdict]
        code, _, err = self.run(receiver, ["iptables", "-D" if undo else "-A", *rule])
        assert code == 0, err

    def close(self) -> None:
        """Kill what runs in the namespaces and remove them."""
        for name in reversed(self._made):

            def empty(name: str = name) -> bool:
                pids = [int(pid) for pid in self._try("netns", "pids", name).out.split()]
                for pid in pids:
                    with suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
                return not pids

            wait_for(empty, f"nothing runs in the namespace {name}")
            self._ip("netns", "del", name)
        self._made.clear()


class Windows:
    """A Windows Python under Wine, with a prefix of its own: a link farm of the installed one and its own registry."""

    def __init__(self, installed: Path, folder: Path) -> None:
        need("wine", "wineserver")
        if not (installed / ".complete").exists():
            unavailable("no Windows Python: `bash tests/run` installs it where Wine is")
        self.python = installed / "python" / "python.exe"
        # Beside the installed one, for a hard link can't leave its file system; a dead test's prefixes go first.
        for old in installed.glob("used-*"):
            if not Path("/proc", old.name.rpartition("-")[2]).exists():
                shutil.rmtree(old, ignore_errors=True)
        self.prefix = installed / f"used-{next(_numbers)}-{os.getpid()}"
        shutil.copytree(installed / "prefix", self.prefix, symlinks=True, copy_function=self._link_or_copy)
        (self.prefix / "wineserver").unlink(missing_ok=True)  # Debian's Wine notes there its folder of sockets in /tmp
        folder.mkdir(parents=True, exist_ok=True)
        self._pack_library(installed / "python" / "Lib", folder / "library.zip")
        self.env = clean_env(folder) | {
            "PYTHONPATH": self.path(folder / "library.zip"),
            "WINEPREFIX": str(self.prefix),
            "WINEDEBUG": "-all",
            "WINEDLLOVERRIDES": "mscoree,mshtml=",
            "PYTHONDONTWRITEBYTECODE": "1",  # the library is shared by all prefixes
        }
        # Wine's services inherit the first process's streams: a pipe would never end, so these two get /dev/null.
        for argv in (["wineserver", "--persistent"], ["wine", "wineboot"]):
            null = subprocess.DEVNULL
            subprocess.run(argv, env=self.env, stdin=null, stdout=null, stderr=null, timeout=120, check=False)

    @staticmethod
    def _pack_library(library: Path, target: Path) -> None:
        """The library's bytecode in one file, as Windows' embeddable Python has it: Wine looks up a name slowly."""
        with zipfile.ZipFile(target, "w") as packed:
            for file in library.rglob("__pycache__/*.pyc"):
                name = file.name.partition(".")[0] + ".pyc"
                inside = file.parent.parent.relative_to(library) / name
                packed.writestr(zipfile.ZipInfo(str(inside)), file.read_bytes())

    @staticmethod
    def _link_or_copy(source: str, target: str) -> None:
        """Link what no test changes; the registry is rewritten, and users' folders are written to."""
        if source.lower().endswith((".dll", ".exe", ".ttf", ".drv", ".sys", ".ocx", ".nls")):
            os.link(source, target)
        else:
            shutil.copy2(source, target)

    @staticmethod
    def path(file: Path) -> str:
        """A file's name as Windows programs see it."""
        return "Z:" + str(file).replace("/", "\\")

    def run(
        self,
        *arguments: str | Path,
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
        timeout_s: float = 60,
    ) -> Result:
        """Run the Windows Python to its end; a Path among the arguments is translated."""
        return run(self.command(arguments), self.env | dict(env or {}), cwd, timeout_s)

    def popen(
        self, *arguments: str | Path, env: Mapping[str, str] | None = None, cwd: Path | None = None
    ) -> subprocess.Popen[bytes]:
        """Start the Windows Python with pipes for its output, which must be read; `close` ends it."""
        return subprocess.Popen(
            self.command(arguments),
            env=self.env | dict(env or {}),
            cwd=cwd,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )

    def command(self, arguments: Sequence[str | Path]) -> list[str]:
        return ["wine", str(self.python), *(self.path(a) if isinstance(a, Path) else a for a in arguments)]

    def close(self) -> None:
        """End everything that runs in this prefix and remove it."""
        with suppress(subprocess.TimeoutExpired):
            subprocess.run(["wineserver", "--kill"], env=self.env, timeout=20, check=False, capture_output=True)
            subprocess.run(["wineserver", "--wait"], env=self.env, timeout=20, check=False, capture_output=True)
        kill_processes_of(self.prefix)
        note = self.prefix / "wineserver"
        if note.exists() and (name := note.read_text()).startswith("wine-"):
            shutil.rmtree(Path("/tmp", name), ignore_errors=True)
        for _ in range(3):  # a service that was just killed may still have been writing its last file
            shutil.rmtree(self.prefix, ignore_errors=True)
            if not self.prefix.exists():
                return
            time.sleep(0.2)
        pytest.fail(f"{self.prefix} can't be removed")


def split_words(line: str) -> list[str]:
    """A Windows command line's words, as its programs tell them apart: the way back of `subprocess.list2cmdline`."""
    words: list[str] = []
    word, begun, quoted = "", False, False
    for hit in re.finditer(r'(\\*)"|[ \t]+|.', line + " ", re.DOTALL):
        if hit[1] is not None:  # backslashes before a quote stand for half of them, an odd one for the quote itself
            word += "\\" * (len(hit[1]) // 2)
            if len(hit[1]) % 2:
                word += '"'
            else:
                quoted = not quoted
            begun = True
        elif quoted or not hit[0].isspace():
            word, begun = word + hit[0], True
        elif begun:
            words.append(word)
            word, begun = "", False
    return words


@contextmanager
def windows_git(windows: Windows, folder: Path) -> Iterator[Path]:
    """A folder with a `git.exe` that asks this test, which runs the machine's own git on the same files."""
    need("git")
    base = clean_env(folder.parent / "home")

    class Git(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            line, there, *variables = self.rfile.read().decode("utf-16-le").split("\0")
            drive, place = there[0], there[2:].replace("\\", "/")
            cwd = place if drive == "Z" else f"{windows.prefix}/drive_c{place}"
            author = dict(pair.split("=", 1) for pair in variables if re.match("GIT_(AUTHOR|COMMITTER)_", pair))
            argv = ["git", "-c", "safe.directory=*", *split_words(line)[1:]]
            done = subprocess.run(argv, cwd=cwd, env=base | author, capture_output=True, check=False)
            stdout, stderr = -11, -12
            for handle, data in ((stdout, done.stdout), (stderr, done.stderr)):
                self.wfile.write(struct.pack("<ii", handle, len(data)) + data)
            self.wfile.write(struct.pack("<ii", 0, done.returncode))

    folder.mkdir()
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Git) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, daemon=True).start()
        (folder / "git.exe").write_bytes(render_git(server.server_address[1]))
        yield folder
        server.shutdown()
