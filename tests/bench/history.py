#!/usr/bin/env python3
"""How long `history` takes with many recorded runs: python3 tests/bench/history.py [RUNS]

Without the index (as after a loss of it), with it, and a start of the daemon's memory. Nothing here asserts a figure.
"""

from __future__ import annotations

import json
import random
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests import seam as est

HOSTS = {f"127.0.0.{i}": f"{i:032x}" for i in (1, 2, 3)}


def record(state: est.StateFolder, number: int) -> None:
    """One run of three hosts, of which one in ten fails."""
    created = 1_760_000_000.0 + 600 * number
    run = time.strftime("%Y%m%d-%H%M%S-", time.gmtime(created)) + f"{number % 65536:04x}"
    order = est.RunRecord(
        run, "n", est.Kind.DEPLOY, "all", "master", list(HOSTS), HOSTS, {host: host for host in HOSTS}, created, "me"
    )
    (state.runs / run).mkdir()
    est.write_atomic(state.runs / run / "run.json", json.dumps(vars(order)).encode())
    for host in HOSTS:
        failed = random.random() < 0.1
        job = est.replace(
            est.job_of_run(order, host), revision=9, started=created, ended=created + random.uniform(5, 50),
            state=est.State.FAILED if failed else est.State.SUCCEEDED, version=f"v{number:04}_1", commit="7f" * 20,
            step=random.choice(["git pull origin master", "pnpm deploy:release"]) if failed else None,
        )  # fmt: skip
        state.save_job(job)


def fill(folder: Path, runs: int) -> None:
    """A state folder in which so many runs are recorded and indexed."""
    if not runs:
        return
    state = est.StateFolder(folder)
    state.create()
    est.write_atomic(folder / "machines.json", b"{}")  # or the runs' hosts would be taken for this fleet's
    for number in range(runs):
        record(state, number)
    time.sleep(est.INDEX_AFTER_S)
    state.history.rows()


def say(what: str, action: Callable[[], Any]) -> None:
    began = time.perf_counter()
    action()
    print(f"{what:<48} {(time.perf_counter() - began) * 1000:9.1f} ms")


def main() -> None:
    runs = int(sys.argv[1]) if len(sys.argv) > 1 else 10_000
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        state = est.StateFolder(Path(folder))
        state.create()
        for number in range(runs):
            record(state, number)
        time.sleep(est.INDEX_AFTER_S)
        say(f"{runs} runs: every folder read, the index written", state.history.rows)
        print(f"the index has {state.history.index.stat().st_size / 1e6:.1f} MB")
        say("history -n 20", lambda: state.history.newest(20))
        say("history --stats", lambda: est.run_stats(state.history.rows()))
        say("what a daemon reads at its start", state.history.rows)
        keep = est.KeepRule(runs=runs - 10, days=36500)
        say("deleting 10 old runs", lambda: state.history.prune(keep, tuple, time.time()))


if __name__ == "__main__":
    main()
