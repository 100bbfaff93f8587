"""A simulated machine with one process on it: it runs, crashes, freezes, is slow, and has a wall clock of its own.

A crashed host never runs another line: no ``finally``, no callback. What it had is kept, untouched, until the universe
is over. A restart is a new `Host` of the same name (`World.boot`). Must never decide when anything of this happens.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Coroutine
from contextvars import Context
from typing import TYPE_CHECKING, Any, TypeVar

from holdfast.sim.lanes import LANE, Lane, SimHandle
from holdfast.sim.loop import START, WALL_START

if TYPE_CHECKING:
    from holdfast.sim.world import World

T = TypeVar("T")

CALLBACK_SECONDS = 50e-6
"""What a callback costs on a host that is slowed down, times the factor; at normal speed callbacks are free."""


class Host(Lane):
    """One incarnation of a machine.

    Args:
        world: where it lives.
        name: of the machine; it keeps name and address over restarts.
        index: number of this incarnation in its world.
        address: IP address.
        incarnation: 1 for the first start.
    """

    __slots__ = ("_timed_from", "address", "context", "incarnation", "name", "on_end", "world")

    def __init__(self, world: World, name: str, index: int, address: str, incarnation: int):
        super().__init__(f"{name}#{incarnation}" if incarnation > 1 else name, index)
        self.world = world
        self.name = name
        self.address = address
        self.incarnation = incarnation
        self.on_end: list[Callable[[bool], None]] = []
        """Called, by the simulation, when the host ends; the argument says whether silently."""
        self.context = Context()
        self.context.run(LANE.set, self)
        self._timed_from = 0

    def __repr__(self) -> str:
        return f"<Host {self.label}>"

    # -- running code on it ----------------------------------------------------------------------------

    def spawn(self, coro: Coroutine[Any, Any, T], name: str) -> asyncio.Task[T]:
        """Start a task on this host; everything that it starts belongs to the host too."""
        return self.world.loop.create_task(coro, name=f"{self.label}/{name}", context=self.context.copy())

    def post(self, callback: Callable[..., Any], *args: Any) -> SimHandle:
        """Run a function on this host in its next iteration, as a signal handler would."""
        return self.world.loop.call_soon(callback, *args, context=self.context.copy())

    def call(self, callback: Callable[..., T], *args: Any) -> T:
        """Run a function as this host, now; for building things before the host runs."""
        return self.context.copy().run(callback, *args)

    def rng(self, purpose: str = "") -> random.Random:
        """Return a generator for production code on this host."""
        return self.world.tape.rng(f"{self.label}/{purpose}")

    def wall(self) -> float:
        """Return this machine's calendar time: seconds since 1970."""
        return WALL_START + (self.world.loop.now - START) + self.wall_offset

    # -- what can happen to it -------------------------------------------------------------------------

    @property
    def frozen(self) -> bool:
        """Whether it is stopped and may go on later."""
        return self.held and self.alive

    def crash(self, silent: bool = False) -> None:
        """End this incarnation in the middle of everything. Called from its own code: after the running callback.

        Args:
            silent: the machine lost its power: peers hear nothing. Otherwise the process was killed, and the system
                closes its connections.
        """
        if not self.alive:
            return
        loop = self.world.loop
        loop.hold(self)
        self.alive = False
        self.kept += [loop.tasks_of(self), list(self.ready)]
        self.ready.clear()
        self.world.note("crash", host=self.label, silent=silent)
        for told in self.on_end:
            told(silent)

    def keep(self, what: object) -> None:
        """Hold on to something until the universe is over, so that dropping it cannot run any code."""
        self.kept.append(what)

    def freeze(self) -> None:
        """Stop it as SIGSTOP does: nothing runs, connections stay open. Idempotent."""
        if self.held:
            return
        self._timed_from = len(self.ready)
        self.world.loop.hold(self)
        self.world.note("freeze", host=self.label)

    def thaw(self) -> None:
        """Let it go on: what the network brought comes first, then the timers that fell due, in their order."""
        if not self.frozen:
            return
        late = [self.ready.pop() for _ in range(len(self.ready) - self._timed_from)][::-1]
        self.ready.extend(handle for handle in late if not handle.is_timer)
        self.ready.extend(handle for handle in late if handle.is_timer)
        self.world.note("thaw", host=self.label)
        self.world.loop.release(self)

    def slow(self, factor: float, per_callback: float = CALLBACK_SECONDS) -> None:
        """Make every callback take virtual time.

        Args:
            factor: times ``per_callback``; 1 and less: full speed, callbacks take no time.
            per_callback: virtual seconds.
        """
        self.cost = factor * per_callback if factor > 1 else 0.0
        self.world.note("slow", host=self.label, factor=factor)

    def drop(self) -> None:
        """Forget everything; the universe is over."""
        self.ready.clear()
        self.kept.clear()
        self.on_end.clear()
