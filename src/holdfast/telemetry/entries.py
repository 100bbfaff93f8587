"""How a line of the catalogue is written, and the labels and bucket bounds that several lines share.

Must never hold a line itself.
"""

from __future__ import annotations

from holdfast.telemetry.metric import Metric, Origin, Process

FRONT = "dynamo_frontend_"
COMPONENT = "dynamo_component_"
OURS = "holdfast_frontend_"
WORKER = "holdfast_worker_"
SUPERVISOR = "holdfast_supervisor_"
MODEL = ("model",)
ROUTE = ("model", "endpoint", "request_type")
SERVED = ("dynamo_namespace", "dynamo_component", "dynamo_endpoint", "worker_id")
HOSTED = ("dynamo_namespace", "dynamo_component", "worker_id")
RANK = ("worker_id", "dp_rank", "worker_type")

QUICK = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
TINY = (0.00001, 0.000025, 0.00005, *QUICK)
LONG = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
TOKENS = (0.0, 16.0, 64.0, 256.0, 1024.0, 4096.0, 16384.0, 65536.0, 131072.0)


def counter(
    name: str, labels: tuple[str, ...], text: str, process: Process = "frontend", origin: Origin = "seed"
) -> Metric:
    """Return a counter's line."""
    return Metric(name, "counter", labels, text, process, origin)


def gauge(
    name: str,
    labels: tuple[str, ...],
    text: str,
    process: Process = "frontend",
    origin: Origin = "seed",
    *,
    also: str = "",
) -> Metric:
    """Return a gauge's line; ``also``: another name under which it is exposed."""
    return Metric(name, "gauge", labels, text, process, origin, also=also)


def histogram(
    name: str,
    labels: tuple[str, ...],
    text: str,
    buckets: tuple[float, ...],
    process: Process = "frontend",
    *,
    origin: Origin = "seed",
) -> Metric:
    """Return a histogram's line; ``buckets``: upper bounds, rising, without infinity."""
    return Metric(name, "histogram", labels, text, process, origin, buckets)
