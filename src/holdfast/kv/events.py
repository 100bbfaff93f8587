"""What an engine says about its KV cache blocks.

Must never hold state; `holdfast.kv.index` is what they feed.
"""

from __future__ import annotations

import msgspec


class BlockStored(msgspec.Struct, frozen=True, tag="stored", omit_defaults=True):
    """Blocks became available, in prefix order.

    ``block_hashes``: u64, our sequence hashes or names of the engine's own (`Capabilities.kv_hashes`);
    ``parent_hash``: the block before the first, None at the root; ``token_ids``: all tokens of the blocks,
    ``block_size`` each.
    """

    block_hashes: tuple[int, ...]
    parent_hash: int | None
    token_ids: tuple[int, ...]
    block_size: int
    medium: str = "GPU"
    dp_rank: int = 0
    lora: str | None = None
    """Adapter that the KV values belong to."""
    salt: str | None = None
    """Cache salt that keeps them apart."""


class BlockRemoved(msgspec.Struct, frozen=True, tag="removed", omit_defaults=True):
    """Blocks were evicted."""

    block_hashes: tuple[int, ...]
    medium: str = "GPU"
    dp_rank: int = 0


class AllBlocksCleared(msgspec.Struct, frozen=True, tag="cleared", omit_defaults=True):
    """The whole cache was dropped."""

    dp_rank: int = 0


KvEvent = BlockStored | BlockRemoved | AllBlocksCleared
