"""The pool's decisions, with links and discovery that the test moves, on virtual time."""

import asyncio
import functools
import random

import pytest

from holdfast.base.errors import (
    CannotConnect,
    Disconnected,
    EngineFailed,
    InvalidRequest,
    PeerSilent,
    ProtocolViolation,
    WorkerDraining,
    WorkerStalled,
)
from holdfast.base.ids import Epoch, InstanceId
from holdfast.models.card import Artifact, ModelCard
from holdfast.runtime.discovery.contract import InstanceRecord
from holdfast.runtime.discovery.mem import MemDiscovery, MemHub
from holdfast.runtime.member import TRANSITIONS
from holdfast.runtime.pool import WorkerPool
from holdfast.wire.frames import Draining, Load, Pong, Progress, Welcome
from tests.runtime.virtual_time import run


def a_card(name="m", **fields):
    base = ModelCard(name, Artifact("t" * 64, 1), Artifact("p" * 64, 1), 4096, (2,), 100, 16, progress="step")
    return type(base)(**{**{f: getattr(base, f) for f in base.__struct_fields__}, **fields})


def a_record(name, epoch=1, cards=None, **fields):
    fields.setdefault("address", f"{name}:1")
    cards = (a_card(),) if cards is None else cards
    return InstanceRecord("dynamo", "backend", ("generate",), InstanceId(name), Epoch(epoch), cards=cards, **fields)


class Host:
    """A worker process as links reach it."""

    def __init__(self, name, epoch=1):
        self.name, self.epoch = name, epoch
        self.up, self.frozen = True, False
        self.state = "ready"
        self.steps, self.in_flight, self.hung = 0, 0, False
        self.links = []
        self.refusal = None
        self.draining = False

    def crash(self):
        self.up = False
        for link in list(self.links):
            link.lose(Disconnected("reset"))

    def pong(self, sequence):
        self.steps += 0 if self.hung else self.in_flight
        phase = "decode" if self.in_flight else "idle"
        progress = Progress(self.steps, self.steps, 0, phase, 0.0, self.in_flight)
        return Pong(sequence, progress, Load(running=self.in_flight), state=self.state)


class FakeLink:
    def __init__(self, fleet, record):
        self.fleet, self.record = fleet, record
        self.on_pong = self.on_draining = self.on_lost = self.on_read_done = None
        self.last_heard = 0.0
        self.draining = None
        self.connected = False
        self.streams = 0
        self.broken = []
        self.waiting = []
        self.closed = False
        self.host = None

    async def connect(self, timeout):  # noqa: ASYNC109  the signature of Link
        self.fleet.attempts.append((asyncio.get_running_loop().time(), self.record.instance))
        host = self.fleet.hosts.get(self.record.address)
        await asyncio.sleep(0.001)
        if host is None or not host.up:
            raise CannotConnect(f"nobody at {self.record.address}")
        if host.refusal is not None:
            raise host.refusal
        if host.frozen:
            await asyncio.sleep(timeout)
            raise CannotConnect("no welcome")
        self.host, self.connected = host, True
        host.links.append(self)
        self.heard()
        if host.draining:
            self.draining = Draining("shutdown", 1000)
            self.on_draining(self.draining)
        return Welcome(1, host.name, host.epoch)

    def heard(self):
        self.last_heard = asyncio.get_running_loop().time()

    def ping(self):
        if not self.connected:
            raise Disconnected("closed")
        self.fleet.sequence += 1
        self.waiting.append(self.fleet.sequence)
        asyncio.get_running_loop().call_later(0.001, self.answer)
        return self.fleet.sequence

    def answer(self):
        while self.connected and not self.host.frozen and self.waiting:
            self.heard()
            sequence = self.waiting.pop(0)
            if self.on_pong is not None:
                self.on_pong(self.host.pong(sequence))

    def abandon(self, error):
        self.broken.append((asyncio.get_running_loop().time(), error))
        self.streams = 0

    def lose(self, error):
        self.connected = False
        self.host.links.remove(self)
        if self.on_lost is not None:
            self.on_lost(error)

    async def close(self):
        self.connected, self.closed = False, True
        if self.host is not None and self in self.host.links:
            self.host.links.remove(self)

    def open(self, *args, **kwargs):
        return (args, kwargs)


class Fleet:
    def __init__(self, pool_settings=None, **pool_options):
        self.hosts, self.links, self.attempts, self.sequence = {}, [], [], 0
        self.hub = MemHub()
        self.owner = MemDiscovery(self.hub)
        self.watcher = MemDiscovery(self.hub)
        self.events = []
        self.pool = WorkerPool(
            self.watcher,
            None,
            caller="test",
            rng=random.Random(1),
            settings=pool_settings,
            link_factory=self.make,
            **pool_options,
        )

    def make(self, record):
        link = FakeLink(self, record)
        self.links.append(link)
        return link

    async def __aenter__(self):
        await self.owner.start()
        await self.watcher.start()
        await self.pool.start()
        self.pool.subscribe(lambda kind, worker: self.events.append((kind, worker.instance, worker.state)))
        return self

    async def __aexit__(self, *_):
        await self.pool.close()

    @property
    def now(self):
        return asyncio.get_running_loop().time()

    async def add(self, name, epoch=1, **fields):
        host = self.hosts[f"{name}:{epoch}"] = Host(name, epoch)
        await self.owner.publish(a_record(name, epoch, address=f"{name}:{epoch}", **fields))
        return host

    def usable(self, model="m"):
        return [w.instance for w in self.pool.usable(model)]

    def link(self, name):
        return self.pool.worker(name).link

    async def until(self, condition, seconds=30.0):
        start = self.now
        while not condition():
            assert self.now - start < seconds, "the condition did not come true in time"
            await asyncio.sleep(0.01)
        return self.now - start


def virtual(test):
    @functools.wraps(test)
    def wrapper(*args, **kwargs):
        return run(lambda: test(*args, **kwargs))

    return wrapper


@virtual
async def test_discovered_workers_become_usable_after_their_first_pong():
    async with Fleet() as fleet:
        await fleet.add("a")
        await fleet.add("b")
        assert await fleet.until(lambda: fleet.usable() == ["a", "b"]) < 0.1
        assert [e for e in fleet.events if e[1] == "a" and e[0] != "pong"] == [
            ("added", "a", "unknown"),
            ("state", "a", "probing"),
            ("state", "a", "usable"),
        ]
        assert list(fleet.pool.models()) == ["m"]
        worker = fleet.pool.worker("a")
        assert (worker.epoch, worker.lifecycle, worker.hesitant, worker.in_flight) == (1, "ready", False, 0)
        assert worker.card("m") is not None


@virtual
async def test_a_crash_ends_use_at_once_and_attempts_go_on_while_listed():
    async with Fleet() as fleet:
        host = await fleet.add("a")
        await fleet.add("b")
        await fleet.until(lambda: len(fleet.usable()) == 2)
        fleet.attempts.clear()
        host.crash()
        assert fleet.usable() == ["b"]
        await asyncio.sleep(1.0)
        tries = [t for t, _ in fleet.attempts]
        assert 4 <= len(tries) <= 7
        assert tries[1] - tries[0] < 0.1
        host.up = True
        assert await fleet.until(lambda: len(fleet.usable()) == 2) < 2.6
        host.crash()
        fleet.hub.lose(InstanceId("a"))
        await fleet.until(lambda: fleet.pool.worker("a") is None)
        fleet.attempts.clear()
        await asyncio.sleep(0.9)
        assert fleet.attempts == []


@virtual
async def test_a_restart_in_the_same_slot_is_connected_at_once_when_discovery_says_so():
    async with Fleet() as fleet:
        host = await fleet.add("a")
        await fleet.until(lambda: fleet.usable() == ["a"])
        host.crash()
        await asyncio.sleep(5.0)
        await fleet.add("a", epoch=2)
        assert await fleet.until(lambda: fleet.usable() == ["a"]) < 0.1
        assert fleet.pool.worker("a").epoch == 2


@virtual
async def test_the_old_connection_is_lost_while_the_one_to_the_new_start_is_being_made():
    async with Fleet() as fleet:
        host = await fleet.add("a")
        await fleet.until(lambda: fleet.usable() == ["a"])
        await fleet.add("a", epoch=2)
        while len(fleet.attempts) < 2:  # noqa: ASYNC110  each turn of the loop is a moment of its own here
            await asyncio.sleep(0)
        host.crash()
        assert fleet.pool.worker("a").state == "ejected"
        assert await fleet.until(lambda: fleet.usable() == ["a"]) < 0.5
        assert fleet.pool.worker("a").epoch == 2


@virtual
async def test_a_new_epoch_replaces_a_living_connection_and_breaks_its_streams():
    async with Fleet() as fleet:
        await fleet.add("a")
        await fleet.until(lambda: fleet.usable() == ["a"])
        old = fleet.link("a")
        old.streams = 3
        await fleet.add("a", epoch=2)
        await fleet.until(lambda: fleet.pool.worker("a").epoch == 2)
        await fleet.until(lambda: fleet.usable() == ["a"])
        assert len(old.broken) == 1
        assert old.closed
        assert fleet.link("a") is not old


@virtual
async def test_a_stale_record_does_not_break_the_epoch_that_answers():
    async with Fleet() as fleet:
        host = await fleet.add("a")
        host.epoch = 7
        await fleet.until(lambda: fleet.usable() == ["a"])
        link = fleet.link("a")
        assert fleet.pool.worker("a").epoch == 7
        await fleet.owner.publish(a_record("a", 1, meta={"x": 1}))
        await asyncio.sleep(2.0)
        assert fleet.link("a") is link
        assert link.broken == []
        assert fleet.usable() == ["a"]


@virtual
async def test_a_frozen_worker_is_suspect_within_two_seconds_and_back_within_two_of_thawing():
    async with Fleet() as fleet:
        host = await fleet.add("a")
        await fleet.add("b")
        await fleet.until(lambda: len(fleet.usable()) == 2)
        await asyncio.sleep(3)
        link = fleet.link("a")
        link.streams = 2
        host.frozen = True
        start = fleet.now
        await fleet.until(lambda: fleet.pool.worker("a").hesitant)
        assert fleet.now - start < 0.9
        await fleet.until(lambda: fleet.usable() == ["b"])
        assert fleet.now - start < 2.0
        ((_, error),) = link.broken
        assert isinstance(error, PeerSilent)
        assert link.connected, "it stays connected"
        fleet.pool.worker("a").report_failure(error)
        await asyncio.sleep(40)
        host.frozen = False
        link.answer()
        assert await fleet.until(lambda: len(fleet.usable()) == 2) < 2.0
        assert fleet.link("a") is link


@virtual
async def test_whoever_hears_of_a_broken_stream_finds_the_worker_unusable_already():
    async with Fleet() as fleet:
        host = await fleet.add("a")
        await fleet.add("b")
        await fleet.until(lambda: len(fleet.usable()) == 2)
        seen = []
        fleet.link("a").abandon = lambda error: seen.append(fleet.usable())
        host.frozen = True
        await fleet.until(lambda: seen)
        assert seen == [["b"]]


@virtual
async def test_a_hung_engine_is_ejected_and_returns_when_its_counters_move():
    async with Fleet() as fleet:
        host = await fleet.add("a")
        await fleet.add("b")
        await fleet.until(lambda: len(fleet.usable()) == 2)
        link = fleet.link("a")
        host.in_flight = 1
        await asyncio.sleep(3)
        host.hung = True
        assert await fleet.until(lambda: fleet.usable() == ["b"]) < 7
        assert fleet.pool.worker("a").state == "ejected"
        ((_, error),) = link.broken
        assert isinstance(error, WorkerStalled)
        await asyncio.sleep(20)
        assert fleet.usable() == ["b"]
        host.hung = False
        assert await fleet.until(lambda: len(fleet.usable()) == 2) < 2
        assert link.connected


@virtual
async def test_engines_without_counters_are_never_called_hung():
    async with Fleet() as fleet:
        host = await fleet.add("a", cards=(a_card(progress="none"),))
        host.hung, host.in_flight = True, 1
        await fleet.until(lambda: fleet.usable() == ["a"])
        await asyncio.sleep(60)
        assert fleet.usable() == ["a"]


@virtual
async def test_draining_ends_new_work_and_an_orderly_leave_waits_for_the_streams():
    async with Fleet() as fleet:
        await fleet.add("a")
        await fleet.until(lambda: fleet.usable() == ["a"])
        link = fleet.link("a")
        link.streams = 1
        link.on_draining(Draining("shutdown", 5000))
        assert fleet.usable() == []
        with pytest.raises(WorkerDraining):
            fleet.pool.worker("a").open("generate", None, b"", None)
        await fleet.owner.withdraw(InstanceId("a"))
        await asyncio.sleep(20)
        assert fleet.pool.worker("a") is not None
        assert link.connected
        link.streams = 0
        await fleet.until(lambda: fleet.pool.worker("a") is None)
        assert link.closed
        assert not fleet.pool.replacement_expected("m")


@virtual
async def test_a_record_that_says_draining_is_believed():
    async with Fleet() as fleet:
        await fleet.add("a")
        await fleet.until(lambda: fleet.usable() == ["a"])
        await fleet.owner.publish(a_record("a", state="draining"))
        await fleet.until(lambda: fleet.usable() == [])
        await fleet.add("a", epoch=2)
        await fleet.until(lambda: fleet.usable() == ["a"])


@virtual
async def test_a_worker_that_greets_with_draining_gets_nothing():
    async with Fleet() as fleet:
        host = await fleet.add("a")
        host.draining = True
        await fleet.until(lambda: fleet.pool.worker("a") is not None and fleet.pool.worker("a").state == "usable")
        assert fleet.usable() == []
        assert fleet.pool.worker("a").draining


@virtual
async def test_a_late_word_that_the_old_start_has_left_does_not_touch_the_new_one():
    async with Fleet() as fleet:
        old = await fleet.add("a")
        await fleet.until(lambda: fleet.usable() == ["a"])
        fleet.hosts["a:1"] = Host("a", 2)  # the same slot and address, before discovery tells of it
        old.crash()
        await fleet.until(lambda: fleet.usable() == ["a"])
        assert fleet.pool.worker("a").epoch == 2
        await fleet.owner.withdraw("a")
        await asyncio.sleep(1.0)
        assert fleet.usable() == ["a"]
        await fleet.owner.publish(a_record("a", 2, address="a:1"))
        await asyncio.sleep(100.0)
        assert fleet.usable() == ["a"]


@virtual
async def test_unlisted_but_answering_is_used_for_a_bounded_time():
    async with Fleet() as fleet:
        await fleet.add("a")
        await fleet.until(lambda: fleet.usable() == ["a"])
        fleet.owner._own.clear()
        fleet.hub.lose(InstanceId("a"))
        await asyncio.sleep(55)
        assert fleet.usable() == ["a"]
        await asyncio.sleep(10)
        assert fleet.usable() == []
        assert fleet.pool.worker("a") is None


@virtual
async def test_an_unlisted_worker_that_registers_again_stays():
    async with Fleet() as fleet:
        await fleet.add("a")
        await fleet.until(lambda: fleet.usable() == ["a"])
        link = fleet.link("a")
        fleet.hub.lose(InstanceId("a"))
        await asyncio.sleep(120)
        assert fleet.usable() == ["a"]
        assert fleet.link("a") is link


@virtual
async def test_losing_discovery_changes_nothing():
    async with Fleet() as fleet:
        await fleet.add("a")
        await fleet.until(lambda: fleet.usable() == ["a"])
        fleet.hub.set_reachable(False)
        await asyncio.sleep(100)
        assert not fleet.pool.discovery_reachable
        assert fleet.usable() == ["a"]
        fleet.hub.set_reachable(True)
        await asyncio.sleep(1)
        assert fleet.usable() == ["a"]


@virtual
async def test_only_worker_and_transport_faults_inhibit_and_many_at_once_count_once():
    async with Fleet() as fleet:
        await fleet.add("a")
        await fleet.add("b")
        await fleet.until(lambda: len(fleet.usable()) == 2)
        worker = fleet.pool.worker("a")
        worker.report_failure(InvalidRequest("yours"))
        worker.report_failure(WorkerDraining("leaving"))
        worker.report_failure(Disconnected("known from the link"))
        assert fleet.usable() == ["a", "b"]
        for _ in range(50):
            worker.report_failure(EngineFailed("broken"))
        assert fleet.usable() == ["b"]
        assert await fleet.until(lambda: len(fleet.usable()) == 2) < 5.2
        worker.report_failure(EngineFailed("again"))
        assert 9.5 < await fleet.until(lambda: len(fleet.usable()) == 2) < 10.5
        worker.report_failure(EngineFailed("again"))
        worker.report_success()
        assert fleet.usable() == ["a", "b"]


@virtual
async def test_when_all_are_inhibited_the_least_bad_is_used():
    async with Fleet() as fleet:
        await fleet.add("a")
        await fleet.add("b")
        await fleet.until(lambda: len(fleet.usable()) == 2)
        fleet.pool.worker("b").report_failure(EngineFailed("once"))
        await asyncio.sleep(6)
        fleet.pool.worker("b").report_failure(EngineFailed("twice"))
        fleet.pool.worker("a").report_failure(EngineFailed("once"))
        assert fleet.usable() == ["a"]


@virtual
async def test_a_reconnect_with_a_pong_ends_a_transport_inhibition():
    async with Fleet() as fleet:
        host = await fleet.add("a")
        await fleet.add("b")
        await fleet.until(lambda: len(fleet.usable()) == 2)
        fleet.pool.worker("a").report_failure(ProtocolViolation("garbled"))
        assert fleet.usable() == ["b"]
        for link in list(host.links):
            link.lose(Disconnected("reset"))
        assert await fleet.until(lambda: len(fleet.usable()) == 2) < 0.5


@virtual
async def test_workers_that_disagree_about_a_model_are_refused_by_field():
    async with Fleet() as fleet:
        await fleet.add("a")
        await fleet.until(lambda: fleet.usable() == ["a"])
        await fleet.add("b", cards=(a_card(tokenizer=Artifact("x" * 64, 1)), a_card("other", aliases=("o",))))
        await fleet.until(lambda: fleet.usable("other") == ["b"])
        assert fleet.usable("o") == ["b"]
        assert fleet.usable() == ["a"]
        assert "tokenizer" in fleet.pool.worker("b").problem
        assert "'m'" in fleet.pool.worker("b").problem
        await fleet.owner.withdraw(InstanceId("a"))
        await fleet.until(lambda: fleet.usable() == ["b"])
        assert fleet.pool.worker("b").problem == ""


@virtual
async def test_a_model_that_is_still_loading_is_not_offered():
    async with Fleet() as fleet:
        await fleet.add("a", cards=(a_card(state="loading"),))
        await fleet.until(lambda: fleet.pool.worker("a").state == "usable" if fleet.pool.worker("a") else False)
        assert fleet.usable() == []
        await fleet.owner.publish(a_record("a"))
        await fleet.until(lambda: fleet.usable() == ["a"])


@virtual
async def test_a_worker_that_says_it_is_warming_or_stalled_gets_nothing_new():
    async with Fleet() as fleet:
        host = await fleet.add("a")
        host.state = "warming"
        await asyncio.sleep(2)
        assert fleet.usable() == []
        host.state = "ready"
        await fleet.until(lambda: fleet.usable() == ["a"], 0.5)
        host.state = "stalled"
        await fleet.until(lambda: fleet.usable() == [], 0.5)


@virtual
async def test_wait_usable_returns_when_a_replacement_comes_and_at_once_when_none_can():
    async with Fleet() as fleet:
        host = await fleet.add("a")
        await fleet.until(lambda: fleet.usable() == ["a"])
        host.crash()
        waiting = asyncio.ensure_future(fleet.pool.wait_usable("m", 30))
        await asyncio.sleep(5)
        assert not waiting.done()
        await fleet.add("a", epoch=2)
        assert [w.instance for w in await waiting] == ["a"]
        assert fleet.pool.models()["m"]
        waiting = asyncio.ensure_future(_drained(fleet))
        await fleet.owner.withdraw(InstanceId("a"))
        start = fleet.now
        assert await waiting == []
        assert fleet.now - start < 0.5
        assert await fleet.pool.wait_usable("nobody has this", 3.0) == []


async def _drained(fleet):
    await fleet.until(lambda: not fleet.usable())
    return await fleet.pool.wait_usable("m", 30)


@virtual
async def test_supervisors_decide_whether_a_replacement_is_expected():
    def supervisor(**slots):
        return InstanceRecord(
            "dynamo", "supervisor", (), InstanceId("boss"), Epoch(1), "", meta={"frontend-0": "running", **slots}
        )

    async with Fleet() as fleet:
        host = await fleet.add("a")
        await fleet.owner.publish(supervisor(**{"worker-0": "running"}))
        await fleet.until(lambda: fleet.usable() == ["a"])
        await fleet.owner.withdraw(InstanceId("a"))
        host.crash()
        await fleet.until(lambda: fleet.pool.worker("a") is None)
        assert fleet.pool.replacement_expected("m"), "a rolling restart"
        await fleet.owner.publish(supervisor(**{"worker-0": "gave-up"}))
        await asyncio.sleep(0.01)
        assert not fleet.pool.replacement_expected("m")
        await fleet.owner.publish(supervisor(**{"worker-0": "gave-up", "worker-1": "restarting"}))
        await asyncio.sleep(0.01)
        assert fleet.pool.replacement_expected("m")
        await fleet.owner.withdraw(InstanceId("boss"))
        await asyncio.sleep(0.01)
        assert not fleet.pool.replacement_expected("m"), "without it the purposeful departure counts"
        assert "m" not in fleet.pool.models()


@virtual
async def test_a_crash_without_supervisor_is_worth_waiting():
    async with Fleet() as fleet:
        host = await fleet.add("a")
        await fleet.until(lambda: fleet.usable() == ["a"])
        host.crash()
        fleet.owner._own.clear()
        fleet.hub.lose(InstanceId("a"))
        await fleet.until(lambda: fleet.pool.worker("a") is None)
        assert fleet.pool.replacement_expected("m")
        assert "m" in fleet.pool.models()


@virtual
async def test_namespaces_are_kept_apart():
    async with Fleet(namespace_prefix="dyn") as fleet:
        await fleet.add("a")
        foreign = InstanceRecord("other", "backend", (), InstanceId("x"), Epoch(1), "x:1", cards=(a_card(),))
        await fleet.owner.publish(foreign)
        await fleet.until(lambda: fleet.usable() == ["a"])
        assert fleet.pool.worker("x") is None


@virtual
async def test_a_worker_that_refuses_to_be_connected_says_why_once(caplog):
    async with Fleet() as fleet:
        host = await fleet.add("a")
        host.refusal = CannotConnect("wrong secret")
        await asyncio.sleep(20)
        assert sum("wrong secret" in r.getMessage() for r in caplog.records) == 1
        assert fleet.pool.worker("a").last_error is host.refusal
        host.refusal = None
        assert await fleet.until(lambda: fleet.usable() == ["a"]) < 2.6


@virtual
async def test_a_failing_subscriber_hurts_nobody():
    async with Fleet() as fleet:
        fleet.pool._notices._sinks.insert(0, lambda kind, worker: 1 / 0)
        await fleet.add("a")
        await fleet.until(lambda: fleet.usable() == ["a"])


@virtual
async def test_close_leaves_nothing_running():
    async with Fleet() as fleet:
        await fleet.add("a")
        host = await fleet.add("b")
        host.frozen = True
        await fleet.until(lambda: fleet.usable() == ["a"])
    assert all(link.closed for link in fleet.links)
    assert [t for t in asyncio.all_tasks() if t is not asyncio.current_task()] == []
    await fleet.pool.close()


def test_every_state_can_be_left_and_reached():
    states = {"unknown", "probing", "usable", "suspect", "ejected"}
    assert {s for s, _ in TRANSITIONS} == states
    assert set(TRANSITIONS.values()) == states - {"unknown"}
