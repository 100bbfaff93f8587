"""The public Python interface: serve an endpoint in a few lines, call it from anywhere.

::

    async def main(runtime):                                  # a worker
        endpoint = runtime.namespace("hello").component("backend").endpoint("generate")
        await endpoint.serve_endpoint(handler)                # until the process is told to stop

    client = await runtime.endpoint("hello.backend.generate").client()
    async for item in await client.generate({"name": "you"}, context=Context("id")):
        ...

Must never hold logic of its own beyond tying server, discovery and pool together.
"""

from __future__ import annotations

import asyncio
import logging
import os
import random
import signal
from collections.abc import Awaitable, Callable
from typing import Any

from holdfast.base.errors import HoldfastError, InvalidRequest
from holdfast.base.ids import draw_epoch, draw_instance_id
from holdfast.runtime.advertise import needs_finding, published_address
from holdfast.runtime.client import ACCEPT_SECONDS, Client, ResponseStream, RouterMode
from holdfast.runtime.context import Context
from holdfast.runtime.discovery.contract import Discovery, InstanceRecord
from holdfast.runtime.discovery.factory import open_discovery
from holdfast.runtime.pool import WorkerPool
from holdfast.runtime.server import ServerSettings, WorkerServer
from holdfast.runtime.serving import EndpointServer, GenerateHandler
from holdfast.runtime.transport import TcpTransport, Transport

log = logging.getLogger(__name__)

__all__ = [
    "Client",
    "Component",
    "Context",
    "DistributedRuntime",
    "Endpoint",
    "Namespace",
    "ResponseStream",
    "run",
]

GRACE_SECONDS = 30.0
"""How long running calls may go on after `DistributedRuntime.shutdown`."""
STOP_GRACE_SECONDS = 2.0
"""How long a handler may take to end after its caller stopped it."""
MAX_CALLS = 1_024
"""Calls of one endpoint at once."""
WITHDRAW_SECONDS = 5.0
"""Bound on leaving discovery."""


class DistributedRuntime:
    """One process as a member of the fleet: what it serves, and whom it can call.

    Args:
        discovery: a backend's name (see `open_discovery`), or a participant of one's own.
        transport: the network; None: TCP.
        rng: for ids, nonces and random choice; None: the operating system's.
        secret: shared by the fleet; empty: none.
        host: where endpoints listen.
        port: 0 picks a free one.
        insecure: listen off loopback although callers need not prove themselves.
        advertise: address that callers shall use instead of the bound one; see `advertise.published_address`.
    """

    def __init__(
        self,
        discovery: str | Discovery = "",
        *,
        transport: Transport | None = None,
        rng: random.Random | None = None,
        secret: bytes = b"",
        host: str = "127.0.0.1",
        port: int = 0,
        insecure: bool = False,
        advertise: str = "",
    ):
        self._rng = rng if rng is not None else random.SystemRandom()
        self._discovery = open_discovery(discovery) if isinstance(discovery, str) else discovery
        self._transport = transport if transport is not None else TcpTransport()
        self._secret = secret
        self._listen = (host, port)
        self._advertise = advertise
        self._address = ""
        self.instance = draw_instance_id(self._rng)
        self._epoch = draw_epoch(self._rng)
        self.server = WorkerServer(
            self.instance,
            self._epoch,
            rng=self._rng,
            transport=self._transport,
            secret=secret,
            settings=ServerSettings(insecure=insecure),
        )
        self._pool: WorkerPool | None = None
        self._served: dict[str, EndpointServer] = {}
        self._ever_served: list[tuple[EndpointServer, bool]] = []
        self._component: tuple[str, str] | None = None
        self._starting = asyncio.Lock()
        self._discovering = False
        self._leaving = False
        self._finished = asyncio.Event()

    def namespace(self, name: str) -> Namespace:
        """Return a namespace."""
        return Namespace(self, name)

    def endpoint(self, path: str) -> Endpoint:
        """Return the endpoint at ``namespace.component.endpoint``, with or without ``dyn://`` in front."""
        parts = path.removeprefix("dyn://").split(".")
        if len(parts) != 3 or not all(parts):
            raise InvalidRequest(f"{path!r} is not namespace.component.endpoint", param="path")
        return self.namespace(parts[0]).component(parts[1]).endpoint(parts[2])

    async def __aenter__(self) -> DistributedRuntime:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.shutdown(0.0)

    # -- serving -------------------------------------------------------------------------------------

    async def serve(self, endpoint: Endpoint, server: EndpointServer, *, graceful: bool) -> None:
        """Serve until shutdown; see `Endpoint.serve_endpoint`."""
        component = (endpoint.component.namespace.name, endpoint.component.name)
        if self._component not in (None, component):
            raise InvalidRequest(
                f"this runtime serves component {'.'.join(self._component or ())}; one runtime has one component",
                param="component",
            )
        if endpoint.name in self._served:
            raise InvalidRequest(f"endpoint {endpoint.path} is served already", param="endpoint")
        self._component = component
        async with self._starting:
            await self._discover()
            if not self.server.address:
                self._address = await self.server.start(*self._listen)
                if needs_finding(self._listen[0], self._advertise):
                    self._address = await asyncio.to_thread(published_address, self._address, self._advertise)
            self._served[endpoint.name] = server
            self._ever_served.append((server, graceful))
            self.server.register(endpoint.name, server.serve)
            await self._publish()
        log.info("endpoint %s is served at %s by instance %s", endpoint.path, self.server.address, self.instance)
        try:
            await self._finished.wait()
        finally:
            if not self._leaving:
                await self.unserve(endpoint.name)

    async def unserve(self, name: str) -> None:
        """Take one endpoint out of discovery and accept nothing for it; its running calls go on."""
        if self._served.pop(name, None) is not None:
            self.server.unregister(name)
            await self._publish()

    async def _publish(self) -> None:
        assert self._component is not None
        namespace, component = self._component
        await self._discovery.publish(
            InstanceRecord(
                namespace=namespace,
                component=component,
                endpoints=tuple(sorted(self._served)),
                instance=self.instance,
                epoch=self._epoch,
                address=self._address,
                pid=os.getpid(),
            )
        )

    # -- calling -------------------------------------------------------------------------------------

    async def pool(self) -> WorkerPool:
        """Return the workers that this process can reach, watched from the first call on."""
        async with self._starting:
            await self._discover()
            if self._pool is None:
                caller = f"runtime-{self.instance}"
                pool = WorkerPool(self._discovery, self._transport, caller=caller, rng=self._rng, secret=self._secret)
                await pool.start()
                self._pool = pool
        return self._pool

    async def _discover(self) -> None:
        if not self._discovering:
            await self._discovery.start()
            self._discovering = True

    @property
    def rng(self) -> random.Random:
        """The source of randomness."""
        return self._rng

    # -- leaving -------------------------------------------------------------------------------------

    async def shutdown(self, grace: float = GRACE_SECONDS) -> None:
        """Leave discovery, accept nothing more, let running calls go on for ``grace`` seconds, then end them.

        Calls of endpoints served with ``graceful_shutdown=False`` end at once. Callers of calls that are cut off
        get `WorkerDraining`. Idempotent; `serve_endpoint` returns at the end.
        """
        if self._leaving:
            await self._finished.wait()
            return
        self._leaving = True
        try:
            if self._ever_served:
                await self._leave(grace)
            await self.server.close()
            if self._pool is not None:
                await self._pool.close()
            if self._discovering:
                await self._bounded(self._discovery.close())
        finally:
            self._finished.set()

    async def _leave(self, grace: float) -> None:
        await self._bounded(self._discovery.withdraw(self.instance))
        self.server.drain("shutdown", int(grace * 1000))
        for server, graceful in self._ever_served:
            if not graceful:
                await server.cancel()
        await asyncio.gather(*(server.drained(grace) for server, _ in self._ever_served))
        for server, _ in self._ever_served:
            if server.active:
                log.warning("shutdown: %d calls of endpoint %s are cut off", server.active, server.name)
            await server.cancel()

    async def _bounded(self, step: Awaitable[None]) -> None:
        try:
            async with asyncio.timeout(WITHDRAW_SECONDS):
                await step
        except (TimeoutError, HoldfastError) as error:
            log.warning("leaving discovery did not work: %s", error or "timed out")


class Namespace:
    """A set of components that belong together."""

    def __init__(self, runtime: DistributedRuntime, name: str):
        self.runtime = runtime
        self.name = _checked(name, "namespace")

    def component(self, name: str) -> Component:
        """Return a component of this namespace."""
        return Component(self, name)


class Component:
    """A role in a namespace, played by any number of instances."""

    def __init__(self, namespace: Namespace, name: str):
        self.namespace = namespace
        self.name = _checked(name, "component")

    def endpoint(self, name: str) -> Endpoint:
        """Return an endpoint of this component."""
        return Endpoint(self, name)


class Endpoint:
    """Something that instances of a component can be asked for."""

    def __init__(self, component: Component, name: str):
        self.component = component
        self.name = _checked(name, "endpoint")
        self._runtime = component.namespace.runtime

    @property
    def path(self) -> str:
        """``namespace.component.endpoint``."""
        return f"{self.component.namespace.name}.{self.component.name}.{self.name}"

    async def serve_endpoint(
        self,
        handler: GenerateHandler,
        graceful_shutdown: bool = True,
        *,
        max_calls: int = MAX_CALLS,
        stop_grace: float = STOP_GRACE_SECONDS,
    ) -> None:
        """Serve until the runtime shuts down.

        Args:
            handler: an async generator ``(request)`` or ``(request, context)`` of JSON-like items. After a stop
                whatever it yields goes nowhere, and ``stop_grace`` later it is cancelled; a killed call is
                cancelled at once. A typed error that it raises reaches the caller as it is.
            graceful_shutdown: whether running calls may go on during shutdown.
            max_calls: calls at once; more are refused ``elsewhere``.
            stop_grace: seconds.

        Raises:
            InvalidRequest: served already, another component, or not allowed to listen there.
        """
        server = EndpointServer(self.path, handler, max_calls=max_calls, stop_grace=stop_grace)
        await self._runtime.serve(self, server, graceful=graceful_shutdown)

    async def unregister_endpoint_instance(self) -> None:
        """Accept nothing more here without leaving: running calls go on."""
        await self._runtime.unserve(self.name)

    async def client(
        self, router_mode: RouterMode = "round_robin", *, accept_timeout: float = ACCEPT_SECONDS
    ) -> Client:
        """Return a client of this endpoint; use `Client.wait_for_instances` before the first call."""
        path = (self.component.namespace.name, self.component.name, self.name)
        pool = await self._runtime.pool()
        return Client(pool, path, self._runtime.rng, router_mode=router_mode, accept_timeout=accept_timeout)


def _checked(name: str, what: str) -> str:
    if not name or "." in name or "/" in name:
        raise InvalidRequest(f"{name!r} cannot name a {what}: it must not be empty or hold '.' or '/'", param=what)
    return name


def run(main: Callable[[DistributedRuntime], Awaitable[Any]], **options: Any) -> None:
    """Run ``main(runtime)`` to its end; SIGINT and SIGTERM shut the runtime down in order.

    Args:
        main: gets the runtime; a worker's ends when `Endpoint.serve_endpoint` returns.
        options: for `DistributedRuntime`.
    """
    asyncio.run(_run(main, options))


async def _run(main: Callable[[DistributedRuntime], Awaitable[Any]], options: dict[str, Any]) -> None:
    runtime = DistributedRuntime(**options)
    loop = asyncio.get_running_loop()
    told = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, told.set)
    body = asyncio.ensure_future(main(runtime))
    leave = asyncio.ensure_future(told.wait())
    try:
        await asyncio.wait([body, leave], return_when=asyncio.FIRST_COMPLETED)
        await runtime.shutdown(GRACE_SECONDS if told.is_set() else 0.0)
        if not runtime.server.address:
            body.cancel()
        await asyncio.wait([body], timeout=STOP_GRACE_SECONDS)
    finally:
        leave.cancel()
        body.cancel()
    if body.done() and not body.cancelled():
        body.result()
