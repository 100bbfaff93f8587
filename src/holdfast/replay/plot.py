"""Draws a report as an SVG picture: three panels over one time axis. Written by hand, so that nothing is installed.

Must never compute a figure beyond scaling it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

import msgspec

from holdfast.replay.report import Report

_WIDTH, _PANEL, _LEFT, _RIGHT, _TOP, _GAP = 960, 180, 70, 20, 84, 46
_COLOURS = (
    "#3366cc", "#dc6a1c", "#2a9d5c", "#b0339a", "#8a6d1f", "#1fa2b8", "#d03050", "#6a55c8", "#7a9a1a", "#666666",
)  # fmt: skip
_ROUND = (1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0, 10.0)


class Line(msgspec.Struct, frozen=True):
    """A named line; None leaves a gap."""

    name: str
    values: Sequence[float | None]


class _Frame(msgspec.Struct, frozen=True):
    """Where a panel lies, and its scale."""

    top: float
    seconds: float
    highest: float

    def x(self, second: float) -> float:
        return _LEFT + second / self.seconds * (_WIDTH - _LEFT - _RIGHT)

    def y(self, value: float) -> float:
        return self.top + _PANEL * (1.0 - value / self.highest)


def picture(report: Report) -> str:
    """Return the SVG text: requests in flight, output tokens per second, time to first token."""
    workers = [line.worker or "all" for line in report.workers]
    panels = [
        ("requests in flight", _named(workers, [line.in_flight for line in report.workers])),
        ("output tokens per second", _named(workers, [line.tokens_per_second for line in report.workers])),
        (
            "time to first token, s",
            [Line("p50", [m.p50 for m in report.first_tokens]), Line("p99", [m.p99 for m in report.first_tokens])],
        ),
    ]
    parts = [_text(_LEFT, 24, f"{report.title}: {report.load}", size=15)]
    parts += _legend(workers)
    for at, (title, lines) in enumerate(panels):
        parts += _panel(title, lines, _TOP + at * (_PANEL + _GAP), report, own_legend=at == 2)
    height = _TOP + len(panels) * (_PANEL + _GAP)
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" font-family="sans-serif">'
    return "\n".join([head, f'<rect width="{_WIDTH}" height="{height}" fill="white"/>', *parts, "</svg>", ""])


def _named(names: Sequence[str], values: Sequence[Sequence[float]]) -> list[Line]:
    return [Line(name, line) for name, line in zip(names, values, strict=True)]


def _legend(names: Sequence[str]) -> list[str]:
    shown = names[: len(_COLOURS)]
    step = min(130.0, (_WIDTH - _LEFT - _RIGHT) / max(1, len(shown)))
    return [
        _text(_LEFT + at * step, 44, name[: int(step / 8)], colour=_COLOURS[at], size=12)
        for at, name in enumerate(shown)
    ]


def _panel(title: str, lines: Sequence[Line], top: float, report: Report, *, own_legend: bool) -> list[str]:
    known = [value for line in lines for value in line.values if value is not None]
    frame = _Frame(top, max(report.seconds, 1e-9), nice_ceiling(max(known, default=0.0)))
    parts = [_text(_LEFT, top - 6, title, size=12)]
    for share in (0.0, 0.5, 1.0):
        value = frame.highest * share
        y = frame.y(value)
        parts.append(f'<path d="M{_LEFT} {y:.1f}H{_WIDTH - _RIGHT}" stroke="#ddd"/>')
        parts.append(_text(_LEFT - 6, y + 4, f"{value:,g}", size=11, anchor="end"))
    decimals = 0 if frame.seconds >= 40 else 1
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        second = frame.seconds * share
        parts.append(_text(frame.x(second), top + _PANEL + 16, f"{second:,.{decimals}f} s", size=11, anchor="middle"))
    for at, line in enumerate(lines):
        colour = _COLOURS[at % len(_COLOURS)]
        parts.append(_path(line.values, frame, report.bucket_seconds, colour))
        if own_legend:
            parts.append(_text(_LEFT + 170 + at * 50, top - 6, line.name, size=12, colour=colour))
    return parts


def _path(values: Sequence[float | None], frame: _Frame, width: float, colour: str) -> str:
    moves, pen_down = [], False
    for at, value in enumerate(values):
        if value is not None:
            second = min((at + 0.5) * width, frame.seconds)
            moves.append(f"{'L' if pen_down else 'M'}{frame.x(second):.1f} {frame.y(value):.1f}")
        pen_down = value is not None
    # a value between two gaps would be a line of no length: a round cap makes it a dot
    shape = 'fill="none" stroke-width="1.4" stroke-linecap="round" stroke-linejoin="round"'
    closed = [move + "h0" if move[0] == "M" else move for move in moves]
    return f'<path d="{"".join(closed)}" {shape} stroke="{colour}"/>'


def nice_ceiling(value: float) -> float:
    """Return a round number, at least ``value`` (1 for nothing)."""
    if value <= 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(value))
    return next(step * power for step in _ROUND if step * power >= value * 0.999999)


def _text(x: float, y: float, text: str, *, size: int, colour: str = "#222", anchor: str = "start") -> str:
    where = f'x="{x:.1f}" y="{y:.1f}" font-size="{size}" fill="{colour}" text-anchor="{anchor}"'
    return f"<text {where}>{escape(text)}</text>"
