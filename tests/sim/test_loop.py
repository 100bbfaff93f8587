"""The loop: virtual time, first-in-first-out per host, an order between hosts that the tape decides."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest

from holdfast.sim.lanes import Runaway
from holdfast.sim.tape import Tape
from holdfast.sim.world import World
from tests.sim.worlds import done, universe


def interleaving(seed: int, hosts: int = 3, steps: int = 6) -> list[str]:
    """Let several hosts count at the same instant and return who did what when."""
    seen: list[str] = []

    async def count(name: str) -> None:
        for number in range(steps):
            seen.append(f"{name}{number}")
            await asyncio.sleep(0)

    with universe(seed) as world:
        for index in range(hosts):
            name = "abcdefgh"[index]
            world.boot(name).spawn(count(name), "count")
        world.run()
    return seen


def test_a_day_passes_at_once() -> None:
    with universe() as world:

        async def sleep() -> float:
            await asyncio.sleep(86_400)
            return asyncio.get_running_loop().time()

        begun = time.monotonic()
        before = world.loop.time()
        assert done(world, world.boot("a").spawn(sleep(), "s"), 1e6) == before + 86_400
        assert time.monotonic() - begun < 5
        assert world.now() == 86_400


def test_callbacks_of_a_host_run_in_the_order_in_which_they_were_made() -> None:
    with universe() as world:
        host, seen = world.boot("a"), []
        for number in range(100):
            host.post(seen.append, number)
        world.run()
        assert seen == list(range(100))


def test_each_host_keeps_its_order_whatever_the_schedule() -> None:
    for seed in range(20):
        seen = interleaving(seed)
        for name in "abc":
            assert [one for one in seen if one[0] == name] == [f"{name}{number}" for number in range(6)]


def test_different_seeds_give_different_schedules_and_the_same_seed_the_same() -> None:
    schedules = {tuple(interleaving(seed)) for seed in range(50)}
    assert len(schedules) > 45
    assert interleaving(7) == interleaving(7)


def test_the_plain_tape_serves_hosts_in_turn() -> None:
    world = World(Tape(1, {"schedule": []}))
    seen: list[str] = []

    async def count(name: str) -> None:
        for _ in range(3):
            seen.append(name)
            await asyncio.sleep(0)

    for name in "ab":
        world.boot(name).spawn(count(name), "count")
    world.run()
    world.close()
    assert "".join(seen) == "ababab"


def test_timers_fire_by_time_and_equal_ones_in_the_order_in_which_they_were_made() -> None:
    with universe() as world:
        host, seen = world.boot("a"), []

        def arm() -> None:
            loop = asyncio.get_running_loop()
            for number, delay in enumerate([0.3, 0.1, 0.2, 0.1, 0.1]):
                loop.call_later(delay, seen.append, number)

        host.post(arm)
        world.run()
        assert seen == [1, 3, 4, 2, 0]


def test_cancelled_timers_do_not_fire_and_are_swept() -> None:
    with universe() as world:
        host, seen = world.boot("a"), []

        def arm() -> None:
            loop = asyncio.get_running_loop()
            for number in range(10_000):
                timer = loop.call_later(100 + number, seen.append, number)
                if number != 5:
                    timer.cancel()
                    timer.cancel()
                    assert timer.cancelled()

        host.post(arm)
        world.run(None, 1.0)
        assert len(world.loop._heap) < 2_000
        world.run()
        assert seen == [5]


def test_asyncios_own_tools_work() -> None:
    async def child(number: int) -> int:
        await asyncio.sleep(number / 10)
        return number

    async def main() -> list[Any]:
        results: list[Any] = [await asyncio.gather(child(3), child(1), child(2))]
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(child(number)) for number in range(3)]
        results.append([task.result() for task in tasks])
        try:
            async with asyncio.timeout(1.5):
                await asyncio.sleep(99)
        except TimeoutError:
            results.append("timeout")
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(asyncio.Event().wait(), 1.0)
        queue: asyncio.Queue[int] = asyncio.Queue(1)
        feeder = asyncio.create_task(queue.put(4))
        results.append(await queue.get())
        await feeder
        finished, pending = await asyncio.wait([asyncio.create_task(child(n)) for n in (1, 50)], timeout=1.0)
        results.append((len(finished), len(pending)))
        for task in pending:
            task.cancel()
        results.append(await asyncio.to_thread(lambda: "thread"))
        return results

    with universe() as world:
        result = done(world, world.boot("a").spawn(main(), "main"))
    assert result == [[3, 1, 2], [0, 1, 2], "timeout", 4, (1, 1), "thread"]


def test_the_stand_in_of_the_thread_pool_has_no_running_loop_and_passes_errors_on() -> None:
    def work() -> None:
        with pytest.raises(RuntimeError):
            asyncio.get_running_loop()
        raise ValueError("in the pool")

    async def main() -> None:
        with pytest.raises(ValueError, match="in the pool"):
            await asyncio.get_running_loop().run_in_executor(None, work)
        asyncio.get_running_loop()

    with universe() as world:
        done(world, world.boot("a").spawn(main(), "main"))


def test_sets_of_tasks_do_not_depend_on_addresses() -> None:
    def order() -> list[str]:
        ballast = [object() for _ in range(1000)]
        with universe() as world:
            host = world.boot("a")

            async def wait() -> None:
                await asyncio.sleep(1)

            tasks = {host.spawn(wait(), f"t{number}") for number in range(40)}
            names = [task.get_name() for task in tasks]
            del ballast
            return names

    assert order() == order()


def test_names_of_tasks_are_the_universes_own() -> None:
    def names() -> list[str]:
        async def main() -> str:
            task = asyncio.current_task()
            assert task is not None
            return asyncio.create_task(asyncio.sleep(0)).get_name()

        with universe() as world:
            return [done(world, world.boot(name).spawn(main(), "main")) for name in "ab"]

    assert names() == names()


def test_what_spins_is_stopped() -> None:
    with universe(max_callbacks=5_000) as world:

        def spin() -> None:
            asyncio.get_running_loop().call_soon(spin)

        world.boot("a").post(spin)
        with pytest.raises(Runaway, match="over the budget of 5000"):
            world.run()


def test_what_spins_without_letting_time_pass_is_stopped_early(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("holdfast.sim.loop.MAX_PER_INSTANT", 1_000)
    with universe() as world:

        async def work() -> None:
            for _ in range(5_000):
                await asyncio.sleep(0.001)
            for _ in range(10**9):
                await asyncio.sleep(0)

        world.boot("a").spawn(work(), "work")
        with pytest.raises(Runaway, match="at one instant; a is about to run task a/work"):
            world.run()
        assert world.now() == pytest.approx(5.0)


def test_run_says_why_it_came_back() -> None:
    with universe() as world:
        host = world.boot("a")
        host.spawn(asyncio.sleep(10), "s")
        assert world.run(None, 1.0) is False, "something is left to do"
        assert world.now() == 1.0
        assert world.run(lambda: world.now() >= 10, 100.0) is True
        assert world.run(lambda: False, 100.0) is False, "never, and nothing happens any more"
        assert world.run() is True, "nothing is left"


def test_errors_of_hosts_are_kept_and_errors_of_the_harness_are_raised() -> None:
    def fail() -> None:
        raise ValueError("planted")

    with universe() as world:
        world.boot("a").post(fail)
        world.run()
        failure = world.loop.failures[0]
        assert (failure.host, str(failure.error)) == ("a", "planted")
        world.loop.call_soon(fail, context=world.context)
        with pytest.raises(ValueError, match="planted"):
            world.run()


def test_a_task_that_fails_and_that_nobody_asks_is_a_failure_too() -> None:
    async def fail() -> None:
        raise ValueError("planted")

    with universe() as world:
        world.boot("a").spawn(fail(), "f")
        world.run()
        assert [str(failure.error) for failure in world.loop.failures] == ["planted"]


def test_the_digest_tells_universes_apart_and_is_the_same_for_the_same() -> None:
    def digest(seed: int) -> str:
        with universe(seed) as world:
            for name in "abc":

                async def work(name: str = name) -> None:
                    rng = world.tape.rng(name)
                    for _ in range(20):
                        await asyncio.sleep(rng.random())

                world.boot(name).spawn(work(), "w")
            world.run()
            return world.digest()

    assert digest(1) == digest(1)
    assert len({digest(seed) for seed in range(20)}) == 20


def test_asking_for_the_digest_changes_nothing() -> None:
    with universe() as world:
        world.boot("a").spawn(asyncio.sleep(1), "s")
        world.run()
        assert world.digest() == world.digest()


def test_a_trace_names_every_callback_without_addresses() -> None:
    def trace() -> list[tuple[float, str, str]]:
        with universe() as world:
            world.loop.trace = []
            world.boot("a").spawn(asyncio.sleep(1), "s")
            world.run()
            return world.loop.trace

    first = trace()
    assert first == trace()
    assert any("a/s" in what for _, _, what in first)
    assert not any("0x" in what for _, _, what in first)
