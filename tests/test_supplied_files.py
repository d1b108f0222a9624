"""Files that a commit or an operator supplies and that are not what they should be: endless, silent, elsewhere."""

from __future__ import annotations

import json
import os
import shutil
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest

from tests import seam as est
from tests.fleet import Fleet, wait_for


def test_only_a_regular_file_of_bounded_size_is_read(tmp_path: Path) -> None:
    fifo, big, link, outside = (tmp_path / name for name in ("fifo", "big", "link", "outside"))
    os.mkfifo(fifo)
    big.write_bytes(b"x" * (est.SUPPLIED_BYTES + 1))
    outside.write_text("secret")
    tree = tmp_path / "tree"
    (tree / "sub").mkdir(parents=True)
    (tree / "inner").write_text("inner")
    (tree / "sub/link").symlink_to("../inner")
    (tree / "out").symlink_to(outside)
    link.symlink_to("/dev/zero")
    for path, why in ((fifo, "no regular file"), (link, "no regular file"), (big, "1 MiB"), (tree, "a folder")):
        with pytest.raises(OSError, match=why):
            est.read_supplied(path)
    big.write_bytes(b"x" * est.SUPPLIED_BYTES)
    assert len(est.read_supplied(big)) == est.SUPPLIED_BYTES
    assert est.read_supplied(tree / "out") == b"secret", "an operator's link"
    assert est.read_supplied(tree / "sub/link", within=tree) == b"inner"
    (tree / "loop").symlink_to("loop")
    (tree / "up").symlink_to("/proc/self")
    (tree / ".git").mkdir()
    (tree / ".git/config").write_text("url = https://secret@h")
    (tree / "git").symlink_to(".git/config")
    for name, why in (
        ("out", "out of the repository"), ("loop", "circle|symbolic links"), ("git", "into git's own folder"),
        ("up/environ", "out of the repository"), ("up/root/etc/passwd", "out of the repository"),
    ):  # fmt: skip
        with pytest.raises(OSError, match=why):
            est.read_supplied(tree / name, within=tree)
    assert est.read_supplied(big, 3, cut=True) == b"xxx", "the beginning of what may be long"


START = {
    "json": '{"masterUrl": "ws://127.0.0.1", "whitelist": []',
    "toml": 'masterUrl = "ws://127.0.0.1"\nwhitelist = []\n',
}
HOSTILE = [
    ("toml", f"a{'.a' * 50_000} = 1", "more than 200 dots"),
    ("toml", f"[{'.'.join(['a'] * 40_000)}]", "more than 200 dots"),
    ("toml", f'x = {{y = """#\'""", a{".a" * 50_000} = 1}}', "more than 200 dots"),
    ("toml", f'"a\'"{".a" * 50_000} = 1', "more than 200 dots"),
    ("toml", f"x = {'[' * 100_000}", "recursion"),
    ("toml", f"[deploy]\ntimeout = 0x{'f' * 5000}", "more than 64 bits"),
    ("toml", f"[deploy]\ntimeout = {'9' * 5000}", "5000 digits|4300 digits"),
    ("toml", "[deploy]\ntimeout = nan", "no number of seconds"),
    ("json", f', "x": {"[" * 100_000}', "recursion"),
    ("json", ', "hosts": ' + '{"a":' * 500 + "1" + "}" * 501, "more than 100 tables"),
    ("json", f', "keep": {{"runs": {"9" * 4000}}}}}', "more than 64 bits"),
    ("json", ', "deploy": {"timeout": Infinity}}', "no number of seconds"),
    ("json", ', "whitelist": ["0.0.0.0/0"]}', "stands twice"),
    ("json", f', "project": "{"x" * 900_000}"}}', "project"),
]


@pytest.mark.parametrize(("form", "more", "why"), HOSTILE, ids=range(len(HOSTILE)))
def test_a_configuration_that_is_made_to_hurt_is_refused_at_once(form: str, more: str, why: str) -> None:
    """In time and memory that a daemon has, and in a line."""
    began = time.process_time()
    tracemalloc.start()
    try:
        with pytest.raises(est.ConfigError, match=why) as refused:
            est.parse_config(START[form] + more, "f", form)
        assert tracemalloc.get_traced_memory()[1] < 50 << 20
    finally:
        tracemalloc.stop()
    assert time.process_time() - began < 5
    assert len(refused.value.what) < 1000 and refused.value.what.isprintable()
    strings = 'x = "' + "a." * 300 + f'" # {"b." * 300}\n[deploy]\nversion = "{"v." * 120}"'
    with pytest.raises(est.ConfigError, match="x: unknown key"):  # dots in strings and comments are no key's
        est.parse_config(START["toml"] + strings, "f", "toml")


def test_a_hostile_commit_stops_nobody(fleet: Callable[..., Fleet]) -> None:
    """Version and configuration as endless files: jobs end, daemons answer, and the commit that mends it is taken."""
    one = fleet(hosts=2)
    agent = one.agents[0]
    work = one.origin.seed

    def commit_link(name: str, target: str) -> None:
        (work / name).unlink(missing_ok=True)
        (work / name).symlink_to(target)
        one.origin.commit({})

    good = (work / "config/updater.json").read_text()
    (work / "config/version.json").unlink(missing_ok=True)
    commit_link("config/version.json", "/dev/zero")
    code, out, err = one.cli("trigger", "all", "master")
    assert (code, out.count("] ✓ 완료")) == (0, 2), out + err
    (agent.repo / "config/version.json").unlink()
    os.mkfifo(agent.repo / "config/version.json")
    for _ in range(5):
        hosts = json.loads(one.cli("status", "--json").out)["hosts"]
        assert [host["online"] for host in hosts] == [True, True]
    (agent.repo / "config/version.json").unlink()
    (agent.repo / "config/version.json").symlink_to("/dev/zero")

    # after these no order could bring the commit that mends them
    elsewhere = json.loads(good) | {"hosts": {host.address: {"repo": "../no-clone"} for host in one.hosts}}
    deadly = '[submodule "x"]\n\tpath = x\n\turl = ./\n\tupdate = !id\n'
    inside = json.loads(good) | {"hosts": {agent.address: {"repo": "new"}}}
    gone = "repo of the commit's configuration: there is no folder"
    for name, files, why in (
        ("moved", {"config/updater.json": json.dumps(elsewhere)}, gone),
        ("deadly", {".gitmodules": deadly}, "can't read .gitmodules of"),
        ("both", {"config/updater.toml": START["toml"]}, "has both updater.json and updater.toml"),
        ("inside", {"config/updater.json": json.dumps(inside), "new/deploy.sh": "echo deploying\n"}, ""),
    ):  # fmt: skip
        one.origin.commit(files, branch=name)
        one.origin.git("checkout", "-q", "master", cwd=work)
        plan = one.cli("plan", "all", name)
        assert (plan.code, plan.out.count(why)) == ((1, 2) if why else (0, plan.out.count(why))), (name, plan)
        code, out, err = one.cli("trigger", "all", name)
        assert (code, err.count("nothing changed on")) == ((1, 2) if why else (0, 0)), (name, out, err)
    door = json.dumps(json.loads(good) | {"whitelist": ["0.0.0.0/0"]})
    one.origin.commit({"config/updater.json": door}, branch="door")
    assert "whitelist: lets in 0.0.0.0/0" in one.cli("plan", agent.address, "door").out, "seen from below, too"
    one.origin.git("checkout", "-q", "master", cwd=work)
    code, out, err = one.cli("trigger", "all", "master")
    assert (code, out.count("] ✓ 완료")) == (0, 2), out + err

    # with such an environment no git starts that could bring what mends it
    large = json.loads(good) | {"hosts": {agent.address: {"environmentFile": "env"}}}
    one.origin.commit({"config/updater.json": json.dumps(large), "env": f"A={'x' * (128 << 10)}\n"})
    for host in one.hosts:
        one.origin.git("pull", "--quiet", cwd=host.repo)
    for files, results in (({}, (1, 1)), ({"config/updater.json": good}, (0, 2))):
        one.origin.commit(files)
        code, out, err = one.cli("trigger", "all", "master")
        assert (code, out.count("] ✓ 완료")) == results, out + err
        assert "131074 bytes; 131071 at most" in out

    # a branch that nobody has reviewed yet: its plan is refused, and the daemons live on
    (work / "config/updater.json").unlink()
    one.origin.commit({"config/updater.toml": f"a{'.a' * 50_000} = 1\n"}, branch="hostile")
    plan = one.cli("plan", "all", "hostile")
    assert (plan.code, plan.out.count("more than 200 dots")) == (1, 2), plan
    one.origin.git("checkout", "-q", "master", cwd=work)

    (work / "config/updater.json").unlink(missing_ok=True)
    commit_link("config/updater.json", "/dev/zero")
    code, out, err = one.cli("trigger", "all", "master")
    assert (code, out.count("] ✗ 실패 config"), err.count("nothing changed on")) == (1, 2, 2), out + err
    for host in one.hosts:  # somebody brings it all the same
        one.origin.git("merge", "--quiet", "--ff-only", "origin/master", cwd=host.repo)
    wait_for(
        lambda: all("old settings stay" in host.stderr for host in one.hosts),
        lambda: "both say so: " + "\n".join(host.stderr for host in one.hosts),
    )
    one.restart(agent)  # it also starts with the last good ones
    (work / "config/updater.json").unlink()
    one.origin.commit({"config/updater.json": good})
    code, out, err = one.cli("trigger", "all", "master")
    assert (code, out.count("] ✓ 완료")) == (0, 2), out + err


def test_the_configuration_s_folder_as_a_link(fleet: Callable[..., Fleet], tmp_path: Path) -> None:
    """In a circle, to what is no clone's, to git's own, to files that never end: nobody dies, no job succeeds by
    another's settings, and the commit that mends it is taken."""
    one = fleet(hosts=2)
    seed = one.origin.seed
    good = (seed / "config/updater.json").read_text()
    other = one.origin.clone(tmp_path / "other")  # another project's clone on this machine
    (other / "updater.json").write_text(good)
    for host in one.hosts:
        (host.repo / "fifos").mkdir()
        for name in ("updater.json", "version.json"):
            os.mkfifo(host.repo / "fifos" / name)
    for target in ("config", "/proc/self", "/dev", ".git", "fifos", str(other)):
        shutil.rmtree(seed / "config")
        (seed / "config").symlink_to(target)
        one.origin.commit({})
        code, out, err = one.cli("trigger", "all", "master")
        assert code == 1 and out.count("] ✗ 실패 ") == 2 and "✓" not in out, (target, out, err)
        said = "".join(host.stderr for host in one.hosts)
        assert "Traceback" not in said + out + err, target
        for _ in range(2):
            status = one.cli("status", "--json")
            assert status.code == 0, (target, status)
            assert [row["online"] for row in json.loads(status.out)["hosts"]] == [True, True], target
        (seed / "config").unlink()
        one.origin.commit({"config/updater.json": good})
        code, out, err = one.cli("trigger", "all", "master")
        assert (code, out.count("] ✓ 완료")) == (0, 2), (target, out, err)


def test_a_file_of_the_moment_is_nobody_s(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each write into a state folder makes one, which may be gone before its owner is looked at."""
    (tmp_path / "moment").touch()
    with os.scandir(tmp_path) as found:
        entries = list(found)
    (tmp_path / "moment").unlink()
    monkeypatch.setattr(os, "scandir", lambda _: iter(entries))
    assert est.StateFolder(tmp_path).planted() == ""


def test_a_state_folder_that_others_may_write(fleet: Callable[..., Fleet]) -> None:
    one = fleet(hosts=1, start=False)
    state = one.master.state
    state.mkdir()
    state.chmod(0o777)
    assert f"✗ state: {state} may be written by others (mode 0777)" in one.cli("doctor").out
    one.start()
    assert f"{state} may be written by others (mode 0777): now it is 0700" in one.master.stderr
    assert state.stat().st_mode & 0o777 == 0o700
    one.stop_all()
    if os.geteuid() == 0:
        planted = state / "keys.json"  # while others could write there
        planted.write_text("{}")
        os.chown(planted, 12345, -1)
        state.chmod(0o777)
        for mode in (0o777, 0o700):
            words = f"{state} has keys.json in it, which belongs to user 12345"
            assert mode == 0o777 or f"✗ state: {words}" in one.cli("doctor").out
            code, _, err = one.cli("serve", timeout_s=20)
            assert (code, words in err) == (2, True) and state.stat().st_mode & 0o777 == 0o700, err
        planted.unlink()
        os.chown(state, 12345, -1)
        assert f"✗ state: {state} belongs to user 12345, and this is user 0" in one.cli("doctor").out
        code, _, err = one.cli("serve")
        assert (code, f"{state} belongs to user 12345" in err) == (2, True), err
