"""One stream on the caller's end of a connection.

States and the frames that are legal in them::

    opening    accept → streaming · refuse → closed
    streaming  items · data · end → closed
    closed     whatever still comes was on its way already: dropped and counted by the connection

Must never do I/O.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal, Protocol

from holdfast.base.errors import HoldfastError, StreamIncomplete
from holdfast.base.limits import PAYLOAD_BYTES
from holdfast.wire.columns import Logprobs
from holdfast.wire.frames import Accept, Credit, Data, End, Items, Kill, Refuse, Stop

if TYPE_CHECKING:
    from holdfast.wire.caller import CallerConnection

StreamState = Literal["opening", "streaming", "closed"]

STREAM_LEGAL: dict[StreamState, frozenset[type]] = {
    "opening": frozenset({Accept, Refuse}),
    "streaming": frozenset({Items, Data, End}),
    "closed": frozenset(),
}

Take = Callable[[dict[int, Any], bytes, bytes, bytes], list[tuple[int, int, int]]]
"""Takes the columns of an `Items` frame with one token for each entry; the first argument are the streams by number.
Returns the (stream, index, token) that it has left alone. For each one that it takes it does what `on_tokens` does,
and raises `CallerStream.expected`."""

NOT_STREAMING = -1
ANY_INDEX = -2


class StreamSink(Protocol):
    """What one stream tells its owner; `runtime.streams.StreamHandler` describes each call."""

    def on_accept(self) -> None:
        """The worker owns the stream."""

    def on_tokens(self, index: int, tokens: list[int], logprobs: Logprobs | None) -> None:
        """New tokens from output index ``index`` on."""

    def on_data(self, index: int, payload: bytes) -> None:
        """One whole message."""

    def on_refuse(self, error: HoldfastError) -> None:
        """Never started."""

    def on_end(self, finish: str, error: HoldfastError | None, cached_tokens: int) -> None:
        """Ended by the worker."""

    def on_broken(self, error: HoldfastError) -> None:
        """Stopped without an end."""


class CallerStream:
    """An open stream and its caller's grip on it."""

    __slots__ = (
        "_connection",
        "_first_index",
        "_fragment_bytes",
        "_fragments",
        "_messages",
        "_stopped",
        "expected",
        "id",
        "on_closed",
        "on_tokens",
        "sink",
        "state",
        "track",
    )

    def __init__(self, connection: CallerConnection, stream: int, sink: StreamSink, first_index: int | None):
        self._connection = connection
        self.id = stream
        self.sink = sink
        self.on_tokens = sink.on_tokens
        self.state: StreamState = "opening"
        self.expected = NOT_STREAMING
        """The output index that comes next; negative while none can come or any may."""
        self.track: object = None
        """What `Take` knows the stream by; None: it leaves it alone."""
        self.on_closed: Callable[[], None] | None = None
        """Called once when the stream is over, whichever way."""
        self._first_index = first_index
        self._messages = 0
        self._fragments: list[bytes] = []
        self._fragment_bytes = 0
        self._stopped = False

    def ride(self, track: object, take: Take) -> None:
        """Let ``take`` have the stream's tokens before they come to the sink one by one."""
        if self.state != "closed":
            self.track = track
            self._connection.take = take

    def stop(self, reason: str = "cancelled") -> None:
        """Ask for an orderly end; idempotent, harmless after the end."""
        if self.state != "closed" and not self._stopped:
            self._stopped = True
            self._connection.send(Stop(self.id, reason))

    def kill(self, reason: str = "cancelled") -> None:
        """Forget the stream; no callback follows; idempotent."""
        if self.state != "closed":
            self._connection.send(Kill(self.id, reason))
            self._connection.forget(self)

    def credit(self, tokens: int) -> None:
        """Allow the worker that many more tokens, or `Data` frames."""
        if self.state != "closed" and not self._stopped and tokens > 0:
            self._connection.send(Credit(self.id, tokens))

    def accepted(self) -> None:
        """The worker owns the stream: tokens may come."""
        self.state = "streaming"
        self.expected = ANY_INDEX if self._first_index is None else self._first_index

    def miscounted(self, end: End) -> StreamIncomplete | None:
        """Return what is wrong when a good end names another number of tokens than came, else None.

        A worker that repeats an index on the step that ends the stream would otherwise lose its last token unnoticed:
        the repetition is dropped, and no later index shows the gap.
        """
        if not end.tokens or end.error is not None or end.finish == "cancelled" or self._first_index is None:
            return None
        came = self.expected - self._first_index
        if came == end.tokens:
            return None
        return StreamIncomplete(
            f"stream {self.id} ended after {end.tokens} tokens by the worker's count; {came} different ones came",
            stream=self.id,
            sent=end.tokens,
            received=came,
        )

    def collect(self, frame: Data) -> bytes | None:
        """Return the message that this frame completes, or None.

        Credit for a fragment is given back at once, so that the owner's credit counts whole messages.

        Raises:
            StreamIncomplete: a message is missing, or one is over `limits.PAYLOAD_BYTES`.
        """
        if frame.index < self._messages:
            return None
        if frame.index > self._messages:
            raise StreamIncomplete(
                f"message {self._messages} of stream {self.id} is missing; {frame.index} came", stream=self.id
            )
        fragments = self._fragments
        fragments.append(frame.payload)
        self._fragment_bytes += len(frame.payload)
        if self._fragment_bytes > PAYLOAD_BYTES:
            raise StreamIncomplete(
                f"a message of stream {self.id} has over {PAYLOAD_BYTES} bytes",
                limit="PAYLOAD_BYTES",
                threshold=PAYLOAD_BYTES,
                actual=self._fragment_bytes,
            )
        if frame.more:
            self.credit(1)
            return None
        self._messages += 1
        self._fragments = []
        self._fragment_bytes = 0
        return fragments[0] if len(fragments) == 1 else b"".join(fragments)
