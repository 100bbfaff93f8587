"""The engine thread: loads the model, then computes one step after the other until it is told to stop.

Everything that touches llama.cpp's context happens here, in one thread. The event loop hands sequences over through
`Core.inbox` and takes results from the ``emit`` callback; it reads counters and flags without locks.

Must never call into asyncio except through the callbacks it was given.
"""

from __future__ import annotations

import queue
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path

import numpy as np

from holdfast.base.errors import EngineFailed, HoldfastError, InternalError
from holdfast.engines.contract import Finish, LoadProgress, Phase, SequenceStep, TokenLogprob
from holdfast.engines.llamacpp.config import CHUNK_TOKENS, LlamaCppConfig
from holdfast.engines.llamacpp.context import NO_SLOT, LlamaContext, LlamaModel, Logits
from holdfast.engines.llamacpp.guided import GrammarState
from holdfast.engines.llamacpp.library import LlamaLibrary
from holdfast.engines.llamacpp.sampler import TokenSampler, logprob_of
from holdfast.engines.llamacpp.schedule import Chunk, plan_step
from holdfast.engines.llamacpp.sequence import Sequence
from holdfast.engines.llamacpp.slots import SlotCache

_CONTEXT_STEP = 256
"""llama.cpp rounds the context of a sequence up to this many tokens."""


class Core:
    """Model, context, slots and the loop over steps. Built and run by the engine thread."""

    def __init__(self, library: LlamaLibrary, path: Path, config: LlamaCppConfig, on_load: LoadProgress):
        """Load weights and allocate the KV cache. Raises EngineFailed with what to do."""
        self.inbox: queue.SimpleQueue[Sequence | None] = queue.SimpleQueue()
        """New sequences; None only wakes the thread. Bounded by the engine's limit on live sequences."""
        self.stopping = False
        self.steps = 0
        self.tokens = 0
        self.prefilled = 0
        self.looked_up = self.found = 0
        """Tokens that sequences began with, and those among them that a slot had."""
        self.tokens_after_cancel = 0
        self.phase: Phase = "starting"
        self.beat = time.monotonic()
        self.expected: dict[Phase, float] = {"prefill": 1.0, "decode": 0.5}
        """Longest expected step per phase in seconds: a maximum that decays towards what steps take."""
        on_load("loading weights", 0.1)
        self.model = LlamaModel(library, path)
        self.end_ids = self.model.end_ids
        room = -(-config.context_length // _CONTEXT_STEP) * _CONTEXT_STEP
        self.context_length = min(room, self.model.trained_context)
        slots = config.max_num_seqs + config.parked_seqs
        on_load("allocating the KV cache", 0.4)
        self._context = LlamaContext(
            self.model, slots=slots, context_length=self.context_length, threads=config.threads
        )
        self.cache = SlotCache(self._context, slots=slots, block_size=config.block_size)
        self.total_blocks = slots * (self.context_length // config.block_size)
        self._max_running = config.max_num_seqs
        self._waiting: deque[Sequence] = deque()
        self._running: list[Sequence] = []
        self._warm_up(on_load)

    def _warm_up(self, on_load: LoadProgress) -> None:
        """Compute one token, so that the weights are in memory before the first request."""
        on_load("warming up", 0.8)
        self.phase = "warming"
        self._context.begin()
        self._context.add(0, [self.end_ids[0] if self.end_ids else 0], 0, wanted=True)
        if self._context.decode() != 0:
            raise EngineFailed("llama.cpp finds no room for a single token; raise context_length.")
        self._context.truncate(0, 0)
        self.phase = "idle"

    def run(self, emit: Callable[[list[SequenceStep]], None]) -> None:
        """Compute until `stopping` is set. Whatever is raised here means that the engine is dead."""
        while not self.stopping:
            self._receive()
            self._drop_cancelled()
            results = self._admit()
            if self._running:
                results += self._step()
            self.beat = time.monotonic()
            if results:
                emit(results)

    def close(self) -> None:
        """Free everything. Idempotent; only after the thread has ended."""
        for sequence in (*self._running, *self._waiting):
            _close_grammar(sequence)
        self._context.close()
        self.model.close()

    def _receive(self) -> None:
        """Take what is in the inbox; block while there is nothing to do."""
        idle = not self._running and not self._waiting
        if idle:
            self.phase = "idle"
        while not self.stopping:
            try:
                sequence = self.inbox.get(block=idle)
            except queue.Empty:
                return
            idle = False
            if sequence is not None:
                self._waiting.append(sequence)

    def _drop_cancelled(self) -> None:
        for sequence in [s for s in self._running if s.cancelled]:
            self._leave(sequence)
        if any(s.cancelled for s in self._waiting):
            for sequence in self._waiting:
                if sequence.cancelled:
                    _close_grammar(sequence)
            self._waiting = deque(s for s in self._waiting if not s.cancelled)

    def _admit(self) -> list[SequenceStep]:
        """Give slots to waiting sequences in order of arrival; returns steps of those that are over at once."""
        results = []
        while self._waiting and len(self._running) < self._max_running:
            sequence = self._waiting.popleft()
            finish = sequence.finish_reason(self.context_length)
            if finish is not None:
                results.append(self._end(sequence, [], finish))
                continue
            try:
                self._prepare(sequence)
            except HoldfastError as error:
                results.append(self._end(sequence, [], "error", error))
        return results

    def _prepare(self, sequence: Sequence) -> None:
        prompt, generated = sequence.tokens[: sequence.prompt], sequence.tokens[sequence.prompt :]
        if sequence.grammar is not None:
            sequence.grammar.replay(generated)
        sequence.sampler = TokenSampler(
            sequence.sampling,
            sequence.stop,
            vocab_size=self.model.vocab_size,
            end_ids=self.end_ids,
            prompt=prompt,
            generated=generated,
        )
        slot = self.cache.acquire(sequence.tokens, sequence.scope)
        if slot is None:
            raise InternalError("All KV slots are busy although fewer sequences than slots run.")
        sequence.computed = len(slot.tokens)
        sequence.cached = min(sequence.computed, sequence.prompt)
        self.looked_up += len(sequence.tokens)
        self.found += sequence.computed
        sequence.slot = slot
        self._running.append(sequence)

    def _step(self) -> list[SequenceStep]:
        chunks = plan_step(self._running, CHUNK_TOKENS)
        prefill = sum(chunk.size for chunk in chunks if chunk.sequence.pending > 1)
        self.phase = "prefill" if prefill else "decode"
        started = time.monotonic()
        rows = self._load_batch(chunks)
        if self._context.decode() == NO_SLOT:
            return self._make_room()
        for chunk in chunks:
            self._advance(chunk)
        self.prefilled += prefill
        results = [self._sample(chunk.sequence, row) for chunk, row in rows if not self._too_late(chunk.sequence)]
        self.steps += 1
        took = time.monotonic() - started
        self.expected[self.phase] = max(took, 0.95 * self.expected[self.phase] + 0.05 * took)
        return results

    def _load_batch(self, chunks: list[Chunk]) -> list[tuple[Chunk, int]]:
        """Fill the batch in order of slots, since neighbouring slots are computed together."""
        rows = []
        self._context.begin()
        for chunk in sorted(chunks, key=_slot_index):
            s = chunk.sequence
            tokens = s.tokens[s.computed : s.computed + chunk.size]
            row = self._context.add(_slot_index(chunk), tokens, s.computed, wanted=chunk.last)
            if chunk.last:
                rows.append((chunk, row))
        return rows

    def _advance(self, chunk: Chunk) -> None:
        s = chunk.sequence
        if s.slot is not None:
            self.cache.extend(s.slot, s.tokens[s.computed : s.computed + chunk.size])
        s.computed += chunk.size

    def _too_late(self, sequence: Sequence) -> bool:
        """Tell whether the sequence was cancelled while this step computed its token."""
        if sequence.cancelled:
            self.tokens_after_cancel += 1
        return sequence.cancelled

    def _sample(self, s: Sequence, row: int) -> SequenceStep:
        try:
            logits = self._context.logits(row)
            token = self._draw(s, logits)
        except HoldfastError as error:
            return self._end(s, [], "error", error)
        top = s.sampling.logprobs
        logprobs = None if top is None else [logprob_of(logits, token, top)]
        index = s.push(token)
        self.tokens += 1
        finish = s.finish_reason(self.context_length)
        if s.grammar is not None and finish is None and token in self.end_ids:
            finish = "stop"  # the grammar is complete: nothing may follow, whatever ignore_eos says
        if finish is None:
            return SequenceStep(s.key, index, [token], logprobs=logprobs)
        return self._end(s, [token], finish, logprobs=logprobs)

    def _draw(self, s: Sequence, logits: Logits) -> int:
        if s.sampler is None:
            raise InternalError("A sequence without a sampler was scheduled.")
        token = s.sampler.draw(logits, s.generated, s.grammar)
        if token is None and s.grammar is not None:
            token = s.grammar.first_allowed(np.array(self.end_ids, dtype=np.int64))
        if token is None:
            raise InternalError("The grammar allows no token at all here: the constraint leads into a dead end.")
        s.sampler.accept(token)
        if s.grammar is not None and token not in self.end_ids:
            s.grammar.accept(token)
        return token

    def _make_room(self) -> list[SequenceStep]:
        """Handle a full KV cache: forget parked slots, else give up the youngest sequence so that others go on."""
        if self.cache.drop_parked():
            return []
        return [self._end(self._running[-1], [], "abort")]

    def _end(
        self,
        sequence: Sequence,
        tokens: list[int],
        finish: Finish,
        error: HoldfastError | None = None,
        logprobs: list[TokenLogprob] | None = None,
    ) -> SequenceStep:
        self._leave(sequence)
        return SequenceStep(
            sequence.key,
            sequence.generated - len(tokens),
            tokens,
            logprobs=logprobs,
            finish=finish,
            error=error,
            cached_tokens=sequence.cached,
        )

    def _leave(self, sequence: Sequence) -> None:
        _close_grammar(sequence)
        if sequence.slot is not None:
            self.cache.release(sequence.slot)
            sequence.slot = None
            self._running.remove(sequence)


def _slot_index(chunk: Chunk) -> int:
    slot = chunk.sequence.slot
    return slot.index if slot is not None else -1


def _close_grammar(sequence: Sequence) -> None:
    grammar: GrammarState | None = sequence.grammar
    sequence.grammar = None
    if grammar is not None:
        grammar.close()
