"""Requests become specs: defaults of the model, capabilities of the engine, constraints, tools, budgets."""

import json
from typing import Any

import jsonschema
import pytest

from holdfast.base.errors import ContextLengthExceeded, HoldfastError, InvalidRequest, UnsupportedFeature
from holdfast.engines.contract import Sampling
from holdfast.models.card import Artifact, ModelCard
from holdfast.openai.mapping import GenerationSpec, Steering, chat_spec, completion_spec, token_budget
from holdfast.openai.parse import parse_chat, parse_completion

ARTIFACT = Artifact("0" * 64, 1)
ABLE = ModelCard(
    "m", ARTIFACT, ARTIFACT, 100, (0,), 1000, 16,
    max_logprobs=5, logit_bias=True, penalties=True,
    guided=("json_object", "json_schema", "grammar", "regex", "choice"),
)  # fmt: skip
BARE = ModelCard("m", ARTIFACT, ARTIFACT, 100, (0,), 1000, 16)
F = {
    "type": "function",
    "function": {"name": "f", "parameters": {"type": "object", "properties": {"x": {"type": "integer"}}}},
}
G = {"type": "function", "function": {"name": "g", "description": "d"}}
SCHEMA = {"type": "object", "properties": {"b": {"type": "string"}, "a": {"type": "integer"}}}


def chat(
    card: ModelCard = ABLE, defaults: dict[str, Any] | None = None, *, steering: bool = True, **fields: Any
) -> GenerationSpec:
    body = json.dumps({"model": "m", "messages": [{"role": "user", "content": "hi"}], **fields}).encode()
    return chat_spec(parse_chat(body), card, defaults or {}, steering=steering)


def text(card: ModelCard = ABLE, **fields: Any) -> GenerationSpec:
    return completion_spec(parse_completion(json.dumps({"model": "m", "prompt": "hi", **fields}).encode()), card, {})


def test_silence_means_openais_defaults() -> None:
    spec = chat()
    assert spec.sampling == Sampling()
    assert (spec.n, spec.seed, spec.max_tokens, spec.stop, spec.skip_special_tokens) == (1, None, None, (), True)
    assert (spec.stream, spec.include_usage, spec.echo, spec.tools.mode) == (False, False, False, "none")


def test_the_model_speaks_where_the_client_is_silent() -> None:
    config = {"temperature": 0.6, "top_p": 0.9, "top_k": 20, "min_p": 0.1, "repetition_penalty": 1.1}
    sampling = chat(defaults=config).sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k) == (0.6, 0.9, 20)
    assert (sampling.min_p, sampling.repetition_penalty) == (0.1, 1.1)
    own = chat(defaults=config, temperature=1, top_p=1, top_k=0, min_p=0, repetition_penalty=1).sampling
    assert own == Sampling()


@pytest.mark.parametrize("odd", [None, "0.5", True, -3, float("nan"), 1e9])
def test_odd_generation_configs_do_not_count(odd: Any) -> None:
    config = dict.fromkeys(["temperature", "top_p", "min_p", "repetition_penalty"], odd)
    assert chat(defaults=config).sampling == Sampling()


def test_a_model_that_does_not_sample_is_greedy_unless_asked() -> None:
    assert chat(defaults={"do_sample": False, "temperature": 0.7}).sampling.temperature == 0
    assert chat(defaults={"do_sample": False}, temperature=0.5).sampling.temperature == 0.5
    assert chat(nvext={"greed_sampling": True}, temperature=0.5).sampling.temperature == 0


def test_a_models_default_that_the_engine_cannot_do_is_left_out() -> None:
    assert chat(BARE, {"repetition_penalty": 1.2}).sampling.repetition_penalty == 1.0


def test_every_sampling_field_arrives() -> None:
    spec = chat(
        temperature=0.5, top_p=0.8, top_k=-1, min_p=0.2, repetition_penalty=1.3, presence_penalty=1,
        frequency_penalty=-1,
        logit_bias={"5": -100}, seed=-1, n=3, stop="x", max_tokens=7, min_tokens=2, stop_token_ids=[4], ignore_eos=True,
        include_stop_str_in_output=True, skip_special_tokens=False, logprobs=True, top_logprobs=4, stream=True,
        stream_options={"include_usage": True}, return_tokens_as_token_ids=True, cache_salt="s",
    )  # fmt: skip
    sampling = spec.sampling_for(77)
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p) == (0.5, 0.8, 0, 0.2)
    assert (sampling.repetition_penalty, sampling.presence_penalty, sampling.frequency_penalty) == (1.3, 1, -1)
    assert (sampling.logit_bias, sampling.logprobs, sampling.seed) == ({5: -100}, 4, 77)
    assert (spec.seed, spec.n, spec.stop, spec.include_stop) == (2**64 - 1, 3, ("x",), True)
    assert (spec.skip_special_tokens, spec.stream, spec.include_usage, spec.tokens_as_ids) == (False, True, True, True)
    rules = spec.stop_rules(token_budget(spec, 10, 100))
    assert (rules.max_tokens, rules.min_tokens, rules.stop_token_ids, rules.ignore_eos) == (7, 2, (4,), True)
    assert spec.cache_salt == "s"


def test_top_p_of_zero_is_the_most_likely_token() -> None:
    sampling = chat(top_p=0, top_k=50).sampling
    assert (sampling.top_p, sampling.top_k) == (1.0, 1)


def test_logprobs_of_both_apis() -> None:
    assert chat(logprobs=True).sampling.logprobs == 0
    assert chat(logprobs=False).sampling.logprobs is None
    assert text(logprobs=3).sampling.logprobs == 3
    assert text(logprobs=0).sampling.logprobs == 0


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"logprobs": True}, "logprobs"),
        ({"logprobs": True, "top_logprobs": 2}, "top_logprobs"),
        ({"logit_bias": {"1": 1}}, "logit_bias"),
        ({"presence_penalty": 1}, "presence_penalty"),
        ({"frequency_penalty": 1}, "frequency_penalty"),
        ({"repetition_penalty": 2}, "repetition_penalty"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"guided_regex": "x"}, "guided_regex"),
        ({"tools": [F], "tool_choice": "required"}, "tool_choice"),
    ],
)
def test_what_the_engine_cannot_do_is_refused_by_name(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(UnsupportedFeature) as caught:
        chat(BARE, **fields)
    assert caught.value.param == param
    chat(ABLE, **fields)


def test_neutral_values_need_no_capability() -> None:
    chat(BARE, presence_penalty=0, frequency_penalty=0, repetition_penalty=1, logit_bias={}, logprobs=False)
    chat(BARE, response_format={"type": "text"}, tools=[F], tool_choice="auto")


def test_more_alternatives_than_the_engine_reports() -> None:
    with pytest.raises(UnsupportedFeature, match="'top_logprobs' is 6; this model's engine reports at most 5"):
        chat(logprobs=True, top_logprobs=6)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"logit_bias": {"1000": 1}}, "logit_bias"),
        ({"stop_token_ids": [5, 1000]}, "stop_token_ids"),
        ({"nvext": {"token_data": [1000]}}, "nvext.token_data"),
    ],
)
def test_token_ids_outside_the_vocabulary(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequest, match="1000; the model's vocabulary ends at 999") as caught:
        chat(**fields)
    assert caught.value.param == param


@pytest.mark.parametrize("prompt", [[1, 1000], [[1], [1000]]])
def test_prompt_ids_outside_the_vocabulary(prompt: Any) -> None:
    with pytest.raises(InvalidRequest, match="'prompt' holds the token id 1000"):
        text(prompt=prompt)


@pytest.mark.parametrize(
    ("fields", "kind", "value"),
    [
        ({"response_format": {"type": "json_object"}}, "json_object", None),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMA}}},
            "json_schema",
            SCHEMA,
        ),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "n"}}}, "json_object", None),
        ({"guided_json": SCHEMA}, "json_schema", SCHEMA),
        ({"guided_json": json.dumps(SCHEMA)}, "json_schema", SCHEMA),
        ({"guided_choice": ["a", "b"]}, "choice", ["a", "b"]),
        ({"structured_outputs": {"json": SCHEMA}}, "json_schema", SCHEMA),
        ({"structured_outputs": {"json_object": True}}, "json_object", None),
        ({"structured_outputs": {"choice": ["a"]}}, "choice", ["a"]),
    ],
)
def test_constraints(fields: dict[str, Any], kind: str, value: Any) -> None:
    guided = chat(**fields).sampling.guided
    assert guided is not None
    assert guided.kind == kind
    assert (json.loads(guided.value) if guided.value else None) == value
    if value is SCHEMA:
        assert list(json.loads(guided.value)["properties"]) == ["b", "a"], (
            "the order of properties is the order of output"
        )
    assert text(**fields).sampling.guided == guided


def test_texts_of_constraints_are_not_touched() -> None:
    for fields, value in (
        ({"guided_regex": "a+"}, "a+"),
        ({"guided_grammar": 'root ::= "a"'}, 'root ::= "a"'),
        ({"structured_outputs": {"regex": "b"}}, "b"),
    ):
        guided = chat(**fields).sampling.guided  # type: ignore[arg-type]
        assert guided
        assert guided.value == value


@pytest.mark.parametrize(
    ("fields", "error", "param"),
    [
        ({"guided_json": "{", }, InvalidRequest, "guided_json"),
        ({"guided_regex": "a", "guided_choice": ["a"]}, InvalidRequest, "guided_choice"),
        ({"response_format": {"type": "json_object"}, "guided_regex": "a"}, InvalidRequest, "guided_regex"),
        ({"structured_outputs": {"regex": "a", "choice": ["a"]}}, InvalidRequest, "structured_outputs.choice"),
        ({"guided_regex": "a", "tools": [F], "tool_choice": "required"}, InvalidRequest, "tool_choice"),
        ({"response_format": {"type": "json_object"}, "tools": [F]}, UnsupportedFeature, "response_format"),
    ],
)  # fmt: skip
def test_constraints_that_contradict(fields: dict[str, Any], error: type[HoldfastError], param: str) -> None:
    with pytest.raises(error) as caught:
        chat(**fields)
    assert caught.value.param == param


def test_json_with_tools_works_when_no_tool_may_be_called() -> None:
    spec = chat(tools=[F], tool_choice="none", response_format={"type": "json_object"})
    assert (spec.tools.mode, spec.tools.tools) == ("none", ())


def test_tools_as_the_template_sees_them() -> None:
    spec = chat(tools=[F, G], parallel_tool_calls=False)
    assert spec.tools.mode == "auto"
    assert list(spec.tools.tools) == [F, G]
    assert spec.tools.names == {"f", "g"}
    assert spec.tools.parallel is False


def test_required_call_of_any_tool() -> None:
    spec = chat(tools=[F, G], tool_choice="required")
    assert spec.tools.mode == "forced"
    assert spec.sampling.guided
    schema = json.loads(spec.sampling.guided.value)
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.validate({"name": "f", "arguments": {"x": 1}}, schema)
    jsonschema.validate({"name": "g", "arguments": {}}, schema)
    for wrong in (
        {"name": "h", "arguments": {}},
        {"name": "f", "arguments": {"x": "1"}},
        {"name": "f"},
        {"arguments": {}},
    ):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(wrong, schema)


def test_named_call_leaves_the_prompt_as_it_is() -> None:
    spec = chat(tools=[F, G], tool_choice={"type": "function", "function": {"name": "g"}})
    assert (spec.tools.mode, spec.tools.names, len(spec.tools.tools)) == ("forced", {"g"}, 2)
    assert spec.sampling.guided
    schema = json.loads(spec.sampling.guided.value)
    assert schema["properties"]["name"] == {"type": "string", "enum": ["g"]}


@pytest.mark.parametrize(("mode", "result"), [("auto", "auto"), ("required", "forced")])
def test_allowed_tools(mode: str, result: str) -> None:
    allowed = {"mode": mode, "tools": [{"type": "function", "function": {"name": "g"}}]}
    spec = chat(tools=[F, G], tool_choice={"type": "allowed_tools", "allowed_tools": allowed})
    assert (spec.tools.mode, list(spec.tools.tools), spec.tools.names) == (result, [G], {"g"})


def test_template_variables() -> None:
    spec = chat(reasoning_effort="low", chat_template_kwargs={"enable_thinking": False})
    assert spec.template_kwargs == {"reasoning_effort": "low", "enable_thinking": False}
    assert chat(chat_template_args={"a": 1}).template_kwargs == {"a": 1}


def test_nvext() -> None:
    spec = chat(
        priority=3,
        nvext={
            "use_raw_prompt": True, "token_data": [1, 2], "annotations": ["token_ids"], "extra_fields": ["timing"],
            "backend_instance_id": 255, "prefill_worker_id": "abc", "cache_salt": "s", "router": {"temperature": 0.5},
            "agent_hints": {"priority": 9, "strict_priority": 2, "osl": 50}, "session_control": {"session_id": "S"},
        },
    )  # fmt: skip
    assert (spec.raw_prompt, spec.prompt_ids, spec.annotations, spec.extra_fields) == (
        True, (1, 2), ("token_ids",), ("timing",),
    )  # fmt: skip
    assert spec.cache_salt == "s"
    assert spec.steering == Steering(
        priority=3, strict_priority=2, worker="00000000000000ff", prefill_worker="abc", expected_output_tokens=50,
        session_id="S", router={"temperature": 0.5},
    )  # fmt: skip
    assert chat(nvext={"agent_hints": {"priority": 9}}).steering.priority == 9


def test_steering_can_be_switched_off() -> None:
    spec = chat(steering=False, priority=3, nvext={"backend_instance_id": "x", "agent_hints": {"strict_priority": 1}})
    assert spec.steering == Steering()


def test_echo() -> None:
    assert text(echo=True).echo
    assert not text().echo


def test_budget() -> None:
    assert token_budget(chat(), 60, 100) == 40
    assert token_budget(chat(max_tokens=40), 60, 100) == 40
    assert token_budget(chat(max_tokens=9, max_completion_tokens=9), 60, 100) == 9
    with pytest.raises(ContextLengthExceeded, match=r"60 tokens and max_tokens is 41.*of 100 by 1\.") as caught:
        token_budget(chat(max_tokens=41), 60, 100)
    assert (caught.value.param, caught.value.details) == ("max_tokens", {"limit": 100, "actual": 101})
    with pytest.raises(ContextLengthExceeded, match="prompt has 100 tokens") as caught:
        token_budget(text(), 100, 100, param="prompt")
    assert caught.value.param == "prompt"


def test_least_tokens_never_exceed_what_fits() -> None:
    spec = chat(min_tokens=90)
    assert spec.stop_rules(token_budget(spec, 60, 100)).min_tokens == 40
