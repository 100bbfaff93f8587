"""Replays published rows of measured hardware on the mock engine's profiles and prints the error of each row.

``python -m bench.mock_fidelity [--repeat N]``. Virtual time: half an hour of serving takes seconds.

The rows are single engines under closed-loop load with about 1,024 tokens in and out. How they were driven is not
published; they are reproduced as the usual benchmark does it: ten requests per seat, all seats taken at once, nothing
left out, both lengths uniform between 80 and 100 % of the nominal one. Which of its figures a profile was fitted to is
said in docs/explanation/mock-engine.md: throughput, time per token and time to first token of the same rows.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import statistics
import sys
import time
from collections.abc import Iterator
from typing import NamedTuple

from tests.support.virtual_time import VirtualLoop

from holdfast.engines.mock import MockConfig, MockEngine
from holdfast.engines.mock.config import ProfileName
from holdfast.engines.mock.profiles import PROFILES
from holdfast.replay.arrivals import Arrivals
from holdfast.replay.engines import EngineDriver
from holdfast.replay.prompts import Prompts
from holdfast.replay.record import Recording
from holdfast.replay.run import replay
from holdfast.replay.trace import TraceRequest

NOMINAL = 1024
SHORTEST = 0.8
PER_SEAT = 10


class Figures(NamedTuple):
    """Output tokens a second and GPU, milliseconds per token after the first, milliseconds to the first."""

    rate: float
    tpot: float
    ttft: float


class Row(NamedTuple):
    """One published measurement."""

    profile: ProfileName
    concurrency: int
    measured: Figures


def _rows(profile: ProfileName, seats: str, rates: str, tpots: str, ttfts: str) -> list[Row]:
    columns = zip(*(map(float, text.split()) for text in (seats, rates, tpots, ttfts)), strict=True)
    return [Row(profile, int(c), Figures(rate, tpot, ttft)) for c, rate, tpot, ttft in columns]


ROWS = [
    *_rows(
        "h100-qwen3-32b-tp2",
        "8 16 32 64 128",
        "251.6 460.3 797.4 1226.6 1691.4",
        "15.9 17.4 20.1 26.1 37.8",
        "154 187 237 381 652",
    ),
    *_rows(
        "b200-minimax-m2.5-fp8-tp4",
        "4 8 16 32 64",
        "99.8 191.1 314.8 474.6 747.1",
        "9.58 10.12 12.31 16.32 20.64",
        "121.5 100.7 117.0 146.1 220.4",
    ),
]


def load(concurrency: int, rng: random.Random) -> Iterator[TraceRequest]:
    """Yield requests without anything in common."""
    for number in range(PER_SEAT * concurrency):
        prompt, output = (round(NOMINAL * rng.uniform(SHORTEST, 1.0)) for _ in range(2))
        yield TraceRequest(0.0, prompt, output, (2 * number, 2 * number + 1))


async def _serve(row: Row, seed: int) -> Recording:
    driver = EngineDriver([MockEngine(MockConfig(profile=row.profile, kv_events=False))], Prompts())
    await driver.start()
    rng = random.Random(f"{seed}/{row.concurrency}")
    try:
        return await replay(load(row.concurrency, rng), driver, Arrivals(concurrency=row.concurrency), rng)
    finally:
        await driver.close()


def simulate(row: Row, seed: int = 1) -> Figures:
    """Return what the profile makes of a row's load."""
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        records = runner.run(_serve(row, seed)).records
    tokens = sum(record.generated for record in records)
    seconds = max(record.end or 0.0 for record in records)
    return Figures(
        tokens / seconds / PROFILES[row.profile].gpus,
        statistics.fmean(1e3 * (record.time_per_token or 0.0) for record in records),
        statistics.fmean(1e3 * (record.time_to_first_token or 0.0) for record in records),
    )


def errors(row: Row, found: Figures) -> Figures:
    """Return the relative errors."""
    return Figures(*(got / wanted - 1.0 for got, wanted in zip(found, row.measured, strict=True)))


def mean_errors(found: dict[Row, Figures], profile: ProfileName) -> Figures:
    """Return the mean absolute relative error of each figure over a profile's rows."""
    mine = [errors(row, figures) for row, figures in found.items() if row.profile == profile]
    return Figures(*(statistics.fmean(map(abs, column)) for column in zip(*mine, strict=True)))


def main(seeds: int) -> None:
    """Print the table."""
    print(f"{'profile':<28}{'seats':>6}{'tokens/s/GPU':>22}{'ms per token':>22}{'ms to first':>22}")
    found: dict[Row, Figures] = {}
    began = time.perf_counter()
    for row in ROWS:
        runs = [simulate(row, seed) for seed in range(1, seeds + 1)]
        found[row] = Figures(*(statistics.fmean(column) for column in zip(*runs, strict=True)))
        cells = zip(row.measured, found[row], errors(row, found[row]), strict=True)
        text = "".join(f"{wanted:>8.1f}{got:>7.1f}{error:>+7.1%}" for wanted, got, error in cells)
        print(f"{row.profile:<28}{row.concurrency:>6}{text}", flush=True)
    for profile in dict.fromkeys(row.profile for row in ROWS):
        text = "".join(f"{error:>22.1%}" for error in mean_errors(found, profile))
        print(f"{profile:<28}{'mean':>6}{text}")
    print(f"({time.perf_counter() - began:.0f} s)", file=sys.stderr)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="The error of each profile on published rows.")
    parser.add_argument("--repeat", type=int, default=1, help="runs with other lengths, averaged")
    main(parser.parse_args().repeat)
