"""Everything that can die or be cut does so at random, and still nothing is lost, doubled, stuck or run twice.

ESTELLE_CHAOS_ROUNDS=100 makes it long, ESTELLE_CHAOS_SEED=N repeats what a failure has printed.
"""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Iterator
from contextlib import suppress

import pytest

from tests.commands import COMMAND, STEP, Watched, lines_of, log_of, open_gate, wait_state, write_script
from tests.fleet import VERSION, Fleet, Host, need, processes_of, wait_for
from tests.machines import Network

ROUNDS = int(os.environ.get("ESTELLE_CHAOS_ROUNDS", "3"))
SEED = int(os.environ.get("ESTELLE_CHAOS_SEED") or random.randrange(10**6))
PATIENCE_S = 120.0  # an agent that just failed several times waits up to a minute before it tries again
pytestmark = pytest.mark.xdist_group("chaos")

# Each notes that it began, and keeps a copy of what it writes; `tee` is a pipe's last reader, so the copy is complete.
BYTES = "head -c 30000 /dev/urandom | LC_ALL=C tr -d ="
OUTPUTS = {
    "slow": 'n=0; until [ -e ../go ]; do n=$((n+1)); echo "line $n"; sleep 0.1; done',
    "fast": f"until [ -e ../go ]; do seq 1 3000; sleep 0.1; done; {'seq 1 200000'}",
    # without `=`: random bytes hold a query with a password now and then, and that is masked
    "bytes": f"until [ -e ../go ]; do {BYTES}; sleep 0.05; done; {BYTES.replace('30000', '3000000')}; echo",
}


def script(kind: str) -> str:
    return f"echo x >> ../begun\n{{ echo first; {OUTPUTS[kind]}; }} | tee ../copy\n"


class Chaos:
    """A master and two agents in namespaces, and a commander in one more."""

    def __init__(self, fleet: Fleet, network: Network) -> None:
        self.fleet, self.network = fleet, network
        *self.hosts, self.desk = fleet.hosts

    def watch(self, *arguments: str) -> Watched:
        return Watched(self.fleet, *arguments, host=self.desk)

    def back(self, *hosts: Host) -> None:
        """Start the daemons that were killed, without waiting for anything but the master's port."""
        for host in sorted(hosts, key=lambda host: host is not self.fleet.master):
            if host.process and host.process.poll() is not None:
                self.fleet.spawn(host)
                if host is self.fleet.master:
                    self.fleet.wait_ready(host)

    def strike(self, chance: random.Random, watcher: Watched, run: str) -> Watched:
        """One blow, and its end; returns whoever watches now."""
        blow = chance.choice(["daemons", "daemons", "cable", "drop", "reset", "commander"])
        number = chance.choice([1, 2, 3])
        pause_s = chance.choice([0, 0.3, 1.5])
        print(f"  {blow} {number} for {pause_s} s")
        if blow == "daemons":
            victims = chance.sample(self.hosts, chance.randint(1, 3))
            for host in victims:
                self.fleet.kill(host)
            time.sleep(pause_s)
            self.back(*victims)
        elif blow == "cable":
            self.network.cut(number)
            time.sleep(pause_s)
            self.network.uncut(number)
        elif blow == "commander":
            watcher.process.send_signal(signal.SIGKILL)
            watcher.process.wait()
            return self.watch("logs", run, "-f")
        else:
            others = [other for other in (1, 2, 3, 4) if other != number]
            for undo in (False, True):
                for other in others:
                    self.network.cut_way(other, number, undo, reset=blow == "reset")
                time.sleep(0 if undo else pause_s)
        return watcher


@pytest.fixture(scope="module")
def chaos(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chaos]:
    need("git", "tee", "seq")
    network = Network(4)
    fleet = Fleet(tmp_path_factory.mktemp("chaos"), hosts=4, network=network, command=COMMAND)
    try:
        fleet.start(*fleet.hosts[:3])
        yield Chaos(fleet, network)
    finally:
        fleet.stop_all()
        network.close()


def children(host: Host) -> dict[int, str]:
    """What a job of this host runs; git may tidy up after itself in the background."""
    return {pid: command for pid, command in processes_of(host.repo).items() if " ../" in command}


@pytest.mark.timeout(5 * PATIENCE_S)
@pytest.mark.parametrize("number", range(ROUNDS))
def test_chaos(chaos: Chaos, number: int):
    seed = SEED + number
    print(f"ESTELLE_CHAOS_ROUNDS=1 ESTELLE_CHAOS_SEED={seed}")
    chance, fleet = random.Random(seed), chaos.fleet
    kinds = {host.address: chance.choice(list(OUTPUTS)) for host in chaos.hosts}
    print(f"  {kinds}")
    for host in chaos.hosts:
        for name in ("copy", "begun"):
            (host.folder / name).unlink(missing_ok=True)
        write_script(script(kinds[host.address]), host)
    watcher = chaos.watch("trigger", "all", "master", "--wait", "100")
    run = watcher.run
    if chance.random() < 0.7:  # else the blows meet the first steps
        for host in chaos.hosts:
            watcher.until((host.folder / "copy").exists, PATIENCE_S)
    for _ in range(chance.randint(1, 5)):
        watcher = chaos.strike(chance, watcher, run)
        time.sleep(chance.choice([0, 0.2, 1]))
    lost = chance.choice(chaos.hosts) if chance.random() < 0.2 else None
    if lost:
        reboot = chance.random() < 0.5
        print(f"  {lost.address} reboots" if reboot else f"  the runner of {lost.address} dies")
        wait_for(lambda: (lost.folder / "copy").exists(), "it began", PATIENCE_S)
        for pid, command in processes_of(lost.folder).items():
            if reboot or " run-job " in command:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        if reboot:
            assert lost.process
            lost.process.wait()
            chaos.back(lost)
    open_gate(*chaos.hosts)
    while (code := watcher.end(PATIENCE_S)) == 3:  # it was still starting when the master died
        watcher = chaos.watch("logs", run, "-f")
    assert code == (1 if lost else 0), watcher.out[-3000:] + watcher.err
    check(chaos, run, watcher, lost, [host for host in chaos.hosts if kinds[host.address] != "bytes"])
    fleet.wait_online(*chaos.hosts)


def check(chaos: Chaos, run: str, watcher: Watched, lost: Host | None, readable: list[Host]) -> None:
    """Every byte that was written is in both records once, and on the screen."""
    code, out, _ = chaos.fleet.cli("logs", run, host=chaos.desk)
    assert code == 0
    for host in chaos.hosts:
        log, copy = log_of(chaos.fleet, run, host), (host.folder / "copy").read_bytes()
        assert log_of(chaos.fleet, run, host, at=host) == log
        announcements, _, written = log.partition(f"{STEP}...\n".encode())
        assert announcements.count(b"git fetch origin...") == 1
        assert (host.folder / "begun").read_text() == "x\n", "it ran once"
        if host is lost:
            wait_state(chaos.fleet, run, host, "lost")
            assert copy.startswith(written) or written.startswith(copy)  # `tee` was killed between its two writes
            assert not children(host)
        else:
            same = written == copy  # by itself: pytest would explain megabytes for minutes
            assert same, f"{host.address}: {len(written)} bytes of {len(copy)}"
            assert lines_of(out, host.address)[-1] == f"✓ 완료 {VERSION}"
        if host in readable:
            assert lines_of(watcher.out, host.address)[:-1] == log.decode().splitlines()
            assert lines_of(out, host.address) == lines_of(watcher.out, host.address)
