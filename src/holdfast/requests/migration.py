"""Whether a failed attempt is tried elsewhere: the decision alone, as a table over facts.

Must never do I/O, choose a worker or wait.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from holdfast.base.errors import (
    AcceptOverdue,
    Disconnected,
    HoldfastError,
    MigrationExhausted,
    PoisonRequest,
    WorkerDraining,
)

MigrationType = Literal["new_request", "ongoing_request"]

ORDERLY_MOVES = 32
"""Moves away from draining or saturated workers that one stream may make beside its migration limit: a
rolling restart is nobody's fault, yet not even that may go on for ever."""

POISON_DEATHS = 2
"""Workers that may die under one stream before it made any progress on them."""


class History(msgspec.Struct):
    """What one stream has been through."""

    attempts: int = 0
    """Attempts started."""
    failures: int = 0
    """Attempts that ended in a fault of a worker or the transport."""
    orderly: int = 0
    """Attempts refused or ended because the worker was draining or saturated."""
    deaths_without_progress: int = 0
    """Consecutive attempts whose worker's connection died before a new token arrived."""
    accepted: bool = False
    """Some attempt was accepted by a worker."""


class Verdict(msgspec.Struct, frozen=True):
    """``error`` None: try elsewhere. Otherwise the error that the client gets."""

    error: HoldfastError | None = None
    free: bool = False
    """The move is a promise already given: never refused by the budget, only paced."""


def migration_type(history: History) -> MigrationType:
    """Return the reference's name for the kind of move."""
    return "ongoing_request" if history.accepted else "new_request"


def record(history: History, error: HoldfastError, *, progressed: bool) -> None:
    """Add a failed attempt to the history.

    Args:
        history: changed in place.
        error: how the attempt ended.
        progressed: whether the attempt delivered at least one new token.
    """
    if _orderly(error):
        history.orderly += 1
    else:
        history.failures += 1
    if isinstance(error, Disconnected) and not progressed and history.accepted:
        history.deaths_without_progress += 1
    elif progressed:
        history.deaths_without_progress = 0


def judge(history: History, error: HoldfastError, *, limit: int, sequence_length: int, max_length: int) -> Verdict:
    """Decide about a failed attempt that `record` has seen.

    Args:
        history: the stream's past, this failure included.
        error: how the attempt ended.
        limit: moves allowed because of faults (DYN_MIGRATION_LIMIT).
        sequence_length: prompt plus generated tokens.
        max_length: above this the stream is not moved (DYN_MIGRATION_MAX_SEQ_LEN); 0: no bound.
    """
    refusal = _refusal(history, error, limit, sequence_length, max_length)
    if refusal is not None:
        return Verdict(refusal)
    return Verdict(free=_orderly(error) or (history.failures == 1 and history.accepted))


def _refusal(
    history: History, error: HoldfastError, limit: int, sequence_length: int, max_length: int
) -> HoldfastError | None:
    if error.retry not in ("elsewhere", "same"):
        return error
    if history.deaths_without_progress >= POISON_DEATHS:
        return PoisonRequest(
            f"{history.deaths_without_progress} workers died one after the other while they began this request.",
            deaths=history.deaths_without_progress,
            last_error=error.code,
        )
    if _orderly(error):
        moves = history.orderly
        return _exhausted(error, "orderly moves", moves - 1, ORDERLY_MOVES) if moves > ORDERLY_MOVES else None
    if limit == 0:
        return error
    if history.failures > limit:
        return _exhausted(error, "migrations", history.failures - 1, limit)
    if max_length and sequence_length > max_length:
        return MigrationExhausted(
            f"The worker failed ({error.code}) and the sequence of {sequence_length} tokens is over "
            f"DYN_MIGRATION_MAX_SEQ_LEN={max_length}, so it was not moved.",
            last_error=error.code,
            sequence_length=sequence_length,
            limit=max_length,
        )
    return None


def _orderly(error: HoldfastError) -> bool:
    return isinstance(error, WorkerDraining | AcceptOverdue) or error.fault == "capacity"


def _exhausted(error: HoldfastError, what: str, made: int, limit: int) -> MigrationExhausted:
    return MigrationExhausted(
        f"Gave up after {made} {what} (limit {limit}); the last failure was {error.code}: {error.message}",
        last_error=error.code,
        made=made,
        limit=limit,
    )
