"""All planted bugs."""

from __future__ import annotations

from tests.sim.mutations import caches, fleet, legs, streams, work
from tests.sim.mutations.bugs import Bug

BUGS: dict[str, Bug] = {bug.name: bug for bug in (*streams.BUGS, *work.BUGS, *fleet.BUGS, *caches.BUGS, *legs.BUGS)}
