"""A simulated cluster: production frontends and workers, each on a host of its own, and a supervisor for all.

Must never decide what goes wrong (`plan`, `nemesis`) or whether all is well (`oracles`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable

from holdfast.base.ids import InstanceId
from holdfast.engines.mock.config import MockConfig
from holdfast.frontend.config import FrontendConfig
from holdfast.health.config import CanaryConfig
from holdfast.models.store import ArtifactStore
from holdfast.requests.config import DisaggSettings, RequestSettings
from holdfast.routing.config import AdmissionSettings
from holdfast.routing.knowledge_config import KnowledgeSettings
from holdfast.runtime.shutdown import ShutdownBudget
from holdfast.sim.clients import Exchange
from holdfast.sim.disagg import HOLD, Meetings
from holdfast.sim.faults import Moment
from holdfast.sim.history import History
from holdfast.sim.plan import Plan, frontend_names, instance_of, worker_names
from holdfast.sim.processes import FrontendProcess, SimProcess, WorkerHost
from holdfast.sim.texts import published_files
from holdfast.sim.workload import Wish
from holdfast.sim.world import World
from holdfast.wire.frames import OLDEST_VERSION, VERSION
from holdfast.worker.config import WorkerConfig

RPC_PORT = 7000
PROMPTS = 4
"""Prompts that a prefill worker takes for each stream that another one takes: they are over sooner."""
BACKOFF = 1.0
"""Seconds after which the supervisor starts a process again that ended by itself."""
HANG_FLOOR = 2.0
INHIBITED = 1.0
"""Seconds; both shorter than their defaults so that universes can be short."""


class SimCluster:
    """All processes of one universe.

    Args:
        world: where they live.
        plan: sizes and settings.
        history: where it is all written down.
    """

    def __init__(self, world: World, plan: Plan, history: History):
        self.world, self.plan, self.history = world, plan, history
        self.labels: dict[str, str] = {}
        """The client's name of each request, by its internal id."""
        self.on_moment: Callable[[str, Moment], None] = lambda _name, _moment: None
        """Told about moments in the lives of streams, with the worker's name; the nemesis listens."""
        self.supervising = True
        self.clients = world.boot("clients")
        self.processes: dict[str, SimProcess] = {}
        """The present incarnation by name; absent while there is none."""
        self._back_after: dict[str, float] = {}
        self._upgraded: set[str] = set()
        self._incarnations: dict[str, int] = {}
        self.exchanges: list[Exchange] = []
        self.meetings = Meetings(world)
        self.rolling = False
        """A rolling restart is under way."""

    # -- life ------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Start every process."""
        for name in self.names:
            self.boot(name)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all processes, workers first."""
        return (*worker_names(self.plan.shape), *frontend_names(self.plan.shape))

    def boot(self, name: str) -> None:
        """Start a process, unless it runs."""
        if name in self.processes:
            return
        number = self._incarnations[name] = self._incarnations.get(name, 0) + 1
        kind = WorkerHost if name in worker_names(self.plan.shape) else FrontendProcess
        process = self.processes[name] = kind(self, name, number)
        process.start()

    def ended(self, process: SimProcess) -> None:
        """A process is over; the supervisor starts it again after a while."""
        if self.processes.get(process.name) is not process:
            return
        del self.processes[process.name]
        after = self._back_after.pop(process.name, BACKOFF)
        if self.supervising:
            self.world.loop.call_later(after, self.boot, process.name, context=self.world.context)

    def kill(self, name: str, back_after: float = BACKOFF, *, silent: bool = False) -> bool:
        """Kill a process, whatever it does; returns whether it ran.

        Args:
            name: of the process.
            back_after: seconds until it is started again.
            silent: its machine loses its power.
        """
        process = self.processes.get(name)
        if process is None:
            return False
        self._back_after[name] = back_after
        process.kill(silent=silent)
        return True

    def terminate(self, name: str, back_after: float = BACKOFF) -> bool:
        """Ask a process to leave (SIGTERM), for one of today's version; returns whether it ran."""
        process = self.processes.get(name)
        if process is None:
            return False
        self._back_after[name] = back_after
        self._upgraded.add(name)
        process.terminate()
        return True

    def version(self, name: str) -> int:
        """Return the newest protocol version that the next start of a process speaks: its latest one's, until it was
        asked to leave."""
        return OLDEST_VERSION if name in self.plan.old and name not in self._upgraded else VERSION

    def back_after(self, name: str, seconds: float) -> None:
        """When this process ends, it is started again after so long."""
        self._back_after[name] = seconds

    @property
    def complete(self) -> bool:
        """Whether every process runs, is ready and not about to leave."""
        wanted = self.plan.shape.workers + self.plan.shape.frontends
        return len(self.processes) == wanted and all(p.in_service for p in self.processes.values())

    # -- who is there ----------------------------------------------------------------------------------

    def worker(self, name: str) -> WorkerHost | None:
        """Return a running worker."""
        process = self.processes.get(name)
        return process if isinstance(process, WorkerHost) else None

    def frontend(self, name: str) -> FrontendProcess | None:
        """Return a running frontend."""
        process = self.processes.get(name)
        return process if isinstance(process, FrontendProcess) else None

    @property
    def workers(self) -> list[WorkerHost]:
        """The workers that run, by name."""
        return [p for _, p in sorted(self.processes.items()) if isinstance(p, WorkerHost)]

    @property
    def frontends(self) -> list[FrontendProcess]:
        """The frontends that run, by name."""
        return [p for _, p in sorted(self.processes.items()) if isinstance(p, FrontendProcess)]

    def name_of(self, instance: str) -> str:
        """Return the name of a worker by its instance id."""
        return self._names.get(instance, "")

    def instance_of(self, name: str) -> InstanceId:
        """Return the instance id of a worker's slot, which stays the same over restarts."""
        return instance_of(name)

    @functools.cached_property
    def _names(self) -> dict[str, str]:
        return {instance_of(name): name for name in worker_names(self.plan.shape)}

    # -- clients ---------------------------------------------------------------------------------------

    def ask(self, wish: Wish, at: float) -> Exchange:
        """Let a client ask at that virtual time."""
        name = frontend_names(self.plan.shape)[wish.frontend]
        exchange = Exchange(wish, lambda: self.frontend(name), self.clients, self.history, name)
        self.exchanges.append(exchange)
        self.world.loop.call_at(at, exchange.begin, context=self.clients.context)
        return exchange

    # -- settings --------------------------------------------------------------------------------------

    def worker_config(self, name: str, address: str) -> WorkerConfig:
        """Return a worker's settings."""
        plan = self.plan
        role = plan.split.role(name) if plan.split is not None else "aggregated"
        return WorkerConfig(
            engine="mock",
            instance_id=instance_of(name),
            rpc_host=address,
            rpc_port=RPC_PORT,
            secret=plan.secret,
            insecure=not plan.secret,
            engine_request_limit=plan.limit * (PROMPTS if role == "prefill" else 1),
            disaggregation_mode="agg" if role == "aggregated" else role,
            prefill_hold=HOLD,
            health=CanaryConfig(health_check_enabled=plan.canary, canary_wait_time=1.0),
            shutdown=ShutdownBudget(shutdown_total_timeout=8.0, shutdown_inflight_timeout=plan.drain),
        )

    def engine_config(self) -> MockConfig:
        """Return an engine's size and speed."""
        plan = self.plan
        return MockConfig(
            step_ms=plan.shape.step_ms,
            max_num_seqs=plan.seats,
            num_blocks=plan.blocks,
            context_length=plan.blocks * 16,
            kv_events=plan.kv_events,
            **(plan.split.engine() if plan.split is not None else {}),
        )

    def frontend_config(self) -> FrontendConfig:
        """Return a frontend's settings."""
        plan = self.plan
        return FrontendConfig(
            secret=plan.secret,
            hang_floor_secs=HANG_FLOOR,
            inhibited_duration_secs=INHIBITED,
            http_graceful_shutdown_timeout_secs=plan.grace,
            http_sse_keep_alive_interval_ms=1500,
            http_max_requests=plan.most_requests,
            knowledge=KnowledgeSettings(kv_events_always=plan.kv_events),
            requests=RequestSettings(
                migration_limit=plan.migration_limit,
                request_timeout=plan.request_timeout,
                first_token_timeout=15.0,
                inter_token_timeout=10.0,
                client_stall_timeout=plan.client_stall,
                migration_wait_secs=20.0,
                migration_max_waiting=plan.most_waiting,
                disagg=plan.split.settings() if plan.split is not None else DisaggSettings(),
                admission=AdmissionSettings(
                    active_decode_blocks_threshold=plan.decode_threshold,
                    active_prefill_tokens_threshold=plan.prefill_threshold,
                    admission_queue_limit=plan.queue,
                    admission_queue_timeout=plan.queue_timeout,
                ),
            ),
        )

    def store(self) -> ArtifactStore:
        """Return a frontend's cache of model files, as an earlier start left it."""
        store = ArtifactStore()
        if self.plan.kv_warm:
            for data in published_files():
                store.put(data)
        return store
