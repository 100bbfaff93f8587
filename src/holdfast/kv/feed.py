"""What a worker tells a frontend about its blocks: the messages of the endpoint ``kv_events``, version 1.

The frontend opens a stream with `Subscribe`. The worker answers with `Opening`; when that announces a snapshot, `Part`s
and one `Complete` follow; then `Deltas` for ever, with a `Beat` about once a second. Whenever the worker cannot
provide a batch any more because the frontend took too long, another `Opening` with a snapshot follows; so it does in
place of `Complete` when a snapshot came to nothing, because the cache was cleared while it was on its way.

Batches are numbered from 1 within an epoch, without gaps; a message may hold several. All blocks are distinct: a block
is stored once and removed once in each tier of a rank, however many copies the engine keeps. Numbers in ``bytes``
are u64, little-endian. Must never hold state.
"""

from __future__ import annotations

import sys
from array import array
from typing import TypeAlias

import msgspec

from holdfast.kv.index import Buffer

ENDPOINT = "kv_events"
VERSION = 1
MESSAGE_NUMBERS = 6_000
"""Most numbers in one message (48,000 bytes), so that it fits one frame."""
PART_HASHES = 5_000
"""Most hashes in one piece of a snapshot, and in one event."""


class Subscribe(msgspec.Struct, array_like=True, frozen=True):
    """Tell me what changes from here on. ``epoch`` 0: I know nothing."""

    version: int = VERSION
    epoch: int = 0
    sequence: int = 0
    """The last batch that the subscriber has."""


class Opening(msgspec.Struct, tag=1, array_like=True, frozen=True):
    """What follows begins after this batch; with ``snapshot`` everything held at that moment comes first."""

    epoch: int
    sequence: int
    snapshot: bool
    blocks: int = 0
    """In the snapshot."""


class Part(msgspec.Struct, tag=2, array_like=True, frozen=True):
    """A piece of a snapshot; ``number`` counts from 0."""

    number: int
    rank: int
    tier: int
    hashes: bytes


class Complete(msgspec.Struct, tag=3, array_like=True, frozen=True):
    """The snapshot had so many parts."""

    parts: int


class Deltas(msgspec.Struct, tag=4, array_like=True, frozen=True):
    """Batches ``first`` to ``last``. ``events``: four numbers each: operation, rank, tier, number of hashes."""

    first: int
    last: int
    events: bytes
    hashes: bytes


class Beat(msgspec.Struct, tag=5, array_like=True, frozen=True):
    """The worker's own counts after a batch: (rank, device, host, disk) for each rank."""

    sequence: int
    counts: tuple[tuple[int, int, int, int], ...]


Message: TypeAlias = Opening | Part | Complete | Deltas | Beat
DECODER: msgspec.msgpack.Decoder[Message] = msgspec.msgpack.Decoder(Message)


def to_wire(numbers: array[int]) -> bytes:
    """Return u64 as little-endian bytes."""
    if sys.byteorder == "big":
        numbers = array("Q", numbers)
        numbers.byteswap()
    return numbers.tobytes()


def from_wire(data: bytes) -> Buffer:
    """Return u64 in native order, without copying where that is little-endian."""
    if sys.byteorder == "little":
        return data
    numbers = array("Q", data)
    numbers.byteswap()
    return numbers
