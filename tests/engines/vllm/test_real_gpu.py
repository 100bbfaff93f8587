"""What only a GPU can do: memory given back and taken again, and the same text afterwards.

Runs where ``HOLDFAST_VLLM_DEVICE`` names one (`conftest`).
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from holdfast.base.errors import Conflict
from holdfast.engines.vllm.memory import gpu_memory
from holdfast.kv.events import AllBlocksCleared
from tests.engines.vllm.conftest import DEVICE
from tests.engines.vllm.harness import QUESTIONS, SMALL, Run, ask

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.asyncio(loop_scope="module"),
    pytest.mark.timeout(900),
    pytest.mark.skipif(not DEVICE, reason="needs a GPU, named in HOLDFAST_VLLM_DEVICE"),
]
WEIGHTS = 538_000_000
"""Bytes, at float32."""


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def run(model: str) -> AsyncIterator[Run]:
    engine = Run(model, f"{SMALL} --enable-sleep-mode")
    try:
        yield await engine.start()
    finally:
        await engine.engine.close()


async def texts(run: Run) -> list[list[int]]:
    return [await run.generate(ask(run.prompt(question), max_tokens=32)) for question in QUESTIONS]


def free_bytes() -> int:
    (device,) = gpu_memory(0.0, 1)
    return device.free


@pytest.mark.parametrize("level", [1, 2])
async def test_it_sleeps_and_says_the_same_when_it_wakes(run: Run, level: int) -> None:
    before = await texts(run)
    run.events.clear()
    for _ in range(2):
        awake = await asyncio.to_thread(free_bytes)
        await run.engine.sleep(level)
        asleep = await asyncio.to_thread(free_bytes)
        await run.engine.wake_up()
        again = await asyncio.to_thread(free_bytes)
        print(f"level {level}: {asleep - awake} bytes given back, {asleep - again} taken again")
        assert asleep - awake > 0.9 * WEIGHTS
        assert asleep - again > 0.9 * WEIGHTS
        assert await texts(run) == before
    await run.until(lambda: any(isinstance(event, AllBlocksCleared) for event in run.events))
    await run.engine.check()


async def test_it_does_not_sleep_with_streams_in_it(run: Run) -> None:
    key = run.submit(ask(run.prompt(QUESTIONS[1]), max_tokens=300))
    await run.until(lambda: run.tokens[key])
    with pytest.raises(Conflict):
        await run.engine.sleep(1)
    run.cancel(key)
