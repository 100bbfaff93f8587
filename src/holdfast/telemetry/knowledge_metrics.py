"""The catalogue's lines about what a frontend knows of the workers' KV caches. Must never hold behaviour."""

from __future__ import annotations

from holdfast.telemetry.entries import COMPONENT, OURS, counter, gauge

KNOWLEDGE = (
    gauge(
        f"{COMPONENT}kv_cache_events_applied",
        ("event_type", "status"),
        "KV events in the index since the start: stored, removed, cleared; status ok, or invalid_block for messages "
        "that could not be read. Only rises.",
    ),
    gauge(f"{COMPONENT}router_worker_registered", ("worker_id",), "1 for each worker whose KV cache is kept track of."),
    gauge(
        f"{COMPONENT}router_kv_event_source_mismatch_workers",
        (),
        "Workers that tell no KV events although this frontend wants to follow them.",
    ),
    gauge(
        f"{OURS}kv_workers",
        ("state",),
        "Workers by how well their KV cache is known: exact, resynchronising, approximate, none.",
        origin="holdfast",
    ),
    counter(
        f"{OURS}kv_resynchronisations_total",
        ("reason",),
        "Times a worker's KV events were not complete: joined (first contact), new_epoch (it started anew), gap, "
        "mismatch (its own counts differ), overrun (too slow here), silent, broken.",
        origin="holdfast",
    ),
    counter(
        f"{OURS}kv_repeated_batches_total",
        (),
        "Batches of KV events that came again and were left out.",
        origin="holdfast",
    ),
    gauge(f"{OURS}kv_blocks", (), "Distinct blocks in the exact indexes.", origin="holdfast"),
    gauge(f"{OURS}kv_index_bytes", (), "Memory of the exact indexes.", origin="holdfast"),
    gauge(f"{OURS}kv_remembered_hashes", (), "Block hashes in decisions that count as knowledge.", origin="holdfast"),
    gauge(
        f"{OURS}kv_worker_blocks",
        ("worker_id",),
        "Blocks that a worker is known to hold, all tiers.",
        origin="holdfast",
    ),
    gauge(
        f"{OURS}kv_silence_seconds",
        ("worker_id",),
        "Since a worker's last word about its KV cache; it should be below 2.",
        origin="holdfast",
    ),
)
