"""The canary on a virtual clock: when it is sent, what its result means, and that it never disturbs anybody."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

import pytest

from holdfast.health.canary import LOOK_SECONDS, RETRY_SECONDS, Canary
from holdfast.health.config import CanaryConfig
from holdfast.health.probe import ProbeResult
from holdfast.health.readiness import Readiness
from holdfast.wire.frames import Load, Progress
from tests.support.virtual_time import virtual

GOOD = ProbeResult("good", tokens=1)
SLACK = 3 * LOOK_SECONDS


class World:
    """An engine that answers, hangs or refuses; and real traffic."""

    def __init__(self, **config: object) -> None:
        self.in_flight = 0
        self.deliveries = 0
        self.in_service = True
        self.steps = 0
        self.silent = 0.0
        self.mode = "good"
        self.sent: list[float] = []
        self.took = 0.001
        self.config = CanaryConfig(**{"health_check_enabled": True, **config})  # type: ignore[arg-type]
        self.readiness = Readiness(failures=self.config.health_check_failures)
        self.canary = Canary("generate", self.send, self, self.readiness, self.config)

    def measure(self) -> tuple[Progress, Load]:
        progress = Progress(self.steps, 0, 0, "decode", self.silent, self.in_flight)
        return progress, Load(running=self.in_flight)

    async def send(self, timeout: float) -> ProbeResult:  # noqa: ASYNC109
        self.sent.append(asyncio.get_running_loop().time())
        if self.mode == "hang":
            await asyncio.sleep(timeout)
            return ProbeResult("bad", f"not over after {timeout:g} s")
        await asyncio.sleep(self.took)
        return GOOD if self.mode == "good" else ProbeResult(self.mode, "because")  # type: ignore[arg-type]

    @property
    def ready(self) -> bool:
        return self.readiness.is_ready("generate")

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[float]:
        await self.canary.prove()
        self.sent.clear()
        task = asyncio.create_task(self.canary.run())
        try:
            yield asyncio.get_running_loop().time()
        finally:
            task.cancel()
            await asyncio.wait([task])

    async def until_ready(self, ready: bool) -> float:
        while self.ready is not ready:  # noqa: ASYNC110
            await asyncio.sleep(0.05)
        return asyncio.get_running_loop().time()


@virtual
async def test_an_idle_endpoint_is_tested_every_wait() -> None:
    world = World(canary_wait_time=10.0)
    async with world.running() as start:
        await asyncio.sleep(35)
        assert [round(at - start) for at in world.sent] == [10, 20, 30]


@virtual
async def test_without_the_variable_only_the_first_probe_is_sent() -> None:
    world = World(health_check_enabled=False)
    async with world.running():
        await asyncio.sleep(300)
        assert world.sent == []
        assert world.ready


@virtual
async def test_an_idle_hang_is_found_within_wait_plus_failures_times_timeout() -> None:
    world = World(canary_wait_time=10.0, health_check_request_timeout=3.0, health_check_failures=2)
    async with world.running() as start:
        world.mode = "hang"
        found = await world.until_ready(False)
        assert found - start < 10 + 2 * 3 + SLACK
        assert "not over after 3 s" in world.readiness.verdict.reasons[0]
        world.mode = "good"
        back = await world.until_ready(True)
        assert back - found < 3 + RETRY_SECONDS + SLACK


@virtual
async def test_one_failure_is_no_verdict_and_is_followed_up_at_once() -> None:
    world = World(canary_wait_time=10.0)
    async with world.running():
        world.mode = "bad"
        while not world.sent:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        world.mode = "good"
        await asyncio.sleep(1)
        assert len(world.sent) == 2
        assert world.sent[1] - world.sent[0] < SLACK
        assert world.ready


@virtual
async def test_a_worker_that_was_found_broken_is_tested_until_it_answers_even_without_the_variable() -> None:
    world = World(health_check_enabled=False, health_check_busy_stall=5.0)
    async with world.running():
        world.in_flight = 1
        await world.until_ready(False)
        world.in_flight, world.mode = 0, "hang"
        await asyncio.sleep(20)
        assert len(world.sent) >= 4
        world.mode = "good"
        await world.until_ready(True)


@virtual
async def test_real_traffic_resets_the_clock() -> None:
    world = World(canary_wait_time=10.0)
    async with world.running():
        for _ in range(100):
            await asyncio.sleep(1)
            world.deliveries += 1
        assert world.sent == []


@virtual
async def test_real_traffic_brings_a_worker_back() -> None:
    world = World(canary_wait_time=1.0)
    async with world.running():
        world.mode = "bad"
        await world.until_ready(False)
        world.in_flight = 1
        world.deliveries += 1
        world.steps += 1
        await asyncio.sleep(2 * LOOK_SECONDS)
        assert world.ready


@virtual
async def test_a_busy_worker_is_never_tested_and_never_blamed_while_it_makes_progress() -> None:
    world = World(canary_wait_time=1.0, health_check_busy_stall=5.0)
    world.mode = "good"
    async with world.running():
        world.mode = "bad"
        world.in_flight = 3
        for _ in range(600):
            await asyncio.sleep(0.5)
            world.steps += 1
        assert world.sent == []
        assert world.ready


@virtual
async def test_a_busy_engine_without_progress_is_not_ready_after_the_bound() -> None:
    world = World(health_check_busy_stall=60.0)
    async with world.running() as start:
        world.in_flight = 2
        found = await world.until_ready(False)
        assert 60 <= found - start < 60 + SLACK + 0.1
        assert "2 in flight" in world.readiness.verdict.reasons[0]
        assert "bound 60.0 s" in world.readiness.verdict.reasons[0]
        assert world.sent == []


@virtual
async def test_announced_silent_steps_raise_the_bound() -> None:
    world = World(health_check_busy_stall=5.0)
    async with world.running():
        world.in_flight, world.silent = 1, 100.0
        await asyncio.sleep(250)
        assert world.ready


@pytest.mark.parametrize("mode", ["unclear"])
@virtual
async def test_no_room_is_no_verdict(mode: str) -> None:
    world = World(canary_wait_time=1.0)
    async with world.running():
        world.mode = mode
        await asyncio.sleep(60)
        assert world.ready


@virtual
async def test_results_after_the_end_of_service_do_not_count() -> None:
    world = World(canary_wait_time=1.0, health_check_failures=1)
    async with world.running():
        world.mode = "hang"
        while not world.sent:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        world.in_service = False
        await asyncio.sleep(30)
        assert world.ready
        assert len(world.sent) == 1


@virtual
async def test_proving_goes_on_until_it_succeeds() -> None:
    world = World()
    world.mode = "bad"
    proving = asyncio.create_task(world.canary.prove())
    await asyncio.sleep(10)
    assert not proving.done()
    assert len(world.sent) == 10
    assert "because" in world.readiness.verdict.reasons[0]
    world.mode = "good"
    await asyncio.sleep(RETRY_SECONDS + 0.1)
    assert proving.done()
    assert world.ready


@virtual
async def test_a_fault_in_a_look_does_not_end_the_watch() -> None:
    world = World(canary_wait_time=2.0)
    async with world.running():
        real, world.measure = world.measure, lambda: 1 / 0  # type: ignore[method-assign,assignment,return-value]
        await asyncio.sleep(5)
        world.measure = real  # type: ignore[method-assign]
        await asyncio.sleep(1)
        assert world.sent
