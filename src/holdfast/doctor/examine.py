"""All looks together, in the order in which a person would take them. Must never change anything."""

from __future__ import annotations

import platform
import sys
from pathlib import Path

import msgspec

from holdfast import __version__
from holdfast.base.errors import HoldfastError
from holdfast.doctor.engines import environments, look_at_engines
from holdfast.doctor.finding import Finding, Level
from holdfast.doctor.machine import (
    available_memory,
    look_at_gpus,
    look_at_limits,
    look_at_memory,
    look_at_ports,
)
from holdfast.doctor.model import Size, look_at_model, memory_needed
from holdfast.engines.llamacpp.weights import packaged_weights
from holdfast.kv import kernel
from holdfast.requests import express

GPU_ONLY = ("trtllm",)
OLDEST_PYTHON = (3, 11)


class Wish(msgspec.Struct, frozen=True):
    """What is to be run here; everything may be left open."""

    engine: str = ""
    model: str = ""
    context_length: int = 0
    """0: the model's own."""
    sequences: int = 1
    """At once."""
    pythons: tuple[Path, ...] = ()
    """Environments to ask; none: this one and those beside the current directory."""
    load: bool = True
    """Import the engines, which takes seconds each."""
    ports: dict[str, tuple[str, int]] = {}


def look_at_base() -> list[Finding]:
    """Return what this program runs on."""
    text = f"holdfast {__version__}, Python {platform.python_version()}, {platform.system()} {platform.machine()}"
    if sys.version_info < OLDEST_PYTHON:
        return [Finding("base", "problem", text, "Python 3.11 or newer is needed.")]
    return [Finding("base", "ok", text), *map(_compiled, _COMPILED)]


_COMPILED = (
    ("The prefix index", kernel.__name__, kernel.UNAVAILABLE, "routing by caches takes several times the CPU"),
    ("The short way of tokens", express.__name__, express.UNAVAILABLE, "a streamed token takes a sixth more CPU"),
)
"""What there is in C beside Python: name, module, why it is not there, what that costs."""


def _compiled(part: tuple[str, str, str, str]) -> Finding:
    what, module, missing, cost = part
    facts = {"module": module, "compiled": not missing}
    if not missing:
        return Finding("base", "ok", f"{what} is compiled.", "", facts)
    fix = "Install a C compiler (gcc), then install holdfast again."
    return Finding("base", "note", f"{what} runs in Python, and {cost}: {missing}.", fix, facts)


def examine_engines(wish: Wish) -> list[Finding]:
    """Return everything about engines: packages, GPUs, model files, memory."""
    pythons = environments(list(wish.pythons), Path.cwd())
    findings = look_at_engines(pythons, load=wish.load, only=wish.engine)
    gpus, said = look_at_gpus(needed=wish.engine in GPU_ONLY)
    findings += said
    size, said = _model(wish)
    findings += said
    needed = memory_needed(size, context=wish.context_length, sequences=wish.sequences) if size is not None else 0
    what = f"Weights and the KV cache of {wish.sequences} sequence{'s' * (wish.sequences != 1)}"
    available = sum(gpu.free for gpu in gpus) or available_memory()
    return findings + look_at_memory(needed, what, available) + look_at_limits()


def _model(wish: Wish) -> tuple[Size | None, list[Finding]]:
    """Return the model that is meant: the one named, or the embedded engine's own."""
    if wish.model:
        return look_at_model(wish.model)
    if wish.engine not in ("", "llamacpp"):
        return None, []
    try:
        return look_at_model(str(packaged_weights()))
    except HoldfastError as error:
        level: Level = "problem" if wish.engine else "note"
        return None, [Finding("model", level, error.message, "See the sentence itself.")]


def examine(wish: Wish) -> list[Finding]:
    """Return everything: the base, the engines, the ports."""
    return [*look_at_base(), *examine_engines(wish), *look_at_ports(wish.ports)]
