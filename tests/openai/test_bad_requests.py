"""Every mistake a client can make gets a sentence, and the name of the field that it is about."""

import json
from typing import Any

import pytest

from holdfast.base.errors import InvalidRequest, UnsupportedFeature
from holdfast.openai.parse import parse_chat, parse_completion

USER = {"role": "user", "content": "SECRET"}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
NAMED = {"type": "function", "function": {"name": "g"}}


def chat(**fields: Any) -> bytes:
    return json.dumps({"model": "m", "messages": [USER], **fields}).encode()


def text(**fields: Any) -> bytes:
    return json.dumps({"model": "m", "prompt": "SECRET", **fields}).encode()


# body, param, part of the message
BAD_CHAT: list[tuple[bytes, str | None, str]] = [
    (b"", None, "empty; send a JSON object"),
    (b"  \n ", None, "empty"),
    (b"{", None, "line 1, column 2: it ends too early"),
    (b'{"model": "m",\n "messages": [}', None, "line 2, column 15"),
    (b'{"model": "m",}', None, "trailing comma"),
    (b"{'model': 'm'}", None, "line 1, column 2"),
    (b'{"model": NaN}', None, "not valid JSON"),
    (b"\xef\xbb\xbf{}", None, "byte order mark"),
    (chat() + b" x", None, "trailing characters"),
    (b'{"model":"m\xff","messages":[]}', None, "not valid UTF-8 at line 1, column 12"),
    (b'{"model":"m","messages":[{"role":"user","content":"\\ud800"}]}', None, "not valid JSON at line 1"),
    (b'{"model":"m","messages":[{"role":"user","content":"a\nb"}]}', None, "not valid JSON"),
    (b"[]", None, "must be a JSON object"),
    (b"null", None, "must be a JSON object"),
    (b'"hello"', None, "must be a JSON object"),
    (b"{}", "model", "'model' is required."),
    (b'{"model":"m"}', "messages", "'messages' is required. Send a list such as"),
    (b'{"messages":[]}', "messages", "at least 1"),
    (b'{"model":"m","message":[]}', "message", "did you mean 'messages'?"),
    (b'{"model":"m","prompt":"x"}', "prompt", "belongs to /v1/completions"),
    (b'{"model":"m","input":"x"}', "input", "belongs to /v1/responses"),
    (chat(model=""), "model", "at least 1 characters"),
    (chat(model=None), "model", "must be a string, not null"),
    (chat(model=5), "model", "must be a string, not an integer"),
    (chat(messages="hi"), "messages", "must be a list, not a string"),
    (chat(messages=[]), "messages", "at least 1 entries"),
    (chat(messages=["hi"]), "messages[0]", "must be an object, not a string"),
    (chat(messages=[{"content": "x"}]), "messages[0].role", "is required"),
    (
        chat(messages=[{"role": "usr", "content": "x"}]),
        "messages[0].role",
        "'assistant', 'tool' or 'function', not 'usr'",
    ),
    (chat(messages=[{"role": 3, "content": "x"}]), "messages[0].role", "must be 'developer'"),
    (chat(messages=[USER, {"role": "user"}]), "messages[1].content", "is required"),
    (chat(messages=[{"role": "user", "content": 3}]), "messages[0].content", "a string or a list, not an integer"),
    (chat(messages=[{"role": "user", "content": None}]), "messages[0].content", "not null"),
    (chat(messages=[{"role": "user", "content": []}]), "messages[0].content", "is an empty list"),
    (chat(messages=[{"role": "user", "content": ["x"]}]), "messages[0].content[0]", "must be an object"),
    (chat(messages=[{"role": "user", "content": [{"type": "txt"}]}]), "messages[0].content[0].type", "not 'txt'"),
    (chat(messages=[{"role": "user", "content": [{"type": "text"}]}]), "messages[0].content[0].text", "is required"),
    (chat(messages=[{"role": "assistant"}]), "messages[0].content", "required when an assistant message has no"),
    (chat(messages=[{"role": "tool", "content": "x"}]), "messages[0].tool_call_id", "is required"),
    (
        chat(messages=[{"role": "assistant", "tool_calls": [{"id": "1"}]}]),
        "messages[0].tool_calls[0].function",
        "required",
    ),
    (chat(temperature=2.5), "temperature", "at most 2, not 2.5"),
    (chat(temperature=-1), "temperature", "at least 0, not -1"),
    (chat(temperature="0.5"), "temperature", "must be a number, not a string"),
    (chat(temperature=True), "temperature", "must be a number, not a boolean"),
    (b'{"model":"m","messages":[{"role":"user","content":"x"}],"temperature":1e999}', "temperature", "too large"),
    (chat(top_p=1.5), "top_p", "at most 1, not 1.5"),
    (chat(top_k=-2), "top_k", "at least -1, not -2"),
    (chat(top_k=1.5), "top_k", "must be an integer, not a number with a fraction"),
    (chat(min_p=2), "min_p", "at most 1"),
    (chat(repetition_penalty=0), "repetition_penalty", "greater than 0, not 0"),
    (chat(presence_penalty=3), "presence_penalty", "at most 2"),
    (chat(frequency_penalty=-3), "frequency_penalty", "at least -2"),
    (chat(n=0), "n", "at least 1, not 0"),
    (chat(n=129), "n", "at most 128, not 129"),
    (chat(n=True), "n", "must be an integer, not a boolean"),
    (chat(max_tokens=0), "max_tokens", "at least 1, not 0. Leave it out"),
    (chat(max_completion_tokens=-5), "max_completion_tokens", "at least 1, not -5"),
    (chat(max_tokens=5, max_completion_tokens=6), "max_tokens", "contradict each other"),
    (chat(max_tokens=5, min_tokens=6), "min_tokens", "(6) is over the most tokens allowed (5)"),
    (chat(seed=2**63), "seed", "at most 9223372036854775807"),
    (chat(seed=10**40), "seed", "must be at most 9223372036854775807."),
    (chat(seed=10**4000), "seed", "at most 9223372036854775807."),
    (chat()[:-1] + b',"seed":' + b"9" * 5000 + b"}", "seed", "too large a number"),
    (b'{"model":"m","temperature":3, "x": }', "temperature", "at most 2."),
    (chat(stop=[""]), "stop", "empty string"),
    (chat(stop=""), "stop", "empty string"),
    (chat(stop=[1]), "stop[0]", "must be a string"),
    (chat(stop=["x"] * 17), "stop", "at most 16 entries"),
    (chat(stop="x" * 1025), "stop", "at most 1024 characters"),
    (chat(logit_bias={"a": 1}), "logit_bias", "Each key of 'logit_bias' must be an integer"),
    (chat(logit_bias={"-1": 1}), "logit_bias", "Each key of 'logit_bias' must be at least 0"),
    (chat(logit_bias={"1": 101}), "logit_bias", "Each value of 'logit_bias' must be at most 100"),
    (chat(logit_bias={"1": "x"}), "logit_bias", "Each value of 'logit_bias' must be a number"),
    (chat(logit_bias={str(i): 1 for i in range(1025)}), "logit_bias", "at most 1024 entries"),
    (chat(logprobs=3), "logprobs", "In chat it is a boolean"),
    (chat(top_logprobs=3), "top_logprobs", "needs 'logprobs': true"),
    (chat(logprobs=False, top_logprobs=3), "top_logprobs", "needs 'logprobs': true"),
    (chat(logprobs=True, top_logprobs=21), "top_logprobs", "at most 20"),
    (chat(stream="yes"), "stream", "must be true or false, not a string"),
    (chat(stream_options={"include_usage": True}), "stream_options", "needs 'stream': true"),
    (chat(stream=True, stream_options=[]), "stream_options", "must be an object, not a list"),
    (chat(response_format="json"), "response_format", "must be an object, not a string. Write"),
    (chat(response_format={"type": "xml"}), "response_format.type", "'json_object' or 'json_schema', not 'xml'"),
    (chat(response_format={"type": "json_schema"}), "response_format.json_schema", "is required"),
    (chat(response_format={"type": "json_schema", "json_schema": {}}), "response_format.json_schema.name", "required"),
    (chat(tools={}), "tools", "must be a list, not an object"),
    (chat(tools=[{"function": {"name": "f"}}]), "tools[0].type", "is required. Write"),
    (chat(tools=[{"type": "function"}]), "tools[0].function", "is required"),
    (chat(tools=[{"type": "function", "function": {"name": ""}}]), "tools[0].function.name", "at least 1"),
    (chat(tools=[{"type": "function", "function": {"name": "a b"}}]), "tools[0].function.name", "letters, digits"),
    (chat(tools=[TOOL, TOOL]), "tools[1].function.name", "two functions of one name"),
    (chat(tool_choice="required"), "tool_choice", "needs 'tools'"),
    (chat(tool_choice="maybe"), "tool_choice", "'none', 'auto', 'required' or an object"),
    (chat(tools=[TOOL], tool_choice=NAMED), "tool_choice.function.name", "not in 'tools'"),
    (
        chat(tools=[TOOL], tool_choice={"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": [NAMED]}}),
        "tool_choice.allowed_tools.tools",
        "not in 'tools'",
    ),
    (chat(chat_template_kwargs={}, chat_template_args={}), "chat_template_args", "mean the same"),
    (chat(stop_token_ids=[-1]), "stop_token_ids[0]", "at least 0, not -1"),
    (chat(ignore_eos="no"), "ignore_eos", "true or false"),
    (chat(guided_choice=[]), "guided_choice", "at least 1 entries"),
    (chat(priority=2**40), "priority", "at most 2147483647"),
    (chat(nvext={"token_data": []}), "nvext.token_data", "is empty"),
    (chat(nvext={"token_data": ["x"]}), "nvext.token_data[0]", "must be an integer"),
    (chat(nvext={"agent_hints": {"priority": "high"}}), "nvext.agent_hints.priority", "must be an integer"),
    (chat(max_token=5), "max_token", "did you mean 'max_tokens'?"),
    (chat(maxTokens=5), "maxTokens", "did you mean 'max_tokens'?"),
    (chat(temprature=1), "temprature", "did you mean 'temperature'?"),
    (chat(Temperature=1), "Temperature", "did you mean 'temperature'?"),
    (chat(**{"top-p": 1}), "top-p", "did you mean 'top_p'?"),
    (chat(streams=True), "streams", "did you mean 'stream'?"),
    (chat(presence_penality=1), "presence_penality", "did you mean 'presence_penalty'?"),
    (chat(response_fromat={}), "response_fromat", "did you mean 'response_format'?"),
    (chat(echo=True), "echo", "belongs to /v1/completions"),
    (chat(**{f"zzzz{i:04}": 1 for i in range(70)}), None, "over 64 unknown fields"),
    (chat()[:-1] + b',"x":' + b"[" * 100_000 + b"]" * 100_000 + b"}", None, "nested too deeply"),
]

BAD_TEXT: list[tuple[bytes, str | None, str]] = [
    (b'{"model":"m"}', "prompt", "'prompt' is required."),
    (b'{"model":"m","messages":[]}', "messages", "belongs to /v1/chat/completions"),
    (text(prompt=None), "prompt", "must be a string or a list, not null"),
    (text(prompt=[]), "prompt", "is an empty list"),
    (text(prompt=["a", 1]), "prompt", "mixes"),
    (text(prompt=[1, [2]]), "prompt", "mixes"),
    (text(prompt=[[]]), "prompt", "empty list of token ids"),
    (text(prompt=[-1]), "prompt[0]", "at least 0, not -1"),
    (text(prompt=[2**32]), "prompt[0]", "at most 4294967295"),
    (text(prompt=[1.5]), "prompt[0]", "not a number with a fraction"),
    (text(prompt=[True]), "prompt[0]", "not a boolean"),
    (text(prompt=["a"] * 65, n=2), "prompt", "65 prompts with n=2 make 130 choices; the limit is 128"),
    (text(logprobs=True), "logprobs", "must be an integer, not a boolean"),
    (text(logprobs=21), "logprobs", "at most 20, not 21"),
    (text(best_of=1, n=2), "best_of", "must be at least 'n' (2)"),
    (text(max_tokens=0), "max_tokens", "at least 1"),
    (text(max_completion_tokens=5), "max_completion_tokens", "use 'max_tokens' here"),
    (text(top_logprobs=5), "top_logprobs", "here 'logprobs' is the count"),
    (text(promt="x"), "promt", "did you mean 'prompt'?"),
]

UNSUPPORTED: list[tuple[bytes, str]] = [
    (chat(functions=[{}]), "functions"),
    (chat(function_call="auto"), "function_call"),
    (chat(modalities=["text", "audio"]), "modalities"),
    (chat(web_search_options={}), "web_search_options"),
    (chat(use_beam_search=True), "use_beam_search"),
    (chat(prompt_logprobs=1), "prompt_logprobs"),
    (chat(bad_words=["x"]), "bad_words"),
    (chat(tools=[{"type": "custom", "custom": {"name": "x"}}]), "tools[0].type"),
    (chat(tools=[TOOL], tool_choice={"type": "custom", "custom": {"name": "x"}}), "tool_choice.type"),
    (chat(nvext={"max_thinking_tokens": 5}), "nvext.max_thinking_tokens"),
    (chat(nvext={"annotations": ["query_instance_id"]}), "nvext.annotations[0]"),
    (chat(stream=True, stream_options={"continuous_usage_stats": True}), "stream_options.continuous_usage_stats"),
    (text(suffix="end"), "suffix"),
    (text(best_of=3, n=2), "best_of"),
    (text(echo=True, logprobs=1), "echo"),
]


def parse(body: bytes) -> Any:
    return parse_completion(body) if b'"prompt"' in body and b"messages" not in body else parse_chat(body)


@pytest.mark.parametrize(("body", "param", "part"), BAD_CHAT, ids=range(len(BAD_CHAT)))
def test_bad_chat_requests(body: bytes, param: str | None, part: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        parse_chat(body)
    assert (caught.value.param, part in caught.value.message, caught.value.message) == (
        param,
        True,
        caught.value.message,
    )
    assert "SECRET" not in caught.value.message


@pytest.mark.parametrize(("body", "param", "part"), BAD_TEXT, ids=range(len(BAD_TEXT)))
def test_bad_completion_requests(body: bytes, param: str | None, part: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        parse_completion(body)
    assert (caught.value.param, part in caught.value.message, caught.value.message) == (
        param,
        True,
        caught.value.message,
    )


@pytest.mark.parametrize(("body", "param"), UNSUPPORTED, ids=[param for _, param in UNSUPPORTED])
def test_options_that_would_change_the_answer_are_refused(body: bytes, param: str) -> None:
    with pytest.raises(UnsupportedFeature) as caught:
        parse(body)
    assert caught.value.param == param
    assert caught.value.status == 400


NULLABLE = (
    "temperature top_p n stop seed max_tokens logprobs tools tool_choice response_format stream stream_options "
    "logit_bias nvext guided_json top_logprobs min_tokens"
)
GOOD_CHAT: list[dict[str, Any]] = [
    {},
    {"foo": {"bar": [1]}, "x_custom": 1},
    {"user": "u", "metadata": {"a": "b"}, "store": True, "service_tier": "auto", "safety_identifier": "x"},
    {"prompt_cache_key": "k", "prompt_cache_retention": "24h", "verbosity": "low", "prediction": {"type": "content"}},
    {"functions": None, "function_call": None, "modalities": ["text"], "use_beam_search": False, "length_penalty": 1.0},
    dict.fromkeys(NULLABLE.split()),
    {"stream": True, "stream_options": {"include_usage": True, "include_obfuscation": False}},
    {"tools": [], "tool_choice": "auto"},
    {"max_tokens": 5, "max_completion_tokens": 5, "min_tokens": 5},
    {"temperature": 0, "top_p": 0, "top_k": -1, "n": 128, "seed": -(2**63), "stop": ["a"] * 16},
    {"logit_bias": {"50256": -100, "0": 100}},
]  # fmt: skip


@pytest.mark.parametrize("fields", GOOD_CHAT, ids=range(len(GOOD_CHAT)))
def test_what_openai_accepts_is_accepted(fields: dict[str, Any]) -> None:
    assert parse_chat(chat(**fields)).model == "m"


def test_all_roles_and_parts_are_read() -> None:
    request = parse_chat(
        chat(
            messages=[
                {"role": "developer", "content": "a", "name": "d"},
                {"role": "system", "content": [{"type": "text", "text": "b"}]},
                {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://x", "detail": "low"}}]},
                {"role": "user", "content": [{"type": "input_audio", "input_audio": {"data": "", "format": "wav"}}]},
                {"role": "user", "content": [{"type": "file", "file": {"file_id": "1"}}]},
                {"role": "assistant", "content": None, "tool_calls": [
                    {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}]},
                {"role": "assistant", "content": [{"type": "refusal", "refusal": "no"}], "annotations": []},
                {"role": "tool", "content": "r", "tool_call_id": "1"},
                {"role": "function", "content": "r", "name": "f"},
            ]
        )
    )  # fmt: skip
    assert len(request.messages) == 9


@pytest.mark.parametrize("prompt", ["x", "", ["x", "y"], [1, 2], [[1], [2, 3]]])
def test_all_kinds_of_prompt_are_read(prompt: Any) -> None:
    assert parse_completion(text(prompt=prompt, echo=True, best_of=1, suffix="")).prompt == prompt


def test_a_hostile_number_of_unknown_fields_is_refused_quickly() -> None:
    body = chat(**{f"field_number_{i}": 1 for i in range(20_000)})
    with pytest.raises(InvalidRequest, match="over 64 unknown fields"):
        parse_chat(body)
