"""Links and servers on a simulated network and clock: faults at random moments, replayable from the seed."""

import asyncio
import random
from collections.abc import Callable
from typing import Any

import pytest

from holdfast.base.errors import HoldfastError, PeerSilent
from holdfast.runtime.call import Call
from holdfast.runtime.link import Link
from holdfast.runtime.server import WorkerServer
from holdfast.runtime.streams import TokenItem
from holdfast.wire.frames import OpenHeaders
from tests.runtime.memory_network import MemoryNetwork
from tests.runtime.virtual_time import run
from tests.wire.pairs import Sink

HEADERS = OpenHeaders(request_id="r")


class World:
    """One worker that generates, three callers that come and go."""

    def __init__(self, seed: int):
        self.rng = random.Random(seed)
        self.network = MemoryNetwork(seed)
        self.server = WorkerServer("w1", 77, rng=self.rng, transport=self.network, secret=b"s" if seed % 2 else b"")
        self.secret = b"s" if seed % 2 else b""
        self.server.register("generate", self.generate)
        self.progress: dict[Call, list[int]] = {}
        self.links: list[Link] = []
        self.sinks: list[tuple[Sink, int]] = []
        self.handles: dict[int, Any] = {}
        self.trace: list[tuple[float, str]] = []

    def note(self, what: str) -> None:
        self.trace.append((round(asyncio.get_running_loop().time(), 6), what))

    def generate(self, call: Call) -> None:
        def stopped(reason: str) -> None:
            self.note(f"stop {call.connection.caller} {call.stream} {reason}")
            self.progress.pop(call, None)
            call.end("cancelled")

        call.on_stop = stopped
        call.accept()
        first = int(call.payload[:4].decode())
        self.progress[call] = [first, first + self.rng.randint(1, 200)]

    def step(self) -> None:
        """One engine step: a token for most running streams, one frame per connection."""
        batches: dict[int, list[TokenItem]] = {}
        for call, state in self.progress.items():
            if self.rng.random() < 0.9 and state[0] < state[1]:
                batches.setdefault(id(call.connection), []).append(TokenItem(call, state[0], [state[0] * 3 % 1000]))
                state[0] += 1
        for items in batches.values():
            items[0].call.connection.send_items(items)
        for call, state in list(self.progress.items()):
            if state[0] == state[1]:
                del self.progress[call]
                call.end("stop")

    async def connect(self) -> None:
        link = Link(self.network, self.server.address, caller="c", rng=self.rng, secret=self.secret)
        link.on_lost = lambda error: self.note(f"lost {error.code}")
        try:
            await link.connect(2.0)
        except HoldfastError as error:
            self.note(f"no connection: {error.code}")
        else:
            self.links.append(link)

    def open(self) -> None:
        link = self.rng.choice(self.links)
        first = self.rng.choice([0, 0, 50])
        sink = Sink()
        payload = f"{first:04}".encode() + bytes(self.rng.choice([10, 10, 10, 100_000, 400_000]))
        try:
            handle = link.open("generate", HEADERS, payload, sink, credit=self.rng.choice([0, 20]), first_index=first)
        except HoldfastError as error:
            self.note(f"open: {error.code}")
            return
        self.handles[len(self.sinks)] = handle
        self.sinks.append((sink, first))

    def touch(self) -> None:
        number = self.rng.choice(list(self.handles))
        action = self.rng.choice(["credit", "credit", "credit", "stop", "kill"])
        if action == "credit":
            self.handles[number].credit(50)
        else:
            getattr(self.handles.pop(number), action)()
            self.note(f"{action} {number}")

    def fault(self) -> None:
        kind = self.rng.choice(["cut", "cut", "abandon", "hole"])
        self.note(kind)
        live = [stream for stream in self.network.streams if stream.open]
        if kind == "cut" and live:
            self.rng.choice(live).cut()
        elif kind == "abandon":
            self.rng.choice(self.links).abandon(PeerSilent("test"))
        elif kind == "hole":
            self.network.black_hole = True
            asyncio.get_running_loop().call_later(self.rng.uniform(0.1, 9.0), self.heal)

    def heal(self) -> None:
        """What travelled through a black hole is lost, so its connections must be cut, as TCP would in the end."""
        self.network.black_hole = False
        for stream in self.network.streams:
            if stream.open:
                stream.cut()

    async def live(self) -> None:
        await self.server.start()
        actions: list[Callable[[], None]] = [self.step] * 30 + [self.open] * 4 + [self.touch] * 3
        for turn in range(1500):
            self.links = [link for link in self.links if link.connected]
            if len(self.links) < 3:
                await self.connect()
            if self.links and (self.handles or turn < 5):
                action = self.fault if self.rng.random() < 0.004 else self.rng.choice(actions)
                if action != self.touch or self.handles:
                    action()
            elif self.links:
                self.open()
            await asyncio.sleep(self.rng.uniform(0.0, 0.01))

    async def rest(self) -> None:
        """Faults cease: everything must come to its end."""
        self.heal()
        for _ in range(300):
            for handle in self.handles.values():
                handle.credit(1000)
            self.step()
            await asyncio.sleep(0.01)
        for link in self.links:
            await link.close()
        await asyncio.sleep(8.0)

    def check(self) -> None:
        assert self.server.open_streams == 0
        assert self.progress == {}, "every call was stopped or ended"
        assert not self.server.connections
        for number, (sink, first) in enumerate(self.sinks):
            assert sink.tokens == [(first + n) * 3 % 1000 for n in range(len(sink.tokens))]
            assert sink.final is not None or number not in self.handles, "an end, unless we killed it"
        for session in self.server._sessions.values():
            assert session.uploads.held_bytes == 0


def lived(seed: int) -> World:
    world = World(seed)

    async def scenario() -> None:
        await world.live()
        await world.rest()
        await world.server.close()

    run(scenario)
    return world


@pytest.mark.parametrize("seed", range(30))
def test_whatever_happens_streams_are_true_and_everything_ends(seed: int) -> None:
    world = lived(seed)
    world.check()
    assert sum(sink.final == "end:stop" for sink, _ in world.sinks) > 0


def test_the_same_seed_gives_the_same_life() -> None:
    first, second = lived(7), lived(7)
    assert first.trace == second.trace
    assert [sink.calls for sink, _ in first.sinks] == [sink.calls for sink, _ in second.sinks]
