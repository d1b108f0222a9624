"""The switch: a real HAProxy, workers that answer with their colour, and a daemon that may die at any moment."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from tests import seam as est
from tests.commands import COMMAND, GATED, Watched, detach, open_gate, wait_state, write_script
from tests.fleet import Fleet, Result, kill_processes_of, processes_of, wait_for
from tests.haproxy import CONFIG, WORKER, Load, Proxy, ask
from tests.test_health import says

PHASES = ("gate", "check", "drain", "write", "reload", "proof")


class Site:
    """The data node, which is its own master here, its HAProxy and its two workers."""

    def __init__(self, proxy: Proxy, fleet: Fleet) -> None:
        self.proxy, self.fleet, self.text = proxy, fleet, proxy.file.read_bytes()

    def configure(self, **changes: Any) -> None:
        """[haproxy] with changes (None takes a key out), in force."""
        rule = {key: value for key, value in (self.proxy.rule | changes).items() if value is not None}
        path = self.fleet.master.config
        settings = json.loads(path.read_text())
        if settings["haproxy"] != rule:
            seen = self.fleet.master.stderr.count("new settings")
            path.write_text(json.dumps(settings | {"haproxy": rule}))
            wait_for(lambda: self.fleet.master.stderr.count("new settings") > seen, "the settings are in force")

    def switch(self, color: str, *options: str) -> Result:
        return self.fleet.cli("switch", color, *options)

    def refused(self, color: str, *words: str) -> str:
        """A switch that is refused: exit 5, and the file as it was."""
        text = self.proxy.file.read_bytes()
        code, out, err = self.switch(color)
        assert code == 5, (code, out, err)
        assert all(word in out + err for word in words), (words, out, err)
        assert self.proxy.file.read_bytes() == text
        self.expect_peace()
        return out + err

    def expect_peace(self) -> None:
        """Nothing is left half done: one active, the same on disk and in HAProxy, and nobody drained."""
        proxy = self.proxy
        wait_for(lambda: "DRAIN" not in "".join(proxy.statuses().values()), lambda: f"{proxy.statuses()}")
        wait_for(lambda: not (self.fleet.master.state / "switch.json").exists(), "its journal is closed")
        assert proxy.roles() == proxy.live() in ("blue", "green")

    def reset(self) -> None:
        """Blue active, both up, everything as at the start."""
        proxy = self.proxy
        for color in proxy.ports:
            if proxy.workers[color].poll() is not None:
                proxy.start_worker(color)
        if proxy.file.is_symlink() or proxy.file.read_bytes() != self.text or proxy.live() != "blue":
            proxy.file.unlink()
            proxy.file.write_bytes(self.text)
            proxy.reload()
        wait_for(lambda: proxy.statuses() == {"blue": "UP", "green": "UP"}, lambda: f"{proxy.statuses()}\n{proxy.said}")
        self.configure()

    def traffic(self) -> dict[str, Any]:
        """Each colour's traffic as `status` shows it, and what it warns of."""
        found: dict[str, Any] = json.loads(self.fleet.cli("status", "--json").out)
        return found


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    proxy = Proxy(tmp_path_factory.mktemp("haproxy")).start()
    folder = tmp_path_factory.mktemp("fleet")
    fleet = Fleet(folder, hosts=1, config={"haproxy": proxy.rule})
    try:
        fleet.start()
        yield Site(proxy, fleet)
    finally:
        fleet.stop_all()
        kill_processes_of(folder)
        proxy.close()


@pytest.fixture
def site(shared: Site) -> Site:
    shared.reset()
    return shared


def test_traffic_moves_and_back_and_no_request_is_lost(site: Site):
    with Load(site.proxy.port) as load:
        code, out, err = site.switch("green")
        assert code == 0, (out, err)
        lines = [line.removeprefix("[127.0.0.1] ") for line in out.splitlines()]
        assert [line.removesuffix("...") for line in lines if line.endswith("...")] == [*PHASES]
        assert lines[-1] == "✓ 완료 green"
        moved = time.time()
        own = {site.proxy.answers() for _ in range(30)}
        until = time.time()
        code, out, err = site.switch("standby", "--json")
        assert code == 0, (out, err)
        began = next(event for event in map(json.loads, out.splitlines()) if event["event"] == "run")
        assert began["branch"] == "blue"
        answers, failed = load.end()
        assert not failed
        assert {color for _, color in answers} == {"blue", "green"}
        assert {color for at, ended, color in load.spans if moved < at and ended < until} | own == {"green"}
        assert site.proxy.file.read_bytes() == site.text
        site.expect_peace()


def test_active_already_changes_nothing(site: Site):
    pid = site.proxy.command("show info").partition("Pid: ")[2].split()[0]
    code, out, err = site.switch("blue")
    assert code == 0, (out, err)
    assert "active already" in out
    assert site.proxy.command("show info").partition("Pid: ")[2].split()[0] == pid


def test_dry_run_shows_the_exact_change(site: Site):
    code, out, err = site.switch("green", "--dry-run")
    assert code == 0, (out, err)
    ports = site.proxy.ports
    changed = [line.removeprefix("[127.0.0.1] ") for line in out.splitlines() if "] -  " in line or "] +  " in line]
    assert changed == [
        f"-    server blue 127.0.0.1:{ports['blue']} check cookie blue",
        f"-    server green 127.0.0.1:{ports['green']} check backup cookie green",
        f"+    server blue 127.0.0.1:{ports['blue']} check backup cookie blue",
        f"+    server green 127.0.0.1:{ports['green']} check cookie green",
    ]
    assert site.proxy.file.read_bytes() == site.text
    site.expect_peace()


def test_usage(site: Site):
    assert site.switch("red").code == 2
    site.configure(backend="other")
    site.refused("green", "has no backend other")


def test_no_haproxy_is_a_wrong_configuration(site: Site):
    path = site.fleet.master.config
    settings = json.loads(path.read_text())
    seen = site.fleet.master.stderr.count("new settings")
    path.write_text(json.dumps({key: value for key, value in settings.items() if key != "haproxy"}))
    wait_for(lambda: site.fleet.master.stderr.count("new settings") > seen, "the settings are in force")
    code, out, err = site.switch("green")
    path.write_text(json.dumps(settings))
    assert (code, out) == (2, "")
    assert "no [haproxy]" in err
    wait_for(lambda: site.fleet.master.stderr.count("new settings") > seen + 1, "the settings are in force")


def test_standby_that_is_down_or_gone_is_refused(site: Site):
    proxy = site.proxy
    slow = site.text.decode().replace("default-server inter 500", "default-server inter 60s")
    proxy.file.write_text(slow)
    proxy.reload()
    wait_for(lambda: proxy.statuses() == {"blue": "UP", "green": "UP"}, "both are up")
    proxy.stop_worker("green")
    gone = f"green does not answer at 127.0.0.1:{proxy.ports['green']}: "
    for rule in ({}, {"socket": None, "masterSocket": None}):
        site.configure(**rule)
        assert any(line.startswith(gone) for line in site.traffic()["warnings"]), "no check has noticed yet"
    site.configure()
    assert proxy.statuses()["green"] == "UP", "nor by now"
    site.refused("green", "✗ 실패 gate (exit 5)", gone)
    proxy.file.write_bytes(site.text)
    proxy.reload()
    wait_for(lambda: site.proxy.statuses()["green"] == "DOWN", "HAProxy notices")
    site.refused("standby", "green is DOWN for HAProxy")
    site.proxy.start_worker("green", "sick")
    site.refused("green", "green is DOWN for HAProxy")
    site.proxy.stop_worker("green")


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        (" check backup cookie green", " check cookie green", "both colours are active"),
        ("    option http-server-close", "    cookie SRV insert indirect nocache", "keeps clients on the old colour"),
    ],
)
def test_wrong_roles_are_refused(site: Site, old: str, new: str, words: str):
    assert old in site.text.decode()
    site.proxy.file.write_text(site.text.decode().replace(old, new))
    code, out, err = site.switch("green")
    assert code == 5, (out, err)
    assert words in out
    assert site.proxy.file.read_text() == site.text.decode().replace(old, new)
    assert site.proxy.live() == "blue"
    assert site.proxy.statuses() == {"blue": "UP", "green": "UP"}


def test_text_that_haproxy_refuses_is_refused(site: Site):
    site.proxy.file.write_bytes(site.text + b"    such a word\n")
    site.refused("green", "haproxy -c refuses the new text", "unknown keyword")


def test_file_that_haproxy_does_not_run_is_refused(site: Site, tmp_path: Path):
    (tmp_path / "other.cfg").write_bytes(site.text)
    site.configure(config=str(tmp_path / "other.cfg"))
    site.refused("green", "HAProxy does not read")
    site.configure()
    site.proxy.file.write_text(moved(site.text.decode()))  # edited by hand, and never reloaded
    code, out, _ = site.switch("blue")
    assert code == 5
    assert "HAProxy does not run what" in out
    assert any("a reload was lost" in warning for warning in site.traffic()["warnings"])


def moved(text: str) -> str:
    return text.replace("check cookie blue", "check backup cookie blue").replace("check backup cookie green", "check")


def test_owner_mode_and_symlink_stay(site: Site):
    real = site.proxy.file.with_name("real.cfg")
    site.proxy.file.rename(real)
    site.proxy.file.symlink_to(real)
    real.chmod(0o640)
    if os.geteuid() == 0:
        os.chown(real, 1234, 2345)
    before = real.stat()
    site.proxy.reload()
    code, out, err = site.switch("green")
    assert code == 0, (out, err)
    assert site.proxy.file.is_symlink()
    after = real.stat()
    assert (after.st_uid, after.st_gid, stat.S_IMODE(after.st_mode)) == (before.st_uid, before.st_gid, 0o640)
    assert site.proxy.live() == "green"
    assert len(real.read_bytes()) == len(site.text)


def test_reload_that_was_swallowed_is_repeated(site: Site):
    script = site.proxy.folder / "swallowed.sh"
    script.write_text(f'[ -e "$0.once" ] || {{ touch "$0.once"; exit 0; }}\nkill -USR2 $(cat {site.proxy.pid_file})\n')
    site.configure(reload=["sh", str(script)])
    code, out, err = site.switch("green")
    assert code == 0, (out, err)
    assert "runs the new text at attempt 2" in out
    site.expect_peace()


def test_a_reload_that_comes_late_finds_the_states_too(site: Site):
    """It was taken for swallowed, and repeated: then two processes come, and the last one is what stays."""
    proxy = site.proxy
    script = proxy.folder / "late.sh"
    reloads = proxy.said.count("Reloading HAProxy")
    script.write_text(f"(sleep 4.6; kill -USR2 $(cat {proxy.pid_file})) </dev/null >/dev/null 2>&1 &\n")
    site.configure(reload=["sh", str(script)])
    proxy.command("set server yquant_backend/green weight 77")
    code, out, err = site.switch("green")
    assert code == 0 and "at attempt 2" in out, (out, err)
    assert proxy.said.count("Reloading HAProxy") - reloads == 2, "the second has come"
    assert proxy.rows()["green"][18] == "77"


@pytest.mark.parametrize("command", [["true"], ["false"]])
def test_reload_that_does_nothing_is_noticed_and_undone(site: Site, command: list[str]):
    site.configure(reload=command)
    with Load(site.proxy.port) as load:
        code, out, err = site.switch("green")
        assert code == 1, (out, err)
        assert "undone: blue is active" in out
        assert site.proxy.file.read_bytes() == site.text
        _, failed = load.end()
        assert not failed
        site.expect_peace()


@pytest.mark.parametrize("without", ["", "masterSocket"])
def test_reload_that_fails_though_the_text_is_valid_is_undone(site: Site, without: str):
    """A port that somebody else has: `haproxy -c` passes, the new process can't start, the old one goes on. Noticed
    at the first attempt: each costs the clients seconds."""
    if without:
        site.configure(**{without: None})
    with socket.create_server(("127.0.0.1", 0)) as taken:
        text = site.text.decode().replace(
            "    default_backend", f"    bind 127.0.0.1:{taken.getsockname()[1]}\n    default_backend"
        )
        site.proxy.file.write_text(text)  # somebody's edit that was never loaded
        with Load(site.proxy.port) as load:
            code, out, err = site.switch("green")
            assert code == 1, (out, err)
            assert "HAProxy could not start with the new text" in out and "may still be drained" not in out, out
            assert "undone: blue is active" in out
            assert site.proxy.file.read_text() == text
            _, failed = load.end()
    # HAProxy itself stops to listen for the 3 s in which its new process tries to get the port
    assert {kind.split()[1] for kind in failed} <= {"ConnectionRefusedError"}
    site.expect_peace()


def test_a_standby_that_takes_no_traffic_is_refused(site: Site):
    """However that came about: HAProxy would go on sending everything to the old colour."""
    proxy = site.proxy
    for command, undo, words in (
        ("weight 0", "weight 1", "weight 0"),
        ("state drain", "state ready", "DRAIN"),
        ("state maint", "state ready", "MAINT"),
    ):
        proxy.command(f"set server yquant_backend/green {command}")
        assert any("green is" in line and "would not take over" in line for line in site.traffic()["warnings"])
        code, out, err = site.switch("green")
        assert code == 5 and words in out, (out, err)
        assert proxy.roles() == "blue"
        proxy.command(f"set server yquant_backend/green {undo}")
    wait_for(lambda: proxy.statuses()["green"] == "UP", "green is up")
    for words in ("weight 0", "disabled"):
        proxy.file.write_text(site.text.decode().replace("check backup", f"{words} check backup"))
        proxy.reload()
        code, out, err = site.switch("green")
        assert code == 5 and "HAProxy would send it nothing" in out, (out, err)
        site.configure(socket=None, masterSocket=None)
        code, out, err = site.switch("green")
        assert code == 5 and f"green is `{words}` for HAProxy" in out, (out, err)
        assert f"green is `{words}`: it would not take over" in site.traffic()["warnings"]
        site.configure()
    for said, words in ((b"drain\n", "DRAIN (agent)"), (b"0%\n", "weight 0"), (b"maint\n", "MAINT")):
        with says(said) as agent:
            check = f"agent-check agent-port {agent.rpartition(':')[2]} agent-inter 100 check backup"
            proxy.file.write_text(site.text.decode().replace("check backup", check))
            proxy.reload()
            wait_for(lambda: est.why_unusable(green_row(proxy)), "the agent's word")
            code, out, err = site.switch("green")
            assert code == 5 and words in out and "HAProxy would send it nothing" in out, (out, err)


def test_servers_that_begin_down_keep_their_states_or_are_refused(site: Site):
    """`init-state` (3.1 and newer): without the states of before, nobody would get the requests after the reload."""
    if not any(word == b"init-state" for word in keywords_of_haproxy()):
        pytest.skip("this HAProxy knows no init-state")
    proxy = site.proxy
    down = site.text.decode().replace("default-server inter 500", "default-server init-state fully-down inter 500")
    cold = down.replace("    load-server-state-from-file global\n", "")
    proxy.file.write_text(cold.replace("inter 500", "inter 60s"))
    proxy.reload()
    code, out, err = site.switch("green")
    assert code == 5 and "green is DOWN" in out, (out, err)
    proxy.file.write_text(cold)
    proxy.reload()
    wait_for(lambda: proxy.statuses() == {"blue": "UP", "green": "UP"}, "both are up")
    site.refused("green", "`init-state fully-down` without the states of before")
    for text, color in ((down, "green"), (moved(local_states(down, proxy)), "blue")):
        proxy.file.write_text(text)
        proxy.reload()
        wait_for(lambda: proxy.statuses() == {"blue": "UP", "green": "UP"}, "both are up")
        with Load(proxy.port, slow=0) as load:
            assert site.switch(color).code == 0
            assert load.end()[1] == {}


def local_states(text: str, proxy: Proxy) -> str:
    """The same text with a file of states for each backend, and not one for all."""
    text = text.replace(f"server-state-file {proxy.folder}/states", f"server-state-base {proxy.folder}")
    return text.replace("load-server-state-from-file global", "load-server-state-from-file local")


def test_states_in_a_file_of_the_backends_own_are_carried(site: Site):
    """What HAProxy reads with `load-server-state-from-file local`: here the weight that somebody gave by hand."""
    proxy = site.proxy
    for more in ("", "    server-state-file-name own.states\n"):
        text = local_states(site.text.decode(), proxy)
        proxy.file.write_text(text.replace("    option http-server-close\n", f"    option http-server-close\n{more}"))
        proxy.reload()
        wait_for(lambda: proxy.statuses() == {"blue": "UP", "green": "UP"}, "both are up")
        proxy.command("set server yquant_backend/green weight 77")
        code, out, err = site.switch("green")
        assert code == 0 and "the servers' states are kept" in out, (out, err)
        assert proxy.rows()["green"][18] == "77" and proxy.live() == "green"
        assert not any("load-server-state-from-file" in line for line in site.traffic()["warnings"])


def test_states_do_not_outlive_the_switch(site: Site):
    """Somebody else's reload, days later, would bring back a maintenance that is over, and undo a changed line."""
    proxy = site.proxy
    third = f"server blue 127.0.0.1:{proxy.ports['blue']} check backup\n".replace("server blue", "    server third")
    proxy.file.write_text(site.text.decode() + third)
    proxy.reload()
    proxy.command("set server yquant_backend/third state maint")
    for color in ("green", "blue"):
        code, out, err = site.switch(color)
        assert code == 0, (out, err)
        assert proxy.statuses()["third"] == "MAINT", "the switch itself keeps them"
    site.configure(reload=["false"])
    assert site.switch("green").code == 1, "undone"
    site.configure()
    proxy.command("set server yquant_backend/third state ready")
    said = len(proxy.said)
    proxy.reload()
    wait_for(lambda: proxy.statuses()["third"] == "UP", lambda: f"{proxy.statuses()}")
    assert "state" not in proxy.said[said:], "what is left of the file is valid"


def test_a_colour_that_fails_every_request_is_told(site: Site):
    """Its check succeeds, it gets the requests, and none ends well: nothing that a ✓ alone may hide."""
    proxy = site.proxy
    proxy.stop_worker("green")
    broken = WORKER.replace('path == b"/health" and sys.argv[3:]', 'path != b"/health"')
    assert broken != WORKER
    argv = [sys.executable, "-c", broken, "green", str(proxy.ports["green"])]
    proxy.workers["green"] = subprocess.Popen(argv, start_new_session=True)
    wait_for(lambda: proxy.statuses()["green"] == "UP" and proxy.rows()["green"][36] == "L7OK", "its check succeeds")
    with Load(proxy.port, slow=0) as load:
        code, out, err = site.switch("green")
        load.end()
    proxy.stop_worker("green")
    assert code == 0 and re.search(r"⚠ green gets the requests, and fails: \d+ answers of 5xx", out), (out, err)


def test_connections_in_tcp_mode_stay_and_are_told(site: Site):
    proxy = site.proxy
    text = site.text.decode().replace("mode http", "mode tcp").replace("    option http-server-close\n", "")
    proxy.file.write_text(text.replace("    option idle-close-on-response\n", ""))
    proxy.reload()
    wait_for(lambda: proxy.statuses() == {"blue": "UP", "green": "UP"}, "both are up")
    with Load(proxy.port, slow=0) as load:
        wait_for(lambda: int(proxy.rows()["blue"][4]) >= 4, "connections are kept")
        code, out, err = site.switch("green")
        load.end()
    told = r"⚠ in `mode tcp` not all the traffic moves at once: HAProxy's old process \d+ still holds \d+ connections"
    assert code == 0 and re.search(told, out), (out, err)


def keywords_of_haproxy() -> list[bytes]:
    argv = ["haproxy", "-dKcfg", "-c", "-f", os.devnull]
    said = subprocess.run(argv, capture_output=True, check=False)
    return re.findall(rb"(?m)^\s*server <name> <addr> (\S+)", said.stdout + said.stderr)


@pytest.mark.parametrize(
    ("front", "code", "words"),
    [
        ("use_backend other", 1, "requests go another way: other/x got "),
        ("use_backend other if { rand(100) lt 50 }", 0, "⚠ not all the traffic moves: other/x got "),
        ("http-request return status 200 if { path / }", 0, "⚠ not proved: nobody saw a request reach green ("),
    ],
)
def test_requests_that_go_round_the_backend(site: Site, front: str, code: int, words: str):
    """To the old colour under a name that the text alone does not tell, or to nobody."""
    proxy = site.proxy
    text = site.text.decode().replace("    default_backend", f"    {front}\n    default_backend")
    proxy.file.write_text(f"{text}backend other\n    server x localhost:{proxy.ports['blue']} backup\n")
    proxy.reload()
    way = "what goes to other reaches blue, whichever colour is active"
    wait_for(lambda: way in site.traffic()["warnings"], "the new process answers")
    with Load(proxy.port, slow=0) as load:
        wait_for(lambda: "\nother,x" in proxy.command("show stat"), "HAProxy answers")
        found, out, err = site.switch("green")
        load.end()
    assert found == code and words in out, (out, err)
    if "return" in front:
        assert "requests came in, and none reached the backend)" in out, out
    if code:
        assert "undone: blue is active" in out and proxy.roles() == "blue", out
    site.expect_peace()


def test_rules_that_choose_for_themselves_are_refused_before_anything_changes(site: Site):
    """HAProxy takes each of these texts and sends nothing by the `backup` words."""
    proxy = site.proxy
    for line in ("option transparent", f"dispatch 127.0.0.1:{proxy.ports['blue']}", "use-server blue if TRUE"):
        proxy.file.write_text(site.text.decode().replace("option http-server-close", line))
        proxy.reload()
        code, out, err = site.switch("green")
        assert code == 5 and re.search(r"haproxy\.cfg line \d+: it (sends|chooses)", out), (out, err)
        assert any(": it " in warning for warning in site.traffic()["warnings"])


def green_row(proxy: Proxy) -> dict[str, str]:
    rows = est.parse_show_stat(proxy.command("show stat"), "yquant_backend")
    return next((row for row in rows if row["svname"] == "green"), {"status": "UP"})


def test_what_nobody_saw_is_not_called_proved(site: Site):
    """No request came, and no probe is configured: done, but with a warning in the result."""
    code, out, err = site.switch("green", "--json")
    events = [json.loads(line) for line in out.splitlines()]
    (result,) = [event for event in events if event["event"] == "result"]
    assert code == 0 and result["ok"], (out, err)
    (line,) = [line for line in result["warnings"] if line.startswith("not proved: nobody saw a request reach green")]
    assert line.endswith("; `probe` in [haproxy], a GET that does no harm, could prove it")
    code, out, err = site.switch("blue")
    assert "⚠ not proved" in out, (out, err)
    site.configure(probe=f"http://127.0.0.1:{site.proxy.port}/")
    code, out, err = site.switch("green", "--json")
    events = [json.loads(line) for line in out.splitlines()]
    (result,) = [event for event in events if event["event"] == "result"]
    assert code == 0 and result["warnings"] == [], (out, err)
    assert "green has 1 requests, blue 0" in out


def test_requests_that_go_on_to_the_old_colour_undo_the_switch(site: Site):
    """Whatever it is that makes HAProxy do so: here a hand that takes green's weight as soon as it is active."""
    script = site.proxy.folder / "spoil.sh"
    ask = "import sys; sys.path.insert(0, sys.argv[1]); from tests.haproxy import ask; from pathlib import Path"
    spoil = f'{ask}; ask(Path(sys.argv[2]), "set server yquant_backend/green weight 0")'
    pid = f"$(cat {site.proxy.pid_file})"
    root = Path(__file__).parent.parent
    script.write_text(f"kill -USR2 {pid}\nsleep 0.3\n{sys.executable} -c '{spoil}' {root} {site.proxy.socket}\n")
    site.configure(reload=["sh", str(script)])
    with Load(site.proxy.port) as load:
        code, out, err = site.switch("green")
        assert code == 1, (out, err)
        assert "requests still reach another server: green has" in out, out
        assert "undone: blue is active" in out
        load.end()
    assert site.proxy.file.read_bytes() == site.text
    site.proxy.command("set server yquant_backend/green weight 1")
    site.expect_peace()


def test_old_processes_are_told(site: Site):
    """A connection that stays with the old process, as a WebSocket's does: how many, where, and until when."""
    with socket.create_connection(("127.0.0.1", site.proxy.port)) as link:
        link.sendall(b"GET /slower HTTP/1.1\r\nHost: x\r\n\r\n")
        wait_for(lambda: site.proxy.rows()["blue"][4] == "1", "the request is under way")
        code, out, err = site.switch("green")
        assert code == 0, (out, err)
        told = (
            r"HAProxy's old process \d+ still holds 1 connection \(1 busy on blue\); "
            r"`hard-stop-after` cuts them in \d+ s"
        )
        assert re.search(told, out), out
        assert any(re.search(told, line) for line in site.traffic()["warnings"])
        assert b" 200 " in link.recv(4096)
    wait_for(lambda: not any("old process" in line for line in site.traffic()["warnings"]), "it ended")


def test_failover_is_told_and_made_explicit(site: Site):
    with Load(site.proxy.port, slow=0) as load:
        site.proxy.stop_worker("blue")
        wait_for(lambda: site.proxy.statuses()["blue"] == "DOWN", "HAProxy notices")
        assert site.proxy.answers() == "green"
        assert any("has failed over to green; `switch green`" in warning for warning in site.traffic()["warnings"])
        code, out, err = site.switch("blue")
        assert code == 0 and "⚠ blue is active by the file alone: green has the traffic by failover" in out, (out, err)
        code, out, err = site.switch("standby")
        assert code == 5, (out, err)
        code, out, err = site.switch("green")
        assert code == 0, (out, err)
        answers, failed = load.end()
        assert answers[-1][1] == "green"
        assert sum(failed.values()) <= 6, failed  # what was under way on blue when it died
        assert site.proxy.roles() == "green"


def test_without_any_socket_it_works_and_says_what_that_costs(site: Site):
    site.configure(socket=None, masterSocket=None, probe=f"http://127.0.0.1:{site.proxy.port}/")
    code, out, err = site.switch("green")
    assert code == 0, (out, err)
    assert "without a socket" in out
    assert "⚠ not proved" in out and "could prove it" not in out, "the probe says not by whom it was answered"
    wait_for(lambda: site.proxy.answers() == "green", "green answers")
    first = site.traffic()["warnings"][0]
    assert first.startswith("add the line `stats socket ") and "green is active by" in first


@pytest.mark.parametrize("without", ["socket", "masterSocket"])
def test_one_socket_is_enough(site: Site, without: str):
    site.configure(**{without: None})
    code, out, err = site.switch("green")
    assert code == 0, (out, err)
    assert "gets no new requests" in out
    assert "runs the new text" in out
    site.expect_peace()


def test_socket_that_does_not_answer_is_refused(site: Site):
    site.configure(socket=str(site.proxy.folder / "nowhere.sock"), masterSocket=None)
    site.refused("green", "HAProxy does not answer at", "level admin")


def test_probe_that_fails_undoes_the_switch(site: Site):
    """Before anything is written, so that also the connections that were open all the time come back."""
    site.configure(probe=f"http://127.0.0.1:{site.proxy.port + 1}/")
    with Load(site.proxy.port, keep=8, new=1, slow=0, think_s=0.3) as load:
        time.sleep(0.4)  # each has its connection
        code, out, err = site.switch("green")
        ended = time.time()
        assert code == 1, (out, err)
        assert "undone: blue is active" in out
        assert site.proxy.file.read_bytes() == site.text
        site.expect_peace()
        time.sleep(0.7)
        answers, failed = load.end()
    late = {color for began, color in answers if began > ended}
    assert (late, failed) == ({"blue"}, {})


def ask_on(link: socket.socket) -> str:
    """Which colour answers on a connection that stays open."""
    link.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
    return link.recv(65536).decode().rpartition("\r\n\r\n")[2]


def test_connections_of_meanwhile_leave_the_colour_that_was_refused(site: Site):
    """The probe fails once the new process serves: what was opened to that one goes to the old colour by it."""
    links: list[socket.socket] = []
    met: list[str] = []

    class Probe(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if site.proxy.live() == "green":
                links.append(socket.create_connection(("127.0.0.1", site.proxy.port), 10))
                met.append(ask_on(links[0]))
            self.send_response(500 if links else 200)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            """Nobody reads it."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Probe) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        site.configure(probe=f"http://127.0.0.1:{server.server_port}/")
        code, out, err = site.switch("green")
        server.shutdown()
    assert code == 1 and "undone: blue is active" in out, (out, err)
    with links[0]:
        assert met == ["green"]
        assert "what still comes on them may go to green" in out
        assert ask_on(links[0]) == "blue"
    site.expect_peace()


def test_requests_that_wait_for_a_place_are_answered(site: Site):
    """Behind `maxconn` they are nobody's yet, and the process that they are in gets no new ones after the reload."""
    text = site.text.decode().replace("default-server inter", "timeout queue 9s\n    default-server maxconn 1 inter")
    site.proxy.file.write_text(text)
    site.proxy.reload()
    with Load(site.proxy.port, keep=0, new=0, slow=3) as load:
        wait_for(lambda: "\nyquant_backend,BACKEND,2," in site.proxy.command("show stat"), "two wait")
        code, out, err = site.switch("green")
        assert code == 0, (out, err)
        _, failed = load.end()
    assert failed == {}


@pytest.mark.parametrize("state", ["maint", "drain"])
def test_what_a_hand_took_out_of_the_traffic_stays_out(site: Site, state: str):
    """A worker under repair must not get the traffic because a switch away from it was undone."""
    proxy = site.proxy
    proxy.command(f"set server yquant_backend/blue state {state}")
    wait_for(lambda: proxy.answers() == "green", "green has the traffic")
    site.configure(probe=f"http://127.0.0.1:{proxy.port + 1}/")
    try:
        code, out, err = site.switch("green")
        assert code == 1, (out, err)
        assert f"undone: blue is active by the file, and {state.upper()} as it was" in out
        assert proxy.answers() == "green" and proxy.statuses()["blue"] == state.upper()
        site.configure()
        code, out, err = site.switch("green")
        assert code == 0, (out, err)
        assert proxy.statuses() == {"blue": state.upper(), "green": "UP"}
    finally:
        proxy.command("set server yquant_backend/blue state ready")


def test_an_address_that_nobody_has_checked_is_refused(site: Site):
    """By an edit that was never loaded, or by a hand at the socket: the reload would bring another worker."""
    proxy = site.proxy
    port = proxy.ports["green"]
    text = site.text.decode().replace(f"green 127.0.0.1:{port}", f"green 127.0.0.1:{proxy.ports['blue']}")
    proxy.file.write_text(text)
    said = f"HAProxy runs green at 127.0.0.1:{port}, and its file has 127.0.0.1:{proxy.ports['blue']}"
    assert said in site.traffic()["warnings"]
    site.refused("green", said, "both colours are the worker at")
    code, out, err = site.switch("blue")
    assert code == 0 and "active already" in out, (out, err)


def test_a_frontend_that_is_closed_is_told(site: Site):
    def told() -> bool:
        return any(line.startswith("the frontend outside is ") for line in site.traffic()["warnings"])

    assert not told()
    site.proxy.command("disable frontend outside")
    assert told() and not site.proxy.answers()
    site.proxy.command("enable frontend outside")
    assert not told()


def test_a_socket_that_may_drain_nobody_is_refused_at_once(site: Site):
    site.proxy.file.write_text(site.text.decode().replace("level admin", "level operator"))
    site.proxy.reload()
    site.configure(masterSocket=None)
    said = f"HAProxy's socket {site.proxy.socket} has `level operator`: a switch needs `level admin`"
    assert said in site.traffic()["warnings"]
    site.refused("green", said)


def test_haproxy_that_runs_twice_is_told(proxy: Proxy, fleet: Callable[..., Fleet]):
    """Both have the port: half of the connections go where the other one knows them to."""
    second = proxy.folder / "second.sock"
    proxy.start()
    own = est.first_haproxies([proxy.file])
    assert own == [proxy.process.pid if proxy.process else 0]
    one = fleet(hosts=1, config={"haproxy": proxy.rule})
    with subprocess.Popen(
        ["haproxy", "-W", "-S", second, "-f", proxy.file], stderr=subprocess.DEVNULL, start_new_session=True
    ) as other:
        try:
            wait_for(lambda: ask(second, "show proc"), "a second one serves")
            assert set(est.first_haproxies([proxy.file])) == {*own, other.pid}
            warnings = json.loads(one.cli("status", "--json").out)["warnings"]
            assert any(line.startswith("HAProxy runs 2 times with") for line in warnings), warnings
            code, out, err = one.cli("switch", "green", "--dry-run")
            assert code == 0 and "⚠ HAProxy runs 2 times with" in out, (out, err)
        finally:
            os.killpg(other.pid, signal.SIGKILL)
    wait_for(lambda: est.first_haproxies([proxy.file]) == own, "it is gone")


def test_a_standby_that_dies_during_the_check_gets_no_traffic(
    proxy: Proxy, fleet: Callable[..., Fleet], tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
):
    """`haproxy -c` may take a minute: what was found out before it is old by then."""
    folder = tmp_path_factory.mktemp("bin")
    slow = folder / "haproxy"
    wait = f"*.estelle*) touch {folder}/inside; while [ ! -e {folder}/go ]; do sleep 0.05; done;;"
    slow.write_text(f'#!/bin/sh\ncase "$*" in {wait} esac\nexec {shutil.which("haproxy")} "$@"\n')
    slow.chmod(0o755)
    proxy.start()
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    one = fleet(hosts=1, config={"haproxy": proxy.rule})
    with Load(proxy.port) as load:
        watched = Watched(one, "switch", "green")
        wait_for((folder / "inside").exists, "the check runs")
        proxy.stop_worker("green")
        wait_for(lambda: proxy.statuses()["green"] == "DOWN", "HAProxy notices")
        (folder / "go").touch()
        code = watched.end()
        _, failed = load.end()
    assert code == 5 and "green is DOWN for HAProxy" in watched.out, watched.err
    assert (proxy.statuses()["blue"], failed) == ("UP", {})


def runner_of(folder: Path) -> int | None:
    return next((pid for pid, command in processes_of(folder).items() if " run-job " in command), None)


def test_the_journal_gives_back_every_byte(tmp_path: Path):
    """Whoever takes a dead runner's switch up compares HAProxy's file with it, and writes it back from it."""
    state = est.StateFolder(tmp_path)
    text = bytes(range(256)).decode("latin-1") + "# 데이터\n".encode().decode("latin-1")
    rule: dict[str, Any] = {"reload": ["sh", "-c", "kill\n\tx"]}
    entry = est.SwitchEntry("20261127-040332-0001", rule, "/a\tb", old=text, new=text + "\n\n", states="1\n# be\n")
    est.write_atomic(state.switch_file, est._dump(entry))
    assert vars(state._load(state.switch_file, est.SwitchEntry, exact=True)) == vars(entry)


@pytest.mark.parametrize(
    ("phase", "daemon"),
    [("drain", True), ("write", False), ("reload", True), ("proof", False)],
)
def test_death_at_every_phase_is_finished_or_undone(site: Site, phase: str, daemon: bool):
    fleet, proxy = site.fleet, site.proxy
    with Load(proxy.port) as load:
        watched = Watched(fleet, "switch", "green")
        run = watched.run
        log = fleet.master.state / "runs" / run / "127.0.0.1.log"
        wait_for(lambda: f"{phase}..." in (log.read_text() if log.exists() else ""), f"{phase} begins")
        with suppress(ProcessLookupError):
            if pid := runner_of(fleet.tmp_path):
                os.kill(pid, signal.SIGKILL)
        if daemon:
            fleet.kill(fleet.master)
        assert proxy.roles() in ("blue", "green")
        assert proxy.answers() in ("blue", "green")
        if daemon:
            fleet.start(fleet.master)
        job = wait_state(fleet, run, fleet.master, "succeeded", "failed", "lost", timeout_s=60)
        watched.end()
        site.expect_peace()
        assert proxy.live() == ("green" if job["state"] == "succeeded" else "blue"), job
        _, failed = load.end()
        assert not failed
        if job["state"] != "succeeded":
            assert proxy.file.read_bytes() == site.text


def test_without_the_master_on_haproxys_own_host(site: Site):
    """Only where a person insists: nobody is there to look at the standby's health."""
    fleet = site.fleet
    fleet.stop(fleet.master)
    try:
        code, _, err = site.switch("green")
        assert code == 3
        assert "--force switches without it" in err
        code, out, err = site.switch("green", "--force")
        assert code == 0, (out, err)
        assert "forced by" in out
        assert site.proxy.answers() == "green"
    finally:
        fleet.start(fleet.master)
    site.expect_peace()


@pytest.fixture
def proxy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Proxy]:
    found = Proxy(tmp_path_factory.mktemp("haproxy"))
    try:
        yield found
    finally:
        found.close()


def test_the_fleet_is_asked_first(proxy: Proxy, fleet: Callable[..., Fleet]):
    """Whatever runs or waits on a colour, a standby that is gone or ill: no switch, unless forced past its health."""
    proxy.start()
    hosts = {"127.0.0.1": {"deploy": False}, "127.0.0.2": {"color": "blue"}, "127.0.0.3": {"color": "green"}}
    hold = "while test -e ../hold; do sleep 0.05; done; test -e ../well"
    check = {"name": "flag", "command": ["sh", "-c", hold], "hosts": ["127.0.0.3"]}
    settings = {"haproxy": proxy.rule, "hosts": hosts, "health": [check]}
    one = fleet(hosts=3, command=COMMAND, config=settings)
    text = proxy.file.read_bytes()

    def refused(*words: str) -> None:
        code, out, err = one.cli("switch", *words)
        assert (code, out) == (5, ""), (code, out, err)
        assert proxy.file.read_bytes() == text

    blue, green = one.agents
    refused("green")  # ill
    (green.folder / "well").touch()
    write_script(GATED, blue)
    run = detach(one, blue.address)
    wait_state(one, run, blue, "running")
    refused("green")
    refused("green", "--force")
    open_gate(blue)
    wait_state(one, run, blue, "succeeded")
    (green.folder / "hold").touch()
    both = [Watched(one, "switch", "green") for _ in range(2)]
    wait_for(lambda: sum(hold in each for each in processes_of(one.tmp_path).values()) == 2, "both are judged")
    (green.folder / "hold").unlink()
    codes = sorted(each.end() for each in both)
    assert codes == [0, 5], [each.err for each in both]
    assert one.cli("switch", "blue").code == 0
    text = proxy.file.read_bytes()
    one.stop(green)
    refused("standby")
    code, out, err = one.cli("switch", "green", "--force")
    assert code == 0, (out, err)
    assert "forced by" in out
    record = json.loads((one.runs()[-1] / "run.json").read_text())
    assert record["options"]["force"] is True
    assert proxy.answers() == "green"
    assert one.cli("trigger", "127.0.0.1", "master").code == 4


def test_several_files_and_haproxys_own_environment(
    proxy: Proxy, fleet: Callable[..., Fleet], monkeypatch: pytest.MonkeyPatch
):
    """`-f` with a file and with a folder, settings that only HAProxy's own environment has, roles that it decides."""
    text = proxy.file.read_text()
    head, backend = text.split("\nbackend yquant_backend")
    first = proxy.folder / "first.cfg"
    first.write_text(head.replace("timeout connect 2s", 'timeout connect "${CONNECT}"') + "\n")
    proxy.file = proxy.folder / "conf.d" / "backend.cfg"
    proxy.file.parent.mkdir()
    proxy.file.write_text("backend yquant_backend" + backend)
    monkeypatch.setenv("CONNECT", "2s")
    proxy.start(first, proxy.file.parent)
    monkeypatch.delenv("CONNECT")
    one = fleet(hosts=1, config={"haproxy": proxy.rule})
    code, out, err = one.cli("switch", "green")
    assert code == 0, (out, err)
    assert proxy.answers() == "green"
    proxy.file.write_text("backend yquant_backend" + backend.replace("check cookie blue", 'check "${ROLE}"'))
    code, out, err = one.cli("switch", "blue")
    assert code == 5
    assert "can't be read for certain" in out
    # what another file says holds here too, also for who has no socket to ask at
    proxy.file.write_text("backend yquant_backend" + backend)
    first.write_text(first.read_text().replace("    option redispatch", "    cookie SRV insert\n    option redispatch"))
    code, out, err = one.cli("switch", "blue")
    assert code == 5 and "keeps clients on the old colour" in out, (out, err)
    warnings = json.loads(one.cli("status", "--json").out)["warnings"]
    assert any(f"{first} line" in line for line in warnings), warnings
    assert not any("redispatch" in line for line in warnings), "it is in the first file"


def test_files_that_haproxy_names_from_its_own_folder(proxy: Proxy, monkeypatch: pytest.MonkeyPatch):
    """Relative names, a folder, files after `--`: by its process, by its word alone where that is hidden, by ours."""
    head, backend = proxy.file.read_text().split("\nbackend yquant_backend")
    first, proxy.file = proxy.folder / "first.cfg", proxy.folder / "conf.d" / "10.cfg"
    last = proxy.file.with_name("20.cfg")
    proxy.file.parent.mkdir()
    first.write_text(f"{head}\n")
    proxy.file.write_text(f"backend yquant_backend{backend}")
    last.write_text("backend other\n")
    proxy.file.with_name("old.conf").write_text("no such thing\n")
    proxy.start("first.cfg", "conf.d")
    read = [first, proxy.file, last]

    def files(**changes: Any) -> list[Path]:
        return est.Haproxy(est.HaproxyRule(**(rule | changes))).files()

    rule = {"host": "x", "backend": "yquant_backend", "config": str(proxy.file), "socket": str(proxy.socket)}
    assert files() == files(socket=None) == files(config=(str(first), str(proxy.file))) == read
    with pytest.raises(est.GuardError, match="does not read"):
        files(config=str(proxy.folder / "stray.cfg"))
    # another user sees the command line and not where it works
    [argv] = [argv for argv, where, _ in est.running_haproxy() if where == proxy.folder and "-sf" not in argv][:1]
    monkeypatch.setattr(est.program, "running_haproxy", lambda: iter([(argv, None, 0)]))
    assert files() == files(socket=None) == read
    # another user's process is hidden with `hidepid`, and one in a container is not in our /proc
    monkeypatch.setattr(est.program, "running_haproxy", lambda: iter(()))
    assert files() == read, "by its own word"
    assert files(config=(str(first), str(proxy.file.parent)), socket=None) == read, "by ours"
    with pytest.raises(est.GuardError, match="does not read"):
        files(config=str(proxy.folder / "stray.cfg"))


def test_connections_of_before_follow_every_switch(
    tmp_path_factory: pytest.TempPathFactory, fleet: Callable[..., Fleet]
):
    """They stay with the process that they were opened to, whose drain sends them to the new colour. One that idles
    through two switches gets one more answer from there, as nobody can talk to that process any more."""
    config = CONFIG.replace("http-keep-alive 3s", "http-keep-alive 60s").replace(
        "timeout client 10s", "timeout client 60s"
    )
    proxy = Proxy(tmp_path_factory.mktemp("haproxy"), config)

    def ask(link: socket.socket) -> str:
        link.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        answer = link.recv(65536).decode()
        return answer.rpartition("\r\n\r\n")[2] if " 200 " in answer else answer

    try:
        proxy.start()
        one = fleet(hosts=1, config={"haproxy": proxy.rule})
        links = [socket.create_connection(("127.0.0.1", proxy.port), 10) for _ in range(2)]
        with links[0], links[1]:
            assert [ask(link) for link in links] == ["blue", "blue"]
            assert one.cli("switch", "green").code == 0
            assert ask(links[0]) == "green"
            assert one.cli("switch", "blue").code == 0
            assert ask(links[1]) == "green"
            assert links[1].recv(1) == b""
            assert proxy.answers() == "blue"
    finally:
        proxy.close()


def test_an_undo_that_fails_is_no_refusal(monkeypatch: pytest.MonkeyPatch) -> None:
    """A guard's exit code says that nothing changed; here something did, and stays so."""
    switch = object.__new__(est.Switch)
    switch.note = lambda text: [0, len(text)]

    def fails() -> str:
        raise est.UpdaterError("HAProxy could not start")

    def undo(_: est.Switch) -> bool:
        raise est.GuardError("can't replace haproxy.cfg: No space left on device", "make room")

    monkeypatch.setattr(est.Switch, "phase", lambda _, name, work: work())
    monkeypatch.setattr(est.Switch, "undo", undo)
    with pytest.raises(est.UpdaterError, match=r"could not start; and undoing that: .* No space left") as caught:
        switch.transact({"reload": fails})
    assert caught.value.exit_code == 1 and caught.value.hint == "make room"
