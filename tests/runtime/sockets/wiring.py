"""A worker server and links to it on real sockets, taken down after each test; waiting with deadlines."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from typing import Any

from holdfast.runtime.call import Call
from holdfast.runtime.link import Link
from holdfast.runtime.server import ServerSettings, WorkerServer
from holdfast.runtime.streams import IncomingCall
from holdfast.runtime.transport import TcpTransport, Transport

DEADLINE = 10.0


async def until(condition: Callable[[], Any], what: str = "the condition", deadline: float = DEADLINE) -> None:
    loop = asyncio.get_running_loop()
    end = loop.time() + deadline
    while not condition():
        assert loop.time() < end, f"{what} did not come about within {deadline} s"
        await asyncio.sleep(0.002)


class Site:
    """One worker and the links to it."""

    def __init__(self, **server: Any):
        self.rng = random.Random(5)
        self.calls: list[Call] = []
        self.stops: list[tuple[int, str]] = []
        self.links: list[Link] = []
        self.transport: Transport = server.pop("transport", TcpTransport())
        server.setdefault("settings", ServerSettings(silence_bound=30.0))
        self.server = WorkerServer("w1", 77, rng=self.rng, transport=self.transport, **server)
        self.server.register("hold", self.hold)

    def hold(self, call: IncomingCall) -> None:
        """An endpoint that accepts and leaves the rest to the test."""
        assert isinstance(call, Call)
        self.calls.append(call)
        call.on_stop = lambda reason: self.stops.append((call.stream, reason))
        call.accept()

    async def link(self, **more: Any) -> Link:
        link = Link(self.transport, self.server.address, caller="test", rng=self.rng, **more)
        self.links.append(link)
        await link.connect(5.0)
        return link

    async def __aenter__(self) -> Site:
        await self.server.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        for link in self.links:
            await link.close()
        await self.server.close()
        await until(lambda: not self.server._connections, "closing")
