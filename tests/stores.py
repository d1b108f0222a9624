"""Real servers for the tests: Valkey (or Redis), MariaDB, certificates, and workers that answer with their colour."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from tests.fleet import free_port, is_listening, need, run, unavailable, wait_for
from tests.haproxy import WORKER


@contextmanager
def server(argv: Sequence[str | Path], port: int) -> Iterator[int]:
    """A server process while it is needed, once it listens; its process id."""
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen(
            [str(word) for word in argv], stdin=subprocess.DEVNULL, stdout=said, stderr=said, start_new_session=True
        )
        try:

            def ready() -> bool:
                said.seek(0)
                assert process.poll() is None, f"{argv[0]} ended: {said.read().decode(errors='replace')}"
                return is_listening(process.pid, port)

            wait_for(ready, f"{argv[0]} listens on {port}")
            yield process.pid
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


@contextmanager
def valkey(*options: str, prefix: Sequence[str] = (), port: int = 0) -> Iterator[str]:
    """Valkey, or Redis where that is what Debian has, on loopback; its address."""
    program = shutil.which("valkey-server") or shutil.which("redis-server")
    if not program:
        unavailable("neither valkey-server nor redis-server is installed")
    port = port or free_port()
    with tempfile.TemporaryDirectory() as folder:
        argv = [*prefix, program, "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--dir", folder, *options]
        with server(argv, port):
            yield f"127.0.0.1:{port}"


@contextmanager
def mariadb(folder: Path, *options: str, prefix: Sequence[str] = (), port: int = 0) -> Iterator[str]:
    """MariaDB with an empty database in a folder that is made for it; its address. `app` may log in from anywhere."""
    need("mariadbd", "mariadb-install-db")
    folder.mkdir(parents=True)
    as_user = ["--user=mysql"] if os.geteuid() == 0 else []
    data, temporary = folder / "data", folder / "tmp"  # names in /tmp hold a pid, which another namespace has too
    for place in (folder, data, temporary):
        place.mkdir(exist_ok=True)
        if as_user:
            shutil.chown(place, "mysql")
    (folder / "init").write_text("CREATE USER app@'%' IDENTIFIED BY 'secret';\n")
    made = ["--no-defaults", *as_user, f"--datadir={data}", "--skip-test-db"]
    env = {**os.environ, "TMPDIR": str(temporary)}
    code, out, err = run(["mariadb-install-db", *made, "--auth-root-authentication-method=normal"], env)
    assert code == 0, out + err
    port = port or free_port()
    listen = [f"--socket={folder}/socket", "--bind-address=0.0.0.0", f"--port={port}", f"--init-file={folder}/init"]
    listen.append(f"--tmpdir={temporary}")
    with server([*prefix, "mariadbd", "--no-defaults", *as_user, f"--datadir={data}", *listen, *options], port):
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
def worker(color: str, address: str, prefix: Sequence[str] = ()) -> Iterator[int]:
    """A worker that answers every request with its colour, `/slow` after 2 s; its process id."""
    host, _, port = address.rpartition(":")
    with server([*prefix, sys.executable, "-c", WORKER.replace("127.0.0.1", host), color, port], int(port)) as pid:
        yield pid
