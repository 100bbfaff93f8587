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

from holdfast.local.backoff import RestartPolicy
from holdfast.local.cluster import ClusterPlan, LocalCluster
from holdfast.local.ports import free_port
from holdfast.runtime.discovery.factory import open_discovery


class Running:
    """A running cluster."""

    def __init__(self, local: LocalCluster, port: int, ready_after: float):
        self.local = local
        self.port = port
        self.ready_after = ready_after
        """Seconds from the start of the processes until the frontend served a model and all workers were ready."""

    def pid(self, slot: str = "frontend-0") -> int:
        """Return the process id of a slot."""
        pid = self.local.supervisor.slots[slot].pid
        assert pid is not None
        return pid


@contextlib.asynccontextmanager
async def cluster(*, step_ms: float, workers: int = 2, flags: tuple[str, ...] = ()) -> AsyncIterator[Running]:
    """Run a frontend and mock workers whose steps take so many milliseconds (0: instant)."""
    with tempfile.TemporaryDirectory() as root:
        port = free_port("127.0.0.1")
        plan = ClusterPlan(
            http_ports=(port,),
            workers=workers,
            worker_flags=("--engine", "mock", "--mock-step-ms", str(step_ms), "--max-num-seqs", "1024", *flags),
            env={"DYN_FILE_KV": str(Path(root) / "discovery"), "DYN_LOG": "error"},
            restart=RestartPolicy(intensity=1000),
            stop_grace=5.0,
        )
        discovery = open_discovery("file", root=Path(root) / "discovery")
        local = LocalCluster(plan, discovery, random.Random(1), dict(os.environ), lambda *_: None)
        began = time.perf_counter()
        async with local.running():
            await local.until_ready(60)
            yield Running(local, port, time.perf_counter() - began)


@contextlib.asynccontextmanager
async def floor(tokens: int, step: float) -> AsyncIterator[tuple[int, int]]:
    """Run the floor; yields (port, pid)."""
    port = free_port("127.0.0.1")
    process = await asyncio.create_subprocess_exec(sys.executable, "-m", "bench.floor", str(port), str(tokens), str(step))
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
