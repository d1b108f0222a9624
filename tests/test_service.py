"""The service under a real systemd, as `setup` installs it: the system's and a user's own, with real deployments."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests import seam as est
from tests.fleet import ROOT, Fleet, Host, Result, need, replace_program, run, unavailable, wait_for
from tests.systemd_lab import PYTHON, Lab

HOMES = "/home"  # of the lab
HOME = f"{HOMES}/deployer"
_ARGV = ["/usr/bin/python3", "/opt/estelle-updater/estelle_updater.pyz", "serve"]
_PATH = "/usr/local/bin:/usr/bin:/bin"
_WRITABLE = ("/srv/estelle", "/opt/estelle-updater", "-/var/lib/estelle", "/tmp", "/var/tmp")
EXAMPLES: dict[
    str, tuple[list[str], str, str, str | None, tuple[str, ...]]
] = {  # what lies in the repository is what `setup` would write for these
    "systemd/estelle-updater.service": (_ARGV, "/srv/estelle", _PATH, "estelle", _WRITABLE),
    "systemd/user/estelle-updater.service": (_ARGV, "/srv/estelle", _PATH, None, ()),
}
# An application with a dependency, a build, and a deployment that can be held up: its temporary file comes only then.
_MAKE = r"""set -e
git config --global user.name Tester; git config --global user.email tester@example.invalid
git init -q --bare -b master origin.git; git clone -q origin.git seed 2>&1; cd seed; mkdir config lib
echo '{"name": "lib", "version": "1.0.0", "main": "lib.js"}' >lib/package.json
echo 'module.exports = 42' >lib/lib.js
cat >package.json <<'END'
{"name": "app", "private": true, "dependencies": {"lib": "file:./lib"},
 "scripts": {"build": "node build.js", "deploy:release": "pnpm install && pnpm build && sh wait.sh"}}
END
echo 'require("fs").writeFileSync("dist.txt", String(require("lib")))' >build.js
echo 'while [ -e ../hold ]; do echo begun; sleep 0.1; done; mktemp >/dev/null && echo went on' >wait.sh
echo '{"masterUrl": "ws://127.0.0.1:9900", "whitelist": ["127.0.0.1", "127.0.0.2"]}' >config/updater.json
printf 'node_modules\ndist.txt\n' >.gitignore
git add -A; git commit -qm first; git push -q
"""


class Site:
    """A lab with a master as a system service of `deployer`, and an agent as the user's own service of `other`."""

    def __init__(self, lab: Lab) -> None:
        self.lab = lab
        self.path = "PATH=/opt/node_modules/.bin:/usr/bin:/bin"
        lab.add_user("deployer")
        lab.add_user("other")
        lab.ok("sh", "-c", _MAKE, user="deployer")
        lab.ok("chmod", "-R", "o+rX", HOME)
        for user in ("deployer", "other"):
            lab.ok("git", "config", "--global", "--add", "safe.directory", "*", user=user)
            lab.ok("git", "clone", "-q", f"{HOME}/origin.git", "app", user=user)
        rule = {"restart": ["app"]}
        self.change({"hosts": {"127.0.0.1": {"command": ["pnpm", "deploy:release"]}}, "deploy": rule})
        lab.write("/etc/systemd/system/app.service", "[Service]\nExecStart=sleep 86400\n")
        # A service of one's own may restart units only where root has allowed it
        rule_text = est.render_polkit("other", ["app.service"])
        lab.write("/etc/polkit-1/rules.d/60-other.rules", rule_text)
        lab.systemctl("daemon-reload")

    def change(self, more: dict[str, object]) -> None:
        """Commit settings, and have both clones at them."""
        path = self.lab.path(f"{HOME}/seed/config/updater.json")
        path.write_text(json.dumps(json.loads(path.read_text()) | more))
        self.lab.ok("sh", "-c", "cd seed && git commit -qam settings && git push -q", user="deployer")
        for user in ("deployer", "other"):
            self.lab.ok("git", "-C", "app", "pull", "-q", user=user)

    def est(self, *words: str, user: str = "deployer") -> Result:
        """Run a command of the program as a user, from that user's clone; as root from the deployer's."""
        repo = f"{HOME}/app" if user in ("deployer", "") else f"/home/{user}/app"
        words = ("env", self.path, f"ESTELLE_REPO={repo}", PYTHON, "/opt/estelle/estelle_updater.pyz", *words)
        return self.lab.run(*words, user=user, timeout_s=100)

    def hold(self, user: str) -> None:
        self.lab.ok("touch", f"/home/{user}/hold", user=user)

    def release(self, user: str) -> None:
        self.lab.ok("rm", f"/home/{user}/hold", user=user)

    def deploy(self, target: str, state: str) -> str:
        """Start a deployment that is held up; its id once it waits."""
        code, out, err = self.est("trigger", target, "master", "--detach", "--wait", "60")
        assert code == 0, err
        log = self.lab.path(f"{state}/runs/{out.strip()}/{target}.log")
        wait_for(lambda: log.exists() and "begun" in log.read_text(), lambda: self.lab.journal("-n", "50"))
        return out.strip()


SYSTEM_STATE, USER_STATE = "/var/lib/estelle-updater", f"{HOMES}/other/.local/state/estelle-updater"


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory, pyz: Path) -> Iterator[Site]:
    need("pnpm", "node", "git")
    if not Path(PYTHON).exists() or run([PYTHON, "-c", "import sys; sys.exit(sys.version_info < (3, 11))"], {}).code:
        unavailable(f"no {PYTHON} of 3.11 or newer")
    pnpm = Path(shutil.which("pnpm") or "").resolve()
    modules = [folder for folder in pnpm.parents if folder.name == "node_modules"][-1]
    program = tmp_path_factory.mktemp("program")
    program.chmod(0o755)
    shutil.copy(pyz, program / "estelle_updater.pyz")
    with Lab(tmp_path_factory.mktemp("lab"), binds={modules: "/opt/node_modules", program: "/opt/estelle"}) as lab:
        site = Site(lab)
        result = site.est("setup", "--with", "systemd", user="")
        assert result.code == 0, result.out + result.err + lab.journal()
        assert "the master listens as 127.0.0.1" in result.out
        result = site.est("--bind", "127.0.0.2", "setup", "--with", "systemd", user="other")
        assert result.code == 0, result.out + result.err + lab.journal()
        assert "the agent has been welcomed by the master as 127.0.0.2" in result.out
        yield site


pytestmark = pytest.mark.xdist_group("systemd")


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_unit_in_the_repository_is_what_setup_writes(name: str) -> None:
    assert (ROOT / name).read_text("utf-8") == est.render_unit(*EXAMPLES[name])


def test_the_system_s_service_is_strict() -> None:
    need("systemd-analyze")
    unit = str(ROOT / "systemd/estelle-updater.service")
    code, out, err = run(["systemd-analyze", "security", "--offline=true", "--threshold=20", unit], os.environ)
    assert code == 0, out + err
    print(out.splitlines()[-1])


def test_deploys_with_pnpm_and_restarts_the_listed_unit(site: Site) -> None:
    code, out, err = site.est("trigger", "127.0.0.1", "master")
    assert code == 0, out + err + site.lab.journal("-n", "50")
    assert "[127.0.0.1] went on" in out
    assert "[127.0.0.1] systemctl restart app..." in out
    assert site.lab.path(f"{HOME}/app/dist.txt").read_text() == "42"
    assert site.lab.show("app", "ActiveState") == "active"
    denied = site.lab.run("systemctl", "--no-ask-password", "restart", "systemd-journald", user="deployer")
    assert denied.code != 0, "the rule is for the listed unit alone"


@pytest.mark.parametrize(
    ("user", "unit_of", "target", "state"),
    [("deployer", "", "127.0.0.1", SYSTEM_STATE), ("other", "other", "127.0.0.2", USER_STATE)],
    ids=["system", "user"],
)
def test_a_deployment_outlives_a_restart_and_a_stop(
    site: Site, user: str, unit_of: str, target: str, state: str
) -> None:
    lab = site.lab
    pid = lab.show("estelle-updater", "MainPID", unit_of)
    site.hold(user)
    name = site.deploy(target, state)
    assert lab.systemctl("restart", "estelle-updater", user=unit_of).code == 0
    assert lab.show("estelle-updater", "MainPID", unit_of) not in ("0", pid)
    assert lab.systemctl("stop", "estelle-updater", user=unit_of).code == 0
    assert lab.show("estelle-updater", "ActiveState", unit_of) == "inactive"
    assert not lab.path(f"{state}/daemon.json").exists(), "it ended by itself, in order"
    site.release(user)
    job = lab.path(f"{state}/runs/{name}/{target}.json")
    wait_for(lambda: json.loads(job.read_text())["state"] == "succeeded", job.read_text)
    assert lab.systemctl("start", "estelle-updater", user=unit_of).code == 0
    wait_for(lambda: site.est("logs", name, "-f").code == 0, lambda: str(site.est("logs", name)))
    assert f"[{target}] went on\n[{target}] systemctl restart app...\n" in site.est("logs", name).out


UNITS = {
    "steady": "ExecStart=sleep 86400\n[Unit]\nStartLimitIntervalSec=0\n",
    "dies": "ExecStart=sh -c 'sleep 0.4; exit 3'\n",
    "loops": "ExecStart=sh -c 'sleep 0.4; exit 3'\nRestart=always\nRestartSec=0.1\n[Unit]\nStartLimitIntervalSec=0\n",
}


@pytest.fixture
def units(site: Site) -> Iterator[Callable[..., Result]]:
    """Units of the system's and of the user's own, restarted one alone by each host's agent."""
    lab, before = site.lab, {"deploy": {"restart": ["app"]}}
    for name, text in UNITS.items():
        lab.write(f"/etc/systemd/system/{name}.service", f"[Service]\n{text}")
        lab.write(f"{HOMES}/other/.config/systemd/user/{name}.service", f"[Service]\n{text}")
    lab.ok("chown", "-R", "other:", f"{HOMES}/other/.config")
    own = [f"{name}.service" for name in UNITS]
    lab.write("/etc/polkit-1/rules.d/61-deployer.rules", est.render_polkit("deployer", own))
    lab.systemctl("daemon-reload")
    lab.systemctl("daemon-reload", user="other")
    checks = [{"name": name, "systemd": f"user:{name}", "hosts": ["127.0.0.2"]} for name in UNITS]
    rule = {"restart": ["app", *own, *(f"user:{name}" for name in UNITS)], "settle": 2}
    site.change({"deploy": rule, "health": checks})

    def restart(target: str, name: str) -> Result:
        return site.est("trigger", target, "master", "--only", name)

    wait_for(lambda: restart("127.0.0.1", "steady.service").code == 0, lambda: lab.journal("-n", "50"))
    yield restart
    site.change({**before, "health": []})


def judge_restarts(site: Site, units: Callable[..., Result], target: str, names: tuple[str, str, str]) -> None:
    """One that stays up, one that dies after a moment, one that loops; and the first, restarted by somebody else."""
    lab, (steady, dies, loops) = site.lab, names
    user = "other" if "user:" in steady else ""
    code, out, err = units(target, steady)
    assert code == 0 and f"{steady} is active, for 2 s in one life" in out, out + err
    assert "restart app" not in out and "restart dies" not in out, "this one alone"
    code, out, err = units(target, dies)
    assert code == 1 and "failed (exit-code)" in out + err and f"✗ 실패 restart {dies}" in out, out + err
    code, out, err = units(target, loops)
    assert code == 1 and f"✗ 실패 restart {loops}" in out, out + err
    assert re.search(r"was started again within 2 s|activating|failed", out + err), out + err
    lab.systemctl("stop", "loops", user=user)

    run_of = site.est("trigger", target, "master", "--only", steady, "--detach").out.strip()
    job = lab.path(f"{USER_STATE if user else SYSTEM_STATE}/runs/{run_of}/{target}.json")
    log = job.with_suffix(".log")
    wait_for(lambda: log.exists() and "\nactive\n" in log.read_text(), "it is restarted, and looked at from now on")
    while json.loads(job.read_text())["state"] == "running":
        # again and again: only what comes after the first look is another life
        lab.systemctl("restart", "steady", user=user)
        time.sleep(0.5)
    code, out, err = site.est("logs", run_of, "-f")
    assert code == 1 and f"✗ 실패 restart {steady}" in out, out + err
    assert re.search(r"was started again within 2 s|activating|inactive", out + err), out + err


def test_a_unit_is_active_when_it_stays_so(site: Site, units: Callable[..., Result]) -> None:
    """The system's units by polkit's leave, and the user's own."""
    judge_restarts(site, units, "127.0.0.1", ("steady.service", "dies.service", "loops.service"))
    judge_restarts(site, units, "127.0.0.2", ("user:steady", "user:dies", "user:loops"))
    lab = site.lab
    lab.systemctl("restart", "steady", "loops", user="other")
    code, out, err = site.est("health", "127.0.0.2")
    assert code == 1, out + err
    for name, mark in (("steady", "✓"), ("dies", "✗"), ("loops", "✗")):
        assert re.search(rf"{mark} +127\.0\.0\.2 +{name}\b", out), out
    lab.systemctl("stop", "loops", user="other")


def test_status_text_and_priorities(site: Site) -> None:
    lab = site.lab
    assert lab.show("estelle-updater", "StatusText") == "master: listening on all addresses port 9900"
    welcomed = re.compile(r"agent: welcomed as 127\.0\.0\.2 by ws://127\.0\.0\.1:9900/?")
    wait_for(
        lambda: welcomed.fullmatch(lab.show("estelle-updater", "StatusText", "other")), "the user's service says so"
    )
    refuse = "import socket; s = socket.create_connection(('127.0.0.1', 9900), 5, ('127.0.0.9', 0));"
    lab.ok(PYTHON, "-c", f"{refuse} s.send(b'GET / HTTP/1.1\\r\\nHost: 127.0.0.1\\r\\n\\r\\n'); s.recv(99)")

    def lines() -> list[dict[str, str]]:
        out = lab.journal("-u", "estelle-updater", "-o", "json")
        return [json.loads(line) for line in out.splitlines()]

    found = {
        line["PRIORITY"]: line["MESSAGE"]
        for line in lines()
        if re.match("refused 127.0.0.9|listening", line["MESSAGE"])
    }
    assert found["4"].startswith("refused 127.0.0.9: ")
    assert found["6"] == "listening on all addresses port 9900"


@pytest.mark.parametrize("how", ["stopped", "blocked"])
def test_the_watchdog_replaces_a_daemon_that_hangs(site: Site, how: str) -> None:
    lab, unit = site.lab, "estelle-updater"
    hang = "import sys, time; sys.path[0] = '/opt/estelle/estelle_updater.pyz'\nimport estelle_updater as est, os\n"
    hang += "def look(self):\n    if os.path.exists('../hang'):\n        os.unlink('../hang')\n"
    hang += "        time.sleep(3600)\nest.ConfigFile.reload = look\nsys.exit(est.main(['serve']))\n"
    lab.write("/opt/hang.py", hang)
    drop_in = "[Service]\nWatchdogSec=2\nTimeoutStopSec=2\nRestartSec=100ms\n"
    if how == "blocked":
        drop_in += f"ExecStart=\nExecStart={PYTHON} /opt/hang.py\n"
    lab.write(f"/run/systemd/system/{unit}.service.d/test.conf", drop_in)
    try:
        lab.systemctl("daemon-reload")
        assert lab.systemctl("restart", unit).code == 0
        pid = lab.show(unit, "MainPID")
        if how == "stopped":
            lab.ok("kill", "-STOP", pid)
        else:
            lab.ok("touch", f"{HOME}/hang", user="deployer")
        wait_for(lambda: lab.show(unit, "MainPID") not in ("0", pid), lambda: lab.systemctl("status", unit).out)
        wait_for(lambda: lab.show(unit, "ActiveState") == "active", "it serves again")
        assert "Watchdog timeout" in lab.journal("-u", unit)
        if how == "blocked":
            assert 'hang.py", line 6 in look' in lab.journal("-u", unit), "the journal has what the loop hung in"
    finally:
        lab.ok("rm", "-f", f"/run/systemd/system/{unit}.service.d/test.conf")
        lab.systemctl("daemon-reload")
        assert lab.systemctl("restart", unit).code == 0


@pytest.mark.parametrize("user", ["deployer", "other"])
def test_doctor_finds_nothing(site: Site, user: str) -> None:
    words = ("--bind", "127.0.0.2") if user == "other" else ()
    code, out, err = site.est(*words, "doctor", user=user)
    assert code == 0, out + err
    assert "✓ service: systemd: active and enabled" in out
    site.lab.ok("rm", "-f", "/var/lib/systemd/linger/other")
    assert ("when you log out" in site.est(*words, "doctor", user=user).out) == (user == "other")
    site.lab.ok("touch", "/var/lib/systemd/linger/other")


def test_setup_again_changes_nothing_and_removes(site: Site) -> None:
    lab = site.lab
    for user in ("", "other"):
        bind = ("--bind", "127.0.0.2") if user else ()
        before = lab.show("estelle-updater", "MainPID", user)
        code, out, err = site.est(*bind, "setup", user=user)  # finds by itself which it is
        assert (code, "unchanged" in out) == (0, True), out + err
        assert lab.show("estelle-updater", "MainPID", user) == before
        code, out, err = site.est(*bind, "setup", "--remove", "--dry-run", user=user)
        assert (code, "would run: systemctl" in out) == (0, True), out + err
        assert lab.show("estelle-updater", "MainPID", user) == before
    replace_program(lab.path("/opt/estelle/estelle_updater.pyz"))
    code, out, err = site.est("--bind", "127.0.0.2", "setup", user="other")
    assert (code, "installed and started" in out) == (0, True), out + err
    assert lab.show("estelle-updater", "MainPID", "other") != before, "it runs the program that was copied there"
    code, out, err = site.est("setup", "--remove", user="other")
    assert (code, "removed" in out) == (0, True), out + err
    assert lab.systemctl("is-active", "estelle-updater", user="other").code != 0
    assert not lab.path(f"{HOMES}/other/.config/systemd/user/estelle-updater.service").exists()
    assert "unchanged: nothing is installed" in site.est("setup", "--remove", user="other").out
    code, out, err = site.est("--bind", "127.0.0.2", "setup", "--with", "systemd", "--dry-run", user="other")
    assert "Type=notify" in out and "would run: systemctl --user enable estelle-updater" in out
    assert not lab.path(f"{HOMES}/other/.config/systemd/user/estelle-updater.service").exists()


@pytest.mark.parametrize("abstract", [True, False])
def test_tells_its_supervisor(fleet: Callable[..., Fleet], tmp_path: Path, abstract: bool) -> None:
    one = fleet(hosts=1, start=False)
    place = f"\0est-{os.getpid()}" if abstract else str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as supervisor:
        supervisor.bind(place)
        supervisor.settimeout(30)
        told: list[str] = []

        def until(text: str) -> None:
            while text not in told:
                told.extend(supervisor.recv(4096).decode().split("\n"))

        env = {"NOTIFY_SOCKET": place.replace("\0", "@"), "WATCHDOG_USEC": "300000"}
        one.spawn(one.master, env | {"JOURNAL_STREAM": "1:1"})
        until("READY=1")
        until(f"STATUS=master: listening on all addresses port {one.port}")
        until("WATCHDOG=1")
        assert one.stop(one.master) == 0
        until("STOPPING=1")
    # JOURNAL_STREAM was inherited: it names another stream than ours, which shows times instead of priorities
    assert re.search(r"(?m)^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d listening on", one.master.stderr)


def test_detail_in_the_log_is_asked_for(fleet: Callable[..., Fleet]) -> None:
    def said(host: Host, options: tuple[str, ...]) -> str:
        one.start(host, options=options)
        assert one.cli("trigger", "all", "master").code == 0
        one.stop(host)
        return host.stderr

    one = fleet(hosts=1, start=False)
    plain, detailed = said(one.master, ()), said(one.master, ("-v",))
    for text in (plain, detailed):
        assert re.search(r" run \S+ \(deploy master\) on 127\.0\.0\.1: succeeded v0301_4\n", text)
    assert "debug" not in plain
    assert re.search(r"debug    run \S+ \(deploy master\) on 127\.0\.0\.1: sh deploy\.sh\n", detailed)


def test_a_log_of_crashes_has_an_end(tmp_path: Path) -> None:
    state = est.StateFolder(tmp_path)
    state.create()
    job = est.JobRecord("20260101-000000-0000", "h", "", est.Kind.DEPLOY, "master")
    for size, kept in ((est.RUNNER_LOG_BYTES, False), (est.RUNNER_LOG_BYTES + 1, True)):
        state.runner_log.write_bytes(b"x" * size)
        est.start_runner(state, tmp_path / "none.json", job).wait()
        assert (state.root / "runner.old").exists() == kept
