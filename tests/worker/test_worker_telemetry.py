"""A worker's metrics over real calls: what they count, that it comes down again, and that canaries are no calls."""

from __future__ import annotations

import asyncio
import logging
import shutil
import subprocess
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from holdfast.engines.mock.config import MockConfig
from holdfast.telemetry import context
from holdfast.telemetry.catalogue import CATALOGUE
from holdfast.worker.process import WorkerProcess
from tests.frontend.support import stack, until

WHERE = "dynamo_component_"


def body(content: str = "hello", **more: Any) -> dict[str, Any]:
    return {"model": "mock", "messages": [{"role": "user", "content": content}], "max_tokens": 12, **more}


def scrape(worker: WorkerProcess) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    families = text_string_to_metric_families(worker.gauges.render().decode())
    return {(s.name, tuple(sorted(s.labels.items()))): s.value for f in families for s in f.samples}


def value(scraped: dict[Any, float], name: str, **labels: str) -> float:
    return sum(v for (n, have), v in scraped.items() if n == name and labels.items() <= dict(have).items())


async def test_calls_are_counted_and_canaries_are_not() -> None:
    async with stack(1, MockConfig(step_ms=1)) as built:
        (worker, _) = next(iter(built.workers.values()))
        before = scrape(worker)
        assert value(before, f"{WHERE}requests_total") == 0, "the start-up probe is no call"
        assert (await built.post("/v1/chat/completions", body(n=2))).status_code == 200
        retried = await built.post("/v1/chat/completions", body("[[mock:error-after 3]] x"))
        assert retried.status_code == 200
        await built.at_rest()
        seen = scrape(worker)
    where = {"dynamo_namespace": "dynamo", "dynamo_endpoint": "generate", "worker_id": worker.instance}
    assert value(seen, f"{WHERE}requests_total", **where) == 4, "two choices, a failure and its second attempt"
    assert value(seen, f"{WHERE}request_duration_seconds_count", **where) == 4
    assert value(seen, f"{WHERE}request_bytes_total", **where) > 0
    assert value(seen, f"{WHERE}response_bytes_total", **where) == 4 * (12 + 12 + 3 + 9)
    assert value(seen, f"{WHERE}errors_total", error_type="generate") == 1
    assert value(seen, "dynamo_work_handler_time_to_first_response_seconds_count") == 4
    assert value(seen, "holdfast_worker_generated_tokens_total") >= 36
    assert value(seen, f"{WHERE}total_blocks") > 0
    assert value(seen, f"{WHERE}uptime_seconds") > 0
    assert value(seen, f"{WHERE}model_load_time_seconds") >= 0
    for gauge in (f"{WHERE}inflight_requests", "dynamo_work_handler_pool_active_tasks", "holdfast_worker_leases"):
        assert value(seen, gauge) == 0


async def test_what_the_prefix_cache_was_asked_and_had_is_told() -> None:
    async with stack(1, MockConfig(step_ms=1)) as built:
        (worker, _) = next(iter(built.workers.values()))
        seen = [scrape(worker)]
        for _ in range(2):
            assert (
                await built.post("/v1/chat/completions", body("of three blocks at the least, " * 9))
            ).status_code == 200
            seen.append(scrape(worker))
    asked, had = (
        [value(one, f"holdfast_worker_prefix_cache_{name}_tokens_total", worker_id=worker.instance) for one in seen]
        for name in ("queried", "hit")
    )
    assert asked[2] - asked[1] == asked[1] - asked[0] > 48
    assert had[1] == had[0]
    assert asked[1] - asked[0] > had[2] - had[1] >= 48


async def test_canaries_are_counted_by_result_and_rare_counters_begin_at_nought() -> None:
    async with stack(1) as built:
        (worker, engine) = next(iter(built.workers.values()))
        before = scrape(worker)
        assert value(before, "holdfast_worker_canaries_total", result="good") == 1, "the start-up probe"
        assert value(before, "holdfast_worker_canaries_total") == 1
        named = {(name, dict(labels).get("error_type"), dict(labels).get("code")) for name, labels in before}
        assert (f"{WHERE}errors_total", "generate", None) in named
        assert ("holdfast_worker_refusals_total", None, "worker_saturated") in named
        engine.misbehave("hang")
        assert (await worker.vitals.canary.once(0.1)).kind == "bad"
        engine.misbehave("unhang")
        seen = scrape(worker)
        assert value(seen, "holdfast_worker_canaries_total", result="bad", worker_id=worker.instance) == 1
        assert value(seen, "holdfast_worker_canaries_total", result="unclear") == 0


async def test_cancels_refusals_and_flight() -> None:
    async with stack(0, MockConfig(step_ms=5)) as built:
        worker = await built.add_worker(engine_request_limit=1)
        await built.served()

        async def left() -> None:
            request = built.http.stream("POST", "/v1/chat/completions", json=body(stream=True, max_tokens=1000))
            async with request as answer:
                await anext(answer.aiter_lines())
                flying = scrape(worker)
                assert value(flying, f"{WHERE}inflight_requests") == 1
                assert value(flying, "holdfast_worker_leases", kind="stream") == 1
                assert value(flying, "holdfast_worker_state", state="saturated") == 1

        await left()
        await until(lambda: value(scrape(worker), f"{WHERE}cancellation_total") == 1)
        await built.at_rest()
        seen = scrape(worker)
    assert value(seen, f"{WHERE}inflight_requests") == 0
    assert value(seen, f"{WHERE}errors_total") == 0, "a cancel is no error"
    assert value(seen, "dynamo_work_handler_pool_capacity") == 1


async def test_real_output_is_what_the_catalogue_says_and_what_prometheus_accepts() -> None:
    async with stack(1) as built:
        await built.post("/v1/chat/completions", body())
        await built.at_rest()
        (worker, _) = next(iter(built.workers.values()))
        text = worker.gauges.render().decode()
    families = {f.name: f for f in text_string_to_metric_families(text)}
    listed = {m.name.removesuffix("_total"): m for m in CATALOGUE if m.process in ("worker", "every")}
    assert set(families) == set(listed)
    for name, family in families.items():
        assert family.type == listed[name].kind
        for sample in family.samples:
            assert set(sample.labels) - {"le"} == set(listed[name].labels), sample
    promtool = shutil.which("promtool")
    if promtool is not None:
        command = [promtool, "check", "metrics"]
        done = await asyncio.to_thread(subprocess.run, command, input=text, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr


async def test_a_calls_log_lines_carry_the_clients_ids_and_this_worker(caplog: pytest.LogCaptureFixture) -> None:
    seen: list[dict[str, object]] = []

    class Note(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            request = context.current()
            seen.append(request.fields() if request is not None else {})

    handler = Note()
    logger = logging.getLogger("holdfast.worker.calls")
    logger.addHandler(handler)
    caplog.set_level(logging.DEBUG, logger="holdfast.worker.calls")
    try:
        async with stack(1) as built:
            await built.post("/v1/chat/completions", body("[[mock:error-after 3]] x"), x_request_id="tagged")
            await built.at_rest()
            (worker, _) = next(iter(built.workers.values()))
    finally:
        logger.removeHandler(handler)
    assert len(seen) >= 2
    for fields in seen:
        assert fields["x_request_id"] == "tagged"
        assert fields["span_name"] == "handle_payload"
        assert (fields["endpoint"], fields["namespace"], fields["instance_id"]) == (
            "generate",
            "dynamo",
            worker.instance,
        )
        assert len(str(fields["trace_id"])) == 32
        assert fields["parent_id"]
