"""The two hot routes: from an HTTP request to streams, and until the client has everything or is gone.

One task per HTTP request drives its stream between attempts (more only for several choices); no task is involved in
a token or in a client's leaving. Must never decide about workers or encode text.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from typing import Any

from holdfast.base.errors import Cancelled, CapacityExhausted, ClientStalled, HoldfastError, InternalError
from holdfast.base.ids import RequestId, draw_request_id
from holdfast.frontend.advice import Advisor
from holdfast.frontend.answers import StreamedAnswer, WholeAnswer
from holdfast.frontend.body import Bodies, Receive, Send
from holdfast.frontend.client_wire import Sink
from holdfast.frontend.config import FrontendConfig
from holdfast.frontend.content import log_content
from holdfast.frontend.gate import Gate
from holdfast.frontend.keepalive import KeepAlive
from holdfast.frontend.offload import Offload
from holdfast.frontend.prepare import Prepared, Preparer, Surface, Timing
from holdfast.frontend.registry import FILES_WAIT, ModelRegistry
from holdfast.frontend.reply import Reply
from holdfast.frontend.story import Stories, Story
from holdfast.frontend.turns import Turns
from holdfast.openai.errors import error_response
from holdfast.openai.headers import NO_HEADERS, RequestHeaders, find_header, parse_headers
from holdfast.openai.mapping import token_budget
from holdfast.requests import seeds
from holdfast.requests.plan import Deadlines, Plan
from holdfast.requests.request import Request
from holdfast.requests.service import Services
from holdfast.routing.route import route_of
from holdfast.telemetry.content import CONTENT

log = logging.getLogger(__name__)

_NO_IDS: frozenset[int] = frozenset()


class GenerateRoute:
    """Serves chat and text completions."""

    def __init__(
        self,
        config: FrontendConfig,
        services: Services,
        registry: ModelRegistry,
        stories: Stories,
        gate: Gate,
        *,
        wall: Callable[[], float],
    ):
        self._config = config
        self._wall = wall
        self._services = services
        self._metrics = stories.metrics
        self._stories = stories
        self._offload = Offload()
        timing = Timing(stories.clock, stories.metrics.template_time.note, stories.metrics.tokenize_time.note)
        self._preparer = Preparer(config, registry, self._offload, services.rng, timing)
        self._bodies = Bodies(config.http_body_limit_mb * 1024 * 1024)
        self._stall = config.requests.client_stall_timeout
        self._keep_alive = KeepAlive(config.http_sse_keep_alive_interval_ms / 1000, self._stall)
        self._gate = gate
        self._turns = Turns()
        self._in_hand = 0
        self.active: dict[RequestId, Request] = {}
        """Requests that have been started and not ended."""
        self.stories: dict[RequestId, Story] = {}
        """Of the same."""
        self.refusal: HoldfastError | None = None
        """When set, what every new request is told (shutdown)."""
        self.weaning = False
        """Requests on connections from before the shutdown are served all the same."""
        self.stopping = False
        """Nothing begins any more."""
        self.advisor: Advisor | None = None
        """Says where requests should go; None: nobody is asked."""

    def chat(self, scope: Any, receive: Receive, send: Send) -> Awaitable[None]:
        """POST /v1/chat/completions."""
        return self._serve("chat_completions", scope, receive, send)

    def completion(self, scope: Any, receive: Receive, send: Send) -> Awaitable[None]:
        """POST /v1/completions."""
        return self._serve("completions", scope, receive, send)

    @property
    def in_hand(self) -> int:
        """Requests from their head to the end of the answer."""
        return self._in_hand

    async def close(self) -> None:
        """Let helpers go."""
        self._keep_alive.close()
        self._offload.close()
        await self._preparer.close()

    async def _serve(self, surface: Surface, scope: Any, receive: Receive, send: Send) -> None:
        self._in_hand += 1
        try:
            request_id = draw_request_id(self._services.rng)
            story = self._stories.begin(surface, scope, request_id)
            try:
                prepared, plans = await self._prepare(story, surface, scope, receive)
            except Cancelled as error:
                story.refused(error)
                return
            except HoldfastError as error:
                story.refused(error)
                await self._refuse(send, error, headers_label(scope) or request_id, story.trace_id)
                return
            except Exception:
                log.exception("request %s could not be prepared", request_id)
                fault = InternalError("The request could not be prepared.")
                story.refused(fault)
                await self._refuse(send, fault, request_id, story.trace_id)
                return
            finally:
                story.settle()
            with self._metrics.of(story.model).inflight:
                outcome = await self._run(story, prepared, plans, scope.pop("holdfast.wire"))
            story.ended(outcome)
            if CONTENT.on and story.request is not None:
                log_content(prepared, story.request)
        finally:
            self._in_hand -= 1

    async def _prepare(
        self, story: Story, surface: Surface, scope: Any, receive: Receive
    ) -> tuple[Prepared, list[Plan]]:
        headers = parse_headers(scope["headers"], steering=self._config.trust_client_priority)
        story.identify(headers)
        self._admit(scope)
        take = scope.pop("holdfast.body", None)
        here = take() if take is not None else None
        body = (
            self._bodies.whole(here) if here is not None else await self._bodies.read(receive, _content_length(scope))
        )
        try:
            if not self._turns.take():
                await self._turns.wait()
            prepared = self._preparer.at_once(surface, body) or await self._preparer.prepare(
                surface, body, min(FILES_WAIT, self._bounds(headers).total or FILES_WAIT)
            )
        finally:
            self._bodies.release(body)
        story.prepared(prepared.served.card.name, stream=prepared.spec.stream)
        plans = self._plans(story, prepared, headers)
        if self.advisor is not None:
            plans = await self.advisor.advise(plans)
        self._check_open()
        return prepared, plans

    async def _run(self, story: Story, prepared: Prepared, plans: list[Plan], wire: Sink) -> HoldfastError | None:
        reply = Reply(wire, self._services.flusher, self._stall)
        kind = StreamedAnswer if prepared.spec.stream else WholeAnswer
        answer = kind(reply, story.id, plans[0].label or story.id, int(self._wall()), prepared)
        answer.overload_status = self._config.http_overload_status_code
        answer.trace_id = story.trace_id
        try:
            request = Request(self._services, [*zip(plans, answer.choices, strict=True)])
        except HoldfastError as error:
            answer.refuse(error)
            return error
        story.request = request
        answer.begin(request)
        self.active[story.id], self.stories[story.id] = request, story
        self._keep_alive.add(reply)
        wire.watch(lambda: self._lost(request, answer), reply.block, reply.resume)
        try:
            await request.run()
            if not reply.over:
                await reply.drained()
        finally:
            wire.unwatch()
            self._keep_alive.remove(reply)
            del self.active[story.id], self.stories[story.id]
            reply.abandon()
            answer.dissolve()
            if answer.lost:
                self._metrics.disconnected.dec()
        if reply.dropped and answer.error is None:
            return ClientStalled("The client did not take the end of its answer.")
        return answer.error

    def _lost(self, request: Request, answer: StreamedAnswer | WholeAnswer) -> None:
        """The client has gone: what it asked for ends here and now."""
        answer.reply.abandon()
        if not answer.done:
            answer.lost = True
            self._metrics.disconnected.inc()
            self._metrics.disconnects.labels(self._metrics.label(request.model)).inc()
            request.cancel("client_disconnected")

    def _plans(self, story: Story, prepared: Prepared, headers: RequestHeaders) -> list[Plan]:
        spec = prepared.spec
        card = prepared.served.card
        bounds = self._services.bounds() if headers is NO_HEADERS else self._bounds(headers)
        context = story.context
        traceparent = context.traceparent if context is not None else ""
        steering = headers.steer(spec.steering)
        route = route_of(
            steering.worker,
            steering.dp_rank,
            steering.session_id,
            steering.router,
            steering.expected_output_tokens,
            prefill=steering.prefill_worker,
            policy_class=steering.policy_class,
        )
        seed = spec.seed if spec.seed is not None else seeds.draw(self._services.rng)
        plans: list[Plan] = []
        param = "messages" if prepared.surface == "chat_completions" else "prompt"
        for prompt in prepared.prompts:
            length = len(prompt.ids)
            stop = spec.stop_rules(token_budget(spec, length, card.context_length, param=param))
            terminal = _NO_IDS if stop.ignore_eos else prepared.served.terminal_ids
            if stop.stop_token_ids:
                terminal = terminal.union(stop.stop_token_ids)
            ids = prompt.ids.tobytes()  # little-endian u32, as on the wire
            for _ in range(spec.n):
                choice = len(plans)
                plans.append(
                    Plan(  # by position: twenty names would cost eight times as much as all that they name
                        story.id,
                        card.name,
                        ids,
                        length,
                        spec.sampling_for(seeds.mix(seed, choice)),
                        stop,
                        card.context_length,
                        bounds,
                        choice,
                        headers.label,
                        traceparent,
                        context,
                        story.prepared_seconds,
                        steering.priority,
                        steering.strict_priority,
                        spec.cache_salt,
                        card.lora,
                        terminal,
                        {} if steering.dp_rank is None else {"data_parallel_rank": steering.dp_rank},
                        route,
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
        if self.refusal is not None and not (self.weaning and not scope.get("holdfast.late")):
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

    async def _refuse(self, send: Send, error: HoldfastError, label: str, trace_id: str) -> None:
        status = self._config.http_overload_status_code
        answer = error_response(error, label, overload_status=status, trace_id=trace_id)
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
