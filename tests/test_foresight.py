"""What would have worked is not refused beforehand: the judgement of a commit goes by what will be on the disk."""

from __future__ import annotations

import json
from pathlib import Path

from tests.test_tree import HOST, Clone

BASE = {"masterUrl": "ws://127.0.0.1:9900", "whitelist": [HOST], "deploy": {"command": ["sh", "deploy.sh"]}}


def test_what_will_be_there_is_not_missed(tmp_path: Path) -> None:
    """A file behind a filter or a link, a program in the clone's own folder of PATH."""
    clone = Clone(tmp_path)
    clone.git(tmp_path, "config", "--global", "filter.sealed.smudge", "echo WHO=opened")
    clone.git(tmp_path, "config", "--global", "filter.sealed.clean", "echo sealed")
    path = f"{clone.host}/bin:{clone.env['PATH']}"
    config = BASE | {"hosts": {HOST: {"environmentFile": "env"}}}
    clone.commit({".gitattributes": "env filter=sealed\n"})
    assert clone.deploy().code == 0
    clone.commit(
        {
            "env": "sealed\n",
            "deploy.sh": 'echo "for $WHO"\n',
            "config/updater.json": json.dumps(config),
        }
    )
    done = clone.deploy()
    assert done.code == 0 and "for opened" in done.out, done

    program = clone.folder / "seed" / "bin" / "release"
    program.parent.mkdir()
    program.write_text("#!/bin/sh\necho released for $WHO\n")
    program.chmod(0o755)
    (clone.folder / "seed" / "env").unlink()
    (clone.folder / "seed" / "env").symlink_to("other.env")
    config["hosts"] = {HOST: {"environmentFile": "env", "env": {"PATH": path}, "command": ["release"]}}
    clone.commit({"config/updater.json": json.dumps(config), ".gitattributes": "\n", "other.env": "WHO=a-link\n"})
    done = clone.deploy()
    assert done.code == 0 and "released for a-link" in done.out, done


def test_a_configuration_that_was_repaired_here_counts(tmp_path: Path) -> None:
    """Where a commit leaves the file alone, what is on the disk holds, whatever git has of it."""
    clone = Clone(tmp_path)
    clone.commit({"config/updater.json": "{"})
    clone.git(clone.host, "pull", "-q")
    (clone.host / "config" / "updater.json").write_text(json.dumps(BASE))
    for text in ("two\n", None):
        if text:
            clone.commit({"a": text})
        done = clone.deploy()
        assert done.code == 0 and "deploying" in done.out, done
    clone.commit({"config/updater.json": "["})
    done = clone.deploy()
    assert done.code == 1 and "✓" not in done.out, done
