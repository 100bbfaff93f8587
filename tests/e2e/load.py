"""Clients that keep asking while something happens to the cluster; every answer is compared with the truth.

Each client keeps its connection, as real ones do; some open a new one for every request. A request counts as failed
when it ends in anything but the whole, exact answer.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
from collections.abc import AsyncIterator
from typing import Any

import httpx

from tests.e2e.oracles import check_events
from tests.e2e.truth import Ask

CHAT = "/v1/chat/completions"


class Load:
    """What the clients have seen so far."""

    def __init__(self, url: str, tokens: tuple[int, ...], pause: float):
        self.url = url
        self.tokens = tokens
        self.pause = pause
        self.answered = 0
        self.moved = 0
        """Answers that took more than one attempt."""
        self.failed: list[str] = []
        self._numbers = itertools.count()
        self._over = asyncio.Event()

    async def client(self, *, stream: bool, keep: bool) -> None:
        """Ask until it is over: streaming or not, on one connection or on a new one each time."""
        limits = httpx.Limits(max_keepalive_connections=1 if keep else 0)
        async with httpx.AsyncClient(base_url=self.url, timeout=60, limits=limits) as http:
            while not self._over.is_set():
                number = next(self._numbers)
                ask = Ask(content=f"load {number}", max_tokens=self.tokens[number % len(self.tokens)], seed=number)
                try:
                    await (self._stream(http, ask) if stream else self._whole(http, ask))
                    self.answered += 1
                except Exception as error:
                    kind = "stream" if stream else "whole"
                    self.failed.append(f"{kind} {number} (keep {keep}): {type(error).__name__}: {error}")
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._over.wait(), self.pause)

    def stop(self) -> None:
        """Let every client finish its present request."""
        self._over.set()

    async def _whole(self, http: httpx.AsyncClient, ask: Ask) -> None:
        answer = await http.post(CHAT, json=_body(ask))
        assert answer.status_code == 200, f"{answer.status_code}: {answer.text}"
        content = answer.json()
        choice = content["choices"][0]
        self._judge(ask, choice["message"]["content"], choice["finish_reason"], content["usage"], content["holdfast"])

    async def _stream(self, http: httpx.AsyncClient, ask: Ask) -> None:
        raw = b""
        body = {**_body(ask), "stream": True, "stream_options": {"include_usage": True}}
        async with http.stream("POST", CHAT, json=body) as answer:
            async for part in answer.aiter_bytes():
                raw += part
        assert answer.status_code == 200, f"{answer.status_code}: {raw.decode()}"
        check_events(raw)
        events = [json.loads(line[6:]) for line in raw.split(b"\n") if line.startswith(b"data: {")]
        errors = [event["error"] for event in events if "error" in event]
        assert not errors, errors
        choices = [event["choices"][0] for event in events if event.get("choices")]
        text = "".join(choice["delta"].get("content") or "" for choice in choices)
        finish = next(choice["finish_reason"] for choice in choices if choice.get("finish_reason"))
        usage = next(event["usage"] for event in events if event.get("usage"))
        extension = next((event["holdfast"] for event in reversed(events) if event.get("holdfast")), {})
        self._judge(ask, text, finish, usage, extension)

    def _judge(self, ask: Ask, text: str, finish: str, usage: dict[str, Any], extension: dict[str, Any]) -> None:
        expected, reason, count = ask.expected()
        assert text == expected, f"text of {len(text)} characters, not {len(expected)}"
        assert (finish, usage["completion_tokens"]) == (reason, count)
        assert extension.get("join") != "declared"
        self.moved += int(extension.get("attempts", 1)) > 1


def _body(ask: Ask) -> dict[str, Any]:
    return {**ask.body(), "model": "mock"}


@contextlib.asynccontextmanager
async def load(
    url: str, *, clients: int = 8, tokens: tuple[int, ...] = (10, 40, 120), pause: float = 0.01
) -> AsyncIterator[Load]:
    """Keep asking for the length of the block; at its end every client has finished its last request."""
    found = Load(url, tokens, pause)
    async with asyncio.TaskGroup() as tasks:
        for number in range(clients):
            tasks.create_task(found.client(stream=number % 2 == 0, keep=number % 4 < 2))
        try:
            yield found
        finally:
            found.stop()
