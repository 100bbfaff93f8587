"""The caller's end of one connection: bytes in, callbacks and bytes out; no I/O, no clock.

Connection states and the frames that are legal in them::

    greeting   challenge → proving · welcome → ready · refuse → closed
    proving    welcome → ready · refuse → closed
    ready      accept · refuse · items · data · end · pong · draining → draining
    draining   refuse · items · data · end · pong · draining      (nothing is accepted any more)
    closed     none

The states of a stream are in `wire.caller_stream`.
A frame for a stream that was never opened, or one that its state forbids, is a `ProtocolViolation` that
names frame and state. A gap in the output indices breaks that stream only; an overlap is dropped. What a
sink raises is contained to its stream. Must never wait, and never log tokens or payloads.
"""

from __future__ import annotations

import logging
from array import array
from collections.abc import Callable, Iterable
from typing import Literal

from holdfast.base.errors import (
    CapacityExhausted,
    Disconnected,
    HoldfastError,
    InternalError,
    ProtocolViolation,
    SecretMismatch,
    StreamIncomplete,
    VersionMismatch,
    WorkerDraining,
)
from holdfast.base.limits import STREAMS_PER_CONNECTION
from holdfast.wire.caller_stream import ANY_INDEX, NOT_STREAMING, STREAM_LEGAL, CallerStream, StreamSink, Take
from holdfast.wire.codec import WORKER_FRAMES, name_of
from holdfast.wire.columns import Logprobs, read_columns
from holdfast.wire.errors import unpack_error, unpack_refusal
from holdfast.wire.frames import (
    VERSION,
    Accept,
    Auth,
    CallerFrame,
    Challenge,
    Data,
    Draining,
    End,
    Hello,
    Items,
    Open,
    OpenHeaders,
    Part,
    Ping,
    Pong,
    Refuse,
    Welcome,
    WorkerFrame,
)
from holdfast.wire.framing import FrameSplitter
from holdfast.wire.handshake import NONCE_BYTES, caller_mac, proves, worker_mac
from holdfast.wire.outbox import Outbox

log = logging.getLogger(__name__)

ConnectionState = Literal["greeting", "proving", "ready", "draining", "closed"]
CallerEvent = Welcome | Pong | Draining

LEGAL: dict[ConnectionState, frozenset[type]] = {
    "greeting": frozenset({Challenge, Welcome, Refuse}),
    "proving": frozenset({Welcome, Refuse}),
    "ready": frozenset({Accept, Refuse, Items, Data, End, Pong, Draining}),
    "draining": frozenset({Refuse, Items, Data, End, Pong, Draining}),
    "closed": frozenset(),
}


class CallerConnection:
    """One connection as its caller runs it.

    Args:
        hello: the first frame, put into the outbox at once.
        secret: shared secret; empty: none, then a challenge is refused.
    """

    def __init__(self, hello: Hello, secret: bytes = b""):
        self.state: ConnectionState = "greeting"
        self.welcome: Welcome | None = None
        self.outbox = Outbox()
        self.late_frames = 0
        """Entries and frames that came for streams that were over already."""
        self.ignored_frames = 0
        """Frames of a newer protocol version that this one does not know."""
        self.take: Take | None = None
        """Takes tokens of streams that ride (`CallerStream.ride`); None: there was none yet."""
        self._hello = hello
        self._secret = secret
        self._worker_nonce = b""
        self._splitter = FrameSplitter()
        self._lenient = False
        self._streams: dict[int, CallerStream] = {}
        self._last_stream = 0
        self._last_ping = 0
        self.send(hello)

    @property
    def streams(self) -> list[CallerStream]:
        """The streams that are not over, oldest first."""
        return list(self._streams.values())

    @property
    def open_streams(self) -> int:
        """How many streams are not over."""
        return len(self._streams)

    @property
    def version(self) -> int:
        """The protocol version in use; 0 before the welcome."""
        return self.welcome.version if self.welcome is not None else 0

    def send(self, frame: CallerFrame) -> None:
        """Put a frame into the outbox unless the connection is closed."""
        if self.state != "closed":
            self.outbox.put(frame)

    # -- what the caller does ------------------------------------------------------------------------

    def open(
        self,
        endpoint: str,
        headers: OpenHeaders,
        payload: bytes,
        sink: StreamSink,
        *,
        upload: int = 0,
        credit: int = 0,
        first_index: int | None = None,
    ) -> CallerStream:
        """Start a stream.

        Args:
            endpoint: its name on the worker.
            headers: see `frames.OpenHeaders`.
            payload: at most `limits.INLINE_PAYLOAD_BYTES`; longer ones travel as an upload.
            sink: receives what happens; see `runtime.streams.StreamHandler`.
            upload: number of the upload that holds the payload; 0: inline.
            credit: tokens (or `Data` frames) allowed at first; 0: `limits.INITIAL_CREDIT_TOKENS`.
            first_index: output index that the first token must have; None: any.

        Raises:
            Disconnected: the connection is not usable.
            WorkerDraining: the worker said that it accepts nothing.
            CapacityExhausted: `limits.STREAMS_PER_CONNECTION` reached.
            PayloadTooLarge: does not fit a frame.
        """
        self._check_open()
        number = self._last_stream + 1
        self.outbox.put(Open(number, endpoint, headers, payload, upload, credit))
        self._last_stream = number
        stream = self._streams[number] = CallerStream(self, number, sink, first_index)
        return stream

    def _check_open(self) -> None:
        if self.state == "draining":
            raise WorkerDraining("the worker is draining and accepts nothing", worker=self._peer)
        if self.state != "ready":
            raise Disconnected(f"the connection to the worker is {self.state}, not ready", worker=self._peer)
        if len(self._streams) >= STREAMS_PER_CONNECTION:
            raise CapacityExhausted(
                f"{len(self._streams)} streams are open to worker {self._peer}; at most {STREAMS_PER_CONNECTION}",
                limit="STREAMS_PER_CONNECTION",
                threshold=STREAMS_PER_CONNECTION,
                actual=len(self._streams),
            )

    @property
    def _peer(self) -> str:
        return self.welcome.instance if self.welcome is not None else self._hello.instance

    def part(self, upload: int, total: int, data: bytes) -> None:
        """Send a piece of an upload (bulk connections only)."""
        self.send(Part(upload, total, data))

    def ping(self) -> int:
        """Ask for a pong; returns its number."""
        self._last_ping += 1
        self.send(Ping(self._last_ping))
        return self._last_ping

    def forget(self, stream: CallerStream) -> None:
        """Take a stream out of the table; whatever still comes for it is late."""
        stream.state = "closed"
        stream.expected = NOT_STREAMING
        stream.track = None
        self._streams.pop(stream.id, None)
        if stream.on_closed is not None:
            self._guard(stream, stream.on_closed)

    def abandon(self, error: HoldfastError) -> None:
        """Break every stream and tell the worker to forget each; the connection stays."""
        for stream in self.streams:
            stream.kill("abandoned")
            self._guard(stream, stream.sink.on_broken, error)

    def fail(self, error: HoldfastError) -> None:
        """The connection is over: break every stream. Idempotent."""
        self.state = "closed"
        self.outbox.clear()
        for stream in self.streams:
            self.forget(stream)
            self._guard(stream, stream.sink.on_broken, error)

    # -- what the worker says ------------------------------------------------------------------------

    def receive(self, data: bytes) -> list[CallerEvent]:
        """Take bytes from the network; stream events go to their sinks, connection events are returned.

        Raises:
            ProtocolViolation: the connection must be closed; `fail` tells the streams.
            HoldfastError: the worker refused the connection (`CannotConnect` and its kin, `WorkerDraining`,
                `CapacityExhausted`).
        """
        events: list[CallerEvent] = []
        for payload in self._splitter.feed(data):
            frame = WORKER_FRAMES.read(payload, self.state, lenient=self._lenient)
            if frame is None:
                self.ignored_frames += 1
                continue
            if type(frame) not in LEGAL[self.state]:
                raise self._forbidden(frame, f"connection state {self.state!r}")
            if type(frame) is Items:
                self._on_items(frame)
            elif isinstance(frame, Accept | Refuse | Data | End):
                self._on_stream_frame(frame)
            elif isinstance(frame, Challenge):
                self._on_challenge(frame)
            elif isinstance(frame, Welcome | Pong | Draining):
                events.append(self._on_connection_frame(frame))
        return events

    def _forbidden(self, frame: WorkerFrame, where: str) -> ProtocolViolation:
        return ProtocolViolation(
            f"worker {self._peer or '(unknown)'} sent a {name_of(frame)} frame in {where}",
            frame=name_of(frame),
            state=where,
            worker=self._peer,
        )

    def _on_challenge(self, frame: Challenge) -> None:
        if not self._secret:
            raise SecretMismatch("the worker asks for a shared secret and this process has none")
        if len(frame.nonce) < NONCE_BYTES:
            raise self._forbidden(frame, f"the handshake with a nonce of only {len(frame.nonce)} bytes")
        self._worker_nonce = frame.nonce
        self.send(Auth(caller_mac(self._secret, frame.nonce, self._hello)))
        self.state = "proving"

    def _on_connection_frame(self, frame: CallerEvent) -> CallerEvent:
        if isinstance(frame, Welcome):
            self._check_welcome(frame)
            self.welcome = frame
            self._lenient = frame.version_max > VERSION
            self.state = "ready"
        elif isinstance(frame, Draining):
            self.state = "draining"
        elif frame.sequence > self._last_ping:
            raise self._forbidden(frame, f"answer to ping {frame.sequence}, of {self._last_ping} sent")
        return frame

    def _check_welcome(self, welcome: Welcome) -> None:
        hello = self._hello
        if not hello.version_min <= welcome.version <= hello.version_max:
            raise VersionMismatch(
                f"the worker chose version {welcome.version}; offered were {hello.version_min} to {hello.version_max}"
            )
        if self._secret:
            expected = worker_mac(self._secret, self._worker_nonce, hello, welcome)
            if self.state != "proving" or not proves(expected, welcome.mac):
                raise SecretMismatch("the worker did not prove that it knows the shared secret")

    def _on_stream_frame(self, frame: Accept | Refuse | Data | End) -> None:
        if frame.stream == 0 and isinstance(frame, Refuse):
            raise unpack_refusal(frame.error)
        stream = self._streams.get(frame.stream)
        if stream is None:
            self._check_late(frame.stream, frame)
            return
        if type(frame) not in STREAM_LEGAL[stream.state]:
            raise self._forbidden(frame, f"stream state {stream.state!r}")
        sink = stream.sink
        if isinstance(frame, Accept):
            stream.accepted()
            self._guard_alive(stream, sink.on_accept)
        elif isinstance(frame, Data):
            self._on_data(stream, frame)
        elif isinstance(frame, Refuse):
            self.forget(stream)
            self._guard(stream, sink.on_refuse, unpack_error(frame.error))
        else:
            lost = stream.miscounted(frame)
            self.forget(stream)
            error = None if frame.error is None else unpack_error(frame.error)
            if lost is not None:
                self._guard(stream, sink.on_broken, lost)
            else:
                self._guard(stream, sink.on_end, frame.finish, error, frame.cached_tokens)

    def _check_late(self, stream: int, frame: WorkerFrame) -> None:
        if not 0 < stream <= self._last_stream:
            raise self._forbidden(frame, f"stream {stream}, which was never opened")
        self.late_frames += 1

    def _on_data(self, stream: CallerStream, frame: Data) -> None:
        try:
            message = stream.collect(frame)
        except StreamIncomplete as error:
            self.break_stream(stream, error)
            return
        if message is not None:
            self._guard_alive(stream, stream.sink.on_data, frame.index, message)

    def _on_items(self, frame: Items) -> None:
        size = len(frame.streams)
        if frame.counts or frame.logprobs or size & 3 or size != len(frame.indices) or size != len(frame.tokens):
            self._on_general_items(frame)
            return
        table = self._streams
        entries: Iterable[tuple[int, int, int]]
        if self.take is not None:
            entries = self.take(table, frame.streams, frame.indices, frame.tokens)
        else:
            columns = (array("I", column) for column in (frame.streams, frame.indices, frame.tokens))
            entries = zip(*columns, strict=True)
        for number, index, token in entries:
            stream = table.get(number)
            if stream is not None and stream.expected == index:
                stream.expected = index + 1
                try:
                    stream.on_tokens(index, [token], None)
                except Exception as error:
                    self._contain(stream, error)
            else:
                self._on_odd_entry(frame, number, index, [token], None)

    def _on_general_items(self, frame: Items) -> None:
        ids, indices, counts, tokens = read_columns(frame)
        logprobs = dict(frame.logprobs)
        start = 0
        for entry, (number, index, count) in enumerate(zip(ids, indices, counts, strict=True)):
            run = tokens[start : start + count]
            start += count
            chances = logprobs.get(entry)
            if chances is not None and len(chances) != count:
                raise self._forbidden(frame, f"which {count} tokens have {len(chances)} log probabilities")
            stream = self._streams.get(number)
            if stream is not None and stream.expected == index:
                stream.expected = index + count
                self._guard_alive(stream, stream.on_tokens, index, run, chances)
            else:
                self._on_odd_entry(frame, number, index, run, chances)

    def _on_odd_entry(
        self, frame: Items, number: int, index: int, tokens: list[int], logprobs: Logprobs | None
    ) -> None:
        """An entry that is not simply the next one of a live stream: late, early, overlapping or after a gap."""
        stream = self._streams.get(number)
        if stream is None:
            self._check_late(number, frame)
            return
        if stream.state != "streaming":
            raise self._forbidden(frame, f"stream state {stream.state!r}")
        if stream.expected == ANY_INDEX:
            stream.expected = index
        known = stream.expected - index
        if known < 0:
            self.break_stream(
                stream,
                StreamIncomplete(
                    f"output index {stream.expected} of stream {number} is missing; {index} came",
                    expected=stream.expected,
                    actual=index,
                    worker=self._peer,
                ),
            )
        elif known < len(tokens):
            first = stream.expected
            stream.expected = index + len(tokens)
            self._guard_alive(stream, stream.on_tokens, first, tokens[known:], logprobs and logprobs[known:])

    # -- containment ---------------------------------------------------------------------------------

    def break_stream(self, stream: CallerStream, error: HoldfastError) -> None:
        """Tell the worker to forget a stream, and its sink why."""
        stream.kill("broken")
        self._guard(stream, stream.sink.on_broken, error)

    def _guard_alive(self, stream: CallerStream, callback: Callable[..., None], *args: object) -> None:
        try:
            callback(*args)
        except Exception as error:
            self._contain(stream, error)

    def _contain(self, stream: CallerStream, error: Exception) -> None:
        """A sink raised: that stream is broken, the others never notice."""
        log.error(
            "the handler of stream %d from worker %s raised; only it is broken", stream.id, self._peer, exc_info=error
        )
        if stream.state != "closed":
            self.break_stream(stream, InternalError(f"the handler of the stream raised {type(error).__name__}"))

    def _guard(self, stream: CallerStream, callback: Callable[..., None], *args: object) -> None:
        try:
            callback(*args)
        except Exception:
            log.exception("the handler of stream %d from worker %s raised at its end", stream.id, self._peer)
