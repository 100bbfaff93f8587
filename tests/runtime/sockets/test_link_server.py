"""A link and a server on real sockets: calls, large payloads, loss, silence, slow readers, secrets."""

import asyncio
import random
import socket
from typing import Any

import pytest

from holdfast.base import limits
from holdfast.base.errors import (
    CannotConnect,
    CapacityExhausted,
    DeadlineExceeded,
    Disconnected,
    InternalError,
    InvalidRequest,
    PayloadTooLarge,
    PeerSilent,
    SecretMismatch,
    WorkerDraining,
    WorkerFault,
    WorkerSaturated,
    WrongInstance,
)
from holdfast.runtime import server as server_module
from holdfast.runtime.link import Link
from holdfast.runtime.server import ServerSettings, WorkerServer
from holdfast.runtime.streams import TokenItem
from holdfast.runtime.transport import TcpTransport
from holdfast.wire.codec import encode
from holdfast.wire.frames import VERSION, Hello, Load, OpenHeaders, Ping, Pong, Progress
from tests.patience import within
from tests.runtime.sockets.wiring import Site, until
from tests.wire.pairs import Sink

HEADERS = OpenHeaders(request_id="r")


async def test_a_call_from_open_to_end() -> None:
    async with Site() as site:
        link, sink = await site.link(), Sink()
        reads = []
        link.on_read_done = lambda: reads.append(len(sink.tokens))
        handle = link.open("hold", HEADERS, b"payload", sink, first_index=0)
        assert sink.calls == [], "callbacks come later"
        await until(lambda: "accept" in sink.names)
        (call,) = site.calls
        assert (call.endpoint, call.payload, call.headers.request_id) == ("hold", b"payload", "r")
        call.connection.send_items([TokenItem(call, 0, [1, 2])])
        call.connection.send_items([TokenItem(call, 2, [3])])
        call.end("stop", None, 9)
        await until(lambda: sink.final)
        assert (sink.tokens, sink.final, sink.cached_tokens) == ([1, 2, 3], "end:stop", 9)
        assert reads[-1] == 3
        handle.stop()
        handle.kill()
        assert link.streams == site.server.open_streams == 0


async def test_items_and_end_of_one_iteration_arrive_in_one_read() -> None:
    async with Site() as site:
        link = await site.link()
        sinks = [Sink() for _ in range(20)]
        for sink in sinks:
            link.open("hold", HEADERS, b"", sink)
        await until(lambda: all(sink.names for sink in sinks))
        reads: list[int] = []
        link.on_read_done = lambda: reads.append(sum(sink.final is not None for sink in sinks))
        site.calls[0].connection.send_items([TokenItem(call, 0, [7]) for call in site.calls])
        for call in site.calls:
            call.end("stop")
        await until(lambda: all(sink.final for sink in sinks))
        assert reads == [20]


async def test_stop_and_kill_reach_the_endpoint() -> None:
    async with Site() as site:
        link, first, second = await site.link(), Sink(), Sink()
        handles = [link.open("hold", HEADERS, b"", sink) for sink in (first, second)]
        await until(lambda: len(site.calls) == 2)
        handles[0].stop("client_gone")
        handles[1].kill("abandoned")
        await until(lambda: len(site.stops) == 2)
        assert site.stops == [(1, "client_gone"), (2, "abandoned")]
        for call in site.calls:
            call.end("cancelled")
        await until(lambda: first.final)
        assert first.final == "end:cancelled"
        assert second.final is None


async def test_on_stop_set_after_the_stop_is_told_at_once() -> None:
    async with Site() as site:
        link = await site.link()
        site.server.register("late", site.calls.append)  # type: ignore[arg-type]
        handle = link.open("late", HEADERS, b"", Sink())
        await until(lambda: site.calls)
        handle.stop("why")
        await until(lambda: site.calls[0].stop_reason)
        told: list[str] = []
        site.calls[0].on_stop = told.append
        assert told == ["why"]
        site.calls[0].end("cancelled")


@pytest.mark.parametrize(
    ("handler", "expected"),
    [
        (lambda call: call.refuse(WorkerSaturated("full", limit="slots")), WorkerSaturated),
        (lambda call: (_ for _ in ()).throw(InvalidRequest("bad top_k")), InvalidRequest),
        (lambda call: 1 / 0, InternalError),
        (None, WorkerFault),
    ],
)
async def test_refusals_are_typed(handler: Any, expected: type) -> None:
    async with Site() as site:
        link, sink = await site.link(), Sink()
        if handler is not None:
            site.server.register("gen", handler)
        link.open("gen", HEADERS, b"", sink)
        await until(lambda: sink.final)
        assert sink.final == "refuse"
        assert type(sink.error) is expected


async def test_twenty_megabytes_go_over_bulk_while_tokens_flow() -> None:
    loop = asyncio.get_running_loop()
    async with Site() as site:
        link = await site.link()
        gaps: list[float] = []

        class Timed(Sink):
            def on_tokens(self, index: int, tokens: Any, logprobs: Any) -> None:
                super().on_tokens(index, tokens, logprobs)
                gaps.append(loop.time() - sent[index])

        sent: dict[int, float] = {}
        live = Timed()
        link.open("hold", HEADERS, b"", live, credit=100_000)
        await until(lambda: site.calls)
        call = site.calls[0]
        large = random.Random(1).randbytes(20 * 1024 * 1024)
        bulky = [Sink(), Sink()]
        for sink in bulky:
            link.open("hold", HEADERS, large, sink)
        index = 0
        while len(site.calls) < 3:
            sent[index] = loop.time()
            call.connection.send_items([TokenItem(call, index, [index])])
            index += 1
            await asyncio.sleep(0.002)
            assert index < 5000
        assert all(big.payload == large for big in site.calls[1:])
        await until(lambda: len(gaps) == index)
        gaps.sort()
        assert gaps[len(gaps) // 2] < within(0.03)
        assert gaps[-1] < within(1.0)
        assert index > 3, "the loop had its turn while the payloads travelled"


async def test_a_small_upload_is_not_stuck_behind_a_large_one() -> None:
    async with Site() as site:
        link = await site.link()
        link.open("hold", HEADERS, bytes(40 * 1024 * 1024), Sink())
        link.open("hold", HEADERS, bytes(100_000), Sink())
        await until(lambda: len(site.calls) == 2)
        assert [len(call.payload) for call in site.calls] == [100_000, 40 * 1024 * 1024]


async def test_stopping_during_an_upload_ends_it_on_both_sides() -> None:
    async with Site() as site:
        link, sink = await site.link(), Sink()
        handle = link.open("hold", HEADERS, bytes(30 * 1024 * 1024), sink)
        await until(lambda: site.server.open_streams)
        handle.stop()
        await until(lambda: sink.final)
        assert sink.final == "refuse"
        again = Sink()
        link.open("hold", HEADERS, bytes(200_000), again)
        await until(lambda: site.calls)
        assert len(site.calls[0].payload) == 200_000
        session = next(iter(site.server._sessions.values()))
        await until(lambda: session.uploads.held_bytes == 0)
        assert not link._uploads


async def test_payloads_have_a_limit() -> None:
    async with Site() as site:
        link = await site.link()
        with pytest.raises(PayloadTooLarge):
            link.open("hold", HEADERS, bytes(limits.PAYLOAD_BYTES + 1), Sink())
        assert link.streams == 0


async def test_losing_the_worker_breaks_every_stream_once_then_tells_the_owner() -> None:
    async with Site() as site:
        link, sinks = await site.link(), [Sink(), Sink()]
        lost: list[Any] = []
        link.on_lost = lambda error: lost.append((error, [sink.final for sink in sinks]))
        for sink in sinks:
            link.open("hold", HEADERS, b"", sink)
        await until(lambda: len(site.calls) == 2)
        site.calls[0].connection._stream.abort()  # type: ignore[attr-defined]
        await until(lambda: lost)
        ((error, finals),) = lost
        assert isinstance(error, Disconnected)
        assert finals == ["broken", "broken"]
        assert not link.connected
        with pytest.raises(Disconnected):
            link.open("hold", HEADERS, b"", Sink())
        with pytest.raises(Disconnected):
            link.ping()
        await link.close()
        assert len(lost) == 1


async def test_losing_the_caller_stops_its_streams_and_no_others() -> None:
    async with Site() as site:
        first, second, sink = await site.link(), await site.link(), Sink()
        first.open("hold", HEADERS, b"", Sink())
        second.open("hold", HEADERS, b"", sink)
        await until(lambda: len(site.calls) == 2)
        first._control.abort()  # type: ignore[union-attr]
        await until(lambda: site.stops)
        assert [reason for _, reason in site.stops] == ["caller_lost"]
        assert len(site.server.connections) == 1
        site.calls[1].end("stop")
        await until(lambda: sink.final == "end:stop")


async def test_closing_the_link_breaks_streams_without_on_lost() -> None:
    async with Site() as site:
        link, sink, lost = await site.link(), Sink(), []
        link.on_lost = lost.append
        link.open("hold", HEADERS, b"", sink)
        await until(lambda: site.calls)
        await link.close()
        await link.close()
        assert sink.final == "broken"
        await until(lambda: site.stops)
        assert lost == []


async def test_a_half_closed_caller_is_gone() -> None:
    async with Site() as site:
        link = await site.link()
        link.open("hold", HEADERS, b"", Sink())
        await until(lambda: site.calls)
        link._control._stream.write_eof()  # type: ignore[union-attr]
        await until(lambda: site.stops == [(1, "caller_lost")])


async def test_abandon_breaks_streams_kills_them_and_stays_connected() -> None:
    async with Site() as site:
        link, sink = await site.link(), Sink()
        link.open("hold", HEADERS, b"", sink)
        await until(lambda: site.calls)
        link.abandon(PeerSilent("missed pongs"))
        assert isinstance(sink.error, PeerSilent)
        await until(lambda: site.stops == [(1, "abandoned")])
        again = Sink()
        link.open("hold", HEADERS, b"", again)
        await until(lambda: again.names == ["accept"])


async def test_pings_are_answered_with_facts() -> None:
    async with Site() as site:
        pongs: list[Pong] = []
        link = await site.link()
        link.on_pong = pongs.append
        site.server.set_pong_source(lambda: (Progress(steps=3), Load(running=2), "saturated"))
        before = link.last_heard
        number = link.ping()
        await until(lambda: pongs)
        assert (pongs[0].sequence, pongs[0].progress.steps, pongs[0].load.running) == (number, 3, 2)
        assert pongs[0].state == "saturated"
        assert link.last_heard >= before
        site.server.set_pong_source(lambda: 1 / 0)  # type: ignore[arg-type, return-value]
        link.ping()
        await until(lambda: len(pongs) == 2)
        assert pongs[1].state == "failed"


async def test_an_idle_link_keeps_itself_alive_and_a_silent_one_is_lost() -> None:
    async with Site(settings=ServerSettings(silence_bound=0.4)) as site:
        pongs: list[Pong] = []
        idle = await site.link(keepalive=0.1)
        idle.on_pong = pongs.append
        silent = await site.link(keepalive=None)
        silent.open("hold", HEADERS, b"", Sink())
        lost: list[Any] = []
        silent.on_lost = lost.append
        await until(lambda: site.stops, deadline=5.0)
        assert site.stops == [(1, "caller_lost")]
        await until(lambda: lost)
        assert idle.connected
        assert pongs == [], "keepalive pings are the link's own business"


async def test_a_late_loop_of_our_own_accuses_nobody() -> None:
    async with Site(settings=ServerSettings(silence_bound=0.4)) as site:
        await site.link(keepalive=None)
        (session,) = site.server._sessions.values()
        session.take_heard()
        before = session.silent_checks
        site.server._last_check -= 1.0
        site.server._check_timer.cancel()  # type: ignore[union-attr]
        site.server._check()
        assert session.silent_checks == before


async def test_draining_reaches_present_and_future_callers() -> None:
    async with Site() as site:
        link, running = await site.link(), Sink()
        told: list[Any] = []
        link.on_draining = told.append
        link.open("hold", HEADERS, b"", running)
        await until(lambda: site.calls)
        crossing = Sink()
        link.open("hold", HEADERS, b"", crossing)
        site.server.drain("rollout", 7000)
        await until(lambda: told)
        assert (told[0].reason, told[0].remaining_ms) == ("rollout", 7000)
        assert link.draining == told[0]
        await until(lambda: crossing.final)
        assert isinstance(crossing.error, WorkerDraining)
        with pytest.raises(WorkerDraining):
            link.open("hold", HEADERS, b"", Sink())
        site.calls[0].end("stop")
        await until(lambda: running.final == "end:stop")
        newcomer = await site.link()
        await until(lambda: newcomer.draining)


async def test_who_is_expected_must_be_there() -> None:
    async with Site() as site:
        with pytest.raises(WrongInstance):
            await site.link(instance="w2")
        with pytest.raises(WrongInstance):
            await site.link(instance="w1", epoch=78)
        assert (await site.link(instance="w1", epoch=77)).connected


async def test_secrets() -> None:
    async with Site(secret=b"s") as site:
        link, sink = await site.link(secret=b"s"), Sink()
        link.open("hold", HEADERS, bytes(300_000), sink)
        await until(lambda: site.calls)
        for wrong in (b"", b"t"):
            with pytest.raises(SecretMismatch):
                await site.link(secret=wrong)
    async with Site() as site:
        with pytest.raises(SecretMismatch):
            await site.link(secret=b"s")


async def test_off_loopback_needs_a_secret_or_an_explicit_word() -> None:
    rng = random.Random(1)
    with pytest.raises(InvalidRequest, match="insecure"):
        await WorkerServer("w1", 1, rng=rng).start("0.0.0.0")
    for allowed in ({"secret": b"s"}, {"settings": ServerSettings(insecure=True)}):
        server = WorkerServer("w1", 1, rng=rng, **allowed)  # type: ignore[arg-type]
        assert (await server.start("0.0.0.0")).startswith("0.0.0.0:")
        await server.close()


async def test_nobody_there() -> None:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{held.getsockname()[1]}"
        link = Link(TcpTransport(), address, caller="t", rng=random.Random(1))
        with pytest.raises(CannotConnect, match=address):
            await link.connect(2.0)


@pytest.mark.parametrize("address", ["", "nowhere", "host:port", "127.0.0.1:99999", "a..b:80", ":80"])
async def test_addresses_that_are_none(address: str) -> None:
    link = Link(TcpTransport(), address, caller="t", rng=random.Random(1))
    with pytest.raises(CannotConnect):
        await link.connect(2.0)


async def test_somebody_who_says_nothing() -> None:
    server = await asyncio.start_server(lambda r, w: None, "127.0.0.1", 0)
    async with server:
        port = server.sockets[0].getsockname()[1]
        link = Link(TcpTransport(), f"127.0.0.1:{port}", caller="t", rng=random.Random(1))
        with pytest.raises(CannotConnect, match="no welcome"):
            await link.connect(0.2)


async def test_somebody_who_speaks_something_else() -> None:
    async def http(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")

    server = await asyncio.start_server(http, "127.0.0.1", 0)
    async with server:
        port = server.sockets[0].getsockname()[1]
        link = Link(TcpTransport(), f"127.0.0.1:{port}", caller="t", rng=random.Random(1))
        with pytest.raises(Exception, match="announced a frame") as caught:
            await link.connect(2.0)
        assert caught.value.fault == "transport"  # type: ignore[attr-defined]


async def test_a_connection_without_hello_is_closed() -> None:
    async with Site(settings=ServerSettings(silence_bound=30.0, hello_timeout=0.1)) as site:
        host, port = site.server.address.split(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        assert await asyncio.wait_for(reader.read(), 5.0) == b""
        writer.close()


async def test_too_many_connections_are_turned_away(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_module, "UNGREETED_CONNECTIONS", 2)
    monkeypatch.setattr(server_module, "CALLERS_PER_WORKER", 2)
    async with Site() as site:
        host, port = site.server.address.split(":")
        held = [await asyncio.open_connection(host, int(port)) for _ in range(2)]
        with pytest.raises(CapacityExhausted, match="UNGREETED_CONNECTIONS"):
            await site.link()
        for _, writer in held:
            writer.close()
        await until(lambda: not site.server._connections)
        for _ in range(2):
            await site.link()
        with pytest.raises(CapacityExhausted, match="CALLERS_PER_WORKER"):
            await site.link()


async def test_a_caller_that_does_not_read_costs_bounded_memory_and_nobody_else() -> None:
    async with Site() as site:
        slow, live = await site.link(keepalive=None), await site.link()
        slow_sink, live_sink = Sink(), Sink()
        slow.open("hold", HEADERS, b"", slow_sink, credit=2_000_000)
        await until(lambda: len(site.calls) == 1)
        slow._control._stream.pause_reading()  # type: ignore[union-attr]
        live.open("hold", HEADERS, b"", live_sink, credit=2_000_000)
        await until(lambda: len(site.calls) == 2)
        slow_call, live_call = site.calls
        index = 0
        while not slow_call.connection.core.paused:  # type: ignore[attr-defined]
            slow_call.connection.send_items([TokenItem(slow_call, index, list(range(4096)))])
            live_call.connection.send_items([TokenItem(live_call, index, list(range(4096)))])
            index += 4096
            await asyncio.sleep(0)
            assert index < 50_000_000
        held = slow_call.connection._stream.get_write_buffer_size()  # type: ignore[attr-defined]
        total = 0
        while slow_call.stop_reason is None:
            slow_call.connection.send_items([TokenItem(slow_call, index + total, list(range(4096)))])
            total += 4096
            assert total <= limits.UNSENT_TOKENS_PER_STREAM + 4096
        assert slow_call.connection._stream.get_write_buffer_size() <= held + 4096  # type: ignore[attr-defined]
        await until(lambda: len(live_sink.tokens) == index)
        slow._control._stream.resume_reading()  # type: ignore[union-attr]
        await until(lambda: slow_sink.final)
        assert isinstance(slow_sink.error, CapacityExhausted)


async def test_tokens_held_by_a_full_network_arrive_when_it_moves_again() -> None:
    async with Site() as site:
        link, sink = await site.link(keepalive=None), Sink()
        link.open("hold", HEADERS, b"", sink, credit=10_000_000, first_index=0)
        await until(lambda: site.calls)
        (call,) = site.calls
        link._control._stream.pause_reading()  # type: ignore[union-attr]
        index = 0
        while not call.waiting or len(call.waiting) < 20:
            call.connection.send_items([TokenItem(call, index, [index % 1000] * 4096)])
            index += 4096
            await asyncio.sleep(0)
        call.end("length")
        link._control._stream.resume_reading()  # type: ignore[union-attr]
        await until(lambda: sink.final)
        assert len(sink.tokens) == index


async def test_a_caller_that_sends_but_never_reads_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("holdfast.runtime.flush.WRITE_BUFFER_BYTES", 200_000)
    async with Site() as site:
        host, port = site.server.address.split(":")
        _, writer = await asyncio.open_connection(host, int(port), limit=1024)
        writer.write(encode(Hello(1, VERSION, "rude", "control")))
        await until(lambda: site.server.connections)
        writer.transport.pause_reading()
        pings = bytes(encode(Ping(1))) * 10_000
        async with asyncio.timeout(20):
            while site.server.connections:
                writer.write(pings)
                await asyncio.sleep(0)
        writer.close()


async def test_a_violation_closes_only_that_connection() -> None:
    async with Site() as site:
        good, sink = await site.link(), Sink()
        bad = await site.link()
        bad._control._stream.write(b"\xff" * 100)  # type: ignore[union-attr]
        await until(lambda: not bad.connected)
        good.open("hold", HEADERS, b"", sink)
        await until(lambda: sink.names == ["accept"])


async def test_messages_flow_on_bulk_with_credit() -> None:
    async with Site() as site:
        link, sink = await site.link(), Sink()
        handle = await link.open_bulk("hold", HEADERS, b"", sink, credit=4)
        await until(lambda: site.calls)
        (call,) = site.calls
        assert call.connection.channel == "bulk"  # type: ignore[attr-defined]
        for number in range(10):
            call.send_data(bytes([number]) * 100_000)
        writable = asyncio.ensure_future(call.writable())
        await until(lambda: len(sink.messages) == 4)
        assert not writable.done()
        handle.credit(1000)
        await asyncio.wait_for(writable, 5.0)
        call.end("done")
        await until(lambda: sink.final)
        assert sink.messages == [bytes([number]) * 100_000 for number in range(10)]


async def test_losing_bulk_fails_uploads_and_the_next_one_connects_again() -> None:
    async with Site() as site:
        link, sink, other = await site.link(), Sink(), Sink()
        link.open("hold", HEADERS, b"", other)
        link.open("hold", HEADERS, bytes(30 * 1024 * 1024), sink)
        await until(lambda: link._bulk is not None)
        link._bulk.abort()  # type: ignore[union-attr]
        await until(lambda: sink.final)
        assert isinstance(sink.error, Disconnected)
        again = Sink()
        link.open("hold", HEADERS, bytes(300_000), again)
        await until(lambda: "accept" in again.names)
        assert other.final is None


async def test_an_upload_that_never_finishes_is_given_up() -> None:
    settings = ServerSettings(silence_bound=1.0, upload_timeout=0.3)
    async with Site(settings=settings) as site:
        link, sink = await site.link(keepalive=0.1), Sink()
        core = link._control.core  # type: ignore[union-attr]
        core.open("hold", HEADERS, b"", sink, upload=1)
        await until(lambda: sink.final)
        assert isinstance(sink.error, DeadlineExceeded)


async def test_the_caller_of_a_second_control_connection_replaces_the_first() -> None:
    async with Site() as site:
        first, lost = await site.link(), []
        first.on_lost = lost.append
        second = Link(site.transport, site.server.address, caller="x", rng=site.rng)
        site.links.append(second)
        second.caller = first.caller
        await second.connect(5.0)
        await until(lambda: lost)
        assert len(site.server.connections) == 1
        assert second.connected


async def test_server_close_stops_streams_and_breaks_callers() -> None:
    async with Site() as site:
        link, sink = await site.link(), Sink()
        link.open("hold", HEADERS, b"", sink)
        await until(lambda: site.calls)
        await site.server.close()
        await until(lambda: sink.final)
        assert isinstance(sink.error, Disconnected)
        assert site.stops == [(1, "connection_closed")]


async def test_a_callback_of_the_link_that_raises_is_contained(caplog: pytest.LogCaptureFixture) -> None:
    async with Site() as site:
        link, sink = await site.link(), Sink()
        link.on_read_done = lambda: 1 / 0  # type: ignore[assignment, return-value]
        link.open("hold", HEADERS, b"", sink)
        await until(lambda: sink.names == ["accept"])
        assert link.connected
        assert "raised" in caplog.text
