"""What a choice by KV caches costs: ``python -m bench kv_router``.

Workers hold prompts that share prefixes, each has some requests in hand; a request's cost is everything that
``--router-mode kv`` adds to it: hashing, index, weighing, and the ledger's taking and giving back. CPU time of one
core.
"""

from __future__ import annotations

import random
import time
from array import array
from typing import NamedTuple

from bench.table import Row, percentile
from holdfast.kv.hashes import block_hashes
from holdfast.kv.tiers import Tier
from holdfast.models.card import ModelCard, artifact_of
from holdfast.requests.chain import Chain
from holdfast.routing.claims import Claim, Ledger
from holdfast.routing.knowledge import PrefixKnowledge
from holdfast.routing.kv import KvRouter, Prompt
from holdfast.wire.frames import Load, Pong, Progress

BLOCK = 16
IN_HAND = 40
_NOTHING = artifact_of(b"")
_CARD = ModelCard("m", _NOTHING, _NOTHING, 1 << 20, (), 1 << 17, BLOCK, total_kv_blocks=65_536)


class _Record(NamedTuple):
    cards: tuple[ModelCard, ...] = (_CARD,)


class Worker:
    """What the router reads of a worker."""

    def __init__(self, number: int):
        self.instance, self.epoch, self.record = f"{number:016x}", 1, _Record()
        self.pong = Pong(0, Progress(), Load(30, 0, 20_000 + number, 65_536, 4_000), 0)

    def card(self, _model: str) -> ModelCard:
        return _CARD


async def kv_router(quick: bool) -> list[Row]:
    """Latency of a choice, and CPU of a request, over prompt lengths and numbers of workers."""
    return [
        row
        for workers in (8, 64)
        for tokens in (1_000, 10_000, 100_000)
        for row in measure(workers, tokens, 200 if quick else 1_000)
    ]


def measure(workers: int, tokens: int, requests: int) -> list[Row]:
    """Choose a worker for so many prompts, of which three quarters are known somewhere."""
    rng = random.Random(1)
    fleet = [Worker(number) for number in range(workers)]
    knowledge, ledger = PrefixKnowledge(), Ledger()
    prompts = [_prompt(rng, tokens) for _ in range(min(requests, 100))]
    for number, worker in enumerate(fleet):
        known = knowledge.attach(worker)  # type: ignore[arg-type]
        assert known is not None
        for ids in prompts[number % 4 :: 4]:
            known.store(0, Tier.DEVICE, block_hashes(ids, BLOCK)[: int(tokens / BLOCK * 0.8)])
    router = KvRouter(knowledge, ledger, rng, clock=time.thread_time_ns)
    open_: list[Claim] = []
    waits, hashing = [], 0
    began = time.process_time_ns()
    for number in range(requests):
        ids = prompts[number % len(prompts)]
        start = time.thread_time_ns()
        hashes = Chain(ids).of(BLOCK)
        hashing += time.thread_time_ns() - start
        start = time.thread_time_ns()
        worker, decision = router.choose("m", fleet, Prompt(tokens, hashes, BLOCK), number / 100)
        waits.append((time.thread_time_ns() - start) / 1e3)
        cached = decision.overlap * BLOCK
        open_.append(ledger.take(worker, tokens, BLOCK, rank=0, cached=cached, hashes=hashes))
        if len(open_) > IN_HAND * workers // 8:
            one = open_.pop(0)
            one.computed()
            one.release(tokens + 300)
    each = (time.process_time_ns() - began) / requests / 1e3
    what = f"{tokens:,} tokens, {workers} workers"
    return [
        Row(f"choice, {what}: p50, p99", f"{percentile(waits, 0.5):.0f}, {percentile(waits, 0.99):.0f} µs"),
        Row(f"CPU a request, {what}", f"{each:.0f} µs", f"of it hashing {hashing / requests / 1e3:.0f} µs"),
    ]


def _prompt(rng: random.Random, tokens: int) -> bytes:
    return array("I", rng.choices(range(50_000), k=tokens)).tobytes()
