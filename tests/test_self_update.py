"""A deployment that replaces the very file that runs it, and restarts its daemon, ends with its full log."""

from __future__ import annotations

import os
import shutil
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

from tests.fleet import VERSION, Fleet

ROUNDS = int(os.environ.get("ESTELLE_SELF_ROUNDS", "2"))
COUNT = 200
# Overwritten in place, which is what a careless `cp` does to a running zipapp, then its daemon is killed.
SCRIPT = f"""
i=0; while [ $i -lt {COUNT} ]; do echo line $i; i=$((i+1)); done
cat "$NEW_PYZ" > "$OWN_PYZ"
kill -9 $(cat "$DAEMON_PID")
i=0; while [ $i -lt {COUNT} ]; do echo after $i; i=$((i+1)); done
"""


def test_a_deployment_replaces_its_own_program(fleet: Callable[..., Fleet], tmp_path: Path, pyz: Path) -> None:
    own, new = tmp_path / "estelle_updater.pyz", tmp_path / "new.pyz"
    shutil.copy(pyz, own)
    shutil.copy(pyz, new)
    with zipfile.ZipFile(new, "a") as archive:
        archive.comment = b"another build"
    one = fleet(hosts=2, start=False, program=(sys.executable, str(own)))
    pids = {host.address: tmp_path / f"{host.address}.pid" for host in one.hosts}
    for host in one.hosts:
        one.start(host, env={"NEW_PYZ": str(new), "OWN_PYZ": str(own), "DAEMON_PID": str(pids[host.address])})
    one.origin.commit({"deploy.sh": SCRIPT})
    expected = [f"line {i}" for i in range(COUNT)] + [f"after {i}" for i in range(COUNT)]
    for _ in range(ROUNDS):
        for host in one.hosts:
            assert host.process
            process = host.process
            pids[host.address].write_text(str(process.pid))
            watcher = one.popen("trigger", host.address, "master", host=one.hosts[0])
            process.wait(60)  # the deployment kills its daemon
            one.start(host, env={"NEW_PYZ": str(new), "OWN_PYZ": str(own), "DAEMON_PID": str(pids[host.address])})
            out, err = watcher.communicate(timeout=60)
            assert watcher.returncode == 0, (out, err)
            lines = [line.removeprefix(f"[{host.address}] ") for line in out.decode().splitlines()]
            assert [line for line in lines if line.startswith(("line", "after"))] == expected
            assert f"✓ 완료 {VERSION}" in lines
            one.wait_online()
