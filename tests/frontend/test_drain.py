"""A frontend that leaves, over real sockets in this process: who is still served, who is told what, what is counted."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest

from holdfast.base.settings import InvalidSetting
from holdfast.engines.mock.config import MockConfig
from holdfast.frontend.drain import Drain
from holdfast.frontend.server import inherited, listen
from tests.frontend.support import CHAT, Stack, stack, until
from tests.patience import within

STEPS = MockConfig(step_ms=5.0)


def body(tokens: int, **more: Any) -> dict[str, Any]:
    return {"model": "mock", "messages": [{"role": "user", "content": "hello"}], "max_tokens": tokens, **more}


@contextlib.asynccontextmanager
async def draining(built: Stack) -> AsyncIterator[asyncio.Task[None]]:
    """The drain as a task; cancelled at the end if it still runs."""
    task = asyncio.ensure_future(Drain(built.frontend, built.server, built.config).run())
    try:
        await asyncio.sleep(0)
        yield task
    finally:
        task.cancel()
        await asyncio.wait([task])


async def test_a_kept_connection_gets_one_more_answer_and_a_new_one_none() -> None:
    async with stack(1, STEPS, http_graceful_shutdown_timeout_secs=10.0) as built:
        assert (await built.post(CHAT, body(3))).status_code == 200
        async with draining(built):
            held = await built.post(CHAT, body(3))
            assert (held.status_code, held.headers["connection"]) == (200, "close")
            late = await built.post(CHAT, body(3))
            assert (late.status_code, late.headers["connection"]) == (503, "close")
            assert float(late.headers["retry-after"]) > 0
            assert late.json()["error"]["details"]["knob"] == "shutdown"


async def test_balancers_may_look_away_before_anybody_is_turned_away() -> None:
    """Its health says that it leaves; until the notice is over new connections and kept ones are served as before."""
    config = {"http_drain_notice": 0.6, "http_graceful_shutdown_timeout_secs": 10.0}
    async with stack(1, STEPS, **config) as built, draining(built):
        health = await built.http.get("/health")
        assert (health.status_code, health.json()["stage"]) == (503, "draining")
        for _ in range(2):
            async with httpx.AsyncClient(base_url=built.http.base_url) as fresh:
                answer = await fresh.post(CHAT, json=body(3))
                assert (answer.status_code, answer.headers.get("connection")) == (200, None)
        async with asyncio.timeout(within(5)):
            while (await built.post(CHAT, body(1))).status_code != 503:
                pass


async def test_probes_tell_draining_from_dead() -> None:
    async with stack(1, STEPS, http_graceful_shutdown_timeout_secs=10.0) as built:
        health = await built.http.get("/health")
        assert (health.status_code, health.json()["stage"]) == (200, "serving")
        async with draining(built):
            health, live = await built.http.get("/health"), await built.http.get("/live")
            assert (health.status_code, health.json()["status"], health.json()["stage"]) == (
                503,
                "not_ready",
                "draining",
            )
            assert live.status_code == 200
            built.frontend.end_all()
            live = await built.http.get("/live")
            assert (live.status_code, live.json()["status"]) == (503, "shutting_down")


async def test_it_is_over_as_soon_as_nobody_is_there() -> None:
    async with stack(1, STEPS, http_graceful_shutdown_timeout_secs=60.0) as built:
        await built.http.aclose()
        await until(lambda: built.server.connections == 0)
        async with draining(built) as task:
            await asyncio.wait_for(task, 2.0)


async def test_idle_connections_are_closed_when_their_time_is_over() -> None:
    config = {"http_graceful_shutdown_timeout_secs": 60.0, "http_drain_keep_alive": 0.3}
    async with stack(1, STEPS, **config) as built:
        assert (await built.http.get("/live")).status_code == 200
        assert built.server.connections == 1
        async with draining(built) as task:
            await asyncio.wait_for(task, 3.0)
            await until(lambda: built.server.connections == 0)


async def test_running_answers_finish_within_the_grace() -> None:
    async with stack(1, STEPS, http_graceful_shutdown_timeout_secs=20.0) as built:
        asking = asyncio.ensure_future(built.post(CHAT, body(200)))
        await until(lambda: built.frontend.generate.active)
        async with draining(built) as task:
            assert (await asking).json()["usage"]["completion_tokens"] == 200
            await asyncio.wait_for(task, 3.0)
        assert built.count("dynamo_frontend_requests_total", status="success") == 1


@pytest.mark.parametrize("stream", [True, False])
async def test_what_the_grace_cuts_is_typed_and_counted_as_an_error(stream: bool) -> None:
    """Dynamo 1.6.1 counts such truncated streams as successes; some of them end with a bare [DONE]."""
    async with stack(1, STEPS, http_graceful_shutdown_timeout_secs=0.3) as built:
        asking = asyncio.ensure_future(built.post(CHAT, body(5000, stream=stream)))
        await until(lambda: built.frontend.generate.active)
        async with draining(built) as task:
            await asyncio.wait_for(task, 3.0)
        built.frontend.end_all()
        assert built.frontend.cut
        answer = await asking
        if stream:
            events = [line[6:] for line in answer.text.split("\n") if line.startswith("data: ")]
            error = json.loads(events[-2])["error"]
            assert events[-1] == "[DONE]"
        else:
            error = answer.json()["error"]
            assert answer.status_code == 503
            assert float(answer.headers["retry-after"]) > 0
        assert error["code"] == "shutting_down"
        await built.at_rest()
        await until(lambda: built.count("dynamo_frontend_requests_total") == 1)
        assert built.count("dynamo_frontend_requests_total", status="error", error_type="unavailable") == 1
        assert built.count("dynamo_frontend_model_rejection_total") == 0, "a worker had accepted it"


async def test_what_comes_through_a_shared_port_is_served_however_late_it_appears() -> None:
    """The kernel had given the connection to this frontend before it closed the shared listener."""
    async with stack(1, STEPS, http_graceful_shutdown_timeout_secs=10.0) as built:
        common = listen("127.0.0.1", 0)
        address = common.getsockname()
        await built.server.accept_on(common)
        async with httpx.AsyncClient(base_url=f"http://{address[0]}:{address[1]}") as client:
            assert (await client.get("/live")).status_code == 200
        with socket.create_connection(address) as early:
            async with draining(built):
                early.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n%b" % _raw())
                early.setblocking(False)
                head = await asyncio.wait_for(asyncio.get_running_loop().sock_recv(early, 4096), 5)
                assert head.startswith(b"HTTP/1.1 200"), head
                assert b"connection: close" in head
                with pytest.raises(OSError, match="refused"):
                    socket.create_connection(address, timeout=1)


def _raw() -> tuple[int, bytes]:
    content = json.dumps(body(3)).encode()
    return len(content), content


def test_two_frontends_may_bind_one_port() -> None:
    first = listen("127.0.0.1", 0, reuse_port=True)
    with first, listen("127.0.0.1", first.getsockname()[1], reuse_port=True):
        assert first.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN) == 0, "nobody accepts from it yet"


def test_an_inherited_socket_must_listen() -> None:
    with pytest.raises(InvalidSetting, match="DYN_HTTP_LISTEN_FD=987"):
        inherited(987)
    with pytest.raises(InvalidSetting):
        inherited(socket.socket().detach())
