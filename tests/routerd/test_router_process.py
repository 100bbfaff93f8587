"""Real processes: a router answers people with curl, and frontends that ask it lose nothing when it dies."""

from __future__ import annotations

import asyncio
import json
import random
import signal
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
import pytest_asyncio

from holdfast.base.errors import InvalidRequest
from holdfast.engines.contract import pack_ids
from holdfast.runtime.api import DistributedRuntime
from holdfast.runtime.discovery.factory import open_discovery
from tests.patience import within
from tests.routerd.support import MOCK, Processes, answers, ask, metric, processes

pytestmark = [pytest.mark.e2e, pytest.mark.asyncio(loop_scope="module")]
ASKING = ("--router-component", "router", "--router-ask-timeout-ms", "1000")


class Site:
    """Two workers, two routers, and a frontend that asks them."""

    def __init__(self, running: Processes):
        self.running = running
        self.frontend = ""
        self.routers: dict[str, tuple[asyncio.subprocess.Process, str]] = {}

    async def start(self) -> None:
        for _ in range(2):
            await self.running.start("worker", *MOCK)
        for number in range(2):
            instance = f"{number + 1:016x}"
            self.routers[instance] = await self.running.router("--instance-id", instance)
        _, self.frontend = await self.running.frontend(*ASKING)
        for _, url in self.routers.values():
            await answers(f"{url}/health")
        await answers(f"{self.frontend}/health")
        while await self.usable() < 4:  # noqa: ASYNC110  other processes have no event to wait for
            await asyncio.sleep(0.02)

    async def usable(self) -> int:
        seen = (await answers(f"{self.frontend}/health"))["instances"]
        return sum(one["state"] == "usable" for one in seen)

    async def stream(self, prompt: list[int], tokens: int, client: httpx.AsyncClient) -> AsyncIterator[str]:
        body = {"model": "mock", "prompt": prompt, "max_tokens": tokens, "stream": True, "seed": 1, "temperature": 1}
        url = f"{self.frontend}/v1/completions"
        async with client.stream("POST", url, json=body, timeout=within(60)) as answer:
            assert answer.status_code == 200, await answer.aread()
            async for line in answer.aiter_lines():
                if line.startswith("data: {"):
                    event = json.loads(line[6:])
                    assert "error" not in event, event
                    yield "".join(choice["text"] for choice in event["choices"])

    async def text(self, prompt: list[int], tokens: int) -> str:
        async with httpx.AsyncClient() as client:
            return "".join([part async for part in self.stream(prompt, tokens, client)])

    async def advice(self, outcome: str) -> float:
        return await metric(self.frontend, "holdfast_frontend_router_advice_total", outcome=outcome)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def site(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Site]:
    async with processes(tmp_path_factory.mktemp("routerd")) as running:
        made = Site(running)
        async with asyncio.timeout(within(60)):
            await made.start()
        yield made


def a_prompt(seed: int, length: int = 800) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(1000) for _ in range(length)]


async def test_a_person_can_ask_who_is_best(site: Site) -> None:
    url = next(iter(site.routers.values()))[1]
    prompt = a_prompt(1)
    await site.text(prompt, 1)

    async def known() -> dict[str, Any]:
        while True:
            best = (await ask(url, "best_worker_id", model="mock", token_ids=prompt)).json()
            if best.get("overlap_blocks") == len(prompt) // best["block_size"]:
                return dict(best)
            await asyncio.sleep(0.02)

    async with asyncio.timeout(within(10)):
        best = await known()
    assert len(best["scores"]) == 2, "all candidates are told"
    assert best["scores"][0]["worker_id"] == best["worker_id"]
    assert best["scores"][0]["cost"] < best["scores"][1]["cost"]
    held = (await ask(url, "get_overlap_scores", model="mock", token_ids=prompt)).json()
    assert [one["worker_id"] for one in held["scores"]] == [best["worker_id"]]
    assert held["scores"][0]["device_blocks"] == best["overlap_blocks"]
    assert set(held["states"].values()) == {"exact"}
    assert await metric(site.frontend, "dynamo_component_router_kv_event_source_mismatch_workers") == 0, (
        "no cache there"
    )


async def test_a_program_can_ask_over_the_wire(site: Site) -> None:
    discovery = open_discovery("file", root=site.running.env["DYN_FILE_KV"])
    async with DistributedRuntime(discovery) as runtime:
        client = await runtime.namespace("dynamo").component("router").endpoint("best_worker_id").client()
        await client.wait_for_instances(within(10))
        question = {"model": "mock", "token_ids": pack_ids(a_prompt(1))}
        answers_ = [best async for best in await client.generate(question)]
        assert len(answers_) == 1
        assert answers_[0]["total_blocks"] == -(-800 // answers_[0]["block_size"])
        with pytest.raises(InvalidRequest, match="either"):
            async for _ in await client.generate({"model": "mock"}):
                pass


async def test_a_lease_counts_until_it_is_freed(site: Site) -> None:
    url = next(iter(site.routers.values()))[1]
    question = {"model": "mock", "token_ids": a_prompt(2)}
    first = (await ask(url, "best_worker_id", **question, request_id="one")).json()
    busy = (await ask(url, "best_worker_id", **question)).json()
    mine = next(one for one in busy["scores"] if one["worker_id"] == first["worker_id"])
    assert mine["requests"] >= 1
    assert await metric(url, "holdfast_router_leases") >= 1
    assert (await ask(url, "mark_prefill_complete", request_id="one")).json() == {"found": True}
    assert (await ask(url, "free", request_id="one")).json() == {"found": True}
    assert (await ask(url, "free", request_id="one")).json() == {"found": False}


async def test_what_cannot_be_answered_says_why(site: Site) -> None:
    url = next(iter(site.routers.values()))[1]
    for question, status, word in (
        ({"model": "nobody's", "token_ids": [1]}, 404, "mock"),
        ({"model": "mock"}, 400, "token_ids"),
        ({"model": "mock", "token_ids": [-1]}, 400, "32 bits"),
        ({"model": "mock", "block_hashes": [1], "block_size": 7}, 400, "block_size"),
    ):
        answer = await ask(url, "best_worker_id", **question)
        assert answer.status_code == status, answer.text
        assert word in answer.text
    assert await metric(url, "holdfast_router_questions_total", outcome="invalid_request") >= 3


async def test_a_frozen_router_costs_one_request_the_bound_and_the_next_one_nothing(site: Site) -> None:
    process, _ = site.routers["0000000000000001"]
    loop = asyncio.get_running_loop()
    process.send_signal(signal.SIGSTOP)
    try:
        for seed in range(20, 23):
            began = loop.time()
            assert await site.text(a_prompt(seed), 2)
            assert loop.time() - began < within(3)
        assert await site.advice("late") == 1, "afterwards the other one is asked"
    finally:
        process.send_signal(signal.SIGCONT)
    async with asyncio.timeout(within(20)):
        while await site.usable() < 4:  # noqa: ASYNC110  other processes have no event to wait for
            await asyncio.sleep(0.05)


async def test_a_killed_router_takes_no_stream_with_it_and_the_next_one_is_asked(site: Site) -> None:
    prompt = a_prompt(3)
    whole = await site.text(prompt, 200)
    before = await site.advice("taken")
    asked = [await metric(url, "holdfast_router_questions_total", outcome="ok") for _, url in site.routers.values()]
    async with httpx.AsyncClient() as client:
        parts: list[str] = []
        async for part in site.stream(prompt, 200, client):
            parts.append(part)
            if len(parts) == 20:
                first = site.routers["0000000000000001"][0]
                first.send_signal(signal.SIGKILL)
                await first.wait()
        assert "".join(parts) == whole, "token for token"
    assert await site.advice("taken") == before + 1
    for seed in range(4, 8):
        assert await site.text(a_prompt(seed), 5)
    second = site.routers["0000000000000002"][1]
    assert await metric(second, "holdfast_router_questions_total", outcome="ok") >= asked[1] + 3
    assert await site.advice("taken") >= before + 4


async def test_without_any_router_the_frontend_decides_itself(site: Site) -> None:
    process, _ = site.routers["0000000000000002"]
    process.send_signal(signal.SIGTERM)
    async with asyncio.timeout(within(20)):
        assert await process.wait() == 0
    for seed in range(10, 13):
        assert await site.text(a_prompt(seed), 5)
    assert await site.advice("nobody") >= 2
