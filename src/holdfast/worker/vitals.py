"""What this worker knows about its own health, and whom it tells: pongs, the discovery record, the status server.

The host says what the engine and the process do; `health.Readiness` says whether work can be sent here. A
worker that is in service and not ready is ``stalled``: frontends send it nothing, and it comes back by itself.

Must never decide by itself that an engine is dead or a worker ready.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any

import msgspec

from holdfast.engines.contract import EngineInfo
from holdfast.health.canary import Canary
from holdfast.health.engine_watch import EngineWatch
from holdfast.health.payloads import payload_for
from holdfast.health.probe import Kind, Probe
from holdfast.health.readiness import Readiness, Verdict
from holdfast.health.status import Metrics, StatusServer
from holdfast.runtime.context import Context
from holdfast.runtime.discovery.contract import InstanceRecord, InstanceState
from holdfast.runtime.readmission import CanaryVerdict
from holdfast.runtime.transport import TcpTransport, Transport
from holdfast.wire.frames import Load, Progress
from holdfast.worker.config import WorkerConfig
from holdfast.worker.endpoints import GENERATE
from holdfast.worker.host import EngineHost

log = logging.getLogger(__name__)

FRESH_SECONDS = 1.0
"""A canary sent for a caller counts for every other one that asks within this."""
_LEAST_PATIENCE = 0.2
_ANSWER_SHARE = 0.3
"""Of the seconds that a caller waits for a verdict, those kept for the way there and back."""
_SERVING = frozenset({"ready", "saturated"})


class Vitals:
    """See the module.

    Args:
        config: the worker's settings.
        host: hosts the engine.
        instance: this worker's id.
        metrics: renders what ``/metrics`` shows; None: nothing.
        refresh: called on the event loop before that, see `StatusServer`.
    """

    def __init__(
        self,
        config: WorkerConfig,
        host: EngineHost,
        instance: str,
        metrics: Metrics | None = None,
        refresh: Callable[[], None] | None = None,
    ):
        self._config = config
        self._host = host
        self._instance = instance
        self._open = False
        self.resting = ""
        """Why it takes nothing although its engine is well; empty: it does."""
        self._leaving = False
        self._proving = asyncio.Lock()
        self._proof: CanaryVerdict | None = None
        self._proved_at = 0.0
        self.check_timeout = config.health.engine_health_check_timeout
        """Seconds that the engine's own check may take."""
        self.changed = asyncio.Event()
        """Set whenever the state may have changed; whoever waits clears it."""
        health = config.health
        self.readiness = Readiness(
            starting=config.system.system_starting_health_status,
            listed=config.system.system_use_endpoint_health_status,
            failures=health.health_check_failures,
            successes=health.health_check_successes,
            canary=health.health_check_enabled,
            on_change=self._verdict_changed,
        )
        self.status = StatusServer(config.system, metrics=metrics, refresh=refresh, more=self._facts)
        self.watch = EngineWatch(host.engine, host.die, health)
        self.canary: Canary
        self.canaries: Mapping[Kind, int] = {}
        """How many canaries ended which way; empty before the first one."""

    def start(self) -> None:
        """Answer from now on, so that a worker that loads can be told from one that is gone.

        Raises:
            Conflict: the status server's port is taken.
        """
        self.status.post(self.readiness.verdict)
        self.status.start()

    def loading(self, what: str, share: float) -> None:
        """The engine says how far it is."""
        self.readiness.stage(f"the engine is loading: {what} {share * 100:.0f} %")

    def serve(self, info: EngineInfo, record: InstanceRecord, transport: Transport | None, rng: random.Random) -> None:
        """The endpoints are served at the record's address: make ready to test them."""
        self.readiness.hold("discovery", "this worker is not registered in discovery yet")
        for name in record.endpoints:
            if name != GENERATE:
                self.readiness.endpoint(name)
        probe = Probe(
            transport if transport is not None else TcpTransport(),
            record.address,
            instance=record.instance,
            epoch=record.epoch,
            payload=payload_for(info, role=info.role, override=self._config.health.health_check_payload),
            model=record.cards[0].name,
            rng=rng,
            secret=self._config.secret.encode(),
            ranks=info.data_parallel_size,
            announce=self._host.announce_canary,
        )
        self.canary = Canary(GENERATE, probe.send, _Awake(self, self._host), self.readiness, self._config.health)
        self.canaries = self.canary.results

    def published(self, record: InstanceRecord) -> None:
        """Callers can find this worker, in this state."""
        self._open = True
        self.readiness.release("discovery")
        self.readiness.serve()
        self.status.arm()
        self.status.post(self.readiness.verdict, msgspec.json.encode(record))

    def leave(self, why: str) -> None:
        """Nothing new can be sent here any more."""
        self._leaving = True
        self.readiness.hold("leaving", why)

    def rest(self, why: str) -> None:
        """Nothing shall be sent here until this is called again with an empty reason."""
        self.resting = why
        if why:
            self.readiness.hold("rest", why)
        else:
            self.readiness.release("rest")
        self.changed.set()

    async def prove_again(self, _request: Any, context: Context) -> AsyncIterator[dict[str, Any]]:
        """Tell a caller whether this worker can be used now (the handler of `readmission.CANARY_ENDPOINT`).

        A canary is sent for it when nothing else shows the engine at work. Callers share canaries: one that ended less
        than `FRESH_SECONDS` ago counts for all.
        """
        async with self._proving:
            now = asyncio.get_running_loop().time()
            if self._proof is None or now - self._proved_at >= FRESH_SECONDS:
                self._proof = await self._test(context.headers.remaining_ms / 1e3)
                self._proved_at = asyncio.get_running_loop().time()
            yield msgspec.to_builtins(self._proof)

    async def _test(self, within: float) -> CanaryVerdict:
        if self.resting:
            return CanaryVerdict(False, self.resting)
        if self._host.in_flight:
            ready = self.readiness.is_ready(GENERATE)
            why = "nothing was sent: it is busy, and judged by its progress"
            return CanaryVerdict(ready, why if ready else "; ".join(self.readiness.verdict.reasons))
        patience = self._config.health.health_check_request_timeout
        if within > 0:
            patience = max(_LEAST_PATIENCE, min(patience, within - _ANSWER_SHARE))
        result = await self.canary.once(patience)
        usable = result.kind == "good" or (result.kind == "unclear" and self.readiness.is_ready(GENERATE))
        return CanaryVerdict(usable, result.why, result.tokens)

    @property
    def state(self) -> InstanceState:
        """The worker's state as callers see it."""
        state = self._host.state
        if state not in _SERVING:
            return state
        if not self._open:
            return "starting"
        return state if self.readiness.is_ready(GENERATE) and not self.resting else "stalled"

    def pong(self) -> tuple[Progress, Load, str]:
        """Return progress, load and state for the next pong (a `PongSource`)."""
        return *self._host.measure(), self.state

    def _facts(self) -> dict[str, Any]:
        """What `/health` shows beside the verdict."""
        progress, load = self._host.measure()
        return {
            "state": self.state,
            "instance": self._instance,
            "progress": msgspec.structs.asdict(progress),
            "load": {**msgspec.structs.asdict(load), "ranks": [msgspec.structs.asdict(rank) for rank in load.ranks]},
        }

    def _verdict_changed(self, verdict: Verdict) -> None:
        shown = self.status.verdict
        if shown.ready != verdict.ready:
            trouble = self._open and not self._leaving and not verdict.ready
            why = "it answers and its engine works" if verdict.ready else "; ".join(verdict.reasons)
            level = logging.WARNING if trouble else logging.INFO
            log.log(level, "worker %s is %s: %s", self._instance, "ready" if verdict.ready else "not ready", why)
        self.status.post(verdict)
        self.changed.set()


class _Awake:
    """The host's traffic as the canary shall see it (a `health.canary.Traffic`): an engine that rests is not tested."""

    def __init__(self, vitals: Vitals, host: EngineHost):
        self._vitals, self._host = vitals, host

    @property
    def in_flight(self) -> int:
        return self._host.in_flight

    @property
    def deliveries(self) -> int:
        return self._host.deliveries

    @property
    def in_service(self) -> bool:
        return self._host.in_service and not self._vitals.resting

    def measure(self) -> tuple[Progress, Load]:
        return self._host.measure()
