"""Waits until the memory that a predecessor held is free again.

A worker that is restarted after a crash is quicker than the kernel and the GPU's driver: vLLM then finds its memory
taken, and gives up. Must never refuse a start: when the wait is over, vLLM itself says what is missing.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import msgspec

log = logging.getLogger(__name__)

INTERVAL = 0.25
_CPU_OVERHEAD = 1 << 30
"""Bytes that vLLM's processes take on the CPU beside weights and KV cache (measured: two processes, 0.5 GB each)."""


class Device(msgspec.Struct, frozen=True):
    """Memory of one place, in bytes."""

    name: str
    free: int
    needed: int


Reader = Callable[[], list[Device]]


def host_memory(weights: int, kv_bytes: int) -> list[Device]:
    """Return what the host has left, against what vLLM on the CPU needs."""
    free = 0
    with contextlib.suppress(OSError, ValueError):
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                free = int(line.split()[1]) * 1024
    return [Device("host memory", free, weights + kv_bytes + _CPU_OVERHEAD)] if free else []


def gpu_memory(share: float, devices: int) -> list[Device]:
    """Return what the first GPUs have left, against vLLM's share of each (``--gpu-memory-utilization``)."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    command = [program, "--query-gpu=index,memory.free,memory.total", "--format=csv,noheader,nounits"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout
        rows = [[int(cell) for cell in line.split(",")] for line in said.splitlines() if line.strip()]
    except (OSError, ValueError, subprocess.SubprocessError):
        return []
    return [Device(f"GPU {index}", free << 20, int((total << 20) * share)) for index, free, total in rows[:devices]]


async def until_free(read: Reader, seconds: float) -> bool:
    """Wait until every place has what is needed.

    Args:
        read: returns the places; may block.
        seconds: bound on the wait.

    Returns:
        False when the time was over first, which is logged.
    """
    loop = asyncio.get_running_loop()
    until = loop.time() + seconds
    said = False
    while True:
        lacking = [place for place in await asyncio.to_thread(read) if place.free < place.needed]
        if not lacking:
            return True
        if not said:
            log.info("waiting up to %g s for memory that a predecessor may still hold: %s", seconds, _words(lacking))
            said = True
        if loop.time() >= until:
            log.warning("vLLM is started although memory is short: %s", _words(lacking))
            return False
        await asyncio.sleep(INTERVAL)


def _words(places: list[Device]) -> str:
    return "; ".join(
        f"{place.name} has {place.free / 1e9:.1f} GB free, {place.needed / 1e9:.1f} GB are needed" for place in places
    )
