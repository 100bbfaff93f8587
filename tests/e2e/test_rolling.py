"""Leaving in order, whole fleets of it: rolling restarts under load, everybody draining, signals, probes."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest

import openai
from holdfast.base.errors import CannotConnect, Disconnected
from holdfast.local import http
from holdfast.local.backoff import RestartPolicy
from holdfast.local.cluster import ClusterPlan, LocalCluster
from holdfast.local.ports import free_port, open_listener
from holdfast.local.rolling import RestartStopped
from holdfast.runtime.discovery.factory import open_discovery
from holdfast.runtime.shutdown import EXIT_CUT, EXIT_FINISHED, EXIT_HANDED_OVER
from tests.e2e.asking import streaming
from tests.e2e.load import Load, load
from tests.e2e.support import AT_ONCE, MOCK, Cluster, cluster
from tests.e2e.truth import Ask, check
from tests.patience import within

pytestmark = pytest.mark.e2e

ROUNDS = int(os.environ.get("HOLDFAST_ROUNDS", "3"))
SHORT_GRACE = {"DYN_WORKER_SHUTDOWN_INFLIGHT_TIMEOUT_SECS": "0.3"}


@contextlib.asynccontextmanager
async def on_one_port(
    root: Path, *, frontends: int = 2, workers: int = 2, env: dict[str, str] | None = None
) -> AsyncIterator[Cluster]:
    """Several frontends that share a port, under the supervisor that holds it."""
    store = root / "discovery"
    listener = open_listener("127.0.0.1", 0)
    plan = ClusterPlan(
        http_ports=tuple(free_port() for _ in range(frontends)),
        shared_port=listener.getsockname()[1],
        workers=workers,
        worker_flags=MOCK,
        env={"DYN_FILE_KV": str(store), **(env or {})},
        restart=AT_ONCE,
        stop_grace=15.0,
        start_timeout=60.0,
    )
    lines = (root / "cluster.log").open("a")

    def relay(slot: str, line: str) -> None:
        print(slot, line, file=lines, flush=True)

    local = LocalCluster(
        plan, open_discovery("file", root=store), random.Random(7), dict(os.environ), relay, listener=listener
    )
    with lines:
        async with local.running():
            await local.until_ready(90)
            found = Cluster(local, workers, root / "cluster.log")
            found.model = "mock"
            async with found.http:
                yield found


async def nothing_held(up: Cluster) -> None:
    """Every frontend has given everything back (P4)."""
    for url in up.local.frontend_urls:

        async def rest(url: str = url) -> bool:
            return not any((await http.get(f"{url}/debug/requests")).json()["leases"].values())

        await up.until(rest, 15)


# workers


@pytest.mark.parametrize("rounds", [ROUNDS, pytest.param(20, marks=pytest.mark.slow)])
async def test_rolling_restarts_of_all_workers_fail_no_request(tmp_path: Path, rounds: int) -> None:
    """Streams and whole answers, kept connections and new ones; never fewer than two of three workers (P9)."""
    async with cluster(tmp_path, workers=3, env=SHORT_GRACE, grace=15.0) as up:
        fewest = 3
        done = asyncio.Event()

        async def watch() -> None:
            nonlocal fewest
            while not done.is_set():
                seen = (await up.instances()).values()
                fewest = min(fewest, sum(one["state"] == "usable" and not one["draining"] for one in seen))
                await asyncio.sleep(0.02)

        watching = asyncio.ensure_future(watch())
        async with load(up.url, clients=8, tokens=(10, 40, 200)) as seen:
            for _ in range(rounds):
                before = {slot.pid for slot in up.slots().values()}
                report = await up.local.rolling.restart("worker")
                assert (report.replaced, report.error) == (3, "")
                assert not before & {slot.pid for slot in up.slots().values()}
        done.set()
        await watching
        print(f"{rounds} rounds: {seen.answered} answers, {seen.moved} of them moved, {len(seen.failed)} failed")
        assert seen.failed == []
        assert seen.answered > 20 * rounds
        assert seen.moved > 0, "no answer was long enough to be handed over; the test proves nothing"
        assert fewest >= 2
        await up.at_rest()


async def test_the_only_worker_is_replaced_while_its_streams_wait(tmp_path: Path) -> None:
    """Nobody to hand over to: new requests and long streams wait for the next process, and no request fails."""
    async with cluster(tmp_path, workers=1, env=SHORT_GRACE, grace=15.0) as up:
        async with load(up.url, clients=4, tokens=(10, 200)) as seen:
            await up.local.rolling.restart("worker")
        assert seen.failed == []
        await up.at_rest()


async def test_a_restart_stops_where_a_worker_does_not_come_back(tmp_path: Path) -> None:
    """The floor of routable workers (P9): the second one is not touched while the first is missing."""
    async with cluster(tmp_path, workers=2, grace=15.0) as up:
        before = {name: up.pid(name) for name in up.slots()}
        up.local.rolling._patience = 1.0
        instance = up.slots()["worker-1"].spec.env["DYN_INSTANCE_ID"]
        async with up.frozen(instance):

            async def noticed() -> bool:
                return (await up.instances())[instance]["state"] != "usable"

            await up.until(noticed, 10)
            with pytest.raises(RestartStopped, match=r"worker-1 .* so nothing is replaced"):
                await up.local.rolling.restart("worker")
        assert (up.local.rolling.report.replaced, up.local.rolling.report.of) == (0, 2)
        assert {name: up.pid(name) for name in up.slots()} == before
        await up.usable()


async def test_all_workers_draining_finish_what_they_can_and_nothing_moves_between_them(tmp_path: Path) -> None:
    """The short ones finish in place; the long ones end with a typed error, for nobody is to come."""
    never = RestartPolicy(intensity=0)
    env = {"DYN_WORKER_SHUTDOWN_INFLIGHT_TIMEOUT_SECS": "1.5", "DYN_ROUTER_MODE": "round-robin"}
    async with cluster(tmp_path, workers=2, restart=never, env=env, grace=15.0) as up:
        for slot in up.slots().values():  # nobody comes after an orderly exit either
            slot.spec = msgspec.structs.replace(slot.spec, orderly=frozenset())
        asks = [Ask(content=f"short {i}", max_tokens=60, seed=i) for i in range(4)]
        long = [Ask(content=f"long {i}", max_tokens=5000, seed=i) for i in range(4)]
        async with contextlib.AsyncExitStack() as stack:
            lives = [await stack.enter_async_context(streaming(up, ask)) for ask in (*asks, *long)]
            for live in lives:
                await live.until_pieces(3)
            pids = {slot: up.pid(slot) for slot in up.slots()}
            for slot in pids:
                up.local.kill(slot, signal.SIGTERM)
            for ask, live in zip(asks, lives[:4], strict=True):
                answer = await live.done()
                check(ask, answer)
                assert not answer.moves, "it finishes where it is"
            for live in lives[4:]:
                with pytest.raises(openai.APIError) as error:
                    await live.done()
                assert error.value.code == "no_workers"
        for slot in up.slots().values():
            await up.until(lambda slot=slot: gone(slot), 15)
            assert f"exit code {EXIT_HANDED_OVER}" in slot.last_exit
        assert not up.wire.broken
        assert await up.metric("dynamo_frontend_requests_total", status="success") == 4


async def gone(slot: Any) -> bool:
    return bool(slot.last_exit)


async def test_a_worker_that_finishes_everything_ends_with_zero(tmp_path: Path) -> None:
    async with cluster(tmp_path, grace=15.0) as up:
        ask = Ask(content="short", max_tokens=40)
        async with streaming(up, ask) as live:
            await live.until_pieces(3)
            slot = up.slots()[up.kill(live.answer.worker, signal.SIGTERM)]
            check(ask, await live.done())
        await up.until(lambda: gone(slot), 15)
        assert f"exit code {EXIT_FINISHED}" in slot.last_exit
        await up.usable()
        assert slot.budget._streak == 0, "leaving in order is no crash"


# frontends


async def test_rolling_restart_of_two_frontends_on_one_port(tmp_path: Path) -> None:
    """Answers shorter than the grace: none fails, on kept connections and on new ones."""
    async with on_one_port(tmp_path) as up:
        async with load(up.url, clients=8, tokens=(5, 20, 60)) as seen:
            for _ in range(ROUNDS):
                report = await up.local.rolling.restart("frontend")
                assert (report.replaced, report.error) == (2, "")
        print(f"{ROUNDS} rounds of two frontends: {seen.answered} answers, {len(seen.failed)} failed")
        assert seen.failed == []
        assert seen.answered > 50
        for slot in up.local.supervisor.slots.values():
            if slot.spec.slot.startswith("frontend"):
                assert "exit code 0" in slot.last_exit
        await nothing_held(up)


async def test_the_only_frontend_of_a_held_port_refuses_nobody(tmp_path: Path) -> None:
    """While it is replaced, or comes back from a crash, connections wait in the listener's queue."""
    async with on_one_port(tmp_path, frontends=1) as up:
        async with load(up.url, clients=4, tokens=(5, 20)) as seen:
            await up.local.rolling.restart("frontend")
        assert seen.failed == []
        up.local.kill("frontend-0")
        answer = await http.post(f"{up.url}/v1/chat/completions", Ask(content="hello", max_tokens=5).body(), 30)
        assert answer.status == 200


async def test_two_frontends_that_bind_one_port_themselves(tmp_path: Path) -> None:
    """SO_REUSEPORT, as two services of a process manager have it: each leaves in turn, and no request fails."""
    store, port = tmp_path / "discovery", free_port()
    plan = ClusterPlan(
        http_ports=(port, port),
        worker_flags=MOCK,
        frontend_flags=("--http-reuse-port",),
        env={"DYN_FILE_KV": str(store)},
        restart=AT_ONCE,
        stop_grace=15.0,
    )
    joined = {"frontend-0": 0, "frontend-1": 0}

    def relay(slot: str, line: str) -> None:
        if "takes connections from the shared port" in line:
            joined[slot] += 1

    local = LocalCluster(plan, open_discovery("file", root=store), random.Random(7), dict(os.environ), relay)
    async with local.running():
        await local.until_ready(60)
        await up_to(joined, {"frontend-0": 1, "frontend-1": 1})
        up = Cluster(local, 2, tmp_path / "cluster.log")
        async with up.http, load(up.url, clients=8, tokens=(5, 20)) as seen:
            for name in ("frontend-0", "frontend-1") * 2:
                wanted = {**joined, name: joined[name] + 1}
                local.kill(name, signal.SIGTERM)
                await up_to(joined, wanted)
        assert seen.failed == []
        assert seen.answered > 50


async def up_to(joined: dict[str, int], wanted: dict[str, int]) -> None:
    async with asyncio.timeout(30):
        while joined != wanted:  # noqa: ASYNC110  other processes have no event to wait for
            await asyncio.sleep(0.02)


async def test_streams_longer_than_a_frontends_grace_end_with_a_typed_error(tmp_path: Path) -> None:
    env = {"DYN_HTTP_GRACEFUL_SHUTDOWN_TIMEOUT_SECS": "1"}
    async with on_one_port(tmp_path, env=env) as up:
        lives = []
        async with contextlib.AsyncExitStack() as stack:
            for number in range(6):
                ask = Ask(content=f"long {number}", max_tokens=5000)
                lives.append(await stack.enter_async_context(streaming(up, ask)))
            for live in lives:
                await live.until_pieces(3)
            report = await up.local.rolling.restart("frontend")
            assert report.error == ""
            for live in lives:
                with pytest.raises(openai.APIError) as error:
                    await live.done()
                assert error.value.code == "shutting_down"
        exits = [slot.last_exit for name, slot in up.local.supervisor.slots.items() if name.startswith("frontend")]
        assert any(f"exit code {EXIT_CUT}" in how for how in exits)
        assert "requests were still running when the grace period ended" in up.log.read_text()
        assert not up.wire.broken


async def test_a_draining_frontend_is_alive_and_not_ready(tmp_path: Path) -> None:
    """Dynamo 1.6.1 answers /live with 503 while it drains, so that Kubernetes kills it in the middle."""
    env = {"DYN_HTTP_GRACEFUL_SHUTDOWN_TIMEOUT_SECS": "3"}
    async with cluster(tmp_path, workers=1, env=env, grace=15.0) as up:
        ask = Ask(content="long enough", max_tokens=300)
        async with httpx.AsyncClient(base_url=up.url) as kept, streaming(up, ask) as live:
            await live.until_pieces(3)
            assert (await kept.get("/live")).status_code == 200
            up.local.kill("frontend-0", signal.SIGTERM)

            async def turned() -> bool:
                return (await http.get(f"{up.url}/health")).status == 503

            await up.until(turned, 5)
            health = await http.get(f"{up.url}/health")
            assert (health.json()["status"], health.json()["stage"]) == ("not_ready", "draining")
            wanted = {"model": "mock", **Ask(content="?", max_tokens=3).body()}
            held = await kept.post("/v1/chat/completions", json=wanted)
            assert held.status_code == 200, "it held its connection before and could not know"
            assert held.headers["connection"] == "close"
            new = await http.post(f"{up.url}/v1/chat/completions", wanted, 5)
            assert new.status == 503
            assert float(new.headers["retry-after"]) > 0
            while not live.over:
                with contextlib.suppress(CannotConnect, Disconnected):
                    assert (await http.get(f"{up.url}/live")).status == 200
                await asyncio.sleep(0.02)
            check(ask, await live.done())
        slot = up.local.supervisor.slots["frontend-0"]
        await up.until(lambda: gone(slot), 15)
        assert "exit code 0" in slot.last_exit


async def test_a_second_signal_hurries_a_frontend(tmp_path: Path) -> None:
    env = {"DYN_HTTP_GRACEFUL_SHUTDOWN_TIMEOUT_SECS": "60"}
    async with cluster(tmp_path, workers=1, env=env, grace=90.0) as up:
        async with streaming(up, Ask(content="long", max_tokens=5000)) as live:
            await live.until_pieces(3)
            slot = up.local.supervisor.slots["frontend-0"]
            up.local.kill("frontend-0", signal.SIGTERM)

            async def draining() -> bool:
                return (await http.get(f"{up.url}/health")).json().get("stage") == "draining"

            await up.until(draining, 5)
            before = asyncio.get_running_loop().time()
            up.local.kill("frontend-0", signal.SIGTERM)
            with pytest.raises(openai.APIError) as error:
                await live.done()
            assert error.value.code == "shutting_down"
            await up.until(lambda: gone(slot), 5)
        assert asyncio.get_running_loop().time() - before < within(4.0)
        assert f"exit code {EXIT_CUT}" in slot.last_exit


async def test_kubernetes_sequence(tmp_path: Path) -> None:
    """preStop while it still serves, SIGTERM, and everything over before the grace period would kill it."""
    env = {"DYN_WORKER_SHUTDOWN_TOTAL_TIMEOUT_SECS": "4", "DYN_HTTP_GRACEFUL_SHUTDOWN_TIMEOUT_SECS": "2"}
    pre_stop, period = 0.5, 9.0
    async with on_one_port(tmp_path, env=env) as up:
        loop = asyncio.get_running_loop()
        async with load(up.url, clients=6, tokens=(10, 60, 250)) as seen:
            for name in ("worker-0", "frontend-0"):
                slot = up.local.supervisor.slots[name]
                pid = slot.pid
                answered = seen.answered
                await asyncio.sleep(pre_stop)
                await up.until(
                    lambda before=answered: more_than(seen, before), within(5)
                )  # nobody is told to leave yet
                began = loop.time() - pre_stop
                up.local.kill(name, signal.SIGTERM)
                await up.until(lambda slot=slot, pid=pid: replaced(slot, pid), period - pre_stop)
                assert loop.time() - began < period
                await up.local.until_ready(60)
        assert seen.failed == []


async def more_than(seen: Load, answered: int) -> bool:
    return seen.answered > answered


async def replaced(slot: Any, pid: int | None) -> bool:
    return slot.pid not in (None, pid)
