"""Which sequences take part in the next step: continuous batching with chunked prefill and pre-emption.

Running sequences come first, in the order of their admission: one token each when decoding, a chunk of the
prompt otherwise, until the step's token budget is spent. Then waiting sequences are admitted, first come
first served, while seats, budget and blocks last. When a running sequence finds no block, the newest (or
oldest) one gives its blocks back and waits at the head of the queue, to be computed again (what the cache still
has of it is found). A watermark keeps blocks for those who run: a prompt is then admitted only when all of it fits
and that share of the blocks stays free.

Must never produce tokens or know about time.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence as Names

from holdfast.base.ids import SequenceKey
from holdfast.engines.mock.cache import BlockPool
from holdfast.engines.mock.config import MockConfig
from holdfast.engines.mock.sequence import Sequence


class Batch:
    """One step: the sequences in it (``Sequence.scheduled`` tokens each) and what it costs."""

    __slots__ = ("closed", "context", "decoding", "pairs", "prefill_tokens", "sequences")

    def __init__(self) -> None:
        self.sequences: list[Sequence] = []
        self.prefill_tokens = 0
        self.decoding = 0
        self.context = 0
        """Tokens of context of the sequences that decode, all together."""
        self.pairs = 0.0
        """(Prompt token, token before it) pairs that attention looks at."""
        self.closed = False
        """Somebody had to give way in this step: nobody may join it."""

    def put(self, sequence: Sequence, tokens: int) -> int:
        """Let a sequence compute that many tokens in this step; returns the number."""
        sequence.scheduled = tokens
        self.sequences.append(sequence)
        if tokens == 1 and sequence.remaining == 1:
            self.decoding += 1
            self.context += sequence.computed
        else:
            self.prefill_tokens += tokens
            self.pairs += tokens * (sequence.computed + tokens / 2)
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
        self.looked_up = self.found = 0
        """Tokens that sequences began with, and those among them that were cached."""
        self._steps = 0
        self._reserve = int(config.watermark * pool.total)
        """Blocks that an admission leaves free."""
        self._refused: _Refusal | None = None
        """Of the head of the queue."""

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

    def set_aside(self, sequence: Sequence) -> None:
        """Forget a sequence that runs; its blocks stay taken."""
        sequence.live = False
        del self.running[sequence.key]

    def next_batch(self) -> Batch:
        """Choose the sequences of the next step and reserve their blocks."""
        self._steps += 1
        batch = Batch()
        budget = self._config.max_num_batched_tokens
        preempted = self.preemptions
        size = self._pool.block_size
        for sequence in list(self.running.values()):
            if budget <= 0:
                break
            # one decode token in a block that it has already: nearly all of them, so nothing is called
            if sequence.computed + 1 == len(sequence.ids) and sequence.computed % size and sequence.slow == 1:
                budget -= batch.put(sequence, 1)
            elif sequence.live and sequence.key in self.running and not self._skips(sequence):
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
            if self._refused is not None and self._refused.stands(sequence, self._pool, budget) and self.running:
                return
            found_before = sequence.cached_tokens
            if self._config.prefix_caching and sequence.held == 0:
                sequence.adopt_prefix(self._pool)
            if sequence.received and self._leaves_reserve(sequence):
                sequence.take_over(self._pool, seal=self._config.prefix_caching)
            tokens = self._chunk(sequence, budget)
            if not (self._leaves_reserve(sequence) and sequence.reserve(self._pool, tokens)):
                missing = sequence.hashes(self._pool.block_size)[sequence.held : sequence.held + 1]
                sequence.drop_blocks(self._pool)
                sequence.cached_tokens = found_before
                self._refused = _Refusal(sequence, self._pool.available, budget, missing)
                return
            self._refused = None
            if found_before is None and sequence.cached_tokens is not None:
                self.looked_up += len(sequence.ids)
                self.found += sequence.cached_tokens
            sequence.received = False  # should it have to give way, it is computed anew
            self.waiting.popleft()
            self.running[sequence.key] = sequence
            budget -= batch.put(sequence, tokens)

    def _leaves_reserve(self, sequence: Sequence) -> bool:
        """Whether the watermark lets this sequence in; it always does when nobody else runs."""
        if not self._reserve or not self.running:
            return True
        whole = -(-len(sequence.ids) // self._pool.block_size)
        return self._pool.available - (whole - sequence.held) >= self._reserve

    def _preempt(self, needy: Sequence) -> bool:
        """Free the blocks of one running sequence; returns whether ``needy`` itself still runs."""
        running = self.running.values()
        victim = next(iter(running if self._config.preemption == "fifo" else reversed(running)))
        del self.running[victim.key]
        victim.drop_blocks(self._pool)
        self.waiting.appendleft(victim)
        self.preemptions += 1
        return victim is not needy


class _Refusal:
    """Why the head of the queue was not admitted, so that it is asked again only when that may have changed."""

    __slots__ = ("_available", "_budget", "_missing", "_sequence")

    def __init__(self, sequence: Sequence, available: int, budget: int, missing: Names[int]):
        self._sequence = sequence
        self._available = available
        self._budget = budget
        self._missing = missing
        """Its first block that was not in the cache, if it has one."""

    def stands(self, sequence: Sequence, pool: BlockPool, budget: int) -> bool:
        """Whether it would be refused again: no more blocks, no smaller chunk, no longer prefix in the cache."""
        same = sequence is self._sequence and pool.available <= self._available and budget >= self._budget
        return same and not pool.match(self._missing)


def _without_preempted(batch: Batch) -> Batch:
    """Those that gave way after they had been put in are not part of the step."""
    kept = Batch()
    kept.closed = True
    for sequence in batch.sequences:
        if sequence.scheduled:
            kept.put(sequence, sequence.scheduled)
    return kept
