"""Run the embedded engine in a test and collect what it says."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable
from typing import Any

from tokenizers import Tokenizer

from holdfast.base.errors import HoldfastError
from holdfast.base.ids import SequenceKey
from holdfast.engines.contract import EngineInfo, GenerateRequest, Sampling, SequenceStep, StopRules, pack_ids
from holdfast.engines.llamacpp import LlamaCppConfig, LlamaCppEngine

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


def request(
    prompt: list[int],
    *,
    max_tokens: int = 24,
    generated: list[int] | None = None,
    stop: dict[str, Any] | None = None,
    salt: str | None = None,
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
    )


class Run:
    """A started engine and everything that came out of it."""

    def __init__(self, **config: Any):
        self.engine = LlamaCppEngine(LlamaCppConfig(**config))
        self.steps: list[list[SequenceStep]] = []
        self.first: dict[int, int] = {}
        self.tokens: dict[int, list[int]] = {}
        self.logprobs: dict[int, list[Any]] = {}
        self.ends: dict[int, SequenceStep] = {}
        self.deaths: list[HoldfastError] = []
        self.loading: list[tuple[str, float]] = []
        self.info: EngineInfo
        self.tokenizer: Tokenizer
        self._keys = itertools.count(1)
        self._news = asyncio.Event()

    async def start(self) -> Run:
        self.info = await self.engine.start(self.sink, self.on_death, lambda *news: self.loading.append(news))
        self.tokenizer = Tokenizer.from_str(self.info.files.tokenizer_json.decode())
        return self

    def sink(self, steps: list[SequenceStep]) -> None:
        self.steps.append(steps)
        for step in steps:
            assert step.key not in self.ends, "a step after the end"
            assert step.index == self.first[step.key] + len(self.tokens[step.key]), "a gap or an overlap"
            self.tokens[step.key].extend(step.tokens)
            self.logprobs[step.key].extend(step.logprobs or [])
            if step.finish:
                self.ends[step.key] = step
        self._news.set()

    def on_death(self, error: HoldfastError) -> None:
        self.deaths.append(error)
        self._news.set()

    def submit(self, wanted: GenerateRequest) -> int:
        key = next(self._keys)
        self.first[key], self.tokens[key], self.logprobs[key] = len(wanted.generated_ids) // 4, [], []
        self.engine.submit(SequenceKey(key), wanted)
        return key

    async def until(self, condition: Callable[[], bool], seconds: float = 60.0) -> None:
        async with asyncio.timeout(seconds):
            while not condition():
                self._news.clear()
                await self._news.wait()

    async def finish(self, *keys: int) -> list[list[int]]:
        await self.until(lambda: all(key in self.ends for key in keys))
        return [self.tokens[key] for key in keys]

    async def generate(self, *wanted: GenerateRequest) -> list[list[int]]:
        """Run these side by side; returns their new tokens."""
        return await self.finish(*[self.submit(one) for one in wanted])

    async def one(self, prompt: list[int], **options: Any) -> list[int]:
        return (await self.generate(request(prompt, **options)))[0]

    async def idle(self) -> None:
        """Wait until the engine thread has let go of everything."""
        async with asyncio.timeout(30):
            while not self._at_rest():  # noqa: ASYNC110 - a thread has no event
                await asyncio.sleep(0.002)

    def _at_rest(self) -> bool:
        core = self.engine._core
        return not core._running and not core._waiting and core.phase == "idle"

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def chat(self, text: str) -> list[int]:
        return self.encode(f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n")

    def decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids)
