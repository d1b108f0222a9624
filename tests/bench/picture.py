"""One SVG of what a run of the bench found: a panel for each kind of growth, cost upwards, and names at the lines."""

from __future__ import annotations

import math
from typing import NamedTuple

WIDTH, HEIGHT = 362, 270  # of a panel
LEFT, TOP, RIGHT, BOTTOM = 46, 62, 128, 46  # around its lines
COLOURS = ("#0b62c4", "#c2410c", "#15803d", "#7e22ce")
FLOOR = "#8a8f98"


class Line(NamedTuple):
    """A name, its points by what grows, and whether it is what nobody can be quicker than."""

    name: str
    points: list[tuple[float, float]]
    is_floor: bool = False


class Panel(NamedTuple):
    title: str
    unit: str  # of the cost
    grows: str
    lines: list[Line]


def nice_top(value: float) -> float:
    """A round number above all points."""
    power = 10.0 ** math.floor(math.log10(value))
    return next(step * power for step in (1, 1.5, 2, 3, 4, 5, 6, 8, 10, 12) if step * power >= value * 1.02)


def short(number: float) -> str:
    """A number of hosts, lines or runs."""
    for size, letter in ((1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:g}{letter}"
    return f"{number:g}"


def apart(wanted: list[float], gap: float) -> list[float]:
    """Places for names as near to those wanted as they can be without covering each other."""
    placed: list[float] = []
    for place in wanted:
        placed.append(max(place, placed[-1] + gap) if placed else place)
    return placed


def draw_panel(panel: Panel, left: int) -> list[str]:
    """Its axes, its lines, and their names at the right end."""
    inner, height = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM
    xs = sorted({x for line in panel.lines for x, _ in line.points})
    top = nice_top(max(y for line in panel.lines for _, y in line.points))
    span = max(0.1, math.log(xs[-1] / xs[0]))

    def place(x: float, y: float) -> tuple[float, float]:
        right = 0.5 if len(xs) == 1 else math.log(x / xs[0]) / span
        return left + LEFT + 8 + (inner - 16) * right, TOP + height * (1 - y / top)

    begin, end = left + LEFT, left + LEFT + inner
    drawn = [
        f'<text x="{left + 8}" y="24" font-size="15" font-weight="bold">{panel.title}</text>',
        f'<text x="{left + 8}" y="42" fill="#555">{panel.unit}</text>',
        f'<text x="{(begin + end) / 2:.0f}" y="{HEIGHT - 8}" text-anchor="middle" fill="#555">{panel.grows}</text>',
    ]
    for share in (0, 0.25, 0.5, 0.75, 1):
        y = TOP + height * (1 - share)
        drawn.append(f'<path d="M{begin} {y:.1f}H{end}" stroke="{"#444" if share == 0 else "#e3e5e8"}"/>')
        drawn.append(f'<text x="{begin - 6}" y="{y + 4:.1f}" text-anchor="end" fill="#555">{top * share:g}</text>')
    for x in xs:
        across = place(x, 0)[0]
        drawn.append(f'<text x="{across:.0f}" y="{TOP + height + 17}" text-anchor="middle">{short(x)}</text>')
    colours = iter(COLOURS)
    named = []
    for line in panel.lines:
        colour = FLOOR if line.is_floor else next(colours)
        dots = [place(x, y) for x, y in line.points]
        dash = ' stroke-dasharray="5 4"' if line.is_floor else ""
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in dots)
        drawn.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"{dash}/>')
        drawn += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" fill="{colour}"/>' for x, y in dots]
        named.append((dots[-1][1] + 4, f"{line.name} {line.points[-1][1]:.3g}", colour))
    named.sort()
    for y, (_, name, colour) in zip(apart([y for y, *_ in named], 15), named, strict=True):
        drawn.append(f'<text x="{end + 5}" y="{y:.1f}" fill="{colour}">{name}</text>')
    return drawn


def draw(panels: list[Panel], caption: str) -> str:
    """All panels, side by side; a level line is a cost that does not grow."""
    width = WIDTH * len(panels)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {HEIGHT + 22}" font-family="sans-serif"'
        f' font-size="12"><rect width="{width}" height="{HEIGHT + 22}" fill="white"/>'
    ]
    for number, panel in enumerate(panels):
        parts += draw_panel(panel, WIDTH * number)
    parts.append(f'<text x="8" y="{HEIGHT + 14}" fill="#555">{caption}</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"
