"""Bodies: broken, hostile, and so large that they must not hold up anybody else."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from typing import Any

import pytest

from holdfast.base.errors import CapacityExhausted
from holdfast.frontend import offload
from holdfast.frontend.offload import Offload
from tests.frontend.support import CHAT, TEXT, Stack, chat, request_bytes, stack, text

pytestmark = pytest.mark.asyncio(loop_scope="module")


def deep(depth: int, opening: str = "[", closing: str = "]") -> str:
    return opening * depth + "1" + closing * depth


BAD: list[bytes] = [
    b"",
    b"null",
    b"[]",
    b"{",
    b'"text"',
    b"\xff\xfe",
    b'{"model": "mock", "messages": [{"role": "user", "content": "\xff"}]}',
    b'{"model": "mock", "messages": [{"role": "user", "content": "\\ud800"}]}',
    b"\x00" * 1000,
    b'{"model": 1, "messages": []}',
    b'{"model": "mock"}',
    b'{"model": "mock", "messages": {}}',
    b'{"model": "mock", "messages": [1]}',
    b'{"model": "mock", "messages": [{"role": "nobody", "content": "x"}]}',
    json.dumps(chat(max_tokens=-1)).encode(),
    json.dumps(chat(n=10**30)).encode(),
    json.dumps(chat(temperature=1e400)).replace("Infinity", "1e999").encode(),
    json.dumps(chat(stop=[1])).encode(),
    json.dumps(chat(stream="yes")).encode(),
    json.dumps(chat(tools="all")).encode(),
    json.dumps(chat(logit_bias={"x": 1})).encode(),
    b'{"model": "mock", "messages": ' + deep(100_000).encode() + b"}",
    b'{"model": "mock", "x": ' + deep(100_000, '{"a":', "}").encode() + b"}",
    b'{"model": "mock", "messages": [{"role": "user", "content": "x"}], "tools": ' + deep(100_000).encode() + b"}",
]


@pytest.mark.parametrize("path", [CHAT, TEXT])
@pytest.mark.parametrize("body", BAD, ids=range(len(BAD)))
async def test_bad_bodies(one: Stack, path: str, body: bytes) -> None:
    async with one.client() as client:
        client.send(request_bytes("POST", path, body))
        got = await client.answer()
        assert got.status == 400, got.body
        assert got.error["type"] == "invalid_request_error"
        assert got.error["message"]
        client.request("GET", "/live")
        assert (await client.answer()).status == 200


@pytest.mark.parametrize("depth", [50, 200, 400, 900, 2000])
async def test_deep_schemas_are_answered_somehow_but_never_a_fault(one: Stack, depth: int) -> None:
    nested: Any = {"type": "string"}
    for _ in range(min(depth, 400)):
        nested = {"type": "object", "properties": {"a": nested}}
    raw = json.dumps(nested)
    for _ in range(max(0, depth - 400)):
        raw = '{"type":"object","properties":{"a":' + raw + "}}"
    tools = '[{"type":"function","function":{"name":"f","parameters":' + raw + "}}]"
    for tool in (tools, "[]"):
        form = '{"type":"json_schema","json_schema":{"name":"x","schema":' + raw + "}}"
        extra = f',"tools":{tool}' if tool != "[]" else f',"response_format":{form}'
        body = json.dumps(chat("[[mock:say hi]]"))[:-1] + extra + "}"
        async with one.client() as client:
            client.send(request_bytes("POST", CHAT, body.encode()))
            got = await client.answer()
            assert got.status in (200, 400), got.body[:500]
            if got.status == 400:
                assert got.error["param"] or got.error["message"]


async def test_deep_unknown_and_free_fields(one: Stack) -> None:
    for key in ("metadata", "chat_template_args", "chat_template_kwargs", "nvext", "logit_bias", "whatever"):
        for depth in (300, 900, 5000):
            raw = '{"a":' * depth + "1" + "}" * depth
            body = json.dumps(chat("[[mock:say hi]]"))[:-1] + f',"{key}":{raw}' + "}"
            async with one.client() as client:
                client.send(request_bytes("POST", CHAT, body.encode()))
                got = await client.answer()
                assert got.status in (200, 400), (key, depth, got.body[:500])


async def test_prompts_over_the_context(one: Stack) -> None:
    for body in (chat("word " * 40_000), chat("word " * 20_000, max_tokens=30_000)):
        got = await one.post(CHAT, body)
        assert got.status_code == 400
        assert got.json()["error"]["code"] == "context_length_exceeded"
        assert "32768" in got.text
    got = await one.post(TEXT, text([1] * 40_000))
    assert got.status_code == 400


async def gap(one: Stack, seconds: float, body: bytes) -> tuple[float, float]:
    """Return the longest answer of a small request (s) and of the whole, beside two large bodies."""

    async def large() -> int:
        async with one.client() as client:
            client.send(body)
            return (await client.answer(60)).status

    longest = 0.0
    async with one.client() as client:
        both = asyncio.gather(large(), large())
        began = time.monotonic()
        while not both.done() and time.monotonic() - began < seconds:
            at = time.monotonic()
            client.request("POST", CHAT, chat("[[mock:say hi]]", max_tokens=2))
            assert (await client.answer()).status == 200
            longest = max(longest, time.monotonic() - at)
            await asyncio.sleep(0.002)
        assert await both == [400, 400]
    return longest, time.monotonic() - began


@pytest.mark.parametrize("path", [CHAT, TEXT])
async def test_small_request_beside_two_of_twenty_megabytes(path: str) -> None:
    """Bound: 100 ms on a quiet machine; here client, worker and frontend share one loop and the machine with others."""
    async with stack(1) as one:
        content = "The quick brown fox jumps over the lazy dog. " * 450_000
        body = request_bytes("POST", path, (chat if path == CHAT else text)(content))
        assert len(body) > 20_000_000
        longest, whole = await gap(one, 60, body)
        print(f"{path}: small request at most {longest * 1000:.0f} ms beside two of 20 MB ({whole:.1f} s)")
        assert longest < 1.0


async def test_offload_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offload, "WAITING", 3)
    pool = Offload()
    gate = threading.Event()
    try:
        jobs = [asyncio.ensure_future(pool.run(gate.wait, 10)) for _ in range(3)]
        await asyncio.sleep(0)
        with pytest.raises(CapacityExhausted) as caught:
            await pool.run(gate.wait, 10)
        assert caught.value.retry_after
        assert caught.value.details["threshold"] == 3
        gate.set()
        assert await asyncio.gather(*jobs) == [True] * 3
        assert await pool.run(lambda: 5) == 5
    finally:
        gate.set()
        pool.close()
