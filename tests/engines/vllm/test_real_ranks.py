"""One vLLM with two data-parallel ranks and adapters, and what a killed worker leaves behind."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from holdfast.base.errors import Conflict, InvalidRequest, ModelNotFound, NotFound
from holdfast.engines.abilities import Adapter
from holdfast.engines.orphans import marked
from tests.engines.vllm.conftest import DEVICE, PROCESSES
from tests.engines.vllm.harness import PATIENCE, QUESTIONS, SMALL, Run, ask
from tests.patience import within

pytestmark = [pytest.mark.vllm, pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(900)]
RANKS = 1 if DEVICE else 2
"""Each needs a device of its own."""
FLAGS = f"{SMALL} --data-parallel-size {RANKS} --enable-lora --max-loras 2 --max-lora-rank 8"


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def run(model: str) -> AsyncIterator[Run]:
    engine = Run(model, FLAGS)
    try:
        yield await engine.start()
    finally:
        await engine.engine.close()


@pytest.mark.skipif(RANKS < 2, reason="one device has one rank")
async def test_ranks_are_told_apart(run: Run) -> None:
    assert run.info.data_parallel_size == 2
    assert run.info.capabilities.lora
    assert len(run.engine.followers) == 2
    prompt = [i % 40_000 + 100 for i in range(7, 7 + 64 * 7919, 7919)]
    one = await run.generate(ask(prompt, max_tokens=4, extra={"data_parallel_rank": 0}))
    assert one == await run.generate(ask(prompt, max_tokens=4, extra={"data_parallel_rank": 1}))
    await run.until(lambda: {event.dp_rank for event in run.events} == {0, 1})
    key = run.submit(ask(prompt, max_tokens=60, extra={"data_parallel_rank": 1}))
    await run.until(lambda: len(run.tokens[key]) > 20)
    load = run.engine.load()
    assert [rank.running for rank in load.ranks] == [0, 1]
    await run.finished(key)


async def test_adapters_come_and_go(run: Run) -> None:
    from tests.support.hf_model import lora_directory  # noqa: PLC0415

    prompt = run.prompt(QUESTIONS[0])
    base = await run.generate(ask(prompt, max_tokens=8))
    path = str(lora_directory("poet", seed=1))
    await run.engine.load_adapter(Adapter("poet", path))
    assert run.engine.adapters() == (Adapter("poet", path),)
    poet = await run.generate(ask(prompt, max_tokens=8, lora="poet"))
    assert poet != base
    assert await run.generate(ask(prompt, max_tokens=8)) == base
    assert await run.generate(ask(prompt, max_tokens=8, lora="poet", generated=poet[:3])) == poet[3:]
    with pytest.raises(Conflict):
        await run.engine.load_adapter(Adapter("poet", path))
    with pytest.raises(InvalidRequest):
        await run.engine.load_adapter(Adapter("large", str(lora_directory("large", rank=16))))
    await run.engine.unload_adapter("poet")
    with pytest.raises(NotFound):
        await run.engine.unload_adapter("poet")
    with pytest.raises(ModelNotFound):
        run.submit(ask(prompt, lora="poet"))


PARENT = """
import asyncio, sys, time
from holdfast.engines.vllm.config import VllmConfig
from holdfast.engines.vllm.engine import VllmEngine

async def main():
    engine = VllmEngine(VllmConfig(model=sys.argv[1], args=sys.argv[2]))
    starting = asyncio.ensure_future(engine.start(lambda _: None, print, lambda *_: None))
    while not (sys.argv[3] == "early" and len(engine._orphans.pids()) >= int(sys.argv[4])) and not starting.done():
        await asyncio.sleep(0.05)
    print(engine._orphans._mark, len(engine._orphans.pids()), flush=True)
    await asyncio.sleep(600)

if __name__ == "__main__":
    asyncio.run(main())
"""


@pytest.mark.parametrize("when", ["early", *(["ready"] if DEVICE else [])])  # on CPUs the proof kills those that serve
async def test_a_killed_worker_leaves_no_process(model: str, tmp_path: Path, when: str) -> None:
    script = tmp_path / "parent.py"
    script.write_text(PARENT)
    command = [sys.executable, script, model, SMALL, when, str(PROCESSES)]
    parent = await asyncio.to_thread(subprocess.Popen, command, stdout=subprocess.PIPE, text=True)
    try:
        assert parent.stdout is not None
        async with asyncio.timeout(5 * PATIENCE):
            mark, count = (await asyncio.to_thread(parent.stdout.readline)).split()
        assert int(count) >= PROCESSES
        os.kill(parent.pid, signal.SIGKILL)
        parent.wait()
        async with asyncio.timeout(within(2.0)):
            while marked(mark):  # noqa: ASYNC110  the kernel has no event for it
                await asyncio.sleep(0.05)
    finally:
        parent.kill()
        parent.wait()
