"""Names for the numbers and strings that identify things, so that the type checker keeps them apart.

Must never hold behaviour beyond drawing and formatting an id.
"""

import random
from typing import NewType

RequestId = NewType("RequestId", str)
"""Ours, never the client's: 32 lower-case hex digits."""

StreamId = NewType("StreamId", int)
"""A stream on one wire connection; never reused on that connection."""

InstanceId = NewType("InstanceId", str)
"""One worker process slot: 16 lower-case hex digits; stays the same over a restart of the slot."""

Epoch = NewType("Epoch", int)
"""64 random bits drawn on every process start, compared for equality only."""

SequenceKey = NewType("SequenceKey", int)
"""A sequence inside one engine; never reused while the engine lives."""


def draw_request_id(rng: random.Random) -> RequestId:
    """Return a fresh request id (128 random bits as hex)."""
    return RequestId(f"{rng.getrandbits(128):032x}")


def draw_instance_id(rng: random.Random) -> InstanceId:
    """Return a fresh instance id (64 random bits as hex)."""
    return InstanceId(f"{rng.getrandbits(64):016x}")


def draw_epoch(rng: random.Random) -> Epoch:
    """Return a fresh epoch (64 random bits)."""
    return Epoch(rng.getrandbits(64))
