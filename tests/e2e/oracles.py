"""What must be true of every answer, whatever happened to the workers behind it.

* exact: the text is that of the one true token sequence, computed by the mock engine's checker (`Ask.truth`);
* one terminal event: the bytes of every stream end exactly once (`check_events`), watched under the client;
* usage, finish reason and attempts fit the truth (`check`).

`test_oracles` plants errors to show that each can fail.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import httpx
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
        request = GenerateRequest("r", self.model, pack_ids(self.prompt_ids()), sampling, stop)
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
    return f"texts part at character {at} of {len(wanted)}: {got[at - 20 : at + 30]!r}, not {wanted[at - 20 : at + 30]!r}"


def check_events(raw: bytes) -> None:
    """Assert that the bytes of one event stream end properly: once, and nothing follows.

    One end is a finish reason per choice, or one error event; then ``[DONE]``, at the very end.
    """
    assert raw.endswith(b"data: [DONE]\n\n"), f"the stream ends with {raw[-80:]!r}"
    lines = [line[6:] for line in raw.split(b"\n") if line.startswith(b"data: ")]
    assert lines.count(b"[DONE]") == 1
    events = [json.loads(line) for line in lines[:-1]]
    errors = [i for i, event in enumerate(events) if "error" in event]
    finished: list[int] = []
    seen: set[int] = set()
    for event in events:
        for choice in event.get("choices", []):
            assert choice["index"] not in finished, f"choice {choice['index']} goes on after its end"
            seen.add(choice["index"])
            if choice.get("finish_reason"):
                finished.append(choice["index"])
    if errors:
        assert errors == [len(events) - 1], "something follows an error, or there are several"
        assert not seen or set(finished) != seen, "an error after every choice had ended"
    else:
        assert set(finished) == seen, f"choices {seen}, ended {finished}"


class Wire(httpx.AsyncBaseTransport):
    """Sits under the openai package: keeps the bytes of every event stream by its ``x-request-id``.

    A stream that its client read to the end must pass `check_events`; `broken` collects those that did not.
    """

    def __init__(self) -> None:
        self._inner = httpx.AsyncHTTPTransport(limits=httpx.Limits(max_connections=2000, max_keepalive_connections=200))
        self.broken: list[str] = []
        self.checked = 0

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        response = await self._inner.handle_async_request(request)
        if response.headers.get("content-type", "").startswith("text/event-stream"):
            assert isinstance(response.stream, httpx.AsyncByteStream)
            response.stream = _Tap(response.stream, self, response.headers.get("x-request-id", ""))
        return response

    def over(self, raw: bytes, label: str) -> None:
        """A stream was read to its end."""
        self.checked += 1
        try:
            check_events(raw)
        except AssertionError as error:
            self.broken.append(f"{label}: {error}")

    async def aclose(self) -> None:
        await self._inner.aclose()


class _Tap(httpx.AsyncByteStream):
    """Passes the bytes on; the openai package stops reading at ``[DONE]``, so what follows is read here."""

    def __init__(self, inner: httpx.AsyncByteStream, wire: Wire, label: str):
        self._inner, self._wire, self._label = inner, wire, label
        self._parts: list[bytes] = []
        self._source: AsyncIterator[bytes] | None = None
        self._ended = False

    async def __aiter__(self) -> AsyncIterator[bytes]:
        self._source = aiter(self._inner)
        async for part in self._source:
            self._parts.append(part)
            yield part
        self._ended = True

    async def aclose(self) -> None:
        raw = b"".join(self._parts)
        if self._source is not None and not self._ended and b"data: [DONE]" in raw:
            async with asyncio.timeout(10):
                self._parts += [part async for part in self._source]
            self._ended = True
        if self._ended and self._parts:
            self._wire.over(b"".join(self._parts), self._label)
            self._parts = []
        await self._inner.aclose()
