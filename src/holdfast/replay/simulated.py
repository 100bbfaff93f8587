"""A cluster on the virtual clock with the settings of a real one: production frontends and workers, mock engines.

What a machine would bring is the simulation's (network, discovery, clocks, chance); ports, files and the status server
do not exist there, and settings about them have no effect. Must never decide about load or faults.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Coroutine, Iterator
from typing import Any, TypeVar

import msgspec

from holdfast.base.errors import InternalError
from holdfast.engines.contract import GenerateRequest, Sampling, StopRules
from holdfast.engines.mock.config import MockConfig
from holdfast.frontend.config import FrontendConfig
from holdfast.health.config import SystemConfig
from holdfast.runtime.tls import WireTls
from holdfast.sim.cluster import RPC_PORT, SimCluster
from holdfast.sim.history import History, Sequence
from holdfast.sim.plan import Plan, Shape, instance_of
from holdfast.sim.tape import Tape
from holdfast.sim.universe import logs
from holdfast.sim.workload import MODEL
from holdfast.sim.world import World
from holdfast.telemetry.spans import TraceSettings
from holdfast.worker.config import WorkerConfig

T = TypeVar("T")

MAX_CALLBACKS = 1 << 40
"""No budget: a replay is as long as its trace. One that spins is found by the limit for one instant."""
LIMIT_S = 1e7
"""Virtual seconds that a run may take: a hundred days."""
START_S = 600.0
"""Virtual seconds in which all workers must be in use; loading takes what the settings say."""
_POLL = 0.05
_NO_PROMPT = GenerateRequest("", MODEL, b"", Sampling(), StopRules(max_tokens=1))


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """What a simulated cluster is made of."""

    workers: int = 8
    frontends: int = 1
    frontend: FrontendConfig = FrontendConfig()
    worker: WorkerConfig = WorkerConfig(engine="mock")
    engine: MockConfig = MockConfig()


class _Sequences(list[Sequence]):
    """Forgets the prompts as they are written down: they are most of the memory, and nobody asks for them."""

    def append(self, sequence: Sequence) -> None:
        sequence.request = _NO_PROMPT
        super().append(sequence)


class ReplayCluster(SimCluster):
    """A `SimCluster` with the settings of a real one."""

    def __init__(self, world: World, settings: Settings):
        shape = Shape(workers=settings.workers, frontends=settings.frontends)
        super().__init__(world, Plan(shape, "mixed", (), ()), History(sequences=_Sequences()))
        self.settings = settings

    def worker_config(self, name: str, address: str) -> WorkerConfig:
        """Return a worker's settings."""
        return msgspec.structs.replace(
            self.settings.worker,
            engine="mock",
            served_model_name="",
            instance_id=instance_of(name),
            rpc_host=address,
            rpc_port=RPC_PORT,
            advertise="",
            insecure=not self.settings.worker.secret,
            secret=self.settings.worker.secret,
            tls=WireTls(),
            system=SystemConfig(),
            traces=TraceSettings(),
        )

    def engine_config(self) -> MockConfig:
        """Return an engine's size and speed."""
        engine = self.settings.engine
        wanted = engine.kv_events and self.settings.frontend.router_mode.startswith("kv")  # they cost, and are for it
        return msgspec.structs.replace(engine, model_name=MODEL, kv_events=wanted)

    def frontend_config(self) -> FrontendConfig:
        """Return a frontend's settings."""
        return msgspec.structs.replace(
            self.settings.frontend,
            namespace=self.settings.worker.namespace,
            secret=self.settings.worker.secret,
            tls=WireTls(),
            system=SystemConfig(),
            api_keys_file="",
            traces=TraceSettings(),
        )

    async def until_in_use(self) -> None:
        """Wait until every frontend would send work to every worker. Raises InternalError."""
        loop = asyncio.get_running_loop()
        until = loop.time() + START_S
        while not self._all_in_use():  # about many objects that have no events
            if loop.time() >= until:
                raise InternalError(f"The simulated cluster was not ready within {START_S:g} virtual seconds.")
            await asyncio.sleep(_POLL)

    def _all_in_use(self) -> bool:
        return self.complete and all(len(usable(self, name)) == self.plan.shape.workers for name in self._fronts)

    @property
    def _fronts(self) -> list[str]:
        return [frontend.name for frontend in self.frontends]


def usable(cluster: SimCluster, frontend: str) -> list[str]:
    """Return the names of the workers to which this frontend would send new work."""
    process = cluster.frontend(frontend)
    if process is None or len(process.assembled.registry.served()) != 1:
        return []
    workers = process.assembled.pool.all_workers()
    return [cluster.name_of(w.instance) for w in workers if w.eligible and not w.inhibited]


@contextlib.contextmanager
def new_world(seed: int) -> Iterator[World]:
    """Make an empty world and drop it at the end, with production's log lines kept away."""
    with logs(False), World(Tape(seed), max_callbacks=MAX_CALLBACKS) as world:
        yield world


def run_world(world: World, main: Coroutine[Any, Any, T], name: str) -> T:
    """Run a coroutine of the harness to its end in this world.

    Raises:
        InternalError: the world came to rest before the coroutine was over.
    """
    task = world.spawn(main, name)
    world.run(task.done, LIMIT_S)
    if not task.done():
        raise InternalError(f"The simulation came to rest at virtual second {world.now():.1f} with work left.")
    return task.result()
