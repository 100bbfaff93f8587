"""From an engine's name and settings to the engine, loading its module only then.

Must never load an engine that is not asked for: each costs time and memory.
"""

from __future__ import annotations

import importlib

import msgspec

from holdfast.engines.contract import Engine
from holdfast.engines.handoff import Role
from holdfast.worker.config import EngineName

_ENGINES: dict[EngineName, tuple[str, str]] = {
    "llamacpp": ("holdfast.engines.llamacpp.engine", "LlamaCppEngine"),
    "mock": ("holdfast.engines.mock.ranks", "make_mock"),
    "sglang": ("holdfast.engines.sglang.engine", "SglangEngine"),
    "trtllm": ("holdfast.engines.trtllm.engine", "TrtllmEngine"),
    "vllm": ("holdfast.engines.vllm.engine", "VllmEngine"),
}


def make_engine(name: EngineName, config: msgspec.Struct, role: Role = "aggregated") -> Engine:
    """Return an engine that has not been started.

    Args:
        name: which engine.
        config: its own settings, as its constructor takes them.
        role: what the worker does of a request.
    """
    module, attribute = _ENGINES[name]
    engine = getattr(importlib.import_module(module), attribute)(config)
    assert isinstance(engine, Engine)
    engine.role = role
    return engine
