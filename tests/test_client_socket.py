"""The commander's own WebSocket client is as the library's server, and RFC 6455, want it."""

from __future__ import annotations

import hashlib
import importlib
import json
import random
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from websockets.exceptions import ProtocolError
from websockets.frames import Opcode
from websockets.http11 import Request
from websockets.protocol import State
from websockets.server import ServerProtocol

from tests import seam as est
from tests.fleet import PROGRAM, clean_env, run

URL = est.parse_master_url("ws://127.0.0.1:9900/deep/path")


def both(chance: random.Random | None = None) -> tuple[est.ClientSocket, ServerProtocol]:
    """Our client and the library's server, whose handshake is over."""
    client, server = est.ClientSocket(URL), ServerProtocol(max_size=est.MESSAGE_BYTES)
    server.receive_data(client.take_output())
    (request,) = server.events_received()
    assert isinstance(request, Request) and request.path == "/deep/path"
    assert request.headers["Host"] == "127.0.0.1:9900"
    server.send_response(server.accept(request))
    to_client(server, client, chance)
    assert client.is_open and server.state is State.OPEN
    return client, server


def to_client(server: ServerProtocol, client: est.ClientSocket, chance: random.Random | None = None) -> None:
    """What the server says, in pieces of any size."""
    data = b"".join(server.data_to_send())
    while data:
        size = chance.choice((1, 2, 3, 7, 100, 5000)) if chance else len(data)
        client.receive(data[:size])
        data = data[size:]


def to_server(client: est.ClientSocket, server: ServerProtocol) -> list[Any]:
    server.receive_data(client.take_output())
    return server.events_received()


def code_of(server: ServerProtocol) -> int:
    """With which code our client said goodbye."""
    assert server.close_rcvd
    return server.close_rcvd.code


@pytest.mark.parametrize("size", [0, 1, 125, 126, 127, 65535, 65536, 300_000])
def test_messages_of_every_size_go_both_ways(size: int) -> None:
    chance = random.Random(size)
    client, server = both(chance)
    text = "".join(chance.choices("abc정상\n", k=size))
    data = chance.randbytes(size)
    server.send_text(text.encode())
    server.send_binary(data)
    to_client(server, client)
    assert [*client.messages] == [text, data]
    client.send_text(text)
    (frame,) = to_server(client, server)
    assert (frame.opcode, bytes(frame.data).decode()) == (Opcode.TEXT, text)


def test_pieces_of_a_message_with_pings_between_them() -> None:
    chance = random.Random(3)
    client, server = both(chance)
    parts = [chance.randbytes(chance.randrange(400)) for _ in range(20)]
    server.send_binary(parts[0], fin=False)
    for part in parts[1:]:
        server.send_ping(part[:9])
        server.send_continuation(part, fin=False)
    server.send_continuation(b"", fin=True)
    server.send_text(b"\xff!")
    server.send_pong(b"")
    to_client(server, client, chance)
    assert [*client.messages] == [b"".join(parts), "\ufffd!"]
    pongs = to_server(client, server)
    assert [bytes(frame.data) for frame in pongs] == [part[:9] for part in parts[1:]]
    assert {frame.opcode for frame in pongs} == {Opcode.PONG}
    client.send_ping()
    assert [frame.opcode for frame in to_server(client, server)] == [Opcode.PING]


def test_either_end_says_goodbye() -> None:
    client, server = both()
    server.send_text(b"last")
    server.send_close(1012, "restart")
    to_client(server, client)
    assert [*client.messages] == ["last"] and not client.is_open
    to_server(client, server)
    assert code_of(server) == 1012
    client, server = both()
    client.close()
    client.close()
    server.send_text(b"too late")
    to_server(client, server)
    to_client(server, client)
    assert code_of(server) == 1000 and not client.messages
    client, server = both()
    client.receive(b"")  # the connection was cut
    assert not client.is_open


BROKEN: dict[str, tuple[bytes, int]] = {
    "masked by a server": (b"\x81\x81\0\0\0\0a", 1002),
    "masked, of a size that it has by chance": (b"\x82\x85" + bytes(0x85), 1002),
    "a bit that means nothing": (b"\xc1\x01a", 1002),
    "an unknown kind": (b"\x83\x01a", 1002),
    "an unknown control frame": (b"\x8b\x01a", 1002),
    "a long ping": (b"\x89\x7e\x00\x80", 1002),
    "a ping in pieces": (b"\x09\x00", 1002),
    "a piece of nothing": (b"\x80\x01a", 1002),
    "a message within a message": (b"\x01\x01a\x81\x01b", 1002),
    "a message that is too large": (b"\x82\x7f" + (est.MESSAGE_BYTES + 1).to_bytes(8, "big"), 1009),
    "too large in pieces": (
        b"\x02\x7f" + est.MESSAGE_BYTES.to_bytes(8, "big") + bytes(est.MESSAGE_BYTES) + b"\x80\x01a",
        1009,
    ),
}


@pytest.mark.parametrize("at_once", [True, False])
@pytest.mark.parametrize("name", BROKEN)
def test_what_is_no_frame_ends_the_connection(name: str, at_once: bool) -> None:
    client, server = both()
    data, code = BROKEN[name]
    for piece in [b"\x81\x02ok" + data] if at_once else [b"\x81\x02ok", data]:
        client.receive(piece)
    assert [*client.messages][:1] == ["ok"] and not client.is_open
    client.receive(b"\x81\x02no")
    assert "no" not in client.messages
    to_server(client, server)
    assert code_of(server) == code


def test_a_servers_judgement_is_the_librarys() -> None:
    """Whatever bytes come: what the library's client refuses, ours does, and nothing raises."""
    from websockets.client import ClientProtocol
    from websockets.uri import parse_uri

    chance = random.Random(19)
    for _ in range(400):
        client, _server = both()
        theirs = ClientProtocol(parse_uri(str(URL)), state=State.OPEN, max_size=est.MESSAGE_BYTES)
        data = b""
        for _ in range(5):
            body = chance.randbytes(chance.randrange(4))
            first = chance.choice([*Opcode]) | chance.choice((0x80, 0x80, 0, 0xC0))
            data += bytes([first, len(body)]) + body
        client.receive(data)
        theirs.receive_data(data)
        broke = isinstance(theirs.parser_exc, ProtocolError)
        if broke:
            assert not client.is_open
        elif theirs.parser_exc is None:
            assert client.is_open == (theirs.state is State.OPEN)


# In place of a WebSocket


@contextmanager
def answers(data: bytes, *, keep: bool = False) -> Iterator[str]:
    """A server that says `data` to whoever asks; `keep`: and does not hang up."""
    held: list[socket.socket] = []
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            while True:
                try:
                    client, _ = server.accept()
                except OSError:
                    return
                client.recv(65536)
                client.sendall(data)
                if keep:
                    held.append(client)
                else:
                    client.close()

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield f"ws://127.0.0.1:{server.getsockname()[1]}"
        server.shutdown(socket.SHUT_RDWR)
        thread.join(10)
    for client in held:
        client.close()


def told(url: str, timeout_s: float = 10.0) -> str:
    """Why no connection comes about."""
    with pytest.raises(est.UpdaterError) as problem, est.dialing(url):
        est.BlockingWire(est.Way(url, None, None, {}), timeout_s)
    return problem.value.what


UPGRADE = b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
REFUSAL = b"HTTP/1.1 403 Forbidden\r\nContent-Length: 12\r\nX-Estelle-Process: me\r\n\r\nnot you\nask!"
ANSWERS: dict[str, tuple[bytes, str]] = {
    "nothing": (b"", "did not receive a valid HTTP response"),
    "another protocol": (b"SSH-2.0-OpenSSH_9.2\r\n", "did not receive a valid HTTP response"),
    "half an answer": (UPGRADE, "did not receive a valid HTTP response"),
    "somebody else's proof": (UPGRADE + b"Sec-WebSocket-Accept: aGVsbG8=\r\n\r\n", "did not agree to a WebSocket"),
    "a page": (b"HTTP/1.1 200 OK\r\n\r\n<html>", "HTTP 200 instead of a WebSocket: <html>"),
    "no number": (b"HTTP/1.1 x\r\n\r\n", "HTTP 0 instead of a WebSocket"),
    "a refusal": (REFUSAL, "the master refused us: not you"),
}


@pytest.mark.parametrize("name", ANSWERS)
def test_what_answers_in_place_of_a_master_is_told(name: str) -> None:
    data, why = ANSWERS[name]
    with answers(data) as url:
        assert why in told(url)


def test_an_answer_that_does_not_say_where_it_ends_is_told_in_time() -> None:
    chunked = b"HTTP/1.1 502 Bad\r\nTransfer-Encoding: chunked\r\n\r\n4\r\noops\r\n0\r\n\r\n"
    with answers(chunked, keep=True) as url:
        assert "HTTP 502 instead of a WebSocket" in told(url, 0.3)
    with answers(REFUSAL, keep=True) as url:  # this one does
        assert told(url, 60).startswith("the master refused us")
    with answers(b"HTTP/1.1 ", keep=True) as url:
        assert "timed out" in told(url, 0.3)


def test_who_refused_is_known() -> None:
    with answers(REFUSAL) as url, pytest.raises(est.RefusedError) as problem, est.dialing(url):
        est.BlockingWire(est.Way(url, None, None, {}), 10)
    assert problem.value.who == "me"


def test_a_host_is_named_as_others_name_it() -> None:
    def head(text: str) -> bytes:
        return est.ClientSocket(est.parse_master_url(text)).take_output()

    wanted: list[tuple[str, bytes]] = [
        ("ws://Master.example:80", b"\r\nHost: master.example\r\n"),
        ("wss://[2001:db8::1]:443/x", b"\r\nHost: [2001:db8::1]\r\n"),
        ("wss://[2001:db8::1]", b"\r\nHost: [2001:db8::1]:9900\r\n"),
    ]
    for text, line in wanted:
        assert line in head(text)


def test_sha1_is_the_same_without_cpythons_own(monkeypatch: pytest.MonkeyPatch) -> None:
    one = est.sha1(b"estelle")

    def missing(name: str) -> Any:
        raise ImportError(name)

    find: Callable[[str], Any] = missing
    monkeypatch.setattr(importlib, "import_module", find)
    monkeypatch.setitem(vars(est.program), "hashlib", hashlib)
    assert est.sha1(b"estelle") == one == hashlib.sha1(b"estelle").digest()


def test_a_question_to_the_master_imports_little(tmp_path: Path) -> None:
    """Each of these takes milliseconds of every command's start."""
    with answers(REFUSAL) as url:
        config = tmp_path / "updater.json"
        config.write_text(json.dumps({"masterUrl": url, "whitelist": ["127.0.0.1"]}))
        argv = [PROGRAM[0], "-X", "importtime", *PROGRAM[1:]]
        argv += ["--config", str(config), "--state", str(tmp_path), "status"]
        done = run(argv, clean_env(tmp_path))
    assert done.code == 3 and "the master refused us: not you" in done.err
    imported = {line.split("|")[-1].strip() for line in done.err.splitlines() if line.startswith("import time:")}
    # those that the module imports at their first use show only by what they import themselves
    dear = {"_asyncio", "_hashlib", "_posixsubprocess", "_ssl", "dataclasses", "encodings.idna", "inspect", "logging"}
    dear.add("websockets")
    assert "_socket" in imported and imported & dear == set()
