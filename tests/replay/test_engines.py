"""Engines driven directly: the cache finds exactly what the trace shares, and every end reaches the record."""

import asyncio
import random

import pytest

from holdfast.engines.mock import MockConfig, MockEngine
from holdfast.replay.arrivals import Arrivals
from holdfast.replay.engines import EngineDriver
from holdfast.replay.prompts import Prompts
from holdfast.replay.record import Recording
from holdfast.replay.run import replay
from holdfast.replay.trace import TraceRequest
from tests.support.virtual_time import virtual

BLOCK = 64


def conversations(rng: random.Random, count: int) -> list[TraceRequest]:
    """Prompts that begin like earlier ones, and leave them at any block."""
    fresh = iter(range(1, 1_000_000))
    known: list[tuple[int, ...]] = [(0,)]
    found = []
    for at in range(count):
        old = rng.choice(known)
        ids = (*old[: rng.randint(1, len(old))], *(next(fresh) for _ in range(rng.randint(1, 3))))
        known.append(ids[:-1])
        found.append(TraceRequest(at * 100.0, len(ids) * 512 - rng.randint(0, 511), rng.randint(1, 20), ids))
    return found


def shared(one: TraceRequest, before: list[TraceRequest]) -> int:
    """Return how many tokens of a prompt some earlier one began with, in whole blocks of the engine."""
    best = 0
    for other in before:
        equal = 0
        for a, b in zip(one.hash_ids, other.hash_ids, strict=False):
            if a != b:
                break
            equal += 1
        best = max(best, min(equal * 512, other.input_length) // BLOCK * BLOCK)
    return min(best, (one.input_length - 1) // BLOCK * BLOCK)


async def go(engines: list[MockEngine], requests: list[TraceRequest], **more: float) -> Recording:
    driver = EngineDriver(engines, Prompts())
    await driver.start()
    try:
        return await replay(requests, driver, Arrivals(concurrency=1), random.Random(1), **more)  # type: ignore[arg-type]
    finally:
        await driver.close()


@virtual
async def test_the_cache_finds_what_the_trace_shares():
    requests = conversations(random.Random(2), 60)
    recording = await go([MockEngine(MockConfig(profile="reference"))], requests)
    assert [record.outcome for record in recording.records] == ["ok"] * 60
    assert [record.cached for record in recording.records] == [
        shared(one, requests[:at]) for at, one in enumerate(requests)
    ]
    assert [record.generated for record in recording.records] == [request.output_length for request in requests]


@virtual
async def test_round_robin_and_times_of_the_model():
    requests = [TraceRequest(0, 1000, 5, (2 * n, 2 * n + 1)) for n in range(6)]
    recording = await go([MockEngine(MockConfig(profile="reference")) for _ in range(3)], requests)
    assert [record.worker for record in recording.records] == ["0", "1", "2"] * 2
    first = recording.records[0].time_to_first_token
    assert first == pytest.approx((4.209989e-07 * 1e6 + 1.518344e-02 * 1e3 + 16.50142) / 1e3)


@virtual
async def test_what_an_engine_refuses_or_never_ends_is_recorded():
    requests = [TraceRequest(0, 100_000, 5, tuple(range(196))), TraceRequest(0, 100, 30_000, (1,))]
    engine = MockEngine(MockConfig())
    recording = await go([engine], requests, patience=2.0)
    assert [(r.outcome, r.reason) for r in recording.records] == [
        ("failed", "context_length_exceeded"), ("timeout", "deadline_exceeded"),
    ]  # fmt: skip
    assert engine.load().running == 0


@virtual
async def test_the_death_of_an_engine_fails_what_it_had():
    engine = MockEngine(MockConfig())
    driver = EngineDriver([engine], Prompts())
    await driver.start()
    asyncio.get_running_loop().call_later(0.05, engine.misbehave, "die")
    recording = await replay([TraceRequest(0, 100, 1000, (1,))], driver, Arrivals(), random.Random(1), patience=5.0)
    await driver.close()
    assert [(r.outcome, r.reason) for r in recording.records] == [("failed", "engine_failed")]
