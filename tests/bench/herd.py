"""Light agents on the real wire: python3 -m tests.bench.herd PORT COUNT [LINES SECONDS]

Each is one connection from an address of its own (127.16.0.1 ...) that greets, takes orders and answers them with the
states and the log of a deployment that takes no time. What is simulated: no git, no runner, no files, no program: only
what a master sees of a host. It prints `welcomed COUNT` and `done COUNT` with the seconds since its start. With LINES,
each deployment writes so many lines of 80 bytes a second for SECONDS.
"""

from __future__ import annotations

import asyncio
import base64
import json
import os
import resource
import struct
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests import seam as est

AT_ONCE = 64  # greetings
OUTPUT = b"\xe2\x96\xb6 true\nnothing to do\n"
LINE = b"x" * 79 + b"\n"
BURST_S = 0.1  # between two writes of a talkative deployment


def frame(opcode: int, data: bytes) -> bytes:
    """A client's frame; the mask is zero, which costs the herd nothing and the master the same."""
    if len(data) < 126:
        return bytes([0x80 | opcode, 0x80 | len(data)]) + b"\0\0\0\0" + data
    return bytes([0x80 | opcode, 0xFE]) + struct.pack("!H", len(data)) + b"\0\0\0\0" + data


class LightAgent(asyncio.Protocol):
    def __init__(self, herd: Herd, number: int) -> None:
        self.herd, self.number = herd, number
        self.buffer = b""
        self.upgraded = False
        self.welcomed = asyncio.get_running_loop().create_future()
        self.machine = f"{number:08x}" + os.urandom(12).hex()
        self.job: dict[str, Any] = {}
        self.size = 0  # bytes of its log so far
        hello = est.Hello(
            "agent", [1, 1], "bench", self.machine, f"light{number}", os.urandom(8).hex(), "linux",
            list(est.FEATURES),
        )  # fmt: skip
        self.talk = est.greeting(hello, None, os.urandom(16).hex())

    def connection_made(self, transport: Any) -> None:
        self.transport = transport
        key = base64.b64encode(os.urandom(16)).decode()
        transport.write(
            f"GET / HTTP/1.1\r\nHost: 127.0.0.1:{self.herd.port}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            f"Sec-WebSocket-Key: {key}\r\nSec-WebSocket-Version: 13\r\n\r\n".encode()
        )

    def connection_lost(self, problem: Exception | None) -> None:
        self.herd.lost += 1
        if not self.welcomed.done():
            self.welcomed.set_exception(ConnectionError(f"{problem} {self.buffer[:300]!r}"))

    def data_received(self, data: bytes) -> None:
        self.buffer += data
        if not self.upgraded:
            head, end, rest = self.buffer.partition(b"\r\n\r\n")
            if not end:
                return
            if b" 101 " not in head.partition(b"\r\n")[0]:
                self.transport.abort()
                return
            self.upgraded, self.buffer = True, rest
            self.say(next(self.talk))
        while len(self.buffer) >= 2:
            opcode, size, begin = self.buffer[0] & 15, self.buffer[1], 2
            if size == 126:
                size, begin = struct.unpack("!H", self.buffer[2:4])[0], 4
            elif size == 127:
                size, begin = struct.unpack("!Q", self.buffer[2:10])[0], 10
            if len(self.buffer) < begin + size:
                return
            body, self.buffer = self.buffer[begin : begin + size], self.buffer[begin + size :]
            if opcode == 9:
                self.transport.write(frame(10, body))
            elif opcode == 1:
                self.hear(body.decode())

    def say(self, message: Any) -> None:
        self.transport.write(frame(1, est.encode_message(message).encode()))

    def hear(self, text: str) -> None:
        if not self.welcomed.done():
            try:
                self.say(self.talk.send(est.decode_message(text)))
            except StopIteration:
                self.welcomed.set_result(None)
            return
        message = json.loads(text)
        match message["verb"]:
            case "order" if not self.job:
                self.job = message["job"] | {"machine": self.machine}
                self.tell(revision=1)
                channel = {"channel": 1, "run": self.job["run"], "host": self.job["host"]}
                self.raw({"verb": "log", **channel, "size": 0})
                self.tell(revision=2, state="running", step="true", started=time.time())
            case "have" if self.job and message.get("rewind"):
                self.size = message["size"]
                self.write_log(OUTPUT[self.size :])
                self.talk_on(self.herd.bursts)
            case "acked":
                self.job = {}
                self.herd.note_end()
            case "ask":
                facts = {"branch": "master", "commit": "7f" * 20, "version": "v1", "dirty": False, "problem": None}
                self.raw({"verb": "answer", "id": message["id"], "result": facts})

    def talk_on(self, bursts: int) -> None:
        """Write for a while, and end."""
        if not bursts:
            self.tell(revision=3, state="succeeded", size=self.size, ended=time.time(), version="v1")
            return
        self.write_log(LINE * self.herd.lines_a_burst)
        asyncio.get_running_loop().call_later(BURST_S, self.talk_on, bursts - 1)

    def write_log(self, data: bytes) -> None:
        self.transport.write(frame(2, est.encode_chunk(1, self.size, data)))
        self.size += len(data)

    def tell(self, **facts: Any) -> None:
        self.job |= facts
        self.raw({"verb": "job", **self.job})

    def raw(self, message: dict[str, Any]) -> None:
        self.transport.write(frame(1, json.dumps(message).encode()))


class Herd:
    def __init__(self, port: int, count: int, lines: int = 0, seconds: float = 0.0) -> None:
        self.port, self.count, self.ended, self.lost = port, count, 0, 0
        self.lines_a_burst, self.bursts = round(lines * BURST_S), round(seconds / BURST_S)
        self.began = time.perf_counter()

    def note(self, what: str, count: int) -> None:
        print(f"{what} {count} {time.perf_counter() - self.began:.3f}", flush=True)

    def note_end(self) -> None:
        self.ended += 1
        if self.ended % self.count == 0:
            self.note("done", self.count)

    async def run(self) -> None:
        room, loop = asyncio.Semaphore(AT_ONCE), asyncio.get_running_loop()

        async def join(number: int) -> None:
            source = f"127.{16 + number // 62500}.{number // 250 % 250}.{number % 250 + 1}"
            async with room:
                make = lambda: LightAgent(self, number)  # noqa: E731
                _, agent = await loop.create_connection(make, "127.0.0.1", self.port, local_addr=(source, 0))
                await agent.welcomed

        await asyncio.gather(*map(join, range(self.count)))
        self.note("welcomed", self.count)
        await loop.run_in_executor(None, sys.stdin.read)  # until the bench ends


def main() -> None:
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    port, count, *flood = map(int, sys.argv[1:])
    asyncio.run(Herd(port, count, *flood).run())


if __name__ == "__main__":
    main()
