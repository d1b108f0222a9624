"""Floods and rubbish for a master's port, bounded and on loopback: each returns how the connections ended."""

from __future__ import annotations

import asyncio
import os
import random
import socket
import threading
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager, suppress
from pathlib import Path

from tests.seam import Hello, encode_message

MASTER = "127.0.0.1"
UPGRADE = (
    b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
    b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n"
)
TLS_HELLO = bytes.fromhex("16030100c8010000c40303") + bytes(range(256))
RUBBISH = {
    "garbage": os.urandom(4096),
    "zeros": b"\0" * 100_000,
    "TLS": TLS_HELLO,
    "one giant header": UPGRADE + b"X-Giant: " + b"x" * (1 << 20) + b"\r\n\r\n",
    "many headers": UPGRADE + b"".join(b"X-%d: y\r\n" % i for i in range(10_000)) + b"\r\n",
    "giant line": b"GET /" + b"x" * (1 << 20),
    "a body": b"POST / HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 1000000\r\n\r\n" + b"x" * 1_000_000,
    "two hosts": UPGRADE + b"Host: 127.0.0.1\r\n\r\n",
    "no version": b"GET / \r\n\r\n",
    "half": UPGRADE,
    "two pages": UPGRADE + b"Origin: http://127.0.0.1\r\nOrigin: http://a.example\r\n\r\n",
    "two lists": b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\n" + b"Accept-Encoding: gzip\r\n" * 2 + b"\r\n",
}


def frame(opcode: int, data: bytes, *, length: int | None = None, fin: bool = True, masked: bool = True) -> bytes:
    """A client's frame, with whatever is wrong with it; the mask is zero."""
    size = len(data) if length is None else length
    head = bytes([opcode | (0x80 if fin else 0)])
    mask = 0x80 if masked else 0
    if size < 126:
        head += bytes([mask | size])
    elif size < 1 << 16:
        head += bytes([mask | 126]) + size.to_bytes(2, "big")
    else:
        head += bytes([mask | 127]) + size.to_bytes(8, "big")
    return head + (b"\0" * 4 if masked else b"") + data


BAD_FRAMES = {
    "too large": frame(1, b"x" * 1000, length=5 << 20),
    "larger than memory": frame(2, b"x" * 1000, length=1 << 62),
    "length with a sign": frame(2, b"", length=(1 << 64) - 1),
    "fragments without end": frame(1, b"x" * 60_000, fin=False) + frame(0, b"x" * 60_000, fin=False) * 40,
    "a continuation of nothing": frame(0, b"x"),
    "no mask": frame(1, b"{}", masked=False),
    "a reserved kind": frame(5, b"x"),
    "reserved bits": bytes([0xF1, 0x80]) + b"\0" * 4,
    "a long ping": frame(9, b"x" * 200),
    "no UTF-8": frame(1, b"\xff\xfe"),
    "no JSON": frame(1, b"{"),
    "deep JSON": frame(1, b"[" * 100_000),
    "a large number": frame(1, b'{"verb":"ask","id":' + b"9" * 100_000 + b"}"),
    "no hello": frame(2, b"\x01" + b"\0" * 12 + b"x"),
    "a large hello": frame(1, b'{"verb":"hello","name":"' + b"x" * 500_000 + b'"}'),
    "silence": b"",
}


def stranger() -> str:
    """An address that no test allows."""
    return f"127.{random.randrange(10, 250)}.{random.randrange(256)}.{random.randrange(1, 255)}"


@asynccontextmanager
async def open_at(port: int, source: str) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    reader, writer = await asyncio.open_connection(MASTER, port, local_addr=(source, 0))
    try:
        yield reader, writer
    finally:
        writer.transport.abort()


async def ending(reader: asyncio.StreamReader, timeout_s: float = 40) -> str:
    """What the master answers before it ends the connection, by its status line."""
    try:
        async with asyncio.timeout(timeout_s):
            answer = await reader.read()
    except TimeoutError:
        return "still open"
    except OSError:
        return "reset"
    return answer.split(b"\r\n")[0].decode(errors="replace") if answer.startswith(b"HTTP") else "closed"


async def many(count: int, at_once: int, one: Callable[[], Awaitable[str]]) -> Counter[str]:
    """The same attack many times, so many of them at once."""
    room = asyncio.Semaphore(at_once)

    async def guarded() -> str:
        async with room:
            try:
                return await one()
            except OSError:
                return "reset"

    return Counter(await asyncio.gather(*(guarded() for _ in range(count))))


async def refused(port: int, count: int, at_once: int = 100, source: str = "") -> Counter[str]:
    """Handshakes from addresses that are not allowed, each from another unless `source` is given."""

    async def one() -> str:
        async with open_at(port, source or stranger()) as (reader, writer):
            writer.write(UPGRADE + b"\r\n")
            return await ending(reader)

    return await many(count, at_once, one)


async def slow(port: int, count: int, pause_s: float = 1.0, source: str = "") -> Counter[str]:
    """Handshakes of a byte a second, all at once."""

    async def one() -> str:
        async with open_at(port, source or stranger()) as (reader, writer):
            end = asyncio.ensure_future(ending(reader))
            for index in range(len(UPGRADE)):
                with suppress(OSError):
                    writer.write(UPGRADE[index : index + 1])
                await asyncio.wait([end], timeout=pause_s)
                if end.done():
                    break
            return await end

    return await many(count, count, one)


async def rubbish(port: int, rounds: int = 1, source: str = "", at_once: int = 10) -> Counter[str]:
    """What is no handshake."""
    waiting = [data for data in RUBBISH.values() for _ in range(rounds)]

    async def one() -> str:
        async with open_at(port, source or stranger()) as (reader, writer):
            writer.write(waiting.pop())
            return await ending(reader)

    return await many(len(waiting), at_once, one)


async def bad_frames(port: int, source: str, rounds: int = 1, at_once: int = 8) -> Counter[str]:
    """Frames from an allowed address that no WebSocket or no protocol knows."""
    waiting = [data for data in BAD_FRAMES.values() for _ in range(rounds)]

    async def one() -> str:
        async with open_at(port, source) as (reader, writer):
            writer.write(UPGRADE + b"\r\n")
            head = await reader.readuntil(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 101"), head
            writer.write(waiting.pop())
            return await ending(reader)

    return await many(len(waiting), at_once, one)


async def commander(stack: AsyncExitStack, port: int, source: str) -> str:
    """A commander that stays as long as the stack: the master's status line."""
    reader, writer = await stack.enter_async_context(open_at(port, source))
    writer.write(UPGRADE + b"\r\n")
    status = (await reader.readuntil(b"\r\n")).strip().decode()
    writer.write(frame(1, encode_message(Hello("commander", [1, 1], "9", "", "crowd", "")).encode()))
    return status


def rss_mb(pid: int) -> float:
    """Resident memory of a process in MB."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


async def pings(port: int, source: str, most: int) -> int:
    """Pings of somebody who reads no answer: how many bytes of them were taken."""
    async with open_at(port, source) as (reader, writer):
        writer.write(UPGRADE + b"\r\n")
        await reader.readuntil(b"\r\n\r\n")
        writer.write(frame(1, encode_message(Hello("commander", [1, 1], "9", "", "crowd", "")).encode()))
        reader_transport: asyncio.ReadTransport = writer.transport  # type: ignore[assignment]
        reader_transport.pause_reading()
        some, sent = frame(9, b"x" * 125) * 100, 0  # with a tiny SO_RCVBUF Linux drops the other way's acks, too
        with suppress(OSError):
            while sent < most:
                writer.write(some)
                await writer.drain()
                sent += len(some)
        return sent


@contextmanager
def without_end(sock: socket.socket, data: bytes) -> Iterator[None]:
    """Send the same again and again as fast as it is taken, and read what comes, meanwhile."""
    over = threading.Event()

    def send() -> None:
        with suppress(OSError):
            while not over.is_set():
                sock.sendall(data)

    def read() -> None:
        with suppress(OSError):
            while sock.recv(1 << 16):
                pass

    threads = [threading.Thread(target=send), threading.Thread(target=read)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        over.set()
        with suppress(OSError):
            sock.shutdown(socket.SHUT_RDWR)
        for thread in threads:
            thread.join()
