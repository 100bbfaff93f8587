"""One real vLLM at float32: accounting, exactness, cancels, events, loads, controls, and its death."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from holdfast.base.errors import (
    ContextLengthExceeded,
    EngineFailed,
    InvalidRequest,
    ModelNotFound,
    UnsupportedFeature,
)
from holdfast.engines.abilities import Adaptable, Clearable, Pausable, Sleepable
from holdfast.engines.contract import Guided
from holdfast.health.payloads import payload_for, request_of
from holdfast.kv.hashes import block_hashes
from holdfast.worker.kv_log import KvLog
from tests.engines.vllm.conftest import PROCESSES
from tests.engines.vllm.harness import QUESTIONS, Run, ask
from tests.patience import within
from tests.worker.test_kv_log import contents

pytestmark = [pytest.mark.vllm, pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(900)]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def run(model: str) -> AsyncIterator[Run]:
    engine = Run(model)
    try:
        yield await engine.start()
    finally:
        await engine.engine.close()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def truths(run: Run) -> list[list[int]]:
    """Return 32 greedy tokens for each question, asked one after the other."""
    return [await run.generate(ask(run.prompt(question), max_tokens=32)) for question in QUESTIONS]


async def test_it_says_what_it_is(run: Run) -> None:
    info = run.info
    assert (info.engine, info.context_length, info.block_size, info.total_kv_blocks) == ("vllm", 512, 32, 96)
    assert info.vocab_size == 49152
    assert 2 in info.eos_token_ids
    can = info.capabilities
    assert (can.continuation, can.not_restored, can.kv_events) == ("greedy", ("seed", "penalties"), True)
    assert (can.handoff, can.cancel_until, can.lora) == ("", "anytime", False)
    assert len(run.engine.child_pids()) == PROCESSES
    assert run.loading[-1] == ("ready", 1.0)
    await run.engine.check()


async def test_an_answer_ends_with_its_end_token(run: Run) -> None:
    key = run.submit(ask(run.prompt(QUESTIONS[0]), stop={}))
    (tokens,) = await run.finished(key)
    assert run.tokenizer.decode(tokens[:-1]) == "The capital of France is Paris."
    assert tokens[-1] == 2
    assert run.ends[key].finish == "stop"


async def test_length_stop_tokens_and_least_tokens(run: Run, truths: list[list[int]]) -> None:
    prompt = run.prompt(QUESTIONS[1])
    key = run.submit(ask(prompt, max_tokens=5))
    assert (await run.finished(key), run.ends[key].finish) == ([truths[1][:5]], "length")
    stop = truths[1][6]
    at = truths[1].index(stop)
    key = run.submit(ask(prompt, max_tokens=30, stop={"stop_token_ids": (stop,), "ignore_eos": True}))
    assert (await run.finished(key), run.ends[key].finish) == ([truths[1][: at + 1]], "stop")
    short = run.prompt(QUESTIONS[0])
    key = run.submit(ask(short, max_tokens=20, stop={"min_tokens": 14}))
    (tokens,) = await run.finished(key)
    assert len(tokens) >= 14
    assert 2 not in tokens[:13]


async def test_greedy_continuations_equal_the_undisturbed_run(run: Run, truths: list[list[int]]) -> None:
    for number in range(4):
        prompt = run.prompt(QUESTIONS[number])
        keys = [run.submit(ask(prompt, max_tokens=32, generated=truths[number][:cut])) for cut in (1, 7, 19, 31)]
        rest = await run.finished(*keys)
        assert rest == [truths[number][cut:] for cut in (1, 7, 19, 31)]


async def test_sixteen_at_once_equal_each_alone(run: Run, truths: list[list[int]]) -> None:
    begin = len(run.batches)
    keys = [run.submit(ask(run.prompt(QUESTIONS[i % 8]), max_tokens=32)) for i in range(16)]
    assert await run.finished(*keys) == [truths[i % 8] for i in range(16)]
    batches = run.batches[begin:]
    together = sum(len(batch) for batch in batches) / len(batches)
    assert together > 4, f"{together:.1f} sequences a batch: tokens of one step are to go out together"


async def test_sixty_four_wait_their_turn(run: Run, truths: list[list[int]]) -> None:
    keys = [run.submit(ask(run.prompt(QUESTIONS[i % 8]), max_tokens=4)) for i in range(64)]
    assert run.engine.load().waiting > 0
    assert await run.finished(*keys) == [truths[i % 8][:4] for i in range(64)]


async def test_a_seed_repeats_and_another_one_does_not(run: Run) -> None:
    prompt = run.prompt(QUESTIONS[4])
    one, two, three = [
        await run.generate(ask(prompt, max_tokens=16, temperature=1.0, seed=seed)) for seed in (7, 7, 8 << 60)
    ]
    assert one == two
    assert one != three


async def test_logprobs_have_the_shape_that_was_asked_for(run: Run, truths: list[list[int]]) -> None:
    for top in (0, 3):
        key = run.submit(ask(run.prompt(QUESTIONS[2]), max_tokens=6, logprobs=top))
        await run.finished(key)
        said = run.logprobs[key]
        assert [len(one.top) for one in said] == [top] * 6
        assert all(one.logprob <= 0 for one in said)
    assert [one.top[0][0] for one in said] == truths[2][:6]
    assert [one.top[0][1] for one in said] == [one.logprob for one in said]


async def test_bias_and_penalties_change_what_comes(run: Run, truths: list[list[int]]) -> None:
    prompt = run.prompt(QUESTIONS[1])
    first = truths[1][0]
    assert first not in await run.generate(ask(prompt, max_tokens=8, logit_bias={first: -100.0}))
    token = 5
    forced = await run.generate(ask(prompt, max_tokens=8, logit_bias={token: 100.0}))
    assert forced == [token] * 8
    for bias in (24.0, 18.0, 13.0, 9.0, 6.0):  # strong enough to begin with, and weaker than the penalties later on
        wish = {"max_tokens": 14, "logit_bias": {token: bias}, "frequency_penalty": 2.0}
        whole = await run.generate(ask(prompt, **wish))
        if whole[:3] == [token] * 3 and whole.count(token) < 12:
            break
    else:
        pytest.fail(f"the premise: the token comes a few times, not {whole.count(token)} times")
    rest = await run.generate(ask(prompt, generated=whole[:3], **wish))
    assert rest == whole[3:], "frequencies of what exists count"


@pytest.mark.parametrize(
    ("guided", "fits"),
    [
        (Guided("choice", '["yes, of course", "no, never"]'), lambda text: text in ("yes, of course", "no, never")),
        (Guided("regex", "[0-9]{3}-[0-9]{2}"), lambda text: len(text) == 6 and text[3] == "-"),
        (
            Guided("json_schema", '{"type":"object","properties":{"a":{"type":"integer"}},"required":["a"],'
                   '"additionalProperties":false}'),
            lambda text: isinstance(json.loads(text)["a"], int),
        ),
        (Guided("grammar", 'root ::= "left" | "right"'), lambda text: text in ("left", "right")),
    ],
)  # fmt: skip
async def test_grammars_hold_and_survive_a_move(run: Run, guided: Guided, fits: object) -> None:
    prompt = run.prompt(QUESTIONS[5])
    whole = await run.generate(ask(prompt, max_tokens=40, stop={}, guided=guided))
    text = run.tokenizer.decode([token for token in whole if token not in run.info.eos_token_ids])
    assert fits(text), text  # type: ignore[operator]
    rest = await run.generate(ask(prompt, max_tokens=40, stop={}, guided=guided, generated=whole[:2]))
    assert whole[:2] + rest == whole


async def test_a_json_object_is_one(run: Run) -> None:
    key = run.submit(ask(run.prompt("Say {} in JSON."), max_tokens=60, stop={}, guided=Guided("json_object")))
    (tokens,) = await run.finished(key)
    text = run.tokenizer.decode([token for token in tokens if token not in run.info.eos_token_ids])
    assert text.lstrip().startswith("{")
    if run.ends[key].finish == "stop":
        assert isinstance(json.loads(text), dict)


async def test_what_cannot_be_is_refused_before_any_work(run: Run) -> None:
    prompt = run.prompt(QUESTIONS[0])
    before = run.engine.progress().steps
    for error, request in (
        (ContextLengthExceeded, ask([5] * 512)),
        (InvalidRequest, ask([49152])),
        (InvalidRequest, ask([])),
        (InvalidRequest, ask(prompt, top_p=0.0)),
        (InvalidRequest, ask(prompt, logit_bias={99_999: 1.0})),
        (InvalidRequest, ask(prompt, extra={"data_parallel_rank": 3})),
        (UnsupportedFeature, ask(prompt, logprobs=21)),
        (UnsupportedFeature, ask(prompt, leg="prefill")),
        (ModelNotFound, ask(prompt, lora="nobody")),
    ):
        with pytest.raises(error):
            run.submit(request)
    assert run.engine.progress().steps == before
    assert not run.engine.attempts


async def test_what_only_vllm_can_refuse_ends_that_sequence_alone(run: Run) -> None:
    broken = run.submit(ask(run.prompt(QUESTIONS[0]), guided=Guided("regex", "([a-z")))
    fine = run.submit(ask(run.prompt(QUESTIONS[0]), max_tokens=3))
    await run.finished(broken, fine)
    assert run.ends[broken].finish == "error"
    assert isinstance(run.ends[broken].error, InvalidRequest)
    assert run.ends[fine].finish == "length"


async def test_a_cancel_frees_its_seat_and_nothing_follows(run: Run) -> None:
    key = run.submit(ask(run.prompt(QUESTIONS[4]), max_tokens=400))
    await run.until(lambda: len(run.tokens[key]) >= 5)
    run.cancel(key)
    count = len(run.tokens[key])
    other = await run.generate(ask(run.prompt(QUESTIONS[0]), max_tokens=8))
    assert len(other) == 8
    assert len(run.tokens[key]) == count
    assert run.engine.llm.get_num_unfinished_requests() == 0
    assert run.engine.load().running == 0


async def test_load_and_progress_move(run: Run) -> None:
    before = run.engine.progress()
    key = run.submit(ask(run.prompt(QUESTIONS[4]) * 4, max_tokens=40))
    assert run.engine.load().prefill_tokens > 0
    await run.until(lambda: len(run.tokens[key]) >= 20)
    load = run.engine.load()
    assert load.running == 1
    assert 0 < load.kv_used_blocks < load.kv_total_blocks == 96
    assert run.engine.progress().phase == "decode"
    await run.finished(key)
    after = run.engine.progress()
    assert after.steps >= before.steps + 40
    assert after.tokens == before.tokens + 40
    assert after.prefilled > before.prefilled
    assert (after.phase, after.tokens_after_cancel) == ("idle", 0)


async def test_kv_events_name_the_blocks_of_what_was_computed(run: Run) -> None:
    await run.engine.clear_cache()
    await run.until(lambda: run.engine.take_kv_events() or True)
    run.events.clear()
    log = KvLog(1, run.info.block_size, native=False)
    prompt = [token % 40_000 + 100 for token in range(7, 7 + 100 * 7919, 7919)]
    keys = [run.submit(ask(prompt, max_tokens=3, salt=salt)) for salt in (None, None, "tenant")]
    await run.finished(*keys)
    expected = set(block_hashes(prompt, 32)) | set(block_hashes(prompt, 32, salt="tenant"))

    def seen() -> set[int]:
        log.take(run.events)
        run.events.clear()
        return {one for _, _, hashes in contents(log) for one in hashes}

    await run.until(lambda: seen() >= expected)
    assert seen() == expected
    assert {status for _, status in log.outcomes} == {"ok"}
    assert [(follower.gaps, follower.losses) for follower in run.engine.followers] == [(0, 0)]
    for first in range(0, 20, 4):  # 96 blocks: what is oldest has to go
        others = [[(number * 131 + i) % 40_000 + 100 for i in range(200)] for number in range(first, first + 4)]
        await run.finished(*[run.submit(ask(other, max_tokens=1)) for other in others])
    await run.until(lambda: not seen() & expected)
    assert {status for _, status in log.outcomes} == {"ok"}
    assert log.digest(0)[0] <= 96


async def test_cached_tokens_are_told(run: Run) -> None:
    prompt = [token % 40_000 + 200 for token in range(3, 3 + 100 * 104_729, 104_729)]
    await run.generate(ask(prompt, max_tokens=2))
    key = run.submit(ask(prompt, max_tokens=2))
    await run.finished(key)
    assert run.ends[key].cached_tokens == 96


async def test_generation_pauses_and_goes_on_unchanged(run: Run, truths: list[list[int]]) -> None:
    assert isinstance(run.engine, Pausable)
    assert isinstance(run.engine, Clearable)
    assert isinstance(run.engine, Sleepable)
    assert isinstance(run.engine, Adaptable)
    key = run.submit(ask(run.prompt(QUESTIONS[3]), max_tokens=32))
    await run.until(lambda: len(run.tokens[key]) >= 3)
    await run.engine.pause_generation("keep")
    count = len(run.tokens[key])
    await asyncio.sleep(0.5)
    assert len(run.tokens[key]) <= count + 1
    await run.engine.resume_generation()
    assert await run.finished(key) == [truths[3]]
    key = run.submit(ask(run.prompt(QUESTIONS[3]), max_tokens=300))
    await run.until(lambda: run.tokens[key])
    await run.engine.pause_generation("abort")
    await run.finished(key)
    assert run.ends[key].finish == "abort"
    await run.engine.resume_generation()
    assert await run.generate(ask(run.prompt(QUESTIONS[3]), max_tokens=8)) == truths[3][:8]
    with pytest.raises(UnsupportedFeature):
        await run.engine.sleep(1)


async def test_canaries_of_every_role_are_answered(run: Run) -> None:
    for role in ("aggregated", "decode", "prefill"):
        payload = payload_for(run.info, role=role).to_dict()  # type: ignore[arg-type]
        key = run.submit(request_of(payload, model="m", request_id="canary"))
        (tokens,) = await run.finished(key)
        assert len(tokens) == 1


async def test_the_death_of_its_worker_process_is_its_own(run: Run) -> None:
    key = run.submit(ask(run.prompt(QUESTIONS[4]), max_tokens=400))
    await run.until(lambda: run.tokens[key])
    loop = asyncio.get_running_loop()
    killed = loop.time()
    os.kill(run.engine.child_pids()[-1], signal.SIGKILL)
    await run.until(lambda: run.deaths)
    assert loop.time() - killed < within(1.0)
    assert key not in run.ends
    with pytest.raises(EngineFailed):
        await run.engine.check()
    with pytest.raises(EngineFailed):
        run.submit(ask(run.prompt(QUESTIONS[0])))
    await run.engine.close()
    assert run.engine._orphans.pids() == []
    assert len(run.deaths) == 1
