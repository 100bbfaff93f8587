"""One stream: a choice of a request, from its plan to its one terminal event, over any number of attempts.

Attempts are made by its `driver`. Tokens do not pass through that; they come from the connection's read callback
(`attempt`), wait in ``pending`` until the read is done, and leave through `deliver`. Prompt and generated ids
stay apart for ever.

Must never encode text or know HTTP: the `Output` does.
"""

from __future__ import annotations

import asyncio
import logging
from array import array
from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

from holdfast.base.errors import Cancelled, DeadlineExceeded, HoldfastError, InternalError, StreamIncomplete
from holdfast.requests.attempt import Attempt
from holdfast.requests.driver import Driver
from holdfast.requests.flusher import NOTHING
from holdfast.requests.migration import MigrationType
from holdfast.requests.need import Need
from holdfast.requests.plan import Ending, Plan
from holdfast.requests.states import NEXT, State, check
from holdfast.runtime.streams import Logprobs
from holdfast.telemetry.context import bound
from holdfast.telemetry.rhythm import Rhythm
from holdfast.wire.caller_stream import CallerStream

if TYPE_CHECKING:
    from holdfast.requests.express import Track
    from holdfast.requests.service import Services

log = logging.getLogger(__name__)

CONTEXT_SLACK = 8
"""Tokens by which an engine's idea of its full context may differ from its card's."""
_LEVELS = {"failed": logging.WARNING, "expired": logging.WARNING, "rejected": logging.DEBUG}
TRACK_AFTER = 2
"""Tokens of an attempt after which a track is worth making."""
GO_ON = -1
"""What `Output.deliver` returns while no stop string has matched."""


class Client(Protocol):
    """Whoever takes the bytes in the end."""

    @property
    def blocked_since(self) -> float | None:
        """Loop time since which it takes none; None: it does."""


class Output(Protocol):
    """Where a stream's tokens go: text, encoding and the client's connection."""

    @property
    def client(self) -> Client:
        """The same one for the whole life of the stream."""

    def accepted(self, worker: str) -> None:
        """The first worker (its instance id) owns the stream. Called once."""

    def deliver(self, tokens: list[int], logprobs: Logprobs | None) -> int:
        """Take new tokens; return `GO_ON`, or how many of them count because a stop string matched."""

    def ended(self, ending: Ending) -> None:
        """The one terminal event."""


class Generation:
    """See the module. Created per choice; `run` once; `cancel` any time."""

    __slots__ = (
        "_came", "_client", "_doubted", "_end", "_generated", "_observer", "_output", "attempt", "born", "closing",
        "count", "delivered", "dirty", "driver", "ended", "expires", "express", "flusher", "longest", "loop", "pending",
        "pending_logprobs", "plan", "rhythm", "seen", "seen_at", "started_at", "state", "timeline", "track", "worker",
    )  # fmt: skip

    def __init__(self, plan: Plan, output: Output, services: Services):
        self.plan = plan
        self._output = output
        self._client = output.client
        self._observer = services.observer
        self.flusher = services.flusher
        self.longest = plan.stop.max_tokens
        self.state: State = "received"
        self.loop = asyncio.get_running_loop()
        """Asked for once: each question is a system call in Python 3.11."""
        self.started_at = self.loop.time()
        total = plan.deadlines.total
        self.expires = self.started_at - plan.prepared_seconds + total if total else 0.0
        """The request's own time began when it came, not when its model's files were there."""
        self._generated: array[int] = array("I")
        self.pending: list[int] = NOTHING
        """Ids that have arrived and not been delivered; replaced, not filled, while it is empty."""
        self.pending_logprobs: Logprobs = []
        self.count = 0
        """Output index of the next token: generated plus pending."""
        self.delivered = 0
        self.dirty = False
        self.closing = False
        """The worker has said how it ended: nothing comes after what is pending."""
        self.ended: Ending | None = None
        self.attempt: Attempt | None = None
        self.worker = ""
        """Instance id of the latest attempt."""
        self.seen = -1
        """Count at the deadline keeper's last look, and since when it stands there."""
        self.seen_at = 0.0
        self.born = services.flusher.clock()
        """Nanoseconds of telemetry's stopwatch, from which the timeline counts."""
        self.rhythm = Rhythm()
        self._came = self.rhythm.ticks.append
        self.timeline: list[tuple[float, str, str]] = []
        """(seconds since start, event, detail), a handful per attempt."""
        self.express: Callable[[Attempt], Track | None] | None = None
        """Makes a track for an attempt (`requests.express`); set by an output whose events are plain."""
        self.track: Track | None = None
        """Of the present attempt."""
        self.driver = Driver(self, services)
        self._end: tuple[str, int] | None = None
        self._doubted = -1

    async def run(self) -> None:
        """Drive the stream to its end. Returns after the terminal event; raises nothing of its own."""
        await self.driver.run()

    # tokens

    def deliver(self) -> None:
        """Hand collected tokens to the output, then the end, if it is there; hot path.

        Call it also when a blocked client takes bytes again.
        """
        self.dirty = False
        if self.ended is not None or self._client.blocked_since is not None:
            return
        tokens = self.pending
        if tokens:
            self.pending = NOTHING
            logprobs = None
            if self.pending_logprobs:
                logprobs, self.pending_logprobs = self.pending_logprobs, []
            if self.count > self.longest:
                tokens, logprobs = self._cut(tokens, logprobs)
            self._came(self.flusher.tick)
            if self.state == "accepted":
                self._begin_streaming()
            number = len(tokens)
            delivered = self.delivered = self.delivered + number
            try:
                if number == 1:
                    self.generated.append(tokens[0])
                else:
                    self.rhythm.burst(number)
                    self.generated.fromlist(tokens)
                used = self._output.deliver(tokens, logprobs)
            except Exception as error:
                self._fault("take tokens", error)
                return
            if used >= 0:
                self.delivered = delivered + used - number
                self._finish("stop")
                return
            attempt = self.attempt
            if attempt is not None and delivered > attempt.refill_at:
                attempt.grant_credit()
                self._observer.progressed(self)
            if self.express is not None and attempt is not None:
                self._ride(attempt)
        if self._end is not None:
            self._finish(self._end[0])

    def _ride(self, attempt: Attempt) -> None:
        """Let tokens take the short way from the next one on, up to the next that needs us."""
        track = self.track
        if track is None or track.attempt is not attempt:
            handle, take = attempt.handle, self.flusher.take
            if attempt.watched or attempt.scored or self.count - attempt.base < TRACK_AFTER or self.express is None:
                return
            self._leave_track()
            track = self.track = self.express(attempt) if take is not None else None
            if track is None or take is None or not isinstance(handle, CallerStream):
                self.express = None
                return
            handle.ride(track, take)
        track.ride(min(attempt.refill_at, self.longest))

    def _leave_track(self) -> None:
        if self.track is not None:
            self._generated.frombytes(self.track.fresh())
            self.track = None

    def tear(self) -> None:
        """The short way has failed in the middle of a token."""
        self._fault("take tokens", None)

    def _begin_streaming(self) -> None:
        self.enter("streaming")
        if self.attempt is not None:
            self.driver.prompt_computed(self.attempt)
        if not self.delivered:
            self.note("first token")
            self._observer.first_token(self)

    def _cut(self, tokens: list[int], logprobs: Logprobs | None) -> tuple[list[int], Logprobs | None]:
        """Drop what a worker sent over the limit."""
        self.count = self.longest
        room = self.count - self.delivered
        return tokens[:room], logprobs[:room] if logprobs is not None else None

    @property
    def generated(self) -> array[int]:
        """Ids that have been delivered to the output."""
        if self.track is not None:
            self._generated.frombytes(self.track.fresh())
        return self._generated

    @generated.setter
    def generated(self, ids: array[int]) -> None:
        self._generated = ids

    def generated_bytes(self) -> bytes:
        """Return everything generated so far, delivered or not, as little-endian u32."""
        if not self.pending:
            return self.generated.tobytes()
        return (self.generated + array("I", self.pending)).tobytes()

    # what attempts report

    def was_accepted(self, attempt: Attempt) -> None:
        """A worker owns the stream."""
        first = self.driver.was_accepted()
        self.enter("accepted")
        self.note("accepted")
        if first:
            try:
                self._output.accepted(attempt.placed.worker.instance)
            except Exception as error:
                self._fault("begin", error)
                return
        self._observer.accepted(self, first)

    def doubt(self, finish: str) -> HoldfastError | None:
        """Return why an end cannot be the truth, or None. An early end is a broken stream, and migratable.

        Close to the end of the context a second worker that ends at the same place with ``length`` is believed: how
        many tokens fit is the engine's to say.
        """
        if finish == "length":
            left = self.plan.context_length - self.plan.prompt_length - self.count
            if self._full or (left <= CONTEXT_SLACK and self._doubted == self.count):
                return None
            self._doubted = self.count
            return StreamIncomplete(
                f"the worker ended with 'length' after {self.count} of {self.plan.stop.max_tokens} tokens",
                tokens=self.count,
                max_tokens=self.plan.stop.max_tokens,
            )
        if finish not in ("stop", "done"):
            return StreamIncomplete(f"the worker ended the stream early ({finish or 'no reason'})", tokens=self.count)
        return None

    def worker_ended(self, finish: str, cached_tokens: int) -> None:
        """A proper end; delivered after the tokens before it."""
        self._end = (finish, cached_tokens)
        self.closing = True
        if not self.dirty:
            self.dirty = True
            self.flusher.streams.append(self)

    # ends

    def cancel(self, reason: str, error: HoldfastError | None = None) -> None:
        """End the stream because nobody wants it any more; idempotent. No attempt starts afterwards."""
        self._conclude("cancelled", "", error or Cancelled(f"Cancelled: {reason}.", reason=reason))

    def finish_with(self, error: HoldfastError) -> None:
        """End the stream with an error; idempotent."""
        history = self.driver.history
        state: State = "failed" if history.accepted or history.begun else "rejected"
        if isinstance(error, DeadlineExceeded):
            state = "expired"
        self._conclude(state, "", error)

    def _fault(self, what: str, error: Exception | None) -> None:
        with bound(self.plan.context):
            log.error("request %s: its output could not %s", self.plan.request_id, what, exc_info=error)
        self.finish_with(InternalError("The answer could not be written because of a fault in Holdfast."))

    def _finish(self, finish: str) -> None:
        self._conclude("done", "stop" if finish == "done" else finish, None)

    def _conclude(self, state: State, finish: str, error: HoldfastError | None) -> None:
        if self.ended is not None:
            return
        self.enter(state)
        self._leave_track()
        self.express = None
        attempt, self.attempt = self.attempt, None
        driver = self.driver
        self.ended = ending = Ending(
            state=state,
            finish=finish,
            error=error,
            completion_tokens=self.delivered,
            cached_tokens=min(self._end[1], self.plan.prompt_length) if self._end is not None else 0,
            attempts=driver.history.attempts,
            moves=tuple(driver.moves),
            join=driver.join,
        )
        self.note(state, finish or (error.code if error else ""))
        if error is not None:
            self._tell(state, error)
        if attempt is not None:
            if state == "done":
                attempt.placed.worker.report_success()
            attempt.kill(state)
            attempt.release()
        else:
            driver.interrupt()
        try:
            self._output.ended(ending)
        except Exception:
            with bound(self.plan.context):
                log.exception("request %s: its output could not be ended", self.plan.request_id)
        self._observer.ended(self, ending)

    def _tell(self, state: State, error: HoldfastError) -> None:
        """Log an end that is no success: rejections quietly, for there may be thousands a second."""
        level = _LEVELS.get(state, logging.INFO)
        if log.isEnabledFor(level):
            facts = {"cause": error.code, "tokens": self.delivered, "attempts": self.driver.history.attempts}
            with bound(self.plan.context):
                log.log(level, "choice %d %s: %s", self.plan.choice, state, error.message, extra=facts)

    def complete(self, error: HoldfastError) -> bool:
        """Return whether nothing is missing but the end: a worker that died after its last token has done its work."""
        if self._end is not None:
            return True
        if not self.lacks_only_the_end:
            return False
        self.note("complete", f"{error.code} after the last token")
        self.worker_ended("stop" if self._ends_terminal() else "length", 0)
        self.loop.call_soon(self.flusher.flush)
        return True

    @property
    def lacks_only_the_end(self) -> bool:
        """Whether all tokens have come."""
        return self.count > 0 and (self._full or self._ends_terminal())

    @property
    def _full(self) -> bool:
        """Whether there is no room for another token."""
        plan = self.plan
        return self.count >= plan.stop.max_tokens or plan.prompt_length + self.count >= plan.context_length

    def _ends_terminal(self) -> bool:
        last = self.pending[-1] if self.pending else (self.generated[-1] if self.generated else None)
        return last in self.plan.terminal_ids and self.count > self.plan.stop.min_tokens

    # bookkeeping

    def remaining_ms(self, now: float) -> int:
        """Return the milliseconds left for the whole request; 0: no bound."""
        return max(1, int((self.expires - now) * 1000)) if self.expires else 0

    @property
    def migration_type(self) -> MigrationType:
        """Which kind of move the next attempt is."""
        return self.driver.migration_type

    @property
    def blocked_since(self) -> float | None:
        """Since when the client takes no bytes."""
        return self._client.blocked_since

    @property
    def need(self) -> Need:
        """What it needs of its next worker."""
        return self.driver.need

    def note(self, event: str, detail: str = "") -> None:
        """Add to the timeline."""
        self.timeline.append(((self.flusher.clock() - self.born) / 1e9, event, detail))

    def enter(self, state: State) -> None:
        """Go on to a state that the table allows."""
        if state not in NEXT[self.state]:
            check(self.state, state)
        self.state = state
