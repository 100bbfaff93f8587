"""Scheduling, timing, load and cancellation of the mock engine."""

import asyncio
import itertools

import msgspec
import pytest

from holdfast.base.errors import ContextLengthExceeded, InvalidRequest, UnsupportedFeature
from holdfast.engines.contract import pack_ids
from holdfast.engines.mock import MockConfig, MockEngine
from holdfast.engines.mock.checker import expected_tokens
from holdfast.engines.mock.timing import decode_ms, prefill_ms, step_seconds
from holdfast.kv.events import BlockStored
from tests.engines.mock.mockrun import request, running
from tests.support.virtual_time import virtual


async def test_sequences_run_together_one_token_each_per_step():
    async with running() as run:
        keys = [run.submit(request(f"prompt {i}", max_tokens=10)) for i in range(8)]
        await run.until(lambda: len(run.ends) == 8)
        assert len(run.steps) == 10
        assert all([s.key for s in steps] == keys for steps in run.steps)
        assert [[s.index for s in steps] for steps in run.steps] == [[i] * 8 for i in range(10)]
        assert all(run.ends[k].finish == "length" for k in keys)


async def test_a_continuation_starts_at_its_index():
    whole = expected_tokens(request())
    async with running() as run:
        key = run.submit(request(generated=whole[:7]))
        await run.finish(key)
        assert run.steps[0][0].index == 7
        assert len(run.tokens[key]) == 13


@virtual
async def test_fixed_steps_keep_an_absolute_schedule():
    async with running(step_ms=5.0) as run:
        due = []
        sink = run.engine._sink
        run.engine._sink = lambda steps: (due.append(run.engine._tick), sink(steps))
        await run.finish(run.submit(request(max_tokens=60)))
        assert all(at >= when - 0.002 for at, when in zip(run.times, due, strict=True))
        periods = sorted(b - a for a, b in itertools.pairwise(due))
        assert periods[0] >= 0.005 - 1e-9
        assert periods[len(periods) // 2] == pytest.approx(0.005, abs=1e-9)


async def test_instant_steps_still_yield_to_the_loop():
    async with running() as run:
        key = run.submit(
            request(max_tokens=100_000, stop={"ignore_eos": True}),
        )
        turns = 0
        while len(run.tokens[key]) < 50:
            await asyncio.sleep(0)
            turns += 1
        assert turns >= 50
        run.engine.cancel(key)


async def test_modelled_time_is_used():
    async with running(step_ms=None, speedup_ratio=2.0) as run:
        begin = asyncio.get_running_loop().time()
        await run.finish(run.submit(request(max_tokens=3)))
        prompt = len(request().prompt_ids) // 4
        expected = (prefill_ms(prompt) + 2 * decode_ms(0)) / 2e3
        assert run.times[-1] - begin >= expected - 0.002


def test_formulas():
    assert prefill_ms(1000) == pytest.approx(32.1058, abs=1e-3)
    assert decode_ms(0.5) == pytest.approx(26.31, abs=1e-6)
    config = MockConfig(speedup_ratio=10.0, decode_speedup_ratio=2.0)
    assert step_seconds(config, 1000, 1, 0.5) == pytest.approx((3.21058 + 26.31 / 20) / 1e3, rel=1e-4)
    assert step_seconds(MockConfig(speedup_ratio=0.0), 1000, 1, 0.5) == 0
    assert step_seconds(MockConfig(step_ms=5.0), 1000, 1, 0.5) == 0.005


async def test_long_prompts_are_computed_in_chunks_beside_decoding():
    async with running(max_num_batched_tokens=32, step_ms=1.0) as run:
        first = run.submit(request("short", max_tokens=100))
        await run.until(lambda: len(run.tokens[first]) > 2)
        before = len(run.tokens[first])
        long = request("river " * 200, max_tokens=2)
        second = run.submit(long)
        await run.finish(second)
        chunks = len(long.prompt_ids) // 4 / 31
        assert len(run.tokens[first]) - before >= int(chunks)
        assert run.engine.progress().prefilled >= len(long.prompt_ids) // 4


async def test_seats_are_limited_and_load_tells():
    async with running(max_num_seqs=2, step_ms=1.0) as run:
        keys = [run.submit(request(f"p {i}", max_tokens=10)) for i in range(5)]
        assert run.engine.load().waiting == 5
        await run.until(lambda: bool(run.steps))
        load = run.engine.load()
        assert (load.running, load.waiting) == (2, 3)
        assert load.kv_used_blocks == 2
        assert load.prefill_tokens > 0
        await run.until(lambda: len(run.ends) == 5)
        assert [run.tokens[k] for k in keys] == [expected_tokens(request(f"p {i}", max_tokens=10)) for i in range(5)]
        load = run.engine.load()
        assert (load.running, load.waiting, load.kv_used_blocks, load.prefill_tokens) == (0, 0, 0, 0)


async def test_equal_prefixes_come_from_the_cache():
    text = "lantern " * 80
    async with running() as run:
        first = run.submit(request(text + "one"))
        await run.finish(first)
        second = run.submit(request(text + "two"))
        await run.finish(second)
        assert run.ends[first].cached_tokens == 0
        assert run.ends[second].cached_tokens == 80
    async with running(prefix_caching=False) as run:
        for _ in range(2):
            key = run.submit(request(text))
            await run.finish(key)
            assert run.ends[key].cached_tokens == 0
        assert run.engine.take_kv_events() == []


async def test_adapters_do_not_share_blocks():
    text = "lantern " * 80
    async with running() as run:
        await run.finish(run.submit(request(text)))
        key = run.submit(request(text, lora="a"))
        await run.finish(key)
        assert run.ends[key].cached_tokens == 0


async def test_kv_events_name_prompt_and_output_blocks():
    async with running(block_size=4) as run:
        wanted = request(max_tokens=20)
        await run.finish(run.submit(wanted))
        stored = [e for e in run.engine.take_kv_events() if isinstance(e, BlockStored)]
        told = [t for e in stored for t in e.token_ids]
        known = [*memoryview(wanted.prompt_ids).cast("I"), *expected_tokens(wanted)]
        assert told == known[: len(told)]
        assert len(told) == (len(known) - 1) // 4 * 4
        assert stored[0].parent_hash is None
        assert stored[1].parent_hash == stored[0].block_hashes[-1]


@pytest.mark.parametrize("preemption", ["lifo", "fifo"])
async def test_a_full_cache_preempts_and_loses_nothing(preemption):
    async with running(num_blocks=12, block_size=4, preemption=preemption) as run:
        wanted = [request(f"p {i}", max_tokens=30) for i in range(4)]
        keys = [run.submit(w) for w in wanted]
        await run.until(lambda: len(run.ends) == 4)
        assert run.engine.preemptions > 0
        assert [run.tokens[k] for k in keys] == [expected_tokens(w) for w in wanted]
        assert run.engine.load().kv_used_blocks == 0


async def test_a_sequence_that_outgrows_everything_ends_by_length():
    async with running(num_blocks=4, block_size=4) as run:
        key = run.submit(request("p", max_tokens=1000))
        tokens = await run.finish(key)
        assert run.ends[key].finish == "length"
        assert len(tokens) == 16 - len(request("p").prompt_ids) // 4


async def test_cancel_frees_at_once_and_silences():
    async with running(step_ms=2.0, max_num_seqs=1) as run:
        first = run.submit(request(max_tokens=1000))
        second = run.submit(request("other", max_tokens=5))
        await run.until(lambda: len(run.tokens[first]) == 3)
        run.engine.cancel(first)
        run.engine.cancel(first)
        assert run.engine.load().running == 0
        await run.finish(second)
        assert len(run.tokens[first]) == 3
        assert run.engine.progress().tokens_after_cancel == 0


async def test_idle_means_idle():
    async with running() as run:
        await run.finish(run.submit(request()))
        steps = run.engine.progress().steps
        await asyncio.sleep(0.02)
        progress = run.engine.progress()
        assert (progress.steps, progress.phase, progress.silent_step_seconds) == (steps, "idle", 0.0)
        assert run.engine._timer is None


async def test_phases_while_starting():
    engine = MockEngine(MockConfig(startup_seconds=0.05, warmup_seconds=0.05))
    seen = []
    assert engine.progress().phase == "starting"

    def note(what, share):
        seen.append((what, share, engine.progress().phase, engine.progress().silent_step_seconds))

    await engine.start(lambda s: None, lambda e: None, note)
    assert ("warm-up", 0.0, "warming", 0.05) in seen
    assert seen[-1][:2] == ("ready", 1.0)
    assert [s for w, s, *_ in seen if w == "weights"] == sorted(s for w, s, *_ in seen if w == "weights")
    await engine.close()


async def test_a_prefill_says_how_long_it_may_be_silent():
    async with running(step_ms=None) as run:
        run.submit(request("river " * 2000, max_tokens=1))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        progress = run.engine.progress()
        assert progress.phase == "prefill"
        assert progress.silent_step_seconds >= prefill_ms(2000) / 1e3


@pytest.mark.parametrize(
    ("wanted", "error"),
    [
        (request(max_tokens=0), InvalidRequest),
        (request(max_tokens=3, generated=[5, 5, 5]), InvalidRequest),
        (request("river " * 200), ContextLengthExceeded),
        (request(logprobs=21), UnsupportedFeature),
        (request(generated=[999_999]), InvalidRequest),
        (request(""), InvalidRequest),
    ],
)
async def test_what_cannot_be_served_is_refused_at_submit(wanted, error):
    async with running(context_length=100) as run:
        with pytest.raises(error):
            run.submit(wanted)
        assert run.engine.load().waiting == 0


async def test_context_end_is_length():
    async with running(context_length=20) as run:
        prompt = request("river").prompt_ids
        key = run.submit(request("river", max_tokens=100))
        tokens = await run.finish(key)
        assert len(tokens) == 20 - len(prompt) // 4
        assert run.ends[key].finish == "length"


async def test_broken_id_bytes_are_refused():
    async with running() as run:
        with pytest.raises(InvalidRequest):
            run.submit(msgspec.structs.replace(request(), prompt_ids=pack_ids([1, 2])[:-1]))
