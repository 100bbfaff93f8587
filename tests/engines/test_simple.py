"""A generator becomes an engine: ends, limits, cancellation, errors and fairness are taken care of."""

import asyncio
import itertools
from contextlib import asynccontextmanager

import pytest

from holdfast.base.errors import InvalidRequest, UnsupportedFeature
from holdfast.engines.simple import GeneratorEngine, generated_of, prompt_of
from tests.engines.mock.mockrun import Run, request


async def counting(wanted, context):
    for number in itertools.count(len(generated_of(wanted))):
        yield 100 + number


@asynccontextmanager
async def engine_of(generate, **options):
    engine = GeneratorEngine(generate, model_name="own", **{"eos_token_ids": (2,), **options})
    run = Run(engine)
    run.info = await engine.start(run.sink, run.on_death, lambda what, share: None)
    try:
        yield run
    finally:
        await engine.close()
        assert not engine._tasks


async def test_max_tokens_and_continuation():
    async with engine_of(counting, continuation="exact") as run:
        key = run.submit(request(max_tokens=5))
        assert await run.finish(key) == [100, 101, 102, 103, 104]
        assert run.ends[key].finish == "length"
        rest = run.submit(request(max_tokens=5, generated=[100, 101, 102]))
        assert await run.finish(rest) == [103, 104]
        assert run.ends[rest].index == 4
        assert run.info.capabilities.continuation == "exact"


async def test_several_tokens_mappings_and_stop_tokens():
    async def generate(wanted, context):
        assert prompt_of(wanted)
        yield [5, 6]
        yield {"token_ids": [7]}
        yield [8, 2, 9]

    async with engine_of(generate) as run:
        key = run.submit(request(max_tokens=50))
        assert await run.finish(key) == [5, 6, 7, 8, 2]
        assert run.ends[key].finish == "stop"
        other = run.submit(request(max_tokens=50, stop={"ignore_eos": True, "stop_token_ids": (6,)}))
        assert await run.finish(other) == [5, 6]


async def test_the_end_of_the_generator_is_a_stop():
    async def generate(wanted, context):
        yield 5

    async with engine_of(generate) as run:
        key = run.submit(request())
        assert await run.finish(key) == [5]
        assert (run.ends[key].finish, run.ends[key].tokens) == ("stop", [])


@pytest.mark.parametrize(
    ("raised", "code"), [(ZeroDivisionError("x"), "engine_failed"), (UnsupportedFeature("x"), "unsupported_feature")]
)
async def test_errors_end_the_sequence_only(raised, code):
    async def generate(wanted, context):
        yield 5
        if wanted.attempt == 1:
            raise raised

    async with engine_of(generate) as run:
        bad, good = run.submit(request()), run.submit(request(attempt=2))
        await run.until(lambda: len(run.ends) == 2)
        assert run.ends[bad].error.code == code
        assert run.ends[good].finish == "stop"


@pytest.mark.parametrize("item", [{"token_ids": [1], "logprobs": []}, {"finish_reason": "bored"}, "text"])
async def test_nonsense_is_an_error(item):
    async def generate(wanted, context):
        yield item

    async with engine_of(generate) as run:
        key = run.submit(request())
        await run.finish(key)
        assert run.ends[key].finish == "error"


async def test_cancel_reaches_a_generator_where_it_waits():
    cleaned = asyncio.Event()

    async def generate(wanted, context):
        try:
            yield 5
            await asyncio.sleep(3600)
        finally:
            assert context.is_stopped()
            cleaned.set()

    async with engine_of(generate) as run:
        key = run.submit(request())
        await run.until(lambda: run.tokens[key] == [5])
        run.engine.cancel(key)
        async with asyncio.timeout(5):
            await cleaned.wait()
        assert key not in run.ends
        assert run.engine.load().running == 0


async def test_greedy_generators_share_the_loop_and_steps():
    async with engine_of(counting) as run:
        keys = [run.submit(request(max_tokens=50)) for _ in range(4)]
        await run.until(lambda: len(run.ends) == 4)
        assert len(run.steps) <= 60
        assert all(len(run.tokens[k]) == 50 for k in keys)


async def test_seats_are_limited():
    gate = asyncio.Event()

    async def generate(wanted, context):
        await gate.wait()
        yield 5

    async with engine_of(generate, max_num_seqs=2) as run:
        for _ in range(5):
            run.submit(request())
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert (run.engine.load().running, run.engine.load().waiting) == (2, 3)
        gate.set()
        await run.until(lambda: len(run.ends) == 5)


async def test_nothing_left_is_refused():
    async with engine_of(counting) as run:
        with pytest.raises(InvalidRequest):
            run.submit(request(max_tokens=1, generated=[5]))


async def test_on_start_is_awaited():
    said = []

    async def load(on_load):
        on_load("my weights", 0.5)
        await asyncio.sleep(0)
        said.append("loaded")

    async with engine_of(counting, on_start=load) as run:
        assert said == ["loaded"]
        assert run.info.model == "own"
