"""The one owner of all deadlines of streams (promise P5).

A single sweep looks at every live stream a few times a second; tokens cost nothing here, because progress is
read off the token count. A client that takes no bytes stops the clock of the worker and starts its own. Time in
which this process itself stood still is charged to nobody, except to the bound on the whole request.

Must never cancel anything by itself: it tells the stream what is overdue.
"""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING

from holdfast.base.errors import AcceptOverdue, ClientStalled, DeadlineExceeded, StreamIncomplete, WorkerStalled

if TYPE_CHECKING:
    from holdfast.requests.attempt import Attempt
    from holdfast.requests.generation import Generation
    from holdfast.requests.placement import Placement

log = logging.getLogger(__name__)

SWEEP = 0.05
"""Seconds between two looks."""
LATE = 0.5
"""A sweep that comes later than this was held up itself (or the process was stopped): all clocks of workers and
clients start anew."""


class Deadlines:
    """Call `add` when a stream begins and `remove` when it has ended."""

    def __init__(self, placement: Placement, handoff: float = 0.0):
        """``handoff``: seconds from a hand-off to the first token (`DisaggSettings.handoff_timeout`)."""
        self._placement, self._handoff = placement, handoff
        self._live: dict[Generation, None] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._last = 0.0
        self._fair_since = 0.0
        """Nobody is judged by what was before."""

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
        if now - self._last > SWEEP + LATE:
            self._fair_since = now
        self._last = now
        for generation in list(self._live):
            try:
                self._look(generation, now)
            except Exception:
                log.exception("request %s: its deadlines could not be judged", generation.plan.request_id)
        self._timer = loop.call_later(SWEEP, self._sweep, loop) if self._live else None

    def _look(self, generation: Generation, now: float) -> None:
        if generation.expires and now > generation.expires:
            bound = generation.plan.deadlines.total
            knob = generation.plan.deadlines.knob("total")
            generation.finish_with(_overdue("total", knob, bound, now - generation.expires + bound))
            return
        blocked = generation.blocked_since
        if blocked is not None:
            self._look_at_client(generation, max(blocked, self._fair_since), now)
        attempt = generation.attempt
        if attempt is None:
            return
        if not attempt.accepted:
            self._look_for_accept(generation, attempt, now)
        elif blocked is not None:
            generation.seen = -1
        else:
            self._look_for_tokens(generation, attempt, now)

    def _look_at_client(self, generation: Generation, since: float, now: float) -> None:
        bound = generation.plan.deadlines.client_stall
        if bound and now - since > bound:
            knob = generation.plan.deadlines.knob("client_stall")
            why = f"The client took no byte for {bound:g} s ({knob})."
            generation.cancel("client_stalled", ClientStalled(why, bound_seconds=bound, knob=knob))

    def _look_for_tokens(self, generation: Generation, attempt: Attempt, now: float) -> None:
        if generation.count != generation.seen:
            generation.seen = generation.count
            generation.seen_at = now
            return
        if generation.lacks_only_the_end:
            attempt.fail(StreamIncomplete("The worker sent the last token and no end."))
            return
        bounds = generation.plan.deadlines
        fresh = generation.count == attempt.base
        bound = bounds.first_token if fresh else bounds.inter_token
        since = max(generation.seen_at, attempt.accepted_at, self._fair_since)
        if fresh and attempt.leg is not None and (late := attempt.leg.late(now, self._handoff)) is not None:
            attempt.fail(late)
        elif bound and now - since > bound:
            knob = bounds.knob("first_token" if fresh else "inter_token")
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
        allowance = generation.plan.prompt_length * UPLOAD_SECONDS_PER_TOKEN
        waited = now - max(attempt.started_at, self._fair_since) - allowance
        hedged = 0 < bounds.accept_hedge < waited and self._placement.others(generation.need, attempt.placed.worker)
        if hedged:
            bound, knob = bounds.accept_hedge, bounds.knob("accept_hedge")
        elif 0 < bounds.accept < waited:
            bound, knob = bounds.accept, bounds.knob("accept")
        else:
            return
        attempt.fail(
            AcceptOverdue(
                f"Worker {generation.worker} did not accept within {bound:g} s ({knob}).",
                stage="accept",
                bound_seconds=bound,
                knob=knob,
                worker=generation.worker,
                hedged=hedged,
            )
        )


UPLOAD_SECONDS_PER_TOKEN = 4 / 10e6
"""Prompts travel as 4 bytes a token; 10 MB/s is slow for the networks that workers stand on."""


def _overdue(stage: str, knob: str, bound: float, took: float) -> DeadlineExceeded:
    return DeadlineExceeded(
        f"The request took {took:.2f} s; its bound for '{stage}' is {bound:g} s ({knob}).",
        stage=stage,
        bound_seconds=bound,
        knob=knob,
    )
