"""Random work on a small engine: whatever happens, tokens are true, blocks balance and events tell the cache."""

import asyncio
import random

import pytest

from holdfast.engines.mock.checker import first_difference
from tests.engines.mock.mockrun import request, running
from tests.engines.mock.test_mock_cache import replay


@pytest.mark.parametrize("seed", range(12))
async def test_random_work_keeps_every_promise(seed):
    rng = random.Random(seed)
    options = {
        "num_blocks": rng.choice([12, 24, 60]),
        "block_size": rng.choice([2, 4, 8]),
        "max_num_seqs": rng.choice([2, 5, 16]),
        "max_num_batched_tokens": rng.choice([3, 16, 200]),
        "prefix_caching": rng.random() < 0.8,
        "chunked_prefill": rng.random() < 0.8,
        "preemption": rng.choice(["lifo", "fifo"]),
        "eos_chance": rng.choice([0.0, 0.05]),
        "watermark": rng.choice([0.0, 0.0, 0.01, 0.4]),
    }
    async with running(**options) as run:
        wanted, cancelled, view = {}, set(), set()
        for _ in range(60):
            action = rng.random()
            if action < 0.6:
                text = rng.choice(["river ", "stone ", "river stone "]) * rng.randint(1, 6)
                one = request(text, max_tokens=rng.randint(1, 25), seed=rng.randint(0, 2))
                wanted[run.submit(one)] = one
            elif action < 0.75 and wanted:
                key = rng.choice(list(wanted))
                run.engine.cancel(key)
                cancelled.add(key)
            elif action < 0.8:
                run.engine.misbehave("hang", seconds=0.001)
            elif action < 0.85:
                run.engine.misbehave("clear")
            for _ in range(rng.randint(0, 4)):
                await asyncio.sleep(0)
            load = run.engine.load()
            assert 0 <= load.kv_used_blocks <= load.kv_total_blocks
            assert load.running <= options["max_num_seqs"]
            view = replay(run.engine._pool, run.engine.take_kv_events(), view)
            assert not options["prefix_caching"] or view == set(run.engine._pool._sealed)
        await run.until(lambda: set(run.ends) | cancelled >= set(wanted))
        for key, one in wanted.items():
            assert first_difference(one, run.tokens[key], eos_chance=options["eos_chance"]) is None
            assert key in cancelled or run.ends[key].finish in ("stop", "length")
        pool = run.engine._pool
        assert (pool.used, pool._private, run.engine.load().waiting) == (0, 0, 0)
        assert not run.deaths
