#!/usr/bin/env python3
"""Speed as ratios to a floor measured in the same run: python3 tests/bench/run.py [PYZ] [--scale 200,1000] [--peers]

A master on 127.0.0.1 and an agent on 127.0.0.2 deploy from a git origin on this disk; with `--scale`, beside them so
many light agents (herd.py says what of them is simulated); with `--peers`, ssh by a server of its own on this machine,
and Fabric in a virtualenv of its own do the same no-op and the same lines. It ends with a table in Markdown, and
writes `--svg FILE`: cost by hosts. Nothing here asserts a figure.
"""

from __future__ import annotations

import argparse
import json
import math
import os
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
from pathlib import Path

SOURCE = Path(__file__).resolve().parents[2] / "estelle_updater.py"
ROWS: list[tuple[str, str, str, str]] = []  # what, floor, ours, ratio
NOOP = "git fetch origin && git checkout noop && git pull origin noop && true"
LINES = 1_000_000
LINE = "x" * 79
JOB_MEGABYTES = 1 << 16  # of a log: more than any row here writes
PRINTER = "import sys,time\nfor _ in range(300):\n    print(time.time_ns(), flush=True)\n    time.sleep(0.02)\n"
COMMANDS = {
    "noop": ["true"],
    "lines": ["sh", "-c", f"yes {LINE} | head -n {LINES}"],
    "live": [sys.executable, "printer.py"],
}


def run(*argv: str, cwd: Path | None = None) -> None:
    subprocess.run(argv, cwd=cwd, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def median_s(repeat: int, action: Callable[[], object]) -> float:
    """The median time of `action` in seconds; one run before it warms the caches."""
    action()
    times = []
    for _ in range(repeat):
        began = time.perf_counter()
        action()
        times.append(time.perf_counter() - began)
    return statistics.median(times)


class Fleet:
    """An origin with one branch per command, a master and an agent as real processes."""

    def __init__(self, folder: Path, program: list[str]) -> None:
        self.folder, self.program = folder, program
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = port = probe.getsockname()[1]
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
        for index, host in enumerate(("127.0.0.1", "127.0.0.2")):
            run("git", "clone", str(origin), str(folder / host))
            self.serve(host, index)
        deadline = time.monotonic() + 60
        while "127.0.0.2" not in self.online():
            if time.monotonic() > deadline:
                self.close()  # nobody else knows of them yet
                raise SystemExit("the fleet does not come up: " + (folder / "127.0.0.2.err").read_text())
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


def bench_noop(fleet: Fleet) -> None:
    repo = fleet.folder / "127.0.0.2"
    floor = median_s(7, lambda: run("sh", "-c", NOOP, cwd=repo))
    say("no-op deployment, one host", median_s(7, lambda: fleet.trigger("127.0.0.2", "noop").wait()), "shell", floor)
    times = os.times()
    before = times.children_user + times.children_system + sum(cpu_s(daemon.pid) for daemon in fleet.daemons)
    for _ in range(5):
        fleet.trigger("127.0.0.2", "noop").wait()
    times = os.times()
    after = times.children_user + times.children_system + sum(cpu_s(daemon.pid) for daemon in fleet.daemons)
    spent = (after - before) / 5 * 1000
    ROWS.append(("its processor time: command and daemons", "", f"{spent:.0f} ms", ""))
    status = median_s(7, lambda: run(*fleet.arguments("127.0.0.1"), "status"))
    say("status", status, "python -c pass", median_s(7, lambda: run(sys.executable, "-c", "pass")))


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
        ROWS.append((f"idle {name}", "", f"{rss_mb(daemon.pid):.0f} MB, {share:.2%} of a core", ""))
        print(f"idle {name}: {rss_mb(daemon.pid):.1f} MB resident, {share:.3%} of a core")


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


def bench_scale(folder: Path, program: list[str], counts: list[int]) -> list[tuple[int, float, float]]:
    """What a fleet costs its master, per agent: (agents, ms to welcome one, ms to deploy on one), processor time."""
    found = []
    for count in counts:
        (folder / f"scale-{count}").mkdir()
        fleet = Fleet(folder / f"scale-{count}", program)
        herd = None
        try:
            pid, began = fleet.daemons[0].pid, time.perf_counter()
            memory, cpu = rss_mb(pid), cpu_s(pid)
            argv = [sys.executable, "-m", "tests.bench.herd", str(fleet.port), str(count)]
            herd = subprocess.Popen(argv, cwd=SOURCE.parent, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            assert herd.stdout
            herd.stdout.readline()
            welcome_s, welcomed = time.perf_counter() - began, cpu_s(pid) - cpu
            each_kib = (rss_mb(pid) - memory) * 1e6 / 1024 / count
            began, cpu = time.perf_counter(), cpu_s(pid)
            code = fleet.trigger("all", "noop").wait(300)
            order_s, ordered = time.perf_counter() - began, cpu_s(pid) - cpu
            found.append((count, welcomed / count * 1000, ordered / count * 1000))
            ROWS.append(
                (
                    f"{count:,} agents welcomed",
                    "",
                    f"{welcome_s:.1f} s",
                    f"{found[-1][1]:.2f} ms each, {each_kib:.0f} KiB",
                )
            )
            ROWS.append(
                (f"`trigger all` on {count:,}, exit {code}", "", f"{order_s:.1f} s", f"{found[-1][2]:.2f} ms each")
            )
            print(*ROWS[-2:], sep="\n", flush=True)
        finally:
            if herd:
                herd.kill()
                herd.communicate()
            fleet.close()
    return found


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


def draw(points: list[tuple[int, float, float]]) -> str:
    """An SVG: the master's processor time per agent by the number of agents, which a linear cost keeps level."""
    top = max((max(point[1:]) for point in points), default=1.0)
    lines = ['<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 480 260" font-family="sans-serif" font-size="12">']
    lines.append('<rect width="480" height="260" fill="white"/><path d="M50 20V220H460" fill="none" stroke="black"/>')
    lines.append(
        f'<text x="10" y="15">ms per agent</text><text x="10" y="34">{top:.1f}</text><text x="36" y="222">0</text>'
    )
    for index, (name, colour) in enumerate((("welcome", "#06c"), ("deployment", "#c50")), 1):
        places = []
        for count, *_ in points:
            places.append(70 + 370 * math.log(count / points[0][0]) / max(0.1, math.log(points[-1][0] / points[0][0])))
        dots = [(x, 220 - 190 * point[index] / top) for x, point in zip(places, points, strict=True)]
        lines.append(
            f'<polyline points="{" ".join(f"{x:.0f},{y:.0f}" for x, y in dots)}" fill="none" stroke="{colour}"/>'
        )
        lines += [f'<circle cx="{x:.0f}" cy="{y:.0f}" r="4" fill="{colour}"/>' for x, y in dots]
        lines.append(f'<text x="{200 + 100 * index}" y="15" fill="{colour}">{name}</text>')
        lines += [f'<text x="{x - 15:.0f}" y="238">{point[0]}</text>' for x, point in zip(places, points, strict=True)]
    return "\n".join([*lines, '<text x="200" y="255">agents of one master</text>', "</svg>"]) + "\n"


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
    parser.add_argument("--peers", action="store_true")
    parser.add_argument("--only-scale", action="store_true", help="and nothing else")
    parser.add_argument(
        "--stalls", default="", help="HOSTS,LINES,SECONDS: so many hosts that each write so many a second"
    )
    parser.add_argument("--gigabytes", type=float, default=0.0, help="of one log, for the memory that they cost")
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
                if args.peers:
                    bench_peers(fleet)
                bench_memory(fleet)
                bench_resume(fleet)
            finally:
                fleet.close()
        if args.stalls:
            bench_stalls(folder / "stalls", program, *map(int, args.stalls.split(",")))
        if args.gigabytes:
            bench_pass(folder / "pass", program, args.gigabytes)
        points = bench_scale(folder, program, [int(count) for count in args.scale.split(",") if count])
        if args.svg and points:
            args.svg.write_text(draw(points))
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    print(f"\n{time.strftime('%Y-%m-%d')}, {os.cpu_count()} cores, Python {sys.version.split()[0]}\n")
    print("| what | floor of the same run | here | ratio |\n| --- | --- | --- | --- |")
    for row in ROWS:
        print("| " + " | ".join(row) + " |")


if __name__ == "__main__":
    main()
