"""Whatever a client sends, it gets a request or a typed error; nothing else ever leaves this room."""

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from holdfast.base.errors import InvalidRequest
from holdfast.models.card import Artifact, ModelCard
from holdfast.openai.errors import error_response
from holdfast.openai.mapping import chat_spec, completion_spec
from holdfast.openai.parse import parse_chat, parse_completion
from holdfast.openai.prompt import completion_prompts, template_messages
from holdfast.openai.types import ChatCompletionRequest, CompletionRequest

ARTIFACT = Artifact("0" * 64, 1)
CARD = ModelCard(
    "m", ARTIFACT, ARTIFACT, 100, (0,), 1000, 16, max_logprobs=20, guided=("json_schema",), logit_bias=True
)
FIELDS = sorted({*ChatCompletionRequest.__struct_fields__, *CompletionRequest.__struct_fields__, "x", "max_token"})
WORDS = [
    "type",
    "function",
    "name",
    "role",
    "content",
    "text",
    "json_schema",
    "schema",
    "arguments",
    "auto",
    "required",
    "id",
]
scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.sampled_from(WORDS)
values: Any = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(WORDS) | st.text(max_size=3), inner, max_size=4)
    ),
    max_leaves=8,
)
bodies = st.dictionaries(st.sampled_from(FIELDS), values, max_size=5)


def chat(body: bytes) -> None:
    request = parse_chat(body)
    template_messages(request.messages)
    chat_spec(request, CARD, {}).sampling_for(1)


def text(body: bytes) -> None:
    request = parse_completion(body)
    assert completion_prompts(request)
    completion_spec(request, CARD, {}).stop_rules(5)


def allowed(body: bytes) -> None:
    for kind in (chat, text):
        try:
            kind(body)
        except InvalidRequest as error:
            response = error_response(error)
            assert response.status == 400
            assert json.loads(response.body)["error"]["message"].endswith((".", "?"))


@given(bodies)
@settings(max_examples=300, deadline=None)
def test_any_values_in_known_fields(fields: dict[str, Any]) -> None:
    valid = {"model": "m", "messages": [{"role": "user", "content": "x"}]}
    allowed(json.dumps({**valid, **fields}).encode(errors="replace"))
    allowed(json.dumps({"model": "m", "prompt": "x", **fields}).encode(errors="replace"))


@given(st.binary(max_size=64) | st.text(max_size=64).map(lambda s: s.encode(errors="replace")))
@settings(max_examples=300, deadline=None)
def test_any_bytes(body: bytes) -> None:
    allowed(body)


BODY = json.dumps(
    {
        "model": "m", "temperature": 0.5, "logit_bias": {"5": 1}, "stop": ["é"], "tools": [
            {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}], "tool_choice": "auto",
        "messages": [{"role": "assistant", "content": None, "tool_calls": [
            {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}]},
            {"role": "user", "content": [{"type": "text", "text": "hällo"}]}],
    },
    ensure_ascii=False,
).encode()  # fmt: skip


@given(st.integers(0, len(BODY) - 1), st.integers(0, 255))
@settings(max_examples=300, deadline=None)
def test_any_one_byte_altered(place: int, byte: int) -> None:
    allowed(BODY[:place] + bytes([byte]) + BODY[place + 1 :])


@pytest.mark.parametrize("length", range(0, len(BODY), 7))
def test_any_prefix(length: int) -> None:
    with pytest.raises(InvalidRequest, match=r"not valid JSON|is empty"):
        parse_chat(BODY[:length])
