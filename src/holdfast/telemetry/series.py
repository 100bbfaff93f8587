"""Series that cost a fraction of a microsecond to feed, and speak `prometheus_client` only when they are scraped.

At a scrape the text is written here too, from names and labels that were put together once: the library takes seven
microseconds a line, and a frontend has a thousand lines to write between two tokens.

A library's counter takes a lock and two function calls per increment, its histogram walks all buckets; a request
touches twenty of them. Here a child is a slot that its holder keeps. Fed from one thread, read from any.

Must never forget a label set that somebody holds a child of.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from itertools import accumulate
from math import isfinite, isnan
from threading import Lock
from typing import Generic, TypeVar

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.registry import Collector

TICKS_PER_SECOND = 10_000

_HEADS_KEPT = 256
"""Label sets whose text is kept for a metric whose present label sets are fewer than half as many."""
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


_folding = Lock()
"""Values that were noted may be counted by a scrape at the same time, in another thread."""


class Buckets:
    """One histogram, fed by `observe` and `add_ticks`, or by ``note``. Args: upper bounds, rising, without infinity."""

    __slots__ = ("_bounds", "_counts", "_sum", "fresh", "note")

    def __init__(self, bounds: Sequence[float]):
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0
        self.fresh: list[float] = []
        """What was noted and not counted yet."""
        self.note: Callable[[float], None] = self.fresh.append
        """Keep one value to be counted at the next scrape; whoever uses it calls `fold` before these are many."""

    @property
    def counts(self) -> list[int]:
        """How many values lie in each bucket; not cumulative, the last one is beyond all bounds."""
        self.fold()
        return self._counts

    @property
    def sum(self) -> float:
        """Of all values."""
        self.fold()
        return self._sum

    def observe(self, value: float) -> None:
        """Count one value at once."""
        self._counts[bisect_left(self._bounds, value)] += 1
        self._sum += value

    def fold(self) -> None:
        """Count what was noted."""
        fresh = self.fresh
        if not fresh:
            return
        with _folding:
            values = fresh[:]
            del fresh[: len(values)]
            values.sort()  # then there are as many searches as bounds, not as values
            counts, below = self._counts, 0
            for bucket, bound in enumerate(self._bounds):
                reached = bisect_right(values, bound, below)
                counts[bucket] += reached - below
                below = reached
            counts[-1] += len(values) - below
            self._sum += sum(values)

    def add_ticks(self, gaps: Counter[int]) -> None:
        """Count many values: how often each number of ticks (of 0.1 ms) came."""
        total = 0
        for gap, count in gaps.items():
            self._counts[bisect_left(self._bounds, gap / TICKS_PER_SECOND)] += count
            total += gap * count
        self._sum += total / TICKS_PER_SECOND


class Series(Collector, Generic[ChildT]):
    """All label sets of one metric."""

    _kind = "untyped"

    def __init__(self, name: str, text: str, labels: tuple[str, ...]):
        self._name, self._text, self._labels = name, text, labels
        self._children: dict[tuple[str, ...], ChildT] = {}
        self._heads: dict[tuple[str, ...], list[str]] = {}
        """What the lines of a child begin with; kept when the child is forgotten, for it usually comes back."""
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

    def expose(self) -> str:
        """Return the present state in Prometheus' text format."""
        lines = [f"# HELP {self._name} {_escaped(self._text)}\n# TYPE {self._name} {self._kind}\n"]
        heads = self._heads
        if len(heads) > _HEADS_KEPT and len(heads) > 2 * len(self._children):
            heads.clear()
        for values, child in list(self._children.items()):
            known = heads.get(values)
            if known is None:
                known = heads[values] = self._beginnings(values)
            lines += [f"{head} {_number(value)}\n" for head, value in zip(known, self._values(child), strict=True)]
        return "".join(lines)

    def _with(self, values: tuple[str, ...], suffix: str = "", *more: str) -> str:
        """Return what a line begins with: name and labels."""
        pairs = [f'{label}="{_quoted(value)}"' for label, value in zip(self._labels, values, strict=True)]
        labels = ",".join([*pairs, *more])
        return f"{self._name}{suffix}{{{labels}}}" if labels else f"{self._name}{suffix}"

    def _make(self) -> ChildT:
        raise NotImplementedError

    def _beginnings(self, values: tuple[str, ...]) -> list[str]:
        raise NotImplementedError

    def _values(self, child: ChildT) -> list[float]:
        raise NotImplementedError


class Cells(Series[Cell]):
    """A counter or gauge."""

    def __init__(self, name: str, text: str, labels: tuple[str, ...], *, counter: bool):
        self._family = CounterMetricFamily if counter else GaugeMetricFamily
        self._kind = "counter" if counter else "gauge"
        super().__init__(name, text, labels)

    def _make(self) -> Cell:
        return Cell()

    def _beginnings(self, values: tuple[str, ...]) -> list[str]:
        return [self._with(values)]

    def _values(self, child: Cell) -> list[float]:
        return [child.value]

    def collect(self) -> Iterable[CounterMetricFamily | GaugeMetricFamily]:
        """Return the present state (called by the registry)."""
        family = self._family(self._name, self._text, labels=self._labels)
        for values, cell in list(self._children.items()):
            family.add_metric(values, cell.value)
        return [family]


class Histograms(Series[Buckets]):
    """A histogram."""

    _kind = "histogram"

    def __init__(self, name: str, text: str, labels: tuple[str, ...], bounds: tuple[float, ...]):
        self._bounds = bounds
        self._names = [*(str(float(bound)) for bound in bounds), "+Inf"]
        super().__init__(name, text, labels)

    def _make(self) -> Buckets:
        return Buckets(self._bounds)

    def _beginnings(self, values: tuple[str, ...]) -> list[str]:
        buckets = [self._with(values, "_bucket", f'le="{name}"') for name in self._names]
        return [*buckets, self._with(values, "_count"), self._with(values, "_sum")]

    def _values(self, child: Buckets) -> list[float]:
        counts = list(accumulate(child.counts))
        return [*counts, counts[-1], child.sum]

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


def _number(value: float) -> str:
    number = float(value)
    return repr(number) if isfinite(number) else "NaN" if isnan(number) else "+Inf" if number > 0 else "-Inf"


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace("\n", "\\n")


def _quoted(text: str) -> str:
    return _escaped(text).replace('"', '\\"')
