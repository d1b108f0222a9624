"""The bench runs, small: it measures, and by what it measures the master never stands still."""

from __future__ import annotations

import os
import re
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

from tests.fleet import clean_env, run

BENCH = Path(__file__).parent / "bench" / "run.py"
PROGRAM = [os.environ["ESTELLE_TEST_PROGRAM"]] if "ESTELLE_TEST_PROGRAM" in os.environ else []


def test_light_agents_are_welcomed_and_deploy(tmp_path: Path) -> None:
    """Each by the real wire, beside a bare server; a table and a picture come of it, and of recorded runs."""
    picture = tmp_path / "scale.svg"
    sizes = ["--scale", "5,20", "--runs", "3,9", "--svg", str(picture)]
    argv = [sys.executable, str(BENCH), *PROGRAM, "--once", "--only-scale", "--hosts", "3", *sizes]
    code, out, err = run(argv, clean_env(tmp_path / "home"), tmp_path, timeout_s=240)
    assert code == 0, err
    assert re.search(r"\| no-op deployment, 3 hosts at once \| 3 shells [\d.]+ ms \| [\d.]+ ms \|", out), out
    assert "| status, 3 hosts | python -c pass " in out
    assert "| 20 agents welcomed | bare websockets" in out, out
    assert "| `trigger all` on 20, exit 0 | bare websockets" in out and "| start, 9 recorded runs" in out, out
    names = [element.tag.rpartition("}")[2] for element in ET.parse(picture).getroot().iter()]
    assert names.count("polyline") == 7, "two lines of the master, two of the floor, three of recorded runs"
    assert names.count("circle") == 14


def test_the_master_never_stands_still_while_many_hosts_write(tmp_path: Path) -> None:
    """Many hosts of 1,000 lines a second, and a commander that is shown all of them."""
    argv = [sys.executable, str(BENCH), *PROGRAM, "--only-scale", "--hosts", "0", "--stalls", "40,1000,2"]
    code, out, err = run(argv, clean_env(tmp_path / "home"), tmp_path, timeout_s=240)
    assert code == 0, err
    found = re.search(r"lines/s \|  \| (\d+) ms of \d+ by the clock \| ([\d,]+) of ([\d,]+) lines", out)
    assert found, out
    stall_ms, shown, written = (int(text.replace(",", "")) for text in found.groups())
    assert 0 < stall_ms < 500 and shown == written == 80_000, found[0]


def test_what_passes_is_not_kept_in_memory(tmp_path: Path) -> None:
    """Of 200 MB nothing stays with master, agent or command; the whole measurement is one of 10 GB."""
    argv = [sys.executable, str(BENCH), *PROGRAM, "--only-scale", "--hosts", "0", "--gigabytes", "0.2"]
    code, out, err = run(argv, clean_env(tmp_path / "home"), tmp_path, timeout_s=240)
    assert code == 0, err
    found = re.findall(r"(?m)^memory of the (\w+), 0\.2 GB pass \| \d+ MB \| \d+ MB \| \+ (-?[\d.]+) MB", out)
    assert [name for name, _ in found] == ["command", "master", "agent"], out
    assert all(float(grown) < 64 for _, grown in found), found
