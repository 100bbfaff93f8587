"""The choice of a worker and rank by what is in their caches and what they have in hand (``--router-mode kv``).

Knowledge says who holds which blocks of a prompt, the ledger what each has to do; `cost` puts both into one number.
Two things are added to the reference's rule. Blocks that our own streams on a worker are computing count as held, so
that siblings of one burst find each other. And the part of a prompt that is a template earns no credit
(`templates`): otherwise, in an idle fleet, the first worker that has seen the template gets every conversation.

Must never do I/O, wait, or judge whether a worker may be used.
"""

from __future__ import annotations

import math
import random
from array import array
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol, TypeVar

import msgspec

from holdfast.models.card import ModelCard
from holdfast.routing.claims import Ledger, Reporting
from holdfast.routing.cost import Candidate, Terms, Weights, credit_of, pick, weigh
from holdfast.routing.knowledge import Overlaps
from holdfast.routing.templates import Templates

MEMORY = 120.0
"""Seconds after which work that was given to a worker counts for 1/e among equals."""
_NO_HASHES: array[int] = array("Q")
_NO_PREFERENCE: Mapping[str, float] = {}


class Knowledge(Protocol):
    """Who holds what (`knowledge.PrefixKnowledge`)."""

    def lookup(self, hashes: array[int], block_size: int, now: float, /) -> Overlaps:
        """Return how many leading blocks each rank holds."""

    def decided(self, instance: str, rank: int, hashes: array[int], now: float, /) -> None:
        """Note where a prompt was sent."""


class Holder(Reporting, Protocol):
    """A worker that may be chosen."""

    def card(self, model: str) -> ModelCard | None:
        """Return its card of that model."""


W = TypeVar("W", bound=Holder)


class Prompt(msgspec.Struct, frozen=True):
    """What is to be placed."""

    length: int
    """Tokens that must be computed or found: prompt and what was generated of it."""
    hashes: array[int] = _NO_HASHES
    """Of its complete blocks."""
    block_size: int = 0
    rank: int | None = None
    """The only one that will do."""
    weights: Weights | None = None
    """For this request alone."""
    preferences: Mapping[str, float] = _NO_PREFERENCE
    """By instance: sum of the weights of wanted taints."""

    @property
    def blocks(self) -> int:
        """Blocks for all of its tokens."""
        return -(-self.length // self.block_size)


class Decision(msgspec.Struct, frozen=True):
    """One choice and what it was made of."""

    instance: str
    rank: int
    overlap: int
    """Blocks that the chosen one holds, in all tiers."""
    blocks: int
    """Blocks of the request."""
    best: int
    """Most blocks that any candidate holds."""
    template: int
    """Leading blocks that earned no credit."""
    terms: Sequence[Terms]
    """Of all candidates."""
    block_size: int = 1
    """Tokens per block."""
    ranks: int = 1
    """Of the chosen worker."""
    lookup_ns: int = 0
    """Time in the index."""
    total_ns: int = 0
    """Time for the whole choice, hashing excluded."""


class _Work:
    """Work given to one rank lately, fading."""

    __slots__ = ("amount", "at")

    def __init__(self) -> None:
        self.amount = 0.0
        self.at = 0.0

    def now(self, now: float) -> float:
        """Return what is left of it."""
        return self.amount * math.exp((self.at - now) / MEMORY)

    def add(self, blocks: float, now: float) -> None:
        """Give more."""
        self.amount, self.at = self.now(now) + blocks, now


class KvRouter:
    """The choice, for all models of one process.

    Args:
        knowledge: who holds what.
        ledger: what each has in hand.
        rng: for choices among equals, and with temperature.
        weights: unless the request has its own.
        clock: a stopwatch in nanoseconds, for the overhead's sake.
        track_blocks: False: blocks in use do not count (`router_track_active_blocks`).
        track_prefill: False: prompt tokens in hand do not count (`router_track_prefill_tokens`).
        template_tokens: see `templates`; 0: every block earns credit.
    """

    def __init__(
        self,
        knowledge: Knowledge,
        ledger: Ledger,
        rng: random.Random,
        *,
        weights: Weights | None = None,
        clock: Callable[[], int] = lambda: 0,
        track_blocks: bool = True,
        track_prefill: bool = True,
        template_tokens: int | None = None,
    ):
        self.knowledge = knowledge
        self._ledger = ledger
        self._rng = rng
        self.weights = weights or Weights()
        self.clock = clock
        self._track_blocks = track_blocks
        self._track_prefill = track_prefill
        self._template_tokens = template_tokens
        self._templates: dict[str, Templates] = {}
        self._work: dict[tuple[str, int], _Work] = {}

    def choose(self, model: str, workers: Sequence[W], prompt: Prompt, now: float) -> tuple[W, Decision]:
        """Return the chosen worker, and why.

        Args:
            model: what is asked for.
            workers: at least one, all of which may be used.
            prompt: what is to be placed.
            now: loop time.
        """
        began = self.clock()
        overlaps = self.knowledge.lookup(prompt.hashes, prompt.block_size, now)
        looked = self.clock()
        template = self._template(model, prompt)
        found = [
            self._candidate(worker, (rank, ranks), prompt, overlaps, template)
            for worker in workers
            for ranks in (_ranks(worker, model),)
            for rank in (range(ranks) if prompt.rank is None or prompt.rank >= ranks else (prompt.rank,))
        ]
        weights = prompt.weights or self.weights
        if not any(sum(one.credited) for one in found):
            weights = _counting(weights, found, prompt)
        least = min(one.tokens for one in found)
        size = prompt.block_size
        most = max(credit_of(one, prompt.length, weights, least) for one in found)
        terms = [weigh(one, prompt.length, size, weights, least, most_credit=most) for one in found]
        chosen = pick(terms, weights.router_temperature, self._rng, lambda one: self._recent(one, now))
        worker = next(w for w in workers if w.instance == chosen.instance)
        self._give(chosen, prompt, now)
        decision = Decision(
            instance=chosen.instance,
            rank=chosen.rank,
            overlap=chosen.overlap,
            blocks=prompt.blocks,
            best=max(one.overlap for one in terms),
            template=template,
            terms=terms,
            block_size=size,
            ranks=_ranks(worker, model),
            lookup_ns=looked - began,
            total_ns=self.clock() - began,
        )
        return worker, decision

    def forget(self, instance: str) -> None:
        """A worker is gone."""
        self._work = {key: work for key, work in self._work.items() if key[0] != instance}

    def _candidate(
        self, worker: Holder, place: tuple[int, int], prompt: Prompt, overlaps: Overlaps, template: int
    ) -> Candidate:
        rank, ranks = place
        estimate = self._ledger.estimate(worker, rank, prompt.block_size, ranks)
        shared = self._ledger.shared(worker, rank, prompt.hashes) if estimate.requests else 0
        tiers = overlaps.of(worker.instance, rank)
        if shared > tiers[0]:
            tiers = (shared, max(0, tiers[0] + tiers[1] - shared), max(0, sum(tiers) - shared))
        return Candidate(
            worker.instance,
            rank,
            tiers,
            _without(tiers, template) if template else tiers,
            estimate.tokens if self._track_prefill else 0,
            estimate.blocks + prompt.blocks - shared if self._track_blocks else 0,
            estimate.requests,
            prompt.preferences.get(worker.instance, 0.0) if prompt.preferences else 0.0,
        )

    def _template(self, model: str, prompt: Prompt) -> int:
        found = self._templates.get(model)
        if found is None:
            each = self._template_tokens
            found = self._templates[model] = Templates() if each is None else Templates(tokens_each=each)
        return found.note(prompt.hashes, prompt.block_size)

    def _recent(self, one: Terms, now: float) -> float:
        work = self._work.get((one.instance, one.rank))
        return work.now(now) if work is not None else 0.0

    def _give(self, one: Terms, prompt: Prompt, now: float) -> None:
        key = (one.instance, one.rank)
        work = self._work.get(key)
        if work is None:
            work = self._work[key] = _Work()
        work.add(max(1, prompt.blocks - one.overlap), now)


def _ranks(worker: Holder, model: str) -> int:
    card = worker.card(model)
    return card.data_parallel_size if card is not None else 1


def _counting(weights: Weights, found: Sequence[Candidate], prompt: Prompt) -> Weights:
    """Return weights for a request that no cache helps: how many requests a worker has weighs as much as their size.

    Size alone would give small prompts' workers so many of them that they decode more slowly, in all a percent or two
    worse than counting; this is as good as counting, and better where one prompt is huge.
    """
    requests = sum(one.requests for one in found)
    if not requests:
        return weights
    mean = sum(one.blocks - prompt.blocks for one in found) / requests
    weight = max(weights.decode_active_request_weight, mean)
    return msgspec.structs.replace(weights, decode_load_scale=1.0, decode_active_request_weight=weight)


def _without(tiers: tuple[int, int, int], blocks: int) -> tuple[int, int, int]:
    """Return what is left of a leading run without its first blocks."""
    device, host, disk = tiers
    left = blocks - device
    if left <= 0:
        return device - blocks, host, disk
    return 0, max(0, host - left), disk if left <= host else max(0, disk - (left - host))
