"""A real systemd for the tests, as process 1 of namespaces of its own over what this machine has installed."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from tests.fleet import Result, need, run, unavailable, wait_for

_numbers = itertools.count()
PYTHON = "/usr/bin/python3"  # one that ordinary users and hidden home folders can do with

# Arguments: the name, a cgroup, an empty folder, unshare's --net or nothing, folders to bind as OUTSIDE:INSIDE. All is
# mounted in a mount namespace of its own, so that the end of process 1 is the end of it.
_BOOT = r"""
set -e
echo $$ >"$2/cgroup.procs"
exec unshare --kill-child --mount --pid --fork --ipc --uts --cgroup $4 --propagation private sh -e -c '
name=$1 base=$3 R=$3/root; shift 4
hostname "$name"
mount -t tmpfs tmpfs "$base" -o mode=755
mkdir "$R" "$base/upper" "$base/work"
mount -t overlay overlay -o "lowerdir=/,upperdir=$base/upper,workdir=$base/work" "$R"
cd "$R"
# What this machine starts at boot, or now and then, is no part of a test.
rm -rf etc/systemd/system/*.wants etc/systemd/system/*.requires var/log/journal
for unit in systemd-udevd systemd-sysctl systemd-timesyncd systemd-networkd getty@tty1; do
  ln -sf /dev/null "etc/systemd/system/$unit.service"
done
echo "$name" >etc/hostname
chmod o+x root
mount -t proc proc proc
mount --bind proc/sys proc/sys; mount -o remount,ro,bind proc/sys
mount -t sysfs -o ro sysfs sys; mount -t cgroup2 cgroup2 sys/fs/cgroup
mount -t tmpfs tmpfs run -o mode=755; mount -t tmpfs tmpfs tmp -o mode=1777; mkdir -p run/lock
mount -t tmpfs tmpfs dev -o mode=755
for node in null zero full random urandom tty; do touch dev/$node; mount --bind /dev/$node dev/$node; done
ln -s /proc/self/fd dev/fd; mkdir dev/pts dev/shm
mount -t devpts devpts dev/pts -o newinstance,ptmxmode=666; ln -s pts/ptmx dev/ptmx
for pair; do mkdir -p "./${pair#*:}"; mount --bind "${pair%%:*}" "./${pair#*:}"; done
ip link set lo up
mkdir -p .old; pivot_root . .old; umount -l .old  # not chroot: from there no user namespace can be made (PrivateUsers=)
exec /usr/bin/env -i container=lab PATH=/usr/sbin:/usr/bin:/sbin:/bin /lib/systemd/systemd \
  --unit=multi-user.target --log-target=journal --log-level=notice
' sh "$@"
"""


class Lab:
    """A booted machine: systemd, journald, logind and D-Bus, its own loopback, or a network namespace's network.

    What the machine has installed is there, what is written stays inside and is gone at the end. Needs root.
        with Lab(tmp_path, netns=network.namespace(1)) as lab:
            lab.write("/etc/systemd/system/x.service", "...")
            lab.systemctl("start", "x")
    """

    def __init__(
        self, folder: Path, netns: str = "", name: str = "lab", binds: Mapping[Path, str | Path] | None = None
    ) -> None:
        need("systemctl", "unshare", "nsenter", "ip")
        if os.geteuid() != 0:
            unavailable("a systemd of its own can only be started by root")
        rows = [row.split() for row in Path("/proc/mounts").read_text().splitlines()]
        cgroups = [Path(row[1]) for row in rows if row[2] == "cgroup2" and os.access(row[1], os.W_OK)]
        if not cgroups:
            unavailable("no cgroups of version 2 that could be written to")
        # Two labs in one cgroup would kill each other's services
        self.cgroup = cgroups[0] / f"est-lab-{os.getpid()}-{next(_numbers)}"
        self.cgroup.mkdir()
        self.console = folder / f"{self.cgroup.name}.console"
        base = folder / self.cgroup.name
        base.mkdir()
        pairs = [f"{outside}:{str(inside).lstrip('/')}" for outside, inside in (binds or {}).items()]
        words = ["sh", "-c", _BOOT, "sh", name, str(self.cgroup), str(base), "" if netns else "--net", *pairs]
        with open(self.console, "wb") as out:
            null = subprocess.DEVNULL
            # Not `ip netns exec`: its own /sys hides the cgroups
            argv = ["nsenter", f"--net=/run/netns/{netns}", *words] if netns else words
            argv = ["setpriv", "--pdeathsig", "KILL", *argv]  # a test that is killed takes its lab along
            self._boot = subprocess.Popen(argv, stdin=null, stdout=out, stderr=out, start_new_session=True)
        self.pid = 0
        try:
            self.pid = wait_for(self._find, lambda: f"systemd starts\n{self.console.read_text()}")
            wait_for(lambda: self.systemctl("is-system-running").out.strip() in ("running", "degraded"), self.state, 90)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Lab:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _find(self) -> int:
        """Process 1 of the lab, as this machine numbers it, once it has become systemd."""
        if self._boot.poll() is not None:
            unavailable(f"no systemd can be started here: {self.console.read_text()[-500:]}")
        children = Path(f"/proc/{self._boot.pid}/task/{self._boot.pid}/children").read_text().split()
        with suppress(OSError):
            if children and b"/systemd\0" in Path(f"/proc/{children[0]}/cmdline").read_bytes():
                return int(children[0])
        return 0

    def state(self) -> str:
        """What does not run, for a failed test."""
        return "\n".join(self.systemctl(*words).out for words in (("--failed",), ("list-jobs",)))

    def run(self, *argv: str | Path, user: str = "", timeout_s: float = 60) -> Result:
        """Run a command inside, as root or as a user with its own runtime folder."""
        enter = ["nsenter", f"--target={self.pid}", "--mount", "--pid", "--net", "--ipc", "--uts", "--cgroup"]
        if user:
            script = 'cd; export XDG_RUNTIME_DIR=/run/user/$(id -u); exec "$@"'
            argv = ("runuser", "-u", user, "--", "env", f"HOME=/home/{user}", "sh", "-c", script, "sh", *argv)
        env = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C.UTF-8", "HOME": "/root"}
        return run([*enter, "--root", "--wd", *argv], env, timeout_s=timeout_s)

    def ok(self, *argv: str | Path, user: str = "", timeout_s: float = 60) -> str:
        """Run a command inside that must succeed; its output."""
        code, out, err = self.run(*argv, user=user, timeout_s=timeout_s)
        assert code == 0, f"{' '.join(map(str, argv))}: exit {code}\n{out}{err}"
        return out

    def systemctl(self, *words: str, user: str = "") -> Result:
        """Talk to systemd, or to a user's."""
        return self.run("systemctl", *(["--user"] if user else []), *words, user=user)

    def show(self, unit: str, key: str, user: str = "") -> str:
        """One property of a unit."""
        return self.systemctl("show", "--value", f"--property={key}", unit, user=user).out.strip()

    def journal(self, *words: str) -> str:
        """What the journal has."""
        return self.run("journalctl", "--no-pager", *words).out

    def path(self, inside: str | Path) -> Path:
        """A file of the lab as this machine sees it; valid while the lab runs."""
        return Path(f"/proc/{self.pid}/root", str(inside).lstrip("/"))

    def write(self, inside: str | Path, text: str, mode: int = 0o644) -> None:
        """Write a file of the lab; `systemctl daemon-reload` is the caller's."""
        path = self.path(inside)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        path.chmod(mode)

    def add_user(self, name: str, linger: bool = True) -> None:
        """An ordinary user, by default with a systemd of its own."""
        self.ok("useradd", "--create-home", "--shell", "/bin/sh", name)
        if linger:
            self.ok("loginctl", "enable-linger", name)
            wait_for(lambda: "running" in self.systemctl("is-system-running", user=name).out, f"{name}'s systemd runs")

    def close(self) -> None:
        """End it with everything that runs inside."""
        with suppress(ProcessLookupError):
            os.kill(self.pid or self._boot.pid, signal.SIGKILL)
        with suppress(ProcessLookupError):
            os.killpg(self._boot.pid, signal.SIGKILL)
        self._boot.wait(20)

        def gone() -> bool:
            for folder, _, _ in os.walk(self.cgroup, topdown=False):
                with suppress(OSError):
                    os.rmdir(folder)
            return not self.cgroup.exists()

        wait_for(gone, f"{self.cgroup} is empty")
