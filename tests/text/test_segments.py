"""Remembered stretches change no token: neither where they are cut, nor when the room for them is used up."""

from __future__ import annotations

import json
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken
from tokenizers import Tokenizer as HfTokenizer

from holdfast.text import segments
from holdfast.text.segments import Segments
from holdfast.text.tokenizer import Tokenizer
from tests.text.conftest import CORPUS, small_json

MARKS = ["<|im_start|>", "<|im_end|>", "<|im_end|><|im_end|>", "<|im", "<nonspecial é漢>", "é", "<|endoftext|>"]
PIECES = st.one_of(
    st.sampled_from([*MARKS, *CORPUS, "user\n", "assistant", " ", "\n", "<|im_", "start|>"]), st.text(max_size=8)
)
TEXTS = st.lists(PIECES, max_size=12).map("".join)


def with_marks(*added: AddedToken) -> bytes:
    plain = HfTokenizer.from_str(small_json().decode())
    plain.add_tokens(list(added))
    return str(plain.to_str()).encode()


NESTED = with_marks(
    AddedToken("<|im", special=False, normalized=False),
    AddedToken("<|im_end|><|im_end|>", special=False, normalized=False),
)


@pytest.mark.parametrize("source", [small_json(), NESTED], ids=["chatml", "nested"])
def test_ids_are_those_of_the_library(source: bytes) -> None:
    library = HfTokenizer.from_str(source.decode())
    ours = Tokenizer(source)
    assert ours._segments is not None

    @given(TEXTS)
    def check(text: str) -> None:
        expected = library.encode(text, add_special_tokens=False).ids
        for _ in range(2):
            assert ours.encode(text).tolist() == expected
        assert ours.encode(text, remember=False).tolist() == expected

    check()


def test_real_tokenizer(tokenizer: Tokenizer) -> None:
    head, tail = "<|im_start|>", "<|im_end|>\n"
    for text in CORPUS:
        chat = f"{head}system\n{text}{tail}{head}user\n{text * 2}{tail}{head}assistant\n"
        expected = tokenizer.encode(chat, remember=False)
        assert tokenizer.encode(chat) == tokenizer.encode(chat) == expected


@pytest.mark.parametrize("side", ["single_word", "lstrip", "rstrip"])
def test_marks_that_look_around_them_are_left_to_the_library(side: str) -> None:
    mark = AddedToken("<word>", special=True, normalized=False, **{side: True})
    source = with_marks(mark)
    ours, library = Tokenizer(source), HfTokenizer.from_str(source.decode())
    for text in ("a <word> b", "a<word>b", "<word>", " <word>\n\n"):
        assert ours.encode(text).tolist() == library.encode(text, add_special_tokens=False).ids


def test_without_special_tokens_nothing_is_remembered() -> None:
    spec = json.loads(small_json())
    spec["added_tokens"] = []
    assert Tokenizer(json.dumps(spec).encode()).encode("a b").tolist()


class Counted:
    """A tokenizer that counts what it is asked for."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def __call__(self, text: str) -> Sequence[int]:
        self.asked.append(text)
        return [ord(char) for char in text]


def test_each_stretch_is_tokenized_once() -> None:
    counted = Counted()
    memory = Segments(counted, {"|": 1})
    first = memory.encode("|system|hello||")
    assert first.tolist() == [1, *map(ord, "system"), 1, *map(ord, "hello"), 1, 1]
    memory.encode("|system|hello|more")
    assert counted.asked == ["system", "hello", "more"]


def test_room_is_bounded_and_what_is_asked_for_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(segments, "KEPT_BYTES", 20_000)
    counted = Counted()
    memory = Segments(counted, {"|": 1})
    for number in range(500):
        memory.encode(f"always|{number}")
    assert counted.asked.count("always") == 1
    assert len(memory._known) + len(memory._before) < 20_000 / 256 + 2
    assert memory.encode("0").tolist() == [ord("0")]
    assert counted.asked.count("0") == 2
