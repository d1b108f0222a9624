"""A peer that sends a byte now and then, or without a pause what is no answer, holds no thread beyond its time."""

from __future__ import annotations

import itertools
import json
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from tests import seam as est
from tests.fleet import Fleet, Origin, wait_for

SHORT_S = 0.6
OK = b"HTTP/1.1 200 OK\r\n"
GO_ON = b"HTTP/1.1 100 Continue\r\n\r\n"


class Drip:
    """A server that begins with `head` and goes on, a byte each 50 ms or as fast as it goes, until it is cut off."""

    def __init__(self, listener: socket.socket, head: bytes, more: bytes = b"") -> None:
        self.listener, self.head, self.more = listener, head, more
        self.held = 0  # connections
        self.thread = threading.Thread(target=self.accept)
        self.thread.start()

    def accept(self) -> None:
        serving = []
        with suppress(OSError):
            while True:
                connection, _ = self.listener.accept()
                self.held += 1
                serving.append(threading.Thread(target=self.serve, args=(connection,)))
                serving[-1].start()
        for thread in serving:
            thread.join()

    def serve(self, connection: socket.socket) -> None:
        connection.settimeout(30)
        with connection, suppress(OSError):
            connection.sendall(self.head)
            while self.listener.fileno() >= 0:
                if not self.more:
                    time.sleep(0.05)
                connection.sendall(self.more or b"X")
        self.held -= 1

    @property
    def port(self) -> int:
        return int(self.listener.getsockname()[1])


@contextmanager
def drip(head: bytes, more: bytes = b"", path: Path | None = None) -> Iterator[Drip]:
    """Such a server, on loopback or at a path; in the end all whom it held have gone."""
    if path:
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(str(path))
        listener.listen()
    else:
        listener = socket.create_server(("127.0.0.1", 0))
    made = Drip(listener, head, more)
    try:
        yield made
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        made.thread.join()


def check(**settings: Any) -> est.Check:
    data = {"masterUrl": "ws://127.0.0.1", "whitelist": [], "health": [{"name": "x", "timeout": SHORT_S, **settings}]}
    rule = est.parse_config(json.dumps(data), "updater.json", "json").health[0]
    return est.Check(rule, Path(), {}, 0)


def healthy(**settings: Any) -> Callable[[int], str]:
    """A health check of what listens at a port; `{}` in a setting is its place."""

    def ask(port: int) -> str:
        words = {key: value.format(f"127.0.0.1:{port}") for key, value in settings.items()}
        return str(est.probe_health(check(**words))["detail"])

    return ask


def notified(port: int) -> str:
    rule = est.NotifyRule(url=f"http://127.0.0.1:{port}/", format="json")
    return est.post_news(rule, Path(), {"event": "test", "title": "t", "host": "h"})[0]


def fetched(port: int) -> str:
    with pytest.raises(est.UpdaterError) as problem:
        est.fetch_program(est.parse_master_url(f"ws://127.0.0.1:{port}"), None, {})
    return problem.value.what


def seen_outside(port: int) -> str:
    with pytest.raises(TimeoutError) as problem:
        est.program._fetch_address(f"http://127.0.0.1:{port}", {}, SHORT_S)
    return str(problem.value)


TLS_HEAD = b"\x16\x03\x03\x40\x00\x02\x00\x3f\xfc"  # a record, and in it a greeting that is long in coming
CASES: dict[str, tuple[Callable[[int], str], bytes, bytes]] = {
    "a page": (healthy(http="http://{}/"), OK, b""),
    "a page's greeting": (healthy(http="https://{}/"), TLS_HEAD, b""),
    "a page that is never begun": (healthy(http="http://{}/"), b"", GO_ON * 1000),
    "Valkey": (healthy(valkey="{}"), b"+PON", b""),
    "MariaDB": (healthy(mariadb="{}"), b"\xff\xff\xff\0\x0a", b""),
    "a certificate": (healthy(certificate="{}"), TLS_HEAD, b""),
    "a receiver": (notified, OK, b""),
    "a receiver that never begins": (notified, b"", GO_ON * 1000),
    "a program": (fetched, OK + b"Content-Length: 1000000\r\n\r\n", b""),
    "an address": (seen_outside, OK + b"Content-Length: 1000000\r\n\r\n", b""),
}


def in_time(ask: Callable[[], str]) -> str:
    """What it says, from a thread that nothing waits for but the test."""
    said: list[str] = []
    thread = threading.Thread(target=lambda: said.append(ask()), daemon=True)
    thread.start()
    thread.join(20)
    return next(iter(said), "it holds the thread")


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("POST_S", "DOWNLOAD_S", "HAPROXY_ANSWER_S"):
        monkeypatch.setattr(est.program, name, SHORT_S)


@pytest.mark.parametrize("name", CASES)
def test_a_peer_has_so_many_seconds_and_not_so_many_for_each_byte(name: str) -> None:
    ask, head, more = CASES[name]
    with drip(head, more) as peer:
        assert "no answer within 0.6 s" in in_time(lambda: ask(peer.port))
        wait_for(lambda: not peer.held, "no connection is left")


@pytest.mark.parametrize("more", [b"", b"x" * (1 << 16)], ids=["slow", "without end"])
def test_what_listens_in_place_of_haproxy_has_an_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, more: bytes
) -> None:
    monkeypatch.setattr(est.program, "ANSWER_BYTES", 1 << 20)

    def ask() -> str:
        with pytest.raises(est.UpdaterError) as problem:
            est.program.ask_haproxy(est.HaproxyRule(host="h", backend="b", socket=str(tmp_path / "sock")), "show stat")
        return problem.value.what

    with drip(b"", more, tmp_path / "sock"):
        said = in_time(ask)
    assert ("no answer within 0.6 s" if not more else "more than 1 MiB") in said


def pkt(line: bytes) -> bytes:
    """A line as git's protocol has it."""
    return b"%04x" % (len(line) + 4) + line


def endless_refs() -> tuple[bytes, bytes]:
    """What a git server says first, and what it then says again and again."""
    head = b"".join(map(pkt, (b"version 2\n", b"ls-refs\n", b"fetch\n", b"object-format=sha1\n"))) + b"0000"
    some = b"".join(pkt(b"%040x refs/heads/%05d%s\n" % (n + 1, n, b"x" * 900)) for n in range(500))
    return head, some


# What git starts at the other end: it notes how much memory the fetch that waits for it may have.
UPLOAD = """#!/bin/sh
p=$PPID
until tr '\\0' ' ' < /proc/$p/cmdline | grep -q ' fetch ' || [ "$p" -le 1 ]; do
  p=$(awk '{print $4}' /proc/$p/stat)
done
n=0
while grep -q '^Max data size *unlimited' /proc/$p/limits && [ $n -lt 100 ]; do sleep 0.1; n=$((n + 1)); done
grep '^Max data size' /proc/$p/limits > "$0.seen"
exec git-upload-pack "$@"
"""


@pytest.mark.skipif(sys.platform != "linux", reason="no other system limits a process's memory from outside")
def test_a_job_fetches_no_refs_without_end(fleet: Callable[..., Fleet], tmp_path: Path) -> None:
    """It took memory until its deadline, half an hour: a fetch has a limit, at which git gives up and is explained."""
    with drip(*endless_refs()) as remote:
        words = ["git", "ls-remote", f"git://127.0.0.1:{remote.port}/x"]
        with subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as child:
            est.limit_memory(child.pid, 64 << 20)
            _, said = child.communicate(timeout=60)
    assert child.returncode and "list refs without end?" in str(est.explain_failure(said)), said
    assert est.fetch_room() >= est.FETCH_BYTES
    one = fleet(hosts=1)
    upload = tmp_path / "upload"
    upload.write_text(UPLOAD)
    upload.chmod(0o755)
    one.origin.git("config", "remote.origin.uploadpack", str(upload), cwd=one.master.repo)
    one.cli("trigger", "all", "master")
    assert str(est.fetch_room()) in (tmp_path / "upload.seen").read_text().split()


def test_a_remote_whose_refs_have_no_end(origin: Origin, monkeypatch: pytest.MonkeyPatch) -> None:
    """git says the list only once it has all of it: before, nothing of it would be read."""
    if sys.platform != "linux":
        pytest.skip("no other system limits a process's memory from outside")
    monkeypatch.setattr(est.program, "REFS_BYTES", 64 << 20)
    with drip(*endless_refs()) as remote:
        url = f"git://127.0.0.1:{remote.port}/x"
        with pytest.raises(est.UpdaterError, match="the remote's list of refs takes more than 64 MiB"):
            est.ask_git(origin.seed, origin.env, "ls-remote", url, "refs/heads/master", timeout_s=60)
    assert est.ask_git(origin.seed, origin.env, "ls-remote", str(origin.bare))[0] == 0


def test_receivers_that_never_end_hold_up_no_question_and_no_stop(fleet: Callable[..., Fleet]) -> None:
    """More tests of them than there are threads for what the master looks up."""
    with drip(OK) as peer:
        hooks = [{"url": f"http://127.0.0.1:{peer.port}/", "format": "json"}]
        one = fleet(hosts=1, config={"notify": hooks * 16})
        asked = threading.Thread(target=lambda: one.cli("notify", "test"))
        asked.start()
        wait_for(lambda: peer.held, "it is asked")
        for _ in itertools.repeat(None, 2):
            assert one.cli("history").code == 0
        assert one.stop(one.master) == 0
        asked.join()
