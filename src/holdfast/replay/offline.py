"""Replays a trace on the virtual clock, through production frontends, routers and workers with mock engines.

Must never touch a real socket, and a real clock only to say what a run has cost.
"""

from __future__ import annotations

import concurrent.futures
import multiprocessing
import random
import resource
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import get_args

import msgspec

from holdfast.base.errors import InvalidRequest
from holdfast.replay.arrivals import Arrivals
from holdfast.replay.inprocess import SimDriver
from holdfast.replay.prompts import Prompts
from holdfast.replay.record import Recording
from holdfast.replay.report import Report, summarise
from holdfast.replay.run import REQUEST_SECONDS, replay
from holdfast.replay.simulated import ReplayCluster, Settings, new_world, run_world
from holdfast.replay.trace import TraceRequest, chosen
from holdfast.routing.policy import RouterMode


def replay_offline(
    requests: Iterable[TraceRequest],
    settings: Settings,
    arrivals: Arrivals,
    prompts: Prompts,
    *,
    seed: int = 1,
    patience: float = REQUEST_SECONDS,
) -> Recording:
    """Start a simulated cluster, send it all requests, and return what happened when the last one is over.

    Args:
        requests: read one at a time.
        settings: of the cluster.
        arrivals: when they are sent.
        prompts: makes the prompts.
        seed: the same one gives the same result.
        patience: virtual seconds that one request may take.

    Raises:
        BadTrace: a bad line.
    """

    async def main() -> Recording:
        cluster.start()
        await cluster.until_in_use()
        driver = SimDriver(cluster, prompts)
        rng = random.Random(seed)
        clients = cluster.clients
        work = replay(requests, driver, arrivals, rng, patience=patience)
        return await clients.spawn(work, "replay")

    with new_world(seed) as world:
        cluster = ReplayCluster(world, settings)
        return run_world(world, main(), "replay")


class Run(msgspec.Struct, frozen=True, kw_only=True):
    """One replay of a trace file, as plain data that another process can be given."""

    title: str
    settings: Settings
    arrivals: Arrivals
    trace: Path
    block: int
    limit: int | None
    max_output: int | None
    first_token: int
    salt: str
    seed: int


def run_one(run: Run) -> tuple[Report, float]:
    """Return its report, and what it cost in seconds of processor time. Raises BadTrace."""
    began = _processor_seconds()
    recording = replay_offline(
        chosen(run.trace, run.block, run.limit, run.max_output),
        run.settings,
        run.arrivals,
        Prompts(block=run.block, first_token=run.first_token, salt=run.salt),
        seed=run.seed,
        patience=run.settings.frontend.requests.request_timeout or REQUEST_SECONDS,
    )
    report = summarise(recording, run.title, run.arrivals.described)
    return report, _processor_seconds() - began


def run_all(
    runs: Sequence[Run], jobs: int = 1, done: Callable[[int], None] = lambda _: None
) -> list[tuple[Report, float]]:
    """Return what `run_one` does for each, in their order; the result does not depend on ``jobs``.

    Args:
        runs: what to run.
        jobs: processes side by side.
        done: told how many are over.

    Raises:
        BadTrace: a bad line.
    """
    found: list[tuple[Report, float]] = []
    if jobs <= 1 or len(runs) == 1:
        for run in runs:
            found.append(run_one(run))
            done(len(found))
        return found
    fresh = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(min(jobs, len(runs)), mp_context=fresh) as pool:
        for one in pool.map(run_one, runs):
            found.append(one)
            done(len(found))
    return found


def mode_names(text: str) -> list[RouterMode]:
    """Return the router modes in a list with commas; ``all``: all that choose by themselves. Raises InvalidRequest."""
    known: tuple[RouterMode, ...] = tuple(mode for mode in get_args(RouterMode) if mode != "direct")
    if text == "all":
        return list(known)
    names = [name.strip() for name in text.split(",")]
    strange = [name for name in names if name not in known]
    if strange:
        raise InvalidRequest(f"--router {text}: there is no {strange[0]!r}, but {', '.join(known)}, or all.")
    return [mode for name in names for mode in known if mode == name]


def _processor_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime
