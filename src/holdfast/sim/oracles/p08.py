"""P8: a worker accepts nothing after it has said ``draining``.

Asserted for every start of every worker: no user's sequence was taken by its engine later than the moment at which it
told its callers that it drains. No tolerance: both are facts of one process, on one clock.
"""

from __future__ import annotations

from collections.abc import Iterator

from holdfast.sim.history import Violation
from holdfast.sim.oracles.facts import Facts


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
