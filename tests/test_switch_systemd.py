"""The data node's service as its unit file has it: an ordinary user that may reload HAProxy, and nothing else."""

from __future__ import annotations

import json
import re
import shutil
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fleet import ROOT, Result, need, run, unavailable, wait_for
from tests.haproxy import WORKER, ask
from tests.systemd_lab import PYTHON, Lab

pytestmark = pytest.mark.xdist_group("systemd")
UNIT, RULES = "estelle-updater-haproxy.service", "estelle-updater-haproxy.rules"
CONFIG = """\
global
    log /dev/log local0
    chroot /var/lib/haproxy
    stats socket /run/haproxy/admin.sock user haproxy group haproxy mode 660 level admin expose-fd listeners
    server-state-file /etc/haproxy/server-state
    hard-stop-after 30s
    user haproxy
    group haproxy
defaults
    mode http
    timeout connect 2s
    timeout client 10s
    timeout server 10s
    timeout http-keep-alive 3s
    option redispatch
    option idle-close-on-response
    load-server-state-from-file global
frontend outside
    bind 127.0.0.1:443 ssl crt /etc/haproxy/both.pem
    default_backend yquant_backend
backend yquant_backend
    option httpchk GET /
    server blue 127.0.0.1:6001 check inter 500
    server green 127.0.0.1:6002 check backup inter 500
"""
SETTINGS = {
    "masterUrl": "ws://127.0.0.1:9900",
    "whitelist": ["127.0.0.1"],
    "hosts": {"127.0.0.1": {"deploy": False}},
    "haproxy": {
        "host": "127.0.0.1", "backend": "yquant_backend", "socket": "/run/haproxy/admin.sock",
        "masterSocket": "/run/haproxy-master.sock", "probe": "https://127.0.0.1/",
    },
}  # fmt: skip


class DataNode:
    """A lab with Debian's HAProxy service, two workers, and the updater's service from the repository's unit file."""

    def __init__(self, lab: Lab) -> None:
        self.lab = lab
        lab.ok("useradd", "--system", "--groups", "haproxy", "estelle")
        lab.ok("mkdir", "-p", "/srv/estelle/config", "/run/haproxy")
        lab.write("/srv/estelle/config/updater.json", json.dumps(SETTINGS))
        lab.write("/etc/haproxy/haproxy.cfg", CONFIG, 0o640)
        lab.ok("sh", "-c", "cd /etc/haproxy && openssl req -x509 -newkey rsa:2048 -nodes -subj /CN=x -keyout k -out c "
                           "2>/dev/null && cat c k >both.pem && chmod 600 both.pem && rm c k")  # fmt: skip
        lab.ok("chown", "-R", "estelle:", "/etc/haproxy", "/srv/estelle")
        lab.write("/etc/default/haproxy", 'EXTRAOPTS="-S /run/haproxy-master.sock,group,haproxy,mode,660"\n')
        lab.write("/opt/worker.py", WORKER)
        worker = "[Service]\nExecStart={} /opt/worker.py {} {}\n"
        for color, port in (("blue", 6001), ("green", 6002)):
            lab.write(f"/etc/systemd/system/{color}.service", worker.format(PYTHON, color, port))
        lab.write(f"/etc/systemd/system/{UNIT}", (ROOT / "systemd" / UNIT).read_text())
        lab.systemctl("daemon-reload")
        for unit in ("blue", "green", "haproxy", UNIT):
            code, out, err = lab.systemctl("start", unit)
            assert code == 0, out + err + lab.journal("-n", "60")
        wait_for(lambda: self.answers() == "blue", lambda: self.answers() + lab.journal("-n", "60"))
        wait_for(lambda: len(re.findall(",UP,", self.stat())) == 3, self.stat)  # two servers, and the backend

    def answers(self) -> str:
        return self.lab.run("curl", "-sk", "--max-time", "5", "https://127.0.0.1/").out

    def stat(self) -> str:
        lines = ask(self.lab.path("/run/haproxy/admin.sock"), "show stat").splitlines()
        return "\n".join(line for line in lines if line.startswith("yquant_backend"))

    def text(self) -> str:
        return self.lab.path("/etc/haproxy/haproxy.cfg").read_text()

    def switch(self, color: str) -> Result:
        words = ("env", "-C", "/srv/estelle", PYTHON, "/opt/estelle-updater/estelle_updater.pyz", "switch", color)
        return self.lab.run(*words, timeout_s=100)

    def allow(self) -> None:
        self.lab.write(f"/etc/polkit-1/rules.d/{RULES}", (ROOT / "systemd" / RULES).read_text())
        self.lab.systemctl("restart", "polkit")


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory, pyz: Path) -> Iterator[DataNode]:
    need("haproxy", "curl", "openssl", "pkaction")
    if not Path(PYTHON).exists() or run([PYTHON, "-c", "import sys; sys.exit(sys.version_info < (3, 11))"], {}).code:
        unavailable(f"no {PYTHON} of 3.11 or newer")
    program = tmp_path_factory.mktemp("program")
    program.chmod(0o755)
    shutil.copy(pyz, program / "estelle_updater.pyz")
    with Lab(tmp_path_factory.mktemp("lab"), binds={program: "/opt/estelle-updater"}) as lab:
        yield DataNode(lab)


def test_without_the_right_to_reload_the_gate_refuses_and_with_it_the_traffic_moves(node: DataNode):
    code, out, err = node.switch("green")
    assert code == 5, out + err + node.lab.journal("-n", "60")
    assert "no right to systemctl reload haproxy" in out
    assert RULES in out
    assert node.text() == CONFIG
    node.allow()
    code, out, err = node.switch("green")
    assert code == 0, out + err + node.lab.journal("-n", "60")
    assert node.answers() == "green"
    stat = node.lab.path("/etc/haproxy/haproxy.cfg").stat()
    assert stat.st_mode & 0o7777 == 0o640
    assert node.lab.ok("stat", "-c", "%U", "/etc/haproxy/haproxy.cfg").strip() == "estelle"
    code, out, err = node.switch("standby")
    assert code == 0, out + err
    assert node.answers() == "blue"
    assert node.text() == CONFIG
    assert node.lab.show("haproxy", "NRestarts") == "0"


def test_the_file_must_be_the_services_own(node: DataNode):
    node.allow()
    node.lab.ok("chown", "root:", "/etc/haproxy/haproxy.cfg")
    node.lab.ok("chmod", "644", "/etc/haproxy/haproxy.cfg")
    code, out, err = node.switch("green")
    node.lab.ok("chown", "estelle:", "/etc/haproxy/haproxy.cfg")
    assert code == 5, out + err
    assert "chown" in out
    assert node.text() == CONFIG
    assert node.answers() == "blue"


def test_nothing_else_is_allowed(node: DataNode):
    """In the service's own sandbox, by the user that it runs as."""
    node.allow()
    script = textwrap.dedent("""\
        for words in "systemctl restart haproxy" "systemctl stop haproxy" "systemctl reload dbus" \\
            "touch /srv/estelle/x" "touch /etc/x" "touch /var/lib/x" "cat /etc/shadow"; do
          $words >/dev/null 2>&1 && echo "allowed: $words"
        done
        touch /etc/haproxy/x && rm /etc/haproxy/x && haproxy -c -q -f /etc/haproxy/haproxy.cfg && echo able
        systemctl reload haproxy && echo reloads
        """)
    node.lab.write("/opt/try.sh", script)
    unit = re.sub(r"(?m)^(Type|ExecStart|WatchdogSec|Restart\w*)=.*\n", "", (ROOT / "systemd" / UNIT).read_text())
    node.lab.write(
        "/etc/systemd/system/try.service",
        unit.replace("[Service]", "[Service]\nType=oneshot\nExecStart=sh /opt/try.sh"),
    )
    node.lab.systemctl("daemon-reload")
    node.lab.systemctl("start", "try")
    wait_for(lambda: "reloads" in node.lab.journal("-u", "try", "-o", "cat"), lambda: node.lab.journal("-u", "try"))
    said = node.lab.journal("-u", "try", "-o", "cat")
    assert "able" in said
    assert "allowed" not in said


def test_the_unit_is_hardened():
    need("systemd-analyze")
    words = ["systemd-analyze", "security", "--offline=true", "--threshold=20", str(ROOT / "systemd" / UNIT)]
    code, out, err = run(words, {"PATH": "/usr/bin:/bin"})
    assert code == 0, (out + err)[-300:]
