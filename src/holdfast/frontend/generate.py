"""The two hot routes: from an HTTP request to streams, and until the client has everything or is gone.

One task per HTTP request waits for the client to leave; one drives each stream between attempts; no task is
involved in a token. Must never decide about workers or encode text.
"""

from __future__ import annotations

import asyncio
import logging
import time
from typing import Any, NamedTuple

from holdfast.base.errors import Cancelled, CapacityExhausted, HoldfastError, InternalError
from holdfast.base.ids import RequestId, draw_request_id
from holdfast.engines.contract import pack_ids
from holdfast.frontend.answers import StreamedAnswer, WholeAnswer
from holdfast.frontend.body import Receive, Send, read_body
from holdfast.frontend.config import FrontendConfig
from holdfast.frontend.gate import Gate
from holdfast.frontend.offload import Offload
from holdfast.frontend.prepare import Prepared, Preparer, Surface
from holdfast.frontend.registry import ModelRegistry
from holdfast.frontend.reply import KeepAlive, Reply
from holdfast.frontend.story import Stories, Story
from holdfast.openai.errors import error_response
from holdfast.openai.headers import RequestHeaders, find_header, parse_headers
from holdfast.openai.mapping import token_budget
from holdfast.requests import seeds
from holdfast.requests.plan import Deadlines, Plan
from holdfast.requests.request import Request
from holdfast.requests.service import Services

log = logging.getLogger(__name__)


class _Call(NamedTuple):
    """The ASGI side of one request."""

    scope: Any
    receive: Receive
    send: Send


class GenerateRoute:
    """Serves chat and text completions."""

    def __init__(
        self,
        config: FrontendConfig,
        services: Services,
        registry: ModelRegistry,
        stories: Stories,
        gate: Gate,
    ):
        self._config = config
        self._services = services
        self._metrics = stories.metrics
        self._stories = stories
        self._offload = Offload()
        self._preparer = Preparer(config, registry, self._offload, services.rng)
        self._limit = config.http_body_limit_mb * 1024 * 1024
        self._keep_alive = KeepAlive(config.http_sse_keep_alive_interval_ms / 1000)
        self._gate = gate
        self._in_hand = 0
        self.active: dict[RequestId, Request] = {}
        """Requests that have been started and not ended."""
        self.stories: dict[RequestId, Story] = {}
        """Of the same."""
        self.idle = asyncio.Event()
        """Set while no request is active."""
        self.idle.set()
        self.refusal: HoldfastError | None = None
        """When set, what every new request is told (shutdown)."""
        self.weaning = False
        """Requests on connections from before the shutdown are served all the same."""
        self.stopping = False
        """Nothing begins any more."""

    async def chat(self, scope: Any, receive: Receive, send: Send) -> None:
        """POST /v1/chat/completions."""
        await self._counted("chat_completions", _Call(scope, receive, send))

    async def completion(self, scope: Any, receive: Receive, send: Send) -> None:
        """POST /v1/completions."""
        await self._counted("completions", _Call(scope, receive, send))

    @property
    def in_hand(self) -> int:
        """Requests from their head to the end of the answer."""
        return self._in_hand

    async def close(self) -> None:
        """Let helpers go."""
        self._offload.close()
        await self._preparer.close()

    async def _counted(self, surface: Surface, call: _Call) -> None:
        self._in_hand += 1
        try:
            await self._serve(surface, call)
        finally:
            self._in_hand -= 1

    async def _serve(self, surface: Surface, call: _Call) -> None:
        scope, receive, send = call
        request_id = draw_request_id(self._services.rng)
        story = self._stories.begin(surface, scope, request_id)
        try:
            headers = parse_headers(scope["headers"], steering=self._config.trust_client_priority)
            story.identify(headers)
            self._admit(scope)
            body = await read_body(receive, self._limit, _content_length(scope))
            prepared = await self._preparer.prepare(surface, body)
            del body
            story.prepared(prepared.served.card.name, stream=prepared.spec.stream)
            plans = self._plans(story, prepared, headers)
            self._check_open()
        except Cancelled as error:
            story.refused(error)
            return
        except HoldfastError as error:
            story.refused(error)
            await self._refuse(send, error, headers_label(scope) or request_id)
            return
        except Exception:
            log.exception("request %s could not be prepared", request_id)
            fault = InternalError("The request could not be prepared.")
            story.refused(fault)
            await self._refuse(send, fault, request_id)
            return
        finally:
            story.settle()
        with self._metrics.inflight.labels(self._metrics.label(story.model)).track_inprogress():
            outcome = await self._run(story, prepared, plans, call)
        story.ended(outcome)

    async def _run(self, story: Story, prepared: Prepared, plans: list[Plan], call: _Call) -> HoldfastError | None:
        request_id = story.id
        async with asyncio.TaskGroup() as group:
            reply = self._reply(call, group)
            kind = StreamedAnswer if prepared.spec.stream else WholeAnswer
            answer = kind(reply, request_id, plans[0].label or request_id, int(time.time()), prepared)
            answer.overload_status = self._config.http_overload_status_code
            try:
                request = Request(self._services, [*zip(plans, answer.choices, strict=True)])
            except HoldfastError as error:
                answer.refuse(error)
                return error
            story.request = request
            answer.begin(request)
            self.active[request_id] = request
            self.stories[request_id] = story
            self.idle.clear()
            self._keep_alive.add(reply)
            try:
                driver = group.create_task(request.run())
                while (await call.receive())["type"] != "http.disconnect":
                    pass
                if not answer.done:
                    await self._left(request, driver)
                await driver
            finally:
                self._keep_alive.remove(reply)
                del self.active[request_id], self.stories[request_id]
                if not self.active:
                    self.idle.set()
                reply.abandon()
        return answer.error

    async def _left(self, request: Request, driver: asyncio.Task[None]) -> None:
        """The client has gone before its answer was complete: wind the request up."""
        self._metrics.disconnects.labels(self._metrics.label(request.model)).inc()
        with self._metrics.disconnected.track_inprogress():
            request.cancel("client_disconnected")
            await driver

    def _reply(self, call: _Call, group: asyncio.TaskGroup) -> Reply:
        return Reply(
            call.send,
            self._services.flusher,
            group.create_task,
            call.scope.get("holdfast.wire"),
            stall_timeout=self._config.requests.client_stall_timeout,
        )

    def _plans(self, story: Story, prepared: Prepared, headers: RequestHeaders) -> list[Plan]:
        spec = prepared.spec
        card = prepared.served.card
        bounds = self._bounds(headers)
        steering = headers.steer(spec.steering)
        seed = spec.seed if spec.seed is not None else seeds.draw(self._services.rng)
        plans: list[Plan] = []
        param = "messages" if prepared.surface == "chat_completions" else "prompt"
        for prompt in prepared.prompts:
            budget = token_budget(spec, len(prompt.ids), card.context_length, param=param)
            stop = spec.stop_rules(budget)
            terminal = frozenset(stop.stop_token_ids) | (
                frozenset() if stop.ignore_eos else frozenset(card.eos_token_ids)
            )
            ids = pack_ids(prompt.ids)
            for _ in range(spec.n):
                choice = len(plans)
                plans.append(
                    Plan(
                        request_id=story.id,
                        model=card.name,
                        prompt_ids=ids,
                        prompt_length=len(prompt.ids),
                        sampling=spec.sampling_for(seeds.mix(seed, choice)),
                        stop=stop,
                        context_length=card.context_length,
                        deadlines=bounds,
                        choice=choice,
                        label=headers.label,
                        traceparent=story.context.traceparent if story.context is not None else "",
                        context=story.context,
                        prepared_seconds=story.prepared_seconds,
                        priority=steering.priority,
                        strict_priority=steering.strict_priority,
                        cache_salt=spec.cache_salt,
                        terminal_ids=terminal,
                    )
                )
        return plans

    def _bounds(self, headers: RequestHeaders) -> Deadlines:
        return self._services.bounds(
            accept=_seconds(headers.accept_ms),
            first_token=_seconds(headers.first_token_ms),
            inter_token=_seconds(headers.inter_token_ms),
            total=_seconds(headers.total_ms),
        )

    def _check_open(self) -> None:
        """Raise when the frontend has stopped while the request was prepared."""
        if self.stopping and self.refusal is not None:
            raise self.refusal

    def _admit(self, scope: Any) -> None:
        if self.refusal is not None and not (self.weaning and not scope.get("holdfast.late", True)):
            raise self.refusal
        self._gate.admit(scope["headers"])
        limit = self._config.http_max_requests
        if self._in_hand > limit:
            raise CapacityExhausted(
                f"This frontend has {limit} requests in hand, its limit (DYN_HTTP_MAX_REQUESTS).",
                retry_after=2.0,
                layer="frontend",
                knob="DYN_HTTP_MAX_REQUESTS",
                threshold=limit,
                measured=self._in_hand - 1,
            )

    async def _refuse(self, send: Send, error: HoldfastError, label: str) -> None:
        answer = error_response(error, label, overload_status=self._config.http_overload_status_code)
        await send({"type": "http.response.start", "status": answer.status, "headers": answer.headers})
        await send({"type": "http.response.body", "body": answer.body})


def headers_label(scope: Any) -> str:
    """Return the client's label even when other headers are wrong."""
    try:
        return parse_headers([h for h in scope["headers"] if h[0] == b"x-request-id"]).label
    except HoldfastError:
        return ""


def _seconds(milliseconds: int | None) -> float | None:
    return None if milliseconds is None else milliseconds / 1000


def _content_length(scope: Any) -> int | None:
    value = find_header(scope["headers"], b"content-length")
    return int(value) if value is not None and value.isdigit() else None
