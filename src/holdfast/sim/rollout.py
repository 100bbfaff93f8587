"""A rolling restart of a simulated cluster: `local.rolling.Rolling` itself, over simulated slots.

Only two hops are replaced: the supervisor's slots are the cluster's processes, and what a frontend's ``/health`` would
say is read off its pool. Must never decide the order or when to go on: that is what is being tested.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, cast

from holdfast.local.rolling import RestartStopped, Role, Rolling, pid_in_use
from holdfast.sim.history import Routable

if TYPE_CHECKING:
    from holdfast.sim.cluster import SimCluster

PATIENCE = 30.0
"""Virtual seconds that each process may take to be in service."""
GRACE = 12.0
"""Virtual seconds that a process has to leave before it is killed."""
_LOOK = 0.02


class _Slot:
    """`local.supervisor.Slot`, as far as rolling restarts look at it."""

    state = "running"
    last_exit = ""

    def __init__(self, cluster: SimCluster, name: str):
        self._cluster, self._name = cluster, name

    @property
    def pid(self) -> int | None:
        """A number of its own for each start of the process, while it runs."""
        process = self._cluster.processes.get(self._name)
        return None if process is None else process.host.index


class _Supervisor:
    """`local.supervisor.Supervisor`, as far as rolling restarts use it."""

    stopping = False

    def __init__(self, cluster: SimCluster):
        self._cluster = cluster
        self.slots = {name: _Slot(cluster, name) for name in cluster.names}

    async def replace(self, name: str) -> bool:
        """Stop a process in order, kill it after its grace; the next one starts at once."""
        cluster = self._cluster
        process = cluster.processes.get(name)
        if process is None:
            return False
        cluster.terminate(name, 0.0)
        until = cluster.world.loop.time() + GRACE
        while cluster.processes.get(name) is process:
            if cluster.world.loop.time() >= until:
                cluster.kill(name, 0.0)
            await asyncio.sleep(_LOOK)
        return True


class SimRolling(Rolling):
    """A rolling restart that looks into frontends instead of asking them."""

    def __init__(self, cluster: SimCluster):
        names = {name: name for name in cluster.names if name.startswith("frontend")}
        super().__init__(cast("Any", _Supervisor(cluster)), lambda: names, PATIENCE)
        self._cluster = cluster

    async def _used_by(self, url: str) -> set[int]:
        frontend = self._cluster.frontend(url)
        if frontend is None or not frontend.listens or frontend.draining or frontend.host.frozen:
            return set()
        used = set()
        for worker in self._cluster.workers:
            seen = frontend.assembled.pool.worker(worker.worker.instance)
            if seen is not None and seen.record.epoch == worker.worker.epoch:
                used.add(pid_in_use({"state": seen.standing, "draining": seen.draining, "pid": worker.host.index}))
        return used - {0}


async def roll(cluster: SimCluster, role: Role) -> None:
    """Replace all processes of a role; writes down at every look how many workers each frontend could use."""
    history, loop = cluster.history, cluster.world.loop
    rolling = SimRolling(cluster)
    began = loop.time()
    restart = loop.create_task(rolling.restart(role), context=cluster.world.context)
    while not restart.done():
        for frontend in cluster.frontends:
            if frontend.in_service:
                workers = frontend.assembled.pool.all_workers()
                usable = sum(1 for worker in workers if worker.eligible or worker.standing == "stalled")
                history.routable.append(Routable(loop.time(), frontend.name, frontend.life.ready, usable))
        await asyncio.sleep(_LOOK)
    try:
        restart.result()
        history.see(f"rolled {role}")
    except RestartStopped as stopped:
        history.see(f"rolling stopped {role}")
        cluster.world.note("rolling restart stopped", why=stopped.message)
    history.rollouts.append((began, loop.time()))
