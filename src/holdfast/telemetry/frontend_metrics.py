"""The frontend's lines of the catalogue. Must never hold behaviour."""

from __future__ import annotations

from holdfast.telemetry.entries import (
    FRONT,
    LONG,
    MODEL,
    OURS,
    QUICK,
    RANK,
    ROUTE,
    TINY,
    TOKENS,
    WORKER,
    counter,
    gauge,
    histogram,
)
from holdfast.telemetry.metric import logarithmic

REQUESTS = (
    counter(
        f"{FRONT}requests_total",
        (*ROUTE, "status", "error_type"),
        "HTTP requests that have ended; a cancelled or truncated one is no success.",
    ),
    counter(f"{FRONT}requests_started_total", ROUTE, "HTTP requests that were taken in; minus ended: in flight."),
    gauge(
        f"{FRONT}inflight_requests",
        MODEL,
        "Requests from their arrival at a known model to the end of the answer.",
        also=f"{FRONT}active_requests",
    ),
    gauge(f"{FRONT}active_requests", MODEL, "The same as inflight_requests, by its newer name.", origin="newer"),
    gauge(f"{FRONT}queued_requests", MODEL, "Requests in flight that have not had their first token."),
    gauge(
        f"{FRONT}disconnected_clients",
        (),
        "Clients that left before their answer was complete and whose request is still being wound up.",
    ),
    counter(f"{OURS}client_disconnects_total", MODEL, "Clients that left before the end.", origin="holdfast"),
    gauge(
        f"{FRONT}stage_requests",
        ("stage", "phase"),
        "Streams by stage: preprocess, route (looking for a worker), dispatch (no accept yet).",
    ),
    histogram(
        f"{FRONT}stage_duration_seconds",
        ("stage",),
        "Time spent in a stage: preprocess, route, transport_roundtrip (from sending to the worker's accept), "
        "postprocess (from the end of the last choice until the client has taken its answer).",
        QUICK,
    ),
    histogram(f"{FRONT}template_seconds", (), "Applying the chat template, per request that has one.", TINY),
    histogram(f"{FRONT}tokenize_seconds", (), "Tokenizing all prompts of a request that brings text.", TINY),
    histogram(
        f"{FRONT}request_duration_seconds", MODEL, "From arrival to the end of the answer.", logarithmic(1, 512, 10)
    ),
    histogram(
        f"{FRONT}time_to_first_token_seconds",
        MODEL,
        "From arrival to the first token, once per request.",
        logarithmic(0.001, 480, 18),
    ),
    histogram(
        f"{FRONT}inter_token_latency_seconds",
        MODEL,
        "Time between tokens of a stream, migrations included.",
        logarithmic(0.001, 2, 13),
    ),
    histogram(f"{FRONT}input_sequence_tokens", MODEL, "Prompt length per prompt.", logarithmic(50, 128_000, 12)),
    histogram(f"{FRONT}output_sequence_tokens", MODEL, "Tokens per choice.", logarithmic(50, 32_000, 10)),
    histogram(f"{FRONT}cached_tokens", MODEL, "Prompt tokens that came from a prefix cache, per choice.", TOKENS),
    counter(f"{FRONT}output_tokens_total", MODEL, "Tokens that reached the client's stream, up to the scrape."),
    counter(f"{FRONT}input_tokens_total", MODEL, "Prompt tokens of requests that have begun.", origin="holdfast"),
    counter(
        f"{FRONT}failures_total",
        ("class", "reason"),
        "Requests that failed, by whose fault it was and by error code (docs/reference/errors.md).",
        origin="newer",
    ),
)

QUEUE = (
    gauge(
        f"{FRONT}router_queue_pending_requests",
        ("worker_type",),
        "Streams that wait in front of workers without room (DYN_ADMISSION_QUEUE_LIMIT).",
    ),
    gauge(f"{OURS}queue_streams", MODEL, "The same by model, streams that move included.", origin="holdfast"),
    gauge(f"{OURS}queue_limit", (), "Most streams that may wait there; 0: the queue is off.", origin="holdfast"),
    histogram(
        f"{OURS}queue_wait_seconds",
        (*MODEL, "outcome"),
        "Time in that queue, per wait, by how it ended: placed, rejected, cancelled (left, or out of time), failed.",
        LONG,
        origin="holdfast",
    ),
)

FAULTS = (
    counter(
        f"{FRONT}model_migration_total",
        (*MODEL, "migration_type"),
        "Moves of a stream to another worker: new_request before its first accept, ongoing_request after it.",
    ),
    histogram(
        f"{FRONT}model_migration_duration_seconds",
        (*MODEL, "migration_type", "outcome"),
        "From the failure of an attempt to the next new token, the error or the cancel.",
        LONG,
        origin="newer",
    ),
    histogram(
        f"{OURS}migration_gap_seconds",
        MODEL,
        "From the failure of an attempt to the next new token, for moves that succeeded.",
        LONG,
        origin="holdfast",
    ),
    counter(
        f"{FRONT}model_migration_max_seq_len_exceeded_total",
        MODEL,
        "Streams that were not moved because they were longer than DYN_MIGRATION_MAX_SEQ_LEN.",
    ),
    gauge(f"{FRONT}model_migration_limit", MODEL, "Moves of one stream because of faults (DYN_MIGRATION_LIMIT)."),
    counter(f"{FRONT}model_cancellation_total", ROUTE, "Requests whose client left, stalled or cancelled."),
    counter(f"{FRONT}model_rejection_total", ("model", "endpoint"), "Requests turned away for lack of capacity."),
    counter(
        f"{OURS}rejection_total",
        ("model", "layer", "knob"),
        "Requests turned away, by the layer that did it and the knob whose threshold was reached.",
        origin="holdfast",
    ),
    counter(
        f"{OURS}attempt_failures_total",
        ("model", "code"),
        "Attempts that failed and were followed by another one, by error code.",
        origin="holdfast",
    ),
    counter(
        f"{OURS}joins_total",
        ("model", "join"),
        "Streams that moved after their first token: exact (token for token) or declared.",
        origin="holdfast",
    ),
    counter(
        f"{OURS}prefill_decisions_total",
        ("model", "reason"),
        "Attempts of models that have prefill workers, by where their prompt was computed: remote, or why its decode "
        "worker did it (short, cached, no_prefill_worker, incompatible, saturated, failed, suspect, handoff, budget).",
        origin="holdfast",
    ),
    counter(
        f"{OURS}prefill_legs_total",
        ("model", "outcome"),
        "Prompts that were sent to a prefill worker, by how that ended: handed_over, or an error code.",
        origin="holdfast",
    ),
    histogram(
        f"{OURS}prefill_leg_seconds",
        MODEL,
        "From sending a prompt to a prefill worker to its hand-off.",
        LONG,
        origin="holdfast",
    ),
    gauge(f"{OURS}leases", ("kind",), "Leases held, by kind; zero at rest.", origin="holdfast"),
)

MODELS = (
    gauge(
        f"{FRONT}model_ready",
        MODEL,
        "1 when a request for the model would find a usable worker, else 0.",
        origin="newer",
    ),
    gauge(f"{OURS}model_usable_workers", MODEL, "Workers that may get new work for the model.", origin="holdfast"),
    gauge(
        f"{OURS}model_prefill_workers",
        MODEL,
        "Prefill workers that may get prompts of the model; they serve no streams.",
        origin="holdfast",
    ),
    gauge(f"{FRONT}model_total_kv_blocks", MODEL, "KV blocks of a worker; the least of all that serve the model."),
    gauge(f"{FRONT}model_max_num_seqs", MODEL, "Sequences that a worker runs at once; the least of all."),
    gauge(f"{FRONT}model_max_num_batched_tokens", MODEL, "Tokens per engine step of a worker; the least of all."),
    gauge(f"{FRONT}model_context_length", MODEL, "Context length in tokens."),
    gauge(f"{FRONT}model_kv_cache_block_size", MODEL, "Tokens per KV block."),
)

WORKERS_SEEN = (
    gauge(f"{FRONT}worker_active_decode_blocks", RANK, "KV blocks in use, as the worker last said."),
    gauge(f"{FRONT}worker_active_prefill_tokens", RANK, "Prompt tokens not yet computed, as the worker last said."),
    gauge(f"{FRONT}worker_waiting_requests", RANK, "Sequences waiting in the engine, as the worker last said."),
    gauge(f"{FRONT}worker_last_time_to_first_token_seconds", RANK, "Of the latest stream that this frontend saw."),
    gauge(f"{FRONT}worker_last_input_sequence_tokens", RANK, "Prompt length of the latest stream."),
    gauge(f"{FRONT}worker_last_inter_token_latency_seconds", RANK, "Mean of the latest stream that ended."),
    gauge(
        f"{OURS}workers",
        ("state",),
        "Known workers by state: unknown, probing, usable, suspect, ejected, draining.",
        origin="holdfast",
    ),
    counter(
        f"{OURS}worker_transitions_total",
        ("state", "cause"),
        "Changes of a worker's state as this frontend sees it, by new state and error code.",
        origin="holdfast",
    ),
    gauge(
        f"{OURS}worker_state",
        ("worker_id", "state"),
        "1 for the state that this frontend sees a worker in, 0 for all others; gone with the worker.",
        origin="holdfast",
    ),
    gauge(
        f"{OURS}workers_refused",
        ("field",),
        "Workers that are there and not used: their card contradicts the others' in this field, or they speak no "
        "common wire version (version) or share no secret (secret).",
        origin="holdfast",
    ),
    gauge(
        f"{OURS}supervisor_slot_state",
        ("supervisor", "slot", "state"),
        "1 for what a supervisor says of a slot: running, restarting or gave-up; 0 for the others.",
        origin="holdfast",
    ),
    gauge(
        f"{WORKER}tokens_after_cancel",
        ("worker",),
        "Tokens that a worker's engine generated after a cancel had reached it, as the worker last said.",
        origin="holdfast",
    ),
    gauge(f"{OURS}discovery_reachable", (), "1 while discovery answers, else 0.", origin="holdfast"),
)

STANDING = (
    gauge(f"{OURS}draining", (), "1 once this frontend turns new requests away because it leaves.", origin="holdfast"),
    gauge(f"{OURS}connections", (), "Clients' connections, idle ones included.", origin="holdfast"),
    gauge(f"{OURS}connections_limit", (), "Most that there may be (DYN_HTTP_MAX_CONNECTIONS).", origin="holdfast"),
    gauge(
        f"{OURS}retry_budget_left",
        (),
        "Repeated attempts that the budget would still allow; at 0 failed attempts are not repeated at once.",
        origin="holdfast",
    ),
    gauge(f"{OURS}paced_moves", (), "Streams that wait for their turn to move.", origin="holdfast"),
    gauge(
        f"{OURS}self_doubt",
        (),
        "1 while so many workers look silent that this frontend doubts itself before it judges them.",
        origin="holdfast",
    ),
    counter(
        f"{OURS}discarded_intervals_total",
        (),
        "Checks of the workers that came so late that nobody was judged by them.",
        origin="holdfast",
    ),
)

PLANE = (
    gauge(
        "dynamo_request_plane_inflight",
        (),
        "Attempts that are out at workers.",
        also="dynamo_request_plane_inflight_requests",
    ),
    gauge("dynamo_request_plane_inflight_requests", (), "The same as inflight, by its newer name.", origin="newer"),
    histogram("dynamo_request_plane_queue_seconds", (), "From the start of a stream to its first attempt.", QUICK),
    histogram("dynamo_request_plane_send_seconds", (), "Encoding an attempt and handing it to the network.", QUICK),
    histogram("dynamo_request_plane_roundtrip_ttft_seconds", (), "From sending an attempt to its first token.", LONG),
    counter("dynamo_transport_tcp_bytes_sent_total", (), "Bytes sent to workers."),
    counter("dynamo_transport_tcp_bytes_received_total", (), "Bytes received from workers."),
    counter("dynamo_transport_tcp_errors_total", (), "Connections to workers that were lost or not made."),
    gauge("dynamo_transport_tcp_pool_active", (), "Connected workers with streams in flight."),
    gauge("dynamo_transport_tcp_pool_idle", (), "Connected workers without streams."),
    histogram(
        f"{FRONT}event_loop_delay_seconds",
        (),
        "How late a timer fired: what every token waits for at least.",
        (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 1.0, 5.0),
        origin="newer",
    ),
    counter(f"{FRONT}event_loop_stall_total", (), "Timers that fired more than 5 ms late.", origin="newer"),
)
