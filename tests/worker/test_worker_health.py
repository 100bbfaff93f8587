"""A worker's health: proved before it registers, honest afterwards, and gone when its engine is."""

from __future__ import annotations

import asyncio
import contextlib
import random
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from holdfast.base.errors import DeadlineExceeded, EngineFailed
from holdfast.engines.contract import SequenceStep
from holdfast.engines.mock import MockConfig, MockEngine
from holdfast.engines.mock.ranks import make_mock
from holdfast.health.config import CanaryConfig, SystemConfig
from holdfast.local.ports import free_port
from holdfast.runtime.discovery.mem import MemDiscovery, MemHub
from holdfast.runtime.readmission import CANARY_ENDPOINT, CanaryVerdict
from holdfast.runtime.shutdown import EXIT_ENGINE_DIED
from holdfast.worker.config import WorkerConfig
from holdfast.worker.host import SEATS_FACTOR
from holdfast.worker.process import WorkerProcess
from tests.engines.mock.mockrun import request
from tests.patience import within
from tests.worker.doubles import ScriptEngine, payload
from tests.worker.remote import call, generate, linked, pong, worker_child
from tests.worker.status_client import ask, until

SYSTEM = SystemConfig(system_port=0)
QUICK = CanaryConfig(health_check_enabled=True, canary_wait_time=0.5, health_check_request_timeout=0.3)


def a_worker(engine: Any = None, hub: MemHub | None = None, **config: Any) -> WorkerProcess:
    settings = WorkerConfig(engine="mock", **{"system": SYSTEM, **config})
    engine = engine or MockEngine(MockConfig(step_ms=1.0))
    return WorkerProcess(settings, engine, MemDiscovery(hub or MemHub()), random.Random(5))


@contextlib.asynccontextmanager
async def running(worker: WorkerProcess, *, ready: bool = True) -> AsyncIterator[asyncio.Task[int]]:
    task = asyncio.create_task(worker.run())
    try:
        if ready:
            async with asyncio.timeout(10):
                await worker.ready.wait()
        yield task
    finally:
        worker.stop()
        with contextlib.suppress(DeadlineExceeded):
            await asyncio.wait_for(task, 10)


async def test_alive_is_not_ready_and_the_answer_says_what_is_missing() -> None:
    worker = a_worker(MockEngine(MockConfig(startup_seconds=0.2, warmup_seconds=0.3)))
    async with running(worker, ready=False):
        async with asyncio.timeout(5):
            while not worker.vitals.status.address:  # noqa: ASYNC110
                await asyncio.sleep(0.005)
        address = worker.vitals.status.address
        assert (await ask(address, "/live"))[0] == 200
        status, body = await ask(address, "/health")
        assert (status, body["status"]) == (503, "notready")
        assert "the engine is loading" in body["reasons"][0]
        async with asyncio.timeout(10):
            await worker.ready.wait()
        status, body = await ask(address, "/health")
        assert (status, body["status"], body["state"], body["reasons"]) == (200, "ready", "ready", [])
        served = {"generate", "artifact", "holdfast_canary", "kv_events", "control"}
        assert body["endpoints"] == dict.fromkeys(served, "ready")
        assert body["load"]["kv_total_blocks"] == MockConfig().num_blocks
        assert (await ask(address, "/metadata"))[1]["system_address"] == address
    with pytest.raises(OSError, match="Connect"):
        await ask(address, "/live")


@pytest.mark.parametrize("listed", [("generate",), ("generate", "artifact"), ()])
async def test_listed_endpoints_decide(listed: tuple[str, ...]) -> None:
    system = SystemConfig(system_port=0, system_use_endpoint_health_status=listed)
    async with running(worker := a_worker(system=system)):
        assert (await ask(worker.vitals.status.address, "/health"))[0] == 200


async def test_a_listed_endpoint_that_nobody_serves_is_named() -> None:
    system = SystemConfig(system_port=0, system_use_endpoint_health_status=("chat",))
    async with running(worker := a_worker(system=system)):
        status, body = await ask(worker.vitals.status.address, "/health")
        assert (status, "chat" in body["reasons"][0], "serves" in body["reasons"][0]) == (503, True, True)


async def test_nothing_is_registered_before_a_request_went_through() -> None:
    """The probe goes to the published address; an engine that never answers is never found in discovery."""
    hub = MemHub()
    engine = MockEngine(MockConfig(step_ms=1.0))
    worker = a_worker(engine, hub)
    real = engine.start

    async def start_hung(*arguments: Any) -> Any:
        info = await real(*arguments)
        engine.misbehave("hang")
        return info

    engine.start = start_hung  # type: ignore[method-assign]
    async with running(worker, ready=False):
        async with asyncio.timeout(5):
            while not worker.host.measure()[1].waiting:  # noqa: ASYNC110  the canary is in the engine's hands
                await asyncio.sleep(0.005)
        assert not hub.records
        assert worker.host.in_flight == 0, "a canary is nobody's request"
        assert worker.state == "starting"
        _, body = await ask(worker.vitals.status.address, "/health")
        assert any("no successful probe yet" in reason for reason in body["reasons"])
        engine.misbehave("unhang")
        async with asyncio.timeout(5):
            await worker.ready.wait()
        (record,) = hub.records.values()
        assert record.state == "ready"


class Mute(ScriptEngine):
    """Accepts everything and ends it without a token, or with an error, or not at all."""

    def __init__(self, finish: Any) -> None:
        super().__init__()
        self.finish = finish

    def submit(self, key: Any, request: Any) -> None:
        super().submit(key, request)
        error = EngineFailed("CUDA error") if self.finish == "error" else None
        asyncio.get_running_loop().call_soon(self.step, [SequenceStep(key, 0, [], finish=self.finish, error=error)])


@pytest.mark.parametrize(
    ("finish", "words"), [("stop", "without a token"), ("error", "CUDA error"), ("abort", "ended the sequence early")]
)
async def test_a_canary_needs_tokens_and_a_normal_end(finish: str, words: str) -> None:
    hub = MemHub()
    worker = a_worker(Mute(finish), hub, engine_start_timeout=0.5)
    with pytest.raises(DeadlineExceeded, match=words):
        await worker.run()
    assert not hub.records


async def test_an_address_that_does_not_lead_back_here_is_found_out() -> None:
    worker = a_worker(advertise=f"127.0.0.1:{free_port()}", engine_start_timeout=0.5)
    with pytest.raises(DeadlineExceeded, match=r"cannot connect to 127\.0\.0\.1"):
        await worker.run()


async def test_a_secret_does_not_keep_the_worker_from_proving_itself() -> None:
    async with running(worker := a_worker(secret="s3cret")):
        assert worker.state == "ready"


async def test_a_canary_takes_nobodys_seat() -> None:
    async with running(worker := a_worker(engine_request_limit=1)):
        assert worker.host.limit == 1
        async with linked(worker.server.address) as link:
            caller = generate(link, request(max_tokens=20_000))
            await caller.until(lambda: bool(caller.tokens))
            result = await worker.vitals.canary.once()
            assert result.kind == "good"
            assert worker.host.in_flight == 1
            assert (await pong(link)).progress.in_flight == 1


async def test_an_idle_hang_makes_the_worker_stalled_and_a_canary_brings_it_back() -> None:
    hub = MemHub()
    watcher = MemDiscovery(hub)
    await watcher.start()
    states: list[str] = []
    watcher.subscribe(lambda event: states.append(event.record.state) if event.record else None)
    worker = a_worker(hub=hub, health=QUICK)
    async with running(worker), linked(worker.server.address) as link:
        assert isinstance(worker.host.engine, MockEngine)
        worker.host.engine.misbehave("hang")
        seconds, body = await until(worker.vitals.status.address, 503)
        assert seconds < 0.5 + 2 * 0.3 + 0.7
        assert body["endpoints"]["generate"] == "notready"
        assert "0.3 s" in body["reasons"][0]
        assert (await pong(link)).state == body["state"] == "stalled"
        assert (await ask(worker.vitals.status.address, "/live"))[0] == 200
        worker.host.engine.misbehave("unhang")
        await until(worker.vitals.status.address, 200, within=5)
        assert (await pong(link)).state == "ready"
        async with asyncio.timeout(2):
            while states[-1] != "ready":  # noqa: ASYNC110
                await asyncio.sleep(0.01)
    assert states[:3] == ["ready", "stalled", "ready"]
    await watcher.close()


async def test_a_busy_hang_is_found_by_the_lack_of_progress_without_any_canary() -> None:
    health = CanaryConfig(health_check_busy_stall=0.6)
    async with running(worker := a_worker(health=health)), linked(worker.server.address) as link:
        caller = generate(link, request(max_tokens=20_000))
        await caller.until(lambda: bool(caller.tokens))
        assert isinstance(worker.host.engine, MockEngine)
        worker.host.engine.misbehave("hang")
        seconds, body = await until(worker.vitals.status.address, 503)
        assert 0.3 < seconds < within(1.6)
        assert "1 in flight" in body["reasons"][0]
        worker.host.engine.misbehave("unhang")
        before = len(caller.tokens)
        await caller.until(lambda: len(caller.tokens) > before)
        await until(worker.vitals.status.address, 200, within=2)


async def test_control_routes_of_a_worker() -> None:
    async with running(worker := a_worker()):
        address = worker.vitals.status.address
        status, body = await ask(address, "/engine/canary", "POST")
        assert (status, body["result"], body["tokens"], body["state"]) == (200, "good", 1, "ready")
        assert (await ask(address, "/engine/check", "POST")) == (200, {"ok": True})
        status, body = await ask(address, "/engine/control", "POST", b'{"do": "slow", "factor": 1}')
        assert (status, body["ok"]) == (200, True)
        assert (await ask(address, "/engine/control", "POST", b'{"do": "dance"}'))[0] == 400


class WithChild(ScriptEngine):
    """Computes in a process of its own, gives one token and then nothing, and always says that it is well."""

    def __init__(self) -> None:
        super().__init__()
        self.child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])

    def submit(self, key: Any, request: Any) -> None:
        super().submit(key, request)
        finish: Any = "length" if request.stop.max_tokens == 1 else None
        asyncio.get_running_loop().call_soon(self.step, [self.token(key, 0, finish=finish)])

    def child_pids(self) -> tuple[int, ...]:
        return (self.child.pid,)

    async def close(self) -> None:
        self.child.kill()
        self.child.wait()


async def test_the_death_of_the_engines_process_is_the_engines_death_whatever_it_says() -> None:
    engine = WithChild()
    hub = MemHub()
    async with running(worker := a_worker(engine, hub)) as task, linked(worker.server.address) as link:
        caller = call(link, "generate", payload())
        await caller.until(lambda: bool(caller.tokens))
        began = time.monotonic()
        engine.child.kill()
        await caller.ended()
        assert time.monotonic() - began < within(1.0)
        assert (caller.finish, caller.error and caller.error.code) == ("error", "engine_failed")
        assert caller.error is not None
        assert f"process {engine.child.pid} is gone" in caller.error.message
        async with asyncio.timeout(5):
            while link.draining is None:  # noqa: ASYNC110
                await asyncio.sleep(0.005)
        assert await asyncio.wait_for(task, 10) == EXIT_ENGINE_DIED
        assert not hub.records


async def test_draining_is_alive_and_not_ready() -> None:
    async with running(worker := a_worker()) as task, linked(worker.server.address) as link:
        caller = generate(link, request(max_tokens=300))
        await caller.until(lambda: bool(caller.tokens))
        worker.stop()
        _, body = await until(worker.vitals.status.address, 503, within=2)
        assert body["reasons"] == ["this worker is draining"]
        assert (await ask(worker.vitals.status.address, "/live"))[0] == 200
        await caller.ended()
        assert caller.finish == "length"
        assert await asyncio.wait_for(task, 10) == 0


# real processes


async def test_engine_death_by_its_own_check_ends_streams_and_process(tmp_path: Path) -> None:
    """The mock dies on command; nobody calls `on_death`'s worker twice, and the exit code says it."""
    async with (
        worker_child(tmp_path, {"system": SYSTEM}) as (child, record),
        linked(record.address) as link,
    ):
        caller = generate(link, request(max_tokens=10_000))
        await caller.until(lambda: bool(caller.tokens))
        began = time.monotonic()
        with contextlib.suppress(OSError, IndexError, TimeoutError):
            await ask(record.system_address or "", "/engine/control", "POST", b'{"do": "die"}')
        await caller.ended()
        assert time.monotonic() - began < within(1.0)
        assert (caller.finish, caller.error and caller.error.code) == ("error", "engine_failed")
        assert await child.exit_code() == 1


async def test_a_taken_system_port_is_a_start_up_failure(tmp_path: Path) -> None:
    """Not an error in a log of a worker that goes on and is never used."""
    async with worker_child(tmp_path, {"system": SYSTEM}) as (_, record):
        port = (record.system_address or "").rsplit(":", 1)[1]
        argv = [sys.executable, "-m", "holdfast", "worker", "--engine", "mock", "--system-port", port]
        argv += ["--file-kv", str(tmp_path)]
        done = await asyncio.to_thread(subprocess.run, argv, capture_output=True, text=True, timeout=30, check=False)
        assert done.returncode == 1
        assert f"127.0.0.1:{port} (DYN_SYSTEM_PORT): the port is taken" in done.stderr
        assert "Traceback" not in done.stderr


async def test_a_frozen_worker_is_live_again_when_it_runs_again(tmp_path: Path) -> None:
    """Time in which the whole process was stopped is not the event loop's fault."""
    system = SystemConfig(system_port=0, system_live_timeout=0.6)
    async with worker_child(tmp_path, {"system": system}) as (child, record):
        address = record.system_address or ""
        child.process.send_signal(signal.SIGSTOP)
        await asyncio.sleep(2.0)
        child.process.send_signal(signal.SIGCONT)
        for _ in range(10):
            assert (await ask(address, "/live"))[0] == 200
            await asyncio.sleep(0.05)


async def verdict(link: Any) -> CanaryVerdict:
    asked = await call(link, CANARY_ENDPOINT, msgspec.msgpack.encode({})).ended()
    assert asked.finish == "done"
    (message,) = asked.data
    return msgspec.msgpack.decode(message, type=CanaryVerdict)


async def test_a_caller_may_ask_for_a_canary_and_all_share_one() -> None:
    engine = MockEngine(MockConfig(step_ms=1.0))
    async with running(worker := a_worker(engine)), linked(worker.server.address) as link:
        sent = worker.vitals.canary.results["good"]
        answers = await asyncio.gather(*(verdict(link) for _ in range(20)))
        assert {answer.usable for answer in answers} == {True}
        assert worker.vitals.canary.results["good"] == sent + 1, "at most one a second, whoever asks"
        assert answers[0].tokens == 1


async def test_health_shows_the_load_of_each_rank() -> None:
    async with running(worker := a_worker(make_mock(MockConfig(step_ms=1.0, num_blocks=64, data_parallel_size=2)))):
        load = (await ask(worker.vitals.status.address, "/health"))[1]["load"]
        assert load["kv_total_blocks"] == 128
        assert [rank["kv_total_blocks"] for rank in load["ranks"]] == [64, 64]
        assert worker.host.limit == 2 * MockConfig().max_num_seqs * SEATS_FACTOR, "seats are per rank"


async def test_a_hung_engine_is_told_to_whoever_asks() -> None:
    engine = MockEngine(MockConfig(step_ms=1.0))
    async with running(worker := a_worker(engine, health=QUICK)), linked(worker.server.address) as link:
        engine.misbehave("hang")
        answer = await verdict(link)
        assert not answer.usable
        assert "0.3 s" in answer.why


async def test_a_busy_worker_is_not_sent_a_canary_for_a_caller() -> None:
    async with running(worker := a_worker()), linked(worker.server.address) as link:
        sent = worker.vitals.canary.results["good"]
        live = generate(link, request(max_tokens=2000))
        await live.until(lambda: bool(live.tokens))
        answer = await verdict(link)
        assert (answer.usable, answer.tokens) == (True, 0)
        assert "busy" in answer.why
        assert worker.vitals.canary.results["good"] == sent
