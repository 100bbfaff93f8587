"""SGLang on a machine without a GPU: environment, flags, and the model as it wants it."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import os
import shlex
import sys
from pathlib import Path

import pytest

from holdfast.engines.sglang import SglangConfig
from tests.patience import within
from tests.support.hf_model import model_directory

STAND_INS = Path(__file__).resolve().parents[2] / "support" / "sglang_stub"
HERE = importlib.util.find_spec("sglang") is not None or "HOLDFAST_REQUIRE_SGLANG" in os.environ
"""Where it must be there and is not, tests fail instead of being skipped."""
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


SLOW_MACHINE = {"DYN_SGLANG_HANDOFF_TIMEOUT_SECS": "60", "DYN_HANDOFF_TIMEOUT_SECS": "90"}
"""For clusters: blocks that are late because others use the machine too are no fault."""


def search_path() -> str:
    """Return ``PYTHONPATH`` for its processes: the stand-ins before whatever is there."""
    places = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    return os.pathsep.join((str(STAND_INS), *(place for place in places if place and place != str(STAND_INS))))


def equip() -> None:
    """Make this process, and those that it starts, fit for SGLang without a GPU."""
    os.environ.update(ENVIRONMENT)
    os.environ["PYTHONPATH"] = search_path()
    if str(STAND_INS) not in sys.path:
        sys.path.insert(0, str(STAND_INS))


async def prepare() -> None:
    """Be ready for the first engine of this process."""
    equip()
    await asyncio.to_thread(model_directory, "bfloat16")


def config(*more: str, **settings: object) -> SglangConfig:
    """Return a configuration for a small engine; ``more`` are further flags of SGLang."""
    args = " ".join((FLAGS, shlex.join(more)))
    return SglangConfig(model=str(model_directory("bfloat16")), args=args, **settings)  # type: ignore[arg-type]


def children(pid: int) -> dict[int, str]:
    """Return the processes below one, with their command lines."""
    found: dict[int, str] = {}
    for tasks in Path("/proc").glob(f"{pid}/task/*/children"):
        for child in map(int, tasks.read_text().split()):
            with contextlib.suppress(OSError):
                found[child] = Path(f"/proc/{child}/cmdline").read_bytes().replace(b"\0", b" ").decode()
                found |= children(child)
    return found


def lives(pid: int) -> bool:
    """Whether a process is there, and not only its remains."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[0] != b"Z"
    return False


async def gone(*pids: int, seconds: float = 10.0) -> None:
    """Wait until none of these processes is there any more."""
    async with asyncio.timeout(within(seconds)):
        while any(lives(pid) for pid in pids):  # noqa: ASYNC110  they are nobody's children here
            await asyncio.sleep(0.05)
