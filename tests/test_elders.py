"""What a fleet's size costs Python's garbage collector, and that nothing is left lying for it."""

from __future__ import annotations

import asyncio
import gc
import weakref
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from websockets.asyncio.client import connect
from websockets.asyncio.server import serve
from websockets.exceptions import ConnectionClosed

from tests import seam as est
from tests.test_notify import make_master


def test_a_full_round_looks_only_at_what_is_new() -> None:
    async def live() -> None:
        elders = est.Elders(lambda: 0)
        async with elders:
            gc.collect()
            before = len(gc.get_objects())
            fleet = [[number] for number in range(50_000)]
            gc.collect(1)
            assert len(gc.get_objects()) > before + 40_000, "it looks at them once"
            gc.collect()
            assert len(gc.get_objects()) < before + 10_000, "and never again"
            assert len(fleet) == 50_000 and elders.rounds == 2
        assert len(gc.get_objects()) > before + 40_000, "as before, where this host is no master any more"
        gc.collect()
        assert elders.rounds == 2

    asyncio.run(live())


def test_connections_that_are_over_do_not_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the collector had done with them: each is a ring of objects."""
    monkeypatch.setattr(est.program, "ELDERS_OVER", 10)
    door = make_master(tmp_path)[0].door
    seen: list[weakref.ref[Any]] = []
    ended: list[bool] = []

    async def attend(connection: Any) -> None:
        seen.append(weakref.ref(connection))
        connection.ring = connection  # as the exception does that ends it, by the frames that it names
        with suppress(ConnectionClosed):
            await connection.recv()
        ended.append(True)

    async def come_and_go(port: int, count: int) -> None:
        callers = [await connect(f"ws://127.0.0.1:{port}/", proxy=None) for _ in range(count)]
        gc.collect()  # they are elders from now on
        for caller in callers:
            caller.transport.abort()
            await caller.wait_closed()
        async with asyncio.timeout(20):
            while len(ended) < len(seen):
                await asyncio.sleep(0.01)
        gc.collect()

    async def live() -> tuple[int, int]:
        created = door.connection_class()
        async with door.elders, serve(attend, "127.0.0.1", 0, create_connection=created) as server:
            port = server.sockets[0].getsockname()[1]
            await come_and_go(port, 9)
            few = sum(one() is not None for one in seen)
            await come_and_go(port, 5)
            await asyncio.sleep(0)
            gc.collect()
            return few, sum(one() is not None for one in seen)

    few, left = asyncio.run(live())
    assert (few, left) == (9, 0), "a few of them wait for more"


def test_what_a_connection_held_of_a_run_goes_with_its_end(tmp_path: Path) -> None:
    """At once, and not when the collector comes by: of a large fleet's run that is much."""

    class Held:
        def grew(self, _: Any) -> None:
            """As a run hears of a log's bytes."""

    async def live() -> None:
        here, there = (est.Link(wire) for wire in est.QueueWire.pair())
        sending, getting = Held(), Held()
        here.open_log("20260101-000000-0000", "a", tmp_path / "a")
        message = est.decode_message(here._next_frame())
        there.accept_log(message, tmp_path / "copy", getting.grew)
        gone = weakref.ref(getting)
        del sending, getting
        assert gone() is not None
        gc.disable()
        try:
            there.end()
            here.end()
            assert gone() is None
            here.grew("20260101-000000-0000", "a", 5)  # a late word is nobody's
        finally:
            gc.enable()

    asyncio.run(live())
