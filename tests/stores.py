"""Real servers for the tests: Valkey (or Redis), MariaDB, certificates, and workers that answer with their colour."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from tests.fleet import free_port, need, run, unavailable, wait_for

WORKER = """
import http.server, sys, time

class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        if self.path.startswith("/slow"):
            time.sleep(2)
        body = open(sys.argv[3], "rb").read() if self.path == "/version" else sys.argv[2].encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_POST(self):
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.do_GET()

    def log_message(self, *words):
        pass

host, _, port = sys.argv[1].rpartition(":")
http.server.ThreadingHTTPServer((host, int(port)), Handler).serve_forever()
"""


def answers(address: str) -> Callable[[], bool]:
    """A condition: somebody accepts connections at HOST:PORT."""

    def look() -> bool:
        host, _, port = address.rpartition(":")
        with suppress(OSError), socket.create_connection((host, int(port)), 1):
            return True
        return False

    return look


@contextmanager
def server(argv: Sequence[str | Path], address: str, by: signal.Signals = signal.SIGTERM) -> Iterator[int]:
    """A server process while it is needed, once it accepts connections; its process id."""
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen(
            [str(word) for word in argv], stdin=subprocess.DEVNULL, stdout=said, stderr=said, start_new_session=True
        )
        try:

            def ready() -> bool:
                said.seek(0)
                assert process.poll() is None, f"{argv[0]} ended: {said.read().decode(errors='replace')}"
                return answers(address)()

            wait_for(ready, f"{argv[0]} answers at {address}")
            yield process.pid
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, by)
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


@contextmanager
def valkey(*options: str, host: str = "127.0.0.1") -> Iterator[str]:
    """Valkey, or Redis where that is what Debian has; its address."""
    program = shutil.which("valkey-server") or shutil.which("redis-server")
    if not program:
        unavailable("neither valkey-server nor redis-server is installed")
    port = free_port(host)
    with tempfile.TemporaryDirectory() as folder:
        argv = [program, "--port", str(port), "--bind", host, "--save", "", "--dir", folder, *options]
        with server(argv, f"{host}:{port}"):
            yield f"{host}:{port}"


@contextmanager
def mariadb(folder: Path, *options: str, host: str = "127.0.0.1") -> Iterator[str]:
    """MariaDB with an empty database in a folder that is made for it; its address. `app` may log in from anywhere."""
    need("mariadbd", "mariadb-install-db")
    folder.mkdir(parents=True)
    as_user = ["--user=mysql"] if os.geteuid() == 0 else []
    data = folder / "data"
    data.mkdir()
    if as_user:
        shutil.chown(folder, "mysql")
        shutil.chown(data, "mysql")
    (folder / "init").write_text("CREATE USER app@'%' IDENTIFIED BY 'secret';\n")
    made = ["--no-defaults", *as_user, f"--datadir={data}", "--skip-test-db"]
    code, out, err = run(["mariadb-install-db", *made, "--auth-root-authentication-method=normal"], os.environ)
    assert code == 0, out + err
    port = free_port(host)
    listen = [f"--socket={folder}/socket", f"--bind-address={host}", f"--port={port}", f"--init-file={folder}/init"]
    with server(["mariadbd", "--no-defaults", *as_user, f"--datadir={data}", *listen, *options], f"127.0.0.1:{port}"):
        yield f"127.0.0.1:{port}"


def certificate(file: Path, days: int = 60, name: str = "localhost") -> Path:
    """A self-signed certificate with its key in one file, as HAProxy wants it."""
    need("openssl")
    key = file.with_suffix(".key")
    subject = ["-subj", f"/CN={name}", "-addext", f"subjectAltName=DNS:{name},IP:127.0.0.1"]
    argv = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    code, _, err = run([*argv, "-keyout", key, "-out", file, "-days", str(days), *subject], os.environ)
    assert code == 0, err
    file.write_bytes(file.read_bytes() + key.read_bytes())
    file.chmod(0o600)
    return file


@contextmanager
def worker(color: str, address: str, version: Path | None = None) -> Iterator[int]:
    """A worker that answers every request with its colour, `/version` with a file's content, `/slow` after 2 s."""
    with server([sys.executable, "-c", WORKER, address, color, str(version or os.devnull)], address) as pid:
        yield pid
