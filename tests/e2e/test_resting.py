"""Real workers paused and put to sleep under streams: they leave routing first, nothing is lost, and they come back."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio

from tests.e2e.asking import exact, streaming
from tests.e2e.support import Cluster, cluster
from tests.e2e.test_adapters import control
from tests.e2e.truth import Ask, check
from tests.patience import within

pytestmark = [pytest.mark.e2e, pytest.mark.asyncio(loop_scope="module")]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def pair(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Cluster]:
    async with cluster(tmp_path_factory.mktemp("resting")) as running:
        yield running


@pytest_asyncio.fixture(loop_scope="module")
async def up(pair: Cluster) -> AsyncIterator[Cluster]:
    await pair.usable()
    yield pair
    await pair.usable()
    await pair.at_rest()


async def ok(up: Cluster, instance: str, route: str, **body: Any) -> dict[str, Any]:
    status, answer = await control(up, instance, f"/engine/{route}", body)
    assert (status, answer["status"]) in ((200, "ok"), (200, "success")), answer
    return dict(answer)


async def healthy(up: Cluster, instance: str) -> tuple[bool, str]:
    status, answer = await control(up, instance, "/health")
    return status == 200, "; ".join(answer["reasons"])


async def serving(up: Cluster, count: int = 6) -> set[str]:
    """Return which workers take requests."""
    return {(await exact(up, Ask(content=f"who is there {i}", max_tokens=3))).worker for i in range(count)}


async def used_again(up: Cluster, instance: str) -> None:
    async def so() -> bool:
        return instance in await serving(up, 2)

    await up.until(so, within(10))


@pytest.mark.parametrize(
    ("rest", "end", "asked"),
    [
        ("pause_generation", "resume_generation", "is_paused"),
        ("sleep", "wake_up", "is_sleeping"),
        ("release_memory_occupation", "resume_memory_occupation", "is_sleeping"),
    ],
)
async def test_a_resting_worker_hands_over_and_comes_back_after_a_canary(
    up: Cluster, rest: str, end: str, asked: str
) -> None:
    ask = Ask(content="a long walk", max_tokens=400)
    async with streaming(up, ask) as live:
        await live.until_pieces(20)
        worker = live.answer.worker
        answer = await ok(up, worker, rest)
        assert answer["streams_moved"] == 1
        ready, why = await healthy(up, worker)
        assert (ready, "/engine/" in why) == (False, True), why
        assert (await control(up, worker, f"/engine/{asked}"))[1] == {asked: True}
        check(ask, got := await live.done())
    assert got.causes == ["worker_draining"]
    assert worker not in await serving(up)
    status, refused = await control(up, worker, "/engine/canary", {})
    assert (status, "No canary is sent" in refused["error"]["message"]) == (409, True)
    assert (await healthy(up, worker))[0] is False, "no canary brings it back"
    await ok(up, worker, end)
    assert await healthy(up, worker) == (True, "")
    assert (await control(up, worker, f"/engine/{asked}"))[1] == {asked: False}
    await used_again(up, worker)


async def test_running_streams_may_finish_first(up: Cluster) -> None:
    ask = Ask(content="a short walk", max_tokens=150)
    async with streaming(up, ask) as live:
        await live.until_pieces(5)
        worker = live.answer.worker
        answer = await ok(up, worker, "pause", mode="wait", timeout=within(20))
        assert answer["streams_moved"] == 0
        check(ask, got := await live.done())
    assert got.causes == []
    await ok(up, worker, "resume")
    await used_again(up, worker)


async def test_kept_streams_move_when_the_pause_looks_like_a_hang(up: Cluster) -> None:
    ask = Ask(content="a walk that waits", max_tokens=300)
    async with streaming(up, ask) as live:
        await live.until_pieces(5)
        worker = live.answer.worker
        assert (await ok(up, worker, "pause", mode="keep"))["streams_moved"] == 0
        check(ask, got := await live.done())
    assert got.causes == ["worker_stalled"]
    await ok(up, worker, "resume")
    await used_again(up, worker)


async def test_kept_streams_go_on_in_place(up: Cluster) -> None:
    ask = Ask(content="a walk with a rest", max_tokens=300)
    async with streaming(up, ask) as live:
        await live.until_pieces(5)
        worker = live.answer.worker
        await ok(up, worker, "pause", mode="keep")
        seen = live.pieces
        assert seen < 300
        await ok(up, worker, "resume")
        check(ask, await live.done())
    await used_again(up, worker)


async def test_the_cache_is_emptied_on_demand(up: Cluster) -> None:
    worker = next(iter(await up.instances()))
    long = Ask(content="one river after the other " * 20, max_tokens=3)

    async def cached() -> int:
        answer = await exact(up, long, x_worker_instance_id=worker)
        assert answer.worker == worker
        return int(answer.usage.prompt_tokens_details.cached_tokens)

    await cached()
    assert await cached() > 50
    for name in ("reset_prefix_cache", "flush_cache", "clear_kv_blocks"):
        await ok(up, worker, name)
        assert await cached() == 0
        assert await cached() > 50


async def test_both_at_once_need_both_ends(up: Cluster) -> None:
    worker = next(iter(await up.instances()))
    await ok(up, worker, "pause")
    await ok(up, worker, "sleep", level=2)
    await ok(up, worker, "wake_up")
    ready, why = await healthy(up, worker)
    assert (ready, "paused" in why, "sleeps" in why) == (False, True, False)
    await ok(up, worker, "resume")
    assert (await healthy(up, worker))[0]
    status, answer = await control(up, worker, "/engine/sleep", {"mode": "keep"})
    assert (status, "can't sleep with streams" in answer["error"]["message"]) == (409, True)
    status, answer = await control(up, worker, "/engine/sleep", {"level": 9})
    assert (status, "level 1 or 2" in answer["error"]["message"]) == (400, True)

    async def well() -> bool:
        return (await healthy(up, worker))[0]

    await up.until(well, within(10))
    await used_again(up, worker)
