"""Parse tool calls back out of generated text, as it arrives.

Formats: ``hermes`` (``<tool_call>{…}</tool_call>``, several), ``llama3_json`` (an object with name and
parameters, optionally after ``<|python_tag|>``, several with semicolons) and ``mistral`` (``[TOOL_CALLS]``
before a list, or before a name and its arguments). What turns out not to be a call comes back as content:
no character is lost, except white space between calls. Must never decide which tools exist or run one.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Literal

from holdfast.text.deltas import ContentDelta, Delta, append, held_suffix
from holdfast.text.toolcall import CallReader

ToolFormat = Literal["hermes", "llama3_json", "mistral"]
TOOL_FORMATS: tuple[ToolFormat, ...] = ("hermes", "llama3_json", "mistral")

MARKERS: dict[ToolFormat, tuple[str, ...]] = {
    "hermes": ("<tool_call>", "</tool_call>"),
    "llama3_json": ("<|python_tag|>",),
    "mistral": ("[TOOL_CALLS]", "[ARGS]", "[CALL_ID]"),
}
"""Pieces that the detokenizer must show even where they are special tokens."""

_MISTRAL_NAME = re.compile(r"\s*([A-Za-z0-9_.-]{1,256})\s*(?:\[CALL_ID\][A-Za-z0-9]*)?(?:\[ARGS\])?\s*(?=\{)")
_MISTRAL_NAME_SO_FAR = re.compile(r"\s*[A-Za-z0-9_.-]*\s*[\[A-Z_\]a-z0-9]*\s*")
_MISTRAL_NAME_CHARS = 400
"""A name with its marks that is longer than this is not one."""


def detect_format(template_source: str) -> ToolFormat | None:
    """Return the format in which a chat template shows tool calls, or None when it shows none we can parse."""
    if "<tool_call>" in template_source:
        return None if "<function=" in template_source or "<arg_key>" in template_source else "hermes"
    if "[TOOL_CALLS]" in template_source:
        return "mistral"
    if "<|python_tag|>" in template_source or ('"parameters": ' in template_source and '{"name": ' in template_source):
        return "llama3_json"
    return None


class ToolParser:
    """Reads one choice's content. Feed it everything, then `finish`; the outcome does not depend on the splits."""

    def __init__(self, form: ToolFormat, new_id: Callable[[], str], *, stream_arguments: bool = True):
        """Create one.

        Args:
            form: how this model writes calls.
            new_id: draws ids for calls, for instance ``call_`` and 24 hex digits.
            stream_arguments: pass on a call as soon as its name is certain, and its arguments as they come. A
                call that then breaks off stays a (broken) call. Otherwise a call is passed on when complete, and
                what is incomplete or malformed comes back as content.
        """
        self._form = form
        self._new_id = new_id
        self._stream = stream_arguments
        self._held = ""
        self._formatting = ""
        """White space and marks taken since the last content or call; come back if no call follows."""
        self._reader = CallReader(0, new_id, stream=False)
        self._calls = 0
        self._in_list = False
        self._state: Callable[[list[Delta]], bool] = self._beginning if form == "llama3_json" else self._search

    @property
    def calls(self) -> int:
        """How many calls have been passed on or begun."""
        return self._calls + (self._state == self._object and self._reader.announced)

    @property
    def plain(self) -> bool:
        """Whether everything from here on is content as it comes."""
        return self._state == self._rest

    def feed(self, text: str) -> list[Delta]:
        """Return the deltas that this piece of text completes."""
        out: list[Delta] = []
        self._held += text
        while self._state(out):
            pass
        return out

    def finish(self) -> list[Delta]:
        """Return what was held back, because no more will come."""
        out: list[Delta] = []
        text = self._formatting + self._held
        if self._state == self._object:
            text = ("" if self._reader.announced else self._formatting) + self._reader.unpassed
        elif self._state == self._after_object:
            text = ""  # part of a closing mark
        calls = self.calls
        self._calls, self._formatting, self._held, self._state = calls, "", "", self._rest
        if calls == 0 or text.strip():
            append(out, ContentDelta(text))
        return out

    def _emit(self, out: list[Delta], text: str) -> None:
        append(out, ContentDelta(self._formatting + text))
        self._formatting = ""

    def _rest(self, out: list[Delta]) -> bool:
        self._emit(out, self._held)
        self._held = ""
        return False

    def _take(self, size: int) -> None:
        self._formatting += self._held[:size]
        self._held = self._held[size:]

    def _begin(self, name: str | None = None) -> bool:
        self._reader = CallReader(self._calls, self._new_id, stream=self._stream, name=name)
        self._state = self._object
        return True

    def _search(self, out: list[Delta]) -> bool:
        """Hermes and Mistral: a mark anywhere begins a call; white space before it is formatting."""
        marker = MARKERS[self._form][0]
        at = self._held.find(marker)
        end = at if at >= 0 else len(self._held) - held_suffix(self._held, marker)
        text = self._held[:end].rstrip()
        if text:
            self._emit(out, text)
            self._held = self._held[len(text) :]
        if at < 0:
            return False
        self._take(end - len(text) + len(marker))
        if self._form == "hermes":
            return self._begin()
        self._state = self._after_mark
        return True

    def _after_mark(self, out: list[Delta]) -> bool:
        """Mistral: a list of calls, or a name and its arguments."""
        bare = self._held.lstrip()
        if bare.startswith("["):
            self._in_list = True
            self._take(len(self._held) - len(bare) + 1)
            return self._begin()
        match = _MISTRAL_NAME.match(self._held)
        if match is not None:
            self._take(match.end())
            return self._begin(match[1])
        if len(self._held) <= _MISTRAL_NAME_CHARS and _MISTRAL_NAME_SO_FAR.fullmatch(self._held):
            return False
        self._emit(out, "")
        self._state = self._search
        return True

    def _beginning(self, _out: list[Delta]) -> bool:
        """Llama 3: calls only if the output begins with an object, or with the mark."""
        bare = self._held.lstrip()
        (marker,) = MARKERS["llama3_json"]
        if marker.startswith(bare) and bare != marker:
            return False
        blank = len(self._held) - len(bare)
        if bare.startswith(marker):
            self._take(blank + len(marker))
            return self._begin()
        if bare.startswith("{"):
            self._take(blank)
            return self._begin()
        self._state = self._rest
        return True

    def _object(self, out: list[Delta]) -> bool:
        taken, progress = self._reader.feed(self._held, out)
        self._held = self._held[taken:]
        if progress == "more":
            return False
        if self._reader.announced:
            self._calls += 1
            self._formatting = ""
        if progress == "done":
            self._state = self._after_object
            return True
        self._emit(out, self._reader.unpassed)
        self._in_list = False
        self._state = self._rest if self._form == "llama3_json" else self._search
        return True

    def _after_object(self, _out: list[Delta]) -> bool:
        bare = self._held.lstrip()
        if self._form == "hermes":
            close = MARKERS["hermes"][1]
            if close.startswith(bare) and bare != close:
                return False
            if bare.startswith(close):
                self._held = bare[len(close) :]
            self._state = self._search
            return True
        if not bare and (self._in_list or self._form == "llama3_json"):
            return False
        return self._after_listed(bare)

    def _after_listed(self, bare: str) -> bool:
        """Mistral's and Llama's calls follow each other after a comma or semicolon."""
        blank = len(self._held) - len(bare)
        if self._form == "llama3_json":
            if bare[0] in ";,{":
                self._take(blank + (bare[0] != "{"))
                return self._begin()
            self._state = self._rest
            return True
        if self._in_list and bare[0] == ",":
            self._take(blank + 1)
            return self._begin()
        if self._in_list and bare[0] == "]":
            self._held = bare[1:]
        self._in_list = False
        self._state = self._search
        return True
