"""A local cluster of real processes: ready, visible, killed, whole again, gone without a trace."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from holdfast.base.errors import HoldfastError
from holdfast.health.config import SystemConfig
from holdfast.local import http
from holdfast.local.backoff import RestartPolicy
from holdfast.local.cluster import ClusterFailed, ClusterPlan, LocalCluster
from holdfast.local.demonstration import Demonstration, Question
from holdfast.local.ports import free_port
from holdfast.runtime.discovery.contract import SUPERVISOR
from holdfast.runtime.discovery.factory import open_discovery

pytestmark = pytest.mark.e2e
READY_SECONDS = 60.0


def plan(directory: Path, *worker_flags: str, workers: int = 2) -> ClusterPlan:
    return ClusterPlan(
        http_ports=(free_port(),),
        workers=workers,
        worker_flags=("--engine", "mock", *worker_flags),
        env={"DYN_DISCOVERY_BACKEND": "file", "DYN_FILE_KV": str(directory)},
        restart=RestartPolicy(next_delay=0.05, intensity=20),
        stop_grace=5.0,
    )


@contextlib.asynccontextmanager
async def started(plan: ClusterPlan, *, system: SystemConfig | None = None) -> AsyncIterator[LocalCluster]:
    lines: list[str] = []
    environ = {k: v for k, v in os.environ.items() if not k.startswith("DYN_")}
    discovery = open_discovery("file", root=plan.env["DYN_FILE_KV"])
    cluster = LocalCluster(
        plan, discovery, random.Random(1), environ, lambda slot, line: lines.append(f"{slot}|{line}"), system=system
    )
    try:
        async with cluster.running():
            await cluster.until_ready(READY_SECONDS)
            yield cluster
    except Exception as error:
        error.add_note("\n".join(lines))
        raise


def alive(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(READY_SECONDS):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.02)


async def test_a_killed_workers_stream_goes_on_and_its_slot_comes_back(tmp_path: Path) -> None:
    async with started(plan(tmp_path, "--mock-step-ms", "5")) as cluster:
        before = {view.slot: view for view in cluster.views()}
        question = Question("Count the boats.", max_tokens=120, model="mock")
        pieces: list[str] = []
        kills: list[tuple[str, int]] = []
        demonstration = Demonstration(cluster, random.Random(3))
        outcome = await demonstration.round(question, pieces.append, lambda slot, pid: kills.append((slot, pid)))
        assert len(pieces) == outcome.pieces > 50
        assert outcome.completion_tokens == 120
        assert kills == [(outcome.killed, before[outcome.killed].pid)]
        assert outcome.equal, (outcome.sha256, outcome.expected_sha256)
        assert outcome.usage_equal
        after = {view.slot: view for view in cluster.views()}
        assert after[outcome.killed].restarts == 1
        assert after[outcome.killed].pid != before[outcome.killed].pid
        assert after[outcome.killed].instance == before[outcome.killed].instance, "a slot keeps its instance id"
    pids = [view.pid for view in [*before.values(), *after.values()] if view.pid]
    assert not [pid for pid in pids if alive(pid)]


async def test_the_supervisor_publishes_its_slots(tmp_path: Path) -> None:
    async with started(plan(tmp_path, workers=1)) as cluster:
        onlooker = open_discovery("file", root=str(tmp_path))
        await onlooker.start()
        try:

            def states() -> list[object]:
                found = [r for r in onlooker.snapshot() if r.component == SUPERVISOR]
                return [{name: state for name, state in r.meta.items() if "." not in name} for r in found]

            await until(lambda: states() == [{"frontend-0": "running", "worker-0": "running"}])
            cluster.kill("worker-0")
            await until(lambda: cluster.supervisor.slots["worker-0"].restarts == 1)
        finally:
            await onlooker.close()


async def test_the_supervisor_answers_for_its_slots(tmp_path: Path) -> None:
    system = SystemConfig(system_port=0)
    async with started(plan(tmp_path, workers=1), system=system) as cluster:
        url = f"http://{cluster.vitals.status.address}"
        health = (await http.get(f"{url}/health", 2.0)).json()
        assert health["status"] == "ready"
        assert health["endpoints"] == {"frontend-0": "ready", "worker-0": "ready"}
        assert (await http.get(f"{url}/live", 2.0)).status == 200
        cluster.kill("worker-0")
        slot = cluster.supervisor.slots["worker-0"]
        await until(lambda: slot.restarts == 1 and slot.state == "running")
        metrics = (await http.get(f"{url}/metrics", 2.0)).body.decode()
        assert 'holdfast_supervisor_restarts_total{slot="worker-0"} 1' in metrics
        assert 'holdfast_supervisor_slot_state{slot="worker-0",state="running"} 1' in metrics
        assert (await http.get(f"{url}/metadata", 2.0)).status == 404
        cluster.supervisor.stop()
        await until(lambda: not cluster.vitals.verdict.ready)
    with pytest.raises(HoldfastError):
        await http.get(f"{url}/live", 2.0)


async def test_a_cluster_that_cannot_start_says_why(tmp_path: Path) -> None:
    with pytest.raises(ClusterFailed, match="--mock-step-ms='slow': expected a number"):
        async with started(plan(tmp_path, "--mock-step-ms", "slow", workers=1)):
            pytest.fail("never ready")
