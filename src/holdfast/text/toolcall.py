"""One tool call being read: a JSON object with a name and arguments.

With streaming the call is announced as soon as its name is certain, and its arguments follow as they come;
everything that was passed on is grammatical JSON so far. Must never announce what is not a call.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Literal

import msgspec

from holdfast.text.deltas import Delta, ToolCallDelta
from holdfast.text.jsonscan import JsonScanner

_NAME_CHARS = 256
_HEAD = re.compile(
    r'[ \t\n\r]*\{[ \t\n\r]*(?:"type"[ \t\n\r]*:[ \t\n\r]*"function"[ \t\n\r]*,[ \t\n\r]*)?'
    r'"name"[ \t\n\r]*:[ \t\n\r]*("(?:[^"\\]|\\.)+")[ \t\n\r]*,[ \t\n\r]*'
    r'"(?:arguments|parameters)"[ \t\n\r]*:[ \t\n\r]*(?=\{)'
)
_HEAD_CHARS = 1_024
"""A head that is longer than this is not streamed; the call is passed on when it is complete."""

Progress = Literal["more", "done", "bad"]
_ABSENT = msgspec.Raw()


class _Call(msgspec.Struct):
    name: str
    arguments: msgspec.Raw = _ABSENT
    parameters: msgspec.Raw = _ABSENT


_decode_call = msgspec.json.Decoder(_Call).decode
_decode_text = msgspec.json.Decoder(str).decode
_decode_object = msgspec.json.Decoder(dict).decode


class CallReader:
    """Reads one call. Feed until it is ``done`` or ``bad``; then `raw` is everything it took."""

    __slots__ = (
        "_arguments_at", "_fixed_name", "_index", "_new_id", "_parts", "_passed", "_scanner", "_stream", "_taken",
        "announced",
    )  # fmt: skip

    def __init__(self, index: int, new_id: Callable[[], str], *, stream: bool, name: str | None = None):
        """Create one.

        Args:
            index: of the call within its choice.
            new_id: draws its id.
            stream: whether to pass on arguments before the call is complete.
            name: given when the name came before the object, which then is the arguments.
        """
        self._index = index
        self._new_id = new_id
        self._stream = stream
        self._fixed_name = name
        self._scanner = JsonScanner()
        self._parts: list[str] = []
        """Text taken from offset ``_passed`` on."""
        self._taken = 0
        self._passed = 0
        self._arguments_at = 0
        self.announced = False
        """Whether the call has been passed on, so that it cannot be taken back."""

    @property
    def unpassed(self) -> str:
        """The text taken that was not passed on as part of the call."""
        return "".join(self._parts)

    def feed(self, text: str, out: list[Delta]) -> tuple[int, Progress]:
        """Consume text and append deltas; return how many characters were taken, and where that leads."""
        taken = self._scanner.feed(text)
        if taken:
            self._parts.append(text[:taken])
            self._taken += taken
        if self._stream and (self.announced or self._announce(out)):
            self._pass_on(out)
        if self._scanner.state == "bad":
            return taken, "bad"
        if self._scanner.state != "done":
            return taken, "more"
        return taken, "done" if self.announced or self._complete(out) else "bad"

    def _pass_on(self, out: list[Delta]) -> None:
        end = self._arguments_end()
        if end > self._passed:
            text = self.unpassed
            out.append(ToolCallDelta(self._index, arguments=text[: end - self._passed]))
            self._parts = [text[end - self._passed :]]
            self._passed = end

    def _arguments_end(self) -> int:
        """Offset up to which the text belongs to the arguments."""
        if self._fixed_name is not None:
            return self._taken
        return next((end for end in self._scanner.closings if end > self._arguments_at), self._taken)

    def _announce(self, out: list[Delta]) -> bool:
        name, at = self._fixed_name, 0
        if name is None:
            match = _HEAD.match(self.unpassed) if self._taken <= _HEAD_CHARS else None
            if match is None:
                return False
            name, at = _decode_text(match[1]), match.end()
        if not 0 < len(name) <= _NAME_CHARS:
            return False
        self.announced = True
        self._parts = [self.unpassed[at:]]
        self._arguments_at = self._passed = at
        out.append(ToolCallDelta(self._index, self._new_id(), name))
        return True

    def _complete(self, out: list[Delta]) -> bool:
        """Pass on a whole call at once; False when the object is not a call."""
        text = self.unpassed
        name, arguments = self._fixed_name, text.strip()
        if name is None:
            try:
                call = _decode_call(text)
            except msgspec.DecodeError:
                return False
            found = _arguments(call)
            if found is None:
                return False
            name, arguments = call.name, found
        if not 0 < len(name) <= _NAME_CHARS:
            return False
        self.announced = True
        self._parts = []
        out.append(ToolCallDelta(self._index, self._new_id(), name, arguments))
        return True


def _arguments(call: _Call) -> str | None:
    """Return the arguments as JSON text of an object; some models quote that text once more."""
    text = (bytes(call.arguments) or bytes(call.parameters)).decode()
    if text.startswith('"'):
        text = _decode_text(text)
    try:
        _decode_object(text)
    except msgspec.DecodeError:
        return None
    return text
