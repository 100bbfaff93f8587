"""Looks for bugs in processes of their own; they can only find functions of modules, not of a main program.

Must never write anything down.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed

from holdfast.base.lineage import OWNER_PID, die_with_owner
from holdfast.sim.plan import Shape
from tests.sim.mutations.catalogue import BUGS
from tests.sim.mutations.hunt import Found, Sighting, find, judged


def processes(jobs: int) -> ProcessPoolExecutor:
    """Return that many, which end with this one."""
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(jobs, context, initializer=_obey, initargs=(os.getpid(),))


def search(pool: ProcessPoolExecutor, names: Iterable[str]) -> Iterator[Found]:
    """Look for these bugs; yields what was found in the order in which it was."""
    for future in as_completed([pool.submit(_look_for, name) for name in names]):
        yield future.result()


def without(pool: ProcessPoolExecutor, count: int) -> Iterator[Sighting]:
    """Run that many universes without a bug."""
    yield from pool.map(_look_without, range(count), chunksize=10)


def _obey(owner: int) -> None:
    die_with_owner({OWNER_PID: str(owner)})


def _look_for(name: str) -> Found:
    return find(BUGS[name])


def _look_without(seed: int) -> Sighting:
    return judged(seed, Shape())
