"""From the token ids of one choice to what its client sees: detokenize, stop strings, reasoning, tool calls.

Synchronous and without clock or randomness (ids for calls come from the tool parser's injected source), so
that feeding the same ids to a fresh assembler rebuilds its state. When only detokenizing is asked for,
`TextAssembler.fast` is true and `TextAssembler.fragment` gives JSON by table lookup. Must never let a
character out that a later token could still take back.
"""

from __future__ import annotations

from collections.abc import Sequence

from holdfast.text.deltas import ContentDelta, Delta, ToolCallDelta, append
from holdfast.text.detokenizer import Detokenizer, TableDetokenizer
from holdfast.text.reasoning import ReasoningParser
from holdfast.text.stops import StopMatcher
from holdfast.text.tables import json_fragment
from holdfast.text.tools import ToolParser


class TextAssembler:
    """The text of one choice.

    Feed token ids to `push` (or to `fragment`, while `fast`) in order, then call `finish` once. When
    ``stop`` is set after a push, the output is complete: tell the worker to stop, and call `finish`.
    """

    __slots__ = (
        "_bypass", "_detokenizer", "_include_stop", "_matcher", "_plain", "_reasoning", "_step", "_tools",
        "fast", "stop", "stop_index",
    )  # fmt: skip

    def __init__(
        self,
        detokenizer: Detokenizer,
        *,
        stops: Sequence[str] = (),
        include_stop: bool = False,
        min_tokens: int = 0,
        reasoning: ReasoningParser | None = None,
        tools: ToolParser | None = None,
    ):
        """Compose one.

        Args:
            detokenizer: fresh.
            stops: stop strings, watched for in everything that the model writes, reasoning included.
            include_stop: whether the output ends after the stop string or stop token instead of before it.
            min_tokens: stop strings that begin within this many first tokens do not count.
            reasoning: fresh, or None.
            tools: fresh, or None.
        """
        self._detokenizer = detokenizer
        self._step = detokenizer.step
        self._include_stop = include_stop
        matcher = StopMatcher(stops, include_stop=include_stop) if stops and any(stops) else None
        self._matcher = matcher
        self._bypass = min_tokens if matcher is not None else 0
        self._reasoning = reasoning
        self._tools = tools
        self._plain = matcher is None and reasoning is None and tools is None
        """Nothing but detokenizing is asked for."""
        self.fast = self._plain
        """Whether the output from here on is plain content, so that `fragment` may be used instead of `push`."""
        self.stop: str | None = None
        """The stop string that ended the output."""
        self.stop_index = 0
        """Index, within the run of ids last pushed, of the token that completed ``stop``. The tokens after it
        are not part of the output; that one is."""
        if not self._plain:
            self._settle()

    def _settle(self) -> None:
        self.fast = (
            self._matcher is None
            and (self._reasoning is None or self._reasoning.plain)
            and (self._tools is None or self._tools.plain)
        )

    @property
    def tool_calls(self) -> int:
        """How many tool calls the output has so far."""
        return self._tools.calls if self._tools is not None else 0

    def push(self, ids: Sequence[int], *, terminal: bool = False) -> list[Delta]:
        """Take the next tokens.

        Args:
            ids: in order, any number.
            terminal: the last of them ended the sequence (end-of-sequence or stop token), so its own text is
                not output.

        Returns:
            What can be shown now; neighbours of one kind are merged.
        """
        if self.stop is not None:
            return []
        step = self._step
        texts = [step(token) for token in self._shown(ids, terminal)]
        text = self._watch(texts) if self._matcher is not None else "".join(texts)
        if self.fast:
            return [ContentDelta(text)] if text else []
        out = self._parse(text)
        self._settle()
        return out

    def _shown(self, ids: Sequence[int], terminal: bool) -> Sequence[int]:
        return ids[:-1] if terminal and not self._include_stop else ids

    def _watch(self, texts: list[str]) -> str:
        matcher = self._matcher
        assert matcher is not None
        skip = 0
        if self._bypass:
            skip = min(self._bypass, len(texts))
            self._bypass -= skip
        safe, stop = matcher.feed("".join(texts[skip:]))
        if stop is not None:
            self.stop = stop
            self.stop_index = skip + _covering(texts[skip:], matcher.match_end)
        return "".join(texts[:skip]) + safe if skip else safe

    def _parse(self, text: str) -> list[Delta]:
        if not text:
            return []
        reasoning, tools = self._reasoning, self._tools
        first = [ContentDelta(text)] if reasoning is None else reasoning.feed(text)
        return list(first) if tools is None else self._through_tools(first)

    def _through_tools(self, deltas: Sequence[Delta]) -> list[Delta]:
        assert self._tools is not None
        out: list[Delta] = []
        for delta in deltas:
            for piece in self._tools.feed(delta.text) if isinstance(delta, ContentDelta) else [delta]:
                append(out, piece)
        return out

    def fragment(self, ids: Sequence[int], *, terminal: bool = False) -> bytes:
        """Take the next tokens while `fast`; return the content as the inside of a JSON string."""
        return self._detokenizer.fragment(ids[:-1] if terminal and not self._include_stop else ids)

    @property
    def table(self) -> TableDetokenizer | None:
        """The detokenizer, if it works by table: callers in a hurry look single tokens up themselves."""
        return self._detokenizer if isinstance(self._detokenizer, TableDetokenizer) else None

    def finish(self) -> list[Delta]:
        """Return what was held back, because no more tokens will come. Call once."""
        text = "" if self.stop is not None else self._detokenizer.finish()
        if self._plain:
            return [ContentDelta(text)] if text else []
        if self._matcher is not None and self.stop is None:
            safe, self.stop = self._matcher.feed(text)
            text = safe + self._matcher.flush()
        out = self._parse(text)
        if self._reasoning is not None:
            rest = self._reasoning.finish()
            out += rest if self._tools is None else self._through_tools(rest)
        if self._tools is not None:
            out += self._tools.finish()
        merged: list[Delta] = []
        for delta in out:
            append(merged, delta)
        return merged

    def finish_fragment(self) -> bytes:
        """As `finish`, while `fast`: the rest of the content as the inside of a JSON string."""
        return json_fragment(self._detokenizer.finish())

    def finish_reason(self, engine_reason: str) -> str:
        """Return the API's reason for the end, given the engine's.

        A matched stop string makes it ``stop``; an orderly end after a tool call is ``tool_calls``.
        """
        reason = "stop" if self.stop is not None else engine_reason
        return "tool_calls" if reason == "stop" and self.tool_calls else reason


def _covering(texts: Sequence[str], end: int) -> int:
    """Return the index of the text that holds the character before ``end`` in all of them joined."""
    for index, text in enumerate(texts):
        end -= len(text)
        if end <= 0:
            return index
    return len(texts) - 1


def joined(deltas: Sequence[Delta]) -> tuple[str, str, list[ToolCallDelta]]:
    """Return content, reasoning and whole tool calls of a complete list of deltas, for answers in one piece."""
    content: list[str] = []
    reasoning: list[str] = []
    calls: list[ToolCallDelta] = []
    for delta in deltas:
        if isinstance(delta, ToolCallDelta):
            if delta.id is not None:
                calls.append(delta)
            else:
                last = calls[-1]
                calls[-1] = ToolCallDelta(last.index, last.id, last.name, last.arguments + delta.arguments)
        elif isinstance(delta, ContentDelta):
            content.append(delta.text)
        else:
            reasoning.append(delta.text)
    return "".join(content), "".join(reasoning), calls
