"""Answers of a router: who should get a prompt, who holds how much of it, and leases for those who route by themselves.

The choice is that of `requests.router`, over the same pool, knowledge and ledger through which this process sends its
own streams. A question without a lease changes nothing: the next one gets the same answer.

Must never wait, and never send anything to a worker.
"""

from __future__ import annotations

import asyncio
from array import array
from collections.abc import Sequence

from holdfast.base.errors import ModelNotFound, NoWorkers
from holdfast.requests.fleet import ServingWorker
from holdfast.requests.need import Need
from holdfast.requests.router import Choice, Router
from holdfast.requests.service import Services
from holdfast.routerd.questions import Ask, Best, Overlap, Overlaps, Score, chain_of
from holdfast.routerd.reservations import Reservations
from holdfast.routing.claims import ANY_RANK
from holdfast.routing.knowledge import Overlaps as Found
from holdfast.routing.knowledge import PrefixKnowledge
from holdfast.routing.kv import KvRouter
from holdfast.routing.policy import Policy, RouterMode
from holdfast.routing.route import route_of
from holdfast.runtime.notices import PoolEvent
from holdfast.runtime.pool import Worker, WorkerPool


class _Looking:
    """Knowledge that is asked and told nothing."""

    def __init__(self, knowledge: PrefixKnowledge):
        self._knowledge = knowledge

    def lookup(self, hashes: array[int], block_size: int, now: float, /) -> Found:
        """Return who holds how much."""
        return self._knowledge.lookup(hashes, block_size, now)

    def decided(self, instance: str, rank: int, hashes: array[int], now: float, /) -> None:
        """Nothing was decided."""


class Chooser:
    """See the module.

    Args:
        services: of this process: its admission, ledger, router.
        pool: the workers.
        knowledge: of their caches.
        mode: how a worker is chosen.
        expiry: seconds after which a lease that nobody frees ends.
        name: of this router, for answers.
    """

    def __init__(
        self, services: Services, pool: WorkerPool, knowledge: PrefixKnowledge, mode: RouterMode, *,
        expiry: float, name: str = "",
    ):  # fmt: skip
        self._services, self._pool, self._knowledge = services, pool, knowledge
        self._name = name
        self.reservations = Reservations(expiry)
        settings = services.settings.router
        kv = None
        if services.router.kv is not None:
            kv = KvRouter(
                _Looking(knowledge),
                services.admission.ledger,
                services.rng,
                weights=settings.weights,
                clock=services.flusher.clock,
                track_blocks=settings.router_track_active_blocks,
                track_prefill=settings.router_track_prefill_tokens,
                template_tokens=settings.router_template_tokens,
            )
        self._glance = Router(Policy(mode, services.rng), settings, kv)
        """Decides as the real one does, and remembers nothing that counts."""
        self._unsubscribe = pool.subscribe(self._pool_event)

    def close(self) -> None:
        """Give back everything."""
        self._unsubscribe()
        self.reservations.close()

    def best(self, ask: Ask) -> Best:
        """Return who should get a prompt, and how all candidates were weighed.

        Raises:
            ModelNotFound: nobody serves the model.
            NoWorkers: those that do cannot be used now.
            CapacityExhausted: all of them are over a threshold.
            InvalidRequest, PayloadTooLarge: the question.
        """
        need, block_size = self._need(ask)
        now = asyncio.get_running_loop().time()
        usable = self._pool.usable(ask.model)
        candidates = self._with_room(need, self._services.router.eligible(need, usable, now), now)
        holds = bool(ask.request_id or ask.reserve)
        if holds:
            self.reservations.check_room()
        router = self._services.router if holds else self._glance
        choice = router.choose(need, candidates, frozenset(), now)
        if choice is None:
            raise _nobody(ask.model, len(self._pool.workers(ask.model)))
        if holds:
            claim = router.claim(self._services.admission.ledger, need, choice)
            self.reservations.hold(claim, choice.worker.instance, ask.request_id)
        return self._answer(need, choice, candidates, block_size)

    def overlaps(self, ask: Ask) -> Overlaps:
        """Return who holds how much of a prompt, of all workers of its model. Raises as `best`."""
        need, block_size = self._need(ask)
        hashes = need.chain.of(block_size) if need.chain is not None and block_size else array("Q")
        found = self._knowledge.lookup(hashes, block_size, asyncio.get_running_loop().time())
        workers = {worker.instance: worker for worker in self._pool.workers(ask.model)}
        scores = [Overlap(who, rank, *tiers) for who, rank, *tiers in found if who in workers]
        return Overlaps(
            block_size,
            -(-need.tokens // block_size) if block_size else 0,
            sorted(scores, key=lambda one: (-one.device_blocks, -one.host_blocks, one.worker_id, one.dp_rank)),
            {who: self._knowledge.state_of(who) for who in workers},
        )

    def _need(self, ask: Ask) -> tuple[Need, int]:
        card = next((c for w in self._pool.workers(ask.model) if (c := w.card(ask.model)) is not None), None)
        if card is None:
            raise ModelNotFound(
                f"No worker that this router knows serves {ask.model!r}; there are: "
                f"{', '.join(sorted(self._pool.models())) or 'none'}.",
                param="model",
            )
        need = Need(ask.model, route=route_of(ask.worker_id, ask.dp_rank, None, ask.router))
        need.chain, need.tokens = chain_of(ask, card.block_size)
        return need, card.block_size

    def _with_room(self, need: Need, usable: Sequence[ServingWorker], now: float) -> Sequence[ServingWorker]:
        verdict = self._services.admission.judge(need.model, usable, {}, queueing=False, ahead=0, now=now)
        if verdict.decision != "admit":
            assert verdict.error is not None
            raise verdict.error
        return verdict.free

    def _answer(self, need: Need, choice: Choice, candidates: Sequence[ServingWorker], block_size: int) -> Best:
        decision = choice.decision
        chosen = choice.worker.instance
        if decision is None:
            scores = [Score(w.instance, 0, requests=w.in_flight + w.queued) for w in candidates]
            scores.sort(key=lambda one: (one.worker_id != chosen, one.requests))
            overlap, rank = 0, None if choice.rank == ANY_RANK else choice.rank
        else:
            terms = sorted(
                decision.terms, key=lambda one: ((one.instance, one.rank) != (chosen, decision.rank), one.cost)
            )
            scores = [
                Score(t.instance, t.rank, t.device, t.host, t.disk, t.prefill, t.decode, t.requests, t.cost)
                for t in terms
            ]
            overlap, rank = decision.overlap, decision.rank
        return Best(
            chosen,
            rank,
            overlap,
            block_size,
            -(-need.tokens // block_size) if block_size else 0,
            scores,
            self._name,
        )

    def _pool_event(self, event: PoolEvent, worker: object) -> None:
        if event == "removed" and isinstance(worker, Worker):
            self.reservations.forget(worker.instance)


def _nobody(model: str, known: int) -> NoWorkers:
    return NoWorkers(
        f"None of the {known} workers of model {model!r} that this router knows can be used now.",
        model=model,
        retry_after=1.0,
    )
