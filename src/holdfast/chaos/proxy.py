"""A TCP proxy in front of one worker that can be a bad network: latency, jitter, bandwidth, partitions, resets.

A worker that advertises the proxy's address has all its callers behind it. Each connection belongs to a *peer* (whoever
opened it), and what goes wrong is said per peer: between this worker and that frontend nothing passes, while the others
go on. A partition holds bytes, ends of streams and resets until it is healed, as a network does that loses packets;
only the handshake of TCP itself cannot be held here (`namespaces` can).

Must never look into the bytes, never drop or reorder any, and never hold more than `HELD_BYTES` of one direction.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import socket
from collections import deque
from collections.abc import Callable
from typing import Literal

Direction = Literal["in", "out"]
"""``in``: to the worker; ``out``: from it."""

HELD_BYTES = 4 * 1024 * 1024
"""Bytes of one direction of one connection that may be on their way; then the sender has to wait."""
_READ = 64 * 1024
_CONNECT_SECONDS = 5.0


class Line:
    """One direction between the worker and one peer, for all their connections."""

    def __init__(self) -> None:
        self.delay = 0.0
        """Seconds that every byte takes longer."""
        self.jitter = 0.0
        """Up to so many seconds more; bytes of a connection stay in order."""
        self.rate = 0.0
        """Bytes a second of each connection; 0: no bound."""
        self._held = False
        self.passable = asyncio.Event()
        self.passable.set()

    @property
    def held(self) -> bool:
        """Whether nothing passes."""
        return self._held

    @held.setter
    def held(self, value: bool) -> None:
        self._held = value
        if value:
            self.passable.clear()
        else:
            self.passable.set()


class Proxy:
    """See the module. `start`, and `close` in the end.

    Args:
        target: ``(host, port)`` of the worker.
        peer_of: names the peer of a new connection by its ``(host, port)``; empty for one that nobody knows.
        rng: for the jitter.
    """

    def __init__(self, target: tuple[str, int], peer_of: Callable[[tuple[str, int]], str], rng: random.Random):
        self._target, self._peer_of, self._rng = target, peer_of, rng
        self._lines: dict[tuple[str, Direction], Line] = {}
        self._server: asyncio.Server | None = None
        self._bound: tuple[str, int] = ("", 0)
        self._connections: dict[asyncio.Task[None], _Connection] = {}

    async def start(self, host: str = "127.0.0.1", port: int = 0) -> str:
        """Listen; returns ``host:port``. Raises OSError when the port is taken."""
        self._server = await asyncio.start_server(self._accept, host, port)
        self._bound = self._server.sockets[0].getsockname()[:2]
        return f"{self._bound[0]}:{self._bound[1]}"

    async def close(self) -> None:
        """Stop listening and reset every connection."""
        self.deafen()
        for task in list(self._connections):
            task.cancel()
        if self._connections:
            await asyncio.wait(list(self._connections))

    def deafen(self) -> None:
        """Refuse new connections, as a machine does on which the worker does not run."""
        server, self._server = self._server, None
        if server is not None:
            server.close()

    async def listen(self) -> None:
        """Accept again, on the same address. Raises OSError when somebody else has it now."""
        if self._server is None:
            await self.start(*self._bound)

    def line(self, peer: str, direction: Direction) -> Line:
        """Return a direction between worker and peer, to be slowed down or held."""
        return self._lines.setdefault((peer, direction), Line())

    def partition(self, peer: str, directions: tuple[Direction, ...] = ("in", "out")) -> None:
        """Let nothing pass between worker and peer, in these directions."""
        for direction in directions:
            self.line(peer, direction).held = True

    def heal(self, peer: str, directions: tuple[Direction, ...] = ("in", "out")) -> None:
        """Let everything pass again, first what was held."""
        for direction in directions:
            self.line(peer, direction).held = False

    def delay(self, peer: str, seconds: float, jitter: float = 0.0) -> None:
        """Let everything take longer, both ways; 0 ends it."""
        directions: tuple[Direction, Direction] = ("in", "out")
        for direction in directions:
            line = self.line(peer, direction)
            line.delay, line.jitter = seconds, jitter

    def reset(self, peer: str | None = None) -> int:
        """Reset the connections of a peer (None: all), on both sides; returns how many there were."""
        hit = [c for c in self._connections.values() if peer is None or c.peer == peer]
        for connection in hit:
            connection.abort()
        return len(hit)

    def connections(self, peer: str) -> int:
        """Return how many connections a peer has."""
        return sum(1 for connection in self._connections.values() if connection.peer == peer)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        peer = self._peer_of(writer.get_extra_info("peername")[:2])
        connection = self._connections[task] = _Connection(peer, reader, writer)
        try:
            await connection.run(self._target, self.line(peer, "in"), self.line(peer, "out"), self._rng)
        except asyncio.CancelledError:
            if not connection.aborted.is_set():
                connection.abort()
        finally:
            del self._connections[task]


class _Connection:
    """A caller's connection and its counterpart to the worker."""

    def __init__(self, peer: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter):
        self.peer = peer
        self._reader, self._writer = reader, writer
        self._far: asyncio.StreamWriter | None = None
        self.aborted = asyncio.Event()

    def abort(self) -> None:
        """Reset both sides, now."""
        self.aborted.set()
        for writer in (self._writer, self._far):
            if writer is not None:
                reset(writer)

    async def run(self, target: tuple[str, int], inward: Line, outward: Line, rng: random.Random) -> None:
        """Pass bytes until both directions have ended, or one side was reset."""
        await inward.passable.wait()
        try:
            far_reader, far = await asyncio.wait_for(asyncio.open_connection(*target), _CONNECT_SECONDS)
        except (OSError, TimeoutError):
            self.abort()
            return
        self._far = far
        pumps = [
            Pump(self._reader, far, inward, rng),
            Pump(far_reader, self._writer, outward, rng),
        ]
        try:
            async with asyncio.TaskGroup() as tasks:
                watch = tasks.create_task(self.aborted.wait())
                running = [tasks.create_task(pump.run(self.abort)) for pump in pumps]
                both = tasks.create_task(_both(running))
                await asyncio.wait({watch, both}, return_when=asyncio.FIRST_COMPLETED)
                for task in (watch, both, *running):
                    task.cancel()
        finally:
            for writer in (self._writer, far):
                writer.close()


async def _both(tasks: list[asyncio.Task[None]]) -> None:
    await asyncio.wait(tasks)


class Pump:
    """Passes one direction of one connection on, in order, as late as its line says.

    Args:
        reader: where bytes come from.
        writer: where they go.
        line: what the network is like.
        rng: for the jitter.
    """

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, line: Line, rng: random.Random):
        self._reader, self._writer, self._line, self._rng = reader, writer, line, rng
        self._queue: deque[tuple[float, bytes]] = deque()
        self._bytes = 0
        self._came = asyncio.Event()
        self._room = asyncio.Event()
        self._last = 0.0

    async def run(self, abort: Callable[[], None]) -> None:
        """Pass everything on; ``abort`` is called when a side was reset, not before the bytes that came earlier."""
        async with asyncio.TaskGroup() as tasks:
            taking = tasks.create_task(self._take())
            await self._give(taking)
            taking.cancel()
        if not taking.cancelled() and taking.result():
            abort()

    async def _take(self) -> bool:
        """Read to the end; returns whether that was a reset."""
        loop = asyncio.get_running_loop()
        broken = False
        try:
            while data := await self._reader.read(_READ):
                late = self._line.delay + self._rng.uniform(0.0, self._line.jitter)
                self._last = max(self._last, loop.time() + late)
                self._queue.append((self._last, data))
                self._bytes += len(data)
                self._came.set()
                while self._bytes > HELD_BYTES:
                    self._room.clear()
                    await self._room.wait()
        except OSError:
            broken = True
        self._queue.append((self._last, b""))
        self._came.set()
        return broken

    async def _give(self, taking: asyncio.Task[bool]) -> None:
        loop = asyncio.get_running_loop()
        while True:
            while not self._queue:
                self._came.clear()
                await self._came.wait()
            at, data = self._queue[0]
            await asyncio.sleep(max(0.0, at - loop.time()))
            await self._line.passable.wait()
            self._queue.popleft()
            self._bytes -= len(data)
            self._room.set()
            if not data:
                await asyncio.wait([taking])
                if not taking.result():
                    with contextlib.suppress(OSError):
                        self._writer.write_eof()
                return
            try:
                self._writer.write(data)
                await self._writer.drain()
            except OSError:
                return  # the other direction learns of it too, and says how
            if self._line.rate:
                await asyncio.sleep(len(data) / self._line.rate)


def reset(writer: asyncio.StreamWriter) -> None:
    """Close a connection with a reset instead of an orderly end."""
    sock = writer.get_extra_info("socket")
    if sock is not None:
        with contextlib.suppress(OSError):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\0\0\0\0\0\0\0")
    writer.transport.abort()
