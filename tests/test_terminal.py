"""What a person sees at a terminal: the log once and unchanged, below it the block, at the end why and what to type."""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests import seam as est
from tests.fleet import ROOT, Fleet, clean_env, run
from tests.terminal import Terminal

pytestmark = pytest.mark.skipif(os.name == "nt", reason="pty")

NOW = 1000.0
RUN = "20261126-210501-7f3a"


def run_of(hosts: list[str], **more: Any) -> est.RunRecord:
    machines = {host: f"m{at}" for at, host in enumerate(hosts)}
    values = {"kind": est.Kind.DEPLOY, "target": "all", "branch": "master"} | more
    return est.RunRecord(RUN, "n", hosts=hosts, machines=machines, addresses={}, created=0.0, **values)


def job_of(host: str, state: est.State = est.State.RUNNING, **more: Any) -> est.JobRecord:
    values: dict[str, Any] = {"step": "pnpm deploy:release", "started": 10.0} | more
    return est.JobRecord(RUN, host, "m", est.Kind.DEPLOY, "master", state, **values)


def block_of(hosts: list[str], *jobs: est.JobRecord, usually_s: float | None = None) -> est.Block:
    block = est.Block(run_of(hosts), NOW - 102, usually_s)
    for job in jobs:
        block.update(job, NOW - 98)
    return block


def test_the_block_says_who_failed_who_is_quiet_and_what_was_said_last() -> None:
    hosts = ["5.223.72.58", "121.0.0.7/office", "10.0.0.3", "10.0.0.19"]
    block = block_of(
        hosts,
        job_of(hosts[0]),
        job_of(hosts[1], est.State.FAILED, exit=1, ended=51.0),
        job_of(hosts[2], est.State.SUCCEEDED, version="v0301_4", ended=68.0),
        job_of(hosts[3], est.State.QUEUED, behind="20261126-205800-02ab"),
        usually_s=85.0,
    )
    block.add(hosts[0], "Compiling 811\n\x1b[31mCompiling\x1b[0m 812 결제\n".encode(), NOW - 72)
    block.add(hosts[1], b"10%\r50%\rERR_PNPM_RECURSIVE_RUN_FIRST_FAIL", NOW - 60)
    assert block.rows(200, 60, NOW) == [
        f"deploy master on all  1 failed  1 running  1 queued  1 ok  1:42 (usually 1:25)  {RUN}",
        "✗ 121.0.0.7/office   0:41  실패 pnpm deploy:release (exit 1)  │ ERR_PNPM_RECURSIVE_RUN_FIRST_FAIL",
        "▸ 5.223.72.58        1:38  pnpm deploy:release  quiet 1:12  │ Compiling 812 결제",
        "· 10.0.0.19         behind 20261126-205800-02ab",
        "✓ 10.0.0.3           0:58  완료 v0301_4",
    ]
    narrow = block.rows(80, 24, NOW)
    assert narrow[1] == "✗ 121.0.0.7/office   0:41  실패 pnpm deploy:release (exit 1)  │ ERR_PNPM_REC…"
    assert narrow[0].endswith("(usually 1:25)") and RUN not in narrow[0], "an id is never cut"


@pytest.mark.parametrize(
    ("columns", "lines", "most"), [(80, 24, 8), (200, 60, 30), (30, 6, 2), (20, 2, 1), (80, 40, 20)]
)
def test_the_block_is_never_more_than_its_share(columns: int, lines: int, most: int) -> None:
    hosts = [f"10.0.0.{n}/원격-호스트-{n}" for n in range(40)]
    states = [est.State.QUEUED, est.State.RUNNING, est.State.SUCCEEDED, est.State.FAILED]
    block = block_of(hosts, *(job_of(host, states[at % 4], ended=20.0) for at, host in enumerate(hosts)))
    for host in hosts:
        block.add(host, "가나다라마바사…✓✗".encode() * 20, NOW)
    rows = block.rows(columns, lines, NOW)
    assert len(rows) == most
    assert all(est.count_cells(row, 2) < columns for row in rows), rows
    if most > 3:
        assert re.fullmatch(r"… (\d+ more \w+, )+10 more ok", rows[-1]), rows[-1]
        assert rows[1].startswith("✗ ")


def test_the_excerpt_finds_the_cause_above_the_stack_trace() -> None:
    noise = [f"module {n}" for n in range(100)]
    trace = [f"    at frame {n}" for n in range(60)]
    cause = "src/app/결제/page.tsx:14:7 - error TS2322: no"
    lines = est.take_excerpt("\n".join([*noise, "10%\r50%\r100%", cause, *trace, " ELIFECYCLE  Command failed", ""]))
    assert lines[:3] == ["module 99", "100%", cause]
    assert len(lines) == 16 and lines[12] == "…" and lines[-1] == " ELIFECYCLE  Command failed"
    assert est.take_excerpt("\n".join(noise)) == noise[-12:]
    assert est.take_excerpt("") == []
    short = ["one", "fatal: x", "three"]
    assert est.take_excerpt("\n".join(short)) == short


def test_hosts_that_failed_alike_share_one_excerpt() -> None:
    alike = [
        est.Ending(job_of(f"10.0.0.{n}", est.State.FAILED, exit=1, ended=17.0), ["no"], "31 lines") for n in (10, 11)
    ]
    other = est.Ending(job_of("10.0.0.12", est.State.TIMEOUT, ended=12.0), ["slow"], "1 line")
    seen = est.Ending(job_of("10.0.0.13", est.State.FAILED, exit=2, ended=12.0), ["seen"], "1 line", on_screen=True)
    text = est.excerpt_lines([*alike, other, seen], 90, 100)
    assert text == [
        "10.0.0.10, 10.0.0.11: pnpm deploy:release failed (exit 1) after 0:07, 31 lines, alike",
        *("  no", "", "10.0.0.12: pnpm deploy:release timed out after 0:02, 1 line", "  slow", ""),
    ]


def test_only_lines_with_control_characters_are_treated() -> None:
    assert est.terminal_text("가\tb\n\n✓") == "가\tb\n\n✓"
    assert (
        est.terminal_text("a\r\nb\r\r\nc\rd\x1b[2J\x1b[31mred\x07\n\u202eevil") == "a\nb\nc\nd\x1b[31mred\x1b[0m\nevil"
    )
    assert est.terminal_text("\x1b[32m✓\x1b[0m a\r\nb\n\x1b[31mc") == "\x1b[32m✓\x1b[0m a\x1b[0m\nb\n\x1b[31mc\x1b[0m"
    nested = "\x1b\x1b[31m[2Ja\x1b]0;\x1b[1mt\x07b"  # what is left when colours are taken out is no sequence either
    assert "\x1b" not in est.terminal_text(nested).replace("\x1b[31m", "").replace(est.RESET, "")


TABLE_ROWS = [
    est.TableRow("✓", ("5.223.72.58", "yq-data", "9392de5", "v0301_4", "-", "✓ 19:02")),
    est.TableRow(
        "▸",
        (
            "2001:db8:85a3::8a2e:370:7334/office",
            "office-" * 5,
            "9392de5+dirty",
            "결제-" * 9,
            "green standby",
            "✗ 20:58",
        ),
        ["long " * 30],
    ),
    est.TableRow("✗", ("140.238.11.21", "offline since 11-26 20:01")),
]


@pytest.mark.parametrize("used", [0, 11, 79, 80, 95])
def test_plain_words_are_folded_as_their_letters_are(used: int) -> None:
    """What needs no weighing is cut in rows at once, as if letter by letter: each row is filled to its last column."""
    colour = "\x1b[0m"
    for count in (0, 1, 68, 69, 70, 137, 138, 139, 1000):
        line = ("the quick brown fox" * 60)[:count]
        folded = est.fold_line(line, 80, 11, used)
        for weighed in (colour.join(line), f"{line[:50]}{colour}{line[50:]}"):
            assert est.fold_line(weighed, 80, 11, used).replace(colour, "") == folded
        rows = folded.split("\n")
        assert "".join([rows[0], *(row[11:] for row in rows[1:])]) == line
        assert all(len(row) == 80 for row in rows[1:-1]), rows


@pytest.mark.parametrize("columns", [80, 100, 200])
def test_tables_fit_and_names_that_are_typed_are_whole(columns: int) -> None:
    lines = est.lay_table(("HOST", "NAME", "COMMIT", "VERSION", "TRAFFIC", "LAST"), TABLE_ROWS, columns)
    assert all(est.count_cells(line) < columns for line in lines), "\n".join(lines)
    assert any("2001:db8:85a3::8a2e:370:7334/office" in line for line in lines)
    assert lines[-1].split() == ["✗", "140.238.11.21", "offline", "since", "11-26", "20:01"]


# A real terminal

PLAY = """
import os, sys, time
import estelle_updater as est
hosts = [f"10.0.0.{n}" for n in range(int(sys.argv[1]))]
machines = {host: host for host in hosts}
run = est.RunRecord("20261126-210501-7f3a", "n", est.Kind.DEPLOY, "all", "master", hosts, machines, {}, 0.0)
class Feed:
    def __init__(self): self.state = 0
    def receive(self, wait_s):
        if not self.state:
            self.state = 1
            yield run
            yield from (job(host, est.State.RUNNING) for host in hosts)
            time.sleep(0.6)
        elif self.state <= int(sys.argv[2]):
            for host in hosts:
                text = f"L{self.state}.\\n" + ("가나다 결제 ✓\\n" if self.state % 5 == 0 else "")
                text += "10%\\r20%\\r99%\\n" if self.state % 7 == 0 else ""
                text += os.environ.get("MORE", "")
                yield est.Piece(host, text.encode())
            if self.state == 3: yield est.Notice("a notice of the master")
            self.state += 1
            time.sleep(min(wait_s, 0.02))
        else:
            for at, host in enumerate(hosts):
                yield job(host, est.State.FAILED if at == 1 else est.State.SUCCEEDED)
    def close(self): pass
def job(host, state):
    code = 1 if state is est.State.FAILED else None
    more = {"step": "build", "exit": code, "started": 1.0, "ended": 2.0}
    return est.JobRecord(run.run, host, host, run.kind, run.branch, state, **more)
class Args(est.Args): pass
words = {"json": "--json" in sys.argv, "plain": "--plain" in sys.argv}
args = est.Args(**words, no_color=False, config=None, state="/nonexistent", bind=None)
view = est.make_view(args)
est.Follower(Feed(), view).follow()
"""


@pytest.fixture
def at_terminal(tmp_path: Path) -> Iterator[Callable[..., Terminal]]:
    opened: list[Terminal] = []

    def start(*words: str, env: dict[str, str] | None = None, **options: Any) -> Terminal:
        own = clean_env(tmp_path) | {"PYTHONPATH": str(ROOT), "ESTELLE_CONFIG": "/nonexistent.toml"}
        opened.append(Terminal([sys.executable, "-c", PLAY, *words], own | (env or {}), tmp_path, **options))
        return opened[-1]

    yield start
    for terminal in opened:
        terminal.close()


def assert_log_is_whole(terminal: Terminal, hosts: int, count: int) -> None:
    """Every line of every host once and in order, each bar's last state, and nothing left of the block."""
    lines = terminal.all_lines()
    for at in range(hosts):
        mine = [line.removeprefix(f"[10.0.0.{at}] ") for line in lines if line.startswith(f"[10.0.0.{at}] ")]
        assert [line for line in mine if re.fullmatch(r"L\d+\.", line)] == [f"L{n}." for n in range(1, count + 1)]
        if terminal.screen.columns > 30:
            assert mine.count("가나다 결제 ✓") == count // 5
            assert mine.count("99%") == count // 7
    left = [line for line in lines if re.match(r"(▸|·) 10\.|deploy master on all  \d|… \d+ more", line)]
    assert left == [], left


SIZES = [(columns, lines, hosts) for columns, lines in ((80, 24), (200, 60), (30, 6)) for hosts in (3, 20)]


@pytest.mark.parametrize(("columns", "lines", "hosts"), SIZES)
def test_the_log_is_in_the_scrollback_once_and_the_block_goes(
    at_terminal: Callable[..., Terminal], columns: int, lines: int, hosts: int
) -> None:
    terminal = at_terminal(str(hosts), "60", columns=columns, lines=lines)
    assert terminal.wait() == 0
    rows = {int(up) for up in re.findall(rb"\x1b\[(\d+)A", terminal.raw)}
    assert rows and max(rows) <= est.block_rows(lines), "there was a block, and never more than its share"
    assert_log_is_whole(terminal, hosts, 60)
    assert any(f"{hosts - 1} of {hosts} ok in" in line for line in terminal.all_lines())
    assert b"\x1b[?1049h" not in terminal.raw and b"\x1b[?25l" not in terminal.raw, "no other screen, no hidden cursor"
    assert terminal.raw.count(b"\x1b[?7l") == terminal.raw.count(b"\x1b[?7h") > 1


GOLDEN = (
    "".join(
        f"[10.0.0.{host}] L{n}.\n"
        + (f"[10.0.0.{host}] 가나다 결제 ✓\n" if n == 5 else "")
        + (f"[10.0.0.{host}] 10%\r20%\r99%\n" if n == 7 else "")
        for n in range(1, 8)
        for host in (0, 1)
    )
    + """[10.0.0.0] ✓ 완료
[10.0.0.1] ✗ 실패 build (exit 1)

host      commit  time   result
10.0.0.0  -       1.0 s  ✓ 완료
10.0.0.1  -       1.0 s  ✗ 실패 build (exit 1)
"""
)
# of the events of the same run, as programs have read them since before there was a block
GOLDEN_EVENTS = "019792004e56f7fbdb46debe308b7c75efe26b0bc3a74de7938a5a8e12dd7900"


@pytest.mark.parametrize("to_file", [False, True], ids=["pipe", "file"])
def test_pipes_and_files_get_the_bytes_that_they_always_got(tmp_path: Path, to_file: bool) -> None:
    env = clean_env(tmp_path) | {"PYTHONPATH": str(ROOT), "ESTELLE_CONFIG": "/nonexistent.toml", "TERM": "xterm"}

    def play(*words: str) -> bytes:
        argv = [sys.executable, "-c", PLAY, "2", "7", *words]
        with open(tmp_path / "out", "wb") as out:
            where = out if to_file else subprocess.PIPE
            done = subprocess.run(argv, env=env, stdout=where, stderr=subprocess.DEVNULL, check=True, timeout=60)
        return (tmp_path / "out").read_bytes() if to_file else done.stdout

    assert play() == play("--plain") == GOLDEN.encode()
    events = play("--json")
    assert hashlib.sha256(events).hexdigest() == GOLDEN_EVENTS, events.decode()


def test_a_resize_loses_no_line(at_terminal: Callable[..., Terminal]) -> None:
    terminal = at_terminal("3", "100", columns=100, lines=30)
    terminal.until(lambda: "[10.0.0.1] L9." in terminal.all_lines(), "lines")
    terminal.resize(60, 30)
    terminal.until(lambda: "[10.0.0.1] L50." in terminal.all_lines(), "lines")
    terminal.resize(120, 30)
    assert terminal.wait() == 0
    said = [line for line in terminal.all_lines() if re.match(r"\[10\.0\.0\.2\] L", line)]
    assert said == [f"[10.0.0.2] L{n}." for n in range(1, 101)]


@pytest.mark.parametrize(
    ("words", "env"),
    [(["--plain"], {}), ([], {"TERM": "dumb"}), ([], {"NO_COLOR": "1"})],
    ids=["plain", "dumb", "no color"],
)
def test_what_a_person_switches_off_is_off(
    at_terminal: Callable[..., Terminal], words: list[str], env: dict[str, str]
) -> None:
    terminal = at_terminal("2", "60", *words, env=env)
    assert terminal.wait() == 0
    assert_log_is_whole(terminal, 2, 60)
    has_block = b"\x1b[?2026h" in terminal.raw
    assert has_block == ("NO_COLOR" in env), "NO_COLOR switches off colour, not the block"
    assert (re.search(rb"\x1b\[\d+m", terminal.raw) is not None) == (words == ["--plain"]), "colours"
    if "TERM" in env:
        assert b"\x1b" not in terminal.raw


@pytest.mark.parametrize("words", [["--plain"], []], ids=["plain", "live"])
def test_a_line_that_the_terminal_would_break_looks_like_nobody_else_s(
    at_terminal: Callable[..., Terminal], words: list[str]
) -> None:
    fake = "[10.0.0.1] ✓ 완료 v9"
    terminal = at_terminal("2", "3", *words, columns=60, env={"MORE": f"{' ' * 49}{fake}\nx\t\t\t\t\t\t\t{fake}\n"})
    assert terminal.wait() == 0
    lines = terminal.all_lines()
    assert [line for line in lines if line.startswith(fake)] == []
    indented = [line for line in lines if re.fullmatch(r" {11,}\S.*v9", line)]
    assert len(indented) == 12, lines


def test_notices_stand_above_the_block_or_where_stderr_goes(
    at_terminal: Callable[..., Terminal], tmp_path: Path
) -> None:
    notice = "estelle-updater: a notice of the master"
    terminal = at_terminal("2", "60")
    assert terminal.wait() == 0
    assert terminal.all_lines().count(notice) == 1
    with open(tmp_path / "err", "wb") as err:
        apart = at_terminal("2", "60", stderr=err.fileno())
        assert apart.wait() == 0
    assert_log_is_whole(apart, 2, 60)
    assert notice not in apart.all_lines()
    assert notice in (tmp_path / "err").read_text()


def test_an_encoding_that_lacks_letters_still_tells_which(
    at_terminal: Callable[..., Terminal], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """cp949 knows Korean and no ✓: marks have plain ones, and what else it lacks is told by its number."""
    with open(tmp_path / "err", "wb") as err:
        terminal = at_terminal("2", "60", env={"PYTHONIOENCODING": "cp949"}, stderr=err.fileno())
        assert terminal.wait() == 0
    shown = re.sub(r"\x1b\[[?0-9;]*[A-Za-z]", "", terminal.raw.decode("cp949"))
    said = (tmp_path / "err").read_bytes().decode("cp949")
    assert "[10.0.0.1] 가나다 결제 +\r\n" in shown and "?" not in shown
    assert "+ 완료" in shown and "x 실패 build (exit 1)" in shown
    assert "10.0.0.1: build failed (exit 1)" in said and "  가나다 결제 +\n" in said and "?" not in said
    for encoding, wanted in (("cp949", "실패 x \\U0001f680 …"), ("utf-8", "실패 ✗ 🚀 …")):
        monkeypatch.setattr(sys, "stderr", io.TextIOWrapper(io.BytesIO(), encoding))
        folded = est.fold_for_stderr("실패 ✗ 🚀 …")
        assert folded == wanted.replace("…", "~" if encoding == "cp949" else "…")


def test_a_slow_question_does_not_stop_the_clock() -> None:
    ticks = threading.Semaphore(0)

    class View(est.View):
        def tick(self) -> None:
            ticks.release()

        def due_s(self) -> float:
            return 0.0

    def ask() -> dict[str, Any]:
        return {"ticked": all(ticks.acquire(timeout=10) for _ in range(5))}

    def fail() -> dict[str, Any]:
        raise est.GuardError("no")

    assert est.ask_while_ticking(View(), ask) == {"ticked": True}
    with pytest.raises(est.GuardError):
        est.ask_while_ticking(View(), fail)


@pytest.mark.parametrize("keys", ["\x03", "\x1a"], ids=["Ctrl-C", "Ctrl-Z"])
def test_a_person_who_leaves_finds_a_clean_screen(at_terminal: Callable[..., Terminal], keys: str) -> None:
    terminal = at_terminal("3", "150")
    terminal.until(lambda: any(line.startswith("▸ ") for line in terminal.shown()), "the block")
    terminal.type(keys)
    if keys == "\x1a":
        pid = terminal.process.pid
        terminal.until(lambda: Path(f"/proc/{pid}/stat").read_text().split()[2] == "T", "it has stopped")
        assert not any(line.startswith("▸ ") for line in terminal.shown()), terminal.shown()
        os.kill(pid, signal.SIGCONT)
        terminal.until(lambda: any(line.startswith("▸ ") for line in terminal.shown()), "the block again")
        assert terminal.wait() == 0
        assert_log_is_whole(terminal, 3, 150)
    else:
        terminal.wait()
    assert not any(line.startswith("▸ ") for line in terminal.all_lines())


SLOW = """echo begun; while [ ! -e ../go ]; do sleep 0.1; done
case $PWD in *host2*) for n in $(seq 40); do echo "module $n"; done; echo "error TS2322: no"; seq 30; exit 3;; esac
"""


def test_a_deployment_at_a_terminal(fleet: Callable[..., Fleet]) -> None:
    check = {"name": "web", "command": ["sh", "-c", f"test $PWD = /x || {{ echo {'long ' * 30}; exit 1; }}"]}
    one = fleet(hosts=2, config={"health": [check]})
    one.origin.commit({"deploy.sh": SLOW})

    def at(*words: str, columns: int = 80) -> Terminal:
        argv, env, cwd = one._command(words, None, None, None)
        return Terminal(argv, env, cwd, columns=columns)

    watched = at("trigger", "all", "master")
    watched.until(lambda: sum(line.startswith("▸ 127.0.0.") for line in watched.shown()) == 2, "both run")
    run = one.runs()[-1].name
    watched.type("\x03")
    assert watched.wait() == 130
    text = "\n".join(watched.all_lines())
    assert "the deployment goes on; follow it:" in text and not re.search("^▸", text, re.MULTILINE)
    watched.close()

    asked = one.cli("cancel")
    assert asked.code == 5 and "--yes" in asked.err, "the newest run is cancelled by a question only"
    # without an id the newest run is meant, and the beginning of one is enough
    follows = at("logs", "-f", columns=200)
    follows.until(lambda: any(line.startswith("▸ ") for line in follows.shown()), "the block")
    for host in one.hosts:
        (host.folder / "go").touch()
    assert follows.wait() == 1
    lines = follows.all_lines()
    assert lines.count("[127.0.0.2] module 7") == 1
    assert not [line for line in lines if line.startswith(("▸ ", "deploy master on all "))]
    title = re.compile(r"127\.0\.0\.2: sh deploy\.sh failed \(exit 3\) after \d:\d\d, 72 lines")
    assert any(map(title.fullmatch, lines)), lines
    assert "  error TS2322: no" in lines
    assert any(line.startswith("1 of 2 ok in ") and line.endswith(run) for line in lines)
    assert any(line.endswith(f"trigger --failed-of {run}  again, once it is mended") for line in lines)
    follows.close()
    narrow = at("logs", "-f", run, columns=30)
    assert narrow.wait() == 1
    for command in (f"logs {run} 127.0.0.2", f"trigger --failed-of {run}"):
        assert f" {command}\r\n".encode() in narrow.raw, "the terminal wraps a command, and not we: it can be copied"
    narrow.close()
    for words in (["logs", "last"], ["logs", run[:17]], ["logs"]):
        assert one.cli(*words).out.count("[127.0.0.2] module 7\n") == 1
    nobody = one.cli("logs", "19990101")
    assert nobody.code == 4 and "no run begins with 19990101" in nobody.err
    assert one.cli("cancel", "--yes").out == "nothing runs or waits: there is nothing to cancel\n"

    for words, said in (
        (["status"], "✗ 실패 sh deploy.sh (exit 3)"),
        (["history"], "✗ 127.0.0.2  실패"),
        (["plan", "all", "master"], "HOST"),
        (["health"], "✗ 127.0.0.1  web"),
    ):
        table = at(*words)
        assert table.wait() == (words == ["health"])
        lines = table.all_lines()
        assert any(said in line for line in lines), lines
        whole = ("trigger", "exactly this, ")  # a command is to be copied: the terminal wraps it
        assert all(est.count_cells(line) < 80 or any(word in line for word in whole) for line in lines), lines
        assert re.search(rb"\x1b\[3[12]m", table.raw), "colour on marks"
        table.close()

    one.origin.commit({"deploy.sh": "echo better\n"})
    again = one.cli("trigger", "--failed-of", "last")
    assert again.code == 0 and "[127.0.0.2] better" in again.out and "[127.0.0.1]" not in again.out
    nothing = one.cli("trigger", "--failed-of", "last")
    assert nothing.code == 2 and "succeeded everywhere" in nothing.err


def test_words_of_every_day(fleet: Callable[..., Fleet]) -> None:
    one = fleet(hosts=1)
    for words in (
        ["rollback", "", "--yes"],
        ["trigger", " ", "master"],
        ["upgrade", ""],
        ["health", ""],
        ["logs", "last", ""],
    ):
        empty = one.cli(*words)
        assert empty.code == 2 and "names no target" in empty.err, words
    assert one.runs() == []
    assert one.cli("health").code == 0
    for words in (["switch", "blue"], ["release", "master"]):
        refused = one.cli(*words)
        assert refused.code == 2 and "no [haproxy]" in refused.err.splitlines()[0], words
    assert one.cli("help").out == one.cli("--help").out
    assert one.cli("help", "trigger").out == one.cli("trigger", "--help").out
    assert one.cli("version").out == f"estelle-updater {est.__version__}\n"
    assert json.loads(one.cli("version", "--json").out) == {"version": est.__version__, "protocol": [1, est.PROTOCOL]}
    told = json.loads(one.cli("--json", "--help").out)
    assert {"trigger", "completion"} <= {command["name"] for command in told["commands"]}


def test_completion_knows_the_command_table(tmp_path: Path) -> None:
    script = est.render_completion("bash")
    ask = "COMP_WORDS=({words}); COMP_CWORD={at}; _estelle_updater; echo ${{COMPREPLY[@]}}"

    def complete(*words: str) -> list[str]:
        line = ask.format(words=" ".join(f"'{word}'" for word in words), at=len(words) - 1)
        return subprocess.run(
            ["bash", "-c", f"{script}\n{line}"], capture_output=True, text=True, check=True
        ).stdout.split()

    assert complete("est", "tr") == ["trigger"]
    assert complete("est", "trigger", "--fa") == ["--failed-of"]
    assert complete("est", "--json", "switch", "st") == ["standby"]
    assert complete("est", "vers") == ["version"] and complete("est", "help", "tr") == ["trigger"]
    assert complete("est", "trigger", "a") == ["all", "active"]
    assert complete("est", "setup", "--with", "") == ["pm2", "systemd"], "what may follow an option, and nothing else"
    assert complete("est", "status", "--config", "") == [], "bash itself completes files"
    for shell in ("bash", "zsh", "fish"):
        text = est.render_completion(shell)
        assert all(command.name in text for command in est.COMMANDS if not command.hidden)
        if shutil.which(shell):
            (tmp_path / shell).write_text(text)
            subprocess.run([shell, "-n", str(tmp_path / shell)], check=True)
    if shutil.which("fish"):
        # a fish reads and writes below HOME
        env = os.environ | {"HOME": str(tmp_path)}
        line = f"source {tmp_path / 'fish'}; complete -C 'est setup --with '; complete -C 'est config c'"
        words = run(["fish", "-c", line], env, tmp_path).out.split()
        assert words == ["pm2", "systemd", "check", "convert"], "no files of the folder beside them"
        line = f"source {tmp_path / 'fish'}; complete -C 'est trigger --'; complete -C 'est build --o'"
        offered = {row.split()[0] for row in run(["fish", "-c", line], env, tmp_path).out.splitlines()}
        assert {"--plan", "--config", "--output"} <= offered
        assert offered.isdisjoint({"--format", "--role", "--with"}), "other commands' options"
