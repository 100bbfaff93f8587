"""A fleet without sockets: workers whose streams a test drives by hand, and the true tokens to compare with."""

from __future__ import annotations

import asyncio
import random
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import msgspec

from holdfast.base.errors import Disconnected, HoldfastError
from holdfast.base.limits import INITIAL_CREDIT_TOKENS
from holdfast.engines.contract import GenerateRequest, Sampling, StopRules, pack_ids
from holdfast.engines.handoff import KvHandoff, digest_of
from holdfast.models.card import Artifact, ModelCard
from holdfast.requests.config import RequestSettings
from holdfast.requests.flusher import Flusher
from holdfast.requests.generation import GO_ON, Generation
from holdfast.requests.plan import Deadlines, Ending, Plan
from holdfast.requests.prefill_leg import PrefillLeg
from holdfast.requests.request import Request
from holdfast.requests.service import Services
from holdfast.routing.kv import Knowledge
from holdfast.routing.policy import RouterMode
from holdfast.runtime.streams import Logprobs, StreamHandler
from holdfast.wire.frames import OpenHeaders, Pong

MODEL = "m"
EOS = 7
_decode = msgspec.msgpack.Decoder(GenerateRequest).decode


def next_token(prompt_ids: bytes, generated: Sequence[int]) -> int:
    """The only right token after these: any state that was lost or altered shows."""
    return 100 + zlib.crc32(prompt_ids + pack_ids(generated)) % 50_000


def truth(prompt_ids: bytes, length: int, eos_at: int | None = None) -> list[int]:
    """What an undisturbed run says."""
    ids: list[int] = []
    while len(ids) < length:
        if eos_at == len(ids):
            return [*ids, EOS]
        ids.append(next_token(prompt_ids, ids))
    return ids


def card(fingerprint: str = "build-1", continuation: str = "exact", **more: Any) -> ModelCard:
    nothing = Artifact("0" * 64, 0)
    return ModelCard(
        MODEL, nothing, nothing, 4096, (EOS,), 50_200, 16, fingerprint=fingerprint, continuation=continuation, **more
    )


class FakeStream:
    """The worker's end of one attempt; also the handle that `open` returns."""

    def __init__(self, worker: FakeWorker, headers: OpenHeaders, payload: bytes, handler: StreamHandler, credit: int):
        self.worker = worker
        self.endpoint = "generate"
        self.id = len(worker.opened) + 1
        self.headers = headers
        self.request = _decode(payload)
        self.handler = handler
        self.ids = list(memoryview(self.request.generated_ids).cast("I")) if self.request.generated_ids else []
        self.begin = len(self.ids)
        self.accepted = False
        self.over = False
        """The caller must hear nothing more from it; a thawed worker does not care."""
        self.killed = ""
        self.allowed = self.begin + credit
        self.credits: list[int] = []
        self.first_index: int | None = None
        """Where the caller expects it to begin."""

    # what the caller does

    def stop(self, reason: str = "cancelled") -> None:
        self.kill(reason)

    def kill(self, reason: str = "cancelled") -> None:
        if not self.over:
            self.killed = reason
            self._close()

    def credit(self, tokens: int) -> None:
        self.credits.append(tokens)
        self.allowed += tokens

    # what the worker does

    def accept(self) -> FakeStream:
        self.accepted = True
        with self.worker.fleet.read():
            self.handler.on_accept()
        return self

    def think(self, count: int) -> list[int]:
        """Generate without sending."""
        new = []
        for _ in range(count):
            eos = self.worker.eos_at(self.request)
            new.append(EOS if eos == len(self.ids) else next_token(self.request.prompt_ids, self.ids))
            self.ids.append(new[-1])
        return new

    def emit(self, count: int = 1, *, logprobs: bool = False) -> FakeStream:
        index = len(self.ids)
        new = self.think(count)
        with self.worker.fleet.read():
            self.handler.on_tokens(index, new, [(-0.5, [(t, -0.5)]) for t in new] if logprobs else None)
        return self

    def say(self, index: int, tokens: list[int]) -> FakeStream:
        """Send anything."""
        with self.worker.fleet.read():
            self.handler.on_tokens(index, tokens, None)
        return self

    def hand_over(self, **changes: Any) -> FakeStream:
        """Send what a prefill worker answers."""
        request = self.request
        tokens = (len(request.prompt_ids) + len(request.generated_ids)) // 4
        digest = digest_of(request.prompt_ids, request.generated_ids)
        facts = {"tokens": tokens, "digest": digest, "source": self.worker.instance, **changes}
        with self.worker.fleet.read():
            self.handler.on_data(0, msgspec.msgpack.encode(KvHandoff("mock", "after_prefill", **facts)))
        return self

    def end(self, finish: str = "stop", error: HoldfastError | None = None, cached: int = 0) -> FakeStream:
        self._close()
        with self.worker.fleet.read():
            self.handler.on_end(finish, error, cached)
        return self

    def refuse(self, error: HoldfastError) -> FakeStream:
        self._close()
        with self.worker.fleet.read():
            self.handler.on_refuse(error)
        return self

    def breaks(self, error: HoldfastError | None = None) -> FakeStream:
        self._close()
        with self.worker.fleet.read():
            self.handler.on_broken(error or Disconnected("connection reset by peer"))
        return self

    def _close(self) -> None:
        self.over = True
        self.worker.streams.pop(id(self), None)


class FakeWorker:
    """A worker as `requests.fleet.ServingWorker`; every `open` shows up in ``opened``."""

    def __init__(self, fleet: Fleet, name: str, model_card: ModelCard | None = None):
        self.fleet = fleet
        self.instance = name
        self.epoch = 1
        self.usable = True
        self.hesitant = False
        self.queued = 0
        self.pong: Pong | None = None
        self.cards = {MODEL: model_card or card()}
        self.streams: dict[int, FakeStream] = {}
        self.opened: list[FakeStream] = []
        self.failures: list[HoldfastError] = []
        self.successes = 0
        self.open_error: HoldfastError | None = None
        self.on_open: Callable[[FakeStream], None] | None = None
        """Called after `open` has returned."""
        self.eos: Callable[[GenerateRequest], int | None] | None = None

    def eos_at(self, request: GenerateRequest) -> int | None:
        return self.eos(request) if self.eos else None

    @property
    def in_flight(self) -> int:
        return len(self.streams)

    def card(self, model: str) -> ModelCard | None:
        return self.cards.get(model)

    def fingerprint_of(self, model: str) -> str:
        found = self.cards.get(model)
        return found.fingerprint if found else ""

    def open(
        self,
        endpoint: str,
        headers: OpenHeaders,
        payload: bytes,
        handler: StreamHandler,
        *,
        credit: int = 0,
        first_index: int | None = None,
    ) -> FakeStream:
        assert endpoint in ("generate", "prefill")
        if self.open_error is not None:
            raise self.open_error
        stream = FakeStream(self, headers, payload, handler, credit or INITIAL_CREDIT_TOKENS)
        stream.first_index, stream.endpoint = first_index, endpoint
        assert stream.request.attempt == headers.attempt
        self.opened.append(stream)
        self.streams[id(stream)] = stream
        self.fleet.attempts.append(stream)
        if self.on_open is not None:
            asyncio.get_running_loop().call_soon(self.on_open, stream)
        return stream

    def report_failure(self, error: HoldfastError) -> None:
        self.failures.append(error)

    def report_success(self) -> None:
        self.successes += 1

    # what happens to it

    def die(self, error: HoldfastError | None = None) -> list[FakeStream]:
        """The process is gone: state first, then all streams in one callback, as the pool does it."""
        self.usable = False
        lost = list(self.streams.values())
        self.streams.clear()
        self.fleet.tell("state", self)
        with self.fleet.read():
            for stream in lost:
                stream.over = True
                stream.handler.on_broken(error or Disconnected(f"worker {self.instance}: connection reset"))
        self.fleet.deaths += 1
        return lost

    def restart(self) -> None:
        self.epoch += 1
        self.usable = True
        self.fleet.tell("state", self)


class Fleet:
    """The pool, and everything that a frontend process shares."""

    def __init__(
        self,
        workers: int = 2,
        *,
        mode: RouterMode = "round-robin",
        settings: dict[str, Any] | None = None,
        knowledge: Knowledge | None = None,
    ):
        self.workers = [FakeWorker(self, f"w{i + 1}") for i in range(workers)]
        self.attempts: list[FakeStream] = []
        self.expected = True
        self.deaths = 0
        self._sinks: list[Callable[[str, object], None]] = []
        self.flusher = Flusher()
        self._reading = 0
        self.seen = Seen()
        self.settings = RequestSettings(**(settings or {}))
        self.services = Services(
            self.settings, self, self.flusher, self.seen, rng=random.Random(1), mode=mode, knowledge=knowledge
        )

    # requests.fleet.Pool

    def usable(self, model: str) -> list[FakeWorker]:
        return [w for w in self.workers if w.usable and model in w.cards and w.cards[model].role != "prefill"]

    def has_prefill(self, model: str) -> bool:
        return any(model in w.cards and w.cards[model].role == "prefill" for w in self.workers)

    def needs_prefill(self, model: str) -> bool:
        return any(model in w.cards and not w.cards[model].local_prefill for w in self.workers)

    def prefill_workers(self, model: str) -> list[FakeWorker]:
        return [w for w in self.workers if model in w.cards and w.cards[model].role == "prefill"]

    def prefill(self, model: str) -> list[FakeWorker]:
        return [w for w in self.workers if w.usable and model in w.cards and w.cards[model].role == "prefill"]

    def replacement_expected(self, model: str) -> bool:
        return self.expected

    def subscribe(self, callback: Callable[[str, object], None]) -> Callable[[], None]:
        self._sinks.append(callback)
        return lambda: self._sinks.remove(callback)

    # for tests

    def tell(self, kind: str, worker: FakeWorker) -> None:
        for sink in list(self._sinks):
            sink(kind, worker)

    def add(self, name: str, **kwargs: Any) -> FakeWorker:
        worker = FakeWorker(self, name, **kwargs)
        self.workers.append(worker)
        self.tell("added", worker)
        return worker

    @contextmanager
    def read(self) -> Iterator[None]:
        """One read of a connection: everything inside is flushed once at its end."""
        self._reading += 1
        try:
            yield
        finally:
            self._reading -= 1
            if not self._reading:
                self.flusher.flush()

    def leases(self) -> dict[str, int]:
        return {kind: held for kind, held in self.services.leases.sums().items() if held}

    def start(self, **kwargs: Any) -> Client:
        return Client(self, **kwargs)


class Seen:
    """An observer that remembers."""

    def __init__(self) -> None:
        self.events: list[tuple[str, Any]] = []

    def attempt_started(self, generation: Generation) -> None:
        self.events.append(("attempt", generation))

    def attempt_sent(self, seconds: float) -> None:
        pass

    def first_token(self, generation: Generation) -> None:
        pass

    def progressed(self, generation: Generation) -> None:
        pass

    def accepted(self, generation: Generation, first: bool) -> None:
        self.events.append(("accepted", first))

    def migration_started(self, generation: Generation, error: HoldfastError) -> None:
        self.events.append((generation.migration_type, error))

    def migrated(self, generation: Generation, gap_seconds: float) -> None:
        self.events.append(("migrated", gap_seconds))

    def prefill_decided(self, generation: Generation, reason: str) -> None:
        self.events.append(("decided", reason))

    def prefill_started(self, generation: Generation, leg: PrefillLeg) -> None:
        self.events.append(("leg started", leg.placed.worker.instance))

    def prefill_ended(
        self, generation: Generation, leg: PrefillLeg, error: HoldfastError | None, seconds: float
    ) -> None:
        self.events.append(("leg", error.code if error is not None else "handed_over"))

    def ended(self, generation: Generation, ending: Ending) -> None:
        self.events.append(("ended", ending))

    def all(self, kind: str) -> list[Any]:
        return [what for name, what in self.events if name == kind]


class Sink:
    """A client's end of one stream."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.logprobs: Logprobs = []
        self.endings: list[Ending] = []
        self.owners: list[str] = []
        self.blocked_since: float | None = None
        self.client = self
        self.stop_at: int | None = None
        """A stop string ends with this token count."""
        self.fault: Exception | None = None

    def accepted(self, worker: str) -> None:
        self.owners.append(worker)

    def deliver(self, tokens: list[int], logprobs: Logprobs | None) -> int:
        if self.fault is not None:
            raise self.fault
        assert not self.endings, "tokens after the terminal event"
        assert self.blocked_since is None, "tokens for a blocked client"
        before = len(self.tokens)
        if self.stop_at is not None and before + len(tokens) >= self.stop_at:
            self.tokens.extend(tokens[: self.stop_at - before])
            return self.stop_at - before
        self.tokens.extend(tokens)
        if logprobs is not None:
            assert len(logprobs) == len(tokens)
            self.logprobs.extend(logprobs)
        return GO_ON

    def ended(self, ending: Ending) -> None:
        self.endings.append(ending)


def bounds(**changes: float) -> Deadlines:
    base = {"accept_hedge": 0.5, "accept": 10.0, "first_token": 600.0, "inter_token": 120.0, "total": 3600.0}
    return Deadlines(**{**base, "client_stall": 60.0, "wait": 30.0, **changes})


_names = iter(range(1, 10**9))


def plan(length: int = 10, *, prompt: Sequence[int] = (1, 2, 3), choice: int = 0, **changes: Any) -> Plan:
    limits = {k: changes.pop(k) for k in list(changes) if k in Deadlines.__struct_fields__}
    min_tokens = changes.pop("min_tokens", 0)
    base: dict[str, Any] = {
        "request_id": f"r{next(_names)}",
        "model": MODEL,
        "prompt_ids": pack_ids([*prompt, choice]),
        "prompt_length": len(prompt) + 1,
        "sampling": Sampling(temperature=0.0),
        "stop": StopRules(max_tokens=length, min_tokens=min_tokens),
        "context_length": 4096,
        "deadlines": bounds(**limits),
        "choice": choice,
        "terminal_ids": frozenset({EOS}),
    }
    return Plan(**{**base, **changes})


class Client:
    """One request of one or more streams, running in a task of its own."""

    def __init__(self, fleet: Fleet, *, n: int = 1, run: bool = True, **kwargs: Any):
        self.fleet = fleet
        self.plans = [plan(choice=c, **kwargs) for c in range(n)]
        self.sinks = [Sink() for _ in range(n)]
        self.request = Request(fleet.services, list(zip(self.plans, self.sinks, strict=True)))
        self.task = asyncio.get_running_loop().create_task(self.request.run()) if run else None

    @property
    def sink(self) -> Sink:
        return self.sinks[0]

    @property
    def stream(self) -> Generation:
        return self.request.streams[0]

    @property
    def ending(self) -> Ending:
        return self.sink.endings[0]

    async def done(self, within: float = 100.0) -> Ending:
        """Wait for the end of the request and check what must always hold."""
        assert self.task is not None
        async with asyncio.timeout(within):
            await self.task
        for sink, one in zip(self.sinks, self.plans, strict=True):
            check_stream(one, sink)
        return self.ending


def check_stream(one: Plan, sink: Sink, eos_at: int | None = None) -> None:
    """Promises P1 to P3 for one stream at rest."""
    true = truth(one.prompt_ids, one.stop.max_tokens, eos_at)
    got = sink.tokens
    if EOS in got and eos_at is None:
        true = truth(one.prompt_ids, one.stop.max_tokens, got.index(EOS))
    assert got == true[: len(got)], "P1: what the client got is no prefix of the true sequence"
    assert len(sink.endings) == 1, f"P2: {len(sink.endings)} terminal events"
    ending = sink.endings[0]
    assert ending.completion_tokens == len(got), "P3: usage differs from what was delivered"
    assert len(sink.owners) <= 1, "accepted twice"
    if ending.state == "done" and ending.finish == "length":
        full = len(got) == one.stop.max_tokens or one.prompt_length + len(got) >= one.context_length
        assert full, "P1: ended by 'length' before the length"
    if ending.state == "rejected":
        assert not sink.owners, "P6: rejected after a worker had accepted"


async def settle(turns: int = 12) -> None:
    """Let everything happen that needs no time to pass."""
    for _ in range(turns):
        await asyncio.sleep(0)
