"""A worker process without an engine: counts tokens every 10 ms; driven by test_pool_processes.py through signals."""

import asyncio
import os
import random
import signal
import sys
import time

from holdfast.base.ids import Epoch, InstanceId
from holdfast.models.card import Artifact, ModelCard
from holdfast.runtime.discovery.contract import InstanceRecord
from holdfast.runtime.discovery.factory import open_discovery
from holdfast.runtime.server import WorkerServer
from holdfast.runtime.streams import TokenItem
from holdfast.wire.frames import Load, Progress

TTL = 3.0


class Counter:
    """One stream per call; token n is n. SIGUSR1 hangs the engine, SIGUSR2 heals it, SIGHUP makes the loop slow."""

    def __init__(self) -> None:
        self.calls = {}
        self.steps = 0
        self.hung = False
        self.slow = False

    def start(self, call) -> None:
        call.accept()
        self.calls[call] = int.from_bytes(call.payload, "little")
        call.on_stop = lambda _reason: self.calls.pop(call, None)

    def step(self) -> None:
        if self.hung or not self.calls:
            return
        self.steps += 1
        by_connection = {}
        for call, index in list(self.calls.items()):
            by_connection.setdefault(call.connection, []).append(TokenItem(call, index, [index]))
            self.calls[call] = index + 1
        for connection, items in by_connection.items():
            connection.send_items(items)

    def pong(self):
        phase = "decode" if self.calls else "idle"
        progress = Progress(self.steps, self.steps, 0, phase, 0.01, len(self.calls))
        return progress, Load(running=len(self.calls)), "ready"


async def main(root: str, instance: str) -> None:
    rng = random.Random()
    epoch = Epoch(rng.getrandbits(64))
    engine = Counter()
    server = WorkerServer(instance, epoch, rng=rng)
    server.register("generate", engine.start)
    server.set_pong_source(engine.pong)
    address = await server.start()
    discovery = open_discovery("file", root=root, ttl=TTL)
    await discovery.start()
    card = ModelCard("m", Artifact("t" * 64, 1), Artifact("p" * 64, 1), 4096, (2,), 100, 16, progress="step")
    record = InstanceRecord(
        "dynamo", "backend", ("generate",), InstanceId(instance), epoch, address, os.getpid(), cards=(card,)
    )
    loop = asyncio.get_running_loop()
    stopping = asyncio.Event()
    loop.add_signal_handler(signal.SIGTERM, stopping.set)
    loop.add_signal_handler(signal.SIGUSR1, lambda: setattr(engine, "hung", True))
    loop.add_signal_handler(signal.SIGUSR2, lambda: setattr(engine, "hung", False))
    loop.add_signal_handler(signal.SIGHUP, lambda: setattr(engine, "slow", True))
    await discovery.publish(record)
    print("up", flush=True)
    while not stopping.is_set():
        engine.step()
        if engine.slow:
            time.sleep(0.9)  # noqa: ASYNC251  the loop is to be slow
        await asyncio.sleep(0.01)
    server.drain("shutdown", 1000)
    await discovery.close()
    await server.close()


asyncio.run(main(*sys.argv[1:]))
