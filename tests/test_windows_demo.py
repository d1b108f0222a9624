"""The whole program on a Windows Python: daemons, runners and commands, by way of the demo."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from tests.fleet import ROOT
from tests.machines import Windows, windows_git


@pytest.mark.timeout(300)
def test_the_demo_tells_its_story(windows_python: Windows, tmp_path: Path, pyz: Path):
    with windows_git(windows_python, tmp_path / "bin") as git:
        code, out, err = windows_python.run(pyz, "demo", env={"WINEPATH": Windows.path(git)}, timeout_s=250)
    assert code == 0, out + err
    out = out.replace("\r\n", "\n")
    for host in ("127.0.0.1", "127.0.0.2", "127.0.0.3"):
        assert f"[{host}] ✓ 완료 v0301_2\n" in out
        # Git through two shells of Wine may take longer than a status waits for the rest of a row
        assert re.search(rf"(?m)^{host}  .*  yes  .*  (✓ v0301_3$|✗ 실패 )", out), out
    assert re.findall(r"\[(.*)\] ✗ 실패 .* \(exit 1\)\n", out) == ["127.0.0.3"], out
    folder = re.findall(r"^A fleet .*\\(estelle-demo-\w+)", out)
    assert [
        name for name in os.listdir(next(windows_python.prefix.glob("drive_c/users/*/Temp"))) if name in folder
    ] == []


POKE = """
import asyncio, json, pathlib, sys
import estelle_updater as updater

class Jobs:  # of a daemon: none, and nothing of theirs has grown
    grown_bytes = 0
    active = list

async def main():
    jobs = Jobs()
    jobs.poked = poked = asyncio.Event()
    loop = asyncio.get_running_loop()
    address = ("127.0.0.1", 0)
    transport, _ = await loop.create_datagram_endpoint(lambda: updater.PokeReceiver(jobs), local_addr=address)
    file = pathlib.Path(sys.argv[1])
    file.write_text(json.dumps({"poke": transport.get_extra_info("sockname")[1]}))
    await asyncio.to_thread(updater.Poke(file))
    await asyncio.wait_for(poked.wait(), 10)
    print("poked")

asyncio.run(main())
"""


def test_the_runner_s_poke_arrives(windows_python: Windows, tmp_path: Path):
    (tmp_path / "script.py").write_text(POKE)
    env = {"PYTHONPATH": Windows.path(ROOT)}
    code, out, err = windows_python.run(tmp_path / "script.py", tmp_path / "daemon.json", env=env)
    assert (code, out.strip(), err) == (0, "poked", "")
