"""The frontend process: wires discovery, pool, requests and HTTP together, drains on SIGTERM, exits.

Must never hold what belongs to one request.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import random
import signal
import time

import uvloop

from holdfast.base.errors import HoldfastError
from holdfast.base.ids import draw_instance_id
from holdfast.frontend.app import Frontend
from holdfast.frontend.config import FrontendConfig
from holdfast.frontend.metrics import FrontendMetrics
from holdfast.frontend.registry import ModelRegistry
from holdfast.frontend.server import Server, listen, make_server
from holdfast.frontend.sharing import SharedThresholds
from holdfast.models.store import ArtifactStore
from holdfast.requests.flusher import Flusher
from holdfast.requests.service import Services
from holdfast.runtime.detector import DetectorSettings
from holdfast.runtime.discovery.factory import open_discovery
from holdfast.runtime.inhibition import InhibitionSettings
from holdfast.runtime.pool import PoolSettings, WorkerPool
from holdfast.runtime.progress import HangSettings
from holdfast.runtime.transport import TcpTransport
from holdfast.telemetry.loop_delay import watch_loop
from holdfast.telemetry.spans import open_spans

log = logging.getLogger(__name__)

EXIT_CLEAN = 0
EXIT_CUT = 3
"""Some streams had to be ended when the grace period was over."""


def run(config: FrontendConfig) -> int:
    """Run a frontend until it is told to stop; returns the exit code."""
    return uvloop.run(serve(config))


async def serve(config: FrontendConfig) -> int:
    """Run a frontend on the present loop; returns the exit code.

    Raises:
        Conflict: the HTTP port is taken.
    """
    rng = random.SystemRandom()
    sock = listen(config.http_host, config.http_port)
    discovery = open_discovery(config.discovery_backend, root=config.file_kv)
    await discovery.start()
    caller = draw_instance_id(rng)
    flusher = Flusher(time.monotonic_ns)
    pool = WorkerPool(
        discovery,
        TcpTransport(),
        caller=caller,
        namespace=config.namespace,
        rng=rng,
        secret=config.secret.encode(),
        settings=PoolSettings(
            detector=DetectorSettings(
                freeze_after=config.freeze_after_secs, hang=HangSettings(floor=config.hang_floor_secs)
            ),
            inhibition=InhibitionSettings(duration=config.inhibited_duration_secs),
        ),
        on_read_done=flusher.flush,
    )
    metrics = FrontendMetrics(config.metrics)
    spans = open_spans(config.traces, "frontend", caller)
    services = Services(config.requests, pool, flusher, metrics, rng=rng, mode=config.router_mode)
    registry = ModelRegistry(pool, ArtifactStore())
    frontend = Frontend(config, services, pool, registry, metrics, spans=spans)
    shared = SharedThresholds(services.thresholds, discovery, config.namespace, rng)
    frontend.thresholds_changed = shared.changed
    server = make_server(frontend, config)
    try:
        await pool.start()
        async with asyncio.TaskGroup() as group:
            loading = group.create_task(registry.run())
            sharing = group.create_task(shared.run())
            looking = group.create_task(watch_loop(flusher.clock, metrics.loop_delay.observe, metrics.loop_stalls.inc))
            stopping = group.create_task(_await_signals(frontend, server, config))
            gc.collect()
            gc.freeze()
            host, port = sock.getsockname()[:2]
            log.info("frontend listens on http://%s:%d (router mode %s)", host, port, config.router_mode)
            await server.serve(sockets=[sock])
            loading.cancel()
            sharing.cancel()
            looking.cancel()
            stopping.cancel()
    finally:
        services.close()
        await frontend.close()
        with contextlib.suppress(HoldfastError):
            await pool.close()
        await discovery.close()
    return EXIT_CUT if frontend.cut else EXIT_CLEAN


async def _await_signals(frontend: Frontend, server: Server, config: FrontendConfig) -> None:
    """First signal: drain; second: hurry; third: now."""
    loop = asyncio.get_running_loop()
    signals: asyncio.Queue[int] = asyncio.Queue(maxsize=16)

    def caught(number: int) -> None:
        with contextlib.suppress(asyncio.QueueFull):
            signals.put_nowait(number)

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, caught, number)
    first = await signals.get()
    grace = config.http_graceful_shutdown_timeout_secs
    log.info("%s: draining; running streams have %g s", signal.Signals(first).name, grace)
    draining = asyncio.ensure_future(frontend.drain(grace))
    hurry = asyncio.ensure_future(signals.get())
    await asyncio.wait({draining, hurry}, return_when=asyncio.FIRST_COMPLETED)
    draining.cancel()
    hurry.cancel()
    frontend.end_all()
    server.should_exit = True
    await signals.get()
    log.warning("third signal: leaving at once")
    server.force_exit = True
