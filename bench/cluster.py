"""Starts what is measured: a cluster of real processes, or the floor."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import NamedTuple

from holdfast.base.errors import HoldfastError
from holdfast.local import http
from holdfast.local.backoff import RestartPolicy
from holdfast.local.cluster import ClusterPlan, LocalCluster
from holdfast.local.ports import free_port
from holdfast.runtime.discovery.factory import open_discovery


class Running:
    """A running cluster."""

    ready_after = 0.0
    """Seconds from the start of the processes until the frontend could use all workers."""

    def __init__(self, local: LocalCluster, port: int, env: dict[str, str]):
        self.local = local
        self.port = port
        self.env = env

    async def settled(self) -> None:
        """Wait until the frontend counts all workers as usable."""
        wanted = len(self.local.supervisor.slots) - 1
        async with asyncio.timeout(30):
            while True:
                health = await http.get(f"http://127.0.0.1:{self.port}/health", timeout=2.0)
                if health.status == 200 and max(health.json()["models"].values()) >= wanted:
                    return
                await asyncio.sleep(0.02)

    def pid(self, slot: str = "frontend-0") -> int:
        """Return the process id of a slot."""
        pid = self.local.supervisor.slots[slot].pid
        assert pid is not None
        return pid


@contextlib.asynccontextmanager
async def cluster(
    *, step_ms: float, workers: int = 2, flags: tuple[str, ...] = (), frontend_flags: tuple[str, ...] = ()
) -> AsyncIterator[Running]:
    """Run a frontend and mock workers whose steps take so many milliseconds (0: instant)."""
    with tempfile.TemporaryDirectory() as root:
        port = free_port("127.0.0.1")
        plan = ClusterPlan(
            http_ports=(port,),
            workers=workers,
            worker_flags=("--engine", "mock", "--mock-step-ms", str(step_ms), "--max-num-seqs", "1024", *flags),
            frontend_flags=frontend_flags,
            env={"DYN_FILE_KV": str(Path(root) / "discovery"), "DYN_LOG": "error"},
            restart=RestartPolicy(intensity=1000),
            stop_grace=5.0,
        )
        discovery = open_discovery("file", root=Path(root) / "discovery")
        local = LocalCluster(plan, discovery, random.Random(1), dict(os.environ), lambda *_: None)
        up = Running(local, port, {**os.environ, **plan.env})
        began = time.perf_counter()
        async with local.running():
            await local.until_ready(60)
            up.ready_after = time.perf_counter() - began
            await up.settled()
            yield up


async def answers(url: str, began: float) -> float:
    """Wait until a URL answers 200; return the seconds since ``began``."""
    async with asyncio.timeout(60):
        while True:
            with contextlib.suppress(HoldfastError, TimeoutError):
                if (await http.get(url, timeout=1.0)).status == 200:
                    return time.perf_counter() - began
            await asyncio.sleep(0.01)


class Alone(NamedTuple):
    """A frontend without a supervisor."""

    port: int
    env: dict[str, str]
    live_after: float


@contextlib.asynccontextmanager
async def frontend_alone() -> AsyncIterator[Alone]:
    """Run a frontend and nothing else."""
    with tempfile.TemporaryDirectory() as root:
        port = free_port("127.0.0.1")
        env = {**os.environ, "DYN_FILE_KV": str(Path(root) / "discovery"), "DYN_LOG": "error"}
        began = time.perf_counter()
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "holdfast", "frontend", "--http-port", str(port), env=env
        )
        try:
            yield Alone(port, env, await answers(f"http://127.0.0.1:{port}/live", began))
        finally:
            process.kill()
            await process.wait()


@contextlib.asynccontextmanager
async def extra_worker(up: Running | Alone, model: str, *, step_ms: float) -> AsyncIterator[float]:
    """Run one more mock worker, under another model name; yields the seconds until it could be used."""
    began = time.perf_counter()
    command = [sys.executable, "-m", "holdfast", "worker", "--engine", "mock", "--model-name", model]
    command += ["--mock-step-ms", str(step_ms), "--max-num-seqs", "1024"]
    process = await asyncio.create_subprocess_exec(*command, env=up.env, stderr=asyncio.subprocess.DEVNULL)
    try:
        async with asyncio.timeout(30):
            url = f"http://127.0.0.1:{up.port}/v1/models/{model}"
            while (await http.get(url, timeout=2.0)).status != 200:  # noqa: ASYNC110 - another process
                await asyncio.sleep(0.01)
        yield time.perf_counter() - began
    finally:
        process.kill()
        await process.wait()


@contextlib.asynccontextmanager
async def floor(tokens: int, step: float) -> AsyncIterator[tuple[int, int]]:
    """Run the floor; yields (port, pid)."""
    async with _listening("bench.floor", str(tokens), str(step)) as running:
        yield running


@contextlib.asynccontextmanager
async def relay(up: Running, tokens: int) -> AsyncIterator[tuple[int, int]]:
    """Run the fair floor beside a cluster, fed by its workers; yields (port, pid)."""
    async with _listening("bench.relay", str(tokens), env=up.env) as running:
        yield running


@contextlib.asynccontextmanager
async def _listening(module: str, *arguments: str, env: dict[str, str] | None = None) -> AsyncIterator[tuple[int, int]]:
    port = free_port("127.0.0.1")
    process = await asyncio.create_subprocess_exec(sys.executable, "-m", module, str(port), *arguments, env=env)
    try:
        async with asyncio.timeout(10):
            while True:
                with contextlib.suppress(OSError):
                    _, writer = await asyncio.open_connection("127.0.0.1", port)
                    writer.close()
                    break
                await asyncio.sleep(0.02)
        yield port, process.pid
    finally:
        process.kill()
        await process.wait()
