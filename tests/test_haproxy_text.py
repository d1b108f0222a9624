"""haproxy.cfg as HAProxy reads it: who is active, and the text of a switch, with a live HAProxy as the judge."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings, strategies as st

from tests import seam as est
from tests.fleet import need, wait_for
from tests.haproxy import ask

RULE = est.HaproxyRule(host="data", backend="be")
FILE = "haproxy.cfg"
HEAD = b"defaults\n    mode http\nbackend be\n"
EXAMPLES = int(os.environ.get("ESTELLE_TEST_EXAMPLES", "20"))


def read(text: bytes) -> est.BackendText:
    return est.read_backend({FILE: text}, RULE)


def refusal(text: bytes) -> str:
    with pytest.raises(est.GuardError) as caught:
        read(text).active()
    return str(caught.value)


# ---------------------------------------------------------------------------- examples

DOCUMENT = """\
frontend yquant_https
    bind *:443 ssl crt /etc/haproxy/certs/yquant.pem
    default_backend be

backend be
    mode http
    option http-server-close
    option forwardfor
    
    # Active Worker (예: Blue가 Active일 경우)
    server blue yq-blue:80 check cookie blue
    
    # Standby Node (Backup 옵션으로 평소엔 트래픽 받지 않음)
    server green yq-green:80 check backup cookie green
"""  # noqa: W293


@pytest.mark.parametrize("encoding", ["utf-8", "cp949"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_the_documents_example_there_and_back(encoding: str, end: str):
    text = DOCUMENT.replace("\n", end).encode(encoding)
    found = read(text)
    assert found.active() == "blue"
    assert found.servers["green"].address == "yq-green:80"
    moved = est.switch_text(found, "green")
    expected = DOCUMENT.replace("check cookie blue", "check backup cookie blue").replace(
        "check backup cookie green", "check cookie green"
    )
    assert moved == expected.replace("\n", end).encode(encoding)
    assert read(moved).active() == "green"
    assert est.switch_text(read(moved), "blue") == text
    warned = " ".join(found.warnings)
    assert all(word in warned for word in ("httpchk", "redispatch", "idle-close-on-response", "server-state-file"))


@pytest.mark.parametrize(
    ("lines", "number", "word"),
    [
        ("server blue a:1\nserver green b:1\n", 4, "both colours"),
        ("server blue a:1 backup\nserver green b:1 backup\n", 4, "neither"),
        ("server blue a:1\nserver green b:1 backup\nserver third c:1\n", 6, "another server"),
        ("server blue a:1\nserver green b:1 backup\nserver-template x 2 c:1\n", 6, "one by one"),
        ("server blue a:1\nserver green b:1 no-backup\n", 5, "no-backup"),
        ('server blue a:1\nserver green b:1 "${GREEN}" backup\n', 5, "quotes"),
        ('server blue a:1\nserver green "${A[*]}" backup\n', 5, "several"),
        ("server blue a:1\nserver green {{ b }}:1 backup\n", 5, "template"),
        ('server blue a:1\nserver green "{{ b }}:1" backup\n', 5, "template"),
        ("{% if x %}\nserver blue a:1\nserver green b:1 backup\n", 4, "template"),
        ("server blue a:1\nserver green b:1 backup\nbind :<%= port %>\n", 6, "template"),
        ("server blue a:1\nserver green b:1 b\\ c backup\n", 5, "quotes, escapes"),
        ("dispatch a:1\nserver blue a:1\nserver green b:1 backup\n", 4, "past the servers"),
        ("option transparent\nserver blue a:1\nserver green b:1 backup\n", 4, "past the servers"),
        ("server blue 0.0.0.0:0\nserver green b:1 backup\n", 4, "where the client meant them"),
        ("server blue a:1\nserver green *:80 backup\n", 5, "where the client meant them"),
        ('server blue a:1\nserver green b:1 "backup\n', 5, "does not end"),
        ("default-server check backup\nserver blue a:1\nserver green b:1 backup\n", 4, "default-server"),
        ("default-server no-backup\nserver blue a:1\nserver green b:1 backup\n", 4, "default-server"),
        ("cookie SRV insert\nserver blue a:1\nserver green b:1 backup\n", 4, "old colour"),
        ("stick on src\nserver blue a:1\nserver green b:1 backup\n", 4, "old colour"),
        ("use-server blue if TRUE\nserver blue a:1\nserver green b:1 backup\n", 4, "rule of its own"),
        (".if defined(X)\nserver blue a:1\n.endif\nserver green b:1 backup\n", 4, "condition"),
        ("server blue a:1\nserver green b:1 backup\n.if 1\nbackend other\n.endif\nserver x c:1\n", 6, "condition"),
        ("server blue a:1\nserver green b:1 backup\nserver blue a:1 backup\n", 6, "second server blue"),
        ("server blue a:1\n", 3, "no server green"),
        ('server blue a:1\nserver green b:1 backup\n"${X}" y\n', 6, "first word"),
        ("server blue a:1\nserver green b:1 backup\nbackend be\n", 6, "second backend"),
        ('server blue a:1\nserver green b:1 backup\nbackend "${X}"\n', 6, "second backend"),
    ],
)
def test_refused_with_the_line(lines: str, number: int, word: str):
    said = refusal(HEAD + lines.encode())
    assert re.search(rf"\blines? (\d+ and )?{number}\b", said), said
    assert word in said


@pytest.mark.parametrize(
    "lines",
    [
        ".if defined(X)\nbackend other\nserver x c:1\n.endif\n",
        ".if defined(X)\nbackend other\n.else\nlisten third\n.endif\nbackend fourth\nserver y d:1\n",
        ".if defined(X)\noption httpchk\n.endif\n",
        'server third "${C}:81" backup\n',
        "server third c:1 cookie a\\ b backup\n",
        'server third c:1 cookie "a b" backup\n',
        'default-server inter "${INTER}" rise 1\n',
        'log-format \'{"a":{"b":"%ci"}}\'\n',
    ],
)
def test_everyday_texts_are_read(lines: str):
    found = read(
        HEAD + b'server blue "${BLUE}:81" strict-maxconn\nserver green b:1 check-reuse-pool backup\n' + lines.encode()
    )
    assert found.active() == "blue"
    assert read(est.switch_text(found, "green")).active() == "green"


def test_what_goes_round_the_backend_is_told():
    servers = "server blue a:1\nserver green b:1 backup\n"
    other = "frontend f\nuse_backend api if { path /api }\ndefault_backend be\nbackend api\nserver x a:1\n"
    [said] = read(HEAD + (servers + other).encode()).bypasses
    assert said == f"{FILE} line 10: what goes to api reaches blue, whichever colour is active"
    leads = "frontend f\ndefault_backend be\n"
    all_of_them = ("redirect prefix http://x", "http-request redirect location /x", "http-request return status 200",
                   "http-request silent-drop", "tcp-request content reject if TRUE",
                   "http-request deny unless FALSE")  # fmt: skip
    for rule in all_of_them:
        assert read(HEAD + f"{rule}\n{servers}{leads}".encode()).bypasses == (
            f"{FILE} line 4: it answers all requests itself",
        )
        front = f"frontend f\n{rule}\ndefault_backend be\n"
        assert read(HEAD + (servers + front).encode()).bypasses == (f"{FILE} line 7: it answers all requests itself",)
        assert read(HEAD + (servers + front.replace("be\n", "o\nbackend o\n") + leads).encode()).bypasses == ()
        some = rule.partition(" if ")[0].partition(" unless ")[0]
        assert read(HEAD + f"{some} if {{ path /x }}\n{servers}{leads}".encode()).bypasses == ()


def test_a_backend_that_nothing_leads_to_is_told():
    servers = "server blue a:1\nserver green b:1 backup\n"
    lost = read(HEAD + f"{servers}frontend f\ndefault_backend o\nbackend o\n".encode()).bypasses
    assert lost == (f"{FILE} line 3: no frontend sends requests to it",)
    for way in ("default_backend be", "use_backend %[hdr(host),map(x)]", 'use_backend "${B}"'):
        assert read(HEAD + f"{servers}frontend f\n{way}\n".encode()).bypasses == ()


def test_refused_in_what_it_inherits():
    servers = b"backend be\nserver blue a:1\nserver green b:1 backup\n"
    assert "line 2" in refusal(b"defaults\ncookie SRV insert\n" + servers)
    assert "line 3" in refusal(b"defaults a\nmode http\ncookie X insert\ndefaults b from a\nmode http\n" + servers)
    read(b"defaults a\ncookie SRV insert\ndefaults b\nmode http\n" + servers)
    read(b"defaults b\nmode http\ndefaults a\ncookie S insert\n" + servers.replace(b"be\n", b"be from b\n"))
    assert "line 2" in refusal(b"defaults\ncookie S insert\n.if 1\ndefaults\nmode http\n.endif\n" + servers)
    assert "condition" in refusal(b".if 1\n" + servers + b".endif\n")
    assert "no backend be" in refusal(b"backend other\nserver blue a:1\n")


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b"server green b:1 backup", b"server green b:1"),
        (b"server green b:1\tbackup\tcheck#backup", b"server green b:1\tcheck#backup"),
        (b'server green b:1 check "backup" # backup', b"server green b:1 check # backup"),
        (b"server green b:1 cookie backup backup weight 3", b"server green b:1 cookie backup weight 3"),
        (b"  server green b:1 backup backup", b"  server green b:1"),
        (
            b"server 'green' b:1 source 1.2.3.4 usesrc client backup",
            b"server 'green' b:1 source 1.2.3.4 usesrc client",
        ),
    ],
)
def test_only_the_keyword_goes(old: bytes, new: bytes):
    text = HEAD + b"server blue a:1 cookie backup # backup\n" + old + b"\nbackend o\nserver green b:1 backup\n"
    moved = est.switch_text(read(text), "green")
    expected = text.replace(b"blue a:1 cookie", b"blue a:1 backup cookie").replace(old + b"\n", new + b"\n", 1)
    assert moved == expected


def test_a_server_may_be_called_backup():
    rule = est.HaproxyRule(host="data", backend="be", servers={"blue": "backup", "green": "check"})
    text = HEAD + b"server backup a:1\nserver check b:1 backup\n"
    found = est.read_backend({FILE: text}, rule)
    assert found.active() == "blue"
    assert est.switch_text(found, "green") == HEAD + b"server backup a:1 backup\nserver check b:1\n"


def test_flags_are_those_of_haproxy():
    """Which words of a `server` line take no argument, as the installed HAProxy lists its own."""
    need("haproxy")
    said = subprocess.run(["haproxy", "-dKall", "-c", "-f", "/dev/null"], capture_output=True, text=True, check=False)
    words = re.findall(r"(?m)^\tserver <name> <addr> (\S+)( \S+)?$", said.stdout + said.stderr)
    if not words:
        pytest.skip("this HAProxy lists no keywords")
    flags = {word for word, argument in words if not argument} - {"usesrc", "set-proxy-v2-tlv-fmt"}
    taken = {word for word, _ in words if est._SERVER_FLAG.fullmatch(word.encode())}
    assert taken == flags


def test_what_haproxy_says_of_itself():
    text = (
        "#<PID>          <type>          <reloads>       <uptime>        <version>\n"
        "77              master          2 [failed: 1]   0d00h00m02s     2.6.12\n# workers\n"
        "90              worker          0               0d00h00m02s     2.6.12\n# old workers\n"
        "80              worker          1               0d00h00m02s     2.6.12\n# programs\n\n"
    )
    assert est.parse_show_proc(text) == est.Processes(90, (est.OldWorker(80, 2.0),), 1)
    kept = text.replace("90              worker          0               0d00h00m02s     2.6.12\n", "")
    assert est.parse_show_proc(kept) == est.Processes(80, (), 1), "3.1 and newer, after a text that could not be read"
    assert est.parse_show_proc("") == est.Processes()
    assert est.parse_show_stat("", "be") == est.parse_show_stat("Unknown command", "be") == []


STAT = """\
# pxname,svname,stot,status,bck,addr,req_tot,weight,
outside,FRONTEND,9,OPEN,,,{arrived},,
other,x,{other},no check,0,127.0.0.1:1,,1,
other,BACKEND,{other},UP,0,,,1,
be,blue,{blue},UP,1,127.0.0.1:1,,1,
be,green,{green},UP,0,127.0.0.1:2,,1,
be,BACKEND,{all},UP,0,,,2,
"""


def proof_of(*counts: tuple[int, int, int, int, int]) -> est.TrafficProof:
    """Looks half a second apart: requests that arrived, to other/x, to blue, to green, and to the backend."""
    proof = est.TrafficProof("green", "green")
    for number, row in enumerate(counts):
        text = STAT.format(**dict(zip(("arrived", "other", "blue", "green", "all"), row, strict=True)))
        proof.add(est.parse_look(text, RULE, ("outside",)), number / 2)
    return proof


def test_what_counters_prove():
    assert proof_of((0, 0, 0, 0, 0), (5, 0, 0, 5, 5)).is_proved
    said = proof_of((0, 0, 0, 0, 0), (5, 0, 2, 3, 5)).problem()
    assert said == "requests still reach another server: green has 3 requests, blue 2"
    silent = proof_of((0, 0, 0, 0, 0), (0, 0, 0, 0, 0))
    assert not silent.is_proved and silent.problem() is None and silent.seen() == "no request came so far"
    round_it = proof_of((0, 0, 0, 0, 0), (5, 5, 0, 0, 0))
    assert round_it.problem() == ("requests go another way: other/x got 5 requests, at blue's address, and green none")
    monitored = proof_of((0, 0, 0, 0, 0), (0, 5, 0, 0, 0))
    assert not monitored.is_proved and monitored.problem() is None, "by a port of its own: no traffic"
    both = proof_of((0, 0, 0, 0, 0), (9, 4, 0, 5, 5))
    assert both.is_proved and both.problem() is None
    assert both.detoured == ["other/x got 4 requests, at blue's address"]
    before = proof_of((9, 9, 0, 0, 0), (9, 9, 0, 0, 0))
    assert before.problem() is None and before.seen() == "no request came so far", "of before the switch"
    assert proof_of((0, 0, 0, 0, 0), (5, 0, 0, 0, 0)).seen() == "5 requests came in, and none reached the backend"
    assert "5 requests came to the backend" in proof_of((0, 0, 0, 0, 0), (5, 0, 0, 0, 5)).seen()
    anew = proof_of((9, 9, 0, 0, 0), (1, 1, 0, 0, 0))
    assert anew.problem() is None, "a new process counts from zero"
    flapping = proof_of((0, 0, 0, 0, 0), (5, 0, 2, 3, 5), (9, 0, 2, 7, 9))
    assert flapping.is_proved and flapping.relapses == ""
    flapping.look = flapping.look._replace(rows=[{**row, "chkdown": "2"} for row in flapping.rows])
    assert flapping.relapses == "it was down 2 times since HAProxy was reloaded: green has 7 requests, blue 2"


def rows(**servers: str) -> list[dict[str, str]]:
    return [
        {"svname": name, "status": said.split("/")[0], "bck": "1" if said.endswith("/backup") else "0"}
        for name, said in servers.items()
    ]


def test_files_of_a_command_line():
    argv = "haproxy -W -S /m,mode,600 -C conf -f a.cfg -p /pid -f conf.d -x /s -sf 4 5 -- b.cfg c.cfg"
    assert est.haproxy_arguments(argv.split()) == ["a.cfg", "conf.d", "b.cfg", "c.cfg"]


def test_who_gets_the_requests():
    assert est.decide_traffic(rows(blue="UP", green="UP/backup")) == ["blue"]
    assert est.decide_traffic(rows(blue="DOWN", green="UP/backup")) == ["green"]
    assert est.decide_traffic(rows(blue="DRAIN", sorry="no check/backup", green="UP/backup")) == ["sorry"]
    assert est.decide_traffic(rows(blue="UP", green="UP")) == ["blue", "green"]
    assert est.decide_traffic(rows(blue="MAINT", green="DOWN/backup")) == []
    failed = rows(blue="DOWN", green="UP/backup", sorry="NOLB/backup", third="UP/backup")
    assert est.decide_traffic(failed, all_backups=True) == ["green", "third"], "option allbackups"
    said = est.traffic_warnings(RULE, failed, {}, all_backups=True)
    assert "green and third share the traffic" in said
    assert read(HEAD + b"option allbackups\nserver blue a:1\nserver green b:1 backup\n").all_backups
    said = est.traffic_warnings(RULE, rows(blue="DOWN", green="UP/backup"), {"blue": "active", "green": "backup"})
    assert any("failed over to green" in line for line in said)
    said = est.traffic_warnings(RULE, rows(blue="UP", green="UP/backup"), {"blue": "backup", "green": "active"})
    assert any("a reload was lost" in line for line in said)
    assert est.traffic_warnings(RULE, rows(blue="UP", green="UP/backup"), {"blue": "active", "green": "backup"}) == []


def test_states_of_a_server_whose_address_changed_are_dropped():
    found = read(HEAD + b"server blue 10.0.0.2:6000\nserver green green.example:6000 backup\n")
    line = "3 be {} {} {} 2 0 1 1 21 15 3 4 6 0 0 0 - {} - 0 0 - - 0\n"
    dump = "1\n# be_id\n" + line.format(1, "blue", "10.0.0.2", 6000) + line.format(2, "green", "10.0.0.9", 6000)
    assert est.keep_states(dump, found, RULE) == dump
    moved = dump.replace("10.0.0.2", "10.0.0.3")
    assert est.keep_states(moved, found, RULE) == "1\n# be_id\n" + line.format(2, "green", "10.0.0.9", 6000)
    six = read(HEAD + b"server blue [2001:DB8:0::2]:06000\nserver green 10.0.0.9:6000 backup\n")
    spelt = dump.replace("10.0.0.2", "2001:db8::2")
    assert est.keep_states(spelt, six, RULE) == spelt, "the same address, as HAProxy writes it"


# ---------------------------------------------------------------------------- any text, HAProxy being the judge

SPACE = st.sampled_from([" ", "  ", "\t", " \t "])
COMMENTS = ["# server blue is checked", "# 백업 backup 서버", "#backup", "# \"backup' quote", "# green backup \\"]
PIECES = [
    "check", "check inter 500", "cookie backup", "cookie blue", "weight 10", "maxconn 100", "id {id}", "backup",
    '"backup"', "'backup'", "non-stick", "check-ssl", "fall 2 rise 3", "disabled", "ssl verify none",
    "no-backup", "slowstart 5s", "on-error mark-down", "backup backup", "agent-inter 5s", "source 127.0.0.1",
]  # fmt: skip


@st.composite
def server_lines(draw: st.DrawFn, name: str, number: int, port: int) -> str:
    pieces = draw(st.lists(st.sampled_from(PIECES), max_size=4))
    words = ["server", draw(st.sampled_from([name, f'"{name}"', f"'{name}'"])), f"127.0.0.1:{port}"]
    words += [piece.format(id=number) for piece in pieces]
    indent = draw(st.sampled_from(["", "    ", "\t"]))
    comment = draw(st.sampled_from(["", *(f" {comment}" for comment in COMMENTS), "#glued backup"]))
    return indent + draw(SPACE).join(words) + comment


@st.composite
def texts(draw: st.DrawFn) -> bytes:
    inner = [
        draw(server_lines("blue", 11, 9)), draw(server_lines("green", 12, 9)),
        *draw(st.lists(st.sampled_from(["", "    option redispatch", "    option httpchk GET /", *COMMENTS,
                                        "    default-server check", "    default-server backup",
                                        "    default-server no-backup", ".if defined(NOBODY)\n.endif"]), max_size=2)),
    ]  # fmt: skip
    if draw(st.integers(0, 4)) == 0:
        inner.append(draw(server_lines("backup", 13, 9)))
    inner = draw(st.permutations(inner))
    other = ["backend other", "    server blue 127.0.0.1:9", "    server green 127.0.0.1:9 backup"]
    own = [draw(st.sampled_from(["backend be", "listen be", "backend  be # backup", 'backend "be"'])), *inner]
    defaults = ["defaults", "    mode http", "    timeout connect 1s", "    timeout client 1s", "    timeout server 1s"]
    defaults += draw(st.sampled_from([[], ["    default-server backup"], ["    option redispatch"]]))
    blocks = draw(st.permutations([own, other]))
    lines = ["global", f"    {draw(st.sampled_from(COMMENTS))}", *defaults, *blocks[0], *blocks[1], ""]
    text = draw(st.sampled_from(["\n", "\r\n"])).join(lines)
    return text.encode(draw(st.sampled_from(["utf-8", "cp949"])))


@pytest.fixture(scope="module")
def judge(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Judge]:
    need("haproxy")
    yield Judge(tmp_path_factory.mktemp("judge"))


class Judge:
    """A fresh HAProxy for each text: what it says, and who is a backup in its `show stat`."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.socket = folder, folder / "s"

    def roles(self, text: bytes) -> dict[str, str] | None:
        """Server name to `bck`; None where HAProxy does not take the text."""
        path = self.folder / "cfg"
        path.write_bytes(text.replace(b"global", f"global\n stats socket {self.socket} level admin".encode(), 1))
        if subprocess.run(["haproxy", "-q", "-c", "-f", path], capture_output=True, check=False).returncode:
            return None
        with subprocess.Popen(
            ["haproxy", "-db", "-f", path], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        ) as process:
            try:
                answer = wait_for(lambda: ask(self.socket, "show stat"), "HAProxy answers")
            finally:
                process.kill()
        lines = [line.split(",") for line in answer.splitlines()]
        return {row[1]: row[20] for row in lines if row[0] == "be" and row[1] not in ("BACKEND", "FRONTEND")}


@settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))
@given(text=texts(), color=st.sampled_from(est.COLORS))
def test_haproxy_reads_what_is_read_here(judge: Judge, text: bytes, color: str):
    before = judge.roles(text)
    try:
        found = read(text)
        active = found.active()
    except est.GuardError as problem:
        assert re.search(r" lines? \d", str(problem)) or before is None
        return
    if before is None:  # `haproxy -c` is asked anyway
        return
    assert [name for name, backup in before.items() if backup == "0"] == [active]
    moved = est.switch_text(found, color)
    assert judge.roles(moved) == {**before, "blue": "01"[color != "blue"], "green": "01"[color != "green"]}
    assert read(moved).active() == color
    old, new = text.split(b"\n"), moved.split(b"\n")
    assert len(old) == len(new)
    numbers = {server.number for server in found.servers.values()}
    for number, (one, two) in enumerate(zip(old, new, strict=True), 1):
        assert one == two or number in numbers
        assert re.sub(rb"[ \t]+[\"']?backup[\"']?", b"", one) == re.sub(rb"[ \t]+[\"']?backup[\"']?", b"", two)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.sampled_from([b"backend be", b"server blue a:1", b"server", b'"', b"'", b"\\", b"#", b" ", b"\n",
                                 b"backup", b"green", b"b:1", b"$", b".if", b".endif", b"\xb9\xe9", b"\r", b"\x00",
                                 b"from", b"defaults", b"default-server"]), max_size=30))  # fmt: skip
def test_any_bytes_are_read_or_refused(pieces: list[bytes]):
    try:
        read(b"".join(pieces))
    except est.GuardError:
        pass
