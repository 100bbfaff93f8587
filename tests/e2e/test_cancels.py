"""A client that leaves stops the engine's work, wherever its request is at that moment."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
import statistics
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from tests.e2e.asking import exact, streaming
from tests.e2e.peers import Peer
from tests.e2e.support import MOCK, Cluster, cluster
from tests.e2e.truth import Ask, check
from tests.patience import within

pytestmark = [pytest.mark.e2e, pytest.mark.asyncio(loop_scope="module")]

STEP = 0.05
CANCELS = int(os.environ.get("E2E_CANCELS", "400"))


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shared(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Cluster]:
    """Steps of 50 ms, so that "within one step" can be seen."""
    flags = (*MOCK[:2], "--mock-step-ms", str(STEP * 1000))
    async with cluster(tmp_path_factory.mktemp("cancels"), engine=flags) as running:
        yield running


async def stopped(peer: Peer, within: float = 5.0) -> float:
    """Return how long it takes until the worker has nothing in flight, in seconds."""
    loop = asyncio.get_running_loop()
    began = loop.time()
    async with asyncio.timeout(within):
        while (await peer.pong()).progress.in_flight:
            pass  # a pong is a round trip: this is no busy loop
    return loop.time() - began


@contextlib.asynccontextmanager
async def peers(mock: Cluster) -> AsyncIterator[list[Peer]]:
    """Connections to all workers."""
    async with contextlib.AsyncExitStack() as stack:
        yield [await stack.enter_async_context(mock.peer(i)) for i in await mock.instances()]


async def late_tokens(workers: list[Peer]) -> int:
    """Return how many tokens were generated after cancels."""
    return sum([(await peer.pong()).progress.tokens_after_cancel for peer in workers])


@pytest.mark.parametrize("n", [1, 3])
async def test_in_mid_stream(mock: Cluster, n: int) -> None:
    async with streaming(mock, Ask(content="leave me", max_tokens=1000, n=n)) as live, peers(mock) as workers:
        await live.until_pieces(3 * n)
        before = sum([(await peer.pong()).progress.tokens for peer in workers])
        await live.leave()
        took = max([await stopped(peer) for peer in workers])
        after = sum([(await peer.pong()).progress.tokens for peer in workers])
        assert after - before <= 2 * n, "no more than the step under way, and one on a busy machine"
        assert took < within(0.5)
        assert await late_tokens(workers) == 0
    await mock.at_rest(2.0)


@pytest.mark.parametrize("directive", ["prefill 20", "compile 3"])
async def test_before_the_first_token(mock: Cluster, directive: str) -> None:
    async with streaming(mock, Ask(content=f"[[mock:{directive}]] leave me")) as live:
        await live.until_open()
        async with mock.peer(live.answer.worker) as peer:
            tokens = (await peer.pong()).progress.tokens
            await live.leave()
            assert await stopped(peer) < within(0.5)
            assert (await peer.pong()).progress.tokens - tokens <= 1, "the worker's own canary may have come"
    await mock.at_rest(5.0)


async def test_before_accept(mock: Cluster) -> None:
    """The worker is frozen when the client leaves; thawed, it does no work for it."""
    victim = next(iter(await mock.instances()))
    async with mock.peer(victim) as peer:
        before = (await peer.pong()).progress
        async with mock.frozen(victim):
            async with contextlib.AsyncExitStack() as stack:
                ask = Ask(content="leave", max_tokens=500)
                lives = [await stack.enter_async_context(streaming(mock, ask)) for _ in range(2)]

                async def dispatched() -> bool:
                    streams = [r["streams"][0] for x in lives if (r := await mock.live(x.label))]
                    return any(s["worker"] == victim and s["state"] == "dispatched" for s in streams)

                await mock.until(dispatched, 5, every=0.001)

            async def forgotten() -> bool:
                return not any((await mock.leases()).values())

            await mock.until(forgotten, 2)
        assert await stopped(peer) < within(1.0)
        after = (await peer.pong()).progress
        assert after.tokens - before.tokens <= 2, "one, and the worker's own canary"
        assert after.tokens_after_cancel == 0


@pytest.mark.parametrize("chat", [True, False], ids=["chat", "completions"])
async def test_of_a_whole_answer(mock: Cluster, chat: bool) -> None:
    api = mock.client.chat.completions if chat else mock.client.completions
    async with peers(mock) as workers:
        task = asyncio.ensure_future(api.create(**Ask(content="whole", max_tokens=1000, chat=chat).body()))

        async def generating() -> bool:
            return any([(await peer.pong()).progress.in_flight for peer in workers])

        await mock.until(generating, 5)
        task.cancel()
        await asyncio.wait([task])
        assert max([await stopped(peer) for peer in workers]) < within(0.5)
        assert await late_tokens(workers) == 0


async def test_between_attempts(mock: Cluster) -> None:
    """The client leaves in the moment of its worker's death: whichever comes first, nothing is left running."""
    for delay in (0.0, 0.0005, 0.001, 0.002, 0.005):
        async with streaming(mock, Ask(content="both at once", max_tokens=500)) as live:
            await live.until_pieces(2)
            mock.kill(live.answer.worker)
            await asyncio.sleep(delay)
        await mock.usable()
        await mock.at_rest(3.0)


async def test_racing_with_the_end(mock: Cluster) -> None:
    """Each request has one outcome, whenever its client leaves, and everything is given back."""
    rng = random.Random(3)
    before = await mock.metric("dynamo_frontend_requests_total")

    async def one(i: int) -> None:
        async with streaming(mock, Ask(content=f"race {i}", max_tokens=4, seed=i)) as live:
            await live.until_pieces(4)
            await asyncio.sleep(rng.random() * 0.01)

    await asyncio.gather(*(one(i) for i in range(100)))
    await mock.at_rest(3.0)

    async def counted() -> bool:
        return await mock.metric("dynamo_frontend_requests_total") == before + 100

    await mock.until(counted, 5)


async def test_disconnect_reaches_the_engine_quickly(mock: Cluster) -> None:
    """Dynamo 1.2.1: 0.7 ms median. Here a generous bound; the figure for the record is `slow`."""
    assert statistics.median(await _stop_times(mock, 15)) < within(0.025)


@pytest.mark.slow
async def test_figure_disconnect_to_stop(mock: Cluster) -> None:
    times = sorted(await _stop_times(mock, CANCELS))
    median, p99 = statistics.median(times), times[int(len(times) * 0.99)]
    print(f"client disconnect to engine stop, {len(times)} cancels: {median * 1e3:.2f} ms, p99 {p99 * 1e3:.2f} ms")
    assert median <= 0.002


async def _stop_times(mock: Cluster, count: int) -> list[float]:
    times = []
    for i in range(count):
        async with streaming(mock, Ask(content="measured", max_tokens=1000, seed=i)) as live:
            await live.until_pieces(1)
            async with mock.peer(live.answer.worker) as peer:
                await peer.pong()
                live.task.cancel()
                times.append(await stopped(peer))
    return times


async def test_killed_frontend(mock: Cluster) -> None:
    """kill -9 of the frontend: its workers stop its streams; they serve its successor."""
    async with contextlib.AsyncExitStack() as stack:
        workers = await stack.enter_async_context(peers(mock))
        for i in range(6):
            live = await stack.enter_async_context(streaming(mock, Ask(content=f"orphan {i}", max_tokens=2000)))
            await live.until_pieces(1)
        mock.local.kill("frontend-0")
        assert max([await stopped(peer) for peer in workers]) < within(0.5)
        assert await late_tokens(workers) == 0
    await mock.usable()

    async def served() -> bool:
        with contextlib.suppress(Exception):
            await exact(mock, Ask(content="successor", max_tokens=3))
            return True
        return False

    await mock.until(served, 10)


async def test_briefly_frozen_frontend(mock: Cluster) -> None:
    """Two seconds: nobody is judged for it, the streams go on where they were."""
    ask = Ask(content="blink", max_tokens=80)
    async with streaming(mock, ask) as live:
        await live.until_pieces(3)
        pid = mock.pid("frontend-0")
        os.kill(pid, signal.SIGSTOP)
        await asyncio.sleep(2.0)
        os.kill(pid, signal.SIGCONT)
        answer = await live.done()
    check(ask, answer)
    assert not answer.moves


async def test_frozen_frontend(mock: Cluster) -> None:
    """Longer than the workers' bound of 5 s: they stop its streams. Thawed, it goes on with them, exact."""
    ask = Ask(content="deep sleep", max_tokens=250)
    async with streaming(mock, ask) as live, peers(mock) as workers:
        await live.until_pieces(3)
        pid = mock.pid("frontend-0")
        os.kill(pid, signal.SIGSTOP)
        try:
            assert max([await stopped(peer, 12.0) for peer in workers]) < 10.0
            assert await late_tokens(workers) == 0
        finally:
            os.kill(pid, signal.SIGCONT)
        answer = await live.done()
    check(ask, answer)
