"""Makes the README's picture of the page, tests/page.png: python -m tests.page_picture [FOLDER]

With a folder, all views go there instead, in light and dark and as a phone shows them, for a person to look at.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from tests.browser import PHONE, Browser
from tests.fleet import ROOT, Fleet
from tests.haproxy import Proxy

PICTURE = ROOT / "tests" / "page.png"
SIZE = (900, 690)
BUILD = """echo "$ next build"
for i in $(seq 60); do printf '\\033[32m✓\\033[0m compiled /page%s in %s ms\\n' $i $((i * 7 % 90)); done
"""
FAILS = (
    BUILD
    + """printf 'src/app/checkout/page.tsx:14:7 - \\033[31merror\\033[0m TS2322: string is no number.\\n\\n'
echo "14   amount: total,"; echo "     ~~~~~~"; echo " ELIFECYCLE  Command failed with exit code 1."; exit 1
"""
)
WAITS = BUILD + "while [ ! -e ../go ]; do sleep 0.1; done\n"


def make_fleet(folder: Path, proxy: Proxy) -> Fleet:
    """Four hosts with HAProxy on the first; a run that worked, then one that failed on one host."""
    names = {"127.0.0.2": "yq-blue", "127.0.0.3": "yq-green", "127.0.0.4": "office"}
    hosts: dict[str, dict[str, object]] = {address: {"name": name} for address, name in names.items()}
    hosts["127.0.0.2"]["color"], hosts["127.0.0.3"]["color"] = "blue", "green"
    hosts["127.0.0.1"] = {"name": "yq-data"}
    one = Fleet(folder, 4, ("sh", "../deploy.sh"), {"hosts": hosts, "haproxy": proxy.rule})
    one.start()
    for script, version in ((BUILD, "v0301_4"), (FAILS, "v0301_5")):
        one.origin.commit({"config/version.json": f'{{"version": "{version}"}}'}, message=f"Prices, {version}")
        for host in one.hosts:
            chosen = script if host is one.hosts[3] else BUILD
            (host.folder / "deploy.sh").write_text(f"{chosen}echo done {version}\n")
        one.cli("trigger", "all", "master")
    return one


def take_all(one: Fleet, tab: Browser, folder: Path) -> None:
    """Every view, in three looks."""
    bad = one.runs()[-1].name
    for host in one.hosts:
        (host.folder / "deploy.sh").write_text(WAITS)
    running = one.cli("trigger", "127.0.0.2,127.0.0.4", "master", "--detach").out.strip()
    views = {
        "fleet": "#fleet",
        "run": f"#run/{bad}",
        "running": f"#run/{running}",
        "log": f"#log/{bad}/127.0.0.4",
        "history": "#history",
        "traffic": "#traffic",
        "deploy": "#history",
        "cancel": f"#run/{running}",
    }
    for look, size, dark in (("light", (1280, 800), False), ("dark", (1280, 800), True), ("phone", PHONE, False)):
        tab.look(size, dark=dark)
        for name, place in views.items():
            tab.open(one.url.replace("ws:", "http:") + "/" + place)
            tab.settle(1.0)
            if name == "deploy":
                tab.js("openDialog({kind: 'deploy'}), makePlan()")
            if name == "cancel":
                tab.js("openDialog({kind: 'cancel', run: state.run.run, what: 'deploy master on all'})")
            tab.settle(0.7)
            tab.picture(folder / f"{look}-{name}.png")


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "proxy").mkdir()
        (folder / "fleet").mkdir()
        proxy = Proxy(folder / "proxy").start()
        one = None
        try:
            one = make_fleet(folder / "fleet", proxy)
            with Browser(one.env, SIZE) as tab:
                if sys.argv[1:]:
                    take_all(one, tab, Path(sys.argv[1]))
                    return
                tab.open(one.url.replace("ws:", "http:") + "/")
                tab.wait("document.querySelector('.excerpt .at')")
                tab.settle(1.0)
                tab.picture(PICTURE)
        finally:
            if one:
                one.stop_all()
            proxy.close()


if __name__ == "__main__":
    main()
