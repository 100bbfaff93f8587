"""What is read off the log of KV events when somebody scrapes. Must never change it."""

from __future__ import annotations

from holdfast.telemetry.series import Cell
from holdfast.worker.calls import Calls
from holdfast.worker.kv_publish import KvPublisher


class KvGauges:
    """Of one worker.

    Args:
        calls: whose registry it is.
        kv: read at every `refresh`.
    """

    def __init__(self, calls: Calls, kv: KvPublisher):
        self._kv, self._where = kv, calls.hosted
        r, where = calls.registry, calls.hosted
        self._events = r.counter("holdfast_worker_kv_events_total")
        self._blocks = r.gauge("holdfast_worker_kv_cached_blocks").labels(*where)
        self._batches = r.counter("holdfast_worker_kv_event_batches_total").labels(*where)
        self._subscribers = r.gauge("holdfast_worker_kv_event_subscribers").labels(*where)
        self._overruns = r.counter("holdfast_worker_kv_event_overruns_total").labels(*where)
        self._resends = r.counter("holdfast_worker_kv_event_resends_total").labels(*where)
        self._told: dict[object, int] = {}

    def refresh(self) -> None:
        """Read everything."""
        kv = self._kv
        self._subscribers.set(kv.subscribers)
        self._count(self._overruns, "overruns", kv.overruns)
        self._count(self._resends, "resends", kv.resends)
        if kv.log is None:
            return
        self._blocks.set(kv.log.blocks)
        self._count(self._batches, "batches", kv.log.sequence)
        for (kind, status), count in kv.log.outcomes.items():
            self._count(self._events.labels(*self._where, kind, status), (kind, status), count)

    def _count(self, counter: Cell, key: object, total: int) -> None:
        counter.inc(total - self._told.get(key, 0))
        self._told[key] = total
