"""P7: repeated attempts stay within a budget; the first move of a stream after its worker's death is never refused.

Asserted per stream: failures that were somebody's fault (not a full, refusing or draining worker, not a hedged accept)
are at most twice the migration limit: the limit, and as many again that the death of a convicted neighbour may excuse.
Asserted per frontend: all such failures together are at most what its budget can ever have held (100 saved, a fifth per
request, 10 a second) plus one free first move per stream. And no stream ends because of the budget with fewer than two
such failures.

Asserted per prompt that kills: where it is the only one, and nothing else kills, it takes no more than `KILLED` workers
with it (`docs/explanation/poison.md`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from holdfast.sim.history import Violation
from holdfast.sim.oracles.facts import Facts

BURST, RATIO, FLOOR = 100.0, 0.2, 10.0
KILLED = 3
_DEADLY = ("[[mock:crash", "[[mock:freeze")
_OTHERWISE = frozenset({"power-loss", "freeze", "partition", "slow", "delay", "reset", "out-of-memory", "engine-hang"})
"""Faults that look like a death to a frontend."""


def check(facts: Facts) -> Iterator[Violation]:
    """Return the breaches."""
    history, limit = facts.history, facts.plan.migration_limit
    streams = Counter((f.label, f.choice) for f in history.failures if not f.orderly)
    for (label, choice), number in streams.items():
        if number > 2 * limit:
            where = {"call": label, "choice": choice, "failures": number, "limit": limit}
            yield Violation("P7", "a stream was moved more often than it may", where)
    for name in {f.frontend for f in history.failures}:
        repeated = sum(1 for f in history.failures if f.frontend == name and not f.orderly)
        requests = sum(1 for call in history.calls if call.frontend == name)
        moved = len({(f.label, f.choice) for f in history.failures if f.frontend == name})
        most = BURST + RATIO * requests + FLOOR * (history.finished - history.began) + moved
        if repeated > most:
            where = {"frontend": name, "repeated": repeated, "budget": round(most)}
            yield Violation("P7", "more attempts were repeated than the budget allows", where)
    for ending in history.endings:
        if ending.knob == "retry budget" and streams[ending.label, ending.choice] < 2:
            where = {"call": ending.label, "choice": ending.choice, "at": round(ending.at, 3)}
            yield Violation("P7", "the budget refused a stream's first move", where)
    yield from _killers(facts)


def _killers(facts: Facts) -> Iterator[Violation]:
    """Look at the one prompt that kills, if there is just one and nothing else takes workers away."""
    deadly = [call for call in facts.history.calls if any(mark in facts.body(call) for mark in _DEADLY)]
    planned = {fault.kind for fault in facts.plan.faults}
    if len(deadly) != 1 or planned & (_OTHERWISE | {"crash"}):
        return
    killed = sum(1 for life in facts.history.lives if life.role == "worker" and life.how == "crashed")
    if killed > KILLED:
        yield Violation("P7", "a prompt that kills was handed on too often", {"call": deadly[0].name, "killed": killed})
