"""A terminal for the tests: a real pty, and pyte to say what a person would see and find in the scrollback."""

from __future__ import annotations

import fcntl
import os
import pty
import select
import struct
import subprocess
import termios
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import pyte

from tests.fleet import READY_S, wait_for


class Terminal:
    """A program at a terminal of `columns` by `lines`."""

    def __init__(
        self,
        argv: Sequence[str | Path],
        env: Mapping[str, str],
        cwd: Path,
        columns: int = 80,
        lines: int = 24,
        stderr: int | None = None,
    ) -> None:
        self.screen = pyte.HistoryScreen(columns, lines, history=100_000, ratio=0.5)
        self.stream = pyte.ByteStream(self.screen)
        self.raw = b""
        self.master, slave = pty.openpty()
        self.resize(columns, lines)
        self.process = subprocess.Popen(
            [*map(str, argv)],
            stdin=slave,
            stdout=slave,
            stderr=slave if stderr is None else stderr,
            env={"TERM": "xterm-256color", "LANG": "C.UTF-8", **env},
            cwd=cwd,
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        )
        os.close(slave)

    def resize(self, columns: int, lines: int) -> None:
        """As by a person who drags the window's corner; the program is not told more than any is."""
        fcntl.ioctl(self.master, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))
        if (columns, lines) != (self.screen.columns, self.screen.lines):
            self.screen.resize(lines, columns)

    def read(self, for_s: float = 0.05) -> bool:
        """Take what the program wrote; whether there may be more."""
        ends = time.monotonic() + for_s
        while select.select([self.master], [], [], max(0.0, ends - time.monotonic()))[0]:
            try:
                data = os.read(self.master, 65536)
            except OSError:  # EIO: nobody has the other end any more
                return False
            if not data:
                return False
            self.raw += data
            self.stream.feed(data)
            if time.monotonic() > ends:
                break
        return True

    def type(self, keys: str) -> None:
        os.write(self.master, keys.encode())

    def until(self, condition: Callable[[], object], what: str) -> None:
        """Read on until a condition of what is on the screen holds."""

        def look() -> object:
            self.read()
            return condition()

        wait_for(look, lambda: f"{what}:\n" + "\n".join(self.shown()))

    def wait(self) -> int:
        """Read to the program's end; its exit status."""
        ends = time.monotonic() + READY_S
        while self.read(0.2) and time.monotonic() < ends:
            pass
        return self.process.wait(5)

    def close(self) -> None:
        with suppress(ProcessLookupError):
            self.process.kill()
        self.process.wait()
        os.close(self.master)

    def shown(self) -> list[str]:
        """The lines on the screen."""
        return [line.rstrip() for line in self.screen.display]

    def all_lines(self) -> list[str]:
        """What a person finds by scrolling back, and the screen."""
        rows = []
        for row in self.screen.history.top:
            cells = [row[at].data for at in range(self.screen.columns)]
            rows.append("".join(cells).rstrip())
        return rows + self.shown()
