"""`config` and `whitelist`: they change what they are asked to change in the committed file, and nothing else."""

from __future__ import annotations

import json
import shlex
import tomllib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings, strategies as st

from tests.fleet import PROGRAM, Origin, Result, clean_env, run
from tests.seam import edit_whitelist, failure_reason, parse_config
from tests.test_bad_input import est

addresses = st.lists(st.ip_addresses(v=4).map(str), min_size=1, max_size=5, unique=True)


@st.composite
def files(draw: st.DrawFn) -> tuple[str, str, list[str]]:
    """(text, form, entries) of a configuration, laid out in some way that people write."""
    entries = draw(addresses)
    form = draw(st.sampled_from(["json", "toml"]))
    newline = draw(st.sampled_from(["\n", "\r\n"]))
    comment = draw(st.sampled_from(["", "  # 사무실", '  # "1.2.3.4", ]'])) if form == "toml" else ""
    quoted = [json.dumps(entry) for entry in entries]
    layout = draw(st.sampled_from(["line", "lines", "spaced"]))
    if layout == "line":
        array = f"[{', '.join(quoted)}]"
    elif layout == "spaced":
        array = f"[ {' , '.join(quoted)} ]"
    else:
        last = "," if form == "toml" and draw(st.booleans()) else ""
        lines = [f"    {one}{',' if i + 1 < len(quoted) else last}{comment}" for i, one in enumerate(quoted)]
        array = newline.join(["[", *lines, "  ]"])
    if form == "json":
        text = newline.join(["{", '  "masterUrl": "ws://1.2.3.4:9900",', f'  "whitelist": {array}', "}", ""])
    else:
        text = newline.join(
            ["# 구성", 'masterUrl = "ws://1.2.3.4"', f"whitelist = {array}{comment}", "[deploy]", "timeout = 9", ""]
        )
    return text, form, entries


def data_of(text: str, form: str) -> dict[str, object]:
    return tomllib.loads(text) if form == "toml" else json.loads(text)


@settings(max_examples=150, deadline=None)
@given(files(), addresses, st.data())
def test_an_edit_changes_the_whitelist_alone(
    file: tuple[str, str, list[str]], new: list[str], data: st.DataObject
) -> None:
    text, form, entries = file
    add = [entry for entry in new if entry not in entries]
    remove = data.draw(st.lists(st.sampled_from(entries), unique=True))
    if data.draw(st.booleans()):  # one at a time, as the command does it
        add = []
    else:
        remove = []
    edited = edit_whitelist(text, form, add, remove)
    if edited is None:
        assert "#" in text or len(remove) > 1, "a plain file can always be edited"
        return
    wanted = [entry for entry in entries if entry not in remove] + add
    assert data_of(edited, form) == data_of(text, form) | {"whitelist": wanted}
    assert [line for line in text.splitlines() if "구성" in line or "timeout" in line] == [
        line for line in edited.splitlines() if "구성" in line or "timeout" in line
    ]
    assert edited.count("\r\n") == edited.count("\n") or "\r\n" not in text


def test_comments_stay() -> None:
    text = 'whitelist = [\n  "1.2.3.4",  # 사무실\n  "5.6.7.8",  # 집\n]\nmasterUrl = "ws://1.2.3.4"\n'
    edited = edit_whitelist(text, "toml", ["9.9.9.9"], [])
    assert edited == text.replace("# 집\n", '# 집\n  "9.9.9.9",\n'), "a comment stays with its entry"
    bare = text.replace('"5.6.7.8",', '"5.6.7.8"')
    added = edit_whitelist(bare, "toml", ["9.9.9.9"], [])
    assert added == bare.replace('"5.6.7.8"  # 집\n', '"5.6.7.8",  # 집\n  "9.9.9.9"\n')
    assert tomllib.loads(edited)["whitelist"] == ["1.2.3.4", "5.6.7.8", "9.9.9.9"]


@pytest.fixture
def repo(tmp_path: Path) -> Path:
    origin = Origin(tmp_path)
    clone = origin.clone(tmp_path / "repo")
    for key, value in (("user.name", "operator"), ("user.email", "operator@fleet.invalid")):
        origin.git("config", key, value, cwd=clone)
    return clone


def ok(repo: Path, *words: str) -> Result:
    result = est(repo, *words)
    assert result.code == 0, result.out + result.err
    return result


def test_init_check_show_convert(repo: Path) -> None:
    existing = next(iter((repo / "config").glob("updater.*")), None)
    if existing:
        refused = est(repo, "config", "init")
        assert refused.code == 2 and "exists" in refused.err
        existing.unlink()
    written = ok(repo, "config", "init", "--master", "ws://5.223.72.58:9900", "--allow", "121.0.0.7")
    steps = [line.split(": ", 1) for line in written.out.splitlines()[-3:]]
    assert [words.rsplit(maxsplit=1)[-1] for _, words in steps] == ["setup", "setup", "master"], written.out
    assert ": git pull && " in written.out
    assert "git add config/updater.toml" in written.out
    text = (repo / "config/updater.toml").read_text()
    assert text.count("#") >= 3
    config = parse_config(text, "x", "toml")
    assert config.whitelist[:2] == ("121.0.0.7", "5.223.72.58") and config.deploy.command == ("pnpm", "deploy:release")
    assert "is valid" in ok(repo, "config", "check").out
    shown = json.loads(ok(repo, "config", "show", "--json").out)
    assert shown["masterUrl"]["from"] == "file" and shown["timeout"]["value"] == "1800"
    before = tomllib.loads(text)
    assert '"masterUrl"' in ok(repo, "config", "convert", "--dry-run").out and (repo / "config/updater.toml").exists()
    first = ok(repo, "config", "convert").out
    assert 'add config/updater.json && git commit -m "Convert the configuration of estelle-updater" -- ' in first
    assert " -- config/updater.json && git push" in first, "of the other one git never knew"
    assert not (repo / "config/updater.toml").exists()
    assert json.loads((repo / "config/updater.json").read_text()) == before

    def typed(line: str) -> str:
        return run(["/bin/sh", "-ec", line], clean_env(repo), repo).out

    typed("git add config/updater.json; git commit -qm x")
    line = ok(repo, "config", "convert").out.splitlines()[-1]
    assert tomllib.loads((repo / "config/updater.toml").read_text()) == before
    assert line.startswith("next: git add ") and line.endswith(" && git push")
    typed(line.removeprefix("next: ").removesuffix(" && git push"))
    changes = typed("git show --name-status --format= --no-renames").split()
    assert changes == ["D", "config/updater.json", "A", "config/updater.toml"]


def test_the_older_form(repo: Path) -> None:
    old = {"masterUrl": "ws://1.2.3.4:9900", "machines": {"121.0.0.7": {"environmentFile": "a.json"}, "1.2.3.4": {}}}
    (repo / "config/updater.json").write_text(json.dumps(old))
    told = est(repo, "config", "check")
    assert told.code == 2 and "config convert" in told.out
    dry = ok(repo, "config", "convert", "--dry-run")
    assert "whitelist" in json.loads(dry.out) and "! the steps are not in this file" in dry.err
    steps = ok(repo, "config", "convert").out
    assert "stop the older updater, and in the clone: git pull && " in steps and steps.endswith(" setup\n")
    new = json.loads((repo / "config/updater.json").read_text())
    assert new["whitelist"] == ["121.0.0.7", "1.2.3.4"] and new["hosts"]["121.0.0.7"] == {
        "environmentFile": "config/a.json"
    }


def test_check_tells_all_problems_and_warnings(repo: Path) -> None:
    (repo / "config/updater.json").write_text(json.dumps({"masterUrl": 5, "whitelist": ["x"], "nope": 1}))
    told = est(repo, "config", "check", "--json")
    found = json.loads(told.out)
    assert told.code == 2 and len(found["problems"]) == 3
    (repo / "config/updater.json").write_text(json.dumps({"masterUrl": "ws://1.2.3.4", "whitelist": ["0.0.0.0/0"]}))
    warned = ok(repo, "config", "check")
    assert "warning: whitelist: 0.0.0.0/0 is everybody" in warned.out
    hosts = {"yq-blue": {"color": "blue"}, "10.0.0.3/yq-green": {"color": "green"}, "10.0.0.4": {}}
    named: dict[str, Any] = {"masterUrl": "ws://1.2.3.4", "whitelist": ["10.0.0.0/24"], "hosts": hosts}
    named["haproxy"] = {"host": "yq-data", "backend": "app"}
    named["health"] = [{"name": "db", "mariadb": "10.0.0.1:3306"}]
    (repo / "config/updater.json").write_text(json.dumps(named))
    notes = json.loads(ok(repo, "config", "check", "--json").out)["notes"]
    assert any(note.startswith("health db: only a `user` sees whether it takes writes") for note in notes), notes
    loose = [note for note in notes if "calls itself" in note]
    assert len(loose) == 2, notes
    assert 'hosts."yq-blue"' in loose[0] and '"ADDRESS/yq-blue"' in loose[0] and '"yq-data"' in loose[1]


def test_whitelist(repo: Path) -> None:
    (repo / "config/updater.json").write_text('{\n  "masterUrl": "ws://1.2.3.4",\n  "whitelist": ["1.2.3.4"]\n}\n')
    added = ok(repo, "whitelist", "add", "121.0.0.7", "10.1.0.0/24")
    assert "git add config/updater.json && git commit" in added.out
    assert "covered already" in ok(repo, "whitelist", "add", "10.1.0.9").out
    assert ok(repo, "whitelist", "list").out.split() == ["1.2.3.4", "121.0.0.7", "10.1.0.0/24"]
    told = json.loads(ok(repo, "whitelist", "add", "121.0.0.8", "--json").out)
    assert (told["added"], told["removed"]) == (["121.0.0.8"], []), "one object and nothing else"
    assert json.loads(ok(repo, "whitelist", "remove", "121.0.0.8", "--json").out)["removed"] == ["121.0.0.8"]
    for words in (["remove", "9.9.9.9"], ["add", "121.x.x.x"], ["add"], ["add", "10.0.0.1/8"]):
        refused = est(repo, "whitelist", *words)
        assert refused.code == 2 and "hint: " in refused.err, words
    pushed = ok(repo, "whitelist", "remove", "121.0.0.7", "--commit")
    assert "committed and pushed" in pushed.out


@pytest.fixture
def published(tmp_path: Path) -> tuple[Origin, Path]:
    """An origin whose configuration can be published, and a clone."""
    origin = Origin(tmp_path, {"masterUrl": "ws://127.0.0.1:9900", "whitelist": ["127.0.0.1"]})
    return origin, origin.clone(tmp_path / "clone")


def state_of(origin: Origin, clone: Path) -> tuple[str, ...]:
    """All that a refused publication may not touch."""
    asked = ("rev-parse HEAD", "status --porcelain", "ls-files --stage", "ls-remote origin", "symbolic-ref -q HEAD")
    texts = [run(["git", *words.split()], origin.env, clone).out for words in asked]
    return (*texts, (clone / "config/updater.json").read_text())


def test_a_publication_goes_onto_the_remote_s_tip(published: tuple[Origin, Path], tmp_path: Path) -> None:
    """Beside what is staged and changed here, from behind, and inside a git hook."""
    origin, clone = published
    newer = origin.commit({"app.txt": "2"})
    (clone / "staged.txt").write_text("mine")
    origin.git("add", "staged.txt", cwd=clone)
    (clone / "deploy.sh").write_text("changed here")
    added = run([*PROGRAM, "whitelist", "add", "127.0.0.2", "--commit"], origin.env, clone)
    assert added.code == 0, added.err
    assert "committed and pushed: config/updater.json\nit takes effect with, on a host" in added.out
    assert added.out.rstrip().endswith("trigger 127.0.0.1 master")
    origin.git("fetch", cwd=clone)
    assert origin.git("rev-parse", "origin/master^", cwd=clone) == newer
    assert origin.git("diff", "--name-only", newer, "origin/master", cwd=clone) == "config/updater.json"
    assert origin.git("rev-parse", "HEAD", cwd=clone) == origin.git("rev-parse", "origin/master", cwd=clone)
    assert origin.git("status", "--porcelain", cwd=clone) == "M deploy.sh\nA  staged.txt"
    hook = clone / ".git/hooks/post-commit"
    program = " ".join(map(shlex.quote, PROGRAM))
    hook.write_text(f"#!/bin/sh\n{program} whitelist add 127.0.0.3 --commit >{tmp_path}/hook 2>&1\n")
    hook.chmod(0o755)
    origin.git("commit", "-qm", "mine", "staged.txt", cwd=clone)
    assert "this clone has commits that origin lacks; nothing was changed" in (tmp_path / "hook").read_text()
    hook.write_text(f"#!/bin/sh\ngit push -q && {program} whitelist add 127.0.0.3 --commit >{tmp_path}/hook 2>&1\n")
    origin.git("commit", "-q", "--allow-empty", "-m", "mine", cwd=clone)
    assert "committed and pushed" in (tmp_path / "hook").read_text()
    assert "127.0.0.3" in origin.git("show", "origin/master:config/updater.json", cwd=clone)


def test_a_refused_publication_changes_nothing(published: tuple[Origin, Path]) -> None:
    origin, clone = published
    hook = origin.bare / "hooks/pre-receive"
    hook.write_text("#!/bin/sh\necho 'this key may only read' >&2\nexit 1\n")
    hook.chmod(0o755)
    before = state_of(origin, clone)

    def refused(why: str) -> None:
        told = run([*PROGRAM, "whitelist", "add", "127.0.0.2", "--commit"], origin.env, clone)
        assert told.code == 1 and why in told.err and "; nothing was changed\nhint: " in told.err, told.err
        assert state_of(origin, clone) == before

    refused("git push: this key may only read; [remote rejected] ")
    hook.unlink()
    origin.git("remote", "set-url", "origin", "/nonexistent", cwd=clone)
    before = state_of(origin, clone)
    forge = "the forge knows no such repository, or this host's key or token may not read it"
    refused(f"git ls-remote: {forge} ('/nonexistent' does not appear to be a git repository)")
    origin.git("remote", "set-url", "origin", str(origin.bare), cwd=clone)
    settings = json.loads((clone / "config/updater.json").read_text())
    origin.commit({"config/updater.json": json.dumps(settings | {"whitelist": ["127.0.0.1", "127.0.0.9"]})})
    before = state_of(origin, clone)
    refused("config/updater.json has changed at origin")
    origin.git("checkout", "-q", "--detach", cwd=clone)
    before = state_of(origin, clone)
    refused("HEAD is detached")
    origin.git("checkout", "-q", "master", cwd=clone)
    origin.git("remote", "remove", "origin", cwd=clone)
    before = state_of(origin, clone)
    refused("this clone has no remote to push to")


def test_init_writes_where_it_is_meant_to(tmp_path: Path) -> None:
    """`--dry-run` writes nothing; outside of a work tree it is refused; a clone does not obey what lies above it."""
    env = clean_env(tmp_path / "home")
    outside = run([*PROGRAM, "config", "init"], env, tmp_path)
    assert outside.code == 2 and "is in no git work tree" in outside.err and not (tmp_path / "config").exists()
    inside = tmp_path / "inside"
    (inside / "deep").mkdir(parents=True)
    run(["git", "init", "-q"], env, inside)
    shown = run([*PROGRAM, "config", "init", "--dry-run"], env, inside / "deep")
    assert (shown.code, "masterUrl" in shown.out, (inside / "config").exists()) == (0, True, False)
    (tmp_path / "config").mkdir()
    (tmp_path / "config/updater.json").write_text('{"masterUrl": "ws://127.0.0.1:9900", "whitelist": []}')
    assert run([*PROGRAM, "config", "check"], env, tmp_path).code == 0
    above = run([*PROGRAM, "config", "check"], env, inside / "deep")
    assert above.code == 2 and f"nor above it in its work tree {inside}" in above.err


UNREAD = "fatal: Could not read from remote repository.\n\nPlease make sure you have\nand the repository exists.\n"


@pytest.mark.parametrize(
    ("said", "why"),
    [
        ("remote: Repository not found.\nfatal: repository 'https://x/' not found\n", "Repository not found."),
        ("ERROR: No.\nfatal: Could not read from remote repository.\n\nand the repository exists.\n", "Could not read"),
        ("To x\n ! [rejected] a -> b (fetch first)\nerror: failed\nhint: see\nhint: the Note\n", "[rejected] a -> b"),
        (
            "fatal: unable to connect to h:\nh[0: 10.0.0.1]: errno=Connection refused\n\n",
            "h: h[0: 10.0.0.1]: errno=Con",
        ),
        # ssh's own words stand right above git's, which say nothing; and what a server says before them is no reason
        (
            "Welcome to h\nkex_exchange: reset\r\nConnection reset by h port 22\r\n" + UNREAD,
            "Connection reset by h port 22;",
        ),
        ("Unable to negotiate with h port 22: no matching host key\r\n" + UNREAD, "no matching host key;"),
        (
            "Bad owner or permissions on ~/.ssh/config\r\n" + UNREAD,
            "Bad owner or permissions on ~/.ssh/config;",
        ),
        ("sh: 1: git-upload-pack: not found\n" + UNREAD, "sh: 1: git-upload-pack: not found;"),
        (
            "@ WARNING: REMOTE HOST IDENTIFICATION HAS CHANGED! @\r\nHost key for h has changed and you have"
            " requested strict checking.\r\nHost key verification failed.\r\n" + UNREAD,
            "the remote shows another host key than this host has known",
        ),
        (
            "Permissions 0644 for '/k' are too open.\r\nThis private key will be ignored.\r\n"
            'Load key "/k": bad permissions\r\ng@h: Permission denied (publickey).\r\n' + UNREAD,
            "ssh does not use its key, which others may read: chmod 600 (Permissions 0644 for '/k' are too open.",
        ),
        # a forge's first line says what, and its last one where to go, or what came of all that ran
        (
            "remote: No passwords any more.\nremote: See:\nremote: https://x/y\nfatal: no\n",
            "No passwords any more.; https://x/y; no",
        ),
        ("remote: Finding sources:  50% (1/2)\rremote: Finding sources: 100% (2/2)\nfatal: early EOF\n", "early EOF"),
        ("remote: Counting objects: 100% (2/2)\rremote: Quota is used up.\nfatal: no\n", "Quota is used up.; no"),
        ("git: 'remote-x' is not a git command.\n\nThe most similar command is\n\tremote-ftp\n", "'remote-x' is not"),
        ("fatal: '/x' is no repository\n" + UNREAD, "'/x' is no repository"),
        ("hint: only this\n", "hint: only this"),
        ("", "no reason given"),
    ],
)
def test_the_line_that_says_why(said: str, why: str) -> None:
    told = failure_reason(said.encode())
    assert why in told and not [word for word in ("%", "Welcome", "clone anew", "fatal: ") if word in told], told
