#!/usr/bin/env python3
# /// script
# requires-python = ">=3.11"
# dependencies = ["websockets>=17,<18", "tomli-w>=1.2,<2"]
# ///
"""Deploy a small fleet: one program on every host, master or agent by its own address.

| #  | section            | holds                                                                  |
| -- | ------------------ | ---------------------------------------------------------------------- |
| 0  | Header             | dependencies, this table, imports, version                             |
| 1  | Vocabulary         | enums, named state sets, every limit and timeout with its reason       |
| 2  | Errors             | one tree; each class carries its exit code, WHAT and HINT              |
| 3  | Addresses          | canonical addresses, whitelist verdict, role decision, targets         |
| 4  | Configuration      | frozen dataclasses, parse with all problems at once, render            |
| 5  | Messages           | the wire's verbs as dataclasses, encode and decode, size limits        |
| 6  | Journal            | offsets, what to send, what to accept, run and job states              |
| 7  | Pipeline           | plan a deployment as argument tuples, read versions out of output      |
| 10 | Files              | atomic writes, append-only logs, locks, state folder, configuration    |
| 11 | Processes          | spawn, stream, interrupt, kill trees, detach; POSIX and Windows        |
| 12 | Runner             | one job: lock, steps, log, result                                      |
| 13 | Probes             | own address and role                                                   |
| 15 | Agent              | connect, hello, resume, take orders                                    |
| 16 | Master             | handshake, registry, runs, queue, followers                            |
| 18 | Commander          | what the command line uses to talk to the master                       |
| 19 | Service            | start-up and shutdown order, signals, readiness                        |
| 20 | Tools              | build                                                                  |
| 21 | Command line       | the command table, cmd_*, rendering, main(argv) -> int                 |

A section uses only names from sections above it. Sections 1 to 7 are pure: time, bytes and randomness come in as
arguments, and nothing there touches a socket, file, process, clock, environment or terminal.

The one idea: a job's log is a file whose byte offset is the sequence number, and everything else (streaming, resuming,
following, history) is a cursor into it.
"""

from __future__ import annotations

import importlib
import os
import re
import sys
import time
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"


_LAZY_NAMES: list[str] = []  # for `preload`


class _Lazy:
    """A module imported at its first use, so that a short command does not pay for what only the daemon needs."""

    def __init__(self, name: str) -> None:
        self._name = name
        _LAZY_NAMES.append(name)

    def __getattr__(self, attribute: str) -> Any:
        return getattr(self._load(), attribute)

    def _load(self) -> Any:
        module = importlib.import_module(self._name)
        globals()[self._name.replace(".", "_") if "." in self._name else self._name] = module
        return module


if TYPE_CHECKING:
    import asyncio
    import functools
    import hashlib
    import http.client as http_client
    import importlib.metadata as importlib_metadata
    import importlib.util as importlib_util
    import io
    import ipaddress
    import marshal
    import pathlib
    import queue
    import shutil
    import socket
    import subprocess
    import tempfile
    import threading
    import tomllib
    import urllib.request as urllib_request
    import zipfile
    from collections.abc import Callable, Iterator, Sequence
    from ipaddress import IPv4Address, IPv6Address
    from pathlib import Path
else:
    asyncio = _Lazy("asyncio")
    functools = _Lazy("functools")
    hashlib = _Lazy("hashlib")
    http_client = _Lazy("http.client")
    importlib_metadata = _Lazy("importlib.metadata")
    importlib_util = _Lazy("importlib.util")
    io = _Lazy("io")
    ipaddress = _Lazy("ipaddress")
    marshal = _Lazy("marshal")
    pathlib = _Lazy("pathlib")
    queue = _Lazy("queue")
    shutil = _Lazy("shutil")
    socket = _Lazy("socket")
    subprocess = _Lazy("subprocess")
    tempfile = _Lazy("tempfile")
    threading = _Lazy("threading")
    tomllib = _Lazy("tomllib")
    urllib_request = _Lazy("urllib.request")
    zipfile = _Lazy("zipfile")

# What a daemon comes to need besides: imported inside functions, here, in websockets or by the library itself.
_PRELOADED = (
    *("_strptime", "concurrent.futures.thread", "encodings.idna", "traceback"),
    *("tomli_w", "websockets.asyncio.client", "websockets.asyncio.server"),
)
_BAKED = "estelle_updater.pyz"  # the folder that `build` writes into compiled code as the place of its source


def preload(*names: str) -> None:
    """Import what may be needed later, so that the .pyz (or Python's library) may be replaced under this process.

    Imports `names`, or without any all that a daemon can need; a module that this platform or installation lacks is
    skipped. Source lines are kept too: a traceback would read them from the new file, show the wrong ones, or fail.
    """
    for name in names or (*_LAZY_NAMES, *_PRELOADED):
        try:
            importlib.import_module(name)
        except ModuleNotFoundError:
            continue
    import linecache
    from zipimport import zipimporter

    for module in list(sys.modules.values()):
        loader, path = getattr(module, "__loader__", None), getattr(module, "__file__", None) or ""
        if isinstance(loader, zipimporter):
            if path.endswith(".pyc"):
                path = _BAKED + path[len(loader.archive) : -1].replace(os.sep, "/")
            linecache.getlines(path, vars(module))


# ==============================================================================
# 1. Vocabulary: enums, named state sets, every limit and timeout with its reason
# ==============================================================================


class Role(StrEnum):
    """What this host's daemon is."""

    MASTER = "master"
    AGENT = "agent"


class Kind(StrEnum):
    """What an order asks of a host; every order is a job with the same folder, log, states, cancel and history."""

    DEPLOY = "deploy"


class State(StrEnum):
    """A job's state, as the contract spells it."""

    QUEUED = "queued"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"
    TIMEOUT = "timeout"
    OFFLINE = "offline"
    LOST = "lost"


FINAL = frozenset(State) - {State.QUEUED, State.RUNNING}

DEFAULT_PORT = 9900
STEP_TIMEOUT_S = 1800.0  # one step; the configuration's [deploy] timeout overrides it

# ==============================================================================
# 2. Errors: one tree; each class carries its exit code, WHAT and HINT
# ==============================================================================


class UpdaterError(Exception):
    """What went wrong, in one line, and what to do about it; `exit_code` is the contract's."""

    exit_code = 1

    def __init__(self, what: str, hint: str = "") -> None:
        super().__init__(what)
        self.what = what
        self.hint = hint


class UsageError(UpdaterError):
    """Wrong words on the command line."""

    exit_code = 2


class ConfigError(UpdaterError):
    """The configuration is missing or wrong; `problems` lists every one, each naming file, key and value."""

    exit_code = 2

    def __init__(self, what: str, hint: str = "", problems: tuple[str, ...] = ()) -> None:
        super().__init__(what, hint)
        self.problems = problems


class UnreachableError(UpdaterError):
    """The master did not answer in time."""

    exit_code = 3


class RefusedError(UpdaterError):
    """The master answered and does not let us in."""

    exit_code = 3


class TargetError(UpdaterError):
    """No such target, or nobody of it is online."""

    exit_code = 4


class GuardError(UpdaterError):
    """A guard said no and nothing was changed."""

    exit_code = 5


# ==============================================================================
# 3. Addresses: canonical addresses, whitelist verdict, role decision, targets
# ==============================================================================

# ==============================================================================
# 4. Configuration: frozen dataclasses, parse with all problems at once, render
# ==============================================================================

# ==============================================================================
# 5. Messages: the wire's verbs as dataclasses, encode and decode, size limits
# ==============================================================================

# ==============================================================================
# 6. Journal: offsets, what to send, what to accept, run and job states
# ==============================================================================

# ==============================================================================
# 7. Pipeline: plan a deployment as argument tuples, read versions out of output
# ==============================================================================

# ==============================================================================
# 10. Files: atomic writes, append-only logs, locks, state folder, configuration
# ==============================================================================

# ==============================================================================
# 11. Processes: spawn, stream, interrupt, kill trees, detach; POSIX and Windows
# ==============================================================================

# ==============================================================================
# 12. Runner: one job: lock, steps, log, result
# ==============================================================================

# ==============================================================================
# 13. Probes: own address and role
# ==============================================================================

_METADATA = "http://169.254.169.254"  # of every cloud
_METADATA_PATHS: dict[str, dict[str, str]] = {
    "/hetzner/v1/metadata/public-ipv4": {},
    "/computeMetadata/v1/instance/network-interfaces/0/access-configs/0/external-ip": {"Metadata-Flavor": "Google"},
    "/opc/v2/vnics/": {"Authorization": "Bearer Oracle"},  # JSON, and mostly without the address: then the echoes say
    "/latest/meta-data/public-ipv4": {"X-aws-ec2-metadata-token": ""},  # to be fetched first
}
_METADATA_DEADLINE_S = 1.0  # it answers in milliseconds, or is not there
_ECHOES = ("https://api.ipify.org", "https://checkip.amazonaws.com", "https://ipv4.icanhazip.com")


def _parse_address(text: str) -> IPv4Address | IPv6Address:
    """An address without its zone; `::ffff:1.2.3.4` is 1.2.3.4. Raises ValueError."""
    address = ipaddress.ip_address(text.strip().partition("%")[0])
    return getattr(address, "ipv4_mapped", None) or address


def _answers(calls: Sequence[Callable[[], Any]], deadline_s: float) -> Iterator[Any]:
    """What the calls return, as it comes, until the deadline; a call that fails has no answer.

    In daemon threads: a resolver or a silent server may take minutes, and then delays neither us nor our exit.
    """
    done: queue.SimpleQueue[list[Any]] = queue.SimpleQueue()

    def ask(call: Callable[[], Any]) -> None:
        answer = []
        try:
            answer = [call()]
        except (OSError, ValueError, http_client.HTTPException):
            pass
        finally:
            done.put(answer)

    ends = time.monotonic() + deadline_s
    for call in calls:
        threading.Thread(target=ask, args=(call,), daemon=True).start()
    for _ in calls:
        try:
            yield from done.get(timeout=max(0.0, ends - time.monotonic()))
        except queue.Empty:
            return


def probe_master_addresses(host: str, port: int, timeout_s: float = 3.0) -> tuple[str, ...]:
    """Every address that a name has now, IPv4 and IPv6, or the address itself; empty when it can't be resolved."""
    lookup = functools.partial(socket.getaddrinfo, host, port, type=socket.SOCK_STREAM)
    for found in _answers([lookup], timeout_s):
        return tuple(dict.fromkeys(str(_parse_address(entry[4][0])) for entry in found))
    return ()


def probe_is_local(address: str) -> bool:
    """Whether an address is this host's own; of the loopback net only 127.0.0.1 and ::1 count as such.

    A bind alone proves nothing: with `ip_nonlocal_bind` it succeeds for any address. Connecting a UDP socket sends
    nothing and makes the kernel choose a source. It is the address itself where that is ours, except for a second
    address in the same IPv4 subnet: there it is the first one, but Linux routes nothing from a source that isn't ours.
    """
    try:
        ip = _parse_address(address)
        family = socket.AF_INET if ip.version == 4 else socket.AF_INET6
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect((str(ip), 9))
            if probe.getsockname()[0] == str(ip):
                return True
        if ip.version == 6 or ip.is_loopback or ip.is_unspecified or ip.is_multicast:
            return False
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.bind((str(ip), 0))
            probe.connect((str(ip), 9))
            return True
    except (OSError, ValueError):
        return False


def _fetch_address(url: str, headers: dict[str, str], timeout_s: float, direct: bool = False) -> str:
    """The public address that a URL answers with; `direct` passes by a proxy. Raises OSError or ValueError."""
    opener = urllib_request.build_opener(urllib_request.ProxyHandler({} if direct else None))

    def fetch(url: str, headers: dict[str, str], method: str) -> str:
        with opener.open(urllib_request.Request(url, headers=headers, method=method), timeout=timeout_s) as answer:
            return str(answer.read(65536).decode("utf-8", "replace"))

    if "" in headers.values():
        token_url = url.partition("/latest/")[0] + "/latest/api/token"
        headers = dict.fromkeys(headers, fetch(token_url, {"X-aws-ec2-metadata-token-ttl-seconds": "60"}, "PUT"))
    text = fetch(url, headers, "GET")
    named = re.search(r'"publicIp"\s*:\s*"([^"]+)"', text)
    address = _parse_address(named[1] if named else text)
    if not address.is_global:
        raise ValueError(f"{address} is no public address")
    return str(address)


def probe_public_address(
    timeout_s: float = 3.0, metadata: str = _METADATA, echoes: Sequence[str] = _ECHOES
) -> tuple[str, str] | None:
    """The address by which the world sees this host, and who says so: "metadata", or "echo" where two services agree.

    None after at most `timeout_s`. Only for a host whose role its own addresses leave open: it asks strangers.
    """
    ends, wait_s = time.monotonic() + timeout_s, min(_METADATA_DEADLINE_S, timeout_s / 2)
    ask = functools.partial
    places = [ask(_fetch_address, metadata + path, having, wait_s, True) for path, having in _METADATA_PATHS.items()]
    for address in _answers(places, wait_s):
        return address, "metadata"
    seen, wait_s = set(), max(0.0, ends - time.monotonic())
    for address in _answers([ask(_fetch_address, url, {}, wait_s) for url in echoes], wait_s):
        if address in seen:
            return address, "echo"
        seen.add(address)
    return None


# ==============================================================================
# 15. Agent: connect, hello, resume, take orders
# ==============================================================================

# ==============================================================================
# 16. Master: handshake, registry, runs, queue, followers
# ==============================================================================

# ==============================================================================
# 18. Commander: what the command line uses to talk to the master
# ==============================================================================

# ==============================================================================
# 19. Service: start-up and shutdown order, signals, readiness
# ==============================================================================

# ==============================================================================
# 20. Tools: build
# ==============================================================================

_BLOCK = re.compile(r"(?m)^# /// (?P<type>[a-zA-Z0-9-]+)$\s(?P<content>(^#(| .*)$\s)+)^# ///$")  # as PEP 723 gives it
_UNUSED = ("websockets/__main__.py", "websockets/cli.py", "websockets/legacy/", "websockets/sync/", "websockets/trio/")
_LICENCE = re.compile(r"[^/]+\.dist-info/(.*/)?(licen[cs]e|copying|notice)[^/]*", re.IGNORECASE)
# Valid on Python 2.7 and 3.x alike, so that an old one says a sentence and not "SyntaxError".
_MAIN = '''\
"""Start estelle-updater. Written by `build`; nothing newer than Python 2.7 may stand here."""
import sys

if sys.version_info < {python}:
    sys.stderr.write(
        "estelle-updater: error: Python {python_text} or newer is needed, and %s is Python %s\\n"
        "hint: name a newer one, as in: python{python_text} %s\\n"
        % (sys.executable, sys.version.split()[0], " ".join(sys.argv))
    )
    sys.exit(2)
if sys.argv[1:] == ["--version"]:
    sys.stdout.write("estelle-updater {version}\\n")
    sys.exit(0)

from estelle_updater import main

sys.exit(main(sys.argv[1:]))
'''


@dataclass(frozen=True)
class BuildResult:
    """A finished zipapp."""

    path: Path
    sha256: str
    size_bytes: int


def parse_script_block(text: str) -> tuple[tuple[int, int], tuple[str, ...]]:
    """The oldest Python and the packages that a script asks for in its PEP 723 block, the only list of dependencies."""
    hint = "restore the head of estelle_updater.py"
    blocks = [block for block in _BLOCK.finditer(text) if block["type"] == "script"]
    if len(blocks) != 1:
        raise UpdaterError(f"{len(blocks)} PEP 723 script blocks instead of one", hint)
    content = "".join(line[2:] if line[:2] == "# " else line[1:] for line in blocks[0]["content"].splitlines(True))
    try:
        table = tomllib.loads(content)
        oldest = re.fullmatch(r">=(\d+)\.(\d+)", table["requires-python"])
        return (int(oldest[1]), int(oldest[2])), tuple(map(str, table["dependencies"]))  # type: ignore[index]
    except (ValueError, KeyError, TypeError) as error:
        raise UpdaterError(f"unreadable PEP 723 block: {error!r}", hint) from error


def require_packages() -> None:
    """Refuse in one line, with the ways out, where a run-time package is missing or of another version than asked for.

    Looks only in a source checkout: the zipapp holds its packages. Raises UsageError.
    """
    source = pathlib.Path(__file__)
    if not source.is_file():
        return
    wanted = parse_script_block(source.read_text("utf-8"))[1]
    for requirement in wanted:
        name = re.split(r"[^A-Za-z0-9._-]", requirement)[0]
        try:
            have = importlib_metadata.version(name)
            wrong = f"{have} is installed" if not _is_within(have, requirement) else ""
        except importlib_metadata.PackageNotFoundError:
            wrong = "it is not installed"
        if wrong:
            packages = " ".join(f"'{each}'" for each in wanted)
            hint = f"uv run {source.name} …, or python3 {source.name} build and use the .pyz, or pip install {packages}"
            raise UsageError(f"{requirement} is needed and {wrong}", hint)


def _is_within(version: str, requirement: str) -> bool:
    """Whether a release number satisfies `name>=1.2,<2`: the two operators that the block uses."""

    def key(text: str) -> list[int]:
        return [int(part) for part in re.findall(r"\d+", text)[:3]]

    bounds = re.findall(r"(>=|<)([\d.]+)", requirement)
    return all((key(version) >= key(bound)) == (operator == ">=") for operator, bound in bounds)


def build_zipapp(source: Path, output: Path) -> BuildResult:
    """Make a .pyz that runs without anything installed, from a checkout's estelle_updater.py.

    The bytes depend only on the sources, the packages' versions and the minor version of the Python that builds: its
    bytecode lies beside each source, so that hosts with the same Python start faster; others compile from the source.
    Raises UpdaterError.
    """
    if not source.is_file():
        raise UpdaterError("build needs a source checkout, and this is a .pyz", f"python3 {source.stem}.py build there")
    text = source.read_text("utf-8")  # as text: Windows' line endings must not show in the bytes
    python, dependencies = parse_script_block(text)
    (version,) = re.findall(r'^__version__ = "(.+)"$', text, re.MULTILINE)
    python_text = f"{python[0]}.{python[1]}"
    files = {
        "__main__.py": _MAIN.format(python=python, python_text=python_text, version=version).encode(),
        "estelle_updater.py": text.encode(),
    }
    licence = source.with_name("LICENSE")
    if licence.is_file():
        files["LICENSE"] = licence.read_bytes().replace(b"\r\n", b"\n")
    with tempfile.TemporaryDirectory() as folder:
        for wheel in _fetch_wheels(dependencies, python_text, pathlib.Path(folder)):
            files.update(_read_wheel(wheel))
    files.update({name + "c": _compile(files[name], name) for name in files if name.endswith(".py")})
    content = _zip(files)
    try:
        _replace_executable(output, content)
    except OSError as error:
        raise UpdaterError(f"can't write {output}: {error.strerror}", "choose another place with -o FILE") from error
    return BuildResult(output, hashlib.sha256(content).hexdigest(), len(content))


def render_build(result: BuildResult) -> str:
    """What `build` prints: the file, its checksum, and the line by which a fleet accepts it."""
    return (
        f"{result.path} ({result.size_bytes:,} bytes, bytecode for Python {sys.version_info[0]}.{sys.version_info[1]})\n"
        f"sha256 {result.sha256}\n"
        f'for upgrade, in config/updater.toml under [updater]: sha256 = "{result.sha256}"'
    )


def _fetch_wheels(dependencies: tuple[str, ...], python_text: str, folder: Path) -> list[Path]:
    """Download the pure wheels: a C extension can't be loaded from a zip, nor serve every platform."""
    pip = [sys.executable, "-m", "pip"]
    if importlib_util.find_spec("pip") is None:
        uv = shutil.which("uv")
        if uv is None:
            raise UpdaterError("build needs pip or uv to fetch packages, and finds neither", "python3 -m ensurepip")
        pip = [uv, "tool", "run", "pip"]
    command = [*pip, "download", "--quiet", "--disable-pip-version-check", "--retries=1", "--only-binary=:all:"]
    command += ["--platform=any", "--implementation=py", "--abi=none", f"--python-version={python_text}"]
    done = subprocess.run(
        [*command, f"--dest={folder}", *dependencies], capture_output=True, text=True, errors="replace"
    )
    if done.returncode:
        said = (done.stderr or done.stdout).strip().splitlines() or ["nothing"]
        reason = next((line for line in said if line.startswith(("ERROR", "error"))), said[-1])
        hint = "check the network and the package index; PIP_FIND_LINKS=FOLDER takes wheels from a folder"
        raise UpdaterError(f"can't fetch {', '.join(dependencies)}: {reason}", hint)
    return sorted(folder.glob("*.whl"))


def _read_wheel(wheel: Path) -> dict[str, bytes]:
    """The files of a pure wheel that the zipapp needs: modules and licences."""
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        compiled = [name for name in names if name.endswith((".so", ".pyd", ".dll", ".dylib"))]
        if compiled or not wheel.name.endswith("-none-any.whl"):
            raise UpdaterError(f"{wheel.name} holds compiled code", "choose a version that has a pure wheel")
        wanted = [name for name in names if name.endswith(".py") and not name.startswith(_UNUSED)]
        files = {name: archive.read(name) for name in names if name in wanted or _LICENCE.fullmatch(name)}
    version = files.get("websockets/version.py", b"")
    if b"\nreleased = True\n" in version:  # then the import below, 13 ms of every start, is for nothing
        files["websockets/version.py"] = version.replace(b"import importlib.metadata\n", b"")
    return files


def _compile(source: bytes, name: str) -> bytes:
    """A .pyc that counts as fresh whatever the file's date (PEP 552: hash-based, unchecked)."""
    code = compile(source, f"{_BAKED}/{name}", "exec", dont_inherit=True, optimize=0)
    flags = (1).to_bytes(4, "little")
    return importlib_util.MAGIC_NUMBER + flags + importlib_util.source_hash(source) + marshal.dumps(code)


def _zip(files: dict[str, bytes]) -> bytes:
    """An executable zip: sorted, dateless, uncompressed (starts faster, and no zlib version shows in the bytes)."""
    buffer = io.BytesIO()
    buffer.write(b"#!/usr/bin/env python3\n")
    with zipfile.ZipFile(buffer, "w") as archive:
        for name in sorted(files):
            entry = zipfile.ZipInfo(name)
            entry.create_system, entry.external_attr = 3, 0o100644 << 16
            archive.writestr(entry, files[name])
    return buffer.getvalue()


def _replace_executable(path: Path, content: bytes) -> None:
    """Put a file in place in one step: a host that starts it meanwhile sees the old one or the new one."""
    fresh = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with open(fresh, "xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(fresh, 0o755)
        os.replace(fresh, path)
    finally:
        fresh.unlink(missing_ok=True)


# ==============================================================================
# 21. Command line: the command table, cmd_*, rendering, main(argv) -> int
# ==============================================================================


def main(argv: list[str]) -> int:
    """Run one command; returns the contract's exit code."""
    if argv == ["--version"]:
        print(f"estelle-updater {__version__}")
        return 0
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
