"""Golden vectors of the block-hash rules, and what must hold between them."""

from array import array

import pytest
from xxhash import xxh3_64_intdigest

from holdfast.kv.hashes import (
    block_hashes,
    local_hashes,
    media_hash,
    media_token,
    next_sequence_hash,
    pack_tokens,
    sequence_hashes,
)

LOCAL = [15310707395893867146, 15292316782987903195, 5532946206955930018, 14928757266181269122]
SEQUENCE = [15310707395893867146, 13769157705258532664, 11879827756109914528, 3888788807566526800]


def test_golden_local_hashes():
    assert local_hashes(range(64), 16).tolist() == LOCAL


def test_golden_sequence_hashes():
    assert block_hashes(range(64), 16).tolist() == SEQUENCE
    assert isinstance(block_hashes(range(64), 16), array)


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ({"lora": "my-lora"}, 7774427462321301335),
        ({"salt": "tenant-a"}, 2130915519417463704),
        ({"lora": "my-lora", "salt": "tenant-a"}, 9308087154931608541),
        ({"lora": "", "salt": ""}, LOCAL[0]),
    ],
)
def test_golden_seeds(names, expected):
    assert local_hashes(range(16), 16, **names).tolist() == [expected]


@pytest.mark.parametrize(("values", "expected"), [([0xDEADBEEF], 10080518416733111448), ([9, 5], 2257219656169418572)])
def test_golden_media(values, expected):
    assert local_hashes(range(16), 16, media={0: values}).tolist() == [expected]


def test_golden_lookahead():
    expected = [11423441316381344367, 6554946393898374776]
    assert local_hashes(range(33), 16, lookahead=True).tolist() == expected
    assert local_hashes(range(32), 16, lookahead=True).tolist() == expected[:1]
    assert local_hashes([], 16, lookahead=True).tolist() == []


def test_media_identifiers_and_their_pad_tokens():
    assert media_hash("0123456789abcdef" + "f" * 48) == 0x0123456789ABCDEF
    assert media_hash("z" * 64) == xxh3_64_intdigest(b"z" * 64, 0)
    assert media_hash("image-1") == xxh3_64_intdigest(b"image-1", 0)
    assert media_token(0xFFFF_FFFF_FFFF) == 1_000_000 + (1 << 30) - 1


def test_incomplete_blocks_have_no_hash():
    assert len(block_hashes(range(63), 16)) == 3
    assert block_hashes(range(15), 16).tolist() == []
    assert block_hashes([], 16).tolist() == []


def test_packed_bytes_and_ids_agree():
    assert block_hashes(pack_tokens(range(64)), 16).tolist() == SEQUENCE


def test_chain_can_be_extended_block_by_block():
    parent = None
    for local, expected in zip(LOCAL, SEQUENCE, strict=True):
        parent = next_sequence_hash(parent, local)
        assert parent == expected
    assert sequence_hashes(LOCAL[2:], SEQUENCE[1]).tolist() == SEQUENCE[2:]


def test_a_changed_early_token_changes_every_later_hash():
    changed = block_hashes([99, *range(1, 64)], 16)
    assert not set(changed) & set(SEQUENCE)
