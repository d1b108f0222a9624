"""What the module does of its own to start soon is equal to what the library does."""

from __future__ import annotations

import asyncio
import builtins
import copy
import dis
import gc
import marshal
import os
import py_compile
import random
import shutil
import socket
import subprocess
import sys
import time
import types
import typing
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests import seam as est
from tests.fleet import PROGRAM, clean_env, run
from tests.seam import program

# Says of each module that Python's own loader reads out of the .pyz, and how it ended.
WATCHED = """
import runpy, sys, zipimport
load = zipimport._unmarshal_code
def told(*given):
    print("read", given[2], file=sys.stderr)
    return load(*given)
zipimport._unmarshal_code = told
import atexit, os
end = os._exit
def leave(code):
    print("left by itself", file=sys.stderr)
    end(code)
os._exit = leave
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def declare(base: typing.Any) -> typing.Any:
    """A named tuple as the module declares them, of either kind."""

    class Row(base):  # type: ignore[misc]
        name: str
        size: int
        note: str = "none"

    return Row


def test_a_named_tuple_is_as_the_librarys():
    ours, theirs = declare(vars(program)["NamedTuple"]), declare(typing.NamedTuple)
    given: typing.Any
    named: typing.Any
    for given, named in [(("a", 1), {}), (("a",), {"size": 1}), ((), {"name": "a", "size": 1, "note": "b"})]:
        one, other = ours(*given, **named), theirs(*given, **named)
        assert tuple(one) == tuple(other)
        assert (repr(one), one._asdict(), one._fields) == (repr(other), other._asdict(), other._fields)
        assert (one.name, one.size, one.note, hash(one)) == (other.name, other.size, other.note, hash(other))
        assert tuple(one._replace(size=5)) == tuple(other._replace(size=5))
        assert type(copy.copy(one)) is ours and copy.deepcopy(one) == one
        match one:
            case ours(name, size):
                assert (name, size) == ("a", 1)
    for given, named in [((), {}), (("a", 1, "b", 2), {}), (("a",), {"name": "b", "size": 1}), (("a", 1), {"no": 1})]:
        for kind in (ours, theirs):
            with pytest.raises(TypeError, match=r"Row|__new__"):
                kind(*given, **named)
    with pytest.raises(AttributeError):
        ours("a", 1).size = 2


def test_every_pattern_compiles():
    """An error in one would show only at its first use."""
    patterns = [value for value in vars(program).values() if isinstance(value, program._LazyPattern)]
    assert len(patterns) > 40
    for pattern in patterns:
        assert pattern.pattern == pattern.compile().pattern
        assert vars(pattern)["pattern"]  # and the next use does not come by the way of the first


def test_a_short_command_reads_the_module_once_and_leaves_at_once(tmp_path: Path, pyz: Path):
    """Python's own loader would read it to say where it is, and again; at the end it gives back each object."""
    code, words = ["-S", "-c", WATCHED], ["--state", str(tmp_path), "history"]
    done = subprocess.run([sys.executable, *code, pyz, *words], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2 and "config" in done.stderr, done.stderr
    assert "read estelle" not in done.stderr and done.stderr.endswith("left by itself\n"), done.stderr
    words = ["-S", "-X", "importtime", str(pyz), "--state", str(tmp_path), "--config", "/dev/null", "status"]
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, cwd=tmp_path)
    assert " estelle_updater\n" in done.stderr
    dear = [name for name in WITHOUT if f" {name}\n" in done.stderr]
    assert not dear, dear


def test_what_another_python_built_is_compiled_once(tmp_path: Path, pyz: Path):
    """To compile the module takes longer than all that a command does; and what is kept is code, that nobody else may
    have written."""
    other = tmp_path / "other.pyz"
    shutil.copy(pyz, other)
    with zipfile.ZipFile(other) as archive:
        begin = archive.getinfo("estelle_updater.pyc").header_offset + 30 + len("estelle_updater.pyc")
    with other.open("r+b") as file:
        file.seek(begin)
        file.write(b"\x01\x02\r\n")
    env = clean_env(tmp_path / "home")
    folder = tmp_path / "home/.cache/estelle-updater"

    def compiles(**more: str) -> bool:
        """Whether a start reads the source."""
        words = [sys.executable, "-S", "-c", WATCHED, str(other), "--state", str(tmp_path), "history"]
        done = run(words, env | more, tmp_path)
        assert done.code == 2 and "config" in done.err, done.err
        return "read estelle_updater.pyc\n" in done.err

    assert compiles(PYTHONDONTWRITEBYTECODE="1") and not folder.exists()
    assert compiles()
    (kept,) = folder.iterdir()
    assert (folder.stat().st_mode & 0o777, kept.stat().st_mode & 0o777) == (0o700, 0o600)
    assert not compiles()

    whole = kept.read_bytes()
    for damaged in (b"", whole[:5000], whole[:-1] + b"x", whole[:8]):
        kept.write_bytes(damaged)
        assert compiles() and kept.read_bytes()[:4] == whole[:4], "it is compiled, and kept again"
        assert not compiles()
    kept.chmod(0o666)
    assert compiles() and not compiles()
    folder.chmod(0o777)
    kept.unlink()
    assert compiles() and not kept.exists(), "anybody may have put it there"
    folder.chmod(0o700)
    assert compiles() and kept.exists()

    long_ago = folder / "estelle_updater-00000000-1.cpython-311.pyc"
    long_ago.write_bytes(b"")
    os.utime(long_ago, (0, 0))
    somebodys = folder / "other.pyc"
    shutil.copy2(long_ago, somebodys)
    kept.unlink()
    assert compiles() and {*folder.iterdir()} == {kept, somebodys}
    shutil.rmtree(folder)
    folder.write_text("no folder")
    assert compiles() and compiles(), "without a place for it all goes on"


WITHOUT = ("typing", "dataclasses", "socket", "asyncio", "inspect", "argparse", "threading", "urllib.parse", "gettext")
VALUES = [
    "all",
    "121.0.0.7",
    "blue",
    "20261122-210501-7f3a",
    "7f3a",
    "5",
    "-1",
    "2h",
    "",
    "list",
    "--json",
    "/x",
    "a b",
]


def blank() -> typing.Any:
    """The arguments before a command line was read, as `main` has them."""
    return est.Args(config=None, state=None, bind=None, no_color=False, verbose=False, json=False)


def read_by_argparse(argv: list[str]) -> dict[str, typing.Any] | None:
    """What argparse makes of a command line; None where that is wrong, or no command."""
    args = blank()
    try:
        est.make_parser(argv).parse_args(argv, args)
    except (est.UsageError, SystemExit):
        return None
    return {**vars(args)}


def some_lines(chance: random.Random) -> typing.Iterator[list[str]]:
    """Command lines of the table's words and others, right and wrong."""
    for command in est.COMMANDS:
        names = [name for item in (*command.options, *est.GLOBAL_OPTIONS) for name in item.names]
        words = [name for name in names if name.startswith("-")] + ["--no-such", "--", "--config=/x", "--verb", "-vv"]
        yield [command.name]
        for length in [1, 2, 2, 3, 3, 3, 4, 4, 5, 5] * 12:
            line = [chance.choice(words if chance.random() < 0.4 else VALUES) for _ in range(length)]
            at = chance.choice([0, 0, 0, chance.randrange(length + 1)])
            yield [*line[:at], command.name, *line[at:]]


def test_a_plain_command_line_is_read_as_argparse_reads_it(capsys: pytest.CaptureFixture[str]):
    """Whatever it does not take is argparse's to read, or to refuse."""
    usual = (
        "status", "--json status", "status -v", "history -n 5", "trigger all master", "plan all master", "logs",
        "logs last 121.0.0.7 -f", "--config /x --bind 127.0.0.1 trigger --detach all master", "rollback", "health",
        "freeze market --for 2h", "cancel --yes", "switch standby --dry-run", "watch", "watch pause", "forget vm",
        "config init --format json", "setup --dry-run", "notify test", "completion bash", "run-job a b",
    )  # fmt: skip
    for line in usual:
        assert est.read_plainly(line.split()) is not None, line
    taken = 0
    for argv in [*map(str.split, usual), *some_lines(random.Random(7))]:
        plain = est.read_plainly(argv)
        if plain is not None:
            taken += 1
            args = blank()
            vars(args).update(plain)
            assert vars(args) == read_by_argparse(argv), argv
    assert taken > 200
    capsys.readouterr()


def test_a_part_is_made_once_whatever_threads_ask():
    made: list[typing.Any] = []

    def make(of: object) -> object:
        time.sleep(0.02)
        made.append(of)
        return object()

    class Whole:
        part: typing.Any = est.made_once(make)

    one, other = Whole(), Whole()
    with ThreadPoolExecutor(8) as threads:
        assert len({*threads.map(lambda _: id(one.part), range(8))}) == 1
    assert made == [one] and other.part is not one.part and made == [one, other]


def test_the_library_is_whole_for_who_wants_more_of_it(pyz: Path):
    """For a path's import something stands in that is gone afterwards, unless it is there already."""
    ask = "from pathlib import Path; import urllib.parse; print(Path('/a b').as_uri(), urllib.parse.quote('ü'))"
    for code in (f"import estelle_updater; {ask}", f"import urllib.parse as u, estelle_updater; u.quote; {ask}"):
        env = {**os.environ, "PYTHONPATH": str(pyz)}
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
        assert (done.stdout, done.stderr) == ("file:///a%20b %C3%BC\n", "")


def test_the_end_of_a_daemon_looks_for_no_garbage(pyz: Path):
    """What is to be put away is, and rings of objects go with the process."""
    code = """
import asyncio, atexit, estelle_updater
class Ring:
    def __init__(self):
        self.own = self
    def __del__(self):
        print("looked at")
kept = Ring()
atexit.register(print, "put away")
estelle_updater.leave(3)
"""
    env = {**os.environ, "PYTHONPATH": str(pyz)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert (done.returncode, done.stdout, done.stderr) == (3, "put away\n", "")


def test_what_a_start_leaves_for_later_is_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The sources are packed by a daemon, and by a nursery that nobody asks anything of."""
    monkeypatch.setattr(program, "PACK_S", 0.05)

    class Packed(Exception):
        pass

    def pack() -> None:
        raise Packed

    monkeypatch.setattr(program.SOURCES, "pack", pack)
    nobodys: typing.Any = SimpleNamespace(state=None)
    with pytest.raises(Packed):
        asyncio.run(program.prune_forever(nobodys, tuple))
    daemon, nursery = socket.socketpair()
    try:
        with daemon, pytest.raises(Packed):
            program.tend_nursery(nobodys, tmp_path / "none", nursery.detach())
    finally:  # a nursery never looks for garbage
        gc.unfreeze()
        gc.enable()


def names_asked(code: types.CodeType) -> set[str]:
    """The global names that a piece of bytecode may ask for, wherever inside."""
    found = {step.argval for step in dis.get_instructions(code) if step.opname in ("LOAD_GLOBAL", "LOAD_NAME")}
    for part in code.co_consts:
        if isinstance(part, types.CodeType):
            found |= names_asked(part)
    return found


def test_what_short_commands_do_asks_for_nothing_that_is_set_apart(pyz: Path):
    with zipfile.ZipFile(pyz) as archive:
        bytecode = archive.read("estelle_updater.pyc")
    code = marshal.loads(bytecode[16:])
    loader = SimpleNamespace(bytecode=bytecode)
    packed: dict[str, typing.Any] = {"__name__": "estelle_updater", "__builtins__": builtins, "__loader__": loader}
    exec(code, packed)
    sizes = [*packed["_APART"]]
    whole = vars(program).keys()
    for names, absent, left in (
        (("cmd_status",), ("cmd_plan", "TextView", "Follower", "Runner", "Spawned"), 4),
        (("cmd_plan", "cmd_cancel", "cmd_history"), ("TextView", "Follower", "Runner", "Spawned"), 3),
        (("cmd_trigger", "cmd_logs", "cmd_rollback"), ("Runner", "Switch", "Setup", "Desk", "Spawned"), 2),
        (("cmd_run_job", "cmd_nursery"), ("Service", "Setup", "Desk", "Planner", "Demo"), 1),
    ):  # fmt: skip
        part = code
        if left < len(sizes):
            part = marshal.loads(bytecode[-sum(sizes[-left - 1 :]) :])
            packed["_define_apart"](left)
            assert packed["_APART"] == sizes[-left:] and loader.bytecode
        for name in names:
            assert isinstance(packed[name], types.FunctionType), name
        # what is set apart has a stand-in, or no name at all
        assert not [name for name in absent if isinstance(packed.get(name), type | types.FunctionType)]
        assert names_asked(part) & whole <= packed.keys() | {"__file__"}
    # what reads a field's annotation asks for the names in it
    for rule in [value for value in packed.values() if hasattr(value, "__dataclass_fields__")]:
        for text in vars(rule).get("__annotations__", {}).values():
            asked = names_asked(compile(text, "", "eval")) if isinstance(text, str) else set()
            assert asked & whole <= packed.keys(), (rule, text)
    packed["_define_apart"]()
    assert packed["_APART"] == [] and loader.bytecode is None
    assert whole - packed.keys() <= {"__cached__", "__doc__", "__file__", "__loader__", "__package__", "__spec__"}


def test_a_short_command_leaves_alone_what_is_set_apart(tmp_path: Path, pyz: Path):
    code = (
        "import contextlib, sys; sys.path.insert(0, sys.argv.pop(1)); import estelle_updater as e\n"
        "with contextlib.suppress(SystemExit):\n  e.main(sys.argv[1:])\n"
        "print('whole' if 'Runner' in vars(e) else 'short', e.Runner.__name__)"
    )
    for words, told in (["status"], "short"), (["--help"], "short"), (["config", "check"], "whole"):
        argv = [sys.executable, "-c", code, str(pyz), "--state", str(tmp_path), "--config", "/dev/null", *words]
        done = subprocess.run(argv, capture_output=True, text=True, cwd=tmp_path)
        assert done.stdout.endswith(f"{told} Runner\n"), done


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no device here is always full")
def test_what_a_short_command_could_not_write_is_its_exit_code():
    for words, code in (["--help"], 130), (["--version", "--json"], 130), (["no-such"], 2):
        with open("/dev/full", "w") as full:
            done = subprocess.run([*PROGRAM, *words], stdout=full, stderr=subprocess.PIPE, text=True)
        assert done.returncode == code and done.stderr.count("\n") < 3, done.stderr


def test_an_annotation_names_its_converter():
    """Read when its key is: every field that `typing` sees a converter at has its key."""
    rules = [value for value in vars(program).values() if getattr(value, "__dataclass_fields__", None)]
    seen = 0
    for rule in rules:
        for key, (name, convert) in program.config_keys(rule).items():
            assert key[0].islower() and name in rule.__dataclass_fields__
            place = program._Place()
            convert(object(), place)
            assert place.problems, key  # no key takes what no file can hold
            seen += 1
    assert seen > 60


def test_a_library_in_a_zip_without_sources_is_preloaded(tmp_path: Path, pyz: Path):
    """As Python for Windows can have it: a traceback has no lines of it then, and a daemon starts."""
    source, library = tmp_path / "packed_library.py", tmp_path / "library.zip"
    source.write_text("KNOWN = True\n")
    compiled = tmp_path / "packed_library.pyc"
    py_compile.compile(str(source), cfile=str(compiled))
    source.unlink()
    with zipfile.ZipFile(library, "w") as archive:
        archive.write(compiled, "packed_library.pyc")
    code = "import packed_library, estelle_updater; estelle_updater.preload('json'); print(packed_library.KNOWN)"
    searched = os.pathsep.join([str(library), str(pyz)])
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": searched}
    )
    assert done.stdout == "True\n", done.stderr
