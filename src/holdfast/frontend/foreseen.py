"""Counters that begin at nought: every label set that can be known before its first event.

A counter that is born at one has not increased, so that an alert on its increase misses the first event. What cannot
be known beforehand (which worker, which reason of an engine's own) is left out. Must never count anything.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, get_args

from holdfast.base.errors import HoldfastError
from holdfast.requests.migration import MigrationType
from holdfast.telemetry.metric import UNKNOWN
from holdfast.telemetry.outcomes import ErrorType

if TYPE_CHECKING:
    from holdfast.frontend.metrics import FrontendMetrics

SURFACES = ("chat_completions", "completions")
KINDS = ("stream", "unary")
KNOBS = (
    ("frontend", "DYN_ACTIVE_DECODE_BLOCKS_THRESHOLD"),
    ("frontend", "DYN_ACTIVE_PREFILL_TOKENS_THRESHOLD"),
    ("frontend", "DYN_ACTIVE_PREFILL_TOKENS_THRESHOLD_FRAC"),
    ("frontend", "DYN_HTTP_MAX_REQUESTS"),
    ("frontend", "DYN_MIGRATION_MAX_WAITING"),
    ("frontend queue", "DYN_ADMISSION_QUEUE_LIMIT"),
    ("frontend queue", "DYN_ADMISSION_QUEUE_TIMEOUT_SECS"),
    ("worker", "DYN_ENGINE_REQUEST_LIMIT"),
    ("fleet", "workers"),
)
"""(layer, knob) of rejections of requests for a model."""
BEFORE_A_MODEL = (
    ("frontend", "DYN_HTTP_MAX_CONNECTIONS"),
    ("frontend", "DYN_HTTP_MAX_REQUESTS"),
    ("frontend", "ALL_BODIES_BYTES"),
    ("frontend", "shutdown"),
)
"""(layer, knob) of those that come before the model is known."""
_LOST = ("disconnected", "peer_silent", "worker_stalled", "cannot_connect")
"""Why workers become suspect or are ejected."""
_STATES = ("unknown", "probing", "usable", "suspect", "ejected", "draining")
_NEVER_THE_REQUESTS = frozenset({"caller", "request", "internal"})
"""Faults that are followed by no other attempt."""


def foresee(metrics: FrontendMetrics) -> None:
    """Begin what has no model, or the one for names that are not ours."""
    for error in _errors():
        metrics.failures.labels(error.fault, error.code)
    for state in _STATES:
        metrics.transitions.labels(state, "")
    for state in ("suspect", "ejected"):
        for cause in _LOST:
            metrics.transitions.labels(state, cause)
    for layer, knob in BEFORE_A_MODEL:
        metrics.rejections_by_knob.labels(UNKNOWN, layer, knob)
    _requests(metrics, UNKNOWN, ("validation", "not_found", "overload", "cancelled", "internal"))


def foresee_model(metrics: FrontendMetrics, model: str) -> None:
    """Begin what belongs to a model, by its label."""
    _requests(metrics, model, get_args(ErrorType))
    for kind in get_args(MigrationType):
        metrics.migrations.labels(model, kind)
    for error in _errors():
        if error.fault not in _NEVER_THE_REQUESTS:
            metrics.attempt_failures.labels(model, error.code)
    for join in ("exact", "declared"):
        metrics.joins.labels(model, join)
    for layer, knob in KNOBS:
        metrics.rejections_by_knob.labels(model, layer, knob)
    for surface in SURFACES:
        metrics.rejections.labels(model, surface)
    metrics.prefill.foresee(model)
    metrics.migration_too_long.labels(model)
    metrics.disconnects.labels(model)


def _requests(metrics: FrontendMetrics, model: str, words: tuple[str, ...]) -> None:
    for surface in SURFACES:
        for kind in KINDS:
            metrics.started.labels(model, surface, kind)
            metrics.cancellations.labels(model, surface, kind)
            for word in words:
                metrics.requests.labels(model, surface, kind, "error" if word else "success", word)


def _errors(root: type[HoldfastError] = HoldfastError) -> Iterator[type[HoldfastError]]:
    for child in root.__subclasses__():
        yield child
        yield from _errors(child)
