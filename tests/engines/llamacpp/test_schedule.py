"""The plan of a step: every generation advances, prompts share what is left in order of arrival."""

import pytest

from holdfast.base.ids import SequenceKey
from holdfast.engines.contract import Sampling, StopRules
from holdfast.engines.llamacpp.schedule import plan_step
from holdfast.engines.llamacpp.sequence import Sequence

pytestmark = pytest.mark.llamacpp


def sequence(key, tokens, computed, **stop):
    made = Sequence(
        SequenceKey(key), [5] * tokens, [], Sampling(), StopRules(**{"max_tokens": 9, **stop}),
        end_ids=(2,), scope=None, grammar=None,
    )  # fmt: skip
    made.computed = computed
    return made


def plan(*sequences):
    return [(chunk.sequence.key, chunk.size, chunk.last) for chunk in plan_step(sequences, 48)]


def test_decodes_go_first_and_prompts_fill_the_rest_in_order():
    assert plan(sequence(1, 100, 0), sequence(2, 10, 9), sequence(3, 20, 0), sequence(4, 7, 6)) == [
        (2, 1, True),
        (4, 1, True),
        (1, 46, False),
    ]
    assert plan(sequence(1, 100, 90), sequence(2, 100, 0)) == [(1, 10, True), (2, 38, False)]
    assert plan(sequence(1, 48, 0), sequence(2, 9, 0)) == [(1, 48, True)]
    assert plan() == []


def test_finish_counts_over_attempts():
    one = sequence(1, 5, 0, max_tokens=3, min_tokens=2)
    assert one.finish_reason(100) is None
    assert one.push(2) == 0
    assert one.finish_reason(100) is None
    one.push(2)
    assert one.finish_reason(100) is None
    one.push(2)
    assert one.finish_reason(100) == "stop"
    other = sequence(1, 5, 0)
    other.push(7)
    assert other.finish_reason(6) == "length"
