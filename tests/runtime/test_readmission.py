"""A worker that comes back from suspicion is asked for a canary first; links are moved by hand, on virtual time."""

import asyncio
import itertools

import msgspec
import pytest

from holdfast.base.errors import NotFound, PeerSilent, VersionMismatch
from holdfast.runtime.readmission import ANSWER_SECONDS, CANARY_ENDPOINT, CanaryVerdict
from holdfast.wire.frames import Draining
from tests.runtime.test_pool import FakeLink, Fleet, a_card, virtual

KNOWS = {"endpoints": ("generate", CANARY_ENDPOINT)}
GOOD, BAD = CanaryVerdict(True, tokens=1), CanaryVerdict(False, "the canary was not over after 3 s")


class Asked:
    """One question that was put to a worker."""

    def __init__(self, handler):
        self.handler, self.killed = handler, False
        self.id = 1

    def kill(self, reason="cancelled"):
        self.killed = True

    def say(self, verdict):
        assert not self.killed
        self.handler.on_accept()
        self.handler.on_data(0, msgspec.msgpack.encode(verdict))
        self.handler.on_end("done", None, 0)


@pytest.fixture
def asked(monkeypatch):
    """All questions, in order."""
    found = []

    def ask(link, endpoint, headers, payload, handler, **more):
        assert endpoint == CANARY_ENDPOINT
        assert headers.remaining_ms >= ANSWER_SECONDS * 1000
        found.append(Asked(handler))
        link.streams += 1
        return found[-1]

    monkeypatch.setattr(FakeLink, "open", ask)
    return found


async def two(fleet):
    host = await fleet.add("a")
    await fleet.add("b")
    await fleet.until(lambda: len(fleet.usable()) == 2)
    await asyncio.sleep(3)
    return host


async def freeze(fleet, host, seconds=5.0):
    host.frozen = True
    await fleet.until(lambda: fleet.usable() == ["b"])
    await asyncio.sleep(seconds)
    host.frozen = False
    fleet.link("a").answer()


def records(fleet, **fields):
    """Make all records of this fleet list the endpoint."""
    publish = fleet.owner.publish
    fleet.owner.publish = lambda record: publish(msgspec.structs.replace(record, **fields))


@virtual
async def test_a_thawed_worker_is_used_after_a_good_canary_and_not_before(asked):
    async with Fleet() as fleet:
        records(fleet, **KNOWS)
        host = await two(fleet)
        assert not asked, "a worker that is new has just proved itself"
        await freeze(fleet, host)
        await fleet.until(lambda: asked)
        await asyncio.sleep(1.0)
        assert fleet.usable() == ["b"], "it answers pings, and that is not enough"
        assert fleet.pool.worker("a").state == "suspect"
        assert len(asked) == 1
        asked[0].say(GOOD)
        assert fleet.usable() == ["a", "b"]
        await asyncio.sleep(20)
        assert len(asked) == 1


@virtual
async def test_a_prompt_verdict_costs_no_time(asked):
    async with Fleet() as fleet:
        records(fleet, **KNOWS)
        host = await two(fleet)
        await freeze(fleet, host)
        thawed = fleet.now
        await fleet.until(lambda: asked)
        asked[0].say(GOOD)
        assert len(fleet.usable()) == 2
        assert fleet.now - thawed < 1.0


@virtual
async def test_a_silent_one_without_a_verdict_is_used_within_two_seconds(asked):
    async with Fleet() as fleet:
        records(fleet, **KNOWS)
        host = await two(fleet)
        await freeze(fleet, host)
        thawed = fleet.now
        await fleet.until(lambda: len(fleet.usable()) == 2)
        assert ANSWER_SECONDS <= fleet.now - thawed < 2.6
        assert asked[0].killed, "what it still says counts no more"


@virtual
async def test_a_bad_verdict_keeps_it_out_and_it_is_asked_with_growing_pauses(asked):
    async with Fleet() as fleet:
        records(fleet, **KNOWS)
        host = await two(fleet)
        await freeze(fleet, host)
        times = []
        for number in range(6):
            await fleet.until(lambda n=number: len(asked) > n, 20)
            times.append(fleet.now)
            asked[number].say(BAD)
            assert fleet.usable() == ["b"]
        pauses = [round(b - a) for a, b in itertools.pairwise(times)]
        assert pauses == [1, 2, 4, 8, 8]
        await fleet.until(lambda: len(asked) > 6, 20)
        asked[6].say(GOOD)
        assert len(fleet.usable()) == 2


@virtual
async def test_one_that_hung_must_show_more_than_patience(asked):
    async with Fleet() as fleet:
        records(fleet, **KNOWS)
        host = await two(fleet)
        host.in_flight, host.hung = 1, True
        await fleet.until(lambda: fleet.usable() == ["b"])
        host.in_flight, host.hung = 0, False
        await fleet.until(lambda: asked, 60)
        await asyncio.sleep(10 * ANSWER_SECONDS)
        assert fleet.usable() == ["b"], "no verdict is none"
        assert len(asked) > 2
        await fleet.until(lambda: not asked[-1].killed)
        asked[-1].say(GOOD)
        assert len(fleet.usable()) == 2


@virtual
async def test_silent_again_while_asked_begins_anew(asked):
    async with Fleet() as fleet:
        records(fleet, **KNOWS)
        host = await two(fleet)
        await freeze(fleet, host)
        await fleet.until(lambda: asked)
        link = fleet.link("a")
        link.lose(PeerSilent("gone"))
        assert asked[0].killed
        await fleet.until(lambda: len(asked) == 2)
        assert fleet.usable() == ["b"], "the same process, reconnected: still under suspicion"
        asked[1].say(GOOD)
        assert len(fleet.usable()) == 2


@virtual
async def test_a_new_process_in_the_slot_needs_no_question(asked):
    async with Fleet() as fleet:
        records(fleet, **KNOWS)
        host = await two(fleet)
        host.frozen = True
        await fleet.until(lambda: fleet.usable() == ["b"])
        host.crash()
        await fleet.add("a", epoch=2)
        await fleet.until(lambda: len(fleet.usable()) == 2)
        assert not asked


@virtual
async def test_older_workers_are_used_as_before(asked):
    async with Fleet() as fleet:
        host = await two(fleet)
        await freeze(fleet, host)
        thawed = fleet.now
        await fleet.until(lambda: len(fleet.usable()) == 2)
        assert fleet.now - thawed < 1.0
        assert not asked
        records(fleet, **KNOWS)
        await fleet.add("a")
        await freeze(fleet, host)
        await fleet.until(lambda: asked)
        asked[0].handler.on_refuse(NotFound("no such endpoint"))
        assert len(fleet.usable()) == 2, "it lists the endpoint and does not know it"


@virtual
async def test_what_people_are_shown_says_why_a_worker_gets_nothing():
    async with Fleet() as fleet:
        a = await fleet.add("a")
        await fleet.add("b", cards=(a_card(context_length=1),))
        await fleet.add("c")
        worker = fleet.pool.worker
        await fleet.until(lambda: sum(w.state == "usable" for w in fleet.pool.all_workers()) == 3)
        assert (worker("a").standing, worker("a").trouble) == ("usable", "")
        assert worker("b").standing == "refused"
        assert "context_length" in worker("b").trouble
        newer = fleet.hosts["c:1"]
        newer.refusal = VersionMismatch("the caller speaks 1 to 2, this worker 7 to 8")
        newer.crash()
        newer.up = True
        await fleet.until(lambda: "7 to 8" in worker("c").trouble)
        assert worker("c").standing in ("ejected", "probing"), "tried again and again"
        a.state = "stalled"
        await fleet.until(lambda: worker("a").standing == "stalled")
        assert "stalled" in worker("a").trouble
        a.state = "ready"
        await fleet.until(lambda: worker("a").standing == "usable")
        a.links[0].on_draining(Draining("shutdown", 1000))
        assert worker("a").standing == "draining"
        assert "accepts nothing" in worker("a").trouble
