"""Where the two legs of the mock engine's rendezvous style meet: a small server at the prefill worker.

A decode leg connects and names its room; it hears one line when the prefill leg of that room has computed its prompt.
A connection that breaks first means that the blocks are lost. The simulation has an exchange of its own.

Must never carry blocks: there are none.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Callable
from typing import Protocol

ROOMS = 4096
"""Rooms that are remembered; the oldest are forgotten first."""
WAIT_SECONDS = 300.0
"""How long a decode leg waits for its prefill leg, as SGLang does."""
_READY = b"ready\n"


class Exchange(Protocol):
    """How legs find each other."""

    async def open(self) -> str:
        """Begin to be found; returns ``host:port``."""

    def offer(self, room: int) -> None:
        """The prompt of that room is computed."""

    def meet(self, address: str, room: int, done: Callable[[bool], None]) -> Callable[[], None]:
        """Call back when the prompt of a room at that address is computed, or lost (False); returns the way out."""

    async def close(self) -> None:
        """Be found no more; whoever waits is told that it is lost."""


class TcpExchange:
    """Over loopback TCP; see `Exchange`."""

    def __init__(self) -> None:
        self._server: asyncio.Server | None = None
        self._rooms: OrderedDict[int, asyncio.Event] = OrderedDict()
        self._tasks: set[asyncio.Task[None]] = set()

    async def open(self) -> str:
        """See `Exchange`."""
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        host, port = self._server.sockets[0].getsockname()[:2]
        return f"{host}:{port}"

    def offer(self, room: int) -> None:
        """See `Exchange`."""
        self._room(room).set()

    def meet(self, address: str, room: int, done: Callable[[bool], None]) -> Callable[[], None]:
        """See `Exchange`."""
        task = asyncio.get_running_loop().create_task(self._ask(address, room, done), name=f"room-{room}")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task.cancel  # type: ignore[return-value]  # nobody wants to know whether it was over

    async def close(self) -> None:
        """See `Exchange`."""
        if self._server is not None:
            self._server.close()
        for task in list(self._tasks):
            task.cancel()
        if self._tasks:
            await asyncio.wait(list(self._tasks))

    def _room(self, room: int) -> asyncio.Event:
        found = self._rooms.get(room)
        if found is None:
            found = self._rooms[room] = asyncio.Event()
            if len(self._rooms) > ROOMS:
                self._rooms.popitem(last=False)
        return found

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            async with asyncio.timeout(WAIT_SECONDS):
                room = int(await reader.readline())
                await self._room(room).wait()
                writer.write(_READY)
                await writer.drain()
        except (TimeoutError, ValueError, OSError):
            pass  # the other side reads an end instead of the word
        except asyncio.CancelledError:
            return  # closing: the streams' own callback would log it
        finally:
            self._tasks.discard(task)
            writer.close()

    async def _ask(self, address: str, room: int, done: Callable[[bool], None]) -> None:
        host, _, port = address.rpartition(":")
        ready = False
        try:
            async with asyncio.timeout(WAIT_SECONDS):
                reader, writer = await asyncio.open_connection(host, int(port))
                try:
                    writer.write(b"%d\n" % room)
                    ready = await reader.readline() == _READY
                finally:
                    writer.close()
        except (TimeoutError, ValueError, OSError):
            ready = False
        done(ready)
