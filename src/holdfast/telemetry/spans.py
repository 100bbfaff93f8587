"""Traces: settings, and what a process does with its spans while nobody wants them (nothing).

Spans are made when a request has ended, from the same notes that its explanation is told from (`explain`); their
ids are known from the start (`context`). So an untraced request pays nothing, and a traced one nothing per token.
The exporter (`otlp`) is imported when it is switched on.

Must never import OpenTelemetry.
"""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

from holdfast.base.settings import setting
from holdfast.telemetry.context import RequestContext
from holdfast.telemetry.explain import RequestFacts

Protocol = Literal["grpc", "http/protobuf"]


class TraceSettings(msgspec.Struct, frozen=True, kw_only=True):
    """Names of the reference and OpenTelemetry. Headers, certificates, compression: the exporter's own OTEL_*."""

    otel_export_enabled: Annotated[
        bool, setting("OTEL_EXPORT_ENABLED", "Export traces; needs the extra holdfast[otel].")
    ] = False
    otel_service_name: Annotated[str, setting("OTEL_SERVICE_NAME", "Service name in traces.")] = "dynamo"
    otel_endpoint: Annotated[
        str, setting("OTEL_EXPORTER_OTLP_ENDPOINT", "Where telemetry goes; with http, /v1/traces is appended.")
    ] = "http://localhost:4317"
    otel_traces_endpoint: Annotated[
        str, setting("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "Where traces go, as it stands; wins over the general one.")
    ] = ""
    otel_protocol: Annotated[
        Protocol, setting("OTEL_EXPORTER_OTLP_PROTOCOL", "How: grpc, or http/protobuf (usually port 4318).")
    ] = "grpc"
    otel_traces_protocol: Annotated[
        Protocol | None, setting("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "The same for traces alone.")
    ] = None
    otel_sample_ratio: Annotated[
        float,
        setting(
            "OTEL_TRACES_SAMPLE_RATIO", "Share of traces begun here that are recorded; clients' own go on.", ge=0, le=1
        ),
    ] = 1.0

    @property
    def protocol(self) -> Protocol:
        """The protocol of traces."""
        return self.otel_traces_protocol or self.otel_protocol

    @property
    def target(self) -> str:
        """The full endpoint of traces."""
        if self.otel_traces_endpoint:
            return self.otel_traces_endpoint
        if self.protocol == "grpc":
            return self.otel_endpoint
        return f"{self.otel_endpoint.rstrip('/')}/v1/traces"


class CallFacts(msgspec.Struct, frozen=True):
    """One attempt as its worker saw it. Times in nanoseconds of the stopwatch."""

    began: int
    ended: int
    first_token: int = 0
    """0: none came."""
    tokens: int = 0
    finish: str = ""
    code: str = ""
    error: str = ""


class Spans:
    """What a process does with its finished requests and calls: nothing, unless an exporter takes its place."""

    def sampled(self, trace_id: str) -> bool:  # noqa: ARG002 - exporters decide by it
        """Return whether a trace that begins here is recorded."""
        return False

    def request(self, context: RequestContext, facts: RequestFacts) -> None:
        """A frontend's request has ended."""

    def call(self, context: RequestContext, facts: CallFacts) -> None:
        """A worker's call has ended."""

    def close(self) -> None:
        """Send what waits, for a bounded time."""


NO_SPANS = Spans()


def open_spans(settings: TraceSettings, role: str, instance: str) -> Spans:
    """Return the exporter that the settings ask for.

    Args:
        settings: see `TraceSettings`.
        role: ``frontend`` or ``worker``.
        instance: id of this process.

    Raises:
        InvalidRequest: export is wanted and the packages are not installed.
    """
    if not settings.otel_export_enabled:
        return NO_SPANS
    from holdfast.telemetry.otlp import OtlpSpans  # noqa: PLC0415  large, and an extra

    return OtlpSpans(settings, role, instance)
