"""Blocks are shared, kept, evicted in order, and every change is told."""

import random

from holdfast.engines.mock.cache import BlockPool
from holdfast.kv.events import AllBlocksCleared, BlockRemoved, BlockStored
from holdfast.kv.hashes import block_hashes


def fill(pool, tokens):
    """Compute a whole prefix; returns the names held."""
    names = block_hashes(tokens, pool.block_size)
    found = pool.match(names)
    pool.hold(names[:found])
    assert pool.take(len(names) - found)
    pool.seal(names[found:], names[found - 1] if found else None, tokens[found * pool.block_size :])
    return names


def replay(pool, events, view=None):
    """Return what a watcher of the events believes is cached, checking that parents come first."""
    view = set() if view is None else view
    for event in events:
        if isinstance(event, BlockStored):
            assert event.parent_hash is None or event.parent_hash in view
            assert len(event.token_ids) == len(event.block_hashes) * event.block_size
            view.update(event.block_hashes)
        elif isinstance(event, BlockRemoved):
            view.difference_update(event.block_hashes)
        else:
            assert isinstance(event, AllBlocksCleared)
            view.clear()
    return view


def test_equal_prefixes_share_blocks():
    pool = BlockPool(10, 4)
    first = fill(pool, list(range(16)))
    second = fill(pool, [*range(12), 99, 99, 99, 99])
    assert pool.used == 5
    pool.release(first, 0)
    assert pool.used == 4
    pool.release(second, 0)
    assert (pool.used, pool.cached, pool.available) == (0, 5, 10)


def test_the_end_of_the_least_recent_prefix_goes_first():
    pool = BlockPool(4, 4)
    old = fill(pool, list(range(8)))
    new = fill(pool, list(range(100, 108)))
    pool.release(old, 0)
    pool.release(new, 0)
    assert pool.take(1)
    assert pool.match(old) == 1
    assert pool.match(new) == 2


def test_held_blocks_are_never_evicted():
    pool = BlockPool(4, 4)
    fill(pool, list(range(12)))
    assert pool.take(1)
    assert not pool.take(1)


def test_a_block_sealed_twice_frees_the_copy():
    pool = BlockPool(10, 4)
    names = block_hashes(range(4), 4)
    assert pool.take(2)
    pool.seal(names, None, list(range(4)))
    pool.seal(names, None, list(range(4)))
    assert pool.used == 1
    assert [type(e) for e in pool.take_events()] == [BlockStored]


def test_events_rebuild_the_cache_under_random_use():
    rng = random.Random(4)
    pool = BlockPool(40, 4)
    view, held = set(), []
    for _ in range(600):
        if held and (rng.random() < 0.5 or len(held) > 4):
            pool.release(held.pop(rng.randrange(len(held))), 0)
        else:
            length = 4 * rng.randint(1, 6)
            held.append(fill(pool, [rng.randint(0, 1) for _ in range(length)]))
        if rng.random() < 0.2:
            view = replay(pool, pool.take_events(), view)
            assert view == set(pool._sealed)
        assert pool.used + pool.available == pool.total
    assert len(pool._sealed) <= 40


def test_a_late_consumer_gets_a_snapshot():
    pool = BlockPool(3, 1)
    for token in range(9_000):
        pool.release(fill(pool, [token]), 0)
    events = pool.take_events()
    assert isinstance(events[0], AllBlocksCleared)
    assert replay(pool, events, {1, 2, 3}) == set(pool._sealed)


def test_without_reuse_nothing_stays():
    pool = BlockPool(10, 4, reuse=False)
    names = fill(pool, list(range(8)))
    pool.release(names, 0)
    assert pool.cached == 0


def test_a_cleared_cache_keeps_what_is_in_use():
    pool = BlockPool(20, 4)
    used, idle = fill(pool, list(range(16))), fill(pool, list(range(100, 116)))
    pool.release(idle, 0)
    view = replay(pool, pool.take_events())
    assert len(view) == 8
    pool.clear()
    events = pool.take_events()
    assert isinstance(events[0], AllBlocksCleared)
    assert replay(pool, events, view) == set(used) == set(pool._sealed)
    assert (pool.used, pool.available, pool.match(idle)) == (4, 16, 0)
