"""Structured output: valid, deterministic, exact over a continuation."""

import json

import jsonschema
import pytest

from holdfast.base.errors import InvalidRequest, UnsupportedFeature
from holdfast.engines.contract import Guided
from holdfast.engines.mock.checker import expected_tokens, text_of
from holdfast.engines.mock.vocabulary import vocabulary
from tests.engines.mock.mockrun import request, running

SCHEMAS = [
    {"type": "object", "properties": {"name": {"type": "string"}, "age": {"type": "integer", "minimum": 3, "maximum": 9}}, "required": ["name", "age"], "additionalProperties": False},  # noqa: E501
    {"type": "array", "items": {"type": "number", "exclusiveMinimum": 0, "maximum": 5}, "minItems": 2, "maxItems": 4},
    {"anyOf": [{"type": "string", "maxLength": 5}, {"type": "null"}]},
    {"$defs": {"node": {"type": "object", "properties": {"value": {"type": "integer"}, "next": {"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]}}, "required": ["value", "next"]}}, "$ref": "#/$defs/node"},  # noqa: E501
    {"enum": ["a", 1, None]},
    {"const": {"x": [1, 2]}},
    {"type": "object", "properties": {"when": {"type": "string", "format": "date-time"}, "tags": {"type": "array", "items": {"enum": ["x", "y", "z"]}, "uniqueItems": True, "minItems": 2}}, "required": ["when", "tags"]},  # noqa: E501
    {"allOf": [{"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"]}, {"properties": {"b": {"type": "integer", "multipleOf": 5}}, "required": ["b"]}]},  # noqa: E501
    {"type": ["string", "null"], "minLength": 3},
    {"type": "object", "minProperties": 2, "additionalProperties": {"type": "integer"}},
    {"type": "object", "properties": {"a": {"type": "array", "prefixItems": [{"type": "string"}, {"type": "integer"}], "items": False, "minItems": 2}}, "required": ["a"]},  # noqa: E501
]  # fmt: skip


def guided(kind, value=""):
    return Guided(kind, value if isinstance(value, str) else json.dumps(value))


def output(wanted):
    tokens = expected_tokens(wanted)
    assert tokens[-1] == vocabulary().eos_id
    return text_of(tokens[:-1])


@pytest.mark.parametrize("schema", SCHEMAS)
@pytest.mark.parametrize("seed", range(8))
def test_output_is_valid_for_the_schema(schema, seed):
    text = output(request(guided=guided("json_schema", schema), seed=seed, max_tokens=4000))
    jsonschema.validate(json.loads(text), schema, format_checker=jsonschema.FormatChecker())


def test_seed_and_prompt_decide():
    def one(text, **kw):
        return output(request(text, guided=guided("json_object"), max_tokens=4000, **kw))

    assert isinstance(json.loads(one("a", seed=1)), dict)
    assert one("a", seed=1) == one("a", seed=1)
    assert one("a", seed=1) != one("a", seed=2)
    assert one("a", seed=1) != one("b", seed=1)
    assert one("a", seed=1, temperature=0) == one("a", seed=2, temperature=0)


def test_choice():
    found = {output(request(guided=guided("choice", ["yes", "no"]), seed=s)) for s in range(20)}
    assert found == {"yes", "no"}


async def test_engine_and_continuation_are_exact():
    wanted = request(guided=guided("json_schema", SCHEMAS[0]), max_tokens=4000)
    whole = expected_tokens(wanted)
    async with running() as run:
        assert await run.finish(run.submit(wanted)) == whole
        cut = len(whole) // 2
        rest = run.submit(request(guided=guided("json_schema", SCHEMAS[0]), max_tokens=4000, generated=whole[:cut]))
        assert whole[:cut] + await run.finish(rest) == whole


@pytest.mark.parametrize(
    ("constraint", "error"),
    [
        (guided("regex", "a+"), UnsupportedFeature),
        (guided("grammar", "root ::= x"), UnsupportedFeature),
        (guided("json_schema", {"type": "string", "pattern": "a+"}), UnsupportedFeature),
        (guided("json_schema", "{"), InvalidRequest),
        (guided("json_schema", {"type": "integer", "minimum": 5, "maximum": 4}), InvalidRequest),
        (guided("json_schema", {"$ref": "#/nowhere"}), InvalidRequest),
        (guided("json_schema", {"type": "string", "allOf": [{"$ref": "#"}]}), InvalidRequest),
        (
            guided("json_schema", {"type": "object", "properties": {"a": {"$ref": "#"}}, "required": ["a"]}),
            UnsupportedFeature,
        ),
        (guided("choice", []), InvalidRequest),
    ],
)
async def test_what_cannot_be_honoured_is_refused(constraint, error):
    async with running() as run:
        with pytest.raises(error):
            run.submit(request(guided=constraint))
