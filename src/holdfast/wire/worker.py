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
from collections.abc import Callable, Iterable, Sequence
from typing import Literal, Protocol

import msgspec

from holdfast.base.errors import (
    Cancelled,
    CapacityExhausted,
    HoldfastError,
    InternalError,
    PayloadTooLarge,
    ProtocolViolation,
    SecretMismatch,
    WorkerDraining,
    WorkerSaturated,
)
from holdfast.base.limits import (
    EARLY_STOPS_PER_CONNECTION,
    PART_BYTES,
    PAYLOAD_BYTES,
    STREAMS_PER_CONNECTION,
    UNSENT_MESSAGE_BYTES_PER_CONNECTION,
    UNSENT_MESSAGE_BYTES_PER_STREAM,
    UNSENT_TOKENS_PER_CONNECTION,
    UNSENT_TOKENS_PER_STREAM,
)
from holdfast.wire.codec import CALLER_FRAMES, name_of
from holdfast.wire.columns import Entry, Logprobs, encode_items
from holdfast.wire.errors import pack_error
from holdfast.wire.frames import (
    FRAGMENTS_SINCE,
    LOGPROBS_SINCE,
    VERSION,
    Accept,
    Auth,
    CallerFrame,
    Challenge,
    Credit,
    Data,
    Draining,
    End,
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
    WorkerFrame,
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
from holdfast.wire.outbox import Outbox
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
RELEASE_TOKENS = 16_384
"""Waiting tokens that `WorkerConnection.release` lets go at once."""


class Joined(msgspec.Struct, frozen=True):
    """The caller has said who it is (and proved it): answer with `join` or `turn_away`."""

    hello: Hello


class Opened(msgspec.Struct, frozen=True):
    """A stream begins: answer with `accept` or `refuse`."""

    stream: WorkerStream


WorkerEvent = Joined | Opened | Part | Ping
OnStopped = Callable[[WorkerStream, str], None]


class HasStream(Protocol):
    """Whatever knows its stream's number."""

    stream: int


class Item(Protocol):
    """New tokens of one stream, as `runtime.streams.TokenItem`."""

    @property
    def call(self) -> HasStream:
        """The call they belong to."""

    index: int
    tokens: list[int]
    logprobs: Logprobs | None


class WorkerConnection:
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
        self.state: ConnectionState = "greeting"
        self.hello: Hello | None = None
        self.version = 0
        self.outbox = Outbox()
        self.paused = False
        """The network takes no more: everything with tokens waits."""
        self.ignored_frames = 0
        self._instance, self._epoch, self._features = instance, epoch, features
        self._on_stopped = on_stopped
        self._make_stream = make_stream
        self._secret, self._nonce = secret, nonce
        self._splitter = FrameSplitter()
        self._streams: dict[int, WorkerStream] = {}
        self._backlog: dict[int, WorkerStream] = {}
        self._undelivered: dict[int, None] = {}
        self._early_stops: set[int] = set()
        self._last_stream = 0
        self._held_weight = 0
        self._held_bytes = 0

    @property
    def streams(self) -> list[WorkerStream]:
        """The streams that are not over, oldest first."""
        return list(self._streams.values())

    @property
    def caller(self) -> str:
        """The id the caller gave itself; empty before its hello."""
        return self.hello.caller if self.hello is not None else ""

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
        if credited and not self.paused:
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
        if not 0 < len(hello.caller) <= CALLER_CHARS or hello.channel not in ("control", "bulk"):
            raise self._forbidden(hello, f"which caller id ({len(hello.caller)} characters) or channel is not valid")
        self.version = choose_version(hello)
        check_expectation(hello, self._instance, self._epoch)
        if self._secret and len(hello.nonce) < NONCE_BYTES:
            raise SecretMismatch("this worker asks for a shared secret and the caller offers none")
        self.hello = hello

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
        reason = frame.reason or "cancelled"
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

    def _tell_stopped(self, stream: WorkerStream, reason: str) -> None:
        if stream.stop_reason is None:
            stream.stop_reason = reason
            stream.flow_changed()
            self._on_stopped(stream, reason)

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

    def delivered(self, stream: WorkerStream) -> None:
        """The stream has reached its endpoint, so that the load from now on includes it (`Pong.last_open`)."""
        self._undelivered.pop(stream.id, None)

    def accept(self, stream: WorkerStream) -> None:
        """Take ownership. Raises InternalError when that was done before."""
        if stream.over:
            return
        if stream.state != "opened":
            raise InternalError(f"stream {stream.id} is {stream.state} and cannot be accepted", stream=stream.id)
        stream.state = "accepted"
        stream.flowing = stream.stop_reason is None
        self.outbox.put(Accept(stream.id))

    def refuse(self, stream: WorkerStream, error: HoldfastError) -> None:
        """Decline a stream; one that was accepted already ends with the error instead."""
        if stream.over:
            return
        if stream.state != "opened":
            self.end(stream, "error", error)
            return
        self._remove(stream)
        self.outbox.put(Refuse(stream.id, pack_error(error)))

    def send_items(self, items: Iterable[Item]) -> None:
        """Send the tokens of one engine step as one frame; what has no credit waits.

        A stream that was not accepted, or whose tokens cannot be encoded, is given up; the others go on.
        """
        table = self._streams
        entries: list[Entry] = []
        for item in items:
            stream = table.get(item.call.stream)
            if stream is None:
                continue
            tokens = item.tokens
            if stream.flowing and 0 < len(tokens) <= stream.credit and not self.paused:
                stream.credit -= len(tokens)
                entries.append((stream.id, item.index, tokens, item.logprobs))
            else:
                self._hold(stream, item)
        if entries:
            self._put_entries(entries)

    def _hold(self, stream: WorkerStream, item: Item) -> None:
        if stream.state == "opened":
            error = InternalError(f"stream {stream.id} was not accepted and cannot carry tokens", stream=stream.id)
            self._give_up(stream, error, "not_accepted")
            return
        if not item.tokens or stream.state != "accepted" or stream.stop_reason is not None:
            return
        try:
            self._held_weight += stream.hold_tokens(item.index, item.tokens, item.logprobs)
        except (OverflowError, TypeError) as bad:
            self._give_up(stream, _bad_tokens(stream, bad), "bad_tokens")
            return
        self._waits(stream)

    def send_data(self, stream: WorkerStream, payload: bytes) -> None:
        """Send one message, in fragments when it is long; what has no credit waits.

        Raises:
            InternalError: the stream was not accepted yet.
            PayloadTooLarge: over `limits.PAYLOAD_BYTES`, or over a frame while the peer knows no fragments.
        """
        if stream.state == "opened":
            raise InternalError(f"stream {stream.id} was not accepted and cannot carry data", stream=stream.id)
        if stream.state != "accepted" or stream.stop_reason is not None:
            return
        limit = PAYLOAD_BYTES if self.version >= FRAGMENTS_SINCE else PART_BYTES
        if len(payload) > limit:
            raise PayloadTooLarge(
                f"a message has {len(payload)} bytes; at most {limit} can go to this caller",
                limit="PAYLOAD_BYTES" if limit == PAYLOAD_BYTES else "PART_BYTES",
                threshold=limit,
                actual=len(payload),
            )
        for start in range(0, len(payload) or 1, PART_BYTES):
            end = start + PART_BYTES
            frame = Data(stream.id, stream.messages, payload[start:end], end < len(payload))
            if stream.flowing and stream.credit > 0 and not self.paused:
                stream.credit -= 1
                self.outbox.put(frame)
            else:
                self._held_bytes += stream.hold_data(frame)
        stream.messages += 1
        if stream.waiting:
            self._waits(stream)

    def end(
        self, stream: WorkerStream, finish: str, error: HoldfastError | None = None, cached_tokens: int = 0
    ) -> None:
        """End a stream; what waits for credit is delivered before the end, unless the caller asked to stop."""
        if stream.over or stream.pending_end is not None:
            return
        if stream.state == "opened":
            if error is not None:
                self.refuse(stream, error)
                return
            self.accept(stream)
        frame = End(stream.id, finish, None if error is None else pack_error(error), cached_tokens)
        if stream.waiting:
            stream.state = "ending"
            stream.pending_end = frame
        else:
            self._finish(stream, frame)

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

    # -- what waits for credit or for the network ----------------------------------------------------

    @property
    def releasable(self) -> bool:
        """Whether something waits that has credit."""
        return any(stream.credit > 0 for stream in self._backlog.values())

    def release(self) -> None:
        """Let go up to `RELEASE_TOKENS` waiting tokens that have credit, the longest waiting streams first."""
        self._release(list(self._backlog.values()), RELEASE_TOKENS)

    def _release(self, streams: Sequence[WorkerStream], budget: int) -> None:
        entries: list[Entry] = []
        for stream in streams:
            if budget <= 0:
                break
            budget = self._release_stream(stream, entries, budget)
        if entries:
            self._put_entries(entries)
        for stream in streams:
            if not stream.waiting and not stream.over:
                self._flows_again(stream)

    def _release_stream(self, stream: WorkerStream, entries: list[Entry], budget: int) -> int:
        weight, held = stream.held_weight, stream.held_bytes
        while (piece := stream.release(budget)) is not None:
            if isinstance(piece, Data):
                if entries:
                    self._put_entries(entries)
                    entries.clear()
                self.outbox.put(piece)
                budget -= len(piece.payload) // 4 + 1
            else:
                entries.append(piece)
                budget -= len(piece[2])
        self._held_weight -= weight - stream.held_weight
        self._held_bytes -= held - stream.held_bytes
        if self._backlog.pop(stream.id, None) is not None and stream.waiting:
            self._backlog[stream.id] = stream
        return budget

    def _flows_again(self, stream: WorkerStream) -> None:
        if stream.pending_end is not None:
            self._finish(stream, stream.pending_end)
        else:
            stream.flowing = stream.state == "accepted" and stream.stop_reason is None
            stream.flow_changed()

    def _waits(self, stream: WorkerStream) -> None:
        self._backlog.setdefault(stream.id, stream)
        for limit, threshold, actual in (
            ("UNSENT_TOKENS_PER_STREAM", UNSENT_TOKENS_PER_STREAM, stream.held_weight),
            ("UNSENT_TOKENS_PER_CONNECTION", UNSENT_TOKENS_PER_CONNECTION, self._held_weight),
            ("UNSENT_MESSAGE_BYTES_PER_STREAM", UNSENT_MESSAGE_BYTES_PER_STREAM, stream.held_bytes),
            ("UNSENT_MESSAGE_BYTES_PER_CONNECTION", UNSENT_MESSAGE_BYTES_PER_CONNECTION, self._held_bytes),
        ):
            if actual > threshold:
                error = CapacityExhausted(
                    f"the caller takes nothing: {actual} unsent, at most {threshold} are kept ({limit})",
                    limit=limit,
                    threshold=threshold,
                    actual=actual,
                )
                self._give_up(stream, error, "unsent_limit")
                return

    def _put_entries(self, entries: Sequence[Entry]) -> None:
        if self.version < LOGPROBS_SINCE:
            entries = [(stream, index, tokens, None) for stream, index, tokens, _ in entries]
        try:
            self.outbox.put_encoded(encode_items(entries))
        except (OverflowError, TypeError, PayloadTooLarge) as error:
            if len(entries) > 1:
                for entry in entries:
                    self._put_entries([entry])
                return
            stream = self._streams.get(entries[0][0])
            if stream is not None:
                self._give_up(stream, _bad_tokens(stream, error), "bad_tokens")

    def _give_up(self, stream: WorkerStream, error: HoldfastError, reason: str) -> None:
        log.error("stream %d of caller %s is ended: %s", stream.id, self.caller, error)
        self._drop_waiting(stream)
        info = pack_error(error)
        self._finish(stream, Refuse(stream.id, info) if stream.state == "opened" else End(stream.id, "error", info))
        self._tell_stopped(stream, reason)

    def _finish(self, stream: WorkerStream, frame: WorkerFrame) -> None:
        self._remove(stream)
        self.outbox.put(frame)

    def _drop_waiting(self, stream: WorkerStream) -> None:
        self._held_weight -= stream.held_weight
        self._held_bytes -= stream.held_bytes
        stream.drop_waiting()
        self._backlog.pop(stream.id, None)

    def _remove(self, stream: WorkerStream) -> None:
        stream.state = "closed"
        stream.flowing = False
        self._streams.pop(stream.id, None)
        self._undelivered.pop(stream.id, None)
        self._backlog.pop(stream.id, None)


def _bad_tokens(stream: WorkerStream, error: Exception) -> InternalError:
    return InternalError(f"the engine produced tokens for stream {stream.id} that cannot be sent: {error}")
