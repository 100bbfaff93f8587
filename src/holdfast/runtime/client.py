"""Calls an endpoint of whatever instance serves it, for programs that use Holdfast as a library.

A call that no worker has accepted yet goes to the next instance; once accepted it stays where it is. Must never
repeat a call whose worker may have begun to answer: that needs knowledge of what the items mean.
"""

# ruff: noqa: ARG002 - the callbacks have the signatures of `streams.StreamHandler`

from __future__ import annotations

import asyncio
import random
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any, Literal

import msgspec

from holdfast.base.errors import Cancelled, HoldfastError, InternalError, InvalidRequest, NoWorkers, PeerSilent
from holdfast.base.ids import draw_request_id
from holdfast.runtime.context import Context, ContextState
from holdfast.runtime.discovery.contract import InstanceRecord
from holdfast.runtime.member import Worker
from holdfast.runtime.pool import WorkerPool
from holdfast.runtime.streams import Logprobs, StreamHandle

RouterMode = Literal["round_robin", "random"]

WINDOW = 64
"""Items that a worker may send ahead of its reader."""
ACCEPT_SECONDS = 5.0
"""How long a worker may take to accept."""

_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder().decode


class ResponseStream(AsyncIterator[Any]):
    """The items of one call, in order; ends normally, or raises the typed error that ended it.

    Leaving early (`aclose`, cancelling the reading task, ``async with``) kills the call at its worker.
    """

    def __init__(self, context: Context):
        self.context = context
        self.instance = ""
        """Who answers; set once accepted."""
        self._handle: StreamHandle | None = None
        self._items: deque[bytes] = deque()
        self._taken = 0
        self._accepted = False
        self._over = False
        self._error: HoldfastError | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._unwatch: Callable[[], None] = lambda: None

    # -- reading -------------------------------------------------------------------------------------

    async def __aenter__(self) -> ResponseStream:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    async def __anext__(self) -> Any:
        while not self._items and not self._over:
            await self._wait()
        if self._items:
            item = self._items.popleft()
            self._give_credit()
            return _decode(item)
        if self._error is not None:
            raise self._error
        raise StopAsyncIteration

    async def aclose(self) -> None:
        """Kill the call unless it is over. Idempotent."""
        if self._handle is not None and not self._over:
            self._handle.kill("cancelled")
        self._finish(None)

    def _give_credit(self) -> None:
        self._taken += 1
        if self._taken >= WINDOW // 2 and self._handle is not None and not self._over:
            self._handle.credit(self._taken)
            self._taken = 0

    async def _wait(self) -> None:
        self._waiter = asyncio.get_running_loop().create_future()
        try:
            await self._waiter
        except asyncio.CancelledError:
            await self.aclose()
            raise
        finally:
            self._waiter = None

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def _finish(self, error: HoldfastError | None) -> None:
        if not self._over:
            self._over = True
            self._error = error
            self._unwatch()
            self._wake()

    # -- opening -------------------------------------------------------------------------------------

    async def begin(self, worker: Worker, handle: StreamHandle, seconds: float) -> None:
        """Wait until the worker accepts.

        Raises:
            HoldfastError: it refused, broke, or took longer than ``seconds``; nothing more comes then.
        """
        self._handle = handle
        self.instance = worker.instance
        self._unwatch = self.context.watch(self._follow)
        try:
            async with asyncio.timeout(seconds):
                while not self._accepted and not self._over:
                    await self._wait()
        except TimeoutError:
            raise PeerSilent(
                f"worker {worker.instance} did not accept within {seconds:g} s",
                worker=worker.instance,
                stage="accept",
                threshold=seconds,
            ) from None
        if not self._accepted and self._error is not None:
            raise self._error

    def _follow(self, state: ContextState) -> None:
        if self._handle is None or self._over:
            return
        if state == "stopped":
            self._handle.stop()
        elif state == "killed":
            self._handle.kill()
            self._finish(Cancelled("the call was killed by its context"))

    # -- what the stream says (`streams.StreamHandler`) ----------------------------------------------

    def on_accept(self) -> None:
        """The worker owns the call."""
        self._accepted = True
        self._wake()

    def on_tokens(self, index: int, tokens: Sequence[int], logprobs: Logprobs | None) -> None:
        """Not what this client is for."""
        raise InternalError("this endpoint sends tokens, not items; call it through the worker pool")

    def on_data(self, index: int, payload: bytes) -> None:
        """One item."""
        self._items.append(payload)
        self._wake()

    def on_refuse(self, error: HoldfastError) -> None:
        """Never started."""
        self._finish(error)

    def on_end(self, finish: str, error: HoldfastError | None, cached_tokens: int) -> None:
        """Ended by the worker."""
        self._finish(error)

    def on_broken(self, error: HoldfastError) -> None:
        """Stopped without an end."""
        self._finish(error)


class Client:
    """Calls one endpoint. Made by `Endpoint.client`.

    Args:
        pool: started.
        path: namespace, component and endpoint.
        rng: for request ids and random choice.
        router_mode: what `generate` does.
        accept_timeout: seconds a worker may take to accept.
    """

    def __init__(
        self,
        pool: WorkerPool,
        path: tuple[str, str, str],
        rng: random.Random,
        *,
        router_mode: RouterMode = "round_robin",
        accept_timeout: float = ACCEPT_SECONDS,
    ):
        self._pool = pool
        self._path = path
        self._rng = rng
        self._mode = router_mode
        self._accept_timeout = accept_timeout
        self._turn = 0

    def instances(self) -> list[InstanceRecord]:
        """Return the records of the instances that can be called now."""
        return [worker.record for worker in self._eligible()]

    def instance_ids(self) -> list[str]:
        """Return the ids of the instances that can be called now."""
        return [worker.instance for worker in self._eligible()]

    async def wait_for_instances(self, timeout: float = 30.0) -> list[str]:  # noqa: ASYNC109
        """Wait until somebody can be called; returns their ids. Raises NoWorkers after ``timeout`` seconds."""
        changed = asyncio.Event()
        stop = self._pool.subscribe(lambda _event, _worker: changed.set())
        try:
            async with asyncio.timeout(timeout):
                while not self._eligible():
                    changed.clear()
                    await changed.wait()
        except TimeoutError:
            raise self._nobody(f" within {timeout:g} s") from None
        finally:
            stop()
        return self.instance_ids()

    async def generate(self, request: Any, context: Context | None = None) -> ResponseStream:
        """Call an instance chosen by the router mode.

        Args:
            request: anything msgpack can say.
            context: stopping or killing it stops or kills the call; None: a fresh one.

        Raises:
            NoWorkers: nobody serves the endpoint.
            Cancelled: the context was stopped before anybody accepted.
            HoldfastError: the refusal of the last instance that was tried.
        """
        return await (self.random if self._mode == "random" else self.round_robin)(request, context)

    async def round_robin(self, request: Any, context: Context | None = None) -> ResponseStream:
        """Do as `generate`, taking the instances in turn."""
        workers = sorted(self._eligible(), key=lambda worker: worker.instance)
        start = self._turn % len(workers) if workers else 0
        self._turn += 1
        return await self._call(workers[start:] + workers[:start], request, context)

    async def random(self, request: Any, context: Context | None = None) -> ResponseStream:
        """Do as `generate`, taking any instance."""
        workers = self._eligible()
        self._rng.shuffle(workers)
        return await self._call(workers, request, context)

    async def direct(self, request: Any, instance_id: str, context: Context | None = None) -> ResponseStream:
        """Do as `generate`, on that instance and no other."""
        return await self._call([w for w in self._eligible() if w.instance == instance_id], request, context)

    def _eligible(self) -> list[Worker]:
        namespace, component, endpoint = self._path
        return [
            worker
            for worker in self._pool.all_workers()
            if worker.eligible
            and worker.record.namespace == namespace
            and worker.record.component == component
            and endpoint in worker.record.endpoints
        ]

    def _nobody(self, when: str = "") -> NoWorkers:
        return NoWorkers(f"no instance serves {'.'.join(self._path)}{when}", endpoint=".".join(self._path))

    async def _call(self, workers: list[Worker], request: Any, context: Context | None) -> ResponseStream:
        context = context if context is not None else Context(draw_request_id(self._rng))
        try:
            payload = _encode(request)
        except (TypeError, ValueError, OverflowError, RecursionError) as bad:
            raise InvalidRequest(f"the request cannot be said in msgpack: {bad}", param="request") from None
        error: HoldfastError = self._nobody()
        for worker in workers:
            if context.is_stopped():
                raise Cancelled("the context was stopped before any worker accepted the call")
            try:
                return await self._attempt(worker, payload, context)
            except HoldfastError as refusal:
                error = refusal
                if refusal.retry != "elsewhere":
                    raise
                worker.report_failure(refusal)
        raise error

    async def _attempt(self, worker: Worker, payload: bytes, context: Context) -> ResponseStream:
        stream = ResponseStream(context)
        headers = msgspec.structs.replace(context.headers, request_id=context.id())
        handle = worker.open(self._path[2], headers, payload, stream, credit=WINDOW)
        try:
            await stream.begin(worker, handle, self._accept_timeout)
        except BaseException:
            await stream.aclose()
            raise
        return stream
