"""One frontend put together from its parts: the same for the process, for tests and for the simulation.

What a machine would provide is handed in: discovery, network, randomness, clocks, the cache of model files. Nothing
here opens a port, reads a clock or installs a signal handler. Must never hold what belongs to one request.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections.abc import Callable

from holdfast.base.errors import HoldfastError
from holdfast.base.ids import InstanceId, draw_instance_id
from holdfast.frontend.advice import Advisor
from holdfast.frontend.app import Frontend
from holdfast.frontend.config import FrontendConfig
from holdfast.frontend.metrics import FrontendMetrics
from holdfast.frontend.registry import ModelRegistry, ReadText
from holdfast.frontend.sharing import SharedThresholds
from holdfast.models.store import ArtifactStore
from holdfast.requests.flusher import Flusher
from holdfast.requests.service import Services
from holdfast.routing.knowledge import PrefixKnowledge
from holdfast.routing.knowledge_keeper import KnowledgeKeeper
from holdfast.runtime.detector import DetectorSettings
from holdfast.runtime.discovery.contract import Discovery
from holdfast.runtime.inhibition import InhibitionSettings
from holdfast.runtime.pool import PoolSettings, WorkerPool
from holdfast.runtime.progress import HangSettings
from holdfast.runtime.transport import Transport
from holdfast.telemetry.spans import NO_SPANS, Spans
from holdfast.text.model import load_text


class Assembled:
    """A frontend without a listener. `start` it, keep `run` in a task, `close` it; ``app`` is its ASGI application.

    Args:
        config: the frontend's settings.
        discovery: started by its owner, and closed by it.
        transport: the way to workers.
        rng: for ids, seeds, jitter and nonces.
        clock: telemetry's stopwatch, in nanoseconds; None: the loop's time.
        store: the cache of model files; None: an empty one in memory.
        wall: calendar time in seconds since 1970, for presentation alone.
        read_text: makes a model's text machinery of its files.
        make_spans: returns where traces go, given this frontend's id.
    """

    def __init__(
        self,
        config: FrontendConfig,
        *,
        discovery: Discovery,
        transport: Transport,
        rng: random.Random,
        clock: Callable[[], int] | None = None,
        store: ArtifactStore | None = None,
        wall: Callable[[], float] = time.time,
        read_text: ReadText = load_text,
        make_spans: Callable[[InstanceId], Spans] = lambda _: NO_SPANS,
    ):
        self.config, self.discovery, self._rng = config, discovery, rng
        self.caller = draw_instance_id(rng)
        """How workers know this frontend."""
        self.flusher = Flusher(clock)
        self.pool = WorkerPool(
            discovery,
            transport,
            caller=self.caller,
            namespace=config.namespace,
            rng=rng,
            secret=config.secret.encode(),
            settings=pool_settings(config),
            on_read_done=self.flusher.flush,
        )
        self.metrics = FrontendMetrics(config.metrics)
        self.knowledge = PrefixKnowledge(config.knowledge)
        wanted = config.router_mode == "kv" or config.knowledge.kv_events_always
        self._keeper = (
            KnowledgeKeeper(self.knowledge, self.pool, follow=config.knowledge.use_kv_events) if wanted else None
        )
        self.services = Services(
            config.requests,
            self.pool,
            self.flusher,
            self.metrics,
            rng=rng,
            mode=config.router_mode,
            knowledge=self.knowledge,
        )
        self.registry = ModelRegistry(self.pool, store or ArtifactStore(), wall=wall, read_text=read_text)
        self.app = Frontend(
            config,
            self.services,
            self.pool,
            self.registry,
            self.metrics,
            spans=make_spans(self.caller),
            wall=wall,
            knowledge=self.knowledge,
        )
        if config.router_component:
            self.app.generate.advisor = Advisor(
                self.pool,
                (config.namespace, config.router_component),
                rng,
                timeout=config.router_ask_timeout_ms / 1e3,
                registry=self.metrics.source,
            )
        self._shared: SharedThresholds

    async def start(self, system_address: str = "") -> None:
        """Take discovery's view and begin to connect.

        Args:
            system_address: ``host:port`` of this process's status server, published for whoever scrapes it.
        """
        self._shared = SharedThresholds(
            self.services.thresholds,
            self.discovery,
            self.config.namespace,
            self._rng,
            system_address=system_address,
        )
        self.app.thresholds_changed = self._shared.changed
        await self.pool.start()

    async def run(self) -> None:
        """Load models, follow KV events and share thresholds until cancelled."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self.registry.run())
            if self._keeper is not None:
                group.create_task(self._keeper.run())
            group.create_task(self._shared.run())

    async def close(self) -> None:
        """Let everything go but discovery. Streams that still run are broken."""
        self.services.close()
        await self.app.close()
        with contextlib.suppress(HoldfastError):
            await self.pool.close()


def pool_settings(config: FrontendConfig) -> PoolSettings:
    """Return what the frontend's settings say about its workers."""
    return PoolSettings(
        detector=DetectorSettings(
            freeze_after=config.freeze_after_secs, hang=HangSettings(floor=config.hang_floor_secs)
        ),
        inhibition=InhibitionSettings(duration=config.inhibited_duration_secs),
    )
