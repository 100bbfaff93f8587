"""A worker on its way out, over real sockets: what probes, metrics and discovery say at each stage."""

from __future__ import annotations

import asyncio
import random
import signal
from typing import Any

import pytest

from holdfast.engines.mock import MockConfig, MockEngine
from holdfast.health.config import SystemConfig
from holdfast.runtime.discovery.mem import MemDiscovery, MemHub
from holdfast.runtime.shutdown import EXIT_ENGINE_DIED, EXIT_FINISHED, EXIT_HANDED_OVER, ShutdownBudget
from holdfast.worker.config import WorkerConfig
from holdfast.worker.process import WorkerProcess
from tests.engines.mock.mockrun import request
from tests.frontend.support import until
from tests.patience import within
from tests.worker.remote import generate, linked, worker_child
from tests.worker.status_client import ask
from tests.worker.test_worker_telemetry import scrape, value


class SlowToForget(MemDiscovery):
    """A discovery that is away just now."""

    async def withdraw(self, instance: Any) -> None:
        await asyncio.sleep(3600)


def a_worker(discovery: MemDiscovery, **budget: float) -> WorkerProcess:
    config = WorkerConfig(
        engine="mock",
        shutdown=ShutdownBudget(**budget),
        system=SystemConfig(system_port=0),  # type: ignore[arg-type]
    )
    return WorkerProcess(config, MockEngine(MockConfig(step_ms=2.0)), discovery, random.Random(5))


async def started(worker: WorkerProcess) -> tuple[asyncio.Task[int], str]:
    running = asyncio.ensure_future(worker.run())
    async with asyncio.timeout(10):
        await worker.ready.wait()
    return running, worker.server.address


async def test_probes_and_metrics_while_streams_finish() -> None:
    worker = a_worker(MemDiscovery(MemHub()))
    running, address = await started(worker)
    assert value(scrape(worker), "dynamo_component_shutdown_remaining_seconds") == 30
    async with linked(address) as link:
        caller = generate(link, request(max_tokens=300))
        await caller.until(lambda: len(caller.tokens) > 3)
        worker.stop()
        await until(lambda: link.draining is not None)
        status = worker.vitals.status.address
        health, live = await ask(status, "/health"), await ask(status, "/live")
        assert health[0] == 503
        assert live[0] == 200
        seen = scrape(worker)
        assert value(seen, "dynamo_component_shutdown_inflight_requests") == 1
        assert 0 < value(seen, "dynamo_component_shutdown_remaining_seconds") < 30
        assert value(seen, "dynamo_component_shutdown_stage_seconds", stage="draining", reason="signal") > 0
        await caller.ended()
        assert caller.finish == "length"
    assert await asyncio.wait_for(running, 10) == EXIT_FINISHED
    assert value(scrape(worker), "dynamo_component_shutdown_inflight_requests") == 0


async def test_it_leaves_discovery_before_it_tells_its_callers() -> None:
    """Whoever looks for workers must not find one that turns him away."""
    hub = MemHub()
    worker = a_worker(MemDiscovery(hub))
    listed: list[bool] = []
    running, _ = await started(worker)
    assert hub.records
    drain = worker.server.drain

    def told(reason: str, remaining_ms: int) -> None:
        listed.append(bool(hub.records))
        drain(reason, remaining_ms)

    worker.server.drain = told  # type: ignore[method-assign]
    worker.stop()
    assert await asyncio.wait_for(running, 10) == EXIT_FINISHED
    assert listed == [False]


async def test_a_discovery_that_is_away_holds_nobody_up_for_longer_than_its_share() -> None:
    worker = a_worker(SlowToForget(MemHub()), shutdown_router_grace=0.2)
    running, address = await started(worker)
    async with linked(address) as link:
        caller = generate(link, request(max_tokens=100))
        await caller.until(lambda: bool(caller.tokens))
        began = asyncio.get_running_loop().time()
        worker.stop()
        await caller.ended()
        assert caller.finish == "length"
        await until(lambda: link.draining is not None)
        assert asyncio.get_running_loop().time() - began < within(2.0)
        running.cancel()  # closing it is what this discovery cannot do either
        await asyncio.wait([running])


async def test_a_dead_engine_is_told_at_once_whatever_discovery_does() -> None:
    worker = a_worker(SlowToForget(MemHub()), shutdown_router_grace=1.0, shutdown_cleanup_timeout=0.5)
    running, address = await started(worker)
    async with linked(address) as link:
        caller = generate(link, request(max_tokens=10_000))
        await caller.until(lambda: bool(caller.tokens))
        began = asyncio.get_running_loop().time()
        worker.host.engine.control({"do": "die"})  # type: ignore[attr-defined]
        await caller.ended()
        await until(lambda: link.draining is not None)
        assert asyncio.get_running_loop().time() - began < within(0.5)
    assert await asyncio.wait_for(running, 20) == EXIT_ENGINE_DIED


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_total_of_nothing_hands_over_at_once(tmp_path: Any, number: signal.Signals) -> None:
    budget = {"shutdown": ShutdownBudget(shutdown_inflight_timeout=0.0)}
    async with worker_child(tmp_path, budget) as (child, record), linked(record.address) as link:
        caller = generate(link, request(max_tokens=20_000))
        await caller.until(lambda: bool(caller.tokens))
        child.process.send_signal(number)
        await caller.ended()
        assert caller.error is not None
        assert caller.error.code == "worker_draining"
        assert await child.exit_code(5.0) == EXIT_HANDED_OVER
