"""What clients get: every shape of answer, streamed and whole, over real sockets and a real worker."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.frontend.support import CHAT, TEXT, Stack, chat, events_of, stack, text

pytestmark = pytest.mark.asyncio(loop_scope="module")

WEATHER = {
    "type": "function",
    "function": {"name": "weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}},
}
CALL = '[[mock:call weather {"city": "Kiel"}]]'


async def streamed(one: Stack, path: str, body: dict[str, Any]) -> list[Any]:
    got = await one.post(path, {**body, "stream": True})
    assert got.status_code == 200, got.text
    assert got.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert got.headers["x-accel-buffering"] == "no"
    assert got.headers["cache-control"] == "no-cache"
    events = events_of(got.content)
    assert events[-1] is None
    assert events.count(None) == 1
    return events[:-1]


async def whole(one: Stack, path: str, body: dict[str, Any]) -> dict[str, Any]:
    got = await one.post(path, body)
    assert got.status_code == 200, got.text
    assert got.headers["content-type"] == "application/json"
    return dict(got.json())


def joined(events: list[Any]) -> dict[int, dict[str, Any]]:
    """Put the chunks of each choice together; check that each ends exactly once, with its last chunk."""
    found: dict[int, dict[str, Any]] = {}
    for event in events:
        for part in event["choices"]:
            one = found.setdefault(
                part["index"], {"text": "", "reasoning": "", "calls": {}, "finish": None, "logprobs": []}
            )
            assert one["finish"] is None, "nothing after the end of a choice"
            delta = part.get("delta", {"content": part.get("text")})
            one["text"] += delta.get("content") or ""
            one["reasoning"] += delta.get("reasoning_content") or ""
            for call in delta.get("tool_calls", ()):
                known = one["calls"].setdefault(call["index"], {"name": "", "arguments": ""})
                known["name"] += call["function"].get("name", "")
                known["arguments"] += call["function"].get("arguments", "")
                assert call.get("id", "call_x").startswith("call_")
            if part.get("logprobs"):
                one["logprobs"].append(part["logprobs"])
            one["finish"] = part["finish_reason"]
    assert all(one["finish"] for one in found.values())
    return found


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("path", [CHAT, TEXT])
async def test_streamed_and_whole_agree(one: Stack, path: str, n: int) -> None:
    body = (chat if path == CHAT else text)("hello", n=n, max_tokens=30, temperature=1.0)
    parts = joined(await streamed(one, path, body))
    complete = await whole(one, path, body)
    texts = [c["message"]["content"] if path == CHAT else c["text"] for c in complete["choices"]]
    assert [parts[i]["text"] for i in range(n)] == texts
    assert len(set(texts)) == n
    assert [c["finish_reason"] for c in complete["choices"]] == ["length"] * n
    assert complete["usage"]["completion_tokens"] == 30 * n
    assert complete["object"] == ("chat.completion" if path == CHAT else "text_completion")
    assert complete["id"].startswith("chatcmpl-" if path == CHAT else "cmpl-")
    assert complete["holdfast"]["attempts"] == 1


async def test_role_comes_first_and_once(one: Stack) -> None:
    events = await streamed(one, CHAT, chat("x", n=2))
    roles = [(c["index"], "role" in c["delta"]) for e in events for c in e["choices"]]
    assert roles[:2] == [(0, True), (1, True)]
    assert not any(role for _, role in roles[2:])
    assert {e["id"] for e in events} == {events[0]["id"]}
    assert {e["created"] for e in events} == {events[0]["created"]}
    assert all("usage" not in e for e in events)


@pytest.mark.parametrize("path", [CHAT, TEXT])
async def test_include_usage(one: Stack, path: str) -> None:
    body = (chat if path == CHAT else text)("hello", n=2, stream_options={"include_usage": True})
    events = await streamed(one, path, body)
    assert all(e["usage"] is None for e in events[:-1])
    assert events[-1]["choices"] == []
    assert events[-1]["usage"]["completion_tokens"] == 16
    assert events[-1]["usage"] == {**(await whole(one, path, {**body, "stream_options": None}))["usage"]} | {
        "prompt_tokens_details": events[-1]["usage"]["prompt_tokens_details"]
    }


async def test_several_prompts_times_n(one: Stack) -> None:
    body = text(["one", "two two"], n=2, temperature=1.0, echo=True, max_tokens=5)
    complete = await whole(one, TEXT, body)
    assert [c["index"] for c in complete["choices"]] == [0, 1, 2, 3]
    starts = ["one", "one", "two two", "two two"]
    assert all(c["text"].startswith(start) for c, start in zip(complete["choices"], starts, strict=True))
    alone = [await whole(one, TEXT, text(p, max_tokens=5)) for p in ("one", "two two")]
    assert complete["usage"]["prompt_tokens"] == sum(a["usage"]["prompt_tokens"] for a in alone)
    assert complete["usage"]["completion_tokens"] == 20
    parts = joined(await streamed(one, TEXT, body))
    assert [parts[i]["text"] for i in range(4)] == [c["text"] for c in complete["choices"]]


@pytest.mark.parametrize("shown", [True, False])
async def test_stop_strings(one: Stack, shown: bool) -> None:
    body = chat("[[mock:say one two three four]]", stop=["three", "never"], max_tokens=50)
    if shown:
        body["include_stop_str_in_output"] = True
    wanted = "one two three" if shown else "one two "
    complete = await whole(one, CHAT, body)
    assert complete["choices"][0]["message"]["content"] == wanted
    assert complete["choices"][0]["finish_reason"] == "stop"
    assert joined(await streamed(one, CHAT, body))[0]["text"] == wanted


async def test_chat_logprobs(one: Stack) -> None:
    body = chat("x", logprobs=True, top_logprobs=3)
    complete = await whole(one, CHAT, body)
    entries = complete["choices"][0]["logprobs"]["content"]
    assert len(entries) == 8
    assert "".join(e["token"] for e in entries) == complete["choices"][0]["message"]["content"]
    assert all(len(e["top_logprobs"]) == 3 for e in entries)
    parts = joined(await streamed(one, CHAT, body))
    assert [e for part in parts[0]["logprobs"] for e in part["content"]] == entries
    plain = await whole(one, CHAT, chat("x"))
    assert plain["choices"][0]["logprobs"] is None


async def test_legacy_logprobs(one: Stack) -> None:
    body = text("x", logprobs=2)
    complete = await whole(one, TEXT, body)
    found = complete["choices"][0]["logprobs"]
    assert len(found["tokens"]) == len(found["token_logprobs"]) == len(found["text_offset"]) == 8
    assert found["text_offset"][0] == 0
    parts = joined(await streamed(one, TEXT, body))
    assert [t for p in parts[0]["logprobs"] for t in p["tokens"]] == found["tokens"]
    assert [t for p in parts[0]["logprobs"] for t in p["text_offset"]] == found["text_offset"]


async def test_tool_calls(one: Stack) -> None:
    body = chat(CALL, tools=[WEATHER], max_tokens=100)
    complete = await whole(one, CHAT, body)
    choice = complete["choices"][0]
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"]["content"] in (None, "")
    (call,) = choice["message"]["tool_calls"]
    assert call["type"] == "function"
    assert json.loads(call["function"]["arguments"]) == {"city": "Kiel"}
    parts = joined(await streamed(one, CHAT, body))[0]
    assert parts["finish"] == "tool_calls"
    assert parts["text"] == ""
    assert parts["calls"][0]["name"] == "weather"
    assert json.loads(parts["calls"][0]["arguments"]) == {"city": "Kiel"}


TWO = (
    '[[mock:say <tool_call>\\n{"name": "weather", "arguments": {"city": "Kiel"}}\\n</tool_call>\\n'
    '<tool_call>\\n{"name": "weather", "arguments": {"city": "Bonn"}}\\n</tool_call>]]'
)


@pytest.mark.parametrize("parallel", [True, False])
async def test_parallel_tool_calls(one: Stack, parallel: bool) -> None:
    body = chat(TWO, tools=[WEATHER], max_tokens=200, parallel_tool_calls=parallel)
    cities = ["Kiel", "Bonn"] if parallel else ["Kiel"]
    complete = await whole(one, CHAT, body)
    calls = complete["choices"][0]["message"]["tool_calls"]
    assert [json.loads(c["function"]["arguments"])["city"] for c in calls] == cities
    parts = joined(await streamed(one, CHAT, body))[0]
    assert [json.loads(c["arguments"])["city"] for c in parts["calls"].values()] == cities


async def test_no_tools_means_no_looking_for_calls(one: Stack) -> None:
    for more in ({}, {"tools": [WEATHER], "tool_choice": "none"}):
        complete = await whole(one, CHAT, chat(CALL, max_tokens=100, **more))
        assert complete["choices"][0]["finish_reason"] == "stop"
        assert "Kiel" in complete["choices"][0]["message"]["content"]
        assert not complete["choices"][0]["message"].get("tool_calls")


async def test_forced_tool_call(one: Stack) -> None:
    for choice in ("required", {"type": "function", "function": {"name": "weather"}}):
        complete = await whole(one, CHAT, chat("x", tools=[WEATHER], tool_choice=choice, max_tokens=300))
        (call,) = complete["choices"][0]["message"]["tool_calls"]
        assert call["function"]["name"] == "weather"
        json.loads(call["function"]["arguments"])


async def test_finish_reasons(one: Stack) -> None:
    assert (await whole(one, CHAT, chat("[[mock:say hi]]")))["choices"][0]["finish_reason"] == "stop"
    assert (await whole(one, CHAT, chat("[[mock:eos-after 3]]")))["choices"][0]["finish_reason"] == "stop"
    assert (await whole(one, CHAT, chat("x", max_tokens=3)))["choices"][0]["finish_reason"] == "length"


async def test_labels_and_traces(one: Stack) -> None:
    for stream in (True, False):
        got = await one.post(CHAT, chat(stream=stream), x_request_id="my-label")
        assert got.headers["x-request-id"] == "my-label"
        assert got.headers["x-holdfast-worker"] in one.workers
        own = await one.post(CHAT, chat(stream=stream))
        assert own.headers["x-request-id"]
        odd = await one.post(CHAT, chat(stream=stream), x_request_id="a" * 500)
        assert odd.headers["x-request-id"] == "a" * 128
    wrong = await one.post(CHAT, {"model": "mock"}, x_request_id="my-label")
    assert wrong.status_code == 400
    assert wrong.headers["x-request-id"] == "my-label"


async def test_label_cannot_add_headers(one: Stack) -> None:
    async with one.client() as client:
        body = json.dumps(chat()).encode()
        client.send(
            b"POST %b HTTP/1.1\r\nhost: x\r\nx-request-id: a\xff\x80\tb\r\ncontent-length: %d\r\n\r\n%b"
            % (CHAT.encode(), len(body), body)
        )
        got = await client.answer()
        assert got.status == 200
        assert got.headers["x-request-id"].isascii()


async def test_health_and_description(one: Stack) -> None:
    health = (await one.http.get("/health")).json()
    assert health["status"] == "healthy"
    assert health["message"]
    assert health["endpoints"] == sorted(health["endpoints"])
    assert "dyn://dynamo.backend.generate" in health["endpoints"]
    (instance,) = health["instances"]
    assert {"component", "endpoint", "instance_id", "namespace", "transport"} <= instance.keys()
    assert (await one.http.get("/live")).json() == {"status": "live", "message": "Service is live"}
    described = (await one.http.get("/openapi.json")).json()
    assert {CHAT, TEXT, "/v1/models", "/health", "/live", "/metrics"} <= described["paths"].keys()
    assert "html" in (await one.http.get("/docs")).text[:200].lower()


async def test_metrics_can_be_read(one: Stack) -> None:
    await one.post(CHAT, chat())
    got = await one.http.get("/metrics")
    assert got.headers["content-type"].startswith("text/plain")
    families = {f.name: f for f in text_string_to_metric_families(got.text)}
    assert "dynamo_frontend_requests" in families
    for family in families.values():
        series = [(s.name, tuple(sorted(s.labels.items()))) for s in family.samples]
        assert len(series) == len(set(series))
        assert family.documentation
    assert not any(s.value for s in families["dynamo_frontend_inflight_requests"].samples)


async def test_outcomes_are_counted_as_what_they_were() -> None:
    async with stack(1) as one:
        await one.post(CHAT, chat())
        await one.post(CHAT, {"model": "mock"})
        await one.post(CHAT, {**chat(), "model": "nothing"})
        async with one.client() as client:
            client.request("POST", CHAT, chat("[[mock:prefill 30]]"))
            await asyncio.sleep(0.05)
            client.reset()
        await one.at_rest()
        kinds = {
            s.labels["error_type"]: (s.labels["status"], s.value)
            for f in one.frontend.metrics.registry.collect()
            for s in f.samples
            if s.name == "dynamo_frontend_requests_total" and s.value
        }
        assert kinds == {
            "": ("success", 1),
            "validation": ("error", 1),
            "not_found": ("error", 1),
            "cancelled": ("error", 1),
        }
