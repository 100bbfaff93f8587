"""What the adapter costs over calling vLLM's AsyncLLM directly: the same engine, 16 streams, turns taken in one run.

Run in vLLM's environment: ``.venv-vllm/bin/python -m bench.vllm_overhead``. Prints tokens per second of both ways and
the ratio; the goal is at least 0.95. On a machine that others use as well, processor time says more: that of this
process (the adapter is a part of it) and of all of vLLM's, per token.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import statistics
import sys
import time
from collections.abc import Awaitable, Iterable
from pathlib import Path
from typing import NamedTuple

from tests.engines.vllm.conftest import ENVIRONMENT
from tests.engines.vllm.harness import QUESTIONS, SMALL, Run, ask
from tests.support.hf_model import model_directory

STREAMS = 16
GOAL = 0.95


async def directly(run: Run, prompts: list[list[int]], tokens: int, turn: int) -> int:
    """Generate with ``AsyncLLM.generate`` alone; returns the tokens that came."""
    from vllm import SamplingParams  # noqa: PLC0415
    from vllm.inputs import tokens_input  # noqa: PLC0415
    from vllm.sampling_params import RequestOutputKind  # noqa: PLC0415

    async def one(number: int, prompt: list[int]) -> int:
        params = SamplingParams(
            temperature=0.0,
            max_tokens=tokens,
            ignore_eos=True,
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
        )
        count = 0
        async for said in run.engine.llm.generate(tokens_input(prompt), params, f"direct-{turn}-{number}"):
            count += len(said.outputs[0].token_ids)
        return count

    return sum(await asyncio.gather(*(one(n, prompt) for n, prompt in enumerate(prompts))))


async def by_adapter(run: Run, prompts: list[list[int]], tokens: int) -> int:
    """Generate through the engine contract; returns the tokens that came."""
    keys = [run.submit(ask(prompt, max_tokens=tokens)) for prompt in prompts]
    return sum(len(one) for one in await run.finished(*keys))


class Turn(NamedTuple):
    """One way, once."""

    rate: float
    """Tokens per second."""
    own: float
    """Microseconds of this process's CPU per token."""
    whole: float
    """Microseconds of CPU per token, of this process and vLLM's."""


def cpu_seconds(pids: Iterable[int]) -> float:
    """Return user and system time of some processes (proc(5), fields 14 and 15)."""
    ticks = 0
    for pid in pids:
        fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


async def timed(run: Run, work: Awaitable[int]) -> Turn:
    """Await it and measure."""
    pids = run.engine.child_pids()
    began, own, theirs = time.perf_counter(), time.process_time(), cpu_seconds(pids)
    count = await work
    seconds, own, theirs = time.perf_counter() - began, time.process_time() - own, cpu_seconds(pids) - theirs
    return Turn(count / seconds, own / count * 1e6, (own + theirs) / count * 1e6)


async def measure(turns: int, tokens: int) -> bool:
    """Take turns, in the order a b b a, and print the medians; returns whether the goal is met."""
    os.environ.update({name: os.environ.get(name, value) for name, value in ENVIRONMENT.items()})
    run = Run(str(model_directory()), SMALL)
    try:
        await run.start()
        prompts = [run.prompt(f"{QUESTIONS[i % 8]} ({i})") for i in range(STREAMS)]
        await directly(run, prompts, tokens, -1)
        direct: list[Turn] = []
        ours: list[Turn] = []
        for turn in range(turns):
            for which in ("ab", "ba")[turn % 2]:
                if which == "a":
                    direct.append(await timed(run, directly(run, prompts, tokens, turn)))
                else:
                    ours.append(await timed(run, by_adapter(run, prompts, tokens)))
            print(f"turn {turn + 1}: direct {direct[-1].rate:.1f}, adapter {ours[-1].rate:.1f} tokens/s", flush=True)
    finally:
        await run.engine.close()
    for name, seen in (("AsyncLLM directly", direct), ("through the adapter", ours)):
        rate, own, whole = (statistics.median(column) for column in zip(*seen, strict=True))
        print(
            f"{name:<22}{rate:8.1f} tokens/s{own:8.0f} us CPU/token here{whole:9.0f} us CPU/token with vLLM's processes"
        )
    ratio = statistics.median(b.rate / a.rate for a, b in zip(direct, ours, strict=True))
    work = statistics.median(a.whole / b.whole for a, b in zip(direct, ours, strict=True))
    print(f"medians of {turns} pairs: throughput {ratio:.3f}, tokens per CPU second {work:.3f} (goal at least {GOAL})")
    return ratio >= GOAL


def main() -> int:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=48)
    args = parser.parse_args()
    return 0 if asyncio.run(measure(args.turns, args.tokens)) else 1


if __name__ == "__main__":
    sys.exit(main())
