"""The router process: pool, knowledge and the life of requests, as in a frontend, behind the wire protocol of workers.

::

    generate                token stream in, token stream out, carried over its workers' failures (`relay`)
    best_worker_id          who should get a prompt, and how all were weighed (`questions.Ask` → `questions.Best`)
    get_overlap_scores      who holds how much of it
    mark_prefill_complete   of a lease
    free                    of a lease

The last four are also served as JSON by the status server, by the same names. A router publishes no model card: nobody
takes it for a worker. It holds nothing that cannot be lost: whoever asks falls back to another one, or to their own
choice.

Leaving: withdraw the record, say *draining*, let streams finish, hand the rest back to their callers, close.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import random
from collections.abc import AsyncIterator, Callable
from functools import partial
from typing import Any

import msgspec

from holdfast.base.errors import HoldfastError
from holdfast.base.ids import Epoch, InstanceId, draw_epoch, draw_instance_id
from holdfast.base.settings import InvalidSetting
from holdfast.health.readiness import Verdict
from holdfast.health.status import StatusServer
from holdfast.requests.flusher import Flusher
from holdfast.requests.service import Services
from holdfast.routerd import questions
from holdfast.routerd.chooser import Chooser
from holdfast.routerd.config import RouterConfig
from holdfast.routerd.gauges import RouterGauges, RouterObserver
from holdfast.routerd.questions import BEST_WORKER, FREE, OVERLAP_SCORES, PREFILL_COMPLETE, Ask, Done
from holdfast.routerd.relay import Relay
from holdfast.routing.absent import without_effect
from holdfast.routing.knowledge import PrefixKnowledge
from holdfast.routing.knowledge_keeper import KnowledgeKeeper
from holdfast.runtime.advertise import needs_finding, published_address
from holdfast.runtime.detector import DetectorSettings
from holdfast.runtime.discovery.contract import Discovery, InstanceRecord
from holdfast.runtime.pool import PoolSettings, WorkerPool
from holdfast.runtime.progress import HangSettings
from holdfast.runtime.server import ServerSettings, WorkerServer
from holdfast.runtime.serving import EndpointServer
from holdfast.runtime.shutdown import EXIT_FINISHED, EXIT_HANDED_OVER
from holdfast.runtime.tls import open_transport
from holdfast.runtime.transport import Transport
from holdfast.telemetry.catalogue import CATALOGUE
from holdfast.telemetry.metric import Registry
from holdfast.wire.frames import Load, Progress

log = logging.getLogger(__name__)

GENERATE = "generate"
QUESTIONS_AT_ONCE = 1024
CLOSE_SECONDS = 5.0
HAND_BACK_SECONDS = 2.0
"""Bound on hearing that streams go on elsewhere."""
_STOP_GRACE = 0.1
_POLL = 0.01
_INSTANCE_HEX = 16


class RouterProcess:
    """One router from start to exit.

    Args:
        config: its settings.
        discovery: not started yet; closed at the end.
        rng: for ids, seeds, jitter and nonces.
        transport: the network; None: TCP or TLS, as the settings say.
        clock: telemetry's stopwatch, in nanoseconds; None: the loop's time.
    """

    def __init__(
        self,
        config: RouterConfig,
        discovery: Discovery,
        rng: random.Random,
        *,
        transport: Transport | None = None,
        clock: Callable[[], int] | None = None,
    ):
        self.config, self._discovery = config, discovery
        self.instance = _instance_id(config.instance_id, rng)
        self.epoch: Epoch = draw_epoch(rng)
        self.ready = asyncio.Event()
        """Set once callers can find this router."""
        self._ending = asyncio.Event()
        self._hurried = False
        self._patience: asyncio.Timeout | None = None
        """The wait that a second signal cuts short, while there is one."""
        self.registry = Registry(CATALOGUE, "router")
        self.flusher = Flusher(clock)
        self.pool = WorkerPool(
            discovery,
            transport or open_transport(config.tls, serves=False),
            caller=self.instance,
            namespace=config.namespace,
            rng=rng,
            secret=config.secret.encode(),
            settings=_pool_settings(config),
            on_read_done=self.flusher.flush,
        )
        self.knowledge = PrefixKnowledge(config.knowledge)
        self._keeper = KnowledgeKeeper(self.knowledge, self.pool, follow=config.knowledge.use_kv_events)
        self.services = Services(
            config.requests,
            self.pool,
            self.flusher,
            RouterObserver(self.registry),
            rng=rng,
            mode=config.router_mode,
            knowledge=self.knowledge,
        )
        self.chooser = Chooser(
            self.services,
            self.pool,
            self.knowledge,
            config.router_mode,
            expiry=config.router_active_request_expiry,
            name=self.instance,
        )
        self.relay = Relay(self.services, self.pool, limit=config.router_request_limit)
        self.gauges = RouterGauges(self.registry, self.pool, self.knowledge, self.chooser, self.relay)
        self.status = StatusServer(
            config.system, metrics=self.registry.render, refresh=self.gauges.refresh, judge=self.verdict
        )
        self.server = WorkerServer(
            self.instance,
            self.epoch,
            rng=rng,
            transport=transport or open_transport(config.tls, serves=True),
            secret=config.secret.encode(),
            settings=ServerSettings(insecure=config.insecure),
        )
        self._answers: dict[str, Callable[[Any], msgspec.Struct]] = {
            BEST_WORKER: lambda question: self.chooser.best(questions.read(question, Ask)),
            OVERLAP_SCORES: lambda question: self.chooser.overlaps(questions.read(question, Ask)),
            PREFILL_COMPLETE: lambda question: Done(self.chooser.reservations.computed(questions.about(question))),
            FREE: lambda question: Done(self.chooser.reservations.free(questions.about(question))),
        }
        self._endpoints = {
            name: EndpointServer(
                name, partial(self._answered, name), max_calls=QUESTIONS_AT_ONCE, stop_grace=_STOP_GRACE
            )
            for name in self._answers
        }

    # ---- questions ----

    def ask(self, name: str, question: Any) -> msgspec.Struct:
        """Answer one question; counted. Raises HoldfastError."""
        began, outcome = self.flusher.clock(), "ok"
        try:
            return self._answers[name](question)
        except HoldfastError as error:
            outcome = error.code
            raise
        finally:
            self.gauges.questions.labels(name, outcome).inc()
            self.gauges.answer_seconds.observe((self.flusher.clock() - began) / 1e9)

    async def _answered(self, name: str, question: Any) -> AsyncIterator[Any]:
        yield self.ask(name, question)

    async def _over_http(self, name: str, question: dict[str, Any]) -> dict[str, Any]:
        answer = msgspec.to_builtins(self.ask(name, question))
        assert isinstance(answer, dict)
        return answer

    def verdict(self) -> Verdict:
        """Whether this router can be asked: it serves, and some worker can be used."""
        reasons = []
        if self._ending.is_set():
            reasons.append("this router is draining")
        elif not self.ready.is_set():
            reasons.append("this router is not registered in discovery yet")
        elif not any(worker.eligible for worker in self.pool.all_workers() if worker.record.cards):
            reasons.append("no worker can be used")
        return Verdict(not reasons, dict.fromkeys((GENERATE, *self._answers), "notready" if reasons else "ready"),
                       tuple(reasons))  # fmt: skip

    # ---- life ----

    def stop(self) -> None:
        """Leave in order; called again: hand back at once what still runs."""
        self._hurried = self._ending.is_set()
        self._ending.set()
        if self._hurried and self._patience is not None:
            self._patience.reschedule(asyncio.get_running_loop().time())

    async def run(self) -> int:
        """Serve until told to stop; returns the exit code.

        Raises:
            HoldfastError: it could not start; everything that it had started is closed again.
        """
        exit_code = EXIT_FINISHED
        try:
            self.status.start()
            for name in self._answers:
                self.status.control.mount(f"/{name}", {"POST": partial(self._over_http, name)}, item="request_id")
            await self._discovery.start()
            await self.pool.start()
            record = await self._listen()
            async with asyncio.TaskGroup() as tasks:
                running = [tasks.create_task(self._keeper.run()), tasks.create_task(self.relay.run())]
                await self._enter(record)
                await self._ending.wait()
                exit_code = await self._leave()
                for one in running:
                    one.cancel()
        finally:
            await self._close()
        return exit_code

    async def _listen(self) -> InstanceRecord:
        """Open the port; returns the record by which callers will find this router."""
        config = self.config
        self.server.register(GENERATE, self.relay.serve)
        for name, endpoint in self._endpoints.items():
            self.server.register(name, endpoint.serve)
        self.server.set_pong_source(self._pong)
        address = await self.server.start(config.rpc_host, config.rpc_port)
        if needs_finding(config.rpc_host, config.advertise):
            address = await asyncio.to_thread(published_address, address, config.advertise)
        return InstanceRecord(
            namespace=config.namespace,
            component=config.component,
            endpoints=(GENERATE, *self._answers),
            instance=self.instance,
            epoch=self.epoch,
            address=address,
            pid=os.getpid(),
            system_address=self.status.address or None,
        )

    async def _enter(self, record: InstanceRecord) -> None:
        """Let callers know."""
        await self._discovery.publish(record)
        self.ready.set()
        self.status.arm()
        for warning in without_effect(self.config.requests.router):
            log.warning("%s", warning)
        log.info("router %s (mode %s) listens on %s", self.instance, self.config.router_mode, record.address)

    def _pong(self) -> tuple[Progress, Load, str]:
        in_flight = self.relay.in_flight
        return Progress(in_flight=in_flight), Load(running=in_flight), "draining" if self._ending.is_set() else "ready"

    async def _leave(self) -> int:
        grace = self.config.router_graceful_shutdown_timeout
        log.info("router drains; %d streams through it have %g s to finish", self.relay.in_flight, grace)
        with contextlib.suppress(HoldfastError, TimeoutError):
            async with asyncio.timeout(CLOSE_SECONDS):
                await self._discovery.withdraw(self.instance)
        self.server.drain("shutdown", int(grace * 1e3))
        self.relay.drain("This router is draining and accepts nothing.")
        self._patience = asyncio.timeout(0.0 if self._hurried else grace)
        with contextlib.suppress(TimeoutError):
            async with self._patience:
                await self.relay.idle()
        self._patience = None
        left = self.relay.send_elsewhere(f"This router is shutting down; its streams had {grace:g} s to finish.")
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(HAND_BACK_SECONDS):
                # the server counts streams and has no event for it; once per exit, a poll will do
                while self.server.open_streams:  # noqa: ASYNC110
                    await asyncio.sleep(_POLL)
        if left:
            log.info("router has handed %d streams back to their callers", left)
        return EXIT_HANDED_OVER if left else EXIT_FINISHED

    async def _close(self) -> None:
        self.chooser.close()
        await self.server.close()
        for endpoint in self._endpoints.values():
            await endpoint.cancel()
        self.services.close()
        with contextlib.suppress(HoldfastError, TimeoutError):
            async with asyncio.timeout(CLOSE_SECONDS):
                await self.pool.close()
                await self._discovery.close()
        self.status.close()


def _pool_settings(config: RouterConfig) -> PoolSettings:
    return PoolSettings(
        detector=DetectorSettings(
            freeze_after=config.freeze_after_secs, hang=HangSettings(floor=config.hang_floor_secs)
        )
    )


def _instance_id(text: str, rng: random.Random) -> InstanceId:
    if not text:
        return draw_instance_id(rng)
    if len(text) != _INSTANCE_HEX or not set(text) <= set("0123456789abcdef"):
        raise InvalidSetting(f"DYN_INSTANCE_ID={text!r}: expected 16 lower-case hex digits.")
    return InstanceId(text)
