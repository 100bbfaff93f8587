"""Make up a valid value for a JSON schema, decided by a hash alone.

Must never emit text that the schema forbids: what it cannot honour it refuses, naming the keyword.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from typing import Any

from xxhash import xxh3_64_intdigest

from holdfast.base.errors import InvalidRequest, UnsupportedFeature
from holdfast.engines.contract import Guided

_REFUSED = ("pattern", "not", "if", "patternProperties", "dependentSchemas", "dependentRequired", "contains")
_DEEP = 6
"""From this depth on only what is required is generated."""
_TOO_DEEP = 48
_FORMATS = {
    "date": "2026-03-{d:02}",
    "time": "12:{d:02}:07Z",
    "date-time": "2026-03-{d:02}T12:34:56Z",
    "uuid": "00000000-0000-4000-8000-0000000000{d:02}",
    "email": "user{d}@mail.example",
    "uri": "https://site{d}.example/",
    "ipv4": "192.0.2.{d}",
    "hostname": "host{d}.example",
}


class Draws:
    """An endless, repeatable source of choices from one 64-bit key."""

    def __init__(self, key: int):
        self._key = key
        self._count = 0

    def below(self, bound: int) -> int:
        """Return a number in 0..bound-1."""
        self._count += 1
        return xxh3_64_intdigest(self._count.to_bytes(8, "little"), self._key) % bound

    def pick(self, options: Sequence[Any]) -> Any:
        """Return one of the options."""
        return options[self.below(len(options))]


def guided_text(guided: Guided, draws: Draws, words: Callable[[int], str]) -> str:
    """Return the text that a constraint leads to.

    Args:
        guided: the constraint.
        draws: what decides.
        words: returns a word for a number; the material of strings.

    Raises:
        UnsupportedFeature: a grammar or regex, or a schema keyword that is not understood.
        InvalidRequest: the constraint is not JSON, or contradicts itself.
    """
    maker = _Maker(draws, words)
    if guided.kind == "json_object":
        return json.dumps(maker.any_object(), ensure_ascii=False)
    if guided.kind not in ("json_schema", "choice"):
        raise UnsupportedFeature(f"The mock engine has no guided output of kind {guided.kind!r}.", kind=guided.kind)
    try:
        value = json.loads(guided.value)
    except ValueError as error:
        raise InvalidRequest(f"The {guided.kind} constraint is not JSON: {error}.", param="response_format") from error
    if guided.kind == "choice":
        if not isinstance(value, list) or not value or not all(isinstance(v, str) for v in value):
            raise InvalidRequest("The choices must be a JSON list of at least one string.", param="guided_choice")
        return str(draws.pick(value))
    maker.root = value
    return json.dumps(maker.value(value, 0), ensure_ascii=False)


class _Maker:
    """Walks a schema. ``root`` resolves references."""

    def __init__(self, draws: Draws, words: Callable[[int], str]):
        self.root: Any = {}
        self._draws = draws
        self._words = words

    def any_object(self) -> dict[str, Any]:
        """Return an object of two to four made-up members."""
        made: dict[str, Any] = {}
        for _ in range(2 + self._draws.below(3)):
            made[self._word()] = self._draws.pick([self._word(), self._draws.below(1000), True, None])
        return made

    def value(self, schema: Any, depth: int) -> Any:
        """Return a value that the schema allows."""
        if depth > _TOO_DEEP:
            raise UnsupportedFeature("The JSON schema requires endless nesting.", limit=_TOO_DEEP)
        if schema is True or schema == {}:
            return self._word()
        if not isinstance(schema, dict):
            raise InvalidRequest("The JSON schema is not an object.", param="response_format")
        schema = self._resolved(schema)
        for keyword in _REFUSED:
            if keyword in schema:
                raise UnsupportedFeature(
                    f"The mock engine cannot honour {keyword!r} in a JSON schema.", keyword=keyword
                )
        if "const" in schema:
            return schema["const"]
        if "enum" in schema:
            return self._draws.pick(schema["enum"])
        for keyword in ("anyOf", "oneOf"):
            if keyword in schema:
                rest = {k: v for k, v in schema.items() if k != keyword}
                return self.value(self._merged([rest, self._option(schema[keyword], depth)]), depth + 1)
        return self._typed(schema, depth)

    def _resolved(self, schema: dict[str, Any], nested: int = 0) -> dict[str, Any]:
        for _ in range(_TOO_DEEP - nested):
            if "$ref" in schema:
                rest = {k: v for k, v in schema.items() if k != "$ref"}
                schema = self._merged([self._pointer(schema["$ref"]), rest])
            elif "allOf" in schema:
                rest = {k: v for k, v in schema.items() if k != "allOf"}
                schema = self._merged([rest, *(self._resolved(part, nested + 1) for part in schema["allOf"])])
            else:
                return schema
        raise InvalidRequest("The JSON schema's references lead in a circle.", param="response_format")

    def _pointer(self, ref: str) -> dict[str, Any]:
        if not ref.startswith("#"):
            raise UnsupportedFeature(f"Only references inside the schema work, not {ref!r}.", keyword="$ref")
        found = self.root
        try:
            for part in ref[1:].split("/")[1:]:
                found = found[part.replace("~1", "/").replace("~0", "~")]
        except (KeyError, TypeError) as error:
            raise InvalidRequest(f"The JSON schema has nothing at {ref!r}.", param="response_format") from error
        return found if isinstance(found, dict) else {}

    def _merged(self, parts: Sequence[Any]) -> dict[str, Any]:
        merged: dict[str, Any] = {}
        for part in parts:
            for key, value in (part if isinstance(part, dict) else {}).items():
                if key == "properties":
                    value = {**merged.get(key, {}), **value}  # noqa: PLW2901
                elif key == "required":
                    value = [*merged.get(key, []), *value]  # noqa: PLW2901
                merged[key] = value
        return merged

    def _option(self, options: list[Any], depth: int) -> Any:
        """One of the alternatives; deep down the one that ends soonest, so that recursive schemas end."""
        if depth >= _DEEP:
            simple = [o for o in options if isinstance(o, dict) and o.get("type") not in ("object", "array", None)]
            if simple:
                return simple[0]
        return self._draws.pick(options)

    def _typed(self, schema: dict[str, Any], depth: int) -> Any:
        kind = schema.get("type") or _implied_type(schema)
        if isinstance(kind, list):
            kind = self._option([{"type": k} for k in kind], depth)["type"]
        if kind == "object":
            return self._object(schema, depth)
        if kind == "array":
            return self._array(schema, depth)
        if kind == "string":
            return self._string(schema)
        if kind in ("integer", "number"):
            return self._number(schema, kind)
        if kind == "boolean":
            return self._draws.below(2) == 1
        if kind == "null":
            return None
        raise InvalidRequest(f"The JSON schema has an unknown type {kind!r}.", param="response_format")

    def _object(self, schema: dict[str, Any], depth: int) -> dict[str, Any]:
        properties: dict[str, Any] = schema.get("properties", {})
        required = set(schema.get("required", ()))
        made: dict[str, Any] = {}
        for name, inner in properties.items():
            wanted = name in required or (depth < _DEEP and self._draws.below(2) == 1)
            if wanted and inner is not False:
                made[name] = self.value(inner, depth + 1)
        extra = schema.get("additionalProperties", True)
        for name in schema.get("required", ()):
            if name not in made:
                made[name] = self.value(extra, depth + 1)
        for name, inner in properties.items():
            if len(made) < schema.get("minProperties", 0) and name not in made:
                made[name] = self.value(inner, depth + 1)
        while len(made) < schema.get("minProperties", 0):
            if extra is False:
                raise InvalidRequest("The JSON schema wants more properties than it allows.", param="response_format")
            made[f"{self._word()}{len(made)}"] = self.value(extra, depth + 1)
        return made

    def _array(self, schema: dict[str, Any], depth: int) -> list[Any]:
        made = [self.value(inner, depth + 1) for inner in schema.get("prefixItems", ())]
        low = schema.get("minItems", 0)
        high = schema.get("maxItems", max(low, 3))
        count = low if depth >= _DEEP else low + self._draws.below(max(1, min(high - low, 3) + 1))
        items = schema.get("items", True)
        tries = 0
        while len(made) < count and items is not False:
            value = self.value(items, depth + 1)
            tries += 1
            if schema.get("uniqueItems") and value in made and tries < 64 * count:
                continue
            made.append(value)
        return made

    def _string(self, schema: dict[str, Any]) -> str:
        known = _FORMATS.get(schema.get("format", ""))
        if known is not None:
            return known.format(d=1 + self._draws.below(28))
        low = schema.get("minLength", 0)
        high = schema.get("maxLength", max(low, 24))
        text = self._word()
        while len(text) < low or (len(text) < high // 2 and self._draws.below(2)):
            text += " " + self._word()
        return text[:high]

    def _number(self, schema: dict[str, Any], kind: str) -> float | int:
        step = schema.get("multipleOf", 1)
        low, high = _bounds(schema, step)
        first = math.ceil(low / step)
        last = math.floor(high / step)
        if first <= last:
            value = (first + self._draws.below(min(last - first, 1 << 32) + 1)) * step
            return int(value) if kind == "integer" else value
        if kind == "number" and "multipleOf" not in schema and low < high:
            return float((low + high) / 2)
        raise InvalidRequest("The JSON schema leaves no number between its bounds.", param="response_format")

    def _word(self) -> str:
        return self._words(self._draws.below(1 << 32))


def _implied_type(schema: dict[str, Any]) -> str:
    if "properties" in schema or "required" in schema or "additionalProperties" in schema:
        return "object"
    if "items" in schema or "prefixItems" in schema or "minItems" in schema:
        return "array"
    if "minimum" in schema or "maximum" in schema or "multipleOf" in schema:
        return "number"
    return "string"


def _bounds(schema: dict[str, Any], step: float) -> tuple[float, float]:
    low, high = schema.get("minimum"), schema.get("maximum")
    above, below = schema.get("exclusiveMinimum"), schema.get("exclusiveMaximum")
    if isinstance(above, int | float) and not isinstance(above, bool):
        nearest = (math.floor(above / step) + 1) * step
        low = nearest if low is None else max(low, nearest)
    if isinstance(below, int | float) and not isinstance(below, bool):
        nearest = (math.ceil(below / step) - 1) * step
        high = nearest if high is None else min(high, nearest)
    if low is None:
        low = 0 if high is None or high >= 0 else high - 1000
    return low, (low + 1000 if high is None else high)
