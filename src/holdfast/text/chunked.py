"""Where a large text may be cut so that its pieces tokenize exactly as the whole does.

The `tokenizers` library needs about 140 bytes of memory per byte of text and turns the ids into Python
objects in one go, holding the interpreter lock. In pieces of 16 Ki characters both stop mattering. A cut is
taken only where one kind of character ends, the tokenizer shows a boundary between pre-tokens, and both sides
tokenize the same apart as together. Must never cut for a tokenizer whose tokens depend on text far away.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from itertools import islice

from tokenizers import Tokenizer as HfTokenizer

PIECE_CHARS = 16 * 1024
"""Text is cut into pieces of at least this many characters."""

_CONTEXT = 256
"""Characters looked at on either side of a cut."""

_SYNCHRONISED = 8
"""Pre-token boundaries that must precede a cut in its context."""

_SEARCH = 4 * 1024
"""Characters scanned in one attempt to find a cut."""

_TRIES = 4
"""Cuts of each kind that are tried per attempt."""

_NATURAL = re.compile(r"(?<=[A-Za-z])(?= [A-Za-z])|(?<=\n)(?=[A-Za-z0-9])")
"""Between a letter and a space with a letter, and between a line end and a letter or digit: boundaries for
every byte-level pre-tokenizer in use (GPT-2, cl100k, o200k, Llama 3, Qwen, DeepSeek, Tekken)."""

Ids = Callable[[str], list[int]]


def pieces(tokenizer: HfTokenizer, ids: Ids, text: str) -> Iterator[str]:
    """Yield the text in pieces whose token ids, joined, are those of the whole.

    Args:
        tokenizer: whose pre-tokenizer decides; must be local (`tokenizer.Tokenizer` checks).
        ids: tokenizes a short text without adding special tokens.
        text: any size. Where no safe cut is found the piece goes on.
    """
    start = 0
    while len(text) - start > 2 * PIECE_CHARS:
        cut = _find(tokenizer, ids, text, start + PIECE_CHARS)
        if cut is None:
            break
        yield text[start:cut]
        start = cut
    yield text[start:] if start else text


def _find(tokenizer: HfTokenizer, ids: Ids, text: str, position: int) -> int | None:
    while position < len(text) - _CONTEXT:
        for cut in _candidates(tokenizer, text, position):
            if _independent(tokenizer, ids, text, cut):
                return cut
        position += _SEARCH
    return None


def _candidates(tokenizer: HfTokenizer, text: str, position: int) -> Iterator[int]:
    natural = _NATURAL.finditer(text, position, min(position + _SEARCH, len(text) - _CONTEXT))
    yield from (match.start() for match in islice(natural, _TRIES))
    start = position - _CONTEXT
    cuts = [start + at for at in _boundaries(tokenizer, text[start : position + _CONTEXT]) if at >= _CONTEXT]
    yield from [cut for cut in cuts if _kind(text[cut - 1]) != _kind(text[cut])][:_TRIES]


def _kind(char: str) -> str:
    """Inside a run of one kind boundaries may be counted from its start, which can be anywhere (digits by threes)."""
    if char.isalpha():
        return "letter"
    if char.isnumeric():
        return "digit"
    return "space" if char.isspace() else "other"


def _boundaries(tokenizer: HfTokenizer, text: str) -> list[int]:
    pre_tokenizer = tokenizer.pre_tokenizer
    if pre_tokenizer is None:
        return []
    return [start for _, (start, _end) in pre_tokenizer.pre_tokenize_str(text)]


def _independent(tokenizer: HfTokenizer, ids: Ids, text: str, cut: int) -> bool:
    left = text[cut - _CONTEXT : cut]
    right = text[cut : cut + _CONTEXT]
    boundaries = _boundaries(tokenizer, left + right)
    if len(left) not in boundaries or sum(at < len(left) for at in boundaries) < _SYNCHRONISED:
        return False
    return ids(left + right) == ids(left) + ids(right)
