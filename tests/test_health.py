"""Health checks against real servers, and the `health` command."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import socket
import ssl
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from tests import seam as est
from tests.fleet import Fleet, free_port, processes_of, wait_for
from tests.peers import Peer
from tests.seam import (
    HealthRule,
    certificate_end,
    own_address,
    parse_config,
    run_checks,
)
from tests.stores import certificate, mariadb, valkey, worker


def check(timeout: float = 5, **settings: Any) -> HealthRule:
    """A check as the configuration would read it."""
    data = {"masterUrl": "ws://127.0.0.1", "whitelist": [], "health": [{"name": "x", "timeout": timeout, **settings}]}
    return parse_config(json.dumps(data), "updater.json", "json").health[0]


def see(folder: Path, env: dict[str, str] | None = None, **settings: Any) -> tuple[bool, str]:
    """Whether a check is content, and what it says."""
    (row,) = run_checks([check(**settings)], folder, env or dict(os.environ))
    return row["ok"], row["detail"]


@contextmanager
def says(data: bytes, wait_s: float = 0) -> Iterator[str]:
    """A server that sends some bytes to whoever connects, then waits before it closes."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        over = threading.Event()

        def serve() -> None:
            with suppress(OSError):
                while True:
                    connection, _ = listener.accept()
                    with connection, suppress(OSError):
                        connection.sendall(data)
                        over.wait(wait_s)

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        try:
            yield f"127.0.0.1:{listener.getsockname()[1]}"
        finally:
            over.set()
            listener.shutdown(socket.SHUT_RDWR)
    thread.join(5)


def closed() -> str:
    return f"127.0.0.1:{free_port()}"


def test_http(tmp_path: Path):
    port = free_port()
    with worker("green", f"127.0.0.1:{port}"):
        url = f"http://127.0.0.1:{port}"
        assert see(tmp_path, http=url, contains="green")[0]
        ok, detail = see(tmp_path, http=url, contains="blue")
        assert not ok and "'blue' is not in the answer" in detail
        assert see(tmp_path, http=url, status=204) == (False, "HTTP 200, not 204")
        ok, detail = see(tmp_path, http=f"{url}/slow", timeout=0.3)
        assert not ok and "no answer within 0.3 s" in detail
    ok, detail = see(tmp_path, http=url)
    assert not ok and "refused" in detail
    with says("HTTP/1.1 200 OK\r\nContent-Length: 14\r\n\r\nv0301_4 정상".encode(), 0.3) as address:
        assert see(tmp_path, http=f"http://{address}/", contains="정상")[0]


def test_http_follows_no_redirect_and_no_proxy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    with says(b"HTTP/1.1 301 Moved\r\nLocation: http://127.0.0.1:1/\r\nContent-Length: 0\r\n\r\n", 0.3) as address:
        assert see(tmp_path, http=f"http://{address}/", status=301)[0]
    with says(b"\x15\x03\x01\x00\x02\x02") as address:
        assert not see(tmp_path, http=f"http://{address}/")[0]


def test_https_verifies_names_but_not_loopback(tmp_path: Path):
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate(tmp_path / "a.pem", days=20))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]

        def serve() -> None:
            with suppress(OSError):
                while True:
                    connection, _ = listener.accept()
                    with suppress(OSError), connection, context.wrap_socket(connection, server_side=True) as secure:
                        secure.recv(4096)
                        secure.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        assert see(tmp_path, http=f"https://127.0.0.1:{port}/", contains="ok")[0]
        ok, detail = see(tmp_path, http=f"https://localhost:{port}/")
        assert not ok and "certificate" in detail.lower()
        ok, detail = see(tmp_path, certificate=f"127.0.0.1:{port}")
        assert ok and detail.startswith(("19 days", "20 days"))
        listener.shutdown(socket.SHUT_RDWR)
    thread.join(5)


def test_the_whole_served_chain_and_its_name(tmp_path: Path):
    """An authority of the chain that ends soon breaks it like the server's own certificate; the name must be in it."""
    own, soon = certificate(tmp_path / "own.pem", days=90), certificate(tmp_path / "soon.pem", days=3)
    address = own_address()
    if address == "127.0.0.1":
        pytest.skip("this machine has no address beside loopback")
    chain = tmp_path / "chain.pem"
    authority = soon.read_text().partition("-----BEGIN PRIVATE KEY")[0]
    for text, word in ((own.read_text() + authority, "days left, less than 14"), (own.read_text(), "not valid for")):
        chain.write_text(text)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(chain)
        with socket.create_server((address, 0)) as listener:

            def serve(listener: socket.socket = listener, context: ssl.SSLContext = context) -> None:
                with suppress(OSError):
                    while True:
                        connection, _ = listener.accept()
                        with suppress(OSError), connection, context.wrap_socket(connection, server_side=True) as secure:
                            secure.recv(1)

            thread = threading.Thread(target=serve, daemon=True)
            thread.start()
            ok, detail = see(tmp_path, certificate=f"{address}:{listener.getsockname()[1]}")
            assert not ok and word in detail, detail
            listener.shutdown(socket.SHUT_RDWR)
        thread.join(5)


def test_certificate_files(tmp_path: Path):
    file = certificate(tmp_path / "short.pem", days=5)
    assert see(tmp_path, certificate=str(file)) == (False, "5 days left, less than 14")
    assert see(tmp_path, certificate="short.pem", least=3)[0]  # below the repository
    der = ssl.PEM_cert_to_DER_cert(file.read_text().partition("-----BEGIN PRIVATE KEY")[0])
    argv = ["openssl", "x509", "-in", str(file), "-noout", "-enddate"]
    told = subprocess.run(argv, capture_output=True, text=True, check=True).stdout.strip().partition("=")[2]
    assert certificate_end(der) == certificate_end(file.read_bytes()) == ssl.cert_time_to_seconds(told)
    (tmp_path / "empty.pem").write_text("nothing")
    assert see(tmp_path, certificate="empty.pem") == (False, "no certificate in it")
    assert see(tmp_path, certificate="none.pem") == (False, f"{tmp_path / 'none.pem'}: No such file or directory")


@pytest.mark.parametrize(
    ("text", "year"),
    [(b"\x17\x0d491231235959Z", 2049), (b"\x17\x0d500101000000Z", 1950), (b"\x18\x0f20520101000000Z", 2052)],
)
def test_certificate_dates_in_both_forms(text: bytes, year: int):
    assert time.gmtime(certificate_end(b"\x17\x0d260101000000Z" + text)).tm_year == year


def test_expired_certificate(tmp_path: Path):
    (tmp_path / "old.der").write_bytes(b"\x17\x0d200101000000Z\x17\x0d210101000000Z")
    ok, detail = see(tmp_path, certificate="old.der")
    assert not ok and detail.startswith("ended ")


def test_tcp(tmp_path: Path):
    with says(b"") as address:
        assert see(tmp_path, tcp=address)[0]
    ok, detail = see(tmp_path, tcp=closed())
    assert not ok and "refused" in detail


def test_valkey(tmp_path: Path):
    with valkey() as address:
        assert see(tmp_path, valkey=address)[1].startswith("PONG")
        assert see(tmp_path, mariadb=address, timeout=0.5)[0] is False
    with valkey("--requirepass", "secret") as address:
        ok, detail = see(tmp_path, valkey=address)
        assert not ok and 'add passwordFile = "' in detail
        (tmp_path / "word").write_text("secret\n")
        assert see(tmp_path, valkey=address, passwordFile="word")[1].startswith("PONG")
        env = {**os.environ, "STORE_WORD": "secret", "WRONG": "hunter2"}
        assert see(tmp_path, env, valkey=address, passwordEnv="STORE_WORD", user="default")[0]
        ok, detail = see(tmp_path, env, valkey=address, passwordEnv="WRONG")
        assert not ok and detail.startswith("WRONGPASS") and "hunter2" not in detail
        assert see(tmp_path, valkey=address, passwordFile="none")[1] == "passwordFile none: No such file or directory"
        assert "no variable NOBODY" in see(tmp_path, valkey=address, passwordEnv="NOBODY")[1]
    assert not see(tmp_path, valkey=address)[0]
    pem, port = certificate(tmp_path / "valkey.pem"), free_port()
    files = [word for kind in ("cert", "key", "ca-cert") for word in (f"--tls-{kind}-file", str(pem))]
    with valkey("--port", "0", "--tls-port", str(port), *files, "--tls-auth-clients", "no", port=port) as address:
        assert see(tmp_path, valkey=address, tls=True)[1].startswith("PONG")
        assert not see(tmp_path, valkey=address, timeout=2)[0]
        ok, detail = see(tmp_path, valkey=f"localhost:{port}", tls=True)
        assert not ok and "certificate" in detail.lower(), detail
    with says(b"-LOADING the dataset is being loaded\r\n") as address:
        assert see(tmp_path, valkey=address) == (False, "LOADING the dataset is being loaded")
    with says(b"", wait_s=5) as address:  # it accepts and stays silent
        assert not see(tmp_path, valkey=address, timeout=0.3)[0]
    with says(b"HTTP/1.1 400 Bad Request\r\n\r\n") as address:
        assert not see(tmp_path, valkey=address)[0]


@pytest.fixture(scope="module")
def database() -> Iterator[str]:
    folder = Path(tempfile.mkdtemp(prefix="est-mariadb-"))
    folder.chmod(0o755)  # pytest's own folders are closed to the server's user
    try:
        with mariadb(folder / "db", "--max-connect-errors=3", "--max-connections=10") as address:
            yield address
    finally:
        shutil.rmtree(folder)


def test_mariadb(tmp_path: Path, database: str):
    ok, detail = see(tmp_path, mariadb=database)
    assert ok and "MariaDB" in detail and "only a `user` sees" in detail, detail
    ok, detail = see(tmp_path, tcp=database)
    assert ok and "MariaDB" in detail and "sees more by `mariadb`" in detail, detail
    assert not see(tmp_path, mariadb=closed())[0]
    with says(b"\x11\x00\x00\x00\xff\x10\x04Too many conns") as address:
        assert see(tmp_path, mariadb=address) == (False, "no free connections: Too many conns")
    with says(b"-ERR no\r\n") as address:
        assert not see(tmp_path, mariadb=address, timeout=0.5)[0]


def test_mariadb_that_takes_no_writes(tmp_path: Path, database: str):
    """By a login alone: without one nobody is told."""
    (tmp_path / "password").write_text("secret\n")
    login: dict[str, Any] = {"mariadb": database, "user": "app", "passwordFile": str(tmp_path / "password")}
    ok, detail = see(tmp_path, **login)
    assert ok and "MariaDB" in detail and "it takes writes" in detail, detail
    (tmp_path / "wrong").write_text("guess")
    ok, detail = see(tmp_path, **(login | {"passwordFile": "wrong"}))
    assert not ok and "Access denied for user 'app'" in detail, detail
    ok, detail = see(tmp_path, **(login | {"user": "nobody"}))
    assert not ok and "Access denied" in detail, detail
    root = ["mariadb", "--no-defaults", "-uroot", "-h127.0.0.1", f"-P{database.rpartition(':')[2]}"]
    try:
        subprocess.run([*root, "-e", "SET GLOBAL read_only = 1"], check=True, capture_output=True)
        assert see(tmp_path, **login) == (False, "it takes no writes: read_only is 1")
        assert see(tmp_path, mariadb=database)[0], "unseen without a login"
    finally:
        subprocess.run([*root, "-e", "SET GLOBAL read_only = 0"], check=True, capture_output=True)


def test_mariadb_without_a_free_connection(tmp_path: Path, database: str):
    """One place is kept for an administrator, so it greets still; with that taken too, everybody is told."""
    (tmp_path / "password").write_text("secret\n")
    full = (False, "no free connections: Too many connections")
    port = database.rpartition(":")[2]

    def login() -> tuple[bool, str]:
        return see(tmp_path, mariadb=database, user="app", passwordFile="password")

    def take(user: str) -> subprocess.Popen[bytes]:
        where = ["mariadb", "--no-defaults", *user.split(), "-h127.0.0.1", f"-P{port}"]
        argv = [*where, "--unbuffered", "-e", "select 1; select sleep(60)"]
        return subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)

    holding: list[subprocess.Popen[bytes]] = []
    try:

        def is_full() -> bool:
            holding.append(take("-uapp -psecret"))
            return login() == full

        wait_for(is_full, "all ordinary connections are taken")
        hint = "only a `user` sees whether it takes writes and has a free connection"

        def greets_still() -> bool:  # once the question before has left its place
            ok, detail = see(tmp_path, mariadb=database)
            return ok and hint in detail

        wait_for(greets_still, hint)

        def has_last() -> bytes:  # unless one of our own questions still has it
            holding.append(take("-uroot"))
            answers = holding[-1].stdout
            assert answers
            return answers.readline()

        wait_for(has_last, "the last one is taken too")
        assert see(tmp_path, mariadb=database) == full
        assert see(tmp_path, tcp=database) == full
    finally:
        for process in holding:
            process.kill()
            process.communicate()
    wait_for(lambda: login()[0], "the places are free again")


def test_what_a_store_says_of_itself(tmp_path: Path):
    """After the login that it refuses it may say that nobody at all gets in."""
    greeting = b"\x0a5.5.5-10.11.19-MariaDB\0"
    hello = len(greeting).to_bytes(3, "little") + b"\0" + greeting
    for number, words, said in (
        (1040, "Too many connections", "no free connections: Too many connections"),
        (1129, "Host 'x' is blocked", "it blocks this host: Host 'x' is blocked"),
    ):
        error = b"\xff" + number.to_bytes(2, "little") + b"#08004" + words.encode()
        packets = hello + len(error).to_bytes(3, "little") + b"\x02" + error
        with says(packets, 2) as address:
            assert see(tmp_path, mariadb=address) == (False, said)
        with says(packets, 2) as address:
            assert see(tmp_path, tcp=address) == (False, said)
        at_once = len(error).to_bytes(3, "little") + b"\0" + error  # in place of the greeting
        with says(at_once) as address:
            ok, detail = see(tmp_path, mariadb=address)
            assert not ok and detail == said, detail
        with says(at_once) as address:
            ok, detail = see(tmp_path, tcp=address)
            assert not ok and detail == said, detail
    with says(b"-MISCONF Redis is configured to save RDB snapshots\r\n") as address:
        assert see(tmp_path, valkey=address)[1].startswith("MISCONF")


def test_checks_do_not_make_mariadb_block_their_host(database: str):
    """A server blocks an address that hangs up without a login more than max_connect_errors times; loopback never."""
    if (address := own_address()) == "127.0.0.1":
        pytest.skip("this machine has no address beside loopback")
    endpoint = f"{address}:{database.rpartition(':')[2]}"
    for _ in range(10):
        assert see(Path(), mariadb=endpoint)[0]
        assert see(Path(), tcp=endpoint)[0]


LOOK_AT_DISK = """
import os, estelle_updater as est
from pathlib import Path
print(est.run_checks([est.HealthRule(name="x", disk=os.getcwd())], Path("/"), {})[0]["detail"])
"""


def test_disk(tmp_path: Path):
    assert see(tmp_path, disk="/", least=1)[0]
    ok, detail = see(tmp_path, disk=".", least=101)
    assert not ok and "less than 101 %" in detail
    assert see(tmp_path, disk="nowhere") == (False, f"{tmp_path / 'nowhere'}: No such file or directory")
    if os.geteuid() == 0 and shutil.which("unshare"):  # a file system of the test's own
        (tmp_path / "small").mkdir()
        place = tmp_path / "small"
        fill = f"mount -t tmpfs -o nr_inodes=20 x {place} && cd {place} && touch $(seq 18)"
        look = f"{sys.executable} -c '{LOOK_AT_DISK}'"
        script = f"{fill} && {look} && mount -o remount,ro {place} && {look}"
        argv = ["unshare", "-m", "sh", "-c", script]
        env = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}
        said = subprocess.run(argv, capture_output=True, text=True, check=False, env=env)
        if "permission denied" not in said.stderr.lower():
            assert said.stdout.splitlines() == ["5 % of its inodes free; less than 10 %", "it is mounted read-only"], (
                said
            )


def test_command(tmp_path: Path):
    assert see(tmp_path, command=["sh", "-c", "echo one; echo fine; pwd"])[1].startswith(str(tmp_path))
    assert see(tmp_path, command=["sh", "-c", "echo broken; exit 3"]) == (False, "exit 3: broken")
    assert see(tmp_path, command=["true"])[0]
    ok, detail = see(tmp_path, command=["no-such-program-here"])
    assert not ok and "no-such-program-here" in detail
    env = {**os.environ, "API_TOKEN": "hunter2hunter2"}
    assert "hunter2" not in see(tmp_path, env, command=["sh", "-c", "echo with $API_TOKEN"])[1]


def test_a_command_that_hangs_is_killed_with_its_children(tmp_path: Path):
    ok, detail = see(tmp_path, command=["sh", "-c", f"cd {tmp_path}; sleep 777 & sleep 777"], timeout=0.5)
    assert not ok and "not over within 0.5 s" in detail
    wait_for(lambda: not processes_of(tmp_path), lambda: f"nothing is left: {processes_of(tmp_path)}", 10)


def test_systemd_says_why_not(tmp_path: Path):
    ok, detail = see(tmp_path, systemd="estelle-no-such-unit.service")
    assert not ok and detail


def test_checks_run_at_once_and_end_at_their_deadline(tmp_path: Path):
    with says(b"", wait_s=20) as address:
        checks = [check(timeout=1, valkey=address) for _ in range(8)] + [check(disk="/", least=1)]
        rows = run_checks(checks, tmp_path, dict(os.environ))
    assert [row["ok"] for row in rows] == [False] * 8 + [True]


def test_the_command_on_a_fleet(fleet: Callable[..., Fleet], tmp_path: Path):
    port = free_port()
    settings = {
        "hosts": {
            "127.0.0.2": {"name": "yq-green", "color": "green"},
            "127.0.0.3": {"name": "yq-data", "deploy": False, "env": {"STORE_PASSWORD": "hunter2hunter2"}},
        },
        "health": [
            {"name": "web", "http": f"http://127.0.0.1:{port}/", "contains": "green", "hosts": ["yq-green"]},
            {"name": "disk", "disk": "/", "least": 1, "hosts": ["127.0.0.3", "YQ-GREEN"]},
            {"name": "own", "command": ["sh", "-c", "echo $STORE_PASSWORD"], "hosts": ["yq-data"]},
        ],
    }
    one = fleet(hosts=4, config=settings)
    with worker("green", f"127.0.0.1:{port}"):
        code, out, err = one.cli("health", "--json")
        found = json.loads(out)
        rows = [f"{row['host'][-1]} {row['name']} {row['ok']}" for row in found["checks"]]
        assert (code, found["ok"]) == (0, True), out + err
        assert rows == ["2 web True", "2 disk True", "3 disk True", "3 own True"]
        assert "hunter2" not in out
    code, out, _ = one.cli("health")
    assert code == 1 and "✗  127.0.0.2  web" in out and "refused" in out and "✓  127.0.0.3  disk" in out, out
    assert one.cli("health", "yq-data").code == 0  # also a host that takes no deployments
    code, out, _ = one.cli("health", "127.0.0.4")
    assert code == 0 and "no [[health]] check" in out
    assert one.cli("health", "nobody").code == 4
    code, _, err = one.cli("health", "standby")
    assert code == 4 and "nobody knows which host is standby" in err
    one.stop(one.hosts[2])
    wait_for(lambda: "the host is offline" in one.cli("health", "yq-data").out, "the host counts as failed")
    # as for every command: no targeted host is online
    assert one.cli("health", "yq-data").code == 4
    assert one.cli("health").code == 1


def test_checks_of_a_deployed_configuration_hold_at_once(fleet: Callable[..., Fleet]):
    """A deployment brings new checks: whoever asks right after it must not get the old ones' verdict."""
    one = fleet(hosts=1)
    settings = json.loads((one.origin.seed / "config/updater.json").read_text())
    settings["health"] = [{"name": "new", "disk": "/", "least": 1}]
    one.origin.commit({"config/updater.json": json.dumps(settings)})
    assert one.cli("trigger", "all", "master").code == 0
    code, out, _ = one.cli("health")
    assert code == 0 and "new" in out


def test_slow_checks_hold_up_neither_status_nor_plan(fleet: Callable[..., Fleet]) -> None:
    """More of them than a host has threads for: each kind of question has its own."""
    slow = {"name": "slow", "command": ["sh", "-c", "echo x >> ../../asked; sleep 20"], "timeout": 25}
    one = fleet(hosts=2, config={"health": [slow]})
    agent = one.agents[0]
    with Peer(one, "127.0.0.1", "commander") as person:
        for number in range(3 * est.ANSWERS_AT_ONCE):
            person.say(est.Ask(number, "health", {"target": agent.address}))
        asked = agent.folder.parent / "asked"
        wait_for(lambda: asked.exists() and asked.read_text().count("x") == est.ANSWERS_AT_ONCE, "all places are taken")
        person.say(est.Ask(100, "status"))
        status = person.until(lambda message: isinstance(message, est.Answer))
        person.say(est.Ask(101, "plan", {"target": agent.address, "branch": "master"}))
        plan = person.until(lambda message: isinstance(message, est.Answer))
    assert (status.id, plan.id) == (100, 101), "and none of the checks is over"
    assert [row["problem"] for row in status.result["hosts"]] == [None, None]
    assert plan.result["ok"] and plan.result["hosts"][0]["target"], plan.result
    assert asked.read_text().count("x") == est.ANSWERS_AT_ONCE, "no more at once than there are places"


def test_many_who_ask_for_slow_checks_at_once_all_get_an_answer(fleet: Callable[..., Fleet]) -> None:
    """More than there are places: nobody may wait for a place for as long as its patience lasts."""
    slow = {"name": "slow", "command": ["sh", "-c", "echo x >> ../../asked; sleep 3"], "timeout": 4}
    one = fleet(hosts=2, config={"health": [slow]})
    everybody = range(3 * est.ANSWERS_AT_ONCE)
    answers: dict[int, Any] = {}
    with Peer(one, "127.0.0.1", "commander") as person:
        for number in everybody:
            person.say(est.Ask(number, "health", {"target": one.agents[0].address}))
        while len(answers) < len(everybody):
            message = person.until(lambda message: isinstance(message, est.Answer))
            answers[message.id] = message.result
    rows = [answers[number]["checks"][0] for number in everybody]
    assert [row["ok"] for row in rows] == [True] * len(rows), rows
    assert (one.tmp_path / "asked").read_text().count("x") == est.ANSWERS_AT_ONCE


def test_only_what_has_not_changed_since_is_shared() -> None:
    """Who asks after a deployment does not get what a check saw before it."""
    begun: list[str] = []
    gate = threading.Event()

    def look(what: str) -> str:
        begun.append(what)
        gate.wait(30)
        return what

    async def ask() -> list[str]:
        looks = est.SharedLooks(2)
        asked = [asyncio.ensure_future(looks.run("before", look, name)) for name in ("a", "b", "c", "d")]
        await asyncio.sleep(0)
        asked[1].cancel()  # whoever stops waiting takes nobody's answer away
        asked.append(asyncio.ensure_future(looks.run("after", look, "e")))
        await asyncio.sleep(0)
        gate.set()
        return [str(found) for found in await asyncio.gather(*asked, return_exceptions=True)]

    assert asyncio.run(ask()) == ["a", "", "b", "b", "e"]
    assert sorted(begun) == ["a", "b", "e"]
