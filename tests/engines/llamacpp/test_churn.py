"""Minutes of random traffic: resumes at random cuts, cancels, grammars and penalties side by side, all exact."""

import asyncio
import random

import pytest

from holdfast.base.ids import SequenceKey
from holdfast.engines.contract import Guided
from tests.engines.llamacpp.harness import QUESTIONS, request

pytestmark = [
    pytest.mark.llamacpp,
    pytest.mark.slow,
    pytest.mark.asyncio(loop_scope="package"),
    pytest.mark.timeout(600),
]
SECONDS = 90.0


def specification(run, rng):
    """Return a random (prompt, options)."""
    prompt = run.chat(rng.choice(QUESTIONS)) + run.encode(rng.choice(["", "Sure, ", "Well"]))
    options = {"max_tokens": rng.randint(10, 50)}
    if rng.random() < 0.6:
        options |= {
            "temperature": rng.choice([0.7, 1.0, 1.3]),
            "seed": rng.getrandbits(64),
            "top_p": rng.choice([1.0, 0.9]),
            "top_k": rng.choice([0, 50]),
            "repetition_penalty": rng.choice([1.0, 1.2]),
            "frequency_penalty": rng.choice([0.0, 0.4]),
        }
    if rng.random() < 0.25:
        options |= {"guided": Guided("json_object"), "stop": {}}
    return prompt, options


@pytest.mark.parametrize("seed", [1, 2])
async def test_random_traffic_stays_exact(run, seed):
    rng = random.Random(seed)
    cases = [specification(run, rng) for _ in range(14)]
    truth = [await run.one(prompt, **options) for prompt, options in cases]
    loop = asyncio.get_running_loop()
    end, wrong, done = loop.time() + SECONDS, [], 0

    async def client(number):
        nonlocal done
        own = random.Random(seed * 100 + number)
        while loop.time() < end:
            case = own.randrange(len(cases))
            cut = own.randrange(len(truth[case]))
            prompt, options = cases[case]
            key = run.submit(request(prompt, generated=truth[case][:cut], **options))
            if own.random() < 0.25:
                await asyncio.sleep(own.random() / 2)
                run.engine.cancel(SequenceKey(key))
                continue
            (tokens,) = await run.finish(key)
            done += 1
            if tokens != truth[case][cut:]:
                wrong.append((case, cut, options))

    await asyncio.gather(*[client(number) for number in range(9)])
    assert wrong == []
    assert done > 20
    await run.idle()
    assert run.engine.load().kv_used_blocks == 0
