"""The frontend's counters, under the names that Dynamo's users know, and the observer that feeds them.

Names, labels and units: reference, section 3. Nothing here runs per token; what happens per token is summed by
the streams and added when they end. Must never decide anything.
"""

from __future__ import annotations

import asyncio

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from holdfast.base.errors import HoldfastError
from holdfast.requests.generation import Generation
from holdfast.requests.migration import MigrationType
from holdfast.requests.plan import Ending

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class FrontendMetrics:
    """All metrics of one frontend in a registry of their own; an `Observer` of the request lifecycle."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        r = self.registry
        self.requests = Counter(
            "dynamo_frontend_requests",
            "HTTP requests by outcome.",
            ("model", "endpoint", "request_type", "status", "error_type"),
            registry=r,
        )
        self.inflight = Gauge("dynamo_frontend_inflight_requests", "Requests being served.", ("model",), registry=r)
        self.leases = Gauge("holdfast_frontend_leases", "Leases held, by kind; zero at rest.", ("kind",), registry=r)
        self.migrations = Counter(
            "dynamo_frontend_model_migration",
            "Streams moved to another worker.",
            ("model", "migration_type"),
            registry=r,
        )
        self.migration_gap = Histogram(
            "holdfast_frontend_migration_gap_seconds",
            "From the failure of an attempt to the next new token.",
            ("model",),
            registry=r,
            buckets=_SECONDS,
        )
        self.cancellations = Counter(
            "dynamo_frontend_model_cancellation",
            "Requests cancelled by their client.",
            ("model", "endpoint", "request_type"),
            registry=r,
        )
        self.attempt_failures = Counter(
            "holdfast_frontend_attempt_failures", "Attempts that failed, by error code.", ("model", "code"), registry=r
        )
        self.first_token = Histogram(
            "dynamo_frontend_time_to_first_token_seconds",
            "From arrival to the first token.",
            ("model",),
            registry=r,
            buckets=_SECONDS,
        )
        self.duration = Histogram(
            "dynamo_frontend_request_duration_seconds",
            "From arrival to the end.",
            ("model",),
            registry=r,
            buckets=_SECONDS,
        )
        self.output_tokens = Counter(
            "dynamo_frontend_output_tokens", "Tokens delivered to clients.", ("model",), registry=r
        )
        self.input_tokens = Counter("dynamo_frontend_input_tokens", "Prompt tokens.", ("model",), registry=r)
        self.tokens_after_cancel = Gauge(
            "holdfast_worker_tokens_after_cancel",
            "Tokens that a worker's engine generated after a cancel had reached it.",
            ("worker",),
            registry=r,
        )

    # the observer

    def attempt_started(self, generation: Generation) -> None:
        """See `Observer`."""

    def accepted(self, generation: Generation, first: bool) -> None:
        """See `Observer`."""

    def migration_started(self, generation: Generation, error: HoldfastError) -> None:
        """See `Observer`."""
        model = generation.plan.model
        kind: MigrationType = generation.migration_type
        self.attempt_failures.labels(model, error.code).inc()
        self.migrations.labels(model, kind).inc()

    def migrated(self, generation: Generation, gap_seconds: float) -> None:
        """See `Observer`."""
        self.migration_gap.labels(generation.plan.model).observe(gap_seconds)

    def ended(self, generation: Generation, ending: Ending) -> None:
        """See `Observer`."""
        plan = generation.plan
        self.input_tokens.labels(plan.model).inc(plan.prompt_length)
        self.output_tokens.labels(plan.model).inc(ending.completion_tokens)
        self.duration.labels(plan.model).observe(asyncio.get_running_loop().time() - generation.started_at)
