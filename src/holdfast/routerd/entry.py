"""A router as a process of its own: the event loop and signals around one `RouterProcess`.

Must never hold what belongs to the router itself.
"""

from __future__ import annotations

import asyncio
import gc
import signal
import time

from holdfast.base.randomness import BlockRandom
from holdfast.health.fairness import let_threads_in
from holdfast.routerd.config import RouterConfig
from holdfast.routerd.process import RouterProcess
from holdfast.runtime.discovery.factory import open_discovery


def run(config: RouterConfig) -> int:
    """Run a router until SIGTERM or SIGINT (a second one hurries); returns the exit code."""
    import uvloop  # noqa: PLC0415  only the process itself needs it

    let_threads_in()
    return uvloop.run(serve(config))


async def serve(config: RouterConfig) -> int:
    """Run a router on the present loop; returns the exit code."""
    discovery = open_discovery(config.discovery_backend, root=config.file_kv)
    router = RouterProcess(config, discovery, BlockRandom(), clock=time.monotonic_ns)
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, router.stop)
    gc.collect()
    gc.freeze()
    return await router.run()
