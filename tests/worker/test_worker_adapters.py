"""What a worker says and does when adapters come and go, and when that fails half-way."""

import asyncio
import random

import msgspec
import pytest

from holdfast.base.errors import Conflict, EngineFailed, NotFound, PayloadTooLarge, UnsupportedFeature, WorkerDraining
from holdfast.base.settings import InvalidSetting
from holdfast.engines.mock import MockConfig
from holdfast.engines.mock.adapters import AbleMock
from holdfast.engines.mock.checker import expected_tokens
from holdfast.runtime.discovery.mem import MemDiscovery, MemHub
from holdfast.worker.config import WorkerConfig
from holdfast.worker.lora_config import LoraConfig
from holdfast.worker.process import WorkerProcess
from tests.engines.mock.mockrun import request
from tests.frontend.support import until
from tests.patience import within
from tests.support.weights import adapter_directory
from tests.worker.remote import generate, linked


def named(model, **how):
    return msgspec.structs.replace(request(**how), model=model)


class Fleet:
    """One worker in this process, its engine and its record."""

    def __init__(self, mock=None, **lora):
        self.hub = MemHub()
        self.engine = AbleMock(mock or MockConfig(step_ms=2.0))
        config = WorkerConfig(engine="mock", lora=LoraConfig(**lora))
        self.worker = WorkerProcess(config, self.engine, MemDiscovery(self.hub), random.Random(3))
        self.history = []

    @property
    def record(self):
        (record,) = self.watcher.snapshot()
        return record

    @property
    def cards(self):
        return [card.name for card in self.record.cards]

    async def offers(self, *names):
        """Wait until callers see these models."""
        await until(lambda: self.cards == list(names), within(5))

    async def __aenter__(self):
        self.watcher = MemDiscovery(self.hub)
        await self.watcher.start()
        self.watcher.subscribe(lambda event: self.history.append((event.kind, event.record)))
        self.task = asyncio.create_task(self.worker.run())
        done, _ = await asyncio.wait([self.task, ready := asyncio.create_task(self.worker.ready.wait())],
                                     timeout=within(10), return_when=asyncio.FIRST_COMPLETED)  # fmt: skip
        ready.cancel()
        if self.task in done:
            self.task.result()
        return self

    async def __aexit__(self, *_):
        self.worker.stop()
        await asyncio.wait([self.task], timeout=within(10))
        await self.watcher.close()


async def test_the_record_always_has_the_base_model_first(tmp_path):
    files = adapter_directory(tmp_path / "a")
    async with Fleet(lora_modules=(f"first={files}",)) as fleet:
        await fleet.offers("mock", "first")  # from the first record on
        await fleet.worker.adapters.load("second", "")
        await fleet.offers("mock", "first", "second")
        base, first, second = fleet.record.cards
        assert (first.tokenizer, first.prompt_files) == (base.tokenizer, base.prompt_files)
        assert (first.base_model, len(first.adapter_weights), second.adapter_weights) == ("mock", 64, "")
        assert len({base.fingerprint, first.fingerprint, second.fingerprint}) == 3
        assert [one.path for one in fleet.worker.adapters.listing()] == [str(files), ""]
        await fleet.worker.adapters.unload("first")
        await fleet.offers("mock", "second")
        assert {kind for kind, _ in fleet.history} == {"added", "changed"}
        assert all(record.cards[0].name == "mock" for _, record in fleet.history)


async def test_requests_by_name_use_the_adapter():
    async with Fleet(lora_modules=("shy=",)) as fleet, linked(fleet.record.address) as link:
        wanted = request(lora="shy")
        forged = await generate(link, wanted).ended()
        assert forged.tokens == expected_tokens(request()), "the name decides"
        meant = await generate(link, named("shy")).ended()
        assert meant.tokens == expected_tokens(named("shy", lora="shy")) != forged.tokens
        await fleet.worker.adapters.unload("shy")
        assert (await generate(link, named("shy")).ended()).error.code == "worker_draining"
        assert (await generate(link, named("never")).ended()).error.code == "model_not_found"


async def test_streams_have_a_while_to_finish_then_move():
    async with (
        Fleet(lora_modules=("shy=",), lora_unload_timeout=0.1) as fleet,
        linked(fleet.record.address) as link,
    ):
        base = generate(link, request(max_tokens=400))
        long = generate(link, named("shy", max_tokens=10_000))
        await long.until(lambda: len(long.tokens) > 2)
        unloading = asyncio.create_task(fleet.worker.adapters.unload("shy"))
        await fleet.offers("mock")  # callers hear of it first
        with pytest.raises(Conflict, match="already"):
            await fleet.worker.adapters.unload("shy")
        with pytest.raises(Conflict, match="already"):
            await fleet.worker.adapters.load("shy", "")
        late = await generate(link, named("shy", max_tokens=5)).ended()
        assert late.finish == "length", "whoever has not heard yet is still served"
        assert await unloading == 1
        await long.ended()
        assert long.error.code == "worker_draining"
        await base.ended()
        assert base.finish == "length", "nobody else's streams are touched"


async def test_an_engine_that_refuses_leaves_nothing_behind():
    async with Fleet(MockConfig(max_loras=1)) as fleet:
        await fleet.worker.adapters.load("one", "")
        with pytest.raises(Exception, match="room for 1"):
            await fleet.worker.adapters.load("two", "")
        await fleet.offers("mock", "one")
        with pytest.raises(NotFound, match="there are: one"):
            await fleet.worker.adapters.unload("two")


async def test_a_record_that_cannot_be_published_takes_the_adapter_back(monkeypatch):
    async with Fleet() as fleet:
        adapters = fleet.worker.adapters

        async def refuse(_record):
            raise PayloadTooLarge("too many cards")

        monkeypatch.setattr(fleet.worker._discovery, "publish", refuse)
        with pytest.raises(PayloadTooLarge):
            await adapters.load("shy", "")
        assert (adapters.listing(), fleet.engine.adapters()) == ((), ())
        monkeypatch.undo()
        await adapters.load("shy", "")
        monkeypatch.setattr(fleet.worker._discovery, "publish", refuse)
        with pytest.raises(PayloadTooLarge):
            await adapters.unload("shy")
        assert [one.name for one in adapters.listing()] == ["shy"]
        monkeypatch.undo()


async def test_nothing_is_published_after_leaving_began():
    async with Fleet() as fleet:
        adapters = fleet.worker.adapters
    with pytest.raises(WorkerDraining, match="leaving"):
        await adapters.load("shy", "")
    assert {kind for kind, _ in fleet.history} <= {"added", "removed"}


async def test_settings_that_cannot_be_met_stop_the_start(tmp_path):
    with pytest.raises(UnsupportedFeature, match="takes no adapters"):
        async with Fleet(MockConfig(max_loras=0), lora_modules=("shy=",)):
            pass
    with pytest.raises(Exception, match=r"no adapter_config\.json"):
        async with Fleet(lora_modules=(f"shy={tmp_path}",)):
            pass
    with pytest.raises(InvalidSetting, match="expected name=directory"):
        _ = LoraConfig(lora_modules=("shy",)).modules


class Sleepwalker(AbleMock):
    """Wakes up into a hang."""

    async def wake_up(self):
        await super().wake_up()
        self.control({"do": "hang"})


async def test_an_engine_that_wakes_up_broken_gets_no_work_until_it_answers(monkeypatch):
    fleet = Fleet()
    fleet.engine = Sleepwalker(MockConfig(step_ms=2.0))
    fleet.worker = WorkerProcess(WorkerConfig(engine="mock"), fleet.engine, MemDiscovery(fleet.hub), random.Random(3))
    async with fleet:
        worker = fleet.worker
        rest = worker._rest
        await rest.sleep(fleet.engine)
        assert worker.state == "stalled"
        await until(lambda: fleet.record.state == "stalled", within(5))
        monkeypatch.setattr(worker.vitals.canary, "_config", _hasty(worker.vitals.canary._config))
        with pytest.raises(EngineFailed, match=r"woken up, but the canary failed: .*comes back by itself"):
            await rest.wake_up(fleet.engine)
        assert worker.state == "stalled"
        assert not worker.vitals.readiness.verdict.ready
        fleet.engine.control({"do": "unhang"})
        await until(lambda: worker.state == "ready" and fleet.record.state == "ready", within(10))


def _hasty(config):
    return msgspec.structs.replace(config, health_check_request_timeout=0.2)
