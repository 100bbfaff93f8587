"""The endpoint ``generate`` of a router: takes streams as a worker does, and carries them through a request's life.

Choice, queue, deadlines, migration and cancels are those of `requests`; what comes back leaves as it came, one frame
for each caller and read. A caller that takes no tokens holds back nobody else: its stream waits, within its credit.

A continuation that may not be exact is not made here: how it came about could not be told to the caller, who has its
stream back with an error instead and decides itself.

Must never look into tokens.
"""

from __future__ import annotations

import asyncio
import logging
from array import array
from collections.abc import Callable
from typing import TYPE_CHECKING

import msgspec

from holdfast.base.errors import (
    Cancelled,
    InvalidRequest,
    ModelNotFound,
    StreamIncomplete,
    WorkerDraining,
    WorkerSaturated,
)
from holdfast.engines.contract import GenerateRequest
from holdfast.requests.generation import GO_ON, Generation
from holdfast.requests.plan import Ending, Plan
from holdfast.requests.service import Services
from holdfast.routing.route import route_of
from holdfast.runtime.call import Call
from holdfast.runtime.pool import WorkerPool
from holdfast.runtime.streams import IncomingCall, Logprobs, ServerConnection, TokenItem

if TYPE_CHECKING:
    from holdfast.requests.flusher import Flusher

log = logging.getLogger(__name__)

_REQUEST = msgspec.msgpack.Decoder(GenerateRequest)
_RANK = "data_parallel_rank"


class _Batch:
    """The tokens of one read for one caller (a `flusher.Writable`)."""

    __slots__ = ("_connection", "_flusher", "_items")

    def __init__(self, connection: ServerConnection, flusher: Flusher):
        self._connection, self._flusher = connection, flusher
        self._items: list[TokenItem] = []

    def add(self, item: TokenItem) -> None:
        """Send it when the read is done."""
        if not self._items:
            self._flusher.writers.append(self)
        self._items.append(item)

    def push(self) -> None:
        """Send what is there, as one frame."""
        items, self._items = self._items, []
        if items:
            self._connection.send_items(items)


class _Relayed:
    """One stream: the `Output` of its generation, and the caller's call."""

    __slots__ = ("_accepted", "_batch", "_on_blocked", "base", "blocked_since", "call", "index", "stream")

    def __init__(self, call: Call, batch: _Batch, base: int, on_blocked: Callable[[_Relayed], None]):
        self.call, self._batch, self.base = call, batch, base
        self._on_blocked = on_blocked
        self.index = base
        """Output index of the next token."""
        self.stream: Generation | None = None
        self.blocked_since: float | None = None
        """See `generation.Client`."""
        self._accepted = False

    @property
    def client(self) -> _Relayed:
        """Whoever takes the tokens."""
        return self

    def accepted(self, worker: str) -> None:  # noqa: ARG002  the caller knows this router alone
        """A worker owns the stream."""
        self._accepted = True
        self.call.accept()

    def deliver(self, tokens: list[int], logprobs: Logprobs | None) -> int:
        """See `Output.deliver`; hot path."""
        stream, call = self.stream, self.call
        if stream is not None and stream.driver.join == "declared":
            stream.finish_with(
                StreamIncomplete(
                    "its worker was lost, and no other can go on exactly; its caller may", tokens=self.index
                )
            )
            return GO_ON
        self._batch.add(TokenItem(call, self.index, tokens, logprobs))
        self.index += len(tokens)
        if call.waiting and self.blocked_since is None:
            self._on_blocked(self)
        return GO_ON

    def ended(self, ending: Ending) -> None:
        """The one terminal event; it follows the last token."""
        self._batch.push()
        call, error = self.call, ending.error
        call.on_stop = None
        if error is None:
            call.end(ending.finish, None, ending.cached_tokens, self.index - self.base)
        elif isinstance(error, Cancelled) and self._accepted:
            call.end("cancelled")
        elif self._accepted:
            call.end("error", error)
        else:
            call.refuse(error)


class Relay:
    """All streams through one router. `run` it, `serve` calls, `drain`, `send_elsewhere`.

    Args:
        services: of this process.
        pool: the workers.
        limit: streams at once.
    """

    def __init__(self, services: Services, pool: WorkerPool, *, limit: int):
        self._services, self._pool, self._limit = services, pool, limit
        self._streams: dict[_Relayed, Generation] = {}
        self._batches: dict[ServerConnection, _Batch] = {}
        self._tasks: asyncio.TaskGroup | None = None
        self._leaving = ""
        self._idle = asyncio.Event()
        self._idle.set()

    @property
    def in_flight(self) -> int:
        """Streams that are not over."""
        return len(self._streams)

    async def run(self) -> None:
        """Let streams run until cancelled."""
        try:
            async with asyncio.TaskGroup() as self._tasks:
                await asyncio.get_running_loop().create_future()
        finally:
            self._tasks = None

    def serve(self, incoming: IncomingCall) -> None:
        """Take a call (a `CallHandler`). Raises HoldfastError to refuse it."""
        assert isinstance(incoming, Call)
        tasks = self._tasks
        if self._leaving or tasks is None:
            raise WorkerDraining(self._leaving or "this router is not ready yet")
        if len(self._streams) >= self._limit:
            raise WorkerSaturated(
                f"{len(self._streams)} streams go through this router; the limit is {self._limit} "
                "(DYN_ROUTER_REQUEST_LIMIT).",
                layer="router",
                knob="DYN_ROUTER_REQUEST_LIMIT",
                threshold=self._limit,
                actual=len(self._streams),
            )
        request = _decoded(incoming)
        relayed = _Relayed(incoming, self._batch(incoming.connection), len(request.generated_ids) // 4, self._blocked)
        stream = relayed.stream = Generation(self._plan(request, incoming), relayed, self._services)
        if request.generated_ids:
            stream.generated = array("I", request.generated_ids)
            stream.count = stream.delivered = relayed.base
        self._streams[relayed] = stream
        self._idle.clear()
        incoming.on_stop = stream.cancel
        tasks.create_task(self._drive(relayed, stream), name=f"relay-{request.request_id}")

    async def _drive(self, relayed: _Relayed, stream: Generation) -> None:
        services = self._services
        services.budget.deposit()
        leases = (services.leases.take("request"), services.leases.take("stream"))
        try:
            await stream.run()
        finally:
            for lease in leases:
                lease.release()
            relayed.stream = None
            del self._streams[relayed]
            if not self._streams:
                self._idle.set()
                self._batches.clear()

    def _plan(self, request: GenerateRequest, call: Call) -> Plan:
        card = next((c for w in self._pool.workers(request.model) if (c := w.card(request.model)) is not None), None)
        if card is None:
            raise ModelNotFound(f"No worker that this router knows serves {request.model!r}.", param="model")
        headers, stop = call.headers, request.stop
        extra = dict(request.extra)
        rank = extra.pop(_RANK, None)
        ends = frozenset() if stop.ignore_eos else frozenset(card.eos_token_ids)
        return Plan(
            request_id=request.request_id,
            model=request.model,
            prompt_ids=request.prompt_ids,
            prompt_length=len(request.prompt_ids) // 4,
            sampling=request.sampling,
            stop=stop,
            context_length=card.context_length,
            deadlines=self._services.bounds(total=headers.remaining_ms / 1e3 if headers.remaining_ms else None),
            choice=request.choice,
            label=headers.label,
            traceparent=headers.traceparent,
            priority=request.priority,
            cache_salt=request.cache_salt,
            lora=request.lora,
            terminal_ids=ends.union(stop.stop_token_ids),
            extra=extra,
            route=route_of(None, rank if isinstance(rank, int) else None, None, {}),
        )

    def _batch(self, connection: ServerConnection) -> _Batch:
        found = self._batches.get(connection)
        if found is None:
            self._batches = {c: b for c, b in self._batches.items() if getattr(c, "open", True)}
            found = self._batches[connection] = _Batch(connection, self._services.flusher)
        return found

    # slow callers

    def _blocked(self, relayed: _Relayed) -> None:
        relayed.blocked_since = asyncio.get_running_loop().time()
        tasks = self._tasks
        if tasks is not None:
            tasks.create_task(self._unblock(relayed), name="relay-unblock")

    async def _unblock(self, relayed: _Relayed) -> None:
        """Wait until the caller has taken everything; a caller that never does is ended by the stream's deadline."""
        await relayed.call.writable()
        relayed.blocked_since = None
        stream = relayed.stream
        if stream is not None:
            stream.deliver()
            self._services.flusher.flush()

    # leaving

    def drain(self, why: str) -> None:
        """Take no new streams."""
        self._leaving = why

    async def idle(self) -> None:
        """Wait until no stream is left; whoever calls this has a deadline."""
        await self._idle.wait()

    def send_elsewhere(self, why: str) -> int:
        """End what still runs, so that its callers go on elsewhere from the token they have; returns how many."""
        streams = list(self._streams.values())
        for stream in streams:
            stream.finish_with(WorkerDraining(why))
        return len(streams)


def _decoded(call: Call) -> GenerateRequest:
    try:
        request = _REQUEST.decode(call.payload)
    except msgspec.DecodeError as error:
        raise InvalidRequest(f"The payload is not a generate request: {error}.") from error
    if not request.prompt_ids or len(request.prompt_ids) % 4 or len(request.generated_ids) % 4:
        raise InvalidRequest("Token ids are little-endian u32, and there is at least one in a prompt.")
    return request
