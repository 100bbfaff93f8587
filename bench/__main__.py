"""Runs the frontend benchmarks and prints one table. ``python -m bench [--quick]``."""

from __future__ import annotations

import argparse
import asyncio
import time



from bench import cluster as start
from bench.load import chat, connect, cpu_seconds, rss_mb, run

Row = tuple[str, str, str]


def percentile(values: list[float], share: float) -> float:
    """Return the value below which this share of the values lies."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * share))]


async def paced(quick: bool) -> list[Row]:
    """64 streams whose tokens arrive singly every 5 ms: CPU per token, lateness per token, against the floor."""
    tokens, each = 200, 2 if quick else 5
    async with start.floor(tokens, 0.005) as (port, pid):
        await run(port, chat(tokens), clients=64, each=1)
        before = cpu_seconds(pid)
        events = await run(port, chat(tokens), clients=64, each=each)
        bare = (cpu_seconds(pid) - before) / events * 1e6
        bare_late = await lateness(port, tokens, 0.005)
    async with start.cluster(step_ms=5) as up:
        await run(up.port, chat(tokens), clients=64, each=1)
        before, worker = cpu_seconds(up.pid()), cpu_seconds(up.pid("worker-0"))
        events = await run(up.port, chat(tokens), clients=64, each=each)
        ours = (cpu_seconds(up.pid()) - before) / (64 * each * tokens) * 1e6
        theirs = (cpu_seconds(up.pid("worker-0")) - worker) / (32 * each * tokens) * 1e6
        late = await lateness(up.port, tokens, 0.005)
        single = (events - 64 * each * 3) / (64 * each * tokens)
    return [
        ("frontend CPU per streamed token, 64 streams x 5 ms", f"{ours:.2f} us", f"{ours / bare:.2f} x floor ({bare:.2f} us)"),
        ("mock worker CPU per token, same load", f"{theirs:.2f} us", ""),
        ("events per token (1.00: nothing held back)", f"{single:.2f}", ""),
        ("token lateness p50 / p99", f"{late[0]:.2f} / {late[1]:.2f} ms", f"floor {bare_late[0]:.2f} / {bare_late[1]:.2f} ms"),
    ]


async def lateness(port: int, tokens: int, step: float) -> tuple[float, float]:
    """Return p50 and p99 (ms) of how much later than the earliest possible each token of 64 streams came.

    A stream's tokens are due every ``step`` seconds; its best-placed token defines when. So held-back tokens, hiccups
    of the frontend and of the worker all count.
    """
    clients = [await connect(port, arrivals=True) for _ in range(64)]
    await asyncio.gather(*(client.fetch(chat(tokens)) for client in clients))
    late: list[float] = []
    for client in clients:
        assert client.arrivals is not None
        times = client.arrivals[1 : tokens + 1]
        offsets = [at - i * step for i, at in enumerate(times)]
        base = min(offsets)
        late += [(offset - base) * 1000 for offset in offsets]
        client.close()
    return percentile(late, 0.5), percentile(late, 0.99)


async def saturated(quick: bool) -> list[Row]:
    """Unthrottled workers: tokens a second, and CPU per request and per token by two lengths."""
    scale = 1 if quick else 4
    async with start.floor(128, 0) as (port, pid):
        before = cpu_seconds(pid)
        began = time.perf_counter()
        events = await run(port, chat(128), clients=64, each=2 * scale)
        bare = (cpu_seconds(pid) - before) / events * 1e6
        bare_rate = events / (time.perf_counter() - began)
    async with start.cluster(step_ms=0) as up:
        await run(up.port, chat(8), clients=64, each=4)
        short = await cost(up, chat(1), 64, 25 * scale)
        long = await cost(up, chat(257), 64, 5 * scale)
        began = time.perf_counter()
        await run(up.port, chat(128), clients=64, each=5 * scale)
        rate = 64 * 5 * scale * 128 / (time.perf_counter() - began)
        began = time.perf_counter()
        unary = await cost(up, chat(1, stream=False), 64, 25 * scale)
        unary_rate = 64 * 25 * scale / (time.perf_counter() - began)
    token = (long - short) / 256
    return [
        ("frontend CPU per streamed request (1 token)", f"{short:.0f} us", ""),
        ("frontend CPU per token, saturated", f"{token:.2f} us", f"{token / bare:.2f} x floor ({bare:.2f} us)"),
        ("streamed tokens/s, 64 streams", f"{rate:,.0f}", f"floor {bare_rate:,.0f}"),
        ("frontend CPU per whole answer (1 token)", f"{unary:.0f} us", ""),
        ("whole answers/s, 64 connections", f"{unary_rate:,.0f}", ""),
    ]


async def cost(up: start.Running, request: bytes, clients: int, each: int) -> float:
    """Return the frontend's CPU microseconds per request."""
    before = cpu_seconds(up.pid())
    await run(up.port, request, clients=clients, each=each)
    return (cpu_seconds(up.pid()) - before) / (clients * each) * 1e6


async def first_token(quick: bool) -> list[Row]:
    """Time to the first token over instant workers, on a reused connection."""
    count = 200 if quick else 1000
    rows: list[Row] = []
    async with start.cluster(step_ms=0) as up:
        alone = await ttft(up.port, count)
        rows.append(("first token, reused connection, alone, p50 / p99", f"{alone[0]:.2f} / {alone[1]:.2f} ms", ""))
    async with start.cluster(step_ms=5) as up:
        stop = asyncio.Event()
        background = [asyncio.ensure_future(keep_streaming(up.port, stop)) for _ in range(64)]
        await asyncio.sleep(1.0)
        busy = await ttft(up.port, count // 4)
        stop.set()
        await asyncio.gather(*background)
        rows.append(("the same beside 64 streams x 5 ms (a step of 5 ms is in it)", f"{busy[0]:.2f} / {busy[1]:.2f} ms", ""))
    return rows


async def keep_streaming(port: int, stop: asyncio.Event) -> None:
    """Stream until told to stop."""
    client = await connect(port)
    while not stop.is_set():
        await client.fetch(chat(200))
    client.close()


async def ttft(port: int, count: int) -> tuple[float, float]:
    """Return p50 and p99 of the time to the first event with content, in ms, one request after the other."""
    client = await connect(port, arrivals=True)
    times: list[float] = []
    for _ in range(count):
        began = time.perf_counter()
        await client.fetch(chat(1))
        assert client.arrivals is not None
        times.append((client.arrivals[1] - began) * 1000)
    client.close()
    return percentile(times, 0.5), percentile(times, 0.99)


async def sizes(_quick: bool) -> list[Row]:
    """Start-up and memory."""
    async with start.cluster(step_ms=5) as up:
        return [
            ("start of frontend and 2 mock workers to ready", f"{up.ready_after:.2f} s", ""),
            ("RSS of the idle frontend", f"{rss_mb(up.pid()):.0f} MB", ""),
            ("RSS of an idle mock worker", f"{rss_mb(up.pid('worker-0')):.0f} MB", ""),
        ]


async def main(quick: bool) -> None:
    """Run everything and print the table."""
    rows: list[Row] = []
    for part in (sizes, paced, saturated, first_token):
        rows += await part(quick)
    width = max(len(row[0]) for row in rows)
    print(f"\n{'what':<{width}}  {'Holdfast':>18}  compared")
    for what, value, compared in rows:
        print(f"{what:<{width}}  {value:>18}  {compared}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="What a token and a request cost.")
    parser.add_argument("--quick", action="store_true")
    asyncio.run(main(parser.parse_args().quick))
