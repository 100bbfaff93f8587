"""The status server over real sockets: it answers whatever the event loop does, and nobody can block it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

from holdfast.base.errors import CannotConnect, Conflict, InvalidRequest
from holdfast.health import control as control_module
from holdfast.health import listener as listener_module
from holdfast.health import status as status_module
from holdfast.health.config import SystemConfig
from holdfast.health.readiness import Verdict
from holdfast.health.status import StatusServer
from tests.patience import within

READY = Verdict(True, {"generate": "ready"})


@contextlib.asynccontextmanager
async def serving(
    metrics: Callable[[], bytes] | None = None, more: Callable[[], dict[str, Any]] = dict, **config: Any
) -> AsyncIterator[StatusServer]:
    server = StatusServer(SystemConfig(**{"system_port": 0, **config}), metrics=metrics, more=more)
    server.start()
    try:
        yield server
    finally:
        server.close()


def raw(server: StatusServer, data: bytes, timeout: float = 5.0) -> bytes:
    host, port = server.address.rsplit(":", 1)
    with socket.create_connection((host, int(port)), timeout) as sock:
        sock.sendall(data)
        parts = []
        while part := sock.recv(65536):
            parts.append(part)
        return b"".join(parts)


def ask_now(server: StatusServer, path: str, method: str = "GET", body: bytes = b"", **headers: str) -> tuple[int, Any]:
    lines = [f"{method} {path} HTTP/1.1", "host: x", f"content-length: {len(body)}"]
    lines += [f"{name}: {value}" for name, value in headers.items()]
    head, _, content = raw(server, "\r\n".join(lines).encode() + b"\r\n\r\n" + body).partition(b"\r\n\r\n")
    kind = b"application/json" in head
    return int(head.split()[1]), json.loads(content) if kind and content else content


async def ask(server: StatusServer, path: str, method: str = "GET", body: bytes = b"", **headers: str) -> Any:
    return await asyncio.to_thread(ask_now, server, path, method, body, **headers)


async def test_the_documented_shape() -> None:
    async with serving(more=lambda: {"state": "ready"}) as server:
        server.post(READY, b'{"instance":"a"}')
        status, body = await ask(server, "/health?verbose=1")
        assert status == 200
        assert set(body) == {"status", "uptime", "endpoints", "reasons", "state"}
        assert (body["status"], body["endpoints"], body["reasons"]) == ("ready", {"generate": "ready"}, [])
        assert set(body["uptime"]) == {"secs", "nanos"}
        assert 0 <= body["uptime"]["nanos"] < 1e9
        server.post(Verdict(False, {"generate": "notready"}, ("endpoint generate: no token within 3 s",)))
        status, body = await ask(server, "/health")
        assert (status, body["status"], body["reasons"]) == (
            503,
            "notready",
            ["endpoint generate: no token within 3 s"],
        )
        assert (await ask(server, "/live"))[0] == 200
        assert await ask(server, "/metadata") == (200, {"instance": "a"})
        assert (await ask(server, "/live", "HEAD")) == (200, b"")
        assert (await ask(server, "/live", "POST"))[0] == 405
        status, body = await ask(server, "/else")
        assert (status, body["error"]["message"].split(".")[0]) == (404, "Route not found")


async def test_a_verdict_that_is_asked_for_on_every_heartbeat() -> None:
    workers = 0

    def judge() -> Verdict:
        return Verdict(workers > 0, {}, () if workers else ("no usable worker serves any model",))

    server = StatusServer(SystemConfig(system_port=0), judge=judge)
    server.start()
    try:
        status, body = await ask(server, "/health")
        assert (status, body["reasons"]) == (503, ["no usable worker serves any model"])
        workers = 1
        async with asyncio.timeout(1):
            while (await ask(server, "/health"))[0] != 200:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
    finally:
        server.close()


async def test_paths_by_settings_and_no_metadata_yet() -> None:
    async with serving(system_health_path="/healthz", system_live_path="/livez") as server:
        assert (await ask(server, "/livez"))[0] == 200
        assert (await ask(server, "/healthz"))[0] == 503
        assert (await ask(server, "/health"))[0] == 404
        assert (await ask(server, "/metadata"))[0] == 404
        assert await ask(server, "/metrics") == (200, b"")


async def test_off_when_negative() -> None:
    async with serving(system_port=-1) as server:
        assert server.address == ""


async def test_a_taken_port_is_a_clear_failure() -> None:
    async with serving() as server:
        port = int(server.address.rsplit(":", 1)[1])
        with pytest.raises(Conflict, match=rf"127.0.0.1:{port} \(DYN_SYSTEM_PORT\): the port is taken"):
            StatusServer(SystemConfig(system_port=port)).start()
    with pytest.raises(CannotConnect, match=r"DYN_SYSTEM_PORT|cannot use"):
        StatusServer(SystemConfig(system_port=0, system_host="203.0.113.1")).start()


async def test_it_answers_while_the_event_loop_is_stuck() -> None:
    answers: list[tuple[int, float]] = []
    async with serving() as server:
        server.post(READY)

        def hammer() -> None:
            for _ in range(20):
                began = time.monotonic()
                answers.append((ask_now(server, "/live")[0], time.monotonic() - began))

        thread = threading.Thread(target=hammer)
        thread.start()
        thread.join(10)  # the loop stands still meanwhile
    assert [status for status, _ in answers] == [200] * 20
    assert sorted(took for _, took in answers)[10] < within(0.05)


async def test_live_fails_when_the_loop_stands_still_for_longer_than_the_bound(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(listener_module, "TICK_SECONDS", 0.05)
    monkeypatch.setattr(status_module, "TICK_SECONDS", 0.05)
    monkeypatch.setattr(status_module, "BEAT_SECONDS", 0.05)
    monkeypatch.setattr(status_module, "LATE_SECONDS", 0.2)
    async with serving(system_live_timeout=0.7) as server:
        server.post(READY)
        time.sleep(0.8)  # noqa: ASYNC251  starting: a loop that imports and loads is no fault
        assert ask_now(server, "/live")[0] == 200
        server.arm()
        await asyncio.sleep(0.4)
        assert (await ask(server, "/live"))[0] == 200
        time.sleep(0.35)  # noqa: ASYNC251
        assert ask_now(server, "/live")[0] == 200
        status, body = ask_now(server, "/health")
        assert (status, "event loop has not run" in body["reasons"][0]) == (503, True)
        time.sleep(0.8)  # noqa: ASYNC251
        status, body = ask_now(server, "/live")
        assert (status, body["status"], "bound 0.7 s" in body["message"]) == (503, "stuck", True)
        await asyncio.sleep(0.4)
        assert (await ask(server, "/live"))[0] == 200
        assert (await ask(server, "/health"))[0] == 200


async def test_time_in_which_the_thread_itself_was_late_is_not_counted() -> None:
    async with serving(system_live_timeout=1.0) as server:
        server.arm()
        server._beats += 1
        server._tick(True)
        for _ in range(1000):
            server._tick(False)
        assert server._late == 0.0
        server._tick(True)
        assert server._late > 0.0


async def test_metrics_are_rendered_beside_and_a_fault_in_them_is_contained() -> None:
    slow = threading.Event()

    def render() -> bytes:
        slow.wait(5)
        return b"# TYPE x gauge\nx 1\n"

    async with serving(metrics=render) as server:
        waiting = asyncio.create_task(ask(server, "/metrics"))
        assert (await ask(server, "/live"))[0] == 200
        slow.set()
        assert await waiting == (200, b"# TYPE x gauge\nx 1\n")
    async with serving(metrics=lambda: bytes(1 // 0)) as server:
        assert (await ask(server, "/metrics"))[0] == 500
        assert (await ask(server, "/live"))[0] == 200


async def test_gauges_are_read_on_the_event_loop_and_a_stuck_loop_does_not_hold_metrics_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(status_module, "REFRESH_SECONDS", 0.2)
    threads: list[int] = []
    server = StatusServer(
        SystemConfig(system_port=0), metrics=lambda: b"x 1\n", refresh=lambda: threads.append(threading.get_ident())
    )
    server.start()
    try:
        assert await ask(server, "/metrics") == (200, b"x 1\n")
        assert threads == [threading.get_ident()]
        assert ask_now(server, "/metrics") == (200, b"x 1\n")
    finally:
        server.close()


async def test_large_answers_arrive_whole() -> None:
    big = b"x" * 5_000_000
    async with serving(metrics=lambda: big) as server:
        status, body = await ask(server, "/metrics")
        assert (status, len(body)) == (200, len(big))


async def echo(arguments: dict[str, Any]) -> dict[str, Any]:
    if arguments.get("fail"):
        raise InvalidRequest("no")
    if arguments.get("crash"):
        raise ZeroDivisionError
    return {"loop": id(asyncio.get_running_loop()), **arguments}


async def test_control_routes_run_on_the_event_loop() -> None:
    async with serving() as server:
        server.control.add("echo", echo)
        mine = id(asyncio.get_running_loop())
        assert await ask(server, "/engine/echo", "POST", b'{"a": 1}') == (200, {"loop": mine, "a": 1})
        assert (await ask(server, "/engine/echo", "POST"))[0] == 200
        assert (await ask(server, "/engine/echo", "POST", b"[]"))[0] == 400
        assert (await ask(server, "/engine/echo"))[0] == 405
        status, body = await ask(server, "/engine/else", "POST")
        assert (status, "/engine/echo" in body["error"]["message"]) == (404, True)
        status, body = await ask(server, "/engine/echo", "POST", b'{"fail": true}')
        assert (status, body["error"]["code"]) == (400, "invalid_request")
        assert (await ask(server, "/engine/echo", "POST", b'{"crash": true}'))[0] == 500
        assert (await ask(server, "/engine/echo", "POST", origin="http://evil.example"))[0] == 403


async def test_control_routes_off_loopback_need_the_token() -> None:
    async with serving(system_host="0.0.0.0") as server:
        server.control.add("echo", echo)
        server.address = server.address.replace("0.0.0.0", "127.0.0.1")
        assert (await ask(server, "/engine/echo", "POST"))[0] == 403
        assert (await ask(server, "/live"))[0] == 200
    async with serving(system_token="s3cret") as server:
        server.control.add("echo", echo)
        assert (await ask(server, "/engine/echo", "POST"))[0] == 401
        assert (await ask(server, "/engine/echo", "POST", authorization="Bearer wrong"))[0] == 401
        assert (await ask(server, "/engine/echo", "POST", authorization="Bearer s3cret"))[0] == 200


async def test_idle_clients_do_not_lock_a_probe_out() -> None:
    async with serving() as server:
        host, port = server.address.rsplit(":", 1)
        idle = [socket.create_connection((host, int(port))) for _ in range(listener_module.CONNECTIONS + 20)]
        try:
            for one in idle:
                with contextlib.suppress(OSError):
                    one.sendall(b"GET /li")
            assert (await ask(server, "/live"))[0] == 200
        finally:
            for one in idle:
                one.close()


async def test_nonsense_is_answered_and_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listener_module, "TICK_SECONDS", 0.05)
    monkeypatch.setattr(listener_module, "REQUEST_SECONDS", 0.2)
    async with serving() as server:
        answer = await asyncio.to_thread(raw, server, b"GET /" + b"x" * 20_000)
        assert answer.startswith(b"HTTP/1.1 431 ")
        assert await asyncio.to_thread(raw, server, b"half a requ") == b""
        assert (await ask(server, "/live"))[0] == 200


async def test_after_close_nobody_answers() -> None:
    async with serving() as server:
        assert (await ask(server, "/live"))[0] == 200
    with pytest.raises(OSError, match="refused"):
        ask_now(server, "/live")
    server.close()


async def test_facts_that_raise_leave_the_last_ones() -> None:
    broken = False

    def more() -> dict[str, Any]:
        if broken:
            raise ZeroDivisionError
        return {"state": "ready"}

    async with serving(more=more) as server:
        server.post(READY)
        broken = True
        server._beat()
        assert (await ask(server, "/health"))[1]["state"] == "ready"


async def test_control_routes_may_be_read_and_have_places_of_their_own() -> None:
    async with serving() as server:
        server.control.add("echo", echo)
        server.control.add("look", echo, reads=True)
        server.control.mount("/v1/things", {"GET": echo, "DELETE": echo}, item="thing")
        assert (await ask(server, "/engine/look"))[0] == 200
        assert (await ask(server, "/engine/echo"))[0] == 405, "a page could make a browser GET"
        assert (await ask(server, "/v1/things"))[0] == 200
        status, answer = await ask(server, "/v1/things/a%2Fb", "DELETE", b'{"thing": "other", "more": 1}')
        assert (status, answer["thing"], answer["more"]) == (200, "a/b", 1), "the path names it"
        status, answer = await ask(server, "/v1/things", "POST")
        assert (status, "GET, DELETE" in answer["error"]["message"]) == (405, True)
        assert (await ask(server, "/v1/thingsandmore"))[0] == 404
        assert (await ask(server, "/v1/things", origin="http://evil.example"))[0] == 403


async def test_control_routes_may_take_longer_than_other_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listener_module, "ANSWER_SECONDS", 0.05)
    monkeypatch.setattr(listener_module, "TICK_SECONDS", 0.02)
    began = threading.Event()

    async def slow(_: dict[str, Any]) -> dict[str, Any]:
        began.set()
        await asyncio.sleep(0.3)
        return {"done": True}

    async with serving() as server:
        server.control.add("slow", slow)
        assert await ask(server, "/engine/slow", "POST") == (200, {"done": True})
        assert began.is_set()
        monkeypatch.setattr(control_module, "CONTROL_SECONDS", 0.05)
        status, answer = await ask(server, "/engine/slow", "POST")
        assert (status, "within 0.05 s" in answer["error"]["message"]) == (504, True)
