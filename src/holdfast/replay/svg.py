"""The few pieces of SVG that pictures of reports are made of. Written by hand, so that nothing is installed.

Must never know what it draws.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from html import escape

import msgspec

WIDTH, LEFT, RIGHT, TOP, PANEL, GAP = 960, 70, 20, 84, 180, 46
COLOURS = (
    "#3366cc", "#dc6a1c", "#2a9d5c", "#b0339a", "#8a6d1f", "#1fa2b8", "#d03050", "#6a55c8", "#7a9a1a", "#666666",
)  # fmt: skip
_ROUND = (1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0, 10.0)

Point = tuple[float, float | None]
"""Share of the width (0..1) and value; None leaves a gap."""


class Panel(msgspec.Struct, frozen=True):
    """One chart: a title, what stands below its axis (share of the width, text), and lines by colour number."""

    title: str
    ticks: Sequence[tuple[float, str]]
    lines: Sequence[Sequence[Point]]
    legend: Sequence[str] = ()
    """Names of the lines, when they are not those of the whole picture."""
    dots: bool = False
    """Mark every point, because there are few."""


def document(title: str, names: Sequence[str], panels: Sequence[Panel]) -> str:
    """Return a whole picture: a title, a legend of names in the lines' colours, and panels one below the other."""
    height = TOP + len(panels) * (PANEL + GAP)
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" font-family="sans-serif">'
    parts = [head, f'<rect width="{WIDTH}" height="{height}" fill="white"/>', text_at(LEFT, 24, title, size=15)]
    parts += _legend(names)
    for at, panel in enumerate(panels):
        parts += lines_of(panel, TOP + at * (PANEL + GAP))
    return "\n".join([*parts, "</svg>", ""])


def nice_ceiling(value: float) -> float:
    """Return a round number, at least ``value`` (1 for nothing)."""
    if value <= 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(value))
    return next(step * power for step in _ROUND if step * power >= value * 0.999999)


def _legend(names: Sequence[str]) -> Iterable[str]:
    shown = names[: len(COLOURS)]
    step = min(150.0, (WIDTH - LEFT - RIGHT) / max(1, len(shown)))
    for at, name in enumerate(shown):
        yield text_at(LEFT + at * step, 46, name[: int(step / 7.5)], size=12, colour=COLOURS[at])


def lines_of(panel: Panel, top: float, tall: float = PANEL) -> Iterable[str]:
    """Yield the elements of one chart, from ``top`` down, ``tall`` high."""
    highest = nice_ceiling(max((value for line in panel.lines for _, value in line if value is not None), default=0.0))
    yield text_at(LEFT, top - 6, panel.title, size=12)
    for share in (0.0, 0.5, 1.0):
        y = top + tall * (1.0 - share)
        yield f'<path d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}" stroke="#ddd"/>'
        yield text_at(LEFT - 6, y + 4, f"{highest * share:,g}", size=11, anchor="end")
    for share, label in panel.ticks:
        yield text_at(_x(share), top + tall + 16, label, size=11, anchor="middle")
    for at, name in enumerate(panel.legend):
        yield text_at(LEFT + 200 + at * 50, top - 6, name, size=12, colour=COLOURS[at % len(COLOURS)])
    for at, line in enumerate(panel.lines):
        colour = COLOURS[at % len(COLOURS)]
        points = [(_x(x), None if value is None else top + tall * (1.0 - value / highest)) for x, value in line]
        yield _path(points, colour)
        if panel.dots:
            yield from (
                f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>' for x, y in points if y is not None
            )


def _x(share: float) -> float:
    return LEFT + share * (WIDTH - LEFT - RIGHT)


def _path(points: Iterable[Point], colour: str) -> str:
    moves, pen_down = [], False
    for x, y in points:
        if y is not None:
            # a point between two gaps would be a line of no length: "h0" makes the round cap a dot
            moves.append(f"L{x:.1f} {y:.1f}" if pen_down else f"M{x:.1f} {y:.1f}h0")
        pen_down = y is not None
    shape = 'fill="none" stroke-width="1.4" stroke-linecap="round" stroke-linejoin="round"'
    return f'<path d="{"".join(moves)}" {shape} stroke="{colour}"/>'


def text_at(x: float, y: float, text: str, *, size: int, colour: str = "#222", anchor: str = "start") -> str:
    """Return a piece of text at a place on the page."""
    where = f'x="{x:.1f}" y="{y:.1f}" font-size="{size}" fill="{colour}" text-anchor="{anchor}"'
    return f"<text {where}>{escape(text)}</text>"
