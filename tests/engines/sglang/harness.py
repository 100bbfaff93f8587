"""SGLang on a machine without a GPU: environment, flags, and the model as it wants it."""

from __future__ import annotations

import asyncio
import importlib.util
import os
import shlex
import sys
from pathlib import Path

import pytest

from holdfast.engines.sglang import SglangConfig
from tests.support.hf_model import model_directory

STAND_INS = Path(__file__).resolve().parents[2] / "support" / "sglang_stub"
HERE = importlib.util.find_spec("sglang") is not None
NEEDS_SGLANG = pytest.mark.skipif(not HERE, reason="SGLang is not installed here; run make test-sglang")

FLAGS = (
    "--device cpu --dtype float32 --attention-backend torch_native --sampling-backend pytorch --context-length 512 "
    "--max-total-tokens 2048 --max-running-requests 16 --disable-overlap-schedule --load-snapshot-publish-interval 1"
)
ENVIRONMENT = {
    "SGLANG_USE_CPU_ENGINE": "1",
    "SGLANG_EXTERNAL_MODEL_PACKAGE": "only_llama",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "TORCHDYNAMO_DISABLE": "1",  # what it would compile for minutes is a line of arithmetic
    "PYTHONWARNINGS": "ignore",
}


def equip() -> None:
    """Make this process, and those that it starts, fit for SGLang without a GPU."""
    os.environ.update(ENVIRONMENT)
    places = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    if str(STAND_INS) not in places:
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(STAND_INS), *places)))
        sys.path.insert(0, str(STAND_INS))


async def prepare() -> None:
    """Be ready for the first engine of this process."""
    equip()
    await asyncio.to_thread(model_directory, "bfloat16")


def config(*more: str, **settings: object) -> SglangConfig:
    """Return a configuration for a small engine; ``more`` are further flags of SGLang."""
    args = " ".join((FLAGS, shlex.join(more)))
    return SglangConfig(model=str(model_directory("bfloat16")), args=args, **settings)  # type: ignore[arg-type]
