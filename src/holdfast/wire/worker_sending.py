"""What a worker sends on the streams of one connection, and what it holds back.

Tokens of one engine step leave as one frame. What has no credit, or comes while the network is full, waits
in its stream within the limits of `base.limits`; one stream over a limit is ended with a typed error. Must never
let one stream's trouble touch another's tokens.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

from holdfast.base.errors import CapacityExhausted, HoldfastError, InternalError, PayloadTooLarge
from holdfast.base.limits import (
    PART_BYTES,
    PAYLOAD_BYTES,
    UNSENT_MESSAGE_BYTES_PER_CONNECTION,
    UNSENT_MESSAGE_BYTES_PER_STREAM,
    UNSENT_TOKENS_PER_CONNECTION,
    UNSENT_TOKENS_PER_STREAM,
)
from holdfast.wire.columns import Entry, Logprobs, encode_items
from holdfast.wire.errors import pack_error
from holdfast.wire.frames import FRAGMENTS_SINCE, LOGPROBS_SINCE, Accept, Data, End, Refuse, WorkerFrame
from holdfast.wire.outbox import Outbox
from holdfast.wire.worker_stream import WorkerStream, weight_of

log = logging.getLogger(__name__)

RELEASE_TOKENS = 16_384
"""Waiting tokens that `WorkerStreams.release` lets go at once."""

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


class WorkerStreams:
    """The streams of one connection that are not over, and everything said on them.

    Args:
        on_stopped: told once per stream why nobody wants it any more; must not raise.
    """

    def __init__(self, on_stopped: OnStopped):
        self.caller = ""
        """The id the caller gave itself; empty before its hello."""
        self.version = 0
        self.outbox = Outbox()
        self.paused = False
        """The network takes no more: everything with tokens waits."""
        self._on_stopped = on_stopped
        self._streams: dict[int, WorkerStream] = {}
        self._backlog: dict[int, WorkerStream] = {}
        self._undelivered: dict[int, None] = {}
        self._held_weight = 0
        self._held_bytes = 0
        self._owed = False
        """Something may wait that has credit."""

    @property
    def streams(self) -> list[WorkerStream]:
        """The streams that are not over, oldest first."""
        return list(self._streams.values())

    @property
    def open_streams(self) -> int:
        """How many streams are not over."""
        return len(self._streams)

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
                self._hold(stream, item, entries)
        if entries:
            self._put_entries(entries)

    def _hold(self, stream: WorkerStream, item: Item, entries: list[Entry]) -> None:
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
        self._backlog.setdefault(stream.id, stream)
        if self.paused or (stream.credit > 0 and self._release_stream(stream, entries, RELEASE_TOKENS) <= 0):
            self._owed = True
        if stream.waiting:
            self._check_unsent(stream)
        else:
            self._flows_again(stream)

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
                self._owed = self._owed or self.paused
        stream.messages += 1
        if stream.waiting:
            self._backlog.setdefault(stream.id, stream)
            self._check_unsent(stream)

    def end(
        self,
        stream: WorkerStream,
        finish: str,
        error: HoldfastError | None = None,
        cached_tokens: int = 0,
        tokens: int = 0,
    ) -> None:
        """End a stream; what waits for credit is delivered before the end, unless the caller asked to stop."""
        if stream.over or stream.pending_end is not None:
            return
        if stream.state == "opened":
            if error is not None:
                self.refuse(stream, error)
                return
            self.accept(stream)
        frame = End(stream.id, finish, None if error is None else pack_error(error), cached_tokens, tokens)
        if stream.waiting:
            stream.state = "ending"
            stream.pending_end = frame
        else:
            self._finish(stream, frame)

    def _tell_stopped(self, stream: WorkerStream, reason: str) -> None:
        if stream.stop_reason is None:
            stream.stop_reason = reason
            stream.flow_changed()
            self._on_stopped(stream, reason)

    # -- what waits for credit or for the network ----------------------------------------------------

    @property
    def releasable(self) -> bool:
        """Whether something waits that has credit."""
        self._owed = self._owed and any(stream.credit > 0 for stream in self._backlog.values())
        return self._owed

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
        self._owed = self._owed or budget <= 0
        for stream in streams:
            if not stream.waiting and not stream.over:
                self._flows_again(stream)

    def _release_stream(self, stream: WorkerStream, entries: list[Entry], budget: int) -> int:
        while (piece := stream.release(budget)) is not None:
            if isinstance(piece, Data):
                self._held_bytes -= len(piece.payload)
                if entries:
                    self._put_entries(entries)
                    entries.clear()
                self.outbox.put(piece)
                budget -= len(piece.payload) // 4 + 1
            else:
                entries.append(piece)
                self._held_weight -= weight_of(piece)
                budget -= len(piece[2])
        if self._backlog.pop(stream.id, None) is not None and stream.waiting:
            self._backlog[stream.id] = stream
        return budget

    def _flows_again(self, stream: WorkerStream) -> None:
        if stream.pending_end is not None:
            self._finish(stream, stream.pending_end)
        else:
            stream.flowing = stream.state == "accepted" and stream.stop_reason is None
            stream.flow_changed()

    def _check_unsent(self, stream: WorkerStream) -> None:
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
