"""What keeps a model from ordering what nobody wanted: plans, keys, a person who is asked; and answers that fit it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, strategies as st

from tests import seam as est
from tests.commands import COMMAND as SCRIPT, GATED, detach, job_of, open_gate, wait_state, write_script
from tests.fleet import Fleet, Host, unavailable, wait_for
from tests.test_mcp import (
    CLIENT,
    META,
    Model,
    feed,
    model as model,  # the fixture
    session,
)

MakeFleet = Callable[..., Fleet]
MakeModel = Callable[..., Model]


def head(one: Fleet, host: Host) -> str:
    return one.origin.git("rev-parse", "HEAD", cwd=host.repo)


def test_a_plan_holds_until_the_tree_moves_and_once(fleet: MakeFleet, model: MakeModel) -> None:
    one = fleet(hosts=2, command=SCRIPT)
    _, agent = one.hosts
    write_script("echo fine\n", *one.hosts)
    client = model(one, "--require-plan")
    wanted = {"target": "all", "branch": "master"}
    for nothing, why in ((None, "plan is missing"), ("", "plan is empty"), (" \t", "plan is empty")):
        orders = {"update": wanted, "rollback": {}, "switch": {"color": "blue"}, "release": {"branch": "b"}}
        for tool, more in orders.items():
            assert why in client.error(tool, plan=nothing, **more)
    for empty in ("", " "):
        refused = one.cli("trigger", "all", "master", "--plan", empty)
        assert refused.code == 5 and "there is no fresh plan" in refused.err, "the master too takes no empty plan"
    assert "target is empty" in client.error("plan", action="rollback", target="")
    for command in (("rollback", "", "--yes"), ("trigger", "", "master"), ("health", ""), ("upgrade", " ")):
        assert one.cli(*command).code in (2, 4), command
    assert one.runs() == []

    # it is good until the tree moves: what is pushed while the order waits is not deployed
    first = head(one, agent)
    write_script(GATED, agent)
    blocker = detach(one, agent.address, "master")
    wait_for(lambda: (agent.folder / "begun").exists() or "begun" in log_text(one, blocker, agent), "it runs")
    said = one.cli("plan", agent.address, "master")
    assert said.code == 0 and "--plan " in said.out, said
    plan = said.out.rpartition("--plan ")[2].split()[0]
    ordered = one.cli("trigger", agent.address, "master", "--plan", plan, "--detach")
    assert ordered.code == 0, ordered.err
    one.origin.commit({"app.txt": "nobody planned this"})
    open_gate(agent)
    run = ordered.out.strip()
    wait_state(one, run, agent, "failed")
    assert job_of(one, run, agent)["error"] == "the plan is no longer true" and head(one, agent) == first
    assert not job_of(one, run, agent)["began_command"]
    again = one.cli("trigger", agent.address, "master", "--plan", plan)
    assert again.code == 5 and "was used already" in again.err
    other = json.loads(one.cli("plan", agent.address, "master", "--json").out)["plan"]
    wrong = one.cli("trigger", "all", "master", "--plan", other)
    assert wrong.code == 5 and "is for something else" in wrong.err
    write_script("echo fine\n", agent)
    used = one.cli("trigger", agent.address, "master", "--plan", other)
    assert used.code == 0, "an order that is refused uses no plan"

    # a plan that says no
    one.origin.commit({"deploy.sh": "echo new\n"})
    (agent.repo / "deploy.sh").write_text("local\n")
    plan = client.call("plan", **wanted)["structuredContent"]
    assert not plan["ok"]
    assert "says no: local changes are in the way" in client.error("update", plan=plan["plan"], **wanted)
    forced = client.call("update", plan=plan["plan"], force=True, **wanted)["structuredContent"]
    assert [row["state"] for row in forced["hosts"]] == ["succeeded", "failed"]
    assert "takes no target" in client.error("plan", action="switch", color="blue", target="127.0.0.1")
    assert client.end() == ""


def log_text(one: Fleet, run: str, host: Host) -> str:
    path = one.master.state / "runs" / run / f"{host.address}.log"
    return path.read_text() if path.exists() else ""


def test_a_key_answers_for_one_request_alone(fleet: MakeFleet, model: MakeModel) -> None:
    one = fleet(hosts=2, command=SCRIPT)
    write_script("echo fine\n", *one.hosts)
    client = model(one)
    first = head(one, one.master)
    assert client.call("update", target="all", branch="master")["structuredContent"]["ok"]
    one.origin.commit({"app.txt": "1"})
    done = client.call("update", target="all", branch="master", idempotency_key="k")["structuredContent"]
    for tool, arguments in (
        ("update", {"target": "127.0.0.1", "branch": "master"}),
        ("update", {"target": "all", "branch": "other"}),
        ("rollback", {}),
        ("rollback", {"target": "127.0.0.2", "to": first}),
        ("release", {"branch": "master"}),
    ):
        said = client.error(tool, idempotency_key="k", **arguments)
        assert "belongs to another request" in said and done["run"] in said, said
    back = {"target": "127.0.0.2", "idempotency_key": "back"}
    rolled = client.call("rollback", **back)["structuredContent"]
    assert rolled["ok"] and client.call("rollback", **back)["structuredContent"]["run"] == rolled["run"]
    assert "belongs to another" in client.error("rollback", target="127.0.0.1", idempotency_key="back")
    assert "belongs to another" in client.error("rollback", target="127.0.0.2", to=first, idempotency_key="back")
    assert (head(one, one.hosts[0]), head(one, one.hosts[1])) == (done["hosts"][0]["commit"], first)

    # a failed one, again only where it failed
    write_script("exit 3\n", one.hosts[1])
    failed = client.call("update", target="all", branch="master")["structuredContent"]
    assert failed["failures"][0]["hosts"] == ["127.0.0.2"] and f"failed_of {failed['run']}" in failed["next"]
    write_script("echo fine\n", one.hosts[1])
    assert "failed_of says the target itself" in client.error("update", failed_of=failed["run"], target="all")
    mended = client.call("update", failed_of=failed["run"], target=None, branch=None)["structuredContent"]
    assert mended["ok"] and [row["host"] for row in mended["hosts"]] == ["127.0.0.2"]
    assert "succeeded everywhere" in client.error("update", failed_of=mended["run"])
    again = one.cli("trigger", "--failed-of", failed["run"])
    assert again.code == 0 and "127.0.0.1" not in again.out, again
    assert one.cli("trigger", "all", "master", "--failed-of", failed["run"]).code == 2
    assert one.cli("trigger", "all").code == 2 and one.cli("trigger").code == 2


@pytest.mark.parametrize(("package", "mode"), [("1", "initialize"), ("2", "initialize"), ("2", "auto")])
def test_a_person_is_asked(fleet: MakeFleet, package: str, mode: str) -> None:
    folder = Path(os.environ.get("ESTELLE_TEST_MCP", "/nonexistent")) / package
    if not (folder / "mcp").is_dir():
        unavailable(f"the official MCP client {package}.x is not installed (tests/run does it)")
    one = fleet(hosts=1, command=SCRIPT)
    write_script("echo fine\n", one.master)
    one.origin.commit({"app.txt": "1"}, message="Better prices")
    argv, env, cwd = one._command(["mcp"], None, None, {"PYTHONPATH": str(folder)})
    done = subprocess.run(
        [sys.executable, str(CLIENT), f"confirm-{mode}", "master", *argv],
        env=env, cwd=cwd, capture_output=True, timeout=90, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr.decode()
    said = json.loads(done.stdout)
    assert [("deploy master on all?" in question, "Better prices" in question) for question in said["asked"]] == [
        (True, True)
    ] * 3
    for refused in said["refused"]:
        assert refused["isError"] and "did not agree" in refused["content"][0]["text"]
    assert said["agreed"]["structuredContent"]["ok"] and len(one.runs()) == 1
    assert said["mute"]["isError"] and "--require-plan" in said["mute"]["content"][0]["text"]


def test_a_reply_counts_for_the_call_that_asked_for_it(fleet: MakeFleet, model: MakeModel) -> None:
    """Today's era: the question is an answer, and the call comes again with the person's reply."""
    one = fleet(hosts=1, command=SCRIPT)
    write_script("echo fine\n", one.master)
    client = model(one, "--confirm")

    def say(arguments: dict[str, Any], **more: Any) -> dict[str, Any]:
        client.number += 1
        able = {**META, "io.modelcontextprotocol/clientCapabilities": {"elicitation": {}}}
        params = {"name": "update", "arguments": arguments, "_meta": able, **more}
        message = {"jsonrpc": "2.0", "id": client.number, "method": "tools/call", "params": params}
        client.say(json.dumps(message).encode())
        result: dict[str, Any] = client.answer(client.number)["result"]
        return result

    wanted = {"target": "all", "branch": "master"}
    yes = {"confirm": {"action": "accept", "content": {"confirm": True}}}
    asked = say(wanted)
    assert asked["resultType"] == "input_required"
    assert asked["inputRequests"]["confirm"]["method"] == "elicitation/create"
    state = asked["requestState"]
    for arguments, more in (
        (wanted, {"requestState": state}),
        (wanted, {"requestState": state, "inputResponses": {"confirm": {"action": "accept", "content": {}}}}),
        (wanted, {"requestState": state, "inputResponses": {"confirm": {"action": "decline"}}}),
        ({**wanted, "target": "127.0.0.1"}, {"requestState": state, "inputResponses": yes}),
        (wanted, {"requestState": "x" + state, "inputResponses": yes}),
        (wanted, {"requestState": "", "inputResponses": yes}),
    ):
        assert say(arguments, **more)["isError"], (arguments, more)
    assert say(wanted, inputResponses=yes)["resultType"] == "input_required", "a reply to no question of ours"
    assert one.runs() == []
    assert say(wanted, requestState=state, inputResponses=yes)["structuredContent"]["ok"]
    again = say(wanted, requestState=state, inputResponses=yes)
    assert again["isError"] and "was used already" in again["content"][0]["text"] and len(one.runs()) == 1


def test_a_long_run_is_answered_in_time_and_waited_for(fleet: MakeFleet, model: MakeModel) -> None:
    one = fleet(hosts=2, command=SCRIPT)
    write_script(GATED, *one.hosts)
    client = model(one)
    begun = client.call("update", target="all", branch="master", wait_s=1)["structuredContent"]
    assert begun["done"] is False and "ok" not in begun and "order nothing again" in begun["next"]
    still = client.call("wait", run=begun["run"], wait_s=0)["structuredContent"]
    assert (still["run"], still["done"]) == (begun["run"], False)
    waiting = client.begin("wait", run=begun["run"])
    write = "i=0; while [ $i -lt 300 ]; do i=$((i+1)); echo line $i; done; printf '\\033[31mError: X\\033[0m\\n'\n"
    open_gate(*one.hosts)
    assert client.answer(waiting)["result"]["structuredContent"]["ok"]

    write_script(f"{write}{write}exit 1\n", *one.hosts)
    result = client.call("update", target="all", branch="master")
    failed = result["structuredContent"]
    [failure] = failed["failures"]
    assert failure["hosts"] == ["127.0.0.1", "127.0.0.2"], "what is the same on both stands there once"
    assert failure["truncated"] and "line 1\n" in failure["output"] and failure["output"].endswith("Error: X")
    assert "[... " in failure["output"] and "\x1b" not in failure["output"]
    assert len(json.dumps(result)) < 8000 and len(result["content"][0]["text"]) < 4500
    for asked, text in (
        ({"lines": 2, "target": "127.0.0.2"}, "line 300\nError: X"),
        ({"grep": "LINE 29*9|no such", "target": "127.0.0.2", "lines": 2}, "line 299\nline 299"),
    ):
        [row] = client.call("logs", run=failed["run"], **asked)["structuredContent"]["hosts"]
        assert row["text"] == text, asked
        log = log_text(one, failed["run"], one.hosts[1]).split("\n")
        for number, line in zip(row.get("numbers") or range(row["first_line"], 10**6), text.split("\n"), strict=False):
            assert log[number - 1].replace("\x1b[31m", "").replace("\x1b[0m", "") == line
    [pull] = client.call("logs", run=failed["run"], step="git pull", target="127.0.0.2")["structuredContent"]["hosts"]
    assert pull["text"].startswith("git pull origin master...\n") and pull["text"].endswith("Already up to date.")
    default = client.call("logs", run=failed["run"])["structuredContent"]["hosts"]
    assert [row["text"].startswith("sh ../script...\nline 1\n") for row in default] == [True, True]
    assert len(json.dumps(client.call("logs", run=failed["run"]))) < 8000
    assert not client.call("logs", run=begun["run"], failed_only=True)["structuredContent"]["hosts"]

    # the input ends in the middle: the run is named
    write_script(GATED, *one.hosts)
    last = client.begin("update", "t", target="all", branch="master")
    wait_for(lambda: any("begun" in text for text in client.progress("t")), "it runs")
    assert client.end() == ""
    ended = client.answer(last)["result"]["structuredContent"]
    assert ended["run"] == one.runs()[-1].name and ended["done"] is False
    open_gate(*one.hosts)


KINDS: dict[str, tuple[type, ...]] = {
    "string": (str,), "integer": (int,), "number": (int, float), "boolean": (bool,), "object": (dict,), "array": (list,)
}  # fmt: skip


def faults(schema: dict[str, Any], value: Any, place: str) -> set[str]:
    """Where an answer is not of its schema, and what of it that does not describe."""
    if not isinstance(value, KINDS[schema["type"]]) or (isinstance(value, bool) and schema["type"] != "boolean"):
        return {f"{place} is {value!r}"}
    found = set()
    if isinstance(value, dict):
        found = {f"{place} lacks {name}" for name in schema.get("required", ()) if name not in value}
        for name, item in value.items():
            known = schema.get("properties", {}).get(name) or schema.get("additionalProperties")
            found |= faults(known, item, f"{place}.{name}") if known else {f"{place}.{name} is described nowhere"}
    for item in value if isinstance(value, list) else ():
        found |= faults(schema["items"], item, f"{place}[]")
    return found


def test_one_schema_for_a_thing_whoever_shows_it(fleet: MakeFleet, model: MakeModel) -> None:
    """What `--json` prints and what a model gets: jobs, hosts, rows of plans, checks, runs; and a fleet of a hundred
    fits an answer."""
    check = {"name": "disk", "disk": "/", "least": 1}
    one = fleet(hosts=2, command=SCRIPT, config={"health": [check]})
    write_script("echo fine\n", one.hosts[0])
    write_script("echo broken; exit 3\n", one.hosts[1])
    events = [json.loads(line) for line in one.cli("trigger", "all", "master", "--json").out.splitlines()]
    run = next(event["run"] for event in events if event["event"] == "run")
    [states, results] = [[e for e in events if e["event"] == kind] for kind in ("state", "result")]
    assert len(results) == 2 and states
    wrong: set[str] = set()
    for row in states + results:
        wrong |= faults(
            est.JOB_SCHEMA, est.without_nulls({k: v for k, v in row.items() if k not in ("event", "run")}), "job"
        )
    printed = {
        "status": json.loads(one.cli("status", "--json").out),
        "plan": json.loads(one.cli("plan", "all", "master", "--json").out),
        "health": json.loads(one.cli("health", "--json").out),
        "history": json.loads(one.cli("history", "--json").out),
    }
    client = model(one)
    asked = {"plan": {"target": "all", "branch": "master"}, "logs": {"run": run}, "wait": {"run": run}}
    for tool in est.TOOLS:
        if tool.name in printed or tool.name in asked:
            answer = client.call(tool.name, **asked.get(tool.name, {}))
            wrong |= faults(tool.gives, answer["structuredContent"], tool.name)
            assert len(json.dumps(answer, ensure_ascii=False)) < 8000
        if tool.name in printed:
            [name] = {"hosts", "checks", "runs"} & set(printed[tool.name])
            for row in printed[tool.name][name]:
                schema = tool.gives["properties"][name]["items"]
                wrong |= faults(schema, est.without_nulls(row), f"{tool.name} --json")
    assert not wrong
    master = client.call("status", target=one.master.address)["structuredContent"]
    assert [row["host"] for row in master["hosts"]] == [one.master.address], master
    assert "no host of the fleet" in client.error("status", target="nobody")

    printed["wait"] = client.call("wait", run=run)["structuredContent"]
    for name, answer in printed.items():
        for key in {"hosts", "checks", "runs"} & set(answer):
            answer[key] = [dict(row) for row in answer[key] * 50]
        if name == "history":
            answer["runs"] = [{**row, "hosts": row["hosts"] * 50} for row in answer["runs"][:10]]
        call = est.ToolCall(1, name, {}, None, True)
        short, text = est.fit_answer(call, answer)
        short = est.without_nulls(short)
        [tool] = [tool for tool in est.TOOLS if tool.name == name]
        assert not faults(tool.gives, {k: v for k, v in short.items() if k in tool.gives["properties"]}, name)
        assert len(json.dumps(short, ensure_ascii=False)) + len(text) < 8000, name
        left = short if name != "history" else short["runs"][0]
        assert (left["left_out"] > 10 and "no room here" in text) or name == "history"
    assert est.fit_answer(call._replace(arguments={"count": 100}), answer)[0] is answer, "it was asked for"


@pytest.mark.parametrize("count", [3, 12, 300])
@pytest.mark.parametrize("alike", [False, True])
def test_many_hosts_that_failed_fit_an_answer_that_says_what_is_left_out(count: int, alike: bool) -> None:
    """What has no room is said, and the cursor of a log does not pass it."""
    names = [f"10.0.{at // 250}.{at % 250}" for at in range(count)]
    text = "\n".join(f'line {n} of a build, ✗ with \\ and quotes"' for n in range(60))
    rows = [
        {"host": name, "state": "failed", "ok": False, "step": "pnpm build", "exit": 3, "error": "it broke",
         "version": "v1", "commit": "0" * 40, "warnings": [], "text": text if alike else f"{name}\n{text}",
         "truncated": False, "step_offset": 7, "first_line": 9}
        for name in names
    ]  # fmt: skip
    run = {"run": "20261122-210501-7f3a", "kind": "deploy", "branch": "master", "done": True, "ok": False}
    bare = [{key: row[key] for key in ("host", "state", "ok", "step", "exit", "error")} for row in rows]
    waited = {**run, "hosts": bare, "failures": est.group_failures(rows), "next": "call logs"}
    logs = {**run, "hosts": rows, "cursor": json.dumps(dict.fromkeys(names, 5000))}
    for tool, answer in (("wait", waited), ("logs", logs)):
        for arguments in ({}, {"lines": 5}):
            short, told = est.fit_answer(est.ToolCall(1, tool, arguments, None, True), answer)
            sent = {"content": [{"type": "text", "text": told}], "structuredContent": est.without_nulls(short)}
            assert len(json.dumps(sent, ensure_ascii=False)) < 8000, (tool, arguments)
            shown = [row["host"] for row in short["hosts"]]
            assert short.get("left_out", 0) == count - len(shown)
            if len(shown) < count:
                first = next(name for name in names if name not in shown)
                assert f"{count - len(shown)} more, which have no room here; for example target {first}" in told
            if tool == "logs":
                assert list(json.loads(short["cursor"])) == shown, "the others' text is still to come"
            else:
                said = [failure["hosts"] for failure in short["failures"]]
                if not alike:
                    assert len(said) + short.get("failures_left_out", 0) == count
                else:
                    assert len(said[0]) + short["failures"][0].get("hosts_left_out", 0) == count


# ---------------------------------------------------------------------------- shapes of calls, without any process


@pytest.mark.parametrize(
    ("tool", "sent", "meant"),
    [
        ("update", {"target": "all", "branch": "b", "plan": None, "wait_s": None}, {"target": "all", "branch": "b"}),
        ("update", {"target": "all", "branch": "b", "idempotency_key": "", "failed_of": ""},
         {"target": "all", "branch": "b"}),
        ("history", {"count": 10.0, "stats": None}, {"count": 10}),
        ("logs", {"run": "20261122-210501-7f3a", "cursor": "", "grep": " ", "step": None, "lines": 5.0},
         {"run": "20261122-210501-7f3a", "lines": 5}),
        ("status", {"anything": None}, {}),
        ("status", None, {}),
        ("wait", {"run": "20261122-210501-7f3a", "wait_s": 0.0}, {"run": "20261122-210501-7f3a", "wait_s": 0}),
    ],
)  # fmt: skip
def test_null_and_empty_mean_absent_and_whole_numbers_are_whole(tool: str, sent: Any, meant: Any) -> None:
    params = {"name": tool, "arguments": sent, "_meta": META}
    line = {"jsonrpc": "2.0", "id": 1, "method": "tools/call", "params": params}
    answers, [call], _ = session().feed(json.dumps(line).encode())
    assert answers == [] and call.arguments == meant


def schemas_in(value: Any) -> list[dict[str, Any]]:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else []
    found = [value] if isinstance(value, dict) and "type" in value and not isinstance(value["type"], dict) else []
    return found + [schema for item in inner for schema in schemas_in(item)]


def test_schemas_are_of_the_portable_kind() -> None:
    """No lists of types, nothing without a description, a list says of what."""
    for tool in (tool.render() for tool in est.TOOLS):
        for schema in schemas_in(tool["outputSchema"]) + schemas_in(tool["inputSchema"]):
            assert isinstance(schema["type"], str), schema
            assert schema["type"] != "array" or "items" in schema
            for name, field in schema.get("properties", {}).items():
                assert field.get("description") or field.get("properties"), (tool["name"], name)


def test_older_sessions_get_what_their_revision_knows() -> None:
    for older, keys in (
        ("2024-11-05", {"name", "description", "inputSchema"}),
        ("2025-03-26", {"name", "description", "inputSchema", "annotations"}),
        ("2025-11-25", {"name", "description", "inputSchema", "annotations", "outputSchema"}),
    ):
        one = session(older)
        listed = feed(one, method="tools/list")["result"]["tools"]
        assert all(set(tool) == keys for tool in listed)
        params = {"name": "status", "_meta": {"progressToken": 1}}
        line = {"jsonrpc": "2.0", "id": 1, "method": "tools/call", "params": params}
        [call] = one.feed(json.dumps(line).encode())[1]
        progress = one.progress(call, 1, "x")
        assert progress and ("message" in progress["params"]) == (older != "2024-11-05")
        result = one.finish(call, {"hosts": []}, False, "short")["result"]
        assert ("structuredContent" in result) == (older == "2025-11-25")
        assert result["content"][0]["text"] == ("short" if older == "2025-11-25" else '{"hosts": []}')


@given(st.lists(st.text(alphabet="ab*|", max_size=8), max_size=3), st.text(alphabet="abAB", max_size=12))
def test_grep_means_what_a_pattern_of_stars_means(parts: list[str], line: str) -> None:
    import fnmatch

    pattern = "|".join(parts)
    wanted = any(
        fnmatch.fnmatchcase(line.casefold(), f"*{one}*") for one in pattern.casefold().split("|") if one.strip("*")
    )
    assert est.LineFilter(pattern).matches(line) == wanted


@pytest.mark.parametrize(
    "why", ["Error: boom", "TypeError: x", "[ERROR] no", "src/a.ts(3,5): error TS2304", "ERR! x", "FAILED a.py"]
)
def test_what_says_why_is_not_lost_behind_a_stack_trace(why: str) -> None:
    head = [f"compile {at} of some module" for at in range(500)]
    trace = [f"    at frame {at} (/srv/app/node_modules/some/lib/file.js:{at})" for at in range(60)]
    text, cut = est.excerpt([*head, why, *trace], 2000)
    assert cut and f"\n{why}\n" in text and len(text) < 2100, text
    kept = text.split("\n")
    assert kept[0] == head[0] and kept[-1] == trace[-1]

    def count(lines: list[str]) -> int:
        return sum(int(line.split()[1]) if line.startswith("[... ") else 1 for line in lines)

    assert count(kept) == 561, "every line is there or counted"
    again, _ = est.excerpt(kept, 700)
    assert f"\n{why}\n" in again and count(again.split("\n")) == 561


@given(st.lists(st.text(alphabet="ab ", max_size=9), max_size=40), st.integers(10, 90))
def test_an_excerpt_keeps_head_and_tail(lines: list[str], room: int) -> None:
    text, cut = est.excerpt(lines, room)
    kept = text.split("\n")
    if not cut:
        assert text == "\n".join(lines)
        return
    [gap] = [at for at, line in enumerate(kept) if line.startswith("[... ")]
    assert kept[:gap] == lines[:gap] and kept[gap + 1 :] == lines[len(lines) - (len(kept) - gap - 1) :]
    assert kept[gap] == f"[... {len(lines) - len(kept) + 1} lines]" and len(text) <= room + 20
