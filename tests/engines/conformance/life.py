"""Cancels, load, progress, canary, many streams, drain and death."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from holdfast.base.errors import EngineFailed
from holdfast.base.ids import SequenceKey
from holdfast.health.payloads import MARK, payload_for, request_of
from holdfast.kv.events import AllBlocksCleared, BlockRemoved, BlockStored
from holdfast.kv.hashes import block_hashes
from tests.engines.conformance.recorder import Recorder
from tests.engines.conformance.registry import NotApplicable, check
from tests.patience import within


@check("a cancel takes effect within a step; nothing of the sequence is heard afterwards")
async def cancel(run: Recorder) -> dict[str, Any]:
    long = run.info.context_length // 2
    other = run.submit(run.request(run.subject.prompts[2], run.subject.length))
    key = run.submit(run.request(run.subject.prompts[1], long))
    await run.until("three tokens", lambda: len(run.sequences[key].tokens) >= 3)
    assert run.sequences[key].end is None, "it was over before it could be cancelled"
    run.cancel(key)
    run.engine.cancel(SequenceKey(key))
    run.engine.cancel(SequenceKey(10**6))
    await run.finish(other)
    await run.idle()
    assert len(run.sequences[key].tokens) < long
    return {"tokens before the cancel": len(run.sequences[key].tokens)}


@check("a cancelled sequence is computed no further")
async def cancel_stops_work(run: Recorder) -> dict[str, Any]:
    if run.info.capabilities.progress == "none":
        raise NotApplicable("no progress counters")
    await run.idle()
    key = run.submit(run.request(run.subject.prompts[3], run.info.context_length // 2))
    await run.until("two tokens", lambda: len(run.sequences[key].tokens) >= 2)
    heard, before = len(run.sequences[key].tokens), run.engine.progress()
    run.cancel(key)
    await run.idle()
    after = run.engine.progress()
    more = max(after.tokens - before.tokens, after.tokens_after_cancel - before.tokens_after_cancel)
    assert more <= run.subject.in_flight, f"{more} tokens were generated after the cancel at {heard}"
    return {"tokens after cancel": more}


@check("a cancel before the first token")
async def cancel_early(run: Recorder) -> None:
    keys = [run.submit(run.request(run.filled(120, salt=50 + n), 8)) for n in range(3)]
    for key in keys:
        run.cancel(key)
    await run.idle()
    assert all(not run.sequences[key].tokens for key in keys)
    assert len(await run.one(run.subject.prompts[0], 3)) == 3


@check("load numbers move while there is work and fall to zero afterwards")
async def load_moves(run: Recorder) -> dict[str, Any]:
    await run.idle()
    rest = run.engine.load()
    keys = [run.submit(run.request(prompt, run.subject.length)) for prompt in run.subject.prompts[:4]]
    most = {"in hand": 0, "running": 0, "kv_used_blocks": 0}

    def watch() -> bool:
        load = run.engine.load()
        seen = {"in hand": load.running + load.waiting, "running": load.running, "kv_used_blocks": load.kv_used_blocks}
        for name, value in seen.items():
            most[name] = max(most[name], value)
        return all(run.sequences[key].end for key in keys)

    await run.until("all end", watch)
    assert most["in hand"] >= len(keys), f"four sequences were in hand, the load said {most['in hand']}"
    assert most["running"] >= 1
    if run.subject.reports_kv:
        assert most["kv_used_blocks"] > rest.kv_used_blocks, "used KV blocks did not rise"
        assert rest.kv_total_blocks >= most["kv_used_blocks"]
    await run.idle()
    await run.until("used KV blocks fall", lambda: run.engine.load().kv_used_blocks <= rest.kv_used_blocks)
    assert run.engine.load().prefill_tokens == 0
    return most


@check("progress counters rise with the work, and never fall")
async def progress_rises(run: Recorder) -> dict[str, Any]:
    if run.info.capabilities.progress == "none":
        raise NotApplicable("no progress counters")
    await run.idle()
    before = run.engine.progress()
    seen = [before]
    keys = [run.submit(run.request(run.filled(60, salt=200 + n), 6)) for n in range(2)]

    def watch() -> bool:
        seen.append(run.engine.progress())
        return all(run.sequences[key].end for key in keys)

    await run.until("all end", watch)
    await run.idle()
    calls = run.sink_calls
    await run.until("12 tokens are counted", lambda: run.engine.progress().tokens - before.tokens >= 12)
    await run.until("the phase is idle", lambda: run.engine.progress().phase == "idle")
    after = run.engine.progress()
    seen.append(after)
    for name in ("steps", "tokens", "prefilled"):
        values = [getattr(one, name) for one in seen]
        assert values == sorted(values), f"{name} fell"
    assert after.steps > before.steps
    assert after.prefilled > before.prefilled, "prompt tokens are not counted"
    assert run.sink_calls == calls
    return {"steps": after.steps - before.steps, "prefilled": after.prefilled - before.prefilled}


@check("the canary payload of its class is answered with one token")
async def canary(run: Recorder) -> dict[str, Any]:
    payload = payload_for(run.info, role=run.info.role, override="")
    assert set(run.subject.canary_checks) <= payload.to_dict().keys()
    request = request_of(payload.to_dict(), model=run.info.model, request_id="c" * 32)
    (tokens,) = await run.finish(run.submit(request))
    assert len(tokens) == 1
    await run.engine.check()
    return {"payload": type(payload).__name__, "marked": MARK in payload.to_dict()}


@check("64 concurrent streams: all complete, each with its own text; submit never blocks")
async def many_streams(run: Recorder) -> dict[str, Any]:
    count, length = run.subject.streams, 4
    requests = [run.request(f"{number} is a number and", length) for number in range(count)]
    few = await run.generate(requests[0]) + await run.generate(requests[1])
    clock = asyncio.get_running_loop().time
    begun = clock()
    keys = [run.submit(request) for request in requests]
    submitted = clock() - begun
    assert submitted < within(0.5), f"submitting took {submitted:.2f} s"
    await run.until("all end", lambda: all(run.sequences[k].end for k in keys), 4 * run.subject.answer_seconds)
    texts = [run.sequences[key].tokens for key in keys]
    assert all(len(text) == length for text in texts)
    assert texts[:2] == few or not run.subject.repeatable, "beside others a stream says something else"
    return {"streams": count, "submit ms": round(submitted * 1000, 1)}


@check("KV events name the prompt's blocks in order, and nothing is removed that was not stored")
async def kv_events(run: Recorder) -> dict[str, Any]:
    can = run.info.capabilities
    if not can.kv_events:
        raise NotApplicable("tells nothing about its cache")
    size = run.info.block_size
    known: dict[int, int] = {}
    events: list[Any] = []

    def take() -> bool:
        events.extend(run.engine.take_kv_events())
        return any(isinstance(e, BlockStored) and e.token_ids[:1] == (prompt[0],) for e in events)

    run.engine.resend_kv_events()
    prompt = run.filled(3 * size + 2, salt=777)
    await run.one(prompt, 4)
    await run.until("the prompt's blocks are told", take)
    stored: list[int] = []
    for event in events:
        if isinstance(event, BlockStored):
            assert event.block_size == size
            assert len(event.token_ids) == size * len(event.block_hashes)
            assert event.parent_hash is None or known.get(event.parent_hash), "a parent that nobody knows"
            for name in event.block_hashes:
                known[name] = known.get(name, 0) + 1
            stored += event.token_ids
        elif isinstance(event, BlockRemoved):
            for name in event.block_hashes:
                assert known.get(name), "removed, but never stored"
                known[name] -= 1
        else:
            assert isinstance(event, AllBlocksCleared)
            known.clear()
    assert prompt[:size] == stored[:size] or tuple(prompt[:size]) in _chunks(stored, size)
    if can.kv_hashes == "sequence":
        wanted = block_hashes(run.request(prompt).prompt_ids, size)
        assert all(known.get(name) for name in wanted), "the blocks are not called by their sequence hashes"
    return {"stored blocks": sum(known.values())}


def _chunks(ids: list[int], size: int) -> set[tuple[int, ...]]:
    return {tuple(ids[at : at + size]) for at in range(0, len(ids), size)}


@check("an equal prefix comes from the cache")
async def prefix_cache(run: Recorder) -> dict[str, Any]:
    if not run.info.capabilities.prefix_cache:
        raise NotApplicable("no prefix cache")
    prompt = run.filled(4 * run.info.block_size + 3, salt=31)
    first = run.submit(run.request(prompt, 3))
    await run.finish(first)
    await run.idle()
    before = run.engine.cache_counts()
    second = run.submit(run.request(prompt, 3))
    await run.finish(second)
    end = run.sequences[second].end
    assert end is not None
    assert 0 < end.cached_tokens <= len(prompt)
    await run.until("the cache's counts rise", lambda: run.engine.cache_counts().hits > before.hits)
    after = run.engine.cache_counts()
    assert after.queried - before.queried == len(prompt)
    assert after.hits - before.hits == end.cached_tokens
    assert run.sequences[first].tokens == run.sequences[second].tokens or not run.subject.repeatable
    return {"cached tokens": f"{end.cached_tokens} of {len(prompt)}"}


@check("drain: close ends everything in flight, twice is harmless, later requests are refused", alone=True)
async def drain(run: Recorder) -> None:
    keys = [run.submit(run.request(prompt, run.info.context_length // 2)) for prompt in run.subject.prompts[:3]]
    await run.until("work is under way", lambda: any(run.sequences[key].tokens for key in keys))
    async with asyncio.timeout(within(run.subject.answer_seconds)):
        await run.close()
        await run.close()
    with pytest.raises(EngineFailed):
        run.submit(run.request(run.subject.prompts[0], 2))
    await asyncio.sleep(0.05)
    assert not run.deaths, "closing is no death"
    await run.until("its processes have ended", lambda: not any(map(_lives, run.engine.child_pids())), 5.0)


@check("death is told once and soon; afterwards everything is refused and nothing is said", alone=True)
async def death(run: Recorder) -> dict[str, Any]:
    keys = [run.submit(run.request(prompt, run.info.context_length // 2)) for prompt in run.subject.prompts[:2]]
    await run.until("work is under way", lambda: any(run.sequences[key].tokens for key in keys))
    clock = asyncio.get_running_loop().time
    killed = clock()
    run.subject.kill(run.engine)
    await run.until("on_death", lambda: bool(run.deaths), run.subject.death_seconds)
    took = clock() - killed
    assert isinstance(run.deaths[0], EngineFailed)
    with pytest.raises(EngineFailed):
        run.submit(run.request(run.subject.prompts[0], 2))
    with pytest.raises(EngineFailed):
        await run.engine.check()
    run.engine.cancel(SequenceKey(keys[0]))
    run.engine.load()
    run.engine.progress()
    await asyncio.sleep(0.1)
    async with asyncio.timeout(within(run.subject.answer_seconds)):
        await run.close()
    assert len(run.deaths) == 1, f"on_death was called {len(run.deaths)} times"
    return {"death noticed after s": round(took, 3)}


def _lives(pid: int) -> bool:
    """Whether a process is there, and not only its remains that nobody has collected."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_bytes()
    except OSError:
        return False
    return stat.rpartition(b")")[2].split()[0] != b"Z"
