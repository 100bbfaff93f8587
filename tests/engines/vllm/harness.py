"""Run vLLM in a test and collect what it says."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable
from typing import Any

from tokenizers import Tokenizer

from holdfast.base.errors import HoldfastError
from holdfast.base.ids import SequenceKey
from holdfast.engines.contract import EngineInfo, GenerateRequest, Sampling, SequenceStep, StopRules, pack_ids
from holdfast.engines.handoff import KvHandoff
from holdfast.engines.vllm.config import VllmConfig
from holdfast.engines.vllm.engine import VllmEngine
from holdfast.kv.events import KvEvent
from tests.engines.vllm.conftest import MORE_FLAGS

SMALL = (
    "--dtype float32 --max-model-len 512 --max-num-seqs 16 --block-size 32 --num-gpu-blocks-override 96 "
    f"--enforce-eager --seed 0 {MORE_FLAGS}"
).rstrip()
"""Flags with which two of them fit beside each other on a small machine."""
QUESTIONS = (
    "What is the capital of France?",
    "Write a short poem about the sea.",
    "Explain how a car engine works.",
    "List three prime numbers.",
    "Tell me a story about a robot who learns to cook.",
    "What is 12 times 7?",
    "Why is the sky blue?",
    "Give me a recipe for pancakes.",
)
PATIENCE = 120.0
"""Seconds that a busy machine may take for what takes one or two."""


def ask(
    prompt: list[int],
    *,
    max_tokens: int = 24,
    generated: list[int] | None = None,
    stop: dict[str, Any] | None = None,
    salt: str | None = None,
    lora: str | None = None,
    leg: Any = "aggregated",
    handoff: KvHandoff | None = None,
    extra: dict[str, Any] | None = None,
    **sampling: Any,
) -> GenerateRequest:
    return GenerateRequest(
        request_id="0" * 32,
        model="m",
        prompt_ids=pack_ids(prompt),
        sampling=Sampling(**{"temperature": 0.0, **sampling}),
        stop=StopRules(max_tokens, **({"ignore_eos": True} if stop is None else stop)),
        generated_ids=pack_ids(generated or []),
        cache_salt=salt,
        lora=lora,
        leg=leg,
        handoff=handoff,
        extra=extra or {},
    )


class Run:
    """An engine and everything that came out of it."""

    def __init__(self, model: str, args: str = SMALL, role: Any = "aggregated", **config: Any):
        self.engine = VllmEngine(VllmConfig(model=model, args=args, **config))
        self.engine.role = role
        self.batches: list[list[SequenceStep]] = []
        self.first: dict[int, int] = {}
        self.tokens: dict[int, list[int]] = {}
        self.logprobs: dict[int, list[Any]] = {}
        self.ends: dict[int, SequenceStep] = {}
        self.deaths: list[HoldfastError] = []
        self.loading: list[tuple[str, float]] = []
        self.events: list[KvEvent] = []
        self.info: EngineInfo
        self.tokenizer: Tokenizer
        self._keys = itertools.count(1)
        self._news = asyncio.Event()

    async def start(self) -> Run:
        self.info = await self.engine.start(self.sink, self.on_death, lambda *news: self.loading.append(news))
        self.tokenizer = Tokenizer.from_str(self.info.files.tokenizer_json.decode())
        return self

    def sink(self, steps: list[SequenceStep]) -> None:
        self.batches.append(steps)
        for step in steps:
            assert step.key not in self.ends, "a step after the end"
            assert step.index == self.first[step.key] + len(self.tokens[step.key]), "a gap or an overlap"
            self.tokens[step.key].extend(step.tokens)
            self.logprobs[step.key].extend(step.logprobs or [])
            if step.finish:
                self.ends[step.key] = step
        self.events.extend(self.engine.take_kv_events())
        self._news.set()

    def on_death(self, error: HoldfastError) -> None:
        self.deaths.append(error)
        self._news.set()

    def prompt(self, question: str) -> list[int]:
        text = f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
        return list(self.tokenizer.encode(text, add_special_tokens=False).ids)

    def submit(self, request: GenerateRequest) -> int:
        key = next(self._keys)
        self.first[key] = len(request.generated_ids) // 4
        self.tokens[key], self.logprobs[key] = [], []
        self.engine.submit(SequenceKey(key), request)
        return key

    def cancel(self, key: int) -> None:
        self.engine.cancel(SequenceKey(key))

    async def until(self, condition: Callable[[], object], seconds: float = PATIENCE) -> None:
        """Wait until something holds, looking whenever the engine says something, and every now and then."""
        async with asyncio.timeout(seconds):
            while not condition():
                self._news.clear()
                try:
                    async with asyncio.timeout(0.05):
                        await self._news.wait()
                except TimeoutError:
                    self.events.extend(self.engine.take_kv_events())

    async def finished(self, *keys: int) -> list[list[int]]:
        await self.until(lambda: self.deaths or all(key in self.ends for key in keys))
        assert not self.deaths, self.deaths
        return [self.tokens[key] for key in keys]

    async def generate(self, request: GenerateRequest) -> list[int]:
        (tokens,) = await self.finished(self.submit(request))
        return tokens
