"""Many plans against real processes. ``python -m tests.faults.campaign --help``.

Every seed is a plan as the simulation draws it, carried out with signals, a bad network and misbehaving engines, and
judged by the simulation's oracles. A run that was broken off goes on where it was, as long as the commit is the same.
Prints what was covered and adds a row to ``docs/track-record.md``; exits with 1 when a promise was broken, and with 2
when clusters do not even start.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import sys
import tempfile
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import aclosing
from pathlib import Path

import msgspec

from holdfast.sim.plan import Plan
from tests.faults.cluster import Cluster, settings_of
from tests.faults.plans import Setting, drawn, sweep
from tests.faults.rounds import NEVER_READY, Round
from tests.faults.tally import Covered, Tally, covered
from tests.proof import record

STILLBORN = 3
"""Clusters in a row that were never ready, after which something is wrong with all of them: nothing is recorded."""
CHUNK = 24
"""Seeds within which those of equal settings are run one after the other."""
Job = tuple[int, Setting, Plan]


async def rounds(
    jobs: Iterable[Job], keep: Path | None = None, enough: Callable[[], bool] = lambda: False
) -> AsyncIterator[Covered]:
    """Run plans one after the other, those of equal settings on one cluster; yields what each covered.

    Args:
        jobs: seed, name of the settings, and plan.
        keep: where the log and plan of a broken promise are left.
        enough: asked after each round whether that was the last one; take what comes to its end.
    """
    waiting = list(jobs)
    while waiting:
        first = waiting[0][2]
        same = [job for job in waiting if _alike(job[2], first)]
        waiting = [job for job in waiting if job not in same]
        with tempfile.TemporaryDirectory(prefix="holdfast-faults-") as root:
            cluster = Cluster(first, Path(root), random.Random(same[0][0]))
            async with cluster.running():
                for seed, setting, plan in same:
                    cluster.plan = plan
                    result = await Round(cluster, plan, seed).run()
                    if result.violations and keep is not None:
                        _leave(keep, Path(root), seed, plan, [str(v) for v in result.violations])
                    yield covered(result, setting)
                    if enough():
                        return


def _alike(plan: Plan, other: Plan) -> bool:
    """Whether one cluster will do for both; a first start of an old version is over after one round."""
    if plan.old or other.old:
        return plan is other
    shape = msgspec.structs.replace(plan.shape, requests=0, more_requests=0, faults=0, more_faults=0, span=0.0)
    mine = msgspec.structs.replace(settings_of(plan), shape=shape)
    shape = msgspec.structs.replace(other.shape, requests=0, more_requests=0, faults=0, more_faults=0, span=0.0)
    theirs = msgspec.structs.replace(settings_of(other), shape=shape)
    return msgspec.structs.replace(mine, shape=msgspec.structs.replace(mine.shape, profile=None)) == (
        msgspec.structs.replace(theirs, shape=msgspec.structs.replace(theirs.shape, profile=None))
    )


def _leave(keep: Path, root: Path, seed: int, plan: Plan, broken: list[str]) -> None:
    keep.mkdir(parents=True, exist_ok=True)
    (keep / f"{seed}.plan.json").write_bytes(msgspec.json.encode(plan))
    (keep / f"{seed}.log").write_text("\n".join(broken) + "\n\n" + (root / "cluster.log").read_text())


def sweep_jobs(seed: int = 1) -> list[Job]:
    """Return the safety minimum: every kind of fault once."""
    return [(seed * 1000 + i, "plain", plan) for i, plan in enumerate(sweep(seed))]


def drawn_jobs(seeds: Iterable[int]) -> list[Job]:
    """Return the plans of these seeds."""
    return [(seed, *drawn(seed)) for seed in seeds]


class CannotStart(Exception):
    """Not even the first requests of several clusters could be sent."""


async def run(seeds: range, state: Path, keep: Path, seconds: float) -> Tally:
    """Run what is not on record yet, until the time is over.

    Raises:
        CannotStart: `STILLBORN` clusters in a row were never ready; why is in the logs that were kept.
    """
    loop = asyncio.get_running_loop()
    end = loop.time() + seconds
    tally = Tally()
    for one in record.load(state, Covered):
        tally.add(one)
    done = {one.seed for one in tally.rounds}
    left = [seed for seed in seeds if seed not in done]
    if done:
        print(f"going on after {len(done)} rounds ({state})", flush=True)
    began = loop.time()
    stillborn: list[Covered] = []
    for begin in range(0, len(left), CHUNK):
        if loop.time() >= end:
            break
        async with aclosing(
            rounds(drawn_jobs(left[begin : begin + CHUNK]), keep, lambda: loop.time() >= end)
        ) as results:
            async for one in results:
                stillborn.append(one)
                if not any(NEVER_READY in what for what in one.broken):
                    for held in stillborn:
                        record.save(state, held)
                    stillborn.clear()
                elif len(stillborn) >= STILLBORN:
                    raise CannotStart(f"{STILLBORN} clusters in a row were never ready; see {keep}")
                tally.add(one)
                _progress(tally, one, len(seeds), loop.time() - began, len(done))
    return tally


def _progress(tally: Tally, one: Covered, wanted: int, seconds: float, before: int) -> None:
    """Print a round, and when the rest will be done if it takes as long as what this run has done so far."""
    number = len(tally.rounds)
    left = seconds / (number - before) * (wanted - number)
    print(
        f"{number:>4}/{wanted}  seed {one.seed:<6}{one.setting:<9}{one.seconds:6.1f} s  {one.hits} hits  "
        f"{sum(one.moves.values()):>3} moves  {left / 60:4.0f} min left  {'; '.join(one.broken)}",
        flush=True,
    )


def main() -> int:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plans", type=int, default=200)
    parser.add_argument("--first", type=int, default=1, help="first seed")
    parser.add_argument("--seconds", type=float, default=6 * 3600.0, help="stop after the round in which this is over")
    parser.add_argument("--no-record", action="store_true", help="leave docs/track-record.md alone")
    parser.add_argument("--fresh", action="store_true", help="forget what an earlier run has done")
    args = parser.parse_args()
    commit = record.commit()
    state = record.state_file("faults", args.first)
    if args.fresh:
        state.unlink(missing_ok=True)
    keep = state.with_suffix(".broken")
    try:
        tally = asyncio.run(run(range(args.first, args.first + args.plans), state, keep, args.seconds))
    except CannotStart as reason:
        print(reason, file=sys.stderr)
        return 2
    print(f"\n{tally.table()}")
    if tally.broken:
        print(f"logs and plans of broken promises: {keep}")
    if len(tally.rounds) < args.plans:
        print(f"{len(tally.rounds)} of {args.plans} plans: not put on record; the same command goes on from here")
    elif not args.no_record:
        record.append_faults(
            [
                *(commit, record.machine(), f"{args.first} to {args.first + args.plans - 1}"),
                *(str(len(tally.rounds)), str(sum(one.requests for one in tally.rounds)), str(tally.struck)),
                *(str(sum(one.hits for one in tally.rounds)), str(sum(tally.moves.values()))),
                *(", ".join(tally.missing) or "none", str(len(tally.broken))),
            ]
        )
    return 1 if tally.broken else 0


if __name__ == "__main__":
    sys.exit(main())
