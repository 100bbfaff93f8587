"""The dashboard of workers and their engines."""

from __future__ import annotations

from boards.panel import WORKER, WORKERS, WORKERS_JOB, Dashboard, Panel, process, quantiles, rate, total

BOARD = Dashboard(
    "workers",
    "Holdfast: workers",
    "What workers say of themselves and of their engines.",
    (WORKERS,),
    {
        "State": (
            Panel(
                "State",
                "stalled: in service and not ready; frontends send it nothing.",
                {"{{worker_id}} {{state}}": f"max by (worker_id, state) (holdfast_worker_state{{{WORKER}}}) > 0"},
                kind="table",
            ),
            Panel(
                "Uptime",
                "Since this process began to serve its status; every drop is a restart.",
                {"{{worker_id}}": f"max by (worker_id) (dynamo_component_uptime_seconds{{{WORKER}}})"},
                "s",
            ),
            Panel(
                "Model load time",
                "From the engine's start to ready.",
                {"{{worker_id}}": f"max by (worker_id) (dynamo_component_model_load_time_seconds{{{WORKER}}})"},
                "s",
                "stat",
            ),
        ),
        "Calls": (
            Panel(
                "Calls per second",
                "Of the endpoint that generates.",
                {
                    "{{worker_id}}": rate(
                        "dynamo_component_requests_total", f'{WORKER}, dynamo_endpoint="generate"', "worker_id"
                    )
                },
                "reqps",
            ),
            Panel(
                "Calls in flight",
                "Accepted and not over.",
                {"{{worker_id}}": total("dynamo_component_inflight_requests", WORKER, "worker_id")},
            ),
            Panel(
                "Call duration",
                "From the call to its end.",
                quantiles("dynamo_component_request_duration_seconds", f'{WORKER}, dynamo_endpoint="generate"'),
                "s",
            ),
            Panel(
                "Time to first response",
                "From the call to its first token, on the worker's side.",
                quantiles("dynamo_work_handler_time_to_first_response_seconds", 'job="holdfast-worker"'),
                "s",
            ),
            Panel(
                "Calls refused, by code",
                "Never accepted, so they cost no engine work; the frontend tries elsewhere.",
                {"{{worker_id}} {{code}}": rate("holdfast_worker_refusals_total", WORKER, "worker_id, code")},
                "reqps",
                sparse=True,
            ),
            Panel(
                "Calls failed, by kind",
                "As the reference names the kinds.",
                {
                    "{{worker_id}} {{error_type}}": rate(
                        "dynamo_component_errors_total", WORKER, "worker_id, error_type"
                    )
                },
                "reqps",
                sparse=True,
            ),
        ),
        "Canaries": (
            Panel(
                "Canaries by result",
                "Tiny requests of the worker to itself, per second; bad ones take it out of use.",
                {"{{worker_id}} {{result}}": rate("holdfast_worker_canaries_total", WORKER, "worker_id, result")},
            ),
            Panel(
                "Bad canaries, last hour",
                "Of each worker.",
                {
                    "{{worker_id}}": "sum by (worker_id) "
                    f'(increase(holdfast_worker_canaries_total{{{WORKER}, result="bad"}}[1h]))'
                },
                kind="stat",
            ),
        ),
        "Engine": (
            Panel(
                "Tokens generated per second",
                "By the engine, whether or not anybody still wants them.",
                {"{{worker_id}}": rate("holdfast_worker_generated_tokens_total", WORKER, "worker_id")},
            ),
            Panel(
                "Prompt tokens computed per second",
                "Without those that came from the cache.",
                {"{{worker_id}}": rate("holdfast_worker_prefilled_tokens_total", WORKER, "worker_id")},
            ),
            Panel(
                "Engine steps per second",
                "An engine that is busy and shows none is hung.",
                {"{{worker_id}}": rate("holdfast_worker_engine_steps_total", WORKER, "worker_id")},
            ),
            Panel(
                "Sequences",
                "running: the engine works on them; waiting: they have no seat yet.",
                {
                    "running {{worker_id}}": total("holdfast_worker_running_sequences", WORKER, "worker_id"),
                    "waiting {{worker_id}}": total("holdfast_worker_waiting_sequences", WORKER, "worker_id"),
                },
            ),
            Panel(
                "KV cache in use",
                "Share of the engine's KV blocks.",
                {"{{worker_id}}": f"max by (worker_id) (dynamo_component_gpu_cache_usage_percent{{{WORKER}}})"},
                "percentunit",
            ),
            Panel(
                "Prompt tokens in hand",
                "Not computed yet.",
                {"{{worker_id}}": total("holdfast_worker_prefill_tokens", WORKER, "worker_id")},
            ),
        ),
        "Accounts": (
            Panel(
                "Leases",
                "Zero at rest, always.",
                {"{{worker_id}} {{kind}}": total("holdfast_worker_leases", WORKER, "worker_id, kind")},
            ),
            Panel(
                "Cancelled calls",
                "Their caller stopped them or left.",
                {"{{worker_id}}": rate("dynamo_component_cancellation_total", WORKER, "worker_id")},
                "reqps",
                sparse=True,
            ),
            Panel(
                "Tokens after a cancel",
                "Work that nobody wanted any more, per second.",
                {"{{worker_id}}": rate("holdfast_worker_late_tokens_total", WORKER, "worker_id")},
                sparse=True,
            ),
        ),
        "Processes": process(WORKERS_JOB),
    },
)
