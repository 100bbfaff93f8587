"""A connection of the test's own to a worker: commands to the mock engine, and the counters of its pongs."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import random
from collections.abc import AsyncIterator, Sequence
from typing import Any

from holdfast.base.errors import HoldfastError
from holdfast.runtime.link import Link
from holdfast.runtime.transport import TcpTransport
from holdfast.wire.frames import OpenHeaders, Pong

_SEEDS = itertools.count(1)


class Peer:
    """A worker as a second caller sees it."""

    def __init__(self, link: Link):
        self._link = link

    async def pong(self) -> Pong:
        """Return what the worker says about itself now: ``progress``, ``load``, ``state``."""
        answer: asyncio.Future[Pong] = asyncio.get_running_loop().create_future()
        self._link.on_pong = lambda event: None if answer.done() else answer.set_result(event)
        self._link.ping()
        async with asyncio.timeout(10):
            return await answer

    async def idle(self, within: float = 10.0) -> None:
        """Wait until the engine works on nothing."""
        async with asyncio.timeout(within):
            while True:
                pong = await self.pong()
                if not (pong.progress.in_flight or pong.load.running or pong.load.waiting):
                    return
                await asyncio.sleep(0.01)

    async def tell(self, do: str, **how: Any) -> dict[str, Any]:
        """Command the mock engine; see `engines.mock.misbehaviour.Order`."""
        call = _Call()
        self._link.open("control", OpenHeaders(request_id="control"), json.dumps({"do": do, **how}).encode(), call)
        async with asyncio.timeout(10):
            return json.loads(await call.answer)


class _Call:
    """One answered message."""

    def __init__(self) -> None:
        self.answer: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()

    def on_accept(self) -> None:
        pass

    def on_tokens(self, index: int, tokens: Sequence[int], logprobs: Any) -> None:
        raise AssertionError("tokens on the control endpoint")

    def on_data(self, index: int, payload: bytes) -> None:
        self.answer.set_result(bytes(payload))

    def on_refuse(self, error: HoldfastError) -> None:
        self.answer.set_exception(error)

    def on_end(self, finish: str, error: HoldfastError | None, cached_tokens: int) -> None:
        if error is not None and not self.answer.done():
            self.answer.set_exception(error)

    def on_broken(self, error: HoldfastError) -> None:
        if not self.answer.done():
            self.answer.set_exception(error)


@contextlib.asynccontextmanager
async def peer(address: str) -> AsyncIterator[Peer]:
    """Connect to a worker for the length of the block."""
    link = Link(TcpTransport(), address, caller="e2e", rng=random.Random(next(_SEEDS)))
    await link.connect(10.0)
    try:
        yield Peer(link)
    finally:
        await link.close()
