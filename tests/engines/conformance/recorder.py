"""Runs an engine in this process and writes down what it says; broken rules of the contract are noted at once."""

from __future__ import annotations

import asyncio
import itertools
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any, get_args

from tokenizers import Tokenizer

from holdfast.base.errors import HoldfastError
from holdfast.base.ids import SequenceKey
from holdfast.engines.contract import (
    Engine,
    EngineInfo,
    Finish,
    GenerateRequest,
    Sampling,
    SequenceStep,
    StopRules,
    TokenLogprob,
    pack_ids,
)
from tests.engines.conformance.subject import Subject
from tests.patience import within


class Sequence:
    """Everything that was said about one sequence."""

    def __init__(self, request: GenerateRequest):
        self.request = request
        self.next = len(request.generated_ids) // 4
        self.tokens: list[int] = []
        self.logprobs: list[TokenLogprob] = []
        self.end: SequenceStep | None = None
        self.cancelled = False

    @property
    def finish(self) -> str | None:
        return self.end.finish if self.end else None


class Recorder:
    """A started engine with all that came out of it. ``faults`` lists what the contract forbids."""

    def __init__(self, subject: Subject, engine: Engine | None = None):
        self.subject = subject
        self.engine = engine or subject.make()
        self.sequences: dict[int, Sequence] = {}
        self.faults: list[str] = []
        self.deaths: list[HoldfastError] = []
        self.loading: list[tuple[str, float]] = []
        self.sink_calls = 0
        self.closed = False
        self.info: EngineInfo
        self.tokenizer: Tokenizer
        self._keys = itertools.count(1)
        self._news = asyncio.Event()
        self._thread = threading.get_ident()

    async def start(self) -> Recorder:
        async with asyncio.timeout(within(self.subject.start_seconds)):
            self.info = await self.engine.start(self._sink, self._on_death, lambda *news: self.loading.append(news))
        self.tokenizer = Tokenizer.from_str(self.info.files.tokenizer_json.decode())
        return self

    # what the engine calls

    def _sink(self, steps: list[SequenceStep]) -> None:
        self.sink_calls += 1
        self._note(threading.get_ident() == self._thread, "the sink was called on another thread")
        self._note(bool(steps), "the sink was called with nothing")
        self._note(not self.closed, "the sink was called after close")
        self._note(not self.deaths, "the sink was called after the engine's death")
        self._note(len({step.key for step in steps}) == len(steps), "two steps of one sequence in one call")
        for step in steps:
            self._take(step)
        self._news.set()

    def _take(self, step: SequenceStep) -> None:
        sequence = self.sequences.get(step.key)
        if sequence is None:
            self.faults.append(f"a step for the unknown sequence {step.key}")
            return
        who = f"sequence {step.key}"
        self._note(not sequence.cancelled, f"{who}: a step after cancel")
        self._note(sequence.end is None, f"{who}: a step after its end")
        self._note(step.index == sequence.next, f"{who}: index {step.index} instead of {sequence.next}")
        self._note(step.finish is None or step.finish in get_args(Finish), f"{who}: finish {step.finish!r}")
        self._note((step.error is None) or step.finish == "error", f"{who}: an error without finish error")
        self._note(step.error is not None or step.finish != "error", f"{who}: finish error without an error")
        self._note(bool(step.tokens) or step.finish is not None, f"{who}: a step that says nothing")
        known = all(type(token) is int and 0 <= token < self.info.vocab_size for token in step.tokens)
        self._note(known, f"{who}: a token outside the vocabulary")
        self._check_logprobs(who, sequence, step)
        sequence.next = step.index + len(step.tokens)
        sequence.tokens += step.tokens
        sequence.logprobs += step.logprobs or []
        limit = sequence.request.stop.max_tokens
        self._note(sequence.next <= limit, f"{who}: {sequence.next} tokens, at most {limit} were allowed")
        if step.finish is not None:
            sequence.end = step

    def _check_logprobs(self, who: str, sequence: Sequence, step: SequenceStep) -> None:
        wanted = sequence.request.sampling.logprobs
        if wanted is None:
            self._note(not step.logprobs, f"{who}: log probabilities that nobody asked for")
            return
        given = len(step.logprobs or ())
        self._note(given == len(step.tokens), f"{who}: {given} log probabilities for {len(step.tokens)} tokens")

    def _on_death(self, error: HoldfastError) -> None:
        self._note(threading.get_ident() == self._thread, "on_death was called on another thread")
        self.deaths.append(error)
        self._news.set()

    def _note(self, fine: bool, what: str) -> None:
        if not fine:
            self.faults.append(what)

    # what checks use

    def ids(self, text: str) -> list[int]:
        return list(self.tokenizer.encode(text, add_special_tokens=False).ids)

    def filled(self, count: int, salt: int = 0) -> list[int]:
        """Return a prompt of so many tokens; another salt gives another one from the first token on."""
        head = self.ids(f"{salt} {salt * 7 + 3} ")
        unit = self.ids(self.subject.filler * 8)
        return (head + unit * (count // len(unit) + 1))[:count]

    def request(
        self, prompt: str | list[int], max_tokens: int = 0, generated: list[int] | None = None, **how: Any
    ) -> GenerateRequest:
        """Return a request: greedy and without end unless told otherwise; ``how`` may name any field below it."""
        stop = {"ignore_eos": True, **{name: how.pop(name) for name in _STOPS & how.keys()}}
        more = {name: how.pop(name) for name in _MORE & how.keys()}
        return GenerateRequest(
            request_id="0" * 32,
            model=self.info.model,
            prompt_ids=pack_ids(self.ids(prompt) if isinstance(prompt, str) else prompt),
            sampling=Sampling(**{"temperature": 0.0, **how}),
            stop=StopRules(max_tokens or self.subject.length, **stop),
            generated_ids=pack_ids(generated or []),
            **more,
        )

    def submit(self, request: GenerateRequest) -> int:
        key = next(self._keys)
        self.sequences[key] = Sequence(request)
        try:
            self.engine.submit(SequenceKey(key), request)
        except HoldfastError:
            del self.sequences[key]
            raise
        return key

    def cancel(self, key: int) -> None:
        self.engine.cancel(SequenceKey(key))
        self.sequences[key].cancelled = True

    async def until(self, what: str, condition: Callable[[], bool], seconds: float = 0.0) -> None:
        """Wait for news that make the condition true, or for whatever changes silently; AssertionError when overdue."""
        try:
            async with asyncio.timeout(within(seconds or self.subject.answer_seconds)):
                while not condition():
                    self._news.clear()
                    with suppress(TimeoutError):
                        await asyncio.wait_for(self._news.wait(), 0.01)
        except TimeoutError:
            raise AssertionError(f"not in time: {what}") from None

    async def finish(self, *keys: int) -> list[list[int]]:
        await self.until("every sequence ends", lambda: all(self.sequences[key].end for key in keys))
        return [self.sequences[key].tokens for key in keys]

    async def generate(self, *requests: GenerateRequest) -> list[list[int]]:
        """Run these side by side; returns their new tokens."""
        return await self.finish(*[self.submit(request) for request in requests])

    async def one(self, prompt: str | list[int], max_tokens: int = 0, **how: Any) -> list[int]:
        return (await self.generate(self.request(prompt, max_tokens, **how)))[0]

    async def idle(self) -> None:
        """Wait until the engine says that nothing is in hand."""
        await self.until("load falls to zero", lambda: _nothing(self.engine), self.subject.answer_seconds)
        await self.subject.settle(self.engine)

    async def close(self) -> None:
        await self.engine.close()
        self.closed = True

    def blame(self) -> None:
        """Raise AssertionError when a rule was broken since the last call."""
        faults, self.faults = self.faults, []
        assert faults == [], "; ".join(dict.fromkeys(faults))


_STOPS = frozenset(StopRules.__struct_fields__) - {"max_tokens"}
_MORE = frozenset({"lora", "cache_salt", "priority", "extra", "leg", "handoff", "attempt"})


def _nothing(engine: Engine) -> bool:
    load = engine.load()
    return load.running == 0 and load.waiting == 0


@asynccontextmanager
async def started(subject: Subject, engine: Engine | None = None) -> AsyncIterator[Recorder]:
    """Start an engine and close it whatever happens."""
    run = Recorder(subject, engine)
    try:
        yield await run.start()
    finally:
        await run.engine.close()
