"""The sampler is a pure function, filters as documented, and is fast enough."""

import time

import numpy as np
import pytest

from holdfast.base.errors import EngineFailed
from holdfast.engines.contract import Sampling, StopRules
from holdfast.engines.llamacpp.sampler import (
    TokenSampler,
    gumbel,
    keep_min_p,
    keep_top_k,
    keep_top_p,
    logprob_of,
)

pytestmark = pytest.mark.llamacpp
VOCAB = 1000
IDS = np.arange(VOCAB)


def sampler(prompt=(), generated=(), stop=None, vocab=VOCAB, **sampling):
    return TokenSampler(
        Sampling(**sampling),
        stop or StopRules(100),
        vocab_size=vocab,
        end_ids=(0, 2),
        prompt=prompt,
        generated=generated,
    )


def logits_of(values, rest=-20.0):
    logits = np.full(VOCAB, rest, np.float32)
    for token, value in values.items():
        logits[token] = value
    return logits


def test_noise_is_keyed_by_seed_index_and_token_alone():
    some = np.array([7, 500, 3])
    assert np.array_equal(gumbel(5, 9, IDS)[some], gumbel(5, 9, some))
    assert not np.array_equal(gumbel(5, 9, some), gumbel(5, 10, some))
    assert not np.array_equal(gumbel(5, 9, some), gumbel(6, 9, some))
    assert gumbel(2**64 - 1, 0, some).tolist() == gumbel(2**64 - 1, 0, some).tolist()


def test_noise_has_the_moments_of_a_standard_gumbel():
    noise = np.concatenate([gumbel(seed, index, IDS) for seed in range(20) for index in range(20)])
    assert abs(noise.mean() - 0.5772) < 0.01
    assert abs(noise.var() - np.pi**2 / 6) < 0.02


def test_draws_follow_the_distribution():
    logits = logits_of({10: 1.0, 20: 0.0, 30: -1.0}, rest=-40.0)
    one = sampler(seed=11)
    counts = np.bincount([one.draw(logits, index) for index in range(6000)], minlength=VOCAB) / 6000
    expected = np.exp([1.0, 0.0, -1.0]) / np.exp([1.0, 0.0, -1.0]).sum()
    assert np.allclose(counts[[10, 20, 30]], expected, atol=0.025)


def test_filters_keep_what_they_say():
    logits = np.log(np.array([0.5, 0.25, 0.15, 0.07, 0.03], np.float32))
    ids = np.arange(5)
    assert keep_top_k(logits, ids, 2).tolist() == [0, 1]
    assert keep_top_k(logits, ids, 9).tolist() == [0, 1, 2, 3, 4]
    assert sorted(keep_top_p(logits, ids, 0.8)) == [0, 1, 2]
    assert keep_top_p(logits, ids, 1e-9).tolist() == [0]
    assert keep_min_p(logits, ids, 0.2).tolist() == [0, 1, 2]
    assert sorted(keep_top_p(logits, np.array([2, 3, 4]), 0.7)) == [2, 3]


def test_top_p_over_a_flat_distribution_needs_more_than_its_head():
    flat = np.zeros(5000, np.float32)
    assert abs(len(keep_top_p(flat, np.arange(5000), 0.5)) - 2500) <= 1


def test_penalties_look_at_prompt_and_output_as_documented():
    logits = logits_of({10: 2.0, 20: 1.9, 30: 1.8, 40: -1.0})
    assert sampler(temperature=0.0, prompt=[10], repetition_penalty=1.2).draw(logits, 0) == 20
    assert sampler(temperature=0.0, prompt=[10], presence_penalty=1.0).draw(logits, 0) == 10
    assert sampler(temperature=0.0, generated=[10], presence_penalty=0.15).draw(logits, 1) == 20
    assert sampler(temperature=0.0, generated=[10, 10, 20], frequency_penalty=0.15).draw(logits, 3) == 30
    counted = sampler(temperature=0.0, presence_penalty=0.15)
    assert counted.draw(logits, 0) == 10
    counted.accept(10)
    assert counted.draw(logits, 1) == 20


def test_bias_endings_and_minimum():
    logits = logits_of({2: 5.0, 10: 4.0, 50: 3.0})
    assert sampler(temperature=0.0).draw(logits, 0) == 2
    assert sampler(temperature=0.0, logit_bias={50: 100.0}).draw(logits, 0) == 50
    assert sampler(temperature=0.0, stop=StopRules(9, min_tokens=3)).draw(logits, 2) == 10
    assert sampler(temperature=0.0, stop=StopRules(9, min_tokens=3)).draw(logits, 3) == 2
    assert sampler(temperature=0.0, stop=StopRules(9, min_tokens=3, stop_token_ids=(10,))).draw(logits, 0) == 50
    assert sampler(temperature=0.0, stop=StopRules(9, ignore_eos=True)).draw(logits, 5) == 10
    assert logits[2] == 5.0, "raw logits must stay as they are"


class _Only:
    def __init__(self, *allowed):
        self.allowed, self.asked = set(allowed), 0

    def first_allowed(self, ordered):
        self.asked += len(ordered)
        return next((int(i) for i in ordered if int(i) in self.allowed), None)


@pytest.mark.parametrize("options", [{"temperature": 0.0}, {"seed": 3}, {"seed": 3, "top_k": 5}])
def test_a_guide_wins_over_every_filter_and_unlikely_tokens_are_found(options):
    logits = np.random.default_rng(1).normal(size=VOCAB).astype(np.float32)
    worst = int(logits.argmin())
    assert sampler(**options).draw(logits, 4, _Only(worst)) == worst
    assert sampler(**options).draw(logits, 4, _Only()) is None
    free = sampler(**options).draw(logits, 4)
    easy = _Only(free)
    assert sampler(**options).draw(logits, 4, easy) == free
    assert easy.asked <= 16


def test_guided_draws_are_the_renormalised_distribution():
    logits = logits_of({10: 3.0, 20: 1.0, 30: 0.0})
    one = sampler(seed=4)
    counts = np.bincount([one.draw(logits, i, _Only(20, 30)) for i in range(3000)], minlength=VOCAB) / 3000
    assert np.allclose(counts[[20, 30]], np.exp([1, 0]) / np.exp([1, 0]).sum(), atol=0.03)


def test_logprobs_sum_to_one_and_break_ties_by_id():
    logits = np.random.default_rng(0).normal(size=VOCAB).astype(np.float32)
    logits[[5, 9]] = 7.0
    whole = logprob_of(logits, 5, VOCAB - 1)
    assert abs(sum(np.exp(value) for _, value in whole.top) - 1) < 1e-3
    assert [i for i, _ in whole.top[:2]] == [5, 9]
    assert logprob_of(logits, 33, 0).top == ()


def test_broken_logits_are_an_engine_failure():
    with pytest.raises(EngineFailed):
        sampler().draw(np.full(VOCAB, np.nan, np.float32), 0)


def test_greedy_over_a_full_vocabulary_takes_well_under_a_millisecond():
    logits = np.random.default_rng(0).normal(size=49152).astype(np.float32)
    one = sampler(vocab=49152, temperature=0.0)
    best = min(_timed(lambda: one.draw(logits, 0)) for _ in range(50))
    assert best < 0.5e-3


def _timed(action):
    start = time.perf_counter()
    action()
    return time.perf_counter() - start
