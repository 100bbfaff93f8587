"""Many universes in simulation, and their figures in the track record. ``python -m tests.proof.universes --help``.

A run that was broken off goes on where it was, as long as commit and seeds are the same. Prints the summary of
`holdfast sim` and adds a row to ``docs/track-record.md``; exits with 1 when a promise was broken, or when something
that must happen now and then never did.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path

from holdfast.cli.show import table
from holdfast.cli.sim import Progress
from holdfast.sim.campaign import run_campaign
from holdfast.sim.guard import ensure_hash_seed
from holdfast.sim.tally import Tally, lines, tally
from tests.proof import record

UNIVERSES = 23_000
"""About one in nine is too quiet to count."""


def state_file(first: int, last: int) -> Path:
    """Return where a run keeps what it has done: one file per range of seeds and commit."""
    return Path(tempfile.gettempdir()) / f"holdfast-universes-{first}-{last}-{record.commit()}.jsonl"


def row(total: Tally, first: int, last: int) -> list[str]:
    """Return a campaign's row of the track record."""
    cpu = total.cpu_seconds or 1e-9
    return [
        record.commit(),
        record.machine(),
        f"{first}..{last}",
        f"{total.universes:,}",
        f"{total.counted:,}",
        f"{total.virtual_seconds / 3600:,.1f} h",
        f"{total.requests:,}",
        f"{total.tokens:,}",
        f"{sum(total.of('fault').values()):,} ({sum(total.of('hit').values()):,})",
        f"{sum(total.of('migration').values()):,}",
        f"{len(total.failing):,}" + (f"; never happened: {', '.join(total.overdue)}" if total.overdue else ""),
        f"{cpu / 60:,.0f} min",
        f"{total.callbacks / cpu:,.0f}",
        f"{total.virtual_seconds / cpu:.0f}",
    ]


def main() -> int:
    """Run, print, put on record."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--first", type=int, default=0, help="first seed")
    options.add_argument("--universes", type=int, default=UNIVERSES, help="how many")
    options.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes; all cores when left out")
    options.add_argument("--limit", type=float, default=0.0, help="seconds after which no more is begun; 0: none")
    options.add_argument("--no-record", action="store_true", help="leave docs/track-record.md alone")
    given = options.parse_args()
    ensure_hash_seed()
    first, last = given.first, given.first + given.universes - 1
    log = state_file(first, last)
    print(f"results are kept in {log}", file=sys.stderr)
    began = time.monotonic()
    with Progress(given.universes) as progress:
        results = run_campaign(
            range(first, last + 1),
            jobs=given.jobs,
            log=log,
            on_result=progress,
            until=lambda: bool(given.limit) and time.monotonic() - began >= given.limit,
        )
    total = tally(results)
    print(table(lines(total)))
    for result in [result for result in results if result.broken][:20]:
        print(f"seed {result.seed}: {result.broken[0].promise}: {result.broken[0].what} ({result.broken[0].evidence})")
    if not given.no_record and results:
        record.append_universes(row(total, first, max(result.seed for result in results)))
    return 0 if total.ok else 1


if __name__ == "__main__":
    sys.exit(main())
