"""The gap that a client sees when the worker that serves it is killed."""

from __future__ import annotations

import asyncio
import re
from itertools import pairwise

from bench import cluster as start
from bench.load import chat, connect
from bench.table import Row, percentile

STREAMS = 5
TOKENS = 150
BEFORE = 40
"""Events of each stream before the kill."""
ROUND_SECONDS = 60.0
"""Within which five streams of 150 tokens, the kill among them, are over on any machine."""


async def kills(quick: bool) -> list[Row]:
    """Kill one of two workers (10 ms steps) under five streams, again and again; largest gap of each that moved."""
    rounds = 5 if quick else 20
    gaps: list[float] = []
    normal: list[float] = []
    async with start.cluster(step_ms=10) as up:
        for number in range(rounds):
            await up.settled()
            clients = [await connect(up.port, arrivals=True) for _ in range(STREAMS)]
            async with asyncio.timeout(ROUND_SECONDS), asyncio.TaskGroup() as group:
                for client in clients:
                    group.create_task(client.fetch(chat(TOKENS, stream_options={"include_usage": True})))
                while min(len(client.arrivals or ()) for client in clients) < BEFORE:  # noqa: ASYNC110 - the hot client has no events
                    await asyncio.sleep(0.002)
                up.local.kill(f"worker-{number % 2}")
            for client in clients:
                came = tokens_of(client.last)
                assert came == TOKENS, f"{came} tokens instead of {TOKENS}"
                times = client.arrivals or []
                steps = [(b - a) * 1000 for a, b in pairwise(times[1:])]
                normal.append(percentile(steps[: BEFORE - 2], 0.5))
                if b'"attempts":1,' not in client.last:
                    gaps.append(max(steps[BEFORE - 2 :]))
                client.close()
    value = f"{percentile(gaps, 0.5):.0f} / {percentile(gaps, 0.99):.0f} ms"
    compared = f"{len(gaps)} moved streams, {rounds} kills, steps of {percentile(normal, 0.5):.1f} ms"
    return [Row("gap after kill -9, median / p99", value, compared)]


def tokens_of(last: bytes) -> int:
    """Return how many tokens an answer has, as its usage says.

    Events are no measure of it: what an engine makes while its last step is still on the way comes in one event.
    """
    found = re.search(rb'"completion_tokens":(\d+)', last)
    assert found is not None, f"an answer without usage ends with {last[-200:]!r}"
    return int(found[1])
