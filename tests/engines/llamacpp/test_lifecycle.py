"""Start, stop, limits, cancels and failures of the embedded engine."""

import asyncio
import subprocess
import sys

import pytest

from holdfast.base.errors import (
    Conflict,
    ContextLengthExceeded,
    EngineFailed,
    InvalidRequest,
    UnsupportedFeature,
    WorkerSaturated,
)
from holdfast.base.ids import SequenceKey
from holdfast.engines.contract import GenerateRequest
from holdfast.engines.llamacpp import LlamaCppConfig, LlamaCppEngine
from holdfast.engines.llamacpp.context import NO_SLOT
from tests.engines.llamacpp.harness import QUESTIONS, Run, request
from tests.engines.mock.test_mock_cache import replay

pytestmark = [pytest.mark.llamacpp, pytest.mark.asyncio(loop_scope="package")]


async def test_importing_the_package_loads_neither_numpy_nor_the_engine():
    code = (
        "import sys, holdfast.engines.llamacpp as m; m.LlamaCppEngine(m.LlamaCppConfig());"
        "assert not {'numpy', 'xllamacpp', 'llama_cpp', 'tokenizers'} & set(sys.modules)"
    )
    await asyncio.to_thread(subprocess.run, [sys.executable, "-c", code], check=True, timeout=60)


async def test_info_describes_the_model(run):
    info = run.info
    assert (info.engine, info.model, info.context_length) == ("llamacpp", "smollm2-135m", 768)
    assert (info.block_size, info.total_kv_blocks) == (16, 8 * 48)
    assert info.vocab_size == 49152
    assert run.encode("<|im_end|>")[0] in info.eos_token_ids
    assert "<|im_start|>" in info.files.chat_template
    assert info.files.eos_token == "<|im_end|>"
    assert len(info.fingerprint) == 32
    assert run.loading[0][1] == 0.0
    assert run.loading[-1] == ("ready", 1.0)
    assert [share for _, share in run.loading] == sorted(share for _, share in run.loading)


async def test_end_of_sequence_is_the_last_token(run):
    key = run.submit(request(run.chat(QUESTIONS[0]), max_tokens=60, stop={}))
    (tokens,) = await run.finish(key)
    assert run.ends[key].finish == "stop"
    assert tokens[-1] in run.info.eos_token_ids
    assert not set(tokens[:-1]) & set(run.info.eos_token_ids)
    assert run.decode(tokens) == "The capital of France is Paris."


async def test_min_tokens_holds_back_the_end_and_counts_over_attempts(run):
    prompt = run.chat(QUESTIONS[0])
    stop = {"min_tokens": 14}
    whole = await run.one(prompt, max_tokens=40, stop=stop)
    assert len(whole) >= 14
    assert not set(whole[:13]) & set(run.info.eos_token_ids)
    assert await run.one(prompt, max_tokens=40, stop=stop, generated=whole[:5]) == whole[5:]


async def test_stop_token_ends_and_is_delivered(run, greedy):
    prompt, answer = greedy[1]
    stop_at = next(i for i in range(5, 30) if answer[i] not in answer[:i])
    key = run.submit(request(prompt, max_tokens=30, stop={"ignore_eos": True, "stop_token_ids": (answer[stop_at],)}))
    assert await run.finish(key) == [answer[: stop_at + 1]]
    assert run.ends[key].finish == "stop"


async def test_a_sequence_that_was_already_over_ends_at_once(run, greedy):
    prompt, answer = greedy[0]
    full = run.submit(request(prompt, max_tokens=5, generated=answer[:5]))
    ended = run.submit(request(prompt, max_tokens=90, generated=[*answer[:5], run.info.eos_token_ids[1]], stop={}))
    assert await run.finish(full, ended) == [[], []]
    assert (run.ends[full].finish, run.ends[ended].finish) == ("length", "stop")
    assert (run.ends[full].index, run.ends[ended].index) == (5, 6)


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"prompt": []}, InvalidRequest),
        ({"prompt": [49152]}, InvalidRequest),
        ({"prompt": [5] * 768}, ContextLengthExceeded),
        ({"generated": [5] * 768}, ContextLengthExceeded),
        ({"max_tokens": 0}, InvalidRequest),
        ({"temperature": -1.0}, InvalidRequest),
        ({"temperature": float("nan")}, InvalidRequest),
        ({"top_p": 0.0}, InvalidRequest),
        ({"min_p": 1.5}, InvalidRequest),
        ({"repetition_penalty": 0.0}, InvalidRequest),
        ({"logprobs": 21}, InvalidRequest),
        ({"logit_bias": {60_000: 1.0}}, InvalidRequest),
    ],
)
async def test_impossible_requests_are_refused_before_any_work(run, change, error):
    with pytest.raises(error):
        run.submit(request(**{"prompt": [5, 6], **change}))
    assert run.engine.load().running == run.engine.load().waiting == 0


async def test_adapters_and_repeated_keys_are_refused(run):
    wanted = request([5, 6], max_tokens=100)
    fields = {name: getattr(wanted, name) for name in wanted.__struct_fields__}
    with pytest.raises(UnsupportedFeature):
        run.submit(GenerateRequest(**{**fields, "lora": "a"}))
    key = run.submit(wanted)
    with pytest.raises(Conflict):
        run.engine.submit(SequenceKey(key), wanted)
    run.engine.cancel(SequenceKey(key))
    await run.idle()


async def test_cancel_while_decoding_stops_within_a_step(run, greedy):
    prompt, answer = greedy[2]
    other = run.submit(request(prompt, max_tokens=30))
    key = run.submit(request(run.chat(QUESTIONS[5]), max_tokens=400))
    await run.until(lambda: len(run.tokens[key]) >= 3)
    run.engine.cancel(SequenceKey(key))
    seen, before = len(run.tokens[key]), run.engine.progress()
    assert await run.finish(other) == [answer]
    assert len(run.tokens[key]) == seen
    assert key not in run.ends
    assert run.engine.progress().tokens_after_cancel - before.tokens_after_cancel <= 1
    await run.idle()
    assert run.engine.load().kv_used_blocks == 0


async def test_cancel_during_prefill_leaves_most_of_the_prompt_uncomputed(run):
    prompt = run.encode("A very long prompt that nobody waits for. " * 90)[:700]
    before = run.engine.progress()
    key = run.submit(request(prompt, salt="fresh"))
    assert run.engine.load().prefill_tokens == 700
    async with asyncio.timeout(30):
        while run.engine.progress().prefilled == before.prefilled:  # noqa: ASYNC110 - a thread has no event
            await asyncio.sleep(0.001)
    assert run.engine.progress().phase == "prefill"
    run.engine.cancel(SequenceKey(key))
    assert run.engine.load().prefill_tokens == 0
    await run.idle()
    after = run.engine.progress()
    assert after.prefilled - before.prefilled < 350
    assert after.tokens == before.tokens
    assert run.tokens[key] == []


async def test_cancel_while_waiting_never_starts(run):
    running = [run.submit(request(run.chat(q), max_tokens=12)) for q in QUESTIONS[:6]]
    waiting = run.submit(request([5] * 40, salt="w"))
    before = run.engine.progress().prefilled
    run.engine.cancel(SequenceKey(waiting))
    run.engine.cancel(SequenceKey(12345))
    await run.finish(*running)
    assert run.tokens[waiting] == []
    assert run.engine.progress().prefilled - before < 40 * 6


async def test_more_sequences_than_places_wait_their_turn(run, greedy):
    keys = [run.submit(request(prompt, max_tokens=6)) for prompt, _ in greedy * 3]
    assert run.engine.load().waiting >= 6
    texts = await run.finish(*keys)
    assert texts == [answer[:6] for _, answer in greedy * 3]
    assert set(list(run.ends)[-12:-6]) == set(keys[:6])


async def test_kv_events_follow_the_cache(run):
    view = replay(None, run.engine.take_kv_events())
    for round_ in range(5):
        await run.generate(*[request(run.encode(f"{round_} {q} " * 4), max_tokens=4) for q in QUESTIONS[:3]])
        replay(None, run.engine.take_kv_events(), view)
        held = {name for slot in run.engine._core.cache._slots for name in slot.hashes}
        assert view == held


async def test_one_sink_call_per_step(run):
    before, calls = run.engine.progress(), len(run.steps)
    await run.generate(*[request(run.chat(q), max_tokens=8) for q in QUESTIONS[:4]])
    assert len(run.steps) - calls <= run.engine.progress().steps - before.steps
    await run.engine.check()


async def test_full_kv_cache_drops_parked_blocks_then_gives_up_the_youngest(run, greedy):
    await run.idle()
    context = run.engine._core._context
    decode, refusals = context.decode, iter([False, True, True])
    context.decode = lambda: NO_SLOT if next(refusals, False) else decode()
    try:
        keys = [run.submit(request(prompt, max_tokens=12)) for prompt, _ in greedy[:2]]
        texts = await run.finish(*keys)
    finally:
        del context.decode
    assert [run.ends[key].finish for key in keys] == ["length", "abort"]
    assert texts[0] == greedy[0][1][:12]
    rest = await run.one(greedy[1][0], max_tokens=12, generated=texts[1])
    assert texts[1] + rest == greedy[1][1][:12]


async def test_limits_of_places_and_context():
    run = await Run(max_num_seqs=1, parked_seqs=0, max_waiting=1, context_length=256).start()
    try:
        keys = [run.submit(request([5] * 20, max_tokens=200)) for _ in range(2)]
        with pytest.raises(WorkerSaturated) as refused:
            run.submit(request([5] * 20))
        assert refused.value.details == {"knob": "max_waiting", "threshold": 2, "actual": 2}
        for key in keys:
            run.engine.cancel(SequenceKey(key))
        await run.generate(request([5] * 20, max_tokens=2))
        last = run.submit(request([5] * 250, max_tokens=500))
        (tokens,) = await run.finish(last)
        assert (len(tokens), run.ends[last].finish) == (6, "length"), "the context's end is a length finish"
    finally:
        await run.engine.close()
        await run.engine.close()
    with pytest.raises(EngineFailed):
        run.submit(request([5]))
    assert run.deaths == []


async def test_a_failing_thread_is_one_death_and_refuses_from_then_on():
    run = await Run(max_num_seqs=2, parked_seqs=0, context_length=256).start()
    try:

        def explode():
            raise MemoryError("simulated")

        run.engine._core._context.decode = explode
        run.submit(request([5] * 20))
        await run.until(lambda: bool(run.deaths))
        assert isinstance(run.deaths[0], EngineFailed)
        with pytest.raises(EngineFailed):
            run.submit(request([5]))
        with pytest.raises(EngineFailed):
            await run.engine.check()
        assert len(run.deaths) == 1
    finally:
        await run.engine.close()


@pytest.mark.parametrize(
    ("config", "word"),
    [
        ({"model_path": "/nowhere/model.gguf"}, "DYN_LLAMACPP_MODEL_PATH"),
        ({"library_path": "/nowhere/libllama.so"}, "library_path"),
        ({"model_path": __file__}, "not a GGUF"),
        ({"library_path": __file__}, "Cannot load"),
    ],
)
async def test_what_cannot_start_says_what_to_do(config, word):
    engine = LlamaCppEngine(LlamaCppConfig(**config))
    with pytest.raises((EngineFailed, InvalidRequest), match=word):
        await engine.start(lambda steps: None, lambda error: None, lambda what, share: None)
    await engine.close()


@pytest.mark.parametrize("bad", [{"threads": 0}, {"max_num_seqs": 33}, {"context_length": 0}, {"block_size": 0}])
async def test_settings_out_of_range_are_refused(bad):
    with pytest.raises(InvalidRequest, match=next(iter(bad))):
        LlamaCppConfig(**bad)
