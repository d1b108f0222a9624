"""What is put into the store is on disk in the end, in order, and is read as put meanwhile."""

from __future__ import annotations

import asyncio
import json
import os
import threading
import time
from collections.abc import Coroutine
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests import seam as est
from tests.fleet import unavailable
from tests.seam import program


def test_what_is_put_is_read_at_once_and_kept(tmp_path: Path) -> None:
    store, file = est.Store(), tmp_path / "runs" / "one.json"
    for number in range(50):
        store.put(file, b'{"n": %d}' % number)
        assert store.read(file) == (est.Reading.VALUE, {"n": number})
    assert store.flush(10.0)
    assert est.read_json(file) == {"n": 49}
    assert asyncio.run(store.kept(file)) is None and not store.waits_in(file.parent)


def test_what_the_disk_refuses_is_tried_again(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    store, folder = est.Store(), tmp_path / "runs"
    folder.write_bytes(b"in the way")
    file, other = folder / "one.json", tmp_path / "other.json"
    heard: list[bool] = []
    store.put(file, b"{}")
    store.when_kept(file, lambda: heard.append(True))
    store.put(other, b"{}")
    assert isinstance(asyncio.run(store.kept(file)), OSError)
    assert asyncio.run(store.kept(other)) is None, "one refusal is none of the others"
    assert heard == [] and store.names(folder) == {"one.json"} and store.waits_in(folder)
    folder.unlink()
    assert store.flush(10 * est.DISK_RETRY_S) and est.read_json(file) == {}
    assert heard == [True]
    assert capfd.readouterr().err.count("can't write") == 1
    folder.joinpath("one.json").unlink()
    folder.rmdir()
    folder.write_bytes(b"again")
    store.put(file, b"{}")
    assert isinstance(asyncio.run(store.kept(file)), OSError)
    store.drop(file)
    assert store.flush(1.0) and not store.waits_in(folder)


def test_a_look_tells_missing_torn_and_unreadable_apart(tmp_path: Path) -> None:
    state = est.StateFolder(tmp_path)
    state.create()
    job = est.JobRecord("20261122-210501-7f3a", "127.0.0.1", "a" * 32, est.Kind.DEPLOY, "master")
    path = state.job_file(job.run, job.host)
    assert est.look_into_json(path)[0] is est.Reading.MISSING and state.load_job(job.run, job.host) is None
    state.save_job(job)
    assert state.load_job(job.run, job.host) == job
    path.write_bytes(b'{"run": ')
    assert est.look_into_json(path)[0] is est.Reading.TORN and state.load_job(job.run, job.host) is None
    assert state.is_damaged(job.run, job.host)
    path.unlink()
    path.mkdir()
    if os.name == "nt":
        unavailable("a folder is no file that can't be read here")
    assert est.look_into_json(path)[0] is est.Reading.UNREADABLE
    with pytest.raises(OSError, match="can't be read now"):
        state.load_job(job.run, job.host)


def test_a_list_is_kept_for_all_who_wait_by_a_few_writes(tmp_path: Path) -> None:
    """A thousand hosts that are given their keys at once: nobody goes on before his is on disk."""
    store, file = est.Store(), tmp_path / "keys.json"
    known: list[int] = []
    made = 0

    def render() -> bytes:
        nonlocal made
        made += 1
        return json.dumps({"known": known}).encode()

    async def come(number: int) -> None:
        known.append(number)
        assert await store.keep(file, render) is None
        assert number in (est.read_json(file) or {})["known"]

    async def come_in_turn(stream: int) -> None:
        for number in range(20):
            await come(1000 * (stream + 1) + number)

    async def all_come() -> None:
        nonlocal made
        await asyncio.gather(*map(come, range(1000)))
        assert made <= 3, "each who waits while a list is written is in the next one"
        made = 0
        await asyncio.gather(*map(come_in_turn, range(50)))
        assert made <= 30, "nor does a newcomer hold up those whose list is on disk already"

    asyncio.run(all_come())
    file.unlink()
    tmp_path.joinpath("keys.json").mkdir()
    assert isinstance(asyncio.run(store.keep(file, render)), OSError)
    file.rmdir()
    assert store.flush(10 * est.DISK_RETRY_S)


def test_a_cancel_is_answered_once_it_is_on_disk(tmp_path: Path) -> None:
    """A master that dies right after the answer comes back with it: the host may be away until then."""
    store, file = est.Store(), tmp_path / "run.json"

    def cancel(run: str, by: str) -> str:
        store.put(file, b'{"cancelled": true}')
        return run

    state = SimpleNamespace(store=store, run_file=lambda run: file)
    queue = SimpleNamespace(cancel=cancel)
    master: Any = SimpleNamespace(state=state, queue=queue, registry=None, ledger=None)
    for _ in range(20):
        answer: Any = asyncio.run(est.Desk(master).cancel("20261122-210501-7f3a", "x"))
        assert answer == "20261122-210501-7f3a"
        assert est.read_json(file) == {"cancelled": True}
        file.unlink()
    tmp_path.joinpath("folder").write_bytes(b"")
    file = tmp_path / "folder" / "run.json"
    assert asyncio.run(est.Desk(master).cancel("20261122-210501-7f3a", "x")), "no disk is no reason not to stop"
    store.drop(file)


def test_what_is_put_while_the_disk_refuses_another_does_not_wait_for_its_turn(tmp_path: Path) -> None:
    """A result's acknowledgement would come as late as the next try of a file that has nothing to do with it."""
    store, refusing, other = est.Store(), tmp_path / "refused", tmp_path / "other.json"
    refusing.mkdir()
    write_file = store._write_file

    def put_another(path: Path, write: Any, data: bytes) -> None:
        if path == refusing:
            store.put(other, b"{}")
            raise OSError(28, "No space left on device")
        write_file(path, write, data)

    store._write_file = put_another  # type: ignore[method-assign]
    store.put(refusing, b"{}")
    began = time.monotonic()
    while store.waits_in(tmp_path) and not other.exists():
        assert time.monotonic() - began < est.DISK_RETRY_S / 2, "it waits for the other's next try"
        time.sleep(0.01)
    store.drop(refusing)
    assert store.flush(10.0)


def wait(told: Coroutine[Any, Any, Any]) -> Any:
    """What it comes to, but not for ever."""

    async def within() -> Any:
        async with asyncio.timeout(30):
            return await told

    return asyncio.run(within())


def test_no_fault_in_one_file_ends_the_writing_of_all_others(tmp_path: Path) -> None:
    """The thread that writes is one for all: what it does not get over, nobody's word is kept after."""
    store, odd, other = est.Store(), tmp_path / "odd", tmp_path / "other.json"
    write_file = store._write_file
    heard: list[str] = []

    def fail_for_one(path: Path, write: Any, data: bytes) -> None:
        if path == odd:
            raise MemoryError("no room for it")
        write_file(path, write, data)

    def fall() -> None:
        raise ValueError("one who waits has a fault of his own")

    store._write_file = fail_for_one  # type: ignore[method-assign]
    store.put(odd, b"{}")
    store.put(other, b"{}")
    for then in (fall, lambda: heard.append("kept")):
        store.when_kept(other, then)
    refused = wait(store.kept(odd))
    assert isinstance(refused, OSError) and "no room for it" in str(refused)
    assert wait(store.kept(other)) is None
    store.put(other, b'{"again": true}')
    assert wait(store.kept(other)) is None and est.read_json(other) == {"again": True}
    store.drop(odd)
    assert store.flush(10.0)


def test_a_thread_that_can_not_begin_now_begins_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, file, heard = est.Store(), tmp_path / "one.json", []

    def refuse(_: object) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        store.put(file, b"{}")
        store.when_kept(file, lambda: heard.append("kept"))
        assert isinstance(asyncio.run(store.kept(file)), OSError), "who asks is told that it is not there"
    store.put(tmp_path / "other.json", b"{}")
    assert store.flush(10.0) and heard == ["kept"] and est.read_json(file) == {}


def test_what_somebody_waits_for_as_long_as_it_takes_is_not_dropped(tmp_path: Path) -> None:
    """The job was ended while its order was on its way: the end is to be kept, and its host to be told of it."""
    store, folder = est.Store(), tmp_path / "runs"
    folder.write_bytes(b"in the way")
    file, heard = folder / "one.json", []
    store.put(file, b'{"state": "queued"}')
    assert isinstance(asyncio.run(store.kept(file)), OSError)
    store.put(file, b'{"state": "cancelled"}')
    store.when_kept(file, lambda: heard.append("kept"))
    store.drop(file)
    folder.unlink()
    store.put(tmp_path / "other.json", b"{}")
    assert store.flush(10 * est.DISK_RETRY_S)
    assert heard == ["kept"] and est.read_json(file) == {"state": "cancelled"}


def test_what_is_put_after_a_refusal_is_tried_before_it_is_called_refused(tmp_path: Path) -> None:
    store, folder = est.Store(), tmp_path / "runs"
    folder.write_bytes(b"in the way")
    file = folder / "one.json"
    store.put(file, b"{}")
    assert isinstance(asyncio.run(store.kept(file)), OSError)
    folder.unlink()
    store.put(file, b'{"there is": "room"}')
    assert asyncio.run(store.kept(file)) is None and est.read_json(file) == {"there is": "room"}


def test_what_lingers_is_written_once_for_all_that_comes_within_a_moment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And at once for who waits, or when it comes to be promised."""
    linger_s = 2.0
    monkeypatch.setattr(program, "LINGER_S", linger_s)
    store, file = est.Store(), tmp_path / "one.json"
    written: list[bytes] = []
    write_file = store._write_file

    def count(path: Path, write: Any, data: bytes) -> None:
        written.append(data)
        write_file(path, write, data)

    store._write_file = count  # type: ignore[method-assign]
    for number in range(10):
        store.put(file, b'{"n": %d}' % number, durable=False, lingers=True)
        assert store.read(file) == (est.Reading.VALUE, {"n": number})
    assert written == []
    deadline = time.monotonic() + 30
    while store.waits_in(tmp_path):
        assert time.monotonic() < deadline, "it is never written"
        time.sleep(0.01)
    assert written == [b'{"n": 9}'] and est.read_json(file) == {"n": 9}
    store.put(file, b'{"n": 10}', durable=False, lingers=True)
    began = time.monotonic()
    assert asyncio.run(store.kept(file)) is None and est.read_json(file) == {"n": 10}
    store.put(file, b'{"n": 11}', durable=False, lingers=True)
    told = threading.Event()
    store.when_kept(file, told.set)
    assert told.wait(30) and est.read_json(file) == {"n": 11}
    store.put(file, b'{"n": 12}', durable=False, lingers=True)
    assert store.flush(30) and est.read_json(file) == {"n": 12}
    store.put(file, b'{"n": 13}', durable=False, lingers=True)
    store.put(file, b'{"n": 14}')
    while est.read_json(file) != {"n": 14}:
        assert time.monotonic() < began + 30
    assert time.monotonic() < began + linger_s, "who waits, waits for nothing but the disk"
    assert len(written) == 5
