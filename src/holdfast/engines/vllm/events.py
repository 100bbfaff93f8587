"""vLLM's KV events: what its ZMQ publisher sends, as our `kv.events`, in order and without gaps.

Each message has three frames: topic, number (u64, big-endian, from 0 on, per data-parallel rank), and a msgpack array
``[time, events, rank]``. Events are maps with a ``type`` (0.9 and later) or arrays with their tag first (before that).
A jump in the numbers is filled from the publisher's replay socket; when that has forgotten them, the rank is told as
empty, because nothing that was known of it can be trusted.

One hash may be stored several times, once for each copy of the block; whoever follows must count, as `worker.kv_log`
does.

Must never import vLLM, and nothing of ZMQ before `Follower.run`.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import msgspec

from holdfast.kv.events import AllBlocksCleared, BlockRemoved, BlockStored, KvEvent

log = logging.getLogger(__name__)

_U64 = (1 << 64) - 1
_STORED = ("block_hashes", "parent_block_hash", "token_ids", "block_size", "lora_id", "medium", "lora_name")
"""Order of fields of the older arrays, after the tag."""
_REMOVED = ("block_hashes", "medium")
_END_OF_REPLAY = _U64
REPLAY_SECONDS = 5.0
SALTED_BLOCKS = 65_536
"""Blocks with a cache salt that are remembered, because only the first block of a sequence names its salt."""


def hash_of(value: int | bytes) -> int:
    """Return a block hash as u64: integers of either sign, or the first eight bytes of a digest."""
    if isinstance(value, bytes):
        return int.from_bytes(value[:8], "big")
    return value & _U64


def as_map(event: Mapping[str, Any] | Sequence[Any]) -> Mapping[str, Any]:
    """Return an event of either form as a map. Raises ValueError."""
    if isinstance(event, Mapping):
        return event
    if not event or not isinstance(event[0], str):
        raise ValueError("an event without a tag")
    names = {"BlockStored": _STORED, "BlockRemoved": _REMOVED}.get(event[0], ())
    return {"type": event[0], **dict(zip(names, event[1:], strict=False))}


class Reader:
    """Turns one rank's events into ours, remembering cache salts along the chains of blocks."""

    def __init__(self, rank: int):
        self.rank = rank
        self.ignored = 0
        """Events that are not about this worker's own full-attention blocks."""
        self._salts: dict[int, str] = {}

    def read(self, events: Sequence[Any]) -> list[KvEvent]:
        """Return what a message's events mean; those that cannot be understood are logged and left out."""
        found: list[KvEvent] = []
        for event in events:
            try:
                meaning = self._one(as_map(event))
            except (ValueError, KeyError, TypeError) as error:
                log.warning("vLLM told a KV event that cannot be understood: %s: %s", type(error).__name__, error)
                continue
            if meaning is None:
                self.ignored += 1
            else:
                found.append(meaning)
        return found

    def _one(self, event: Mapping[str, Any]) -> KvEvent | None:
        kind = event["type"]
        if kind == "AllBlocksCleared":
            self._salts.clear()
            return AllBlocksCleared(dp_rank=self.rank)
        if event.get("group_idx") or event.get("locality") == "REMOTE":
            return None  # sliding windows of hybrid models; blocks of other machines
        medium = event.get("medium") or "GPU"
        hashes = tuple(hash_of(one) for one in event["block_hashes"])
        if kind == "BlockRemoved":
            for one in hashes:
                self._salts.pop(one, None)
            return BlockRemoved(hashes, medium, self.rank)
        if kind != "BlockStored":
            raise ValueError(f"an event of kind {kind!r}")
        parent = event.get("parent_block_hash")
        parent = None if parent is None else hash_of(parent)
        return BlockStored(
            block_hashes=hashes,
            parent_hash=parent,
            token_ids=tuple(event["token_ids"]),
            block_size=event["block_size"],
            medium=medium,
            dp_rank=self.rank,
            lora=event.get("lora_name"),
            salt=self._salt(event, hashes, parent),
        )

    def _salt(self, event: Mapping[str, Any], hashes: Sequence[int], parent: int | None) -> str | None:
        if parent is not None:
            salt = self._salts.get(parent)
        else:
            keys = event.get("extra_keys") or ()
            lora = event.get("lora_name")
            texts = [key for key in (keys[0] or () if keys else ()) if isinstance(key, str)]
            if lora is not None and texts[:1] == [lora]:
                texts = texts[1:]
            salt = texts[0] if texts else None
        if salt is not None:
            self._salts.update(dict.fromkeys(hashes, salt))
            while len(self._salts) > SALTED_BLOCKS:
                del self._salts[next(iter(self._salts))]
        return salt


class Sequencer:
    """Puts one rank's messages in order: each number once, gaps found, what was there before left out."""

    def __init__(self) -> None:
        self.next = 0
        """The number that is due."""

    def judge(self, number: int) -> str:
        """Return ``due``, ``old`` or ``gap``."""
        if number == self.next:
            return "due"
        return "old" if number < self.next else "gap"


class Follower:
    """Follows the publisher of one rank.

    Args:
        rank: data-parallel rank.
        endpoint: ZMQ address of the publisher.
        replay: ZMQ address of its replay socket.
        topic: that it publishes under.
        sink: gets events, on the running loop.
    """

    def __init__(self, rank: int, endpoint: str, replay: str, topic: str, sink: Callable[[list[KvEvent]], None]):
        self.rank = rank
        self.gaps = self.losses = 0
        """How often messages were missing, and how often they could not be had any more."""
        self._endpoint, self._replay, self._topic = endpoint, replay, topic
        self._sink = sink
        self._reader = Reader(rank)
        self._order = Sequencer()

    async def run(self) -> None:
        """Follow until cancelled."""
        import zmq  # noqa: PLC0415  part of vLLM's environment, not of ours
        import zmq.asyncio  # noqa: PLC0415

        context: Any = zmq.asyncio.Context()
        socket = context.socket(zmq.SUB)
        socket.setsockopt(zmq.RCVHWM, 0)
        try:
            socket.connect(self._endpoint)
            socket.setsockopt(zmq.SUBSCRIBE, self._topic.encode())
            await self._catch_up(context)  # what was said before we listened
            while True:
                frames = await socket.recv_multipart()
                await self._heard(context, frames)
        finally:
            socket.close(linger=0)
            context.destroy(linger=0)

    async def _heard(self, context: Any, frames: Sequence[bytes]) -> None:
        _, number, payload = frames[-3:]
        at = int.from_bytes(number, "big")
        verdict = self._order.judge(at)
        if verdict == "gap":
            self.gaps += 1
            await self._catch_up(context)
            verdict = self._order.judge(at)
            if verdict == "gap":
                self._lost(at)
        if self._order.judge(at) == "due":
            self._accept(at, payload)

    async def _catch_up(self, context: Any) -> None:
        """Ask for everything from the number that is due; what comes in order is taken."""
        import zmq  # noqa: PLC0415

        socket = context.socket(zmq.DEALER)
        try:
            socket.connect(self._replay)
            await socket.send_multipart([b"", self._order.next.to_bytes(8, "big")])
            async with asyncio.timeout(REPLAY_SECONDS):
                while True:
                    frames = await socket.recv_multipart()
                    at = int.from_bytes(frames[-2], "big")
                    if at == _END_OF_REPLAY:
                        return
                    if self._order.judge(at) == "gap":
                        self._lost(at)
                    if self._order.judge(at) == "due":
                        self._accept(at, frames[-1])
        except TimeoutError:
            log.warning("vLLM did not replay its KV events of rank %d within %g s", self.rank, REPLAY_SECONDS)
        finally:
            socket.close(linger=0)

    def _lost(self, at: int) -> None:
        """What is between is gone for good: forget what was known, and go on from here."""
        log.warning(
            "KV events %d to %d of rank %d are lost: the rank is taken for empty", self._order.next, at - 1, self.rank
        )
        self.losses += 1
        self._order.next = at
        self._sink([AllBlocksCleared(dp_rank=self.rank)])

    def _accept(self, at: int, payload: bytes) -> None:
        self._order.next = at + 1
        try:
            batch = msgspec.msgpack.decode(payload)
            events = self._reader.read(batch[1])
        except (msgspec.DecodeError, IndexError, TypeError) as error:
            log.warning("message %d of vLLM's KV events cannot be read: %s", at, error)
            return
        if events:
            self._sink(events)
