"""A universe: one tape, one loop, one network, one discovery, and the hosts on them.

Must never decide what happens: the harness does, by the tape.
"""

from __future__ import annotations

import asyncio
import gc
import sys
from collections.abc import Callable, Coroutine
from contextvars import Context
from typing import Any, NamedTuple, TypeVar

from holdfast.sim.discovery import SimDiscoveryServer
from holdfast.sim.guard import forbidden
from holdfast.sim.hosts import Host
from holdfast.sim.lanes import LANE
from holdfast.sim.links import NetworkSettings
from holdfast.sim.loop import MAX_CALLBACKS, START, SimLoop
from holdfast.sim.network import SimNetwork
from holdfast.sim.tape import Tape

T = TypeVar("T")
Fact = str | int | float | bool | None


class Note(NamedTuple):
    """Something that happened, for the log and the digest."""

    at: float
    """Virtual seconds since the universe began."""
    kind: str
    facts: dict[str, Fact]

    def __str__(self) -> str:
        told = " ".join(f"{name}={value}" for name, value in self.facts.items())
        return f"{self.at:10.6f} {self.kind} {told}".rstrip()


class _Collector:
    """The garbage collector stands still while there are worlds: it would run code at moments of its own."""

    worlds = 0
    enabled = True
    settled = False


def _settle_collector() -> None:
    """What was there before the first universe need not be looked at after each of them."""
    if not _Collector.settled:
        _Collector.settled = True
        gc.collect()
        gc.freeze()


def _hold_collector() -> None:
    if _Collector.worlds == 0:
        _Collector.enabled = gc.isenabled()
        gc.disable()
    _Collector.worlds += 1


def _let_collector_go() -> None:
    _Collector.worlds -= 1
    gc.collect()
    if _Collector.worlds == 0 and _Collector.enabled:
        gc.enable()


class World:
    """See the module.

    Args:
        tape: decides everything.
        network: what links are like.
        max_callbacks: budget of the whole universe.
    """

    def __new__(cls, *_: object, **__: object) -> World:
        """Settle the collector first: what is frozen is never collected, so no world may be among it."""
        _settle_collector()
        return super().__new__(cls)

    def __init__(self, tape: Tape, *, network: NetworkSettings | None = None, max_callbacks: int = MAX_CALLBACKS):
        _hold_collector()
        self.tape = tape
        self.loop = SimLoop(tape.schedule, max_callbacks=max_callbacks)
        self.context = Context()
        """Of the network itself and of the harness's own tasks."""
        self.context.run(LANE.set, self.loop.world)
        self.hosts: dict[str, Host] = {}
        """The present incarnation of every machine, dead or alive."""
        self.log: list[Note] = []
        self.network = SimNetwork(self, network)
        self.discovery = SimDiscoveryServer(self)
        self._incarnations: list[Host] = []
        self._ips: dict[str, str] = {}
        self._names: dict[str, str] = {}

    def now(self) -> float:
        """Return virtual seconds since the universe began."""
        return self.loop.now - START

    def boot(self, name: str) -> Host:
        """Start a machine, or start it anew after a crash: same name, same address, nothing else."""
        before = self.hosts.get(name)
        if before is not None and before.alive:
            raise ValueError(f"host {name} is running")
        ip = self._ips.setdefault(name, f"10.0.0.{len(self._ips) + 1}")
        self._names[ip] = name
        incarnation = 1 if before is None else before.incarnation + 1
        host = Host(self, name, len(self._incarnations) + 1, ip, incarnation)
        self._incarnations.append(host)
        self.hosts[name] = host
        host.on_end.append(lambda silent: self.network.host_ended(host, silent))
        if before is not None:
            self.network.host_booted(name)
        self.note("boot", host=host.label)
        return host

    def named(self, ip: str) -> str:
        """Return the machine at an address; one that never was is named by its address."""
        return self._names.get(ip, ip)

    def note(self, kind: str, /, **facts: Fact) -> None:
        """Write something that happened into the log; it counts in the digest. Facts must not hold addresses."""
        if self.loop.dropping:
            return  # said by what a dropped coroutine does in `finally`
        note = Note(self.now(), kind, facts)
        self.log.append(note)
        self.loop.events.data(str(note).encode())

    def spawn(self, coro: Coroutine[Any, Any, T], name: str) -> asyncio.Task[T]:
        """Start a task of the harness itself; no fault reaches it."""
        return self.loop.create_task(coro, name=f"world/{name}", context=self.context.copy())

    def run(self, until: Callable[[], bool] | None = None, limit_s: float = 3600.0) -> bool:
        """Let the universe go on. See `SimLoop.run`; code in it cannot reach the real world."""
        with forbidden(self.loop):
            return self.loop.run(until, limit_s)

    def digest(self) -> str:
        """Return the hash of everything that happened so far."""
        return self.loop.digest()

    def close(self) -> None:
        """Drop everything. Idempotent."""
        if self.loop.is_closed():
            return
        told, sys.unraisablehook = sys.unraisablehook, lambda _: None  # coroutines that still await in a ``finally``
        try:
            with forbidden(self.loop):
                self.loop.close()
            self.network.close()
            for host in self._incarnations:
                host.drop()
            _let_collector_go()
        finally:
            sys.unraisablehook = told

    def __enter__(self) -> World:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
