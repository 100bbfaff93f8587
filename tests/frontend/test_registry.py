"""Models come, change and go while the frontend lives."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from holdfast.base.errors import HoldfastError, NoWorkers, TransportFault, WorkerFault
from holdfast.engines.mock import MockConfig
from holdfast.frontend import artifacts
from holdfast.frontend.artifacts import fetch_into
from holdfast.models.card import artifact_of
from holdfast.models.store import ArtifactStore
from tests.frontend.support import CHAT, Stack, chat, stack, until

FILE = b"tokenizer" * 1000
NAMED = artifact_of(FILE)


class FakeWorker:
    """Answers one bulk call as told."""

    def __init__(self, act: Callable[[Any], None], instance: str = "w"):
        self.instance = instance
        self._act = act
        self.killed = 0

    async def open_bulk(self, endpoint: str, headers: Any, payload: bytes, handler: Any) -> FakeWorker:
        assert (endpoint, payload) == ("artifact", NAMED.sha256.encode())
        self._act(handler)
        return self

    def kill(self, reason: str) -> None:
        self.killed += 1


def sends(*parts: bytes, end: bool = True) -> FakeWorker:
    def act(handler: Any) -> None:
        handler.on_accept()
        for index, part in enumerate(parts):
            handler.on_data(index, memoryview(part))
        if end:
            handler.on_end("done", None, 0)

    return FakeWorker(act)


def refuses(error: HoldfastError) -> FakeWorker:
    return FakeWorker(lambda handler: handler.on_refuse(error))


def breaks(after: bytes) -> FakeWorker:
    def act(handler: Any) -> None:
        handler.on_data(0, after)
        handler.on_broken(TransportFault("cut"))

    return FakeWorker(act)


async def fetch(*workers: FakeWorker) -> ArtifactStore:
    store = ArtifactStore()
    await fetch_into(store, NAMED, workers)  # type: ignore[arg-type]
    return store


GOOD = (FILE[:10], FILE[10:])


@pytest.mark.parametrize(
    "first",
    [
        refuses(WorkerFault("no such file")),
        sends(b"x" * len(FILE)),
        sends(FILE[:-1]),
        sends(FILE, b"more"),
        sends(),
        breaks(FILE[:100]),
    ],
)
async def test_the_next_worker_is_asked(first: FakeWorker) -> None:
    store = await fetch(first, sends(*GOOD))
    assert store.get(NAMED) == FILE
    assert first.killed == 1


async def test_a_silent_worker_is_left_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(artifacts, "SILENT_TIMEOUT", 0.05)
    silent = sends(FILE[:10], end=False)
    assert (await fetch(silent, sends(*GOOD))).get(NAMED) == FILE
    assert silent.killed == 1
    with pytest.raises(TransportFault, match=r"sent 10 of 9000 bytes"):
        await fetch(silent)


async def test_a_slow_worker_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(artifacts, "SILENT_TIMEOUT", 0.2)
    tasks = []

    def act(handler: Any) -> None:
        async def later() -> None:
            for at in range(0, len(FILE), 1000):
                handler.on_data(at, FILE[at : at + 1000])
                await asyncio.sleep(0.05)
            handler.on_end("done", None, 0)

        tasks.append(asyncio.create_task(later()))

    assert (await fetch(FakeWorker(act))).get(NAMED) == FILE


async def test_corrupt_bytes_are_nobodys_model() -> None:
    with pytest.raises(TransportFault, match="something else"):
        await fetch(sends(b"x" * len(FILE)))
    with pytest.raises(NoWorkers):
        await fetch()


async def models(one: Stack) -> list[str]:
    return [m["id"] for m in (await one.http.get("/v1/models")).json()["data"]]


async def test_no_worker_ever_seen() -> None:
    async with stack(0) as one:
        assert await models(one) == []
        got = await one.post(CHAT, chat())
        assert got.status_code == 404
        assert got.json()["error"]["code"] == "model_not_found"
        assert got.json()["error"]["param"] == "model"
        assert (await one.http.get("/health")).status_code == 503
        assert (await one.http.get("/live")).status_code == 200
        await one.add_worker()
        await one.served()
        assert await models(one) == ["mock"]
        assert (await one.http.get("/health")).status_code == 200
        assert (await one.post(CHAT, chat())).status_code == 200


async def test_files_that_do_not_come_are_not_waited_for_beyond_the_requests_own_time(monkeypatch) -> None:
    async with stack(1) as one:
        await one.served()
        registry = one.frontend.registry
        monkeypatch.setattr(registry, "_served", {})  # as in a frontend that has begun, and whose only worker died
        monkeypatch.setattr(registry, "_missing", list)
        got = await one.post(CHAT, chat(), x_holdfast_timeout_ms="120")
        assert got.status_code == 503
        assert got.json()["error"]["code"] == "no_workers"
        assert "within 0.12 s" in got.json()["error"]["message"]


async def test_names_and_aliases() -> None:
    async with stack(0) as one:
        await one.add_worker(served_model_name="real", model_aliases=("other", "third/name"))
        await one.served("third/name")
        await one.served("other")
        assert sorted(await models(one)) == ["other", "real", "third/name"]
        for name in ("real", "other", "third/name"):
            got = await one.post(CHAT, {**chat(), "model": name})
            assert got.json()["model"] == name
            assert (await one.http.get(f"/v1/models/{name}")).json()["id"] == name
        got = await one.http.get("/v1/models/nothing")
        assert got.status_code == 404
        assert got.json()["error"]["code"] == "model_not_found"


async def test_removed_on_purpose_is_not_listed_any_more() -> None:
    async with stack(0) as one:
        worker = await one.add_worker()
        await one.served()
        await one.remove_worker(worker)
        assert await models(one) == []
        assert (await one.http.get("/v1/models/mock")).status_code == 404
        got = await one.post(CHAT, chat())
        assert got.status_code == 503
        assert got.json()["error"]["code"] == "no_workers"


async def test_the_same_name_with_other_files_is_loaded_anew() -> None:
    async with stack(0) as one:
        worker = await one.add_worker()
        await one.served()
        long = chat("word " * 500, max_tokens=1)
        assert (await one.post(CHAT, long)).status_code == 200
        await one.remove_worker(worker)
        await one.add_worker(MockConfig(step_ms=0.0, context_length=100))
        await until(lambda: one.pool.usable("mock"))
        got = await one.post(CHAT, long)
        assert got.status_code == 400
        assert got.json()["error"]["code"] == "context_length_exceeded"
        assert "100" in got.json()["error"]["message"]


async def test_a_worker_that_disagrees_serves_nothing() -> None:
    async with stack(1) as one:
        odd = await one.add_worker(MockConfig(step_ms=0.0, context_length=100))
        await until(lambda: one.pool.worker(odd.instance))
        for _ in range(6):
            got = await one.post(CHAT, chat("word " * 200, max_tokens=1))
            assert got.status_code == 200
            assert got.headers["x-holdfast-worker"] != odd.instance


async def test_an_adapter_is_a_model_as_soon_as_it_is_seen_and_until_nobody_has_it() -> None:
    async with stack(2) as one:
        await one.served()
        first, second = [process for process, _ in one.workers.values()]
        base = one.frontend.registry.served()["mock"]
        for worker in (first, second):
            assert worker.adapters is not None
            await worker.adapters.load("shy", "")
        await until(lambda: len(one.pool.usable("shy")) == 2)
        shy = one.frontend.registry.served()["shy"]
        assert (shy.text, shy.card.base_model, shy.card.lora) == (base.text, "mock", "shy")
        listed = (await one.http.get("/v1/models/shy")).json()
        assert (listed["parent"], listed["root"]) == ("mock", "shy")
        got = await one.post(CHAT, {**chat(max_tokens=3), "model": "shy"})
        assert (got.status_code, got.json()["model"]) == (200, "shy")
        assert await first.adapters.unload("shy") == 0
        await until(lambda: [w.instance for w in one.pool.usable("shy")] == [second.instance])
        assert "shy" in await models(one)
        await second.adapters.unload("shy")
        await until(lambda: not one.pool.usable("shy"))
        assert await models(one) == ["mock"]
        got = await one.post(CHAT, {**chat(), "model": "shy"})
        assert (got.status_code, got.json()["error"]["code"]) == (404, "model_not_found")
        await first.adapters.load("shy", "")
        await one.served("shy")  # it may come back


async def test_an_adapter_whose_worker_was_lost_is_waited_for() -> None:
    async with stack(0) as one:
        worker = await one.add_worker()
        await one.served()
        await worker.adapters.load("shy", "")
        await one.served("shy")
        one.hub.lose(worker.instance)
        await worker.server.close()
        await until(lambda: not one.pool.usable("shy"))
        assert one.pool.replacement_expected("shy")
        assert sorted(await models(one)) == ["mock", "shy"]
