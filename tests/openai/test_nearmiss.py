"""Misspelt fields are recognised, other words are left alone."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from holdfast.openai.nearmiss import edit_distance, nearest
from holdfast.openai.types import ChatCompletionRequest

KNOWN = frozenset(ChatCompletionRequest.__struct_fields__)


def reference(a: str, b: str) -> int:
    """Optimal string alignment by the book."""
    table = {(i, -1): i + 1 for i in range(-1, len(a))} | {(-1, j): j + 1 for j in range(-1, len(b))}
    for i, x in enumerate(a):
        for j, y in enumerate(b):
            best = min(table[i - 1, j] + 1, table[i, j - 1] + 1, table[i - 1, j - 1] + (x != y))
            if i and j and x == b[j - 1] and a[i - 1] == y:
                best = min(best, table[i - 2, j - 2] + 1)
            table[i, j] = best
    return table[len(a) - 1, len(b) - 1]


@given(st.text("abc", max_size=7), st.text("abc", max_size=7), st.integers(0, 4))
def test_edit_distance_up_to_a_bound(a: str, b: str, bound: int) -> None:
    assert edit_distance(a, b, bound) == min(reference(a, b), bound + 1)


@pytest.mark.parametrize(
    ("word", "meant"),
    [
        ("max_tokesn", "max_tokens"), ("maxtokens", "max_tokens"),
        ("TOP_P", "top_p"), ("frequencypenalty", "frequency_penalty"),
        ("stopp", "stop"), ("sede", "seed"), ("tool_choise", "tool_choice"), ("logit_biases", "logit_bias"),
        ("include_usage", None), ("m", None), ("nn", None), ("extra", None), ("x" * 65, None), ("cost", None),
        ("conversation_id", None), ("num_beams", None), ("session", None), ("thinking", None), ("", None),
    ],
)  # fmt: skip
def test_nearest(word: str, meant: str | None) -> None:
    assert nearest(word, KNOWN) == meant


def test_known_fields_are_not_taken_for_each_other() -> None:
    assert all(nearest(name, KNOWN) == name for name in KNOWN)
