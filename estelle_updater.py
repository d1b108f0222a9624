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

import os
import re
import sys
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Any

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
else:
    asyncio = _Lazy("asyncio")


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
STEP_TIMEOUT_S = 1800.0  # one step; the configuration's [deploy] timeout overrides it

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


# ==============================================================================
# 3. Addresses: canonical addresses, whitelist verdict, role decision, targets
# ==============================================================================

# ==============================================================================
# 4. Configuration: frozen dataclasses, parse with all problems at once, render
# ==============================================================================

# ==============================================================================
# 5. Messages: the wire's verbs as dataclasses, encode and decode, size limits
# ==============================================================================

# ==============================================================================
# 6. Journal: offsets, what to send, what to accept, run and job states
# ==============================================================================

# ==============================================================================
# 7. Pipeline: plan a deployment as argument tuples, read versions out of output
# ==============================================================================

# ==============================================================================
# 10. Files: atomic writes, append-only logs, locks, state folder, configuration
# ==============================================================================

# ==============================================================================
# 11. Processes: spawn, stream, interrupt, kill trees, detach; POSIX and Windows
# ==============================================================================

# ==============================================================================
# 12. Runner: one job: lock, steps, log, result
# ==============================================================================

# ==============================================================================
# 13. Probes: own address and role
# ==============================================================================

# ==============================================================================
# 15. Agent: connect, hello, resume, take orders
# ==============================================================================

# ==============================================================================
# 16. Master: handshake, registry, runs, queue, followers
# ==============================================================================

# ==============================================================================
# 18. Commander: what the command line uses to talk to the master
# ==============================================================================

# ==============================================================================
# 19. Service: start-up and shutdown order, signals, readiness
# ==============================================================================

# ==============================================================================
# 20. Tools: build
# ==============================================================================

# ==============================================================================
# 21. Command line: the command table, cmd_*, rendering, main(argv) -> int
# ==============================================================================


def main(argv: list[str]) -> int:
    """Run one command; returns the contract's exit code."""
    if argv == ["--version"]:
        print(f"estelle-updater {__version__}")
        return 0
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
