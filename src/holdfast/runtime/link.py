"""A caller's link to one worker: a control connection and, once it is needed, a bulk connection.

Streams, pings and tokens use control; payloads over `limits.INLINE_PAYLOAD_BYTES` and whole streams of bulk data
use the other one, so that they never delay a token. Must never decide whether the worker is healthy: it reports
(`last_heard`, `on_pong`, `on_lost`) and does what it is told (`abandon`, `close`).
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable

from holdfast.base.errors import CannotConnect, Disconnected, HoldfastError
from holdfast.base.limits import INLINE_PAYLOAD_BYTES
from holdfast.runtime.channel import Channel
from holdfast.runtime.streams import StreamHandle, StreamHandler
from holdfast.runtime.transport import Transport
from holdfast.runtime.upload import UploadSender
from holdfast.wire.caller import CallerConnection
from holdfast.wire.caller_stream import CallerStream
from holdfast.wire.frames import OLDEST_VERSION, VERSION, Draining, Hello, OpenHeaders, Pong, Welcome
from holdfast.wire.handshake import NONCE_BYTES

log = logging.getLogger(__name__)

KEEPALIVE_SECONDS = 1.0
"""A link that has sent nothing for so long pings, so that its worker knows that it is there."""
KEEPALIVE_UNANSWERED = 64
"""Unanswered keepalive pings after which no more are sent."""


class Link:
    """One worker as a caller reaches it. Use once: after it is lost or closed make a new one.

    Args:
        transport: how to connect.
        address: ``host:port`` of the worker.
        caller: a name for this process in workers' logs; the link adds random digits.
        rng: for the link's id and handshake nonces; `random.SystemRandom` in production.
        secret: shared secret; empty: none.
        instance: whom we expect there; empty: anybody.
        epoch: which start of it; 0: any.
        keepalive: seconds without sending after which the link pings by itself; None: the owner pings.
        versions: oldest and newest protocol version to offer.
    """

    def __init__(
        self,
        transport: Transport,
        address: str,
        *,
        caller: str,
        rng: random.Random,
        secret: bytes = b"",
        instance: str = "",
        epoch: int = 0,
        features: tuple[str, ...] = (),
        keepalive: float | None = KEEPALIVE_SECONDS,
        versions: tuple[int, int] = (OLDEST_VERSION, VERSION),
    ):
        self.address = address
        self.caller = f"{caller}/{rng.getrandbits(32):08x}"
        self.welcome: Welcome | None = None
        self.draining: Draining | None = None
        self.last_heard = 0.0
        """Loop time at which the last byte came, on either connection."""
        self.on_pong: Callable[[Pong], None] | None = None
        self.on_draining: Callable[[Draining], None] | None = None
        self.on_lost: Callable[[HoldfastError], None] | None = None
        """Called once, after every stream was told, unless the link was closed by `close`."""
        self.on_read_done: Callable[[], None] | None = None
        """Called after all frames of one read went to their handlers."""
        self._transport = transport
        self._rng, self._secret = rng, secret
        self._versions = versions
        self._expected = (instance, epoch)
        self._features = features
        self._keepalive = keepalive
        self._keepalive_timer: asyncio.TimerHandle | None = None
        self._keepalive_pings: set[int] = set()
        self._control: Channel | None = None
        self._bulk: Channel | None = None
        self._bulk_connecting: asyncio.Task[None] | None = None
        self._bulk_error: HoldfastError | None = None
        self._uploads = UploadSender()
        self._uploading: dict[int, CallerStream] = {}
        self._timeout = 0.0
        self._closed = False

    # -- state ---------------------------------------------------------------------------------------

    @property
    def connected(self) -> bool:
        """Whether streams can be opened, unless the worker is draining."""
        return self._control is not None and self._control.core.state in ("ready", "draining")

    @property
    def peer(self) -> str:
        """The worker's instance id, or its address before the welcome."""
        return self.welcome.instance if self.welcome is not None else self._expected[0] or self.address

    @property
    def streams(self) -> int:
        """Open streams of work; what goes over bulk (files, KV events) is none."""
        return 0 if self._control is None else self._control.core.open_streams

    @property
    def late_frames(self) -> int:
        """Frames and entries that came for streams that were over already."""
        return sum(channel.core.late_frames for channel in self._channels())

    def _channels(self) -> list[Channel]:
        return [channel for channel in (self._control, self._bulk) if channel is not None]

    # -- connecting ----------------------------------------------------------------------------------

    async def connect(self, timeout: float) -> Welcome:  # noqa: ASYNC109
        """Connect control and shake hands within ``timeout`` seconds; bulk connections get as long later.

        Raises:
            CannotConnect: not reachable, no welcome in time; `WrongInstance`, `VersionMismatch`, `SecretMismatch`.
            WorkerDraining, CapacityExhausted: the worker takes no more callers.
            Disconnected, ProtocolViolation: the connection broke while shaking hands.
        """
        self._timeout = timeout
        self._control = await self._connect_channel("control")
        self.welcome = self._control.greeted.result()
        self.last_heard = asyncio.get_running_loop().time()
        self._arm_keepalive()
        return self.welcome

    async def _connect_channel(self, name: str) -> Channel:
        loop = asyncio.get_running_loop()
        started = loop.time()
        instance, epoch = self._expected
        if self.welcome is not None:
            instance, epoch = self.welcome.instance, self.welcome.epoch
        nonce = self._rng.randbytes(NONCE_BYTES) if self._secret else b""
        hello = Hello(*self._versions, self.caller, name, instance, epoch, self._features, nonce)
        channel = Channel(self, name, CallerConnection(hello, self._secret), loop)
        await self._transport.connect(self.address, lambda: channel, self._timeout)
        try:
            async with asyncio.timeout(started + self._timeout - loop.time()):
                await channel.greeted
        except TimeoutError:
            channel.abort()
            raise CannotConnect(
                f"worker at {self.address} took the {name} connection but sent no welcome within {self._timeout:g} s",
                address=self.address,
                threshold=self._timeout,
            ) from None
        except BaseException:
            channel.abort()
            raise
        if channel.error is not None:
            raise channel.error
        return channel

    # -- calling -------------------------------------------------------------------------------------

    def open(
        self,
        endpoint: str,
        headers: OpenHeaders,
        payload: bytes,
        handler: StreamHandler,
        *,
        credit: int = 0,
        first_index: int | None = None,
    ) -> StreamHandle:
        """Start a stream. Its callbacks come later, never from inside this call.

        Args:
            endpoint: its name on the worker.
            headers: travel with it.
            payload: over `limits.INLINE_PAYLOAD_BYTES` it goes in parts over the bulk connection.
            handler: receives what happens.
            credit: tokens (or messages) allowed before `StreamHandle.credit`; 0: `limits.INITIAL_CREDIT_TOKENS`.
            first_index: output index the first token must have, so that a gap at the start shows; None: any.

        Raises:
            Disconnected: the link is not connected (any more).
            WorkerDraining: the worker has said that it accepts nothing.
            CapacityExhausted: too many streams or waiting uploads.
            PayloadTooLarge: over `limits.PAYLOAD_BYTES`.
        """
        core = self._usable(self._control).core
        if len(payload) <= INLINE_PAYLOAD_BYTES:
            return core.open(endpoint, headers, payload, handler, credit=credit, first_index=first_index)
        self._uploads.check_room(len(payload))
        number = self._uploads.next_number()
        stream = core.open(endpoint, headers, b"", handler, upload=number, credit=credit, first_index=first_index)
        self._uploading[number] = stream
        stream.on_closed = lambda: self._upload_over(number)
        self._uploads.add(number, payload)
        self._pump()
        return stream

    async def open_bulk(
        self, endpoint: str, headers: OpenHeaders, payload: bytes, handler: StreamHandler, *, credit: int = 0
    ) -> StreamHandle:
        """Start a stream on the bulk connection (model files, KV events); connects it when needed.

        Raises:
            HoldfastError: as `open` and `connect`; `PayloadTooLarge` when the payload does not fit one frame.
        """
        if self._bulk is None:
            self._connect_bulk()
        if self._bulk_connecting is not None:
            await asyncio.wait([self._bulk_connecting])  # whoever cancels it does not cancel us, nor we it
        if self._bulk is None and self._bulk_error is not None:
            raise self._bulk_error
        return self._usable(self._bulk).core.open(endpoint, headers, payload, handler, credit=credit)

    def ping(self) -> int:
        """Send a ping on control and return its number; `on_pong` tells of the answer.

        Raises:
            Disconnected: the link is not connected (any more).
        """
        return self._usable(self._control).core.ping()

    def abandon(self, error: HoldfastError) -> None:
        """Break every open stream with ``error`` and tell the worker to forget them; the link stays connected."""
        for channel in self._channels():
            channel.core.abandon(error)

    async def close(self) -> None:
        """Close both connections; streams that are still open are broken. `on_lost` is not called. Idempotent."""
        self._closed = True
        self._disarm()
        task, self._bulk_connecting = self._bulk_connecting, None
        if task is not None:
            task.cancel()
            await asyncio.wait([task])
        for channel in self._channels():
            channel.over(Disconnected(f"the link to worker {self.peer} was closed by this process", worker=self.peer))

    def _usable(self, channel: Channel | None) -> Channel:
        if channel is None or self._closed:
            raise Disconnected(f"not connected to worker {self.peer} at {self.address}", worker=self.peer)
        return channel

    # -- what the connections say --------------------------------------------------------------------

    def heard(self, now: float) -> None:
        """A byte came."""
        self.last_heard = now

    def read_done(self) -> None:
        """All frames of one read went to their handlers."""
        if self.on_read_done is not None:
            self._guard(self.on_read_done)

    def connection_event(self, channel: Channel, event: Pong | Draining) -> None:
        """A pong or the worker's announcement that it is draining; the latter counts once."""
        if isinstance(event, Pong):
            if event.sequence in self._keepalive_pings:
                self._keepalive_pings.discard(event.sequence)
            elif self.on_pong is not None:
                self._guard(self.on_pong, event)
        elif channel.name == "control":
            self.draining = event
            if self.on_draining is not None:
                self._guard(self.on_draining, event)

    def channel_over(self, channel: Channel, error: HoldfastError) -> None:
        """One of the connections is gone; its streams have been told."""
        if channel is self._bulk:
            self._bulk = None
            if not self._closed:
                self._fail_uploads(error)
        elif channel is self._control:
            self._control = None
            self._disarm()
            if self._bulk is not None:
                self._bulk.over(error)
            if self._bulk_connecting is not None:
                self._bulk_connecting.cancel()
            if not self._closed and self.on_lost is not None:
                self._guard(self.on_lost, error)

    def _guard(self, callback: Callable[..., None], *args: object) -> None:
        try:
            callback(*args)
        except Exception:
            log.exception("a callback of the link to worker %s raised; the link goes on", self.peer)

    # -- bulk ----------------------------------------------------------------------------------------

    def _upload_over(self, number: int) -> None:
        self._uploading.pop(number, None)
        self._uploads.cancel(number)

    def _pump(self) -> None:
        """Send parts as far as the network takes them."""
        bulk = self._bulk
        if bulk is None:
            self._connect_bulk()
        elif self._uploads.send(bulk.core.part, bulk.flush_is_paused) and not bulk.paused:
            bulk.call_soon(self._pump)

    def _connect_bulk(self) -> None:
        if self._bulk_connecting is None and not self._closed:
            self._bulk_connecting = asyncio.get_running_loop().create_task(self._run_connect_bulk())

    async def _run_connect_bulk(self) -> None:
        try:
            self._bulk = await self._connect_channel("bulk")
        except HoldfastError as error:
            log.warning("no bulk connection to worker %s: %s", self.peer, error)
            self._bulk_error = error
            self._fail_uploads(error)
            return
        finally:
            self._bulk_connecting = None
        self._bulk.on_resume = self._pump
        if self._uploads:
            self._pump()

    def _fail_uploads(self, error: HoldfastError) -> None:
        """Bulk is lost: break whatever was not accepted yet, for what was written may not have arrived."""
        self._uploads.clear()
        for stream in list(self._uploading.values()):
            if stream.state == "opening" and self._control is not None:
                self._control.core.break_stream(stream, error)

    # -- keepalive -----------------------------------------------------------------------------------

    def _arm_keepalive(self) -> None:
        if self._keepalive is not None and self._control is not None:
            loop = asyncio.get_running_loop()
            self._keepalive_timer = loop.call_later(self._keepalive, self._keep_alive)

    def _keep_alive(self) -> None:
        control = self._control
        if control is None:
            return
        if not control.take_written() and len(self._keepalive_pings) < KEEPALIVE_UNANSWERED:
            self._keepalive_pings.add(control.core.ping())
        self._arm_keepalive()

    def _disarm(self) -> None:
        if self._keepalive_timer is not None:
            self._keepalive_timer.cancel()
            self._keepalive_timer = None
