"""A raw caller of a worker, and worker processes to call."""

from __future__ import annotations

import asyncio
import itertools
import os
import random
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec

from holdfast.base.errors import HoldfastError
from holdfast.engines.contract import GenerateRequest
from holdfast.runtime.discovery.contract import Discovery, InstanceRecord
from holdfast.runtime.discovery.factory import open_discovery
from holdfast.runtime.link import Link
from holdfast.runtime.streams import StreamHandle
from holdfast.runtime.transport import TcpTransport
from holdfast.wire.frames import OpenHeaders


class Caller:
    """One stream as its caller sees it; checks order and exactly one end."""

    def __init__(self) -> None:
        self.handle: StreamHandle
        self.accepted = False
        self.index: int | None = None
        self.tokens: list[int] = []
        self.data: list[bytes] = []
        self.finish = ""
        self.error: HoldfastError | None = None
        self.cached = 0
        self.over = False
        self._news = asyncio.Event()

    def on_accept(self) -> None:
        assert not self.accepted
        self.accepted = True

    def on_tokens(self, index: int, tokens: Sequence[int], logprobs: Any) -> None:
        assert self.accepted
        assert not self.over
        if self.index is None:
            self.index = index
        assert index == self.index + len(self.tokens)
        self.tokens.extend(tokens)
        self._news.set()

    def on_data(self, index: int, payload: bytes) -> None:
        assert self.accepted
        self.data.append(bytes(payload))

    def on_refuse(self, error: HoldfastError) -> None:
        self._end("refused", error)

    def on_end(self, finish: str, error: HoldfastError | None, cached_tokens: int) -> None:
        self.cached = cached_tokens
        self._end(finish, error)

    def on_broken(self, error: HoldfastError) -> None:
        self._end("broken", error)

    def _end(self, finish: str, error: HoldfastError | None) -> None:
        assert not self.over
        self.over, self.finish, self.error = True, finish, error
        self._news.set()

    async def until(self, condition: Callable[[], bool], seconds: float = 20.0) -> None:
        async with asyncio.timeout(seconds):
            while not condition():
                self._news.clear()
                await self._news.wait()

    async def ended(self) -> Caller:
        await self.until(lambda: self.over)
        return self


_SEEDS = itertools.count()


@asynccontextmanager
async def linked(address: str, **options: Any) -> AsyncIterator[Link]:
    link = Link(TcpTransport(), address, caller="test", rng=random.Random(next(_SEEDS)), **options)
    await link.connect(10.0)
    try:
        yield link
    finally:
        await link.close()


def call(link: Link, endpoint: str, payload: bytes, **headers: Any) -> Caller:
    caller = Caller()
    caller.handle = link.open(endpoint, OpenHeaders(request_id="r", **headers), payload, caller)
    return caller


def generate(link: Link, request: GenerateRequest, **headers: Any) -> Caller:
    return call(link, "generate", msgspec.msgpack.encode(request), **headers)


async def pong(link: Link) -> Any:
    answer: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
    link.on_pong = lambda event: answer.done() or answer.set_result(event)
    link.ping()
    async with asyncio.timeout(10):
        return await answer


CHILD = """
import sys
from holdfast.engines.mock import MockConfig, MockEngine
from holdfast.health.config import CanaryConfig, SystemConfig
from holdfast.runtime.shutdown import ShutdownBudget
from holdfast.worker.config import WorkerConfig
from holdfast.worker.entry import run
config = WorkerConfig(engine="mock", file_kv={root!r}, **{worker!r})
sys.exit(run(config, lambda: MockEngine(MockConfig(**{mock!r}))))
"""


class WorkerChild:
    """A real worker process."""

    def __init__(self, argv: Sequence[str], env: dict[str, str]):
        self.process = subprocess.Popen(
            [sys.executable, *argv], stderr=subprocess.PIPE, text=True, env={**os.environ, **env}
        )

    async def exit_code(self, seconds: float = 20.0) -> int:
        return await asyncio.to_thread(self.process.wait, seconds)


@asynccontextmanager
async def worker_child(
    root: Path, worker: dict[str, Any] | None = None, *, argv: Sequence[str] = (), **mock: Any
) -> AsyncIterator[tuple[WorkerChild, InstanceRecord]]:
    discovery = open_discovery("file", root=root)
    await discovery.start()
    code = CHILD.format(root=str(root), worker=worker or {}, mock={"step_ms": 2.0, **mock})
    child = WorkerChild(argv or ("-c", code), {"DYN_FILE_KV": str(root)})
    try:
        yield child, await record_of(discovery, child.process.pid)
    finally:
        child.process.kill()
        child.process.communicate()
        await discovery.close()


async def record_of(discovery: Discovery, pid: int) -> InstanceRecord:
    changed = asyncio.Event()
    stop = discovery.subscribe(lambda _: changed.set())
    try:
        async with asyncio.timeout(20):
            while True:
                changed.clear()
                for record in discovery.snapshot():
                    if record.pid == pid:
                        return record
                await changed.wait()
    finally:
        stop()
