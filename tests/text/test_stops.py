"""Stop strings are found at every split point, and nothing else is ever lost or leaked."""

from __future__ import annotations

import time
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from holdfast.text.stops import StopMatcher


def oracle(text: str, stops: list[str], include: bool = False) -> tuple[str, str | None, int]:
    """Whole-text answer: earliest end wins, ties by earliest start. Returns output, stop, end."""
    found = [(text.find(s) + len(s), -len(s), s) for s in stops if s and s in text]
    if not found:
        return text, None, len(text)
    end, _, stop = min(found)
    return (text[:end] if include else text[: end - len(stop)]), stop, end


def run(pieces: list[str], stops: list[str], include: bool = False) -> tuple[str, str | None, int]:
    matcher = StopMatcher(stops, include_stop=include)
    out, seen = "", 0
    for piece in pieces:
        safe, stop = matcher.feed(piece)
        out += safe
        if stop is not None:
            assert matcher.matched == stop
            return out, stop, seen + matcher.match_end
        seen += len(piece)
    return out + matcher.flush(), None, seen


CASES = [
    ("hello world END tail", ["END"]),
    ("aaaaab", ["aab"]),
    ("abcabcabd", ["abcabd"]),
    ("xabcdey", ["abcde", "bcd"]),  # the shorter one completes first
    ("xabcdey", ["cd", "abcd"]),  # both complete at once: the longer one is cut
    ("abab", ["ababc", "b"]),
    ("almost STO", ["STOP"]),
    ("漢字。次の文", ["。"]),
    ("a\n\nb", ["\n\n", "\n\n\n"]),
    ("👩‍👩‍👧‍👦 x 👩‍👩‍👧", ["👩‍👩‍👧 "]),
    ("User: hi\nUser:", ["\nUser:"]),
    ("", ["x"]),
    ("STOP", ["STOP"]),
    ("none here", [""]),
]


@pytest.mark.parametrize("include", [False, True])
@pytest.mark.parametrize(("text", "stops"), CASES)
def test_every_split_into_three(text: str, stops: list[str], include: bool) -> None:
    want = oracle(text, stops, include)
    for i in range(len(text) + 1):
        for j in range(i, len(text) + 1):
            assert run([text[:i], text[i:j], text[j:]], stops, include) == want
    assert run(list(text), stops, include) == want


@settings(max_examples=400, deadline=None)
@given(
    text=st.text("abñ\n", max_size=40),
    stops=st.lists(st.text("abñ\n", min_size=1, max_size=6), min_size=1, max_size=4),
    cuts=st.lists(st.integers(0, 40), max_size=8),
    include=st.booleans(),
)
def test_equals_the_whole_text_oracle(text: str, stops: list[str], cuts: list[int], include: bool) -> None:
    edges = sorted({0, len(text), *(c for c in cuts if c < len(text))})
    pieces = [text[a:b] for a, b in pairwise(edges)]
    assert run(pieces, stops, include) == oracle(text, stops, include)


@settings(max_examples=200, deadline=None)
@given(text=st.text("ab", max_size=30), stops=st.lists(st.text("ab", min_size=1, max_size=5), min_size=1, max_size=3))
def test_holds_back_exactly_what_may_become_a_stop(text: str, stops: list[str]) -> None:
    matcher = StopMatcher(stops)
    out = ""
    for at, char in enumerate(text, 1):
        safe, stop = matcher.feed(char)
        out += safe
        if stop is not None:
            return
        seen = text[:at]
        longest = max(k for s in stops for k in range(len(s)) if seen.endswith(s[:k]))
        assert out == seen[: at - longest]


def test_state_is_rebuilt_by_feeding_the_same_text() -> None:
    text = "abcabcabd and more"
    for cut in range(len(text)):
        first, second = StopMatcher(["abcabdx", "d a"]), StopMatcher(["abcabdx", "d a"])
        for char in text[:cut]:
            first.feed(char)
        second.feed(text[:cut])
        assert first.feed(text[cut:]) == second.feed(text[cut:])


def test_nothing_follows_a_match() -> None:
    matcher = StopMatcher(["x"])
    assert matcher.feed("axb") == ("a", "x")
    assert matcher.feed("cx") == ("", None)
    assert matcher.flush() == ""


def test_hostile_strings_cost_linear_time() -> None:
    stops = ["a" * n + "b" for n in range(1_000, 1_016)]
    matcher = StopMatcher(stops)
    start = time.process_time()
    for _ in range(1_000):
        matcher.feed("aaaa")
    assert time.process_time() - start < 1.0
