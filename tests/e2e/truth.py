"""The one true answer to a request, known beforehand (mock engine), and what a client saw of it.

The text is that of the token sequence which the mock engine's checker computes from scratch; usage, finish
reasons and the way in which parts were joined must fit as well. Must never ask anybody.
"""

from __future__ import annotations

from typing import Any

import msgspec

from holdfast.engines.contract import GenerateRequest, Sampling, StopRules, pack_ids
from holdfast.engines.mock.checker import expected_tokens, text_of
from holdfast.engines.mock.vocabulary import vocabulary
from holdfast.requests.seeds import mix

_SAMPLED = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")


class Ask(msgspec.Struct, frozen=True, kw_only=True):
    """A request whose answer is known beforehand (mock engine)."""

    content: str
    max_tokens: int = 40
    temperature: float = 0.8
    seed: int = 11
    n: int = 1
    stop: tuple[str, ...] = ()
    chat: bool = True
    model: str = "mock"
    lora: str | None = None
    """The adapter that ``model`` is, if it is one."""
    more: dict[str, Any] = {}
    """Further fields of the body."""

    def body(self) -> dict[str, Any]:
        """Return the arguments of the openai client, without ``stream``."""
        prompt = {"messages": [{"role": "user", "content": self.content}]} if self.chat else {"prompt": self.content}
        known = dict(self.more)
        extra = {k: known.pop(k) for k in ("top_k", "min_p", "repetition_penalty", "min_tokens") if k in known}
        return {
            "model": self.model,
            **prompt,
            "max_tokens": self.max_tokens,
            "temperature": self.temperature,
            "seed": self.seed,
            **({"n": self.n} if self.n > 1 else {}),
            **({"stop": list(self.stop)} if self.stop else {}),
            **known,
            **({"extra_body": extra} if extra else {}),
        }

    def prompt_ids(self) -> list[int]:
        """Return the prompt as the worker must get it."""
        text = self.content
        if self.chat:
            text = f"<|im_start|>user\n{self.content}<|im_end|>\n<|im_start|>assistant\n"
        return vocabulary().encode(text)

    def truth(self, choice: int = 0) -> list[int]:
        """Return the true token ids of a choice, as if nothing ever failed; stop strings not considered."""
        fields = {name: self.more[name] for name in _SAMPLED if name in self.more}
        sampling = Sampling(seed=mix(self.seed, choice), **{"temperature": self.temperature, **fields})
        stop = StopRules(self.max_tokens, self.more.get("min_tokens", 0))
        request = GenerateRequest("r", self.model, pack_ids(self.prompt_ids()), sampling, stop, lora=self.lora)
        return expected_tokens(request)

    def expected(self, choice: int = 0) -> tuple[str, str, int]:
        """Return text, finish reason and generated tokens of a choice."""
        ids = self.truth(choice)
        ended = ids[-1] in vocabulary().eos_ids
        text = text_of(ids[:-1] if ended else ids)
        for count in range(1, len(ids) + 1) if self.stop else ():
            so_far = text_of(ids[:count])
            found = [at for stop in self.stop if (at := so_far.find(stop)) >= 0]
            if found:
                return so_far[: min(found)], "stop", count
        return text, "stop" if ended else "length", len(ids)


class Answer(msgspec.Struct):
    """What a client saw."""

    text: dict[int, str] = {}
    finish: dict[int, list[str]] = {}
    """All finish reasons of a choice: there must be one."""
    usage: Any = None
    holdfast: dict[int, dict[str, Any]] = {}
    """The extension field of each choice's last chunk."""
    times: list[float] = []
    """When content arrived, seconds on the loop's clock."""
    logprobs: dict[int, list[Any]] = {}
    calls: dict[int, list[list[str]]] = {}
    """(name, arguments) of the tool calls."""
    worker: str = ""
    label: str = ""

    @property
    def moves(self) -> list[dict[str, Any]]:
        """All moves of all choices."""
        return [move for extension in self.holdfast.values() for move in extension.get("migrations", [])]

    @property
    def causes(self) -> list[str]:
        """Why it was moved."""
        return [move["cause"] for move in self.moves]

    @property
    def gap(self) -> float:
        """The longest silence between two pieces of content, in seconds."""
        return max((b - a for a, b in zip(self.times, self.times[1:], strict=False)), default=0.0)


def check(ask: Ask, answer: Answer) -> None:
    """Assert that the answer is exactly the true one."""
    total = 0
    assert sorted(answer.finish) == list(range(ask.n)), answer.finish
    for choice in range(ask.n):
        text, finish, count = ask.expected(choice)
        got = answer.text.get(choice, "")
        assert got == text, _difference(got, text)
        assert answer.finish[choice] == [finish]
        total += count
    if answer.usage is not None:
        used = (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens)
        prompt = len(ask.prompt_ids())
        assert used == (prompt, total, prompt + total)
    for extension in answer.holdfast.values():
        assert extension["join"] != "declared", extension
        assert extension["attempts"] >= 1


def _difference(got: str, wanted: str) -> str:
    at = next((i for i, (a, b) in enumerate(zip(got, wanted, strict=False)) if a != b), min(len(got), len(wanted)))
    return (
        f"texts part at character {at} of {len(wanted)}: {got[at - 20 : at + 30]!r}, not {wanted[at - 20 : at + 30]!r}"
    )
