"""The watch over an engine: by its processes, by its own check, and never by its word alone."""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
import sys
from collections.abc import AsyncIterator

from holdfast.base.errors import EngineFailed, HoldfastError
from holdfast.health.config import CanaryConfig
from holdfast.health.engine_watch import CHECK_FAILURES, EngineWatch
from tests.patience import within
from tests.worker.doubles import ScriptEngine


class Checked(ScriptEngine):
    def __init__(self) -> None:
        super().__init__()
        self.error: Exception | None = None
        self.checks = 0
        self.stuck = False
        self.pids: tuple[int, ...] = ()

    def child_pids(self) -> tuple[int, ...]:
        return self.pids

    async def check(self) -> None:
        self.checks += 1
        if self.stuck:
            await asyncio.sleep(60)
        if self.error is not None:
            raise self.error


@contextlib.asynccontextmanager
async def watched(engine: Checked, **config: float) -> AsyncIterator[asyncio.Future[HoldfastError]]:
    death: asyncio.Future[HoldfastError] = asyncio.get_running_loop().create_future()
    settings = CanaryConfig(**{"engine_health_check_interval": 0.02, **config})  # type: ignore[arg-type]
    task = asyncio.create_task(EngineWatch(engine, death.set_result, settings).run())
    try:
        yield death
    finally:
        task.cancel()
        await asyncio.wait([task])


def sleeper() -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])


async def test_a_sound_engine_is_left_alone() -> None:
    engine = Checked()
    async with watched(engine) as death, asyncio.timeout(5):
        while engine.checks < 5:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        assert not death.done()


async def test_the_engines_own_word_is_believed_when_it_says_dead() -> None:
    engine = Checked()
    async with watched(engine) as death:
        engine.error = EngineFailed("out of memory")
        assert (await asyncio.wait_for(death, 1)).message == "out of memory"


async def test_a_check_that_does_not_answer_is_death() -> None:
    engine = Checked()
    async with watched(engine, engine_health_check_timeout=0.1) as death:
        engine.stuck = True
        assert "within 0.1 s" in (await asyncio.wait_for(death, 2)).message


async def test_a_check_that_raises_nonsense_gets_some_chances() -> None:
    engine = Checked()
    async with watched(engine) as death:
        engine.error = KeyError("x")
        await asyncio.wait_for(death, 2)
        assert engine.checks >= CHECK_FAILURES


async def test_the_death_of_a_child_process_is_seen_at_once_whatever_the_engine_says() -> None:
    engine = Checked()
    child = sleeper()
    engine.pids = (child.pid,)
    try:
        async with watched(engine, engine_health_check_interval=0.05) as death:
            await asyncio.sleep(0.2)
            assert not death.done()
            began = asyncio.get_running_loop().time()
            child.kill()
            error = await asyncio.wait_for(death, 2)
            assert asyncio.get_running_loop().time() - began < within(0.5)
            assert f"process {child.pid} is gone" in error.message
    finally:
        child.kill()
        child.wait()
    async with watched(engine) as death:
        assert f"process {child.pid} is gone" in (await asyncio.wait_for(death, 2)).message


async def test_a_child_that_the_engine_replaced_is_forgotten() -> None:
    engine = Checked()
    child = sleeper()
    engine.pids = (child.pid,)
    try:
        async with watched(engine) as death:
            await asyncio.sleep(0.1)
            engine.pids = ()
            await asyncio.sleep(0.1)
            child.kill()
            child.wait()
            await asyncio.sleep(0.1)
            assert not death.done()
    finally:
        child.kill()
        child.wait()
