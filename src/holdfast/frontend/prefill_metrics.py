"""What is counted of prompts that are computed apart from their streams. Must never decide anything."""

from __future__ import annotations

from holdfast.base.errors import HoldfastError
from holdfast.requests.disagg import REASONS, Reason
from holdfast.telemetry.metric import Registry


class PrefillMetrics:
    """Of one frontend."""

    def __init__(self, source: Registry):
        self._decisions = source.counter("holdfast_frontend_prefill_decisions_total")
        self._legs = source.counter("holdfast_frontend_prefill_legs_total")
        self._seconds = source.histogram("holdfast_frontend_prefill_leg_seconds")

    def foresee(self, model: str) -> None:
        """Let the counters of a model begin at nought."""
        for reason in REASONS:
            self._decisions.labels(model, reason)
        self._legs.labels(model, "handed_over")

    def decided(self, model: str, reason: Reason) -> None:
        """Where the prompt of an attempt is computed."""
        self._decisions.labels(model, reason).inc()

    def ended(self, model: str, error: HoldfastError | None, seconds: float) -> None:
        """A prefill leg has handed over, or failed."""
        self._legs.labels(model, error.code if error is not None else "handed_over").inc()
        if error is None:
            self._seconds.labels(model).observe(seconds)
