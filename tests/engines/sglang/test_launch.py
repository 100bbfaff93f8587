"""Starting and ending what stands for SGLang: its processes, its failures, its way to say that a child has failed."""

from __future__ import annotations

import asyncio
import logging
import multiprocessing
import os
import signal
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from holdfast.base.errors import EngineFailed
from holdfast.base.settings import InvalidSetting
from holdfast.engines.sglang import SglangConfig
from holdfast.engines.sglang import engine as engine_module
from holdfast.engines.sglang import launch as module
from holdfast.engines.sglang.launch import Launch, Sockets, _logging_kept
from tests.engines.sglang.harness import lives
from tests.patience import within


class Deaths:
    def __init__(self):
        self.told = []
        self.news = asyncio.Event()

    def __call__(self, error):
        self.told.append(error)
        self.news.set()

    async def one(self):
        async with asyncio.timeout(within(2.0)):
            await self.news.wait()
        return self.told[0]


@pytest.fixture
def child(monkeypatch):
    """A process in place of the scheduler; returns a list with its pid once it is started."""
    found = []

    def start(argv):
        process = multiprocessing.get_context("spawn").Process(target=time.sleep, args=(600,))
        process.start()
        found.append((process.pid, threading.current_thread()))
        return SimpleNamespace(get_all_child_pids=lambda: [process.pid])

    monkeypatch.setattr(module, "_start", start)
    return found


async def begun():
    deaths = Deaths()
    launch = Launch(["--x"], deaths)
    await launch.start()
    return launch, deaths


async def test_a_process_that_dies_is_told_once_and_soon(child):
    launch, deaths = await begun()
    ((pid, _),) = child
    assert launch.pids == (pid,)
    os.kill(pid, signal.SIGKILL)
    error = await deaths.one()
    assert isinstance(error, EngineFailed)
    assert str(pid) in error.message
    await launch.end()
    assert len(deaths.told) == 1


async def test_ending_kills_and_collects_tells_of_no_death_and_lets_the_thread_go(child):
    launch, deaths = await begun()
    ((pid, thread),) = child
    assert thread.is_alive(), "children die with the thread that started them"
    await launch.end()
    await launch.end()
    assert not lives(pid)
    thread.join(within(2.0))
    assert not thread.is_alive()
    assert deaths.told == []


async def test_a_child_that_reports_its_failure_counts_as_dead(child):
    launch, deaths = await begun()
    os.kill(os.getpid(), signal.SIGQUIT)
    assert "traceback" in (await deaths.one()).message
    await launch.end()


@pytest.mark.parametrize(
    ("raised", "error", "words"),
    [
        (SystemExit(2), InvalidSetting, "flags"),
        (RuntimeError("Rank 0 scheduler died"), EngineFailed, "Rank 0 scheduler died"),
        (EngineFailed("SGLang cannot be loaded"), EngineFailed, "cannot be loaded"),
    ],
)
async def test_a_start_that_fails_says_why(monkeypatch, raised, error, words):
    def start(argv):
        raise raised

    monkeypatch.setattr(module, "_start", start)
    launch = Launch([], Deaths())
    with pytest.raises(error, match=words):
        await launch.start()
    await launch.end()


async def test_without_sglang_the_error_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "sglang", None)
    launch = Launch([], Deaths())
    with pytest.raises(EngineFailed, match=r"holdfast\[sglang\]"):
        await launch.start()
    await launch.end()


def test_the_root_logger_stays_as_it_was():
    root = logging.getLogger()
    before = (list(root.handlers), root.level)
    with _logging_kept():
        logging.basicConfig(level=logging.DEBUG, force=True)
    assert (list(root.handlers), root.level) == before


def test_sockets_lie_in_a_directory_that_is_ours_alone():
    sockets = Sockets()
    place = sockets.events().removeprefix("ipc://").rpartition("/")[0]
    assert Path(place).stat().st_mode & 0o777 == 0o700
    assert "inproc" in sockets.events(), "SGLang numbers the ranks of such names only"
    assert sockets.replay(1).endswith("_dp1")
    sockets.close()
    assert not Path(place).exists()


async def test_a_death_while_it_starts_ends_the_start(monkeypatch):
    """Its front half would wait for the scheduler's answer for ever."""

    class Dying(Launch):
        async def start(self):
            self._loop.call_soon(self._on_death, EngineFailed("SGLang's process 7 is gone."))
            await asyncio.Event().wait()

    monkeypatch.setattr(engine_module, "Launch", Dying)
    monkeypatch.setattr(engine_module, "locate", lambda name: Path("/m"))
    monkeypatch.setattr(engine_module, "read_directory", lambda path: SimpleNamespace(hidden_size=1, text=None))
    engine = engine_module.SglangEngine(SglangConfig(model="m"))
    deaths = Deaths()
    async with asyncio.timeout(within(5.0)):
        with pytest.raises(EngineFailed, match="process 7"):
            await engine.start(lambda steps: None, deaths, lambda what, share: None)
    assert deaths.told == [], "an engine that never started does not die"
    assert asyncio.current_task().cancelling() == 0
    await engine.close()
