"""The Pythons of this machine, for the tests that run each of them.

python3 tests/pythons.py          say which
python3 tests/pythons.py --json   the same for ESTELLE_TEST_PYTHONS: who has that need not look for them
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

OLDEST = (3, 11)  # that runs the program
ASK = "import sys; print(*sys.version_info[:3], sys.executable)"


def candidates() -> Iterator[Path]:
    """Programs that may be a Python: those of version managers, and what is in PATH."""
    homes = (
        Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv") / "versions",
        Path.home() / ".local/share/uv/python",
        Path("/opt"),
    )
    for home in homes:
        yield from sorted(home.glob("*/bin/python3"))
    for folder in os.get_exec_path():
        yield from sorted(Path(folder).glob("python3*"))


def find_pythons() -> dict[tuple[int, int], str]:
    """The newest of each minor version, by that: those that ESTELLE_TEST_PYTHONS holds, or those that there are."""
    known = os.environ.get("ESTELLE_TEST_PYTHONS")
    if known:
        return {(major, minor): path for major, minor, path in json.loads(known)}
    return look_for_pythons()


def look_for_pythons() -> dict[tuple[int, int], str]:
    """Ask each of them; that takes a second or two of a core."""
    found: dict[tuple[int, int], tuple[int, str]] = {}
    for path in candidates():
        if not path.name.removeprefix("python3").lstrip(".").isdigit() and path.name != "python3":
            continue  # python3-config, and the like
        try:
            done = subprocess.run(
                [path, "-c", ASK], capture_output=True, text=True, timeout=20, stdin=subprocess.DEVNULL
            )
        except (OSError, subprocess.TimeoutExpired):
            continue
        words = done.stdout.split(maxsplit=3)
        if done.returncode or len(words) != 4:
            continue  # a version manager's shim for a version that is not chosen
        major, minor, micro = map(int, words[:3])
        if (major, minor) not in found or found[major, minor][0] < micro:
            found[major, minor] = (micro, words[3].strip())
    return {version: path for version, (_, path) in sorted(found.items())}


def main() -> None:
    found = find_pythons()
    if sys.argv[1:] == ["--json"]:
        print(json.dumps([[*version, path] for version, path in found.items()]))
        return
    for (major, minor), program in found.items():
        use = "runs a deployment" if (major, minor) >= OLDEST else "is told which one is needed"
        print(f"   {major}.{minor} {use}: {program}")


if __name__ == "__main__":
    main()
