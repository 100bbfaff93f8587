"""Whatever happens to KV events on their way, a frontend's index comes to equal the engine's cache, and says so."""

from __future__ import annotations

import asyncio
import logging
from array import array

import msgspec
import pytest

from holdfast.kv.feed import DECODER, Beat, Complete, Deltas, Opening, Part, Subscribe
from holdfast.routing.knowledge import PrefixKnowledge, WorkerKnowledge, _at_least
from holdfast.routing.knowledge_config import KnowledgeSettings
from holdfast.routing.knowledge_feed import WINDOW, Feed
from holdfast.routing.knowledge_keeper import SILENT_SECONDS
from holdfast.worker.kv_config import KvPublishConfig
from tests.support.kv_world import SIZE, Front, KvWorld, Mangler, Member, card
from tests.support.virtual_time import virtual

PROMPT = array("Q", range(1, 9))


async def settle(seconds: float = 0.1) -> None:
    await asyncio.sleep(seconds)


# ---- the interface ----


def test_a_worker_that_tells_nothing_is_known_by_the_decisions_for_it():
    knowledge = PrefixKnowledge(KnowledgeSettings(router_ttl=10.0))
    assert knowledge.state_of("w1") == "none"
    knowledge.attach(Member(1, endpoints=()))
    assert knowledge.state_of("w1") == "approximate"
    knowledge.decided("w1", 0, PROMPT, 0.0)
    assert list(knowledge.lookup(PROMPT, SIZE, 9.0)) == [("w1", 0, 8, 0, 0)]
    assert knowledge.lookup(PROMPT[:3], SIZE, 9.0).of("w1") == (3, 0, 0)
    assert len(knowledge.lookup(PROMPT, SIZE + 1, 9.0)) == 0
    assert len(knowledge.lookup(PROMPT, SIZE, 10.5)) == 0


def test_decisions_count_only_as_far_as_the_capacity_goes():
    knowledge = PrefixKnowledge()
    knowledge.attach(Member(1))
    knowledge.decided("w1", 0, array("Q", range(1, 2001)), 0.0)
    assert knowledge.lookup(array("Q", range(1, 2001)), SIZE, 1.0).of("w1") == (1000, 0, 0)


def exact(knowledge: PrefixKnowledge, instance: str = "w1") -> WorkerKnowledge:
    known = knowledge.attach(Member(1, instance=instance))
    assert known is not None
    known.synchronised()
    return known


def test_ranks_and_workers_are_told_apart():
    knowledge = PrefixKnowledge()
    exact(knowledge).store(1, 0, PROMPT[:2])
    exact(knowledge, "w2").store(0, 0, PROMPT[:5])
    found = knowledge.lookup(PROMPT, SIZE, 0.0)
    assert sorted(found) == [("w1", 1, 2, 0, 0), ("w2", 0, 5, 0, 0)]
    assert found.of("w1", 0) == (0, 0, 0)
    knowledge.detach(Member(1, instance="w2"))
    assert sorted(knowledge.lookup(PROMPT, SIZE, 0.0)) == [("w1", 1, 2, 0, 0)]
    exact(knowledge, "w3")
    assert sorted(knowledge.lookup(PROMPT, SIZE, 0.0)) == [("w1", 1, 2, 0, 0)], "a slot that is used again is empty"


def test_decisions_beside_events_count_for_a_moment_only_where_they_are_wanted():
    for ttl, blocks in ((0.0, 2), (3.0, 8)):
        knowledge = PrefixKnowledge(KnowledgeSettings(router_predicted_ttl=ttl))
        exact(knowledge).store(0, 0, PROMPT[:2])
        knowledge.decided("w1", 0, PROMPT, 1.0)
        assert knowledge.lookup(PROMPT, SIZE, 2.0).of("w1") == (blocks, 0, 0)
        assert knowledge.lookup(PROMPT, SIZE, 5.0).of("w1") == (2, 0, 0)


def test_what_was_guessed_is_dropped_when_the_truth_is_there():
    knowledge = PrefixKnowledge()
    known = knowledge.attach(Member(1))
    assert known is not None
    knowledge.decided("w1", 0, PROMPT, 1.0)
    known.store(0, 0, PROMPT[:1])
    known.synchronised()
    assert knowledge.lookup(PROMPT, SIZE, 1.0).of("w1") == (1, 0, 0)


@pytest.mark.parametrize(
    ("tiers", "blocks", "together"),
    [
        ((4, 3, 2), 2, (4, 3, 2)),
        ((4, 3, 2), 6, (6, 1, 2)),
        ((4, 3, 2), 8, (8, 0, 1)),
        ((4, 3, 2), 20, (20, 0, 0)),
        ((0, 0, 0), 5, (5, 0, 0)),
    ],
)
def test_the_larger_of_known_and_guessed(tiers, blocks, together):
    assert _at_least(tiers, blocks) == together


def test_a_worker_whose_block_size_changes_begins_anew():
    knowledge = PrefixKnowledge()
    exact(knowledge).store(0, 0, PROMPT)
    member = Member(2)
    member.record = msgspec.structs.replace(member.record, cards=(card(8),))
    knowledge.attach(member)
    assert knowledge.state_of("w1") == "approximate"
    assert len(knowledge.lookup(PROMPT, SIZE, 0.0)) == 0


# ---- following ----


@virtual
async def test_a_frontend_knows_what_was_there_and_what_comes():
    async with KvWorld() as world:
        for _ in range(5):
            world.site.cache.fill(world.prompt(20))
        world.site.step()
        assert await world.front.until_right() < 0.5
        assert len(world.front.held) > 40
        names = world.site.cache.fill(world.prompt(30))
        world.site.step()
        await settle(0.05)
        assert world.front.right
        assert world.front.knowledge.lookup(names, SIZE, 0.0).of("w1") == (30, 0, 0)
        late = await world.join()
        await late.until_right()
        assert late.knowledge.tally.resynchronisations == {"joined": 1}
        assert world.site.publisher.subscribers == 2


@virtual
async def test_eviction_and_reset_reach_the_frontend():
    async with KvWorld() as world:
        for _ in range(40):
            world.site.cache.fill(world.prompt(30))
            world.site.step()
        await settle()
        assert world.front.right
        assert len(world.front.held) == 400
        world.site.cache.pool.clear()
        world.site.step()
        await settle()
        assert (world.front.right, len(world.front.held)) == (True, 0)


@virtual
async def test_a_broken_connection_goes_on_by_sequence_and_keeps_what_is_known():
    async with KvWorld() as world:
        world.site.cache.fill(world.prompt(50))
        world.site.step()
        front = world.front
        await front.until_right()
        before = front.held
        link = front.member.link
        front.member.link, front.member.state = None, "suspect"
        await link.close()
        await settle()
        assert (front.state, front.held) == ("resynchronising", before)
        world.site.cache.fill(world.prompt(9))
        world.site.step()
        opened = []
        world.site.mangle = lambda message: opened.append(message) or [message]
        await front.connect()
        await front.until_right()
        assert [(type(m), m.snapshot) for m in opened if isinstance(m, Opening)] == [(Opening, False)]
        assert front.knowledge.tally.resynchronisations == {"joined": 1, "broken": 1}


@virtual
async def test_blocks_do_not_survive_a_restart_on_the_same_address():
    async with KvWorld() as world:
        old = world.site.cache.fill(world.prompt(40))
        world.site.step()
        await world.front.until_right()
        await world.restart()
        assert world.front.held == frozenset(), "as soon as the new start is known"
        assert len(world.front.knowledge.lookup(old, SIZE, 0.0)) == 0
        world.site.cache.fill(world.prompt(7))
        world.site.step()
        await world.front.until_right()
        assert not world.front.held & set(old[3:])


@virtual
async def test_an_epoch_that_only_the_worker_knows_of_clears_too():
    """Discovery and pool say nothing of a new start; the worker's own word decides."""
    async with KvWorld() as world:
        world.site.cache.fill(world.prompt(40))
        world.site.step()
        front = world.front
        await front.until_right()
        front.pool.members.clear()
        await world.site.stop()
        await world.site.start()
        front.site.epoch -= 1  # what the pool is told
        await front.connect()
        front.site.epoch += 1
        await front.until_right()
        assert (front.held, front.knowledge.tally.resynchronisations["new_epoch"]) == (frozenset(), 1)


@virtual
async def test_a_worker_that_is_gone_is_forgotten_in_the_middle_of_its_snapshot():
    async with KvWorld() as world:
        front = world.front
        await front.until_right()
        world.site.cache.pool.total = 100_000
        world.site.cache.fill(world.prompt(60_000))
        world.site.step()
        late = await world.join()
        while not 0 < len(late.held) < 60_000:
            await settle(0.0005)
        late.leave()
        assert (late.state, late.knowledge.all_known()) == ("none", [])
        await settle(1.0)
        assert late.knowledge.blocks == 0 or late.knowledge.known("w1") is None
        assert world.site.publisher.subscribers == 1
        await front.until_right()


@virtual
async def test_a_snapshot_while_deltas_flow():
    async with KvWorld() as world:
        cache = world.site.cache
        cache.pool.total = 60_000
        cache.fill(world.prompt(50_000))
        world.site.step()
        late = await world.join()
        during = 0
        while late.state != "exact":
            cache.fill(world.prompt(40))
            if world.rng.random() < 0.2:
                cache.pool.resend()
            world.site.step()
            await settle(0.002)
            during += 1
        assert during > 5
        await late.until_right()
        assert late.knowledge.tally.resynchronisations == {"joined": 1}


@virtual
async def test_a_slow_subscriber_costs_no_memory_and_gets_everything_anew():
    async with KvWorld(config=KvPublishConfig(kv_events_kept=2_000)) as world:
        front, site = world.front, world.site
        await front.until_right()
        held_up: list[bytes] = []
        feed = front.keeper._followers["w1"]._feed
        assert feed is not None
        genuine, feed.on_data = feed.on_data, lambda _index, payload: held_up.append(payload)
        for _ in range(400):
            site.cache.fill(world.prompt(20))
            site.step()
            await settle(0.01)
        assert len(held_up) <= WINDOW, "no more than the window is on its way"
        session = next(iter(site.server._sessions.values()))
        assert sum(stream.held_bytes for stream in session.bulk.core.streams) < 60_000, "and one message waits"
        feed.on_data = genuine
        for payload in held_up:
            genuine(0, payload)
        await front.until_right()
        assert site.publisher.overruns == 1
        assert front.knowledge.tally.resynchronisations == {"joined": 1, "overrun": 1}


@virtual
async def test_lost_last_batches_are_noticed_by_the_next_beat():
    async with KvWorld() as world:
        await world.front.until_right()
        world.site.mangle = lambda message: [] if isinstance(message, Deltas) else [message]
        world.site.cache.fill(world.prompt(10))
        world.site.step()
        await settle(0.2)
        world.site.mangle = None
        assert world.front.state == "exact"
        assert await world.front.until_right() < 1.5
        assert world.front.knowledge.tally.resynchronisations["gap"] == 1


@virtual
async def test_counts_that_differ_bring_a_snapshot():
    async with KvWorld() as world:
        world.site.cache.fill(world.prompt(10))
        world.site.step()
        await world.front.until_right()
        known = world.front.knowledge.known("w1")
        known.space.index.apply_removed(known.space.slots.find("w1"), 0, array("Q", [next(iter(world.front.held))]))
        assert await world.front.until_right() < 1.5
        assert world.front.knowledge.tally.resynchronisations["mismatch"] == 1


@virtual
async def test_events_lost_between_engine_and_log_are_noticed_by_the_engines_own_count():
    async with KvWorld() as world:
        world.site.cache.fill(world.prompt(10))
        world.site.cache.take_kv_events()
        await settle(1.2)
        assert not world.front.right
        assert await world.front.until_right() < 3.0
        assert world.site.publisher.resends == 1
        assert len(world.front.held) == 10


@virtual
async def test_what_no_step_brings_is_fetched_within_a_second():
    async with KvWorld() as world:
        await world.front.until_right()
        world.site.cache.fill(world.prompt(10))
        assert await world.front.until_right() < 1.5
        assert world.site.publisher.resends == 0


@virtual
async def test_a_worker_that_falls_silent_is_asked_anew():
    async with KvWorld() as world:
        await world.front.until_right()
        world.site.mangle = lambda _message: []
        await settle(SILENT_SECONDS + 2.5)
        assert world.front.state == "resynchronising"
        world.site.mangle = None
        world.site.cache.fill(world.prompt(10))
        world.site.step()
        await world.front.until_right()
        assert world.front.knowledge.tally.resynchronisations["silent"] >= 1


@virtual
async def test_a_draining_worker_ends_its_subscriptions():
    async with KvWorld() as world:
        world.site.cache.fill(world.prompt(10))
        world.site.step()
        await world.front.until_right()
        world.site.publisher.close()
        await settle()
        assert world.site.publisher.subscribers == 0
        assert world.site.server.open_streams == 0
        assert len(world.front.held) == 10


@virtual
async def test_a_refusal_leaves_the_worker_to_guesses(caplog):
    caplog.set_level(logging.ERROR)
    async with KvWorld() as world:
        world.site.server.unregister("kv_events")
        late = await world.join()
        await settle(5.0)
        assert late.state == "resynchronising"
        late.knowledge.decided("w1", 0, PROMPT, asyncio.get_running_loop().time())
        assert late.knowledge.lookup(PROMPT, SIZE, asyncio.get_running_loop().time()).of("w1") == (8, 0, 0)
        assert not caplog.records


@pytest.mark.parametrize("seed", range(40))
def test_the_index_comes_to_equal_the_cache_whatever_happens(seed, caplog):
    caplog.set_level(logging.ERROR)

    @virtual
    async def life() -> None:
        async with KvWorld(seed, config=KvPublishConfig(kv_events_kept=1_500)) as world:
            rng, site = world.rng, world.site
            mangler = site.mangle = Mangler(rng, rng.choice([0.0, 0.05, 0.3]))
            for _ in range(120):
                await _something(world)
            site.mangle = None
            for front in world.fronts:
                if front.member.link is None:
                    await front.connect()
                await front.until_right(40.0)
                beside = front.knowledge.known("w1").counts()
                assert all(counts.repeats == 0 for counts in beside.values())
            world.front.struck = mangler.struck

    life()
    assert not caplog.records


async def _something(world: KvWorld) -> None:
    rng, site = world.rng, world.site
    what = rng.random()
    if what < 0.75:
        site.cache.fill(world.prompt(rng.randrange(3, 60)))
        if rng.random() < 0.05:
            site.cache.take_kv_events()  # the engine's events are lost
        site.step()
    elif what < 0.78:
        site.cache.pool.clear()
    elif what < 0.80:
        await world.restart()
    elif what < 0.85:
        await _cut(rng.choice(world.fronts))
    elif what < 0.88 and len(world.fronts) < 4:
        await world.join()
    await settle(rng.choice([0.001, 0.01, 0.3]))


async def _cut(front: Front) -> None:
    if front.member.link is not None:
        for stream in front.member.link._channels():
            stream.abort()
        await settle(0.01)
    await front.connect()


# ---- messages ----


class Handle:
    """A stream's handle that only listens."""

    id = 1

    def __init__(self) -> None:
        self.credits: list[int] = []
        self.killed = ""

    def stop(self, reason: str = "cancelled") -> None:
        self.killed = reason

    def kill(self, reason: str = "cancelled") -> None:
        self.killed = reason

    def credit(self, tokens: int) -> None:
        self.credits.append(tokens)


def a_feed() -> tuple[Feed, Handle, PrefixKnowledge]:
    knowledge = PrefixKnowledge()
    known = knowledge.attach(Member(1))
    assert known is not None
    feed, handle = Feed(known, lambda: 5.0), Handle()
    feed.handle = handle
    return feed, handle, knowledge


def say(feed: Feed, *messages: object) -> None:
    for message in messages:
        feed.on_data(0, msgspec.msgpack.encode(message))


def delta(first: int, last: int, *hashes: int, rank: int = 0) -> Deltas:
    return Deltas(first, last, array("Q", (0, rank, 0, len(hashes))).tobytes(), array("Q", hashes).tobytes())


def test_a_first_subscription_asks_for_everything():
    feed, _, _ = a_feed()
    assert msgspec.msgpack.decode(feed.request(), type=Subscribe) == Subscribe()


@virtual
async def test_repeated_batches_are_left_out_and_credit_comes_back():
    feed, handle, knowledge = a_feed()
    say(feed, Opening(9, 0, True), Complete(0), delta(1, 1, 7), delta(1, 1, 7), delta(2, 3, 8))
    assert (feed.known.sequence, feed.known.blocks, knowledge.tally.repeated) == (3, 2, 1)
    say(feed, *[delta(number, number, number + 100) for number in range(4, 20)])
    assert handle.credits == [WINDOW // 2]


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ((Opening(9, 5, True), delta(6, 6, 1)), "gap"),
        ((delta(1, 1, 1),), "gap"),
        ((Part(0, 0, 0, b""),), "gap"),
        ((Opening(9, 5, True), Part(1, 0, 0, b"")), "gap"),
        ((Opening(9, 5, True), Part(0, 0, 0, b""), Complete(2)), "gap"),
        ((Opening(9, 5, True), Complete(0), delta(7, 7, 1)), "gap"),
        ((Opening(9, 5, True), Complete(0), delta(5, 6, 1)), "gap"),
        ((Opening(9, 5, True), Complete(0), Beat(6, ())), "gap"),
        ((Opening(9, 5, True), Complete(0), Beat(4, ())), "gap"),
        ((Opening(9, 5, True), Complete(0), Beat(5, ((0, 1, 0, 0),))), "mismatch"),
        ((Opening(9, 5, False),), "gap"),
        ((Opening(9, 5, True), Complete(0), Opening(9, 5, False), Opening(9, 4, False)), "gap"),
        ((Opening(9, 5, True), Complete(0), delta(6, 6, 1, rank=2000)), "broken"),
        ((Opening(9, 5, True, 1 << 40),), "broken"),
        ((Opening(9, 5, True), Part(0, 0, 7, b"12345678")), "broken"),
        ((Opening(9, 5, True), Part(0, 0, 0, b"123")), "broken"),
        (({"not": "a message"},), "broken"),
    ],
)
def test_whatever_does_not_follow_ends_the_subscription(messages, reason):
    @virtual
    async def check() -> None:
        feed, handle, knowledge = a_feed()
        say(feed, *messages)
        assert knowledge.tally.resynchronisations[reason] == 1
        assert feed.over.is_set()
        assert handle.killed
        assert knowledge.state_of("w1") == "resynchronising"
        say(feed, delta(1, 1, 99))
        assert feed.known.blocks <= 1

    check()


def test_messages_are_read_as_they_are_written():
    for message in (Opening((1 << 64) - 1, 3, True, 5), delta(1, 2, 3), Beat(1, ((0, 1, 2, 3),)), Complete(3)):
        assert DECODER.decode(msgspec.msgpack.encode(message)) == message


def test_a_worker_without_a_prefix_cache_holds_nothing():
    knowledge = PrefixKnowledge()
    member = Member(1, endpoints=())
    member.record = msgspec.structs.replace(member.record, cards=(msgspec.structs.replace(card(), prefix_cache=False),))
    assert knowledge.attach(member) is None
    knowledge.decided("w1", 0, PROMPT, 0.0)
    assert knowledge.state_of("w1") == "none"
    assert len(knowledge.lookup(PROMPT, SIZE, 0.0)) == 0


@virtual
async def test_decisions_for_a_worker_that_tells_nothing_end_with_its_process():
    async with KvWorld() as world:
        old = Member(1, endpoints=(), instance="old")
        front = world.front
        await front.until_right()
        front.pool.members.append(old)
        front.pool.tell("added", old)
        now = asyncio.get_running_loop().time()
        front.knowledge.decided("old", 0, PROMPT, now)
        front.pool.tell("changed", old)
        assert front.knowledge.lookup(PROMPT, SIZE, now).of("old") == (8, 0, 0)
        old.epoch = 2
        front.pool.tell("state", old)
        assert len(front.knowledge.lookup(PROMPT, SIZE, now)) == 0
        assert front.state == "exact"
