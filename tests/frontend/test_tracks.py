"""The short way of plain tokens and the long one: the same bytes, the same books, whatever happens in between."""

from __future__ import annotations

import asyncio
import importlib.util
import os
import random
import re
import socket
import struct
from collections.abc import Callable, Coroutine
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
import uvloop

from holdfast.frontend.choices import StreamedChoice
from holdfast.requests import express
from tests.frontend.tracks import PLAIN, VOCABULARY, Bench, accept, end, items, token_at, whole
from tests.patience import within

ROOT = Path(__file__).resolve().parent.parent.parent
Run = Callable[[Coroutine[Any, Any, Any]], Any]

pytestmark = pytest.mark.skipif(express.UNAVAILABLE != "", reason=f"no tracks: {express.UNAVAILABLE}")
loops = pytest.mark.parametrize("run", [asyncio.run, uvloop.run], ids=["asyncio", "uvloop"])


def chunks(data: bytes) -> list[bytes]:
    """Return the chunks of a response's body; fails when its framing is broken."""
    _, _, rest = data.partition(b"\r\n\r\n")
    if whole(data):
        return [rest]
    found = []
    while rest:
        size, _, rest = rest.partition(b"\r\n")
        length = int(size, 16)
        assert rest[length : length + 2] == b"\r\n", (size, rest[:80])
        found.append(re.sub(rb',"gap_ms":\d+', b"", rest[:length]))
        rest = rest[length + 2 :]
    assert found[-1] == b""
    return found


def text_of(parts: list[bytes]) -> str:
    """Return what a client reads."""
    said = ""
    for line in b"".join(parts).splitlines():
        if line.startswith(b"data: {"):
            event = msgspec.json.decode(line[6:])
            said += "".join(c["delta"].get("content") or "" for c in event["choices"])
    return said


def test_where_there_is_a_compiler_it_is_of_these_sources(tmp_path: Path) -> None:
    """Fails when native/ was changed without installing again (`python tools/kernel.py`)."""
    spec = importlib.util.spec_from_file_location("kernel_tool", ROOT / "tools" / "kernel.py")
    assert spec is not None
    assert spec.loader is not None
    tool: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    assert tool.digest(tool.EXPRESS) == express.native.SOURCE_DIGEST
    tool.compile_kernel(tool.EXPRESS, tmp_path / tool.EXPRESS.file)


class Script:
    """Drives a bench by dice: what comes in which read, what is repeated, left out, broken off, cancelled, blocked."""

    def __init__(self, seed: int, bench: Bench):
        self.dice = random.Random(seed)
        self.bench = bench
        self.lengths = [self.dice.choice((1, 2, 40, 90, 160)) for _ in range(5)]
        self.said: dict[tuple[int, int], int] = {}
        """Next output index of each (worker, stream) that was accepted."""

    async def play(self) -> tuple[list[list[bytes]], list[Any]]:
        """Return what each client got and what is remembered of it."""
        bench = self.bench
        for length in self.lengths:
            await bench.begin(length)
        for _ in range(400):
            alive = [n for n in range(5) if bench.stream(n).ended is None]
            if not alive:
                break
            await self._placed(alive)
            for worker, frames in self._read(alive).items():
                if frames:
                    bench.read(*frames, worker=worker)
            self._meddle(alive)
            await bench.turn()
        for number in range(5):
            bench.stream(number).cancel("the script is over")
            bench.replies[number].resume()
        got = [chunks(await bench.received(number)) for number in range(5)]
        return got, [bench.books(number) for number in range(5)]

    async def _placed(self, alive: list[int]) -> None:
        async with asyncio.timeout(within(20.0)):
            while any(self._homeless(number) for number in alive):  # noqa: ASYNC110 - of production's own tasks
                await asyncio.sleep(0.001)

    def _homeless(self, number: int) -> bool:
        """Whether a stream will have a worker soon; one whose end waits for its client will not."""
        stream = self.bench.stream(number)
        return stream.ended is None and not stream.closing and not self.bench.place(number)[1]

    def _read(self, alive: list[int]) -> dict[int, list[bytes | bytearray]]:
        frames: dict[int, list[bytes | bytearray]] = {0: [], 1: []}
        over: set[int] = set()
        for _ in range(self.dice.choice((1, 1, 1, 2, 3))):
            entries: dict[int, list[Any]] = {0: [], 1: []}
            ends: list[tuple[int, bytearray]] = []
            for number in alive:
                if number in over or self.bench.stream(number).ended is not None or self.dice.random() < 0.15:
                    continue
                worker, wire = self.bench.place(number)
                if not wire:
                    continue
                if (worker, wire) not in self.said:
                    self.said[worker, wire] = self.bench.stream(number).attempt.base
                    frames[worker].append(accept(wire))
                finished = self._say(number, worker, wire, entries)
                if finished is not None:
                    over.add(number)
                    ends.append((worker, finished))
            for worker, column in entries.items():
                if column:
                    frames[worker].append(items(*column))
            for worker, frame in ends:
                frames[worker].append(frame)
        return frames

    def _say(self, number: int, worker: int, wire: int, entries: dict[int, list[Any]]) -> bytearray | None:
        """Put tokens of a stream into a step; return its end if it comes with them."""
        at, length = self.said[worker, wire], self.lengths[number]
        act = self.dice.random()
        if act < 0.04 and at > self.bench.stream(number).attempt.base:
            at -= 1  # says its last token again
        elif act < 0.05 and at + 1 < length:
            at += 1  # leaves one out
        elif act < 0.06 and at < length:
            return end(wire, "abort")
        if at >= length:
            return end(wire, "length")
        size = min(length - at, self.dice.choice((1, 1, 1, 1, 1, 1, 2, 4)))
        entries[worker].append((wire, at, [token_at(number, at + i) for i in range(size)], None))
        self.said[worker, wire] = at + size
        if at + size == length and self.dice.random() < 0.5:
            return end(wire, "length")
        return None

    def _meddle(self, alive: list[int]) -> None:
        number = self.dice.choice(alive)
        reply, act = self.bench.replies[number], self.dice.random()
        if act < 0.05:
            reply.comment()
        elif act < 0.10 and reply.started and reply.blocked_since is None:
            reply.block()
        elif act < 0.25 and reply.blocked_since is not None:
            reply.resume()
        elif act < 0.26:
            self.bench.stream(number).cancel("the script says so")
        elif act < 0.35:
            reply.idle_ticks += 1


async def played(seed: int, *, short: bool) -> tuple[Any, Any, int]:
    bench = Bench(express=short, workers=2)
    try:
        return *await Script(seed, bench).play(), bench.taken
    finally:
        await bench.close()


@loops
@pytest.mark.parametrize("seeds", range(5))
def test_tracks_and_python_write_the_same(run: Run, seeds: int) -> None:
    taken = 0
    for seed in range(seeds * 8, seeds * 8 + 8):
        short = run(played(seed, short=True))
        long = run(played(seed, short=False))
        assert short[0] == long[0], seed
        assert short[1] == long[1], seed
        assert long[2] == 0
        taken += short[2]
    assert taken > 200


async def streaming(bench: Bench, count: int, length: int, **options: Any) -> list[int]:
    """Start streams and let each say its first tokens; return their numbers on the wire."""
    for _ in range(count):
        await bench.begin(length, **options)
    wires = [bench.place(n)[1] for n in range(count)]
    bench.read(*[accept(wire) for wire in wires])
    for index in range(4):
        step(bench, wires, index)
        await bench.turn()
    return wires


def step(bench: Bench, wires: list[int], index: int, *, who: list[int] | None = None) -> None:
    """One engine step: a token of each stream (or of those in ``who``)."""
    numbers = who if who is not None else list(range(len(wires)))
    bench.read(items(*[(wires[n], index, [token_at(n, index, PLAIN)], None) for n in numbers]))


def expected(bench: Bench, number: int, length: int) -> str:
    tables = bench_tables()
    return "".join(tables[token_at(number, i, PLAIN)] or "" for i in range(length))


def bench_tables() -> list[str | None]:
    from tests.frontend.tracks import TABLES  # noqa: PLC0415

    return TABLES.text


@loops
def test_a_client_that_takes_little_at_a_time_gets_all_of_it_in_order(run: Run) -> None:
    """Its kernel buffers are tiny: events are cut in their middle, and the transport keeps the rest."""

    async def main() -> tuple[str, int, bool]:
        bench = Bench(express=True)
        length = 400
        wires = await streaming(bench, 2, length, send_buffer=2048, receive_buffer=2048)
        was_blocked = False
        for index in range(4, length):
            step(bench, wires, index)
            was_blocked = was_blocked or bench.replies[0].blocked_since is not None
            if index % 50 == 0:
                await asyncio.sleep(0)
        bench.read(*[end(wire) for wire in wires])
        got = await asyncio.gather(bench.received(0, within(20.0)), bench.received(1, within(20.0)))
        for number in range(2):
            assert text_of(chunks(got[number])) == expected(bench, number, length)
            assert bench.stream(number).ended.completion_tokens == length
        await bench.close()
        return "", bench.taken, was_blocked

    _, taken, was_blocked = run(main())
    assert taken > 0
    assert was_blocked


@loops
def test_a_client_that_vanishes_harms_nobody(run: Run) -> None:
    async def main() -> None:
        bench = Bench(express=True)
        length = 200
        wires = await streaming(bench, 3, length)
        for index in range(4, length):
            if index == 50:
                raw = bench.writers[1].transport.get_extra_info("socket")
                raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                bench.writers[1].transport.abort()
            gone = bench.place(1)[1] == 0
            step(bench, wires, index, who=[0, 2] if gone else None)
            await bench.turn()
        assert bench.stream(1).ended.state == "cancelled"
        assert bench.stream(1).delivered < length
        bench.read(end(wires[0]), end(wires[2]))
        for number in (0, 2):
            assert text_of(chunks(await bench.received(number))) == expected(bench, number, length)
        assert bench.taken > 300
        await bench.close()

    run(main())


@loops
def test_a_descriptor_that_is_another_clients_now_gets_nothing(run: Run) -> None:
    async def main() -> None:
        bench = Bench(express=True)
        wires = await streaming(bench, 1, 1000)
        client = bench.clients[0]
        fd = client.transport.get_extra_info("socket").fileno()
        bench.requests[0].cancel = lambda _: None  # type: ignore[method-assign]  # nobody stops the worker
        client.transport.abort()
        step(bench, wires, 4)  # the descriptor is still this client's
        await bench.turn()
        assert bench.replies[0].finished, "it knows that its client has gone"
        pair = socket.socketpair()
        mine, theirs = pair if pair[1].fileno() != fd else reversed(pair)
        if mine.fileno() != fd:
            os.dup2(mine.fileno(), fd)
        for index in range(5, 30):
            step(bench, wires, index)
            await bench.turn()
        theirs.setblocking(False)
        with pytest.raises(BlockingIOError):
            theirs.recv(1)
        if mine.fileno() != fd:
            os.close(fd)
        mine.close()
        theirs.close()
        bench.stream(0).cancel("over")
        await bench.close()

    run(main())


@loops
def test_what_waits_in_the_transport_is_not_overtaken(run: Run) -> None:
    async def main() -> None:
        bench = Bench(express=True)
        wires = await streaming(bench, 1, 40)
        taken = bench.taken
        for index in range(4, 40):
            if index % 3 == 0:
                bench.replies[0].comment()  # waits in uvloop's transport until the end of the loop's turn
            step(bench, wires, index)
            if index % 2:
                await bench.turn()
        bench.read(end(wires[0]))
        parts = chunks(await bench.received(0))
        assert text_of(parts) == expected(bench, 0, 40)
        assert sum(b"keep-alive" in part for part in parts) == 12
        assert bench.taken > taken
        await bench.close()

    run(main())


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # the fault, as Python tells of it
def test_a_fault_in_the_books_ends_that_stream_only() -> None:
    async def main() -> None:
        bench = Bench(express=True)
        wires = await streaming(bench, 2, 30)
        step(bench, wires, 4)
        assert bench.taken
        broken, choice = bench.stream(0), bench.stream(0)._output

        def fail(_: int) -> None:
            raise RuntimeError("no room in the books")

        fd, transport = choice.reply.socket
        table = choice._table
        track = express.native.Track(
            broken, broken.attempt, choice.reply, table, table.fragments, choice._prefix, choice._suffix,
            broken.rhythm.ticks, fail, transport, fd, 100,
        )  # fmt: skip
        broken.pending = [1, 2]
        bench.flusher.touched.append(track)
        bench.flusher.flush()
        await bench.turn()
        assert broken.ended.state == "failed"
        for index in range(5, 30):
            step(bench, wires, index, who=[1])
        bench.read(end(wires[1]))
        assert text_of(chunks(await bench.received(1))) == expected(bench, 1, 30)
        assert b'"error"' in await bench.received(0)
        await bench.close()

    asyncio.run(main())


async def test_a_client_without_a_plain_socket_has_no_track() -> None:
    bench = Bench(express=True)
    client = await bench.connect()
    assert client.wire.socket is None, "not chunked"
    client.wire.start(b"HTTP/1.1 200 OK\r\n")
    assert client.wire.socket is not None
    plain = client.transport

    class Tls:
        def get_extra_info(self, name: str, default: Any = None) -> Any:
            return object() if name == "ssl_object" else plain.get_extra_info(name, default)

    client.wire._transport = Tls()  # type: ignore[assignment]
    assert client.wire.socket is None
    plain.abort()
    await bench.close()


def test_what_is_not_plain_has_no_track() -> None:
    async def main() -> None:
        bench = Bench(express=True)
        number = await bench.begin(20)
        choice: Any = bench.stream(number)._output
        assert isinstance(choice, StreamedChoice)
        choice._alone = False
        wire = bench.place(number)[1]
        bench.read(accept(wire))
        for index in range(10):
            step(bench, [wire], index)
        assert (bench.taken, bench.stream(number).track) == (0, None)
        await bench.close()

    asyncio.run(main())


def test_wrong_arguments_are_errors() -> None:
    native = express.native
    with pytest.raises(ValueError, match="columns"):
        native.take([], {}, b"1234", b"12345678", b"1234")
    with pytest.raises(TypeError):
        native.take([], [], b"", b"", b"")  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        native.Track(1)  # type: ignore[call-arg]
    with pytest.raises(TypeError):
        native.deliver((), 1, [])  # type: ignore[arg-type]
    assert native.deliver([], 1, []) == ([], [], [])
    stream = SimpleNamespace(track=None)
    assert native.take([], {7: stream}, b"\7\0\0\0", b"\1\0\0\0", b"\2\0\0\0") == [(7, 1, 2)]
    assert native.take([], {}, b"\7\0\0\0", b"\1\0\0\0", b"\xff\xff\xff\xff") == [(7, 1, 0xFFFFFFFF)]
    assert VOCABULARY
