"""vLLM's KV events as they were recorded, in both forms, with gaps, copies and salts. Needs no vLLM."""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec
import pytest

from holdfast.engines.vllm.events import Follower, Reader, as_map, hash_of
from holdfast.kv.events import AllBlocksCleared, BlockRemoved, BlockStored, KvEvent
from holdfast.kv.hashes import block_hashes
from holdfast.worker.kv_log import KvLog
from tests.worker.test_kv_log import contents

TOKENS = list(range(100, 164))


def stored(*hashes: int, parent: int | None = None, tokens: list[int] | None = None, **more: Any) -> dict[str, Any]:
    return {
        "type": "BlockStored", "block_hashes": list(hashes), "parent_block_hash": parent,
        "token_ids": TOKENS[: 32 * len(hashes)] if tokens is None else tokens, "block_size": 32, "lora_id": None,
        "medium": "GPU", "lora_name": None, "extra_keys": [None] * len(hashes), "group_idx": 0,
        "kv_cache_spec_kind": "full_attention", **more,
    }  # fmt: skip


def test_maps_and_the_older_arrays_mean_the_same() -> None:
    array = ["BlockStored", [1, 2], None, TOKENS, 32, None, "GPU", None]
    assert Reader(0).read([array]) == Reader(0).read([stored(1, 2)])
    assert Reader(3).read([["BlockRemoved", [7], "CPU"], ["AllBlocksCleared"]]) == [
        BlockRemoved((7,), "CPU", 3),
        AllBlocksCleared(3),
    ]
    assert Reader(0).read([["BlockStored", [1], None, TOKENS[:32], 32]]) == Reader(0).read([stored(1)])
    with pytest.raises(ValueError, match="tag"):
        as_map([])


def test_hashes_are_unsigned_whatever_they_came_as() -> None:
    assert hash_of(-1) == 2**64 - 1
    assert hash_of(5) == 5
    assert hash_of(b"\x00\x00\x00\x00\x00\x00\x01\x00rest") == 256


def test_what_cannot_be_understood_is_left_out_and_the_rest_goes_on(caplog: pytest.LogCaptureFixture) -> None:
    said = [{"type": "Strange", "block_hashes": []}, {"no": "tag"}, [], ["BlockStored"], stored(1)]
    assert len(Reader(0).read(said)) == 1
    assert "cannot be understood" in caplog.text


def test_blocks_of_others_and_of_sliding_windows_are_ignored() -> None:
    reader = Reader(0)
    assert reader.read([stored(1, group_idx=1), stored(2, locality="REMOTE")]) == []
    assert reader.ignored == 2


def test_a_salt_holds_along_the_chain_until_the_block_goes() -> None:
    reader = Reader(0)
    first = stored(1, extra_keys=[["tenant"]])
    second = stored(2, parent=1, tokens=TOKENS[32:])
    (one, two) = reader.read([first, second])
    assert isinstance(one, BlockStored)
    assert isinstance(two, BlockStored)
    assert (one.salt, two.salt) == ("tenant", "tenant")
    log = KvLog(1, 32, native=False)
    log.take([one, two])
    ((_, _, hashes),) = contents(log)
    assert sorted(hashes) == sorted(block_hashes(TOKENS, 32, salt="tenant"))
    reader.read([{"type": "BlockRemoved", "block_hashes": [1, 2], "medium": "GPU"}])
    assert reader._salts == {}


def test_an_adapters_name_is_no_salt() -> None:
    (plain, salted) = Reader(0).read(
        [
            stored(1, lora_name="poet", extra_keys=[["poet"]]),
            stored(2, lora_name="poet", extra_keys=[["poet", "tenant"]]),
        ]
    )
    assert isinstance(plain, BlockStored)
    assert isinstance(salted, BlockStored)
    assert (plain.lora, plain.salt) == ("poet", None)
    assert (salted.lora, salted.salt) == ("poet", "tenant")


def test_a_block_that_is_stored_several_times_is_gone_after_as_many_removals() -> None:
    log = KvLog(1, 32, native=False)
    reader = Reader(0)
    log.take(reader.read([stored(1), stored(1), stored(1)]))
    removal = {"type": "BlockRemoved", "block_hashes": [1], "medium": "GPU"}
    for left in (1, 1, 0):
        log.take(reader.read([removal]))
        assert log.blocks == left


class Publisher:
    """What a follower's sockets would say, without ZMQ: messages by number, some forgotten."""

    def __init__(self, follower: Follower):
        self.follower = follower
        self.kept: dict[int, bytes] = {}
        self.asked: list[int] = []
        follower._catch_up = self.catch_up  # type: ignore[method-assign]

    def batch(self, number: int) -> bytes:
        return msgspec.msgpack.encode([0.0, [stored(number + 1)], 0])

    async def catch_up(self, _context: object) -> None:
        self.asked.append(self.follower._order.next)
        for number, payload in sorted(self.kept.items()):
            if self.follower._order.judge(number) == "gap":
                self.follower._lost(number)
            if self.follower._order.judge(number) == "due":
                self.follower._accept(number, payload)

    async def say(self, number: int) -> None:
        self.kept[number] = self.batch(number)
        await self.follower._heard(None, [b"kv", number.to_bytes(8, "big"), self.kept[number]])


def names(events: list[KvEvent]) -> list[int | str]:
    return [event.block_hashes[0] - 1 if isinstance(event, BlockStored) else "cleared" for event in events]


async def test_a_gap_is_filled_by_replay_and_nothing_comes_twice() -> None:
    told: list[KvEvent] = []
    follower = Follower(0, "", "", "kv", told.extend)
    publisher = Publisher(follower)
    await publisher.say(0)
    publisher.kept.update({1: publisher.batch(1), 2: publisher.batch(2)})
    await publisher.say(3)
    await publisher.say(2)  # late
    await publisher.say(4)
    assert names(told) == [0, 1, 2, 3, 4]
    assert (publisher.asked, follower.gaps, follower.losses) == ([1], 1, 0)


async def test_what_is_forgotten_empties_the_rank() -> None:
    told: list[KvEvent] = []
    follower = Follower(0, "", "", "kv", told.extend)
    publisher = Publisher(follower)
    await publisher.say(0)
    await publisher.say(7)
    assert names(told) == [0, "cleared", 7]
    assert (follower.gaps, follower.losses) == (1, 1)


async def test_a_broken_message_is_passed_over(caplog: pytest.LogCaptureFixture) -> None:
    told: list[KvEvent] = []
    follower = Follower(0, "", "", "kv", told.extend)
    await follower._heard(None, [b"kv", (0).to_bytes(8, "big"), b"\xc1"])
    await follower._heard(None, [b"kv", (1).to_bytes(8, "big"), Publisher(follower).batch(1)])
    assert names(told) == [1]
    assert "cannot be read" in caplog.text


async def test_a_follower_that_is_cancelled_lets_its_sockets_go() -> None:
    zmq = pytest.importorskip("zmq", reason="pyzmq comes with vLLM; make test-vllm runs this")
    assert zmq
    follower = Follower(0, "ipc:///nonexistent/a", "ipc:///nonexistent/b", "kv", lambda _: None)
    task = asyncio.ensure_future(follower.run())
    await asyncio.sleep(0.05)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
