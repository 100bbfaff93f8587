"""Data-parallel ranks of the mock engine: seats, blocks and steps of their own; whose sequence goes where."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, cast

import pytest

from holdfast.base.errors import InvalidRequest
from holdfast.base.ids import SequenceKey
from holdfast.engines.mock import MockConfig, MockEngine
from holdfast.engines.mock.ranks import RANK, DataParallelMock, make_mock
from tests.engines.mock.mockrun import Run, request, running


@asynccontextmanager
async def ranked(size: int = 2, **config: Any) -> AsyncIterator[tuple[Run, DataParallelMock]]:
    engine = make_mock(MockConfig(**{"step_ms": 0.0, "data_parallel_size": size, **config}))
    assert isinstance(engine, DataParallelMock)
    run = Run(cast("MockEngine", engine))
    info = await engine.start(run.sink, run.on_death, lambda what, share: None)
    assert info.data_parallel_size == size
    try:
        yield run, engine
    finally:
        await engine.close()


def test_one_rank_is_the_plain_engine() -> None:
    assert isinstance(make_mock(MockConfig()), MockEngine)


async def test_the_tokens_do_not_depend_on_the_rank() -> None:
    async with running() as plain:
        expected = await plain.finish(plain.submit(request(seed=3)))
    async with ranked() as (run, _):
        keys = [run.submit(request(seed=3, extra={RANK: rank})) for rank in (0, 1)]
        assert [await run.finish(key) for key in keys] == [expected, expected]


async def test_seats_and_blocks_belong_to_a_rank() -> None:
    async with ranked(max_num_seqs=1, num_blocks=64, step_ms=5.0) as (run, engine):
        for _ in range(2):
            run.submit(request(max_tokens=500, extra={RANK: 0}))
        await run.until(lambda: bool(run.steps))
        load = engine.load()
        first, second = load.ranks
        assert (first.running, first.waiting, first.kv_total_blocks) == (1, 1, 64)
        assert (second.running, second.waiting, second.kv_used_blocks) == (0, 0, 0)
        assert load.running == 1
        assert load.waiting == 1
        assert load.kv_total_blocks == 128
        assert load.kv_used_blocks == first.kv_used_blocks > 0
        free = run.submit(request(max_tokens=3, extra={RANK: 1}))
        await run.finish(free)


async def test_without_a_wish_the_emptiest_rank_is_taken() -> None:
    async with ranked(3, step_ms=5.0) as (run, engine):
        run.submit(request(max_tokens=500, extra={RANK: 1}))
        for _ in range(5):
            run.submit(request(max_tokens=500))
        assert [rank.in_hand for rank in engine.ranks] == [2, 2, 2]


@pytest.mark.parametrize("wanted", [2, -1, "0", True])
async def test_a_rank_that_does_not_exist_is_refused(wanted: object) -> None:
    async with ranked() as (run, engine):
        with pytest.raises(InvalidRequest, match="ranks 0 to 1"):
            engine.submit(SequenceKey(1), request(extra={RANK: wanted}))
        assert not run.steps


async def test_cancel_reaches_the_rank_and_nothing_is_kept() -> None:
    async with ranked(step_ms=5.0) as (run, engine):
        keys = [run.submit(request(max_tokens=500, extra={RANK: rank})) for rank in (0, 1)]
        engine.cancel(SequenceKey(keys[1]))
        assert [rank.in_hand for rank in engine.ranks] == [1, 0]
        await run.finish(run.submit(request(max_tokens=2)))
        engine.cancel(SequenceKey(keys[0]))
        assert not engine._owners


async def test_kv_events_name_their_rank() -> None:
    async with ranked() as (run, engine):
        for rank in (0, 1):
            await run.finish(run.submit(request("word " * 40, extra={RANK: rank})))
        assert {event.dp_rank for event in engine.take_kv_events()} == {0, 1}


async def test_one_rank_may_hang_while_the_other_goes_on() -> None:
    async with ranked() as (run, engine):
        engine.control({"do": "hang", "rank": 0})
        stuck = run.submit(request(extra={RANK: 0}))
        await run.finish(run.submit(request(extra={RANK: 1})))
        assert not run.tokens[stuck]
        engine.control({"do": "unhang"})
        await run.finish(stuck)
        with pytest.raises(InvalidRequest, match="no rank 7"):
            engine.control({"do": "hang", "rank": 7})


async def test_the_engine_dies_with_the_first_of_its_ranks() -> None:
    async with ranked(step_ms=5.0) as (run, engine):
        for rank in (0, 1):
            run.submit(request(max_tokens=500, extra={RANK: rank}))
        engine.control({"do": "die", "rank": 1})
        await run.until(lambda: bool(run.deaths))
        assert len(run.deaths) == 1
        assert [rank.in_hand for rank in engine.ranks] == [0, 0]
