"""Equal hash ids are equal tokens, different ones differ in every piece, and the length is exact."""

import msgspec
import pytest

from holdfast.base.errors import InvalidRequest
from holdfast.engines.contract import unpack_ids
from holdfast.kv.hashes import block_hashes
from holdfast.replay.prompts import Prompts
from holdfast.replay.trace import TraceRequest


def wanted(length: int, *ids: int) -> TraceRequest:
    return TraceRequest(0.0, length, 1, ids)


@pytest.mark.parametrize("length", [1, 63, 64, 511, 512, 513, 1000, 1024, 1025, 1536])
def test_the_length_is_exact_and_both_forms_agree(length: int) -> None:
    request = wanted(length, *range(-(-length // 512)))
    prompts = Prompts()
    ids = unpack_ids(prompts.ids(request))
    assert len(ids) == length
    assert all(1000 <= token < 1256 for token in ids)
    assert msgspec.json.decode(prompts.json(request)) == ids


@pytest.mark.parametrize("engine_block", [16, 64, 128, 512])
def test_prompts_share_exactly_the_blocks_of_equal_ids(engine_block: int) -> None:
    prompts = Prompts()
    one = block_hashes(prompts.ids(wanted(2048, 1, 2, 3, 4)), engine_block)
    other = block_hashes(prompts.ids(wanted(2048, 1, 2, 9, 4)), engine_block)
    shared = sum(a == b for a, b in zip(one, other, strict=True))
    assert shared == 1024 // engine_block
    assert list(one[:shared]) == list(other[:shared])


def test_no_piece_of_a_block_is_in_another() -> None:
    prompts = Prompts(remembered=10)
    seen: set[bytes] = set()
    for number in range(5_000):
        data = prompts.ids(wanted(512, number))
        seen.update(data[at : at + 64] for at in range(0, len(data), 64))
    assert len(seen) == 5_000 * 32


def test_memory_does_not_change_what_is_made() -> None:
    few, many = Prompts(remembered=1), Prompts()
    for number in (1, 2, 3, 1, 2, 1):
        request = wanted(600, number, number + 100)
        assert few.ids(request) == many.ids(request)
        assert bytes(few.json(request)) == bytes(many.json(request))
    assert len(few._packed) == len(few._written) == 1


def test_salt_and_range() -> None:
    request = wanted(512, 7)
    assert Prompts(salt="x").ids(request) != Prompts().ids(request)
    high = unpack_ids(Prompts(first_token=130_000).ids(request))
    assert [token - 130_000 for token in high] == [token - 1000 for token in unpack_ids(Prompts().ids(request))]
    with pytest.raises(InvalidRequest):
        Prompts(first_token=-1)


def test_huge_and_negative_ids_are_ids_too() -> None:
    ids = (10**30, -5, 2**64)
    made = Prompts().ids(wanted(1536, *ids))
    assert len({made[at : at + 2048] for at in range(0, 6144, 2048)}) == 3
