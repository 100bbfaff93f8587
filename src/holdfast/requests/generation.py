"""One stream: a choice of a request, from its plan to its one terminal event, over any number of attempts.

The driver (`run`) is a short loop: find a worker, make an attempt, judge its failure. Tokens do not pass
through it; they come from the connection's read callback (`attempt`), wait in ``pending`` until the read is
done, and leave through `deliver`. Prompt and generated ids stay apart for ever.

Must never encode text or know HTTP: the `Output` does.
"""

from __future__ import annotations

import asyncio
import logging
from array import array
from typing import TYPE_CHECKING, Protocol

from holdfast.base.errors import (
    AcceptOverdue,
    Cancelled,
    CapacityExhausted,
    DeadlineExceeded,
    HoldfastError,
    InternalError,
    StreamIncomplete,
)
from holdfast.requests.attempt import Attempt
from holdfast.requests.migration import History, MigrationType, judge, migration_type, record
from holdfast.requests.placement import Need, Placed
from holdfast.requests.plan import Ending, Join, Move, Plan
from holdfast.requests.states import State, check
from holdfast.runtime.streams import Logprobs

if TYPE_CHECKING:
    from holdfast.requests.service import Services

log = logging.getLogger(__name__)

GO_ON = -1
"""What `Output.deliver` returns while no stop string has matched."""


class Output(Protocol):
    """Where a stream's tokens go: text, encoding and the client's connection."""

    @property
    def blocked_since(self) -> float | None:
        """Loop time since which the client takes no bytes; None: it does."""

    def accepted(self, worker: str) -> None:
        """The first worker (its instance id) owns the stream. Called once."""

    def deliver(self, tokens: list[int], logprobs: Logprobs | None) -> int:
        """Take new tokens; return `GO_ON`, or how many of them count because a stop string matched."""

    def ended(self, ending: Ending) -> None:
        """The one terminal event."""


class Generation:
    """See the module. Created per choice; `run` once; `cancel` any time."""

    __slots__ = (
        "_driver", "_end", "_history", "_join", "_moves", "_output", "_services", "_stalled_at", "attempt", "count",
        "delivered", "dirty", "ended", "expires", "flusher", "generated", "need", "pending", "pending_logprobs", "plan",
        "seen", "seen_at", "started_at", "state", "timeline", "worker",
    )  # fmt: skip

    def __init__(self, plan: Plan, output: Output, services: Services):
        self.plan = plan
        self._output = output
        self._services = services
        self.flusher = services.flusher
        self.state: State = "received"
        self.started_at = asyncio.get_running_loop().time()
        self.expires = self.started_at + plan.deadlines.total if plan.deadlines.total else 0.0
        self.generated: array[int] = array("I")
        """Ids that have been delivered to the output."""
        self.pending: list[int] = []
        """Ids that have arrived and not been delivered."""
        self.pending_logprobs: Logprobs = []
        self.count = 0
        """Output index of the next token: generated plus pending."""
        self.delivered = 0
        self.dirty = False
        self.ended: Ending | None = None
        self.attempt: Attempt | None = None
        self.worker = ""
        """Instance id of the latest attempt."""
        self.seen = -1
        """Count at the deadline keeper's last look, and since when it stands there."""
        self.seen_at = 0.0
        self.timeline: list[tuple[float, str, str]] = []
        """(seconds since start, event, detail), a handful per attempt."""
        self.need = Need(plan.model)
        self._history = History()
        self._join: Join = "none"
        self._moves: list[Move] = []
        self._end: tuple[str, int] | None = None
        self._stalled_at = 0.0
        self._driver: asyncio.Task[None] | None = None

    # the driver

    async def run(self) -> None:
        """Drive the stream to its end. Returns after the terminal event; raises nothing."""
        self._driver = asyncio.current_task()
        self._services.deadlines.add(self)
        self._enter("placing")
        try:
            while self.ended is None:
                await self._one_attempt()
        except HoldfastError as error:
            self.finish_with(error)
        except asyncio.CancelledError:
            if self.ended is None:
                self.cancel("shutdown")
                raise
        except Exception:
            log.exception("request %s: fault in the request's driver", self.plan.request_id)
            self.finish_with(InternalError("The request failed because of a fault in Holdfast."))
        finally:
            self._services.deadlines.remove(self)
            self._driver = None

    async def _one_attempt(self) -> None:
        placed = await self._services.placement.find(self.need, self._wait_bound())
        try:
            if self.ended is not None:
                return
            attempt = self._begin(placed)
            try:
                error = await attempt.result
            finally:
                attempt.kill("superseded")
        finally:
            placed.release()
            if placed.trial is not None:
                self._services.placement.wake()
        if error is not None and self.ended is None:
            await self._after_failure(attempt, error)

    def _begin(self, placed: Placed) -> Attempt:
        now = asyncio.get_running_loop().time()
        self._history.attempts += 1
        self.worker = placed.worker.instance
        self._declare_join(placed)
        attempt = self.attempt = Attempt(self, placed, self._history.attempts, now)
        self._note("attempt", placed.worker.instance)
        self._enter("dispatched")
        self._services.observer.attempt_started(self)
        attempt.start()
        return attempt

    async def _after_failure(self, attempt: Attempt, error: HoldfastError) -> None:
        self._stalled_at = self._stalled_at or asyncio.get_running_loop().time()
        record(self._history, error, progressed=attempt.progressed)
        self._note("failed", f"{error.code} at token {self.count}")
        if not isinstance(error, AcceptOverdue):
            attempt.placed.worker.report_failure(error)
        self._remember(attempt.placed, error)
        verdict = judge(
            self._history,
            error,
            limit=self._services.settings.migration_limit,
            sequence_length=self.plan.prompt_length + self.count,
            max_length=self._services.settings.migration_max_seq_len,
        )
        if verdict.error is not None:
            raise verdict.error
        self._enter("migrating")
        self._moves.append(Move(error.code, self.count, 0.0))
        self._services.observer.migration_started(self, error)
        if not self._quick(error):
            await self._services.pacer.pass_through(self.started_at)
        if not verdict.free:
            await self._budget(error)

    def _quick(self, error: HoldfastError) -> bool:
        return not self._history.accepted and error.fault == "capacity"

    # tokens

    def deliver(self) -> None:
        """Hand collected tokens to the output, then the end, if it is there; hot path."""
        self.dirty = False
        if self.ended is not None or self._output.blocked_since is not None:
            return
        tokens = self.pending
        if tokens:
            self.pending = []
            logprobs = None
            if self.pending_logprobs:
                logprobs, self.pending_logprobs = self.pending_logprobs, []
            room = self.plan.stop.max_tokens - self.delivered
            if len(tokens) > room:
                tokens = tokens[:room]
                self.count = self.delivered + room
            if self.state != "streaming":
                self._enter("streaming")
            used = self._output.deliver(tokens, logprobs)
            self.generated.extend(tokens)
            self.delivered += len(tokens)
            if used >= 0:
                self.delivered += used - len(tokens)
                self._finish("stop")
                return
            attempt = self.attempt
            if attempt is not None and self.delivered + 1024 > attempt.credit_until:
                attempt.grant_credit(self.delivered)
        if self._end is not None:
            self._finish(self._end[0])
        elif self.delivered >= self.plan.stop.max_tokens:
            self._finish("stop" if self._ends_terminal() else "length")

    def generated_bytes(self) -> bytes:
        """Return everything generated so far, delivered or not, as little-endian u32."""
        if not self.pending:
            return self.generated.tobytes()
        return (self.generated + array("I", self.pending)).tobytes()

    # what attempts report

    def was_accepted(self, attempt: Attempt) -> None:
        """A worker owns the stream."""
        first = not self._history.accepted
        self._history.accepted = True
        self.need.started = True
        self._enter("accepted")
        if first:
            self._output.accepted(attempt.placed.worker.instance)
        self._services.observer.accepted(self, first)

    def moved_on(self, attempt: Attempt) -> None:
        """The first new token after a move, or of a stream on trial."""
        trial = attempt.placed.trial
        if trial is not None:
            trial.release()
            self._services.placement.wake()
        self._history.deaths_without_progress = 0
        self.need.suspect = False
        if self._stalled_at:
            gap = asyncio.get_running_loop().time() - self._stalled_at
            self._stalled_at = 0.0
            last = self._moves.pop()
            self._moves.append(Move(last.cause, self.count, gap))
            self._note("resumed", f"{gap * 1000:.1f} ms after the failure")
            self._services.observer.migrated(self, gap)

    def doubt(self, finish: str) -> HoldfastError | None:
        """Return why an end cannot be the truth, or None. An early end is a broken stream, and migratable."""
        if finish == "length":
            total = self.plan.prompt_length + self.count
            if self.count < self.plan.stop.max_tokens and total < self.plan.context_length:
                return StreamIncomplete(
                    f"the worker ended with 'length' after {self.count} of {self.plan.stop.max_tokens} tokens",
                    tokens=self.count,
                    max_tokens=self.plan.stop.max_tokens,
                )
        elif finish not in ("stop", "done"):
            return StreamIncomplete(f"the worker ended the stream early ({finish or 'no reason'})", tokens=self.count)
        return None

    def worker_ended(self, finish: str, cached_tokens: int) -> None:
        """A proper end; delivered after the tokens before it."""
        self._end = (finish, cached_tokens)
        if not self.dirty:
            self.dirty = True
            self.flusher.streams.append(self)

    # ends

    def cancel(self, reason: str, error: HoldfastError | None = None) -> None:
        """End the stream because nobody wants it any more; idempotent. No attempt starts afterwards."""
        self._conclude("cancelled", "", error or Cancelled(f"Cancelled: {reason}.", reason=reason))

    def finish_with(self, error: HoldfastError) -> None:
        """End the stream with an error; idempotent."""
        state: State = "failed" if self._history.accepted else "rejected"
        if isinstance(error, DeadlineExceeded):
            state = "expired"
        self._conclude(state, "", error)

    def _finish(self, finish: str) -> None:
        self._conclude("done", "stop" if finish == "done" else finish, None)

    def _conclude(self, state: State, finish: str, error: HoldfastError | None) -> None:
        if self.ended is not None:
            return
        self._enter(state)
        attempt, self.attempt = self.attempt, None
        cached = self._end[1] if self._end is not None else 0
        self.ended = ending = Ending(
            state=state,
            finish=finish,
            error=error,
            completion_tokens=self.delivered,
            cached_tokens=min(cached, self.plan.prompt_length),
            attempts=self._history.attempts,
            moves=tuple(self._moves),
            join=self._join,
        )
        self._note(state, finish or (error.code if error else ""))
        if attempt is not None:
            if state == "done":
                attempt.placed.worker.report_success()
            attempt.kill(state)
            attempt.release()
        elif self._driver is not None and self._driver is not asyncio.current_task():
            self._driver.cancel()
        try:
            self._output.ended(ending)
        finally:
            self._services.observer.ended(self, ending)

    def complete(self, error: HoldfastError) -> bool:
        """Return whether nothing is missing but the end: a worker that died after its last token has done its work."""
        if self._end is not None:
            return True
        if not self.count or (self.count < self.plan.stop.max_tokens and not self._ends_terminal()):
            return False
        self._note("complete", f"{error.code} after the last token")
        self.worker_ended("stop" if self._ends_terminal() else "length", 0)
        asyncio.get_running_loop().call_soon(self.flusher.flush)
        return True

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
        return migration_type(self._history)

    @property
    def blocked_since(self) -> float | None:
        """Since when the client takes no bytes."""
        return self._output.blocked_since

    def _wait_bound(self) -> float:
        bound = self.plan.deadlines.wait
        if self.expires:
            bound = min(bound, max(0.0, self.expires - asyncio.get_running_loop().time()))
        return bound

    async def _budget(self, error: HoldfastError) -> None:
        loop = asyncio.get_running_loop()
        until = loop.time() + self._wait_bound()
        while not self._services.budget.withdraw(loop.time()):
            hint = self._services.budget.wait_hint(loop.time())
            if loop.time() + hint > until:
                raise CapacityExhausted(
                    "The fleet's budget of repeated attempts is used up: workers fail faster than work gets done.",
                    retry_after=hint + 1.0,
                    layer="frontend",
                    knob="retry budget",
                    last_error=error.code,
                )
            await asyncio.sleep(max(0.01, hint))

    def _remember(self, placed: Placed, error: HoldfastError) -> None:
        need = self.need
        if error.fault == "capacity":
            need.refused[placed.worker.instance] = error
        else:
            need.avoid.add((placed.worker.instance, placed.worker.epoch))
        need.suspect = self._history.deaths_without_progress > 0

    def _declare_join(self, placed: Placed) -> None:
        card = placed.worker.card(self.plan.model)
        build = card.fingerprint if card is not None else ""
        if self.count and self._join != "declared":
            same = build == self.need.fingerprint
            kept = card is not None and (
                card.continuation == "exact" or (card.continuation == "greedy" and self.plan.sampling.temperature <= 0)
            )
            self._join = "exact" if same and kept else "declared"
        self.need.fingerprint = build

    def _note(self, event: str, detail: str = "") -> None:
        self.timeline.append((asyncio.get_running_loop().time() - self.started_at, event, detail))

    def _enter(self, state: State) -> None:
        check(self.state, state)
        self.state = state
