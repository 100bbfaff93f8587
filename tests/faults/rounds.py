"""One plan against a real cluster, from the first request to the verdict: the counterpart of `sim.universe`.

A cluster may serve several rounds, one after the other, each with a history of its own. Times are stretched by what
the machine is given (`tests.patience`); nothing else is forgiven.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec

from holdfast.sim.history import History, Violation
from holdfast.sim.oracles import check_all
from holdfast.sim.oracles.answers import first_error
from holdfast.sim.plan import Plan
from holdfast.sim.tape import Tape
from holdfast.sim.universe import ANSWER_BOUND, CACHE_BOUND, CONVERGE_BOUND, RETURN_BOUND, START_BOUND
from holdfast.sim.workload import Wish, Workload
from tests.faults.clients import Exchange
from tests.faults.cluster import Cluster
from tests.faults.nemesis import Nemesis
from tests.patience import FACTOR, within

REST = 3.0
"""Seconds in which everything must have been given back: gauges are read over HTTP, one process after the other."""
SILENCE = frozenset({"accept_overdue", "peer_silent", "worker_stalled"})
"""Errors that a process may also cause by getting no processor for a while."""
NEVER_READY = "the cluster was not ready"
_POLL = 0.1
_PROBE_EVERY = 0.5


class Result(msgspec.Struct):
    """What became of one round."""

    seed: int
    plan: Plan
    history: History
    violations: list[Violation]
    seconds: float

    @property
    def hits(self) -> int:
        """Faults that hit live work."""
        return sum(1 for fault in self.history.fired if fault.live)


class Round:
    """See the module; `run` it once.

    Args:
        cluster: complete and at rest.
        plan: what it goes through.
        seed: for the requests that faults bring, and the probes.
    """

    def __init__(self, cluster: Cluster, plan: Plan, seed: int):
        self.cluster, self.plan, self.seed = cluster, plan, seed
        self.history = cluster.ledger.history = History()
        self.history.lives = [process.life for process in cluster.processes.values()]
        self.exchanges: list[Exchange] = []
        self._clients: list[asyncio.Task[None]] = []
        self._workload = Workload(Tape(seed).workload, plan.shape.frontends, plan.shape.longest)
        self._workload.skip(len(plan.wishes) + 1)
        self.nemesis = Nemesis(cluster, self._workload, lambda wish: self._ask(wish, 0.0), self._load)

    async def run(self) -> Result:
        """Run it to the end and judge it."""
        loop, history = asyncio.get_running_loop(), self.history
        started = loop.time()
        try:
            await self._course()
        finally:
            for client in self._clients:
                client.cancel()
            if self._clients:
                await asyncio.wait(self._clients)
        history.finished = loop.time()
        self.cluster.ledger.name_sequences()
        history.sequences.sort(key=lambda sequence: sequence.received)
        for call in history.calls:
            error = first_error(call)
            if error:
                history.see(f"told {call.status} {error.get('code')}")
        found = [*history.violations, *check_all(history, self.plan, FACTOR)]
        found = [violation for violation in found if not self._starved(violation)]
        return Result(self.seed, self.plan, history, found, history.finished - started)

    def _starved(self, violation: Violation) -> bool:
        """Whether a machine that is shared with others did it: silence needs no fault there. Counted, and shown."""
        code = str(violation.evidence.get("code", ""))
        starved = violation.promise == "cause" and code in SILENCE
        if starved:
            self.history.see(f"unprovoked {code}")
        return starved

    async def _course(self) -> None:
        history, loop = self.history, asyncio.get_running_loop()
        if not await until(self.cluster.in_use, within(START_BOUND)):
            history.violate("liveness", f"{NEVER_READY} within {within(START_BOUND):g} s")
            return
        history.began = began = loop.time()
        for wish in self.plan.wishes:
            self._ask(wish, wish.at)
        await self.nemesis.suffer(self.plan.faults)
        if not await until(self._complete, within(RETURN_BOUND / 4)):
            history.violate("liveness", "not every process was back in time")
            return
        await asyncio.sleep(max(0.0, began + self.plan.shape.span - loop.time()))
        history.healed = loop.time()
        await self._recover()

    async def _complete(self) -> bool:
        for frontend in self.cluster.frontends:
            await self.cluster.instances(frontend)
        return self.cluster.complete

    async def _recover(self) -> None:
        history, loop = self.history, asyncio.get_running_loop()
        if await until(self._all_over, ANSWER_BOUND + within(5.0)):
            history.answered = loop.time()
        bound = CONVERGE_BOUND + within(5.0)
        if await until(self.cluster.in_use, bound) and await self._probe(loop.time() + bound):
            history.converged = loop.time()
        await until(self._at_rest, within(REST))
        if self.plan.kv_events:
            self.cluster.ledger.forget_caches()
            await until(self._caches_known, CACHE_BOUND + within(1.0))
        history.residues = await self.cluster.residues()
        history.views = await self.cluster.seen(self._served())

    async def _caches_known(self) -> bool:
        return self.cluster.caches_known()

    async def _all_over(self) -> bool:
        return all(exchange.over for exchange in self.exchanges)

    async def _at_rest(self) -> bool:
        residues = await self.cluster.residues()
        return not any(any(r.leases.values()) or r.gauges or r.in_hand or r.engine for r in residues)

    async def _probe(self, until_time: float) -> bool:
        """Ask until every worker has served every frontend."""
        loop = asyncio.get_running_loop()
        wanted = self.plan.shape.workers * self.plan.shape.frontends
        while loop.time() < until_time:
            for index in range(self.plan.shape.frontends):
                for _ in range(self.plan.shape.workers):
                    self._ask(self._workload.probe(0.0, index), 0.0)
            await until(self._all_over, until_time - loop.time())
            if len(self._served()) >= wanted:
                return True
            await asyncio.sleep(_PROBE_EVERY)
        return False

    def _served(self) -> set[tuple[str, str]]:
        """Return which frontend's probes which worker's engine took."""
        self.cluster.ledger.name_sequences()
        asked = {call.name: call.frontend for call in self.history.calls if call.probe}
        return {(asked[s.label], s.worker) for s in self.history.sequences if s.label in asked}

    def _ask(self, wish: Wish, after: float) -> None:
        name = self.cluster.frontends[wish.frontend]
        exchange = Exchange(wish, name, self.cluster.http_ports[name], self.history)
        self.exchanges.append(exchange)

        async def client() -> None:
            await asyncio.sleep(after)
            await exchange.run()

        self._clients.append(asyncio.ensure_future(client()))

    def _load(self, frontend: str) -> int:
        """Return how many clients wait for something from a frontend."""
        return sum(1 for e in self.exchanges if e.call.frontend == frontend and e.call.sent and not e.over)


async def until(condition: Callable[[], Awaitable[Any]], bound: float) -> bool:
    """Wait for a condition of other processes, which have no event; returns whether it came true in time."""
    loop = asyncio.get_running_loop()
    end = loop.time() + bound
    while not await condition():
        if loop.time() >= end:
            return False
        await asyncio.sleep(_POLL)
    return True
