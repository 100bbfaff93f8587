"""Full blocks are told, partial ones never; a gap clears; windows and levels are kept apart."""

from __future__ import annotations

import asyncio

import pytest

from holdfast.engines.trtllm.kv_events import EventReader
from holdfast.kv.events import AllBlocksCleared, BlockRemoved, BlockStored
from tests.engines.conformance.recorder import Recorder
from tests.engines.conformance.subjects.trtllm import STAND_IN as SUBJECT

WIDE, NARROW = 4096, 512


class Feed:
    def __init__(self, block_size=4):
        self.reader = EventReader(block_size)
        self.next = 0

    def say(self, data, *, window=WIDE, rank=None, skip=0):
        event = {"event_id": self.next + skip, "data": data, "window_size": window}
        self.next += skip + 1
        if rank is not None:
            event["attention_dp_rank"] = rank
        return self.reader.read(event)


def block(name, tokens, level=0):
    return {"block_hash": name, "tokens": [{"token_id": token} for token in tokens], "cache_level": level}


def stored(*blocks, parent=None, **more):
    return {"type": "stored", "parent_hash": parent, "blocks": list(blocks), **more}


@pytest.fixture
def feed():
    made = Feed()
    assert made.say({"type": "created", "num_blocks_per_cache_level": [9, 0]}) == []
    return made


def test_full_blocks_are_told_and_partial_ones_dropped_with_their_removal(feed):
    told = feed.say(stored(block(2**64 - 1, [1, 2, 3, 4]), block(11, [5, 6])))
    assert told == [BlockStored((2**64 - 1,), None, (1, 2, 3, 4), 4)]
    assert feed.say({"type": "removed", "block_hashes": [11]}) == []
    assert feed.say({"type": "removed", "block_hashes": [2**64 - 1]}) == [BlockRemoved((2**64 - 1,))]
    assert feed.say(stored(block(12, [1]))) == []


def test_signed_hashes_are_the_same_blocks(feed):
    feed.say(stored(block(2**64 - 5, [1, 2, 3, 4])))
    (child,) = feed.say(stored(block(7, [5, 6, 7, 8]), parent=-5))
    assert child.parent_hash == 2**64 - 5
    assert feed.say({"type": "removed", "block_hashes": [-5]}) == [BlockRemoved((2**64 - 5,))]


def test_lora_salt_rank_and_level_come_along(feed):
    (told,) = feed.say(stored(block(3, [1, 2, 3, 4], level=1), lora_name="a", cache_salt="s"), rank=2)
    assert (told.lora, told.salt, told.dp_rank, told.medium) == ("a", "s", 2, "CPU")


def test_a_gap_clears_what_was_told_and_what_hangs_on_it_is_dropped(feed):
    feed.say(stored(block(3, [1, 2, 3, 4])))
    told = feed.say(stored(block(4, [5, 6, 7, 8]), parent=3), skip=2)
    assert told == [AllBlocksCleared()]
    assert feed.reader.lost == 2
    assert feed.say(stored(block(9, [1, 2, 3, 4])))[0].block_hashes == (9,)
    assert feed.say({"type": "removed", "block_hashes": [3]}) == [], "it is not known any more"


def test_ranks_are_counted_apart():
    feed = Feed()
    first = {"event_id": 0, "data": stored(block(3, [1, 2, 3, 4])), "attention_dp_rank": 0}
    assert feed.reader.read(first)
    assert feed.reader.read({**first, "attention_dp_rank": 1})[0].dp_rank == 1
    assert feed.reader.lost == 0


def test_only_the_widest_window_counts(feed):
    feed.say({"type": "created", "num_blocks_per_cache_level": [9, 0]}, window=NARROW)
    assert feed.say(stored(block(3, [1, 2, 3, 4])), window=NARROW) == []
    assert feed.say(stored(block(3, [1, 2, 3, 4])), window=WIDE) != []


def test_a_block_that_leaves_the_device_is_gone(feed):
    feed.say(stored(block(3, [1, 2, 3, 4])))
    moved = {"type": "updated", "block_hash": 3, "cache_level": {"new_value": 1, "old_value": 0}}
    assert feed.say(moved) == [BlockRemoved((3,))]
    assert feed.say({"type": "updated", "block_hash": 3, "priority": {"new_value": 1, "old_value": 0}}) == []
    assert feed.say({"type": "removed", "block_hashes": [3]}) == []


async def test_events_that_come_when_nothing_is_submitted_any_more_are_read():
    """The package's queue of events ends when it was once empty, until the next request; the adapter reads on."""
    run = await Recorder(SUBJECT).start()
    try:
        await run.one("Tell me about rivers.", 2)
        await asyncio.sleep(0.2)
        run.engine.take_kv_events()
        run.engine.llm._pool.compute([*range(1000, 1016)])
        await run.until("the late event", lambda: bool(run.engine.take_kv_events()))
    finally:
        await run.engine.close()
