"""Reads the signatures of TensorRT-LLM that the adapter relies on from a source tree, without importing it.

``python tools/trtllm_signatures.py SOURCE --record`` brings tests/engines/trtllm/signatures.json up to date; SOURCE is
the folder that has ``tensorrt_llm`` in it (a checkout, or ``site-packages``). A renamed argument then breaks a test.
"""

from __future__ import annotations

import argparse
import ast
import datetime
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

RECORD = Path(__file__).resolve().parent.parent / "tests" / "engines" / "trtllm" / "signatures.json"

CLASSES: dict[str, tuple[str, ...]] = {
    "SamplingParams": ("sampling_params.py",),
    "GuidedDecodingParams": ("sampling_params.py",),
    "KvCacheConfig": ("llmapi/llm_args.py",),
    "CacheTransceiverConfig": ("llmapi/llm_args.py",),
    "DisaggregatedParams": ("disaggregated_params.py",),
    "SchedulingParams": ("scheduling_params.py",),
    "LoRARequest": ("executor/request.py",),
    "Logprob": ("executor/result.py",),
}
"""Classes whose fields are their parameters, by the files that may define them."""
METHODS: dict[str, tuple[str, tuple[str, ...]]] = {
    "LLM.generate_async": ("llmapi/llm.py", ("LLM", "BaseLLM")),
    "LLM.get_stats_async": ("llmapi/llm.py", ("LLM", "BaseLLM")),
    "LLM.get_kv_cache_events_async": ("llmapi/llm.py", ("LLM", "BaseLLM")),
    "LLM.shutdown": ("llmapi/llm.py", ("LLM", "BaseLLM")),
    "LLM._check_health": ("llmapi/llm.py", ("LLM", "BaseLLM")),
    "RequestOutput.abort": ("executor/result.py", ("RequestOutput", "GenerationResult")),
}
ARGUMENT_CLASSES = ("BaseLlmArgs", "TorchLlmArgs")
"""Whose fields the engine's keyword arguments are, in the real package."""


def signatures_of(source: Path) -> dict[str, Any]:
    """Return ``parameters`` and ``version`` of the tree that has ``tensorrt_llm`` in it.

    Raises:
        FileNotFoundError: it has not.
    """
    package = source / "tensorrt_llm"
    if not package.is_dir():
        raise FileNotFoundError(f"{source} has no folder tensorrt_llm; name the one that contains it")
    found: dict[str, list[str]] = {"LLM": _engine_arguments(package)}
    for name, files in CLASSES.items():
        for file in files:
            for node in _classes(package / file, name):
                found[name] = _fields(node)
    for name, (file, owners) in METHODS.items():
        for owner in owners:
            for node in _classes(package / file, owner):
                for method in _methods(node, name.partition(".")[2]):
                    found[name] = _parameters(method)
    return {"version": _version(package), "parameters": found}


def _engine_arguments(package: Path) -> list[str]:
    names: dict[str, None] = {}
    for owner in ("BaseLLM", "LLM"):
        for node in _classes(package / "llmapi/llm.py", owner):
            for method in _methods(node, "__init__"):
                names |= dict.fromkeys(_parameters(method))
    for owner in ARGUMENT_CLASSES:
        for node in _classes(package / "llmapi/llm_args.py", owner):
            names |= dict.fromkeys(_fields(node))
    return list(names)


def _classes(path: Path, name: str) -> Iterator[ast.ClassDef]:
    if path.is_file():
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef) and node.name == name:
                yield node


def _methods(node: ast.ClassDef, name: str) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for inner in node.body:
        if isinstance(inner, ast.FunctionDef | ast.AsyncFunctionDef) and inner.name == name:
            yield inner


def _parameters(method: ast.FunctionDef | ast.AsyncFunctionDef) -> list[str]:
    given = [*method.args.posonlyargs, *method.args.args, *method.args.kwonlyargs]
    return [one.arg for one in given if one.arg not in ("self", "cls")]


def _fields(node: ast.ClassDef) -> list[str]:
    """Return annotated fields that a caller may set, or the parameters of a constructor that is written out."""
    for method in _methods(node, "__init__"):
        return _parameters(method)
    return [
        inner.target.id
        for inner in node.body
        if isinstance(inner, ast.AnnAssign)
        and isinstance(inner.target, ast.Name)
        and not inner.target.id.startswith("_")
    ]


def _version(package: Path) -> str:
    for file in ("version.py", "__init__.py"):
        if (package / file).is_file():
            match = re.search(r'__version__ = "([^"]+)"', (package / file).read_text(encoding="utf-8"))
            if match:
                return match.group(1)
    return "unknown"


def main() -> int:
    """Print what was found, or put it on record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("--record", action="store_true")
    wanted = parser.parse_args()
    found = signatures_of(wanted.source)
    if not wanted.record:
        sys.stdout.write(json.dumps(found, indent=1) + "\n")
        return 0
    record = json.loads(RECORD.read_text(encoding="utf-8"))
    record["parameters"] |= found["parameters"]
    record["sources"] |= dict.fromkeys(found["parameters"], f"source tree of version {found['version']}")
    record["collected"] = datetime.datetime.now(datetime.UTC).date().isoformat()
    RECORD.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
