"""From the TypeScript updater's configuration to a green deployment: its file, its environment, its steps."""

from __future__ import annotations

import json
from collections.abc import Callable

from tests.fleet import Fleet

PASSWORD = "hunter2-hunter2"


def test_the_older_configuration_becomes_a_green_deployment(fleet: Callable[..., Fleet]) -> None:
    one = fleet(hosts=1, start=False)
    old = {
        "masterUrl": one.url,
        "machines": {
            "127.0.0.1": {"environmentFile": "environments.office.json"},
            "127.0.0.9": {"environmentFile": "gone.json"},
        },
    }
    nested = {"db": {"password": PASSWORD, "certs": ["~/certs/a"]}, "data": "~/data", "port": 1}
    one.origin.commit({"config/updater.json": json.dumps(old), "config/environments.office.json": json.dumps(nested)})
    one.origin.git("pull", "--quiet", cwd=one.master.repo)
    converted = one.cli("config", "convert")
    assert converted.code == 0, converted.err
    assert "there is no config/gone.json here; that host needs it" in converted.out
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
