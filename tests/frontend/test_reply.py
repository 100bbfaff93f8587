"""Clients that read slowly, stop reading or leave, over real sockets."""

from __future__ import annotations

import asyncio
import logging
import resource
import time
from typing import Any

import pytest

from holdfast.engines.mock import MockConfig
from holdfast.frontend.choices import StreamedChoice
from holdfast.frontend.client_wire import ClientWire
from holdfast.requests.config import RequestSettings
from tests.frontend.support import CHAT, TEXT, Client, Stack, chat, events_of, stack, text, until
from tests.patience import within

BIG = 6000
"""Tokens whose events are larger than all buffers between the frontend and a client that does not read."""


def stalled(one: Stack, **options: Any) -> Client:
    return one.client(receive_buffer=4096, **options)


def said(events: list[Any]) -> str:
    return "".join(c["delta"].get("content") or "" for e in events if e for c in e["choices"])


async def blocked(one: Stack) -> Any:
    """Wait until the only request's client is blocked; return its stream."""

    def look() -> Any:
        streams = [s for r in one.frontend.generate.active.values() for s in r.streams]
        return streams[0] if streams and streams[0].blocked_since is not None else None

    return await until(look)


async def test_blocked_client_gets_every_token_when_it_reads_on() -> None:
    async with stack(1) as one:
        body = chat("long", max_tokens=BIG, stream=True, stream_options={"include_usage": True})
        whole = (await one.post(CHAT, {**body, "stream": False, "stream_options": None})).json()
        async with stalled(one) as client:
            client.request("POST", CHAT, body)
            stream = await blocked(one)
            counts: list[int] = [stream.count]
            await until(lambda: counts.append(stream.count) or len(set(counts[-40:])) == 1 < len(counts) - 40)
            assert stream.count < BIG, "without credit the worker waits"
            assert 0 < len(stream.pending) <= 4096
            got = await client.answer()
        events = got.events
        assert said(events) == whole["choices"][0]["message"]["content"]
        assert events[-1] is None
        assert events[-2]["usage"]["completion_tokens"] == BIG
        await one.at_rest()
        assert one.count("dynamo_frontend_requests_total", status="success") == 2


async def test_memory_stays_flat_beside_stalled_clients() -> None:
    async with stack(1) as one:
        clients = []
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        for _ in range(20):
            client = await stalled(one).__aenter__()
            client.reader._transport.pause_reading()  # type: ignore[attr-defined]
            client.request("POST", CHAT, chat("long", max_tokens=30_000, stream=True, ignore_eos=True))
            clients.append(client)
        await until(lambda: sum(s.blocked_since is not None for s in streams(one)) == 20, 20)
        got = await one.post(CHAT, chat("[[mock:say beside]]"))
        assert got.json()["choices"][0]["message"]["content"] == "beside"
        assert all(len(s.pending) <= 4096 for s in streams(one))
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 80_000
        for client in clients:
            client.reset()
        await one.at_rest()


def streams(one: Stack) -> list[Any]:
    return [s for r in one.frontend.generate.active.values() for s in r.streams]


@pytest.mark.parametrize("tokens", [BIG, 30_000])
async def test_stalled_client_is_cancelled(tokens: int) -> None:
    async with stack(1, requests=RequestSettings(client_stall_timeout=0.4)) as one:
        async with stalled(one) as client:
            client.reader._transport.pause_reading()  # type: ignore[attr-defined]
            client.request("POST", CHAT, chat("long", max_tokens=tokens, stream=True))
            await blocked(one)
            await one.at_rest()
            await until(lambda: not one.server.server_state.connections)
        assert one.count("dynamo_frontend_requests_total", status="success") == 0
        assert one.count("dynamo_frontend_requests_total", error_type="client_stalled") == 1
        assert one.count("dynamo_frontend_model_cancellation_total") == 1


async def test_client_that_stalls_over_the_last_bytes_is_dropped() -> None:
    """All tokens are there and only the end waits: no stream is left that could notice."""
    async with stack(1, requests=RequestSettings(client_stall_timeout=0.4)) as one:
        async with stalled(one) as client:
            client.reader._transport.pause_reading()  # type: ignore[attr-defined]
            client.request("POST", CHAT, chat("long", max_tokens=1900, n=2, stream=True, logprobs=True))
            await until(lambda: one.frontend.generate.active)
            await until(lambda: not one.server.server_state.connections, 15)
            await one.at_rest()
        assert one.count("dynamo_frontend_requests_total", status="success") == 0


async def test_slow_reader_is_not_a_stalled_one() -> None:
    async with stack(1, requests=RequestSettings(client_stall_timeout=0.5)) as one:
        async with stalled(one) as client:
            client.request("POST", CHAT, chat("long", max_tokens=BIG, stream=True))
            await blocked(one)
            parts = []
            began = time.monotonic()
            while time.monotonic() - began < 2.0:
                parts.append(await client.reader.read(40_000))
                await asyncio.sleep(0.05)
            async with asyncio.timeout(10):
                while not b"".join(parts[-2:]).endswith(b"0\r\n\r\n"):
                    parts.append(await client.reader.read(40_000))
            assert b"data: [DONE]" in b"".join(parts[-2:])
        assert one.count("dynamo_frontend_requests_total", status="success") == 1


@pytest.mark.parametrize("when", ["prefill", "streaming"])
@pytest.mark.parametrize("stream", [True, False])
async def test_leaving_client_stops_the_engine(when: str, stream: bool) -> None:
    async with stack(1, mock=MockConfig(step_ms=5.0)) as one:
        ask = "[[mock:prefill 20]] x" if when == "prefill" else "x"
        async with one.client() as client:
            client.request("POST", CHAT, chat(ask, max_tokens=3000, stream=stream))
            await until(lambda: streams(one) and streams(one)[0].state in ("accepted", "streaming"))
            if when == "streaming":
                await until(lambda: streams(one)[0].count > 3)
            left = time.monotonic()
            client.reset()
            await until(lambda: not one.frontend.generate.active, every=0.0005)
            assert time.monotonic() - left < within(0.2)
        ((_, engine),) = one.workers.values()
        await until(lambda: engine.load().running + engine.load().waiting == 0)
        assert one.count("dynamo_frontend_requests_total", error_type="cancelled") == 1
        assert one.count("dynamo_frontend_requests_total", status="success") == 0
        await one.at_rest()


async def test_leaving_while_the_request_is_prepared(monkeypatch: pytest.MonkeyPatch) -> None:
    async with stack(1) as one:
        gate = asyncio.Event()
        original = one.frontend.generate._preparer.prepare

        async def slow(*args: Any) -> Any:
            prepared = await original(*args)
            await gate.wait()
            return prepared

        monkeypatch.setattr(one.frontend.generate._preparer, "at_once", lambda *_: None)
        monkeypatch.setattr(one.frontend.generate._preparer, "prepare", slow)
        async with one.client() as client:
            client.request("POST", CHAT, chat())
            await until(lambda: one.frontend.generate.in_hand)
            client.reset()
            await until(lambda: not one.server.server_state.connections)
        gate.set()
        await until(lambda: not one.frontend.generate.in_hand)
        assert one.count("dynamo_frontend_requests_total", error_type="cancelled") == 1
        ((worker, _),) = one.workers.values()
        assert worker.host.in_flight == 0


async def test_fault_in_one_stream_touches_no_other(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.CRITICAL)
    original = StreamedChoice.deliver

    def deliver(self: StreamedChoice, tokens: list[int], logprobs: Any) -> int:
        if self.answer.label == "victim" and self.stream is not None and self.stream.delivered > 5:
            raise ValueError("planted")
        return original(self, tokens, logprobs)

    monkeypatch.setattr(StreamedChoice, "deliver", deliver)
    async with stack(1, mock=MockConfig(step_ms=2.0)) as one:

        async def ask(label: str) -> bytes:
            got = await one.post(CHAT, chat("x", max_tokens=40, stream=True), x_request_id=label)
            return got.content

        victim, *others = await asyncio.gather(ask("victim"), *(ask(f"other{n}") for n in range(8)))
        events = events_of(victim)
        assert events[-1] is None
        assert events[-2]["error"]["code"] == "internal"
        texts = {said(events_of(body)) for body in others}
        assert len(texts) == 1
        await one.at_rest()
        assert one.count("dynamo_frontend_requests_total", status="success") == 8


async def test_comments_while_nothing_comes() -> None:
    async with stack(1, http_sse_keep_alive_interval_ms=100) as one, one.client() as client:
        client.request("POST", CHAT, chat("[[mock:prefill 0.6]][[mock:say late]]", stream=True))
        got = await client.answer()
        assert 3 <= got.body.count(b": keep-alive\n\n") <= 7
        assert said(got.events) == "late"


async def test_comments_begin_before_a_worker_has_accepted() -> None:
    """While it waits for a worker; the error then is an event, because the status has gone out."""
    async with stack(1, http_sse_keep_alive_interval_ms=100, requests=RequestSettings(migration_wait_secs=0.5)) as one:
        ((worker, _),) = one.workers.values()
        worker.server.drain("test", 10_000)
        await until(lambda: not one.pool.usable("mock"))
        async with one.client() as client:
            client.request("POST", CHAT, chat(stream=True), x_request_id="mine")
            got = await client.answer()
        assert got.status == 200
        assert got.headers["x-request-id"] == "mine"
        assert got.body.startswith(b": keep-alive\n\n")
        assert got.events[-1] is None
        assert got.events[-2]["error"]["code"] in ("no_workers", "worker_draining")


@pytest.mark.parametrize("path", [CHAT, TEXT])
async def test_no_comments_in_whole_answers_and_none_at_zero(path: str) -> None:
    make = chat if path == CHAT else text
    for interval, stream in ((50, False), (0, True)):
        async with stack(1, http_sse_keep_alive_interval_ms=interval) as one, one.client() as client:
            client.request("POST", path, make("[[mock:prefill 0.4]][[mock:say late]]", stream=stream))
            got = await client.answer()
            assert got.status == 200
            assert b": keep-alive" not in got.body
            client.request("GET", "/live")
            assert (await client.answer()).status == 200


async def test_early_error_keeps_its_status() -> None:
    async with stack(1, requests=RequestSettings(migration_limit=0)) as one, one.client() as client:
        for stream in (True, False):
            client.request("POST", CHAT, chat("[[mock:refuse 9]]", stream=stream), x_request_id="mine")
            got = await client.answer()
            assert got.status >= 500
            assert got.headers["x-request-id"] == "mine"
            assert got.error["message"]


async def test_error_in_mid_stream_is_an_event_and_the_end() -> None:
    async with stack(1, requests=RequestSettings(migration_limit=0)) as one:
        got = await one.post(CHAT, chat("[[mock:error-after 5]]", stream=True, n=3, max_tokens=50))
        assert got.status_code == 200
        events = events_of(got.content)
        assert [e for e in events if e is None] == [None]
        assert events[-1] is None
        assert [e for e in events if e and "error" in e] == [events[-2]]
        whole = await one.post(CHAT, chat("[[mock:error-after 5]]", n=3, max_tokens=50))
        assert whole.status_code >= 500
        await one.at_rest()
        assert one.count("dynamo_frontend_requests_total", status="success") == 0
        assert one.count("dynamo_frontend_requests_total", status="error") == 2


async def test_error_reaches_a_slow_client_after_what_came_before() -> None:
    async with stack(1, requests=RequestSettings(migration_limit=0)) as one, stalled(one) as client:
        client.request("POST", CHAT, chat(f"[[mock:error-after {BIG - 1500}]]", max_tokens=BIG, stream=True))
        await blocked(one)
        got = await client.answer()
        assert got.events[-1] is None
        assert "error" in got.events[-2]


async def test_whole_answer_costs_one_write(monkeypatch: pytest.MonkeyPatch) -> None:
    writes: list[int] = []
    async with stack(1) as one, one.client() as client:
        original = ClientWire.end

        def end(self: ClientWire, data: bytes) -> None:
            self._transport = Counting(self._transport, writes)  # type: ignore[assignment]
            original(self, data)

        monkeypatch.setattr(ClientWire, "end", end)
        for stream in (False, True):
            client.request("POST", CHAT, chat("[[mock:say hi]]", stream=stream))
            assert (await client.answer()).status == 200
    assert len(writes) == 2


class Counting:
    """A transport that counts writes."""

    def __init__(self, transport: Any, writes: list[int]):
        self._transport = transport
        self._writes = writes

    def write(self, data: bytes) -> None:
        self._writes.append(len(data))
        self._transport.write(data)
