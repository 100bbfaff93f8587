"""Which sequences take part in the next step: continuous batching with chunked prefill and pre-emption.

Running sequences come first, in the order of their admission: one token each when decoding, a chunk of the
prompt otherwise, until the step's token budget is spent. Then waiting sequences are admitted, first come
first served, while seats, budget and blocks last. When a running sequence finds no block, the newest (or
oldest) one gives its blocks back and waits at the head of the queue.

Must never produce tokens or know about time.
"""

from __future__ import annotations

from collections import deque

from holdfast.base.ids import SequenceKey
from holdfast.engines.mock.cache import BlockPool
from holdfast.engines.mock.config import MockConfig
from holdfast.engines.mock.sequence import Sequence


class Batch:
    """One step: the sequences in it (``Sequence.scheduled`` tokens each) and what it costs."""

    __slots__ = ("closed", "decoding", "prefill_tokens", "sequences")

    def __init__(self) -> None:
        self.sequences: list[Sequence] = []
        self.prefill_tokens = 0
        self.decoding = 0
        self.closed = False
        """Somebody had to give way in this step: nobody may join it."""

    def put(self, sequence: Sequence, tokens: int) -> int:
        """Let a sequence compute that many tokens in this step; returns the number."""
        sequence.scheduled = tokens
        self.sequences.append(sequence)
        if tokens == 1 and sequence.remaining == 1:
            self.decoding += 1
        else:
            self.prefill_tokens += tokens
        return tokens

    @property
    def delay(self) -> float:
        """Seconds that the step takes longer because those of its sequences that are still wanted asked for it."""
        return max((sequence.delay for sequence in self.sequences if sequence.live), default=0.0)


class Scheduler:
    """The queues of one engine."""

    def __init__(self, config: MockConfig, pool: BlockPool):
        self._config = config
        self._pool = pool
        self.running: dict[SequenceKey, Sequence] = {}
        self.waiting: deque[Sequence] = deque()
        self.preemptions = 0
        self._steps = 0

    @property
    def busy(self) -> bool:
        """Whether there is anything to do."""
        return bool(self.running or self.waiting)

    def add(self, sequence: Sequence) -> None:
        """Queue a new sequence."""
        self.waiting.append(sequence)

    def find(self, key: SequenceKey) -> Sequence | None:
        """Return the sequence of that key, wherever it is."""
        running = self.running.get(key)
        return running or next((s for s in self.waiting if s.key == key), None)

    def remove(self, sequence: Sequence) -> None:
        """Forget a sequence and free its blocks."""
        sequence.live = False
        if self.running.pop(sequence.key, None) is None:
            self.waiting.remove(sequence)
        sequence.drop_blocks(self._pool)

    def next_batch(self) -> Batch:
        """Choose the sequences of the next step and reserve their blocks."""
        self._steps += 1
        batch = Batch()
        budget = self._config.max_num_batched_tokens
        preempted = self.preemptions
        for sequence in list(self.running.values()):
            if budget <= 0:
                break
            if sequence.live and sequence.key in self.running and not self._skips(sequence):
                budget -= self._schedule(sequence, budget, batch)
        if preempted == self.preemptions:
            self._admit(budget, batch)
            return batch
        return _without_preempted(batch)

    def top_up(self, batch: Batch) -> None:
        """Let sequences that arrived during a step join it, as far as its token budget reaches.

        For steps of fixed length only: their end is a tick of a clock, and whoever is there at the tick is served.
        """
        budget = self._config.max_num_batched_tokens - batch.prefill_tokens - batch.decoding
        if self.waiting and not batch.closed and not any(sequence.delay for sequence in self.waiting):
            self._admit(budget, batch)

    def _skips(self, sequence: Sequence) -> bool:
        sequence.scheduled = 0
        return sequence.slow > 1 and self._steps % sequence.slow != 0

    def _schedule(self, sequence: Sequence, budget: int, batch: Batch) -> int:
        """Put a running sequence into the batch; returns the tokens it takes."""
        tokens = self._chunk(sequence, budget)
        while not sequence.reserve(self._pool, tokens):
            if not self._preempt(sequence):
                return 0
        return batch.put(sequence, tokens)

    def _chunk(self, sequence: Sequence, budget: int) -> int:
        need = sequence.remaining
        return min(need, budget) if self._config.chunked_prefill else need

    def _admit(self, budget: int, batch: Batch) -> None:
        while self.waiting and budget > 0 and len(self.running) < self._config.max_num_seqs:
            sequence = self.waiting[0]
            if self._config.prefix_caching and sequence.held == 0:
                sequence.adopt_prefix(self._pool)
            tokens = self._chunk(sequence, budget)
            if not sequence.reserve(self._pool, tokens):
                sequence.drop_blocks(self._pool)
                return
            self.waiting.popleft()
            self.running[sequence.key] = sequence
            budget -= batch.put(sequence, tokens)

    def _preempt(self, needy: Sequence) -> bool:
        """Free the blocks of one running sequence; returns whether ``needy`` itself still runs."""
        running = self.running.values()
        victim = next(iter(running if self._config.preemption == "fifo" else reversed(running)))
        del self.running[victim.key]
        victim.drop_blocks(self._pool)
        self.waiting.appendleft(victim)
        self.preemptions += 1
        return victim is not needy


def _without_preempted(batch: Batch) -> Batch:
    """Those that gave way after they had been put in are not part of the step."""
    kept = Batch()
    kept.closed = True
    for sequence in batch.sequences:
        if sequence.scheduled:
            kept.put(sequence, sequence.scheduled)
    return kept
