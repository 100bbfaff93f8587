"""A small HTTP/1.1 client for one machine: JSON in, JSON or server-sent events out, standard library only.

It exists so that `serve`, `demo` and `status` start without loading an HTTP library, and so that the demo
sees each event at the moment it arrives.

Must never be used for anything but our own frontends and status servers.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import ssl
from collections.abc import AsyncIterator
from typing import Any
from urllib.parse import SplitResult, urlsplit

import msgspec

from holdfast.base.errors import CannotConnect, Disconnected, ProtocolViolation

_LINE_BYTES = 1024 * 1024
_BODY_BYTES = 64 * 1024 * 1024


class Response(msgspec.Struct, frozen=True):
    """Status, headers (names in lower case) and the whole body."""

    status: int
    headers: dict[str, str]
    body: bytes

    def json(self) -> Any:
        """Return the decoded body. Raises msgspec.DecodeError when it is not JSON."""
        return msgspec.json.decode(self.body)


async def get(url: str, timeout: float = 5.0, tls: ssl.SSLContext | None = None) -> Response:  # noqa: ASYNC109
    """Fetch a URL; ``timeout`` is the deadline of the whole exchange, ``tls`` as in `exchange`.

    Raises:
        CannotConnect: nobody listens there.
        Disconnected: the answer ended early.
        TimeoutError: no complete answer within ``timeout`` seconds.
    """
    async with asyncio.timeout(timeout), exchange("GET", url, tls=tls) as (status, headers, reader):
        return Response(status, headers, b"".join([part async for part in body(headers, reader)]))


async def post(url: str, payload: Any, timeout: float, headers: dict[str, str] | None = None) -> Response:  # noqa: ASYNC109
    """Post JSON and return the whole answer. Raises as `get` does."""
    async with asyncio.timeout(timeout), exchange("POST", url, payload, headers) as (status, found, reader):
        return Response(status, found, b"".join([part async for part in body(found, reader)]))


@contextlib.asynccontextmanager
async def exchange(
    method: str,
    url: str,
    payload: Any = None,
    headers: dict[str, str] | None = None,
    *,
    tls: ssl.SSLContext | None = None,
) -> AsyncIterator[tuple[int, dict[str, str], asyncio.StreamReader]]:
    """Send one request; yield status, headers and the reader of the body. The connection is closed afterwards.

    Args:
        method: HTTP's.
        url: ``http://`` or ``https://``.
        payload: becomes JSON; None: no body.
        headers: further ones.
        tls: whom to believe behind ``https://``; None: the CAs of this machine.
    """
    parts = urlsplit(url)
    secure = (tls or ssl.create_default_context()) if parts.scheme == "https" else None
    host, port = parts.hostname or "127.0.0.1", parts.port or (443 if secure else 80)
    try:
        reader, writer = await asyncio.open_connection(host, port, limit=_LINE_BYTES, ssl=secure)
    except ssl.SSLError as error:
        raise CannotConnect(f"No TLS with {host}:{port}: {getattr(error, 'verify_message', '') or error}.") from error
    except OSError as error:
        raise CannotConnect(f"Nobody answers at {host}:{port} ({_why(error)}).") from error
    try:
        writer.write(_request(method, parts, payload, headers or {}))
        status, found = await _head(reader, url)
        yield status, found, reader
    except (asyncio.IncompleteReadError, ConnectionError) as error:
        raise Disconnected(f"{url}: the connection ended in the middle of an answer.") from error
    finally:
        writer.close()


async def events(headers: dict[str, str], reader: asyncio.StreamReader) -> AsyncIterator[bytes]:
    """Yield the data of each server-sent event as it arrives; comments and other fields are skipped."""
    rest = b""
    async for part in body(headers, reader):
        *lines, rest = (rest + part).split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):
                yield line[5:].strip()


def _why(error: OSError) -> str:
    return os.strerror(error.errno) if error.errno else str(error)


def _request(method: str, url: SplitResult, payload: Any, headers: dict[str, str]) -> bytes:
    content = b"" if payload is None else msgspec.json.encode(payload)
    lines = [
        f"{method} {url.path or '/'}{'?' + url.query if url.query else ''} HTTP/1.1",
        f"host: {url.netloc}",
        "connection: close",
        f"content-length: {len(content)}",
        *([] if payload is None else ["content-type: application/json"]),
        *(f"{name}: {value}" for name, value in headers.items()),
    ]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + content


async def _head(reader: asyncio.StreamReader, url: str) -> tuple[int, dict[str, str]]:
    first = await reader.readline()
    words = first.split(b" ", 2)
    if len(words) < 2 or not words[1].isdigit():
        if not first:
            raise Disconnected(f"{url}: the connection was closed without an answer.")
        raise ProtocolViolation(f"{url}: {first[:80]!r} is not HTTP.")
    headers: dict[str, str] = {}
    while line := (await reader.readline()).decode("latin-1").strip():
        name, _, value = line.partition(":")
        headers[name.strip().lower()] = value.strip()
    return int(words[1]), headers


async def body(headers: dict[str, str], reader: asyncio.StreamReader) -> AsyncIterator[bytes]:
    """Yield the parts of a body as they arrive, without transfer coding."""
    if headers.get("transfer-encoding", "").lower() == "chunked":
        while size := int((await _line(reader)).split(b";")[0], 16):
            yield await reader.readexactly(size)
            await _line(reader)
        return
    if "content-length" in headers:
        left = min(int(headers["content-length"]), _BODY_BYTES)
        yield await reader.readexactly(left)
        return
    while part := await reader.read(_LINE_BYTES):
        yield part


async def _line(reader: asyncio.StreamReader) -> bytes:
    return (await reader.readuntil(b"\n")).strip()
