# ruff: noqa: RUF001 - many scripts on purpose
"""Encoding in pieces equals encoding whole; bounds hold; bad input has its own errors."""

from __future__ import annotations

import json
import random
import threading
import time

import pytest
from tokenizers import Tokenizer as HfTokenizer
from tokenizers import processors

from holdfast.base.errors import ContextLengthExceeded, InternalError, InvalidRequest, PayloadTooLarge
from holdfast.models.gguf import _PATTERNS, _pre_tokenizer
from holdfast.text.chunked import PIECE_CHARS, pieces
from holdfast.text.tokenizer import Tokenizer
from tests.patience import within

from .conftest import CORPUS, small_json


def noise(rng: random.Random, size: int) -> str:
    parts = [
        *CORPUS,
        " " * 40,
        "\n" * 7,
        "x" * 300,
        "a1B2c3==",
        "<|im_end|>",
        "12345678901234",
        " \n \n",
        "漢" * 50,
        "’s",
    ]
    out: list[str] = []
    while sum(map(len, out)) < size:
        out.append(rng.choice(parts))
    return "".join(out)


def test_pieces_tokenize_as_the_whole(tokenizer: Tokenizer) -> None:
    rng = random.Random(5)
    for _ in range(4):
        text = noise(rng, 6 * PIECE_CHARS)
        cut = list(pieces(tokenizer._hf, tokenizer._ids, text))
        assert len(cut) > 3
        assert "".join(cut) == text
        assert tokenizer.encode(text).tolist() == tokenizer._hf.encode(text, add_special_tokens=False).ids


PATTERNS = {**_PATTERNS, "pairs": (r"\p{N}{1,2}|\p{L}+|\s+(?!\S)|\s|[^\s\p{L}\p{N}]+",)}


@pytest.mark.parametrize("name", sorted(PATTERNS))
def test_pieces_for_every_pre_tokenizer_we_know(name: str) -> None:
    spec = json.loads(small_json())
    spec["pre_tokenizer"] = _pre_tokenizer(PATTERNS[name])
    vocab, merges = spec["model"]["vocab"], spec["model"]["merges"]
    for left, right in [("7", "7"), ("77", "7"), (".", "."), ("..", "."), ("Ġ", "Ġ"), ("ĠĠ", "ĠĠ")]:  # lengths matter
        vocab.setdefault(left + right, max(*vocab.values(), *(a["id"] for a in spec["added_tokens"])) + 1)
        merges += [] if [left, right] in merges else [[left, right]]
    tok = Tokenizer(json.dumps(spec).encode())
    rng = random.Random(name)
    for _ in range(3):
        text = noise(rng, 4 * PIECE_CHARS)
        assert len(list(pieces(tok._hf, tok._ids, text))) > 2
        assert tok.encode(text).tolist() == tok._hf.encode(text, add_special_tokens=False).ids
    for unit in (
        "7",
        "0123456789",
        " ",
        " \n",
        "\r\n\t",
        "fooBar",
        "漢",
        "...",
        "'s",
        "a1",
        "1 ",
        "-=",
        "é\u0301",
        "ⅷ",
    ):
        text = ("x" + unit * (3 * PIECE_CHARS))[: 3 * PIECE_CHARS + 77]
        assert tok.encode(text).tolist() == tok._hf.encode(text, add_special_tokens=False).ids, unit


@pytest.mark.parametrize("unit", ["a", " ", "漢", "\n", "é1", "aGVsbG8gd29ybGQ", "0", "😀"])
def test_monotonous_texts(tokenizer: Tokenizer, unit: str) -> None:
    text = unit * (4 * PIECE_CHARS // len(unit))
    assert tokenizer.encode(text).tolist() == tokenizer._hf.encode(text, add_special_tokens=False).ids


def test_special_tokens_around_a_large_text() -> None:
    hf = HfTokenizer.from_buffer(small_json())
    hf.post_processor = processors.TemplateProcessing(
        single="<|im_start|> $A <|im_end|>",
        special_tokens=[("<|im_start|>", hf.token_to_id("<|im_start|>")), ("<|im_end|>", hf.token_to_id("<|im_end|>"))],
    )
    tok = Tokenizer(hf.to_str().encode())
    text = "word and word " * PIECE_CHARS
    assert tok.encode(text, add_special_tokens=True).tolist() == hf.encode(text).ids


def test_lower_bound_holds_and_is_used(tokenizer: Tokenizer) -> None:
    for text in [*CORPUS, " " * 4_000, "a" * 999, "<|im_end|>" * 50, "\x04\x06\x13\x14" * 99, "\U00050000" * 9]:
        count = len(tokenizer.encode(text))
        assert tokenizer.at_least_tokens(len(text.encode())) <= count
        assert tokenizer.floor_tokens(text, 3) <= count
    assert tokenizer.floor_tokens(CORPUS[0] * 100, 3) > 3
    start = time.process_time()
    for text in ("x" * 20_000_000, " hello world, you" * 100_000, "\x04" * 10_000_000 + "x" * 10_000_000):
        with pytest.raises(ContextLengthExceeded, match="at least"):
            tokenizer.encode(text, max_tokens=8_192)
    assert time.process_time() - start < 1.0


def test_bound_without_text_needs_the_whole_alphabet(small_tokenizer: Tokenizer) -> None:
    assert small_tokenizer.at_least_tokens(0) == 0
    assert small_tokenizer.at_least_tokens(1) == 1
    assert small_tokenizer.at_least_tokens(10 * small_tokenizer.max_token_bytes + 1) == 11
    spec = json.loads(small_json())
    del spec["model"]["vocab"]["ÿ"]
    assert Tokenizer(json.dumps(spec).encode()).at_least_tokens(10**9) == 0


def test_no_bound_where_bytes_may_vanish(fallback_tokenizer: Tokenizer) -> None:
    assert fallback_tokenizer.at_least_tokens(10**9) == 0
    spec = json.loads(small_json())
    spec["added_tokens"][0]["rstrip"] = True
    assert Tokenizer(json.dumps(spec).encode()).at_least_tokens(10**9) == 0
    spec = json.loads(small_json())
    spec["normalizer"] = {"type": "NFC"}
    assert Tokenizer(json.dumps(spec).encode()).at_least_tokens(10**9) == 0


def test_bound_with_unicode_normalization_counts_ascii_only() -> None:
    spec = json.loads(small_json())
    spec["normalizer"] = {"type": "NFC"}
    tok = Tokenizer(json.dumps(spec).encode())
    for text in ("e\u0301" * 500, "\u1100\u1161\u11a8" * 500, "A\u030a B" * 500, "plain ascii " * 500):
        assert tok.floor_tokens(text, 1) <= len(tok.encode(text))
    assert tok.floor_tokens("plain ascii " * 500, 1) > 1
    assert tok.floor_tokens("\u1100\u1161\u11a8" * 500, 1) == 0


def test_what_cannot_be_cut_is_bounded(
    small_tokenizer: Tokenizer, fallback_tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("holdfast.text.tokenizer.UNSPLIT_TEXT_CHARS", 100_000)
    text = "hello world. " * 20_000
    assert len(small_tokenizer.encode(text)) > 20_000
    with pytest.raises(PayloadTooLarge, match="100000"):
        small_tokenizer.encode("x" * 200_000)
    with pytest.raises(PayloadTooLarge):
        fallback_tokenizer.encode(text)


def test_max_tokens_is_exact_at_the_border(tokenizer: Tokenizer) -> None:
    count = len(tokenizer.encode("hello world"))
    assert len(tokenizer.encode("hello world", max_tokens=count)) == count
    with pytest.raises(ContextLengthExceeded) as caught:
        tokenizer.encode("hello world", max_tokens=count - 1)
    assert caught.value.details == {"limit": count - 1, "actual": count}


def test_padding_and_truncation_of_the_file_are_switched_off() -> None:
    hf = HfTokenizer.from_buffer(small_json())
    hf.enable_truncation(4)
    hf.enable_padding(length=64)
    tok = Tokenizer(hf.to_str().encode())
    assert (
        tok.encode("hello world, this is long").tolist()
        == Tokenizer(small_json()).encode("hello world, this is long").tolist()
    )


def test_bad_input(small_tokenizer: Tokenizer) -> None:
    with pytest.raises(InvalidRequest, match="surrogate"):
        small_tokenizer.encode("a\ud800")
    for at in range(PIECE_CHARS - 300, PIECE_CHARS + 300, 50):
        with pytest.raises(InvalidRequest, match="surrogate"):
            small_tokenizer.encode("a b" * at + "\udfff" + "x" * PIECE_CHARS)
        with pytest.raises(InvalidRequest, match="surrogate"):
            small_tokenizer.encode("1" * at + "\udfff" + "1" * PIECE_CHARS)
    for data in (b"", b"{}", b'{"model": {"type": "BPE"}}', b"\xff"):
        with pytest.raises(InternalError, match=r"tokenizer\.json"):
            Tokenizer(data)


def test_pieces_ids_and_bytes(tokenizer: Tokenizer) -> None:
    token = tokenizer.encode(" the").tolist()[0]
    assert tokenizer.id_to_piece(token) == "Ġthe"
    assert tokenizer.piece_to_id("Ġthe") == token
    assert tokenizer.token_bytes(token) == b" the"
    assert tokenizer.token_text(token) == " the"
    assert tokenizer.id_to_piece(tokenizer.vocab_size) is None
    assert tokenizer.token_bytes(tokenizer.vocab_size + 5) == b""
    end = tokenizer.piece_to_id("<|im_end|>")
    assert end is not None
    assert tokenizer.is_special(end)
    assert tokenizer.token_bytes(end) == b"<|im_end|>"
    text = "漢字 ü 😀"
    ids = tokenizer.encode(text)
    assert b"".join([tokenizer.token_bytes(i) for i in ids]) == text.encode()
    assert all(tokenizer.max_token_bytes >= len(tokenizer.token_bytes(i)) for i in range(tokenizer.vocab_size))


def test_token_bytes_with_byte_fallback(fallback_tokenizer: Tokenizer) -> None:
    tok = fallback_tokenizer
    assert tok.token_bytes(tok.piece_to_id("<0xE6>") or 0) == b"\xe6"
    assert tok.token_bytes(tok.piece_to_id("▁hello") or 0) == b" hello"


def test_a_thread_encodes_beside_the_loop(small_tokenizer: Tokenizer) -> None:
    text = "the quick brown fox " * 60_000
    gaps: list[float] = []
    worker = threading.Thread(target=small_tokenizer.encode, args=(text,))
    last = time.perf_counter()
    worker.start()
    while worker.is_alive():
        worker.join(0.001)
        now = time.perf_counter()
        gaps.append(now - last)
        last = now
    assert len(gaps) > 20
    assert sorted(gaps)[len(gaps) // 2] < within(0.02)
