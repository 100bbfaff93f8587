"""What the request lifecycle itself costs per streamed token: attempt, stream and flush, without text, HTTP or sockets.

python bench/micro_requests.py [--streams 64] [--flushes 3000] [--json]
"""
# ruff: noqa: ARG002 - the stand-ins have the signatures of what they stand for

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import time
from collections.abc import Callable

from holdfast.engines.contract import Sampling, StopRules
from holdfast.requests.config import RequestSettings
from holdfast.requests.flusher import Flusher
from holdfast.requests.generation import GO_ON, Generation
from holdfast.requests.plan import Deadlines, Ending, Plan
from holdfast.requests.request import Request
from holdfast.requests.service import Services
from holdfast.runtime.streams import Logprobs, StreamHandler


class NullOutput:
    """Takes everything, keeps nothing."""

    blocked_since: float | None = None

    @property
    def client(self) -> NullOutput:
        return self

    def accepted(self, worker: str) -> None:
        pass

    def deliver(self, tokens: list[int], logprobs: Logprobs | None) -> int:
        return GO_ON

    def ended(self, ending: Ending) -> None:
        pass


class NullObserver:
    def attempt_started(self, generation: Generation) -> None:
        pass

    def attempt_sent(self, seconds: float) -> None:
        pass

    def accepted(self, generation: Generation, first: bool) -> None:
        pass

    def first_token(self, generation: Generation) -> None:
        pass

    def progressed(self, generation: Generation) -> None:
        pass

    def migration_started(self, generation: Generation, error: Exception) -> None:
        pass

    def migrated(self, generation: Generation, gap_seconds: float) -> None:
        pass

    def prefill_decided(self, generation: Generation, reason: str) -> None:
        pass

    def prefill_started(self, generation: Generation, leg: object) -> None:
        pass

    def prefill_ended(self, generation: Generation, leg: object, error: Exception | None, seconds: float) -> None:
        pass

    def ended(self, generation: Generation, ending: Ending) -> None:
        pass


class NullHandle:
    def stop(self, reason: str = "") -> None:
        pass

    def kill(self, reason: str = "") -> None:
        pass

    def credit(self, tokens: int) -> None:
        pass


class NullWorker:
    """Both the pool and its only worker; keeps the handlers of its streams."""

    instance, epoch, hesitant, in_flight, queued, pong = "w", 1, False, 0, 0, None

    def __init__(self) -> None:
        self.handlers: list[StreamHandler] = []

    def usable(self, model: str) -> list[NullWorker]:
        return [self]

    def has_prefill(self, model: str) -> bool:
        return False

    def prefill(self, model: str) -> list[NullWorker]:
        return []

    def replacement_expected(self, model: str) -> bool:
        return True

    def subscribe(self, callback: Callable[[str, object], None]) -> Callable[[], None]:
        return lambda: None

    def fingerprint_of(self, model: str) -> str:
        return ""

    def card(self, model: str) -> None:
        return None

    def open(self, endpoint: str, headers: object, payload: bytes, handler: StreamHandler, **_: object) -> NullHandle:
        self.handlers.append(handler)
        return NullHandle()

    def report_failure(self, error: Exception) -> None:
        pass

    def report_success(self) -> None:
        pass


def plan(tokens: int) -> Plan:
    bounds = Deadlines(accept_hedge=0, accept=0, first_token=0, inter_token=0, total=0, client_stall=0, wait=0)
    stop = StopRules(max_tokens=tokens)
    return Plan(
        request_id="r", model="m", prompt_ids=b"\0" * 400, prompt_length=100, sampling=Sampling(), stop=stop,
        context_length=1 << 30, deadlines=bounds,
    )  # fmt: skip


async def prepare(streams: int, tokens: int) -> tuple[Services, NullWorker, list[asyncio.Task[None]]]:
    worker = NullWorker()
    services = Services(RequestSettings(), worker, Flusher(), NullObserver(), rng=random.Random(1))  # type: ignore[arg-type]
    loop = asyncio.get_running_loop()
    tasks = [loop.create_task(Request(services, [(plan(tokens), NullOutput())]).run()) for _ in range(streams)]
    for _ in range(3):
        await asyncio.sleep(0)
    assert len(worker.handlers) == streams
    for handler in worker.handlers:
        handler.on_accept()
    return services, worker, tasks


async def per_token(streams: int, flushes: int, *, batch: int = 1) -> float:
    """Return process CPU microseconds per token."""
    services, worker, tasks = await prepare(streams, flushes * batch + 1)
    calls = [handler.on_tokens for handler in worker.handlers]
    flush = services.flusher.flush
    began = time.process_time_ns()
    for index in range(0, flushes * batch, batch):
        for on_tokens in calls:
            on_tokens(index, [7] * batch, None)
        flush()
    spent = time.process_time_ns() - began
    for handler in worker.handlers:
        handler.on_end("stop", None, 0)
    flush()
    await asyncio.gather(*tasks)
    return spent / 1000 / (streams * flushes * batch)


async def per_request(requests: int) -> float:
    """Return process CPU microseconds from plan to terminal event, one token each."""
    began = time.process_time_ns()
    for _ in range(requests // 64):
        services, worker, tasks = await prepare(64, 1)
        for handler in worker.handlers:
            handler.on_tokens(0, [7], None)
            handler.on_end("length", None, 0)
        services.flusher.flush()
        await asyncio.gather(*tasks)
    return (time.process_time_ns() - began) / 1000 / (requests // 64 * 64)


def floor(streams: int, flushes: int) -> float:
    """Return what the same calls cost when they do nothing but append."""
    lists: list[list[int]] = [[] for _ in range(streams)]
    calls = [one.extend for one in lists]
    began = time.process_time_ns()
    for _ in range(flushes):
        for extend in calls:
            extend([7])
    return (time.process_time_ns() - began) / 1000 / (streams * flushes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--flushes", type=int, default=3_000)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    args = (options.streams, options.flushes)
    asyncio.run(per_token(64, 200))
    single = sorted(asyncio.run(per_token(*args)) for _ in range(5))
    figures = {
        "us_per_token_single": round(statistics.median(single), 3),
        "us_per_token_single_best": round(single[0], 3),
        "us_per_token_batch_16": round(asyncio.run(per_token(options.streams, options.flushes // 8, batch=16)), 3),
        "us_per_request": round(asyncio.run(per_request(6_400)), 1),
        "us_per_token_floor": round(floor(*args), 3),
    }
    if options.json:
        print(json.dumps(figures))
        return
    for name, value in figures.items():
        print(f"{name:28} {value:8.3f}")


if __name__ == "__main__":
    main()
