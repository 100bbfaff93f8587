"""What every engine driven through asyncio does alike, with a fake whose outputs the test dictates."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from typing import Any

import pytest

from holdfast.base.errors import (
    Conflict,
    ContextLengthExceeded,
    EngineFailed,
    HoldfastError,
    InvalidRequest,
    WorkerSaturated,
)
from holdfast.base.ids import SequenceKey
from holdfast.engines.attempt import Attempt, Output
from holdfast.engines.contract import (
    CacheCounts,
    Capabilities,
    EngineInfo,
    GenerateRequest,
    LoadProgress,
    ModelFiles,
    Sampling,
    SequenceStep,
    StopRules,
    TokenLogprob,
    pack_ids,
)
from holdfast.engines.driven import DrivenEngine
from holdfast.engines.handoff import HandoffMismatch, KvHandoff, digest_of
from holdfast.engines.pace import FIRST_PACE, LEAST_TOKENS, PrefillPace
from tests.patience import within

EOS = 2


class Dead(Exception):
    pass


class Fake(DrivenEngine):
    """Says what is put into the queue of each sequence; an exception is raised, None ends the stream."""

    def __init__(self, *, aborts: bool = False, **options: Any):
        super().__init__(**options)
        self.aborts = aborts
        self.capabilities = Capabilities(handoff="fake")
        self.queues: dict[int, asyncio.Queue[Output | Exception | None]] = {}
        self.aborted: list[int] = []
        self.closed_generators: list[int] = []
        self.seen: dict[int, Attempt] = {}
        self.shuts = 0

    async def boot(self, on_load: LoadProgress) -> EngineInfo:
        return EngineInfo(
            engine="fake", version="1", model="m", context_length=64, block_size=16, total_kv_blocks=8, max_num_seqs=2,
            max_num_batched_tokens=64, eos_token_ids=(EOS,), vocab_size=1000, fingerprint="f",
            capabilities=self.capabilities, files=ModelFiles(b"{}", ""),
        )  # fmt: skip

    async def outputs(self, attempt: Attempt) -> AsyncGenerator[Output, None]:
        self.seen[attempt.key] = attempt
        queue = self.queues.setdefault(attempt.key, asyncio.Queue())
        try:
            while (said := await queue.get()) is not None:
                if isinstance(said, Exception):
                    raise said
                yield said
        finally:
            self.closed_generators.append(attempt.key)

    def abort(self, attempt: Attempt) -> bool:
        self.aborted.append(attempt.key)
        return self.aborts

    def is_death(self, error: Exception) -> bool:
        return isinstance(error, Dead)

    async def shut(self) -> None:
        self.shuts += 1

    def say(self, key: int, *tokens: int, **more: Any) -> None:
        self.queues.setdefault(key, asyncio.Queue()).put_nowait(Output(list(tokens), **more))


class Run:
    def __init__(self, engine: Fake):
        self.engine = engine
        self.batches: list[list[SequenceStep]] = []
        self.deaths: list[HoldfastError] = []

    def submit(self, key: int, **request: Any) -> None:
        self.engine.submit(SequenceKey(key), ask(**request))

    def cancel(self, key: int) -> None:
        self.engine.cancel(SequenceKey(key))

    @property
    def steps(self) -> list[SequenceStep]:
        return [step for batch in self.batches for step in batch]

    def tokens(self, key: int) -> list[int]:
        return [token for step in self.steps if step.key == key for token in step.tokens]

    def end(self, key: int) -> SequenceStep | None:
        return next((step for step in self.steps if step.key == key and step.finish), None)

    async def until(self, condition: Callable[[], object]) -> None:
        async with asyncio.timeout(within(2)):
            while not condition():  # noqa: ASYNC110  every turn of the loop counts
                await asyncio.sleep(0)


def ask(
    prompt: tuple[int, ...] = (5, 6, 7),
    generated: tuple[int, ...] = (),
    max_tokens: int = 4,
    leg: Any = "aggregated",
    handoff: KvHandoff | None = None,
    **stop: Any,
) -> GenerateRequest:
    return GenerateRequest(
        request_id="r", model="m", prompt_ids=pack_ids(prompt), generated_ids=pack_ids(generated),
        sampling=Sampling(temperature=0.0), stop=StopRules(max_tokens, **stop), leg=leg, handoff=handoff,
    )  # fmt: skip


def handle(prompt: tuple[int, ...] = (5, 6, 7), protocol: str = "fake") -> KvHandoff:
    return KvHandoff(protocol, "after_prefill", len(prompt), digest_of(pack_ids(prompt)))


@contextlib.asynccontextmanager
async def running(engine: Fake | None = None) -> AsyncIterator[Run]:
    run = Run(engine or Fake())
    await run.engine.start(run.batches.append, run.deaths.append, lambda *_: None)
    try:
        yield run
    finally:
        await run.engine.close()
    assert run.engine.shuts == 1
    assert not run.engine._tasks
    assert not run.engine._timers


async def test_what_is_said_in_one_turn_reaches_the_sink_at_once() -> None:
    async with running() as run:
        for key in (1, 2):
            run.submit(key)
        for at in range(4):
            for key in (1, 2):
                run.engine.say(key, 10 * key + at, finish="length" if at == 3 else None)
            await run.until(lambda at=at: len(run.batches) == at + 1)
        assert [[step.key for step in batch] for batch in run.batches] == [[1, 2]] * 4
        assert run.tokens(1) == [10, 11, 12, 13]
        assert [step.index for step in run.steps if step.key == 2] == [0, 1, 2, 3]
        assert run.engine.progress().steps == 4
        assert run.engine.progress().tokens == 8
        assert run.engine.progress().prefilled == 6
        assert run.engine.progress().phase == "idle"


async def test_counts_go_on_over_attempts() -> None:
    async with running() as run:
        run.submit(1, generated=(8, 9), max_tokens=5, min_tokens=4)
        await run.until(lambda: 1 in run.engine.seen)
        attempt = run.engine.seen[1]
        assert (attempt.ids, attempt.max_tokens, attempt.min_tokens) == ([5, 6, 7, 8, 9], 3, 2)
        run.engine.say(1, 20, 21, 22, 23)  # more than asked for
        await run.until(lambda: run.end(1))
        assert run.tokens(1) == [20, 21, 22]
        assert run.steps[0].index == 2
        assert run.steps[0].finish == "length"
        await run.until(lambda: run.engine.closed_generators == [1])


async def test_the_context_ends_a_sequence() -> None:
    async with running() as run:
        run.submit(1, prompt=(5,) * 60, max_tokens=100)
        await run.until(lambda: 1 in run.engine.seen)
        assert run.engine.seen[1].max_tokens == 4


async def test_the_last_token_tells_stop_from_length() -> None:
    async with running() as run:
        run.submit(1, max_tokens=1)
        run.engine.say(1, EOS)
        await run.until(lambda: run.end(1))
        assert run.steps[0].finish == "stop"
        run.submit(2, max_tokens=1, ignore_eos=True)
        run.engine.say(2, EOS)
        await run.until(lambda: run.end(2))
        assert run.end(2).finish == "length"  # type: ignore[union-attr]


async def test_log_probabilities_and_cached_tokens_pass() -> None:
    async with running() as run:
        run.submit(1, max_tokens=2)
        run.engine.say(1, 5, logprobs=[TokenLogprob(-0.5)], cached_tokens=2)
        await run.until(lambda: run.tokens(1))
        run.engine.say(1, 6, 7, logprobs=[TokenLogprob(-1.0), TokenLogprob(-2.0)], cached_tokens=2)
        await run.until(lambda: run.end(1))
        assert [len(step.logprobs or []) for step in run.steps] == [1, 1]
        assert run.steps[-1].cached_tokens == 2
        assert run.engine.cache_counts() == CacheCounts(queried=3, hits=2)


async def test_two_outputs_of_one_turn_are_one_step() -> None:
    async with running() as run:
        run.submit(1, max_tokens=9)
        for number, end in ((5, None), (6, None), (7, "stop")):
            run.engine.say(1, number, logprobs=[TokenLogprob(-1.0)], finish=end)
        await run.until(lambda: run.end(1))
        ((step,),) = run.batches
        assert (step.index, step.tokens, step.finish, len(step.logprobs or [])) == (0, [5, 6, 7], "stop", 3)


async def test_a_stream_that_ends_without_a_reason_migrates() -> None:
    async with running() as run:
        run.submit(1)
        run.engine.say(1, 5)
        run.engine.queues[1].put_nowait(None)
        await run.until(lambda: run.end(1))
        assert run.steps[-1].finish == "abort"


async def test_an_error_ends_its_own_sequence_only() -> None:
    async with running() as run:
        run.submit(1)
        run.submit(2)
        run.engine.queues.setdefault(1, asyncio.Queue()).put_nowait(RuntimeError("odd"))
        await run.until(lambda: run.end(1))
        assert isinstance(run.steps[0].error, EngineFailed)
        assert not run.deaths
        run.engine.say(2, 5, finish="stop")
        await run.until(lambda: run.end(2))


async def test_cancel_stops_the_stream_and_nothing_follows() -> None:
    async with running() as run:
        run.submit(1, max_tokens=50)
        run.engine.say(1, 5)
        await run.until(lambda: run.tokens(1))
        run.engine.say(1, 6)
        run.cancel(1)
        await run.until(lambda: run.engine.closed_generators == [1])
        assert run.tokens(1) == [5]
        run.cancel(1)
        await run.until(lambda: not run.engine._tasks)
        run.submit(1)  # the key is free again
        with pytest.raises(Conflict):
            run.submit(1)


async def test_an_engine_that_aborts_is_heard_to_the_end_and_late_tokens_count() -> None:
    async with running(Fake(aborts=True)) as run:
        run.submit(1, max_tokens=50)
        run.engine.say(1, 5)
        await run.until(lambda: run.tokens(1))
        run.cancel(1)
        assert run.engine.aborted == [1]
        run.engine.say(1, 6, 7)
        run.engine.say(1, finish="abort")
        run.engine.queues[1].put_nowait(None)
        await run.until(lambda: run.engine.closed_generators == [1])
        assert run.tokens(1) == [5]
        assert run.engine.progress().tokens_after_cancel == 2


async def test_a_cancel_waits_for_blocks_on_their_way() -> None:
    engine = Fake()
    engine.capabilities = Capabilities(handoff="fake", cancel_until="pre_handoff")
    async with running(engine) as run:
        run.submit(1, handoff=handle(), leg="decode")
        run.cancel(1)
        await asyncio.sleep(0.01)
        assert engine.closed_generators == []
        engine.say(1, 5)  # the blocks are here
        await run.until(lambda: engine.closed_generators == [1])
        assert run.steps == []
        run.submit(2, handoff=handle(), leg="decode")
        engine.say(2, 5)
        await run.until(lambda: run.tokens(2))
        run.cancel(2)
        await run.until(lambda: engine.closed_generators == [1, 2])


async def test_a_decode_leg_that_can_never_be_cancelled_runs_to_its_end_unheard() -> None:
    engine = Fake()
    engine.capabilities = Capabilities(handoff="fake", cancel_until="never")
    async with running(engine) as run:
        run.submit(1, handoff=handle(), leg="decode")
        run.cancel(1)
        engine.say(1, 5)
        engine.say(1, 6, finish="stop")
        engine.queues[1].put_nowait(None)
        await run.until(lambda: engine.closed_generators == [1])
        assert run.steps == []
        assert engine.progress().tokens_after_cancel == 2


async def test_a_prefill_leg_ends_with_one_step_and_its_handle() -> None:
    async with running() as run:
        run.submit(1, leg="prefill", max_tokens=40, generated=(9,))
        await run.until(lambda: 1 in run.engine.seen)
        attempt = run.engine.seen[1]
        assert attempt.max_tokens == 1
        run.engine.say(1, 77, finish="length", handoff=attempt.offer("fake", {"port": 1}, "f"))
        await run.until(lambda: run.end(1))
        (step,) = run.steps
        assert (step.tokens, step.finish) == ([], "stop")
        assert step.handoff is not None
        assert step.handoff.tokens == 4
        assert step.handoff.digest == digest_of(pack_ids((5, 6, 7, 9)))


async def test_blocks_of_other_tokens_are_refused() -> None:
    async with running() as run:
        for wrong in (handle((5, 6, 8)), handle(protocol="other")):
            with pytest.raises(HandoffMismatch):
                run.submit(1, handoff=wrong, leg="decode")
        assert run.engine.seen == {}


async def test_death_is_told_once_and_nothing_is_accepted_afterwards() -> None:
    async with running() as run:
        for key in (1, 2):
            run.submit(key)
        for key in (1, 2):
            run.engine.queues.setdefault(key, asyncio.Queue()).put_nowait(Dead())
        await run.until(lambda: run.deaths)
        await run.until(lambda: not run.engine._tasks)
        assert len(run.deaths) == 1
        assert run.steps == []
        with pytest.raises(EngineFailed):
            run.submit(3)
        with pytest.raises(EngineFailed):
            await run.engine.check()


async def test_what_cannot_be_done_is_refused_before_any_work() -> None:
    async with running(Fake(max_waiting=0)) as run:
        for error, request in (
            (InvalidRequest, {"prompt": ()}),
            (InvalidRequest, {"prompt": (1000,)}),
            (InvalidRequest, {"generated": (5, 6), "max_tokens": 2}),
            (ContextLengthExceeded, {"prompt": (5,) * 64}),
        ):
            with pytest.raises(error):
                run.submit(1, **request)
        with pytest.raises(InvalidRequest):
            run.engine.submit(SequenceKey(1), GenerateRequest("r", "m", b"abc", Sampling(), StopRules(1)))
        run.submit(1)
        run.submit(2)
        with pytest.raises(WorkerSaturated):
            run.submit(3)


async def test_close_ends_everything_and_twice_is_no_harm() -> None:
    async with running() as run:
        run.submit(1)
        await run.until(lambda: 1 in run.engine.seen)
        await run.engine.close()
        assert run.engine.closed_generators == [1]
        with pytest.raises(EngineFailed):
            run.submit(2)


async def test_a_silence_is_expected_as_long_as_prompts_took_so_far() -> None:
    prompt = tuple(range(5, 55))
    async with running() as run:
        assert run.engine.progress().silent_step_seconds == 0.0
        run.submit(1, prompt=prompt)
        assert run.engine.progress().silent_step_seconds == pytest.approx(FIRST_PACE * len(prompt))
        run.engine._heard_at -= 60.0  # it takes a minute
        run.engine.say(1, 7)
        await run.until(lambda: run.tokens(1))
        assert run.engine.progress().silent_step_seconds == 0.0, "nothing is waited for"
        run.submit(2, prompt=prompt)
        assert run.engine.progress().silent_step_seconds == pytest.approx(60.0, rel=0.1), "slow is known at once"
        run.submit(3, prompt=prompt)
        assert run.engine.silence(by_chunk=False) == pytest.approx(120.0, rel=0.1)
        assert run.engine.silence(by_chunk=True) == pytest.approx(64 / 50 * 60, rel=0.1), "no more than one step"


async def test_waiting_behind_streams_that_run_is_no_slow_prompt() -> None:
    prompt = tuple(range(5, 55))
    async with running() as run:
        run.submit(1, prompt=prompt, max_tokens=9)
        run.engine.say(1, 7)
        await run.until(lambda: run.tokens(1))
        run.submit(2, prompt=prompt)
        run.engine._heard_at -= 300.0  # five minutes in the queue …
        run.engine.say(1, 8)  # … while another sequence gets its tokens
        await run.until(lambda: len(run.tokens(1)) == 2)
        run.engine.say(2, 7)
        await run.until(lambda: run.tokens(2))
        run.submit(3, prompt=prompt)
        assert run.engine.progress().silent_step_seconds < 5.0, "a hang must not be hidden behind a queue"


def test_a_fast_pace_is_believed_step_by_step_and_tiny_prompts_say_nothing() -> None:
    pace = PrefillPace()
    pace.came(LEAST_TOKENS - 1, 10.0)
    assert pace.expected(1000) == 1000 * FIRST_PACE
    pace.came(1000, 5.0)
    assert pace.expected(1000) == pytest.approx(5.0), "the first prompt is worth more than a guess"
    paces = []
    for _ in range(12):
        pace.came(1000, 0.01)
        paces.append(pace.expected(1000))
    assert paces == sorted(paces, reverse=True)
    assert paces[0] > 3.0
    assert paces[-1] < 0.1
    pace.came(1000, 30.0)
    assert pace.expected(1000) == pytest.approx(30.0)
