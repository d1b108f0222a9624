"""The files in config/ and systemd/: HAProxy, certbot's hook, units; and the ports of the firewall."""

from __future__ import annotations

import fcntl
import json
import os
import re
import shlex
import shutil
import socket
import ssl
import subprocess
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import HTTPRedirectHandler, HTTPSHandler, build_opener

import pytest

from tests.fleet import PROGRAM, ROOT, clean_env, free_port, need, run, wait_for
from tests.seam import Config, config_warnings, init_text, parse_config, render_firewall
from tests.stores import certificate, server, worker

SUBNET = "10.0.0.0/24"


class Example:
    """config/haproxy.cfg with this test's own ports and files, as its comments say to change it."""

    def __init__(self, folder: Path) -> None:
        need("haproxy")
        self.file, self.pem = folder / "haproxy.cfg", folder / "certs" / "yquant.pem"
        self.pem.parent.mkdir()
        self.http, self.https, self.stats, self.blue, self.green, self.acme = (free_port() for _ in range(6))
        changes = {
            "*:80\n": f"127.0.0.1:{self.http}\n",
            "*:443": f"127.0.0.1:{self.https}",
            "*:8404": f"127.0.0.1:{self.stats}",
            "10.0.0.11:6000": f"127.0.0.1:{self.blue}",
            "10.0.0.12:6000": f"127.0.0.1:{self.green}",
            "127.0.0.1:8888": f"127.0.0.1:{self.acme}",
            "/etc/haproxy/certs/yquant.pem": str(self.pem),
            "/etc/haproxy/server-state": str(folder / "server-state"),
            "/run/haproxy/admin.sock": str(folder / "admin.sock"),
            "    user haproxy\n    group haproxy\n": "",
            "admin.sock user haproxy group haproxy": "admin.sock",
        }
        text = (ROOT / "config/haproxy.cfg").read_text()
        for old, new in changes.items():
            assert old in text, old
            text = text.replace(old, new)
        self.file.write_text(text)
        certificate(self.pem)
        (folder / "server-state").write_text("1\n")  # as the file says

    def check(self) -> subprocess.CompletedProcess[str]:
        argv = ["haproxy", "-c", "-f", str(self.file)]
        return subprocess.run(argv, capture_output=True, text=True, timeout=30, check=False)

    @contextmanager
    def running(self) -> Iterator[int]:
        master = ["-S", str(self.file.with_name("master.sock"))]
        with server(["haproxy", "-W", "-db", "-f", str(self.file), *master], self.https) as pid:
            yield pid


def status_of(url: str) -> tuple[int, str]:
    """Status and text of an answer, redirects not followed."""

    class Stay(HTTPRedirectHandler):
        def redirect_request(self, *words: object) -> None: ...

    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    try:
        with build_opener(Stay(), HTTPSHandler(context=context)).open(url, timeout=10) as answer:
            return answer.status, answer.read().decode()
    except HTTPError as problem:
        with problem:
            return problem.code, problem.headers.get("Location") or ""


# What an application could take for a path outside /webhook, after decoding once or twice, or for none at all.
NOT_WEBHOOKS = [
    b"/", b"/webhooks", b"/dashboard", b"/health", b"//webhook", b"/./webhook", b"/Webhook", b"*",
    *(b"/webhook/%sdashboard" % form for form in (
        b"../", b"./../", b"a/../../", b"..//", b"/../", b"..\\", b"..;/", b"..;x=1/", b".../", b"..%2f", b"..%2F",
        b"%2e%2e/", b"%2E%2E/", b"%2e./", b".%2e/", b"%2e%2e%2f", b"%252e%252e%252f", b"..%252f", b"..%5c", b"%5c..%5c",
        b"%c0%ae%c0%ae/", b"..%c0%af", b"%u002e%u002e/", b"\xc0\xae\xc0\xae/", b"..%00/", b"%00", b"..%0d%0a/",
        b"..%09/",        b"..%ef%bc%8f", b"\xef\xbc\x8e\xef\xbc\x8e/",
    )),
    b"/webhook%2f..%2fdashboard", b"/webhook%2f%2e%2e/dashboard", b"/webhook/..", b"/webhook/../dashboard?x=1",
    b"/webhook..;/dashboard", b"/webhook;/../dashboard", b"/webhook#/../dashboard", b"/webhook/#/../dashboard",
    b"/%77ebhook", b"/x/../webhook/../dashboard", b"http://x/webhook/../dashboard", b"http://x/dashboard",
]  # fmt: skip


def raw_status(port: int, target: bytes) -> int:
    """The status that exactly this request target gets."""
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    with socket.create_connection(("127.0.0.1", port), 10) as plain, context.wrap_socket(plain) as link:
        link.sendall(b"GET %s HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n" % target)
        head = link.recv(65536)
    return int(head.split(b" ", 2)[1]) if head else 400


def test_haproxy_example_passes_its_own_check(tmp_path: Path):
    checked = Example(tmp_path).check()
    assert checked.returncode == 0, checked.stderr
    assert "WARNING" not in checked.stderr and "ALERT" not in checked.stderr


def test_haproxy_example_lets_only_webhooks_in(tmp_path: Path):
    one = Example(tmp_path)
    blue, green, acme = (f"127.0.0.1:{port}" for port in (one.blue, one.green, one.acme))
    with worker("blue", blue) as active, worker("green", green), worker("certbot", acme), one.running():
        secure = f"https://127.0.0.1:{one.https}"
        wait_for(lambda: status_of(f"{secure}/webhook") == (200, "blue"), "HAProxy has checked its servers")
        assert status_of(f"{secure}/webhook/tradingview?x=1") == (200, "blue")
        for path in ("/webhook/", "/webhook/a.b/c-1_~x", "/webhook?to=/../dashboard"):
            assert status_of(secure + path) == (200, "blue"), path
        for target in NOT_WEBHOOKS:
            assert raw_status(one.https, target) in (400, 404), target
        assert status_of(f"http://127.0.0.1:{one.http}/webhook") == (301, f"https://127.0.0.1:{one.http}/webhook")
        assert status_of(f"http://127.0.0.1:{one.http}/.well-known/acme-challenge/abc") == (200, "certbot")
        assert status_of(f"http://127.0.0.1:{one.stats}/")[0] == 403  # loopback is not Tailscale
        os.kill(active, 9)
        wait_for(lambda: status_of(f"{secure}/webhook") == (200, "green"), "the standby takes over")


@pytest.fixture
def lineage(tmp_path: Path) -> Path:
    """What certbot leaves behind after a renewal."""
    folder = tmp_path / "lineage"
    folder.mkdir()
    certificate(folder / "both.pem", days=80, name="renewed")
    text = (folder / "both.pem").read_text()
    cut = text.index("-----BEGIN PRIVATE")
    (folder / "fullchain.pem").write_text(text[:cut])
    (folder / "privkey.pem").write_text(text[cut:])
    return folder


def hook(one: Example, lineage: Path, reload: str = "true") -> tuple[int, str]:
    """What certbot would do; its exit code and complaint."""
    env = {"RENEWED_LINEAGE": lineage, "HAPROXY_CERT": one.pem, "HAPROXY_CFG": one.file, "HAPROXY_RELOAD": reload}
    done = run([ROOT / "config/certbot-deploy-hook.sh"], os.environ | {k: str(v) for k, v in env.items()})
    return done.code, done.err


def left_over(one: Example) -> list[str]:
    return [path.name for path in one.pem.parent.iterdir() if path.name.startswith("yquant.pem.")]


def test_certbot_hook_puts_the_certificate_to_work(tmp_path: Path, lineage: Path):
    one = Example(tmp_path)
    if os.geteuid() == 0:
        os.chown(one.pem.parent, 12345, 12345)
    told = f"touch {tmp_path}/reloaded"
    assert hook(one, lineage, told) == (0, "")
    assert one.pem.read_bytes() == (lineage / "both.pem").read_bytes()
    assert one.pem.stat().st_mode & 0o777 == 0o600
    assert one.pem.stat().st_uid == one.pem.parent.stat().st_uid  # who runs `haproxy -c` must be able to read it
    assert Path(f"{one.file}.lock").stat().st_mode & 0o444 == 0o444  # and to lock
    assert (tmp_path / "reloaded").exists() and left_over(one) == []


@pytest.mark.parametrize("trouble", ["key", "old", "config"])
def test_certbot_hook_keeps_the_old_certificate_where_the_new_one_is_bad(tmp_path: Path, lineage: Path, trouble: str):
    one = Example(tmp_path)
    before = one.pem.read_bytes()
    if trouble == "key":
        (lineage / "privkey.pem").write_bytes(certificate(tmp_path / "other.pem").with_suffix(".key").read_bytes())
    elif trouble == "old":
        (lineage / "fullchain.pem").write_bytes(certificate(lineage / "old.pem", days=1).read_bytes())
        (lineage / "privkey.pem").write_bytes((lineage / "old.key").read_bytes())
    else:
        one.file.write_text(one.file.read_text() + "\nnonsense\n")
    code, said = hook(one, lineage, f"touch {tmp_path}/reloaded")
    assert code == 1 and "is as it was" in said
    assert one.pem.read_bytes() == before and left_over(one) == [] and not (tmp_path / "reloaded").exists()


def test_certbot_hook_waits_for_a_switch(tmp_path: Path, lineage: Path):
    one = Example(tmp_path)
    before = one.pem.read_bytes()
    with open(f"{one.file}.lock", "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        env = os.environ | {"RENEWED_LINEAGE": str(lineage), "HAPROXY_CERT": str(one.pem), "HAPROXY_CFG": str(one.file)}
        argv = [str(ROOT / "config/certbot-deploy-hook.sh")]
        with subprocess.Popen(argv, env=env | {"HAPROXY_RELOAD": "true"}, stderr=subprocess.PIPE) as process:
            waits = wait_for(
                lambda: [p for p in Path("/proc").glob("[0-9]*") if is_flock_of(p, process.pid)], "it waits"
            )
            assert waits and one.pem.read_bytes() == before
            fcntl.flock(lock, fcntl.LOCK_UN)
            process.communicate(timeout=60)
    assert process.returncode == 0 and one.pem.read_bytes() != before


def is_flock_of(folder: Path, parent: int) -> bool:
    try:
        stat = (folder / "stat").read_text().rpartition(")")[2].split()
        return stat[1] == str(parent) and (folder / "comm").read_text().strip() == "flock"
    except (OSError, IndexError):
        return False


WORKERS = {"yq-data": "10.0.0.10", "yq-blue": "10.0.0.11", "yq-green": "10.0.0.12"}


def blue_green() -> Config:
    allowed = ["5.223.72.58", "100.64.0.0/10", "127.0.0.1"]
    text = init_text("ws://5.223.72.58:9900", allowed, ["true"], "toml", WORKERS)
    return parse_config(text, "updater.toml", "toml")


def test_blue_green_configuration_and_files_speak_of_the_same_things():
    config = blue_green()
    assert config_warnings(config) == []
    assert parse_config(init_text("ws://1.2.3.4", [], ["true"], "json", WORKERS), "x", "json").health == config.health
    cfg = (ROOT / "config/haproxy.cfg").read_text()
    assert config.haproxy and re.search(rf"^backend {config.haproxy.backend}$", cfg, re.MULTILINE)
    assert set(re.findall(r"(?m)^    server (\w+) 10", cfg)) == set(config.haproxy.servers.values())
    assert f"stats socket {config.haproxy.socket} " in cfg
    shipped = {path.name for path in (ROOT / "systemd").iterdir()}
    assert {*config.deploy.restart} <= shipped
    units = {check.systemd for check in config.health if check.systemd}
    assert units - shipped == set() and {*config.deploy.restart} <= units
    subjects = " ".join(str(getattr(check, check.kind)) for check in config.health)
    assert all(f":{port}" in subjects for port in (2000, 6000, 6379, 3306, 443))


def test_config_init_writes_it(tmp_path: Path):
    (tmp_path / ".git").mkdir()
    env = clean_env(tmp_path / "home") | {"ESTELLE_REPO": str(tmp_path)}
    argv = [*PROGRAM, "config", "init", "--blue-green", "--master", "ws://5.223.72.58:9900"]
    where = [f"--host={name}={address}" for name, address in WORKERS.items()]
    wrong: list[tuple[list[str], str]] = [
        (where[:1], "nobody knows the address of yq-blue and yq-green"),
        ([*where, "--host", "other=10.0.0.9"], "is not NAME=ADDRESS"),
        ([*where[:2], "--host", "yq-green=10.0.0.11"], "10.0.0.11 is yq-blue's and another's"),
        ([*where[:2], "--host", "yq-green=10.0.0"], "10.0.0"),
    ]
    for words, said in wrong:
        code, _, err = run([*argv, *words], env, tmp_path)
        assert code == 2 and said in err, (words, err)
        assert not (tmp_path / "config").exists()
    given = "--master ws://5.223.72.58:9900 --host=yq-data=10.0.0.10"
    line = f"config init --blue-green {given} --host yq-blue=ADDRESS --host yq-green=ADDRESS\n"
    assert line in run([*argv, *where[:1]], env, tmp_path).err
    code, out, err = run([*argv, *where], env, tmp_path)
    assert code == 0, err
    assert " release " in out and "trigger all" not in out, "the active worker is left alone"
    written = tomllib.loads((tmp_path / "config/updater.toml").read_text())
    assert written["hosts"] == {
        "10.0.0.10/yq-data": {"deploy": False},
        "10.0.0.11/yq-blue": {"color": "blue"},
        "10.0.0.12/yq-green": {"color": "green"},
    }
    assert written["haproxy"]["host"] == "10.0.0.10" and len(written["health"]) == 12
    assert {*WORKERS.values(), "5.223.72.58"} <= {*written["whitelist"]}
    notes = json.loads(run([*PROGRAM, "config", "check", "--json"], env, tmp_path).out)["notes"]
    assert not [note for note in notes if "calls itself" in note], "nothing goes by a bare name"
    code, out, _ = run(
        [*PROGRAM, "setup", "--firewall", "--subnet", "10.9.0.0/24", "--bind", "5.223.72.58"], env, tmp_path
    )
    assert code == 0 and "default 5.223.72.58/32 9900/tcp" in opened(out)  # it is the master, by its address
    path = tmp_path / "config/updater.toml"
    path.write_text(path.read_text().replace('hosts = ["yq-blue", "yq-green"]', 'hosts = ["yq-bleu"]', 1))
    code, out, _ = run([*PROGRAM, "config", "check", "--json"], env, tmp_path)
    assert code == 0 and json.loads(out)["warnings"] == ['health "web": "yq-bleu" matches no host']


@pytest.mark.parametrize("name", sorted(path.name for path in (ROOT / "systemd").glob("estelle-*.[st]*")))
def test_units_are_valid(name: str, tmp_path: Path):
    need("systemd-analyze")
    for path in (ROOT / "systemd").glob("estelle-*"):
        text = re.sub(r"(?m)^(ExecStart=)\S+", r"\1/bin/true", path.read_text())  # the programs need not be here
        (tmp_path / path.name).write_text(text.replace("User=estelle", f"User={os.geteuid()}"))
    done = run(["systemd-analyze", "verify", "--man=no", tmp_path / name], os.environ)
    mine = [line for line in done.err.splitlines() if "estelle-" in line]
    assert done.code == 0 and mine == [], done.err


def test_mariadb_drop_in_is_valid(tmp_path: Path):
    need("systemd-analyze")
    unit = tmp_path / "mariadb.service"
    unit.write_text("[Service]\nExecStart=/bin/true $MYSQLD_OPTS\n")
    (tmp_path / "mariadb.service.d").mkdir()
    shutil.copy(ROOT / "systemd/mariadb-subnet.conf", tmp_path / "mariadb.service.d/subnet.conf")
    env = os.environ | {"SYSTEMD_UNIT_PATH": f"{tmp_path}:"}
    done = run(["systemd-analyze", "verify", "--man=no", "mariadb.service"], env)
    assert done.code == 0 and "subnet.conf" not in done.err, done.err


def test_certbot_hook_is_valid_shell():
    assert run(["sh", "-n", ROOT / "config/certbot-deploy-hook.sh"], os.environ).code == 0
    assert os.access(ROOT / "config/certbot-deploy-hook.sh", os.X_OK)


def opened(text: str) -> set[str]:
    """What a firewall's lines open: ZONE SOURCE PORT."""
    found = set()
    for line in (line for line in text.splitlines() if line.startswith("firewall-cmd")):
        words = dict(word.lstrip("-").partition("=")[::2] for word in shlex.split(line, comments=True))
        zone = words.get("zone", "default")
        if rule := words.get("add-rich-rule"):
            source, port = re.findall(r'(?:address|port port)="(.*?)"', rule)
            found.add(f"{zone} {source} {port}/tcp")
        elif port := words.get("add-port"):
            found.add(f"{zone} any {port}")
    return found


def test_firewall_of_each_host_is_the_table_of_ports():
    config = blue_green()
    everybody = {"default any 41641/udp", "tailscale any 22/tcp"}
    data = render_firewall(config, WORKERS["yq-data"], "yq-data", False, SUBNET)
    assert opened(data) == everybody | {
        "default any 80/tcp", "default any 443/tcp", f"default {SUBNET} 3306/tcp", "tailscale any 8404/tcp"
    }  # fmt: skip
    green = render_firewall(config, WORKERS["yq-green"], "yq-green", False, SUBNET)
    assert opened(green) == everybody | {f"default {SUBNET} 6000/tcp", "tailscale any 2000/tcp"}
    assert "6379/tcp stays closed" in green
    master = render_firewall(config, "5.223.72.58", "master", True, SUBNET)
    assert opened(master) == everybody | {"default 5.223.72.58/32 9900/tcp", "tailscale 100.64.0.0/10 9900/tcp"}
    lines = master.splitlines()
    assert lines.index("firewall-cmd --reload") == 1 + next(
        i for i, line in enumerate(lines) if "remove-service" in line
    )
    cloud = {line for line in data.splitlines() if " -> " in line}
    assert {line.split()[3] for line in cloud} == {"41641/udp", "80/tcp", "443/tcp", "3306/tcp"}
