"""KV events in a simulated cluster: what can happen to them on their way, and whether every frontend knows the truth.

They can be lost, come twice or come out of order between an engine and its worker's log, or between the log and the
frontends. Must never touch anything else.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from typing import TYPE_CHECKING, Any, Generic, Literal, TypeVar

from holdfast.kv.events import KvEvent
from holdfast.kv.feed import Deltas, Message, Part
from holdfast.runtime.context import Context
from holdfast.sim.watching import replace
from holdfast.worker.process import WorkerProcess

if TYPE_CHECKING:
    from holdfast.sim.processes import FrontendProcess, WorkerHost

Mangling = Literal["lose", "repeat", "reorder"]
T = TypeVar("T")


class Mangler(Generic[T]):
    """Does something to the next things that pass; otherwise they pass as they are."""

    def __init__(self) -> None:
        self._how: Mangling = "lose"
        self._times = 0
        self._late: list[T] = []

    def order(self, how: Mangling, times: int) -> None:
        """Do this to the next so many."""
        self._how, self._times = how, times

    def __call__(self, thing: T) -> list[T]:
        """Return what comes out instead of one thing."""
        late, self._late = self._late, []
        if not self._times:
            return [thing, *late]
        self._times -= 1
        if self._how == "lose":
            return late
        if self._how == "repeat":
            return [thing, thing, *late]
        self._late = [thing]
        return late


class CacheFaults:
    """Of one worker's KV events.

    Args:
        worker: not started yet.
    """

    def __init__(self, worker: WorkerProcess):
        self.engine: Mangler[list[KvEvent]] = Mangler()
        """Between engine and log: what one step brings."""
        self.wire: Mangler[Message] = Mangler()
        """Between log and frontends."""
        publisher = worker.kv
        take, serve = publisher.take, publisher.serve

        def mangled_take(events: list[KvEvent]) -> None:
            for some in self.engine(events):
                take(some)

        replace(publisher, "take", mangled_take)
        replace(worker.host, "_on_kv_events", mangled_take)
        replace(publisher, "serve", _mangled(serve, self.wire))


Serve = Callable[[Any, Context], AsyncGenerator[Message, None]]


def _mangled(serve: Serve, mangler: Mangler[Message]) -> Serve:
    async def told(request: Any, context: Context) -> AsyncGenerator[Message, None]:
        messages = serve(request, context)
        try:
            async for message in messages:
                touched = isinstance(message, Deltas | Part)
                for one in mangler(message) if touched else [message]:
                    yield one
        finally:
            await messages.aclose()

    return told


def difference(frontend: FrontendProcess, worker: WorkerHost) -> str:
    """Return what a frontend gets wrong about a worker's cache, for people; empty: it knows the truth."""
    instance = worker.worker.instance
    known = frontend.assembled.knowledge.known(instance)
    if known is None or known.state != "exact":
        return f"{known.state}: {known.problem}" if known is not None else "unknown"
    if known.epoch != worker.worker.epoch:
        return "it speaks of another start of the worker"
    index, slots = known.space.index, known.space.slots.of_worker(instance)
    for rank, truth in enumerate(worker.engine.kv_truth):
        tiers = index.snapshot(slots[rank]) if rank in slots else ([], [], [])
        held = {one for tier in tiers for one in tier}
        if held != truth:
            return f"rank {rank}: {len(held - truth)} blocks are not there, {len(truth - held)} are missing"
    return ""
