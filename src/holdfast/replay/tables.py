"""Shows reports as one table, side by side when there are several. Must never compute a figure."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from rich.table import Table

from holdfast.replay.report import Report, Spread

_QUANTILES = "mean / p50 / p90 / p99 / max"

MOST_DETAILED = 2

Cell = Callable[[Report], str]


def table(reports: Sequence[Report]) -> Table:
    """Return a rich table with one column for each report; up to `MOST_DETAILED` also with the workers' shares."""
    loads = " · ".join(dict.fromkeys(report.load for report in reports))
    shown = Table(title=loads, title_justify="left", caption=f"ms: {_QUANTILES}", caption_justify="left")
    shown.add_column("", no_wrap=True)
    for report in reports:
        shown.add_column(report.title, justify="right")
    for name, cell in _ROWS:
        shown.add_row(name, *(cell(report) for report in reports))
    for title, cell in _workers(reports) if len(reports) <= MOST_DETAILED else ():
        shown.add_row(title, *(cell(report) for report in reports))
    return shown


def _spread(name: str, of: Callable[[Report], Spread]) -> tuple[str, Cell]:
    def cell(report: Report) -> str:
        found = of(report)
        values = (found.mean, found.p50, found.p90, found.p99, found.max)
        return " / ".join(_milliseconds(value) for value in values) if found.count else "-"

    return f"{name}, ms", cell


def _milliseconds(seconds: float) -> str:
    value = seconds * 1e3
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 1 else f"{value:.2f}"


def _errors(report: Report) -> str:
    return ", ".join(f"{code} {count}" for code, count in sorted(report.errors.items())) or "none"


def _balance(report: Report) -> str:
    even = report.balance
    return f"{even.requests:.2f} / {even.output_tokens:.2f} / {even.in_flight:.2f}"


_ROWS: list[tuple[str, Cell]] = [
    ("requests: ok / rejected / failed", lambda r: f"{r.ok:,} / {r.rejected:,} / {r.failed:,}"),
    ("errors", _errors),
    ("duration, s", lambda r: f"{r.seconds:,.1f}"),
    ("requests/s", lambda r: f"{r.requests_per_second:,.2f}"),
    ("tokens/s: in / out", lambda r: f"{r.input_tokens_per_second:,.0f} / {r.output_tokens_per_second:,.0f}"),
    ("prompt tokens from the prefix cache", lambda r: f"{r.hit_rate:.1%}"),
    _spread("time to first token", lambda r: r.time_to_first_token),
    _spread("between tokens", lambda r: r.inter_token),
    _spread("per token of a request", lambda r: r.time_per_token),
    _spread("whole request", lambda r: r.latency),
    _spread("sent late", lambda r: r.late),
    ("busiest worker / mean: requests / tokens / in flight", _balance),
]


def _workers(reports: Sequence[Report]) -> list[tuple[str, Cell]]:
    most = max(len(report.workers) for report in reports) if reports else 0

    def row(at: int) -> Cell:
        def cell(report: Report) -> str:
            if at >= len(report.workers):
                return ""
            line = report.workers[at]
            hits = line.cached_tokens / line.input_tokens if line.input_tokens else 0.0
            name = line.worker or "(not named)"
            return f"{name}: {line.requests:,} requests, {line.mean_in_flight:.1f} in flight, {hits:.1%} cached"

        return cell

    return [("workers" if at == 0 else "", row(at)) for at in range(most)]
