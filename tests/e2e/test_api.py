"""The OpenAI API, end to end, as the unmodified openai package and plain HTTP see it."""

from __future__ import annotations

import asyncio
import json
import re
import statistics
from typing import Any

import httpx
import jsonschema
import pytest

import openai
from tests.e2e.asking import exact, streaming, whole
from tests.e2e.support import Cluster
from tests.e2e.test_shapes import SCHEMA, WEATHER
from tests.e2e.truth import Ask
from tests.patience import within

pytestmark = [pytest.mark.e2e, pytest.mark.asyncio(loop_scope="module")]

HI = [{"role": "user", "content": "hi"}]


async def test_models(mock: Cluster) -> None:
    models = [model.id async for model in mock.client.models.list()]
    assert models == ["mock"]
    assert (await mock.client.models.retrieve("mock")).owned_by == "holdfast"
    with pytest.raises(openai.NotFoundError):
        await mock.client.models.retrieve("gpt-9")


@pytest.mark.parametrize("chat", [True, False], ids=["chat", "completions"])
@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
async def test_streaming_and_not(mock: Cluster, chat: bool, n: int, temperature: float) -> None:
    ask = Ask(content="hello there", n=n, chat=chat, temperature=temperature)
    streamed, complete = await asyncio.gather(exact(mock, ask), whole(mock, ask))
    assert streamed.text == complete.text
    if temperature and n > 1:
        assert len(set(streamed.text.values())) == n, "each choice has a seed of its own"


async def test_conversation_with_system_and_parts(mock: Cluster) -> None:
    """Messages of several roles and content parts: deterministic by seed, other prompts give other answers."""

    async def ask(last: str) -> Any:
        got = await mock.client.chat.completions.create(
            model="mock",
            messages=[
                {"role": "system", "content": "Be brief."},
                {"role": "user", "content": [{"type": "text", "text": "one"}, {"type": "text", "text": " two"}]},
                {"role": "assistant", "content": "three"},
                {"role": "user", "content": last},
            ],
            max_tokens=12,
            seed=1,
        )
        return got.choices[0].message.content

    assert await ask("four") == await ask("four")
    assert await ask("four") != await ask("five")


async def test_prompt_forms(mock: Cluster) -> None:
    """Text, ids, several prompts at once, echo."""
    create = mock.client.completions.create
    ids = Ask(content="hello", chat=False).prompt_ids()
    by_text = await create(model="mock", prompt="hello", max_tokens=8, seed=1)
    by_ids = await create(model="mock", prompt=ids, max_tokens=8, seed=1)
    assert by_text.choices[0].text == by_ids.choices[0].text
    many = await create(model="mock", prompt=["hello", "world"], max_tokens=8, seed=1, n=2)
    assert [choice.index for choice in many.choices] == [0, 1, 2, 3]
    assert many.choices[0].text == by_text.choices[0].text
    echoed = await create(model="mock", prompt="hello", max_tokens=8, seed=1, echo=True)
    assert echoed.choices[0].text == "hello" + by_text.choices[0].text


async def test_stop_strings(mock: Cluster) -> None:
    text, _, _ = Ask(content="stop").expected()
    for start in range(0, 60, 7):
        ask = Ask(content="stop", stop=("@@@", text[start : start + 9]))
        await exact(mock, ask)
        await whole(mock, ask)


async def test_logprobs(mock: Cluster) -> None:
    got = await mock.client.chat.completions.create(
        model="mock", messages=HI, max_tokens=6, logprobs=True, top_logprobs=4, seed=1
    )
    assert got.choices[0].logprobs is not None
    entries = got.choices[0].logprobs.content
    assert entries is not None
    assert "".join(entry.token for entry in entries) == got.choices[0].message.content
    assert len(entries) == 6
    for entry in entries:
        assert len(entry.top_logprobs) == 4
        assert entry.top_logprobs[0].logprob == entry.logprob <= 0
        assert bytes(entry.bytes or []).decode() == entry.token
    legacy = await mock.client.completions.create(model="mock", prompt="hi", max_tokens=6, logprobs=2, seed=1)
    assert legacy.choices[0].logprobs is not None
    assert len(legacy.choices[0].logprobs.tokens or []) == 6


async def test_json_modes(mock: Cluster) -> None:
    free = await mock.client.chat.completions.create(
        model="mock", messages=HI, max_tokens=300, response_format={"type": "json_object"}
    )
    assert isinstance(json.loads(free.choices[0].message.content or ""), dict)
    form: Any = {"type": "json_schema", "json_schema": {"name": "person", "schema": SCHEMA, "strict": True}}
    bound = await mock.client.chat.completions.create(model="mock", messages=HI, max_tokens=300, response_format=form)
    jsonschema.validate(json.loads(bound.choices[0].message.content or ""), SCHEMA)


async def test_tools_and_their_results(mock: Cluster) -> None:
    ask = '[[mock:call weather {"city": "Kiel"}]] weather?'
    messages: list[Any] = [{"role": "user", "content": ask}]
    first = await mock.client.chat.completions.create(
        model="mock",
        messages=messages,
        max_tokens=100,
        tools=[WEATHER],  # type: ignore[list-item]
    )
    assert first.choices[0].finish_reason == "tool_calls"
    calls = first.choices[0].message.tool_calls or []
    assert [(c.function.name, json.loads(c.function.arguments)) for c in calls] == [("weather", {"city": "Kiel"})]  # type: ignore[union-attr]
    messages += [
        first.choices[0].message.model_dump(exclude_none=True, exclude={"annotations"}),
        {"role": "tool", "tool_call_id": calls[0].id, "content": "stormy"},
    ]
    second = await mock.client.chat.completions.create(
        model="mock",
        messages=messages,
        max_tokens=10,
        tools=[WEATHER],  # type: ignore[list-item]
    )
    assert second.choices[0].message.content
    assert second.choices[0].finish_reason == "length"


@pytest.mark.parametrize(
    ("change", "status", "word"),
    [
        ({"model": "gpt-9"}, 404, "gpt-9"),
        ({"messages": "hi"}, 400, "messages"),
        ({"messages": []}, 400, "messages"),
        ({"max_tokens": -1}, 400, "max_tokens"),
        ({"max_tokens": 10_000_000}, 400, "context length"),
        ({"temperature": "hot"}, 400, "temperature"),
        ({"temperature": 9}, 400, "temperature"),
        ({"n": 0}, 400, "n"),
        ({"top_logprobs": 99, "logprobs": True}, 400, "top_logprobs"),
        ({"stop": ["x"] * 99}, 400, "stop"),
        ({"response_format": {"type": "yaml"}}, 400, "response_format"),
        ({"tools": [{"type": "function"}]}, 400, "tools"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
async def test_mistakes(mock: Cluster, change: dict[str, Any], status: int, word: str, stream: bool) -> None:
    """Also when streaming, a mistake has its HTTP status: nothing is sent before a worker has accepted."""
    body = {"model": "mock", "messages": HI, "max_tokens": 5, "stream": stream, **change}
    got = await mock.http.post("/v1/chat/completions", json=body)
    assert got.status_code == status
    error = got.json()["error"]
    assert word in error["message"]
    assert {"message", "type", "param", "code"} <= set(error)
    assert got.headers["content-type"] == "application/json"


async def test_malformed_bodies_and_routes(mock: Cluster) -> None:
    post = mock.http.post
    for content in (b"", b"{", b"[]", b"\xff\xfe", b'{"model":' + b"[" * 100_000):
        got = await post("/v1/chat/completions", content=content)
        assert got.status_code == 400, content[:20]
        assert got.json()["error"]["type"] == "invalid_request_error"
    assert (await mock.http.get("/v1/nothing")).status_code == 404
    assert (await mock.http.get("/v1/chat/completions")).status_code in (404, 405)
    assert (await post("/health")).status_code in (404, 405)


async def test_prompt_over_the_context_length(mock: Cluster) -> None:
    with pytest.raises(openai.BadRequestError) as error:
        await mock.client.chat.completions.create(
            model="mock", messages=[{"role": "user", "content": "word " * 40_000}], stream=True
        )
    assert error.value.code == "context_length_exceeded"
    assert "32768" in str(error.value)


async def test_error_in_mid_stream_makes_the_client_raise(mock: Cluster) -> None:
    """Four failures are over the migration limit of three: text up to there, then an error event."""
    directives = "".join(f"[[mock:error-after {at}]]" for at in (19, 15, 11, 7))
    async with streaming(mock, Ask(content=f"{directives} fail")) as live:
        with pytest.raises(openai.APIError) as error:
            await live.done()
    assert error.value.code == "migration_exhausted"
    true, _, _ = Ask(content=f"{directives} fail").expected()
    assert true.startswith(live.answer.text[0])
    assert live.answer.times
    assert not live.answer.finish


async def test_error_before_the_first_token_has_a_status(mock: Cluster) -> None:
    with pytest.raises(openai.APIStatusError) as error:
        await mock.client.chat.completions.create(
            **Ask(content="[[mock:refuse 1000]] nobody").body(),
            stream=True,
            extra_headers={"x-holdfast-timeout-ms": "2000"},
        )
    assert error.value.status_code in (503, 504)
    assert error.value.response.headers.get("retry-after")


async def test_headers(mock: Cluster) -> None:
    body = {"model": "mock", "messages": HI, "max_tokens": 3}
    for stream in (False, True):
        got = await mock.http.post(
            "/v1/chat/completions", json={**body, "stream": stream}, headers={"x-request-id": "me"}
        )
        assert got.headers["x-request-id"] == "me"
        assert got.headers["x-holdfast-worker"] in await mock.instances()
        if stream:
            assert got.headers["x-accel-buffering"] == "no"
            assert got.headers["cache-control"] == "no-cache"
            assert got.headers["content-type"].startswith("text/event-stream")
    wild = await mock.http.post("/v1/chat/completions", json=body, headers={"x-request-id": "a\tb" + "c" * 900})
    assert re.fullmatch(r"[ -~]{1,128}", wild.headers["x-request-id"])
    none = await mock.http.post("/v1/chat/completions", json=body)
    assert re.fullmatch(r"[0-9a-f]{32}", none.headers["x-request-id"])
    wrong = await mock.http.post("/v1/chat/completions", json={"model": "x"}, headers={"x-request-id": "me-too"})
    assert (wrong.status_code, wrong.headers["x-request-id"]) == (400, "me-too")


async def test_no_delay_on_reused_connections(mock: Cluster) -> None:
    """Dynamo 1.2.1 takes 44 ms for want of TCP_NODELAY. A step takes 5 ms here; the figure is the benchmark's."""
    loop = asyncio.get_running_loop()
    times = []
    async with httpx.AsyncClient(base_url=mock.url) as http:
        for _ in range(25):
            began = loop.time()
            await http.post("/v1/chat/completions", json={"model": "mock", "messages": HI, "max_tokens": 1})
            times.append(loop.time() - began)
    assert statistics.median(times) < within(0.030)


async def test_description(mock: Cluster) -> None:
    described = (await mock.http.get("/openapi.json")).json()
    assert {"/v1/chat/completions", "/v1/completions", "/v1/models"} <= set(described["paths"])
    assert (await mock.http.get("/docs")).headers["content-type"].startswith("text/html")
    assert (await mock.http.get("/live")).status_code == 200
    health = (await mock.http.get("/health")).json()
    assert health["status"] == "healthy"
    metrics = (await mock.http.get("/metrics")).text
    assert "dynamo_frontend_requests_total{" in metrics


async def test_curl(mock: Cluster) -> None:
    body = json.dumps({"model": "mock", "messages": HI, "max_tokens": 4, "stream": True})
    process = await asyncio.create_subprocess_exec(
        "curl", "-sN", f"{mock.url}/v1/chat/completions", "-H", "content-type: application/json", "-d", body,
        stdout=asyncio.subprocess.PIPE,
    )  # fmt: skip
    out, _ = await asyncio.wait_for(process.communicate(), 20)
    assert process.returncode == 0
    assert out.endswith(b"data: [DONE]\n\n")
