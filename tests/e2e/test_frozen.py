"""Workers that are alive and useless: frozen processes, hung engines; and those that are merely slow."""

from __future__ import annotations

import asyncio
import os
import signal

import pytest

from tests.e2e.asking import exact, streaming, whole
from tests.e2e.support import MOCK, Cluster, cluster
from tests.e2e.truth import Ask, check
from tests.patience import within

pytestmark = [pytest.mark.e2e, pytest.mark.asyncio(loop_scope="module")]


async def test_frozen_worker(mock: Cluster) -> None:
    """SIGSTOP: gap under 3 s, exact; new requests under 1 s; serves again within 2 s of SIGCONT; late words dropped."""
    loop = asyncio.get_running_loop()
    ask = Ask(content="freeze me", max_tokens=900)
    slowest = 0.0
    async with streaming(mock, ask) as live:
        await live.until_pieces(20)
        victim = live.answer.worker
        async with mock.frozen(victim):
            frozen_at = live.pieces
            while live.pieces < frozen_at + 40:
                began = loop.time()
                await asyncio.gather(*(whole(mock, Ask(content="new", max_tokens=5, seed=i)) for i in range(4)))
                slowest = max(slowest, loop.time() - began)
        thawed = loop.time()
        assert not live.over, "the stream must outlive the thaw, so that late words have somewhere to go"

        async def serves() -> bool:
            answers = await asyncio.gather(*(exact(mock, Ask(content="back?", max_tokens=2)) for _ in range(4)))
            return any(answer.worker == victim for answer in answers)

        await mock.until(serves, 10)
        back = loop.time() - thawed
        answer = await live.done()
    check(ask, answer)
    assert answer.causes == ["peer_silent"]
    assert answer.gap < within(3.0)
    assert slowest < within(1.0)
    assert back < within(2.0)
    print(f"gap {answer.gap:.2f} s, slowest new request {slowest:.2f} s, back {back:.2f} s after SIGCONT")


async def test_frozen_before_accept(mock: Cluster) -> None:
    """A request that was sent to a frozen worker is tried elsewhere within a second."""
    loop = asyncio.get_running_loop()
    victim = next(iter(await mock.instances()))
    async with mock.frozen(victim):
        began = loop.time()
        answers = await asyncio.gather(*(exact(mock, Ask(content="hi", max_tokens=3, n=2)) for _ in range(4)))
        assert loop.time() - began < within(1.0)
    assert any("accept_overdue" in answer.causes for answer in answers)


async def test_hung_engine(mock: Cluster) -> None:
    """The engine stands still, the process answers pings: gap under 10 s, exact; new requests are not sent there."""
    ask = Ask(content="hang me", max_tokens=120)
    loop = asyncio.get_running_loop()
    async with streaming(mock, ask) as live:
        await live.until_pieces(30)
        victim = live.answer.worker
        async with mock.peer(victim) as peer:
            await peer.tell("hang")
            answer = await live.done()
            check(ask, answer)
            assert answer.causes == ["worker_stalled"]
            assert answer.gap < within(10.0)
            began = loop.time()
            others = await asyncio.gather(*(exact(mock, Ask(content="new", max_tokens=5)) for _ in range(6)))
            assert {other.worker for other in others}.isdisjoint({victim})
            assert loop.time() - began < within(1.0)
            await peer.tell("unhang")
    print(f"gap {answer.gap:.2f} s")
    mock.kill(victim)


async def test_slow_worker_is_not_ejected(mock: Cluster) -> None:
    """A hundred times slower, and jerky: its streams stay where they are."""
    ask = Ask(content="slow", max_tokens=12)
    async with streaming(mock, Ask(content="slow", max_tokens=12)) as live:
        await live.until_pieces(2)
        victim = live.answer.worker
        async with mock.peer(victim) as peer:
            await peer.tell("slow", factor=60)
            answer = await live.done()
            assert (await mock.instances())[victim]["state"] == "usable"
            await peer.tell("slow", factor=1)
    check(ask, answer)
    assert not answer.moves


async def test_jerky_worker_is_not_ejected(mock: Cluster) -> None:
    """Half a second frozen, again and again, as on an overloaded machine."""
    ask = Ask(content="jerky", max_tokens=300)
    async with streaming(mock, ask) as live:
        await live.until_pieces(5)
        pid = mock.pid(mock.slot_of(live.answer.worker))
        for _ in range(4):
            os.kill(pid, signal.SIGSTOP)
            await asyncio.sleep(0.5)
            os.kill(pid, signal.SIGCONT)
            await live.until_pieces(live.pieces + 10)
        answer = await live.done()
    check(ask, answer)
    assert not answer.moves


@pytest.mark.parametrize("directive", ["prefill 7", "compile 7"])
async def test_long_silent_steps_are_no_hang(mock: Cluster, directive: str) -> None:
    """Longer than the floor of the hang detector (5 s), and announced by the engine: no migration."""
    answer = await exact(mock, Ask(content=f"[[mock:{directive}]] patience", max_tokens=5))
    assert not answer.moves


@pytest.mark.slow
async def test_huge_prefill_and_long_warm_up(tmp_path_factory: pytest.TempPathFactory) -> None:
    """A 100,000-token prompt in one step of a realistic engine, and a graph capture of 30 s: no migration."""
    flags = (*MOCK[:2], "--context-length", "131072", "--no-mock-chunked-prefill", "--mock-speedup-ratio", "0.5")
    async with cluster(tmp_path_factory.mktemp("huge"), engine=flags) as up:
        prompt = [5 + i % 90 for i in range(100_000)]
        huge = up.client.completions.create(model=up.model, prompt=prompt, max_tokens=5, timeout=120)
        compiling = exact(up, Ask(content="[[mock:compile 30]] warm up", max_tokens=3), within=90)
        whole_answer, answer = await asyncio.gather(huge, compiling)
        assert not answer.moves
        assert whole_answer.usage is not None
        assert whole_answer.usage.prompt_tokens == 100_000
        assert whole_answer.model_extra is not None
        assert whole_answer.model_extra["holdfast"]["attempts"] == 1


async def test_a_thawed_worker_whose_engine_hangs_gets_nothing(mock: Cluster) -> None:
    """It answers pings again; its engine does not work. Nobody is sent there to find out."""
    victim = next(iter(await mock.instances()))

    async def shown(state: str) -> dict[str, str] | None:
        seen = (await mock.instances())[victim]
        return seen if seen["state"] == state else None

    async with mock.peer(victim) as peer:
        await peer.tell("hang")
        async with mock.frozen(victim):
            await mock.until(lambda: shown("suspect"), 10)
        thawed = asyncio.get_running_loop().time()
        while asyncio.get_running_loop().time() - thawed < 4.0:
            answers = await asyncio.gather(*(exact(mock, Ask(content="new", max_tokens=3)) for _ in range(4)))
            assert victim not in {answer.worker for answer in answers}
            assert not any(answer.moves for answer in answers)
            assert (await mock.instances())[victim]["state"] != "usable"
            await asyncio.sleep(0.1)
    async with mock.peer(victim) as peer:  # the freeze has cost the first connection
        await peer.tell("unhang")
    await mock.until(lambda: shown("usable"), 15)
