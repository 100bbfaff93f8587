"""Hurt real engines under running streams and compare every text. ``python -m tests.proof.engines --help``.

A frontend and two workers of one engine; four streamed and four whole answers at once, by the ``openai`` client. At a
random token of a stream its worker is hurt: its engine's core gets SIGKILL, or the worker itself does, or it is stopped
(SIGSTOP), or asked to leave (SIGTERM). Every text is compared with the undisturbed run's (greedy, float32). A run that
was broken off goes on where it was; a table goes into ``docs/track-record.md``; one wrong text makes it exit with 1.

``--split``: prompts are computed by a third worker (NIXL in host memory), and either leg is hurt, the decode leg at a
random token of a stream, the prefill leg while it computes. With SGLang, whose decode workers compute no prompts, the
second worker has no role. ``--mixed`` (vLLM): a third worker computes the long prompts, so that each fault hits streams
of both kinds; it is the shortest way to every fault once.

Runs in the engine's own environment: ``make proof-engines``.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import random
import statistics
import sys
import tempfile
from pathlib import Path

import msgspec

from tests.proof import record
from tests.proof.engine_kinds import FAULTS, KINDS, WORDS, Arrangement, Fault
from tests.proof.engine_world import ANSWER_SECONDS, SUBJECTS, TOKENS, Answer, World, world

STREAMED, WHOLE = 4, 4
PREFILL_SECONDS = (0.0, 0.4)
"""A prefill leg is hurt within this after the first prompt is there."""
EARLY = 8
"""Tokens of a stream after which it is hurt at the latest, where others shall still be under way."""
MOST_MISSES = 4
"""Rounds of one fault that may hit nothing in a row."""


class Round(msgspec.Struct, frozen=True):
    """One fault: what it hit and what went wrong."""

    fault: Fault
    number: int
    streams_hit: int
    whole_hit: int
    gaps: list[float]
    """Longest silence of each stream that moved, seconds."""
    answers: int
    wrong: list[str]
    legs: int = 0
    """Prompts that were handed over."""
    legs_failed: int = 0
    orphans: int = 0
    """Engine processes whose worker is gone, a while later."""
    apart_hit: int = 0
    """Answers that moved, streamed or whole, whose prompt is one for a prefill worker."""


async def one_round(up: World, fault: Fault, seed: int, number: int) -> Round:
    """Ask eight questions, hurt one stream's worker at a random token, and judge all answers."""
    await up.ready_for(fault)
    rng = random.Random(f"{seed}/{fault}/{number}")
    up.salt = f"round {number}"
    subjects = rng.sample(SUBJECTS, k=STREAMED + WHOLE)
    answers = [Answer(streamed=i < STREAMED) for i in range(len(subjects))]
    before = await up.legs()
    tasks = [asyncio.ensure_future(up.ask(s, a)) for s, a in zip(subjects, answers, strict=True)]
    if fault.startswith("prefill"):
        await up.a_leg()
        await asyncio.sleep(rng.uniform(*PREFILL_SECONDS))
        instance = up.prefill_instance()
    else:
        instance = await _at_a_token(*_victim(up, rng, subjects, answers))
    end = up.hurt(fault, instance)
    now = asyncio.get_running_loop().time()
    await asyncio.gather(*tasks)
    end()
    after = await up.legs()
    moved = [a for a in answers if a.facts.get("migrations")]
    return Round(
        fault,
        number,
        sum(a.streamed for a in moved),
        sum(not a.streamed for a in moved),
        [gap_of(a, now) for a in moved if a.streamed],
        len(answers),
        [w for s, a in zip(subjects, answers, strict=True) if (w := wrong_in(a, up.truths[s]))],
        legs=after[0] - before[0],
        legs_failed=after[1] - before[1],
        orphans=await up.orphans(),
        apart_hit=sum(a.long for a in moved),
    )


def _victim(up: World, rng: random.Random, subjects: list[str], answers: list[Answer]) -> tuple[Answer, int]:
    """Return the stream whose worker is hurt, and at which piece of it; where kinds are mixed, a long and young one."""
    streamed = [(s, a) for s, a in zip(subjects, answers, strict=True) if a.streamed]
    young = up.arrangement == "mixed"
    fitting = [a for s, a in streamed if not young or up.is_long(s)] or [a for _, a in streamed]
    return rng.choice(fitting), rng.randint(3, EARLY if young else TOKENS // 2)


async def _at_a_token(victim: Answer, pieces: int) -> str:
    """Wait until a stream is so far; returns the instance id of its worker."""
    async with asyncio.timeout(ANSWER_SECONDS):
        while len(victim.times) < pieces and not victim.over:  # noqa: ASYNC110  as close as possible
            await asyncio.sleep(0.002)
    if victim.error:
        raise RuntimeError(f"a stream failed before it was hurt: {victim.error}")
    return victim.worker


def gap_of(answer: Answer, since: float) -> float:
    pairs = zip(answer.times, answer.times[1:], strict=False)
    return max((b - a for a, b in pairs if b > since), default=0.0)


def wrong_in(answer: Answer, true: tuple[str, str, int]) -> str:
    kind = "stream" if answer.streamed else "whole"
    if answer.error:
        return f"{kind}: {answer.error}"
    if (answer.text, answer.finish, answer.tokens) != true:
        text = "same" if answer.text == true[0] else "differs"
        return f"{kind}: {answer.tokens} tokens, finish {answer.finish}, text {text}"
    return f"{kind}: join declared inexact" if answer.facts.get("join") == "declared" else ""


def state_file(engine: str, seed: int, arrangement: Arrangement, *, keep: bool) -> Path:
    """Return where a run keeps what it has done: for the next one only when it is of a commit, and not a mere check."""
    name, commit = f"holdfast-engines-{engine}-{arrangement}-{seed}", record.commit()
    if not keep or not commit.isalnum():
        return Path(tempfile.mkdtemp(prefix=f"{name}-")) / "rounds.jsonl"
    return Path(tempfile.gettempdir()) / f"{name}-{commit}.jsonl"


async def run(
    engine: str, arrangement: Arrangement, faults: tuple[Fault, ...], times: int, seed: int, path: Path
) -> list[Round]:
    """Hurt until each fault has struck so often; returns all rounds. One that hit no stream does not count.

    Raises:
        RuntimeError: a fault hits nothing, time after time.
    """
    done = record.load(path, Round)
    missing = [
        fault for n in range(times) for fault in faults if sum(has_struck(r, arrangement, fault) for r in done) <= n
    ]
    if not missing:
        return done
    lines = path.with_suffix(".log")
    print(f"{len(missing)} rounds to go; the processes' lines: {lines}", flush=True)
    async with world(engine, arrangement, lines) as up:
        await up.learn()
        print("ready", flush=True)
        number, misses = len(done), 0
        while missing:
            result = await one_round(up, missing[0], seed, number)
            number += 1
            record.save(path, result)
            done.append(result)
            print(json.dumps(msgspec.to_builtins(result)), flush=True)
            misses += 1
            if has_struck(result, arrangement, missing[0]) or result.wrong:
                missing.pop(0)
                misses = 0
            elif misses == MOST_MISSES:
                raise RuntimeError(f"{WORDS[missing[0]]} hit nothing {misses} times in a row")
    return done


def has_struck(one: Round, arrangement: Arrangement, fault: Fault) -> bool:
    """Whether a fault has struck; a worker that leaves in order may have finished everything."""
    if one.fault != fault:
        return False
    if fault.startswith("prefill"):
        return one.legs_failed > 0
    moved = one.streams_hit + one.whole_hit
    both = arrangement != "mixed" or 0 < one.apart_hit < moved
    return fault == "term" or (moved > 0 and both)


def report(
    engine: str, arrangement: Arrangement, rounds: list[Round], faults: tuple[Fault, ...], *, track: bool
) -> bool:
    """Print the result by fault and put it on record; returns whether everything was exact."""
    good = True
    for fault in faults:
        mine = [one for one in rounds if one.fault == fault]
        gaps = [gap for one in mine for gap in one.gaps]
        wrong = [w for one in mine for w in one.wrong]
        answers = sum(one.answers for one in mine)
        orphans = sum(one.orphans for one in mine)
        good &= not wrong and not orphans and bool(mine)
        legs = f"{sum(one.legs for one in mine)}, {sum(one.legs_failed for one in mine)} failed"
        row = [
            record.commit(), record.machine(), engine if arrangement == "aggregated" else f"{engine}, {arrangement}",
            WORDS[fault], str(len(mine)),
            f"{sum(one.streams_hit for one in mine)} + {sum(one.whole_hit for one in mine)}",
            f"{answers - len(wrong)} of {answers}",
            f"{statistics.median(gaps):.2f} s" if gaps else "none",
            f"{max(gaps):.2f} s" if gaps else "none",
            str(orphans),
            "none" if arrangement == "aggregated" else legs,
        ]  # fmt: skip
        print(" | ".join(row), *wrong[:5], sep="\n  " if wrong else "")
        if track:
            record.append_engines(row)
    return good


def main() -> int:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", choices=[*KINDS], default="vllm")
    parser.add_argument("--times", type=int, default=3, help="how often each fault must strike")
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--split", action="store_true", help="prompts are computed by a worker of their own")
    how.add_argument("--mixed", action="store_true", help="long prompts are (vllm)")
    parser.add_argument("--fault", choices=WORDS, action="append", help="only these")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--no-record", action="store_true", help="a mere check: nothing is kept, nothing goes on later")
    parser.add_argument("--fresh", action="store_true", help="forget what an earlier run has done")
    args = parser.parse_args()
    logging.getLogger("holdfast").setLevel(logging.CRITICAL)  # the supervisor warns of every kill
    arrangement: Arrangement = "split" if args.split else "mixed" if args.mixed else "aggregated"
    if arrangement not in KINDS[args.engine].workers:
        parser.error(f"{args.engine} cannot be {arrangement}: its workers either do everything or one half")
    faults = tuple(args.fault or FAULTS[arrangement])
    path = state_file(args.engine, args.seed, arrangement, keep=not args.no_record)
    if args.fresh:
        path.unlink(missing_ok=True)
    rounds = asyncio.run(run(args.engine, arrangement, faults, args.times, args.seed, path))
    return 0 if report(args.engine, arrangement, rounds, faults, track=not args.no_record) else 1


if __name__ == "__main__":
    sys.exit(main())
