"""The mock engine: small memory, its end of sequence on command."""

from __future__ import annotations

from holdfast.engines.mock import MockConfig, MockEngine
from tests.engines.conformance.subject import CHAT, Subject


def make() -> MockEngine:
    return MockEngine(MockConfig(step_ms=0.5, context_length=512, num_blocks=64, max_num_seqs=16))


SUBJECT = Subject(
    name="mock",
    make=make,
    kill=lambda engine: engine.misbehave("die"),  # type: ignore[attr-defined]
    where="in-process",
    prompts=CHAT,
    ending="[[mock:eos-after 9]] Tell me about rivers.",
    answer_seconds=5.0,
)
