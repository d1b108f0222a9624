"""The master hands out its program; hosts take the one that their configuration names, and keep the old if need be."""

from __future__ import annotations

import functools
import hashlib
import http.client
import http.server
import importlib.util
import io
import json
import marshal
import os
import re
import shutil
import signal
import socket
import sys
import threading
import zipfile
from collections.abc import Callable, Iterable, Sequence
from contextlib import closing
from pathlib import Path
from types import CodeType

import pytest

from tests import seam
from tests.commands import COMMAND, GATED, Watched, detach, new_host_line, open_gate, wait_state, write_script
from tests.fleet import MODULE, Fleet, Host, Result, need, processes_of, run, wait_for
from tests.test_pm2 import SERVICE, Pm2

MakeFleet = Callable[..., Fleet]
NAME = "estelle_updater.pyz"
NEW = "9.9.0"
IMPATIENT = {"CANCEL_LOOK_S, BACK_S)": "CANCEL_LOOK_S, 20.0)", "+ OBEY_S": "+ 5.0"}  # of an old one that is to return
CRASHES = {"        dialer = Dialer(agent": "        os._exit(3)\n        dialer = Dialer(agent"}
HELLO = "connect_master(way, {})"
UNWELCOME = {HELLO.format("self.agent.hello()"): HELLO.format("replace(self.agent.hello(), protocol=[98, 99])")}
STUCK = {"                await self.over.wait()\n": "                await asyncio.Event().wait()\n"} | UNWELCOME


def variant(pyz: Path, output: Path, version: str, edits: dict[str, str] | None = None) -> str:
    """Another version of the program: the zipapp with its source edited; returns its checksum."""
    output.parent.mkdir(parents=True, exist_ok=True)
    data = edited(pyz, version, tuple((edits or {}).items()))
    output.write_bytes(data)
    output.chmod(0o755)
    return hashlib.sha256(data).hexdigest()


@functools.cache
def edited(pyz: Path, version: str, edits: Sequence[tuple[str, str]]) -> bytes:
    with zipfile.ZipFile(pyz) as old, io.BytesIO() as file:
        file.write(b"#!/usr/bin/env python3\n")
        with zipfile.ZipFile(file, "w") as new:
            for name in old.namelist():
                data = old.read(name)
                if name in ("__main__.pyc", "estelle_updater.pyc"):
                    continue  # made of the edited sources below
                if name in ("__main__.py", "estelle_updater.py"):
                    before = data.decode()
                    chosen = edits if name == "estelle_updater.py" else ()
                    data = replaced(before.replace("0.1.0", version), chosen).encode()
                    compiled = None
                    if name == "estelle_updater.py":
                        compiled = spliced(old.read(f"{name}c"), before, version, chosen, data)
                    new.writestr(zipfile.ZipInfo(f"{name}c"), compiled or seam._compile(data, name))
                new.writestr(zipfile.ZipInfo(name), data)
        return file.getvalue()


def replaced(text: str, edits: Iterable[tuple[str, str]]) -> str:
    for before, after in edits:
        assert text.count(before) == 1, before
        text = text.replace(before, after)
    return text


def spliced(compiled: bytes, text: str, version: str, edits: Sequence[tuple[str, str]], edited: bytes) -> bytes | None:
    """The edited module's bytecode, of which only the functions and classes with an edit are compiled: all takes
    seconds. None where an edit is in none."""
    begun = [match.start() for match in re.finditer(r"(?m)^(?=class |def |async def )", text)]
    inside: dict[int, list[tuple[str, str]]] = {}
    for edit in edits:
        at = text.index(edit[0])
        inside.setdefault(max((begin for begin in begun if begin <= at), default=0), []).append(edit)
    fresh: dict[str, CodeType] = {}
    for begin, wanted in inside.items():
        end = re.compile(r"(?m)^[^\s)]").search(text, begin + 1)
        block = text[begin : end.start() if end else None]
        if any(before not in block for before, _ in wanted):
            return None
        source = "\n" * text.count("\n", 0, begin) + replaced(block, wanted)
        fresh |= codes(marshal.loads(seam._compile(source.encode(), MODULE.name)[16:]))
    missing = set(fresh)

    def put(code: CodeType) -> CodeType:
        parts = []
        for part in code.co_consts:
            if isinstance(part, CodeType) and part.co_name in fresh:
                missing.discard(part.co_name)
                part = fresh[part.co_name]
            parts.append(version if part == "0.1.0" else part)
        return code.replace(co_consts=tuple(parts))

    stream = io.BytesIO(compiled[16:])  # the module, and what `build` sets apart from it, whose lengths it knows
    sizes: dict[object, int] = {}
    loaded = []
    packed = []
    while (at := stream.tell()) < len(compiled) - 16:
        loaded.append(put(marshal.load(stream)))
        packed.append(marshal.dumps(loaded[-1]))
        sizes[stream.tell() - at] = len(packed[-1])
    assert not missing, missing

    def sized(part: object) -> object:
        if isinstance(part, tuple):  # as three and more are noted
            return tuple(map(sized, part))
        return sizes.get(part, part) if type(part) is int else part

    packed[0] = marshal.dumps(loaded[0].replace(co_consts=sized(loaded[0].co_consts)))  # type: ignore[arg-type]
    return compiled[:8] + importlib.util.source_hash(edited) + b"".join(packed)


def codes(module: CodeType) -> dict[str, CodeType]:
    """A module's functions and classes, compiled."""
    return {part.co_name: part for part in module.co_consts if isinstance(part, CodeType)}


def make(
    fleet: MakeFleet, pyz: Path, tmp_path: Path, new: dict[str, str] | None = None, old: dict[str, str] | None = None,
    agents: int = 1, start: bool = True,
) -> Fleet:  # fmt: skip
    """A fleet whose master runs the new version, which every host accepts, and whose agents run the old one."""
    file = tmp_path / "new" / NAME
    sha256 = variant(pyz, file, NEW, new)
    one = fleet(hosts=1 + agents, config={"updater": {"sha256": sha256}}, start=False)
    one.master.program = (sys.executable, str(file))
    for agent in one.agents:
        agent.program = (sys.executable, str(agent.folder / NAME))
        variant(pyz, agent.folder / NAME, "0.0.9", old)
    if start:
        one.start()
    return one


def get(one: Fleet, path: str, source: str = "127.0.0.1", **headers: str) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", one.port, timeout=30, source_address=(source, 0))
    with closing(connection):
        connection.request("GET", path, headers=headers)
        answer = connection.getresponse()
        return answer.status, answer.read()


def versions(one: Fleet) -> dict[str, str]:
    rows = json.loads(one.cli("status", "--json").out)["hosts"]
    return {row["host"]: row["updater"] for row in rows if row["online"]}


def runner_of(host: Host) -> int:
    """The process id of the runner that works on a host."""

    def found() -> int:
        return next((pid for pid, words in processes_of(host.state).items() if " run-job " in words), 0)

    return wait_for(found, f"a runner works for {host.address}")


def test_a_new_host_gets_the_program(fleet: MakeFleet, pyz: Path) -> None:
    one = fleet(hosts=1, program=(sys.executable, str(pyz)), config={"whitelist": ["127.0.0.1", "127.0.0.2"]})
    data, sha256 = pyz.read_bytes(), hashlib.sha256(pyz.read_bytes()).hexdigest()
    assert get(one, f"/{NAME}", "127.0.0.2") == (200, data)
    assert get(one, f"/{NAME}.sha256") == (200, f"{sha256}  {NAME}\n".encode())
    assert get(one, f"/{NAME}", "127.0.0.9")[0] == 403
    assert get(one, f"/{NAME}", Host="evil.example")[0] == 403
    assert get(one, f"/{NAME}", Origin="http://evil.example")[0] == 403
    assert get(one, "/other.pyz")[0] == 404

    stalled = []
    for _ in range(4):  # they ask, and read nothing
        stalled.append(socket.socket())
        stalled[-1].setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        stalled[-1].connect(("127.0.0.1", one.port))
        stalled[-1].sendall(f"GET /{NAME} HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n".encode())
        assert stalled[-1].recv(15, socket.MSG_WAITALL) == b"HTTP/1.1 200 OK"
    assert get(one, f"/{NAME}")[0] == 503
    assert get(one, f"/{NAME}", "127.0.0.2") == (200, data), "another address has its own"
    for connection in stalled:
        connection.close()
    wait_for(lambda: get(one, f"/{NAME}") == (200, data), "there is room again")
    assert one.cli("status").code == 0


def test_the_line_for_a_new_host(fleet: MakeFleet, pyz: Path, tmp_path: Path) -> None:
    """README's goes on, and writes, only where the configuration's own key names the very file."""
    sha256 = hashlib.sha256(pyz.read_bytes()).hexdigest()
    one = fleet(hosts=1, program=(sys.executable, str(pyz)), config={"updater": {"sha256": sha256}})
    line = new_host_line(f"http://127.0.0.1:{one.port}")
    tools, home = tmp_path / "bin", Path(one.env["HOME"])
    tools.mkdir()
    written = (home / "estelle-updater" / NAME).exists

    def type_in(clone: Path, python: str = sys.executable, command: str = line) -> Result:
        (tools / "python3").unlink(missing_ok=True)
        if python:
            (tools / "python3").symlink_to(python)
        return run(["/bin/sh", "-c", command], one.env | {"PATH": str(tools)}, clone)

    clone = one.origin.seed
    assert type_in(clone, python="").code == 127 and not written()
    missing = type_in(clone, command=line.replace(f"/{NAME}'", "/other.pyz'"))
    assert missing.code == 1 and "404" in missing.err and not written()

    config = clone / "config/updater.json"
    settings = json.loads(config.read_text())
    config.write_text(json.dumps(settings | {"updater": {"sha256": "0" * 64}}))
    refused = type_in(clone)
    assert refused.code == 1 and f"{sha256} is not the checksum in config/updater.json" in refused.err
    good = one.master.config.read_text()
    one.master.config.write_text(config.read_text())
    own = "hint: put the program that it names in its place"
    wait_for(lambda: own in one.cli("upgrade").err, "the master reads it, and no old program is to be named")
    one.master.config.write_text(good)
    assert refused.out == "" and not written()
    config.unlink()
    assert type_in(clone).code == 1 and not written(), "no configuration"
    config = clone / "config/updater.toml"
    text = f'masterUrl = "{one.url}"\nwhitelist = []  # sha256 = "{sha256}"\n# [updater]\n# sha256 = "{sha256}"\n'
    for more in ("", "[updater]\n", '[updater]\nsha256 = ""\n', f'[updater]\nsha256 = "{"0" * 64}"  # {sha256}\n'):
        config.write_text(text + more)
        done = type_in(clone)
        assert (done.code, done.out) == (1, "") and not written(), more
    config.write_text(f'{text}[updater]\nsha256 = "{sha256}"\n')
    second = config.with_suffix(".json")
    second.write_text(json.dumps(settings))
    assert type_in(clone).code == 1 and not written(), "which of two configurations counts?"
    second.unlink()
    config.write_text(f'{text}[updater]\nsha256 = "{sha256.upper()}"\n')
    (clone / "json.py").write_text("raise SystemExit('taken from the clone')\n")
    assert type_in(clone).code == 0, "upper case is the same value, and modules come from Python alone"
    assert written() and not list(home.glob("*.py*"))

    done = type_in(one.master.repo)  # again, over what is there
    assert done.code == 0 and done.out.startswith("estelle-updater "), done.err
    assert (home / "estelle-updater" / NAME).read_bytes() == pyz.read_bytes()
    assert not (one.master.repo / NAME).exists(), "what is deployed stays as it is"


class CutOff(http.server.BaseHTTPRequestHandler):
    """Says how long the program is, sends half of it and hangs up."""

    program = b""

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(self.program)))
        self.end_headers()
        self.wfile.write(self.program[: len(self.program) // 2])

    def log_message(self, *_: object) -> None:
        """Say nothing."""


def test_the_line_for_a_new_host_where_the_download_is_cut_off(pyz: Path, tmp_path: Path) -> None:
    CutOff.program = pyz.read_bytes()
    (tmp_path / "config").mkdir()
    config = {"updater": {"sha256": hashlib.sha256(CutOff.program).hexdigest()}}
    (tmp_path / "config/updater.json").write_text(json.dumps(config))
    with http.server.HTTPServer(("127.0.0.1", 0), CutOff) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        line = new_host_line(f"http://127.0.0.1:{server.server_port}").replace("python3", sys.executable, 1)
        done = run(["/bin/sh", "-c", line], {"HOME": str(tmp_path)}, tmp_path)
        server.shutdown()
    assert done.code == 1 and done.out == "" and not list(tmp_path.rglob(NAME))


# The same words in all of them; what is no POSIX shell included
SHELLS = ["sh", "bash", "dash", "zsh", "fish", "tcsh", "bsd-csh", "mksh", "ksh93", "yash", "posh", "elvish"]


def test_every_shell_hands_the_line_over_as_it_stands(tmp_path: Path) -> None:
    """So it is one command in each, and what it does is Python's alone: no shell decides what runs after what."""
    need("bash", "zsh", "fish", "tcsh", "mksh")
    line = new_host_line("http://127.0.0.1:9")
    words = re.fullmatch(r'python3 (-I) (-c) "([^"]*)"', line)
    assert words and line.isascii()
    # What PowerShell or cmd would read between double quotes, as no PowerShell can be installed from here
    assert not set("$`%!^\\") & set(words[3])
    python = tmp_path / "python3"
    python.write_text(f"#!{sys.executable}\nimport json, sys\nprint(json.dumps(sys.argv[1:]))\nsys.exit(7)\n")
    python.chmod(0o755)
    for shell in SHELLS:
        if not shutil.which(shell):
            print(f"not here: {shell}")
            continue
        env = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "HOME": str(tmp_path)}
        done = run([shell, "-c", line], env, tmp_path)
        assert json.loads(done.out) == list(words.groups()), shell
        assert done.code, f"{shell} hides that it failed"


def test_a_checkout_has_nothing_to_hand_out(fleet: MakeFleet) -> None:
    one = fleet(hosts=1, program=(sys.executable, str(MODULE)))
    status, text = get(one, f"/{NAME}")
    assert status == 404 and b".pyz" in text
    code, _, err = one.cli("upgrade")
    assert code == 2 and ".pyz" in err


def test_hosts_of_the_previous_version_work_and_are_upgraded(fleet: MakeFleet, pyz: Path, tmp_path: Path) -> None:
    one = make(fleet, pyz, tmp_path, {"PROTOCOL_OLDEST, PROTOCOL = 1, 1": "PROTOCOL_OLDEST, PROTOCOL = 1, 2"}, agents=2)
    first, second = one.agents
    old = {one.master.address: NEW, first.address: "0.0.9", second.address: "0.0.9"}
    assert versions(one) == old
    assert "0.0.9" in one.cli("status").out
    assert one.cli("trigger", "all", "master").code == 0
    settings = json.loads(second.config.read_text())
    second.config.write_text(json.dumps(settings | {"updater": {"sha256": "0" * 64}}))
    done = one.cli("upgrade")
    assert done.code == 1, done.out + done.err
    assert f"[{one.master.address}] {NEW} runs here already." in done.out
    assert f"[{first.address}] ✓ 완료 {NEW}" in done.out
    assert f"[{second.address}] hint: commit sha256 = " in done.out and f"[{second.address}] ✗ 실패 check" in done.out
    assert versions(one) == old | {first.address: NEW}
    assert first.process and first.process.poll() is None  # the same process: no supervisor had to do anything
    assert sorted(path.name for path in first.folder.glob(f"*{NAME}*")) == [NAME]
    second.config.write_text(json.dumps(settings))
    assert one.cli("upgrade", second.address, host=first).code == 0
    assert set(versions(one).values()) == {NEW}
    assert one.cli("trigger", "all", "master").code == 0
    again = one.cli("upgrade")
    assert again.code == 0 and again.out.count("runs here already") == 3


def test_what_the_configuration_does_not_name_is_refused(fleet: MakeFleet, pyz: Path) -> None:
    one = fleet(hosts=1, program=(sys.executable, str(pyz)))
    code, _, err = one.cli("upgrade")
    sha256 = hashlib.sha256(pyz.read_bytes()).hexdigest()
    assert code == 2 and f'sha256 = "{sha256}"' in err and "[updater]" in err
    assert not one.runs()
    # what it advises is enough, the moment that the commit is there: the daemon reads it a second later
    settings = json.loads((one.origin.seed / "config/updater.json").read_text())
    one.origin.commit({"config/updater.json": json.dumps({**settings, "updater": {"sha256": sha256}})})
    assert one.cli("trigger", "all", "master").code == 0
    told = one.cli("upgrade")
    assert told.code == 0 and "runs here already" in told.out, told.err


def test_a_guard_keeps_it_from_a_host_with_a_job(fleet: MakeFleet, pyz: Path, tmp_path: Path) -> None:
    file = tmp_path / "new" / NAME
    config = {"updater": {"sha256": variant(pyz, file, NEW)}, "deploy": {"command": COMMAND}}
    one = fleet(hosts=2, config=config, program=(sys.executable, str(file)))
    agent = one.agents[0]
    write_script(GATED, agent)
    run = detach(one, agent.address)
    wait_state(one, run, agent, "running")
    refused = one.cli("upgrade")
    assert refused.code == 5 and run in refused.err
    assert one.cli("upgrade", one.master.address).code == 0  # the other host is free
    assert f" asks for upgrade on {one.master.address}: run" in one.master.stderr
    assert "(upgrade) on" in one.master.stderr
    open_gate(agent)
    wait_state(one, run, agent, "succeeded")
    assert one.cli("upgrade").code == 0


@pytest.mark.parametrize("how", ["crashes", "hangs"])
def test_the_old_program_comes_back(fleet: MakeFleet, pyz: Path, tmp_path: Path, how: str) -> None:
    one = make(fleet, pyz, tmp_path, {"crashes": CRASHES, "hangs": STUCK}[how], IMPATIENT)
    agent = one.agents[0]
    before = (agent.folder / NAME).read_bytes()
    done = one.cli("upgrade", agent.address, "--json", timeout_s=90)
    result = next(event for event in done.events if event["event"] == "result")
    assert done.code == 1 and result["state"] == "failed" and result["error"].endswith("the old one is back"), result
    assert (agent.folder / NAME).read_bytes() == before
    assert versions(one)[agent.address] == "0.0.9"
    assert one.cli("trigger", "all", "master").code == 0
    assert sorted(path.name for path in agent.folder.glob(f"*{NAME}*")) == [NAME]


def test_one_that_fails_its_own_test_changes_nothing(fleet: MakeFleet, pyz: Path, tmp_path: Path) -> None:
    one = make(fleet, pyz, tmp_path, {"    preload()\n    load_config(": "    sys.exit(7)\n    load_config("})
    agent = one.agents[0]
    before = (agent.folder / NAME).read_bytes()
    done = one.cli("upgrade", agent.address)
    assert done.code == 1 and f"[{agent.address}] ✗ 실패 {NAME}.new self-test (exit 7)" in done.out, done.out
    assert (agent.folder / NAME).read_bytes() == before and versions(one)[agent.address] == "0.0.9"
    assert agent.stderr.count("welcomed by the master") == 1  # it was never disturbed
    assert sorted(path.name for path in agent.folder.glob(f"*{NAME}*")) == [NAME]


# Where the old program's runner stops until the test goes on: before these lines.
PHASES = {
    "download": "        data = fetch_program(",
    "swap": "            _replace_executable(self.file, self.fresh",
    "swapped": "        self.runner.save(durable=True, step=RESTART)",
    "restart": "            if self.await_daemon(self.sha256)",
}


def hold(line: str) -> dict[str, str]:
    space = " " * (len(line) - len(line.lstrip()))
    here, go = "(self.state.root / 'here')", "(self.state.root / 'go')"
    return {line: f"{space}{here}.touch()\n{space}while not {go}.exists():\n{space}    time.sleep(0.05)\n{line}"}


@pytest.mark.parametrize("victim", ["runner", "daemon"])
@pytest.mark.parametrize("phase", PHASES)
def test_killed_on_the_way(fleet: MakeFleet, pyz: Path, tmp_path: Path, phase: str, victim: str) -> None:
    one = make(fleet, pyz, tmp_path, old=hold(PHASES[phase]))
    agent = one.agents[0]
    watcher = Watched(one, "upgrade", agent.address)
    wait_for((agent.state / "here").exists, f"{phase} is reached")
    if victim == "runner":
        os.kill(runner_of(agent), signal.SIGKILL)
    else:
        one.kill(agent)
    (agent.state / "go").touch()
    lost = phase == "download" and victim == "runner"
    assert watcher.end(60) == lost, watcher.out + watcher.err
    assert ("✗ 연결 끊김 (the runner died)" if lost else f"✓ 완료 {NEW}") in watcher.out
    one.wait_online()
    if lost:
        assert versions(one)[agent.address] == "0.0.9"
        assert one.cli("upgrade").code == 0
    assert versions(one)[agent.address] == NEW
    assert sorted(path.name for path in agent.folder.glob(f"*{NAME}*")) == [NAME]


def test_the_runner_dies_while_it_puts_the_old_one_back(fleet: MakeFleet, pyz: Path, tmp_path: Path) -> None:
    one = make(fleet, pyz, tmp_path, UNWELCOME, IMPATIENT | hold("            _replace_executable(self.file, self.old"))
    agent = one.agents[0]
    watcher = Watched(one, "upgrade", agent.address)
    wait_for((agent.state / "here").exists, "it was not welcomed")
    os.kill(runner_of(agent), signal.SIGKILL)
    assert watcher.end(60) == 1 and "the old one is back" in watcher.out, watcher.out + watcher.err
    one.wait_online()
    assert versions(one)[agent.address] == "0.0.9"


def test_under_pm2(fleet: MakeFleet, pyz: Path, tmp_path: Path) -> None:
    need("pm2", "node")
    one = make(fleet, pyz, tmp_path, start=False)
    one.start(one.master)
    agent = one.agents[0]
    pm2 = Pm2(one, agent, tmp_path / "pm2", agent.folder / NAME)
    try:
        assert pm2("start", str(pm2.folder / "pm2.config.js")).code == 0
        pm2.wait_welcomed()
        assert one.cli("upgrade").code == 0
        service = pm2.service()
        assert versions(one)[agent.address] == NEW and service["pm2_env"]["status"] == "online"
        assert service["pid"] == json.loads((agent.state / "daemon.json").read_text())["pid"]
        assert pm2("restart", SERVICE).code == 0
        pm2.wait_welcomed(3)

        variant(pyz, pm2.folder / NAME, "0.0.9", IMPATIENT)  # once more, and the new one crashes
        assert pm2("restart", SERVICE).code == 0
        pm2.wait_welcomed(4)
        sha256 = variant(pyz, Path(one.master.program[1]), NEW, CRASHES)
        for host in one.hosts:
            host.config.write_text(host.config.read_text().replace(old_sha(host), sha256))
        one.restart(one.master)
        pm2.wait_welcomed(5)
        done = one.cli("upgrade", agent.address, timeout_s=120)
        assert done.code == 1 and "the old one is back" in done.out, done.out + done.err
        assert versions(one)[agent.address] == "0.0.9" and pm2.service()["pm2_env"]["status"] == "online"
    finally:
        pm2("kill")


def old_sha(host: Host) -> str:
    return str(json.loads(host.config.read_text())["updater"]["sha256"])


def test_versions_that_have_nothing_in_common_say_so(fleet: MakeFleet, pyz: Path, tmp_path: Path) -> None:
    one = make(
        fleet, pyz, tmp_path, {"PROTOCOL_OLDEST, PROTOCOL = 1, 1": "PROTOCOL_OLDEST, PROTOCOL = 2, 3"}, start=False
    )
    agent = one.agents[0]
    one.start(one.master)
    one.spawn(agent)
    said = "the master speaks protocol 2 to 3, and this host 1 to 1: bring the older one to the other's version"
    wait_for(lambda: said in agent.stderr and said in one.master.stderr, lambda: agent.stderr + one.master.stderr)
    refused = one.cli("status", host=agent)
    assert refused.code == 3 and said in refused.err
