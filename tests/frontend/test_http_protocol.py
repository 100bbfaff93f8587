"""What rude, slow and old HTTP clients get, over real sockets."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json

import pytest

from holdfast.frontend import http_protocol
from holdfast.requests.config import RequestSettings
from tests.frontend.support import CHAT, Stack, chat, request_bytes, stack, until
from tests.patience import within

pytestmark = pytest.mark.asyncio(loop_scope="module")
LIVE = request_bytes("GET", "/live")


def connections(one: Stack) -> int:
    return len(one.server.server_state.connections)


def hold_all(one: Stack) -> list[object]:
    """Return the timers that connections hold."""
    return [t for c in one.server.server_state.connections for t in (c._timer, c.timeout_keep_alive_task) if t]


# clocks


@pytest.mark.parametrize("sent", [b"", b"\r\n", b"G", b"GET /live HTTP/1.1\r\nhost:", LIVE[:-2]])
async def test_no_complete_head(sent: bytes) -> None:
    async with stack(0, http_head_timeout=0.2) as one, one.client() as client:
        client.send(sent)
        got = await client.closed()
        if sent.strip():
            assert got.startswith(b"HTTP/1.1 408 Request Timeout\r\n")
            assert json.loads(got.partition(b"\r\n\r\n")[2])["error"]["code"] == "request_timeout"
            assert b"DYN_HTTP_HEAD_TIMEOUT_SECS" in got
        else:
            assert got == b""
        client.writer.close()
        await until(lambda: connections(one) == 0)


async def test_trickling_head_does_not_win_time() -> None:
    async with stack(0, http_head_timeout=0.3) as one, one.client() as client:
        started = asyncio.get_running_loop().time()
        with contextlib.suppress(ConnectionError):
            for byte in LIVE:
                client.writer.write(bytes([byte]))
                await client.writer.drain()
                await asyncio.sleep(0.03)
                if client.reader.at_eof() or connections(one) == 0:
                    break
        assert b" 408 " in await client.closed()
        assert asyncio.get_running_loop().time() - started < within(2)


@pytest.mark.parametrize(
    "sent",
    [request_bytes("POST", CHAT, chat())[:-3], request_bytes("POST", CHAT, b"")[:-2] + b"content-length: 9\r\n\r\n"],
)
async def test_body_that_pauses(sent: bytes) -> None:
    async with stack(0, http_body_timeout=0.2) as one, one.client() as client:
        client.send(sent.replace(b"content-length: 0\r\n", b""))
        got = await client.closed()
        assert got.startswith(b"HTTP/1.1 408 ")
        assert b"DYN_HTTP_BODY_TIMEOUT_SECS" in got
        client.writer.close()
        await until(lambda: connections(one) == 0)
        assert one.count("dynamo_frontend_requests_total") == one.count(
            "dynamo_frontend_requests_total", error_type="cancelled"
        )


async def test_trickling_body(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every pause is short enough and the whole is too slow."""
    async with stack(0, http_body_timeout=0.2) as one, one.client() as client:
        client.send(request_bytes("POST", CHAT, b"x" * 100_000)[:200])
        async with asyncio.timeout(5):
            with contextlib.suppress(ConnectionError):
                while not client.reader.at_eof():
                    client.writer.write(b"x")
                    await client.writer.drain()
                    await asyncio.sleep(0.02)
                    if connections(one) == 0 or client.reader._buffer:
                        break
        assert b" 408 " in await client.closed()


async def test_steady_body_may_take_longer_than_the_bound() -> None:
    async with stack(1, http_body_timeout=0.3) as one, one.client() as client:
        whole = request_bytes("POST", CHAT, chat("x" * 20_000))
        for at in range(0, len(whole), 2_000):
            client.send(whole[at : at + 2_000])
            await asyncio.sleep(0.06)
        assert (await client.answer()).status == 200


async def test_idle_connection() -> None:
    async with stack(0, http_keep_alive=0.2) as one, one.client() as client:
        client.send(LIVE)
        assert (await client.answer()).status == 200
        assert await client.closed(2) == b""
        assert connections(one) == 0


async def test_stray_line_ends_do_not_stop_the_idle_clock() -> None:
    async with stack(0, http_keep_alive=0.2) as one, one.client() as client:
        client.send(LIVE)
        await client.answer()
        client.send(b"\r\n")
        assert await client.closed(2) == b""


async def test_half_a_head_after_an_answer() -> None:
    async with stack(0, http_head_timeout=0.2) as one, one.client() as client:
        client.send(LIVE + LIVE[:9])
        assert (await client.answer()).status == 200
        assert b" 408 " in await client.closed(2)


async def test_no_clock_outlives_its_connection() -> None:
    async with stack(0) as one, one.client() as client:
        client.send(LIVE)
        await client.answer()
        held = hold_all(one)
        assert held
        client.reset()
        await until(lambda: connections(one) == 0)
        assert all(timer.cancelled() for timer in held)


# numbers


async def test_too_many_connections() -> None:
    async with stack(0, http_max_connections=3) as one, contextlib.AsyncExitStack() as clients:
        for _ in range(3):
            client = await clients.enter_async_context(one.client())
            client.send(LIVE)
            assert (await client.answer()).status == 200
        late = await clients.enter_async_context(one.client())
        late.send(request_bytes("POST", CHAT, b"x" * 1_000_000))
        got = await late.answer()
        assert got.status == 503
        assert got.headers["retry-after"] == "2"
        assert got.headers["connection"] == "close"
        assert "DYN_HTTP_MAX_CONNECTIONS" in got.error["message"]
        client.writer.close()
        await until(lambda: connections(one) <= 3)
        again = await clients.enter_async_context(one.client())
        again.send(LIVE)
        assert (await again.answer()).status == 200


async def test_flood_of_half_heads_is_gone_after_the_bound() -> None:
    async with stack(0, http_head_timeout=0.5, http_max_connections=300) as one, contextlib.AsyncExitStack() as clients:
        flood = [await clients.enter_async_context(one.client()) for _ in range(400)]
        for client in flood:
            client.send(b"POST /v1/chat/completions HTTP/1.1\r\nx: y")
        await until(lambda: connections(one) <= 400)
        await asyncio.gather(*(client.closed() for client in flood))
        for client in flood:
            client.writer.close()
        await until(lambda: connections(one) == 0)
        bounds = one.server.config.http_protocol_class.bounds
        assert bounds.lingering == 0
        async with one.client() as client:
            client.send(LIVE)
            assert (await client.answer()).status == 200


async def test_huge_head() -> None:
    async with stack(0) as one, one.client() as client:
        client.send(b"GET /live HTTP/1.1\r\nhost: x\r\n")
        with contextlib.suppress(ConnectionError):
            for number in range(40):
                client.send(b"x-%d: " % number + b"y" * 10_000 + b"\r\n")
                await client.writer.drain()
        got = await client.closed()
        assert got.startswith(b"HTTP/1.1 431 ")


async def test_endless_trailer() -> None:
    async with stack(0) as one, one.client() as client:
        client.send(b"POST %b HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n0\r\n" % CHAT.encode())
        with contextlib.suppress(ConnectionError):
            for number in range(200):
                client.send(b"x-%d: " % number + b"y" * 10_000 + b"\r\n")
                await client.writer.drain()
        got = await client.closed()
        assert got.startswith(b"HTTP/1.1 400 ")
        await until(lambda: connections(one) == 0)


async def test_pipeline_is_answered_in_order_and_bounded() -> None:
    async with stack(1) as one, one.client() as client:
        client.send(b"".join(request_bytes("POST", CHAT, chat(f"[[mock:say {n}]]")) for n in range(8)))
        for n in range(8):
            assert (await client.answer()).json()["choices"][0]["message"]["content"] == str(n)
        client.send(LIVE * 600)
        await client.closed()
        await until(lambda: connections(one) == 0)


async def test_waiting_in_a_pipeline_is_not_charged(monkeypatch: pytest.MonkeyPatch) -> None:
    """A request behind a long answer waits for us, not we for it; its clock starts afterwards."""
    async with stack(1, http_body_timeout=0.2, http_head_timeout=0.2) as one, one.client() as client:
        later = request_bytes("POST", CHAT, chat("[[mock:say later]]"))
        client.send(
            request_bytes("POST", CHAT, chat("[[mock:prefill 0.8]][[mock:say first]]", stream=True)) + later[:-9]
        )
        first = await client.answer()
        assert first.status == 200
        assert first.events[-1] is None
        client.send(later[-9:])
        assert (await client.answer()).json()["choices"][0]["message"]["content"] == "later"


async def test_half_a_head_behind_a_running_answer_does_not_cut_it() -> None:
    async with stack(1, http_head_timeout=0.2) as one, one.client() as client:
        client.send(request_bytes("POST", CHAT, chat("[[mock:prefill 0.6]][[mock:say first]]", stream=True)) + LIVE[:9])
        first = await client.answer()
        assert first.events[-1] is None
        assert await client.closed(2) == b""


async def test_garbage_behind_a_running_answer_never_gets_into_it() -> None:
    async with stack(1) as one, one.client() as client:
        client.send(request_bytes("POST", CHAT, chat("[[mock:prefill 0.3]][[mock:say first]]", stream=True)))
        await until(lambda: one.frontend.generate.active)
        client.send(b"\x16\x03\x01 garbage\r\n\r\n")
        assert b"400" not in await client.closed()
        await one.at_rest()


# forms


@pytest.mark.parametrize(
    "sent",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"hello\r\n\r\n",
        b"GET  HTTP/1.1\r\n\r\n",
        b"GET /\xff HTTP/1.1\r\nhost: x\r\n\r\n",
        b"CONNECT example.org:443 HTTP/1.1\r\nhost: x\r\n\r\n",
        b"POST /v1/chat/completions HTTP/1.1\r\ncontent-length: 3\r\ntransfer-encoding: chunked\r\n\r\n",
        b"POST /v1/chat/completions HTTP/1.1\r\ncontent-length: -3\r\n\r\n",
        b"GET /live HTTP/1.1\r\nbad header\r\n\r\n",
    ],
)
async def test_not_http(shared: Stack, sent: bytes) -> None:
    async with shared.client() as client:
        client.send(sent)
        got = await client.answer()
        assert got.status == 400
        assert got.error["code"] == "invalid_http"
        assert got.error["type"] == "invalid_request_error"
        assert await client.closed() == b""


async def test_old_clients_get_no_chunks(one: Stack) -> None:
    async with one.client() as client:
        client.send(request_bytes("POST", CHAT, chat("[[mock:say hello]]", stream=True), version="1.0"))
        status, headers = await client.head()
        body = await client.reader.read()
        assert status == 200
        assert headers["connection"] == "close"
        assert "transfer-encoding" not in headers
        assert body.startswith(b"data: {")
        assert body.endswith(b"data: [DONE]\n\n")
    async with one.client() as client:
        client.send(request_bytes("POST", CHAT, chat("[[mock:say hello]]"), version="1.0"))
        got = await client.answer()
        assert got.json()["choices"][0]["message"]["content"] == "hello"
        assert await client.closed() == b""


async def test_connection_close(one: Stack) -> None:
    for stream in (True, False):
        async with one.client() as client:
            client.request("POST", CHAT, chat(stream=stream), connection="close")
            got = await client.answer()
            assert got.headers["connection"] == "close"
            assert await client.closed() == b""


@pytest.mark.parametrize("stream", [True, False])
async def test_reused_connection(one: Stack, stream: bool) -> None:
    async with one.client() as client:
        for n in range(5):
            client.request("POST", CHAT, chat(f"[[mock:say {n}]]", stream=stream))
            got = await client.answer()
            assert got.status == 200
            assert b'"%d"' % n in got.body


async def test_chunked_request_body(one: Stack) -> None:
    body = json.dumps(chat("[[mock:say hello]]")).encode()
    for size in (1, 7, 10_000):
        parts = [body[i : i + size] for i in range(0, len(body), size)]
        chunks = b"".join(b"%x;ext=1\r\n%b\r\n" % (len(p), p) for p in parts) + b"0\r\ntrailer: x\r\n\r\n"
        async with one.client() as client:
            client.send(b"POST %b HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n" % CHAT.encode())
            client.send(chunks)
            assert (await client.answer()).json()["choices"][0]["message"]["content"] == "hello"


async def test_split_at_every_byte(one: Stack) -> None:
    whole = request_bytes("POST", CHAT, chat("[[mock:say hello]]"))
    async with one.client() as client:
        for at in range(1, len(whole), 3):
            client.send(whole[:at])
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            client.send(whole[at:])
            assert (await client.answer()).json()["choices"][0]["message"]["content"] == "hello"


async def test_expect_100_continue(one: Stack) -> None:
    whole = request_bytes("POST", CHAT, chat("[[mock:say hello]]"), expect="100-continue")
    head, _, body = whole.partition(b"\r\n\r\n")
    async with one.client() as client:
        client.send(head + b"\r\n\r\n")
        assert await client.reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
        client.send(body)
        assert (await client.answer()).json()["choices"][0]["message"]["content"] == "hello"


async def test_declared_oversize_is_refused_before_it_is_sent() -> None:
    async with stack(0, http_body_limit_mb=1) as one:
        async with one.client() as client:
            client.send(b"POST %b HTTP/1.1\r\nexpect: 100-continue\r\ncontent-length: 9000000\r\n\r\n" % CHAT.encode())
            got = await client.answer()
            assert got.status == 413
            assert got.error["code"] == "payload_too_large"
            assert "DYN_HTTP_BODY_LIMIT_MB" in got.error["message"]
        async with one.client() as client:
            client.request("POST", CHAT, b"x" * 9_000_000)
            assert (await client.answer()).status == 413
            client.request("GET", "/live")
            assert (await client.answer()).status == 200
        async with one.client() as client:
            client.send(b"POST %b HTTP/1.1\r\ntransfer-encoding: chunked\r\n\r\n" % CHAT.encode())
            for _ in range(200):
                client.send(b"2710\r\n" + b"x" * 10_000 + b"\r\n")
            assert (await client.answer()).status == 413


async def test_rest_of_a_refused_body_is_not_read_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_protocol, "LINGER", 0.1)
    async with stack(0, http_body_limit_mb=1) as one, one.client() as client:
        client.send(b"POST %b HTTP/1.1\r\ncontent-length: 900000000\r\n\r\n" % CHAT.encode())
        assert (await client.answer()).status == 413
        await client.closed(2)
        await until(lambda: connections(one) == 0)


@pytest.mark.parametrize("path", [CHAT, "/v1/completions"])
@pytest.mark.parametrize("method", ["GET", "HEAD", "PUT", "DELETE", "PATCH"])
async def test_wrong_method(one: Stack, path: str, method: str) -> None:
    async with one.client() as client:
        client.request(method, path)
        got = await client.answer(head=method == "HEAD")
        assert got.status == 405
        assert got.headers["allow"] == "POST, OPTIONS"
        assert got.headers["content-type"] == "application/json"
        if method != "HEAD":
            assert got.error["type"] == "invalid_request_error"
            assert method in got.error["message"]
        client.request("GET", "/live")
        assert (await client.answer()).status == 200


async def test_options_and_head(one: Stack) -> None:
    async with one.client() as client:
        client.request("OPTIONS", CHAT)
        got = await client.answer()
        assert got.status == 204
        assert got.headers["allow"] == "POST, OPTIONS"
        assert not any(name.startswith("access-control") for name in got.headers)
        client.request("HEAD", "/live")
        got = await client.answer(head=True)
        assert got.status == 200
        client.request("POST", "/v1/models", b"{}")
        got = await client.answer()
        assert got.status == 405
        assert "GET" in got.headers["allow"]
        client.request("GET", "/nothing/here")
        got = await client.answer()
        assert got.status == 404
        assert got.error["type"] == "not_found_error"


async def test_upgrade_to_http2_is_ignored(one: Stack) -> None:
    """What Java's client sends with its first request."""
    async with one.client() as client:
        for _ in range(2):
            client.request(
                "POST",
                CHAT,
                chat("[[mock:say hello]]"),
                connection="Upgrade, HTTP2-Settings",
                upgrade="h2c",
                HTTP2_Settings="AAEAAEAAAAIAAAABAAMAAABkAAQBAAAAAAUAAEAA",
            )
            assert (await client.answer()).json()["choices"][0]["message"]["content"] == "hello"


async def test_client_that_does_not_take_a_whole_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    """The answer was complete at once, so no stream is left that could notice."""
    async with stack(1, requests=RequestSettings(client_stall_timeout=0.3)) as one:
        body = request_bytes("POST", CHAT, chat("x", max_tokens=8000, logprobs=True, top_logprobs=20))
        async with one.client(receive_buffer=4096) as client:
            client.reader._transport.pause_reading()  # type: ignore[attr-defined]
            client.send(body.replace(b"host: test", b"host: test\r\nconnection: close"))
            await until(lambda: one.frontend.generate.active, 10)
            await one.at_rest()
            await until(lambda: connections(one) == 0, 5)


async def test_timers_of_many_requests_are_gone() -> None:
    async with stack(1) as one:
        for _ in range(3):
            async with one.client() as client:
                for stream in (True, False):
                    client.request("POST", CHAT, chat(stream=stream))
                    await client.answer()
        await until(lambda: connections(one) == 0)
        gc.collect()
        left = [
            o
            for o in gc.get_objects()
            if isinstance(o, http_protocol.HttpProtocol) and o.server_state is one.server.server_state
        ]
        assert len(left) <= 1
