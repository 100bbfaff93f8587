"""The one owner of all deadlines of streams (promise P5).

A single sweep looks at every live stream a few times a second; tokens cost nothing here, because progress is
read off the token count. A client that takes no bytes stops the clock of the worker and starts its own.

Must never cancel anything by itself: it tells the stream what is overdue.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from holdfast.base.errors import AcceptOverdue, Cancelled, DeadlineExceeded, WorkerStalled

if TYPE_CHECKING:
    from holdfast.requests.attempt import Attempt
    from holdfast.requests.generation import Generation
    from holdfast.requests.placement import Placement

SWEEP = 0.05
"""Seconds between two looks."""
LATE = 0.5
"""A sweep that comes later than this was held up itself (or the process was stopped): it restarts the clocks of
the workers instead of judging them."""


class ClientStalled(Cancelled):
    """The client took no byte for longer than its bound."""

    code = "client_stalled"


class Deadlines:
    """Call `add` when a stream begins and `remove` when it has ended."""

    def __init__(self, placement: Placement):
        self._placement = placement
        self._live: dict[Generation, None] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._last = 0.0

    def add(self, generation: Generation) -> None:
        """Watch a stream."""
        self._live[generation] = None
        if self._timer is None:
            loop = asyncio.get_running_loop()
            self._last = loop.time()
            self._timer = loop.call_later(SWEEP, self._sweep, loop)

    def remove(self, generation: Generation) -> None:
        """Stop watching it."""
        self._live.pop(generation, None)

    def _sweep(self, loop: asyncio.AbstractEventLoop) -> None:
        now = loop.time()
        late = now - self._last > SWEEP + LATE
        self._last = now
        for generation in list(self._live):
            if late:
                generation.seen = -1
            self._look(generation, now)
        self._timer = loop.call_later(SWEEP, self._sweep, loop) if self._live else None

    def _look(self, generation: Generation, now: float) -> None:
        if generation.expires and now > generation.expires:
            bound = generation.plan.deadlines.total
            generation.finish_with(_overdue("total", "DYN_REQUEST_TIMEOUT", bound, now - generation.started_at))
            return
        blocked = generation.blocked_since
        if blocked is not None:
            generation.seen = -1
            bound = generation.plan.deadlines.client_stall
            if bound and now - blocked > bound:
                generation.cancel(
                    "client_stalled", ClientStalled(f"The client took no byte for {bound:g} s.", bound_seconds=bound)
                )
            return
        attempt = generation.attempt
        if attempt is not None:
            self._look_at_attempt(generation, attempt, now)

    def _look_at_attempt(self, generation: Generation, attempt: Attempt, now: float) -> None:
        bounds = generation.plan.deadlines
        if not attempt.accepted:
            self._look_for_accept(generation, attempt, now)
            return
        if generation.count != generation.seen:
            generation.seen = generation.count
            generation.seen_at = now
            return
        fresh = generation.count == attempt.base
        bound = bounds.first_token if fresh else bounds.inter_token
        since = max(generation.seen_at, attempt.accepted_at)
        if bound and now - since > bound:
            knob = "DYN_FIRST_TOKEN_TIMEOUT" if fresh else "DYN_INTER_TOKEN_TIMEOUT"
            stage = "first token" if fresh else "next token"
            attempt.fail(
                WorkerStalled(
                    f"No {stage} for {now - since:.2f} s (bound {bound:g} s, {knob}).",
                    stage=stage,
                    bound_seconds=bound,
                    knob=knob,
                    worker=generation.worker,
                )
            )

    def _look_for_accept(self, generation: Generation, attempt: Attempt, now: float) -> None:
        bounds = generation.plan.deadlines
        waited = now - attempt.started_at - generation.plan.prompt_length * _UPLOAD_SECONDS_PER_TOKEN
        hedge = bounds.accept_hedge and waited > bounds.accept_hedge
        if hedge and self._placement.others(generation.need, attempt.placed.worker):
            bound, knob = bounds.accept_hedge, "DYN_ACCEPT_HEDGE_TIMEOUT"
        elif bounds.accept and waited > bounds.accept:
            bound, knob = bounds.accept, "DYN_ACCEPT_TIMEOUT"
        else:
            return
        attempt.fail(
            AcceptOverdue(
                f"Worker {generation.worker} did not accept within {bound:g} s ({knob}).",
                stage="accept",
                bound_seconds=bound,
                knob=knob,
                worker=generation.worker,
            )
        )


_UPLOAD_SECONDS_PER_TOKEN = 4 / 10e6
"""Prompts travel as 4 bytes a token; 10 MB/s is slow for the networks that workers stand on."""


def _overdue(stage: str, knob: str, bound: float, took: float) -> DeadlineExceeded:
    return DeadlineExceeded(
        f"The request took {took:.2f} s; its bound for '{stage}' is {bound:g} s ({knob}).",
        stage=stage,
        bound_seconds=bound,
        knob=knob,
    )
