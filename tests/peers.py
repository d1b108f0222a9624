"""Peers that do not keep to the rules: scripted clients and masters that say whatever a test has them say."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect
from websockets.sync.server import ServerConnection, serve

from tests import seam as est
from tests.fleet import Fleet

MACHINE = "ab" * 16


class Peer:
    """A client at an address of its own; it says hello unless it is told not to."""

    def __init__(
        self, fleet: Fleet, source: str, role: str = "", machine: str = MACHINE, token: bytes | None = None,
        keys: dict[str, str] | None = None, name: str = "stranger",
    ) -> None:  # fmt: skip
        self.socket = connect(
            fleet.url, source_address=(source, 0), proxy=None, compression=None, max_size=None, max_queue=None
        ).__enter__()
        self.heard: list[Any] = []
        if not role:
            return
        features = [] if keys is None else [est.KEY_FEATURE]  # without, an older version
        hello = est.Hello(
            role, [1, 1], "9.9", machine if role == "agent" else "", name, "n", features=features
        )  # fmt: skip
        talk = est.greeting(hello, token, "00" * 16, keys)
        message = next(talk)
        try:
            while True:
                self.say(message)
                message = talk.send(self.hear())
        except StopIteration as end:
            self.welcome: est.Welcome = end.value

    def say(self, message: Any) -> None:
        """A message, JSON as it is, or a frame."""
        if isinstance(message, dict):
            message = json.dumps(message)
        self.socket.send(message if isinstance(message, str | bytes) else est.encode_message(message))

    def hear(self, timeout_s: float = 30) -> Any:
        """The next message; None at the end of the connection."""
        with suppress(ConnectionClosed):
            frame = self.socket.recv(timeout=timeout_s)
            self.heard.append(est.decode_message(frame) if isinstance(frame, str) else frame)
            return self.heard[-1]
        return None

    def until(self, wanted: Callable[[Any], Any]) -> Any:
        """The next message that is wanted; whatever comes before it is only kept."""
        while (message := self.hear()) is not None:
            if wanted(message):
                return message
        raise AssertionError(f"the connection ended; it brought {self.heard[-5:]}")

    def refused(self, message: Any) -> str:
        """What the master answers to a message that it does not take."""
        self.say(message)
        return str(self.until(lambda answer: isinstance(answer, est.Refuse)).what)

    def close(self) -> None:
        self.socket.close()

    def __enter__(self) -> Peer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class FalseMaster:
    """A server at masterUrl that answers each frame with what `answer` makes of it; it keeps what it was told."""

    def __init__(self, address: str, port: int, answer: Callable[[Any], list[Any]]) -> None:
        self.told: list[Any] = []
        self.ended = 0

        def talk(socket: ServerConnection) -> None:
            with suppress(ConnectionClosed):
                for frame in socket:
                    self.told.append(est.decode_message(frame) if isinstance(frame, str) else frame)
                    for message in answer(self.told[-1]):
                        socket.send(est.encode_message(message))
            self.ended += 1

        self.server = serve(talk, address, port, compression=None)
        self.thread = threading.Thread(target=self.server.serve_forever)
        self.thread.start()

    def __enter__(self) -> FalseMaster:
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.thread.join()


def files_of(folder: Path) -> dict[str, bytes]:
    """Every file below a folder and what is in it."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
