"""The floor of a fleet's cost: python3 -m tests.bench.bare PYZ

A bare websockets server, with this program's own options, that says to each light agent of herd.py the same words
and keeps nothing of what it hears: no list, no file, no check. It prints its port; a line on its standard input is an
order to all, and `done` its answer.
"""

from __future__ import annotations

import asyncio
import json
import resource
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, sys.argv[1])  # with bytecode: what compiling leaves free would hide what agents take

from websockets.asyncio.server import ServerConnection, serve
from websockets.exceptions import ConnectionClosed

from tests import seam as est

RUN = "20261127-120000-f100"


class Bare:
    def __init__(self) -> None:
        self.agents: list[ServerConnection] = []
        self.over = 0
        self.all_over = asyncio.Event()

    async def handle(self, socket: ServerConnection) -> None:
        await socket.recv()
        welcome = est.Welcome(1, "bare", "127.0.0.1", "light", "nonce", list(est.FEATURES), "", time.time())
        await socket.send(est.encode_message(welcome))
        self.agents.append(socket)
        with suppress(ConnectionClosed):
            async for frame in socket:
                if isinstance(frame, str):
                    await self.hear(socket, json.loads(frame))

    async def hear(self, socket: ServerConnection, message: dict[str, Any]) -> None:
        if message["verb"] == "log":
            await socket.send(json.dumps({"verb": "have", "channel": 1, "size": 0, "rewind": True}))
        elif message.get("state") == "succeeded":
            await socket.send(json.dumps({"verb": "acked"}))
            self.over += 1
            if self.over == len(self.agents):
                self.all_over.set()

    async def order(self) -> None:
        job = est.JobRecord(RUN, "light", "0" * 32, est.Kind.DEPLOY, "noop", created=time.time())
        for socket in self.agents:
            await socket.send(est.encode_message(est.Order(vars(job))))
        await self.all_over.wait()


async def main() -> None:
    bare, loop = Bare(), asyncio.get_running_loop()
    async with serve(bare.handle, "127.0.0.1", 0, **est.SERVER_OPTIONS) as server:
        print(server.sockets[0].getsockname()[1], flush=True)
        if await loop.run_in_executor(None, sys.stdin.readline):
            await bare.order()
            print("done", flush=True)
            await loop.run_in_executor(None, sys.stdin.read)


if __name__ == "__main__":
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    asyncio.run(main())
