"""The worker process: start the engine, register, serve, leave in order.

``starting → warming → ready ⇄ saturated → draining → stopped``, or ``failed`` when the engine dies. Leaving
follows one budget (`leaving`): withdraw the record, say *draining* to every caller, let streams finish, hand the
rest over to other workers, close. The exit code tells which way it ended (`runtime.shutdown`).

Must never leave a stream without an end while the process still can say one.
"""

from __future__ import annotations

import asyncio
import logging
import os
import random
from collections.abc import Callable

import msgspec

from holdfast.base.errors import DeadlineExceeded, UnsupportedFeature
from holdfast.base.ids import Epoch, InstanceId, draw_epoch, draw_instance_id
from holdfast.base.settings import InvalidSetting
from holdfast.engines.abilities import Adaptable
from holdfast.engines.contract import Engine, EngineInfo
from holdfast.kv.feed import ENDPOINT as KV_EVENTS
from holdfast.models.card import ModelCard
from holdfast.runtime.advertise import needs_finding, published_address
from holdfast.runtime.discovery.contract import Discovery, InstanceRecord, InstanceState
from holdfast.runtime.readmission import CANARY_ENDPOINT
from holdfast.runtime.server import ServerSettings, WorkerServer
from holdfast.runtime.serving import EndpointServer
from holdfast.runtime.shutdown import EXIT_CUT, EXIT_ENGINE_DIED
from holdfast.runtime.tls import open_transport
from holdfast.runtime.tls_renewal import Renewal
from holdfast.runtime.transport import Transport, is_loopback
from holdfast.telemetry.spans import NO_SPANS, Spans
from holdfast.worker.adapters import Adapters
from holdfast.worker.calls import Calls
from holdfast.worker.card import publish
from holdfast.worker.config import WorkerConfig
from holdfast.worker.controls import add_controls
from holdfast.worker.ending import ProgressLines, bounded, cancelled, end_after
from holdfast.worker.endpoints import (
    ARTIFACT,
    CONTROL,
    GENERATE,
    PREFILL,
    ArtifactEndpoint,
    ControlEndpoint,
    Controllable,
)
from holdfast.worker.gauges import WorkerGauges
from holdfast.worker.host import EngineHost
from holdfast.worker.kv_publish import KvPublisher
from holdfast.worker.leaving import Leaving
from holdfast.worker.registration import Registration
from holdfast.worker.rest import Rest
from holdfast.worker.vitals import Vitals

log = logging.getLogger(__name__)

CLOSE_SECONDS = 5.0
"""Bound on closing a worker that was never asked to leave."""
PROOFS = 64
"""Callers that may wait for a canary at once; more are refused."""
_PROOF_GRACE = 0.1
_OVERRUN_SLACK = 1.0
"""Seconds over the budget after which a process that still cleans up is ended."""
_INSTANCE_HEX = 16


class WorkerProcess:
    """One worker from start to exit.

    Args:
        config: the worker's settings.
        engine: not started yet.
        discovery: where to register; not started yet. Closed at the end.
        rng: for ids and nonces; seeded by the system in production.
        transport: the network; None: TCP or TLS, as the settings say.
        spans: where traces go.
        clock: telemetry's stopwatch, in nanoseconds; None: the loop's time.
        on_ready: called once callers can find this worker.
        owns_process: the process is nothing but this worker: it may be ended at once, on a third request to leave
            or when closing takes longer than the budget.
    """

    def __init__(
        self,
        config: WorkerConfig,
        engine: Engine,
        discovery: Discovery,
        rng: random.Random,
        *,
        transport: Transport | None = None,
        spans: Spans = NO_SPANS,
        clock: Callable[[], int] | None = None,
        on_ready: Callable[[], None] = lambda: None,
        owns_process: bool = False,
    ):
        self._on_ready, self._owns_process = on_ready, owns_process
        self.config = config = msgspec.structs.replace(config, component=config.published_component)
        self.instance = _instance_id(config.instance_id, rng)
        self.epoch: Epoch = draw_epoch(rng)
        self.ready = asyncio.Event()
        """Set once callers can find this worker."""
        self._ending = asyncio.Event()
        self._patience: asyncio.Timeout | None = None
        """The wait that a signal cuts short, while there is one."""
        self._renewal = Renewal()
        transport = transport or open_transport(config.tls, serves=True, renewal=self._renewal)
        self._rng, self._transport = rng, transport
        self._discovery = discovery
        facts = {"namespace": config.namespace, "component": config.component, "instance_id": self.instance}
        self.calls = Calls(facts, spans=spans, clock=clock)
        self.kv = KvPublisher(engine, self.epoch, config.kv_events)
        self.host = EngineHost(
            engine,
            limit=config.engine_request_limit,
            on_dead=lambda _: self._end(),
            on_kv_events=self.kv.take,
            calls=self.calls,
            hold=config.prefill_hold,
        )
        self.host.instance = self.instance
        self.gauges = WorkerGauges(
            self.calls,
            self.host,
            lambda: self.vitals.state,
            lambda: self.leaving.shutdown,
            lambda: self.vitals.canaries,
            kv=self.kv,
        )
        self.vitals = Vitals(config, self.host, self.instance, self.calls.registry.render, self.gauges.refresh)
        self.server = WorkerServer(
            self.instance,
            self.epoch,
            rng=rng,
            transport=transport,
            secret=config.secret.encode(),
            settings=ServerSettings(insecure=config.insecure),
        )
        self._rest = Rest(self.host, self.vitals)
        self.adapters: Adapters | None = None
        """None: the engine takes none, or is not started."""
        self._proofs = EndpointServer(
            CANARY_ENDPOINT, self.vitals.prove_again, max_calls=PROOFS, stop_grace=_PROOF_GRACE
        )
        self.leaving = Leaving(
            config.shutdown,
            self.host,
            self.server,
            lambda: discovery.withdraw(self.instance),
            self._not_ready,
        )

    def stop(self) -> None:
        """Leave in order; called again: hurry; a third time: now."""
        urgency = self.leaving.shutdown.signal()
        if urgency == "hurry":
            log.warning("asked to leave again: what still runs is handed over now")
            self.leaving.hurry()
        elif urgency == "now":
            log.warning("asked to leave a third time: ending at once with %d streams", self.host.in_flight)
            if self._owns_process:
                os._exit(EXIT_CUT)
        self._end()

    def _end(self) -> None:
        if self._owns_process and not self._ending.is_set():
            end_after(self.config.shutdown.shutdown_total_timeout + _OVERRUN_SLACK)
        self.leaving.shutdown.begin(asyncio.get_running_loop().time())
        self._ending.set()
        if self._patience is not None:
            self._patience.reschedule(asyncio.get_running_loop().time())

    def _not_ready(self, why: str) -> None:
        """Nothing new shall come: nor is anybody interested in what is cached here."""
        self.vitals.leave(why)
        self.kv.close()

    @property
    def state(self) -> InstanceState:
        """The worker's state as callers see it."""
        return self.vitals.state

    async def run(self) -> int:
        """Serve until told to stop or the engine dies; returns the exit code.

        Raises:
            HoldfastError: the worker could not start; everything it had started is closed again.
        """
        watchers: list[asyncio.Task[None]] = []
        try:
            self.gauges.start()
            self.vitals.start()
            await self._discovery.start()
            record = await self._begin(watchers)
            if record is not None:
                registration = Registration(self._discovery, record, lambda: self.state, self.vitals.published)
                await self._enter(registration)
                watchers.append(asyncio.create_task(self.kv.watch(), name="kv-events"))
                if self._renewal:
                    watchers.append(asyncio.create_task(self._renewal.run(), name="certificates"))
                watchers.append(asyncio.create_task(self.vitals.canary.run(), name="canary"))
                keeper = asyncio.create_task(self._keep_record(registration), name="record")
                watchers.append(keeper)
                await self._ending.wait()
                await cancelled(keeper)  # a record that is withdrawn must not be published anew
                await bounded(registration.close(), "the last publish", self.leaving.shutdown.until())
                await self.leaving.run()
        finally:
            await cancelled(*watchers)
            await self._close()
        return EXIT_ENGINE_DIED if self.host.death is not None else self.leaving.shutdown.exit_code

    # starting

    async def _begin(self, watchers: list[asyncio.Task[None]]) -> InstanceRecord | None:
        """Start the engine, listen, and prove that a request goes through; None when told to stop meanwhile."""
        if self._ending.is_set():
            return None
        bound = self.config.engine_start_timeout
        scope = self._patience = asyncio.timeout(bound)
        try:
            async with scope:
                info = await self.host.start(ProgressLines(self.vitals.loading))
                self.gauges.loaded()
                watchers.append(asyncio.create_task(self.vitals.watch.run(), name="engine-watch"))
                record = await self._listen(info)
                self.vitals.serve(info, record, self._transport, self._rng)
                self._control()
                await self.vitals.canary.prove()
        except TimeoutError:
            if not scope.expired():
                raise
        else:
            return record
        finally:
            self._patience = None
        if self._ending.is_set():
            return None
        raise DeadlineExceeded(
            f"The worker was not ready within {bound:g} s (DYN_ENGINE_START_TIMEOUT_SECS): "
            f"{'; '.join(self.vitals.readiness.verdict.reasons)}.",
            stage="start",
            threshold=bound,
        )

    async def _listen(self, info: EngineInfo) -> InstanceRecord:
        """Open the port; returns the record by which callers will find this worker."""
        config = self.config
        published = publish(info, name=config.served_model_name, aliases=config.model_aliases, taints=config.taints)
        self.host.offer.base({published.card.name, *config.model_aliases})
        cards = await self._load_adapters(info, published.card)
        endpoints: tuple[str, ...] = (GENERATE, ARTIFACT, CANARY_ENDPOINT)
        self.server.register(GENERATE, self.host.generate)
        if info.role == "prefill":
            self.server.register(PREFILL, self.host.prefill)
            endpoints = (*endpoints, PREFILL)
        self.server.register(ARTIFACT, ArtifactEndpoint(published.files).serve)
        self.server.register(CANARY_ENDPOINT, self._proofs.serve)
        engine = self.host.engine
        if (tell := self.kv.begin(info)) is not None:
            self.server.register(KV_EVENTS, tell)
            endpoints = (*endpoints, KV_EVENTS)
        if config.control and isinstance(engine, Controllable) and is_loopback(config.rpc_host):
            self.server.register(CONTROL, ControlEndpoint(engine).serve)
            endpoints = (*endpoints, CONTROL)
        self.server.set_pong_source(self.vitals.pong)
        address = await self.server.start(config.rpc_host, config.rpc_port)
        if needs_finding(config.rpc_host, config.advertise):
            address = await asyncio.to_thread(published_address, address, config.advertise)
        return InstanceRecord(
            namespace=config.namespace,
            component=config.component,
            endpoints=endpoints,
            instance=self.instance,
            epoch=self.epoch,
            address=address,
            pid=os.getpid(),
            system_address=self.vitals.status.address or None,
            state="ready",
            cards=cards,
        )

    async def _load_adapters(self, info: EngineInfo, base: ModelCard) -> tuple[ModelCard, ...]:
        """Return the cards of the model and of the adapters that are there from the start."""
        engine = self.host.engine
        if isinstance(engine, Adaptable) and info.capabilities.lora:
            self.adapters = Adapters(engine, self.host, base, self.config.lora)
            await self.adapters.begin()
            return self.adapters.cards
        if self.config.lora.modules:
            raise UnsupportedFeature(
                f"Engine {info.engine}, as it is set up, takes no adapters; leave DYN_LORA_MODULES out.",
                param="DYN_LORA_MODULES",
            )
        return (base,)

    def _control(self) -> None:
        """Offer on the status server what the engine can do."""
        commands = self.config.control
        add_controls(
            self.vitals.status.control, self.host.engine, self.vitals, self._rest, self.adapters, commands=commands
        )

    async def _enter(self, registration: Registration) -> None:
        """Let callers know."""
        await registration.enter()
        self._rest.registration = registration
        if self.adapters is not None:
            await self.adapters.publish_with(registration)
        self.ready.set()
        self._on_ready()
        record = registration.record
        card = record.cards[0]
        log.info(
            "worker %s serves %s (%s, context %d tokens, %d seats) at %s",
            self.instance,
            card.name,
            card.engine,
            card.context_length,
            card.max_num_seqs,
            record.address,
        )

    async def _keep_record(self, registration: Registration) -> None:
        """Publish the record anew when the state has changed between usable and not."""
        while not self._ending.is_set():
            await self.vitals.changed.wait()
            self.vitals.changed.clear()
            if self.host.in_service:
                await registration.refresh()

    # leaving

    async def _close(self) -> None:
        """Close everything, within what is left of the budget when there is one."""
        now, shutdown = asyncio.get_running_loop().time(), self.leaving.shutdown
        until = shutdown.until() if self._ending.is_set() else now + CLOSE_SECONDS
        await self.server.close()
        await bounded(self._proofs.cancel(), "ending the last canaries", until)
        await bounded(self.kv.cancel(), "ending the last subscriptions", until)
        await asyncio.gather(  # side by side: neither may use up the other's time
            bounded(self._discovery.close(), "closing discovery", until),
            bounded(self.host.close(), "closing the engine", until),
        )
        await bounded(asyncio.to_thread(self.calls.spans.close), "sending the last spans", until)
        self.vitals.status.close()


def _instance_id(text: str, rng: random.Random) -> InstanceId:
    if not text:
        return draw_instance_id(rng)
    if len(text) != _INSTANCE_HEX or not set(text) <= set("0123456789abcdef"):
        raise InvalidSetting(f"DYN_INSTANCE_ID={text!r}: expected 16 lower-case hex digits.")
    return InstanceId(text)
