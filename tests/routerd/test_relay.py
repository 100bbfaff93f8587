"""The endpoint ``generate`` of a real router, called over the wire: exact over a kill, cancelled, held back."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
from collections.abc import AsyncIterator

import msgspec
import pytest
import pytest_asyncio

from holdfast.base.errors import HoldfastError
from holdfast.engines.contract import GenerateRequest, Sampling, StopRules, pack_ids
from holdfast.runtime.discovery.contract import InstanceRecord
from holdfast.runtime.discovery.factory import open_discovery
from holdfast.runtime.link import Link
from holdfast.runtime.streams import Logprobs, StreamHandle
from holdfast.runtime.transport import TcpTransport
from holdfast.wire.frames import OpenHeaders
from tests.patience import within
from tests.routerd.support import MOCK, Processes, answers, metric, processes

pytestmark = [pytest.mark.e2e, pytest.mark.asyncio(loop_scope="module")]


class Stream:
    """The caller's end."""

    def __init__(self, first: int = 0) -> None:
        self.tokens: list[int] = []
        self.first = first
        self.accepted = False
        self.finish = ""
        self.error: HoldfastError | None = None
        self.over = asyncio.Event()
        self.news = asyncio.Event()
        self.handle: StreamHandle

    def on_accept(self) -> None:
        self.accepted = True

    def on_tokens(self, index: int, tokens: list[int], logprobs: Logprobs | None) -> None:
        del logprobs
        assert index == self.first + len(self.tokens), "no gap, no repeat"
        self.tokens += tokens
        self.news.set()

    def on_data(self, index: int, payload: bytes) -> None:
        raise AssertionError("messages on a token stream")

    def on_refuse(self, error: HoldfastError) -> None:
        self._end("refused", error)

    def on_end(self, finish: str, error: HoldfastError | None, cached_tokens: int) -> None:
        del cached_tokens
        self._end(finish, error)

    def on_broken(self, error: HoldfastError) -> None:
        self._end("broken", error)

    def _end(self, finish: str, error: HoldfastError | None) -> None:
        assert not self.over.is_set(), "one end"
        self.finish, self.error = finish, error
        self.over.set()
        self.news.set()

    async def until(self, tokens: int) -> None:
        async with asyncio.timeout(within(20)):
            while len(self.tokens) < tokens and not self.over.is_set():
                self.news.clear()
                await self.news.wait()

    async def end(self) -> None:
        async with asyncio.timeout(within(30)):
            await self.over.wait()


class Caller:
    """This test, connected to one router."""

    def __init__(self, running: Processes, link: Link, records: dict[str, InstanceRecord], url: str):
        self.running, self._link, self.records, self.url = running, link, records, url

    def generate(
        self, seed: int, tokens: int, *, credit: int = 0, generated: list[int] | None = None, remaining_ms: int = 0
    ) -> Stream:
        rng = random.Random(seed)
        request = GenerateRequest(
            f"r{seed}",
            "mock",
            pack_ids([rng.randrange(1000) for _ in range(100)]),
            Sampling(temperature=1.0, seed=seed),
            StopRules(max_tokens=tokens, ignore_eos=True),
            generated_ids=pack_ids(generated or []),
        )
        stream = Stream(len(generated or []))
        headers = OpenHeaders(request_id=request.request_id, remaining_ms=remaining_ms)
        payload = msgspec.msgpack.encode(request)
        stream.handle = self._link.open(
            "generate", headers, payload, stream, credit=credit, first_index=len(generated or [])
        )
        return stream

    async def worker_of(self, stream: Stream) -> int:
        """Return the pid of the worker that has work: the only one there is in these tests."""
        del stream
        for record in self.records.values():
            if record.cards and record.system_address is not None:
                busy = await metric(f"http://{record.system_address}", "holdfast_worker_running_sequences")
                if busy:
                    return record.pid
        raise AssertionError("nobody works")

    async def at_rest(self) -> None:
        async with asyncio.timeout(within(10)):
            while await metric(self.url, "holdfast_router_active_streams"):  # noqa: ASYNC110  another process
                await asyncio.sleep(0.02)


@contextlib.asynccontextmanager
async def connected(running: Processes, url: str) -> AsyncIterator[Caller]:
    discovery = open_discovery("file", root=running.env["DYN_FILE_KV"])
    await discovery.start()
    records = {record.instance: record for record in discovery.snapshot()}
    await discovery.close()
    router = next(record for record in records.values() if record.component == "router")
    link = Link(TcpTransport(), router.address, caller=f"{1:016x}", rng=random.Random(1))
    await link.connect(within(5))
    try:
        yield Caller(running, link, records, url)
    finally:
        await link.close()


@pytest_asyncio.fixture(loop_scope="module")
async def caller(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Caller]:
    async with processes(tmp_path_factory.mktemp("relay")) as running:
        for _ in range(2):
            await running.start("worker", *MOCK, "--system-port", "0")
        _, url = await running.router()
        await answers(f"{url}/health")
        async with asyncio.timeout(within(30)):
            while await metric(url, "holdfast_router_workers", state="usable") < 2:  # noqa: ASYNC110
                await asyncio.sleep(0.02)
        async with connected(running, url) as made:
            yield made


async def test_streams_survive_their_worker_and_go_on_where_the_caller_stands(caller: Caller) -> None:
    undisturbed = caller.generate(1, 200)
    await undisturbed.end()
    assert (undisturbed.finish, len(undisturbed.tokens)) == ("length", 200)
    continued = caller.generate(1, 200, generated=undisturbed.tokens[:50])
    await continued.end()
    assert continued.tokens == undisturbed.tokens[50:], "what the caller has already is not said again"
    again = caller.generate(1, 200)
    await again.until(30)
    os.kill(await caller.worker_of(again), signal.SIGKILL)
    await again.end()
    assert (again.finish, again.error) == ("length", None)
    assert again.tokens == undisturbed.tokens, "token for token"
    assert await metric(caller.url, "holdfast_router_migrations_total", outcome="resumed") == 1
    assert await metric(caller.url, "holdfast_router_streams_total", outcome="done") == 3


async def test_cancels_deadlines_and_callers_that_take_nothing(caller: Caller) -> None:
    cancelled = caller.generate(2, 100_000)
    await cancelled.until(5)
    cancelled.handle.stop()
    await cancelled.end()
    assert cancelled.finish == "cancelled"
    killed = caller.generate(3, 100_000)
    await killed.until(5)
    killed.handle.kill()
    await caller.at_rest()
    late = caller.generate(4, 100_000, remaining_ms=300)
    await late.end()
    assert late.error is not None
    assert late.error.code == "deadline_exceeded"
    slow, quick = caller.generate(5, 300, credit=10), caller.generate(6, 300)
    await quick.end()
    assert quick.finish == "length"
    assert len(slow.tokens) == 10, "not more than it has asked for"
    slow.handle.credit(1000)
    await slow.end()
    assert (slow.finish, len(slow.tokens)) == ("length", 300)
    await caller.at_rest()


async def test_what_nobody_serves_is_refused(caller: Caller) -> None:
    stream = Stream()
    request = GenerateRequest("r", "nobody's", pack_ids([1]), Sampling(), StopRules(max_tokens=1))
    caller._link.open("generate", OpenHeaders(request_id="r"), msgspec.msgpack.encode(request), stream)
    await stream.end()
    assert stream.error is not None
    assert (stream.finish, stream.error.code) == ("refused", "model_not_found")


async def test_a_router_that_leaves_hands_its_streams_back(caller: Caller) -> None:
    router = next(record for record in caller.records.values() if record.component == "router")
    stream = caller.generate(7, 100_000)
    await stream.until(5)
    os.kill(router.pid, signal.SIGTERM)
    os.kill(router.pid, signal.SIGTERM)  # hurry
    await stream.end()
    assert stream.error is not None
    assert (stream.error.code, stream.error.retry) == ("worker_draining", "elsewhere")
