"""Real clusters for end-to-end tests: processes, sockets and signals, and clients that we did not write."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import signal
import urllib.request
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any, TypeVar

import openai

from holdfast.local.backoff import RestartPolicy
from holdfast.local.cluster import ClusterPlan, LocalCluster
from holdfast.local.ports import free_port
from holdfast.runtime.discovery.factory import open_discovery

T = TypeVar("T")
MOCK = ("--engine", "mock", "--step-ms", "5")
LLAMA = ("--engine", "llamacpp")


class Cluster:
    """A running cluster and the ways to talk to it and to hurt it."""

    def __init__(self, local: LocalCluster):
        self.local = local
        self.url = local.base_urls[0]
        self.client = openai.AsyncOpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=120)
        self.model = ""

    async def get(self, path: str) -> dict[str, Any]:
        """GET a JSON document from the frontend."""
        return await asyncio.to_thread(_get, self.url + path)

    def workers(self) -> dict[str, Any]:
        """Slots of the workers by name."""
        return {name: slot for name, slot in self.local.supervisor.slots.items() if name.startswith("worker")}

    def slot_of(self, instance: str) -> str:
        slot = self.local.slot_of(instance)
        assert slot is not None, f"no slot runs instance {instance}: {self.local.views()}"
        return slot

    def kill(self, instance: str, number: signal.Signals = signal.SIGKILL) -> str:
        """Send a signal to the process of a worker, by its instance id; returns the slot."""
        slot = self.slot_of(instance)
        self.local.kill(slot, number)
        return slot

    async def until(self, condition: Callable[[], Awaitable[T]], within: float = 30.0) -> T:
        """Wait for a condition with a deadline; returns its first true value."""
        async with asyncio.timeout(within):
            while not (value := await condition()):
                await asyncio.sleep(0.02)
            return value

    async def usable(self, count: int, within: float = 60.0) -> None:
        """Wait until the frontend counts so many usable workers."""

        async def enough() -> bool:
            models = (await self.get("/health"))["models"]
            return bool(models) and max(models.values()) >= count

        await self.until(enough, within)

    async def at_rest(self, within: float = 15.0) -> dict[str, int]:
        """Wait until all leases of the frontend are back; returns them."""

        async def rest() -> dict[str, int] | None:
            leases = (await self.get("/debug/requests"))["leases"]
            return leases if not any(leases.values()) else None

        return await self.until(rest, within)

    async def request_on(self, label: str) -> dict[str, Any]:
        """Return the live request of that client label."""

        async def find() -> dict[str, Any] | None:
            requests = (await self.get("/debug/requests"))["requests"]
            return next((r for r in requests if r["label"] == label), None)

        return await self.until(find, 10)


def _get(url: str) -> dict[str, Any]:
    try:
        with urllib.request.urlopen(url, timeout=10) as answer:
            return json.load(answer)
    except urllib.error.HTTPError as error:
        return json.load(error)


@contextlib.asynccontextmanager
async def cluster(
    root: Path,
    *,
    engine: tuple[str, ...] = MOCK,
    workers: int = 2,
    frontend: tuple[str, ...] = (),
    env: dict[str, str] | None = None,
    restart: RestartPolicy | None = None,
) -> AsyncIterator[Cluster]:
    """Run frontend and workers on free ports; everything is stopped at the end."""
    store = root / "discovery"
    plan = ClusterPlan(
        http_ports=(free_port("127.0.0.1"),),
        workers=workers,
        worker_flags=engine,
        frontend_flags=frontend,
        env={"DYN_FILE_KV": str(store), **(env or {})},
        restart=restart or RestartPolicy(),
        stop_grace=10.0,
    )
    discovery = open_discovery("file", root=store)
    log = (root / "cluster.log").open("a")
    local = LocalCluster(plan, discovery, random.Random(7), dict(os.environ), lambda *line: print(*line, file=log, flush=True))
    async with local.running():
        try:
            await local.until_ready(90)
            found = Cluster(local)
            await found.usable(workers)
            found.model = (await found.get("/v1/models"))["data"][0]["id"]
            async with found.client:
                yield found
        finally:
            log.flush()


async def collect(stream: Any) -> tuple[str, list[Any], list[float]]:
    """Read a chat stream to its end: text, chunks and arrival times of content."""
    text, chunks, times = [], [], []
    loop = asyncio.get_running_loop()
    async for chunk in stream:
        chunks.append(chunk)
        for choice in chunk.choices:
            if choice.delta.content:
                text.append(choice.delta.content)
                times.append(loop.time())
    return "".join(text), chunks, times
