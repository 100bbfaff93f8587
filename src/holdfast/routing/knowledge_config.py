"""Settings of what a router knows about the workers' KV caches. Must never hold behaviour."""

from __future__ import annotations

from typing import Annotated

import msgspec

from holdfast.base.settings import setting
from holdfast.kv.approximate import TTL


class KnowledgeSettings(msgspec.Struct, frozen=True, kw_only=True):
    """Where the router's knowledge of cached blocks comes from. Times in seconds, sizes in blocks."""

    use_kv_events: Annotated[
        bool,
        setting(
            "DYN_ROUTER_USE_KV_EVENTS",
            "Follow what workers tell about their KV cache; off: guess from the router's own decisions alone.",
            flag="router-kv-events",
        ),
    ] = True
    """Off: every worker is taken for one that tells nothing."""
    kv_events_always: Annotated[
        bool,
        setting(
            "DYN_ROUTER_KV_EVENTS_ALWAYS",
            "Follow them in router modes that do not use them, too, so that /health and metrics show KV caches.",
            flag="router-kv-events-always",
        ),
    ] = False
    """Only ``kv`` uses them."""
    router_ttl: Annotated[
        float,
        setting(
            "DYN_ROUTER_TTL_SECS",
            "Without events: a decision counts for this long as knowledge of what its worker holds.",
            gt=0,
        ),
    ] = TTL
    """Approximate mode only."""
    router_max_tree_size: Annotated[
        int,
        setting(
            "DYN_ROUTER_MAX_TREE_SIZE",
            "Without events: most blocks remembered in decisions; beyond it the oldest are forgotten.",
            ge=1,
        ),
    ] = 1 << 20
    """Approximate mode only; eight bytes each, beside the index."""
    router_predicted_ttl: Annotated[
        float,
        setting(
            "DYN_ROUTER_PREDICTED_TTL_SECS",
            "With events: a decision counts beside them for this long, until its blocks are announced; 0: not at all.",
            ge=0,
        ),
    ] = 0.0
    """Lets requests that arrive together find each other's prefixes."""
    router_index_limit: Annotated[
        int,
        setting(
            "DYN_ROUTER_INDEX_LIMIT",
            "Most distinct blocks in the index for each block size; 0: what the workers hold. "
            "The half that was used last is never forgotten.",
            ge=0,
        ),
    ] = 0
    """A limit makes a lookup of 1,000 blocks 14 µs slower, because use must be noted."""
