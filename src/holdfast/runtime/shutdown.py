"""How a worker leaves: the stages, the one deadline for all of them, and the exit code that tells how it went.

``serving → unregistered → draining → migrating → cleanup → exited``. Each stage may last until its own bound or
until what later stages need is left of the total, whichever comes first. The first signal begins, a second one
hurries (what still runs is handed over at once), a third one ends it now.

Must never sleep, signal or talk to anybody: it is told the time and answers with deadlines.
"""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

from holdfast.base.settings import setting

Stage = Literal["serving", "unregistered", "draining", "migrating", "cleanup", "exited"]
Way = Literal["finished", "handed over", "cut", "engine died"]
Urgency = Literal["begin", "hurry", "now", "ignore"]

EXIT_FINISHED = 0
"""Everything that had been accepted was finished here."""
EXIT_ENGINE_DIED = 1
"""The engine died, or the process could not start."""
EXIT_CUT = 3
"""Some streams could not be finished or handed over; their clients see an error unless a frontend moves them."""
EXIT_HANDED_OVER = 4
"""The budget was over before all streams were; the rest was told to go on at other workers."""
EXIT_OVERRUN = 143
"""Cleaning up did not end within the budget; the process ended itself (the reference's 911, seen as 143)."""

EXIT_CODES: dict[Way, int] = {
    "finished": EXIT_FINISHED,
    "engine died": EXIT_ENGINE_DIED,
    "cut": EXIT_CUT,
    "handed over": EXIT_HANDED_OVER,
}

NEXT: dict[Stage, frozenset[Stage]] = {
    "serving": frozenset({"unregistered", "cleanup"}),
    "unregistered": frozenset({"draining"}),
    "draining": frozenset({"migrating"}),
    "migrating": frozenset({"cleanup"}),
    "cleanup": frozenset({"exited"}),
    "exited": frozenset(),
}
"""A worker that nobody could find yet goes straight to ``cleanup``."""

_SMALLEST_SHARE = 4
"""Each later stage gets its whole bound, but never more than this part (1/n) of a small total."""
_LONGEST = 315_360_000


class ShutdownBudget(msgspec.Struct, frozen=True, kw_only=True):
    """The total and the bounds of its parts; a settings group of the worker. Times in seconds."""

    shutdown_total_timeout: Annotated[
        float,
        setting(
            "DYN_WORKER_SHUTDOWN_TOTAL_TIMEOUT_SECS",
            "From SIGTERM to the end of the process, all stages together.",
            aliases=("DYN_WORKER_GRACEFUL_SHUTDOWN_TIMEOUT",),
            ge=0,
            le=_LONGEST,
        ),
    ] = 30.0
    """Whoever kills (a supervisor, Kubernetes) must wait for at least 5 s longer."""
    shutdown_router_grace: Annotated[
        float,
        setting(
            "DYN_WORKER_SHUTDOWN_ROUTER_GRACE_SECS",
            "Leaving discovery may take this long before callers are told all the same; no pause when it is quick.",
            aliases=("DYN_GRACEFUL_SHUTDOWN_GRACE_PERIOD_SECS",),
            ge=0,
        ),
    ] = 5.0
    """No sleep is needed for routers that have not heard of it yet: every caller is told on its connection."""
    shutdown_inflight_timeout: Annotated[
        float | None,
        setting(
            "DYN_WORKER_SHUTDOWN_INFLIGHT_TIMEOUT_SECS",
            "Running streams may finish for this long, then they move to other workers; none: as the total allows.",
            ge=0,
        ),
    ] = None
    """0 moves everything at once."""
    shutdown_handover_timeout: Annotated[
        float,
        setting(
            "DYN_WORKER_SHUTDOWN_HANDOVER_TIMEOUT_SECS",
            "What was said to callers of streams that move may take this long to leave the process.",
            ge=0,
        ),
    ] = 2.0
    """Reserved from the total."""
    shutdown_cleanup_timeout: Annotated[
        float,
        setting(
            "DYN_WORKER_SHUTDOWN_CLEANUP_TIMEOUT_SECS",
            "Closing the engine, discovery and connections may take this long.",
            ge=0,
        ),
    ] = 5.0
    """Reserved from the total."""

    @property
    def reserves(self) -> tuple[float, float]:
        """Return what handing over and cleaning up may count on, in seconds; a quarter of a small total each."""
        share = self.shutdown_total_timeout / _SMALLEST_SHARE
        return min(self.shutdown_handover_timeout, share), min(self.shutdown_cleanup_timeout, share)


class Shutdown:
    """One process on its way out. Every ``now`` is the running loop's time.

    Args:
        budget: the bounds.
    """

    def __init__(self, budget: ShutdownBudget):
        self.budget = budget
        self.stage: Stage = "serving"
        self.way: Way = "finished"
        self.took: dict[Stage, float] = {}
        """Seconds that each stage lasted, once it is over."""
        self._signals = 0
        self._deadline = 0.0
        self._entered = 0.0
        self._begun: float | None = None
        self._hurried = False

    def signal(self) -> Urgency:
        """Count a request to leave; say what it means."""
        self._signals += 1
        meaning: tuple[Urgency, ...] = ("begin", "hurry", "now")
        return meaning[self._signals - 1] if self._signals <= len(meaning) else "ignore"

    @property
    def asked(self) -> bool:
        """Whether somebody asked it to leave."""
        return self._signals > 0

    @property
    def abrupt(self) -> bool:
        """Whether it has been told to end now."""
        return self._signals >= 3

    def begin(self, now: float) -> None:
        """Start the clock; idempotent."""
        if self._begun is None:
            self._begun = self._entered = now
            self._deadline = now + self.budget.shutdown_total_timeout

    def hurry(self, now: float) -> None:
        """Wait for nobody any more: only what the reserves hold is left of the budget."""
        self.begin(now)
        self._hurried = True
        self._deadline = min(self._deadline, now + sum(self.budget.reserves))

    def enter(self, stage: Stage, now: float) -> None:
        """Go on to a stage.

        Raises:
            AssertionError: the table has no such step: a fault in Holdfast.
        """
        if stage not in NEXT[self.stage]:
            raise AssertionError(f"shutdown went from {self.stage} to {stage}, which its table does not have")
        self.begin(now)
        if self.stage != "serving":
            self.took[self.stage] = now - self._entered
        self.stage, self._entered = stage, now

    def until(self) -> float:
        """Return when the present stage has to be over (the loop's time)."""
        handover, cleanup = self.budget.reserves
        if self.stage == "migrating":
            return min(self._entered + handover, self._deadline - cleanup)
        if self.stage not in ("unregistered", "draining"):
            return min(self._entered + self.budget.shutdown_cleanup_timeout, self._deadline)
        latest = self._deadline - cleanup - handover
        if self._hurried:
            return min(self._entered, latest)
        budget = self.budget
        cap = budget.shutdown_router_grace if self.stage == "unregistered" else budget.shutdown_inflight_timeout
        return latest if cap is None else min(self._entered + cap, latest)

    def remaining(self, now: float) -> float:
        """Return the seconds left of the whole budget; all of it before it has begun."""
        if self._begun is None:
            return self.budget.shutdown_total_timeout
        return max(0.0, self._deadline - now)

    def durations(self, now: float) -> dict[Stage, float]:
        """Return the seconds spent in each stage of leaving, the present one included."""
        if self.stage in ("serving", "exited"):
            return dict(self.took)
        return {**self.took, self.stage: now - self._entered}

    def ended(self, way: Way) -> None:
        """Note how it went; what is worse stays: the engine's death, then cut, then handed over."""
        if _BADNESS.index(way) > _BADNESS.index(self.way):
            self.way = way

    @property
    def exit_code(self) -> int:
        """The exit code for the way it ended."""
        return EXIT_CODES[self.way]


_BADNESS: tuple[Way, ...] = ("finished", "handed over", "cut", "engine died")


def diagram() -> str:
    """Return the table as a Mermaid state diagram, for the documentation."""
    lines = ["stateDiagram-v2", "    [*] --> serving"]
    lines += [f"    {stage} --> {after}" for stage, following in NEXT.items() for after in sorted(following)]
    return "\n".join([*lines, "    exited --> [*]"])
