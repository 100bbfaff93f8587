"""The frontend process: wires discovery, pool, requests and HTTP together, drains on SIGTERM, exits.

Must never hold what belongs to one request.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import random
import socket
import time

import uvloop

from holdfast.base.errors import HoldfastError
from holdfast.base.ids import draw_instance_id
from holdfast.frontend.app import Frontend
from holdfast.frontend.config import FrontendConfig
from holdfast.frontend.drain import Drain
from holdfast.frontend.metrics import FrontendMetrics
from holdfast.frontend.registry import ModelRegistry
from holdfast.frontend.server import Server, allow_files, inherited, listen, make_server
from holdfast.frontend.sharing import SharedThresholds
from holdfast.health.status import StatusServer
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


JOIN_SECONDS = 10.0
"""A frontend that shares a port takes connections after this, even if it has found no worker yet."""
_JOIN_POLL = 0.01


def run(config: FrontendConfig) -> int:
    """Run a frontend until it is told to stop; returns the exit code."""
    return uvloop.run(serve(config))


async def serve(config: FrontendConfig) -> int:
    """Run a frontend on the present loop; returns the exit code.

    Raises:
        Conflict: the HTTP port is taken.
    """
    rng = random.SystemRandom()
    allow_files(config.http_max_connections)
    own = listen(config.http_host, config.http_port, reuse_port=config.http_reuse_port)
    common = inherited(config.http_listen_fd) if config.http_listen_fd >= 0 else None
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
    status = StatusServer(
        config.system, metrics=metrics.source.render, refresh=frontend.gauges.refresh, judge=frontend.verdict
    )
    status.start()
    shared = SharedThresholds(services.thresholds, discovery, config.namespace, rng, system_address=status.address)
    frontend.thresholds_changed = shared.changed
    server = make_server(frontend, config)
    try:
        await pool.start()
        async with asyncio.TaskGroup() as group:
            loading = group.create_task(registry.run())
            sharing = group.create_task(shared.run())
            looking = group.create_task(watch_loop(flusher.clock, metrics.loop_delay.observe, metrics.loop_stalls.inc))
            stopping = group.create_task(Drain(frontend, server, config).on_signals())
            gc.collect()
            gc.freeze()
            joining = group.create_task(_join(frontend, server, own if config.http_reuse_port else common))
            status.arm()
            host, port = own.getsockname()[:2]
            log.info("frontend listens on http://%s:%d (router mode %s)", host, port, config.router_mode)
            await server.serve(sockets=[own] if not config.http_reuse_port else [])
            joining.cancel()
            loading.cancel()
            sharing.cancel()
            looking.cancel()
            stopping.cancel()
    finally:
        status.close()
        services.close()
        await frontend.close()
        with contextlib.suppress(HoldfastError):
            await pool.close()
        await discovery.close()
    return EXIT_CUT if frontend.cut else EXIT_CLEAN


async def _join(frontend: Frontend, server: Server, sock: socket.socket | None) -> None:
    """Accept from a port that other frontends share, once what discovery lists can be served here too.

    Until then clients are better off with the others. After a while it joins all the same: if nothing can be served
    anywhere, clients shall be told so.
    """
    if sock is None:
        return
    loop = asyncio.get_running_loop()
    until = loop.time() + JOIN_SECONDS
    while not (server.started and (frontend.ready or loop.time() >= until)):  # noqa: ASYNC110  rooms below have no event
        await asyncio.sleep(_JOIN_POLL)
    await server.accept_on(sock)
    host, port = sock.getsockname()[:2]
    log.info("frontend takes connections from the shared port http://%s:%d", host, port)
