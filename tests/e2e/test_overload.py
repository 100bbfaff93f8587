"""Overload with real processes: turned away in numbers, at once and without work; queued and served in order."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import statistics
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import pytest
import pytest_asyncio

from holdfast.local.ports import free_port
from tests.e2e.asking import exact, streaming
from tests.e2e.support import Cluster, cluster
from tests.e2e.truth import Ask, check
from tests.patience import within

pytestmark = [pytest.mark.e2e, pytest.mark.asyncio(loop_scope="module")]

SEATS = 2
NARROW = ("--engine", "mock", "--mock-step-ms", "10", "--max-num-seqs", str(SEATS), "--mock-num-blocks", "128")
BLOCKS, TOKENS = "active_decode_blocks_threshold", "active_prefill_tokens_threshold"
CROWD = 16


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def narrow(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Cluster]:
    """Two workers of two seats and 128 blocks each; thresholds are set by the tests."""
    async with cluster(tmp_path_factory.mktemp("narrow"), engine=NARROW) as running:
        yield running


@pytest_asyncio.fixture(loop_scope="module")
async def small(narrow: Cluster) -> AsyncIterator[Cluster]:
    await narrow.usable()
    yield narrow
    await threshold(narrow, **dict.fromkeys((BLOCKS, TOKENS, TOKENS + "_frac")))
    await narrow.at_rest()
    broken, narrow.wire.broken = narrow.wire.broken, []
    assert not broken, broken


async def threshold(up: Cluster, url: str = "", **values: float | None) -> dict[str, Any]:
    answer = await up.http.post(f"{url or up.url}/busy_threshold", json={"model": up.model, **values})
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


async def ask(up: Cluster, content: str = "hello", max_tokens: int = 4, **headers: str) -> httpx.Response:
    body = {"model": up.model, "max_tokens": max_tokens, "messages": [{"role": "user", "content": content}]}
    return await up.http.post(
        "/v1/chat/completions", json=body, headers={k.replace("_", "-"): v for k, v in headers.items()}
    )


async def accepted_by_workers(up: Cluster) -> int:
    """Sequences that the engines have worked on, ever: their prompts were computed."""
    total = 0
    for instance in await up.instances():
        async with up.peer(instance) as peer:
            total += (await peer.pong()).progress.prefilled
    return total


def explained(answer: httpx.Response, knob: str, status: int = 503) -> dict[str, Any]:
    """Check what every rejection must say; returns its details."""
    assert answer.status_code == status, answer.text
    assert int(answer.headers["retry-after"]) >= 1
    error = answer.json()["error"]
    assert {"layer", "knob", "threshold", "measured"} <= set(error["details"]), error
    assert error["details"]["knob"] == knob
    assert knob in error["message"]
    assert error["type"] == "service_unavailable"
    return dict(error["details"])


@contextlib.asynccontextmanager
async def busy(up: Cluster, streams: int = 2, tokens: int = 2000) -> AsyncIterator[None]:
    """Long streams on all workers for the length of the block."""
    async with contextlib.AsyncExitStack() as stack:
        for i in range(streams):
            live = await stack.enter_async_context(streaming(up, Ask(content=f"long {i}", max_tokens=tokens)))
            await live.until_pieces(2)
        yield


async def test_all_saturated_is_said_in_numbers_and_costs_no_engine_work(small: Cluster) -> None:
    before = await small.metric("dynamo_frontend_model_rejection_total")
    async with busy(small):
        await threshold(small, **{BLOCKS: 0.0})
        worked = await accepted_by_workers(small)
        answer = await ask(small)
        details = explained(answer, "DYN_ACTIVE_DECODE_BLOCKS_THRESHOLD")
        assert (details["layer"], details["threshold"], details["workers"]) == ("frontend", 0.0, 2)
        assert details["measured"] > 0
        assert await accepted_by_workers(small) == worked, "P6: nobody computed its prompt"
        assert await small.metric("dynamo_frontend_model_rejection_total") == before + 1
        by_knob = await small.metric("holdfast_frontend_rejection_total", knob="DYN_ACTIVE_DECODE_BLOCKS_THRESHOLD")
        assert by_knob >= 1
        assert (await small.get("/health"))["models"][small.model] == 2, "P10: saturated is not unhealthy"
        await threshold(small, **{BLOCKS: None})
        assert (await ask(small)).status_code == 200, "cleared by null, in force at once"


async def test_a_burst_cannot_slip_past(small: Cluster) -> None:
    """16 requests in the same instant: each worker gets one, however old the last pong is."""
    await threshold(small, **{BLOCKS: 0.0})
    for _ in range(3):
        answers = await asyncio.gather(*(ask(small, f"burst {i}", 150) for i in range(CROWD)))
        assert sorted(a.status_code for a in answers) == [200] * 2 + [503] * (CROWD - 2)
        await small.at_rest()


async def test_accepting_again_is_immediate(small: Cluster) -> None:
    """The load is gone: the very next request is taken, without waiting for a pong."""
    await threshold(small, **{BLOCKS: 0.0})
    for i in range(6):
        assert (await ask(small, f"one by one {i}")).status_code == 200


async def test_another_frontend_has_the_same_thresholds(small: Cluster, tmp_path: Path) -> None:
    async with second_frontend(small, tmp_path) as url:
        loop = asyncio.get_running_loop()

        async def shown_there(value: float | None) -> bool:
            answer = (await small.http.get(f"{url}/busy_threshold")).json()
            return [one[BLOCKS] for one in answer["thresholds"] if one["model"] == small.model] == [value]

        began = loop.time()
        await threshold(small, **{BLOCKS: 0.5, TOKENS: 77})
        await small.until(lambda: shown_there(0.5), 5)
        await threshold(small, url, **{BLOCKS: None})
        mine = await small.until(lambda: _shown(small, None), 5)
        assert loop.time() - began < within(5)
        assert mine[TOKENS] == 77
        assert not any("threshold" in one for one in await small.instances()), "their records are no workers"


async def _shown(up: Cluster, value: float | None) -> dict[str, Any] | None:
    shown = await threshold(up)
    return shown if shown[BLOCKS] == value else None


@contextlib.asynccontextmanager
async def second_frontend(up: Cluster, tmp_path: Path) -> AsyncIterator[str]:
    port = free_port("127.0.0.1")
    with (tmp_path / "second.log").open("w") as log:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "holdfast", "frontend", "--http-port", str(port)),
            env={**os.environ, **up.local.plan.env},
            stdout=log,
            stderr=log,
        )
        try:
            url = f"http://127.0.0.1:{port}"
            await up.until(lambda: _knows(up, url), 20)
            yield url
        finally:
            process.terminate()
            await asyncio.wait_for(process.wait(), 15)


async def _knows(up: Cluster, url: str) -> bool:
    with contextlib.suppress(httpx.HTTPError):
        return any(
            one["model"] == up.model for one in (await up.http.get(f"{url}/busy_threshold")).json()["thresholds"]
        )
    return False


async def test_a_moving_stream_is_not_turned_away(small: Cluster) -> None:
    """All workers are saturated when one dies: its streams go on, token for token."""
    one = Ask(content="hold fast", max_tokens=300)
    async with streaming(small, one) as live, busy(small, 1, 300):
        await live.until_pieces(5)
        await threshold(small, **{BLOCKS: 0.0})
        small.kill(live.answer.worker)
        answer = await live.done()
    check(one, answer)


@pytest.mark.parametrize(
    ("body", "kind", "status", "text"),
    [
        ({"model": "nobody"}, "", 404, "Model 'nobody' not found. Thresholds can only be set for discovered models."),
        ({BLOCKS: 1.5}, "", 400, f"{BLOCKS} must be between 0.0 and 1.0, got 1.5"),
        ({TOKENS: "many"}, "", 422, "int"),
        ({"active_decode": 0.5}, "", 422, "active_decode"),
        ({}, "text/plain", 415, "application/json"),
        ({"model": "x" * 70_000}, "", 413, "65536"),
    ],
)
async def test_wrong_threshold_requests(small: Cluster, body: dict, kind: str, status: int, text: str) -> None:
    content = json.dumps({"model": small.model, **body})
    answer = await small.http.post(
        "/busy_threshold", content=content, headers={"content-type": kind or "application/json"}
    )
    assert answer.status_code == status
    assert text in answer.json()["error"]


async def test_queue_serves_by_priority(tmp_path: Path) -> None:
    """One seat in all: five wait, and are served by strict priority, priority and arrival; the sixth is told why."""
    frontend = ("--admission-queue-limit", "5", f"--{BLOCKS.replace('_', '-')}", "0.0")
    async with cluster(tmp_path, engine=NARROW, workers=1, frontend=frontend) as up:
        served: list[str] = []

        async def one(name: str, **headers: str) -> None:
            assert (await ask(up, name, 12, x_request_id=name, **headers)).status_code == 200
            served.append(name)

        ranks: dict[str, dict[str, str]] = {
            "low": {},
            "low2": {},
            "high": {"x_dynamo_request_priority": "100"},
            "strict": {"x_dynamo_request_strict_priority": "1"},
            "high2": {"x_dynamo_request_priority": "100"},
        }
        async with busy(up, 1, 100), asyncio.TaskGroup() as group:
            for i, (name, headers) in enumerate(ranks.items(), 1):
                group.create_task(one(name, **headers))
                await up.until(lambda n=i: _queued(up, n), 5, every=0.005)
            details = explained(await ask(up, "too late"), "DYN_ADMISSION_QUEUE_LIMIT")
            assert (details["threshold"], details["measured"]) == (5, 5)
        assert served == ["strict", "high", "high2", "low", "low2"]
        await up.at_rest()
        assert not up.wire.broken


async def _queued(up: Cluster, count: int) -> bool:
    return (await up.leases())["queued"] == count


async def test_workers_own_limit_and_the_status_code(tmp_path: Path) -> None:
    """Workers refuse over running plus waiting; the frontend tries both, then answers with the configured status."""
    env = {"DYN_ENGINE_REQUEST_LIMIT": "1", "DYN_HTTP_OVERLOAD_STATUS_CODE": "529", "DYN_HTTP_MAX_REQUESTS": "4"}
    async with cluster(tmp_path, engine=NARROW, env=env) as up:
        async with busy(up):
            details = explained(await ask(up), "DYN_ENGINE_REQUEST_LIMIT", 529)
            assert details == {
                "layer": "worker",
                "knob": "DYN_ENGINE_REQUEST_LIMIT",
                "threshold": 1,
                "measured": 1,
                "workers": 2,
            }
            assert all(one["state"] == "usable" for one in (await up.instances()).values())
        await up.at_rest()
        answers = await asyncio.gather(*(ask(up, f"many {i}", 50) for i in range(CROWD)))
        knobs = {a.json()["error"]["details"]["knob"] for a in answers if a.status_code != 200}
        assert knobs == {"DYN_ENGINE_REQUEST_LIMIT", "DYN_HTTP_MAX_REQUESTS"}
        await exact(up, Ask(content="afterwards", max_tokens=10))
        await up.at_rest()
        assert not up.wire.broken


class Load(NamedTuple):
    """What one offered load led to."""

    goodput: float
    median: float
    """Latency of those served, in seconds."""
    p95: float


TOKENS_EACH = 20
STEP = 0.02
CAPACITY = 2 * SEATS / (TOKENS_EACH * STEP)
"""Requests a second that two workers can serve, by construction."""
WORDS = "%07d " + "abc " * 30
"""A prompt of 7 blocks, 8 or 9 in the end: one is under the threshold of 10, two are over it."""
GUARDS: dict[str, tuple[dict[str, str], tuple[str, ...]]] = {
    "worker limit": ({"DYN_ENGINE_REQUEST_LIMIT": str(SEATS)}, ()),
    "threshold": ({}, ("--active-decode-blocks-threshold", str(10 / 128))),
    "queue": ({"DYN_ENGINE_REQUEST_LIMIT": str(SEATS)}, ("--admission-queue-limit", "2")),
}


async def offer(up: Cluster, rate: float, seconds: float) -> Load:
    """Send requests at a steady rate, whatever becomes of them; the first fifth of the time does not count."""
    loop = asyncio.get_running_loop()
    began = loop.time()
    served: list[tuple[float, float]] = []

    async def one(number: int) -> None:
        at = loop.time()
        answer = await ask(up, WORDS % number, TOKENS_EACH)
        assert answer.status_code in (200, 503), answer.text
        if answer.status_code == 200:
            served.append((loop.time(), loop.time() - at))

    async with asyncio.TaskGroup() as group:
        for number in range(int(rate * seconds)):
            await asyncio.sleep(max(0.0, began + number / rate - loop.time()))
            group.create_task(one(number + int(rate * 1e6)))
    counted = [took for at, took in served if seconds / 5 <= at - began <= seconds]
    return Load(len(counted) / (seconds * 0.8), statistics.median(counted), statistics.quantiles(counted, n=20)[-1])


async def goodput_holds(tmp_path: Path, guard: str, seconds: float, loads: tuple[float, ...], held: float) -> None:
    env, frontend = GUARDS[guard]
    engine = (*NARROW[:2], "--mock-step-ms", str(STEP * 1000), *NARROW[4:])
    async with cluster(tmp_path, engine=engine, env=env, frontend=frontend) as up:
        await offer(up, CAPACITY / 2, 1.0)
        results = {load: await offer(up, CAPACITY * load, seconds) for load in loads}
        for load, result in results.items():
            print(
                f"{guard}: offered {load:g}x: {result.goodput:.1f}/s, "
                f"p50 {result.median * 1000:.0f}, p95 {result.p95 * 1000:.0f} ms"
            )
        peak = max(result.goodput for result in results.values())
        assert results[5.0].goodput >= held * peak
        assert results[5.0].goodput >= 0.7 * CAPACITY
        rounds = 2 if guard == "queue" else 1  # a place in the queue is worth a wait of one request at most
        assert results[5.0].median <= 1.3 * rounds * TOKENS_EACH * STEP + 0.1
        if held >= 0.9:  # enough answers for a percentile
            assert results[5.0].p95 <= 1.3 * rounds * TOKENS_EACH * STEP + 0.15
        await up.at_rest()


@pytest.mark.parametrize("guard", GUARDS)
async def test_goodput_holds_under_five_times_the_load(tmp_path: Path, guard: str) -> None:
    """The quick look: some thirty answers are counted, so the bound is coarse."""
    await goodput_holds(tmp_path, guard, 4.0, (1.0, 5.0), 0.8)


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize("guard", GUARDS)
async def test_goodput_over_the_whole_range(tmp_path: Path, guard: str) -> None:
    await goodput_holds(tmp_path, guard, 15.0, (0.5, 1.0, 1.5, 2.0, 3.0, 5.0), 0.9)
