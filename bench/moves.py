"""The gap that a client sees when the worker that serves it is killed."""

from __future__ import annotations

import asyncio
from itertools import pairwise

from bench import cluster as start
from bench.load import chat, connect
from bench.table import Row, percentile

STREAMS = 5
TOKENS = 150


async def kills(quick: bool) -> list[Row]:
    """Kill one of two workers (10 ms steps) under five streams, again and again; largest gap of each that moved."""
    rounds = 5 if quick else 20
    gaps: list[float] = []
    normal: list[float] = []
    async with start.cluster(step_ms=10) as up:
        for number in range(rounds):
            await up.settled()
            clients = [await connect(up.port, arrivals=True) for _ in range(STREAMS)]
            streams = [asyncio.ensure_future(client.fetch(chat(TOKENS))) for client in clients]
            while min(len(client.arrivals or ()) for client in clients) < 40:  # noqa: ASYNC110 - the hot client has no events
                await asyncio.sleep(0.002)
            up.local.kill(f"worker-{number % 2}")
            await asyncio.gather(*streams)
            for client in clients:
                times = client.arrivals or []
                assert client.events == TOKENS + 3, f"{client.events} events instead of {TOKENS + 3}"
                steps = [(b - a) * 1000 for a, b in pairwise(times[1:])]
                normal.append(percentile(steps[:38], 0.5))
                if b'"attempts":1,' not in client.last:
                    gaps.append(max(steps[38:]))
                client.close()
    value = f"{percentile(gaps, 0.5):.0f} / {percentile(gaps, 0.99):.0f} ms"
    compared = f"{len(gaps)} moved streams, {rounds} kills, steps of {percentile(normal, 0.5):.1f} ms"
    return [Row("gap after kill -9, median / p99", value, compared)]
