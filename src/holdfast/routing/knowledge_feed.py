"""One subscription to one worker's KV events: checks that nothing is missing, and keeps the index to it.

`kv.feed` describes the messages. Batches must come one after the other: one that comes again is left out, one that is
missing ends the subscription, and the next one asks for what follows the last batch that is here. What cannot be told
that way (another epoch, counts that differ, a worker that does not keep the batch any more) costs a snapshot.

Small messages are applied where they arrive, large ones one for each turn of the event loop, so that a snapshot of
millions of blocks delays no request. Must never decide when to subscribe again; that is `knowledge_keeper`.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Sequence

import msgspec

from holdfast.base.errors import HoldfastError, WorkerFault
from holdfast.base.limits import KV_BLOCKS_PER_WORKER, RANKS_PER_WORKER
from holdfast.kv.feed import DECODER, VERSION, Beat, Complete, Deltas, Message, Opening, Part, Subscribe, from_wire
from holdfast.routing.knowledge import WorkerKnowledge
from holdfast.runtime.streams import Logprobs, StreamHandle

log = logging.getLogger(__name__)

WINDOW = 32
"""Messages that a worker may send ahead (1.5 MB at most)."""
AT_ONCE_BYTES = 4_096
"""Larger messages wait for their turn of the event loop."""

_encode = msgspec.msgpack.Encoder().encode


class _LostTrackError(Exception):
    """The subscription cannot go on; arguments: reason (`knowledge.REASONS`) and what happened, for people."""


class Feed:
    """See the module; a `streams.StreamHandler`. Use once.

    Args:
        known: what is known of the worker.
        now: the loop's time.
    """

    def __init__(self, known: WorkerKnowledge, now: Callable[[], float]) -> None:
        self.known = known
        self.error: HoldfastError | None = None
        """With which the worker ended the subscription, or refused it."""
        self.over = asyncio.Event()
        self.synchronised_at: float | None = None
        """When the index began to follow."""
        self.handle: StreamHandle | None = None
        self._now = now
        self._opened_at = now()
        self._opened = False
        self._queue: deque[bytes] = deque()
        self._arrived = asyncio.Event()
        self._taken = 0
        self._snapshot: Opening | None = None
        self._parts = 0

    def request(self) -> bytes:
        """Return what to ask the worker for."""
        return _encode(Subscribe(VERSION, self.known.epoch, self.known.sequence))

    async def run(self, silence: float) -> None:
        """Apply what is too much to be applied at once, until the subscription is over.

        Args:
            silence: seconds after which a worker that says nothing is asked anew.
        """
        while not self.over.is_set():
            self._arrived.clear()
            while self._queue and not self.over.is_set():
                self._guarded(self._queue.popleft())
                await asyncio.sleep(0)
            if not self.over.is_set() and not await _set_within(self._arrived, silence / 4):
                self._check(silence)

    def _check(self, silence: float) -> None:
        """End the subscription of a worker that has said nothing for so long."""
        quiet = self._now() - max(self.known.heard_at, self._opened_at)
        if not self.over.is_set() and not self._queue and quiet > silence:
            self._lost("silent", f"it said nothing about its blocks for {quiet:.1f} s (bound {silence:g} s)")

    def close(self) -> None:
        """Take nothing more. Idempotent."""
        handle, self.handle = self.handle, None
        if handle is not None and not self.over.is_set():
            handle.kill("no longer wanted")
        self._end()

    # ---- `StreamHandler` ----

    def on_accept(self) -> None:
        """The worker is about to tell."""

    def on_tokens(self, index: int, tokens: Sequence[int], logprobs: Logprobs | None) -> None:  # noqa: ARG002
        """Not what this endpoint sends."""
        self._lost("broken", "it sent tokens instead of KV events")

    def on_data(self, index: int, payload: bytes) -> None:  # noqa: ARG002
        """One message."""
        if self.over.is_set():
            return
        if self._queue or len(payload) > AT_ONCE_BYTES:
            self._queue.append(payload)
            self._arrived.set()
        else:
            self._guarded(payload)

    def on_refuse(self, error: HoldfastError) -> None:
        """It tells nothing."""
        self._stopped(error)

    def on_end(self, finish: str, error: HoldfastError | None, cached_tokens: int) -> None:  # noqa: ARG002
        """It tells nothing any more."""
        self._stopped(error)

    def on_broken(self, error: HoldfastError) -> None:
        """The connection is lost, or the worker is taken for silent or hung; what it holds stays known."""
        self._stopped(error)

    def _stopped(self, error: HoldfastError | None) -> None:
        while self._queue and not self.over.is_set():  # at most a window of them
            self._guarded(self._queue.popleft())
        self.handle, self.error = None, self.error or error
        self._end()

    # ---- messages ----

    def _guarded(self, payload: bytes) -> None:
        try:
            self._handle(DECODER.decode(payload))
        except _LostTrackError as lost:
            self._lost(*lost.args)
        except (msgspec.DecodeError, ValueError, HoldfastError) as error:
            self.known.rejected()
            self._lost("broken", f"its KV events cannot be read: {error}")
        self._taken += 1
        if self._taken >= WINDOW // 2 and self.handle is not None:
            self.handle.credit(self._taken)
            self._taken = 0

    def _handle(self, message: Message) -> None:
        known = self.known
        known.heard_at = self._now()
        if isinstance(message, Deltas):
            self._deltas(message)
        elif isinstance(message, Part):
            self._part(message)
        elif isinstance(message, Beat):
            self._beat(message)
        elif isinstance(message, Opening):
            self._opening(message)
        else:
            self._complete(message)

    def _opening(self, opening: Opening) -> None:
        known = self.known
        if opening.blocks > KV_BLOCKS_PER_WORKER:
            raise WorkerFault(f"it holds {opening.blocks} blocks; at most {KV_BLOCKS_PER_WORKER} are indexed")
        if opening.epoch != known.epoch and known.epoch:
            known.lost_track("new_epoch", "it has started anew")
            known.restarted()
        elif self._opened and self._snapshot is None:  # else the one under way came to nothing, and it begins anew
            known.lost_track("overrun", "this frontend was too slow to follow its KV events")
        self._opened = True
        if opening.snapshot:
            known.clear()
            self._snapshot, self._parts = opening, 0
        elif (opening.epoch, opening.sequence) == (known.epoch, known.sequence):
            self._synchronised(opening)
        else:
            raise _LostTrackError("gap", f"it goes on after batch {opening.sequence}, not {known.sequence}")

    def _part(self, part: Part) -> None:
        if self._snapshot is None or part.number != self._parts:
            raise _LostTrackError("gap", f"part {part.number} of its snapshot came instead of {self._parts}")
        _check_rank(part.rank)
        self.known.store(part.rank, part.tier, from_wire(part.hashes))
        self._parts += 1

    def _complete(self, complete: Complete) -> None:
        opening, self._snapshot = self._snapshot, None
        if opening is None or complete.parts != self._parts:
            raise _LostTrackError("gap", f"{self._parts} of the {complete.parts} parts of its snapshot came")
        self._synchronised(opening)

    def _synchronised(self, opening: Opening) -> None:
        self.known.epoch, self.known.sequence = opening.epoch, opening.sequence
        self.known.synchronised()
        self.synchronised_at = self._now()

    def _deltas(self, deltas: Deltas) -> None:
        known = self.known
        self._must_follow()
        if deltas.last <= known.sequence:
            known.repeated()
            return
        if deltas.first != known.sequence + 1 or deltas.last < deltas.first:
            raise _LostTrackError("gap", f"batch {deltas.first} came after {known.sequence}")
        events = from_wire(deltas.events)
        for rank in memoryview(events).cast("B").cast("Q")[1::4]:
            _check_rank(rank)
        known.apply(events, from_wire(deltas.hashes))
        known.sequence = deltas.last

    def _beat(self, beat: Beat) -> None:
        known = self.known
        self._must_follow()
        if beat.sequence != known.sequence:
            raise _LostTrackError("gap", f"it is at batch {beat.sequence}, the index at {known.sequence}")
        ours = {rank: sum(counts[:3]) + counts.forgotten for rank, counts in known.counts().items()}
        theirs = {rank: sum(tiers) for rank, *tiers in beat.counts}
        for rank in ours.keys() | theirs.keys():
            if ours.get(rank, 0) != theirs.get(rank, 0):
                known.epoch = known.sequence = 0  # whatever was missed is not known: everything is needed
                what = f"rank {rank} holds {theirs.get(rank, 0)} blocks, the index had {ours.get(rank, 0)}"
                raise _LostTrackError("mismatch", what)

    def _must_follow(self) -> None:
        if self._snapshot is not None or self.synchronised_at is None:
            raise _LostTrackError("gap", "its snapshot was not complete")

    # ---- the end ----

    def _lost(self, reason: str, problem: str) -> None:
        log.warning("worker %s: %s; synchronising its KV cache contents anew", self.known.instance, problem)
        self.known.lost_track(reason, problem)
        self.close()

    def _end(self) -> None:
        self.over.set()
        self._queue.clear()
        self._arrived.set()


async def _set_within(event: asyncio.Event, seconds: float) -> bool:
    try:
        async with asyncio.timeout(seconds):
            return await event.wait()
    except TimeoutError:
        return False


def _check_rank(rank: int) -> None:
    if rank >= RANKS_PER_WORKER:
        raise ValueError(f"rank {rank}; a worker has {RANKS_PER_WORKER} at most")
