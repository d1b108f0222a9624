"""The parts of README.md that are made from the program: python3 tests/readme.py writes them anew."""

from __future__ import annotations

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import estelle_updater as est  # noqa: E402


def words(item: est.Option) -> str:
    """An argument as a person types it."""
    name = item.names[-1]
    if not name.startswith("-"):
        text = item.settings.get("metavar", name.upper())
        return f"[{text}]" if item.settings.get("nargs") == "?" else str(text)
    value = item.settings.get("metavar") or (
        "|".join(item.settings.get("choices", ())) if "choices" in item.settings else ""
    )
    return f"[{'|'.join(item.names)}{' ' + value if value else ''}]"


def commands() -> str:
    """The command table."""
    rows = ["| command | what it does |", "| --- | --- |"]
    for command in est.COMMANDS:
        if not command.hidden:
            usage = " ".join([command.name, *map(words, command.options)]).replace("|", "\\|")
            rows.append(f"| `{usage}` | {command.help} |")
    return "\n".join(rows)


def options() -> str:
    """The options of every command."""
    rows = ["| option | meaning |", "| --- | --- |"]
    for item in est.GLOBAL_OPTIONS:
        rows.append(
            f"| `{words(item).strip('[]')}` | {item.settings['help']} |".replace("-v|--verbose", "-v, --verbose")
        )
    return "\n".join(rows)


def rewrite(text: str) -> str:
    """README's text with its generated parts as the program has them now."""
    for name, make in (("commands", commands), ("options", options)):
        pattern = rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)"
        text = re.sub(pattern, lambda match, make=make: f"{match[1]}{make()}\n{match[2]}", text, flags=re.DOTALL)  # type: ignore[misc]
    return text


if __name__ == "__main__":
    readme = ROOT / "README.md"
    readme.write_text(rewrite(readme.read_text("utf-8")), "utf-8")
