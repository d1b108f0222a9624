"""From the TypeScript updater's configuration to a green deployment: its file, its environment, its steps."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

from tests.fleet import Fleet, run

PASSWORD = "hunter2-hunter2"


def test_the_older_configuration_becomes_a_green_deployment(fleet: Callable[..., Fleet]) -> None:
    one = fleet(hosts=1, start=False)
    old = {
        "masterUrl": one.url,
        "machines": {
            "127.0.0.1": {"environmentFile": "environments.office.json"},
            "127.0.0.9": {"environmentFile": "gone.json"},
            "127.0.0.8": {"environmentFile": "~/at-home.json"},
        },
    }
    at_home = Path(one.env["HOME"], "at-home.json")
    at_home.write_text('{"WHENCE": "from home", "ESTELLE_ENV_CONFIG": "a text"}')
    nested = {"db": {"password": PASSWORD, "certs": ["~/certs/a"]}, "data": "~/data", "port": 1}
    one.origin.commit({"config/updater.json": json.dumps(old), "config/environments.office.json": json.dumps(nested)})
    one.origin.git("pull", "--quiet", cwd=one.master.repo)
    wrong = json.loads(json.dumps(old))
    wrong["machines"]["127.0.0.1"]["comment"] = wrong["machines"]["127.0.0.9"]["remark"] = "x"
    one.master.config.write_text(json.dumps(wrong))
    refused = one.cli("config", "convert")
    assert refused.code == 2 and json.loads(one.master.config.read_text()) == wrong
    assert [key for key in ("comment", "remark") if key not in refused.out + refused.err] == [], refused.err
    one.master.config.write_text(json.dumps(old))
    converted = one.cli("config", "convert")
    assert converted.code == 0, converted.err
    assert "there is no config/gone.json here; that host needs it" in converted.out
    assert "at-home.json" not in converted.out, "`~/` is this user's home, and it is there"
    assert "! the steps are not in this file" in converted.out
    (line,) = re.findall(r"(?m)^next: (git add .*) && git push$", converted.out)
    typed = run(["/bin/sh", "-c", line], one.env, one.master.repo)
    assert typed.code == 0, typed.err
    one.origin.git("reset", "--quiet", "HEAD~1", cwd=one.master.repo)
    new = json.loads(one.master.config.read_text())
    assert new["hosts"]["127.0.0.1"] == {"environmentFile": "config/environments.office.json"}
    assert one.cli("config", "check").code == 0
    # its steps, each announced by itself; the one that fails is named, and none comes after it
    steps = [["sh", "-c", "echo installed"], ["sh", "build.sh"], ["sh", "-c", "echo released"]]
    build = 'echo "$ESTELLE_ENV_CONFIG"\n'
    files = {"config/updater.json": json.dumps(new | {"deploy": {"command": steps}}), "build.sh": build}
    one.origin.commit(files)
    one.origin.git("checkout", "--quiet", ".", cwd=one.master.repo)
    one.origin.git("pull", "--quiet", cwd=one.master.repo)
    one.start(one.master)
    done = one.cli("trigger", "all", "master")
    assert done.code == 0, done.err + done.out
    lines = [line.removeprefix("[127.0.0.1] ") for line in done.out.splitlines()]
    said = lines.index("sh build.sh...") + 1
    assert lines.index("sh -c echo installed...") < said < lines.index("sh -c echo released...")
    home = one.env["HOME"]
    assert PASSWORD not in done.out, "a secret is one at any depth"
    assert json.loads(lines[said].replace("***", PASSWORD)) == {
        "db": {"password": PASSWORD, "certs": [f"{home}/certs/a"]}, "data": f"{home}/data", "port": 1
    }  # fmt: skip
    one.origin.commit({"build.sh": "exit 7\n"})
    failed = one.cli("trigger", "all", "master")
    assert failed.code == 1 and "✗ 실패 sh build.sh (exit 7)" in failed.out and "released" not in failed.out
    # each is timed by itself, in the log and in JSON; and has the whole of deploy.timeout, not what others left of it
    assert [re.fullmatch(r"sh build\.sh: \d+\.\d s", line) is not None for line in lines[said + 1 :]].count(True) == 1
    one.origin.commit({"build.sh": "sleep 1.2\n"})
    events = [json.loads(line) for line in one.cli("trigger", "all", "master", "--json").out.splitlines()]
    (result,) = (event for event in events if event["event"] == "result")
    times = {step["step"]: step["seconds"] for step in result["steps"]}
    assert list(times)[-3:] == ["sh -c echo installed", "sh build.sh", "sh -c echo released"]
    assert times["sh build.sh"] >= 1.2 > times["sh -c echo installed"] > 0
    assert list(times)[:2] == ["git fetch origin", "git checkout master"]
    # a file at home, which is in no clone
    new["hosts"]["127.0.0.1"]["environmentFile"] = "~/at-home.json"
    files = {"config/updater.json": json.dumps(new | {"deploy": {"command": steps}}), "build.sh": 'echo "$WHENCE"\n'}
    one.origin.commit(files)
    planned = one.cli("plan", "all", "master")
    assert (planned.code, "at-home.json" in planned.err) == (0, False), planned.out + planned.err
    done = one.cli("trigger", "all", "master")
    assert done.code == 0 and "[127.0.0.1] from home\n" in done.out, done.err + done.out


def test_master_and_agents_run_what_their_role_says(fleet: Callable[..., Fleet]) -> None:
    """In a run, by hand, in a plan and in `config show`: the same."""
    steps = [["sh", "-c", "echo built"], ["sh", "-c", "echo on the $WHO"]]
    by_role = {
        "master": {"env": {"WHO": "master"}, "command": steps},
        "agent": {"env": {"WHO": "agent"}, "command": [*steps, ["sh", "a.sh"]]},
    }
    # what runs nowhere need not be there
    one = fleet(hosts=2, config={"deploy": {"command": ["no-such-program"], **by_role}})
    one.origin.commit({"a.sh": "echo only agents\n"})
    plan = {row["host"]: row["command"] for row in json.loads(one.cli("plan", "all", "master", "--json").out)["hosts"]}
    common = "sh -c echo built; sh -c echo on the $WHO"
    assert plan == {"127.0.0.1": common, "127.0.0.2": f"{common}; sh a.sh"}
    done = one.cli("trigger", "all", "master")
    assert done.code == 0, done.out + done.err
    assert "[127.0.0.1] on the master\n" in done.out and "[127.0.0.1] only" not in done.out
    assert "[127.0.0.2] on the agent\n" in done.out and "[127.0.0.2] only agents\n" in done.out
    for host, words in ((one.master, "on the master"), (one.agents[0], "only agents")):
        by_hand = one.cli("deploy", "master", host=host)
        assert by_hand.code == 0 and words in by_hand.out, by_hand.out + by_hand.err
        shown = json.loads(one.cli("config", "show", "--json", host=host).out)
        role = "master" if host is one.master else "agent"
        assert shown["env"] == {"value": "WHO", "from": f"[deploy.{role}]"}
        assert shown["command"] == {"value": plan[host.address], "from": f"[deploy.{role}]"}
    one.stop(one.master)
    alone = one.cli("deploy", "master")
    assert alone.code == 0 and "on the master" in alone.out, "no daemon has to say the role"


def test_each_of_several_commands_has_the_whole_time_limit(fleet: Callable[..., Fleet]) -> None:
    """Together they may take longer; one that takes longer is named."""
    steps = [["sh", "-c", "sleep 2"], ["sh", "slow.sh"], ["sh", "-c", "echo never"]]
    one = fleet(hosts=1, config={"deploy": {"command": steps, "timeout": 3}})
    one.origin.commit({"slow.sh": "sleep 2\n"})
    assert one.cli("trigger", "all", "master").code == 0
    one.origin.commit({"slow.sh": "sleep 20\n"})
    late = one.cli("trigger", "all", "master")
    assert late.code == 1 and "✗ 시간 초과 sh slow.sh" in late.out and "echo never..." not in late.out
