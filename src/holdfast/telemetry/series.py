"""Series that cost a fraction of a microsecond to feed, and speak `prometheus_client` only when they are scraped.

A library's counter takes a lock and two function calls per increment, its histogram walks all buckets; a request
touches twenty of them. Here a child is a slot that its holder keeps. Fed from one thread, read from any.

Must never forget a label set that somebody holds a child of.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Generic, TypeVar

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.registry import Collector

TICKS_PER_SECOND = 10_000

ChildT = TypeVar("ChildT")


class Cell:
    """One number: of a counter or a gauge."""

    __slots__ = ("value",)

    def __init__(self) -> None:
        self.value = 0.0

    def inc(self, amount: float = 1.0) -> None:
        """Add."""
        self.value += amount

    def dec(self, amount: float = 1.0) -> None:
        """Take away; gauges only."""
        self.value -= amount

    def set(self, value: float) -> None:
        """Replace; gauges only."""
        self.value = value

    def __enter__(self) -> None:
        """Count one as long as the block lasts."""
        self.value += 1

    def __exit__(self, *_: object) -> None:
        self.value -= 1


class Buckets:
    """One histogram. Args: upper bounds, rising, without infinity."""

    __slots__ = ("_bounds", "counts", "sum")

    def __init__(self, bounds: Sequence[float]):
        self._bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        """Not cumulative; the last one is beyond all bounds."""
        self.sum = 0.0

    def observe(self, value: float) -> None:
        """Count one value."""
        self.counts[bisect_left(self._bounds, value)] += 1
        self.sum += value

    def add_ticks(self, gaps: Counter[int]) -> None:
        """Count many values: how often each number of ticks (of 0.1 ms) came."""
        total = 0
        for gap, count in gaps.items():
            self.counts[bisect_left(self._bounds, gap / TICKS_PER_SECOND)] += count
            total += gap * count
        self.sum += total / TICKS_PER_SECOND


class Series(Collector, Generic[ChildT]):
    """All label sets of one metric."""

    def __init__(self, name: str, text: str, labels: tuple[str, ...]):
        self._name, self._text, self._labels = name, text, labels
        self._children: dict[tuple[str, ...], ChildT] = {}
        if not labels:
            self.labels()

    def labels(self, *values: str) -> ChildT:
        """Return the child of these label values, in the catalogue's order; the same one every time."""
        child = self._children.get(values)
        if child is None:
            if len(values) != len(self._labels):
                raise ValueError(f"{self._name} has the labels {self._labels}, got {values}")
            child = self._children[values] = self._make()
        return child

    def clear(self) -> None:
        """Forget all label sets, before they are all set anew."""
        self._children.clear()

    def _make(self) -> ChildT:
        raise NotImplementedError


class Cells(Series[Cell]):
    """A counter or gauge."""

    def __init__(self, name: str, text: str, labels: tuple[str, ...], *, counter: bool):
        self._family = CounterMetricFamily if counter else GaugeMetricFamily
        super().__init__(name, text, labels)

    def _make(self) -> Cell:
        return Cell()

    def collect(self) -> Iterable[CounterMetricFamily | GaugeMetricFamily]:
        """Return the present state (called by the registry)."""
        family = self._family(self._name, self._text, labels=self._labels)
        for values, cell in list(self._children.items()):
            family.add_metric(values, cell.value)
        return [family]


class Histograms(Series[Buckets]):
    """A histogram."""

    def __init__(self, name: str, text: str, labels: tuple[str, ...], bounds: tuple[float, ...]):
        self._bounds = bounds
        self._names = [*(str(float(bound)) for bound in bounds), "+Inf"]
        super().__init__(name, text, labels)

    def _make(self) -> Buckets:
        return Buckets(self._bounds)

    def collect(self) -> Iterable[HistogramMetricFamily]:
        """Return the present state (called by the registry)."""
        family = HistogramMetricFamily(self._name, self._text, labels=self._labels)
        for values, child in list(self._children.items()):
            running, buckets = 0, []
            for name, count in zip(self._names, child.counts, strict=True):
                running += count
                buckets.append((name, float(running)))
            family.add_metric(values, buckets, child.sum)
        return [family]
