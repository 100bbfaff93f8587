"""Token accounting: every token once, at its index, with its log probability, up to where the sequence ends."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest

from holdfast.base.errors import InvalidRequest, UnsupportedFeature
from holdfast.engines.contract import Guided
from tests.engines.conformance.recorder import Recorder
from tests.engines.conformance.registry import NotApplicable, check

SCHEMA = {
    "type": "object",
    "properties": {"city": {"enum": ["Paris", "Rome"]}, "big": {"type": "boolean"}},
    "required": ["city", "big"],
    "additionalProperties": False,
}
LONGEST_GUIDED = 80


@check("says what it is: model, sizes, end tokens, files, loading progress")
async def identity(run: Recorder) -> dict[str, Any]:
    info = run.info
    assert info.engine
    assert info.version
    assert info.model
    assert info.fingerprint
    assert info.context_length > 0
    assert info.block_size > 0
    assert info.max_num_seqs > 0
    assert info.vocab_size > max(info.eos_token_ids)
    assert info.eos_token_ids
    shares = [share for _, share in run.loading]
    assert shares, "no progress was reported while loading"
    assert all(0 <= share <= 1 for share in shares)
    return {"version": info.version, "context_length": info.context_length, "block_size": info.block_size}


@check("max_tokens is exact, and ends with length")
async def max_tokens(run: Recorder) -> None:
    for count in (1, 2, run.subject.length):
        key = run.submit(run.request(run.subject.prompts[0], count))
        (tokens,) = await run.finish(key)
        assert len(tokens) == count, f"{len(tokens)} tokens instead of {count}"
        assert run.sequences[key].finish == "length"


@check("max_tokens and indexes count over all attempts")
async def counts_over_attempts(run: Recorder) -> None:
    prompt, length = run.subject.prompts[1], run.subject.length
    whole = await run.one(prompt)
    for cut in (1, length // 2, length - 1):
        key = run.submit(run.request(prompt, generated=whole[:cut], attempt=2))
        (rest,) = await run.finish(key)
        assert len(rest) == length - cut, f"{len(rest)} more tokens after {cut} of {length}"
        assert run.sequences[key].finish == "length"


@check("a sequence that is already complete generates nothing")
async def already_complete(run: Recorder) -> None:
    whole = await run.one(run.subject.prompts[0], 4)
    try:
        key = run.submit(run.request(run.subject.prompts[0], 4, generated=whole))
    except InvalidRequest:
        return
    assert await run.finish(key) == [[]]
    assert run.sequences[key].finish == "length"


@check("the end-of-sequence token is delivered, counted and last; the finish is stop")
async def end_of_sequence(run: Recorder) -> dict[str, Any]:
    key = run.submit(run.request(run.subject.ending, 60, ignore_eos=False))
    (tokens,) = await run.finish(key)
    assert run.sequences[key].finish == "stop", f"ended with {run.sequences[key].finish} after {len(tokens)} tokens"
    assert tokens[-1] in run.info.eos_token_ids, "the terminating token was not delivered"
    assert not set(tokens[:-1]) & set(run.info.eos_token_ids), "it went on after the end of sequence"
    again = await run.one(run.subject.ending, len(tokens), ignore_eos=False)
    assert again == tokens, "with max_tokens of exactly its length the answer is another"
    assert run.sequences[max(run.sequences)].finish == "stop", "the end of sequence at max_tokens is a stop"
    return {"tokens": len(tokens)}


@check("ignore_eos generates on")
async def ignore_eos(run: Recorder) -> None:
    tokens = await run.one(run.subject.ending, 60, ignore_eos=True)
    assert len(tokens) == 60


@check("min_tokens holds back the end")
async def min_tokens(run: Recorder) -> None:
    plain = await run.one(run.subject.ending, 60, ignore_eos=False)
    least = len(plain) + 5
    tokens = await run.one(run.subject.ending, least + 20, ignore_eos=False, min_tokens=least)
    assert len(tokens) >= least, f"{len(tokens)} tokens; min_tokens was {least}"
    assert not set(tokens[: least - 1]) & set(run.info.eos_token_ids)


@check("a stop token id ends the sequence, is delivered and counted")
async def stop_ids(run: Recorder) -> None:
    prompt = run.subject.prompts[1]
    answer = await run.one(prompt)
    at = next(i for i in range(3, len(answer)) if answer[i] not in answer[:i])
    key = run.submit(run.request(prompt, stop_token_ids=(answer[at],)))
    (tokens,) = await run.finish(key)
    assert tokens == answer[: at + 1], "the stop token was lost, or generation went past it"
    assert run.sequences[key].finish == "stop"
    resumed = run.submit(run.request(prompt, stop_token_ids=(answer[at],), generated=answer[: at - 1]))
    await run.finish(resumed)
    assert run.sequences[resumed].tokens == answer[at - 1 : at + 1]


@check("log probabilities: one per token, natural logarithms, alternatives best first")
async def logprobs(run: Recorder) -> dict[str, Any]:
    most = run.info.capabilities.max_logprobs
    prompt = run.subject.prompts[1]
    if most < 0:
        with pytest.raises((UnsupportedFeature, InvalidRequest)):
            run.submit(run.request(prompt, 4, logprobs=0))
        raise NotApplicable("reports no log probabilities; asking for them is refused")
    plain = await run.one(prompt, 6)
    for count in sorted({0, min(3, most), most}):
        key = run.submit(run.request(prompt, 6, logprobs=count))
        (tokens,) = await run.finish(key)
        assert tokens == plain or not run.subject.repeatable, "asking for log probabilities changes the text"
        _check_tops(tokens, run.sequences[key].logprobs, count)
    with pytest.raises((UnsupportedFeature, InvalidRequest)):
        run.submit(run.request(prompt, 6, logprobs=most + 1))
    return {"max_logprobs": most}


def _check_tops(tokens: list[int], found: list[Any], count: int) -> None:
    assert len(found) == len(tokens), f"{len(found)} log probabilities for {len(tokens)} tokens"
    for token, entry in zip(tokens, found, strict=True):
        assert math.isfinite(entry.logprob)
        assert entry.logprob <= 1e-4
        assert len(entry.top) == count, f"{len(entry.top)} alternatives instead of {count}"
        values = [value for _, value in entry.top]
        assert values == sorted(values, reverse=True)
        assert len({name for name, _ in entry.top}) == count
        if count:  # greedy: what was taken is the likeliest
            assert math.isclose(values[0], entry.logprob, abs_tol=1e-3)
            assert token in {name for name, value in entry.top if math.isclose(value, values[0], abs_tol=1e-3)}


@check("guided output keeps to its constraint; kinds that are not offered are refused")
async def guided(run: Recorder) -> dict[str, Any]:
    offered = run.info.capabilities.guided
    wanted: dict[str, str] = {
        "json_schema": json.dumps(SCHEMA),
        "choice": json.dumps(["yes", "no"]),
        "regex": "[0-9]{3}-[0-9]{2}",
    }
    for kind, value in wanted.items():
        request = run.request(
            run.subject.prompts[0], LONGEST_GUIDED, ignore_eos=False, guided=Guided(kind, value)  # type: ignore[arg-type]
        )  # fmt: skip
        if kind not in offered:
            with pytest.raises((UnsupportedFeature, InvalidRequest)):
                run.submit(request)
            continue
        key = run.submit(request)
        (tokens,) = await run.finish(key)
        assert run.sequences[key].finish == "stop", f"{kind}: ended with {run.sequences[key].finish}"
        _check_guided(kind, run.tokenizer.decode([t for t in tokens if t not in run.info.eos_token_ids]))
    return {"offered": list(offered)}


def _check_guided(kind: str, text: str) -> None:
    if kind == "json_schema":
        value = json.loads(text)
        assert set(value) == {"city", "big"}
        assert value["city"] in ("Paris", "Rome")
        assert isinstance(value["big"], bool)
    elif kind == "choice":
        assert text.strip() in ("yes", "no")
    else:
        assert len(text.strip()) == 6
        assert text.strip().replace("-", "").isdigit()
