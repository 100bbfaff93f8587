"""P6: a request answered with a rejection was never accepted by a worker and cost no engine work.

Asserted: for every choice whose terminal state is ``rejected``, and every request refused before it became one, no
engine took a sequence of it. Excused is a sequence whose acceptance the frontend could not know of: the attempt
failed on the way (a fault of the transport) before the worker's word arrived.

No engine is given a sequence again that an engine has refused as a mistake, unless that word was lost on the way, or
both legs of a rendezvous had it at once. An earlier attempt that only arrives later, at a worker too slow to read it,
was not given again.

A mistake (``valid`` is false) must be answered with a status from 400 to 499, unless its client left or its frontend
was gone, full or leaving; it may have reached an engine, which must have refused it.
"""

from __future__ import annotations

from collections.abc import Iterator

from holdfast.sim.history import Call, Violation
from holdfast.sim.oracles.facts import Facts

_UNKNOWN = ("migration_exhausted", "no_workers", "deadline_exceeded", "shutting_down")
"""Last words that follow upon failures on the way, or that may come while the worker's word is on its way."""


_MISTAKES = ("invalid_request", "context_length_exceeded", "unsupported_feature")


def check(facts: Facts) -> Iterator[Violation]:
    """Return the breaches."""
    failed = [*facts.history.failures, *facts.history.legs]
    lost = {(f.label, f.choice, f.attempt) for f in failed if f.fault == "transport"}
    refused = {call.name for call in facts.history.calls if call.status >= 400}
    for sequence in facts.sequences:
        choice = sequence.request.choice
        ending = facts.endings.get((sequence.label, choice))
        rejected = ending.state == "rejected" if ending is not None else sequence.label in refused
        if not rejected or not sequence.accepted:
            continue
        excused = (sequence.label, choice, sequence.request.attempt) in lost
        if ending is not None and (ending.fault == "transport" or ending.code in _UNKNOWN):
            excused = True
        if not excused:
            where = {"call": sequence.label, "choice": choice, "worker": sequence.worker, "tokens": sequence.tokens}
            yield Violation("P6", "a rejected request was accepted by a worker", where)
    yield from _again(facts, lost)
    for call in facts.history.calls:
        if not call.valid and call.ending == "complete" and not _refused(call):
            yield Violation("P6", "a mistake was not refused", {"call": call.name, "status": call.status})


def _again(facts: Facts, lost: set[tuple[str, int, int]]) -> Iterator[Violation]:
    refused: dict[tuple[str, int], int] = {}
    for sequence in facts.sequences:
        key = (sequence.label, sequence.request.choice)
        twin = sequence.request.handoff is not None and refused.get(key) == sequence.request.attempt
        if key in refused and not twin and sequence.request.attempt >= refused[key]:
            where = {"call": sequence.label, "worker": sequence.worker, "attempt": sequence.request.attempt}
            yield Violation("P6", "a mistake was tried again", where)
        if (
            sequence.ending == "refused"
            and sequence.error in _MISTAKES
            and (*key, sequence.request.attempt) not in lost
        ):
            refused[key] = sequence.request.attempt


def _refused(call: Call) -> bool:
    return 400 <= call.status < 500 or call.status in (503, 504)
