"""TLS greetings that are begun and not ended: bounded, however many come, and they keep no allowed host out."""

from __future__ import annotations

import itertools
import os
import resource
import selectors
import socket
import ssl
import time
from asyncio import Future, new_event_loop
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import pytest

from tests import floods, seam as est
from tests.fleet import Fleet, wait_for
from tests.test_tls import Authority, secure

ALLOWED = "127.0.0.8"
ROOM_MB = 64  # what they may take together
EACH = 1500 if os.environ.get("ESTELLE_TEST_LONG") else 300


@contextmanager
def silent(port: int, sources: Iterator[str], count: int, said: bytes = b"") -> Iterator[list[socket.socket]]:
    """So many connections, each from the next address, that say a few bytes at most and then nothing."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    with ExitStack() as stack:
        opened = []
        for source in itertools.islice(sources, count):
            with suppress(OSError):
                one = stack.enter_context(socket.create_connection((floods.MASTER, port), 5, (source, 0)))
                opened.append(one)
                one.sendall(said)
        yield opened
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def still_open(sockets: list[socket.socket]) -> list[socket.socket]:
    """Those that the other side has not ended."""
    with selectors.DefaultSelector() as looked:
        for one in sockets:
            looked.register(one, selectors.EVENT_READ)
        while events := looked.select(0):
            for key, _ in events:
                assert isinstance(key.fileobj, socket.socket)
                ended = True
                with suppress(OSError):
                    ended = not key.fileobj.recv(1 << 16)
                if ended:
                    looked.unregister(key.fileobj)
        return [key.fileobj for key in looked.get_map().values() if isinstance(key.fileobj, socket.socket)]


def wrapped(port: int, source: str, context: ssl.SSLContext, said: bytes) -> ssl.SSLSocket:
    """A connection whose TLS is agreed on, and that says no more than these bytes of HTTP."""
    plain = socket.create_connection((floods.MASTER, port), 20, (source, 0))
    made = context.wrap_socket(plain, server_hostname=floods.MASTER)
    made.sendall(said)
    return made


@pytest.fixture
def one(fleet: Callable[..., Fleet], tmp_path: Path) -> Fleet:
    made = secure(fleet, Authority(tmp_path / "ca"), whitelist=["127.0.0.0/29", ALLOWED, "127.0.2.0/24"])
    made.start()
    return made


def clienthello() -> bytes:
    """What a real client begins with."""
    context, coming, going = ssl.create_default_context(), ssl.MemoryBIO(), ssl.MemoryBIO()
    with suppress(ssl.SSLWantReadError):
        context.wrap_bio(coming, going, server_hostname="a.example").do_handshake()
    return going.read()


def test_greetings_that_nobody_ends(one: Fleet, tmp_path: Path) -> None:
    assert one.master.process
    pid, context = one.master.process.pid, ssl.create_default_context(cafile=tmp_path / "ca" / "fleet-ca.pem")
    assert one.cli("status", host=one.agents[0]).code == 0
    before = floods.rss_mb(pid)
    print(f"before: {before:.0f} MB")

    def check(held: list[socket.socket], what: str) -> None:
        assert one.cli("status", host=one.agents[0]).code == 0, f"{what}: others come in meanwhile"
        print(f"{what}: {floods.rss_mb(pid):.0f} MB with {len(still_open(held))} of {len(held)} open")
        assert floods.rss_mb(pid) < before + ROOM_MB, what
        wait_for(lambda: not still_open(held), f"{what}: all are ended", 25)
        assert floods.rss_mb(pid) < before + ROOM_MB, what

    hello = clienthello()
    several = itertools.cycle(f"127.0.2.{number}" for number in range(1, 40))
    with ExitStack() as stack:
        held = []
        for sources, said in (
            (iter(floods.stranger, ""), b""),
            (itertools.repeat(ALLOWED), b""),
            (several, b""),
            (several, hello[: len(hello) // 2]),
            (several, hello),
        ):
            held += stack.enter_context(silent(one.port, sources, EACH, said))
        check(held, "greetings")
    with ExitStack() as stack:
        held = []
        for source in itertools.islice(several, est.GREETINGS + 50):
            with suppress(OSError):
                held.append(stack.enter_context(wrapped(one.port, source, context, floods.UPGRADE)))
        check(held, "half an upgrade")
    log = one.master.stderr
    assert "refused strangers: more than 32 handshakes at once" in log
    assert f"refused {ALLOWED}: more than 128 handshakes at once" in log
    assert "Traceback" not in log and "offline" not in log


def test_a_connection_over_tls_holds_little(one: Fleet, tmp_path: Path) -> None:
    """asyncio's own buffer is 256 KiB for each, as long as it lasts."""
    assert one.master.process
    context = ssl.create_default_context(cafile=tmp_path / "ca" / "fleet-ca.pem")
    words = (
        "Upgrade: websocket",
        "Connection: Upgrade",
        "Sec-WebSocket-Version: 13",
        f"Sec-WebSocket-Key: {'A' * 22}==",
    )
    upgrade = "\r\n".join(["GET / HTTP/1.1", f"Host: {floods.MASTER}:{one.port}", *words, "", ""]).encode()
    sizes = []
    with ExitStack() as stack:
        for count in (20, 80):  # the first ones make room for what all have need of
            for _ in range(count):
                made = stack.enter_context(wrapped(one.port, ALLOWED, context, upgrade))
                assert made.recv(4096).startswith(b"HTTP/1.1 101 ")
            sizes.append(floods.rss_mb(one.master.process.pid))
    each_kb = (sizes[1] - sizes[0]) * 1024 / 80
    print(f"{each_kb:.0f} KB each")
    assert each_kb < 160


class Waiting:
    """What Turns knows of a greeting."""

    def __init__(self, among: str) -> None:
        self.begun = self.transport = self
        self.among, self.turn, self.aborted = among, Future[None](loop=new_event_loop()), False
        self.turn.get_loop().close()

    def abort(self) -> None:
        self.aborted = True

    @property
    def state(self) -> str:
        return "aborted" if self.aborted else "on" if self.turn.done() else "waits"


def test_whose_turn_it_is() -> None:
    turns = est.Turns()

    def come(among: str) -> Waiting:
        turns.begin(made := Waiting(among))
        return made

    greedy = [come("greedy") for _ in range(est.GREETINGS + 2)]
    assert [one.state for one in greedy[-3:]] == ["on", "waits", "waits"]
    stranger, first, second = come(""), come("other"), come("other")
    assert [one.state for one in (stranger, first, second)] == ["waits", "on", "on"]
    assert [one.state for one in greedy[:3]] == ["aborted", "aborted", "on"], "the oldest of who has most"
    turns.end(greedy[0])
    assert greedy[-1].state == "waits", "its turn was another's already"
    turns.end(second)
    assert [one.state for one in (greedy[-2], stranger)] == ["on", "waits"], "strangers last"
    for one in (first, *greedy, stranger):
        turns.end(one)
    assert not turns.active and not turns.waiting

    single = [come(str(number)) for number in range(est.GREETINGS)]
    late = come("late")
    assert all(come("late").state == "waits" for _ in range(est.GREETINGS_WAITING - 1))
    assert come("too late").turn.cancelled()
    assert late.state == "waits" and {one.state for one in single} == {"on"}, "nobody has more than one"
    turns.end(single[0])
    assert late.state == "on"


def test_a_greeting_a_byte_at_a_time_has_its_deadline(one: Fleet) -> None:
    hello = clienthello()
    with silent(one.port, itertools.repeat(ALLOWED), 20) as held:
        began = time.monotonic()
        left = held
        for byte in hello:
            for each in left:
                with suppress(OSError):
                    each.send(bytes([byte]))
            time.sleep(0.1)
            left = still_open(left)
            if not left:
                break
        assert not left and 8 < time.monotonic() - began < 15


@pytest.mark.parametrize("how", ["ws", "wss"])
def test_a_master_that_stops_waits_for_none(how: str, fleet: Callable[..., Fleet], tmp_path: Path) -> None:
    """It did for each of them, until its time was over, which the log then said."""
    allowed = ["127.0.0.0/29", ALLOWED]
    if how == "ws":
        made = fleet(hosts=1, config={"whitelist": allowed})
    else:
        made = secure(fleet, Authority(tmp_path / "ca"), hosts=1, whitelist=allowed)
        made.start()
    with silent(made.port, itertools.repeat(ALLOWED), 5) as held:
        assert len(held) == 5
        assert made.stop(made.master) == 0
    assert "began no WebSocket handshake" not in made.master.stderr
