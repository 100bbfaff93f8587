"""A killer among a hundred streams: what it costs. For tests with real processes."""

from __future__ import annotations

import contextlib

import pytest

import openai
from tests.e2e.asking import streaming
from tests.e2e.support import Cluster
from tests.e2e.truth import Ask, check

SLOW = "[[mock:slow 4]]"
"""So that the test's own client is no bottleneck."""


async def poisoned(mock: Cluster, killer: Ask, asks: list[Ask], early: int) -> int:
    """Let a killer come after so many of the others, all of which must get their answers; returns workers lost."""
    restarts = sum(slot.restarts for slot in mock.slots().values())
    async with contextlib.AsyncExitStack() as stack:
        lives = [await stack.enter_async_context(streaming(mock, ask)) for ask in asks[:early]]
        for live in lives:
            await live.until_pieces(2)
        poison = await stack.enter_async_context(streaming(mock, killer, x_request_id="poison"))
        lives += [await stack.enter_async_context(streaming(mock, ask)) for ask in asks[early:]]
        with pytest.raises(openai.APIError) as error:
            await poison.done()
        for ask, live in zip(asks, lives, strict=True):
            check(ask, await live.done())
    assert error.value.code == "poison_request"
    await mock.usable()
    return sum(slot.restarts for slot in mock.slots().values()) - restarts


def innocent(tokens: int) -> list[Ask]:
    """Return ninety-nine questions that harm nobody."""
    return [Ask(content=f"{SLOW} innocent {i}", max_tokens=tokens, seed=i) for i in range(99)]
