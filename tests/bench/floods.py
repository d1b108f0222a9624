#!/usr/bin/env python3
"""Live lines while the master's port is flooded: python3 -m tests.bench.floods

An agent prints the time every 20 ms; the delay of each line at the commander is measured without an attack and under
each one. Nothing here asserts a figure.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests import floods
from tests.commands import COMMAND, write_script
from tests.fleet import Fleet

A, B, ALLOWED = "127.0.0.1", "127.0.0.2", "127.0.0.8"
PRINTER = "import time\nwhile True:\n    print(time.time_ns(), flush=True)\n    time.sleep(0.02)\n"


def attack(kind: Callable[..., Any], words: tuple[Any, ...], ends: Any) -> None:
    ends.put(asyncio.run(kind(*words)))


def measure(one: Fleet, name: str, kind: Callable[..., Any] | None, *words: Any) -> None:
    """The delays of a live line during one attack, and what it cost the master in memory."""
    assert one.master.process
    watcher = one.popen("trigger", B, "master")
    assert watcher.stdout
    ends: Any = multiprocessing.Queue()
    attacker = multiprocessing.Process(target=attack, args=(kind, (one.port, *words), ends)) if kind else None
    delays: list[float] = []
    peak, before, began = 0.0, floods.rss_mb(one.master.process.pid), 0.0
    for line in watcher.stdout:
        now, word = time.time_ns(), line.split()[-1]
        if not (len(word) == 19 and word.isdigit()):
            continue
        if not began:
            began = time.monotonic()
            if attacker:
                attacker.start()
        delays.append((now - int(word)) / 1e6)
        peak = max(peak, floods.rss_mb(one.master.process.pid))
        over = not attacker.is_alive() if attacker else len(delays) > 300
        if over and len(delays) > 100:
            break
    one.cli("cancel", one.runs()[-1].name)
    watcher.communicate()
    delays.sort()
    p50, p99 = delays[len(delays) // 2], delays[int(len(delays) * 0.99)]
    print(f"{name:<44} {len(delays):5} lines  p50 {p50:6.1f} ms  p99 {p99:6.1f} ms  max {delays[-1]:6.1f} ms", end="  ")
    print(f"master {before:.0f} MB, at most {peak:.0f} MB  {dict(ends.get()) if attacker else ''}", flush=True)


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="floods-") as folder:
        one = Fleet(Path(folder), 2, COMMAND, {"whitelist": [A, B, ALLOWED]})
        (one.agents[0].folder / "printer.py").write_text(PRINTER)
        write_script(f"exec {sys.executable} ../printer.py\n", *one.hosts)
        try:
            one.start()
            measure(one, "no attack", None)
            measure(one, "2,000 refused from as many addresses", floods.refused, 2000)
            measure(one, "2,000 refused from one address", floods.refused, 2000, 50, "127.0.0.66")
            measure(one, "2,000 handshakes of a byte a second", floods.slow, 2000)
            measure(one, "200 of them from an allowed address", floods.slow, 200, 1.0, ALLOWED)
            measure(one, "garbage, TLS, giant headers x 10", floods.rubbish, 10)
            measure(one, "malformed and oversized frames x 10", floods.bad_frames, ALLOWED, 10)
            measure(one, "no attack, afterwards", None)
            assert one.master.process
            print(f"lines that the master wrote: {one.master.stderr.count(chr(10))}")
        finally:
            one.stop_all()


if __name__ == "__main__":
    main()
