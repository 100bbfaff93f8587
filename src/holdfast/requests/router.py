"""Whom a stream may go to and to whom it goes: its own wishes, its session, then the router mode.

Brings together what a stream needs (`need`), what it wishes (`routing.route`) and who knows (`routing.policy`,
`routing.kv`). Must never wait, hold what a stream holds, or judge health.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence

import msgspec

from holdfast.base.errors import InvalidRequest, NoWorkers
from holdfast.requests.fleet import ServingWorker
from holdfast.requests.need import Need, computes
from holdfast.routing.affinity import Affinity
from holdfast.routing.claims import ANY_RANK, Claim, Ledger, Output
from holdfast.routing.kv import Decision, KvRouter, Prompt
from holdfast.routing.policy import Policy, Wish
from holdfast.routing.route import ANYWHERE
from holdfast.routing.router_config import RouterSettings

_NO_HASHES: array[int] = array("Q")


class Choice(msgspec.Struct, frozen=True):
    """A worker for one attempt."""

    worker: ServingWorker
    rank: int = ANY_RANK
    """The engine is told; `ANY_RANK`: it chooses."""
    cached: int = 0
    """Tokens that it should find in its cache."""
    hashes: array[int] = _NO_HASHES
    """Of the blocks of its tokens, when they are known."""
    decision: Decision | None = None


class Router:
    """The choice for all streams of one process.

    Args:
        policy: the router mode.
        settings: of the decision.
        kv: knows caches; None: the mode does not ask for it.
        prefill: it chooses who computes prompts for others.
    """

    def __init__(self, policy: Policy, settings: RouterSettings, kv: KvRouter | None = None, *, prefill: bool = False):
        self._prefill = prefill
        self.policy = policy
        self.settings = settings
        self.kv = kv
        ttl = settings.router_session_affinity_ttl_secs
        self._affinity = Affinity(ttl) if ttl else None
        self.on_decision: Callable[[str, Decision, int], None] = _nothing
        """Called after each choice by caches with the model and the nanoseconds that hashing took."""

    def eligible(self, need: Need, usable: Sequence[ServingWorker], now: float) -> Sequence[ServingWorker]:
        """Return those of the usable workers that meet the stream's conditions.

        Raises:
            InvalidRequest: the mode is ``direct`` and the request names nobody.
            NoWorkers: the mode is ``direct`` and the one it names is not there.
        """
        route = need.route
        if route is ANYWHERE:
            if self.policy.mode == "direct" and not need.started:
                raise _nobody_named()
            return usable
        if route.allowed or route.required:
            usable = [w for w in usable if route.admits(w.instance, _taints(w, need.model))]
        if need.started:  # its worker is lost: any other that meets the conditions continues it
            return usable
        if route.worker or self.policy.mode == "direct":
            return self._named(need, usable)
        if self._affinity is not None and route.session and self.settings.router_session_affinity_mode == "hard":
            bound = self._affinity.find(need.model, route.session, now)
            return [w for w in usable if w.instance == bound and (w.instance, w.epoch) not in need.avoid] or usable
        return usable

    def choose(
        self, need: Need, candidates: Sequence[ServingWorker], avoid: frozenset[str], now: float
    ) -> Choice | None:
        """Return who gets the stream's next attempt, or None when there is nobody.

        Args:
            need: of the stream.
            candidates: that may get it now.
            avoid: instances that are taken only when there is nobody else.
            now: loop time.
        """
        session = prefer = ""
        if self._affinity is not None and need.route.session:
            session = need.route.session
            prefer = self._affinity.find(need.model, session, now)
        wish = Wish(avoid, need.fingerprint, prefer or ("" if need.started else need.route.advised))
        if self.kv is None or not candidates:
            worker = self.policy.choose(need.model, candidates, wish)
            choice = Choice(worker) if worker is not None else None
        else:
            choice = self._by_caches(self.kv, need, candidates, wish, now)
        if session and choice is not None and self._affinity is not None:
            self._affinity.bind(need.model, session, choice.worker.instance, now)
        return choice

    def new_tokens(self, need: Need, usable: Sequence[ServingWorker], now: float) -> int:
        """Return how many tokens the best cache among the workers would leave to compute."""
        prompt = self._prompt(need, usable) if self.kv is not None else None
        if self.kv is None or prompt is None:
            return need.tokens
        overlaps = self.kv.knowledge.lookup(prompt.hashes, prompt.block_size, now)
        most = max((sum(tiers) for _, _, *tiers in overlaps), default=0)
        return max(1, need.tokens - most * prompt.block_size)

    def claim(self, ledger: Ledger, need: Need, choice: Choice) -> Claim:
        """Claim room for what was chosen."""
        card = choice.worker.card(need.model)
        size = card.block_size if card is not None else 0
        shared = choice.hashes if self.settings.router_assume_kv_reuse else _NO_HASHES
        rank, cached = choice.rank, choice.cached
        if need.remote and not self._prefill:
            shared, cached = _NO_HASHES, need.tokens
        if self.kv is not None and rank == ANY_RANK and card is not None and card.data_parallel_size == 1:
            rank = 0
        claim = ledger.take(choice.worker, need.tokens, size, rank=rank, cached=cached, hashes=shared)
        if self.settings.router_track_output_blocks and self.kv is not None and not self._prefill:
            claim.follow(_output_of(need))
        return claim

    def forget(self, instance: str) -> None:
        """A worker is gone."""
        if self.kv is not None:
            self.kv.forget(instance)
        if self._affinity is not None:
            self._affinity.forget(instance)

    def _named(self, need: Need, usable: Sequence[ServingWorker]) -> Sequence[ServingWorker]:
        wanted = need.route.worker
        if not wanted:
            raise _nobody_named()
        named = [w for w in usable if w.instance == wanted and (w.instance, w.epoch) not in need.avoid]
        if need.whole and self.policy.mode != "direct":
            named = [w for w in named if computes(w, need.model)]
        if not named and self.policy.mode == "direct":
            raise NoWorkers(
                f"Worker {wanted}, which the request names, cannot take work for model '{need.model}' now "
                f"(router mode direct; {len(usable)} others could).",
                model=need.model,
                retry_after=5.0,
            )
        return named or usable

    def _by_caches(
        self, kv: KvRouter, need: Need, candidates: Sequence[ServingWorker], wish: Wish, now: float
    ) -> Choice | None:
        left = self.policy.preferred(need.model, candidates, wish)
        began = kv.clock()
        prompt = self._prompt(need, left)
        hashing = kv.clock() - began
        if prompt is None:
            worker = self.policy.choose(need.model, left, wish)
            return Choice(worker) if worker is not None else None
        worker, decision = kv.choose(need.model, left, prompt, now)
        kv.knowledge.decided(decision.instance, decision.rank, prompt.hashes, now)
        self.on_decision(need.model, decision, hashing)
        rank = decision.rank if decision.ranks > 1 else ANY_RANK
        return Choice(worker, rank, decision.overlap * prompt.block_size, prompt.hashes, decision)

    def _prompt(self, need: Need, workers: Sequence[ServingWorker]) -> Prompt | None:
        """Return what is to be placed; None: there are no blocks to compare."""
        card = next((card for w in workers if (card := w.card(need.model)) is not None), None)
        if card is None or card.block_size < 1 or need.chain is None or self.kv is None:
            return None
        route = need.route
        weights = route.weighed(self.kv.weights)
        if need.remote and not self._prefill:
            weights = msgspec.structs.replace(weights or self.kv.weights, overlap_score_credit=0.0)
        return Prompt(
            need.tokens,
            need.chain.of(card.block_size, need.generated()),
            card.block_size,
            route.rank if not self._prefill else None,
            weights,
            {w.instance: route.preference(_taints(w, need.model)) for w in workers} if route.preferred else {},
        )


def _output_of(need: Need) -> Output:
    def generated() -> int:
        return len(need.generated()) // 4

    return Output(generated, generated(), need.route.expected_output)


def _taints(worker: ServingWorker, model: str) -> frozenset[str]:
    card = worker.card(model)
    return frozenset(card.taints) if card is not None else frozenset()


def _nobody_named() -> InvalidRequest:
    return InvalidRequest(
        "Router mode direct needs a worker: send its instance id as header x-worker-instance-id or as "
        "'nvext.backend_instance_id'.",
        param="x-worker-instance-id",
    )


def _nothing(_model: str, _decision: Decision, _hashing_ns: int) -> None:
    return
