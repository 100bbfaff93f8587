"""Processes that stand still, or get little time: SIGSTOP and SIGCONT, once or many times a second.

Must never leave a process stopped: whoever begins ends, also when cancelled.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import Callable

PERIOD = 0.05
"""Seconds of one turn of a slowed process: it runs for a part of it and stands still for the rest."""


def send(pid: int, number: signal.Signals) -> bool:
    """Send a signal; returns whether the process was there."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)
        return True
    return False


async def frozen(pid: int, seconds: float) -> None:
    """Stop a process for so long."""
    send(pid, signal.SIGSTOP)
    try:
        await asyncio.sleep(seconds)
    finally:
        send(pid, signal.SIGCONT)


async def slowed(pid: int, factor: float, seconds: float, alive: Callable[[], bool] = lambda: True) -> None:
    """Let a process run for a ``factor``-th of the time only.

    Args:
        pid: of the process.
        factor: how many times as long everything takes.
        seconds: for how long.
        alive: whether it still is the same process; it is left alone as soon as it is not.
    """
    loop = asyncio.get_running_loop()
    until = loop.time() + seconds
    try:
        while loop.time() < until and alive():
            send(pid, signal.SIGCONT)
            await asyncio.sleep(PERIOD / factor)
            if not alive() or not send(pid, signal.SIGSTOP):
                return
            await asyncio.sleep(PERIOD - PERIOD / factor)
    finally:
        if alive():
            send(pid, signal.SIGCONT)
