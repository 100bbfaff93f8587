"""A network inside the process: latency, random splits, cuts and black holes, all from one seed."""

from __future__ import annotations

import asyncio
import random
from collections import deque
from typing import Any

from holdfast.base.errors import CannotConnect

HIGH_WATER = 64 * 1024


class MemoryStream:
    """One direction-aware end of a connection (`runtime.transport.ByteStream`)."""

    def __init__(self, network: MemoryNetwork, protocol: asyncio.Protocol):
        self.network = network
        self.protocol = protocol
        self.peer: MemoryStream
        self.open = True
        self.buffered = 0
        self.paused = False
        self.last_arrival = 0.0
        self.travelling: deque[tuple[Any, tuple[Any, ...]]] = deque()

    def write(self, data: bytes | bytearray) -> None:
        if not self.open:
            return
        self.buffered += len(data)
        if not self.paused and self.buffered > HIGH_WATER:
            self.paused = True
            self.protocol.pause_writing()
        rest = bytes(data)
        while rest:
            size = self.network.rng.randint(1, max(1, min(len(rest), 40_000)))
            self._travel(self._deliver, rest[:size])
            rest = rest[size:]

    def _travel(self, callback: Any, *arguments: Any) -> None:
        """Everything arrives in the order it was sent."""
        loop = asyncio.get_running_loop()
        self.last_arrival = max(self.last_arrival, loop.time() + self.network.latency())
        self.travelling.append((callback, arguments))
        loop.call_at(self.last_arrival, self._arrive)

    def _arrive(self) -> None:
        callback, arguments = self.travelling.popleft()
        callback(*arguments)

    def _deliver(self, data: bytes) -> None:
        self.buffered -= len(data)
        if self.paused and self.buffered < HIGH_WATER // 4:
            self.paused = False
            if self.open:
                self.protocol.resume_writing()
        if self.peer.open and not self.network.black_hole:
            self.peer.protocol.data_received(data)

    def close(self) -> None:
        self._end(None)

    def abort(self) -> None:
        self._end(None)

    def cut(self) -> None:
        """The network breaks the connection for both."""
        self._end(ConnectionResetError("cut"))
        self.peer._end(ConnectionResetError("cut"))

    def _end(self, error: Exception | None) -> None:
        if self.open:
            self.open = False
            asyncio.get_running_loop().call_soon(self.protocol.connection_lost, error)
            self._travel(self.peer._end, None)

    def get_write_buffer_size(self) -> int:
        return self.buffered


class MemoryListener:
    def __init__(self, network: MemoryNetwork, address: str):
        self.network, self.address = network, address

    async def close(self) -> None:
        self.network.listeners.pop(self.address, None)


class MemoryNetwork:
    """See the module; implements `runtime.transport.Transport`."""

    authenticates_callers = False

    def __init__(self, seed: int):
        self.rng = random.Random(seed)
        self.listeners: dict[str, Any] = {}
        self.streams: list[MemoryStream] = []
        self.black_hole = False

    def latency(self) -> float:
        return self.rng.uniform(0.0001, 0.004)

    async def listen(self, host: str, port: int, protocol_factory: Any) -> MemoryListener:
        address = f"{host}:{port or 9000 + len(self.listeners)}"
        self.listeners[address] = protocol_factory
        return MemoryListener(self, address)

    async def connect(self, address: str, protocol_factory: Any, timeout: float) -> Any:  # noqa: ASYNC109
        await asyncio.sleep(self.latency())
        if address not in self.listeners:
            raise CannotConnect(f"nobody at {address}")
        ends = [MemoryStream(self, factory()) for factory in (protocol_factory, self.listeners[address])]
        ends[0].peer, ends[1].peer = ends[1], ends[0]
        self.streams += ends
        for end in ends:
            end.protocol.connection_made(end)  # type: ignore[arg-type]
        return ends[0].protocol
