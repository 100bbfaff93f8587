"""One universe from seed to verdict: a cluster starts, clients ask, faults strike, faults end, everything must recover.

    run_universe(17)                     # what happened, and which promises were broken
    run_universe(17, script=outcome.choices)  # the same again, to the last callback

Must never let two universes touch each other, or anything real.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
from array import array
from collections import Counter
from collections.abc import Generator, Mapping, Sequence

import msgspec

from holdfast.sim.bulk import NARROW
from holdfast.sim.caches import difference
from holdfast.sim.cluster import SimCluster
from holdfast.sim.disagg import idle, kept_for, spoil
from holdfast.sim.history import History, View, Violation
from holdfast.sim.nemesis import Nemesis
from holdfast.sim.oracles import check_all
from holdfast.sim.oracles.answers import first_error
from holdfast.sim.plan import Plan, Shape, draw_plan
from holdfast.sim.tape import Tape
from holdfast.sim.versions import version_changes
from holdfast.sim.workload import Workload
from holdfast.sim.world import Note, World

START_BOUND = 20.0
"""Virtual seconds in which a fresh cluster must be ready."""
RETURN_BOUND = 120.0
"""Virtual seconds in which all faults must be over and all processes back: faults last up to 20 s each."""
ANSWER_BOUND = 60.0
"""Virtual seconds after the last fault in which every request must have ended: the bound on a whole request is 40 s,
and a client that reads slowly may take a while longer."""
CONVERGE_BOUND = 75.0
"""Virtual seconds after that in which every frontend must use every worker: 60 s is the longest inhibition and the
longest hold after a hang."""
CACHE_BOUND = 15.0
"""From then on until every frontend knows what is in every KV cache: a beat, a comparison, and a longest pause."""
REST = 0.3
"""Virtual seconds after the last answer in which everything must have been given back: a few network latencies."""
MAX_CALLBACKS = 2_000_000
"""Two hundred times what a universe needs: more is a loop that spins."""
_POLL = 0.05
_PROBE_EVERY = 0.5
_CROWDED = 8
"""Rounds in which all frontends probe at once."""


class Outcome(msgspec.Struct):
    """What became of one universe."""

    seed: int
    digest: str
    """Hash of everything that happened: equal when it is replayed."""
    plan: Plan
    history: History
    violations: list[Violation]
    choices: dict[str, array[int]]
    """A script that replays it."""
    log: list[Note]
    callbacks: int
    seconds: float
    """Virtual ones."""

    @property
    def counters(self) -> Counter[str]:
        """How often what must happen now and then did."""
        return self.history.seen

    @property
    def hits(self) -> int:
        """Faults that hit live work."""
        return sum(1 for fault in self.history.fired if fault.live)

    @property
    def counted(self) -> bool:
        """Whether it is big enough to count: 2 frontends, 3 workers, 20 requests, 2 faults that hit live work."""
        shape = self.plan.shape
        return shape.frontends >= 2 and shape.workers >= 3 and len(self.plan.wishes) >= 20 and self.hits >= 2


class Universe:
    """One universe in progress; `run` it once.

    Args:
        tape: decides everything.
        shape: its size.
        plan: what it goes through; None: drawn from the tape.
        logs: let production's log lines through.
    """

    def __init__(self, tape: Tape, shape: Shape | None = None, plan: Plan | None = None, *, logs: bool = False):
        self.tape, self._logs = tape, logs
        self.plan = plan or draw_plan(tape, shape or Shape())
        self.history = History()
        self.world = World(tape, network=NARROW if self.plan.narrow else None, max_callbacks=MAX_CALLBACKS)
        self.cluster = SimCluster(self.world, self.plan, self.history)
        self._workload = Workload(tape.workload, self.plan.shape.frontends, self.plan.shape.longest)
        self._workload.skip(len(self.plan.wishes))
        self.nemesis = Nemesis(self.cluster, self._workload)

    def run(self) -> Outcome:
        """Run it to the end and judge it."""
        with logs(self._logs), self.world as world:
            main = world.loop.create_task(self._main(), name="universe", context=world.context)
            world.run(main.done)
            if not main.done():
                self.history.violate("liveness", "nothing was left to do and the universe was not over")
            else:
                main.result()
            self.history.finished = world.loop.time()
            self._note_failures()
            self._count()
            self.history.seen["callbacks"] = world.loop.callbacks
            return Outcome(
                seed=self.tape.seed,
                digest=world.digest(),
                plan=self.plan,
                history=self.history,
                violations=[*self.history.violations, *check_all(self.history, self.plan)],
                choices=self.tape.choices,
                log=world.log,
                callbacks=world.loop.callbacks,
                seconds=world.now(),
            )

    def _note_failures(self) -> None:
        for failure in self.world.loop.failures:
            self.history.violate(
                "crash", failure.message, host=failure.host, at=round(failure.at, 6), error=repr(failure.error)
            )

    def _count(self) -> None:
        """Count what clients were told, by status, code and knob."""
        for call in self.history.calls:
            error = first_error(call)
            if error:
                knob = str(error.get("details", {}).get("knob", "")) if isinstance(error.get("details"), dict) else ""
                self.history.see(f"told {call.status} {error.get('code')} {knob}".rstrip())
        for before, after in version_changes(self.history):
            self.history.see(f"moved to {'a newer' if after > before else 'an older'} version")

    # -- the course of events --------------------------------------------------------------------------

    async def _main(self) -> None:
        cluster, history, loop = self.cluster, self.history, self.world.loop
        cluster.start()
        if not await self._until(lambda: cluster.complete and self._all_in_use(), START_BOUND):
            history.violate("liveness", f"a fresh cluster was not ready within {START_BOUND:g} s")
            return
        history.began = began = loop.time()
        for wish in self.plan.wishes:
            cluster.ask(wish, began + wish.at)
        self.nemesis.start(self.plan.faults)
        if self.plan.split is not None:
            spoil(self.cluster, self.plan.split)
        if not await self._until(lambda: self.nemesis.done and cluster.complete, RETURN_BOUND):
            history.violate("liveness", f"not every process was back within {RETURN_BOUND:g} s")
            return
        await asyncio.sleep(max(0.0, began + self.plan.shape.span - loop.time()))
        history.healed = loop.time()
        await self._recover()

    async def _recover(self) -> None:
        cluster, history, loop = self.cluster, self.history, self.world.loop
        if await self._until(lambda: all(exchange.over for exchange in cluster.exchanges), ANSWER_BOUND):
            history.answered = loop.time()
        until = loop.time() + CONVERGE_BOUND
        if await self._until(self._all_in_use, CONVERGE_BOUND) and await self._probe(until):
            history.converged = loop.time()
        await self._until(self._at_rest, REST + kept_for(self.plan, history, loop.time()))
        await asyncio.sleep(_POLL)
        if self.plan.kv_events:
            await self._until(self._caches_known, CACHE_BOUND)
        self._look()

    async def _until(self, condition: object, bound: float) -> bool:
        """Wait for a condition; returns whether it came true within ``bound`` virtual seconds."""
        assert callable(condition)
        loop = self.world.loop
        until = loop.time() + bound
        while not condition():  # the conditions are about many objects that have no events
            self._check_leases()
            if loop.time() >= until:
                return False
            await asyncio.sleep(_POLL)
        return True

    async def _probe(self, until: float) -> bool:
        """Ask until every worker has served every frontend.

        All frontends ask at once, and one after the other when that has not been enough for a while: where limits let
        in fewer requests than that, the same frontend may get a worker's last place round after round.
        """
        cluster, loop = self.cluster, self.world.loop
        frontends = range(self.plan.shape.frontends)
        for turn in itertools.count():
            if loop.time() >= until:
                break
            asking = frontends if turn < _CROWDED else (turn % len(frontends),)
            for _ in range(self.plan.shape.workers):
                for index in asking:
                    cluster.ask(self._workload.probe(0.0, index), loop.time())
            await asyncio.sleep(_PROBE_EVERY)
            if await self._until(lambda: all(e.over for e in cluster.exchanges), until - loop.time()) and all(
                view.served for view in self._views()
            ):
                return True
        return False

    # -- looking at it ---------------------------------------------------------------------------------

    def _all_in_use(self) -> bool:
        """Whether every frontend would send new work to every worker."""
        wanted = self.plan.shape.workers
        for frontend in self.cluster.frontends:
            if len(frontend.assembled.registry.served()) != 1:
                return False
            workers = frontend.assembled.pool.all_workers()
            if sum(1 for w in workers if w.eligible and not w.inhibited and not w.hesitant) != wanted:
                return False
        return len(self.cluster.frontends) == self.plan.shape.frontends

    def _check_leases(self) -> None:
        """P4 while it runs: leases are never negative, and never more than what they are for."""
        for frontend in self.cluster.frontends:
            held = frontend.assembled.services.leases.sums()
            streams = held["stream"]
            most = {"request": frontend.live, "attempt": streams, "waiting": streams, "prefill": streams}
            if min(held.values()) < 0 or any(held[kind] > bound for kind, bound in most.items()):
                self.history.violate("P4", "leases do not fit together", process=frontend.name, **held)

    def _at_rest(self) -> bool:
        residues = [process.residue() for process in self.cluster.processes.values()]
        return not any(
            any(r.leases.values()) or any(r.gauges.values()) or r.in_hand or r.engine or r.streams for r in residues
        )

    def _caches_known(self) -> bool:
        """Whether every frontend knows what every engine has in its KV cache."""
        return not any(view.cache for view in self._views())

    def _look(self) -> None:
        """Write down what everybody holds and thinks at the end."""
        history = self.history
        history.residues = [process.residue() for _, process in sorted(self.cluster.processes.items())]
        history.views = self._views()
        for frontend in self.cluster.frontends:
            for reason, count in frontend.assembled.knowledge.tally.resynchronisations.items():
                history.see(f"cache {reason}", count)

    def _views(self) -> list[View]:
        served = {
            (call.frontend, sequence.worker)
            for sequence in self.history.sequences
            if sequence.label.startswith("p")
            for call in self.history.calls
            if call.name == sequence.label
        }
        views = []
        for frontend in self.cluster.frontends:
            pool = frontend.assembled.pool
            for worker in self.cluster.workers:
                seen = pool.worker(worker.worker.instance)
                views.append(
                    View(
                        frontend.name,
                        worker.name,
                        alive=worker.in_service,
                        known=seen is not None,
                        eligible=seen is not None and seen.eligible,
                        current=seen is not None and seen.epoch == worker.worker.epoch,
                        served=(frontend.name, worker.name) in served or idle(self.plan, worker.name),
                        state=seen.state if seen is not None else "",
                        cache=difference(frontend, worker) if self.plan.kv_events else "",
                    )
                )
        return views


def run_universe(
    seed: int,
    shape: Shape | None = None,
    script: Mapping[str, Sequence[int]] | None = None,
    *,
    plan: Plan | None = None,
    explain: bool = False,
    logs: bool = False,
) -> Outcome:
    """Run one universe.

    Args:
        seed: of its tape.
        shape: its size; None: the default.
        script: choices to make instead of random ones, by stream, as in `Outcome.choices`.
        plan: requests and faults; None: drawn from the tape.
        explain: let the tape keep what each choice was for.
        logs: let production's log lines through.
    """
    return Universe(Tape(seed, script, explain=explain), shape, plan, logs=logs).run()


@contextlib.contextmanager
def logs(wanted: bool) -> Generator[None, None, None]:
    """Keep production's log lines away unless they are wanted: formatting them takes longer than the rest."""
    root = logging.getLogger("holdfast")
    before = root.level
    if not wanted:
        root.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        root.setLevel(before)
