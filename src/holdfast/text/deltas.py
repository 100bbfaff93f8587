"""What a choice's output consists of, piece by piece. Must never know how it is encoded for clients."""

from __future__ import annotations

import msgspec


class ContentDelta(msgspec.Struct, frozen=True, gc=False):
    """More of the answer."""

    text: str


class ReasoningDelta(msgspec.Struct, frozen=True, gc=False):
    """More of the model's thinking."""

    text: str


class ToolCallDelta(msgspec.Struct, frozen=True, gc=False):
    """The start of a tool call (with ``id`` and ``name``), or more of its arguments."""

    index: int
    """Counts the calls of this choice from 0."""
    id: str | None = None
    name: str | None = None
    arguments: str = ""
    """JSON text, to be appended to what came before for this index."""


Delta = ContentDelta | ReasoningDelta | ToolCallDelta


def append(deltas: list[Delta], delta: Delta) -> None:
    """Append a delta, merging it with the last one where they continue each other; empty ones vanish."""
    if isinstance(delta, ToolCallDelta):
        last = deltas[-1] if deltas else None
        if isinstance(last, ToolCallDelta) and last.index == delta.index and delta.id is None:
            deltas[-1] = ToolCallDelta(last.index, last.id, last.name, last.arguments + delta.arguments)
        else:
            deltas.append(delta)
        return
    if not delta.text:
        return
    last = deltas[-1] if deltas else None
    if type(last) is type(delta):
        assert not isinstance(last, ToolCallDelta | None)
        deltas[-1] = type(delta)(last.text + delta.text)
    else:
        deltas.append(delta)


def held_suffix(text: str, marker: str) -> int:
    """Return the length of the longest suffix of ``text`` that is a proper prefix of ``marker``."""
    at = text.find(marker[0], max(0, len(text) - len(marker) + 1))
    while at >= 0:
        if marker.startswith(text[at:]):
            return len(text) - at
        at = text.find(marker[0], at + 1)
    return 0
