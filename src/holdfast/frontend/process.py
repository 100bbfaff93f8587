"""The frontend process: gives an assembled frontend its port, clocks and signals, drains on SIGTERM, exits.

Must never hold what belongs to one request.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import socket
import time

import uvloop

from holdfast.base.randomness import BlockRandom
from holdfast.frontend.app import Frontend
from holdfast.frontend.assembly import Assembled
from holdfast.frontend.config import FrontendConfig
from holdfast.frontend.drain import Drain
from holdfast.frontend.server import Server, allow_files, inherited, listen, make_server
from holdfast.health.status import StatusServer
from holdfast.routing.absent import without_effect
from holdfast.runtime.discovery.factory import open_discovery
from holdfast.runtime.tls import open_transport
from holdfast.runtime.tls_renewal import Renewal
from holdfast.telemetry.loop_delay import watch_loop
from holdfast.telemetry.spans import open_spans

log = logging.getLogger(__name__)

EXIT_CLEAN = 0
EXIT_CUT = 3
"""Some streams had to be ended when the grace period was over."""


GC_THRESHOLDS = (10_000, 20, 50)
"""New objects until the collector looks at them, and how often the older ones have their turn. Requests leave no
cycles, so that a look finds nothing; with Python's own 700 every burst of a dozen requests would cause one."""
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
    rng = BlockRandom()
    allow_files(config.http_max_connections)
    own = listen(config.http_host, config.http_port, reuse_port=config.http_reuse_port)
    common = inherited(config.http_listen_fd) if config.http_listen_fd >= 0 else None
    discovery = open_discovery(config.discovery_backend, root=config.file_kv)
    await discovery.start()
    renewal = Renewal()
    assembled = Assembled(
        config,
        discovery=discovery,
        transport=open_transport(config.tls, serves=False, renewal=renewal),
        rng=rng,
        clock=time.monotonic_ns,
        make_spans=lambda caller: open_spans(config.traces, "frontend", caller),
    )
    frontend, metrics = assembled.app, assembled.metrics
    status = StatusServer(
        config.system, metrics=metrics.source.render, refresh=frontend.gauges.refresh, judge=frontend.verdict
    )
    status.start()
    server = make_server(frontend, config, renewal)
    try:
        await assembled.start(status.address)
        async with asyncio.TaskGroup() as group:
            running = group.create_task(assembled.run())
            stopwatch = assembled.flusher.clock
            looking = group.create_task(watch_loop(stopwatch, metrics.loop_delay.observe, metrics.loop_stalls.inc))
            renewing = group.create_task(renewal.run())
            stopping = group.create_task(Drain(frontend, server, config).on_signals())
            gc.collect()
            gc.freeze()
            gc.set_threshold(*GC_THRESHOLDS)
            joining = group.create_task(_join(frontend, server, own if config.http_reuse_port else common))
            status.arm()
            host, port = own.getsockname()[:2]
            scheme = config.https.scheme
            for warning in without_effect(config.requests.router):
                log.warning("%s", warning)
            log.info("frontend listens on %s://%s:%d (router mode %s)", scheme, host, port, config.router_mode)
            await server.serve(sockets=[own] if not config.http_reuse_port else [])
            joining.cancel()
            running.cancel()
            looking.cancel()
            renewing.cancel()
            stopping.cancel()
    finally:
        status.close()
        await assembled.close()
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
    log.info("frontend takes connections from the shared port %s:%d", host, port)
