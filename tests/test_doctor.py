"""`doctor` names each trap on a host that really has it, and the fix; a part of it runs before each deployment."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests import seam as est
from tests.fleet import MODULE, Fleet, Host, need, run, unavailable, wait_for

Findings = dict[str, dict[str, Any]]


def doctor(fleet: Fleet, host: Host, *words: str, **options: Any) -> Findings:
    """What it says of a host; several of one name: the last that is not well."""
    code, out, err = fleet.cli(*words, "doctor", "--json", host=host, **options)
    answer = json.loads(out)
    assert code == (0 if answer["ok"] else 1), err
    assert answer["ok"] == all(check["ok"] is not False for check in answer["checks"])
    found: Findings = {}
    for check in sorted(answer["checks"], key=lambda check: check["ok"] is False):
        assert bool(check.get("fix")) == (check["ok"] is False), "a fix for what is wrong"
        found[check["name"]] = check
    return found


def wrong(found: Findings) -> set[str]:
    return {name for name, check in found.items() if check["ok"] is False}


@pytest.fixture
def two(fleet: Callable[..., Fleet]) -> Fleet:
    """A master that serves; the agent's host is the one to look at."""
    one = fleet(hosts=2, start=False)
    one.start(one.master)
    return one


def test_a_host_without_a_trap(two: Fleet) -> None:
    """All but the service: this fleet runs by hand. With one, `test_service` sees the exit code 0."""
    agent = two.agents[0]
    two.start(agent)
    found = doctor(two, agent)
    assert wrong(found) == {"service"}
    assert "nothing starts it after a reboot" in found["service"]["text"]
    assert found["clock"]["ok"] and found["detachment"]["ok"] and found["access"]["ok"]
    assert f"{two.url}/ lets {agent.address} in" in found["master"]["text"]
    assert wrong(doctor(two, two.master)) == {"service"}
    text = two.cli("doctor", host=agent).out
    assert "✓ clean: no local changes\n" in text
    assert "✗ service: " in text and "    fix: " in text


def test_what_is_wrong_with_the_clone_and_the_way_to_it(two: Fleet, tmp_path: Path) -> None:
    agent = two.agents[0]
    (agent.repo / "app.txt").write_text("x")
    (agent.repo / "deploy.sh").write_text("echo local\n")
    two.origin.git("remote", "set-url", "origin", "ssh://nobody@127.0.0.1:1/x.git", cwd=agent.repo)
    found = doctor(two, agent, env={"ESTELLE_BIND": "127.0.0.9"})
    assert wrong(found) == {"service", "clean", "access", "master"}
    assert found["clean"]["text"] == "local changes: deploy.sh"
    assert "127.0.0.9 is not in the whitelist" in found["master"]["text"]
    line = found["master"]["fix"]
    assert " whitelist add 127.0.0.9 --commit`" in line and "`whitelist" not in line, "as it is typed here"
    two.origin.git("remote", "remove", "origin", cwd=agent.repo)
    two.stop(two.master)
    assert "stopping on SIGTERM" in two.master.stderr
    assert "is offline" not in two.master.stderr, "its own end says nothing of the agents"
    found = doctor(two, agent)
    assert "remote" in wrong(found) and "remote add origin" in found["remote"]["fix"]
    assert "can't reach the master" in found["master"]["text"]
    shutil.rmtree(agent.repo / ".git")
    found = doctor(two, agent, env={"GIT_CEILING_DIRECTORIES": str(tmp_path)})
    assert "is no git checkout" in found["checkout"]["text"]


def test_what_is_wrong_with_the_configuration_and_the_console(two: Fleet, tmp_path: Path) -> None:
    agent = two.agents[0]
    config = json.loads(agent.config.read_text())
    agent.config.write_text(json.dumps(config | {"deploy": {"command": ["pnpm-9", "x"]}}))
    found = doctor(two, agent, env={"PYTHONIOENCODING": "cp1252"})
    assert wrong(found) == {"service", "command", "clean", "encoding"}
    assert "pnpm-9: not found in PATH" in found["command"]["text"]
    agent.config.write_text('{"masterUrl": 7}')
    assert "masterUrl" in doctor(two, agent)["configuration"]["text"]
    agent.config.unlink()
    found = doctor(two, agent, env={"ESTELLE_CONFIG": ""})
    assert wrong(found) == {"service", "configuration"} and found["git"]["ok"]
    (tmp_path / "python3").symlink_to(sys.executable)
    assert wrong(doctor(two, agent, env={"ESTELLE_CONFIG": "", "PATH": str(tmp_path)})) >= {"configuration", "git"}


def test_what_fails_a_deployment_at_its_end_and_what_a_killed_git_left(two: Fleet, tmp_path: Path) -> None:
    """A lock of a git that is gone, services that nobody knows, HAProxy on everybody's own address, a folder that is
    not there: each was silent."""
    agent = two.agents[0]
    lock = agent.repo / ".git" / "index.lock"
    lock.touch()
    assert "lock" not in doctor(two, agent), "a git of this very moment has it"
    os.utime(lock, (1e9, 1e9))
    found = doctor(two, agent)
    assert "no git works there" in found["lock"]["text"] and str(lock) in found["lock"]["fix"]
    lock.unlink()
    # whatever language this shell speaks, what git says is read in one
    ssh = tmp_path / "ssh"
    ssh.write_text('#!/bin/sh\nprintf "Welcome\\r\\nspoken: $LANGUAGE\\r\\n" >&2\nexit 255\n')
    ssh.chmod(0o755)
    url = two.origin.git("config", "remote.origin.url", cwd=agent.repo)
    two.origin.git("config", "core.sshCommand", str(ssh), cwd=agent.repo)
    two.origin.git("config", "remote.origin.url", "ssh://h/x", cwd=agent.repo)
    found = doctor(two, agent)
    assert found["access"]["text"].startswith("spoken: en;") and "key" not in found["access"]["fix"], found["access"]
    two.origin.git("config", "remote.origin.url", url, cwd=agent.repo)
    config = json.loads(agent.config.read_text())
    services = ["nobody-knows-this.service", "pm2:ecosystem.config.js"]
    more: dict[str, Any] = {
        "deploy": {"command": ["sh", "deploy.sh"], "restart": services},
        "haproxy": {"host": "127.0.0.1"},
    }
    more["haproxy"]["backend"] = "web"
    agent.config.write_text(json.dumps(config | more))
    found = doctor(two, agent)
    assert "haproxy" not in wrong(found), "a fleet of loopback addresses has it as a name"
    assert found["restart"]["text"] == "deploy.restart names ecosystem.config.js, and there is no such file"
    more["deploy"]["restart"] = services[:1]
    agent.config.write_text(json.dumps(config | more | {"whitelist": [*config["whitelist"], "192.0.2.7"]}))
    found = doctor(two, agent)
    assert found["restart"]["text"].startswith("nobody-knows-this.service: ")
    assert found["haproxy"]["text"] == "haproxy.host is 127.0.0.1, which each host takes for itself"
    gone = tmp_path / "gone"
    agent.config.write_text(json.dumps(config | {"hosts": {agent.address: {"repo": str(gone)}}}))
    assert str(gone) in doctor(two, agent)["checkout"]["text"]


def test_a_remote_that_only_the_operator_s_agent_opens() -> None:
    """A service has no ssh-agent: what works at the prompt does not work at night."""
    said = "git@h: Permission denied (publickey)."
    found = est.judge_remote(128, said, "origin", agent_only=True)
    assert found.ok is False and "a service has no ssh-agent" in found.text
    assert est.judge_remote(0, "", "origin", agent_only=False).ok
    # no key helps where nobody answers, and the line is typed from any folder
    silent = "ssh: connect to host h port 22: Connection refused\nfatal: Could not read from remote repository.\n"
    found = est.judge_remote(128, silent, "origin", agent_only=False, repo=Path("/srv/a b"))
    assert "does not answer (ssh: connect to host h port 22" in found.text
    assert "key" not in found.fix and found.fix.endswith("git -C '/srv/a b' ls-remote origin")
    refused = est.judge_remote(128, said, "origin", agent_only=False, repo=Path("/srv/a b"))
    assert "a key" in refused.fix and refused.fix.endswith("git -C '/srv/a b' ls-remote origin")


def test_other_owners_and_full_disks(two: Fleet, tmp_path: Path) -> None:
    if os.geteuid() != 0:
        unavailable("only root can give files away and mount")
    agent = two.agents[0]
    for path in [agent.repo, *agent.repo.rglob("*")]:
        os.chown(path, 12345, 12345)
    found = doctor(two, agent)
    assert {"owner", "checkout"} <= wrong(found)
    assert "belongs to user 12345" in found["owner"]["text"]
    assert f"safe.directory {agent.repo}" in found["checkout"]["fix"]
    for path in [agent.repo, *agent.repo.rglob("*")]:
        os.chown(path, 0, 0)
    mount = 'mount -t tmpfs -o size=9m tmpfs "$0" && exec "$@"'
    words = [*two.program, "--state", str(tmp_path / "small"), "--bind", agent.address, "doctor", "--json"]
    (tmp_path / "small").mkdir()
    code, out, err = run(["unshare", "-m", "sh", "-c", mount, tmp_path / "small", *words], two.env, agent.repo)
    assert code == 1, err
    disks = [check for check in json.loads(out)["checks"] if check["name"] == "disk"]
    assert [check["ok"] for check in disks] == [True, False]


def test_detachment_is_proven_by_a_kill(tmp_path: Path) -> None:
    """Where a runner does not leave the daemon's tree, doctor sees it die."""
    text = MODULE.read_text("utf-8")
    leave = "        if os.fork():\n            os._exit(0)\n        os.setsid()\n"
    assert text.count(leave) == 1
    (tmp_path / "estelle_updater.py").write_text(text.replace(leave, ""), "utf-8")
    env = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "LC_ALL": "C.UTF-8"}
    code, out, err = run([sys.executable, tmp_path / "estelle_updater.py", "doctor", "--json"], env, tmp_path)
    assert code == 1, err
    found = {check["name"]: check for check in json.loads(out)["checks"]}
    assert found["detachment"]["ok"] is False, found


def test_works_without_packages(two: Fleet) -> None:
    python = [sys.executable, "-S"]  # no site-packages
    argv = [*python, str(MODULE), "doctor", "--json", "--bind", two.agents[0].address]
    code, out, err = run([*argv, "--state", two.agents[0].state], two.env, two.agents[0].repo)
    assert code == 1, err
    found = {check["name"]: check for check in json.loads(out)["checks"]}
    assert "not installed" in found["packages"]["text"]
    assert found["master"]["ok"]  # a commander needs none


@contextmanager
def haproxy(folder: Path) -> Iterator[tuple[Path, Path]]:
    """A real one with its stats socket; yields the file and the socket."""
    config, socket = folder / "haproxy.cfg", folder / "admin.sock"
    config.write_text(
        f"global\n stats socket {socket} level admin\ndefaults\n mode http\n timeout connect 1s\n timeout client 1s\n"
        " timeout server 1s\nbackend app\n server blue 127.0.0.1:1\n server green 127.0.0.1:2 backup\n"
    )
    process = subprocess.Popen(["haproxy", "-db", "-f", config], stderr=subprocess.DEVNULL)
    try:
        yield config, socket
    finally:
        process.kill()
        process.wait(10)


def test_the_host_of_haproxy(two: Fleet, tmp_path: Path) -> None:
    need("haproxy")
    agent = two.agents[0]
    with haproxy(tmp_path) as (config, socket):
        rule = {"host": "balancer", "backend": "app", "config": str(config), "socket": str(socket)}
        settings = json.loads(agent.config.read_text())
        settings |= {"haproxy": rule, "hosts": {agent.address: {"name": "balancer"}}}
        agent.config.write_text(json.dumps(settings))
        wait_for(socket.exists, "HAProxy serves")
        found = doctor(two, agent)
        assert found["haproxy"]["ok"] and found["haproxy socket"]["ok"] and found["haproxy file"]["ok"]
        assert "haproxy" not in doctor(two, two.master)
        config.write_text(config.read_text() + "nonsense\n")
    found = doctor(two, agent)
    assert {"haproxy", "haproxy socket"} <= wrong(found)
    assert "nonsense" in found["haproxy"]["text"]
    assert "level admin" in found["haproxy socket"]["fix"]


def test_certificates_and_the_program_s_folder(two: Fleet, tmp_path: Path) -> None:
    need("openssl")
    agent = two.agents[0]
    settings = json.loads(agent.config.read_text())
    for days, ok in ((9, False), (60, True)):
        words = ["req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=x", "-days", str(days)]
        pair = ["-keyout", str(tmp_path / "key.pem"), "-out", str(tmp_path / "cert.pem")]
        assert run(["openssl", *words, *pair], two.env).code == 0
        settings["tls"] = {"cert": str(tmp_path / "cert.pem"), "key": str(tmp_path / "key.pem")}
        agent.config.write_text(json.dumps(settings | {"updater": {"sha256": "0" * 64}}))
        found = doctor(two, agent)
        assert found["certificate"]["ok"] is ok
        assert " days left" in found["certificate"]["text"]
        assert found["program"]["ok"]
    (tmp_path / "cert.pem").write_text("none")
    assert "no certificate" in doctor(two, agent)["certificate"]["text"]


@pytest.mark.parametrize(
    ("found", "ok"),
    [
        (est.judge_clock(0.4), True),
        (est.judge_clock(-29), True),
        (est.judge_clock(31), False),
        (est.judge_clock(-3600), False),
        (est.judge_disk("/", 10 << 30), True),
        (est.judge_disk("/", 1 << 20), False),
        (est.judge_encoding("utf-8"), True),
        (est.judge_encoding("cp949"), False),  # Korean, but no ✓
        (est.judge_encoding("cp1252"), False),
        (est.judge_encoding("no-such"), False),
        (est.judge_unit({}), False),
    ],
)
def test_judgement(found: est.Finding, ok: bool) -> None:
    assert found.ok is ok
    assert found.fix or ok


UNIT = {"ActiveState": "active", "UnitFileState": "enabled", "KillMode": "process", "NRestarts": "0"}


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("KillMode", "control-group", "kill a running deployment"),
        ("ActiveState", "failed", "failed"),
        ("UnitFileState", "disabled", "disabled"),
    ],
)
def test_judgement_of_a_unit(key: str, value: str, words: str) -> None:
    assert est.judge_unit(UNIT).ok
    found = est.judge_unit(UNIT | {key: value}, " --user")
    assert found.ok is False and words in found.text and "systemctl --user" in found.fix


def test_before_each_deployment(fleet: Callable[..., Fleet]) -> None:
    """What is certain to fail does, before anything is fetched; what may be mended by the pull is a warning."""
    one = fleet(hosts=1, command=("no-such-program",))
    one.origin.commit({"config/updater.json": json.dumps(json.loads(one.master.config.read_text()) | {
        "deploy": {"command": ["sh", "deploy.sh"]}})})  # fmt: skip
    code, out, _ = one.cli("trigger", "all", "master")
    assert code == 0, out
    assert "warning: no-such-program: not found in PATH" in out
    one.origin.git("remote", "remove", "origin", cwd=one.master.repo)
    code, out, _ = one.cli("trigger", "all", "master")
    assert code == 1
    assert "there is no remote origin" in out and "git fetch" not in out


def test_nothing_that_leaves_the_host_has_a_secret(two: Fleet) -> None:
    """A token in the remote's URL and a secret by its configured name: doctor, health, status, plan and the log."""
    agent, token, session = two.agents[0], "ghp_0123456789abcdef", "0123456789"
    two.origin.git("remote", "set-url", "origin", f"https://{token}@127.0.0.1:1/x.git?token=q1w2e3r4", cwd=agent.repo)
    settings = json.loads(agent.config.read_text())
    settings["deploy"]["secrets"] = ["ODD"]
    settings["health"] = [{"name": "odd", "command": ["sh", "-c", f"echo {session}"], "hosts": [agent.address]}]
    settings["hosts"] = {agent.address: {"env": {"ODD": session}}}
    for host in two.hosts:
        host.config.write_text(json.dumps(settings))
    two.restart(two.master)
    two.start(agent)
    said = [
        *two.cli("doctor", host=agent),
        *two.cli("health", agent.address, "--json"),
        *two.cli("plan", agent.address, "master", "--json"),
        *two.cli("status", "--json"),
        *two.cli("trigger", agent.address, "master"),
    ]
    two.origin.git("remote", "set-url", "origin", "https://short7@127.0.0.1:1/x.git", cwd=agent.repo)
    said += [*two.cli("doctor", host=agent)]
    # what a step prints, what its announcement names, and what a version file says
    spent = "https://127.0.0.1:1/dl?access_token=q1w2e3r4&x=1"
    for host in two.hosts:
        two.origin.git("remote", "set-url", "origin", str(two.origin.bare), cwd=host.repo)
        command = ["sh", "-c", f"echo 'GET {spent}'; exit 3", spent]
        host.config.write_text(json.dumps({**settings, "deploy": {"command": command, "version": "v"}}))
    (agent.repo / "v").write_text(f"v1 {spent}")
    said += [
        *two.cli("trigger", agent.address, "master"),
        *two.cli("trigger", agent.address, "master", "--json"),
        *two.cli("status", "--json"),
        *two.cli("history", "--json"),
        *two.cli("plan", agent.address, "master", "--json"),
        agent.stderr,
        two.master.stderr,
    ]
    assert "GET https://127.0.0.1:1/dl?access_token=***&x=1" in str(said)
    kept = [path.read_text() for path in two.master.state.glob("runs/*/*")]
    said += kept
    text = "".join(map(str, said))
    assert "https://***@127.0.0.1:1/x.git?token=***" in text
    for secret in (token, session, "q1w2e3r4", "short7"):
        assert secret not in text, [part for part in map(str, said) if secret in part]


def test_nobody_falls_back_from_wss_to_ws(tmp_path: Path) -> None:
    state = est.StateFolder(tmp_path)
    old, new = est.parse_master_url("ws://127.0.0.1:9900"), est.parse_master_url("wss://127.0.0.1:9900")
    state.save_master_url(old)
    assert state.last_master_url(est.parse_master_url("ws://127.0.0.2")) == old
    assert state.last_master_url(new) is None
    state.save_master_url(new)
    assert state.last_master_url(old) == new
