"""Reasoning and answer are told apart at every split point."""

from __future__ import annotations

import pytest

from holdfast.text.deltas import ContentDelta, ReasoningDelta
from holdfast.text.reasoning import ReasoningParser, ReasoningTags, detect_tags, opened_by_prompt

CASES = [
    ("<think>\nLet me see.\n\n</think>\n\nYes.", False, "Let me see.", "Yes."),
    ("\n<think>a < b</ thin </think>c", False, "a < b</ thin", "c"),
    ("Let me see.</think>Yes </think> no", True, "Let me see.", "Yes </think> no"),
    ("<think>a</think>b", True, "a", "b"),  # repeats the tag that the prompt has opened
    ("<thing</think>b", True, "<thing", "b"),
    ("No thoughts. <think>x</think>", False, "", "No thoughts. <think>x</think>"),
    ("<think></think>\nb", False, "", "b"),
    ("<think>never ends </thi", False, "never ends </thi", ""),
    ("<thin", False, "", "<thin"),
    ("  ", False, "", "  "),
    ("<think>a\n \n b</think>x\n\ny ", False, "a\n \n b", "x\n\ny "),
    ("", True, "", ""),
]


def run(pieces: list[str], inside: bool, tags: ReasoningTags | None = None) -> tuple[str, str]:
    parser = ReasoningParser(tags, starts_inside=inside)
    deltas = [delta for piece in pieces for delta in parser.feed(piece)] + parser.finish()
    reasoning = "".join([d.text for d in deltas if isinstance(d, ReasoningDelta)])
    content = "".join([d.text for d in deltas if isinstance(d, ContentDelta)])
    kinds = [type(d) for d in deltas]
    assert kinds == sorted(kinds, key=lambda kind: kind is ContentDelta)  # reasoning first, always
    return reasoning, content


@pytest.mark.parametrize(("text", "inside", "reasoning", "content"), CASES)
def test_every_split(text: str, inside: bool, reasoning: str, content: str) -> None:
    for i in range(len(text) + 1):
        for j in range(i, len(text) + 1):
            assert run([text[:i], text[i:j], text[j:]], inside) == (reasoning, content)
    assert run(list(text), inside) == (reasoning, content)


def test_reasoning_is_passed_on_at_once() -> None:
    parser = ReasoningParser()
    assert parser.feed("<think>") == []
    assert parser.feed("so ") == [ReasoningDelta("so")]
    assert parser.feed("then</") == [ReasoningDelta(" then")]
    assert parser.feed("think>\n") == []
    assert not parser.plain
    assert parser.feed("A") == [ContentDelta("A")]
    assert parser.plain


def test_other_tags() -> None:
    tags = ReasoningTags("[THINK]", "[/THINK]")
    assert run(list("[THINK]a[/THINK]b"), False, tags) == ("a", "b")
    assert detect_tags("{{ '[THINK]' }}") == tags
    assert detect_tags("split('</think>')") == ReasoningTags()
    assert detect_tags("nothing") is None


def test_prompt_that_opens_the_block() -> None:
    assert opened_by_prompt("<|im_start|>assistant\n<think>\n", ReasoningTags())
    assert not opened_by_prompt("<think>\n\n</think>\n\n", ReasoningTags())
