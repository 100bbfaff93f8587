"""The catalogue's lines about the stand-alone router process. Must never hold behaviour."""

from __future__ import annotations

from holdfast.telemetry.entries import TINY, counter, gauge, histogram

_OURS = "holdfast_router_"

STANDALONE = (
    counter(
        f"{_OURS}questions_total",
        ("endpoint", "outcome"),
        "Questions by endpoint (best_worker_id, get_overlap_scores …) and what came of them: ok, or the error's code.",
        "router",
        "holdfast",
    ),
    histogram(f"{_OURS}answer_seconds", (), "From a question to its answer.", TINY, "router", origin="holdfast"),
    counter(
        f"{_OURS}streams_total",
        ("outcome",),
        "Streams that went through this router, by the state that they ended in (done, cancelled, rejected, failed …).",
        "router",
        "holdfast",
    ),
    counter(f"{_OURS}tokens_total", (), "Tokens of these streams.", "router", "holdfast"),
    counter(
        f"{_OURS}migrations_total",
        ("outcome",),
        "Attempts of these streams that failed (started), and moves after which tokens came (resumed).",
        "router",
        "holdfast",
    ),
    gauge(f"{_OURS}active_streams", (), "Streams that go through this router now.", "router", "holdfast"),
    gauge(f"{_OURS}leases", (), "Shares of workers held for callers that route by themselves.", "router", "holdfast"),
    counter(f"{_OURS}leases_expired_total", (), "Leases that nobody freed in time.", "router", "holdfast"),
    gauge(f"{_OURS}workers", ("state",), "Workers by the state that this router sees them in.", "router", "holdfast"),
    gauge(
        f"{_OURS}kv_workers",
        ("state",),
        "Workers by how well their cache is known: exact, resynchronising, approximate, none.",
        "router",
        "holdfast",
    ),
    gauge(f"{_OURS}kv_blocks", (), "Distinct blocks in the index.", "router", "holdfast"),
    counter(
        f"{_OURS}kv_resynchronisations_total",
        ("reason",),
        "Times a worker's cache contents had to be fetched.",
        "router",
        "holdfast",
    ),
)
