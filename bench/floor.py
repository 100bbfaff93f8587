"""The floor: a plain asyncio server on loopback that writes the same bytes as a stream, and nothing else.

It ticks like the mock worker: one event per connection and step, unthrottled when the step is 0. Run as
``python -m bench.floor PORT TOKENS STEP_SECONDS``.
"""

from __future__ import annotations

import asyncio
import sys

import uvloop

EVENT = (
    b'data: {"id":"chatcmpl-00000000000000000000000000000000","object":"chat.completion.chunk","created":1700000000,'
    b'"model":"mock","system_fingerprint":"mock-1-0.0","choices":[{"index":0,"delta":{"content":" foresters"},'
    b'"finish_reason":null}]}\n\n'
)
CHUNK = b"%x\r\n%b\r\n" % (len(EVENT), EVENT)
HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
END = b"0\r\n\r\n"


class Floor(asyncio.Protocol):
    def __init__(self, live: set[Floor], tokens: int):
        self._live = live
        self._tokens = tokens
        self._left = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport  # type: ignore[assignment]  # uvloop has its own base class

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002 - the protocol's signature
        self._live.discard(self)

    def data_received(self, data: bytes) -> None:  # noqa: ARG002 - whatever it asks for, it gets the stream
        self._transport.write(HEAD)
        self._left = self._tokens
        self._live.add(self)

    def step(self) -> None:
        self._left -= 1
        self._transport.write(CHUNK)
        if not self._left:
            self._live.discard(self)
            self._transport.write(END)


async def main(port: int, tokens: int, step: float) -> None:
    loop = asyncio.get_running_loop()
    live: set[Floor] = set()
    server = await loop.create_server(lambda: Floor(live, tokens), "127.0.0.1", port)
    at = loop.time()
    async with server:
        while True:
            at = max(at + step, loop.time())
            await asyncio.sleep(at - loop.time() if step else (0 if live else 0.0005))
            for connection in list(live):
                connection.step()


if __name__ == "__main__":
    uvloop.run(main(int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])))
