"""Asking through the unmodified openai package, with the progress of the answer to be waited for."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import AsyncIterator
from typing import Any

from tests.e2e.support import Cluster
from tests.e2e.truth import Answer, Ask, check

_LABELS = itertools.count(1)


class Live:
    """A stream that is being read. ``answer`` grows; ``error`` is what reading it raised."""

    def __init__(self, cluster: Cluster, body: dict[str, Any], chat: bool, headers: dict[str, str]):
        self.cluster = cluster
        self.label = headers.get("x-request-id") or f"e2e-{next(_LABELS)}"
        self.answer = Answer(label=self.label)
        self.error: Exception | None = None
        self.over = False
        self._body = {**body, "stream": True, "stream_options": {"include_usage": True}}
        self._headers = {**headers, "x-request-id": self.label}
        self._chat = chat
        self._news = asyncio.Event()
        self.task = asyncio.get_running_loop().create_task(self._read())

    @property
    def pieces(self) -> int:
        """Pieces of content that have arrived."""
        return len(self.answer.times)

    async def until_pieces(self, count: int, within: float = 30.0) -> None:
        """Wait until so many pieces of content have arrived, or the stream is over."""
        async with asyncio.timeout(within):
            while self.pieces < count and not self.over:
                self._news.clear()
                await self._news.wait()

    async def until_open(self, within: float = 30.0) -> None:
        """Wait until the response has begun (a worker has accepted)."""
        async with asyncio.timeout(within):
            while not self.answer.worker and not self.over:
                self._news.clear()
                await self._news.wait()

    async def done(self, within: float = 60.0) -> Answer:
        """Return the whole answer; raises what the openai package raised."""
        async with asyncio.timeout(within):
            await asyncio.wait([self.task])
        if self.error is not None:
            raise self.error
        return self.answer

    async def leave(self) -> None:
        """Disconnect, as a client does that is closed."""
        self.task.cancel()
        await asyncio.wait([self.task])

    async def _read(self) -> None:
        api = self.cluster.client.chat.completions if self._chat else self.cluster.client.completions
        try:
            raw = await api.with_raw_response.create(**self._body, extra_headers=self._headers)
            self.answer.worker = raw.headers.get("x-holdfast-worker", "?")
            self._news.set()
            async with raw.parse() as stream:
                async for chunk in stream:
                    self._take(chunk)
                    self._news.set()
        except Exception as error:  # whatever it is, `done` raises it
            self.error = error
        finally:
            self.over = True
            self._news.set()

    def _take(self, chunk: Any) -> None:
        answer = self.answer
        answer.usage = chunk.usage or answer.usage
        for choice in chunk.choices:
            text = choice.delta.content if self._chat else choice.text
            if text:
                answer.text[choice.index] = answer.text.get(choice.index, "") + text
                answer.times.append(asyncio.get_running_loop().time())
            if choice.logprobs is not None:
                entries = choice.logprobs.content if self._chat else [choice.logprobs]
                answer.logprobs.setdefault(choice.index, []).extend(entries or [])
            if self._chat:
                self._take_calls(choice)
            if choice.finish_reason:
                answer.finish.setdefault(choice.index, []).append(choice.finish_reason)
                answer.holdfast[choice.index] = getattr(chunk, "holdfast", None) or {}

    def _take_calls(self, choice: Any) -> None:
        for call in choice.delta.tool_calls or []:
            calls = self.answer.calls.setdefault(choice.index, [])
            if call.function.name:
                calls.append([call.function.name, ""])
            calls[call.index][1] += call.function.arguments or ""


@contextlib.asynccontextmanager
async def streaming(
    cluster: Cluster, ask: Ask | dict[str, Any], *, chat: bool = True, **headers: str
) -> AsyncIterator[Live]:
    """Stream an answer for the length of the block; header names with ``_`` for ``-``."""
    body = ask.body() if isinstance(ask, Ask) else {"model": cluster.model, **ask}
    use_chat = ask.chat if isinstance(ask, Ask) else chat
    live = Live(cluster, body, use_chat, {k.replace("_", "-"): v for k, v in headers.items()})
    try:
        yield live
    finally:
        await live.leave()


async def exact(cluster: Cluster, ask: Ask, within: float = 60.0, **headers: str) -> Answer:
    """Stream an answer to its end and check it against the truth."""
    async with streaming(cluster, ask, **headers) as live:
        answer = await live.done(within)
    check(ask, answer)
    return answer


async def whole(cluster: Cluster, ask: Ask, within: float = 60.0) -> Answer:
    """Ask without streaming; the answer is checked against the truth."""
    api = cluster.client.chat.completions if ask.chat else cluster.client.completions
    async with asyncio.timeout(within):
        got = await api.create(**ask.body())
    answer = Answer(usage=got.usage, holdfast={0: getattr(got, "holdfast", None) or {}})
    for choice in got.choices:
        answer.text[choice.index] = (choice.message.content if ask.chat else choice.text) or ""
        answer.finish[choice.index] = [choice.finish_reason]
    assert got.usage is not None
    check(ask, answer)
    return answer
