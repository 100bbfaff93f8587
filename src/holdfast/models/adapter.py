"""Reads a LoRA adapter directory in the form of PEFT, and checks it before an engine is bothered with it.

Must never import an engine library or ``peft``.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import msgspec

from holdfast.base.errors import InvalidRequest, UnsupportedFeature
from holdfast.models.files import check_present, read_json
from holdfast.models.safetensors import Tensor, read_header

CONFIG, WEIGHTS, OLD_WEIGHTS = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
_FROM_HIDDEN = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
"""Modules that take the hidden state, so that their adapters show the size of the base model's."""


class AdapterDirectory(msgspec.Struct, frozen=True):
    """What an adapter directory says about itself."""

    path: Path
    base_model: str
    """Name or path that it was made for, as its authors wrote it; may be empty."""
    rank: int
    """The largest of its modules."""
    alpha: float
    target_modules: tuple[str, ...]
    weight_bytes: int


def read_adapter(path: Path, *, hidden_size: int = 0, max_rank: int = 0) -> AdapterDirectory:
    """Return what the directory says, after checking that it is complete.

    Args:
        path: as `models.files.locate` found it.
        hidden_size: of the base model, to refuse adapters of another; 0: unknown.
        max_rank: largest rank that the engine was started for; 0: unknown.

    Raises:
        InvalidRequest: files are missing or damaged, the rank is too large, or it was made for another model.
        UnsupportedFeature: another kind of adapter than LoRA.
    """
    if not (path / CONFIG).exists():
        raise InvalidRequest(f"{path} has no {CONFIG}, so it is no adapter directory; name the one that has it.")
    config = read_json(path / CONFIG)
    _check_kind(path, config)
    tensors = _tensors(path)
    rank = max([_integer(config.get("r")), *(_integer(r) for r in (config.get("rank_pattern") or {}).values())])
    if rank < 1:
        raise InvalidRequest(f"{path / CONFIG} says rank r={config.get('r')!r}; it must be at least 1.")
    if max_rank and rank > max_rank:
        raise InvalidRequest(f"The adapter {path} has rank {rank}; this engine was started for at most {max_rank}.")
    _check_shapes(path, tensors, rank, hidden_size)
    modules = config.get("target_modules") or ()
    return AdapterDirectory(
        path=path,
        base_model=str(config.get("base_model_name_or_path") or ""),
        rank=rank,
        alpha=float(config.get("lora_alpha") or rank),
        target_modules=(modules,) if isinstance(modules, str) else tuple(sorted(str(one) for one in modules)),
        weight_bytes=_weights(path).stat().st_size,
    )


def content_hash(path: Path) -> str:
    """Return the SHA-256 of an adapter's configuration and weights in hex; reads all of them."""
    whole = hashlib.sha256()
    for file in (path / CONFIG, _weights(path)):
        with file.open("rb") as opened:
            whole.update(hashlib.file_digest(opened, "sha256").digest())
    return whole.hexdigest()


def _check_kind(path: Path, config: dict[str, Any]) -> None:
    kind = str(config.get("peft_type", "LORA"))
    if kind.upper() != "LORA":
        raise UnsupportedFeature(f"The adapter {path} is of kind {kind}; engines load only LORA.")
    if config.get("use_dora"):
        raise UnsupportedFeature(f"The adapter {path} uses DoRA (use_dora), which engines do not load.")


def _weights(path: Path) -> Path:
    return path / OLD_WEIGHTS if not (path / WEIGHTS).exists() and (path / OLD_WEIGHTS).exists() else path / WEIGHTS


def _tensors(path: Path) -> dict[str, Tensor]:
    file = _weights(path)
    if file.name == OLD_WEIGHTS:  # a pickle, which only the engine may open
        check_present(file)
        return {}
    tensors = read_header(file)
    if not any(".lora_A." in name or ".lora_B." in name or ".lora_embedding_" in name for name in tensors):
        raise InvalidRequest(f"{file} holds no LoRA tensors (…lora_A.weight); it is something else. Fetch it again.")
    return tensors


def _check_shapes(path: Path, tensors: dict[str, Tensor], rank: int, hidden_size: int) -> None:
    for name, tensor in tensors.items():
        if not name.endswith(".lora_A.weight") or len(tensor.shape) != 2:
            continue
        if tensor.shape[0] > rank:
            raise InvalidRequest(
                f"{path}: {name} has rank {tensor.shape[0]}, and {CONFIG} says {rank}; they do not match."
            )
        module = name.removesuffix(".lora_A.weight").rpartition(".")[2]
        if hidden_size and module in _FROM_HIDDEN and tensor.shape[1] != hidden_size:
            raise InvalidRequest(
                f"The adapter {path} was made for a model with hidden size {tensor.shape[1]} ({name}); this model's is "
                f"{hidden_size}. Load an adapter of this base model."
            )


def _integer(value: Any) -> int:
    return value if isinstance(value, int) and not isinstance(value, bool) else 0
