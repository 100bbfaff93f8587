"""Tells frozen, hung and merely slow workers apart. Decides only; acting is the pool's business.

Two judgements per worker: *silent* (no byte while a ping is unanswered: frozen process, paused machine,
partition) and *stalled* (it answers, is busy, and its counters stand still: `progress`). All times are
passed in. Internally they are mapped to *observed* time, which only advances while our own checks run on
schedule: an interval in which our loop was late or jumped is nobody else's silence, and after it a fresh
ping must go unanswered before anybody is judged. When most workers look silent at once we doubt ourselves
and wait one more round.

Slow is not dead: the bound for silence grows with the delays a worker normally shows, within a floor and a
ceiling; coming back takes some prompt pongs, and more of them for one that keeps coming and going.

Must never act, never call a clock, never know about sockets.
"""

from __future__ import annotations

from collections import deque
from typing import Literal

import msgspec

from holdfast.base.errors import HoldfastError, PeerSilent, WorkerStalled
from holdfast.base.ids import InstanceId
from holdfast.runtime.progress import DecayingPeak, HangSettings, ProgressWatch
from holdfast.wire.frames import Pong

LinkState = Literal["ok", "silent", "stalled"]
MAX_OUTSTANDING = 8
"""Pings without an answer after which we ping more slowly."""
SLOW_PING_INTERVAL = 1.0
MAX_GOOD_PONGS = 32


class DetectorSettings(msgspec.Struct, frozen=True):
    """When a worker counts as frozen or hung. Times in seconds."""

    check_interval: float = 0.1
    """How often `FailureDetector.check` is to be called."""
    ping_interval: float = 0.25
    """How often each worker is pinged."""
    freeze_after: float = 1.5
    """Floor: no byte for this long while a ping is unanswered means silent."""
    freeze_ceiling: float = 10.0
    """Habit raises that bound at most to this."""
    habit_factor: float = 2.0
    """Times the longest pong delay that the worker showed lately."""
    habit_half_life: float = 30.0
    """How fast that memory fades."""
    hesitate_after: float = 0.5
    """A pong overdue for this long: not suspect, but others are preferred for new work."""
    late_tolerance: float = 0.25
    """Our own check may be this late before its interval is discarded."""
    verify: float = 0.5
    """After a discarded interval nobody is judged before this much time on schedule."""
    self_doubt: float = 1.0
    """When most workers look silent at once, wait this much longer, on schedule, before judging."""
    good_pongs: int = 2
    """Prompt pongs needed to come back; doubles with every flap over the tolerated ones."""
    tolerated_flaps: int = 2
    """This often per ``flap_window`` a worker may go and come back at no extra cost."""
    flap_window: float = 60.0
    """How long a flap is remembered."""
    stall_hold: float = 5.0
    """A hung worker that became idle (its streams were killed) is tried again after this; doubles per hang."""
    stall_hold_ceiling: float = 60.0
    """Longest such wait."""
    hang: HangSettings = HangSettings()


class Judgement(msgspec.Struct, frozen=True):
    """A change of mind about one worker."""

    instance: InstanceId
    state: LinkState
    error: HoldfastError | None = None
    """With ``silent`` and ``stalled``: what its streams are broken with."""


class _Watched:
    """What is known about one connected worker. Times are observed times."""

    __slots__ = (
        "flaps",
        "good",
        "habit",
        "heard_at",
        "idle_since",
        "judged_at",
        "next_ping",
        "outstanding",
        "progress",
        "proven",
        "shows_progress",
        "stalls",
        "state",
        "trial",
    )

    def __init__(self, settings: DetectorSettings, shows_progress: bool, now: float):
        self.state: LinkState = "ok"
        self.shows_progress = shows_progress
        self.heard_at = now
        self.judged_at = now
        self.next_ping = 0.0
        self.outstanding: deque[tuple[int, float]] = deque(maxlen=1024)
        self.habit = DecayingPeak(settings.habit_half_life)
        self.progress = ProgressWatch(settings.hang)
        self.good = 0
        self.flaps: deque[float] = deque(maxlen=16)
        self.stalls = 0
        self.idle_since: float | None = None
        self.proven = False
        """Counters moved since it was judged stalled."""
        self.trial = False
        """Back after a hang without proof that the engine works again."""


class FailureDetector:
    """Judges all workers of one process. Call `check` every ``check_interval`` seconds, and feed it what arrives."""

    def __init__(self, settings: DetectorSettings | None = None):
        self.settings = settings or DetectorSettings()
        self._watched: dict[InstanceId, _Watched] = {}
        self._observed = 0.0
        self._last_check: float | None = None
        self._verified_from = 0.0
        self._doubt_until: float | None = None
        self.discarded = 0
        """Intervals in which we were late ourselves."""

    @property
    def doubts_itself(self) -> bool:
        """Whether so many workers look silent that the fault may be ours, and the extra round is not over."""
        return self._doubt_until is not None

    def add(self, instance: InstanceId, now: float, *, shows_progress: bool = True) -> None:
        """Watch a freshly connected worker.

        Args:
            shows_progress: False for engines whose counters say nothing (progress kind ``none``).
        """
        self._watched[instance] = _Watched(self.settings, shows_progress, self._at(now))

    def remove(self, instance: InstanceId) -> None:
        """Stop watching."""
        self._watched.pop(instance, None)

    def expect_progress(self, instance: InstanceId, shows_progress: bool) -> None:
        """Correct whether the engine's counters mean anything (its card changed)."""
        watched = self._watched.get(instance)
        if watched is not None:
            watched.shows_progress = shows_progress

    def heard(self, instance: InstanceId, now: float) -> None:
        """Bytes arrived from this worker."""
        watched = self._watched.get(instance)
        if watched is not None:
            watched.heard_at = self._at(now)

    def state(self, instance: InstanceId) -> LinkState:
        """Return the judgement in force; a worker that is not watched is ``ok``."""
        watched = self._watched.get(instance)
        return "ok" if watched is None else watched.state

    def due_pings(self, now: float) -> list[InstanceId]:
        """Return whom to ping now; report each ping that was sent with `pinged`."""
        at = self._at(now)
        return [instance for instance, watched in self._watched.items() if at >= watched.next_ping]

    def pinged(self, instance: InstanceId, sequence: int, now: float) -> None:
        """A ping with this number was sent."""
        watched = self._watched.get(instance)
        if watched is None:
            return
        at = self._at(now)
        watched.outstanding.append((sequence, at))
        crowded = len(watched.outstanding) > MAX_OUTSTANDING
        watched.next_ping = at + (SLOW_PING_INTERVAL if crowded else self.settings.ping_interval)

    def overdue(self, instance: InstanceId, now: float) -> float:
        """Return for how many observed seconds the oldest unanswered ping has waited, 0 when none does."""
        watched = self._watched.get(instance)
        if watched is None or not watched.outstanding:
            return 0.0
        return max(0.0, self._at(now) - watched.outstanding[0][1])

    def hesitant(self, instance: InstanceId, now: float) -> bool:
        """Say whether others should be preferred for new work because a pong is overdue."""
        return self.overdue(instance, now) > self.settings.hesitate_after

    def on_trial(self, instance: InstanceId) -> bool:
        """Say whether it is back after a hang without proof that its engine works: its counters have not moved yet."""
        watched = self._watched.get(instance)
        return watched is not None and watched.trial and watched.state == "ok"

    def freeze_bound(self, instance: InstanceId, now: float) -> float:
        """Return how many seconds of silence this worker is allowed at the moment."""
        settings, watched = self.settings, self._watched.get(instance)
        if watched is None:
            return settings.freeze_after
        habit = settings.habit_factor * watched.habit.at(self._at(now))
        return max(settings.freeze_after, min(habit, settings.freeze_ceiling))

    def pong(self, instance: InstanceId, pong: Pong, now: float) -> Judgement | None:
        """Take in a pong; returns the change of mind it causes, if any."""
        watched = self._watched.get(instance)
        if watched is None:
            return None
        at = self._at(now)
        watched.heard_at = at
        delay = self._answered(watched, pong.sequence, at)
        moved = watched.progress.observe(pong.progress, pong.load, at)
        if moved:
            watched.trial, watched.proven, watched.stalls = False, True, 0
        if watched.state == "ok":
            if self._doubt_until is None:
                watched.habit.note(delay, at)
            return self._judge_stall(instance, watched, at)
        return self._judge_return(instance, watched, delay, at)

    def check(self, now: float) -> list[Judgement]:
        """Judge silence. Call it on schedule; when it comes late the interval is discarded instead.

        Args:
            now: seconds on the loop's clock.
        """
        self._advance(now)
        at = self._observed
        accused = [
            (instance, watched)
            for instance, watched in self._watched.items()
            if watched.state != "silent" and self._silence(watched, at) >= self.freeze_bound(instance, now)
        ]
        if not accused or at < self._verified_from or self._in_doubt(at):
            if not accused:
                self._doubt_until = None
            return []
        return [self._silent(instance, watched, at) for instance, watched in accused]

    def _at(self, now: float) -> float:
        """Map the loop's clock to observed time."""
        if self._last_check is None:
            return self._observed
        step = now - self._last_check
        return self._observed + (step if 0.0 <= step <= self._on_time() else 0.0)

    def _on_time(self) -> float:
        return self.settings.check_interval + self.settings.late_tolerance

    def _advance(self, now: float) -> None:
        if self._last_check is not None:
            step = now - self._last_check
            if 0.0 <= step <= self._on_time():
                self._observed += step
            else:
                self._discard()
        self._last_check = now

    def _discard(self) -> None:
        """We were late: ask everybody again, and judge only after having listened on time for a while."""
        self.discarded += 1
        self._verified_from = self._observed + self.settings.verify
        self._doubt_until = None
        for watched in self._watched.values():
            watched.next_ping = 0.0

    def _silence(self, watched: _Watched, at: float) -> float:
        """Return for how long nothing was heard although a ping was waiting."""
        if not watched.outstanding:
            return 0.0
        return at - max(watched.heard_at, watched.outstanding[0][1])

    def _in_doubt(self, at: float) -> bool:
        """Say whether so many look silent that the fault may be ours, and the extra round is not over."""
        judgeable = [w for w in self._watched.values() if w.state != "silent"]
        quiet = sum(self._silence(w, at) >= self.settings.freeze_after / 2 for w in judgeable)
        if len(judgeable) < 2 or quiet * 2 <= len(judgeable):
            self._doubt_until = None
            return False
        if self._doubt_until is None:
            self._doubt_until = at + self.settings.self_doubt
            for watched in judgeable:
                watched.next_ping = 0.0
        return at < self._doubt_until

    def _silent(self, instance: InstanceId, watched: _Watched, at: float) -> Judgement:
        silence = self._silence(watched, at)
        self._flap(watched, at)
        watched.state = "silent"
        message = f"worker {instance} answered no ping and sent no byte for {silence:.2f} s"
        return Judgement(instance, "silent", PeerSilent(message, worker=instance, silent_seconds=round(silence, 3)))

    def _judge_stall(self, instance: InstanceId, watched: _Watched, at: float) -> Judgement | None:
        progress = watched.progress
        if not watched.shows_progress or not progress.stalled():
            return None
        self._flap(watched, at)
        watched.state = "stalled"
        watched.stalls += 1
        watched.idle_since, watched.proven = None, False
        error = WorkerStalled(
            f"worker {instance} answers pings but made no progress for {progress.silent_for():.1f} s while busy "
            f"(phase {progress.phase}, bound {progress.bound:.1f} s)",
            worker=instance,
            phase=progress.phase,
            silent_seconds=round(progress.silent_for(), 3),
            bound_seconds=round(progress.bound, 3),
        )
        return Judgement(instance, "stalled", error)

    def _flap(self, watched: _Watched, at: float) -> None:
        watched.good = 0
        watched.judged_at = at
        watched.flaps.append(at)

    def _answered(self, watched: _Watched, sequence: int, at: float) -> float:
        """Strike the answered pings off; returns the seconds that this one took."""
        delay = 0.0
        while watched.outstanding and watched.outstanding[0][0] <= sequence:
            delay = at - watched.outstanding.popleft()[1]
        return max(0.0, delay)

    def _judge_return(self, instance: InstanceId, watched: _Watched, delay: float, at: float) -> Judgement | None:
        watched.next_ping = min(watched.next_ping, at + self.settings.ping_interval)
        if watched.state == "stalled" and not self._may_return(watched, at):
            watched.good = 0
            return None
        watched.good = watched.good + 1 if delay <= self.settings.hesitate_after else 0
        if watched.good < self._needed(watched, at):
            return None
        if watched.state == "silent":
            self._learn_from_flaps(watched, at)
        watched.state = "ok"
        return Judgement(instance, "ok")

    def _may_return(self, watched: _Watched, at: float) -> bool:
        """A hung worker may return when its counters move; idle, it may be tried after a while."""
        if watched.proven:
            return not watched.progress.stalled()
        if watched.progress.busy:
            watched.idle_since = None
            return False
        if watched.idle_since is None:
            watched.idle_since = at
        hold = self.settings.stall_hold * 2 ** (watched.stalls - 1)
        watched.trial = at - watched.idle_since >= min(hold, self.settings.stall_hold_ceiling)
        return watched.trial

    def _recent_flaps(self, watched: _Watched, at: float) -> int:
        return sum(at - flap <= self.settings.flap_window for flap in watched.flaps)

    def _needed(self, watched: _Watched, at: float) -> int:
        extra = max(0, self._recent_flaps(watched, at) - self.settings.tolerated_flaps)
        return min(self.settings.good_pongs << extra, MAX_GOOD_PONGS)

    def _learn_from_flaps(self, watched: _Watched, at: float) -> None:
        """One freeze is an event; several short ones in a row are how this worker is."""
        lasted = at - watched.judged_at + self.settings.freeze_after
        if self._recent_flaps(watched, at) > self.settings.tolerated_flaps and lasted < self.settings.freeze_ceiling:
            watched.habit.note(lasted, at)
