"""What a prefix index must know and say, of both implementations."""

from __future__ import annotations

import random
import tracemalloc
from array import array

import pytest

from holdfast.kv import kernel
from holdfast.kv.choice import describe, implementation, new_index
from holdfast.kv.index import CLEARED, MAX_SLOTS, REMOVED, STORED, Counts, PrefixIndex
from holdfast.kv.tiers import Tier, tier_of

DEVICE, HOST, DISK = Tier
USES = ["python"] if kernel.UNAVAILABLE else ["python", "kernel"]
MAKERS = [pytest.param(use, id=use) for use in USES]


@pytest.fixture(params=MAKERS)
def use(request) -> str:
    return request.param


@pytest.fixture
def index(use) -> PrefixIndex:
    return new_index(use=use)


def keys(*numbers: int) -> array[int]:
    return array("Q", numbers)


def upto(count: int, start: int = 0) -> array[int]:
    return array("Q", range(start, start + count))


def drawn(count: int, seed: int = 0) -> array[int]:
    rng = random.Random(seed)
    return array("Q", (rng.getrandbits(64) for _ in range(count)))


def test_an_evicted_inner_block_ends_the_run(index):
    index.apply_stored(3, DEVICE, upto(100))
    index.apply_removed(3, DEVICE, keys(41))
    assert list(index.lookup(upto(100))) == [(3, 41, 0, 0)]
    assert list(index.lookup(upto(100), anywhere=True)) == [(3, 99, 0, 0)]


def test_the_run_goes_on_in_lower_tiers_from_where_the_upper_ends(index):
    index.apply_stored(1, DEVICE, upto(10))
    index.apply_stored(1, HOST, upto(30))
    index.apply_stored(1, DISK, upto(10, 28))
    index.apply_stored(2, DISK, upto(5))
    index.apply_stored(4, HOST, upto(7, 1))
    overlap = index.lookup(upto(50))
    assert list(overlap) == [(1, 10, 20, 8), (2, 0, 0, 5)]
    assert overlap.slots.tolist() == [1, 2]
    assert overlap.blocks(HOST).tolist() == [20, 0]
    assert overlap.of(2) == (0, 0, 5)
    assert overlap.of(4) == (0, 0, 0)
    assert index.lookup(upto(50), anywhere=True).of(1) == (10, 30, 10)


def test_a_tier_without_the_next_block_is_skipped(index):
    index.apply_stored(0, DEVICE, upto(4))
    index.apply_stored(0, HOST, upto(2))
    index.apply_stored(0, DISK, upto(9))
    assert index.lookup(upto(20)).of(0) == (4, 0, 5)


def test_copies_are_counted(index):
    index.apply_stored(5, DEVICE, upto(3))
    index.apply_stored(5, DEVICE, upto(3))
    index.apply_removed(5, DEVICE, upto(3))
    assert index.lookup(upto(3)).of(5) == (3, 0, 0)
    assert index.counts(5) == Counts(3, 0, 0, 0, 0, 0)
    index.apply_removed(5, DEVICE, upto(4))
    assert len(index.lookup(upto(3))) == 0
    assert index.counts(5).unknown == 1


def test_cleared_copies_do_not_come_back(index):
    """A slot that begins anew owes nothing to its earlier life, although the old counts are freed later."""
    index.apply_stored(5, DEVICE, upto(3))
    index.apply_stored(5, DEVICE, upto(3))
    index.clear(5)
    index.apply_stored(5, DEVICE, upto(3))
    index.apply_removed(5, DEVICE, upto(3))
    assert len(index.lookup(upto(3))) == 0
    index.sweep()
    assert index.blocks == 0


def test_one_tier_can_be_cleared(index):
    index.apply_stored(5, DEVICE, upto(3))
    index.apply_stored(5, HOST, upto(6))
    index.clear(5, DEVICE)
    assert index.lookup(upto(6)).of(5) == (0, 6, 0)
    index.clear(5)
    assert len(index.lookup(upto(6))) == 0


def test_what_is_cleared_is_given_back_by_later_events(index):
    for slot in range(8):
        index.apply_stored(slot, DEVICE, drawn(500, seed=slot))
    index.remove_worker(3)
    assert index.blocks == 4000
    for _ in range(100):
        index.apply_stored(0, DEVICE, keys(1))
    assert index.blocks == 3501
    assert not index.sweep(1)


def test_sweeping_in_small_steps_ends(index):
    index.apply_stored(0, DEVICE, drawn(1000))
    index.apply_stored(1, HOST, drawn(1000))
    index.remove_worker(0)
    steps = 0
    while index.sweep(100):
        steps += 1
    assert 5 <= steps <= 40
    assert index.lookup(drawn(1000)).of(1) == (0, 1000, 0)


def test_a_thousand_workers(index):
    prompt = drawn(64)
    for slot in range(1500):
        index.apply_stored(slot, DEVICE, prompt[: 1 + slot % 64])
    rows = list(index.lookup(prompt))
    assert rows == [(slot, 1 + slot % 64, 0, 0) for slot in range(1500)]
    for slot in range(0, 1500, 2):
        index.remove_worker(slot)
    assert index.lookup(prompt).slots.tolist() == list(range(1, 1500, 2))


def test_workers_that_come_and_go_do_not_need_more_and_more_memory(index):
    for life in range(300):
        for slot in range(4):
            index.apply_stored(slot, DEVICE, drawn(50, seed=life % 7))
        for slot in range(4):
            index.remove_worker(slot)
    before = index.bytes_used
    for life in range(3000):
        for slot in range(4):
            index.apply_stored(slot, DEVICE, drawn(50, seed=life % 7))
        for slot in range(4):
            index.remove_worker(slot)
    assert index.bytes_used < before * 1.5 + 20_000


def test_slices_look_at_no_more_than_they_are_told_and_find_what_stays(index):
    index.apply_stored(3, 0, array("Q", range(1, 101)))
    index.apply_stored(4, 0, array("Q", range(50, 151)))
    slices = index.slices(3, 0, 10)
    found = list(next(slices))
    index.apply_removed(3, 0, array("Q", range(1, 41)))
    index.apply_stored(3, 0, array("Q", range(200, 240)))  # perhaps in the places of those that went
    rest = [list(one) for one in slices]
    assert max(len(one) for one in (found, *rest)) <= 10
    everything = [*found, *(one for some in rest for one in some)]
    assert len(set(everything)) == len(everything)
    assert set(range(41, 101)) <= set(everything), "what was held all the while"
    assert not any(index.slices(9, 1, 10)), "nothing of nobody"
    with pytest.raises(ValueError, match="tier"):
        next(index.slices(3, 7, 10))


def test_a_snapshot_brings_another_index_to_the_same_knowledge(use, index):
    prompt = drawn(3000)
    index.apply_stored(9, DEVICE, prompt)
    index.apply_stored(9, DEVICE, prompt[:10])
    index.apply_stored(9, HOST, prompt[100:])
    index.apply_removed(9, DEVICE, prompt[1500:1600])
    snapshot = index.snapshot(9)
    assert [len(tier) for tier in snapshot] == [2910, 2900, 0]
    other = new_index(use=use)
    other.apply_stored(2, DISK, upto(5))
    other.load(2, snapshot)
    assert other.counts(2) == index.counts(9) == Counts(2900, 2900, 0, 10, 0, 0)
    assert other.lookup(prompt).of(2) == index.lookup(prompt).of(9) == (1500, 1500, 0)
    assert len(other.lookup(upto(5))) == 0
    assert index.snapshot(7) == (array("Q"), array("Q"), array("Q"))


def test_a_large_snapshot_is_taken_at_once_and_its_second_holder_is_cheap(use, index):
    hashes = drawn(70_000)
    snapshot = (hashes, hashes[:66_000], array("Q"))
    index.load(0, snapshot)
    once = index.bytes_used
    index.load(1, snapshot)
    assert index.bytes_used < once * 1.01
    assert index.blocks == 70_000
    part = hashes[60_000:68_000]
    assert list(index.lookup(part)) == [(0, 8000, 0, 0), (1, 8000, 0, 0)]
    assert index.snapshot(1) == snapshot
    index.apply_removed(0, DEVICE, hashes)
    index.apply_removed(0, HOST, hashes[:66_000])
    assert index.lookup(part).slots.tolist() == [1]


def test_events_in_one_call(index):
    events = array("Q", [STORED, 1, DEVICE, 4, STORED, 2, HOST, 2, REMOVED, 1, DEVICE, 1, CLEARED, 2, HOST, 0])
    index.apply(events, keys(1, 2, 3, 4, 1, 2, 3))
    assert list(index.lookup(upto(4, 1))) == [(1, 2, 0, 0)]
    assert index.counts(2) == Counts(0, 0, 0, 0, 0, 0)


@pytest.mark.parametrize(
    "events",
    [
        [STORED, 1, DEVICE, 2],
        [STORED, 1, DEVICE, 4],
        [STORED, 1, DEVICE, 1, STORED, 1, DEVICE, 1],
        [STORED, MAX_SLOTS, DEVICE, 3],
        [STORED, 1, 3, 3],
        [3, 1, DEVICE, 3],
        [CLEARED, 1, DEVICE, 3],
        [STORED, 1, DEVICE],
        [STORED, 1, DEVICE, 3, 0],
    ],
)
def test_a_wrong_batch_changes_nothing(index, events):
    with pytest.raises(ValueError):  # noqa: PT011 - the two implementations word it differently
        index.apply(array("Q", events), keys(1, 2, 3))
    assert index.blocks == 0


@pytest.mark.parametrize(("slot", "tier"), [(-1, 0), (MAX_SLOTS, 0), (0, 3), (0, -1)])
def test_wrong_slots_and_tiers_are_refused(index, slot, tier):
    for call in (index.apply_stored, index.apply_removed):
        with pytest.raises(ValueError, match="is not in 0"):
            call(slot, tier, keys(1))
    with pytest.raises(ValueError, match="is not in 0"):
        index.clear(slot, tier)


def test_buffers_of_any_kind_are_taken(index):
    data = drawn(20).tobytes()
    index.apply_stored(0, DEVICE, data)
    index.apply_stored(1, DEVICE, memoryview(data)[8:])
    odd = memoryview(b"x" + data)[1:]
    assert index.lookup(odd).of(0) == (20, 0, 0)
    assert index.lookup(memoryview(drawn(20))[1:]).of(1) == (19, 0, 0)
    assert len(index.lookup(b"")) == 0
    with pytest.raises(ValueError, match="no multiple of 8"):
        index.lookup(data[:-1])


def test_the_most_recently_used_half_of_the_limit_is_never_forgotten(use):
    index = new_index(limit=1000, use=use)
    hot, cold = drawn(100, seed=1), drawn(100, seed=2)
    index.apply_stored(0, DEVICE, hot)
    index.apply_stored(1, DEVICE, cold)
    for round_ in range(50):
        index.apply_stored(2, DEVICE, drawn(200, seed=10 + round_))
        assert index.lookup(hot).of(0) == (100, 0, 0)
        index.sweep()
        assert index.blocks <= 1000
    assert len(index.lookup(cold)) == 0
    assert index.counts(1) == Counts(0, 0, 0, 0, 100, 0)
    index.apply_removed(1, DEVICE, cold)
    assert index.counts(1) == Counts(0, 0, 0, 0, 0, 0)


def test_a_prompt_larger_than_the_limit_keeps_its_beginning_when_asked_for(use):
    index = new_index(limit=100, use=use)
    prompt = drawn(80)
    index.apply_stored(0, DEVICE, prompt)
    for _ in range(5):
        assert index.lookup(prompt).of(0)[0] >= 50
        index.sweep()
    assert index.blocks <= 100


def test_a_match_that_turns_the_generations_twice_revives_only_what_passed_its_time_once(use):
    index = new_index(limit=8, use=use)
    index.apply_stored(0, DEVICE, keys(1, 2, 3, 4))
    index.apply_stored(0, DEVICE, keys(11, 12, 13, 14))
    assert index.lookup(keys(14, 3, 2, 13, 12, 11, 1)).of(0) == (7, 0, 0)
    index.sweep()
    assert sorted(index.snapshot(0)[0]) == [1, 2, 11, 12, 13, 14]
    assert index.counts(0).forgotten == 2


@pytest.mark.parametrize("limit", [-1, 1])
def test_a_limit_too_small_is_refused(use, limit):
    with pytest.raises((ValueError, OverflowError)):
        new_index(limit=limit, use=use)


def test_memory_is_accounted_for_and_small(use):
    """Bytes used is what the allocator says (twin), and within the goals of 40 and 120 bytes for a block's holder."""
    blocks = 200_000
    hashes = drawn(blocks)
    tracemalloc.start()
    index = new_index(use=use)
    before = index.bytes_used
    for at in range(0, blocks, 1000):
        index.apply_stored(at % 64, DEVICE, hashes[at : at + 1000])
    traced = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    used = index.bytes_used - before
    assert used / blocks <= (40 if use == "kernel" else 120)
    if use == "python":
        assert traced * 0.8 < index.bytes_used < traced * 1.3


def test_what_runs_is_said():
    assert implementation() == ("python" if kernel.UNAVAILABLE else "kernel")
    assert ("compiled kernel" in describe()) is not bool(kernel.UNAVAILABLE)
    if kernel.UNAVAILABLE:
        with pytest.raises(RuntimeError, match=r"no compiled KV index"):
            new_index(use="kernel")


@pytest.mark.parametrize(
    ("medium", "tier"),
    [("GPU", DEVICE), ("cpu_pinned", HOST), ("CPU_TIER2", DISK), ("NVME", DISK), ("EXTERNAL", None), ("?", None)],
)
def test_mediums_of_engines(medium, tier):
    assert tier_of(medium) is tier
