"""One attempt of one stream on one worker: the receiving end of the wire.

Everything here runs in the connection's read callback. An attempt that its stream has abandoned is deaf:
whatever a thawed worker still says is dropped (promise P1). Must never decide what happens next.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import msgspec

from holdfast.base.errors import HoldfastError, StreamIncomplete
from holdfast.base.limits import INITIAL_CREDIT_TOKENS
from holdfast.engines.contract import GenerateRequest
from holdfast.requests.poison import is_death
from holdfast.routing.claims import ANY_RANK
from holdfast.runtime.streams import NO_LOGPROB, Logprobs, StreamHandle
from holdfast.telemetry.context import attempt_traceparent
from holdfast.wire.frames import OpenHeaders

if TYPE_CHECKING:
    from holdfast.requests.generation import Generation
    from holdfast.requests.need import Placed
    from holdfast.requests.prefill_leg import PrefillLeg

_encode = msgspec.msgpack.Encoder().encode
LEAST_CREDIT = 64
"""Tokens of a stream whose tokens are heavy that may be on their way."""


class Attempt:
    """See the module; created by `Generation`, which reads its fields."""

    __slots__ = (
        "accepted", "accepted_at", "base", "generation", "handle", "leg", "number", "placed", "proof", "refill_at",
        "result", "scored", "sent", "started_at", "watched", "window",
    )  # fmt: skip

    def __init__(self, generation: Generation, placed: Placed, number: int, now: float, leg: PrefillLeg | None = None):
        self.generation = generation
        self.placed = placed
        self.leg = leg
        """Who computes its prompt; None: its own worker does."""
        self.number = number
        self.base = generation.count
        """Output index at which this attempt starts."""
        self.started_at = now
        self.accepted = False
        self.accepted_at = 0.0
        self.sent = False
        """The worker may have got it."""
        self.watched: bool = number > 1 or bool(generation.need.suspicion.deaths)
        """Whether the driver wants to know about new tokens: until there are enough of them."""
        self.proof = generation.need.suspicion.proof
        """New tokens that count as progress."""
        self.scored = generation.plan.sampling.logprobs is not None
        """Each token has a log probability, or a mark where it would be."""
        self.window = _window(generation.plan.sampling.logprobs or 0)
        """Tokens that the worker may be ahead of the client."""
        self.refill_at = self.base + self.window // 2
        """When the client has taken so many tokens of the stream, more are allowed."""
        self.result: asyncio.Future[HoldfastError | None] = generation.loop.create_future()
        """None: the stream has ended, whichever way; an error: this attempt failed."""
        self.handle: StreamHandle | None = None

    def start(self) -> None:
        """Open the stream on the worker."""
        generation = self.generation
        plan = generation.plan
        headers = OpenHeaders(
            request_id=plan.request_id,
            label=plan.label,
            attempt=self.number,
            choice=plan.choice,
            traceparent=attempt_traceparent(plan.traceparent, plan.request_id, plan.choice, self.number),
            remaining_ms=generation.remaining_ms(self.started_at),
            priority=plan.priority,
            tracestate=plan.context.tracestate if plan.context is not None else "",
        )
        payload = GenerateRequest(
            request_id=plan.request_id,
            model=plan.model,
            prompt_ids=plan.prompt_ids,
            sampling=plan.sampling,
            stop=plan.stop,
            generated_ids=generation.generated_bytes(),
            choice=plan.choice,
            attempt=self.number,
            priority=plan.priority,
            cache_salt=plan.cache_salt,
            extra=self._extra(),
            leg="decode" if self.leg is not None else "aggregated",
            handoff=self.leg.handoff if self.leg is not None else None,
        )
        self.sent = True
        try:
            self.handle = self.placed.worker.open(
                "generate", headers, _encode(payload), self, credit=self.window, first_index=self.base
            )
            self.placed.claim.sent(self.handle.id)
        except HoldfastError as error:
            self.sent = False
            self.fail(error)

    def _extra(self) -> dict[str, object]:
        extra = dict(self.generation.plan.extra)
        if self.placed.rank != ANY_RANK:
            extra["data_parallel_rank"] = self.placed.rank
        return extra

    # what the wire says

    def on_accept(self) -> None:
        """The worker owns the stream."""
        if self.generation.attempt is self and not self.accepted:
            self.accepted = True
            self.accepted_at = self.generation.loop.time()
            self.generation.was_accepted(self)
            if self.leg is not None:
                self.leg.decode_accepted()

    def on_tokens(self, index: int, tokens: list[int], logprobs: Logprobs | None) -> None:
        """New tokens, in a list that is ours from now on; hot path."""
        generation = self.generation
        if generation.attempt is not self:
            return
        at = generation.count
        if index != at:
            skip = at - index
            if skip < 0:
                self.fail(StreamIncomplete(f"token {index} came where token {at} was due", expected=at, got=index))
                self.kill("gap")
                return
            tokens = tokens[skip:]
            if not tokens:
                return
            logprobs = logprobs[skip:] if logprobs is not None else None
        count = at + len(tokens)
        if self.watched:
            generation.driver.moved_on(self, count - self.base)
        generation.count = count
        if generation.pending:
            generation.pending += tokens
        else:
            generation.pending = tokens
        if logprobs is not None:
            generation.pending_logprobs.extend(logprobs)
        elif self.scored:
            generation.pending_logprobs.extend([NO_LOGPROB] * len(tokens))
        if not generation.dirty:
            generation.dirty = True
            generation.flusher.streams.append(generation)

    def on_data(self, index: int, payload: bytes) -> None:
        """Messages do not belong on a token stream."""
        self.fail(StreamIncomplete(f"a message ({len(payload)} bytes, index {index}) came on a token stream"))
        self.kill("protocol")

    def on_refuse(self, error: HoldfastError) -> None:
        """The worker declined."""
        self.fail(error)

    def on_end(self, finish: str, error: HoldfastError | None, cached_tokens: int) -> None:
        """The worker says that the stream is over; its last tokens are delivered first."""
        generation = self.generation
        if generation.attempt is not self:
            return
        self.handle = None
        error = error or generation.doubt(finish)
        if error is not None:
            self.fail(error, died=is_death(error, whole_stream=False))
            return
        generation.worker_ended(finish, cached_tokens)

    def on_broken(self, error: HoldfastError) -> None:
        """The stream stopped without an end."""
        self.handle = None
        self.fail(error, died=is_death(error, whole_stream=True))

    # what its generation does with it

    def fail(self, error: HoldfastError, *, died: bool = False) -> None:
        """Tell the stream's driver; only the first word counts, and none after the stream let go.

        Args:
            error: what happened.
            died: the worker is lost to all of its streams.
        """
        generation = self.generation
        if generation.attempt is not self or self.result.done() or generation.complete(error):
            return
        generation.attempt = None
        if died:
            generation.driver.lost_worker(self)
        self.result.set_result(error)

    def release(self) -> None:
        """The stream has ended: let its driver go."""
        if not self.result.done():
            self.result.set_result(None)

    def kill(self, reason: str) -> None:
        """Stop the worker's work at once; harmless when the stream is over."""
        handle, self.handle = self.handle, None
        if handle is not None:
            handle.kill(reason)

    def grant_credit(self) -> None:
        """The client has taken most of what was allowed: allow more."""
        if self.handle is not None:
            self.handle.credit(self.window)
            self.refill_at += self.window

    @property
    def progressed(self) -> bool:
        """Whether this attempt brought enough new tokens."""
        return self.generation.count - self.base >= self.proof


def _window(alternatives: int) -> int:
    """Return the credit of a stream; a token with alternatives weighs as much as so many tokens more."""
    return max(LEAST_CREDIT, INITIAL_CREDIT_TOKENS // (1 + alternatives))
