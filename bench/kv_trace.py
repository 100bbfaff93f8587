"""Router modes side by side on a trace: cache hits, time to first token and throughput over the load.

``python -m bench.kv_trace TRACE [--requests N] [--concurrency 16,64] [--modes …] [--json FILE]``

Eight mock engines in this process on a virtual clock (``reference`` profile: the reference's polynomials, blocks of 64
tokens, 16,384 blocks an engine), driven in a closed loop, routed by the production classes: policy, ledger with reports
every quarter of a second, KV router. What the caches hold is read from the engines at once and completely, as events
bring it within milliseconds. The oracle sees the same, always takes the longest prefix, whatever else
there is to do there, and the least busy worker among equals.

A closed loop begins with as many requests at once as its concurrency, to workers whose caches are empty: under heavy
load these alone are the slowest hundredth, whoever routes. So the 99th percentile is given for all, and for those after
them.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import os
import random
import sys
import time
from array import array
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from tests.support.virtual_time import VirtualLoop

from bench.table import percentile
from holdfast.base.ids import SequenceKey
from holdfast.engines.contract import GenerateRequest, Sampling, SequenceStep, StopRules
from holdfast.engines.mock import MockConfig, MockEngine
from holdfast.kv.hashes import block_hashes
from holdfast.models.card import ModelCard, artifact_of
from holdfast.replay.arrivals import Arrivals
from holdfast.replay.driver import Events, Job
from holdfast.replay.prompts import Prompts
from holdfast.replay.record import Recording
from holdfast.replay.report import summarise
from holdfast.replay.run import replay
from holdfast.replay.trace import TraceRequest, chosen
from holdfast.routing.claims import Claim, Ledger
from holdfast.routing.cost import Weights
from holdfast.routing.knowledge import Overlaps
from holdfast.routing.kv import KvRouter, Prompt
from holdfast.routing.policy import Policy, Wish
from holdfast.wire.frames import Load, Pong, Progress

MODEL = "mock"
BLOCK = 64
PING = 0.25
"""Virtual seconds between two reports of a worker."""
TEMPLATE = 8
"""Blocks that all prompts of the trace begin with: for the oracle they are no reason."""
MODES = ("round-robin", "least-loaded", "kv", "oracle")
LOADS = (16, 32, 64, 128, 256)


class Worker:
    """One engine as a router sees it."""

    hesitant = False

    def __init__(self, number: int, config: MockConfig):
        self.engine = MockEngine(config)
        self.number = number
        self.instance, self.epoch = f"w{number}", 1
        self.in_flight = self.sent = self.last = 0
        self.pong: Pong | None = None
        nothing = artifact_of(b"")
        self._card = ModelCard(
            MODEL, nothing, nothing, 131_072, (), 1 << 17, BLOCK, total_kv_blocks=self.engine.config.num_blocks
        )

    def card(self, _model: str) -> ModelCard:
        return self._card

    def fingerprint_of(self, _model: str) -> str:
        return ""

    @property
    def queued(self) -> int:
        return self.pong.load.waiting if self.pong else 0

    def report(self) -> None:
        """Say what is in hand, as a pong does."""
        load = self.engine.load()
        told = Load(load.running, load.waiting, load.kv_used_blocks, load.kv_total_blocks, load.prefill_tokens)
        self.pong = Pong(0, Progress(), told, self.sent)


class Caches:
    """Complete and immediate knowledge of all caches."""

    def __init__(self, workers: Sequence[Worker]):
        self.workers = workers

    def lookup(self, hashes: array[int], _block_size: int, _now: float) -> Overlaps:
        found = {}
        for worker in self.workers:
            held = worker.engine._pool.match(hashes)  # noqa: SLF001  at once, without the price of events
            if held:
                found[worker.instance, 0] = (held, 0, 0)
        return Overlaps(found)

    def decided(self, instance: str, rank: int, hashes: array[int], now: float) -> None:
        """Nothing: the caches speak."""


class _Open:
    __slots__ = ("claim", "done", "events", "length", "worker")

    def __init__(self, worker: Worker, events: Events, length: int, claim: Claim):
        self.worker, self.events, self.length, self.claim = worker, events, length, claim
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()


class Fleet:
    """A `Driver`: engines and one router."""

    def __init__(self, workers: Sequence[Worker], prompts: Prompts, mode: str, weights: Weights, template: int | None):
        self.workers = workers
        self._prompts = prompts
        self._mode = mode
        self.rng = random.Random(1)
        self.ledger = Ledger()
        self._caches = Caches(workers)
        self.kv = KvRouter(self._caches, self.ledger, self.rng, weights=weights, template_tokens=template)
        self._policy = Policy("round-robin" if mode not in ("least-loaded", "random") else mode, self.rng)
        self._open: dict[SequenceKey, _Open] = {}
        self.blocks = self.known = 0

    async def start(self) -> None:
        for worker in self.workers:
            await worker.engine.start(self._stepped, print, lambda *_: None)

    async def report(self) -> None:
        while True:  # until cancelled
            for worker in self.workers:
                worker.report()
            await asyncio.sleep(PING)

    async def submit(self, job: Job, events: Events) -> None:
        key = SequenceKey(job.index + 1)
        tokens = self._prompts.ids(job.request)
        length = job.request.input_length
        hashes = block_hashes(tokens, BLOCK)
        worker, cached = self._choose(hashes, length)
        kept = hashes if self._mode in ("kv", "oracle") else array("Q")
        claim = self.ledger.take(worker, length, BLOCK, rank=0, cached=cached * BLOCK, hashes=kept)
        worker.in_flight += 1
        worker.sent += 1
        claim.sent(worker.sent)
        events.worker(worker.instance)
        one = self._open[key] = _Open(worker, events, length, claim)
        stop = StopRules(max_tokens=job.request.output_length, ignore_eos=True)
        worker.engine.submit(key, GenerateRequest(str(job.index), MODEL, tokens, Sampling(temperature=0.0), stop))
        await one.done

    def _choose(self, hashes: array[int], length: int) -> tuple[Worker, int]:
        now = asyncio.get_running_loop().time()
        self.blocks += len(hashes)
        if self._mode == "kv":
            worker, decision = self.kv.choose(MODEL, self.workers, Prompt(length, hashes, BLOCK), now)
            return worker, decision.overlap
        if self._mode == "oracle":
            overlaps = self._caches.lookup(hashes, BLOCK, now)
            held = {w: max(overlaps.of(w.instance)[0], self.ledger.shared(w, 0, hashes)) for w in self.workers}
            own = {w: max(0, held[w] - TEMPLATE) for w in self.workers}
            worker = max(self.workers, key=lambda w: (own[w], -w.in_flight, self.rng.random()))
            return worker, held[worker]
        found = self._policy.choose(MODEL, self.workers, Wish())
        assert found is not None
        return found, 0

    def _stepped(self, steps: list[SequenceStep]) -> None:
        for step in steps:
            one = self._open[step.key]
            one.events.tokens(len(step.tokens))
            if step.index == 0:
                one.claim.computed()
            if step.finish is not None:
                one.events.usage(one.length, step.index + len(step.tokens), step.cached_tokens)
                one.claim.release(one.length + step.index + 1)
                one.worker.in_flight -= 1
                del self._open[step.key]
                one.done.set_result(None)


def simulate(task: tuple[str, int, str, int, dict[str, float], int | None, int]) -> dict[str, Any]:
    """Replay a trace in one mode under one load, in a process of its own."""
    path, requests, mode, concurrency, weights, template, count = task
    os.nice(5)
    began = time.process_time()

    async def main() -> dict[str, Any]:
        config = MockConfig(profile="reference", kv_events=False)
        fleet = Fleet([Worker(i, config) for i in range(count)], Prompts(), mode, Weights(**weights), template)
        await fleet.start()
        reports = asyncio.get_running_loop().create_task(fleet.report())
        source = MADE[path](requests) if path in MADE else chosen(Path(path), limit=requests)
        recording = await replay(source, fleet, Arrivals(concurrency=concurrency), random.Random(1))
        reports.cancel()
        found = summarise(recording, mode, str(concurrency))
        assert fleet.ledger.held() == 0
        return {
            "mode": mode,
            "concurrency": concurrency,
            "hit": found.hit_rate,
            "ttft_p50": found.time_to_first_token.p50,
            "ttft_p99": found.time_to_first_token.p99,
            "ttft_p99_later": percentile(later(recording, concurrency), 0.99),
            "ttft_mean": found.time_to_first_token.mean,
            "rate": found.output_tokens_per_second,
            "itl": found.inter_token.mean,
            "balance": found.balance.requests,
            "seconds": found.seconds,
        }

    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        result = runner.run(main())
    result["cpu"] = time.process_time() - began
    return result


def later(recording: Recording, first: int) -> list[float]:
    """Return the seconds to the first token of all requests but the first so many."""
    return [took for one in recording.records[first:] if (took := one.time_to_first_token) is not None]


def no_reuse(requests: int) -> Iterator[TraceRequest]:
    """Yield requests that share nothing, of lengths as different as those of a chat service."""
    rng = random.Random(7)
    for number in range(requests):
        length = int(min(60_000, max(64, rng.lognormvariate(8.6, 1.2))))
        ids = [number * 1000 + at for at in range(-(-length // 512))]
        yield TraceRequest(timestamp=0, input_length=length, output_length=rng.randint(20, 700), hash_ids=ids)


def hot_documents(requests: int) -> Iterator[TraceRequest]:
    """Yield requests half of which ask something about one of four long documents, most of them about the first."""
    rng = random.Random(8)
    for number in range(requests):
        own = [1_000_000 + number * 1000 + at for at in range(rng.randint(1, 12))]
        document = rng.choices((0, 1, 2, 3), (8, 4, 2, 1))[0] if rng.random() < 0.5 else -1
        shared = [1000 * document + at for at in range(60)] if document >= 0 else []
        ids = shared + own
        yield TraceRequest(timestamp=0, input_length=512 * len(ids), output_length=rng.randint(20, 700), hash_ids=ids)


MADE: dict[str, Callable[[int], Iterator[TraceRequest]]] = {"none": no_reuse, "hot": hot_documents}
"""Made traces by name."""


def show(rows: list[dict[str, Any]]) -> None:
    """Print the table."""
    times = "TTFT mean, p50, p99, p99 after the first (s)"
    print(f"concurrency | mode | hit rate | {times} | tokens/s | ITL mean (ms) | busiest/mean")
    print("--- | --- | --- | --- | --- | --- | ---")
    for row in rows:
        print(line(row))


def line(row: dict[str, Any]) -> str:
    """Return one row of the table."""
    times = ", ".join(f"{row[name]:.2f}" for name in ("ttft_mean", "ttft_p50", "ttft_p99", "ttft_p99_later"))
    return (
        f"{row['concurrency']} | {row['mode']} | {row['hit']:.1%} | {times} | {row['rate']:.0f} | "
        f"{row['itl'] * 1e3:.1f} | {row['balance']:.2f}"
    )


def main() -> None:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(description="Router modes side by side on a trace.")
    parser.add_argument("trace", help="file of requests (Mooncake's format), or a made one: none, hot (see `MADE`)")
    parser.add_argument("--requests", type=int, default=12_031)
    parser.add_argument("--concurrency", default=",".join(map(str, LOADS)))
    parser.add_argument("--modes", default=",".join(MODES))
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument("--weights", default="{}", help="of the KV router's cost, as JSON")
    parser.add_argument("--template", type=int, default=None, help="tokens a continuation; 0: templates earn credit")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    weights = json.loads(arguments.weights)
    tasks = [
        (arguments.trace, arguments.requests, mode, int(load), weights, arguments.template, arguments.workers)
        for load in arguments.concurrency.split(",")
        for mode in arguments.modes.split(",")
    ]
    rows = []
    with multiprocessing.Pool(arguments.processes) as pool:
        for row in pool.imap(simulate, tasks):
            rows.append(row)
            print(f"{line(row)} | {row['cpu']:.0f} s of CPU", file=sys.stderr, flush=True)
    show(rows)
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
