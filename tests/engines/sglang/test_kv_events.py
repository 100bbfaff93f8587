"""KV events as SGLang sends them: payloads of real ones, gaps, repetitions, losses."""

from __future__ import annotations

import asyncio

import msgspec
import pytest

from holdfast.engines.sglang.kv_events import KEPT_EVENTS, Follower, KvInbox, events_of
from holdfast.kv.events import AllBlocksCleared, BlockRemoved, BlockStored

STORED = {
    "type": "BlockStored",
    "block_hashes": [-417077791187286087, 6891116056585394300],
    "parent_block_hash": None,
    "token_ids": list(range(32)),
    "block_size": 16,
    "lora_id": None,
    "medium": "GPU",
}


def payload(*events, rank=0):
    return msgspec.msgpack.encode([1795156106.8, list(events), rank])


def numbered(number):
    return payload({"type": "BlockRemoved", "block_hashes": [number], "medium": "GPU"})


def test_signed_hashes_become_unsigned():
    (event,) = events_of(payload(STORED), 0)
    assert event == BlockStored(
        ((-417077791187286087) % 2**64, 6891116056585394300), None, tuple(range(32)), 16, "GPU", 0
    )
    child = {**STORED, "parent_block_hash": -1, "lora_name": "cat", "cache_salt": "s"}
    (event,) = events_of(payload(child, rank=3), 0)
    assert (event.parent_hash, event.lora, event.salt, event.dp_rank) == (2**64 - 1, "cat", "s", 3)


def test_removed_cleared_and_unknown():
    events = events_of(
        payload({"type": "BlockRemoved", "block_hashes": [-1]}, {"type": "AllBlocksCleared"}, {"type": "X"}), 2
    )
    assert events == [BlockRemoved((2**64 - 1,), "GPU", 0), AllBlocksCleared(0)]


class Publisher:
    """Keeps the last messages, as SGLang's does."""

    def __init__(self, kept=1000):
        self.sent, self.kept, self.asked = [], kept, []

    def send(self, number):
        self.sent.append((number, numbered(number)))
        return self.sent[-1]

    async def replay(self, start):
        self.asked.append(start)
        return [one for one in self.sent[-self.kept :] if one[0] >= start]


@pytest.fixture
def told():
    return []


def numbers(told):
    return [event.block_hashes[0] if isinstance(event, BlockRemoved) else "cleared" for event in told]


async def test_in_order_nothing_is_asked_for(told):
    publisher = Publisher()
    follower = Follower(0, told.extend, publisher.replay)
    for number in range(5):
        await follower.take(*publisher.send(number))
    assert numbers(told) == [0, 1, 2, 3, 4]
    assert publisher.asked == []


async def test_a_gap_is_filled_in_order_and_what_comes_twice_counts_once(told):
    publisher = Publisher()
    follower = Follower(0, told.extend, publisher.replay)
    await follower.take(*publisher.send(0))
    publisher.send(1), publisher.send(2)
    third = publisher.send(3)
    await follower.take(*third)
    await follower.take(*third)
    assert numbers(told) == [0, 1, 2, 3]
    assert publisher.asked == [1]
    assert (follower.gaps, follower.lost) == (1, 0)


async def test_what_came_before_the_subscription_is_fetched(told):
    publisher = Publisher()
    for number in range(3):
        publisher.send(number)
    await Follower(0, told.extend, publisher.replay).take(*publisher.send(3))
    assert numbers(told) == [0, 1, 2, 3]


async def test_what_is_lost_for_good_clears_the_rank(told):
    publisher = Publisher(kept=2)
    follower = Follower(1, told.extend, publisher.replay)
    await follower.take(*publisher.send(0))
    for number in range(1, 9):
        publisher.send(number)
    await follower.take(*publisher.send(9))
    assert numbers(told) == [0, "cleared", 9]
    assert told[1].dp_rank == 1
    assert follower.lost == 1


async def test_a_publisher_that_does_not_answer_counts_as_lost(told, monkeypatch):
    monkeypatch.setattr("holdfast.engines.sglang.kv_events.REPLAY_SECONDS", 0.01)

    async def silent(_start):
        await asyncio.Event().wait()

    await Follower(0, told.extend, silent).take(7, numbered(7))
    assert numbers(told) == ["cleared", 7]


async def test_a_message_that_cannot_be_read_is_left_out(told):
    publisher = Publisher()
    follower = Follower(0, told.extend, publisher.replay)
    await follower.take(0, b"\xc1")
    await follower.take(1, payload({"type": "BlockStored"}))
    await follower.take(2, numbered(2))
    assert numbers(told) == [2]


def test_the_inbox_forgets_everything_when_nobody_takes_anything():
    inbox = KvInbox(2)
    one = [AllBlocksCleared(0)] * (KEPT_EVENTS - 1)
    inbox.add(one)
    inbox.add([BlockRemoved((1,)), BlockRemoved((2,))])
    assert inbox.take() == [AllBlocksCleared(0), AllBlocksCleared(1), BlockRemoved((1,)), BlockRemoved((2,))]
    assert inbox.take() == []
