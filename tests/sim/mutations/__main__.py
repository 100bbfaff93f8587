"""Look for every planted bug, on all cores: ``python -m tests.sim.mutations [--record] [names…]``.

Goes on where it was broken off, as long as nothing has changed. With ``--record`` the universes needed are written to
``first_seeds.json``, which the tests read, and the table to ``docs/track-record.md``.
"""

from __future__ import annotations

import argparse
import os
import platform
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from datetime import UTC, datetime

from holdfast.sim.guard import ensure_hash_seed
from tests.sim.mutations.catalogue import BUGS
from tests.sim.mutations.hunt import Found
from tests.sim.mutations.ledger import ROOT, done, keep_first_seeds, note, put_on_record, tree
from tests.sim.mutations.search import processes, search, without

CLEAN = 200
"""Universes without a bug that must be quiet."""


def main() -> int:
    """Run it; returns 0 when every bug was noticed and nothing was said without one."""
    parser = argparse.ArgumentParser(prog="python -m tests.sim.mutations", description=__doc__)
    parser.add_argument("names", nargs="*", help="bugs to look for; none: all")
    parser.add_argument("--record", action="store_true", help="write first_seeds.json and docs/track-record.md")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    given = parser.parse_args()
    ensure_hash_seed()
    began = time.perf_counter()
    with processes(given.jobs) as pool:
        results = _search(pool, given.names or list(BUGS))
        loud = [sighting for sighting in without(pool, CLEAN) if sighting.oracles]
    for sighting in loud:
        print(f"without a bug: seed {sighting.seed}: {sighting.first}")
    lost = [name for name, found in results.items() if found.seed < 0]
    print(f"{len(results) - len(lost)} of {len(results)} bugs noticed in {time.perf_counter() - began:.0f} s")
    if given.record and not given.names and not loud:
        keep_first_seeds(results)
        put_on_record(results, _stamp(), CLEAN)
    return 1 if lost or loud else 0


def _search(pool: ProcessPoolExecutor, names: list[str]) -> dict[str, Found]:
    state = tree()
    results = {name: found for name, found in done(state).items() if name in names}
    missing = [name for name in names if name not in results]
    for number, found in enumerate(search(pool, missing), len(results) + 1):
        results[found.bug] = found
        note(state, found)
        where = f"seed {found.seed} by {found.oracle}, often {found.often}" if found.seed >= 0 else "NOT NOTICED"
        print(f"{number:3d}/{len(names)} {found.bug:40s} {where}", flush=True)
    return {name: results[name] for name in names}


def _stamp() -> str:
    commit = subprocess.run(
        ["git", "rev-parse", "--short=12", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
    ).stdout.strip()
    when = datetime.now(UTC).strftime("%Y-%m-%d %H:%M")
    return f"{when} UTC, commit {commit or 'unknown'}, Python {platform.python_version()}"


if __name__ == "__main__":
    sys.exit(main())
