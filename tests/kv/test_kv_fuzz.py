"""Kernel and twin against a naive model (hypothesis and long random lives), and against each other."""

from __future__ import annotations

import random
from array import array
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from holdfast.kv import kernel
from holdfast.kv.index import CLEARED, REMOVED, STORED, PrefixIndex
from holdfast.kv.kernel import KernelIndex
from holdfast.kv.twin import TwinIndex
from tests.kv.naive import Naive, Op, batch, chains, do, random_op

needs_kernel = pytest.mark.skipif(bool(kernel.UNAVAILABLE), reason=f"no kernel: {kernel.UNAVAILABLE}")
MANY = (1 << 64) - 1


def makers() -> list[type]:
    return [TwinIndex] if kernel.UNAVAILABLE else [TwinIndex, KernelIndex]


def agree(index: PrefixIndex, truth: Naive, prompts: list[list[int]]) -> None:
    """Everything that can be asked has the model's answer."""
    for prompt in prompts:
        assert list(index.lookup(array("Q", prompt))) == truth.run(prompt)
        assert list(index.lookup(array("Q", prompt), anywhere=True)) == truth.anywhere(prompt)
    for slot in truth.slots():
        counts = index.counts(slot)
        assert (*counts[:4], counts.unknown) == truth.counts(slot)
        assert counts.forgotten == 0
        for tier, hashes in enumerate(index.snapshot(slot)):
            assert Counter(hashes) == truth.tier(slot, tier)
            sliced = [one for some in index.slices(slot, tier, 3) for one in some]
            assert sorted(sliced) == sorted(truth.tier(slot, tier)), "each block once"


KEYS = st.integers(1, 12) | st.sampled_from([0, 13, MANY])
OPS = st.tuples(
    st.sampled_from([STORED, STORED, STORED, REMOVED, REMOVED, CLEARED]),
    st.sampled_from([0, 1, 2, 70, 65_535]),
    st.integers(0, 2),
    st.lists(KEYS, max_size=10),
)


@pytest.mark.parametrize("make", makers())
@settings(max_examples=120, deadline=None)
@given(st.lists(OPS, max_size=25), st.lists(st.lists(KEYS, min_size=1, max_size=14, unique=True), max_size=3))
def test_any_events_leave_what_the_model_says(make, ops: list[Op], prompts: list[list[int]]):
    index, truth = make(), Naive()
    for op in ops:
        do(index, op)
        truth.apply(op)
    agree(index, truth, [*prompts, list(range(1, 13))])
    assert not index.sweep()
    agree(index, truth, prompts)
    assert index.blocks == truth.blocks()


@pytest.mark.parametrize("make", makers())
@settings(max_examples=60, deadline=None)
@given(st.lists(OPS, max_size=25))
def test_one_call_for_many_events_does_the_same(make, ops: list[Op]):
    single, many = make(), make()
    for op in ops:
        do(single, op)
    many.apply(*batch(ops))
    for slot in (0, 1, 2, 70, 65_535):
        assert single.counts(slot) == many.counts(slot)
        assert single.snapshot(slot) == many.snapshot(slot)


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("make", makers())
def test_long_random_lives_follow_the_model(make, seed: int):
    rng = random.Random(seed)
    slots = rng.choice([1, 3, 8, 64, 200])
    tiers = rng.choice([1, 3])
    prompts = chains(rng, 30, 90)
    index, truth = make(), Naive()
    for step in range(500):
        op = random_op(rng, prompts, slots, tiers)
        do(index, op)
        truth.apply(op)
        if rng.random() < 0.02:
            slot = rng.randrange(slots)
            index.remove_worker(slot)
            truth.clear(slot)
        if rng.random() < 0.02:
            index.sweep(rng.randrange(300))
        prompt = rng.choice(prompts)
        prompt = prompt[: rng.randrange(len(prompt) + 1)]
        assert list(index.lookup(array("Q", prompt))) == truth.run(prompt), step
    agree(index, truth, prompts[:5])
    index.sweep()
    assert index.blocks == truth.blocks()
    for slot in truth.slots():
        for tier in range(tiers):
            index.apply_removed(slot, tier, array("Q", truth.tier(slot, tier).elements()))
    assert index.blocks == 0
    if isinstance(index, KernelIndex) and not kernel.UNAVAILABLE:
        assert index.sets == 0


@needs_kernel
@pytest.mark.parametrize("seed", range(12))
def test_kernel_and_twin_are_the_same_without_a_limit(seed: int):
    rng = random.Random(1000 + seed)
    slots = rng.choice([2, 70, 300])
    prompts = chains(rng, 40, 120)
    one, two = KernelIndex(), TwinIndex()
    for _ in range(400):
        op = random_op(rng, prompts, slots)
        do(one, op)
        do(two, op)
        prompt = array("Q", rng.choice(prompts))
        anywhere = rng.random() < 0.3
        assert one.lookup(prompt, anywhere=anywhere) == two.lookup(prompt, anywhere=anywhere)
        slot = rng.randrange(slots)
        assert one.counts(slot) == two.counts(slot)
        if rng.random() < 0.02:
            snapshot = one.snapshot(slot)
            other = rng.randrange(slots)
            one.load(other, snapshot)
            two.load(other, snapshot)
        if rng.random() < 0.02:
            one.remove_worker(slot)
            two.remove_worker(slot)
    one.sweep()
    two.sweep()
    assert one.blocks == two.blocks


@needs_kernel
@pytest.mark.parametrize("seed", range(12))
def test_kernel_and_twin_forget_the_same_blocks(seed: int):
    """Swept after each step, because when the dead are buried is the one thing they may do differently."""
    rng = random.Random(2000 + seed)
    slots, limit = rng.choice([2, 70]), rng.choice([2, 3, 50, 301, 1000])
    prompts = chains(rng, 60, 80)
    one, two = KernelIndex(limit=limit), TwinIndex(limit=limit)
    for _ in range(400):
        op = random_op(rng, prompts, slots)
        do(one, op)
        do(two, op)
        assert one.sweep() == two.sweep()
        prompt = array("Q", rng.choice(prompts))
        anywhere = rng.random() < 0.3
        assert one.lookup(prompt, anywhere=anywhere) == two.lookup(prompt, anywhere=anywhere)
        one.sweep()
        two.sweep()
        assert one.blocks == two.blocks <= limit
        slot = rng.randrange(slots)
        assert one.counts(slot) == two.counts(slot)
        assert [Counter(tier) for tier in one.snapshot(slot)] == [Counter(tier) for tier in two.snapshot(slot)]


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("make", makers())
def test_with_a_limit_nothing_is_overstated_and_the_sums_are_right(make, seed: int):
    """Never swept by hand here: held + forgotten is the engine's own count at every moment."""
    rng = random.Random(3000 + seed)
    prompts = chains(rng, 60, 80)
    index, truth = make(limit=200), Naive()
    for _ in range(600):
        operation, slot, tier, hashes = random_op(rng, prompts, 5)
        if operation == REMOVED:  # only what is held: an unknown removal is charged to the forgotten
            hashes = [key for key in dict.fromkeys(hashes) if truth.tier(slot, tier)[key]]
        if operation == CLEARED:
            continue
        do(index, (operation, slot, tier, hashes))
        truth.apply((operation, slot, tier, hashes))
        counts = index.counts(slot)
        assert sum(counts[:4]) + counts.forgotten - counts.unknown == sum(truth.counts(slot)[:4])
        prompt = rng.choice(prompts)
        expected = {row[0]: sum(row[1:]) for row in truth.run(prompt)}
        for found, *tiers in index.lookup(array("Q", prompt)):
            assert sum(tiers) <= expected[found]
    assert index.blocks <= 300
    assert index.counts(0).forgotten > 0
