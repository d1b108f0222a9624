"""People are told what happened: every format, and receivers that are slow, failing, gone, and back."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from email.utils import format_datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests import seam as est
from tests.fleet import ROOT, VERSION, Fleet, free_port, need, wait_for
from tests.haproxy import Proxy
from tests.seam import replace

MakeFleet = Callable[..., Fleet]
SECRET = "T0p-S3cret-Hook"
PASSWORD = "hunter2-hunter2"


class Receiver:
    """A real HTTP server that keeps what it is sent; `answers` are its next answers, 200 once they are used up."""

    def __init__(self, port: int = 0) -> None:
        self.got: list[tuple[str, Any, str]] = []  # path, headers, body
        self.when: list[float] = []  # requests came
        self.refused: dict[int, float] = {}  # status: when
        self.answers: list[tuple[int, dict[str, str]]] = []
        self.open = threading.Event()  # unset: it takes the request and says nothing
        self.open.set()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"])).decode()
                outer.when.append(time.monotonic())
                outer.open.wait(60)
                status, headers = outer.answers.pop(0) if outer.answers else (200, {})
                if status == 200:
                    outer.got.append((self.path, self.headers, body))
                else:
                    outer.refused[status] = time.monotonic()
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.end_headers()

            def do_GET(self) -> None:
                outer.got.append((self.path, self.headers, "GET"))
                self.send_response(200)
                self.end_headers()

            def log_message(self, *_: Any) -> None: ...

        self.server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()

    def bodies(self, path: str) -> list[str]:
        return [body for where, _, body in list(self.got) if where == path]

    def close(self) -> None:
        self.open.set()
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture
def receiver() -> Iterator[Callable[..., Receiver]]:
    made: list[Receiver] = []

    def make(port: int = 0) -> Receiver:
        made.append(Receiver(port))
        return made[-1]

    yield make
    for one in made:
        one.close()


def texts(tree: Path) -> Iterator[tuple[Path, str]]:
    for path in tree.rglob("*"):
        if path.is_file():
            yield path, path.read_text("utf-8", "replace")


def spooled(fleet: Fleet, suffix: str = "json") -> list[Path]:
    return sorted((fleet.master.state / "notify").glob(f"*.{suffix}"))


def test_every_format_and_no_secret_in_sight(
    fleet: MakeFleet, receiver: Callable[..., Receiver], tmp_path: Path
) -> None:
    hooks = receiver()
    for name in ("slack", "telegram"):
        (tmp_path / name).write_text(f"{hooks.url}/{name}/{SECRET}\n")
    bad = ["failed", "lost"]
    one = fleet(hosts=2, start=False, config={
        "hosts": {"127.0.0.2": {"env": {"DB_PASSWORD": PASSWORD}}},
        "notify": [
            {"urlFile": str(tmp_path / "slack"), "format": "slack", "on": bad},
            {"urlEnv": "CHAT_ADDRESS", "format": "discord", "on": bad},
            {"urlFile": str(tmp_path / "telegram"), "format": "telegram", "chat": "-42", "on": bad},
            {"url": f"{hooks.url}/topic", "format": "ntfy", "on": [*bad, "succeeded"]},
            {
                "url": f"{hooks.url}/json", "per": "host",
                "on": [*bad, "succeeded", "agent-offline"], "offlineMinutes": 0.01,
            },
        ],
    })  # fmt: skip
    one.start(env={"CHAT_ADDRESS": f"{hooks.url}/discord/{SECRET}"})
    agent = one.agents[0]
    script = "for i in $(seq 40); do echo line $i '<!channel> ```' $DB_PASSWORD; done; echo $CHAT_ADDRESS"
    one.origin.commit({"deploy.sh": f"{script}\nprintf '\\033[31mred\\033[0m\\n'; exit 7\n"})
    failed = one.cli("trigger", agent.address, "master")
    assert failed.code == 1
    run = one.runs()[-1].name
    wait_for(lambda: len(hooks.got) == 5, lambda: f"five messages: {hooks.got} {one.master.stderr}")

    slack, discord = (json.loads(hooks.bodies(f"/{name}/{SECRET}")[0]) for name in ("slack", "discord"))
    telegram = json.loads(hooks.bodies(f"/telegram/{SECRET}/sendMessage")[0])
    whole = json.loads(hooks.bodies("/json")[0])
    note = hooks.bodies("/topic")[0]
    assert set(slack) == {"text"} and "&lt;!channel&gt;" in slack["text"] and "<" not in slack["text"]
    assert set(discord) == {"content", "allowed_mentions"} and discord["allowed_mentions"] == {"parse": []}
    assert len(discord["content"]) <= 2000 and discord["content"].count("```") == 2
    assert (telegram["chat_id"], telegram["disable_web_page_preview"]) == ("-42", True)
    whole_text = len(telegram["text"].encode("utf-16-le")) // 2
    assert telegram["entities"] == [{"type": "pre", "offset": 0, "length": whole_text}], "where no name becomes a link"
    (headers,) = (headers for path, headers, _ in hooks.got if path == "/topic")
    assert headers["Title"] == "failed 127.0.0.2" and headers["Priority"] == "high"
    assert headers["User-Agent"].startswith("estelle-updater/")
    for text in (slack["text"], discord["content"], telegram["text"], note, whole["text"]):
        assert text.startswith("[127.0.0.2] ✗ 실패 sh deploy.sh (exit 7)\n")
        assert " rollback " not in text, "there is nothing yet to go back to"
        assert run in text and "line 40" in text
        assert "line 22 " not in text and "\x1b" not in text and PASSWORD not in text
        assert SECRET not in text, "nor what the deployment printed of its environment"
    assert (whole["event"], whole["host"], whole["exit"], whole["step"]) == ("failed", "127.0.0.2", 7, "sh deploy.sh")
    assert len(whole["log"]) == est.NEWS_LINES and whole["log"][-1] == "red"

    one.origin.commit({"deploy.sh": "echo fine\n"})
    assert one.cli("trigger", "all", "master").code == 0
    wait_for(lambda: len(hooks.got) == 8, "to one about each host, to the other about both at once")
    both = hooks.bodies("/topic")[1].splitlines()
    assert both[0] == f"[all] ✓ 완료 {VERSION}" and both[1].startswith("2 hosts, deploy master on all, by ")
    assert len(both) == 2
    good = {json.loads(body)["host"]: json.loads(body) for body in hooks.bodies("/json")[1:]}
    assert {host: (one["event"], one["version"]) for host, one in good.items()} == {
        "127.0.0.1": ("succeeded", VERSION), "127.0.0.2": ("succeeded", VERSION),
    }  # fmt: skip

    one.stop(agent)
    wait_for(lambda: len(hooks.got) == 9, "the agent is away")
    assert "[127.0.0.2] the agent is offline for" in json.loads(hooks.bodies("/json")[-1])["text"]
    shown = one.master.stderr + one.cli("status", "--json").out + one.cli("history", "--json").out
    shown += one.cli("config", "check").out + "".join(text for _, text in texts(one.master.state))
    assert SECRET not in shown
    kept = [text for path, text in texts(one.master.state) if not path.stem.startswith("last-config")]
    assert PASSWORD not in "".join(kept)


def test_failing_gone_and_back(fleet: MakeFleet, receiver: Callable[..., Receiver], tmp_path: Path) -> None:
    hooks, port = receiver(), free_port()
    (tmp_path / "gone").write_text(f"http://127.0.0.1:{port}/gone/{SECRET}")
    one = fleet(hosts=1, config={"notify": [
        {"url": f"{hooks.url}/hook", "on": ["succeeded"]},
        {"urlFile": str(tmp_path / "gone"), "on": ["succeeded"]},
        {"urlFile": str(tmp_path / "never"), "on": ["succeeded"]},
    ]})  # fmt: skip
    assert f"no message can be sent to json: can't read urlFile {tmp_path / 'never'}" in one.master.stderr
    hooks.answers = [(500, {}), (429, {"Retry-After": "3"}), (302, {"Location": hooks.url})]
    hooks.open.clear()
    assert one.cli("trigger", "all", "master").code == 0, "a receiver that hangs delays no result"
    assert hooks.got == []
    hooks.open.set()
    wait_for(lambda: hooks.bodies("/hook"), lambda: f"after three refusals: {one.master.stderr}")
    assert min(when for when in hooks.when if when > hooks.refused[429]) - hooks.refused[429] >= 3, "as it asked for"
    assert set(hooks.refused) == {500, 429, 302} and len(hooks.got) == 1, "a redirect is no delivery and not followed"
    wait_for(lambda: "can't read urlFile" in one.master.stderr and "Connection refused" in one.master.stderr, "told")
    wait_for(lambda: "arrive again" in one.master.stderr, "told")

    left = spooled(one)
    assert len(left) == 2 and len(spooled(one, "sent")) == 1
    one.kill(one.master)
    back = receiver(port)
    one.start(one.master)
    wait_for(lambda: back.got, "what was spooled is sent by the next process")
    wait_for(lambda: len(spooled(one, "sent")) == 2, "and remembered")
    one.restart(one.master)
    (tmp_path / "never").write_text(f"{back.url}/never")
    wait_for(lambda: back.bodies("/never"), "a secret that comes late is found")
    assert len(back.bodies(f"/gone/{SECRET}")) == 1 and len(hooks.got) == 1, "each is told once"
    assert SECRET not in one.master.stderr + "".join(text for _, text in texts(one.master.state))


def test_a_stop_waits_for_no_receiver(fleet: MakeFleet, receiver: Callable[..., Receiver]) -> None:
    hooks = receiver()
    one = fleet(hosts=1, config={"notify": [{"url": hooks.url, "on": ["succeeded"]}]})
    hooks.open.clear()
    assert one.cli("trigger", "all", "master").code == 0
    wait_for(lambda: hooks.when, "the message is on its way")
    assert one.stop(one.master) == 0
    assert not hooks.got and len(spooled(one)) == 1
    hooks.open.set()
    one.start(one.master)
    wait_for(lambda: len(spooled(one, "sent")) == 1, "sent at last")


def test_a_switch_and_a_failover(
    fleet: MakeFleet, receiver: Callable[..., Receiver], tmp_path_factory: pytest.TempPathFactory
) -> None:
    hooks, proxy = receiver(), Proxy(tmp_path_factory.mktemp("haproxy"))
    try:
        rules = [{"url": hooks.url, "on": ["switched", "failover", "failed"]}]
        one = fleet(hosts=1, config={"haproxy": proxy.start().rule, "notify": rules})
        traffic = one.master.state / "notify/traffic"
        for order in (("switch", "green", "--dry-run"), ("switch", "green"), ("switch", "green")):
            result = one.cli(*order)
            assert result.code == 0, result
        wait_for(lambda: traffic.exists() and "green" in traffic.read_text(), "the master knows who has the traffic")
        (switched,) = (json.loads(body) for body in hooks.bodies("/"))
        assert (switched["event"], switched["title"]) == ("switched", "[127.0.0.1] switched: ✓ 완료 green")
        proxy.stop_worker("green")
        wait_for(lambda: len(hooks.got) == 2, "the failover is told")
        told = json.loads(hooks.bodies("/")[1])
        assert (told["event"], told["active"]) == ("failover", "blue")
        assert "went from green to blue without a switch" in told["text"]
    finally:
        proxy.close()


# ---------------------------------------------------------------------------- without a fleet

JOB = est.JobRecord("20261122-210501-7f3a", "h", "a" * 32, est.Kind.DEPLOY, "master", started=1.0, ended=3.5)
RUN = est.run_of_job(JOB)


def news(state: est.State, log: str = "", **more: Any) -> dict[str, Any]:
    return est.news_of_job(RUN, replace(JOB, state=state, **more), log.encode())


@pytest.mark.parametrize("form", ["slack", "discord", "telegram", "ntfy", "json"])
@pytest.mark.parametrize(
    "log", ["", "x\n" * 30, "가나다" * 3000 + "\n" + "```<&>" * 300, "\r\n".join(["😀" * 600] * 30)], ids=range(4)
)
def test_no_message_is_longer_than_its_service_takes(form: str, log: str) -> None:
    told = news(est.State.FAILED, log, step="가" * 2000 if "가" in log else "s", exit=1)
    headers, body = est.render_news(form, told, "42")
    text = body.decode() if form == "ntfy" else next(
        data[key] for data in [json.loads(body)] for key in ("text", "content") if key in data
    )  # fmt: skip
    assert len(text.encode()) <= est.NEWS_BYTES[form]
    assert text.startswith("[h] ✗ 실패") and all(value.isascii() for value in headers.values())


def test_what_is_said_of_each_end() -> None:
    assert news(est.State.SUCCEEDED, version="v1")["title"] == "[h] ✓ 완료 v1"
    assert news(est.State.TIMEOUT, step="s")["event"] == "timeout"
    assert news(est.State.LOST, error="the runner died")["rollback"] is None
    back = est.news_of_job(RUN, replace(JOB, state=est.State.FAILED, step="s"), b"", "abc")
    assert back["rollback"] == "estelle-updater rollback h --to abc"
    same = news(est.State.FAILED, step="git fetch origin", changed=False, version="v1", commit="f" * 40)
    assert same["unchanged"] == "nothing changed on h: it has v1 (fffffff)"
    switched = news(est.State.SUCCEEDED, kind=est.Kind.SWITCH, version="green", switched=True)
    assert (switched["event"], switched["title"]) == ("switched", "[h] switched: ✓ 완료 green")
    assert news(est.State.SUCCEEDED, kind=est.Kind.SWITCH)["event"] == "succeeded", "a dry run"
    assert switched["rollback"] is None
    good = est.news_of_job(RUN, replace(JOB, state=est.State.SUCCEEDED, version="v1"), b"a log", "abc")
    assert len(est.news_text("slack", good).splitlines()) == 2, "short, without a way back and the log"
    assert "a log" in est.news_text("slack", {**good, "event": "failed"})
    left = est.news_of_job(RUN, replace(JOB, state=est.State.SUCCEEDED, warnings=["left behind: 1 commit"]), b"")
    assert est.news_text("slack", left).splitlines()[1] == "⚠ left behind: 1 commit"
    rule = est.NotifyRule(url="http://x", on=("failed",))
    assert rule.wants("timeout") and rule.wants("failed") and not rule.wants("lost")


def test_the_readme_s_examples_are_valid() -> None:
    readme = (ROOT / "README.md").read_text("utf-8").split("\n## Notifications\n")[1]
    examples = readme.split("```toml\n")[1].split("```")[0]
    rules = est.parse_config(f'masterUrl = "ws://127.0.0.1:9900"\nwhitelist = []\n{examples}', "README", "toml").notify
    assert [rule.format for rule in rules] == ["slack", "discord", "telegram", "ntfy", "json"]
    events = readme.split("| event | when |")[1].split("\n\n")[0]
    assert {event for event in est.NOTIFY_EVENTS if f"`{event}`" in events} == set(est.NOTIFY_EVENTS)


def test_retry_after() -> None:
    now = 1_800_000_000.0
    date = format_datetime(datetime.fromtimestamp(now + 90, UTC), usegmt=True)
    asked = ["7", "0.5", date, "-3", "soon", "", "1e99", "nan"]
    assert [est.retry_after_s(text, now) for text in asked] == [7, 0.5, 90, 0, 0, 0, est.RETRY_AFTER_S, 0]


def config_file(tmp_path: Path, **more: Any) -> est.ConfigFile:
    path = tmp_path / "repo" / "config" / "updater.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"masterUrl": "ws://127.0.0.1:9900", "whitelist": [], **more}))
    state = est.StateFolder(tmp_path / "state")
    state.create()
    return est.ConfigFile(path, state)


def make_master(tmp_path: Path, **more: Any) -> tuple[est.Master, est.Notifier]:
    config = config_file(tmp_path, **more)
    notifier = est.Notifier(config.state, config, "127.0.0.1")
    return est.Master(config.state, config, "a" * 32, "n", "127.0.0.1", notifier.tell_of_job), notifier


def titles(notifier: est.Notifier) -> list[str]:
    paths = sorted(notifier.spool.folder.glob("*.json"), key=lambda path: path.stat().st_mtime_ns)
    return [json.loads(path.read_text())["title"] for path in paths]


def test_an_agent_that_stays_away_is_told_of_once(tmp_path: Path) -> None:
    """Over restarts of the master too, whose own absence counts for nobody's."""

    def look(seen_s: float, up_s: float) -> list[str]:
        rules = [{"url": f"http://127.0.0.1:{n}", "on": ["agent-offline"], "offlineMinutes": n} for n in (1, 30)]
        master, notifier = make_master(tmp_path, notify=rules)
        for number, forgotten in (("b", False), ("c", True)):
            known = est.Machine(number * 32, "127.0.0.2", number, seen=now - seen_s, forgotten=forgotten)
            master.registry.place(known)
        master.state.store.put(master.registry.file, master.registry.render())
        assert master.state.store.flush(10.0)
        master.registry.recover()
        master.began = time.monotonic() - up_s
        notifier.look_for_agents(master)
        return titles(notifier)

    now = time.time()
    assert look(7200, 30) == [] == look(30, 7200)
    told = look(7200, 600)
    assert told == ["[127.0.0.2] the agent is offline for 10 minutes"]
    assert look(7200, 90) == told
    assert len(look(7200, 3600)) == 2, "to whom only half an hour is worth a word"


def test_certificate_near_its_end(tmp_path: Path) -> None:
    need("openssl")
    cert = tmp_path / "cert.pem"
    argv = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-subj",
            "/CN=x", "-keyout", str(tmp_path / "key.pem"), "-out", str(cert), "-days"]  # fmt: skip

    async def look(days: int) -> list[str]:
        subprocess.run([*argv, str(days)], check=True, capture_output=True)
        rule = {"url": "http://127.0.0.1:1", "on": ["certificate"]}
        _, notifier = make_master(tmp_path, notify=[rule], tls={"cert": str(cert), "key": "x"})
        notifier.look_at_certificate()
        notifier.look_at_certificate()
        return titles(notifier)

    assert asyncio.run(look(30)) == []
    (title,) = asyncio.run(look(6))
    assert "cert.pem ends in 6 days" in title
    assert len(asyncio.run(look(2))) == 2


def test_failover_is_what_no_switch_explains(tmp_path: Path) -> None:
    async def look() -> list[str]:
        haproxy = {"host": "lb", "backend": "b"}
        rules = [{"url": "http://127.0.0.1:1", "on": ["failover"]}]
        master, notifier = make_master(tmp_path, notify=rules, haproxy=haproxy)
        said: list[Any] = []

        async def ask(what: str, args: dict[str, Any], deadline_s: float) -> dict[str, Any] | None:
            assert (what, args) == ("traffic", {"address": "127.0.0.1"})
            return {"active": said[-1], "servers": {}}

        master.registry.place(est.Machine("a" * 32, "127.0.0.1", "lb"))
        master.agents["a" * 32] = SimpleNamespace(ask=ask)  # type: ignore[assignment]
        for active in ("blue", "blue", None, "green", "green"):
            said.append(active)
            await notifier.look_at_traffic(master)
        assert titles(notifier) == ["[lb] the traffic went from blue to green without a switch"]
        order = est.run_of_job(replace(JOB, kind=est.Kind.SWITCH))
        ended = replace(JOB, kind=est.Kind.SWITCH, state=est.State.SUCCEEDED, ended=time.time(), switched=True)
        for to, then in (("blue", "blue"), ("green", "blue")):
            notifier.tell_of_job(est.Run(order, {}), replace(ended, version=to))
            said.append(then)
            await notifier.look_at_traffic(master)
            assert (len(titles(notifier)) == 1) == (to == then), "that was the switch, and what came at once was none"
        for active, end, age_s in (("green", est.State.FAILED, 0.0), ("blue", est.State.SUCCEEDED, 3600.0)):
            notifier.tell_of_job(est.Run(order, {}, age_s), replace(ended, state=end, version=None))
            said.append(active)
            await notifier.look_at_traffic(master)
            assert len(titles(notifier)) == 2, "one that failed half-way or was told late explains it too"
        _, later = make_master(tmp_path, notify=rules, haproxy=haproxy)
        said.append("green")
        await later.look_at_traffic(master)
        return titles(later)

    assert len(asyncio.run(look())) == 3, "also one that came while the master was away"


def test_old_news_is_no_news(tmp_path: Path) -> None:
    async def look() -> None:
        _, notifier = make_master(tmp_path, notify=[{"url": "http://127.0.0.1:1", "on": ["failed"]}])
        now = time.time()
        over = replace(JOB, state=est.State.LOST)
        for ended in (now - 2 * est.NEWS_S, now + 2 * est.NEWS_S):  # whatever clock its host has
            old = est.Run(RUN, {JOB.host: over}, 3 * est.NEWS_S)
            notifier.tell_of_job(old, replace(JOB, state=est.State.FAILED, ended=ended))
            assert titles(notifier) == []
        waited_for = est.Run(RUN, {JOB.host: JOB}, 3 * est.NEWS_S)
        run = est.Run(RUN, {JOB.host: over})
        notifier.tell_of_job(waited_for, replace(JOB, state=est.State.FAILED, ended=now - 200 * est.DAY_S))
        (path,) = notifier.spool.folder.glob("*.json")
        path.rename(path.with_suffix(".sent"))
        notifier.tell_of_job(run, replace(JOB, state=est.State.FAILED, ended=now))
        assert titles(notifier) == [], "a result that is reported again is not told again"
        for number in range(est.NEWS_KEPT + 3):
            notifier.tell_of_job(run, replace(JOB, host=f"h{number}", state=est.State.FAILED, ended=now))
        assert len(titles(notifier)) == est.NEWS_KEPT + 3
        (tmp_path / "state/notify/torn.00000000.json").write_text("{")
        for path in list(notifier.spool.folder.glob("*-h1-*.json")):
            os.utime(path, (notifier.spool.lived.now() - 2 * est.NEWS_S,) * 2)
        notifier.spool.receivers[est.receiver_id(notifier.spool.rules[0])] = est.Receiver(due=float("inf"))
        assert notifier.spool.send_due()
        assert len(list(notifier.spool.folder.glob("*-h*.json"))) == est.NEWS_KEPT
        assert not list(notifier.spool.folder.glob("*-h1-*.json"))

    asyncio.run(look())


def test_a_run_of_several_hosts_is_one_message(tmp_path: Path) -> None:
    """At its end, once, whoever reports again; a late word is a message of its own."""
    now, hook = time.time(), {"url": "http://127.0.0.1:1"}

    async def look() -> None:
        rules = [{**hook, "on": ["failed"]}, {**hook, "on": ["succeeded"]}, {**hook, "on": ["offline"]}]
        _, notifier = make_master(tmp_path, notify=[{**rule, "format": form} for rule, form in zip(
            rules, ("slack", "discord", "ntfy"), strict=True)])  # fmt: skip
        names = ["a", "b", "c"]
        record = replace(RUN, hosts=names, target="all", created=now, by="kim@h")
        jobs = {name: replace(JOB, host=name, started=now - 9, ended=now) for name in names}
        run = est.Run(record, jobs)

        def end(host: str, state: est.State, **more: Any) -> None:
            ended = replace(jobs[host], state=state, **more)
            notifier.tell_of_job(run, ended)
            assert len(titles(notifier)) in (0, 2), "nobody is told before the end"
            notifier.tell_of_job(run, ended)  # the master died before it had recorded it
            run.put(ended)

        end("b", est.State.SUCCEEDED, version="v2")
        end("a", est.State.FAILED, step="make", exit=3, began_command=True, commit="f" * 40, error="no disk")
        assert titles(notifier) == []
        end("c", est.State.LOST, error="no connection for 900 s", provisional=True)
        assert titles(notifier) == ["[all] 2 of 3 hosts did not succeed"] * 2, "who wants failures, and who successes"
        for path in notifier.spool.folder.glob("*.json"):
            path.rename(path.with_suffix(".sent"))
        notifier.tell_of_job(run, run.jobs["b"])
        assert titles(notifier) == []
        notifier.tell_of_job(run, replace(jobs["c"], state=est.State.SUCCEEDED, version="v2"))
        assert titles(notifier) == ["[c] ✓ 완료 v2"]

        whole = est.news_of_run(record, est.worst_of(run.jobs.values()), b"the log of a", ["a", "c"])
        assert (whole["event"], whole["host"], whole["step"]) == ("failed", "all", "make")
        assert [job["host"] for job in whole["hosts"]] == ["a", "c", "b"]
        assert est.news_text("ntfy", whole).splitlines() == [
            "[all] 2 of 3 hosts did not succeed",
            "[a] ✗ 실패 make (exit 3): no disk",
            "[c] ✗ 연결 끊김 (no connection for 900 s)",
            f"3 hosts, deploy master on all, by kim@h, 9.0 s, run {RUN.run}",
            "estelle-updater rollback a,c",
            "the end of a's log:",
            "",
            "| the log of a",
        ]
        many = [replace(run.jobs["a"], host=f"h{number}") for number in range(14)]
        lines = est.news_text("json", est.news_of_run(record, many, b"")).splitlines()
        assert lines[0] == "[all] 14 of 14 hosts did not succeed" and lines[11] == "and 4 more"

    asyncio.run(look())


def test_who_is_told_after_a_restart_that_finds_a_run_over(tmp_path: Path) -> None:
    """Its last host never answered: the others' message waited for it."""

    async def look() -> list[str]:
        master, notifier = make_master(tmp_path, notify=[{"url": "http://127.0.0.1:1", "on": ["failed"]}])
        created = time.time() - 1000
        record = replace(
            RUN, hosts=["a", "b"], machines={"a": "a" * 32, "b": "b" * 32}, created=created, nonce="n", target="all"
        )
        master.state.save_run(record)
        master.state.save_job(replace(JOB, host="a", state=est.State.FAILED, step="make", ended=time.time()))
        master.recover(est.Survey(master.state.history))
        return titles(notifier)

    assert asyncio.run(look()) == ["[all] 2 of 2 hosts did not succeed"]


def test_a_restart_takes_no_older_run_for_the_last_one(tmp_path: Path) -> None:
    """Of a run that still waits for another host, all that is known is recorded once more."""

    async def look() -> list[str]:
        master, _ = make_master(tmp_path)
        waits = replace(
            RUN, hosts=["a", "b"], machines={"a": "a" * 32, "b": "b" * 32}, created=time.time(), place=1, wait_s=9000.0
        )
        newer = replace(waits, run="20260710-101011-aaaa", hosts=["a"], machines={"a": "a" * 32}, place=2)
        for record, state in (waits, est.State.FAILED), (newer, est.State.SUCCEEDED):
            master.state.save_run(record)
            job = replace(JOB, run=record.run, host="a", machine="a" * 32, state=state, ended=time.time())
            master.state.save_job(job)
        master.recover(est.Survey(master.state.history))
        assert [run for run in master.ledger.runs if run == waits.run]
        return [master.registry.last["a" * 32][key] for key in ("run", "state")]

    assert asyncio.run(look()) == ["20260710-101011-aaaa", "succeeded"]


def test_trouble_in_telling_touches_no_result(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    async def look() -> None:
        _, notifier = make_master(tmp_path, notify=[{"url": "http://127.0.0.1:1", "on": ["failed"]}])
        notifier.spool.folder.rmdir()
        notifier.tell_of_job(est.Run(RUN, {}), replace(JOB, state=est.State.FAILED, ended=time.time()))

    asyncio.run(look())
    assert "can't tell of run" in capfd.readouterr().err


def test_check_names_the_file_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "none").write_text(f"ftp://{SECRET}")
    rules = [{"urlFile": str(tmp_path / "lacking")}, {"urlFile": str(tmp_path / "none")}, {"urlEnv": "LACKING"}]
    _, warnings = est.check_config(config_file(tmp_path, notify=rules).path)
    assert warnings[1:] == [
        f"notify[0]: can't read urlFile {tmp_path / 'lacking'}: No such file or directory; the master needs it",
        f"notify[1]: {tmp_path / 'none'} holds no http:// or https:// URL; the master needs it",
    ]
    for odd in ("", "x", f"https://user@{SECRET}/", f"http://a\n{SECRET}", f"http://a:{SECRET}/"):
        (tmp_path / "none").write_text(odd)
        problem, _ = est.post_news(est.NotifyRule(url_file=str(tmp_path / "none")), tmp_path, news(est.State.FAILED))
        assert problem and SECRET not in problem


@pytest.mark.parametrize("form", est.NEWS_BYTES)
def test_nothing_in_a_message_comes_alive(form: str) -> None:
    """Neither a link nor the end of the code block, from a log, an error or a branch's name."""
    links = "``` [x](http://evil.example/a) <https://evil.example> www.evil.example"
    hostile = ["`````", links, "a\n[127.0.0.3] ✓ 완료", "[127.0.0.3] ✓ 완료 v2", "# a title"]
    news = {"event": "failed", "host": "h", "title": "[h] ✗ HTTPS://evil.example ```", "error": "# x\n[i] ✓ 완료 v2"}
    text = est.news_text(form, {**news, "log": hostile, "detail": "by \u202ex"})
    fences = text.split("```")
    assert len(fences) == (3 if form in ("slack", "discord") else 1), text
    assert "://" not in text and "www.evil" not in text and "\u202e" not in text
    assert not [line for line in text.split("\n") if line.startswith(("[127.0.0.3]", "[i]", "#"))]


def test_a_test_message_says_what_each_receiver_answered(fleet: MakeFleet, receiver: Callable[..., Receiver]) -> None:
    """Also to who wants to hear of nothing that has happened; the URL stays a secret."""
    hooks, refuses = receiver(), receiver()
    refuses.answers = [(404, {})] * 2
    rules = [
        {"url": f"{hooks.url}/one", "format": "slack", "on": ["lost"]},
        {"url": f"{refuses.url}/{SECRET}", "format": "json"},
        {"urlEnv": "NO_SUCH_HOOK", "format": "ntfy"},
    ]
    one = fleet(hosts=1, config={"project": "yquant", "notify": rules})
    code, out, err = one.cli("notify", "test")
    assert (code, err) == (1, "")
    assert out.splitlines() == [
        "✓ slack at 127.0.0.1: it took the message",
        "✗ json at 127.0.0.1: HTTP 404",
        "✗ ntfy at the URL in $NO_SUCH_HOOK: NO_SUCH_HOOK holds no http:// or https:// URL",
    ]
    (body,) = hooks.bodies("/one")
    assert json.loads(body)["text"].startswith("yquant [127.0.0.1] a test message: notifications arrive\nby ")
    code, out, _ = one.cli("notify", "test", "--json")
    assert (code, [row["ok"] for row in json.loads(out)["receivers"]], SECRET in out) == (
        1,
        [True, False, False],
        False,
    )
    assert not spooled(one), "it is not tried again"
