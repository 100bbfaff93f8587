"""One request through real processes: its ids on the log lines of each, its story after a move, all gauges at rest."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import sys
import urllib.request
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from holdfast.runtime.discovery.factory import open_discovery
from tests.e2e.support import Cluster, cluster
from tests.support.promtool import complaints

pytestmark = [pytest.mark.e2e, pytest.mark.asyncio(loop_scope="module")]

TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"
STATE = "vendor=1,other=t61rcWkgMzE"
SECRET = "harbourmaster"
AT_REST = (
    "dynamo_frontend_inflight_requests",
    "dynamo_frontend_queued_requests",
    "dynamo_frontend_disconnected_clients",
    "dynamo_frontend_stage_requests",
    "dynamo_frontend_router_queue_pending_requests",
    "dynamo_request_plane_inflight",
    "holdfast_frontend_queue_streams",
    "holdfast_frontend_paced_moves",
    "holdfast_frontend_leases",
    "dynamo_component_inflight_requests",
    "holdfast_worker_leases",
    "holdfast_worker_running_sequences",
    "holdfast_worker_waiting_sequences",
)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def logged(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Cluster]:
    """Two workers; everything logs JSON, spans included."""
    env = {"DYN_LOGGING_JSONL": "1", "DYN_LOGGING_SPAN_EVENTS": "1", "DYN_LOG": "debug,asyncio=warn"}
    async with cluster(tmp_path_factory.mktemp("logged"), env=env) as running:
        yield running


def lines(log: Path) -> list[dict[str, Any]]:
    """Return the JSON lines of all processes, with their slot."""
    found = []
    for line in log.read_text(encoding="utf-8").splitlines():
        slot, _, text = line.partition(" ")
        if text.startswith("{"):
            found.append({"slot": slot, **json.loads(text)})
    return found


async def ask(logged: Cluster, label: str, content: str) -> str:
    body = {"model": logged.model, "messages": [{"role": "user", "content": content}], "max_tokens": 40, "stream": True}
    headers = {"x-request-id": label, "traceparent": f"00-{TRACE}-00f067aa0ba902b7-01", "tracestate": STATE}
    answer = await logged.http.post("/v1/chat/completions", json=body, headers=headers)
    assert answer.status_code == 200
    assert answer.headers["x-trace-id"] == TRACE
    return answer.text


async def test_every_line_of_a_request_in_every_process_carries_its_ids(logged: Cluster) -> None:
    await ask(logged, "traced-1", f"[[mock:crash-after 9]] {SECRET}")
    await logged.usable()
    await logged.at_rest()

    async def complete() -> list[dict[str, Any]] | None:
        ours = [line for line in lines(logged.log) if line.get("x_request_id") == "traced-1"]
        closed = {line["slot"] for line in ours if line["message"] == "SPAN_CLOSED"}
        return ours if len(closed) == 2 else None

    ours = await logged.until(complete)
    assert {line["trace_id"] for line in ours} == {TRACE}
    assert {line["tracestate"] for line in ours} == {STATE}, "through the wire, on both attempts"
    assert len({line["x_dynamo_request_id"] for line in ours}) == 1
    assert {line["slot"].partition("-")[0] for line in ours} == {"frontend", "worker"}
    assert len({line["slot"] for line in ours}) == 3, "the frontend, the worker that died, the one that went on"
    assert {line["span_name"] for line in ours} == {"http-request", "handle_payload"}
    spans = {line["span_id"] for line in ours}
    assert len(spans) == 3, "one per process"
    moved = [line for line in ours if "leaves worker" in line["message"]]
    assert [line["cause"] for line in moved] == ["disconnected"]
    assert SECRET not in logged.log.read_text(encoding="utf-8")


async def test_holdfast_explain_tells_the_story(logged: Cluster) -> None:
    await ask(logged, "explained-1", "[[mock:crash-after 9]] tell")
    await logged.usable()
    told = await explain(logged, "explained-1")
    assert "attempt 1 on worker" in told
    assert "attempt 2 on worker" in told
    assert "disconnected at token 9" in told
    assert "became ejected: disconnected" in told
    assert "40 generated, join exact" in told
    assert "explained-1" in await explain(logged, "--moved")
    assert json.loads(await explain(logged, "explained-1", "--json"))["label"] == "explained-1"
    assert "No request 'unheard-of'" in await explain(logged, "unheard-of", code=1)


async def explain(logged: Cluster, *arguments: str, code: int = 0) -> str:
    command = [sys.executable, "-m", "holdfast", "explain", *arguments, "--url", logged.url]
    env = {**os.environ, "NO_COLOR": "1", "COLUMNS": "200"}
    process = await asyncio.create_subprocess_exec(
        *command, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT, env=env
    )
    out, _ = await asyncio.wait_for(process.communicate(), 30)
    assert process.returncode == code, out.decode()
    return out.decode()


async def test_all_gauges_of_all_processes_are_zero_at_rest(logged: Cluster) -> None:
    async def leave() -> None:
        body = {
            "model": logged.model,
            "messages": [{"role": "user", "content": "x"}],
            "stream": True,
            "max_tokens": 900,
        }
        async with logged.http.stream("POST", "/v1/chat/completions", json=body) as answer:
            await anext(answer.aiter_raw())

    await asyncio.gather(*(leave() for _ in range(5)), ask(logged, "moved", "[[mock:abort-after 5]] x"))
    await logged.at_rest()
    logged.wire.broken.clear()  # leaving was on purpose
    texts = [(await logged.http.get("/metrics")).text, *await pages(logged)]
    assert len(texts) == 3
    for text in texts:
        held = {line for line in text.splitlines() if line.partition("{")[0].partition(" ")[0] in AT_REST}
        assert held
        assert {line for line in held if float(line.rsplit(" ", 1)[1])} == set()
        if shutil.which("promtool"):
            assert await asyncio.to_thread(complaints, text) == []


async def pages(logged: Cluster) -> list[str]:
    """Return the metrics of all workers, from their status servers."""
    discovery = open_discovery("file", root=logged.log.parent / "discovery")
    await discovery.start()
    try:
        records = [r for r in discovery.snapshot() if r.cards and r.system_address]
    finally:
        await discovery.close()
    return [await asyncio.to_thread(fetch, f"http://{record.system_address}/metrics") for record in records]


def fetch(url: str) -> str:
    with urllib.request.urlopen(url, timeout=10) as answer:
        return str(answer.read().decode())
