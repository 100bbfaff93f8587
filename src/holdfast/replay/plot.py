"""Draws reports: one run over time, or several kinds of runs over their load. Must never compute beyond scaling."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

from holdfast.replay.report import Report
from holdfast.replay.svg import Panel, Point, document

_CURVES: tuple[tuple[str, Callable[[Report], float]], ...] = (
    ("output tokens per second", lambda report: report.output_tokens_per_second),
    ("time to first token, median, s", lambda report: report.time_to_first_token.p50),
    ("time to first token, 99th percentile, s", lambda report: report.time_to_first_token.p99),
    ("between tokens, mean, s", lambda report: report.inter_token.mean),
    ("share of prompt tokens from the prefix cache", lambda report: report.hit_rate),
)


def picture(report: Report) -> str:
    """Return one run as SVG text: requests in flight and output tokens per second of each worker, first tokens."""
    decimals = 0 if report.seconds >= 40 else 1
    ticks = [(share, f"{report.seconds * share:,.{decimals}f} s") for share in (0.0, 0.25, 0.5, 0.75, 1.0)]

    def over_time(values: Sequence[float | None]) -> list[Point]:
        seconds = report.seconds or 1.0
        return [(min(1.0, (at + 0.5) * report.bucket_seconds / seconds), value) for at, value in enumerate(values)]

    lines = report.workers
    first = [[moment.p50 for moment in report.first_tokens], [moment.p99 for moment in report.first_tokens]]
    panels = [
        Panel("requests in flight", ticks, [over_time(line.in_flight) for line in lines]),
        Panel("output tokens per second", ticks, [over_time(line.tokens_per_second) for line in lines]),
        Panel("time to first token, s", ticks, [over_time(values) for values in first], ("p50", "p99")),
    ]
    return document(f"{report.title}: {report.load}", [line.worker or "all" for line in lines], panels)


def curves(title: str, unit: str, series: Mapping[str, Sequence[tuple[float, Report]]]) -> str:
    """Return several kinds of runs as SVG text, for example router modes over the concurrency.

    Args:
        title: of the picture.
        unit: what the loads are, for the axis.
        series: by name, (load, report) pairs; loads are positive and shown on a logarithmic axis.
    """
    loads = sorted({load for points in series.values() for load, _ in points})
    low, high = math.log(loads[0]), math.log(loads[-1])

    def share(load: float) -> float:
        return (math.log(load) - low) / (high - low) if high > low else 0.5

    ticks = [(share(load), f"{load:g} {unit}" if load == loads[0] else f"{load:g}") for load in loads]
    panels = [
        Panel(
            name, ticks, [[(share(load), value(one)) for load, one in points] for points in series.values()], dots=True
        )
        for name, value in _CURVES
    ]
    return document(title, list(series), panels)
