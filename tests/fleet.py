"""Real parts for the tests: a git origin with its clones, and a fleet of daemons on loopback addresses.

The fixture makes a fleet whose daemons are all ready, the master on 127.0.0.1, agents on 127.0.0.2 and 127.0.0.3:

    def test_deploys(fleet: Callable[..., Fleet]):
        one = fleet(hosts=3)
        one.origin.commit({"app.txt": "2"})
        code, out, err = one.cli("trigger", "all", "master")
"""

from __future__ import annotations

import fcntl
import json
import os
import random
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NamedTuple, NoReturn, TypeVar

import pytest

if TYPE_CHECKING:
    from tests.machines import Network

ROOT = Path(__file__).resolve().parent.parent
MODULE = ROOT / "estelle_updater.py"
# What hosts run: the zipapp that tests/run has built of this module, which need not be compiled at each start.
PROGRAM = (sys.executable, os.environ.get("ESTELLE_TEST_PROGRAM") or str(MODULE))
READY_S = 60.0  # generous: a test machine may be busy, and a wait ends as soon as its condition holds
SCRIPT = ("sh", "deploy.sh")  # the default deployment: no pnpm to start in every test
PNPM = ("pnpm", "deploy:release")
DEPLOY_SH = "echo deploying\n"
VERSION = "v0301_4"

T = TypeVar("T")


class Result(NamedTuple):
    """What a command answered."""

    code: int
    out: str
    err: str

    @property
    def events(self) -> list[dict[str, Any]]:
        """The lines of a `--json` answer."""
        return [json.loads(line) for line in self.out.splitlines()]


def unavailable(reason: str) -> NoReturn:
    """Skip with the reason; where everything can be installed, that is CI as root, fail instead."""
    if os.environ.get("CI") and os.geteuid() == 0:
        pytest.fail(f"CI may not pass without this: {reason}")
    pytest.skip(reason)


@contextmanager
def mounted(place: Path, options: str) -> Iterator[None]:
    """A disk of a test's own, in memory, at an empty folder."""
    need("mount")
    if os.geteuid() != 0:
        unavailable("only root can mount a disk")
    code, _, why = run(["mount", "-t", "tmpfs", "-o", options, "none", place], os.environ)
    if code:
        unavailable(f"no disk can be mounted here: {why}")
    try:
        yield
    finally:
        run(["umount", "--lazy", place], os.environ)


def replace_program(program: Path) -> None:
    """Put another build in a .pyz's place, as whoever copies one there does."""
    new = program.with_name("new.pyz")
    shutil.copy(program, new)
    with zipfile.ZipFile(new, "a") as archive:
        archive.writestr("another", "")
    os.replace(new, program)


def need(*tools: str) -> None:
    """Go on only where all these programs are installed."""
    if missing := [tool for tool in tools if not shutil.which(tool)]:
        unavailable(f"not installed: {', '.join(missing)}")


def wait_for(condition: Callable[[], T], what: str | Callable[[], str], timeout_s: float = READY_S) -> T:
    """The condition's first true value; at the deadline the test fails and says what did not come true."""
    began = time.monotonic()
    deadline = began + timeout_s
    while not (value := condition()):
        now = time.monotonic()
        if now > deadline:
            pytest.fail(f"not within {timeout_s:g} s: {what if isinstance(what, str) else what()}")
        time.sleep(max(0.02, min(now - began, 1)))  # a question that takes long leaves as long to what it waits for
        began = time.monotonic()
    return value


def made_once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], object]) -> Path:
    """A file of that name, which the first worker that needs it makes for all of them."""
    base = factory.getbasetemp()
    shared = base.parent if os.environ.get("PYTEST_XDIST_WORKER") else base
    made = shared / name
    with open(shared / f"{name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not made.exists():
            partial = shared / f"partial-{name}"
            make(partial)
            partial.replace(made)
    return made


def free_port(address: str = "127.0.0.1") -> int:
    """A port that nobody listens on, below those that the kernel gives to outgoing connections."""
    while True:
        port = random.randrange(10000, 32000)
        with socket.socket() as probe, suppress(OSError):
            probe.bind((address, port))
            return port


def is_listening(pid: int, port: int) -> bool:
    """Whether somebody listens on a port in a process's network, by the kernel's tables: no connection is made."""
    with suppress(OSError):  # the process has just ended, or the kernel has no such questions
        if os.stat(f"/proc/{pid}/ns/net").st_ino == os.stat("/proc/self/ns/net").st_ino:
            return any(_listeners(family, port) for family in (socket.AF_INET, socket.AF_INET6))
    rows: list[str] = []
    for table in ("tcp", "tcp6"):
        with suppress(OSError):  # or there is no IPv6 here
            rows += Path(f"/proc/{pid}/net/{table}").read_text().splitlines()
    return any(row.split()[1].endswith(f":{port:04X}") and row.split()[3] == "0A" for row in rows)


def _listeners(family: int, port: int) -> bool:
    """Ask for the listening sockets alone: after some floods /proc/net/tcp has ten thousand rows that are none."""
    dump, all_of_them, by_family, listening, last = 0x01, 0x300, 20, 1 << 10, 3
    wanted = struct.pack("=BBBxI48x", family, socket.IPPROTO_TCP, 0, listening)
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 4) as kernel:  # 4: NETLINK_SOCK_DIAG
        kernel.send(struct.pack("=IHHII", 16 + len(wanted), by_family, dump | all_of_them, 1, 0) + wanted)
        while True:
            answer = kernel.recv(1 << 16)
            while answer:
                size, kind = struct.unpack_from("=IH", answer)
                if kind == last:
                    return False
                if kind != by_family:
                    raise OSError("the kernel does not tell")
                if struct.unpack_from("!H", answer, 20)[0] == port:
                    return True
                answer = answer[(size + 3) & ~3 :]


def clean_env(home: Path) -> dict[str, str]:
    """This process's environment less what the tester's machine or a CI system would tell the program."""
    foreign = ("ESTELLE_", "GIT_", "PYTEST_", "PYTHON", "PM2_", "pm_", "XDG_", "WINE", "npm_", "pnpm_")
    named = {"CI", "NO_COLOR", "FORCE_COLOR", "COLUMNS", "LINES", "DISPLAY", "STATE_DIRECTORY"}
    kept = {k: v for k, v in os.environ.items() if not k.startswith(foreign) and k not in named}
    home.mkdir(parents=True, exist_ok=True)
    settings = home / ".gitconfig"
    if not settings.exists():
        settings.write_text(
            "[user]\n\tname = Tester\n\temail = tester@example.invalid\n[init]\n\tdefaultBranch = master\n"
            "[advice]\n\tdetachedHead = false\n[commit]\n\tgpgSign = false\n"
        )
    return kept | {"HOME": str(home), "LC_ALL": "C.UTF-8", "GIT_CONFIG_NOSYSTEM": "1"}


def run(argv: Sequence[str | Path], env: Mapping[str, str], cwd: Path | None = None, timeout_s: float = 60) -> Result:
    """Run a command without standard input; at the deadline its whole session is killed and the test fails."""
    with subprocess.Popen(
        [str(word) for word in argv],
        cwd=cwd,
        env=dict(env),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    ) as process:
        try:
            out, err = process.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            out, err = process.communicate()
            pytest.fail(f"{' '.join(map(str, argv))} did not end within {timeout_s:g} s\n{_text(out)}\n{_text(err)}")
    return Result(process.returncode, _text(out), _text(err))


def _text(data: bytes) -> str:
    return data.decode("utf-8", "replace")


def processes_of(folder: Path) -> dict[int, str]:
    """Running processes that mention a folder in command line, environment or working directory: id to command line."""
    mention = re.compile(re.escape(os.fsencode(folder)) + rb"(?![\w.-])")
    found = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) in (os.getpid(), os.getppid()):
            continue
        with suppress(OSError):
            command = (entry / "cmdline").read_bytes()
            facts = command + (entry / "environ").read_bytes() + os.fsencode(os.readlink(entry / "cwd"))
            if mention.search(facts):
                found[int(entry.name)] = _text(command.replace(b"\0", b" ")).strip()
    return found


def kill_processes_of(folder: Path) -> dict[int, str]:
    """Kill what `processes_of` finds until there is nothing more; returns what was found at first."""
    first = processes_of(folder)
    if not first:
        return first

    def gone() -> bool:
        for pid in (left := processes_of(folder)):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        return not left

    wait_for(gone, lambda: f"all processes of the test are gone: {processes_of(folder)}")
    return first


class Origin:
    """A bare repository with one commit on master, and a clone to push from."""

    def __init__(self, folder: Path, config: Mapping[str, Any] | None = None) -> None:
        self.bare = folder / "origin.git"
        self.seed = folder / "seed"
        self.env = clean_env(folder / "home")
        package = {"name": "app", "private": True, "scripts": {"deploy:release": "sh deploy.sh"}}
        self.git("init", "--quiet", "--bare", str(self.bare), cwd=folder)
        self.git("clone", "--quiet", str(self.bare), str(self.seed), cwd=folder)
        self.first = self.commit(
            {
                "package.json": json.dumps(package),
                "deploy.sh": DEPLOY_SH,
                "config/updater.json": json.dumps(config or {"masterUrl": "ws://127.0.0.1:9900", "whitelist": []}),
                "config/version.json": json.dumps({"version": VERSION}),
            }
        )

    def git(self, *arguments: str, cwd: Path | None = None) -> str:
        """Run git in the seed, or elsewhere; returns its output; the test fails where git does."""
        code, out, err = run(["git", *arguments], self.env, cwd or self.seed)
        if code:
            pytest.fail(f"git {' '.join(arguments)}: {err or out}")
        return out.strip()

    def commit(self, files: Mapping[str, str | bytes | None], branch: str = "master", message: str = "change") -> str:
        """Write files (None deletes one) on a branch, made from master if it is new, and push; returns the commit."""
        git_folder = self.seed / ".git"  # what it says plainly need not be asked: there are thousands of commits
        if (git_folder / "HEAD").read_text() != f"ref: refs/heads/{branch}\n":
            exists = self.git("for-each-ref", f"refs/heads/{branch}")
            self.git("switch", "--quiet", *([branch] if exists else ["--create", branch, "master"]))
        for name, content in files.items():
            path = self.seed / name
            path.parent.mkdir(parents=True, exist_ok=True)
            if content is None:
                path.unlink()
            else:
                path.write_bytes(content if isinstance(content, bytes) else content.encode())
        self.git("add", "--all")
        self.git("commit", "--quiet", "--allow-empty", "--message", message)
        self.git("push", "--quiet", "--force", "origin", branch)
        return (git_folder / "refs" / "heads" / branch).read_text().strip()

    def tag(self, name: str, commit: str = "HEAD") -> None:
        """Push a tag."""
        self.git("tag", name, commit)
        self.git("push", "--quiet", "origin", f"refs/tags/{name}")

    def clone(self, folder: Path) -> Path:
        """A fresh clone, as a host would have it."""
        self.git("clone", "--quiet", str(self.bare), str(folder))
        return folder


@dataclass
class Host:
    """One host of a fleet: its address, clone, state folder, and its daemon while that runs."""

    address: str
    folder: Path
    prefix: tuple[str, ...] = ()
    process: subprocess.Popen[bytes] | None = None
    program: tuple[str, ...] = ()  # instead of the fleet's
    log_start: int = 0  # where the present daemon's part of stderr begins

    @property
    def repo(self) -> Path:
        return self.folder / "repo"

    @property
    def state(self) -> Path:
        return self.folder / "state"

    @property
    def config(self) -> Path:
        return self.repo / "config" / "updater.json"

    @property
    def stderr(self) -> str:
        """What the present daemon has written to standard error."""
        path = self.folder / "stderr"
        return _text(path.read_bytes()[self.log_start :]) if path.exists() else ""


class Fleet:
    """A master and its agents as real processes. The first host is the master.

    With a network, each host is one of its namespaces and finds its role by its own address; without, the hosts are
    127.0.0.1, 127.0.0.2 ... and `--bind` tells them apart.
    """

    def __init__(
        self,
        tmp_path: Path,
        hosts: int = 3,
        command: Sequence[str] = SCRIPT,
        config: Mapping[str, Any] | None = None,
        network: Network | None = None,
        program: Sequence[str] = PROGRAM,
    ) -> None:
        if command[0] == "pnpm":
            need("pnpm")
        self.tmp_path, self.network, self.program = tmp_path, network, tuple(program)
        addresses = [network.address(i + 1) if network else f"127.0.0.{i + 1}" for i in range(hosts)]
        self.port = free_port()
        self.url = f"ws://{addresses[0]}:{self.port}"
        settings: dict[str, Any] = {"masterUrl": self.url, "whitelist": addresses, "deploy": {"command": list(command)}}
        self.origin = Origin(tmp_path, settings | dict(config or {}))
        self.env = clean_env(tmp_path / "home")
        self.watched: list[subprocess.Popen[bytes]] = []
        self.hosts = [
            Host(address, tmp_path / f"host{i + 1}", network.prefix(i + 1) if network else ())
            for i, address in enumerate(addresses)
        ]
        for host in self.hosts:
            host.folder.mkdir()
            self.origin.clone(host.repo)

    @property
    def master(self) -> Host:
        return self.hosts[0]

    @property
    def agents(self) -> list[Host]:
        return self.hosts[1:]

    def start(self, *hosts: Host, env: Mapping[str, str] | None = None, options: Sequence[str] = ()) -> None:
        """Start daemons, by default all, and wait until they are ready."""
        chosen = hosts or tuple(self.hosts)
        # The master first: an agent that finds nobody waits before it tries again.
        for group in ([h for h in chosen if h is self.master], [h for h in chosen if h is not self.master]):
            for host in group:
                self.spawn(host, env, options)
            for host in group:
                self.wait_ready(host)

    def spawn(self, host: Host, env: Mapping[str, str] | None = None, options: Sequence[str] = ()) -> None:
        """Start one daemon without waiting for anything."""
        assert host.process is None or host.process.poll() is not None, f"{host.address} runs already"
        bind = [] if self.network else ["--bind", host.address]
        program = host.program or self.program
        argv = [*host.prefix, *program, "serve", *bind, "--state", str(host.state), "--config", str(host.config)]
        with open(host.folder / "stdout", "ab") as out, open(host.folder / "stderr", "ab") as err:
            host.log_start = os.fstat(err.fileno()).st_size
            host.process = subprocess.Popen(
                [*argv, *options],
                cwd=host.repo,
                env=self.env | dict(env or {}),
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                start_new_session=True,
            )

    def wait_ready(self, host: Host) -> None:
        """Until the master listens, or the agent says that it was welcomed."""

        def ready() -> bool:
            assert host.process
            if (code := host.process.poll()) is not None:
                pytest.fail(f"the daemon of {host.address} ended with {code}:\n{host.stderr}")
            if host is self.master:
                return "listening on" in host.stderr
            return "welcomed by the master" in host.stderr

        wait_for(ready, lambda: f"{host.address} is ready\n{host.stderr}")

    def wait_online(self, *hosts: Host) -> None:
        """Until these hosts, by default all, are online: agents come back to a restarted master late.

        As the master's log says it, or `status`, which takes a tenth of a core's second for each look.
        """
        chosen = hosts or tuple(self.hosts)
        asked = time.monotonic()

        def online() -> bool:
            nonlocal asked
            if all(map(self.said_online, chosen)):
                return True
            if time.monotonic() < asked + 0.5:
                return False
            asked = time.monotonic()
            code, out, _ = self.cli("status", "--json")
            wanted = {host.address for host in chosen}
            return code == 0 and wanted <= {row["host"] for row in json.loads(out)["hosts"] if row["online"]}

        wait_for(online, lambda: f"{[host.address for host in chosen]} are online: {self.cli('status')}")

    def said_online(self, host: Host) -> bool:
        """Whether the master that runs now has said so of a host, and nothing else since."""
        master = self.master
        if not master.process or master.process.poll() is not None:
            return False
        if host is master:
            return "listening on" in master.stderr
        told = [line for line in master.stderr.splitlines() if f" agent {host.address} " in line]
        return bool(told) and told[-1].endswith(" is online")

    def stop(self, host: Host, by: signal.Signals = signal.SIGTERM) -> int:
        """Stop one daemon as a service manager would; returns its exit status, negative for a signal."""
        assert host.process
        host.process.send_signal(by)
        try:
            return host.process.wait(READY_S)
        except subprocess.TimeoutExpired:
            pytest.fail(f"the daemon of {host.address} does not end at {by.name}:\n{host.stderr}")

    def kill(self, host: Host) -> None:
        """End one daemon, and nothing else, without warning."""
        self.stop(host, signal.SIGKILL)

    def restart(self, host: Host) -> None:
        """Start a daemon again, which is stopped first if it runs, and wait until it is ready."""
        if host.process and host.process.poll() is None:
            self.stop(host)
        self.start(host)

    def cli(
        self,
        *arguments: str,
        host: Host | None = None,
        bind: str | None = None,
        env: Mapping[str, str] | None = None,
        timeout_s: float = 60,
    ) -> Result:
        """Run a command to its end on a host, by default the master's."""
        argv, full_env, cwd = self._command(arguments, host, bind, env)
        return run(argv, full_env, cwd, timeout_s)

    def popen(
        self,
        *arguments: str,
        host: Host | None = None,
        bind: str | None = None,
        env: Mapping[str, str] | None = None,
        stdout: int | IO[bytes] = subprocess.PIPE,
        stderr: int | IO[bytes] = subprocess.PIPE,
    ) -> subprocess.Popen[bytes]:
        """Start a command that is watched while it runs; `stop_all` ends it."""
        argv, full_env, cwd = self._command(arguments, host, bind, env)
        options: dict[str, Any] = {"stdin": subprocess.DEVNULL, "start_new_session": True}
        self.watched.append(subprocess.Popen(argv, cwd=cwd, env=full_env, stdout=stdout, stderr=stderr, **options))
        return self.watched[-1]

    def _command(
        self, arguments: Sequence[str], host: Host | None, bind: str | None, env: Mapping[str, str] | None
    ) -> tuple[list[str], dict[str, str], Path]:
        host = host or self.master
        own = {"ESTELLE_CONFIG": str(host.config), "ESTELLE_STATE": str(host.state)}
        if not self.network:
            own["ESTELLE_BIND"] = bind or host.address
        return [*host.prefix, *(host.program or self.program), *arguments], self.env | own | dict(env or {}), host.repo

    def runs(self, host: Host | None = None) -> list[Path]:
        """The folders of the recorded runs, oldest first; their names tell only seconds apart."""

        def created(folder: Path) -> float:
            with suppress(OSError, ValueError, KeyError, TypeError):
                return float(json.loads((folder / "run.json").read_bytes())["created"])
            return 0.0

        folders = (host or self.master).state.glob("runs/*/")
        return sorted(folders, key=lambda folder: (folder.name[:15], created(folder)))

    def stop_all(self) -> None:
        """Stop the daemons, kill whatever mentions this test's folder; print what they said, for a failed test."""
        running = [host.process for host in self.hosts if host.process and host.process.poll() is None]
        for process in running:
            process.terminate()
        with suppress(subprocess.TimeoutExpired):
            for process in running:
                process.wait(5)
        killed = kill_processes_of(self.tmp_path)
        for process in self.watched:
            process.wait(5)
            for pipe in (process.stdout, process.stderr):
                if pipe:  # of a test that failed: else a later test fails for what this one left open
                    pipe.close()
        for host in self.hosts:
            if host.process:
                host.process.wait(5)
            host.log_start = 0
            print(f"--- {host.address}\n{host.stderr}", end="")
        if killed:
            print(f"--- killed at the end: {killed}")
