"""Stopped and slowed processes, and views of the discovery directory."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
import sys
import time
from collections.abc import AsyncIterator, Coroutine
from pathlib import Path
from typing import Any

import pytest

from holdfast.base.errors import HoldfastError
from holdfast.base.ids import draw_epoch, draw_instance_id
from holdfast.chaos.orders import order
from holdfast.chaos.stopping import frozen, send, slowed
from holdfast.chaos.views import View
from holdfast.engines.mock.config import MockConfig
from holdfast.engines.mock.engine import MockEngine
from holdfast.runtime.discovery.contract import InstanceRecord
from holdfast.runtime.discovery.factory import open_discovery
from holdfast.runtime.discovery.mem import MemDiscovery, MemHub
from holdfast.worker.config import WorkerConfig
from holdfast.worker.process import WorkerProcess
from tests.patience import within

COUNTS = "import sys, time\nwhile True:\n    sys.stdout.write('.')\n    sys.stdout.flush()\n    time.sleep(0.001)\n"


@contextlib.asynccontextmanager
async def counting() -> AsyncIterator[asyncio.subprocess.Process]:
    """A process that writes a dot every millisecond."""
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", COUNTS, stdout=asyncio.subprocess.PIPE)
    assert process.stdout is not None
    try:
        await process.stdout.readexactly(1)
        yield process
    finally:
        process.kill()
        while await process.stdout.read(65_536):
            pass
        await process.wait()


def state(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


async def until_state(pid: int, wanted: str) -> None:
    async with asyncio.timeout(within(2.0)):
        while (state(pid) == "T") != (wanted == "T"):  # noqa: ASYNC110  another process has no event
            await asyncio.sleep(0.005)


async def test_frozen_for_a_while() -> None:
    async with counting() as process:
        freezing = asyncio.ensure_future(frozen(process.pid, 0.3))
        await until_state(process.pid, "T")
        await freezing
        await until_state(process.pid, "S")


async def test_a_cancelled_freeze_leaves_nobody_stopped() -> None:
    async with counting() as process:
        freezing = asyncio.ensure_future(frozen(process.pid, 60.0))
        await until_state(process.pid, "T")
        freezing.cancel()
        await asyncio.wait([freezing])
        await until_state(process.pid, "S")


async def test_slowed() -> None:
    """Ten times slower, it does clearly less; afterwards it runs."""
    async with counting() as process:
        assert process.stdout is not None
        reader = process.stdout

        async def dots(seconds: float) -> int:
            number = 0
            end = time.monotonic() + seconds
            while (left := end - time.monotonic()) > 0:
                with contextlib.suppress(TimeoutError):
                    number += len(await asyncio.wait_for(reader.read(65_536), left))
            return number

        slowing = asyncio.ensure_future(slowed(process.pid, 10.0, 1.2))
        await dots(0.2)
        slow = await dots(1.0)
        await slowing
        await until_state(process.pid, "S")
        assert slow < await dots(1.0)


async def test_a_process_that_is_gone() -> None:
    async with counting() as process:
        pid = process.pid
    assert not send(pid, signal.SIGCONT)
    await asyncio.wait_for(slowed(pid, 4.0, 30.0), within(1.0))


def record(instance: str) -> InstanceRecord:
    return InstanceRecord(
        namespace="test",
        component="backend",
        endpoints=("generate",),
        instance=instance,
        epoch=draw_epoch(random.Random(1)),
        address="127.0.0.1:1",
        pid=os.getpid(),
    )


async def test_views(tmp_path: Path) -> None:
    """Production's own discovery through a view: the truth, a part, an old state, an outage, and the truth again."""
    real = tmp_path / "real"
    real.mkdir(mode=0o700)
    first, second, third = (draw_instance_id(random.Random(i)) for i in range(3))
    view = View(tmp_path / "seen", real)
    worker = open_discovery("file", root=real)
    frontend = open_discovery("file", root=view.path)
    await worker.start()
    await frontend.start()

    @contextlib.asynccontextmanager
    async def elsewhere(fault: Coroutine[Any, Any, None]) -> AsyncIterator[None]:
        """While a fault lasts; it ends with the block."""
        lasting = asyncio.ensure_future(fault)
        async with asyncio.timeout(within(3.0)):
            while view.path.readlink() == real:  # noqa: ASYNC110  a link has no event
                await asyncio.sleep(0.005)
        yield
        lasting.cancel()
        await asyncio.wait([lasting])
        assert view.path.readlink() == real

    async def sees(*wanted: str) -> None:
        async with asyncio.timeout(within(3.0)):
            while {one.instance for one in frontend.snapshot()} != set(wanted):  # noqa: ASYNC110  nor has a snapshot
                await asyncio.sleep(0.01)

    try:
        await worker.publish(record(first))
        await worker.publish(record(second))
        await sees(first, second)
        async with elsewhere(view.partial({second}, 60.0)):
            assert {path.stem for path in view.path.iterdir()} == {first}
            await worker.publish(record(third))
            await sees(first, second, third)  # one that vanishes without a word is kept for a while
        async with elsewhere(view.stale(60.0)):
            await worker.withdraw(third)
            assert f"{third}.json" in {path.name for path in view.path.iterdir()}
        await sees(first, second)
        async with elsewhere(view.outage(60.0)):
            with pytest.raises(OSError, match="directory"):
                next(view.path.iterdir())
            with pytest.raises(OSError, match=r"exists|directory"):
                view.path.mkdir(parents=True, exist_ok=True)
        await sees(first, second)
    finally:
        await frontend.close()
        await worker.close()


async def test_orders() -> None:
    """A mock engine obeys over its worker's endpoint; what it does not know it refuses; a dead one is not reached."""
    rng = random.Random(3)
    config = WorkerConfig(engine="mock", secret="quiet")
    worker = WorkerProcess(config, MockEngine(MockConfig(step_ms=1)), MemDiscovery(MemHub()), rng)
    running = asyncio.ensure_future(worker.run())
    await asyncio.wait_for(worker.ready.wait(), within(10.0))
    address = worker.server.address
    try:
        answer = await order(address, {"do": "hang", "seconds": 0.01}, rng=rng, secret=b"quiet", timeout=within(1.0))
        assert answer["ok"]
        with pytest.raises(HoldfastError, match="do"):
            await order(address, {"do": "dance"}, rng=rng, secret=b"quiet", timeout=within(1.0))
        with pytest.raises(HoldfastError):
            await order(address, {"do": "clear"}, rng=rng, secret=b"loud", timeout=within(1.0))
    finally:
        worker.stop()
        await running
    with pytest.raises(HoldfastError):
        await order(address, {"do": "clear"}, rng=rng, timeout=within(1.0))
