"""P13: after faults cease, every healthy worker gets traffic again and every frontend's view equals the truth.

Asserted at the end: within `universe.ANSWER_BOUND` virtual seconds after the last fault every request had ended; within
`universe.CONVERGE_BOUND` more every frontend would send new work to every worker (eligible, of the right start, not
inhibited, not on trial) and each worker had served a plain request of each frontend. The first bound follows from the
bound on a whole request (40 s), the second from the longest inhibition and the longest hold after a hang (60 s).
"""

from __future__ import annotations

from collections.abc import Iterator

from holdfast.sim.history import Violation
from holdfast.sim.oracles.facts import Facts


def check(facts: Facts) -> Iterator[Violation]:
    """Return the breaches."""
    history = facts.history
    if not history.healed:
        return
    if not history.answered:
        waiting = [call.name for call in history.calls if call.ending == ""]
        yield Violation("P13", "requests had not ended long after the last fault", {"calls": waiting[:5]})
    if not history.converged:
        wrong = [v for v in history.views if not (v.alive and v.eligible and v.current and v.served)]
        shown = [f"{v.frontend} sees {v.worker} {v.state or 'nowhere'}" for v in wrong[:4]]
        yield Violation(
            "P13", "not every worker was in use again", {"views": shown, "healed": round(history.healed, 3)}
        )
