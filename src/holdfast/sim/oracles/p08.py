"""P8: a worker accepts nothing after it has said ``draining``.

Asserted for every start of every worker: no user's sequence was taken by its engine later than the moment at which it
told its callers that it drains. No tolerance: both are facts of one process, on one clock.

And it keeps what it had accepted: no stream is sent away from it before the time for that (`Plan.drain`) is over,
unless it was told to hurry.
"""

from __future__ import annotations

from collections.abc import Iterator

from holdfast.sim.history import Failed, Violation
from holdfast.sim.oracles.facts import SILENCING, Facts

EARLY = 0.001
"""Seconds; rounding."""


def check(facts: Facts) -> Iterator[Violation]:
    """Return the breaches."""
    drained = {(x.name, x.incarnation): x.draining for x in facts.history.lives if x.role == "worker" and x.draining}
    for sequence in facts.sequences:
        since = drained.get((sequence.worker, sequence.incarnation))
        if since is not None and sequence.accepted and sequence.received > since:
            where = {
                "call": sequence.label,
                "worker": sequence.worker,
                "drained": round(since, 4),
                "accepted": round(sequence.received, 4),
            }
            yield Violation("P8", "a draining worker accepted a request", where)
    for failure in facts.history.failures:
        if failure.code in ("worker_draining", "disconnected") and failure.phase != "before accept":
            yield from _sent_away(facts, failure)


def _sent_away(facts: Facts, failure: Failed) -> Iterator[Violation]:
    name = facts.name_of(failure.worker)
    starts = _starts(facts, name, failure)
    for life in facts.history.lives:
        its = life.name == name and life.incarnation in starts
        leaving = its and life.how == "exited" and 0 < life.draining <= failure.at
        cut = facts.disturbed({name, failure.frontend}, life.draining - 1.0, failure.at, SILENCING | {"reset"})
        if leaving and failure.at < life.draining + facts.plan.drain - EARLY and not cut and not facts.hurried(life):
            where = {"call": failure.label, "worker": name, "drained": life.draining, "moved": round(failure.at, 4)}
            yield Violation("P8", "a draining worker sent a stream away before its time", where)


def _starts(facts: Facts, name: str, failure: Failed) -> set[int]:
    """Return the start of the worker that had the attempt: an earlier one that has left has nothing to do with it."""
    return {
        sequence.incarnation
        for sequence in facts.sequences
        if sequence.worker == name
        and (sequence.label, sequence.request.choice) == (failure.label, failure.choice)
        and sequence.request.attempt == failure.attempt
    }
