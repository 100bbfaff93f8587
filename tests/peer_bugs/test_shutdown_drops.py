"""Shutdowns that drop work, as comparable systems have them; each is named after its public issue or release.

Leaving is a sequence with one budget here: nothing new comes, what runs finishes or moves, nothing is cut in silence.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

import openai
from holdfast.local.backoff import RestartPolicy
from tests.e2e.asking import exact, streaming, whole
from tests.e2e.support import Cluster, cluster
from tests.e2e.truth import Ask, check

pytestmark = [pytest.mark.e2e, pytest.mark.asyncio(loop_scope="module")]

SECONDS_FOR_STREAMS = 1.0


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shared(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Cluster]:
    env = {"DYN_WORKER_SHUTDOWN_INFLIGHT_TIMEOUT_SECS": str(SECONDS_FOR_STREAMS)}
    async with cluster(tmp_path_factory.mktemp("shutdown"), env=env) as running:
        yield running


@pytest_asyncio.fixture(loop_scope="module")
async def up(shared: Cluster) -> AsyncIterator[Cluster]:
    await shared.usable()
    yield shared
    await shared.usable()
    await shared.at_rest()
    assert not shared.wire.broken


async def test_dynamo_13559_a_downscale_drains_instead_of_aborting(up: Cluster) -> None:
    """There everything ends 5 s after SIGTERM, with 500 "Failed to fold completions stream"."""
    asks = [Ask(content=f"downscale {i}", max_tokens=300, seed=i) for i in range(4)]
    asking = [asyncio.ensure_future(one) for ask in asks for one in (exact(up, ask), whole(up, ask))]
    victim = next(iter(await up.instances()))

    async def busy() -> bool:
        async with up.peer(victim) as peer:
            return (await peer.pong()).progress.in_flight >= 2

    await up.until(busy, 10)
    up.kill(victim, signal.SIGTERM)
    answers = await asyncio.gather(*asking)
    assert sum(bool(answer.moves) for answer in answers) >= 2


async def test_llm_d_router_2188_a_terminating_worker_is_not_picked(up: Cluster) -> None:
    """There the scheduler keeps choosing pods that are being terminated."""
    ask = Ask(content="stays for a while", max_tokens=5000)
    async with streaming(up, ask) as live:
        await live.until_pieces(3)
        leaving = live.answer.worker
        up.kill(leaving, signal.SIGTERM)

        async def told() -> bool:
            seen = (await up.instances()).get(leaving)
            return seen is None or seen["draining"]

        await up.until(told, 5)
        loop = asyncio.get_running_loop()
        began, count = loop.time(), 0
        while loop.time() < began + SECONDS_FOR_STREAMS / 2:
            async with streaming(up, Ask(content=f"new {count}", max_tokens=3)) as other:
                assert (await other.done()).worker != leaving
            count += 1
        assert count > 3


async def test_dynamo_13622_a_rollout_never_leaves_a_gap_without_routable_workers(up: Cluster) -> None:
    """There a replacement is Ready before frontends know it, and the old one goes: 404 and 503 in between."""
    over, fewest = asyncio.Event(), 2

    async def watch() -> None:
        nonlocal fewest
        while not over.is_set():
            fewest = min(fewest, (await up.get("/health"))["models"].get("mock", 0))
            await asyncio.sleep(0.01)

    watching = asyncio.ensure_future(watch())
    await up.local.rolling.restart("worker")
    over.set()
    await watching
    assert fewest == 1, "one of two, at every moment"


async def test_dynamo_3567_a_rollout_is_done_when_the_new_processes_are_used(up: Cluster) -> None:
    """There the old pods' readiness makes an update "Successful" before the new ones serve."""
    before = {slot.pid for slot in up.slots().values()}
    await up.local.rolling.restart("worker")
    used = {one["pid"] for one in (await up.instances()).values() if one["state"] == "usable"}
    assert used == {slot.pid for slot in up.slots().values()}
    assert not used & before


async def test_dynamo_1_6_1_truncated_streams_are_no_successes(tmp_path: Path) -> None:
    """There 2 of 8 streams of a worker that got SIGTERM end with a bare [DONE] and count as success."""
    never = RestartPolicy(intensity=0)
    env = {"DYN_WORKER_SHUTDOWN_INFLIGHT_TIMEOUT_SECS": "0", "DYN_MIGRATION_WAIT_SECS": "1"}
    async with cluster(tmp_path, workers=1, restart=never, env=env) as up:
        async with contextlib.AsyncExitStack() as stack:
            asks = [Ask(content=f"cut {i}", max_tokens=5000) for i in range(8)]
            lives = [await stack.enter_async_context(streaming(up, ask)) for ask in asks]
            for live in lives:
                await live.until_pieces(2)
            up.local.kill("worker-0", signal.SIGKILL)
            for live in lives:
                with pytest.raises(openai.APIError):
                    await live.done()
        await up.at_rest()
        assert not up.wire.broken
        assert await up.metric("dynamo_frontend_requests_total", status="error") == 8
        assert await up.metric("dynamo_frontend_requests_total", status="success") == 0


async def test_vllm_24885_sigterm_is_no_abort_by_default(tmp_path: Path) -> None:
    """There the default shutdown timeout is 0: SIGTERM aborts what runs."""
    async with cluster(tmp_path, workers=1) as up:
        ask = Ask(content="in the middle", max_tokens=200)
        async with streaming(up, ask) as live:
            await live.until_pieces(3)
            up.kill(live.answer.worker, signal.SIGTERM)
            answer = await live.done()
        check(ask, answer)
        assert not answer.moves
        await up.usable()
