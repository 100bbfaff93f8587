"""Reads one streamed completion as it comes, and tells a replay what happened: the same for real and simulated clients.

Must never keep what is generated.
"""

from __future__ import annotations

import msgspec

from holdfast.base.errors import ProtocolViolation
from holdfast.replay.driver import Events

_ERROR_BYTES = 65_536
_EVENT_BYTES = 4 * 1024 * 1024
_TURNED_AWAY = frozenset({429, 503, 529})
_WORKER = b"x-holdfast-worker"
"""Header that names the worker; other servers have none, and count as one worker."""


class _Choice(msgspec.Struct, gc=False):
    text: str = ""


class _Details(msgspec.Struct, gc=False):
    cached_tokens: int | None = None


class _Usage(msgspec.Struct, gc=False):
    prompt_tokens: int = 0
    completion_tokens: int = 0
    prompt_tokens_details: _Details | None = None


class _Error(msgspec.Struct, gc=False):
    code: str | int | None = None
    type: str | None = None


class _Chunk(msgspec.Struct, gc=False):
    choices: list[_Choice] = []
    usage: _Usage | None = None
    error: _Error | None = None


_CHUNK = msgspec.json.Decoder(_Chunk)


class Answer:
    """Where the parts of one answer go."""

    __slots__ = ("body", "complete", "events", "rest", "status")

    def __init__(self, events: Events | None):
        self.events = events
        """None: the body is kept instead of being read as a stream."""
        self.status = 0
        self.body = bytearray()
        self.rest = b""
        self.complete = False
        """The stream said that it is over."""

    def header(self, name: bytes, value: bytes) -> None:
        """Take one header of the response."""
        if self.events is not None and name.lower() == _WORKER:
            self.events.worker(value.decode("latin-1"))

    def part(self, data: bytes) -> None:
        """Take a part of the body. Raises ProtocolViolation when it is not what a completion sends."""
        if self.events is None or self.status != 200:
            if len(self.body) < _ERROR_BYTES:
                self.body += data
            return
        *lines, self.rest = (self.rest + data).split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):
                self._event(line[5:].strip(), self.events)
        if len(self.rest) > _EVENT_BYTES:
            raise ProtocolViolation(f"An event of the stream is longer than {_EVENT_BYTES} bytes.")

    def _event(self, data: bytes, events: Events) -> None:
        if data == b"[DONE]":
            self.complete = True
            return
        try:
            chunk = _CHUNK.decode(data)
        except msgspec.DecodeError as error:
            raise ProtocolViolation(f"An event of the stream is not what a completion sends: {error}.") from error
        if chunk.choices and chunk.choices[0].text:
            events.tokens()
        if chunk.usage is not None:
            details = chunk.usage.prompt_tokens_details
            cached = (details.cached_tokens or 0) if details else 0
            events.usage(chunk.usage.prompt_tokens, chunk.usage.completion_tokens, cached)
        if chunk.error is not None:
            self.complete = True
            events.ended("failed", str(chunk.error.code or chunk.error.type or "error"))

    def judge(self) -> None:
        """Say how it ended, when the events have not said so."""
        assert self.events is not None
        if self.status != 200:
            self.events.ended("rejected" if self.status in _TURNED_AWAY else "failed", self._reason())
        elif not self.complete:
            self.events.ended("failed", "stream_incomplete")

    def _reason(self) -> str:
        try:
            error = _CHUNK.decode(self.body).error
        except msgspec.DecodeError:
            error = None
        return str((error and (error.code or error.type)) or f"status_{self.status}")
