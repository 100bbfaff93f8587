"""The cluster that is killed in the proofs, and its client: processes of our own, nothing but the standard library.

Must never judge an answer.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import signal
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec

from holdfast.local import http
from holdfast.local.backoff import RestartPolicy
from holdfast.local.cluster import ClusterPlan, LocalCluster
from holdfast.local.ports import free_port
from holdfast.runtime.discovery.factory import open_discovery

ENGINES = {"mock": ("--engine", "mock", "--mock-step-ms", "10"), "llamacpp": ("--engine", "llamacpp")}
READY_SECONDS = 120.0
REQUEST_SECONDS = 180.0


class Seen(msgspec.Struct):
    """One streamed answer, as its client saw it."""

    text: str = ""
    finish: list[str] = []
    usage: dict[str, int] = {}
    holdfast: dict[str, Any] = {}
    times: list[float] = []
    """When pieces of text arrived, seconds on the loop's clock."""
    worker: str = ""
    """Instance that accepted it first."""
    error: str = ""
    over: bool = False


class Fleet:
    """A frontend and two workers."""

    def __init__(self, local: LocalCluster, model: str):
        self.local = local
        self.model = model
        self._doomed: set[int] = set()

    def kill(self, instance: str) -> None:
        """SIGKILL the worker with that instance id."""
        slots = self.local.supervisor.slots
        slot = next(name for name, slot in slots.items() if slot.spec.env.get("DYN_INSTANCE_ID") == instance)
        self._doomed.add(self.local.kill(slot, signal.SIGKILL))

    async def whole(self) -> None:
        """Wait until the frontend uses two living workers. Raises TimeoutError."""
        async with asyncio.timeout(READY_SECONDS):
            while True:
                health = (await http.get(f"{self.local.base_urls[0]}/health")).json()
                living = [i for i in health["instances"] if i["state"] == "usable" and i["pid"] not in self._doomed]
                if len(living) == self.local.plan.workers:
                    return
                await asyncio.sleep(0.02)

    async def stream(self, body: dict[str, Any], seen: Seen) -> Seen:
        """Stream an answer into ``seen``."""
        url = f"{self.local.base_urls[0]}/v1/chat/completions"
        payload = {"model": self.model, "stream": True, "stream_options": {"include_usage": True}, **body}
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(REQUEST_SECONDS), http.exchange("POST", url, payload) as (status, head, reader):
                seen.worker = head.get("x-holdfast-worker", "")
                if status != 200:
                    seen.error = f"status {status}"
                    return seen
                async for data in http.events(head, reader):
                    if data == b"[DONE]":
                        break
                    _take(seen, json.loads(data), loop.time())
        except Exception as error:
            seen.error = f"{type(error).__name__}: {error}"
        finally:
            seen.over = True
        return seen


def _take(seen: Seen, event: dict[str, Any], now: float) -> None:
    if "error" in event:
        seen.error = str(event["error"].get("code"))
    seen.usage = event.get("usage") or seen.usage
    for choice in event.get("choices", []):
        text = choice.get("delta", {}).get("content")
        if text:
            seen.text += text
            seen.times.append(now)
        if choice.get("finish_reason"):
            seen.finish.append(choice["finish_reason"])
            seen.holdfast = event.get("holdfast") or {}


@contextlib.asynccontextmanager
async def fleet(engine: str) -> AsyncIterator[Fleet]:
    """Run the cluster for the length of the block."""
    with tempfile.TemporaryDirectory(prefix="holdfast-proof-") as root:
        plan = ClusterPlan(
            http_ports=(free_port(),),
            worker_flags=ENGINES[engine],
            env={"DYN_FILE_KV": str(Path(root) / "discovery")},
            restart=RestartPolicy(next_delay=0.0, intensity=1_000_000),
            stop_grace=5.0,
        )
        discovery = open_discovery("file", root=Path(root) / "discovery")
        local = LocalCluster(plan, discovery, random.Random(1), dict(os.environ), lambda *_: None)
        async with local.running():
            await local.until_ready(READY_SECONDS)
            models = (await http.get(f"{local.base_urls[0]}/v1/models")).json()["data"]
            yield Fleet(local, models[0]["id"])
