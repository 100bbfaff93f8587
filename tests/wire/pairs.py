"""Two connection machines back to back, and a sink that writes down what it is told."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

from holdfast.base.errors import HoldfastError
from holdfast.wire.caller import CallerConnection
from holdfast.wire.caller_stream import CallerStream
from holdfast.wire.frames import OLDEST_VERSION, VERSION, Hello, OpenHeaders
from holdfast.wire.worker import Joined, Opened, WorkerConnection
from holdfast.wire.worker_stream import WorkerStream

NONCE = b"n" * 16


class Sink:
    """Writes down every callback; `raising` names those that raise."""

    def __init__(self, raising: Sequence[str] = ()):
        self.calls: list[tuple[Any, ...]] = []
        self.tokens: list[int] = []
        self.messages: list[bytes] = []
        self.logprobs: list[Any] = []
        self.next_index: int | None = None
        self.final: str | None = None
        self.error: HoldfastError | None = None
        self.raising = raising

    def _note(self, name: str, *rest: Any) -> None:
        assert self.final is None, f"{name} after {self.final}"
        self.calls.append((name, *rest))
        if name in self.raising:
            raise RuntimeError(f"sink raises in {name}")

    def on_accept(self) -> None:
        self._note("accept")

    def on_tokens(self, index: int, tokens: Sequence[int], logprobs: Any) -> None:
        self._note("tokens", index, list(tokens))
        assert self.next_index is None or self.next_index == index
        self.next_index = index + len(tokens)
        self.tokens += tokens
        self.logprobs += logprobs if logprobs is not None else [None] * len(tokens)

    def on_data(self, index: int, payload: bytes) -> None:
        self._note("data", index)
        self.messages.append(payload)

    def _final(self, name: str, error: HoldfastError | None) -> None:
        self._note(name)
        self.final, self.error = name, error

    def on_refuse(self, error: HoldfastError) -> None:
        self._final("refuse", error)

    def on_end(self, finish: str, error: HoldfastError | None, cached_tokens: int) -> None:
        self._final(f"end:{finish}", error)
        self.cached_tokens = cached_tokens

    def on_broken(self, error: HoldfastError) -> None:
        self._final("broken", error)

    @property
    def names(self) -> list[str]:
        return [call[0] for call in self.calls]


class Token:
    """An item of an engine step."""

    def __init__(self, call: Any, index: int, tokens: list[int], logprobs: Any = None):
        self.call = call
        self.index = index
        self.tokens = tokens
        self.logprobs = logprobs


class Ref:
    """What knows its stream's number."""

    def __init__(self, stream: int):
        self.stream = stream


def hello(**changes: Any) -> Hello:
    fields: dict[str, Any] = {
        "version_min": OLDEST_VERSION,
        "version_max": VERSION,
        "caller": "tester",
        "channel": "control",
        "nonce": NONCE,
    }
    return Hello(**{**fields, **changes})


class Pair:
    """A caller's and a worker's machine; bytes go across when told, split as ``rng`` likes."""

    def __init__(self, rng: random.Random | None = None, secret: bytes = b"", **changes: Any):
        self.rng = rng
        self.stopped: list[tuple[int, str]] = []
        self.opened: list[WorkerStream] = []
        self.events: list[Any] = []
        self.caller = CallerConnection(hello(**changes), secret)
        self.worker = WorkerConnection(
            "w1", 77, lambda stream, reason: self.stopped.append((stream.id, reason)), secret=secret, nonce=b"w" * 16
        )

    def _pieces(self, data: bytes) -> list[bytes]:
        if self.rng is None or len(data) < 2:
            return [data] if data else []
        cuts = sorted(self.rng.sample(range(1, len(data)), min(self.rng.randint(0, 5), len(data) - 1)))
        return [data[a:b] for a, b in zip([0, *cuts], [*cuts, len(data)], strict=True)]

    def to_worker(self) -> None:
        for piece in self._pieces(bytes(self.caller.outbox.take())):
            for event in self.worker.receive(piece):
                if isinstance(event, Joined):
                    self.worker.join()
                elif isinstance(event, Opened):
                    self.worker.delivered(event.stream)
                    self.opened.append(event.stream)
                else:
                    self.events.append(event)

    def to_caller(self) -> None:
        for piece in self._pieces(bytes(self.worker.outbox.take())):
            self.events += self.caller.receive(piece)

    def exchange(self) -> None:
        while self.caller.outbox or self.worker.outbox:
            self.to_worker()
            self.to_caller()

    def open(self, sink: Sink | None = None, **more: Any) -> tuple[CallerStream, WorkerStream, Sink]:
        sink = sink if sink is not None else Sink()
        stream = self.caller.open("generate", OpenHeaders(request_id="r"), b"payload", sink, **more)
        self.exchange()
        return stream, self.opened[-1], sink

    def accepted(self, **more: Any) -> tuple[CallerStream, WorkerStream, Sink]:
        stream, remote, sink = self.open(**more)
        self.worker.accept(remote)
        self.exchange()
        return stream, remote, sink

    def send(self, *entries: tuple[WorkerStream, int, list[int]]) -> None:
        self.worker.send_items([Token(Ref(stream.id), index, tokens) for stream, index, tokens in entries])


def joined(**more: Any) -> Pair:
    pair = Pair(**more)
    pair.exchange()
    pair.events.clear()
    return pair
