"""Stand-in: results. Outputs are cumulative, as those of the real package."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from tensorrt_llm.disaggregated_params import DisaggregatedParams


@dataclass(slots=True)
class Logprob:
    """Log probability of a token, and its rank."""

    logprob: float
    rank: int | None = None


@dataclass(slots=True)
class CompletionOutput:
    """Everything that one sequence has said so far."""

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[dict[int, Logprob]] = field(default_factory=list)
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    disaggregated_params: DisaggregatedParams | None = None


class RequestOutput:
    """Iterate over it: each step is this same object with more in it."""

    def __init__(self, request_id: int, abort: Callable[[int], None]):
        self.request_id = request_id
        self.outputs = [CompletionOutput(0)]
        self.finished = False
        self.cached_tokens = 0
        self.error: str | None = None
        self._abort = abort
        self._queue: asyncio.Queue[Callable[[RequestOutput], None]] = asyncio.Queue()

    def put(self, change: Callable[[RequestOutput], None]) -> None:
        """Queue what the engine has to say."""
        self._queue.put_nowait(change)

    def abort(self) -> None:
        """Tell the engine to stop; the end comes as an output of its own."""
        self._abort(self.request_id)

    def __aiter__(self) -> RequestOutput:
        return self

    async def __anext__(self) -> RequestOutput:
        if self.finished:
            raise StopAsyncIteration
        change = await self._queue.get()
        change(self)
        return self


class IterationResult:
    """Statistics or events: ends when nothing came for ``timeout``, and stays ended until a request is submitted."""

    def __init__(self) -> None:
        self._queue: asyncio.Queue[str] = asyncio.Queue()
        self._done = False
        self._timeout: float | None = 2.0

    def put(self, value: dict[str, Any]) -> None:
        self._queue.put_nowait(json.dumps(value))

    def set_timeout(self, timeout: float | None) -> None:
        self._timeout = timeout

    def mark_undone(self) -> None:
        self._done = False

    def __aiter__(self) -> IterationResult:
        return self

    async def __anext__(self) -> dict[str, Any]:
        if self._done:
            raise StopAsyncIteration
        try:
            found: dict[str, Any] = json.loads(await asyncio.wait_for(self._queue.get(), self._timeout))
        except TimeoutError:
            self._done = True
            raise StopAsyncIteration from None
        return found
