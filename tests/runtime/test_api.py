"""The public interface: serve an endpoint, call it, cancel it, shut it down; typed errors all the way."""

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from holdfast.base.errors import (
    Cancelled,
    EngineFailed,
    HoldfastError,
    InvalidRequest,
    NoWorkers,
    PeerSilent,
    WorkerDraining,
    WorkerSaturated,
)
from holdfast.runtime.api import Context, DistributedRuntime
from holdfast.runtime.discovery.mem import MemDiscovery, MemHub
from tests.runtime.sockets.wiring import until

PATH = "test.backend.generate"
EXAMPLES = Path(__file__).parents[2] / "examples"


class Fleet:
    """Workers and a caller that meet in one hub."""

    def __init__(self) -> None:
        self.hub = MemHub()
        self.tasks: list[asyncio.Task[None]] = []
        self.runtimes: list[DistributedRuntime] = []
        self.caller = self.runtime()

    def runtime(self) -> DistributedRuntime:
        self.runtimes.append(DistributedRuntime(MemDiscovery(self.hub)))
        return self.runtimes[-1]

    async def serve(self, handler: Any, path: str = PATH, **more: Any) -> DistributedRuntime:
        runtime = self.runtime()
        self.tasks.append(asyncio.ensure_future(runtime.endpoint(path).serve_endpoint(handler, **more)))
        await until(lambda: runtime.server.address and runtime.instance in self.hub.records)
        return runtime

    async def client(self, instances: int = 1, **more: Any) -> Any:
        client = await self.caller.endpoint(PATH).client(**more)
        await client.wait_for_instances(5.0)
        await until(lambda: len(client.instance_ids()) == instances)
        return client

    async def __aenter__(self) -> "Fleet":
        return self

    async def __aexit__(self, *_: object) -> None:
        for runtime in reversed(self.runtimes):
            await runtime.shutdown(0.0)
        async with asyncio.timeout(5.0):
            await asyncio.gather(*self.tasks, return_exceptions=True)


class Recorder:
    """A handler that counts, until told to stop, and remembers how it ended."""

    def __init__(self, limit: int = 10**9, pause: float = 0.001):
        self.limit, self.pause = limit, pause
        self.contexts: list[Context] = []
        self.ended: list[str] = []

    async def __call__(self, request: Any, context: Context) -> AsyncIterator[Any]:
        self.contexts.append(context)
        how = "done"
        try:
            for number in range(self.limit):
                if context.is_stopped() and not request.get("stubborn"):
                    how = "stopped"
                    return
                yield {"n": number, "echo": request}
                await asyncio.sleep(self.pause)
        except (asyncio.CancelledError, GeneratorExit):
            how = "cancelled"
            raise
        finally:
            self.ended.append(how)


async def test_a_call_from_end_to_end() -> None:
    async with Fleet() as fleet:
        recorder = Recorder(limit=200, pause=0)
        await fleet.serve(recorder)
        client = await fleet.client()
        context = Context("my-id")
        stream = await client.generate({"q": [1, "two", None, 3.5]}, context=context)
        items = [item async for item in stream]
        assert [item["n"] for item in items] == list(range(200))
        assert items[0]["echo"] == {"q": [1, "two", None, 3.5]}
        assert recorder.contexts[0].id() == "my-id"
        assert stream.instance == client.instance_ids()[0]


async def test_a_handler_without_context() -> None:
    async def echo(request: Any) -> AsyncIterator[Any]:
        yield request

    async with Fleet() as fleet:
        await fleet.serve(echo)
        client = await fleet.client()
        assert [item async for item in await client.generate("x" * 200_000)] == ["x" * 200_000]


async def test_stopping_the_parent_context_stops_the_remote_call() -> None:
    async with Fleet() as fleet:
        recorder = Recorder()
        await fleet.serve(recorder)
        client = await fleet.client()
        parent = Context("parent")
        stream = await client.generate({}, context=parent.child())
        assert (await anext(stream))["n"] == 0
        parent.stop()
        async with asyncio.timeout(5.0):
            async for _ in stream:
                pass
        assert recorder.ended == ["stopped"]
        assert recorder.contexts[0].is_stopped()
        assert not recorder.contexts[0].is_killed()


async def test_a_handler_that_ignores_a_stop_is_cancelled() -> None:
    async with Fleet() as fleet:
        recorder = Recorder()
        await fleet.serve(recorder, stop_grace=0.1)
        client = await fleet.client()
        context = Context("c")
        stream = await client.generate({"stubborn": True}, context=context)
        await anext(stream)
        context.stop()
        async with asyncio.timeout(5.0):
            async for _ in stream:
                pass
        await until(lambda: recorder.ended == ["cancelled"])


async def test_killing_the_context_ends_both_sides_at_once() -> None:
    async with Fleet() as fleet:
        recorder = Recorder()
        await fleet.serve(recorder)
        client = await fleet.client()
        context = Context("c")
        stream = await client.generate({}, context=context)
        context.kill()
        with pytest.raises(Cancelled):
            async for _ in stream:
                pass
        await until(lambda: recorder.ended == ["cancelled"])
        assert recorder.contexts[0].is_killed()


@pytest.mark.parametrize("way", ["aclose", "with", "cancel"])
async def test_leaving_early_kills_the_call(way: str) -> None:
    async with Fleet() as fleet:
        recorder = Recorder(pause=0.01)
        await fleet.serve(recorder)
        client = await fleet.client()
        stream = await client.generate({})
        await anext(stream)
        if way == "aclose":
            await stream.aclose()
        elif way == "with":
            async with stream:
                pass
        else:

            async def read() -> None:
                async for _ in stream:
                    pass

            reading = asyncio.ensure_future(read())
            await asyncio.sleep(0.02)
            reading.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await reading
        await until(lambda: recorder.ended == ["cancelled"])


async def test_a_slow_reader_holds_the_handler_back() -> None:
    async with Fleet() as fleet:
        produced = 0

        async def fast(_: Any) -> AsyncIterator[Any]:
            nonlocal produced
            for produced in range(1, 2001):
                yield produced

        await fleet.serve(fast)
        client = await fleet.client()
        stream = await client.generate({})
        await anext(stream)
        await asyncio.sleep(0.1)
        assert produced < 150
        assert [item async for item in stream] == list(range(2, 2001))


async def test_errors_are_typed_before_and_after_the_first_item() -> None:
    async def failing(request: str) -> AsyncIterator[Any]:
        if request != "at once":
            yield 1
        if request == "bug":
            raise ZeroDivisionError
        raise InvalidRequest("no such voice", param="voice")

    async with Fleet() as fleet:
        await fleet.serve(failing)
        client = await fleet.client()
        for request, expected in (("at once", InvalidRequest), ("later", InvalidRequest), ("bug", EngineFailed)):
            with pytest.raises(expected):
                _ = [item async for item in await client.generate(request)]
        with pytest.raises(InvalidRequest):
            await client.generate(object())


async def test_a_full_worker_sends_its_callers_elsewhere() -> None:
    async with Fleet() as fleet:
        recorders = [Recorder(), Recorder()]
        for recorder in recorders:
            await fleet.serve(recorder, max_calls=1)
        client = await fleet.client(2)
        streams = [await client.random({}) for _ in range(2)]
        assert len({stream.instance for stream in streams}) == 2
        with pytest.raises(WorkerSaturated) as caught:
            await client.round_robin({})
        assert caught.value.details["knob"] == "max_calls"
        with pytest.raises(WorkerSaturated):
            await client.direct({}, streams[0].instance)
        for stream in streams:
            await stream.aclose()


async def test_round_robin_takes_turns_and_direct_does_not() -> None:
    async def who(_: Any) -> AsyncIterator[Any]:
        yield 1

    async with Fleet() as fleet:
        for _ in range(3):
            await fleet.serve(who)
        client = await fleet.client(3)
        ids = client.instance_ids()
        turns = [(await client.round_robin({})).instance for _ in range(6)]
        assert sorted(turns) == sorted(ids * 2)
        assert {(await client.direct({}, ids[1])).instance for _ in range(3)} == {ids[1]}
        assert {record.instance for record in client.instances()} == set(ids)


async def test_nobody_there_is_said_and_waiting_is_bounded() -> None:
    async with Fleet() as fleet:
        client = await fleet.caller.endpoint(PATH).client()
        with pytest.raises(NoWorkers, match=PATH):
            await client.generate({})
        with pytest.raises(NoWorkers, match=r"0\.1 s"):
            await client.wait_for_instances(0.1)


async def test_a_worker_that_does_not_accept_is_left() -> None:
    async with Fleet() as fleet:
        runtime = await fleet.serve(Recorder())
        runtime.server.register("generate", lambda call: None)
        client = await fleet.client(accept_timeout=0.1)
        with pytest.raises(PeerSilent, match="accept"):
            await client.generate({})
        assert runtime.server.connections


async def test_shutdown_lets_running_calls_end_and_takes_no_new_ones() -> None:
    async with Fleet() as fleet:
        recorder = Recorder(limit=30, pause=0.01)
        runtime = await fleet.serve(recorder)
        client = await fleet.client()
        stream = await client.generate({})
        leaving = asyncio.ensure_future(runtime.shutdown(5.0))
        await until(lambda: not client.instance_ids())
        with pytest.raises(NoWorkers):
            await client.generate({})
        assert len([item async for item in stream]) == 30
        await asyncio.wait_for(leaving, 5.0)
        assert fleet.tasks[0].done()


@pytest.mark.parametrize("graceful", [True, False])
async def test_calls_cut_off_by_shutdown_are_told_to_go_elsewhere(graceful: bool) -> None:
    async with Fleet() as fleet:
        runtime = await fleet.serve(Recorder(), graceful_shutdown=graceful)
        client = await fleet.client()
        stream = await client.generate({})
        await runtime.shutdown(0.05 if graceful else 60.0)
        with pytest.raises(WorkerDraining) as caught:
            async for _ in stream:
                pass
        assert caught.value.retry == "elsewhere"


async def test_unregistering_takes_no_new_calls() -> None:
    async with Fleet() as fleet:
        recorder = Recorder(limit=20, pause=0.01)
        runtime = await fleet.serve(recorder)
        client = await fleet.client()
        stream = await client.generate({})
        await runtime.endpoint(PATH).unregister_endpoint_instance()
        await until(lambda: not client.instance_ids())
        assert len([item async for item in stream]) == 20


async def test_cancelling_serve_endpoint_takes_it_out_of_discovery() -> None:
    async with Fleet() as fleet:
        runtime = await fleet.serve(Recorder())
        client = await fleet.client()
        stream = await client.generate({})
        fleet.tasks[0].cancel()
        await until(lambda: not client.instance_ids())
        await anext(stream)
        await runtime.shutdown(0.01)
        with pytest.raises(WorkerDraining):
            async for _ in stream:
                pass


async def test_mistakes_in_names_are_told() -> None:
    async with Fleet() as fleet:
        for path in ("", "a.b", "a.b.c.d", "a..c"):
            with pytest.raises(InvalidRequest):
                fleet.caller.endpoint(path)
        assert fleet.caller.endpoint("dyn://a.b.c").path == "a.b.c"
        runtime = await fleet.serve(Recorder())
        for other in (PATH, "test.other.generate"):
            with pytest.raises(HoldfastError):
                await asyncio.wait_for(runtime.endpoint(other).serve_endpoint(Recorder()), 2.0)
        with pytest.raises(InvalidRequest):
            await runtime.endpoint("test.backend.more").serve_endpoint(lambda: None)  # type: ignore[arg-type, return-value]


@pytest.mark.e2e
def test_the_examples_work_as_processes(tmp_path: Path) -> None:
    env = {**os.environ, "DYN_DISCOVERY_BACKEND": "file", "DYN_FILE_KV": str(tmp_path / "kv")}
    worker = subprocess.Popen([sys.executable, str(EXAMPLES / "hello_worker.py")], env=env)
    try:
        command = [sys.executable, str(EXAMPLES / "hello_client.py"), "Ada"]
        client = subprocess.run(command, env=env, capture_output=True, text=True, timeout=30, check=False)
        assert client.returncode == 0, client.stderr
        assert client.stdout.split() == ["Hello,", "Ada!", "Holding", "fast", "until", "you", "say", "stop."]
        worker.send_signal(signal.SIGTERM)
        assert worker.wait(10) == 0
    finally:
        worker.kill()
        worker.wait()
