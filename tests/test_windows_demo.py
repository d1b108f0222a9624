"""The whole program on a Windows Python: daemons, runners and commands, by way of the demo."""

from __future__ import annotations

import base64
import json
import os
import re
import socketserver
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fleet import ROOT, clean_env, need
from tests.machines import Windows

# There is no Windows git to install, and a program started from Wine gives no exit code: this one asks the test for it.
GIT = """
import base64, json, os, socket, sys

with socket.create_connection(("127.0.0.1", {port})) as server:
    words = [word.replace("=(refname)", "=%(refname)") for word in sys.argv[1:]]  # the % got lost in git.cmd
    server.sendall(json.dumps([os.getcwd(), words, dict(os.environ)]).encode() + b"\\n")
    code, out, err = json.loads(b"".join(iter(lambda: server.recv(65536), b"")))
sys.stdout.buffer.write(base64.b64decode(out))
sys.stderr.buffer.write(base64.b64decode(err))
sys.exit(code)
"""


@pytest.fixture
def git_for_windows(windows_python: Windows, tmp_path: Path) -> Iterator[dict[str, str]]:
    """The environment in which Windows programs find a git: the machine's own, in the folder where they stand."""
    need("git")
    base = clean_env(tmp_path / "home")

    class Git(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            folder, words, env = json.loads(self.rfile.readline())
            drive, place = folder[0], folder[2:].replace("\\", "/")
            cwd = place if drive == "Z" else f"{windows_python.prefix}/drive_c{place}"
            named = {key: value for key, value in env.items() if re.match("GIT_(AUTHOR|COMMITTER)_", key)}
            done = subprocess.run(["git", *words], cwd=cwd, env=base | named, capture_output=True, check=False)
            answer = [done.returncode, *(base64.b64encode(said).decode() for said in (done.stdout, done.stderr))]
            self.wfile.write(json.dumps(answer).encode())

    class Server(socketserver.ThreadingTCPServer):
        daemon_threads = True

    folder = tmp_path / "bin"
    folder.mkdir()
    with Server(("127.0.0.1", 0), Git) as server:
        threading.Thread(target=server.serve_forever).start()
        (folder / "git.py").write_text(GIT.replace("{port}", str(server.server_address[1])))
        shim = f'@"{Windows.path(windows_python.python)}" "{Windows.path(folder / "git.py")}" %*\r\n'
        (folder / "git.cmd").write_text(shim)
        yield {"WINEPATH": Windows.path(folder)}
        server.shutdown()


@pytest.mark.timeout(300)
def test_the_demo_tells_its_story(windows_python: Windows, git_for_windows: dict[str, str], pyz: Path):
    code, out, err = windows_python.run(pyz, "demo", env=git_for_windows, timeout_s=250)
    assert code == 0, out + err
    out = out.replace("\r\n", "\n")
    for host in ("127.0.0.1", "127.0.0.2", "127.0.0.3"):
        assert f"[{host}] ✓ 완료 v0301_2\n" in out
        # Git through two shells of Wine may take longer than a status waits for the rest of a row
        assert re.search(rf"(?m)^{host}  .*  yes  .*  (✓ v0301_3$|✗ 실패 )", out), out
    assert re.findall(r"\[(.*)\] ✗ 실패 .* \(exit 1\)\n", out) == ["127.0.0.3"], out
    folder = re.findall(r"^A fleet .*\\(estelle-demo-\w+)", out)
    assert [
        name for name in os.listdir(next(windows_python.prefix.glob("drive_c/users/*/Temp"))) if name in folder
    ] == []


POKE = """
import asyncio, json, pathlib, sys
import estelle_updater as updater

async def main():
    poked = asyncio.Event()
    loop = asyncio.get_running_loop()
    address = ("127.0.0.1", 0)
    transport, _ = await loop.create_datagram_endpoint(lambda: updater.PokeReceiver(poked), local_addr=address)
    file = pathlib.Path(sys.argv[1])
    file.write_text(json.dumps({"poke": transport.get_extra_info("sockname")[1]}))
    await asyncio.to_thread(updater.Poke(file))
    await asyncio.wait_for(poked.wait(), 10)
    print("poked")

asyncio.run(main())
"""


def test_the_runner_s_poke_arrives(windows_python: Windows, tmp_path: Path):
    (tmp_path / "script.py").write_text(POKE)
    env = {"PYTHONPATH": Windows.path(ROOT)}
    code, out, err = windows_python.run(tmp_path / "script.py", tmp_path / "daemon.json", env=env)
    assert (code, out.strip(), err) == (0, "poked", "")
