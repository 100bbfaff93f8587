"""P9: rollouts keep the floor of routable workers: all but one.

Asserted while a rolling restart (`local.rolling.Rolling`, of workers or of frontends) is under way, at every look (50
a second), for every frontend that has been in service for `SETTLED` seconds: it would send new work to at least all
workers but one. Only where nothing else goes wrong between `BEFORE` seconds before the restart and its end: a worker
that crashes meanwhile is not the rollout's doing, and the rollout then waits for it before its next step.

"Would send work" leaves inhibition aside: a worker that failed a request is avoided for a second, and used when there
is nobody else. A worker that says itself that it is stalled, because an engine's error struck its canaries, counts as
there: that is no rollout's doing either (seed 1234 at 9688b10).
"""

from __future__ import annotations

from collections.abc import Iterator

from holdfast.sim.history import Violation
from holdfast.sim.oracles.facts import Facts

SETTLED = 0.5
BEFORE = 8.0
_HARMLESS = ("rolling-restart", "wall-jump", "overload", "engine-error", "engine-abort", "engine-refuse")


def check(facts: Facts) -> Iterator[Violation]:
    """Return the breaches."""
    history, floor = facts.history, facts.plan.shape.workers - 1
    for began, ended in history.rollouts:
        if any(
            fault.kind not in _HARMLESS and fault.at <= ended and fault.until >= began - BEFORE
            for fault in history.fired
        ):
            continue
        for look in history.routable:
            if began <= look.at <= ended and look.at - look.ready >= SETTLED and look.usable < floor:
                where = {"frontend": look.frontend, "at": round(look.at, 3), "usable": look.usable, "floor": floor}
                yield Violation("P9", "a rollout left a frontend with too few workers", where)
                break
