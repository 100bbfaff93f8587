"""Engines for the tests with the real vLLM. They take their time to start, so the tests of a file share one.

On a GPU: ``HOLDFAST_VLLM_DEVICE="NVIDIA H200" HOLDFAST_VLLM_FLAGS="--gpu-memory-utilization 0.1"``, in an environment
with vLLM for CUDA.
"""

from __future__ import annotations

import importlib.util
import os

import pytest

INSTALLED = importlib.util.find_spec("vllm") is not None
DEVICE = os.environ.get("HOLDFAST_VLLM_DEVICE", "")
"""The accelerator's name, for the records; empty: the CPU."""
MORE_FLAGS = os.environ.get("HOLDFAST_VLLM_FLAGS", "")
"""For vLLM, after those of the tests: a later one wins."""
PROCESSES = 1 if DEVICE else 2
"""That one vLLM starts: on a single GPU its core computes itself."""
REQUIRED = os.environ.get("HOLDFAST_REQUIRE_VLLM", "") == "1"
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "DYN_VLLM_MEMORY_WAIT_SECS": "20",
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked ``vllm`` run where it is installed; where it must be, its absence is a failure."""
    if INSTALLED or REQUIRED:
        return
    why = pytest.mark.skip(reason="vLLM is not installed here; tools/install_vllm.sh and make test-vllm run these")
    for item in items:
        if item.get_closest_marker("vllm") is not None:  # keywords also hold the names of folders
            item.add_marker(why)


@pytest.fixture(scope="session")
def model() -> str:
    """Return the model's directory, in an environment that suits a small machine."""
    from tests.support.hf_model import model_directory  # noqa: PLC0415

    os.environ.update({name: os.environ.get(name, value) for name, value in ENVIRONMENT.items()})
    return str(model_directory())
