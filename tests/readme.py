"""The parts of README.md that are made from the program.

python3 tests/readme.py            say which of them are stale (exit 1)
python3 tests/readme.py --write    write them anew
"""

from __future__ import annotations

import functools
import json
import os
import re
import sys
from collections.abc import Iterator, Mapping
from difflib import unified_diff
from pathlib import Path
from typing import Any
from unittest.mock import patch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tests import seam as est  # noqa: E402
from tests.seam import MISSING, Field, fields  # noqa: E402

# What may differ by role
BY_ROLE = {
    "command": "instead of `deploy.command`, on the `master` or on each `agent`",
    "restart": "instead of `deploy.restart`; `[]` restarts nothing",
    "settle": "instead of `deploy.settle`",
    "timeout": "instead of `deploy.timeout`",
    "version": "instead of `deploy.version`",
    "environmentFile": "a flat JSON object of strings, or `KEY=VALUE` lines, for the steps' environment",
    "environmentVariable": "gets the file's whole JSON, with `~/` expanded; nested JSON always is one variable",
    "env": "variables by name, for the steps",
}
# Every key of the configuration, by table. One that stands only here, or only in the program, is an error.
MEANINGS: dict[str, dict[str, str]] = {
    "": {
        "masterUrl": "where the master listens: `ws://` or `wss://`, an address or a name, and a port (9900)",
        "project": "names service, state folder and messages, where a host has several",
        "whitelist": "addresses and networks (CIDR) that may connect",
        "commanders": "only these of the whitelist, and the master's own host, may command; without, all of them",
        "trustedProxies": "only these may say `X-Forwarded-For`",
        "serverNames": "names besides masterUrl's host that the `Host` header may have",
        "tokenFile": "a file outside the repository with a shared secret; or `ESTELLE_TOKEN` in the environment",
    },
    "deploy": {
        "remote": "the git remote",
        "command": "what deploys: a program and its arguments, no shell; or a list of such commands, each a step",
        "restart": "services to restart after the command: `NAME.service`, `user:NAME.service` or `pm2:NAME`",
        "settle": "seconds for which each must then stay up, in one life",
        "timeout": "seconds for one step",
        "submodules": "`git submodule update --init --recursive` after the pull, where the commit has any",
        "lfs": "`git lfs pull` after the pull, where files are only pointers",
        "secrets": "names of more variables whose values no log may show; those that look secret are masked anyway",
        "version": "where the version stands; else the last `vMMDD_N` of the output, else `git describe`",
    },
    "deploy.ROLE": BY_ROLE,
    'hosts."KEY"': {
        "name": "what the host is called; nobody else may claim the name",
        "role": "`master` or `agent`, where the address can't tell",
        "repo": "the checkout to deploy; default: the one that holds this file",
        "color": "`blue` or `green`: which worker this host is",
        "deploy": "`false` keeps it out of `all`, `active` and `standby`",
    },
    "haproxy": {
        "host": "the host that runs HAProxy, by name or address",
        "backend": "the backend whose two servers are the colours",
        "config": "its configuration file, or a list of files and folders in HAProxy's order",
        "servers": "the names of the two `server` lines",
        "socket": "the stats socket (level admin): who is up, draining, proof by counters",
        "masterSocket": "the master CLI socket: proof that a new worker runs",
        "reload": "how to reload it",
        "probe": "a URL whose answer proves the switch by a real request (GET only)",
    },
    "[[health]]": {
        "name": "what the check is called",
        "http": "a URL that must answer",
        "tcp": "HOST:PORT that must accept a connection",
        "valkey": "HOST:PORT that must answer PING",
        "user": "valkey: who asks, where it is not the default user; mariadb: who looks whether it takes writes",
        "passwordFile": "valkey, mariadb: the file with the password for it, outside the repository",
        "passwordEnv": "valkey, mariadb: the variable with it",
        "tls": "valkey: `true` for a port that wants TLS",
        "mariadb": "HOST:PORT that must greet as MariaDB or MySQL does; to a `user` have a free place, and take writes",
        "systemd": "a unit, or `user:NAME` of `systemctl --user`, that must be active for `deploy.settle`, in one life",
        "pm2": "a process of PM2 that must be online for `deploy.settle`, in one life",
        "disk": "a folder whose disk must have room for bytes and files, and be writable",
        "certificate": "a certificate file, or HOST:PORT with all that it shows, that must stay valid (and name HOST)",
        "command": "a program and its arguments that must end with 0",
        "hosts": "which hosts run it; default: all",
        "status": "http: the status to expect",
        "contains": "http: a text that the body must hold",
        "least": "disk: percent that must be free (10); certificate: days that must be left (14)",
        "timeout": "seconds for one try",
    },
    "tls": {
        "cert": "PEM file with the certificate chain of a `wss://` master; read again when it changes",
        "key": "its private key",
        "ca": "whom agents and commanders trust instead of the system's authorities",
    },
    "keep": {
        "runs": "how many recorded runs stay",
        "days": "for how many days",
        "megabytes": "and how much of the disk, the oldest going first",
        "jobMegabytes": "of one log: beyond it, only the last 64 KiB of what a step writes",
    },
    "[[freeze]]": {
        "name": "what the window is called",
        "days": "on which days it begins: `mon-fri`, `sat,sun`; default: all",
        "from": "when it begins: `09:00`; default: midnight",
        "to": "when it ends; before `from`: on the next day; default: midnight",
        "zone": "whose clock: an IANA name such as `Asia/Seoul`",
        "kinds": "what it holds back",
        "hosts": "on which hosts, by name or address; default: all",
    },
    "[[watch]]": {
        "branch": "the branch of the remote that is asked for",
        "target": "where it is deployed when it moves",
        "every": "seconds between two questions to the remote, 15 at least",
        "then": "`deploy`, or `plan`, which only says what would come",
        "by": "who `history` says has asked for it",
    },
    "updater": {"sha256": "the `.pyz` that `upgrade` may install"},
    "[[notify]]": {
        "url": "where to post; only where the URL is no secret",
        "urlEnv": "the master's environment variable that holds the URL",
        "urlFile": "a file outside git that holds it",
        "format": "`slack`, `discord`, `telegram`, `ntfy` or `json`",
        "chat": "telegram: the chat's id",
        "on": "which events: see Notifications",
        "per": "`run`: one message about all hosts of a run, at its end; `host`: one about each, at once",
        "offlineMinutes": "how long an agent may be away before `agent-offline` tells of it",
    },
}
TABLES: Mapping[str, Any] = {
    "": est.Config, "deploy": est.DeployRule, "deploy.ROLE": est.RoleRule, 'hosts."KEY"': est.HostRule,
    "haproxy": est.HaproxyRule,
    "[[health]]": est.HealthRule, "tls": est.TlsRule, "keep": est.KeepRule, "updater": est.UpdaterRule,
    "[[notify]]": est.NotifyRule, "[[freeze]]": est.FreezeRule,
    "[[watch]]": est.WatchRule,
}  # fmt: skip


def words(item: est.Option) -> str:
    """An argument as a person types it."""
    name = item.names[-1]
    if not name.startswith("-"):
        text = item.settings.get("metavar", name.upper())
        return f"[{text}]" if item.settings.get("nargs") == "?" else str(text)
    value = item.settings.get("metavar") or (
        "|".join(item.settings.get("choices", ())) if "choices" in item.settings else ""
    )
    text = f"{'|'.join(item.names)}{' ' + value if value else ''}"
    return text if item.settings.get("required") else f"[{text}]"


def commands() -> str:
    """The command table."""
    rows = ["| command | what it does |", "| --- | --- |"]
    for command in est.COMMANDS:
        if not command.hidden:
            usage = " ".join([command.name, *map(words, command.options)]).replace("|", "\\|")
            rows.append(f"| `{usage}` | {command.help} |")
    return "\n".join(rows)


def options() -> str:
    """The options of every command."""
    rows = ["| option | meaning |", "| --- | --- |"]
    for item in est.GLOBAL_OPTIONS:
        rows.append(
            f"| `{words(item).strip('[]')}` | {item.settings['help']} |".replace("-v|--verbose", "-v, --verbose")
        )
    return "\n".join(rows)


def help_blocks() -> str:
    """What each command's `--help` says, less the options that all have."""
    shared = {name for item in est.GLOBAL_OPTIONS for name in item.names} | {"-h"}
    blocks = []
    parser = est.make_parser()
    (choices,) = (dict(action.choices or ()) for action in parser._actions if action.dest == "command")
    for command in est.COMMANDS:
        if command.hidden or not command.options:
            continue
        with patch.dict(os.environ, COLUMNS="2000"):  # where Python breaks a line differs between its versions
            text = re.sub(r"(-\w) \S+, (--)", r"\1, \2", choices[command.name].format_help())
        text = re.sub(r"(?m)^options of every command.*\n", "", text)
        lines = [line for line in text.splitlines() if not line.strip() or line.split()[0].strip(",") not in shared]
        used = f"usage: estelle_updater.pyz {command.name} " + " ".join(map(words, command.options))
        blocks.append("\n".join([used, *lines[1:]]))
    return (
        "```\n"
        + "\n\n".join(re.sub(r"\n{2,}|\noptions:\s*(?=\Z|for example)", "\n", block).strip() for block in blocks)
        + "\n```"
    )


def default_text(setting: Field) -> str:
    """A key's default as the file would spell it."""
    if setting.default is MISSING and setting.default_factory is MISSING:
        return "required"
    value = setting.default_factory() if setting.default_factory is not MISSING else setting.default
    if value is None or value in ((), {}) or hasattr(value, "__dataclass_fields__"):
        return ""
    value = int(value) if isinstance(value, float) and value.is_integer() else value
    return f"`{json.dumps(list(value) if isinstance(value, tuple) else value)}`"


def keys_of(cls: Any) -> Iterator[tuple[str, Field]]:
    """The keys of a table that hold a value, not a table."""
    known = {setting.name: setting for setting in fields(cls)}
    for key, (name, _) in est.config_keys(cls).items():
        is_table = cls is est.Config and (key in ("hosts", *TABLES) or f"[[{key}]]" in TABLES)
        is_role = cls is est.DeployRule and key in ("master", "agent")
        # a host has all that a role has: that is one row of its own
        is_shared = cls is est.HostRule and key in BY_ROLE
        if not (is_table or is_role or is_shared):
            yield key, known[name]


def configuration() -> str:
    """The table of the configuration's keys."""
    rows = ["| key | default | meaning |", "| --- | --- | --- |"]
    for table, cls in TABLES.items():
        found = dict(keys_of(cls))
        if wrong := set(found) ^ set(MEANINGS[table]):
            raise SystemExit(f"{table or 'top level'}: {', '.join(sorted(wrong))} stands on one side only")
        for key, meaning in MEANINGS[table].items():
            shown = f"{table} {key}" if table.startswith("[[") else f"{table}.{key}".removeprefix(".")
            rows.append(f"| `{shown}` | {default_text(found[key])} | {meaning} |")
        if cls is est.HostRule:
            rows.append(f"| `{table}.*` |  | all keys of `deploy.ROLE`, over what that says |")
    return "\n".join(rows)


# Where one meets a message, by the section of the module that says it; the rest is met anywhere
PLACES: dict[str, tuple[int, ...]] = {
    "In a deployment's log or result": (6, 7, 11, 12),
    "While a host or a command connects": (5, 15, 16, 18),
    "From the master, about a run or a host": (17, 19, 21),
    "From switches, releases and health checks": (8, 14),
    "From the configuration and from files": (3, 4, 10),
    "From notifications": (20,),
    "From setup, upgrade and doctor, and at a daemon's start": (13, 22, 23),
    "From a command": (),
}
LOG, WIRE, _, TRAFFIC = list(PLACES)[:4]
# Said by a section that is not where it is met: an agent's words stand in the result, a verdict's in the plan
MET_ELSEWHERE = {
    "queued behind run": LOG, "left running": LOG, "silent for": LOG, "the order expired while this host was away": LOG,
    "the host forgot this job": LOG, "the record of this job is damaged": LOG,
    "the runner does not start": LOG, "log incomplete": LOG, "certificate": WIRE,
    "did not answer in time": WIRE, "traffic moved": TRAFFIC, "is not healthy": TRAFFIC,
    "nobody knows which host is": TRAFFIC, "no branch name": "From a command",
}  # fmt: skip


def messages(readme: str) -> str:
    """The table of messages, grouped by where one meets them; the rows are README's own."""
    source = (ROOT / "estelle_updater.py").read_text("utf-8")
    plain = re.sub(r'["\'] *\n\s*f?["\']', "", source)
    heads = [(match.start(), int(match[1])) for match in re.finditer(r"(?m)^# (\d+)\. .*\n# ={10}", plain)]
    old = readme.split("<!-- messages -->")[1].split("<!-- /messages -->")[0]
    groups: dict[str, list[str]] = {title: [] for title in PLACES}
    for row in old.splitlines():
        found = re.match(r"\| `([^`]+)`", row)
        if found is None:
            continue
        at = plain.find(found[1])
        section = max((number for start, number in heads if start < at), default=0)
        said_in = [title for title, sections in PLACES.items() if section in sections]
        title = MET_ELSEWHERE.get(found[1]) or next(iter(said_in), "From a command")
        groups[title].append(row)
    parts = []
    for title, rows in groups.items():
        if rows:
            parts.append("\n".join([f"### {title}", "", "| message | what to do |", "| --- | --- |", *rows]))
    return "\n" + "\n\n".join(parts) + "\n"


def rewrite(text: str) -> str:
    """README's text with its generated parts as the program has them now."""
    grouped = functools.partial(messages, text)
    parts = {
        "commands": commands,
        "options": options,
        "configuration": configuration,
        "help": help_blocks,
        "messages": grouped,
    }
    for name, make in parts.items():
        pattern = rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)"
        made, count = re.subn(
            pattern,
            lambda match, make=make: f"{match[1]}{make()}\n{match[2]}",  # type: ignore[misc]
            text,
            flags=re.DOTALL,
        )
        if count != 1:
            raise SystemExit(f"README.md has no place for: {name}")
        text = made
    return text


def main() -> int:
    readme = ROOT / "README.md"
    old = readme.read_text("utf-8")
    new = rewrite(old)
    if "--write" in sys.argv[1:]:
        readme.write_text(new, "utf-8")
        return 0
    sys.stdout.writelines(unified_diff(old.splitlines(True), new.splitlines(True), "README.md", "the program", n=0))
    return 1 if old != new else 0


if __name__ == "__main__":
    sys.exit(main())
