"""Knowledge from routing decisions alone: it ends in time, and evicts as an engine with that capacity would."""

from __future__ import annotations

import random
from array import array
from collections import OrderedDict

import pytest

from holdfast.kv.approximate import ApproximateIndex
from holdfast.kv.choice import new_index
from holdfast.kv.index import PrefixIndex
from tests.kv.naive import chains
from tests.kv.test_kv_index import MAKERS, drawn


@pytest.fixture(params=MAKERS)
def inner(request) -> PrefixIndex:
    return new_index(use=request.param)


def test_a_decision_counts_for_its_time_after_the_last_that_mentions_it(inner):
    index = ApproximateIndex(inner, ttl=120)
    prompt = drawn(50)
    index.decided(3, prompt, now=0)
    index.decided(3, prompt[:20], now=100)
    assert index.lookup(prompt, now=119.9).of(3) == (50, 0, 0)
    assert index.lookup(prompt, now=120).of(3) == (20, 0, 0)
    assert index.lookup(prompt, now=219.9).of(3) == (20, 0, 0)
    assert len(index.lookup(prompt, now=220)) == 0
    assert index.remembered == inner.blocks == 0


def test_nothing_of_a_lost_worker_counts_and_its_slot_can_be_used_again(inner):
    index = ApproximateIndex(inner, ttl=10)
    prompt = drawn(50)
    index.decided(3, prompt, now=0)
    index.decided(4, prompt[:5], now=1)
    index.remove_worker(3)
    index.decided(3, prompt[:7], now=5)
    assert list(index.lookup(prompt, now=6)) == [(3, 7, 0, 0), (4, 5, 0, 0)]
    assert index.lookup(prompt, now=12).of(3) == (7, 0, 0)
    assert len(index.lookup(prompt, now=15)) == 0
    assert index.remembered == 0


class Lru:
    """An engine's cache: least recently used out first, the end of a prompt before its beginning."""

    def __init__(self, capacity: int) -> None:
        self.capacity, self.blocks = capacity, OrderedDict()

    def use(self, prompt) -> None:
        for key in reversed(prompt):
            self.blocks[key] = None
            self.blocks.move_to_end(key)
        while len(self.blocks) > self.capacity:
            self.blocks.popitem(last=False)


@pytest.mark.parametrize("seed", range(8))
def test_by_capacity_it_is_the_engines_own_eviction(inner, seed):
    rng = random.Random(seed)
    prompts = chains(rng, 40, 60)
    capacity = rng.choice((100, 500))
    index, engines = ApproximateIndex(inner, ttl=None), [Lru(capacity) for _ in range(3)]
    for slot in range(3):
        index.set_capacity(slot, capacity)
    for step in range(1200):
        slot, prompt = rng.randrange(3), rng.choice(prompts)[:capacity]
        index.decided(slot, array("Q", prompt), now=step)
        engines[slot].use(prompt)
        if step % 50 == 0:
            assert set(inner.snapshot(slot)[0]) == set(engines[slot].blocks), step
    assert index.remembered <= 3 * (4 * max(capacity, 1024) + 100)


def test_both_rules_at_once_and_a_capacity_that_comes_later(inner):
    index = ApproximateIndex(inner, ttl=60)
    prompt = drawn(100)
    index.decided(0, prompt, now=0)
    index.set_capacity(0, 30)
    assert index.lookup(prompt, now=1).of(0) == (30, 0, 0)
    assert index.blocks(0) == 30
    assert len(index.lookup(prompt, now=60)) == 0


def test_memory_is_bounded_by_ending_the_oldest_early(inner):
    index = ApproximateIndex(inner, ttl=1000, limit=100)
    first, second, third = drawn(60, 1), drawn(60, 2), drawn(200, 3)
    index.decided(0, first, now=0)
    index.decided(1, second, now=1)
    assert list(index.lookup(first, now=2)) == []
    assert index.lookup(second, now=2).of(1) == (60, 0, 0)
    index.decided(1, third, now=3)
    assert index.remembered == 0
    assert inner.blocks == 0


def test_the_same_prompt_a_million_times_needs_no_more_memory(inner):
    index = ApproximateIndex(inner, ttl=None)
    index.set_capacity(0, 100)
    prompt = drawn(90)
    for step in range(3000):
        index.decided(0, prompt, now=step)
    assert index.remembered <= 4096 + 90
    assert index.lookup(prompt, now=3000).of(0) == (90, 0, 0)


def test_an_empty_prompt_decides_nothing(inner):
    index = ApproximateIndex(inner)
    index.decided(0, b"", now=0)
    assert index.remembered == 0
