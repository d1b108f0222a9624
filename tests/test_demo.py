"""`demo`: the whole story with real processes, and nothing left of it whenever and however it is ended."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.fleet import MODULE, clean_env, kill_processes_of, need, processes_of, run, wait_for
from tests.machines import Network
from tests.test_build import make_wheel

RUNNING = "It runs on"


class Stage:
    """A place where a demo runs: everything that it writes and starts mentions the folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.temp = folder / "tmp"
        self.temp.mkdir()
        self.env = clean_env(folder / "home") | {"TMPDIR": str(self.temp), "USER": "tester"}
        self.process: subprocess.Popen[bytes] | None = None
        self.output = folder / "output"

    def start(self, *argv: str | Path) -> subprocess.Popen[bytes]:
        with open(self.output, "wb") as output:
            self.process = subprocess.Popen(
                [str(word) for word in argv],
                cwd=self.folder,
                env=self.env,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        return self.process

    def seen(self) -> str:
        return self.output.read_text("utf-8", "replace")

    def wait_for_text(self, text: str) -> None:
        assert self.process
        ended = self.process.poll
        wait_for(lambda: text in self.seen() or ended() is not None, lambda: f"{text!r}\n{self.seen()}", 60)
        assert text in self.seen(), self.seen()

    def assert_nothing_left(self) -> None:
        assert sorted(self.temp.iterdir()) == []
        # A runner that was just being started finds nothing to do, and ends.
        wait_for(lambda: not processes_of(self.folder), lambda: f"no process left: {processes_of(self.folder)}")


@pytest.fixture
def stage(tmp_path: Path) -> Iterator[Stage]:
    need("git")
    one = Stage(tmp_path)
    yield one
    if one.process and one.process.poll() is None:
        one.process.kill()
        one.process.wait()
    kill_processes_of(tmp_path)


def offline_wheels(folder: Path) -> dict[str, str]:
    """What makes pip find the two packages in a folder, and look nowhere else."""
    make_wheel("websockets", folder)
    make_wheel("tomli-w", folder)
    return {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(folder), "PIP_CONFIG_FILE": os.devnull}


def bare_python() -> str:
    """The interpreter that the tests' environment was made with: mostly it has pip and no other package."""
    base = Path(sys.base_prefix, "bin", f"python3.{sys.version_info[1]}")
    has_pip = [str(base), "-c", "import pip"]
    return str(base) if base.exists() and not subprocess.run(has_pip, check=False).returncode else sys.executable


def test_tells_the_whole_story_from_a_checkout(stage: Stage):
    # What must not reach the demo: a real fleet's settings, a git hook's variables, the user's wish to sign commits.
    (stage.folder / "home/.gitconfig").write_text("[commit]\n\tgpgSign = true\n[core]\n\thooksPath = /nonexistent\n")
    foreign = {"ESTELLE_CONFIG": "/nonexistent", "ESTELLE_STATE": "/nonexistent", "ESTELLE_BIND": "127.0.0.9"}
    stage.env |= {**offline_wheels(stage.folder / "wheels"), **foreign, "GIT_DIR": "/nonexistent", "DEMO_PORT": "1"}
    process = stage.start(bare_python(), MODULE, "demo")
    assert process.wait(100) == 0, stage.seen()
    seen = stage.seen()
    for host in ("127.0.0.1", "127.0.0.2", "127.0.0.3"):
        assert f"[{host}] ✓ 완료 v0301_2\n" in seen
        assert f"[{host}] git fetch origin...\n" in seen
        assert re.search(rf"(?m)^{host}  .*  yes     master  [0-9a-f]{{7}}  v0301_3 ", seen)
    assert re.findall(r"\[(.*)\] ✗ 실패 .* \(exit 1\)\n", seen) == ["127.0.0.3"]
    assert "[127.0.0.3] error: DEMO_PORT is not set on this host\n" in seen
    assert "127.0.0.1 ✓ v0301_3  127.0.0.2 ✓ v0301_3  127.0.0.3 ✗ 실패 " in seen
    assert seen.count("welcomed by the master") == 2
    stage.assert_nothing_left()


def test_deploys_with_pnpm_where_it_is_and_can_be_hung_up(stage: Stage, pyz: Path):
    need("pnpm")
    process = stage.start(sys.executable, pyz, "demo", "--no-color")
    stage.wait_for_text("history")
    process.send_signal(signal.SIGHUP)
    assert process.wait(30) == 130, stage.seen()
    assert stage.seen().count("pnpm deploy:release...\n") == 6
    assert "] ✗ 실패 pnpm deploy:release (exit 1)\n" in stage.seen()
    stage.assert_nothing_left()


def test_a_pnpm_that_does_not_start_is_not_used(stage: Stage, pyz: Path):
    shim = stage.folder / "bin" / "pnpm"
    shim.parent.mkdir()
    shim.write_text("#!/bin/sh\nexit 1\n")
    shim.chmod(0o755)
    stage.env["PATH"] = f"{shim.parent}{os.pathsep}{stage.env['PATH']}"
    stage.start(sys.executable, pyz, "demo")
    stage.wait_for_text("deploy.py...\n")
    assert "pnpm is not installed" in stage.seen()


def test_keep_prints_commands_that_work_and_ends_with_ctrl_c(stage: Stage, pyz: Path):
    process = stage.start(sys.executable, pyz, "demo", "--keep")
    stage.wait_for_text("Ctrl-C here ends")
    lines = re.findall(r"(?m)^  (\S.*)$", stage.seen().partition(RUNNING)[2])
    assert [line.split()[0] for line in lines] == ["cd", "export", "python3", "python3"]
    python = f'python3() {{ {shlex.quote(sys.executable)} "$@"; }}'  # the machine's own may be older
    code, out, err = run(["bash", "-ec", "\n".join([python, *lines])], stage.env)
    assert code == 1, err  # 127.0.0.3 still has no DEMO_PORT
    assert re.search(r"(?m)^127\.0\.0\.2 .* agent ", out)
    assert "[127.0.0.3] ✗ 실패 " in out
    long = """echo 'import time; time.sleep(600)' > developer/deploy.py
        git -C developer commit -qam 'A long one' && git -C developer push -q
        python3 estelle_updater.pyz trigger --detach all master"""
    code, _, err = run(["bash", "-ec", "\n".join([python, *lines[:2], long])], stage.env)
    assert code == 0, err

    def at_work() -> int:
        return sum(bool(re.match(r"\S*python\S* deploy\.py", line)) for line in processes_of(stage.folder).values())

    wait_for(lambda: at_work() == 3, lambda: f"all three deploy: {processes_of(stage.folder)}")
    process.send_signal(signal.SIGINT)
    assert process.wait(30) == 0, stage.seen()
    stage.assert_nothing_left()


MOMENTS = [
    ("127.0.0.2/app", signal.SIGTERM),  # git clones
    ("serve --bind 127.0.0.3", signal.SIGINT),  # daemons start
]


@pytest.mark.parametrize(("moment", "number"), MOMENTS)
def test_nothing_is_left_after_a_signal(stage: Stage, pyz: Path, moment: str, number: signal.Signals):
    process = stage.start(sys.executable, pyz, "demo")
    stage.wait_for_text(moment)
    process.send_signal(number)
    assert process.wait(30) == 130, stage.seen()
    assert "All of this took" not in stage.seen()
    stage.assert_nothing_left()


def test_a_second_signal_does_not_stop_the_tidying(stage: Stage, pyz: Path):
    process = stage.start(sys.executable, pyz, "demo")
    stage.wait_for_text("installing ...")  # runners are at work
    process.send_signal(signal.SIGTERM)
    stage.wait_for_text("The demo ends")
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGINT)
    assert process.wait(30) == 130, stage.seen()
    stage.assert_nothing_left()


def test_a_build_is_interrupted_together_with_its_pip(stage: Stage):
    silent = stage.folder / "pip-starts"
    fake = stage.folder / "lib" / "pip"  # stands for a pip whose package index never answers
    fake.mkdir(parents=True)
    (fake / "__init__.py").touch()
    (fake / "__main__.py").write_text(f"import time; open({str(silent)!r}, 'w'); time.sleep(600)")
    stage.env["PYTHONPATH"] = str(fake.parent)
    process = stage.start(sys.executable, MODULE, "demo")
    wait_for(silent.exists, lambda: f"pip runs\n{stage.seen()}")
    process.send_signal(signal.SIGINT)
    assert process.wait(30) == 130, stage.seen()
    stage.assert_nothing_left()


def test_a_reader_that_goes_away_ends_it(stage: Stage, pyz: Path):
    words = f"{shlex.quote(sys.executable)} {shlex.quote(str(pyz))} demo"
    code, out, _ = run(["bash", "-o", "pipefail", "-c", f"{words} | grep -m1 -F 'installing ...'"], stage.env)
    assert (code, out.count("\n")) == (130, 1)
    stage.assert_nothing_left()


@pytest.fixture
def terminal(stage: Stage) -> Iterator[Callable[..., str]]:
    """tmux with a server of its own: `terminal(word, ...)` is one of its commands, and returns its output."""
    need("tmux")

    def tmux(*words: str) -> str:
        socket = str(stage.folder / "tmux")
        return run(["tmux", "-S", socket, "-f", os.devnull, *words], stage.env | {"TERM": "xterm"}).out

    yield tmux
    tmux("kill-server")


def test_ctrl_c_in_a_terminal(stage: Stage, pyz: Path, terminal: Callable[..., str]):
    words = f"{shlex.quote(sys.executable)} {shlex.quote(str(pyz))} demo; echo ended with $?; cat"
    terminal("new-session", "-d", "-x", "200", "-y", "500", words)

    def screen() -> str:
        return terminal("capture-pane", "-p")

    # the block, with all three at work
    wait_for(lambda: re.search(r"(?m)^deploy master on all  3 running(.*\n)+▸ 127\.0\.0\.3 ", screen()), screen, 60)
    terminal("send-keys", "C-c")
    wait_for(lambda: "ended with" in screen(), screen, 30)
    assert "ended with 130" in screen()
    assert "the deployment goes on; follow it" not in screen()  # Ctrl-C reached the demo alone
    terminal("kill-server")
    stage.assert_nothing_left()


def test_a_terminal_that_is_closed(stage: Stage, pyz: Path, terminal: Callable[..., str]):
    terminal("new-session", "-d", "-x", "200", "-y", "500", f"{shlex.quote(sys.executable)} {pyz} demo")
    wait_for(lambda: "building ..." in terminal("capture-pane", "-p"), "the deployment runs", 60)
    terminal("kill-server")
    wait_for(lambda: not processes_of(stage.folder), lambda: f"no process left: {processes_of(stage.folder)}", 30)
    stage.assert_nothing_left()


def test_without_the_other_loopback_addresses_the_master_is_alone(
    stage: Stage, pyz: Path, netns: Callable[[int], Network]
):
    network = netns(1)
    for words in (("del", "127.0.0.1/8"), ("add", "127.0.0.1/32")):
        assert network.run(1, ["ip", "addr", *words, "dev", "lo"]).code == 0
    process = stage.start(*network.prefix(1), sys.executable, pyz, "demo")
    assert process.wait(100) == 0, stage.seen()
    assert stage.seen().count("Without 127.0.0.2 and 127.0.0.3, which this machine lacks") == 1
    assert "[127.0.0.1] ✓ 완료 v0301_2\n" in stage.seen()
    stage.assert_nothing_left()


def test_has_no_json_form(stage: Stage):
    code, out, err = run([sys.executable, MODULE, "demo", "--json"], stage.env)
    assert (code, out) == (2, "")
    assert '"event": "error"' in err
    stage.assert_nothing_left()


def test_without_git_it_says_so(stage: Stage, pyz: Path):
    stage.env["PATH"] = str(stage.folder)
    code, _, err = run([sys.executable, pyz, "demo"], stage.env)
    assert code == 1
    assert "estelle-updater: error: git: not found in PATH\n" in err
    stage.assert_nothing_left()
