"""Random bits from blocks: all of them random, none of them twice."""

from __future__ import annotations

import pytest

from holdfast.base.randomness import BLOCK_BYTES, BlockRandom


def test_every_width_is_filled_and_not_overstepped() -> None:
    rng = BlockRandom()
    for bits in (1, 7, 8, 9, 53, 64, 128):
        drawn = [rng.getrandbits(bits) for _ in range(300)]
        assert max(drawn) < 1 << bits
        union = 0
        for number in drawn:
            union |= number
        assert union == (1 << bits) - 1, f"a bit of {bits} was never set in 300 draws"


def test_nothing_is_drawn_twice_over_many_blocks() -> None:
    rng = BlockRandom()
    drawn = {rng.getrandbits(128) for _ in range(BLOCK_BYTES)}
    assert len(drawn) == BLOCK_BYTES


def test_more_than_a_block_and_less_than_nothing() -> None:
    rng = BlockRandom()
    assert rng.getrandbits(0) == 0
    assert rng.getrandbits(BLOCK_BYTES * 16).bit_length() > BLOCK_BYTES * 8
    with pytest.raises(ValueError, match="non-negative"):
        rng.getrandbits(-1)
    with pytest.raises(ValueError, match="non-negative"):
        rng.getrandbits(-100)


def test_what_is_built_upon_it_works() -> None:
    rng = BlockRandom()
    assert len(rng.randbytes(16)) == 16
    assert 0.0 <= rng.random() < 1.0
    assert {rng.randrange(3) for _ in range(100)} == {0, 1, 2}
