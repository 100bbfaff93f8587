"""What must be true of every event stream, whatever happened to the workers behind it: it ends exactly once.

Watched under the unmodified client (`Wire`). The oracle of exactness is in `truth`; the one of leases is
`support.Cluster.at_rest`. `test_oracles` plants bugs to show that each of them can fail.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator

import httpx


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
