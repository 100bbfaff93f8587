"""What telemetry knows of a worker's calls: metrics, ids on log lines, spans. Canaries are nobody's calls.

Must never decide anything, and never touch what a call carries.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping
from typing import Literal, get_args

from holdfast.base.errors import Cancelled, HoldfastError, InvalidRequest, StreamIncomplete, WorkerDraining
from holdfast.base.limits import TRACESTATE_CHARS
from holdfast.runtime.streams import IncomingCall
from holdfast.telemetry import context
from holdfast.telemetry.catalogue import CATALOGUE
from holdfast.telemetry.context import RequestContext, worker_context
from holdfast.telemetry.metric import Registry
from holdfast.telemetry.spans import NO_SPANS, CallFacts, Spans

log = logging.getLogger(__name__)

ErrorType = Literal["deserialization", "invalid_message", "generate", "publish_response"]
_TOKEN_BYTES = 4
_REFUSED_WITH = ("worker_saturated", "worker_draining", "invalid_request", "engine_failed", "internal")
"""Codes of calls that are not accepted, as far as they are expected."""


class CallStory:
    """One call, from its arrival to its end."""

    __slots__ = ("began", "canary", "context", "first_token", "tokens")

    def __init__(self, began: int, context: RequestContext, *, canary: bool):
        self.began = began
        """Nanoseconds of the stopwatch."""
        self.first_token = 0
        self.tokens = 0
        self.context = context
        self.canary = canary


class Calls:
    """Of one worker.

    Args:
        facts: namespace, component and instance id of this worker, by their names in log lines.
        spans: where traces go.
        clock: a stopwatch in nanoseconds; None: the running loop's time.
    """

    def __init__(self, facts: Mapping[str, str], *, spans: Spans = NO_SPANS, clock: Callable[[], int] | None = None):
        self.spans = spans
        self.clock = clock or _loop_clock()
        self.hosted = (facts["namespace"], facts["component"], facts["instance_id"])
        """Values of the labels of everything that is the worker's and not a call's."""
        self._facts = {**facts, "endpoint": "generate"}
        self._where = (facts["namespace"], facts["component"], "generate", facts["instance_id"])
        self.registry = r = Registry(CATALOGUE, "worker")
        where = self._where
        self._requests = r.counter("dynamo_component_requests_total").labels(*where)
        self._request_bytes = r.counter("dynamo_component_request_bytes_total").labels(*where)
        self._response_bytes = r.counter("dynamo_component_response_bytes_total").labels(*where)
        self._inflight = r.gauge("dynamo_component_inflight_requests").labels(*where)
        self._active = r.gauge("dynamo_work_handler_pool_active_tasks").labels()
        self._duration = r.histogram("dynamo_component_request_duration_seconds").labels(*where)
        self._errors = r.counter("dynamo_component_errors_total")
        self._cancellations = r.counter("dynamo_component_cancellation_total").labels(*where)
        self._refusals = r.counter("holdfast_worker_refusals_total")
        self._rejected = r.counter("dynamo_work_handler_enqueue_rejected_total").labels()
        self._first_response = r.histogram("dynamo_work_handler_time_to_first_response_seconds").labels()

    def foresee(self) -> None:
        """Let counters whose labels are known begin at nought: one that is born at one has not increased."""
        for kind in get_args(ErrorType):
            self._errors.labels(*self._where, kind)
        for code in _REFUSED_WITH:
            self._refusals.labels(*self._where, code)

    def begin(self, call: IncomingCall, *, canary: bool) -> CallStory:
        """A call has come in."""
        headers = call.headers
        state = headers.tracestate if len(headers.tracestate) <= TRACESTATE_CHARS else ""
        ids = worker_context(
            headers.request_id, headers.label, headers.traceparent, headers.attempt, self._facts, tracestate=state
        )
        if not canary:
            self._requests.inc()
            self._request_bytes.inc(len(call.payload))
        return CallStory(self.clock(), ids, canary=canary)

    def refused(self, story: CallStory, error: HoldfastError, kind: ErrorType | None = None) -> None:
        """It was not accepted."""
        if story.canary:
            return
        self._refusals.labels(*self._where, error.code).inc()
        if error.fault == "capacity":
            self._rejected.inc()
        self._failed(kind or _kind(error))
        level = logging.INFO if error.fault in ("capacity", "caller") or isinstance(error, WorkerDraining) else 30
        if log.isEnabledFor(level):
            with context.bound(story.context):
                log.log(level, "call refused: %s", error.message, extra={"cause": error.code})
        self._trace(story, "", error)

    def accepted(self, story: CallStory) -> None:
        """It is being worked on."""
        if story.canary:
            return
        self._inflight.inc()
        self._active.inc()
        if context.SPAN_EVENTS.on or log.isEnabledFor(logging.DEBUG):
            with context.bound(story.context):
                context.opened()
                log.debug("call accepted")

    def ended(self, story: CallStory, finish: str, error: HoldfastError | None, why: str = "") -> None:
        """An accepted call is over.

        Args:
            story: of the call.
            finish: how, as the caller was told.
            error: what it was told beside that.
            why: the reason when the caller itself ended it.
        """
        if story.canary:
            return
        self._inflight.dec()
        self._active.dec()
        seconds = (self.clock() - story.began) / 1e9
        self._duration.observe(seconds)
        self._response_bytes.inc(story.tokens * _TOKEN_BYTES)
        if story.first_token:
            self._first_response.observe((story.first_token - story.began) / 1e9)
        if finish == "cancelled":
            self._cancellations.inc()
        elif error is not None:
            self._failed(_kind(error))
        self._tell(story, finish, error, why, seconds)
        self._trace(story, finish, error)

    def _failed(self, kind: ErrorType | None) -> None:
        if kind is not None:
            self._errors.labels(*self._where, kind).inc()

    def _tell(self, story: CallStory, finish: str, error: HoldfastError | None, why: str, seconds: float) -> None:
        level = logging.DEBUG if error is None else logging.INFO if _kind(error) is None else logging.WARNING
        if not (context.SPAN_EVENTS.on or log.isEnabledFor(level)):
            return
        with context.bound(story.context):
            facts = {"tokens": story.tokens, "seconds": round(seconds, 6)}
            if error is None:
                log.log(level, "call ended: %s%s", finish, f" ({why})" if why else "", extra=facts)
            else:
                log.log(level, "call ended: %s", error.message, extra={**facts, "cause": error.code})
            waited = (story.first_token - story.began) / 1e9 if story.first_token else seconds
            context.closed(seconds, seconds - waited)

    def _trace(self, story: CallStory, finish: str, error: HoldfastError | None) -> None:
        if story.context.sampled:
            code, message = (error.code, error.message) if error is not None else ("", "")
            facts = CallFacts(story.began, self.clock(), story.first_token, story.tokens, finish, code, message)
            self.spans.call(story.context, facts)


def _kind(error: HoldfastError) -> ErrorType | None:
    """Return the reference's word for what went wrong; None: nothing did, as far as this worker is concerned."""
    if isinstance(error, WorkerDraining | Cancelled) or error.fault == "capacity":
        return None
    if isinstance(error, InvalidRequest):
        return "invalid_message"
    return "publish_response" if isinstance(error, StreamIncomplete) else "generate"


def _loop_clock() -> Callable[[], int]:
    """Return a stopwatch over the loop that runs at its first reading; later ones may come from any thread."""
    loop: asyncio.AbstractEventLoop | None = None

    def read() -> int:
        nonlocal loop
        loop = loop or asyncio.get_running_loop()
        return int(loop.time() * 1e9)

    return read
