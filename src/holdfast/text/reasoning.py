"""Split a thinking model's output into its reasoning and its answer.

Only a reasoning block that opens the output (or was opened by the prompt) counts; tags that appear later are
ordinary text. White space around the tags is formatting and dropped. Must never lose any other character.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from holdfast.text.deltas import ContentDelta, Delta, ReasoningDelta, append, held_suffix


class ReasoningTags(msgspec.Struct, frozen=True):
    """What encloses the reasoning."""

    open: str = "<think>"
    close: str = "</think>"


KNOWN_TAGS = (
    ReasoningTags(),
    ReasoningTags("[THINK]", "[/THINK]"),
    ReasoningTags("<seed:think>", "</seed:think>"),
    ReasoningTags("<reasoning>", "</reasoning>"),
)


def detect_tags(template_source: str) -> ReasoningTags | None:
    """Return the tags that a chat template mentions, or None for models that do not think in tags."""
    return next((tags for tags in KNOWN_TAGS if tags.open in template_source or tags.close in template_source), None)


def opened_by_prompt(prompt: str, tags: ReasoningTags) -> bool:
    """Whether the prompt ends inside a reasoning block, so that the output begins with reasoning."""
    return prompt.rstrip().endswith(tags.open)


class ReasoningParser:
    """Splits one choice's text, however it arrives."""

    __slots__ = ("_held", "_inside_since_start", "_state", "_tags", "_trim")

    def __init__(self, tags: ReasoningTags | None = None, *, starts_inside: bool = False):
        """Create one.

        Args:
            tags: what encloses the reasoning; default ``<think>``.
            starts_inside: the prompt has opened the block already (`opened_by_prompt`).
        """
        self._tags = tags or ReasoningTags()
        self._state: Literal["before", "inside", "after"] = "inside" if starts_inside else "before"
        self._inside_since_start = starts_inside
        self._held = ""
        self._trim = starts_inside
        """Whether white space at the front of what follows is formatting."""

    @property
    def plain(self) -> bool:
        """Whether everything from here on is content as it comes."""
        return self._state == "after" and not self._trim

    def feed(self, text: str) -> list[Delta]:
        """Return the deltas that this piece of text completes."""
        out: list[Delta] = []
        self._held += text
        while self._advance(out):
            pass
        return out

    def _advance(self, out: list[Delta]) -> bool:
        if self._state == "before":
            return self._before(out)
        if self._trim:
            self._held = self._held.lstrip()
            if not self._held:
                return False
        if self._state == "inside":
            return self._inside(out)
        self._trim = False
        append(out, ContentDelta(self._held))
        self._held = ""
        return False

    def _before(self, out: list[Delta]) -> bool:
        bare = self._held.lstrip()
        tag = self._tags.open
        if bare.startswith(tag):
            self._enter("inside", bare[len(tag) :])
            return True
        if tag.startswith(bare):  # not known yet; also while only white space has come
            return False
        self._state = "after"
        append(out, ContentDelta(self._held))
        self._held = ""
        return False

    def _enter(self, state: Literal["inside", "after"], rest: str) -> None:
        self._state, self._held, self._trim = state, rest, True

    def _inside(self, out: list[Delta]) -> bool:
        if self._inside_since_start:  # some models repeat the tag that the prompt has opened
            tag = self._tags.open
            if self._held.startswith(tag):
                self._inside_since_start = False
                self._enter("inside", self._held[len(tag) :])
                return True
            if tag.startswith(self._held):
                return False
            self._inside_since_start = False
        self._trim = False
        thought, tag, rest = self._held.partition(self._tags.close)
        if tag:
            append(out, ReasoningDelta(thought.rstrip()))
            self._enter("after", rest)
            return True
        keep = held_suffix(thought, self._tags.close)
        safe = thought[: len(thought) - keep].rstrip()
        append(out, ReasoningDelta(safe))
        self._held = thought[len(safe) :]
        return False

    def finish(self) -> list[Delta]:
        """Return what was held back, because no more will come."""
        held, self._held = self._held, ""
        out: list[Delta] = []
        if self._state == "inside":
            append(out, ReasoningDelta(held.rstrip()))
        elif self._state == "before":
            append(out, ContentDelta(held))
        return out
