"""Health checks that lie, as comparable systems have them; each is named after its public issue or release.

Health is three facts here: alive (the event loop runs), ready (a request went through the real path),
progressing (a busy engine moves). No one of them stands in for another.
"""

from __future__ import annotations

import asyncio
import contextlib
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from holdfast.local.backoff import RestartPolicy
from holdfast.runtime.discovery.factory import open_discovery
from tests.e2e.asking import exact, streaming
from tests.e2e.support import MOCK, Cluster, cluster
from tests.e2e.truth import Ask, check
from tests.patience import within
from tests.worker.status_client import ask, until

pytestmark = [pytest.mark.e2e, pytest.mark.asyncio(loop_scope="module")]

WAIT, TIMEOUT, FAILURES = 1.0, 0.5, 2
CANARY = {
    "DYN_HEALTH_CHECK_ENABLED": "true",
    "DYN_CANARY_WAIT_TIME": str(WAIT),
    "DYN_HEALTH_CHECK_REQUEST_TIMEOUT": str(TIMEOUT),
}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shared(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Cluster]:
    async with cluster(tmp_path_factory.mktemp("health"), env=CANARY) as running:
        yield running


@pytest_asyncio.fixture(loop_scope="module")
async def up(shared: Cluster) -> AsyncIterator[Cluster]:
    await both(shared)
    yield shared
    await both(shared)
    await shared.at_rest()


async def both(up: Cluster) -> None:
    """Wait until the frontend offers both workers."""

    async def usable() -> bool:
        with contextlib.suppress(OSError):
            return await routable(up) == 2
        return False

    await up.until(usable, 30)


async def routable(up: Cluster) -> int:
    """How many workers the frontend would use for the model now, by its own /health."""
    return int((await up.get("/health"))["models"].get(up.model or "mock", 0))


async def status_address(up: Cluster, instance: str) -> str:
    """Return where a worker's own status server is, as discovery has it."""
    discovery = open_discovery("file", root=up.log.parent / "discovery")
    await discovery.start()
    try:
        return next(r.system_address or "" for r in discovery.snapshot() if r.instance == instance)
    finally:
        await discovery.close()


async def test_dynamo_1_6_1_a_worker_that_its_own_canary_calls_unhealthy_gets_no_requests(up: Cluster) -> None:
    """There: /health of the worker says 503, the instance stays in discovery, 3 of 6 requests hang."""
    victim = next(iter(await up.instances()))
    address = await status_address(up, victim)
    async with up.peer(victim) as peer:
        await peer.tell("hang")
        seconds, body = await until(address, 503)
        assert seconds < WAIT + FAILURES * TIMEOUT + 1.0
        assert (body["state"], body["endpoints"]["generate"]) == ("stalled", "notready")
        assert "canary was not over after 0.5 s" in body["reasons"][0]
        verdict = time.monotonic()

        async def left_out() -> bool:
            return await routable(up) == 1

        await up.until(left_out, 2, every=0.02)
        assert time.monotonic() - verdict < within(1.0)
        shown = (await up.instances())[victim]
        assert (shown["state"], shown["lifecycle"]) == ("stalled", "stalled"), "not shown as usable"
        assert "stalled" in shown["problem"]
        answers = await asyncio.gather(*(exact(up, Ask(content="hi", max_tokens=5, seed=i)) for i in range(12)))
        assert victim not in {answer.worker for answer in answers}
        assert not any(answer.moves for answer in answers)
        assert (await ask(address, "/live"))[0] == 200, "a hung engine is no reason to kill the process (PR#8156)"
        await peer.tell("unhang")
        seconds, _ = await until(address, 200)
        assert seconds < 1.0 + TIMEOUT + 1.0
    await both(up)
    answers = await asyncio.gather(*(exact(up, Ask(content="back", max_tokens=5, seed=i)) for i in range(8)))
    assert victim in {answer.worker for answer in answers}


async def test_vllm_36451_an_engine_that_hangs_while_busy_is_not_ready_and_its_streams_go_on(up: Cluster) -> None:
    """There: /health says 200 while the engine's loop is frozen, and requests queue for ever."""
    question = Ask(content="hang while busy", max_tokens=150)
    async with streaming(up, question) as live:
        await live.until_pieces(20)
        victim = live.answer.worker
        address = await status_address(up, victim)
        async with up.peer(victim) as peer:
            await peer.tell("hang")
            check(question, await live.done())
            # the frontend has moved the stream; idle now, the worker's own canary finds the hang
            await until(address, 503)
            assert await routable(up) == 1
            await peer.tell("unhang")
            await until(address, 200)


async def test_ray_46702_a_loaded_worker_is_never_probed_and_never_ejected(up: Cluster) -> None:
    """There: busy replicas fail their health checks. Real traffic that succeeds is health."""
    instances = list(await up.instances())
    addresses = [await status_address(up, one) for one in instances]
    stop = time.monotonic() + 3 * WAIT

    async def load(number: int) -> None:
        while time.monotonic() < stop:
            await exact(up, Ask(content=f"load {number}", max_tokens=60, seed=number))

    async def watch() -> None:
        while time.monotonic() < stop:
            for address in addresses:
                assert (await ask(address, "/health"))[0] == 200
            assert await routable(up) == 2
            await asyncio.sleep(0.1)

    await asyncio.gather(watch(), *(load(number) for number in range(16)))


async def test_dynamo_known_issue_1_3_0_a_dead_engine_is_replaced(up: Cluster) -> None:
    """There: the engine is gone, its check says healthy, traffic goes on, nobody restarts it."""
    question = Ask(content="die", max_tokens=200)
    async with streaming(up, question) as live:
        await live.until_pieces(10)
        victim = live.answer.worker
        slot = up.slot_of(victim)
        restarts, pid = up.slots()[slot].restarts, up.pid(slot)
        address = await status_address(up, victim)
        with contextlib.suppress(OSError, IndexError):
            await ask(address, "/engine/control", "POST", b'{"do": "die"}')
        began = time.monotonic()

        async def left_out() -> bool:
            return await routable(up) == 1

        await up.until(left_out, 5, every=0.01)
        assert time.monotonic() - began < within(1.0)
        answer = await live.done()
        check(question, answer)
        assert answer.causes == ["engine_failed"]
    await both(up)
    slot_now = up.slots()[slot]
    assert slot_now.restarts == restarts + 1
    assert slot_now.pid != pid
    assert "exit code 1" in slot_now.last_exit or "code 1" in slot_now.last_exit


async def test_dynamo_1_6_1_status_bodies_are_json_and_say_so(up: Cluster) -> None:
    """There: JSON as text/plain; /live and /health share one handler; 'notready' for ever although serving."""
    instance = next(iter(await up.instances()))
    address = await status_address(up, instance)
    host, port = address.rsplit(":", 1)
    for path in ("/health", "/live", "/metadata", "/nowhere"):
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(f"GET {path} HTTP/1.1\r\nhost: x\r\n\r\n".encode())
        answer = await reader.read()
        writer.close()
        assert b"content-type: application/json\r\n" in answer
    status, body = await ask(address, "/health")
    assert (status, body["status"]) == (200, "ready")
    assert "endpoints" not in (await ask(address, "/live"))[1]


async def test_dynamo_1_6_1_a_worker_with_a_taken_system_port_is_not_listed(up: Cluster) -> None:
    """There: an ERROR in a log, a card with another checksum, listed as healthy, silently never used."""
    instance = next(iter(await up.instances()))
    port = (await status_address(up, instance)).rsplit(":", 1)[1]
    root = up.log.parent / "discovery"
    before = len(list(root.iterdir()))
    worker = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "holdfast", "worker", *MOCK, "--system-port", port, "--file-kv", str(root)),
        stderr=asyncio.subprocess.PIPE,
    )
    _, errors = await asyncio.wait_for(worker.communicate(), 30)
    assert worker.returncode == 1
    assert b"the port is taken" in errors
    assert len(list(root.iterdir())) <= before
    assert len(await up.instances()) == 2


async def test_dynamo_1_6_1_frontend_health_without_a_usable_worker(tmp_path: Path) -> None:
    """There: 200 'healthy' with no instance at all, and chat answers 404 with an empty body."""
    never = RestartPolicy(intensity=0)
    async with cluster(tmp_path, workers=1, restart=never) as up:
        victim = next(iter(await up.instances()))
        up.kill(victim)

        async def unhealthy() -> dict[str, Any] | None:
            answer = await up.http.get("/health")
            return dict(answer.json()) if answer.status_code == 503 else None

        began = time.monotonic()
        body = await up.until(unhealthy, 5)
        assert time.monotonic() - began < within(1.5)
        assert body["status"] != "healthy"
        assert body["message"]
        assert (await up.http.get("/live")).status_code == 200
        question = {"model": "mock", "messages": [{"role": "user", "content": "hi"}]}
        chat = await up.http.post("/v1/chat/completions", json=question)
        assert chat.status_code in (404, 503)
        assert chat.json()["error"]["message"]
