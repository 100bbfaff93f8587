"""What cannot be done is refused with a typed error before any work, and full memory is nobody's wrong text."""

from __future__ import annotations

from typing import Any

import pytest

from holdfast.base.errors import (
    CapacityExhausted,
    ContextLengthExceeded,
    InvalidRequest,
    NotFound,
    UnsupportedFeature,
)
from holdfast.engines.contract import Guided
from tests.engines.conformance.recorder import Recorder
from tests.engines.conformance.registry import check


@check("requests that cannot be served are refused with a typed error, and nothing is left of them")
async def refusals(run: Recorder) -> None:
    info = run.info
    bad: list[tuple[dict[str, Any], type[Exception] | tuple[type[Exception], ...]]] = [
        ({"prompt": []}, InvalidRequest),
        ({"prompt": [info.vocab_size]}, InvalidRequest),
        ({"prompt": [1, 2], "generated": [info.vocab_size]}, InvalidRequest),
        ({"prompt": run.filled(info.context_length + 1)}, ContextLengthExceeded),
        ({"prompt": run.filled(info.context_length - 1), "generated": [5, 5]}, ContextLengthExceeded),
    ]
    if not info.capabilities.lora:
        bad.append(({"prompt": [1, 2], "lora": "nobody"}, (UnsupportedFeature, NotFound)))
    if "grammar" not in info.capabilities.guided:
        bad.append(({"prompt": [1, 2], "guided": Guided("grammar", 'root ::= "a"')}, InvalidRequest))
    if not info.capabilities.logit_bias:
        bad.append(({"prompt": [1, 2], "logit_bias": {1: 2.0}}, UnsupportedFeature))
    if not info.capabilities.penalties:
        bad.append(({"prompt": [1, 2], "repetition_penalty": 1.5}, UnsupportedFeature))
    for how, error in bad:
        request = run.request(**{"max_tokens": 64, **how})
        if not _mock_ignores(run, how):
            with pytest.raises(error):
                run.submit(request)
    load = run.engine.load()
    assert (load.running, load.waiting) == (0, 0), "a refused request is in the load"
    assert len(await run.one(run.subject.prompts[0], 2)) == 2, "the engine works on afterwards"


def _mock_ignores(run: Recorder, how: dict[str, Any]) -> bool:
    """The mock engine serves every adapter, by definition: its name is part of the hash."""
    return run.info.engine == "mock" and "lora" in how


@check("the end of the context ends the sequence with length")
async def context_end(run: Recorder) -> dict[str, Any]:
    room = 4
    prompt = run.filled(run.info.context_length - room, salt=9)
    key = run.submit(run.request(prompt, 50))
    (tokens,) = await run.finish(key)
    assert run.sequences[key].finish == "length"
    assert 1 <= len(tokens) <= room, f"{len(tokens)} tokens into a context with room for {room}"
    return {"tokens into the last 4 places": len(tokens)}


@check("more sequences than KV memory: all complete, or end as abort or refusal; the engine goes on")
async def out_of_memory(run: Recorder) -> dict[str, Any]:
    info = run.info
    each, count = info.context_length // 2, 2 * info.total_kv_blocks * info.block_size // info.context_length + 3
    if run.subject.kv_per_seat:
        each, count = info.context_length // 4, info.max_num_seqs + 4
    share = min(16, each // 4)
    keys, refused = [], 0
    for number in range(count):
        request = run.request(run.filled(each - share, salt=100 + number), share)
        try:
            keys.append(run.submit(request))
        except CapacityExhausted:
            refused += 1
    await run.until("all end", lambda: all(run.sequences[k].end for k in keys), 3 * run.subject.answer_seconds)
    ends: dict[str, int] = {}
    for key in keys:
        sequence = run.sequences[key]
        ends[str(sequence.finish)] = ends.get(str(sequence.finish), 0) + 1
        assert sequence.finish in ("length", "abort"), f"ended with {sequence.finish}"
        assert sequence.finish == "abort" or len(sequence.tokens) == share
    assert ends.get("length"), "not a single sequence got through"
    assert len(await run.one(run.subject.prompts[0], 2)) == 2
    return {"sequences": count, "of KV tokens": info.total_kv_blocks * info.block_size, **ends, "refused": refused}
