"""Connections: a peer that vanished without a word is noticed, and nobody comes back in step with the others."""

from __future__ import annotations

import asyncio
import gc
import json
import os
import random
import statistics
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

import pytest

from tests import seam as est
from tests.commands import COMMAND, Watched, lines_of, log_of, open_gate, write_script
from tests.fleet import Fleet, free_port, wait_for
from tests.machines import Network
from tests.peers import FalseMaster
from tests.seam import reconnect_delay


async def write_forever(link: est.Link) -> None:
    """Have a link write, as long as this is not cancelled."""
    async with asyncio.TaskGroup() as group:
        link.start(group.create_task)
        await asyncio.Event().wait()


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
            tasks += [group.create_task(write_forever(link)) for link, _ in pairs]
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
            tasks = [group.create_task(work) for work in (receive(), write_forever(agent), write_forever(master))]
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


def test_frames_are_as_large_as_the_other_end_takes(tmp_path: Path) -> None:
    """An older version ends the connection for a frame of more than 64 KiB."""
    path = tmp_path / "log"
    path.write_bytes(b"".join(b"%d\n" % number for number in range(10**6))[: 2 * est.LARGE_CHUNK_BYTES])

    async def frames(features: list[str]) -> list[bytes]:
        here, there = (est.Link(wire, squeeze=est.DEFLATED_FORM) for wire in est.QueueWire.pair())
        here.agree(features)
        here.open_log("20260101-000000-0000", "h", path)
        found, size = list[bytes](), 0
        async with asyncio.timeout(30), asyncio.TaskGroup() as group:
            writer = group.create_task(write_forever(here))
            here.on_have(est.Have(est.decode_message(str(await there.wire.recv())).channel, 0, rewind=True))
            while size < 2 * est.LARGE_CHUNK_BYTES:
                frame = await there.wire.recv()
                assert isinstance(frame, bytes)
                found.append(frame)
                size += len(est.decode_chunk(frame)[2])
            writer.cancel()
        return found

    bare, deflated = list(est.FEATURES), [est.LARGE_FEATURE]
    for features, form, most in (
        ([], est.DEFLATED_FORM, est.CHUNK_BYTES),
        (deflated, est.DEFLATED_FORM, est.LARGE_CHUNK_BYTES),
        (bare, est.BARE_FORM, est.LARGE_CHUNK_BYTES),
    ):
        found = asyncio.run(frames(features))
        chunks = [est.decode_chunk(frame)[2] for frame in found]
        assert max(map(len, chunks)) == most and b"".join(chunks) == path.read_bytes()
        assert {frame[0] for frame in found} == {form}


def test_what_begins_like_noise_is_not_deflated_to_its_end() -> None:
    """It is sent as it is in any case, after all the work; what deflates well is not missed for that."""
    noise = random.Random(3).randbytes(est.LARGE_CHUNK_BYTES)
    text = b"".join(b"line %d\n" % number for number in range(30_000))[: est.LARGE_CHUNK_BYTES]
    begun, late = noise[: est.CHUNK_BYTES] + text[est.CHUNK_BYTES :], text[: est.CHUNK_BYTES] + noise[est.CHUNK_BYTES :]
    half = text[: est.CHUNK_BYTES * 3] + noise[: est.CHUNK_BYTES]
    plain = est.encode_chunk(1, 7, b"x")[0]
    for data, form in [(text, est.BARE_FORM), (half, est.BARE_FORM), (begun, plain), (late, plain), (noise, plain)]:
        frame = est.encode_chunk(1, 7, data, est.BARE_FORM)
        assert frame[0] == form
        assert est.decode_chunk(frame) == (1, 7, data)


def test_the_disk_begins_with_a_flood_before_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who makes a long log durable would wait for all of it then; and a disk that hangs holds up no writer."""
    if not hasattr(os, "posix_fadvise"):
        pytest.skip("this system has no word for it")
    asked, goes = list[tuple[Path, int, int]](), threading.Event()
    advise = os.posix_fadvise

    def record(fd: int, begin: int, length: int, advice: int) -> None:
        goes.wait(30)
        advise(fd, begin, length, advice)
        asked.append((Path(f"/proc/self/fd/{fd}").resolve(), begin, begin + length))

    monkeypatch.setattr(os, "posix_fadvise", record)
    before = b"begun\n" * 1000
    written, received = tmp_path / "written", tmp_path / "received"
    for path in (written, received):
        path.write_bytes(before)
    piece = (b"x" * 99 + b"\n") * 10_000
    count = 3 * est.AHEAD_BYTES // len(piece)
    writer = est.LogWriter(written, lambda: None)

    async def receive() -> None:
        wire, _ = est.QueueWire.pair()
        link = est.Link(wire)
        link.accept_log(est.Log(1, "20260101-000000-0000", "h", 0), received, lambda _: None)
        size = len(before)
        while size < writer.size:
            data = piece[: est.LARGE_CHUNK_BYTES]
            link.on_chunk(est.encode_chunk(1, size, data))
            size += len(data)

    for _ in range(count):
        assert writer.write(piece)
    asyncio.run(receive())
    assert not asked, "nobody waited for the disk"
    goes.set()
    for path in (written, received):
        size = path.stat().st_size
        least = size - est.AHEAD_BYTES
        assert least > est.AHEAD_BYTES

        def told(path: Path = path, least: int = least) -> bool:
            return any(where == path and end > least for where, _, end in asked)

        wait_for(told, f"the disk is told of {path.name}", 30)
        spans = sorted((begin, end) for where, begin, end in asked if where == path)
        begins, ends = zip(*spans, strict=True)
        assert begins == (len(before), *ends[:-1]), "of each byte once, and of none that was there before"
        assert all(end % 4096 == 0 and end <= size for end in ends), "not of the page that is still written to"


def test_who_reads_the_file_is_told_sizes(tmp_path: Path) -> None:
    """One word for all that came meanwhile, none past the window while the reader stands still, and bytes as soon
    as it wants bytes. What is no more than a line is sent as it is."""
    path, run_id = tmp_path / "log", "20260101-000000-0000"
    path.write_bytes(b"x" * 5000)

    async def talk() -> None:
        here, there = (est.Link(wire) for wire in est.QueueWire.pair())

        async def growth() -> int:
            found = est.decode_growth(cast(bytes, await there.wire.recv()))
            assert found and found[0] == 1
            return found[1]

        here.open_log(run_id, "h", path)
        async with asyncio.timeout(30), asyncio.TaskGroup() as group:
            writer = group.create_task(write_forever(here))
            await there.wire.recv()
            here.on_have(est.Have(1, 0, rewind=True, from_file=True))
            assert await growth() == 5000
            with path.open("ab") as log:
                log.write(b"a line\n")
            here.grew(run_id, "h", 5007)
            assert est.decode_chunk(cast(bytes, await there.wire.recv())) == (1, 5000, b"a line\n")
            here.grew(run_id, "h", 50 * est.WINDOW_BYTES)
            assert await growth() == 50 * est.WINDOW_BYTES, "the file is there already: a window holds nothing up"
            here.grew(run_id, "h", 51 * est.WINDOW_BYTES)
            here.grew(run_id, "h", 52 * est.WINDOW_BYTES)
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(there.wire.recv(), 0.2)
            here.on_have(est.Have(1, 50 * est.WINDOW_BYTES))
            assert await growth() == 52 * est.WINDOW_BYTES
            here.on_have(est.Have(1, 40, rewind=True))  # it can't read it: bytes, from there
            assert est.decode_chunk(cast(bytes, await there.wire.recv())) == (1, 40, b"x" * 4960 + b"a line\n")
            writer.cancel()

    asyncio.run(talk())


@pytest.mark.parametrize("lost", ["nothing", "the file", "the folder"])
def test_a_commander_beside_the_master_reads_its_logs(tmp_path: Path, lost: str) -> None:
    """Where it can't, the master sends what is missing, and no byte comes twice."""
    run_id, state = "20260101-000000-0000", est.StateFolder(tmp_path)
    log, whole = state.log_file(run_id, "h"), b"".join(b"line %d\n" % number for number in range(100_000))
    log.parent.mkdir(parents=True)
    log.write_bytes(whole)

    class Master:
        """It tells sizes to who asks for them, and bytes to who does not."""

        def __init__(self) -> None:
            self.wire, self.folder = self, state if lost != "the folder" else None
            self.says: deque[Any] = deque([est.Log(7, run_id, "h", 100)])
            self.asked: list[tuple[int, bool]] = []

        def attend(self) -> None: ...

        def send(self, message: Any) -> None:
            if not (isinstance(message, est.Have) and message.rewind):
                return
            self.asked.append((message.size, message.from_file))
            if message.from_file:
                self.says += [est.encode_growth(7, size) for size in (100, 100, 300_000, len(whole))]
                return
            for offset in range(message.size, len(whole), est.CHUNK_BYTES):
                self.says.append(est.encode_chunk(7, offset, whole[offset : offset + est.CHUNK_BYTES]))

        def receive(self, wait_s: float) -> Any:
            if lost == "the file" and self.says and self.says[0] == est.encode_growth(7, len(whole)):
                os.truncate(log, 0)
            return self.says.popleft() if self.says else None

    master, shown = Master(), b""
    source = est.LinkSource(cast(est.Caller, None), cast(Any, master), run_id)
    while len(shown) < len(whole):
        events = list(source.receive(0.01))
        assert events or master.says, "nothing more comes"
        shown += b"".join(event.data for event in events if isinstance(event, est.Piece))
    assert shown == whole
    asked = {"nothing": [(0, True)], "the file": [(0, True), (300_000, False)], "the folder": [(0, False)]}
    assert master.asked == asked[lost]


def test_a_log_that_stays_open_is_the_file_of_its_name(tmp_path: Path) -> None:
    """One that was deleted or replaced meanwhile is written and read anew, and no descriptor is left of it; of many
    logs the last few stay open."""
    path, recent = tmp_path / "log", est.Recent()
    descriptors = Path("/dev/fd")

    def held() -> int:
        return len(list(descriptors.iterdir())) if descriptors.exists() else 0

    gc.collect()  # what other tests left open is no descriptor of these logs
    before = held()
    assert recent.append(path, 0, b"one\n") == (4, False)
    assert recent.append(path, 4, b"two\n") == (8, False) and recent.append(path, 9, b"no") == (8, True)
    path.unlink()
    assert recent.append(path, 8, b"lost") == (0, True), "what belongs behind a log that is gone is asked for anew"
    assert recent.append(path, 0, b"one\ntwo\n") == (8, False) and path.read_bytes() == b"one\ntwo\n"
    logs = est.OpenLogs(est.READ_FLAGS)
    assert logs.read(path, 0, 4) == b"one\n" and logs.read(path, 8, 4) == b""
    path.unlink()
    path.write_bytes(b"one\ntwo\nand more\n")
    assert logs.read(path, 8, 99) == b"and more\n", "the file that was there before has no more"
    path.unlink()
    assert logs.read(path, 99, 1) == b"" and logs.read(tmp_path / "none", 0, 1) == b""
    for number in range(2 * est.LOGS_OPEN):
        other = tmp_path / str(number)
        assert recent.append(other, 0, b"x") == (1, False)
    assert before <= held() <= before + est.LOGS_OPEN + 2
    recent.clear()
    logs.clear()
    assert held() <= before


def test_followers_at_a_logs_end_read_it_once(tmp_path: Path) -> None:
    """What just arrived is handed on as it is; who is behind reads the file, and disturbs nobody."""
    path, recent = tmp_path / "log", est.Recent()
    path.write_bytes(b"0123456789")
    recent.keep(path, 4, b"456789")
    path.unlink()  # whoever looks into the file now finds nothing
    assert recent.read(path, 4, 100) == b"456789" and recent.read(path, 6, 3) == b"678"
    assert recent.read(path, 0, 4) == b"" and recent.read(path, 10, 4) == b""
    path.write_bytes(b"0123456789abc")
    assert recent.read(path, 0, 4) == b"0123" and recent.read(path, 8, 9) == b"89", "who was behind took its place"
    assert recent.read(path, 10, 9) == b"abc"
    path.write_bytes(b"")
    assert recent.read(path, 10, 9) == b"abc", "the second reader read the file again"
    recent.drop(path)
    assert recent.read(path, 10, 9) == b""


def test_many_messages_of_one_moment_are_few_frames(tmp_path: Path) -> None:
    """For who takes lists; whoever does not, an older version, gets each alone. In order, all the same."""
    sent = [est.Notice(f"{number} " + "x" * 100) for number in range(5000)]

    async def frames(features: list[str]) -> list[str]:
        here, there = (est.Link(wire) for wire in est.QueueWire.pair())
        here.agree(features)
        found, messages = list[str](), list[est.Notice]()
        async with asyncio.timeout(30), asyncio.TaskGroup() as group:
            writer = group.create_task(write_forever(here))
            for message in sent:
                here.post(message)
            while len(messages) < len(sent):
                found.append(str(await there.wire.recv()))
                messages += est.decode_list(found[-1])
            writer.cancel()
        assert messages == sent
        return found

    assert len(asyncio.run(frames([]))) == len(sent)
    few = asyncio.run(frames([est.LIST_FEATURE]))
    assert len(few) < 10 and max(map(len, few)) <= est.LIST_BYTES + 2


def test_hosts_that_say_little_each_do_not_stop_the_window(tmp_path: Path) -> None:
    """None of them reaches what is acknowledged at once, and together they fill the window."""
    run_id, hosts, piece = "20260101-000000-0000", 200, b"x" * 400

    class Master:
        """It has always something more to say, as long as the window has room."""

        def __init__(self) -> None:
            self.wire, self.folder = self, None
            logs = [est.Log(host, run_id, f"h{host}", 0) for host in range(hosts)]
            self.says: deque[Any] = deque(logs)
            self.sent, self.acked = [0] * hosts, [0] * hosts

        def attend(self) -> None: ...

        def send(self, message: Any) -> None:
            if isinstance(message, est.Have):
                self.acked[message.channel] = message.size

        def receive(self, wait_s: float) -> Any:
            if self.says:
                return self.says.popleft()
            if sum(self.sent) - sum(self.acked) + len(piece) > est.WINDOW_BYTES:
                return None
            host = self.sent.index(min(self.sent))
            self.sent[host] += len(piece)
            return est.encode_chunk(host, self.sent[host] - len(piece), piece)

    master = Master()
    source = est.LinkSource(cast(est.Caller, None), cast(Any, master), run_id)
    arrived = 0
    while arrived < 4 * est.WINDOW_BYTES:
        events = list(source.receive(1.0))
        assert events, "the master had to wait for a silence"
        arrived += sum(len(event.data) for event in events if isinstance(event, est.Piece))


def test_a_stop_in_the_moment_in_which_the_connection_ends_is_heard() -> None:
    """Else the daemon dials again, whatever told it to end."""

    class Wire(est.Wire):
        def __init__(self) -> None:
            self.ended = asyncio.Event()

        async def send(self, frame: str | bytes) -> None: ...

        async def recv(self) -> str | bytes:
            await self.ended.wait()
            raise EOFError

        def abort(self) -> None: ...

    async def stop_after(turns: int) -> tuple[bool, BaseException | None]:
        wire = Wire()
        serving = asyncio.ensure_future(est.Peer(est.Link(wire)).serve(lambda _, frame: None))
        await asyncio.sleep(0.01)
        wire.ended.set()
        for _ in range(turns):
            await asyncio.sleep(0)
        was_running = serving.cancel()
        [end] = await asyncio.gather(serving, return_exceptions=True)
        return was_running, end

    ends = [asyncio.run(stop_after(turns)) for turns in range(8)]
    assert [was_running for was_running, _ in ends][::7] == [True, False]
    for was_running, end in ends:
        assert isinstance(end, asyncio.CancelledError if was_running else EOFError), ends


def test_what_is_held_of_logs_is_bounded(tmp_path: Path) -> None:
    recent, half = est.Recent(), est.RECENT_BYTES // 2
    for number in range(4):
        recent.keep(tmp_path / str(number), 0, b"x" * half)
    held = [number for number in range(4) if recent.read(tmp_path / str(number), 0, 1)]
    assert held == [2, 3]
    recent.clear()
    recent.keep(tmp_path / "0", 0, b"x" * half)
    assert recent.read(tmp_path / "0", 0, 1) == b"x"


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


def test_an_agent_that_comes_and_goes_is_counted(capfd: pytest.CaptureFixture[str]):
    """A hundred connections of one agent leave a few lines, the last of which says how it is."""

    async def flap() -> None:
        online: set[str] = set()
        attendance = est.Attendance(online, within_s=0.3)
        for _ in range(100):
            online.add("m")
            attendance.came("m", "127.0.0.2", "office")
            online.discard("m")
            attendance.went("m", "127.0.0.2")
        attendance.came("n", "127.0.0.3", "other")
        online.add("m")
        attendance.came("m", "127.0.0.2", "office")
        while attendance.is_counted("m"):
            await asyncio.sleep(0.01)
        attendance.went("m", "127.0.0.2")

    asyncio.run(asyncio.wait_for(flap(), 30))
    lines = [line[20:] for line in capfd.readouterr().err.splitlines()]
    assert "agent 127.0.0.3 (other) is online" in lines
    about = [line for line in lines if "127.0.0.2" in line]
    came, went = "agent 127.0.0.2 (office) is online", "warning: agent 127.0.0.2 is offline"
    said = 2 * est.FLAPS + 1
    assert about[:said] == [came, went] * est.FLAPS + [came]
    assert about[said].endswith("it is only counted now")
    assert about[said + 1 :] == [
        f"agent 127.0.0.2 came {100 - est.FLAPS} times within 0 s; now it is online", "agent 127.0.0.2 is online", went,
    ]  # fmt: skip


def test_the_room_of_a_log_that_ends_is_used_by_those_that_wait_for_it(tmp_path: Path) -> None:
    """All of the window is one log's; nothing else happens that would wake the writer."""
    run = "20260101-000000-0000"

    async def talk() -> None:
        wire, other = est.QueueWire.pair()
        link = est.Link(wire)

        def offer(channel: int, host: str, size: int) -> None:
            (tmp_path / host).write_bytes(b"x" * size)
            link.open_log(run, host, tmp_path / host)
            link.on_have(est.Have(channel, 0, rewind=True))

        async def take(size: int) -> None:
            while size:
                frame = await other.recv()
                if isinstance(frame, bytes):
                    size -= len(est.decode_chunk(frame)[2])

        async with asyncio.timeout(30), asyncio.TaskGroup() as group:
            writer = group.create_task(write_forever(link))
            offer(1, "one", est.WINDOW_BYTES)
            await take(est.WINDOW_BYTES)
            offer(2, "two", 5)
            while await other.recv() != est.encode_message(est.Log(2, run, "two", 5)):
                pass
            link.close_log(run, "one")
            await take(5)
            writer.cancel()

    asyncio.run(talk())


def test_a_thread_that_can_not_begin_gives_its_place_back(monkeypatch: pytest.MonkeyPatch) -> None:
    async def ask() -> str:
        threads = est.Threads(1)
        with monkeypatch.context() as patch, pytest.raises(RuntimeError):
            patch.setattr(threading.Thread, "start", fail)
            await threads.run(str, 1)
        async with asyncio.timeout(30):
            return await threads.run(str, 2)

    def fail(_: object) -> None:
        raise RuntimeError("can't start new thread")

    assert asyncio.run(ask()) == "2"


def test_who_waits_for_an_answer_hears_that_the_connection_ended() -> None:
    """A plan has a minute: a host that is restarted meanwhile answers over another connection, or never."""

    async def ask() -> object:
        wire, _ = est.QueueWire.pair()
        peer = est.Peer(est.Link(wire))
        serving = asyncio.ensure_future(peer.serve(lambda *_: None))
        asking = asyncio.ensure_future(peer.ask("plan", {}, 60))
        await asyncio.sleep(0)
        serving.cancel()
        async with asyncio.timeout(10):
            return await asking

    assert asyncio.run(ask()) == {"error": "its connection ended before it answered"}


@pytest.mark.parametrize("is_server", [True, False])
def test_a_message_comes_once_and_in_order_however_its_bytes_are_cut(is_server: bool) -> None:
    """Whole messages pass the library's queue and parser by; parts, pings and what is queued do not."""
    from websockets.frames import Frame, Opcode

    chance = random.Random(11)
    sent = [bytes([number]) * chance.choice((0, 1, 125, 126, 300, 65535, 65536)) for number in range(200)]

    trap = Frame(Opcode.BINARY, b"looks like a frame").serialize(mask=is_server)

    def frames(number: int) -> list[Frame]:
        """A message: in one frame or in three, and now and then a ping between them."""
        body, opcode = sent[number], chance.choice((Opcode.TEXT, Opcode.BINARY))
        if chance.random() < 0.7:
            return [Frame(opcode, body)]
        parts = [Frame(opcode, body[:1], fin=False), Frame(Opcode.CONT, body[1:9], fin=False)]
        return [*parts, Frame(Opcode.PING, b"?"), Frame(Opcode.CONT, body[9:])]

    async def talk() -> list[bytes]:
        got: list[bytes] = []
        ended = asyncio.Event()

        def take(message: str | bytes) -> None:
            got.append(message.encode() if isinstance(message, str) else message)

        async def receive(connection: Any) -> None:
            wire = est.SocketWire(connection)
            wire.deliver(take)
            with suppress(EOFError):
                while True:
                    take(await wire.recv())
            ended.set()

        async def write(writer: Any) -> None:
            for number in range(128):
                data = b"".join(frame.serialize(mask=is_server) for frame in frames(number))
                while data:
                    size = chance.choice((len(data), len(data), 1, 7, 1000))
                    writer.write(data[:size])
                    data = data[size:]
                    if chance.random() < 0.5:
                        await asyncio.sleep(0)
            mask = b"\0" * 4 if is_server else b""  # what is masked by nothing reads as it is
            writer.write(bytes([0x82, (0x80 if is_server else 0) | len(trap)]) + mask)
            await writer.drain()
            await asyncio.sleep(0.05)  # it has arrived by then, and the body comes alone
            writer.write(trap)
            await writer.drain()
            writer.close()

        await meet(is_server, receive, write)
        await ended.wait()
        return got

    assert asyncio.run(asyncio.wait_for(talk(), 60)) == [*sent[:128], trap]


async def meet(is_server: bool, receive: Callable[..., Any], write: Callable[..., Any]) -> None:
    """Our end of a connection, either of the two, to `receive`, and raw bytes of the other end to `write`."""
    from websockets.asyncio.client import connect
    from websockets.asyncio.server import ServerConnection, serve
    from websockets.headers import build_host
    from websockets.utils import accept_key, generate_key

    class Delivered(est.Delivered, ServerConnection):
        is_server = True

    if is_server:
        async with serve(receive, "127.0.0.1", 0, create_connection=Delivered, **est.SERVER_OPTIONS) as server:
            port = server.sockets[0].getsockname()[1]
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(
                f"GET / HTTP/1.1\r\nHost: {build_host('127.0.0.1', port, False)}\r\nUpgrade: websocket\r\nConnection:"
                f" Upgrade\r\nSec-WebSocket-Key: {generate_key()}\r\nSec-WebSocket-Version: 13\r\n\r\n".encode()
            )
            await reader.readuntil(b"\r\n\r\n")
            await write(writer)
            await reader.read()
        return

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        key = head.partition("Sec-WebSocket-Key: ")[2].partition("\r")[0]
        writer.write(
            "HTTP/1.1 101 Go on\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            f"Sec-WebSocket-Accept: {accept_key(key)}\r\n\r\n".encode()
        )
        await write(writer)

    async with await asyncio.start_server(answer, "127.0.0.1", 0) as listener:
        port = listener.sockets[0].getsockname()[1]
        options = {"compression": None, "max_size": est.MESSAGE_BYTES, "create_connection": est.delivered_client()}
        async with connect(f"ws://127.0.0.1:{port}", **options) as connection:
            await receive(connection)


def test_a_line_is_on_its_way_in_the_same_turn_of_the_loop(tmp_path: Path) -> None:
    """Where nothing waits in front of it; a flood, and what comes behind other words, wakes the writer."""
    path = tmp_path / "log"
    path.write_bytes(b"")

    class Wire(est.Wire):
        def __init__(self) -> None:
            self.now: list[str | bytes] = []
            self.later: list[str | bytes] = []

        def has_room(self) -> bool:
            return True

        def send_now(self, frame: str | bytes) -> None:
            self.now.append(frame)

        async def send(self, frame: str | bytes) -> None:
            self.later.append(frame)

        async def recv(self) -> str | bytes:
            raise EOFError

        def abort(self) -> None: ...

    async def talk() -> None:
        wire = Wire()
        link = est.Link(wire)
        writer = asyncio.ensure_future(write_forever(link))
        run = "20260101-000000-0000"
        link.open_log(run, "h", path)
        link.on_have(est.Have(1, 0, rewind=True))
        await asyncio.sleep(0.01)

        def grow(data: bytes) -> None:
            with path.open("ab") as file:
                file.write(data)
            link.grew(run, "h", path.stat().st_size)

        link.hides_ids = True  # of a commander: words of one turn go together
        grow(b"one\n")
        assert [est.decode_chunk(cast(bytes, frame))[2] for frame in wire.now[-1:]] == [b"one\n"]
        before, after = len(wire.now), len(wire.later)
        link.post(est.Notice("first"))
        grow(b"two\n")
        assert len(wire.now) == before, "it overtook what was posted before"
        await asyncio.sleep(0.01)
        grow(b"x" * est.CHUNK_BYTES)
        assert len(wire.now) == before, "a flood goes piece by piece"
        await asyncio.sleep(0.01)
        assert len(wire.later) == after + 3
        link.hides_ids = False  # what is said to a host is on its way at once, too, and in order
        link.post(est.Notice("second"))
        grow(b"three\n")
        assert wire.now[before] == est.encode_message(est.Notice("second"))
        assert est.decode_chunk(cast(bytes, wire.now[before + 1]))[2] == b"three\n"
        writer.cancel()

    asyncio.run(talk())


def test_a_commander_of_many_hosts_gets_few_long_frames() -> None:
    """One that hears of something now and then hears of it at once."""
    sent: list[str] = []

    class Wire(est.Wire):
        async def send(self, frame: str | bytes) -> None:
            sent.append(str(frame))

        async def recv(self) -> str | bytes:
            raise EOFError

        def abort(self) -> None: ...

    async def talk() -> None:
        link = est.Link(Wire())
        link.hides_ids = link.lists = True
        link.start(asyncio.ensure_future)
        for number in range(5):
            link.post(est.Notice(f"seldom {number}"))
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            assert len(sent) == number + 1
        await asyncio.sleep(2 * est.GATHER_WITHIN_S)
        began, turns = time.monotonic(), 0
        while time.monotonic() - began < 3 * est.GATHER_WITHIN_S:
            link.post(est.Notice("often"))
            turns += 1
            await asyncio.sleep(0)
        await asyncio.sleep(2 * est.GATHER_S)
        frames = sent[5:]
        assert sum(text.count("often") for text in frames) == turns
        windows = (time.monotonic() - began) / est.GATHER_WITHIN_S + 1
        most = windows * (est.GATHER_AFTER + est.GATHER_WITHIN_S / est.GATHER_S)
        assert len(frames) <= most and len(frames) < turns / 3, (len(frames), most, turns)

    asyncio.run(talk())
