"""A worker with several data-parallel ranks, for real: busy only when all of its ranks are."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest
import pytest_asyncio

from tests.e2e.support import Cluster, cluster
from tests.e2e.test_overload import BLOCKS, explained, threshold

pytestmark = [pytest.mark.e2e, pytest.mark.asyncio(loop_scope="module")]

RANKED = ("--engine", "mock", "--mock-step-ms", "10", "--mock-num-blocks", "256", "--mock-data-parallel-size", "2")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def ranked(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Cluster]:
    root: Path = tmp_path_factory.mktemp("ranked")
    async with cluster(root, engine=RANKED, workers=1) as running:
        yield running


def body(up: Cluster, tokens: int, *, stream: bool = False) -> dict[str, object]:
    messages = [{"role": "user", "content": "hello"}]
    return {"model": up.model, "max_tokens": tokens, "messages": messages, "stream": stream}


async def ask(up: Cluster) -> httpx.Response:
    return await up.http.post("/v1/chat/completions", json=body(up, 2))


async def running_on(up: Cluster) -> tuple[int, ...]:
    (instance,) = await up.instances()
    async with up.peer(instance) as peer:
        return tuple(rank.running for rank in (await peer.pong()).load.ranks)


async def test_a_worker_is_busy_only_when_all_its_ranks_are(ranked: Cluster) -> None:
    up = ranked
    await up.usable()
    assert (await ask(up)).status_code == 200
    await threshold(up, **{BLOCKS: 0.0})

    async def answers(status: int) -> httpx.Response | None:
        answer = await ask(up)
        return answer if answer.status_code == status else None

    def long_on(rank: int) -> contextlib.AbstractAsyncContextManager[httpx.Response]:
        headers = {"x-data-parallel-rank": str(rank)}
        return up.http.stream("POST", "/v1/chat/completions", json=body(up, 3000, stream=True), headers=headers)

    async with long_on(0) as first:
        assert first.status_code == 200
        await anext(first.aiter_lines())
        await up.until(lambda: _is(up, (1, 0)), 10)
        await up.until(lambda: answers(200), 10)
        await up.until(lambda: _is(up, (1, 0)), 10)
        await threshold(up, **{BLOCKS: None})
        async with long_on(1) as second:
            assert second.status_code == 200
            await anext(second.aiter_lines())
            await up.until(lambda: _is(up, (1, 1)), 10)
            await threshold(up, **{BLOCKS: 0.0})
            full = await up.until(lambda: answers(503), 10)
            details = explained(full, "DYN_ACTIVE_DECODE_BLOCKS_THRESHOLD")
            assert details["workers"] == 1
            assert details["measured"] > 0
    await up.until(lambda: answers(200), 10)
    await threshold(up, **{BLOCKS: None})
    refused = await up.http.post("/v1/chat/completions", json=body(up, 2), headers={"x-dp-rank": "9"})
    assert refused.status_code == 400
    assert "ranks 0 to 1" in refused.text
    await up.at_rest()


async def _is(up: Cluster, expected: tuple[int, ...]) -> bool:
    return await running_on(up) == expected
