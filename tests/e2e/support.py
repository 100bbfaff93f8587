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
from types import SimpleNamespace
from typing import Any, TypeVar, cast

import httpx

import openai
from holdfast.local.backoff import RestartPolicy
from holdfast.local.cluster import ClusterPlan, LocalCluster
from holdfast.local.ports import free_port
from holdfast.runtime.discovery.factory import open_discovery
from tests.e2e.oracles import Wire
from tests.e2e.peers import Peer, peer

T = TypeVar("T")
MOCK = ("--engine", "mock", "--mock-step-ms", "5")
LLAMA = ("--engine", "llamacpp")
AT_ONCE = RestartPolicy(first_delay=0.0, next_delay=0.05, factor=1.0, intensity=100_000)
"""Crashed processes come back without delay, and nobody ever gives up."""


class Cluster:
    """A running cluster and the ways to talk to it and to hurt it."""

    def __init__(self, local: LocalCluster, size: int, log: Path):
        self.local = local
        self.size = size
        self.log = log
        self.url = local.base_urls[0]
        self.port = local.plan.http_ports[0]
        self.wire = Wire()
        self.http = httpx.AsyncClient(transport=self.wire, base_url=self.url, timeout=120)
        self.client = openai.AsyncOpenAI(
            base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=120, http_client=self.http
        )
        self.model = ""
        self._doomed: set[int] = set()
        """Processes that were sent a deadly signal."""

    async def get(self, path: str) -> dict[str, Any]:
        """GET a JSON document from the frontend."""
        return await asyncio.to_thread(_get, self.url + path)

    async def metric(self, name: str, **labels: str) -> float:
        """Return the sum of a frontend metric over all series that have these labels."""
        text = (await self.http.get("/metrics")).text
        wanted = [f'{key}="{value}"' for key, value in labels.items()]
        lines = [line for line in text.splitlines() if line.partition("{")[0].partition(" ")[0] == name]
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines if all(w in line for w in wanted))

    # who is there

    async def instances(self) -> dict[str, dict[str, Any]]:
        """Return the workers as the frontend sees them, by instance id."""
        return {one["instance_id"]: one for one in (await self.get("/health"))["instances"]}

    def slots(self) -> dict[str, Any]:
        """Slots of the workers by name."""
        return {name: slot for name, slot in self.local.supervisor.slots.items() if name.startswith("worker")}

    def slot_of(self, instance: str) -> str:
        """Return the slot that runs an instance: the supervisor gave it its id, and it keeps it over restarts."""
        return next(name for name, slot in self.slots().items() if slot.spec.env["DYN_INSTANCE_ID"] == instance)

    def pid(self, slot: str) -> int:
        pid = self.local.supervisor.slots[slot].pid
        assert pid is not None, f"{slot} does not run"
        return pid

    @contextlib.asynccontextmanager
    async def peer(self, instance: str) -> AsyncIterator[Peer]:
        """A connection of our own to a worker, for commands and counters."""
        address = (await self.instances())[instance]["transport"]["tcp"]
        async with peer(address) as found:
            yield found

    # hurting

    def kill(self, instance: str, number: signal.Signals = signal.SIGKILL) -> str:
        """Send a signal to the process of a worker, by its instance id; returns the slot."""
        slot = self.slot_of(instance)
        pid = self.local.kill(slot, number)
        if number != signal.SIGCONT:
            self._doomed.add(pid)
        return slot

    @contextlib.asynccontextmanager
    async def frozen(self, instance: str) -> AsyncIterator[int]:
        """SIGSTOP a worker for the length of the block; yields its pid."""
        pid = self.pid(self.slot_of(instance))
        os.kill(pid, signal.SIGSTOP)
        try:
            yield pid
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)

    # waiting

    async def until(self, condition: Callable[[], Awaitable[T]], within: float = 30.0, every: float = 0.02) -> T:
        """Wait for a condition with a deadline; returns its first true value."""
        async with asyncio.timeout(within):
            while not (value := await condition()):  # noqa: ASYNC110  other processes have no event to wait for
                await asyncio.sleep(every)
            return value

    async def usable(self, count: int | None = None, within: float = 60.0) -> None:
        """Wait until the frontend is connected to so many healthy workers (None: all), inhibited ones included."""
        wanted = self.size if count is None else count

        async def enough() -> bool:
            with contextlib.suppress(OSError):
                seen = (await self.instances()).values()
                return sum(one["state"] == "usable" and one["pid"] not in self._doomed for one in seen) >= wanted
            return False

        await self.until(enough, within)

    async def leases(self) -> dict[str, int]:
        """Return what the frontend counts as held at this moment."""
        return dict((await self.get("/debug/requests"))["leases"])

    async def at_rest(self, within: float = 15.0) -> None:
        """Wait until all leases of the frontend and all sequences of its workers are back."""

        async def rest() -> bool:
            return not any((await self.leases()).values())

        await self.until(rest, within)
        for instance, seen in (await self.instances()).items():
            if seen["state"] == "usable":
                async with self.peer(instance) as worker:
                    await worker.idle(within)

    async def live(self, label: str) -> dict[str, Any] | None:
        """Return the live request of that client label, if there is one."""
        requests = (await self.get("/debug/requests"))["requests"]
        return next((r for r in requests if r["label"] == label), None)

    async def story(self, label: str) -> str:
        """Return what the frontend remembers of a request, for the message of a failure."""
        return json.dumps(await self.get(f"/debug/requests/{label}"), indent=1)

    async def stream_in(self, label: str, state: str, within: float = 10.0) -> dict[str, Any]:
        """Wait until the first stream of a request is in a state; returns the stream."""

        async def reached() -> dict[str, Any] | None:
            request = await self.live(label)
            found = request["streams"][0] if request else None
            return found if found and found["state"] == state else None

        return await self.until(reached, within, every=0.005)


def unsupervised(port: int) -> Cluster:
    """Return a client for a frontend that somebody else started; there are no slots, and its model is ``mock``."""
    plan = SimpleNamespace(http_ports=(port,), env={})
    local = SimpleNamespace(base_urls=[f"http://127.0.0.1:{port}"], plan=plan, supervisor=SimpleNamespace(slots={}))
    found = Cluster(cast("LocalCluster", local), 1, Path(os.devnull))
    found.model = "mock"
    return found


def _get(url: str) -> dict[str, Any]:
    try:
        with urllib.request.urlopen(url, timeout=10) as answer:
            return dict(json.load(answer))
    except urllib.error.HTTPError as error:
        return dict(json.load(error))


@contextlib.asynccontextmanager
async def cluster(
    root: Path,
    *,
    engine: tuple[str, ...] = MOCK,
    workers: int = 2,
    prefill: int = 0,
    frontend: tuple[str, ...] = (),
    env: dict[str, str] | None = None,
    restart: RestartPolicy = AT_ONCE,
    grace: float = 10.0,
) -> AsyncIterator[Cluster]:
    """Run frontend and workers on free ports, the last ``prefill`` of them for prompts; all is stopped at the end."""
    store = root / "discovery"
    plan = ClusterPlan(
        http_ports=(free_port("127.0.0.1"),),
        workers=workers,
        prefill_workers=prefill,
        flags_by_worker=tuple(
            (f"--disaggregation-mode={'decode' if i < workers - prefill else 'prefill'}",) if prefill else ()
            for i in range(workers)
        ),
        worker_flags=engine,
        frontend_flags=frontend,
        env={"DYN_FILE_KV": str(store), **(env or {})},
        restart=restart,
        stop_grace=grace,
    )
    discovery = open_discovery("file", root=store)
    path = root / "cluster.log"
    with path.open("a") as log:
        relay = _relay_to(log)
        local = LocalCluster(plan, discovery, random.Random(7), dict(os.environ), relay)
        async with local.running():
            await local.until_ready(90)
            found = Cluster(local, workers, path)
            await found.usable(workers)
            found.model = min((await found.get("/health"))["models"], key=len)
            async with found.http:
                yield found


def _relay_to(log: Any) -> Callable[[str, str], None]:
    def relay(slot: str, line: str) -> None:
        print(slot, line, file=log, flush=True)

    return relay
