"""The two ends of a stream, as the rooms above see them.

`StreamHandler` is what a caller (a frontend) implements; `StreamHandle` is how it speaks back.
`IncomingCall` is what an endpoint's handler in a worker receives. All callbacks come from a connection's
read callback on the event loop: they must not block, and an exception in one is contained to its stream.

Must never know what the tokens mean.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from holdfast.base.errors import HoldfastError
from holdfast.wire.frames import OpenHeaders

Logprobs = list[tuple[float, list[tuple[int, float]]]]
"""Per token: (natural-log probability, [(token id, log probability) of the most likely ones])."""
NO_LOGPROB: tuple[float, list[tuple[int, float]]] = (math.nan, [])
"""Stands for a token whose worker does not tell (protocol version 1); compared by identity."""


class StreamHandler(Protocol):
    """One attempt as its caller sees it. After `on_refuse`, `on_end` or `on_broken` nothing more is called."""

    def on_accept(self) -> None:
        """The worker owns the stream."""

    def on_tokens(self, index: int, tokens: list[int], logprobs: Logprobs | None) -> None:
        """New tokens, in a list to keep; ``index``: output index of the first. Called per stream and frame."""

    def on_data(self, index: int, payload: bytes) -> None:
        """One message of a stream that carries messages instead of tokens."""

    def on_refuse(self, error: HoldfastError) -> None:
        """Never started."""

    def on_end(self, finish: str, error: HoldfastError | None, cached_tokens: int) -> None:
        """Ended by the worker, normally or with a typed error."""

    def on_broken(self, error: HoldfastError) -> None:
        """The stream stopped without an end: connection lost, peer declared dead, protocol broken."""


class StreamHandle(Protocol):
    """The caller's grip on an open stream."""

    @property
    def id(self) -> int:
        """Its number on the connection (`Pong.last_open`)."""

    def stop(self, reason: str = "cancelled") -> None:
        """Ask for an orderly end; idempotent, harmless after the end."""

    def kill(self, reason: str = "cancelled") -> None:
        """Forget the stream; no callback follows; idempotent."""

    def credit(self, tokens: int) -> None:
        """Allow the worker that many more tokens."""


class IncomingCall(Protocol):
    """One stream as the endpoint's handler in a worker sees it."""

    connection: ServerConnection
    stream: int
    endpoint: str
    headers: OpenHeaders
    payload: bytes
    on_stop: Callable[[str], None] | None
    """Set by the handler; called at most once with the reason when the caller stops, kills or is lost.
    After kill or loss nothing that the handler sends goes anywhere."""

    def accept(self) -> None:
        """Take ownership; must happen before any item."""

    def refuse(self, error: HoldfastError) -> None:
        """Decline; the stream is over."""

    def send_data(self, payload: bytes) -> None:
        """Send one message."""

    def end(self, finish: str, error: HoldfastError | None = None, cached_tokens: int = 0, tokens: int = 0) -> None:
        """End the stream. Tokens still waiting for credit are delivered before the end.

        Args:
            finish: why, as in `wire.frames.End`.
            error: what went wrong, if anything.
            cached_tokens: prompt tokens that came from a prefix cache.
            tokens: how many were sent in all, for the caller to compare; 0: not said.
        """


class TokenItem:
    """New tokens of one stream in one engine step."""

    __slots__ = ("call", "index", "logprobs", "tokens")

    def __init__(self, call: IncomingCall, index: int, tokens: list[int], logprobs: Logprobs | None = None):
        self.call = call
        self.index = index
        self.tokens = tokens
        self.logprobs = logprobs


class ServerConnection(Protocol):
    """A caller's connection as the worker sees it."""

    caller: str

    def send_items(self, items: Sequence[TokenItem]) -> None:
        """Send the tokens of one engine step for streams of this connection, as one frame where credit allows.

        Ends that the handlers announce right after (`IncomingCall.end`) leave in the same write.
        """


CallHandler = Callable[[IncomingCall], None]
"""Serves one endpoint: synchronous, quick; long work is the handler's own task."""

PongSource = Callable[[], tuple[Any, Any, str]]
"""Returns (wire.frames.Progress, wire.frames.Load, worker state) for the next pong."""
