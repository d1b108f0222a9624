"""What a host finds out about itself: the master's addresses, which are its own, and how the world sees it."""

from __future__ import annotations

import http.server
import os
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests import seam
from tests.seam import probe_is_local, probe_master_addresses, probe_public_address


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A busy machine may take a second to answer itself."""
    monkeypatch.setattr(seam.program, "_METADATA_DEADLINE_S", 20.0)


Answer = Callable[[str, str, Mapping[str, str]], str | None]


@contextmanager
def stand_in(answer: Answer) -> Iterator[str]:
    """An HTTP server whose answers `answer(method, path, headers)` gives; None is a 404."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            text = answer(self.command, self.path, {name.lower(): text for name, text in self.headers.items()})
            self.send_response(404 if text is None else 200)
            self.end_headers()
            self.wfile.write((text or "").encode())

        do_PUT = do_GET

        def log_message(self, *words: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = False  # so that closing waits for each
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@contextmanager
def silent() -> Iterator[str]:
    """A server that accepts and never says anything."""
    with socket.create_server(("127.0.0.1", 0), backlog=16) as listener:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"


def refused() -> str:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return f"http://127.0.0.1:{listener.getsockname()[1]}"


def say(text: str | None) -> Answer:
    return lambda method, path, headers: text


def test_an_address_needs_no_lookup() -> None:
    assert probe_master_addresses("127.0.0.1", 9900) == ("127.0.0.1",)
    assert probe_master_addresses("2001:DB8:0:0::5", 9900) == ("2001:db8::5",)
    assert probe_master_addresses("::ffff:192.0.2.7", 9900) == ("192.0.2.7",)


def test_a_name_gives_all_its_addresses_once() -> None:
    known = probe_master_addresses("localhost", 9900)
    assert known and set(known) <= {"127.0.0.1", "::1"} and len(set(known)) == len(known)


def test_a_name_without_address_gives_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a" * 70, "a..b"):  # not even asked for
        assert probe_master_addresses(name, 9900) == ()

    def unknown(*_: object, **__: object) -> list[object]:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    assert probe_master_addresses("no-such-host.invalid", 9900) == ()


def test_a_resolver_that_hangs_gives_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    release = threading.Event()

    def hang(*_: object, **__: object) -> list[object]:
        release.wait(60)
        return []

    monkeypatch.setattr(socket, "getaddrinfo", hang)
    assert probe_master_addresses("slow.example", 9900, timeout_s=0.05) == ()
    release.set()


def test_own_addresses_on_this_machine() -> None:
    assert probe_is_local("127.0.0.1")
    assert probe_is_local("::ffff:127.0.0.1")
    for other in ("127.0.0.2", "0.0.0.0", "::", "255.255.255.255", "224.0.0.1", "192.0.2.200", "2001:db8::77", "x", ""):
        assert not probe_is_local(other), other


NAMESPACE_SETUP = """
ip netns add {ns} && ip -n {ns} link set lo up
ip -n {ns} link add va type veth peer name vb && ip -n {ns} link set vb up && ip -n {ns} link set va up
ip -n {ns} addr add 192.0.2.11/24 dev va
ip -n {ns} addr add 192.0.2.12/24 dev va
ip -n {ns} addr add 198.51.100.7/32 dev va
ip netns exec {ns} sh -c 'echo 1 > /proc/sys/net/ipv4/ip_nonlocal_bind'
"""


@pytest.fixture
def namespace() -> Iterator[str]:
    """A network of its own with three addresses, in which a bind to any address succeeds."""
    if sys.platform != "linux" or os.geteuid() != 0 or not shutil.which("ip"):
        pytest.skip("network namespaces need Linux, root and iproute2")
    name = f"est-probe-{os.getpid()}"
    try:
        made = subprocess.run(
            ["sh", "-ec", NAMESPACE_SETUP.format(ns=name)], capture_output=True, text=True, check=False
        )
        if made.returncode:
            pytest.skip(f"no network namespace here: {made.stderr.strip()}")
        yield name
    finally:
        subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)


def test_own_addresses_where_a_bind_lies(namespace: str) -> None:
    """A failover host sets `ip_nonlocal_bind`; the second address of a subnet is routed from the first one."""
    code = """
import socket, sys, estelle_updater
for address in sys.argv[1:]:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.bind((address, 0))
    print(address, estelle_updater.probe_is_local(address))
"""
    addresses = {
        "192.0.2.11": True,
        "192.0.2.12": True,
        "198.51.100.7": True,
        "192.0.2.13": False,
        "203.0.113.9": False,
    }
    done = subprocess.run(
        ["ip", "netns", "exec", namespace, sys.executable, "-c", code, *addresses],
        env={**os.environ, "PYTHONPATH": str(Path(seam.program.__file__).parent)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.splitlines() == [f"{address} {own}" for address, own in addresses.items()], done.stderr


def hetzner(method: str, path: str, headers: Mapping[str, str]) -> str | None:
    return "5.223.72.58" if path == "/hetzner/v1/metadata/public-ipv4" else None


def google(method: str, path: str, headers: Mapping[str, str]) -> str | None:
    wanted = "/computeMetadata/v1/instance/network-interfaces/0/access-configs/0/external-ip"
    return "5.223.72.58\n" if path == wanted and headers.get("metadata-flavor") == "Google" else None


def oracle(method: str, path: str, headers: Mapping[str, str]) -> str | None:
    vnics = '[ {\n  "privateIp" : "10.0.0.2",\n  "publicIp" : "5.223.72.58"\n} ]'
    return vnics if path == "/opc/v2/vnics/" and headers.get("authorization") == "Bearer Oracle" else None


def amazon(method: str, path: str, headers: Mapping[str, str]) -> str | None:
    if (method, path) == ("PUT", "/latest/api/token"):
        return "t0ken" if headers.get("x-aws-ec2-metadata-token-ttl-seconds") else None
    wanted = (method, path) == ("GET", "/latest/meta-data/public-ipv4") and headers.get(
        "x-aws-ec2-metadata-token"
    ) == "t0ken"
    return "5.223.72.58" if wanted else None


@pytest.mark.parametrize("cloud", [hetzner, google, oracle, amazon])
def test_the_metadata_of_each_cloud(cloud: Answer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", refused())  # not for metadata
    with stand_in(cloud) as base:
        assert probe_public_address(30.0, base, ()) == ("5.223.72.58", "metadata")


def test_metadata_without_a_public_address_leaves_it_to_the_echoes() -> None:
    """As OCI mostly answers; and a login page, or a private address, is no answer either."""
    vnics = '[ {"privateIp" : "10.0.0.2", "vnicId": "x"} ]'
    with stand_in(say(vnics)) as base, stand_in(say("9.9.9.9\n")) as echo:
        assert probe_public_address(30.0, base, (echo, echo)) == ("9.9.9.9", "echo")
    for text in ("10.0.0.5", "<html>please log in</html>", "", "9.9.9.9 and more"):
        with stand_in(say(text)) as base:
            assert probe_public_address(30.0, base, (base, base, base)) is None, text


def test_two_echoes_must_agree() -> None:
    with stand_in(say("9.9.9.9")) as one, stand_in(say("8.8.8.8")) as other, stand_in(say(None)) as broken:
        assert probe_public_address(30.0, broken, (one, other, broken)) is None
        assert probe_public_address(30.0, broken, (one,)) is None
        assert probe_public_address(30.0, broken, (other, one, broken, one)) == ("9.9.9.9", "echo")


def test_only_the_echoes_go_through_a_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def proxy(method: str, path: str, headers: Mapping[str, str]) -> str:
        asked.append(path)
        return "9.9.9.9"

    with stand_in(proxy) as address, stand_in(say(None)) as nothing:
        for name in ("no_proxy", "NO_PROXY"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("http_proxy", address)
        echoes = ("http://a.example/", "http://b.example/")
        assert probe_public_address(30.0, nothing, echoes) == ("9.9.9.9", "echo")
    assert sorted(asked) == ["http://a.example/", "http://b.example/"]


def test_silence_ends_at_the_deadline() -> None:
    with silent() as base:
        assert probe_public_address(0.2, base, (base, base)) is None
    assert probe_public_address(30.0, refused(), (refused(), refused())) is None
