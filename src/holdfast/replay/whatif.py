"""What if: a simulated cluster under load while things go wrong, and what its clients would have seen.

    happened = what_if(Scenario(settings=…, load=…, troubles=read_troubles(["kill-worker@30s"], 8, 1)))

Everything is decided by the scenario and its seed. Must never judge: `effects` and `tables` say what it means.
"""

from __future__ import annotations

import asyncio
import random
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any, Protocol

import msgspec

from holdfast.replay.arrivals import Arrivals
from holdfast.replay.driver import Job
from holdfast.replay.inprocess import SimDriver, Stream
from holdfast.replay.prompts import Prompts
from holdfast.replay.record import Recording
from holdfast.replay.run import REQUEST_SECONDS, replay, serve
from holdfast.replay.simulated import ReplayCluster, Settings, new_world, run_world, usable
from holdfast.replay.trace import TraceRequest
from holdfast.sim.faults import AnyFault, Overload
from holdfast.sim.history import Failed, Fired, Life
from holdfast.sim.nemesis import Nemesis
from holdfast.sim.workload import Workload

SAMPLE_SECONDS = 0.5
BURST = 1_000_000
"""Number of the first request of a burst: those of the load count from 0."""


class Load(Protocol):
    """Where requests come from."""

    arrivals: Arrivals
    described: str
    """In words."""

    def requests(self, elapsed: Callable[[], float]) -> Iterable[TraceRequest]:
        """Return the requests; ``elapsed`` says how many seconds the run has taken so far."""

    def extra(self) -> TraceRequest:
        """Return one more, for a burst."""


class Scenario(msgspec.Struct, frozen=True, kw_only=True):
    """What is asked."""

    settings: Settings
    load: Load
    troubles: tuple[AnyFault, ...] = ()
    seed: int = 1
    patience: float = REQUEST_SECONDS
    """Virtual seconds that one request may take."""
    watch: Callable[[float], None] = lambda _: None
    """Told again and again how many virtual seconds have passed."""


class Sample(msgspec.Struct, frozen=True):
    """The cluster at one moment."""

    at: float
    usable: int
    """Workers that the least fortunate frontend would use."""
    running: list[int]
    """Sequences in each worker's engine; 0 for one that is down."""
    waiting: int
    """Sequences that wait in engines."""
    kv: float
    """Share of the KV blocks in use, of the fullest engine."""


class Attempt(msgspec.Struct, frozen=True):
    """A request on a worker."""

    worker: str
    begin: float
    end: float
    """Infinite when its end is not known."""


class Happened(msgspec.Struct, frozen=True, kw_only=True):
    """What came of a scenario. All times are seconds since the load began."""

    scenario: Scenario
    recording: Recording
    streams: dict[int, Stream]
    """By number of the request."""
    attempts: dict[str, list[Attempt]]
    """By label of the stream, in order."""
    moves: list[Failed]
    """Attempts that ended early and were continued elsewhere."""
    fired: list[Fired]
    rollouts: list[tuple[float, float]]
    samples: list[Sample]
    lives: list[Life]
    digest: str
    """Hash of everything that happened in the simulation."""


class _Trouble(Nemesis):
    """The simulation's nemesis, whose burst is more of the scenario's own load."""

    burst: Callable[[int], None]

    def _overload(self, fault: Overload) -> bool:
        self.burst(fault.times)
        return True


class _Run:
    def __init__(self, scenario: Scenario, cluster: ReplayCluster):
        self.scenario, self.cluster = scenario, cluster
        self.loop = cluster.world.loop
        self.driver = SimDriver(cluster, Prompts(), keep=True)
        self.samples: list[Sample] = []
        self.began = 0.0
        self.recording: Recording
        self._bursts: list[asyncio.Task[None]] = []
        workload = Workload(cluster.world.tape.workload, scenario.settings.frontends)
        self._trouble = _Trouble(cluster, workload)
        self._trouble.burst = self._burst

    async def main(self) -> None:
        """From the cluster's start to the end of the last request."""
        cluster, scenario = self.cluster, self.scenario
        cluster.start()
        await cluster.until_in_use()
        self.began = self.loop.time()
        self.recording = Recording(self.loop.time)
        cluster.world.spawn(self._sample(), "samples")
        self._trouble.start(scenario.troubles)
        load = replay(
            scenario.load.requests(self.recording.now),
            self.driver,
            scenario.load.arrivals,
            random.Random(scenario.seed),
            recording=self.recording,
            patience=scenario.patience,
        )
        await cluster.clients.spawn(load, "load")
        if self._bursts:
            await asyncio.wait(self._bursts)

    def _burst(self, times: int) -> None:
        for _ in range(times):
            job = Job(BURST + len(self._bursts), self.scenario.load.extra())
            work = serve(self.driver, job, self.recording.open(job), self.scenario.patience)
            self._bursts.append(self.cluster.clients.spawn(work, f"burst-{job.index}"))

    async def _sample(self) -> None:
        """Look at the cluster, again and again; ends with its world."""
        cluster = self.cluster
        names = [name for name in cluster.names if name.startswith("worker")]
        while True:
            engines = {w.name: w.engine.load() for w in cluster.workers if w.life.ready}
            loads = [engines.get(name) for name in names]
            self.samples.append(
                Sample(
                    self.recording.now(),
                    min((len(usable(cluster, frontend.name)) for frontend in cluster.frontends), default=0),
                    [load.running if load else 0 for load in loads],
                    sum(load.waiting for load in loads if load),
                    max((load.kv_used_blocks / load.kv_total_blocks for load in loads if load), default=0.0),
                )
            )
            self.scenario.watch(self.samples[-1].at)
            await asyncio.sleep(SAMPLE_SECONDS)


def what_if(scenario: Scenario) -> Happened:
    """Let it happen. Raises BadTrace for a bad line of a trace that is its load."""
    with new_world(scenario.seed) as world:
        cluster = ReplayCluster(world, scenario.settings)
        run = cluster.clients.call(_Run, scenario, cluster)
        run_world(world, run.main(), "what if")
        return _told(run, world.digest())


def _told(run: _Run, digest: str) -> Happened:
    history, began = run.cluster.history, run.began

    def since(moment: float) -> float:
        return moment - began

    return Happened(
        scenario=run.scenario,
        recording=run.recording,
        streams={index: _shifted(stream, began) for index, stream in run.driver.streams.items()},
        attempts=_attempts(run),
        moves=[_replaced(failed, run, at=since(failed.at)) for failed in history.failures],
        fired=[_replaced(fired, run, at=since(fired.at), until=since(fired.until)) for fired in history.fired],
        rollouts=[(since(begin), since(end)) for begin, end in history.rollouts],
        samples=run.samples,
        lives=history.lives,
        digest=digest,
    )


def _replaced(event: Any, run: _Run, **times: float) -> Any:
    changes: dict[str, Any] = dict(times)
    if isinstance(event, Failed):
        changes["worker"] = run.cluster.name_of(event.worker) or event.worker
    return msgspec.structs.replace(event, **changes)


def _shifted(stream: Stream, began: float) -> Stream:
    for at, moment in enumerate(stream.times):
        stream.times[at] = moment - began
    return stream


def _attempts(run: _Run) -> dict[str, list[Attempt]]:
    """Return who had which stream when. A sequence without an end ended with its worker's process."""
    history, began = run.cluster.history, run.began
    ends = {(life.name, life.incarnation): life.ended for life in history.lives if life.ended}
    found: defaultdict[str, list[Attempt]] = defaultdict(list)
    for one in history.sequences:
        if one.label and one.accepted:
            end = one.ended or ends.get((one.worker, one.incarnation)) or float("inf")
            found[one.label].append(Attempt(one.worker, one.received - began, end - began))
    return dict(found)
