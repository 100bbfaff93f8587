"""What a metric is, and the registry that makes series from the catalogue only.

A process can feed no metric that the catalogue does not list for it: asking for one raises. Histograms take their
bounds from the catalogue unless the settings say otherwise.

Must never hold a list of metrics (see `catalogue`) or know who feeds them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Annotated, Literal, TypeVar

import msgspec
from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.metrics_core import Metric as Family
from prometheus_client.registry import Collector

from holdfast.base.settings import setting
from holdfast.telemetry.series import Cells, Histograms

SeriesT = TypeVar("SeriesT", Cells, Histograms)
Kind = Literal["counter", "gauge", "histogram"]
Process = Literal["frontend", "worker", "router", "supervisor", "every"]
Origin = Literal["seed", "newer", "holdfast", "client"]
"""``seed``: a name that the first Dynamo releases had; ``newer``: one that later releases added; ``holdfast``: ours;
``client``: one that every Prometheus client library uses."""

FRONTEND_PREFIX = "dynamo_frontend"
LABEL_VALUES = 512
"""Different values of one label that come from outside; more of them share `OTHER`."""
OTHER = "other"
UNKNOWN = "unknown"
"""Label value of everything that names no model of ours."""


class Metric(msgspec.Struct, frozen=True):
    """One line of the catalogue."""

    name: str
    """As exposed; counters end in ``_total``."""
    kind: Kind
    labels: tuple[str, ...]
    help: str
    process: Process = "frontend"
    origin: Origin = "seed"
    buckets: tuple[float, ...] = ()
    also: str = ""
    """The name of the same thing in other releases, when it is exposed under that too."""

    @property
    def unit(self) -> str:
        """What the numbers are, read off the name."""
        stem = self.name.removesuffix("_total")
        for word in ("seconds", "bytes", "tokens", "blocks", "percent", "ratio"):
            if stem.endswith(f"_{word}"):
                return word
        return "milliseconds" if stem.endswith("_ms") else ""


class MetricSettings(msgspec.Struct, frozen=True, kw_only=True):
    """Names and bucket bounds. Bounds run from MIN to MAX in COUNT logarithmic steps."""

    metrics_prefix: Annotated[
        str, setting("DYN_METRICS_PREFIX", "What the frontend's metrics are called instead of dynamo_frontend.")
    ] = FRONTEND_PREFIX
    metrics_request_duration_min: Annotated[
        float, setting("DYN_METRICS_REQUEST_DURATION_MIN", "Lowest bucket of the request duration, seconds.", gt=0)
    ] = 1.0
    metrics_request_duration_max: Annotated[
        float, setting("DYN_METRICS_REQUEST_DURATION_MAX", "Highest bucket of the request duration, seconds.", gt=0)
    ] = 512.0
    metrics_request_duration_count: Annotated[
        int, setting("DYN_METRICS_REQUEST_DURATION_COUNT", "Buckets of the request duration.", ge=2, le=64)
    ] = 10
    metrics_ttft_min: Annotated[
        float, setting("DYN_METRICS_TTFT_MIN", "Lowest bucket of the time to the first token, seconds.", gt=0)
    ] = 0.001
    metrics_ttft_max: Annotated[
        float, setting("DYN_METRICS_TTFT_MAX", "Highest bucket of the time to the first token, seconds.", gt=0)
    ] = 480.0
    metrics_ttft_count: Annotated[
        int, setting("DYN_METRICS_TTFT_COUNT", "Buckets of the time to the first token.", ge=2, le=64)
    ] = 18
    metrics_itl_min: Annotated[
        float, setting("DYN_METRICS_ITL_MIN", "Lowest bucket of the inter-token latency, seconds.", gt=0)
    ] = 0.001
    metrics_itl_max: Annotated[
        float, setting("DYN_METRICS_ITL_MAX", "Highest bucket of the inter-token latency, seconds.", gt=0)
    ] = 2.0
    metrics_itl_count: Annotated[
        int, setting("DYN_METRICS_ITL_COUNT", "Buckets of the inter-token latency.", ge=2, le=64)
    ] = 13
    metrics_input_sequence_min: Annotated[
        float, setting("DYN_METRICS_INPUT_SEQUENCE_MIN", "Lowest bucket of the prompt length, tokens.", gt=0)
    ] = 50.0
    metrics_input_sequence_max: Annotated[
        float, setting("DYN_METRICS_INPUT_SEQUENCE_MAX", "Highest bucket of the prompt length, tokens.", gt=0)
    ] = 128_000.0
    metrics_input_sequence_count: Annotated[
        int, setting("DYN_METRICS_INPUT_SEQUENCE_COUNT", "Buckets of the prompt length.", ge=2, le=64)
    ] = 12
    metrics_output_sequence_min: Annotated[
        float, setting("DYN_METRICS_OUTPUT_SEQUENCE_MIN", "Lowest bucket of the answer's length, tokens.", gt=0)
    ] = 50.0
    metrics_output_sequence_max: Annotated[
        float, setting("DYN_METRICS_OUTPUT_SEQUENCE_MAX", "Highest bucket of the answer's length, tokens.", gt=0)
    ] = 32_000.0
    metrics_output_sequence_count: Annotated[
        int, setting("DYN_METRICS_OUTPUT_SEQUENCE_COUNT", "Buckets of the answer's length.", ge=2, le=64)
    ] = 10

    def bounds(self) -> dict[str, tuple[float, ...]]:
        """Return the bucket bounds that the settings decide, by metric name."""
        found = {}
        for metric, name in _SETTABLE.items():
            low, high, count = (getattr(self, f"metrics_{name}_{part}") for part in ("min", "max", "count"))
            found[metric] = logarithmic(low, high, count)
        return found


_SETTABLE = {
    f"{FRONTEND_PREFIX}_request_duration_seconds": "request_duration",
    f"{FRONTEND_PREFIX}_time_to_first_token_seconds": "ttft",
    f"{FRONTEND_PREFIX}_inter_token_latency_seconds": "itl",
    f"{FRONTEND_PREFIX}_input_sequence_tokens": "input_sequence",
    f"{FRONTEND_PREFIX}_output_sequence_tokens": "output_sequence",
}


def logarithmic(low: float, high: float, count: int) -> tuple[float, ...]:
    """Return ``count`` bounds from low to high, evenly spaced by logarithm, rounded to two significant digits.

    Bounds that round to the same number are given once; a high below low gives both, in order.
    """
    low, high = min(low, high), max(low, high)
    ratio = math.log(high / low) / (count - 1)
    bounds = {float(f"{low * math.exp(ratio * i):.2g}") for i in range(1, count - 1)}
    return tuple(sorted({b for b in bounds if low < b < high} | {low, high}))


class Registry:
    """The metrics of one process, created on demand from the catalogue.

    Args:
        catalogue: all metrics there are.
        process: whose metrics may be fed here.
        settings: prefix and bucket bounds.
    """

    def __init__(
        self,
        catalogue: Iterable[Metric],
        process: Literal["frontend", "worker", "router", "supervisor"],
        settings: MetricSettings | None = None,
    ):
        settings = settings or MetricSettings()
        self.registry = CollectorRegistry()
        self._series: list[Cells | Histograms] = []
        self._process = CollectorRegistry()
        self._metrics: Mapping[str, Metric] = {m.name: m for m in catalogue if m.process in (process, "every")}
        self._bounds = settings.bounds()
        self._prefix = settings.metrics_prefix.rstrip("_") or FRONTEND_PREFIX

    def counter(self, name: str) -> Cells:
        """Return a new counter. Raises KeyError when the catalogue has no such counter for this process."""
        metric = self._find(name, "counter")
        return self._registered(Cells(self._exposed(metric), metric.help, metric.labels, counter=True))

    def gauge(self, name: str) -> Cells:
        """Return a new gauge. Raises KeyError when the catalogue has no such gauge for this process."""
        metric = self._find(name, "gauge")
        return self._registered(Cells(self._exposed(metric), metric.help, metric.labels, counter=False))

    def histogram(self, name: str) -> Histograms:
        """Return a new histogram. Raises KeyError when the catalogue has no such histogram for this process."""
        metric = self._find(name, "histogram")
        return self._registered(Histograms(self._exposed(metric), metric.help, metric.labels, self.bounds(name)))

    def watch_process(self) -> None:
        """Show memory, files and CPU time of this process too; they are read when somebody scrapes."""
        self._find("process_resident_memory_bytes", "gauge")
        process = _Process()
        self.registry.register(process)
        self._process.register(process)

    def bounds(self, name: str) -> tuple[float, ...]:
        """Return the upper bounds of a histogram's buckets, without infinity."""
        return self._bounds.get(name) or self._metrics[name].buckets

    def render(self) -> bytes:
        """Return everything in Prometheus' text format."""
        text = "".join([series.expose() for series in self._series])
        return text.encode() + generate_latest(self._process)

    def _registered(self, series: SeriesT) -> SeriesT:
        self.registry.register(series)
        self._series.append(series)
        return series

    def _find(self, name: str, kind: Kind) -> Metric:
        metric = self._metrics[name]
        if metric.kind != kind:
            raise KeyError(f"{name} is a {metric.kind}, not a {kind}")
        return metric

    def _exposed(self, metric: Metric) -> str:
        if self._prefix != FRONTEND_PREFIX and metric.name.startswith(f"{FRONTEND_PREFIX}_"):
            return self._prefix + metric.name.removeprefix(FRONTEND_PREFIX)
        return metric.name


class _Process(Collector):
    """`prometheus_client`'s own collector, made at the first scrape: whoever is never scraped does not pay for it."""

    def __init__(self) -> None:
        self._collector: ProcessCollector | None = None

    def collect(self) -> Iterable[Family]:
        """Return the present state (called by the registry)."""
        if self._collector is None:
            self._collector = ProcessCollector(registry=None)
        return self._collector.collect()


class LabelValues:
    """Keeps a label's values bounded: beyond `LABEL_VALUES` different ones, all new ones are `OTHER`."""

    def __init__(self, most: int = LABEL_VALUES):
        self._most = most
        self._known: set[str] = set()

    def bounded(self, value: str) -> str:
        """Return the value, or what it shares with all others that came too late."""
        if value in self._known:
            return value
        if len(self._known) >= self._most:
            return OTHER
        self._known.add(value)
        return value
