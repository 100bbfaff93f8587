"""The cost and the pick: the reference's example, weights, tiers, decay, taints, temperature, ties."""

from __future__ import annotations

import math
import random
from collections import Counter

import pytest

from holdfast.routing.cost import Candidate, Terms, Weights, credit_of, pick, weigh

NOTHING = (0, 0, 0)


def cost(
    tiers: tuple[int, int, int] = NOTHING,
    *,
    tokens: int = 0,
    blocks: int = 0,
    requests: int = 0,
    preference: float = 0.0,
    length: int = 160,
    least: int = 0,
    **weights: float,
) -> float:
    one = Candidate("w", 0, tiers, tiers, tokens, blocks, requests, preference)
    return weigh(one, length, 16, Weights(**{"decode_load_scale": 1.0, **weights}), least).cost


def test_the_example_of_the_documents() -> None:
    """10 blocks asked for: overlaps 2, 5, 8; decode blocks 10, 5, 9."""
    costs = [cost((2, 0, 0), blocks=10), cost((5, 0, 0), blocks=5), cost((8, 0, 0), blocks=9)]
    assert costs == [18, 10, 11]


def test_the_older_weight_scales_the_prefill_part_and_0_leaves_load_alone() -> None:
    assert cost((4, 0, 0), tokens=32, blocks=7, overlap_score_weight=2.0) == 2 * (2 + 10 - 4) + 7
    assert cost((4, 0, 0), tokens=32, blocks=7, overlap_score_weight=0.0) == 7
    assert cost((4, 0, 0), overlap_score_weight=0.5, prefill_load_scale=4.0) == 12


def test_tiers_credit_and_requests() -> None:
    assert cost((2, 4, 4)) == 10 - 2 - 3 - 1
    assert cost((2, 4, 4), overlap_score_credit=0.0, host_cache_hit_weight=0.0, disk_cache_hit_weight=0.0) == 10
    assert cost((99, 0, 0)) == 0, "never below nothing to compute"
    assert cost(requests=3, decode_active_request_weight=5.0) == 25


def test_credit_decays_with_prefill_above_the_least_loaded() -> None:
    assert cost((6, 0, 0), tokens=160, least=160, overlap_score_credit_decay=1.0) == 14
    assert cost((6, 0, 0), tokens=160, least=0, overlap_score_credit_decay=1.0) == 20 - 3


def test_what_another_candidate_holds_costs_more_than_what_nobody_has() -> None:
    """Ten blocks; another one holds six of them, this one two: the four between them are computed again."""
    here = Candidate("w", 0, (2, 0, 0), (2, 0, 0), 0, 0, 0)
    weights = Weights(recompute_weight=3.0)
    assert weigh(here, 160, 16, weights, 0).cost == 8, "nobody has more"
    assert weigh(here, 160, 16, weights, 0, most_credit=6.0).cost == 8 + 3 * 4
    assert weigh(here, 160, 16, Weights(recompute_weight=0.0), 0, most_credit=6.0).cost == 8
    assert weigh(here, 160, 16, Weights(overlap_score_weight=0.0), 0, most_credit=6.0).cost == 0, (
        "only load counts then"
    )
    assert credit_of(here, 160, Weights(overlap_score_credit=0.0), 0) == 0


def test_taints_multiply_within_bounds() -> None:
    assert cost(preference=1.0) == pytest.approx(10 * math.exp(-math.tanh(1.0)))
    assert cost(preference=-1e9) == pytest.approx(10 * math.e)


def terms(*costs: float) -> list[Terms]:
    return [Terms(f"w{i}", 0, 0, 0, 0, 0.0, 0, 0, c) for i, c in enumerate(costs)]


def test_least_then_laziest_then_chance() -> None:
    rng = random.Random(1)
    assert pick(terms(3, 1, 2), 0.0, rng, lambda _: 0.0).instance == "w1"
    lazy = {"w0": 5.0, "w1": 1.0, "w2": 1.0}
    counts = Counter(pick(terms(1, 1, 1), 0.0, rng, lambda one: lazy[one.instance]).instance for _ in range(200))
    assert set(counts) == {"w1", "w2"}
    assert min(counts.values()) > 60


def test_temperature_is_a_softmax_over_the_normalised_cost() -> None:
    rng, n = random.Random(2), 20_000
    counts = Counter(pick(terms(10, 20, 30), 0.5, rng, lambda _: 0.0).instance for _ in range(n))
    odds = [math.exp(-(c - 10) / 10) for c in (10, 20, 30)]
    for i, odd in enumerate(odds):
        assert counts[f"w{i}"] / n == pytest.approx(odd / sum(odds), abs=0.02)
