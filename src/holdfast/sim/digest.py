"""The hash of everything that happened in a universe: equal when it is replayed.

Must be fed only with what follows from the tape: no addresses, no real times, no text of exceptions.
"""

from __future__ import annotations

import hashlib
from array import array

FLUSH_AT = 8_192
"""Numbers that are kept before they are hashed."""


class Digest:
    """See the module."""

    __slots__ = ("_hasher", "_numbers")

    def __init__(self) -> None:
        self._hasher = hashlib.blake2b(digest_size=16)
        self._numbers: array[float] = array("d")

    def turn(self, now: float, who: int, callbacks: int) -> None:
        """A lane has run so many callbacks."""
        numbers = self._numbers
        numbers.append(now)
        numbers.append(who * 1048576.0 + callbacks)
        if len(numbers) >= FLUSH_AT:
            self._flush()

    def number(self, value: float) -> None:
        """Take in a number; cheaper than `data`."""
        self._numbers.append(value)

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
