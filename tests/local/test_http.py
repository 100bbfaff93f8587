"""The small HTTP client against a real socket: bodies, chunks, events split anywhere, and broken answers."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

import pytest

from holdfast.base.errors import CannotConnect, Disconnected, ProtocolViolation
from holdfast.local import http
from holdfast.local.ports import free_port


@contextlib.asynccontextmanager
async def answering(*parts: bytes) -> AsyncIterator[tuple[str, list[bytes]]]:
    seen: list[bytes] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        seen.append(await reader.readuntil(b"\r\n\r\n"))
        for part in parts:
            writer.write(part)
            await writer.drain()
            await asyncio.sleep(0)
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/path?q=1", seen


async def test_a_body_of_known_length() -> None:
    async with answering(b'HTTP/1.1 200 OK\r\nContent-Length: 8\r\n\r\n{"a": 1}') as (url, seen):
        response = await http.get(url)
    assert (response.status, response.json()) == (200, {"a": 1})
    assert seen[0].startswith(b"GET /path?q=1 HTTP/1.1\r\n")


async def test_posted_json_arrives() -> None:
    async with answering(b"HTTP/1.1 204 No\r\ncontent-length: 0\r\n\r\n") as (url, seen):
        assert (await http.post(url, {"x": 1}, 5, {"x-a": "b"})).status == 204
    assert b"content-length: 7" in seen[0]
    assert b"x-a: b" in seen[0]


async def test_events_are_found_wherever_chunks_split_them() -> None:
    stream = b'data: {"n":1}\n\n: keep-alive\n\ndata: {"n":2}\n\ndata: [DONE]\n\n'
    for size in range(1, len(stream) + 1):
        pieces = [stream[i : i + size] for i in range(0, len(stream), size)]
        chunks = [b"%x\r\n%b\r\n" % (len(p), p) for p in pieces] + [b"0\r\n\r\n"]
        head = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"
        async with answering(head + b"".join(chunks)) as (url, _), http.exchange("POST", url, {}) as (_, found, reader):
            assert [e async for e in http.events(found, reader)] == [b'{"n":1}', b'{"n":2}', b"[DONE]"]


async def test_a_stream_that_breaks_off_is_an_error() -> None:
    async with answering(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n5\r\nab") as (url, _):
        with pytest.raises(Disconnected):
            await http.get(url)


async def test_what_is_not_http_and_what_is_not_there() -> None:
    async with answering(b"220 smtp\r\n") as (url, _):
        with pytest.raises(ProtocolViolation):
            await http.get(url)
    with pytest.raises(CannotConnect, match="Nobody answers"):
        await http.get(f"http://127.0.0.1:{free_port()}/")
