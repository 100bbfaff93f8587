"""Production's wire and runtime in a universe: one worker's server, callers with many streams, and faults.

Run as a program with a seed it prints the digest of that universe.
"""

from __future__ import annotations

import asyncio
import sys
from typing import Any

from holdfast.base.errors import HoldfastError
from holdfast.runtime.call import Call
from holdfast.runtime.link import Link
from holdfast.runtime.server import WorkerServer
from holdfast.runtime.streams import TokenItem
from holdfast.sim.guard import ensure_hash_seed
from holdfast.sim.hosts import Host
from holdfast.sim.tape import Tape
from holdfast.sim.world import World
from holdfast.wire.frames import OpenHeaders

PORT = 9000
TOKENS = 120
STEP = 0.01
SECRET = b"s"


class Worker:
    """A server whose endpoint counts, one step every ten milliseconds."""

    def __init__(self, world: World):
        self.host = world.boot("worker")
        self.server = WorkerServer(
            "w1",
            self.host.incarnation,
            rng=self.host.rng("server"),
            transport=world.network.transport(self.host),
            secret=SECRET,
        )
        self.server.register("generate", self.generate)
        self.running: dict[Call, int] = {}
        self.host.spawn(self.run(), "worker")

    def generate(self, call: Call) -> None:
        def stopped(_: str) -> None:
            self.running.pop(call, None)
            call.end("cancelled")

        call.on_stop = stopped
        call.accept()
        self.running[call] = 0

    async def run(self) -> None:
        await self.server.start(self.host.address, PORT)
        while True:
            await asyncio.sleep(STEP)
            self.step()

    def step(self) -> None:
        batches: dict[Any, list[TokenItem]] = {}
        for call, index in self.running.items():
            batches.setdefault(call.connection, []).append(TokenItem(call, index, [index]))
            self.running[call] = index + 1
        for connection, items in batches.items():
            connection.send_items(items)
        for call in [call for call, index in self.running.items() if index == TOKENS]:
            del self.running[call]
            call.end("stop")


class Stream:
    """A caller's side of one stream."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.final = ""
        self.arrivals: list[float] = []

    def on_accept(self) -> None:
        pass

    def on_tokens(self, index: int, tokens: Any, logprobs: Any) -> None:
        del logprobs
        assert index == len(self.tokens)
        self.tokens += tokens
        self.arrivals.append(asyncio.get_running_loop().time())

    def on_data(self, index: int, payload: bytes) -> None:
        raise AssertionError((index, payload))

    def on_end(self, finish: str, *_: object) -> None:
        self.final = f"end:{finish}"

    def on_refused(self, error: HoldfastError) -> None:
        self.final = f"refused:{error.code}"

    def on_broken(self, error: HoldfastError) -> None:
        self.final = f"broken:{error.code}"


class Caller:
    """A host that connects, again when it has to, and opens streams."""

    def __init__(self, world: World, name: str, address: str, streams: int):
        self.host: Host = world.boot(name)
        self.transport = world.network.transport(self.host)
        self.address = address
        self.wanted = streams
        self.streams: list[Stream] = []
        self.lost: list[str] = []
        self.task = self.host.spawn(self.run(), "caller")

    async def run(self) -> None:
        rng = self.host.rng("caller")
        while len(self.streams) < self.wanted:
            link = Link(self.transport, self.address, caller="c", rng=rng, secret=SECRET)
            link.on_lost = lambda error: self.lost.append(error.code)
            try:
                await link.connect(2.0)
                while link.connected and len(self.streams) < self.wanted:
                    stream = Stream()
                    payload = b"x" * rng.choice([10, 10, 10, 100_000])
                    headers = OpenHeaders(request_id=str(len(self.streams)))
                    link.open("generate", headers, payload, stream, credit=TOKENS + 1)
                    self.streams.append(stream)
                    await asyncio.sleep(rng.expovariate(1 / 0.02))
                while link.connected and any(not stream.final for stream in self.streams):  # noqa: ASYNC110
                    await asyncio.sleep(0.05)
            except HoldfastError as error:
                self.lost.append(error.code)
                await asyncio.sleep(0.1)
            await link.close()


class Serving:
    """A worker and some callers."""

    def __init__(self, world: World, callers: int = 2, streams: int = 25):
        self.world = world
        self.worker = Worker(world)
        address = f"{self.worker.host.address}:{PORT}"
        self.callers = [Caller(world, f"caller{number}", address, streams) for number in range(callers)]

    @property
    def streams(self) -> list[Stream]:
        return [stream for caller in self.callers for stream in caller.streams]

    @property
    def over(self) -> bool:
        return all(caller.task.done() for caller in self.callers)

    def check(self) -> None:
        for stream in self.streams:
            assert stream.tokens == list(range(len(stream.tokens)))
            assert stream.final
            assert stream.final != "end:stop" or len(stream.tokens) == TOKENS


def life(seed: int) -> tuple[str, list[str], int]:
    """One universe with a freeze, a partition and a reset at moments drawn from the tape."""
    world = World(Tape(seed))
    try:
        serving = Serving(world)

        async def faults() -> None:
            plan = world.tape.plan
            await asyncio.sleep(plan.uniform(0.1, 0.8, "when to freeze"))
            serving.worker.host.freeze()
            await asyncio.sleep(plan.uniform(0.1, 1.0, "for how long"))
            serving.worker.host.thaw()
            await asyncio.sleep(plan.uniform(0.0, 0.3, "until the partition"))
            world.network.partition("worker", "caller0", plan.chance(0.5, "one way"))
            await asyncio.sleep(plan.uniform(0.0, 0.5, "for how long"))
            world.network.heal("worker", "caller0")
            world.network.heal("worker", "caller0")
            await asyncio.sleep(plan.uniform(0.0, 0.2, "until the reset"))
            world.network.reset("worker", "caller1")

        world.spawn(faults(), "faults")
        assert world.run(lambda: serving.over, 60.0)
        serving.check()
        assert world.loop.failures == []
        return world.digest(), [stream.final for stream in serving.streams], world.loop.callbacks
    finally:
        world.close()


if __name__ == "__main__":
    ensure_hash_seed()
    for text in sys.argv[1:]:
        print(life(int(text))[0])
