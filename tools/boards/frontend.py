"""The dashboard of what clients see."""

from __future__ import annotations

from boards.panel import FRONT, INSTANCE, MODEL, MODELS, RATE, Dashboard, Panel, process, quantiles, rate, total

BOARD = Dashboard(
    "frontend",
    "Holdfast: frontend",
    "What clients see: requests, latency, tokens, objectives.",
    (INSTANCE, MODELS),
    {
        "Objectives": (
            Panel(
                "Error budget left, 30 days",
                "1 is untouched, below 0 overdrawn. Objectives: deploy/observability/rules/objectives.yml.",
                {"{{slo}} {{model}}": 'holdfast:slo_budget_left:ratio{model=~"$model"}'},
                "percentunit",
                "stat",
            ),
            Panel(
                "Burn rate, one hour",
                "How many times faster than sustainable the budget is used. 14.4 pages.",
                {
                    "{{slo}} {{model}}": 'holdfast:slo_bad:ratio_rate1h{model=~"$model"}'
                    " / on (slo) group_left () (1 - holdfast:slo_objective:ratio)"
                },
            ),
            Panel(
                "Firing alerts",
                "Each alert's annotation names its runbook.",
                {
                    "{{alertname}} {{instance}} {{model}}": "sum by (alertname, instance, model, severity) "
                    '(ALERTS{alertstate="firing", severity=~"critical|warning"})'
                },
                kind="table",
                sparse=True,
            ),
        ),
        "Requests": (
            Panel(
                "Requests ended",
                "By how they ended; empty: success.",
                {"{{status}} {{error_type}}": rate("dynamo_frontend_requests_total", MODEL, "status, error_type")},
                "reqps",
                stacked=True,
            ),
            Panel(
                "In flight",
                "Taken in and not ended; queued: without a first token.",
                {
                    "in flight {{model}}": total("dynamo_frontend_inflight_requests", MODEL, "model"),
                    "queued {{model}}": total("dynamo_frontend_queued_requests", MODEL, "model"),
                },
            ),
            Panel(
                "By stage",
                "preprocess: reading, rendering, tokenizing; route: looking for a worker; dispatch: no accept yet.",
                {"{{stage}}": total("dynamo_frontend_stage_requests", FRONT, "stage")},
                stacked=True,
            ),
            Panel(
                "Failures by code",
                "docs/reference/errors.md explains the codes.",
                {"{{class}} {{reason}}": rate("dynamo_frontend_failures_total", FRONT, "class, reason")},
                "reqps",
                sparse=True,
            ),
            Panel(
                "Clients that left",
                "Disconnected before the end of their answer, and cancelled requests.",
                {
                    "disconnected {{model}}": rate("holdfast_frontend_client_disconnects_total", MODEL, "model"),
                    "cancelled {{model}}": rate("dynamo_frontend_model_cancellation_total", MODEL, "model"),
                },
                "reqps",
                sparse=True,
            ),
            Panel(
                "Request duration",
                "From arrival to the end of the answer.",
                quantiles("dynamo_frontend_request_duration_seconds", MODEL),
                "s",
            ),
        ),
        "Latency": (
            Panel(
                "Time to first token",
                "From arrival to the first token.",
                quantiles("dynamo_frontend_time_to_first_token_seconds", MODEL),
                "s",
            ),
            Panel(
                "Inter-token latency",
                "Between tokens of a stream, moves to other workers included.",
                quantiles("dynamo_frontend_inter_token_latency_seconds", MODEL),
                "s",
            ),
            Panel(
                "Stages, 99th percentile",
                "transport_roundtrip: from sending to the worker's accept; postprocess: from the last token until the "
                "client has everything.",
                {
                    "{{stage}}": "histogram_quantile(0.99, sum by (stage, le) "
                    f"(rate(dynamo_frontend_stage_duration_seconds_bucket{{{FRONT}}}{RATE})))"
                },
                "s",
            ),
            Panel(
                "Event loop delay, 99th percentile",
                "What every token waits for at least; above 5 ms it counts as a stall.",
                {
                    "{{instance}}": "histogram_quantile(0.99, sum by (instance, le) "
                    f"(rate(dynamo_frontend_event_loop_delay_seconds_bucket{{{FRONT}}}{RATE})))",
                    "stalls/s {{instance}}": rate("dynamo_frontend_event_loop_stall_total", FRONT, "instance"),
                },
                "s",
            ),
        ),
        "Preparing": (
            Panel(
                "Chat template",
                "Per request that has one.",
                quantiles("dynamo_frontend_template_seconds", FRONT),
                "s",
            ),
            Panel(
                "Tokenizing",
                "All prompts of a request; of large bodies the wait for a helper included.",
                quantiles("dynamo_frontend_tokenize_seconds", FRONT),
                "s",
                sparse=True,
            ),
            Panel(
                "Connections",
                "Of clients, idle ones included, and how many may be (DYN_HTTP_MAX_CONNECTIONS).",
                {
                    "{{instance}}": f"holdfast_frontend_connections{{{FRONT}}}",
                    "limit {{instance}}": f"holdfast_frontend_connections_limit{{{FRONT}}}",
                },
            ),
        ),
        "Tokens": (
            Panel(
                "Tokens per second",
                "Prompt tokens of requests that began, and tokens that reached clients.",
                {
                    "in {{model}}": rate("dynamo_frontend_input_tokens_total", MODEL, "model"),
                    "out {{model}}": rate("dynamo_frontend_output_tokens_total", MODEL, "model"),
                },
            ),
            Panel(
                "Prompt length",
                "Tokens per prompt.",
                quantiles("dynamo_frontend_input_sequence_tokens", MODEL),
            ),
            Panel(
                "Answer length",
                "Tokens per choice.",
                quantiles("dynamo_frontend_output_sequence_tokens", MODEL),
            ),
            Panel(
                "Prompt tokens from cache",
                "Share of all prompt tokens.",
                {
                    "{{model}}": f"sum by (model) (rate(dynamo_frontend_cached_tokens_sum{{{MODEL}}}{RATE}))"
                    f" / sum by (model) (rate(dynamo_frontend_input_sequence_tokens_sum{{{MODEL}}}{RATE}))"
                },
                "percentunit",
            ),
        ),
        "Processes": process(FRONT),
    },
)
