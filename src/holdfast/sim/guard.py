"""Catches code that touches the real world while a universe runs: sockets, threads, clocks, chance, processes.

`forbidden` replaces the functions that lead out of the simulation; whoever calls one gets an `Escape` that says what
and where, and the universe ends with it even if somebody swallows it. Two things are served instead: log records get
their time from the virtual clock, and modules that are known to print calendar time get their host's.
Must never stay in place when no universe runs.
"""

from __future__ import annotations

import contextlib
import datetime
import functools
import logging
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType, FunctionType, ModuleType, SimpleNamespace
from typing import Any, Protocol

CALENDAR_READERS = frozenset({"holdfast.telemetry.otlp"})  # spans carry calendar time
"""Modules that may ask for calendar time; they get the host's virtual one. Others have it injected (`Host.wall`)."""


class Escape(BaseException):  # no `except Exception` may swallow it
    """Simulated code reached for the real world.

    Args:
        what: the function.
        where: file and line of the call.
    """

    def __init__(self, what: str, where: str):
        super().__init__(f"{what} was called in a simulation, at {where}")
        self.what = what
        self.where = where


class Escapable(Protocol):
    """What the guard needs of the loop that it guards."""

    escape: Escape | None

    def wall(self) -> float:
        """Return calendar time of the host whose code runs, in seconds since 1970."""


# fmt: off
_TIME = ("time", "time_ns", "monotonic", "monotonic_ns", "perf_counter", "perf_counter_ns", "sleep",
    "process_time", "process_time_ns", "thread_time")
_RANDOM = ("betavariate", "choice", "choices", "expovariate", "gammavariate", "gauss", "getrandbits",
    "lognormvariate", "normalvariate", "paretovariate", "randbytes", "randint", "random", "randrange",
    "sample", "seed", "setstate", "shuffle", "triangular", "uniform", "vonmisesvariate", "weibullvariate")
_OS = ("urandom", "getrandom", "fork", "forkpty", "system", "popen", "posix_spawn", "posix_spawnp", "kill",
    "killpg", "abort", "_exit", "execv", "execve")
_SIGNAL = ("signal", "raise_signal", "setitimer", "alarm", "set_wakeup_fd", "pthread_kill")
_SOCKET = ("socketpair", "create_connection", "create_server", "getaddrinfo", "gethostbyname", "gethostname",
    "fromfd")
# fmt: on

_CLOSED: list[tuple[Any, str, str]] = [
    *((time, name, f"time.{name}") for name in _TIME),
    *((random, name, f"random.{name}") for name in _RANDOM),
    *((random.SystemRandom, name, f"SystemRandom.{name}") for name in ("random", "getrandbits", "randbytes")),
    (random, "_urandom", "os.urandom"),
    *((os, name, f"os.{name}") for name in _OS if hasattr(os, name)),
    *((signal, name, f"signal.{name}") for name in _SIGNAL if hasattr(signal, name)),
    *((socket, name, f"socket.{name}") for name in _SOCKET),
    (socket.socket, "__init__", "socket.socket"),
    (threading.Thread, "start", "threading.Thread.start"),
    (subprocess.Popen, "__init__", "subprocess.Popen"),
    (uuid, "uuid1", "uuid.uuid1"),
    (uuid, "uuid4", "uuid.uuid4"),
]
"""What leads out: where it lives, its name there, its name for people."""

_SEED = random.Random.seed


def catch(loop: Escapable, label: str, frame: FrameType) -> Escape:
    """Note the first escape, so that the loop ends with it whatever the code does with the exception."""
    escape = Escape(label, _where(frame))
    if loop.escape is None:
        loop.escape = escape
    return escape


def refusal(label: str) -> Callable[..., Any]:
    """Return a method for a loop that is an escape."""

    def refuse(loop: Escapable, *_: Any, **__: Any) -> Any:
        raise catch(loop, label, sys._getframe(1))

    return refuse


class _Guard:
    """The closed ways out of one loop's universe."""

    def __init__(self, loop: Escapable):
        self.loop = loop
        self.saved: list[tuple[Any, str, Any]] = []

    def close_ways(self) -> None:
        replaced: dict[int, Any] = {}
        for owner, name, label in _CLOSED:
            original = getattr(owner, name)
            stand_in = self._served(name) if label in ("time.time", "time.time_ns") else self._raising(label)
            if not isinstance(owner, type):
                replaced[id(original)] = stand_in
            self._set(owner, name, stand_in)
        self._set(random.Random, "seed", self._seeding())
        self._set(logging, "time", SimpleNamespace(**{**vars(time), "time": self.loop.wall}))
        replaced[id(datetime.datetime)] = self._calendar()
        wanted, modules = frozenset(replaced), _our_modules()
        for module, name, original in _borrowed(wanted, modules):
            self._set(module, name, replaced[id(original)])
        for function in _defaulting(wanted, modules):
            defaults, named = function.__defaults__ or (), function.__kwdefaults__ or {}
            self._set_defaults(function, "__defaults__", tuple(replaced.get(id(value), value) for value in defaults))
            changed = {name: replaced.get(id(value), value) for name, value in named.items()}
            self._set_defaults(function, "__kwdefaults__", changed)

    def open_ways(self) -> None:
        for owner, name, original in reversed(self.saved):
            if original is _ABSENT:
                delattr(owner, name)
            else:
                setattr(owner, name, original)
        self.saved.clear()

    def _set(self, owner: Any, name: str, value: Any) -> None:
        self.saved.append((owner, name, vars(owner).get(name, _ABSENT)))
        setattr(owner, name, value)

    def _set_defaults(self, function: FunctionType, name: str, values: Any) -> None:
        self.saved.append((function, name, getattr(function, name)))
        setattr(function, name, values or None)

    def _raising(self, label: str) -> Callable[..., Any]:
        def closed(*_: Any, **__: Any) -> Any:
            raise catch(self.loop, label, sys._getframe(1))

        return closed

    def _served(self, name: str) -> Callable[[], Any]:
        def calendar() -> float | int:
            frame = sys._getframe(1)
            if frame.f_globals.get("__name__") not in CALENDAR_READERS:
                raise catch(self.loop, f"time.{name}", frame)
            wall = self.loop.wall()
            return wall if name == "time" else int(wall * 1e9)

        return calendar

    def _seeding(self) -> Callable[..., None]:
        @functools.wraps(_SEED)
        def seed(generator: random.Random, a: Any = None, version: int = 2) -> None:
            if a is None:
                raise catch(self.loop, "random.Random() without a seed", sys._getframe(1))
            _SEED(generator, a, version)

        return seed

    def _calendar(self) -> type[datetime.datetime]:
        guard = self

        class Calendar(datetime.datetime):
            """Calendar time of the simulated host."""

            @classmethod
            def now(cls, tz: datetime.tzinfo | None = None) -> Any:
                """Return the host's calendar time."""
                frame = sys._getframe(1)
                if frame.f_globals.get("__name__") not in CALENDAR_READERS:
                    raise catch(guard.loop, "datetime.now", frame)
                moment = datetime.datetime.fromtimestamp(guard.loop.wall(), datetime.UTC)
                return moment.astimezone(tz) if tz is not None else moment.replace(tzinfo=None)

            utcnow = today = now

        return Calendar


_ABSENT = object()
_HERE = str(Path(__file__).parent)


def _where(frame: FrameType | None) -> str:
    """Return file and line of the first frame that is neither the standard library's nor the guard's."""
    first = frame
    while frame is not None and _is_library(frame.f_code.co_filename):
        frame = frame.f_back
    chosen = frame or first
    assert chosen is not None
    return f"{chosen.f_code.co_filename}:{chosen.f_lineno}"


_LIBRARY = str(Path(os.__file__).parent)


def _is_library(name: str) -> bool:
    return name == __file__ or name.startswith("<") or (name.startswith(_LIBRARY) and "site-packages" not in name)


def _our_modules() -> tuple[ModuleType, ...]:
    return tuple(m for name, m in list(sys.modules.items()) if name.startswith("holdfast.") and name != __name__)


@functools.lru_cache(maxsize=2)
def _borrowed(wanted: frozenset[int], modules: tuple[ModuleType, ...]) -> list[tuple[ModuleType, str, Any]]:
    """Find what our modules imported by name (``from time import monotonic``).

    Args:
        wanted: ids of the functions that are replaced.
        modules: where to look.
    """
    return [(m, name, value) for m in modules for name, value in vars(m).items() if id(value) in wanted]


@functools.lru_cache(maxsize=2)
def _defaulting(wanted: frozenset[int], modules: tuple[ModuleType, ...]) -> list[FunctionType]:
    """Find functions of ours with such a function as a default value (``clock=time.monotonic``)."""
    found = []
    for module in modules:
        for holder in [module, *(value for value in vars(module).values() if isinstance(value, type))]:
            for value in vars(holder).values():
                if isinstance(value, FunctionType) and value.__module__ == module.__name__:
                    values = [*(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values()]
                    if any(id(one) in wanted for one in values):
                        found.append(value)
    return found


def ensure_hash_seed(*, again: bool = True) -> None:
    """Make sure that strings hash the same in every process, so that no set of strings decides anything.

    Args:
        again: start this program anew with ``PYTHONHASHSEED=0`` when it is not pinned; otherwise only tell.

    Raises:
        RuntimeError: it is not pinned, and the program shall not be started anew.
    """
    if os.environ.get("PYTHONHASHSEED", "random") != "random":
        return
    if not again:
        raise RuntimeError("universes can be repeated in another process only with PYTHONHASHSEED=0 set for both")
    os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], {**os.environ, "PYTHONHASHSEED": "0"})


@contextlib.contextmanager
def forbidden(loop: Escapable) -> Iterator[None]:
    """Run a universe with the ways out closed; they are open again afterwards."""
    guard = _Guard(loop)
    try:
        guard.close_ways()
        yield
    finally:
        guard.open_ways()
