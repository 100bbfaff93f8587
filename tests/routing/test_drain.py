"""The drain rate is what was measured, and Retry-After follows it."""

from __future__ import annotations

import pytest

from holdfast.routing.drain import LEAST, MOST, UNKNOWN, DrainMeter


def test_unknown_at_first() -> None:
    meter = DrainMeter()
    assert meter.rate("m", 5.0) == 0
    assert meter.retry_after("m", 100, 5.0) == UNKNOWN


@pytest.mark.parametrize("rate", [0.5, 4.0, 200.0])
@pytest.mark.parametrize("seconds", [5.0, 60.0])
def test_a_steady_rate_is_measured(rate: float, seconds: float) -> None:
    meter = DrainMeter()
    for i in range(int(rate * seconds) + 1):
        meter.ended("m", 100.0 + i / rate)
    assert meter.rate("m", 100.0 + seconds) == pytest.approx(rate, rel=0.5)
    wanted = min(MOST, max(LEAST, 11 / rate))
    assert meter.retry_after("m", 10, 100.0 + seconds) == pytest.approx(wanted, rel=0.5)
    assert meter.rate("other", 100.0) == 0


def test_silence_makes_it_longer_but_never_endless() -> None:
    meter = DrainMeter()
    for i in range(20):
        meter.ended("m", i / 10)
    told = [meter.retry_after("m", 5, 2.0 + silence) for silence in (0, 10, 30, 100, 10_000)]
    assert told[:4] == sorted(told[:4])
    assert (told[0], told[3]) == (LEAST, MOST)
    assert told[4] == UNKNOWN, "so long ago that it says nothing"
