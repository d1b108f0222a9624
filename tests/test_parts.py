"""The tests' own parts do what the tests rely on."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.fleet import PNPM, Fleet, Origin, clean_env, free_port, kill_processes_of, need, processes_of, run, wait_for
from tests.machines import Network, Windows

CONNECT = "import socket, sys; socket.create_connection((sys.argv[1], int(sys.argv[2])), timeout=1).close()"
LISTEN = "import socket, sys; s = socket.create_server(('', int(sys.argv[1])))\nwhile True: s.accept()[0].close()"


def test_origin_gives_clones_that_can_pull(origin: Origin, tmp_path: Path):
    clone = origin.clone(tmp_path / "clone")
    commit = origin.commit({"app.txt": "2", "deploy.sh": None})
    hotfix = origin.commit({"app.txt": "3"}, branch="hotfix-1")
    origin.tag("v2", commit)
    origin.git("pull", "--quiet", cwd=clone)
    assert origin.git("rev-parse", "HEAD", cwd=clone) == commit != hotfix
    assert (clone / "app.txt").read_text() == "2"
    assert not (clone / "deploy.sh").exists()
    assert origin.git("rev-parse", "v2^{commit}", "origin/hotfix-1", cwd=clone).split() == [commit, hotfix]
    assert origin.commit({}) != commit  # back on master


def test_pnpm_runs_the_deployment(origin: Origin, tmp_path: Path):
    need("pnpm", "node")
    origin.commit({"deploy.sh": "echo in $PWD; exit 7\n"})
    code, out, _ = run(PNPM, clean_env(tmp_path / "home"), origin.clone(tmp_path / "clone"))
    assert code == 7
    assert f"in {tmp_path / 'clone'}" in out


def test_pm2_starts(tmp_path: Path):
    need("pm2", "node")
    env = clean_env(tmp_path / "home") | {"PM2_HOME": str(tmp_path / "pm2")}
    try:
        code, out, _ = run(["pm2", "jlist"], env)
        assert code == 0
        assert out.rstrip().endswith("[]")
    finally:
        run(["pm2", "kill"], env)
    assert wait_for(lambda: not processes_of(tmp_path), "PM2's daemon is gone")


@pytest.mark.parametrize("trace", ["environment", "argument", "directory"])
def test_leftovers_are_found_and_killed(trace: str, tmp_path: Path):
    env = {"PATH": os.environ["PATH"]} | ({"X": f"{tmp_path}/x"} if trace == "environment" else {})
    argv = [sys.executable, "-c", "import time; time.sleep(600)", *([str(tmp_path)] if trace == "argument" else [])]
    with subprocess.Popen(argv, env=env, cwd=tmp_path if trace == "directory" else None) as process:
        wait_for(lambda: process.pid in processes_of(tmp_path), "the process is found")
        assert processes_of(tmp_path.with_name(tmp_path.name[:-1])) == {}
        assert list(kill_processes_of(tmp_path)) == [process.pid]
        assert process.wait() == -9


def test_a_command_that_does_not_end_fails_the_test(tmp_path: Path):
    with pytest.raises(pytest.fail.Exception, match="did not end within"):
        run(["sh", "-c", "echo begun; sleep 600 & wait"], clean_env(tmp_path / "home"), tmp_path, timeout_s=0.5)
    assert wait_for(lambda: not processes_of(tmp_path), "its children are gone")


def test_a_daemon_that_ends_at_once_fails_the_test(fleet: Callable[..., Fleet]):
    made = fleet(hosts=1, start=False, program=(sys.executable, "-c", "import sys; sys.exit('no such thing')"))
    with pytest.raises(pytest.fail.Exception, match=r"ended with 1:\nno such thing"):
        made.start()


@pytest.mark.parametrize("machines", ["loopback", "namespaces"])
def test_fleet_starts_and_leaves_nothing(
    machines: str, fleet: Callable[..., Fleet], netns: Callable[[int], Network], tmp_path: Path
):
    made = fleet(hosts=2, network=netns(2) if machines == "namespaces" else None)
    code, out, _ = made.cli("trigger", "all", "master")
    assert code == 0
    assert [line for line in out.splitlines() if line.startswith(f"[{made.agents[0].address}] deploying")]
    assert len(made.runs()) == 1
    made.kill(made.agents[0])
    made.restart(made.agents[0])
    made.restart(made.master)
    made.wait_online()
    made.stop_all()
    assert processes_of(tmp_path) == {}


def test_pyz_says_its_version(pyz: Path, tmp_path: Path):
    code, out, err = run([sys.executable, pyz, "--version"], clean_env(tmp_path / "home"))
    assert (code, err) == (0, "")
    assert out.startswith("estelle-updater ")


def test_network_joins_hosts_and_can_be_cut(netns: Callable[[int], Network]):
    net = netns(3)
    port = free_port()

    def reach(sender: int, receiver: int) -> bool:
        argv = [sys.executable, "-c", CONNECT, net.address(receiver), str(port)]
        return net.run(sender, argv).code == 0

    listeners = [subprocess.Popen([*net.prefix(i), sys.executable, "-c", LISTEN, str(port)]) for i in (1, 2)]
    wait_for(lambda: reach(3, 1) and reach(3, 2), "hosts 1 and 2 listen")
    net.cut(2)
    assert not reach(3, 2)
    assert reach(3, 1)
    net.uncut(2)
    wait_for(lambda: reach(3, 2), "the cable is back")
    net.cut_way(3, 1)
    assert not reach(3, 1)
    assert reach(2, 1)
    net.cut_way(3, 1, undo=True)
    assert reach(3, 1)
    net.close()
    assert [listener.wait() for listener in listeners] == [-9, -9]
    assert net.namespace(1) not in run(["ip", "netns", "list"], os.environ).out


def test_windows_python_is_windows(windows_python: Windows, tmp_path: Path):
    script = tmp_path / "what.py"
    script.write_text("import os, sys; print(os.name, sys.platform, sys.version_info[:2]); sys.exit(7)")
    code, out, _ = windows_python.run(script)
    assert (code, out.strip()) == (7, f"nt win32 {sys.version_info[:2]}")


def test_windows_python_runs_the_zipapp(windows_python: Windows, pyz: Path):
    code, out, _ = windows_python.run(pyz, "--version")
    assert code == 0
    assert out.startswith("estelle-updater ")


def test_windows_python_is_cut_at_its_deadline(windows_python: Windows):
    with pytest.raises(pytest.fail.Exception, match="did not end within"):
        windows_python.run("-c", "import time; time.sleep(600)", timeout_s=3)
    assert windows_python.run("-c", "print(1)").out.strip() == "1"


@pytest.mark.xdist_group("kept")
def test_one_worker_runs_a_group(request: pytest.FixtureRequest) -> None:
    """Else nothing fails, but each worker makes every fleet that one should make for all: a third of a run's time."""
    if not request.config.getoption("loadgroup", False):
        pytest.skip("only a worker of --dist loadgroup keeps groups")
    assert request.node.nodeid.endswith("@kept"), "xdist can not mark groups: another pytest than requirements.txt says"
