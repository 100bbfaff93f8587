"""One canary request over the wire, the way a frontend's request goes: connect, greet, open, tokens, end.

Good means that tokens came and the stream finished normally. A worker that has no room, or leaves, says
nothing about its engine: that is neither good nor bad.

Must never decide what a result means for readiness.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Sequence
from typing import Any, Literal

import msgspec

from holdfast.base.errors import HoldfastError, WorkerDraining
from holdfast.base.ids import draw_request_id
from holdfast.engines.contract import GenerateRequest
from holdfast.health.payloads import HealthCheckPayload, request_of
from holdfast.runtime.link import Link
from holdfast.runtime.transport import Transport
from holdfast.wire.frames import OpenHeaders

ENDPOINT = "generate"
NORMAL = frozenset({"stop", "length"})
Kind = Literal["good", "bad", "unclear"]


class ProbeResult(msgspec.Struct, frozen=True):
    """What a probe found."""

    kind: Kind
    why: str = ""
    """The cause when it is not good, with what was measured."""
    tokens: int = 0
    refused: bool = False
    """The engine calls the payload itself wrong."""


Announce = Callable[[str, bool], None]
"""(request id, True before it is sent and False when it is over): lets the worker tell canaries from users."""


class Probe:
    """Sends canaries to one worker.

    Args:
        transport: how to connect.
        address: as the worker publishes it.
        instance: who must answer there.
        epoch: which start of it.
        payload: what to ask for.
        model: name that the worker serves.
        rng: for request ids and handshakes.
        secret: shared secret; empty: none.
        ranks: data-parallel ranks of the engine; they are asked in turn.
        announce: told about each canary.
    """

    def __init__(
        self,
        transport: Transport,
        address: str,
        *,
        instance: str,
        epoch: int,
        payload: HealthCheckPayload,
        model: str,
        rng: random.Random,
        secret: bytes = b"",
        ranks: int = 1,
        announce: Announce = lambda _request, _begins: None,
    ):
        self.address = address
        self.payload = payload
        self._transport, self._secret, self._rng = transport, secret, rng
        self._instance, self._epoch = instance, epoch
        self._model = model
        self._ranks = ranks
        self._rank = -1
        self._announce = announce

    async def send(self, timeout: float) -> ProbeResult:  # noqa: ASYNC109
        """Send one canary and wait for its end, ``timeout`` seconds in all."""
        request = self._request()
        self._announce(request.request_id, True)
        link = Link(
            self._transport,
            self.address,
            caller="canary",
            rng=self._rng,
            secret=self._secret,
            instance=self._instance,
            epoch=self._epoch,
        )
        try:
            result = await self._ask(link, request, timeout)
        finally:
            await link.close()
            self._announce(request.request_id, False)
        if result.refused and self.payload.overridden:
            self.payload.reject_override(result.why)
            return ProbeResult("unclear", result.why)
        return result

    def _request(self) -> GenerateRequest:
        rank = None
        if self._ranks > 1:
            rank = self._rank = (self._rank + 1) % self._ranks
        request_id = draw_request_id(self._rng)
        return request_of(self.payload.to_dict(), model=self._model, request_id=request_id, rank=rank)

    async def _ask(self, link: Link, request: GenerateRequest, timeout: float) -> ProbeResult:  # noqa: ASYNC109
        answer = _Answer(asyncio.get_running_loop().create_future())
        try:
            async with asyncio.timeout(timeout):
                await link.connect(timeout)
                headers = OpenHeaders(request_id=request.request_id, remaining_ms=int(timeout * 1e3))
                link.open(ENDPOINT, headers, msgspec.msgpack.encode(request), answer)
                return await answer.over
        except TimeoutError:
            return ProbeResult("bad", answer.so_far(timeout), answer.tokens)
        except HoldfastError as error:
            return _failed(error)


class _Answer:
    """The canary's stream."""

    __slots__ = ("accepted", "over", "tokens")

    def __init__(self, over: asyncio.Future[ProbeResult]):
        self.over = over
        self.accepted = False
        self.tokens = 0

    def so_far(self, bound: float) -> str:
        """Return how far it came within the bound."""
        how = "accepted, no token" if self.accepted else "not accepted"
        return f"the canary was not over after {bound:g} s ({f'{self.tokens} tokens' if self.tokens else how})"

    def on_accept(self) -> None:
        self.accepted = True

    def on_tokens(self, index: int, tokens: Sequence[int], logprobs: Any) -> None:  # noqa: ARG002
        self.tokens += len(tokens)

    def on_data(self, index: int, payload: bytes) -> None:
        """Not what this endpoint sends; an end without tokens says so."""

    def on_refuse(self, error: HoldfastError) -> None:
        self._end(_failed(error))

    def on_end(self, finish: str, error: HoldfastError | None, cached_tokens: int) -> None:  # noqa: ARG002
        if error is not None:
            self._end(_failed(error))
        elif finish not in NORMAL:
            self._end(ProbeResult("bad", f"the canary ended with {finish!r}", self.tokens))
        elif not self.tokens:
            self._end(ProbeResult("bad", "the canary ended without a token"))
        else:
            self._end(ProbeResult("good", tokens=self.tokens))

    def on_broken(self, error: HoldfastError) -> None:
        self._end(_failed(error))

    def _end(self, result: ProbeResult) -> None:
        if not self.over.done():
            self.over.set_result(result)


def _failed(error: HoldfastError) -> ProbeResult:
    unclear = error.fault == "capacity" or isinstance(error, WorkerDraining)
    why = f"the canary failed with {error.code}: {error.message}"
    return ProbeResult("unclear" if unclear else "bad", why, refused=error.fault in ("caller", "request"))
