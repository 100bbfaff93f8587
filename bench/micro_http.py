"""What one whole request costs the frontend, without the kernel: from a client's bytes to its answer.

Everything between a client's socket and a worker's is production's, in one process: HTTP, the application, preparing,
the request's life, the wire, telemetry. Only the two transports stand for sockets, and a script stands for the worker;
its time is not counted. Prints CPU microseconds (the least of many rounds), and what does not depend on the
machine's mood: calls and bytecode instructions per request.

python -m bench.micro_http [--rounds 60] [--whole] [--tokens 1] [--one-by-one] [--calls] [--json]
"""
# ruff: noqa: ARG002 - the stand-ins have the signatures of what they stand for

from __future__ import annotations

import argparse
import asyncio
import cProfile
import gc
import itertools
import json
import pstats
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from types import CodeType, FrameType
from typing import Any

import msgspec
import uvicorn
import uvloop

from bench.load import chat
from holdfast.base.ids import Epoch, InstanceId
from holdfast.base.randomness import BlockRandom
from holdfast.engines.mock.config import MockConfig
from holdfast.engines.mock.info import engine_info
from holdfast.engines.mock.vocabulary import vocabulary
from holdfast.frontend.assembly import Assembled
from holdfast.frontend.config import FrontendConfig
from holdfast.frontend.process import GC_THRESHOLDS
from holdfast.frontend.server import make_server
from holdfast.models.store import ArtifactStore
from holdfast.runtime.discovery.contract import InstanceRecord
from holdfast.runtime.discovery.mem import MemDiscovery, MemHub
from holdfast.wire.codec import CALLER_FRAMES, encode
from holdfast.wire.frames import Accept, End, Hello, Items, Load, Open, Ping, Pong, Progress, Welcome
from holdfast.wire.framing import FrameSplitter
from holdfast.worker.card import publish

CLIENTS = 64
SECONDS = 10.0
BY_THE_CLOCK = ("requests/deadlines.py", "frontend/keepalive.py")
"""A few looks a second at all streams; of one that lasts milliseconds nothing that could be counted."""
_payload = msgspec.msgpack.Decoder(dict[str, Any]).decode


class Wire:
    """A transport that keeps what is written; it takes everything at once."""

    def __init__(self) -> None:
        self.out = bytearray()

    def write(self, data: bytes) -> None:
        self.out += data

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return default

    def get_write_buffer_size(self) -> int:
        return 0

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        pass

    def is_closing(self) -> bool:
        return False

    def pause_reading(self) -> None:
        pass

    def resume_reading(self) -> None:
        pass

    def close(self) -> None:
        pass

    def abort(self) -> None:
        pass


class Worker:
    """A worker by script: greets, answers pings, and serves the streams that were opened when it is told to."""

    def __init__(self, record: InstanceRecord):
        self._record = record
        self._wire = Wire()
        self._splitter = FrameSplitter()
        self._protocol: asyncio.Protocol
        self._sequence = 0
        self.opened: list[int] = []

    def connect(self, factory: Callable[[], asyncio.Protocol]) -> asyncio.Protocol:
        """Be connected to."""
        self._protocol = factory()
        self._protocol.connection_made(self._wire)  # type: ignore[arg-type]
        return self._protocol

    def look(self) -> None:
        """Read what was written, and answer what is not work."""
        data, self._wire.out = bytes(self._wire.out), bytearray()
        for payload in self._splitter.feed(data):
            frame = CALLER_FRAMES.read(payload, "script", lenient=False)
            if isinstance(frame, Hello):
                self.say(encode(Welcome(frame.version_max, self._record.instance, self._record.epoch)))
            elif isinstance(frame, Ping):
                self.say(encode(Pong(frame.sequence, Progress(), Load(), max(self.opened, default=0))))
            elif isinstance(frame, Open):
                self.opened.append(frame.stream)

    def say(self, data: bytes | bytearray) -> None:
        """Send bytes, as one read of the frontend's."""
        self._protocol.data_received(bytes(data))

    def frames(self, streams: list[int], tokens: int) -> list[bytes]:
        """Return what it says about these streams: a read that accepts all, one for each step, ends with the last."""
        reads = [b"".join(encode(Accept(stream)) for stream in streams)]
        ids = b"".join(stream.to_bytes(4, "little") for stream in streams)
        for index in range(tokens):
            indices, token = (number.to_bytes(4, "little") * len(streams) for number in (index, 1000 + index % 64))
            reads.append(bytes(encode(Items(ids, indices, b"", token))))
        reads[-1] += b"".join(encode(End(stream, "length")) for stream in streams)
        return reads


class Network:
    """The way to the one worker."""

    authenticates_callers = False

    def __init__(self, worker: Worker):
        self._worker = worker

    async def connect(self, address: str, factory: Any, timeout: float) -> asyncio.Protocol:  # noqa: ASYNC109
        return self._worker.connect(factory)

    async def listen(self, host: str, port: int, factory: Any) -> Any:
        raise AssertionError("a frontend listens to no workers")


class Bench:
    """A frontend with its clients and its worker."""

    def __init__(self, protocols: list[Any], wires: list[Wire], worker: Worker):
        self._clients = list(zip(protocols, wires, strict=True))
        self._worker = worker
        self._words = itertools.count(1 << 20)
        self.spent = 0
        """CPU nanoseconds of the frontend."""
        self.enter: Callable[[], None] = _nothing
        """Called before the frontend's work."""
        self.leave: Callable[[], None] = _nothing
        """Called after it."""

    async def round(self, stream: bool, tokens: int, *, at_once: int) -> None:
        """Serve one request of each client, so many at the same time. Each says something new."""
        for start in range(0, len(self._clients), at_once):
            clients = self._clients[start : start + at_once]
            requests = [chat(tokens, stream=stream, text=f"hi {next(self._words):x}") for _ in clients]
            await self._serve(clients, requests, tokens)

    async def _serve(self, clients: list[tuple[Any, Wire]], requests: list[bytes], tokens: int) -> None:
        worker = self._worker
        worker.look()
        worker.opened.clear()
        deadline = time.monotonic() + SECONDS
        sent = list(zip(clients, requests, strict=True))
        await self._counted(lambda: [protocol.data_received(request) for (protocol, _), request in sent])
        while len(worker.opened) < len(clients):
            await self._counted(_nothing)
            worker.look()
            assert time.monotonic() < deadline, f"{len(worker.opened)} streams of {len(clients)} were opened"
        for read in worker.frames(worker.opened, tokens):
            await self._counted(lambda read=read: worker.say(read))  # type: ignore[misc]
        while not all(protocol.cycle.response_complete for protocol, _ in clients):
            await self._counted(_nothing)
            assert time.monotonic() < deadline, "not all answers were completed"
        await self._counted(_nothing)
        for _, wire in clients:
            assert wire.out.startswith(b"HTTP/1.1 200 OK"), bytes(wire.out[:200])
            wire.out.clear()

    async def _counted(self, act: Callable[[], object]) -> None:
        """Do something and let the loop turn once, on the frontend's bill."""
        self.enter()
        began = time.process_time_ns()
        act()
        await asyncio.sleep(0)
        self.spent += time.process_time_ns() - began
        self.leave()


class Instructions:
    """Counts the bytecode instructions of functions that begin while it is entered, or go on (coroutines)."""

    def __init__(self) -> None:
        self.by_function: Counter[CodeType] = Counter()

    @property
    def count(self) -> int:
        """Of all functions but those that look at every stream by the clock, which goes too fast for who is traced."""
        return sum(n for code, n in self.by_function.items() if not code.co_filename.endswith(BY_THE_CLOCK))

    def enter(self) -> None:
        """Begin to count."""
        sys.settrace(self._call)

    def leave(self) -> None:
        """Stop."""
        sys.settrace(None)

    def _call(self, frame: FrameType, event: str, _arg: object) -> Any:
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        return self._step

    def _step(self, frame: FrameType, event: str, _arg: object) -> Any:
        if event == "opcode":
            self.by_function[frame.f_code] += 1
        return self._step


def _nothing() -> None:
    return


@asynccontextmanager
async def running() -> AsyncIterator[Bench]:
    """Run a frontend whose clients are connected and whose worker can be used."""
    found = vocabulary()
    published = publish(engine_info(MockConfig(), found))
    record = InstanceRecord(
        "dynamo", "backend", ("generate",), InstanceId("0123456789abcdef"), Epoch(1), "w:1", cards=(published.card,)
    )
    hub = MemHub()
    hub.put(record)
    store = ArtifactStore()
    for data in published.files.values():
        store.put(data)
    worker = Worker(record)
    discovery = MemDiscovery(hub)
    await discovery.start()
    config = FrontendConfig(http_port=0, discovery_backend="mem")
    assembled = Assembled(
        config, discovery=discovery, transport=Network(worker), rng=BlockRandom(), clock=time.monotonic_ns,
        store=store,
    )  # fmt: skip
    await assembled.start()
    served = asyncio.ensure_future(assembled.run())
    async with asyncio.timeout(SECONDS):
        while not assembled.app.ready:
            worker.look()
            await asyncio.sleep(0.01)
    server = make_server(assembled.app, config)
    server.config.load()
    listener: Any = server.config.http_protocol_class
    state = uvicorn.server.ServerState()
    wires = [Wire() for _ in range(CLIENTS)]
    protocols: list[Any] = []
    for wire in wires:
        protocol = listener(config=server.config, server_state=state, app_state={})
        protocol.connection_made(wire)
        protocols.append(protocol)
    try:
        yield Bench(protocols, wires, worker)
    finally:
        for protocol in protocols:
            protocol.connection_lost(None)
        served.cancel()
        await asyncio.wait([served])
        await assembled.close()
        await discovery.close()


async def measure(options: argparse.Namespace) -> dict[str, float]:
    """Return CPU microseconds per request (least and median of rounds) and calls per request."""
    stream = not options.whole
    at_once = 1 if options.one_by_one else CLIENTS
    async with running() as bench:
        for _ in range(5):
            await bench.round(stream, options.tokens, at_once=at_once)
        gc.collect()
        gc.freeze()
        gc.set_threshold(*GC_THRESHOLDS)  # as a frontend's process does
        rounds = []
        for _ in range(options.rounds):
            bench.spent = 0
            await bench.round(stream, options.tokens, at_once=at_once)
            rounds.append(bench.spent / 1000 / CLIENTS)
        profile = cProfile.Profile()
        bench.enter, bench.leave = profile.enable, profile.disable
        for _ in range(3):
            await bench.round(stream, options.tokens, at_once=at_once)
        counter = Instructions()
        bench.enter, bench.leave = counter.enter, counter.leave
        await bench.round(stream, options.tokens, at_once=at_once)
    stats = pstats.Stats(profile)
    if options.calls:
        show(stats, 3 * CLIENTS)
        show_instructions(counter.by_function, CLIENTS)
    calls: int = stats.total_calls  # type: ignore[attr-defined]
    rounds.sort()
    return {
        "us_per_request": round(rounds[0], 1),
        "us_per_request_median": round(rounds[len(rounds) // 2], 1),
        "calls_per_request": round(calls / (3 * CLIENTS), 1),
        "instructions_per_request": round(counter.count / CLIENTS, 1),
    }


def show(stats: pstats.Stats, requests: int) -> None:
    """Print calls and own time by module, then by function, per request, to standard error."""
    modules: dict[str, list[float]] = {}
    functions = []
    for (path, line, name), (_, calls, own, _, _) in stats.stats.items():  # type: ignore[attr-defined]
        short = _short(path)
        entry = modules.setdefault("(built in)" if path == "~" else short, [0, 0])
        entry[0] += calls
        entry[1] += own
        functions.append((calls / requests, own / requests * 1e6, f"{short}:{line} {name}"))
    print(f"{'calls':>8} {'us':>7}  module", file=sys.stderr)
    for name, (calls, own) in sorted(modules.items(), key=lambda item: -item[1][1]):
        if calls / requests >= 0.5:
            print(f"{calls / requests:8.1f} {own / requests * 1e6:7.2f}  {name}", file=sys.stderr)
    print(f"\n{'calls':>8} {'us':>7}  function", file=sys.stderr)
    for calls, own, name in sorted(functions, reverse=True, key=lambda row: row[1]):
        if calls >= 0.5:
            print(f"{calls:8.1f} {own:7.2f}  {name}", file=sys.stderr)


def show_instructions(by_function: Counter[CodeType], requests: int) -> None:
    """Print bytecode instructions by module, then by function, per request, to standard error."""
    modules: Counter[str] = Counter()
    functions: Counter[str] = Counter()
    for code, count in by_function.items():
        short = _short(code.co_filename)
        modules[short] += count
        functions[f"{short}:{code.co_firstlineno} {code.co_qualname}"] += count
    for what, counts in (("module", modules), ("function", functions)):
        print(f"\n{'instructions':>12}  {what}", file=sys.stderr)
        for name, count in counts.most_common():
            if count / requests >= 1:
                print(f"{count / requests:12.1f}  {name}", file=sys.stderr)


def _short(path: str) -> str:
    return path.partition("/holdfast/")[2] or path.rpartition("site-packages/")[2] or path.rpartition("/")[2]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=60, help="of 64 requests each")
    parser.add_argument("--tokens", type=int, default=1)
    parser.add_argument("--whole", action="store_true", help="answers in one piece instead of streams")
    parser.add_argument("--one-by-one", action="store_true", help="one request at a time instead of 64")
    parser.add_argument("--calls", action="store_true", help="show calls and instructions by module and function")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        figures = runner.run(measure(options))
    if options.json:
        print(json.dumps(figures))
        return
    for name, value in figures.items():
        print(f"{name:24} {value:8.1f}")


if __name__ == "__main__":
    main()
