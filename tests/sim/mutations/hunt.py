"""Runs universes with a bug planted, and says which oracles noticed it, and when for the first time.

Must never judge by itself: oracles do.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import msgspec

from holdfast.sim.guard import Escape
from holdfast.sim.lanes import Runaway
from holdfast.sim.plan import Shape
from holdfast.sim.universe import run_universe
from tests.sim.mutations.bugs import MOST, Bug
from tests.sim.mutations.planting import planted

SAMPLE = 10
"""Universes of which it is counted in how many a bug was noticed."""


class Sighting(msgspec.Struct, frozen=True):
    """What became of one universe."""

    seed: int
    oracles: tuple[str, ...]
    """Who noticed something."""
    first: str = ""
    """The first that was said."""

    def by(self, bug: Bug) -> str:
        """Return the oracle that was to notice the bug and did; empty: none."""
        return next((oracle for oracle in bug.caught_by if oracle in self.oracles), "")


class Found(msgspec.Struct, frozen=True):
    """How a bug was found."""

    bug: str
    seed: int = -1
    """The first universe in which it was noticed; -1: none."""
    oracle: str = ""
    often: int = 0
    """In how many of the first `SAMPLE` universes it was noticed."""
    others: tuple[str, ...] = ()
    """Further oracles that noticed it in one of the universes that were looked at."""


def judged(seed: int, shape: Shape) -> Sighting:
    """Run one universe and return what the oracles said."""
    try:
        violations = run_universe(seed, shape).violations
    except (Escape, Runaway) as error:
        return Sighting(seed, (type(error).__name__,), str(error))
    promises = tuple(dict.fromkeys(violation.promise for violation in violations))
    return Sighting(seed, promises, str(violations[0]) if violations else "")


def sightings(bug: Bug, seeds: Iterable[int]) -> Iterator[Sighting]:
    """Yield what becomes of each of these universes with a bug in it."""
    with planted(bug.edits):
        for seed in seeds:
            yield judged(seed, bug.shape)


def first_sighting(bug: Bug, seeds: Iterable[int]) -> Sighting | None:
    """Return the first universe in which a bug is noticed by who should notice it."""
    return next((sighting for sighting in sightings(bug, seeds) if sighting.by(bug)), None)


def find(bug: Bug) -> Found:
    """Look for a bug: in `SAMPLE` universes at least, in `MOST` at most."""
    found = Found(bug.name)
    others: dict[str, None] = {}
    for sighting in sightings(bug, range(MOST)):
        oracle = sighting.by(bug)
        others.update(dict.fromkeys(sighting.oracles))
        if oracle and found.seed < 0:
            found = msgspec.structs.replace(found, seed=sighting.seed, oracle=oracle)
        if oracle and sighting.seed < SAMPLE:
            found = msgspec.structs.replace(found, often=found.often + 1)
        if sighting.seed >= SAMPLE - 1 and found.seed >= 0:
            break
    others.pop(found.oracle, None)
    return msgspec.structs.replace(found, others=tuple(sorted(others)))
