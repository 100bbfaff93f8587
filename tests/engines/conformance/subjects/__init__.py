"""What the suite needs to know about each engine; a module per engine, loaded only when it is tested."""

from __future__ import annotations

import importlib

from tests.engines.conformance.subject import Subject

DEFAULT = ("mock", "llamacpp", "trtllm")
"""Engines that the default test command covers; trtllm against its stand-in."""
KNOWN = (*DEFAULT, "vllm", "sglang")


def subject(name: str) -> Subject:
    """Return one engine's description. Raises ImportError when what it needs is not installed."""
    found = importlib.import_module(f"tests.engines.conformance.subjects.{name}").SUBJECT
    assert isinstance(found, Subject)
    return found
