"""P5: nothing outlives its deadline.

Asserted for every request: from its arrival at the frontend to the frontend's terminal event of each choice no more
time passed than its own bound (``x-holdfast-timeout-ms``), or the frontend's for all requests; plus `SLACK`: deadlines
are looked at every 50 ms, and the request is prepared before its clock starts. Time in which the frontend's process
stood still or was slowed down is added: it cannot judge then (`requests.deadlines` charges it to nobody but the bound
on the whole request, which it then notices on waking). A request whose frontend died has no deadline.
"""

from __future__ import annotations

from collections.abc import Iterator

from holdfast.sim.history import Violation
from holdfast.sim.oracles.facts import Facts

SLACK = 0.25
"""Seconds."""


def check(facts: Facts) -> Iterator[Violation]:
    """Return the breaches."""
    for call in facts.history.calls:
        own = call.headers.get("x-holdfast-timeout-ms", "")
        bound = int(own) / 1000 if own.isdigit() else facts.plan.request_timeout
        for choice in range(facts.choices(call)):
            ending = facts.endings.get((call.name, choice))
            if ending is None:
                continue
            took = ending.at - call.sent - facts.stopped(call.frontend, call.sent, ending.at)
            if took > bound + SLACK * facts.stretch:
                where = {"call": call.name, "choice": choice, "took": round(took, 3), "bound": bound}
                yield Violation("P5", "a request outlived its deadline", where)
