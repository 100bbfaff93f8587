"""One frontend or worker process of a simulated cluster: production code on a host, from start to end.

Must never know about faults: it can be killed, asked to leave, and looked at.
"""

from __future__ import annotations

import abc
import asyncio
import signal
from collections.abc import Coroutine
from typing import TYPE_CHECKING, Any, Literal

from holdfast.base.errors import HoldfastError
from holdfast.frontend.assembly import Assembled
from holdfast.frontend.drain import Drain
from holdfast.sim.caches import CacheFaults
from holdfast.sim.clients import Connected
from holdfast.sim.disagg import SimExchange
from holdfast.sim.engine import SimEngine
from holdfast.sim.history import Fired, Life, Residue
from holdfast.sim.texts import read_text
from holdfast.sim.versions import age_frontend, age_worker
from holdfast.sim.watching import Watching, replace
from holdfast.sim.workload import MODEL
from holdfast.wire.frames import OLDEST_VERSION
from holdfast.worker.process import WorkerProcess

if TYPE_CHECKING:
    from holdfast.sim.cluster import SimCluster

Role = Literal["frontend", "worker"]
PAUSE = 2.0
"""Seconds for which a prompt that freezes its worker does so."""
LAST_ANSWERS = 1.0
"""Seconds that a server gives its last answers once it has been told to end (`make_server`)."""


class SimProcess(abc.ABC):
    """One incarnation.

    Args:
        cluster: it is part of.
        name: of its slot.
        incarnation: 1 for the first start.
    """

    role: Role

    def __init__(self, cluster: SimCluster, name: str, incarnation: int):
        self.cluster, self.name = cluster, name
        self.world = cluster.world
        self.host = cluster.world.boot(name)
        version = cluster.version(name)
        self.life = Life(name, self.role, incarnation, started=self.world.loop.time(), version=version)
        if version == OLDEST_VERSION:
            cluster.history.see(f"old {self.role}")
        cluster.history.lives.append(self.life)
        self._frozen_until = 0.0

    @abc.abstractmethod
    def start(self) -> None:
        """Begin."""

    @abc.abstractmethod
    def terminate(self) -> None:
        """SIGTERM."""

    @abc.abstractmethod
    def residue(self) -> Residue:
        """Return what it holds."""

    @property
    @abc.abstractmethod
    def live(self) -> int:
        """Streams or requests of users that live on it."""

    @property
    def in_service(self) -> bool:
        """Whether it works and is not about to end."""
        return bool(self.life.ready) and not self.life.draining and not self.life.how and not self.host.frozen

    def freeze(self, seconds: float) -> None:
        """SIGSTOP, and SIGCONT after so long; freezes that overlap end with the last one."""
        loop = self.world.loop
        self._frozen_until = max(self._frozen_until, loop.time() + seconds)
        self.host.freeze()
        loop.call_at(self._frozen_until, self._thaw, context=self.world.context)

    def _thaw(self) -> None:
        if self.world.loop.time() >= self._frozen_until:
            self.host.thaw()

    def kill(self, *, silent: bool = False) -> None:
        """SIGKILL; with ``silent`` the machine loses its power."""
        if self.life.how:
            return
        self._over("crashed", -9)
        self.host.crash(silent=silent)
        self.cluster.ended(self)

    async def _live(self, main: Coroutine[Any, Any, int]) -> None:
        """Run the process's main; runs on its host."""
        try:
            code = await main
        except HoldfastError as error:
            self.world.note("process failed", name=self.name, code=error.code, message=error.message)
            self._over("failed", 1)
        except Exception as error:
            if not self.world.loop.is_running():
                return  # the universe is over, and this coroutine is being dropped
            self.cluster.history.violate(
                "crash", "a process ended with an exception", name=self.name, error=repr(error)
            )
            self._over("failed", 1)
        else:
            self._over("exited", code)
        # the process is gone with its last line; what it might have forgotten goes with it
        self.world.loop.call_soon(self._gone, context=self.world.context)

    def _gone(self) -> None:
        self.host.crash()
        self.cluster.ended(self)

    def _over(self, how: Literal["exited", "crashed", "failed"], code: int) -> None:
        if not self.life.how:
            self.life.how, self.life.code, self.life.ended = how, code, self.world.loop.time()


class WorkerHost(SimProcess):
    """A worker."""

    role = "worker"

    def start(self) -> None:
        """Begin."""
        self.host.call(self._build)
        self.host.spawn(self._live(self.worker.run()), "main")

    def _build(self) -> None:
        cluster, world = self.cluster, self.world
        name = self.name
        self.engine = SimEngine(
            cluster.engine_config(),
            cluster.history,
            self.life,
            labels=cluster.labels,
            moment=lambda moment: cluster.on_moment(name, moment),
            kill=self._killed,
            pause=self._paused,
        )
        config = cluster.worker_config(name, self.host.address)
        self.engine.role = config.role
        replace(self.engine, "make_exchange", lambda: SimExchange(cluster.meetings, self.host))
        self.worker = WorkerProcess(
            config,
            self.engine,
            world.discovery.client(self.host),
            self.host.rng("worker"),
            transport=world.network.transport(self.host),
            on_ready=self._ready,
        )
        if self.life.version == OLDEST_VERSION:
            age_worker(self.worker.server)
        self.caches = CacheFaults(self.worker)
        inner = self.worker.server.drain

        def drain(reason: str, remaining_ms: int) -> None:
            self.life.draining = self.life.draining or world.loop.time()
            inner(reason, remaining_ms)

        replace(self.worker.server, "drain", drain)

    def _killed(self) -> None:
        self._note_fault("crash", 0.0)
        self.cluster.kill(self.name)

    def _paused(self) -> None:
        self._note_fault("freeze", PAUSE)
        self.freeze(PAUSE)

    def _note_fault(self, kind: str, seconds: float) -> None:
        """A prompt did it."""
        now = self.world.loop.time()
        self.cluster.history.see(f"prompt {kind}")
        self.cluster.history.fired.append(Fired(now, now + seconds, kind, self.name, self.live))

    def _ready(self) -> None:
        self.life.ready = self.world.loop.time()

    def terminate(self) -> None:
        """SIGTERM."""
        self.host.post(self.worker.stop)

    @property
    def live(self) -> int:
        """Users' sequences in its engine."""
        return sum(1 for sequence in self.engine.open.values() if sequence.label)

    def residue(self) -> Residue:
        """Return what it holds."""
        host = self.worker.host
        load = self.engine.load()
        canaries = len(self.engine.open) - self.live
        return Residue(
            self.name,
            host.leases.sums(),
            {"kv blocks held": float(load.kv_used_blocks if not load.running else 0)},
            host.in_flight,
            max(0, load.running + load.waiting - canaries),
            max(0, self.worker.server.open_streams - canaries),
        )


class FrontendProcess(SimProcess):
    """A frontend without HTTP; clients call its application (`clients.Exchange`)."""

    role = "frontend"

    def __init__(self, cluster: SimCluster, name: str, incarnation: int):
        super().__init__(cluster, name, incarnation)
        self.exchanges: dict[Connected, None] = {}
        self.listens = False
        self.force_exit = False

    def start(self) -> None:
        """Begin."""
        self.host.call(self._build)
        self.host.spawn(self._live(self._main()), "main")

    def _build(self) -> None:
        cluster, world = self.cluster, self.world
        self._closing = asyncio.Event()
        self._discovery = world.discovery.client(self.host)
        config = cluster.frontend_config()
        self.assembled = Assembled(
            config,
            discovery=self._discovery,
            transport=world.network.transport(self.host),
            rng=self.host.rng("frontend"),
            store=cluster.store(),
            wall=self.host.wall,
            clock=world.loop.nanoseconds,
            read_text=read_text,
        )
        if self.life.version == OLDEST_VERSION:
            age_frontend(self.assembled.pool)
        services = self.assembled.services
        self.watching = Watching(
            self.name,
            cluster.history,
            services.observer,
            labels=cluster.labels,
            dispatched=lambda instance: cluster.on_moment(cluster.name_of(instance), "dispatch"),
            inhibition=self.assembled.pool.settings.inhibition,
            now=world.loop.time,
        )
        services.observer = self.watching
        self.assembled.pool.subscribe(self.watching.pool_event)
        self.app = self.assembled.app
        self._drain = Drain(self.app, self, config)

    async def _main(self) -> int:
        assembled = self.assembled
        await self._discovery.start()
        try:
            await assembled.start()
            async with asyncio.TaskGroup() as group:
                running = group.create_task(assembled.run())
                obeying = group.create_task(self._drain.obey())
                self.listens = True
                self.life.ready = self.world.loop.time()
                await self._closing.wait()
                await self._last_answers()
                self.listens = False
                running.cancel()
                obeying.cancel()
        finally:
            await assembled.close()
            await self._discovery.close()
        return 3 if self.app.cut else 0

    async def _last_answers(self) -> None:
        """Wait for answers that are nearly written, as the server does; the rest is cut."""
        until = self.world.loop.time() + LAST_ANSWERS
        while self.exchanges and self.world.loop.time() < until:  # noqa: ASYNC110  once per exit, a poll will do
            await asyncio.sleep(0.01)
        for exchange in list(self.exchanges):
            exchange.cut()

    def kill(self, *, silent: bool = False) -> None:
        """SIGKILL: its clients' connections break."""
        self.listens = False
        super().kill(silent=silent)
        for exchange in list(self.exchanges):
            exchange.cut()

    def terminate(self) -> None:
        """SIGTERM."""
        self.life.draining = self.life.draining or self.world.loop.time()
        self.host.post(self._drain.caught, int(signal.SIGTERM))

    @property
    def live(self) -> int:
        """Requests in hand."""
        return self.app.generate.in_hand

    def residue(self) -> Residue:
        """Return what it holds."""
        services, metrics = self.assembled.services, self.assembled.metrics
        gauges = {
            "inflight": metrics.of(MODEL).inflight.value,
            "disconnected": metrics.disconnected.value,
            "preprocessing": float(metrics.preprocessing),
            "claims": float(services.admission.ledger.held()),
            "queue": float(services.placement.line.waiting(MODEL)),
            "active": float(len(self.app.generate.active)),
        }
        links = sum(worker.in_flight for worker in self.assembled.pool.all_workers())
        return Residue(self.name, services.leases.sums(), gauges, self.live, streams=links)

    # -- `drain.Listening` and `clients.Serving` -------------------------------------------------------

    @property
    def draining(self) -> bool:
        """Whether a connection that comes now is a late one."""
        return self.app.draining

    @property
    def connections(self) -> int:
        """Connections of clients."""
        return len(self.exchanges)

    @property
    def should_exit(self) -> bool:
        """Whether it was told to end."""
        return self._closing.is_set()

    @should_exit.setter
    def should_exit(self, value: bool) -> None:
        if value:
            self._closing.set()

    async def retire(self) -> None:
        """Every client has a connection of its own here: nothing to do."""

    def close_idle(self) -> None:
        """There are no idle connections."""
