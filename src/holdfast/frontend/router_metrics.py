"""Counts the router's choices by KV caches. Must never decide anything."""

from __future__ import annotations

from collections.abc import Callable

from holdfast.routing.kv import Decision
from holdfast.telemetry.metric import Registry

_TO_MS = 1e-6


class RouterMetrics:
    """Of one frontend.

    Args:
        source: where they are shown.
        label: makes a label of a model's name.
    """

    def __init__(self, source: Registry, label: Callable[[str], str]):
        self._label = label
        router, overhead = "dynamo_component_router_", "dynamo_router_overhead_"
        self._requests = source.counter(f"{router}requests_total")
        self._hit_rate = source.histogram(f"{router}kv_hit_rate")
        self._best = source.counter(f"{router}kv_best_eligible_cached_prefix_tokens_total")
        self._selected = source.counter(f"{router}kv_selected_cached_prefix_tokens_total")
        self._lesser = source.counter(f"{router}non_max_overlap_selections_total")
        self._lost = source.histogram(f"{router}overlap_blocks_lost")
        self._hashing = source.histogram(f"{overhead}block_hashing_ms").labels()
        self._lookup = source.histogram(f"{overhead}indexer_find_matches_ms").labels()
        self._weighing = source.histogram(f"{overhead}scheduling_ms").labels()
        self._total = source.histogram(f"{overhead}total_ms").labels()

    def decided(self, model: str, decision: Decision, hashing_ns: int) -> None:
        """Count one choice; ``hashing_ns``: what it took to name its blocks."""
        label = self._label(model)
        self._requests.labels(label).inc()
        self._hit_rate.labels(label).observe(decision.overlap / max(1, decision.blocks))
        self._best.labels(label).inc(decision.best * decision.block_size)
        self._selected.labels(label).inc(decision.overlap * decision.block_size)
        if decision.best > decision.overlap:
            self._lesser.labels(label).inc()
        self._lost.labels(label).observe(decision.best - decision.overlap)
        self._hashing.observe(hashing_ns * _TO_MS)
        self._lookup.observe(decision.lookup_ns * _TO_MS)
        self._weighing.observe((decision.total_ns - decision.lookup_ns) * _TO_MS)
        self._total.observe((decision.total_ns + hashing_ns) * _TO_MS)
