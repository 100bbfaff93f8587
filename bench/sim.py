"""What a callback costs in a simulated universe: the bare loop, and production's wire and runtime on it.

python -m bench.sim [--streams 50] [--tokens 1000] [--json]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import time
from collections.abc import Callable, Sequence
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

STEP = 0.01
PORT = 9000


class Count:
    """A caller's stream that only counts."""

    def __init__(self) -> None:
        self.tokens = 0
        self.over = False

    def on_accept(self) -> None:
        pass

    def on_tokens(self, index: int, tokens: Sequence[int], logprobs: Any) -> None:
        del index, logprobs
        self.tokens += len(tokens)

    def on_data(self, index: int, payload: bytes) -> None:
        pass

    def on_end(self, *_: object) -> None:
        self.over = True

    def on_refused(self, error: HoldfastError) -> None:
        raise error

    def on_broken(self, error: HoldfastError) -> None:
        raise error


async def work(world: World, host: Host, tokens: int) -> None:
    """Serve an endpoint that gives every stream a token per step."""
    running: dict[Call, int] = {}

    def generate(call: Call) -> None:
        call.accept()
        running[call] = 0

    transport = world.network.transport(host)
    server = WorkerServer("w", 1, rng=host.rng(), transport=transport, secret=b"s")
    server.register("generate", generate)
    await server.start(host.address, PORT)
    while True:
        await asyncio.sleep(STEP)
        batches: dict[Any, list[TokenItem]] = {}
        for call, index in list(running.items()):
            batches.setdefault(call.connection, []).append(TokenItem(call, index, [index]))
            running[call] = index + 1
        for connection, items in batches.items():
            connection.send_items(items)
        for call, index in list(running.items()):
            if index >= tokens:
                del running[call]
                call.end("stop")


async def call_all(world: World, host: Host, address: str, sinks: list[Count], tokens: int) -> None:
    """Open the streams and wait for their ends."""
    link = Link(world.network.transport(host), address, caller="c", rng=host.rng(), secret=b"s")
    await asyncio.sleep(STEP)
    await link.connect(2.0)
    for sink in sinks:
        link.open("generate", OpenHeaders(request_id="r"), b"x", sink, credit=tokens + 1)
    while not all(sink.over for sink in sinks):  # noqa: ASYNC110  what is measured has no event for all of it
        await asyncio.sleep(0.5)
    await link.close()


def measured(name: str, prepare: Callable[[World], Callable[[], bool] | None]) -> dict[str, float | str]:
    """Run one universe and say what it cost in CPU time."""
    world = World(Tape(1))
    until = prepare(world)
    begun = time.process_time()
    world.run(until)
    seconds = time.process_time() - begun
    callbacks, virtual = world.loop.callbacks, world.now()
    world.close()
    return {
        "what": name,
        "callbacks": callbacks,
        "microseconds per callback": round(seconds / callbacks * 1e6, 2),
        "callbacks per CPU-second": round(callbacks / seconds),
        "virtual seconds per CPU-second": round(virtual / seconds, 1),
    }


def bare_callbacks(world: World) -> None:
    """Ten hosts that do nothing but schedule themselves."""

    def chain(left: int) -> None:
        if left:
            world.loop.call_soon(chain, left - 1)

    for number in range(10):
        world.boot(f"h{number}").post(chain, 18_000)


def bare_sleeps(world: World) -> None:
    """Ten hosts with five tasks each that sleep."""

    async def sleeper() -> None:
        for number in range(2_000):
            await asyncio.sleep(0.01 + number * 1e-6)

    for number in range(10):
        host = world.boot(f"h{number}")
        for _ in range(5):
            host.spawn(sleeper(), "sleeper")


def links(streams: int, tokens: int) -> Callable[[World], Callable[[], bool]]:
    """Ten workers, each with two callers that share the streams."""

    def prepare(world: World) -> Callable[[], bool]:
        tasks = []
        for number in range(10):
            worker = world.boot(f"w{number}")
            worker.spawn(work(world, worker, tokens), "work")
            for side in "ab":
                host = world.boot(f"c{number}{side}")
                sinks = [Count() for _ in range(max(1, streams // 20))]
                calling = call_all(world, host, f"{worker.address}:{PORT}", sinks, tokens)
                tasks.append(host.spawn(calling, "call"))
        return lambda: all(task.done() for task in tasks)

    return prepare


def main() -> None:
    """Measure and print."""
    ensure_hash_seed()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--streams", type=int, default=50)
    parser.add_argument("--tokens", type=int, default=1000)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    rows = [
        measured("bare loop: call_soon", bare_callbacks),
        measured("bare loop: tasks that sleep", bare_sleeps),
        measured("wire and runtime: 10 workers", links(arguments.streams, arguments.tokens)),
    ]
    if arguments.json:
        print(json.dumps(rows, indent=1))
        return
    for row in rows:
        print(f"{row['what']:32}", *(f"{value:>10} {name}" for name, value in row.items() if name != "what"), sep="  ")


if __name__ == "__main__":
    main()
