"""The ASGI application: the hot routes straight, everything else through Starlette.

Must never parse a request or hold one's state.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any, Literal

from holdfast.base.errors import CapacityExhausted, HoldfastError, ShuttingDown
from holdfast.frontend.admin import make_admin
from holdfast.frontend.body import Receive, Send
from holdfast.frontend.config import FrontendConfig
from holdfast.frontend.gate import Gate
from holdfast.frontend.gauges import Gauges
from holdfast.frontend.generate import GenerateRoute
from holdfast.frontend.metrics import FrontendMetrics
from holdfast.frontend.registry import ModelRegistry
from holdfast.frontend.story import Stories
from holdfast.health.readiness import Verdict
from holdfast.openai.errors import error_response
from holdfast.openai.headers import find_header, request_label
from holdfast.requests.service import Services
from holdfast.routing.knowledge import PrefixKnowledge
from holdfast.runtime.pool import WorkerPool
from holdfast.telemetry.spans import NO_SPANS, Spans

log = logging.getLogger(__name__)
Scope = MutableMapping[str, Any]
Stage = Literal["serving", "draining", "stopping"]
App = Callable[[Scope, Receive, Send], Awaitable[None]]


class Frontend:
    """The application of one frontend process.

    Args:
        config: settings.
        services: of the request lifecycle.
        pool: the workers.
        registry: the models.
        metrics: counts.
        spans: where traces go.
        wall: calendar time in seconds since 1970, for presentation alone.
        knowledge: of the workers' KV caches.
    """

    def __init__(
        self,
        config: FrontendConfig,
        services: Services,
        pool: WorkerPool,
        registry: ModelRegistry,
        metrics: FrontendMetrics,
        *,
        spans: Spans = NO_SPANS,
        wall: Callable[[], float] = time.time,
        knowledge: PrefixKnowledge | None = None,
    ):
        self.config = config
        self.knowledge = knowledge or PrefixKnowledge(config.knowledge)
        self.services = services
        self.pool = pool
        self.registry = registry
        self.metrics = metrics
        self.wall = wall
        self.stage: Stage = "serving"
        self.cut = False
        """Whether draining had to end streams."""
        self.thresholds_changed: Callable[[], None] = _nothing
        """Called when thresholds were changed at this frontend; whoever shares them with others sets it."""
        self.connections: Callable[[], int] = int
        """Returns how many connections clients hold; whoever listens sets it."""
        self._gate = Gate(config)
        self.stories = Stories(metrics, services.flusher.clock, config.explain_requests, spans)
        self.generate = GenerateRoute(config, services, registry, self.stories, self._gate, wall=wall)
        self._hot: dict[tuple[str, str], App] = {
            ("POST", "/v1/chat/completions"): self.generate.chat,
            ("POST", "/v1/completions"): self.generate.completion,
        }
        self.gauges = Gauges(self)
        self._unsubscribe = [pool.subscribe(metrics.pool_event), pool.subscribe(self.stories.pool_event)]
        self._admin: App = make_admin(self)

    @property
    def draining(self) -> bool:
        """Whether new requests are turned away."""
        return self.stage != "serving"

    @property
    def ready(self) -> bool:
        """Whether every model that is known can be served, and there is one."""
        known, served = self.pool.models(), self.registry.served()
        return bool(known) and all(name in served and self.pool.usable(name) for name in known)

    def verdict(self) -> Verdict:
        """Return readiness for the status server, with what is missing."""
        if self.draining:
            return Verdict(False, {}, (f"this frontend is {self.stage}",))
        if self.ready:
            return Verdict(True, {}, ())
        lacking = ", ".join(name for name in self.pool.models() if not self.pool.usable(name))
        missing = f"no usable worker for {lacking}" if lacking else "no model is known and loaded yet"
        return Verdict(False, {}, (missing,))

    def __call__(self, scope: Scope, receive: Receive, send: Send) -> Awaitable[None]:
        """Serve one request."""
        return self._hot.get((scope["method"], scope["path"]), self._other)(scope, receive, send)

    async def _other(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve what is not hot: admitted, and labelled as the client labelled it."""
        label = request_label(find_header(scope["headers"], b"x-request-id") or b"")

        async def labelled(message: Any) -> None:
            if label and message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (b"x-request-id", label.encode())]
            await send(message)

        try:
            self._gate.admit_to(scope["path"], scope["headers"])
        except HoldfastError as error:
            answer = error_response(error)
            await labelled({"type": "http.response.start", "status": answer.status, "headers": answer.headers})
            await labelled({"type": "http.response.body", "body": answer.body})
            return
        await self._admin(scope, receive, labelled)

    def announce(self) -> None:
        """Say in health checks that this frontend is about to leave; everything is still served."""
        self.stage = "draining"

    def turn_away(self) -> None:
        """Drain: accept nothing more from clients that could know better."""
        self.announce()
        self.generate.weaning = True
        self.generate.refusal = CapacityExhausted(
            "This frontend is shutting down.", retry_after=1.0, layer="frontend", knob="shutdown"
        )

    def end_all(self) -> None:
        """End what still runs, each stream with a typed error."""
        self.stage = "stopping"
        self.generate.stopping = True
        active = list(self.generate.active.values())
        self.cut = bool(active)
        if active:
            log.warning("%d requests were still running when the grace period ended; they get an error", len(active))
        for request in active:
            for stream in request.streams:
                stream.finish_with(ShuttingDown("This frontend is shutting down; its grace is over.", retry_after=1.0))

    async def close(self) -> None:
        """Let helpers go."""
        for unsubscribe in self._unsubscribe:
            unsubscribe()
        await asyncio.to_thread(self.stories.spans.close)
        await self.generate.close()


def _nothing() -> None:
    return
