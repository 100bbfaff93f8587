"""What is read off the frontend about its own standing: its queue, budgets, doubts, connections, and whom it refuses.

Called by `gauges` before every scrape. Must never be called on the token path.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import TYPE_CHECKING

from holdfast.base.errors import HoldfastError, SecretMismatch, VersionMismatch
from holdfast.models.card import AGREED_FIELDS
from holdfast.models.pairing import PAIRED_FIELDS
from holdfast.runtime.pool import Worker
from holdfast.telemetry.metric import LABEL_VALUES

if TYPE_CHECKING:
    from holdfast.frontend.app import Frontend

_FIELDS = (*AGREED_FIELDS, *PAIRED_FIELDS, "version", "secret")
_SLOT_STATES = ("gave-up", "restarting", "running")
"""Worst first: when there are too many slots to be shown, those that are well are left out."""


class Standing:
    """Created once per frontend; `refresh` before every scrape."""

    def __init__(self, frontend: Frontend):
        self._frontend = frontend
        r = frontend.metrics.source
        ours = "holdfast_frontend_"
        self._pending = r.gauge("dynamo_frontend_router_queue_pending_requests").labels("aggregated")
        self._queued = r.gauge(f"{ours}queue_streams")
        self._queue_limit = r.gauge(f"{ours}queue_limit").labels()
        self._draining = r.gauge(f"{ours}draining").labels()
        self._connections = r.gauge(f"{ours}connections").labels()
        self._connections_limit = r.gauge(f"{ours}connections_limit").labels()
        self._budget = r.gauge(f"{ours}retry_budget_left").labels()
        self._paced = r.gauge(f"{ours}paced_moves").labels()
        self._doubt = r.gauge(f"{ours}self_doubt").labels()
        self._discarded = r.counter(f"{ours}discarded_intervals_total").labels()
        self._refused = r.gauge(f"{ours}workers_refused")
        self._slots = r.gauge(f"{ours}supervisor_slot_state")
        frontend.services.placement.line.on_waited = frontend.metrics.waited

    def refresh(self) -> None:
        """Read everything."""
        frontend, pool = self._frontend, self._frontend.pool
        services, line = frontend.services, frontend.services.placement.line
        self._pending.set(services.leases.held("queued"))
        self._queue_limit.set(line.limit)
        self._queued.clear()
        for model in {*frontend.registry.served(), *line.models()}:
            self._queued.labels(frontend.metrics.label(model)).set(line.waiting(model))
        self._draining.set(frontend.draining)
        self._connections.set(frontend.connections())
        self._connections_limit.set(frontend.config.http_max_connections)
        self._budget.set(services.budget.left(asyncio.get_running_loop().time()))
        self._paced.set(services.pacer.waiting)
        self._doubt.set(pool.doubts_itself)
        self._discarded.set(pool.discarded_intervals)
        refused = Counter(filter(None, map(refused_for, pool.all_workers())))
        for field in _FIELDS:
            self._refused.labels(field).set(refused[field])
        self._show_slots()

    def _show_slots(self) -> None:
        self._slots.clear()
        found = [
            (_SLOT_STATES.index(state), supervisor, slot)
            for supervisor, slots in self._frontend.pool.supervised.items()
            for slot, state in slots.items()
            if state in _SLOT_STATES
        ]
        for rank, supervisor, slot in sorted(found)[:LABEL_VALUES]:
            for index, state in enumerate(_SLOT_STATES):
                self._slots.labels(supervisor, slot, state).set(index == rank)


def refused_for(worker: Worker) -> str:
    """Return the field for which a worker that is there is not used; empty: none, or it may be used."""
    if worker.refused_for:
        return worker.refused_for
    error: HoldfastError | None = worker.last_error if worker.link is None else None
    if isinstance(error, VersionMismatch):
        return "version"
    return "secret" if isinstance(error, SecretMismatch) else ""
