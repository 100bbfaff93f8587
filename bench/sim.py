"""What a callback costs in simulation: the bare loop, production's wire and runtime on it, whole universes.

python -m bench.sim [--streams 50] [--tokens 1000] [--universes 30] [--repeat 3] [--json]

Processor time of this process, not wall time; the best of the repetitions, which take turns, so that what else runs on
the machine hits all rows alike. The last column is the ratio to the bare loop of the same repetition.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from holdfast.base.errors import HoldfastError
from holdfast.runtime.call import Call
from holdfast.runtime.link import Link
from holdfast.runtime.server import WorkerServer
from holdfast.runtime.streams import TokenItem
from holdfast.sim.guard import ensure_hash_seed
from holdfast.sim.hosts import Host
from holdfast.sim.plan import Plan, Shape
from holdfast.sim.tape import Tape
from holdfast.sim.universe import Outcome, run_universe
from holdfast.sim.workload import MODEL, Wish
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


class Cost(NamedTuple):
    """Of one repetition."""

    seconds: float
    """Of a processor."""
    callbacks: int
    virtual: float


def part(prepare: Callable[[World], Callable[[], bool] | None]) -> Cost:
    """Run one universe and say what it cost, without building and dropping it."""
    world = World(Tape(1))
    until = prepare(world)
    begun = time.process_time()
    world.run(until)
    seconds = time.process_time() - begun
    callbacks, virtual = world.loop.callbacks, world.now()
    world.close()
    return Cost(seconds, callbacks, virtual)


def whole(universes: Callable[[], Iterable[Outcome]]) -> Cost:
    """Run universes from their plans to their verdicts, building, oracles and dropping included."""
    begun = time.process_time()
    callbacks, virtual = 0, 0.0
    for outcome in universes():
        if outcome.violations:
            raise SystemExit(f"seed {outcome.seed}: {outcome.violations[0]}")
        callbacks += outcome.callbacks
        virtual += outcome.seconds
    return Cost(time.process_time() - begun, callbacks, virtual)


def row(name: str, costs: list[Cost], bare: list[Cost]) -> dict[str, float | str]:
    """Return the best repetition as a row of the table."""
    best = min(costs, key=lambda cost: cost.seconds)
    ratio = min(
        (cost.seconds / cost.callbacks) / (base.seconds / base.callbacks)
        for cost, base in zip(costs, bare, strict=True)
    )
    return {
        "what": name,
        "callbacks": best.callbacks,
        "microseconds per callback": round(best.seconds / best.callbacks * 1e6, 2),
        "callbacks per CPU-second": round(best.callbacks / best.seconds),
        "virtual seconds per CPU-second": round(best.virtual / best.seconds, 1),
        "times the bare loop": round(ratio, 1),
    }


def steady(workers: int, number: int, tokens: int) -> Plan:
    """So many streams over so many workers, nothing goes wrong."""
    wishes = []
    for i in range(number):
        messages = [{"role": "user", "content": f"stream {i}"}]
        body = {"model": MODEL, "messages": messages, "max_tokens": tokens, "seed": 1 + i, "stream": True}
        wishes.append(Wish(f"r{i:03d}", 0.01 * i, i % 2, body=body))
    return Plan(Shape(workers=workers, span=tokens * 0.025), "mixed", tuple(wishes), ())


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
    parser.add_argument("--universes", type=int, default=30)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    seeds = range(2_000, 2_000 + arguments.universes)
    run_universe(0)  # reads the model's files, once per process
    work: dict[str, Callable[[], Cost]] = {
        "bare loop: call_soon": lambda: part(bare_callbacks),
        "bare loop: tasks that sleep": lambda: part(bare_sleeps),
        "wire and runtime: 10 workers": lambda: part(links(arguments.streams, arguments.tokens)),
        "whole: 10 workers, 50 streams": lambda: whole(lambda: [run_universe(1, plan=steady(10, 50, 400))]),
        f"whole: {arguments.universes} of default size": lambda: whole(lambda: (run_universe(seed) for seed in seeds)),
    }
    costs: dict[str, list[Cost]] = {name: [] for name in work}
    for _ in range(arguments.repeat):
        for name, measure in work.items():
            costs[name].append(measure())
    rows = [row(name, each, costs["bare loop: call_soon"]) for name, each in costs.items()]
    if arguments.json:
        print(json.dumps(rows, indent=1))
        return
    for one in rows:
        print(f"{one['what']:32}", *(f"{value:>10} {name}" for name, value in one.items() if name != "what"), sep="  ")


if __name__ == "__main__":
    main()
