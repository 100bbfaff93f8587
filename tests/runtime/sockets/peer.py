"""A process of its own for tests: ``worker`` serves and counts, ``caller ADDRESS`` opens one stream and says so."""

import asyncio
import random
import sys

from holdfast.runtime.link import Link
from holdfast.runtime.server import WorkerServer
from holdfast.runtime.streams import IncomingCall, TokenItem
from holdfast.runtime.transport import TcpTransport
from holdfast.wire.frames import OpenHeaders
from tests.wire.pairs import Sink


async def worker() -> None:
    server, calls = WorkerServer("w1", 1, rng=random.Random(1)), dict[IncomingCall, int]()

    def serve(call: IncomingCall) -> None:
        call.accept()
        calls[call] = 0
        call.on_stop = lambda _: calls.pop(call, None) and None

    server.register("count", serve)
    print(await server.start(), flush=True)
    while True:
        await asyncio.sleep(0.005)
        for call, index in list(calls.items()):
            call.connection.send_items([TokenItem(call, index, [index])])
            calls[call] = index + 1


async def caller(address: str) -> None:
    link = Link(TcpTransport(), address, caller="peer", rng=random.Random(2), keepalive=0.1)
    lost = asyncio.Event()
    link.on_lost = lambda error: lost.set()
    await link.connect(5.0)
    link.open("hold", OpenHeaders(), b"", Sink())
    print("open", flush=True)
    await lost.wait()
    print("lost", flush=True)


if __name__ == "__main__":
    asyncio.run(worker() if sys.argv[1] == "worker" else caller(sys.argv[2]))
