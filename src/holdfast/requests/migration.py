"""Whether a failed attempt is tried elsewhere: the decision alone, as a table over facts.

Must never do I/O, choose a worker or wait.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from holdfast.base.errors import (
    AcceptOverdue,
    HandoffFault,
    HoldfastError,
    MigrationExhausted,
    PoisonRequest,
    WorkerDraining,
)

MigrationType = Literal["new_request", "ongoing_request"]

ORDERLY_MOVES = 32
"""Moves away from draining or saturated workers that had accepted the stream, beside its migration limit: a
rolling restart is nobody's fault, yet not even that may go on for ever. Refusals are bounded by time instead
(`placement`)."""


class History(msgspec.Struct):
    """What one stream has been through."""

    attempts: int = 0
    """Attempts started."""
    failures: int = 0
    """Attempts that ended in a fault of a worker or the transport."""
    orderly: int = 0
    """Accepted attempts that ended because the worker was draining or had no room."""
    accepted: bool = False
    """Some attempt was accepted by a worker."""
    begun: bool = False
    """Some prefill worker has taken its prompt."""


class Failure(msgspec.Struct, frozen=True):
    """How one attempt failed."""

    error: HoldfastError
    sent: bool = True
    """It went out to a worker; False: there was no way to it."""
    accepted: bool = True

    @property
    def orderly(self) -> bool:
        """Whether it is nobody's fault, so that the migration limit does not count it."""
        error = self.error
        if not self.sent or error.fault == "capacity" or isinstance(error, WorkerDraining | HandoffFault):
            return True
        return isinstance(error, AcceptOverdue) and bool(error.details.get("hedged"))


class Verdict(msgspec.Struct, frozen=True):
    """``error`` None: try elsewhere. Otherwise the error that the client gets."""

    error: HoldfastError | None = None
    free: bool = False
    """The move is a promise already given: never refused by the budget, only paced."""


def migration_type(history: History) -> MigrationType:
    """Return the reference's name for the kind of move."""
    return "ongoing_request" if history.accepted else "new_request"


def record(history: History, failure: Failure) -> None:
    """Add a failed attempt to the history, in place."""
    if not failure.orderly:
        history.failures += 1
    elif failure.accepted:
        history.orderly += 1


def judge(
    history: History,
    failure: Failure,
    *,
    limit: int,
    sequence_length: int,
    max_length: int,
    excused: int = 0,
    convicted: bool = False,
) -> Verdict:
    """Decide about a failed attempt that `record` has seen.

    Args:
        history: the stream's past, this failure included.
        failure: of the attempt.
        limit: moves allowed because of faults (DYN_MIGRATION_LIMIT).
        sequence_length: prompt plus generated tokens.
        max_length: above this the stream is not moved (DYN_MIGRATION_MAX_SEQ_LEN); 0: no bound.
        excused: failures that another stream is known to have caused; the limit does not count them.
        convicted: this stream is known to kill workers.
    """
    error = failure.error
    if convicted:
        return Verdict(poisoned(history, error))
    if error.retry not in ("elsewhere", "same") and error.fault != "capacity":
        return Verdict(error)
    if failure.orderly:
        tired = history.orderly > ORDERLY_MOVES
        return Verdict(_exhausted(error, "orderly moves", ORDERLY_MOVES) if tired else None, free=True)
    failures = history.failures - excused
    refusal = _refusal(error, failures, limit, sequence_length, max_length)
    promised = failures <= 1 and (history.accepted or error.fault == "transport")
    return Verdict(refusal, free=promised)


def _refusal(
    error: HoldfastError, failures: int, limit: int, sequence_length: int, max_length: int
) -> HoldfastError | None:
    if limit == 0:
        return error
    if failures > limit:
        return _exhausted(error, "migrations", limit)
    if max_length and sequence_length > max_length:
        return MigrationExhausted(
            f"The worker failed ({error.code}) and the sequence of {sequence_length} tokens is over "
            f"DYN_MIGRATION_MAX_SEQ_LEN={max_length}, so it was not moved.",
            last_error=error.code,
            sequence_length=sequence_length,
            limit=max_length,
        )
    return None


def poisoned(history: History, error: HoldfastError) -> PoisonRequest:
    """Return what the client of a convicted stream is told."""
    return PoisonRequest(
        f"Workers were lost one after the other while they began this request ({history.attempts} attempts).",
        attempts=history.attempts,
        last_error=error.code,
    )


def _exhausted(error: HoldfastError, what: str, limit: int) -> MigrationExhausted:
    return MigrationExhausted(
        f"Gave up after {limit} {what}, which is the limit; the last failure was {error.code}: {error.message}",
        last_error=error.code,
        limit=limit,
    )
