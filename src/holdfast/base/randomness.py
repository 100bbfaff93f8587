"""The system's randomness in blocks: as unpredictable as `random.SystemRandom`, at a fraction of its system calls.

Must never be used by two processes: what one has in store the other would draw as well after a fork.
"""

from __future__ import annotations

import random

BLOCK_BYTES = 4096


class BlockRandom(random.SystemRandom):
    """Reads the system's generator a block at a time; every byte is used once, and forgotten."""

    def __init__(self) -> None:
        super().__init__()
        self._block = b""
        self._at = 0

    def getrandbits(self, k: int) -> int:
        """Return an integer of ``k`` random bits. Raises ValueError for a negative number of bits."""
        size = (k + 7) >> 3
        end = self._at + size
        if end > len(self._block) or k <= 0:
            if not 0 < size <= BLOCK_BYTES:
                return super().getrandbits(k)
            self._block = super().randbytes(BLOCK_BYTES)
            end = size
        taken = self._block[end - size : end]
        self._at = end
        return int.from_bytes(taken, "big") >> (size * 8 - k)
