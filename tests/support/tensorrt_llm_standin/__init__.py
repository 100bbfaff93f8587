"""Puts the stand-in in the place of ``tensorrt_llm`` for a test; nothing of it is left afterwards."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

OFFERED: dict[bytes, list[int]] = {}
"""KV blocks that prefill legs hold, by their state; every engine of this process sees them."""
PLACE = Path(__file__).resolve().parent


@contextmanager
def installed() -> Iterator[None]:
    """Let ``import tensorrt_llm`` find the stand-in."""
    _forget()
    sys.path.insert(0, str(PLACE))
    try:
        yield
    finally:
        sys.path.remove(str(PLACE))
        _forget()


def _forget() -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "tensorrt_llm"]:
        del sys.modules[name]
