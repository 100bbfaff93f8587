"""A frontend's metrics over real requests: what they count, and that everything counted up comes down again."""

from __future__ import annotations

import asyncio
import shutil
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from holdfast.base.errors import WorkerSaturated
from holdfast.engines.mock.config import MockConfig
from holdfast.frontend.metrics import FOLD_EVERY, FrontendMetrics
from holdfast.telemetry.catalogue import CATALOGUE
from tests.frontend.support import Stack, stack, until
from tests.support.promtool import complaints

AT_REST = (
    "dynamo_frontend_inflight_requests",
    "dynamo_frontend_active_requests",
    "dynamo_frontend_queued_requests",
    "dynamo_frontend_disconnected_clients",
    "dynamo_frontend_stage_requests",
    "dynamo_frontend_router_queue_pending_requests",
    "dynamo_request_plane_inflight",
    "dynamo_request_plane_inflight_requests",
    "holdfast_frontend_leases",
    "holdfast_frontend_queue_streams",
    "holdfast_frontend_paced_moves",
)


def body(content: str = "hello", **more: Any) -> dict[str, Any]:
    return {"model": "mock", "messages": [{"role": "user", "content": content}], "max_tokens": 12, **more}


async def scrape(built: Stack) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    answer = await built.http.get("/metrics")
    samples = (s for family in text_string_to_metric_families(answer.text) for s in family.samples)
    return {(s.name, tuple(sorted(s.labels.items()))): s.value for s in samples}


def value(scraped: dict[Any, float], name: str, **labels: str) -> float:
    return sum(v for (n, have), v in scraped.items() if n == name and labels.items() <= dict(have).items())


async def test_one_answered_request_counts_everywhere_once() -> None:
    async with stack(2) as built:
        assert (await built.post("/v1/chat/completions", body(stream=True))).status_code == 200
        assert (await built.post("/v1/chat/completions", body(n=2))).status_code == 200
        await built.at_rest()
        seen = await scrape(built)
    route = {"model": "mock", "endpoint": "chat_completions"}
    front = "dynamo_frontend_"
    for kind in ("stream", "unary"):
        assert value(seen, f"{front}requests_total", **route, request_type=kind, status="success", error_type="") == 1
        assert value(seen, f"{front}requests_started_total", **route, request_type=kind) == 1
    assert value(seen, f"{front}output_tokens_total", model="mock") == 36
    assert value(seen, f"{front}output_sequence_tokens_sum") == 36
    assert value(seen, f"{front}output_sequence_tokens_count") == 3, "per choice"
    assert value(seen, f"{front}inter_token_latency_seconds_count") == 33, "per token but each choice's first"
    assert value(seen, f"{front}time_to_first_token_seconds_count") == 2, "per request"
    assert value(seen, f"{front}request_duration_seconds_count") == 2
    assert value(seen, f"{front}input_sequence_tokens_count") == 2
    assert value(seen, "dynamo_request_plane_send_seconds_count") == 3, "per attempt"
    assert value(seen, f"{front}model_ready", model="mock") == 1
    assert value(seen, "holdfast_frontend_workers", state="usable") == 2
    assert value(seen, f"{front}model_context_length", model="mock") > 0
    assert value(seen, "dynamo_transport_tcp_bytes_received_total") > 0
    assert value(seen, "holdfast_frontend_worker_transitions_total", state="usable") == 2


async def test_tokens_and_flight_can_be_watched_while_they_happen() -> None:
    async with (
        stack(1, MockConfig(step_ms=5)) as built,
        built.http.stream("POST", "/v1/chat/completions", json=body("hello", stream=True, max_tokens=1000)) as answer,
    ):
        lines = answer.aiter_lines()
        for _ in range(8):
            await anext(lines)
        seen = await scrape(built)
        assert value(seen, "dynamo_frontend_inflight_requests", model="mock") == 1
        assert value(seen, "dynamo_frontend_active_requests", model="mock") == 1
        assert value(seen, "dynamo_frontend_queued_requests", model="mock") == 0
        assert value(seen, "dynamo_request_plane_inflight") == 1
        assert value(seen, "dynamo_frontend_output_tokens_total", model="mock") >= 2, "before the stream has ended"


async def test_ways_to_fail_have_their_own_words_and_gauges_return() -> None:
    async with stack(1, MockConfig(step_ms=5)) as built:
        assert (await built.post("/v1/chat/completions", body(model="../etc/passwd"))).status_code == 404
        assert (await built.post("/v1/chat/completions", body(temperature="hot"))).status_code == 400
        assert (await built.post("/v1/chat/completions", body(model="guess"))).status_code == 404

        async def left() -> None:
            async with built.http.stream(
                "POST", "/v1/chat/completions", json=body("x", stream=True, max_tokens=1000)
            ) as answer:
                await anext(answer.aiter_lines())

        await asyncio.gather(*(left() for _ in range(3)))
        await until(lambda: built.count("dynamo_frontend_model_cancellation_total") == 3)
        await built.at_rest()
        seen = await scrape(built)
    ended = "dynamo_frontend_requests_total"
    assert value(seen, ended, model="unknown", status="error", error_type="not_found") == 2
    assert value(seen, ended, status="error", error_type="validation") == 1
    assert value(seen, ended, model="mock", status="error", error_type="cancelled") == 3
    assert value(seen, ended, status="success") == 0, "a cancelled request is no success"
    assert value(seen, "holdfast_frontend_client_disconnects_total", model="mock") == 3
    assert value(seen, "dynamo_frontend_requests_started_total") == value(seen, ended)
    models = {dict(labels)["model"] for (_, labels) in seen if "model" in dict(labels)}
    assert models == {"mock", "unknown"}, "names that clients invent make no series"
    assert {name: value(seen, name) for name in AT_REST} == dict.fromkeys(AT_REST, 0)


def test_layers_and_knobs_that_workers_invent_are_bounded() -> None:
    metrics = FrontendMetrics()
    for number in range(500):
        error = WorkerSaturated("full", layer=f"engine {number}", knob=f"knob {number}")
        metrics.finished("", "completions", "unary", error, 0.1)
    (family,) = metrics.rejections_by_knob.collect()
    assert len(family.samples) < 150
    assert sum(sample.value for sample in family.samples) == 500


async def test_moves_are_counted_with_their_gap() -> None:
    async with stack(2) as built:
        answer = await built.post("/v1/chat/completions", body("[[mock:abort-after 4]] hello", temperature=0))
        assert answer.status_code == 200
        await built.at_rest()
        seen = await scrape(built)
    kind = {"model": "mock", "migration_type": "ongoing_request"}
    assert value(seen, "dynamo_frontend_model_migration_total", **kind) == 1
    assert value(seen, "dynamo_frontend_model_migration_duration_seconds_count", **kind, outcome="success") == 1
    assert value(seen, "holdfast_frontend_attempt_failures_total", code="stream_incomplete") == 1
    assert value(seen, "holdfast_frontend_joins_total", join="exact") == 1
    assert value(seen, "dynamo_frontend_output_tokens_total") == 12


async def test_real_output_is_what_the_catalogue_says_and_what_prometheus_accepts() -> None:
    async with stack(1) as built:
        await built.post("/v1/chat/completions", body())
        await built.post("/v1/chat/completions", body(model="none"))
        await built.at_rest()
        text = (await built.http.get("/metrics")).text
    families = {f.name: f for f in text_string_to_metric_families(text)}
    listed = {m.name.removesuffix("_total"): m for m in CATALOGUE if m.process in ("frontend", "every")}
    assert set(families) | {"holdfast_frontend_router_advice"} == set(listed), "only who asks routers counts advice"
    for name, family in families.items():
        assert family.type == listed[name].kind
        for sample in family.samples:
            assert set(sample.labels) - {"le"} == set(listed[name].labels), sample
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("promtool is not installed; names were checked against its rules in tests/telemetry")
    assert await asyncio.to_thread(complaints, text, promtool) == []


def test_what_is_noted_is_counted_before_it_is_much() -> None:
    metrics = FrontendMetrics()
    for number in range(1000):
        name = f"model-{number % 3}" if number % 2 else f"one-of-many-{number}"
        metrics.prepared(0.001)
        metrics.finished(name, "chat_completions", "stream", None, 0.5)
        assert len(metrics.of(name).duration.fresh) <= FOLD_EVERY
    assert sum(metrics.of(f"model-{n}").duration.counts[0] for n in range(3)) == 500
    assert sum(metrics.stages.labels("preprocess").counts) == 1000
    assert len(metrics.stages.labels("preprocess").fresh) == 0
