"""Whatever happens, what was counted up is counted down: after random traffic with faults every gauge of what is in
flight, waiting or held is zero, started requests have all ended, and the counters of both sides agree."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import Awaitable, Callable
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from holdfast.engines.mock.config import MockConfig
from holdfast.requests.config import RequestSettings
from holdfast.routing.config import AdmissionSettings
from tests.frontend.support import CHAT, TEXT, Stack, chat, stack, text, until

FRONTEND = (
    "dynamo_frontend_inflight_requests",
    "dynamo_frontend_active_requests",
    "dynamo_frontend_queued_requests",
    "dynamo_frontend_disconnected_clients",
    "dynamo_frontend_stage_requests",
    "dynamo_frontend_router_queue_pending_requests",
    "dynamo_request_plane_inflight",
    "dynamo_request_plane_inflight_requests",
    "dynamo_transport_tcp_pool_active",
    "holdfast_frontend_leases",
    "holdfast_frontend_queue_streams",
    "holdfast_frontend_paced_moves",
    "holdfast_frontend_self_doubt",
)
WORKER = (
    "dynamo_component_inflight_requests",
    "dynamo_component_shutdown_inflight_requests",
    "dynamo_work_handler_pool_active_tasks",
    "holdfast_worker_leases",
    "holdfast_worker_running_sequences",
    "holdfast_worker_waiting_sequences",
    "holdfast_worker_prefill_tokens",
)
SETTINGS = RequestSettings(
    migration_wait_secs=3.0,
    admission=AdmissionSettings(admission_queue_limit=6, admission_queue_timeout=0.2),
)
Samples = dict[str, float]


class Traffic:
    """One random course of events; every choice comes from the seed."""

    def __init__(self, built: Stack, seed: int):
        self.built, self.rng = built, random.Random(seed)

    async def run(self, requests: int) -> None:
        async with asyncio.TaskGroup() as group:
            for _ in range(requests):
                group.create_task(self._one())
                await asyncio.sleep(self.rng.random() * 0.01)
                if self.rng.random() < 0.06:
                    await self._replace()

    async def _one(self) -> None:
        act: Callable[[], Awaitable[None]] = self.rng.choice(
            (self._whole, self._whole, self._streamed, self._streamed, self._leave, self._leave, self._wrong)
        )
        with contextlib.suppress(httpx.HTTPError):
            await act()

    def _content(self) -> str:
        at = self.rng.randrange(1, 20)
        kinds = ("", "", f"[[mock:abort-after {at}]] ", f"[[mock:error-after {at}]] ", "[[mock:refuse 1]] ")
        return f"{self.rng.choice(kinds)}word"

    def _body(self) -> tuple[str, dict[str, Any]]:
        more = {"max_tokens": self.rng.randrange(1, 40), "n": self.rng.choice((1, 1, 3)), "temperature": 0}
        if self.rng.random() < 0.5:
            return CHAT, chat(self._content(), **more)
        return TEXT, text([self._content(), "two"][: self.rng.randrange(1, 3)], **more)

    async def _whole(self) -> None:
        path, body = self._body()
        await self.built.post(path, body)

    async def _streamed(self) -> None:
        path, body = self._body()
        async with self.built.http.stream("POST", path, json={**body, "stream": True}) as answer:
            await answer.aread()

    async def _leave(self) -> None:
        path, body = self._body()
        body |= {"stream": self.rng.random() < 0.7, "max_tokens": 900}
        with contextlib.suppress(TimeoutError):
            async with (
                asyncio.timeout(self.rng.random() * 0.1),
                self.built.http.stream("POST", path, json=body) as answer,
            ):
                await answer.aread()

    async def _wrong(self) -> None:
        await self.built.post(CHAT, self.rng.choice(({"model": "none"}, {}, chat(model="none"), chat(max_tokens=-1))))

    async def _replace(self) -> None:
        """A worker leaves in order with all its work, and another one comes."""
        worker = self.rng.choice([worker for worker, _ in self.built.workers.values()])
        await self.built.add_worker(engine_request_limit=8)
        await self.built.remove_worker(worker)


def samples(page: str) -> Samples:
    """Return sums by metric name."""
    found: Samples = {}
    for family in text_string_to_metric_families(page):
        for sample in family.samples:
            found[sample.name] = found.get(sample.name, 0.0) + sample.value
    return found


@pytest.mark.parametrize("seed", range(3))
async def test_after_random_traffic_with_faults_nothing_is_held(seed: int) -> None:
    async with stack(2, MockConfig(step_ms=2, max_num_seqs=4), requests=SETTINGS) as built:
        for worker, _ in list(built.workers.values()):
            await built.add_worker(engine_request_limit=8)
            await built.remove_worker(worker)
        await Traffic(built, seed).run(90)
        await built.at_rest()
        await until(lambda: not any(worker.host.in_flight for worker, _ in built.workers.values()))
        seen = samples((await built.http.get("/metrics")).text)
        hosts = [samples(worker.gauges.render().decode()) for worker, _ in built.workers.values()]
    assert {name: seen[name] for name in FRONTEND} == dict.fromkeys(FRONTEND, 0)
    for host in hosts:
        assert {name: host[name] for name in WORKER} == dict.fromkeys(WORKER, 0)
    assert seen["dynamo_frontend_requests_started_total"] == seen["dynamo_frontend_requests_total"]
    assert 60 < seen["dynamo_frontend_requests_total"] <= 90, "some leave before their request has left"
    assert seen["dynamo_frontend_model_cancellation_total"] > 0
    assert seen["dynamo_frontend_model_migration_total"] > 0
    assert seen["dynamo_frontend_output_tokens_total"] > 0
