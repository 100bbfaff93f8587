"""What only root can do to a worker: cut its cable, so that not even a SYN is answered, and take its memory away."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from holdfast.chaos.memory import CannotLimit, MemoryLimit
from holdfast.chaos.namespaces import CannotSeparate, Namespace
from holdfast.chaos.proxy import Direction
from holdfast.sim import faults as f
from holdfast.sim.plan import Plan
from tests.faults.cluster import Cluster
from tests.faults.rounds import Result, Round
from tests.faults.test_calibration import AT, figures, plan_of
from tests.patience import within

pytestmark = [pytest.mark.faults, pytest.mark.timeout(300)]

VICTIM = "worker-0"


class _Cable:
    """Stands where the proxy of the worker stands otherwise."""

    def __init__(self, namespace: Namespace):
        self._namespace = namespace
        self.work: set[asyncio.Task[None]] = set()

    def partition(self, peer: str, directions: tuple[Direction, ...] = ("in", "out")) -> None:
        self.work.add(asyncio.ensure_future(self._namespace.cut(directions)))

    def heal(self, peer: str, directions: tuple[Direction, ...] = ("in", "out")) -> None:
        self.work.add(asyncio.ensure_future(self._namespace.mend(directions)))

    async def listen(self) -> None:
        pass

    def deafen(self) -> None:
        pass

    async def close(self) -> None:
        if self.work:
            await asyncio.wait(self.work)


class SeparateCluster(Cluster):
    """A cluster whose first worker lives in a network of its own."""

    def __init__(self, plan: Plan, root: Path, rng: random.Random, namespace: Namespace):
        super().__init__(plan, root, rng)
        self.namespace = namespace

    async def _front(self, name: str) -> None:
        if name != VICTIM:
            await super()._front(name)
            return
        self.proxies[name] = _Cable(self.namespace)  # type: ignore[assignment]
        self._published[name] = f"{self.namespace.inside}:{self.rpc_ports[name]}"

    def _argv(self, name: str) -> tuple[str, ...]:
        argv = super()._argv(name)
        if name != VICTIM:
            return argv
        return (*self.namespace.prefix, *argv, "--tcp-rpc-host", self.namespace.inside)

    async def _held(self, name: str) -> dict[str, float]:
        return {} if name == VICTIM else await super()._held(name)  # its status server is on its own loopback


@contextlib.asynccontextmanager
async def namespace() -> AsyncIterator[Namespace]:
    made = Namespace(random.SystemRandom())
    try:
        await made.start()
    except CannotSeparate as error:
        pytest.skip(f"network namespaces are not permitted here: {error.message}")
    try:
        yield made
    finally:
        await made.close()


async def answered(host: str, port: int, seconds: float) -> bool:
    """Whether anybody answers a SYN within so long, be it with a refusal."""
    try:
        _, writer = await asyncio.wait_for(asyncio.open_connection(host, port), seconds)
    except TimeoutError:
        return False
    except OSError:
        return True
    writer.close()
    return True


async def test_a_cable_that_is_cut() -> None:
    """Both ways and either way: nothing is answered; mended, all is well."""
    async with namespace() as cable:
        assert await answered(cable.inside, 9, within(2.0))
        for directions in (("in", "out"), ("in",), ("out",)):
            await cable.cut(directions)  # type: ignore[arg-type]
            assert not await answered(cable.inside, 9, 0.5)
            await cable.mend(directions)  # type: ignore[arg-type]
            assert await answered(cable.inside, 9, within(4.0))


@pytest.mark.parametrize("one_way", [False, True], ids=["both ways", "one way"])
async def test_a_worker_whose_cable_is_cut(tmp_path: Path, one_way: bool) -> None:
    """Its streams go on elsewhere, as in the simulation; reconnecting meets silence; when it is mended it serves."""
    fault = f.Partition(at=AT, target=VICTIM, peer="frontend-0", duration=5.0, one_way=one_way)
    plan = plan_of(fault)
    shape = msgspec.structs.replace(plan.shape, frontends=1)
    wishes = tuple(msgspec.structs.replace(wish, frontend=0) for wish in plan.wishes)
    plan = msgspec.structs.replace(plan, shape=shape, wishes=wishes, secret="off loopback")
    async with namespace() as cable:
        cluster = SeparateCluster(plan, tmp_path, random.Random(1), cable)
        async with cluster.running():
            result = await Round(cluster, plan, seed=3).run()
    _check(result, "peer_silent")


def _check(result: Result, code: str) -> None:
    seen = figures(result.history)
    print(f"\nreal: {seen}")
    assert result.violations == []
    assert set(seen.codes) == {code}
    assert set(seen.states) == {"done"}
    assert seen.moved >= 2
    assert seen.gap < within(3.0)


async def test_a_worker_that_runs_out_of_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel kills it in the middle of its streams; they go on elsewhere."""
    plan = plan_of(f.OutOfMemory(at=AT, target=VICTIM, duration=0.5))
    try:
        limit = MemoryLimit(f"holdfast-{random.SystemRandom().getrandbits(32):08x}")
    except CannotLimit as error:
        pytest.skip(f"memory cannot be limited here: {error.message}")
    cluster = Cluster(plan, tmp_path, random.Random(1))
    async with cluster.running():
        course = Round(cluster, plan, seed=3)

        async def starve(fault: f.OutOfMemory) -> Any:
            process = cluster.processes[VICTIM]
            limit.hold(process.pid, 16 << 20)
            cluster.back_after(VICTIM, fault.duration)
            return cluster.ledger.tell(VICTIM, hoard=256.0)

        monkeypatch.setattr(course.nemesis, "_out_of_memory", starve)
        result = await course.run()
        first = next(life for life in result.history.lives if life.name == VICTIM)
        assert (first.how, first.code) == ("crashed", -9)
    limit.close()
    _check(result, "disconnected")
