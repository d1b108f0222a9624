"""Nothing in a deployment can wait for an answer that nobody gives: it fails at once and says what asked."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tests.commands import COMMAND, Watched, job_of, lines_of, write_script
from tests.fleet import Fleet, Result, free_port, is_listening, need, processes_of, run, wait_for

A = "127.0.0.1"
TERMINAL = "import os, pty, sys; sys.exit(os.waitstatus_to_exitcode(pty.spawn(sys.argv[1:])))"
PATIENCE_S = 30  # a prompt would wait for ever
pytestmark = pytest.mark.xdist_group("prompts")


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    need("git")
    config = {"deploy": {"command": list(COMMAND)}, "hosts": {A: {"env": {"GIT_HTTP_LOW_SPEED_TIME": "1"}}}}
    fleet = Fleet(tmp_path_factory.mktemp("prompts"), hosts=1, config=config)
    fleet.start()
    yield fleet
    fleet.stop_all()


@pytest.fixture(autouse=True)
def remote_as_it_was(one: Fleet) -> Iterator[None]:
    config = one.master.repo / ".git" / "config"
    before = config.read_bytes()
    yield
    config.write_bytes(before)


def set_git(one: Fleet, **settings: str) -> None:
    for key, value in settings.items():
        one.origin.git("config", key.replace("_", "."), value, cwd=one.master.repo)


def fails(one: Fleet, why: str, step: str = "git fetch origin") -> Result:
    """A deployment, which ends by itself with the failed step and says why."""
    done = one.cli("trigger", "all", "master", timeout_s=PATIENCE_S)
    assert done.code == 1
    assert lines_of(done.out, A)[-1].startswith(f"✗ 실패 {step} (exit ")
    assert why in done.out + done.err
    assert "rollback" not in done.err, "no command of a new commit began: there is nothing to undo"
    return done


class AsksForPassword(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(401)
        self.send_header("WWW-Authenticate", 'Basic realm="git"')
        self.end_headers()

    def log_message(self, *_: object) -> None: ...


@pytest.fixture
def https(tmp_path: Path) -> Iterator[str]:
    """A git server that wants a password."""
    need("openssl")
    key, cert = tmp_path / "key.pem", tmp_path / "cert.pem"
    words = ("req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=127.0.0.1", "-keyout", key, "-out", cert)
    assert run(["openssl", *words], os.environ).code == 0
    server = ThreadingHTTPServer((A, 0), AsksForPassword)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(cert, key)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"https://{A}:{server.server_port}/app.git"
    server.shutdown()
    server.server_close()


def test_git_over_https_without_and_with_a_terminal(one: Fleet, https: str):
    set_git(one, remote_origin_url=https, http_sslVerify="false", core_askPass="cat")
    fails(one, "127.0.0.1: git asked for a password")
    argv, env, cwd = one._command(("deploy", "master"), None, None, None)
    done = run([sys.executable, "-c", TERMINAL, *argv], env, cwd, PATIENCE_S)
    assert done.code == 1
    assert "git asked for a password" in done.out
    assert "Username" not in done.out.replace("could not read Username", "")


def test_git_from_a_server_that_is_silent(one: Fleet):
    with socket.create_server((A, 0)) as silent:
        set_git(one, remote_origin_url=f"http://{A}:{silent.getsockname()[1]}/app.git")
        fails(one, "127.0.0.1: the git remote does not answer")


@pytest.fixture
def sshd(tmp_path: Path) -> Iterator[tuple[int, Path]]:
    """An ssh server that takes passwords only; its port and host key."""
    need("sshd", "ssh", "ssh-keygen")
    key, port = tmp_path / "host_key", free_port()
    assert run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", key], os.environ).code == 0
    Path("/run/sshd").mkdir(exist_ok=True)
    options = ("PasswordAuthentication=yes", "PubkeyAuthentication=no", "UsePAM=no", "PidFile=none", "StrictModes=no")
    words = [word for option in (*options, f"HostKey={key}", f"ListenAddress={A}:{port}") for word in ("-o", option)]
    sshd = run(["sh", "-c", "command -v sshd"], os.environ).out.strip()
    with subprocess.Popen([sshd, "-D", "-f", "/dev/null", *words], stderr=subprocess.DEVNULL) as server:
        wait_for(lambda: is_listening(server.pid, port), "sshd listens")
        yield port, key
        server.terminate()


@pytest.mark.parametrize("known", [False, True])
def test_git_over_ssh(one: Fleet, sshd: tuple[int, Path], tmp_path: Path, known: bool):
    port, key = sshd
    hosts = tmp_path / "known_hosts"
    if known:
        hosts.write_text(f"[{A}]:{port} {key.with_suffix('.pub').read_text()}")
    ssh = f"ssh -F /dev/null -o UserKnownHostsFile='{hosts}' -o GlobalKnownHostsFile=/dev/null"
    set_git(one, remote_origin_url=f"ssh://nobody@{A}:{port}/app.git", core_sshCommand=ssh)
    fails(one, "may not ask for a password" if known else "ssh does not know the remote's host key")


@pytest.mark.parametrize("then", ["cancelled", "lost"])
def test_git_that_hangs_in_a_question(one: Fleet, tmp_path: Path, then: str):
    """Between two steps git is asked for local changes, and a file's filter does not answer."""
    hook, begun, file = tmp_path / "hook", tmp_path / "begun", one.master.repo / "config" / "version.json"
    asks = "grep -q status /proc/$PPID/cmdline || exit 1"
    hook.write_text(f"#!/bin/sh\n{asks}\ntrap '' TERM\ntouch {begun}\nsleep 86407\n")
    hook.chmod(0o755)
    set_git(one, filter_slow_clean=str(hook))
    attributes = one.master.repo / ".git" / "info" / "attributes"
    attributes.parent.mkdir(exist_ok=True)
    attributes.write_text("config/version.json filter=slow\n")
    os.utime(file, (1, 1))  # as large as before: only its content tells
    watched = Watched(one, "trigger", A, "master")
    watched.until(begun.exists)
    if then == "lost":
        (runner,) = [pid for pid, command in processes_of(one.master.folder).items() if " run-job " in command]
        os.kill(runner, signal.SIGKILL)
    else:
        assert one.cli("cancel", watched.run).code == 0
    assert watched.end() == 1
    job = job_of(one, watched.run, A)
    assert (job["state"], job["step"]) == (then, "git fetch origin")
    assert job["commit"] == (None if then == "lost" else one.origin.first)
    assert not [command for command in processes_of(one.master.repo).values() if "86407" in command]


def test_pnpm(one: Fleet):
    need("pnpm")
    write_script("pnpm login\n", one.master)
    fails(one, "requires an interactive terminal", " ".join(COMMAND))


def test_corepack(one: Fleet):
    """It wants to ask whether to download; the registry is a port where nobody listens."""
    if not shutil.which("corepack"):
        pytest.skip("this node comes without corepack")
    registry = "COREPACK_NPM_REGISTRY=http://127.0.0.1:9"
    write_script(f'export {registry} COREPACK_HOME="$PWD/../corepack"\ncorepack yarn@4.1.0 install\n', one.master)
    done = fails(one, "http://127.0.0.1:9", " ".join(COMMAND))
    assert "Do you want to continue" not in done.out
