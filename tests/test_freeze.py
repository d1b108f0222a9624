"""Freeze windows: days, nights, changes of clocks, by hand, and an order that meets one."""

from __future__ import annotations

import calendar
import json
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests import seam as est
from tests.fleet import Fleet, wait_for


def at(text: str) -> float:
    return calendar.timegm(time.strptime(text, "%Y-%m-%d %H:%M"))


def rule(days: str = "mon-sun", begin: str = "09:00", end: str = "15:30", zone: str = "Asia/Seoul") -> est.FreezeRule:
    config = {"masterUrl": "ws://127.0.0.1:1", "whitelist": [],
              "freeze": [{"name": "market", "days": days, "from": begin, "to": end, "zone": zone}]}  # fmt: skip
    return est.parse_config(json.dumps(config), "updater.json", "json").freeze[0]


@pytest.mark.parametrize(
    ("window", "now", "begins", "ends"),
    [
        # Seoul is nine hours ahead; 2026-11-27 is a Friday
        (rule("mon-fri"), "2026-11-27 05:00", "2026-11-27 00:00", "2026-11-27 06:30"),
        (rule("mon-fri"), "2026-11-27 06:30", "2026-11-30 00:00", "2026-11-30 06:30"),
        (rule("fri-mon"), "2026-11-29 01:00", "2026-11-29 00:00", "2026-11-29 06:30"),
        # over midnight: it began on Friday
        (rule("fri", "22:00", "02:00", "UTC"), "2026-11-28 01:59", "2026-11-27 22:00", "2026-11-28 02:00"),
        (rule("fri", "22:00", "02:00", "UTC"), "2026-11-28 02:00", "2026-12-04 22:00", "2026-12-05 02:00"),
        (rule("sat", "00:00", "24:00", "UTC"), "2026-11-28 23:59", "2026-11-28 00:00", "2026-11-29 00:00"),
        # Berlin's clocks: 2026-03-29 has 23 hours (02:30 is none), 2026-10-25 has 25
        (rule("sun", "01:00", "04:00", "Europe/Berlin"), "2026-03-29 01:30", "2026-03-29 00:00", "2026-03-29 02:00"),
        (rule("sun", "01:00", "04:00", "Europe/Berlin"), "2026-10-25 01:30", "2026-10-24 23:00", "2026-10-25 03:00"),
        (rule("sun", "00:00", "24:00", "Europe/Berlin"), "2026-10-25 22:30", "2026-10-24 22:00", "2026-10-25 23:00"),
        # edges within the hour that is none, and the one that comes twice: rather too long than open
        (rule("sun", "02:30", "03:30", "Europe/Berlin"), "2026-03-29 01:15", "2026-03-29 00:30", "2026-03-29 01:30"),
        (rule("sun", "02:00", "02:30", "Europe/Berlin"), "2026-10-25 01:15", "2026-10-25 00:00", "2026-10-25 01:30"),
        (rule("sun", "01:30", "02:30", "Europe/Berlin"), "2026-10-25 01:15", "2026-10-24 23:30", "2026-10-25 01:30"),
    ],
)
def test_when_a_window_holds(window: est.FreezeRule, now: str, begins: str, ends: str) -> None:
    assert est.freeze_span(window, at(now)) == (at(begins), at(ends))


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"days": "mon-blursday"}, "is no days of the week"),
        ({"from": "9:00"}, "is no time of the day"),
        ({"to": "24:01"}, "is no time of the day"),
        ({"zone": "../etc/passwd"}, "time zone's name"),
        ({"kinds": ["health"]}, "is no choice here"),
    ],
)
def test_what_is_no_window(wrong: dict[str, object], said: str) -> None:
    config = {"masterUrl": "ws://127.0.0.1:1", "whitelist": [], "freeze": [{"name": "x", **wrong}]}
    with pytest.raises(est.ConfigError, match=said):
        est.parse_config(json.dumps(config), "updater.json", "json")


def test_a_zone_that_nobody_knows_holds_rather_than_lets_through(tmp_path: Path) -> None:
    path = tmp_path / "config" / "updater.json"
    path.parent.mkdir()
    window = {"name": "market", "zone": "Nowhere/Atall", "hosts": ["121.0.0.7"]}
    path.write_text(json.dumps({"masterUrl": "ws://127.0.0.1:1", "whitelist": [], "freeze": [window]}))
    state = est.StateFolder(tmp_path / "state")
    state.create()
    freezes = est.Freezes(state, est.ConfigFile(path, state))
    one, other = (est.HostRef(ip, ip, "h", "m", True, None, True) for ip in ("121.0.0.7", "121.0.0.8"))
    with pytest.raises(est.GuardError, match="knows no time zone Nowhere/Atall: install tzdata"):
        freezes.check(est.Kind.DEPLOY, {}, [one, other], "me")
    for kind, options, verb in ((est.Kind.DEPLOY, {"alone": True}, "release"), (est.Kind.SWITCH, {}, "switch")):
        with pytest.raises(est.GuardError, match=f"market holds every {verb} back"):
            freezes.check(kind, options, [one], "me")
    assert freezes.check(est.Kind.DEPLOY, {}, [other], "me") == {}
    assert "Nowhere" in str(freezes.check(est.Kind.DEPLOY, {"force": True}, [one], "me"))


@pytest.mark.parametrize("text", ["", '{"market": {"begi', "[]", '{"market": {"by": "me"}}', '{"market": 1}'])
def test_a_file_of_freezes_that_can_not_be_read_holds_until_somebody_thaws(tmp_path: Path, text: str) -> None:
    """Somebody may have frozen the fleet: it outlives restarts of the master, until a person says what holds."""
    path = tmp_path / "updater.json"
    path.write_text(json.dumps({"masterUrl": "ws://127.0.0.1:1", "whitelist": []}))
    state = est.StateFolder(tmp_path / "state")
    state.create()
    (state.root / "freezes.json").write_text(text)
    config, host = est.ConfigFile(path, state), est.HostRef("h", "h", "h", "m", True, None, True)
    for _ in range(2):
        freezes = est.Freezes(state, config)
        with pytest.raises(est.GuardError, match=r"freezes\.json holds every deploy back: .*thaw"):
            freezes.check(est.Kind.DEPLOY, {}, [host], "me")
    freezes.freeze("market", 60.0, "me")
    assert freezes.thaw("freezes.json", "me") == ["freezes.json"]
    for left in (["market"], []):
        freezes = est.Freezes(state, config)
        assert [one.name for one in freezes.near(time.time())] == left
        if left:
            freezes.thaw("", "me")


def test_nobody_deploys_in_a_freeze(fleet: Callable[..., Fleet]) -> None:
    one = fleet(hosts=1)
    here = one.master.address
    frozen = one.cli("freeze", "market", "--for", "2h")
    assert frozen.code == 0 and "frozen by market until" in frozen.out
    one.restart(one.master)
    refused = one.cli("trigger", here, "master")
    assert refused.code == 5 and "error: market holds every deploy back: frozen by market until" in refused.err
    assert "--force" in refused.err and json.loads(one.cli("history", "--json").out)["runs"] == []
    status = json.loads(one.cli("status", "--json").out)
    assert [row["name"] for row in status["freezes"]] == ["market"] and "frozen by market" in one.cli("status").out
    planned = one.cli("plan", here, "master")
    assert planned.code != 0 and "frozen by market" in planned.out + planned.err
    forced = one.cli("trigger", here, "master", "--force")
    assert forced.code == 0, forced.err
    assert " forces this deploy: frozen by market" in one.master.stderr
    (path,) = one.master.state.glob("runs/*/run.json")
    record = json.loads(path.read_text())
    assert "market" in record["options"]["past_freeze"][0] and record["by"]
    assert one.cli("thaw", "other").code == 4
    assert one.cli("thaw").code == 0
    wait_for(lambda: one.cli("trigger", here, "master").code == 0, "it is over")
    for wrong in ("2", "-1h", "1y", "900d"):
        assert one.cli("freeze", "--for", wrong).code == 2
