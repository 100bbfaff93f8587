"""Run a mock engine in a test and collect what it says."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

from holdfast.base.errors import HoldfastError
from holdfast.base.ids import SequenceKey
from holdfast.engines.contract import GenerateRequest, Sampling, SequenceStep, StopRules, pack_ids
from holdfast.engines.mock import MockConfig, MockEngine
from holdfast.engines.mock.vocabulary import vocabulary


def request(
    text: str = "Tell me about the river.",
    *,
    max_tokens: int = 20,
    generated: list[int] | None = None,
    stop: dict[str, Any] | None = None,
    attempt: int = 1,
    lora: str | None = None,
    extra: dict[str, Any] | None = None,
    **sampling: Any,
) -> GenerateRequest:
    return GenerateRequest(
        request_id="0" * 32,
        model="mock",
        prompt_ids=pack_ids(vocabulary().encode(text)),
        sampling=Sampling(**sampling),
        stop=StopRules(max_tokens=max_tokens, **(stop or {})),
        generated_ids=pack_ids(generated or []),
        attempt=attempt,
        lora=lora,
        extra=extra or {},
    )


class Run:
    """A started engine and everything that came out of it."""

    def __init__(self, engine: MockEngine):
        self.engine = engine
        self.steps: list[list[SequenceStep]] = []
        self.times: list[float] = []
        self.tokens: dict[int, list[int]] = {}
        self.ends: dict[int, SequenceStep] = {}
        self.deaths: list[HoldfastError] = []
        self._keys = itertools.count(1)
        self._news = asyncio.Event()

    def submit(self, wanted: GenerateRequest) -> int:
        key = next(self._keys)
        self.tokens[key] = []
        self.engine.submit(SequenceKey(key), wanted)
        return key

    def sink(self, steps: list[SequenceStep]) -> None:
        self.steps.append(steps)
        self.times.append(asyncio.get_running_loop().time())
        for step in steps:
            assert step.key not in self.ends, "a step after the end"
            self.tokens[step.key].extend(step.tokens)
            if step.finish:
                self.ends[step.key] = step
        self._news.set()

    def on_death(self, error: HoldfastError) -> None:
        self.deaths.append(error)
        self._news.set()

    async def until(self, condition: Callable[[], bool], seconds: float = 10.0) -> None:
        async with asyncio.timeout(seconds):
            while not condition():
                self._news.clear()
                await self._news.wait()

    async def finish(self, key: int) -> list[int]:
        await self.until(lambda: key in self.ends)
        return self.tokens[key]


@asynccontextmanager
async def running(**config: Any) -> AsyncIterator[Run]:
    engine = MockEngine(MockConfig(**{"step_ms": 0.0, **config}))
    run = Run(engine)
    await engine.start(run.sink, run.on_death, lambda what, share: None)
    try:
        yield run
    finally:
        await engine.close()
