"""Reads a Hugging Face model directory: configuration, tokenizer, chat template, special tokens, weights.

Produces the same `TextFiles` as `models.gguf` does from a GGUF file. Rules follow what vLLM and SGLang do with the
same files, so that frontend and engine agree on lengths and ends: `get_and_verify_max_len` and
`ModelConfig.try_get_generation_config` in vLLM, `get_context_length` in SGLang.

Must never import an engine library or ``transformers``, and never fetch anything.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec

from holdfast.base.errors import InvalidRequest, UnsupportedFeature
from holdfast.models.files import read_json, read_optional_json, read_whole
from holdfast.models.safetensors import Weights, read_weights
from holdfast.models.template import chat_template
from holdfast.models.text_files import TextFiles

_LENGTHS = (
    "max_position_embeddings",
    "n_positions",
    "max_seq_len",
    "seq_length",
    "max_sequence_length",
    "max_seq_length",
    "seq_len",
    "model_max_length",
    "max_target_positions",
)
_UNSCALED = frozenset(("su", "longrope", "llama3", "mrope", "default", "proportional"))
"""Kinds of rope scaling whose length is in the configuration already."""
_NO_LENGTH = 10**9
"""Tokenizers without a limit of their own say 10^30."""
_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "F8_E4M3": "float8_e4m3fn"}
_TEXT_PARTS = ("text_config", "llm_config", "language_config", "thinker_config")


class ModelDirectory(msgspec.Struct, frozen=True):
    """What a model directory says about itself."""

    path: Path
    architecture: str
    """First of ``architectures``; empty when the configuration names none."""
    dtype: str
    """As the configuration says, else as most tensors are: ``bfloat16`` …; empty when unknown."""
    quantization: str
    """``quant_method``; empty: none."""
    hidden_size: int
    """0 when the configuration does not say."""
    text: TextFiles
    weights: Weights


def read_directory(path: Path) -> ModelDirectory:
    """Return what a directory says, after checking that it is complete.

    Args:
        path: as `models.files.locate` found it.

    Raises:
        InvalidRequest: something is missing or damaged; says what, and what to do.
        UnsupportedFeature: the tokenizer has a form that frontends can't use.
    """
    config = read_json(path / "config.json")
    inner = _text_part(config)
    weights = read_weights(path)
    names = config.get("architectures") or [""]
    declared = inner.get("dtype") or inner.get("torch_dtype") or config.get("dtype") or config.get("torch_dtype")
    return ModelDirectory(
        path=path,
        architecture=str(names[0]),
        dtype=str(declared or _DTYPES.get(weights.dtype, "")).removeprefix("torch."),
        quantization=str((config.get("quantization_config") or {}).get("quant_method", "")),
        hidden_size=_number(inner.get("hidden_size")) or _number(inner.get("n_embd")),
        text=read_text_files(path),
        weights=weights,
    )


def read_text_files(path: Path) -> TextFiles:
    """Return the text machinery of the model in a directory; its weights are not looked at.

    Raises:
        InvalidRequest, UnsupportedFeature: as `read_directory`.
    """
    config, generation = read_json(path / "config.json"), read_optional_json(path / "generation_config.json")
    settings = read_optional_json(path / "tokenizer_config.json")
    inner = _text_part(config)
    raw = read_tokenizer(path)
    vocabulary = _vocabulary(path, raw)
    specials = {**read_optional_json(path / "special_tokens_map.json"), **{k: v for k, v in settings.items() if v}}
    by_id = {number: text for text, number in vocabulary.items()}
    eos = _special(specials.get("eos_token")) or by_id.get(_first(inner.get("eos_token_id")), "")
    return TextFiles(
        tokenizer_json=raw,
        chat_template=chat_template(path, settings),
        bos_token=_special(specials.get("bos_token")) or by_id.get(_first(inner.get("bos_token_id")), ""),
        eos_token=eos,
        eos_token_ids=_end_ids(generation, config, inner, vocabulary.get(eos)),
        context_length=context_length(inner, settings),
        vocab_size=_number(inner.get("vocab_size")) or max(vocabulary.values(), default=-1) + 1,
        generation_config={k: v for k, v in generation.items() if isinstance(v, bool | int | float | str)},
    )


def read_tokenizer(path: Path) -> bytes:
    """Return ``tokenizer.json``. Raises InvalidRequest, or UnsupportedFeature when the tokenizer has another form."""
    file = path / "tokenizer.json"
    if file.exists() or file.is_symlink():
        return read_whole(file)
    other = [name for name in ("tokenizer.model", "tekken.json", "vocab.json", "vocab.txt") if (path / name).exists()]
    if other:
        raise UnsupportedFeature(
            f"{path} has a tokenizer in {other[0]} but no tokenizer.json, which frontends need. Make one with "
            f"transformers: AutoTokenizer.from_pretrained({str(path)!r}).save_pretrained({str(path)!r}).",
        )
    raise InvalidRequest(f"{path} has no tokenizer.json; download the model's tokenizer files too.")


def context_length(config: dict[str, Any], tokenizer_config: dict[str, Any]) -> int:
    """Return the tokens that the model takes, 0 when nothing says.

    The smallest length that the configuration names, stretched by rope scaling where that is not in it already, and
    never more than the tokenizer admits (unless it names an absurd number, which means: no limit).
    """
    named = [length for length in (_number(config.get(key)) for key in _LENGTHS) if length > 0]
    length = min(named, default=0)
    scaling = config.get("rope_scaling") or config.get("rope_parameters") or {}
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    factor = scaling.get("factor")
    if length and kind not in _UNSCALED and isinstance(factor, int | float):
        if kind == "yarn":
            length = _number(scaling.get("original_max_position_embeddings")) or length
        length = int(length * factor)
    admitted = _number(tokenizer_config.get("model_max_length"))
    return min(length, admitted) if length and 0 < admitted < _NO_LENGTH else length


def _end_ids(
    generation: dict[str, Any], config: dict[str, Any], inner: dict[str, Any], tokenizer_end: int | None
) -> tuple[int, ...]:
    """The generation config wins over the model's; the tokenizer's own end ends a generation in any case."""
    for source in (generation, inner, config):
        if (named := source.get("eos_token_id")) is not None:
            ids = named if isinstance(named, list) else [named]
            break
    else:
        ids = []
    ends = {number for number in ids if isinstance(number, int) and number >= 0}
    return tuple(sorted(ends | ({tokenizer_end} if tokenizer_end is not None else set())))


def _vocabulary(path: Path, raw: bytes) -> dict[str, int]:
    """Return the id of each token's text, added tokens included."""
    try:
        spec = json.loads(raw)
        words = spec["model"]["vocab"]
        added = {str(one["content"]): int(one["id"]) for one in spec.get("added_tokens") or ()}
    except (ValueError, KeyError, TypeError) as error:
        raise InvalidRequest(f"{path / 'tokenizer.json'} is damaged ({error}); fetch it again.") from error
    if isinstance(words, list):  # unigram models: [text, score] in the order of their ids
        words = {pair[0]: number for number, pair in enumerate(words)}
    return {**words, **added}


def _text_part(config: dict[str, Any]) -> dict[str, Any]:
    """Models that also see or hear keep what concerns text in a part of its own."""
    for name in _TEXT_PARTS:
        if isinstance(part := config.get(name), dict):
            return _text_part(part) if name == "thinker_config" else {**config, **part}
    return config


def _special(token: Any) -> str:
    """Return the text of a special token, which is a string or an object with ``content``."""
    text = token.get("content", "") if isinstance(token, dict) else token
    return text if isinstance(text, str) else ""


def _first(ids: Any) -> int:
    one = ids[0] if isinstance(ids, list) and ids else ids
    return one if isinstance(one, int) else -1


def _number(value: Any) -> int:
    return int(value) if isinstance(value, int | float) and not isinstance(value, bool) and value < 1e18 else 0
