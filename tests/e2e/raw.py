"""Plain sockets, for clients that misbehave in ways no library offers."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any


def post(body: dict[str, Any], path: str = "/v1/chat/completions", **headers: str) -> bytes:
    """Return a whole request; header names with ``_`` for ``-``."""
    content = json.dumps(body).encode()
    lines = [f"POST {path} HTTP/1.1", "host: test", f"content-length: {len(content)}"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + content


@contextlib.asynccontextmanager
async def connected(port: int, receive_buffer: int = 0) -> AsyncIterator[socket.socket]:
    """A non-blocking connection to the frontend; a small receive buffer makes a client that is soon full."""
    loop = asyncio.get_running_loop()
    with socket.socket() as sock:
        if receive_buffer:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        sock.setblocking(False)
        await loop.sock_connect(sock, ("127.0.0.1", port))
        yield sock


async def send(sock: socket.socket, data: bytes) -> None:
    await asyncio.get_running_loop().sock_sendall(sock, data)


async def read_all(sock: socket.socket, within: float) -> bytes:
    """Return what the server sends until it closes. Raises TimeoutError when it does not."""
    parts = []
    async with asyncio.timeout(within):
        with contextlib.suppress(ConnectionError):
            while part := await asyncio.get_running_loop().sock_recv(sock, 65536):
                parts.append(part)
    return b"".join(parts)


async def read_until(sock: socket.socket, wanted: bytes, within: float) -> bytes:
    """Return what the server sends up to the first appearance of ``wanted``, at least."""
    data = b""
    async with asyncio.timeout(within):
        while wanted not in data:
            part = await asyncio.get_running_loop().sock_recv(sock, 65536)
            assert part, f"the server closed after {data[-300:]!r}"
            data += part
    return data


def rss_mb(pid: int) -> float:
    """Return the resident memory of a process in MiB."""
    with Path(f"/proc/{pid}/status").open() as status:
        return next(int(line.split()[1]) / 1024 for line in status if line.startswith("VmRSS"))
