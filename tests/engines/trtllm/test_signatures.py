"""The adapter calls nothing that the real package does not have, nor does the stand-in have anything else."""

from __future__ import annotations

import ast
import json
from pathlib import Path

import pytest
from tools.trtllm_signatures import signatures_of

from holdfast.engines.trtllm import api
from tests.support.tensorrt_llm_standin import PLACE, installed

RECORD = json.loads((Path(__file__).parent / "signatures.json").read_text())
SOURCES = sorted(Path(api.__file__).parent.glob("*.py"))


def called() -> dict[str, set[str]]:
    """Return the keyword arguments of every call of a class of the package in the adapter's source."""
    found: dict[str, set[str]] = {}
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                words = {keyword.arg for keyword in node.keywords if keyword.arg}
                found.setdefault(node.func.attr, set()).update(words)
    return found


@pytest.mark.parametrize("name", sorted(api.ARGUMENTS))
def test_what_is_passed_exists(name):
    assert set(api.ARGUMENTS[name]) <= set(RECORD["parameters"][name])


@pytest.mark.parametrize("name", sorted(api.ATTRIBUTES))
def test_what_is_read_exists(name):
    assert set(api.ATTRIBUTES[name]) <= set(RECORD["attributes"][name])


def test_every_class_comes_from_the_module_that_has_it():
    assert {name: RECORD["modules"][name] for name in api.NAMES} == api.NAMES


def test_every_argument_in_the_source_is_listed():
    listed = {name.rpartition(".")[2]: set(arguments) for name, arguments in api.ARGUMENTS.items()}
    seen = called()
    assert seen["generate_async"]
    for name in set(listed) & set(seen) - {"abort", "shutdown"}:
        assert seen[name] <= listed[name], name
    words = {node.value for path in SOURCES if path.name != "api.py" for node in ast.walk(ast.parse(path.read_text()))
             if isinstance(node, ast.Constant) and isinstance(node.value, str)}  # fmt: skip
    words |= set().union(*seen.values())
    unused = {word for name in ("LLM", "SamplingParams", "KvCacheConfig") for word in api.ARGUMENTS[name]} - words
    assert not unused, "listed, but passed nowhere"


def test_the_stand_in_has_what_is_called_and_nothing_that_the_package_lacks():
    found = signatures_of(PLACE)["parameters"]
    for name, arguments in api.ARGUMENTS.items():
        assert set(arguments) <= set(found[name]), name
        assert set(found[name]) <= set(RECORD["parameters"][name]), name


def test_a_renamed_argument_upstream_is_noticed():
    renamed = {**RECORD["parameters"], "KvCacheConfig": ["enable_block_reuse", "block_tokens"]}
    assert not set(api.ARGUMENTS["KvCacheConfig"]) <= set(renamed["KvCacheConfig"])


def test_the_package_is_found_by_its_version_and_told_when_it_is_missing():
    with installed():
        found = api.load_api()
    assert (found.version, found.release, found.penalises, found.prioritises) == ("1.3.0rc29", (1, 3), True, True)
    for version, penalises in (
        ("1.2.1", False),
        ("1.3.0rc20", False),
        ("1.3.0rc24", True),
        ("1.3.0", True),
        ("1.4.0rc1", True),
    ):
        found.version = version
        assert found.penalises is penalises, version
    with pytest.raises(api.EngineFailed, match="doctor engines"):
        api.load_api()
