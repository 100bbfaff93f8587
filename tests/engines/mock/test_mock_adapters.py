"""The mock engine's abilities, one engine and several ranks alike."""

import asyncio
import itertools
from contextlib import asynccontextmanager

import pytest

from holdfast.base.errors import Conflict, EngineFailed, InvalidRequest, NotFound
from holdfast.engines.abilities import Adaptable, Adapter, Clearable, Pausable, Sleepable
from holdfast.engines.mock.checker import expected_tokens
from holdfast.engines.mock.config import MockConfig
from holdfast.engines.mock.ranks import make_mock
from tests.engines.mock.mockrun import Run, request

RANKS = pytest.mark.parametrize("ranks", [1, 3])


@asynccontextmanager
async def running(ranks=1, **config):
    engine = make_mock(MockConfig(**{"step_ms": 1.0, "data_parallel_size": ranks, **config}))
    run = Run(engine)
    run.info = await engine.start(run.sink, run.on_death, lambda *_: None)
    try:
        yield run
    finally:
        await engine.close()


@RANKS
async def test_it_has_them_all(ranks):
    async with running(ranks) as run:
        for ability in (Adaptable, Pausable, Sleepable, Clearable):
            assert isinstance(run.engine, ability)
        assert run.info.capabilities.lora
    async with running(ranks, max_loras=0) as run:
        assert not run.info.capabilities.lora


@RANKS
async def test_adapters_come_and_go(ranks):
    async with running(ranks) as run:
        with pytest.raises(InvalidRequest, match="no adapter 'a'"):
            run.submit(request(lora="a"))
        await run.engine.load_adapter(Adapter("a", "/somewhere"))
        assert run.engine.adapters() == (Adapter("a", "/somewhere"),)
        with pytest.raises(Conflict):
            await run.engine.load_adapter(Adapter("a"))
        keys = [run.submit(request(lora="a")) for _ in range(2 * ranks)]
        for key in keys:
            assert await run.finish(key) == expected_tokens(request(lora="a")) != expected_tokens(request())
        await run.engine.unload_adapter("a")
        with pytest.raises(NotFound):
            await run.engine.unload_adapter("a")
        with pytest.raises(InvalidRequest):
            run.submit(request(lora="a"))


@RANKS
async def test_paused_it_makes_no_token_and_loses_none(ranks):
    async with running(ranks) as run:
        keys = [run.submit(request(str(n), max_tokens=100)) for n in range(2 * ranks)]
        await run.until(lambda: all(len(run.tokens[key]) > 3 for key in keys))
        await run.engine.pause_generation("keep")
        steps = run.engine.progress().steps
        later = run.submit(request("later"))
        await asyncio.sleep(0.02)  # long enough for twenty steps
        assert run.engine.progress().steps == steps
        await run.engine.resume_generation()
        await run.engine.resume_generation()
        for n, key in enumerate(keys):
            assert await run.finish(key) == expected_tokens(request(str(n), max_tokens=100))
        assert await run.finish(later) == expected_tokens(request("later"))


@RANKS
async def test_pausing_may_end_or_await_what_runs(ranks):
    async with running(ranks) as run:
        keys = [run.submit(request(str(n), max_tokens=10_000)) for n in range(4)]
        await run.until(lambda: all(run.tokens[key] for key in keys))
        await run.engine.pause_generation("abort")
        assert {run.ends[key].finish for key in keys} == {"abort"}
        assert run.engine.load().running == run.engine.load().waiting == 0
        await run.engine.resume_generation()
        key = run.submit(request(max_tokens=30))
        await run.engine.pause_generation("wait")
        assert run.ends[key].finish == "length"


@RANKS
async def test_asleep_it_refuses_and_has_lost_its_cache(ranks):
    async with running(ranks) as run:
        text = "lantern " * 80
        key = run.submit(request(text, max_tokens=10_000))
        await run.until(lambda: bool(run.tokens[key]))
        with pytest.raises(Conflict, match="1 sequences in hand"):
            await run.engine.sleep()
        run.engine.cancel(key)
        with pytest.raises(InvalidRequest, match="level 1 or 2"):
            await run.engine.sleep(3)
        assert any(count for count, _ in run.engine.kv_digests())
        await run.engine.sleep(2)
        assert not any(count for count, _ in run.engine.kv_digests())
        with pytest.raises(EngineFailed, match="sleeps"):
            run.submit(request())
        await run.engine.wake_up()
        assert await run.finish(run.submit(request())) == expected_tokens(request())


async def test_a_hang_is_not_cured_by_rest():
    async with running() as run:
        key = run.submit(request(max_tokens=50))
        await run.until(lambda: bool(run.tokens[key]))
        run.engine.control({"do": "hang"})
        await run.engine.pause_generation()
        run.engine.control({"do": "unhang"})
        count = len(run.tokens[key])
        await asyncio.sleep(0.01)
        assert len(run.tokens[key]) == count, "still paused"
        run.engine.control({"do": "hang"})
        await run.engine.resume_generation()
        await asyncio.sleep(0.01)
        assert len(run.tokens[key]) == count, "still hung"
        run.engine.control({"do": "unhang"})
        assert await run.finish(key) == expected_tokens(request(max_tokens=50))


async def test_room_for_so_many():
    async with running(max_loras=2) as run:
        for name in itertools.islice("abc", 2):
            await run.engine.load_adapter(Adapter(name))
        with pytest.raises(InvalidRequest, match="DYN_MOCK_MAX_LORAS"):
            await run.engine.load_adapter(Adapter("c"))
