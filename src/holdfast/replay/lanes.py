"""Draws a what-if: a line for each stream in its worker's colour, and the cluster's figures below, faults marked.

A stream is grey while it waits for its first token, coloured by the worker that writes it, open where no token came
for long, and ends in a cross when it was lost. Must never compute beyond choosing and scaling.
"""

from __future__ import annotations

import statistics
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Sequence

import msgspec

from holdfast.replay.effects import Account, Slice
from holdfast.replay.inprocess import Stream
from holdfast.replay.record import Record
from holdfast.replay.svg import COLOURS, LEFT, RIGHT, WIDTH, Panel, Point, document, lines_of, text_at
from holdfast.replay.whatif import Attempt, Happened

MOST_STREAMS = 56
LANE = 8.0
TOP = 122
ROWS = 3
"""Of the names of faults, above the streams."""
BEFORE, AFTER = 3.0, 9.0
"""Seconds shown before the first fault and after the last one's end, at most `LONGEST` in all."""
LONGEST = 40.0
_GREY = "#b8b8b8"
_RED = "#c22"


class Window(msgspec.Struct, frozen=True):
    """The time that the streams' part of the picture shows, in seconds of the run."""

    begin: float
    end: float

    def x(self, moment: float) -> float:
        """Return the place of a moment on the page."""
        share = (min(self.end, max(self.begin, moment)) - self.begin) / (self.end - self.begin)
        return LEFT + share * (WIDTH - LEFT - RIGHT)


class _Lane(msgspec.Struct, frozen=True):
    record: Record
    stream: Stream
    attempts: Sequence[Attempt]


def window_of(account: Account) -> Window:
    """Return the time to show: around the faults, or the beginning of a run without any."""
    seconds = account.report.seconds or 1.0
    if not account.effects:
        return Window(0.0, min(seconds, LONGEST))
    begin = max(0.0, min(effect.at for effect in account.effects) - BEFORE)
    end = min(seconds, max(effect.until for effect in account.effects) + AFTER, begin + LONGEST)
    return Window(begin, max(end, begin + 1.0))


def drawing(happened: Happened, account: Account, window: Window | None = None) -> str:
    """Return a what-if as SVG text.

    Args:
        happened: the run.
        account: what was made of it.
        window: what the streams' part shows; None: `window_of`.
    """
    window = window or window_of(account)
    lanes = _chosen(happened, window)
    bottom = TOP + max(len(lanes), 4) * LANE
    below = bottom + 66
    panels = _panels(account)
    height = below + len(panels) * (PANEL + 46)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height:.0f}" font-family="sans-serif">',
        f'<rect width="{WIDTH}" height="{height:.0f}" fill="white"/>',
        text_at(LEFT, 24, account.title, size=15),
        text_at(LEFT, 42, _about(account), size=12, colour="#555"),
    ]
    parts += _legend(account)
    parts += _marks(account, window, bottom)
    for at, lane in enumerate(lanes):
        parts += _lane(lane, TOP + (at + 0.5) * LANE, window, _usual(lanes))
    parts += _axis(window, bottom)
    for at, panel in enumerate(panels):
        top = below + at * (PANEL + 46)
        parts += _faults_below(account, top)
        parts += lines_of(panel, top, PANEL)
    return "\n".join([*parts, "</svg>", ""])


PANEL = 90.0


def _about(account: Account) -> str:
    frontends = f"{account.frontends} frontend{'s' if account.frontends > 1 else ''}"
    return f"{account.workers} workers ({account.profile}), {frontends}, {account.router_mode}; {account.load}"


def _legend(account: Account) -> Iterator[str]:
    yield text_at(LEFT, 62, "each line is a stream; colour: the worker that writes it", size=12)
    shown = min(account.workers, len(COLOURS))
    for number in range(shown):
        yield text_at(LEFT + 345 + number * 30, 62, f"■ {number}", size=12, colour=COLOURS[number])
    x = LEFT + 355 + shown * 30
    yield text_at(x, 62, "grey: waiting; red cross: lost", size=12, colour="#555")


def _chosen(happened: Happened, window: Window) -> list[_Lane]:
    """Return the streams to show, in order of their beginning: first those that moved or were lost."""
    lanes = []
    for record in happened.recording.records:
        stream = happened.streams.get(record.index)
        end = window.end if record.end is None else record.end
        if stream is not None and record.sent < window.end and end > window.begin:
            lanes.append(_Lane(record, stream, happened.attempts.get(stream.label, ())))
    special = [lane for lane in lanes if _is_special(lane, window)]
    plain = [lane for lane in lanes if not _is_special(lane, window)]
    shown = _thinned(special, MOST_STREAMS * 3 // 4) if plain else _thinned(special, MOST_STREAMS)
    shown += _thinned(plain, MOST_STREAMS - len(shown))
    return sorted(shown, key=lambda lane: (lane.record.sent, lane.record.index))


def _is_special(lane: _Lane, window: Window) -> bool:
    moved = any(window.begin <= one.begin <= window.end for one in lane.attempts[1:])
    return moved or lane.record.outcome != "ok"


def _thinned(lanes: list[_Lane], most: int) -> list[_Lane]:
    if len(lanes) <= most:
        return lanes
    return [lanes[at * len(lanes) // most] for at in range(most)]


def _usual(lanes: Iterable[_Lane]) -> float:
    """Return the time between tokens from which a pause is shown as one."""
    means = [lane.record.time_per_token for lane in lanes]
    known = [mean for mean in means if mean is not None]
    return max(0.12, 4.0 * statistics.median(known)) if known else 0.12


def _lane(lane: _Lane, y: float, window: Window, pause: float) -> Iterator[str]:
    record, times = lane.record, lane.stream.times
    first = times[0] if times else (window.end if record.end is None else record.end)
    if window.x(first) > window.x(record.sent):
        waiting = f"M{window.x(record.sent):.1f} {y:.1f}H{window.x(first):.1f}"
        yield f'<path d="{waiting}" stroke="{_GREY}" stroke-width="1"/>'
    if times and window.begin < times[-1] and times[0] < window.end:
        yield f'<path d="M{window.x(times[0]):.1f} {y:.1f}H{window.x(times[-1]):.1f}" stroke="#ddd" stroke-width="1"/>'
    pieces: dict[int, list[str]] = {}
    for number, begin, end in _runs(lane, window, pause):
        pieces.setdefault(number, []).append(
            f"M{window.x(begin):.1f} {y:.1f}H{max(window.x(end), window.x(begin) + 0.6):.1f}"
        )
    for number, path in pieces.items():
        colour = COLOURS[number % len(COLOURS)]
        yield f'<path d="{"".join(path)}" stroke="{colour}" stroke-width="4" fill="none"/>'
    if record.outcome != "ok" and record.end is not None and window.begin <= record.end <= window.end:
        x = window.x(record.end) - 3
        yield f'<path d="M{x:.1f} {y - 3:.1f}l6 6m0 -6l-6 6" stroke="{_RED}" stroke-width="1.6"/>'


def _runs(lane: _Lane, window: Window, pause: float) -> Iterator[tuple[int, float, float]]:
    """Yield worker, begin and end of each stretch of tokens without a pause by one worker."""
    times = lane.stream.times
    at = bisect_left(times, window.begin)
    last = bisect_left(times, window.end)
    if at >= last:
        return
    begin = before = times[at]
    worker = _worker(lane, begin)
    for moment in times[at + 1 : last]:
        now = _worker(lane, moment)
        if now != worker or moment - before > pause:
            yield worker, begin, before
            begin, worker = moment, now
        before = moment
    yield worker, begin, before


def _worker(lane: _Lane, moment: float) -> int:
    """Return the number of the worker that had the stream then."""
    name = next((one.worker for one in reversed(lane.attempts) if one.begin <= moment), "worker-0")
    return int(name.rpartition("-")[2])


def _marks(account: Account, window: Window, bottom: float) -> Iterator[str]:
    """Yield the faults: a line where each began, a shade while it lasted, and its name above."""
    ends = [-1000.0] * ROWS
    for effect in account.effects:
        if not window.begin <= effect.at <= window.end:
            continue
        x = window.x(effect.at)
        name = f"{effect.kind} {effect.target}".rstrip()
        row = next((row for row in range(ROWS) if ends[row] < x), ROWS - 1)
        ends[row] = x + 6.4 * len(name)
        width = window.x(effect.until) - x
        if width > 1:
            where = f'x="{x:.1f}" y="{TOP}" width="{width:.1f}" height="{bottom - TOP:.1f}"'
            yield f'<rect {where} fill="#f6d9d9" opacity="0.5"/>'
        yield f'<path d="M{x:.1f} {TOP - 6 - row * 14}V{bottom:.1f}" stroke="{_RED}" stroke-dasharray="3 3"/>'
        anchor = "end" if x > WIDTH - 200 else "start"
        yield text_at(
            x + 3 if anchor == "start" else x - 3, TOP - 8 - row * 14, name, size=11, colour=_RED, anchor=anchor
        )


def _axis(window: Window, bottom: float) -> Iterator[str]:
    yield f'<path d="M{LEFT} {bottom:.1f}H{WIDTH - RIGHT}" stroke="#ddd"/>'
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        moment = window.begin + share * (window.end - window.begin)
        yield text_at(window.x(moment), bottom + 16, f"{moment:.1f} s", size=11, anchor="middle")


def _faults_below(account: Account, top: float) -> Iterator[str]:
    seconds = account.report.seconds or 1.0
    for effect in account.effects:
        x = LEFT + min(1.0, effect.at / seconds) * (WIDTH - LEFT - RIGHT)
        yield f'<path d="M{x:.1f} {top:.1f}V{top + PANEL:.1f}" stroke="{_RED}" stroke-dasharray="3 3" opacity="0.6"/>'


def _panels(account: Account) -> list[Panel]:
    seconds = account.report.seconds or 1.0
    ticks = [(share, f"{seconds * share:,.0f} s") for share in (0.0, 0.25, 0.5, 0.75, 1.0)]
    slices = account.slices

    def over_time(values: Sequence[float | None]) -> list[Point]:
        width = _slice_width(account)
        return [
            (min(1.0, (piece.at + width / 2) / seconds), value) for piece, value in zip(slices, values, strict=True)
        ]

    return [
        Panel("output tokens per second", ticks, [_fine(account)]),
        Panel(
            "time to first token, s",
            ticks,
            [over_time([s.first_p50 for s in slices]), over_time([s.first_p99 for s in slices])],
            ("p50", "p99"),
        ),
        Panel("longest gap between two tokens of a stream, s", ticks, [over_time([s.longest_gap for s in slices])]),
    ]


def _fine(account: Account) -> list[Point]:
    """Return tokens per second of all workers together, in the report's finer pieces."""
    report = account.report
    seconds = report.seconds or 1.0
    totals = [sum(values) for values in zip(*(line.tokens_per_second for line in report.workers), strict=True)]
    return [(min(1.0, (at + 0.5) * report.bucket_seconds / seconds), value) for at, value in enumerate(totals)]


def comparison(accounts: Sequence[Account]) -> str:
    """Return several runs as SVG text: their figures over time, one colour for each."""
    seconds = max((account.report.seconds for account in accounts), default=0.0) or 1.0
    ticks = [(share, f"{seconds * share:,.0f} s") for share in (0.0, 0.25, 0.5, 0.75, 1.0)]

    def line(account: Account, value: Callable[[Slice], float | None]) -> list[Point]:
        width = _slice_width(account)
        return [(min(1.0, (piece.at + width / 2) / seconds), value(piece)) for piece in account.slices]

    panels = [
        Panel(title, ticks, [line(account, value) for account in accounts])
        for title, value in (
            ("output tokens per second", lambda piece: piece.tokens_per_second),
            ("time to first token, median, s", lambda piece: piece.first_p50),
            ("time to first token, 99th percentile, s", lambda piece: piece.first_p99),
            ("longest gap between two tokens of a stream, s", lambda piece: piece.longest_gap),
        )
    ]
    return document(f"{accounts[0].load}", [account.title for account in accounts], panels)


def _slice_width(account: Account) -> float:
    slices = account.slices
    return slices[1].at if len(slices) > 1 else account.report.seconds or 1.0
