"""Two prefill and two decode workers, real processes: either leg is killed, frozen, cancelled or handed nonsense."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio

from tests.e2e.asking import exact, streaming
from tests.e2e.support import MOCK, Cluster, cluster
from tests.e2e.truth import Ask, check
from tests.patience import within

pytestmark = [pytest.mark.e2e, pytest.mark.asyncio(loop_scope="module")]
SOON = ("--handoff-timeout", "3")
"""A rendezvous whose twin stays away is waited for no longer than this."""
LONG_PROMPT = "[[mock:prefill 2]] a long prompt"


@pytest_asyncio.fixture(scope="module", loop_scope="module", params=["after_prefill", "rendezvous"])
async def shared(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> AsyncIterator[Cluster]:
    """In both styles of handing over; transfers take a few milliseconds."""
    engine = (*MOCK, "--mock-handoff-phase", request.param, "--kv-transfer-bandwidth", "1")
    async with cluster(tmp_path_factory.mktemp("split"), engine=engine, workers=4, prefill=2, frontend=SOON) as running:
        yield running


@pytest_asyncio.fixture(loop_scope="module")
async def split(shared: Cluster) -> AsyncIterator[Cluster]:
    """All workers usable before the test; nothing held after it."""
    await shared.usable()
    await all_prefill_workers(shared)
    yield shared
    await shared.usable()
    await shared.at_rest()
    broken, shared.wire.broken = shared.wire.broken, []
    assert not broken, broken


async def all_prefill_workers(split: Cluster) -> None:
    async def there() -> bool:
        return bool((await split.get("/health"))["prefill"].get("mock") == 2)

    await split.until(there, within(30))


async def events(split: Cluster, label: str) -> list[tuple[str, str]]:
    """What a request went through."""
    story = await split.get(f"/debug/requests/{label}")
    return [(one["event"], one["detail"]) for one in story["choices"][0]["timeline"]] if "choices" in story else []


async def prefilling(split: Cluster, label: str) -> str:
    """Wait until a prefill worker computes the prompt; returns its instance id."""

    async def accepted() -> str:
        found = dict(await events(split, label))
        return found.get("prefill", "") if "prefill accepted" in found else ""

    return str(await split.until(accepted, within(10), every=0.01))


async def roles(split: Cluster) -> dict[str, str]:
    return {name: one["role"] for name, one in (await split.instances()).items()}


async def test_prompts_and_streams_have_workers_of_their_own(split: Cluster) -> None:
    parts = await roles(split)
    assert sorted(parts.values()) == ["decode", "decode", "prefill", "prefill"]
    health = await split.get("/health")
    assert (health["models"], health["prefill"]) == ({"mock": 2}, {"mock": 2})
    components = {one["component"]: one["role"] for one in health["instances"]}
    assert components == {"prefill": "prefill", "backend": "decode"}
    for number in range(4):
        answer = await exact(split, Ask(content=f"both parts {number}"))
        told = dict(await events(split, answer.label))
        assert parts[answer.worker] == "decode"
        assert parts[told["prefill"]] == "prefill"
        assert "local prefill" not in told
    remote = await split.metric("holdfast_frontend_prefill_decisions_total", reason="remote")
    handed = await split.metric("holdfast_frontend_prefill_legs_total", outcome="handed_over")
    assert remote == handed >= 4


async def test_a_prefill_worker_is_killed_with_the_prompt(split: Cluster) -> None:
    ask = Ask(content=LONG_PROMPT)
    async with streaming(split, ask) as live:
        split.kill(await prefilling(split, live.label))
        answer = await live.done(within(30))
    check(ask, answer)
    assert "prefill failed" in dict(await events(split, live.label)) or answer.moves


async def test_a_prefill_worker_is_killed_after_it_has_handed_over(split: Cluster) -> None:
    ask = Ask(content="tell me more", max_tokens=120)
    async with streaming(split, ask) as live:
        await live.until_pieces(20)
        split.kill(dict(await events(split, live.label))["prefill"])
        answer = await live.done(within(30))
    check(ask, answer)
    assert answer.moves == [], "a stream that has begun needs its prefill worker no more"


@pytest.mark.parametrize("temperature", [0.0, 1.1])
async def test_a_decode_worker_is_killed_in_mid_stream(split: Cluster, temperature: float) -> None:
    ask = Ask(content="tell me more", max_tokens=120, temperature=temperature)
    async with streaming(split, ask) as live:
        await live.until_pieces(30)
        split.kill(live.answer.worker)
        answer = await live.done(within(30))
    check(ask, answer)
    assert answer.moves[0]["at"] >= 30
    assert answer.holdfast[0]["join"] == "exact"
    legs = [detail for event, detail in await events(split, live.label) if event == "prefill"]
    assert len(legs) == 2, "the prompt and what was generated are computed apart again"


async def test_all_decode_workers_are_killed_while_the_prompt_is_computed(split: Cluster) -> None:
    ask = Ask(content=LONG_PROMPT)
    async with streaming(split, ask) as live:
        await prefilling(split, live.label)
        for instance, role in (await roles(split)).items():
            if role == "decode":
                split.kill(instance)
        answer = await live.done(within(40))
    check(ask, answer)


async def test_all_prefill_workers_are_killed(split: Cluster) -> None:
    ask = Ask(content=LONG_PROMPT)
    async with streaming(split, ask) as live:
        await prefilling(split, live.label)
        for instance, role in (await roles(split)).items():
            if role == "prefill":
                split.kill(instance)
        answer = await live.done(within(30))
    check(ask, answer)
    assert dict(await events(split, live.label))["local prefill"] in (
        "suspect",
        "no_prefill_worker",
        "failed",
        "handoff",
    )


async def test_a_frozen_prefill_worker_is_not_waited_for(split: Cluster) -> None:
    ask = Ask(content=LONG_PROMPT)
    async with streaming(split, ask) as live, split.frozen(await prefilling(split, live.label)):
        answer = await live.done(within(30))
    check(ask, answer)


async def test_a_client_that_leaves_stops_the_prefill_worker(split: Cluster) -> None:
    async with streaming(split, Ask(content="[[mock:prefill 20]] nobody waits for this")) as live:
        instance = await prefilling(split, live.label)
        await live.leave()
    async with split.peer(instance) as worker:
        await worker.idle(within(5))
    await split.at_rest(within(10))


@pytest.mark.parametrize("do", ["lose", "swap"])
async def test_hand_offs_that_go_wrong_change_nothing(split: Cluster, do: str) -> None:
    for instance, role in (await roles(split)).items():
        if role == "prefill":
            async with split.peer(instance) as worker:
                await worker.tell(do, times=2)
    for number in range(4):
        await exact(split, Ask(content=f"{do} {number}"), within(30))
    seen = await split.instances()
    assert not [one["problem"] for one in seen.values() if one["role"] == "decode" and one["problem"]]


async def test_a_burst_goes_through(split: Cluster) -> None:
    asks = [Ask(content=f"burst {i} " + "word " * (7 * i), max_tokens=20, n=1 + i % 2) for i in range(16)]
    lives: list[Any] = []
    for ask in asks:
        live = streaming(split, ask)
        lives.append((ask, live, await live.__aenter__()))
    for ask, context, live in lives:
        check(ask, await live.done(within(40)))
        await context.__aexit__(None, None, None)
