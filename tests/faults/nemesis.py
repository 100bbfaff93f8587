"""Injects the faults of a plan into real processes, each at its time and moment, and takes them back.

The counterpart of `sim.nemesis`, with `holdfast.chaos` for hands. What stands in for what a machine cannot do alone:
a power loss is a black hole before the worker and a stopped process, so that neither its peers nor discovery see it
die; a jump of the calendar clock happens inside the process; wrong counts come from the engine itself.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, cast

from holdfast.base.errors import HoldfastError
from holdfast.chaos.orders import order
from holdfast.chaos.proxy import Direction
from holdfast.chaos.stopping import frozen, send, slowed
from holdfast.local.rolling import RestartStopped, Role, Rolling
from holdfast.sim import faults as f
from holdfast.sim.cluster import instance_of
from holdfast.sim.faults import PATIENCE, AnyFault, Moment
from holdfast.sim.processes import PAUSE
from holdfast.sim.rollout import GRACE
from holdfast.sim.rollout import PATIENCE as ROLLING_PATIENCE
from holdfast.sim.workload import Wish, Workload
from tests.faults.cluster import Cluster, Process
from tests.patience import within

_HURRY = 0.2
_LOOK = 0.02

Act = Callable[[Any], Awaitable[Callable[[], Awaitable[None]] | bool]]
"""Strikes; returns what remains to be awaited until the fault is over, or whether there was anybody."""


class Nemesis:
    """See the module.

    Args:
        cluster: who suffers.
        workload: draws the requests of a burst.
        ask: sends a request now.
        load: requests in hand at a frontend.
    """

    def __init__(self, cluster: Cluster, workload: Workload, ask: Callable[[Wish], None], load: Callable[[str], int]):
        self._cluster, self._workload, self._ask, self._load = cluster, workload, ask, load
        self._ledger = cluster.ledger
        self._armed: dict[AnyFault, asyncio.Event] = {}
        self._prompts: set[asyncio.Task[None]] = set()
        self._ledger.on_moment, self._ledger.on_prompt = self._moment, self._prompt

    async def suffer(self, faults: tuple[AnyFault, ...]) -> None:
        """Let these happen, counted from now on; returns when all of them are over."""
        began = asyncio.get_running_loop().time()
        async with asyncio.TaskGroup() as tasks:
            for fault in faults:
                tasks.create_task(self._one(fault, began + fault.at), name=f"fault-{fault.kind}")
        if self._prompts:
            await asyncio.wait(self._prompts)

    async def _one(self, fault: AnyFault, at: float) -> None:
        loop = asyncio.get_running_loop()
        await asyncio.sleep(max(0.0, at - loop.time()))
        if fault.moment != "now":
            event = self._armed[fault] = asyncio.Event()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(event.wait(), PATIENCE)
            self._armed.pop(fault, None)
        live = self._live(fault.target)
        now = loop.time()
        act: Act = getattr(self, "_" + fault.kind.replace("-", "_"))
        after = await act(fault)
        if after is False:
            return
        self._ledger.fired(now, now + fault.duration, fault.kind, fault.target, live, getattr(fault, "peer", ""))
        if callable(after):
            await after()
        else:
            await asyncio.sleep(max(0.0, now + fault.duration - loop.time()))

    def _moment(self, name: str, moment: Moment) -> None:
        for fault, event in self._armed.items():
            if fault.moment == moment and name in (fault.target, getattr(fault, "peer", "")) and not event.is_set():
                self._ledger.history.see(f"moment {moment}")
                event.set()
                return

    def _prompt(self, name: str, what: str) -> None:
        """A prompt has killed or stopped its worker."""
        process = self._cluster.processes.get(name)
        if process is None:
            return
        now = asyncio.get_running_loop().time()
        seconds = PAUSE if what == "freeze" else 0.0
        self._ledger.history.see(f"prompt {what}")
        self._ledger.fired(now, now + seconds, what, name, self._live(name))
        if what == "freeze":
            task = asyncio.ensure_future(self._thaw(process, seconds))
            self._prompts.add(task)
        else:
            self._cluster.gone(process)

    def _live(self, target: str) -> int:
        if target in self._cluster.rpc_ports:
            return self._ledger.live(target)
        wanted = [target] if target in self._cluster.http_ports else self._cluster.frontends
        return sum(self._load(name) for name in wanted)

    # -- processes -------------------------------------------------------------------------------------

    async def _crash(self, fault: f.Crash) -> bool:
        return self._cluster.kill(fault.target, fault.duration)

    async def _terminate(self, fault: f.Terminate) -> Any:
        process = self._cluster.processes.get(fault.target)
        if not self._cluster.terminate(fault.target, fault.duration) or process is None:
            return False

        async def after() -> None:
            if fault.signals > 1:
                await asyncio.sleep(_HURRY)
                process.child.signal(signal.SIGTERM)
            await asyncio.sleep(fault.duration)

        return after

    async def _power_loss(self, fault: f.PowerLoss) -> Any:
        proxies, process = self._cluster.proxies, self._cluster.processes.get(fault.target)
        if process is None:
            return False
        own = proxies.get(fault.target)
        ways = [(own, peer) for peer in (*self._cluster.frontends, "")] if own is not None else []
        ways = ways or [(proxy, fault.target) for proxy in proxies.values()]
        for proxy, peer in ways:
            proxy.partition(peer)
        send(process.pid, signal.SIGSTOP)
        self._cluster.gone(process)

        async def after() -> None:
            await asyncio.sleep(fault.duration)
            for proxy, peer in ways:
                proxy.reset(peer)  # the new kernel knows none of the old connections
                proxy.heal(peer)
            self._cluster.kill(fault.target, 0.0)

        return after

    async def _hold(self, process: Process, seconds: float) -> None:
        process.stopped += 1
        try:
            await frozen(process.pid, seconds)
        finally:
            process.stopped -= 1
            if process.stopped:
                send(process.pid, signal.SIGSTOP)

    async def _thaw(self, process: Process, seconds: float) -> None:
        """Wake a process some time after it has stopped itself; it may take its time to do so, but only once."""
        process.stopped += 1
        try:
            await until_stopped(process.pid, within(2.0))
            await asyncio.sleep(seconds)
        finally:
            process.stopped -= 1
            if not process.stopped:
                send(process.pid, signal.SIGCONT)

    async def _freeze(self, fault: f.Freeze) -> Any:
        process = self._cluster.processes.get(fault.target)
        return process is not None and (lambda: self._hold(process, fault.duration))

    async def _slow(self, fault: f.Slow) -> Any:
        process = self._cluster.processes.get(fault.target)

        def alive() -> bool:
            return self._cluster.processes.get(fault.target) is process and not process.stopped

        return process is not None and (lambda: slowed(process.pid, fault.factor, fault.duration, alive))

    async def _out_of_memory(self, fault: f.OutOfMemory) -> bool:
        self._cluster.back_after(fault.target, fault.duration)
        return await self._order(fault.target, "die")

    async def _wall_jump(self, fault: f.WallJump) -> bool:
        return self._ledger.tell(fault.target, wall=fault.seconds)

    # -- network ---------------------------------------------------------------------------------------

    def _ends(self, fault: f.Partition | f.Reset | f.Delay) -> tuple[str, str, tuple[Direction, ...]]:
        """Return worker, frontend, and the direction in which nothing passes (from the target to its peer)."""
        if fault.target in self._cluster.proxies:
            return fault.target, fault.peer, ("out",)
        return fault.peer, fault.target, ("in",)

    async def _partition(self, fault: f.Partition) -> Any:
        worker, frontend, one = self._ends(fault)
        directions: tuple[Direction, ...] = one if fault.one_way else ("in", "out")
        proxy = self._cluster.proxies[worker]
        proxy.partition(frontend, directions)

        async def after() -> None:
            await asyncio.sleep(fault.duration)
            proxy.heal(frontend, directions)

        return after

    async def _reset(self, fault: f.Reset) -> bool:
        worker, frontend, _ = self._ends(fault)
        return self._cluster.proxies[worker].reset(frontend) > 0

    async def _delay(self, fault: f.Delay) -> Any:
        worker, frontend, _ = self._ends(fault)
        proxy = self._cluster.proxies[worker]
        proxy.delay(frontend, fault.seconds)

        async def after() -> None:
            await asyncio.sleep(fault.duration)
            proxy.delay(frontend, 0.0)

        return after

    # -- discovery -------------------------------------------------------------------------------------

    async def _discovery_outage(self, fault: f.DiscoveryOutage) -> Any:
        async def after() -> None:
            async with asyncio.TaskGroup() as tasks:
                for view in self._cluster.views.values():
                    tasks.create_task(view.outage(fault.duration))

        return after

    async def _discovery_stale(self, fault: f.DiscoveryStale) -> Any:
        return lambda: self._cluster.views[fault.target].stale(fault.duration)

    async def _discovery_partial(self, fault: f.DiscoveryPartial) -> Any:
        hidden = {str(instance_of(name)) for name in fault.hidden}
        return lambda: self._cluster.views[fault.target].partial(hidden, fault.duration)

    # -- engines ---------------------------------------------------------------------------------------

    async def _order(self, target: str, do: str, **how: float) -> bool:
        process = self._cluster.processes.get(target)
        if process is None or not process.life.ready or process.stopped:
            return False
        secret = self._cluster.plan.secret.encode()
        address = f"127.0.0.1:{self._cluster.rpc_ports[target]}"
        try:
            await order(address, {"do": do, **how}, rng=self._cluster.rng, secret=secret, timeout=within(0.5))
        except (HoldfastError, TimeoutError):
            return do == "die"  # an engine that dies takes its answer with it
        return True

    async def _engine_error(self, fault: f.EngineError) -> bool:
        return await self._order(fault.target, "error", times=fault.times)

    async def _engine_abort(self, fault: f.EngineAbort) -> bool:
        return await self._order(fault.target, "abort", times=fault.times)

    async def _engine_refuse(self, fault: f.EngineRefuse) -> bool:
        return await self._order(fault.target, "refuse", times=fault.times)

    async def _engine_hang(self, fault: f.EngineHang) -> bool:
        return await self._order(fault.target, "hang", seconds=fault.duration)

    async def _engine_slow(self, fault: f.EngineSlow) -> Any:
        if not await self._order(fault.target, "slow", factor=fault.factor):
            return False

        async def after() -> None:
            await asyncio.sleep(fault.duration)
            await self._order(fault.target, "slow", factor=1.0)

        return after

    async def _engine_compile(self, fault: f.EngineCompile) -> bool:
        return await self._order(fault.target, "compile", seconds=fault.duration)

    async def _engine_miscount(self, fault: f.EngineMiscount) -> bool:
        return self._ledger.tell(fault.target, shift=float(fault.shift), times=float(fault.times))

    async def _kv_lost(self, fault: f.KvLost) -> bool:
        return self._mangle(fault, lose=float(fault.times))

    async def _kv_repeated(self, fault: f.KvRepeated) -> bool:
        return self._mangle(fault, repeat=float(fault.times))

    async def _kv_reordered(self, fault: f.KvReordered) -> bool:
        return self._mangle(fault, reorder=float(fault.times))

    def _mangle(self, fault: f.KvLost | f.KvRepeated | f.KvReordered, **how: float) -> bool:
        events = self._cluster.plan.kv_events
        return events and self._ledger.tell(fault.target, engine=float(fault.where == "engine"), **how)

    # -- load, and people ------------------------------------------------------------------------------

    async def _overload(self, fault: f.Overload) -> bool:
        for _ in range(fault.times):
            self._ask(self._workload.draw(0.0))
        return True

    async def _killer_prompt(self, fault: f.KillerPrompt) -> bool:
        del fault
        self._ask(self._workload.killer())
        return True

    async def _rolling_restart(self, fault: f.RollingRestart) -> Any:
        cluster = self._cluster
        if cluster.rolling:
            return False  # a supervisor does one after the other
        role: Role = "frontend" if fault.target == "frontend" else "worker"
        return lambda: self._roll(role)

    async def _roll(self, role: Role) -> None:
        cluster, history, loop = self._cluster, self._ledger.history, asyncio.get_running_loop()
        urls = {name: cluster.url(name) for name in cluster.frontends}
        rolling = Rolling(cast("Any", _Supervisor(cluster)), lambda: urls, within(ROLLING_PATIENCE / 2))
        cluster.rolling, began = True, loop.time()
        try:
            await rolling.restart(role)
            history.see(f"rolled {role}")
        except RestartStopped:
            history.see(f"rolling stopped {role}")
        finally:
            cluster.rolling = False
            history.rollouts.append((began, loop.time()))


async def until_stopped(pid: int, bound: float) -> None:
    """Wait until a process is stopped, or gone, for so many seconds at most."""
    with contextlib.suppress(TimeoutError, OSError):
        async with asyncio.timeout(bound):
            while Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "T":  # noqa: ASYNC110, ASYNC240
                await asyncio.sleep(0.01)


class _Slot:
    """`local.supervisor.Slot`, as far as rolling restarts look at it."""

    state, last_exit = "running", ""

    def __init__(self, cluster: Cluster, name: str):
        self._cluster, self._name = cluster, name

    @property
    def pid(self) -> int | None:
        process = self._cluster.processes.get(self._name)
        return None if process is None else process.pid


class _Supervisor:
    """`local.supervisor.Supervisor`, as far as rolling restarts use it."""

    stopping = False

    def __init__(self, cluster: Cluster):
        self._cluster = cluster
        self.slots = {name: _Slot(cluster, name) for name in cluster.names}

    async def replace(self, name: str) -> bool:
        cluster, loop = self._cluster, asyncio.get_running_loop()
        process = cluster.processes.get(name)
        if process is None:
            return False
        cluster.terminate(name, 0.0)
        until = loop.time() + within(GRACE)
        while cluster.processes.get(name) is process:
            if loop.time() >= until:
                cluster.kill(name, 0.0)
            await asyncio.sleep(_LOOK)
        return True
