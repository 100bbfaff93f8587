"""Adapters served beside their base model by real processes: loaded while they run, killed in mid-stream, unloaded."""

from __future__ import annotations

import asyncio
import json
import urllib.error
import urllib.request
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

import openai
from tests.e2e.asking import exact, streaming
from tests.e2e.support import Cluster, cluster
from tests.e2e.truth import Ask, check
from tests.patience import within
from tests.support.weights import adapter_directory

pytestmark = [pytest.mark.e2e, pytest.mark.asyncio(loop_scope="module")]

ADAPTED = ("--engine", "mock", "--mock-step-ms", "5", "--lora-modules", "static=")
STATIC = "static"


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def adapted(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Cluster]:
    async with cluster(tmp_path_factory.mktemp("adapted"), engine=ADAPTED) as running:
        yield running


@pytest_asyncio.fixture(loop_scope="module")
async def up(adapted: Cluster) -> AsyncIterator[Cluster]:
    await adapted.usable()
    yield adapted
    await adapted.usable()
    await adapted.at_rest()


def ask(name: str, tokens: int = 60, **more: Any) -> Ask:
    return Ask(content=f"Tell {name} of the river.", max_tokens=tokens, model=name, lora=name, **more)


async def control(up: Cluster, instance: str, path: str, body: dict[str, Any] | None = None) -> tuple[int, Any]:
    """Call a worker's status server; a body makes it a POST."""
    record = next(r for r in records(up) if r["instance"] == instance)
    url = f"http://{record['system_address']}{path}"

    def call() -> tuple[int, Any]:
        data = None if body is None else json.dumps(body).encode()
        try:
            with urllib.request.urlopen(urllib.request.Request(url, data), timeout=60) as answer:
                return answer.status, json.load(answer)
        except urllib.error.HTTPError as error:
            return error.code, json.load(error)

    return await asyncio.to_thread(call)


def records(up: Cluster) -> list[dict[str, Any]]:
    files = sorted(Path(up.local.plan.env["DYN_FILE_KV"]).glob("*.json"))
    found = [json.loads(file.read_text())["record"] for file in files]
    return [record for record in found if record.get("cards")]


async def models(up: Cluster) -> dict[str, Any]:
    return {one.id: one async for one in up.client.models.list()}


async def serves(up: Cluster, name: str, *, there: bool = True) -> None:
    async def so() -> bool:
        return (name in await models(up)) is there

    await up.until(so, within(10))


async def load(up: Cluster, instance: str, name: str, path: Path | str = "") -> None:
    body = {"lora_name": name, "lora_path": str(path)}
    status, answer = await control(up, instance, "/engine/load_lora_adapter", body)
    assert (status, answer["status"], answer["lora_name"]) == (200, "success", name), answer


async def test_base_and_static_adapter_are_models_of_their_own(up: Cluster) -> None:
    listed = await models(up)
    assert listed["mock"].parent is None
    assert (listed[STATIC].parent, listed[STATIC].root) == ("mock", STATIC)
    assert listed[STATIC].max_model_len == listed["mock"].max_model_len
    base, adapter = Ask(content="Tell static of the river."), ask(STATIC)
    await exact(up, base)
    await exact(up, adapter)
    assert base.expected()[0][:40] != adapter.expected()[0][:40]


async def test_loaded_at_run_time_moved_after_a_kill_and_unloaded(up: Cluster, tmp_path: Path) -> None:
    first, second = await up.instances()
    files = adapter_directory(tmp_path / "adapter")
    with pytest.raises(openai.NotFoundError):
        await exact(up, ask("late"))
    await load(up, first, "late", files)
    await serves(up, "late")
    answer = await exact(up, ask("late"))
    assert answer.worker == first, "the other one has no such adapter"
    await load(up, second, "late", files)
    _, listing = await control(up, second, "/v1/loras")
    assert (listing["count"], sorted(listing["loras"])) == (2, ["late", STATIC])

    async with streaming(up, ask("late", 400)) as live:
        await live.until_pieces(30)
        serving = live.answer.worker
        up.kill(serving)
        answer = await live.done()
    check(ask("late", 400), answer)
    assert answer.causes == ["disconnected"]
    other = second if serving == first else first
    await up.usable()
    status, listing = await control(up, serving, "/engine/list_lora_adapters")
    assert (status, list(listing["loras"])) == (200, [STATIC]), "what was loaded at run time is gone with its process"
    for _ in range(3):
        assert (await exact(up, ask("late", 5))).worker == other

    status, answer_ = await control(up, other, "/engine/unload_lora_adapter", {"lora_name": "late"})
    assert (status, answer_["streams_moved"]) == (200, 0), answer_
    await serves(up, "late", there=False)
    with pytest.raises(openai.NotFoundError) as refused:
        await exact(up, ask("late"))
    assert refused.value.code == "model_not_found"
    await exact(up, Ask(content="the base is still there"))


async def test_streams_of_an_adapter_that_is_unloaded_finish_or_move(tmp_path: Path) -> None:
    patient = {"DYN_LORA_UNLOAD_TIMEOUT_SECS": "0.3"}
    async with cluster(tmp_path, engine=ADAPTED, env=patient) as up:
        async with streaming(up, ask(STATIC, 500)) as long, streaming(up, ask(STATIC, 500)) as longer:
            await long.until_pieces(5)
            await longer.until_pieces(5)
            leaving = long.answer.worker
            status, answer = await control(up, leaving, "/engine/unload_lora", {"lora_name": STATIC})
            assert status == 200
            assert answer["streams_moved"] >= 1
            for live in (long, longer):
                check(ask(STATIC, 500), got := await live.done())
                assert got.causes == (["worker_draining"] if live.answer.worker == leaving else [])
        await up.at_rest()


async def test_an_adapter_of_other_weights_under_the_same_name_is_refused(up: Cluster, tmp_path: Path) -> None:
    first, second = await up.instances()
    await load(up, first, "twin", adapter_directory(tmp_path / "a", fill=1))
    await load(up, second, "twin", adapter_directory(tmp_path / "b", fill=2))
    await serves(up, "twin")

    async def refused() -> bool:
        seen = await up.get("/health")
        return "adapter_weights" in json.dumps(seen)

    await up.until(refused, within(10))
    for _ in range(4):
        assert (await exact(up, ask("twin", 5))).worker == first
    for instance in (first, second):
        status, _ = await control(up, instance, "/engine/unload_lora_adapter", {"lora_name": "twin"})
        assert status == 200
    await serves(up, "twin", there=False)


async def test_what_cannot_be_loaded_is_told(up: Cluster, tmp_path: Path) -> None:
    instance = next(iter(await up.instances()))
    path = "/engine/load_lora_adapter"
    for body, code, text in (
        ({"lora_name": STATIC, "lora_path": ""}, 409, "loaded here already"),
        ({"lora_name": "mock", "lora_path": ""}, 409, "base model's own name"),
        ({"lora_name": "../x", "lora_path": ""}, 400, "no name for a model"),
        ({"lora_name": "new", "lora_path": str(tmp_path)}, 400, "no adapter_config.json"),
        ({"lora_name": "new", "source": {"uri": "s3://bucket/x"}}, 400, "download nothing"),
        ({"lora_path": "x"}, 400, "lora_name"),
    ):
        status, answer = await control(up, instance, path, body)
        assert (status, text in answer["error"]["message"]) == (code, True), answer
    status, answer = await control(up, instance, "/engine/unload_lora_adapter", {"lora_name": "none"})
    assert (status, "there are: static" in answer["error"]["message"]) == (404, True), answer
