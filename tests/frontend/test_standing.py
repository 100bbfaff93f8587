"""What a frontend shows about its own standing: queue, budgets, refused workers, slots, connections."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable

import pytest

from holdfast.base.errors import SecretMismatch, VersionMismatch
from holdfast.base.ids import draw_epoch, draw_instance_id
from holdfast.engines.mock.config import MockConfig
from holdfast.frontend.standing import refused_for
from holdfast.requests.config import RequestSettings
from holdfast.routing.config import AdmissionSettings
from holdfast.runtime.discovery.contract import SUPERVISOR, InstanceRecord
from holdfast.runtime.discovery.mem import MemDiscovery
from tests.frontend.support import CHAT, TEXT, Stack, chat, request_bytes, stack, text, until

OURS = "holdfast_frontend_"
LIVE = request_bytes("GET", "/live")


def shown(built: Stack, name: str, **labels: str) -> float:
    """Return a metric as a scrape would see it; a label set that does not exist fails."""
    built.frontend.gauges.refresh()
    found = [
        sample.value
        for family in built.frontend.metrics.registry.collect()
        for sample in family.samples
        if sample.name == name and labels.items() <= sample.labels.items()
    ]
    assert found, f"{name}{labels} is not exposed"
    return sum(found)


def exists(built: Stack, name: str, **labels: str) -> bool:
    built.frontend.gauges.refresh()
    families = built.frontend.metrics.registry.collect()
    samples = (s for family in families for s in family.samples)
    return any(s.name == name and labels.items() <= s.labels.items() for s in samples)


async def test_parts_of_preparing_and_finishing_are_timed() -> None:
    stage = "dynamo_frontend_stage_duration_seconds_count"
    template, tokenize = "dynamo_frontend_template_seconds", "dynamo_frontend_tokenize_seconds"
    async with stack(1, MockConfig(step_ms=0, context_length=400_000)) as built:
        await built.post(CHAT, chat())
        await built.at_rest()
        assert (shown(built, f"{template}_count"), shown(built, f"{tokenize}_count")) == (1, 1)
        await built.post(TEXT, text(["one", "two"]))
        await built.post(TEXT, text([5, 6, 7]))
        await built.at_rest()
        assert (shown(built, f"{template}_count"), shown(built, f"{tokenize}_count")) == (1, 2), "ids are no text"
        await built.post(CHAT, chat("long " * 60_000, max_tokens=1))
        assert (shown(built, f"{template}_count"), shown(built, f"{tokenize}_count")) == (2, 3), "off the loop too"
        assert 0 < shown(built, f"{tokenize}_sum") < 30
        assert 0 < shown(built, f"{template}_sum") < 30
        await built.post(CHAT, {**chat(), "model": "none"})
        assert shown(built, stage, stage="postprocess") == 4, "only what was answered"
        assert shown(built, stage, stage="preprocess") == 4


async def test_counters_begin_at_nought() -> None:
    """An alert on their increase sees the first event."""
    async with stack(1) as built:
        for name, labels in (
            ("dynamo_frontend_requests_total", {"model": "mock", "error_type": "backend_error"}),
            ("dynamo_frontend_requests_total", {"model": "mock", "status": "success"}),
            ("dynamo_frontend_requests_total", {"model": "unknown", "error_type": "not_found"}),
            ("dynamo_frontend_failures_total", {"class": "request", "reason": "poison_request"}),
            ("dynamo_frontend_model_migration_total", {"model": "mock", "migration_type": "ongoing_request"}),
            ("dynamo_frontend_model_rejection_total", {"model": "mock", "endpoint": "completions"}),
            (f"{OURS}rejection_total", {"model": "unknown", "knob": "DYN_HTTP_MAX_CONNECTIONS"}),
            (f"{OURS}rejection_total", {"model": "mock", "knob": "DYN_ACTIVE_DECODE_BLOCKS_THRESHOLD"}),
            (f"{OURS}attempt_failures_total", {"model": "mock", "code": "peer_silent"}),
            (f"{OURS}worker_transitions_total", {"state": "ejected", "cause": "disconnected"}),
            (f"{OURS}client_disconnects_total", {"model": "mock"}),
        ):
            assert shown(built, name, **labels) == 0
        series = [s for f in built.frontend.metrics.registry.collect() for s in f.samples]
        assert len(series) < 1200, "per model a few hundred"


async def test_the_queue_and_the_waits_in_it() -> None:
    admission = AdmissionSettings(admission_queue_limit=4, admission_queue_timeout=20)
    waits = f"{OURS}queue_wait_seconds_count"
    async with stack(0, MockConfig(step_ms=2), requests=RequestSettings(admission=admission)) as built:
        await built.add_worker(engine_request_limit=1)
        await built.served()
        assert shown(built, f"{OURS}queue_limit") == 4
        running = asyncio.create_task(built.post(CHAT, chat("long", max_tokens=1500)))
        await until(lambda: shown(built, "dynamo_request_plane_inflight") == 1)
        waiting = [asyncio.create_task(built.post(CHAT, chat("next"))) for _ in range(2)]
        await until(
            lambda: shown(built, "dynamo_frontend_router_queue_pending_requests", worker_type="aggregated") == 2
        )
        assert shown(built, f"{OURS}queue_streams", model="mock") == 2
        waiting[0].cancel()
        await until(lambda: shown(built, "dynamo_frontend_router_queue_pending_requests") == 1)
        assert shown(built, waits, outcome="cancelled") == 1
        running.cancel()
        assert (await waiting[1]).status_code == 200
        await built.at_rest()
        assert shown(built, waits, model="mock", outcome="placed") == 1
        assert shown(built, "dynamo_frontend_router_queue_pending_requests") == 0
        assert shown(built, f"{OURS}queue_streams") == 0


async def test_a_wait_that_ends_in_a_rejection() -> None:
    admission = AdmissionSettings(admission_queue_limit=1, admission_queue_timeout=0.1)
    async with stack(0, MockConfig(step_ms=2), requests=RequestSettings(admission=admission)) as built:
        await built.add_worker(engine_request_limit=1)
        await built.served()
        running = asyncio.create_task(built.post(CHAT, chat("long", max_tokens=1500)))
        await until(lambda: shown(built, "dynamo_request_plane_inflight") == 1)
        assert (await built.post(CHAT, chat("late"))).status_code == 503
        assert shown(built, f"{OURS}queue_wait_seconds_count", outcome="rejected") == 1
        assert shown(built, f"{OURS}rejection_total", knob="DYN_ADMISSION_QUEUE_TIMEOUT_SECS") == 1
        running.cancel()
        await built.at_rest()


async def test_a_worker_whose_card_does_not_fit_is_counted_by_the_field() -> None:
    async with stack(1) as built:
        assert shown(built, f"{OURS}workers_refused") == 0
        other = await built.add_worker(MockConfig(step_ms=0, context_length=4096))
        await until(lambda: shown(built, f"{OURS}workers_refused", field="context_length") == 1)
        assert shown(built, f"{OURS}workers_refused") == 1
        await built.remove_worker(other)
        assert shown(built, f"{OURS}workers_refused") == 0


@pytest.mark.parametrize(("error", "field"), [(VersionMismatch("x"), "version"), (SecretMismatch("x"), "secret")])
async def test_a_worker_that_cannot_be_spoken_with_is_counted(error: VersionMismatch, field: str) -> None:
    async with stack(1) as built:
        (worker,) = built.pool.all_workers()
        assert refused_for(worker) == ""
        worker.last_error = error
        assert refused_for(worker) == "", "an old error: it is connected"
        link, worker.link = worker.link, None
        assert refused_for(worker) == field
        worker.link, worker.last_error = link, None


async def test_each_workers_state_is_shown_and_gone_with_the_worker() -> None:
    async with stack(2) as built:
        first, second = (worker for worker, _ in built.workers.values())
        state = f"{OURS}worker_state"
        assert shown(built, state, worker_id=first.instance, state="usable") == 1
        assert shown(built, state, worker_id=first.instance) == 1, "in one state at a time"
        await built.remove_worker(first)
        assert not exists(built, state, worker_id=first.instance)
        assert shown(built, state, worker_id=second.instance, state="usable") == 1


async def test_what_supervisors_say_of_their_slots() -> None:
    slots = f"{OURS}supervisor_slot_state"
    async with stack(1) as built:
        supervisor = MemDiscovery(built.hub)
        await supervisor.start()
        record = InstanceRecord(
            namespace="dynamo", component=SUPERVISOR, endpoints=(), instance=draw_instance_id(built.rng),
            epoch=draw_epoch(built.rng), address="", pid=1,
            meta={"worker-0": "running", "worker-1": "gave-up", "frontend-0": "running", "pid.worker-0": 7},
        )  # fmt: skip
        await supervisor.publish(record)
        await until(lambda: exists(built, slots, slot="worker-1"))
        where = {"supervisor": record.instance}
        assert shown(built, slots, **where, slot="worker-1", state="gave-up") == 1
        assert shown(built, slots, **where, slot="worker-1", state="running") == 0
        assert shown(built, slots, **where, slot="frontend-0", state="running") == 1
        assert not exists(built, slots, slot="pid.worker-0")
        await supervisor.withdraw(record.instance)
        await until(lambda: not exists(built, slots))
        await supervisor.close()


async def test_draining_and_budgets() -> None:
    async with stack(1) as built:
        assert shown(built, f"{OURS}draining") == 0
        full = shown(built, f"{OURS}retry_budget_left")
        assert full > 1
        assert built.frontend.services.budget.withdraw(asyncio.get_running_loop().time())
        assert shown(built, f"{OURS}retry_budget_left") < full
        assert shown(built, f"{OURS}self_doubt") == shown(built, f"{OURS}paced_moves") == 0
        built.frontend.turn_away()
        assert shown(built, f"{OURS}draining") == 1


async def test_moves_that_wait_for_their_turn_are_shown() -> None:
    async with stack(1) as built:
        pacer = built.frontend.services.pacer
        turns: list[Awaitable[None]] = [asyncio.ensure_future(pacer.pass_through(float(i))) for i in range(300)]
        await asyncio.sleep(0)
        assert shown(built, f"{OURS}paced_moves") > 0
        await asyncio.gather(*turns)
        assert shown(built, f"{OURS}paced_moves") == 0


async def test_a_late_check_is_counted() -> None:
    async with stack(1) as built:
        before = shown(built, f"{OURS}discarded_intervals_total")
        built.pool._detector._discard()
        assert shown(built, f"{OURS}discarded_intervals_total") == before + 1


async def test_a_connection_too_many_is_told_and_counted_like_every_other_rejection() -> None:
    async with (
        stack(0, http_max_connections=2, http_overload_status_code=529) as one,
        contextlib.AsyncExitStack() as held,
    ):
        for _ in range(2):
            client = await held.enter_async_context(one.client())
            client.send(LIVE)
            assert (await client.answer()).status == 200
        assert shown(one, f"{OURS}connections") == 2
        assert shown(one, f"{OURS}connections_limit") == 2
        late = await held.enter_async_context(one.client())
        late.send(LIVE)
        got = await late.answer()
        assert got.status == 529
        assert (got.headers["retry-after"], got.headers["connection"]) == ("2", "close")
        assert got.error["code"] == "capacity_exhausted"
        assert got.error["type"] == "service_unavailable"
        knob = {"layer": "frontend", "knob": "DYN_HTTP_MAX_CONNECTIONS"}
        assert got.error["details"] == {**knob, "threshold": 2, "measured": 2}
        assert shown(one, f"{OURS}rejection_total", model="unknown", **knob) == 1


async def test_the_process_is_shown() -> None:
    async with stack(1) as built:
        assert 10e6 < shown(built, "process_resident_memory_bytes") < 100e9
        assert 3 < shown(built, "process_open_fds") < shown(built, "process_max_fds")
        assert shown(built, "process_cpu_seconds_total") > 0
        assert shown(built, "process_start_time_seconds") > 1.6e9
        (worker, _) = next(iter(built.workers.values()))
        page = worker.gauges.render().decode()
        assert "\nprocess_resident_memory_bytes " in page
        assert "\nprocess_open_fds " in page
