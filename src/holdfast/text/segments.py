"""Token ids of what stands between two special tokens, remembered: chats repeat most of what they say.

Roles, system prompts and the earlier turns of a conversation come again with every request. A tokenizer cuts a text at
its special tokens before it does anything else, so that the ids of a whole are those of its stretches in a row, and
each stretch has to be tokenized once. What that saves of a chat that was never seen is small (the words around a
message); of the next turn of a long one it is nearly all.

Must never be asked by a tokenizer whose special tokens swallow what is beside them, and never write a text anywhere.
"""

from __future__ import annotations

import re
from array import array
from collections.abc import Callable, Mapping, Sequence

KEPT_BYTES = 8 * 1024 * 1024
"""Memory, about, for the stretches that one tokenizer remembers."""
_BYTES_EACH, _BYTES_PER_CHARACTER = 256, 3
"""What a stretch takes: a place in a dictionary, its text, a quarter of an id for each character."""


class Segments:
    """Usable from any thread: at worst something is tokenized twice.

    Args:
        encode: tokenizes a stretch.
        marks: all tokens at which texts are cut, with their ids; there is at least one.
    """

    __slots__ = ("_before", "_encode", "_fresh", "_known", "_marks", "_split")

    def __init__(self, encode: Callable[[str], Sequence[int]], marks: Mapping[str, int]):
        self._encode = encode
        self._marks = {piece: array("I", (token,)) for piece, token in marks.items()}
        longest_first = sorted(marks, key=len, reverse=True)
        self._split = re.compile(f"({'|'.join(map(re.escape, longest_first))})").split
        self._known: dict[str, array[int]] = {}
        self._before: dict[str, array[int]] = {}
        """What was known before half of the room was filled anew; what is asked for again moves over."""
        self._fresh = 0
        """Bytes of the former."""

    def encode(self, text: str) -> array[int]:
        """Return the ids of a text, special tokens included. Raises as ``encode`` does."""
        ids = array("I")
        known, marks = self._known, self._marks
        for part in self._split(text):
            if part:
                ids += known.get(part) or marks.get(part) or self._stretch(part)
        return ids

    def _stretch(self, text: str) -> array[int]:
        ids = self._before.get(text) or array("I", self._encode(text))
        self._fresh += _BYTES_EACH + _BYTES_PER_CHARACTER * len(text)
        if self._fresh > KEPT_BYTES // 2:
            self._before, self._known, self._fresh = self._known, {}, 0
        self._known[text] = ids
        return ids
