"""Several projects on one host, each from its own clone: from setup to removal, and what must not mix."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import seam as est
from tests.fleet import Origin, Result, free_port, need, run, wait_for
from tests.systemd_lab import PYTHON, Lab

HOMES = "/home"  # of the lab
TOML = """\
masterUrl = "ws://127.0.0.1:PORT"
whitelist = ["127.0.0.1"]
[deploy]
command = ["sh", "deploy.sh"]
"""


class Two:
    """Two repositories of which one host has a clone each, and one user's PM2; nothing has a `--state`."""

    def __init__(self, folder: Path, pyz: Path) -> None:
        self.folder = folder
        self.program = shutil.copy(pyz, folder / "estelle_updater.pyz")
        self.port = free_port()
        self.origins: dict[str, Origin] = {}
        for name in ("first", "second"):
            (folder / name).mkdir()
            self.origins[name] = Origin(folder / name)
            self.origins[name].commit({"config/updater.json": None, "deploy.sh": f"echo I am {name}\n"})
            self.settings(name)
            self.origins[name].clone(self.clone(name))
        self.env = self.origins["first"].env | {"PM2_HOME": str(folder / "pm2"), "HOME": str(folder / "home")}
        shutil.copytree(folder / "first/home", folder / "home")

    @property
    def state(self) -> Path:
        return self.folder / "home/.local/state/estelle-updater"

    def clone(self, name: str) -> Path:
        return self.folder / name / "app"

    def settings(self, name: str, project: str = "", port: int = 0) -> None:
        line = f'project = "{project}"\n' if project else ""
        self.origins[name].commit({"config/updater.toml": line + TOML.replace("PORT", str(port or self.port))})
        if self.clone(name).exists():
            self.origins[name].git("pull", "--quiet", cwd=self.clone(name))

    def est(self, name: str, *words: str) -> Result:
        return run([sys.executable, self.program, *words], self.env, self.clone(name), timeout_s=100)

    def ok(self, name: str, *words: str) -> str:
        code, out, err = self.est(name, *words)
        assert code == 0, f"{name} {words}\n{out}{err}"
        return out

    def head(self, name: str) -> str:
        return self.origins[name].git("rev-parse", "HEAD", cwd=self.clone(name))

    def services(self) -> dict[str, str]:
        found = json.loads(run(["pm2", "jlist"], self.env).out.splitlines()[-1])
        return {app["name"]: app["pm2_env"]["pm_cwd"] for app in found}


@pytest.fixture
def two(tmp_path: Path, pyz: Path) -> Iterator[Two]:
    need("pm2", "node", "git")
    made = Two(tmp_path, pyz)
    yield made
    run(["pm2", "kill"], made.env)


def test_two_projects_of_one_host_under_pm2(two: Two) -> None:
    """One without a name, one with; the second is told how, and nothing typed in its clone acts on the first."""
    first, second = two.clone("first"), two.clone("second")
    two.ok("first", "setup", "--with", "pm2")
    two.ok("first", "trigger", "all", "master")
    two.origins["first"].commit({"deploy.sh": "echo I am first 2\n"})
    two.ok("first", "trigger", "all", "master")
    deployed, history = two.head("first"), two.ok("first", "history")
    for words in (
        "status",
        "trigger all master",
        "rollback --yes",
        "deploy master",
        "history",
        "setup",
        "setup --remove",
    ):
        code, out, err = two.est("second", *words.split())
        assert (code, out) == (2, ""), words
        assert f"the state folder {two.state} is that of another repository: {first}\nhint: " in err
        assert 'write project = "app" beside masterUrl' in err
    assert f"✗ state: the state folder {two.state} is that of another" in two.est("second", "doctor").out
    assert (two.head("first"), two.ok("first", "history")) == (deployed, history)
    # Another state folder is not enough where the service is the first one's
    code, _, err = two.est("second", "--state", str(two.folder / "other"), "setup", "--with", "pm2")
    assert (code, f"the service estelle-updater is that of {first}\n" in err) == (2, True), err

    # With a name, and the first one's port still
    two.settings("second", "second")
    for words in ("setup --with pm2", "trigger all master", "status"):
        code, _, err = two.est("second", *words.split())
        assert (code, f"is the masterUrl of {first} too\nhint: " in err) == (2, True), err
    assert two.services() == {"estelle-updater": str(first)}

    two.settings("second", "second", free_port())
    assert "listens as 127.0.0.1" in two.ok("second", "setup", "--with", "pm2")
    assert two.services() == {"estelle-updater": str(first), "estelle-updater-second": str(second)}
    two.ok("second", "trigger", "all", "master")
    older = two.head("second")
    two.origins["second"].commit({"deploy.sh": "echo I am second 2\n"})
    two.ok("second", "trigger", "all", "master")
    assert two.ok("second", "status").startswith("project second  master 127.0.0.1")
    assert json.loads(two.ok("second", "status", "--json"))["master"]["project"] == "second"
    assert json.loads(two.ok("first", "status", "--json"))["master"]["project"] is None
    two.ok("second", "rollback", "--yes")
    assert (two.head("second"), two.head("first")) == (older, deployed)
    assert two.ok("first", "history") == history
    both = f"estelle-updater (pm2) in {first}; estelle-updater-second (pm2) in {second}"
    assert f"✓ instances: {both}\n" in two.est("second", "doctor").out

    # The first gets a name: all that it knows comes along
    machine = (two.state / "machine-id").read_text()
    two.settings("first", "one")
    two.ok("first", "deploy", "master")  # `setup` was not here yet, and the lock is still the daemon's
    assert "it is still called estelle-updater, and its project is" in two.est("first", "doctor").out
    assert f"would move {two.state} to {two.state / 'one'}\n" in two.ok("first", "setup", "--dry-run")
    two.ok("first", "setup")
    assert two.services() == {"estelle-updater-one": str(first), "estelle-updater-second": str(second)}
    assert (two.state / "one/machine-id").read_text() == machine
    assert sorted(entry.name for entry in two.state.iterdir()) == ["one", "second"]
    assert len(json.loads(two.ok("first", "history", "--json"))["runs"]) == 3
    two.ok("first", "trigger", "all", "master")

    two.ok("second", "setup", "--remove")
    assert two.services() == {"estelle-updater-one": str(first)}
    assert two.ok("first", "status").startswith("project one  master")
    two.ok("first", "setup", "--remove")
    assert two.services() == {}


def test_two_projects_of_one_host_under_systemd(tmp_path: Path, pyz: Path) -> None:
    """As root, for two users, and for one user's own systemd."""
    program = tmp_path / "program"
    program.mkdir()
    program.chmod(0o755)
    shutil.copy(pyz, program / "estelle_updater.pyz")
    make = r"""set -e
        git config --global user.name T; git config --global user.email t@example.invalid
        git init -q --bare -b master origin.git; git clone -q origin.git app 2>&1; cd app; mkdir config
        echo "echo I am $NAME" >deploy.sh; printf '%s' "$TOML" >config/updater.toml
        git add -A; git commit -qm first; git push -q"""
    if not Path(PYTHON).exists() or run([PYTHON, "-c", "import tomllib"], {}).code:
        pytest.skip(f"no {PYTHON} of 3.11 or newer")
    with Lab(tmp_path, binds={program: "/opt/estelle"}) as lab:

        def est_of(user: str, *words: str, by: str = "") -> Result:
            argv = ("env", f"ESTELLE_REPO={HOMES}/{user}/app", PYTHON, "/opt/estelle/estelle_updater.pyz")
            return lab.run(*argv, *words, user=by, timeout_s=100)

        for number, user in enumerate(("anna", "bert")):
            lab.add_user(user)
            text = f'project = "{user}"\n' * number + TOML.replace("PORT", str(9900 + number))
            lab.ok("env", f"NAME={user}", f"TOML={text}", "sh", "-c", make, user=user)
        # The one without a name would own the folder in which the other's is to lie
        assert est_of("anna", "setup", "--with", "systemd").code == 0, lab.journal()
        code, out, err = est_of("bert", "setup", "--with", "systemd")
        assert (code, f"would be shared with another user's project: {HOMES}/anna/app" in err) == (2, True), out + err
        lab.ok(
            "sh",
            "-c",
            "cd app && sed -i '1i project = \"anna\"' config/updater.toml && git commit -qam n && git push -q",
            user="anna",
        )
        for user in ("anna", "bert"):
            code, out, err = est_of(user, "setup", "--with", "systemd")
            assert (code, "the master listens as 127.0.0.1" in out) == (0, True), out + err + lab.journal()
        for user in ("anna", "bert"):
            unit = f"estelle-updater-{user}"
            assert lab.show(unit, "ActiveState") == "active"
            code, out, err = est_of(user, "trigger", "all", "master", by=user)
            assert (code, f"I am {user}" in out) == (0, True), out + err
            assert len(list(lab.path(f"/var/lib/estelle-updater/{user}/runs").iterdir())) == 1
        assert lab.show("estelle-updater", "LoadState") == "not-found"
        older = lab.ok("git", "-C", "app", "rev-parse", "HEAD", user="bert")
        lab.ok("sh", "-c", "cd app && echo 'echo two' >deploy.sh && git commit -qam two && git push -q", user="bert")
        code, out, err = est_of("bert", "trigger", "all", "master", by="bert")
        assert (code, "two" in out) == (0, True), out + err
        before = lab.ok("git", "-C", "app", "rev-parse", "HEAD", user="anna")
        code, out, err = est_of("bert", "rollback", "--yes", by="bert")
        assert code == 0, out + err
        assert lab.ok("git", "-C", "app", "rev-parse", "HEAD", user="bert") == older
        assert lab.ok("git", "-C", "app", "rev-parse", "HEAD", user="anna") == before, "the other one's is untouched"
        assert (
            "; ".join(f"estelle-updater-{u} (systemd) in {HOMES}/{u}/app" for u in ("anna", "bert"))
            in est_of("bert", "doctor", by="bert").out
        )
        # carl has served by himself until now; the daemon of the system's unit goes on with what that one knows
        lab.add_user("carl")
        text = 'project = "carl"\n' + TOML.replace("PORT", "9905")
        lab.ok("env", "NAME=carl", f"TOML={text}", "sh", "-c", make, user="carl")

        def own(*words: str) -> Result:
            argv = ("env", f"ESTELLE_REPO={HOMES}/carl/app", PYTHON, "/opt/estelle/estelle_updater.pyz")
            return lab.run(*argv, *words, user="carl", timeout_s=100)

        assert own("setup", "--with", "systemd").code == 0, lab.journal()
        code, out, err = est_of("carl", "setup", "--with", "systemd")
        assert (code, "a daemon runs already in" in err) == (5, True), out + err
        assert own("setup", "--remove").code == 0
        code, out, err = est_of("carl", "setup", "--with", "systemd")
        assert (code, "the master listens as 127.0.0.1" in out) == (0, True), out + err + lab.journal()
        code, out, err = est_of("carl", "setup", "--with", "systemd")
        assert (code, "unchanged" in out) == (0, True), out + err
        code, out, err = est_of("anna", "setup", "--remove")
        assert (code, lab.show("estelle-updater-bert", "ActiveState")) == (0, "active"), out + err
        assert lab.show("estelle-updater-anna", "LoadState") == "not-found"
        # bert's own systemd: another repository without a name evicts nothing either
        more = "git clone -q app more 2>&1; cd more; git checkout -q --orphan x; sed -i /project/d config/updater.toml"
        lab.ok("sh", "-c", f"{more}; git commit -qam other; git remote set-url origin ../more.git", user="bert")
        lab.ok("sh", "-c", "sed -i s/9901/9902/ more/config/updater.toml", user="bert")
        argv = ("env", f"ESTELLE_REPO={HOMES}/bert/more", PYTHON, "/opt/estelle/estelle_updater.pyz")
        code, out, err = lab.run(*argv, "setup", "--with", "systemd", user="bert", timeout_s=100)
        assert (code, "the master listens" in out) == (0, True), out + err + lab.journal()
        assert lab.show("estelle-updater", "ActiveState", "bert") == "active"
        assert lab.show("estelle-updater-bert", "ActiveState") == "active"
        code, out, err = est_of("bert", "setup", "--remove")
        assert (code, lab.show("estelle-updater", "ActiveState", "bert")) == (0, "active"), out + err


@pytest.mark.parametrize("torn", ["", "{", "[]", '{"folder": 7}', '{"folder": ""}'])
def test_a_folder_that_no_longer_says_whose_it_is_is_given_to_nobody(tmp_path: Path, torn: str) -> None:
    """Whoever came first after a power loss would own the other's history, and could roll it back."""
    clones = {}
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        clones[name] = Origin(tmp_path / name).clone(tmp_path / name / "app")
    state, paths = est.StateFolder(tmp_path / "state"), {name: clones[name] / "config/updater.json" for name in clones}
    state.create()
    est.require_own_state(state, paths["first"], claim=True)
    whole = state.owner_file.read_text()
    state.owner_file.write_text(torn)
    for name in ("first", "second"):
        for claim in (True, False):
            with pytest.raises(est.UsageError, match="is damaged, and does not say whose") as refused:
                est.require_own_state(state, paths[name], claim=claim)
            assert "delete that file" in refused.value.hint and "beside masterUrl" in refused.value.hint
            assert state.owner_file.read_text() == torn
    # the daemon's own note of where it works tells it as well
    state.serve_file.write_text(json.dumps({"argv": ["serve"], "cwd": str(clones["first"])}))
    with pytest.raises(est.UsageError, match="is that of another repository"):
        est.require_own_state(state, paths["second"], claim=True)
    est.require_own_state(state, paths["first"], claim=True)
    assert json.loads(state.owner_file.read_text())["roots"] == json.loads(whole)["roots"]
    state.owner_file.write_text(torn)
    state.serve_file.unlink()
    state.owner_file.unlink()
    est.require_own_state(state, paths["first"], claim=True)
    with pytest.raises(est.UsageError, match="is that of another repository"):
        est.require_own_state(state, paths["second"])


def test_a_master_refuses_who_names_another_project(two: Two) -> None:
    """A copied masterUrl would make one fleet of two projects; who has no name yet may lag behind the commit."""
    hello = est.Hello("agent", [1, 1], "1", "11" * 16, "h", "n", project="other")
    with pytest.raises(est.RefusedError, match="this is the master of project own, and you are of other"):
        est.require_project(hello, "own")
    for ours, theirs in (("own", "own"), ("own", ""), (None, "own")):
        est.require_project(est.replace(hello, project=theirs), ours)


def test_which_clones_are_of_one_repository() -> None:
    def owner(clone: str, remote: str, root: str = "a") -> est.Owner:
        return est.Owner(clone, "", [remote] if remote else [], [root] if root else [], {clone: [1]})

    same = est.is_same_repository
    assert same(owner("/a", "h/x"), owner("/b", "h/x"))
    assert not same(owner("/a", "h/x"), owner("/b", "h/y")), "a template's copies have one first commit"
    assert not same(owner("/a", "h/x"), owner("/b", "h/x", "b"))
    assert not same(owner("/a", "", ""), owner("/b", "", ""))
    assert same(owner("/a", "h/x"), owner("/a", "h/moved")) and same(owner("/a", "h/x"), owner("/a", "h/x", "b"))
    assert not same(owner("/a", "h/x"), owner("/a", "h/y", "b")), "another clone in the same place"
    assert same(owner("/a", "h/x", ""), owner("/b", "h/x")), "a shallow clone does not know its first commit"
    for url in ("git@h.example:o/x.git", "https://me:secret@H.example/o/x", "ssh://git@h.example:22/o/x.git/"):
        assert est.plain_remote(url) == "h.example/o/x"
    assert est.plain_remote("C:/repos/x.git") == "C:/repos/x"
    assert est.plain_remote("file:///repos/x.git") == est.plain_remote("/repos/x")


@pytest.mark.parametrize("name", ["Yquant", "haproxy", "runs", "a/b", "", "x" * 33, 7])
def test_names_that_are_none(name: object) -> None:
    text = json.dumps({"masterUrl": "ws://192.0.2.1", "whitelist": [], "project": name})
    with pytest.raises(est.ConfigError, match="project's name"):
        est.parse_config(text, "f", "json")


def test_places_of_a_named_project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(est.program, "SYSTEM_STATE", tmp_path / "system")
    if os.name != "nt":
        assert est.default_state_folder({}, "yq") == tmp_path / ".local/state/estelle-updater/yq"
    assert est.default_state_folder({"STATE_DIRECTORY": str(tmp_path)}, "yq") == tmp_path / "yq"
    assert est.default_state_folder({"STATE_DIRECTORY": str(tmp_path / "yq")}, "yq") == tmp_path / "yq"
    assert est.default_state_folder({"ESTELLE_STATE": str(tmp_path)}, "yq") == tmp_path
    unit = est.render_unit(["python3", "x.pyz", "serve"], "/srv/x", "/bin", "u", [], "yq")
    assert "\nStateDirectory=estelle-updater/yq\n" in unit and "estelle-updater (yq): " in unit
    wait_for(lambda: "systemctl edit estelle-updater-yq\n" in unit, "the comment names the unit")
