"""Noticed: nobody waits in silence.

Not one of the thirteen promises, but the first pain of those who run such systems. Asserted are two bounds:

* A worker that stands still (its process is frozen, or its engine hangs) for longer than the detector's bound has lost
  its streams by then: each of them has failed there or has ended. Judged only where nothing else was wrong with the
  worker, the frontend or the fleet, so that neither habit nor doubt about itself allows a detector more. Decode legs
  that wait for their blocks are left out: a hand-off has a bound of its own.
* A stream that lost its worker, for whatever reason, has an attempt elsewhere (or its end) within `WAIT` seconds,
  from the moment on in which a worker is there that is ready, stays and is not disturbed; within `TRIAL` seconds if it
  may be a suspect. Universes with prompts that kill are excepted, for innocent streams have to wait for trials, and so
  are those that lack room or lose discovery.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator

from holdfast.sim.history import Failed, Fired, Sequence, Violation
from holdfast.sim.oracles.facts import SILENCING, Facts, attempt_of

BOUNDS = {"freeze": 2.2, "engine-hang": 2.8}
"""Seconds: silence of 1.5 s, or the floor of 2 s (`cluster.HANG_FLOOR`) after the last pong that showed progress; then
checks and pings 0.1 and 0.25 s apart, and the network."""
HABIT = 120.0
"""Seconds for which a detector remembers that this worker is slow."""
WAIT = 3.0
TRIAL = 5.0 + 0.5
"""For streams that the dead worker had brought nothing: they may be suspects, and wait for their trial so long after
a first death (`requests.placement.TRIAL_PATIENCE`) …"""
SECOND_TRIAL = 10.0 + 0.5
"""… and half of the bound for a replacement (`cluster`) after a second one."""
_SUSPECT = frozenset({"before accept", "before first token"})
_ENGINES = frozenset({"engine-hang", "engine-slow", "engine-compile"})
_SLOW = ("[[mock:prefill", "[[mock:slow", "[[mock:compile")
_DEADLY = ("[[mock:crash", "[[mock:freeze", "[[mock:hang", "[[mock:die")


def check(facts: Facts) -> Iterator[Violation]:
    """Return the breaches."""
    failed = facts.given_up()
    for fault in facts.history.fired:
        bound = BOUNDS.get(fault.kind, 0.0) * facts.stretch
        if bound and fault.until > fault.at + bound and _alone(facts, fault, fault.at + bound):
            for sequence in facts.sequences:
                if _waited(facts, fault, sequence, fault.at + bound, failed):
                    where = {"call": sequence.label, "worker": fault.target, "kind": fault.kind, "since": fault.at}
                    yield Violation("noticed", "a worker stood still and nobody noticed", where)
    if facts.plan.profile != "overload" and not any(
        mark in facts.body(c) for c in facts.history.calls for mark in _DEADLY
    ):
        yield from _orphans(facts)


def _alone(facts: Facts, fault: Fired, until: float) -> bool:
    """Whether nothing else troubled any worker meanwhile, nor this one lately."""
    return not any(
        (other.kind in SILENCING or other.kind in _ENGINES)
        and other is not fault
        and other.at <= until
        and other.until >= (fault.at - HABIT if fault.target in (other.target, other.peer) else fault.at - 1.0)
        for other in facts.history.fired
    )


def _waited(
    facts: Facts, fault: Fired, sequence: Sequence, until: float, failed: dict[tuple[str, int, int, str], float]
) -> bool:
    """Whether a sequence was in that worker's hand all the time, and its frontend did nothing."""
    if sequence.worker != fault.target or not sequence.accepted:
        return False
    call = facts.calls.get(sequence.label)
    if call is None or (fault.kind == "engine-hang" and _slow_lately(facts, fault.target, until)):
        return False
    if sequence.request.leg == "decode" and not sequence.tokens:
        return False  # it waits for blocks from elsewhere, and the hand-off has a bound of its own
    over = sequence.ended or facts.history.finished
    if not (sequence.received < fault.at - 0.05 and over > until and call.ending != "left"):
        return False
    choice = sequence.request.choice
    ending = facts.endings.get((sequence.label, choice))
    gone = facts.disturbed({call.frontend}, fault.at - 1.0, until)
    given_up = failed.get(attempt_of(sequence))
    noticed = [at for at in (given_up, ending.at if ending is not None else None) if at is not None]
    return not gone and (not noticed or min(noticed) > until)


def _slow_lately(facts: Facts, worker: str, until: float) -> bool:
    """Whether a prompt has made that engine silent for long before: the detector knows its habit."""
    labels = {
        sequence.label for sequence in facts.sequences if sequence.worker == worker and sequence.received <= until
    }
    return any(mark in facts.body(facts.calls[label]) for label in labels if label in facts.calls for mark in _SLOW)


def _orphans(facts: Facts) -> Iterator[Violation]:
    """Look at the times in which streams had lost one worker and had no other."""
    found: dict[tuple[str, int], list[float]] = defaultdict(list)
    for sequence in facts.sequences:
        found[sequence.label, sequence.request.choice].append(sequence.received)
    for ending in facts.history.endings:
        found[ending.label, ending.choice].append(ending.at)
    for failure in facts.history.failures:
        siblings = [f for f in facts.history.failures if (f.label, f.choice) == (failure.label, failure.choice)]
        again = [other.at for other in siblings if other.attempt > failure.attempt]
        wait = _patience(failure, siblings) * facts.stretch
        ends = [life.ended for life in facts.history.lives if life.name == failure.frontend]  # nobody is left to wait
        later = [at for at in [*found[failure.label, failure.choice], *ends] if at >= failure.at]
        until = min(later + again, default=facts.history.finished)
        if until - failure.at > wait and (since := _served(facts, failure, until, wait)):
            where = {"call": failure.label, "frontend": failure.frontend, "lost": failure.at, "there": since}
            yield Violation("noticed", "a stream waited although a worker was there", {**where, "until": until})


def _patience(failure: Failed, siblings: Iterable[Failed]) -> float:
    """Return for how long the stream may wait after a failure; ``siblings``: all failures of the stream."""
    if failure.phase not in _SUSPECT:
        return WAIT
    deaths = sum(other.phase in _SUSPECT and other.attempt <= failure.attempt for other in siblings)
    return TRIAL if deaths == 1 else SECOND_TRIAL


def _served(facts: Facts, failure: Failed, until: float, wait: float) -> float:
    """Return since when a worker was there that could have taken the stream; 0: none was for longer than ``wait``."""
    blind = any(
        f.kind.startswith("discovery-") and f.at <= until and f.until >= failure.at for f in facts.history.fired
    )
    for life in facts.history.lives if not blind else ():
        if life.role != "worker" or not life.ready:
            continue
        since = max(failure.at, life.ready)
        stays = not any(0 < at <= until for at in (life.draining, life.ended))
        if stays and until - since > wait:
            lately = since - 10.0 if life.incarnation == 1 else since
            if not facts.disturbed({life.name, failure.frontend}, lately, until, SILENCING):
                return since
    return 0.0
