"""Reads what a GGUF file says about text: tokenizer, chat template, special tokens.

Produces a Hugging Face ``tokenizer.json`` that tokenizes as llama.cpp itself does with the same file, so that
frontends need neither the weights nor llama.cpp. Only byte-level BPE is understood; other kinds are refused.

Format: the GGUF specification (ggml repository, ``docs/gguf.md``), versions 2 and 3, little-endian. Only the
metadata at the start of the file is read, never tensor data.

Must never import an engine library.
"""

from __future__ import annotations

import mmap
import struct
from pathlib import Path
from typing import Any

import msgspec

from holdfast.base.errors import InvalidRequest, UnsupportedFeature
from holdfast.models.text_files import TextFiles

Metadata = dict[str, Any]

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_MAX_ITEMS = 1 << 24

# Token types of `tokenizer.ggml.token_type`.
_CONTROL, _USER_DEFINED, _UNKNOWN = 3, 4, 2

_END_TEXTS = frozenset(
    (
        "<|eot_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<|endoftext|>", "<|eom_id|>", "< EOT >",
        "_<EOT>", "<|end_of_text|>", "<|return|>", "<|call|>", "<|flush|>", "<|calls|>", "<turn|>",
    )
)  # fmt: skip
"""Tokens with these texts end a generation, whatever the metadata names as the end of sequence."""


class _Reader:
    """Cursor over the metadata block."""

    def __init__(self, data: mmap.mmap, path: Path):
        self._data = data
        self._path = path
        self._at = 0

    def scalar(self, code: str) -> Any:
        self._need(struct.calcsize(code))
        value = struct.unpack_from("<" + code, self._data, self._at)[0]
        self._at += struct.calcsize(code)
        return value

    def string(self) -> str:
        length = self.scalar("Q")
        self._need(length)
        raw = self._data[self._at : self._at + length]
        self._at += length
        return raw.decode("utf-8", "replace")

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            return self._array()
        if kind not in _SCALARS:
            raise InvalidRequest(f"{self._path}: unknown GGUF value type {kind}; the file is damaged or too new.")
        return self.scalar(_SCALARS[kind])

    def _array(self) -> list[Any]:
        kind, count = self.scalar("I"), self.scalar("Q")
        if count > _MAX_ITEMS:
            raise InvalidRequest(f"{self._path}: a GGUF array claims {count} items; the file is damaged.")
        if kind not in _SCALARS:
            return [self.value(kind) for _ in range(count)]
        size = struct.calcsize(_SCALARS[kind]) * count
        self._need(size)
        values = struct.unpack_from(f"<{count}{_SCALARS[kind]}", self._data, self._at)
        self._at += size
        return list(values)

    def _need(self, size: int) -> None:
        if self._at + size > len(self._data):
            raise InvalidRequest(f"{self._path}: the GGUF metadata ends too early; the file is cut short.")


def read_metadata(path: Path) -> Metadata:
    """Return all key-value metadata of a GGUF file. Raises InvalidRequest when it is not one."""
    with path.open("rb") as file:
        if file.seek(0, 2) < 24:
            raise InvalidRequest(f"{path} is not a GGUF file: only {file.tell()} bytes.")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _read(_Reader(data, path), path)


def _read(reader: _Reader, path: Path) -> Metadata:
    if reader.scalar("4s") != b"GGUF":
        raise InvalidRequest(f"{path} is not a GGUF file: it does not start with 'GGUF'.")
    version = reader.scalar("I")
    if version not in (2, 3):
        raise UnsupportedFeature(f"{path} is GGUF version {version}; versions 2 and 3 are supported.")
    reader.scalar("Q")  # number of tensors
    return {reader.string(): reader.value(reader.scalar("I")) for _ in range(reader.scalar("Q"))}


def read_text_files(path: Path) -> TextFiles:
    """Return the text machinery of the model in a GGUF file.

    Raises:
        InvalidRequest: not a GGUF file, or damaged.
        UnsupportedFeature: a tokenizer of another kind than byte-level BPE, or an unknown pre-tokenizer.
    """
    return text_files(read_metadata(path), str(path))


def text_files(metadata: Metadata, source: str) -> TextFiles:
    """Return the text machinery that GGUF metadata describes; ``source`` names it in errors."""
    tokens: list[str] = metadata.get("tokenizer.ggml.tokens", [])
    if not tokens:
        raise UnsupportedFeature(f"{source} carries no tokenizer; convert the model again, with its vocabulary.")
    architecture = metadata.get("general.architecture", "")
    return TextFiles(
        tokenizer_json=msgspec.json.encode(tokenizer_spec(metadata, source)),
        chat_template=metadata.get("tokenizer.chat_template", ""),
        bos_token=_named(metadata, tokens, "bos"),
        eos_token=_named(metadata, tokens, "eos"),
        eos_token_ids=_end_ids(metadata, tokens),
        context_length=int(metadata.get(f"{architecture}.context_length", 0)),
        vocab_size=len(tokens),
        generation_config=_generation_config(metadata),
    )


def _named(metadata: Metadata, tokens: list[str], name: str) -> str:
    token = metadata.get(f"tokenizer.ggml.{name}_token_id")
    return tokens[token] if token is not None and token < len(tokens) else ""


def _end_ids(metadata: Metadata, tokens: list[str]) -> tuple[int, ...]:
    named = {metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")}
    kinds = _kinds(metadata, tokens)
    known = {i for i, text in enumerate(tokens) if text in _END_TEXTS and kinds[i] in (_CONTROL, _USER_DEFINED)}
    return tuple(sorted(known | {i for i in named if i is not None and i < len(tokens)}))


def _generation_config(metadata: Metadata) -> dict[str, Any]:
    names = {"temp": "temperature", "top_p": "top_p", "top_k": "top_k", "min_p": "min_p"}
    found = {name: metadata.get(f"general.sampling.{key}") for key, name in names.items()}
    return {name: value for name, value in found.items() if value is not None}


def _kinds(metadata: Metadata, tokens: list[str]) -> list[int]:
    kinds: list[int] = metadata.get("tokenizer.ggml.token_type", [])
    return kinds if len(kinds) == len(tokens) else [1] * len(tokens)


# Pre-tokenizers: what llama.cpp selects by `tokenizer.ggml.pre` (src/llama-vocab.cpp), in Hugging Face's terms.

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
_WORD = r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = _WORD + r"\p{N}{1,3}" + _REST
_QWEN2 = _WORD + r"\p{N}" + _REST

_PATTERNS: dict[str, tuple[str, ...]] = {
    "gpt2": (_GPT2,),
    "digits": (r"\p{N}", _GPT2),
    "llama3": (_LLAMA3,),
    "qwen2": (_QWEN2,),
    "default": (r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]"),
}
"""Regular expressions applied one after the other, each to the pieces that the one before has cut."""

_PRE = {
    **dict.fromkeys(("gpt-2", "phi-2", "jina-es", "jina-de", "mpt", "olmo", "jais", "trillion", "roberta-bpe"), "gpt2"),
    **dict.fromkeys(("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"), "digits"),
    **dict.fromkeys(("llama3", "llama-v3", "llama-bpe", "falcon3", "dbrx", "smaug-bpe"), "llama3"),
    **dict.fromkeys(("qwen2", "stablelm2", "deepseek-r1-qwen", "hunyuan", "megrez"), "qwen2"),
    "default": "default",
}
_IGNORE_MERGES = frozenset(("llama3", "llama-v3", "llama-bpe", "falcon3"))
_ADDS_BOS = _IGNORE_MERGES


def tokenizer_spec(metadata: Metadata, source: str) -> dict[str, Any]:
    """Return the content of ``tokenizer.json``. Raises UnsupportedFeature as `read_text_files`."""
    kind, pre = metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.pre", "default")
    if kind != "gpt2":
        raise UnsupportedFeature(
            f"{source} has a tokenizer of kind {kind!r}; only byte-level BPE ('gpt2') is supported. "
            "Use a model of the Llama 3, Qwen, SmolLM or GPT-2 families.",
            kind=kind,
        )
    if pre not in _PRE:
        raise UnsupportedFeature(
            f"{source} has the pre-tokenizer {pre!r}, which is not known here; known are: {', '.join(sorted(_PRE))}.",
            pre=pre,
        )
    if metadata.get("tokenizer.ggml.add_space_prefix"):
        raise UnsupportedFeature(f"{source} puts a space before the text (add_space_prefix), which is not supported.")
    tokens: list[str] = metadata["tokenizer.ggml.tokens"]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": _added_tokens(metadata, tokens),
        "normalizer": None,
        "pre_tokenizer": _pre_tokenizer(_PATTERNS[_PRE[pre]]),
        "post_processor": _post_processor(metadata, tokens, pre),
        "decoder": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
        "model": _bpe(metadata, tokens, ignore_merges=pre in _IGNORE_MERGES),
    }


def _bpe(metadata: Metadata, tokens: list[str], *, ignore_merges: bool) -> dict[str, Any]:
    merges = [pair.split(" ", 1) for pair in metadata.get("tokenizer.ggml.merges", [])]
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": ignore_merges,
        "vocab": {text: number for number, text in enumerate(tokens)},
        "merges": merges,
    }


def _added_tokens(metadata: Metadata, tokens: list[str]) -> list[dict[str, Any]]:
    return [
        {
            "id": number,
            "content": tokens[number],
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": kind != _USER_DEFINED,
        }
        for number, kind in enumerate(_kinds(metadata, tokens))
        if kind in (_CONTROL, _USER_DEFINED, _UNKNOWN)
    ]


def _pre_tokenizer(patterns: tuple[str, ...]) -> dict[str, Any]:
    splits: list[dict[str, Any]] = [
        {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
        for pattern in patterns
    ]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    return {"type": "Sequence", "pretokenizers": [*splits, byte_level]}


def _post_processor(metadata: Metadata, tokens: list[str], pre: str) -> dict[str, Any]:
    """Add the start and end markers that llama.cpp would add when asked for special tokens."""
    start = _marker(metadata, tokens, "bos", default=pre in _ADDS_BOS)
    end = _marker(metadata, tokens, "eos", default=False)
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    if not start and not end:
        return byte_level
    pieces = [*start, "A", *end]
    return {
        "type": "TemplateProcessing",
        "single": [_piece(p, 0) for p in pieces],
        "pair": [*(_piece(p, 0) for p in pieces), *(_piece("B" if p == "A" else p, 1) for p in pieces)],
        "special_tokens": {
            text: {"id": text, "ids": [tokens.index(text)], "tokens": [text]} for text in {*start, *end}
        },
    }


def _marker(metadata: Metadata, tokens: list[str], name: str, *, default: bool) -> list[str]:
    text = _named(metadata, tokens, name)
    return [text] if text and metadata.get(f"tokenizer.ggml.add_{name}_token", default) else []


def _piece(name: str, type_id: int) -> dict[str, Any]:
    return {"Sequence" if name in ("A", "B") else "SpecialToken": {"id": name, "type_id": type_id}}
