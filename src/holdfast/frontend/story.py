"""What telemetry knows of one request at the frontend: counts it, binds its ids to log lines, keeps its story.

Must never decide anything about the request.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from holdfast.base.errors import HoldfastError
from holdfast.base.ids import RequestId
from holdfast.frontend.metrics import FrontendMetrics, shown_state
from holdfast.openai.headers import RequestHeaders
from holdfast.requests.generation import Generation
from holdfast.requests.request import Request
from holdfast.runtime.notices import PoolEvent
from holdfast.runtime.pool import Worker
from holdfast.telemetry import context
from holdfast.telemetry.context import RequestContext, frontend_context
from holdfast.telemetry.explain import RequestFacts, Ring, StreamFacts, WorkerChange
from holdfast.telemetry.spans import NO_SPANS, Spans

log = logging.getLogger(__name__)


class Stories:
    """Of all requests of one frontend.

    Args:
        metrics: counts.
        clock: the stopwatch, in nanoseconds.
        kept: finished requests that are remembered.
        spans: where traces go.
    """

    def __init__(
        self, metrics: FrontendMetrics, clock: Callable[[], int], kept: int = 1024, spans: Spans | None = None
    ):
        self.metrics = metrics
        self.clock = clock
        self.ring = Ring(kept)
        self.spans = spans or NO_SPANS
        self._states: dict[str, str] = {}

    def begin(self, surface: str, scope: Any, request_id: RequestId) -> Story:
        """A request has arrived."""
        self.metrics.preprocessing += 1
        return Story(self, surface, scope, request_id)

    def pool_event(self, event: PoolEvent, worker: Worker) -> None:
        """Remember changes of workers' states (`WorkerPool.subscribe`)."""
        if event == "pong":
            return
        state = "gone" if event == "removed" else shown_state(worker)
        if self._states.get(worker.instance) == state:
            return
        self._states[worker.instance] = state
        if event == "removed":
            del self._states[worker.instance]
        error = worker.last_error if state in ("suspect", "ejected", "gone") else None
        code, message = ("", "") if error is None else (error.code, error.message)
        self.ring.changed(WorkerChange(self.clock(), worker.instance, state, code, message))


class Story:
    """Of one request, from its arrival to its end."""

    __slots__ = (
        "_line",
        "_metrics",
        "_preparing",
        "_stories",
        "arrived",
        "context",
        "id",
        "kind",
        "label",
        "model",
        "prepared_seconds",
        "request",
        "surface",
    )

    def __init__(self, stories: Stories, surface: str, scope: Any, request_id: RequestId):
        self._stories = stories
        self._metrics = stories.metrics
        self._line = {"method": scope["method"], "uri": scope["path"], "version": scope.get("http_version", "")}
        """What the HTTP request line said."""
        self._preparing = True
        self.surface = surface
        self.id = request_id
        self.arrived = stories.clock()
        """Nanoseconds of the stopwatch."""
        self.request: Request | None = None
        """Once its streams exist."""
        self.context: RequestContext | None = None
        self.label = ""
        self.model = ""
        self.kind = "unary"
        self.prepared_seconds = 0.0

    def identify(self, headers: RequestHeaders) -> None:
        """The headers are known: from now on every log line of this task carries the request's ids."""
        self.label = headers.label
        self.context = frontend_context(
            self.id,
            headers.label,
            headers.traceparent,
            headers.tracestate,
            sampled=self._stories.spans.sampled(self.id),
            facts=self._line,
        )
        context.enter(self.context)
        context.opened()

    def prepared(self, model: str, *, stream: bool) -> None:
        """It is rendered and tokenized."""
        self.model, self.kind = model, "stream" if stream else "unary"
        self.prepared_seconds = self.seconds()
        self.settle()
        self._metrics.prepared(self.prepared_seconds)
        self._metrics.begun(model, self.surface, self.kind)

    def settle(self) -> None:
        """Preparing is over, whichever way; idempotent."""
        if self._preparing:
            self._preparing = False
            self._metrics.preprocessing -= 1

    def refused(self, error: HoldfastError) -> None:
        """It ends before any stream began."""
        if self._preparing:
            self._metrics.begun(self.model, self.surface, self.kind)
        self.ended(error)

    def ended(self, error: HoldfastError | None) -> None:
        """It has ended, well or with this error."""
        seconds = self.seconds()
        metrics = self._metrics
        metrics.finished(self.model, self.surface, self.kind, error, seconds)
        if error is None and self.request is not None:
            metrics.answered(self.request)
        context.closed(seconds, self.prepared_seconds)
        facts = self._facts(seconds, error)
        self._stories.ring.add(facts)
        if self.context is not None and self.context.sampled:
            self._stories.spans.request(self.context, facts)

    def facts(self) -> RequestFacts:
        """Return what is known by now."""
        return self._facts(self.seconds(), None)

    def _facts(self, seconds: float, error: HoldfastError | None) -> RequestFacts:
        request = self.request
        return RequestFacts(
            request_id=self.id,
            label=self.label,
            model=self.model,
            surface=self.surface,
            kind=self.kind,
            trace_id=self.trace_id,
            arrived=self.arrived,
            prepared=self.prepared_seconds,
            seconds=seconds,
            code=error.code if error is not None else "",
            fault=error.fault if error is not None else "",
            error=error.message if error is not None else "",
            streams=[_stream(stream, self.arrived) for stream in request.streams] if request is not None else (),
        )

    @property
    def trace_id(self) -> str:
        """Of the client's trace, or of the one that began here."""
        return self.context.trace_id if self.context is not None else self.id

    def seconds(self) -> float:
        """Return the time since its arrival."""
        return (self._stories.clock() - self.arrived) / 1e9


def _stream(stream: Generation, arrived: int) -> StreamFacts:
    ending = stream.ended
    rhythm, driver = stream.rhythm, stream.driver
    return StreamFacts(
        choice=stream.plan.choice,
        state=stream.state,
        finish=ending.finish if ending is not None else "",
        error=ending.error.message if ending is not None and ending.error is not None else "",
        join=driver.join,
        prompt_tokens=stream.plan.prompt_length,
        cached_tokens=ending.cached_tokens if ending is not None else 0,
        tokens=stream.delivered,
        timeline=stream.timeline,
        considered=driver.considered,
        offset=(stream.born - arrived) / 1e9,
        ticks=(rhythm.first, rhythm.last),
        longest=rhythm.longest,
    )
