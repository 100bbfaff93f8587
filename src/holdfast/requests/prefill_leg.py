"""One prefill leg: a prompt on its way through a prefill worker, as the stream that wants it sees it.

It begins with a call to the worker's endpoint ``prefill`` and lives no longer than the attempt that it was made for.
In the style ``after_prefill`` its answer is the hand-off, and the call stays open afterwards: as long as it does the
worker keeps the blocks. In the style ``rendezvous`` it begins as soon as the decode worker has
accepted: nothing is computed for a stream that nobody takes. From then on a leg that fails fails its attempt.
Tokens that a prefill engine makes on its way are nobody's and are dropped.

Everything here runs in the connection's read callback or a timer. Must never decide what happens next.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import msgspec

from holdfast.base.errors import AcceptOverdue, HandoffLost, HoldfastError, StreamIncomplete, WorkerStalled
from holdfast.engines.contract import GenerateRequest
from holdfast.engines.handoff import KvHandoff, digest_of
from holdfast.requests.deadlines import LATE, UPLOAD_SECONDS_PER_TOKEN
from holdfast.requests.poison import is_death
from holdfast.routing.claims import ANY_RANK
from holdfast.runtime.streams import Logprobs, StreamHandle
from holdfast.telemetry.context import attempt_traceparent
from holdfast.wire.frames import OpenHeaders

if TYPE_CHECKING:
    from holdfast.models.card import ModelCard
    from holdfast.requests.attempt import Attempt
    from holdfast.requests.generation import Generation
    from holdfast.requests.need import Placed

LOST_GRACE = 1.0
"""Seconds that a decode worker gets to begin after whoever has the blocks is lost: they may have come already."""
_encode = msgspec.msgpack.Encoder().encode
_HANDOFF = msgspec.msgpack.Decoder(KvHandoff)


class PrefillLeg:
    """See the module; created by `prefill.Prefilling`, which reads its fields."""

    __slots__ = (
        "_timers", "accepted", "attempt", "began", "begin", "generation", "handle", "handoff", "lost_at", "number",
        "placed", "ready_at", "rendezvous", "result",
    )  # fmt: skip

    def __init__(self, generation: Generation, placed: Placed, number: int, now: float):
        self.generation = generation
        self.placed = placed
        self.number = number
        """Of the attempt that it is for."""
        self.began = now
        self.accepted = False
        self.handoff: KvHandoff | None = None
        self.rendezvous = False
        """Both legs are under way side by side, the decode leg first."""
        self.ready_at = 0.0
        """When the prompt was computed."""
        self.lost_at = 0.0
        """When whoever keeps the blocks was lost."""
        self.attempt: Attempt | None = None
        """The decode leg, once it has begun."""
        self.result: asyncio.Future[HoldfastError | None] = generation.loop.create_future()
        """None: the prompt is computed."""
        self.handle: StreamHandle | None = None
        self.begin: Callable[[], None] | None = None
        """Opens it, once the decode worker has accepted (``rendezvous``)."""
        self._timers: list[asyncio.TimerHandle] = []

    def meet(self, card: ModelCard, rank: int, room: int) -> None:
        """Make the hand-off of the style ``rendezvous``: both legs get it."""
        prompt, generated = self.generation.plan.prompt_ids, self.generation.generated_bytes()
        host, _, port = card.rendezvous.rpartition(":")
        self.rendezvous = True
        self.placed.rank = rank if card.data_parallel_size > 1 else ANY_RANK
        self.handoff = KvHandoff(
            card.handoff,
            "rendezvous",
            tokens=(len(prompt) + len(generated)) // 4,
            digest=digest_of(prompt, generated),
            source=self.placed.worker.instance,
            fingerprint=card.fingerprint,
            params={
                "bootstrap_host": host.strip("[]"),
                "bootstrap_port": int(port) if port.isdecimal() else 0,
                "bootstrap_room": room,
                "prefill_rank": rank,
            },
        )

    def open(self, accept: float, total: float, knob: str) -> None:
        """Call the worker.

        Args:
            accept: seconds until it must have accepted; 0: no bound.
            total: seconds until the prompt must be computed; 0: no bound.
            knob: what ``accept`` was set by.
        """
        generation = self.generation
        plan = generation.plan
        headers = OpenHeaders(
            request_id=plan.request_id,
            label=plan.label,
            attempt=self.number,
            choice=plan.choice,
            leg="prefill",
            traceparent=attempt_traceparent(plan.traceparent, plan.request_id, plan.choice, self.number),
            remaining_ms=generation.remaining_ms(self.began),
            priority=plan.priority,
            tracestate=plan.context.tracestate if plan.context is not None else "",
        )
        prompt = GenerateRequest(
            plan.request_id,
            plan.model,
            plan.prompt_ids,
            plan.sampling,
            plan.stop,
            generation.generated_bytes(),
            plan.choice,
            self.number,
            plan.priority,
            cache_salt=plan.cache_salt,
            extra=self._extra(),
            leg="prefill",
            handoff=self.handoff,
        )
        try:
            self.handle = self.placed.worker.open("prefill", headers, _encode(prompt), self)
            self.placed.claim.sent(self.handle.id)
        except HoldfastError as error:
            self._fail(error)
            return
        if accept:
            bound = accept + plan.prompt_length * UPLOAD_SECONDS_PER_TOKEN
            self._watch(bound, lambda: None if self.accepted else self._not_accepted(accept, knob))
        if total:
            self._watch(total, lambda: self._fail(self._overdue(total)))

    def _extra(self) -> dict[str, Any]:
        extra: dict[str, Any] = dict(self.generation.plan.extra)
        if self.placed.rank != ANY_RANK:
            extra["data_parallel_rank"] = self.placed.rank
        return extra

    # -- deadlines -------------------------------------------------------------------------------------

    def _watch(self, seconds: float, overdue: Any) -> None:
        loop = self.generation.loop
        due = loop.time() + seconds

        def look() -> None:
            if self.result.done():
                return
            if loop.time() - due > LATE:
                self._watch(seconds, overdue)  # this process itself stood still: that is not the worker's doing
            else:
                overdue()

        self._timers.append(loop.call_at(due, look))

    def _not_accepted(self, bound: float, knob: str) -> None:
        worker = self.placed.worker.instance
        why = f"Prefill worker {worker} did not accept within {bound:g} s ({knob})."
        self._fail(AcceptOverdue(why, stage="accept", bound_seconds=bound, knob=knob, worker=worker, hedged=True))

    def _overdue(self, bound: float) -> HoldfastError:
        worker = self.placed.worker.instance
        return WorkerStalled(
            f"Prefill worker {worker} did not hand over within {bound:g} s (DYN_PREFILL_TIMEOUT_SECS).",
            stage="prefill",
            bound_seconds=bound,
            knob="DYN_PREFILL_TIMEOUT_SECS",
            worker=worker,
        )

    def late(self, now: float, bound: float) -> HoldfastError | None:
        """Return why its decode leg, which has not begun to speak, waits for nothing; None: it may still begin.

        Args:
            now: loop time.
            bound: seconds from the hand-off (or the decode worker's accept) to the first token; 0: none.
        """
        source = self.placed.worker.instance
        if self.lost_at and now - self.lost_at > LOST_GRACE:
            return HandoffLost(f"Prefill worker {source} was lost before its blocks were taken.", worker=source)
        since = max(self.ready_at, self.attempt.accepted_at if self.attempt is not None else 0.0)
        if bound and self.ready_at and now - since > bound:
            return HandoffLost(
                f"The blocks of prefill worker {source} brought no token for {bound:g} s (DYN_HANDOFF_TIMEOUT_SECS).",
                worker=source,
                bound_seconds=bound,
                knob="DYN_HANDOFF_TIMEOUT_SECS",
            )
        return None

    def decode_accepted(self) -> None:
        """The decode worker waits for the blocks now."""
        begin, self.begin = self.begin, None
        if begin is not None:
            self.began = self.generation.loop.time()
            begin()

    # -- what the wire says ----------------------------------------------------------------------------

    def on_accept(self) -> None:
        """The worker computes the prompt."""
        if not self.accepted and not self.result.done():
            self.accepted = True
            self.generation.driver.prefill_accepted()

    def on_tokens(self, index: int, tokens: list[int], logprobs: Logprobs | None) -> None:
        """Nobody's: the decode leg brings them all."""

    def on_data(self, index: int, payload: bytes) -> None:  # noqa: ARG002 - the protocol's signature
        """The hand-off."""
        if self.result.done() or self.rendezvous:
            return
        try:
            self.handoff = _HANDOFF.decode(payload)
        except msgspec.DecodeError as error:
            self._fail(StreamIncomplete(f"prefill worker {self.placed.worker.instance} sent no hand-off: {error}"))
            return
        self._ready()

    def on_refuse(self, error: HoldfastError) -> None:
        """The worker declined."""
        self.handle = None
        self._fail(error)

    def on_end(self, finish: str, error: HoldfastError | None, cached_tokens: int) -> None:  # noqa: ARG002 - as above
        """Computed (``rendezvous``), failed, or the blocks are not kept any longer."""
        self.handle = None
        if self.rendezvous and error is None and finish in ("stop", "length"):
            self._ready()
            self.placed.release(0)
            return
        if error is None:
            error = StreamIncomplete(f"the prefill leg ended early ({finish or 'no reason'})")
        self._over(error, died=is_death(error, whole_stream=False))

    def on_broken(self, error: HoldfastError) -> None:
        """The worker, or the way to it, is lost."""
        self.handle = None
        self._over(error, died=is_death(error, whole_stream=True))

    def _over(self, error: HoldfastError, *, died: bool) -> None:
        if self.result.done():
            if not self.rendezvous:
                self.lost_at = self.lost_at or self.generation.loop.time()
            return
        if died:
            self.generation.driver.lost_prefill(self)
        self._fail(error)

    def _ready(self) -> None:
        if self.result.done():
            return
        self.ready_at = self.generation.loop.time()
        self.placed.claim.computed()
        self._unwatch()
        self.result.set_result(None)

    def _fail(self, error: HoldfastError) -> None:
        """Only the first word counts."""
        if self.result.done():
            return
        self._unwatch()
        self.result.set_result(error)
        attempt = self.attempt
        if attempt is not None:
            attempt.fail(HandoffLost(f"The prefill leg failed: {error.message}", worker=self.placed.worker.instance))

    # -- ends ------------------------------------------------------------------------------------------

    def taken(self) -> None:
        """The decode leg speaks: nobody needs what is kept any more."""
        if not self.rendezvous:
            self.close("taken")

    def close(self, reason: str) -> None:
        """Let the worker go, and everything that was counted; idempotent."""
        self._unwatch()
        self.begin = None
        handle, self.handle = self.handle, None
        if handle is not None:
            handle.kill(reason)
        self.placed.release(0)
        if not self.result.done():
            self.result.cancel()

    def _unwatch(self) -> None:
        for timer in self._timers:
            timer.cancel()
        self._timers.clear()
