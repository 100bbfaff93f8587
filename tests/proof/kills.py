"""Kill workers under running streams, many times, and compare every text. ``python -m tests.proof.kills --help``.

Each kill interrupts five of ten streams (mock engine, 10 ms a step) or two of four (llamacpp) at a random token: the
signal goes out as soon as the client has it.
A run that was broken off goes on where it was. Prints a table and adds a row to ``docs/track-record.md``; exits
with 1 when a single text, finish reason or count is wrong.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import logging
import math
import random
import statistics
import sys
from typing import Any

from tests.e2e.truth import Ask
from tests.proof import record
from tests.proof.fleet import Fleet, Seen, fleet
from tests.proof.record import Kill

STREAMS = {"mock": 10, "llamacpp": 4}
TOKENS = {"mock": 150, "llamacpp": 64}
KILLS = {"mock": 200, "llamacpp": 50}
GOALS_MS = (20.0, 60.0)
"""Median and 99th percentile of the gap, mock engine (issue: "How good")."""
_SUBJECTS = ("a lighthouse keeper", "the harbour at night", "an old map", "rain on a tin roof", "two ferry captains")


class Truths:
    """What each question's answer is: computed (mock) or asked undisturbed, once (llamacpp)."""

    def __init__(self, engine: str, up: Fleet):
        self._engine = engine
        self._up = up
        self._known: dict[str, tuple[str, list[str], int]] = {}

    async def of(self, body: dict[str, Any]) -> tuple[str, list[str], int]:
        """Return text, finish reasons and generated tokens."""
        if self._engine == "mock":
            text, finish, count = _ask(body).expected()
            return text, [finish], count
        key = repr(body)
        if key not in self._known:
            seen = await self._up.stream(body, Seen())
            assert not seen.error, f"the undisturbed run failed: {seen.error}"
            self._known[key] = (seen.text, seen.finish, seen.usage["completion_tokens"])
        return self._known[key]


def _ask(body: dict[str, Any]) -> Ask:
    return Ask(
        content=body["messages"][0]["content"],
        max_tokens=body["max_tokens"],
        temperature=body["temperature"],
        seed=body["seed"],
    )


def _bodies(engine: str, rng: random.Random, number: int) -> list[dict[str, Any]]:
    """Return the questions of one round: sampled and greedy in turn; few for llamacpp, whose truth must be asked."""
    bodies = []
    for i in range(STREAMS[engine]):
        content = f"round {number}, stream {i}" if engine == "mock" else f"Tell me about {_SUBJECTS[(number + i) % 5]}."
        bodies.append(
            {
                "messages": [{"role": "user", "content": content}],
                "max_tokens": TOKENS[engine],
                "temperature": (0.0, 0.8)[i % 2],
                "seed": rng.randrange(1, 1 << 31) if engine == "mock" else 7,
            }
        )
    return bodies


async def one_kill(up: Fleet, truths: Truths, engine: str, seed: int, number: int) -> Kill:
    """Run one round; what is drawn depends on (seed, number) only."""
    rng = random.Random(f"{seed}/{number}")
    bodies = _bodies(engine, rng, number)
    true = [await truths.of(body) for body in bodies]
    victim = rng.randrange(len(bodies))
    pieces = max(1, int(rng.uniform(0.1, 0.85) * TOKENS[engine]))
    answers = [Seen() for _ in bodies]
    tasks = [asyncio.ensure_future(up.stream(b, seen)) for b, seen in zip(bodies, answers, strict=True)]
    while len(answers[victim].times) < pieces and not answers[victim].over:  # noqa: ASYNC110  as close as possible
        await asyncio.sleep(0.001)
    now = asyncio.get_running_loop().time()
    with contextlib.suppress(StopIteration):
        up.kill(answers[victim].worker)
    await asyncio.gather(*tasks)
    interrupted = [seen for seen in answers if seen.holdfast.get("migrations")]
    wrong = [w for seen, t in zip(answers, true, strict=True) if (w := _wrong(seen, *t))]
    await up.whole()
    return Kill(number, [_gap(seen, now) * 1e3 for seen in interrupted], len(answers), wrong)


def _wrong(seen: Seen, text: str, finish: list[str], count: int) -> str:
    """Return what is wrong with an answer, or an empty string."""
    if seen.error:
        return f"error {seen.error}"
    if seen.text != text:
        return f"text differs ({len(seen.text)} of {len(text)} characters)"
    if seen.finish != finish:
        return f"finish {seen.finish}, not {finish}"
    if seen.usage.get("completion_tokens") != count:
        return f"usage {seen.usage.get('completion_tokens')}, not {count}"
    return "join declared inexact" if seen.holdfast.get("join") == "declared" else ""


def _gap(seen: Seen, killed: float) -> float:
    """Return the longest silence that touched the time from the kill on, in seconds."""
    pairs = zip(seen.times, seen.times[1:], strict=False)
    return max((b - a for a, b in pairs if b > killed), default=0.0)


async def run(engine: str, kills: int, seed: int) -> list[Kill]:
    """Kill until so many kills are on record; returns all of them."""
    path = record.state_file(engine, seed)
    done = record.load(path)[:kills]
    if done:
        print(f"going on after {len(done)} kills ({path})", flush=True)
    if len(done) == kills:
        return done
    async with fleet(engine) as up:
        truths = Truths(engine, up)
        for number in range(len(done), kills):
            kill = await one_kill(up, truths, engine, seed, number)
            record.save(path, kill)
            done.append(kill)
            if kill.wrong or (number + 1) % 10 == 0:
                print(f"{number + 1:>5}/{kills}  {_counts(done)}  {'; '.join(kill.wrong)}", flush=True)
    return done


def _counts(kills: list[Kill]) -> str:
    interrupted = sum(len(kill.gaps_ms) for kill in kills)
    wrong = sum(len(kill.wrong) for kill in kills)
    return f"{interrupted} interrupted of {sum(kill.streams for kill in kills)} streams, {wrong} wrong"


def report(engine: str, seed: int, kills: list[Kill], track: bool) -> bool:
    """Print the result and put it on record; returns whether everything was exact."""
    gaps = sorted(gap for kill in kills for gap in kill.gaps_ms) or [math.nan]
    median, p99 = statistics.median(gaps), gaps[math.ceil(0.99 * len(gaps)) - 1]
    wrong = sum(len(kill.wrong) for kill in kills)
    streams = sum(kill.streams for kill in kills)
    rows = [
        ("engine", engine),
        ("commit", record.commit()),
        ("machine", record.machine()),
        ("seed", str(seed)),
        ("kills", str(len(kills))),
        ("interrupted streams", f"{len(gaps)}"),
        ("exact (bystanders included)", f"{streams - wrong} of {streams}"),
        ("gap median", f"{median:.1f} ms" + _goal(engine, median, 0)),
        ("gap p99", f"{p99:.1f} ms" + _goal(engine, p99, 1)),
        ("gap max", f"{gaps[-1]:.1f} ms"),
    ]
    print()
    for name, value in rows:
        print(f"{name:<28}{value}")
    if track:
        cells = dict(rows)
        names = ("commit", "machine", "engine", "seed", "kills", "interrupted streams", "exact (bystanders included)")
        record.append([*(cells[n] for n in names), f"{median:.1f} ms", f"{p99:.1f} ms", f"{gaps[-1]:.1f} ms"])
    return wrong == 0


def _goal(engine: str, value: float, which: int) -> str:
    if engine != "mock":
        return ""
    return f" (goal {GOALS_MS[which]:g} ms: {'met' if value <= GOALS_MS[which] else 'missed'})"


def main() -> int:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", choices=[*KILLS, "all"], default="all")
    parser.add_argument("--kills", type=int, help="default: 200 (mock), 50 (llamacpp)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--no-record", action="store_true", help="leave docs/track-record.md alone")
    parser.add_argument("--fresh", action="store_true", help="forget what an earlier run has done")
    args = parser.parse_args()
    logging.getLogger("holdfast").setLevel(logging.CRITICAL)  # the supervisor warns of every kill
    exact = True
    for engine in KILLS if args.engine == "all" else (args.engine,):
        if args.fresh:
            record.state_file(engine, args.seed).unlink(missing_ok=True)
        kills = asyncio.run(run(engine, args.kills or KILLS[engine], args.seed))
        exact &= report(engine, args.seed, kills, not args.no_record)
    return 0 if exact else 1


if __name__ == "__main__":
    sys.exit(main())
