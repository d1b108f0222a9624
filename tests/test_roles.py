"""Each host finds its role by its own address: three namespaces, no override; and who may speak at the door."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.commands import COMMAND, write_script
from tests.fleet import Fleet, Host, wait_for
from tests.machines import Network

MakeFleet = Callable[..., Fleet]
MakeNetwork = Callable[[int], Network]


def set_config(host: Host, **changes: object) -> None:
    host.config.write_text(json.dumps(json.loads(host.config.read_text()) | changes))


@contextmanager
def hosts_file(network: Network, host: int, text: str) -> Iterator[Path]:
    """What names mean inside one namespace: `ip netns exec` mounts this over /etc/hosts."""
    folder = Path("/etc/netns") / network.namespace(host)
    folder.mkdir(parents=True)
    (folder / "hosts").write_text(text)
    try:
        yield folder / "hosts"
    finally:
        (folder / "hosts").unlink()
        folder.rmdir()


def test_three_hosts_by_their_own_addresses(fleet: MakeFleet, netns: MakeNetwork) -> None:
    network = netns(3)
    one = fleet(hosts=3, network=network)
    master = one.master.address
    first_lines = [host.stderr.splitlines()[0] for host in one.hosts]
    assert f"master: {master} is an address of this host" in first_lines[0]
    for line in first_lines[1:]:
        assert f"agent: {master} is not an address of this host" in line
    done = one.cli("trigger", "all", "master", host=one.agents[1])
    assert done.code == 0 and done.out.count("✓ 완료") == 6, done.out + done.err
    assert all(f"[{host.address}] ✓ 완료" in done.out for host in one.hosts)


def test_where_any_address_can_be_bound(fleet: MakeFleet, netns: MakeNetwork) -> None:
    network = netns(2)
    for host in (1, 2):
        assert network.run(host, ["sysctl", "-w", "net.ipv4.ip_nonlocal_bind=1"]).code == 0
    one = fleet(hosts=2, network=network)
    assert " master: " in one.master.stderr.splitlines()[0] and " agent: " in one.agents[0].stderr.splitlines()[0]


def test_by_name_and_once_the_name_resolves(fleet: MakeFleet, netns: MakeNetwork) -> None:
    network = netns(2)
    one = fleet(hosts=2, network=network, start=False)
    for host in one.hosts:
        set_config(host, masterUrl=f"ws://fleet.example:{one.port}")
    line = f"{one.master.address} fleet.example\n"
    with hosts_file(network, 1, "127.0.0.1 localhost\n") as own, hosts_file(network, 2, line):
        one.spawn(one.master)
        wait_for(lambda: "unknown is never master" in one.master.stderr, lambda: one.master.stderr)
        own.write_text(line)  # in place: the mount shows this very file
        wait_for(lambda: "listening on" in one.master.stderr, lambda: one.master.stderr, 90)
        one.start(one.agents[0])
        done = one.cli("trigger", "all", "master")
        assert done.code == 0, done.out + done.err


@pytest.mark.parametrize("how", ["option", "environment", "configuration"])
def test_overrides(fleet: MakeFleet, how: str) -> None:
    one = fleet(hosts=2, start=False)
    agent = one.agents[0]
    options = ["--role", "agent"] if how == "option" else []
    env = {"ESTELLE_ROLE": "agent"} if how == "environment" else {}
    if how == "configuration":
        set_config(one.master, hosts={one.master.address: {"role": "agent"}})
    one.spawn(one.master, env=env, options=options)
    wait_for(lambda: "can't reach the master" in one.master.stderr, lambda: one.master.stderr)
    assert " agent: " in one.master.stderr.splitlines()[0]
    one.spawn(agent, options=["--role", "master"])
    wait_for(lambda: "listening on" in agent.stderr, lambda: agent.stderr)


def test_ipv6_and_ipv4_behind_it(fleet: MakeFleet) -> None:
    one = fleet(hosts=1, start=False)
    for config in ({"masterUrl": f"ws://[::1]:{one.port}", "whitelist": ["::1", "127.0.0.1"]},):
        set_config(one.master, **config)
    env = {"ESTELLE_BIND": "::1"}
    one.spawn(one.master, options=["--bind", "::1"])
    wait_for(lambda: "listening on" in one.master.stderr, lambda: one.master.stderr)
    status = one.cli("status", "--json", bind="::1", env=env)
    assert status.code == 0 and json.loads(status.out)["master"]["ip"] == "::1", status.err
    assert one.cli("trigger", "::1", "master", bind="::1").code == 0
    four = {"masterUrl": f"ws://127.0.0.1:{one.port}"}
    other = one.tmp_path / "four" / "config" / "updater.json"
    other.parent.mkdir(parents=True)
    other.write_text(json.dumps(json.loads(one.master.config.read_text()) | four))
    mapped = one.cli("status", "--json", bind="127.0.0.1", env={"ESTELLE_CONFIG": str(other)})
    assert mapped.code == 0, mapped.err


def test_a_refused_agent_says_which_address_the_master_saw(fleet: MakeFleet) -> None:
    one = fleet(hosts=2, start=False)
    set_config(one.master, whitelist=["127.0.0.1"])
    one.start(one.master)
    one.spawn(one.agents[0])
    wait_for(lambda: "the master refused us" in one.agents[0].stderr, lambda: one.agents[0].stderr)
    assert "127.0.0.2" in one.agents[0].stderr and "whitelist" in one.agents[0].stderr
    assert one.master.stderr.count("refused 127.0.0.2") == 1


def test_a_master_behind_a_nat_is_what_its_own_address_s_section_says(fleet: MakeFleet, netns: MakeNetwork) -> None:
    """masterUrl's address is the router's: nobody behind it has that address, and none of them reaches it."""
    network = netns(2)
    one = fleet(hosts=2, network=network, start=False, command=COMMAND)
    master, agent = one.hosts
    public, private = "203.0.113.9", "10.9.9.9"
    way = ["-d", public, "-j", "DNAT", "--to-destination", master.address]
    for argv in (
        ["ip", "route", "add", "default", "dev", "veth0"],
        ["ip", "addr", "add", f"{private}/32", "dev", "lo"],
        ["iptables", "-t", "nat", "-A", "OUTPUT", *way],
    ):
        assert network.run(2, argv).code == 0

    def configure(**hosts: object) -> None:
        one.url = f"ws://{public}:{one.port}"
        config = json.loads(master.config.read_text()) | {"masterUrl": one.url, "hosts": hosts}
        config["whitelist"] = [public, *(host.address for host in one.hosts)]
        one.origin.commit({"config/updater.json": json.dumps(config)})
        for host in one.hosts:
            one.origin.git("pull", "--quiet", cwd=host.repo)

    configure()
    write_script("echo for $WHOM\n", *one.hosts)
    one.spawn(master)
    section = f'[hosts."{master.address}/{socket.gethostname()}"]'
    advice = f'if this host is the master, {public} is behind a NAT: write {section} and below it role = "master"'
    wait_for(lambda: advice in master.stderr, lambda: master.stderr)
    assert " agent: " in master.stderr.splitlines()[0]
    assert advice in one.cli("doctor").out
    one.stop(master)

    sections = {
        master.address: {"role": "master", "name": "centre", "env": {"WHOM": "the master"}},
        private: {"env": {"WHOM": "nobody"}},
        agent.address: {"env": {"WHOM": "the agent"}},
    }
    configure(**sections)
    one.start()
    assert f'master: [hosts."{master.address}"] says so' in master.stderr.splitlines()[0]
    idle = f'[hosts."{private}"] has no effect on this host: [hosts."{agent.address}"] is found first'
    wait_for(lambda: idle in agent.stderr, idle)
    assert f'[hosts."{master.address}"]' in one.cli("doctor").out
    found = one.cli("config", "show").out
    assert "the master" in found or "WHOM" in found
    for host in (master, agent):  # from inside too, where masterUrl does not lead
        done = one.cli("trigger", "all", "master", host=host)
        assert done.code == 0, done.out + done.err
        assert f"[{public}] for the master" in done.out and f"[{agent.address}] for the agent" in done.out
    elsewhere = one.cli("status", "--json", env={"ESTELLE_STATE": str(one.tmp_path / "another")})
    assert elsewhere.code == 0, elsewhere.err
    rows = {row["host"]: row["name"] for row in json.loads(elsewhere.out)["hosts"]}
    assert rows[public] == "centre"

    del sections[agent.address]
    configure(**sections)
    one.restart(agent)
    known = f'the master sees it at {agent.address}; write [hosts."{agent.address}/'
    wait_for(lambda: known in agent.stderr, lambda: agent.stderr)
