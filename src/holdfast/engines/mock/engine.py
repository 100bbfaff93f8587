"""The mock engine: what its sequences get in each step, and what it says of itself. `stepping` says when.

Must never block the loop, and never need more than a request to know its tokens.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Any

from holdfast.base.errors import EngineFailed, HandoffLost, HoldfastError, NoWorkers, UnsupportedFeature
from holdfast.base.ids import SequenceKey
from holdfast.engines.contract import (
    CacheCounts,
    DeathSink,
    EngineInfo,
    EngineLoad,
    EngineProgress,
    Finish,
    GenerateRequest,
    LoadProgress,
    SequenceStep,
    StepSink,
)
from holdfast.engines.mock import misbehaviour
from holdfast.engines.mock.config import MockConfig
from holdfast.engines.mock.directives import NONE, directives_of
from holdfast.engines.mock.info import engine_info
from holdfast.engines.mock.legs import Legs
from holdfast.engines.mock.misbehaviour import read_order
from holdfast.engines.mock.profiles import applied
from holdfast.engines.mock.rendezvous import Exchange, TcpExchange
from holdfast.engines.mock.scheduler import Batch
from holdfast.engines.mock.sequence import Sequence
from holdfast.engines.mock.stepping import SteppedEngine
from holdfast.engines.mock.validate import check_request
from holdfast.engines.mock.vocabulary import Vocabulary, vocabulary
from holdfast.kv.events import KvEvent

log = logging.getLogger(__name__)

_LOADING_STEPS = 20
_ONE_TOKEN = 4
"""Bytes of a canary's prompt."""


class MockEngine(SteppedEngine):
    """A simulated engine; see `directives` and `misbehaviour` for what it can be told to do."""

    def __init__(self, config: MockConfig | None = None):
        super().__init__(applied(config or MockConfig()))
        self._room = min(self.config.context_length, self.config.num_blocks * self.config.block_size)
        self._legs = Legs(self.config, self._pool, self._orders, self._arrived)
        self.kill, self.pause = misbehaviour.kill_self, misbehaviour.stop_self
        """What ``crash`` and ``freeze`` do to the process; the simulation puts its own in their place."""
        self._tokens = 0
        self._prefilled = 0
        self._on_death: DeathSink
        self._vocabulary: Vocabulary

    @property
    def _whole(self) -> bool:
        return self.config.local_prefill or self.role != "decode"

    def make_exchange(self) -> Exchange:
        """Return where its legs meet others; the simulation puts its own in place of this."""
        return TcpExchange()

    async def start(self, sink: StepSink, on_death: DeathSink, on_load: LoadProgress) -> EngineInfo:
        """Pretend to load and to warm up; see `Engine.start`."""
        self._loop = asyncio.get_running_loop()
        self._sink = sink
        self._on_death = on_death
        on_load("tokenizer", 0.0)
        self._vocabulary = vocabulary()
        if self.config.startup_seconds:
            for step in range(_LOADING_STEPS):
                on_load("weights", step / _LOADING_STEPS)
                await asyncio.sleep(self.config.startup_seconds / _LOADING_STEPS)
        self._phase, self._silent = "warming", self.config.warmup_seconds
        if self.config.warmup_seconds:
            on_load("warm-up", 0.0)
            await asyncio.sleep(self.config.warmup_seconds)
        self._phase, self._silent = "idle", 0.0
        rendezvous = ""
        if self.role != "aggregated" and self.config.handoff_phase == "rendezvous":
            self._legs.exchange = self.make_exchange()
            rendezvous = await self._legs.exchange.open() if self.role == "prefill" else ""
        on_load("ready", 1.0)
        return engine_info(self.config, self._vocabulary, self.role, rendezvous)

    def submit(self, key: SequenceKey, request: GenerateRequest) -> None:
        """Queue a sequence; see `Engine.submit`."""
        if self._dead:
            raise EngineFailed("The mock engine is dead.")
        check_request(request, room=self._room, vocabulary_size=self._vocabulary.size)
        if not self._whole and request.handoff is None and len(request.prompt_ids) > _ONE_TOKEN:
            raise NoWorkers("This mock engine is a decode worker's and computes no prompts (DYN_MOCK_LOCAL_PREFILL).")
        wish = directives_of(request, self._vocabulary) if self.config.directives else NONE
        if request.attempt <= wish.refuse_attempts or self._orders.due("refuse"):
            raise misbehaviour.refusal()
        sequence = Sequence(
            key,
            request,
            self._vocabulary,
            wish,
            eos_chance=self.config.eos_chance,
            room=self._room,
        )
        self._orders.compile_seconds += wish.compile_seconds
        if request.handoff is not None and not sequence.prefills:
            self._legs.receive(sequence, request.handoff)
            return
        self._scheduler.add(sequence)
        self._wake()

    def _arrived(self, sequence: Sequence, came: bool) -> None:
        """The blocks of a decode leg have come, or are lost."""
        if self._dead:
            return
        if not came and (self.config.handoff_failure == "fail" or not self._whole):
            lost = HandoffLost("The blocks of the hand-off did not come.")
            sequence.live = False
            self._sink([SequenceStep(sequence.key, sequence.index, [], finish="error", error=lost)])
            return
        sequence.received = came
        self._scheduler.add(sequence)
        self._wake()

    def cancel(self, key: SequenceKey) -> None:
        """Stop a sequence at once, or give back what is kept of it; see `Engine.cancel`."""
        if self._legs.let_go(key):
            self._wake()  # blocks that somebody may wait for
            return
        sequence = self._scheduler.find(key)
        if sequence is not None:
            self._scheduler.remove(sequence)
            self._hasten(sequence)

    def load(self) -> EngineLoad:
        """Return the present load; see `Engine.load`."""
        scheduler = self._scheduler
        prefill = sum(s.remaining for s in scheduler.running.values() if s.remaining > 1)
        return EngineLoad(
            running=len(scheduler.running),
            waiting=len(scheduler.waiting),
            kv_used_blocks=self._pool.used,
            kv_total_blocks=self._pool.total,
            prefill_tokens=prefill + sum(s.remaining for s in scheduler.waiting),
        )

    def progress(self) -> EngineProgress:
        """Return the progress counters; see `Engine.progress`."""
        return EngineProgress(self._steps, self._tokens, self._prefilled, self._phase, self._silent)

    def cache_counts(self) -> CacheCounts:
        """Return what its cache was asked and had; see `Engine.cache_counts`."""
        return CacheCounts(self._scheduler.looked_up, self._scheduler.found)

    def take_kv_events(self) -> list[KvEvent]:
        """Return and forget the KV events since the last call."""
        return self._pool.take_events()

    def kv_digests(self) -> tuple[tuple[int, int], ...]:
        """Return how many blocks are cached, and their digest."""
        return ((self._pool.cached, self._pool.digest),)

    def resend_kv_events(self) -> None:
        """Tell of the whole cache anew."""
        self._pool.resend()

    @property
    def kv_truth(self) -> tuple[frozenset[int], ...]:
        """Sequence hashes of all cached blocks, by rank; for tests and the simulation."""
        return (self._pool.contents,)

    async def check(self) -> None:
        """Raise EngineFailed after death; a hang shows in the counters only, as it does in real engines."""
        if self._dead:
            raise EngineFailed("The mock engine is dead.")

    async def close(self) -> None:
        """Stop all work; see `Engine.close`."""
        self.stop()
        if self._legs.exchange is not None:
            await self._legs.exchange.close()

    @property
    def in_hand(self) -> int:
        """Sequences that run or wait."""
        return len(self._scheduler.running) + len(self._scheduler.waiting) + self._legs.on_their_way

    @property
    def preemptions(self) -> int:
        """How often a sequence had to give its blocks back."""
        return self._scheduler.preemptions

    def misbehave(self, kind: misbehaviour.Kind, **how: Any) -> None:
        """Misbehave from now on; ``how`` are the fields of `misbehaviour.Order`."""
        self.control({"do": kind, **how})

    def control(self, command: dict[str, Any]) -> dict[str, Any]:
        """Obey one command, as the worker's control endpoint passes it on.

        Raises:
            UnsupportedFeature: the configuration forbids it.
            InvalidRequest: no such command.
        """
        if not self.config.control:
            raise UnsupportedFeature("This mock engine takes no commands (DYN_MOCK_CONTROL is off).")
        order = read_order(command)
        self._orders.give(order)
        if order.do == "crash":
            self.kill()
        elif order.do == "freeze":
            self.pause()
        elif order.do == "die":
            self._die(EngineFailed("The mock engine died on command."))
        elif order.do == "hang":
            self._hang(order.seconds)
        elif order.do == "clear":
            self._pool.clear()
        elif order.do == "unhang":
            self._unhang()
        return {"ok": True, "steps": self._steps, "hung": self._orders.hung}

    def _produce(self, batch: Batch) -> list[SequenceStep]:
        self._steps += 1
        self._prefilled += batch.prefill_tokens
        steps: list[SequenceStep] = []
        pool = self._pool
        seal = self.config.prefix_caching
        size = pool.block_size
        for sequence in batch.sequences:
            if not sequence.live:
                continue
            sequence.delay = 0.0
            tokens = sequence.scheduled
            if tokens == 1 and (sequence.computed + 1) % size:
                sequence.computed += 1
            else:
                sequence.advance(pool, tokens, seal=seal)
            if sequence.computed < len(sequence.ids):
                continue
            step = self._token(sequence)
            if step is not None:
                steps.append(step)
        return steps

    def _token(self, sequence: Sequence) -> SequenceStep | None:
        index = sequence.index
        if index == sequence.fault_at or self._orders.ends_ordered:
            handled, step = self._misfortune(sequence)
            if handled:
                return step
        if sequence.prefills:
            return self._handed_over(sequence)
        logprobs = None
        if sequence.wants_logprobs:
            token, logprob = sequence.chain.next_with_logprob(index)
            logprobs = [logprob]
        else:
            token = sequence.chain.next_token(index)
        sequence.ids.append(token)
        sequence.index = index + 1
        self._tokens += 1
        if token in sequence.ends:
            return self._ended(sequence, "stop", [token], logprobs=logprobs)
        if sequence.index >= sequence.limit:
            return self._ended(sequence, "length", [token], logprobs=logprobs)
        return SequenceStep(sequence.key, index, [token], logprobs=logprobs)

    def _handed_over(self, sequence: Sequence) -> SequenceStep:
        """The prompt of a prefill leg is computed."""
        self._scheduler.set_aside(sequence)
        cached = min(sequence.cached_tokens or 0, len(sequence.request.prompt_ids) // 4)
        handoff = self._legs.keep(sequence)
        return SequenceStep(sequence.key, sequence.index, [], finish="stop", handoff=handoff, cached_tokens=cached)

    def _ended(self, sequence: Sequence, finish: Finish, tokens: list[int], **more: Any) -> SequenceStep:
        self._scheduler.remove(sequence)
        return SequenceStep(
            sequence.key,
            sequence.index - len(tokens),
            tokens,
            finish=finish,
            cached_tokens=min(sequence.cached_tokens or 0, len(sequence.request.prompt_ids) // 4),
            **more,
        )

    # misbehaviour

    def _misfortune(self, sequence: Sequence) -> tuple[bool, SequenceStep | None]:
        """Let happen what was asked for in place of this token; returns (no token now, step)."""
        kind = sequence.wish.fault if sequence.index == sequence.fault_at else None
        if kind == "error" or (kind is None and self._orders.due("error")):
            return True, self._ended(sequence, "error", [], error=misbehaviour.ordered_error())
        if kind == "abort" or (kind is None and self._orders.due("abort")):
            return True, self._ended(sequence, "abort", [])
        if kind is None:
            return False, None
        sequence.fault_at = -1
        if kind == "crash":
            self.kill()
        elif kind == "freeze":
            self.pause()
            return False, None
        elif kind == "die":
            self._loop.call_soon(self._die, EngineFailed("The mock engine died on command."))
        elif kind == "hang":
            self._hang(0.0)
        return True, None

    def _die(self, error: HoldfastError) -> None:
        if not self._dead:
            self.stop()
            self._on_death(error)

    def _fail(self, error: Exception) -> None:
        log.error("The mock engine failed in step %d; it ends now.", self._steps, exc_info=error)
        self._die(EngineFailed(f"The mock engine failed in step {self._steps}: {type(error).__name__}: {error}"))

    def stop(self) -> None:
        """Stop all work at once; nothing is said about the sequences in hand."""
        self._stand_still()
        self._legs.clear()
        for sequence in [*self._scheduler.running.values(), *self._scheduler.waiting]:
            self._scheduler.remove(sequence)
