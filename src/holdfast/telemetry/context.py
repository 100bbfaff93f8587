"""Whose line is this: the request that the running code works for, and the ids that tie processes together.

Code in a request's own task inherits the context; code in a connection's callback binds it around what it logs.
All span ids follow from the request id, so that they stand in log lines whether or not traces are exported, and
cost nothing to draw.

Must never hold anything that a request said: ids and addresses only.
"""

from __future__ import annotations

import contextlib
import logging
import zlib
from collections.abc import Iterator, Mapping
from contextvars import ContextVar

log = logging.getLogger(__name__)

Facts = Mapping[str, object]

_MASK = (1 << 64) - 1
_STEP = 0x9E3779B97F4A7C15
"""Odd, from the golden ratio: multiples of it differ in all bits."""
_SPAN = slice(36, 52)
"""Where a traceparent has its span id."""


class RequestContext:
    """One request, or one attempt of it, in one process."""

    __slots__ = (
        "facts",
        "flags",
        "label",
        "parent_id",
        "request_id",
        "span_id",
        "span_name",
        "trace_id",
        "tracestate",
    )

    def __init__(
        self,
        request_id: str,
        label: str = "",
        *,
        span_name: str,
        trace_id: str,
        span_id: str,
        parent_id: str = "",
        flags: str = "00",
        tracestate: str = "",
        facts: Facts | None = None,
    ):
        """Create it.

        Args:
            request_id: ours.
            label: the client's ``x-request-id``; empty: it brought none.
            span_name: what this process does for it, as in traces.
            trace_id: 32 hex digits.
            span_id: 16 hex digits.
            parent_id: 16 hex digits, or empty.
            flags: of the traceparent; ``01``: sampled.
            tracestate: as the client sent it.
            facts: more fields of every log line, such as ``uri`` or ``instance_id``.
        """
        self.request_id = request_id
        self.label = label
        self.span_name = span_name
        self.trace_id = trace_id
        self.span_id = span_id
        self.parent_id = parent_id
        self.flags = flags
        self.tracestate = tracestate
        self.facts: Facts = facts or {}

    @property
    def sampled(self) -> bool:
        """Whether the trace is recorded."""
        return int(self.flags, 16) & 1 == 1

    @property
    def traceparent(self) -> str:
        """This span as the parent of others (W3C Trace Context)."""
        return f"00-{self.trace_id}-{self.span_id}-{self.flags}"

    def fields(self) -> dict[str, object]:
        """Return the fields of a log line in JSON, by their documented names."""
        found: dict[str, object] = {
            "x_request_id": self.label or self.request_id,
            "x_dynamo_request_id": self.request_id,
            "trace_id": self.trace_id,
            "span_id": self.span_id,
            "span_name": self.span_name,
        }
        if self.parent_id:
            found["parent_id"] = self.parent_id
        if self.tracestate:
            found["tracestate"] = self.tracestate
        found.update(self.facts)
        return found

    def brief(self) -> dict[str, object]:
        """Return the fields of a log line for people."""
        found: dict[str, object] = {"request": self.request_id}
        if self.label:
            found["label"] = self.label
        if self.trace_id != self.request_id:
            found["trace"] = self.trace_id
        found["span"] = self.span_id
        return found


class SpanEvents:
    """Whether beginnings and ends are logged (``DYN_LOGGING_SPAN_EVENTS``); set once per process."""

    def __init__(self) -> None:
        self.on = False


SPAN_EVENTS = SpanEvents()

_current: ContextVar[RequestContext | None] = ContextVar("request", default=None)


def current() -> RequestContext | None:
    """Return the context of the running code, if it works for a request."""
    return _current.get()


def enter(context: RequestContext) -> None:
    """Bind a context to the running task, and to those that it starts, until its end."""
    _current.set(context)


@contextlib.contextmanager
def bound(context: RequestContext | None) -> Iterator[None]:
    """Bind a context for the length of a block; None: leave it as it is."""
    if context is None:
        yield
        return
    token = _current.set(context)
    try:
        yield
    finally:
        _current.reset(token)


def frontend_context(
    request_id: str, label: str, traceparent: str, tracestate: str, *, sampled: bool, facts: Facts | None = None
) -> RequestContext:
    """Return the context of a request at the frontend.

    Args:
        request_id: 32 hex digits; also the trace id, unless the client brings a trace.
        label: the client's.
        traceparent: valid, or empty.
        tracestate: the client's.
        sampled: whether a trace that begins here is recorded; the client's own flag wins.
        facts: see `RequestContext`.
    """
    span = request_id[:16]
    if not traceparent:
        flags = "01" if sampled else "00"
        return RequestContext(
            request_id, label, span_name="http-request", trace_id=request_id, span_id=span, flags=flags, facts=facts
        )
    return RequestContext(
        request_id,
        label,
        span_name="http-request",
        trace_id=traceparent[3:35],
        span_id=span,
        parent_id=traceparent[_SPAN],
        flags=traceparent[53:55],
        tracestate=tracestate,
        facts=facts,
    )


def attempt_traceparent(traceparent: str, request_id: str, choice: int, attempt: int) -> str:
    """Return the traceparent that an attempt travels with, from that of its request; empty stays empty."""
    if not traceparent:
        return ""
    return f"{traceparent[:36]}{attempt_span(request_id, choice, attempt)}{traceparent[52:]}"


def attempt_span(request_id: str, choice: int, attempt: int) -> str:
    """Return the span id of one attempt of one choice."""
    return _mixed(request_id, ((choice + 1) << 16) + attempt)


def worker_context(
    request_id: str, label: str, traceparent: str, attempt: int, facts: Facts, *, tracestate: str = ""
) -> RequestContext:
    """Return the context of an attempt at its worker; without a traceparent the request begins a trace of its own."""
    parent = traceparent[_SPAN] or ""
    return RequestContext(
        request_id,
        label,
        span_name="handle_payload",
        trace_id=traceparent[3:35] or request_id,
        span_id=_mixed(request_id, (attempt << 32) + (int(parent, 16) & 0xFFFF_FFFF if parent else 0)),
        parent_id=parent,
        flags=traceparent[53:55] or "00",
        tracestate=tracestate if traceparent else "",
        facts=facts,
    )


def opened() -> None:
    """Log the beginning of the present span, when span events are wanted."""
    if SPAN_EVENTS.on:
        log.info("SPAN_FIRST_ENTRY")


def closed(seconds: float, busy: float) -> None:
    """Log the end of the present span, when span events are wanted.

    Args:
        seconds: that it took.
        busy: those of them that this process worked on it by itself instead of waiting for others.
    """
    if SPAN_EVENTS.on:
        whole, busy_us = int(seconds * 1e6), int(min(busy, seconds) * 1e6)
        facts = {"time.busy_us": busy_us, "time.idle_us": whole - busy_us, "time.duration_us": whole}
        log.info("SPAN_CLOSED", extra=facts)


def _mixed(request_id: str, salt: int) -> str:
    """Return a span id that is never all zero, which W3C forbids."""
    try:
        seed = int(request_id[:16], 16)
    except ValueError:
        seed = zlib.crc32(request_id.encode())
    return f"{(seed + salt * _STEP) & _MASK or 1:016x}"
