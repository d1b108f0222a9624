"""`mcp`: both eras of the protocol by the official clients, what no client says on purpose, and what a model may do."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, strategies as st

from tests import seam as est
from tests.commands import COMMAND as SCRIPT, GATED, STEP, job_of, log_of, open_gate, wait_state, write_script
from tests.fleet import PROGRAM, ROOT, Fleet, clean_env, unavailable, wait_for
from tests.haproxy import Proxy
from tests.test_release import Round

MakeFleet = Callable[..., Fleet]
META = {"io.modelcontextprotocol/protocolVersion": "2026-07-28", "io.modelcontextprotocol/clientCapabilities": {}}
CLIENT = Path(__file__).with_name("mcp_client.py")


# ---------------------------------------------------------------------------- the session, without any process


def session(older: str = "") -> est.McpSession:
    made = est.McpSession([tool.render() for tool in est.TOOLS], "Look first.", "1.2.3")
    made.older = older
    return made


def feed(one: est.McpSession, **message: Any) -> dict[str, Any]:
    """The answer to a request."""
    answers, calls, ended = one.feed(json.dumps({"jsonrpc": "2.0", "id": 1, **message}).encode())
    assert len(answers) == 1 and not calls and not ended
    answer: dict[str, Any] = answers[0]
    return answer


def test_today_s_clients_discover_and_carry_their_version_with_every_request() -> None:
    one = session()
    result = feed(one, method="server/discover", params={"_meta": META})["result"]
    assert (result["supportedVersions"], result["resultType"]) == (["2026-07-28"], "complete")
    assert result["capabilities"] == {"tools": {}} and result["serverInfo"]["name"] == "estelle-updater"
    assert result["_meta"]["io.modelcontextprotocol/serverInfo"]["version"] == "1.2.3"
    listed = feed(one, method="tools/list", params={"_meta": META})["result"]
    assert listed["ttlMs"] >= 0 and listed["cacheScope"] == "private" and len(listed["tools"]) == len(est.TOOLS)
    assert feed(one, method="tools/list")["error"]["code"] == -32602, "no handshake, so every request needs it"
    for method in ("server/discover", "tools/list", "ping", "logging/setLevel", "no/such"):
        meta = {"_meta": {**META, "io.modelcontextprotocol/protocolVersion": "2030-01-01"}}
        error = feed(one, method=method, params=meta)["error"]
        assert (error["code"], error["data"]) == (-32022, {"supported": ["2026-07-28"], "requested": "2030-01-01"})
    for method in ("ping", "logging/setLevel", "no/such"):
        assert feed(one, method=method, params={"_meta": META})["error"]["code"] == -32601
    half = {"io.modelcontextprotocol/protocolVersion": "2026-07-28"}
    assert feed(one, method="tools/list", params={"_meta": half})["error"]["code"] == -32602


@pytest.mark.parametrize(
    ("asked", "answered"), [(v, v) for v in est.MCP_OLDER] + [("2026-07-28", "2025-11-25"), ("x", "2025-11-25")]
)
def test_older_clients_shake_hands(asked: str, answered: str) -> None:
    one = session()
    assert feed(one, method="tools/list")["error"]["code"] == -32602
    assert feed(one, method="ping")["result"] == {}
    result = feed(one, method="initialize", params={"protocolVersion": asked, "capabilities": {}})["result"]
    assert result["protocolVersion"] == answered and result["serverInfo"] and "resultType" not in result
    assert one.feed(b'{"jsonrpc":"2.0","method":"notifications/initialized"}') == ([], [], [])
    listed = feed(one, method="tools/list")["result"]
    assert list(listed) == ["tools"]
    assert feed(one, method="initialize", params={})["error"]["code"] == -32602


def test_batches_are_for_the_one_revision_that_has_them() -> None:
    batch = json.dumps([{"jsonrpc": "2.0", "id": n, "method": "ping"} for n in (1, 2)]).encode()
    [answers] = session("2025-03-26").feed(batch)[0]
    assert [answer["id"] for answer in answers] == [1, 2], "one array"
    one = session("2025-03-26")
    calls = [{"jsonrpc": "2.0", "id": n, "method": "tools/call", "params": {"name": "status"}} for n in (1, 2)]
    nothing, begun, _ = one.feed(json.dumps([*calls, {"jsonrpc": "2.0", "id": 3, "method": "ping"}]).encode())
    assert nothing == [] and [each.id for each in begun] == [1, 2]
    assert one.finish(begun[1], {}, False) is None, "the array waits for the last"
    whole = one.finish(begun[0], {}, False)
    assert [answer["id"] for answer in whole] == [3, 2, 1]
    _, begun, _ = one.feed(json.dumps(calls).encode())
    one.feed(b'{"jsonrpc":"2.0","method":"notifications/cancelled","params":{"requestId":1}}')
    assert [answer["id"] for answer in one.finish(begun[1], {}, False)] == [2], "and not for one that is given up"
    for older in ("", "2025-11-25"):
        assert [answer["error"]["code"] for answer in session(older).feed(batch)[0]] == [-32600]
    assert session("2025-03-26").feed(b"[]")[0][0]["error"]["code"] == -32600


@pytest.mark.parametrize(
    ("line", "code"),
    [
        (b"\xff\xfe", -32700),
        (b"{", -32700),
        (b"[" * 100_000, -32700),
        (b'{"jsonrpc":"2.0","id":1,"method":"ping","params":{"x":NaN}}', -32700),
        (b"1" * 10_000, -32700),
        (b"null", -32600),
        (b'"ping"', -32600),
        (b'{"id":1,"method":"ping"}', -32600),
        (b'{"jsonrpc":"1.0","id":1,"method":"ping"}', -32600),
        (b'{"jsonrpc":"2.0","id":1}', -32600),
        (b'{"jsonrpc":"2.0","id":1,"method":5}', -32600),
        (b'{"jsonrpc":"2.0","id":1,"method":"ping","params":[1]}', -32600),
        (b'{"jsonrpc":"2.0","id":null,"method":"ping"}', -32600),
        (b'{"jsonrpc":"2.0","id":true,"method":"ping"}', -32600),
        (b'{"jsonrpc":"2.0","id":1.5,"method":"ping"}', -32600),
        (b'{"jsonrpc":"2.0","id":{},"method":"ping"}', -32600),
        (b'{"jsonrpc":"2.0","id":1,"method":"initialize","params":{"protocolVersion":7}}', -32602),
        (b'{"jsonrpc":"2.0","id":1,"method":"tools/list","params":{"_meta":[]}}', -32602),
    ],
)
def test_what_is_no_request_is_answered_by_its_code(line: bytes, code: int) -> None:
    [answer] = session().feed(line)[0]
    assert answer["error"]["code"] == code and answer["error"]["message"] and answer["jsonrpc"] == "2.0"


@pytest.mark.parametrize("line", [
    b'{"jsonrpc":"2.0","id":1,"result":{}}', b'{"jsonrpc":"2.0","method":"notifications/cancelled"}',
    b'{"jsonrpc":"2.0","method":"notifications/cancelled","params":{"requestId":[]}}',
    b'{"jsonrpc":"2.0","method":"notifications/cancelled","params":{"requestId":9}}',
    b'{"jsonrpc":"2.0","method":"notifications/roots/list_changed"}',
])  # fmt: skip
def test_what_needs_no_answer_gets_none(line: bytes) -> None:
    assert session().feed(line) == ([], [], [])


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(st.sampled_from(["jsonrpc", "id", "method", "params", "x"]), JSON) | JSON, st.binary(max_size=9))
def test_no_line_ends_the_session(message: Any, garbage: bytes) -> None:
    for older in ("", *est.MCP_OLDER):
        one = session(older)
        one.feed(garbage)
        answers = one.feed(json.dumps(message).encode())[0]
        for answer in answers[0] if answers and isinstance(answers[0], list) else answers:
            assert json.loads(json.dumps(answer))["jsonrpc"] == "2.0" and len({"result", "error"} & set(answer)) == 1


def call(tool: str, arguments: Any, number: int = 1) -> dict[str, Any]:
    return {"id": number, "method": "tools/call", "params": {"name": tool, "arguments": arguments, "_meta": META}}


@pytest.mark.parametrize(
    ("tool", "arguments", "said"),
    [
        ("update", {}, ["target is missing", "branch is missing"]),
        ("update", [], ["arguments must be of type object"]),
        ("update", {"target": 1, "branch": None}, ["target must be of type string, not 1"]),
        ("update", {"target": "all", "branch": None}, ["branch is missing: a branch, a tag or a full commit id"]),
        ("update", {"target": "all", "branch": " "}, ["branch is missing"]),
        ("update", {"target": "all", "branch": "b", "forced": 1}, ['there is no "forced"; known are target, branch']),
        ("update", {"target": "", "branch": "b"}, ["target is empty"]),
        ("update", {"target": "all", "branch": "b", "plan": ""}, ["plan is empty"]),
        ("rollback", {"target": " "}, ["target is empty"]),
        ("history", {"count": 1.5}, ["count must be of type integer, not 1.5"]),
        ("update", {"target": "all", "branch": "b", "wait": "no"}, ["wait must be of type boolean"]),
        ("update", {"target": "all", "branch": "b" * 2001}, ["at most 2000 characters, not 2001"]),
        ("history", {"count": 0}, ["count must be from 1 to 100, not 0"]),
        ("history", {"count": True}, ["count must be of type integer"]),
        ("logs", {"run": "../x"}, ['run can\'t be "../x"']),
        ("switch", {"color": "red"}, ["color must be one of blue, green, standby"]),
    ],
)
def test_a_bad_argument_is_a_result_that_says_what_to_do(tool: str, arguments: Any, said: list[str]) -> None:
    result = feed(session(), **call(tool, arguments))["result"]
    assert result["isError"] and all(text in result["content"][0]["text"] for text in said), result


def test_calls_are_answered_once_or_given_up() -> None:
    one = session()
    line = json.dumps({"jsonrpc": "2.0", **call("status", None)}).encode()
    [begun] = one.feed(line)[1]
    assert (begun.tool, begun.token, begun.modern) == ("status", None, True)
    assert one.feed(line)[0][0]["error"]["code"] == -32600, "its id is in use"
    cancel = b'{"jsonrpc":"2.0","method":"notifications/cancelled","params":{"requestId":1}}'
    assert one.feed(cancel) == ([], [], [1])
    assert one.finish(begun, {}, False) is None, "nobody waits for it any more"
    [second] = one.feed(line)[1]
    assert one.finish(begun, {}, False) is None, "nor does it answer a later call of the same id"
    answer = one.finish(second, {"hosts": []}, False)
    assert answer and answer["result"]["structuredContent"] == {"hosts": []} and not answer["result"]["isError"]
    assert feed(one, **call("no-such", {}))["error"]["data"] == [tool.name for tool in est.TOOLS]


def test_a_yes_is_for_the_question_that_was_shown() -> None:
    """Ids of calls may be alike, as `1` and `"1"`, or be used again: a person's answer goes to no other call."""
    one = session("2025-06-18")
    told: list[tuple[str, Any]] = []

    def ask(number: Any, what: str) -> tuple[est.ToolCall, str]:
        line = {"jsonrpc": "2.0", "id": number, "method": "tools/call", "params": {"name": "status"}}
        [begun] = one.feed(json.dumps(line).encode())[1]
        return begun, one.questions.ask(begun, what, lambda reply: told.append((what, reply)))["id"]

    def reply(number: str) -> None:
        assert one.feed(json.dumps({"jsonrpc": "2.0", "id": number, "result": {"action": "accept"}}).encode()) == (
            [],
            [],
            [],
        )

    first, few = ask(1, "one host?")
    _, all_of_them = ask("1", "all hosts?")
    assert few != all_of_them
    reply(few)
    assert told == [("one host?", {"action": "accept"})]
    reply(few)
    assert len(told) == 1, "once"
    assert one.finish(first, {}, False)

    _, given_up = ask(1, "one host?")
    cancel = b'{"jsonrpc":"2.0","method":"notifications/cancelled","params":{"requestId":1}}'
    assert one.feed(cancel)[2] == [1]
    _, later = ask(1, "all hosts?")
    reply(given_up)
    assert len(told) == 1, "the answer to a call that was given up is nobody's"
    reply(later)
    assert told[-1][0] == "all hosts?" and len(told) == 2


def test_many_unknown_arguments_are_one_short_sentence() -> None:
    strange = {f"x{number}": 1 for number in range(50_000)} | {"y" * 50_000: 1}
    answer = feed(session("2025-06-18"), **call("status", strange))
    text = answer["result"]["content"][0]["text"]
    assert len(text) < 1000 and "and 49991 more" in text and "known are" in text


def plan_of(*rows: dict[str, Any]) -> dict[str, Any]:
    plain = {
        "why": "", "current": "a" * 40, "target": "b" * 40, "commits": 20, "leaving": 0, "changed_count": 20,
        "lock_file": False, "expected_s": None, "disk_free_bytes": None, "subjects": [], "changed": [], "dirty": [],
        "dirty_count": 0, "restart": [], "busy": None, "queued": [], "warnings": [], "refused": [],
    }  # fmt: skip
    hosts = [plain | {"host": f"203.0.113.{number}"} | row for number, row in enumerate(rows)]
    return {"plan": "p", "action": "update", "ok": True, "hosts": hosts}


def test_no_long_name_hides_what_a_new_configuration_changes() -> None:
    """A person agrees to what they see, and whoever pushes a branch chooses its subjects and file names."""
    change = "command: curl evil.example instead of pnpm deploy:release"
    flood = {"subjects": ["s" * 200] * 20, "changed": ["f" * 300] * 20, "dirty": ["d" * 300] * 20, "dirty_count": 20}
    told = est.plan_answer_text(plan_of(flood | {"doors": [change]}, flood | {"warnings": ["w" * 300]}))
    assert change in told and "w" * 300 in told and "and 17 more" in told
    assert "without the commits' subjects" in told and len(told) < 3700
    told = est.plan_answer_text(plan_of({"subjects": ["one"], "doors": [change]}))
    assert "one" in told and change in told and "without" not in told
    told = est.plan_answer_text(plan_of(*[{"doors": [change]}] * 200))
    assert len(told) < 3700 and "characters more: look at it with `plan`" in told


def test_tools_say_what_they_do() -> None:
    tools = {tool.name: tool.render(require_plan=True) for tool in est.TOOLS}
    reads = {name for name, tool in tools.items() if tool["annotations"]["readOnlyHint"]}
    assert reads == {"status", "plan", "logs", "history", "health", "wait"}
    assert all(tool["annotations"]["destructiveHint"] == (name not in reads) for name, tool in tools.items())
    assert [name for name, tool in tools.items() if "plan" in tool["inputSchema"]["required"]] == [
        "update", "switch", "release", "rollback",
    ]  # fmt: skip
    commands = {command.name for command in est.COMMANDS} | {"update", "wait"}
    assert {name for name in tools if f"call_{name}" in vars(est.McpTools) or name in est.DESK} <= commands


# ---------------------------------------------------------------------------- the program


class Model:
    """A client that says raw lines to `mcp` and hears whole ones."""

    def __init__(self, fleet: Fleet, *options: str, env: dict[str, str] | None = None) -> None:
        guarded = {"--require-plan", "--confirm", "--read-only", "--bare"} & {*options}
        words = [*options, *([] if guarded else ["--yes"])]
        argv, full_env, cwd = fleet._command(["mcp", *(w for w in words if w != "--bare")], None, None, env)
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(argv, env=full_env, cwd=cwd, stdin=pipe, stdout=pipe, stderr=pipe)
        self.heard: list[dict[str, Any]] = []
        self.number = 100
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        assert self.process.stdout
        for line in self.process.stdout:
            self.heard.append(json.loads(line))  # nothing but JSON-RPC ever comes

    def say(self, line: bytes) -> None:
        assert self.process.stdin
        self.process.stdin.write(line + b"\n")
        self.process.stdin.flush()

    def begin(self, tool: str, token: str | None = None, **arguments: Any) -> int:
        self.number += 1
        message = call(tool, arguments, self.number)
        if token:
            message["params"]["_meta"] = {**META, "progressToken": token}
        self.say(json.dumps({"jsonrpc": "2.0", **message}).encode())
        return self.number

    def answer(self, number: int) -> dict[str, Any]:
        def found() -> dict[str, Any]:
            return next((message for message in self.heard if message.get("id") == number), {})

        return wait_for(found, lambda: f"an answer to {number}: {self.heard[-3:]}", 40)

    def call(self, tool: str, **arguments: Any) -> dict[str, Any]:
        """A tool's result."""
        result: dict[str, Any] = self.answer(self.begin(tool, **arguments))["result"]
        return result

    def error(self, tool: str, **arguments: Any) -> str:
        result = self.call(tool, **arguments)
        assert result["isError"], result
        return str(result["content"][0]["text"])

    def progress(self, token: str) -> list[str]:
        notes = [m["params"] for m in list(self.heard) if m.get("method") == "notifications/progress"]
        assert [note["progress"] for note in notes] == sorted({note["progress"] for note in notes}), "it rises"
        return [note["message"] for note in notes if note["progressToken"] == token]

    def end(self) -> str:
        """Close its standard input: it ends by itself; what it wrote to standard error."""
        assert self.process.stdin and self.process.stderr
        self.process.stdin.close()
        assert self.process.wait(20) == 0
        return self.process.stderr.read().decode()


@pytest.fixture
def model() -> Iterator[Callable[..., Model]]:
    made: list[Model] = []

    def make(fleet: Fleet, *options: str, **more: Any) -> Model:
        made.append(Model(fleet, *options, **more))
        return made[-1]

    yield make
    for one in made:
        one.process.kill()
        for pipe in (one.process.stdin, one.process.stdout, one.process.stderr):
            with suppress(OSError, ValueError):
                pipe.close()  # type: ignore[union-attr]
        one.process.wait()


def test_a_model_deploys_watches_leaves_and_cancels(fleet: MakeFleet, model: Callable[..., Model]) -> None:
    one = fleet(hosts=2, command=SCRIPT)
    master, agent = one.hosts
    write_script("echo ok; printf '\\033[31mred\\033[0m\\n'\n", master)
    write_script(GATED, agent)
    client = model(one)

    watched = client.begin("update", "t1", target="all", branch="master")
    for line in ("begun", "[127.0.0.1] red"):  # plain text
        wait_for(lambda: any(line in text for text in client.progress("t1")), "a line arrives while it runs")  # noqa: B023
    run = str(client.call("history", count=1)["structuredContent"]["runs"][0]["run"])
    logs = client.call("logs", run=run, target=agent.address)["structuredContent"]
    assert logs["hosts"][0]["state"] == "running" and logs["hosts"][0]["text"].endswith("begun\n") and not logs["done"]
    cursor = logs["cursor"]
    assert (
        client.call("logs", run=run, target=agent.address, cursor=cursor)["structuredContent"]["hosts"][0]["text"] == ""
    )
    waiting = client.begin("logs", run=run, cursor=cursor, target=agent.address, wait_s=30)
    cancelled = json.dumps({"jsonrpc": "2.0", "method": "notifications/cancelled", "params": {"requestId": watched}})
    client.say(cancelled.encode())
    client.say(b'{"jsonrpc":"2.0","id":900,"method":"ping"}')
    client.answer(900)  # and so the line before it was taken
    open_gate(agent)
    assert "ended\n" in client.answer(waiting)["result"]["structuredContent"]["hosts"][0]["text"]
    wait_state(one, run, agent, "succeeded")
    assert not any(message.get("id") == watched for message in client.heard), "no answer after a cancellation"
    assert not any("ended" in text for text in client.progress("t1")), "and no more progress"

    write_script("echo begun; sleep 86400\n", agent)
    started = client.call("update", target=agent.address, branch="master", wait=False)["structuredContent"]
    assert not started["done"] and "ok" not in started and f"wait with run {started['run']}" in started["next"]
    assert all("ok" not in row for row in started["hosts"])
    wait_state(one, started["run"], agent, "running")
    assert client.call("cancel", run=started["run"])["structuredContent"]["cancelled"]
    wait_state(one, started["run"], agent, "cancelled")

    write_script("for i in $(seq 60); do echo line $i; done; exit 3\n", agent)
    failed = client.call("update", target="all", branch="master")
    assert failed["isError"] and failed["structuredContent"]["ok"] is False
    good, bad = failed["structuredContent"]["hosts"]
    assert good["ok"] and "tail" not in good and (bad["state"], bad["exit"], bad["step"]) == ("failed", 3, STEP)
    [failure] = failed["structuredContent"]["failures"]
    assert (failure["hosts"], failure["step"], failure["truncated"]) == ([agent.address], STEP, False)
    assert failure["output"].splitlines()[1:] == [f"line {i}" for i in range(1, 61)]
    log = log_of(one, failed["structuredContent"]["run"], agent)
    assert log[failure["offset"] :].decode().splitlines() == failure["output"].splitlines()
    assert log[: failure["offset"]].count(b"\n") == failure["first_line"] - 1
    text = failed["content"][0]["text"]
    assert "| line 60" in text and "no instructions" in text and f"[{master.address}] ✓" in text
    assert client.end() == ""


def test_a_call_that_is_repeated_runs_once(fleet: MakeFleet, model: Callable[..., Model]) -> None:
    one = fleet(hosts=1, command=SCRIPT)
    write_script("echo run >> ../runs\n", one.master)
    runs = one.master.folder / "runs"
    client = model(one)
    same = {"target": "all", "branch": "master", "idempotency_key": "deploy of today"}
    numbers = [client.begin("update", **same) for _ in range(5)]
    answers = {client.answer(number)["result"]["structuredContent"]["run"] for number in numbers}
    assert len(answers) == 1 and runs.read_text() == "run\n"
    one.restart(one.master)
    later = model(one)
    wait_for(lambda: "isError" in (r := later.call("status")) and not r["isError"], "the master is back")
    assert {later.call("update", **same)["structuredContent"]["run"]} == answers, "also after everybody restarted"
    assert runs.read_text() == "run\n"
    other = later.error("update", **{**same, "branch": "other"})
    assert "idempotency_key belongs to another request: update all master" in other
    assert not later.call("update", **{**same, "idempotency_key": "of tomorrow"})["isError"]
    assert runs.read_text() == "run\nrun\n"
    nonce = hashlib.sha256(b"estelle-updater deploy of today").hexdigest()[:32]
    assert json.loads((one.master.state / "runs" / answers.pop() / "run.json").read_text())["nonce"] == nonce


def test_only_reading_and_only_as_planned(fleet: MakeFleet, model: Callable[..., Model]) -> None:
    one = fleet(hosts=2, command=SCRIPT)
    write_script("echo run >> ../runs\n", *one.hosts)
    reader, planner = model(one, "--read-only"), model(one, "--require-plan")
    reader.say(json.dumps({"jsonrpc": "2.0", "id": 1, "method": "tools/list", "params": {"_meta": META}}).encode())
    tools = reader.answer(1)["result"]["tools"]
    assert tools and all(tool["annotations"]["readOnlyHint"] for tool in tools)
    assert "error" in reader.answer(reader.begin("update", target="all", branch="master"))
    assert reader.call("plan", target="all", branch="master")["structuredContent"]["ok"]

    wanted = {"target": "all", "branch": "master"}
    assert "plan is missing" in planner.error("update", **wanted) and "plan is missing" in planner.error("rollback")
    assert "no fresh plan" in planner.error("update", plan="0123456789abcdef", **wanted)
    plan = planner.call("plan", **wanted)["structuredContent"]["plan"]
    assert "is for something else" in planner.error("update", plan=plan, target="127.0.0.1", branch="master")
    second = one.origin.commit({"a.txt": "1"})
    said = planner.error("update", plan=plan, **wanted)
    assert "no longer true on 127.0.0.1, 127.0.0.2" in said and "exit: 5" in said
    assert not (one.master.folder / "runs").exists(), "nothing was done so far"
    plan = planner.call("plan", **wanted)["structuredContent"]["plan"]
    done = planner.call("update", plan=plan, idempotency_key="k", **wanted)
    assert not done["isError"] and done["structuredContent"]["hosts"][0]["commit"] == second
    assert (
        planner.call("update", plan=plan, idempotency_key="k", **wanted)["structuredContent"]
        == done["structuredContent"]
    )
    assert "was used already" in planner.error("update", plan=plan, **wanted), "a plan is good for one order"

    third = one.origin.commit({"a.txt": "2"})
    plan = planner.call("plan", **wanted)["structuredContent"]["plan"]
    assert planner.call("update", plan=plan, **wanted)["structuredContent"]["hosts"][1]["commit"] == third
    back = planner.call("plan", action="rollback")["structuredContent"]
    assert [row["target"] for row in back["hosts"]] == [second, second] and "run" in back["hosts"][0]["why"]
    rolled = planner.call("rollback", plan=back["plan"])
    assert rolled["structuredContent"]["kind"] == "rollback" and rolled["structuredContent"]["ok"], rolled
    assert [job_of(one, rolled["structuredContent"]["run"], host)["commit"] for host in one.hosts] == [second, second]
    assert planner.end() == "" and reader.end() == ""


def test_a_model_does_the_blue_green_round(
    fleet: MakeFleet, model: Callable[..., Model], tmp_path_factory: pytest.TempPathFactory
) -> None:
    with closing(Proxy(tmp_path_factory.mktemp("haproxy")).start()) as proxy:
        one = Round(proxy, fleet)
        client = model(one.fleet, "--require-plan")
        health = client.call("health")["structuredContent"]
        assert health["ok"] and {row["host"] for row in health["checks"]} >= {"127.0.0.2", "127.0.0.3"}
        wanted = {"target": "standby", "branch": "master"}
        old = client.call("plan", **wanted)["structuredContent"]
        assert [row["host"] for row in old["hosts"]] == ["127.0.0.3"], "green is the standby"
        commit = one.commit("1")
        assert "no longer true on 127.0.0.3" in client.error("release", branch="master", plan=old["plan"])
        plan = client.call("plan", **wanted)["structuredContent"]["plan"]
        release = {"branch": "master", "plan": plan, "idempotency_key": "release 1"}
        released = client.call("release", **release)["structuredContent"]
        assert released["ok"] and released["kind"] == "switch" and proxy.answers() == "green", released
        deployed = job_of(one.fleet, released["deployed"], one.green)
        assert (deployed["commit"], deployed["state"]) == (commit, "succeeded")
        assert client.call("release", **release)["structuredContent"] == released and proxy.answers() == "green"

        back = client.call("plan", action="switch", color="standby")["structuredContent"]
        assert {row["host"]: row["traffic"] for row in back["hosts"]} == {"127.0.0.2": "standby", "127.0.0.3": "active"}
        wrong = client.error("switch", color="blue", plan=back["plan"])
        assert "is for something else" in wrong and proxy.answers() == "green"
        tried = client.call("switch", color="standby", dry_run=True, plan=back["plan"])["structuredContent"]
        assert tried["ok"] and "backup" in tried["output"] and proxy.answers() == "green"
        assert client.call("switch", color="standby", plan=back["plan"])["structuredContent"]["ok"]
        assert proxy.answers() == "blue"
        assert "was used already" in client.error("switch", color="standby", plan=back["plan"])
        assert proxy.answers() == "blue"
        (one.green.folder / "sick").touch()
        refused = client.call("plan", action="switch", color="green")["structuredContent"]
        assert not refused["ok"] and "is not healthy" in refused["hosts"][0]["refused"][0]
        sick = client.error("switch", color="green", plan=refused["plan"])
        assert "is not healthy" in sick and "exit: 5" in sick and proxy.answers() == "blue"


def test_a_release_that_was_interrupted_is_gone_on_with(
    fleet: MakeFleet, model: Callable[..., Model], tmp_path_factory: pytest.TempPathFactory
) -> None:
    """By the key that its answer names, and never with what it did not deploy and check."""
    with closing(Proxy(tmp_path_factory.mktemp("haproxy")).start()) as proxy:
        one = Round(proxy, fleet)
        write_script(GATED, one.blue, one.green)
        one.commit("1")
        gone = model(one.fleet)
        number = gone.begin("release", "t", branch="master")
        wait_for(lambda: any("begun" in text for text in gone.progress("t")), "it deploys")
        assert gone.end() == ""
        ended = gone.answer(number)["result"]["structuredContent"]
        again = {"branch": "master", "idempotency_key": ended["idempotency_key"]}
        assert (ended["done"], "ok" in ended, again["idempotency_key"] in ended["next"]) == (False, False, True)
        client = model(one.fleet)
        early = client.call("release", **again, wait_s=0)["structuredContent"]
        assert (early["run"], early["done"], proxy.answers()) == (ended["run"], False, "blue")
        open_gate(one.blue, one.green)
        released = client.call("release", **again)["structuredContent"]
        assert released["ok"] and (released["kind"], released["deployed"]) == ("switch", ended["run"])
        assert proxy.answers() == "green" and len(one.fleet.runs()) == 2, "each run once"

        # the standby falls ill behind the deployment, and gets another commit while nobody looks
        write_script("echo fine\n", one.blue)
        (one.blue.folder / "sick").touch()
        one.commit("2")
        half = client.call("release", branch="master", wait_s=2)["structuredContent"]
        assert half["done"] is False and "ok" not in half and "call release again" in half["next"], half
        one.commit("3")
        assert one.cli("trigger", "standby", "master").code == 0
        (one.blue.folder / "sick").unlink()
        refused = client.error("release", branch="master", idempotency_key=half["idempotency_key"])
        assert proxy.answers() == "green" and "exit: 5" in refused, refused
        assert "goes on" not in refused, "nothing does"
        assert client.end() == ""


def test_a_broken_master_and_garbage_are_answers(fleet: MakeFleet, model: Callable[..., Model]) -> None:
    one = fleet(hosts=1, start=False, command=SCRIPT)
    write_script(GATED, one.master)
    client = model(one)
    said = client.error("status")
    assert "can't reach the master" in said and "exit: 3" in said and "hint: " in said
    client.say(b'{"jsonrpc":"2.0","id":7,"method":"ping","params":{"x":"' + b"y" * (6 << 20) + b'"}}')
    client.say(b"\x00\xffgarbage\n\n   \n")
    client.say(b'{"jsonrpc":"2.0","id":8,"method":"ping"}')
    assert client.answer(8)["result"] == {}
    refused = [(m["id"], m["error"]["code"]) for m in client.heard if "error" in m]
    assert refused == [(7, -32600), (None, -32700)], "what is too long is answered under its id"
    one.start()
    watched = client.begin("update", "t", target="all", branch="master")
    wait_for(lambda: any("begun" in text for text in client.progress("t")), "it runs")
    one.kill(one.master)
    wait_for(lambda: any("reconnecting" in text for text in client.progress("t")), "the model hears of it")
    one.start()
    open_gate(one.master)
    assert client.answer(watched)["result"]["structuredContent"]["ok"]
    lines = b"".join(text.encode() for text in client.progress("t"))
    run = str(client.call("history")["structuredContent"]["runs"][0]["run"])
    assert lines.count(b"begun") == 1 and b"ended" in log_of(one, run, one.master)
    config = one.master.config.read_text()
    one.master.config.write_text("{")
    told = client.call("status")
    assert not told["isError"], "the commit that mends it has to be ordered too"
    assert "the last valid settings of this host are used\n" in told["content"][0]["text"], (
        "a broken configuration is told"
    )
    [kept] = one.master.state.glob("last-config-*.json")
    kept.rename(kept.with_name("last-config-00000000.json"))
    assert "exit: 2" in client.error("status"), "that of another project in this folder is none of this one's"
    kept.with_name("last-config-00000000.json").unlink()
    one.master.config.write_text(config)
    mended = client.call("status")
    assert not mended["isError"] and "last valid" not in mended["content"][0]["text"], "its repair takes effect"
    assert client.end() == ""


def test_a_call_given_up_in_the_batch_that_begins_it(fleet: MakeFleet, model: Callable[..., Model]) -> None:
    one = model(fleet(hosts=1, start=False))
    params = {"protocolVersion": "2025-03-26", "capabilities": {}, "clientInfo": {"name": "x", "version": "1"}}
    one.say(json.dumps({"jsonrpc": "2.0", "id": 1, "method": "initialize", "params": params}).encode())
    begun = {"jsonrpc": "2.0", "id": 2, "method": "tools/call", "params": {"name": "status"}}
    given_up = {"jsonrpc": "2.0", "method": "notifications/cancelled", "params": {"requestId": 2}}
    one.say(json.dumps([begun, given_up]).encode())
    one.say(b'{"jsonrpc":"2.0","id":3,"method":"ping"}')
    assert "result" in one.answer(3)
    assert "Traceback" not in one.end()


def test_mcp_ends_quietly_when_its_client_dies(fleet: MakeFleet, model: Callable[..., Model]) -> None:
    one = fleet(hosts=1, command=SCRIPT)
    write_script(GATED, one.master)
    client = model(one)
    client.begin("update", "t", target="all", branch="master")
    wait_for(lambda: any("begun" in text for text in client.progress("t")), "it runs")
    assert client.end() == ""
    open_gate(one.master)
    run = one.runs()[0].name
    assert wait_state(one, run, one.master, "succeeded"), "watching is not owning"


# ---------------------------------------------------------------------------- the official clients


@pytest.mark.parametrize(("package", "mode"), [("1", "initialize"), ("2", "auto")])
def test_the_official_client(fleet: MakeFleet, package: str, mode: str) -> None:
    folder = Path(os.environ.get("ESTELLE_TEST_MCP", "/nonexistent")) / package
    if not (folder / "mcp").is_dir():
        unavailable(f"the official MCP client {package}.x is not installed (tests/run does it)")
    one = fleet(hosts=2, command=SCRIPT)
    write_script("for i in 1 2 3; do seq 400; done\n", *one.hosts)
    argv, env, cwd = one._command(["mcp", "--yes"], None, None, {"PYTHONPATH": str(folder)})
    done = subprocess.run(
        [sys.executable, str(CLIENT), mode, "master", *argv],
        env=env, cwd=cwd, capture_output=True, timeout=90, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr.decode()
    said = json.loads(done.stdout)

    names = [tool["name"] for tool in said["tools"]]
    assert {"update", "status", "plan", "logs", "history", "cancel", "rollback"} <= set(names)
    assert all(tool["outputSchema"]["type"] == "object" and tool["annotations"] for tool in said["tools"])
    plan, update = said["plan"]["structuredContent"], said["update"]["structuredContent"]
    assert plan["ok"] and [row["host"] for row in plan["hosts"]] == ["127.0.0.1", "127.0.0.2"]
    assert update["ok"] and not said["update"].get("isError")
    assert [(row["host"], row["state"]) for row in update["hosts"]] == [
        ("127.0.0.1", "succeeded"), ("127.0.0.2", "succeeded"),
    ]  # fmt: skip
    assert said["again"]["structuredContent"] == update and len(one.runs()) == 1
    progress = "\n".join(said["progress"])
    assert "[127.0.0.2] git pull origin master..." in progress and "✓ 완료" in progress
    assert len(said["logs"]) > 1
    for host in one.hosts:
        texts = [
            r["text"] for part in said["logs"] for r in part["structuredContent"]["hosts"] if r["host"] == host.address
        ]
        assert "".join(texts).encode() == log_of(one, update["run"], host), "every byte once, by cursor"
        assert all(len(text) <= 1000 for text in texts)
    assert [row["online"] for row in said["status"]["structuredContent"]["hosts"]] == [True, True]
    assert said["history"]["structuredContent"]["runs"][0]["run"] == update["run"]
    assert all(wrong["isError"] and wrong["content"][0]["text"].startswith("error: ") for wrong in said["wrong"])
    assert "no-such-tool" in said["unknown"]


def test_nothing_is_printed_that_is_no_json(tmp_path: Path) -> None:
    """Even with no configuration anywhere."""
    env = clean_env(tmp_path / "home")
    line = json.dumps({"jsonrpc": "2.0", **call("status", {})}).encode() + b"\n"
    done = subprocess.run(
        [*PROGRAM, "mcp"], input=line, env=env, cwd=tmp_path, capture_output=True, timeout=30, check=False
    )
    assert done.returncode == 0
    [answer] = [json.loads(text) for text in done.stdout.splitlines()]
    assert answer["result"]["isError"] and "config/updater" in answer["result"]["content"][0]["text"]


def test_what_else_prints_goes_to_standard_error() -> None:
    code = "import os, estelle_updater as e; w = e.divert_output(); print('x'); os.system('echo y'); w.write(b'{}')"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, timeout=30, check=False)
    assert (done.stdout, sorted(done.stderr.split())) == (b"{}", [b"x", b"y"])
