"""Which implementation of the index and of hashing runs here: the compiled kernel where there is one, else the twin.

Both give the same answers, so the choice is about speed only. Must never choose differently in one process without
being told to.
"""

from __future__ import annotations

from typing import Literal

from holdfast.kv import kernel
from holdfast.kv.index import PrefixIndex
from holdfast.kv.twin import TwinIndex

Implementation = Literal["kernel", "python"]


def implementation() -> Implementation:
    """Return what runs in this process."""
    return "python" if kernel.UNAVAILABLE else "kernel"


def describe() -> str:
    """Return one line for logs and `holdfast config`: what runs, and why when it is the slower one."""
    if kernel.UNAVAILABLE:
        return f"KV index and hashing: Python implementation (about ten times slower) because {kernel.UNAVAILABLE}"
    return "KV index and hashing: compiled kernel"


def new_index(*, limit: int = 0, use: Implementation | None = None) -> PrefixIndex:
    """Return an empty index.

    Args:
        limit: most distinct blocks it may hold (at least 2), 0 for no limit; see `holdfast.kv.index`.
        use: which implementation; None for `implementation()`.

    Raises:
        RuntimeError: the kernel is asked for by name and there is none.
    """
    if (use or implementation()) == "python":
        return TwinIndex(limit=limit)
    if kernel.UNAVAILABLE:
        raise RuntimeError(f"no compiled KV index: {kernel.UNAVAILABLE}")
    return kernel.KernelIndex(limit=limit)
