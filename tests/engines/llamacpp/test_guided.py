"""Structured output is valid, ends, and continues exactly."""

import json
import random
import re

import jsonschema
import numpy as np
import pytest

from holdfast.base.errors import InvalidRequest, UnsupportedFeature
from holdfast.engines.contract import Guided, Sampling, StopRules
from holdfast.engines.llamacpp.grammar import constraint_to_gbnf, schema_to_gbnf
from holdfast.engines.llamacpp.guided import GrammarState
from holdfast.engines.llamacpp.ranges import integer_range
from holdfast.engines.llamacpp.sampler import TokenSampler
from tests.engines.llamacpp.harness import request

pytestmark = [pytest.mark.llamacpp, pytest.mark.asyncio(loop_scope="package")]

PERSON = {
    "title": "Person",
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 1, "maxLength": 12},
        "age": {"type": "integer"},
        "height": {"type": ["number", "null"]},
        "email": {"type": "string", "pattern": r"^[a-z]{2,8}@[a-z]{2,8}\.(com|org)$"},
        "tags": {"type": "array", "items": {"enum": ["a", "b", 'c"d']}, "minItems": 1, "maxItems": 3},
        "pet": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/pet"}]},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
    "$defs": {
        "pet": {
            "type": "object",
            "properties": {"kind": {"const": "cat"}, "child": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/pet"}]}},
            "required": ["kind", "child"],
            "additionalProperties": False,
        }
    },
}


def admits(model, gbnf, text):
    """Tell whether the grammar accepts exactly this text, walking llama.cpp's own tokens of it."""
    state = GrammarState(model, gbnf)
    try:
        for token in model.tokenize(text, parse_special=False):
            if state.first_allowed(np.array([token])) is None:
                return False
            state.accept(token)
        return state.first_allowed(np.array(model.end_ids)) is not None
    finally:
        state.close()


@pytest.fixture
def model(run):
    return run.engine._core.model


@pytest.mark.parametrize(
    ("schema", "good", "bad"),
    [
        ({"type": "string"}, ['""', '"a b"', '"\\u00e9\\n"', '"ż🎉"'], ["a", '"a', '"\n"', '"\\x"', '"\\ud800"']),
        ({"type": "string", "minLength": 2, "maxLength": 3}, ['"ab"', '"żół"', '"a\\nb"'], ['"a"', '"abcd"']),
        ({"type": "integer"}, ["0", "-17", "900"], ["01", "1.5", "", "-", "+1"]),
        ({"type": "integer", "minimum": 3, "exclusiveMaximum": 120}, ["3", "99", "119"], ["2", "120", "03", "-3"]),
        ({"type": "integer", "exclusiveMinimum": 0}, ["1", "12345"], ["0", "-1", "01"]),
        ({"type": "integer", "maximum": -7}, ["-7", "-10", "-99999"], ["-6", "0", "7", "-07"]),
        ({"type": "number"}, ["0", "-1.5", "2e10", "1.25E-3"], [".5", "1.", "0x1", "NaN"]),
        ({"type": "boolean"}, ["true", "false"], ["True", "1", "truefalse"]),
        ({"enum": ["x", 1, None, "a\"b"]}, ['"x"', "1", "null", '"a\\"b"'], ["x", "2", '"y"']),
        ({"const": {"k": [1]}}, ['{"k":[1]}'], ["{}"]),
        ({"type": "array", "items": {"type": "null"}, "minItems": 1, "maxItems": 2}, ["[null]", "[null, null]"],
         ["[]", "[null,null,null]", "[null,]"]),
        ({"type": "array", "items": {"type": "integer"}}, ["[]", "[1]", "[1, 2,3]", "[\n  1\n]"], ["[1 2]", "[,1]"]),
        ({"type": "array", "prefixItems": [{"type": "null"}, {"type": "boolean"}], "items": False},
         ["[null, true]"], ["[null]", "[true, null]"]),
        ({"properties": {"a": {"type": "null"}, "b": {"type": "null"}, "c": {"type": "null"}}, "required": ["b"]},
         ['{"b":null}', '{"a": null, "b": null}', '{"b": null, "c": null}', '{"a":null,"b":null,"c":null}'],
         ["{}", '{"a":null}', '{"b":null,"a":null}', '{"b":null,}', '{,"b":null}']),
        ({"type": "object", "properties": {"a": {"type": "null"}}}, ["{}", '{"a":null}', "{ }"], ['{"b":null}']),
        ({"type": "object", "additionalProperties": {"type": "integer"}}, ["{}", '{"x":1,"y":2}'], ['{"x":"1"}']),
        ({"type": "string", "format": "date"}, ['"2024-12-31"'], ['"2024-13-01"', '"today"']),
        ({"type": "string", "pattern": "^a+\"$"}, ['"aa\\""'], ['"a"', '"aa""']),
        ({"type": "string", "pattern": "b"}, ['"abc"', '"b"'], ['"ac"', '""']),
        ({"oneOf": [{"type": "null"}, {"type": "boolean"}]}, ["null", "true"], ["0"]),
        (True, ['{"a":[1,{"b":null}]}', "3", '"x"'], ["{", "nul"]),
        ({"$ref": "#/definitions/n", "definitions": {"n": {"type": "null"}}}, ["null"], ["1"]),
    ],
)  # fmt: skip
async def test_schema_admits_what_it_should(model, schema, good, bad):
    gbnf = schema_to_gbnf(schema)
    assert [text for text in good if not admits(model, gbnf, text)] == []
    assert [text for text in bad if admits(model, gbnf, text)] == []
    for text in good:
        jsonschema.validate(json.loads(text), schema)


@pytest.mark.parametrize(
    ("schema", "keyword"),
    [
        ({"type": "integer", "minimum": 2.5}, "minimum"),
        ({"type": "number", "minimum": 3}, "minimum"),
        ({"type": "number", "multipleOf": 2}, "multipleOf"),
        ({"type": "array", "uniqueItems": True}, "uniqueItems"),
        ({"type": "array", "contains": {}}, "contains"),
        ({"type": "object", "patternProperties": {}}, "patternProperties"),
        ({"type": "object", "minProperties": 1}, "minProperties"),
        ({"type": "object", "properties": {"a": {"type": "string", "format": "ipv4"}}}, "ipv4"),
        ({"allOf": [{"type": "null"}, {"type": "null"}]}, "allOf"),
        ({"not": {"type": "null"}}, "not"),
        ({"if": {}, "then": {}}, "if"),
        ({"anyOf": [{"type": "null"}], "minLength": 2}, "minLength"),
        ({"$ref": "http://elsewhere/schema"}, "ref"),
        ({"type": "string", "pattern": "(?=a)b"}, "group"),
        ({"type": "string", "pattern": r"\bword"}, "b"),
        ({"type": "string", "maxLength": 100_000}, "100000"),
    ],
)
async def test_what_cannot_be_enforced_is_refused_by_name(schema, keyword):
    with pytest.raises(UnsupportedFeature, match=keyword):
        schema_to_gbnf(schema)


@pytest.mark.parametrize(
    "guided",
    [
        Guided("json_schema", "{not json"),
        Guided("json_schema", '{"type": "nonsense"}'),
        Guided("json_schema", '{"$ref": "#"}'),
        Guided("json_schema", '{"$ref": "#/$defs/missing"}'),
        Guided("json_schema", '{"type":"object","properties":{},"required":["a"],"additionalProperties":false}'),
        Guided("json_schema", '{"type":"string","minLength":3,"maxLength":2}'),
        Guided("json_schema", "[" * 70_000),
        Guided("json_schema", "[" * 20_000),
        Guided("grammar", ""),
        Guided("grammar", 'root ::= "a" ('),
        Guided("grammar", 'start ::= "a"'),
        Guided("grammar", 'root ::= root "a" | "a"'),
        Guided("grammar", f"root ::= {'(' * 100}'a'{')' * 100}"),
        Guided("regex", "a("),
        Guided("regex", "*a"),
        Guided("regex", "[z-a]"),
        Guided("regex", "[abc"),
        Guided("choice", "[]"),
        Guided("choice", '"yes"'),
    ],
)
async def test_malformed_constraints_are_the_callers_mistake(run, guided):
    with pytest.raises(InvalidRequest):
        run.submit(request(run.chat("Hi"), guided=guided))
    assert run.engine.load().waiting == 0


@pytest.mark.parametrize(
    "pattern",
    [
        r"abc", r"a|bc|", r"(ab)+c?", r"[^a-c\d]{2,3}", r"\w+@\w+\.(com|org)", r"^x.*y$", r"[\]\-^]+",
        r"a{3}b{0,2}c{2,}",
        r"(?:yes|no)(?P<mark>!)?", r"\x41\u00e9\.", r"\S+\s\D", r"[-a]+", r"a\$", r"é+",
    ],
)  # fmt: skip
async def test_regex_means_what_python_says(model, pattern):
    gbnf = constraint_to_gbnf(Guided("regex", pattern))
    rng = random.Random(pattern)
    letters = "abcxyz019 @.-!^]$é_" + "comrgnAyes"
    samples = [
        "",
        "abc",
        "a",
        "bc",
        "ababc",
        "zz",
        "12",
        "me@x.com",
        "xqy",
        "]-^",
        "aaabcc",
        "yes!",
        "no",
        "Aé.",
        "ab cd",
    ]
    samples += ["".join(rng.choices(letters, k=rng.randint(0, 6))) for _ in range(60)]
    samples += [s for s in ("a$", "éé", "--a", "Zz _", "q é") if s]
    wrong = [s for s in samples if admits(model, gbnf, s) != bool(re.fullmatch(pattern, s, re.ASCII))]
    assert wrong == []


def _babble(model, gbnf, seed, tokens):
    """Generate from random logits that lean towards closing what is open."""
    state = GrammarState(model, gbnf)
    sampler = TokenSampler(
        Sampling(seed=seed, top_k=200),
        StopRules(tokens),
        vocab_size=model.vocab_size,
        end_ids=model.end_ids,
        prompt=[1],
        generated=[],
    )
    rng = np.random.default_rng(seed)
    closers = [model.tokenize(text)[0] for text in ('"', "}", "]", ",", '"}', "1", ":", "@", ".")] + [*model.end_ids]
    text = b""
    try:
        for index in range(tokens):
            logits = rng.normal(size=model.vocab_size).astype(np.float32)
            logits[closers] += 6
            token = sampler.draw(logits, index, state)
            assert token is not None
            if token in model.end_ids:
                return text.decode()
            state.accept(token)
            text += model.piece(token)
        return None
    finally:
        state.close()


async def test_random_walks_through_a_schema_are_valid(model):
    gbnf = schema_to_gbnf(PERSON)
    texts = [_babble(model, gbnf, seed, 400) for seed in range(8)]
    finished = [text for text in texts if text is not None]
    assert len(finished) >= 6
    for text in finished:
        jsonschema.validate(json.loads(text), PERSON)
    assert len(set(finished)) == len(finished)


async def test_integer_ranges_are_exact(model):
    rng = random.Random(8)
    for _ in range(12):
        low, high = sorted(rng.choice([rng.randint(-1200, 1200), rng.randint(-9, 12)]) for _ in "ab")
        gbnf = f"root ::= {integer_range(low, high)}\n"
        near = {low - 1, low, low + 1, high - 1, high, high + 1, 0, -1, 1, 9, 10, 99, 100, 999, 1000}
        wrong = [n for n in near if admits(model, gbnf, str(n)) != (low <= n <= high)]
        assert wrong == [], (low, high)
        assert not admits(model, gbnf, "-0")
        assert not admits(model, gbnf, "00")


SCHEMA = json.dumps(
    {
        "type": "object",
        "properties": {"name": {"type": "string", "maxLength": 16}, "age": {"type": "integer"},
                       "job": {"enum": ["cook", "pilot"]}},
        "required": ["name", "age", "job"],
        "additionalProperties": False,
    }
)  # fmt: skip


@pytest.mark.parametrize("sampling", [{}, {"temperature": 1.0, "seed": 5, "frequency_penalty": 0.2}])
async def test_structured_output_is_valid_and_resumes_exactly(run, sampling):
    prompt = run.chat("Describe a person as JSON.")
    options = {"max_tokens": 80, "guided": Guided("json_schema", SCHEMA), "stop": {}, **sampling}
    whole = await run.one(prompt, **options)
    jsonschema.validate(json.loads(run.decode(whole)), json.loads(SCHEMA))
    cuts = (1, 6, len(whole) - 2)
    assert await run.generate(*[request(prompt, generated=whole[:c], **options) for c in cuts]) == [
        whole[cut:] for cut in cuts
    ]


@pytest.mark.parametrize(
    ("guided", "check"),
    [
        (Guided("json_object"), lambda text: isinstance(json.loads(text), dict)),
        (Guided("choice", '["red apple", "green pear"]'), lambda text: text in ("red apple", "green pear")),
        (Guided("regex", r"(Mon|Tues)day, \d{2}:\d{2}"), lambda text: re.fullmatch(r"(Mon|Tues)day, \d\d:\d\d", text)),
        (Guided("grammar", 'root ::= "<" [a-z]{3,9} ">"'), lambda text: re.fullmatch("<[a-z]{3,9}>", text)),
    ],
    ids=lambda value: value.kind if isinstance(value, Guided) else "",
)
async def test_every_kind_constrains_and_ends_even_when_the_end_is_ignored(run, guided, check):
    prompt = run.chat("Give me the name and the age of one cat as a JSON object.")
    key = run.submit(request(prompt, max_tokens=120, guided=guided, stop={"ignore_eos": True, "min_tokens": 60}))
    (tokens,) = await run.finish(key)
    assert run.ends[key].finish == "stop"
    assert check(run.decode(tokens))


async def test_generated_ids_that_break_the_grammar_are_an_error_not_a_crash(run):
    bad = run.encode("not json")
    key = run.submit(request(run.chat("Hi"), generated=bad, guided=Guided("json_object")))
    await run.finish(key)
    assert run.ends[key].finish == "error"
    assert run.ends[key].error.code == "internal"
