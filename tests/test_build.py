"""The zipapp: equal bytes, a sentence on old Pythons, a quick start, and a running one whose file is replaced."""

from __future__ import annotations

import ast
import hashlib
import importlib.metadata
import json
import marshal
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest

from tests import seam
from tests.fleet import made_once
from tests.seam import UpdaterError, UsageError, build_zipapp, parse_script_block, render_build, require_packages

SOURCE = Path(seam.program.__file__)
BUILD = "import sys, pathlib, estelle_updater as e; e.build_zipapp(pathlib.Path(e.__file__), pathlib.Path(sys.argv[1]))"


def make_wheel(package: str, folder: Path, compiled: bool = False) -> None:
    """The pure wheel of an installed package, so that a build needs no network."""
    distribution = importlib.metadata.distribution(package)
    name = f"{package.replace('-', '_')}-{distribution.version}-py3-none-any.whl"
    folder.mkdir(exist_ok=True)
    with zipfile.ZipFile(folder / name, "w") as archive:
        for file in distribution.files or []:
            if file.suffix != ".pyc" and ".." not in file.parts and (compiled or file.suffix not in (".so", ".pyd")):
                archive.write(file.locate(), str(file))
        if compiled:
            archive.writestr(f"{package}/extension.cpython-311-x86_64-linux-gnu.so", b"")


@pytest.fixture(scope="module")
def offline(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """An environment in which pip finds the two packages in a folder and looks nowhere else."""
    if importlib.util.find_spec("pip") is None:
        pytest.skip("this Python has no pip to build with")
    folder = tmp_path_factory.mktemp("wheels")
    make_wheel("websockets", folder)
    make_wheel("tomli-w", folder)
    wanted = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(folder), "PIP_CONFIG_FILE": os.devnull}
    return {**os.environ, "PYTHONPATH": str(SOURCE.parent), **wanted}


@pytest.fixture(scope="module")
def pyz(tmp_path_factory: pytest.TempPathFactory, offline: dict[str, str]) -> Path:
    """Built here, whatever tests/run has built; at a path of each worker's own, beside which tests may write."""

    def build(target: Path) -> None:
        subprocess.run([sys.executable, "-c", BUILD, target], check=True, env=offline)

    built = made_once(tmp_path_factory, "built.pyz", build)
    return Path(shutil.copy(built, tmp_path_factory.mktemp("built") / "estelle_updater.pyz"))


def run(*words: str | Path, **options: object) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        words,
        check=False,
        capture_output=True,
        encoding="utf-8",
        errors="replace",
        stdin=subprocess.DEVNULL,
        timeout=60,
        **options,
    )  # type: ignore[call-overload]
    assert isinstance(done, subprocess.CompletedProcess)
    return done


def find_python(version: str) -> str:
    """Some interpreter of that minor version, or a skip that says which one is missing."""
    for path in sorted((Path.home() / ".pyenv").glob(f"versions/{version}.*/bin/python")):
        return str(path)
    for name in (f"python{version}", "python", "python2"):
        found = shutil.which(name)
        if found and run(found, "-c", "import sys; print('%d.%d' % sys.version_info[:2])").stdout.strip() == version:
            return found
    pytest.skip(f"no Python {version} on this machine")


def test_the_block_is_read_as_pep_723_says() -> None:
    python, dependencies = parse_script_block(SOURCE.read_text("utf-8"))
    assert python == (3, 11)
    assert [each.split(">")[0] for each in dependencies] == ["websockets", "tomli-w"]
    block = '# /// script\n# requires-python = ">=3.12"\n#\n# dependencies = [\n#   "a>=1",\n# ]\n# ///\n'
    assert parse_script_block("#!/bin/x\n" + block + "\n# /// other\n# x = 1\n# ///\n") == ((3, 12), ("a>=1",))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "# /// script\n# dependencies = []\n",
        "# /// script\n# x\n# ///\n",
        "# /// script\n# dependencies = []\n# ///\n",
        '# /// script\n# requires-python = "~=3.11"\n# dependencies = []\n# ///\n',
        '# /// script\n# requires-python = ">=3.11"\n# dependencies = []\n# ///\n\n' * 2,
    ],
)
def test_a_broken_block_is_an_error_that_names_it(text: str) -> None:
    with pytest.raises(UpdaterError, match="PEP 723") as caught:
        parse_script_block(text)
    assert "estelle_updater.py" in caught.value.hint


def test_two_builds_are_equal(tmp_path: Path, pyz: Path, offline: dict[str, str]) -> None:
    """Another folder, umask, hash seed, locale and line ending of the checkout: the same bytes."""
    checkout = tmp_path / "an other checkout"
    checkout.mkdir()
    (checkout / SOURCE.name).write_bytes(SOURCE.read_bytes().replace(b"\n", b"\r\n"))
    if SOURCE.with_name("LICENSE").exists():
        shutil.copy(SOURCE.with_name("LICENSE"), checkout)
    for name in seam.PACKED:
        (checkout / name).parent.mkdir(parents=True, exist_ok=True)
        (checkout / name).write_bytes((SOURCE.parent / name).read_bytes().replace(b"\n", b"\r\n"))
    env = {**offline, "PYTHONPATH": str(checkout), "PYTHONHASHSEED": "7", "LC_ALL": "C", "PYTHONOPTIMIZE": "1"}
    again = tmp_path / "again.pyz"
    subprocess.run([sys.executable, "-c", BUILD, again], check=True, env=env, cwd=tmp_path, umask=0o077)
    assert again.read_bytes() == pyz.read_bytes()
    if os.name == "posix":
        assert again.stat().st_mode & 0o777 == pyz.stat().st_mode & 0o777 == 0o755


def test_what_is_in_it(pyz: Path) -> None:
    assert pyz.read_bytes().startswith(b"#!/usr/bin/env python3\n")
    with zipfile.ZipFile(pyz) as archive:
        names = archive.namelist()
        assert archive.testzip() is None
        for name in (SOURCE.name, *seam.PACKED):
            assert archive.read(name) == (SOURCE.parent / name).read_bytes()
    assert names == sorted(names)
    assert not [name for name in names if name.endswith((".so", ".pyd", ".c")) or "/legacy/" in name]
    assert {name + "c" for name in names if name.endswith(".py")} == {name for name in names if name.endswith(".pyc")}
    for package in ("websockets", "tomli_w"):
        assert [name for name in names if name.startswith(package + "-") and "LICENSE" in name]


def test_the_result_is_what_was_written(
    tmp_path: Path, offline: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("PIP_NO_INDEX", "PIP_FIND_LINKS", "PIP_CONFIG_FILE"):
        monkeypatch.setenv(name, offline[name])
    (tmp_path / "x.pyz").write_text("an older one")
    result = build_zipapp(SOURCE, tmp_path / "x.pyz")
    content = (tmp_path / "x.pyz").read_bytes()
    assert (result.sha256, result.size_bytes) == (hashlib.sha256(content).hexdigest(), len(content))
    assert os.listdir(tmp_path) == ["x.pyz"]
    shown = render_build(result)
    assert str(result.path) in shown and f'sha256 = "{result.sha256}"' in shown and "[updater]" in shown


def test_version_is_answered_before_the_program_is_imported(pyz: Path) -> None:
    done = run(sys.executable, "-X", "importtime", pyz, "--version")
    assert (done.returncode, done.stdout) == (0, f"estelle-updater {seam.__version__}\n")
    assert not [name for name in ("estelle_updater", "dataclasses", "asyncio") if f" {name}\n" in done.stderr]
    other = run(sys.executable, "-X", "importtime", pyz, "no-such-command")
    assert " estelle_updater\n" in other.stderr  # else the line above proves nothing


@pytest.mark.skipif(os.name != "posix", reason="the executable bit is POSIX's")
def test_it_starts_by_its_own_name(pyz: Path) -> None:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    assert run(pyz, "--version", env={**os.environ, "PATH": path}).stdout.startswith("estelle-updater ")


@pytest.mark.parametrize("version", ["2.7", "3.6", "3.7", "3.8", "3.9", "3.10"])
def test_an_old_python_is_told_which_one_is_needed(pyz: Path, version: str) -> None:
    done = run(find_python(version), pyz, "trigger", "all", "master")
    assert (done.returncode, done.stdout) == (2, "")
    error, hint = done.stderr.splitlines()
    assert error.startswith("estelle-updater: error: Python 3.11 or newer is needed, and ") and version in error
    assert hint.startswith("hint: ")
    # the module by itself, in the same words; only 2.7 can't read it
    alone = run(find_python(version), SOURCE, "trigger", "all", "master")
    if version == "2.7":
        assert alone.returncode == 1 and "SyntaxError" in alone.stderr
        return
    assert (alone.returncode, alone.stdout) == (2, "")
    assert alone.stderr.replace(str(SOURCE), str(pyz)) == done.stderr


@pytest.mark.parametrize("version", ["3.11", "3.12", "3.13", "3.14"])
def test_every_python_runs_it_and_the_builders_own_uses_the_bytecode(pyz: Path, version: str) -> None:
    code = f"import sys; sys.path.insert(0, {str(pyz)!r}); import estelle_updater as e, websockets.asyncio.server; "
    code += (
        "print(e.__version__, websockets.__version__, e.__file__[-1]); assert 'importlib.metadata' not in sys.modules"
    )
    done = run(find_python(version), "-I", "-S", "-c", code)
    own = version == f"{sys.version_info[0]}.{sys.version_info[1]}"
    expected = f"{seam.__version__} {importlib.metadata.version('websockets')} {'c' if own else 'y'}\n"
    assert (done.returncode, done.stdout) == (0, expected), done.stderr


SAMPLE = '''"""About it."""

class Row:
    """A row."""
    size: int = 3

    def check(self, most: int, *rest: str, **more: str) -> int:
        """Is it?"""
        assert self.size < most, "too large"
        return most

def empty() -> None:
    """Nothing."""

async def later(at: float) -> None:
    "Not now."
    return None
'''


def test_bytecode_holds_nothing_that_only_readers_want() -> None:
    """Docstrings, the annotations of functions, and values for those of classes, whose text is enough; lines, asserts
    and a record's fields are as written."""
    code = marshal.loads(seam._compile(SAMPLE.encode(), SOURCE.name)[16:])
    names: dict[str, Any] = {"__name__": "sample"}
    exec(code, names)
    row = names["Row"]
    assert row.__annotations__ == {"size": "int"} and row.check.__annotations__ == {} == names["later"].__annotations__
    found = [code.co_consts, *(each.co_consts for each in code.co_consts if hasattr(each, "co_consts"))]
    assert not [text for consts in found for text in consts if isinstance(text, str) and text.endswith(".")]
    assert [row.__doc__, row.check.__doc__, names["empty"].__doc__, names["later"].__doc__] == [None] * 4
    assert row().check(4) == 4 and names["empty"]() is None
    with pytest.raises(AssertionError) as failed:
        row().check(3)
    assert (
        failed.traceback[-1].lineno + 1 == SAMPLE.splitlines().index('        assert self.size < most, "too large"') + 1
    )


FIELDS = """
import json, sys
sys.path.insert(0, sys.argv[1])
import estelle_updater as e
records = [e.JobRecord, e.RunRecord, e.Plan, e.Machine, e.SwitchEntry, e.Owner, *e.VERBS.values()]
print(json.dumps({record.__name__: [[field.name, field.type] for field in e.fields(record)] for record in records}))
"""


def test_what_is_decoded_is_judged_alike_from_source_and_packed(pyz: Path) -> None:
    """Annotations are values from source, and text in the bytecode."""
    said = [run(sys.executable, "-c", FIELDS, place).stdout for place in (SOURCE.parent, pyz)]
    source, packed = map(json.loads, said)
    assert source == packed
    assert ["marks", "list[list[int]]"] in source["JobRecord"] and ["exit", "int | None"] in source["JobRecord"]
    assert ["kind", "Kind"] in source["Submit"] and ["args", "dict[str, Any]"] in source["Ask"]


# What a daemon does in its life, none of which may touch the file that it came from.
LIFE = """
import asyncio, datetime, hashlib, json, os, socket, subprocess, sys, traceback, logging, warnings
import estelle_updater
if "preload" in sys.argv:
    estelle_updater.preload()
if "pack" in sys.argv:
    estelle_updater.SOURCES.pack()
pyz, how = sys.argv[1:3]
if how == "garbage":
    open(pyz, "r+b").write(os.urandom(300_000))
elif how == "truncated":
    open(pyz, "wb").close()
elif how == "another":
    os.replace(pyz + ".another", pyz)
else:
    os.remove(pyz)

async def talk():
    from websockets.asyncio.client import connect
    from websockets.asyncio.server import serve
    async def echo(ws):
        async for message in ws:
            await ws.send(message)
    async with serve(echo, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        async with connect(f"ws://127.0.0.1:{port}/", proxy=None) as ws:
            await ws.send("hello")
            assert await ws.recv() == "hello"
    await asyncio.to_thread(socket.getaddrinfo, "localhost", 80)
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", "print(1)", stdout=subprocess.PIPE)
    assert (await process.communicate())[0].strip() == b"1"

asyncio.run(talk())
try:
    estelle_updater.parse_script_block("")
except estelle_updater.UpdaterError:
    shown = traceback.format_exc()
    logging.exception("also by way of logging")
line = "raise UpdaterError(f\\"{len(blocks)} PEP 723 script blocks instead of one\\", hint)"
assert line in shown, shown
warnings.warn("and of warnings")
import tomllib, tomli_w, zipfile, urllib.request, ssl
assert tomllib.loads(tomli_w.dumps({"a": 1})) == {"a": 1}
datetime.datetime.strptime("2026", "%Y")
"x.example".encode("idna"), hashlib.sha256(json.dumps([1]).encode())
try:
    import websockets.no_such_module
except ModuleNotFoundError:
    pass
print("lived")
"""


@pytest.mark.parametrize("how", ["garbage", "truncated", "another", "removed"])
@pytest.mark.parametrize("bytecode", [True, False])
def test_a_running_one_may_be_replaced(pyz: Path, tmp_path: Path, how: str, bytecode: bool) -> None:
    """cpython#63281: a replaced zip breaks at the next import, and its tracebacks with it."""
    mine = tmp_path / "estelle_updater.pyz"
    with zipfile.ZipFile(pyz) as old, zipfile.ZipFile(mine, "w") as new:
        for name in old.namelist():
            if bytecode or not name.endswith(".pyc"):
                new.writestr(name, old.read(name))
    with zipfile.ZipFile(f"{mine}.another", "w", zipfile.ZIP_DEFLATED) as another:
        another.writestr("__main__.py", "# " + "x" * 5000)
        another.writestr("estelle_updater.py", "# nothing like the old one\n" * 2000)
    env = {**os.environ, "PYTHONPATH": str(mine)}
    later = ["pack"] if how in ("garbage", "another") else []
    done = run(sys.executable, "-S", "-c", LIFE, mine, how, "preload", *later, env=env, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, "lived\n"), done.stderr
    assert "nothing like the old one" not in done.stderr


# What a daemon holds of its own file: tracebacks' lines, and on a master what it hands out.
HELD = """
import hashlib, linecache, pathlib, sys, tracemalloc
import estelle_updater
estelle_updater.preload()
pyz, folder = map(pathlib.Path, sys.argv[1:])
sha256 = hashlib.sha256(pyz.read_bytes()).hexdigest()
tracemalloc.start()
handouts = []
for place in (folder, folder / "missing"):  # in the second, as on a full disk, no file can be made
    handouts.append(estelle_updater.Handout())
    handouts[-1].load(sha256, place)
    print(tracemalloc.get_traced_memory()[0] < pyz.stat().st_size / 10)
other = estelle_updater.Handout()
other.load("0" * 64, folder)
program = pyz.read_bytes()
pyz.write_bytes(b"another")
print(all(handout.program() == program for handout in handouts), other.sha256 == "", not any(folder.iterdir()))
print(all(len(entry) == 1 for entry in linecache.cache.values()), len(linecache.cache) > 20)
"""


def test_a_daemon_does_not_hold_its_own_file_in_memory(pyz: Path, tmp_path: Path) -> None:
    """Its sources are made lines of by who shows a traceback; what a master hands out is on disk where there is room,
    and the very program that runs, whatever becomes of the file."""
    mine = tmp_path / "estelle_updater.pyz"
    shutil.copy(pyz, mine)
    (tmp_path / "state").mkdir()
    env = {**os.environ, "PYTHONPATH": str(mine)}
    done = run(sys.executable, "-S", "-c", HELD, mine, tmp_path / "state", env=env, cwd=tmp_path)
    assert done.stdout.split() == ["True", "False", "True", "True", "True", "True", "True"], done.stdout + done.stderr


def test_without_preload_it_would_break(pyz: Path, tmp_path: Path) -> None:
    mine = Path(shutil.copy(pyz, tmp_path))
    env = {**os.environ, "PYTHONPATH": str(mine)}
    done = run(sys.executable, "-S", "-c", LIFE, mine, "garbage", env=env, cwd=tmp_path)
    assert done.returncode == 1 and "Error" in done.stderr


def test_preload_covers_every_import_of_a_package() -> None:
    """An import inside a function, of a module in the zip, would be the one that fails in a replaced daemon."""
    tree = ast.parse(SOURCE.read_text("utf-8"))
    wanted = {name for name in seam._LAZY_NAMES if name.startswith(("websockets", "tomli_w"))}
    for node in ast.walk(tree):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        wanted |= {name for name in names if name.split(".")[0] in ("websockets", "tomli_w")}
    code = "import sys, estelle_updater as e; e.preload(); print(*[n for n in sys.argv[1:] if n not in sys.modules])"
    done = run(sys.executable, "-c", code, *sorted(wanted), env={**os.environ, "PYTHONPATH": str(SOURCE.parent)})
    assert (done.returncode, done.stdout) == (0, "\n"), done.stderr
    only = "import sys, estelle_updater as e; e.preload('json'); print('asyncio' in sys.modules, 'json' in sys.modules)"
    done = run(sys.executable, "-c", only, env={**os.environ, "PYTHONPATH": str(SOURCE.parent)})
    assert done.stdout == "False True\n", done.stderr


def test_build_from_inside_a_pyz_is_refused(pyz: Path, tmp_path: Path) -> None:
    with pytest.raises(UpdaterError, match="source checkout"):
        build_zipapp(pyz / "estelle_updater.pyc", tmp_path / "x.pyz")


def failure(*python_options: str, output: Path, env: dict[str, str]) -> str:
    """The one line and the hint with which a build in another process ends."""
    code = (
        BUILD.replace("e.build_zipapp", "\ntry: e.build_zipapp")
        + "\nexcept e.UpdaterError as x: print(x.what, '|', x.hint)"
    )
    done = run(sys.executable, *python_options, "-c", code, output, env=env)
    assert (done.returncode, done.stdout.count("\n")) == (0, 1), done.stderr
    assert not output.exists()
    return done.stdout


def test_build_without_pip_and_uv_says_what_to_install(tmp_path: Path) -> None:
    env = {**os.environ, "PYTHONPATH": str(SOURCE.parent), "PATH": str(tmp_path)}
    assert "needs pip or uv" in failure("-S", output=tmp_path / "x.pyz", env=env)


def test_build_without_network_says_so(tmp_path: Path, offline: dict[str, str]) -> None:
    env = {name: value for name, value in offline.items() if name not in ("PIP_NO_INDEX", "PIP_FIND_LINKS")}
    nobody = {"PIP_INDEX_URL": "http://127.0.0.1:9/simple", "PIP_NO_CACHE_DIR": "1", "NO_PROXY": "*"}
    text = failure(output=tmp_path / "x.pyz", env={**env, **nobody})
    assert text.startswith("can't fetch websockets") and "network" in text


def test_build_refuses_compiled_packages(tmp_path: Path, offline: dict[str, str]) -> None:
    make_wheel("websockets", tmp_path / "wheels", compiled=True)
    make_wheel("tomli-w", tmp_path / "wheels")
    text = failure(output=tmp_path / "x.pyz", env={**offline, "PIP_FIND_LINKS": str(tmp_path / "wheels")})
    assert "holds compiled code" in text and "websockets" in text


def test_build_into_a_place_that_cannot_be_written(tmp_path: Path, offline: dict[str, str]) -> None:
    (tmp_path / "file").write_text("")
    assert failure(output=tmp_path / "none" / "x.pyz", env=offline).startswith(f"can't write {tmp_path}")
    assert sorted(os.listdir(tmp_path)) == ["file"]


def test_missing_packages_are_named_with_the_ways_to_get_them(tmp_path: Path) -> None:
    require_packages()  # this environment has them
    code = "import estelle_updater as e\ntry: e.require_packages()\n"
    code += "except e.UpdaterError as x: print(x.exit_code, x.what, '|', x.hint)"
    env = {**os.environ, "PYTHONPATH": f"{SOURCE.parent}{os.pathsep}{tmp_path}"}
    text = run(sys.executable, "-S", "-c", code, env=env).stdout
    assert text.startswith("2 websockets>=") and "not installed" in text
    assert "uv run estelle_updater.py" in text and "build" in text and "pip install 'websockets" in text
    (tmp_path / "websockets-10.4.dist-info").mkdir()
    (tmp_path / "websockets-10.4.dist-info" / "METADATA").write_text("Name: websockets\nVersion: 10.4\n")
    assert "10.4 is installed" in run(sys.executable, "-S", "-c", code, env=env).stdout
    assert issubclass(UsageError, UpdaterError)


def test_uv_runs_the_source(tmp_path: Path, offline: dict[str, str]) -> None:
    uv = shutil.which("uv") or str(Path(sys.executable).with_name("uv"))
    env = {**offline, "UV_CACHE_DIR": str(tmp_path / "cache"), "UV_PYTHON_DOWNLOADS": "never"}
    words = ["run", "--no-index", "--find-links", offline["PIP_FIND_LINKS"], "--python", sys.executable]
    done = run(uv, *words, SOURCE, "--version", env=env)
    assert (done.returncode, done.stdout) == (0, f"estelle-updater {seam.__version__}\n"), done.stderr
