"""Thresholds that change while the fleet runs: partial, clearable, and the same at every frontend in the end."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from holdfast.routing.saturation import NO_THRESHOLDS, THRESHOLD_NAMES, Thresholds
from holdfast.routing.thresholds import ThresholdBook

BLOCKS, TOKENS, FRACTION = THRESHOLD_NAMES


def test_partial_updates_and_clearing() -> None:
    book = ThresholdBook("a", Thresholds(0.9))
    changes: list[int] = []
    book.on_change = lambda: changes.append(1)
    assert book.of("m") == Thresholds(0.9)
    book.set("m", {TOKENS: 10})
    assert book.of("m") == Thresholds(0.9, 10)
    assert book.of("other") == Thresholds(0.9), "per model"
    book.set("m", {BLOCKS: None})
    assert book.of("m") == Thresholds(None, 10), "null clears, also what the settings say"
    book.set("m", {TOKENS: None})
    assert book.of("m") == NO_THRESHOLDS
    book.set("m", {})
    assert len(changes) == 3


def test_news_reach_others_and_old_news_change_nothing() -> None:
    a, b = ThresholdBook("a", NO_THRESHOLDS), ThresholdBook("b", NO_THRESHOLDS)
    a.set("org/model", {BLOCKS: 0.5, TOKENS: 7})
    old = a.export()
    assert b.merge(old)
    assert b.of("org/model") == Thresholds(0.5, 7)
    b.set("org/model", {BLOCKS: None})
    assert not b.merge(old), "an older register does not undo a newer clearing"
    assert a.merge(b.export())
    assert a.of("org/model") == b.of("org/model") == Thresholds(None, 7)
    c = ThresholdBook("c", NO_THRESHOLDS)
    c.merge(b.export())
    assert c.of("org/model") == Thresholds(None, 7), "one that comes late learns what the others learned"


def test_nonsense_is_skipped() -> None:
    book = ThresholdBook("a", NO_THRESHOLDS)
    news = {"slot": "running", f"busy-threshold/{BLOCKS}/m": "nonsense", "busy-threshold/unknown/m": '[1,"x",1]'}
    assert not book.merge({**news, f"busy-threshold/{BLOCKS}/m2": 5})
    assert book.of("m") == NO_THRESHOLDS


STEPS = st.lists(
    st.tuples(
        st.integers(0, 2),
        st.sampled_from(THRESHOLD_NAMES),
        st.none() | st.integers(0, 1),
        st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2)), max_size=3),
    ),
    max_size=12,
)


@given(STEPS)
def test_all_frontends_agree_whatever_the_order_of_the_news(steps: list) -> None:
    books = [ThresholdBook(name, NO_THRESHOLDS) for name in "abc"]
    for who, name, value, news in steps:
        books[who].set("m", {name: value})
        for source, target in news:
            books[target].merge(books[source].export())
    for _ in range(2):
        for source in books:
            for target in books:
                target.merge(source.export())
    assert books[0].of("m") == books[1].of("m") == books[2].of("m")
    assert books[0].export() == books[2].export()
