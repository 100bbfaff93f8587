"""Escapes: whatever reaches for the real world is caught where it happens."""
# ruff: noqa: PLW0108  the functions are replaced while a universe runs: they must be looked up then

from __future__ import annotations

import asyncio
import datetime
import logging
import os
import random
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
import types
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import pytest

from holdfast.sim.guard import Escape, ensure_hash_seed
from holdfast.sim.loop import WALL_START
from tests.sim.worlds import done, passes, universe

WAYS_OUT: dict[str, Callable[[], Any]] = {
    "time.time": lambda: time.time(),
    "socket.socket": lambda: socket.socket(),
    "socket.create_connection": lambda: socket.create_connection(("127.0.0.1", 1)),
    "socket.socketpair": lambda: socket.socketpair(),
    "socket.getaddrinfo": lambda: socket.getaddrinfo("localhost", 1),
    "threading.Thread.start": lambda: threading.Thread(target=print).start(),
    "time.monotonic": lambda: time.monotonic(),
    "time.monotonic_ns": lambda: time.monotonic_ns(),
    "time.perf_counter": lambda: time.perf_counter(),
    "time.time_ns": lambda: time.time_ns(),
    "time.sleep": lambda: time.sleep(0),
    "random.random": lambda: random.random(),
    "random.shuffle": lambda: random.shuffle([1, 2]),
    "random.choice": lambda: random.choice([1]),
    "random.Random() without a seed": lambda: random.Random(),
    "SystemRandom.random": lambda: random.SystemRandom().random(),
    "SystemRandom.getrandbits": lambda: random.SystemRandom().getrandbits(3),
    "os.urandom": lambda: os.urandom(1),
    "os.kill": lambda: os.kill(os.getpid(), 0),
    "os._exit": lambda: os._exit(3),
    "os.fork": lambda: os.fork(),
    "subprocess.Popen": lambda: subprocess.run(["true"], check=False),
    "signal.signal": lambda: signal.signal(signal.SIGUSR1, signal.SIG_IGN),
    "signal.raise_signal": lambda: signal.raise_signal(signal.SIGTERM),
    "uuid.uuid4": lambda: uuid.uuid4(),
    "uuid.uuid1": lambda: uuid.uuid1(),
}
INDIRECT: dict[str, Callable[[], Any]] = {
    "a pool of threads": lambda: ThreadPoolExecutor(1).submit(print),
    "secrets": lambda: secrets.token_hex(4),
    "secrets.randbelow": lambda: secrets.randbelow(4),
    "SystemRandom.randbytes": lambda: random.SystemRandom().randbytes(4),
    "a timer thread": lambda: threading.Timer(1, print).start(),
}


@pytest.mark.parametrize("what", [*WAYS_OUT, *INDIRECT])
def test_every_way_out_is_caught_where_it_is_taken(what: str) -> None:
    planted = WAYS_OUT.get(what) or INDIRECT[what]
    with universe() as world:
        world.boot("a").post(planted)
        with pytest.raises(Escape) as caught:
            world.run()
    if what in WAYS_OUT:
        assert caught.value.what == what
    assert f"{__file__}:{planted.__code__.co_firstlineno}" == caught.value.where


@pytest.mark.parametrize("what", ["time.time", "os.urandom", "socket.socket"])
def test_swallowing_does_not_help(what: str) -> None:
    async def swallow() -> None:
        with suppress(BaseException):
            WAYS_OUT[what]()
        await asyncio.sleep(1)

    with universe() as world:
        world.boot("a").spawn(swallow(), "s")
        with pytest.raises(Escape):
            world.run()
        assert world.now() == 0.0, "at once, not a second later"


async def dials() -> None:
    await asyncio.open_connection("127.0.0.1", 1)


async def listens() -> None:
    await asyncio.start_server(lambda _r, _w: None, "127.0.0.1", 0)


async def runs_a_program() -> None:
    await asyncio.create_subprocess_exec("true")


async def handles_signals() -> None:
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, print)


async def watches_a_file() -> None:
    asyncio.get_running_loop().add_reader(0, print)


async def resolves_a_name() -> None:
    await asyncio.get_running_loop().getaddrinfo("localhost", 1)


@pytest.mark.parametrize(
    "way",
    [dials, listens, runs_a_program, handles_signals, watches_a_file, resolves_a_name],
    ids=lambda way: way.__name__,
)
def test_what_other_loops_can_do_is_an_escape_here(way: Callable[[], Any]) -> None:
    with universe() as world:
        world.boot("a").spawn(way(), "s")
        with pytest.raises(Escape, match=r"loop\.") as caught:
            world.run()
        assert caught.value.where == f"{__file__}:{way.__code__.co_firstlineno + 1}"


def test_outside_a_run_everything_is_as_it_was() -> None:
    before = {what: getattr(module, name) for module, name, what in places()}
    with universe() as world:
        world.boot("a").spawn(asyncio.sleep(1), "s")
        world.run()
        assert {what: getattr(module, name) for module, name, what in places()} == before
        with suppress(Escape):
            world.boot("b").post(WAYS_OUT["time.time"])
            world.run()
    assert {what: getattr(module, name) for module, name, what in places()} == before
    assert random.Random().random() != random.Random().random()
    assert "__init__" in vars(socket.socket)


def places() -> list[tuple[Any, str, str]]:
    from holdfast.sim import guard  # noqa: PLC0415

    return [*guard._CLOSED, (random.Random, "seed", "seed"), (logging, "time", "logging.time")]


def test_seeded_generators_are_welcome() -> None:
    async def draw() -> float:
        return random.Random("seed").random()

    with universe() as world:
        assert done(world, world.boot("a").spawn(draw(), "d")) == random.Random("seed").random()


def test_log_records_carry_virtual_calendar_time_and_do_not_escape(caplog: pytest.LogCaptureFixture) -> None:
    with universe() as world:
        host = world.boot("a")
        passes(world, 10.0)
        host.wall_offset = 100.0
        host.post(logging.getLogger("planted").warning, "hello")
        world.run()
    assert caplog.records[0].created == WALL_START + 110.0


def planted_module(name: str, source: str) -> types.ModuleType:
    module = types.ModuleType(name)
    sys.modules[name] = module
    exec(compile(source, f"{name}.py", "exec"), module.__dict__)
    return module


def test_names_that_our_modules_have_borrowed_are_caught_too() -> None:
    module = planted_module(
        "holdfast.planted", "from time import monotonic\nfrom datetime import datetime\n"
        "def clock(): return monotonic()\ndef calendar(): return datetime.now()\n"
        "import time\nclass Watch:\n    def __init__(self, *, clock=time.monotonic_ns): clock()\n"
        "def measure(clock=time.perf_counter): return clock()\n"
    )  # fmt: skip
    try:
        for name in ("clock", "calendar", "Watch", "measure"):
            with universe() as world:
                world.boot("a").post(getattr(module, name))
                with pytest.raises(Escape, match=r"planted\.py"):
                    world.run()
        assert module.monotonic is time.monotonic
        assert module.measure.__defaults__ == (time.perf_counter,)
        assert module.measure() > 0
        assert module.datetime is datetime.datetime
    finally:
        del sys.modules["holdfast.planted"]


def test_modules_that_print_calendar_time_get_their_hosts(monkeypatch: pytest.MonkeyPatch) -> None:
    module = planted_module(
        "holdfast.planted", "import time\nfrom datetime import datetime\n"
        "async def read(): return time.time(), time.time_ns(), datetime.now()\n"
    )  # fmt: skip
    monkeypatch.setattr("holdfast.sim.guard.CALENDAR_READERS", frozenset({"holdfast.planted"}))
    try:
        with universe() as world:
            host = world.boot("a")
            host.wall_offset = -50.0
            passes(world, 10.0)
            now, nanoseconds, moment = done(world, host.spawn(module.read(), "r"))
    finally:
        del sys.modules["holdfast.planted"]
    assert now == WALL_START - 40.0
    assert nanoseconds == now * 1e9
    assert moment == datetime.datetime.fromtimestamp(now, datetime.UTC).replace(tzinfo=None)
    assert isinstance(moment, datetime.datetime)


def test_the_hash_seed_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONHASHSEED", "0")
    ensure_hash_seed(again=False)
    monkeypatch.delenv("PYTHONHASHSEED")
    with pytest.raises(RuntimeError, match="PYTHONHASHSEED=0"):
        ensure_hash_seed(again=False)


def test_a_program_starts_itself_anew_with_a_pinned_hash_seed() -> None:
    program = (
        "import os, sys\nfrom holdfast.sim.guard import ensure_hash_seed\nensure_hash_seed()\n"
        "print(os.environ['PYTHONHASHSEED'], sys.argv[1:])"
    )
    env = {name: value for name, value in os.environ.items() if name != "PYTHONHASHSEED"}
    command = [sys.executable, "-c", program, "one", "two"]
    told = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    assert told.stdout.strip() == "0 ['one', 'two']"
