"""Profiles: sizes fill in, step models follow their terms, and published rows of hardware are met."""

import asyncio
import random
from typing import get_args

import pytest
from bench import mock_fidelity

from holdfast.engines.mock import MockConfig, MockEngine
from holdfast.engines.mock.config import ProfileName
from holdfast.engines.mock.profiles import PROFILES, applied
from holdfast.engines.mock.timing import Experts, StepModel, step_seconds
from tests.engines.mock.mockrun import request, running
from tests.support.virtual_time import virtual

MODEL = StepModel(base_ms=10.0, sequence_ms=0.1, context_ns=50.0, prefill_us=20.0, pair_ns=4.0)


def test_every_name_has_a_profile_with_a_source():
    assert set(PROFILES) == set(get_args(ProfileName))
    assert all(profile.source for profile in PROFILES.values())


def test_sizes_fill_in_what_stands_at_its_default():
    plain = MockConfig()
    assert applied(plain) is plain
    given = applied(MockConfig(profile="reference", num_blocks=100))
    assert (given.num_blocks, given.block_size, given.watermark, given.context_length) == (100, 64, 0.01, 131_072)
    assert MockEngine(MockConfig(profile="h100-qwen3-32b-tp2")).config.num_blocks == 4_200


def test_the_terms_of_a_step():
    assert MODEL.ms(0, 0, 0, 0.0) == 0.0
    assert MODEL.ms(0, 4, 8_000, 0.0) == pytest.approx(10 + 0.4 + 0.4)
    assert MODEL.ms(1_000, 0, 0, 500_000.0) == pytest.approx(10 + 20 + 2)
    both = MODEL.ms(1_000, 4, 8_000, 500_000.0)
    assert both == pytest.approx(10 + 20 + 2 + 0.8)  # the weights are read once


def test_experts_saturate():
    experts = Experts(count=256, chosen=8, all_ms=10.0)
    assert experts.ms(1) == pytest.approx(10 * 8 / 256)
    assert 9.9 < experts.ms(1_000) <= 10.0


def test_speed_ups_divide_their_parts():
    config = MockConfig(speedup_ratio=2.0, decode_speedup_ratio=4.0)
    prefill = MODEL.ms(1_000, 0, 0, 0.0)
    decode = MODEL.ms(1_000, 4, 8_000, 0.0) - prefill
    seconds = step_seconds(config, 1_000, 4, 0.5, model=MODEL, context=8_000)
    assert seconds == pytest.approx((prefill / 2 + decode / 8) / 1e3)
    assert step_seconds(MockConfig(speedup_ratio=0.0), 1_000, 4, 0.5, model=MODEL) == 0.0


@virtual
async def test_an_engine_takes_as_long_as_its_profile_says():
    async with running(step_ms=None, profile="h100-qwen3-32b-tp2") as run:
        begin = asyncio.get_running_loop().time()
        await run.finish(run.submit(request(max_tokens=3)))
        prompt = len(request().prompt_ids) // 4
        model = PROFILES["h100-qwen3-32b-tp2"].model
        assert model is not None
        expected = (
            model.ms(prompt, 0, 0, prompt * prompt / 2) + model.ms(0, 1, prompt, 0) + model.ms(0, 1, prompt + 1, 0)
        )
        assert run.times[-1] - begin == pytest.approx(expected / 1e3)


@pytest.mark.parametrize("profile", [name for name, profile in PROFILES.items() if profile.model is not None])
def test_published_rows_are_met(profile: ProfileName):
    """The smallest row and one in the middle; ``python -m bench.mock_fidelity`` has them all."""
    rows = [row for row in mock_fidelity.ROWS if row.profile == profile]
    found = {row: mock_fidelity.simulate(row) for row in (rows[1], rows[2])}
    mean = mock_fidelity.mean_errors(found, profile)
    assert mean.rate < 0.06
    assert mean.tpot < 0.06
    assert mean.ttft < 0.15


def test_the_load_of_the_rows_repeats_and_has_nothing_in_common():
    one, two = (list(mock_fidelity.load(4, random.Random(5))) for _ in range(2))
    assert one == two
    assert len(one) == 40
    ids = [number for request in one for number in request.hash_ids]
    assert len(set(ids)) == len(ids)
    assert all(819 <= request.input_length <= 1024 for request in one)
