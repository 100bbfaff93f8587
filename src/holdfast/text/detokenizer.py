"""Turn token ids into text as they arrive, equal to decoding all of them at once.

`TableDetokenizer` serves byte-level tokenizers, by table; `WindowDetokenizer` serves all others, by decoding
a short window around each new token. One instance per choice; feeding the same ids to a new one rebuilds its
state. Must never emit a character that a later token could still change, and never drop one at the end.
"""

from __future__ import annotations

import abc
import codecs
from collections.abc import Callable, Collection, Sequence

from holdfast.text.tables import DetokTables, json_fragment

_utf8 = codecs.getincrementaldecoder("utf-8")
_REPLACEMENT = "\ufffd"
_WINDOW_TOKENS = 32
"""An unfinished character is at most four bytes, so a window that stays open for longer will never close."""


class Detokenizer(abc.ABC):
    """Text of one stream of token ids."""

    __slots__ = ()

    @abc.abstractmethod
    def step(self, token: int) -> str:
        """Return the text that this token completes; empty while a character is unfinished."""

    @abc.abstractmethod
    def fragment(self, tokens: Sequence[int]) -> bytes:
        """Return the text that these tokens complete as the inside of a JSON string (UTF-8, no quotes)."""

    @abc.abstractmethod
    def finish(self) -> str:
        """Return what an unfinished character at the end decodes to (U+FFFD), and start afresh."""


class TableDetokenizer(Detokenizer):
    """Detokenizer for byte-level tokenizers: a table lookup unless a character spans tokens."""

    __slots__ = ("_decoder", "_tables", "_texts", "fragments", "open")

    def __init__(self, tables: DetokTables):
        self._tables = tables
        self._texts = tables.text
        self.fragments = tables.fragment
        """By id: its text as the inside of a JSON string; None where `fragment` has to look closer."""
        self._decoder: codecs.IncrementalDecoder | None = None
        self.open = False
        """Whether a character is unfinished, so that ``fragments`` does not hold for the next token."""

    def step(self, token: int) -> str:
        """See `Detokenizer.step`. Ids without a piece give nothing."""
        if not self.open:
            try:
                text = self._texts[token]
            except IndexError:
                return ""
            if text is not None:
                return text
        return self._slow(token)

    def _slow(self, token: int) -> str:
        decoder = self._decoder
        if decoder is None:
            decoder = self._decoder = _utf8("replace")
        text = decoder.decode(self._tables.raw(token))
        self.open = bool(decoder.getstate()[0])
        return text

    def fragment(self, tokens: Sequence[int]) -> bytes:
        """See `Detokenizer.fragment`."""
        if not self.open:
            fragments = self.fragments
            try:
                if len(tokens) == 1:
                    one = fragments[tokens[0]]
                    if one is not None:
                        return one
                else:
                    return b"".join([fragments[token] for token in tokens])  # type: ignore[misc]
            except (TypeError, IndexError):  # a partial character, or an id beyond the vocabulary
                pass
        step = self.step
        return json_fragment("".join([step(token) for token in tokens]))

    def finish(self) -> str:
        """See `Detokenizer.finish`."""
        if not self.open or self._decoder is None:
            return ""
        self.open = False
        text = self._decoder.decode(b"", True)
        self._decoder = None
        return text


class WindowDetokenizer(Detokenizer):
    """Detokenizer for any decoder: decodes the tokens since the last emission, with those before as context.

    What a decoder would change retroactively (a byte-fallback run that turns out invalid) stays as emitted.
    """

    __slots__ = ("_decode", "_done", "_hidden", "_prefix", "_window")

    def __init__(self, decode: Callable[[Sequence[int]], str], hidden: Collection[int]):
        """Create one.

        Args:
            decode: the tokenizer's whole decode, special tokens included.
            hidden: ids that decode to nothing.
        """
        self._decode = decode
        self._hidden = hidden
        self._window: list[int] = []
        self._done = 0
        """How many tokens of the window have been emitted; their text is ``_prefix``."""
        self._prefix = ""

    def step(self, token: int) -> str:
        """See `Detokenizer.step`."""
        if token in self._hidden:
            return ""
        window = self._window
        window.append(token)
        text = self._decode(window)
        stuck = len(window) - self._done > _WINDOW_TOKENS
        if text.endswith(_REPLACEMENT) and not stuck:
            return ""
        return self._emit(text)

    def _emit(self, text: str) -> str:
        fresh = text[len(self._prefix) :]
        del self._window[: self._done]
        self._done = len(self._window)
        self._prefix = self._decode(self._window)
        return fresh

    def fragment(self, tokens: Sequence[int]) -> bytes:
        """See `Detokenizer.fragment`."""
        step = self.step
        return json_fragment("".join([step(token) for token in tokens]))

    def finish(self) -> str:
        """See `Detokenizer.finish`."""
        window = self._window
        text = self._decode(window)[len(self._prefix) :] if len(window) > self._done else ""
        self._window = []
        self._done = 0
        self._prefix = ""
        return text
