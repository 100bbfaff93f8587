"""Frontends know what real workers have in their KV caches, after requests, kills and restarts, and when late."""

from __future__ import annotations

import asyncio
import random
import signal
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from holdfast.frontend.assembly import Assembled
from holdfast.frontend.config import FrontendConfig
from holdfast.kv.hashes import block_hashes
from holdfast.routing.knowledge import PrefixKnowledge
from holdfast.routing.knowledge_config import KnowledgeSettings
from holdfast.runtime.discovery.factory import open_discovery
from holdfast.runtime.transport import TcpTransport
from tests.e2e.support import Cluster, cluster
from tests.patience import within

pytestmark = [pytest.mark.e2e, pytest.mark.asyncio(loop_scope="module")]

SIZE = 16
ALWAYS = KnowledgeSettings(kv_events_always=True)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def watched(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Cluster]:
    root = tmp_path_factory.mktemp("kv")
    engine = ("--engine", "mock", "--mock-speedup-ratio", "0")
    async with cluster(root, engine=engine, frontend=("--router-kv-events-always",)) as running:
        yield running


async def fill(cluster: Cluster, prompts: int, tokens: int, seed: int) -> None:
    """Let the workers compute prompts that have nothing in common."""
    rng = random.Random(seed)

    async def ask() -> None:
        prompt = [rng.randrange(1000) for _ in range(tokens)]
        await cluster.client.completions.create(model="mock", prompt=prompt, max_tokens=1)

    for _ in range(prompts):
        await ask()


async def caches(cluster: Cluster) -> dict[str, dict[str, Any]]:
    return {name: one["kv"] for name, one in (await cluster.instances()).items()}


async def until_known(cluster: Cluster, blocks: int) -> dict[str, dict[str, Any]]:
    """Wait until the frontend knows at least so many blocks exactly."""

    async def known() -> dict[str, dict[str, Any]] | None:
        found = await caches(cluster)
        exact = all(kv["state"] == "exact" for kv in found.values()) and len(found) == cluster.size
        return found if exact and sum(kv["blocks"] for kv in found.values()) >= blocks else None

    return await cluster.until(known, within(10))


async def test_what_was_computed_is_known_and_shown(watched: Cluster) -> None:
    await until_known(watched, 0)
    await fill(watched, 6, 1600, seed=1)
    found = await until_known(watched, 600)
    assert all(kv["problem"] == "" and kv["sequence"] > 0 for kv in found.values())
    assert await watched.metric("dynamo_component_kv_cache_events_applied", event_type="stored", status="ok") >= 6
    assert await watched.metric("holdfast_frontend_kv_workers", state="exact") == 2
    assert await watched.metric("holdfast_frontend_kv_blocks") >= 600
    assert await watched.metric("dynamo_component_router_worker_registered") == 2


async def test_stale_blocks_do_not_survive_a_kill(watched: Cluster) -> None:
    await fill(watched, 6, 1600, seed=2)
    before = await until_known(watched, 600)
    victim = max(before, key=lambda name: before[name]["blocks"])
    pid = (await watched.instances())[victim]["pid"]
    watched.kill(victim, signal.SIGKILL)

    async def back() -> dict[str, Any] | None:
        one = (await watched.instances()).get(victim)
        return one["kv"] if one and one["pid"] != pid and one["kv"]["state"] == "exact" else None

    kv = await watched.until(back, within(15))
    assert kv["blocks"] < 20, "nothing but what the new process computed for its own test"
    await watched.usable()


async def test_a_frozen_worker_keeps_what_it_has(watched: Cluster) -> None:
    await fill(watched, 6, 1600, seed=3)
    before = await until_known(watched, 600)
    victim = max(before, key=lambda name: before[name]["blocks"])
    async with watched.frozen(victim):

        async def suspect() -> bool:
            return (await watched.instances())[victim]["state"] != "usable"

        await watched.until(suspect, within(10))
        during = (await caches(watched))[victim]
        assert (during["state"], during["blocks"]) == ("resynchronising", before[victim]["blocks"])
    await watched.usable()
    after = await until_known(watched, 600)
    assert after[victim]["blocks"] >= before[victim]["blocks"]
    assert await watched.metric("holdfast_frontend_kv_resynchronisations_total", reason="mismatch") == 0


async def test_a_late_frontend_knows_everything_within_moments(watched: Cluster, tmp_path: Path) -> None:
    del tmp_path
    rng = random.Random(99)
    prompt = [rng.randrange(1000) for _ in range(16_000)]
    await watched.client.completions.create(model="mock", prompt=prompt, max_tokens=1)
    known = await until_known(watched, 1000)
    discovery = open_discovery("file", root=watched.local.plan.env["DYN_FILE_KV"])
    await discovery.start()
    late = Assembled(
        FrontendConfig(knowledge=ALWAYS), discovery=discovery, transport=TcpTransport(), rng=random.Random(1)
    )
    loop = asyncio.get_running_loop()
    began = loop.time()
    await late.start()
    running = asyncio.ensure_future(late.run())
    try:
        while not _exact(late.knowledge, known):
            assert loop.time() - began < within(2)
            await asyncio.sleep(0.002)
        overlaps = late.knowledge.lookup(block_hashes(prompt, SIZE), SIZE, loop.time())
        assert max(device for _, _, device, _, _ in overlaps) == 1000
        blocks = {one.instance: one.blocks for one in late.knowledge.all_known()}
        assert blocks == {name: kv["blocks"] for name, kv in (await caches(watched)).items()}
    finally:
        running.cancel()
        await asyncio.wait([running])
        await late.close()
        await discovery.close()


def _exact(knowledge: PrefixKnowledge, known: dict[str, Any]) -> bool:
    return all(knowledge.state_of(name) == "exact" for name in known)
