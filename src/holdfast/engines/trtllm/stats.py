"""From TensorRT-LLM's iteration statistics to load numbers.

They come once per engine step and stop coming when nothing runs, so the last ones are only believed while this worker
has something in hand. Must never know the engine.
"""

from __future__ import annotations

from typing import Any

import msgspec

from holdfast.engines.contract import EngineLoad


class RankStats(msgspec.Struct, frozen=True):
    """What one rank said last."""

    running: int = 0
    waiting: int = 0
    used_blocks: int = 0
    total_blocks: int = 0


def read_stats(stats: dict[str, Any]) -> tuple[int, RankStats]:
    """Return the rank and what it says; missing numbers are 0."""
    cache = stats.get("kvCacheStats") or {}
    return int(stats.get("attentionDpRank") or 0), RankStats(
        running=int(stats.get("numActiveRequests") or 0),
        waiting=int(stats.get("numQueuedRequests") or 0),
        used_blocks=int(cache.get("usedNumBlocks") or 0),
        total_blocks=int(cache.get("maxNumBlocks") or 0),
    )


def load_of(ranks: dict[int, RankStats], *, in_hand: int, begun: int, size: int, pending: int) -> EngineLoad:
    """Return the load.

    Args:
        ranks: what each said last.
        in_hand: sequences that this worker has given to the engine.
        begun: those among them that have said something.
        size: data-parallel ranks.
        pending: prompt tokens of the others.
    """
    total = sum(rank.total_blocks for rank in ranks.values())
    if not in_hand:
        each = tuple(EngineLoad(kv_total_blocks=ranks[n].total_blocks if n in ranks else 0) for n in range(size))
        return EngineLoad(kv_total_blocks=total, ranks=each if size > 1 else ())
    running = min(in_hand, max(begun, sum(rank.running for rank in ranks.values())))
    parts = tuple(_of_rank(ranks.get(number, RankStats())) for number in range(size)) if size > 1 else ()
    return EngineLoad(
        running=running,
        waiting=in_hand - running,
        kv_used_blocks=sum(rank.used_blocks for rank in ranks.values()),
        kv_total_blocks=total,
        prefill_tokens=pending,
        ranks=parts,
    )


def _of_rank(rank: RankStats) -> EngineLoad:
    return EngineLoad(
        running=rank.running,
        waiting=rank.waiting,
        kv_used_blocks=rank.used_blocks,
        kv_total_blocks=rank.total_blocks,
    )
