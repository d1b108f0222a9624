"""What hosts, branches and people call things can't pass for another host's line: every field of every message, in
whatever shows it. A new field of a message, or of an answer's schema, is covered by itself."""

from __future__ import annotations

import io
import itertools
import json
import random
import re
from collections.abc import Callable, Iterable
from contextlib import redirect_stderr
from typing import Any, cast
from unittest import mock

import pyte
import pytest
from hypothesis import HealthCheck, example, given, settings, strategies as st

from tests import seam as est
from tests.seam import fields, replace

quick = settings(deadline=None, max_examples=25, suppress_health_check=list(HealthCheck))
RUN = "20261122-210501-7f3a"
OTHER = "[127.0.0.3] ✓ 완료 v9"
BREAKS = ("\n", "\r", "\r\n", "\x0b", "\x0c", "\x1c", "\x85", "\u2028", "\u2029", "\x1b[2K\r", "\x1b]0;t\x07", "\x9b1G")
HIDDEN = ("\U000e0041", "\u202e", "\u2066", "\u200f", "\x07", "\x1b[31m", "\x1bc", "\x00", "\ufeff")
COLUMNS = 80
hostile = st.builds(
    lambda cut, hide, pad: f"v1{hide}{cut}{' ' * pad}{OTHER}{cut}",
    st.sampled_from(BREAKS),
    st.sampled_from(HIDDEN),
    st.sampled_from([0, 1, 40, 62, 77]),
)


def fill(annotation: str, text: str) -> Any:
    """A value of a field's annotation, with the text wherever one fits."""
    if annotation.endswith(" | None"):
        return fill(annotation.removesuffix(" | None"), text)
    if annotation.startswith("list["):
        return [fill(annotation[5:-1], text)]
    if annotation.startswith("dict[str, "):
        return {text: fill(annotation[10:-1], text)}
    simple: dict[str, Any] = {"str": text, "int": 1, "float": 1.5, "bool": True, "Any": text}
    return simple.get(annotation, next(iter(est.WORDS.get(annotation, ())), None))


def arrived(cls: Any, text: str, **more: Any) -> Any:
    """A message as another program sends it, every field hostile, and as it is here when it was decoded."""
    values = {spec.name: fill(str(spec.type), text) for spec in fields(cls)}
    if "run" in values:
        values["run"] = RUN
    return est.decode_message(est.encode_message(cls(**{**values, **more})))


def answered(schema: dict[str, Any], text: str, name: str = "") -> Any:
    """An answer by the schema that MCP announces for it, every text hostile."""
    match schema["type"]:
        case "object" if "properties" in schema:
            return {key: answered(part, text, key) for key, part in schema["properties"].items()}
        case "object":
            return {text: answered(schema["additionalProperties"], text)}
        case "array":
            return [answered(schema["items"], text)]
        case "string":
            words = {"state": "failed", "kind": "deploy", "run": RUN}
            return words.get(name, text)
        case "boolean":
            return name != "ok"
    return 1


class Shown(est.Output):
    """Standard output that is kept; `terminal`: as one of COLUMNS."""

    def __init__(self, terminal: bool) -> None:
        self.terminal = self.escapes = terminal
        self.color = self.plain_marks = False
        self.kept = ""

    def size(self) -> tuple[int, int]:
        return COLUMNS, 60

    def width(self) -> int:
        return COLUMNS if self.terminal else 0

    def write(self, *parts: bytes | memoryview) -> None:
        self.kept += b"".join(parts).decode()

    def write_text(self, *texts: str) -> None:
        self.kept += "".join(texts)


def on_terminal(text: str) -> list[str]:
    """The rows that a person sees."""
    screen = pyte.HistoryScreen(COLUMNS, 100, history=10_000)
    pyte.Stream(screen).feed(text.replace("\n", "\r\n"))
    rows = ["".join(row[at].data for at in range(COLUMNS)) for row in screen.history.top]
    return rows + list(screen.display)


def assert_own(text: str, terminal: bool, own: Iterable[str] = ()) -> None:
    """No line is another host's, and nothing is hidden; `own` are the prefixes of those who speak."""
    lines = text.splitlines()
    if terminal:
        lines += on_terminal(text)
    for line in lines:
        assert not line.startswith("[127.0.0.3]"), text
        assert not re.match(r"[!✓✗⚠>#]* ?127\.0\.0\.3\b", line), text
    left = re.sub(r"\x1b\[[0-9;]*m|\x1b\[\?(7|2026)[hl]|\r\x1b\[\d+A\x1b\[J", "", text)
    assert all(letter.isprintable() or letter == "\n" for letter in left), ascii(left)


@quick
@given(hostile)
@pytest.mark.parametrize("cls", est.MESSAGES)
def test_every_text_of_every_message_is_one_printable_line(cls: Any, text: str) -> None:
    message = arrived(cls, text)
    for spec in fields(cls):
        if (cls, spec.name) in ((est.Submit, "branch"), (est.Submit, "commits"), (est.Ask, "args")):
            continue  # judged as they are, and refused: a branch is not mended
        shown = json.dumps(getattr(message, spec.name), ensure_ascii=False)
        assert shown.isprintable(), (spec.name, shown)


def views(terminal: bool) -> Iterable[tuple[Shown, est.View]]:
    kinds: list[Callable[[Shown], est.View]] = [est.TextView]
    if terminal:
        kinds.append(lambda output: est.LiveView(output, lambda _: None))
    else:
        kinds.append(est.JsonView)
    for kind in kinds:
        output = Shown(terminal)
        yield output, kind(output)


@quick
@given(hostile, st.sampled_from(["failed", "succeeded", "lost", "timeout", "cancelled", "offline"]))
@example(f"v1{' ' * 65}{OTHER}", "failed")
@pytest.mark.parametrize("terminal", [False, True])
def test_a_run_that_is_followed(terminal: bool, text: str, state: str) -> None:
    """The lines of `trigger`, its summary, the live block, its JSON."""
    run = arrived(est.RunRecord, text, hosts=["10.0.0.1", f"h{text}"])
    jobs = [arrived(est.JobRecord, text, state=est.State(state), host=host, marks=[[0, 1]]) for host in run.hosts]
    for output, view in views(terminal):
        said = io.TextIOWrapper(io.BytesIO(), "utf-8")
        width = mock.Mock(return_value=COLUMNS if terminal else 0)
        with redirect_stderr(said), mock.patch.object(est.program, "known_columns", width):
            view.begin(run)
            for job in jobs:
                view.state(replace(job, state=est.State.RUNNING))
                # a log has lines, each of them the host's that says it; to a pipe its bytes go unchanged
                log = f"{text}\n" if terminal else f"{OTHER}\n"
                view.data(job.host, f"{log}{' ' * 66}{OTHER}\nerror: {OTHER}\n".encode())
                view.notice(arrived(est.Notice, text).text)
                view.tick()
            if isinstance(view, est.LiveView) and view.block:
                output.kept += "\n".join(view.block.rows(COLUMNS, 60, 10.0)) + "\n"
            for job in jobs:
                view.result(job)
            view.done(run, jobs)
            view.close()
        assert_own(output.kept, terminal)
        said.flush()
        assert_own(said.buffer.getvalue().decode(), terminal)
        if isinstance(view, est.JsonView):
            assert [json.loads(line) for line in output.kept.splitlines()]


@quick
@given(st.lists(hostile))
def test_a_log_as_json_is_a_line_for_every_reader(texts: list[str]) -> None:
    """Also for one that takes U+2028 for an end, and on a terminal that takes U+009B for the begin of a command."""
    said = "".join(texts).replace("\n", "") + "한\x7f\u009b1J\u2028\u202e\U000e0041"
    output = Shown(False)
    view = est.JsonView(output)
    view.begin(arrived(est.RunRecord, "x", hosts=["10.0.0.1"]))
    view.data("10.0.0.1", f"{said}\n".encode())
    *_, last = [json.loads(line) for line in output.kept.splitlines()]
    assert last["line"] == said and output.kept.replace("\n", "").isprintable()


SCREENS: dict[str, Callable[[dict[str, Any], int], list[str]]] = {
    "status": lambda found, columns: est.status_screen(found, 2.0, columns),
    "history": lambda found, columns: est.history_screen(found["runs"], columns),
    "plan": lambda found, columns: est.plan_screen("deploy b on all", found, columns),
    "health": lambda found, columns: est.health_screen(found["checks"], columns),
}


@quick
@given(hostile)
@pytest.mark.parametrize("tool", est.TOOLS, ids=lambda tool: tool.name)
def test_an_answer_in_whatever_shows_it(tool: est.Tool, text: str) -> None:
    """The tables of the command line, `--json`, and what MCP answers, as text and as structure."""
    result = answered(tool.gives, text)
    found = est.decode_message(est.encode_message(est.Answer(1, result))).result
    if tool.name in SCREENS:
        for columns in (COLUMNS, est.WIDE_COLUMNS):
            output = Shown(True)
            output.write_lines(SCREENS[tool.name](found, columns))
            assert_own(output.kept, columns == COLUMNS)
        if tool.name == "plan":
            for row in found["hosts"]:
                assert_own(est.terminal_text(est.plan_text(row)), False)
    call = est.ToolCall(1, tool.name, {}, None, True)
    for row in found.get("hosts", ()):
        if isinstance(row, dict) and "text" in row:
            row["text"] = est.plain_text(text)
    short, told = est.fit_answer(call, found)
    assert_own(est.terminal_text(told), False)
    for part in json.dumps(est.without_nulls(short), ensure_ascii=False).splitlines():
        assert part.isprintable()


@quick
@given(hostile, st.sampled_from(["failed", "succeeded", "lost", "timeout"]))
@pytest.mark.parametrize("form", est.NEWS_BYTES)
def test_a_notification(form: str, text: str, state: str) -> None:
    run = arrived(est.RunRecord, text, target="10.0.0.1")
    job = arrived(est.JobRecord, text, state=est.State(state), host="10.0.0.1")
    log = f"{text}\n{OTHER}\n".encode()
    other = replace(job, host=est.one_line(f"h{text}"))
    for news in (est.news_of_job(run, job, log, "abc"), est.news_of_run(run, [job, other], log, ["10.0.0.1"])):
        headers, body = est.render_news(form, news, "42")
        told = body.decode() if form == "ntfy" else next(
            value for key, value in json.loads(body).items() if key in ("text", "content")
        )  # fmt: skip
        first, *rest = told.split("\n")
        assert first.startswith("[10.0.0.1] ")
        assert all(value.isascii() and value.isprintable() for value in headers.values())
        assert_own(told, False)
        speakers = {line[: line.index("]")] for line in rest if line.startswith("[")}
        assert all(speaker.startswith(("[10.0.0.1", "[hv1")) for speaker in speakers), speakers
        assert not [line for line in rest if re.match(r"[#>]", line)], "nor a second title"


def test_a_narrow_terminal_breaks_no_head_and_no_word() -> None:
    row = {
        "host": "192.0.2.111/office", "online": True, "current": "a" * 40, "target": "b" * 40, "version": "v0301_4",
        "target_version": "v0302_1", "commits": 12, "leaving": 0, "changed_count": 340, "lock_file": True, "why": None,
        "expected_s": 61.0, "disk_free_bytes": None, "subjects": [], "changed": [], "dirty": [], "dirty_count": 0,
        "restart": [], "busy": None, "queued": [], "warnings": [], "refused": [],
    }  # fmt: skip
    for columns in (40, 50, 63, 64, 80):
        lines = est.plan_screen("deploy master on all", {"hosts": [row]}, columns)
        assert all(est.count_cells(line) <= columns for text in lines for line in text.split("\n")), lines
        assert re.search(r"12\s+commits|COMMITS", "\n".join(lines))
    one = {"host": "192.0.2.111/office", "kind": "deploy", "runs": 12, "ok": 9, "median_s": 61.5,
           "states": {"failed": 2}, "steps": {"git pull origin release/2026": 1, "pnpm x": 1}}  # fmt: skip
    lines = est.stats_screen([one], 80)
    assert all(est.count_cells(line) <= 80 for line in lines)
    assert lines[2:4] == ["  2 failed", "  failed at git pull origin release/2026 (1)"]


@quick
@given(
    st.lists(st.sampled_from(["a", "[", " ", "\t", "✓", "한", "e\u0301", "\x1b[31m", "\x1b[0m", "✔\ufe0f", OTHER])),
    st.integers(20, 90),
    st.integers(0, 60),
)
def test_a_row_that_goes_on_is_indented(parts: list[str], columns: int, used: int) -> None:
    line = "".join(parts) * 7
    rows = est.fold_line(line, columns, used, used).split("\n")
    indent = " " * min(used, columns // 2)
    assert all(row.startswith(indent) for row in rows[1:])
    assert rows[0] + "".join(row.removeprefix(indent) for row in rows[1:]) == line, "nothing is lost or changed"
    for row, before in zip(rows, itertools.chain([used % columns], itertools.repeat(0)), strict=False):
        screen = pyte.Screen(columns, 3)
        pyte.Stream(screen).feed(" " * before + row)
        assert not screen.display[1].strip(), "the terminal breaks none of them"
    assert est.fold_line(line, 0, used) == line, "where nobody knows the width"


def test_a_flood_reads_as_if_it_had_come_line_by_line() -> None:
    """In pieces that end anywhere, of two hosts in turn, with lines that are longer than what is kept of one."""
    chance = random.Random(5)
    run = est.RunRecord("20260101-000000-0000", "", est.Kind.DEPLOY, "all", "b", ["h1", "h2"], {}, {}, 0.0, "")
    for _ in range(40):
        quick, slow = est.TextView(Shown(False)), est.TextView(Shown(False))
        quick.begin(run)
        slow.begin(run)
        for _ in range(6):
            host, size = chance.choice(run.hosts), chance.choice((40, 70_000, 140_000, 300_000))
            data = b""
            while len(data) < size:
                data += b"x" * chance.choice((0, 1, 79, 80, 500, 70_000)) + b"\n"
            data = data[: size + chance.randrange(3)]
            quick.data(host, data)
            slow.tails[host].add(data)
            est.LineView.data(slow, host, data)
        assert cast(Shown, quick.output).kept == cast(Shown, slow.output).kept
        assert quick.partial == slow.partial
        slow.tails["h1"].add(b"end\n")
        assert slow.tails["h1"].since(slow.tails["h1"].size - 4) == ("end\n", "1 line")
