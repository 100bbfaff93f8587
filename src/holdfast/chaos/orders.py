"""Commands to a mock engine, over its worker's control endpoint: errors, silent stalls, early ends, slow steps.

The endpoint exists on loopback only, and only with an engine that obeys (`engines.mock.misbehaviour` has the words).
Must never be used on anything else.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from typing import Any

import msgspec

from holdfast.base.errors import HoldfastError
from holdfast.runtime.link import Link
from holdfast.runtime.transport import TcpTransport
from holdfast.wire.frames import OpenHeaders


async def order(
    address: str,
    command: dict[str, Any],
    *,
    rng: random.Random,
    secret: bytes = b"",
    timeout: float = 2.0,  # noqa: ASYNC109  the bound of the whole exchange
) -> dict[str, Any]:
    """Give one command, such as ``{"do": "hang", "seconds": 3}``; returns the engine's answer.

    Args:
        address: ``host:port`` of the worker.
        command: see `engines.mock.misbehaviour.Order`.
        rng: for the link's id.
        secret: shared secret; empty: none.
        timeout: seconds.

    Raises:
        HoldfastError: not reachable, or it does not obey.
        TimeoutError: no answer in time.
    """
    link = Link(TcpTransport(), address, caller="chaos", rng=rng, secret=secret)
    try:
        async with asyncio.timeout(timeout):
            await link.connect(timeout)
            call = _Call()
            link.open("control", OpenHeaders(request_id="chaos"), msgspec.json.encode(command), call)
            return dict(msgspec.json.decode(await call.answer))
    finally:
        await link.close()


class _Call:
    """A stream that is answered by one message."""

    def __init__(self) -> None:
        self.answer: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()

    def on_accept(self) -> None:
        """See `StreamHandler`."""

    def on_tokens(self, index: int, tokens: Sequence[int], logprobs: Any) -> None:
        """See `StreamHandler`; commands are not answered with tokens."""

    def on_data(self, index: int, payload: bytes) -> None:
        """See `StreamHandler`."""
        del index
        if not self.answer.done():
            self.answer.set_result(bytes(payload))

    def on_refuse(self, error: HoldfastError) -> None:
        """See `StreamHandler`."""
        self._fail(error)

    def on_end(self, finish: str, error: HoldfastError | None, cached_tokens: int) -> None:
        """See `StreamHandler`."""
        del finish, cached_tokens
        if error is not None:
            self._fail(error)

    def on_broken(self, error: HoldfastError) -> None:
        """See `StreamHandler`."""
        self._fail(error)

    def _fail(self, error: HoldfastError) -> None:
        if not self.answer.done():
            self.answer.set_exception(error)
