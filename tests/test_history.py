"""What is recorded can be read with the master, without it, on an agent; the configuration is followed live."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.fleet import VERSION, Fleet, Host, wait_for

MakeFleet = Callable[..., Fleet]


def history(fleet: Fleet, host: Host | None = None) -> list[dict[str, Any]]:
    result = fleet.cli("history", "--json", host=host)
    assert result.code == 0, result.err
    runs: list[dict[str, Any]] = json.loads(result.out)["runs"]
    return runs


def test_history_and_logs_with_and_without_the_master(fleet: MakeFleet) -> None:
    one = fleet(hosts=2)
    agent = one.agents[0]
    assert one.cli("trigger", "all", "master").code == 0
    one.origin.commit({"deploy.sh": "echo broken; exit 3\n"})
    failed = one.cli("trigger", agent.address, "master")
    assert failed.code == 1 and "✗ 실패 sh deploy.sh (exit 3)" in failed.out

    newest, first = history(one)
    assert [host["state"] for host in newest["hosts"]] == ["failed"]
    assert [(host["host"], host["version"]) for host in first["hosts"]] == [
        ("127.0.0.1", VERSION), ("127.0.0.2", VERSION),
    ]  # fmt: skip
    assert history(one, agent) == [newest, first], "any commander sees the same"
    assert len(json.loads(one.cli("history", "-n", "1", "--json").out)["runs"]) == 1
    table = one.cli("history").out
    assert str(newest["run"]) in table and f"127.0.0.1 ✓ {VERSION}" in table and "✗ failed sh deploy.sh" in table
    shown = one.cli("logs", str(first["run"])).out
    assert one.cli("logs", str(first["run"]), agent.address).out.count("✓") == 1

    one.restart(one.master)
    one.wait_online()
    rows = json.loads(one.cli("status", "--json").out)["hosts"]
    assert [(row["last"]["run"], row["last"]["ok"]) for row in rows] == [(first["run"], True), (newest["run"], False)]
    assert "✗ failed sh deploy.sh" in one.cli("status").out, "a new commit alone is no success"

    one.stop(one.master)
    offline = one.cli("logs", str(first["run"]))
    assert (offline.code, sorted(offline.out.splitlines())) == (0, sorted(shown.splitlines()))
    assert "can't reach the master" in offline.err
    assert [run["run"] for run in history(one)] == [newest["run"], first["run"]]
    own = history(one, agent)
    assert [run["run"] for run in own] == [newest["run"], first["run"]], "an agent knows its own jobs"
    assert [host["host"] for host in own[1]["hosts"]] == [agent.address]


def test_a_deployment_by_hand_is_adopted_by_the_master(fleet: MakeFleet) -> None:
    one = fleet(hosts=2, start=False)
    agent = one.agents[0]
    one.origin.commit({"deploy.sh": "echo by hand\n"})
    alone = one.cli("deploy", "master", host=agent)
    assert alone.code == 0 and f"✓ 완료 {VERSION}" in alone.out and "by hand" in alone.out, alone.err
    assert one.cli("deploy", "no-such-branch", host=agent).code == 1
    one.start()
    wait_for(lambda: len(history(one)) == 2, "the master knows both runs")
    second = one.cli("deploy", "master", host=agent)
    assert second.code == 0, second.err
    wait_for(lambda: len(history(one)) == 3 and history(one)[0]["hosts"][0]["ok"], "and the third")
    run = str(history(one)[0]["run"])
    assert "by hand" in one.cli("logs", run).out


def test_a_host_that_a_job_holds_takes_no_second(fleet: MakeFleet) -> None:
    one = fleet(hosts=2)
    agent = one.agents[0]
    go = one.tmp_path / "go"
    one.origin.commit({"deploy.sh": f"echo waiting; while [ ! -e {go} ]; do sleep 0.05; done\n"})
    detached = one.cli("trigger", agent.address, "master", "--detach")
    run = detached.out.strip()
    wait_for(lambda: "waiting" in one.cli("logs", run).out, "the job runs")
    refused = one.cli("deploy", "master", host=agent)
    assert refused.code == 5 and run in refused.err and "Traceback" not in refused.err
    go.touch()
    assert one.cli("logs", run, "-f").code == 0


def test_forget(fleet: MakeFleet) -> None:
    one = fleet(hosts=2)
    agent = one.agents[0]
    online = one.cli("forget", agent.address)
    assert online.code == 5 and "online" in online.err
    one.stop(agent)
    assert one.cli("forget", "127.0.0.9").code == 4
    wait_for(lambda: one.cli("forget", agent.address).code == 0, "the host is offline and forgotten")
    assert one.cli("trigger", "all", "master").code == 0, "all is the master alone"
    one.start(agent)
    assert agent.address in one.cli("status").out, "a host that comes back is known again"


def edit(config: Path, **changes: object) -> None:
    config.write_text(json.dumps(json.loads(config.read_text()) | changes))


def test_the_configuration_is_followed_live(fleet: MakeFleet) -> None:
    one = fleet(hosts=2, start=False)
    whitelist = ["127.0.0.1"]
    edit(one.master.config, whitelist=whitelist)
    one.start(one.master)
    agent = one.agents[0]
    one.spawn(agent)
    wait_for(lambda: "refused" in agent.stderr and "127.0.0.2" in agent.stderr, "the agent is refused, and told why")
    edit(one.master.config, whitelist=[*whitelist, "127.0.0.2"])
    wait_for(lambda: "new settings" in one.master.stderr, "the new entry counts")
    one.restart(agent)
    edit(one.master.config, whitelist=whitelist)
    wait_for(lambda: "no longer on the whitelist" in one.master.stderr, "a removed entry cuts the link")

    good = one.master.config.read_text()
    one.master.config.write_text("{")
    wait_for(
        lambda: json.loads(one.cli("status", "--json", host=agent, bind="127.0.0.1").out)["master"]["problem"], "told"
    )
    one.master.config.unlink()
    assert one.cli("status", host=agent, bind="127.0.0.1").code == 0, "a missing file keeps the old settings"
    one.master.config.write_text(good)
    wait_for(
        lambda: not json.loads(one.cli("status", "--json", bind="127.0.0.1").out)["master"]["problem"],
        "all is well again",
    )


def test_a_branch_without_configuration_can_be_left_again(fleet: MakeFleet) -> None:
    """Regression: the job before the repair must not need what the repair brings."""
    one = fleet(hosts=1)
    good = one.origin.commit({"a.txt": "1"})
    config = one.master.config.read_text()
    one.origin.commit({"config/updater.json": None}, message="oops")
    broken = one.cli("trigger", "all", "master")
    assert broken.code == 1 and "✗ 실패 config" in broken.out, broken.out
    one.origin.commit({"config/updater.json": config}, message="repair")
    repaired = one.cli("trigger", "all", "master", env={"ESTELLE_CONFIG": str(_copy(one, config))})
    assert repaired.code == 0, repaired.out + repaired.err
    one.stop(one.master)
    assert good


def _copy(fleet: Fleet, text: str) -> Path:
    path = fleet.tmp_path / "config" / "updater.json"
    path.parent.mkdir()
    path.write_text(text)
    return path


def test_a_whitelist_that_shuts_out_the_commander_is_warned_of(fleet: MakeFleet) -> None:
    one = fleet(hosts=2)
    config = json.loads(one.agents[0].config.read_text()) | {"whitelist": ["127.0.0.1"]}
    one.origin.commit({"config/updater.json": json.dumps(config)})
    run = one.cli("trigger", "127.0.0.1", "master", host=one.agents[0])
    assert "warning: the whitelist has no entry for 127.0.0.2, where this run was asked for" in run.out
    wait_for(lambda: "no longer on the whitelist" in one.master.stderr, "it takes effect")
