"""How full SGLang is, by the snapshots that its schedulers leave in shared memory.

A snapshot is read under a file lock that a frozen scheduler may hold for ever: always in a thread of its own, never on
the event loop.
"""

from __future__ import annotations

import asyncio
from typing import Any, Protocol

import msgspec

from holdfast.engines.contract import EngineLoad

BUSY_SECONDS, IDLE_SECONDS = 0.1, 0.5
"""Between two snapshots."""


class Reader(Protocol):
    """SGLang's ``load_snapshot_reader``."""

    def read_all(self) -> list[Any]:
        """Return one snapshot per data-parallel rank."""


class Fill(msgspec.Struct, frozen=True):
    """What a rank said last."""

    rank: int = 0
    running: int = 0
    waiting: int = 0
    used_tokens: int = 0
    total_tokens: int = 0
    prefilled: int = 0
    """Prompt tokens that were computed, since the start."""


class Gauge:
    """The last snapshots of all ranks.

    Args:
        reader: of SGLang.
        page_size: tokens per block.
        ranks: number of them.
        total_tokens: that each rank's cache holds.
    """

    def __init__(self, reader: Reader, page_size: int, ranks: int, total_tokens: int):
        self._reader, self._page = reader, page_size
        self.fills = [Fill(rank=rank, total_tokens=total_tokens) for rank in range(ranks)]

    @property
    def prefilled(self) -> int:
        """Prompt tokens computed by all ranks; rises with each chunk of a long prompt."""
        return sum(fill.prefilled for fill in self.fills)

    async def read(self) -> None:
        """Take new snapshots."""
        for one in await asyncio.to_thread(self._reader.read_all):
            if one.dp_rank < len(self.fills):
                self.fills[one.dp_rank] = Fill(
                    one.dp_rank,
                    one.num_running_reqs,
                    one.num_waiting_reqs,
                    one.num_used_tokens,
                    one.max_total_num_tokens or self.fills[one.dp_rank].total_tokens,
                    max(one.total_prefill_uncached_tokens, self.fills[one.dp_rank].prefilled),
                )

    def load(self, running: int, waiting: int, prefill_tokens: int) -> EngineLoad:
        """Return the load.

        Args:
            running: sequences that have said something; the snapshots may be a moment behind.
            waiting: those that have not.
            prefill_tokens: of the latter.
        """
        ranks = tuple(self._rank(fill) for fill in self.fills)
        return EngineLoad(
            running=running,
            waiting=waiting,
            kv_used_blocks=sum(rank.kv_used_blocks for rank in ranks),
            kv_total_blocks=sum(rank.kv_total_blocks for rank in ranks),
            prefill_tokens=prefill_tokens,
            ranks=ranks if len(ranks) > 1 else (),
        )

    def _rank(self, fill: Fill) -> EngineLoad:
        return EngineLoad(
            running=fill.running,
            waiting=fill.waiting,
            kv_used_blocks=-(-fill.used_tokens // self._page),
            kv_total_blocks=fill.total_tokens // self._page,
        )
