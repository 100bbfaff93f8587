# ruff: noqa: RUF001 - many scripts on purpose
"""The incremental detokenizer equals whole-text decoding, whatever the ids."""

from __future__ import annotations

import random
import time

import msgspec
import pytest

from holdfast.text.detokenizer import TableDetokenizer, WindowDetokenizer
from holdfast.text.tokenizer import Tokenizer

SNIPPETS = [
    "😀", "漢", "字", "é", "naïve ", "👩‍👩‍👧‍👦", "🇩🇪", '"\\\n\t', "\u2028", "\x00", "\ufffd", "z̷̢", "नि",
    "hello ", " the", "Привет", "مرحبا", "안녕", "ไทย", "<nonspecial é漢>", "<|im_end|>", "𝔘𝔫𝔦", "\x7f\x80ÿ",
]  # fmt: skip


def random_ids(tok: Tokenizer, partial: list[int], rng: random.Random) -> list[int]:
    length, kind = rng.randint(1, 40), rng.random()
    if kind < 0.3:
        return [rng.randrange(tok.vocab_size + 3) for _ in range(length)]
    if kind < 0.6:
        return [rng.choice(partial) if rng.random() < 0.7 else rng.randrange(tok.vocab_size) for _ in range(length)]
    ids = tok.encode("".join(rng.choice(SNIPPETS) for _ in range(length))).tolist()
    if rng.random() < 0.3:
        ids.insert(rng.randrange(len(ids) + 1), rng.randrange(min(tok.vocab_size, 18)))
    return ids


@pytest.mark.parametrize("skip", [True, False])
def test_equals_decode_on_adversarial_ids(tokenizer: Tokenizer, skip: bool) -> None:
    rng = random.Random(7)
    partial = list(tokenizer.tables().partial)
    assert partial
    for _ in range(2_000):
        ids = random_ids(tokenizer, partial, rng)
        want = tokenizer.decode(ids, skip)
        detok = tokenizer.detokenizer(skip)
        assert "".join([detok.step(token) for token in ids]) + detok.finish() == want, ids
        detok = tokenizer.detokenizer(skip)
        out, at = b'"', 0
        while at < len(ids):
            run = ids[at : at + rng.randint(1, 5)]
            out += detok.fragment(run)
            at += len(run)
        out += msgspec.json.encode(detok.finish())[1:-1] + b'"'
        assert out == msgspec.json.encode(want), ids


@pytest.mark.parametrize("text", [s * 3 for s in SNIPPETS] + ["".join(SNIPPETS)])
def test_text_comes_back(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text).tolist()
    detok = tokenizer.detokenizer(skip_special=False)
    got = "".join([detok.step(token) for token in ids]) + detok.finish()
    assert got == tokenizer.decode(ids, skip_special=False)
    # An added token whose characters are all in the byte alphabet is decoded as bytes, by the library as well.
    assert got == text or "é" in text


def test_unfinished_character_is_held_and_ends_as_replacement(small_tokenizer: Tokenizer) -> None:
    ids = small_tokenizer.encode("𝔘").tolist()
    assert len(ids) > 1
    detok = small_tokenizer.detokenizer()
    assert [detok.step(token) for token in ids[:-1]] == [""] * (len(ids) - 1)
    assert detok.finish() == "\ufffd"
    assert detok.finish() == ""
    assert "".join([detok.step(token) for token in ids]) == "𝔘"


def test_kept_special_tokens_are_shown(small_tokenizer: Tokenizer) -> None:
    ids = small_tokenizer.encode("a<|python_tag|>b<|im_end|>")
    detok = small_tokenizer.detokenizer(keep=["<|python_tag|>"])
    assert "".join([detok.step(token) for token in ids]) == "a<|python_tag|>b"


def test_state_is_rebuilt_by_feeding_the_same_ids(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("漢字 𝔘𝔫 é").tolist()
    for cut in range(len(ids)):
        first, second = tokenizer.detokenizer(), tokenizer.detokenizer()
        for token in ids[:cut]:
            first.step(token)
        second.fragment(ids[:cut])
        assert [first.step(token) for token in ids[cut:]] == [second.step(token) for token in ids[cut:]]


def test_window_detokenizer_equals_decode(fallback_tokenizer: Tokenizer) -> None:
    rng = random.Random(3)
    tok = fallback_tokenizer
    assert not tok.byte_level
    for _ in range(500):
        text = "".join(
            rng.choice(["hello", " world", "é", "漢a", "字", "😀 ", ".", "\n", " a", "  "]) for _ in range(8)
        )
        ids = tok.encode(text).tolist()
        ids.insert(rng.randrange(len(ids) + 1), 2)  # a special token anywhere, even inside a character
        for cut in (len(ids), rng.randrange(1, len(ids) + 1)):
            detok = tok.detokenizer()
            got = "".join([detok.step(token) for token in ids[:cut]])
            assert got + detok.finish() == tok.decode(ids[:cut]), (text, cut)
            assert not got.endswith("\ufffd")
        assert msgspec.json.decode(b'"' + tok.detokenizer().fragment(ids) + b'"') == text


def test_window_detokenizer_stays_bounded_on_garbage(fallback_tokenizer: Tokenizer) -> None:
    detok = fallback_tokenizer.detokenizer()
    bad = fallback_tokenizer.piece_to_id("<0xFF>")
    assert bad is not None
    got = "".join([detok.step(bad) for _ in range(500)]) + detok.finish()
    assert got == "\ufffd" * 500
    assert len(detok._window) <= 66


def test_fast_path_costs_a_tenth_of_a_microsecond(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("The quick brown fox jumps over the lazy dog. " * 500).tolist()
    detok = tokenizer.detokenizer()
    assert isinstance(detok, TableDetokenizer)

    def best() -> float:
        start = time.process_time()
        for at in range(0, len(ids), 8):
            detok.fragment(ids[at : at + 8])
        return (time.process_time() - start) / len(ids)

    assert min(best() for _ in range(7)) < 0.3e-6  # about 0.05 µs on a quiet machine


def test_both_kinds_agree_on_a_byte_level_tokenizer(tokenizer: Tokenizer) -> None:
    rng = random.Random(11)
    for _ in range(200):
        ids = random_ids(tokenizer, list(tokenizer.tables().partial), rng)[:25]  # shorter than its bound
        window = WindowDetokenizer(tokenizer._decode_all, frozenset(t for t in ids if tokenizer.is_special(t)))
        assert "".join([window.step(token) for token in ids]) + window.finish() == tokenizer.decode(ids), ids
