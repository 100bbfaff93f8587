"""The thread pool of a simulated process: its work is done inline, in a callback of the lane that asked for it.

Must never start a thread, and never decide when the work is done; that is `loop`'s business.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

WORK_SECONDS = 2e-3
"""A function that is given to the thread pool is through within this."""
WORK_STEPS = 256
"""How many different times it may take."""


def work_inline(
    loop: asyncio.AbstractEventLoop, future: asyncio.Future[Any], func: Callable[..., Any], args: tuple[Any, ...]
) -> None:
    """Run a function as if a thread had done it by now, and tell whoever waits for it."""
    if future.cancelled():
        return
    asyncio._set_running_loop(None)  # a thread has no running loop
    try:
        result = func(*args)
    except BaseException as error:
        if isinstance(error, (SystemExit, KeyboardInterrupt)):
            raise
        future.set_exception(error)
    else:
        future.set_result(result)
    finally:
        asyncio._set_running_loop(loop)
