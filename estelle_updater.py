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

import json
import os
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

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
    import ipaddress
    from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
else:
    asyncio = _Lazy("asyncio")
    ipaddress = _Lazy("ipaddress")


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

_ADDRESS_HINT = "write 121.0.0.7 or 121.0.0.0/8"
_ADDRESS_LIKE = re.compile(r"(?i)(?=.*[0-9])[0-9x*]+(\.[0-9x*]+)+|.*:.*")  # meant as an address, `121.x.x.x` too
_HOST_NAME = re.compile(r"(?i)(?!.*\.[0-9]+$)[a-z0-9_][a-z0-9_-]{0,62}(\.[a-z0-9_-]{1,63}){0,30}")
_DEVICE = re.compile(r"(?i)(CON|PRN|AUX|NUL|COM[0-9]|LPT[0-9])(?=\.|$)")


def _parse_ip(text: str) -> IPv4Address | IPv6Address:
    """The address that `text` means, IPv4 wherever it is one; UsageError with the contract's hint."""
    bare = text.strip()
    bracketed = bare.startswith("[") and bare.endswith("]")
    bare, percent, zone = (bare[1:-1] if bracketed else bare).partition("%")
    try:
        address = ipaddress.ip_address(bare)
        if (address.version == 4 and (bracketed or percent)) or (percent and not zone):
            raise ValueError(bare)
    except ValueError:
        raise UsageError(f"{text!r} is no address", _ADDRESS_HINT) from None
    return getattr(address, "ipv4_mapped", None) or address


def canonical_address(text: str) -> str:
    """The one spelling of an address: `::ffff:1.2.3.4` is 1.2.3.4, `[FE80::1%eth0]` is fe80::1; else UsageError."""
    return str(_parse_ip(text))


def parse_network(text: str) -> IPv4Network | IPv6Network:
    """An address or CIDR as a network, a lone address alone in it; UsageError where bits behind the prefix are set."""
    head, slash, tail = text.strip().partition("/")
    address = _parse_ip(head)
    longest = 128 if ":" in head else 32
    if slash and not re.fullmatch(r"0|[1-9][0-9]{0,2}", tail):  # no masks: 0.0.0.255 could be read either way
        raise UsageError(f"{text!r} is no address", _ADDRESS_HINT)
    length = (int(tail) if slash else longest) - (longest - address.max_prefixlen)  # ::ffff:1.2.3.0/120 is a /24
    if not 0 <= length <= address.max_prefixlen:
        raise UsageError(f"{text!r} is no network", f"write {address} or a prefix of at most /{address.max_prefixlen}")
    network = ipaddress.ip_network((int(address).to_bytes(address.max_prefixlen // 8), length), strict=False)
    if network.network_address != address:
        raise UsageError(f"{text!r} has host bits set", f"write {network} for the network or {address} for the host")
    return network


@dataclass(frozen=True)
class Verdict:
    """Whether an address may connect, and why, in a sentence that names the address."""

    allowed: bool
    reason: str


class Whitelist:
    """Who may connect: the addresses listed and nobody else, loopback included; an empty list lets nobody in.

    One lookup per distinct prefix length, so a call costs the same with ten entries and ten thousand.
    """

    def __init__(self, entries: Iterable[str]) -> None:
        self.entries = tuple(entries)
        self._by_shift: dict[tuple[int, int], dict[int, str]] = {}
        for entry in self.entries:
            network = parse_network(entry)
            shift = network.max_prefixlen - network.prefixlen
            self._by_shift.setdefault((network.version, shift), {})[int(network.network_address) >> shift] = entry

    def verdict(self, address: str) -> Verdict:
        """Judge one address, in any spelling; what is no address is refused, never an error."""
        try:
            seen = _parse_ip(address)
        except UsageError as error:
            return Verdict(False, error.what)
        for (version, shift), listed in self._by_shift.items():
            if version == seen.version and int(seen) >> shift in listed:
                return Verdict(True, f"{seen} is allowed by {listed[int(seen) >> shift]}")
        why = "is not in the whitelist" if self.entries else "may not connect, the whitelist is empty"
        return Verdict(False, f'{seen} {why}; add "{seen}" to whitelist in the master\'s configuration')


def split_port(text: str) -> tuple[str, int | None]:
    """`HOST`, `HOST:PORT`, `[IPV6]:PORT` or a bare IPv6 in two parts, brackets kept; UsageError for a bad port."""
    if text.count(":") > 1 and "[" not in text:
        return text, None
    match = re.fullmatch(r"(\[[^\[\]]*\]|[^:\[\]]*)(?::([0-9]{1,5}))?", text)
    if match is None or (match[2] and not 0 < int(match[2]) < 65536):
        raise UsageError(f"{text!r} is no host and port", "write 121.0.0.7:9900 or [2001:db8::7]:9900")
    return match[1], int(match[2]) if match[2] else None


def host_key(text: str) -> str:
    """A host as it is compared: the canonical address, or the name in lower case without a final dot."""
    try:
        return canonical_address(text)
    except UsageError:
        return text.lower().removesuffix(".")


def client_address(peer: str, forwarded_for: Sequence[str], trusted: Whitelist) -> str:
    """Who is really connecting: X-Forwarded-For is believed from the right, as long as trusted proxies are speaking.

    An unreadable hop gives text that is no address, which every whitelist refuses: answering with the proxy's own
    address would let everybody in where the proxy's host is whitelisted for its agent.
    """
    hop = host_key(peer)
    for said in reversed([piece.strip() for value in forwarded_for for piece in value.split(",")]):
        if not trusted.verdict(hop).allowed:
            break
        try:
            hop = canonical_address(split_port(said)[0])
        except UsageError:
            return f"{said[:60]} from {hop}"
    return hop


def parse_host(text: str) -> str:
    """An address or a host name in the form in which it is compared; UsageError for anything else."""
    name = host_key(text)
    return name if _HOST_NAME.fullmatch(name) and not _ADDRESS_LIKE.fullmatch(name) else canonical_address(text)


def allowed_host_header(host_header: str | None, own_names: Iterable[str]) -> bool:
    """Whether Host names us (`own_names`: our addresses, masterUrl's host, serverNames); DNS rebinding would not."""
    try:
        host = split_port(host_header or "")[0]
    except UsageError:
        return False
    return host != "" and host_key(host) in {host_key(name) for name in own_names}


def allowed_origin(origin: str | None, own_names: Iterable[str]) -> bool:
    """Whether a browser page of this Origin may connect; no Origin at all is a program, judged by the whitelist."""
    scheme, _, host = (origin or "").partition("://")
    return origin is None or (scheme.lower() in ("http", "https") and allowed_host_header(host, own_names))


@dataclass(frozen=True)
class MasterUrl:
    """Where the master listens; `host` is canonical or in lower case, without brackets."""

    scheme: str
    host: str
    port: int
    path: str
    secure: bool

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{self.scheme}://{host}:{self.port}{self.path}"


def parse_master_url(text: str) -> MasterUrl:
    """masterUrl in its parts; port 9900 and path `/` unless given. UsageError says what is wrong with it."""
    hint = "write ws://5.223.72.58:9900 or wss://master.example:9900"
    match = re.fullmatch(r"([^:/?#]+)://([^/?#]+)([^?#]*)(.*)", text.strip(), re.DOTALL)
    if "@" in text or (match and match[4]):  # never echoed: it may hold a secret
        raise UsageError("a user, password, query or fragment has no place in masterUrl", hint)
    if match is None or match[1].lower() not in ("ws", "wss") or not re.fullmatch(r"(/[!-~]*)?", match[3]):
        raise UsageError(f"{text!r} is no ws:// or wss:// URL", hint)
    host, port = split_port(match[2])
    if (":" in host and "[" not in host) or parse_host(host) in ("0.0.0.0", "::"):
        raise UsageError(f"{text!r} names no host that agents could dial", hint)
    scheme = match[1].lower()
    return MasterUrl(scheme, parse_host(host), port or DEFAULT_PORT, match[3] or "/", scheme == "wss")


@dataclass(frozen=True)
class RoleFacts:
    """What this host knows of itself; `local_source`: per master address, a UDP socket's own when connected to it."""

    override: Role | None = None
    override_source: str = "--role"
    bind: str | None = None
    master_addresses: tuple[str, ...] = ()  # empty when masterUrl's name can't be resolved
    local_source: Mapping[str, str | None] = field(default_factory=dict)
    public_address: str | None = None
    public_source: str | None = None  # "metadata" or "echo"


@dataclass(frozen=True)
class RoleDecision:
    """The role and why; `provisional` has to be proven by dialing masterUrl and meeting oneself."""

    role: Role
    reason: str
    provisional: bool = False


def decide_role(facts: RoleFacts) -> RoleDecision:
    """Whether this host is the master or an agent, with the reason as a sentence; unknown is never master."""
    masters = [canonical_address(address) for address in facts.master_addresses]
    shown = ", ".join(masters)
    if facts.override is not None:
        return RoleDecision(facts.override, f"{facts.override}: {facts.override_source} says so")
    if not masters:
        return RoleDecision(Role.AGENT, "agent: masterUrl's name has no address now, and unknown is never master")
    if facts.bind is not None:
        ours = canonical_address(facts.bind) in masters
        role, relation = (Role.MASTER, "is") if ours else (Role.AGENT, "is not")
        return RoleDecision(role, f"{role}: --bind {facts.bind} {relation} masterUrl's address ({shown})")
    # Every host has all of 127/8 (Debian puts the own name at 127.0.1.1), so only 127.0.0.1 itself says anything.
    telling = [m for m in masters if m not in ("0.0.0.0", "::") and (m == "127.0.0.1" or not m.startswith("127."))]
    sources = {canonical_address(to): canonical_address(source) for to, source in facts.local_source.items() if source}
    for master in telling:
        if sources.get(master) == master:
            return RoleDecision(Role.MASTER, f"master: {master} is an address of this host")
    public = canonical_address(facts.public_address) if facts.public_address else None
    if public in telling:
        who = "cloud metadata" if facts.public_source == "metadata" else "the outside world"
        return RoleDecision(Role.MASTER, f"master: {who} knows this host as {public}", provisional=True)
    why = "is not an address of this host" if telling else "is on every host; give --bind or --role"
    return RoleDecision(Role.AGENT, f"agent: {shown} {why}")


@dataclass(frozen=True)
class HostRef:
    """A host as targets see it; `deploys` is False for the data node, which no deployment touches."""

    label: str
    address: str
    name: str
    machine: str
    online: bool
    color: str | None = None
    deploys: bool = True


def _match_target(part: str, hosts: Sequence[HostRef], active: str | None) -> list[HostRef]:
    """The hosts that one word of a TARGET means, those that take no deployments included."""
    if part == "all":
        return list(hosts)
    if part in ("active", "standby"):
        if active is None:
            raise TargetError(f"nobody knows which host is {part}", "no HAProxy is configured, or it did not answer")
        return [host for host in hosts if host.color and (host.color == active) == (part == "active")]
    head, slash, tail = part.partition("/")
    labelled = [host for host in hosts if host.label == part]
    if labelled or not (slash or _ADDRESS_LIKE.fullmatch(part)):  # never the name of a host that calls itself 10.0.0.1
        return labelled or [host for host in hosts if host.name.casefold() == part.casefold()]
    address = canonical_address(head)
    if slash and not tail.isdecimal():
        return [host for host in hosts if host.address == address and host.name.casefold() == tail.casefold()]
    network = parse_network(part)
    return [host for host in hosts if ipaddress.ip_address(host.address) in network]


def select_targets(target: str, hosts: Sequence[HostRef], active: str | None = None) -> list[HostRef]:
    """The hosts that TARGET means, each once, in the order named; TargetError where a part of it is nobody.

    `active` is the colour that has the traffic, as far as known. `121.x.x.x` and the like are UsageErrors.
    """
    chosen: dict[str, HostRef] = {}
    for part in (piece.strip() for piece in target.split(",")):
        if not part:
            raise UsageError(f"{target!r} names no target", "write all, an address or a name, with commas between")
        found = _match_target(part, hosts, active)
        if not found:
            known = ", ".join(f"{h.label} ({h.name})" if h.label == h.address else h.label for h in hosts[:20])
            raise TargetError(f"no such target: {part}", f"known: {known or 'no host so far'}")
        if not any(host.deploys for host in found):
            raise TargetError(f"{part} takes no deployments", "its section in the configuration says deploy = false")
        chosen.update((host.label, host) for host in found if host.deploys)
    return list(chosen.values())


def file_label(label: str) -> str:
    """A label as part of a file name on any system: what is not `A-Za-z0-9._-` becomes `_`; never `.`, `..`, CON."""
    plain = re.sub(r"[^A-Za-z0-9._-]", "_", label)
    return _DEVICE.sub(r"\1_", plain, count=1) if _DEVICE.match(plain) else plain if plain.strip(".") else plain + "_"


def assign_labels(hosts: Sequence[tuple[str, str, str]]) -> list[str]:
    """Labels for (address, name, machine id): no finer than needed to tell the hosts, and their files, apart."""
    machines = {machine for _, _, machine in hosts}
    length = next((n for n in range(4, 32) if len({machine[:n] for machine in machines}) == len(machines)), 32)
    labels = [address for address, _, _ in hosts]
    for finer in ([f"{a}/{n}" for a, n, _ in hosts], [f"{a}/{n}~{m[:length]}" for a, n, m in hosts]):
        files = [file_label(label).casefold() for label in labels]  # on Windows, a and A are one file
        shared = Counter(files)
        labels = [more if shared[f] > 1 else label for label, more, f in zip(labels, finer, files, strict=True)]
    return labels


def valid_run_id(text: str) -> bool:
    """Whether `text` is a run id such as 20261122-210501-7f3a, and so also safe as a folder's name."""
    return re.fullmatch(r"[0-9]{8}-[0-9]{6}-[0-9a-f]{4}", text) is not None


def valid_host_name(text: str) -> bool:
    """Whether a host may call itself so: printable, no target word, no address, nothing that TARGET's grammar uses."""
    if not text.isprintable() or re.search(r"[\s,/~]", text) or text.isdecimal() or not 0 < len(text) <= 64:
        return False
    return text.casefold() not in ("all", "active", "standby") and not _ADDRESS_LIKE.fullmatch(text)


def valid_branch_problem(name: str) -> str | None:
    """What keeps `name` from being a branch, tag or commit id; None when nothing does.

    git check-ref-format's rules, and stricter: it also keeps options and characters that nobody sees out of argv.
    """
    rules: tuple[tuple[str, str], ...] = (
        (r"|HEAD|@", "it is no branch's name"),
        (r"-.*", "it begins with -, like an option"),
        (r"/.*|.*/|.*//.*", "a part between slashes is empty"),
        (r"(.*/)?\..*", "a part begins with a dot"),
        (r".*\.|.*\.lock(/.*)?", "a part ends with .lock, or the name with a dot"),
        (r".*(\.\.|@\{|[ ~^:?*\[\\]).*", "it holds '..', '@{', a space or one of ~^:?*[\\"),
    )
    if not name.isprintable():  # control, bidirectional and zero-width characters, line ends, lone surrogates
        return "it holds a character that can't be seen"
    if len(name.encode()) > 255:
        return "it is longer than 255 bytes"
    return next((problem for pattern, problem in rules if re.fullmatch(pattern, name)), None)


# ==============================================================================
# 4. Configuration: frozen dataclasses, parse with all problems at once, render
# ==============================================================================

MAX_TIMEOUT_S = 7 * 86400.0  # a longer one is a typo (milliseconds), not a step
CHECK_KINDS = ("http", "tcp", "valkey", "mariadb", "systemd", "disk", "certificate", "command")
NOTIFY_EVENTS = (*sorted(FINAL), "switched")
_FOREIGN_KEYS = {  # keys that people try, and what to do instead
    "token": "a secret must not be committed: put it into a file outside git and name that file in tokenFile",
    "role": 'never for the whole fleet; write it into [hosts."ADDRESS"] or pass --role',
    "machines": "this is the older form; `config convert` makes the new one of it",
}
_SECRET_NAME = re.compile(
    r"(?i)(?!.*_(FILE|PATH|DIR|SOCK)$).*"
    r"(TOKEN|SECRET|PASSWORD|PASSWD|PASSPHRASE|[^D]PWD$|PASS$|KEYS?(?![A-Z])|CREDENTIAL|DSN|PRIVATE|WEBHOOK|COOKIE)"
)
_URL_PASSWORD = re.compile(r"(?i)[a-z][a-z0-9+.-]*://[^\s/?#:@]*:([^\s/?#]+)@")
_ENVIRONMENT_LINE = re.compile(
    r"""\s*(?:export\s+)?([^\s=#"']+)[ \t]*="""
    r"""(?:[ \t]*"((?:[^"\\]|\\.)*)"|[ \t]*'([^']*)'|((?![ \t]*["'])(?:(?!\s#).)*))\s*(?:\s#.*)?"""
)
_Convert = Callable[[Any], Any]  # a checked value for a raw one, or _Wrong
_Problems = list[tuple[str, str]]  # (path below the value, what is wrong there)


class _Wrong(Exception):
    """Everything that is wrong with one raw value."""

    def __init__(self, problems: _Problems) -> None:
        super().__init__(problems)
        self.problems = problems


def _shown(raw: Any) -> str:
    """A value as the file spells it, short and on one line."""
    text = json.dumps(raw, ensure_ascii=False, default=str).encode("utf-8", "backslashreplace").decode()
    return text if len(text) <= 80 else text[:77] + "..."


def _step(key: str) -> str:
    return f".{key}" if re.fullmatch(r"[A-Za-z0-9_-]+", key) else f".{_shown(key)}"


def _convert_all(parts: Iterable[tuple[str, _Convert, Any]], more: Iterable[tuple[str, str]] = ()) -> list[Any]:
    """Convert every (path, converter, raw value), so that all problems are told at once, and `more` of them too."""
    values: list[Any] = []
    problems: _Problems = []
    for path, convert, raw in parts:
        try:
            values.append(convert(raw))
        except _Wrong as wrong:
            problems += [(path + below, problem) for below, problem in wrong.problems]
    if problems := [*problems, *more]:
        raise _Wrong(problems)
    return values


def _is(what: str, test: Callable[[Any], Any]) -> _Convert:
    """A converter that passes on what `test` holds for, and says of the rest that it is no `what`."""

    def convert(raw: Any) -> Any:
        if not test(raw):
            raise _Wrong([("", f"{_shown(raw)} is no {what}")])
        return raw

    return convert


def _matches(what: str, pattern: str) -> _Convert:
    return _is(what, lambda raw: _is_argument(raw) and re.fullmatch(pattern, raw))


def _one_of(*words: str) -> _Convert:
    return _is(f"choice here; write {' or '.join(words)}", lambda raw: isinstance(raw, str) and raw in words)


def _by(parse: Callable[[str], Any], keep: bool = False) -> _Convert:
    """A converter out of a parser of section 3, whose UsageError becomes the problem; `keep`: the text as written."""

    def convert(raw: Any) -> Any:
        try:
            parsed = parse(_text(raw))
        except UsageError as error:
            reason = error.what.removeprefix(repr(raw))  # else it does not show the value, which may hold a secret
            shown = _shown(raw) if reason != error.what else ""
            raise _Wrong([("", f"{shown}{reason}; {error.hint}")]) from None
        return raw if keep else parsed

    return convert


def _list_of(convert: _Convert, example: str, least: int = 0) -> _Convert:
    def read(raw: Any) -> tuple[Any, ...]:
        if not isinstance(raw, list) or len(raw) < least:
            write = _shown(raw.split()) if isinstance(raw, str) and raw.split() else example
            raise _Wrong([("", f"{_shown(raw)} is no list{' with entries' if least else ''}; write {write}")])
        return tuple(_convert_all((f"[{i}]", convert, item) for i, item in enumerate(raw)))

    return read


def _unknown(key: str, known: Iterable[str]) -> _Convert:
    """A converter for a key that nobody knows; a value under a name that looks secret is not shown."""

    def convert(raw: Any) -> Any:
        from difflib import get_close_matches

        like = get_close_matches(key, list(known), 1)
        advice = f"did you mean {like[0]}?" if like else "known are " + ", ".join(known)
        value = "" if _SECRET_NAME.match(key) else f", value {_shown(raw)}"
        raise _Wrong([("", f"unknown key{value}; {_FOREIGN_KEYS.get(key, advice)}")])

    return convert


def _table(cls: Any, check: Callable[[dict[str, Any]], _Problems] = lambda raw: []) -> _Convert:
    """A converter that makes a `cls` of a table: a field `master_url: Annotated[T, converter]` reads its masterUrl.

    A field without default must be there; `check` looks at several raw values together.
    """
    hints = get_type_hints(cls, include_extras=True)
    read_fields = {
        re.sub("_(.)", lambda letter: letter[1].upper(), setting.name.removesuffix("_s")): setting
        for setting in fields(cls)
        if hasattr(hints[setting.name], "__metadata__")
    }
    required = [key for key, setting in read_fields.items() if setting.default is setting.default_factory]  # MISSING

    def converter(key: str) -> _Convert:
        known = read_fields.get(key)
        return hints[known.name].__metadata__[0] if known else _unknown(key, read_fields)

    def read(raw: Any) -> Any:
        parts = [(_step(key), converter(key), value) for key, value in _mapping(raw).items()]
        lacking = [(_step(key), "missing, and it has no default") for key in required if key not in raw]
        values = _convert_all(parts, lacking + check(raw))
        return cls(**{read_fields[key].name: value for key, value in zip(raw, values, strict=True)})

    return read


def _is_argument(raw: Any) -> bool:
    """Whether a value is text that a process can be given: JSON can spell NUL and lone surrogates, which it can't."""
    return isinstance(raw, str) and not re.search("[\0\ud800-\udfff]", raw)


def _role(raw: Any) -> Role:
    return Role(_one_of(*Role)(raw))


def _environment(raw: Any) -> dict[str, str]:
    """Environment variables by name; no value is ever shown, since it may be a secret."""
    names = [key for key in _mapping(raw) if not re.fullmatch(r"[^\s=\0]+", key)]
    problems = [(_step(key), "is no name of an environment variable") for key in names]
    kinds = {key: type(value).__name__ for key, value in raw.items() if not _is_argument(value)}
    problems += [(_step(key), f"its value is {kind}, no text; write it in quotes") for key, kind in kinds.items()]
    _convert_all((), problems)
    return dict(raw)


_text = _is("text of one line", lambda raw: _is_argument(raw) and raw.strip() and raw.isprintable())
_argument = _is("text", _is_argument)
_flag = _is("true or false", lambda raw: isinstance(raw, bool))
_count = _is("whole number above 0", lambda raw: type(raw) is int and raw > 0)  # isinstance would take true for 1
_status = _is("HTTP status", lambda raw: type(raw) is int and 100 <= raw < 600)
_seconds = _is("number of seconds, up to a week", lambda raw: type(raw) in (int, float) and 0 < raw <= MAX_TIMEOUT_S)
_mapping = _is("table", lambda raw: isinstance(raw, dict))
_url = _matches("http:// or https:// URL without a user", r"https?://[^\s/?#@]+([/?#]\S*)?")
_endpoint = _matches("HOST:PORT", r"(\[[0-9A-Fa-f:.]+\]|[^\s:/\[\]]+):[0-9]{1,5}")
_unit = _matches("systemd unit", r"[\w@:.\\][\w@:.\\-]*")
_word = _matches("single word", r"[^\s\"'#\\]+")
_remote = _is("git remote's name", lambda raw: _is_argument(raw) and valid_branch_problem(raw) is None)
_host_name = _is("name for a host", lambda raw: isinstance(raw, str) and valid_host_name(raw))
_host = _by(lambda text: text if valid_host_name(text) else canonical_address(text))
_hosts = _list_of(_host, '["yq-blue", "yq-green"]')
_networks = _list_of(_by(parse_network, keep=True), '["5.223.72.58", "121.0.0.0/24"]')
_server_names = _list_of(_by(parse_host), '["master.example"]')
_command = _list_of(_argument, '["pnpm", "deploy:release"]', least=1)
_units = _list_of(_unit, '["estelle.service"]')
_color = _one_of("blue", "green")
_notify_events = _list_of(_one_of(*NOTIFY_EVENTS), '["failed", "lost"]')
_notify_format = _one_of("slack", "discord", "telegram", "ntfy", "json")


@dataclass(frozen=True, kw_only=True)
class DeployRule:
    """[deploy]: what a deployment runs unless a host's section says otherwise."""

    remote: Annotated[str, _remote] = "origin"
    command: Annotated[tuple[str, ...], _command] = ("pnpm", "deploy:release")
    restart: Annotated[tuple[str, ...], _units] = ()
    timeout_s: Annotated[float, _seconds] = STEP_TIMEOUT_S
    version: Annotated[str, _text] = "config/version.json"


@dataclass(frozen=True, kw_only=True)
class HostRule:
    """One section of [hosts]; `address` and `hostname` are its key's parts, compared as they are, or None."""

    key: str = ""
    address: str | None = None
    hostname: str | None = None
    name: Annotated[str | None, _host_name] = None
    role: Annotated[Role | None, _role] = None
    repo: Annotated[str | None, _text] = None
    command: Annotated[tuple[str, ...] | None, _command] = None
    environment_file: Annotated[str | None, _text] = None
    env: Annotated[Mapping[str, str], _environment] = field(default_factory=dict)
    color: Annotated[str | None, _color] = None
    deploy: Annotated[bool, _flag] = True


def _servers(raw: Any) -> dict[str, str]:
    """The names of the `server` lines by colour, both there and different."""
    colors = ("blue", "green")
    names = {**dict(zip(colors, colors, strict=True)), **_mapping(raw)}
    same = [("", f"{_shown(raw)} gives both colours the same server")] if names["blue"] == names["green"] else []
    _convert_all(((_step(c), _word if c in colors else _unknown(c, colors), name) for c, name in names.items()), same)
    return names


@dataclass(frozen=True, kw_only=True)
class HaproxyRule:
    """[haproxy]: where it runs, and which `server` line is which colour."""

    host: Annotated[str, _host]
    backend: Annotated[str, _word]
    config: Annotated[str, _text] = "/etc/haproxy/haproxy.cfg"
    servers: Annotated[Mapping[str, str], _servers] = field(default_factory=lambda: _servers({}))
    socket: Annotated[str | None, _text] = None
    master_socket: Annotated[str | None, _text] = None
    reload: Annotated[tuple[str, ...], _command] = ("systemctl", "reload", "haproxy")
    probe: Annotated[str | None, _url] = None


@dataclass(frozen=True, kw_only=True)
class HealthRule:
    """One [[health]] check; exactly one of CHECK_KINDS is set, and no `hosts` are all."""

    name: Annotated[str, _text]
    http: Annotated[str | None, _url] = None
    tcp: Annotated[str | None, _endpoint] = None
    valkey: Annotated[str | None, _endpoint] = None
    mariadb: Annotated[str | None, _endpoint] = None
    systemd: Annotated[str | None, _unit] = None
    disk: Annotated[str | None, _text] = None
    certificate: Annotated[str | None, _text] = None
    command: Annotated[tuple[str, ...] | None, _command] = None
    hosts: Annotated[tuple[str, ...], _hosts] = ()
    status: Annotated[int, _status] = 200
    contains: Annotated[str | None, _argument] = None
    timeout_s: Annotated[float, _seconds] = 5.0

    @property
    def kind(self) -> str:
        return next(kind for kind in CHECK_KINDS if getattr(self, kind) is not None)


@dataclass(frozen=True, kw_only=True)
class TlsRule:
    """[tls]: certificate and key of a wss:// master; the authority that agents trust instead of the system's."""

    cert: Annotated[str | None, _text] = None
    key: Annotated[str | None, _text] = None
    ca: Annotated[str | None, _text] = None


@dataclass(frozen=True, kw_only=True)
class KeepRule:
    """[keep]: how many recorded runs stay, and for how long."""

    runs: Annotated[int, _count] = 500
    days: Annotated[int, _count] = 90


@dataclass(frozen=True, kw_only=True)
class UpdaterRule:
    """[updater]: the program file that `upgrade` may install."""

    sha256: Annotated[str | None, _text] = None


@dataclass(frozen=True, kw_only=True)
class NotifyRule:
    """One [[notify]] webhook; exactly one of `url`, `url_env` and `url_file` is set."""

    url: Annotated[str | None, _url] = None
    url_env: Annotated[str | None, _word] = None
    url_file: Annotated[str | None, _text] = None
    format: Annotated[str, _notify_format] = "json"
    chat: Annotated[str | None, _text] = None
    on: Annotated[tuple[str, ...], _notify_events] = ("failed", "lost", "switched")


def _exactly_one(raw: dict[str, Any], keys: Sequence[str]) -> _Problems:
    given = " and ".join(key for key in keys if key in raw) or "nothing"
    return [] if given in keys else [("", f"{given} given; write exactly one of {', '.join(keys)}")]


def _check_health(raw: dict[str, Any]) -> _Problems:
    stray = [key for key in ("status", "contains") if key in raw and "http" not in raw]
    stray_problems = [(_step(key), f"{_shown(raw[key])} belongs to an http check") for key in stray]
    return _exactly_one(raw, CHECK_KINDS) + stray_problems


def _check_notify(raw: dict[str, Any]) -> _Problems:
    if ("chat" in raw) == (raw.get("format") == "telegram"):
        return _exactly_one(raw, ("url", "urlEnv", "urlFile"))
    chat = f"{_shown(raw.get('chat'))}: telegram needs a chat, and nothing else takes one"
    return [*_exactly_one(raw, ("url", "urlEnv", "urlFile")), (".chat", chat)]


def _check_tls(raw: dict[str, Any]) -> _Problems:
    return [] if ("cert" in raw) == ("key" in raw) else [("", f"{_shown(raw)} lacks cert or key; a master needs both")]


def _parse_section(key: str) -> tuple[str | None, str | None]:
    """The address and the host name in a section's key: ADDRESS/HOSTNAME, HOSTNAME or ADDRESS; else UsageError."""
    if valid_host_name(key):
        return None, key.casefold()
    address, slash, hostname = key.partition("/")
    if slash and not valid_host_name(hostname):
        raise UsageError(f"{key!r} is no host", "write ADDRESS/HOSTNAME, HOSTNAME or ADDRESS")
    return canonical_address(address), hostname.casefold() or None


def _read_hosts(raw: Any) -> tuple[HostRule, ...]:
    """The sections of [hosts] in file order; no two may mean the same host or give the same name."""
    table, section = _table(HostRule), _by(_parse_section)
    keys = [(_step(key), section, key) for key in _mapping(raw)]
    read = _convert_all(keys + [(_step(key), table, raw[key]) for key in raw])
    rules: list[HostRule] = []
    owners: dict[Any, str] = {}
    problems: _Problems = []
    for key, (address, hostname), rule in zip(raw, read, read[len(raw) :], strict=False):
        rules.append(replace(rule, key=key, address=address, hostname=hostname))
        for what, identity in (("host", (address, hostname)), ("name", rule.name and rule.name.casefold())):
            if identity and owners.setdefault(identity, key) != key:
                problems.append((_step(key), f"its {what} is that of hosts{_step(owners[identity])} already"))
    _convert_all((), problems)
    return tuple(rules)


@dataclass(frozen=True, kw_only=True)
class Config:
    """The whole configuration, checked; `hosts` in the file's order, whitelist and trusted proxies as written."""

    master_url: Annotated[MasterUrl, _by(parse_master_url)]
    whitelist: Annotated[tuple[str, ...], _networks]
    trusted_proxies: Annotated[tuple[str, ...], _networks] = ()
    server_names: Annotated[tuple[str, ...], _server_names] = ()
    token_file: Annotated[str | None, _text] = None
    deploy: Annotated[DeployRule, _table(DeployRule)] = DeployRule()
    hosts: Annotated[tuple[HostRule, ...], _read_hosts] = ()
    haproxy: Annotated[HaproxyRule | None, _table(HaproxyRule)] = None
    health: Annotated[tuple[HealthRule, ...], _list_of(_table(HealthRule, _check_health), "[[health]]")] = ()
    tls: Annotated[TlsRule, _table(TlsRule, _check_tls)] = TlsRule()
    keep: Annotated[KeepRule, _table(KeepRule)] = KeepRule()
    updater: Annotated[UpdaterRule, _table(UpdaterRule)] = UpdaterRule()
    notify: Annotated[tuple[NotifyRule, ...], _list_of(_table(NotifyRule, _check_notify), "[[notify]]")] = ()


def _config_error(file: str, *problems: tuple[str, str]) -> ConfigError:
    """Every (path, problem) as a line `FILE: PATH: PROBLEM`."""
    lines = tuple(": ".join(filter(None, (file, path.removeprefix("."), problem))) for path, problem in problems)
    return ConfigError(lines[0] + (f" (and {len(lines) - 1} more)" if len(lines) > 1 else ""), f"correct {file}", lines)


def _decoded(text: bytes | str, file: str) -> str:
    try:
        return (text.decode() if isinstance(text, bytes) else text).removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise _config_error(file, ("", f"byte {error.start} is not UTF-8; save the file as UTF-8")) from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; json would silently keep the last of two equal keys, say of two whitelists."""
    table: dict[str, Any] = {}
    for key, value in pairs:
        if key in table:
            raise ValueError(f"{_shown(key)} stands twice in one table; keep one")
        table[key] = value
    return table


def parse_data(text: bytes | str, file: str, form: str) -> dict[str, Any]:
    """The raw tables of a file in `form` json or toml; ConfigError, with line and column, where it is neither."""
    plain = _decoded(text, file)
    try:
        if form == "toml":
            import tomllib

            return tomllib.loads(plain)
        data: dict[str, Any] = _mapping(json.loads(plain, object_pairs_hook=_unique))
    except json.JSONDecodeError as error:
        raise _config_error(file, ("", f"line {error.lineno}, column {error.colno}: {error.msg}")) from None
    except _Wrong as wrong:
        raise _config_error(file, *wrong.problems) from None
    except (ValueError, RecursionError) as error:  # tomllib's message holds line and column
        raise _config_error(file, ("", str(error))) from None
    return data


def parse_config(text: bytes | str, file: str, form: str) -> Config:
    """The configuration that a file's text means, `form` json or toml; ConfigError holds every problem, a line each."""
    data = parse_data(text, file, form)
    try:
        config: Config = _table(Config)(data)
    except _Wrong as wrong:
        raise _config_error(file, *wrong.problems) from None
    return config


def config_warnings(config: Config, known: Iterable[str] = ()) -> list[str]:
    """What is valid and yet hardly meant; `known`: labels and names of hosts besides those that the file names."""
    warnings = [] if config.whitelist else ["whitelist: it is empty, so no agent and no commander can connect"]
    for key, entries in (("whitelist", config.whitelist), ("trustedProxies", config.trusted_proxies)):
        for network in map(parse_network, entries):
            if network.prefixlen == 0:
                warnings.append(f"{key}: {network} is everybody")
            elif network.prefixlen < 10 and network.version == 4 and network.overlaps(parse_network("100.64.0.0/10")):
                warnings.append(f"{key}: {network} holds public addresses; Tailscale's range is 100.64.0.0/10")
    names = {host_key(name) for rule in config.hosts for name in (rule.address, rule.hostname, rule.name) if name}
    names |= {host_key(name) for name in (*known, config.master_url.host)}
    listed = Whitelist(config.whitelist)
    names |= {host for check in config.health for host in check.hosts if listed.verdict(host).allowed}
    wanted = [(f"health {_shown(check.name)}", host) for check in config.health for host in check.hosts]
    if config.haproxy:
        wanted.append(("haproxy", config.haproxy.host))
        colors = {rule.color for rule in config.hosts}
        warnings += [f"haproxy: no host has color {c}" for c in ("blue", "green") if c not in colors]
    warnings += [f"{key}: {_shown(host)} matches no host" for key, host in wanted if host_key(host) not in names]
    for rule in config.hosts:
        secret = [f"hosts{_step(rule.key)}.env.{name}" for name in rule.env if _SECRET_NAME.match(name)]
        warnings += [f"{key}: it looks like a secret; move it to an environmentFile outside git" for key in secret]
    for i, notify in enumerate(config.notify):
        if re.search(r"//(hooks\.slack\.com|discord(app)?\.com/api/webhooks|api\.telegram\.org/bot)", notify.url or ""):
            warnings.append(f"notify[{i}].url: this URL is itself a secret; use urlFile or urlEnv")
    if config.token_file and not re.match(r"[/~]|[A-Za-z]:[/\\]", config.token_file):
        warnings.append(f"tokenFile: {_shown(config.token_file)} lies in the repository, and a secret must not")
    if config.updater.sha256 and not re.fullmatch(r"[0-9A-Fa-f]{64}", config.updater.sha256):
        warnings.append(f"updater.sha256: {_shown(config.updater.sha256)} is not 64 hex digits, so no file matches it")
    return warnings


@dataclass(frozen=True, kw_only=True)
class Effective(HostRule, DeployRule):
    """What holds for one host: its own section over [deploy]; `source_key` names that section, None without one."""

    name: str
    command: tuple[str, ...]

    @property
    def source_key(self) -> str | None:
        return self.key or None


def host_rule(config: Config, address: str | None, hostname: str) -> Effective:
    """The settings of the host at `address` that calls itself `hostname`.

    Of the sections ADDRESS/HOSTNAME, HOSTNAME and ADDRESS the first that exists counts, alone; `name` finds no section.
    """
    at, called = canonical_address(address) if address else None, hostname.casefold()
    sections = {(rule.address, rule.hostname): rule for rule in config.hosts}
    rule = sections.get((at, called)) or sections.get((None, called)) or sections.get((at, None)) or HostRule()
    own = {"name": rule.name or hostname, "command": rule.command or config.deploy.command}
    return Effective(**{**vars(config.deploy), **vars(rule), **own})


def owner_of_name(config: Config, name: str) -> str | None:
    """The address to which the configuration gives `name`; a host elsewhere that claims the name is refused it."""
    return next((rule.address for rule in config.hosts if rule.name and rule.name.casefold() == name.casefold()), None)


def render_config(data: Mapping[str, Any], form: str) -> str:
    """Raw tables as the text of a file in `form` json or toml; needs tomli-w for toml."""
    if form == "toml":
        import tomli_w

        return tomli_w.dumps(data)
    return json.dumps(data, ensure_ascii=False, indent=2) + "\n"


def convert_data(data: Mapping[str, Any]) -> dict[str, Any]:
    """Raw tables in today's form: of the older `machines`, the addresses join the whitelist and the settings [hosts].

    Nothing is checked here: parse_config does that with the result.
    """
    machines = data.get("machines")
    if not isinstance(machines, dict):
        return dict(data)
    listed = data["whitelist"] if isinstance(data.get("whitelist"), list) else []
    new = {key: value for key, value in data.items() if key not in ("machines", "hosts")}
    new["whitelist"] = [*listed, *(address for address in machines if address not in listed)]
    hosts = {address: settings for address, settings in machines.items() if settings}
    if isinstance(data.get("hosts"), dict):
        hosts.update(data["hosts"])
    return {**new, "hosts": hosts} if hosts else new


def _unquoted(key: str, double: str | None, single: str | None, bare: str | None) -> tuple[str, str]:
    if double is not None:
        escapes = {"n": "\n", "r": "\r", "t": "\t"}
        return key, re.sub(r'\\([nrt"\\$])', lambda match: escapes.get(match[1], match[1]), double)
    return key, single if single is not None else (bare or "").strip()


def parse_environment_file(text: bytes | str, file: str) -> dict[str, str]:
    """Environment variables out of a flat JSON object of strings, or of KEY=VALUE lines with comments and quotes.

    ConfigError names the keys or lines that are wrong and never shows a value.
    """
    plain = _decoded(text, file)
    if plain.lstrip().startswith("{"):
        try:
            return _environment(parse_data(plain, file, "json"))
        except _Wrong as wrong:
            raise _config_error(file, *wrong.problems) from None
    lines = [line for line in enumerate(re.split(r"\r?\n", plain), 1) if not re.fullmatch(r"\s*(#.*)?", line[1])]
    matches = [(number, _is_argument(line) and _ENVIRONMENT_LINE.fullmatch(line)) for number, line in lines]
    if problems := [(f"line {number}", "is no KEY=VALUE") for number, match in matches if not match]:
        raise _config_error(file, *problems)
    return dict(_unquoted(*match.groups()) for _, match in matches if match)


def secret_values(*environments: Mapping[str, str]) -> tuple[str, ...]:
    """What no log may show: values under names that look secret, every line of them, and passwords in any URL.

    Longest first, so that no secret is masked only in part. What is under 6 bytes would mask half of every log.
    """
    from urllib.parse import unquote

    found: set[str] = set()
    for name, value in (item for environment in environments for item in environment.items()):
        if _SECRET_NAME.match(name):
            found.update((value, value.strip(), *value.splitlines()))
        for password in _URL_PASSWORD.findall(value):
            found.update((password, unquote(password)))
    long = [secret for secret in found if secret.strip() and len(secret.encode("utf-8", "surrogatepass")) >= 6]
    return tuple(sorted(long, key=lambda secret: (-len(secret), secret)))


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
