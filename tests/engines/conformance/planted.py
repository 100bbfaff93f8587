"""Engines with one planted fault each: a mock engine behind a wrapper that spoils what it says."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace

import msgspec

from holdfast.base.errors import HoldfastError
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
    SequenceStep,
    StepSink,
    TokenLogprob,
)
from holdfast.kv.events import KvEvent
from tests.engines.conformance.subject import Subject
from tests.engines.conformance.subjects.mock import SUBJECT, make

Spoil = Callable[["Wrapped", list[SequenceStep]], list[SequenceStep]]


def same(step: SequenceStep, **changed: object) -> SequenceStep:
    """Return a copy of a step with some fields changed."""
    fields = {name: getattr(step, name) for name in SequenceStep.__slots__}
    return SequenceStep(**{**fields, **changed})  # type: ignore[arg-type]


class Wrapped(Engine):
    """Passes everything on; subclasses and ``spoil`` plant the fault."""

    def __init__(self, spoil: Spoil | None = None):
        self.inner = make()
        self.spoil = spoil
        self.requests: dict[int, GenerateRequest] = {}

    async def start(self, sink: StepSink, on_death: DeathSink, on_load: LoadProgress) -> EngineInfo:
        def spoiled(steps: list[SequenceStep]) -> None:
            steps = self.spoil(self, steps) if self.spoil else steps
            if steps:
                sink(steps)

        self.on_death = on_death
        return self.said(await self.inner.start(spoiled, self.died, on_load))

    def said(self, info: EngineInfo) -> EngineInfo:
        return info

    def died(self, error: HoldfastError) -> None:
        self.on_death(error)

    def submit(self, key: SequenceKey, request: GenerateRequest) -> None:
        self.inner.submit(key, request)
        self.requests[key] = request

    def cancel(self, key: SequenceKey) -> None:
        self.inner.cancel(key)

    def load(self) -> EngineLoad:
        return self.inner.load()

    def progress(self) -> EngineProgress:
        return self.inner.progress()

    def cache_counts(self) -> CacheCounts:
        return self.inner.cache_counts()

    def take_kv_events(self) -> list[KvEvent]:
        return self.inner.take_kv_events()

    async def check(self) -> None:
        await self.inner.check()

    async def close(self) -> None:
        await self.inner.close()


# ---- what a spoiled sink does ----


def index_off_by_one(engine: Wrapped, steps: list[SequenceStep]) -> list[SequenceStep]:
    return [same(step, index=step.index + bool(engine.requests[step.key].generated_ids)) for step in steps]


def terminating_token_lost(engine: Wrapped, steps: list[SequenceStep]) -> list[SequenceStep]:
    return [same(step, tokens=step.tokens[:-1]) if step.finish == "stop" else step for step in steps]


def stop_called_length(engine: Wrapped, steps: list[SequenceStep]) -> list[SequenceStep]:
    return [same(step, finish="length") if step.finish == "stop" else step for step in steps]


def finish_forgotten(engine: Wrapped, steps: list[SequenceStep]) -> list[SequenceStep]:
    return [same(step, finish=None) if step.finish == "length" else step for step in steps]


def said_twice(engine: Wrapped, steps: list[SequenceStep]) -> list[SequenceStep]:
    return [again for step in steps for again in ((step, step) if step.index == 2 else (step,))]


def token_dropped(engine: Wrapped, steps: list[SequenceStep]) -> list[SequenceStep]:
    return [step for step in steps if step.index != 2 or step.finish]


def logprobs_lost(engine: Wrapped, steps: list[SequenceStep]) -> list[SequenceStep]:
    return [same(step, logprobs=None) for step in steps]


def logprobs_of_base_two(engine: Wrapped, steps: list[SequenceStep]) -> list[SequenceStep]:
    return [
        same(step, logprobs=[TokenLogprob(-entry.logprob, entry.top) for entry in step.logprobs])
        if step.logprobs
        else step
        for step in steps
    ]


def restart_differs(engine: Wrapped, steps: list[SequenceStep]) -> list[SequenceStep]:
    """A continuation whose sampling is not keyed by position: the seeded one comes out differently."""
    return [
        same(step, tokens=[token ^ 1 for token in step.tokens])
        if (request := engine.requests[step.key]).generated_ids and request.sampling.temperature
        else step
        for step in steps
    ]


def cache_unsaid(engine: Wrapped, steps: list[SequenceStep]) -> list[SequenceStep]:
    return [same(step, cached_tokens=0) for step in steps]


def streams_crossed(engine: Wrapped, steps: list[SequenceStep]) -> list[SequenceStep]:
    """With many sequences in a step, two of them get each other's token."""
    if len(steps) < 4:
        return steps
    first, second = steps[0].tokens, steps[1].tokens
    return [same(steps[0], tokens=second), same(steps[1], tokens=first), *steps[2:]]


# ---- faults that are more than a spoiled sink ----


class SpeaksAfterCancel(Wrapped):
    """One more token for a sequence that was cancelled."""

    def cancel(self, key: SequenceKey) -> None:
        asyncio.get_running_loop().call_later(0.02, self.inner.cancel, key)


class ForgetsCancel(Wrapped):
    """Says nothing more, and computes on."""

    def __init__(self) -> None:
        super().__init__(lambda engine, steps: [step for step in steps if step.key not in self.silent])
        self.silent: set[int] = set()

    def cancel(self, key: SequenceKey) -> None:
        self.silent.add(key)


class LoadNeverFalls(Wrapped):
    """Counts a sequence as running for ever."""

    def load(self) -> EngineLoad:
        return msgspec.structs.replace(self.inner.load(), running=max(1, self.inner.load().running))


class LoadStandsStill(Wrapped):
    def load(self) -> EngineLoad:
        return EngineLoad(kv_total_blocks=64)


class CountersFall(Wrapped):
    def progress(self) -> EngineProgress:
        found = self.inner.progress()
        return msgspec.structs.replace(found, steps=found.steps % 5)


class CountsEveryHitTwice(Wrapped):
    def cache_counts(self) -> CacheCounts:
        found = self.inner.cache_counts()
        return msgspec.structs.replace(found, hits=2 * found.hits)


class TakesAnything(Wrapped):
    """Refuses nothing."""

    def submit(self, key: SequenceKey, request: GenerateRequest) -> None:
        try:
            super().submit(key, request)
        except HoldfastError:
            self.requests[key] = request


class DiesTwice(Wrapped):
    def died(self, error: HoldfastError) -> None:
        self.on_death(error)
        self.on_death(error)


class DiesInSilence(Wrapped):
    def died(self, error: HoldfastError) -> None:
        pass


class WorksAfterClose(Wrapped):
    async def close(self) -> None:
        pass


class RemovesTheUnknown(Wrapped):
    def take_kv_events(self) -> list[KvEvent]:
        from holdfast.kv.events import BlockRemoved  # noqa: PLC0415

        found = self.inner.take_kv_events()
        return [*found, BlockRemoved((12345,))] if found else []


class ForgetsMinTokens(Wrapped):
    """Counts min_tokens from where the attempt begins."""

    def submit(self, key: SequenceKey, request: GenerateRequest) -> None:
        stop = msgspec.structs.replace(request.stop, min_tokens=0 if request.generated_ids else request.stop.min_tokens)
        self.inner.submit(key, msgspec.structs.replace(request, stop=stop))
        self.requests[key] = request


class NewPenalties(Wrapped):
    """Penalises from where the attempt begins."""

    def submit(self, key: SequenceKey, request: GenerateRequest) -> None:
        sampling = request.sampling
        if request.generated_ids:
            sampling = msgspec.structs.replace(sampling, repetition_penalty=1.0)
        self.inner.submit(key, msgspec.structs.replace(request, sampling=sampling))
        self.requests[key] = request


class ClaimsLogprobs(Wrapped):
    """Claims more alternatives than it gives."""

    def said(self, info: EngineInfo) -> EngineInfo:
        can = msgspec.structs.replace(info.capabilities, max_logprobs=50)
        return msgspec.structs.replace(info, capabilities=can)


Make = Callable[[], Engine]


def spoiled(spoil: Spoil) -> Make:
    return lambda: Wrapped(spoil)


PLANTED: tuple[tuple[str, Make, str], ...] = (
    ("index off by one after a restart", spoiled(index_off_by_one), "counts_over_attempts"),
    ("terminating token lost", spoiled(terminating_token_lost), "end_of_sequence"),
    ("stop token lost", spoiled(terminating_token_lost), "stop_ids"),
    ("a stop called length", spoiled(stop_called_length), "end_of_sequence"),
    ("the end is never said", spoiled(finish_forgotten), "max_tokens"),
    ("a token said twice", spoiled(said_twice), "max_tokens"),
    ("a token dropped", spoiled(token_dropped), "max_tokens"),
    ("log probabilities lost", spoiled(logprobs_lost), "logprobs"),
    ("log probabilities of the wrong sign", spoiled(logprobs_of_base_two), "logprobs"),
    ("more alternatives claimed than given", ClaimsLogprobs, "logprobs"),
    ("exact restart claimed, greedy kept", spoiled(restart_differs), "exactness"),
    ("penalties begin anew", NewPenalties, "restores_penalties"),
    ("min_tokens begin anew", ForgetsMinTokens, "restores_min_tokens"),
    ("cached tokens not told", spoiled(cache_unsaid), "prefix_cache"),
    ("hits of the cache counted twice", CountsEveryHitTwice, "prefix_cache"),
    ("streams crossed", spoiled(streams_crossed), "many_streams"),
    ("a token after cancel", SpeaksAfterCancel, "cancel"),
    ("a cancel that stops nothing", ForgetsCancel, "cancel_stops_work"),
    ("load never falls", LoadNeverFalls, "load_moves"),
    ("load stands still", LoadStandsStill, "load_moves"),
    ("counters fall", CountersFall, "progress_rises"),
    ("refuses nothing", TakesAnything, "refusals"),
    ("removes blocks it never stored", RemovesTheUnknown, "kv_events"),
    ("death told twice", DiesTwice, "death"),
    ("death not told", DiesInSilence, "death"),
    ("works on after close", WorksAfterClose, "drain"),
)
"""(what is wrong, engine with it, check that must notice)"""


def quick(made: Make) -> Subject:
    """Return the mock engine's description with another engine and little patience: a hang is found soon."""
    return replace(SUBJECT, make=made, answer_seconds=0.4, death_seconds=0.4, kill=lambda e: e.inner.misbehave("die"))  # type: ignore[attr-defined]
