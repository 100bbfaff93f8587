"""What vLLM's scheduler says after each step: how full it is, per data-parallel rank, and that it moves.

Must never import vLLM at module level: `logger_class` makes the class that vLLM wants when it is there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from holdfast.engines.contract import EngineLoad


class Statistics:
    """The last statistics of each rank.

    Args:
        on_step: called once per engine step of any rank.
    """

    def __init__(self, on_step: Callable[[], None]):
        self._on_step = on_step
        self._ranks: dict[int, tuple[int, int, float]] = {}
        self.cached = self.queried = 0
        """Prompt tokens found in the prefix cache, of all that were looked up."""

    def record(self, scheduler_stats: Any, rank: int) -> None:
        """Take over what one step of a rank says."""
        self._on_step()
        if scheduler_stats is None:
            return
        waiting = scheduler_stats.num_waiting_reqs + getattr(scheduler_stats, "num_skipped_waiting_reqs", 0)
        self._ranks[rank] = (scheduler_stats.num_running_reqs, waiting, scheduler_stats.kv_cache_usage)
        prefix = scheduler_stats.prefix_cache_stats
        if prefix is not None:
            self.cached += prefix.hits
            self.queried += prefix.queries

    def load(self, *, ranks: int, blocks: int, live: int, prefill_tokens: int) -> EngineLoad:
        """Return the load.

        Args:
            ranks: how many there are.
            blocks: KV blocks of one rank.
            live: sequences in hand; what is said beyond them is old: an engine without work says nothing new.
            prefill_tokens: prompt tokens of those that have not begun.
        """
        each = tuple(self._one(rank, blocks, live) for rank in range(ranks))
        if ranks == 1:
            one = each[0]
            waiting = max(one.waiting, live - one.running)
            return EngineLoad(one.running, waiting, one.kv_used_blocks, blocks, prefill_tokens)
        running = sum(one.running for one in each)
        return EngineLoad(
            running,
            max(live - running, 0),
            sum(one.kv_used_blocks for one in each),
            blocks * ranks,
            prefill_tokens,
            each,
        )

    def _one(self, rank: int, blocks: int, live: int) -> EngineLoad:
        running, waiting, usage = self._ranks.get(rank, (0, 0, 0.0))
        if not live:
            return EngineLoad(kv_total_blocks=blocks)
        return EngineLoad(min(running, live), min(waiting, live), round(usage * blocks), blocks)


def logger_class(statistics: Statistics) -> Any:
    """Return a stat logger for ``AsyncLLM``; its base is not a stable interface of vLLM, so little of it is used."""
    from vllm.v1.metrics.loggers import StatLoggerBase  # noqa: PLC0415

    class Logger(StatLoggerBase):  # type: ignore[misc]
        """Passes on what one rank says."""

        def __init__(self, vllm_config: Any, engine_index: int = 0):  # noqa: ARG002
            self._index = engine_index

        def record(self, scheduler_stats: Any, iteration_stats: Any, *_: Any, **more: Any) -> None:  # noqa: ARG002
            """Called by vLLM on the event loop after each step."""
            statistics.record(scheduler_stats, more.get("engine_idx", self._index))

        def log_engine_initialized(self) -> None:
            """Nothing is to be said."""

    return Logger
