"""Templates: what many prompts continue differently, and nothing else."""

from __future__ import annotations

from array import array

from holdfast.kv.hashes import sequence_hashes
from holdfast.routing.templates import DEEPEST_TOKENS, Templates

BLOCK = 64


def prompt(*parts: tuple[int, int]) -> array[int]:
    """Blocks of parts: (name, length)."""
    return sequence_hashes(1 + name * 10_000 + at for name, length in parts for at in range(length))


def test_two_conversations_with_a_short_beginning_have_a_template() -> None:
    seen = Templates()
    assert seen.note(prompt((0, 10), (1, 5)), BLOCK) == 0
    assert seen.note(prompt((0, 10), (2, 5)), BLOCK) == 10
    assert seen.note(prompt((0, 10), (1, 9)), BLOCK) == 10, "the first one, grown"


def test_a_conversation_that_grows_or_comes_again_is_no_template() -> None:
    seen = Templates()
    for length in (5, 5, 9, 20, 20, 31):
        assert seen.note(prompt((1, length)), BLOCK) == 0


def test_a_long_document_with_few_questions_keeps_its_credit_until_there_are_many() -> None:
    seen = Templates()
    document = 10_240 // BLOCK
    found = [seen.note(prompt((0, document), (number, 2)), BLOCK) for number in range(1, 14)]
    assert found[:9] == [0] * 9
    assert found[9:] == [document] * 4, "shared by ten it is cheap to have everywhere"


def test_nested_beginnings() -> None:
    seen = Templates()
    for number in range(1, 6):
        seen.note(prompt((0, 4), (100, 4), (number, 3)), BLOCK)
    assert seen.note(prompt((0, 4), (200, 4), (9, 3)), BLOCK) == 4
    assert seen.note(prompt((0, 4), (100, 4), (7, 3)), BLOCK) == 8


def test_off_bounded_and_never_deeper_than_the_limit() -> None:
    assert Templates(tokens_each=0).note(prompt((0, 4)), BLOCK) == 0
    seen = Templates(blocks=100)
    for number in range(1, 400):
        seen.note(prompt((0, 4), (number, 6)), BLOCK)
        assert seen._now.blocks + seen._old.blocks <= 3 * 110
    assert seen.note(prompt((0, 4), (999, 6)), BLOCK) == 4, "what was forgotten is remembered by the other generation"
    deep = Templates()
    for number in range(1, 200):
        assert deep.note(prompt((0, 2000), (number, 6)), BLOCK) * BLOCK <= DEEPEST_TOKENS
