"""How long an engine may be silent while it computes prompts, learnt from its silences so far.

An engine says nothing until a prompt is computed, and a hang looks the same. What tells them apart is what this engine
on this machine normally needs: a pace slower than known is taken over at once, a faster one step by step, so that a
machine that has become busy is not taken for one that hangs. Only silence counts: a prompt that waits for its turn
while other sequences get their tokens says nothing about it. `EngineProgress.silent_step_seconds` tells callers.

Must never know a clock or an engine.
"""

from __future__ import annotations

FIRST_PACE = 0.02
"""Seconds per prompt token that are expected until the first prompt has come: a very busy CPU."""
LEAST_TOKENS = 32
"""Shorter prompts say more about the way there than about computing."""
_WEIGHT = 0.3
"""Of a measurement that was faster than known."""


class PrefillPace:
    """Of one engine."""

    __slots__ = ("_known",)

    def __init__(self) -> None:
        self._known: float | None = None

    def came(self, tokens: int, seconds: float) -> None:
        """A silence is over because a prompt is computed.

        Args:
            tokens: of all prompts that were not computed during it.
            seconds: that it took.
        """
        if tokens < LEAST_TOKENS:
            return
        measured, known = seconds / tokens, self._known
        if known is None or measured > known:
            self._known = measured
        else:
            self._known = known + _WEIGHT * (measured - known)

    def expected(self, tokens: int) -> float:
        """Return the seconds that so many prompt tokens are expected to take."""
        return tokens * (FIRST_PACE if self._known is None else self._known)
