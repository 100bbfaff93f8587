"""What tests of the simulated world share: a protocol that writes down what happens to it, and connected pairs."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from holdfast.sim.hosts import Host
from holdfast.sim.links import NetworkSettings
from holdfast.sim.tape import Tape
from holdfast.sim.world import World


class Recorder(asyncio.Protocol):
    """Keeps everything, with virtual times."""

    def __init__(self, world: World):
        self.world = world
        self.data = bytearray()
        self.pieces = 0
        self.calls: list[tuple[float, str]] = []
        self.error: Exception | None = None
        self.stream: Any = None

    def _call(self, what: str) -> None:
        self.calls.append((self.world.now(), what))

    @property
    def told(self) -> list[str]:
        return [what for _, what in self.calls]

    def connection_made(self, transport: Any) -> None:
        self.stream = transport
        self._call("made")

    def data_received(self, data: bytes) -> None:
        self.data += data
        self.pieces += 1

    def eof_received(self) -> None:
        self._call("eof")

    def connection_lost(self, exc: Exception | None) -> None:
        self.error = exc
        self._call("lost")

    def pause_writing(self) -> None:
        self._call("pause")

    def resume_writing(self) -> None:
        self._call("resume")


@contextmanager
def universe(seed: int = 1, network: NetworkSettings | None = None, **more: Any) -> Iterator[World]:
    world = World(Tape(seed), network=network, **more)
    try:
        yield world
    finally:
        world.close()


class Pair:
    """Two hosts and a connection between them: ``near`` has called, ``far`` was listening."""

    def __init__(self, world: World, near: Host | None = None, far: Host | None = None, port: int = 9000):
        self.world = world
        self.near_host = near or world.boot("near")
        self.far_host = far or world.boot("far")
        self.near = Recorder(world)
        self.accepted: list[Recorder] = []
        self.port = port

    def _accept(self) -> Recorder:
        self.accepted.append(Recorder(self.world))
        return self.accepted[-1]

    @property
    def far(self) -> Recorder:
        return self.accepted[-1]

    async def listen(self) -> None:
        await self.world.network.transport(self.far_host).listen(self.far_host.address, self.port, self._accept)

    async def dial(self, patience: float = 5.0) -> None:
        transport = self.world.network.transport(self.near_host)
        await transport.connect(f"{self.far_host.address}:{self.port}", lambda: self.near, patience)

    def connect(self) -> Pair:
        done(self.world, self.far_host.spawn(self.listen(), "listen"))
        done(self.world, self.near_host.spawn(self.dial(), "dial"))
        self.world.run(lambda: bool(self.accepted) and bool(self.far.calls), 1.0)
        return self


def done(world: World, task: asyncio.Task[Any], limit: float = 600.0) -> Any:
    """Let the universe go on until a task is over, and return its result."""
    assert world.run(task.done, limit), "the task did not end"
    return task.result()


def passes(world: World, seconds: float) -> None:
    """Let virtual time pass."""
    end = world.loop.now + seconds
    world.run(None, seconds)
    world.loop.now = end  # also when nothing was left to do
