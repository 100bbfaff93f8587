"""A frontend, two SGLang workers and the ``openai`` client: schedulers and workers are killed in mid-stream."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import random
import signal
from pathlib import Path

import pytest
import pytest_asyncio

from holdfast.local import http
from holdfast.local.backoff import RestartPolicy
from holdfast.local.cluster import ClusterPlan, LocalCluster
from holdfast.local.ports import free_port
from holdfast.runtime.discovery.factory import open_discovery
from openai import AsyncOpenAI
from tests.engines.sglang.harness import (
    ENVIRONMENT,
    FLAGS,
    NEEDS_SGLANG,
    SLOW_MACHINE,
    children,
    gone,
    lives,
    search_path,
)
from tests.patience import within
from tests.support.hf_model import model_directory

pytestmark = [NEEDS_SGLANG, pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(900)]

START_SECONDS = 200.0
TOKENS = 40


class World:
    """The cluster and its client."""

    def __init__(self, local: LocalCluster, model: str, log: Path):
        self.local, self.model, self.log = local, model, log
        self.truth: tuple[str, str, int] | None = None
        """Text, finish and tokens of the undisturbed run."""
        self.client = AsyncOpenAI(base_url=f"{local.base_urls[0]}/v1", api_key="none", max_retries=0, timeout=300)

    def pid(self, instance: str) -> int:
        slots = self.local.supervisor.slots.values()
        pid = next(slot.pid for slot in slots if slot.spec.env.get("DYN_INSTANCE_ID") == instance)
        assert pid is not None
        return pid

    async def usable(self, count: int) -> None:
        async with asyncio.timeout(within(START_SECONDS)):
            while True:
                with contextlib.suppress(Exception):
                    health = (await http.get(f"{self.local.base_urls[0]}/health")).json()
                    if sum(one["state"] == "usable" for one in health["instances"]) >= count:
                        return
                await asyncio.sleep(0.2)

    async def stream(self, at: int = -1, hurt=None) -> tuple[str, str, int, dict[str, object], float]:
        """Return text, finish, tokens, what Holdfast says of the stream, and its longest silence after the hurt."""
        raw = await self.client.chat.completions.with_raw_response.create(
            model=self.model,
            messages=[{"role": "user", "content": "Tell me a story about a lighthouse keeper."}],
            max_tokens=TOKENS,
            temperature=0.0,
            stream=True,
            stream_options={"include_usage": True},
        )
        worker, clock = raw.headers["x-holdfast-worker"], asyncio.get_running_loop().time
        text, finish, tokens, facts, times = "", "", 0, {}, []
        async for chunk in raw.parse():
            tokens = chunk.usage.completion_tokens if chunk.usage else tokens
            for choice in chunk.choices:
                if choice.delta.content:
                    text += choice.delta.content
                    times.append(clock())
                    if len(times) == at:
                        hurt(worker)
                if choice.finish_reason:
                    finish = choice.finish_reason
                    facts = (chunk.model_extra or {}).get("holdfast") or {}
        since = times[at - 1 :] if at > 0 else times
        return text, finish, tokens, facts, max((b - a for a, b in itertools.pairwise(since)), default=0.0)


@contextlib.asynccontextmanager
async def running(root: Path, flags_by_worker: tuple[tuple[str, ...], ...] = (), prefill: int = 0):
    """Run a frontend and two workers."""
    model = await asyncio.to_thread(model_directory, "bfloat16")
    plan = ClusterPlan(
        http_ports=(free_port(),),
        prefill_workers=prefill,
        worker_flags=("--engine", "sglang", "--model", str(model), *FLAGS.split()),
        flags_by_worker=flags_by_worker,
        env={**ENVIRONMENT, **SLOW_MACHINE, "PYTHONPATH": search_path(), "DYN_FILE_KV": str(root / "discovery")},
        restart=RestartPolicy(first_delay=600.0, next_delay=600.0),  # a new start would only take the others' time
        stop_grace=20.0,
    )
    local = LocalCluster(
        plan, open_discovery("file", root=root / "discovery"), random.Random(1), dict(os.environ), _relay(root / "log")
    )
    async with local.running():
        await local.until_ready(within(START_SECONDS))
        models = (await http.get(f"{local.base_urls[0]}/v1/models")).json()["data"]
        found = World(local, models[0]["id"], root / "log")
        await found.usable(2)
        yield found


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def world(tmp_path_factory: pytest.TempPathFactory):
    async with running(tmp_path_factory.mktemp("sglang")) as found:
        yield found


def _relay(path: Path):
    file = path.open("a")
    return lambda *said: print(*said, file=file, flush=True)


async def test_a_stream_survives_the_death_of_its_scheduler_and_nothing_is_left_behind(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    whole = await world.stream()
    world.truth = whole[:3]
    assert whole[2] == TOKENS
    assert not whole[3].get("migrations")

    hurt: dict[str, object] = {}

    def kill(instance: str) -> None:
        pid = world.pid(instance)
        below = children(pid)
        scheduler = next(one for one, name in below.items() if "scheduler" in name)
        hurt.update(pid=pid, below=below)
        os.kill(scheduler, signal.SIGKILL)

    moved = await world.stream(8, kill)
    assert moved[:3] == whole[:3], "another text than the undisturbed run's"
    (migration,) = moved[3]["migrations"]
    assert migration["cause"] == "engine_failed"
    assert moved[3].get("join") != "declared", "greedy at float32 is exact"
    print(f"\nlongest silence after the scheduler's death: {moved[4]:.2f} s")
    await gone(hurt["pid"], *hurt["below"])
    assert "exit code 1" in caplog.text, "the exit code of a dead engine"


async def test_a_killed_worker_leaves_none_of_sglangs_processes(world: World) -> None:
    await world.usable(1)
    slots = world.local.supervisor.slots.items()
    pid = next(slot.pid for name, slot in slots if "worker" in name and slot.pid and lives(slot.pid))
    below = children(pid)
    assert any("scheduler" in name for name in below.values())
    os.kill(pid, signal.SIGKILL)
    await gone(*below)


async def test_a_prompt_is_computed_by_one_worker_and_the_text_by_another(world: World, tmp_path: Path) -> None:
    """The last test: by now the other workers have left their memory."""
    nixl = ("--disaggregation-transfer-backend", "nixl")
    decode = ("--disaggregation-mode=decode", *nixl, "--disaggregation-decode-retraction-backup", "cpu_tensor")
    async with running(tmp_path, (decode, ("--disaggregation-mode=prefill", *nixl)), prefill=1) as split:
        first, second = await split.stream(), await split.stream()
        assert first[:3] == second[:3]
        assert first[2] == TOKENS
        assert first[:3] == (world.truth or first[:3]), "another text than that of a worker that does everything"
        metrics = (await http.get(f"{split.local.base_urls[0]}/metrics")).body.decode()
        handed = [line for line in metrics.splitlines() if 'outcome="handed_over"' in line]
        assert handed, "no prompt was handed over"
        assert float(handed[0].rsplit(" ", 1)[1]) >= 2
