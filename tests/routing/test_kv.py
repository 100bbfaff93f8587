"""Choosing by caches: affinity, load, siblings, templates, ranks; without knowledge as least-loaded."""

from __future__ import annotations

import random
from array import array
from collections import Counter

from holdfast.kv.hashes import sequence_hashes
from holdfast.models.card import ModelCard, artifact_of
from holdfast.routing.claims import Claim, Ledger
from holdfast.routing.cost import Weights
from holdfast.routing.knowledge import Overlaps
from holdfast.routing.kv import Decision, KvRouter, Prompt
from holdfast.wire.frames import Load, Pong, Progress

BLOCK = 64


class Worker:
    def __init__(self, instance: str, ranks: int = 1):
        self.instance, self.epoch = instance, 1
        self.pong: Pong | None = None
        nothing = artifact_of(b"")
        self._card = ModelCard("m", nothing, nothing, 1 << 17, (), 1000, BLOCK, data_parallel_size=ranks)

    def card(self, _model: str) -> ModelCard:
        return self._card

    def say(self, used: int = 0, prefill: int = 0, running: int = 0, ranks: tuple[Load, ...] = ()) -> None:
        self.pong = Pong(0, Progress(), Load(running, 0, used, 16_384, prefill, ranks), 0)


class Caches:
    """Everything that was sent to a rank is there at once, and never evicted."""

    def __init__(self) -> None:
        self.held: dict[tuple[str, int], set[int]] = {}

    def lookup(self, hashes: array[int], _block_size: int, _now: float) -> Overlaps:
        found = {}
        for place, held in self.held.items():
            run = next((i for i, h in enumerate(hashes) if h not in held), len(hashes))
            if run:
                found[place] = (run, 0, 0)
        return Overlaps(found)

    def decided(self, instance: str, rank: int, hashes: array[int], now: float) -> None:
        raise AssertionError("the one who calls `choose` says so")

    def store(self, decision: Decision, hashes: array[int]) -> None:
        self.held.setdefault((decision.instance, decision.rank), set()).update(hashes)


class Scene:
    def __init__(
        self, workers: int = 4, *, ranks: int = 1, template: int | None = None, weights: Weights | None = None
    ):
        self.workers = [Worker(f"w{i}", ranks) for i in range(workers)]
        self.caches, self.ledger = Caches(), Ledger()
        self.router = KvRouter(self.caches, self.ledger, random.Random(3), template_tokens=template)
        self.now = 0.0

    def choose(self, hashes: array[int], **prompt: object) -> Decision:
        self.now += 1.0
        asked = Prompt(len(hashes) * BLOCK, hashes, BLOCK, **prompt)  # type: ignore[arg-type]
        _, decision = self.router.choose("m", self.workers, asked, self.now)
        return decision

    def serve(self, hashes: array[int]) -> Decision:
        """A request that is over before the next one comes."""
        decision = self.choose(hashes)
        self.caches.store(decision, hashes)
        return decision

    def take(self, decision: Decision, hashes: array[int]) -> Claim:
        worker = next(w for w in self.workers if w.instance == decision.instance)
        length, cached = len(hashes) * BLOCK, decision.overlap * BLOCK
        return self.ledger.take(worker, length, BLOCK, rank=decision.rank, cached=cached, hashes=hashes)


def prompt(*parts: tuple[int, int]) -> array[int]:
    return sequence_hashes(1 + name * 10_000 + at for name, length in parts for at in range(length))


def test_idle_sessions_that_share_a_template_spread_and_stay() -> None:
    scene = Scene()
    homes = {number: scene.serve(prompt((0, 20), (number, 3))).instance for number in range(1, 9)}
    counts = Counter(homes.values())
    assert len(counts) == 4, homes
    assert max(counts.values()) <= 3, homes
    for turn in range(1, 4):
        for number, home in homes.items():
            decision = scene.serve(prompt((0, 20), (number, 3 + 2 * turn)))
            assert (decision.instance, decision.overlap) == (home, 20 + 3 + 2 * (turn - 1)), "its own prefix is there"


def test_without_the_rule_they_all_land_on_the_first_one() -> None:
    scene = Scene(template=0)
    assert len({scene.serve(prompt((0, 20), (number, 3))).instance for number in range(1, 9)}) == 1


def test_a_long_shared_document_is_worth_going_to() -> None:
    scene = Scene()
    homes = [scene.serve(prompt((0, 160), (number, 2))).instance for number in range(1, 6)]
    assert len(set(homes)) == 1


def test_load_outweighs_a_small_overlap() -> None:
    scene = Scene(2)
    own = prompt((1, 20))
    home = scene.serve(own).instance
    busy = next(w for w in scene.workers if w.instance == home)
    busy.say(used=10, running=1)
    assert scene.choose(prompt((1, 30))).instance == home
    busy.say(used=10, prefill=64 * 100, running=1)
    assert scene.choose(prompt((1, 30))).instance == home, "computing 20 blocks again costs others too"
    plain = Weights(recompute_weight=0.0)
    assert scene.choose(prompt((1, 30)), weights=plain).instance != home, "the reference counts this request alone"
    busy.say(used=10, prefill=64 * 200, running=1)
    decision = scene.choose(prompt((1, 30)))
    assert decision.instance != home
    assert (decision.best, decision.overlap) == (20, 0)


def test_siblings_of_a_burst_find_each_other_before_any_event() -> None:
    scene = Scene(2)
    first = prompt((1, 100))
    decision = scene.choose(first)
    claim = scene.take(decision, first)
    sibling = scene.choose(prompt((1, 100), (2, 2)))
    assert (sibling.instance, sibling.overlap) == (decision.instance, 100)
    claim.release()
    assert scene.choose(prompt((1, 100), (3, 2))).overlap == 0


def test_what_our_streams_share_costs_blocks_once() -> None:
    scene = Scene(1)
    first = prompt((1, 50))
    scene.take(scene.choose(first), first)
    (only,) = scene.choose(prompt((1, 50), (2, 5))).terms
    assert (only.decode, only.requests) == (50 + 5, 1)


def test_ranks_are_chosen_and_a_wanted_one_is_kept() -> None:
    scene = Scene(2, ranks=2)
    hashes = prompt((1, 30))
    home = scene.serve(hashes)
    again = scene.serve(prompt((1, 35)))
    assert (again.instance, again.rank, again.ranks) == (home.instance, home.rank, 2)
    assert len(again.terms) == 4
    wanted = scene.choose(prompt((1, 40)), rank=1 - home.rank)
    assert wanted.rank == 1 - home.rank
    assert len(wanted.terms) == 2


def test_where_no_cache_helps_the_one_with_fewest_requests_of_equal_size_is_chosen() -> None:
    scene = Scene(3)
    claims = []
    for number in range(1, 31):
        hashes = prompt((number, 10))
        decision = scene.choose(hashes)
        claims.append(scene.take(decision, hashes))
        loads = [scene.ledger.sums(w, 0).requests for w in scene.workers]
        assert max(loads) - min(loads) <= 1
    for claim in claims:
        claim.release()
    assert scene.ledger.held() == 0


def test_per_request_weights_and_wanted_taints() -> None:
    scene = Scene(2)
    home = scene.serve(prompt((1, 20))).instance
    other = next(w.instance for w in scene.workers if w.instance != home)
    assert scene.choose(prompt((1, 21)), preferences={other: 0.2}).instance == home, "20 blocks weigh more"
    blind = Weights(overlap_score_credit=0.0)
    assert scene.choose(prompt((1, 22)), weights=blind, preferences={other: 0.1}).instance == other
