"""What the adapter costs over calling vLLM's AsyncLLM directly: the same engine, 16 streams, turns taken in one run.

Run in vLLM's environment: ``.venv-vllm/bin/python -m bench.vllm_overhead``. Prints tokens per second of both ways, the
ratio, and this process's CPU time per token; the goal is a ratio of at least 0.95.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import statistics
import sys
import time
from typing import Any

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


async def timed(work: Any) -> tuple[float, float]:
    """Return tokens per second, and microseconds of this process's CPU per token."""
    began, cpu = time.perf_counter(), time.process_time()
    count = await work
    return count / (time.perf_counter() - began), (time.process_time() - cpu) / count * 1e6


async def measure(turns: int, tokens: int) -> bool:
    """Take turns, in the order a b b a, and print the medians; returns whether the goal is met."""
    os.environ.update({name: os.environ.get(name, value) for name, value in ENVIRONMENT.items()})
    run = Run(str(model_directory()), SMALL)
    try:
        await run.start()
        prompts = [run.prompt(f"{QUESTIONS[i % 8]} ({i})") for i in range(STREAMS)]
        await directly(run, prompts, tokens, -1)
        direct: list[tuple[float, float]] = []
        ours: list[tuple[float, float]] = []
        for turn in range(turns):
            for which in ("ab", "ba")[turn % 2]:
                if which == "a":
                    direct.append(await timed(directly(run, prompts, tokens, turn)))
                else:
                    ours.append(await timed(by_adapter(run, prompts, tokens)))
            print(f"turn {turn + 1}: direct {direct[-1][0]:.1f}, adapter {ours[-1][0]:.1f} tokens/s", flush=True)
    finally:
        await run.engine.close()
    ratio = statistics.median(b[0] / a[0] for a, b in zip(direct, ours, strict=True))
    for name, seen in (("AsyncLLM directly", direct), ("through the adapter", ours)):
        rate, cpu = (statistics.median(one[i] for one in seen) for i in (0, 1))
        print(f"{name:<22}{rate:8.1f} tokens/s{cpu:8.0f} us CPU/token in this process")
    print(f"ratio of throughput, median of {turns} pairs: {ratio:.3f} (goal at least {GOAL})")
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
