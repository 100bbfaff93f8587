"""One sequence inside the mock engine: its tokens, its blocks and how far it has come.

Must never decide when it runs; the scheduler does.
"""

from __future__ import annotations

from array import array

import msgspec

from holdfast.base.ids import SequenceKey
from holdfast.engines.contract import GenerateRequest
from holdfast.engines.handoff import digest_of
from holdfast.engines.mock.cache import BlockPool
from holdfast.engines.mock.directives import Directives
from holdfast.engines.mock.tokens import Choice, TokenChain
from holdfast.engines.mock.vocabulary import Vocabulary
from holdfast.kv.hashes import block_hashes, local_hashes, next_sequence_hash


class Sequence:
    """Counts are tokens; ``computed`` of the ``ids`` have their KV values in ``held`` shared and ``private`` blocks."""

    __slots__ = (
        "_hashes", "cached_tokens", "chain", "computed", "delay", "ends", "fault_at", "held", "ids", "index", "key",
        "limit", "live", "prefills", "private", "received", "request", "scheduled", "slow", "wants_logprobs", "wish",
    )  # fmt: skip

    def __init__(
        self,
        key: SequenceKey,
        request: GenerateRequest,
        vocabulary: Vocabulary,
        wish: Directives,
        *,
        eos_chance: float,
        room: int,
    ):
        """``room``: the most tokens, prompt included, that this sequence may grow to."""
        choice = Choice(request, vocabulary, eos_chance, wish)
        self.key = key
        self.request = request
        self.wish = wish
        self.chain = TokenChain(_as_handed(request), choice)
        self.ids = array("I")
        self.ids.frombytes(request.prompt_ids)
        prompt = len(self.ids)
        self.ids.frombytes(request.generated_ids)
        self.index = len(self.ids) - prompt
        """Output index of the next token."""
        self.limit = min(request.stop.max_tokens, room - prompt)
        self.ends = set(request.stop.stop_token_ids)
        if choice.plan is not None or not request.stop.ignore_eos:
            self.ends.update(vocabulary.eos_ids)
        self.wants_logprobs = request.sampling.logprobs is not None
        self.fault_at = wish.fault_at if wish.fault else -1
        self.slow = wish.slow
        self.delay = wish.prefill_seconds
        self.live = True
        self.prefills = request.leg == "prefill"
        """It ends when its prompt is computed."""
        self.received = False
        """The blocks of its prompt were computed elsewhere and have come."""
        self.scheduled = 0
        self.computed = 0
        self.cached_tokens: int | None = None
        """Tokens found in the cache at the first admission; None before."""
        self.held = 0
        self.private = 0
        self._hashes: array[int] | None = None

    @property
    def remaining(self) -> int:
        """Known tokens whose KV values are not computed; 1 while decoding."""
        return len(self.ids) - self.computed

    def hashes(self, block_size: int) -> array[int]:
        """Return the sequence hashes of all complete blocks of the known tokens."""
        if self._hashes is None:
            request = self.request
            self._hashes = block_hashes(self.ids.tobytes(), block_size, lora=request.lora, salt=request.cache_salt)
        start = len(self._hashes)
        if (start + 1) * block_size <= len(self.ids):
            parent = self._hashes[-1] if start else None
            tail = self.ids[start * block_size :].tobytes()
            request = self.request
            for local in local_hashes(tail, block_size, lora=request.lora, salt=request.cache_salt):
                parent = next_sequence_hash(parent, local)
                self._hashes.append(parent)
        return self._hashes

    def adopt_prefix(self, pool: BlockPool) -> None:
        """Take a share in the cached blocks of the prefix; at least one token is left to compute."""
        usable = (len(self.ids) - 1) // pool.block_size
        hashes = self.hashes(pool.block_size)[:usable]
        self.held = pool.match(hashes)
        pool.hold(hashes[: self.held])
        self.computed = self.held * pool.block_size
        if self.cached_tokens is None:
            self.cached_tokens = self.computed

    def take_over(self, pool: BlockPool, *, seal: bool) -> None:
        """Count the prompt as computed, if there are blocks for what was received; one token is left to compute."""
        tokens = len(self.ids) - 1 - self.computed
        if tokens > 0 and self.reserve(pool, tokens):
            self.advance(pool, tokens, seal=seal)

    def reserve(self, pool: BlockPool, tokens: int) -> bool:
        """Make room for computing so many more tokens; returns False when the pool has none."""
        need = -(-(self.computed + tokens) // pool.block_size) - self.held - self.private
        if need <= 0:
            return True
        if not pool.take(need):
            return False
        self.private += need
        return True

    def advance(self, pool: BlockPool, tokens: int, *, seal: bool) -> None:
        """Count so many more tokens as computed, and seal the blocks that they complete."""
        self.computed += tokens
        size = pool.block_size
        complete = self.computed // size
        if not seal or complete <= self.held:
            return
        names = self.hashes(size)[self.held : complete]
        parent = self.hashes(size)[self.held - 1] if self.held else None
        pool.seal(names, parent, self.ids[self.held * size : complete * size])
        self.private -= len(names)
        self.held = complete

    def drop_blocks(self, pool: BlockPool) -> None:
        """Give all blocks back; everything must be computed again, unless the cache still has it."""
        held = self.hashes(pool.block_size)[: self.held] if self.held else ()
        pool.release(held, self.private)
        self.held = 0
        self.private = 0
        self.computed = 0
        self.scheduled = 0


def _as_handed(request: GenerateRequest) -> GenerateRequest:
    """Return what an engine goes on from: whatever the blocks of a hand-off stand for, be it somebody else's tokens."""
    handoff = request.handoff
    if handoff is None or handoff.digest == digest_of(request.prompt_ids, request.generated_ids):
        return request
    return msgspec.structs.replace(request, prompt_ids=request.prompt_ids + b"\1\0\0\0", generated_ids=b"")
