"""Everything that goes to a client is what the openai package's own models say it is."""

import json
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from openai.types import Completion, Model
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from holdfast.models.card import Artifact, ModelCard
from holdfast.openai import encode, responses
from holdfast.openai.encode import ChatChoice, ChatStreamEncoder, CompletionStreamEncoder, TextChoice
from holdfast.openai.logprobs import LegacyLogprobs, TokenNames
from holdfast.openai.responses import Continuity, Migration, ToolCall, ToolCallFunction
from holdfast.runtime.streams import NO_LOGPROB

VOCABULARY = [b"Hello", b" w\xc3\xb6rld", b"\xe2\x80", b'"\n', b""]
NAMES = TokenNames(VOCABULARY.__getitem__)
LOGPROBS = [(-0.5, [(0, -0.5), (1, -1.25)]), (-1e-9, []), (float("-inf"), [(2, float("-inf")), (99, -3.0)])]
TOKENS = [0, 1, 2]
MOVED = Continuity(2, "exact", (Migration("disconnected", 7, 21),))
USAGE = encode.usage(10, 5, 3, 2)


def payload(event: bytes) -> Any:
    assert event.startswith(b"data: ")
    assert event.endswith(b"\n\n")
    assert event.count(b"\n") == 2
    return json.loads(event[6:])


def as_chat_chunk(event: bytes) -> ChatCompletionChunk:
    payload(event)
    return ChatCompletionChunk.model_validate_json(event[6:], strict=True)


def as_completion(data: bytes) -> Completion:
    """Validate strictly; only ``finish_reason: null``, which OpenAI's servers send too, is not in its types."""
    value = json.loads(data)
    for choice in value["choices"]:
        if choice["finish_reason"] is None:
            choice["finish_reason"] = "stop"
    return Completion.model_validate_json(json.dumps(value), strict=True)


def strict(kind: type[Any], data: bytes) -> None:
    """Hold bytes against our own published type: every field is declared and of its type."""
    decoded = msgspec.json.decode(data, type=kind)
    declared = msgspec.to_builtins(decoded)
    assert contains(declared, json.loads(data)), (declared, json.loads(data))


def contains(declared: Any, given: Any) -> bool:
    if isinstance(given, dict):
        return all(contains(declared[k], v) for k, v in given.items() if k in declared) and set(given) <= set(declared)
    if isinstance(given, list):
        return len(given) == len(declared) and all(map(contains, declared, given))
    return bool(declared == given)


def chat_events(include_usage: bool) -> list[bytes]:
    enc = ChatStreamEncoder("ab12", 1_700_000_000, 'mo"del', fingerprint="fp", include_usage=include_usage)
    second = enc.choice(1)
    return [
        enc.role(),
        enc.content(encode.escape('Hé "quoted"\n')),
        enc.content_logprobs(b"Hi", NAMES.chat_entries(TOKENS, LOGPROBS)),
        enc.reasoning(b"let me think"),
        enc.tool_call(0, "call_1", 'f"', b'{\\"a'),
        enc.tool_arguments(0, b'\\": 1}'),
        second.content(b"x"),
        enc.finish("tool_calls"),
        second.finish("stop", MOVED, {"worker_id": {"decode_worker_id": "00ff"}}),
        *([enc.usage(USAGE)] if include_usage else []),
    ]


@pytest.mark.parametrize("include_usage", [False, True])
def test_chat_events_are_valid_chunks(include_usage: bool) -> None:
    events = chat_events(include_usage)
    chunks = [as_chat_chunk(event) for event in events]
    for event, chunk in zip(events, chunks, strict=True):
        strict(responses.ChatCompletionChunk, event[6:])
        assert (chunk.id, chunk.created, chunk.model, chunk.system_fingerprint) == (
            "chatcmpl-ab12", 1_700_000_000, 'mo"del', "fp",
        )  # fmt: skip
        assert ("usage" in payload(event)) == include_usage
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[1].choices[0].delta.content == 'Hé "quoted"\n'
    assert chunks[3].choices[0].delta.model_extra == {"reasoning_content": "let me think"}
    call = (chunks[4].choices[0].delta.tool_calls or [])[0]
    assert (call.index, call.id, call.type, call.function and call.function.name) == (0, "call_1", "function", 'f"')
    more = (chunks[5].choices[0].delta.tool_calls or [])[0]
    assert call.function
    assert more.function
    assert json.loads((call.function.arguments or "") + (more.function.arguments or "")) == {"a": 1}
    assert (chunks[6].choices[0].index, chunks[7].choices[0].finish_reason) == (1, "tool_calls")


def test_last_chunk_of_each_choice_says_how_it_came_about() -> None:
    events = [payload(event) for event in chat_events(True)]
    assert [("holdfast" in event) for event in events] == [False] * 7 + [True, True, False]
    assert events[7]["holdfast"] == {"attempts": 1, "join": "none", "migrations": []}
    assert events[8]["holdfast"] == {
        "attempts": 2,
        "join": "exact",
        "migrations": [{"cause": "disconnected", "at": 7, "gap_ms": 21}],
    }
    assert events[8]["nvext"] == {"worker_id": {"decode_worker_id": "00ff"}}


def test_usage_chunk_has_no_choices_and_all_counts() -> None:
    chunk = as_chat_chunk(chat_events(True)[-1])
    assert chunk.choices == []
    assert chunk.usage
    assert chunk.usage.prompt_tokens_details
    assert chunk.usage.completion_tokens_details
    assert (chunk.usage.prompt_tokens, chunk.usage.completion_tokens, chunk.usage.total_tokens) == (10, 5, 15)
    assert chunk.usage.prompt_tokens_details.cached_tokens == 3
    assert chunk.usage.completion_tokens_details.reasoning_tokens == 2


def test_chat_logprobs_have_tokens_bytes_and_finite_numbers() -> None:
    choice = as_chat_chunk(chat_events(False)[2]).choices[0]
    assert choice.delta.content == "Hi"
    assert choice.logprobs
    content = choice.logprobs.content or []
    assert [entry.token for entry in content] == ["Hello", " wörld", "\ufffd"]
    assert [bytes(entry.bytes or []) for entry in content] == VOCABULARY[:3]
    assert [entry.logprob for entry in content] == [-0.5, -1e-9, -9999.0]
    assert [(top.token, top.logprob) for top in content[2].top_logprobs] == [("\ufffd", -9999.0), ("", -3.0)]


def test_tokens_can_be_named_by_id() -> None:
    names = TokenNames(VOCABULARY.__getitem__, as_ids=True)
    entries = json.loads(b"[" + names.chat_entries([2], [(-1.0, [(1, -2.0)])]) + b"]")
    assert (entries[0]["token"], entries[0]["top_logprobs"][0]["token"]) == ("token_id:2", "token_id:1")


def test_completion_events_are_valid() -> None:
    enc = CompletionStreamEncoder("ab12", 1, "m", include_usage=True)
    legacy = LegacyLogprobs(NAMES, offset=4)
    events = [
        enc.content(encode.escape("a\u2028b")),
        enc.content_logprobs(b"x", legacy.piece(TOKENS[:1], LOGPROBS[:1])),
        enc.content_logprobs(b"y", legacy.piece(TOKENS[1:], LOGPROBS[1:])),
        enc.choice(3).finish("length", MOVED),
        enc.usage(USAGE),
    ]
    completions = [as_completion(event[6:]) for event in events]
    for event in events:
        strict(responses.Completion, event[6:])
    assert {c.id for c in completions} == {"cmpl-ab12"}
    assert completions[0].choices[0].text == "a\u2028b"
    logprobs = [c.choices[0].logprobs for c in completions[1:3]]
    assert logprobs[0]
    assert logprobs[1]
    assert (logprobs[0].text_offset, logprobs[1].text_offset) == ([4], [9, 15])
    assert logprobs[1].tokens == [" wörld", "bytes:\\xe2\\x80"]
    assert logprobs[1].token_logprobs == [-1e-9, -9999.0]
    assert logprobs[0].top_logprobs == [{"Hello": -0.5, " wörld": -1.25}]
    assert logprobs[1].top_logprobs
    assert logprobs[1].top_logprobs[0] == {" wörld": -1e-9}
    assert (completions[3].choices[0].index, completions[3].choices[0].finish_reason) == (3, "length")


def test_legacy_logprobs_without_alternatives() -> None:
    piece = json.loads(LegacyLogprobs(NAMES, alternatives=False).piece([0], [(-1.0, [])]))
    assert piece == {"tokens": ["Hello"], "token_logprobs": [-1.0], "top_logprobs": None, "text_offset": [0]}


def test_tokens_whose_worker_does_not_tell_have_no_entry_in_chat_and_null_in_the_legacy_form() -> None:
    logprobs = [LOGPROBS[0], NO_LOGPROB, LOGPROBS[2]]
    entries = msgspec.json.decode(b"[%b]" % NAMES.chat_entries(TOKENS, logprobs))
    assert [entry["token"] for entry in entries] == ["Hello", "\ufffd"]
    piece = LegacyLogprobs(NAMES).piece(TOKENS, logprobs)
    assert strict(responses.CompletionLogprobs, piece) is None
    read = json.loads(piece)
    assert read["token_logprobs"] == [-0.5, None, -9999.0]
    assert read["top_logprobs"][1] is None
    assert read["text_offset"] == [0, 5, 11]


def test_whole_chat_completion() -> None:
    call = ToolCall("call_1", ToolCallFunction("f", '{"a": 1}'))
    body = encode.chat_completion(
        "ab12",
        1,
        "m",
        [
            ChatChoice(0, 'é "x"', "stop", "hm", (), NAMES.chat_entries(TOKENS, LOGPROBS), MOVED),
            ChatChoice(1, "", "tool_calls", tool_calls=(call,)),
            ChatChoice(2, "", "stop"),
        ],
        USAGE,
        fingerprint="fp",
    )
    strict(responses.ChatCompletion, body)
    answer = ChatCompletion.model_validate_json(body, strict=True)
    assert (answer.id, answer.system_fingerprint) == ("chatcmpl-ab12", "fp")
    assert [choice.message.content for choice in answer.choices] == ['é "x"', None, ""]
    assert answer.choices[0].message.model_extra == {"reasoning_content": "hm"}
    calls = answer.choices[1].message.tool_calls or []
    assert calls[0].type == "function"
    assert calls[0].function.arguments == '{"a": 1}'
    assert answer.choices[0].logprobs
    assert len(answer.choices[0].logprobs.content or []) == 3
    assert json.loads(body)["holdfast"]["attempts"] == 2


def test_whole_completion() -> None:
    logprobs = LegacyLogprobs(NAMES).piece(TOKENS, LOGPROBS)
    body = encode.completion(
        "ab12", 1, "m", [TextChoice(0, "a", "stop", logprobs), TextChoice(1, "b", "length")], USAGE
    )
    strict(responses.Completion, body)
    answer = as_completion(body)
    assert [choice.text for choice in answer.choices] == ["a", "b"]
    assert json.loads(body)["holdfast"] == {"attempts": 1, "join": "none", "migrations": []}


def test_weakest_join_of_all_choices_is_reported() -> None:
    declared = Continuity(3, "declared", (Migration("worker_stalled", 1), Migration("disconnected", 9)))
    merged = encode.merged([(0, MOVED), (1, encode.UNDISTURBED), (2, declared)])
    assert (merged.attempts, merged.join) == (3, "declared")
    assert [(m.cause, m.choice) for m in merged.migrations] == [
        ("disconnected", 0), ("worker_stalled", 2), ("disconnected", 2),
    ]  # fmt: skip


def test_content_is_prefix_fragment_suffix() -> None:
    enc = ChatStreamEncoder("1", 1, "m", index=7)
    joined = enc.content_prefix + b"a" + b"b" + enc.content_suffix
    assert joined == enc.content(b"ab")
    assert as_chat_chunk(joined).choices[0].index == 7


@given(st.text(), st.text(min_size=1), st.text())
def test_any_text_survives(content: str, model: str, name: str) -> None:
    """Text, model name and tool name come out of the client's parser as they went in."""
    content, model, name = (s.encode(errors="replace").decode() for s in (content, model, name))
    enc = ChatStreamEncoder("1", 1, model)
    chunk = as_chat_chunk(enc.content(encode.escape(content)))
    assert (chunk.choices[0].delta.content, chunk.model) == (content, model)
    called = as_chat_chunk(enc.tool_call(0, name, name, encode.escape(content))).choices[0].delta.tool_calls
    assert called
    assert called[0].function
    assert (called[0].id, called[0].function.name, called[0].function.arguments) == (name, name, content)
    text = as_completion(CompletionStreamEncoder("1", 1, model).content(encode.escape(content))[6:])
    assert text.choices[0].text == content
    assert json.loads(encode.chat_completion("1", 1, model, [ChatChoice(0, content, "stop")], USAGE))["model"] == model


@given(st.lists(st.text(), max_size=5))
def test_fragments_can_be_joined(parts: list[str]) -> None:
    parts = [part.encode(errors="replace").decode() for part in parts]
    assert b"".join(map(encode.escape, parts)) == encode.escape("".join(parts))


@given(st.binary(max_size=8), st.floats(max_value=0))
def test_any_token_can_be_named(raw: bytes, logprob: float) -> None:
    names = TokenNames([raw].__getitem__)
    entry = json.loads(names.chat_entries([0], [(logprob, [(0, logprob)])]))
    assert bytes(entry["bytes"]) == raw
    legacy = json.loads(LegacyLogprobs(names).piece([0], [(logprob, [(0, logprob)])]))
    assert list(legacy["top_logprobs"][0]) == legacy["tokens"]


def card(name: str, *aliases: str) -> ModelCard:
    artifact = Artifact("0" * 64, 1)
    return ModelCard(name, artifact, artifact, 2048, (0,), 100, 16, aliases=aliases)


def test_models() -> None:
    listed = json.loads(encode.models_list([(card("b", "alias"), 5), (card("a"), 6), (card("a"), 6)]))
    assert listed["object"] == "list"
    models = [Model.model_validate(model, strict=True) for model in listed["data"]]
    assert [(model.id, model.created) for model in models] == [("a", 6), ("alias", 5), ("b", 5)]
    one = json.loads(encode.model_object(card("b", "alias"), 5, "alias"))
    assert (one["id"], one["root"], one["max_model_len"]) == ("alias", "b", 2048)
