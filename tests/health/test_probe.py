"""One canary over real sockets: what counts as good, bad and unclear."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator, Callable
from typing import Any

import msgspec
import pytest

from holdfast.base.errors import EngineFailed, InvalidRequest, WorkerDraining, WorkerSaturated
from holdfast.engines.contract import GenerateRequest, unpack_ids
from holdfast.health.payloads import TokenHealthCheckPayload
from holdfast.health.probe import Probe, ProbeResult
from holdfast.runtime.server import WorkerServer
from holdfast.runtime.streams import IncomingCall, TokenItem
from holdfast.runtime.transport import TcpTransport

Handler = Callable[[IncomingCall], None]


def says(*tokens: int, finish: str = "length", error: Any = None) -> Handler:
    def handle(call: IncomingCall) -> None:
        call.accept()
        if tokens:
            call.connection.send_items([TokenItem(call, 0, list(tokens))])
        call.end(finish, error)

    return handle


def refuses(error: Any) -> Handler:
    return lambda call: call.refuse(error)


@contextlib.asynccontextmanager
async def probing(handler: Handler, *, epoch: int = 1, override: str = "", **more: Any) -> AsyncIterator[Probe]:
    server = WorkerServer("a" * 16, 1, rng=random.Random(1))
    server.register("generate", handler)
    address = await server.start()
    try:
        yield Probe(
            TcpTransport(),
            address,
            instance="a" * 16,
            epoch=epoch,
            payload=TokenHealthCheckPayload(None, override),
            model="m",
            rng=random.Random(2),
            **more,
        )
    finally:
        await server.close()


@pytest.mark.parametrize(
    ("handler", "kind", "words"),
    [
        (says(7), "good", ""),
        (says(7, 8, finish="stop"), "good", ""),
        (says(), "bad", "without a token"),
        (says(7, finish="abort"), "bad", "'abort'"),
        (says(7, finish="error", error=EngineFailed("CUDA error")), "bad", "engine_failed: CUDA error"),
        (says(7, finish="error", error=WorkerDraining("leaving")), "unclear", "leaving"),
        (refuses(WorkerSaturated("full")), "unclear", "full"),
        (refuses(WorkerDraining("leaving")), "unclear", "leaving"),
        (refuses(EngineFailed("dead")), "bad", "dead"),
        (refuses(InvalidRequest("token out of range")), "bad", "out of range"),
        (lambda call: call.accept(), "bad", "not over after 0.3 s (accepted, no token)"),
        (lambda call: None, "bad", "not accepted"),
    ],
)
async def test_what_a_probe_finds(handler: Handler, kind: str, words: str) -> None:
    async with probing(handler) as probe:
        result = await probe.send(0.3)
    assert result.kind == kind
    assert words in result.why


async def test_nobody_there_and_somebody_else_there() -> None:
    async with probing(says(7)) as probe:
        pass
    assert (await probe.send(1.0)).kind == "bad"
    async with probing(says(7), epoch=2) as probe:
        result = await probe.send(1.0)
    assert (result.kind, "epoch" in result.why or "instance" in result.why or "start" in result.why) == ("bad", True)


async def test_the_request_on_the_wire_and_the_ranks_in_turn() -> None:
    seen: list[GenerateRequest] = []
    told: list[tuple[str, bool]] = []

    def handle(call: IncomingCall) -> None:
        seen.append(msgspec.msgpack.decode(call.payload, type=GenerateRequest))
        assert told[-1] == (call.headers.request_id, True)
        assert call.headers.remaining_ms > 0
        says(7)(call)

    async with probing(handle, ranks=2, announce=lambda who, begins: told.append((who, begins))) as probe:
        for _ in range(3):
            assert (await probe.send(1.0)).kind == "good"
    assert [one.extra["data_parallel_rank"] for one in seen] == [0, 1, 0]
    assert {(one.model, tuple(unpack_ids(one.prompt_ids)), one.stop.max_tokens) for one in seen} == {("m", (1,), 1)}
    assert len({one.request_id for one in seen}) == 3
    assert [begins for _, begins in told] == [True, False] * 3


async def test_an_override_that_the_engine_refuses_is_given_up() -> None:
    def handle(call: IncomingCall) -> None:
        request = msgspec.msgpack.decode(call.payload, type=GenerateRequest)
        if unpack_ids(request.prompt_ids) == [99]:
            call.refuse(InvalidRequest("token 99 is out of the vocabulary"))
        else:
            says(7)(call)

    async with probing(handle, override='{"token_ids": [99]}') as probe:
        first = await probe.send(1.0)
        assert (first.kind, "out of the vocabulary" in first.why) == ("unclear", True)
        assert (await probe.send(1.0)).kind == "good"


async def test_a_cancelled_probe_closes_its_link() -> None:
    opened = asyncio.Event()

    def handle(call: IncomingCall) -> None:
        call.accept()
        opened.set()

    async with probing(handle) as probe:
        task: asyncio.Task[ProbeResult] = asyncio.create_task(probe.send(30.0))
        await asyncio.wait_for(opened.wait(), 5)
        task.cancel()
        await asyncio.wait([task])
        assert task.cancelled()
