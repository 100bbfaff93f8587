"""Block hashes: the names under which routers and engines speak of the same piece of KV cache.

With ``H(bytes, seed)`` = XXH3-64, tokens as little-endian u32 and wrapping u64 arithmetic:

* seed = 1337 (+ ``H(lora, 0)`` with an adapter) (+ ``H(salt, 1)`` with a cache salt); empty means absent;
* local hash of a block: ``H(its tokens, seed)``, complete blocks only;
* sequence hash: ``s0 = l0``, ``si = H(LE64(s(i-1)) + LE64(li), 1337)``: it names the block *and* all before it.

These rules are bit-equal to what the serving world's KV routers compute, so that events from foreign
engines can be indexed; ``tests/kv/test_kv_hashes.py`` holds the golden vectors.

Must never hold state.
"""

from __future__ import annotations

import sys
from array import array
from collections.abc import Iterable, Sequence

from xxhash import xxh3_64_intdigest

SEED = 1337
_MASK = (1 << 64) - 1
_TOKEN_BYTES = 4


def hash_seed(*, lora: str | None = None, salt: str | None = None) -> int:
    """Return the seed of the local hashes for an adapter name and a cache salt (both optional)."""
    seed = SEED
    if lora:
        seed += xxh3_64_intdigest(lora.encode(), 0)
    if salt:
        seed += xxh3_64_intdigest(salt.encode(), 1)
    return seed & _MASK


def local_hashes(
    token_ids: Sequence[int] | bytes, block_size: int, *, lora: str | None = None, salt: str | None = None
) -> array[int]:
    """Return one u64 per complete block, each from the block's own tokens only.

    Args:
        token_ids: token ids, or the same as little-endian u32 bytes (as they cross the wire).
        block_size: tokens per block, at least 1.
        lora: adapter name that the KV values depend on.
        salt: cache salt that keeps tenants apart.

    Returns:
        ``array('Q')`` of ``len(token_ids) // block_size`` hashes.
    """
    data = token_ids if isinstance(token_ids, bytes) else pack_tokens(token_ids)
    seed = hash_seed(lora=lora, salt=salt)
    width = block_size * _TOKEN_BYTES
    end = len(data) - len(data) % width
    return array("Q", [xxh3_64_intdigest(data[at : at + width], seed) for at in range(0, end, width)])


def next_sequence_hash(parent: int | None, local: int) -> int:
    """Return the sequence hash of a block from its local hash and the sequence hash before it."""
    if parent is None:
        return local
    return xxh3_64_intdigest(parent.to_bytes(8, "little") + local.to_bytes(8, "little"), SEED)


def sequence_hashes(local: Iterable[int], parent: int | None = None) -> array[int]:
    """Return the chained hashes (``array('Q')``) of consecutive blocks from their local hashes."""
    chained = array("Q")
    for one in local:
        parent = next_sequence_hash(parent, one)
        chained.append(parent)
    return chained


def block_hashes(
    token_ids: Sequence[int] | bytes, block_size: int, *, lora: str | None = None, salt: str | None = None
) -> array[int]:
    """Return the sequence hash of every complete block; arguments as in `local_hashes`."""
    return sequence_hashes(local_hashes(token_ids, block_size, lora=lora, salt=salt))


def pack_tokens(token_ids: Sequence[int]) -> bytes:
    """Return token ids as little-endian u32 bytes, on machines of either byte order."""
    packed = array("I", token_ids)
    if sys.byteorder == "big":
        packed.byteswap()
    return packed.tobytes()
