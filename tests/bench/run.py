#!/usr/bin/env python3
"""Speed as ratios to a floor measured in the same run: python3 tests/bench/run.py [PYZ] [--scale 200,1000] [--peers]

A master on 127.0.0.1 and an agent on 127.0.0.2 deploy from a git origin on this disk; with `--scale`, beside them so
many light agents (herd.py says what of them is simulated); with `--peers`, ssh by a server of its own on this machine,
and Fabric in a virtualenv of its own do the same no-op and the same lines; with `--runs`, masters that have recorded so
many runs answer. It ends with a table in Markdown, and writes `--svg FILE`: cost by hosts, lines and recorded runs.
Nothing here asserts a figure.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.bench.history import fill
from tests.bench.picture import Line, Panel, draw

SOURCE = Path(__file__).resolve().parents[2] / "estelle_updater.py"
ROWS: list[tuple[str, str, str, str]] = []  # what, floor, ours, ratio
PANELS: list[Panel] = []
NOOP = "git fetch origin && git checkout noop && git pull origin noop && true"
LINES = 1_000_000
LINE = "x" * 79
JOB_MEGABYTES = 1 << 16  # of a log: more than any row here writes
PRINTER = "import sys,time\nfor _ in range(300):\n    print(time.time_ns(), flush=True)\n    time.sleep(0.02)\n"
COMMANDS = {
    "noop": ["true"],
    "some": ["sh", "-c", f"yes {LINE} | head -n {LINES // 100}"],
    "many": ["sh", "-c", f"yes {LINE} | head -n {LINES // 10}"],
    "lines": ["sh", "-c", f"yes {LINE} | head -n {LINES}"],
    "live": [sys.executable, "printer.py"],
}


def run(*argv: str, cwd: Path | None = None) -> None:
    subprocess.run(argv, cwd=cwd, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def median_s(repeat: int, action: Callable[[], object]) -> float:
    """The median time of `action` in seconds; one run before it warms the caches."""
    if at_most(repeat) > 1:
        action()
    times = []
    for _ in range(at_most(repeat)):
        began = time.perf_counter()
        action()
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def at_most(repeat: int) -> int:
    """How often something is measured: with --once, to see that all of it works, once."""
    return 1 if "--once" in sys.argv else repeat


def free_port() -> int:
    """A port that nobody listens on, below those that outgoing connections, of the herd too, get in the meantime."""
    while True:
        port = random.randrange(10000, 32000)
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


class Fleet:
    """An origin with one branch per command, a master that has recorded so many runs, and agents, `hosts` together,
    as real processes."""

    def __init__(self, folder: Path, program: list[str], runs: int = 0, hosts: int = 2) -> None:
        fill(folder / "state-127.0.0.1", runs)
        self.hosts = [f"127.0.0.{number}" for number in range(1, hosts + 1)]
        self.folder, self.program = folder, program
        self.port = port = free_port()
        origin, work = folder / "origin.git", folder / "work"
        run("git", "init", "--bare", "-b", "noop", str(origin))
        run("git", "clone", str(origin), str(work))
        run("git", "config", "user.email", "bench@example.invalid", cwd=work)
        run("git", "config", "user.name", "bench", cwd=work)
        for name, command in COMMANDS.items():
            run("git", "checkout", "-B", name, cwd=work)
            config = {
                "masterUrl": f"ws://127.0.0.1:{port}",
                "whitelist": ["127.0.0.0/8"],
                "deploy": {"command": command},
                "keep": {"jobMegabytes": JOB_MEGABYTES},
            }
            (work / "config").mkdir(exist_ok=True)
            (work / "config/updater.json").write_text(json.dumps(config))
            (work / "printer.py").write_text(PRINTER)
            run("git", "add", "-A", cwd=work)
            run("git", "commit", "-m", name, cwd=work)
            run("git", "push", "origin", name, cwd=work)
        self.daemons: list[subprocess.Popen[bytes]] = []
        for index, host in enumerate(self.hosts):
            run("git", "clone", str(origin), str(folder / host))
            self.serve(host, index)
        deadline = time.monotonic() + 120
        while not {*self.hosts} <= {*self.online()}:
            if time.monotonic() > deadline:
                self.close()  # nobody else knows of them yet
                told = [(folder / f"{host}.err").read_text() for host in self.hosts]
                raise SystemExit("\n".join(["the fleet does not come up:", *told]))
            time.sleep(0.1)

    def serve(self, host: str, index: int) -> None:
        """Start a host's daemon, in the place of the one before."""
        argv = [*self.arguments(host), "serve"]
        with (self.folder / f"{host}.err").open("ab") as errors:
            self.daemons[index:] = [
                subprocess.Popen(argv, stderr=errors, stdin=subprocess.DEVNULL), *self.daemons[index + 1 :]
            ]  # fmt: skip

    def arguments(self, host: str) -> list[str]:
        config = str(self.folder / host / "config/updater.json")
        return [*self.program, "--config", config, "--state", str(self.folder / f"state-{host}"), "--bind", host]

    def online(self) -> list[str]:
        done = subprocess.run([*self.arguments("127.0.0.1"), "--json", "status"], capture_output=True)
        return [row["host"] for row in json.loads(done.stdout)["hosts"] if row["online"]] if not done.returncode else []

    def trigger(self, target: str, branch: str, stdout: int | None = subprocess.DEVNULL) -> subprocess.Popen[bytes]:
        argv = [*self.arguments("127.0.0.1"), "trigger", target, branch]
        return subprocess.Popen(argv, stdout=stdout, stderr=subprocess.DEVNULL)

    def close(self) -> None:
        for daemon in self.daemons:
            daemon.kill()
            daemon.wait()


def say(name: str, value_s: float, floor_name: str, floor_s: float) -> None:
    ROWS.append((name, f"{floor_name} {floor_s * 1000:.1f} ms", f"{value_s * 1000:.1f} ms", f"{value_s / floor_s:.2f}"))
    print(
        f"{name:<34} {value_s * 1000:9.1f} ms   {floor_name} {floor_s * 1000:9.1f} ms   ratio {value_s / floor_s:6.2f}"
    )


def bench_start(program: list[str]) -> None:
    floor = median_s(20, lambda: run(sys.executable, "-c", "pass"))
    say("--version", median_s(20, lambda: run(*program, "--version")), "python -c pass", floor)
    say("--help", median_s(10, lambda: run(*program, "--help")), "python -c pass", floor)
    say("the module's own start", own_start_s(program[-1]), "python -c pass", floor)


def own_start_s(pyz: str) -> float:
    """What the module itself takes to be imported, without what it imports; the least of some, as a wall clock also
    counts what others do on this machine."""
    code = f"import sys; sys.path.insert(0, {pyz!r}); import estelle_updater"
    found = []
    for _ in range(9):
        done = subprocess.run([sys.executable, "-X", "importtime", "-c", code], capture_output=True, text=True)
        told = re.search(r"import time: +(\d+) \|[ 0-9]+\| estelle_updater$", done.stderr, re.MULTILINE)
        assert told, done.stderr
        found.append(int(told[1]) / 1e6)
    return min(found)


def bench_noop(fleet: Fleet) -> None:
    repo = fleet.folder / "127.0.0.2"
    floor = median_s(7, lambda: run("sh", "-c", NOOP, cwd=repo))
    say("no-op deployment, one host", median_s(7, lambda: fleet.trigger("127.0.0.2", "noop").wait()), "shell", floor)
    spent = spent_s(fleet, lambda: fleet.trigger("127.0.0.2", "noop").wait())
    say("its processor time: command and daemons", spent, "shell", spent_s(fleet, lambda: run(
        "sh", "-c", NOOP, cwd=repo)))  # fmt: skip
    status = median_s(7, lambda: run(*fleet.arguments("127.0.0.1"), "status"))
    say("status", status, "python -c pass", median_s(7, lambda: run(sys.executable, "-c", "pass")))


def spent_s(fleet: Fleet, action: Callable[[], object], times: int = 5) -> float:
    """The processor time of a command and the daemons, for one of `times`; a runner is no child of theirs."""

    def so_far() -> float:
        used = os.times()
        return used.children_user + used.children_system + sum(cpu_s(daemon.pid) for daemon in fleet.daemons)

    before = so_far()
    for _ in range(at_most(times)):
        action()
    return (so_far() - before) / at_most(times)


def bench_growth(fleet: Fleet) -> None:
    """Few lines and many, for the picture."""
    ours, floor = Line("here", []), Line("lines to a file", [], is_floor=True)
    for branch, lines in (("some", LINES // 100), ("many", LINES // 10), ("lines", LINES)):
        pipe = f"yes {LINE} | head -n {lines} | cat > {fleet.folder / 'floor'}"
        floor.points.append((lines, median_s(3, lambda pipe=pipe: run("sh", "-c", pipe))))  # type: ignore[misc]
        one = lambda branch=branch: fleet.trigger("127.0.0.2", branch).wait()  # noqa: E731
        ours.points.append((lines, median_s(3, one)))
    PANELS.append(Panel("Lines of output", "seconds, from the order to the last line", "lines", [ours, floor]))


def bench_hosts(folder: Path, program: list[str], count: int) -> None:
    """The same on many hosts, which here share one machine: beside it as many shells at once."""
    folder.mkdir()
    fleet = Fleet(folder, program, hosts=count)
    shells = " & ".join(f"(cd {folder / host} && {NOOP})" for host in fleet.hosts)

    def deploy() -> None:
        code = fleet.trigger("all", "noop").wait()
        assert code == 0, f"exit {code}"

    try:
        floor = median_s(5, lambda: run("sh", "-c", f"{shells} & wait"))
        say(f"no-op deployment, {count} hosts at once", median_s(5, deploy), f"{count} shells", floor)
        floor = median_s(9, lambda: run(sys.executable, "-c", "pass"))
        status = median_s(9, lambda: run(*fleet.arguments("127.0.0.1"), "status"))
        say(f"status, {count} hosts", status, "python -c pass", floor)
    finally:
        fleet.close()


def bench_lines(fleet: Fleet) -> None:
    target = fleet.folder / "floor"
    pipe = f"yes {LINE} | head -n {LINES} | cat > {target}"
    floor = median_s(3, lambda: run("sh", "-c", pipe))
    for host in ("127.0.0.1", "127.0.0.2"):

        def deploy(host: str = host) -> None:
            with (fleet.folder / "out").open("wb") as out:
                fleet.trigger(host, "lines", out.fileno()).wait()

        value = median_s(3, deploy)
        kind = "master" if host == "127.0.0.1" else "agent"
        say(f"{LINES:,} lines of 80 bytes, {kind} to command", value, "lines to a file", floor)
        lines = sum(1 for _ in (fleet.folder / "out").open("rb"))
        print(f"{f'1M lines, {kind} to CLI':<34} {value:9.2f} s    {lines} lines arrived", end="    ")
        idle = median_s(3, lambda host=host: fleet.trigger(host, "noop").wait())  # type: ignore[misc]
        print(f"lines | cat > file {floor:6.2f} s   speed of the floor x {floor / value:5.2f}", end="   ")
        print(f"without the no-op's {idle:.2f} s: x {floor / max(value - idle, 0.001):5.2f}")


def bench_live(fleet: Fleet) -> None:
    watcher = fleet.trigger("127.0.0.2", "live", subprocess.PIPE)
    assert watcher.stdout
    delays = []
    for line in watcher.stdout:
        word = line.split()[-1]
        if len(word) == 19 and word.isdigit():
            delays.append((time.time_ns() - int(word)) / 1e6)
    watcher.wait()
    delays.sort()
    p50, p99 = delays[len(delays) // 2], delays[int(len(delays) * 0.99)]
    ROWS.append(("live line, p50 / p99", "", f"{p50:.2f} / {p99:.2f} ms", ""))
    print(f"live line each 20 ms, {len(delays)} lines: p50 {p50:.2f} ms  p99 {p99:.2f} ms  max {delays[-1]:.2f} ms")


def rss_mb(pid: int) -> float:
    """Resident memory of a process in MB."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


def bench_memory(fleet: Fleet) -> None:
    """What 1M lines cost in memory while one commander is stopped and another one watches."""
    pids = {"master": fleet.daemons[0].pid, "agent": fleet.daemons[1].pid}
    before = {name: rss_mb(pid) for name, pid in pids.items()}
    peak = dict(before)
    stalled = fleet.trigger("127.0.0.2", "lines")
    time.sleep(0.5)
    stalled.send_signal(signal.SIGSTOP)
    watching = fleet.trigger("127.0.0.2", "lines")
    while watching.poll() is None:
        peak = {name: max(peak[name], rss_mb(pid)) for name, pid in pids.items()}
        time.sleep(0.05)
    stalled.send_signal(signal.SIGCONT)
    stalled.wait()
    for name in pids:
        print(
            f"memory of the {name}, 1M lines, a commander stalled: {before[name]:.0f} MB, at most {peak[name]:.0f} MB"
        )


def peak_mb(pid: int) -> float:
    """The most resident memory of a process so far, or since that was reset, in MB; 0 of one that is gone."""
    try:
        found = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    except OSError:
        return 0.0
    return int(found[1]) * 1024 / 1e6 if found else 0.0


def bench_pass(folder: Path, program: list[str], gigabytes: float) -> None:
    """What master, agent and command hold in memory while that much of one log passes them, over what they held
    before: of a command, over one that follows a no-op."""
    folder.mkdir()
    size = round(gigabytes * 1e9 / 80) * 80
    COMMANDS["pass"] = ["sh", "-c", f"yes {LINE} | head -c {size}"]
    fleet = Fleet(folder, program)

    def watch(branch: str) -> float:
        command = fleet.trigger("127.0.0.2", branch)
        peak = 0.0
        while command.poll() is None:
            peak = max(peak, peak_mb(command.pid))
            time.sleep(0.01)
        assert command.returncode == 0, f"exit {command.returncode}"
        return peak

    try:
        pids = {"master": fleet.daemons[0].pid, "agent": fleet.daemons[1].pid}
        before = {"command": watch("noop")} | {name: rss_mb(pid) for name, pid in pids.items()}
        for pid in pids.values():
            Path(f"/proc/{pid}/clear_refs").write_text("5")  # the peak is counted from here
        began, cpu = time.perf_counter(), sum(map(cpu_s, pids.values()))
        after = {"command": watch("pass")} | {name: peak_mb(pid) for name, pid in pids.items()}
        took_s, spent = time.perf_counter() - began, sum(map(cpu_s, pids.values())) - cpu
        copies = list((folder / "state-127.0.0.1/runs").glob("*/*.log"))
        assert max(copy.stat().st_size for copy in copies) >= size, "not all of it came"
        for name, held in before.items():
            what = f"memory of the {name}, {size / 1e9:g} GB pass"
            ROWS.append((what, f"{held:.0f} MB", f"{after[name]:.0f} MB", f"+ {after[name] - held:.1f} MB"))
            print(*ROWS[-1], sep=" | ", flush=True)
        print(f"{size / took_s / 1e6:.0f} MB/s, {spent / size * 1e9:.2f} s of both daemons for each GB")
    finally:
        fleet.close()


def pss_mb(pid: int) -> float:
    """Memory of a process in MB, of what it shares with others only its part."""
    told = re.search(r"^Pss: +(\d+) kB", Path(f"/proc/{pid}/smaps_rollup").read_text(), re.MULTILINE)
    assert told
    return int(told[1]) * 1024 / 1e6


def cpu_s(pid: int) -> float:
    """Processor time of a process so far, all threads, in seconds."""
    tasks = Path(f"/proc/{pid}/task").iterdir()
    return sum(int((task / "schedstat").read_text().split()[0]) for task in tasks) / 1e9


def bench_idle(fleet: Fleet, seconds: float = 30.0) -> None:
    """What a host pays for a daemon that has nothing to do."""
    time.sleep(5)
    before = [cpu_s(daemon.pid) for daemon in fleet.daemons]
    time.sleep(seconds)
    for name, daemon, cpu in zip(("master", "agent"), fleet.daemons, before, strict=False):
        share = (cpu_s(daemon.pid) - cpu) / seconds
        memory = f"{rss_mb(daemon.pid):.1f} MB resident, {pss_mb(daemon.pid):.1f} its own part"
        ROWS.append((f"idle {name}", "", f"{memory}; {share:.2%} of a core", ""))
        print(f"idle {name}: {memory}; {share:.3%} of a core")


def bench_resume(fleet: Fleet) -> None:
    """How long after the master's return a watching commander shows the next line; agents come back with jitter."""
    watcher = fleet.trigger("127.0.0.2", "live", subprocess.PIPE)
    assert watcher.stdout
    for line in watcher.stdout:
        if line.split()[-1].isdigit():
            break
    fleet.daemons[0].kill()
    fleet.daemons[0].wait()
    time.sleep(0.5)
    fleet.serve("127.0.0.1", 0)
    began = time.perf_counter()
    last = time.time_ns()
    for line in watcher.stdout:
        word = line.split()[-1]
        if len(word) == 19 and word.isdigit() and int(word) > last:
            break
    print(f"first line written after the master's return is on the screen after {time.perf_counter() - began:.2f} s")
    watcher.communicate()


def start_herd(port: int, *words: int) -> subprocess.Popen[str]:
    """Light agents, all of them welcomed."""
    argv = [sys.executable, "-m", "tests.bench.herd", str(port), *map(str, words)]
    herd = subprocess.Popen(argv, cwd=SOURCE.parent, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert herd.stdout
    herd.stdout.readline()
    return herd


class Cost:
    """What something costs a process, for each of `count`."""

    def __init__(self, pid: int, count: int) -> None:
        self.pid, self.count = pid, count
        self.began, self.cpu, self.memory = time.perf_counter(), cpu_s(pid), rss_mb(pid)

    def end(self) -> Cost:
        self.wall_s = time.perf_counter() - self.began
        self.each_ms = (cpu_s(self.pid) - self.cpu) / self.count * 1000
        self.each_kib = (rss_mb(self.pid) - self.memory) * 1e6 / 1024 / self.count
        return self


def bare_cost(count: int, pyz: str) -> tuple[Cost, Cost]:
    """The floor: a bare websockets server that says the same words to the same light agents."""
    argv = [sys.executable, "-m", "tests.bench.bare", pyz]
    bare = subprocess.Popen(argv, cwd=SOURCE.parent, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    herd = None
    try:
        assert bare.stdin and bare.stdout
        port = int(bare.stdout.readline())
        cost = Cost(bare.pid, count)
        herd = start_herd(port, count)
        welcome, cost = cost.end(), Cost(bare.pid, count)
        print("order", file=bare.stdin, flush=True)
        assert bare.stdout.readline() == "done\n"
        return welcome, cost.end()
    finally:
        for process in filter(None, (herd, bare)):
            process.kill()
            process.communicate()


def bench_scale(folder: Path, program: list[str], counts: list[int]) -> None:
    """What a fleet costs its master, per agent: processor time, as the clock shows how busy this machine is."""
    lines = [Line("order", []), Line("welcome", []), Line("bare order", [], True), Line("bare welcome", [], True)]
    for count in counts:
        floors = bare_cost(count, program[-1])
        (folder / f"scale-{count}").mkdir()
        fleet = Fleet(folder / f"scale-{count}", program)
        herd = None
        try:
            cost = Cost(fleet.daemons[0].pid, count)
            herd = start_herd(fleet.port, count)
            welcome, cost = cost.end(), Cost(fleet.daemons[0].pid, count)
            code = fleet.trigger("all", "noop").wait(600)
            order = cost.end()
        finally:
            if herd:
                herd.kill()
                herd.communicate()
            fleet.close()
        kib = f", {floors[0].each_kib:.1f} KiB", f", {welcome.each_kib:.1f} KiB"
        note_scale(f"{count:,} agents welcomed", welcome, floors[0], kib)
        note_scale(f"`trigger all` on {count:,}, exit {code}", order, floors[1], ("", ""))
        for line, found in zip(lines, (order, welcome, *reversed(floors)), strict=True):
            line.points.append((count, found.each_ms))
    if counts:
        PANELS.append(Panel("Hosts", "ms of the master's processor for each host", "connected hosts", lines))


def note_scale(what: str, ours: Cost, floor: Cost, memory: tuple[str, str]) -> None:
    """A row of what one host of many costs."""
    told = f"{ours.wall_s:.1f} s; {ours.each_ms:.2f} ms each{memory[1]}"
    ROWS.append(
        (
            what,
            f"bare websockets {floor.wall_s:.1f} s; {floor.each_ms:.2f} ms each{memory[0]}",
            told,
            f"{ours.each_ms / max(floor.each_ms, 1e-3):.2f}",
        )
    )
    print(ROWS[-1], flush=True)


def bench_runs(folder: Path, program: list[str], counts: list[int]) -> None:
    """What many recorded runs cost: processor time of command and daemons, and of a master's start; the floor is the
    same with the fewest."""
    lines = {what: Line(what, []) for what in ("status", "history", "start")}
    for count in counts:
        (folder / f"runs-{count}").mkdir()
        fleet = Fleet(folder / f"runs-{count}", program, count)
        try:
            for what in ("status", "history"):
                argv = [*fleet.arguments("127.0.0.1"), what]
                run(*argv)
                spent = spent_s(fleet, lambda argv=argv: run(*argv), 9)  # type: ignore[misc]
                lines[what].points.append((count, spent))
            lines["start"].points.append((count, statistics.median(start_s(fleet) for _ in range(at_most(5)))))
        finally:
            fleet.close()
    for what, line in lines.items():
        floor, last = line.points[0], line.points[-1]
        say(f"{what}, {last[0]:,} recorded runs: processor", last[1], f"{floor[0]} runs", floor[1])
    shown = [Line(line.name, [(count, spent * 1000) for count, spent in line.points]) for line in lines.values()]
    PANELS.append(Panel("Recorded runs", "ms of processor time", "recorded runs", shown))


def start_s(fleet: Fleet) -> float:
    """The processor time of a master's start, until its port is open."""
    fleet.daemons[0].kill()
    fleet.daemons[0].wait()
    fleet.serve("127.0.0.1", 0)
    deadline = time.monotonic() + 60
    while True:
        with socket.socket() as probe:
            if not probe.connect_ex(("127.0.0.1", fleet.port)):
                return cpu_s(fleet.daemons[0].pid)
        assert time.monotonic() < deadline, "no master"
        time.sleep(0.005)


def bench_stalls(folder: Path, program: list[str], hosts: int, lines: int, seconds: int) -> None:
    """How long the master's event loop does not turn while many hosts write and a commander watches them all.

    A ping is answered when the loop turns next. The time for which its thread, or this one, could have run and got no
    processor is not the loop's: it says how busy this machine is.
    """
    from websockets.sync.client import connect

    folder.mkdir()
    fleet = Fleet(folder, program)
    argv = [sys.executable, "-m", "tests.bench.herd", str(fleet.port), str(hosts), str(lines), str(seconds)]
    herd = subprocess.Popen(argv, cwd=SOURCE.parent, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert herd.stdout
        herd.stdout.readline()
        threads = [f"/proc/{fleet.daemons[0].pid}/task/{fleet.daemons[0].pid}/schedstat", "/proc/thread-self/schedstat"]

        def kept_waiting() -> float:
            """Seconds without a processor."""
            return sum(int(Path(thread).read_text().split()[1]) for thread in threads) / 1e9

        stalls, clock = [0.0], [0.0]
        with (folder / "out").open("wb") as out:
            watching = fleet.trigger("all", "noop", out.fileno())
            while watching.poll() is None:
                # a stranger's connection: it lives until its hello is due, and pings are answered all the same
                with connect(f"ws://127.0.0.1:{fleet.port}", ping_interval=None) as socket:
                    until = time.monotonic() + 5
                    while time.monotonic() < until and watching.poll() is None:
                        before, began = kept_waiting(), time.perf_counter()
                        assert socket.ping().wait(60), "no answer to a ping"
                        clock.append(time.perf_counter() - began)
                        stalls.append(clock[-1] - (kept_waiting() - before))
                        time.sleep(0.01)
        shown = sum(line.endswith(LINE + "\n") for line in (folder / "out").open())
        expected = hosts * round(lines * 0.1) * seconds * 10
        told = f"{max(stalls) * 1000:.0f} ms of {max(clock) * 1000:.0f} by the clock"
        what = f"longest stall, {hosts} hosts of {lines:,} lines/s"
        ROWS.append((what, "", told, f"{shown:,} of {expected:,} lines"))
        print(*ROWS[-1], sep=" | ", flush=True)
    finally:
        herd.kill()
        herd.communicate()
        fleet.close()


def bench_peers(fleet: Fleet) -> None:
    """The same no-op and the same lines by ssh, plain and multiplexed, and by Fabric."""
    home, repo = fleet.folder, fleet.folder / "127.0.0.2"
    port = fleet.port + 1
    for name in ("host", "user"):
        run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(home / name))
    (home / "user.pub").rename(home / "known")
    settings = (
        f"-p {port} -h {home}/host -o AuthorizedKeysFile={home}/known -o StrictModes=no -o PidFile=none -f /dev/null"
    )
    Path("/run/sshd").mkdir(exist_ok=True)
    server = subprocess.Popen(
        [shutil.which("sshd") or "/usr/sbin/sshd", "-D", *settings.split()], stderr=subprocess.DEVNULL
    )
    once = f"ssh -p {port} -i {home}/user -o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null -o BatchMode=yes"
    shared = f"{once} -o ControlMaster=auto -o ControlPath={home}/c -o ControlPersist=60"
    try:
        time.sleep(1)
        floor = median_s(7, lambda: run("sh", "-c", NOOP, cwd=repo))
        for name, words in (("ssh", once), ("ssh, multiplexed", shared)):
            call = [*words.split(), "127.0.0.1"]
            value = median_s(7, lambda call=call: run(*call, f"cd {repo} && {NOOP}"))  # type: ignore[misc]
            say(f"{name}: no-op", value, "shell", floor)
            lines = f"{' '.join(call)} 'yes {LINE} | head -n {LINES}' > {home}/lines"
            value = median_s(3, lambda lines=lines: run("sh", "-c", lines))  # type: ignore[misc]
            say(f"{name}: {LINES:,} lines", value, "lines to a file", median_s(3, lambda: run(
                "sh", "-c", f"yes {LINE} | head -n {LINES} | cat > {home}/lines")))  # fmt: skip
        run(*shared.split(), "-O", "exit", "127.0.0.1")
        run(sys.executable, "-m", "venv", str(home / "fabric"))
        run(str(home / "fabric/bin/pip"), "install", "--quiet", "fabric")
        fabric = [str(home / "fabric/bin/fab"), "-H", f"127.0.0.1:{port}", "-i", str(home / "user"), "--"]
        say("Fabric: no-op", median_s(3, lambda: run(*fabric, f"cd {repo} && {NOOP}")), "shell", floor)
    finally:
        server.terminate()
        server.wait()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("pyz", nargs="?")
    parser.add_argument("--scale", default="", help="numbers of light agents, as in 200,1000")
    parser.add_argument("--hosts", type=int, default=20, help="so many real hosts at once (default: 20; 0: none)")
    parser.add_argument("--peers", action="store_true")
    parser.add_argument("--runs", default="", help="numbers of recorded runs, as in 10,1000,10000")
    parser.add_argument("--only-scale", action="store_true", help="and --hosts, --stalls, --runs, and nothing else")
    parser.add_argument(
        "--stalls", default="", help="HOSTS,LINES,SECONDS: so many hosts that each write so many a second"
    )
    parser.add_argument("--gigabytes", type=float, default=0.0, help="of one log, for the memory that they cost")
    parser.add_argument("--once", action="store_true", help="measure each thing once, to see that all of it works")
    parser.add_argument("--svg", type=Path)
    args = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="bench-"))
    try:
        pyz = Path(args.pyz).resolve() if args.pyz else folder / "estelle_updater.pyz"
        if not pyz.exists():
            run(sys.executable, str(SOURCE), "build", "-o", str(pyz))
        program = [sys.executable, str(pyz)]
        print(f"Python {sys.version.split()[0]}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")
        if not args.only_scale:
            bench_start(program)
            fleet = Fleet(folder, program)
            try:
                bench_idle(fleet)
                bench_noop(fleet)
                bench_live(fleet)
                bench_lines(fleet)
                if args.svg:
                    bench_growth(fleet)
                if args.peers:
                    bench_peers(fleet)
                bench_memory(fleet)
                bench_resume(fleet)
            finally:
                fleet.close()
        if args.hosts:
            bench_hosts(folder / "hosts", program, args.hosts)
        if args.stalls:
            bench_stalls(folder / "stalls", program, *map(int, args.stalls.split(",")))
        if args.gigabytes:
            bench_pass(folder / "pass", program, args.gigabytes)
        bench_scale(folder, program, [int(count) for count in args.scale.split(",") if count])
        if args.runs:
            bench_runs(folder, program, [int(count) for count in args.runs.split(",")])
        if args.svg and PANELS:
            names = ["Hosts", "Lines of output", "Recorded runs"]
            machine = f"{time.strftime('%Y-%m-%d')}, {os.cpu_count()} cores, Python {sys.version.split()[0]}"
            caption = f"{machine}. Lower is better; a level line is a cost that does not grow; dashed: the floor."
            args.svg.write_text(draw(sorted(PANELS, key=lambda panel: names.index(panel.title)), caption))
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    print(f"\n{time.strftime('%Y-%m-%d')}, {os.cpu_count()} cores, Python {sys.version.split()[0]}\n")
    print("| what | floor of the same run | here | ratio |\n| --- | --- | --- | --- |")
    for row in ROWS:
        print("| " + " | ".join(row) + " |")


if __name__ == "__main__":
    main()
