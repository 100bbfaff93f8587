"""A worker's KV cache, its log and its endpoint on a network in memory, and a frontend that follows them."""

from __future__ import annotations

import asyncio
import random
from array import array
from collections.abc import AsyncGenerator, Callable
from typing import Any

import msgspec

from holdfast.base.errors import HoldfastError
from holdfast.engines.contract import Capabilities, EngineInfo, ModelFiles
from holdfast.engines.mock.cache import BlockPool
from holdfast.kv.events import KvEvent
from holdfast.kv.feed import ENDPOINT, Deltas, Message, Part
from holdfast.kv.hashes import block_hashes
from holdfast.models.card import Artifact, ModelCard
from holdfast.routing.knowledge import PrefixKnowledge
from holdfast.routing.knowledge_config import KnowledgeSettings
from holdfast.routing.knowledge_keeper import KnowledgeKeeper
from holdfast.runtime.context import Context
from holdfast.runtime.discovery.contract import InstanceRecord
from holdfast.runtime.link import Link
from holdfast.runtime.server import WorkerServer
from holdfast.worker.kv_config import KvPublishConfig
from holdfast.worker.kv_publish import KvPublisher
from tests.runtime.memory_network import MemoryNetwork

SIZE = 4
NO_FILE = Artifact("0" * 64, 0)


def info(**how: Any) -> EngineInfo:
    return EngineInfo(
        engine="mock", version="1", model="m", context_length=4096, block_size=SIZE, total_kv_blocks=1000,
        max_num_seqs=8, max_num_batched_tokens=512, eos_token_ids=(0,), vocab_size=1000, fingerprint="f",
        capabilities=Capabilities(kv_events=True, kv_hashes="sequence", **how),
        files=ModelFiles(tokenizer_json=b"{}", chat_template=""),
    )  # fmt: skip


def card(block_size: int = SIZE) -> ModelCard:
    return ModelCard("m", NO_FILE, NO_FILE, 4096, (0,), 1000, block_size, total_kv_blocks=1000)


class Cache:
    """A cache with the events of the mock engine, filled and emptied directly."""

    def __init__(self, blocks: int = 400) -> None:
        self.pool = BlockPool(blocks, SIZE)

    def fill(self, tokens: list[int]) -> array[int]:
        """Compute a prompt and park it; returns its hashes."""
        pool = self.pool
        names = block_hashes(tokens, SIZE)
        known = pool.match(names)
        pool.hold(names[:known])
        assert pool.take(len(names) - known)
        pool.seal(names[known:], names[known - 1] if known else None, tokens[known * SIZE :])
        pool.release(names, 0)
        return names

    def take_kv_events(self) -> list[KvEvent]:
        return self.pool.take_events()

    def kv_digests(self) -> tuple[tuple[int, int], ...]:
        return ((self.pool.cached, self.pool.digest),)

    def resend_kv_events(self) -> None:
        self.pool.resend()


class Mangler:
    """What can happen to the messages of a publisher."""

    def __init__(self, rng: random.Random, share: float) -> None:
        self.rng, self.share = rng, share
        self.struck = 0
        self._late: Message | None = None

    def __call__(self, message: Message) -> list[Message]:
        late, self._late = self._late, None
        out = [message] if late is None else [message, late]
        if isinstance(message, Deltas | Part) and self.rng.random() < self.share:
            self.struck += 1
            what = self.rng.choice(["lose", "repeat", "reorder"])
            if what == "lose":
                out = out[1:]
            elif what == "repeat":
                out = [message, *out]
            else:
                self._late, out = message, out[1:]
        return out


class Site:
    """One worker: cache, log, server. ``restart`` gives it a new epoch on the same address."""

    def __init__(self, network: MemoryNetwork, rng: random.Random, *, config: KvPublishConfig | None = None) -> None:
        self.network, self.rng = network, rng
        self.config = config or KvPublishConfig()
        self.mangle: Callable[[Message], list[Message]] | None = None
        self.port = 0
        self.epoch = 0
        self._watching: asyncio.Task[None] | None = None

    async def start(self) -> None:
        self.epoch += 1
        self.cache = Cache()
        self.publisher = KvPublisher(self.cache, self.epoch, self.config)  # type: ignore[arg-type]
        inner = self.publisher.serve

        async def serve(request: Any, context: Context) -> AsyncGenerator[Message, None]:
            async for message in inner(request, context):
                for one in [message] if self.mangle is None else self.mangle(message):
                    yield one

        self.publisher.serve = serve  # type: ignore[method-assign]
        self.server = WorkerServer("w1", self.epoch, rng=self.rng, transport=self.network)
        handler = self.publisher.begin(info())
        assert handler is not None
        self.server.register(ENDPOINT, handler)
        address = await self.server.start("127.0.0.1", self.port)
        self.port = int(address.rpartition(":")[2])
        self._watching = asyncio.get_running_loop().create_task(self.publisher.watch())

    async def stop(self) -> None:
        if self._watching is not None:
            self._watching.cancel()
            await asyncio.wait([self._watching])
        await self.publisher.cancel()
        await self.server.close()

    def step(self) -> None:
        """An engine step is over."""
        self.publisher.take(self.cache.take_kv_events())

    @property
    def truth(self) -> frozenset[int]:
        return self.cache.pool.contents


class Member:
    """As `runtime.member.Worker` is to the keeper."""

    def __init__(self, epoch: int, *, endpoints: tuple[str, ...] = (ENDPOINT,), instance: str = "w1") -> None:
        self.instance = instance
        self.epoch = epoch
        self.link: Link | None = None
        self.state = "usable"
        self.draining = self.gone = False
        self.record = InstanceRecord(
            namespace="n",
            component="c",
            endpoints=endpoints,
            instance=instance,
            epoch=epoch,
            address="x:1",
            cards=(card(),),
        )

    async def open_bulk(self, *args: Any, **how: Any) -> Any:
        assert self.link is not None
        return await self.link.open_bulk(*args, **how)


class Pool:
    """As `runtime.pool.WorkerPool` is to the keeper."""

    def __init__(self) -> None:
        self.members: list[Member] = []
        self._sinks: list[Any] = []

    def all_workers(self) -> list[Member]:
        return list(self.members)

    def subscribe(self, sink: Any) -> Callable[[], None]:
        self._sinks.append(sink)
        return lambda: self._sinks.remove(sink)

    def tell(self, event: str, member: Member) -> None:
        for sink in self._sinks:
            sink(event, member)


class Front:
    """A frontend's knowledge of one site."""

    def __init__(self, site: Site, settings: KnowledgeSettings | None = None) -> None:
        self.site = site
        self.pool = Pool()
        self.knowledge = PrefixKnowledge(settings)
        self.keeper = KnowledgeKeeper(self.knowledge, self.pool)  # type: ignore[arg-type]
        self.member = Member(site.epoch)
        self._running: asyncio.Task[None] | None = None

    async def connect(self) -> None:
        """Reach the site as it is now, and let the keeper know."""
        link = Link(self.site.network, f"127.0.0.1:{self.site.port}", caller="f", rng=self.site.rng)
        await link.connect(2.0)
        link.on_lost = lambda _error: self._lost(link)
        member = self.member
        member.epoch = self.site.epoch
        member.record = msgspec.structs.replace(member.record, epoch=self.site.epoch)
        member.link, member.state = link, "usable"
        if member not in self.pool.members:
            self.pool.members.append(member)
        self.pool.tell("state", member)
        if self._running is None:
            self._running = asyncio.get_running_loop().create_task(self.keeper.run())

    def _lost(self, link: Link) -> None:
        if self.member.link is link:
            self.member.link, self.member.state = None, "ejected"
            self.pool.tell("state", self.member)

    def leave(self) -> None:
        """The worker is gone."""
        self.member.gone = True
        self.pool.members.remove(self.member)
        self.pool.tell("removed", self.member)

    @property
    def held(self) -> frozenset[int]:
        """What the index says the worker holds."""
        known = self.knowledge.known("w1")
        if known is None:
            return frozenset()
        slots = known.space.slots.of_worker("w1").values()
        return frozenset(one for slot in slots for tier in known.space.index.snapshot(slot) for one in tier)

    @property
    def state(self) -> str:
        return self.knowledge.state_of("w1")

    @property
    def right(self) -> bool:
        return self.state == "exact" and self.held == self.site.truth

    async def until_right(self, seconds: float = 30.0) -> float:
        """Wait until the index equals the engine; returns how long that took."""
        loop = asyncio.get_running_loop()
        began = loop.time()
        while not self.right:
            assert loop.time() - began < seconds, (self.knowledge.status_of("w1"), len(self.held), len(self.site.truth))
            await asyncio.sleep(0.01)
        return loop.time() - began

    async def close(self) -> None:
        if self._running is not None:
            self._running.cancel()
            await asyncio.wait([self._running])
        link, self.member.link = self.member.link, None
        if link is not None:
            await link.close()


class KvWorld:
    """``async with KvWorld(seed) as world``: one site, one front that is connected."""

    def __init__(self, seed: int = 0, *, config: KvPublishConfig | None = None) -> None:
        self.rng = random.Random(seed)
        self.network = MemoryNetwork(seed)
        self.site = Site(self.network, self.rng, config=config)
        self.fronts: list[Front] = []

    async def __aenter__(self) -> KvWorld:
        await self.site.start()
        self.front = await self.join()
        return self

    async def __aexit__(self, *_: object) -> None:
        for front in self.fronts:
            await front.close()
        await self.site.stop()

    async def join(self, settings: KnowledgeSettings | None = None) -> Front:
        """A frontend comes."""
        front = Front(self.site, settings)
        self.fronts.append(front)
        await front.connect()
        return front

    async def restart(self) -> None:
        """The worker dies and is started again on its address."""
        await self.site.stop()
        await self.site.start()
        for front in self.fronts:
            try:
                await front.connect()
            except HoldfastError as error:  # pragma: no cover - shown by the test that fails then
                raise AssertionError(error) from error

    def prompt(self, blocks: int) -> list[int]:
        """Return tokens that share a beginning with other prompts."""
        shared = self.rng.randrange(3)
        return [shared] * (SIZE * min(3, blocks)) + [self.rng.randrange(1000) for _ in range(SIZE * (blocks - 3))]
