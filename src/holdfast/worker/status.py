"""The worker's status over HTTP: ``/live`` (the event loop runs) and ``/health`` (work can be sent here now).

Two different facts: a worker that drains or warms up is alive, yet not ready. Answers are small JSON
documents; one request per connection, bounded in size, time and number.

Must never do work on behalf of a request beyond reading what the worker knows about itself.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import msgspec

from holdfast.runtime.transport import CannotListen, join_address, reason_of

HEAD_BYTES = 8 * 1024
HEAD_SECONDS = 5.0
CONNECTIONS = 64
"""Connections at once; more are closed unanswered."""
_READY = frozenset({"ready", "saturated"})
_REASONS = {200: "OK", 404: "Not Found", 405: "Method Not Allowed", 503: "Service Unavailable"}

Facts = Callable[[], dict[str, Any]]
"""Returns what `/health` shows; ``state`` decides between 200 and 503."""


class StatusServer:
    """Start it early, so that a worker that still loads can be told from one that is gone."""

    def __init__(self, facts: Facts):
        self.address = ""
        """``host:port``, once started."""
        self._facts = facts
        self._started = 0.0
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[Any]] = set()

    async def start(self, host: str, port: int) -> None:
        """Listen; port 0 picks a free one. Raises CannotListen when the address cannot be bound."""
        self._started = asyncio.get_running_loop().time()
        try:
            self._server = await asyncio.start_server(self._serve, host, port, limit=HEAD_BYTES)
        except OSError as error:
            raise CannotListen(
                f"The status server cannot listen on {join_address(host, port)}: {reason_of(error)}."
            ) from error
        self.address = join_address(host, self._server.sockets[0].getsockname()[1])

    async def close(self) -> None:
        """Stop listening and drop what is open. Idempotent."""
        if self._server is not None:
            self._server.close()
        for task in list(self._tasks):
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        if len(self._tasks) >= CONNECTIONS:
            writer.close()
            return
        self._tasks.add(task)
        try:
            async with asyncio.timeout(HEAD_SECONDS):
                head = await reader.readuntil(b"\r\n\r\n")
                writer.write(self._answer(head))
                await writer.drain()
        except (TimeoutError, OSError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
            pass  # whoever asked is gone, too slow or no HTTP client; nothing is owed
        finally:
            self._tasks.discard(task)
            writer.close()

    def _answer(self, head: bytes) -> bytes:
        method, _, rest = head.partition(b" ")
        path = rest.partition(b" ")[0].partition(b"?")[0]
        body: dict[str, Any]
        if method not in (b"GET", b"HEAD"):
            status, body = 405, {"message": "Use GET."}
        elif path == b"/live":
            status, body = 200, {"status": "live", "uptime": self._uptime()}
        elif path == b"/health":
            facts = self._facts()
            ready = facts.get("state") in _READY
            status = 200 if ready else 503
            body = {"status": "ready" if ready else "notready", "uptime": self._uptime(), **facts}
        else:
            status, body = 404, {"message": "There are /live and /health."}
        return _response(status, msgspec.json.encode(body), method != b"HEAD")

    def _uptime(self) -> dict[str, int]:
        seconds = asyncio.get_running_loop().time() - self._started
        return {"secs": int(seconds), "nanos": int(seconds % 1 * 1e9)}


def _response(status: int, body: bytes, with_body: bool) -> bytes:
    head = (
        f"HTTP/1.1 {status} {_REASONS[status]}\r\ncontent-type: application/json\r\n"
        f"content-length: {len(body)}\r\nconnection: close\r\n\r\n"
    )
    return head.encode() + (body if with_body else b"")
