"""An asyncio loop whose clock jumps to the next timer instead of waiting for it.

Only for tests without real I/O: a test of ten minutes takes as long as its callbacks compute.
"""

from __future__ import annotations

import asyncio
import functools
import selectors
from collections.abc import Callable, Coroutine
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")
START = 1_000.0


class Stuck(AssertionError):
    """Nothing is scheduled and nobody could ever wake the loop."""


class _Jumping(selectors.DefaultSelector):  # type: ignore[valid-type,misc]
    """Returns what is ready; when nothing is, lets the loop's clock jump by the timeout."""

    loop: VirtualLoop

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        ready: list[tuple[selectors.SelectorKey, int]] = super().select(0)
        if not ready:
            if timeout is None:
                raise Stuck("every task waits for something that nobody will do")
            self.loop.now += max(0.0, timeout)
        return ready


class VirtualLoop(asyncio.SelectorEventLoop):
    """See the module. ``now`` may be moved forward by a test to play a process that was stopped."""

    def __init__(self) -> None:
        self.now = START
        selector = _Jumping()
        selector.loop = self
        super().__init__(selector)

    def time(self) -> float:
        return self.now


def virtual(test: Callable[P, Coroutine[Any, Any, T]]) -> Callable[P, T]:
    """Run an async test on a loop of its own with virtual time."""

    @functools.wraps(test)
    def run(*args: P.args, **kwargs: P.kwargs) -> T:
        with asyncio.Runner(loop_factory=VirtualLoop) as runner:
            return runner.run(test(*args, **kwargs))

    return run


def jump(seconds: float) -> None:
    """Let time pass without running anything: the process was stopped."""
    loop = asyncio.get_running_loop()
    assert isinstance(loop, VirtualLoop)
    loop.now += seconds
