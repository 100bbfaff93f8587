"""TensorRT-LLM: on its stand-in, unless the package is there and ``HOLDFAST_TRTLLM_MODEL`` names a model for it."""

from __future__ import annotations

import importlib.util
import json
import os
import signal

from holdfast.engines.contract import Engine
from holdfast.engines.trtllm import TrtllmConfig, TrtllmEngine
from tests.engines.conformance.subject import CHAT, Subject
from tests.engines.trtllm.standin import engine

MODEL = os.environ.get("HOLDFAST_TRTLLM_MODEL", "")
REAL = bool(MODEL) and importlib.util.find_spec("tensorrt_llm") is not None


def leave_mark(made: Engine) -> None:
    """Leave the mark that the real executor leaves when a rank has died; its streams hang."""
    assert isinstance(made, TrtllmEngine)
    made.llm._executor._fatal_error = RuntimeError("a rank has died")


def kill_rank(made: Engine) -> None:
    """Kill the process that computes."""
    os.kill(made.child_pids()[-1], signal.SIGKILL)


def make_real() -> TrtllmEngine:
    overrides = {"kv_cache_config": {"max_tokens": 3072}}
    return TrtllmEngine(
        TrtllmConfig(model=MODEL, context_length=512, max_num_seqs=16, override_engine_args=json.dumps(overrides))
    )


STAND_IN = Subject(
    name="trtllm",
    make=engine,
    kill=leave_mark,
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
SUBJECT = (
    Subject(
        name="trtllm",
        make=make_real,
        kill=kill_rank,
        where=f"GPU, {os.path.basename(MODEL)}",  # noqa: PTH119  a name, not a place
        start_seconds=600.0,
        answer_seconds=60.0,
        in_flight=2,
        packages=("tensorrt_llm", "torch"),
    )
    if REAL
    else STAND_IN
)
