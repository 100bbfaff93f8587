"""Injects the faults of a plan into a simulated cluster, each at its time and moment, and takes them back.

A fault whose moment does not come within `faults.PATIENCE` strikes all the same. What was hit is written down: how
many streams of users lived on the target. Must never draw anything: the plan has it all.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from holdfast.local.rolling import Role
from holdfast.sim import faults as f
from holdfast.sim.caches import Mangling
from holdfast.sim.cluster import SimCluster
from holdfast.sim.faults import PATIENCE, AnyFault, Moment
from holdfast.sim.history import Fired
from holdfast.sim.loop import START
from holdfast.sim.rollout import roll
from holdfast.sim.workload import Workload

_HURRY = 0.2
"""Seconds between two signals."""


class Nemesis:
    """See the module.

    Args:
        cluster: who suffers.
        workload: draws the requests of a burst.
    """

    def __init__(self, cluster: SimCluster, workload: Workload):
        self._cluster, self._workload = cluster, workload
        self._world = cluster.world
        self._loop = cluster.world.loop
        self._armed: list[AnyFault] = []
        """Those that wait for their moment."""
        self._pending = 0
        """Faults that have not struck, or are not over."""
        cluster.on_moment = self._moment

    def start(self, faults: tuple[AnyFault, ...]) -> None:
        """Let these happen, counted from now on."""
        for fault in faults:
            self._pending += 1
            self._later(fault.at, self._arm, fault)

    @property
    def done(self) -> bool:
        """Whether all faults are over."""
        return self._pending == 0

    def _later(self, seconds: float, callback: Callable[..., Any], *args: Any) -> None:
        self._loop.call_later(seconds, callback, *args, context=self._world.context)

    def _arm(self, fault: AnyFault) -> None:
        if fault.moment == "now":
            self._strike(fault)
            return
        self._armed.append(fault)
        self._later(PATIENCE, self._impatient, fault)

    def _impatient(self, fault: AnyFault) -> None:
        if fault in self._armed:
            self._armed.remove(fault)
            self._strike(fault)

    def _moment(self, name: str, moment: Moment) -> None:
        """A stream on that worker is at that point; called in the middle of production code."""
        for fault in self._armed:
            if fault.moment == moment and name in (fault.target, getattr(fault, "peer", "")):
                self._armed.remove(fault)
                self._cluster.history.see(f"moment {moment}")
                self._loop.call_soon(self._strike, fault, context=self._world.context)
                return

    def _strike(self, fault: AnyFault) -> None:
        now = self._loop.time()
        live = self._live(fault)
        act: Callable[[Any], bool] = getattr(self, "_" + fault.kind.replace("-", "_"))
        if not act(fault):
            self._pending -= 1  # nobody is there to be hurt
            return
        history = self._cluster.history
        history.see(f"fault {fault.kind}")
        if live:
            history.see(f"hit {fault.kind}")
        peer = getattr(fault, "peer", "")
        history.fired.append(Fired(now, now + fault.duration, fault.kind, fault.target, live, peer))
        self._world.note("fault", kind=fault.kind, target=fault.target, peer=peer, live=live)
        self._later(fault.duration, self._over)

    def _over(self) -> None:
        self._pending -= 1

    def _live(self, fault: AnyFault) -> int:
        process = self._cluster.processes.get(fault.target)
        if process is not None:
            return process.live
        return sum(frontend.live for frontend in self._cluster.frontends)

    # -- what each of them does; False: there was nobody -----------------------------------------------

    def _crash(self, fault: f.Crash) -> bool:
        return self._cluster.kill(fault.target, fault.duration)

    def _power_loss(self, fault: f.PowerLoss) -> bool:
        return self._cluster.kill(fault.target, fault.duration, silent=True)

    def _terminate(self, fault: f.Terminate) -> bool:
        process = self._cluster.processes.get(fault.target)
        if process is not None and fault.signals > 1:
            self._later(_HURRY, process.terminate)
        return self._cluster.terminate(fault.target, fault.duration)

    def _freeze(self, fault: f.Freeze) -> bool:
        process = self._cluster.processes.get(fault.target)
        if process is None:
            return False
        process.freeze(fault.duration)
        return True

    def _slow(self, fault: f.Slow) -> bool:
        process = self._cluster.processes.get(fault.target)
        if process is None:
            return False
        process.host.slow(fault.factor)
        self._later(fault.duration, process.host.slow, 1.0)
        return True

    def _partition(self, fault: f.Partition) -> bool:
        network = self._world.network
        network.partition(fault.target, fault.peer, fault.one_way)
        self._later(fault.duration, network.heal, fault.target, fault.peer, fault.one_way)
        return True

    def _reset(self, fault: f.Reset) -> bool:
        return self._world.network.reset(fault.target, fault.peer) > 0

    def _delay(self, fault: f.Delay) -> bool:
        network = self._world.network
        network.delay(fault.target, fault.peer, fault.seconds)
        self._later(fault.duration, network.delay, fault.target, fault.peer, 0.0)
        return True

    def _discovery_outage(self, fault: f.DiscoveryOutage) -> bool:
        self._world.discovery.outage(fault.duration)
        return True

    def _discovery_stale(self, fault: f.DiscoveryStale) -> bool:
        process = self._cluster.processes.get(fault.target)
        if process is None:
            return False
        self._world.discovery.stale(process.host, fault.duration)
        return True

    def _discovery_partial(self, fault: f.DiscoveryPartial) -> bool:
        process = self._cluster.processes.get(fault.target)
        if process is None:
            return False
        hidden = {self._cluster.instance_of(name) for name in fault.hidden}
        self._world.discovery.partial(process.host, hidden, fault.duration)
        return True

    def _order(self, target: str, do: str, **how: float) -> bool:
        worker = self._cluster.worker(target)
        if worker is None or not worker.life.ready:
            return False
        worker.host.post(worker.engine.control, {"do": do, **how})
        return True

    def _engine_error(self, fault: f.EngineError) -> bool:
        return self._order(fault.target, "error", times=fault.times)

    def _engine_abort(self, fault: f.EngineAbort) -> bool:
        return self._order(fault.target, "abort", times=fault.times)

    def _engine_refuse(self, fault: f.EngineRefuse) -> bool:
        return self._order(fault.target, "refuse", times=fault.times)

    def _engine_hang(self, fault: f.EngineHang) -> bool:
        return self._order(fault.target, "hang", seconds=fault.duration)

    def _engine_slow(self, fault: f.EngineSlow) -> bool:
        struck = self._order(fault.target, "slow", factor=fault.factor)
        self._later(fault.duration, self._order, fault.target, "slow")
        return struck

    def _engine_compile(self, fault: f.EngineCompile) -> bool:
        return self._order(fault.target, "compile", seconds=fault.duration)

    def _engine_miscount(self, fault: f.EngineMiscount) -> bool:
        worker = self._cluster.worker(fault.target)
        if worker is None:
            return False
        worker.host.post(worker.engine.miscount, fault.shift, fault.times)
        return True

    def _kv_lost(self, fault: f.KvLost) -> bool:
        return self._mangle(fault, "lose")

    def _kv_repeated(self, fault: f.KvRepeated) -> bool:
        return self._mangle(fault, "repeat")

    def _kv_reordered(self, fault: f.KvReordered) -> bool:
        return self._mangle(fault, "reorder")

    def _mangle(self, fault: f.KvLost | f.KvRepeated | f.KvReordered, how: Mangling) -> bool:
        worker = self._cluster.worker(fault.target)
        if worker is None or not self._cluster.plan.kv_events:
            return False
        (worker.caches.engine if fault.where == "engine" else worker.caches.wire).order(how, fault.times)
        return True

    def _out_of_memory(self, fault: f.OutOfMemory) -> bool:
        self._cluster.back_after(fault.target, fault.duration)
        return self._order(fault.target, "die")

    def _wall_jump(self, fault: f.WallJump) -> bool:
        process = self._cluster.processes.get(fault.target)
        if process is None:
            return False
        process.host.wall_offset += fault.seconds
        return True

    def _rolling_restart(self, fault: f.RollingRestart) -> bool:
        cluster = self._cluster
        if cluster.rolling:
            return False  # a supervisor does one after the other
        cluster.rolling = True
        self._pending += 1
        self._world.spawn(self._roll("frontend" if fault.target == "frontend" else "worker"), "rolling restart")
        return True

    async def _roll(self, role: Role) -> None:
        try:
            await roll(self._cluster, role)
        finally:
            self._cluster.rolling = False
            self._pending -= 1

    def _killer_prompt(self, fault: f.KillerPrompt) -> bool:
        del fault
        self._cluster.ask(self._workload.killer(), self._loop.time())
        return True

    def _overload(self, fault: f.Overload) -> bool:
        now = self._loop.time()
        for _ in range(fault.times):
            self._cluster.ask(self._workload.draw(now - START), now)
        return True
