"""What a replay says: percentiles, throughput, cache hits, balance, and a line in time for every worker.

Pure functions of a `Recording`, whichever driver and clock it came from. Units: seconds, tokens, shares 0..1.

Must never know how a report is shown.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence

import msgspec

from holdfast.replay.record import TICKS, Histogram, Record, Recording

MOST_BUCKETS = 240
"""Points of a time line at most."""
_WIDTHS = (1, 2, 5)
"""Buckets are these many ticks wide, or ten, a hundred … times as many."""
_SHARES = (0.5, 0.9, 0.95, 0.99)


class Spread(msgspec.Struct, frozen=True):
    """How a duration is distributed, in seconds. All 0 when there is none (``count`` 0)."""

    count: int = 0
    mean: float = 0.0
    p50: float = 0.0
    p90: float = 0.0
    p95: float = 0.0
    p99: float = 0.0
    max: float = 0.0


class Balance(msgspec.Struct, frozen=True):
    """How evenly the workers were used; 1 is even, 2 means that the busiest did twice the mean."""

    requests: float = 1.0
    output_tokens: float = 1.0
    in_flight: float = 1.0
    """Of the mean number of requests in flight over the whole replay."""


class WorkerLine(msgspec.Struct, frozen=True):
    """One worker's share, and its line in time (one value a bucket)."""

    worker: str
    requests: int
    input_tokens: int
    cached_tokens: int
    output_tokens: int
    mean_in_flight: float
    in_flight: list[float]
    tokens_per_second: list[float]


class Moment(msgspec.Struct, frozen=True):
    """Time to first token of the requests sent in one bucket; None when there were none."""

    p50: float | None
    p99: float | None


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that a replay found; what ``--json`` writes."""

    title: str
    load: str
    """How requests were paced, in words."""
    requests: int
    ok: int
    rejected: int
    failed: int
    """Including those that took too long or were under way when the replay was stopped."""
    errors: dict[str, int]
    """By code."""
    seconds: float
    """From the start to the last event."""
    requests_per_second: float
    input_tokens_per_second: float
    output_tokens_per_second: float
    input_tokens: int
    cached_tokens: int
    output_tokens: int
    hit_rate: float
    """Share of the prompt tokens of answered requests that came from a prefix cache."""
    time_to_first_token: Spread
    inter_token: Spread
    """Between two tokens of one request, or two events where a server puts several tokens into one."""
    time_per_token: Spread
    """Mean of each request after its first token."""
    latency: Spread
    """From sending to the last event."""
    late: Spread
    """How much after its time a request was sent; well above zero means that the load generator limited the load."""
    balance: Balance
    bucket_seconds: float
    workers: list[WorkerLine]
    first_tokens: list[Moment]


def summarise(recording: Recording, title: str, load: str) -> Report:
    """Return the report of a recording, finished or stopped.

    Args:
        recording: what happened.
        title: names it beside others.
        load: how requests were paced.
    """
    records = recording.records
    good = [record for record in records if record.outcome == "ok"]
    seconds = max((_last_event(record) for record in records), default=0.0)
    tokens = [sum(r.input_tokens for r in good), sum(r.cached for r in good), sum(r.generated for r in good)]
    width = bucket_ticks(seconds) / TICKS
    lines = _lines(recording, seconds, width)
    per_second = 1.0 / seconds if seconds else 0.0
    return Report(
        title=title,
        load=load,
        requests=len(records),
        ok=len(good),
        rejected=sum(record.outcome == "rejected" for record in records),
        failed=sum(record.outcome not in {"ok", "rejected"} for record in records),
        errors=dict(Counter(record.reason or record.outcome for record in records if record.outcome != "ok")),
        seconds=seconds,
        requests_per_second=len(good) * per_second,
        input_tokens_per_second=tokens[0] * per_second,
        output_tokens_per_second=tokens[2] * per_second,
        input_tokens=tokens[0],
        cached_tokens=tokens[1],
        output_tokens=tokens[2],
        hit_rate=tokens[1] / tokens[0] if tokens[0] else 0.0,
        time_to_first_token=spread(r.time_to_first_token for r in good),
        inter_token=_of_histogram(recording.gaps),
        time_per_token=spread(r.time_per_token for r in good),
        latency=spread(_last_event(r) - r.sent for r in good),
        late=spread(max(0.0, r.sent - r.due) for r in records),
        balance=_balance(lines),
        bucket_seconds=width,
        workers=lines,
        first_tokens=_moments(good, seconds, width),
    )


def spread(values: Iterable[float | None]) -> Spread:
    """Return the distribution of these durations (seconds); None is left out. Quantiles are values that occurred."""
    known = sorted(value for value in values if value is not None)
    if not known:
        return Spread()
    p50, p90, p95, p99 = (_quantile(known, share) for share in _SHARES)
    return Spread(len(known), math.fsum(known) / len(known), p50, p90, p95, p99, known[-1])


def _quantile(ordered: Sequence[float], share: float) -> float:
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]


def _of_histogram(gaps: Histogram) -> Spread:
    if not gaps.count:
        return Spread()
    p50, p90, p95, p99 = (gaps.quantile(share) for share in _SHARES)
    return Spread(gaps.count, gaps.total / gaps.count, p50, p90, p95, p99, gaps.highest)


def _last_event(record: Record) -> float:
    ends = (record.sent, record.last, record.end)
    return max(moment for moment in ends if moment is not None)


def _lines(recording: Recording, seconds: float, width: float) -> list[WorkerLine]:
    by_worker: defaultdict[str, list[Record]] = defaultdict(list)
    for record in recording.records:
        if record.worker or record.first is not None:
            by_worker[record.worker].append(record)
    return [_line(recording, worker, by_worker[worker], seconds, width) for worker in sorted(by_worker)]


def _line(recording: Recording, worker: str, mine: list[Record], seconds: float, width: float) -> WorkerLine:
    spans = [(record.sent, _last_event(record)) for record in mine]
    tokens = [0.0] * _buckets(seconds, width)
    # what came in one event counts as one when it comes; the server's count at the end says how much it was
    each = sum(record.generated for record in mine) / max(1, sum(record.arrived for record in mine))
    for tick, count in recording.tokens.get(worker, {}).items():
        tokens[min(int((tick + 0.5) / TICKS / width), len(tokens) - 1)] += count * each / width
    return WorkerLine(
        worker=worker,
        requests=len(mine),
        input_tokens=sum(record.input_tokens for record in mine),
        cached_tokens=sum(record.cached for record in mine),
        output_tokens=sum(record.generated for record in mine),
        mean_in_flight=sum(end - begin for begin, end in spans) / seconds if seconds else 0.0,
        in_flight=_occupancy(spans, seconds, width),
        tokens_per_second=tokens,
    )


def bucket_ticks(seconds: float) -> int:
    """Return the width of a bucket in ticks: a round one, such that the time line has `MOST_BUCKETS` at most."""
    wanted = seconds * TICKS / MOST_BUCKETS
    power = 1
    while True:
        for step in _WIDTHS:
            if step * power >= wanted:
                return step * power
        power *= 10


def _buckets(seconds: float, width: float) -> int:
    return max(1, math.ceil(seconds / width - 1e-9))


def _occupancy(spans: Iterable[tuple[float, float]], seconds: float, width: float) -> list[float]:
    """Return how many of these spans were open in each bucket, on average over the bucket."""
    line = [0.0] * _buckets(seconds, width)
    for begin, end in spans:
        for at in range(int(begin // width), min(int(end // width), len(line) - 1) + 1):
            line[at] += max(0.0, min(end, (at + 1) * width) - max(begin, at * width)) / width
    return line


def _moments(good: Iterable[Record], seconds: float, width: float) -> list[Moment]:
    found: list[list[float]] = [[] for _ in range(_buckets(seconds, width))]
    for record in good:
        if record.time_to_first_token is not None:
            found[min(int(record.sent / width + 1e-9), len(found) - 1)].append(record.time_to_first_token)
    ordered = [sorted(values) for values in found]
    return [Moment(_quantile(v, 0.5), _quantile(v, 0.99)) if v else Moment(None, None) for v in ordered]


def _balance(lines: Sequence[WorkerLine]) -> Balance:
    if not lines:
        return Balance()
    return Balance(
        _uneven([line.requests for line in lines]),
        _uneven([line.output_tokens for line in lines]),
        _uneven([line.mean_in_flight for line in lines]),
    )


def _uneven(values: Sequence[float]) -> float:
    total = sum(values)
    return max(values) * len(values) / total if total else 1.0
