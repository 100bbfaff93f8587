"""What a what-if says: a time line, what each fault did to whom, and how much room was left.

Pure functions of `whatif.Happened`. Units: seconds since the load began, tokens, shares 0..1. Must never know how it
is shown.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence

import msgspec

from holdfast.replay.inprocess import Stream
from holdfast.replay.record import Record
from holdfast.replay.report import Report, summarise
from holdfast.replay.troubles import KINDS
from holdfast.replay.whatif import Attempt, Happened
from holdfast.sim.history import Fired

SLICE_SECONDS = 5.0
MOST_SLICES = 30
_WIDTHS = (5.0, 10.0, 20.0, 30.0, 60.0, 120.0, 300.0, 600.0, 1800.0, 3600.0)
AFTERMATH = 10.0
"""Seconds after the end of a fault in which what happens to its streams is still its doing."""


class Slice(msgspec.Struct, frozen=True):
    """One piece of the time line."""

    at: float
    requests: int
    """Sent."""
    finished: int
    tokens_per_second: float
    first_p50: float | None
    """Time to first token of the requests sent here; None: there were none."""
    first_p99: float | None
    longest_gap: float
    """Between two tokens of one stream, the later of which came here."""
    migrations: int
    rejected: dict[str, int]
    """By code."""
    failed: dict[str, int]
    usable_workers: int
    """At the worst moment, by the least fortunate frontend."""
    waiting: int
    """Sequences in engines' queues, at the worst moment."""


class Effect(msgspec.Struct, frozen=True):
    """What one fault did."""

    kind: str
    target: str
    at: float
    until: float
    hit: int
    """Streams that lived on the target while it lasted; with no target: all that were under way."""
    moved: int
    """Of these, continued by another worker."""
    lost: int
    """Of these, ended without a whole answer."""
    longest_gap: float
    """Between two tokens of one of these."""


class Capacity(msgspec.Struct, frozen=True):
    """How much of the cluster was used; everything in all engines together but ``kv_peak``."""

    seats: int
    running_mean: float
    running_peak: int
    waiting_peak: int
    waiting_share: float
    """Share of the time in which sequences waited for a seat or for KV blocks."""
    kv_peak: float
    """Share of the KV blocks in use, of the fullest engine."""
    best_tokens_per_second: float
    """Of the best piece of the time line."""


class Account(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that a what-if found; what ``--json`` writes."""

    title: str
    seed: int
    workers: int
    frontends: int
    profile: str
    router_mode: str
    load: str
    """In words."""
    digest: str
    """Hash of everything that happened: equal when it is repeated with the same version."""
    migrations: int
    streams_lost: int
    """Requests that were accepted and ended without a whole answer."""
    longest_gap: float
    report: Report
    capacity: Capacity
    effects: list[Effect]
    slices: list[Slice]


def account(happened: Happened, title: str) -> Account:
    """Return what a what-if found."""
    scenario = happened.scenario
    settings = scenario.settings
    report = summarise(happened.recording, title, scenario.load.described)
    slices = time_line(happened, report.seconds)
    return Account(
        title=title,
        seed=scenario.seed,
        workers=settings.workers,
        frontends=settings.frontends,
        profile=settings.engine.profile,
        router_mode=settings.frontend.router_mode,
        load=scenario.load.described,
        digest=happened.digest,
        migrations=len(happened.moves),
        streams_lost=report.failed,
        longest_gap=max((piece.longest_gap for piece in slices), default=0.0),
        report=report,
        capacity=_capacity(happened, slices),
        effects=effects(happened),
        slices=slices,
    )


def time_line(happened: Happened, seconds: float) -> list[Slice]:
    """Return what happened in each piece of 5 s (longer ones when the run is long)."""
    width = next((width for width in _WIDTHS if seconds <= width * MOST_SLICES), _WIDTHS[-1])
    count = max(1, math.ceil(seconds / width - 1e-9))

    def at(moment: float) -> int:
        return min(count - 1, max(0, int(moment / width)))

    tokens, gaps = _tokens(happened.streams.values(), count, width)
    sent: list[list[Record]] = [[] for _ in range(count)]
    over: list[list[Record]] = [[] for _ in range(count)]
    for record in happened.recording.records:
        sent[at(record.sent)].append(record)
        if record.end is not None:
            over[at(record.end)].append(record)
    moves = Counter(at(move.at) for move in happened.moves)
    usable, waiting = [math.inf] * count, [0] * count
    for sample in happened.samples:
        if sample.at < seconds:
            here = at(sample.at)
            usable[here] = min(usable[here], sample.usable)
            waiting[here] = max(waiting[here], sample.waiting)
    slices = []
    for here in range(count):
        first = sorted(r.first - r.sent for r in sent[here] if r.first is not None)
        slices.append(
            Slice(
                at=here * width,
                requests=len(sent[here]),
                finished=sum(record.outcome == "ok" for record in over[here]),
                tokens_per_second=tokens[here] / min(width, seconds - here * width) if seconds > here * width else 0.0,
                first_p50=_quantile(first, 0.5),
                first_p99=_quantile(first, 0.99),
                longest_gap=gaps[here],
                migrations=moves[here],
                rejected=_reasons(over[here], ("rejected",)),
                failed=_reasons(over[here], ("failed", "timeout")),
                usable_workers=int(usable[here]) if usable[here] < math.inf else 0,
                waiting=waiting[here],
            )
        )
    return slices


def _tokens(streams: Iterable[Stream], count: int, width: float) -> tuple[list[int], list[float]]:
    tokens, gaps = [0] * count, [0.0] * count
    last = count - 1
    for stream in streams:
        before = math.inf
        for moment in stream.times:
            here = min(last, int(moment / width))
            tokens[here] += 1
            gaps[here] = max(gaps[here], moment - before)
            before = moment
    return tokens, gaps


def _quantile(ordered: Sequence[float], share: float) -> float | None:
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)] if ordered else None


def _reasons(records: Iterable[Record], outcomes: tuple[str, ...]) -> dict[str, int]:
    return dict(sorted(Counter(r.reason or r.outcome for r in records if r.outcome in outcomes).items()))


class _Blamed:
    """One fault, and what it is blamed for so far."""

    __slots__ = ("fault", "gap", "hit", "lost", "moved", "until")

    def __init__(self, fault: Fired, until: float):
        self.fault, self.until = fault, until
        self.hit: list[int] = []
        self.moved: set[str] = set()
        self.lost = 0
        self.gap = 0.0

    def told(self) -> Effect:
        fault = self.fault
        target = " / ".join(name for name in (fault.target, fault.peer) if name)
        counts = len(self.hit), len(self.moved), self.lost
        return Effect(name_of(fault), target, fault.at, self.until, *counts, self.gap)


def effects(happened: Happened) -> list[Effect]:
    """Return what each fault did, in order.

    What befalls a stream is blamed on one fault: of those that had hit the stream and were not over for more than
    `AFTERMATH` seconds, the latest that had a target, or else the latest.
    """
    blamed = [_Blamed(fault, _over(fault, happened)) for fault in happened.fired]
    records = {record.index: record for record in happened.recording.records}
    by_stream: defaultdict[int, list[_Blamed]] = defaultdict(list)
    for one in blamed:
        one.hit = list(_hit(one.fault, one.until, happened, records))
        for index in one.hit:
            by_stream[index].append(one)
    moves: defaultdict[str, list[float]] = defaultdict(list)
    for move in happened.moves:
        moves[move.label].append(move.at)
    for index, suspects in by_stream.items():
        stream, record = happened.streams[index], records[index]
        for at in moves[stream.label]:
            for one in _culprit(suspects, at, at):
                one.moved.add(stream.label)
        if record.outcome in ("failed", "timeout") and record.end is not None:
            for one in _culprit(suspects, record.end, record.end):
                one.lost += 1
        _blame_gaps(stream, suspects)
    return [one.told() for one in blamed]


def _culprit(suspects: Sequence[_Blamed], begin: float, end: float) -> Iterable[_Blamed]:
    """Return the one fault to which something from ``begin`` to ``end`` is due; nothing when it is none's doing."""
    able = [one for one in suspects if one.fault.at <= end and begin <= one.until + AFTERMATH]
    return [max(able, key=lambda one: (bool(one.fault.target), one.fault.at))] if able else []


def _blame_gaps(stream: Stream, suspects: Sequence[_Blamed]) -> None:
    times = stream.times
    first = max(1, bisect_left(times, min(one.fault.at for one in suspects)))
    for at in range(first, len(times)):
        gap = times[at] - times[at - 1]
        if gap > min(one.gap for one in suspects):
            for one in _culprit(suspects, times[at - 1], times[at]):
                one.gap = max(one.gap, gap)


def _over(fault: Fired, happened: Happened) -> float:
    """Return when a fault was over."""
    for begin, end in happened.rollouts:
        if fault.kind == "rolling-restart" and begin >= fault.at:
            return end
    return fault.until


def name_of(fault: Fired) -> str:
    """Return the name by which people ask for a fault."""
    role = fault.target.partition("-")[0]
    names = [name for name, kind in KINDS.items() if str(kind.make.__struct_config__.tag) == fault.kind]  # type: ignore[attr-defined]
    return next((name for name in names if KINDS[name].role.removesuffix("s") == role), names[0])


def _hit(fault: Fired, until: float, happened: Happened, records: dict[int, Record]) -> Iterable[int]:
    late = {m.label for m in happened.moves if m.worker == fault.target and fault.at <= m.at <= until + AFTERMATH}
    for index, stream in happened.streams.items():
        record = records[index]
        end = math.inf if record.end is None else record.end
        if record.sent > until or end < fault.at:
            continue
        if stream.label in late or _lived_there(fault, until, stream, happened.attempts.get(stream.label, ())):
            yield index


def _lived_there(fault: Fired, until: float, stream: Stream, attempts: Iterable[Attempt]) -> bool:
    """Whether a stream that was under way touched the target while the fault lasted."""
    target = fault.target
    if target in ("", "worker", "frontend", stream.frontend):
        return True
    if fault.peer and fault.peer != stream.frontend and target.startswith("worker"):
        return False
    return any(one.worker == target and one.begin <= until and one.end >= fault.at for one in attempts)


def _capacity(happened: Happened, slices: Sequence[Slice]) -> Capacity:
    samples = happened.samples
    running = [sum(sample.running) for sample in samples]
    settings = happened.scenario.settings
    return Capacity(
        seats=settings.workers * settings.engine.max_num_seqs,
        running_mean=sum(running) / len(running) if running else 0.0,
        running_peak=max(running, default=0),
        waiting_peak=max((sample.waiting for sample in samples), default=0),
        waiting_share=sum(sample.waiting > 0 for sample in samples) / len(samples) if samples else 0.0,
        kv_peak=max((sample.kv for sample in samples), default=0.0),
        best_tokens_per_second=max((piece.tokens_per_second for piece in slices), default=0.0),
    )
