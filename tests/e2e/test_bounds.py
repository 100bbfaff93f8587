"""What a frontend allows its clients: connections, heads, bodies, keys; signs of life while they wait."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

import openai
from tests.e2e.asking import exact
from tests.e2e.raw import connected, post, read_all, read_until, send
from tests.e2e.support import Cluster, cluster
from tests.e2e.truth import Ask
from tests.patience import within

pytestmark = [pytest.mark.e2e, pytest.mark.asyncio(loop_scope="module")]

CONNECTIONS = 60
LIMIT_MB = 24
KEY = "sk-end-to-end-0123456789"
HI = {"model": "mock", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 3}
SMALL_MS = float(os.environ.get("E2E_SMALL_REQUEST_MS", "100"))


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shared(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Cluster]:
    """Short bounds, few connections, keys, frequent comments."""
    root = tmp_path_factory.mktemp("bounds")
    keys = root / "keys"
    keys.touch(mode=0o600)
    keys.write_text(f"# keys\n{KEY}\n")
    env = {
        "DYN_HTTP_HEAD_TIMEOUT_SECS": "1",
        "DYN_HTTP_BODY_TIMEOUT_SECS": "1",
        "DYN_HTTP_KEEP_ALIVE_SECS": "1",
        "DYN_HTTP_MAX_CONNECTIONS": str(CONNECTIONS),
        "DYN_HTTP_BODY_LIMIT_MB": str(LIMIT_MB),
        "DYN_HTTP_SSE_KEEP_ALIVE_INTERVAL_MS": "200",
        "DYN_API_KEYS_FILE": str(keys),
    }
    async with cluster(root, env=env) as running:
        running.client.api_key = KEY
        yield running


def authorized(body: dict[str, object] | None = None, **headers: str) -> bytes:
    return post(body or HI, authorization=f"Bearer {KEY}", **headers)


@pytest.mark.parametrize("sent", [b"", b"POST /v1/chat", b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\n"])
async def test_half_a_head(mock: Cluster, sent: bytes) -> None:
    async with connected(mock.port) as sock:
        await send(sock, sent)
        answer = await read_all(sock, 3.0)
    assert answer == b"" or b" 408 " in answer


async def test_half_a_body(mock: Cluster) -> None:
    async with connected(mock.port) as sock:
        await send(sock, authorized()[:-10])
        answer = await read_all(sock, 3.0)
    assert answer == b"" or b" 408 " in answer
    await mock.at_rest()


async def test_a_body_that_trickles_is_taken(mock: Cluster) -> None:
    """Slow is not dead: pauses are bounded, not the whole."""
    async with connected(mock.port) as sock:
        data = authorized(HI, connection="close")
        for at in range(0, len(data), 40):
            await send(sock, data[at : at + 40])
            await asyncio.sleep(0.3)
        answer = await read_all(sock, 5.0)
    assert b" 200 OK" in answer


async def test_idle_connection_after_a_request(mock: Cluster) -> None:
    async with connected(mock.port) as sock:
        await send(sock, authorized())
        await read_until(sock, b"}", 5)
        assert b"HTTP/1.1 " not in await read_all(sock, 4.0)


async def test_long_streams_outlive_these_bounds(mock: Cluster) -> None:
    await exact(mock, Ask(content="long", max_tokens=500))


async def test_number_of_connections(mock: Cluster) -> None:
    """Over the limit: a 503 that says so; room again when they leave."""
    async with contextlib.AsyncExitStack() as stack:
        socks = [await stack.enter_async_context(connected(mock.port)) for _ in range(CONNECTIONS + 5)]
        answer = await read_all(socks[-1], 3.0)
    assert answer.startswith(b"HTTP/1.1 503 ")
    error = json.loads(answer.partition(b"\r\n\r\n")[2])["error"]
    knob = {"layer": "frontend", "knob": "DYN_HTTP_MAX_CONNECTIONS", "threshold": CONNECTIONS}
    assert knob.items() <= error["details"].items()
    assert b"\r\nretry-after: " in answer

    async def room() -> bool:
        with contextlib.suppress(openai.APIError):
            await exact(mock, Ask(content="room", max_tokens=2))
            return True
        return False

    await mock.until(room, 5)


@pytest.mark.parametrize("declared", [True, False], ids=["declared", "chunked"])
async def test_oversize_body(mock: Cluster, declared: bool) -> None:
    async with connected(mock.port) as sock:
        head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {KEY}\r\nconnection: close\r\n"
        if declared:
            await send(sock, f"{head}content-length: {(LIMIT_MB + 1) << 20}\r\n\r\n".encode())
        else:
            await send(sock, f"{head}transfer-encoding: chunked\r\n\r\n".encode())
            part = b"100000\r\n" + b" " * (1 << 20) + b"\r\n"
            with contextlib.suppress(ConnectionError):
                for _ in range(LIMIT_MB + 2):
                    await send(sock, part)
        answer = await read_until(sock, b"}}", 5)
    assert answer.startswith(b"HTTP/1.1 413 ")
    error = json.loads(answer.partition(b"\r\n\r\n")[2])["error"]
    assert error["code"] == "payload_too_large"
    assert str(LIMIT_MB << 20) in error["message"]


@pytest.mark.parametrize("directive", ["prefill 1", "compile 1"])
async def test_comments_while_in_prefill(mock: Cluster, directive: str) -> None:
    """Signs of life before the first token; the client that knows nothing of them gets the exact answer."""
    ask = Ask(content=f"[[mock:{directive}]] alive?", max_tokens=5)
    async with connected(mock.port) as sock:
        await send(sock, authorized({**ask.body(), "stream": True}))
        raw = await read_until(sock, b"[DONE]", 10)
    assert raw.split(b'"content":" ')[0].count(b": keep-alive\n\n") >= 3
    await exact(mock, ask)


async def test_comments_while_queued_and_moving(mock: Cluster) -> None:
    """Also before any worker has accepted: then the comment starts the response."""
    instances = list(await mock.instances())
    async with contextlib.AsyncExitStack() as stack:
        for instance in instances:
            await stack.enter_async_context(mock.frozen(instance))
        sock = await stack.enter_async_context(connected(mock.port))
        await send(sock, authorized({**HI, "stream": True}))
        raw = await read_until(sock, b": keep-alive\n\n", 5)
        assert b" 200 OK" in raw
        await stack.aclose()
    await mock.usable()


@pytest.mark.parametrize("key", ["", "sk-wrong"])
async def test_keys(mock: Cluster, key: str) -> None:
    headers = {"authorization": f"Bearer {key}"} if key else {}
    got = await mock.http.post("/v1/chat/completions", json=HI, headers=headers)
    assert got.status_code == 401
    assert got.json()["error"]["code"] == "invalid_api_key"
    with pytest.raises(openai.AuthenticationError):
        await mock.client.with_options(api_key="sk-wrong").chat.completions.create(**HI)  # type: ignore[call-overload]


async def _beside_large_prompts(mock: Cluster) -> float:
    """Return the slowest of small requests sent while two prompts of 20 MB are being worked on, in seconds."""
    loop = asyncio.get_running_loop()
    text = "a lighthouse in the storm, and " * (20 * (1 << 20) // 31)
    body = json.dumps({"model": "mock", "messages": [{"role": "user", "content": text}], "max_tokens": 3}).encode()
    headers = {"authorization": f"Bearer {KEY}", "content-type": "application/json"}
    large = [
        asyncio.ensure_future(mock.http.post("/v1/chat/completions", content=body, headers=headers)) for _ in range(2)
    ]
    slowest = 0.0
    small = 0
    while not all(task.done() for task in large):
        began = loop.time()
        answer = await mock.http.post("/v1/chat/completions", json=HI, headers=headers)
        assert answer.status_code == 200
        slowest = max(slowest, loop.time() - began)
        small += 1
    assert small > 3
    for task in large:
        got = task.result()
        assert got.status_code == 400
        assert got.json()["error"]["code"] == "context_length_exceeded"
    return slowest


async def test_small_request_beside_two_of_20_mb(mock: Cluster) -> None:
    """Dynamo 1.2.1: 13.8 s. Here a bound for busy machines; the figure for the record is `slow`."""
    assert await _beside_large_prompts(mock) < within(1.5)


@pytest.mark.slow
async def test_figure_small_request_beside_two_of_20_mb(mock: Cluster) -> None:
    slowest = max([await _beside_large_prompts(mock) for _ in range(5)])
    print(f"small request beside two 20 MB prompts, slowest: {slowest * 1e3:.0f} ms")
    assert slowest * 1e3 <= SMALL_MS
