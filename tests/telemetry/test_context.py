"""Ids that tie the log lines and spans of a request together across processes."""

from __future__ import annotations

import asyncio
import io
import json
import logging
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from holdfast.telemetry import context
from holdfast.telemetry.context import (
    SPAN_EVENTS,
    attempt_span,
    attempt_traceparent,
    bound,
    current,
    frontend_context,
    worker_context,
)
from holdfast.telemetry.logs import JsonLines, Readable

IDS = st.integers(1, 2**128 - 1).map(lambda n: f"{n:032x}")
TRACE = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


@given(IDS, st.integers(0, 127), st.integers(1, 50))
def test_span_ids_are_valid_and_follow_from_the_request(request_id: str, choice: int, attempt: int) -> None:
    span = attempt_span(request_id, choice, attempt)
    assert re.fullmatch(r"[0-9a-f]{16}", span)
    assert int(span, 16)
    assert span == attempt_span(request_id, choice, attempt)
    assert span not in (attempt_span(request_id, choice, attempt + 1), attempt_span(request_id, choice + 1, attempt))


def test_a_clients_trace_goes_on_through_attempt_and_worker() -> None:
    request = frontend_context("ab" * 16, "label", TRACE, "vendor=1", sampled=False)
    assert request.trace_id == "0af7651916cd43dd8448eb211c80319c"
    assert request.parent_id == "b7ad6b7169203331"
    assert request.sampled, "the client's own flag wins"
    travelling = attempt_traceparent(request.traceparent, request.request_id, 0, 2)
    assert travelling == f"00-{request.trace_id}-{attempt_span(request.request_id, 0, 2)}-01"
    worker = worker_context(request.request_id, "label", travelling, 2, {"instance_id": "w"})
    assert (worker.trace_id, worker.parent_id) == (request.trace_id, attempt_span(request.request_id, 0, 2))
    assert len({request.span_id, worker.span_id, worker.parent_id}) == 3
    assert request.tracestate == "vendor=1"
    assert worker_context("ab" * 16, "", travelling, 2, {}, tracestate="vendor=1").fields()["tracestate"] == "vendor=1"
    assert worker_context("ab" * 16, "", "", 2, {}, tracestate="vendor=1").tracestate == "", "W3C: not without a parent"


def test_without_a_clients_trace_the_request_id_is_the_trace_id() -> None:
    request = frontend_context("ab" * 16, "", "", "", sampled=False)
    assert request.traceparent == f"00-{'ab' * 16}-{'ab' * 8}-00"
    worker = worker_context("ab" * 16, "", "", 1, {})
    assert (worker.trace_id, worker.parent_id, worker.sampled) == ("ab" * 16, "", False)


def line(formatter: logging.Formatter, message: str = "happened", **extra: object) -> str:
    record = logging.makeLogRecord({"name": "holdfast.x", "levelno": 20, "levelname": "INFO", "msg": message, **extra})
    return formatter.format(record)


def test_lines_carry_the_documented_fields_inside_a_request_and_none_outside() -> None:
    facts = {"method": "POST", "uri": "/v1/completions", "version": "1.1"}
    request = frontend_context("cd" * 16, "mine", TRACE, "vendor=1", sampled=True, facts=facts)
    with bound(request):
        entry = json.loads(line(JsonLines("frontend"), cause="gone"))
        readable = line(Readable("frontend"))
    assert {
        name: entry[name] for name in ("x_request_id", "x_dynamo_request_id", "trace_id", "span_id", "parent_id")
    } == {
        "x_request_id": "mine",
        "x_dynamo_request_id": "cd" * 16,
        "trace_id": request.trace_id,
        "span_id": request.span_id,
        "parent_id": "b7ad6b7169203331",
    }
    assert entry["span_name"] == "http-request"
    assert entry["tracestate"] == "vendor=1"
    assert (entry["method"], entry["uri"], entry["version"], entry["cause"]) == (
        "POST",
        "/v1/completions",
        "1.1",
        "gone",
    )
    assert f"request={'cd' * 16} label=mine trace={request.trace_id} span={request.span_id}" in readable
    assert "x_request_id" not in json.loads(line(JsonLines("frontend")))
    assert "request=" not in line(Readable("frontend"))


async def test_tasks_of_a_request_inherit_its_ids_and_others_do_not() -> None:
    async def of(label: str) -> list[str]:
        context.enter(frontend_context("ef" * 16, label, "", "", sampled=False))
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(look()) for _ in range(2)]
        return [task.result() for task in tasks]

    async def look() -> str:
        await asyncio.sleep(0)
        found = current()
        return found.label if found else ""

    one, other = await asyncio.gather(asyncio.create_task(of("one")), asyncio.create_task(of("other")))
    assert (one, other) == (["one", "one"], ["other", "other"])
    assert current() is None


@pytest.mark.parametrize("wanted", [True, False])
def test_span_events_say_when_and_how_long(wanted: bool) -> None:
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(JsonLines(""))
    logger = logging.getLogger("holdfast.telemetry.context")
    logger.addHandler(handler)
    level, before = logger.level, SPAN_EVENTS.on
    logger.setLevel(logging.INFO)
    SPAN_EVENTS.on = wanted
    try:
        with bound(frontend_context("ef" * 16, "x", "", "", sampled=False)):
            context.opened()
            context.closed(0.5, 0.125)
    finally:
        SPAN_EVENTS.on = before
        logger.removeHandler(handler)
        logger.setLevel(level)
    entries = [json.loads(one) for one in stream.getvalue().splitlines()]
    assert [entry["message"] for entry in entries] == (["SPAN_FIRST_ENTRY", "SPAN_CLOSED"] if wanted else [])
    if wanted:
        times = {name: entries[1][f"time.{name}_us"] for name in ("busy", "idle", "duration")}
        assert times == {"busy": 125_000, "idle": 375_000, "duration": 500_000}
