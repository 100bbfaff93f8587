"""A load generator that costs little: raw HTTP/1.1 over asyncio protocols, one request at a time per connection.

Counts events and notes arrival times; it does not parse JSON. Must never be used as a client in tests.
"""

from __future__ import annotations

import asyncio
import json
import time
from pathlib import Path
from typing import Any


def cpu_seconds(pid: int) -> float:
    """Return the CPU time of another process (user and system), in seconds, to the nanosecond."""
    return time.clock_gettime(((~pid) << 3) | 2)


def rss_mb(pid: int) -> float:
    """Return the resident memory of a process in MB."""
    status = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in status if line.startswith("VmRSS"))


def request_bytes(body: dict[str, Any], path: str = "/v1/chat/completions") -> bytes:
    """Return a whole HTTP request."""
    data = json.dumps(body).encode()
    head = (
        f"POST {path} HTTP/1.1\r\nhost: bench\r\nuser-agent: bench\r\naccept: */*\r\n"
        f"content-type: application/json\r\ncontent-length: {len(data)}\r\n\r\n"
    )
    return head.encode() + data


def chat(tokens: int, *, stream: bool = True, text: str = "hi", **more: Any) -> bytes:
    """Return a chat request for so many tokens."""
    messages = [{"role": "user", "content": text}]
    return request_bytes({"model": "mock", "messages": messages, "stream": stream, "max_tokens": tokens, **more})


class Client(asyncio.Protocol):
    """One connection. `fetch` sends a request and returns when its answer is complete."""

    def __init__(self, *, arrivals: bool = False):
        self.events = 0
        self.reads = 0
        self.first_at = 0.0
        self.arrivals: list[float] | None = [] if arrivals else None
        self.status = b""
        self.last = b""
        """The last bytes that came: the last events of a stream."""
        self._done: asyncio.Future[None] | None = None
        self._tail = b""
        self._need = -1
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def connection_lost(self, exc: Exception | None) -> None:
        if self._done is not None and not self._done.done():
            self._done.set_exception(ConnectionError(f"connection lost: {exc}"))

    def data_received(self, data: bytes) -> None:
        now = time.perf_counter()
        if not self.reads:
            self._head(data)
        self.reads += 1
        self.last = (self.last + data)[-2048:]
        events = data.count(b"data: ")
        if events:
            if not self.events:
                self.first_at = now
            self.events += events
            if self.arrivals is not None:
                self.arrivals += [now] * events
        if self._need >= 0:
            self._need -= len(data)
            finished = self._need <= 0
        else:
            self._tail = (self._tail + data)[-7:]
            finished = self._tail.endswith(b"\r\n0\r\n\r\n")
        if finished and self._done is not None and not self._done.done():
            self._done.set_result(None)

    def _head(self, data: bytes) -> None:
        self.status = data[9:12]
        head, _, _ = data.partition(b"\r\n\r\n")
        for line in head.lower().split(b"\r\n"):
            if line.startswith(b"content-length:"):
                self._need = int(line[15:]) + len(head) + 4

    async def fetch(self, request: bytes) -> None:
        """Send a request and wait for its whole answer.

        Raises:
            ConnectionError, RuntimeError: lost, or not status 200.
        """
        assert self._transport is not None
        self.events = self.reads = 0
        self._tail, self._need = b"", -1
        if self.arrivals is not None:
            self.arrivals = []
        self._done = asyncio.get_running_loop().create_future()
        self._transport.write(request)
        await self._done
        if self.status != b"200":
            raise RuntimeError(f"status {self.status.decode()}")

    def close(self) -> None:
        if self._transport is not None:
            self._transport.close()


async def connect(port: int, *, arrivals: bool = False) -> Client:
    """Return a connected client."""
    loop = asyncio.get_running_loop()
    _, client = await loop.create_connection(lambda: Client(arrivals=arrivals), "127.0.0.1", port)
    return client


async def run(port: int, request: bytes, *, clients: int, each: int) -> int:
    """Send ``each`` requests on each of ``clients`` connections; return how many events came."""

    async def one() -> int:
        client = await connect(port)
        events = 0
        for _ in range(each):
            await client.fetch(request)
            events += client.events
        client.close()
        return events

    return sum(await asyncio.gather(*(one() for _ in range(clients))))
