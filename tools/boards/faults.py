"""The dashboard of what went wrong and how it was survived."""

from __future__ import annotations

from boards.panel import FRONT, INSTANCE, MODEL, MODELS, RATE, Dashboard, Panel, quantiles, rate, total

BOARD = Dashboard(
    "fault-tolerance",
    "Holdfast: fault tolerance",
    "Who can be used, who was lost and why, what moved, what it cost, what was turned away.",
    (INSTANCE, MODELS),
    {
        "Who is there": (
            Panel(
                "Usable workers",
                "Workers that may get new work, by model and frontend.",
                {"{{model}} at {{instance}}": f"holdfast_frontend_model_usable_workers{{{MODEL}}}"},
            ),
            Panel(
                "Workers by state",
                "As frontends see them.",
                {"{{state}}": f"max by (state) (holdfast_frontend_workers{{{FRONT}}})"},
                stacked=True,
            ),
            Panel(
                "Discovery",
                "1 while it answers. Without it frontends go on with the workers that they know.",
                {"{{instance}}": f"min by (instance) (holdfast_frontend_discovery_reachable{{{FRONT}}})"},
                kind="stat",
            ),
            Panel(
                "Workers lost, by cause",
                "Became suspect or ejected, per second.",
                {
                    "{{state}} {{cause}}": rate(
                        "holdfast_frontend_worker_transitions_total",
                        f'{FRONT}, state=~"suspect|ejected"',
                        "state, cause",
                    )
                },
            ),
            Panel(
                "Workers that came, or came back",
                "Became usable, per second.",
                {
                    "{{instance}}": rate(
                        "holdfast_frontend_worker_transitions_total", f'{FRONT}, state="usable"', "instance"
                    )
                },
            ),
            Panel(
                "State of each worker",
                "As frontends see it; a worker that is well shows usable.",
                {
                    "{{worker_id}} {{state}}": "count by (worker_id, state) "
                    f"(holdfast_frontend_worker_state{{{FRONT}}} == 1)"
                },
                kind="table",
            ),
            Panel(
                "Workers refused",
                "They run and are not used: their card contradicts the others', or no common version or secret.",
                {"{{field}}": f"max by (field) (holdfast_frontend_workers_refused{{{FRONT}}})"},
            ),
            Panel(
                "Slots that are not running",
                "As supervisors say: restarting, or given up.",
                {
                    "{{supervisor}} {{slot}} {{state}}": "max by (supervisor, slot, state) "
                    f'(holdfast_frontend_supervisor_slot_state{{{FRONT}, state!="running"}}) > 0'
                },
                kind="table",
                sparse=True,
            ),
            Panel(
                "Connections lost or not made",
                "To workers, per second.",
                {"{{instance}}": rate("dynamo_transport_tcp_errors_total", FRONT, "instance")},
            ),
        ),
        "Moves": (
            Panel(
                "Migrations",
                "new_request: before the first accept; ongoing_request: after it.",
                {"{{migration_type}}": rate("dynamo_frontend_model_migration_total", MODEL, "migration_type")},
            ),
            Panel(
                "Pause of a move",
                "From the failure to the next new token.",
                quantiles("holdfast_frontend_migration_gap_seconds", MODEL),
                "s",
            ),
            Panel(
                "Moves by outcome",
                "failure: the stream was lost; cancelled: the client left meanwhile.",
                {"{{outcome}}": rate("dynamo_frontend_model_migration_duration_seconds_count", MODEL, "outcome")},
            ),
            Panel(
                "Failed attempts by code",
                "Each was followed by another attempt.",
                {"{{code}}": rate("holdfast_frontend_attempt_failures_total", MODEL, "code")},
            ),
            Panel(
                "Joins",
                "exact: the text is what one worker would have said; declared: the client was told.",
                {"{{join}}": rate("holdfast_frontend_joins_total", MODEL, "join")},
            ),
            Panel(
                "Share of requests that move",
                "Above 5 % for five minutes it is an alert.",
                {"{{model}}": 'model:holdfast_migrations:ratio_rate5m{model=~"$model"}'},
                "percentunit",
            ),
        ),
        "Waiting and budgets": (
            Panel(
                "Waiting for room",
                "Streams in front of full workers, and how many may wait (DYN_ADMISSION_QUEUE_LIMIT; 0: no queue).",
                {
                    "{{instance}}": total("dynamo_frontend_router_queue_pending_requests", FRONT, "instance"),
                    "limit {{instance}}": f"holdfast_frontend_queue_limit{{{FRONT}}}",
                },
            ),
            Panel(
                "Waits by how they ended, 95th percentile",
                "placed: a worker had room; rejected: turned away from the queue.",
                {
                    "{{outcome}}": "histogram_quantile(0.95, sum by (outcome, le) "
                    f"(rate(holdfast_frontend_queue_wait_seconds_bucket{{{MODEL}}}{RATE})))"
                },
                "s",
                sparse=True,
            ),
            Panel(
                "Repeated attempts left",
                "At 0 failed attempts are not repeated at once; first moves of streams go on.",
                {"{{instance}}": f"holdfast_frontend_retry_budget_left{{{FRONT}}}"},
            ),
            Panel(
                "Moves that wait for their turn",
                "Paced, so that a dead machine does not become a flood.",
                {"{{instance}}": f"holdfast_frontend_paced_moves{{{FRONT}}}"},
            ),
            Panel(
                "Judging",
                "Self-doubt: so many workers look silent that this frontend waits before it judges. Late: checks a "
                "second that came too late to judge by.",
                {
                    "self-doubt {{instance}}": f"holdfast_frontend_self_doubt{{{FRONT}}}",
                    "late {{instance}}": rate("holdfast_frontend_discarded_intervals_total", FRONT, "instance"),
                },
            ),
            Panel(
                "Draining frontends",
                "1 while a frontend leaves.",
                {"{{instance}}": f"holdfast_frontend_draining{{{FRONT}}}"},
            ),
        ),
        "Losses and rejections": (
            Panel(
                "Answers that broke off, last hour",
                "Workers were lost and no other could go on.",
                {"{{model}}": 'sum by (model) (increase(holdfast:streams_lost:total{model=~"$model"}[1h]))'},
                kind="stat",
            ),
            Panel(
                "Killer prompts, last hour",
                "Requests that were stopped because workers died of them.",
                {"": "sum(increase(holdfast:killer_prompts:total[1h]))"},
                kind="stat",
            ),
            Panel(
                "Rejections by knob",
                "Turned away for lack of capacity; no worker had accepted them.",
                {"{{layer}} {{knob}}": rate("holdfast_frontend_rejection_total", MODEL, "layer, knob")},
                "reqps",
                sparse=True,
            ),
            Panel(
                "Not moved: too long",
                "Streams longer than DYN_MIGRATION_MAX_SEQ_LEN.",
                {"{{model}}": rate("dynamo_frontend_model_migration_max_seq_len_exceeded_total", MODEL, "model")},
                "reqps",
                sparse=True,
            ),
        ),
        "Accounts": (
            Panel(
                "Leases",
                "What is counted as held. Zero at rest, always.",
                {"{{kind}} {{instance}}": total("holdfast_frontend_leases", FRONT, "kind, instance")},
            ),
            Panel(
                "Requests that counters and gauges disagree about",
                "Started, minus ended, minus in flight. A lasting difference is a leak.",
                {
                    "{{instance}}": "sum by (instance) (dynamo_frontend_requests_started_total"
                    f'{{{FRONT}, model!="unknown"}}) - sum by (instance) (dynamo_frontend_requests_total'
                    f'{{{FRONT}, model!="unknown"}}) - '
                    f"sum by (instance) (dynamo_frontend_inflight_requests{{{FRONT}}})"
                },
            ),
            Panel(
                "Tokens after a cancel",
                "What engines generated after a cancel had reached them, as workers last said.",
                {"{{worker}}": f"max by (worker) (holdfast_worker_tokens_after_cancel{{{FRONT}}})"},
            ),
        ),
    },
)
