"""The fair floor: the least that a frontend over this wire could do, fed by the same mock workers.

It is connected to the workers like a frontend (pings, failure detection), opens a stream for each request, and writes
one ready-made event for each token that comes. No HTTP is understood, nothing is rendered, tokenized or turned into
text, and nothing is remembered. Run as ``python -m bench.relay PORT TOKENS`` with the environment of a cluster.
"""
# ruff: noqa: ARG002 - the handlers have the signatures of their callers

from __future__ import annotations

import asyncio
import itertools
import os
import random
import sys
from collections.abc import Iterator

import msgspec
import uvloop

from bench.floor import CHUNK, END, HEAD
from holdfast.base.errors import HoldfastError
from holdfast.engines.contract import GenerateRequest, Sampling, StopRules, pack_ids
from holdfast.runtime.discovery.factory import open_discovery
from holdfast.runtime.pool import WorkerPool
from holdfast.runtime.streams import Logprobs
from holdfast.runtime.transport import TcpTransport
from holdfast.wire.frames import OpenHeaders

_encode = msgspec.msgpack.Encoder().encode
PROMPT = pack_ids(range(1, 14))
"""As long as the load generator's prompt."""


class Relay(asyncio.Protocol):
    """One client's connection, and the handler of its stream."""

    def __init__(self, pool: WorkerPool, tokens: int, turn: Iterator[int]):
        self._pool = pool
        self._tokens = tokens
        self._turn = turn

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport  # type: ignore[assignment]  # uvloop has its own base class

    def data_received(self, data: bytes) -> None:  # whatever it asks for, it gets a stream
        number = next(self._turn)
        workers = self._pool.usable("mock")
        name = f"{number:032x}"
        request = GenerateRequest(
            request_id=name,
            model="mock",
            prompt_ids=PROMPT,
            sampling=Sampling(),
            stop=StopRules(max_tokens=self._tokens),
        )
        workers[number % len(workers)].open("generate", OpenHeaders(request_id=name), _encode(request), self)

    def on_accept(self) -> None:
        self._transport.write(HEAD)

    def on_tokens(self, index: int, tokens: list[int], logprobs: Logprobs | None) -> None:
        self._transport.write(CHUNK if len(tokens) == 1 else CHUNK * len(tokens))

    def on_data(self, index: int, payload: bytes) -> None:
        raise AssertionError("there are no messages on a token stream")

    def on_end(self, finish: str, error: HoldfastError | None, cached_tokens: int) -> None:
        self._transport.write(END)

    def on_refuse(self, error: HoldfastError) -> None:
        self._transport.abort()

    def on_broken(self, error: HoldfastError) -> None:
        self._transport.abort()


async def main(port: int, tokens: int) -> None:
    """Serve until killed; listens as soon as there is a worker."""
    discovery = open_discovery("file", root=os.environ["DYN_FILE_KV"])
    await discovery.start()
    pool = WorkerPool(discovery, TcpTransport(), caller="relay", rng=random.Random(1))
    await pool.start()
    while len(pool.usable("mock")) < len(pool.workers("mock")) or not pool.usable("mock"):  # noqa: ASYNC110
        await asyncio.sleep(0.01)
    turn = itertools.count()
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: Relay(pool, tokens, turn), "127.0.0.1", port)
    await server.serve_forever()


if __name__ == "__main__":
    uvloop.run(main(int(sys.argv[1]), int(sys.argv[2])))
