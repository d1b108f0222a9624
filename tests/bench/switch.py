#!/usr/bin/env python3
"""Switches by the hundred: python3 tests/bench/switch.py load|tls|kill [ROUNDS]

load, tls: what clients of all kinds (and wrk) lose, and which requests the old colour still answers after a switch.
kill: the switch's process dies at any moment, every second time with its daemon; what is left must come right alone.
"""

from __future__ import annotations

import bisect
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.commands import Watched, job_of
from tests.fleet import Fleet, kill_processes_of, processes_of, wait_for
from tests.haproxy import Load, Proxy

OTHER = {"blue": "green", "green": "blue"}


def under_load(proxy: Proxy, fleet: Fleet, rounds: int, tls: bool) -> None:
    scheme = "https" if tls else "http"
    wrk = subprocess.Popen(
        ["wrk", "-t1", "-c8", f"-d{rounds * 12}s", f"{scheme}://127.0.0.1:{proxy.port}/"],
        stdout=subprocess.PIPE,
        text=True,
    )
    with Load(proxy.port, tls=tls, keep=12, new=4, slow=8, think_s=0.05) as load:
        moves: list[tuple[float, float, str]] = []
        for _ in range(rounds):
            color, began = OTHER[proxy.roles()], time.time()
            code, out, err = fleet.cli("switch", color)
            assert code == 0, out + err
            moves.append((began, time.time(), color))
            time.sleep(1)  # what is answered by the old colour now is late
        answers, failed = load.end()
    wrk.send_signal(signal.SIGINT)
    said, _ = wrk.communicate()
    ends = [end for _, end, _ in moves]
    late: Counter[str] = Counter()
    for at, color in answers:
        number = bisect.bisect(ends, at) - 1
        settled = number >= 0 and (number + 1 == len(moves) or at < moves[number + 1][0])
        late["after a switch, by the new colour" if settled and color == moves[number][2] else
             "after a switch, by the old colour" if settled else "while one was under way"] += 1  # fmt: skip
    seconds = sorted(end - began for began, end, _ in moves)
    print(f"{scheme}: {rounds} switches, {len(answers)} answers, failed: {failed or 0}, {dict(late)}")
    print(f"a switch, command included: median {seconds[rounds // 2]:.2f} s, longest {seconds[-1]:.2f} s")
    print("\n".join(line for line in said.splitlines() if "requests in" in line or "rror" in line or "Non-2xx" in line))


def with_deaths(proxy: Proxy, fleet: Fleet, rounds: int) -> None:
    text = {proxy.roles(): proxy.file.read_bytes()}
    ends: Counter[str] = Counter()
    slowest = 0.0
    with Load(proxy.port) as load:
        for number in range(rounds):
            before = proxy.roles()
            watched = Watched(fleet, "switch", OTHER[before])
            log = fleet.master.state / "runs" / watched.run / "127.0.0.1.log"
            wait_for(log.exists, "the job begins")
            time.sleep(random.uniform(0, 0.8))
            phase = ([line for line in log.read_text().splitlines() if line.endswith("...")] or ["gate..."])[-1]
            with suppress(ProcessLookupError):
                if pid := next(
                    (pid for pid, argv in processes_of(fleet.tmp_path).items() if " run-job " in argv), None
                ):
                    os.kill(pid, signal.SIGKILL)
            if number % 2:
                fleet.kill(fleet.master)
            file = proxy.file.read_bytes()
            assert file == text.setdefault(proxy.roles(), file), "neither old nor new"
            assert proxy.answers() in OTHER
            if number % 2:
                fleet.start(fleet.master)
            back = time.monotonic()

            def over(run: str = watched.run) -> bool:
                calm = "DRAIN" not in "".join(proxy.statuses().values()) and proxy.roles() == proxy.live()
                left = (fleet.master.state / "switch.json").exists()
                return (
                    calm and not left and job_of(fleet, run, fleet.master)["state"] in ("succeeded", "failed", "lost")
                )

            wait_for(over, f"peace after a death at {phase}")
            slowest = max(slowest, time.monotonic() - back)
            ends[f"{phase} {job_of(fleet, watched.run, fleet.master)['state']}"] += 1
            watched.end()
        _, failed = load.end()
    print(f"{rounds} deaths, failed requests: {failed or 0}, all right again after at most {slowest:.1f} s")
    for what, count in sorted(ends.items()):
        print(f"  {what}: {count}")


def main(kind: str, rounds: int) -> None:
    folder = Path(tempfile.mkdtemp(prefix="switch-"))
    proxy = Proxy(folder / "haproxy", tls=kind == "tls")
    (folder / "fleet").mkdir()
    fleet = Fleet(folder / "fleet", hosts=1, config={"haproxy": proxy.rule})
    try:
        proxy.start()
        fleet.start()
        with_deaths(proxy, fleet, rounds) if kind == "kill" else under_load(proxy, fleet, rounds, kind == "tls")
    finally:
        fleet.stop_all()
        kill_processes_of(folder / "fleet")
        proxy.close()
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 50)
