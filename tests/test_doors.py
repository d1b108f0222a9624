"""Nobody who should not gets in, and nothing that gets in can run: false agents, masters, commanders and pages."""

from __future__ import annotations

import base64
import calendar
import http.client
import http.server
import json
import os
import re
import select
import signal
import socket
import stat
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from hypothesis import given, settings, strategies as st
from websockets.exceptions import InvalidStatus
from websockets.sync.server import serve

from tests import seam as est
from tests.commands import (
    COMMAND,
    FOREVER,
    GATED,
    Watched,
    detach,
    job_of,
    lines_of,
    log_of,
    open_gate,
    wait_state,
    write_script,
)
from tests.fleet import Fleet, Host, free_port, need, processes_of, run, wait_for
from tests.peers import MACHINE, FalseMaster, Peer, files_of
from tests.seam import replace
from tests.test_bad_input import HOSTILE
from tests.test_messages import example_of
from tests.test_tls import Authority

A, B, C = "127.0.0.1", "127.0.0.2", "127.0.0.3"
STRANGER, FALSE = "127.0.0.66", "127.0.0.9"  # not allowed; allowed, but nobody's
TOKEN = "correct-horse-battery-staple"
MakeFleet = Callable[..., Fleet]


def edit(host: Host, **changes: object) -> None:
    host.config.write_text(json.dumps(json.loads(host.config.read_text()) | changes))


def connects(one: Fleet, source: str) -> str:
    """ "in", or why the master refuses a WebSocket from an address."""
    try:
        with Peer(one, source):
            return "in"
    except InvalidStatus as refusal:
        assert refusal.response.status_code == 403
        return bytes(refusal.response.body or b"").decode()


# The token


HELLO = est.Hello("agent", [1, 1], "1", MACHINE, "host", "process")
words = st.text(min_size=1, max_size=8)


@settings(deadline=None)
@given(words, words, st.binary(min_size=16, max_size=40), st.data())
def test_a_proof_counts_once_in_one_direction_for_one_peer(challenge: str, nonce: str, token: bytes, data: Any) -> None:
    proof = est.make_proof(token, "client", HELLO, challenge, nonce)
    assert est.check_proof(proof, token, "client", HELLO, challenge, nonce)
    assert token.hex() not in proof
    other = data.draw(words.filter(lambda word: word not in (challenge, nonce)))
    for wrong in (
        (token + b"x", "client", HELLO, challenge, nonce),
        (token, "master", HELLO, challenge, nonce),
        (token, "client", HELLO, other, nonce),
        (token, "client", HELLO, challenge, other),
        (token, "client", HELLO, challenge + nonce, ""),
        (token, "client", replace(HELLO, role="commander"), challenge, nonce),
        (token, "client", replace(HELLO, machine="cd" * 16), challenge, nonce),
    ):
        assert not est.check_proof(proof, *wrong)
    assert not est.check_proof("", token, "client", HELLO, challenge, nonce)
    assert not est.check_proof("비밀", token, "client", HELLO, challenge, nonce)


@pytest.fixture
def guarded(fleet: MakeFleet, tmp_path: Path) -> Fleet:
    """A master and an agent that share a token, not yet started."""
    (tmp_path / "token").write_text(TOKEN + "\n")
    (tmp_path / "token").chmod(0o600)
    guard = {"tokenFile": str(tmp_path / "token"), "whitelist": [A, B, FALSE]}
    one = fleet(hosts=2, start=False, command=COMMAND, config=guard)
    write_script("echo deploying\n", *one.hosts)
    return one


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_a_token_is_the_same_whatever_shell_wrote_its_file(encoding: str, tmp_path: Path) -> None:
    """Windows PowerShell's redirection writes UTF-16, and the advised line is typed there too."""
    (tmp_path / "token").write_text(f"{'7f' * 32}\r\n", encoding)
    text = json.dumps({"masterUrl": "ws://127.0.0.1:9900", "whitelist": ["127.0.0.1"], "tokenFile": "token"})
    assert est.load_token(est.parse_config(text, "updater.json", "json"), tmp_path) == b"7f" * 32


def test_a_token_is_proven_and_shown_nowhere(guarded: Fleet, tmp_path: Path) -> None:
    one, agent = guarded, guarded.agents[0]
    one.start()
    spy = (
        f"env; cat {tmp_path}/token; cut -c1-10 {tmp_path}/token | tr -d '\\n'; sleep 0.2; cut -c11- {tmp_path}/token\n"
    )
    write_script(spy, *one.hosts)
    code, out, err = one.cli("trigger", "all", "master")
    assert code == 0 and out.count("***") == 4 and TOKEN not in out, out + err
    assert "ESTELLE_TOKEN" not in out
    assert one.cli("status", host=agent).code == 0
    assert one.cli("status", env={"ESTELLE_TOKEN": TOKEN}).code == 0, "the variable does as well"
    write_script(FOREVER, *one.hosts)
    running = detach(one)
    wait_for(lambda: "begun" in one.cli("logs", running, B).out, "a step runs")
    assert not [line for line in processes_of(tmp_path).values() if TOKEN in line], "ps"
    assert one.cli("cancel", running).code == 0
    for host in one.hosts:
        wait_state(one, running, host, "cancelled")
    written = files_of(one.master.state) | files_of(agent.state)
    assert not [name for name, data in written.items() if TOKEN.encode() in data]
    assert TOKEN not in one.master.stderr + agent.stderr


def test_wrong_and_missing_tokens_are_told_from_the_whitelist(guarded: Fleet, tmp_path: Path) -> None:
    one, agent = guarded, guarded.agents[0]
    one.start(one.master)
    settings = json.loads(one.master.config.read_text())
    other = tmp_path / "elsewhere" / "config" / "updater.json"
    other.parent.mkdir(parents=True)
    other.write_text(json.dumps({key: value for key, value in settings.items() if key != "tokenFile"}))
    elsewhere = {"ESTELLE_CONFIG": str(other), "ESTELLE_STATE": str(tmp_path / "none")}
    for bind, token, reason in (
        (B, "", "asks for a token, and there is none here"),
        (B, "a wrong token that is long", "the token is not the master's"),
        (STRANGER, TOKEN, "is not in the whitelist"),
    ):
        code, out, err = one.cli("status", bind=bind, env=elsewhere | {"ESTELLE_TOKEN": token})
        assert (code, out) == (3, "") and reason in err and "hint: " in err, err
        assert ("token" in err) == (bind == B) and TOKEN not in err
    assert one.cli("status", bind=B, env=elsewhere | {"ESTELLE_TOKEN": TOKEN}).code == 0
    short = one.cli("status", env=elsewhere | {"ESTELLE_TOKEN": "short"})
    assert short.code == 2 and "fewer than 16 bytes" in short.err and "openssl rand" in short.err
    one.spawn(agent, env={"ESTELLE_TOKEN": "a wrong token that is long"})
    wait_for(lambda: "the token is not the master's" in agent.stderr, "the agent says so")
    assert B not in one.cli("status").out
    refusals = [line for line in one.master.stderr.splitlines() if f"refused {B}" in line]
    assert len(refusals) == 1 and "token" in refusals[0], "once a minute"
    one.stop(agent)
    (tmp_path / "token").unlink()
    unreadable = one.cli("serve", host=agent)
    assert unreadable.code == 2 and "can't read tokenFile" in unreadable.err
    assert "can't read its own token" in one.cli("status", env=elsewhere | {"ESTELLE_TOKEN": TOKEN}).err


def test_a_false_agent_gets_nothing(guarded: Fleet) -> None:
    one, agent = guarded, guarded.agents[0]
    one.start()
    run_id = detach(one)
    wait_state(one, run_id, agent, "succeeded")
    before = one.cli("status", "--json").out
    job = est.JobRecord(run_id, B, MACHINE, est.Kind.DEPLOY, "master", est.State.FAILED, 99)
    honest = Peer(one, FALSE, "commander", token=TOKEN.encode())
    challenge, welcome = honest.heard
    own = est.make_proof(TOKEN.encode(), "client", HELLO, challenge.nonce, "00" * 16)
    attempts: list[list[Any]] = [
        [],
        [job],
        [b"\x01" + b"\0" * 12],
        [HELLO],
        [est.Proof("00" * 16, "")],
        [est.Proof("00" * 16, own)],  # what was right for another challenge
        [est.Proof(challenge.nonce, welcome.proof)],  # the master's own proof, sent back
    ]
    for role in ("agent", "commander"):
        for attempt in attempts:
            with Peer(one, FALSE) as false:
                false.say(replace(HELLO, role=role))
                asked = false.hear()
                assert isinstance(asked, est.Challenge) and asked.nonce != challenge.nonce, "each one is fresh"
                for message in attempt:
                    false.say(message)
                if attempt:
                    answer = false.hear()
                    assert isinstance(answer, est.Refuse) and "token" in answer.what and answer.exit == 3
                    assert false.hear() is None, "and it ends"
    with Peer(one, FALSE, "agent", token=TOKEN.encode()) as one_who_knows:
        assert one_who_knows.welcome.label == FALSE
    honest.close()
    assert json.loads(before)["hosts"][1]["online"] and one.cli("trigger", B, "master").code == 0


def bogus(message: Any) -> list[Any]:
    order = est.Order(vars(est.JobRecord("20260101-000000-abcd", B, "", est.Kind.DEPLOY, "master")))
    welcome = est.Welcome(1, "9", B, B, "n")
    if isinstance(message, est.Hello):
        return [est.Challenge("00" * 16)]
    return [replace(welcome, proof=getattr(message, "proof", "")), order]  # the agent's proof, sent back


def early(message: Any) -> list[Any]:
    return [est.Order({}), est.Ask(1, "status")]


@pytest.mark.parametrize("answer", [lambda message: bogus(None), bogus, early], ids=["unproven", "reflects", "early"])
def test_a_false_master_gets_nothing(guarded: Fleet, answer: Callable[[Any], list[Any]]) -> None:
    one, agent = guarded, guarded.agents[0]
    with FalseMaster(A, one.port, answer) as false:
        one.spawn(agent)
        wait_for(lambda: false.ended, lambda: f"the agent leaves: {agent.stderr}")
        code, out, err = one.cli("trigger", "all", "master", host=agent)
        assert (code, out) == (3, ""), err
        if answer is not early:
            assert "does not know our token" in err and "does not know our token" in agent.stderr
        wait_for(lambda: false.ended >= 2, "and so does the commander")
        assert {type(message) for message in false.told} <= {est.Hello, est.Proof}
        assert TOKEN not in repr(false.told)
    assert not list(agent.state.glob("runs/*"))


def test_a_token_that_is_introduced_cuts_off_who_has_not_proven_it(fleet: MakeFleet, tmp_path: Path) -> None:
    one = fleet(hosts=2, command=COMMAND, config={"whitelist": [A, B, FALSE]})
    (tmp_path / "token").write_text(TOKEN)
    with Peer(one, FALSE, "commander") as false:
        for host in one.hosts:
            edit(host, tokenFile=str(tmp_path / "token"))
        assert false.hear() is None
    agent = one.agents[0]
    wait_for(lambda: agent.stderr.count("welcomed") == 2, lambda: agent.stderr, 90)
    write_script("echo deploying\n", *one.hosts)
    one.wait_online()
    assert one.cli("trigger", "all", "master").code == 0


# Addresses


def test_the_whitelist_is_followed_both_ways_in_the_middle_of_a_run(fleet: MakeFleet) -> None:
    one = fleet(hosts=2, command=COMMAND, config={"whitelist": [A, B, FALSE]})
    agent = one.agents[0]
    write_script(GATED, *one.hosts)
    watched = Watched(one, "trigger", B, "master", bind=A)
    watched.until("begun")
    with Peer(one, FALSE, "commander") as commander:
        edit(one.master, whitelist=[A])
        assert commander.hear() is None, "who is taken off is cut off"
    assert "not in the whitelist" in connects(one, FALSE)
    wait_for(lambda: f"agent {B} is offline" in one.master.stderr, "the agent is cut off as well")
    open_gate(*one.hosts)  # its job goes on, and nobody hears of it yet
    wait_for(lambda: job_of(one, watched.run, agent, at=agent)["state"] == "succeeded", "the job ends")
    assert job_of(one, watched.run, agent)["state"] == "running"
    assert b"ended" not in log_of(one, watched.run, agent)
    edit(one.master, whitelist=["127.0.0.0/28"])
    wait_for(lambda: connects(one, FALSE) == "in", "who is put on comes in")
    edit(agent, whitelist=[])  # its own settings changed: it tries again at once
    assert watched.end(120) == 0
    assert lines_of(watched.out, B)[-3:-1] == ["begun", "ended"] and "begun\nended\n" in str(
        log_of(one, watched.run, agent), "utf-8"
    )
    one.master.config.write_text("{")
    wait_for(lambda: "the old settings stay in force" in one.master.stderr, "a broken file is told")
    assert connects(one, FALSE) == "in" and "not in the whitelist" in connects(one, STRANGER)
    one.master.config.write_text(json.dumps({"masterUrl": one.url, "whitelist": []}))
    wait_for(lambda: "the whitelist is empty" in connects(one, A), "an empty list lets nobody in")
    assert one.cli("status").code == 3 and one.cli("trigger", "all", "master").code == 3


def test_forwarded_addresses_behind_a_real_haproxy(fleet: MakeFleet, tmp_path: Path) -> None:
    """HAProxy ends TLS in front of the master: the proxy's own address is 127.0.0.77."""
    need("haproxy")
    authority = Authority(tmp_path / "ca")
    (tmp_path / "both.pem").write_bytes(b"".join(Path(path).read_bytes() for path in authority.tls.values()))
    one = fleet(hosts=2, start=False, command=COMMAND)
    port, proxy = free_port(), "127.0.0.77"
    (tmp_path / "haproxy.cfg").write_text(
        "defaults\n mode http\n timeout connect 5s\n timeout client 1h\n timeout server 1h\n"
        f"frontend f\n bind {A}:{port} ssl crt {tmp_path}/both.pem\n bind {A}:{port + 1}\n option forwardfor\n"
        f" default_backend b\nbackend b\n server m {A}:{one.port} source {proxy}\n"
    )
    config = json.loads(one.master.config.read_text()) | {
        "masterUrl": f"wss://{A}:{port}", "trustedProxies": [proxy],
        "tls": {"ca": str(authority.folder / "fleet-ca.pem")},
    }  # fmt: skip
    for host in one.hosts:
        host.config.write_text(json.dumps(config))
    haproxy = run(["haproxy", "-c", "-f", tmp_path / "haproxy.cfg"], dict(os.environ))
    assert haproxy.code == 0, haproxy.err
    serving = subprocess.Popen(["haproxy", "-db", "-f", str(tmp_path / "haproxy.cfg")])
    try:
        one.spawn(one.master, options=["--listen", f"{A}:{one.port}"])
        one.wait_ready(one.master)
        one.start(one.agents[0])
        assert f"agent {B} " in one.master.stderr, "the agent is known by its own address"
        assert one.cli("status", host=one.agents[0]).code == 0
        assert one.cli("status").code == 0, "on the master's host, past the proxy and without TLS"
        refused = one.cli("status", bind=STRANGER, env={"ESTELLE_STATE": str(tmp_path / "none")})
        assert refused.code == 3 and f"{STRANGER} is not in the whitelist" in refused.err
        curl = ["curl", "-s", "-m", "10", "-w", "%{http_code}", "--interface"]
        for source, claimed, at, answer in (
            (B, [], port + 1, "<!doctype html>"),
            (STRANGER, [], port + 1, f"{STRANGER} is not in"),
            (STRANGER, [B], port + 1, f"{STRANGER} is not in"),
            (STRANGER, [B, f"{B}, {proxy}"], port + 1, f"{STRANGER} is not in"),
            (STRANGER, [B], one.port, f"{STRANGER} is not in"),
            (STRANGER, [f"{B}, {proxy}"], one.port, f"{STRANGER} is not in"),
            (B, [STRANGER], one.port, "<!doctype html>"),  # nobody asked B
            (proxy, [], one.port, f"{proxy} is not in"),
            (proxy, [f"{B}, junk"], one.port, "no address"),
        ):
            headers = [word for value in claimed for word in ("-H", f"X-Forwarded-For: {value}")]
            out = run([*curl, source, *headers, f"http://{A}:{at}/"], one.env).out
            assert answer in out, (source, claimed, at, out)
        edit(one.master, trustedProxies=[])
        said = f"{proxy} is not in the whitelist"
        wait_for(lambda: said in one.cli("status", host=one.agents[0]).err, "a proxy that is trusted no more")
    finally:
        serving.terminate()
        serving.wait(20)


# Browsers


PAGE = """<!doctype html><script>
const tell = (name, said) => fetch("/said?" + name + "=" + said, {mode: "no-cors"});
function knock(name, url) {
  const socket = new WebSocket(url);
  socket.onopen = () => { socket.send('{"verb":"hello"}'); tell(name, "open"); };
  socket.onerror = () => tell(name, "refused");
}
knock("%(name)s-master", "ws://%(host)s:%(master)s/");
knock("%(name)s-control", "ws://%(host)s:%(control)s/");
fetch("http://%(host)s:%(master)s/").then(
  answer => tell("%(name)s-read", answer.status), () => tell("%(name)s-read", "refused"));
</script>"""
FRAMED = """<!doctype html><iframe sandbox="allow-scripts" src="data:text/html;base64,%s"></iframe>"""


def test_pages_in_a_browser_can_not_use_the_port(fleet: MakeFleet, tmp_path: Path) -> None:
    """A page on another port, one without an origin, and one whose own name and port lead to the master by now, as a
    rebound DNS entry would: the site is this browser's proxy and decides where its name leads."""
    need("chromium")
    one = fleet(hosts=1, command=COMMAND)
    said: dict[str, str] = {}
    origins: dict[str, str | None] = {}

    def keep(peer: Any) -> None:
        origins[peer.request.headers["Host"].partition(":")[0]] = peer.request.headers.get("Origin")

    control = serve(keep, A, 0)
    ports = {"master": one.port, "control": control.socket.getsockname()[1]}

    class Site(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            path, query = urlsplit(self.path)[2:4]
            if path == "/":
                request = http.client.HTTPConnection(A, one.port)
                request.request("GET", "/", headers={"Host": self.headers["Host"]})
                self.send_response(request.getresponse().status)
                self.end_headers()
                return
            if path == "/said":
                said[query.partition("=")[0]] = query.partition("=")[2]
            host = "evil.example" if path == "/rebound" else A
            page = PAGE % ({"name": path[1:], "host": host} | ports)
            if path == "/null":
                here = site.server_port
                script = page.replace('"/said', f'"http://{A}:{here}/said')
                page = FRAMED % base64.b64encode(script.encode()).decode()
            self.send_response(200)
            self.send_header("Content-Type", "text/html")
            self.end_headers()
            self.wfile.write(page.encode())

        def do_CONNECT(self) -> None:
            self.send_response(200)
            self.end_headers()
            with socket.create_connection((A, int(self.path.rpartition(":")[2]))) as far:
                ends = {self.connection: far, far: self.connection}
                while ready := select.select(list(ends), [], [], 60)[0]:
                    for end in ready:
                        if not (data := end.recv(65536)):
                            return
                        ends[end].sendall(data)

        def log_message(self, *words: Any) -> None: ...

    site = http.server.ThreadingHTTPServer((A, 0), Site)
    servers = [threading.Thread(target=server.serve_forever) for server in (site, control)]
    for server in servers:
        server.start()
    here = site.server_port
    try:
        for name, host in (("port", A), ("null", A), ("rebound", "evil.example")):
            proxy = f"--proxy-server={A}:{here}" if name == "rebound" else "--no-proxy-server"
            argv = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", proxy]
            argv += [f"--user-data-dir={tmp_path / name}", "--remote-debugging-port=0"]
            argv += [f"http://{host}:{one.port if name == 'rebound' else here}/{name}"]
            with open(tmp_path / f"{name}.log", "wb") as log:
                browser = subprocess.Popen(argv, stdout=log, stderr=log, env=one.env, start_new_session=True)
            try:
                wait_for(lambda: sum(key.startswith(name) for key in said) == 3, lambda: f"{name}: {said}")  # noqa: B023
            finally:
                os.killpg(browser.pid, signal.SIGKILL)
                browser.wait()
        for name in ("port", "null", "rebound"):
            assert said[f"{name}-master"] == "refused" and said[f"{name}-control"] == "open", said
            assert said[f"{name}-read"] == ("403" if name == "rebound" else "refused"), said
        assert origins["evil.example"] == f"http://evil.example:{one.port}" and "null" in origins.values(), origins
        assert "refused 127.0.0.1" in one.master.stderr
    finally:
        site.shutdown()
        control.shutdown()
        for server in servers:
            server.join()
        site.server_close()
    assert one.cli("status").code == 0


# What an agent may say


@pytest.fixture(scope="module")
def open_fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    need("git")
    one = Fleet(tmp_path_factory.mktemp("doors"), 2, COMMAND, {"whitelist": [A, B, FALSE, "127.0.1.0/24"]})
    write_script("echo deploying\n", *one.hosts)
    one.start()
    yield one
    one.stop_all()


one_fleet = pytest.mark.xdist_group("doors")  # one worker makes the fleet that these tests share
VERBS = [
    cls for cls in est.MESSAGES if cls not in (est.JobRecord, est.Log, est.Broken, est.Busy, est.Answer, est.Refuse)
]


def record(run_id: str, host: str, **more: Any) -> est.JobRecord:
    fields: dict[str, Any] = {"branch": "master", "revision": 1} | more
    return est.JobRecord(run_id, host, MACHINE, est.Kind.DEPLOY, **fields)


def new_run(number: int = 0) -> str:
    return time.strftime("%Y%m%d-%H%M%S-", time.gmtime()) + f"{number:04x}"


@one_fleet
def test_an_agent_has_few_verbs_and_only_its_own_jobs(open_fleet: Fleet) -> None:
    one, agent = open_fleet, open_fleet.agents[0]
    run_id = detach(one)
    wait_state(one, run_id, agent, "succeeded")
    wait_state(one, run_id, A, "succeeded")
    wait_for(lambda: job_of(one, run_id, A)["acked"], "the last word on it is written")
    runs = one.master.state / "runs"
    before = files_of(runs / run_id), {path.name for path in one.runs()}
    with Peer(one, FALSE, "agent") as false:
        for cls in VERBS:
            said = example_of(cls)
            assert "an agent can't say" in false.refused(said | ({"run": run_id} if "run" in said else {})), cls
        for host in (A, B, FALSE, "../x", "", "run"):
            for message in (
                record(run_id, host, revision=99, state=est.State.FAILED),
                est.Log(1, run_id, host, 10),
                est.Busy(run_id, host, ""),
            ):
                assert "is not a job of 127.0.0.9" in false.refused(message)
        false.say(est.encode_chunk(1, 0, b"forged"))
        false.say(est.Broken(1, "forged"))
        assert "can't say" in false.refused(est.Cancel(run_id)), "and it is still heard"
        assert not [message for message in false.heard if isinstance(message, bytes)], "no log was sent to it"
    assert (files_of(runs / run_id), {path.name for path in one.runs()}) == before
    table = json.loads(one.cli("history", "--json").out)["runs"]
    assert [row["run"] for row in table if row["run"] == run_id] == [run_id]


@one_fleet
def test_nothing_is_added_to_a_log_that_is_complete(open_fleet: Fleet) -> None:
    one, run_id = open_fleet, new_run()
    with Peer(one, FALSE, "agent") as false:
        false.say(record(run_id, FALSE, state=est.State.RUNNING, created=time.time()))
        false.say(est.Log(5, run_id, FALSE, 4))
        false.until(lambda message: isinstance(message, est.Have))
        false.say(est.encode_chunk(5, 0, b"mine"))
        false.say(record(run_id, FALSE, revision=2, state=est.State.SUCCEEDED, size=4, created=time.time()))
        false.until(lambda message: isinstance(message, est.Acked))
        false.say(est.encode_chunk(5, 4, b"more"))
        false.say(est.Log(6, run_id, FALSE, 8))
        false.say(est.encode_chunk(6, 4, b"more"))
        false.say(record(run_id, FALSE, revision=3, state=est.State.FAILED, size=8, created=time.time()))
        assert "can't say" in false.refused(est.Cancel(run_id))
    assert log_of(one, run_id, replace_host(one, FALSE)) == b"mine"
    assert job_of(one, run_id, FALSE)["state"] == "succeeded"


def replace_host(one: Fleet, address: str) -> Host:
    return Host(address, one.master.folder)


@one_fleet
def test_names_from_the_wire_are_never_paths(open_fleet: Fleet, tmp_path: Path) -> None:
    one = open_fleet
    outside = {str(path) for path in one.tmp_path.rglob("*")}
    hosts = ["up/../../../up", "CON", "nul.txt", "COM1", "run", "C\\x", "x/" + "x" * 180]
    refused = ["a\0b", "a\nb", "\x1b]0;x\x07", "", "x" * 5000, A, B, "127.0.0.2\u202e"]
    refused += ["../../../up", "/etc/passwd", "..", ".", "a:b", "C:\\x", "x" * 180]  # no address, and no name
    with Peer(one, FALSE, "agent") as false:
        for number, host in enumerate(hosts):
            done = record(new_run(number + 256), host, state=est.State.SUCCEEDED, created=time.time())
            false.say(done)
            assert false.until(lambda message: isinstance(message, est.Acked)).host == host
        for host in refused:
            assert "another host's name, or none" in false.refused(record(new_run(999), host, created=time.time()))
        for run_id in ("../evil", "20260101-000000-abcd/../..", "20260101-000000-ABCD", "x\0"):
            assert "run can't be" in false.refused(vars(record(run_id, "x")) | {"verb": "job"})
    made = {str(path) for path in one.tmp_path.rglob("*")} - outside
    runs = re.escape(str(one.master.state / "runs"))
    allowed = re.compile(rf"{runs}/[0-9]{{8}}-[0-9]{{6}}-[0-9a-f]{{4}}(/[A-Za-z0-9._-]{{1,190}}\.(json|log))?")
    # the store writes these when it comes to it, by way of a file beside them
    later = re.compile(rf"{re.escape(str(one.master.state))}/\.?(machines|agent-keys)\.json(\.[0-9a-f]{{8}})?")
    made = {path for path in made if not later.fullmatch(path)}
    assert made and not [path for path in made if not allowed.fullmatch(path)]
    devices = re.compile(r"(?i)(con|nul|com1|run)(\.txt)?\.(log|json)")
    assert not [path for path in made if devices.fullmatch(Path(path).name) and Path(path).name != "run.json"]
    assert not Path("/etc/passwd.json").exists()
    assert one.cli("history").code == 0


@one_fleet
def test_an_agent_can_not_write_to_another_s_file_by_a_name_that_is_stored_alike(open_fleet: Fleet) -> None:
    one, run_id, other = open_fleet, new_run(), "cd" * 16
    mine = {"state": est.State.RUNNING, "created": time.time()}
    with Peer(one, FALSE, "agent") as first, Peer(one, "127.0.1.1", "agent", other) as second:
        first.say(record(run_id, "127.0.0.9/x", **mine))
        first.say(est.Log(1, run_id, "127.0.0.9/x", 3))
        first.until(lambda message: isinstance(message, est.Have))
        for alike in ("127.0.0.9_x", "127.0.0.9/x", "127.0.0.9/X", "127.0.0.9%x"):
            assert second.refused(record(run_id, alike, **mine))
            assert "is not a job of" in second.refused(est.Log(1, run_id, alike, 9))
        second.say(record(run_id, "127.0.1.1", **mine))  # a host of the same run, and honest
        second.say(est.Log(1, run_id, "127.0.1.1", 3))
        assert second.until(lambda message: isinstance(message, est.Have)).size == 0
        for peer, host in ((first, "127.0.0.9/x"), (second, "127.0.1.1")):
            peer.say(record(run_id, host, **(mine | {"revision": 2, "state": est.State.FAILED})))
            peer.until(lambda message: isinstance(message, est.Acked))


@one_fleet
def test_a_run_has_the_masters_time_and_place_whatever_a_commander_proposes(open_fleet: Fleet) -> None:
    one, runs = open_fleet, []
    with Peer(one, "127.0.1.7", "commander") as elsewhere:
        for number, proposed in enumerate(("20990101-000000-ffff", "19990101-000000-ffff", est.make_run_id())):
            order = est.Submit(proposed, f"clock{number}", est.Kind.DEPLOY, one.master.address, "no-such-branch", "me")
            for _ in range(2):
                elsewhere.say(order)
            first, again = (elsewhere.until(lambda message: isinstance(message, est.RunRecord)) for _ in range(2))
            assert first.run == again.run and first.place == again.place
            runs.append(first)
        assert runs[2].run == proposed, "a time like the master's stays"
        large = est.Submit(est.make_run_id(), "large", est.Kind.DEPLOY, one.master.address, "master", "me",
                           options={"x": "y" * 40_000})  # fmt: skip
        elsewhere.say(large)
        refused = elsewhere.until(lambda message: isinstance(message, est.Refuse))
        assert refused.what == "the order's options are too large" and refused.exit == 2
    assert all(abs(time.time() - calendar.timegm(time.strptime(run.run[:15], "%Y%m%d-%H%M%S"))) < 600 for run in runs)
    assert [run.place for run in runs] == [runs[0].place + number for number in range(3)]
    rows = json.loads(one.cli("history", "--json").out)["runs"]
    assert [row["run"] for row in rows[:3]] == [run.run for run in reversed(runs)]


@one_fleet
def test_what_an_agent_can_make_the_master_hold_is_bounded(open_fleet: Fleet) -> None:
    one, machine = open_fleet, "ef" * 16
    with Peer(one, "127.0.1.2", "agent", machine) as false:
        still = {"state": est.State.RUNNING, "created": time.time()}
        for number in range(est.ADOPTED_OPEN):
            false.say(record(new_run(number), "127.0.1.2", **still))
        assert "too many runs" in false.refused(record(new_run(5000), "127.0.1.2", **still))

        def recorded(count: int) -> bool:
            return len(list(one.master.state.glob("runs/*/127.0.1.2.json"))) == count

        wait_for(lambda: recorded(est.ADOPTED_OPEN), "what runs is recorded")
        for path in one.master.state.glob("runs/*/127.0.1.2.json"):
            false.say(record(path.parent.name, "127.0.1.2", revision=2, state=est.State.SUCCEEDED))
        for number in range(est.ADOPTED_OPEN, est.ADOPTED_PER_HOUR + 5):
            false.say(record(new_run(number), "127.0.1.2", state=est.State.SUCCEEDED, created=time.time()))
        assert "too many runs" in false.refused(record(new_run(5001), "127.0.1.2", created=time.time()))
        wait_for(lambda: recorded(est.ADOPTED_PER_HOUR), "no more is recorded")
    with Peer(one, "127.0.1.3", "agent", "12" * 16) as false:
        run_id = new_run()
        false.say(record(run_id, "127.0.1.3", state=est.State.RUNNING, created=time.time()))
        for channel in range(est.CHANNELS):
            false.say(est.Log(channel, run_id, "127.0.1.3", 1))
        assert "64 KiB" in false.refused(record(run_id, "127.0.1.3", revision=2, error="x" * (64 << 10)))
        assert "more than a chunk" in false.refused(b"\x01" + b"\0" * 12 + b"x" * (est.LARGE_CHUNK_BYTES + 1))
        assert "logs at once" in false.refused(est.Log(est.CHANNELS, run_id, "127.0.1.3", 1))
        false.say(record(run_id, "127.0.1.3", revision=2, state=est.State.FAILED))
        false.until(lambda message: isinstance(message, est.Acked))
    for number in range(est.MACHINES):
        with Peer(one, "127.0.1.4", "agent", f"{number:032x}"):
            pass
    with pytest.raises(est.RefusedError, match="machines already"):
        Peer(one, "127.0.1.4", "agent", "f" * 32)
    with Peer(one, "127.0.1.4", "agent", f"{7:032x}"):

        def known() -> int:
            machines = json.loads((one.master.state / "machines.json").read_bytes()).values()
            return sum(machine["address"] == "127.0.1.4" for machine in machines)

        wait_for(lambda: known() == est.MACHINES, "all of them are written down")
    assert one.cli("status").code == 0 and one.cli("history").code == 0
    wait_for(lambda: one.cli("forget", "127.0.1.4").code == 0, "all of them are offline and forgotten")
    with Peer(one, "127.0.1.4", "agent", "f" * 32):
        pass
    with Peer(one, "127.0.1.5", "commander") as eager:
        for number in range(est.QUESTIONS_OPEN + 1):
            eager.say(est.Ask(number, "status"))
        eager.until(lambda answer: isinstance(answer, est.Refuse) and "questions at once" in answer.what)
        eager.until(lambda answer: isinstance(answer, est.Answer))


@one_fleet
def test_no_message_of_an_agent_holds_the_master_up(open_fleet: Fleet) -> None:
    """Long words, deep nesting, numbers beyond all bounds: the next question is answered as if nothing had been."""
    one, words = open_fleet, ("v" * 30_000, "?token=" * 4_000, "a://x:" * 5_000)
    tries = [f'"{field}": "{word}"' for word in words for field in ("version", "error", "step")]
    deep = ("[" * 30_000 + "]" * 30_000, '{"a":' * 8_000 + "1" + "}" * 8_000)
    tries += [f'"options": {value}' for value in deep]
    for name in ("ended", "lived", "place", "size"):
        tries += [f'"{name}": {value}' for value in ("NaN", "1e999", "-1e300")]
    with Peer(one, "127.0.1.8", "agent", "57" * 16) as false, Peer(one, "127.0.1.9", "commander") as asks:
        for number, text in enumerate(tries):
            said = vars(record(new_run(number), "127.0.1.8", state=est.State.FAILED, created=time.time()))
            kept = {key: value for key, value in said.items() if key not in text[:12]}
            false.say(json.dumps(kept | {"verb": "job"})[:-1] + f", {text}}}")
            asks.say(est.Ask(number, "history", {"count": 1}))
            began = time.monotonic()
            asks.until(lambda answer: isinstance(answer, est.Answer | est.Refuse))
            assert time.monotonic() - began < 15, text[:40]
    for command in ("status", "history"):
        code, out, err = one.cli(command, "--json")
        assert code == 0, err
        json.loads(out, parse_constant=lambda word: pytest.fail(word))
        assert "vvv" in out or command == "status"
        assert "v" * 2001 not in out, "a row has an end"


@one_fleet
def test_an_agent_s_words_hurt_no_terminal_and_no_status(open_fleet: Fleet) -> None:
    one, run_id = open_fleet, new_run()
    evil = "\x1b]0;owned\x07\x1b[2J\r✓ 완료"
    hello = est.Hello("agent", [1, 1], evil, "34" * 16, evil, "n", "x" * 5000)
    with Peer(one, "127.0.1.6") as false:
        false.say(hello)
        assert isinstance(false.hear(), est.Welcome)
        done = record(
            run_id, "127.0.1.6", state=est.State.FAILED, error=evil, version=evil, step=evil, created=time.time()
        )
        false.say(done)
        false.until(lambda message: isinstance(message, est.Acked))

        def answer() -> None:
            while (message := false.hear()) is not None:
                if isinstance(message, est.Ask):
                    wrong = {"branch": {"a": 1}, "commit": 5, "version": evil * 1000, "dirty": [], "silent_s": "x"}
                    false.say(est.Answer(message.id, wrong | {"problem": evil}))

        answering = threading.Thread(target=answer)
        answering.start()
        try:
            for words in (["status"], ["logs", run_id], ["history"]):
                code, out, err = one.cli(*words)
                assert code == 0 and "127.0.1.6" in out, err
                assert "\x1b]" not in out + err and "\x1b[2J" not in out + err and len(out) < 40_000
            assert one.cli("status", "--json").code == 0
        finally:
            false.close()
            answering.join()
    assert "\x1b" not in one.master.stderr


@one_fleet
def test_a_host_speaks_in_a_plan_for_itself_alone(open_fleet: Fleet) -> None:
    """Other hosts' names in an answer, and values of the wrong kind: neither an order nor a table comes of them."""
    one, commit = open_fleet, "66" * 20
    lies: dict[str, Any] = {"host": A, "machine": "", "online": False, "queued": 5, "target": commit, "current": "x"}
    wrong: list[dict[str, Any]] = [
        lies, {"target": {"a": 1}}, {"current": 5}, {"subjects": "text"}, {"dirty": [1]}, {"changed_count": "many"}, {},
        {"error": {"a": 1}}, {"checks": [{"name": 5}]}, {"checks": [5]}, {"exit": "x", "refused": []},
    ]  # fmt: skip
    with Peer(one, "127.0.1.7", "agent", "56" * 16) as false:
        said: list[dict[str, Any]] = [{}]

        def answer() -> None:
            while (message := false.hear()) is not None:
                if isinstance(message, est.Ask):
                    false.say(est.Answer(message.id, said[-1]))

        answering = threading.Thread(target=answer)
        answering.start()
        try:
            with Peer(one, FALSE, "commander") as commander:
                for number, lie in enumerate(wrong):
                    said.append(lie)
                    for what in ("status", "plan", "health"):
                        commander.say(est.Ask(number, what, {"target": f"127.0.1.7,{B}", "branch": "master"}))
                        result = commander.until(lambda message: isinstance(message, est.Answer)).result
                        assert "127.0.1.7" in repr(result)
                        if what == "plan":
                            rows = {row["host"]: row for row in result["hosts"]}
                            assert list(rows) == ["127.0.1.7", B] and rows[B]["target"] != commit
                            assert est.plan_text(rows["127.0.1.7"])
                            assert rows["127.0.1.7"]["target"] == (commit if lie is lies else None)
                    if lie in wrong[-2:]:
                        assert one.cli("rollback", "127.0.1.7").code in (1, 4)
        finally:
            false.close()
            answering.join()
    assert "Traceback" not in one.master.stderr


# Branch names, secrets, files


@one_fleet
def test_hostile_branches_pass_neither_the_master_nor_an_agent_nor_a_runner(open_fleet: Fleet, tmp_path: Path) -> None:
    one = open_fleet
    runs = {path.name for path in one.runs()}
    corpus = [*HOSTILE, "a\0b", "\ud800".encode("utf-8", "replace").decode() + "\u200b", "master\u00ad", "--", "-"]
    with Peer(one, FALSE, "commander") as commander:
        for number, branch in enumerate(corpus):
            submit = est.Submit(new_run(number), "11" * 16, est.Kind.DEPLOY, "all", branch)
            for message in (submit, replace(submit, branch="master", commits={A: branch})):
                commander.say(message)
                answer = commander.until(lambda message: isinstance(message, est.Refuse | est.RunRecord))
                assert isinstance(answer, est.Refuse) and answer.exit == 2, branch
    assert {path.name for path in one.runs()} == runs
    # the runner, past everybody else: what a job's file says is checked again before git is asked anything
    spy = tmp_path / "bin" / "git"
    spy.parent.mkdir()
    spy.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/asked\nexec {os.path.realpath("/usr/bin/git")} "$@"\n')
    spy.chmod(0o755)
    env = one.env | {"PATH": f"{spy.parent}:{one.env['PATH']}"}
    state = est.StateFolder(tmp_path / "state")
    state.create()
    for number, branch in enumerate(corpus[::4]):  # a process each
        run_id = new_run(number)
        state.save_job(record(run_id, A, branch=branch))
        argv = [*one.program, "run-job", "--state", str(state.root), "--config", str(one.master.config), run_id, A]
        assert run(argv, env, one.master.repo).code == 0
        wait_for(lambda: (state.load_job(run_id, A) or record(run_id, A)).state in est.FINAL, "the job ends")  # noqa: B023
        ended = state.load_job(run_id, A)
        assert ended and (ended.state, ended.step) == (est.State.FAILED, "check")
    asked = (tmp_path / "asked").read_text() if (tmp_path / "asked").exists() else ""
    assert not re.search(r"(?<![.\w])(fetch|checkout|pull)(?![.\w])", asked), "as a command, not in a setting's name"


def test_an_agent_takes_no_hostile_branch_of_a_false_master(fleet: MakeFleet) -> None:
    one = fleet(hosts=2, start=False, command=COMMAND)
    agent = one.agents[0]
    answers: dict[str, est.JobRecord] = {}

    def answer(message: Any) -> list[Any]:
        if isinstance(message, est.JobRecord):
            answers[message.run] = message
        if not isinstance(message, est.Hello):
            return []
        orders = [
            est.Order(vars(record(new_run(i), B, branch=name, revision=0))) for i, name in enumerate([*HOSTILE, "a\0b"])
        ]
        paths = [est.Order(vars(record("../../evil", B)) | {"run": "../../evil"}), est.Order({"run": "x"})]
        return [est.Welcome(1, "9", B, B, "n"), *paths, *orders]

    with FalseMaster(A, one.port, answer):
        one.start(agent)
        wait_for(lambda: len(answers) == len(HOSTILE) + 1, lambda: f"all are refused: {answers}\n{agent.stderr}")
    assert {(job.state, job.step) for job in answers.values()} == {(est.State.FAILED, "check")}
    assert not list(agent.state.glob("runs/*/*.log")) and not (agent.state / "current.json").exists()
    assert not (agent.folder / "evil").exists() and not list(one.tmp_path.rglob("evil*"))


def test_a_branch_that_looks_like_a_command_is_only_a_name(fleet: MakeFleet) -> None:
    one = fleet(hosts=1, command=COMMAND)
    write_script("echo deploying\n", *one.hosts)
    for branch in ("$(touch${IFS}pwned)", "a;touch${IFS}pwned|`touch${IFS}pwned`&", "%PATH%'a'", "mаster"):
        code, out, _ = one.cli("trigger", "all", branch)
        assert (code, lines_of(out, A)[-1][:4]) == (1, "✗ 실패"), out
    assert not list(one.tmp_path.rglob("pwned*"))


def test_secrets_are_masked_and_files_are_the_user_s_alone(fleet: MakeFleet, tmp_path: Path) -> None:
    url = "postgres://app:geheim-im-url@db.example/x"
    rule = {"env": {"API_TOKEN": "tok-123456", "LOGIN": "named-secret", "DB": url, "PLAIN": "nothing-secret"}}
    one = fleet(
        hosts=1, start=False, command=COMMAND,
        config={"hosts": {A: rule}, "deploy": {"command": list(COMMAND), "secrets": ["LOGIN", "INHERITED"]}},
    )  # fmt: skip
    write_script(
        'echo "$API_TOKEN $LOGIN $DB $PLAIN $INHERITED"\n'
        "printf 'tok-'; sleep 0.3; echo 123456; printf 'named-se'; sleep 0.3; echo cret\n"
        "printf 'https://bob:hunt'; sleep 0.3; printf 'er22@h'; sleep 0.3; echo .example/p\n"
        "printf 'see http:'; sleep 0.2; printf '/'; sleep 0.2; echo '/ghp_0123456789abcdef@github.example/x'\n"
        'echo "$UNIT_PASSWORD $TOOL_PASS $AWS_SECRET_KEY $DESKTOP_SESSION"\n'
        "git config --get-all http.extraHeader; echo Zm9yZ2U6dG9r hunter-of-sub\n"
        "echo git clone ssh://git@host.example/x http://localhost:80/a@b mail@example\n",
        one.master,
    )
    one.origin.git("config", "http.extraHeader", "Authorization: Basic Zm9yZ2U6dG9r", cwd=one.master.repo)
    one.origin.commit({".gitmodules": '[submodule "x"]\n\tpath = x\n\turl = https://u:hunter-of-sub@forge.example/x\n'})
    one.origin.git("pull", "--quiet", cwd=one.master.repo)
    unit = {"UNIT_PASSWORD": "of-the-unit", "TOOL_PASS": "/bin/sh", "AWS_SECRET_KEY": "/wJalrXUtnFEMI"}
    unit["DESKTOP_SESSION"] = "plasma"
    old_mask = os.umask(0o022)
    try:
        one.start(env={"INHERITED": "from-the-daemon", **unit})
    finally:
        os.umask(old_mask)
    code, out, err = one.cli("trigger", "all", "master")
    assert code == 0, out + err
    shown = lines_of(out, A)
    assert shown[-10:-1] == [
        "*** *** postgres://app:***@db.example/x nothing-secret ***",
        "***",
        "***",
        "https://bob:***@h.example/p",
        "see http://***@github.example/x",
        "*** /bin/sh *** plasma",
        "Authorization: Basic ***",
        "*** ***",
        "git clone ssh://git@host.example/x http://localhost:80/a@b mail@example",
    ]
    one.origin.git("remote", "set-url", "origin", "http://bob:pass-in-remote@127.0.0.1:9/x", cwd=one.master.repo)
    code, out, _ = one.cli("trigger", "all", "master")
    assert code == 1 and "pass-in-remote" not in out and "git fetch origin..." in out
    for path in [one.master.state, *one.master.state.rglob("*")]:
        mode = stat.S_IMODE(path.lstat().st_mode)
        assert mode == (0o700 if path.is_dir() else 0o600), path
        for secret in (b"tok-123456", b"named-secret", b"geheim", b"from-the-daemon", b"hunter22", b"pass-in-remote"):
            assert path.is_dir() or secret not in path.read_bytes() or path.name.startswith("last-config"), path
