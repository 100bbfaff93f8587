"""Made-up load: lengths as asked, nothing in common, as many as the rate says."""

from __future__ import annotations

import random

import pytest

from holdfast.base.errors import InvalidRequest
from holdfast.replay.loads import Lengths, MadeUp, MadeUpLoad, read_lengths


@pytest.mark.parametrize(
    ("text", "low", "high"), [("1024", 1024, 1024), ("512-2048", 512, 2048), ("1,024", 1024, 1024)]
)
def test_lengths(text: str, low: int, high: int) -> None:
    assert read_lengths(text, "input-length") == Lengths(low, high)


@pytest.mark.parametrize("text", ["0", "x", "5-3", "", "-4", "2000000"])
def test_wrong_lengths_name_their_flag(text: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        read_lengths(text, "input-length")
    assert "--input-length" in caught.value.message


def test_requests_have_nothing_in_common() -> None:
    makes = MadeUp(Lengths(100, 2000), Lengths(5, 9), random.Random(1))
    found = list(makes.at_rate(50.0, 20.0))
    assert 850 < len(found) < 1150
    assert all(100 <= r.input_length <= 2000 and 5 <= r.output_length <= 9 for r in found)
    assert {r.output_length for r in found} == {5, 6, 7, 8, 9}
    ids = [number for r in found for number in r.hash_ids]
    assert len(ids) == len(set(ids))
    assert [r.timestamp for r in found] == sorted(r.timestamp for r in found)
    assert found[-1].timestamp < 20_000


def test_a_closed_load_ends_with_its_time() -> None:
    load = MadeUpLoad(MadeUp(Lengths(1, 1), Lengths(1, 1), random.Random(1)), 10.0, None, 4)
    times = iter([0.0, 5.0, 9.9, 10.0])
    assert len(list(load.requests(lambda: next(times)))) == 3
    assert load.arrivals.closed
    assert load.described == "4 at once, 1 tokens in, 1 out"


def test_a_load_says_what_it_is() -> None:
    makes = MadeUp(Lengths(8, 9), Lengths(1, 1), random.Random(1))
    assert (
        MadeUpLoad(makes, 1.0, 5.0, 3).described
        == "5 requests a second, Poisson, at most 3 at once, 8-9 tokens in, 1 out"
    )
