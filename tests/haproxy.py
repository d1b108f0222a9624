"""A real HAProxy before two workers that answer with their colour, and clients that count every failure."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from tests.fleet import free_port, is_listening, need, wait_for

WORKER = r"""
import asyncio, sys
color, port = sys.argv[1].encode(), int(sys.argv[2])
async def serve(reader, writer):
    try:
        while head := await reader.readuntil(b"\r\n\r\n"):
            path = head.split(b" ", 2)[1]
            if path.startswith(b"/slow"):
                await asyncio.sleep(9 if path == b"/slower" else 2)
            status = b"503 No" if path == b"/health" and sys.argv[3:] else b"200 OK"
            writer.write(b"HTTP/1.1 %s\r\nContent-Length: %d\r\n\r\n%s" % (status, len(color), color))
            await writer.drain()
    except (asyncio.IncompleteReadError, ConnectionError):
        pass
    finally:
        writer.close()
async def main():
    async with await asyncio.start_server(serve, "127.0.0.1", port, backlog=1000) as server:
        await server.serve_forever()
asyncio.run(main())
"""
CONFIG = """\
# 데이터 노드
global
    stats socket {folder}/admin.sock mode 600 level admin expose-fd listeners
    server-state-file {folder}/states
    hard-stop-after 30s
defaults
    mode http
    timeout connect 2s
    timeout client 10s
    timeout server 10s
    timeout http-keep-alive 3s
    timeout check 5s
    option redispatch
    option idle-close-on-response
    load-server-state-from-file global
frontend outside
    bind 127.0.0.1:{port}{tls}
    default_backend yquant_backend
backend yquant_backend
    option http-server-close
    option httpchk GET /health
    default-server inter 500 fall 2 rise 1
    # Active: blue
    server blue 127.0.0.1:{blue} check cookie blue
    server green 127.0.0.1:{green} check backup cookie green
"""


CLIENT = r"""
import asyncio, json, signal, ssl, sys, time
port, tls, keep, new, slow, think = (json.loads(word) for word in sys.argv[1:])
context = None
if tls:
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
answers, spans, failed, over = [], [], {}, False
async def ask(link, path, close):
    reader, writer = link
    writer.write(b"GET %s HTTP/1.1\r\nHost: x\r\n%s\r\n" % (path, b"Connection: close\r\n" if close else b""))
    head = (await reader.readuntil(b"\r\n\r\n")).lower()
    body = await reader.readexactly(int(head.partition(b"content-length: ")[2].partition(b"\r")[0] or 0))
    return head, body
async def client(path, close):
    link, reused = None, False
    while not over:
        began, why = time.time(), "connect"
        try:
            if link is None:
                link, reused = await asyncio.open_connection("127.0.0.1", port, ssl=context), False
            why = ("reused " if reused else "fresh ") + path.decode()
            async with asyncio.timeout(15):
                head, body = await ask(link, path, close)
            if b" 200 " not in head.partition(b"\r\n")[0]:
                raise ValueError(head[9:12].decode())
            answers.append((began, body.decode()))
            spans.append((began, time.time(), body.decode()))
            reused = True
            if close or b"connection: close" in head:
                link[1].close()
                link = None
        except (OSError, EOFError, ValueError, TimeoutError) as problem:
            key = f"{why}: {type(problem).__name__} {problem if isinstance(problem, ValueError) else ''}"
            failed[key] = failed.get(key, 0) + 1
            if link:
                link[1].close()
            link = None
        await asyncio.sleep(think)
async def main():
    def stop():
        global over
        over = True
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop)
    kinds = [(b"/", False)] * keep + [(b"/", True)] * new + [(b"/slow", False)] * slow
    await asyncio.gather(*(client(*kind) for kind in kinds))
asyncio.run(main())
print(json.dumps({"answers": answers, "spans": spans, "failed": failed}))
"""


class Load:
    """Clients that ask all the time: on kept connections, on new ones, and for answers that take 2 s."""

    def __init__(
        self, port: int, *, tls: bool = False, keep: int = 4, new: int = 2, slow: int = 1, think_s: float = 0.02
    ) -> None:
        words = (json.dumps(word) for word in (port, tls, keep, new, slow, think_s))
        self.process = subprocess.Popen(
            [sys.executable, "-c", CLIENT, *words], stdout=subprocess.PIPE, start_new_session=True, text=True
        )

    def __enter__(self) -> Load:
        return self

    def __exit__(self, *_: object) -> None:
        with self.process:
            self.process.kill()

    def end(self) -> tuple[list[tuple[float, str]], dict[str, int]]:
        """(when each request began and which colour answered it, failures by kind); `spans` then has also when it
        was answered: a client may stand still in between."""
        self.process.send_signal(signal.SIGTERM)
        out, _ = self.process.communicate(timeout=60)
        found = json.loads(out)
        self.spans: list[tuple[float, float, str]] = found["spans"]
        return found["answers"], found["failed"]


def ask(path: Path, words: str) -> str:
    """An answer of HAProxy's, empty where it is silent."""
    with suppress(OSError), socket.socket(socket.AF_UNIX) as link:
        link.settimeout(5)
        link.connect(str(path))
        link.sendall(words.encode() + b"\n")
        link.shutdown(socket.SHUT_WR)  # else HAProxy's master waits for more
        return b"".join(iter(lambda: link.recv(65536), b"")).decode()
    return ""


class Proxy:
    """HAProxy as master and worker, reloaded by SIGUSR2, with blue and green behind it."""

    def __init__(self, folder: Path, config: str = CONFIG, tls: bool = False) -> None:
        need("haproxy")
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self.port = free_port()
        self.ports = {"blue": free_port(), "green": free_port()}
        self.file, self.socket, self.master_socket = (
            folder / "haproxy.cfg",
            folder / "admin.sock",
            folder / "master.sock",
        )
        self.pid_file, self.log = folder / "pid", folder / "haproxy.log"
        self.workers: dict[str, subprocess.Popen[bytes]] = {}
        self.process: subprocess.Popen[bytes] | None = None
        bind = ""
        if tls:
            need("openssl")
            key, cert, both = folder / "key", folder / "cert", folder / "both.pem"
            subprocess.run(
                ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost",
                 "-keyout", key, "-out", cert], check=True, capture_output=True,
            )  # fmt: skip
            both.write_bytes(cert.read_bytes() + key.read_bytes())
            bind = f" ssl crt {both}"
        self.file.write_text(config.format(folder=folder, port=self.port, tls=bind, **self.ports))
        (folder / "reload.sh").write_text(f"kill -USR2 $(cat {self.pid_file})\n")

    @property
    def rule(self) -> dict[str, Any]:
        """[haproxy] for this one."""
        return {
            "host": "127.0.0.1", "config": str(self.file), "backend": "yquant_backend", "socket": str(self.socket),
            "masterSocket": str(self.master_socket), "reload": ["sh", str(self.folder / "reload.sh")],
        }  # fmt: skip

    def start(self, *files: str | Path) -> Proxy:
        """Start workers and HAProxy, and wait until both colours are up."""
        for color in self.ports:
            self.start_worker(color)
        arguments = [str(word) for file in files or (self.file,) for word in ("-f", file)]
        with open(self.log, "ab") as log:
            self.process = subprocess.Popen(
                ["haproxy", "-W", "-S", self.master_socket, "-p", self.pid_file, *arguments],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True, cwd=self.folder,
            )  # fmt: skip
        wait_for(lambda: self.statuses() == {"blue": "UP", "green": "UP"}, lambda: f"HAProxy is up\n{self.said}")
        return self

    @property
    def said(self) -> str:
        return self.log.read_text("utf-8", "replace")

    def start_worker(self, color: str, *sick: str) -> None:
        process = subprocess.Popen(
            [sys.executable, "-c", WORKER, color, str(self.ports[color]), *sick], start_new_session=True
        )
        self.workers[color] = process
        wait_for(lambda: is_listening(process.pid, self.ports[color]), f"{color} listens")

    def stop_worker(self, color: str) -> None:
        self.workers[color].kill()
        self.workers[color].wait()

    def command(self, words: str, path: Path | None = None) -> str:
        return ask(path or self.socket, words)

    def rows(self) -> dict[str, list[str]]:
        lines = (line.split(",") for line in self.command("show stat").splitlines())
        return {row[1]: row for row in lines if row[0] == "yquant_backend" and row[1] != "BACKEND"}

    def statuses(self) -> dict[str, str]:
        return {name: row[17] for name, row in self.rows().items()}

    def live(self) -> str:
        """The colour that HAProxy runs as no backup; both or none are joined."""
        return "+".join(name for name, row in self.rows().items() if row[20] == "0")

    def answers(self) -> str:
        """Which colour answers a request now, or what is answered instead."""
        with suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 5) as link:
            link.sendall(b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
            answer = b"".join(iter(lambda: link.recv(65536), b"")).decode()
            return answer.rpartition("\r\n\r\n")[2] if " 200 " in answer else answer[:12]
        return ""

    def roles(self) -> str:
        """What the file says: the one `server` line without `backup`; both or none are joined."""
        lines = (line.split() for line in self.file.read_text().splitlines())
        return "+".join(line[1] for line in lines if line[:1] == ["server"] and "backup" not in line)

    def reload(self) -> None:
        """As a person would; until a new process has the file."""
        pid, sent = self.worker(), float("-inf")

        def replaced() -> bool:
            nonlocal sent
            number = self.pid_file.read_text()  # empty while it is being written
            # A second signal while the first one is worked at makes one more process, which knows nothing of what
            # somebody told the one before it.
            if number and time.monotonic() > sent + 5:
                os.kill(int(number), signal.SIGUSR2)
                sent = time.monotonic()
                time.sleep(0.3)  # the next signal within 0.1 s, whoever sends it, is lost
            return self.worker() not in (pid, "")

        wait_for(replaced, lambda: f"HAProxy reloads\n{self.said}")

    def worker(self) -> str:
        """The number of the process that answers; empty while none does."""
        return self.command("show info").partition("Pid: ")[2].split("\n")[0]

    def close(self) -> None:
        """End everything."""
        for process in (self.process, *self.workers.values()):
            if process and process.poll() is None:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
