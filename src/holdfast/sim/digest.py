"""The hash of everything that happened in a universe: equal when it is replayed.

Must be fed only with what follows from the tape: no addresses, no real times, no text of exceptions.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Callable

FLUSH_AT = 8_192
"""Numbers that are kept before they are hashed."""
TURN = 1048576.0
"""A lane's turn is one number: the lane's, times this, plus callbacks."""


class Digest:
    """See the module."""

    __slots__ = ("_hasher", "_numbers", "number")

    def __init__(self) -> None:
        self._hasher = hashlib.blake2b(digest_size=16)
        self._numbers: array[float] = array("d")
        self.number: Callable[[float], None] = self._numbers.append
        """Take in a number; cheaper than `data`."""

    def time(self, now: float) -> None:
        """The clock has moved: what comes happens then."""
        self.number(now)
        if len(self._numbers) >= FLUSH_AT:
            self._flush()

    def data(self, data: bytes) -> None:
        """Take in bytes."""
        self._flush()
        self._hasher.update(data)

    def value(self, *counters: int) -> str:
        """Return the hash so far, together with these numbers."""
        self._flush()
        hasher = self._hasher.copy()
        hasher.update(array("d", counters))
        return hasher.hexdigest()

    def _flush(self) -> None:
        self._hasher.update(self._numbers)
        del self._numbers[:]
