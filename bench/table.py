"""Rows of the one table that a benchmark prints."""

from __future__ import annotations

from typing import NamedTuple


class Row(NamedTuple):
    """What was measured, the value, and what it compares with in the same run."""

    what: str
    value: str
    compared: str = ""


def percentile(values: list[float], share: float) -> float:
    """Return the value below which this share of the values lies."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * share))]


def show(rows: list[Row]) -> None:
    """Print the table."""
    width = max(len(row.what) for row in rows)
    print(f"\n{'what':<{width}}  {'Holdfast':>20}  compared in the same run")
    for row in rows:
        print(f"{row.what:<{width}}  {row.value:>20}  {row.compared}")
