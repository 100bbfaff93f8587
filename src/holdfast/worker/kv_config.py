"""Settings of what a worker tells about its KV cache. Must never hold behaviour."""

from __future__ import annotations

from typing import Annotated

import msgspec

from holdfast.base.settings import setting

KEPT_HASHES = 262_144
"""Block changes that are kept for subscribers that are behind (2 MiB)."""


class KvPublishConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Whether and how this worker tells about its KV cache. Times in seconds."""

    publish_kv_events: Annotated[
        bool,
        setting("DYN_KV_EVENTS", "Tell frontends which blocks are in the KV cache.", flag="kv-events"),
    ] = True
    """Off: frontends guess from their own decisions."""
    kv_events_batch_ms: Annotated[
        float,
        setting("DYN_KV_EVENTS_BATCH_MS", "Changes wait this many milliseconds for others to travel with.", ge=0),
    ] = 5.0
    """An upper bound on how much older a frontend's knowledge is because of batching."""
    kv_events_kept: Annotated[
        int,
        setting(
            "DYN_KV_EVENTS_KEPT",
            "Block changes kept for frontends that are behind; one further behind gets everything anew.",
            ge=1,
        ),
    ] = KEPT_HASHES
    """Eight bytes each."""
    kv_events_beat_secs: Annotated[
        float, setting("DYN_KV_EVENTS_BEAT_SECS", "How often counts are compared with frontends and engine.", gt=0)
    ] = 1.0
    """Also how soon a frontend notices that the last changes did not reach it."""
