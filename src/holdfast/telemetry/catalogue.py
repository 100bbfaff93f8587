"""Every metric of Holdfast: the one place where names, labels, units and meanings are fixed.

Names that Dynamo's users know keep their meaning; ours begin with ``holdfast_``. The page `docs/reference/metrics.md`
and the objects that processes feed are both made from here.

Must never hold behaviour.
"""

from __future__ import annotations

from holdfast.telemetry.metric import Metric, Origin, Process, logarithmic

_FRONT = "dynamo_frontend_"
_COMPONENT = "dynamo_component_"
_OURS = "holdfast_frontend_"
_WORKER = "holdfast_worker_"
MODEL = ("model",)
ROUTE = ("model", "endpoint", "request_type")
SERVED = ("dynamo_namespace", "dynamo_component", "dynamo_endpoint", "worker_id")
HOSTED = ("dynamo_namespace", "dynamo_component", "worker_id")
RANK = ("worker_id", "dp_rank", "worker_type")

_QUICK = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
_LONG = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
_TOKENS = (0.0, 16.0, 64.0, 256.0, 1024.0, 4096.0, 16384.0, 65536.0, 131072.0)


def _counter(
    name: str, labels: tuple[str, ...], text: str, process: Process = "frontend", origin: Origin = "seed"
) -> Metric:
    return Metric(name, "counter", labels, text, process, origin)


def _gauge(
    name: str,
    labels: tuple[str, ...],
    text: str,
    process: Process = "frontend",
    origin: Origin = "seed",
    *,
    also: str = "",
) -> Metric:
    return Metric(name, "gauge", labels, text, process, origin, also=also)


def _histogram(
    name: str,
    labels: tuple[str, ...],
    text: str,
    buckets: tuple[float, ...],
    process: Process = "frontend",
    *,
    origin: Origin = "seed",
) -> Metric:
    return Metric(name, "histogram", labels, text, process, origin, buckets)


_REQUESTS = (
    _counter(
        f"{_FRONT}requests_total",
        (*ROUTE, "status", "error_type"),
        "HTTP requests that have ended; a cancelled or truncated one is no success.",
    ),
    _counter(f"{_FRONT}requests_started_total", ROUTE, "HTTP requests that were taken in; minus ended: in flight."),
    _gauge(
        f"{_FRONT}inflight_requests",
        MODEL,
        "Requests from their arrival at a known model to the end of the answer.",
        also=f"{_FRONT}active_requests",
    ),
    _gauge(f"{_FRONT}active_requests", MODEL, "The same as inflight_requests, by its newer name.", origin="newer"),
    _gauge(f"{_FRONT}queued_requests", MODEL, "Requests in flight that have not had their first token."),
    _gauge(
        f"{_FRONT}disconnected_clients",
        (),
        "Clients that left before their answer was complete and whose request is still being wound up.",
    ),
    _counter(f"{_OURS}client_disconnects_total", MODEL, "Clients that left before the end.", origin="holdfast"),
    _gauge(
        f"{_FRONT}stage_requests",
        ("stage", "phase"),
        "Streams by stage: preprocess, route (looking for a worker), dispatch (no accept yet).",
    ),
    _histogram(
        f"{_FRONT}stage_duration_seconds",
        ("stage",),
        "Time spent in a stage: preprocess, route, transport_roundtrip (from sending to the worker's accept).",
        _QUICK,
    ),
    _histogram(
        f"{_FRONT}request_duration_seconds", MODEL, "From arrival to the end of the answer.", logarithmic(1, 512, 10)
    ),
    _histogram(
        f"{_FRONT}time_to_first_token_seconds",
        MODEL,
        "From arrival to the first token, once per request.",
        logarithmic(0.001, 480, 18),
    ),
    _histogram(
        f"{_FRONT}inter_token_latency_seconds",
        MODEL,
        "Time between tokens of a stream, migrations included.",
        logarithmic(0.001, 2, 13),
    ),
    _histogram(f"{_FRONT}input_sequence_tokens", MODEL, "Prompt length per prompt.", logarithmic(50, 128_000, 12)),
    _histogram(f"{_FRONT}output_sequence_tokens", MODEL, "Tokens per choice.", logarithmic(50, 32_000, 10)),
    _histogram(f"{_FRONT}cached_tokens", MODEL, "Prompt tokens that came from a prefix cache, per choice.", _TOKENS),
    _counter(f"{_FRONT}output_tokens_total", MODEL, "Tokens that reached the client's stream, up to the scrape."),
    _counter(f"{_FRONT}input_tokens_total", MODEL, "Prompt tokens of requests that have begun.", origin="holdfast"),
    _counter(
        f"{_FRONT}failures_total",
        ("class", "reason"),
        "Requests that failed, by whose fault it was and by error code (docs/reference/errors.md).",
        origin="newer",
    ),
)

_FAULTS = (
    _counter(
        f"{_FRONT}model_migration_total",
        (*MODEL, "migration_type"),
        "Moves of a stream to another worker: new_request before its first accept, ongoing_request after it.",
    ),
    _histogram(
        f"{_FRONT}model_migration_duration_seconds",
        (*MODEL, "migration_type", "outcome"),
        "From the failure of an attempt to the next new token, the error or the cancel.",
        _LONG,
        origin="newer",
    ),
    _histogram(
        f"{_OURS}migration_gap_seconds",
        MODEL,
        "From the failure of an attempt to the next new token, for moves that succeeded.",
        _LONG,
        origin="holdfast",
    ),
    _counter(
        f"{_FRONT}model_migration_max_seq_len_exceeded_total",
        MODEL,
        "Streams that were not moved because they were longer than DYN_MIGRATION_MAX_SEQ_LEN.",
    ),
    _gauge(f"{_FRONT}model_migration_limit", MODEL, "Moves of one stream because of faults (DYN_MIGRATION_LIMIT)."),
    _counter(f"{_FRONT}model_cancellation_total", ROUTE, "Requests whose client left, stalled or cancelled."),
    _counter(f"{_FRONT}model_rejection_total", ("model", "endpoint"), "Requests turned away for lack of capacity."),
    _counter(
        f"{_OURS}rejection_total",
        ("model", "layer", "knob"),
        "Requests turned away, by the layer that did it and the knob whose threshold was reached.",
        origin="holdfast",
    ),
    _counter(
        f"{_OURS}attempt_failures_total",
        ("model", "code"),
        "Attempts that failed and were followed by another one, by error code.",
        origin="holdfast",
    ),
    _counter(
        f"{_OURS}joins_total",
        ("model", "join"),
        "Streams that moved after their first token: exact (token for token) or declared.",
        origin="holdfast",
    ),
    _gauge(f"{_OURS}leases", ("kind",), "Leases held, by kind; zero at rest.", origin="holdfast"),
)

_MODELS = (
    _gauge(
        f"{_FRONT}model_ready",
        MODEL,
        "1 when a request for the model would find a usable worker, else 0.",
        origin="newer",
    ),
    _gauge(f"{_OURS}model_usable_workers", MODEL, "Workers that may get new work for the model.", origin="holdfast"),
    _gauge(f"{_FRONT}model_total_kv_blocks", MODEL, "KV blocks of a worker; the least of all that serve the model."),
    _gauge(f"{_FRONT}model_max_num_seqs", MODEL, "Sequences that a worker runs at once; the least of all."),
    _gauge(f"{_FRONT}model_max_num_batched_tokens", MODEL, "Tokens per engine step of a worker; the least of all."),
    _gauge(f"{_FRONT}model_context_length", MODEL, "Context length in tokens."),
    _gauge(f"{_FRONT}model_kv_cache_block_size", MODEL, "Tokens per KV block."),
)

_WORKERS_SEEN = (
    _gauge(f"{_FRONT}worker_active_decode_blocks", RANK, "KV blocks in use, as the worker last said."),
    _gauge(f"{_FRONT}worker_active_prefill_tokens", RANK, "Prompt tokens not yet computed, as the worker last said."),
    _gauge(f"{_FRONT}worker_waiting_requests", RANK, "Sequences waiting in the engine, as the worker last said."),
    _gauge(f"{_FRONT}worker_last_time_to_first_token_seconds", RANK, "Of the latest stream that this frontend saw."),
    _gauge(f"{_FRONT}worker_last_input_sequence_tokens", RANK, "Prompt length of the latest stream."),
    _gauge(f"{_FRONT}worker_last_inter_token_latency_seconds", RANK, "Mean of the latest stream that ended."),
    _gauge(
        f"{_OURS}workers",
        ("state",),
        "Known workers by state: unknown, probing, usable, suspect, ejected, draining.",
        origin="holdfast",
    ),
    _counter(
        f"{_OURS}worker_transitions_total",
        ("state", "cause"),
        "Changes of a worker's state as this frontend sees it, by new state and error code.",
        origin="holdfast",
    ),
    _gauge(
        f"{_WORKER}tokens_after_cancel",
        ("worker",),
        "Tokens that a worker's engine generated after a cancel had reached it, as the worker last said.",
        origin="holdfast",
    ),
    _gauge(f"{_OURS}discovery_reachable", (), "1 while discovery answers, else 0.", origin="holdfast"),
)

_PLANE = (
    _gauge(
        "dynamo_request_plane_inflight",
        (),
        "Attempts that are out at workers.",
        also="dynamo_request_plane_inflight_requests",
    ),
    _gauge("dynamo_request_plane_inflight_requests", (), "The same as inflight, by its newer name.", origin="newer"),
    _histogram("dynamo_request_plane_queue_seconds", (), "From the start of a stream to its first attempt.", _QUICK),
    _histogram("dynamo_request_plane_send_seconds", (), "Encoding an attempt and handing it to the network.", _QUICK),
    _histogram("dynamo_request_plane_roundtrip_ttft_seconds", (), "From sending an attempt to its first token.", _LONG),
    _counter("dynamo_transport_tcp_bytes_sent_total", (), "Bytes sent to workers."),
    _counter("dynamo_transport_tcp_bytes_received_total", (), "Bytes received from workers."),
    _counter("dynamo_transport_tcp_errors_total", (), "Connections to workers that were lost or not made."),
    _gauge("dynamo_transport_tcp_pool_active", (), "Connected workers with streams in flight."),
    _gauge("dynamo_transport_tcp_pool_idle", (), "Connected workers without streams."),
    _histogram(
        f"{_FRONT}event_loop_delay_seconds",
        (),
        "How late a timer fired: what every token waits for at least.",
        (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 1.0, 5.0),
        origin="newer",
    ),
    _counter(f"{_FRONT}event_loop_stall_total", (), "Timers that fired more than 5 ms late.", origin="newer"),
)

_HANDLER = (
    _counter(f"{_COMPONENT}requests_total", SERVED, "Calls that came in.", "worker"),
    _counter(f"{_COMPONENT}request_bytes_total", SERVED, "Bytes of the calls' payloads.", "worker"),
    _counter(f"{_COMPONENT}response_bytes_total", SERVED, "Bytes of tokens sent back, four per token.", "worker"),
    _gauge(f"{_COMPONENT}inflight_requests", SERVED, "Calls accepted and not over.", "worker"),
    _histogram(f"{_COMPONENT}request_duration_seconds", SERVED, "From the call to its end.", _LONG, "worker"),
    _counter(
        f"{_COMPONENT}errors_total",
        (*SERVED, "error_type"),
        "Calls that failed: deserialization, invalid_message, generate, response_stream, publish_response.",
        "worker",
    ),
    _counter(
        f"{_COMPONENT}cancellation_total",
        SERVED,
        "Calls that their caller stopped or left; what the engine did after it: holdfast_worker_tokens_after_cancel.",
        "worker",
    ),
    _counter(
        f"{_WORKER}refusals_total",
        (*SERVED, "code"),
        "Calls that were not accepted, by error code (worker_saturated, worker_draining …).",
        "worker",
        "holdfast",
    ),
    _histogram(
        "dynamo_work_handler_time_to_first_response_seconds", (), "From the call to its first token.", _LONG, "worker"
    ),
    _gauge("dynamo_work_handler_pool_active_tasks", (), "Calls accepted and not over.", "worker", "newer"),
    _gauge("dynamo_work_handler_pool_capacity", (), "Calls accepted at most.", "worker", "newer"),
    _counter("dynamo_work_handler_enqueue_rejected_total", (), "Calls refused for lack of room.", "worker", "newer"),
)

_ENGINE = (
    _gauge(f"{_COMPONENT}uptime_seconds", HOSTED, "Since this process began to serve its status.", "worker"),
    _gauge(f"{_COMPONENT}total_blocks", HOSTED, "KV blocks of the engine.", "worker"),
    _gauge(f"{_COMPONENT}gpu_cache_usage_percent", HOSTED, "KV blocks in use, 0 to 1 as in the reference.", "worker"),
    _gauge(f"{_COMPONENT}model_load_time_seconds", HOSTED, "From the engine's start to ready.", "worker"),
    _gauge(f"{_WORKER}kv_used_blocks", HOSTED, "KV blocks in use.", "worker", "holdfast"),
    _gauge(f"{_WORKER}running_sequences", HOSTED, "Sequences that the engine works on.", "worker", "holdfast"),
    _gauge(f"{_WORKER}waiting_sequences", HOSTED, "Sequences that wait in the engine.", "worker", "holdfast"),
    _gauge(f"{_WORKER}prefill_tokens", HOSTED, "Prompt tokens in hand that are not computed.", "worker", "holdfast"),
    _counter(f"{_WORKER}engine_steps_total", HOSTED, "Engine steps.", "worker", "holdfast"),
    _counter(f"{_WORKER}generated_tokens_total", HOSTED, "Tokens generated.", "worker", "holdfast"),
    _counter(f"{_WORKER}prefilled_tokens_total", HOSTED, "Prompt tokens computed.", "worker", "holdfast"),
    _counter(
        f"{_WORKER}late_tokens_total",
        HOSTED,
        "Tokens generated for calls after their cancel had reached this worker.",
        "worker",
        "holdfast",
    ),
    _gauge(f"{_WORKER}state", (*HOSTED, "state"), "1 for the worker's state, 0 for all others.", "worker", "holdfast"),
    _gauge(f"{_WORKER}leases", (*HOSTED, "kind"), "Leases held, by kind; zero at rest.", "worker", "holdfast"),
)

_LEAVING = (
    _gauge(
        f"{_COMPONENT}shutdown_stage_seconds",
        (*HOSTED, "stage", "reason"),
        "Time spent in a stage of leaving so far; the reason is signal or engine_dead.",
        "worker",
        "newer",
    ),
    _gauge(
        f"{_COMPONENT}shutdown_remaining_seconds", HOSTED, "Left of the budget for leaving; all of it at rest.",
        "worker", "newer",
    ),
    _gauge(
        f"{_COMPONENT}shutdown_inflight_requests", HOSTED, "Calls in flight while it leaves; zero before.",
        "worker", "newer",
    ),
)  # fmt: skip

CATALOGUE: tuple[Metric, ...] = (
    *_REQUESTS, *_FAULTS, *_MODELS, *_WORKERS_SEEN, *_PLANE, *_HANDLER, *_ENGINE, *_LEAVING,
)  # fmt: skip

SECTIONS: tuple[tuple[str, tuple[Metric, ...]], ...] = (
    ("Requests", _REQUESTS),
    ("Migration, cancellation, rejection, leases", _FAULTS),
    ("Models", _MODELS),
    ("Workers as a frontend sees them", _WORKERS_SEEN),
    ("Request plane, transport and event loop", _PLANE),
    ("A worker's calls", _HANDLER),
    ("A worker's engine", _ENGINE),
    ("A worker that leaves", _LEAVING),
)


def metrics_page() -> str:
    """Return the tables of `docs/reference/metrics.md`."""
    parts = []
    for title, metrics in SECTIONS:
        parts.append(f"## {title}\n")
        parts.append("| metric | type | labels | unit | process | meaning |\n|---|---|---|---|---|---|")
        parts += [_row(metric) for metric in metrics]
        parts.append("")
    return "\n".join(parts)


def _row(metric: Metric) -> str:
    labels = ", ".join(f"`{label}`" for label in metric.labels)
    origin = {"seed": "", "newer": " (newer releases)", "holdfast": " (Holdfast's own)"}[metric.origin]
    also = f" Also as `{metric.also}`." if metric.also else ""
    facts = (f"`{metric.name}`", metric.kind, labels, metric.unit, metric.process, f"{metric.help}{also}{origin}")
    return f"| {' | '.join(facts)} |"
