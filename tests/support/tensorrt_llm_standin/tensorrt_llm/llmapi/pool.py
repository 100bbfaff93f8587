"""Stand-in: KV blocks. A sequence gets all it may need before it runs, so nothing is taken from it later."""

from __future__ import annotations

from typing import Any

from tensorrt_llm.executor.result import IterationResult
from tensorrt_llm.llmapi.llm_args import KvCacheConfig
from xxhash import xxh3_64_intdigest

WINDOW = 4096


class Pool:
    """Blocks in use by sequences, and those that are kept for equal prefixes."""

    def __init__(self, config: KvCacheConfig):
        self._size = config.tokens_per_block
        self.total = (config.max_tokens or 2048) // self._size
        self._tells = config.event_buffer_max_size > 0
        self._held: dict[int, int] = {}
        self._cached: dict[int, bool] = {}
        """Block name to whether it is full, oldest first."""
        self._next = 0
        self.events: IterationResult | None = None

    @property
    def used(self) -> int:
        """Blocks that running sequences hold."""
        return sum(self._held.values())

    def admit(self, number: int, tokens: int) -> bool:
        """Give a sequence its blocks, if there are enough."""
        need = -(-tokens // self._size)
        if self.used + need > self.total and self._held:
            return False
        self._held[number] = need
        while self._cached and len(self._cached) > self.total:
            self._drop()
        return True

    def release(self, number: int) -> None:
        """Take them back."""
        del self._held[number]

    def compute(self, ids: list[int]) -> int:
        """Compute a prompt; returns how many of its tokens were there already."""
        names = self._names(ids)
        known = 0
        while known < len(ids) // self._size and names[known] in self._cached:
            known += 1
        blocks = [
            {"type": "stored_block", "block_hash": name, "cache_level": 0, "priority": 35,
             "tokens": [{"type": "unique_token", "token_id": token, "token_extra_id": 0} for token in part]}
            for name, part in zip(names, self._parts(ids), strict=True)
        ]  # fmt: skip
        fresh = blocks[known:]
        for block in fresh:
            self._cached[block["block_hash"]] = len(block["tokens"]) == self._size
        if fresh:
            parent = names[known - 1] if known else None
            self._tell({"type": "stored", "parent_hash": parent, "blocks": fresh})
        while len(self._cached) > self.total:
            self._drop()
        return min(known * self._size, len(ids) - 1)

    def created(self) -> None:
        """Say that the cache exists, of which window."""
        self._tell({"type": "created", "num_blocks_per_cache_level": [self.total, 0]})

    def lose_event(self) -> None:
        """Let one event get lost, as when the buffer overflows."""
        self._next += 1

    def _drop(self) -> None:
        name = next(iter(self._cached))
        del self._cached[name]
        self._tell({"type": "removed", "block_hashes": [name]})

    def _names(self, ids: list[int]) -> list[int]:
        ends = [*range(self._size, len(ids), self._size), len(ids)]
        return [xxh3_64_intdigest(repr(ids[:end]).encode()) | (1 << 63) for end in ends]

    def _parts(self, ids: list[int]) -> list[list[int]]:
        return [ids[at : at + self._size] for at in range(0, len(ids), self._size)]

    def _tell(self, data: dict[str, Any]) -> None:
        if self._tells and self.events is not None:
            self.events.put({"event_id": self._next, "data": data, "window_size": WINDOW})
        self._next += 1
