"""Slots and blocks: what is reused, what is lost, and that the events tell it."""

import random

import pytest

from holdfast.engines.llamacpp import slots
from holdfast.engines.llamacpp.slots import SlotCache, common_prefix
from holdfast.kv.events import AllBlocksCleared, BlockRemoved, BlockStored
from holdfast.kv.hashes import block_hashes
from tests.engines.mock.test_mock_cache import replay

pytestmark = pytest.mark.llamacpp
SIZE = 4


class Memory:
    """What the slots really hold, as llama.cpp would have it."""

    def __init__(self, count):
        self.content = [[] for _ in range(count)]

    def truncate(self, slot, length):
        del self.content[slot][length:]

    def copy(self, source, target, length):
        self.content[target] = self.content[source][:length]


class Cache(SlotCache):
    def __init__(self, count=3):
        self.memory = Memory(count)
        super().__init__(self.memory, slots=count, block_size=SIZE)

    def run(self, tokens, scope=None):
        """Start, compute and end a sequence; returns how many tokens were reused."""
        slot = self.acquire(tokens, scope)
        reused = self.compute(slot, tokens)
        self.release(slot)
        return reused

    def compute(self, slot, tokens):
        reused = len(slot.tokens)
        assert self.memory.content[slot.index] == slot.tokens == tokens[:reused]
        self.memory.content[slot.index].extend(tokens[reused:])
        self.extend(slot, tokens[reused:])
        return reused


def test_common_prefix():
    for length in (0, 1, 63, 64, 65, 200):
        a = list(range(length))
        assert common_prefix(a, a) == length
        assert common_prefix([*a, 1, 2], [*a, 3]) == length


def test_a_parked_prefix_is_taken_over_and_the_last_token_is_always_computed():
    cache = Cache()
    tokens = list(range(20))
    assert cache.run(tokens) == 0
    assert cache.run(tokens) == 19
    assert cache.run([*tokens, 50, 51]) == 20


def test_a_running_prefix_is_copied():
    cache = Cache()
    first = cache.acquire(list(range(20)), None)
    cache.compute(first, list(range(20)))
    second = cache.acquire([*range(12), 99, 98], None)
    assert second is not first
    assert cache.compute(second, [*range(12), 99, 98]) == 12
    assert cache.used_blocks == 5 + 4


def test_scopes_never_share():
    cache = Cache()
    tokens = list(range(20))
    cache.run(tokens, "a")
    assert cache.run(tokens, "b") == 0
    assert cache.run(tokens, "a") == 19
    stored = [e for e in cache.take_events() if isinstance(e, BlockStored)]
    assert stored[0].block_hashes == tuple(block_hashes(tokens, SIZE, salt="a"))
    assert not set(stored[0].block_hashes) & set(stored[1].block_hashes)


def test_a_divergent_tail_keeps_the_parked_copy_while_there_is_room():
    cache = Cache()
    cache.run(list(range(20)))
    assert cache.run([*range(8), *range(100, 110)]) == 8
    assert cache.run(list(range(20))) == 19


def test_all_busy_is_none_and_the_oldest_is_evicted_first():
    cache = Cache(2)
    cache.run([1] * 9)
    cache.run([2] * 9)
    a = cache.acquire([3] * 9, None)
    assert cache.memory.content[a.index] == []
    assert cache.run([2] * 9) == 8
    b = cache.acquire([4] * 9, None)
    assert cache.acquire([5] * 9, None) is None
    cache.release(b)
    assert cache.drop_parked() == 0
    assert cache.acquire([5] * 9, None) is b


def test_a_block_in_two_slots_is_stored_once_and_removed_with_the_last_copy():
    cache = Cache()
    one, two = cache.acquire([1] * 9, None), cache.acquire([1] * 9, None)
    cache.compute(one, [1] * 9)
    cache.compute(two, [1] * 9)
    names = tuple(block_hashes([1] * 9, SIZE))
    assert cache.take_events() == [BlockStored(names, None, (1,) * 8, SIZE)]
    cache.release(one)
    cache.drop_parked()
    assert cache.take_events() == []
    cache.release(two)
    cache.drop_parked()
    assert cache.take_events() == [BlockRemoved(names[::-1])]


def test_blocks_that_fill_one_by_one_name_their_parent():
    cache = Cache()
    slot = cache.acquire([7] * 9, None)
    for token in [7] * 9:
        cache.extend(slot, [token])
    first, second = cache.take_events()
    assert (first.parent_hash, second.parent_hash) == (None, first.block_hashes[0])
    assert [*first.block_hashes, *second.block_hashes] == list(block_hashes([7] * 9, SIZE))


@pytest.mark.parametrize("limit", [10_000, 7])
def test_events_always_describe_the_cache(monkeypatch, limit):
    """Random traffic; also when nobody fetches and the backlog is replaced by a snapshot."""
    monkeypatch.setattr(slots, "EVENTS_KEPT", limit)
    rng = random.Random(limit)
    cache, view, busy = Cache(5), set(), []
    for step in range(600):
        tokens = [rng.randrange(2) for _ in range(rng.randrange(1, 24))]
        slot = cache.acquire(tokens, rng.choice([None, "s"]))
        if slot is None or (busy and rng.random() < 0.3):
            cache.release(busy.pop(rng.randrange(len(busy))))
        if slot is not None:
            cache.compute(slot, tokens)
            busy.append(slot)
        if rng.random() < 0.05:
            cache.drop_parked()
        if step % 10 == 0:
            events = cache.take_events()
            assert limit > 100 or len(events) <= limit + 12
            replay(None, events, view)
            assert view == {name for one in cache._slots for name in one.hashes}
    assert limit > 100 or not isinstance(cache.take_events(), AllBlocksCleared)
