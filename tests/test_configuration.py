"""The committed configuration: what it means, and every problem in it told at once, with file, key and value."""

from __future__ import annotations

import base64
import json
import re
import time
import tomllib
import urllib.parse
from pathlib import Path
from typing import Any

import pytest
import tomli_w
from hypothesis import example, given, settings, strategies as st

from tests import seam as est
from tests.seam import (
    CHECK_KINDS,
    NOTIFY_EVENTS,
    Config,
    ConfigError,
    DeployRule,
    FreezeRule,
    HaproxyRule,
    HealthRule,
    HostRule,
    KeepRule,
    MasterUrl,
    NotifyRule,
    Role,
    RoleRule,
    TlsRule,
    UpdaterRule,
    WatchRule,
    config_keys,
    config_warnings,
    convert_data,
    host_rule,
    mask_words,
    owners_of_name,
    parse_config,
    parse_data,
    parse_environment_file,
    render_config,
    secret_values,
)

settings.register_profile("patient", deadline=None, max_examples=60)  # a busy machine is no failure
settings.load_profile("patient")

WRITE = "write 121.0.0.7, or a network such as 121.0.0.0/24"
NO_COMMENT = "JSON has no comments; take this one out, or write the file as .toml"
SMALLEST = '{ "masterUrl": "ws://5.223.72.58:9900", "whitelist": ["5.223.72.58", "121.0.0.7"] }'
SMALL = {"masterUrl": "ws://5.223.72.58:9900", "whitelist": ["5.223.72.58"]}
WHOLE = """\
masterUrl = "ws://5.223.72.58:9900"          # ws:// or wss://, an IP or a name
project = "yquant"
whitelist = ["5.223.72.58", "121.0.0.0/24", "2001:db8::/48"]
commanders = []                               # optional: only these of the whitelist may command, the others only serve as agents
trustedProxies = []                           # only these may say X-Forwarded-For
serverNames = []                              # names besides IP literals and masterUrl's host that Host and Origin may have
tokenFile = "/etc/estelle-updater.token"      # optional shared secret; never the secret itself in this file

[deploy]
remote = "origin"
command = ["pnpm", "deploy:release"]
restart = []                                  # after the command: "NAME.service", "user:NAME.service", "pm2:NAME"; each must then stay active for `settle`
settle = 3                                    # seconds
submodules = true
lfs = true
timeout = 1800                                # seconds for one step
version = "config/version.json"               # its "version", or the first line of plain text; else the last vMMDD_N in the output, else git describe --always
secrets = []                                  # names of more variables whose values are masked in the logs

[deploy.master]                               # what differs by role; a host's section lies over it
restart = ["pm2:ecosystem.master.config.cjs"]
[deploy.agent]
command = ["pnpm", "deploy:release"]          # or a list of commands, each a step of its own
restart = ["pm2:ecosystem.agents.config.cjs"]
settle = 5
timeout = 600
version = "config/version.json"
environmentFile = "config/environments.agents.json"
environmentVariable = "ESTELLE_ENV_CONFIG"
env = { NODE_ENV = "production" }

[hosts."121.0.0.7"]                           # ADDRESS/HOSTNAME, HOSTNAME or ADDRESS: the first that matches, in this order; all keys optional
name = "office"
role = "agent"                                # per host only, or --role; never for the whole fleet
repo = "C:/apps/estelle2"                     # default: the git work tree that holds this file
command = ["pnpm", "deploy:release"]
restart = []                                  # this host restarts nothing
settle = 5
timeout = 600
version = "config/version.json"
environmentFile = "config/environments.office.json"   # flat JSON object of strings, or KEY=VALUE lines
environmentVariable = "ESTELLE_ENV_CONFIG"
env = { NODE_ENV = "production" }
color = "green"                               # this host is the green worker
deploy = true                                 # false: not part of all, active, standby (the data node); naming it is exit 4

[haproxy]
host = "yq-data"                              # the host that runs HAProxy, by name or address
config = "/etc/haproxy/haproxy.cfg"
backend = "yquant_backend"
servers = { blue = "blue", green = "green" }  # names of the `server` lines
socket = "/run/haproxy/admin.sock"            # optional
masterSocket = "/run/haproxy-master.sock"     # optional
reload = ["systemctl", "reload", "haproxy"]
probe = "https://127.0.0.1/healthz"           # optional, GET only: proof by a real request; else counters and the server itself

[[health]]                                    # http (status, contains, timeout) tcp valkey mariadb systemd pm2 disk certificate command
name = "web"
http = "http://127.0.0.1:2000/"
hosts = ["yq-blue", "yq-green"]               # default all; a name that matches no host is a warning of `config check`
[[health]]
name = "valkey"
valkey = "127.0.0.1:6379"

[tls]                                         # for wss://
cert = "/etc/letsencrypt/live/example/fullchain.pem"
key = "/etc/letsencrypt/live/example/privkey.pem"
ca = "config/fleet-ca.pem"

[keep]                                        # recorded runs
runs = 500
days = 90
megabytes = 2000
jobMegabytes = 256

[updater]
sha256 = "..."                                # the .pyz that `upgrade` may install: what runs still comes from git

[[freeze]]                                    # nobody deploys meanwhile (exit 5); --force is recorded
name = "market"
days = "mon-fri"
from = "09:00"
to = "15:30"
zone = "Asia/Seoul"

[[watch]]                                     # deploy on push: the master asks the remote
branch = "master"
target = "standby"
every = 60

[[notify]]
urlFile = "/etc/estelle-updater.slack"        # or urlEnv; `url` only where it holds no secret
format = "slack"                              # slack discord telegram (with chat = "…") ntfy json
on = ["failed", "lost", "switched"]
"""  # noqa: E501


def config_of(**more: Any) -> Config:
    return parse_config(json.dumps({**SMALL, **more}), "f", "json")


def problems_of(data: Any, file: str = "f", form: str = "json") -> list[str]:
    """What is wrong with a configuration, without the file's name."""
    text = data if isinstance(data, str | bytes) else json.dumps(data)
    with pytest.raises(ConfigError) as caught:
        parse_config(text, file, form)
    error = caught.value
    assert error.exit_code == 2
    assert error.hint
    more = f" (and {len(error.problems) - 1} more)" if len(error.problems) > 1 else ""
    assert error.what == error.problems[0] + more
    assert all(problem.startswith(f"{file}: ") and "\n" not in problem for problem in error.problems)
    return [problem.removeprefix(f"{file}: ") for problem in error.problems]


# ---------------------------------------------------------------------------- what a file means


def test_the_smallest_file_has_every_default():
    config = parse_config(SMALLEST, "config/updater.json", "json")
    assert config == Config(
        master_url=MasterUrl("ws", "5.223.72.58", 9900, "/", False),
        whitelist=("5.223.72.58", "121.0.0.7"),
    )
    assert config.deploy == DeployRule(
        remote="origin",
        command=("pnpm", "deploy:release"),
        restart=(),
        timeout_s=1800,
        version="config/version.json",
    )
    assert config.keep == KeepRule(runs=500, days=90)
    assert (config.hosts, config.haproxy, config.health, config.notify) == ((), None, (), ())
    assert config_warnings(config) == []


def test_the_whole_example():
    assert parse_config(WHOLE.encode(), "config/updater.toml", "toml") == Config(
        project="yquant",
        master_url=MasterUrl("ws", "5.223.72.58", 9900, "/", False),
        whitelist=("5.223.72.58", "121.0.0.0/24", "2001:db8::/48"),
        token_file="/etc/estelle-updater.token",
        deploy=DeployRule(
            master=RoleRule(restart=("pm2:ecosystem.master.config.cjs",)),
            agent=RoleRule(
                command=("pnpm", "deploy:release"),
                restart=("pm2:ecosystem.agents.config.cjs",),
                settle_s=5,
                timeout_s=600,
                version="config/version.json",
                environment_file="config/environments.agents.json",
                environment_variable="ESTELLE_ENV_CONFIG",
                env={"NODE_ENV": "production"},
            ),
        ),
        hosts=(
            HostRule(
                key="121.0.0.7",
                address="121.0.0.7",
                name="office",
                role=Role.AGENT,
                repo="C:/apps/estelle2",
                command=("pnpm", "deploy:release"),
                restart=(),
                settle_s=5,
                timeout_s=600,
                version="config/version.json",
                environment_file="config/environments.office.json",
                environment_variable="ESTELLE_ENV_CONFIG",
                env={"NODE_ENV": "production"},
                color="green",
                deploy=True,
            ),
        ),
        haproxy=HaproxyRule(
            host="yq-data",
            config="/etc/haproxy/haproxy.cfg",
            backend="yquant_backend",
            servers={"blue": "blue", "green": "green"},
            socket="/run/haproxy/admin.sock",
            master_socket="/run/haproxy-master.sock",
            reload=("systemctl", "reload", "haproxy"),
            probe="https://127.0.0.1/healthz",
        ),
        health=(
            HealthRule(name="web", http="http://127.0.0.1:2000/", hosts=("yq-blue", "yq-green")),
            HealthRule(name="valkey", valkey="127.0.0.1:6379"),
        ),
        tls=TlsRule(
            cert="/etc/letsencrypt/live/example/fullchain.pem",
            key="/etc/letsencrypt/live/example/privkey.pem",
            ca="config/fleet-ca.pem",
        ),
        updater=UpdaterRule(sha256="..."),
        freeze=(FreezeRule(name="market", days=(0, 1, 2, 3, 4), from_s=32400.0, to_s=55800.0, zone="Asia/Seoul"),),
        watch=(WatchRule(branch="master", target="standby", every_s=60.0),),
        notify=(NotifyRule(url_file="/etc/estelle-updater.slack", format="slack", on=("failed", "lost", "switched")),),
    )


def test_the_whole_example_uses_every_key():
    """So that a setting without a line in the example, or the other way round, is noticed."""
    data = tomllib.loads(WHOLE)
    tables = {
        Config: [data], DeployRule: [data["deploy"]], HostRule: list(data["hosts"].values()), TlsRule: [data["tls"]],
        RoleRule: [data["deploy"]["agent"]], HaproxyRule: [data["haproxy"]], KeepRule: [data["keep"]],
        UpdaterRule: [data["updater"]],
    }  # fmt: skip
    for rule, examples in tables.items():
        assert {key for table in examples for key in table} == set(config_keys(rule))


def test_a_haproxy_section_needs_no_more_than_host_and_backend():
    assert config_of(haproxy={"host": "10.0.0.3", "backend": "b"}).haproxy == HaproxyRule(host="10.0.0.3", backend="b")
    haproxy = config_of(haproxy={"host": "h", "backend": "b", "servers": {"blue": "web1"}}).haproxy
    assert haproxy
    assert haproxy.servers == {"blue": "web1", "green": "green"}


@pytest.mark.parametrize(
    ("kind", "subject"),
    [
        ("http", "http://127.0.0.1:2000/health?x=1"),
        ("tcp", "[::1]:22"),
        ("valkey", "127.0.0.1:6379"),
        ("mariadb", "yq-data:3306"),
        ("systemd", "estelle@1.service"),
        ("disk", "/var"),
        ("certificate", "example.org:443"),
        ("command", ["sh", "-c", ""]),
    ],
)
def test_health_kinds(kind: str, subject: Any):
    (check,) = config_of(health=[{"name": "x", kind: subject, "timeout": 0.5}]).health
    assert check.kind == kind
    assert getattr(check, kind) == (tuple(subject) if isinstance(subject, list) else subject)
    assert check.timeout_s == 0.5
    assert kind in CHECK_KINDS


def test_every_final_state_can_be_notified():
    more = {"switched", "failover", "agent-offline", "certificate", "impostor", "pushed", "ambiguous"}
    assert {"succeeded", "failed", "cancelled", "timeout", "offline", "lost"} | more == set(NOTIFY_EVENTS)
    (rule,) = config_of(notify=[{"urlEnv": "HOOK", "format": "telegram", "chat": "42"}]).notify
    assert rule == NotifyRule(url_env="HOOK", format="telegram", chat="42", on=("failed", "lost", "switched"))


@pytest.mark.parametrize("before", [b"\xef\xbb\xbf", b"", b"\r\n"])
def test_a_byte_order_mark_and_line_ends_of_windows_do_not_matter(before: bytes):
    assert parse_config(before + SMALLEST.encode(), "f", "json") == parse_config(SMALLEST, "f", "json")
    if before != b"\r\n":
        windows = before + WHOLE.replace("\n", "\r\n").encode()
        assert parse_config(windows, "f", "toml") == parse_config("\ufeff" + WHOLE, "f", "toml")


# ---------------------------------------------------------------------------- JSON and TOML

VALUE = st.text(st.characters(codec="utf-8", exclude_characters="\0"))
TEXT = st.text(st.characters(codec="utf-8", exclude_categories=["C", "Z"]), min_size=1, max_size=8)
ADDRESS = st.ip_addresses().map(str)
NAME = st.sampled_from(["yq-blue", "사무실", "a.b", "X1"])
COMMAND = st.lists(TEXT, min_size=1, max_size=3)
SECONDS = st.integers(1, 604800) | st.floats(0.001, 604800)


def table(**settings: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    return st.fixed_dictionaries({}, optional=settings)


HOST = table(
    role=st.sampled_from(["master", "agent"]), repo=TEXT, command=COMMAND, environmentFile=TEXT,
    env=st.dictionaries(st.sampled_from(["A", "B_C", "안녕"]), VALUE),
    color=st.sampled_from(["blue", "green"]), deploy=st.booleans(),
)  # fmt: skip
VALID = st.fixed_dictionaries(
    {"masterUrl": st.sampled_from(["ws://1.2.3.4", "wss://a.example/x"]), "whitelist": st.lists(ADDRESS, max_size=3)},
    optional={
        "trustedProxies": st.lists(ADDRESS, max_size=2),
        "commanders": st.lists(ADDRESS, max_size=2),
        "tokenFile": TEXT,
        "deploy": table(
            command=COMMAND, restart=st.lists(st.sampled_from(["a.service", "b"])), timeout=SECONDS, version=TEXT
        ),
        "hosts": st.dictionaries(NAME | ADDRESS, HOST, max_size=3),
        "health": st.lists(st.fixed_dictionaries({"name": TEXT, "disk": TEXT}, optional={"hosts": st.lists(NAME)})),
        "keep": table(runs=st.integers(1, 10**6), days=st.integers(1, 10**6)),
    },
)


@given(VALID)
def test_json_and_toml_mean_the_same(data: dict[str, Any]):
    try:
        expected: Config | list[str] = parse_config(render_config(data, "json"), "f", "json")
    except ConfigError as error:
        expected = list(error.problems)
        assert any("is that of" in problem for problem in expected)  # "::ffff:1.2.3.4" beside "1.2.3.4", say
    try:
        found: Config | list[str] = parse_config(render_config(data, "toml"), "f", "toml")
    except ConfigError as error:
        found = list(error.problems)
    assert found == expected


@given(VALID)
def test_rendering_keeps_everything(data: dict[str, Any]):
    for form in ("json", "toml"):
        text = render_config(data, form)
        assert text.endswith("\n") or not data
        assert parse_data(text, "f", form) == data
        assert convert_data(parse_data(text, "f", form)) == data


def test_rendered_text_is_for_people():
    data = {**SMALL, "hosts": {"121.0.0.7": {"name": "사무실"}}}
    assert render_config(data, "json").splitlines()[-5:] == [
        '    "121.0.0.7": {', '      "name": "사무실"', "    }", "  }", "}",
    ]  # fmt: skip
    assert render_config(data, "toml").endswith('[hosts."121.0.0.7"]\nname = "사무실"\n')


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4) | st.just("\ud800"),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=5,
)
KEYS = st.sampled_from(
    [*(key for key in tomllib.loads(WHOLE)), "command", "host", "backend", "name", "env", "timeout", "x", "1.2.3.4"]
)


@given(st.dictionaries(KEYS, JSON | st.dictionaries(KEYS, JSON | st.dictionaries(KEYS, JSON, max_size=3), max_size=4)))
@example({"health": [{}], "notify": [{}], "tls": {"key": "x"}, "haproxy": {"servers": {"blue": 1}}})
def test_whatever_the_file_holds_is_a_configuration_or_its_problems(data: dict[str, Any]):
    text = json.dumps({**SMALL, **data})
    try:
        parse_config(text, "f", "json")
    except ConfigError as error:
        assert error.problems
        "\n".join(error.problems).encode()  # can be printed
    try:
        convert_data(data)
        parse_config(tomli_w.dumps({**SMALL, **data}), "f", "toml")
    except (ConfigError, TypeError, ValueError):
        pass  # TOML has no null, and no text that is not Unicode


@given(st.binary(max_size=30) | st.text(max_size=30), st.sampled_from(["json", "toml"]))
@example(b"[" * 100_000, "json")
@example(b"x=" + b"[" * 100_000, "toml")
@example(b'{"a":' * 800 + b"1" + b"}" * 800, "json")
@example(b"1" * 5000, "json")
def test_no_bytes_break_the_parser(text: bytes | str, form: str):
    with pytest.raises(ConfigError) as caught:
        parse_config(text, "f", form)
    assert caught.value.problems[0].startswith("f: ")


# ---------------------------------------------------------------------------- problems


def test_all_problems_at_once_with_file_key_and_value():
    data = {
        "masterUrl": "http://5.223.72.58",
        "whitelist": ["5.223.72.58", "121.x.x.x", 7],
        "whitelst": ["1.2.3.4"],
        "deploy": {"timeout": True, "command": "pnpm deploy:release", "remote": "--upload-pack=x"},
        "hosts": {"121.0.0.0/24": {"color": "red", "env": {"PORT": 80}}, "1.2.3.4": {"deploy": "no"}},
    }
    assert problems_of(data, "config/updater.json") == [
        'masterUrl: "http://5.223.72.58" is no ws:// or wss:// URL; '
        "write ws://5.223.72.58:9900 or wss://master.example:9900",
        'whitelist[1]: "121.x.x.x" is no address; ' + WRITE,
        "whitelist[2]: 7 is no text of one line",
        'whitelst: unknown key, value ["1.2.3.4"]; did you mean whitelist?',
        "deploy.timeout: true is no number of seconds, up to a week",
        'deploy.command: "pnpm deploy:release" is no list with entries; write ["pnpm", "deploy:release"]',
        'deploy.remote: "--upload-pack=x" is no git remote\'s name',
        'hosts."121.0.0.0/24": "121.0.0.0/24" is no host; write ADDRESS/HOSTNAME, HOSTNAME or ADDRESS',
        'hosts."121.0.0.0/24".color: "red" is no choice here; write blue or green',
        'hosts."121.0.0.0/24".env.PORT: its value is int, no text; write it in quotes',
        'hosts."1.2.3.4".deploy: "no" is no true or false',
    ]


@pytest.mark.parametrize(
    ("more", "problem"),
    [
        ({"masterUrl": "ws://121.x.x.x:9900"}, "masterUrl: '121.x.x.x' is no address; " + WRITE),
        ({"masterUrl": 5}, "masterUrl: 5 is no text of one line"),
        ({"whitelist": "1.2.3.4"}, 'whitelist: "1.2.3.4" is no list; write ["1.2.3.4"]'),
        ({"whitelist": None}, 'whitelist: null is no list; write ["5.223.72.58", "121.0.0.0/24"]'),
        (
            {"whitelist": ["10.0.0.5/24"]},
            'whitelist[0]: "10.0.0.5/24" has host bits set; write 10.0.0.0/24 for the network or 10.0.0.5 for the host',
        ),
        ({"whitelist": ["fe80::1\n"]}, 'whitelist[0]: "fe80::1\\n" is no text of one line'),
        ({"serverNames": ["a b"]}, 'serverNames[0]: "a b" is no address; ' + WRITE),
        ({"tokenFile": ""}, 'tokenFile: "" is no text of one line'),
        ({"deploy": []}, "deploy: [] is no table"),
        (
            {"deploy": {"command": [["true"]] * 9000}},
            "deploy.command: a list of 9000; 100 at most, or a script that does them",
        ),
        (
            {"deploy": {"restart": ["x.service"] * 101}},
            "deploy.restart: a list of 101; 100 at most, or a script that does them",
        ),
        ({"deploy": {"command": []}}, 'deploy.command: [] is no list with entries; write ["pnpm", "deploy:release"]'),
        ({"deploy": {"command": ["a", 1]}}, "deploy.command[1]: 1 is no text"),
        ({"deploy": {"command": ["a\0"]}}, 'deploy.command[0]: "a\\u0000" is no text'),
        ({"deploy": {"command": ["\ud800"]}}, 'deploy.command[0]: "\\ud800" is no text'),
        (
            {"deploy": {"restart": ["-f"]}},
            'deploy.restart[0]: "-f" is no service; write web.service, user:web.service or pm2:web',
        ),
        (
            {"deploy": {"restart": ["pm2:-f"]}},
            'deploy.restart[0]: "pm2:-f" is no service; write web.service, user:web.service or pm2:web',
        ),
        (
            {"health": [{"name": "x", "tcp": "a:1", "passwordEnv": "X"}]},
            'health[0].passwordEnv: "X" belongs to a valkey or mariadb check',
        ),
        (
            {"haproxy": {"host": "h", "backend": "b", "config": []}},
            'haproxy.config: [] is no list with entries; write ["/etc/haproxy/haproxy.cfg", "/etc/haproxy/conf.d"]',
        ),
        ({"deploy": {"timeout": 0}}, "deploy.timeout: 0 is no number of seconds, up to a week"),
        ({"deploy": {"timeout": 1_800_000}}, "deploy.timeout: 1800000 is no number of seconds, up to a week"),
        ({"deploy": {"timeout": float("nan")}}, "deploy.timeout: NaN is no number of seconds, up to a week"),
        ({"deploy": {"timout": 5}}, "deploy.timout: unknown key, value 5; did you mean timeout?"),
        ({"hosts": {"1.2.3.4": {"name": "all"}}}, 'hosts."1.2.3.4".name: "all" is no name for a host'),
        ({"hosts": {"a": {"role": "auto"}}}, 'hosts.a.role: "auto" is no choice here; write master or agent'),
        ({"hosts": {"a b": {}}}, "hosts.\"a b\": \"a b\" is no address; " + WRITE),
        (
            {"hosts": {"a": {"env": {"A": "x" * (128 << 10)}}}},
            "hosts.a.env: A has 131074 bytes; 131071 at most, or put it into a file",
        ),
        (
            {"hosts": {"a": {"env": {f"A{number}": "x" * 65_000 for number in range(9)}}}},
            "hosts.a.env: variables of 585027 bytes; 524288 at most, or put them into a file",
        ),
        ({"hosts": {"a": {"env": {"A=B": "x"}}}}, 'hosts.a.env."A=B": is no name of an environment variable'),
        ({"haproxy": {"host": "h"}}, "haproxy.backend: missing, and it has no default"),
        (
            {"haproxy": {"host": "h", "backend": "b", "servers": {"blue": "green"}}},
            'haproxy.servers: {"blue": "green"} gives both colours the same server',
        ),
        (
            {"haproxy": {"host": "h", "backend": "b", "servers": {"red": "x"}}},
            'haproxy.servers.red: unknown key, value "x"; known are blue, green',
        ),
        (
            {"haproxy": {"host": "h", "backend": "b", "probe": "http://u:p@h/"}},
            'haproxy.probe: "http://u:p@h/" is no http:// or https:// URL without a user',
        ),
        ({"health": {}}, "health: {} is no list; write [[health]]"),
        ({"health": [{"name": "x"}]}, f"health[0]: nothing given; write exactly one of {', '.join(CHECK_KINDS)}"),
        (
            {"health": [{"name": "x", "tcp": "a:1", "disk": "/"}]},
            f"health[0]: tcp and disk given; write exactly one of {', '.join(CHECK_KINDS)}",
        ),
        ({"health": [{"name": "x", "tcp": "a"}]}, 'health[0].tcp: "a" is no HOST:PORT'),
        ({"health": [{"disk": "/"}]}, "health[0].name: missing, and it has no default"),
        ({"health": [{"name": "x", "disk": "/", "status": 200}]}, "health[0].status: 200 belongs to an http check"),
        ({"health": [{"name": "x", "http": "http://a", "status": 99}]}, "health[0].status: 99 is no HTTP status"),
        ({"tls": {"cert": "x"}}, 'tls: {"cert": "x"} lacks cert or key; a master needs both'),
        ({"keep": {"runs": 0}}, "keep.runs: 0 is no whole number above 0"),
        ({"keep": {"runs": 1.5}}, "keep.runs: 1.5 is no whole number above 0"),
        ({"keep": {"days": True}}, "keep.days: true is no whole number above 0"),
        (
            {"notify": [{"urlEnv": "A", "url": "http://a"}]},
            "notify[0]: url and urlEnv given; write exactly one of url, urlEnv, urlFile",
        ),
        (
            {"notify": [{"urlEnv": "A", "chat": "1"}]},
            'notify[0].chat: "1": telegram needs a chat, and nothing else takes one',
        ),
        (
            {"notify": [{"urlEnv": "A", "format": "telegram"}]},
            "notify[0].chat: null: telegram needs a chat, and nothing else takes one",
        ),
        (
            {"notify": [{"urlEnv": "A", "format": "irc"}]},
            'notify[0].format: "irc" is no choice here; write slack or discord or telegram or ntfy or json',
        ),
        (
            {"role": "agent"},
            'role: unknown key, value "agent"; never for the whole fleet; '
            'write it into [hosts."ADDRESS"] or pass --role',
        ),
        (
            {"machines": {}},
            "machines: unknown key, value {}; this is the older form; `config convert` makes the new one of it",
        ),
        ({"zzzzzzzz": "x" * 99}, None),
    ],
)  # fmt: skip
def test_problem(more: dict[str, Any], problem: str | None):
    (found,) = problems_of({**SMALL, **more})
    if problem is None:
        assert found.startswith("zzzzzzzz: unknown key, value ")
        assert "x" * 60 + "xx" in found
        assert "x" * 80 not in found
    else:
        assert found == problem


def test_what_has_no_default_must_be_there():
    assert problems_of({}) == [
        "masterUrl: missing, and it has no default",
        "whitelist: missing, and it has no default",
    ]


def test_a_committed_secret_is_refused_and_not_repeated():
    found = problems_of({**SMALL, "token": "s3cret", "masterUrl": "ws://me:s3cret@h", "apiKey": "s3cret"})
    assert len(found) == 3
    assert "must not be committed" in found[1]
    assert "tokenFile" in found[1]
    assert "s3cret" not in "".join(found)


@pytest.mark.parametrize(
    ("hosts", "problem"),
    [
        ({"1.2.3.4": {}, "::ffff:1.2.3.4": {}}, 'hosts."::ffff:1.2.3.4": its host is that of hosts."1.2.3.4" already'),
        ({"Office": {}, "office": {}}, "hosts.office: its host is that of hosts.Office already"),
        (
            {"1.2.3.4": {"name": "x"}, "1.2.3.5": {"name": "X"}},
            'hosts."1.2.3.5": its name is that of hosts."1.2.3.4" already',
        ),
    ],
)
def test_no_two_sections_for_one_host_or_name(hosts: dict[str, Any], problem: str):
    assert problems_of({**SMALL, "hosts": hosts}) == [problem]


@pytest.mark.parametrize(
    ("text", "form", "problem"),
    [
        ('{"masterUrl": "x",\n "whitelist" 5}', "json", "line 2, column 14: Expecting ':' delimiter"),
        ("", "json", "line 1, column 1: Expecting value"),
        ('{"a": 1, // the master\n "b": 2}', "json", "line 1, column 10: " + NO_COMMENT),
        ("// what\n{}", "json", "line 1, column 1: " + NO_COMMENT),
        ('{"a": /* x */ 1}', "json", "line 1, column 7: " + NO_COMMENT),
        ('{"a": [1, 2,],\n}', "json", "JSON has no comma before } or ]; take it out"),
        ('{"a": 1,\n}', "json", "JSON has no comma before } or ]; take it out"),
        ("[]", "json", "[] is no table"),
        ('{"whitelist": [], "whitelist": []}', "json", '"whitelist" stands twice in one table; keep one'),
        ('{"deploy": {"a": 1, "a": 2}}', "json", '"a" stands twice in one table; keep one'),
        ('masterUrl = "x"\nwhitelist = 5 5', "toml", "(at line 2, column 15)"),
        ("a = 1\na = 2\n", "toml", "(at line 2, column"),
        (b'{"a": "\xc7\xd1"}', "json", "byte 7 is not UTF-8; save the file as UTF-8"),
        (b"\xff\xfe{\0}\0", "json", "byte 0 is not UTF-8; save the file as UTF-8"),
    ],
)
def test_what_is_no_json_or_toml_says_where(text: bytes | str, form: str, problem: str):
    (found,) = problems_of(text, form=form)
    assert found.endswith(problem) if form == "json" else problem in found


# ---------------------------------------------------------------------------- warnings


@pytest.mark.parametrize(
    ("more", "warnings"),
    [
        ({"whitelist": []}, ["whitelist: it is empty, so no agent and no commander can connect"]),
        ({"whitelist": ["0.0.0.0/0", "::/0"]}, ["whitelist: 0.0.0.0/0 is everybody", "whitelist: ::/0 is everybody"]),
        ({"trustedProxies": ["::/0"]}, ["trustedProxies: ::/0 is everybody"]),
        ({"commanders": ["5.223.72.58", "9.9.9.0/24"]}, [
            "commanders: 9.9.9.0/24 is not on the whitelist, so it can't connect"
        ]),
        (
            {"whitelist": ["100.0.0.0/8", "100.64.0.0/10", "121.0.0.0/8"]},  # lesson 24
            ["whitelist: 100.0.0.0/8 holds public addresses; Tailscale's range is 100.64.0.0/10"],
        ),
        (
            {"health": [{"name": "web", "disk": "/", "hosts": ["yq-blue", "Office", "1.2.3.4", "121.0.0.9"]}],
             "whitelist": ["121.0.0.0/24"], "hosts": {"1.2.3.4": {"name": "office"}}},
            ['health "web": "yq-blue" matches no host'],
        ),
        (
            {"haproxy": {"host": "yq-data", "backend": "b"}, "hosts": {"yq-data": {}, "a": {"color": "blue"}}},
            ["haproxy: no host has color green"],
        ),
        (
            {"haproxy": {"host": "yq", "backend": "b"}, "hosts": {"b": {"color": "green"}, "a": {"color": "blue"}}},
            ['haproxy: "yq" matches no host'],
        ),
        ({"tokenFile": "config/token"}, ['tokenFile: "config/token" lies in the repository, and a secret must not']),
        ({"tokenFile": "C:\\token"}, []),
        (
            {"hosts": {"a": {"env": {"API_TOKEN": "x", "NODE_ENV": "y"}}}},
            ["hosts.a.env.API_TOKEN: it looks like a secret; move it to an environmentFile outside git"],
        ),
        (
            {"notify": [{"url": "https://ntfy.example/x"}, {"url": "https://hooks.slack.com/services/x"}]},
            ["notify[1].url: this URL is itself a secret; use urlFile or urlEnv"],
        ),
        ({"updater": {"sha256": "7f" * 32}}, []),
        ({"updater": {"sha256": "..."}}, ['updater.sha256: "..." is not 64 hex digits, so no file matches it']),
    ],
)  # fmt: skip
def test_warnings(more: dict[str, Any], warnings: list[str]):
    assert config_warnings(config_of(**more)) == warnings


def test_hosts_that_the_fleet_knows_are_no_warning():
    config = config_of(health=[{"name": "web", "disk": "/", "hosts": ["yq-blue"]}])
    assert config_warnings(config)
    assert config_warnings(config, ["YQ-Blue"]) == []


# ---------------------------------------------------------------------------- one host's settings

SECTIONS = {
    "10.0.0.2": {"repo": "address", "command": ["make"], "name": "edge"},
    "yq-blue": {"repo": "hostname"},
    "10.0.0.2/YQ-Blue": {"repo": "both", "role": "agent", "color": "blue", "env": {"A": "1"}},
    "::ffff:10.0.0.9": {"deploy": False},
    "laptop": {},
}


@pytest.mark.parametrize(
    ("address", "hostname", "key", "name"),
    [
        ("10.0.0.2", "yq-blue", "10.0.0.2/YQ-Blue", "yq-blue"),
        ("::ffff:10.0.0.2", "YQ-BLUE", "10.0.0.2/YQ-Blue", "YQ-BLUE"),
        ("10.0.0.3", "yq-blue", "yq-blue", "yq-blue"),
        (None, "yq-blue", "yq-blue", "yq-blue"),
        ("10.0.0.2", "laptop", "laptop", "laptop"),
        ("10.0.0.2", "other", "10.0.0.2", "edge"),
        ("10.0.0.9", "other", "::ffff:10.0.0.9", "other"),
        ("10.0.0.3", "yq-blue.example", None, "yq-blue.example"),
        ("10.0.0.3", "edge", None, "edge"),  # the name that a section gives finds no section
        (None, "edge", None, "edge"),
    ],
)
def test_the_section_of_a_host(address: str | None, hostname: str, key: str | None, name: str):
    found = host_rule(config_of(hosts=SECTIONS), address, hostname)
    assert (found.key or None, found.name) == (key, name)


def test_a_hosts_settings_lie_over_deploy():
    config = config_of(
        hosts=SECTIONS, deploy={"command": ["pnpm", "x"], "timeout": 60, "restart": ["a"], "remote": "up"}
    )
    both = host_rule(config, "10.0.0.2", "yq-blue")
    assert (both.repo, both.role, both.color, both.env, both.deploy) == ("both", Role.AGENT, "blue", {"A": "1"}, True)
    assert (both.command, both.timeout_s, both.restart, both.remote) == (("pnpm", "x"), 60, ("a",), "up")
    assert both.version == "config/version.json"
    assert host_rule(config, "10.0.0.2", "x").command == ("make",)
    assert host_rule(config, "10.0.0.9", "x").deploy is False
    none = host_rule(config, None, "x")
    assert (none.role, none.repo, none.environment_file, none.env, none.color) == (None, None, None, {}, None)


@pytest.mark.parametrize(
    ("header", "secrets", "plain"),
    [
        ('"Authorization: Bearer abc123 # c"', ["abc123"], ["Bearer", "Authorization"]),
        ("AUTHORIZATION: basic Zm9yZ2U6dG9r  # a comment", ["Zm9yZ2U6dG9r"], ["basic", "comment"]),
        ('"X-Token: ab#cdefghijkl"', ["ab#cdefghijkl"], ["X-Token"]),
        ('"PRIVATE-TOKEN: abcdefg"', ["abcdefg"], ["PRIVATE"]),
        ('"X-Key: \\"quoted-secret\\""', ["quoted-secret"], ["X-Key"]),
        ('"Cookie: sid=SECRET1; other=SECRET2"', ["sid=SECRET1;", "other=SECRET2"], ["Cookie"]),
        ("", [], []),
    ],
)
def test_what_a_header_of_git_s_settings_holds(
    tmp_path: Path, header: str, secrets: list[str], plain: list[str]
) -> None:
    settings = tmp_path / ".git/config"
    settings.parent.mkdir()
    settings.write_text(f"[http]\n\textraheader = {header}\n\tpostBuffer = 1\n")
    told = est.clone_secrets(tmp_path)["header_token"]
    assert told.split() == secrets
    assert not [word for word in plain if word in told]


@pytest.mark.parametrize("repo", ["~/app", "{home}/app", "../app"])
def test_secrets_of_a_clone_are_known_wherever_it_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, repo: str
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    settings = tmp_path / "app/.git/config"
    settings.parent.mkdir(parents=True)
    settings.write_text('[remote "origin"]\n\turl = https://me:hunter2secret@forge.example/x\n')
    config = config_of(hosts={"10.0.0.2": {"repo": repo.format(home=tmp_path)}})
    rule, tree = host_rule(config, "10.0.0.2", "x"), tmp_path / "tree"
    tree.mkdir()
    assert "hunter2secret" in str(est.host_secrets(config, tree, rule, {}))


def test_what_differs_by_role_lies_between():
    config = config_of(
        deploy={
            "command": ["make"],
            "restart": ["web"],
            "master": {"restart": ["pm2:master.cjs"], "env": {"A": "role", "B": "role"}, "environmentFile": "m"},
            "agent": {"command": [["make", "x"], ["make", "y"]], "restart": [], "timeout": 9},
        },
        hosts={"10.0.0.2": {"restart": ["own"], "env": {"B": "own"}}},
    )
    master, agent = (host_rule(config, "10.0.0.9", "x", role) for role in Role)
    assert (master.command, master.restart, master.environment_file) == (("make",), ("pm2:master.cjs",), "m")
    assert (agent.command, agent.restart, agent.timeout_s) == ((("make", "x"), ("make", "y")), (), 9)
    assert master.env == {"A": "role", "B": "role"} and agent.env == {}
    own = host_rule(config, "10.0.0.2", "x", Role.MASTER)
    assert (own.restart, own.env, own.environment_file) == (("own",), {"A": "role", "B": "own"}, "m")
    assert host_rule(config, "10.0.0.9", "x").restart == ("web",), "a role that nobody knows has no section"
    assert config.all_services == ("web", "pm2:master.cjs", "own")
    problems = problems_of({**SMALL, "deploy": {"agent": {"role": "agent", "restart": ["a b"]}}})
    assert [text.split(",")[0] for text in problems][:1] == ["deploy.agent.role: unknown key"]
    assert problems[1].startswith("deploy.agent.restart[0]: ")
    warned = config_warnings(config_of(deploy={"master": {"env": {"DB_PASSWORD": "hunter2-hunter2"}}}))
    assert warned == [
        "deploy.master.env.DB_PASSWORD: it looks like a secret; move it to an environmentFile outside git"
    ]


def test_a_name_belongs_to_the_address_that_the_configuration_gives_it():
    config = config_of(hosts=SECTIONS | {"laptop": {"name": "mobile"}, "10.0.0.7/Home": {}})
    assert owners_of_name(config, "Edge") == {"10.0.0.2"}
    assert owners_of_name(config, "yq-blue") == set()  # a section goes by this name alone
    assert owners_of_name(config, "mobile") == set()  # it may be anywhere
    assert owners_of_name(config, "HOME") == {"10.0.0.7"}


# ---------------------------------------------------------------------------- the older form


def test_the_older_form_becomes_the_new_one():
    old = {
        "masterUrl": "ws://5.223.72.58:9900",
        "machines": {"5.223.72.58": {"environmentFile": "environments.cloud.json"}, "121.0.0.7": {}},
    }
    new = convert_data(old)
    assert new == {
        "masterUrl": "ws://5.223.72.58:9900",
        "whitelist": ["5.223.72.58", "121.0.0.7"],
        "hosts": {"5.223.72.58": {"environmentFile": "config/environments.cloud.json"}},
    }
    assert convert_data(new) == new
    config = parse_config(render_config(new, "toml"), "f", "toml")
    assert config.whitelist == ("5.223.72.58", "121.0.0.7")
    assert host_rule(config, "5.223.72.58", "x").environment_file == "config/environments.cloud.json"


def test_conversion_loses_nothing_of_a_file_between_both_forms():
    mixed = {**SMALL, "machines": {"5.223.72.58": {}, "1.2.3.4": {"repo": "/a"}}, "hosts": {"x": {"color": "blue"}}}
    assert convert_data(mixed) == {
        **SMALL,
        "whitelist": ["5.223.72.58", "1.2.3.4"],
        "hosts": {"1.2.3.4": {"repo": "/a"}, "x": {"color": "blue"}},
    }
    assert convert_data({"machines": {"121.x.x.x": None}}) == {"whitelist": ["121.x.x.x"]}
    assert convert_data({"machines": 5}) == {"machines": 5}  # parse_config says what is wrong with it


# ---------------------------------------------------------------------------- environment files and secrets


@pytest.mark.parametrize(
    ("text", "variables"),
    [
        ('{"A": "1", "B": ""}', {"A": "1", "B": ""}),
        ("\ufeff\n {}", {}),
        ("", {}),
        ("# comment\n\nA=1\r\nexport B = two words  \nC=\n", {"A": "1", "B": "two words", "C": ""}),
        ("A=1 # comment\nB=a#b\nC= # comment\nD=#x", {"A": "1", "B": "a#b", "C": "", "D": "#x"}),
        ('A="x # y" # z\nB=\'$x \\n\'\nC="a\\nb\\"c\\\\"', {"A": "x # y", "B": "$x \\n", "C": 'a\nb"c\\'}),
        ("A=it's\nB=a=b\nC='a' \nA=2", {"A": "2", "B": "a=b", "C": "a"}),
        ("A=C:\\new\\dir", {"A": "C:\\new\\dir"}),
        ("A=\u00a0x\u2028y\x0cz", {"A": "x\u2028y\x0cz"}),
        ("비밀=값", {"비밀": "값"}),
        ("export=1\nexport export=2", {"export": "2"}),
    ],
)
def test_environment_file(text: str, variables: dict[str, str]):
    assert parse_environment_file(text, "f") == variables
    assert parse_environment_file(text.encode(), "f") == variables


@pytest.mark.parametrize(
    ("text", "problems"),
    [
        ('{"A": 5, "B": "s3cret", "C": {"x": "s3cret"}}', ["A: its value is int, ", "C: its value is dict, "]),
        ('{"A": true, "B": null}', ["A: its value is bool, ", "B: its value is NoneType, "]),
        ('{"A=s": "s3cret"}', ['"A=s": is no name']),
        ('{"A": "s3cret" "B"}', ["line 1, column 16: "]),
        ("A=1\ns3cret\nB=\"s3cret\n='s3cret'", ["line 2: ", "line 3: ", "line 4: "]),
        ("A='s3cret'x", ["line 1: is no KEY=VALUE"]),
        ("A=s3cret\0", ["line 1: "]),
        (b"A=s3cret\xff", ["byte 8 is not UTF-8"]),
    ],
)
def test_wrong_environment_file_names_the_place_and_no_value(text: bytes | str, problems: list[str]):
    with pytest.raises(ConfigError) as caught:
        parse_environment_file(text, "f")
    for found, expected in zip(caught.value.problems, problems, strict=True):
        assert found.startswith(f"f: {expected}")
    assert "s3cret" not in str(caught.value.problems) + caught.value.what + caught.value.hint


@given(st.dictionaries(st.from_regex(r"[A-Z_]{1,5}", fullmatch=True), VALUE))
def test_an_environment_survives_both_forms(variables: dict[str, str]):
    assert parse_environment_file(json.dumps(variables), "f") == variables
    plain = {name: re.sub(r"[\r\n'\0]", "", value) for name, value in variables.items()}
    assert parse_environment_file("\n".join(f"{name}='{value}'" for name, value in plain.items()), "f") == plain


@pytest.mark.parametrize(
    "name",
    [
        "GITHUB_TOKEN", "clientSecret", "DB_PASSWORD", "MYSQL_PASSWD", "API_KEY", "apiKey", "SSH_KEYS",
        "SENTRY_DSN", "DB_PWD", "DB_PASS", "PASSPHRASE", "KEY_2", "SLACK_WEBHOOK", "PRIVATE_PEM", "CREDENTIALS",
        "KIS_PW", "AUTH", "BASIC_AUTH", "JWT", "PAT", "GH_PAT", "OTP", "LOGIN_OTP", "PIN", "CARD_PIN", "SESSION",
        "MNEMONIC", "SEED", "SEED_PHRASE", "WALLET_SEED", "CONNECTION_STRING", "DB_CONNECTION_STRING", "DSN",
    ],
)  # fmt: skip
def test_a_secret_by_its_name(name: str):
    assert secret_values({name: "s3cret"}) == ("s3cret",)
    assert secret_values({name: "short"}) == ()
    assert secret_values({name: "비밀"}) == ("비밀",)  # bytes count


@pytest.mark.parametrize(
    "name",
    [
        "PATH",
        "PWD",
        "OLDPWD",
        "NODE_ENV",
        "KEYBOARD",
        "TOKEN_FILE",
        "SSH_KEY_PATH",
        "SECRETS_DIR",
        "GIT_AUTHOR_NAME",
        "AUTHOR",
        "COMPAT",
        "SPIN",
        "NEXT_STEP",
        "SESSION_TTL",
        "PATTERN",
        "SSH_AUTH_SOCK",
        "XDG_SESSION_TYPE",
        "PINGS",
        "LINSEED",
    ],
)
def test_no_secret_by_its_name(name: str):
    assert secret_values({name: "/home/estelle"}) == ()


def test_secrets_of_several_lines_and_in_urls_longest_first():
    found = secret_values(
        {"DATABASE_URL": "mysql://app:p%40ssw0rd@db:3306/x", "HOME": "http://db:3306/x@y", "X": "redis://:hunter22@h"},
        {"TLS_KEY": "-----BEGIN\nabcdefgh\n", "API_TOKEN": " abcdefgh "},
    )
    assert list(found) == sorted(found, key=len, reverse=True)
    assert set(found) == {
        "p%40ssw0rd", "p@ssw0rd", "hunter22", "-----BEGIN\nabcdefgh\n", "-----BEGIN\nabcdefgh", "-----BEGIN",
        "abcdefgh", " abcdefgh ",
    }  # fmt: skip


def test_secrets_of_urls() -> None:
    token = "ghp_0123456789abcdef"
    url = f"https://{token}@forge/x.git and http://h/?a=1&access_token=abcdef12&x=visible&apiKey=k1234567#top"
    assert set(secret_values({"ORIGIN": url})) == {token, "abcdef12", "k1234567"}
    said = {"text": f"can't read {url}", "rows": [f"https://u:{token}@forge", 5, None]}
    assert mask_words(said) == {
        "text": "can't read https://***@forge/x.git and http://h/?a=1&access_token=***&x=visible&apiKey=***#top",
        "rows": ["https://u:***@forge", 5, None],
    }
    assert mask_words("the value of it", ["value of"]) == "the *** it"


@given(st.dictionaries(st.text(max_size=8), st.text(max_size=12)))
def test_no_blank_or_short_secret(variables: dict[str, str]):
    for secret in secret_values(variables, {f"{name}_TOKEN": value for name, value in variables.items()}):
        assert secret.strip()
        assert len(secret.encode("utf-8", "surrogatepass")) >= 6


@given(st.text(min_size=6, max_size=150), st.binary(max_size=9), st.binary(max_size=9), st.integers(1, 80))
@example("a/b+c d" * 9 + "\n" + "ü" * 9, b"user:", b"", 7)
def test_a_secret_is_hidden_however_programs_write_it(secret: str, before: bytes, after: bytes, cut: int) -> None:
    """Of what stands beside it in base64, a letter at each side may stay."""
    secret = f"s{secret}s".replace("\0", "").encode("utf-8", "replace").decode()
    hidden = est.hidden_values({"API_TOKEN": secret})
    data = secret.encode()
    whole = base64.b64encode(before + data + after)
    wrapped = [
        base64.encodebytes(data),
        b"\n".join(whole[n : n + 64] for n in range(0, len(whole), 64))[: 64 * (not before)],
    ]
    for written in (
        json.dumps({"x": secret}).encode(), json.dumps([secret], ensure_ascii=False).encode(), whole,
        base64.urlsafe_b64encode(before + data + after), urllib.parse.quote(secret, safe="").encode(),
        f"http://h/?x={urllib.parse.quote(secret)}&y=1".encode(), *wrapped, data.hex().encode(),
        data.hex().upper().encode(), json.dumps([json.dumps([secret])]).encode(),
    ):  # fmt: skip
        masker = est.Masker(hidden)
        shown = masker.feed(written[:cut]) + masker.feed(written[cut:]) + masker.flush()
        kept = len(base64.b64encode(before)) + len(base64.b64encode(after)) + 24  # and what is no part of it
        assert b"***" in shown or not written, written
        assert len(shown.replace(b"***", b"")) <= kept + written.count(b"\n") * 8, (shown, written)
        assert data not in shown


def test_a_secret_within_another_is_hidden_as_base64_too() -> None:
    """Of a configuration that is a secret as a whole, each value may be written alone."""
    dumped = json.dumps({"user": "kim", "password": "s3cret-word"}, indent=1)
    hidden = est.hidden_values({"DB_PASSWORD": "s3cret-word", "APP_SECRET": dumped})
    masker = est.Masker(hidden)
    written = base64.b64encode(b"kim:s3cret-word")
    assert b"***" in masker.feed(written) + masker.flush()


def test_the_lines_of_a_key_cost_one_form() -> None:
    key = "-----BEGIN KEY-----\n" + "\n".join(f"{number:064x}" for number in range(25)) + "\n-----END KEY-----\n"
    hidden = est.hidden_values({"SSH_KEY": key})
    assert len(hidden) < 120
    masker = est.Masker(hidden)
    assert f"{7:064x}".encode() not in masker.feed(key.encode()) + masker.flush()


DOORS: dict[str, Any] = {
    "masterUrl": "ws://203.0.113.5:9900",
    "whitelist": ["203.0.113.5", "203.0.113.7"],
    "deploy": {"secrets": ["LOGIN"]},
    "haproxy": {"host": "yq-data", "backend": "b"},
    "freeze": [{"name": "market", "from": "09:00", "to": "15:30"}],
    "health": [{"name": "web", "http": "http://127.0.0.1/a"}],
}


@pytest.mark.parametrize(
    ("more", "told"),
    [
        ({"freeze": []}, "freeze market: no longer holds as it did"),
        ({"freeze": [{"name": "market", "from": "09:00", "to": "09:01"}]}, "freeze market: no longer holds as it did"),
        ({"haproxy": None}, "haproxy: nobody switches the traffic any more"),
        ({"haproxy": {"host": "203.0.113.7", "backend": "b"}}, "haproxy.host: 203.0.113.7"),
        ({"haproxy": {"host": "yq-data", "backend": "b", "config": "/etc/other"}}, "haproxy.config: /etc/other"),
        (
            {"haproxy": {"host": "yq-data", "backend": "b", "servers": {"blue": "x", "green": "y"}}},
            "haproxy.servers: blue=x green=y",
        ),
        ({"deploy": {}}, "secrets: no longer masks LOGIN"),
        ({"deploy": {"secrets": ["LOGIN"], "version": ".env"}}, "version: .env instead of config/version.json"),
        ({"deploy": {"secrets": ["LOGIN"], "submodules": False}}, "submodules: false instead of true"),
        (
            {"deploy": {"secrets": ["LOGIN"], "command": [["pnpm", "build"], ["node", "x.js"]]}},
            "command: pnpm build; node x.js instead of pnpm deploy:release",
        ),
        ({"hosts": {"203.0.113.7": {"color": "blue"}}}, "color: blue instead of nothing"),
        ({"hosts": {"203.0.113.7": {"deploy": False}}}, "deploy: false instead of true"),
        ({"hosts": {"203.0.113.7": {"role": "master"}}}, "role: master instead of nothing"),
        ({"deploy": {"secrets": ["LOGIN"], "settle": 9}}, "settle: 9 instead of 3"),
        ({"keep": {"runs": 5, "jobMegabytes": 1}}, "keep: runs 5 instead of 500, jobMegabytes 1 instead of 256"),
        (
            {"project": "shop"},
            "project: shop instead of none; `setup` installs the service of that name, with a new state folder",
        ),
        (
            {"haproxy": {"host": "yq-data", "backend": "b", "probe": "http://127.0.0.1/z"}},
            "haproxy.probe: http://127.0.0.1/z",
        ),
        (
            {"health": [{"name": "web", "http": "http://127.0.0.1/b", "timeout": 2}]},
            "health web: http http://127.0.0.1/b instead of http://127.0.0.1/a, timeout 2 instead of 5",
        ),
        ({"health": []}, "health: no longer checks web"),
        (
            {"health": [{"name": "web", "http": "http://127.0.0.1/a"}, {"name": "db", "tcp": "127.0.0.1:1"}]},
            "health: checks db (tcp) too",
        ),
        ({}, ""),
    ],
)
def test_what_a_new_configuration_changes_in_guards_and_traffic(more: dict[str, Any], told: str) -> None:
    changed = {key: value for key, value in {**DOORS, **more}.items() if value is not None}
    old, new = (est.parse_config(json.dumps(data), "x", "json") for data in (DOORS, changed))
    doors = est.compare_doors(old, new)
    runs = est.compare_commands(old, new, "203.0.113.7", "h", est.Role.AGENT)
    rest = est.compare_rest(old, new)
    assert [change.text for change in (*doors, *runs, *rest)] == ([told] if told else [])


def test_thousands_of_changes_hide_none_of_another_kind() -> None:
    """A commit names as many receivers, windows and checks as have room in 1 MiB; what runs stands among them."""
    many = 3000
    flood = {
        "whitelist": ["203.0.113.7"] + [f"10.{number >> 8}.{number & 255}.1" for number in range(many)],
        "serverNames": [f"n{number}.example" for number in range(many)],
        "notify": [{"url": f"https://n{number}.example/", "format": "json"} for number in range(many)],
        "freeze": [{"name": f"f{number}", "days": "mon", "from": "01:00", "to": "02:00"} for number in range(many)],
        "watch": [{"branch": f"b{number}", "target": "all"} for number in range(many)],
        "health": [{"name": f"h{number}", "command": ["true", str(number)]} for number in range(many)],
        "hosts": {"203.0.113.7": {"env": {f"V{number}": "x" for number in range(many)} | {"W" * 5000: "x"}}},
        "deploy": {"command": ["evil", *["word"] * many]},
    }
    old, new = (est.parse_config(json.dumps(data), "x", "json") for data in (DOORS, {**DOORS, **flood}))
    for before, after in ((old, new), (new, old)):
        doors = est.compare_doors(before, after)
        runs = est.compare_commands(before, after, "203.0.113.7", "h", est.Role.AGENT)
        told = [change.text for change in (*doors, *runs, *est.compare_rest(before, after))]
        assert sum(map(len, told)) < 20_000 and len(told) < 80, [text[:80] for text in told]
        assert sum(text.endswith(" more") or "more:" in text or " more " in text for text in told) >= 5, told
        assert [text for text in told if text.startswith("command: ") and "evil" in text]
    assert any(text.startswith("command: ") and "characters more" in text for text in told)


def test_a_list_that_is_replaced_is_compared_at_once() -> None:
    some, others = ([f"10.{net}.{n >> 8}.{n & 255}" for n in range(0, 12000, 2)] for net in (1, 2))
    began = time.process_time()
    opened, closed = est.compare_networks([*some, "10.3.0.0/16"], [*others, "10.3.7.0/24", "10.0.0.0/9"])
    assert time.process_time() - began < 10, "in pairs it took minutes"
    assert opened == (("10.0.0.0/9",), True)
    assert not closed.networks, "all of it is within the new ones"
    opened, closed = est.compare_networks(some, others)
    assert len(opened.networks) == len(closed.networks) == 6000 and not opened.is_wide
    opened, _ = est.compare_networks(["2001:db8::/33", "2001:db8:8000::/33"], ["2001:db8::/32", "::ffff:10.0.0.1"])
    assert opened.networks == ("10.0.0.1",), "two halves are a whole"
    opened, closed = est.compare_networks(["127.0.0.1", "127.0.0.2", "127.0.0.3"], ["127.0.0.1", "127.0.0.2"])
    assert (opened.networks, closed.networks) == ((), ("127.0.0.3",)), "of two neighbours the one that goes"
