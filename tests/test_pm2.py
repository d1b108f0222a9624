"""`pm2.config.js` under a real PM2: start, restart, logs, and deployments that outlive a restart of their daemon."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests import seam as est
from tests.commands import Watched, lines_of
from tests.fleet import MODULE, ROOT, VERSION, Fleet, Host, Result, need, run, wait_for

SERVICE = "estelle-updater"
ROUNDS = int(os.environ.get("ESTELLE_SELF_ROUNDS", "1"))
# Waits for the word to go on, so that the test knows that it runs; then shows that it was not disturbed.
WAITING = "echo begun; while ! [ -e ../go ]; do sleep 0.1; done; echo went on\n"


class Pm2:
    """A PM2 of its own, which runs one host's daemon by the repository's own file."""

    def __init__(self, fleet: Fleet, host: Host, folder: Path, program: Path) -> None:
        self.host = host
        self.folder = folder
        (folder / "bin").mkdir(parents=True)
        python = folder / "bin" / "python3"  # the name that the file asks for; the machine's own may be older
        python.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} "$@"\n')
        python.chmod(0o755)
        shutil.copy(ROOT / "pm2.config.js", folder)
        shutil.copy(program, folder)
        self.env = fleet.env | {
            "PM2_HOME": str(folder / "home"),
            "PATH": f"{folder / 'bin'}:{fleet.env['PATH']}",
            "ESTELLE_BIND": host.address,
            "ESTELLE_STATE": str(host.state),
        }

    def __call__(self, *words: str, cwd: Path | None = None) -> Result:
        return run(["pm2", *words], self.env, cwd or self.host.repo)

    def service(self) -> dict[str, Any]:
        """What PM2 knows of the service."""
        found = [one for one in json.loads(self("jlist").out.splitlines()[-1]) if one["name"] == SERVICE]
        assert len(found) == 1
        return dict(found[0])

    def log(self) -> str:
        """What the daemon wrote, as PM2 keeps it."""
        path = self.folder / "home" / "logs" / f"{SERVICE}-error.log"
        return path.read_text("utf-8") if path.exists() else ""

    def wait_welcomed(self, times: int = 1) -> None:
        wait_for(lambda: self.log().count("welcomed by the master") >= times, lambda: f"welcome {times}\n{self.log()}")


@pytest.fixture
def under_pm2(fleet: Callable[..., Fleet], tmp_path: Path, pyz: Path) -> Iterator[tuple[Fleet, Pm2]]:
    """A master as usual, and an agent that is yet to be started by PM2."""
    need("pm2", "node")
    one = fleet(hosts=2, start=False)
    one.start(one.master)
    pm2 = Pm2(one, one.agents[0], tmp_path / "pm2", pyz)
    yield one, pm2
    pm2("kill")


def test_starts_shows_logs_restarts_and_stops(under_pm2: tuple[Fleet, Pm2], tmp_path: Path):
    fleet, pm2 = under_pm2
    pm2.env["ESTELLE_REPO"] = str(pm2.host.repo.relative_to(tmp_path))
    code, out, err = pm2("start", str(pm2.folder / "pm2.config.js"), cwd=tmp_path)
    assert code == 0, out + err
    pm2.wait_welcomed()
    service = pm2.service()
    assert service["pm2_env"]["pm_cwd"] == str(pm2.host.repo)
    assert service["pm2_env"]["pm_exec_path"].endswith("estelle_updater.pyz")
    assert "welcomed by the master" in pm2("logs", SERVICE, "--nostream").out
    del pm2.env["ESTELLE_REPO"]
    assert pm2("restart", SERVICE, "--update-env", cwd=tmp_path).code == 0  # from elsewhere
    pm2.wait_welcomed(2)
    assert pm2.service()["pid"] != service["pid"]
    assert "stopping on SIGINT" in pm2.log()  # it was asked, not killed
    assert fleet.cli("trigger", pm2.host.address, "master").code == 0
    assert pm2("stop", SERVICE).code == 0
    assert pm2.service()["pm2_env"]["status"] == "stopped"
    assert not (pm2.host.state / "daemon.json").exists()  # it ended by itself, in order


@pytest.mark.parametrize("who", ["operator", "deployment"])
def test_a_deployment_survives_a_restart(under_pm2: tuple[Fleet, Pm2], who: str):
    """ESTELLE_PM2_ROUNDS=20 for as many rounds; the operator's go through everything that PM2 can do to a service."""
    fleet, pm2 = under_pm2
    assert pm2("start", str(pm2.folder / "pm2.config.js")).code == 0  # in the repository, without ESTELLE_REPO
    pm2.wait_welcomed()
    assert pm2("save").code == 0
    go, runs = pm2.host.repo.parent / "go", pm2.host.state / "runs"
    if who == "operator":
        fleet.origin.commit({"deploy.sh": WAITING})
    else:  # PM2 calls are made with the environment of a deployment, which keeps PM2_HOME
        fleet.origin.commit({"deploy.sh": f"pm2 restart {SERVICE} || exit 9\n{WAITING}"})
    ways: tuple[tuple[tuple[str, ...], ...], ...] = (
        (("restart", SERVICE),),
        (("reload", SERVICE),),
        (("stop", SERVICE), ("start", SERVICE)),
        (("kill",), ("resurrect",)),
    )

    def begun() -> bool:
        return any("begun" in one.read_text() for one in {*runs.glob("*/*.log")} - done)

    for number in range(int(os.environ.get("ESTELLE_PM2_ROUNDS", "4" if who == "operator" else "1"))):
        go.unlink(missing_ok=True)
        welcomes, done = pm2.log().count("welcomed by the master"), set(runs.glob("*/*.log"))
        trigger = fleet.popen("trigger", pm2.host.address, "master")
        wait_for(begun, pm2.log)
        if who == "operator":
            for words in ways[number % len(ways)]:
                assert pm2(*words).code == 0, words
        pm2.wait_welcomed(welcomes + 1)
        go.touch()
        out, err = trigger.communicate(timeout=60)
        assert trigger.returncode == 0, (number, out, err)
        assert f"[{pm2.host.address}] went on\n[{pm2.host.address}] ✓ 완료 ".encode() in out


@pytest.mark.timeout(120 * (1 + ROUNDS))
def test_a_deployment_replaces_its_program_and_restarts_its_service(
    under_pm2: tuple[Fleet, Pm2], tmp_path: Path, pyz: Path
):
    """On the master and on an agent at once, by what a project would write in its deployment."""
    fleet, of_agent = under_pm2
    fleet.stop(fleet.master)
    of_master = Pm2(fleet, fleet.master, tmp_path / "pm2-master", pyz)
    try:
        for pm2 in (of_master, of_agent):
            assert pm2("start", str(pm2.folder / "pm2.config.js")).code == 0
        shutil.copy(pyz, tmp_path / "new.pyz")
        with zipfile.ZipFile(tmp_path / "new.pyz", "a") as archive:
            archive.comment = b"another build"
        replace = 'cat ../../new.pyz > "$PM2_HOME/../estelle_updater.pyz"'
        fleet.origin.commit({"deploy.sh": f"seq 1 99\n{replace}\npm2 restart {SERVICE} || exit 9\nseq 100 200\n"})
        for _ in range(ROUNDS):
            fleet.wait_online()
            watched = Watched(fleet, "trigger", "all", "master")
            assert watched.end(120) == 0, watched.out + watched.err
            for host in fleet.hosts:
                said = lines_of(watched.out, host.address)
                assert [line for line in said if line.isdigit()] == [str(number) for number in range(1, 201)]
                assert said[-1] == f"✓ 완료 {VERSION}"
    finally:
        of_master("kill")


def test_comes_up_by_itself_once_the_configuration_is_there(under_pm2: tuple[Fleet, Pm2]):
    _, pm2 = under_pm2
    config = pm2.host.config.read_bytes()
    pm2.host.config.unlink()
    assert pm2("start", str(pm2.folder / "pm2.config.js")).code == 0
    wait_for(lambda: pm2.log().count("no config/updater.json") >= 3, lambda: pm2.log(), 30)
    wait_for(lambda: pm2.service()["pm2_env"]["status"] == "waiting restart", "PM2 has patience")
    wait_for(lambda: pm2.service()["pm2_env"]["prev_restart_delay"] >= 1100, "and more of it each time")
    pm2.host.config.write_bytes(config)
    pm2.wait_welcomed()


def test_without_a_zipapp_beside_it_runs_the_checkout(under_pm2: tuple[Fleet, Pm2]):
    _, pm2 = under_pm2
    (pm2.folder / "estelle_updater.pyz").unlink()
    shutil.copy(MODULE, pm2.folder)
    assert pm2("start", str(pm2.folder / "pm2.config.js")).code == 0
    pm2.wait_welcomed()


@pytest.mark.parametrize(("platform", "python"), [("win32", "python"), ("linux", "python3"), ("darwin", "python3")])
def test_the_interpreter_has_the_platform_s_name(platform: str, python: str):
    need("node")
    script = f"""Object.defineProperty(process, 'platform', {{value: {platform!r}}});
        console.log(JSON.stringify(require({str(ROOT / "pm2.config.js")!r})))"""
    (app,) = json.loads(run(["node", "-e", script], {"PATH": os.environ["PATH"]}, ROOT).out)["apps"]
    assert (app["name"], app["args"], app["interpreter"]) == (SERVICE, "serve", python)
    assert app["watch"] is False


def test_a_process_must_stay_online_in_one_life(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """By its name, and by the ecosystem file that started it; no PM2 is started for the question."""
    need("pm2")
    env = {**os.environ, "PM2_HOME": str(tmp_path / "home"), "HOME": str(tmp_path)}

    def judge(text: str, before: frozenset[str] = frozenset()) -> str:
        try:
            return est.require_settled(est.parse_service(text), 1, env, before=before)
        except est.UpdaterError as problem:
            return problem.what

    assert judge("pm2:steady").startswith("PM2 does not run: there is no ")
    assert not (tmp_path / "home").exists()
    (tmp_path / "steady.js").write_text("setInterval(() => {}, 1000)\n")
    (tmp_path / "dying.js").write_text("setTimeout(() => process.exit(1), 300)\n")
    (tmp_path / "calm.js").write_text("setInterval(() => {}, 1000)\n")
    apps = [
        {"name": name, "script": f"{name}.js", "exp_backoff_restart_delay": 50} for name in ("steady", "calm", "dying")
    ]
    for name in ("one", "both"):
        chosen = apps[:2] if name == "one" else apps
        (tmp_path / f"{name}.config.cjs").write_text(f"module.exports = {json.dumps({'apps': chosen})}\n")
    try:
        for file, wanted in (("one.config.cjs", "steady online, calm online"), ("both.config.cjs", "dying")):
            before = est.pm2_lives(env)
            (step, save) = est.plan_restart((f"pm2:{file}",))
            assert save.argv == ("pm2", "save")
            assert run(step.argv, env, tmp_path).code == 0
            assert wanted in judge(f"pm2:{file}", before)
        # what the clock says by now, or said when PM2 read it, neither hides what was started nor ages it
        for by_s in (-9 * 3600.0, 9 * 3600.0):
            before = est.pm2_lives(env)
            (step, _) = est.plan_restart(("pm2:both.config.cjs",))
            assert run(step.argv, env, tmp_path).code == 0
            with monkeypatch.context() as clock:
                real = time.time
                clock.setattr(time, "time", lambda: real() + by_s)  # noqa: B023
                assert "dying" in judge("pm2:both.config.cjs", before)
                assert "dying" in judge("pm2:dying")
        assert judge("pm2:steady") == "online"
        assert "dying" in judge("pm2:dying")
        assert judge("pm2:nobody") == "PM2 has no process nobody"
        check = est.HealthRule(name="x", pm2="steady")
        assert est.run_checks([check], tmp_path, env, 1)[0]["ok"]
    finally:
        run(["pm2", "kill"], env, tmp_path)
