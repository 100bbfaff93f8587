"""The rule of the thresholds: strictly greater, any check, all ranks."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from holdfast.routing.saturation import NO_THRESHOLDS, RankLoad, Thresholds, rank_excess, worker_excess

FULL = RankLoad(active_blocks=90, total_blocks=100, prefill_tokens=500)
IDLE = RankLoad(0, 100, 0)
THRESHOLDS = st.builds(
    Thresholds,
    st.none() | st.floats(0, 1),
    st.none() | st.integers(0, 1000),
    st.none() | st.floats(0, 4),
)
LOADS = st.builds(RankLoad, st.integers(0, 200), st.sampled_from([0, 100, 128]), st.integers(0, 2000))


@pytest.mark.parametrize(
    ("thresholds", "knob"),
    [
        (Thresholds(0.9), None),
        (Thresholds(0.89), "DYN_ACTIVE_DECODE_BLOCKS_THRESHOLD"),
        (Thresholds(None, 500), None),
        (Thresholds(None, 499), "DYN_ACTIVE_PREFILL_TOKENS_THRESHOLD"),
        (Thresholds(None, None, 0.5), None),
        (Thresholds(None, None, 0.49), "DYN_ACTIVE_PREFILL_TOKENS_THRESHOLD_FRAC"),
        (Thresholds(1.0, 0, 9.0), "DYN_ACTIVE_PREFILL_TOKENS_THRESHOLD"),
        (NO_THRESHOLDS, None),
    ],
)
def test_strictly_greater_and_any(thresholds: Thresholds, knob: str | None) -> None:
    excess = rank_excess(thresholds, FULL, 1000)
    assert (excess and excess.knob) == knob


def test_a_card_without_a_step_size_practically_never_rejects_by_fraction() -> None:
    thresholds = Thresholds(None, None, 0.001)
    assert rank_excess(thresholds, RankLoad(prefill_tokens=10_000), 0) is None
    assert rank_excess(thresholds, RankLoad(prefill_tokens=10_001), 0) is not None


def test_unknown_blocks_are_not_checked() -> None:
    assert rank_excess(Thresholds(0.0), RankLoad(5, 0, 0), 0) is None


def test_a_worker_is_saturated_only_when_all_of_its_ranks_are() -> None:
    strict = Thresholds(0.5)
    assert worker_excess(strict, [FULL, FULL], 0) is not None
    assert worker_excess(strict, [FULL, IDLE], 0) is None
    assert worker_excess(strict, [FULL, None], 0) is None, "a rank without observation is free"
    assert worker_excess(strict, [], 0) is None
    nearest = worker_excess(strict, [FULL, RankLoad(60, 100)], 0)
    assert nearest is not None
    assert nearest.measured == 0.6, "the rank nearest to being free explains it"


@given(THRESHOLDS, st.lists(st.none() | LOADS, max_size=4), st.integers(0, 4000))
def test_saturated_is_exactly_all_ranks_and_any_check(
    thresholds: Thresholds, ranks: list[RankLoad | None], batched: int
) -> None:
    def over(load: RankLoad | None) -> bool:
        t, assumed = thresholds, batched or 10_000_000
        if load is None:
            return False
        return (
            (
                t.active_decode_blocks_threshold is not None
                and load.total_blocks > 0
                and load.active_blocks / load.total_blocks > t.active_decode_blocks_threshold
            )
            or (
                t.active_prefill_tokens_threshold is not None
                and load.prefill_tokens > t.active_prefill_tokens_threshold
            )
            or (
                t.active_prefill_tokens_threshold_frac is not None
                and load.prefill_tokens / assumed > t.active_prefill_tokens_threshold_frac
            )
        )

    excess = worker_excess(thresholds, ranks, batched)
    assert (excess is not None) == (bool(ranks) and all(over(rank) for rank in ranks))
    if excess is not None:
        assert excess.measured > excess.threshold
