"""What a router process counts and shows. Must never decide anything, and never raise into what it counts."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, get_args

from holdfast.base.errors import HoldfastError
from holdfast.requests.plan import Ending
from holdfast.routing.knowledge import REASONS, KnowledgeState, PrefixKnowledge
from holdfast.runtime.member import WorkerState
from holdfast.runtime.pool import WorkerPool
from holdfast.telemetry.metric import Registry
from holdfast.telemetry.series import Cell

if TYPE_CHECKING:
    from holdfast.requests.generation import Generation
    from holdfast.routerd.chooser import Chooser
    from holdfast.routerd.relay import Relay

_OURS = "holdfast_router_"


class RouterObserver:
    """Counts what becomes of the streams through this router (a `service.Observer`)."""

    def __init__(self, registry: Registry):
        self._streams = registry.counter(f"{_OURS}streams_total")
        self._tokens = registry.counter(f"{_OURS}tokens_total").labels()
        moves = registry.counter(f"{_OURS}migrations_total")
        self._started, self._resumed = moves.labels("started"), moves.labels("resumed")

    def attempt_started(self, generation: Generation) -> None:
        """Nothing is counted."""

    def attempt_sent(self, seconds: float) -> None:
        """Nothing is counted."""

    def accepted(self, generation: Generation, first: bool) -> None:
        """Nothing is counted."""

    def first_token(self, generation: Generation) -> None:
        """Nothing is counted."""

    def progressed(self, generation: Generation) -> None:
        """Nothing is counted before the end."""

    def prefill_started(self, generation: Generation, *facts: object) -> None:
        """Nothing is counted."""

    def prefill_decided(self, generation: Generation, *facts: object) -> None:
        """Nothing is counted."""

    def prefill_ended(self, generation: Generation, *facts: object) -> None:
        """Nothing is counted."""

    def migration_started(self, generation: Generation, error: HoldfastError) -> None:  # noqa: ARG002
        """An attempt failed and another one will be made."""
        self._started.inc()

    def migrated(self, generation: Generation, gap_seconds: float) -> None:  # noqa: ARG002
        """The first new token after a move."""
        self._resumed.inc()

    def ended(self, generation: Generation, ending: Ending) -> None:  # noqa: ARG002
        """The terminal event."""
        self._streams.labels(ending.state).inc()
        self._tokens.inc(ending.completion_tokens)


class RouterGauges:
    """What is read off the router's state when somebody scrapes.

    Args:
        registry: where it is shown.
        pool: the workers.
        knowledge: of their caches.
        chooser: holds leases.
        relay: holds streams.
    """

    def __init__(
        self, registry: Registry, pool: WorkerPool, knowledge: PrefixKnowledge, chooser: Chooser, relay: Relay
    ):
        self._pool, self._knowledge, self._chooser, self._relay = pool, knowledge, chooser, relay
        self.questions = registry.counter(f"{_OURS}questions_total")
        self.answer_seconds = registry.histogram(f"{_OURS}answer_seconds").labels()
        self._active = registry.gauge(f"{_OURS}active_streams").labels()
        self._leases = registry.gauge(f"{_OURS}leases").labels()
        self._expired = registry.counter(f"{_OURS}leases_expired_total").labels()
        self._workers = registry.gauge(f"{_OURS}workers")
        self._known = registry.gauge(f"{_OURS}kv_workers")
        self._blocks = registry.gauge(f"{_OURS}kv_blocks").labels()
        fetched = registry.counter(f"{_OURS}kv_resynchronisations_total")
        self._fetched = {reason: fetched.labels(reason) for reason in REASONS}
        self._told: Counter[str] = Counter()
        registry.watch_process()

    def refresh(self) -> None:
        """Read everything."""
        self._active.set(self._relay.in_flight)
        self._leases.set(len(self._chooser.reservations))
        self._count(self._expired, "expired", self._chooser.reservations.expired)
        self._blocks.set(self._knowledge.blocks)
        for reason, cell in self._fetched.items():
            self._count(cell, reason, self._knowledge.tally.resynchronisations[reason])
        workers = [worker for worker in self._pool.all_workers() if worker.record.cards]
        states = Counter(worker.state for worker in workers)
        known = Counter(self._knowledge.state_of(worker.instance) for worker in workers)
        for state in get_args(WorkerState):
            self._workers.labels(state).set(states[state])
        for knowledge in get_args(KnowledgeState):
            self._known.labels(knowledge).set(known[knowledge])

    def _count(self, cell: Cell, key: str, total: int) -> None:
        cell.inc(total - self._told[key])
        self._told[key] = total
