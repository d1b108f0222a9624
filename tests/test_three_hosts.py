"""The strategy's three machines as network namespaces: the shipped files, the shipped checks, the whole round."""

from __future__ import annotations

import json
import shutil
import signal
import sys
import tempfile
import tomllib
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from tests.commands import COMMAND, detach, wait_state, write_script
from tests.fleet import ROOT, Fleet, wait_for
from tests.machines import Network
from tests.seam import init_text
from tests.stores import certificate, mariadb, server, valkey, worker

DATA, BLUE, GREEN = (f"192.0.2.{number}" for number in (11, 12, 13))
ASK = """
import ssl, sys, urllib.request
context = ssl._create_unverified_context()
print(urllib.request.urlopen(sys.argv[1], timeout=5, context=context).read().decode())
"""


def settings() -> dict[str, Any]:
    """What `config init --blue-green` writes, with these hosts' addresses; no systemd runs in a namespace."""
    hosts = {"yq-data": DATA, "yq-blue": BLUE, "yq-green": GREEN}
    data = tomllib.loads(init_text("ws://192.0.2.11:9900", [], ["true"], "toml", hosts))
    # all namespaces have one host name
    data["hosts"] = {address: data["hosts"][f"{address}/{name}"] | {"name": name} for name, address in hosts.items()}
    data["health"] = [check for check in data["health"] if "systemd" not in check]
    return {key: data[key] for key in ("hosts", "haproxy", "health")}


class Site:
    """Data node (which is the master), blue and green, with everything that the checks look at."""

    def __init__(self, network: Network, fleet: Callable[..., Fleet], folder: Path, stack: ExitStack) -> None:
        self.network, self.workers = network, dict[str, ExitStack]()
        text = (ROOT / "config/haproxy.cfg").read_text()
        text = text.replace("10.0.0.11:6000", f"{BLUE}:6000").replace("10.0.0.12:6000", f"{GREEN}:6000")
        text = text.replace("/etc/haproxy", str(folder)).replace("/run/haproxy", str(folder))
        (folder / "certs").mkdir()
        certificate(folder / "certs/yquant.pem")
        (folder / "server-state").write_text("1\n")
        (folder / "haproxy.cfg").write_text(text)
        config = settings()
        reload = folder / "reload.sh"
        reload.write_text(f"kill -USR2 $(cat {folder}/pid)\n")
        config["haproxy"] |= {
            "config": f"{folder}/haproxy.cfg", "socket": f"{folder}/admin.sock", "reload": ["sh", str(reload)],
        }  # fmt: skip
        stack.enter_context(mariadb(folder / "db", prefix=network.prefix(1), port=3306))
        for number, color in ((2, "blue"), (3, "green")):
            self.workers[color] = stack.enter_context(ExitStack())
            self.workers[color].enter_context(worker(color, "0.0.0.0:6000", prefix=network.prefix(number)))
            stack.enter_context(worker(color, "0.0.0.0:2000", prefix=network.prefix(number)))
            stack.enter_context(valkey(prefix=network.prefix(number), port=6379))
        argv = ["haproxy", "-W", "-f", str(folder / "haproxy.cfg"), "-p", str(folder / "pid")]
        stack.enter_context(server([*network.prefix(1), *argv], 443))
        self.fleet = fleet(hosts=3, command=COMMAND, config=config, network=network)
        write_script("echo deployed\n", *self.fleet.hosts)
        self.cli = self.fleet.cli

    def webhook(self) -> str:
        """Who answers a webhook that comes from a worker's side of the network."""
        return self.network.run(3, [sys.executable, "-c", ASK, f"https://{DATA}/webhook"]).out.strip()

    def traffic(self) -> dict[str, str]:
        rows = json.loads(self.cli("status", "--json").out)["hosts"]
        return {row["color"]: row["traffic"] for row in rows if row["color"]}


@pytest.fixture
def site(netns: Callable[[int], Network], fleet: Callable[..., Fleet]) -> Iterator[Site]:
    network = netns(3)
    folder = Path(tempfile.mkdtemp(prefix="est-three-"))  # not below tmp_path, where the fleet's end kills everything
    folder.chmod(0o755)
    with ExitStack() as stack:
        stack.callback(shutil.rmtree, folder)
        yield Site(network, fleet, folder, stack)


def test_three_hosts_with_the_shipped_files(site: Site):
    code, out, _ = site.cli("health")
    assert code == 0 and out.count("✓") == 14 and "✗" not in out, out
    wait_for(lambda: site.traffic() == {"blue": "active", "green": "standby"}, "HAProxy has checked both")
    code, out, _ = site.cli("status")
    assert "! no `option" not in out and "! no `server-state" not in out, out  # the shipped file lacks nothing
    commit = site.fleet.origin.commit({"app.txt": "1"})
    code, out, err = site.cli("release", "master", "--yes", host=site.fleet.hosts[1])  # from any host of the whitelist
    assert code == 0 and f"active: green ({GREEN}) {commit[:7]}" in out, out + err
    assert site.webhook() == "green"

    daemon = site.fleet.hosts[2].process
    assert daemon
    daemon.send_signal(signal.SIGSTOP)  # so that the order below is taken up only at the end
    site.network.cut(3)  # the active worker's cable
    wait_for(lambda: site.traffic() == {"blue": "active", "green": "down"}, "HAProxy fails over")
    run = detach(site.fleet, "standby", "master", "--wait", "90")  # green, as long as its cable is out
    site.network.uncut(3)
    wait_for(lambda: site.traffic() == {"blue": "standby", "green": "active"}, "green has the traffic again")
    daemon.send_signal(signal.SIGCONT)
    assert wait_state(site.fleet, run, GREEN, "failed", timeout_s=90)["error"] == "traffic moved"
    assert site.webhook() == "green"
