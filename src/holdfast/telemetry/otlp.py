"""Turns finished requests and calls into OpenTelemetry spans and sends them, batched, from a thread of their own.

Attempts are spans under their request, each linked to the attempt that it continues; the worker's span hangs under
its attempt. Times come from the stopwatch and become calendar time here. Must never carry prompt or generated text.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence

from holdfast import __version__
from holdfast.base.errors import InvalidRequest
from holdfast.telemetry.context import RequestContext, attempt_span
from holdfast.telemetry.explain import RequestFacts, StreamFacts
from holdfast.telemetry.spans import CallFacts, Spans, TraceSettings

try:
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import Event, ReadableSpan
    from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter
    from opentelemetry.sdk.util.instrumentation import InstrumentationScope
    from opentelemetry.trace import Link, SpanContext, SpanKind, Status, StatusCode, TraceFlags, TraceState
except ImportError as error:
    raise InvalidRequest(
        f"OTEL_EXPORT_ENABLED is set, but OpenTelemetry is not installed ({error}). Install holdfast[otel].",
        param="OTEL_EXPORT_ENABLED",
    ) from error

CLOSE_MS = 3000
_SCALE = 1 << 64
_SCOPE = InstrumentationScope("holdfast", __version__)
Value = str | bool | int | float


class OtlpSpans(Spans):
    """The exporter of one process.

    Args:
        settings: where to and how many.
        role: ``frontend`` or ``worker``.
        instance: id of this process.
        exporter: what sends; None: as the settings say.
        clock: the stopwatch, in nanoseconds.
    """

    def __init__(
        self,
        settings: TraceSettings,
        role: str,
        instance: str,
        *,
        exporter: SpanExporter | None = None,
        clock: Callable[[], int] = time.monotonic_ns,
    ):
        names = {"service.name": settings.otel_service_name, "service.instance.id": instance, "holdfast.role": role}
        self._resource = Resource.create(names)
        self._clock = clock
        self._bound = int(settings.otel_sample_ratio * _SCALE)
        self._processor = BatchSpanProcessor(exporter or _exporter(settings))

    def sampled(self, trace_id: str) -> bool:
        """Return whether a trace that begins here is recorded: by the low half of its id, as OpenTelemetry does."""
        return int(trace_id[16:], 16) < self._bound

    def request(self, context: RequestContext, facts: RequestFacts) -> None:
        """See `Spans`."""
        offset = self._offset()
        begin, end = facts.arrived + offset, facts.arrived + offset + int(facts.seconds * 1e9)
        attributes: dict[str, Value] = {
            "x_request_id": context.label or context.request_id,
            "x_dynamo_request_id": context.request_id,
            "http.request.method": str(context.facts.get("method", "")),
            "url.path": str(context.facts.get("uri", "")),
            "gen_ai.request.model": facts.model,
            "gen_ai.usage.output_tokens": sum(stream.tokens for stream in facts.streams),
            "gen_ai.usage.input_tokens": sum(stream.prompt_tokens for stream in facts.streams[:1]),
            "holdfast.preprocess_seconds": facts.prepared,
        }
        root = self._context(context, context.span_id)
        parent = self._context(context, context.parent_id, remote=True) if context.parent_id else None
        status = _status(facts.code, facts.error)
        self._put("http-request", root, parent, (begin, end), SpanKind.SERVER, attributes, status=status)
        for stream in facts.streams:
            self._attempts(context, root, stream, begin)

    def call(self, context: RequestContext, facts: CallFacts) -> None:
        """See `Spans`."""
        offset = self._offset()
        attributes: dict[str, Value] = {
            "x_request_id": context.label or context.request_id,
            "x_dynamo_request_id": context.request_id,
            "gen_ai.usage.output_tokens": facts.tokens,
            "holdfast.finish": facts.finish,
            **{name: str(value) for name, value in context.facts.items()},
        }
        events = [Event("first token", timestamp=facts.first_token + offset)] if facts.first_token else []
        self._put(
            "handle_payload",
            self._context(context, context.span_id),
            self._context(context, context.parent_id, remote=True) if context.parent_id else None,
            (facts.began + offset, facts.ended + offset),
            SpanKind.SERVER,
            attributes,
            status=_status(facts.code, facts.error),
            events=events,
        )

    def close(self) -> None:
        """Send what waits, for at most three seconds."""
        self._processor.force_flush(CLOSE_MS)
        self._processor.shutdown()  # type: ignore[no-untyped-call]

    def _attempts(self, context: RequestContext, root: SpanContext, stream: StreamFacts, begin: int) -> None:
        born = begin + int(stream.offset * 1e9)
        before: tuple[SpanContext, str] | None = None
        for attempt in _split(stream):
            span = self._context(context, attempt_span(context.request_id, stream.choice, attempt.number))
            attributes: dict[str, Value] = {
                "request.attempt": attempt.number,
                "request.choice": stream.choice,
                "holdfast.worker": attempt.worker,
                "migration.is_retry": attempt.number > 1,
            }
            links = []
            if before is not None:
                reason = attempt.reason
                links = [Link(before[0], {"migration.reason": reason})]
                attributes["migration.reason"] = reason
                attributes["migration.from_worker_id"] = before[1]
            events = [Event(name, timestamp=born + int(at * 1e9)) for at, name in attempt.events]
            times = (born + int(attempt.begin * 1e9), born + int(attempt.end * 1e9))
            status = _status(attempt.failure, attempt.failure)
            kind = SpanKind.CLIENT
            self._put("client_request", span, root, times, kind, attributes, status=status, links=links, events=events)
            before = (span, attempt.worker)

    def _put(  # noqa: PLR0917 - one span has that many parts
        self,
        name: str,
        context: SpanContext,
        parent: SpanContext | None,
        times: tuple[int, int],
        kind: SpanKind,
        attributes: dict[str, Value],
        *,
        status: Status,
        links: Sequence[Link] = (),
        events: Sequence[Event] = (),
    ) -> None:
        self._processor.on_end(
            ReadableSpan(
                name,
                context,
                parent,
                resource=self._resource,
                attributes=attributes,
                events=events,
                links=links,
                kind=kind,
                status=status,
                start_time=times[0],
                end_time=max(times),
                instrumentation_scope=_SCOPE,
            )
        )

    def _context(self, context: RequestContext, span_id: str, *, remote: bool = False) -> SpanContext:
        state = TraceState.from_header([context.tracestate]) if context.tracestate else None
        trace, span = int(context.trace_id, 16), int(span_id, 16)
        return SpanContext(trace, span, remote, TraceFlags(TraceFlags.SAMPLED), state)

    def _offset(self) -> int:
        """Return what turns the stopwatch into calendar time, in nanoseconds."""
        return time.time_ns() - self._clock()


class _Attempt:
    """One attempt, read off a stream's notes. Times in seconds since the stream's birth."""

    __slots__ = ("begin", "end", "events", "failure", "number", "reason", "worker")

    def __init__(self, number: int, worker: str, begin: float, reason: str):
        self.number, self.worker, self.begin, self.end, self.reason = number, worker, begin, begin, reason
        self.failure = ""
        self.events: list[tuple[float, str]] = []


def _split(stream: StreamFacts) -> Iterator[_Attempt]:
    present: _Attempt | None = None
    for at, event, detail in stream.timeline:
        if event == "attempt":
            number, reason = (present.number + 1, present.failure) if present else (1, "")
            if present is not None:
                yield present
            present = _Attempt(number, detail, at, reason)
        elif present is not None and not present.failure:
            present.end = at
            present.events.append((at, event))
            if event in ("failed", "rejected", "expired"):
                present.failure = detail
    if present is not None:
        yield present


def _status(code: str, message: str) -> Status:
    return Status(StatusCode.ERROR, message) if code else Status(StatusCode.UNSET)


def _exporter(settings: TraceSettings) -> SpanExporter:
    """Raises InvalidRequest when the protocol's package is missing."""
    try:
        if settings.protocol == "grpc":
            from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import (  # noqa: PLC0415  one of two
                OTLPSpanExporter as Grpc,
            )

            return Grpc(endpoint=settings.target)
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import (  # noqa: PLC0415  one of two
            OTLPSpanExporter as Http,
        )

        return Http(endpoint=settings.target)
    except ImportError as error:
        raise InvalidRequest(
            f"The exporter for OTEL_EXPORTER_OTLP_PROTOCOL={settings.protocol} is not installed ({error}). "
            "Install holdfast[otel].",
            param="OTEL_EXPORTER_OTLP_PROTOCOL",
        ) from error
