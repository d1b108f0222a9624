"""Makes the README's picture of the terminal, tests/terminal.png: python -m tests.terminal_picture [FOLDER]

With a folder, the block at three sizes and the end of the run go there instead, for a person to look at.
"""

from __future__ import annotations

import html
import sys
import tempfile
from pathlib import Path

from tests.browser import Browser
from tests.fleet import ROOT, Fleet
from tests.seam import count_cells
from tests.terminal import Terminal

PICTURE = ROOT / "tests" / "terminal.png"
SIZE = (80, 17)
CELL = 8
COLOURS = {"red": "#ff7b72", "green": "#3fb950", "brown": "#d29922", "blue": "#79c0ff", "magenta": "#d2a8ff"}
COLOURS |= {"cyan": "#56d4dd", "default": "#e6edf3"}
HEAD = "<meta charset=utf-8><meta name=viewport content='width=device-width'>"
STYLE = "margin:0;padding:12px 14px;background:#0d1117;font:15px/19px NanumGothicCoding,monospace"
BUILD = """echo "$ next build"; for i in 1 2 3; do echo "compiled /page$i in $((i * 17 % 90)) ms"; done
case $PWD in *host3*) echo "src/app/checkout/page.tsx:14:7 - error TS2322: string is no number."
echo " ELIFECYCLE  Command failed with exit code 1."; exit 1;; esac
while [ ! -e ../go ]; do sleep 0.1; done
"""


def as_html(terminal: Terminal) -> str:
    """What stands on the screen, with its colours."""
    rows = []
    for at in range(terminal.screen.lines):
        row = ""
        for column in range(terminal.screen.columns):
            cell = terminal.screen.buffer[at][column]
            if cell.data:  # nothing is the second half of a wide letter
                look = f"display:inline-block;width:{CELL * count_cells(cell.data)}px;color:{COLOURS[cell.fg]}"
                row += f"<span style='{look}'>{html.escape(cell.data)}</span>"
        rows.append(row)
    return f"{HEAD}<body style=\"{STYLE}\"><pre style='margin:0;font:inherit'>" + "\n".join(rows)


def take(tab: Browser, terminal: Terminal, folder: Path, picture: Path) -> None:
    """A picture of what stands on a terminal's screen."""
    (folder / "screen.html").write_text(as_html(terminal))
    tab.look((28 + CELL * terminal.screen.columns, 24 + 19 * terminal.screen.lines))
    tab.open(f"file://{folder}/screen.html")
    tab.settle()
    tab.picture(picture)


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        one = Fleet(folder / "fleet", 3, ("sh", "deploy.sh"))
        try:
            one.origin.commit({"deploy.sh": BUILD}, message="Prices")
            one.start()
            with Browser(one.env) as tab:
                wanted = sys.argv[1:]
                out = Path(wanted[0]) if wanted else folder
                for columns, lines in ((80, 24), (200, 60), (30, 6)) if wanted else (SIZE,):
                    argv, env, cwd = one._command(["trigger", "all", "master"], None, None, None)
                    terminal = Terminal(argv, env, cwd, columns, lines)
                    quiet = "quiet 0:07" if columns > 30 else "2 running"
                    terminal.until(lambda: any(quiet in row for row in terminal.shown()), "the block")  # noqa: B023
                    take(tab, terminal, folder, out / f"block-{columns}.png" if wanted else PICTURE)
                    for host in one.hosts:
                        (host.folder / "go").touch()
                    terminal.wait()
                    if wanted:
                        take(tab, terminal, folder, out / f"end-{columns}.png")
                    terminal.close()
                    for host in one.hosts:
                        (host.folder / "go").unlink()
        finally:
            one.stop_all()


if __name__ == "__main__":
    main()
