"""Turns the structured-output constraints of a request into GBNF, llama.cpp's grammar notation.

JSON schemas: objects (declared properties in declared order, optional ones may be left out), arrays, strings,
numbers, integers, booleans, null, enum, const, anyOf/oneOf, local ``$ref``. A keyword that constrains values and
is not understood here is refused by name; a weaker constraint than the one asked for is never built.
White space is bounded, so that a model cannot fill its budget with blanks.

Must never call the engine library; `guided` compiles what comes from here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import msgspec

from holdfast.base.errors import InvalidRequest, UnsupportedFeature
from holdfast.engines.contract import Guided
from holdfast.engines.llamacpp.ranges import DIGITS, integer_range
from holdfast.engines.llamacpp.regex import json_chars, literal, regex_to_gbnf, repeat

CONSTRAINT_CHARS = 64 * 1024
"""Largest schema, grammar, regex or list of choices."""
CHOICES = 1024
NESTING = 48
"""Deepest nesting of a schema."""
FREE_DEPTH = 6
"""Nesting of values that the schema says nothing about; bounded, so that free JSON ends."""

_ANNOTATIONS = frozenset(
    (
        "title", "description", "default", "examples", "example", "$schema", "$id", "$comment", "$anchor", "deprecated",
        "readOnly", "writeOnly", "$defs", "definitions", "strict", "nullable", "contentMediaType", "contentEncoding",
    )
)  # fmt: skip
_KEYWORDS = {
    "object": frozenset(("properties", "required", "additionalProperties")),
    "array": frozenset(("items", "prefixItems", "minItems", "maxItems", "uniqueItems")),
    "string": frozenset(("minLength", "maxLength", "pattern", "format")),
    "number": frozenset(),
    "integer": frozenset(("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum")),
    "boolean": frozenset(),
    "null": frozenset(),
}

_DATE = '[0-9]{4} "-" ("0" [1-9] | "1" [0-2]) "-" ("0" [1-9] | [1-2] [0-9] | "3" [0-1])'
_TIME = (
    '([0-1] [0-9] | "2" [0-3]) ":" [0-5] [0-9] ":" [0-5] [0-9] ("." [0-9]{1,6})? '
    '("Z" | [+-] ([0-1] [0-9] | "2" [0-3]) ":" [0-5] [0-9])'
)
_HEX = "[0-9a-fA-F]"
_FORMATS = {
    "date": _DATE,
    "time": _TIME,
    "date-time": f'{_DATE} "T" {_TIME}',
    "uuid": f'{_HEX}{{8}} "-" {_HEX}{{4}} "-" {_HEX}{{4}} "-" {_HEX}{{4}} "-" {_HEX}{{12}}',
}

_BASE = {
    "ws": '(" " | "\\n" [ \\t]{0,20})?',
    "hex": _HEX,
    "char": (
        '[^"\\\\\\x7F\\x00-\\x1F] | "\\\\" (["\\\\/bfnrt] | "u" ([0-9A-CE-Fa-ce-f] hex hex hex | [Dd] [0-7] hex hex))'
    ),
    "string": '"\\"" char* "\\""',
    "digits": '"0" | [1-9] [0-9]{0,14}',
    "integer": '"-"? digits',
    "number": '"-"? digits ("." [0-9]{1,15})? ([eE] [-+]? [0-9]{1,2})?',
    "boolean": '"true" | "false"',
    "null": '"null"',
}


def constraint_to_gbnf(guided: Guided) -> str:
    """Return the GBNF for a constraint, start symbol ``root``.

    Raises:
        UnsupportedFeature: the constraint needs something that cannot be enforced; the sentence names it.
        InvalidRequest: the constraint itself is malformed.
    """
    if len(guided.value) > CONSTRAINT_CHARS:
        raise InvalidRequest(
            f"The output constraint has {len(guided.value)} characters; the limit is {CONSTRAINT_CHARS}.",
            param="response_format",
        )
    build: dict[str, Callable[[str], str]] = {
        "json_object": lambda _: json_object_gbnf(),
        "json_schema": lambda value: schema_to_gbnf(_parse(value, "JSON schema")),
        "grammar": _own_grammar,
        "regex": lambda value: f"root ::= {regex_to_gbnf(value)}\n",
        "choice": lambda value: choices_to_gbnf(_parse(value, "list of choices")),
    }
    if guided.kind not in build:
        raise UnsupportedFeature(f"Structured output of kind {guided.kind!r} is not supported by this engine.")
    return build[guided.kind](guided.value)


def _parse(text: str, what: str) -> Any:
    try:
        return msgspec.json.decode(text)
    except (msgspec.DecodeError, RecursionError) as error:
        raise InvalidRequest(f"The {what} is not valid JSON: {error}", param="response_format") from None


def _own_grammar(text: str) -> str:
    if not text.strip():
        raise InvalidRequest("The grammar is empty.", param="guided_grammar")
    depth = deepest = 0
    for ch in text:
        depth += (ch == "(") - (ch == ")")
        deepest = max(deepest, depth)
    if deepest > NESTING:
        raise InvalidRequest(
            f"The grammar nests {deepest} parentheses; the limit is {NESTING}.", param="guided_grammar"
        )
    return text


def choices_to_gbnf(choices: Any) -> str:
    """Return a grammar that allows exactly these strings."""
    if not isinstance(choices, list) or not choices or not all(isinstance(c, str) and c for c in choices):
        raise InvalidRequest("Choices must be a list of non-empty strings.", param="guided_choice")
    if len(choices) > CHOICES:
        raise InvalidRequest(f"{len(choices)} choices are over the limit of {CHOICES}.", param="guided_choice")
    return f"root ::= {' | '.join(literal(c) for c in choices)}\n"


def json_object_gbnf() -> str:
    """Return a grammar for any JSON object."""
    converter = _Converter({})
    return converter.render(converter.free_object(FREE_DEPTH))


def schema_to_gbnf(schema: Any) -> str:
    """Return a grammar whose every sentence satisfies the schema. Raises as `constraint_to_gbnf`."""
    converter = _Converter(schema)
    return converter.render(converter.value(schema, "#", 0))


class _Converter:
    """Builds rules while it walks a schema. Expressions that it returns can be used as atoms."""

    def __init__(self, root: Any):
        self.root = root
        self.rules: dict[str, str] = {}
        self.refs: dict[str, str] = {}

    def render(self, start: str) -> str:
        rules = {"root": start, **self.rules, **_BASE}
        return "".join(f"{name} ::= {body}\n" for name, body in rules.items())

    def rule(self, body: str) -> str:
        name = f"r{len(self.rules)}"
        self.rules[name] = body
        return name

    def value(self, schema: Any, path: str, depth: int) -> str:
        if depth > NESTING:
            raise UnsupportedFeature(f"The JSON schema nests deeper than {NESTING} at {path}.")
        if schema is True:
            return self.free(FREE_DEPTH)
        if not isinstance(schema, dict):
            raise InvalidRequest(f"The JSON schema at {path} must be an object, not {schema!r}.")
        for keyword in ("$ref", "const", "enum", "anyOf", "oneOf", "allOf"):
            if keyword in schema:
                return self.special(keyword, schema, path, depth)
        return self.typed(schema, path, depth)

    def special(self, keyword: str, schema: dict[str, Any], path: str, depth: int) -> str:
        """Handle the keywords that say everything by themselves."""
        allowed = {keyword, "type"} if keyword in ("const", "enum") else {keyword}
        self.refuse_others(schema, allowed, path)
        if keyword == "$ref":
            return self.reference(schema["$ref"], path, depth)
        if keyword == "const":
            return self.literals([schema["const"]], schema, path)
        options = schema[keyword]
        if not isinstance(options, list) or not options:
            raise InvalidRequest(f"{keyword!r} in the JSON schema at {path} must be a non-empty list.")
        if keyword == "enum":
            return self.literals(options, schema, path)
        if keyword == "allOf" and len(options) > 1:
            raise UnsupportedFeature(
                f"The JSON schema keyword 'allOf' with several schemas at {path} is not supported."
            )
        return self.either(self.value(o, f"{path}/{keyword}/{i}", depth + 1) for i, o in enumerate(options))

    def either(self, options: Iterable[str]) -> str:
        unique = list(dict.fromkeys(options))
        return unique[0] if len(unique) == 1 else self.rule(" | ".join(unique))

    def literals(self, values: list[Any], schema: dict[str, Any], path: str) -> str:
        kinds = _types(schema, path)
        kept = [v for v in values if not kinds or any(_is(v, kind) for kind in kinds)]
        if not kept:
            raise InvalidRequest(f"No value of the JSON schema at {path} has the type that it demands.")
        return self.either(literal(msgspec.json.encode(v).decode()) for v in kept)

    def reference(self, ref: Any, path: str, depth: int) -> str:
        if not isinstance(ref, str) or not (ref == "#" or ref.startswith("#/")):
            raise UnsupportedFeature(
                f"'$ref' at {path} is {ref!r}; only references into the same schema are supported."
            )
        if ref in self.refs:
            return self.refs[ref]
        target = self.root
        for part in ref.split("/")[1:]:
            key = part.replace("~1", "/").replace("~0", "~")
            if not isinstance(target, dict) or key not in target:
                raise InvalidRequest(f"'$ref' at {path} points to {ref!r}, which is not in the JSON schema.")
            target = target[key]
        name = self.refs[ref] = self.rule("")
        self.rules[name] = self.value(target, ref, depth + 1)
        return name

    def typed(self, schema: dict[str, Any], path: str, depth: int) -> str:
        kinds = _types(schema, path) or _implied(schema)
        if not kinds:
            self.refuse_others(schema, set(), path)
            return self.free(FREE_DEPTH)
        self.refuse_others(schema, {"type", *(k for kind in kinds for k in _KEYWORDS[kind])}, path)
        build = {"object": self.object, "array": self.array, "string": self.string, "integer": self.integer}
        return self.either(build[kind](schema, path, depth) if kind in build else kind for kind in kinds)

    def refuse_others(self, schema: dict[str, Any], allowed: set[str], path: str) -> None:
        for keyword in schema:
            if keyword not in allowed and keyword not in _ANNOTATIONS:
                raise UnsupportedFeature(
                    f"The JSON schema keyword {keyword!r} at {path} is not supported in this place.",
                    param="response_format",
                    keyword=keyword,
                )

    def integer(self, schema: dict[str, Any], path: str, _depth: int) -> str:
        low = _limit(schema, "minimum", "exclusiveMinimum", 1, path)
        high = _limit(schema, "maximum", "exclusiveMaximum", -1, path)
        if low is None and high is None:
            return "integer"
        if low is not None and high is not None and low > high:
            raise InvalidRequest(f"No integer lies within the bounds that the JSON schema gives at {path}.")
        return self.rule(integer_range(low, high))

    def string(self, schema: dict[str, Any], path: str, _depth: int) -> str:
        low, high = _bounds(schema, "minLength", "maxLength", path)
        form, pattern = schema.get("format"), schema.get("pattern")
        if (form is not None) + (pattern is not None) + bool(low or high is not None) > 1:
            raise UnsupportedFeature(f"Length, 'pattern' and 'format' together, at {path}, are not supported.")
        if form is not None:
            if form not in _FORMATS:
                raise UnsupportedFeature(f"The string format {form!r} at {path} is not supported.", keyword="format")
            return self.rule(f'"\\"" {_FORMATS[form]} "\\""')
        if pattern is not None:
            return self.rule(f'"\\"" {regex_to_gbnf(str(pattern), json_chars, search=True)} "\\""')
        if (low, high) == (0, None):
            return "string"
        return self.rule(f'"\\"" {repeat("char", low, high)} "\\""')

    def array(self, schema: dict[str, Any], path: str, depth: int) -> str:
        if schema.get("uniqueItems"):
            raise UnsupportedFeature(f"The JSON schema keyword 'uniqueItems' at {path} is not supported.")
        low, high = _bounds(schema, "minItems", "maxItems", path)
        prefix = schema.get("prefixItems", [])
        first = [self.value(s, f"{path}/prefixItems/{i}", depth + 1) for i, s in enumerate(prefix)]
        items = schema.get("items", not prefix)
        if first:
            if items is not False or low not in (0, len(first)) or high not in (None, len(first)):
                raise UnsupportedFeature(f"'prefixItems' at {path} is supported only with 'items': false.")
            return self.rule('"[" ws ' + ' "," ws '.join(first) + ' ws "]"')
        if items is False or high == 0:
            return self.rule('"[" ws "]"')
        return self.listed(self.value(items, f"{path}/items", depth + 1), low, high)

    def listed(self, item: str, low: int, high: int | None) -> str:
        more = repeat(f'("," ws {item})', max(low - 1, 0), None if high is None else high - 1) if high != 1 else ""
        inner = f"{item} {more} ws" if low else f"({item} {more} ws)?"
        return self.rule(f'"[" ws {inner} "]"')

    def object(self, schema: dict[str, Any], path: str, depth: int) -> str:
        properties = schema.get("properties", {})
        required = schema.get("required", [])
        if not isinstance(properties, dict) or not isinstance(required, list):
            raise InvalidRequest(f"'properties' must be an object and 'required' a list at {path}.")
        extra = schema.get("additionalProperties", True)
        members = dict(properties) | {name: extra for name in required if name not in properties}
        if any(value is False for value in members.values()):
            raise InvalidRequest(f"The JSON schema at {path} requires a property that it forbids.")
        if members:
            return self.members(members, set(required), path, depth)
        if extra is False:
            return self.rule('"{" ws "}"')
        if extra is True:
            return self.free_object(FREE_DEPTH)
        return self.mapping(self.value(extra, f"{path}/additionalProperties", depth + 1))

    def mapping(self, value: str) -> str:
        pair = self.rule(f'string ":" ws {value}')
        return self.rule(f'"{{" ws ({pair} ("," ws {pair})* ws)? "}}"')

    def members(self, members: dict[str, Any], required: set[str], path: str, depth: int) -> str:
        """Return an object whose members come in declared order; optional ones may be missing.

        ``after``: what may follow once a member has been written; ``first``: while none has been.
        """
        after, first, empty = "", "", True
        for name, schema in reversed(members.items()):
            key = literal(msgspec.json.encode(name).decode())
            value = self.value(schema, f"{path}/properties/{name}", depth + 1)
            pair = self.rule(f'{key} ":" ws {value}')
            start = f"{pair} {after}".strip()
            if name in required:
                first, empty = start, False
                after = self.rule(f'"," ws {pair} {after}')
            else:
                first = f"{start} | {first}" if first else start
                after = self.rule(f'("," ws {pair})? {after}')
        return self.rule(f'"{{" ws ({first}) ws "}}"' if not empty else f'"{{" ws (({first}) ws)? "}}"')

    def free(self, depth: int) -> str:
        """Return any JSON value, nested at most ``depth`` levels."""
        plain = ["string", "number", "boolean", "null"]
        if depth == 0:
            return self.named("free-0", lambda: " | ".join(plain))
        return self.named(
            f"free-{depth}", lambda: " | ".join([*plain, self.free_object(depth), self.free_array(depth)])
        )

    def free_object(self, depth: int) -> str:
        return self.named(f"free-object-{depth}", lambda: self.mapping(self.free(depth - 1)))

    def free_array(self, depth: int) -> str:
        return self.named(f"free-array-{depth}", lambda: self.listed(self.free(depth - 1), 0, None))

    def named(self, name: str, build: Callable[[], str]) -> str:
        if name not in self.rules:
            self.rules[name] = build()
        return name


def _types(schema: dict[str, Any], path: str) -> tuple[str, ...]:
    kind = schema.get("type", ())
    kinds = (kind,) if isinstance(kind, str) else tuple(kind)
    for one in kinds:
        if one not in _KEYWORDS:
            raise InvalidRequest(f"The JSON schema at {path} has an unknown type {one!r}.")
    return kinds


def _implied(schema: dict[str, Any]) -> tuple[str, ...]:
    return tuple(kind for kind, keywords in _KEYWORDS.items() if keywords & schema.keys())[:1]


def _limit(schema: dict[str, Any], name: str, exclusive: str, step: int, path: str) -> int | None:
    """Return the tighter of an inclusive and an exclusive bound; ``step`` 1: lower bounds, -1: upper bounds."""
    found = []
    for key, shift in ((name, 0), (exclusive, step)):
        value = schema.get(key)
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int | float) or value != int(value):
            raise UnsupportedFeature(f"{key!r} at {path} must be a whole number to be supported.", keyword=key)
        if abs(value) >= 10**DIGITS:
            raise UnsupportedFeature(f"{key!r} at {path} has more than {DIGITS} digits.", keyword=key)
        found.append(int(value) + shift)
    return max(found, key=lambda bound: bound * step) if found else None


def _bounds(schema: dict[str, Any], low_name: str, high_name: str, path: str) -> tuple[int, int | None]:
    low, high = schema.get(low_name, 0), schema.get(high_name)
    for name, value in ((low_name, low), (high_name, high)):
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 0):
            raise InvalidRequest(f"{name!r} at {path} must be a whole number that is not negative.")
    if high is not None and high < low:
        raise InvalidRequest(f"{high_name!r} {high} is less than {low_name!r} {low} at {path}.")
    return low, high


def _is(value: Any, kind: str) -> bool:
    if isinstance(value, bool) or kind == "boolean":
        return isinstance(value, bool) and kind == "boolean"
    types: dict[str, tuple[type, ...]] = {
        "object": (dict,), "array": (list,), "string": (str,), "number": (int, float), "integer": (int,),
        "null": (type(None),),
    }  # fmt: skip
    return isinstance(value, types[kind])
