"""Deadlines that a client sets by header end a request in time, with a typed error."""

from __future__ import annotations

import asyncio

import pytest

import openai
from tests.e2e.asking import exact, streaming
from tests.e2e.support import Cluster
from tests.e2e.truth import Ask
from tests.patience import within

pytestmark = [pytest.mark.e2e, pytest.mark.asyncio(loop_scope="module")]


async def test_total_of_a_stream(mock: Cluster) -> None:
    loop = asyncio.get_running_loop()
    began = loop.time()
    ask = Ask(content="too long", max_tokens=5000)
    async with streaming(mock, ask, x_holdfast_timeout_ms="300") as live:
        with pytest.raises(openai.APIError) as error:
            await live.done()
    assert 0.29 < loop.time() - began < within(0.9)
    assert error.value.code == "deadline_exceeded"
    text = Ask(content="too long", max_tokens=200).expected()[0]
    assert text.startswith(live.answer.text[0][:300]), "what came before the deadline is true"


async def test_total_of_a_whole_answer(mock: Cluster) -> None:
    """Nothing was sent yet, so the error has its HTTP status."""
    loop = asyncio.get_running_loop()
    began = loop.time()
    with pytest.raises(openai.InternalServerError) as error:
        await mock.client.chat.completions.create(
            **Ask(content="too long", max_tokens=5000).body(), extra_headers={"x-holdfast-timeout-ms": "300"}
        )
    assert 0.29 < loop.time() - began < within(0.9)
    assert error.value.status_code == 504
    assert error.value.code == "deadline_exceeded"


async def test_first_token(mock: Cluster) -> None:
    """A prefill that takes for ever: the attempt fails, is tried elsewhere, and given up after the limit."""
    loop = asyncio.get_running_loop()
    began = loop.time()
    ask = Ask(content="[[mock:prefill 60]] for ever")
    async with streaming(mock, ask, x_holdfast_first_token_timeout_ms="200") as live:
        with pytest.raises(openai.APIError) as error:
            await live.done()
    assert 0.7 < loop.time() - began < within(2.5)
    assert error.value.code in ("migration_exhausted", "worker_stalled")


async def test_inter_token(mock: Cluster) -> None:
    """One token in five seconds is too slow for this client."""
    loop = asyncio.get_running_loop()
    began = loop.time()
    headers = {"x_holdfast_inter_token_timeout_ms": "200", "x_holdfast_first_token_timeout_ms": "200"}
    async with streaming(mock, Ask(content="[[mock:slow 2000]] crawl"), **headers) as live:
        with pytest.raises(openai.APIError) as error:
            await live.done()
    assert loop.time() - began < within(15.0)
    assert error.value.code in ("migration_exhausted", "worker_stalled")


async def test_accept(mock: Cluster) -> None:
    """All workers frozen: an answer with a status after the accept deadline, long before they count as dead."""
    loop = asyncio.get_running_loop()
    first, second = await mock.instances()
    async with mock.frozen(first), mock.frozen(second):
        began = loop.time()
        with pytest.raises(openai.InternalServerError) as error:
            await mock.client.chat.completions.create(
                **Ask(content="hello?").body(),
                extra_headers={"x-holdfast-accept-timeout-ms": "150", "x-holdfast-timeout-ms": "1000"},
            )
        assert loop.time() - began < within(1.6)
    assert error.value.status_code in (503, 504)


async def test_generous_deadlines_change_nothing(mock: Cluster) -> None:
    headers = dict.fromkeys(("x_holdfast_timeout_ms", "x_holdfast_accept_timeout_ms"), "60000")
    headers |= dict.fromkeys(("x_holdfast_first_token_timeout_ms", "x_holdfast_inter_token_timeout_ms"), "60000")
    await exact(mock, Ask(content="easy"), **headers)


async def test_wrong_deadline_is_refused(mock: Cluster) -> None:
    with pytest.raises(openai.BadRequestError) as error:
        await mock.client.chat.completions.create(
            **Ask(content="hi").body(), extra_headers={"x-holdfast-timeout-ms": "soon"}
        )
    assert error.value.param == "x-holdfast-timeout-ms"
