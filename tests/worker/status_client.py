"""Asks a status server, over a connection of its own each time."""

from __future__ import annotations

import asyncio
import json
import time
from typing import Any


async def ask(address: str, path: str, method: str = "GET", body: bytes = b"") -> tuple[int, Any]:
    """Return status and JSON body (bytes when it is none)."""
    host, port = address.rsplit(":", 1)
    async with asyncio.timeout(10):
        reader, writer = await asyncio.open_connection(host, int(port))
        try:
            writer.write(f"{method} {path} HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n\r\n".encode() + body)
            answer = await reader.read()
        finally:
            writer.close()
    head, _, content = answer.partition(b"\r\n\r\n")
    return int(head.split()[1]), json.loads(content) if b"application/json" in head and content else content


async def until(address: str, status: int, path: str = "/health", within: float = 20.0) -> tuple[float, Any]:
    """Wait until a path answers with a status; returns the seconds that took, and the body."""
    began = time.monotonic()
    async with asyncio.timeout(within):
        while True:
            found, body = await ask(address, path)
            if found == status:
                return time.monotonic() - began, body
            await asyncio.sleep(0.02)
