"""One engine for the whole package: loading takes longer than most tests."""

import pytest_asyncio

from tests.engines.llamacpp.harness import QUESTIONS, Run, request


@pytest_asyncio.fixture(scope="package", loop_scope="package")
async def run():
    run = await Run(max_num_seqs=6, parked_seqs=2, context_length=768).start()
    yield run
    await run.engine.close()


@pytest_asyncio.fixture(scope="package", loop_scope="package")
async def greedy(run):
    """Undisturbed greedy answers, one after the other: (prompt ids, 30 tokens) per question."""
    answers = []
    for question in QUESTIONS[:4]:
        prompt = run.chat(question)
        answers.append((prompt, (await run.generate(request(prompt, max_tokens=30)))[0]))
    return answers
