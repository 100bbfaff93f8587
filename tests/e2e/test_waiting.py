"""When no worker is left: wait for a replacement within a bound, or say so at once; never silence."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
from asyncio.subprocess import DEVNULL
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

import openai
from holdfast.local.backoff import RestartPolicy
from holdfast.local.ports import free_port
from holdfast.runtime.shutdown import EXIT_HANDED_OVER
from tests.e2e.asking import exact, streaming, whole
from tests.e2e.support import MOCK, Cluster, cluster, unsupervised
from tests.e2e.truth import Ask, check
from tests.patience import within

pytestmark = [pytest.mark.e2e, pytest.mark.asyncio(loop_scope="module")]

SLOW_RESTART = RestartPolicy(first_delay=0.7, next_delay=0.7, factor=1.0, intensity=1000)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def alone(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Cluster]:
    """One worker, which comes back 0.7 s after a crash."""
    async with cluster(tmp_path_factory.mktemp("alone"), workers=1, restart=SLOW_RESTART) as running:
        yield running


@pytest_asyncio.fixture(loop_scope="module")
async def one(alone: Cluster) -> AsyncIterator[Cluster]:
    await alone.usable()
    yield alone
    await alone.usable()
    await alone.at_rest()
    broken, alone.wire.broken = alone.wire.broken, []
    assert not broken, broken


async def test_goes_on_when_the_only_worker_comes_back(one: Cluster) -> None:
    ask = Ask(content="wait for me", n=2, max_tokens=80)
    async with streaming(one, ask) as live:
        await live.until_pieces(30)
        one.kill(live.answer.worker)
        answer = await live.done()
    check(ask, answer)
    assert set(answer.causes) == {"disconnected"}
    assert answer.gap > 0.5


@pytest.mark.parametrize("at", [0, 12])
async def test_a_whole_answer_waits_as_well(one: Cluster, at: int) -> None:
    answer = await whole(one, Ask(content=f"[[mock:crash-after {at}]] wait for me", chat=False))
    assert answer.causes == ["disconnected"]


async def test_new_requests_wait_as_well(one: Cluster) -> None:
    """Sent while nobody is there: held, and answered by the replacement."""
    one.kill(next(iter(await one.instances())))
    await asyncio.gather(*(exact(one, Ask(content=f"new {i}", max_tokens=5)) for i in range(20)))


async def test_cancelled_while_waiting(one: Cluster) -> None:
    """The client leaves while there is nobody: no attempt starts when the replacement comes."""
    async with streaming(one, Ask(content="patience", max_tokens=100)) as live:
        await live.until_pieces(10)
        one.kill(live.answer.worker)
        await one.stream_in(live.label, "migrating")
        assert (await one.leases())["waiting"] == 1
    await one.until(lambda: _gone(one, live.label), 5)
    assert not any((await one.leases()).values())
    await one.usable()
    async with one.peer(next(iter(await one.instances()))) as peer:
        assert (await peer.pong()).progress.tokens <= 2, "a worker proves itself with a token or two of its own"


async def _gone(one: Cluster, label: str) -> bool:
    return await one.live(label) is None


async def test_deadline_while_waiting(one: Cluster) -> None:
    """The total deadline ends the wait, in time and with a typed error."""
    loop = asyncio.get_running_loop()
    began = loop.time()
    async with streaming(one, Ask(content="hurry", max_tokens=1000), x_holdfast_timeout_ms="400") as live:
        await live.until_pieces(5)
        one.kill(live.answer.worker)
        with pytest.raises(openai.APIError) as error:
            await live.done()
    assert error.value.code == "deadline_exceeded"
    assert 0.39 < loop.time() - began < 0.7 + 0.5


async def test_supervisor_has_given_up(tmp_path: Path) -> None:
    """Nobody can come: streams end at once with a typed error, new requests get 503 with it."""
    loop = asyncio.get_running_loop()
    async with cluster(tmp_path, workers=1, restart=RestartPolicy(intensity=0)) as up:
        async with streaming(up, Ask(content="last words", max_tokens=500)) as live:
            await live.until_pieces(20)
            began = loop.time()
            up.kill(live.answer.worker)
            with pytest.raises(openai.APIError) as error:
                await live.done()
            assert loop.time() - began < within(2.0)
        assert error.value.code == "no_workers"
        began = loop.time()
        with pytest.raises((openai.InternalServerError, openai.NotFoundError)) as refused:
            await up.client.chat.completions.create(
                model=up.model, messages=[{"role": "user", "content": "anybody?"}], max_tokens=5
            )
        assert loop.time() - began < within(1.0)
        assert refused.value.code in ("no_workers", "model_not_found")
        await up.at_rest()
        assert not up.wire.broken


@contextlib.asynccontextmanager
async def process(env: dict[str, str], *argv: str) -> AsyncIterator[asyncio.subprocess.Process]:
    """A process of Holdfast that nobody supervises."""
    child = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "holdfast", *argv, env={**os.environ, **env}, stderr=DEVNULL
    )
    try:
        yield child
    finally:
        with contextlib.suppress(ProcessLookupError):
            child.kill()
        await child.wait()


async def test_last_worker_removed_on_purpose(tmp_path: Path) -> None:
    """SIGTERM of the last worker, and no supervisor anywhere: its streams end with its grace, typed."""
    env = {"DYN_FILE_KV": str(tmp_path), "DYN_WORKER_GRACEFUL_SHUTDOWN_TIMEOUT": "0.3"}
    port = free_port()
    async with process(env, "frontend", "--http-port", str(port)), process(env, "worker", *MOCK) as worker:
        up = unsupervised(port)
        await up.usable(1)
        loop = asyncio.get_running_loop()
        async with streaming(up, Ask(content="good bye", max_tokens=2000)) as live:
            await live.until_pieces(20)
            began = loop.time()
            worker.terminate()
            with pytest.raises(openai.APIError) as error:
                await live.done()
            assert loop.time() - began < within(3.0)
        assert error.value.code == "no_workers"
        assert await asyncio.wait_for(worker.wait(), 10) == EXIT_HANDED_OVER
        await up.at_rest()
        await up.http.aclose()
        assert not up.wire.broken


async def test_waiting_is_bounded_in_time_and_number(tmp_path: Path) -> None:
    """No replacement comes within the bound: typed error. Too many wait already: typed error at once."""
    never_back = RestartPolicy(first_delay=60.0)
    env = {"DYN_MIGRATION_WAIT_SECS": "4", "DYN_MIGRATION_MAX_WAITING": "5"}
    async with cluster(tmp_path, workers=1, restart=never_back, env=env) as up:
        loop = asyncio.get_running_loop()
        outcomes: list[tuple[str, float]] = []

        async def stream(i: int) -> None:
            async with streaming(up, Ask(content=f"crowd {i}", max_tokens=5000)) as live:
                started.append(live)
                with pytest.raises(openai.APIError) as error:
                    await live.done()
                outcomes.append((str(error.value.code), loop.time()))

        started: list = []
        tasks = [asyncio.ensure_future(stream(i)) for i in range(20)]

        async def all_run() -> bool:
            return len(started) == 20 and all(live.pieces > 3 for live in started)

        await up.until(all_run, 20)
        killed = loop.time()
        up.local.kill("worker-0")
        await asyncio.gather(*tasks)
        crowded = [at - killed for code, at in outcomes if code == "capacity_exhausted"]
        waited = [at - killed for code, at in outcomes if code == "no_workers"]
        assert (len(crowded), len(waited)) == (15, 5)
        assert max(crowded) < within(3.0)
        assert min(waited) > 3.9
        assert max(waited) < within(7.0)
        await up.at_rest()
        assert not up.wire.broken
