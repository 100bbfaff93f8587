"""Reads headers of safetensors files: which tensors, of which shape and type, and whether the file is whole.

Format: 8 bytes length (little-endian), so many bytes JSON ``{name: {"dtype", "shape", "data_offsets"}}``, then the
data (safetensors repository, README). Must never read tensor data.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec

from holdfast.base.errors import InvalidRequest
from holdfast.models.files import check_present, read_json

INDEX = "model.safetensors.index.json"
_HEADER_BYTES = 100_000_000
"""Bound of the format itself."""


class Tensor(msgspec.Struct, frozen=True):
    """One tensor of a file."""

    dtype: str
    """``F32``, ``BF16`` …"""
    shape: tuple[int, ...]
    data_offsets: tuple[int, int]


class Weights(msgspec.Struct, frozen=True):
    """The weight files of a directory."""

    files: tuple[Path, ...]
    bytes: int
    dtype: str = ""
    """Of most tensors, as in ``Tensor.dtype``; empty when unknown."""


def read_header(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file by name.

    Raises:
        InvalidRequest: missing, a Git LFS pointer, another format, or cut short (with sizes).
    """
    size = check_present(path)
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or not 2 <= length <= min(_HEADER_BYTES, size - 8):
            raise InvalidRequest(f"{path} is not a safetensors file, or is cut short ({size} bytes); fetch it again.")
        raw = file.read(length)
    try:
        described: dict[str, Any] = json.loads(raw)
        described.pop("__metadata__", None)
        tensors = msgspec.convert(described, dict[str, Tensor])
    except (ValueError, AttributeError) as error:
        raise InvalidRequest(f"{path} has a damaged safetensors header ({error}); fetch it again.") from error
    expected = 8 + length + max((t.data_offsets[1] for t in tensors.values()), default=0)
    if size < expected:
        raise InvalidRequest(f"{path} is cut short: {size} of {expected} bytes; fetch it again.")
    return tensors


def read_weights(directory: Path) -> Weights:
    """Return the weights of a model directory after checking that all shards are there and whole.

    Raises:
        InvalidRequest: a shard is missing or damaged (names it), or there are no weights at all.
    """
    index = directory / INDEX
    if index.exists():
        files = _indexed(directory, index)
    elif (directory / "model.safetensors").exists() or (directory / "model.safetensors").is_symlink():
        files = [directory / "model.safetensors"]
    else:
        files = sorted(directory.glob("*.safetensors"))
    return _measured(files) if files else _other_formats(directory)


def _indexed(directory: Path, index: Path) -> list[Path]:
    shards = read_json(index).get("weight_map")
    if not isinstance(shards, dict) or not shards:
        raise InvalidRequest(f"{index} names no shards (weight_map); fetch it again.")
    names = sorted({str(name) for name in shards.values()})
    missing = [name for name in names if not (directory / name).exists()]
    if missing:
        shown = ", ".join(missing[:3]) + (" …" if len(missing) > 3 else "")
        raise InvalidRequest(
            f"{directory} lacks {len(missing)} of {len(names)} weight files: {shown}. The download did not finish; "
            f"run it again."
        )
    return [directory / name for name in names]


def _measured(files: list[Path]) -> Weights:
    counts: dict[str, int] = {}
    for path in files:
        for tensor in read_header(path).values():
            counts[tensor.dtype] = counts.get(tensor.dtype, 0) + 1
    total = sum(path.stat().st_size for path in files)
    return Weights(tuple(files), total, max(counts, key=lambda name: (counts[name], name), default=""))


def _other_formats(directory: Path) -> Weights:
    """Accept PyTorch's own format, which only engines can check; explain what else was found."""
    files = sorted(directory.glob("pytorch_model*.bin"))
    if files:
        return Weights(tuple(files), sum(check_present(path) for path in files))
    gguf = sorted(directory.glob("*.gguf"))
    if gguf:
        raise InvalidRequest(f"{directory} has GGUF weights; serve {gguf[0].name} with --engine llamacpp.")
    raise InvalidRequest(f"{directory} has no weights (*.safetensors); the download did not finish, run it again.")
