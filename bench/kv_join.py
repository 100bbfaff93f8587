"""What a frontend costs that joins a running cluster with full caches: ``python -m bench kv_join``.

Real processes: mock workers whose caches were filled by prompts, a frontend that is there, and one that starts, again
and again. Measured from outside: when the new one knows every block (``/health``), and how long requests take meanwhile
through the one and the other, beside the same when a frontend joins while the caches are empty: a process that starts
costs the others processor time, and its first request is its slowest, with and without blocks.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import sys
import time
from collections.abc import AsyncIterator
from typing import Any, NamedTuple

from bench import cluster as start
from bench.load import Client, chat, connect, cpu_seconds, request_bytes
from bench.table import Row, percentile
from holdfast.base.errors import HoldfastError
from holdfast.local import http
from holdfast.local.ports import free_port

BLOCK = 16
CONTEXT = 131_072
VOCABULARY = 256
PAUSE = 0.002
"""Seconds between two requests of one connection."""
FIRST = 1.5
"""Seconds for which the requests of a frontend are its first ones."""
LOOK = 0.02
"""Seconds between two looks at ``/health``."""
PATIENCE = 60.0
ROUTED = ("--router-mode", "kv")


class Joined(NamedTuple):
    """One frontend's first moments, in seconds."""

    live: float
    """From the start of the process until it listens."""
    usable: float
    """From then until it would send requests to every worker."""
    exact: float
    """From then until it knows every block of every worker."""
    cpu: float
    """Of its processor time, from the start to the end of `FIRST`."""
    here: list[float]
    """Milliseconds of requests through it, from the moment when workers are usable."""
    there: list[float]
    """Those of requests through another frontend meanwhile."""


async def kv_join(quick: bool) -> list[Row]:
    """A frontend joins a cluster whose caches hold a million blocks (quick: 100,000)."""
    blocks = 100_000 if quick else 1_000_000
    rows: list[Row] = []
    for workers in (1, 4):
        rows += await joining(Fleet(blocks, workers), times=3 if quick else 8)
    return rows


class Fleet(NamedTuple):
    """Whose caches are to be known."""

    blocks: int
    workers: int


async def joining(fleet: Fleet, times: int) -> list[Row]:
    """Measure so many joins, with empty caches and with full ones."""
    blocks, workers = fleet
    flags = ("--mock-num-blocks", str(2 * blocks), "--context-length", str(CONTEXT))
    async with start.cluster(step_ms=1, workers=workers, flags=flags, frontend_flags=ROUTED) as up:
        empty = [await join(up, Fleet(0, workers)) for _ in range(times)]
        await fill(up.port, blocks)
        await known(up.port, fleet)
        full = [await join(up, fleet) for _ in range(times)]
    name = f"{blocks:,} blocks on {workers} worker{'s' * (workers > 1)}"
    since = [one.usable + one.exact for one in full]
    usable, live = median(one.usable for one in full), median(one.live for one in full)
    return [
        Row(
            f"{name}: a new frontend knows all, after it listens, median of {times}",
            f"{median(since):.2f} s",
            f"goal {blocks / 1e6:g} s; workers are usable after {usable:.2f} s of it",
        ),
        Row(f"{name}: the slowest", f"{max(since):.2f} s", f"it listens {live:.2f} s after its start"),
        Row(
            f"{name}: CPU of its first seconds",
            f"{median(one.cpu for one in full):.2f} s",
            f"with empty caches {median(one.cpu for one in empty):.2f} s",
        ),
        compared(f"{name}: its first requests", [o.here for o in full], [o.here for o in empty]),
        compared(f"{name}: requests through another frontend", [o.there for o in full], [o.there for o in empty]),
    ]


def compared(name: str, full: list[list[float]], empty: list[list[float]]) -> Row:
    """Return median, 99th percentile and longest of requests, with full caches and with empty ones."""
    ours, theirs = ([took for one in joins for took in one] for joins in (full, empty))
    return Row(f"{name}: p50 / p99 / max", shown(ours), f"with empty caches {shown(theirs)}")


async def fill(port: int, blocks: int) -> None:
    """Let the caches hold so many different blocks."""
    rng = random.Random(1)
    left = blocks
    client = await connect(port)
    while left > 0:
        count = min(left, CONTEXT // BLOCK - 1)
        prompt = [rng.randrange(VOCABULARY) for _ in range(count * BLOCK)]
        await client.fetch(request_bytes({"model": "mock", "prompt": prompt, "max_tokens": 1}, "/v1/completions"))
        left -= count
    client.close()


async def known(port: int, fleet: Fleet) -> None:
    """Wait until a frontend knows all of them. Raises TimeoutError."""
    async with asyncio.timeout(PATIENCE):
        while not _exact(await _health(port), fleet):  # noqa: ASYNC110 - another process
            await asyncio.sleep(LOOK)


async def join(up: start.Running, fleet: Fleet) -> Joined:
    """Start a frontend, and see when it knows what, and how long requests take meanwhile."""
    port = free_port("127.0.0.1")
    began = time.perf_counter()
    async with _frontend(up, port) as process:
        work = asyncio.ensure_future(_join(port, began, process.pid, fleet))
        there = await timed(up.port, asyncio.wait([work]))
        return (await work)._replace(there=there)


async def _join(port: int, began: float, pid: int, fleet: Fleet) -> Joined:
    live = await start.answers(f"http://127.0.0.1:{port}/live", began)
    listens = time.perf_counter()
    async with asyncio.timeout(PATIENCE):
        while (await _health(port)).get("models", {}).get("mock", 0) < fleet.workers:  # noqa: ASYNC110 - another process
            await asyncio.sleep(LOOK)
        usable = time.perf_counter()
        exact = asyncio.ensure_future(_since(usable, known(port, fleet)))
        here = await timed(port, asyncio.gather(exact, asyncio.sleep(FIRST)))
    return Joined(live, usable - listens, await exact, cpu_seconds(pid), here, [])


async def _since(began: float, work: Any) -> float:
    await work
    return time.perf_counter() - began


@contextlib.asynccontextmanager
async def _frontend(up: start.Running, port: int) -> AsyncIterator[asyncio.subprocess.Process]:
    command = [sys.executable, "-m", "holdfast", "frontend", "--http-port", str(port), *ROUTED]
    process = await asyncio.create_subprocess_exec(*command, env=up.env)
    try:
        yield process
    finally:
        process.kill()
        await process.wait()


async def timed(port: int, meanwhile: Any) -> list[float]:
    """Return the milliseconds that small requests took, one after the other, while something else went on."""
    client = await connect(port)
    work = asyncio.ensure_future(meanwhile)
    took: list[float] = []
    while not work.done():
        took.append(await _one(client))
        await asyncio.sleep(PAUSE)
    client.close()
    await work
    return took


async def _one(client: Client) -> float:
    began = time.perf_counter()
    await client.fetch(chat(1, stream=False))
    return (time.perf_counter() - began) * 1e3


async def _health(port: int) -> dict[str, Any]:
    with contextlib.suppress(HoldfastError, TimeoutError):
        found: dict[str, Any] = (await http.get(f"http://127.0.0.1:{port}/health", timeout=5.0)).json()
        return found
    return {}


def _exact(health: dict[str, Any], fleet: Fleet) -> bool:
    knows = [one["kv"] for one in health.get("instances", [])]
    exact = [one for one in knows if one["state"] == "exact"]
    return len(exact) == fleet.workers and sum(one["blocks"] for one in exact) >= fleet.blocks


def median(values: Any) -> float:
    """Return the middle one."""
    return percentile(list(values), 0.5)


def shown(values: list[float]) -> str:
    """Return median, 99th percentile and the longest of milliseconds."""
    return f"{percentile(values, 0.5):.1f} / {percentile(values, 0.99):.1f} / {max(values):.1f} ms"
