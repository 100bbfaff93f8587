"""SGLang's KV events: from its ZeroMQ publisher, one per data-parallel rank, to events of ours.

Frames are (topic, sequence number as 8 bytes big-endian, msgpack of [timestamp, [event …], rank]); an event is a map
with ``type`` (SGLang 0.5.23, ``disaggregation/kv_events.py``). Block hashes are signed there and unsigned here. The
same hash may be stored several times and is removed as often; `worker.kv_log` counts.

A gap in the sequence numbers is filled from the publisher's replay socket. What that has forgotten cannot be had again:
then the rank's blocks are all called cleared, so that nobody believes in what may be gone.

Must never block the event loop, and never keep more than `KEPT_EVENTS` that nobody takes.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Protocol

import msgspec

from holdfast.kv.events import AllBlocksCleared, BlockRemoved, BlockStored, KvEvent

log = logging.getLogger(__name__)

KEPT_EVENTS = 1 << 17
REPLAY_SECONDS = 5.0
_U64 = (1 << 64) - 1
_END = (-1).to_bytes(8, "big", signed=True)
_decode = msgspec.msgpack.Decoder().decode


class Replay(Protocol):
    """Asks a publisher for what it has sent before."""

    def __call__(self, start: int) -> Awaitable[Sequence[tuple[int, bytes]]]:
        """Return (sequence number, payload) from ``start`` on, as far as it is kept."""


class Follower:
    """The events of one publisher, in order and without gaps.

    Args:
        rank: data-parallel rank.
        tell: takes the events.
        replay: see `Replay`.
    """

    def __init__(self, rank: int, tell: Callable[[list[KvEvent]], None], replay: Replay):
        self._rank, self._tell, self._replay = rank, tell, replay
        self.next = 0
        """Sequence number that is expected."""
        self.gaps = self.lost = 0
        """How often something was missing, and how often it could not be had again."""

    async def take(self, sequence: int, payload: bytes) -> None:
        """Take a message from the publisher."""
        if sequence < self.next:
            return  # a replay brought it before
        if sequence > self.next:
            await self._fill(sequence)
        self._pass_on(sequence, payload)

    async def _fill(self, until: int) -> None:
        self.gaps += 1
        try:
            async with asyncio.timeout(REPLAY_SECONDS):
                missed = await self._replay(self.next)
        except TimeoutError:
            missed = ()
        for sequence, payload in missed:
            if self.next == sequence < until:
                self._pass_on(sequence, payload)
        if self.next < until:
            self.lost += 1
            log.warning(
                "SGLang's KV events %d to %d of rank %d are lost; its cache counts as empty until it tells more",
                self.next, until - 1, self._rank,
            )  # fmt: skip
            self._tell([AllBlocksCleared(dp_rank=self._rank)])

    def _pass_on(self, sequence: int, payload: bytes) -> None:
        self.next = sequence + 1
        try:
            self._tell(events_of(payload, self._rank))
        except (msgspec.DecodeError, KeyError, TypeError, ValueError, IndexError) as error:
            log.warning("SGLang's KV events %d of rank %d cannot be read: %s", sequence, self._rank, error)


class KvInbox:
    """Events of all ranks until the worker takes them."""

    def __init__(self, ranks: int) -> None:
        self._events: list[KvEvent] = []
        self._ranks = ranks

    def add(self, events: list[KvEvent]) -> None:
        """Keep events; when nobody takes any, all are forgotten and said to be."""
        if len(self._events) + len(events) > KEPT_EVENTS:
            log.warning("%d KV events were not taken; all caches count as empty", len(self._events))
            self._events = [AllBlocksCleared(dp_rank=rank) for rank in range(self._ranks)]
        self._events += events

    def take(self) -> list[KvEvent]:
        """Return and forget them."""
        events, self._events = self._events, []
        return events


def events_of(payload: bytes, rank: int) -> list[KvEvent]:
    """Return the events of a message.

    Args:
        payload: msgpack as described above.
        rank: of the publisher; a rank in the message wins.

    Raises:
        msgspec.DecodeError, KeyError, TypeError, ValueError, IndexError: it is something else.
    """
    batch = _decode(payload)
    told = batch[2] if len(batch) > 2 and batch[2] is not None else rank
    return [event for one in batch[1] if (event := _event(one, told)) is not None]


def _event(one: dict[str, Any], rank: int) -> KvEvent | None:
    kind = one["type"]
    if kind == "BlockStored":
        parent = one["parent_block_hash"]
        return BlockStored(
            block_hashes=_unsigned(one["block_hashes"]),
            parent_hash=None if parent is None else parent & _U64,
            token_ids=tuple(one["token_ids"]),
            block_size=one["block_size"],
            medium=one.get("medium") or "GPU",
            dp_rank=rank,
            lora=one.get("lora_name"),
            salt=one.get("cache_salt"),
        )
    if kind == "BlockRemoved":
        return BlockRemoved(_unsigned(one["block_hashes"]), one.get("medium") or "GPU", rank)
    if kind == "AllBlocksCleared":
        return AllBlocksCleared(rank)
    log.debug("SGLang tells of %s, which means nothing to us", kind)
    return None


def _unsigned(hashes: Sequence[int]) -> tuple[int, ...]:
    return tuple(one & _U64 for one in hashes)


async def follow(endpoint: str, follower: Follower) -> None:
    """Read a publisher until cancelled.

    Args:
        endpoint: of its PUB socket.
        follower: takes what it sends.
    """
    import zmq  # noqa: PLC0415  SGLang brings it
    import zmq.asyncio  # noqa: PLC0415

    socket = zmq.asyncio.Context.instance().socket(zmq.SUB)
    socket.setsockopt(zmq.RCVHWM, 0)
    socket.setsockopt(zmq.LINGER, 0)
    socket.setsockopt(zmq.SUBSCRIBE, b"")
    try:
        socket.connect(endpoint)
        while True:
            _topic, number, payload = await socket.recv_multipart()
            await follower.take(int.from_bytes(number, "big"), payload)
    finally:
        socket.close()


async def replay(endpoint: str, start: int) -> list[tuple[int, bytes]]:
    """Return what a publisher has kept from ``start`` on, as (sequence number, payload).

    Args:
        endpoint: of its ROUTER socket.
        start: the first sequence number that is wanted.
    """
    import zmq  # noqa: PLC0415
    import zmq.asyncio  # noqa: PLC0415

    socket = zmq.asyncio.Context.instance().socket(zmq.DEALER)
    socket.setsockopt(zmq.LINGER, 0)
    found: list[tuple[int, bytes]] = []
    try:
        socket.connect(endpoint)
        await socket.send_multipart([b"", start.to_bytes(8, "big")])
        while True:
            *_, number, payload = await socket.recv_multipart()
            if number == _END:
                return found
            found.append((int.from_bytes(number, "big"), payload))
    finally:
        socket.close()
