"""The worker's lines of the catalogue. Must never hold behaviour."""

from __future__ import annotations

from holdfast.telemetry.entries import COMPONENT, HOSTED, LONG, SERVED, WORKER, counter, gauge, histogram

HANDLER = (
    counter(f"{COMPONENT}requests_total", SERVED, "Calls that came in.", "worker"),
    counter(f"{COMPONENT}request_bytes_total", SERVED, "Bytes of the calls' payloads.", "worker"),
    counter(f"{COMPONENT}response_bytes_total", SERVED, "Bytes of tokens sent back, four per token.", "worker"),
    gauge(f"{COMPONENT}inflight_requests", SERVED, "Calls accepted and not over.", "worker"),
    histogram(f"{COMPONENT}request_duration_seconds", SERVED, "From the call to its end.", LONG, "worker"),
    counter(
        f"{COMPONENT}errors_total",
        (*SERVED, "error_type"),
        "Calls that failed: deserialization, invalid_message, generate, response_stream, publish_response.",
        "worker",
    ),
    counter(
        f"{COMPONENT}cancellation_total",
        SERVED,
        "Calls that their caller stopped or left; what the engine did after it: holdfast_worker_tokens_after_cancel.",
        "worker",
    ),
    counter(
        f"{WORKER}refusals_total",
        (*SERVED, "code"),
        "Calls that were not accepted, by error code (worker_saturated, worker_draining …).",
        "worker",
        "holdfast",
    ),
    histogram(
        "dynamo_work_handler_time_to_first_response_seconds", (), "From the call to its first token.", LONG, "worker"
    ),
    gauge("dynamo_work_handler_pool_active_tasks", (), "Calls accepted and not over.", "worker", "newer"),
    gauge("dynamo_work_handler_pool_capacity", (), "Calls accepted at most.", "worker", "newer"),
    counter("dynamo_work_handler_enqueue_rejected_total", (), "Calls refused for lack of room.", "worker", "newer"),
)

ENGINE = (
    counter(
        f"{WORKER}canaries_total",
        (*HOSTED, "result"),
        "Tiny requests that the worker sent to itself: good, bad, or unclear (it had no room, or was leaving).",
        "worker",
        "holdfast",
    ),
    gauge(f"{COMPONENT}uptime_seconds", HOSTED, "Since this process began to serve its status.", "worker"),
    gauge(f"{COMPONENT}total_blocks", HOSTED, "KV blocks of the engine.", "worker"),
    gauge(f"{COMPONENT}gpu_cache_usage_percent", HOSTED, "KV blocks in use, 0 to 1 as in the reference.", "worker"),
    gauge(f"{COMPONENT}model_load_time_seconds", HOSTED, "From the engine's start to ready.", "worker"),
    gauge(f"{WORKER}kv_used_blocks", HOSTED, "KV blocks in use.", "worker", "holdfast"),
    gauge(f"{WORKER}running_sequences", HOSTED, "Sequences that the engine works on.", "worker", "holdfast"),
    gauge(f"{WORKER}waiting_sequences", HOSTED, "Sequences that wait in the engine.", "worker", "holdfast"),
    gauge(f"{WORKER}prefill_tokens", HOSTED, "Prompt tokens in hand that are not computed.", "worker", "holdfast"),
    counter(f"{WORKER}engine_steps_total", HOSTED, "Engine steps.", "worker", "holdfast"),
    counter(f"{WORKER}generated_tokens_total", HOSTED, "Tokens generated.", "worker", "holdfast"),
    counter(f"{WORKER}prefilled_tokens_total", HOSTED, "Prompt tokens computed.", "worker", "holdfast"),
    counter(
        f"{WORKER}late_tokens_total",
        HOSTED,
        "Tokens generated for calls after their cancel had reached this worker.",
        "worker",
        "holdfast",
    ),
    counter(
        f"{WORKER}prefix_cache_queried_tokens_total",
        HOSTED,
        "Prompt tokens that the engine looked up in its prefix cache; zero where it does not say.",
        "worker",
        "holdfast",
    ),
    counter(
        f"{WORKER}prefix_cache_hit_tokens_total",
        HOSTED,
        "Of these, those that it had and did not compute again.",
        "worker",
        "holdfast",
    ),
    gauge(f"{WORKER}state", (*HOSTED, "state"), "1 for the worker's state, 0 for all others.", "worker", "holdfast"),
    gauge(f"{WORKER}leases", (*HOSTED, "kind"), "Leases held, by kind; zero at rest.", "worker", "holdfast"),
)

KV_EVENTS = (
    counter(
        f"{WORKER}kv_events_total",
        (*HOSTED, "event_type", "status"),
        "What the engine told about its KV cache: stored, removed, cleared, by what became of it: ok, "
        "parent_block_not_found, block_not_found (not all were there), invalid_block, not_indexed (other medium).",
        "worker",
        "holdfast",
    ),
    gauge(
        f"{WORKER}kv_cached_blocks",
        HOSTED,
        "Distinct blocks that frontends are told of, all tiers.",
        "worker",
        "holdfast",
    ),
    counter(f"{WORKER}kv_event_batches_total", HOSTED, "Numbered batches of changes.", "worker", "holdfast"),
    gauge(f"{WORKER}kv_event_subscribers", HOSTED, "Frontends that follow.", "worker", "holdfast"),
    counter(
        f"{WORKER}kv_event_overruns_total",
        HOSTED,
        "Frontends so far behind that they got everything anew (DYN_KV_EVENTS_KEPT).",
        "worker",
        "holdfast",
    ),
    counter(
        f"{WORKER}kv_event_resends_total",
        HOSTED,
        "Times the engine had to tell everything again because its own count was another.",
        "worker",
        "holdfast",
    ),
)

LEAVING = (
    gauge(
        f"{COMPONENT}shutdown_stage_seconds",
        (*HOSTED, "stage", "reason"),
        "Time spent in a stage of leaving so far; the reason is signal or engine_dead.",
        "worker",
        "newer",
    ),
    gauge(
        f"{COMPONENT}shutdown_remaining_seconds", HOSTED, "Left of the budget for leaving; all of it at rest.",
        "worker", "newer",
    ),
    gauge(
        f"{COMPONENT}shutdown_inflight_requests", HOSTED, "Calls in flight while it leaves; zero before.",
        "worker", "newer",
    ),
)  # fmt: skip
