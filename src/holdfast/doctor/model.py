"""Whether a model's files are complete, and how much memory it takes. Reads headers only, never the weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec

from holdfast.base.errors import HoldfastError
from holdfast.doctor.finding import Finding
from holdfast.models.files import locate
from holdfast.models.gguf import read_metadata
from holdfast.models.hf import read_directory

GIB = 1 << 30
_BYTES = {"float64": 8, "float32": 4, "float8_e4m3fn": 1, "int8": 1}
DEFAULT_BYTES = 2


class Size(msgspec.Struct, frozen=True):
    """What a model takes, in bytes."""

    weights: int
    kv_per_token: int
    """0: its files do not say."""
    context_length: int


def look_at_model(name: str) -> tuple[Size | None, list[Finding]]:
    """Return a model's size and what is wrong with its files.

    Args:
        name: a GGUF file, a Hugging Face directory, or a name in the Hugging Face cache.
    """
    try:
        size, text = _gguf(Path(name)) if name.endswith(".gguf") else _directory(name)
    except HoldfastError as error:
        return None, [Finding("model", "problem", error.message, "Do what the sentence says; nothing is downloaded.")]
    except (OSError, ValueError, KeyError) as error:
        return None, [Finding("model", "problem", f"{name} cannot be read: {error}", "Download it again.")]
    facts = {"weights": size.weights, "kv_per_token": size.kv_per_token, "context_length": size.context_length}
    return size, [Finding("model", "ok", text, "", facts)]


def memory_needed(size: Size, *, context: int, sequences: int) -> int:
    """Return the bytes for weights and the KV cache of so many sequences of so many tokens."""
    return size.weights + size.kv_per_token * min(context or size.context_length, size.context_length) * sequences


def _directory(name: str) -> tuple[Size, str]:
    path = locate(name)
    found = read_directory(path)
    config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    size = Size(found.weights.bytes, _kv_bytes(config, found.dtype), found.text.context_length)
    kind = " ".join(part for part in (found.architecture, found.dtype, found.quantization) if part)
    return size, (
        f"{path} is complete: {kind}, {size.weights / GIB:.2f} GiB, context of {size.context_length} tokens, "
        f"{size.kv_per_token} bytes of KV cache per token"
    )


def _kv_bytes(config: dict[str, Any], dtype: str) -> int:
    """Return bytes per token: two vectors per layer and KV head."""
    inner = config.get("text_config") or config
    heads = int(inner.get("num_attention_heads") or 0)
    layers = int(inner.get("num_hidden_layers") or 0)
    kv_heads = int(inner.get("num_key_value_heads") or heads)
    hidden = int(inner.get("hidden_size") or 0)
    width = int(inner.get("head_dim") or (hidden // heads if heads else 0))
    return 2 * layers * kv_heads * width * _BYTES.get(dtype, DEFAULT_BYTES)


def _gguf(path: Path) -> tuple[Size, str]:
    values = read_metadata(path)
    family = str(values.get("general.architecture", ""))

    def number(key: str) -> int:
        found = values.get(f"{family}.{key}")
        return int(found) if isinstance(found, int) else 0

    heads = number("attention.head_count")
    width = number("attention.key_length") or (number("embedding_length") // heads if heads else 0)
    per_token = 2 * number("block_count") * (number("attention.head_count_kv") or heads) * width * 2
    size = Size(path.stat().st_size, per_token, number("context_length"))
    return size, (
        f"{path} can be read: {family}, {size.weights / GIB:.2f} GiB, context of {size.context_length} tokens, "
        f"{per_token} bytes of KV cache per token (float16)"
    )
