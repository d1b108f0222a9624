"""The web page in a real browser: what a person sees of a deployment, of a long log and of a hostile one."""

from __future__ import annotations

import base64
import gzip
import hashlib
import http.client
import json
import os
import re
import shutil
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests import seam as est
from tests.browser import PHONE, Browser
from tests.fleet import MODULE, ROOT, Fleet, need, run, unavailable, wait_for

MakeFleet = Callable[..., Fleet]
PROGRAM_NAME = "estelle_updater.pyz"
PAGE = ROOT / "config" / "page.html"
LONG = bool(os.environ.get("ESTELLE_TEST_LONG"))
A, B, C = "127.0.0.1", "127.0.0.2", "127.0.0.3"
TOKEN = "a token of the page's tests"

# What the hosts' deployment does: the test that uses the fleet says so in a file of the host's folder.
DEPLOY = ("sh", "../deploy.sh")
GOOD = "echo building; echo done v0301_4\n"
BAD = """for i in $(seq 50); do echo "compiled page$i"; done
printf 'src/page.tsx:14:7 - \\033[31merror\\033[0m TS2322: no number\\n'
echo "one more line"; exit 3
"""
WAIT = "while [ ! -e ../go ]; do sleep 0.1; done\n"
HOSTILE = b"""<img src=x onerror="document.title='owned'"><script>document.title='owned'</script>
\x1b]0;title\x07\x1b[2J\x1b[31mred\x1b[0m plain \x1b[999;999Hfar
safe\xe2\x80\xaeexe.\xe2\x81\xa6txt \xff\xfe bytes
 10 %\r 50 %\r100 % done\r
"""


def page_url(one: Fleet, place: str = "") -> str:
    return one.url.replace("ws://", "http://") + "/" + place


def get(one: Fleet, path: str = "/", **headers: str) -> tuple[int, dict[str, str], bytes]:
    """A plain GET at the master's port."""
    connection = http.client.HTTPConnection(A, one.port, timeout=20)
    connection.request("GET", path, headers=headers)
    answer = connection.getresponse()
    body = answer.read()
    connection.close()
    return answer.status, {name.lower(): value for name, value in answer.getheaders()}, body


def deploys(one: Fleet, script: str | bytes, *hosts: Any) -> None:
    """What the next deployment does on these hosts, by default all."""
    for host in hosts or one.hosts:
        (host.folder / "deploy.sh").write_bytes(script if isinstance(script, bytes) else script.encode())


def log_of(one: Fleet, run_id: str, host: str) -> bytes:
    return (one.master.state / "runs" / run_id / f"{host}.log").read_bytes()


def detach(one: Fleet, target: str = "all", branch: str = "master") -> str:
    code, out, err = one.cli("trigger", target, branch, "--detach")
    assert code == 0, err
    return out.strip()


def confirm(browser: Browser, text: str) -> None:
    browser.type(text)
    browser.wait("!document.querySelector('dialog .danger').disabled")
    browser.key("Enter")


STORED = """(async () => {
  const sum = await crypto.subtle.digest('SHA-256', viewer.store.bytes(0, viewer.store.size));
  return hex(new Uint8Array(sum));
})()"""


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    """Three hosts, of which one has failed to deploy what the others have."""
    need("git")
    one = Fleet(tmp_path_factory.mktemp("page"), 3, DEPLOY)
    deploys(one, GOOD)
    one.start()
    assert one.cli("trigger", "all", "master").code == 0
    one.origin.commit({"app.txt": "2"}, message="Second")
    deploys(one, BAD, one.hosts[2])
    assert one.cli("trigger", "all", "master").code == 1
    yield one
    one.stop_all()


@pytest.fixture(scope="module")
def browser(shared: Fleet) -> Iterator[Browser]:
    with Browser(shared.env) as tab:
        yield tab


together = pytest.mark.xdist_group("page")  # one worker makes the fleet and the browser that these tests share


def test_the_file_is_small_and_nothing_in_it_can_become_markup() -> None:
    text = PAGE.read_bytes()
    # Loaded once and whole, so it is a second on a phone's slow line: a limit that follows what it is, and goes down.
    assert len(text) <= 79_800 and len(gzip.compress(text, 9)) <= 26_300 and text.count(b"\n") <= 1730
    for word in (b"innerHTML", b"outerHTML", b"insertAdjacent", b"document.write", b"eval(", b"Function(", b"srcdoc"):
        assert word not in text, word
    assert not re.search(rb"(src|href)=.?(http|//)|@import|url\(", text), "nothing comes from elsewhere"


@together
def test_what_a_plain_get_answers(shared: Fleet) -> None:
    """The page for masterUrl's path, after the door's checks and with what keeps others out; 404 for other paths."""
    status, headers, body = get(shared)
    assert status == 200 and body == PAGE.read_bytes()
    assert headers["content-type"] == "text/html; charset=utf-8" and headers["cache-control"] == "no-store"
    assert headers["x-content-type-options"] == "nosniff" and headers["referrer-policy"] == "no-referrer"
    assert headers["cross-origin-opener-policy"] == headers["cross-origin-resource-policy"] == "same-origin"
    policy = {part.split()[0]: part.split()[1:] for part in headers["content-security-policy"].split(";")}
    for tag in ("script", "style"):
        code = re.search(rb"<%s>(.*?)</%s>" % ((tag.encode(),) * 2), body, re.DOTALL)
        assert code
        digest = base64.b64encode(hashlib.sha256(code[1]).digest()).decode()
        assert policy[f"{tag}-src"] == [f"'sha256-{digest}'"]
    assert policy["default-src"] == policy["base-uri"] == policy["form-action"] == ["'none'"]
    assert policy["frame-ancestors"] == policy["trusted-types"] == ["'none'"]
    assert policy["connect-src"] == [f"ws://{A}:{shared.port}", f"wss://{A}:{shared.port}"]
    status, headers, packed = get(shared, **{"Accept-Encoding": "gzip, deflate"})
    assert status == 200 and headers["content-encoding"] == "gzip" and gzip.decompress(packed) == body
    assert get(shared, "/other")[0] == get(shared, "/config/page.html")[0] == 404
    for wrong in ({"Host": "evil.example"}, {"Origin": "http://evil.example"}, {"Origin": "null"}):
        status, _, body = get(shared, **wrong)
        assert status == 403 and b"<html" not in body, wrong
    curl = ["curl", "-s", "-m", "10", "--interface", "127.0.0.9", page_url(shared)]
    assert "127.0.0.9 is not in the whitelist" in run(curl, shared.env).out


@together
def test_the_port_answers_get_and_of_head_the_headers_alone(shared: Fleet) -> None:
    """Whatever it answers, no other site's page may take it for a script, a picture or a frame."""

    def ask(method: str, path: str = "/", **more: str) -> tuple[int, dict[str, str], bytes]:
        fields = "".join(f"{name}: {value}\r\n" for name, value in ({"Host": f"{A}:{shared.port}"} | more).items())
        with socket.create_connection((A, shared.port), timeout=20) as connection:
            connection.sendall(f"{method} {path} HTTP/1.1\r\n{fields}\r\n".encode())
            said = b""
            while data := connection.recv(1 << 16):
                said += data
        head, _, body = said.partition(b"\r\n\r\n")
        status, *rows = head.decode().split("\r\n")
        headers = {row.partition(":")[0].lower(): row.partition(":")[2].strip() for row in rows}
        return int(status.split()[1]), headers, body

    status, headers, body = ask("HEAD")
    assert (status, body) == (200, b"") and headers["content-length"] == str(len(PAGE.read_bytes()))
    assert headers["content-security-policy"] == ask("GET")[1]["content-security-policy"]
    for path in ("/", "/other", f"/{PROGRAM_NAME}", f"/{PROGRAM_NAME}.sha256"):
        status, headers, body = ask("HEAD", path)
        assert body == b"" and status == ask("GET", path)[0], path
        for method in ("POST", "PUT", "DELETE", "OPTIONS", "TRACE", "PATCH", "get"):
            status, headers, body = ask(method, path)
            assert status == 405 and headers["allow"] == "GET, HEAD" and b"<html" not in body, (method, path)
        assert ask("HEAD", path, Host="evil.example")[::2] == (403, b"")
    upgrade = {"Upgrade": "websocket", "Connection": "Upgrade", "Sec-WebSocket-Version": "13"}
    for method in ("POST", "HEAD"):
        assert ask(method, **upgrade, **{"Sec-WebSocket-Key": "AAAAAAAAAAAAAAAAAAAAAA=="})[0] in (200, 405), method
    for path, more in (("/", {}), ("/other", {}), (f"/{PROGRAM_NAME}", {}), ("/", {"Origin": "http://evil.example"})):
        headers = ask("GET", path, **more)[1]
        assert headers["x-content-type-options"] == "nosniff", path
        assert headers["cross-origin-resource-policy"] == "same-origin", path


@together
def test_ten_seconds_tell_who_has_it_and_why_one_has_not(shared: Fleet, browser: Browser) -> None:
    newest = shared.runs()[-1].name
    browser.open(page_url(shared))
    browser.wait("document.querySelector('.excerpt .at')")
    head = browser.text(".headline")
    commit = shared.origin.git("rev-parse", "HEAD")[:7]
    assert "2 of 3 hosts have" in head and commit in head and head.endswith(C), head
    excerpt = browser.text(".excerpt")
    number = log_of(shared, newest, C).decode().split("\n").index("one more line")  # the line before it, from 1
    assert f"{number}" in excerpt and "src/page.tsx:14:7 - error TS2322: no number" in excerpt, excerpt
    browser.js("document.querySelector('.excerpt .at a').click()")
    browser.wait(f"viewer.at === {number - 1} && document.querySelector('.line.at')")
    assert "TS2322" in browser.text(".line.at")
    assert browser.js("location.hash") == f"#log/{newest}/{C}/L{number}"
    assert "git pull origin master" in browser.text("#steps")
    assert "failed at sh ../deploy.sh (exit 3), half-way" in browser.text("#result")
    browser.open(page_url(shared, f"#run/{newest}"))
    browser.wait("document.querySelector('.excerpt .at')")
    assert "2 of 3 hosts succeeded" in browser.text() and "Deploy again on these" in browser.text()
    assert "0.0 s" not in browser.text("h3 + .dim"), "the run takes as long as its slowest host"
    browser.open(page_url(shared, "#history"))
    browser.wait("document.querySelectorAll('.past > li').length >= 2 && document.querySelector('svg rect')")
    assert f"{C} failed at sh ../deploy.sh (exit 3)" in browser.text(".past")
    browser.open(page_url(shared, "#traffic"))
    browser.wait("document.querySelector('#view .empty').innerText.includes('no [haproxy]')")
    # what holds deployments back is said without a question to any host: a freeze, as a watch that is paused
    assert shared.cli("freeze", "market", "--for", "1h").code == 0
    browser.open(page_url(shared))
    browser.wait("document.querySelector('p.warn').innerText.includes('market')")
    assert shared.cli("thaw").code == 0
    for hostile in ("#log/../../etc/x", "#run/<img src=x onerror=alert(1)>", "#log/%E0%A4%A", "#nothing"):
        browser.open(page_url(shared, hostile))
        browser.wait("document.querySelector('.headline')")
    assert browser.errors == []


@together
def test_a_deployment_by_keyboard_alone_is_watched_to_its_end(shared: Fleet, browser: Browser) -> None:
    """Plan, the target typed, and every byte of the log on the screen's side as in the file."""
    deploys(shared, "for i in $(seq 3000); do echo line $i; done\n" + WAIT + "echo done v0301_5\n")
    browser.open(page_url(shared))
    browser.wait("canAct() && document.querySelector('.headline')")

    def reach(condition: str) -> None:
        for _ in range(60):
            if browser.js(f"(() => {{ const at = document.activeElement; return {condition} }})()"):
                return
            browser.key("Tab")
        pytest.fail(f"the Tab key does not reach {condition}")

    reach("at.textContent === 'Deploy…'")
    browser.key("Enter")
    browser.wait("document.activeElement.name === 'target'")
    browser.key("Tab", "Enter")
    browser.wait("document.activeElement.name === 'typed'")
    assert "Second" in browser.text("dialog") or "no change" in browser.text("dialog")
    browser.type("al")
    assert browser.js("document.querySelector('dialog .danger').disabled"), "what is typed is not the target yet"
    browser.key("Enter")
    browser.type("l")
    browser.wait("!document.querySelector('dialog .danger').disabled")
    browser.key("Enter")
    browser.wait("location.hash.startsWith('#run/') && state.run.record")
    newest = browser.js("state.run.run")
    record = json.loads((shared.master.state / "runs" / newest / "run.json").read_text())
    assert record["target"] == "all" and record["by"].startswith("page@") and record["options"]["plan"]
    last = "[...document.querySelectorAll('.job .last')].filter(each => each.innerText === 'line 3000')"
    browser.wait(f"{last}.length === 3")
    assert "3 running" in browser.text(".headline")
    reach(f"at.hash === '#log/{newest}/{B}'")
    browser.key("Enter")
    browser.wait("viewer.store.lines > 3000 && document.querySelector('#follow').innerText === 'Following'")

    # The reader scrolls up: what arrives does not move the lines.
    reach("at.id === 'lines'")
    browser.key("Home", "PageDown", "PageDown")
    browser.wait("document.querySelector('#follow').innerText.startsWith('Follow') && viewer.top > 10")
    browser.settle()
    before = browser.text("#window"), browser.js("viewer.box.scrollTop")
    for host in shared.hosts:
        (host.folder / "go").touch()
    browser.wait("FINAL.has(state.logJob.state) && viewer.store.size >= state.logJob.size")
    browser.settle()
    assert (browser.text("#window"), browser.js("viewer.box.scrollTop")) == before
    assert browser.js(STORED) == hashlib.sha256(log_of(shared, newest, B)).hexdigest()
    browser.key("End")
    browser.wait("document.querySelector('#window').innerText.includes('done v0301_5')")
    browser.key("/")
    browser.type("line 2999")
    browser.wait("document.querySelector('#hits').innerText === '1/1' && document.querySelector('.line.at mark')")
    browser.key("Escape", "[")
    browser.wait("viewer.at >= 0 && document.querySelector('.line.at.mark')")
    for host in shared.hosts:
        (host.folder / "go").unlink()
    browser.open(page_url(shared))
    browser.wait("document.querySelector('.headline .ok')")
    assert "All 3 hosts have" in browser.text(".headline")
    row = {"host": B, "refused": [], "current": "a", "target": "a", "doors": ["0.0.0.0/0 gets in"]}
    assert "0.0.0.0/0 gets in" in browser.js(f"JSON.stringify(planRow({json.dumps(row)}))")
    assert browser.errors == []


@together
def test_a_running_deployment_is_cancelled_by_typing_its_last_digits(shared: Fleet, browser: Browser) -> None:
    deploys(shared, "echo waiting; exec sleep 60\n")
    run_id = detach(shared, B)
    browser.open(page_url(shared, f"#run/{run_id}"))
    browser.wait("document.querySelector('#view').innerText.includes('waiting')")
    browser.js("[...document.querySelectorAll('button')].find(each => each.textContent === 'Cancel…').click()")
    browser.wait("document.activeElement.name === 'typed'")
    confirm(browser, run_id[-4:])
    browser.wait("document.querySelector('.job').innerText.includes('cancelled')")
    assert "page@127.0.0.1" in browser.text("#view")

    deploys(shared, GOOD)
    assert shared.cli("trigger", B, "master").code == 0
    shared.origin.commit({"app.txt": "newer"})
    assert shared.cli("trigger", B, "master").code == 0
    browser.js("openDialog({kind: 'rollback', target: '127.0.0.2', to: ''})")
    browser.wait("document.activeElement.name === 'target'")
    browser.key("Enter")
    browser.wait("document.activeElement.name === 'typed'")
    confirm(browser, B)
    browser.wait("state.run?.record?.kind === 'rollback' && state.run.jobs['127.0.0.2']?.state === 'succeeded'")
    assert shared.runs()[-1].name == browser.js("state.run.run")
    assert browser.errors == []


@together
def test_a_log_can_not_do_anything_to_the_page(shared: Fleet, browser: Browser) -> None:
    """Markup, escapes, bidi marks and bytes that are no text; then megabytes without a line's end."""
    (shared.hosts[0].folder / "hostile").write_bytes(HOSTILE)
    million = 60 if LONG else 6
    huge = f"head -c {million}000000 /dev/zero | tr '\\0' x; echo; echo after; head -c 300000 /dev/zero | tr '\\0' y\n"
    deploys(shared, f"cat ../hostile; {huge}", shared.hosts[0])
    run_id = detach(shared, A)
    browser.open(page_url(shared, f"#log/{run_id}/{A}"))
    browser.wait("FINAL.has(state.logJob.state) && viewer.store.size >= state.logJob.size", 120)
    assert browser.js("state.logJob.state") == "succeeded"
    wait_for(lambda: browser.js(STORED) == hashlib.sha256(log_of(shared, run_id, A)).hexdigest(), "the same bytes")
    first = log_of(shared, run_id, A).split(b"\n").index(HOSTILE.split(b"\n")[0]) + 1
    browser.js(f"viewer.goto({first - 3})")
    browser.wait("document.querySelector('#window').innerText.includes('onerror')")
    shown = browser.text("#window")
    assert "<img src=x onerror=" in shown and "red plain far" in shown and "100 % done" in shown, shown
    assert "safeexe.txt" in shown and "50 %" not in shown and "\x1b" not in shown and "\u202e" not in shown, shown
    assert browser.js("document.querySelector('#window .c1').innerText") == "red"
    assert browser.js("document.querySelectorAll('#window img, #window script').length") == 0
    assert browser.js("document.title") != "owned"
    longest = browser.js(
        "Math.max(...[...document.querySelectorAll('#window .line')].map(each => each.innerText.length))"
    )
    assert 2000 <= longest <= 2020, "a huge line is cut"
    browser.js("viewer.goto(viewer.most)")
    browser.wait("document.querySelector('#window').innerText.includes('after')")
    browser.js("document.querySelector('#raw').click()")
    browser.js(f"viewer.goto({first - 1})")
    browser.wait("document.querySelector('#window').innerText.includes('\u241b[31mred')")
    assert browser.errors == []


@together
def test_the_page_comes_back_when_the_master_does(shared: Fleet, browser: Browser) -> None:
    """A killed master: what is shown is said to be old, nothing can be ordered; the log goes on at the same byte."""
    before, after = (f"for i in $(seq 2000); do echo {word} $i; done\n" for word in ("before", "after"))
    deploys(shared, before + WAIT + after)
    run_id = detach(shared, B)
    browser.open(page_url(shared, f"#log/{run_id}/{B}"))
    browser.wait("viewer.store.lines > 2000")
    shared.kill(shared.master)
    browser.wait("stale() && document.querySelector('#link').innerText.includes('as of')")
    assert not browser.js("canAct()")
    (shared.hosts[1].folder / "go").touch()
    shared.start(shared.master)
    browser.wait("FINAL.has(state.logJob.state) && viewer.store.size >= state.logJob.size")
    assert browser.js("state.logJob.state") == "succeeded"
    assert browser.js(STORED) == hashlib.sha256(log_of(shared, run_id, B)).hexdigest()
    browser.wait("canAct() && document.querySelector('#link').innerText.includes('live')")
    (shared.hosts[1].folder / "go").unlink()
    shared.wait_online()
    browser.errors = [each for each in browser.errors if "WebSocket connection to" not in each]
    assert browser.errors == []


AXE = """axe.run().then(all => all.violations.map(each =>
  [each.id, each.nodes.map(node => node.html + node.failureSummary)]))"""


@together
def test_everybody_can_use_it(shared: Fleet, browser: Browser) -> None:
    """axe finds nothing in any view, in light and dark and on a phone, and nothing is wider than a phone."""
    tools = Path(shutil.which("pnpm") or "/x/y/z").parent.parent
    if not (axe := tools / "axe-core" / "axe.min.js").exists():
        unavailable("axe-core is not installed")
    bad = next(each.name for each in shared.runs() if b"TS2322" in log_of_any(each))
    places = {
        "": "document.querySelector('.headline')",
        f"#run/{bad}": "document.querySelector('.excerpt .at')",
        f"#log/{bad}/{C}": "document.querySelector('.line.at')",
        "#history": "document.querySelector('svg rect')",
        "#traffic": "document.querySelector('#view .empty')",
        "#fleet": "canAct() && !openDialog({kind: 'deploy'}) && document.querySelector('dialog[open] input')",
    }
    browser.command("Page.setBypassCSP", enabled=True)
    try:
        for place, ready in places.items():
            browser.open(page_url(shared, place))
            browser.wait(ready)
            browser.js(axe.read_text())
            for size, dark in (((1280, 800), True), (PHONE, False), ((1280, 800), False)):
                browser.look(size, dark=dark)
                browser.wait(
                    f"innerWidth === {size[0]} && matchMedia('(prefers-color-scheme: dark)').matches == {dark:d}"
                )
                browser.js("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")
                assert browser.js(f"!!({ready})"), (size, dark, place)
                found = browser.js(AXE)
                assert found == [], (size, dark, place, found)
                assert browser.js("document.documentElement.scrollWidth") <= size[0], (size, place)
    finally:
        browser.look((1280, 800))
        browser.command("Page.setBypassCSP", enabled=False)
    assert browser.errors == []


def log_of_any(folder: Path) -> bytes:
    return b"".join(each.read_bytes() for each in folder.glob("*.log"))


def test_a_long_log_stays_fluent_and_small(fleet: MakeFleet) -> None:
    """Lines by the hundred thousand: few nodes, bounded memory, what was let go is fetched again, no long task."""
    one = fleet(hosts=1, command=DEPLOY)
    words = " the quick brown fox jumps over the lazy dog and goes on until 80"
    deploys(one, f"seq -f '%.0f{words:.73}' 1000000\n")
    run_id = detach(one, A)
    with Browser(one.env, PHONE) as tab:
        tab.open(page_url(one))
        tab.trace()
        tab.js(f"location.hash = '#log/{run_id}/{A}'")
        tab.wait("FINAL.has(state.logJob.state) && viewer.store.size >= state.logJob.size", 110)
        log = log_of(one, run_id, A)
        lines = log.split(b"\n")
        assert tab.js("viewer.store.total") == len(lines) - 1 and tab.js("viewer.store.size") == len(log)
        assert tab.js("viewer.store.pages.size * PAGE") <= 17 << 20 < len(log)
        for line in (0, len(lines) // 2, len(lines) - 60):
            tab.js(f"viewer.goto({line})")
            wanted = lines[line].decode()
            tab.wait(
                f"[...document.querySelectorAll('.line')].some(each => each.innerText.endsWith({json.dumps(wanted)}))"
            )
        assert tab.js("document.querySelectorAll('*').length") < 1000
        tab.js("viewer.find('77777 ')")
        tab.wait("viewer.hits.length > 0 && document.querySelector('#hits').innerText.includes('in memory')")
        assert tab.errors == []
        cpu_ms, passed_ms = tab.longest_task()
        print(f"{len(lines)} lines: no task took more than {cpu_ms:.0f} ms ({passed_ms:.0f} ms with what others ran)")
        assert 0 < cpu_ms <= 50


def test_a_token_is_asked_for_and_proven_on_both_sides(fleet: MakeFleet, tmp_path: Path) -> None:
    one = fleet(hosts=1, command=DEPLOY, config={"tokenFile": str(tmp_path / "token")}, start=False)
    (tmp_path / "token").write_text(TOKEN + "\n")
    (tmp_path / "token").chmod(0o600)
    one.start()
    with Browser(one.env) as tab:
        tab.open(page_url(one))
        assert (
            tab.js(f"hex(sha256(utf8.encode({json.dumps('abc' * 100)})))") == hashlib.sha256(b"abc" * 100).hexdigest()
        )
        hello = est.Hello("commander", [1, 1], "page", "", "page", "0f" * 16)
        words = json.dumps([TOKEN, "client", vars(hello), "aa", "bb"])
        assert tab.js(f"proof(...{words})") == est.make_proof(TOKEN.encode(), "client", hello, "aa", "bb")
        for typed, said in (("", "asks for a token"), ("not the token at all", "the token is not the master's")):
            tab.wait(f"document.querySelector('dialog').innerText.includes({json.dumps(said)})")
            assert not tab.js("state.up") and tab.js("state.fleet") is None
            tab.wait("document.activeElement.name === 'typed'")
            tab.type("not the token at all" if not typed else TOKEN)
            tab.key("Enter")
        tab.wait("canAct() && document.querySelector('.headline')")
        assert tab.js("sessionStorage.token") == TOKEN and "Forget token" in tab.text("header")
        # Whoever answers without knowing the token is told nothing more.
        (tmp_path / "token").write_text("")
        one.stop(one.master)
        for config in (one.master.config,):
            settings = json.loads(config.read_text())
            del settings["tokenFile"]
            config.write_text(json.dumps(settings))
        one.start()
        tab.wait("document.querySelector('dialog').innerText.includes('does not know our token')")
        assert not tab.js("sessionStorage.token")


def test_a_copy_of_the_module_alone_says_that_it_has_no_page(fleet: MakeFleet, tmp_path: Path) -> None:
    one = fleet(hosts=1, start=False)
    alone = shutil.copy(MODULE, tmp_path)
    one.master.program = (one.program[0], str(alone))
    one.start()
    status, _, body = get(one)
    assert status == 404 and b"has no page" in body and body.count(b"\n") == 1
    assert one.cli("status").code == 0


def test_the_pyz_brings_the_page_along(fleet: MakeFleet, pyz: Path) -> None:
    one = fleet(hosts=1, program=(sys.executable, str(pyz)))
    assert get(one)[2] == PAGE.read_bytes()
