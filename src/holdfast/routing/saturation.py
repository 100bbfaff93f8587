"""When a worker is saturated: three thresholds over what it has in hand, per data-parallel rank.

The rule is the one of the reference (fault tolerance, 1.3): strictly greater, any of the configured checks, and a
worker is saturated only when all of its ranks are; a rank of which nothing is known counts as free. Blocks count
when they are in use or promised to prompts in hand, so that a burst shows before the engine has begun with it.

Must never do I/O, wait, or know a request.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import msgspec

ThresholdName = Literal[
    "active_decode_blocks_threshold", "active_prefill_tokens_threshold", "active_prefill_tokens_threshold_frac"
]
THRESHOLD_NAMES: tuple[ThresholdName, ...] = (
    "active_decode_blocks_threshold",
    "active_prefill_tokens_threshold",
    "active_prefill_tokens_threshold_frac",
)
ASSUMED_BATCHED_TOKENS = 10_000_000
"""``max_num_batched_tokens`` of a card that names none: the fraction then practically never rejects."""


class Thresholds(msgspec.Struct, frozen=True):
    """Of one model; None: not checked."""

    active_decode_blocks_threshold: float | None = None
    """Fraction of the KV blocks, 0 to 1."""
    active_prefill_tokens_threshold: int | None = None
    """Prompt tokens in hand that are not computed."""
    active_prefill_tokens_threshold_frac: float | None = None
    """The same, as a multiple of ``max_num_batched_tokens``."""

    @property
    def any(self) -> bool:
        """Whether anything is checked at all."""
        return not (
            self.active_decode_blocks_threshold is None
            and self.active_prefill_tokens_threshold is None
            and self.active_prefill_tokens_threshold_frac is None
        )


NO_THRESHOLDS = Thresholds()


class RankLoad(msgspec.Struct, frozen=True):
    """What one rank has in hand. Blocks are the engine's KV blocks, tokens prompt tokens."""

    active_blocks: int = 0
    """In use, or promised to prompts that it has taken or been sent."""
    total_blocks: int = 0
    """0: unknown, so that the fraction of blocks cannot be checked."""
    prefill_tokens: int = 0


class Excess(msgspec.Struct, frozen=True):
    """Which threshold was exceeded, in the unit of its setting."""

    name: ThresholdName
    threshold: float
    measured: float

    @property
    def knob(self) -> str:
        """The setting's environment variable."""
        return f"DYN_{self.name.upper()}"

    @property
    def ratio(self) -> float:
        """How far it is over, as a factor; infinite over a threshold of 0."""
        return self.measured / self.threshold if self.threshold else float("inf")


def rank_excess(thresholds: Thresholds, load: RankLoad | None, max_batched_tokens: int) -> Excess | None:
    """Return the threshold that a rank exceeds furthest, or None when it is free.

    Args:
        thresholds: of the model.
        load: of the rank; None: not observed, hence free.
        max_batched_tokens: of the model's card; 0: `ASSUMED_BATCHED_TOKENS`.
    """
    if load is None:
        return None
    worst: Excess | None = None
    for excess in _checks(thresholds, load, max_batched_tokens or ASSUMED_BATCHED_TOKENS):
        if excess.measured > excess.threshold and (worst is None or excess.ratio > worst.ratio):
            worst = excess
    return worst


def _checks(thresholds: Thresholds, load: RankLoad, batched: int) -> list[Excess]:
    blocks, tokens, fraction = (getattr(thresholds, name) for name in THRESHOLD_NAMES)
    checks = []
    if blocks is not None and load.total_blocks > 0:
        checks.append(Excess(THRESHOLD_NAMES[0], blocks, load.active_blocks / load.total_blocks))
    if tokens is not None:
        checks.append(Excess(THRESHOLD_NAMES[1], tokens, load.prefill_tokens))
    if fraction is not None:
        checks.append(Excess(THRESHOLD_NAMES[2], fraction, load.prefill_tokens / batched))
    return checks


def worker_excess(thresholds: Thresholds, ranks: Sequence[RankLoad | None], max_batched_tokens: int) -> Excess | None:
    """Return what makes a worker saturated, or None when one of its ranks is free.

    Args:
        thresholds: of the model.
        ranks: one entry per declared rank, None where nothing is known; none declared: not saturated.
        max_batched_tokens: of the model's card.

    Returns:
        The excess of the rank that is nearest to being free.
    """
    if not thresholds.any:
        return None
    nearest: Excess | None = None
    for load in ranks:
        excess = rank_excess(thresholds, load, max_batched_tokens)
        if excess is None:
            return None
        if nearest is None or excess.ratio < nearest.ratio:
            nearest = excess
    return nearest
