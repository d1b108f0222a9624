"""A commit moves the master: agents follow once it answers, and every host decides its role anew."""

from __future__ import annotations

import json
from collections.abc import Callable

from tests.commands import COMMAND, GATED, Watched, open_gate, write_script
from tests.fleet import Fleet, Host, wait_for
from tests.machines import Network

MakeFleet = Callable[..., Fleet]


def move(one: Fleet, url: str) -> None:
    """Commit another masterUrl."""
    settings = json.loads((one.origin.seed / "config/updater.json").read_text())
    one.origin.commit({"config/updater.json": json.dumps(settings | {"masterUrl": url})}, message=url)


def online(one: Fleet, host: Host) -> dict[str, str]:
    """The hosts and their roles, as a command on one of them learns it."""
    code, out, _ = one.cli("status", "--json", host=host)
    return {row["host"]: row["role"] for row in json.loads(out)["hosts"] if row["online"]} if code == 0 else {}


def test_the_fleet_follows_its_master(fleet: MakeFleet, netns: Callable[[int], Network]) -> None:
    one = fleet(hosts=3, network=netns(3), command=COMMAND)
    first, second, third = one.hosts
    write_script("echo deployed\n", first, second)
    write_script(GATED, third)
    move(one, f"ws://{second.address}:{one.port}")
    watcher = Watched(one, "trigger", "all", "master", host=third)
    watcher.until(lambda: watcher.out.count("✓ 완료") == 2)
    wait_for(lambda: "listening on" in second.stderr, lambda: second.stderr)
    assert "stopping" not in first.stderr and first.stderr.count(" agent: ") == 0  # a host still deploys
    open_gate(third)
    assert watcher.end() == 0 and watcher.out.count("✓ 완료") == 6, watcher.out + watcher.err
    roles = {first.address: "agent", second.address: "master", third.address: "agent"}
    wait_for(lambda: online(one, third) == roles, lambda: f"all follow: {online(one, third)}\n{first.stderr}")
    for host in (first, third):
        assert f"welcomed by the master at ws://{second.address}:{one.port}/" in host.stderr
    write_script("echo deployed\n", third)
    done = one.cli("trigger", "all", "master", host=first)
    assert done.code == 0 and done.out.count("✓ 완료") == 6, done.out + done.err

    move(one, "ws://192.0.2.99:9900")  # a slip: nobody is there
    assert one.cli("trigger", "all", "master", host=first).code == 0
    wait_for(lambda: "stays the master" in first.stderr and "stays the master" in second.stderr, lambda: first.stderr)
    assert online(one, second) == roles
    one.restart(third)  # it has only the wrong URL, and remembers the right one
    wait_for(lambda: online(one, first) == roles, lambda: third.stderr)
    move(one, f"ws://{second.address}:{one.port}")
    mended = one.cli("trigger", "all", "master", host=third)
    assert mended.code == 0 and mended.out.count("✓ 완료") == 6, mended.out + mended.err
    assert online(one, third) == roles
