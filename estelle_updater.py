#!/usr/bin/env python3
# /// script
# requires-python = ">=3.11"
# dependencies = ["websockets>=17,<18", "tomli-w>=1.2,<2"]
# ///
"""Deploy a small fleet: one program on every host, master or agent by its own address.

| #  | section            | holds                                                                  |
| -- | ------------------ | ---------------------------------------------------------------------- |
| 0  | Header             | dependencies, this table, imports, version                             |
| 1  | Vocabulary         | enums, named state sets, every limit and timeout with its reason       |
| 2  | Errors             | one tree; each class carries its exit code, WHAT and HINT              |
| 3  | Addresses          | canonical addresses, whitelist verdict, role decision, targets         |
| 4  | Configuration      | frozen dataclasses, parse with all problems at once, render            |
| 5  | Messages           | the wire's verbs as dataclasses, encode and decode, size limits        |
| 6  | Journal            | offsets, what to send, what to accept, run and job states              |
| 7  | Pipeline           | plan a deployment as argument tuples, read versions out of output      |
| 10 | Files              | atomic writes, append-only logs, locks, state folder, configuration    |
| 11 | Processes          | spawn, stream, interrupt, kill trees, detach; POSIX and Windows        |
| 12 | Runner             | one job: lock, steps, log, result                                      |
| 13 | Probes             | own address and role                                                   |
| 15 | Agent              | connect, hello, resume, take orders                                    |
| 16 | Master             | handshake, registry, runs, queue, followers                            |
| 18 | Commander          | what the command line uses to talk to the master                       |
| 19 | Service            | start-up and shutdown order, signals, readiness                        |
| 20 | Tools              | build                                                                  |
| 21 | Command line       | the command table, cmd_*, rendering, main(argv) -> int                 |

A section uses only names from sections above it. Sections 1 to 7 are pure: time, bytes and randomness come in as
arguments, and nothing there touches a socket, file, process, clock, environment or terminal.

The one idea: a job's log is a file whose byte offset is the sequence number, and everything else (streaming, resuming,
following, history) is a cursor into it.
"""

from __future__ import annotations

import argparse
import errno
import itertools
import json
import os
import re
import struct
import sys
import threading
import time
import zlib
from collections import deque
from collections.abc import Callable, Container, Coroutine, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import MISSING, dataclass, field, replace
from enum import StrEnum
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn, Protocol, TypeAlias

__version__ = "0.1.0"


class _Lazy:
    """A module imported at its first use, so that a short command does not pay for what only the daemon needs."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, attribute: str) -> Any:
        return getattr(self._load(), attribute)

    def _load(self) -> Any:
        module = __import__(self._name, fromlist=["*"])
        globals()[self._name.replace(".", "_") if "." in self._name else self._name] = module
        return module


if TYPE_CHECKING:
    import asyncio
    import ctypes
    import queue
    import random
    import select
    import signal
    import socket
    import subprocess
else:
    asyncio, ctypes, queue, random = _Lazy("asyncio"), _Lazy("ctypes"), _Lazy("queue"), _Lazy("random")
    select, signal, socket, subprocess = _Lazy("select"), _Lazy("signal"), _Lazy("socket"), _Lazy("subprocess")


# ==============================================================================
# 1. Vocabulary: enums, named state sets, every limit and timeout with its reason
# ==============================================================================


class Role(StrEnum):
    """What this host's daemon is."""

    MASTER = "master"
    AGENT = "agent"


class Kind(StrEnum):
    """What an order asks of a host; every order is a job with the same folder, log, states, cancel and history."""

    DEPLOY = "deploy"


class State(StrEnum):
    """A job's state, as the contract spells it."""

    QUEUED = "queued"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"
    TIMEOUT = "timeout"
    OFFLINE = "offline"
    LOST = "lost"


FINAL = frozenset(State) - {State.QUEUED, State.RUNNING}

DEFAULT_PORT = 9900
PROTOCOL_OLDEST, PROTOCOL = 1, 1  # what this program speaks; both sides need one in common
FEATURES: tuple[str, ...] = ()

# Sizes in bytes
CHUNK_BYTES = 64 << 10  # the knee: smaller costs per message, larger delays whoever shares the connection
WINDOW_BYTES = 1 << 20  # unacknowledged on one connection, so that no live line waits behind megabytes
ACK_BYTES = 256 << 10
CHECK_BYTES = 4 << 10  # compared before a log is resumed
LINE_BYTES = 64 << 10  # a longer line is shown in pieces, for bounded memory
TAIL_BYTES = 4 << 10  # of a step's output, to explain its failure
VERSION_OVERLAP = 32  # a version may be split over two reads
SECRET_BYTES = 6  # shorter values are too common to mask
MESSAGE_BYTES = 4 << 20
REFUSED_KEPT = 10_000  # addresses whose refusals are counted

# Times in seconds
STEP_TIMEOUT_S = 1800.0  # one step; the configuration's [deploy] timeout overrides it
ACK_S = 0.1
SEND_S = 30.0  # a send that blocks longer has a dead peer: pings wait behind it and can't tell
PING_INTERVAL_S = PING_TIMEOUT_S = 20.0  # both ends: a peer that vanished is noticed in 40 s at most
WELCOME_S = 10.0
DIAL_S = PATIENCE_S = 3.0  # the contract: the master can't be reached after 3 s
ANSWER_S = 10.0
RETRY_S = (0.2, 2.0)  # a commander's pause between two tries
PING_S = 3.0  # is the old connection of the same machine id alive?
FACTS_S = 2.0  # `status` asks live
LOOK_S = 1.0  # at a running job's files, in case a poke was lost
LAUNCH_S = 15.0  # a runner that has not taken its lock by then did not start
CANCEL_LOOK_S = 0.2
GRACE_S, KILL_S = 5.0, 4.0  # interrupt, grace, kill: nothing is left after 10 s
DRAIN_S = 1.0  # a grandchild may hold the pipe after the command's end
QUESTION_S = 30.0  # one question to git
JOB_LOCK_WAIT_S, DAEMON_LOCK_WAIT_S = 10.0, 5.0  # the one before may just be ending
TICK_S = CONFIG_LOOK_S = 1.0
BUSY_RETRY_S = 2.0
ORDER_EXPIRES_S = 600.0  # an unacknowledged order: a host that is back after days must not run it
LOST_S = 900.0  # without a connection a running job counts as lost, which releases those who watch
DISK_RETRY_S = 5.0
RESULT_TRIES = 600  # a second apart: a result waits for room on a full disk


# ==============================================================================
# 2. Errors: one tree; each class carries its exit code, WHAT and HINT
# ==============================================================================


class UpdaterError(Exception):
    """What went wrong, in one line, and what to do about it; `exit_code` is the contract's."""

    exit_code = 1

    def __init__(self, what: str, hint: str = "") -> None:
        super().__init__(what)
        self.what = what
        self.hint = hint


class UsageError(UpdaterError):
    """Wrong words on the command line."""

    exit_code = 2


class ConfigError(UpdaterError):
    """The configuration is missing or wrong; `problems` lists every one, each naming file, key and value."""

    exit_code = 2

    def __init__(self, what: str, hint: str = "", problems: tuple[str, ...] = ()) -> None:
        super().__init__(what, hint)
        self.problems = problems


class ProtocolError(UpdaterError):
    """The other side sent something that is no part of the protocol."""


class UnreachableError(UpdaterError):
    """The master did not answer in time."""

    exit_code = 3


class RefusedError(UpdaterError):
    """The master answered and does not let us in."""

    exit_code = 3


class TargetError(UpdaterError):
    """No such target, or nobody of it is online."""

    exit_code = 4


class GuardError(UpdaterError):
    """A guard said no and nothing was changed."""

    exit_code = 5


def iter_leaves(group: BaseException) -> Iterator[BaseException]:
    """The exceptions in a group, however deep."""
    if isinstance(group, BaseExceptionGroup):
        for problem in group.exceptions:
            yield from iter_leaves(problem)
    else:
        yield group


# ==============================================================================
# 3. Addresses: canonical addresses, whitelist verdict, role decision, targets
# ==============================================================================

# ==============================================================================
# 4. Configuration: frozen dataclasses, parse with all problems at once, render
# ==============================================================================

# ==============================================================================
# 5. Messages: the wire's verbs as dataclasses, encode and decode, size limits
# ==============================================================================


@dataclass(frozen=True)
class Hello:
    """The first message of whoever dials: who it is and what it can do. Nothing else is processed before `Welcome`."""

    role: str  # "agent" or "commander"
    protocol: list[int]  # oldest and newest protocol it speaks
    version: str
    machine: str  # random id of the state folder; "" for a commander
    name: str  # host name
    nonce: str  # one random value per process: the same process that dials again, or another with the same id?
    platform: str = ""
    features: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Welcome:
    """The master's answer to `Hello`: the protocol to speak, and how it sees the other side."""

    protocol: int
    version: str
    address: str
    label: str
    nonce: str
    features: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Refuse:
    """No, with the reason and what to do about it; as an answer to `Hello` it ends the connection."""

    what: str
    hint: str = ""
    exit: int = 1


@dataclass(frozen=True)
class RunRecord:
    """One request and whom it concerns: `run.json`, and what a follower is told first."""

    run: str
    nonce: str
    kind: Kind
    target: str
    branch: str
    hosts: list[str]
    machines: dict[str, str]  # label -> machine id
    addresses: dict[str, str]  # label -> address, by which the host finds its section of the configuration
    created: float  # seconds since 1970, the master's clock
    by: str = ""
    offline: list[str] = field(default_factory=list)
    batch: int = 0
    wait_s: float = 0.0
    cancelled: bool = False


@dataclass(frozen=True)
class JobRecord:
    """One host's part of a run: `HOST.json`. Only its owner replaces it, each time with a higher revision."""

    run: str
    host: str
    machine: str
    kind: Kind
    branch: str
    state: State = State.QUEUED
    revision: int = 0
    step: str | None = None
    exit: int | None = None
    version: str | None = None
    commit: str | None = None
    error: str | None = None
    size: int = 0  # bytes of the log, once the state is final
    started: float | None = None
    ended: float | None = None
    behind: str | None = None  # the run that this one waits for
    ordered: bool = False  # the order may have reached the host
    provisional: bool = False  # the master's own verdict, which a late word of the host replaces
    acked: bool = False  # the master has the result
    groups: list[int] = field(default_factory=list)  # process groups of the steps, to clean up after a dead runner
    marks: list[list[int]] = field(default_factory=list)  # offset and length of each announcement in the log
    address: str = ""
    by: str = ""
    target: str = ""
    created: float = 0.0


@dataclass(frozen=True)
class Order:
    """Master to agent: do this job. Sent again until a `JobRecord` answers, so it must be harmless twice."""

    job: dict[str, Any]


@dataclass(frozen=True)
class Busy:
    """Agent to master: not now, another job holds the host."""

    run: str
    host: str
    behind: str


@dataclass(frozen=True)
class Cancel:
    """Stop a run: commander to master, and master to each agent that has a job of it."""

    run: str
    by: str = ""


@dataclass(frozen=True)
class Acked:
    """Master to agent: result and log are safe here, forget them when you like."""

    run: str
    host: str
    revision: int


@dataclass(frozen=True)
class Log:
    """Whoever has bytes opens a channel for them; the other side answers `Have`."""

    channel: int
    run: str
    host: str
    size: int


@dataclass(frozen=True)
class Have:
    """How many bytes of the channel's log are here. `rewind`: send from there; `check`: CRC-32 of the last 4 KiB before."""

    channel: int
    size: int
    rewind: bool = False
    check: int | None = None


@dataclass(frozen=True)
class Broken:
    """The copies of this log differ before the resume point: it ends here rather than mix two logs."""

    channel: int
    reason: str


@dataclass(frozen=True)
class Submit:
    """Commander to master: start a run. Run id and nonce are the commander's, so sending it twice starts one run."""

    run: str
    nonce: str
    kind: Kind
    target: str
    branch: str
    by: str = ""
    batch: int = 0
    wait_s: float = 0.0


@dataclass(frozen=True)
class Follow:
    """Commander to master: send the run, its jobs' states and logs, from the beginning or where `Have` says."""

    run: str
    target: str = ""


@dataclass(frozen=True)
class Ask:
    """A question with one answer: `what` is one of a fixed set."""

    id: int
    what: str
    args: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Answer:
    """The answer to `Ask` number `id`."""

    id: int
    result: dict[str, Any]


@dataclass(frozen=True)
class Notice:
    """A line for the person who watches."""

    text: str


MESSAGES: tuple[type, ...] = (
    Hello, Welcome, Refuse, RunRecord, JobRecord, Order, Busy, Cancel, Acked, Log, Have, Broken, Submit, Follow, Ask,
    Answer, Notice,
)  # fmt: skip
VERBS: dict[str, type] = {cls.__name__.removesuffix("Record").lower(): cls for cls in MESSAGES}
VERB_OF = {cls: verb for verb, cls in VERBS.items()}
WORDS: dict[str, type[StrEnum]] = {"State": State, "Kind": Kind}


def encode_message(message: Any) -> str:
    """A message as one line of JSON."""
    return json.dumps({"verb": VERB_OF[type(message)], **vars(message)}, ensure_ascii=False, separators=(",", ":"))


def decode_message(text: str) -> Any:
    """The message in one line of JSON; unknown fields are ignored. Raises ProtocolError that names what does not fit."""
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as problem:
        raise ProtocolError("a message is no JSON") from problem
    cls = VERBS.get(data.get("verb")) if isinstance(data, dict) and isinstance(data.get("verb"), str) else None
    if cls is None:
        raise ProtocolError(f"unknown verb {str(data.get('verb') if isinstance(data, dict) else data)[:40]!r}")
    return decode_fields(cls, data)


def decode_fields(cls: type[Any], data: dict[str, Any]) -> Any:
    """A dataclass from decoded JSON, each value checked against its annotation. Raises ProtocolError."""
    values: dict[str, Any] = {}
    for name, spec in cls.__dataclass_fields__.items():
        if name not in data:
            if spec.default is MISSING and spec.default_factory is MISSING:
                raise ProtocolError(f"{cls.__name__}: {name} is missing")
            continue
        value = data[name]
        if spec.type in WORDS and isinstance(value, str) and value in set(WORDS[spec.type]):
            value = WORDS[spec.type](value)
        elif not _fits(spec.type, value) or (name == "run" and not valid_run_id(value)):
            raise ProtocolError(f"{cls.__name__}: {name} can't be {str(value)[:60]!r}")
        values[name] = value
    return cls(**values)


def _fits(annotation: str, value: Any) -> bool:
    """Does a decoded JSON value have the annotated type? Booleans are no numbers, and numbers fit into 64 bits."""
    if annotation.endswith(" | None"):
        return value is None or _fits(annotation.removesuffix(" | None"), value)
    if annotation.startswith("list["):
        return isinstance(value, list) and all(_fits(annotation[5:-1], item) for item in value)
    if annotation.startswith("dict[str, "):
        return isinstance(value, dict) and all(_fits(annotation[10:-1], item) for item in value.values())
    if annotation == "int":
        return type(value) is int and abs(value) < 1 << 63
    if annotation == "float":
        return type(value) is float or (type(value) is int and abs(value) < 1 << 53)
    return annotation == "Any" or type(value).__name__ == annotation


CHUNK_HEADER = struct.Struct("!BIQ")  # frame version, channel, offset


def encode_chunk(channel: int, offset: int, data: bytes) -> bytes:
    """Log bytes as a binary frame."""
    return CHUNK_HEADER.pack(1, channel, offset) + data


def decode_chunk(frame: bytes) -> tuple[int, int, bytes]:
    """(channel, offset, bytes) of a binary frame. Raises ProtocolError."""
    if len(frame) < CHUNK_HEADER.size or frame[0] != 1:
        raise ProtocolError("a binary frame of an unknown form")
    _, channel, offset = CHUNK_HEADER.unpack_from(frame)
    return channel, offset, frame[CHUNK_HEADER.size :]


# ==============================================================================
# 6. Journal: offsets, what to send, what to accept, run and job states
# ==============================================================================


NEXT_STATES: dict[State, frozenset[State]] = {
    State.QUEUED: frozenset(State),
    State.RUNNING: frozenset(State) - {State.QUEUED, State.OFFLINE},
    **{state: frozenset() for state in FINAL},
}  # a provisional verdict of the master may become anything: it was a guess about a host it could not hear


def accepts_job(old: JobRecord | None, new: JobRecord) -> bool:
    """Does the host's record `new` replace what is known? Only a higher revision, and only along allowed transitions."""
    if old is None or (old.provisional and new.revision >= old.revision and not new.provisional):
        return True
    return new.revision > old.revision and new.state in NEXT_STATES[old.state]


def accepts_chunk(size: int, offset: int, length: int) -> tuple[bool, bool]:
    """(write it, ask to rewind) for a chunk at `offset` where `size` bytes are: written only exactly at the end."""
    return offset == size, offset != size and offset + length > size


@dataclass
class SendCursor:
    """How far one log has been sent to one reader, in bytes; it holds no data, so a slow reader costs nothing."""

    channel: int
    run: str
    host: str
    size: int  # what there is to send
    sent: int | None = None  # None until the reader has said where to begin
    acked: int = 0

    def next_span(self, room: int) -> tuple[int, int] | None:
        """(offset, length) of what to send next, or None; `room` is what may still be unacknowledged."""
        if self.sent is None:
            return None
        length = min(self.size - self.sent, CHUNK_BYTES, room)
        return (self.sent, length) if length > 0 else None

    def on_have(self, size: int, rewind: bool) -> None:
        """The reader has `size` bytes: go on from there if it asks, or if it is ahead of what we sent."""
        self.acked = size
        self.sent = size if rewind or self.sent is None else max(self.sent, size)

    @property
    def unacked(self) -> int:
        return max(0, (self.sent or 0) - self.acked)


def run_ok(jobs: Iterable[JobRecord]) -> bool:
    """Did every host succeed?"""
    return all(job.state is State.SUCCEEDED for job in jobs)


def decide_orders(
    runs: Sequence[tuple[RunRecord, Mapping[str, JobRecord]]], online: Container[str], busy: Container[str]
) -> tuple[list[JobRecord], list[tuple[JobRecord, str]], dict[tuple[str, str], str]]:
    """What the queue does now, oldest run first: (to order, to end with its reason, (run, host) -> the run it waits for).

    One mechanism for a host that is busy, offline or not due in its batch: the job stays queued.
    """
    order: list[JobRecord] = []
    end: list[tuple[JobRecord, str]] = []
    behind: dict[tuple[str, str], str] = {}
    holder: dict[str, str] = {}  # machine -> the run that has it now or next
    for run, jobs in runs:
        for job in jobs.values():
            if job.state is State.RUNNING or (job.state is State.QUEUED and job.ordered):
                holder.setdefault(job.machine, job.run)
    for run, jobs in runs:
        step = run.batch or len(run.hosts)
        for index, host in enumerate(run.hosts):
            job = jobs[host]
            if job.state is not State.QUEUED or job.ordered:
                continue
            earlier = [jobs[name] for name in run.hosts[: index - index % step]]
            if any(other.state in FINAL and other.state is not State.SUCCEEDED for other in earlier):
                end.append((job, "an earlier batch failed"))
            elif job.machine in holder:
                behind[run.run, host] = holder[job.machine]
            elif all(other.state in FINAL for other in earlier) and job.machine in online and job.machine not in busy:
                order.append(job)
                holder[job.machine] = job.run
            else:
                holder[job.machine] = job.run
    return order, end, behind

def run_of_job(job: JobRecord) -> RunRecord:
    """The run of a job whose `run.json` is elsewhere, or nowhere: the job knows enough of it."""
    return RunRecord(
        job.run, "", job.kind, job.target, job.branch, [job.host], {job.host: job.machine}, {job.host: job.address},
        job.created, job.by,
    )  # fmt: skip


def job_of_run(run: RunRecord, host: str) -> JobRecord:
    """A host's job at the start of a run."""
    return JobRecord(
        run.run, host, run.machines[host], run.kind, run.branch,
        address=run.addresses.get(host, ""), by=run.by, target=run.target, created=run.created,
    )  # fmt: skip


# ==============================================================================
# 7. Pipeline: plan a deployment as argument tuples, read versions out of output
# ==============================================================================


@dataclass(frozen=True)
class Step:
    """One command of a deployment: how it is announced, and what really runs."""

    label: str
    argv: tuple[str, ...]


def plan_fetch(remote: str) -> Step:
    """The document's first step. `--prune` lets branch `a` make way for `a/b`."""
    return Step(f"git fetch {remote}", ("git", "fetch", "--prune", remote))


def is_commit_id(text: str) -> bool:
    """A full commit id, SHA-1 or SHA-256."""
    return re.fullmatch(r"[0-9a-f]{40}|[0-9a-f]{64}", text) is not None


def plan_checkout(branch: str, remote: str, refs: Container[str]) -> tuple[Step | None, Step, Step | None]:
    """(what fetches the ref or None, checkout, pull or None) for a branch, or else a full commit id or a tag.

    `refs` are the full names of the refs called `branch` after the fetch. A branch wins over a tag of the same name,
    as `git checkout` has it; full names keep git from guessing, and `--` keeps a folder of that name out of it.
    """
    label = f"git checkout {branch}"
    tracking = f"refs/remotes/{remote}/{branch}"
    if f"refs/heads/{branch}" in refs or tracking in refs:
        argv = (branch,) if f"refs/heads/{branch}" in refs else ("-b", branch, "--track", tracking)
        pull = Step(f"git pull {remote} {branch}", ("git", "pull", "--ff-only", remote, f"refs/heads/{branch}"))
        return None, Step(label, ("git", "checkout", *argv, "--")), pull
    if is_commit_id(branch):
        get = Step(label, ("git", "fetch", "--no-tags", remote, branch))
        return get, Step(label, ("git", "checkout", "--detach", branch, "--")), None
    tag = f"refs/tags/{branch}"
    get = Step(label, ("git", "fetch", "--no-tags", remote, f"+{tag}:{tag}"))
    return get, Step(label, ("git", "checkout", "--detach", tag, "--")), None


def plan_command(command: tuple[str, ...]) -> Step:
    """The host's configured command."""
    return Step(" ".join(command), command)


def plan_restart(units: tuple[str, ...]) -> tuple[Step, ...]:
    """Restart the configured systemd units, then require each to be active."""
    if not units:
        return ()
    label = "systemctl restart " + " ".join(units)
    return Step(label, ("systemctl", "restart", *units)), Step(
        "systemctl is-active " + " ".join(units), ("systemctl", "is-active", *units)
    )


VERSION_IN_OUTPUT = re.compile(rb"(?<![0-9A-Za-z])v[0-9]{4}_[0-9]+(?![0-9A-Za-z])")


def parse_version_file(data: bytes) -> str | None:
    """The "version" of a JSON file, or the first line of plain text; None where there is neither."""
    text = data.decode("utf-8-sig", "replace").strip()
    if text.startswith("{"):
        try:
            value = json.loads(text).get("version")
        except ValueError:
            return None
        return str(value)[:80] if isinstance(value, (str, int, float)) else None
    return text.splitlines()[0].strip()[:80] if text else None


class Masker:
    """Replaces secrets in a stream of bytes, also where one is split over two reads. A tail that could begin a secret
    is held back until the next byte or `flush`."""

    def __init__(self, secrets: Iterable[str]) -> None:
        values = sorted({secret.encode() for secret in secrets if len(secret.encode()) >= SECRET_BYTES}, key=len)
        self._pattern = re.compile(b"|".join(re.escape(value) for value in reversed(values))) if values else None
        self._values = values
        self._held = b""

    def feed(self, data: bytes) -> bytes:
        """What may be written now."""
        if self._pattern is None:
            return data
        data = self._held + data
        hold, last = len(data), 0
        for match in self._pattern.finditer(data):
            last = match.end()
            if last == len(data) and any(value.startswith(match[0]) and value != match[0] for value in self._values):
                hold = match.start()  # it may yet become the longer one
        for start in range(max(last, len(data) - len(self._values[-1]) + 1), hold):
            if any(value.startswith(data[start:]) for value in self._values):
                hold = start
                break
        self._held = data[hold:]
        return self._pattern.sub(b"***", data[:hold])

    def flush(self) -> bytes:
        """The tail that turned out to be no longer secret."""
        held, self._held = self._held, b""
        return self._pattern.sub(b"***", held) if self._pattern else held

KNOWN_FAILURES: tuple[tuple[bytes, str], ...] = (
    (rb"detected dubious ownership", "the repository belongs to another user: git config --global --add safe.directory DIR"),
    (rb"would be overwritten by (?:merge|checkout)", "local changes are in the way of the incoming commits (listed above)"),
    (rb"index\.lock': File exists", "a git process left its index.lock behind: remove it if no git runs there"),
    (rb"Not possible to fast-forward|Diverging branches", "the local branch has commits that the remote has not"),
    (rb"couldn't find remote ref|did not match any file|invalid reference", "no such branch, tag or commit on the remote"),
    (rb"could not read (?:Username|Password)|terminal prompts disabled|Authentication failed", "git asked for a password"),
    (rb"Host key verification failed", "ssh does not know the remote's host key"),
    (rb"Permission denied \(publickey", "ssh has no key that the remote accepts"),
    (rb"Could not resolve host", "the remote's name does not resolve"),
)


def explain_failure(tail: bytes) -> str | None:
    """What the last output of a failed step says in other words, where it is one of the known failures."""
    return next((text for pattern, text in KNOWN_FAILURES if re.search(pattern, tail)), None)


# ==============================================================================
# 10. Files: atomic writes, append-only logs, locks, state folder, configuration
# ==============================================================================


class FileLock:
    """A lock on the file `path` that its holder loses by dying, however it dies; it says whether a runner lives.

    The file is a file of the lock's own (Windows locks forbid reading) and stays for ever: removing it would let two
    processes each hold a lock on another file of that name. `acquire` in the process that is to hold it: after a fork.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._path = os.fspath(path)
        self._fd = -1

    def acquire(self, timeout_s: float = 0) -> bool:
        """Take the lock, waiting up to `timeout_s` (at least 0.1 s: `held_elsewhere` may be looking just now)."""
        deadline = time.monotonic() + max(timeout_s, 0.1)
        # never through a link that somebody else put there; descriptors of os.open are not inherited by steps
        fd = os.open(self._path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o600)
        while not self._lock(fd):
            if time.monotonic() >= deadline:
                os.close(fd)
                return False
            time.sleep(0.01)
        self._fd = fd
        return True

    def release(self) -> None:
        """Give the lock back; nothing happens if it is not held."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def __enter__(self) -> FileLock:
        if not self.acquire():
            raise UpdaterError(f"{self._path}: locked by another process")
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    @staticmethod
    def held_elsewhere(path: str | os.PathLike[str]) -> bool:
        """Whether anybody holds the lock now (this process through another FileLock included); creates nothing."""
        try:
            fd = os.open(path, os.O_RDWR | getattr(os, "O_NOFOLLOW", 0))
        except FileNotFoundError:
            return False
        try:
            return not FileLock._lock(fd, only_look=True)
        finally:
            os.close(fd)  # where a look has to take the lock, this gives it back

    @staticmethod
    def _lock(fd: int, *, only_look: bool = False) -> bool:
        try:
            if sys.platform == "win32":
                import msvcrt

                msvcrt.locking(fd, msvcrt.LK_NBLCK, 1)
            else:
                import fcntl

                if sys.platform != "linux":
                    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    return True
                # Open file description locks are the descriptor's like flock's, and can be asked about
                ask = struct.pack("hhqqi4x", fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)  # struct flock: the whole file
                answer = fcntl.fcntl(fd, fcntl.F_OFD_GETLK if only_look else fcntl.F_OFD_SETLK, ask)
                return not only_look or struct.unpack_from("h", answer) == (fcntl.F_UNLCK,)
        except OSError as problem:
            if sys.platform != "win32" and not isinstance(problem, (BlockingIOError, PermissionError)):
                raise  # a file system without locks
            return False
        return True


def write_atomic(path: Path, data: bytes, *, durable: bool = False) -> None:
    """Replace a file as a whole, readable by its owner alone; `durable` survives a power loss."""
    temp = path.with_name(f".{path.name}.{os.urandom(4).hex()}")
    fd = os.open(temp, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o600)
    try:
        with open(fd, "wb") as file:
            file.write(data)
            if durable:
                file.flush()
                os.fsync(file.fileno())
        for attempt in range(20):
            try:
                return os.replace(temp, path)
            except PermissionError:  # Windows: somebody reads the old file right now
                if attempt == 19:
                    raise
                time.sleep(0.02)
    except BaseException:
        temp.unlink(missing_ok=True)
        raise


def read_json(path: Path) -> dict[str, Any] | None:
    """The object in a JSON file; None where there is none, or it is torn."""
    for _ in range(20):
        try:
            data = json.loads(path.read_bytes())
            return data if isinstance(data, dict) else None
        except PermissionError:  # Windows: it is being replaced
            time.sleep(0.02)
        except (OSError, ValueError):
            return None
    return None


LOG_FLAGS = os.O_WRONLY | os.O_CREAT | os.O_APPEND | getattr(os, "O_BINARY", 0)


def log_size(path: Path) -> int:
    """How many bytes a log has; 0 where it is missing."""
    try:
        return path.stat().st_size
    except OSError:
        return 0


def append_log(path: Path, offset: int, data: bytes) -> tuple[int, bool]:
    """Append bytes that belong at `offset`, if that is the end: (size now, ask the sender to rewind). May raise OSError."""
    fd = os.open(path, LOG_FLAGS, 0o600)
    try:
        size = os.fstat(fd).st_size
        write, rewind = accepts_chunk(size, offset, len(data))
        if write:
            size += os.write(fd, data)
            rewind = size != offset + len(data)
        return size, rewind
    finally:
        os.close(fd)


def read_log(path: Path, offset: int, length: int) -> bytes:
    """Bytes of a log; fewer where it ends, none where it is missing."""
    try:
        with open(path, "rb", buffering=0) as file:
            file.seek(offset)
            return file.read(length) or b""
    except OSError:
        return b""


def log_check(path: Path, size: int) -> int:
    """CRC-32 of the last 4 KiB before `size`: whether two copies of a log are the same so far."""
    start = max(0, size - CHECK_BYTES)
    return zlib.crc32(read_log(path, start, size - start))


class DaemonLog:
    """The daemon's own log: one line per event on stderr, with its time, or with its priority under journald."""

    def __init__(self) -> None:
        self.verbose = False
        self._journal = "JOURNAL_STREAM" in os.environ

    def _line(self, priority: int, word: str, text: str, args: tuple[Any, ...]) -> None:
        text = (text % args if args else text).replace("\n", " ")
        start = f"<{priority}>" if self._journal else time.strftime("%Y-%m-%d %H:%M:%S ") + word
        data = f"{start}{text}\n".encode(sys.stderr.encoding or "utf-8", "backslashreplace")
        with suppress(OSError, ValueError):
            sys.stderr.buffer.write(data)
            sys.stderr.buffer.flush()

    def debug(self, text: str, *args: Any) -> None:
        if self.verbose:
            self._line(7, "debug    ", text, args)

    def info(self, text: str, *args: Any) -> None:
        self._line(6, "", text, args)

    def warning(self, text: str, *args: Any) -> None:
        self._line(4, "warning: ", text, args)

    def error(self, text: str, *args: Any) -> None:
        self._line(3, "error: ", text, args)


log = DaemonLog()


def program_argv() -> list[str]:
    """How to start this very program: interpreter and zipapp or module, as absolute paths."""
    module = Path(__file__).absolute()
    return [sys.executable, str(module.parent if module.parent.is_file() else module)]


def program_name() -> str:
    """What a person types to run this program."""
    return f"{'python' if os.name == 'nt' else 'python3'} {sys.argv[0]}"


class StateFolder:
    """Where this host keeps what it knows: one folder per run, readable with ordinary tools."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.runs = root / "runs"
        self.daemon_file = root / "daemon.json"
        self.daemon_lock = root / "daemon.lock"
        self.job_lock = root / "job.lock"
        self.runner_log = root / "runner.log"

    def create(self) -> None:
        """Make the folder. Raises UpdaterError where that is impossible."""
        try:
            self.runs.mkdir(mode=0o700, parents=True, exist_ok=True)
            probe = self.root / f".probe.{os.getpid()}"
            write_atomic(probe, b"")
            probe.unlink()
        except OSError as problem:
            raise UsageError(
                f"can't write to the state folder {self.root}: {problem.strerror}",
                "choose another with --state DIR or ESTELLE_STATE",
            ) from problem

    def machine_id(self) -> str:
        """This host's random identity, made at the first start. A copied folder is a cloned identity."""
        path = self.root / "machine-id"
        with suppress(OSError):
            text = path.read_text().strip()
            if re.fullmatch(r"[0-9a-f]{32}", text):
                return text
        text = os.urandom(16).hex()
        write_atomic(path, text.encode(), durable=True)
        return text

    def log_file(self, run: str, host: str) -> Path:
        return self.runs / run / f"{file_label(host)}.log"

    def job_file(self, run: str, host: str) -> Path:
        return self.runs / run / f"{file_label(host)}.json"

    def cancel_file(self, run: str, host: str) -> Path:
        return self.runs / run / f"{file_label(host)}.cancel"

    def run_ids(self) -> list[str]:
        """All recorded runs, oldest first."""
        try:
            return sorted(name for name in os.listdir(self.runs) if valid_run_id(name))
        except OSError:
            return []

    def load_run(self, run: str) -> RunRecord | None:
        return self._load(self.runs / run / "run.json", RunRecord)

    def load_job(self, run: str, host: str) -> JobRecord | None:
        return self._load(self.job_file(run, host), JobRecord)

    def load_jobs(self, run: str) -> list[JobRecord]:
        """Every host's record in a run's folder."""
        files = sorted((self.runs / run).glob("*.json"))
        jobs = (self._load(file, JobRecord) for file in files if file.name != "run.json")
        return [job for job in jobs if job is not None]

    def save_run(self, record: RunRecord) -> None:
        """Recorded for good before it returns."""
        (self.runs / record.run).mkdir(mode=0o700, parents=True, exist_ok=True)
        write_atomic(self.runs / record.run / "run.json", _dump(record), durable=True)

    def save_job(self, record: JobRecord, *, durable: bool = False) -> None:
        (self.runs / record.run).mkdir(mode=0o700, parents=True, exist_ok=True)
        write_atomic(self.job_file(record.run, record.host), _dump(record), durable=durable)

    @staticmethod
    def _load(path: Path, cls: type[Any]) -> Any:
        data = read_json(path)
        try:
            return None if data is None else decode_fields(cls, data)
        except ProtocolError:
            return None


def _dump(record: Any) -> bytes:
    return json.dumps(vars(record), ensure_ascii=False, indent=1).encode() + b"\n"


def default_state_folder(environ: Mapping[str, str]) -> Path:
    """The contract's place for state: `$ESTELLE_STATE`, systemd's `$STATE_DIRECTORY`, else the user's own folder."""
    if path := environ.get("ESTELLE_STATE") or environ.get("STATE_DIRECTORY", "").partition(os.pathsep)[0]:
        return Path(path).absolute()
    if os.name == "nt":
        return Path(environ.get("LOCALAPPDATA") or Path.home() / "AppData/Local") / "estelle-updater"
    return Path.home() / ".local/state/estelle-updater"


CONFIG_NAMES = ("updater.json", "updater.toml")


def find_config(start: Path) -> Path:
    """The committed configuration, by walking up from `start`. Raises ConfigError where there is none, or two."""
    for folder in (start, *start.parents):
        found = [folder / "config" / name for name in CONFIG_NAMES if (folder / "config" / name).is_file()]
        if len(found) == 2:
            raise ConfigError(f"both {found[0]} and {found[1]} exist", "keep one of them")
        if found:
            return found[0]
    raise ConfigError(
        f"no config/updater.json or config/updater.toml in {start} or above it",
        "go to the repository, or name the file with --config FILE",
    )


def load_config(path: Path) -> Config:
    """The configuration in a file. Raises ConfigError with every problem at once."""
    try:
        data = path.read_bytes()
    except OSError as problem:
        raise ConfigError(f"can't read {path}: {problem.strerror}", "name the file with --config FILE") from problem
    return parse_config(data, str(path), "toml" if path.suffix == ".toml" else "json")


class ConfigFile:
    """The configuration as a daemon uses it: read again once it changed and then lay still for a second; a file that is
    missing or invalid keeps the old settings, and `problem` says so."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = load_config(path)
        self.problem: str | None = None
        self._used = self._seen = self._stamp()

    def _stamp(self) -> tuple[int, int, int] | None:
        try:
            stat = self.path.stat()
        except OSError:
            return None
        return stat.st_mtime_ns, stat.st_size, stat.st_ino

    def look(self) -> bool:
        """Called about once a second: True when new settings took effect."""
        stamp = self._stamp()
        if stamp == self._used or stamp != self._seen:
            self._seen = stamp
            return False
        self._used = stamp
        try:
            config = load_config(self.path)
        except ConfigError as problem:
            self.problem = problem.what
            return False
        changed = config != self.config
        self.config, self.problem = config, None
        return changed


def work_tree(config_path: Path) -> Path:
    """The git work tree that holds the configuration file, else the folder above `config/`."""
    for folder in config_path.parents:
        if (folder / ".git").exists():
            return folder
    return config_path.parent.parent


# ==============================================================================
# 11. Processes: spawn, stream, interrupt, kill trees, detach; POSIX and Windows
# ==============================================================================


MARK = "ESTELLE_RUN"  # environment variable that every process of a step carries: it finds what a dead runner left
DETACHED = "ESTELLE_DETACHED"  # Windows: this is the runner's second start
PIPE_BYTES = 1 << 20  # Linux' limit for an unprivileged pipe: a burst goes on while the disk is slow
StrPath: TypeAlias = str | os.PathLike[str]
HIDDEN: dict[str, Any] = {"creationflags": 0x08000000} if os.name == "nt" else {}  # CREATE_NO_WINDOW, for Popen
_ANY_CASE = re.IGNORECASE if os.name == "nt" else 0

_PM2_KEYS = (  # what PM2 7.0.4 adds besides pm_* and PM2_*, seen in its child's environment
    "automation|auto(re)?start|created_at|exec_(interpreter|mode)|exit_code|exp_backoff_restart_delay|instance_var"
    "|instances|kill_(retry_time|timeout)|km_link|log_date_format|max_(memory_restart|restarts)|merge_logs|min_uptime"
    "|name(space)?|pmx|(prev_)?restart_delay|restart_time|status|stop_exit_codes|treekill|unique_id|unstable_restarts"
    "|vizion(_running)?|watch|windowsHide"
)
_DAEMON_KEYS = (  # the daemon's own: its supervisor's, its interpreter's, the git hook's that started it
    r"ESTELLE_.*|pm_.*|PM2_(?!HOME$).*|NODE_APP_INSTANCE|NODE_CHANNEL_.*|NOTIFY_SOCKET|WATCHDOG_.*|LISTEN_.*"
    r"|INVOCATION_ID|JOURNAL_STREAM|SYSTEMD_EXEC_PID|MAINPID|(STATE|CREDENTIALS)_DIRECTORY|GIT_(?!SSH).*|PYTHON.+"
)
_NO_PROMPTS = {
    "CI": "true",  # pnpm and others then fail instead of asking
    "COREPACK_ENABLE_DOWNLOAD_PROMPT": "0",
    "GIT_TERMINAL_PROMPT": "0",
    "GCM_INTERACTIVE": "never",
    "GIT_ASKPASS": "",  # empty: neither core.askPass nor SSH_ASKPASS is started
    "SSH_ASKPASS": "",
    "SSH_ASKPASS_REQUIRE": "never",
    "GIT_HTTP_LOW_SPEED_LIMIT": "1",  # a server that accepts and stays silent would hold git for ever
    "GIT_HTTP_LOW_SPEED_TIME": "60",
}
# This variable hides core.sshCommand (often a deploy key), so it reads that itself. A shell function, because git
# appends the arguments, and they must stay untouched while the configured command is evaluated.
_SSH_COMMAND = (
    'f() { eval "$(git config core.sshCommand || echo ssh) -o BatchMode=yes -o ConnectTimeout=15 \\"\\$@\\""; }; f'
)


def scrub_environment(env: Mapping[str, str]) -> dict[str, str]:
    """The environment that steps start from: `env` without what belongs to the daemon, with all prompts off.

    The host's own `env` goes on top. A GIT_SSH or GIT_SSH_COMMAND in `env` stays: somebody configured it.
    """
    dropped = _DAEMON_KEYS + (f"|{_PM2_KEYS}" if "pm_id" in env or "PM_ID" in env else "")  # Windows says PM_ID
    kept = {key: value for key, value in env.items() if not re.fullmatch(dropped, key, _ANY_CASE)}
    if "GIT_SSH" not in kept and "GIT_SSH_COMMAND" not in kept:
        kept |= {"GIT_SSH_COMMAND": _SSH_COMMAND, "GIT_SSH_VARIANT": "ssh"}
    return kept | _NO_PROMPTS


def resolve_program(name: str, path_env: str, cwd: StrPath | None = None) -> list[str]:
    """The words that start the program `name` as found in `path_env`; a name with a folder is looked up below `cwd`.

    Without `cwd` that one is left to `spawn_step`. On Windows .com .exe .bat .cmd are tried, the kinds that can be
    started, and never the current folder: a repository must not bring its own git. Raises UpdaterError.
    """
    has_folder = bool(os.path.dirname(name))
    if has_folder and cwd is None:
        return [name]
    suffixes: tuple[str, ...] = ("",)
    if os.name == "nt" and not name.lower().endswith(kinds := (".com", ".exe", ".bat", ".cmd")):
        suffixes = (*kinds, "") if has_folder else kinds
    folders = [cwd or ""] if has_folder else [part.strip('"') for part in path_env.split(os.pathsep) if part]
    for path in (os.path.join(folder, name + suffix) for folder in folders for suffix in suffixes):
        if os.path.isfile(path) and os.access(path, os.X_OK):
            return [os.path.abspath(path)]
    where, more = (f"in {cwd}", "") if has_folder else ("in PATH", f"; PATH is {path_env}")
    raise UpdaterError(f"{name}: not found {where}", "it must be there and executable" + more)


def render_cmd_line(argv: Sequence[str], shell: str) -> str:
    """The command line by which cmd.exe (`shell`) runs the .cmd file `argv[0]` with exactly these arguments.

    Raises UpdaterError for what cmd.exe interprets even in quotes, or could once the shim passes it on as `%*`.
    """
    for bad in (word for word in argv[1:] if re.search(r'["%!^&|<>\r\n\0]|\\$', word)):
        hint = 'a .cmd program takes no " % ! ^ & | < >, no line break and no \\ at the end'
        raise UpdaterError(f"{argv[0]}: cmd.exe would interpret the argument {bad!r}", hint)
    words = [word if re.fullmatch(r"[\w./\\:@+-]+", word) else f'"{word}"' for word in argv[1:]]
    line = " ".join([f'"{argv[0]}"', *words])
    return f'"{shell}" /d /s /c "{line}"'


class _Process(NamedTuple):
    """One process of Linux' table; `start` in clock ticks since boot, `alive` is False for a zombie."""

    parent: int
    group: int
    start: int
    alive: bool
    mark: str | None


def _read_process(pid: int) -> _Process | None:
    stat = environ = b""
    with suppress(OSError):  # it ended, it is another user's, there is no /proc
        with open(f"/proc/{pid}/stat", "rb") as file:
            stat = file.read()
        with open(f"/proc/{pid}/environ", "rb") as file:
            environ = file.read()
    if not stat:
        return None
    state, parent, group, *more = stat[stat.rindex(b")") + 2 :].split()
    alive = state not in (b"Z", b"X") or int(more[14]) > 1  # a zombie with threads: only its first one ended
    found = re.search(rb"(?:\A|\0)" + MARK.encode() + rb"=([^\0]*)", environ)
    return _Process(int(parent), int(group), int(more[16]), alive, os.fsdecode(found[1]) if found else None)


def _find_family(mark: str, pgids: set[int], root: int = -1, since: int = 0) -> set[int]:
    """The living processes of the step `mark`: those that carry it, their groups among `pgids`, all their children.

    With a `root` also its descendants, started at tick `since` or later: a service of an earlier step is not ours.
    A recorded group counts only while a member carries the mark: numbers are used again after a reboot.
    What carries another mark belongs to another step. Never this process or its ancestors.
    """
    pids = [int(name) for name in os.listdir("/proc") if name.isdigit()] if sys.platform == "linux" else []
    table = {pid: process for pid in pids if (process := _read_process(pid))}
    children: dict[int, list[int]] = {}
    for pid, process in table.items():
        children.setdefault(process.parent, []).append(pid)
    family, spared, ancestor = set[int](), set[int](), os.getpid()
    while ancestor in table:
        spared.add(ancestor)
        ancestor = table[ancestor].parent
    seeds = [pid for pid, process in table.items() if process.mark == mark]
    groups = {table[pid].group for pid in seeds} & pgids
    seeds += [pid for pid, process in table.items() if process.group in groups or process.parent == root]
    while seeds:
        pid = seeds.pop()
        if pid in family or pid in spared or table[pid].start < since or table[pid].mark not in (None, mark):
            continue
        family.add(pid)
        seeds += children.get(pid, [])
    return {pid for pid in family if table[pid].alive}


def _kill_family(mark: str, pgids: set[int], deadline_s: float, root: int = -1, since: int = 0) -> tuple[int, bool]:
    """SIGKILL a step's processes, again and again as they may fork meanwhile: how many, and whether none is left."""
    killed, refused, deadline, pause_s = set[int](), set[int](), time.monotonic() + deadline_s, 0.002
    while (victims := _find_family(mark, pgids, root, since) - refused) and time.monotonic() < deadline:
        for pid in victims:
            with suppress(ProcessLookupError):
                try:
                    os.kill(pid, 9)
                    killed.add(pid)
                except PermissionError:  # sudo's child: waiting will not help
                    refused.add(pid)
        time.sleep(pause_s)
        pause_s = min(2 * pause_s, 0.1)
    return len(killed), not victims and not refused


def kill_leftovers(mark: str, pgids: Iterable[int] = (), deadline_s: float = KILL_S) -> int:
    """Kill what the step `mark` of a dead runner left running; how many processes that were.

    Nothing is left on Windows: the runner's Job Object took it along.
    """
    return _kill_family(mark, set(pgids), deadline_s)[0]


def adopt_orphans() -> bool:
    """Make this process the parent of all orphans below it, so that a double fork can't leave its tree; Linux only.

    For a runner, never for the daemon: a runner that detaches would become the daemon's child again.
    """
    if sys.platform == "linux":
        with suppress(OSError, AttributeError):
            return bool(ctypes.CDLL(None).prctl(36, 1, 0, 0, 0) == 0)  # PR_SET_CHILD_SUBREAPER
    return False


if sys.platform == "win32":

    class _Job:
        """A Windows Job Object: whatever its processes start is in it too, and all end when its handle is closed."""

        def __init__(self, process: subprocess.Popen[bytes]) -> None:
            """Take a process that was started suspended, and let it run."""
            self._api = ctypes.WinDLL("kernel32", use_last_error=True)
            self._api.CreateJobObjectW.restype = ctypes.c_void_p
            self._job = ctypes.c_void_p(self._api.CreateJobObjectW(None, None))
            handle = ctypes.c_void_p(int(process._handle))  # type: ignore[attr-defined]
            kills = self._set_limits(0x2000)  # JOB_OBJECT_LIMIT_KILL_ON_JOB_CLOSE
            if not kills or not self._api.AssignProcessToJobObject(self._job, handle):
                process.kill()
                raise ctypes.WinError(ctypes.get_last_error())
            ctypes.WinDLL("ntdll").NtResumeProcess(handle)

        def _set_limits(self, flags: int) -> bool:
            limits = struct.pack("qqIPPIPII6Q4P", 0, 0, flags, *[0] * 16)  # JOBOBJECT_EXTENDED_LIMIT_INFORMATION
            return bool(self._api.SetInformationJobObject(self._job, 9, limits, len(limits)))

        def terminate(self, deadline_s: float) -> bool:
            """End every process of the job, as a shell would report SIGKILL; whether none is left."""
            counts = (ctypes.c_uint32 * 12)()  # JOBOBJECT_BASIC_ACCOUNTING_INFORMATION
            deadline = time.monotonic() + deadline_s
            self._api.TerminateJobObject(self._job, 128 + 9)
            while self._api.QueryInformationJobObject(self._job, 1, counts, 48, None) and counts[10]:
                if time.monotonic() > deadline:
                    return False
                time.sleep(0.005)
            return True

        def close(self, *, leave_running: bool) -> None:
            """Give the handle back; what still runs lives on or ends. Nothing the second time."""
            if leave_running:
                self._set_limits(0)
            self._api.CloseHandle(self._job)
            self._job = ctypes.c_void_p(None)


class Spawned:
    """A running command. One thread loops over `read` until it answers b"", then asks `wait` for the exit code.

    Every other method may come from any thread.
    """

    def __init__(self, popen: subprocess.Popen[bytes], mark: str) -> None:
        assert popen.stdout is not None
        self.pid = popen.pid  # on POSIX its process group too
        self._popen, self._out, self._mark = popen, popen.stdout, mark
        self._exited = threading.Event()
        self._drain_until = float("inf")
        self._drained_bytes = 0
        self._ended = self._over = False
        self._open()
        # Popen.wait with a timeout polls; a thread that only waits costs nothing and answers at once
        threading.Thread(target=self._await_exit, daemon=True).start()

    def _await_exit(self) -> None:
        self._popen.wait()
        self._exited.set()

    def wait(self) -> int:
        """Wait for the command's end; its exit code, 128 + n after signal n."""
        self._exited.wait()
        code = self._popen.returncode
        return code if code >= 0 else 128 - code

    def read(self, max_bytes: int = CHUNK_BYTES, timeout_s: float | None = None) -> bytes | None:
        """What the command wrote, as soon as there is any; None if nothing came for `timeout_s`; b"" when it is over.

        Over: it has exited, and its output has ended or is held open by something else (a service it started) for
        DRAIN_S. Whatever the command itself wrote comes first: that is never more than its pipe holds.
        """
        until = float("inf") if timeout_s is None else time.monotonic() + timeout_s
        while not self._over:
            now = time.monotonic()
            if exited := self._exited.is_set():
                self._drain_until = min(self._drain_until, now + DRAIN_S)
            data = None
            patience_s = max(0.0, min(until, self._drain_until, now + 0.2) - now)  # the exit may come silently
            if not self._ended:
                data = self._next_bytes(max_bytes, patience_s)
            elif not exited:
                self._exited.wait(patience_s)
            if data:
                self._drained_bytes += len(data) if exited else 0
                self._over = now >= self._drain_until and self._drained_bytes > 2 * PIPE_BYTES
                return data
            self._ended = self._ended or data == b""
            self._over = self._over or now >= self._drain_until or (self._ended and self._exited.is_set())
            if now >= until and not self._over:
                return None
        return b""

    if sys.platform == "win32":

        def _open(self) -> None:
            self._rest = b""
            self._chunks: queue.Queue[bytes] = queue.Queue(PIPE_BYTES // CHUNK_BYTES)
            self._job = _Job(self._popen)
            threading.Thread(target=self._pump, daemon=True).start()

        def _pump(self) -> None:
            data = b"?"
            while data:
                data = os.read(self._out.fileno(), CHUNK_BYTES)
                if not self._over:  # afterwards it is dropped: what still writes must not block
                    self._chunks.put(data)

        def _next_bytes(self, max_bytes: int, patience_s: float) -> bytes | None:
            with suppress(queue.Empty):
                data = self._rest or self._chunks.get(timeout=max(patience_s, 0.05))  # the pump needs its turn
                self._rest = data[max_bytes:]
                return data[:max_bytes]
            return None

        def interrupt(self) -> bool:
            """Nothing, False: no signal reaches a process that has no console in common with us. Kill it."""
            return False

        def kill_tree(self, deadline_s: float = KILL_S) -> bool:
            """End the command and everything it started; whether nothing is left after at most `deadline_s`."""
            return self._job.terminate(deadline_s) and self._exited.wait(deadline_s)

        def close_pipe(self) -> None:
            """Stop reading. What a command that has exited left running goes on, as on POSIX."""
            self._over = True
            with suppress(queue.Empty):
                while True:
                    self._chunks.get_nowait()
            self._job.close(leave_running=self._exited.is_set())

    else:

        def _open(self) -> None:
            self._start = process.start if (process := _read_process(self.pid)) else 0
            self._reading = threading.Lock()
            (poll := select.poll()).register(self._out.fileno(), select.POLLIN)
            self._poll = poll.poll

        def _next_bytes(self, max_bytes: int, patience_s: float) -> bytes | None:
            with self._reading:
                if self._over or not self._poll(patience_s * 1000):
                    return None
                return os.read(self._out.fileno(), max_bytes)

        def interrupt(self, number: int = 15) -> bool:
            """Send SIGTERM to the command's process group (pnpm passes it on); whether it was sent."""
            with suppress(ProcessLookupError, PermissionError):
                if not self._exited.is_set():  # afterwards the number may be somebody else's
                    os.killpg(self.pid, number)
                    return True
            return False

        def kill_tree(self, deadline_s: float = KILL_S) -> bool:
            """Kill the command and everything it started; whether nothing is left after at most `deadline_s`.

            However far it moved away: on Linux after `adopt_orphans`, else it is the process group alone. For a
            runner with one step at a time, as a younger child without a mark counts as the step's.
            """
            self.interrupt(9)
            gone = _kill_family(self._mark, {self.pid}, deadline_s, os.getpid(), self._start)[1]
            return gone and self._exited.wait(1.0)

        def close_pipe(self) -> None:
            """Stop reading. What the command left running goes on."""
            self._over = True
            with self._reading:
                self._out.close()


def spawn_step(argv: Sequence[str], cwd: StrPath, env: Mapping[str, str], *, mark: str) -> Spawned:
    """Start one command that can't ask anything: no input, no terminal, both outputs on one pipe, a tree of its own.

    `argv[0]` as `resolve_program` gave it. `mark` names the step; each should have its own, or what an earlier step
    left running on purpose is taken for a leftover of this one. Raises UpdaterError if it can't be started.
    """
    program = resolve_program(argv[0], "", cwd)[0] if os.path.dirname(argv[0]) else argv[0]
    command: str | list[str] = [program, *argv[1:]]
    flags = 0
    if sys.platform == "win32":
        flags = subprocess.CREATE_NO_WINDOW | 0x4  # CREATE_SUSPENDED: it starts nothing before it is in its job
        if program.lower().endswith((".cmd", ".bat")):
            command = render_cmd_line([program, *argv[1:]], os.environ.get("COMSPEC", "cmd.exe"))
    try:
        popen = subprocess.Popen(
            command, cwd=cwd, env={**env, MARK: mark}, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, bufsize=0, start_new_session=True, creationflags=flags,
        )  # fmt: skip
        if sys.platform == "linux" and popen.stdout:
            import fcntl

            with suppress(OSError):  # the user has many pipes open
                fcntl.fcntl(popen.stdout, fcntl.F_SETPIPE_SZ, PIPE_BYTES)
        return Spawned(popen, mark)
    except (OSError, ValueError) as problem:
        culprit = getattr(problem, "filename", None) or argv[0]
        raise UpdaterError(f"{culprit}: {getattr(problem, 'strerror', None) or problem}") from problem


def spawn_runner(argv: Sequence[str], env: Mapping[str, str], log_path: StrPath) -> subprocess.Popen[bytes]:
    """Start a runner that will `detach_self`; what is returned ends at once, with 0 if that worked.

    It holds no descriptor or handle of the daemon; its standard error is appended to `log_path`.
    """
    env = {key: value for key, value in env.items() if key not in (MARK, DETACHED)}
    log = os.open(log_path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | getattr(os, "O_NOFOLLOW", 0), 0o600)
    with open(log, "ab") as err:
        null = subprocess.DEVNULL
        return subprocess.Popen(argv, env=env, stdin=null, stdout=null, stderr=err, start_new_session=True, **HIDDEN)


def detach_self(argv: Sequence[str] = ()) -> None:
    """The runner's first act, before any thread, lock or file: leave the daemon's tree, which PM2 kills by parent ids.

    Only the process that left returns; on Linux it adopts orphans. Windows can't fork: there `argv` (this very command
    by default) is started once more, outside the daemon's Job Object if that lets it go.
    """
    if sys.platform != "win32":
        if os.fork():
            os._exit(0)
        os.setsid()
        adopt_orphans()
    elif not os.environ.pop(DETACHED, ""):
        command, env = list(argv) or [sys.executable, *sys.orig_argv[1:]], {**os.environ, DETACHED: "1"}
        alone, null = subprocess.DETACHED_PROCESS | subprocess.CREATE_NEW_PROCESS_GROUP, subprocess.DEVNULL
        for flags in (alone | subprocess.CREATE_BREAKAWAY_FROM_JOB, alone):
            with suppress(PermissionError):  # the daemon's Job Object does not let it go
                subprocess.Popen(command, env=env, stdin=null, stdout=null, creationflags=flags)
                os._exit(0)
        os._exit(1)


def on_stop_signals(loop: asyncio.AbstractEventLoop, callback: Callable[[str], None]) -> None:
    """Call `callback` in the loop with the name of each stop signal that arrives: SIGINT, SIGTERM, SIGHUP, SIGBREAK."""
    names = ("SIGINT", "SIGTERM", "SIGHUP", "SIGBREAK")
    for number in (getattr(signal, name) for name in names if hasattr(signal, name)):
        if sys.platform != "win32":
            loop.add_signal_handler(number, callback, number.name)
        else:
            signal.signal(number, lambda n, _: loop.call_soon_threadsafe(callback, signal.Signals(n).name))


# ==============================================================================
# 12. Runner: one job: lock, steps, log, result
# ==============================================================================


class StepFailed(Exception):
    """A job ended before its last step."""

    def __init__(self, state: State, step: str, exit_code: int | None = None, error: str | None = None) -> None:
        super().__init__(error or f"{step}: {state}")
        self.state, self.step, self.exit_code, self.error = state, step, exit_code, error


class Poke:
    """Tells the daemon that there are new bytes: an empty loopback datagram, which may be lost."""

    def __init__(self, daemon_file: Path) -> None:
        self._file = daemon_file
        self._port = 0
        self._looked = -1.0
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)

    def __call__(self) -> None:
        now = time.monotonic()
        if now - self._looked > 1:  # the daemon may have come back on another port
            self._looked = now
            port = (read_json(self._file) or {}).get("poke")
            self._port = port if type(port) is int and 0 < port < 65536 else 0
        if self._port:
            with suppress(OSError):
                self._socket.sendto(b"", ("127.0.0.1", self._port))


class LogWriter:
    """The one writer of a job's log. A full disk loses bytes, and says how many, but never stops the job."""

    def __init__(self, path: Path, poke: Callable[[], None]) -> None:
        self._fd = os.open(path, LOG_FLAGS, 0o600)
        self._poke = poke
        self._lock = threading.Lock()
        self._dropped = 0
        self._line_open = False
        self.size = os.fstat(self._fd).st_size

    def write(self, data: bytes) -> None:
        with self._lock:
            if self._dropped:
                note = b"\n[... %d bytes not recorded]\n" % self._dropped
                if self._append(note) < len(note):
                    self._dropped += len(data)
                    return
                self._dropped = 0
            self._dropped += len(data) - self._append(data)
            self._line_open = not data.endswith(b"\n") if data else self._line_open
        self._poke()

    def _append(self, data: bytes) -> int:
        done = 0
        while done < len(data):
            try:
                done += os.write(self._fd, data[done:])
            except OSError:
                break
        self.size += done
        return done

    def line(self, text: str) -> list[int]:
        """A line of our own, never glued to a program's unfinished one; returns its offset and length."""
        line = text.encode(errors="replace") + b"\n"
        self.write(b"\n" + line if self._line_open else line)
        return [self.size - len(line), len(line)]

    def sync(self) -> None:
        with suppress(OSError):
            os.fsync(self._fd)


class Runner:
    """Does one job on this host: a process of its own that outlives the daemon and whatever the job restarts."""

    def __init__(self, state: StateFolder, run: str, host: str, config_path: Path) -> None:
        self.state = state
        self.config_path = config_path
        self.poke = Poke(state.daemon_file)
        self.cancel_file = state.cancel_file(run, host)
        self.run, self.host = run, host
        self.job: JobRecord
        self.log: LogWriter
        self.repo = Path()
        self.rule: Effective
        self.env: dict[str, str] = {}
        self.masker = Masker(())
        self.tail = b""
        self.version: bytes | None = None

    def main(self) -> int:
        """Do the job if it still waits to be done; 0 when its result is recorded."""
        lock = FileLock(self.state.job_lock)
        if not lock.acquire(timeout_s=JOB_LOCK_WAIT_S):
            return 1
        try:
            job = self.state.load_job(self.run, self.host)
            if job is None or job.state is not State.QUEUED:
                return 0
            self.job = job
            self.log = LogWriter(self.state.log_file(self.run, self.host), self.poke)
            self.save(state=State.RUNNING, started=time.time())
            self.perform()
            return 0
        finally:
            lock.release()
            self.poke()

    def perform(self) -> None:
        """Every way a job can end, each as a recorded result."""
        try:
            self.deploy()
            self.finish(State.SUCCEEDED)
        except StepFailed as failure:
            self.finish(failure.state, step=failure.step, exit=failure.exit_code, error=failure.error)
        except UpdaterError as problem:
            for line in getattr(problem, "problems", ()) or (problem.what,):
                self.log.line(f"estelle-updater: error: {line}")
            if problem.hint:
                self.log.line(f"hint: {problem.hint}")
            self.finish(State.FAILED, step=self.job.step, error=problem.what)
        except Exception as problem:
            self.finish(State.FAILED, step=self.job.step, error=f"internal error: {problem!r}")
            raise

    def deploy(self) -> None:
        """The document's steps, in its order."""
        self.begin("check")
        self.load_rule()
        rule, branch = self.rule, self.job.branch
        if problem := valid_branch_problem(branch):
            raise UsageError(f"{branch[:80]!r} is no branch name: {problem}")
        if self.git("rev-parse", "--is-inside-work-tree").strip() != b"true":
            raise UsageError(f"{self.repo} is no git checkout", "clone the repository there, or set repo in [hosts]")
        self.step(plan_fetch(rule.remote), rule.timeout_s)
        self.warn_of_changes()
        names = (f"refs/heads/{branch}", f"refs/remotes/{rule.remote}/{branch}")
        refs = self.git("for-each-ref", "--format=%(refname)", *names).decode(errors="replace").split()
        get, checkout, pull = plan_checkout(branch, rule.remote, refs)
        if get and not (is_commit_id(branch) and self.git("cat-file", "-t", branch).strip() == b"commit"):
            self.step(get, rule.timeout_s)
            self.step(checkout, rule.timeout_s, announce=False)
        else:
            self.step(checkout, rule.timeout_s)
        if pull:
            self.step(pull, rule.timeout_s)
        else:
            self.announce(f"git pull {rule.remote} {branch}")
            self.log.line("Nothing to pull: not a branch.")
        self.begin("config")
        self.load_rule()
        self.step(plan_command(self.rule.command), self.rule.timeout_s)
        for step in plan_restart(self.rule.restart):
            self.step(step, self.rule.timeout_s)

    def load_rule(self) -> None:
        """What to do here, from the configuration as it stands now: read again after the pull."""
        config = load_config(self.config_path)
        self.rule = host_rule(config, self.job.address, socket.gethostname())
        tree = work_tree(self.config_path)
        self.repo = tree / self.rule.repo if self.rule.repo else tree
        extra: dict[str, str] = {}
        if self.rule.environment_file:
            path = self.repo / self.rule.environment_file
            try:
                extra = parse_environment_file(path.read_text("utf-8-sig"), str(path))
            except (OSError, UnicodeError) as problem:
                raise ConfigError(f"can't read environmentFile {path}: {problem}") from problem
        extra |= self.rule.env
        self.env = {**scrub_environment(os.environ), **extra}
        self.masker = Masker(secret_values(extra))

    def git(self, *args: str) -> bytes:
        """A question to git, not announced: its output, or nothing where it fails."""
        try:
            argv = [*resolve_program("git", self.env.get("PATH", "")), *args]
            done = subprocess.run(
                argv, cwd=self.repo, env=self.env, stdin=subprocess.DEVNULL, capture_output=True,
                timeout=QUESTION_S, check=False, **HIDDEN,
            )  # fmt: skip
        except NotADirectoryError as problem:
            raise UsageError(f"{self.repo} is no folder", "set repo in [hosts]") from problem
        except FileNotFoundError as problem:
            raise UsageError(f"there is no folder {self.repo}", "clone the repository there, or set repo") from problem
        except subprocess.TimeoutExpired as problem:
            raise UpdaterError(f"git {args[0]} did not answer in {QUESTION_S:.0f} s") from problem
        if b"dubious ownership" in done.stderr:
            raise UsageError(
                f"git refuses {self.repo}: it belongs to another user",
                f"git config --global --add safe.directory {self.repo}",
            )
        return done.stdout if done.returncode == 0 else b""

    def warn_of_changes(self) -> None:
        """Local changes stay as they are, but are listed: a deployment that is not what the commit says should be seen."""
        changes = self.git("status", "--porcelain", "--untracked-files=no").decode(errors="replace").splitlines()
        if changes:
            more = f" and {len(changes) - 10} more" if len(changes) > 10 else ""
            self.log.line("warning: local changes stay: " + ", ".join(c.strip() for c in changes[:10]) + more)

    def begin(self, step: str) -> None:
        """Where a failure from here on belongs, without a line in the log."""
        self.save(step=step)
        if self.cancel_file.exists():
            raise StepFailed(State.CANCELLED, step)

    def announce(self, label: str) -> None:
        mark = self.log.line(f"{label}...")
        self.job.marks.append(mark)
        self.begin(label)

    def step(self, step: Step, timeout_s: float, *, announce: bool = True) -> None:
        """Run one command to its end. Raises StepFailed unless it ends with 0."""
        if announce:
            self.announce(step.label)
        self.tail = b""
        try:
            argv = [*resolve_program(step.argv[0], self.env.get("PATH", "")), *step.argv[1:]]
            child = spawn_step(argv, self.repo, self.env, mark=f"{self.run}/{file_label(self.host)}")
        except (UpdaterError, OSError) as problem:
            self.log.line(f"estelle-updater: error: {problem}")
            raise StepFailed(State.FAILED, step.label, 127, str(problem)) from problem
        self.save(groups=[*self.job.groups[-20:], child.pid])
        exited = threading.Event()
        pump = threading.Thread(target=self.pump, args=(child, exited), daemon=True)
        pump.start()
        stopped = self.watch(child, exited, time.monotonic() + timeout_s)
        code = child.wait()
        exited.set()
        pump.join(DRAIN_S + 1)
        child.close_pipe()
        self.log.write(self.masker.flush())
        if stopped:
            raise StepFailed(stopped, step.label)
        if code:
            raise StepFailed(State.FAILED, step.label, code, explain_failure(self.tail))

    def watch(self, child: Spawned, exited: threading.Event, deadline: float) -> State | None:
        """Wait for the command's end; a cancel or its deadline ends it: interrupt, grace, kill the whole tree."""
        threading.Thread(target=lambda: (child.wait(), exited.set()), daemon=True).start()
        while not exited.wait(CANCEL_LOOK_S):
            stopped = State.CANCELLED if self.cancel_file.exists() else None
            if stopped is None and time.monotonic() > deadline:
                stopped = State.TIMEOUT
            if stopped:
                child.interrupt()
                exited.wait(GRACE_S)
                child.kill_tree(KILL_S)
                return stopped
        return None

    def pump(self, child: Spawned, exited: threading.Event) -> None:
        """Pipe to log. After the command's end a grandchild may hold the pipe open: only a short drain then."""
        deadline = float("inf")
        while time.monotonic() < deadline:
            data = child.read(CHUNK_BYTES, CANCEL_LOOK_S)
            if data == b"":
                return
            if data:
                self.log.write(self.masker.feed(data))
                found = VERSION_IN_OUTPUT.findall(self.tail[-VERSION_OVERLAP:] + data)
                self.version = found[-1] if found else self.version
                self.tail = (self.tail + data)[-TAIL_BYTES:] if len(data) < TAIL_BYTES else data[-TAIL_BYTES:]
            if exited.is_set() and deadline == float("inf"):
                deadline = time.monotonic() + DRAIN_S

    def read_version(self) -> str | None:
        """What is deployed now, in the project's own words."""
        with suppress(OSError):
            if version := parse_version_file((self.repo / self.rule.version).read_bytes()):
                return version
        if self.version:
            return self.version.decode()
        return self.git("describe", "--always").decode(errors="replace").strip() or None

    def finish(self, state: State, **fields: Any) -> None:
        """Record the result: the log first, then the state, both for good."""
        commit = version = None
        with suppress(UpdaterError, AttributeError):
            commit = self.git("rev-parse", "HEAD").decode().strip() or None
            version = self.read_version() if state is State.SUCCEEDED else None
        if state is State.SUCCEEDED:
            fields |= {"step": None, "exit": 0}
        self.log.sync()
        fields |= {"state": state, "size": self.log.size, "ended": time.time(), "commit": commit, "version": version}
        for _ in range(RESULT_TRIES):
            if self.save(durable=True, **fields):
                return
            time.sleep(1)  # the disk is full: the result is worth waiting for room

    def save(self, *, durable: bool = False, **fields: Any) -> bool:
        """Replace the job's record by its next revision; False where the disk does not take it."""
        self.job = replace(self.job, revision=self.job.revision + 1, **fields)
        try:
            self.state.save_job(self.job, durable=durable)
        except OSError:
            return False
        self.poke()
        return True


# ==============================================================================
# 13. Probes: own address and role
# ==============================================================================

# ==============================================================================
# 15. Agent: connect, hello, resume, take orders
# ==============================================================================


SERVER_OPTIONS: dict[str, Any] = {
    "compression": None, "max_size": MESSAGE_BYTES, "max_queue": 16, "open_timeout": WELCOME_S, "close_timeout": 3,
    "ping_interval": PING_INTERVAL_S, "ping_timeout": PING_TIMEOUT_S, "backlog": 4096, "server_header": None,
}  # fmt: skip
CLIENT_OPTIONS: dict[str, Any] = {
    "compression": None, "max_size": MESSAGE_BYTES, "max_queue": 16, "open_timeout": WELCOME_S, "close_timeout": 3,
    "ping_interval": PING_INTERVAL_S, "ping_timeout": PING_TIMEOUT_S, "proxy": None,
}  # fmt: skip


class Wire(Protocol):
    """What a link stands on: a WebSocket, or a pair of queues inside the master's own process."""

    async def send(self, frame: str | bytes) -> None: ...
    async def recv(self) -> str | bytes: ...
    def abort(self) -> None: ...


class SocketWire:
    """A WebSocket as a wire: its end is EOFError, and no send blocks longer than the deadline."""

    def __init__(self, socket: Any) -> None:
        self.socket = socket

    async def send(self, frame: str | bytes) -> None:
        from websockets.exceptions import ConnectionClosed

        try:
            async with asyncio.timeout(SEND_S):
                await self.socket.send(frame)
        except (ConnectionClosed, TimeoutError) as problem:
            self.abort()
            raise EOFError from problem

    async def recv(self) -> str | bytes:
        from websockets.exceptions import ConnectionClosed

        try:
            frame: str | bytes = await self.socket.recv()
        except ConnectionClosed as problem:
            raise EOFError from problem
        return frame

    def abort(self) -> None:
        self.socket.transport.abort()


class QueueWire:
    """One end of an in-process pair, for the master's own agent."""

    def __init__(self, inbox: asyncio.Queue[Any], outbox: asyncio.Queue[Any]) -> None:
        self._inbox, self._outbox = inbox, outbox

    @classmethod
    def pair(cls) -> tuple[QueueWire, QueueWire]:
        one: asyncio.Queue[Any] = asyncio.Queue(16)
        two: asyncio.Queue[Any] = asyncio.Queue(16)
        return cls(one, two), cls(two, one)

    async def send(self, frame: str | bytes) -> None:
        await self._outbox.put(frame)

    async def recv(self) -> str | bytes:
        frame: str | bytes = await self._inbox.get()
        return frame

    def abort(self) -> None:
        """Both ends live and die with this process."""


class Link:
    """One connection. Outgoing: control messages first, then each log's cursor in turn, never more than a window of
    unacknowledged bytes. Incoming: logs into files, acknowledged by their size. Both sides of the relay are this class."""

    def __init__(self, wire: Wire) -> None:
        self.wire = wire
        self._control: deque[str] = deque()
        self._cursors: dict[tuple[str, str], SendCursor] = {}
        self._channels: dict[int, SendCursor] = {}
        self._paths: dict[int, Path] = {}
        self._next_channel = 1
        self._wake = asyncio.Event()
        self._inbound: dict[int, Inbound] = {}

    def post(self, message: Any) -> None:
        """Send a message as soon as the connection takes it."""
        self._control.append(encode_message(message))
        self._wake.set()

    def open_log(self, run: str, host: str, path: Path) -> None:
        """Offer a log to the other side, which says from where it wants it; once per log."""
        if (run, host) in self._cursors:
            return
        cursor = SendCursor(self._next_channel, run, host, log_size(path))
        self._next_channel += 1
        self._cursors[run, host] = self._channels[cursor.channel] = cursor
        self._paths[cursor.channel] = path
        self.post(Log(cursor.channel, run, host, cursor.size))

    def close_log(self, run: str, host: str) -> None:
        """Forget a log whose bytes are all delivered."""
        if cursor := self._cursors.pop((run, host), None):
            del self._channels[cursor.channel], self._paths[cursor.channel]

    def grew(self, run: str, host: str, size: int) -> None:
        """There are now `size` bytes of an open log."""
        cursor = self._cursors.get((run, host))
        if cursor and size > cursor.size:
            cursor.size = size
            self._wake.set()

    def on_have(self, message: Have) -> None:
        """The other side's acknowledgement, or the place from where it wants the log."""
        cursor = self._channels.get(message.channel)
        if cursor is None:
            return
        path = self._paths[cursor.channel]
        if message.check is not None and 0 < message.size <= log_size(path):
            if log_check(path, message.size) != message.check:
                self.post(Broken(cursor.channel, "the copies of this log differ"))
                return
        cursor.on_have(message.size, message.rewind)
        self._wake.set()

    async def write_forever(self) -> None:
        """The one writer of this connection."""
        while True:
            await self._wake.wait()
            self._wake.clear()
            while self._control or await self._write_chunks():
                while self._control:
                    await self.wire.send(self._control.popleft())

    async def _write_chunks(self) -> bool:
        """One chunk of each log that has something to send and room in the window; False when there is none."""
        sent = False
        for cursor in list(self._channels.values()):
            room = WINDOW_BYTES - sum(other.unacked for other in self._channels.values())
            path = self._paths.get(cursor.channel)
            if path is None or (span := cursor.next_span(room)) is None:
                continue
            data = read_log(path, *span)
            if not data:
                continue
            cursor.sent = span[0] + len(data)
            await self.wire.send(encode_chunk(cursor.channel, span[0], data))
            sent = True
            if self._control:
                break
        return sent

    def inbound(self, channel: int) -> Inbound | None:
        return self._inbound.get(channel)

    def accept_log(self, message: Log, inbound: Inbound) -> None:
        """Begin or resume receiving a log."""
        self._inbound[message.channel] = inbound
        size = log_size(inbound.path)
        self.post(Have(message.channel, size, rewind=True, check=log_check(inbound.path, size)))
        inbound.on_size(size)

    def on_chunk(self, frame: bytes) -> None:
        """Log bytes that arrived: to disk, then acknowledged."""
        channel, offset, data = decode_chunk(frame)
        inbound = self._inbound.get(channel)
        if inbound is None or inbound.closed:
            return
        try:
            size, rewind = append_log(inbound.path, offset, data)
        except OSError as problem:
            size, rewind = log_size(inbound.path), True
            if not inbound.rewinding:
                log.error("can't write %s: %s; trying again", inbound.path, problem.strerror)
                asyncio.get_running_loop().call_later(DISK_RETRY_S, self._ask_again, channel)
            inbound.rewinding = True
            return
        if rewind and not inbound.rewinding:  # once: what is in flight behind a gap would ask again and again
            self.post(Have(channel, size, rewind=True))
        inbound.rewinding = rewind
        inbound.on_size(size)
        if size - inbound.acked >= ACK_BYTES:
            self._ack(channel)
        elif not inbound.ack_due:
            inbound.ack_due = True
            asyncio.get_running_loop().call_later(ACK_S, self._ack, channel)

    def _ask_again(self, channel: int) -> None:
        inbound = self._inbound[channel]
        inbound.rewinding = False
        self.post(Have(channel, log_size(inbound.path), rewind=True))

    def _ack(self, channel: int) -> None:
        inbound = self._inbound[channel]
        inbound.ack_due = False
        if inbound.size > inbound.acked:
            inbound.acked = inbound.size
            self.post(Have(channel, inbound.size))

    def on_broken(self, message: Broken) -> None:
        """Close a log whose copies differ with a line that says so."""
        inbound = self._inbound.get(message.channel)
        if inbound and not inbound.closed:
            inbound.closed = True
            with suppress(OSError):
                line = f"\n[estelle-updater: {message.reason}; the rest is on the host]\n".encode()
                append_log(inbound.path, log_size(inbound.path), line)
            inbound.on_size(log_size(inbound.path))


@dataclass
class Inbound:
    """A log that a link receives."""

    path: Path
    grew: Callable[[int], None]
    size: int = 0
    acked: int = 0
    ack_due: bool = False
    rewinding: bool = False
    closed: bool = False

    def on_size(self, size: int) -> None:
        self.size = size
        self.grew(size)


def live_facts(repo: Path, environ: Mapping[str, str]) -> dict[str, Any]:
    """What is checked out on this host right now; every value None where git does not say. Takes up to 2 s."""
    facts: dict[str, Any] = {"branch": None, "commit": None, "dirty": None, "version": None}
    try:
        argv = [*resolve_program("git", environ.get("PATH", "")), "status", "--porcelain=v2", "--branch"]
        done = subprocess.run(
            [*argv, "--untracked-files=no"], cwd=repo, env=dict(environ), stdin=subprocess.DEVNULL,
            capture_output=True, timeout=FACTS_S, check=False, **HIDDEN,
        )  # fmt: skip
    except (UpdaterError, OSError, subprocess.TimeoutExpired):
        return facts
    if done.returncode:
        return facts
    facts["dirty"] = False
    for line in done.stdout.decode(errors="replace").splitlines():
        if line.startswith("# branch.oid "):
            facts["commit"] = line.split()[2]
        elif line.startswith("# branch.head "):
            facts["branch"] = line.split(" ", 2)[2]
        elif not line.startswith("#"):
            facts["dirty"] = True
    return facts


@dataclass
class OwnJob:
    """A job of this host that the master may still have to hear of."""

    record: JobRecord
    stamp: int = 0  # mtime of its file, to read it only when it changed
    size: int = 0
    looked: float = 0.0  # when its lock was last probed
    launched: float = float("-inf")  # when a runner was last started for it


class Agent:
    """This host's part: takes orders, starts runners, and tells the master what their files say."""

    def __init__(self, state: StateFolder, config: ConfigFile, machine: str, nonce: str) -> None:
        self.state, self.config, self.machine, self.nonce = state, config, machine, nonce
        self.jobs: dict[tuple[str, str], OwnJob] = {}
        self.link: Link | None = None
        self.poked = asyncio.Event()
        self.tasks: set[asyncio.Task[Any]] = set()

    def hello(self) -> Hello:
        return Hello(
            "agent", [PROTOCOL_OLDEST, PROTOCOL], __version__, self.machine, socket.gethostname(), self.nonce,
            sys.platform, list(FEATURES),
        )  # fmt: skip

    def recover(self) -> None:
        """After a start: find this host's jobs whose result the master has not acknowledged."""
        for run in self.state.run_ids():
            for record in self.state.load_jobs(run):
                if record.machine == self.machine and record.revision and not record.acked:
                    self.jobs[run, record.host] = OwnJob(record)

    async def watch_forever(self) -> None:
        """Look at the running jobs' files when a runner pokes, and once a second in case a poke was lost."""
        while True:
            with suppress(TimeoutError):
                async with asyncio.timeout(LOOK_S if self.jobs else None):
                    await self.poked.wait()
            self.poked.clear()
            for job in list(self.jobs.values()):
                self.look(job)

    def look(self, job: OwnJob) -> None:
        """Tell the master what is new about one job; a job whose runner died ends here."""
        run, host = job.record.run, job.record.host
        if not (now := time.monotonic()) - job.looked < LOOK_S / 2 and job.record.state not in FINAL:
            job.looked = now
            self.check_runner(job)
        try:
            stamp = self.state.job_file(run, host).stat().st_mtime_ns
        except OSError:
            return
        if stamp != job.stamp and (record := self.state.load_job(run, host)):
            job.stamp = stamp
            if record.revision > job.record.revision:
                job.record = record
                if self.link:
                    self.link.post(record)
        size = log_size(self.state.log_file(run, host))
        if size > job.size:
            job.size = size
            if self.link:
                self.link.grew(run, host, size)

    def check_runner(self, job: OwnJob) -> None:
        """A free lock says that no runner lives: an accepted job is started again, a running one is lost."""
        if FileLock.held_elsewhere(self.state.job_lock):
            return
        record = self.state.load_job(job.record.run, job.record.host)
        if record is None or record.state in FINAL:
            return
        if record.state is State.QUEUED:
            if time.monotonic() - job.launched > LAUNCH_S:
                self.start_runner(record)
            return
        kill_leftovers(f"{record.run}/{file_label(record.host)}", record.groups)
        size = log_size(self.state.log_file(record.run, record.host))
        self.own(record, state=State.LOST, error="the runner died", size=size, ended=time.time())

    def own(self, record: JobRecord, **fields: Any) -> JobRecord:
        """Record a state that this daemon decides, for want of a runner."""
        record = replace(record, revision=record.revision + 1, **fields)
        try:
            self.state.save_job(record, durable=True)
        except OSError as problem:
            log.error("can't write to %s: %s", self.state.root, problem.strerror)
            record = replace(record, state=State.FAILED, error=f"can't write to {self.state.root}: {problem.strerror}")
        job = self.jobs.setdefault((record.run, record.host), OwnJob(record))
        job.record = record
        if self.link:
            self.link.post(record)
        self.poked.set()
        return record

    def start_runner(self, record: JobRecord) -> None:
        """Start the process that does the job; it takes the job's lock itself."""
        self.jobs[record.run, record.host].launched = time.monotonic()
        argv = [*program_argv(), "run-job", "--state", str(self.state.root), "--config", str(self.config.path)]
        child = spawn_runner([*argv, record.run, record.host], dict(os.environ), self.state.runner_log)
        self.spawn(asyncio.to_thread(child.wait))

    def spawn(self, coroutine: Coroutine[Any, Any, Any]) -> None:
        task = asyncio.ensure_future(coroutine)
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)

    def on_order(self, order: Order) -> None:
        """Accept a job, or say what holds this host. The same order again is answered with the job's state."""
        record: JobRecord = decode_fields(JobRecord, order.job)
        known = self.jobs.get((record.run, record.host))
        known_record = known.record if known else self.state.load_job(record.run, record.host)
        assert self.link
        if known_record and known_record.revision:
            self.offer(OwnJob(known_record) if known is None else known)
            return
        active = next((job for job in self.jobs.values() if job.record.state not in FINAL), None)
        if active or FileLock.held_elsewhere(self.state.job_lock):
            self.link.post(Busy(record.run, record.host, active.record.run if active else ""))
            return
        if problem := valid_branch_problem(record.branch):
            self.own(record, state=State.FAILED, error=f"no branch name: {problem}")
            return
        self.adopt_run(record)
        record = self.own(replace(record, machine=self.machine, state=State.QUEUED, ordered=True))
        self.offer(self.jobs[record.run, record.host])
        if record.state is State.QUEUED:
            self.start_runner(record)

    def adopt_run(self, record: JobRecord) -> None:
        """An agent keeps `run.json` of its own jobs too; the master's own agent finds the master's."""
        if self.state.load_run(record.run) is None:
            with suppress(OSError):
                self.state.save_run(run_of_job(record))

    def on_cancel(self, message: Cancel) -> None:
        """Ask the runner to stop; the file stays until it does, whoever dies meanwhile."""
        for (run, host), job in self.jobs.items():
            if run == message.run and job.record.state not in FINAL:
                with suppress(OSError):
                    write_atomic(self.state.cancel_file(run, host), message.by.encode(errors="replace"))

    def on_acked(self, message: Acked) -> None:
        """The master has result and log."""
        job = self.jobs.get((message.run, message.host))
        if job and job.record.state in FINAL and message.revision >= job.record.revision:
            del self.jobs[message.run, message.host]
            with suppress(OSError):
                self.state.save_job(replace(job.record, acked=True))
                self.state.cancel_file(message.run, message.host).unlink(missing_ok=True)
            if self.link:
                self.link.close_log(message.run, message.host)

    async def on_ask(self, ask: Ask) -> None:
        """Answer the master's question about this host."""
        result: dict[str, Any] = {"error": f"unknown question {ask.what[:40]!r}"}
        if ask.what == "status":
            tree = work_tree(self.config.path)
            rule = host_rule(self.config.config, ask.args.get("address"), socket.gethostname())
            repo = tree / rule.repo if rule.repo else tree
            result = await asyncio.to_thread(live_facts, repo, scrub_environment(os.environ))
            with suppress(OSError):
                result["version"] = parse_version_file((repo / rule.version).read_bytes())
            running = next((job.record for job in self.jobs.values() if job.record.state is State.RUNNING), None)
            result |= {"problem": self.config.problem, "running": running and running.run}
        if self.link:
            self.link.post(Answer(ask.id, result))

    def offer(self, job: OwnJob) -> None:
        """Tell the master of a job and offer its log."""
        assert self.link
        self.jobs.setdefault((job.record.run, job.record.host), job)
        self.link.post(job.record)
        self.link.open_log(job.record.run, job.record.host, self.state.log_file(job.record.run, job.record.host))

    async def serve_link(self, link: Link) -> None:
        """Everything after `Welcome`, until the connection ends."""
        self.link = link
        try:
            for job in self.jobs.values():
                self.offer(job)
            async with asyncio.TaskGroup() as group:
                group.create_task(link.write_forever())
                while True:
                    await self.receive(link, await link.wire.recv())
        finally:
            self.link = None
            link.wire.abort()

    async def receive(self, link: Link, frame: str | bytes) -> None:
        message = decode_message(frame) if isinstance(frame, str) else None
        match message:
            case Order():
                self.on_order(message)
            case Cancel():
                self.on_cancel(message)
            case Have():
                link.on_have(message)
            case Acked():
                self.on_acked(message)
            case Ask():
                self.spawn(self.on_ask(message))
            case Refuse():
                log.warning("the master says: %s", message.what)
            case _:
                link.post(Refuse("an agent has no use for that message"))


def reconnect_delay(attempt: int, refused: bool, random: Callable[[float, float], float]) -> float:
    """Seconds until the next try: full jitter, so that a master that returns is not met by everybody at once."""
    return random(30, 90) if refused else random(0, min(60, 2.0 ** min(attempt, 10)))


class Dialer:
    """Keeps an agent connected to the master, and says once, not on every try, that it can't."""

    def __init__(self, agent: Agent, bind: str | None) -> None:
        self.agent, self.bind = agent, bind
        self.config_changed = asyncio.Event()
        self.trouble = ""
        self.welcome: Welcome | None = None
        self.on_welcome: Callable[[], None] = lambda: None

    async def dial_forever(self) -> None:
        attempt = 0
        while True:
            url = self.agent.config.config.master_url
            refused = False
            try:
                await self.dial(url)
            except RefusedError as problem:
                refused = True
                self.say(problem.what + (f"; {problem.hint}" if problem.hint else ""))
            except (EOFError, OSError, UpdaterError, TimeoutError) as problem:
                what = problem.what if isinstance(problem, UpdaterError) else str(problem) or "no answer"
                self.say(f"can't reach the master at {url.text}: {what}; trying again until it answers")
            if self.welcome:
                attempt, self.welcome = 0, None
            attempt += 1
            self.config_changed.clear()
            with suppress(TimeoutError):
                async with asyncio.timeout(reconnect_delay(attempt, refused, random.uniform)):
                    await self.config_changed.wait()

    def say(self, text: str) -> None:
        if text != self.trouble:
            self.trouble = text
            log.warning("%s", text)

    async def dial(self, url: MasterUrl) -> None:
        """One connection, from the handshake to its end. Raises RefusedError, OSError, EOFError."""
        from websockets.asyncio.client import connect
        from websockets.exceptions import InvalidHandshake, InvalidStatus

        try:
            socket = await connect(url.text, local_addr=(self.bind, 0) if self.bind else None, **CLIENT_OPTIONS)
        except InvalidStatus as problem:
            raise refusal(problem.response.status_code, bytes(problem.response.body or b"")) from problem
        except InvalidHandshake as problem:
            raise UpdaterError(f"{url.text} is no estelle-updater master: {problem}") from problem
        async with socket:
            link = Link(SocketWire(socket))
            await link.wire.send(encode_message(self.agent.hello()))
            async with asyncio.timeout(WELCOME_S):
                self.welcome = self.read_welcome(await link.wire.recv())
            self.trouble = ""
            log.info("welcomed by the master at %s as %s", url.text, self.welcome.label)
            self.on_welcome()
            try:
                await self.agent.serve_link(link)
            except* (EOFError, ProtocolError) as group:
                for problem in group.exceptions:
                    if isinstance(problem, ProtocolError):
                        log.error("the master sent rubbish: %s", problem)
            self.say("the connection to the master ended; trying again until it answers")

    @staticmethod
    def read_welcome(frame: str | bytes) -> Welcome:
        message = decode_message(frame) if isinstance(frame, str) else None
        if isinstance(message, Refuse):
            raise RefusedError(message.what, message.hint)
        if not isinstance(message, Welcome):
            raise ProtocolError("no welcome from the master")
        return message


def refusal(status: int, body: bytes) -> UpdaterError:
    """An HTTP answer where a WebSocket should be, as an error."""
    text = body.decode(errors="replace").strip()
    if status == 403:
        what, _, hint = text.partition("\n")
        return RefusedError(f"the master refused us: {what}", hint)
    return UnreachableError(f"HTTP {status} instead of a WebSocket: {text[:200]}", "is masterUrl right?")


# ==============================================================================
# 16. Master: handshake, registry, runs, queue, followers
# ==============================================================================


@dataclass
class Machine:
    """A host that was once welcomed as an agent. It is known by the id in its state folder; addresses and names change."""

    machine: str
    address: str
    name: str
    version: str = ""
    platform: str = ""
    seen: float = 0.0
    forgotten: bool = False


class Run:
    """A run in memory: because a host still works on it, or because somebody follows it."""

    def __init__(self, record: RunRecord, jobs: Mapping[str, JobRecord]) -> None:
        self.record = record
        self.jobs = dict(jobs)
        self.held: dict[str, JobRecord] = {}  # results whose log has not all arrived
        self.followers: set[Link] = set()
        self.torn: set[str] = set()  # hosts whose log was closed because the copies differ

    @property
    def active(self) -> bool:
        return any(job.state not in FINAL for job in self.jobs.values())


class AgentLink:
    """A connected agent, and the questions it has not answered yet."""

    def __init__(self, link: Link, hello: Hello, address: str) -> None:
        self.link, self.hello, self.address = link, hello, address
        self.questions: dict[int, asyncio.Future[dict[str, Any]]] = {}

    async def ask(self, what: str, args: dict[str, Any]) -> dict[str, Any] | None:
        """The agent's answer, or None where it does not come in time."""
        number = next(QUESTION_NUMBERS)
        future = self.questions[number] = asyncio.get_running_loop().create_future()
        self.link.post(Ask(number, what, args))
        try:
            async with asyncio.timeout(FACTS_S):
                return await future
        except TimeoutError:
            return None
        finally:
            del self.questions[number]


QUESTION_NUMBERS = itertools.count(1)


class Master:
    """The WebSocket server: who may come in, which hosts there are, what each has to do, and who is told of it."""

    def __init__(self, state: StateFolder, config: ConfigFile, machine: str, nonce: str, own_address: str) -> None:
        self.state, self.config, self.machine, self.nonce, self.own_address = state, config, machine, nonce, own_address
        self.machines_file = state.root / "machines.json"
        self.machines: dict[str, Machine] = {}
        self.agents: dict[str, AgentLink] = {}
        self.down_since: dict[str, float] = {}
        self.busy: dict[str, float] = {}  # machine -> when to ask again
        self.runs: dict[str, Run] = {}
        self.sockets: dict[Any, str] = {}  # connection -> its address, to drop who is no longer allowed
        self.refused: dict[str, tuple[float, int]] = {}  # address -> (minute began, how many since)
        self.started = time.time()

    def recover(self) -> None:
        """After a start: the known hosts, and the runs that are not over."""
        for machine, data in (read_json(self.machines_file) or {}).items():
            with suppress(TypeError):
                self.machines[machine] = Machine(**data)
                self.down_since[machine] = time.time()
        for run in self.state.run_ids():
            if (found := self.load(run)) and found.active:
                self.runs[run] = found

    # Who may come in

    def judge_request(self, connection: Any, request: Any) -> Any:
        """The verdict on a handshake, before any upgrade: None lets it pass, else an HTTP answer."""
        config = self.config.config
        peer = canonical_address(connection.remote_address[0])
        address = client_address(peer, request.headers.get_all("X-Forwarded-For"), Whitelist(config.trusted_proxies))
        verdict = Whitelist(config.whitelist).verdict(address)
        if not verdict.allowed:
            self.log_refusal(address, verdict.reason)
            return connection.respond(403, f"{verdict.reason}\nadd {address} to the whitelist in git\n")
        own = (config.master_url.host, self.own_address, *config.server_names)
        if not allowed_host_header(request.headers.get("Host"), own):
            return connection.respond(403, f"the Host header names another server (seen from {address})\n")
        if not allowed_origin(request.headers.get("Origin"), own):
            return connection.respond(403, f"a page of another site can't talk to this port (seen from {address})\n")
        if request.path.partition("?")[0] != config.master_url.path:
            return connection.respond(404, "nothing here\n")
        connection.estelle_address = address
        return None

    def log_refusal(self, address: str, reason: str) -> None:
        """Once per address and minute, with a count: a flood must not become a flood of lines."""
        began, count = self.refused.get(address, (0.0, 0))
        now = time.monotonic()
        if not began or now - began > 60:
            log.warning("refused %s: %s%s", address, reason, f" ({count} more times)" if count else "")
            began, count = now, -1
        if len(self.refused) > REFUSED_KEPT:
            self.refused.clear()
        self.refused[address] = (began, count + 1)

    def drop_disallowed(self) -> None:
        """After the configuration changed: whoever is no longer on the list is cut off."""
        whitelist = Whitelist(self.config.config.whitelist)
        for socket, address in list(self.sockets.items()):
            if not whitelist.verdict(address).allowed:
                log.warning("dropped %s: no longer on the whitelist", address)
                socket.transport.abort()

    async def serve_socket(self, socket: Any) -> None:
        """One connection, from its hello to its end."""
        address = socket.estelle_address
        link = Link(SocketWire(socket))
        self.sockets[socket] = address
        try:
            async with asyncio.timeout(WELCOME_S):
                frame = await link.wire.recv()
            hello = decode_message(frame) if isinstance(frame, str) else None
            if not isinstance(hello, Hello):
                raise ProtocolError("the first message must be hello")
            if not hello.protocol or not min(hello.protocol) <= PROTOCOL <= max(hello.protocol):
                raise ProtocolError(f"this master speaks protocol {PROTOCOL}; upgrade the older side")
            if hello.role == "agent":
                await self.serve_agent(link, hello, address)
            elif hello.role == "commander":
                await self.serve_commander(link, hello, address)
            else:
                raise ProtocolError(f"unknown role {hello.role[:20]!r}")
        except* (EOFError, TimeoutError):
            pass
        except* ProtocolError as group:
            problem = next(iter_leaves(group))
            log.warning("%s sent what is no part of the protocol: %s", address, problem)
            with suppress(EOFError):
                await link.wire.send(encode_message(Refuse(str(problem))))
        finally:
            del self.sockets[socket]

    # Hosts

    def save_machines(self) -> None:
        data = {machine: vars(known) for machine, known in self.machines.items()}
        with suppress(OSError):
            write_atomic(self.machines_file, json.dumps(data, indent=1).encode(), durable=True)

    def host_name(self, machine: str, address: str, claimed: str) -> str:
        """The configuration's name for the host, else the one it claims, unless that belongs to another address."""
        name = host_rule(self.config.config, address, claimed).name or claimed
        owner = owner_of_name(self.config.config, name)
        if owner is not None and owner != address:
            log.warning("%s claims the name %s, which the configuration gives to %s", address, name, owner)
            return f"unnamed-{machine[:4]}"
        return name

    def register(self, hello: Hello, address: str) -> None:
        """Remember a host that is welcomed."""
        known = Machine(
            hello.machine, address, self.host_name(hello.machine, address, hello.name), hello.version, hello.platform,
            time.time(),
        )  # fmt: skip
        self.machines[hello.machine] = known
        self.save_machines()

    def hosts(self) -> list[HostRef]:
        """Every host of the fleet with its label, the master's own first."""
        known = [machine for machine in self.machines.values() if not machine.forgotten]
        known.sort(key=lambda machine: (machine.machine != self.machine, machine.address, machine.name))
        labels = assign_labels([(host.address, host.name, host.machine) for host in known])
        hosts = []
        for label, host in zip(labels, known, strict=True):
            rule = host_rule(self.config.config, host.address, host.name)
            online = host.machine in self.agents
            hosts.append(HostRef(label, host.address, host.name, host.machine, online, rule.color, rule.deploy))
        return hosts

    async def serve_agent(self, link: Link, hello: Hello, address: str) -> None:
        """An agent's connection: welcome it, take its states and logs, until it goes."""
        if not re.fullmatch(r"[0-9a-f]{32}", hello.machine):
            raise ProtocolError("a machine id is 32 hex digits")
        old = self.agents.get(hello.machine)
        if old and old.hello.nonce != hello.nonce and await self.answers_ping(old):
            what = f"this machine id is in use by {old.address}: a cloned state folder"
            log.warning("refused %s: %s", address, what)
            await link.wire.send(encode_message(Refuse(what, "delete machine-id in its state folder and restart it")))
            return
        if old:
            old.link.wire.abort()
        self.register(hello, address)
        agent = self.agents[hello.machine] = AgentLink(link, hello, address)
        self.down_since.pop(hello.machine, None)
        self.busy.pop(hello.machine, None)
        label = next(host.label for host in self.hosts() if host.machine == hello.machine)
        link.post(Welcome(PROTOCOL, __version__, address, label, self.nonce, list(FEATURES)))
        if hello.machine != self.machine:
            log.info("agent %s (%s) is online", label, self.machines[hello.machine].name)
        self.resend(agent)
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(link.write_forever())
                while True:
                    self.receive_from_agent(agent, await link.wire.recv())
        finally:
            link.wire.abort()
            if self.agents.get(hello.machine) is agent:
                del self.agents[hello.machine]
                self.down_since[hello.machine] = self.machines[hello.machine].seen = time.time()
                log.warning("agent %s is offline", label)

    @staticmethod
    async def answers_ping(agent: AgentLink) -> bool:
        """Is the connection alive at its other end, or a leftover of a host that went without a word?"""
        if not isinstance(agent.link.wire, SocketWire):
            return True
        with suppress(Exception):
            async with asyncio.timeout(PING_S):
                await (await agent.link.wire.socket.ping())
                return True
        return False

    def resend(self, agent: AgentLink) -> None:
        """To a host that is back: the orders that it has not acknowledged, and the cancels that it missed."""
        for run in list(self.runs.values()):
            for job in run.jobs.values():
                if job.machine == agent.hello.machine and job.state not in FINAL:
                    if job.state is State.QUEUED and job.ordered:
                        agent.link.post(Order(vars(job)))
                    if run.record.cancelled:
                        agent.link.post(Cancel(job.run))
        self.schedule()

    def receive_from_agent(self, agent: AgentLink, frame: str | bytes) -> None:
        if isinstance(frame, bytes):
            agent.link.on_chunk(frame)
            return
        message = decode_message(frame)
        match message:
            case JobRecord():
                self.on_job(agent, message)
            case Log():
                self.on_log(agent, message)
            case Broken():
                agent.link.on_broken(message)
            case Busy():
                self.on_busy(agent, message)
            case Answer():
                future = agent.questions.get(message.id)
                if future and not future.done():
                    future.set_result(message.result)
            case Refuse():
                log.warning("%s says: %s", agent.address, message.what)
            case _:
                raise ProtocolError(f"an agent can't say {VERB_OF[type(message)]}")

    # Runs

    def load(self, run: str) -> Run | None:
        """A run from memory, else from disk."""
        if run in self.runs:
            return self.runs[run]
        record = self.state.load_run(run)
        if record is None:
            return None
        jobs = {}
        for host in record.hosts:
            empty = job_of_run(record, host)
            jobs[host] = self.state.load_job(run, host) or replace(empty, state=State.LOST, error="no record of it")
        return Run(record, jobs)

    def own_job(self, agent: AgentLink, run: str, host: str) -> Run:
        """The run of a job that belongs to this very agent. Raises ProtocolError for anybody else's."""
        found = self.load(run)
        if found is None or found.record.machines.get(host) != agent.hello.machine:
            raise ProtocolError(f"{host[:80]} in run {run} is not a job of {agent.address}")
        self.runs[run] = found
        return found

    def on_job(self, agent: AgentLink, job: JobRecord) -> None:
        """A host's word about its job. A result counts once its log is here."""
        if self.load(job.run) is None:  # a new master, or a deployment that the host started by itself
            record = replace(run_of_job(job), machines={job.host: agent.hello.machine})
            self.state.save_run(record)
            self.runs[job.run] = Run(record, {job.host: job_of_run(record, job.host)})
        run = self.own_job(agent, job.run, job.host)
        job = replace(job, machine=agent.hello.machine, acked=False)
        if run.record.cancelled and job.state not in FINAL:
            agent.link.post(Cancel(job.run))
        if job.state in FINAL:
            run.held[job.host] = job
            self.settle(run, job.host)
        elif accepts_job(run.jobs[job.host], job):
            self.record(run, replace(job, behind=None))
        self.drop_idle(run)

    def on_log(self, agent: AgentLink, message: Log) -> None:
        """A host offers a job's log."""
        run = self.own_job(agent, message.run, message.host)

        def grew(size: int) -> None:
            if (inbound := agent.link.inbound(message.channel)) and inbound.closed:
                run.torn.add(message.host)
            for follower in run.followers:
                follower.grew(message.run, message.host, size)
            self.settle(run, message.host)

        path = self.state.log_file(message.run, message.host)
        agent.link.accept_log(message, Inbound(path, grew))

    def settle(self, run: Run, host: str) -> None:
        """Record a held result as soon as its log is complete, and let the host forget it."""
        job = run.held.get(host)
        size = log_size(self.state.log_file(run.record.run, host))
        if job is None or (size < job.size and host not in run.torn):
            return
        del run.held[host]
        if accepts_job(run.jobs[host], job):
            self.record(run, replace(job, size=size), durable=True)
        if agent := self.agents.get(job.machine):
            agent.link.post(Acked(job.run, host, job.revision))
        self.busy.pop(job.machine, None)
        self.schedule()

    def record(self, run: Run, job: JobRecord, *, durable: bool = False) -> None:
        """A job's new state: on disk, and to whoever follows. What the master's own runner wrote is there already."""
        run.jobs[job.host] = job
        if job.machine != self.machine or job.revision == 0:
            try:
                self.state.save_job(job, durable=durable)
            except OSError as problem:
                log.error("can't write to %s: %s", self.state.root, problem.strerror)
        for follower in run.followers:
            follower.post(job)

    def end(self, run: Run, job: JobRecord, state: State, error: str, *, guess: bool = False) -> None:
        """The master's own verdict; a guess about a host that it can't hear is replaced by the host's late word."""
        size = log_size(self.state.log_file(job.run, job.host))
        fields = {"state": state, "error": error, "provisional": guess, "size": size, "ended": time.time()}
        self.record(run, replace(job, behind=None, **fields), durable=True)

    def drop_idle(self, run: Run) -> None:
        if not run.active and not run.followers and not run.held:
            self.runs.pop(run.record.run, None)

    # The queue

    def submit(self, message: Submit, by: str) -> RunRecord:
        """Start a run, or find the one that this very request started. Raises UpdaterError with the contract's code."""
        if found := self.load(message.run):
            if found.record.nonce != message.nonce:
                raise UpdaterError(f"the run id {message.run} is taken", "try again")
            return found.record
        if problem := valid_branch_problem(message.branch):
            raise UsageError(f"{message.branch[:80]!r} is no branch name: {problem}")
        hosts = select_targets(message.target, self.hosts())
        offline = [host.label for host in hosts if not host.online]
        if len(offline) == len(hosts) and not message.wait_s:
            raise TargetError(
                f"no host of {message.target} is online ({', '.join(offline)})", "start its service, or use --wait SECONDS"
            )
        record = RunRecord(
            message.run, message.nonce, message.kind, message.target, message.branch, [host.label for host in hosts],
            {host.label: host.machine for host in hosts}, {host.label: host.address for host in hosts}, time.time(),
            by, offline, max(0, message.batch), max(0.0, message.wait_s),
        )  # fmt: skip
        self.state.save_run(record)
        run = self.runs[record.run] = Run(record, {label: job_of_run(record, label) for label in record.hosts})
        for job in run.jobs.values():
            self.record(run, job)
            if job.host in offline and not message.wait_s:
                self.end(run, job, State.OFFLINE, "the host is offline")
        log.info("%s asks for %s %s on %s: run %s", by, record.kind, record.branch, record.target, record.run)
        self.replace_queued(run)
        asyncio.get_running_loop().call_soon(self.schedule)
        return record

    def replace_queued(self, new: Run) -> None:
        """A newer request for the same branch takes the place of one that still waits."""
        for run in list(self.runs.values()):
            if run is new or (run.record.kind, run.record.branch) != (new.record.kind, new.record.branch):
                continue
            for job in list(run.jobs.values()):
                if job.state is State.QUEUED and not job.ordered and job.machine in new.record.machines.values():
                    self.end(run, job, State.CANCELLED, f"replaced by {new.record.run}")

    def schedule(self) -> None:
        """Give every free host its next job, and end what has become pointless."""
        runs = sorted((run for run in self.runs.values() if run.active), key=lambda run: (run.record.created, run.record.run))
        now = time.monotonic()
        busy = {machine for machine, until in self.busy.items() if until > now}
        order, end, behind = decide_orders([(run.record, run.jobs) for run in runs], self.agents, busy)
        for job, reason in end:
            self.end(self.runs[job.run], job, State.CANCELLED, reason)
        for (name, host), other in behind.items():
            run = self.runs[name]
            if run.jobs[host].behind != other:
                self.record(run, replace(run.jobs[host], behind=other))
        for job in order:
            job = replace(job, ordered=True, behind=None)
            self.record(self.runs[job.run], job, durable=True)
            self.agents[job.machine].link.post(Order(vars(job)))

    def on_busy(self, agent: AgentLink, message: Busy) -> None:
        """The host has something else to do: the order goes back into the queue."""
        run = self.own_job(agent, message.run, message.host)
        job = run.jobs[message.host]
        if job.state is State.QUEUED:
            self.busy[agent.hello.machine] = time.monotonic() + BUSY_RETRY_S
            self.record(run, replace(job, ordered=False, behind=message.behind or None))

    async def tick_forever(self) -> None:
        """Once a second while a run is active: what has waited too long."""
        while True:
            await asyncio.sleep(TICK_S)
            for run in list(self.runs.values()):
                for job in list(run.jobs.values()):
                    self.expire(run, job, time.time())
                self.drop_idle(run)
            if self.runs:
                self.schedule()

    def expire(self, run: Run, job: JobRecord, now: float) -> None:
        """End a job that waits for a host that does not come: an old order must not run days later."""
        if job.state in FINAL or job.machine in self.agents:
            return
        down = self.down_since.get(job.machine, self.started)
        if job.state is State.QUEUED:
            since = max(down, run.record.created)
            allowed = run.record.wait_s if job.host in run.record.offline else max(ORDER_EXPIRES_S, run.record.wait_s)
            if now - since > allowed and job.ordered:
                self.end(run, job, State.LOST, "the order was never acknowledged", guess=True)
            elif now - since > allowed:
                self.end(run, job, State.OFFLINE, "the host is offline")
        elif now - max(down, job.started or 0) > LOST_S:
            self.end(run, job, State.LOST, f"no connection for {LOST_S:.0f} s", guess=True)

    def cancel(self, name: str, by: str) -> RunRecord:
        """Stop a run: queued jobs at once, running ones as soon as their host hears of it."""
        run = self.load(name)
        if run is None:
            raise TargetError(f"there is no run {name[:40]}", "`history` lists the runs")
        if run.active and not run.record.cancelled:
            self.runs[name] = run
            run.record = replace(run.record, cancelled=True)
            self.state.save_run(run.record)
            log.info("%s cancels run %s", by, name)
        for job in list(run.jobs.values()):
            if job.state in FINAL:
                continue
            agent = self.agents.get(job.machine)
            if job.state is State.QUEUED and not (job.ordered and agent):
                self.end(run, job, State.CANCELLED, f"cancelled by {by}", guess=job.ordered)
            elif agent:
                agent.link.post(Cancel(name, by))
        self.schedule()
        return run.record

    # Commanders

    async def serve_commander(self, link: Link, hello: Hello, address: str) -> None:
        """A commander's connection. Watching is not owning: when it goes, nothing else changes."""
        link.post(Welcome(PROTOCOL, __version__, address, "", self.nonce, list(FEATURES)))
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(link.write_forever())
                while True:
                    frame = await link.wire.recv()
                    message = decode_message(frame) if isinstance(frame, str) else None
                    try:
                        self.receive_from_commander(group, link, message, address, hello)
                    except ProtocolError:
                        raise
                    except UpdaterError as problem:
                        link.post(Refuse(problem.what, problem.hint, problem.exit_code))
                    except OSError as problem:
                        link.post(Refuse(f"the master can't write to {self.state.root}: {problem.strerror}"))
        finally:
            link.wire.abort()
            for run in list(self.runs.values()):
                run.followers.discard(link)
                self.drop_idle(run)

    def receive_from_commander(
        self, group: asyncio.TaskGroup, link: Link, message: Any, address: str, hello: Hello
    ) -> None:
        by = f"{message.by[:80]}@{address}" if getattr(message, "by", "") else f"{hello.name[:80]}@{address}"
        match message:
            case Submit():
                link.post(self.submit(message, by))
            case Follow():
                self.follow(link, message)
            case Have():
                link.on_have(message)
            case Cancel():
                link.post(self.cancel(message.run, by))
            case Ask():
                group.create_task(self.answer(link, message))
            case _:
                raise ProtocolError("not a commander's message")

    def follow(self, link: Link, message: Follow) -> None:
        """Tell a commander all of a run: first what there is, then whatever comes."""
        run = self.load(message.run)
        if run is None:
            raise TargetError(f"there is no run {message.run}", "`history` lists the runs")
        chosen = set(run.record.hosts)
        if message.target:
            names = {host.machine: host for host in self.hosts()}
            refs = [
                replace(names[machine], label=label) if machine in names else bare_host(run.record, label)
                for label, machine in run.record.machines.items()
            ]
            chosen = {host.label for host in select_targets(message.target, [replace(ref, deploys=True) for ref in refs])}
        self.runs[message.run] = run
        run.followers.add(link)
        link.post(replace(run.record, hosts=[host for host in run.record.hosts if host in chosen]))
        for host in run.record.hosts:
            if host in chosen:
                link.post(run.jobs[host])
                link.open_log(message.run, host, self.state.log_file(message.run, host))

    async def answer(self, link: Link, ask: Ask) -> None:
        """Questions of a commander, each of a fixed set."""
        if ask.what == "status":
            link.post(Answer(ask.id, await self.status()))
        else:
            link.post(Refuse(f"this master can't answer {ask.what[:40]!r}", "upgrade the master"))

    async def status(self) -> dict[str, Any]:
        """The fleet as it is now, in the contract's form."""
        hosts = self.hosts()

        async def facts(host: HostRef) -> dict[str, Any]:
            agent = self.agents.get(host.machine)
            return (await agent.ask("status", {"address": host.address}) if agent else None) or {}

        answers = await asyncio.gather(*(facts(host) for host in hosts))
        rows = [self.status_row(host, found) for host, found in zip(hosts, answers, strict=True)]
        uptime = round(time.time() - self.started, 1)
        master = {"ip": self.own_address, "version": __version__, "uptime": uptime, "problem": self.config.problem}
        return {"master": master, "hosts": rows}

    def status_row(self, host: HostRef, facts: Mapping[str, Any]) -> dict[str, Any]:
        jobs = [job for run in self.runs.values() for job in run.jobs.values() if job.machine == host.machine]
        running = next((job for job in jobs if job.state is State.RUNNING), None)
        machine = self.machines[host.machine]
        return {
            "host": host.label, "name": host.name, "online": host.online,
            "role": "master" if host.machine == self.machine else "agent", "platform": machine.platform,
            "updater": machine.version, "version": facts.get("version"), "branch": facts.get("branch"),
            "commit": facts.get("commit"), "dirty": facts.get("dirty"), "color": host.color, "traffic": None,
            "running": running.run if running else facts.get("running"),
            "step": running.step if running else None,
            "since": running.started if running else None,
            "link_down_since": self.down_since.get(host.machine),
            "queued": [job.run for job in jobs if job.state is State.QUEUED], "problem": facts.get("problem"),
        }  # fmt: skip


# ==============================================================================
# 18. Commander: what the command line uses to talk to the master
# ==============================================================================

COMMANDER_OPTIONS: dict[str, Any] = {"compression": None, "proxy": None, "max_size": MESSAGE_BYTES, "max_queue": None}


def make_run_id() -> str:
    """A new run's name: the time (UTC) and four random hex digits, as in `20261122-210501-7f3a`."""
    return time.strftime("%Y%m%d-%H%M%S", time.gmtime()) + "-" + os.urandom(2).hex()


class View:
    """Where a followed run is shown. Methods are called in the order of the contract's events."""

    def begin(self, run: RunRecord) -> None: ...
    def state(self, job: JobRecord) -> None: ...
    def data(self, host: str, data: bytes) -> None: ...
    def result(self, job: JobRecord) -> None: ...
    def done(self, run: RunRecord, jobs: Sequence[JobRecord]) -> None: ...
    def notice(self, text: str) -> None: ...


class Connection:
    """One connection of a commander to the master."""

    def __init__(self, socket: Any, welcome: Welcome) -> None:
        self.socket, self.welcome = socket, welcome

    def send(self, message: Any) -> None:
        from websockets.exceptions import ConnectionClosed

        try:
            self.socket.send(encode_message(message))
        except (ConnectionClosed, OSError) as problem:
            raise EOFError from problem

    def receive(self, timeout_s: float) -> Any:
        """The next message, or a log frame's bytes, or None when nothing comes in time. Raises EOFError at the end."""
        from websockets.exceptions import ConnectionClosed

        try:
            frame = self.socket.recv(timeout=timeout_s)
        except TimeoutError:
            return None
        except (ConnectionClosed, OSError) as problem:
            raise EOFError from problem
        return decode_message(frame) if isinstance(frame, str) else frame

    def request(self, message: Any, timeout_s: float) -> Any:
        """Send a message and wait for its answer. Raises the master's refusal with its exit code."""
        self.send(message)
        deadline = time.monotonic() + timeout_s
        while (left := deadline - time.monotonic()) > 0:
            reply = self.receive(left)
            if isinstance(reply, Refuse):
                raise refused(reply)
            if reply is not None and not isinstance(reply, bytes):
                return reply
        raise UnreachableError("the master did not answer in time", "is it overloaded? try again")

    def close(self) -> None:
        self.socket.close()


def refused(reply: Refuse) -> UpdaterError:
    """The master's refusal as an error with its exit code."""
    problem = UpdaterError(reply.what, reply.hint)
    problem.exit_code = reply.exit
    return problem


class Caller:
    """Finds the master: on its own host by the local listener first, then by masterUrl."""

    def __init__(self, state: StateFolder, config: Config, bind: str | None) -> None:
        self.bind = bind
        self.urls = [config.master_url.text]
        daemon = read_json(state.daemon_file) or {}
        local = daemon.get("listen")
        if isinstance(local, str) and local not in self.urls and FileLock.held_elsewhere(state.daemon_lock):
            self.urls.insert(0, local)

    def dial(self, patience_s: float) -> Connection:
        """A welcomed connection, within `patience_s`. Raises UnreachableError or RefusedError."""
        deadline = time.monotonic() + patience_s
        while True:
            problems: list[UpdaterError] = []
            for url in self.urls:
                try:
                    return self._dial(url, max(0.5, min(DIAL_S, deadline - time.monotonic())))
                except UpdaterError as problem:
                    problems.append(problem)
            if all(isinstance(problem, RefusedError) for problem in problems):
                raise problems[-1]
            pause = random.uniform(*RETRY_S)
            if time.monotonic() + pause > deadline:
                raise problems[-1]
            time.sleep(pause)

    def _dial(self, url: str, timeout_s: float) -> Connection:
        from websockets.exceptions import ConnectionClosed, InvalidHandshake, InvalidStatus
        from websockets.sync.client import connect

        source = {"source_address": (self.bind, 0)} if self.bind else {}
        try:
            socket = connect(url, open_timeout=timeout_s, **COMMANDER_OPTIONS, **source)
            socket.send(encode_message(Hello("commander", [PROTOCOL_OLDEST, PROTOCOL], __version__, "", user_name(), "")))
            reply = decode_message(socket.recv(timeout=timeout_s))
        except InvalidStatus as problem:
            raise refusal(problem.response.status_code, bytes(problem.response.body or b"")) from problem
        except (OSError, InvalidHandshake, ConnectionClosed, EOFError) as problem:
            what = getattr(problem, "strerror", None) or str(problem) or "no answer"
            raise UnreachableError(f"can't reach the master at {url}: {what}", "is `serve` running there?") from problem
        if isinstance(reply, Refuse):
            raise RefusedError(reply.what, reply.hint)
        if not isinstance(reply, Welcome):
            raise UnreachableError(f"{url} is no estelle-updater master", "is masterUrl right?")
        return Connection(socket, reply)


def user_name() -> str:
    """Who asks, for the record: user and host name; no proof of anything."""
    user = os.environ.get("USER") or os.environ.get("USERNAME") or "?"
    return f"{user}@{socket.gethostname()}"


def submit_run(caller: Caller, order: Submit, patience_s: float) -> tuple[Connection, RunRecord]:
    """Start a run; a connection that dies before the answer is no reason to start two. Raises UpdaterError."""
    deadline = time.monotonic() + patience_s
    while True:
        connection = caller.dial(max(0.1, deadline - time.monotonic()))
        try:
            reply = connection.request(order, ANSWER_S)
        except EOFError:
            if time.monotonic() > deadline:
                raise UnreachableError("the master went away before it answered", "try again") from None
            continue
        if not isinstance(reply, RunRecord):
            raise UnreachableError("the master answered something else", "do both sides run the same version?")
        return connection, reply


@dataclass
class Followed:
    """What a commander has of one host's log, and where it ends."""

    job: JobRecord | None = None
    size: int = 0
    offered: int | None = None
    shown: bool = False


class Follower:
    """Follows one run over any number of connections: each log byte is shown once, in order, whoever dies meanwhile."""

    def __init__(self, caller: Caller, run: str, view: View, target: str = "", live: bool = True) -> None:
        self.caller, self.run, self.view, self.target, self.live = caller, run, view, target, live
        self.record: RunRecord | None = None
        self.hosts: dict[str, Followed] = {}
        self.channels: dict[int, str] = {}
        self.unacked: dict[int, int] = {}

    def follow(self, connection: Connection) -> list[JobRecord]:
        """Show the run to its end: the jobs as they ended. Raises UpdaterError where the master refuses."""
        while True:
            try:
                self.channels.clear()
                self.unacked.clear()
                connection.send(Follow(self.run, self.target))
                while not self.finished():
                    self.receive(connection, connection.receive(ACK_S if self.unacked else 1.0))
                connection.close()
                break
            except EOFError:
                self.view.notice("the connection to the master is lost; the deployment goes on, reconnecting ...")
                connection = self.caller.dial(float("inf"))
                self.view.notice("connected again")
        jobs = [followed.job for followed in self.hosts.values() if followed.job]
        assert self.record
        self.view.done(self.record, jobs)
        return jobs

    def finished(self) -> bool:
        return self.record is not None and all(
            followed.shown or (not self.live and followed.offered is not None and followed.size >= followed.offered)
            for followed in self.hosts.values()
        )

    def receive(self, connection: Connection, message: Any) -> None:
        if message is None:
            self.acknowledge(connection)
        elif isinstance(message, bytes):
            channel, offset, data = decode_chunk(message)
            followed = self.hosts[self.channels[channel]]
            if offset == followed.size:
                followed.size += len(data)
                self.view.data(self.channels[channel], data)
                self.unacked[channel] = self.unacked.get(channel, 0) + len(data)
                if self.unacked[channel] >= ACK_BYTES:
                    self.acknowledge(connection)
                self.show_result(self.channels[channel])
        elif isinstance(message, RunRecord):
            if self.record is None:
                self.record = message
                self.hosts = {host: Followed() for host in message.hosts}
                self.view.begin(message)
        elif isinstance(message, JobRecord) and message.host in self.hosts:
            self.hosts[message.host].job = message
            if message.state not in FINAL:
                self.view.state(message)
            self.show_result(message.host)
        elif isinstance(message, Log) and message.host in self.hosts:
            self.channels[message.channel] = message.host
            self.hosts[message.host].offered = message.size
            connection.send(Have(message.channel, self.hosts[message.host].size, rewind=True))
        elif isinstance(message, Refuse):
            raise refused(message)

    def acknowledge(self, connection: Connection) -> None:
        for channel in self.unacked:
            connection.send(Have(channel, self.hosts[self.channels[channel]].size))
        self.unacked.clear()

    def show_result(self, host: str) -> None:
        """A host's last line, once all of its log was shown."""
        followed = self.hosts[host]
        if followed.job and followed.job.state in FINAL and followed.size >= followed.job.size and not followed.shown:
            followed.shown = True
            self.view.result(followed.job)


# ==============================================================================
# 19. Service: start-up and shutdown order, signals, readiness
# ==============================================================================


class PokeReceiver:
    """The daemon's end of the runner's poke; the datagram's content means nothing."""

    def __init__(self, poked: asyncio.Event) -> None:
        self._poked = poked

    def connection_made(self, transport: Any) -> None: ...
    def connection_lost(self, problem: Exception | None) -> None: ...
    def error_received(self, problem: Exception) -> None: ...
    def datagram_received(self, data: bytes, address: Any) -> None:
        self._poked.set()


@dataclass(frozen=True)
class ServeOptions:
    """What `serve` was told on its command line."""

    config_path: Path
    state: StateFolder
    bind: str | None = None
    role: Role | None = None
    listen: str | None = None


class Service:
    """This host's daemon, from its first line to its last."""

    def __init__(self, options: ServeOptions) -> None:
        self.options, self.state = options, options.state
        self.config = ConfigFile(options.config_path)
        self.nonce = os.urandom(16).hex()
        self.stopping = asyncio.Event()
        self.machine = ""

    async def run(self) -> int:
        """Serve until a signal. Raises UpdaterError where the start is impossible."""
        self.state.create()
        lock = FileLock(self.state.daemon_lock)
        if not lock.acquire(timeout_s=DAEMON_LOCK_WAIT_S):
            pid = (read_json(self.state.daemon_file) or {}).get("pid")
            raise UsageError(
                f"another estelle-updater (pid {pid}) serves from {self.state.root}",
                "stop it, or give this one a state folder of its own with --state DIR",
            )
        try:
            self.machine = self.state.machine_id()
            on_stop_signals(asyncio.get_running_loop(), self.stop)
            agent = Agent(self.state, self.config, self.machine, self.nonce)
            agent.recover()
            self.say_what_is_odd()
            while not self.stopping.is_set():
                decision = await self.decide()
                log.info("estelle-updater %s on %s: %s", __version__, socket.gethostname(), decision.reason)
                await self.serve_as(agent, decision)
            return 0
        finally:
            self.state.daemon_file.unlink(missing_ok=True)
            lock.release()

    def stop(self, signal_name: str) -> None:
        log.info("stopping on %s; a running deployment goes on", signal_name)
        self.stopping.set()

    def say_what_is_odd(self) -> None:
        """What will make deployments fail later is worth a line now."""
        rule = host_rule(self.config.config, self.options.bind, socket.gethostname())
        tree = work_tree(self.config.path)
        repo = tree / rule.repo if rule.repo else tree
        if not (repo / ".git").exists():
            log.warning("%s is no git checkout: deployments will fail until it is one", repo)
        try:
            resolve_program("git", os.environ.get("PATH", ""))
        except UpdaterError as problem:
            log.warning("%s", problem.what)

    async def decide(self) -> RoleDecision:
        """Master or agent? Facts are gathered here and judged in section 3."""
        return await asyncio.to_thread(gather_role, self.config.config, self.options.role, self.options.bind)

    async def serve_as(self, agent: Agent, decision: RoleDecision) -> None:
        """One role until the daemon stops, or the role has to be decided anew."""
        loop = asyncio.get_running_loop()
        transport, _ = await loop.create_datagram_endpoint(
            lambda: PokeReceiver(agent.poked), local_addr=("127.0.0.1", 0)  # type: ignore[arg-type, return-value]
        )
        facts = {"pid": os.getpid(), "role": decision.role, "poke": transport.get_extra_info("sockname")[1]}
        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(agent.watch_forever())]
                if decision.role is Role.MASTER:
                    tasks.append(group.create_task(self.serve_master(group, agent, facts)))
                else:
                    self.save_facts(facts)
                    tasks.append(group.create_task(self.serve_agent(agent)))
                await self.stopping.wait()
                for task in tasks:
                    task.cancel()
        finally:
            transport.close()

    def save_facts(self, facts: Mapping[str, Any]) -> None:
        with suppress(OSError):
            write_atomic(self.state.daemon_file, json.dumps(dict(facts)).encode())

    async def serve_agent(self, agent: Agent) -> None:
        dialer = Dialer(agent, self.options.bind)
        async with asyncio.TaskGroup() as group:
            group.create_task(dialer.dial_forever())
            group.create_task(self.watch_config(agent, dialer.config_changed.set))

    async def serve_master(self, group: asyncio.TaskGroup, agent: Agent, facts: dict[str, Any]) -> None:
        """Listen, and let the master's own agent in by its private door."""
        from websockets.asyncio.server import serve

        url = self.config.config.master_url
        own = self.options.bind or next(iter(await asyncio.to_thread(probe_master_addresses, url.host, url.port)), url.host)
        master = Master(self.state, self.config, self.machine, self.nonce, own)
        master.recover()
        host, port = parse_listen(self.options.listen, url.port)
        try:
            server = await serve(
                master.serve_socket, host, port, process_request=master.judge_request, **SERVER_OPTIONS
            )
        except OSError as problem:
            raise UsageError(
                f"can't listen on {host or '*'}:{port}: {problem.strerror}", "is another master running? try --listen"
            ) from problem
        async with server, asyncio.TaskGroup() as inner:
            facts["listen"] = local_url(url, host, port)
            self.save_facts(facts)
            log.info("listening on %s port %d", host or "all addresses", port)
            here, there = QueueWire.pair()
            inner.create_task(master.serve_agent(Link(here), agent.hello(), own))
            await there.recv()
            inner.create_task(agent.serve_link(Link(there)))
            inner.create_task(master.tick_forever())
            inner.create_task(self.watch_config(agent, master.drop_disallowed))

    async def watch_config(self, agent: Agent, changed: Callable[[], None]) -> None:
        """New settings take effect without a restart, but never those of a tree that git is just changing."""
        problem = None
        while True:
            await asyncio.sleep(CONFIG_LOOK_S)
            if any(job.record.step and job.record.step.startswith(("git checkout", "git pull"))
                   and job.record.state is State.RUNNING for job in agent.jobs.values()):  # fmt: skip
                continue
            if self.config.look():
                log.info("new settings from %s", self.config.path)
                changed()
            if self.config.problem and self.config.problem != problem:
                log.error("%s; the old settings stay in force", self.config.problem)
            problem = self.config.problem


def gather_role(config: Config, override: Role | None, bind: str | None) -> RoleDecision:
    raise NotImplementedError


def parse_listen(text: str | None, port: int) -> tuple[str | None, int]:
    """--listen HOST:PORT as (host or None for all, port). Raises UsageError."""
    if not text:
        return None, port
    host, colon, number = text.rpartition(":")
    if not colon or not number.isascii() or not number.isdigit() or not 0 <= int(number) < 65536:
        raise UsageError(f"--listen {text!r} is not HOST:PORT", "for example --listen 0.0.0.0:9900")
    return host.strip("[]") or None, int(number)


def local_url(url: MasterUrl, host: str | None, port: int) -> str:
    """How a commander on the master's own host reaches the listener."""
    name = "127.0.0.1" if host in (None, "0.0.0.0", "::") else host
    return f"{url.scheme}://{f'[{name}]' if ':' in name else name}:{port}{url.path}"


# ==============================================================================
# 20. Tools: build
# ==============================================================================

# ==============================================================================
# 21. Command line: the command table, cmd_*, rendering, main(argv) -> int
# ==============================================================================

SGR = re.compile(r"\x1b\[[0-9;:]*m")
ESCAPES = re.compile(  # SGR is kept; then whole sequences go before single control characters do
    r"(\x1b\[[0-9;:]*m)|\x1b\[[0-?]*[ -/]*[@-~]|\x1b[\]PX^_].*?(?:\x07|\x1b\\|$)|\x1b[ -/]*[0-~]"
    r"|[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]",
    re.DOTALL,
)
RESET = "\x1b[0m"


def terminal_text(text: str) -> str:
    """A host's line as a terminal may have it: text and colours and nothing else; a carriage return begins a new line."""
    lines = []
    for line in re.split(r"\r+\n?|\n", text):
        clean = ESCAPES.sub(lambda match: match[1] or "", line)
        lines.append(clean + RESET if SGR.search(clean) else clean)
    return "\n".join(lines)


def result_text(job: JobRecord) -> str:
    """A host's last line, in the operator's language."""
    match job.state:
        case State.SUCCEEDED:
            return f"✓ 완료 {job.version or ''}".rstrip()
        case State.FAILED:
            exit_text = "" if job.exit is None else f" (exit {job.exit})"
            return f"✗ 실패 {job.step}{exit_text}"
        case State.CANCELLED:
            return "✗ 취소"
        case State.OFFLINE:
            return "✗ 오프라인"
        case State.TIMEOUT:
            return f"✗ 시간 초과 {job.step}"
        case _:
            return f"✗ 연결 끊김 ({job.error})"


class Output:
    """Standard output: bytes as they are to a pipe, text that can't hurt to a terminal. A closed pipe raises Closed."""

    class Closed(Exception):
        """Nobody reads our output any more."""

    def __init__(self, color: bool) -> None:
        self.terminal = sys.stdout.isatty()
        self.color = color and self.terminal and not os.environ.get("NO_COLOR")

    def write(self, data: bytes) -> None:
        try:
            if self.terminal:
                text = data.decode("utf-8", "replace")
                sys.stdout.write(text.encode(sys.stdout.encoding, "replace").decode(sys.stdout.encoding))
                sys.stdout.flush()
            else:
                sys.stdout.buffer.write(data)
                sys.stdout.buffer.flush()
        except (BrokenPipeError, ConnectionResetError, ValueError) as problem:
            with suppress(OSError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # or the interpreter complains at its exit
            raise Output.Closed from problem
        except OSError as problem:
            if os.name == "nt" and problem.errno == errno.EINVAL:
                raise Output.Closed from problem  # how Windows says that the pipe is closed
            raise

    def paint(self, text: str, code: str) -> str:
        return f"\x1b[{code}m{text}{RESET}" if self.color else text


PREFIX_COLORS = ("36", "35", "34", "33", "32")


class TextView(View):
    """A run for people: one `[host] ` prefix per line, whole lines only, a table at the end of several hosts."""

    def __init__(self, output: Output) -> None:
        self.output = output
        self.prefixes: dict[str, bytes] = {}
        self.partial: dict[str, bytes] = {}
        self.open_host: str | None = None  # whose unfinished line stands on the screen

    def begin(self, run: RunRecord) -> None:
        for index, host in enumerate(run.hosts):
            color = PREFIX_COLORS[index % len(PREFIX_COLORS)]
            self.prefixes[host] = self.output.paint(f"[{terminal_text(host)}]", color).encode() + b" "

    def data(self, host: str, data: bytes) -> None:
        data = self.partial.pop(host, b"") + data
        cut = data.rfind(b"\n") + 1
        if len(data) - cut >= LINE_BYTES:
            cut = len(data)
        if cut < len(data):
            self.partial[host] = data[cut:]
        if cut:
            self.show(host, data[:cut])

    def show(self, host: str, data: bytes) -> None:
        """Lines, the last of them perhaps to be continued."""
        if self.output.terminal:
            ended = data.endswith(b"\n")
            data = terminal_text(data.removesuffix(b"\n").removesuffix(b"\r").decode("utf-8", "replace")).encode()
            data += b"\n" if ended else b""
        prefix = self.prefixes[host]
        if self.open_host == host:
            start = b""
        else:
            start = prefix if self.open_host is None else b"\n" + prefix
        self.open_host = None if data.endswith(b"\n") else host
        body = data[:-1].replace(b"\n", b"\n" + prefix) + data[-1:]
        self.output.write(start + body)

    def result(self, job: JobRecord) -> None:
        if rest := self.partial.pop(job.host, b""):
            self.show(job.host, rest)
        if self.open_host is not None:
            self.output.write(b"\n")
            self.open_host = None
        color = "32" if job.state is State.SUCCEEDED else "31"
        text = self.output.paint(terminal_text(result_text(job)), color)
        self.output.write(self.prefixes[job.host] + text.encode() + b"\n")

    def done(self, run: RunRecord, jobs: Sequence[JobRecord]) -> None:
        if len(jobs) < 2 or any(job.state not in FINAL for job in jobs):
            return
        rows = [(job.host, (job.commit or "-")[:7], seconds_text(job), result_text(job)) for job in jobs]
        self.output.write(("\n" + terminal_text(render_table(("host", "commit", "time", "result"), rows))).encode())

    def notice(self, text: str) -> None:
        print(f"estelle-updater: {text}", file=sys.stderr, flush=True)


def seconds_of(job: JobRecord) -> float | None:
    """How long the job ran, in seconds."""
    return round(job.ended - job.started, 3) if job.started is not None and job.ended is not None else None


def seconds_text(job: JobRecord) -> str:
    seconds = seconds_of(job)
    return "-" if seconds is None else f"{seconds:.1f} s"


def render_table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    """Columns padded with spaces; the last one, which may hold wide characters, is not."""
    widths = [max(len(row[index]) for row in (head, *rows)) for index in range(len(head))]
    return "".join(
        "  ".join((*(cell.ljust(width) for cell, width in zip(row[:-1], widths, strict=False)), row[-1])).rstrip() + "\n"
        for row in (head, *rows)
    )


class JsonView(View):
    """A run for programs: the contract's events as JSON lines."""

    def __init__(self, output: Output) -> None:
        self.output = output
        self.run = ""
        self.partial: dict[str, bytes] = {}

    def emit(self, **event: Any) -> None:
        self.output.write(json.dumps(event, ensure_ascii=False).encode("utf-8", "replace") + b"\n")

    def begin(self, run: RunRecord) -> None:
        self.run = run.run
        offline = [host for host in run.hosts if host in run.offline]
        self.emit(event="run", run=run.run, kind=run.kind, target=run.target, branch=run.branch, hosts=run.hosts, offline=offline)

    def state(self, job: JobRecord) -> None:
        self.emit(event="state", run=job.run, host=job.host, state=job.state, step=job.step, behind=job.behind)

    def data(self, host: str, data: bytes) -> None:
        *lines, rest = (self.partial.pop(host, b"") + data).split(b"\n")
        for line in lines:
            self.line(host, line)
        while len(rest) >= LINE_BYTES:
            self.line(host, rest[:LINE_BYTES], more=True)
            rest = rest[LINE_BYTES:]
        if rest:
            self.partial[host] = rest

    def line(self, host: str, line: bytes, **more: bool) -> None:
        while len(line) > LINE_BYTES:
            self.line(host, line[:LINE_BYTES], more=True)
            line = line[LINE_BYTES:]
        self.emit(event="log", run=self.run, host=host, line=line.decode("utf-8", "replace"), **more)

    def result(self, job: JobRecord) -> None:
        if rest := self.partial.pop(job.host, b""):
            self.line(job.host, rest)
        self.emit(
            event="result", run=job.run, host=job.host, ok=job.state is State.SUCCEEDED, state=job.state,
            version=job.version, commit=job.commit, seconds=seconds_of(job), step=job.step, exit=job.exit,
            bytes=job.size, error=job.error,
        )  # fmt: skip

    def done(self, run: RunRecord, jobs: Sequence[JobRecord]) -> None:
        if all(job.state in FINAL for job in jobs):
            self.emit(event="done", run=run.run, ok=run_ok(jobs))

    def notice(self, text: str) -> None:
        self.emit(event="notice", text=text)


def watch_run(args: Args, follower: Follower, connection: Connection) -> int:
    """Show a run to its end. Ctrl-C or a closed output stops watching, and says how to go on."""
    try:
        return 0 if run_ok(follower.follow(connection)) else 1
    except (KeyboardInterrupt, Output.Closed):
        run = follower.run
        text = f"the deployment goes on; follow it: {program_name()} logs {run} -f   stop it: {program_name()} cancel {run}"
        with suppress(OSError):
            if args.json:
                print(json.dumps({"event": "notice", "text": text}), file=sys.stderr)
            else:
                print(f"\nestelle-updater: {text}", file=sys.stderr)
        return 130


def make_view(args: Args) -> View:
    output = Output(not args.no_color)
    return JsonView(output) if args.json else TextView(output)


def make_caller(args: Args) -> Caller:
    require_packages()
    return Caller(args.state_folder(), load_config(args.config_path()), args.bind)


def cmd_serve(args: Args) -> int:
    require_packages()
    preload()
    role = args.role if args.role != "auto" else None
    options = ServeOptions(args.config_path(), args.state_folder(), args.bind, Role(role) if role else None, args.listen)
    return asyncio.run(Service(options).run())


def cmd_trigger(args: Args) -> int:
    if problem := valid_branch_problem(args.branch):
        raise UsageError(f"{args.branch[:80]!r} is no branch name: {problem}", "nothing was sent")
    caller = make_caller(args)
    order = Submit(
        make_run_id(), os.urandom(16).hex(), Kind.DEPLOY, args.target, args.branch, user_name(), args.batch, args.wait
    )
    view = make_view(args)
    connection, record = submit_run(caller, order, max(PATIENCE_S, args.wait))
    if args.detach:
        view.begin(record) if args.json else print(record.run)
        return 0
    view.notice(f"run {record.run}: {record.branch} on {', '.join(record.hosts)}")
    return watch_run(args, Follower(caller, record.run, view), connection)


def cmd_logs(args: Args) -> int:
    caller = make_caller(args)
    follower = Follower(caller, args.run, make_view(args), args.target or "", live=args.follow)
    code = watch_run(args, follower, caller.dial(PATIENCE_S))
    return code if args.follow or code == 130 else 0


def cmd_cancel(args: Args) -> int:
    connection = make_caller(args).dial(PATIENCE_S)
    record: RunRecord = connection.request(Cancel(args.run, user_name()), ANSWER_S)
    connection.close()
    text = f"cancelling {record.run} on {', '.join(record.hosts)}"
    print(json.dumps({"run": record.run, "cancelled": True, "hosts": record.hosts}) if args.json else text)
    return 0


def cmd_status(args: Args) -> int:
    connection = make_caller(args).dial(PATIENCE_S)
    answer: Answer = connection.request(Ask(1, "status"), ANSWER_S)
    connection.close()
    if args.json:
        print(json.dumps(answer.result, ensure_ascii=False))
        return 0
    master = answer.result["master"]
    print(f"master {master['ip']}  estelle-updater {master['version']}  up {master['uptime']:.0f} s")
    rows = [status_cells(row) for row in answer.result["hosts"]]
    head = ("host", "name", "role", "online", "branch", "commit", "version", "colour", "job")
    sys.stdout.write(terminal_text(render_table(head, rows)))
    for row in (master, *answer.result["hosts"]):
        if row.get("problem"):
            print(f"! {row.get('host', 'master')}: {row['problem']}")
    return 0


def status_cells(row: Mapping[str, Any]) -> tuple[str, ...]:
    """One host's row of the `status` table."""
    job = f"running {row['running']} ({row.get('step') or '?'})" if row["running"] else ""
    job += f" queued {', '.join(row['queued'])}" if row["queued"] else ""
    commit = (row["commit"] or "-")[:7] + ("+dirty" if row["dirty"] else "")
    return (
        row["host"], row["name"], row["role"], "yes" if row["online"] else "no", row["branch"] or "-", commit,
        row["version"] or "-", row["color"] or "-", job.strip() or "-",
    )  # fmt: skip


def cmd_run_job(args: Args) -> int:
    """The runner: not for people."""
    detach_self()
    preload()
    return Runner(args.state_folder(), args.run, args.host, args.config_path()).main()


def cmd_build(args: Args) -> int:
    result = build_zipapp(Path(__file__).resolve(), Path(args.output))
    print(f"{result.path}  {result.size_bytes} bytes\nsha256 {result.sha256}")
    return 0


def parse_seconds(text: str) -> float:
    """A number of seconds on the command line. Raises UsageError."""
    with suppress(ValueError):
        if 0 <= (value := float(text)) < 1e7:
            return value
    raise UsageError(f"{text!r} is no number of seconds", "for example 60")


def parse_count(text: str) -> int:
    """A positive whole number on the command line. Raises UsageError."""
    if text.isascii() and text.isdigit() and 0 < int(text) < 100_000:
        return int(text)
    raise UsageError(f"{text!r} is no positive number")


def parse_run_id(text: str) -> str:
    """A run's id on the command line. Raises UsageError."""
    if valid_run_id(text):
        return text
    raise UsageError(f"{text[:80]!r} is no run id", "it looks like 20261122-210501-7f3a; `history` lists them")


class Args(SimpleNamespace):
    """The command line, parsed."""

    json: bool
    no_color: bool
    verbose: bool
    bind: str | None

    def state_folder(self) -> StateFolder:
        return StateFolder(Path(self.state).absolute() if self.state else default_state_folder(os.environ))

    def config_path(self) -> Path:
        """Where the configuration is: --config, ESTELLE_CONFIG, else found from ESTELLE_REPO or the working directory."""
        if explicit := self.config or os.environ.get("ESTELLE_CONFIG"):
            return Path(explicit).absolute()
        return find_config(Path(os.environ.get("ESTELLE_REPO") or ".").absolute())


@dataclass(frozen=True)
class Option:
    """One argument of a command, as argparse takes it."""

    names: tuple[str, ...]
    settings: dict[str, Any]


def option(*names: str, **settings: Any) -> Option:
    return Option(names, settings)


@dataclass(frozen=True)
class Command:
    """A row of the command table, from which help, README and completion are made."""

    name: str
    help: str
    run: Callable[[Args], int]
    options: tuple[Option, ...] = ()
    hidden: bool = False


TARGET_HELP = "all, an IP, a CIDR, a host name, IP/NAME, active, standby, or several separated by commas"
COMMANDS = (
    Command("serve", "run this host's daemon: master or agent, decided by address", cmd_serve, (
        option("--role", choices=("auto", "master", "agent"), default="auto", help="decide the role by hand"),
        option("--listen", metavar="HOST:PORT", help="where the master listens (default: all addresses, masterUrl's port)"),
    )),
    Command("trigger", "deploy BRANCH on TARGET and stream every host's log", cmd_trigger, (
        option("target", metavar="TARGET", help=TARGET_HELP),
        option("branch", metavar="BRANCH", help="a branch, a tag or a full commit id"),
        option("--detach", action="store_true", help="print the run id and leave"),
        option("--wait", type=parse_seconds, default=0.0, metavar="SECONDS", help="wait so long for offline targets"),
        option("--batch", type=parse_count, default=0, metavar="N", help="deploy N hosts at a time, stop after a failure"),
    )),
    Command("cancel", "stop a running or queued deployment on every host", cmd_cancel, (
        option("run", metavar="RUN", type=parse_run_id, help="the run's id"),
    )),
    Command("logs", "print or follow a recorded run", cmd_logs, (
        option("run", metavar="RUN", type=parse_run_id, help="the run's id"),
        option("target", metavar="TARGET", nargs="?", help="only these hosts"),
        option("-f", "--follow", action="store_true", help="go on until the run's end"),
    )),
    Command("status", "show the fleet: who is online, what is checked out, what runs", cmd_status),
    Command("build", "make the zipapp from a source checkout", cmd_build, (
        option("-o", "--output", default="estelle_updater.pyz", metavar="FILE", help="where to write it"),
    )),
    Command("run-job", "", cmd_run_job, (option("run"), option("host")), hidden=True),
)  # fmt: skip
GLOBAL_OPTIONS = (
    option("--config", metavar="FILE", help="the configuration (default: config/updater.json or .toml, found upwards)"),
    option("--state", metavar="DIR", help="where this host keeps its runs"),
    option("--bind", metavar="IP", type=canonical_address, help="the source address, and for serve this host's own address"),
    option("--json", action="store_true", help="JSON lines instead of text"),
    option("--no-color", action="store_true", help="no colours on a terminal"),
    option("-v", "--verbose", action="store_true", help="more detail, and tracebacks for errors"),
)


class Parser(argparse.ArgumentParser):
    """argparse, with the contract's errors instead of its own."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(message, f"see: {self.prog} --help")


def make_parser() -> Parser:
    """The command table as a parser; global options go before or after the command."""
    shared = Parser(add_help=False, argument_default=argparse.SUPPRESS)
    for item in GLOBAL_OPTIONS:
        shared.add_argument(*item.names, **item.settings)
    parser = Parser(prog=program_name(), description="Deploy a small fleet, live.", parents=[shared])
    parser.add_argument("--version", action="version", version=f"estelle-updater {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for command in COMMANDS:
        shown = {} if command.hidden else {"help": command.help}
        sub = commands.add_parser(command.name, parents=[shared], description=command.help, **shown)
        for item in command.options:
            sub.add_argument(*item.names, **item.settings)
        sub.set_defaults(function=command.run)
    return parser


def main(argv: list[str]) -> int:
    """Run one command; returns the contract's exit code."""
    environ = os.environ
    args = Args(
        config=None, state=None, bind=environ.get("ESTELLE_BIND") or None, json=False, no_color=False, verbose=False
    )
    args.json = "--json" in argv  # also for errors of the command line itself
    try:
        if args.bind:
            args.bind = canonical_address(args.bind)
        make_parser().parse_args(argv, args)
        code: int = args.function(args)
        return code
    except UpdaterError as problem:
        if args.verbose:
            raise
        return print_error(problem, args.json)
    except KeyboardInterrupt:
        return 130
    except BaseExceptionGroup as group:
        leaf = next(iter_leaves(group))
        if args.verbose or not isinstance(leaf, UpdaterError):
            raise
        return print_error(leaf, args.json)


def print_error(problem: UpdaterError, as_json: bool) -> int:
    """One line what, one line hint, on stderr."""
    if as_json:
        event = {"event": "error", "what": problem.what, "hint": problem.hint, "exit": problem.exit_code}
        print(json.dumps(event, ensure_ascii=False), file=sys.stderr)
    else:
        lines = [f"estelle-updater: error: {problem.what}"]
        lines += [f"hint: {problem.hint}"] if problem.hint else []
        print("\n".join(lines).encode(sys.stderr.encoding, "backslashreplace").decode(sys.stderr.encoding), file=sys.stderr)
    return problem.exit_code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
