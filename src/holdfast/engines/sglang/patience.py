"""How long a decode leg may wait for KV blocks.

SGLang's decode half waits five minutes, in silence, for a prefill leg that will never come. How late is too late
depends on what is to be computed: prompts of all legs in hand, at the pace at which they have come so far, and a fixed
allowance on top.

Must never know a clock.
"""

from __future__ import annotations

FIRST_PACE = 0.004
"""Seconds per prompt token that are granted until something is known."""
_MARGIN = 4.0
_WEIGHT = 0.2


class Patience:
    """Learns the pace of transfers.

    Args:
        allowance: seconds that are granted beside what the tokens let expect.
    """

    def __init__(self, allowance: float):
        self._allowance = allowance
        self._pace = FIRST_PACE / _MARGIN

    def bound(self, tokens: int) -> float:
        """Return the seconds after which blocks are given up.

        Args:
            tokens: of all legs that wait, this one included: their prompts are computed one after the other.
        """
        return self._allowance + _MARGIN * self._pace * tokens

    def came(self, tokens: int, seconds: float) -> None:
        """Blocks have come.

        Args:
            tokens: as `bound` was asked for them.
            seconds: that it took.
        """
        if tokens > 0:
            self._pace += _WEIGHT * (seconds / tokens - self._pace)
