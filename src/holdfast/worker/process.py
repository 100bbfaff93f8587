"""The worker process: start the engine, register, serve, leave in order.

``starting → warming → ready ⇄ saturated → draining → stopped``, or ``failed`` when the engine dies. Leaving
follows one budget: say *draining* to every caller, withdraw the record, let streams finish, send the rest to
other workers, close. Exit code 0 when it was asked to leave, 1 when the engine died.

Must never leave a stream without an end while the process still can say one.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import random
import secrets
import signal
from collections.abc import Callable, Coroutine
from typing import Any

import msgspec

from holdfast.base.errors import DeadlineExceeded, HoldfastError
from holdfast.base.ids import Epoch, InstanceId, draw_epoch, draw_instance_id
from holdfast.base.lineage import die_with_owner
from holdfast.base.settings import InvalidSetting, load
from holdfast.engines.contract import Engine, EngineInfo
from holdfast.runtime.discovery.contract import Discovery, InstanceRecord, InstanceState
from holdfast.runtime.discovery.factory import open_discovery
from holdfast.runtime.server import ServerSettings, WorkerServer
from holdfast.runtime.transport import Transport, is_loopback
from holdfast.worker.card import publish
from holdfast.worker.config import WorkerConfig
from holdfast.worker.endpoints import ARTIFACT, CONTROL, GENERATE, ArtifactEndpoint, ControlEndpoint, Controllable
from holdfast.worker.host import EngineHost
from holdfast.worker.status import StatusServer

log = logging.getLogger(__name__)

EXIT_DONE = 0
EXIT_ENGINE_DIED = 1
CLOSE_SECONDS = 5.0
"""Bound on each of: withdrawing the record, closing discovery, closing the engine."""
FLUSH_SECONDS = 1.0
"""How long ends that were said may take to leave the process."""
_FLUSH_POLL = 0.005
_PROGRESS_LINE_SECONDS = 5.0
_INSTANCE_HEX = 16


class WorkerProcess:
    """One worker from start to exit.

    Args:
        config: the worker's settings.
        engine: not started yet.
        discovery: where to register; not started yet. Closed at the end.
        rng: for ids and nonces; seeded by the system in production.
        transport: the network; None: TCP.
        on_ready: called once callers can find this worker.
    """

    def __init__(
        self,
        config: WorkerConfig,
        engine: Engine,
        discovery: Discovery,
        rng: random.Random,
        *,
        transport: Transport | None = None,
        on_ready: Callable[[], None] = lambda: None,
    ):
        self._on_ready = on_ready
        self.config = config
        self.instance = _instance_id(config.instance_id, rng)
        self.epoch: Epoch = draw_epoch(rng)
        self.ready = asyncio.Event()
        """Set once callers can find this worker."""
        self._endpoints: tuple[str, ...] = (GENERATE, ARTIFACT)
        self._ending = asyncio.Event()
        self._hurried = False
        self._patience: asyncio.Timeout | None = None
        """The wait that a signal cuts short, while there is one."""
        self._discovery = discovery
        self.host = EngineHost(engine, limit=config.engine_request_limit, on_dead=lambda _: self._ending.set())
        self.server = WorkerServer(
            self.instance,
            self.epoch,
            rng=rng,
            transport=transport,
            secret=config.secret.encode(),
            settings=ServerSettings(insecure=config.insecure),
        )
        self.status = StatusServer(self._facts)

    def stop(self) -> None:
        """Leave in order; called again: leave now."""
        self._hurried = self._ending.is_set()
        self._ending.set()
        if self._patience is not None:
            self._patience.reschedule(asyncio.get_running_loop().time())

    async def run(self) -> int:
        """Serve until told to stop or the engine dies; returns the exit code.

        Raises:
            HoldfastError: the worker could not start; everything it had started is closed again.
        """
        try:
            if self.config.system_port >= 0:
                await self.status.start(self.config.system_host, self.config.system_port)
            await self._discovery.start()
            info = await self._start_engine()
            if info is not None:
                await self._register(info)
                await self._ending.wait()
                await self._leave()
        finally:
            await self._close()
        return EXIT_DONE if self.host.death is None else EXIT_ENGINE_DIED

    # starting

    async def _start_engine(self) -> EngineInfo | None:
        """Return what the engine says, or None when we were told to stop while it started."""
        if self._ending.is_set():
            return None
        bound = self.config.engine_start_timeout
        scope = self._patience = asyncio.timeout(bound)
        try:
            async with scope:
                return await self.host.start(_ProgressLines())
        except TimeoutError:
            if not scope.expired():
                raise
        finally:
            self._patience = None
        if self._ending.is_set():
            return None
        raise DeadlineExceeded(
            f"The engine was not ready within {bound:g} s (DYN_ENGINE_START_TIMEOUT_SECS).",
            stage="engine start",
            threshold=bound,
        )

    async def _register(self, info: EngineInfo) -> None:
        """Open the port and let callers know."""
        config = self.config
        published = publish(info, name=config.served_model_name, aliases=config.model_aliases)
        self.host.models = frozenset({published.card.name, *config.model_aliases})
        self.server.register(GENERATE, self.host.generate)
        self.server.register(ARTIFACT, ArtifactEndpoint(published.files).serve)
        engine = self.host.engine
        if config.control and isinstance(engine, Controllable) and is_loopback(config.rpc_host):
            self.server.register(CONTROL, ControlEndpoint(engine).serve)
            self._endpoints = (*self._endpoints, CONTROL)
        self.server.set_pong_source(self.host.pong)
        address = await self.server.start(config.rpc_host, config.rpc_port)
        record = InstanceRecord(
            namespace=config.namespace,
            component=config.component,
            endpoints=self._endpoints,
            instance=self.instance,
            epoch=self.epoch,
            address=config.advertise or address,
            pid=os.getpid(),
            system_address=self.status.address or None,
            state="ready",
            cards=(published.card,),
        )
        await self._discovery.publish(record)
        self.ready.set()
        self._on_ready()
        log.info(
            "worker %s serves %s (%s, context %d tokens, %d seats) at %s",
            self.instance,
            published.card.name,
            info.engine,
            info.context_length,
            info.max_num_seqs,
            record.address,
        )

    # leaving

    @property
    def state(self) -> InstanceState:
        """The worker's state as callers see it."""
        return self.host.state

    def _facts(self) -> dict[str, Any]:
        """What `/health` shows."""
        progress, load, state = self.host.pong()
        # until the record is out nobody can send work here, whatever the engine says
        shown = state if self.ready.is_set() or state not in ("ready", "saturated") else "starting"
        return {
            "state": shown,
            "instance": self.instance,
            "endpoints": dict.fromkeys(self._endpoints, "ready" if shown in ("ready", "saturated") else "notready"),
            "progress": msgspec.structs.asdict(progress),
            "load": msgspec.structs.asdict(load),
        }

    async def _leave(self) -> None:
        """Drain within the budget, then send what is left to other workers."""
        died = self.host.death is not None
        budget = 0.0 if died else self.config.shutdown_grace
        self.host.drain()
        self.server.drain("the engine died" if died else "shutdown", int(budget * 1e3))
        log.info("worker %s drains: %d streams in flight, %g s", self.instance, self.host.in_flight, budget)
        deadline = asyncio.get_running_loop().time() + budget
        await _bounded(self._discovery.withdraw(self.instance), "withdrawing the record")
        await self._wait_idle(deadline)
        left = self.host.send_elsewhere(f"This worker is shutting down; its {budget:g} s of grace are over.")
        if left:
            log.info("worker %s sends its last %d streams to other workers", self.instance, left)
        await self._flush(deadline)

    async def _wait_idle(self, deadline: float) -> None:
        """Until nothing is in flight, the deadline, or a second signal."""
        self._patience = asyncio.timeout_at(deadline)
        try:
            async with self._patience:
                await self.host.idle()
        except TimeoutError:
            pass  # what is left is sent elsewhere
        finally:
            self._patience = None

    async def _flush(self, deadline: float) -> None:
        """Let what was said leave: tokens that wait for credit within the budget, ends a moment longer."""
        loop = asyncio.get_running_loop()
        deadline = max(deadline, loop.time() + FLUSH_SECONDS)
        # the server counts streams and has no event for it; once per exit, a poll will do
        while self.server.open_streams and loop.time() < deadline and not self._hurried:  # noqa: ASYNC110
            await asyncio.sleep(_FLUSH_POLL)

    async def _close(self) -> None:
        await self.server.close()
        await _bounded(self.status.close(), "closing the status server")
        await _bounded(self._discovery.close(), "closing discovery")
        await _bounded(self.host.close(), "closing the engine")


def run(config: WorkerConfig | None, make_engine: Callable[[], Engine]) -> int:
    """Run a worker in this process until SIGTERM or SIGINT; returns the exit code.

    Args:
        config: the worker's settings; None: from ``DYN_*`` variables.
        make_engine: returns the engine, not started; called in the running loop.

    Raises:
        HoldfastError: the worker could not start.
    """
    import uvloop  # noqa: PLC0415  only the process itself needs it; tests and the simulation bring their own loop

    die_with_owner(os.environ)
    config = config or load(WorkerConfig, {}, os.environ).config
    return uvloop.run(run_worker(config, make_engine))


async def run_worker(
    config: WorkerConfig,
    make_engine: Callable[[], Engine],
    *,
    discovery: Discovery | None = None,
    rng: random.Random | None = None,
    signals: bool = True,
) -> int:
    """Run a worker in the running loop; returns the exit code.

    Args:
        config: the worker's settings.
        make_engine: returns the engine, not started.
        discovery: where to register; None: what the settings name.
        rng: for ids and nonces; None: the system's.
        signals: whether this process is nothing but the worker: SIGTERM and SIGINT stop it (a second one hurries).
    """
    rng = rng or random.Random(secrets.randbits(128))
    discovery = discovery or open_discovery(config.discovery_backend, root=config.file_kv)
    worker = WorkerProcess(config, make_engine(), discovery, rng, on_ready=_settle if signals else lambda: None)
    if signals:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, worker.stop)
    return await worker.run()


def _settle() -> None:
    """What is alive now lives as long as the process: the collector need not look at it again."""
    gc.collect()
    gc.freeze()


class _ProgressLines:
    """Turns load progress into a log line per stage, and one every few seconds in between."""

    def __init__(self) -> None:
        self._stage = ""
        self._said = 0.0

    def __call__(self, what: str, share: float) -> None:
        now = asyncio.get_running_loop().time()
        if what != self._stage or now - self._said >= _PROGRESS_LINE_SECONDS:
            self._stage, self._said = what, now
            log.info("engine: %s %.0f %%", what, share * 100)


def _instance_id(text: str, rng: random.Random) -> InstanceId:
    if not text:
        return draw_instance_id(rng)
    if len(text) != _INSTANCE_HEX or not set(text) <= set("0123456789abcdef"):
        raise InvalidSetting(f"DYN_INSTANCE_ID={text!r}: expected 16 lower-case hex digits.")
    return InstanceId(text)


async def _bounded(step: Coroutine[Any, Any, None], what: str) -> None:
    """Run one step of leaving; what goes wrong is logged, because the next steps must happen all the same."""
    try:
        async with asyncio.timeout(CLOSE_SECONDS):
            await step
    except TimeoutError:
        log.warning("%s took more than %g s and was given up", what, CLOSE_SECONDS)
    except HoldfastError as error:
        log.warning("%s failed: %s", what, error.message)
