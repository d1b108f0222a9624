"""The bench runs, small: what it measures is asserted nowhere, that it measures is."""

from __future__ import annotations

import os
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

from tests.fleet import clean_env, run

BENCH = Path(__file__).parent / "bench" / "run.py"


def test_light_agents_are_welcomed_and_deploy(tmp_path: Path) -> None:
    """Each by the real wire; a table and a picture come of it."""
    picture = tmp_path / "scale.svg"
    program = [os.environ["ESTELLE_TEST_PROGRAM"]] if "ESTELLE_TEST_PROGRAM" in os.environ else []
    argv = [sys.executable, str(BENCH), *program, "--only-scale", "--scale", "5,20", "--svg", str(picture)]
    code, out, err = run(argv, clean_env(tmp_path / "home"), tmp_path, timeout_s=240)
    assert code == 0, err
    assert "| 20 agents welcomed |" in out and "| `trigger all` on 20, exit 0 |" in out, out
    names = [element.tag.rpartition("}")[2] for element in ET.parse(picture).getroot().iter()]
    assert names.count("circle") == 4 and names.count("polyline") == 2
