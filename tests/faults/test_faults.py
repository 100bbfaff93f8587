"""Real processes under every kind of fault, and under plans that a universe would go through too."""

from __future__ import annotations

import asyncio
import random
import signal
from contextlib import aclosing
from pathlib import Path

import msgspec
import pytest

from holdfast.base.lineage import COOKIE
from holdfast.chaos.stopping import send
from holdfast.local.sentinel import marked
from holdfast.sim import faults as f
from holdfast.sim.workload import Manner
from tests.faults.bugs import BUGS
from tests.faults.campaign import Job, drawn_jobs, rounds, sweep_jobs
from tests.faults.cluster import Cluster
from tests.faults.rounds import Round, until
from tests.faults.tally import Tally
from tests.faults.test_calibration import AT, WORKER, plan_of
from tests.patience import within

pytestmark = [pytest.mark.faults, pytest.mark.timeout(900)]

SWEEPS = 3
"""A fault finds nobody now and then, because a prompt has just killed its target: its group is repeated."""
FIRST_SEED = 1


async def _run(jobs: list[Job], tally: Tally, keep: Path, seconds: float = 1e9) -> None:
    loop = asyncio.get_running_loop()
    end = loop.time() + seconds
    async with aclosing(rounds(jobs, keep, lambda: loop.time() >= end)) as results:
        async for one in results:
            tally.add(one)


async def test_every_kind_of_fault(tmp_path: Path) -> None:
    """The safety minimum: each of them strikes at least once, and no promise is broken."""
    tally = Tally()
    for number in range(1, SWEEPS + 1):
        jobs = sweep_jobs(number)
        missing = set(tally.missing)
        wanted = [job for job in jobs if number == 1 or missing & {fault.kind for fault in job[2].faults}]
        await _run(wanted, tally, tmp_path / "broken")
        if not tally.missing:
            break
    print(f"\n{tally.table()}")
    assert tally.broken == []
    assert tally.missing == []
    assert all(tally.seen[kind] for kind in ("client-leaves", "client-slow", "client-stalls"))
    assert tally.moves


async def test_drawn_plans(tmp_path: Path, faults_count: int, faults_seconds: float) -> None:
    """The same plans as those of the universes with these seeds."""
    tally = Tally()
    await _run(drawn_jobs(range(FIRST_SEED, FIRST_SEED + faults_count)), tally, tmp_path / "broken", faults_seconds)
    print(f"\n{tally.table()}")
    assert tally.broken == []
    assert tally.rounds


async def test_nothing_is_left_behind(tmp_path: Path) -> None:
    """Whatever ends a run, in the middle of whatever: every process is gone, stopped ones too."""
    cluster = Cluster(plan_of(f.Crash(at=AT, target=WORKER)), tmp_path, random.Random(1))
    mark = f"{COOKIE}={cluster._cookie}".encode()

    async def break_off() -> None:
        async with cluster.running():
            assert await until(cluster.in_use, within(20.0))
            assert len(marked(mark)) >= len(cluster.names)
            assert send(cluster.processes[WORKER].pid, signal.SIGSTOP)
            cluster.terminate("worker-0")
            raise LookupError("in the middle")

    with pytest.raises(ExceptionGroup) as raised:
        await break_off()
    assert raised.group_contains(LookupError)
    assert marked(mark) == []


@pytest.mark.parametrize("bug", BUGS)
async def test_a_planted_bug_is_noticed(tmp_path: Path, bug: str) -> None:
    """Those who judge can see: a crash, and clients that leave, bring each of these to light."""
    plan = plan_of(f.Crash(at=AT, target=WORKER, duration=0.5))
    leaving = tuple(
        msgspec.structs.replace(wish, manner=Manner(leaves="time", after=0.5)) if i % 4 == 3 else wish
        for i, wish in enumerate(plan.wishes)
    )
    plan = msgspec.structs.replace(plan, wishes=leaving)
    cluster = Cluster(plan, tmp_path, random.Random(1), bug)
    async with cluster.running():
        result = await Round(cluster, plan, seed=3).run()
    assert BUGS[bug][1] in {violation.promise for violation in result.violations}
