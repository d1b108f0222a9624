"""Who is who: a host is known by a key that it proves, and nobody speaks for another."""

from __future__ import annotations

import itertools
import json
import socket
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests import seam as est
from tests.commands import COMMAND, HURRIED, Watched, detach, job_of, wait_state, write_script
from tests.fleet import Fleet, Host, need, wait_for
from tests.haproxy import Proxy
from tests.peers import Peer
from tests.seam import Standing, judge_standing
from tests.test_notify import Receiver

A, B, C, D = (f"127.0.0.{n}" for n in (1, 2, 3, 4))


def json_of(host: Host, name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((host.state / name).read_text())
    return found


def machine_of(host: Host) -> str:
    return (host.state / "machine-id").read_text()


def test_who_is_let_in_and_who_gets_a_key() -> None:
    names = ("able", "is_known", "same_address", "has_key", "was_proven", "proves")
    for values in itertools.product((False, True), repeat=len(names)):
        facts = dict(zip(names, values, strict=True))
        standing = judge_standing(**facts)
        if facts["has_key"] and facts["was_proven"]:
            assert (standing is Standing.PROVEN) == facts["proves"], "a key that arrived is all that counts"
            assert standing in (Standing.PROVEN, Standing.IMPOSTOR)
        if facts["is_known"] and not facts["same_address"] and not (facts["has_key"] and facts["proves"]):
            assert standing is Standing.IMPOSTOR, "a key is only given where the machine was"
        if standing is Standing.NEW:
            assert facts["able"]


def test_a_proof_is_for_one_greeting_one_side_and_one_role() -> None:
    key = "ab" * 32
    hello = est.Hello("agent", [1, 1], "1", "11" * 16, "h", "n1")
    proof = est.prove_key(key, hello, "challenge", "nonce")
    others = [
        est.prove_key("cd" * 32, hello, "challenge", "nonce"),
        est.prove_key(key, hello, "another", "nonce"),
        est.prove_key(key, hello, "challenge", "another"),
        est.prove_key(key, est.replace(hello, role="commander"), "challenge", "nonce"),
        est.prove_key(key, est.replace(hello, machine="22" * 16), "challenge", "nonce"),
        est.prove_key(key, est.replace(hello, nonce="n2"), "challenge", "nonce"),
        *(est.make_proof(bytes.fromhex(key), side, hello, "challenge", "nonce") for side in ("client", "master")),
    ]
    assert len(proof) == 64 and len({proof, *others}) == len(others) + 1
    assert est.prove_key("", hello, "c", "n") == est.prove_key("no key", hello, "c", "n") == ""


def test_a_machine_id_alone_opens_no_door(fleet: Callable[..., Fleet]) -> None:
    """The host behind it is away; whoever shows its id is refused, in words that do the host no harm."""
    hooks = Receiver()
    told = {"url": f"{hooks.url}/json", "on": ["impostor"]}
    one = fleet(hosts=3, command=COMMAND, config={"notify": [told]})
    master, b, c = one.hosts
    write_script("echo fine\n", b, c)
    keys = json_of(b, "keys.json")
    (name,) = keys
    wait_for((master.state / "agent-keys.json").exists, "the keys are written")
    given = json_of(master, "agent-keys.json")
    assert given["name"] == name and given["keys"][machine_of(b)] == keys[name]
    for host, file in ((b, "keys.json"), (master, "agent-keys.json")):
        assert (host.state / file).stat().st_mode & 0o777 == 0o600
    assert machine_of(b) not in given["arrived"], "not proven yet"
    one.restart(b)  # it proves the key for the first time
    wait_for(lambda: machine_of(b) in json_of(master, "agent-keys.json")["arrived"], "the key has arrived")
    assert json_of(b, "keys.json") == keys, "and is not given again"
    run = detach(one, B)
    wait_state(one, run, B, "succeeded")

    one.stop(b)
    tried: list[dict[str, Any]] = [
        {"source": C, "keys": None}, {"source": C, "keys": {}}, {"source": C, "keys": {name: "00" * 32}},
        {"source": C, "keys": json_of(c, "keys.json")}, {"source": B, "keys": None}, {"source": B, "keys": {}},
    ]  # fmt: skip
    for attempt in tried:
        with pytest.raises(est.RefusedError, match="belongs to another host, and its key was not proven") as refused:
            Peer(one, role="agent", machine=machine_of(b), **attempt)
        assert "copied state folder" in refused.value.hint
    assert f"{C} showed the machine id of {B} without its key" in master.stderr
    status = json.loads(one.cli("status", "--json").out)
    assert any(f"{C} showed the machine id of {B}" in text for text in status["warnings"])
    assert "4 times" in one.cli("status").out
    wait_for(lambda: len(hooks.bodies("/json")) >= 2, "people are told of both", 30)
    titles = {json.loads(body)["title"] for body in hooks.bodies("/json")}
    assert titles == {f"[{A}] {where} showed the machine id of {B} without its key; it was refused" for where in (B, C)}
    hooks.close()
    assert job_of(one, run, B)["state"] == "succeeded"

    one.start(b)
    one.stop(master)
    (master.state / "agent-keys.json").unlink()  # it lost its state
    one.start(master)
    one.wait_online()
    wait_for(lambda: "it is another, or lost its state" in b.stderr, lambda: b.stderr)
    wait_for(lambda: len(json_of(b, "keys.json")) == 2, "it keeps both")

    one.restart(b)
    one.stop(b)
    (b.state / "keys.json").unlink()  # and now the host loses its own
    one.spawn(b)
    wait_for(lambda: "its key was not proven" in b.stderr, lambda: b.stderr)
    assert one.cli("forget", B).code == 0
    one.stop(b)
    one.start(b)
    wait_for(lambda: (b.state / "keys.json").exists() and len(json_of(b, "keys.json")) == 1, "it has one again")


def test_a_key_is_on_disk_before_it_is_given(fleet: Callable[..., Fleet]) -> None:
    """A master that is killed in the moment after a welcome knows the host afterwards, wherever that comes from; and
    what was forgotten stays so."""
    one = fleet(hosts=1, config={"whitelist": [A, B, C]})
    master, machine = one.master, "cd" * 16
    program = (sys.executable, "-c", HURRIED)
    slow = {"LIMITS": json.dumps({"LIST_SAVE_S": 3600})}  # what may be written later is not written
    for forget in (False, True, False):
        one.stop(master)
        master.program = program
        one.start(master, env=slow)
        if forget:
            assert one.cli("forget", C).code == 0
        else:
            with Peer(one, "127.0.0.2", "agent", machine, keys={}) as peer:
                welcome = peer.welcome
                one.kill(master)
            assert json_of(master, "agent-keys.json")["keys"] == {machine: welcome.key}
        if master.process and master.process.poll() is None:
            one.kill(master)
        master.program = ()
        one.start(master)
        if forget:
            assert json_of(master, "agent-keys.json")["keys"] == {}
        else:
            with Peer(one, C, "agent", machine, keys={welcome.master: welcome.key}) as peer:
                assert peer.welcome.key == "", "it has its key, and gets no other"
        wait_for(lambda: one.cli("status").code == 0, "it serves")


def test_a_host_that_moves_is_let_in_and_said(fleet: Callable[..., Fleet]) -> None:
    one = fleet(hosts=4, start=False)
    master, b, c, _ = one.hosts
    one.start(master, b, c)
    one.restart(b)
    one.stop(b)
    b.address, old = D, b.address
    one.start(b)
    assert f"it was {old}" in master.stderr
    moved = f"! {D} has a new address: it was {old}"
    assert moved in one.cli("status").out.replace("warning: ", "! ")
    one.restart(b)
    one.restart(master)
    one.wait_online()
    assert moved in one.cli("status").out.replace("warning: ", "! "), "for a day, whoever restarts"
    one.stop(master)
    machines = json_of(master, "machines.json")
    machines[machine_of(b)]["moved_at"] -= est.DAY_S
    (master.state / "machines.json").write_text(json.dumps(machines))
    one.start(master)
    one.wait_online()
    assert moved not in one.cli("status").out.replace("warning: ", "! "), "and no longer"
    one.stop(c)
    older = "ee" * 16
    Peer(one, B, "agent", older).close()
    Peer(one, B, "agent", older).close()  # an older version can't have a key, and goes on as it did
    with pytest.raises(est.RefusedError, match="belongs to another host"):
        Peer(one, C, "agent", older)
    upgraded = Peer(one, B, "agent", older, keys={})
    assert len(upgraded.welcome.key) == 64
    upgraded.close()
    lost = Peer(one, B, "agent", older, keys={})  # it never arrived: the same one again
    assert lost.welcome.key == upgraded.welcome.key
    lost.close()
    keys = {lost.welcome.master: lost.welcome.key}
    assert Peer(one, C, "agent", older, keys=keys).welcome.key == ""
    with pytest.raises(est.RefusedError, match="belongs to another host"):
        Peer(one, C, "agent", older)


def test_commanders_learn_no_machine_id_and_agents_say_only_what_is_theirs(fleet: Callable[..., Fleet]) -> None:
    one = fleet(hosts=4, start=False, command=COMMAND)
    master, b, c, _ = one.hosts
    one.start(master, b, c)
    write_script("echo fine\n", *one.hosts)
    with Peer(one, D, "agent") as liar:
        watched = Watched(one, "trigger", f"{B},{D}", "master")
        order = liar.until(lambda message: isinstance(message, est.Order)).job
        lie = order | {"kind": "rollback", "branch": "evil", "target": "all", "by": "root", "options": {"x": 1}}
        job = est.decode_fields(est.JobRecord, lie | {"revision": 1, "state": "succeeded", "version": "v1"})
        liar.say(job)
        liar.until(lambda message: isinstance(message, est.Acked))
        assert watched.end() == 0
        kept = job_of(one, watched.run, D)
        names = ("kind", "branch", "target", "by", "options")
        assert {name: kept[name] for name in names} == {name: order[name] for name in names}
        assert (kept["state"], kept["version"]) == ("succeeded", "v1")
        with Peer(one, A, "commander") as person:
            person.say(est.Follow(watched.run))
            person.until(lambda message: isinstance(message, est.JobRecord) and message.host == D)
            questions: dict[str, dict[str, Any]] = {
                "status": {}, "history": {"count": 9}, "plan": {"target": "all", "branch": "master"},
                "log": {"run": watched.run, "bytes": 999}, "health": {},
            }  # fmt: skip
            for number, (what, args) in enumerate(questions.items()):
                person.say(est.Ask(number, what, args))
                answer = person.until(lambda message: isinstance(message, est.Answer))
                assert answer.id == number and "error" not in answer.result
            said = str(person.heard)
    for machine in (machine_of(master), machine_of(b), machine_of(c), liar_id := "ab" * 16):
        assert machine not in said and machine not in watched.out + watched.err, liar_id


def test_who_may_command_is_a_list_of_its_own(fleet: Callable[..., Fleet]) -> None:
    one = fleet(hosts=3, command=COMMAND, config={"commanders": [B]})
    master, b, c = one.hosts
    write_script("echo fine\n", *one.hosts)
    code, out, err = one.cli("trigger", "all", "master", host=c)
    assert (code, out) == (3, "")
    assert f"error: {C} may not command: it is none of the commanders\nhint: add {C} to commanders" in err
    assert one.cli("status", host=c).code == 3 and one.runs() == []
    assert f"{C} may not command" in one.cli("doctor", host=c).out
    with Peer(one, C, "commander") as older:  # which does not read that in its welcome
        for message in (
            est.Submit("20260101-000000-abcd", "11" * 16, est.Kind.DEPLOY, B, "master"), est.Ask(1, "status"),
            est.Cancel("20260101-000000-abcd"), est.Follow("20260101-000000-abcd"),
        ):  # fmt: skip
            assert "may not command" in older.refused(message)
    assert one.cli("trigger", "all", "master", host=b).code == 0, "that one is listed, and the other serves as an agent"
    assert one.cli("status").code == 0, "the master's own host always may"
    assert f"only these may command: {B}, and the master's own host" in one.cli("config", "check").out
    with Peer(one, B, "commander") as person:
        settings = json.loads(master.config.read_text())
        master.config.write_text(json.dumps(settings | {"commanders": [C]}))
        assert person.hear() is None, "a change takes effect at once"
    assert one.cli("status", host=b).code == 3 and one.cli("status", host=c).code == 0


def test_a_name_that_fits_two_machines_is_nobodys(fleet: Callable[..., Fleet], tmp_path_factory: Any) -> None:
    """Sections by bare names, and a second host that calls itself as the standby, then as the data node does."""
    need("unshare")
    proxy, hooks = Proxy(tmp_path_factory.mktemp("haproxy")), Receiver()
    settings = {
        "whitelist": [A, B, C, D],
        "hosts": {
            "yq-data": {"deploy": False}, "yq-blue": {"color": "blue", "name": "Azure"}, "yq-green": {"color": "green"},
        },
        "haproxy": proxy.rule | {"host": "yq-data"},
        "health": [{"name": "fine", "command": ["true"], "hosts": ["Azure", "yq-green"]}],
        "notify": [{"url": f"{hooks.url}/json", "on": ["ambiguous"]}],
    }  # fmt: skip
    one = fleet(hosts=3, command=COMMAND, config=settings, start=False)
    for host, name in zip(one.hosts, ("yq-data", "yq-blue", "yq-green"), strict=True):
        host.prefix = ("unshare", "--uts", "sh", "-c", f'hostname {name} && exec "$@"', "sh")
    try:
        proxy.start()
        one.start()
        write_script("echo fine\n", *one.hosts)
        rows = {row["host"]: row for row in json.loads(one.cli("status", "--json").out)["hosts"]}
        assert (rows[B]["name"], rows[B]["color"], rows[C]["traffic"]) == ("Azure", "blue", "standby")
        text = proxy.file.read_bytes()

        def refused(what: str, *words: str) -> None:
            code, out, err = one.cli(*words)
            assert code == 4, (words, out, err)
            (error, hint) = err.splitlines()[-2:]
            assert what in error + hint and "forget" in hint, (words, err)
            assert proxy.file.read_bytes() == text
            assert not one.runs(), words

        Peer(one, D, "agent", name="yq-green").close()  # a copy of the machine, say; that it is gone again is no help
        clash = f"fits 2 machines: {C} and {D}"
        for words in (
            ("trigger", "standby", "master"), ("trigger", "active", "master"), ("trigger", "yq-green", "master"),
            ("trigger", "all", "master"), ("trigger", C, "master"), ("switch", "green"), ("switch", "standby"),
            ("switch", "blue"), ("release", "master", "--yes"), ("health", "YQ-Green"), ("health", "standby"),
            ("upgrade", "yq-green"), ("plan", "standby", "master"), ("rollback", "yq-green", "--yes"),
            ("forget", "yq-green"),
        ):  # fmt: skip
            refused(clash, *words)
        plan = {row["host"]: row for row in json.loads(one.cli("plan", "all", "master", "--json").out)["hosts"]}
        assert plan[B]["refused"] == plan[B]["warnings"] == []
        assert clash in plan[C]["refused"][0] and clash in plan[C]["warnings"][0]
        status = json.loads(one.cli("status", "--json").out)
        (warning,) = status["warnings"]
        whats = "the name yq-green, the colour green, the section hosts.yq-green"
        assert warning.startswith(f"{whats} {clash}; write the address") and f'[hosts."{C}/yq-green"]' in warning
        assert {row["host"]: row["traffic"] for row in status["hosts"] if row["color"]} == {
            B: "active", C: None, D: None,
        }  # fmt: skip
        shown = one.cli("status").out
        before, _, after = warning.partition("`forget ")  # a screen names the program before the command
        assert f"! {before}" in shown and f" forget {after}" in shown
        wait_for(lambda: warning in one.master.stderr, "the log says it", 30)
        wait_for(lambda: [b for b in hooks.bodies("/json") if warning in json.loads(b)["title"]], "people are told", 30)
        assert one.cli("trigger", B, "master").code == 0, "what has nothing to do with it goes on"

        assert one.cli("forget", D).code == 0
        one.origin.commit({"more": ""})
        assert one.cli("trigger", "standby", "master").code == 0
        Peer(one, D, "agent", "cd" * 16, name="YQ-DATA").close()
        for words in (("switch", "green"), ("trigger", "standby", "master"), ("release", "master", "--yes")):
            code, out, err = one.cli(*words)
            assert code == 4 and f"haproxy.host yq-data fits 2 machines: {A} and {D}" in err, (words, out, err)
            assert proxy.file.read_bytes() == text
        assert not {row["traffic"] for row in json.loads(one.cli("status", "--json").out)["hosts"]} - {None}
        assert one.cli("forget", D).code == 0

        settings["hosts"] = {
            f"{A}/yq-data": {"deploy": False},
            f"{B}/yq-blue": {"color": "blue"},
            f"{C}/yq-green": {"color": "green"},
        }
        one.origin.commit({"config/updater.json": json.dumps({"masterUrl": one.url, **settings})})
        assert one.cli("trigger", "all", "master").code == 0, "not on the data node"
        one.origin.git("pull", "--quiet", cwd=one.master.repo)
        with Peer(one, D, "agent", "ef" * 16, name="yq-data"):
            wait_for(
                lambda: one.cli("status").out.count("yq-data") == 1,
                lambda: one.cli("status").out + one.master.stderr,
                30,
            )
            assert one.cli("status").out.count("yq-data") == 1, "a section with an address gives the name to it"
            assert one.cli("switch", "green", "--dry-run").code == 0
    finally:
        proxy.close()
        hooks.close()


def test_a_first_configuration_finds_the_hosts_by_the_master_that_runs(
    fleet: Callable[..., Fleet], tmp_path: Path
) -> None:
    """And refuses to choose between two that call themselves alike."""
    one = fleet(hosts=1, config={"whitelist": [A, B, C, D]})
    (tmp_path / "new" / ".git").mkdir(parents=True)
    env = {"ESTELLE_REPO": str(tmp_path / "new")}
    argv = ("config", "init", "--blue-green", "--master", one.url, "--host", "yq-data=10.0.0.10")

    def peer(number: int, address: str, name: str) -> Peer:
        return Peer(one, address, "agent", f"{number:032x}", keys={}, name=name)

    with peer(1, B, "yq-blue"), peer(2, C, "yq-green"):
        with peer(3, D, "YQ-Green"):
            wait_for(lambda: "(YQ-Green) is online" in one.master.stderr, lambda: one.master.stderr)
            code, _, err = one.cli(*argv, env=env)
            assert code == 4 and f"the name yq-green fits 2 machines: {C} and {D}" in err
            assert f"--host yq-green={C}" in err and not (tmp_path / "new" / "config").exists()
        wait_for(lambda: one.master.stderr.count("is offline"), "the copy has gone")
        code, out, err = one.cli(*argv, "--dry-run", env=env)
        assert code == 0, err
    hosts = tomllib.loads(out)["hosts"]
    assert list(hosts) == ["10.0.0.10/yq-data", f"{B}/yq-blue", f"{C}/yq-green"]


def test_a_section_by_address_and_name_is_found_by_who_knows_only_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    def key(name: str, *sections: str, seen: str | None = None) -> str:
        monkeypatch.setattr(socket, "gethostname", lambda: name)
        data = {"masterUrl": "ws://203.0.113.1:1", "whitelist": [], "hosts": {section: {} for section in sections}}
        config = est.parse_config(json.dumps(data), "x", "json")
        return est.host_rule(config, est.own_addresses(config, seen), name).key

    blue = "203.0.113.7/yq-blue"
    assert key("YQ-Blue", blue, "203.0.113.8/yq-green") == blue, "behind a NAT, the only one of its name"
    assert key("yq-blue", blue, "203.0.113.9/yq-blue") == "", "two of them: it may be either"
    assert key("yq-red", blue) == ""
    assert key("yq-blue", blue, seen="203.0.113.7") == blue
    assert key("yq-blue", blue, seen="203.0.113.66") == "", "elsewhere, as the master sees, it is another machine"
    own = est.own_address()
    if not own.startswith("127."):
        assert key("yq-blue", f"{own}/yq-blue", blue) == f"{own}/yq-blue", "its own address decides"
