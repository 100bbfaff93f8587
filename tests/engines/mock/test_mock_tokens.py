"""The tokens are a pure function, and any tampering with the state shows."""

import msgspec
import pytest

from holdfast.base.errors import InvalidRequest
from holdfast.engines.contract import pack_ids, unpack_ids
from holdfast.engines.mock.checker import expected_tokens, first_difference, text_of
from holdfast.engines.mock.vocabulary import vocabulary
from tests.engines.mock.mockrun import request, running


async def tokens_of(wanted, **config):
    async with running(**config) as run:
        return await run.finish(run.submit(wanted))


async def test_engine_agrees_with_the_checker():
    wanted = request(max_tokens=200, seed=7)
    assert await tokens_of(wanted) == expected_tokens(wanted)


@pytest.mark.parametrize("cut", [1, 2, 15, 16, 17, 99])
async def test_a_continuation_from_any_point_is_exact(cut):
    whole = expected_tokens(request(max_tokens=100, seed=3))
    rest = await tokens_of(request(max_tokens=100, seed=3, generated=whole[:cut], attempt=2))
    assert whole[:cut] + rest == whole


def test_every_part_of_the_state_matters():
    base = expected_tokens(request(seed=1), 8)
    others = [
        request("Tell me about the rivers.", seed=1),
        request(seed=2),
        request(seed=1, temperature=0.5),
        request(seed=1, top_p=0.9),
        request(seed=1, top_k=5),
        request(seed=1, min_p=0.1),
        request(seed=1, repetition_penalty=1.1),
        request(seed=1, presence_penalty=0.1),
        request(seed=1, frequency_penalty=0.1),
        request(seed=1, logit_bias={5: 1.0}),
        request(seed=1, lora="adapter"),
        msgspec.structs.replace(request(seed=1), model="other"),
    ]
    outputs = [expected_tokens(o, 8) for o in others]
    assert base not in outputs
    assert len({tuple(o) for o in outputs}) == len(outputs)


def test_what_must_not_matter():
    base = expected_tokens(request(seed=1), 8)
    assert expected_tokens(request(seed=1, logprobs=3), 8) == base
    assert expected_tokens(request(seed=1, max_tokens=99), 8) == base
    assert expected_tokens(request(seed=1, attempt=4), 8) == base


def test_temperature_zero_ignores_seed_and_truncation():
    assert expected_tokens(request(temperature=0, seed=1)) == expected_tokens(
        request(temperature=0, seed=2, top_p=0.5, top_k=3, min_p=0.1)
    )


async def test_a_lost_or_merged_token_changes_the_rest():
    wanted = request(max_tokens=40, seed=9)
    whole = expected_tokens(wanted)
    lost = await tokens_of(request(max_tokens=40, seed=9, generated=whole[:9]))
    assert first_difference(wanted, whole[:10] + lost) == 10
    merged = msgspec.structs.replace(wanted, prompt_ids=wanted.prompt_ids + pack_ids(whole[:10]))
    assert (await tokens_of(merged))[:5] != whole[10:15]


def test_tokens_are_ordinary_words():
    known = vocabulary()
    tokens = expected_tokens(request(max_tokens=300))
    assert not set(tokens) & set(known.eos_ids)
    assert known.decode(tokens).isprintable()


@pytest.mark.parametrize("chance", [0.05, 1.0])
async def test_end_of_sequence_by_chance(chance):
    wanted = request(max_tokens=1000)
    got = await tokens_of(wanted, eos_chance=chance)
    assert got == expected_tokens(wanted, eos_chance=chance)
    assert got[-1] == vocabulary().eos_id
    assert len(got) < 1000
    assert vocabulary().eos_id not in got[:-1]


async def test_ignore_eos_and_min_tokens_hold_the_end_back():
    eos = vocabulary().eos_id
    ignoring = await tokens_of(request(max_tokens=30, stop={"ignore_eos": True}), eos_chance=1.0)
    assert len(ignoring) == 30
    assert eos not in ignoring
    least = await tokens_of(request(max_tokens=30, stop={"min_tokens": 12}), eos_chance=1.0)
    assert len(least) == 13
    assert least[-1] == eos


async def test_stop_token_ids_end_after_min_tokens_only():
    plain = expected_tokens(request(max_tokens=30))
    wanted = request(max_tokens=30, stop={"stop_token_ids": (plain[5],)})
    async with running() as run:
        key = run.submit(wanted)
        assert await run.finish(key) == plain[:6]
        assert run.ends[key].finish == "stop"
    held = await tokens_of(request(max_tokens=30, stop={"stop_token_ids": (plain[5],), "min_tokens": 10}))
    assert plain[5] not in held[:10]
    assert held[:5] == plain[:5]


async def test_logit_bias_bans_and_forces():
    first = expected_tokens(request(max_tokens=5))
    banned = await tokens_of(request(max_tokens=50, logit_bias=dict.fromkeys(first, -100.0)))
    assert not set(banned) & set(first)
    forced = await tokens_of(request(max_tokens=20, logit_bias={first[0]: 100.0}))
    assert set(forced) == {first[0]}


async def test_logprobs_are_deterministic_and_ordered():
    wanted = request(max_tokens=10, logprobs=4)

    async def run_once():
        async with running() as run:
            key = run.submit(wanted)
            await run.finish(key)
            return [one for steps in run.steps for s in steps for one in s.logprobs]

    found = await run_once()
    assert found == await run_once()
    for token, one in zip(expected_tokens(wanted), found, strict=True):
        assert one.top[0] == (token, one.logprob)
        assert len({t for t, _ in one.top}) == 4
        values = [p for _, p in one.top]
        assert values == sorted(values, reverse=True)
        assert all(p < 0 for p in values)
    async with running() as run:
        key = run.submit(request(max_tokens=3, logprobs=0))
        await run.finish(key)
        assert run.steps[0][0].logprobs[0].top == ()


def test_text_survives_the_tokenizer():
    known = vocabulary()
    for text in ["naïve 水 🙂👩‍💻 नमस्ते", "\x00\x7f\n\t  ", "<|im_start|>user\n[[mock:say x]]<|im_end|>", "a" * 500]:
        assert known.decode(known.encode(text)) == text
    assert 4000 <= known.size <= 8192


async def test_broken_structured_continuation_is_refused():
    wanted = request("[[mock:say one two three four]]", generated=[vocabulary().words[0]])
    async with running() as run:
        with pytest.raises(InvalidRequest, match="not the beginning"):
            run.submit(wanted)


def test_packing_round_trip():
    assert text_of(pack_ids(unpack_ids(request("hello").prompt_ids))) == "hello"
