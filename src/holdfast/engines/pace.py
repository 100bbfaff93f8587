"""How long an engine may be silent while it computes prompts, learnt from how long it took so far.

An engine says nothing until a prompt is computed, and a hang looks the same. What tells them apart is what this engine
on this machine normally needs: a pace slower than known is taken over at once, a faster one step by step, so
that a machine that has become busy is not taken for one that hangs. `EngineProgress.silent_step_seconds` says it.

Must never know a clock or an engine.
"""

from __future__ import annotations

FIRST_PACE = 0.005
"""Seconds per prompt token that are expected until something is known: a busy CPU. A GPU needs a hundredth."""
LEAST_TOKENS = 32
"""Shorter prompts say more about the way there than about computing."""
_WEIGHT = 0.3
"""Of a measurement that was faster than known."""


class PrefillPace:
    """Of one engine."""

    __slots__ = ("seconds_per_token",)

    def __init__(self) -> None:
        self.seconds_per_token = FIRST_PACE

    def came(self, tokens: int, seconds: float) -> None:
        """A prompt is computed.

        Args:
            tokens: of all prompts that were in hand when it came, its own included.
            seconds: from then until its first token.
        """
        if tokens < LEAST_TOKENS:
            return
        measured = seconds / tokens
        known = self.seconds_per_token
        self.seconds_per_token = measured if measured > known else known + _WEIGHT * (measured - known)

    def expected(self, tokens: int) -> float:
        """Return the seconds that so many prompt tokens are expected to take."""
        return self.seconds_per_token * tokens
