"""Workers that leave in order: SIGTERM with streams longer than their grace."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from holdfast.runtime.shutdown import EXIT_HANDED_OVER
from tests.e2e.asking import exact, streaming, whole
from tests.e2e.support import Cluster, cluster
from tests.e2e.truth import Ask, check

pytestmark = [pytest.mark.e2e, pytest.mark.asyncio(loop_scope="module")]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shared(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Cluster]:
    """Workers whose streams get half a second."""
    env = {"DYN_WORKER_SHUTDOWN_INFLIGHT_TIMEOUT_SECS": "0.5"}
    async with cluster(tmp_path_factory.mktemp("draining"), env=env) as running:
        yield running


async def test_streams_longer_than_the_grace_move(mock: Cluster) -> None:
    """Dynamo 1.2.1: 0 of 8 survive, some end in silence as successes. Here: all, exact."""
    asks = [Ask(content=f"long {i}", max_tokens=350, seed=i) for i in range(8)]
    tasks = [asyncio.ensure_future(exact(mock, ask)) for ask in asks]
    tasks.append(asyncio.ensure_future(whole(mock, Ask(content="long, whole", max_tokens=350, n=2))))
    victim = next(iter(await mock.instances()))
    slot = mock.slot_of(victim)

    async def busy() -> bool:
        async with mock.peer(victim) as peer:
            return (await peer.pong()).progress.in_flight >= 4

    await mock.until(busy, 10)
    mock.kill(victim, signal.SIGTERM)
    answers = await asyncio.gather(*tasks)
    causes = [cause for answer in answers for cause in answer.causes]
    assert causes.count("worker_draining") == len(causes) >= 4
    await mock.usable()
    assert f"exit code {EXIT_HANDED_OVER}" in mock.slots()[slot].last_exit


async def test_short_streams_finish_where_they_are(mock: Cluster) -> None:
    ask = Ask(content="short", max_tokens=40)
    async with streaming(mock, ask) as live:
        await live.until_pieces(5)
        mock.kill(live.answer.worker, signal.SIGTERM)
        answer = await live.done()
    check(ask, answer)
    assert not answer.moves


async def test_rolling_restart_under_load(mock: Cluster) -> None:
    """Both workers are restarted one after the other while requests keep coming: none fails, all are exact."""
    done = asyncio.Event()
    count = 0

    async def client(number: int) -> None:
        nonlocal count
        while not done.is_set():
            await exact(mock, Ask(content=f"client {number} {count}", max_tokens=60))
            count += 1

    clients = [asyncio.ensure_future(client(i)) for i in range(10)]
    for instance in list(await mock.instances()):
        before = mock.pid(mock.slot_of(instance))
        mock.kill(instance, signal.SIGTERM)

        async def replaced(instance: str = instance, before: int = before) -> bool:
            seen = (await mock.instances()).get(instance)
            return bool(seen) and seen["state"] == "usable" and seen["pid"] != before and not seen["draining"]

        await mock.until(replaced, 20)
    done.set()
    await asyncio.gather(*clients)
    assert count > 20
