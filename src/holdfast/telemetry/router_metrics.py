"""The catalogue's lines about choices by KV caches (``--router-mode kv``). Must never hold behaviour."""

from __future__ import annotations

from holdfast.telemetry.entries import COMPONENT, MODEL, counter, histogram

_MS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 25.0, 50.0, 100.0)
_SHARES = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
_BLOCKS = (0.0, 1.0, 4.0, 16.0, 64.0, 256.0, 1024.0, 4096.0)
_OVERHEAD = "dynamo_router_overhead_"

ROUTING = (
    counter(f"{COMPONENT}router_requests_total", MODEL, "Choices of a worker by its KV cache, one per attempt."),
    histogram(
        f"{COMPONENT}router_kv_hit_rate",
        MODEL,
        "Share of an attempt's blocks that the chosen worker held, as far as the router knew.",
        _SHARES,
    ),
    counter(
        f"{COMPONENT}router_kv_best_eligible_cached_prefix_tokens_total",
        MODEL,
        "Tokens that the best of the workers which could be chosen held, summed over attempts.",
    ),
    counter(
        f"{COMPONENT}router_kv_selected_cached_prefix_tokens_total",
        MODEL,
        "Tokens that the chosen worker held, summed over attempts.",
    ),
    counter(
        f"{COMPONENT}router_non_max_overlap_selections_total",
        MODEL,
        "Choices of a worker that held less than another one, because that one had more to do.",
    ),
    histogram(
        f"{COMPONENT}router_overlap_blocks_lost",
        MODEL,
        "Blocks by which the chosen worker held less than the best one, per choice.",
        _BLOCKS,
    ),
    counter(
        "holdfast_frontend_router_advice_total",
        ("outcome",),
        "Requests for which a stand-alone router was asked: taken (it named a worker), nobody (none is there), late, "
        "refused (it knows no worker), failed. In all but the first case the frontend's own router mode decides.",
        origin="holdfast",
    ),
    histogram(f"{_OVERHEAD}block_hashing_ms", (), "Hashing an attempt's blocks, both kinds of hashes.", _MS),
    histogram(f"{_OVERHEAD}indexer_find_matches_ms", (), "Asking the index who holds them.", _MS),
    histogram(f"{_OVERHEAD}scheduling_ms", (), "Weighing the workers.", _MS),
    histogram(f"{_OVERHEAD}total_ms", (), "All of the three.", _MS),
)
