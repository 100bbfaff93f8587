"""Workers that die, refuse or give up at every moment of a request: the client sees the one true answer."""

from __future__ import annotations

import asyncio
import random

import pytest

from tests.e2e.asking import exact, streaming, whole
from tests.e2e.killers import SLOW, innocent, poisoned
from tests.e2e.support import Cluster
from tests.e2e.truth import Ask, check

pytestmark = [pytest.mark.e2e, pytest.mark.asyncio(loop_scope="module")]


async def test_before_accept(mock: Cluster) -> None:
    """The worker dies with an attempt that it has been sent and has not answered."""
    victim = next(iter(await mock.instances()))
    ask = Ask(content="before accept")
    async with mock.frozen(victim), streaming(mock, ask) as one, streaming(mock, ask) as two:
        labels = (one.label, two.label)

        async def dispatched() -> bool:
            streams = [r["streams"][0] for label in labels if (r := await mock.live(label))]
            return any(s["worker"] == victim and s["state"] == "dispatched" for s in streams)

        await mock.until(dispatched, 5, every=0.001)
        mock.kill(victim)
        answers = [await one.done(), await two.done()]
    for answer in answers:
        check(ask, answer)
        assert answer.worker != victim
    assert [c for a in answers for c in a.causes] in (["disconnected"], ["accept_overdue"])


async def test_before_first_token(mock: Cluster) -> None:
    ask = Ask(content="[[mock:prefill 1.5]] long prompt")
    async with streaming(mock, ask) as live:
        await live.until_open()
        assert live.pieces == 0
        mock.kill(live.answer.worker)
        answer = await live.done()
    check(ask, answer)
    assert answer.causes == ["disconnected"]
    assert answer.moves[0]["at"] == 0


@pytest.mark.parametrize("temperature", [0.0, 1.1])
@pytest.mark.parametrize("chat", [True, False], ids=["chat", "completions"])
async def test_in_mid_stream(mock: Cluster, chat: bool, temperature: float) -> None:
    ask = Ask(content="tell me more", max_tokens=120, chat=chat, temperature=temperature)
    async with streaming(mock, ask) as live:
        await live.until_pieces(30)
        mock.kill(live.answer.worker)
        answer = await live.done()
    check(ask, answer)
    assert answer.causes == ["disconnected"]
    assert answer.moves[0]["at"] >= 30
    assert answer.holdfast[0]["attempts"] == 2
    assert answer.holdfast[0]["join"] == "exact"


@pytest.mark.parametrize("chat", [True, False], ids=["chat", "completions"])
@pytest.mark.parametrize("at", [0, 1, 25])
async def test_without_streaming(mock: Cluster, chat: bool, at: int) -> None:
    answer = await whole(mock, Ask(content=f"[[mock:crash-after {at}]] whole", chat=chat))
    assert answer.causes == ["disconnected"]
    assert answer.moves[0]["at"] == at


@pytest.mark.parametrize("before", [2, 1, 0])
async def test_around_the_last_token(mock: Cluster, before: int) -> None:
    """The worker dies when the last tokens, or all of them, have arrived: nothing is lost or repeated."""
    ask = Ask(content="the end", max_tokens=15)
    for _ in range(3):
        async with streaming(mock, ask) as live:
            await live.until_pieces(ask.max_tokens - before)
            mock.kill(live.answer.worker)
            check(ask, await live.done())
        await mock.usable()


async def test_several_times_in_one_stream(mock: Cluster) -> None:
    """The migration limit of 3 allows three deaths under one stream that makes progress."""
    ask = Ask(content=f"{SLOW} again and again", max_tokens=600)  # outlives the starts of three workers
    async with streaming(mock, ask) as live:
        for pieces in (20, 60, 100):
            await live.until_pieces(pieces)
            mock.kill((await mock.stream_in(live.label, "streaming"))["worker"])
            await mock.usable()
        answer = await live.done()
    check(ask, answer)
    assert answer.causes == ["disconnected"] * 3
    assert answer.holdfast[0]["attempts"] == 4


async def test_many_streams_at_once(mock: Cluster) -> None:
    """Fifty streams of 20 ms a token, half of them on the worker that dies: all exact."""
    rng = random.Random(5)
    asks = [Ask(content=f"{SLOW} stream {i}", max_tokens=rng.randrange(60, 110), seed=i) for i in range(50)]
    tasks = [asyncio.ensure_future(exact(mock, ask)) for ask in asks]
    victim = next(iter(await mock.instances()))

    async def under_way() -> bool:
        async with mock.peer(victim) as peer:
            pong = await peer.pong()
            return pong.progress.in_flight >= 15

    await mock.until(under_way, 20)
    mock.kill(victim)
    answers = await asyncio.gather(*tasks)
    moved = [a for a in answers if a.moves]
    assert 10 <= len(moved) <= 40
    assert all(a.causes == ["disconnected"] for a in moved)


async def test_burst_right_after_the_death_of_an_idle_worker(mock: Cluster) -> None:
    """Dynamo 1.2.1: 4 to 6 of 240 fail with 500. Here: none."""
    victim = next(iter(await mock.instances()))
    asks = [Ask(content=f"burst {i}", max_tokens=4, seed=i) for i in range(240)]
    mock.kill(victim)
    answers = await asyncio.gather(*(whole(mock, ask) for ask in asks), return_exceptions=True)
    failed = [a for a in answers if isinstance(a, BaseException)]
    assert not failed, failed[:3]


@pytest.mark.parametrize("established", [True, False], ids=["established", "all at once"])
async def test_poison_costs_two_workers_and_one_stream(mock: Cluster, established: bool) -> None:
    """One prompt that kills whoever computes it, among a hundred streams that run already, or begin with it."""
    killer = Ask(content="[[mock:crash]] poison", max_tokens=50)
    lost = await poisoned(mock, killer, innocent(90 if established else 40), early=99 if established else 0)
    assert lost <= 2, await mock.story("poison")


@pytest.mark.parametrize("at", [1, 12])
@pytest.mark.parametrize("established", [True, False], ids=["established", "all at once"])
async def test_poison_at_a_later_token_costs_three_workers_and_one_stream(
    mock: Cluster, established: bool, at: int
) -> None:
    """At the first death it looks like all the others; why it costs a third worker: docs/explanation/poison.md."""
    killer = Ask(content=f"[[mock:crash-at {at}]] {SLOW} poison", max_tokens=50)
    lost = await poisoned(mock, killer, innocent(90 if established else 40), early=99 if established else 0)
    assert lost <= 3, await mock.story("poison")
