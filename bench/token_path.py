"""What a token and a request cost the frontend, against a floor that writes the same bytes."""

from __future__ import annotations

import asyncio
import time

from bench import cluster as start
from bench.load import chat, connect, cpu_seconds, rss_mb, run
from bench.table import Row, percentile

STREAMS = 64
STEP = 0.005
EACH = 3
"""Answers of 200 tokens on each connection: clients keep their connections."""


async def sizes(_quick: bool) -> list[Row]:
    """Start-up, one process after the other, and memory."""
    live: list[float] = []
    usable: list[float] = []
    for _ in range(5):
        async with start.frontend_alone() as alone:
            live.append(alone.live_after)
            async with start.extra_worker(alone, "mock", step_ms=5) as seconds:
                usable.append(seconds)
    async with start.cluster(step_ms=5) as up:
        return [
            Row("frontend answers /live after, median of 5", f"{percentile(live, 0.5):.2f} s"),
            Row("first mock worker usable after, median of 5", f"{percentile(usable, 0.5):.2f} s"),
            Row("frontend and 2 mock workers, together, ready after", f"{up.ready_after:.2f} s"),
            Row("RSS of the idle frontend", f"{rss_mb(up.pid()):.0f} MB"),
            Row("RSS of an idle mock worker", f"{rss_mb(up.pid('worker-0')):.0f} MB"),
        ]


async def paced(quick: bool) -> list[Row]:
    """64 streams whose tokens arrive singly every 5 ms: CPU per token, lateness per token, against two floors.

    Ours and the floors take turns, because the machine's speed drifts; each ratio is the median over the turns.
    """
    tokens, turns = 200, 2 if quick else 5
    spent: dict[str, list[float]] = {"ours": [], "floor": [], "relay": [], "worker": []}
    late, bare_late = [], []
    events = 0
    async with (
        start.floor(tokens, STEP) as (port, pid),
        start.cluster(step_ms=5) as up,
        start.relay(up, tokens) as (relay_port, relay_pid),
    ):
        places = {"floor": (port, pid), "relay": (relay_port, relay_pid), "ours": (up.port, up.pid())}
        for where, _ in places.values():
            await run(where, chat(tokens), clients=STREAMS, each=1)
        for _ in range(turns):
            for name, (where, who) in places.items():
                before, theirs = cpu_seconds(who), cpu_seconds(up.pid("worker-0"))
                came = await run(where, chat(tokens), clients=STREAMS, each=EACH)
                spent[name].append((cpu_seconds(who) - before) / (STREAMS * EACH * tokens) * 1e6)
                events += came if name == "ours" else 0
            spent["worker"].append((cpu_seconds(up.pid("worker-0")) - theirs) / (STREAMS * EACH / 2 * tokens) * 1e6)
            bare_late += await lateness(port, tokens)
            late += await lateness(up.port, tokens)
    us, floor, fair, worker = (percentile(spent[name], 0.5) for name in ("ours", "floor", "relay", "worker"))
    over, over_fair = (ratio(spent["ours"], spent[name]) for name in ("floor", "relay"))
    answers = turns * STREAMS * EACH
    return [
        Row(
            "CPU per streamed token, 64 streams x 5 ms",
            f"{us:.2f} us",
            f"{over:.2f} x floor ({floor:.2f} us); {over_fair:.2f} x bare relay of the same frames ({fair:.2f} us)",
        ),
        Row("mock worker CPU per token, same load", f"{worker:.2f} us"),
        Row("events per token (1.00: none held back)", f"{(events - answers * 3) / (answers * tokens):.2f}"),
        Row("token lateness p50 / p99", two(late), f"floor {two(bare_late)}"),
    ]


def ratio(ours: list[float], theirs: list[float]) -> float:
    """Return the median of the ratios of values that were measured one after the other."""
    return percentile([a / b for a, b in zip(ours, theirs, strict=True)], 0.5)


def two(values: list[float]) -> str:
    """Return median and 99th percentile of milliseconds."""
    return f"{percentile(values, 0.5):.2f} / {percentile(values, 0.99):.2f} ms"


async def lateness(port: int, tokens: int) -> list[float]:
    """Return how much later (ms) than its stream's best-placed token each token of 64 streams came.

    Tokens are due every 5 ms, so this counts whatever holds a token back or up: frontend, worker and client.
    """
    clients = [await connect(port, arrivals=True) for _ in range(STREAMS)]
    await asyncio.gather(*(client.fetch(chat(tokens)) for client in clients))
    late: list[float] = []
    for client in clients:
        times = (client.arrivals or [])[1 : tokens + 1]
        offsets = [at - i * STEP for i, at in enumerate(times)]
        base = percentile(offsets, 0.05)
        late += [max(0.0, offset - base) * 1000 for offset in offsets]
        client.close()
    return late


async def saturated(quick: bool) -> list[Row]:
    """Unthrottled workers: tokens a second, and CPU per request and per token by two lengths."""
    scale = 1 if quick else 4
    async with start.floor(128, 0) as (port, pid):
        before, began = cpu_seconds(pid), time.perf_counter()
        events = await run(port, chat(128), clients=STREAMS, each=2 * scale)
        bare_rate = events / (time.perf_counter() - began)
        bare = (cpu_seconds(pid) - before) / events * 1e6
    async with start.cluster(step_ms=0) as up:
        await run(up.port, chat(8), clients=STREAMS, each=4)
        short = await cost(up, chat(1), 25 * scale)
        long = await cost(up, chat(257), 5 * scale)
        began = time.perf_counter()
        await run(up.port, chat(128), clients=STREAMS, each=5 * scale)
        rate = STREAMS * 5 * scale * 128 / (time.perf_counter() - began)
        began = time.perf_counter()
        whole = await cost(up, chat(1, stream=False), 25 * scale)
        whole_rate = STREAMS * 25 * scale / (time.perf_counter() - began)
    token = (long - short) / 256
    return [
        Row("CPU per streamed request (1 token)", f"{short:.0f} us"),
        Row(
            "CPU per token, saturated", f"{token:.2f} us", f"{token / bare:.2f} x floor ({bare:.2f} us, one write each)"
        ),
        Row("streamed tokens/s, 64 streams", f"{rate:,.0f}", f"floor {bare_rate:,.0f}"),
        Row("CPU per whole answer (1 token)", f"{whole:.0f} us"),
        Row("whole answers/s, 64 connections", f"{whole_rate:,.0f}"),
    ]


async def cost(up: start.Running, request: bytes, each: int) -> float:
    """Return the frontend's CPU microseconds per request."""
    before = cpu_seconds(up.pid())
    await run(up.port, request, clients=STREAMS, each=each)
    return (cpu_seconds(up.pid()) - before) / (STREAMS * each) * 1e6


async def first_token(quick: bool) -> list[Row]:
    """Time to the first token over an instant worker on a reused connection: alone, and beside 64 paced streams."""
    count = 200 if quick else 1000
    async with start.cluster(step_ms=0, workers=1) as up, start.extra_worker(up, "paced", step_ms=5):
        alone = await first_tokens(up.port, count)
        stop = asyncio.Event()
        others = [asyncio.ensure_future(keep_streaming(up.port, stop)) for _ in range(STREAMS)]
        try:
            await first_tokens(up.port, 50)
            busy = await first_tokens(up.port, count)
        finally:
            stop.set()
            await asyncio.gather(*others)
        crowd = await asyncio.gather(*(first_tokens(up.port, count // 20) for _ in range(STREAMS)))
    return [
        Row("first token, alone, p50 / p99", two(alone)),
        Row("first token beside 64 streams x 5 ms, p50 / p99", two(busy)),
        Row("first token, 64 at once, p50 / p99", two([t for times in crowd for t in times])),
    ]


async def keep_streaming(port: int, stop: asyncio.Event) -> None:
    """Stream from the paced worker until told to stop."""
    client = await connect(port)
    while not stop.is_set():
        await client.fetch(chat(100, model="paced"))
    client.close()


async def first_tokens(port: int, count: int) -> list[float]:
    """Return the times (ms) to the first event with content, one request after the other."""
    client = await connect(port, arrivals=True)
    times: list[float] = []
    for _ in range(count):
        began = time.perf_counter()
        await client.fetch(chat(1))
        times.append(((client.arrivals or [])[1] - began) * 1000)
    client.close()
    return times
