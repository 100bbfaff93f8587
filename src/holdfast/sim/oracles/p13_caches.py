"""P13, second part: after faults cease, every frontend knows what is in every engine's KV cache.

Asserted at the end, in universes whose workers tell KV events: within `universe.CACHE_BOUND` virtual seconds after
everything came to rest, the index of every frontend held for every worker exactly the blocks that its engine had
cached, of the worker's present start, and said that this knowledge is exact. Whatever was lost, repeated or
reordered on the way from engine to log to frontend, whoever crashed or was cut off.
"""

from __future__ import annotations

from collections.abc import Iterator

from holdfast.sim.history import Violation
from holdfast.sim.oracles.facts import Facts


def check(facts: Facts) -> Iterator[Violation]:
    """Return the breaches."""
    history = facts.history
    if not (facts.plan.kv_events and history.healed and history.converged):
        return
    wrong = [f"{v.frontend} on {v.worker}: {v.cache}" for v in history.views if v.cache]
    if wrong:
        yield Violation("P13", "a frontend does not know what is in a KV cache", {"views": wrong[:4]})
