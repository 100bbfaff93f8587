"""Whether a busy engine makes progress: counters in pongs against the longest silent step to be expected.

A worker is stalled when sequences are in flight and none of its counters moved for longer than
max(floor, factor * expected longest silent step of its phase, what it normally shows). Only the time
between pongs counts: a worker that answers nothing is silent, which is another fact.

Must never use a clock of its own.
"""

from __future__ import annotations

import math

import msgspec

from holdfast.wire.frames import Load, Progress

STARTING_PHASES = frozenset({"starting", "warming", "compiling"})


MAX_PONG_GAP = 1.0
"""Seconds between two pongs that may count as watched; in a longer gap nobody knows what the counters did."""


class HangSettings(msgspec.Struct, frozen=True):
    """When a standing counter is a hang. Times in seconds."""

    floor: float = 5.0
    """A busy engine may always be silent for this long."""
    factor: float = 3.0
    """Times the longest silent step that the engine itself expects in its phase."""
    ceiling: float = 600.0
    """No estimate and no habit raises the bound over this."""
    start_ceiling: float = 600.0
    """The bound while the engine starts, warms up or compiles."""
    prefill_tokens_per_second: float = 200.0
    """Slowest prefill to be expected of an engine that says nothing about its steps."""
    habit_factor: float = 2.0
    """Times the longest silence that ended well, of this worker, lately."""
    habit_half_life: float = 300.0
    """How fast that memory fades."""


class DecayingPeak:
    """The largest value seen lately; halves every ``half_life`` seconds."""

    __slots__ = ("_at", "_half_life", "_value")

    def __init__(self, half_life: float):
        self._half_life = half_life
        self._value = 0.0
        self._at = 0.0

    def note(self, value: float, now: float) -> None:
        """Remember a value, in its own unit, at a time in seconds."""
        if value > self.at(now):
            self._value, self._at = value, now

    def at(self, now: float) -> float:
        """Return what is left of the largest value."""
        return self._value * math.exp2((self._at - max(self._at, now)) / self._half_life)


class ProgressWatch:
    """The progress of one worker, fed with its pongs."""

    __slots__ = ("_counters", "_habit", "_last_at", "_settings", "bound", "busy", "moved_at", "phase")

    def __init__(self, settings: HangSettings):
        self._settings = settings
        self._counters: tuple[int, int, int] | None = None
        self._habit = DecayingPeak(settings.habit_half_life)
        self._last_at = 0.0
        self.busy = False
        self.phase = "idle"
        self.moved_at = 0.0
        """When the counters moved last, or the worker was seen idle."""
        self.bound = settings.floor
        """Seconds of silence allowed at the moment."""

    def observe(self, progress: Progress, load: Load, now: float) -> bool:
        """Take in one pong; returns whether the counters moved since the last one."""
        counters = (progress.steps, progress.tokens, progress.prefilled)
        moved = self._counters is not None and counters != self._counters
        self.moved_at += max(0.0, now - self._last_at - MAX_PONG_GAP)
        if moved and self.busy:
            self._habit.note(now - self.moved_at, now)
        self.busy = _is_busy(progress, load)
        if moved or not self.busy or self._counters is None:
            self.moved_at = now
            self.bound = 0.0
        self._counters, self._last_at, self.phase = counters, now, progress.phase
        self.bound = max(self.bound, self._bound_of(progress, load, now))
        return moved

    def silent_for(self) -> float:
        """Return for how many seconds the worker has been busy without progress, up to its last pong."""
        return self._last_at - self.moved_at if self.busy else 0.0

    def stalled(self) -> bool:
        """Say whether that is longer than it may be."""
        return self.busy and self.silent_for() >= self.bound

    def _bound_of(self, progress: Progress, load: Load, now: float) -> float:
        settings = self._settings
        if progress.phase in STARTING_PHASES:
            return settings.start_ceiling
        if progress.silent_step_seconds > 0:
            expected = settings.factor * progress.silent_step_seconds
        elif progress.phase == "prefill":
            expected = load.prefill_tokens / settings.prefill_tokens_per_second
        else:
            expected = 0.0
        habit = settings.habit_factor * self._habit.at(now)
        return max(settings.floor, min(settings.ceiling, max(expected, habit)))


def _is_busy(progress: Progress, load: Load) -> bool:
    """Say whether the engine has work: streams whose tokens only wait for a slow reader are none."""
    engine_empty = progress.phase == "idle" and load.running == 0 and load.waiting == 0
    return progress.in_flight > 0 and not engine_empty
