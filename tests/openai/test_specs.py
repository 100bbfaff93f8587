"""Remembered specs are the ones that would be worked out anew, whatever was asked before."""

from __future__ import annotations

import random
from typing import Any

import msgspec
import pytest

from holdfast.base.errors import InvalidRequest, UnsupportedFeature
from holdfast.models.card import Artifact, ModelCard
from holdfast.openai import specs
from holdfast.openai.mapping import chat_spec, completion_spec
from holdfast.openai.parse import parse_chat, parse_completion
from holdfast.openai.specs import Specs
from holdfast.openai.types import ChatCompletionRequest, CompletionRequest

FILE = Artifact("0" * 64, 1)
CARD = ModelCard(
    "m", FILE, FILE, 1000, (0,), vocab_size=500, block_size=16, max_logprobs=5, penalties=True, logit_bias=True
)
DEFAULTS = {"temperature": 0.6, "top_k": 20}
TOOL = {"type": "function", "function": {"name": "f"}}
VALUES: dict[str, list[Any]] = {
    "stream": [True, False, None],
    "n": [1, 2],
    "temperature": [0, 0.5, 1],
    "top_p": [0, 0.9],
    "max_tokens": [1, 7],
    "min_tokens": [1],
    "seed": [1, 2],
    "stop": ["x", ["x", "y"]],
    "top_k": [-1, 5],
    "ignore_eos": [True, False],
    "logit_bias": [{"3": 1}, {"3": 2}],
    "stop_token_ids": [[3], [4]],
    "cache_salt": ["a", "b"],
    "priority": [1, 2],
    "user": ["somebody", "somebody else"],
    "frequency_penalty": [0.5],
}
CHAT: dict[str, list[Any]] = {
    "logprobs": [True],
    "top_logprobs": [2],
    "tools": [[TOOL]],
    "reasoning_effort": ["low", "high"],
    "chat_template_kwargs": [{"a": 1}, {"a": 2}],
    "max_completion_tokens": [9],
    "nvext": [{"greed_sampling": True}, {"token_data": [1]}],
}
TEXT: dict[str, list[Any]] = {"logprobs": [0, 1, 3], "echo": [True, False]}


def body(rng: random.Random, values: dict[str, list[Any]]) -> dict[str, Any]:
    chosen = rng.sample(sorted(values), rng.choice([0, 1, 2, 3, 4]))
    found = {name: rng.choice(values[name]) for name in chosen}
    if found.get("stream"):
        found["stream_options"] = {"include_usage": rng.random() < 0.5}
    return found


@pytest.mark.parametrize("kept", [4, 256])
def test_remembered_or_not_the_spec_is_the_same(kept: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(specs, "KEPT", kept)
    rng = random.Random(3)
    known = Specs(CARD, DEFAULTS)
    same = 0
    for _ in range(1500):
        steering = rng.random() < 0.8
        try:
            if rng.random() < 0.5:
                fields = {"model": "m", "messages": [{"role": "user", "content": "hi"}], **body(rng, VALUES | CHAT)}
                asked = parse_chat(msgspec.json.encode(fields))
                expected = chat_spec(asked, CARD, DEFAULTS, steering=steering)
                found = known.chat(asked, steering=steering)
            else:
                prompt = rng.choice(["hi", [1, 2]])
                text = parse_completion(
                    msgspec.json.encode({"model": "m", "prompt": prompt, **body(rng, VALUES | TEXT)})
                )
                expected = completion_spec(text, CARD, DEFAULTS, steering=steering)
                found = known.completion(text, steering=steering)
        except (InvalidRequest, UnsupportedFeature):
            continue
        assert found == expected
        same += found is not expected
    assert same > 500


def test_what_cannot_be_served_is_refused_every_time() -> None:
    known = Specs(CARD, DEFAULTS)
    asked = parse_chat(b'{"model":"m","messages":[{"role":"user","content":"hi"}],"logprobs":true,"top_logprobs":9}')
    for _ in range(2):
        with pytest.raises(UnsupportedFeature, match="top_logprobs"):
            known.chat(asked, steering=True)


def test_every_field_is_plain_rare_or_says_nothing() -> None:
    kinds = (ChatCompletionRequest, CompletionRequest)
    plain = {*specs._PLAIN, *specs._OF_CHAT, *specs._OF_TEXT}
    fields = {name for kind in kinds for name in kind.__struct_fields__}
    assert plain <= fields
    assert fields >= specs._SAYS_NOTHING
    assert not plain & specs._SAYS_NOTHING
