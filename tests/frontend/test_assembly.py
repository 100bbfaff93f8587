"""A frontend from its parts: what is handed in is used, and nothing is left running. `tests/sim` runs whole ones."""

from __future__ import annotations

import asyncio
import random

import msgspec
import pytest

from holdfast.engines.mock import MockConfig, MockEngine
from holdfast.frontend.assembly import Assembled, pool_settings
from holdfast.frontend.config import FrontendConfig
from holdfast.models.store import ArtifactStore
from holdfast.runtime.discovery.mem import MemDiscovery, MemHub
from holdfast.runtime.transport import TcpTransport
from holdfast.worker.config import WorkerConfig
from holdfast.worker.process import WorkerProcess
from tests.frontend.support import until


def test_the_pool_keeps_to_the_frontends_settings() -> None:
    settings = pool_settings(FrontendConfig(freeze_after_secs=3.0, hang_floor_secs=7.0, inhibited_duration_secs=2.0))
    assert (settings.detector.freeze_after, settings.detector.hang.floor) == (3.0, 7.0)
    assert settings.inhibition.duration == 2.0


@pytest.mark.asyncio
async def test_it_serves_with_what_it_was_given_and_leaves_nothing_running() -> None:
    before = asyncio.all_tasks()
    hub, rng, store, reads = MemHub(), random.Random(3), ArtifactStore(), []
    worker = WorkerProcess(WorkerConfig(engine="mock"), MockEngine(MockConfig(step_ms=0.0)), MemDiscovery(hub), rng)
    discovery = MemDiscovery(hub)
    await discovery.start()

    def read_text(card: object, store: object, **how: object) -> object:
        from holdfast.text.model import load_text  # noqa: PLC0415

        reads.append(card)
        return load_text(card, store, **how)  # type: ignore[arg-type]

    assembled = Assembled(
        FrontendConfig(),
        discovery=discovery,
        transport=TcpTransport(),
        rng=rng,
        store=store,
        wall=lambda: 86_400.0,
        read_text=read_text,  # type: ignore[arg-type]
    )
    async with asyncio.TaskGroup() as group:
        group.create_task(worker.run())
        await assembled.start()
        running = group.create_task(assembled.run())
        await until(assembled.registry.served)
        answer = await get(assembled, "/v1/models")
        running.cancel()
        worker.stop()
        await assembled.close()
    await discovery.close()
    assert [model["created"] for model in answer["data"]] == [86_400]
    assert len(reads) == 1
    assert store.get(reads[0].tokenizer) is not None
    await until(lambda: asyncio.all_tasks() == before)


async def get(assembled: Assembled, path: str) -> dict[str, list[dict[str, int]]]:
    """Ask the application for a page."""
    parts: list[bytes] = []

    async def send(message: dict[str, bytes]) -> None:
        parts.append(message.get("body", b""))

    async def receive() -> dict[str, object]:
        return {"type": "http.request", "body": b"", "more_body": False}

    scope = {"type": "http", "http_version": "1.1", "method": "GET", "path": path, "query_string": b"", "headers": []}
    await assembled.app(scope, receive, send)
    return dict(msgspec.json.decode(b"".join(parts)))
