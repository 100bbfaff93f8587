"""The mock engine with data-parallel ranks: each has its own seats, KV blocks and steps, and shares nothing.

A sequence goes to the rank that its request names (``extra["data_parallel_rank"]``), or to the one with the fewest
sequences in hand. Commands reach all ranks, or the one that they name (``{"do": "hang", "rank": 1}``). The engine is
dead when one of its ranks is.

Must never schedule by itself: what a rank does with its sequences is `AbleMock`'s business.
"""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec

from holdfast.base.errors import HoldfastError, InvalidRequest
from holdfast.base.ids import SequenceKey
from holdfast.engines.contract import (
    CacheCounts,
    DeathSink,
    Engine,
    EngineInfo,
    EngineLoad,
    EngineProgress,
    GenerateRequest,
    LoadProgress,
    Phase,
    SequenceStep,
    StepSink,
)
from holdfast.engines.mock.adapters import Abilities, AbleMock
from holdfast.engines.mock.config import MockConfig
from holdfast.kv.events import KvEvent

RANK = "data_parallel_rank"
"""Key of ``GenerateRequest.extra`` that names a rank."""
_BUSIEST: tuple[Phase, ...] = ("starting", "warming", "compiling", "prefill", "decode", "idle")


def make_mock(config: MockConfig) -> Engine:
    """Return the mock engine that the settings ask for, not started."""
    return AbleMock(config) if config.data_parallel_size == 1 else DataParallelMock(config)


class DataParallelMock(Abilities, Engine):
    """See the module."""

    def __init__(self, config: MockConfig):
        self.config = config
        self.ranks = self.parts = tuple(AbleMock(config) for _ in range(config.data_parallel_size))
        self._owners: dict[SequenceKey, AbleMock] = {}
        """Of the sequences that are not over."""
        self._dead = False

    async def start(self, sink: StepSink, on_death: DeathSink, on_load: LoadProgress) -> EngineInfo:
        """Start all ranks side by side; see `Engine.start`."""

        def passed_on(steps: list[SequenceStep]) -> None:
            for step in steps:
                if step.finish is not None and step.handoff is None:  # else its blocks are kept until the cancel
                    self._owners.pop(step.key, None)
            sink(steps)

        def died(error: HoldfastError) -> None:
            if not self._dead:
                self._dead = True
                for rank in self.ranks:
                    rank.stop()
                on_death(error)

        for rank in self.ranks:
            rank.role = self.role
        async with asyncio.TaskGroup() as group:
            starts = [
                group.create_task(rank.start(passed_on, died, on_load if at == 0 else _quiet))
                for at, rank in enumerate(self.ranks)
            ]
        return msgspec.structs.replace(starts[0].result(), data_parallel_size=len(self.ranks))

    def submit(self, key: SequenceKey, request: GenerateRequest) -> None:
        """Queue a sequence on a rank; see `Engine.submit`."""
        rank = self._choose(request)
        rank.submit(key, request)
        self._owners[key] = rank

    def _choose(self, request: GenerateRequest) -> AbleMock:
        wanted = request.extra.get(RANK)
        if wanted is None:
            return min(self.ranks, key=lambda rank: rank.in_hand)
        if type(wanted) is not int or not 0 <= wanted < len(self.ranks):
            raise InvalidRequest(
                f"Rank {wanted!r} was asked for; this engine has the ranks 0 to {len(self.ranks) - 1}.", param=RANK
            )
        return self.ranks[wanted]

    def cancel(self, key: SequenceKey) -> None:
        """Stop a sequence at once; see `Engine.cancel`."""
        rank = self._owners.pop(key, None)
        if rank is not None:
            rank.cancel(key)

    def load(self) -> EngineLoad:
        """Return the sums, and each rank's own; see `Engine.load`."""
        loads = tuple(rank.load() for rank in self.ranks)
        return EngineLoad(
            running=sum(one.running for one in loads),
            waiting=sum(one.waiting for one in loads),
            kv_used_blocks=sum(one.kv_used_blocks for one in loads),
            kv_total_blocks=sum(one.kv_total_blocks for one in loads),
            prefill_tokens=sum(one.prefill_tokens for one in loads),
            ranks=loads,
        )

    def progress(self) -> EngineProgress:
        """Return the sums of the counters, and the phase of the rank that may be silent for longest."""
        all_of_them = [rank.progress() for rank in self.ranks]
        return EngineProgress(
            steps=sum(one.steps for one in all_of_them),
            tokens=sum(one.tokens for one in all_of_them),
            prefilled=sum(one.prefilled for one in all_of_them),
            phase=min((one.phase for one in all_of_them), key=_BUSIEST.index),
            silent_step_seconds=max(one.silent_step_seconds for one in all_of_them),
            tokens_after_cancel=sum(one.tokens_after_cancel for one in all_of_them),
        )

    def cache_counts(self) -> CacheCounts:
        """Return the sums of the ranks' counts."""
        counts = [rank.cache_counts() for rank in self.ranks]
        return CacheCounts(sum(one.queried for one in counts), sum(one.hits for one in counts))

    def take_kv_events(self) -> list[KvEvent]:
        """Return and forget the KV events since the last call, each with its rank."""
        return [
            event if at == 0 else msgspec.structs.replace(event, dp_rank=at)
            for at, rank in enumerate(self.ranks)
            for event in rank.take_kv_events()
        ]

    def kv_digests(self) -> tuple[tuple[int, int], ...]:
        """Return how many blocks each rank has cached, and their digests."""
        return tuple(digest for rank in self.ranks for digest in rank.kv_digests())

    def resend_kv_events(self) -> None:
        """Tell of all caches anew."""
        for rank in self.ranks:
            rank.resend_kv_events()

    @property
    def kv_truth(self) -> tuple[frozenset[int], ...]:
        """Sequence hashes of all cached blocks, by rank; for tests and the simulation."""
        return tuple(truth for rank in self.ranks for truth in rank.kv_truth)

    async def check(self) -> None:
        """Ask each rank; see `Engine.check`."""
        for rank in self.ranks:
            await rank.check()

    def control(self, command: dict[str, Any]) -> dict[str, Any]:
        """Pass one command to the rank that it names, else to all; the answer is that of the last.

        Raises:
            UnsupportedFeature: the configuration forbids it.
            InvalidRequest: no such command or rank.
        """
        order = dict(command)
        at = order.pop("rank", None)
        if at is not None and at not in range(len(self.ranks)):
            raise InvalidRequest(f"There is no rank {at!r} here; ranks are 0 to {len(self.ranks) - 1}.", param="rank")
        answer: dict[str, Any] = {}
        for rank in self.ranks if at is None else self.ranks[at : at + 1]:
            answer = rank.control(order)
        return answer

    async def close(self) -> None:
        """Stop all work; see `Engine.close`."""
        self._owners.clear()
        for rank in self.ranks:
            await rank.close()


def _quiet(_what: str, _share: float) -> None:
    """The first rank speaks for all."""
