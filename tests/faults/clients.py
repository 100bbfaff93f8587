"""Real clients: sockets, HTTP and server-sent events by hand, so that they can be slow, stall, and leave rudely.

The counterpart of `sim.clients`. Writes down what came and when. Must never judge an answer.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from typing import Any

import msgspec

from holdfast.sim.history import Call, History
from holdfast.sim.workload import Wish

_PATHS = {"chat": "/v1/chat/completions", "completions": "/v1/completions"}
_SMALL_BUFFER = 2304
"""Bytes of a slow client's receive buffer; Linux grants about twice as many."""


class Body:
    """Takes the framing off a response, whatever pieces it comes in."""

    def __init__(self) -> None:
        self.status = 0
        self.complete = False
        self._rest = b""
        self._chunked = False
        self._left = -1
        """Bytes that are missing of the body, or of the present chunk; -1: not known."""

    def feed(self, data: bytes) -> bytes:
        """Take bytes of the connection; returns those of the body."""
        self._rest += data
        if not self.status and not self._head():
            return b""
        out = b""
        while not self.complete:
            if self._left < 0 and not self._size():
                break
            if self.complete or not self._rest:
                break
            piece, self._rest = self._rest[: self._left], self._rest[self._left :]
            out += piece
            self._left -= len(piece)
            if not self._left:
                self._left = -1
                self.complete = not self._chunked
        return out

    def _head(self) -> bool:
        head, end, rest = self._rest.partition(b"\r\n\r\n")
        if not end:
            return False
        self._rest = rest
        lines = head.decode("latin-1").lower().split("\r\n")
        fields = {name: value.strip() for name, _, value in (line.partition(":") for line in lines[1:])}
        self.status = int(lines[0].split()[1])
        self._chunked = fields.get("transfer-encoding") == "chunked"
        if not self._chunked:
            self._left = int(fields["content-length"])
            self.complete = self._left == 0
        return True

    def _size(self) -> bool:
        """Read the size of the next chunk, after the line feed of the one before."""
        rest = self._rest.removeprefix(b"\r\n")
        line, end, after = rest.partition(b"\r\n")
        if not end:
            return False
        self._left = int(line.split(b";")[0], 16)
        self._rest = after
        if not self._left:
            self.complete = True
        return True


class Exchange:
    """One request and its answer.

    Args:
        wish: what is asked, and how the client behaves.
        frontend: whom it asks.
        port: where that listens.
        history: where the call is written down.
    """

    def __init__(self, wish: Wish, frontend: str, port: int, history: History):
        self.wish, self._port, self._history = wish, port, history
        slow = wish.manner.reading != "at once"
        self.call = Call(wish.name, frontend, wish.surface, wish.body, wish.valid, wish.probe, wish.headers, slow=slow)
        history.calls.append(self.call)

    @property
    def over(self) -> bool:
        return self.call.ending != ""

    async def run(self) -> None:
        """Ask, and take the answer to its end, or as far as the client wants it."""
        call, manner, loop = self.call, self.wish.manner, asyncio.get_running_loop()
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as sock:
            sock.setblocking(False)
            if call.slow:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _SMALL_BUFFER)
            call.sent = loop.time()
            try:
                async with asyncio.timeout(manner.after if manner.leaves == "time" else None):
                    await loop.sock_connect(sock, ("127.0.0.1", self._port))
                    await loop.sock_sendall(sock, self._request())
                    self._end(await self._read(sock))
            except TimeoutError:
                self._history.see("client-leaves")
                self._end("left")
            except ConnectionRefusedError:
                self._end("unreachable")
            except OSError:
                self._end("broken")

    def _end(self, ending: Any) -> None:
        self.call.ending, self.call.ended = ending, asyncio.get_running_loop().time()

    def _request(self) -> bytes:
        content = msgspec.json.encode(self.call.body)
        lines = [
            f"POST {_PATHS[self.call.surface]} HTTP/1.1",
            f"host: 127.0.0.1:{self._port}",
            "content-type: application/json",
            "connection: close",
            f"content-length: {len(content)}",
            f"x-request-id: {self.call.name}",
            *(f"{name}: {value}" for name, value in self.call.headers.items()),
        ]
        return "\r\n".join(lines).encode() + b"\r\n\r\n" + content

    async def _read(self, sock: socket.socket) -> str:
        call, manner, loop = self.call, self.wish.manner, asyncio.get_running_loop()
        body = Body()
        paused = False
        while not body.complete:
            data = await loop.sock_recv(sock, 512 if call.slow else 65_536)
            now = loop.time()
            if not data:
                return "broken"
            part = body.feed(data)
            if body.status and not call.answered:
                call.status, call.answered = body.status, now
            if part:
                call.pieces.append((now, part))
            if manner.leaves == "tokens" and len(call.pieces) >= manner.after and not body.complete:
                self._history.see("client-leaves")
                return "left"
            if manner.reading == "slowly" and not body.complete:
                if not paused:
                    paused = True
                    self._history.see("client-slow")
                await asyncio.sleep(len(data) / manner.rate)
            elif manner.reading == "stalls" and part and not paused and not body.complete:
                paused = True
                self._history.see("client-stalls")
                await asyncio.sleep(manner.pause)
        with contextlib.suppress(OSError):
            sock.shutdown(socket.SHUT_RDWR)
        return "complete"
