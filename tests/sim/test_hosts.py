"""Hosts: a crash runs nothing more, a freeze only waits, slowness costs time, calendars differ."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import AsyncIterator
from contextlib import suppress

import pytest

from holdfast.sim.loop import WALL_START
from tests.sim.worlds import Pair, done, passes, universe


def test_a_crash_runs_no_finally_no_callback_and_no_timer() -> None:
    seen: list[str] = []

    async def work() -> None:
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(asyncio.sleep(5)).add_done_callback(lambda _: seen.append("done callback"))
                await asyncio.sleep(5)
        except BaseException:
            seen.append("except")
            raise
        finally:
            seen.append("finally")

    def timers() -> None:
        asyncio.get_running_loop().call_later(0.5, seen.append, "early timer")
        asyncio.get_running_loop().call_later(3, seen.append, "late timer")

    with universe() as world:
        host = world.boot("a")
        host.spawn(work(), "work")
        host.post(timers)
        passes(world, 1.0)
        host.crash()
        assert not host.alive
        host.post(seen.append, "posted to the dead")
        host.spawn(work(), "spawned on the dead")
        passes(world, 20.0)
        assert seen == ["early timer"]
        assert world.loop.failures == []


def test_what_waited_on_a_crashed_host_is_kept_until_the_universe_is_over() -> None:
    """A coroutine that is dropped runs its ``finally``, so nothing may be dropped early."""
    seen: list[float] = []

    with universe() as world:

        async def wait() -> None:
            try:
                await asyncio.get_running_loop().create_future()  # nobody else holds it
            finally:
                seen.append(world.now())

        host = world.boot("a")
        host.spawn(wait(), "wait")
        passes(world, 1.0)
        host.crash()
        gc.collect()
        passes(world, 5.0)
        assert seen == []


def test_a_host_may_crash_itself_in_the_middle_of_an_iteration() -> None:
    seen: list[str] = []
    with universe() as world:
        host = world.boot("a")
        host.post(seen.append, "before")
        host.post(host.crash)
        host.post(seen.append, "after")
        world.run()
        assert seen == ["before"]


def test_other_hosts_go_on_when_one_crashes() -> None:
    with universe() as world:
        first, second = world.boot("a"), world.boot("b")
        first.spawn(asyncio.sleep(10), "s")
        task = second.spawn(asyncio.sleep(10, "alive"), "s")
        passes(world, 1.0)
        first.crash()
        assert done(world, task) == "alive"


def test_a_restart_is_a_new_incarnation_at_the_same_address() -> None:
    with universe() as world:
        first = world.boot("a")
        world.boot("b")
        with pytest.raises(ValueError, match="is running"):
            world.boot("a")
        first.crash()
        second = world.boot("a")
        assert (second.incarnation, second.address, second.label) == (2, first.address, "a#2")
        assert second.address != world.hosts["b"].address
        assert done(world, second.spawn(asyncio.sleep(1, "back"), "s")) == "back"
        assert first.rng("x").random() != second.rng("x").random()


def test_a_frozen_host_runs_nothing_and_then_everything_in_order() -> None:
    seen: list[tuple[str, float]] = []
    with universe() as world:
        host = world.boot("a")

        def note(what: str) -> None:
            seen.append((what, round(world.now(), 6)))

        def arm() -> None:
            loop = asyncio.get_running_loop()
            for delay in (0.5, 3.0, 2.0, 2.0, 8.0):
                loop.call_later(delay, note, f"timer {delay}")

        host.post(arm)
        passes(world, 1.0)
        host.freeze()
        host.freeze()
        assert host.frozen
        host.post(note, "posted while frozen")
        passes(world, 4.0)
        assert seen == [("timer 0.5", 0.5)]
        host.thaw()
        host.thaw()
        world.run()
        assert seen[1:] == [
            ("posted while frozen", 5.0),
            ("timer 2.0", 5.0),
            ("timer 2.0", 5.0),
            ("timer 3.0", 5.0),
            ("timer 8.0", 8.0),
        ]


def test_code_on_a_thawed_host_sees_that_the_time_has_jumped() -> None:
    async def beat() -> list[float]:
        loop, gaps = asyncio.get_running_loop(), []
        for _ in range(30):
            before = loop.time()
            await asyncio.sleep(0.1)
            gaps.append(round(loop.time() - before, 6))
        return gaps

    with universe() as world:
        host = world.boot("a")
        task = host.spawn(beat(), "beat")
        passes(world, 1.05)
        host.freeze()
        passes(world, 2.0)
        host.thaw()
        gaps = done(world, task)
        assert [gap for gap in gaps if gap != 0.1] == [2.05]


def test_after_a_thaw_the_network_comes_before_the_timers() -> None:
    """As in asyncio: what sockets hold is read before timers that fell due are run."""
    order: list[str] = []
    with universe() as world:
        pair = Pair(world).connect()
        pair.far.data_received = lambda data: order.append("data")  # type: ignore[method-assign]
        host = pair.far_host
        host.post(lambda: asyncio.get_running_loop().call_later(0.5, order.append, "timer"))
        passes(world, 0.1)
        host.freeze()
        passes(world, 1.0)  # the timer falls due first
        pair.near_host.post(pair.near.stream.write, b"x")
        passes(world, 1.0)
        assert order == []
        host.thaw()
        world.run()
        assert order == ["data", "timer"]


def test_a_frozen_host_can_crash_and_is_not_thawed_then() -> None:
    seen: list[str] = []
    with universe() as world:
        host = world.boot("a")
        host.freeze()
        host.post(seen.append, "never")
        host.crash()
        host.thaw()
        world.run()
        assert seen == []
        assert not host.frozen


def test_a_host_may_freeze_itself() -> None:
    seen: list[str] = []
    with universe() as world:
        host = world.boot("a")
        host.post(host.freeze)
        host.post(seen.append, "later")
        passes(world, 1.0)
        assert seen == []
        host.thaw()
        world.run()
        assert seen == ["later"]


def test_callbacks_of_a_slow_host_take_time_and_others_do_not_wait() -> None:
    with universe() as world:
        slow, quick = world.boot("slow"), world.boot("quick")

        async def work() -> float:
            for _ in range(100):
                await asyncio.sleep(0)
            return world.now()

        slow.slow(20, per_callback=0.001)
        times = [host.spawn(work(), "work") for host in (slow, quick)]
        world.run()
        assert times[1].result() == 0.0
        assert times[0].result() == pytest.approx(2.0)
        slow.slow(1)
        begun = world.now()
        assert done(world, slow.spawn(work(), "again")) - begun < 0.05


def test_timers_of_a_slow_host_are_late_by_what_is_before_them() -> None:
    seen: list[float] = []
    with universe() as world:
        host = world.boot("a")
        host.slow(10, per_callback=0.01)

        def arm() -> None:
            for _ in range(3):
                asyncio.get_running_loop().call_later(1.0, lambda: seen.append(round(world.now(), 3)))

        host.post(arm)
        world.run()
        assert seen == [1.0, 1.1, 1.2]


def test_calendars_of_hosts_differ_and_the_loops_time_does_not() -> None:
    with universe() as world:
        first, second = world.boot("a"), world.boot("b")
        passes(world, 5.0)
        second.wall_offset = -3600.0
        assert first.wall() == WALL_START + 5.0
        assert second.wall() == WALL_START + 5.0 - 3600.0
        assert first.call(world.loop.wall) - second.call(world.loop.wall) == 3600.0
        assert first.call(world.loop.time) == second.call(world.loop.time)


def test_everything_that_a_host_starts_belongs_to_it() -> None:
    async def child(seen: list[str]) -> None:
        with suppress(asyncio.CancelledError):
            await asyncio.sleep(1)
            seen.append("child ran")

    async def parent(seen: list[str]) -> None:
        tasks = [asyncio.create_task(child(seen)) for _ in range(3)]
        await asyncio.gather(*tasks, asyncio.to_thread(lambda: None))

    seen: list[str] = []
    with universe() as world:
        host = world.boot("a")
        host.spawn(parent(seen), "parent")
        passes(world, 0.5)
        assert len(world.loop.tasks_of(host)) == 4
        host.crash()
        passes(world, 5.0)
        assert seen == []


@pytest.mark.filterwarnings("error")
def test_closing_a_universe_makes_no_noise(capfd: pytest.CaptureFixture[str]) -> None:
    async def stubborn() -> None:
        try:
            await asyncio.sleep(10)
        finally:
            await asyncio.sleep(1)
            asyncio.get_running_loop().create_task(asyncio.sleep(5))

    async def makes_more() -> None:
        try:
            await asyncio.sleep(10)
        finally:
            asyncio.get_running_loop().create_task(stubborn())
            raise ValueError("noise")

    async def generates() -> None:
        async def numbers() -> AsyncIterator[int]:
            try:
                for number in range(5):
                    yield number
                    await asyncio.sleep(10)
            finally:
                await asyncio.sleep(1)

        async for _ in numbers():
            pass

    with universe() as world:
        for number in range(5):
            world.boot(f"h{number}").spawn(stubborn(), "s")
            world.hosts[f"h{number}"].spawn(generates(), "g")
            world.hosts[f"h{number}"].spawn(makes_more(), "m")
        passes(world, 1.0)
        world.hosts["h0"].crash()
        world.hosts["h1"].spawn(stubborn(), "never started")
    out, err = capfd.readouterr()
    assert (out, err) == ("", "")
    assert world.loop.failures == []
