"""TensorRT-LLM on its stand-in: the adapter is tested, not the engine."""

from __future__ import annotations

from holdfast.engines.contract import Engine
from tests.engines.conformance.subject import CHAT, Subject
from tests.engines.trtllm.standin import OnStandIn, engine


def kill(made: Engine) -> None:
    """Leave the mark that the real executor leaves when a rank has died; its streams hang."""
    assert isinstance(made, OnStandIn)
    made.llm._executor._fatal_error = RuntimeError("a rank has died")


SUBJECT = Subject(
    name="trtllm",
    make=engine,
    kill=kill,
    where="in-process, against a stand-in of its API",
    stand_in="The adapter ran against a stand-in that implements the called part of TensorRT-LLM's API; the engine "
    "itself has never run with it, on no hardware.",
    prompts=CHAT,
    ending="Tell me about rivers.",
    start_seconds=5.0,
    answer_seconds=6.0,
    in_flight=2,
    packages=("tensorrt_llm",),
)
