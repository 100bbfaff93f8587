"""Tells frontends what this worker's engine holds in its KV cache: the endpoint ``kv_events`` (`kv.feed`).

A subscriber is a position in the log, nothing else: what it has not taken yet waits in the log, which keeps the last
batches only. One that is further behind than that gets everything anew, so that slow readers cost no memory.

Once a second the log is compared with the engine's own digest, where it has one; when they differ the engine is asked
to tell everything again. Must never hold back an engine's step.
"""

from __future__ import annotations

import asyncio
import logging
from array import array
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing
from typing import Any

import msgspec

from holdfast.base.errors import InvalidRequest
from holdfast.base.limits import CALLERS_PER_WORKER
from holdfast.engines.contract import Engine, EngineInfo
from holdfast.kv.events import KvEvent
from holdfast.kv.feed import (
    ENDPOINT,
    PART_HASHES,
    VERSION,
    Beat,
    Complete,
    Deltas,
    Message,
    Opening,
    Part,
    Subscribe,
    to_wire,
)
from holdfast.runtime.context import Context
from holdfast.runtime.serving import EndpointServer
from holdfast.runtime.streams import CallHandler
from holdfast.worker.kv_config import KvPublishConfig
from holdfast.worker.kv_log import KvLog
from holdfast.worker.kv_snapshot import Cut

log = logging.getLogger(__name__)

_STOP_GRACE = 0.1
"""Seconds that a subscription has to end once its subscriber wants no more."""
_MISMATCHES = 2
"""Comparisons in a row that must fail before the engine is asked to tell everything again."""


MOST_BROKEN = 3
"""Snapshots in a row that may come to nothing because the cache was cleared meanwhile; the next is read in one go."""


class KvPublisher:
    """The log of one engine and its subscribers.

    Args:
        engine: asked for its own count.
        epoch: of this start of the worker.
        config: settings.
    """

    def __init__(self, engine: Engine, epoch: int, config: KvPublishConfig) -> None:
        self._engine, self._epoch, self._config = engine, epoch, config
        self.log: KvLog | None = None
        """None until the engine has said that it tells events, and for ever if it does not."""
        self.subscribers = 0
        self.overruns = 0
        """How often a subscriber was so far behind that it got everything anew."""
        self.resends = 0
        """How often the engine had to tell everything again because its count was another."""
        self._mismatches = 0
        self._closed = False
        self._server: EndpointServer | None = None
        self._waiting: dict[asyncio.Event, None] = {}
        """Subscribers that wait for news, in the order of their coming: a set would tell them in that of addresses."""
        self._announcing: asyncio.TimerHandle | None = None

    def begin(self, info: EngineInfo) -> CallHandler | None:
        """The engine has started: return the endpoint's handler; None when nothing is to be told."""
        can = info.capabilities
        if not (self._config.publish_kv_events and can.kv_events):
            return None
        native = can.kv_hashes == "sequence"
        self.log = KvLog(self._epoch, info.block_size, native=native, kept=self._config.kv_events_kept)
        self._server = EndpointServer(ENDPOINT, self.serve, max_calls=CALLERS_PER_WORKER, stop_grace=_STOP_GRACE)
        return self._server.serve

    # ---- the engine's side ----

    def take(self, events: list[KvEvent]) -> None:
        """Take over what changed in a step; an engine's KV event sink."""
        if self.log is None or not self.log.take(events) or self._announcing is not None:
            return
        loop = asyncio.get_running_loop()
        self._announcing = loop.call_later(self._config.kv_events_batch_ms / 1e3, self._announce)

    def _announce(self) -> None:
        self._announcing = None
        for waiting in self._waiting:
            waiting.set()

    async def watch(self) -> None:
        """Compare the log with the engine until cancelled."""
        while True:
            await asyncio.sleep(self._config.kv_events_beat_secs)
            try:
                self.compare()
            except Exception:
                log.exception("the KV event log could not be compared with the engine")

    def compare(self) -> None:
        """Fetch what no step has brought; let the engine tell everything again if the digests differ twice."""
        if self.log is None:
            return
        events = self._engine.take_kv_events()
        if events:
            self.take(events)
        theirs = self._engine.kv_digests()
        ours = tuple(self.log.digest(rank) for rank in range(len(theirs)))
        if ours == theirs:
            self._mismatches = 0
            return
        self._mismatches += 1
        if self._mismatches >= _MISMATCHES:
            self._mismatches = 0
            self.resends += 1
            log.warning(
                "KV events were lost between engine and log: by rank, the engine holds %s blocks, the log has %s%s; "
                "the engine tells everything again",
                [count for count, _ in theirs],
                [count for count, _ in ours],
                " (the same number, but others)" if [n for n, _ in ours] == [n for n, _ in theirs] else "",
            )
            self._engine.resend_kv_events()

    def close(self) -> None:
        """End all subscriptions: nothing that is told from now on matters. Idempotent."""
        self._closed = True
        if self._announcing is not None:
            self._announcing.cancel()
            self._announcing = None
        self._announce()

    async def cancel(self) -> None:
        """Do as `close`, and wait until the subscriptions are over."""
        self.close()
        if self._server is not None:
            await self._server.cancel()

    # ---- the subscribers' side ----

    async def serve(self, request: Any, context: Context) -> AsyncGenerator[Message, None]:
        """Tell one subscriber (`runtime.serving.GenerateHandler`).

        Raises:
            InvalidRequest: the request cannot be read, or nothing is told here.
        """
        if self.log is None:
            raise InvalidRequest("this worker's engine tells nothing about its KV cache", param="endpoint")
        try:
            wanted = msgspec.convert(request, Subscribe)
        except msgspec.ValidationError as error:
            raise InvalidRequest(f"the request is no subscription to KV events: {error}") from error
        if wanted.version < VERSION:
            raise InvalidRequest(f"KV events are told in version {VERSION}, not {wanted.version}")
        self.subscribers += 1
        news = asyncio.Event()
        self._waiting[news] = None
        try:
            async with aclosing(self._tell(self.log, wanted, context, news)) as messages:
                async for message in messages:
                    yield message
        finally:
            self._waiting.pop(news, None)
            self.subscribers -= 1

    async def _tell(
        self, source: KvLog, wanted: Subscribe, context: Context, news: asyncio.Event
    ) -> AsyncGenerator[Message, None]:
        loop = asyncio.get_running_loop()
        broken = 0
        at = wanted.sequence
        behind = wanted.epoch != source.epoch or not source.has(at)
        if not behind:
            yield Opening(source.epoch, at, False)
        beat_at = loop.time() + self._config.kv_events_beat_secs
        while not (self._closed or context.is_stopped()):
            news.clear()
            if behind or not source.has(at):
                self.overruns += not behind
                with source.cut() as cut:
                    async with aclosing(self._snapshot(cut, sliced=broken < MOST_BROKEN)) as messages:
                        async for message in messages:
                            yield message
                behind, at = cut.broken, cut.sequence
                broken = broken + 1 if behind else 0
            elif at < source.sequence:
                first, batch = at + 1, source.after(at)
                at = batch.last
                yield Deltas(first, at, to_wire(batch.events), to_wire(batch.hashes))
            elif loop.time() >= beat_at:
                beat_at = loop.time() + self._config.kv_events_beat_secs
                yield Beat(at, source.counts())
            else:
                await _until(news, beat_at)

    async def _snapshot(self, cut: Cut, *, sliced: bool) -> AsyncGenerator[Message, None]:
        """Tell what a cut holds, one slice in each turn of the event loop; read in slices, or before all that."""
        yield Opening(self._epoch, cut.sequence, True, cut.blocks)
        number = 0
        slices = cut.slices()
        if not sliced:
            slices = iter(list(slices))
            cut.close()
        for rank, tier, hashes in slices:
            for piece in _pieces(hashes):
                yield Part(number, rank, tier, to_wire(piece))
                number += 1
            await asyncio.sleep(0)
        if not cut.broken:
            yield Complete(number)


def _pieces(hashes: array[int]) -> Iterator[array[int]]:
    for at in range(0, len(hashes), PART_HASHES):
        yield hashes[at : at + PART_HASHES]


async def _until(news: asyncio.Event, deadline: float) -> None:
    try:
        async with asyncio.timeout_at(deadline):
            await news.wait()
    except TimeoutError:
        pass
