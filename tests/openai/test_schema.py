"""The OpenAPI document is sound, complete, and agrees with what the decoder does."""

import json
import re
from typing import Any

import jsonschema
import pytest

from holdfast.openai import describe
from holdfast.openai.docs import CONTENT_SECURITY_POLICY, docs_page
from holdfast.openai.headers import _READERS
from holdfast.openai.schema import document, openapi
from tests.openai.test_bad_requests import GOOD_CHAT, chat

DOCUMENT = document("1.2.3", api_keys=True)


def walk(value: Any) -> Any:
    yield value
    for child in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from walk(child)


def validator(name: str) -> jsonschema.Draft202012Validator:
    return jsonschema.Draft202012Validator(
        {"$ref": f"#/components/schemas/{name}", "components": DOCUMENT["components"]}
    )


def test_structure() -> None:
    assert DOCUMENT["openapi"] == "3.1.0"
    assert set(DOCUMENT["info"]) >= {"title", "version", "license"}
    assert set(DOCUMENT["paths"]) == {
        "/v1/chat/completions", "/v1/completions", "/v1/models", "/v1/models/{model}", "/health", "/live", "/metrics",
    }  # fmt: skip
    for path, methods in DOCUMENT["paths"].items():
        for method, operation in methods.items():
            assert method in {"get", "post"}
            assert operation["summary"]
            assert all(re.fullmatch(r"[1-5]\d\d", status) for status in operation["responses"])
            assert all(response["description"] for response in operation["responses"].values())
            names = {p["name"] for p in operation.get("parameters", []) if p["in"] == "path"}
            assert names == set(re.findall(r"{(\w+)}", path))
            assert {"401", "200"} <= set(operation["responses"]) or path in {"/health", "/live", "/metrics"}
    assert DOCUMENT["security"] == [{"key": []}]
    assert "security" not in document("1")


def test_every_reference_resolves_and_every_type_is_used() -> None:
    references = [v["$ref"] for v in walk(DOCUMENT) if isinstance(v, dict) and "$ref" in v]
    names = {reference.removeprefix("#/components/schemas/") for reference in references}
    assert names == set(DOCUMENT["components"]["schemas"])


@pytest.mark.parametrize("name", sorted(DOCUMENT["components"]["schemas"]))
def test_schemas_are_schemas(name: str) -> None:
    schema = DOCUMENT["components"]["schemas"][name]
    jsonschema.Draft202012Validator.check_schema(schema)
    assert schema["description"]


@pytest.mark.parametrize("fields", GOOD_CHAT, ids=range(len(GOOD_CHAT)))
def test_what_the_decoder_accepts_the_schema_accepts(fields: dict[str, Any]) -> None:
    validator("ChatCompletionRequest").validate(json.loads(chat(**fields)))


@pytest.mark.parametrize(
    "fields",
    [{"temperature": 3}, {"n": 0}, {"messages": []}, {"stop": ["x"] * 17}, {"tool_choice": "x"}, {"seed": "1"}],
)
def test_what_the_decoder_refuses_the_schema_refuses(fields: dict[str, Any]) -> None:
    assert not validator("ChatCompletionRequest").is_valid(json.loads(chat(**fields)))


def test_examples_are_valid() -> None:
    for path in ("/v1/chat/completions", "/v1/completions"):
        content = DOCUMENT["paths"][path]["post"]["requestBody"]["content"]["application/json"]
        validator(content["schema"]["$ref"].rpartition("/")[2]).validate(content["example"])


def test_every_header_is_described_and_every_description_is_of_something() -> None:
    described = {name for name, _, _ in describe.HEADERS}
    assert described == {name.decode() for name in _READERS} - {"x-data-parallel-rank"}
    schemas = DOCUMENT["components"]["schemas"]
    for field in describe.FIELDS:
        owner, _, name = field.rpartition(".")
        owners = [owner] if owner else list(schemas)
        assert any(name in schemas[o].get("properties", {}) for o in owners), field


def test_bytes_are_the_document() -> None:
    assert json.loads(openapi("1.2.3", api_keys=True)) == json.loads(json.dumps(DOCUMENT))


def test_docs_page_is_self_contained() -> None:
    page = docs_page(openapi("1.2.3")).decode()
    embedded = re.search(r'<script type="application/json" id="api">(.*?)</script>', page, re.DOTALL)
    assert embedded
    assert json.loads(embedded[1]) == json.loads(json.dumps(document("1.2.3")))
    rest = page.replace(embedded[1], "")
    assert not re.search(r"https?://|\bsrc=|@import|url\(|fetch\(|XMLHttpRequest", rest)
    assert re.findall(r'href="?([^" >]+)', rest) == ["/openapi.json"]
    assert CONTENT_SECURITY_POLICY.startswith("default-src 'none'; style-src 'sha256-")


def test_docs_page_survives_a_hostile_document() -> None:
    page = docs_page(b'{"x":"</script><script>alert(1)</script>"}')
    assert b"<script>alert" not in page
