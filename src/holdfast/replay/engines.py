"""Drives engines in this process directly, without a frontend: what an engine alone makes of a load.

Must never route by anything but the function it is given; the cluster with all its decisions is `sim`'s.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

from holdfast.base.errors import EngineFailed, HoldfastError
from holdfast.base.ids import SequenceKey
from holdfast.engines.contract import Engine, GenerateRequest, Sampling, SequenceStep, StopRules
from holdfast.replay.driver import Events, Job
from holdfast.replay.prompts import Prompts

Choose = Callable[[Job], int]
"""Returns the index of the engine that serves a job."""


class _Open:
    __slots__ = ("done", "events", "prompt")

    def __init__(self, events: Events, done: asyncio.Future[None], prompt: int):
        self.events = events
        self.done = done
        self.prompt = prompt


class EngineDriver:
    """A `Driver` over started engines. Use `start` first and `close` last."""

    def __init__(self, engines: Sequence[Engine], prompts: Prompts, choose: Choose | None = None):
        """``choose``: round robin when None."""
        self.engines = engines
        self._prompts = prompts
        self._choose: Choose = choose or (lambda job: job.index % len(engines))
        self._open: dict[SequenceKey, _Open] = {}

    async def start(self) -> None:
        """Start all engines. Raises what they raise."""
        for engine in self.engines:
            await engine.start(self._stepped, self._died, lambda *_: None)

    async def close(self) -> None:
        """Stop all engines."""
        for engine in self.engines:
            await engine.close()

    async def submit(self, job: Job, events: Events) -> None:
        """Serve one job; see `Driver.submit`."""
        key = SequenceKey(job.index + 1)
        at = self._choose(job)
        prompt = self._prompts.ids(job.request)
        stop = StopRules(max_tokens=job.request.output_length, ignore_eos=True)
        request = GenerateRequest(f"{job.index:032x}", "mock", prompt, Sampling(temperature=0.0), stop)
        events.worker(str(at))
        done = asyncio.get_running_loop().create_future()
        self._open[key] = _Open(events, done, job.request.input_length)
        try:
            self.engines[at].submit(key, request)
            await done
        finally:
            self._open.pop(key, None)
            if not done.done() or done.cancelled():
                self.engines[at].cancel(key)

    def _stepped(self, steps: list[SequenceStep]) -> None:
        for step in steps:
            one = self._open.get(step.key)
            if one is None:
                continue
            if step.tokens:
                one.events.tokens(len(step.tokens))
            if step.finish is None:
                continue
            if step.finish in {"stop", "length"}:
                one.events.usage(one.prompt, step.index + len(step.tokens), step.cached_tokens)
            else:
                one.events.ended("failed", step.error.code if step.error else step.finish)
            if not one.done.done():
                one.done.set_result(None)

    def _died(self, error: HoldfastError) -> None:
        for one in self._open.values():
            if not one.done.done():
                one.done.set_exception(EngineFailed(f"The engine died: {error.message}"))
