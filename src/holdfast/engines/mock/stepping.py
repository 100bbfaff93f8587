"""When the mock engine's steps happen, on the event loop's clock.

A step is two callbacks: `_begin` chooses the batch and works out how long it takes, `_finish` has the tokens produced
when that time is over and hands them to the sink in one call. No task, no timer while idle.

Must never block the loop, and never know what a token is.
"""

from __future__ import annotations

import asyncio
from abc import abstractmethod

from holdfast.engines.contract import Engine, Phase, SequenceStep, StepSink
from holdfast.engines.mock.cache import BlockPool
from holdfast.engines.mock.config import MockConfig
from holdfast.engines.mock.misbehaviour import StandingOrders
from holdfast.engines.mock.profiles import PROFILES
from holdfast.engines.mock.scheduler import Batch, Scheduler
from holdfast.engines.mock.sequence import Sequence
from holdfast.engines.mock.timing import step_seconds


class SteppedEngine(Engine):
    """An engine that works in steps, stands still on command and can be late. See the module."""

    def __init__(self, config: MockConfig):
        self.config = config
        self._model = PROFILES[config.profile].model
        self._pool = BlockPool(
            config.num_blocks,
            config.block_size,
            reuse=config.prefix_caching,
            events=config.kv_events and config.prefix_caching,
        )
        self._scheduler = Scheduler(config, self._pool)
        self._orders = StandingOrders()
        self._phase: Phase = "starting"
        self._silent = 0.0
        self._steps = 0
        self._tick = 0.0
        """When the last step of the fixed schedule was due."""
        self._batch: Batch | None = None
        """The step under way."""
        self._timer: asyncio.Handle | None = None
        self._unhang_timer: asyncio.TimerHandle | None = None
        self._dead = False
        self._loop: asyncio.AbstractEventLoop
        self._sink: StepSink

    @abstractmethod
    def _produce(self, batch: Batch) -> list[SequenceStep]:
        """Return what each sequence of a step got."""

    @abstractmethod
    def _fail(self, error: Exception) -> None:
        """A step has failed: the engine is no more."""

    def _wake(self) -> None:
        if self._timer is None and not self._orders.hung:
            self._timer = self._loop.call_soon(self._begin)

    def _begin(self) -> None:
        self._timer = None
        if self._orders.hung or self._dead:
            return
        if not self._scheduler.busy:
            self._phase, self._silent = "idle", 0.0
            return
        if self._orders.compile_seconds:
            self._compile()
            return
        try:
            self._batch = self._scheduler.next_batch()
            self._schedule_finish(self._batch)
        except Exception as error:  # a fault of ours must be the engine's death, not silence
            self._fail(error)

    def _compile(self) -> None:
        seconds, self._orders.compile_seconds = self._orders.compile_seconds, 0.0
        self._phase, self._silent = "compiling", seconds
        self._timer = self._loop.call_later(seconds, self._begin)

    def _schedule_finish(self, batch: Batch) -> None:
        duration = step_seconds(
            self.config,
            batch.prefill_tokens,
            batch.decoding,
            self._pool.used / self._pool.total,
            model=self._model,
            context=batch.context,
            pairs=batch.pairs,
        )
        duration *= self._orders.slow
        now = self._loop.time()
        start = now
        if self.config.step_ms is not None and now - self._tick < duration:
            start = self._tick  # the schedule is absolute: a late tick does not delay the next
        if batch.prefill_tokens:
            duration += batch.delay
        self._phase = "prefill" if batch.prefill_tokens else "decode"
        self._silent = duration
        self._tick = start + duration
        if duration <= 0:
            self._timer = self._loop.call_soon(self._finish)
        else:
            self._timer = self._loop.call_at(self._tick, self._finish)

    def _hasten(self, gone: Sequence) -> None:
        """Let the step under way end without the delay that only a cancelled sequence had asked for."""
        batch = self._batch
        if batch is None or self._timer is None or gone not in batch.sequences:
            return
        saved = gone.delay - batch.delay
        if saved > 0:
            self._timer.cancel()
            self._tick -= saved
            self._silent -= saved
            self._timer = self._loop.call_at(self._tick, self._finish)

    def _finish(self) -> None:
        self._timer = None
        if self._orders.hung or self._dead or self._batch is None:
            return
        batch, self._batch = self._batch, None
        try:
            if self.config.step_ms is not None and not self._orders.compile_seconds:
                self._scheduler.top_up(batch)
            steps = self._produce(batch)
            if steps:
                self._sink(steps)
        except Exception as error:
            self._fail(error)
            return
        if not self._dead and self._timer is None:
            if self._orders.hung:
                return
            self._begin()

    def _hang(self, seconds: float) -> None:
        self._orders.hung = True
        if self._unhang_timer is not None:
            self._unhang_timer.cancel()
        self._unhang_timer = self._loop.call_later(seconds, self._unhang) if seconds > 0 else None

    def _unhang(self) -> None:
        if not self._orders.hung:
            return
        self._orders.hung = False
        if self._timer is None and not self._dead:
            self._timer = self._loop.call_soon(self._finish if self._batch is not None else self._begin)

    def _stand_still(self) -> None:
        """No step happens any more."""
        self._dead = True
        for handle in (self._timer, self._unhang_timer):
            if handle is not None:
                handle.cancel()
        self._timer = self._unhang_timer = None
        self._batch = None
