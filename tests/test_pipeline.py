"""Section 7: the commands of a deployment, told to a real git; what a version is; and no secret in a log."""

from __future__ import annotations

import base64
import itertools
import os
import random
import re
import shlex
import subprocess
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings, strategies as st

from tests import seam as est
from tests.fleet import need
from tests.seam import Masker, Step, StepKind, parse_version_file, plan_checkout

quick = settings(deadline=None, max_examples=150, suppress_health_check=list(HealthCheck))

ONCE = ("-c", "maintenance.auto=false")
PULL = ("pull", "--ff-only", "--no-rebase")
TAG = ("fetch", "--no-tags", "--refmap=")

# Plans as values


def test_the_plan_of_a_branch() -> None:
    pull = Step(
        "git pull origin master",
        ("git", "-c", "branch.master.mergeOptions=", *ONCE, *PULL, "origin", "refs/heads/master"),
        StepKind.PULL,
    )
    label, tracking = "git checkout master", "refs/remotes/origin/master"
    new = Step(label, ("git", "checkout", "-b", "master", "--track", tracking, "--"), StepKind.CHECKOUT)
    old = Step(label, ("git", "checkout", "master", "--"), StepKind.CHECKOUT)
    fetch = ("git", "fetch", "--prune", "--no-prune-tags", "--force", "origin")
    assert est.plan_fetch("origin") == Step("git fetch origin", fetch, StepKind.FETCH)
    tidy = ("git", *ONCE, *fetch[1:])
    assert est.plan_fetch("origin", is_tidy=True) == Step("git fetch origin", tidy, StepKind.FETCH)
    assert plan_checkout("master", "origin", {tracking}) == (None, new, pull)
    assert plan_checkout("master", "origin", {"refs/heads/master", tracking}) == (None, old, pull)
    assert plan_checkout("master", "origin", {"refs/heads/master"}) == (None, old, pull)
    assert plan_checkout("a/b", "up", {"refs/remotes/up/a/b"}) == (
        None,
        Step(
            "git checkout a/b",
            ("git", "checkout", "-b", "a/b", "--track", "refs/remotes/up/a/b", "--"),
            StepKind.CHECKOUT,
        ),
        Step(
            "git pull up a/b",
            ("git", "-c", "branch.a/b.mergeOptions=", *ONCE, *PULL, "up", "refs/heads/a/b"),
            StepKind.PULL,
        ),
    )


def test_the_plan_of_a_tag_and_of_a_commit() -> None:
    label, commit = "git checkout v1", "0123456789abcdef" * 4
    assert plan_checkout("v1", "origin", {"refs/heads/v1/x", "refs/remotes/other/v1", "refs/remotes/origin/v1x"}) == (
        Step(label, ("git", *TAG, "origin", "+refs/tags/v1:refs/tags/v1"), StepKind.FETCH),
        Step(label, ("git", "checkout", "--detach", "refs/tags/v1", "--"), StepKind.CHECKOUT),
        None,
    )
    for full in (commit, commit[:40]):
        label = f"git checkout {full}"
        assert plan_checkout(full, "origin", ()) == (
            Step(label, ("git", *TAG, "origin", full), StepKind.FETCH),
            Step(label, ("git", "checkout", "--detach", full, "--"), StepKind.CHECKOUT),
            None,
        )
        assert plan_checkout(full, "origin", {f"refs/heads/{full}"})[1].argv == ("git", "checkout", full, "--")
    for short in (commit[:39], commit[:41], commit[:40].upper(), commit[:39] + "g", commit[:40] + "\n", ""):
        assert not est.is_commit_id(short)


@pytest.mark.skipif(os.name == "nt", reason="another shell")
def test_an_advice_is_typed_as_it_is_printed() -> None:
    """A space in a folder's name, or a branch that somebody called so, is no word and no command of its own."""
    repo, branch = "/srv/my app", "a;reboot&'b"
    known = est.Prospect(repo, "origin", "c" * 40, branch)
    states: list[tuple[str, dict[str, Any]]] = [
        (branch, {"own": 1}),
        (branch, {"own": 1, "is_current": False, "was_there": True}),
        (repo, {"elsewhere": "/srv/o w", "elsewhere_is_gone": True}),
        ("a b", {"clash": "a b"}),
        ("x y", {"begun": "unmerged", "unmerged": ("x y", "z")}),
        (repo, {"pointers": ("p",), "has_lfs": False}),
    ]
    for whole, state in states:
        [refusal] = est.judge_prospect(known._replace(**state)).refused
        words = shlex.split(refusal.hint)
        assert repo in words and any(whole in word for word in words), refusal.hint
        assert not {"my", "app", "x", "y", "b"} & set(words), refusal.hint
        assert not any("reboot" in word for word in words if branch not in word), refusal.hint


@pytest.mark.parametrize(
    "name",
    [b"inv\xff\xfe", "zero\u200bwidth".encode(), b"new\nline", "이름 둘".encode(), b"tab\t'q\\", b"\x7f0", b"plain"],
)
def test_an_odd_name_is_typed_as_it_is_on_the_disk(name: bytes) -> None:
    """What shows a hint replaces what can't be seen: a name with that would be another file's."""
    need("bash")
    shown = est.typed(os.fsdecode(name))
    assert shown.isprintable()
    assert subprocess.run(["bash", "-c", f"printf %s {shown}"], stdout=-1, check=True).stdout == name


def test_the_commands_of_the_configuration() -> None:
    assert est.plan_command(("pnpm", "deploy:release")) == Step(
        "pnpm deploy:release", ("pnpm", "deploy:release"), StepKind.COMMAND
    )
    assert est.plan_restart(()) == ()
    assert est.plan_restart(("a", "b.service")) == (
        Step("systemctl restart a b.service", ("systemctl", "restart", "a", "b.service"), StepKind.RESTART),
        Step("systemctl is-active a", ("systemctl", "is-active", "a"), StepKind.RESTART),
        Step("systemctl is-active b.service", ("systemctl", "is-active", "b.service"), StepKind.RESTART),
    )


# Plans told to git


class Repos:
    """A remote, which gets its commits straight from the test, and the host that deploys from it."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.work, self.serial = folder, folder / "host", 0
        kept = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
        nobody = {f"GIT_{who}_{what}": "a@b" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}
        own = {"GIT_CONFIG_NOSYSTEM": "1", "GIT_CONFIG_GLOBAL": os.devnull, "GIT_TERMINAL_PROMPT": "0", "LC_ALL": "C"}
        self.env = {**kept, **nobody, **own}
        self.git("init", "-q", "--bare", "-b", "master", "remote", cwd=folder)
        self.push("refs/heads/master", file="dir/file")
        self.git("clone", "-q", "remote", "host", cwd=folder)

    def run(self, argv: Sequence[str], cwd: Path, text: str = "") -> tuple[int, str]:
        done = subprocess.run(argv, cwd=cwd, env=self.env, input=text.encode(), capture_output=True, check=False)
        return done.returncode, (done.stdout + done.stderr).decode()

    def git(self, *args: str, cwd: Path | None = None, text: str = "") -> str:
        code, output = self.run(("git", *args), cwd or self.work, text)
        assert code == 0, output
        return output.strip()

    def push(self, ref: str, *, file: str = "file", annotated: bool = False, lone: bool = False) -> str:
        """A new commit on the remote, called `ref` and no longer what was: its id. It stands on the last one."""
        self.serial += 1
        who, number = f"a <a@b> {self.serial} +0000", f"{self.serial:04}\n"
        start = "from refs/heads/tip^0\n" if self.serial > 1 and not lone else ""
        lines = f"commit refs/heads/{'lone' if lone else 'tip'}\nmark :1\ncommitter {who}\ndata 2\nx\n{start}"
        lines += f"M 100644 inline {file}\ndata 5\n{number}\nget-mark :1\n"
        lines += f"tag {ref[10:]}\nfrom :1\ntagger {who}\ndata 2\nx\n" if annotated else f"reset {ref}\nfrom :1\n\n"
        return self.git("fast-import", "--quiet", "--force", cwd=self.folder / "remote", text=lines)

    def delete(self, ref: str) -> None:
        self.git("update-ref", "-d", ref, cwd=self.folder / "remote")

    def deploy(self, branch: str) -> tuple[int, str]:
        """Fetch, check out and pull as the runner does: (exit code, output)."""
        code, output = self.run(est.plan_fetch("origin").argv, self.work)
        assert code == 0, output
        names = (f"refs/heads/{branch}", f"refs/remotes/origin/{branch}")
        refs = self.git("for-each-ref", "--format=%(refname)", *names).split()
        for step in plan_checkout(branch, "origin", refs):
            if step and not code:
                code, output = self.run(step.argv, self.work)
        return code, output

    def deployed(self, branch: str) -> tuple[str, str]:
        """(commit, branch or "HEAD") that is checked out after a deployment, which must succeed."""
        code, output = self.deploy(branch)
        assert code == 0, output
        commit, name = self.git("rev-parse", "HEAD", "--symbolic-full-name", "HEAD").split()
        assert self.git("diff", "--name-only", commit) == "", "the files are those of the commit"
        return commit, name


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Repos:
    """For tests that use names of their own."""
    return Repos(tmp_path_factory.mktemp("shared"))


@pytest.fixture
def repos(tmp_path: Path) -> Repos:
    return Repos(tmp_path)


@pytest.mark.parametrize("name", ["feature", "team/feature/1", "dir", "file", "한글", "v1.0", "a" * 40, "@x", "x.y/-z"])
def test_a_branch_is_checked_out_and_follows_the_remote(shared: Repos, name: str) -> None:
    """Also one called like a folder, a file, or a commit's id."""
    ref = f"refs/heads/{name}"
    tip = shared.push(ref)
    assert shared.deployed(name) == (tip, ref)
    tip = shared.push(ref)
    shared.git("checkout", "-q", "--detach", "HEAD", "--")
    assert shared.deployed(name) == (tip, ref)


def test_a_branch_called_like_the_path_of_a_file(repos: Repos) -> None:
    for _ in range(2):
        tip = repos.push("refs/heads/dir/file", file="dir/file")
        assert repos.deployed("dir/file") == (tip, "refs/heads/dir/file")


@pytest.mark.parametrize("tag_at", ["host", "remote"])
@pytest.mark.parametrize("branch_at_host", [False, True])
def test_a_branch_wins_over_a_tag_of_its_name(shared: Repos, tag_at: str, branch_at_host: bool) -> None:
    name, annotated = f"both-{tag_at}-{branch_at_host}", branch_at_host
    tip = shared.push(f"refs/heads/{name}")
    if branch_at_host:
        assert shared.deployed(name)[0] == tip
    if tag_at == "host":
        shared.git("tag", *(["-a", "-m", "x"] if annotated else []), name, "HEAD")
    else:
        shared.push(f"refs/tags/{name}", annotated=annotated)
        shared.git("fetch", "-q", "--tags")
    tip = shared.push(f"refs/heads/{name}")
    assert shared.deployed(name) == (tip, f"refs/heads/{name}")


@pytest.mark.parametrize(("name", "annotated"), [("dir", True), ("rel/1", True), ("file", False)])
def test_a_tag_is_checked_out_as_the_remote_has_it(repos: Repos, name: str, annotated: bool) -> None:
    for _ in range(2):  # it is new; it was moved
        tip = repos.push(f"refs/tags/{name}", annotated=annotated, lone=True)
        assert repos.deployed(name) == (tip, "HEAD")
    repos.delete(f"refs/tags/{name}")
    code, output = repos.deploy(name)
    assert code and est.explain_failure(output.encode()) == "no such branch, tag or commit on the remote"


def test_a_commit_is_checked_out_also_when_no_branch_has_it(repos: Repos) -> None:
    old, new = repos.push("refs/heads/master"), repos.push("refs/heads/master")
    assert repos.deployed(old) == (old, "HEAD")
    unknown = repos.push("refs/pull/1/head", lone=True)
    repos.delete("refs/heads/lone")
    assert repos.deployed(unknown) == (unknown, "HEAD")
    code, output = repos.deploy("0" * 39 + "1")
    assert code and "not our ref" in output
    assert repos.deployed("master") == (new, "refs/heads/master")


def test_a_branch_may_become_a_folder_of_branches(repos: Repos) -> None:
    repos.push("refs/heads/release")
    repos.git("fetch", "-q")
    repos.delete("refs/heads/release")
    tip = repos.push("refs/heads/release/1")
    assert repos.deployed("release/1") == (tip, "refs/heads/release/1")


def test_a_persons_git_settings_do_not_change_what_is_deployed(repos: Repos) -> None:
    for setting in ("pull.rebase=true", "pull.ff=false", "branch.autoSetupMerge=false", "checkout.guess=false"):
        repos.git("config", *setting.split("="))
    for _ in range(2):
        tip = repos.push("refs/heads/topic")
        assert repos.deployed("topic") == (tip, "refs/heads/topic")


def test_a_failure_is_explained(repos: Repos) -> None:
    def why(branch: str) -> str | None:
        code, output = repos.deploy(branch)
        return est.explain_failure(output.encode()) if code else "deployed"

    base = repos.push("refs/heads/master")
    assert why("master") == "deployed"
    assert why("gone") == "no such branch, tag or commit on the remote"
    repos.git("branch", "mine")
    assert why("mine") == "no such branch, tag or commit on the remote"
    repos.git("checkout", "-q", "master")
    repos.push("refs/heads/other")
    repos.push("refs/heads/master")
    (repos.work / "file").write_text("a person's change\n")
    assert "local changes are in the way" in str(why("master"))
    assert "local changes are in the way" in str(why("other"))
    (repos.work / ".git/index.lock").touch()
    assert "lock file" in str(why("other"))
    (repos.work / ".git/index.lock").unlink()
    repos.git("commit", "-q", "-a", "-m", "a person's commit")
    assert "commits that the remote has not" in str(why("master"))
    repos.git("reset", "-q", "--hard", base)
    assert why("master") == "deployed"
    (repos.work / ".git/refs/heads/master.lock").touch()
    repos.push("refs/heads/master")
    assert "lock file" in str(why("master"))
    for said in (
        b"Connection timed out during banner exchange", b"Connection to 10.0.0.9 port 22 timed out\r",
        b"Timeout, server git.example not responding.\r",
    ):  # fmt: skip
        assert est.explain_failure(b"x\n" + said) == "the git remote does not answer"
    assert est.explain_failure(b"ELIFECYCLE Command failed.") is None
    home = b"warning: unable to access '/srv/other/.config/git/attributes': Permission denied\n"
    assert est.explain_failure(home) is None, "git goes on without another user's settings"
    assert "a tag was moved" in str(est.explain_failure(home + b" ! [rejected] v1 -> v1 (would clobber existing tag)"))


# Versions


@pytest.mark.parametrize(
    ("data", "version"),
    [
        ("v0301_4\r\n".encode("utf-16"), "v0301_4"),
        (b"\xfe\xff" + '{"version": "1.2"}'.encode("utf-16-be"), "1.2"),
        (b'{"version": "v0301_4"}', "v0301_4"), (b'\xef\xbb\xbf {"a": 1,\r\n"version": "1.2"}\n', "1.2"),
        (b'{"version": 7}', "7"), (b'{"version": 1.5}', "1.5"), ('{"version": "봄 1"}'.encode(), "봄 1"),
        (b"v0301_4\nnotes\n", "v0301_4"), (b"  1.0  \r\n2", "1.0"), (b"\n\n 3 \n", "3"), (b"", None), (b" \n", None),
        (b'{"version": ""}', None), (b'{"version": null}', None), (b'{"version": true}', None), (b"{}", None),
        (b'{"version": ["1"]}', None), (b'{"version": {"version": "1"}}', None), (b'{"version": "1"', None),
        (b"{", None), (b'{"a":' * 100_000, None), (b'{"version": ' + b"9" * 5000 + b"}", None), (b"[1]", "[1]"),
        (b'{"version": "' + b"9" * 100 + b'"}', "9" * 80), (b"9" * 100, "9" * 80), (b"caf\xe9", "caf\ufffd"),
        (b'{"version": "1\\n[h] \\u2713"}', "1"), (b'{"version": "\\u001b[2J1\\u0007"}', "[2J1"),
        (b"\x1b[31m1\x00", "[31m1"), (b'{"version": "1\\ud800"}', "1"), (b'{"version": "\\u2028 1"}', "1"),
        (b'{"version": "\\u202e1"}', "1"), (b"1" * 79 + b" 2", "1" * 79),
    ],
)  # fmt: skip
def test_the_version_in_a_file(data: bytes, version: str | None) -> None:
    assert parse_version_file(data) == version


@quick
@given(st.binary() | st.text().map(lambda text: f'{{"version": "{text}"}}'.encode()))
def test_any_file_gives_one_printable_line_or_nothing(data: bytes) -> None:
    version = parse_version_file(data)
    assert version is None or (version.isprintable() and 0 < len(version) <= 80 and version == version.strip())


@pytest.mark.parametrize(
    ("output", "versions"),
    [
        (b"deployed v0301_4.\n", [b"v0301_4"]), (b"v0301_4", [b"v0301_4"]), (b"mv0301_4 xmv0301_4", []),
        (b"from v0301_4 to v0302_12\n", [b"v0301_4", b"v0302_12"]), (b"\x1b[mv0101_1", [b"v0101_1"]),
        (b"\x1b[32mv0301_4\x1b[0m \x1b[1;31mv0302_1\x1b[0m", [b"v0301_4", b"v0302_1"]),
        ("배포v0301_4완료".encode(), [b"v0301_4"]), (b"", []),
        (b"(v0301_4)[v1231_10] x/v0101_1/y a-v0102_2-b _v0103_3_",
         [b"v0301_4", b"v1231_10", b"v0101_1", b"v0102_2", b"v0103_3"]),
        (b"dev0301_4 v0301_4b v0301_ v301_4 v03011_4 V0301_4 v0301-4 v0301_x 1v0301_4", []),
    ],
)  # fmt: skip
def test_the_version_in_the_output(output: bytes, versions: list[bytes]) -> None:
    assert est.VERSION_IN_OUTPUT.findall(output) == versions


# Secrets


def occurrences(secrets: Iterable[str], data: bytes) -> list[tuple[int, int]]:
    """Where a secret stands, also inside or across another, one span for all that overlap."""
    values = [secret.encode() for secret in secrets if len(secret.encode()) >= est.SECRET_BYTES]
    spans = {(i, i + len(value)) for i in range(len(data)) for value in values if data.startswith(value, i)}
    merged: list[tuple[int, int]] = []
    for start, end in sorted(spans):
        if merged and start < merged[-1][1]:
            merged[-1] = merged[-1][0], max(end, merged[-1][1])
        else:
            merged.append((start, end))
    return merged


def masked(secrets: Iterable[str], data: bytes, until: int | None = None) -> bytes:
    """The naive way, with everything at hand: what stands before `until`."""
    out, done = b"", 0
    for start, end in occurrences(secrets, data):
        if until is None or start < until:
            out, done = out + data[done:start] + b"***", end
    return out + data[done:until]


def fed(secrets: Iterable[str], parts: Iterable[bytes]) -> bytes:
    masker = Masker(secrets)
    return b"".join([*(masker.feed(part) for part in parts), masker.flush()])


secrets_and_text = st.tuples(
    st.lists(st.text("ab", min_size=6, max_size=9) | st.text("abc", min_size=4, max_size=8), max_size=4),
    st.text("ab", max_size=40) | st.text("abc", max_size=60),
).flatmap(lambda pair: st.tuples(st.just(pair[0]), mixtures(*pair)))


def mixtures(secrets: list[str], text: str) -> st.SearchStrategy[bytes]:
    """Texts in which whole secrets, and parts of them, are frequent."""
    parts = [text, "\n", *secrets, *(secret[:3] for secret in secrets), *(secret[1:] for secret in secrets)]
    return st.lists(st.sampled_from(parts), max_size=8).map(lambda chosen: "".join(chosen).encode())


@quick
@given(secrets_and_text, st.lists(st.integers(0, 100), max_size=6))
@example((["ababab"], b"abababab"), [6])
@example((["abcdef", "defghi"], b"abcdefghi"), [6])
@example((["abcdef", "abcdefgh"], b"abcdefgabcdefgh"), [6])
@example((["xabcdefx", "abcdef"], b"xabcdef xabcdefx"), [7])
@example((["aaaaaa"], b"a" * 20), [])
def test_every_split_gives_what_the_whole_gives(case: Any, cuts: list[int]) -> None:
    secrets, data = case
    expected = masked(secrets, data)
    assert fed(secrets, [data]) == expected
    assert fed(secrets, [data[i : i + 1] for i in range(len(data))]) == expected
    edges = [0, *sorted(min(cut, len(data)) for cut in cuts), len(data)]
    assert fed(secrets, [data[start:end] for start, end in itertools.pairwise(edges)]) == expected
    for cut in range(len(data)):
        assert fed(secrets, [data[:cut], data[cut:]]) == expected


@quick
@given(secrets_and_text)
@example((["xabcdefy", "abcdef"], b"xabcdef"))
def test_only_what_may_yet_become_a_secret_is_held_back(case: Any) -> None:
    secrets, data = case
    long = [secret.encode() for secret in secrets if len(secret.encode()) >= est.SECRET_BYTES]
    masker, written = Masker(secrets), b""
    for now in range(1, len(data) + 1):
        written += masker.feed(data[now - 1 : now])
        tails = [data[start:now] for start in range(now)]  # the longest first
        hold = [tail for tail in tails if any(value.startswith(tail) and value != tail for value in long)]
        assert written == masked(secrets, data[:now], now - len(hold[0]) if hold else now)
    whole = written + masker.flush()
    assert not any(value in part for part in whole.split(b"***") for value in long)


CODES = ["\x1b[31m", "\x1b[0m", "\x1b[K", "\x1b[01;31m\x1b[K", "\x1b[m", "\x1b", "\x1b[", "\x1b[3"]


@quick
@given(secrets_and_text, st.lists(st.tuples(st.integers(0, 60), st.sampled_from(CODES)), max_size=6), st.data())
@example((["abcdef"], b"abcdef"), [(1, "\x1b[31m"), (3, "\x1b[0m")], None)
@example((["abcdef"], b"://u:pass@h"), [(6, "\x1b[31m"), (7, "\x1b[K")], None)
def test_colours_tear_no_secret_apart(case: Any, put: list[tuple[int, str]], data: Any) -> None:
    """As `grep --color` writes what it found; each colour stays, and whatever the reads, the same is written."""
    secrets, plain = case
    text = plain
    for place, code in sorted(put, reverse=True):
        text = text[:place] + code.encode() + text[place:]
    colour = re.compile(rb"\x1b\[[0-9;:]*[mK]")
    shown = fed(secrets, [text])
    assert colour.sub(b"", shown) == fed(secrets, [colour.sub(b"", text)])
    assert colour.findall(shown) == colour.findall(text)
    assert fed(secrets, [text[i : i + 1] for i in range(len(text))]) == shown
    for cut in range(len(text)):
        assert fed(secrets, [text[:cut], text[cut:]]) == shown


def test_colours_without_end_are_not_held_back() -> None:
    masker, written = Masker(["secret-1"]), b""
    for _ in range(1000):
        written += masker.feed(b"s\x1b[0m")
    assert len(written) > 1000 and masker.feed(b" secr\x1b[1met-1 ").endswith(b" ***\x1b[1m ")


@quick
@given(st.lists(st.text("abxyzABC012+", min_size=6, max_size=30), min_size=1, max_size=12), st.data())
def test_secrets_are_found_in_one_pass_as_each_alone_is(secrets: list[str], data: Any) -> None:
    values = {secret.encode() for secret in secrets}
    parts = [*secrets, *(secret[:-1] for secret in secrets), *(secret[2:] for secret in secrets), "x", "A+0", "\n"]
    text = "".join(data.draw(st.lists(st.sampled_from(parts), max_size=20))).encode()
    text *= data.draw(st.sampled_from([1, 1, 40]))
    found = est.Needles(values).find(text, len(text) - 3)
    assert sorted(found) == sorted(est.find_each(values, text, len(text) - 3))


def test_many_secrets_cost_little_more_than_few(monkeypatch: pytest.MonkeyPatch) -> None:
    """A program that writes line by line paid for each of two hundred forms at each line."""
    chance = random.Random(7)
    tokens = {f"T{n}_TOKEN": base64.b64encode(chance.randbytes(30)).decode() for n in range(40)}
    lines = [f"2026-11-28 01:02:{n % 60:02} compiled page {n}\n".encode() for n in range(20_000)]

    def cost_s(secrets: tuple[str, ...], parts: list[bytes]) -> float:
        masker = Masker(secrets)
        began = time.process_time()
        for part in parts:
            masker.feed(part)
        return time.process_time() - began

    hidden = est.hidden_values(tokens)
    assert len(hidden) > 200
    whole = [b"".join(lines)] * 8
    for parts, times in ((lines, 12), (whole, 60)):
        few = min(cost_s((), parts) for _ in range(3))
        many = min(cost_s(hidden, parts) for _ in range(3))
        assert many < times * few, (many, few)


def test_short_values_and_no_values_mask_nothing() -> None:
    masker = Masker(["", "12345", "true"])
    assert masker.feed(b"true 12345") == b"true 12345" and masker.flush() == b""
    assert fed([], [b"a", b"", b"b"]) == b"ab"
    assert fed(["한글", "비밀"], ["한글 비밀".encode()]) == b"*** ***", "six bytes, not six letters"


def test_a_secret_of_several_lines_and_any_bytes() -> None:
    key = "-----BEGIN KEY-----\nMII.*+?(abc)\\E$\n-----END KEY-----"
    data = b"\xff\x00" + key.encode() + b"\r\n\xe2\x9c"
    assert fed([key], [data[i : i + 5] for i in range(0, len(data), 5)]) == b"\xff\x00***\r\n\xe2\x9c"


def test_a_step_that_ends_inside_a_secret_shows_what_it_wrote_and_the_next_one_starts_anew() -> None:
    masker = Masker(["secret-1"])
    assert masker.feed(b"a secret") == b"a " and masker.flush() == b"secret"
    assert masker.feed(b"-1 secret-1s") == b"-1 ***" and masker.flush() == b"s" and masker.flush() == b""


URL_PARTS = [
    "://",
    ":",
    "/",
    "@",
    " ",
    "u",
    "https://bob:geheim@h",
    "ftp://x:y@",
    "//:abcdef@",
    "abcdef",
    "?",
    "t" * 16,
    "://u:abc",
    "git://u:abc",
    "1://u:abc@",
]


@quick
@given(st.lists(st.sampled_from(URL_PARTS), max_size=9).map("".join), st.lists(st.integers(0, 99), max_size=5))
@example("https://bob:geheim@h", [11])
@example("ws://u:abcdef:x@", [1, 2, 8])
def test_passwords_in_urls_are_masked_wherever_the_text_is_cut(text: str, cuts: list[int]) -> None:
    data = text.encode()
    whole = fed(["abcdef"], [data])
    naive = re.sub(rb"(?<=[A-Za-z][A-Za-z0-9]://)([^\s/?#:@]*:)[^\s/?#]+(?=@)", rb"\1***", data)
    naive = re.sub(rb"(?<=[A-Za-z][A-Za-z0-9]://)[^\s/?#:@]{16,}(?=@)", b"***", naive)
    assert fed([], [data]) == naive
    assert b"abcdef" not in whole and not re.search(rb"[a-z]{2}://[^\s/?#:@]*:(?!\*\*\*)[^\s/?#*]+@", whole)
    edges = [0, *sorted(min(cut, len(data)) for cut in cuts), len(data)]
    assert fed(["abcdef"], [data[start:end] for start, end in itertools.pairwise(edges)]) == whole
    assert fed(["abcdef"], [data[i : i + 1] for i in range(len(data))]) == whole


QUERY_PARTS = [
    *("?", "&", "#", ";", "token=", "a=", "access_token=", "sort=", "abc", " ", "\n", '"', "x" * 30, "한글"),
    *("http://u:a&key=b@h", "://u:abcdef@", "?x=/p?sig=1", "user[otp]=", "="),
]


@quick
@given(st.lists(st.sampled_from(QUERY_PARTS), max_size=9).map("".join), st.lists(st.integers(0, 99), max_size=5))
@example("GET /r?token=abc&key=d HTTP", [8, 12, 15])
def test_secrets_in_queries_are_masked_wherever_the_text_is_cut(text: str, cuts: list[int]) -> None:
    data = text.encode()
    whole = fed(["abcdef"], [data])
    assert not re.search(rb"[?&#;](?:token|key|access_token|sig)=(?!\*\*\*)[^\s&#\"]", whole), whole
    edges = [0, *sorted(min(cut, len(data)) for cut in cuts), len(data)]
    assert fed(["abcdef"], [data[start:end] for start, end in itertools.pairwise(edges)]) == whole
    assert fed(["abcdef"], [data[i : i + 1] for i in range(len(data))]) == whole


def test_a_query_s_other_values_stay_and_a_secret_is_masked_alone() -> None:
    said = b'at "https://h/r?page=2&token=abc&x=1" and /cb#access_token=q;jwt=1 ok?a=b?key= end?'
    assert fed([], [said]) == b'at "https://h/r?page=2&token=***&x=1" and /cb#access_token=*** ok?a=b?key= end?'
    long = b"?token=" + b"x" * est.QUERY_BYTES + b"yy "
    assert fed([], [long]) == fed([], [long[:99], long[99:5000], long[5000:]]) == b"?token=***yy "
    assert est.mask_words({"a": ["x?private_token=1"]}) == {"a": ["x?private_token=***"]}
    assert est.plain_remote("https://h/o/r.git?token=abc") == "h/o/r"


def test_what_is_no_text_is_not_taken_for_a_url() -> None:
    """A program that prints bytes gets exactly these into its log."""
    for data in (
        b"\x00h://bob:geheim@h",
        b"://bob:geheim@h",
        b"http://bob:\x01geheim@h",
        b"ws://" + b"t" * 15 + b"\x02@",
    ):
        assert fed([], [data]) == data
    chance = random.Random(4)
    noise = [chance.randbytes(8) + b"://" + chance.randbytes(60) + b"@" for _ in range(2000)]
    assert sum(fed([], [data]) != data for data in noise) < 10


def test_a_url_that_never_ends_is_not_held_back() -> None:
    masker = Masker([])
    assert masker.feed(b"http://" + b"x" * 300) == b"http"
    assert len(masker.feed(b"x" * 300)) > 590 and masker.flush() == b""


LONG_WORDS = ("v", "a://", "://", "a://b:", "a://x@", "?a=", "?token=", "&key=a", "@", "token: ", "1.", "`", "\\", " ")


@pytest.mark.parametrize("word", LONG_WORDS)
def test_no_word_takes_long_to_look_through(word: str) -> None:
    """What a host says of itself is read by the master's only thread: 30,000 letters took it 43 s."""
    text = word * (60_000 // len(word))
    began = time.process_time()
    est.url_secrets(text)
    est.mask_words(text, ())
    assert time.process_time() - began < 2.0


def test_the_queries_of_a_text_show_no_secret() -> None:
    text = "https://h/?a=b?token=first&key=second#sig=third ?x=1;password=fourth?token=fifth"
    assert est.url_secrets(text) == ["first", "second", "third", "fourth?token=fifth"]
    assert est.url_secrets("git+ssh://u:pass%20word@h ssh://0123456789abcdef@h 1.2://x:y@h") == [
        "pass%20word",
        "y",
        "0123456789abcdef",
    ]


def test_the_daemons_own_log_shows_no_password(capfd: pytest.CaptureFixture[str]) -> None:
    est.DaemonLog().warning("can't reach %s", "https://bot:hunter2222@git.example/app.git?x=1")
    said = capfd.readouterr().err
    assert "git.example/app.git" in said and "hunter2222" not in said, said


def test_the_daemons_own_log_misses_no_step_in_detail(capfd: pytest.CaptureFixture[str]) -> None:
    """A record may come with several steps, with the job's state, or with its end."""
    queued = est.JobRecord("20261122-210501-7f3a", "h", "m", est.Kind.DEPLOY, branch="b")
    begun = est.replace(queued, state=est.State.RUNNING, step="one")
    later = est.replace(begun, step="four", timed_steps=["one", "two", "two"])
    ended = est.replace(later, state=est.State.SUCCEEDED, step=None, timed_steps=[*later.timed_steps, "four", "five"])
    log, records = est.DaemonLog(), [queued, begun, later, later, ended]
    log.verbose = True
    for before, now in itertools.pairwise(records):
        log.job(before, now)
    said = [line.rpartition(": ")[2] for line in capfd.readouterr().err.splitlines()]
    assert said == ["running", "one", "two", "two", "four", "five", "succeeded"]


@pytest.mark.parametrize(
    ("path", "unfit"),
    [
        ("a/b.txt", ""),
        ("a/" + "x" * 256, "both"),
        ("긴" * 86, "posix"),
        ("\udcff" * 256, "both"),
        ("console.log", ""),
        ("con report.txt", ""),
        ("con .txt", "windows"),
        ("a/Con", "windows"),
        ("aux.txt/a", "windows"),
        ("com0", ""),
        ("a:b", "windows"),
        ("back\\slash", "windows"),
        ("dot./a", "windows"),
        ("space ", "windows"),
        ("new\nline", "windows"),
        ("a/" * 60 + "b", "windows"),
    ],
)
def test_a_path_that_no_file_can_have(path: str, unfit: str) -> None:
    found = [est.is_unfit(path, 100, on_windows=windows) for windows in (False, True)]
    assert found == [unfit in ("both", "posix"), unfit in ("both", "windows")]


@pytest.mark.parametrize(
    ("said", "explained"),
    [
        ("ERROR: Repository not found.\nfatal: Could not read from remote repository.", "the forge knows"),
        ("fatal: 'master' is already checked out at '/srv/other'", "in another work tree"),
        (
            "error: Updating the following directories would lose untracked files in them:\n\tq",
            "changes are in the way",
        ),
        ("error: The following untracked working tree files would be removed by checkout:", "changes are in the way"),
        ("a: needs merge\nerror: you need to resolve your current index first", "a merge that somebody began"),
        ("error: insufficient permission for adding an object to repository database .git/objects", "another user"),
        ("fatal: .git/index: index file open failed: Permission denied", "another user"),
        ("fatal: cannot lock ref 'HEAD': unable to resolve reference 'HEAD': Permission denied", "another user"),
        ("fatal: unable to access '.git/config': Permission denied", "another user"),
        ("fatal: write error: No space left on device", "the disk is full"),
        ("fatal: sha1 file '/srv/.git/index.lock' write error. Out of diskspace", "the disk is full"),
        ("error: unable to write file c/4\nUpdating 1..2", "the disk is full"),
        ("fatal: .git/index: index file smaller than expected", "empty or damaged"),
        ("error: object file .git/objects/ab/cd is empty", "empty or damaged"),
        (" ! [rejected]  v1 -> v1  (would clobber existing tag)", "a tag was moved"),
        (" ERR_PNPM_NO_SCRIPT  Missing script: deploy:release", "no such script"),
        ("error: unable to unlink old 'dir/b': Operation not permitted", "chattr -i"),
        (
            "This repository is configured for Git LFS but 'git-lfs' was not found on your path.",
            "git-lfs is not installed",
        ),
        ("scripts/release.sh: line 3: pnpm: command not found", "no such package manager"),
        ("'pnpm' is not recognized as an internal or external command,", "no such package manager"),
    ],
)
def test_what_git_and_pnpm_say_is_explained(said: str, explained: str) -> None:
    assert explained in (est.explain_failure(said.encode()) or "")


@pytest.mark.parametrize(
    ("words", "found"),
    [
        ("pnpm deploy:release", ("deploy:release", True)),
        ("npm run build", ("build", True)),
        ("npm run build -- --fast", ("build", True)),
        ("npm run build --workspace=web", ("", False)),  # of another package.json
        ("npm run build -w web", ("", False)),
        ("npm run start", ("start", False)),  # without a script it runs server.js
        ("npm run build --if-present", ("", False)),
        ("yarn build:prod", ("build:prod", False)),  # perhaps another workspace's
        ("pnpm --filter web build:prod", ("", False)),
        ("pnpm install", ("install", False)),
        ("npm ci", ("", False)),
        ("sh deploy.sh", ("", False)),
    ],
)
def test_a_script_is_missed_only_where_it_is_certain(words: str, found: tuple[str, bool]) -> None:
    assert est.script_to_run(words.split()) == found
    assert est.script_to_run([*words.split()[:1], ""]) == ("", False)


def test_a_file_to_interpret_is_missed_only_where_it_is_certain() -> None:
    assert est.file_to_run(["sh", "deploy.sh"]) == "deploy.sh"
    assert est.file_to_run(["bash", "./deploy.sh"]) == "./deploy.sh"
    assert est.file_to_run(["bash", "deploy.sh"]) == "", "bash looks in PATH as well"
    assert est.file_to_run(["sh", "-c", "x.sh"]) == est.file_to_run(["make"]) == ""
