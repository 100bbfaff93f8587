"""What became of a request can be asked afterwards: who it was placed on and why, what failed, when tokens came."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import pytest

from holdfast.engines.mock.config import MockConfig
from holdfast.telemetry import context
from tests.frontend.support import stack, until

SECRET = "the colour of the harbour"


def body(content: str = SECRET, **more: Any) -> dict[str, Any]:
    return {"model": "mock", "messages": [{"role": "user", "content": content}], "max_tokens": 12, **more}


async def test_a_moved_request_tells_its_whole_story() -> None:
    async with stack(2) as built:
        answer = await built.post(
            "/v1/chat/completions", body(f"[[mock:abort-after 4]] {SECRET}"), x_request_id="my-label"
        )
        await built.at_rest()
        told = (await built.http.get("/debug/requests/my-label")).json()
        same = (await built.http.get(f"/debug/requests/{told['id']}")).json()
        listed = (await built.http.get("/debug/requests?moved=1")).json()["finished"]
        raw = (await built.http.get("/debug/requests/my-label")).text
    assert same["id"] == told["id"]
    assert [one["label"] for one in listed] == ["my-label"]
    assert (told["outcome"], told["tokens"], told["attempts"], told["error"]) == ("success", 12, 2, None)
    first, second = told["choices"][0]["attempts"]
    assert first["worker"] != second["worker"]
    assert first["candidates"] == 2
    assert {one["worker"] for one in first["considered"]} == {first["worker"], second["worker"]}
    assert [one["chosen"] for one in first["considered"] if one["worker"] == first["worker"]] == [True]
    assert first["failure"].startswith("stream_incomplete at token 4:")
    assert first["accepted_after"] <= first["first_token_after"] <= first["failed_after"]
    assert second["accepted_after"] >= 0
    assert "failure" not in second
    assert told["choices"][0]["join"] == "exact"
    rhythm = told["choices"][0]["rhythm"]
    assert rhythm["first_token_at"] <= rhythm["last_token_at"] <= told["seconds"]
    stages = told["stages"]
    assert [stage["stage"] for stage in stages][:4] == ["preprocess", "route", "dispatch", "prefill"]
    assert sum(stage["seconds"] for stage in stages) == pytest.approx(told["seconds"], abs=0.01)
    assert "harbour" not in raw
    assert answer.json()["choices"][0]["message"]["content"] not in raw


async def test_failed_slow_and_live_requests_can_be_found() -> None:
    async with stack(1, MockConfig(step_ms=5)) as built:
        await built.post("/v1/chat/completions", body(temperature="hot"), x_request_id="wrong")
        await built.post("/v1/chat/completions", body(), x_request_id="quick")
        slow = asyncio.ensure_future(
            built.post("/v1/chat/completions", body("[[mock:slow 10]] x"), x_request_id="slow")
        )
        await until(lambda: len(built.frontend.generate.active) == 1)
        live = (await built.http.get("/debug/requests/slow")).json()
        await slow
        await built.at_rest()
        failed = (await built.http.get("/debug/requests?failed=1")).json()["finished"]
        lasting = (await built.http.get("/debug/requests?slow=0.3")).json()["finished"]
        everything = (await built.http.get("/debug/requests?limit=2")).json()["finished"]
        story = (await built.http.get("/debug/requests/wrong")).json()
        unknown = await built.http.get("/debug/requests/never-seen")
        refused = await built.http.get("/debug/requests?slow=soon")
    assert live["outcome"] == "running"
    assert [one["label"] for one in failed] == ["wrong"]
    assert [one["label"] for one in lasting] == ["slow"]
    assert [one["label"] for one in everything] == ["slow", "quick"]
    assert story["error"]["code"] == "invalid_request"
    assert story["choices"] == []
    assert unknown.status_code == 404
    assert "never-seen" in unknown.json()["error"]["message"]
    assert refused.status_code == 400


async def test_a_workers_loss_belongs_to_the_story_of_its_requests() -> None:
    async with stack(2, MockConfig(step_ms=5)) as built:
        asking = asyncio.ensure_future(
            built.post("/v1/chat/completions", body("[[mock:slow 4]] x", max_tokens=40), x_request_id="moved")
        )
        await until(lambda: any(s.delivered for r in built.frontend.generate.active.values() for s in r.streams))
        worker = next(s.worker for r in built.frontend.generate.active.values() for s in r.streams)
        link = built.pool.worker(worker).link
        link._control._stream.abort()
        await asking
        await built.at_rest()
        told = (await built.http.get("/debug/requests/moved")).json()
    ejected = [change for change in told["workers"] if change["worker"] == worker and change["state"] == "ejected"]
    assert ejected
    assert ejected[0]["cause"] == "disconnected"
    assert worker in ejected[0]["evidence"]


async def test_every_log_line_of_a_request_carries_its_ids_and_none_its_text(caplog: pytest.LogCaptureFixture) -> None:
    seen: list[tuple[str, str, str]] = []

    class Note(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            request = context.current()
            ids = (request.label, request.trace_id) if request is not None else ("", "")
            seen.append((record.getMessage(), *ids))

    trace = "0af7651916cd43dd8448eb211c80319c"
    handler = Note()
    logging.getLogger("holdfast.requests").addHandler(handler)
    caplog.set_level(logging.DEBUG)
    try:
        async with stack(1) as built:
            headers = {"x-request-id": "tagged", "traceparent": f"00-{trace}-b7ad6b7169203331-01"}
            content = body(f"[[mock:error-after 3]] {SECRET}")
            await built.http.post("/v1/chat/completions", json=content, headers=headers)
            await built.at_rest()
    finally:
        logging.getLogger("holdfast.requests").removeHandler(handler)
    assert seen
    assert {(label, trace_id) for _, label, trace_id in seen} == {("tagged", trace)}
    assert "harbour" not in caplog.text


async def test_every_answer_names_its_trace() -> None:
    trace = "0af7651916cd43dd8448eb211c80319c"
    async with stack(1) as built:
        joined = {"traceparent": f"00-{trace}-b7ad6b7169203331-01"}
        for content, status in ((body("hi"), 200), (body("hi", stream=True), 200), ({"model": 7}, 400)):
            answer = await built.http.post("/v1/chat/completions", json=content, headers=joined)
            assert (answer.status_code, answer.headers["x-trace-id"]) == (status, trace)
        own = await built.http.post("/v1/chat/completions", json=body("hi"))
        assert len(own.headers["x-trace-id"]) == 32
        assert own.headers["x-trace-id"] != trace
        told = await built.http.get(f"/debug/requests/{own.headers['x-trace-id']}")
        assert told.status_code == 200, "without a trace of the client's it is the request's own id"
