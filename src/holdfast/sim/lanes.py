"""What the simulated loop is made of: lanes of callbacks, handles, and tasks and futures without addresses.

Must never run anything itself.
"""

from __future__ import annotations

import asyncio
import functools
from collections import deque
from collections.abc import Callable
from contextvars import Context, ContextVar
from typing import Any, Protocol

import msgspec


class Runaway(AssertionError):
    """The universe has made more callbacks than its budget: something spins."""


class Failure(msgspec.Struct, frozen=True):
    """What an event loop would have logged: an exception that nobody caught."""

    at: float
    host: str
    message: str
    error: BaseException | None


class TimerOwner(Protocol):
    """What a handle needs of its loop."""

    def timer_cancelled(self) -> None:
        """A timer that has not come due was cancelled."""


class Lane:
    """The callbacks of one host, and whether they may run."""

    __slots__ = ("alive", "busy_until", "cost", "held", "index", "kept", "label", "queued", "ready", "wall_offset")

    def __init__(self, label: str, index: int):
        self.label = label
        self.index = index
        self.ready: deque[SimHandle] = deque()
        self.queued = False
        """It stands in line to run, or a timer will put it there."""
        self.held = False
        """Frozen or dead: what is ready stays where it is."""
        self.alive = True
        self.cost = 0.0
        """Virtual seconds that each callback takes."""
        self.busy_until = 0.0
        self.kept: list[object] = []
        """What a dead host had, held until the universe is over: dropping it would run code."""
        self.wall_offset = 0.0
        """Seconds by which this machine's calendar clock is wrong."""


LANE: ContextVar[Lane] = ContextVar("LANE")
"""Whose code runs; inherited by callbacks, timers and tasks."""


class SimHandle(asyncio.TimerHandle):
    """A callback of a lane, ready or timed."""

    __slots__ = ("lane", "pending")

    def __init__(
        self,
        loop: TimerOwner,
        when: float,
        callback: Callable[..., Any],
        args: tuple[Any, ...],
        context: Context,
        lane: Lane,
        pending: bool,
    ):
        # Not the base class's: it does much more, and there are hundreds of thousands of these a second.
        self._loop: TimerOwner = loop
        self._when = when
        self._callback: Callable[..., Any] | None = callback
        self._args: Any = args
        self._context = context
        self.lane = lane
        self.pending = pending
        """Still in the heap of timers."""

    def cancel(self) -> None:
        """It will not run. Idempotent."""
        if self._callback is not None:
            self._callback = self._args = None
            if self.pending:
                self._loop.timer_cancelled()

    def cancelled(self) -> bool:
        """Whether it was cancelled."""
        return self._callback is None

    @property
    def is_timer(self) -> bool:
        """Whether it was made by `call_at`, as opposed to `call_soon` and to what the network brings."""
        return self._when > 0.0

    def when(self) -> float:
        """Return its virtual time; 0 when it is no timer."""
        return self._when

    def __repr__(self) -> str:
        return f"<SimHandle of {self.lane.label} at {self._when}>"

    __hash__ = object.__hash__


class SimTask(asyncio.Task[Any]):
    """A task whose place in a set does not depend on its address."""

    __slots__ = ("lane", "serial")
    serial: int
    lane: Lane

    def __hash__(self) -> int:
        return self.serial


class SimFuture(asyncio.Future[Any]):
    """A future whose place in a set does not depend on its address; sets of futures are small."""

    __slots__ = ()

    def __hash__(self) -> int:
        return 1


def is_cancelled(entry: SimHandle | Lane) -> bool:
    """Whether an entry of the heap of timers will never do anything."""
    return isinstance(entry, SimHandle) and entry._callback is None


def describe(callback: Callable[..., Any] | None) -> str:
    """Name a callback without its address."""
    if callback is None:
        return "(cancelled)"
    owner = getattr(callback, "__self__", None)
    if isinstance(owner, asyncio.Task):
        return f"task {owner.get_name()}"
    if isinstance(callback, functools.partial):
        return describe(callback.func)
    return str(getattr(callback, "__qualname__", type(callback).__name__))
