"""Floods and rubbish: the master goes on serving, holds little of it, and says it once. ESTELLE_TEST_LONG=1 for all."""

from __future__ import annotations

import asyncio
import io
import json
import os
import threading
from collections.abc import Iterator
from contextlib import AsyncExitStack, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, seed, settings, strategies as st

from tests import floods, seam as est
from tests.commands import GATED, Watched, module_fleet, open_gate, write_script
from tests.fleet import Fleet
from tests.peers import Peer
from tests.test_messages import JSON, messages

A, B, ALLOWED = "127.0.0.1", "127.0.0.2", "127.0.0.8"
LONG = bool(os.environ.get("ESTELLE_TEST_LONG"))
one_fleet = pytest.mark.xdist_group("floods")  # one worker makes the fleet that all of these tests share


made = module_fleet("floods", hosts=2, config={"whitelist": [A, B, ALLOWED, "127.0.2.0/24"]})


@pytest.fixture
def one(made: Fleet) -> Iterator[Fleet]:
    """Whatever comes, a run that is watched goes on, no link is lost, and the master holds little of it."""
    assert made.master.process
    write_script(GATED, *made.hosts)
    watched = Watched(made, "trigger", B, "master")
    watched.until("begun")
    before, lines = floods.rss_mb(made.master.process.pid), made.master.stderr.count("\n")
    yield made
    open_gate(*made.hosts)
    assert watched.end(60) == 0 and "ended" in watched.out
    assert made.cli("status").code == 0
    assert floods.rss_mb(made.master.process.pid) < before + 150
    said = made.master.stderr
    assert said.count("\n") - lines < 3 * est.REFUSED_KEPT
    assert (
        "Traceback" not in said and f"agent {B} is offline" not in said and made.agents[0].stderr.count("welcomed") == 1
    )


@one_fleet
def test_refused_connections(one: Fleet) -> None:
    count = 2000 if LONG else 300
    for source in ("", "127.0.0.66"):
        ends = asyncio.run(floods.refused(one.port, count, source=source))
        assert set(ends) <= {"HTTP/1.1 403 Forbidden", "reset", "closed"} and ends["HTTP/1.1 403 Forbidden"], ends
    assert one.master.stderr.count("refused 127.0.0.66: ") == 1, "once a minute, however many"


@one_fleet
def test_handshakes_of_a_byte_a_second(one: Fleet) -> None:
    async def attack() -> tuple[Any, Any, int]:
        strangers = asyncio.create_task(floods.slow(one.port, 2000 if LONG else 300))
        known = asyncio.create_task(floods.slow(one.port, est.HANDSHAKES + 20, source=ALLOWED))
        await asyncio.sleep(2)
        status = await asyncio.to_thread(one.cli, "status")
        return await strangers, await known, status.code

    strangers, known, code = asyncio.run(attack())
    assert code == 0, "others come in meanwhile"
    for ends in (strangers, known):
        assert set(ends) <= {"reset", "closed"}, f"none stays open: {ends}"
    assert "refused strangers: more than 32 handshakes at once" in one.master.stderr
    assert f"refused {ALLOWED}: more than 128 handshakes at once" in one.master.stderr
    with Peer(one, ALLOWED, "commander"):
        pass


@one_fleet
def test_rubbish(one: Fleet) -> None:
    for source in ("", "127.0.0.67", ALLOWED):
        ends = asyncio.run(floods.rubbish(one.port, 20 if LONG else 2, source))
        assert "still open" not in ends and "HTTP/1.1 101 Switching Protocols" not in ends, ends
    assert one.master.stderr.count("refused 127.0.0.67: ") == 1


@one_fleet
def test_frames_that_are_none(one: Fleet) -> None:
    ends = asyncio.run(floods.bad_frames(one.port, ALLOWED, 20 if LONG else 2))
    assert set(ends) <= {"reset", "closed"}, ends


@one_fleet
def test_pings_whose_answers_nobody_reads(one: Fleet) -> None:
    most = 64 << 20
    taken = asyncio.run(floods.pings(one.port, ALLOWED, most))
    assert taken < most, "they were all answered, into memory"


@one_fleet
def test_one_address_has_only_so_many_connections(one: Fleet) -> None:
    async def attack() -> tuple[int, str]:
        async with AsyncExitStack() as stack:
            for _ in range(est.CONNECTIONS):
                answer = await floods.commander(stack, one.port, "127.0.2.1")
                assert answer.startswith("HTTP/1.1 101")
            last = await floods.commander(stack, one.port, "127.0.2.1")
            status = await asyncio.to_thread(one.cli, "status")
            return status.code, last

    assert asyncio.run(attack()) == (0, "HTTP/1.1 403 Forbidden")


@pytest.mark.timeout(600)
@one_fleet
def test_ten_thousand_random_messages(one: Fleet) -> None:
    sizes = settings(
        max_examples=100 if LONG else 10, deadline=None, suppress_health_check=list(HealthCheck), database=None
    )
    said = st.one_of(
        messages(), st.dictionaries(st.sampled_from(["verb", "run", "host"]), JSON), st.binary(max_size=99)
    )
    several = st.lists(said, min_size=100, max_size=100)

    @seed(20261124)
    @sizes
    @given(several, st.sampled_from(["agent", "commander"]))
    def attack(chosen: list[Any], role: str) -> None:
        peer = Peer(one, ALLOWED, role)
        for message in chosen:
            try:
                peer.say(message)
                with suppress(TimeoutError):
                    while peer.hear(0) is not None:
                        pass
            except Exception:  # its connection was ended: it comes back
                peer.close()
                peer = Peer(one, ALLOWED, role)
        peer.close()

    attack()
    known = json.loads((one.master.state / "machines.json").read_bytes())
    assert len(known) <= 3


@one_fleet
@pytest.mark.parametrize("kind", ["chunks for no log", "pings"])
def test_a_host_that_sends_tiny_frames_without_end(one: Fleet, kind: str) -> None:
    """The others reach the master while it lasts, as by a share of the loop's time each address has its turn."""
    tiny = {"chunks for no log": floods.frame(2, est.encode_chunk(1, 5, b"x")), "pings": floods.frame(9, b"")}
    with Peer(one, ALLOWED, "agent") as false, floods.without_end(false.socket.socket, tiny[kind] * 5000):
        for words in (("status",), ("history",), ("trigger", A, "no-such-branch", "--detach")):
            code, out, err = one.cli(*words)
            assert code == 0, (words, out, err)


def test_an_address_pays_for_small_frames_alone() -> None:
    purse, share = est.Purse(), est.program.PURSE_SHARE
    for _ in range(1000):
        assert purse.pay(0.002, 60_000) == 0, "long ones are worth it"
    assert purse.is_paid
    rests = [purse.pay(0.01, 10) for _ in range(200)]
    free = est.program.PURSE_BURST_S * share / 0.01
    assert not any(rests[: int(free) - 1]) and all(rests[int(free) + 2 :])
    assert rests[-1] - rests[-2] == pytest.approx(0.01 / share, abs=0.02), "one after the other"


def test_refusals_are_counted(tmp_path: Any, capfd: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "config"
    folder.mkdir()
    (folder / "updater.json").write_text('{"masterUrl": "ws://127.0.0.1", "whitelist": []}')
    state = est.StateFolder(tmp_path / "state")
    state.create()
    door = est.Door(est.ConfigFile(folder / "updater.json", state), A, "n")
    for number in range(est.REFUSED_KEPT + 500):
        for _ in range(3):
            door.log_refusal(f"10.0.{number // 256}.{number % 256}", "why")
    assert len(door.refused) == est.REFUSED_KEPT + 1
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == est.REFUSED_KEPT + 1 and lines[0].endswith("refused 10.0.0.0: why") and "others" in lines[-1]
    door.refused = {address: (began - 61, count) for address, (began, count) in door.refused.items()}
    door.look()
    lines = capfd.readouterr().err.splitlines()
    assert lines[0].endswith("refused 10.0.0.0 2 more times within a minute") and not door.refused
    assert lines[-1].endswith("refused others 1499 more times within a minute")


def test_a_slow_disk_holds_up_nobody_while_the_program_is_given(tmp_path: Path) -> None:
    meanwhile = threading.Event()

    class Slow(io.BytesIO):
        def read(self, size: int | None = -1) -> bytes:
            assert meanwhile.wait(20), "the loop waits for the disk"
            return super().read(size)

    async def live() -> list[Any]:
        handout = est.Handout()
        handout.sha256, handout.copy = "0" * 64, Slow(b"program")
        asked = [asyncio.ensure_future(handout.respond(Asking(), A, whole=True)) for _ in range(2)]
        asyncio.get_running_loop().call_later(0.05, meanwhile.set)
        return await asyncio.gather(*asked)

    class Asking:
        state = est.State.RUNNING

        def allow(self, _: float) -> None:
            """It takes what time it takes."""

        def respond(self, _: int, text: str) -> Any:
            return SimpleNamespace(headers={"Content-Type": "", "Content-Length": ""}, body=text)

    assert [each.body for each in asyncio.run(live())] == [b"program"] * 2
