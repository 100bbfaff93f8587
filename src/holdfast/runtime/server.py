"""A worker's listener: admits callers, hands their calls to endpoints, notices when a caller is lost.

A caller is lost when its control connection breaks, or when nothing at all was heard from it for the silence
bound while our own event loop ran on time. Everything a caller could grow without end has a limit: connections,
greetings, uploads, streams, unsent tokens, write buffers. Must never know what an endpoint does.
"""

from __future__ import annotations

import asyncio
import logging
import random
from typing import Literal

import msgspec

from holdfast.base.errors import (
    CannotConnect,
    CapacityExhausted,
    HoldfastError,
    InternalError,
    InvalidRequest,
    WorkerFault,
)
from holdfast.base.limits import CALLERS_PER_WORKER, UNGREETED_CONNECTIONS
from holdfast.runtime.call import Call
from holdfast.runtime.served import ServedConnection
from holdfast.runtime.streams import CallHandler, PongSource, ServerConnection
from holdfast.runtime.transport import Listener, TcpTransport, Transport, is_loopback
from holdfast.runtime.upload import UploadStore
from holdfast.wire.frames import Hello, Load, Progress
from holdfast.wire.handshake import NONCE_BYTES
from holdfast.wire.worker import WorkerConnection

log = logging.getLogger(__name__)

CHECKS_PER_BOUND = 10
"""How often within the silence bound callers are looked at."""
LATE_FACTOR = 2.0
"""A check that comes after more than this many periods says nothing about callers: we were late ourselves."""


class ServerSettings(msgspec.Struct, frozen=True, omit_defaults=True):
    """How a worker treats its callers. Times are seconds."""

    silence_bound: float = 5.0
    """A caller from whom nothing came for so long is lost."""
    hello_timeout: float = 5.0
    """A connection that has not finished its handshake by then is closed."""
    upload_timeout: float = 30.0
    """An upload without a new piece for so long is given up."""
    insecure: bool = False
    """Listen off loopback although callers need not prove themselves."""


class _Session:
    """One caller: its control connection, perhaps a bulk connection, its uploads."""

    __slots__ = ("bulk", "control", "silent_checks", "uploads")

    def __init__(self, control: ServedConnection):
        self.control = control
        self.bulk: ServedConnection | None = None
        self.uploads = UploadStore()
        self.silent_checks = 0

    def take_heard(self) -> bool:
        heard = self.control.heard
        self.control.heard = False
        if self.bulk is not None:
            heard = heard or self.bulk.heard
            self.bulk.heard = False
        return heard


class WorkerServer:
    """Serves endpoints to callers over the wire protocol.

    Args:
        instance: this worker's id.
        epoch: this start of it.
        rng: for handshake nonces; `random.SystemRandom` in production.
        transport: the network; None: plain TCP.
        secret: shared secret that callers must prove to know; empty: none.
        settings: bounds.
        features: offered to callers.
    """

    def __init__(
        self,
        instance: str,
        epoch: int,
        *,
        rng: random.Random,
        transport: Transport | None = None,
        secret: bytes = b"",
        settings: ServerSettings | None = None,
        features: tuple[str, ...] = (),
    ):
        self.instance, self.epoch = instance, epoch
        self.address = ""
        """``host:port``, once started."""
        self.draining: tuple[str, int] | None = None
        self._rng, self._secret, self._features = rng, secret, features
        self._transport = transport if transport is not None else TcpTransport()
        self._settings = settings if settings is not None else ServerSettings()
        self._endpoints: dict[str, CallHandler] = {}
        self._pong_source: PongSource = _nothing_to_tell
        self._listener: Listener | None = None
        self._connections: dict[ServedConnection, None] = {}  # a set in order of arrival
        self._sessions: dict[str, _Session] = {}
        self._check_timer: asyncio.TimerHandle | None = None
        self._last_check = 0.0

    # -- what the worker does ------------------------------------------------------------------------

    async def start(self, host: str = "127.0.0.1", port: int = 0) -> str:
        """Listen and return ``host:port``; port 0 picks a free one.

        Raises:
            InvalidRequest: off loopback without a secret, mTLS or ``insecure``.
            CannotConnect: the address cannot be bound.
        """
        proved = self._secret or self._transport.authenticates_callers
        if not (is_loopback(host) or proved or self._settings.insecure):
            raise InvalidRequest(
                f"refusing to listen on {host}: anybody who can reach it could use this worker. Set a shared secret "
                "(DYN_WIRE_SECRET) here and at the frontends or, on an isolated network, say --insecure "
                "(DYN_WIRE_INSECURE).",
                param="host",
            )
        loop = asyncio.get_running_loop()
        self._listener = await self._transport.listen(host, port, lambda: ServedConnection(self, loop))
        self.address = self._listener.address
        self._last_check = loop.time()
        self._arm_check(loop)
        return self.address

    def register(self, endpoint: str, handler: CallHandler) -> None:
        """Serve an endpoint; registering again replaces the handler for calls to come."""
        self._endpoints[endpoint] = handler

    def unregister(self, endpoint: str) -> None:
        """Serve an endpoint no more; running calls go on."""
        self._endpoints.pop(endpoint, None)

    def set_pong_source(self, source: PongSource) -> None:
        """Where progress, load and state for pongs come from; called for every ping, so it must be quick."""
        self._pong_source = source

    @property
    def connections(self) -> list[ServerConnection]:
        """The control connections of all callers."""
        return [session.control for session in self._sessions.values()]

    @property
    def open_streams(self) -> int:
        """Streams of work that are not over, of all callers; what goes over bulk (files, KV events) is no work."""
        return sum(one.core.open_streams for one in self._connections if one.channel != "bulk")

    def drain(self, reason: str, remaining_ms: int) -> None:
        """Tell every caller, present and future, that nothing is accepted any more; running streams go on."""
        self.draining = (reason, remaining_ms)
        for connection in list(self._connections):
            connection.core.drain(reason, remaining_ms)

    async def close(self) -> None:
        """Stop listening and close every connection; streams still open are stopped. Idempotent."""
        if self._check_timer is not None:
            self._check_timer.cancel()
            self._check_timer = None
        listener, self._listener = self._listener, None
        if listener is not None:
            await listener.close()
        for connection in list(self._connections):
            connection.close()

    # -- what connections ask (`served.ServerSide`) --------------------------------------------------

    def greet(self, connection: ServedConnection) -> WorkerConnection:
        """A connection was made: return its state machine, which is closed when there are too many already."""
        core = WorkerConnection(
            self.instance,
            self.epoch,
            connection.stopped,
            secret=self._secret,
            nonce=self._rng.randbytes(NONCE_BYTES) if self._secret else b"",
            features=self._features,
            make_stream=lambda frame: Call(frame, connection),
        )
        ungreeted = len(self._connections) - sum(1 if s.bulk is None else 2 for s in self._sessions.values())
        self._connections[connection] = None
        if ungreeted >= UNGREETED_CONNECTIONS:
            core.turn_away(_too_many("UNGREETED_CONNECTIONS", UNGREETED_CONNECTIONS, ungreeted))
            return core
        loop = asyncio.get_running_loop()
        connection.greeting_timer = loop.call_later(self._settings.hello_timeout, self._not_greeted, connection)
        return core

    def _not_greeted(self, connection: ServedConnection) -> None:
        log.warning("a connection was closed: no handshake within %g s", self._settings.hello_timeout)
        connection.abort()

    def joined(self, connection: ServedConnection, hello: Hello) -> None:
        """The caller has proved itself: welcome it or turn it away."""
        try:
            session = self._control_joined(connection) if hello.channel == "control" else self._bulk_joined(connection)
        except HoldfastError as error:
            connection.core.turn_away(error)
            return
        if connection.greeting_timer is not None:
            connection.greeting_timer.cancel()
            connection.greeting_timer = None
        connection.uploads = session.uploads
        connection.core.join()
        if self.draining is not None:
            connection.core.drain(*self.draining)

    def _control_joined(self, connection: ServedConnection) -> _Session:
        known = self._sessions.get(connection.caller)
        if known is not None:
            log.warning("caller %s connected again; its old connection is closed", connection.caller)
            known.control.abort()
        if len(self._sessions) >= CALLERS_PER_WORKER:
            raise _too_many("CALLERS_PER_WORKER", CALLERS_PER_WORKER, len(self._sessions))
        session = self._sessions[connection.caller] = _Session(connection)
        return session

    def _bulk_joined(self, connection: ServedConnection) -> _Session:
        session = self._sessions.get(connection.caller)
        if session is None:
            raise CannotConnect("a bulk connection needs the same caller's control connection first")
        if session.bulk is not None:
            session.bulk.abort()
        session.bulk = connection
        return session

    def opened(self, call: Call) -> None:
        """A call has its payload: hand it to its endpoint. What the handler raises refuses the call."""
        handler = self._endpoints.get(call.endpoint)
        if handler is None:
            call.refuse(
                WorkerFault(
                    f"this worker has no endpoint {call.endpoint[:100]!r}",
                    worker=self.instance,
                    endpoints=sorted(self._endpoints),
                )
            )
            return
        try:
            handler(call)
        except HoldfastError as error:
            call.refuse(error)
        except Exception as error:
            log.exception("the handler of endpoint %r raised", call.endpoint)
            call.refuse(InternalError(f"the endpoint's handler raised {type(error).__name__}", worker=self.instance))

    def pong_facts(self) -> tuple[Progress, Load, str]:
        """What goes into a pong. A source that raises is logged and leaves the counters empty."""
        try:
            progress, load, state = self._pong_source()
        except Exception:
            log.exception("the source of pong facts raised")
            return Progress(), Load(), "failed"
        return progress, load, state

    def gone(self, connection: ServedConnection) -> None:
        """The connection is lost; its streams have been told. With control, bulk goes too."""
        self._connections.pop(connection, None)
        if connection.greeting_timer is not None:
            connection.greeting_timer.cancel()
        session = self._sessions.get(connection.caller)
        if session is None:
            return
        if session.bulk is connection:
            session.bulk = None
        elif session.control is connection:
            del self._sessions[connection.caller]
            if session.bulk is not None:
                session.bulk.abort()

    # -- silence -------------------------------------------------------------------------------------

    def _arm_check(self, loop: asyncio.AbstractEventLoop) -> None:
        period = self._settings.silence_bound / CHECKS_PER_BOUND
        self._check_timer = loop.call_later(period, self._check)

    def _check(self) -> None:
        loop = asyncio.get_running_loop()
        now = loop.time()
        period = self._settings.silence_bound / CHECKS_PER_BOUND
        on_time = now - self._last_check <= LATE_FACTOR * period
        self._last_check = now
        self._arm_check(loop)
        for session in list(self._sessions.values()):
            if session.take_heard():
                session.silent_checks = 0
            elif on_time:
                session.silent_checks += 1
            if on_time:
                session.uploads.tick(int(self._settings.upload_timeout / period))
            if session.silent_checks >= CHECKS_PER_BOUND:
                self._lost_in_silence(session)

    def _lost_in_silence(self, session: _Session) -> None:
        log.warning(
            "caller %s was silent for %g s: its %d streams are stopped",
            session.control.caller,
            self._settings.silence_bound,
            session.control.core.open_streams,
        )
        session.control.abort()


def _too_many(limit: str, threshold: int, actual: int) -> CapacityExhausted:
    return CapacityExhausted(
        f"this worker has {actual} connections of that kind; at most {threshold} ({limit})",
        limit=limit,
        threshold=threshold,
        actual=actual,
    )


def _nothing_to_tell() -> tuple[Progress, Load, Literal["ready"]]:
    return Progress(), Load(), "ready"
