"""Recognise one JSON object in text that arrives in pieces: where it ends, or where it stops being JSON.

Grammar: RFC 8259. Must never accept what a strict parser would refuse later.
"""

from __future__ import annotations

import re
from typing import Literal

_PLAIN = re.compile(r'[^"\\\x00-\x1f]*')
_SCALAR = re.compile(r"[-+.0-9A-Za-z]*")
_SCALAR_VALUE = re.compile(r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][-+]?[0-9]+)?|true|false|null")
_SCALAR_CHARS = 400
_DEPTH = 128
_SPACE = " \t\n\r"
_HEX = frozenset("0123456789abcdefABCDEF")

State = Literal[
    "start", "value", "value_or_end", "key_or_end", "key", "colon", "comma_or_end",
    "string", "escape", "hex", "scalar", "done", "bad",
]  # fmt: skip


class JsonScanner:
    """Feeds on text until its object is complete (``done``) or broken (``bad``)."""

    __slots__ = ("_hex_left", "_is_key", "_position", "_scalar", "_stack", "closings", "state")

    def __init__(self) -> None:
        self.state: State = "start"
        self._stack: list[str] = []
        self._is_key = False
        self._scalar = ""
        self._hex_left = 0
        self._position = 0
        self.closings: list[int] = []
        """Offsets, counted from the first character fed, right after each object or array directly inside."""

    @property
    def depth(self) -> int:
        """How many objects and arrays are open."""
        return len(self._stack)

    def feed(self, text: str) -> int:
        """Consume text; return how many characters were taken, which is all of it unless ``done`` or ``bad``.

        A character that breaks the grammar is not taken.
        """
        at, size = 0, len(text)
        base = self._position
        while at < size and self.state not in ("done", "bad"):
            if self.state == "string":
                at = self._string(text, at)
            elif self.state == "scalar":
                at = self._scalar_chars(text, at)
            elif self._step(text[at]):
                at += 1
                if len(self._stack) == 1 and text[at - 1] in "]}":
                    self.closings.append(base + at)
        self._position = base + at
        return at

    def _string(self, text: str, at: int) -> int:
        match = _PLAIN.match(text, at)
        at = match.end() if match else at
        if at == len(text):
            return at
        char = text[at]
        if char == "\\":
            self.state = "escape"
        elif char == '"':
            self._end_string()
        else:  # a bare control character
            self.state = "bad"
            return at
        return at + 1

    def _end_string(self) -> None:
        self.state = "colon" if self._is_key else "comma_or_end"

    def _scalar_chars(self, text: str, at: int) -> int:
        match = _SCALAR.match(text, at)
        end = match.end() if match else at
        self._scalar += text[at:end]
        if len(self._scalar) > _SCALAR_CHARS:
            self.state = "bad"
        elif end < len(text):
            self.state = "comma_or_end" if _SCALAR_VALUE.fullmatch(self._scalar) else "bad"
        return end

    def _step(self, char: str) -> bool:
        """Take one structural character; whether it was taken."""
        state = self.state
        if state == "escape":
            return self._escape(char)
        if state == "hex":
            return self._hex(char)
        if char in _SPACE:
            return True
        if state in ("key", "key_or_end") and char == '"':
            self.state, self._is_key = "string", True
        elif state == "colon" and char == ":":
            self.state = "value"
        elif state == "comma_or_end" and char == ",":
            self.state = "key" if self._stack[-1] == "}" else "value"
        elif state in ("comma_or_end", "key_or_end", "value_or_end") and char == self._stack[-1]:
            self._stack.pop()
            self.state = "comma_or_end" if self._stack else "done"
        elif state in ("value", "value_or_end"):
            return self._value(char)
        elif state == "start" and char == "{":
            self._open("{")
        else:
            self.state = "bad"
        return self.state != "bad"

    def _value(self, char: str) -> bool:
        if char == '"':
            self.state, self._is_key = "string", False
        elif char in "{[":
            self._open(char)
        elif char in "-0123456789tfn":
            self.state, self._scalar = "scalar", char
        else:
            self.state = "bad"
        return self.state != "bad"

    def _open(self, char: str) -> None:
        if len(self._stack) == _DEPTH:
            self.state = "bad"
            return
        self._stack.append("}" if char == "{" else "]")
        self.state = "key_or_end" if char == "{" else "value_or_end"

    def _escape(self, char: str) -> bool:
        if char == "u":
            self.state, self._hex_left = "hex", 4
        elif char in '"\\/bfnrt':
            self.state = "string"
        else:
            self.state = "bad"
        return self.state != "bad"

    def _hex(self, char: str) -> bool:
        if char not in _HEX:
            self.state = "bad"
            return False
        self._hex_left -= 1
        if not self._hex_left:
            self.state = "string"
        return True
