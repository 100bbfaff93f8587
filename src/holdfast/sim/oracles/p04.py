"""P4: per process, leases sum to the gauges, and to zero at rest.

Asserted when every request has ended and a moment (`universe.REST`) has passed, for every process that lives: all
leases, the gauges that count what goes on, the claims on workers, the queue, the open streams of its connections and
the requests in hand are zero. During the run, at every look (20 a second): no lease is negative, a frontend has no more
request leases than active requests, and no more attempts than streams.

No tolerance. A process that was killed gives nothing back and is not asked.
"""

from __future__ import annotations

from collections.abc import Iterator

from holdfast.sim.history import Violation
from holdfast.sim.oracles.facts import Facts


def check(facts: Facts) -> Iterator[Violation]:
    """Return the breaches."""
    for residue in facts.history.residues:
        held = {f"lease {kind}": number for kind, number in residue.leases.items() if number}
        held |= {f"gauge {name}": int(number) for name, number in residue.gauges.items() if number}
        if residue.in_hand:
            held["in hand"] = residue.in_hand
        if residue.streams:
            held["open streams"] = residue.streams
        if held:
            yield Violation("P4", "something was not given back", {"process": residue.name, **held})
