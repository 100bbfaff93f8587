"""Inter-token gaps: counted per token, with bursts shared out, exact whatever the moments of folding."""

from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from holdfast.telemetry.rhythm import Rhythm

DELIVERIES = st.lists(st.tuples(st.integers(0, 5000), st.integers(1, 9), st.booleans()), min_size=1, max_size=200)


def plain(deliveries: list[tuple[int, int, bool]]) -> Counter[int]:
    """What the counts should be, without any cleverness."""
    counts = Counter({0: deliveries[0][1] - 1})
    for gap, tokens, _ in deliveries[1:]:
        counts[gap // tokens] += tokens
    return counts


@given(DELIVERIES)
def test_every_token_but_the_first_has_one_gap_whenever_it_is_folded(deliveries: list[tuple[int, int, bool]]) -> None:
    rhythm, counts, now = Rhythm(), Counter[int](), 1000
    for gap, tokens, fold in deliveries:
        now += gap
        rhythm.ticks.append(now)
        if tokens != 1:
            rhythm.burst(tokens)
        if fold:
            counts += rhythm.fold()
    counts += rhythm.fold()
    assert +counts == +plain(deliveries)
    assert rhythm.tokens == sum(tokens for _, tokens, _ in deliveries)
    assert rhythm.first == 1000 + deliveries[0][0]
    assert rhythm.last == now
    assert len(rhythm.ticks) == 1
    assert rhythm.fold() == Counter()


@given(st.lists(st.tuples(st.integers(1, 9), st.booleans()), min_size=3, max_size=60), st.data())
def test_the_longest_gap_is_remembered_with_the_token_after_it(
    deliveries: list[tuple[int, bool]], data: st.DataObject
) -> None:
    place = data.draw(st.integers(1, len(deliveries) - 1))
    rhythm, now, index = Rhythm(), 0, 0
    expected = -1
    for position, (tokens, fold) in enumerate(deliveries):
        now += 9999 if position == place else 50
        expected = index if position == place else expected
        rhythm.ticks.append(now)
        if tokens != 1:
            rhythm.burst(tokens)
        index += tokens
        if fold:
            rhythm.fold()
    rhythm.fold()
    assert rhythm.longest[0] == (9999, expected)
