"""wss://: whom a client trusts, certificates that are renewed while links are up, and their end."""

from __future__ import annotations

import datetime
import json
import os
import re
import shutil
import socket
import ssl
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests import seam as est
from tests.commands import COMMAND, GATED, HURRIED, detach, lines_of, log_of, open_gate, wait_state, write_script
from tests.fleet import MODULE, READY_S, ROOT, Fleet, Host, need, run, wait_for

README = (ROOT / "README.md").read_text("utf-8")


class Authority:
    """The README's own commands, in a folder."""

    def __init__(self, folder: Path, name: str = "IP:127.0.0.1") -> None:
        need("openssl")
        self.folder = folder
        folder.mkdir()
        block = re.search(r"<!-- private-ca -->\n```sh\n(.*?)```", README, re.DOTALL)
        assert block
        self.script = block[1]
        assert "IP:5.223.72.58" in self.script
        self.issue(self.script.replace("IP:5.223.72.58", name))

    def issue(self, script: str) -> None:
        code, out, err = run(["bash", "-ec", script], dict(os.environ), self.folder)
        assert code == 0, out + err

    def renew(self, days: int) -> None:
        """Another key and certificate of the same authority, put in place like certbot does it: one after the other."""
        last = self.script.rindex("openssl x509")
        self.issue(
            self.script[self.script.index("openssl req -newkey") : last].replace("master.key", "new.key")
            + self.script[last:].replace("-days 825", f"-days {days}").replace("master.pem", "new.pem")
        )
        for name in ("pem", "key"):
            (self.folder / f"new.{name}").replace(self.folder / f"master.{name}")

    @property
    def tls(self) -> dict[str, str]:
        return {"cert": str(self.folder / "master.pem"), "key": str(self.folder / "master.key")}


def secure(fleet: Callable[..., Fleet], authority: Authority, hosts: int = 2, **config: Any) -> Fleet:
    """A wss:// fleet, not yet started, whose repository has the authority's certificate."""
    one = fleet(hosts=hosts, start=False, command=COMMAND)
    settings = json.loads(one.master.config.read_text()) | {"masterUrl": one.url.replace("ws:", "wss:")} | config
    settings["tls"] = authority.tls | {"ca": "config/fleet-ca.pem"}
    ca = (authority.folder / "fleet-ca.pem").read_text()
    one.origin.commit({"config/updater.json": json.dumps(settings), "config/fleet-ca.pem": ca})
    for host in one.hosts:
        one.origin.git("pull", "--quiet", cwd=host.repo)
    write_script("echo deploying\n", *one.hosts)
    return one


def edit(host: Host, **changes: object) -> None:
    host.config.write_text(json.dumps(json.loads(host.config.read_text()) | changes))


def serial(one: Fleet, ca: Path, strict: bool = False) -> str:
    """The serial number that a new client is shown."""
    context = ssl.create_default_context(cafile=ca)
    if strict:  # Python 3.13's default
        context.verify_flags |= ssl.VERIFY_X509_STRICT
    with (
        socket.create_connection(("127.0.0.1", one.port), timeout=READY_S) as plain,
        context.wrap_socket(plain, server_hostname="127.0.0.1") as wrapped,
    ):
        certificate = wrapped.getpeercert()
        assert certificate
        return str(certificate["serialNumber"])


def test_the_readme_s_authority_serves_a_fleet_through_a_renewal(fleet: Callable[..., Fleet], tmp_path: Path) -> None:
    authority = Authority(tmp_path / "ca")
    one = secure(fleet, authority)
    one.master.program = (sys.executable, str(MODULE))
    one.start()
    agent, ca = one.agents[0], authority.folder / "fleet-ca.pem"
    code, out, err = one.cli("trigger", "all", "master")
    assert (code, lines_of(out, agent.address)[-2]) == (0, "deploying"), err
    assert one.cli("status", host=agent).code == 0, "through masterUrl"

    config, threads = est.load_config(one.master.config), threading.active_count()
    connection = est.Caller(est.StateFolder(tmp_path / "none"), config, "127.0.0.1", one.master.repo).dial(READY_S)
    assert threading.active_count() == threads, "two threads would meet in OpenSSL, which gives garbage now and then"
    connection.close()
    tls = est.client_tls(config, one.master.repo, one.url.replace("ws:", "wss:"))
    with pytest.raises(est.UnreachableError, match="none to hand out"):  # as `upgrade` fetches it: from a checkout, 404
        est.fetch_program(config.master_url, "127.0.0.1", tls)

    def problem() -> str:
        return str(json.loads(one.cli("status", "--json").out)["master"]["problem"] or "")

    assert problem() == ""
    first = serial(one, ca, strict=True)
    write_script(GATED, agent)
    running = detach(one, agent.address)
    wait_state(one, running, agent, "running")
    authority.renew(days=14)
    wait_for(lambda: serial(one, ca) != first, "new clients are shown the new certificate")
    wait_for(lambda: problem().endswith("expires in 13 days"), lambda: f"its end is announced: {problem()}")
    assert one.master.stderr.count("expires in 13 days") == 1
    second = serial(one, ca)
    (authority.folder / "master.key").write_text("no key at all")
    wait_for(lambda: "can't use the certificate" in problem(), lambda: f"a broken pair is told: {problem()}")
    assert serial(one, ca) == second, "and the one before stays in use"
    authority.renew(days=365)
    wait_for(lambda: problem() == "", lambda: f"all is well: {problem()}")
    assert serial(one, ca) not in (first, second)
    open_gate(agent)
    wait_state(one, running, agent, "succeeded")
    assert b"begun\nended\n" in log_of(one, running, agent)
    assert agent.stderr.count("welcomed") == 1 and "ended" not in agent.stderr, "nobody was cut off"
    assert "offline" not in one.master.stderr


def test_whom_a_client_trusts(fleet: Callable[..., Fleet], tmp_path: Path) -> None:
    authority, other = Authority(tmp_path / "ca"), Authority(tmp_path / "other")
    one = secure(fleet, authority)
    one.start(one.master)
    agent = one.agents[0]

    def refused(reason: str, **changes: object) -> None:
        settings = json.loads(one.master.config.read_text()) | changes
        path = tmp_path / "elsewhere" / "config" / "updater.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(settings))
        code, out, err = one.cli("status", env={"ESTELLE_CONFIG": str(path), "ESTELLE_STATE": str(tmp_path / "none")})
        assert (code, out) == (3, "") and reason in err and "Traceback" not in err, err

    url = json.loads(one.master.config.read_text())["masterUrl"]
    refused("certificate verify failed", tls={})  # the system's roots do not know it
    refused("certificate verify failed", tls={"ca": str(other.folder / "fleet-ca.pem")})
    ca = {"ca": str(authority.folder / "fleet-ca.pem")}
    refused("Hostname mismatch", tls=ca, masterUrl=url.replace("127.0.0.1", "localhost"))
    refused("can't reach the master", tls={}, masterUrl=url.replace("wss:", "ws:"))
    other_name = json.loads(one.master.config.read_text()) | {"tls": {"ca": str(other.folder / "fleet-ca.pem")}}
    agent.config.write_text(json.dumps(other_name))
    one.spawn(agent)
    wait_for(lambda: "certificate verify failed" in agent.stderr, "an agent does not trust just anybody")
    assert "welcomed" not in agent.stderr and "127.0.0.2" not in one.cli("status").out
    edit(agent, tls=ca)
    wait_for(lambda: "welcomed" in agent.stderr, lambda: f"it tries again with new settings\n{agent.stderr}", 90)


@pytest.mark.parametrize("case", ["no file", "no pair", "with a passphrase", "no certificate"])
def test_a_certificate_that_can_not_be_used_ends_the_start(
    fleet: Callable[..., Fleet], tmp_path: Path, case: str
) -> None:
    authority = Authority(tmp_path / "ca")
    pem, key = authority.folder / "master.pem", authority.folder / "master.key"
    if case == "no file":
        pem.unlink()
    elif case == "no pair":
        shutil.copy(authority.folder / "ca.key", key)
    elif case == "with a passphrase":
        authority.issue("openssl ec -aes128 -passout pass:geheim -in master.key -out new.key && mv new.key master.key")
    else:
        pem.write_text("nothing\n")
    one = secure(fleet, authority, hosts=1)
    result = one.cli("serve", timeout_s=30)
    assert result.code == 2 and f"can't use the certificate {pem}" in result.err and "hint: " in result.err, result.err
    assert "Traceback" not in result.err


def test_the_end_of_certificates(tmp_path: Path) -> None:
    authority = Authority(tmp_path / "ca")
    ends = {}
    for days in (1, 400, 15_000):  # the last one's year has four digits in the file
        authority.renew(days)
        pem = (authority.folder / "master.pem").read_bytes()
        shown = run(["openssl", "x509", "-enddate", "-noout", "-in", "master.pem"], os.environ, authority.folder).out
        text = shown.strip().removeprefix("notAfter=").removesuffix(" GMT")
        wanted = datetime.datetime.strptime(text, "%b %d %H:%M:%S %Y").replace(tzinfo=datetime.UTC).timestamp()
        assert est.certificate_end(pem) == wanted
        assert abs(wanted - time.time() - days * 86400) < 60
        ends[wanted] = pem
    assert est.certificate_end(b"".join(ends.values())) == min(ends), "the first to end breaks the chain"
    for nothing in (b"", b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"):
        with pytest.raises(ValueError, match="no certificate"):
            est.certificate_end(nothing)


def test_a_greeting_of_tls_that_does_not_end_is_ended(fleet: Callable[..., Fleet], tmp_path: Path) -> None:
    one = secure(fleet, Authority(tmp_path / "ca"), hosts=1)
    one.master.program = (sys.executable, "-c", HURRIED)
    one.start(env={"LIMITS": '{"WELCOME_S": 2}'})
    halves = [socket.create_connection(("127.0.0.1", one.port), timeout=30) for _ in range(20)]
    for half in halves:
        half.sendall(b"\x16\x03\x01\x40\x00\x01")  # a record that is long in coming
    for half in halves:
        assert half.recv(1) == b""
        half.close()
    # of those who go in the middle of theirs, and of what follows at once, none is a fault
    context = ssl.create_default_context(cafile=tmp_path / "ca" / "fleet-ca.pem")
    for _ in range(50):
        plain = socket.create_connection(("127.0.0.1", one.port), timeout=30)
        with context.wrap_socket(plain, server_hostname="127.0.0.1") as wrapped:
            wrapped.sendall(b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
    assert one.cli("status").code == 0
    assert "Traceback" not in one.master.stderr
