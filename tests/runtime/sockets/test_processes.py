"""Real processes that are killed or frozen."""

import asyncio
import random
import signal
import sys
from asyncio.subprocess import PIPE, Process
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from holdfast.base.errors import Disconnected
from holdfast.runtime.link import Link
from holdfast.runtime.server import ServerSettings
from holdfast.runtime.transport import TcpTransport
from holdfast.wire.frames import OpenHeaders
from tests.patience import within
from tests.runtime.sockets.wiring import Site, until
from tests.wire.pairs import Sink

pytestmark = pytest.mark.e2e
ROOT = Path(__file__).parents[3]


@asynccontextmanager
async def peer(*arguments: str) -> Any:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "tests.runtime.sockets.peer", *arguments, stdout=PIPE, cwd=ROOT
    )
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


async def line(process: Process) -> str:
    assert process.stdout is not None
    return (await asyncio.wait_for(process.stdout.readline(), 15.0)).decode().strip()


async def test_kill_nine_of_the_worker_breaks_every_stream_at_once() -> None:
    loop = asyncio.get_running_loop()
    async with peer("worker") as process:
        link = Link(TcpTransport(), await line(process), caller="t", rng=random.Random(1))
        await link.connect(5.0)
        sinks, lost = [Sink() for _ in range(50)], list[float]()
        link.on_lost = lambda _: lost.append(loop.time())
        for sink in sinks:
            link.open("count", OpenHeaders(), b"", sink, first_index=0)
        await until(lambda: all(len(sink.tokens) > 5 for sink in sinks))
        killed = loop.time()
        process.send_signal(signal.SIGKILL)
        await until(lambda: lost)
        assert lost[0] - killed < within(0.5)
        assert all(isinstance(sink.error, Disconnected) for sink in sinks)
        assert all(sink.tokens == list(range(len(sink.tokens))) for sink in sinks)


async def test_a_frozen_caller_loses_its_streams_and_learns_of_it_when_it_wakes() -> None:
    loop = asyncio.get_running_loop()
    async with Site(settings=ServerSettings(silence_bound=0.6)) as site, peer("caller", site.server.address) as process:
        assert await line(process) == "open"
        await until(lambda: site.calls)
        process.send_signal(signal.SIGSTOP)
        frozen = loop.time()
        await until(lambda: site.stops)
        assert site.stops == [(1, "caller_lost")]
        assert 0.4 < loop.time() - frozen < within(3.0)
        process.send_signal(signal.SIGCONT)
        assert await line(process) == "lost"
