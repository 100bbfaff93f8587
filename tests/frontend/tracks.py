"""A frontend's token path without the rest of it: real streams, answers and client sockets, and a worker by script.

Everything between the bytes of a worker's frames and a client's socket is production's. The script decides which bytes
come in one read; what its streams say is a function of (stream, output index), so that nothing can be lost or repeated
unnoticed.
"""

from __future__ import annotations

import asyncio
import logging
import random
import socket
from types import SimpleNamespace
from typing import Any

from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.protocols.http.httptools_impl import RequestResponseCycle

from holdfast.frontend.answers import StreamedAnswer
from holdfast.frontend.client_wire import ClientWire
from holdfast.frontend.reply import Reply
from holdfast.requests.request import Request
from holdfast.text.detokenizer import TableDetokenizer
from holdfast.text.pipeline import TextAssembler
from holdfast.text.tables import DetokTables
from holdfast.wire.caller import CallerConnection
from holdfast.wire.codec import encode
from holdfast.wire.columns import Entry, encode_items
from holdfast.wire.frames import Accept, End, Hello, Welcome
from tests.requests.fakes import FakeWorker, Fleet, plan

TABLES = DetokTables(
    {
        "Hello": 1, "\u0120world": 2, '"': 3, "\\": 4, "\u010a": 5, "\u00f0\u0141": 6, "\u013a\u0122": 7, "<s>": 8,
        "\u00c3\u00a9": 9,
    },
    size=11,
    hidden={"<s>"},
)  # fmt: skip
"""Plain tokens, some that need escapes, the halves of an emoji (6, 7), a hidden one (8), one without a piece (10)."""
VOCABULARY = (1, 2, 3, 4, 5, 9) * 4 + (6, 7, 6, 7, 8, 10, 99)
PLAIN = (1, 2, 3, 4, 5, 9)


def token_at(stream: int, index: int, vocabulary: tuple[int, ...] = VOCABULARY) -> int:
    """Return what a stream says at an output index."""
    return vocabulary[random.Random(stream * 1_000_003 + index).randrange(len(vocabulary))]


class Client(asyncio.Protocol):
    """The server's end of a client's connection, with one response on it; as `HttpProtocol`, without HTTP's way in."""

    watcher: ClientWire | None = None

    def __init__(self, send_buffer: int = 0):
        self._send_buffer = send_buffer
        self.made = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport) or hasattr(transport, "write")
        self.transport: Any = transport
        if self._send_buffer:
            transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, self._send_buffer)
            self.transport.set_write_buffer_limits(high=1024)
        self.flow = FlowControl(self.transport)
        cycle = RequestResponseCycle(
            scope={"type": "http", "method": "POST", "http_version": "1.1"},  # type: ignore[typeddict-item]
            transport=self.transport,
            flow=self.flow,
            logger=logging.getLogger("x"),
            access_logger=logging.getLogger("x"),
            access_log=False,
            default_headers=[],
            message_event=asyncio.Event(),
            expect_100_continue=False,
            keep_alive=True,
            on_response=lambda: None,
        )
        cycle.more_body = False
        self.wire = ClientWire(self, cycle, self.flow, self.transport)
        self.made.set_result(None)

    def connection_lost(self, exc: Exception | None) -> None:
        if self.watcher is not None:
            self.watcher.on_lost()

    def pause_writing(self) -> None:
        self.flow.pause_writing()
        if self.watcher is not None:
            self.watcher.on_blocked()

    def resume_writing(self) -> None:
        self.flow.resume_writing()
        if self.watcher is not None:
            self.watcher.on_writable()


class Worker(FakeWorker):
    """A worker that is a real caller's connection."""

    def __init__(self, fleet: Fleet, name: str) -> None:
        super().__init__(fleet, name)
        self.connection = CallerConnection(Hello(1, 2, "frontend", "control", name, 1))
        self.connection.receive(bytes(encode(Welcome(2, name, 1))))

    def open(self, endpoint: str, headers: Any, payload: bytes, handler: Any, **options: Any) -> Any:
        return self.connection.open(endpoint, headers, payload, handler, **options)


def prepared(*, surface: str = "chat_completions") -> Any:
    """Return what a plain streamed request comes to."""
    spec = SimpleNamespace(
        n=1, stop=(), include_stop=False, min_tokens=0, skip_special_tokens=True, stream=True, stop_token_ids=(),
        echo=False, sampling=SimpleNamespace(logprobs=None), tools=SimpleNamespace(parallel=True), include_usage=True,
        tokens_as_ids=False, extra_fields=frozenset(),
    )  # fmt: skip

    def assembler(**_: Any) -> TextAssembler:
        return TextAssembler(TableDetokenizer(TABLES))

    return SimpleNamespace(
        spec=spec, surface=surface, model="m", prompts=[SimpleNamespace(text="hi", ids=[1, 2])], tool_format=None,
        new_call_id=None, split_reasoning=False,
        served=SimpleNamespace(
            text=SimpleNamespace(assembler=assembler, tokenizer=SimpleNamespace(token_bytes=lambda _: b"")),
            card=SimpleNamespace(fingerprint="f"),
        ),
    )  # fmt: skip


class Bench:
    """Streams, their clients and their worker. ``express``: whether tokens may take the short way."""

    def __init__(self, *, express: bool, workers: int = 1):
        self.fleet = Fleet(0)
        self.workers = [Worker(self.fleet, f"w{n}") for n in range(workers)]
        self.fleet.workers = list(self.workers)
        self.now = 10**9
        """Nanoseconds of telemetry's stopwatch; each read takes a millisecond."""
        self.flusher = self.fleet.flusher
        self.flusher.clock = lambda: self.now
        if not express:
            self.flusher.take = None
        self.clients: list[Client] = []
        self.replies: list[Reply] = []
        self.requests: list[Request] = []
        self.readers: list[asyncio.StreamReader] = []
        self.writers: list[asyncio.StreamWriter] = []
        self.tasks: list[asyncio.Task[None]] = []
        self.taken = 0
        """Entries that took the short way."""

    async def connect(self, *, send_buffer: int = 0, receive_buffer: int = 0) -> Client:
        """Return the server's end of a new client's connection."""
        loop = asyncio.get_running_loop()
        made: list[Client] = []

        def client() -> Client:
            made.append(Client(send_buffer))
            return made[0]

        server = await loop.create_server(client, "127.0.0.1", 0)
        raw = socket.socket()
        raw.setblocking(False)
        if receive_buffer:
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        await loop.sock_connect(raw, server.sockets[0].getsockname())
        reader, writer = await asyncio.open_connection(sock=raw, limit=4096)
        while not made:  # noqa: ASYNC110 - asyncio itself makes it
            await asyncio.sleep(0)
        await made[0].made
        server.close()
        self.readers.append(reader)
        self.writers.append(writer)
        return made[0]

    async def begin(self, tokens: int, **options: Any) -> int:
        """Start a request of a new client; return the number of both."""
        client = await self.connect(**options)
        reply = Reply(client.wire, self.flusher, 0.0)
        answer = StreamedAnswer(reply, f"r{len(self.requests)}", "r", 1, prepared())
        request = Request(self.fleet.services, [(plan(tokens), answer.choices[0])])
        answer.begin(request)
        client.wire.watch(lambda: (reply.abandon(), request.cancel("gone"))[0], reply.block, reply.resume)  # type: ignore[func-returns-value]
        self.clients.append(client)
        self.replies.append(reply)
        self.requests.append(request)
        self.tasks.append(asyncio.ensure_future(request.run()))
        await self.turn()
        return len(self.requests) - 1

    async def turn(self) -> None:
        """Let the loop turn a few times."""
        for _ in range(4):
            await asyncio.sleep(0)

    def read(self, *frames: bytes | bytearray, worker: int = 0) -> None:
        """Let these frames come in one read of a worker's connection."""
        self.now += 10**6
        connection = self.workers[worker].connection
        take = connection.take
        if take is not None:
            connection.take = lambda *columns: self._counted(take, *columns)
        try:
            connection.receive(b"".join(bytes(one) for one in frames))
        finally:
            connection.take = take
            self.flusher.flush()

    def _counted(self, take: Any, table: Any, streams: bytes, *columns: bytes) -> Any:
        rest = take(table, streams, *columns)
        self.taken += len(streams) // 4 - len(rest)
        return rest

    def stream(self, number: int) -> Any:
        """Return one stream."""
        return self.requests[number].streams[0]

    def place(self, number: int) -> tuple[int, int]:
        """Return the worker and the wire's number of a stream's present attempt; 0: it has none."""
        attempt = self.stream(number).attempt
        if attempt is None or attempt.handle is None:
            return 0, 0
        return self.workers.index(attempt.placed.worker), attempt.handle.id

    def books(self, number: int) -> tuple[Any, ...]:
        """Return all that is remembered of a stream's tokens."""
        stream, reply = self.stream(number), self.replies[number]
        rhythm = stream.rhythm
        return (
            stream.count, stream.delivered, stream.generated.tolist(), list(stream.pending), list(rhythm.ticks),
            list(rhythm._bursts), stream.state, reply.finished, reply.idle_ticks,
            stream.ended.finish if stream.ended is not None else None,
            stream.ended.completion_tokens if stream.ended is not None else None,
        )  # fmt: skip

    async def received(self, number: int, within: float = 10.0) -> bytes:
        """Return all that a client gets until its answer is complete."""
        data = b""
        async with asyncio.timeout(within):
            while not (data.endswith(b"\r\n0\r\n\r\n") or whole(data)):
                part = await self.readers[number].read(65536)
                if not part:
                    break
                data += part
        return data

    async def close(self) -> None:
        """End what is open."""
        for request in self.requests:
            request.cancel("test")
        await asyncio.gather(*self.tasks, return_exceptions=True)
        for writer in self.writers:
            writer.close()
        for client in self.clients:
            client.transport.abort()
        await self.turn()


def whole(data: bytes) -> bool:
    """Return whether this is a complete response of a known length: a stream that was refused before its head went."""
    head, _, body = data.partition(b"\r\n\r\n")
    length = head.partition(b"content-length: ")[2].partition(b"\r\n")[0]
    return bool(length) and len(body) == int(length)


def accept(stream: int) -> bytearray:
    """Return a worker's word that it owns a stream."""
    return encode(Accept(stream))


def items(*entries: Entry) -> bytes:
    """Return the frames of one engine step."""
    return b"".join(bytes(one) for one in encode_items(entries))


def end(stream: int, finish: str = "length", tokens: int = 0) -> bytearray:
    """Return a worker's word that a stream is over."""
    return encode(End(stream, finish, None, 0, tokens))
