"""What is read off the router's knowledge of KV caches when somebody scrapes. Must never change it."""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import get_args

from holdfast.kv.feed import ENDPOINT
from holdfast.kv.index import CLEARED, REMOVED, STORED
from holdfast.routing.knowledge import REASONS, KnowledgeState, PrefixKnowledge
from holdfast.runtime.pool import WorkerPool
from holdfast.telemetry.metric import Registry
from holdfast.telemetry.series import Cell

_EVENTS = {STORED: "stored", REMOVED: "removed", CLEARED: "cleared"}


class KvGauges:
    """Of one frontend.

    Args:
        source: where they are shown.
        knowledge: read at every `refresh`.
        pool: the workers.
    """

    def __init__(self, source: Registry, knowledge: PrefixKnowledge, pool: WorkerPool):
        self._knowledge, self._pool = knowledge, pool
        ours = "holdfast_frontend_kv_"
        self._applied = source.gauge("dynamo_component_kv_cache_events_applied")
        self._registered = source.gauge("dynamo_component_router_worker_registered")
        self._mismatch = source.gauge("dynamo_component_router_kv_event_source_mismatch_workers").labels()
        self._workers = source.gauge(f"{ours}workers")
        resynchronised = source.counter(f"{ours}resynchronisations_total")
        self._resynchronised = {reason: resynchronised.labels(reason) for reason in REASONS}
        self._repeated = source.counter(f"{ours}repeated_batches_total").labels()
        self._blocks = source.gauge(f"{ours}blocks").labels()
        self._bytes = source.gauge(f"{ours}index_bytes").labels()
        self._remembered = source.gauge(f"{ours}remembered_hashes").labels()
        self._held = source.gauge(f"{ours}worker_blocks")
        self._silence = source.gauge(f"{ours}silence_seconds")
        self._told: Counter[str] = Counter()

    def refresh(self) -> None:
        """Read everything."""
        tally = self._knowledge.tally
        for operation, name in _EVENTS.items():
            self._applied.labels(name, "ok").set(tally.applied[operation])
        self._applied.labels("stored", "invalid_block").set(tally.rejected)
        for reason, counter in self._resynchronised.items():
            self._count(counter, reason, tally.resynchronisations[reason])
        self._count(self._repeated, "repeated", tally.repeated)
        self._blocks.set(self._knowledge.blocks)
        self._bytes.set(self._knowledge.bytes_used)
        self._remembered.set(self._knowledge.remembered)
        self._each_worker()

    def _count(self, counter: Cell, key: str, total: int) -> None:
        counter.inc(total - self._told[key])
        self._told[key] = total

    def _each_worker(self) -> None:
        now = asyncio.get_running_loop().time()
        states: Counter[KnowledgeState] = Counter()
        for series in (self._registered, self._held, self._silence):
            series.clear()
        workers = [worker for worker in self._pool.all_workers() if worker.record.cards]  # routers have no cache
        for worker in workers:
            states[self._knowledge.state_of(worker.instance)] += 1
        for known in self._knowledge.all_known():
            self._registered.labels(known.instance).set(1)
            self._held.labels(known.instance).set(known.blocks)
            if known.heard_at:
                self._silence.labels(known.instance).set(now - known.heard_at)
        for state in get_args(KnowledgeState):
            self._workers.labels(state).set(states[state])
        silent = sum(ENDPOINT not in worker.record.endpoints for worker in workers)
        self._mismatch.set(silent if self._knowledge.settings.use_kv_events else 0)
