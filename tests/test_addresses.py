"""Who may connect, which role a host has, whom a TARGET means, and what may become a branch or a file name."""

from __future__ import annotations

import ipaddress
import random
import re
import shutil
import subprocess
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from typing import Any

import pytest
from hypothesis import example, given, settings, strategies as st

from tests.seam import (
    HostRef,
    Labels,
    MasterUrl,
    Role,
    RoleDecision,
    RoleFacts,
    TargetError,
    UsageError,
    Whitelist,
    allowed_host_header,
    allowed_origin,
    assign_labels,
    canonical_address,
    client_address,
    decide_role,
    file_label,
    is_plain_network,
    parse_host,
    parse_master_url,
    parse_network,
    replace,
    select_targets,
    valid_branch_problem,
    valid_host_name,
    valid_run_id,
)

settings.register_profile("patient", deadline=None, max_examples=60)  # a busy machine is no failure
settings.load_profile("patient")

NO_ADDRESS = [
    "121.x.x.x", "121.0.0", "121.0.0.007", "0x7f.0.0.1", "127.1", "1.2.3.4.5", "1.2.3.256", "1.2.3.4%eth0", "[1.2.3.4]",
    "١.2.3.4", "localhost", "yq-blue", "", " ", "fe80::1%", "::1::", "[::1", "[]", "1.2.3.4/32", "1.2.3.4\0", "unknown",
]  # fmt: skip
NAMES = st.text(st.characters(codec="utf-8"), max_size=20)


# ---------------------------------------------------------------------------- addresses


@pytest.mark.parametrize(
    ("written", "canonical"),
    [
        ("5.223.72.58", "5.223.72.58"),
        (" 127.0.0.1 ", "127.0.0.1"),
        ("::ffff:1.2.3.4", "1.2.3.4"),
        ("::FFFF:0102:0304", "1.2.3.4"),
        ("[::ffff:1.2.3.4]", "1.2.3.4"),
        ("2001:DB8:0:0:0:0:0:7", "2001:db8::7"),
        ("fe80::1%eth0", "fe80::1"),
        ("[fe80::1%3]", "fe80::1"),
        ("::1", "::1"),
    ],
)
def test_an_address_has_one_spelling(written: str, canonical: str):
    assert canonical_address(written) == canonical == canonical_address(canonical)


@pytest.mark.parametrize("text", NO_ADDRESS)
def test_what_is_no_address_says_what_to_write(text: str):
    with pytest.raises(UsageError) as caught:
        canonical_address(text)
    assert caught.value.what == f"{text!r} is no address"
    assert caught.value.hint == "write 121.0.0.7, or a network such as 121.0.0.0/24"


@given(st.ip_addresses())
def test_every_spelling_of_an_address_is_the_same(address: IPv4Address | IPv6Address):
    spellings = [str(address), address.exploded, address.exploded.upper()]
    if address.version == 4:
        spellings += [f"::ffff:{address}", f"[::ffff:{address}]", str(ipaddress.ip_address(f"::ffff:{address}"))]
    else:
        spellings += [f"[{address}]", f"{address}%eth0"]
    assert len({canonical_address(spelling) for spelling in spellings}) == 1


@given(NAMES)
def test_any_text_is_an_address_or_wrong_usage(text: str):
    for parse in (canonical_address, parse_network, parse_host, parse_master_url):
        try:
            parse(text)
        except UsageError as error:
            assert error.what
            assert error.hint


@pytest.mark.parametrize(
    ("text", "network"),
    [
        ("1.2.3.4", "1.2.3.4/32"),
        ("2001:db8::1", "2001:db8::1/128"),
        ("121.0.0.0/8", "121.0.0.0/8"),
        ("::ffff:1.2.3.0/120", "1.2.3.0/24"),
        ("::ffff:0:0/96", "0.0.0.0/0"),
        ("::ffff:1.2.3.4", "1.2.3.4/32"),
        ("[2001:db8::]/48", "2001:db8::/48"),
        ("0.0.0.0/0", "0.0.0.0/0"),
        ("::/0", "::/0"),
    ],
)
def test_network(text: str, network: str):
    assert parse_network(text) == ipaddress.ip_network(network)


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("10.0.0.5/24", "write 10.0.0.0/24 for the network or 10.0.0.5 for the host"),
        ("2001:db8::1/48", "write 2001:db8::/48 for the network or 2001:db8::1 for the host"),
        ("::ffff:1.2.3.4/120", "write 1.2.3.0/24 for the network or 1.2.3.4 for the host"),
        ("::ffff:1.2.3.4/95", "write 1.2.3.4 or a prefix of at most /32"),
        ("10.0.0.0/33", "write 10.0.0.0 or a prefix of at most /32"),
        ("10.0.0.0/0.0.0.255", "write 121.0.0.7, or a network such as 121.0.0.0/24"),
        ("10.0.0.0/255.0.0.0", "write 121.0.0.7, or a network such as 121.0.0.0/24"),
        ("10.0.0.0/08", "write 121.0.0.7, or a network such as 121.0.0.0/24"),
        ("10.0.0.0/", "write 121.0.0.7, or a network such as 121.0.0.0/24"),
        ("10.0.0.0/-1", "write 121.0.0.7, or a network such as 121.0.0.0/24"),
        ("121.x.x.x/8", "write 121.0.0.7, or a network such as 121.0.0.0/24"),
    ],
)
def test_wrong_network_names_the_right_one(text: str, hint: str):
    with pytest.raises(UsageError) as caught:
        parse_network(text)
    assert caught.value.hint == hint


@given(st.from_regex(r"[0-9]{1,3}(\.[0-9]{1,4}){3}(/[0-9]{1,2})?", fullmatch=True) | st.ip_addresses().map(str))
def test_what_looks_plain_is_what_the_library_says(text: str):
    if is_plain_network(text):
        network = ipaddress.ip_network(text)
        assert str(network).removesuffix("/32") == text.removesuffix("/32")


# ---------------------------------------------------------------------------- the whitelist


@st.composite
def networks(draw: st.DrawFn) -> IPv4Network | IPv6Network:
    address = draw(st.ip_addresses())
    address = getattr(address, "ipv4_mapped", None) or address
    length = draw(st.integers(0 if address.version == 4 else 96, address.max_prefixlen))
    return ipaddress.ip_network((str(address), length), strict=False)


@given(st.lists(networks(), max_size=8), st.data())
def test_the_whitelist_lets_in_what_lies_in_a_listed_network(listed: list[IPv4Network | IPv6Network], data: Any):
    inside = [st.sampled_from(listed).map(lambda network: network.network_address)] if listed else []
    address = data.draw(st.one_of(st.ip_addresses(), *inside))
    address = getattr(address, "ipv4_mapped", None) or address
    verdict = Whitelist(map(str, listed)).verdict(str(address))
    assert verdict.allowed == any(address in network for network in listed)
    assert str(address) in verdict.reason


def test_a_lone_ipv6_does_not_let_in_its_provider():
    """Lesson 21: a bare IPv6 got /32 and let in a whole provider."""
    whitelist = Whitelist(["2001:db8::7"])
    assert whitelist.verdict("2001:db8::7").allowed
    assert not whitelist.verdict("2001:db8::8").allowed


def test_an_empty_whitelist_lets_nobody_in_loopback_included():
    for address in ("127.0.0.1", "::1", "5.223.72.58"):
        assert Whitelist([]).verdict(address).allowed is False
    assert "the whitelist is empty" in Whitelist([]).verdict("127.0.0.1").reason


def test_a_verdict_names_the_address_seen_and_what_to_add():
    whitelist = Whitelist(["5.223.72.58", "121.0.0.0/24"])
    assert whitelist.verdict("::ffff:121.0.0.9").reason == "121.0.0.9 is allowed by 121.0.0.0/24"
    refused = whitelist.verdict("::ffff:121.0.1.9")
    assert not refused.allowed
    assert refused.reason == (
        '121.0.1.9 is not in the whitelist; add "121.0.1.9" to whitelist in the master\'s configuration'
    )


@pytest.mark.parametrize("address", ["", "@", "unknown", "121.x.x.x"])
def test_what_is_no_address_is_refused_even_by_a_whitelist_of_everybody(address: str):
    verdict = Whitelist(["0.0.0.0/0", "::/0"]).verdict(address)
    assert not verdict.allowed
    assert repr(address) in verdict.reason


def test_a_wrong_entry_makes_no_whitelist():
    with pytest.raises(UsageError):
        Whitelist(["5.223.72.58", "121.x.x.x"])


# ---------------------------------------------------------------------------- who is connecting

PROXIES = Whitelist(["127.0.0.1", "10.0.0.0/24", "::1"])


@pytest.mark.parametrize(
    ("peer", "forwarded", "client"),
    [
        ("6.6.6.6", [], "6.6.6.6"),
        ("::ffff:6.6.6.6", [], "6.6.6.6"),
        ("6.6.6.6", ["5.223.72.58"], "6.6.6.6"),  # not from a proxy: the header is a claim
        ("127.0.0.1", [], "127.0.0.1"),
        ("127.0.0.1", ["6.6.6.6"], "6.6.6.6"),
        ("127.0.0.1", ["5.223.72.58, 6.6.6.6"], "6.6.6.6"),  # the left one is what the client claims
        ("127.0.0.1", ["5.223.72.58", "6.6.6.6"], "6.6.6.6"),  # the same in two header lines
        ("127.0.0.1", ["5.223.72.58, 6.6.6.6, 10.0.0.3"], "6.6.6.6"),
        ("127.0.0.1", ["garbage, 6.6.6.6, 10.0.0.3"], "6.6.6.6"),
        ("127.0.0.1", ["10.0.0.4, 10.0.0.3"], "10.0.0.4"),
        ("::1", ["[2001:DB8::7]:4711"], "2001:db8::7"),
        ("::1", ["2001:db8::7"], "2001:db8::7"),
        ("::1", ["6.6.6.6:4711"], "6.6.6.6"),
        ("", ["127.0.0.1"], ""),
    ],
)
def test_client_address(peer: str, forwarded: list[str], client: str):
    assert client_address(peer, forwarded, PROXIES) == client


@pytest.mark.parametrize(
    "said", ["unknown", "garbage", "", "127.0.0.1,", "10.0.0.3, unknown", "1.2.3.4:99999", "é" * 99]
)
def test_an_unreadable_forwarded_hop_is_let_in_by_nobody(said: str):
    """The proxy's own address would let everybody in where the proxy's host is itself in the whitelist."""
    seen = client_address("127.0.0.1", [said], PROXIES)
    assert not Whitelist(["0.0.0.0/0", "::/0"]).verdict(seen).allowed
    assert "127.0.0.1" in seen


@given(st.lists(st.one_of(st.ip_addresses().map(str), NAMES), max_size=5), st.ip_addresses().map(str))
def test_no_header_makes_an_untrusted_peer_somebody_else(values: list[str], peer: str):
    assert client_address(peer, values, Whitelist([])) == canonical_address(peer)


@given(st.lists(st.one_of(st.ip_addresses().map(str), NAMES), max_size=4), st.ip_addresses(v=4).map(str))
def test_what_a_client_adds_before_its_address_changes_nothing(claims: list[str], client: str):
    if not PROXIES.verdict(client).allowed:
        assert client_address("127.0.0.1", [*claims, client], PROXIES) == client


OWN = ["5.223.72.58", "127.0.0.1", "::1", "Master.Example", "2001:DB8::7"]


@pytest.mark.parametrize(
    ("host", "allowed"),
    [
        ("5.223.72.58:9900", True),
        ("5.223.72.58", True),
        ("[::1]:9900", True),
        ("[2001:db8:0::7]", True),
        ("master.example:1", True),
        ("MASTER.example.", True),
        ("evil.example", False),
        ("master.example.evil.example", False),
        ("6.6.6.6:9900", False),
        ("5.223.72.58:", False),
        ("5.223.72.58:0", False),
        ("5.223.72.58:65536", False),
        ("5.223.72.58:99000000000", False),
        ("5.223.72.58:9900:1", False),
        ("5.223.72.58@evil.example", False),
        ("master.example/", False),
        (":9900", False),
        ("", False),
        (None, False),
    ],
)
def test_host_header(host: str | None, allowed: bool):
    assert allowed_host_header(host, OWN) is allowed
    assert allowed_host_header(host, []) is False
    assert allowed_host_header(host, [""]) is False


@pytest.mark.parametrize(
    ("origin", "allowed"),
    [
        (None, True),
        ("http://5.223.72.58:9900", True),
        ("https://master.example", True),
        ("HTTP://[::1]:9900", True),
        ("null", False),
        ("", False),
        ("http://", False),
        ("http://evil.example", False),
        ("http://6.6.6.6:9900", False),
        ("http://5.223.72.58/", False),
        ("http://5.223.72.58.evil.example", False),
        ("chrome-extension://master.example", False),
        ("file://", False),
        ("5.223.72.58", False),
        ("http://5.223.72.58 http://evil.example", False),
    ],
)
def test_origin(origin: str | None, allowed: bool):
    assert allowed_origin(origin, OWN) is allowed


@given(NAMES)
def test_no_odd_host_or_origin_passes(text: str):
    assert not allowed_host_header(text, ["5.223.72.58"])
    assert not allowed_origin(text, ["5.223.72.58"])


# ---------------------------------------------------------------------------- masterUrl


@pytest.mark.parametrize(
    ("text", "url", "rendered"),
    [
        ("ws://5.223.72.58:9900", MasterUrl("ws", "5.223.72.58", 9900, "/", False), "ws://5.223.72.58:9900/"),
        ("ws://5.223.72.58", MasterUrl("ws", "5.223.72.58", 9900, "/", False), "ws://5.223.72.58:9900/"),
        ("WSS://Master.Example./est", MasterUrl("wss", "master.example", 9900, "/est", True), "wss://master.example:9900/est"),
        ("wss://[2001:DB8::7]:443", MasterUrl("wss", "2001:db8::7", 443, "/", True), "wss://[2001:db8::7]:443/"),
        ("ws://[::ffff:1.2.3.4]", MasterUrl("ws", "1.2.3.4", 9900, "/", False), "ws://1.2.3.4:9900/"),
        ("ws://localhost:1", MasterUrl("ws", "localhost", 1, "/", False), "ws://localhost:1/"),
        ("ws://yq_data", MasterUrl("ws", "yq_data", 9900, "/", False), "ws://yq_data:9900/"),
    ],
)  # fmt: skip
def test_master_url(text: str, url: MasterUrl, rendered: str):
    assert parse_master_url(text) == url
    assert str(url) == rendered
    assert parse_master_url(rendered) == url


@pytest.mark.parametrize(
    "text",
    [
        "", "5.223.72.58:9900", "http://5.223.72.58", "ws:5.223.72.58", "ws://", "ws:///x", "ws://:9900",
        "ws://121.x.x.x:9900", "ws://127.1", "ws://1.2.3.4.5", "ws://5.223.72.58:", "ws://5.223.72.58:0",
        "ws://5.223.72.58:65536", "ws://5.223.72.58:9900/a b", "ws://2001:db8::7", "ws://0.0.0.0", "ws://[::]",
        "ws://[localhost]", "ws://a..b", "ws://-a.b", "ws://a b", "ws://5.223.72.58:9900/é", "ws://" + "a" * 64,
    ],
)  # fmt: skip
def test_wrong_master_url(text: str):
    with pytest.raises(UsageError) as caught:
        parse_master_url(text)
    assert caught.value.hint.startswith("write ")


@pytest.mark.parametrize(
    "text", ["ws://me:s3cret@1.2.3.4", "http://s3cret@1.2.3.4", "ws://1.2.3.4/?t=s3cret", "ws://h#s3cret"]
)
def test_a_secret_in_master_url_is_refused_and_not_repeated(text: str):
    with pytest.raises(UsageError) as caught:
        parse_master_url(text)
    assert "s3cret" not in caught.value.what + caught.value.hint


# ---------------------------------------------------------------------------- the role

MASTER, AGENT = Role.MASTER, Role.AGENT
HETZNER = RoleFacts(master_addresses=("5.223.72.58",))


@pytest.mark.parametrize(
    ("facts", "decision"),
    [
        (
            replace(HETZNER, local_source={"5.223.72.58": "5.223.72.58"}),
            RoleDecision(MASTER, "master: 5.223.72.58 is an address of this host"),
        ),
        (
            replace(HETZNER, local_source={"5.223.72.58": "172.17.0.1"}),  # lesson 20: docker0 is not the address
            RoleDecision(AGENT, "agent: 5.223.72.58 is not an address of this host"),
        ),
        (
            replace(HETZNER, local_source={"5.223.72.58": None}),
            RoleDecision(AGENT, "agent: 5.223.72.58 is not an address of this host"),
        ),
        (
            replace(HETZNER, public_address="5.223.72.58", public_source="metadata"),
            RoleDecision(MASTER, "master: cloud metadata knows this host as 5.223.72.58", provisional=True),
        ),
        (
            replace(HETZNER, public_address="5.223.72.58", public_source="echo"),
            RoleDecision(MASTER, "master: the outside world knows this host as 5.223.72.58", provisional=True),
        ),
        (
            replace(HETZNER, public_address="6.6.6.6", public_source="metadata"),
            RoleDecision(AGENT, "agent: 5.223.72.58 is not an address of this host"),
        ),
        (
            RoleFacts(public_address="5.223.72.58"),
            RoleDecision(AGENT, "agent: masterUrl's name has no address now, and unknown is never master"),
        ),
        (
            RoleFacts(bind="127.0.0.1"),
            RoleDecision(AGENT, "agent: masterUrl's name has no address now, and unknown is never master"),
        ),
        (
            RoleFacts(override=MASTER, override_source="ESTELLE_ROLE"),
            RoleDecision(MASTER, "master: ESTELLE_ROLE says so"),
        ),
        (
            replace(HETZNER, override=AGENT, local_source={"5.223.72.58": "5.223.72.58"}, bind="5.223.72.58"),
            RoleDecision(AGENT, "agent: --role says so"),
        ),
        (
            RoleFacts(master_addresses=("127.0.0.1",), bind="127.0.0.1", local_source={"127.0.0.1": "127.0.0.1"}),
            RoleDecision(MASTER, "master: --bind 127.0.0.1 is masterUrl's address (127.0.0.1)"),
        ),
        (
            RoleFacts(master_addresses=("127.0.0.1",), bind="127.0.0.2", local_source={"127.0.0.1": "127.0.0.1"}),
            RoleDecision(AGENT, "agent: --bind 127.0.0.2 is not masterUrl's address (127.0.0.1)"),
        ),
        (
            RoleFacts(master_addresses=("127.0.0.1",), local_source={"127.0.0.1": "127.0.0.1"}),
            RoleDecision(MASTER, "master: 127.0.0.1 is an address of this host"),
        ),
        (
            RoleFacts(master_addresses=("127.0.1.1",), local_source={"127.0.1.1": "127.0.1.1"}),
            RoleDecision(AGENT, "agent: 127.0.1.1 is on every host; give --bind or --role"),
        ),
        (
            RoleFacts(master_addresses=("0.0.0.0",), local_source={"0.0.0.0": "0.0.0.0"}),
            RoleDecision(AGENT, "agent: 0.0.0.0 is on every host; give --bind or --role"),
        ),
        (
            RoleFacts(master_addresses=("6.6.6.6", "2001:db8::7"), local_source={"2001:DB8::7": "2001:db8::7%2"}),
            RoleDecision(MASTER, "master: 2001:db8::7 is an address of this host"),
        ),
        (
            RoleFacts(master_addresses=("::ffff:1.2.3.4",), local_source={"::ffff:1.2.3.4": "1.2.3.4"}),
            RoleDecision(MASTER, "master: 1.2.3.4 is an address of this host"),
        ),
        (
            RoleFacts(master_addresses=("1.2.3.4", "5.6.7.8"), local_source={"1.2.3.4": "5.6.7.8"}),
            RoleDecision(AGENT, "agent: 1.2.3.4, 5.6.7.8 is not an address of this host"),
        ),
    ],
)
def test_role(facts: RoleFacts, decision: RoleDecision):
    assert decide_role(facts) == decision


ADDRESSES = st.sampled_from(["1.2.3.4", "5.6.7.8", "127.0.0.1", "127.0.0.2", "::1", "2001:db8::7"])


@given(
    st.builds(
        RoleFacts,
        bind=st.none() | ADDRESSES,
        master_addresses=st.lists(ADDRESSES, max_size=3).map(tuple),
        local_source=st.dictionaries(ADDRESSES, st.none() | ADDRESSES, max_size=4),
        public_address=st.none() | ADDRESSES,
        public_source=st.sampled_from([None, "metadata", "echo"]),
    )
)
def test_nobody_is_master_without_an_address_of_the_masters(facts: RoleFacts):
    decision = decide_role(facts)
    own = {facts.bind} if facts.bind else {facts.public_address, *facts.local_source.values()}
    if decision.role is MASTER:
        assert own & set(facts.master_addresses)
        proven = [one for one in facts.master_addresses if facts.local_source.get(one) == one != "127.0.0.2"]
        assert decision.provisional == (facts.bind is None and not proven)
    assert decision.reason.startswith(f"{decision.role}: ")


# ---------------------------------------------------------------------------- targets

MASTER_HOST = HostRef("5.223.72.58", "5.223.72.58", "hetzner", "a1", True)
OFFICE = HostRef("121.0.0.7", "121.0.0.7", "Office", "b2", False)
BLUE = HostRef("10.0.0.2/yq-blue", "10.0.0.2", "yq-blue", "c3", True, color="blue")
GREEN = HostRef("10.0.0.2/yq-green", "10.0.0.2", "yq-green", "d4", True, color="green")
DATA = HostRef("10.0.1.3", "10.0.1.3", "yq-data", "e5", True, deploys=False)
SIX = HostRef("2001:db8::7", "2001:db8::7", "six", "f6", True)
LIAR = HostRef("121.0.0.8", "121.0.0.8", "5.223.72.58", "97", True)
HOSTS = [MASTER_HOST, OFFICE, BLUE, GREEN, DATA, SIX, LIAR]


@pytest.mark.parametrize(
    ("target", "chosen"),
    [
        ("all", [MASTER_HOST, OFFICE, BLUE, GREEN, SIX, LIAR]),
        ("5.223.72.58", [MASTER_HOST]),  # and not the host that calls itself so
        ("::ffff:5.223.72.58", [MASTER_HOST]),
        ("office", [OFFICE]),
        ("10.0.0.2", [BLUE, GREEN]),
        ("10.0.0.2/yq-green", [GREEN]),
        ("10.0.0.2/YQ-GREEN", [GREEN]),
        ("121.0.0.7/office", [OFFICE]),
        ("10.0.0.0/16", [BLUE, GREEN]),  # the data node lies in it and takes no part
        ("10.0.0.2/32", [BLUE, GREEN]),
        ("121.0.0.0/8", [OFFICE, LIAR]),
        ("[2001:DB8::7]", [SIX]),
        ("2001:db8::/32", [SIX]),
        ("active", [BLUE]),
        ("standby", [GREEN]),
        ("six, office,all", [SIX, OFFICE, MASTER_HOST, BLUE, GREEN, LIAR]),
        ("standby,10.0.0.2", [GREEN, BLUE]),
    ],
)
def test_targets(target: str, chosen: list[HostRef]):
    assert select_targets(target, HOSTS, "blue") == chosen


@pytest.mark.parametrize(
    ("target", "what"),
    [
        ("nobody", "no such target: nobody"),
        ("al", "no such target: al"),
        ("blue", "no such target: blue"),
        ("9.9.9.9", "no such target: 9.9.9.9"),
        ("9.0.0.0/8", "no such target: 9.0.0.0/8"),
        ("5.223.72.58/office", "no such target: 5.223.72.58/office"),
        ("office,nobody", "no such target: nobody"),
        ("yq-data", "yq-data takes no deployments"),
        ("10.0.1.3", "10.0.1.3 takes no deployments"),
        ("10.0.1.0/24", "10.0.1.0/24 takes no deployments"),
    ],
)
def test_no_such_target(target: str, what: str):
    with pytest.raises(TargetError) as caught:
        select_targets(target, HOSTS, "blue")
    assert (caught.value.what, caught.value.exit_code) == (what, 4)
    assert caught.value.hint


def test_an_unknown_target_lists_those_that_are_known():
    with pytest.raises(TargetError) as caught:
        select_targets("nobody", [MASTER_HOST, BLUE])
    assert caught.value.hint == "known: 5.223.72.58 (hetzner), 10.0.0.2/yq-blue"
    with pytest.raises(TargetError):
        select_targets("all", [])


@pytest.mark.parametrize("target", ["active", "standby"])
def test_colours_need_an_haproxy(target: str):
    with pytest.raises(TargetError) as caught:
        select_targets(target, HOSTS, None)
    assert "HAProxy" in caught.value.hint


@pytest.mark.parametrize(
    "target", ["121.x.x.x", "121.X.x.x", "121.*.*.*", "121.0.0", "121.x.x.x/8", "office,121.x.x.x"]
)
def test_a_placeholder_is_wrong_usage(target: str):
    with pytest.raises(UsageError) as caught:
        select_targets(target, HOSTS)
    assert caught.value.exit_code == 2
    assert "is no address" in caught.value.what
    assert caught.value.hint == "write 121.0.0.7, or a network such as 121.0.0.0/24"


@pytest.mark.parametrize("target", ["", ",", "all,", "10.0.0.5/24"])
def test_wrong_usage_of_targets(target: str):
    with pytest.raises(UsageError):
        select_targets(target, HOSTS)


# ---------------------------------------------------------------------------- labels and names


@pytest.mark.parametrize(
    ("hosts", "labels"),
    [
        ([("1.2.3.4", "a", "aaaa")], ["1.2.3.4"]),
        ([("1.2.3.4", "a", "aaaa"), ("1.2.3.5", "a", "bbbb")], ["1.2.3.4", "1.2.3.5"]),
        ([("1.2.3.4", "a", "aaaa"), ("1.2.3.4", "b", "bbbb")], ["1.2.3.4/a", "1.2.3.4/b"]),
        (
            [("1.2.3.4", "a", "aaaa00"), ("1.2.3.4", "a", "bbbb00"), ("1.2.3.4", "b", "cccc"), ("::1", "a", "dddd")],
            ["1.2.3.4/a~aaaa", "1.2.3.4/a~bbbb", "1.2.3.4/b", "::1"],
        ),
        ([("1.2.3.4", "a", "aaaa00"), ("1.2.3.4", "a", "aaaa01")], ["1.2.3.4/a~aaaa00", "1.2.3.4/a~aaaa01"]),
        ([("1.2.3.4", "a", "aaaa"), ("1.2.3.4", "A", "bbbb")], ["1.2.3.4/a~aaaa", "1.2.3.4/A~bbbb"]),
        ([("1.2.3.4", "웹", "aaaa"), ("1.2.3.4", "앱", "bbbb")], ["1.2.3.4/웹~aaaa", "1.2.3.4/앱~bbbb"]),
        ([], []),
    ],
)
def test_labels(hosts: list[tuple[str, str, str]], labels: list[str]):
    assert assign_labels(hosts) == labels


HOST_NAMES = st.sampled_from(["a", "A", "b", "a_b", "a.b", "웹", "앱", "yq-blue"])


@given(st.lists(st.tuples(ADDRESSES, HOST_NAMES, st.integers(0, 300)), max_size=8, unique_by=lambda host: host[2]))
def test_labels_and_their_files_are_distinct(hosts: list[tuple[str, str, int]]):
    labels = assign_labels([(address, name, f"{machine:08x}" * 4) for address, name, machine in hosts])
    assert len({file_label(label).casefold() for label in labels}) == len(hosts)  # on Windows, a and A are one file
    for label, (address, name, _) in zip(labels, hosts, strict=True):
        assert re.fullmatch(rf"{re.escape(address)}(/{re.escape(name)}(~[0-9a-f]{{4,}})?)?", label)


@given(NAMES)
@example("..")
@example("")
@example("NUL")
def test_a_label_makes_a_plain_file_name(label: str):
    name = file_label(label)
    assert re.fullmatch(r"[A-Za-z0-9._-]+", name)
    assert name.strip(".")
    assert name.split(".")[0].upper() not in {"CON", "PRN", "AUX", "NUL", "COM1", "LPT9"}


@pytest.mark.parametrize(
    ("label", "name"),
    [
        ("5.223.72.58", "5.223.72.58"),
        ("10.0.0.2/yq-blue~7f3a", "10.0.0.2_yq-blue_7f3a"),
        ("2001:db8::7", "2001_db8__7"),
        ("..", ".._"),
        (".", "._"),
        ("", "_"),
        ("con", "con_"),
        ("com1.x", "com1_.x"),
        ("console", "console"),
        ("웹", "_"),
    ],
)
def test_file_label(label: str, name: str):
    assert file_label(label) == name


@pytest.mark.parametrize("name", ["yq-blue", "DESKTOP-7", "사무실", "a.b.example", "a_b", "x"])
def test_host_name(name: str):
    assert valid_host_name(name)


@pytest.mark.parametrize(
    "name",
    ["", "a b", "a,b", "a/b", "a~b", "all", "ALL", "1.2.3.4", "121.x.x.x", "::1", "a\n", "a\u202eb", "24", "a" * 65,
     "1.2.3.4…", "1.2.3.4|", ".1.2.3.4", "1.2.3.4%1", "１.2.3.4", "1。2。3。4", "✓", "..", "-"],
)  # fmt: skip
def test_no_host_name(name: str):
    assert not valid_host_name(name)


@pytest.mark.parametrize(
    ("text", "valid"),
    [
        ("20261122-210501-7f3a", True),
        ("20261122-210501-7F3A", False),
        ("20261122-210501-7f3", False),
        ("20261122-210501-7f3a\n", False),
        ("../../etc/passwd", False),
        ("٢0261122-210501-7f3a", False),
        ("", False),
    ],
)
def test_run_id(text: str, valid: bool):
    assert valid_run_id(text) is valid


# ---------------------------------------------------------------------------- branches


@pytest.mark.parametrize(
    "name",
    ["master", "hotfix-123", "feature/a.b", "v0301_4", "기능/로그인", "a@b", "@/b", "7f3a" * 10, "a/-b", "a" * 255],
)
def test_branch(name: str):
    assert valid_branch_problem(name) is None


@pytest.mark.parametrize(
    "name",
    [
        "", "HEAD", "@", "-", "-f", "--upload-pack=x", "a b", "a..b", "a/", "/a", "a//b", ".a", "a/.b", "a.", "a.lock",
        "a.lock/b", "a~1", "a^", "a:b", "a?", "a*", "a[b", "a\\b", "a@{1}", "@{-1}", "a\n", "a\0", "\x7f", "a\u202eb",
        "a\u200bb", "\ufeffa", "a\u2028", "a\u0085", "\ud800", "가" * 86,
    ],
)  # fmt: skip
def test_hostile_branch(name: str):
    assert valid_branch_problem(name)


@pytest.mark.skipif(shutil.which("git") is None, reason="no git here")
@settings(max_examples=100)
@given(st.text(st.sampled_from("aA0-_./@{}~^:?*[\\ \x7f\t가lockHED"), min_size=1, max_size=8) | NAMES)
@example("a.lock/b")
@example("HEAD")
def test_what_we_allow_git_allows(name: str):
    problem = valid_branch_problem(name)
    if problem is None or "\0" not in name:
        git = subprocess.run(["git", "check-ref-format", "--branch", name], capture_output=True).returncode == 0
        assert git or problem is not None
        stricter = not name.isprintable() or "@{" in name or name == "@"
        assert stricter or git == (problem is None)


@pytest.mark.parametrize("seed", range(20))
def test_labels_that_are_kept_are_those_that_would_be_assigned(seed: int) -> None:
    """Hosts that share addresses, names, files and beginnings of machine ids come and change in any order."""
    chance = random.Random(seed)
    addresses, names = ["1.1.1.1", "1.1.1.2", "1::2", "1::2:a", "1::2:b"], ["a", "A", "b", "a_b", "x"]
    for _ in range(30):
        hosts: dict[str, tuple[str, str]] = {}
        labels = Labels()
        for _ in range(chance.randrange(1, 14)):
            machine = chance.choice(("aaaa", "aaab", "bbbb")) + chance.choice("01") * 3 + chance.choice("012") * 25
            host = hosts[machine] = chance.choice(addresses), chance.choice(names)
            labels.put(*host, machine)
            wanted = assign_labels([(*host, machine) for machine, host in hosts.items()])
            assert labels.label == dict(zip(hosts, wanted, strict=True))
