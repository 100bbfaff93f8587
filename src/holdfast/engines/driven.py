"""The part that engines driven through asyncio have in common (vLLM, SGLang, TensorRT-LLM).

Such an engine gives an asynchronous stream of outputs per sequence. Here each gets a task of its own; what all of them
say in one turn of the loop goes to the sink at once; cancels, deaths, counters and the translation of counts over
attempts (`engines.attempt`) are taken care of. An adapter provides `DrivenEngine.outputs` and little else.

Must never import an engine library, and never leave a task behind `close`.
"""

from __future__ import annotations

import abc
import asyncio
import logging
from collections.abc import AsyncGenerator, Coroutine
from contextlib import aclosing
from functools import partial
from typing import Any

from holdfast.base.errors import Conflict, EngineFailed, HoldfastError, WorkerSaturated
from holdfast.base.ids import SequenceKey
from holdfast.engines.attempt import Attempt, Output, admit
from holdfast.engines.contract import (
    CacheCounts,
    DeathSink,
    Engine,
    EngineInfo,
    EngineLoad,
    EngineProgress,
    GenerateRequest,
    LoadProgress,
    Phase,
    SequenceStep,
    StepSink,
)
from holdfast.engines.pace import PrefillPace

log = logging.getLogger(__name__)

DRAIN_SECONDS = 5.0
"""How long an engine may take to end a sequence that it was told to abort, before its task is cancelled."""
HANDOFF_SECONDS = 120.0
"""How long a cancel waits for blocks that are on their way; afterwards it is carried out, whatever comes of it."""
CLOSE_SECONDS = 5.0
"""How long `close` waits for the tasks."""


class DrivenEngine(Engine):
    """See the module. An adapter sets `info` at the end of its `boot`.

    Args:
        max_waiting: sequences beyond the engine's seats (of all ranks) that are kept; more are refused.
    """

    info: EngineInfo
    closed = False
    dead: HoldfastError | None = None

    def __init__(self, *, max_waiting: int = 1024) -> None:
        self.steps = self.tokens = self.prefilled = self.late_tokens = 0
        """Progress; adapters that hear of engine steps count them themselves (`counts_steps`)."""
        self.looked_up = self.found = 0
        """Tokens that sequences began with, and those among them that the engine called cached."""
        self._max_waiting = max_waiting
        self._pace = PrefillPace()
        self._heard_at = 0.0
        """Loop time at which the engine said something last, or got work after it had none."""
        self._live: dict[SequenceKey, Attempt] = {}
        self._tasks: dict[SequenceKey, asyncio.Task[None]] = {}
        self._helpers: dict[asyncio.Task[Any], None] = {}
        self._pending: list[tuple[Attempt, SequenceStep]] = []
        self._timers: dict[SequenceKey, asyncio.TimerHandle] = {}
        self._sink: StepSink
        self._on_death: DeathSink
        self._loop: asyncio.AbstractEventLoop
        self._started = False

    counts_steps = False
    """Whether the adapter counts engine steps itself; otherwise each call of the sink counts as one."""

    # ---- what an adapter provides ----

    @abc.abstractmethod
    async def boot(self, on_load: LoadProgress) -> EngineInfo:
        """Start the engine. See `Engine.start`."""

    @abc.abstractmethod
    def outputs(self, attempt: Attempt) -> AsyncGenerator[Output, None]:
        """Generate, from ``attempt.ids`` on; cancelling it must make the engine stop."""

    @abc.abstractmethod
    async def shut(self) -> None:
        """Stop the engine's processes and free the memory. Called once, with no task running."""

    def prepare(self, attempt: Attempt) -> None:  # noqa: ARG002
        """Refuse, before any work, what the engine cannot do. Raises HoldfastError."""
        return

    def abort(self, attempt: Attempt) -> bool:  # noqa: ARG002
        """Tell the engine to stop a sequence whose outputs are then read to their end; False: cancel its task."""
        return False

    def failure(self, error: Exception) -> HoldfastError:
        """Return what an exception of the engine means for the request."""
        if isinstance(error, HoldfastError):
            return error
        return EngineFailed(f"The engine failed on the request: {type(error).__name__}: {error}")

    def is_death(self, error: Exception) -> bool:  # noqa: ARG002
        """Whether an exception means that the engine can no longer work at all."""
        return False

    # ---- the contract ----

    async def start(self, sink: StepSink, on_death: DeathSink, on_load: LoadProgress) -> EngineInfo:
        """Boot the engine; see `Engine.start`."""
        if self._started:
            raise EngineFailed("This engine was started before; make a new one.")
        self._started = True
        self._sink, self._on_death = sink, on_death
        self._loop = asyncio.get_running_loop()
        self.info = await self.boot(on_load)
        return self.info

    def submit(self, key: SequenceKey, request: GenerateRequest) -> None:
        """Check a request and start its task; see `Engine.submit`."""
        self.require()
        if key in self._tasks:
            raise Conflict(f"Sequence {key} is already running.")
        info = self.info
        self._check_room(info.max_num_seqs * info.data_parallel_size + self._max_waiting)
        attempt = admit(
            key,
            request,
            vocab_size=info.vocab_size,
            context_length=info.context_length,
            eos=info.eos_token_ids,
            protocol=info.capabilities.handoff,
        )
        self.prepare(attempt)
        if not self._live:
            self._heard_at = self._loop.time()
        self._live[key] = attempt
        task = self._tasks[key] = self._loop.create_task(self._drive(attempt), name=f"sequence-{key}")
        task.add_done_callback(partial(self._forget, attempt))  # also of one that is cancelled before it has begun

    def cancel(self, key: SequenceKey) -> None:
        """Stop a sequence, at once or as early as the engine allows it (`Capabilities.cancel_until`)."""
        attempt = self._live.pop(key, None)
        if attempt is None:
            return
        attempt.cancelled = True
        until = self.info.capabilities.cancel_until
        decodes = attempt.request.handoff is not None and attempt.request.leg != "prefill"
        if until == "never" and decodes:
            return  # it runs to its end, unheard
        if until == "pre_handoff" and attempt.handoff_pending:
            attempt.deferred = True
            self._timers[key] = self._loop.call_later(HANDOFF_SECONDS, self._stop, attempt)
            return
        self._stop(attempt)

    def load(self) -> EngineLoad:
        """Return what the adapter's own tasks say; engines that tell more override this."""
        begun = sum(attempt.begun for attempt in self._live.values())
        return EngineLoad(running=begun, waiting=len(self._live) - begun)

    def progress(self) -> EngineProgress:
        """Return the counters; see `Engine.progress`."""
        return EngineProgress(
            self.steps,
            self.tokens,
            self.prefilled,
            self.phase,
            self.silence(by_chunk=self.counts_steps),
            self.late_tokens,
        )

    def cache_counts(self) -> CacheCounts:
        """Return what the sequences' own numbers add up to; engines that tell more override this."""
        return CacheCounts(self.looked_up, self.found)

    def silence(self, *, by_chunk: bool) -> float:
        """Return the seconds for which no counter is expected to move.

        Args:
            by_chunk: one of them moves whenever a part of the prompts is computed, as much as goes into one step.
        """
        tokens = self._uncomputed()
        if by_chunk and tokens:
            tokens = min(tokens, self.info.max_num_batched_tokens)
        return self._pace.expected(tokens)

    def _uncomputed(self) -> int:
        """Return the tokens of prompts of which the engine has said nothing yet."""
        return sum(len(attempt.ids) for attempt in self._live.values() if not attempt.begun)

    @property
    def phase(self) -> Phase:
        """What the engine is at, by what it has said."""
        if not self._started or not hasattr(self, "info"):
            return "starting"
        if not self._live:
            return "idle"
        return "decode" if any(attempt.begun for attempt in self._live.values()) else "prefill"

    @property
    def attempts(self) -> tuple[Attempt, ...]:
        """Sequences that somebody waits for."""
        return tuple(self._live.values())

    async def check(self) -> None:
        """Raise EngineFailed when the engine is known to be dead."""
        self.require()

    async def close(self) -> None:
        """End every task, then the engine. Idempotent."""
        if self.closed:
            return
        self.closed = True
        self._live.clear()
        await self._end_tasks()
        await self.shut()

    # ---- what adapters use ----

    def require(self) -> None:
        """Raise EngineFailed unless the engine runs."""
        if self.dead is not None:
            raise EngineFailed(f"The engine has failed: {self.dead.message}", engine_died=True)
        if self.closed or not hasattr(self, "info"):
            raise EngineFailed("The engine is not running.")

    def die(self, error: HoldfastError) -> None:
        """Report the engine's death, once; what runs is the worker's to hand over."""
        if self.dead is not None or self.closed:
            return
        self.dead = error
        self._live.clear()
        for task in self._tasks.values():
            task.cancel()
        if hasattr(self, "info"):
            self._on_death(error)

    def helper(self, work: Coroutine[Any, Any, None], name: str) -> None:
        """Run something beside the sequences until it ends or the engine is closed; a failure is logged."""
        task = self._loop.create_task(work, name=name)
        self._helpers[task] = None
        task.add_done_callback(self._helped)

    # ---- inner ----

    def _check_room(self, limit: int) -> None:
        if len(self._tasks) >= limit:
            raise WorkerSaturated(
                f"This worker holds {len(self._tasks)} sequences; its limit is {limit}.",
                layer="engine",
                threshold=limit,
                actual=len(self._tasks),
            )

    async def _drive(self, attempt: Attempt) -> None:
        try:
            async with aclosing(self.outputs(attempt)) as outputs:
                async for output in outputs:
                    self._take(attempt, output)
            if not attempt.over:
                self._take(attempt, Output([], finish="abort"))
        except Exception as error:
            self._failed(attempt, error)

    def _take(self, attempt: Attempt, output: Output) -> None:
        if attempt.over:
            return
        now = self._loop.time()
        if not attempt.begun:
            if not (output.cached_tokens or self._pending):  # of what comes in one turn only the first ends a silence
                self._pace.came(self._uncomputed(), now - self._heard_at)
            attempt.begun = True
            attempt.handoff_pending = False
            self.prefilled += max(0, len(attempt.ids) - output.cached_tokens)
            if not attempt.received:
                self.looked_up += len(attempt.ids)
                self.found += min(output.cached_tokens, len(attempt.ids))
        self._heard_at = now
        if attempt.cancelled:
            self._heard_late(attempt, output)
            return
        step = attempt.step(output)
        attempt.over = step.finish is not None
        if attempt.over and output.finish is None:
            self._stop(attempt)  # it goes on beyond its end
        if not step.tokens and step.finish is None:
            return
        if not self._pending:
            self._loop.call_soon(self._flush)
        if attempt.unsaid is not None:
            _join(attempt.unsaid, step)
            return
        attempt.unsaid = step
        self._pending.append((attempt, step))

    def _heard_late(self, attempt: Attempt, output: Output) -> None:
        """Count what comes after a cancel; one that waited for the blocks is carried out now."""
        if attempt.deferred:
            attempt.deferred = False
            self._stop(attempt)
        else:
            self.late_tokens += len(output.tokens)
        attempt.over = output.finish is not None

    def _stop(self, attempt: Attempt) -> None:
        """Make the engine stop a sequence."""
        task = self._tasks.get(attempt.key)
        timer = self._timers.pop(attempt.key, None)
        if timer is not None:
            timer.cancel()
        if task is None:
            return
        if not self.abort(attempt):
            task.cancel()
            return
        self._timers[attempt.key] = self._loop.call_later(DRAIN_SECONDS, task.cancel)

    def _flush(self) -> None:
        """Tell the worker what came in this turn of the loop."""
        pending, self._pending = self._pending, []
        live = self._live
        steps = []
        for attempt, step in pending:
            attempt.unsaid = None
            if attempt.key not in live:  # cancelled since
                continue
            self.tokens += len(step.tokens)
            if step.finish is not None:
                del live[attempt.key]
            steps.append(step)
        if steps:
            self.steps += not self.counts_steps
            self._sink(steps)

    def _failed(self, attempt: Attempt, error: Exception) -> None:
        if self.is_death(error):
            self.die(self.failure(error))
        elif attempt.key in self._live and not attempt.over:
            failure = self.failure(error)
            if isinstance(failure, EngineFailed):
                log.error("the engine failed on request %s: %s", attempt.request.request_id, failure.message)
            self._take(attempt, Output([], finish="error", error=failure))

    def _forget(self, attempt: Attempt, _task: asyncio.Task[None]) -> None:
        self._tasks.pop(attempt.key, None)
        timer = self._timers.pop(attempt.key, None)
        if timer is not None:
            timer.cancel()

    def _helped(self, task: asyncio.Task[Any]) -> None:
        self._helpers.pop(task, None)
        if not task.cancelled() and task.exception() is not None:
            log.error("%s failed", task.get_name(), exc_info=task.exception())

    async def _end_tasks(self) -> None:
        tasks = [*self._tasks.values(), *self._helpers]
        for task in tasks:
            task.cancel()
        if tasks:
            _, stuck = await asyncio.wait(tasks, timeout=CLOSE_SECONDS)
            for task in stuck:
                log.warning("%s did not end within %g s of being cancelled", task.get_name(), CLOSE_SECONDS)


def _join(step: SequenceStep, later: SequenceStep) -> None:
    """Add what a sequence said later in the same turn of the loop: it has one step per call of the sink."""
    step.tokens = [*step.tokens, *later.tokens]
    if step.logprobs is not None or later.logprobs is not None:
        step.logprobs = [*(step.logprobs or ()), *(later.logprobs or ())]
    step.finish, step.error, step.handoff = later.finish, later.error, later.handoff
    step.cached_tokens = max(step.cached_tokens, later.cached_tokens)
