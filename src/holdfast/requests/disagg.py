"""Whether the prompt of an attempt is computed by a prefill worker or by the one that decodes it, and by whom.

The decision alone: `prefill` carries it out. Whoever computes prompts is chosen by a router of its own, with turns,
affinities and sums of its own, so that streams and prompts do not disturb each other's choices.

Must never open a stream, wait, or remember anything of a single request.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from typing import Literal

from holdfast.base.errors import NoWorkers
from holdfast.models.card import ModelCard
from holdfast.models.pairing import mismatch
from holdfast.requests.config import DisaggSettings
from holdfast.requests.fleet import Pool, ServingWorker
from holdfast.requests.leases import LeaseBook
from holdfast.requests.need import Need, Placed, computes
from holdfast.requests.router import Router
from holdfast.routing.admission import Admission
from holdfast.routing.claims import ANY_RANK

Reason = Literal[
    "remote", "short", "cached", "no_prefill_worker", "incompatible", "saturated", "failed", "suspect", "handoff",
    "budget",
]  # fmt: skip
"""Why a prompt is computed where it is. ``remote``: by a prefill worker. All others mean the decode worker: ``short``
and ``cached``: it is less work than handing it over; no prefill worker is there, none fits, none has room, all that
were asked failed; it is suspected to kill workers and must be tried alone; the hand-off before failed; the budget of
repeated attempts is used up."""
REASONS: tuple[Reason, ...] = Reason.__args__  # type: ignore[attr-defined]
_NOBODY: frozenset[str] = frozenset()
ROOM_BITS = 63


class Prefills:
    """The prefill side of one process.

    Args:
        settings: of disaggregation.
        pool: the workers.
        router: chooses among prefill workers, and does nothing else.
        admission: knows who has room.
        leases: counts legs.
        rng: for rooms and ranks.
    """

    def __init__(  # noqa: PLR0917 - wired once, in `service`
        self,
        settings: DisaggSettings,
        pool: Pool,
        router: Router,
        admission: Admission,
        leases: LeaseBook,
        rng: random.Random,
    ):
        self.settings = settings
        self.router = router
        self._pool, self._admission, self._leases, self._rng = pool, admission, leases, rng

    def concerns(self, need: Need) -> bool:
        """Return whether there is anything to decide: where a prompt of this model is computed; asked per attempt."""
        pool, model = self._pool, need.model
        return (
            pool.has_prefill(model)
            or pool.needs_prefill(model)
            or self.settings.enforce_disagg
            or bool(need.route.prefill)
        )

    def only_apart(self, model: str) -> bool:
        """Return whether nobody who could get a stream of this model now computes its prompt as well."""
        if not self._pool.needs_prefill(model):
            return False
        usable = self._pool.usable(model)
        return bool(usable) and not any(computes(worker, model) for worker in usable)

    def none_usable(self, model: str) -> bool:
        """Return whether no prefill worker could get a prompt of this model now."""
        return not self._pool.prefill(model)

    def check_named(self, need: Need) -> None:
        """Refuse a new stream that names a prefill worker nobody knows. Raises NoWorkers."""
        wanted = need.route.prefill
        if not wanted or need.promised:
            return
        known = self._pool.prefill_workers(need.model)
        if all(worker.instance != wanted for worker in known):
            raise NoWorkers(
                f"Prefill worker {wanted}, which the request names (x-prefill-instance-id, nvext.prefill_worker_id), "
                f"is unknown: {len(known)} others compute prompts of model '{need.model}'.",
                model=need.model,
                param="x-prefill-instance-id",
                retry_after=5.0,
            )

    def likely(self, model: str) -> bool:
        """Return whether a prompt of this model will be computed apart before its decode worker is known.

        Then that worker is chosen by its load alone: what its cache holds is not computed there either way.
        """
        return (not self.settings.conditional or self.only_apart(model)) and bool(self._pool.prefill(model))

    def keeps_local(self, need: Need, placed: Placed) -> Reason | None:
        """Return why the decode worker should compute this prompt; None: it should not.

        None as well where it cannot, or the request names who should. What counts is the effective length: without what
        the decode worker has in its cache, as far as that is known.
        """
        settings = self.settings
        named = need.route.prefill and not need.promised
        if not settings.conditional or named or not computes(placed.worker, need.model):
            return None
        decision = placed.decision
        cached = decision.overlap * decision.block_size if decision is not None else 0
        effective = max(0, need.tokens - cached)
        if effective <= settings.max_local_prefill_length:
            return "short"
        below = effective < settings.conditional_disagg_eff_isl_threshold
        if (
            settings.conditional_disagg_enabled
            and below
            and effective < settings.conditional_disagg_eff_isl_ratio_threshold * need.tokens
        ):
            return "cached"
        return None

    def find(self, need: Need, decode: ServingWorker, avoid: set[tuple[str, int]]) -> Placed | Reason:
        """Return a prefill worker for a prompt, with what is counted for it, or why there is none.

        Args:
            need: of the stream.
            decode: who will take over.
            avoid: those (instance, epoch) that failed this stream.
        """
        model = need.model
        usable = self._pool.prefill(model)
        if not usable:
            return "no_prefill_worker"
        card = decode.card(model)
        fitting = [w for w in usable if card is not None and _fits(w, model, card)]
        if not fitting:
            return "incompatible"
        left = [w for w in fitting if (w.instance, w.epoch) not in avoid]
        if not left:
            return "failed"
        named = [w for w in left if w.instance == need.route.prefill] if need.route.prefill else []
        free: Sequence[ServingWorker] = self._admission.with_room(model, named) if named else ()
        free = free or self._admission.with_room(model, left)
        choice = self.router.choose(need, free, _NOBODY, asyncio.get_running_loop().time()) if free else None
        if choice is None:
            return "saturated"
        claim = self.router.claim(self._admission.ledger, need, choice)
        lease = self._leases.take("prefill", choice.worker.instance)
        return Placed(choice.worker, lease, claim, None, rank=choice.rank, decision=choice.decision)

    def others(self, need: Need, but: ServingWorker, avoid: set[tuple[str, int]]) -> bool:
        """Return whether another prefill worker could be asked."""
        return any(
            w.instance != but.instance and not w.hesitant and (w.instance, w.epoch) not in avoid
            for w in self._pool.prefill(need.model)
        )

    def meeting(self, card: ModelCard, rank: int) -> tuple[int, int]:
        """Return the rank of a prefill worker and a room at which both legs meet: 63 bits, ``room % ranks == rank``."""
        ranks = max(1, card.data_parallel_size)
        chosen = rank if rank != ANY_RANK else self._rng.randrange(ranks)
        room = self._rng.getrandbits(ROOM_BITS)
        room += chosen - room % ranks
        return chosen, room if room < 1 << ROOM_BITS else room - ranks


def _fits(worker: ServingWorker, model: str, decode: ModelCard) -> bool:
    card = worker.card(model)
    return card is not None and mismatch(card, decode) is None
