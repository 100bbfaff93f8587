"""Whatever interrupts a sequence, and whatever runs beside it, its tokens are the same."""

import multiprocessing
import os
import signal

import pytest

from holdfast.engines.llamacpp.config import CHUNK_TOKENS
from tests.engines.llamacpp.harness import QUESTIONS, Run, request

pytestmark = [pytest.mark.llamacpp, pytest.mark.asyncio(loop_scope="package")]

SAMPLED = {
    "temperature": 0.9,
    "top_p": 0.95,
    "top_k": 80,
    "min_p": 0.01,
    "repetition_penalty": 1.15,
    "presence_penalty": 0.2,
    "frequency_penalty": 0.3,
    "logit_bias": {260: 1.5, 30: -2.0},
}
CUTS = (1, 9, 22)


async def test_batched_equals_alone(run, greedy):
    together = await run.generate(*[request(prompt, max_tokens=30) for prompt, _ in greedy])
    assert together == [answer for _, answer in greedy]


async def test_greedy_resumes_exactly_from_any_cut_under_concurrency(run, greedy):
    cases = [(prompt, answer, cut) for prompt, answer in greedy for cut in CUTS]
    rest = await run.generate(*[request(p, max_tokens=30, generated=a[:cut]) for p, a, cut in cases])
    assert rest == [answer[cut:] for _, answer, cut in cases]


@pytest.mark.parametrize(
    "sampling", [SAMPLED, {"temperature": 1.0}], ids=["filtered and penalised", "whole vocabulary"]
)
async def test_seeded_sampling_resumes_exactly_under_concurrency(run, sampling):
    prompts = [run.chat(question) for question in QUESTIONS[:3]]
    whole = await run.generate(*[request(p, max_tokens=28, seed=2**63 + i, **sampling) for i, p in enumerate(prompts)])
    cases = [(i, cut) for i in range(3) for cut in CUTS]
    rest = await run.generate(
        *[request(prompts[i], max_tokens=28, generated=whole[i][:c], seed=2**63 + i, **sampling) for i, c in cases]
    )
    assert rest == [whole[i][cut:] for i, cut in cases]
    assert len({tuple(tokens) for tokens in whole}) == 3


async def test_another_seed_gives_another_text(run):
    prompt = run.chat(QUESTIONS[1])
    a, b, again = await run.generate(*[request(prompt, temperature=1.0, seed=seed) for seed in (1, 2, 1)])
    assert a == again
    assert a != b


async def test_logprobs_are_sane_and_resume_exactly(run):
    prompt = run.chat(QUESTIONS[1])
    key = run.submit(request(prompt, max_tokens=12, logprobs=5))
    (tokens,) = await run.finish(key)
    entries = run.logprobs[key]
    assert len(entries) == 12
    for token, entry in zip(tokens, entries, strict=True):
        ids, values = zip(*entry.top, strict=True)
        assert len(ids) == 5
        assert list(values) == sorted(values, reverse=True)
        assert ids[0] == token
        assert entry.logprob == values[0] <= 0
    resumed = run.submit(request(prompt, max_tokens=12, generated=tokens[:5], logprobs=5))
    await run.finish(resumed)
    assert run.logprobs[resumed] == entries[5:]


async def test_prompt_longer_than_a_chunk_does_not_depend_on_what_runs_beside_it(run, greedy):
    long = run.encode("One ship sails, two ships sail. " * 19)
    assert len(long) > 3 * CHUNK_TOKENS
    alone = await run.one(long, salt="alone")
    keys = [run.submit(request(prompt, max_tokens=30)) for prompt, _ in greedy]
    await run.until(lambda: all(run.tokens[key] for key in keys))
    beside = run.submit(request(long, salt="beside"))
    texts = await run.finish(beside, *keys)
    assert texts == [alone, *[answer for _, answer in greedy]]
    assert run.ends[beside].cached_tokens == 0


async def test_prefix_reuse_gives_the_same_tokens(run):
    shared = run.encode("The lighthouse keeper wrote every evening in a book with a blue cover. " * 2)
    prompts = [shared + run.encode(tail) for tail in ("He wrote:", "One day", "The book", "Nobody")]
    fresh = [await run.one(prompt, salt=f"own-{i}") for i, prompt in enumerate(prompts)]
    keys = [run.submit(request(prompts[0], salt="shared"))]
    await run.finish(keys[0])
    keys += [run.submit(request(prompt, salt="shared")) for prompt in prompts[1:]]
    assert await run.finish(*keys) == fresh
    cached = [run.ends[key].cached_tokens for key in keys]
    assert cached[0] == 0
    assert all(count >= len(shared) - 1 for count in cached[1:])
    again = run.submit(request(prompts[0], salt="shared"))
    assert await run.finish(again) == [fresh[0]]
    assert run.ends[again].cached_tokens == len(prompts[0]) - 1


def _child(pipe, prompt, options):
    import asyncio  # noqa: PLC0415

    async def work():
        run = await Run(max_num_seqs=2, parked_seqs=0, context_length=256).start()
        sink = run.sink

        def tell(steps):
            sink(steps)
            for step in steps:
                pipe.send(step.tokens)

        run.engine._sink = tell
        await run.one(prompt, **options)

    asyncio.run(work())


@pytest.mark.parametrize("sampling", [{}, {**SAMPLED, "seed": 99}], ids=["greedy", "sampled"])
async def test_a_killed_process_is_continued_to_the_token(run, sampling):
    prompt = run.chat(QUESTIONS[4])
    options = {"max_tokens": 36, **sampling}
    whole = await run.one(prompt, **options)
    here, there = multiprocessing.get_context("spawn").Pipe()
    child = multiprocessing.get_context("spawn").Process(target=_child, args=(there, prompt, options))
    child.start()
    there.close()
    got: list[int] = []
    try:
        while len(got) < 17:
            assert here.poll(60), "the child says nothing"
            got += here.recv()
    finally:
        os.kill(child.pid, signal.SIGKILL)
        child.join(10)
    assert child.exitcode == -signal.SIGKILL
    assert got == whole[: len(got)]
    assert await run.one(prompt, generated=got, **options) == whole[len(got) :]
