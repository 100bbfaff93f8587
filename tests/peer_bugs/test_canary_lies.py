"""Canaries that prove the wrong thing, or disturb those that are well; named after the public issue or change."""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections.abc import AsyncIterator
from typing import Any, get_args

import pytest

from holdfast.base.errors import DeadlineExceeded
from holdfast.engines.contract import Capabilities, EngineInfo, ModelFiles
from holdfast.engines.mock import MockConfig, MockEngine
from holdfast.health.config import CanaryConfig, SystemConfig
from holdfast.health.payloads import Role, payload_for, request_of
from holdfast.health.probe import ProbeResult
from holdfast.health.readiness import Readiness
from holdfast.runtime.discovery.mem import MemDiscovery, MemHub
from holdfast.worker.config import WorkerConfig
from holdfast.worker.process import WorkerProcess
from tests.engines.mock.mockrun import request
from tests.worker.remote import generate, linked
from tests.worker.status_client import ask, until
from tests.worker.test_worker_health import Mute

QUICK = CanaryConfig(health_check_enabled=True, canary_wait_time=0.4, health_check_request_timeout=0.2)


@contextlib.asynccontextmanager
async def worker(engine: Any, hub: MemHub | None = None, **config: Any) -> AsyncIterator[WorkerProcess]:
    settings = WorkerConfig(engine="mock", **{"system": SystemConfig(system_port=0), "health": QUICK, **config})
    process = WorkerProcess(settings, engine, MemDiscovery(hub or MemHub()), random.Random(3))
    running = asyncio.create_task(process.run())
    try:
        async with asyncio.timeout(5):
            while not process.vitals.status.address:  # noqa: ASYNC110
                await asyncio.sleep(0.005)
        yield process
    finally:
        process.stop()
        with contextlib.suppress(DeadlineExceeded):
            await asyncio.wait_for(running, 10)


async def served(process: WorkerProcess) -> str:
    async with asyncio.timeout(10):
        await process.ready.wait()
    return process.vitals.status.address


async def test_dynamo_pr_5038_nobody_can_find_a_worker_before_its_first_probe_passed() -> None:
    """There: registration, subscription and first probe race, so the canary had to be switched off."""
    hub = MemHub()
    seen: list[str] = []
    watcher = MemDiscovery(hub)
    await watcher.start()
    watcher.subscribe(lambda event: seen.append(event.record.state) if event.record else None)
    async with worker(MockEngine(MockConfig(step_ms=300.0)), hub) as process:
        async with asyncio.timeout(5):
            while not process.host.measure()[1].running:  # noqa: ASYNC110  the probe is in the engine
                await asyncio.sleep(0.005)
        assert seen == []
        await served(process)
        assert seen == ["ready"]
    await watcher.close()


@pytest.mark.parametrize("role", get_args(Role))
@pytest.mark.parametrize("engine", ["vllm", "sglang", "trtllm", "mock", "llamacpp", "anything else"])
def test_dynamo_pr_4804_and_11083_every_engine_has_a_payload_for_every_role(engine: str, role: Any) -> None:
    """There: decode workers without a payload would have stayed not ready for ever."""
    info = EngineInfo(engine, "1", "m", 9, 1, 1, 1, 1, (2,), 9, "f", Capabilities(), ModelFiles(b"{}", ""))
    for text in (False, True):
        payload = payload_for(info, role=role, text=text).to_dict()
        assert request_of(payload, model="m", request_id="c").stop.max_tokens == 1


def test_dynamo_weakness_16_an_endpoint_that_cannot_be_probed_is_ready_once_served() -> None:
    """There: readiness can stick at 503 for an endpoint without a health-check target."""
    readiness = Readiness(listed=("generate", "metrics"), canary=True)
    readiness.succeeded("generate", readiness.target("generate"))
    readiness.endpoint("metrics")
    assert readiness.verdict.ready


@pytest.mark.parametrize("finish", ["error", "abort", "stop"])
async def test_dynamo_pr_9642_an_error_or_an_empty_stream_is_no_success(finish: str) -> None:
    """There: a canary that ended with an engine error could still mark the endpoint ready."""
    async with worker(Mute(finish), engine_start_timeout=1.0) as process:
        await asyncio.sleep(0.3)
        status, body = await ask(process.vitals.status.address, "/health")
        assert status == 503
        assert any("endpoint generate: the canary" in reason for reason in body["reasons"])


async def test_sglang_pr_9198_the_first_failure_does_not_eject() -> None:
    """There: one failed check ejected a worker; here two in a row are needed, and the second comes at once."""
    engine = MockEngine(MockConfig(step_ms=1.0))
    async with worker(engine) as process:
        address = await served(process)
        send, kinds = process.vitals.canary._send, []

        async def noted(bound: float) -> ProbeResult:
            result = await send(bound)
            kinds.append(result.kind)
            return result

        process.vitals.canary._send = noted
        engine.misbehave("error", times=1)
        deadline = time.monotonic() + 1.5
        while time.monotonic() < deadline:
            assert (await ask(address, "/health"))[0] == 200
            await asyncio.sleep(0.02)
        assert kinds[:2] == ["bad", "good"]


async def test_smg_pr_2468_a_failed_worker_is_probed_until_it_answers() -> None:
    """There: 'failed' was a terminal state."""
    engine = MockEngine(MockConfig(step_ms=1.0))
    async with worker(engine, health=CanaryConfig(health_check_busy_stall=0.3)) as process:
        address = await served(process)
        async with linked(process.server.address) as link:
            caller = generate(link, request(max_tokens=10_000))
            await caller.until(lambda: bool(caller.tokens))
            engine.misbehave("hang")
            await until(address, 503)
            caller.handle.kill()
        await asyncio.sleep(0.5)
        assert (await ask(address, "/health"))[0] == 503, "idle now, but not proven"
        engine.misbehave("unhang")
        await until(address, 200, within=5)


async def test_vllm_24207_an_engine_that_fails_every_request_is_found_by_the_canary() -> None:
    """There: CUDA errors in one instance, /health fine."""
    engine = MockEngine(MockConfig(step_ms=1.0))
    async with worker(engine) as process:
        address = await served(process)
        engine.misbehave("error", times=1_000)
        _, body = await until(address, 503)
        assert "engine_failed" in body["reasons"][0]
        assert (await ask(address, "/live"))[0] == 200
        engine.misbehave("error", times=0)
        await until(address, 200)


async def test_production_stack_pr_1001_canaries_leave_nothing_behind() -> None:
    """There: counters rise with every check. Here canaries hold no seat, count for nobody, and end."""
    engine = MockEngine(MockConfig(step_ms=1.0))
    async with worker(engine) as process:
        await served(process)
        for _ in range(20):
            assert (await process.vitals.canary.once()).kind == "good"
            assert not any(process.host.leases.sums().values())
        engine.misbehave("hang")
        for _ in range(3):
            assert (await process.vitals.canary.once()).kind == "bad"
        engine.misbehave("unhang")
        async with asyncio.timeout(5):
            while engine.load().running or engine.load().waiting:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        assert process.host.deliveries == 0
        assert process.host.measure()[0].tokens_after_cancel <= 3


async def test_dynamo_weakness_13_liveness_is_not_readiness() -> None:
    """There: /live is /health, with a failure threshold of one: a slow canary restarts the pod."""
    engine = MockEngine(MockConfig(step_ms=1.0))
    async with worker(engine) as process:
        address = await served(process)
        engine.misbehave("hang")
        await until(address, 503)
        for _ in range(20):
            assert (await ask(address, "/live"))[0] == 200
