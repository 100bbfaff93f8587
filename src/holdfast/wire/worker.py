"""The worker's end of one connection: bytes in, events and bytes out; no I/O, no clock.

Connection states and the frames that are legal in them::

    greeting   hello → proving (with a secret) or joining
    proving    auth → joining
    joining    none; the owner answers with `join` or `turn_away`
    ready      open · stop · kill · credit · ping · part (bulk channel only)
    draining   as ready; every `open` is refused
    closed     none

The states of a stream are in `wire.worker_stream`. What the caller does to a stream (stop, kill, loss of the
connection), and what the protocol does to it (drain, a limit of unsent tokens), reaches the owner through
`on_stopped`. Must never wait, and never log tokens or payloads.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Literal

import msgspec

from holdfast.base.errors import (
    Cancelled,
    HoldfastError,
    ProtocolViolation,
    SecretMismatch,
    WorkerDraining,
    WorkerSaturated,
)
from holdfast.base.limits import (
    EARLY_STOPS_PER_CONNECTION,
    STREAMS_PER_CONNECTION,
)
from holdfast.wire.codec import CALLER_FRAMES, name_of
from holdfast.wire.errors import pack_error
from holdfast.wire.frames import (
    VERSION,
    Auth,
    CallerFrame,
    Challenge,
    Credit,
    Draining,
    Hello,
    Kill,
    Load,
    Open,
    Part,
    Ping,
    Pong,
    Progress,
    Refuse,
    Stop,
    Welcome,
)
from holdfast.wire.framing import FrameSplitter
from holdfast.wire.handshake import (
    NONCE_BYTES,
    caller_mac,
    check_expectation,
    choose_version,
    proves,
    worker_mac,
)
from holdfast.wire.worker_sending import RELEASE_TOKENS, OnStopped, WorkerStreams
from holdfast.wire.worker_stream import WorkerStream

log = logging.getLogger(__name__)

ConnectionState = Literal["greeting", "proving", "joining", "ready", "draining", "closed"]

_IN_SERVICE = frozenset({Open, Stop, Kill, Credit, Ping, Part})
LEGAL: dict[ConnectionState, frozenset[type]] = {
    "greeting": frozenset({Hello}),
    "proving": frozenset({Auth}),
    "joining": frozenset(),
    "ready": _IN_SERVICE,
    "draining": _IN_SERVICE,
    "closed": frozenset(),
}

CALLER_CHARS = 256
"""Longest id of a caller."""
REASON_CHARS = 64
"""A longer reason for a stop is cut."""


class Joined(msgspec.Struct, frozen=True):
    """The caller has said who it is (and proved it): answer with `join` or `turn_away`."""

    hello: Hello


class Opened(msgspec.Struct, frozen=True):
    """A stream begins: answer with `accept` or `refuse`."""

    stream: WorkerStream


WorkerEvent = Joined | Opened | Part | Ping


class WorkerConnection(WorkerStreams):
    """One connection as its worker runs it.

    Args:
        instance: this worker.
        epoch: this start of it.
        on_stopped: told once per stream why nobody wants it any more; must not raise.
        secret: shared secret; empty: none is asked for.
        nonce: 16 fresh random bytes, used when there is a secret.
        features: offered to callers in the welcome.
        make_stream: makes the record of a new stream; its owner may want more in it than the protocol does.
    """

    def __init__(
        self,
        instance: str,
        epoch: int,
        on_stopped: OnStopped,
        *,
        secret: bytes = b"",
        nonce: bytes = b"",
        features: tuple[str, ...] = (),
        make_stream: Callable[[Open], WorkerStream] = WorkerStream,
    ):
        super().__init__(on_stopped)
        self.state: ConnectionState = "greeting"
        self.hello: Hello | None = None
        self.ignored_frames = 0
        self._instance, self._epoch, self._features = instance, epoch, features
        self._make_stream = make_stream
        self._secret, self._nonce = secret, nonce
        self._splitter = FrameSplitter()
        self._early_stops: set[int] = set()
        self._last_stream = 0

    @property
    def _lenient(self) -> bool:
        return self.hello is not None and self.hello.version_max > VERSION

    # -- what the caller says ------------------------------------------------------------------------

    def receive(self, data: bytes) -> list[WorkerEvent]:
        """Take bytes from the network and return what the owner has to act on, in order.

        Raises:
            ProtocolViolation: the connection must be closed; `fail` tells the streams.
            HoldfastError: the caller is refused (version, instance, secret); the refusal is in the outbox.
        """
        events: list[WorkerEvent] = []
        credited: dict[int, WorkerStream] = {}
        for payload in self._splitter.feed(data):
            frame = CALLER_FRAMES.read(payload, self.state, lenient=self._lenient)
            if frame is None:
                self.ignored_frames += 1
                continue
            if type(frame) not in LEGAL[self.state]:
                raise self._forbidden(frame, f"connection state {self.state!r}")
            if isinstance(frame, Open):
                self._on_open(frame, events)
            elif isinstance(frame, Credit):
                self._on_credit(frame, credited)
            elif isinstance(frame, Stop | Kill):
                self._on_stop(frame)
            elif isinstance(frame, Hello | Auth):
                self._on_greeting(frame, events)
            else:
                self._check_channel(frame)
                events.append(frame)
        if credited and self.paused:
            self._owed = True
        elif credited:
            self._release(list(credited.values()), RELEASE_TOKENS)
        return events

    def _forbidden(self, frame: CallerFrame, where: str) -> ProtocolViolation:
        return ProtocolViolation(
            f"caller {self.caller or '(unknown)'} sent a {name_of(frame)} frame in {where}",
            frame=name_of(frame),
            state=where,
            caller=self.caller,
        )

    def _check_channel(self, frame: CallerFrame) -> None:
        if isinstance(frame, Part) and self.hello is not None and self.hello.channel != "bulk":
            raise self._forbidden(frame, f"the {self.hello.channel!r} channel")

    def _on_greeting(self, frame: Hello | Auth, events: list[WorkerEvent]) -> None:
        try:
            if isinstance(frame, Auth):
                self._check_proof(frame)
            else:
                self._check_hello(frame)
        except HoldfastError as error:
            self.turn_away(error)
            raise
        if isinstance(frame, Hello) and self._secret:
            self.outbox.put(Challenge(self._nonce))
            self.state = "proving"
            return
        self.state = "joining"
        assert self.hello is not None
        events.append(Joined(self.hello))

    def _check_hello(self, hello: Hello) -> None:
        caller = hello.caller
        if not (0 < len(caller) <= CALLER_CHARS and caller.isprintable() and hello.channel in ("control", "bulk")):
            raise self._forbidden(hello, f"which caller id ({len(caller)} characters) or channel is not valid")
        self.version = choose_version(hello)
        check_expectation(hello, self._instance, self._epoch)
        if self._secret and len(hello.nonce) < NONCE_BYTES:
            raise SecretMismatch("this worker asks for a shared secret and the caller offers none")
        self.hello = hello
        self.caller = hello.caller

    def _check_proof(self, auth: Auth) -> None:
        assert self.hello is not None
        if not proves(caller_mac(self._secret, self._nonce, self.hello), auth.mac):
            raise SecretMismatch("the caller did not prove that it knows this worker's shared secret")

    def _on_open(self, frame: Open, events: list[WorkerEvent]) -> None:
        if frame.stream <= self._last_stream or frame.credit < 0:
            raise self._forbidden(frame, f"stream {frame.stream}, which must be over {self._last_stream}")
        self._last_stream = frame.stream
        refusal = self._refusal(frame.stream)
        if refusal is not None:
            self.outbox.put(Refuse(frame.stream, pack_error(refusal)))
            return
        stream = self._streams[frame.stream] = self._make_stream(frame)
        self._undelivered[frame.stream] = None
        events.append(Opened(stream))

    def _refusal(self, number: int) -> HoldfastError | None:
        if self.state == "draining":
            return WorkerDraining("this worker is draining and accepts nothing", worker=self._instance)
        early = number in self._early_stops
        if self._early_stops:
            self._early_stops = {other for other in self._early_stops if other > number}
        if early:
            return Cancelled("the stream was stopped before it was opened")
        if len(self._streams) >= STREAMS_PER_CONNECTION:
            return WorkerSaturated(
                f"{len(self._streams)} streams are open on this connection; at most {STREAMS_PER_CONNECTION}",
                limit="STREAMS_PER_CONNECTION",
                threshold=STREAMS_PER_CONNECTION,
                actual=len(self._streams),
            )
        return None

    def _on_stop(self, frame: Stop | Kill) -> None:
        stream = self._streams.get(frame.stream)
        if stream is None:
            self._note_early_stop(frame)
            return
        reason = frame.reason[:REASON_CHARS] or "cancelled"
        self._drop_waiting(stream)
        if isinstance(frame, Kill):
            self._remove(stream)
        elif stream.pending_end is not None:
            self._finish(stream, stream.pending_end)
        self._tell_stopped(stream, reason)

    def _note_early_stop(self, frame: Stop | Kill) -> None:
        if frame.stream <= self._last_stream:
            return
        if len(self._early_stops) >= EARLY_STOPS_PER_CONNECTION:
            raise self._forbidden(frame, f"stream {frame.stream}, after {EARLY_STOPS_PER_CONNECTION} others unopened")
        self._early_stops.add(frame.stream)

    def _on_credit(self, frame: Credit, credited: dict[int, WorkerStream]) -> None:
        if frame.tokens < 0 or frame.stream > self._last_stream:
            raise self._forbidden(frame, f"stream {frame.stream} with {frame.tokens} tokens")
        stream = self._streams.get(frame.stream)
        if stream is not None:
            stream.grant(frame.tokens)
            if stream.waiting:
                credited[stream.id] = stream

    # -- what the owner answers to a handshake -------------------------------------------------------

    def join(self) -> None:
        """Welcome the caller: the connection is usable."""
        assert self.hello is not None
        welcome = Welcome(self.version, self._instance, self._epoch, self._features, b"", VERSION)
        if self._secret:
            mac = worker_mac(self._secret, self._nonce, self.hello, welcome)
            welcome = msgspec.structs.replace(welcome, mac=mac)
        self.outbox.put(welcome)
        self.state = "ready"

    def turn_away(self, error: HoldfastError) -> None:
        """Refuse the whole connection; the owner closes it once the outbox is written."""
        self.outbox.put(Refuse(0, pack_error(error)))
        self.state = "closed"

    # -- what the worker does ------------------------------------------------------------------------

    def pong(self, ping: int, progress: Progress, load: Load, state: str) -> None:
        """Answer a ping."""
        last = min(self._undelivered) - 1 if self._undelivered else self._last_stream
        self.outbox.put(Pong(ping, progress, load, last, state))

    def drain(self, reason: str, remaining_ms: int) -> None:
        """Say that nothing is accepted any more; streams that wait for `accept` are refused ``elsewhere``."""
        if self.state not in ("ready", "draining"):
            return
        self.state = "draining"
        self.outbox.put(Draining(reason, remaining_ms))
        for stream in self.streams:
            if stream.state == "opened":
                self.refuse(stream, WorkerDraining(f"this worker is draining ({reason})", worker=self._instance))
                self._tell_stopped(stream, "draining")

    def fail(self, reason: str) -> None:
        """The connection is over: every stream is stopped for ``reason``. Idempotent."""
        self.state = "closed"
        self.outbox.clear()
        for stream in self.streams:
            self._drop_waiting(stream)
            self._remove(stream)
            self._tell_stopped(stream, reason)
