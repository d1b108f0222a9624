"""Connections: a peer that vanished without a word is noticed, and nobody comes back in step with the others."""

from __future__ import annotations

import asyncio
import json
import random
import statistics
from collections.abc import Callable
from pathlib import Path

import pytest

from tests import seam as est
from tests.commands import COMMAND, Watched, lines_of, log_of, open_gate, write_script
from tests.fleet import Fleet, free_port, wait_for
from tests.machines import Network
from tests.peers import FalseMaster
from tests.seam import reconnect_delay


def test_reconnects_are_spread() -> None:
    chance = random.Random(7).uniform
    for attempt, most in [(0, 1), (1, 2), (2, 4), (5, 32), (6, 60), (40, 60)]:
        delays = [reconnect_delay(attempt, False, chance) for _ in range(400)]
        assert 0 <= min(delays) < most / 20 and most * 0.95 < max(delays) <= most
        assert abs(statistics.mean(delays) - most / 2) < most / 10
    refused = [reconnect_delay(3, True, chance) for _ in range(400)]
    assert min(refused) >= 30 and max(refused) <= 90


def test_a_log_that_nobody_wants_any_more_holds_up_no_other(tmp_path: Path) -> None:
    """The sink has ended one log; the source goes on with it, and then has another one to send."""

    async def talk() -> None:
        here, there = (est.Link(wire) for wire in est.QueueWire.pair())

        async def receive(link: est.Link, other: est.Link) -> None:
            while True:
                frame = await link.wire.recv()
                message = est.decode_message(frame) if isinstance(frame, str) else None
                if isinstance(frame, bytes):
                    link.on_chunk(frame)
                elif isinstance(message, est.Have):
                    link.on_have(message)
                elif isinstance(message, est.Log):
                    link.accept_log(message, tmp_path / f"{message.host}.copy", lambda _: None)

        def offer(host: str, text: bytes) -> None:
            path = tmp_path / host
            with path.open("ab") as file:
                file.write(text)
            here.open_log("20260101-000000-0000", host, path)
            here.grew("20260101-000000-0000", host, path.stat().st_size)

        async def arrives(host: str) -> None:
            while est.log_size(tmp_path / f"{host}.copy") < est.log_size(tmp_path / host):
                await asyncio.sleep(0.01)

        async with asyncio.timeout(30), asyncio.TaskGroup() as group:
            pairs = ((here, there), (there, here))
            tasks = [group.create_task(receive(*pair)) for pair in pairs]
            tasks += [group.create_task(link.write_forever()) for link, _ in pairs]
            offer("one", b"begun\n")
            await arrives("one")
            there.end_inbound(tmp_path / "one.copy")
            offer("one", b"x" * 3 * est.WINDOW_BYTES)
            offer("two", b"y" * 3 * est.WINDOW_BYTES)
            await arrives("two")
            for task in tasks:
                task.cancel()

    asyncio.run(talk())
    assert (tmp_path / "one.copy").read_bytes() == b"begun\n"


def test_a_log_that_both_ends_keep_in_one_file_is_not_sent(tmp_path: Path) -> None:
    """The master's own agent writes the very file that the master has: only its size travels."""
    path, seen = tmp_path / "log", list[int]()

    async def talk() -> None:
        agent, master = (est.Link(wire, shared=True) for wire in est.QueueWire.pair())
        path.write_bytes(b"x" * est.CHUNK_BYTES)

        async def receive() -> None:
            while (frame := await master.wire.recv()) is not None:
                assert isinstance(frame, str), "a chunk was sent"
                message = est.decode_message(frame)
                master.accept_log(message, path, lambda inbound: seen.append(inbound.size))

        async with asyncio.timeout(30), asyncio.TaskGroup() as group:
            tasks = [group.create_task(work) for work in (receive(), agent.write_forever(), master.write_forever())]
            agent.open_log("20260101-000000-0000", "h", path)
            for size in (2 * est.CHUNK_BYTES, 3 * est.CHUNK_BYTES):
                with path.open("ab") as file:
                    file.write(b"y" * est.CHUNK_BYTES)
                agent.grew("20260101-000000-0000", "h", size)
                while seen[-1:] != [size]:
                    await asyncio.sleep(0.01)
            for task in tasks:
                task.cancel()

    asyncio.run(talk())
    assert path.stat().st_size == 3 * est.CHUNK_BYTES


def test_a_connection_whose_greeting_fails_is_closed(tmp_path: Path) -> None:
    """A commander that tries again and again, as `--wait` does, would hold ever more of them."""
    port = free_port()
    (tmp_path / "updater.json").write_text(json.dumps({"masterUrl": f"ws://127.0.0.1:{port}", "whitelist": []}))
    caller = est.Caller(est.StateFolder(tmp_path / "state"), est.load_config(tmp_path / "updater.json"), None, tmp_path)
    with FalseMaster("127.0.0.1", port, lambda _: [est.Refuse("not today", "come back tomorrow")]) as master:
        for _ in range(3):
            with pytest.raises(est.RefusedError, match="not today"):
                caller.dial(5)
        wait_for(lambda: master.ended == 3, lambda: f"{master.ended} of 3 connections have ended")


def test_a_peer_that_vanishes_without_a_word_is_noticed_by_both(
    fleet: Callable[..., Fleet], netns: Callable[[int], Network]
) -> None:
    """Also by a commander, whose terminal shows a sentence and no traceback."""
    network = netns(3)
    one = fleet(hosts=3, network=network, start=False, command=COMMAND)
    _, agent, desk = one.hosts
    one.start(one.master, agent)
    write_script("n=0; until [ -e ../go ]; do n=$((n+1)); echo line $n; sleep 0.1; done\n", agent)
    watched = Watched(one, "trigger", agent.address, "master", host=desk)
    watched.until("line 3\n")
    for other in (2, 3):
        network.cut_way(1, other)
        network.cut_way(other, 1)  # every packet dropped, none refused
    wait_for(lambda: "is offline" in one.master.stderr, lambda: one.master.stderr, 60)
    wait_for(lambda: "the connection to the master ended" in agent.stderr, lambda: agent.stderr, 60)
    wait_for(lambda: "reconnecting" in watched.err, lambda: watched.err, 60)
    for other in (2, 3):
        network.cut_way(1, other, undo=True)
        network.cut_way(other, 1, undo=True)
    wait_for(lambda: agent.stderr.count("welcomed") == 2, lambda: agent.stderr, 90)
    open_gate(agent)
    assert watched.end() == 0
    assert lines_of(watched.out, agent.address)[:-1] == log_of(one, watched.run, agent).decode().splitlines()
    assert "Traceback" not in watched.err and "silent for" not in watched.err, watched.err
