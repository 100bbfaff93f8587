"""The pool with real worker processes, sockets, signals and the file backend."""

import asyncio
import contextlib
import random
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest

from holdfast.base.errors import Disconnected, PeerSilent, WorkerStalled
from holdfast.runtime.discovery.factory import open_discovery
from holdfast.runtime.pool import WorkerPool
from holdfast.runtime.transport import TcpTransport
from holdfast.wire.frames import OpenHeaders
from tests.patience import within

PROCESS = Path(__file__).with_name("worker_process.py")
TTL = 3.0
pytestmark = pytest.mark.e2e


class Stream:
    """A stream that is moved by hand: counts what came, keeps how it broke."""

    def __init__(self, worker, start=0):
        self.next, self.broken, self.broken_at, self.refused = start, None, 0.0, None
        self.handle = worker.open("generate", OpenHeaders(request_id="r"), start.to_bytes(4, "little"), self)

    def on_accept(self):
        pass

    def on_tokens(self, index, tokens, logprobs):
        assert index == self.next
        assert list(tokens) == list(range(index, index + len(tokens)))
        self.next += len(tokens)
        self.handle.credit(len(tokens))

    def on_data(self, index, payload):
        raise AssertionError("no data expected")

    def on_refuse(self, error):
        self.refused = error

    def on_end(self, finish, error, cached_tokens):
        self.broken = error

    def on_broken(self, error):
        self.broken, self.broken_at = error, time.monotonic()


async def until(condition, seconds=5.0):
    start = time.monotonic()
    while not condition():
        assert time.monotonic() - start < seconds, "the condition did not come true in time"
        await asyncio.sleep(0.005)
    return time.monotonic() - start


@contextlib.asynccontextmanager
async def worker_process(root, instance):
    process = await asyncio.create_subprocess_exec(
        sys.executable, str(PROCESS), str(root), instance, stdout=asyncio.subprocess.PIPE
    )
    try:
        assert await asyncio.wait_for(process.stdout.readline(), 15) == b"up\n"
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


@contextlib.asynccontextmanager
async def pool_over(root):
    discovery = open_discovery("file", root=root, ttl=TTL)
    await discovery.start()
    pool = WorkerPool(discovery, TcpTransport(), caller="test", rng=random.Random(1), namespace="dynamo")
    await pool.start()
    try:
        yield pool
    finally:
        await pool.close()
        await discovery.close()


def usable(pool):
    return sorted(w.instance for w in pool.usable("m"))


async def test_kill_breaks_streams_at_once_and_a_restarted_slot_is_used_again(tmp_path):
    async with pool_over(tmp_path) as pool, worker_process(tmp_path, "b"):
        async with worker_process(tmp_path, "a") as process:
            await until(lambda: usable(pool) == ["a", "b"])
            stream = Stream(pool.worker("a"))
            await until(lambda: stream.next > 5)
            killed = time.monotonic()
            process.kill()
            await until(lambda: stream.broken is not None)
            assert stream.broken_at - killed < within(0.1)
            assert isinstance(stream.broken, Disconnected)
            assert usable(pool) == ["b"]
            await until(lambda: pool.worker("a") is None)
            moved = Stream(pool.worker("b"), stream.next)
            await until(lambda: moved.next > stream.next + 5)
        async with worker_process(tmp_path, "a"):
            assert await until(lambda: usable(pool) == ["a", "b"]) < within(1.0)


async def test_a_frozen_worker_is_found_in_time_and_serves_again_after_it_thaws(tmp_path):
    async with pool_over(tmp_path) as pool, worker_process(tmp_path, "a") as process, worker_process(tmp_path, "b"):
        await until(lambda: usable(pool) == ["a", "b"])
        stream = Stream(pool.worker("a"))
        await until(lambda: stream.next > 20)
        frozen = time.monotonic()
        process.send_signal(signal.SIGSTOP)
        await until(lambda: stream.broken is not None)
        assert 1.0 < stream.broken_at - frozen < within(2.2)
        assert isinstance(stream.broken, PeerSilent)
        assert usable(pool) == ["b"]
        stopped_at = stream.next
        await asyncio.sleep(2.5 * TTL)
        assert pool.worker("a").listed is False, "its lease has ended"
        process.send_signal(signal.SIGCONT)
        assert await until(lambda: usable(pool) == ["a", "b"]) < within(2.0)
        await until(lambda: pool.worker("a").listed)
        assert stream.next == stopped_at, "its late words are dropped"
        again = Stream(pool.worker("a"), stopped_at)
        await until(lambda: again.next > stopped_at + 5)
        assert pool.worker("a").progress.in_flight <= 1, "the abandoned stream was stopped"


async def test_a_hung_engine_in_a_live_process_is_found_and_comes_back(tmp_path):
    async with pool_over(tmp_path) as pool, worker_process(tmp_path, "a") as process, worker_process(tmp_path, "b"):
        await until(lambda: usable(pool) == ["a", "b"])
        stream = Stream(pool.worker("a"))
        await until(lambda: stream.next > 20)
        hung = time.monotonic()
        process.send_signal(signal.SIGUSR1)
        await until(lambda: stream.broken is not None, 10)
        assert 4.5 < stream.broken_at - hung < within(7.0)
        assert isinstance(stream.broken, WorkerStalled)
        assert usable(pool) == ["b"]
        process.send_signal(signal.SIGUSR2)
        await until(lambda: usable(pool) == ["a", "b"], 8)
        assert not pool.worker("a").hesitant, "somebody has to prove that it works again"
        again = Stream(pool.worker("a"))
        assert pool.worker("a").hesitant, "one at a time"
        await until(lambda: again.next > 50)
        await until(lambda: not pool.worker("a").hesitant)


async def test_sigterm_drains_and_is_told_apart_from_a_crash(tmp_path):
    async with pool_over(tmp_path) as pool, worker_process(tmp_path, "a") as process:
        await until(lambda: usable(pool) == ["a"])
        assert pool.replacement_expected("m")
        process.send_signal(signal.SIGTERM)
        assert await until(lambda: usable(pool) == []) < within(0.5)
        await until(lambda: pool.worker("a") is None)
        assert not pool.replacement_expected("m")
        assert await pool.wait_usable("m", 5) == []


async def test_a_busy_worker_under_load_is_never_ejected(tmp_path):
    async with pool_over(tmp_path) as pool, worker_process(tmp_path, "a"):
        await until(lambda: usable(pool) == ["a"])
        events = []
        pool.subscribe(lambda kind, worker: events.append(worker.state) if kind == "state" else None)
        streams = [Stream(pool.worker("a")) for _ in range(200)]
        await asyncio.sleep(4)
        assert events == []
        assert min(s.next for s in streams) > 20


async def test_a_slow_worker_is_not_ejected_and_our_own_pauses_are_blamed_on_nobody(tmp_path):
    async with pool_over(tmp_path) as pool, worker_process(tmp_path, "a") as slow, worker_process(tmp_path, "b"):
        await until(lambda: usable(pool) == ["a", "b"])
        streams = [Stream(pool.worker("a")), Stream(pool.worker("b"))]
        events = []
        pool.subscribe(lambda kind, worker: events.append((worker.instance, worker.state)) if kind == "state" else None)
        slow.send_signal(signal.SIGHUP)
        await asyncio.sleep(4)
        for _ in range(2):
            time.sleep(2.5)  # noqa: ASYNC251  our own loop is to be stuck
            await asyncio.sleep(0.3)
        await asyncio.sleep(1)
        assert events == []
        assert [s.broken for s in streams] == [None, None]


async def test_losing_the_discovery_directory_disturbs_no_stream(tmp_path):
    root = tmp_path / "kv"
    async with pool_over(root) as pool, worker_process(root, "a"), worker_process(root, "b"):
        await until(lambda: usable(pool) == ["a", "b"])
        stream = Stream(pool.worker("a"))
        shutil.rmtree(root)
        await until(lambda: not pool.discovery_reachable)
        assert usable(pool) == ["a", "b"]
        before = stream.next
        await until(lambda: stream.next > before + 10)
        await until(lambda: pool.discovery_reachable and len(list(root.iterdir())) == 2)
        await asyncio.sleep(0.5)
        assert usable(pool) == ["a", "b"]
        assert stream.broken is None
