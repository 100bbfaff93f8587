"""Requests are due at their time stamps, faster, at random, or at once."""

import random
import statistics

import pytest

from holdfast.base.errors import InvalidRequest
from holdfast.replay.arrivals import MOST_IN_FLIGHT, Arrivals, due_times
from holdfast.replay.trace import TraceRequest

TRACE = [TraceRequest(at, 10, 1, (1,)) for at in (5000.0, 5000.0, 6000.0, 9000.0)]


def due(arrivals: Arrivals, trace: list[TraceRequest] = TRACE, seed: int = 1) -> list[float]:
    return [at for at, _ in due_times(trace, arrivals, random.Random(seed))]


def test_time_stamps_count_from_the_first() -> None:
    assert due(Arrivals()) == [0.0, 0.0, 1.0, 4.0]
    assert due(Arrivals(speedup=2.0, concurrency=3)) == [0.0, 0.0, 0.5, 2.0]


def test_a_rate_is_poisson_and_repeats_with_its_seed() -> None:
    many = TRACE[:1] * 20_000
    times = due(Arrivals(rate=8.0), many)
    gaps = [b - a for a, b in zip([0.0, *times], times, strict=False)]
    assert statistics.fmean(gaps) == pytest.approx(1 / 8, rel=0.05)
    assert statistics.pstdev(gaps) == pytest.approx(1 / 8, rel=0.05)
    assert times == due(Arrivals(rate=8.0), many)
    assert times != due(Arrivals(rate=8.0), many, seed=2)


def test_concurrency_alone_needs_no_times() -> None:
    closed = Arrivals(concurrency=16)
    assert closed.closed
    assert closed.seats == 16
    assert due(closed) == [0.0] * 4
    assert not Arrivals(concurrency=16, rate=1.0).closed
    assert Arrivals().seats == MOST_IN_FLIGHT


@pytest.mark.parametrize("wrong", [{"speedup": 0}, {"rate": -1.0}, {"concurrency": 0}, {"speedup": 1.0, "rate": 1.0}])
def test_what_makes_no_sense_is_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(InvalidRequest):
        Arrivals(**wrong)  # type: ignore[arg-type]


def test_it_says_what_it_does() -> None:
    assert Arrivals(concurrency=4).described == "4 at once"
    assert Arrivals(speedup=2.0).described == "time stamps at 2x"
    assert Arrivals(rate=3.0, concurrency=4).described == "3 requests a second, Poisson, at most 4 at once"
