"""Runs an endpoint's handler, an async generator, for every call that comes in.

Each item that the handler yields becomes one message; the handler is not asked for the next one before the
caller's credit let this one go. Must never let one call's trouble reach another, and never log what is yielded.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
from collections.abc import AsyncIterator, Callable
from typing import Any

import msgspec

from holdfast.base.errors import EngineFailed, HoldfastError, InvalidRequest, WorkerDraining, WorkerSaturated
from holdfast.runtime.call import Call
from holdfast.runtime.context import Context
from holdfast.runtime.streams import IncomingCall

log = logging.getLogger(__name__)

GenerateHandler = Callable[..., AsyncIterator[Any]]
"""``async def handler(request)`` or ``(request, context)``: an async generator of JSON-like items."""

_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder().decode


class EndpointServer:
    """One endpoint's running calls.

    Args:
        name: for messages.
        handler: see `GenerateHandler`.
        max_calls: calls at once; more are refused ``elsewhere``.
        stop_grace: seconds that a handler has to end after a stop before it is cancelled.
    """

    def __init__(self, name: str, handler: GenerateHandler, *, max_calls: int, stop_grace: float):
        self.name = name
        self._handler = handler
        self._wants_context = _wants_context(handler)
        self._max_calls = max_calls
        self._stop_grace = stop_grace
        self._tasks: dict[asyncio.Task[None], Context] = {}
        self._idle = asyncio.Event()
        self._idle.set()
        self._leaving = False

    @property
    def active(self) -> int:
        """Calls whose handler has not ended."""
        return len(self._tasks)

    def serve(self, incoming: IncomingCall) -> None:
        """Take a call (`streams.CallHandler`). Raises InvalidRequest or WorkerSaturated to refuse it."""
        assert isinstance(incoming, Call)
        if len(self._tasks) >= self._max_calls:
            raise WorkerSaturated(
                f"endpoint {self.name} has {len(self._tasks)} calls at once; its limit max_calls is {self._max_calls}",
                knob="max_calls",
                threshold=self._max_calls,
                actual=len(self._tasks),
            )
        try:
            request = _decode(incoming.payload)
        except (msgspec.DecodeError, RecursionError) as error:
            raise InvalidRequest(f"the request for endpoint {self.name} is no msgpack: {error}") from None
        context = Context(incoming.headers.request_id, incoming.headers)
        loop = asyncio.get_running_loop()
        task = loop.create_task(self._run(incoming, request, context), name=f"call-{self.name}")
        self._tasks[task] = context
        self._idle.clear()
        task.add_done_callback(lambda _: self._done(incoming, task))
        incoming.on_stop = lambda _reason: self._stop(incoming, task, context)

    def _done(self, call: Call, task: asyncio.Task[None]) -> None:
        del self._tasks[task]
        if task.cancelled():
            self._end_cancelled(call)
        if not self._tasks:
            self._idle.set()

    def _stop(self, call: Call, task: asyncio.Task[None], context: Context) -> None:
        """The caller stopped (an end is owed, the handler may clean up), or killed or vanished (nothing is)."""
        if call.over:
            context.kill()
            task.cancel()
        else:
            context.stop()
            timer = asyncio.get_running_loop().call_later(self._stop_grace, task.cancel)
            task.add_done_callback(lambda _: timer.cancel())

    async def _run(self, call: Call, request: Any, context: Context) -> None:
        try:
            call.accept()
            await self._pass_items(call, request, context)
        except asyncio.CancelledError:
            self._end_cancelled(call)
        except HoldfastError as error:
            call.end("error", error)
        except Exception as error:
            log.exception("the handler of endpoint %s raised (request %s)", self.name, context.id())
            call.end("error", EngineFailed(f"the handler of endpoint {self.name} raised {type(error).__name__}"))
        else:
            call.end("cancelled" if context.is_stopped() else "done")

    def _end_cancelled(self, call: Call) -> None:
        if self._leaving:
            call.end("error", WorkerDraining(f"the worker left before endpoint {self.name} was done"))
        else:
            call.end("cancelled")

    async def _pass_items(self, call: Call, request: Any, context: Context) -> None:
        items = self._handler(request, context) if self._wants_context else self._handler(request)
        try:
            async for item in items:
                call.send_data(_encode(item))
                await call.writable()
        finally:
            close = getattr(items, "aclose", None)
            if close is not None:
                await close()

    async def drained(self, seconds: float) -> int:
        """Wait at most ``seconds`` for running calls to end; returns how many are left."""
        try:
            async with asyncio.timeout(seconds):
                await self._idle.wait()
        except TimeoutError:
            pass
        return len(self._tasks)

    async def cancel(self) -> None:
        """Kill what is left; callers learn that the worker leaves, so that they go elsewhere."""
        self._leaving = True
        for task, context in list(self._tasks.items()):
            context.kill()
            task.cancel()
        if self._tasks:
            await asyncio.wait(list(self._tasks), timeout=self._stop_grace)


def _wants_context(handler: GenerateHandler) -> bool:
    try:
        parameters = inspect.signature(handler).parameters.values()
    except (TypeError, ValueError):
        return True
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD, p.VAR_POSITIONAL)]
    if not positional:
        raise InvalidRequest("an endpoint's handler takes (request) or (request, context)", param="handler")
    return len(positional) > 1 or positional[0].kind is positional[0].VAR_POSITIONAL
