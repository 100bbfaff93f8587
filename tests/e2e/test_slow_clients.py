"""Clients that do not read: they cost a bounded amount of memory, nobody else notices them, and they are let go."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import statistics
from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio

from tests.e2e.asking import exact
from tests.e2e.raw import connected, post, read_until, rss_mb, send
from tests.e2e.support import MOCK, Cluster, cluster
from tests.e2e.truth import Answer, Ask

pytestmark = [pytest.mark.e2e, pytest.mark.asyncio(loop_scope="module")]

STALL = 3.0
READERS = int(os.environ.get("E2E_READERS", "50"))
LIVE_TOKENS = 120
RSS_MB = {"plain": 25.0, "logprobs": 70.0}
"""Bounded by each stream's credit: 2,048 ids, or about a hundred tokens with twenty alternatives each."""
LONG_NAME = "mock-" + "long" * 126
"""An alias of the model. Every event repeats it, so that a client that does not read is soon full."""


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shared(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Cluster]:
    """Clients may stall for three seconds. Steps of 20 ms, so that a hundred streams are no load."""
    env = {"DYN_CLIENT_STALL_TIMEOUT": str(STALL), "DYN_MODEL_ALIASES": LONG_NAME}
    flags = (*MOCK[:2], "--mock-step-ms", "20")
    async with cluster(tmp_path_factory.mktemp("slow"), env=env, engine=flags) as running:
        yield running


def duration(answers: list[Answer]) -> float:
    """Return the median time from a stream's first token to its last, in seconds."""
    return statistics.median(answer.times[-1] - answer.times[0] for answer in answers)


async def live_clients(mock: Cluster) -> list[Answer]:
    """Fifty streams that are read as they come, exact."""
    asks = [Ask(content=f"live {i}", max_tokens=LIVE_TOKENS, seed=i) for i in range(READERS)]
    return list(await asyncio.gather(*(exact(mock, ask) for ask in asks)))


@pytest.mark.parametrize("wish", [{}, {"logprobs": True, "top_logprobs": 20}], ids=["plain", "logprobs"])
async def test_fifty_stalled_beside_fifty_live(mock: Cluster, wish: dict[str, Any]) -> None:
    n = 1 if wish else 6
    body = {**Ask(content="stalled", max_tokens=20_000, more=wish, n=n).body(), "stream": True, "model": LONG_NAME}
    stalled = post(body)
    pid = mock.pid("frontend-0")
    alone = duration(await live_clients(mock))
    before_stalls = await mock.metric("dynamo_frontend_failures_total", reason="client_stalled")
    before = rss_mb(pid)
    async with contextlib.AsyncExitStack() as stack:
        for _ in range(READERS):
            sock = await stack.enter_async_context(connected(mock.port, receive_buffer=4096))
            await send(sock, stalled)
            await read_until(sock, b" 200 OK", 10)

        async def all_blocked() -> bool:
            requests = (await mock.get("/debug/requests"))["requests"]
            blocked = sum(r["streams"][0]["blocked"] for r in requests)
            return blocked >= READERS * 0.9 or not requests

        await mock.until(all_blocked, 20)
        answers = await live_clients(mock)
        grown = rss_mb(pid) - before
        assert not [a for a in answers if a.moves], "a client that does not read is no reason to move anybody"

        async def let_go() -> bool:
            stalls = await mock.metric("dynamo_frontend_failures_total", reason="client_stalled")
            return stalls == before_stalls + READERS

        await mock.until(let_go, STALL + 10)
    beside = duration(answers)
    print(f"RSS +{grown:.1f} MB; {LIVE_TOKENS} tokens in {alone:.3f} s alone, {beside:.3f} s beside {READERS} stalled")
    assert grown < RSS_MB["logprobs" if wish else "plain"]
    assert beside < alone * 1.5 + 0.5
    assert await mock.metric("dynamo_frontend_model_migration_total") == 0


async def test_a_client_that_pauses_misses_nothing(mock: Cluster) -> None:
    """Shorter than the bound: everything is there when it reads on, also what its worker sent meanwhile."""
    ask = Ask(content="pause", max_tokens=300, n=6)
    async with connected(mock.port, receive_buffer=4096) as sock:
        await send(sock, post({**ask.body(), "stream": True, "model": LONG_NAME}, x_request_id="pausing"))
        await read_until(sock, b" 200 OK", 10)

        async def blocked() -> bool:
            request = await mock.live("pausing")
            return bool(request and request["streams"][0]["blocked"])

        await mock.until(blocked, 15)
        await asyncio.sleep(STALL / 2)
        raw = await read_until(sock, b"[DONE]", 30)
    events = [json.loads(line[6:]) for line in raw.split(b"\n") if line.startswith(b"data: {")]
    for choice in range(ask.n):
        mine = [event["choices"][0] for event in events if event["choices"][0]["index"] == choice]
        assert "".join(one["delta"].get("content", "") for one in mine) == ask.expected(choice)[0]
        assert mine[-1]["finish_reason"] == "length"
