"""What the vLLM adapter itself costs per token: the same outputs heard directly and through it, without vLLM.

A stand-in for AsyncLLM puts one token of each stream into queues per step, as vLLM's output handler does. It runs
anywhere: ``python -m bench.vllm_adapter``. `bench.vllm_overhead` measures the same with vLLM, for quiet machines.
"""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from types import SimpleNamespace
from typing import Any

from tests.engines.test_driven import ask

from holdfast.base.ids import SequenceKey
from holdfast.engines.contract import Capabilities, EngineInfo, LoadProgress, ModelFiles, SequenceStep
from holdfast.engines.vllm.config import VllmConfig
from holdfast.engines.vllm.engine import VllmEngine

STREAMS, TOKENS, TURNS = 16, 400, 9


class StandIn:
    """Hands out one token per stream and step."""

    errored = False
    output_handler = None

    def __init__(self) -> None:
        self.queues: list[asyncio.Queue[Any]] = []

    def shutdown(self, timeout: float | None = None) -> None:
        """Nothing runs."""

    async def generate(self, *_: Any, **__: Any) -> AsyncIterator[Any]:
        queue: asyncio.Queue[Any] = asyncio.Queue()
        self.queues.append(queue)
        finished = False
        while not finished:
            said = await queue.get()
            finished = said.finished
            yield said

    async def run(self) -> None:
        """Make all steps, once all streams are there."""
        while len(self.queues) < STREAMS:  # noqa: ASYNC110  it takes a turn or two
            await asyncio.sleep(0)
        for number in range(TOKENS):
            end = number == TOKENS - 1
            for queue in self.queues:
                one = SimpleNamespace(token_ids=[5], logprobs=None, finish_reason="length" if end else None)
                queue.put_nowait(
                    SimpleNamespace(finished=end, outputs=[one], num_cached_tokens=0, kv_transfer_params=None)
                )
            for _ in range(3):
                await asyncio.sleep(0)
        self.queues.clear()


class Bare(VllmEngine):
    """The adapter over the stand-in."""

    async def boot(self, on_load: LoadProgress) -> EngineInfo:  # noqa: ARG002
        self.llm = StandIn()
        self._kinds = (dict, 1, None, lambda ids, cache_salt=None: ids)  # noqa: ARG005
        return EngineInfo(
            engine="vllm", version="", model="m", context_length=4096, block_size=16, total_kv_blocks=8,
            max_num_seqs=64, max_num_batched_tokens=64, eos_token_ids=(2,), vocab_size=1000, fingerprint="",
            capabilities=Capabilities(), files=ModelFiles(b"{}", ""),
        )  # fmt: skip


async def directly(llm: StandIn) -> None:
    """Hear all tokens by ``generate`` alone."""

    async def one() -> None:
        async for said in llm.generate():
            assert said.outputs[0].token_ids

    await asyncio.gather(llm.run(), *(one() for _ in range(STREAMS)))


async def measured(work: Callable[[], Awaitable[None]]) -> float:
    """Return microseconds of CPU per token."""
    began = time.process_time()
    await work()
    return (time.process_time() - began) / (STREAMS * TOKENS) * 1e6


async def main() -> None:
    """Take turns and print the medians."""
    engine, over, left, keys = Bare(VllmConfig(model="m")), asyncio.Event(), 0, iter(range(1, 1 << 30))

    def sink(steps: list[SequenceStep]) -> None:
        nonlocal left
        left -= sum(step.finish is not None for step in steps)
        if not left:
            over.set()

    async def by_adapter() -> None:
        nonlocal left
        left = STREAMS
        over.clear()
        for _ in range(STREAMS):
            engine.submit(SequenceKey(next(keys)), ask(max_tokens=TOKENS, ignore_eos=True))
        await engine.llm.run()
        await over.wait()

    await engine.start(sink, print, lambda *_: None)
    seen: dict[str, list[float]] = {"directly": [], "through the adapter": []}
    for _ in range(TURNS):
        seen["directly"].append(await measured(lambda: directly(engine.llm)))
        seen["through the adapter"].append(await measured(by_adapter))
    await engine.close()
    for name, values in seen.items():
        print(f"{name:<22}{statistics.median(values):6.2f} us CPU/token, {STREAMS} streams, median of {TURNS}")


if __name__ == "__main__":
    asyncio.run(main())
