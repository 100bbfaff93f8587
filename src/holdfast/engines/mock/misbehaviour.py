"""How the mock engine misbehaves on command; the state of standing orders.

Must never act by itself: the engine asks at the places where a real one would fail.
"""

from __future__ import annotations

import os
import signal
from typing import Any, Literal, get_args

import msgspec

from holdfast.base.errors import EngineFailed, HoldfastError, InvalidRequest, WorkerSaturated

Kind = Literal[
    "crash", "freeze", "hang", "unhang", "die", "slow", "compile", "error", "abort", "refuse", "clear", "lose", "swap"
]  # fmt: skip
Counted = Literal["error", "abort", "refuse", "lose", "swap"]


class Order(msgspec.Struct, frozen=True):
    """One command: ``{"do": KIND, …}``.

    ``times``: how many sequences, submissions or hand-offs an order hits. ``factor``: how much
    longer every step takes from now on under ``slow`` (1 ends it). ``seconds``: how long a ``compile`` or a
    ``hang`` lasts (0: a hang without end). ``lose`` loses the blocks of the next hand-offs that are given or received,
    ``swap`` gives hand-offs that stand for other tokens. ``clear`` drops the cached KV blocks that nobody uses.
    """

    do: Kind
    times: int = 1
    factor: float = 1.0
    seconds: float = 0.0


def read_order(command: dict[str, Any]) -> Order:
    """Return the command in its checked form. Raises InvalidRequest naming what is wrong."""
    try:
        return msgspec.convert(command, Order)
    except msgspec.ValidationError as error:
        raise InvalidRequest(
            f"Not a command of the mock engine: {error}. 'do' is one of {', '.join(get_args(Kind))}."
        ) from error


class StandingOrders:
    """What was commanded and is still to happen."""

    def __init__(self) -> None:
        self.hung = False
        self.slow = 1.0
        self.compile_seconds = 0.0
        self._left = dict.fromkeys(get_args(Counted), 0)

    def give(self, order: Order) -> None:
        """Note an order that takes effect later; those with an instant effect are the engine's business."""
        if order.do == "slow":
            self.slow = max(order.factor, 0.0)
        elif order.do == "compile":
            self.compile_seconds += order.seconds
        elif order.do in self._left:
            self._left[order.do] = order.times

    def due(self, kind: Counted) -> bool:
        """Return whether this happens now, and count it."""
        if self._left[kind] <= 0:
            return False
        self._left[kind] -= 1
        return True

    @property
    def ends_ordered(self) -> bool:
        """Whether running sequences are to be ended."""
        return self._left["error"] > 0 or self._left["abort"] > 0


def kill_self() -> None:
    """Die at once, as a crash does. Never returns in practice."""
    os.kill(os.getpid(), signal.SIGKILL)


def stop_self() -> None:
    """Freeze the process until somebody sends SIGCONT."""
    os.kill(os.getpid(), signal.SIGSTOP)


def refusal() -> HoldfastError:
    """Return the error of a refusal on command."""
    return WorkerSaturated("The mock engine refuses on command.", layer="engine", knob="mock refuse")


def ordered_error() -> EngineFailed:
    """Return the error of a sequence that fails on command."""
    return EngineFailed("The mock engine fails this sequence on command.")
