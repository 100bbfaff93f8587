"""What telemetry costs the frontend per token and per request: the same frontend with and without.

``python -m bench.telemetry`` runs 64 streams that get a token every 5 ms, and many short requests, against a frontend
as it is and against one whose telemetry was taken out in memory: no counts, no stories, no ids, no logs of requests,
no clock readings. Alternates the two, reports medians of CPU time, and fails over the bound of ten per cent.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import statistics
import sys
import tempfile
from pathlib import Path

from bench import cluster as start
from bench.load import chat, cpu_seconds, run

BOUND = 0.10
ROOT = str(Path(__file__).resolve().parent.parent)
SWITCH = "HOLDFAST_BENCH_WITHOUT_TELEMETRY"


def take_out() -> None:
    """Replace what telemetry does in this process by nothing."""
    # imported where a process begins, before anything else has been
    from holdfast.frontend import metrics, prepare, story  # noqa: PLC0415
    from holdfast.requests import driver, flusher, generation  # noqa: PLC0415
    from holdfast.telemetry import context, loop_delay  # noqa: PLC0415

    def nothing(*_: object, **__: object) -> None:
        return None

    for name in ("prepared", "begun", "finished", "attempt_started", "attempt_sent", "accepted", "first_token",
                 "progressed", "migration_started", "migrated", "ended", "answered", "pool_event"):  # fmt: skip
        setattr(metrics.FrontendMetrics, name, nothing)
    for name in ("identify", "refused", "ended"):
        setattr(story.Story, name, nothing)
    prepared = prepare.Preparer.__init__

    def unwatched(self: prepare.Preparer, *args: object) -> None:
        prepared(self, *args[:-1], prepare.Timing(lambda: 0, nothing, nothing))  # type: ignore[arg-type]

    prepare.Preparer.__init__ = unwatched  # type: ignore[method-assign]
    generation.Generation.note = nothing  # type: ignore[method-assign]
    flusher.Flusher.look = nothing  # type: ignore[method-assign]
    flusher._loop_ns = lambda: 0  # noqa: SLF001
    driver.CONSIDERED_SHOWN = 0
    context.enter = nothing

    async def idle(*_: object) -> None:
        await asyncio.Event().wait()

    loop_delay.watch_loop = idle  # type: ignore[assignment]
    started = generation.Generation.__init__

    def without_rhythm(self: generation.Generation, *args: object) -> None:
        started(self, *args)  # type: ignore[arg-type]
        self._came = nothing  # type: ignore[assignment]

    generation.Generation.__init__ = without_rhythm  # type: ignore[method-assign]


async def measure(quick: bool) -> list[tuple[str, float, float]]:
    """Return (what, CPU us with, CPU us without)."""
    figures: dict[bool, list[tuple[float, float]]] = {False: [], True: []}
    with tempfile.TemporaryDirectory() as place:
        # Python runs a module of this name at the start of every child process
        (Path(place) / "sitecustomize.py").write_text("from bench.telemetry import at_start\nat_start()\n")
        os.environ["PYTHONPATH"] = os.pathsep.join([place, ROOT])
        for _ in range(2 if quick else 5):
            for without in (False, True):
                os.environ[SWITCH] = "1" if without else ""
                figures[without].append(await once(4 if quick else 8))
    median = {key: [statistics.median(column) for column in zip(*rows, strict=True)] for key, rows in figures.items()}
    return [
        ("per streamed token, 64 streams x 5 ms", median[False][0], median[True][0]),
        ("per streamed request of one token", median[False][1], median[True][1]),
    ]


async def once(each: int) -> tuple[float, float]:
    """Return the frontend's CPU us per token and per request."""
    tokens = 200
    async with start.cluster(step_ms=5) as up:
        await run(up.port, chat(tokens), clients=64, each=1)
        before = cpu_seconds(up.pid())
        await run(up.port, chat(tokens), clients=64, each=each)
        token = (cpu_seconds(up.pid()) - before) / (64 * each * tokens) * 1e6
        before = cpu_seconds(up.pid())
        await run(up.port, chat(1), clients=16, each=25 * each)
        return token, (cpu_seconds(up.pid()) - before) / (16 * 25 * each) * 1e6


def at_start() -> None:
    """Called in every child process before anything else."""
    if os.environ.get(SWITCH) and "frontend" in sys.orig_argv:
        take_out()


async def main(quick: bool) -> int:
    """Print the figures; 1 when the cost per token is over the bound."""
    rows = await measure(quick)
    for what, dear, cheap in rows:
        print(f"{what:<40} {dear:8.2f} us with  {cheap:8.2f} us without  {(dear / cheap - 1) * 100:+6.1f} %")
    _, dear, cheap = rows[0]
    return int(dear > cheap * (1 + BOUND))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="What telemetry costs.")
    parser.add_argument("--quick", action="store_true")
    sys.exit(asyncio.run(main(parser.parse_args().quick)))
