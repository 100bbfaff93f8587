"""The canary of one endpoint: when to send a tiny request, and what its result means.

* Before an endpoint is used it must have answered once (`prove`).
* Idle, and canaries on: one after every ``canary_wait_time`` without success; a failure is followed up at
  once, so that the verdict takes the wait plus ``failures`` times the timeout.
* Not ready: one every second until it answers again, whether canaries are on or not.
* Busy: never. A busy engine is judged by its progress, and is not ready when it shows none for longer than
  ``health_check_busy_stall`` (more while it announces longer silent steps).

Real traffic that succeeds counts as a success and resets the clock.

Must never count as traffic itself.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Protocol

from holdfast.health.config import CanaryConfig
from holdfast.health.probe import Kind, ProbeResult
from holdfast.health.readiness import Readiness
from holdfast.runtime.progress import HangSettings, ProgressWatch
from holdfast.wire.frames import Load, Progress

log = logging.getLogger(__name__)

LOOK_SECONDS = 0.2
"""How often traffic is looked at."""
RETRY_SECONDS = 1.0
"""Between canaries of an endpoint that is not ready."""
FIRST_TIMEOUT = 30.0
"""A first request may be slow: kernels are built, memory is touched for the first time."""

Send = Callable[[float], Awaitable[ProbeResult]]
"""Sends one canary within so many seconds (`probe.Probe.send`)."""


class Traffic(Protocol):
    """What the canary must know about the endpoint's real work."""

    @property
    def in_flight(self) -> int:
        """Calls in hand, canaries aside."""

    @property
    def deliveries(self) -> int:
        """Rises whenever something was produced for a real caller."""

    @property
    def in_service(self) -> bool:
        """False while there is nothing to test: the engine is dead, or the worker leaves."""

    def measure(self) -> tuple[Progress, Load]:
        """Return the engine's counters and load."""


class Canary:
    """See the module.

    Args:
        endpoint: its name.
        send: sends one canary.
        traffic: the real work.
        readiness: where results go; registers the endpoint as a target.
        config: how patient to be.
    """

    def __init__(self, endpoint: str, send: Send, traffic: Traffic, readiness: Readiness, config: CanaryConfig):
        self.endpoint = endpoint
        self._send = send
        self._traffic = traffic
        self._readiness = readiness
        self._config = config
        self._registration = readiness.target(endpoint)
        self._progress = ProgressWatch(HangSettings(floor=config.health_check_busy_stall))
        self._deliveries = traffic.deliveries
        self.results: dict[Kind, int] = {"good": 0, "bad": 0, "unclear": 0}
        """How many canaries ended which way."""
        self._lock = asyncio.Lock()
        self._due = 0.0
        """When the next canary may leave, should the endpoint be idle then."""

    async def prove(self) -> None:
        """Send canaries until one is good; whoever calls this has a deadline. The reason is with `Readiness`."""
        timeout = max(FIRST_TIMEOUT, self._config.health_check_request_timeout)
        while not self._readiness.is_ready(self.endpoint):
            result = await self.once(timeout)
            if result.kind != "good":
                log.warning(
                    "the first request to this worker failed, trying again: %s (DYN_HEALTH_CHECK_PAYLOAD replaces it)",
                    result.why,
                )
                await asyncio.sleep(RETRY_SECONDS)

    async def once(self, timeout: float | None = None) -> ProbeResult:  # noqa: ASYNC109
        """Send a canary now and report its result; None: within the configured time.

        A failure within less than that is no evidence against the engine, only for whoever was in a hurry.
        """
        configured = self._config.health_check_request_timeout
        async with self._lock:
            result = await self._send(timeout or configured)
            self.results[result.kind] += 1
            if result.kind == "good":
                self._readiness.succeeded(self.endpoint, self._registration)
            elif result.kind == "bad" and self._traffic.in_service and (timeout or configured) >= configured:
                self._readiness.failed(self.endpoint, self._registration, result.why)
        return result

    def doubt(self, why: str) -> None:
        """Call the endpoint not ready until a canary is good."""
        self._readiness.failed(self.endpoint, self._registration, why, final=True)

    async def still(self) -> None:
        """Return when no canary is under way."""
        async with self._lock:
            pass

    async def run(self) -> None:
        """Watch until cancelled."""
        self._postpone(self._config.canary_wait_time)
        while True:
            await asyncio.sleep(LOOK_SECONDS)
            try:
                await self._look()
            except Exception:
                log.exception("a look at endpoint %s failed; watching goes on", self.endpoint)

    async def _look(self) -> None:
        now = asyncio.get_running_loop().time()
        traffic = self._traffic
        if not traffic.in_service:
            return
        self._watch_progress(now)
        if traffic.deliveries != self._deliveries:
            self._deliveries = traffic.deliveries
            self._readiness.succeeded(self.endpoint, self._registration)
            self._postpone(self._config.canary_wait_time)
        elif traffic.in_flight:
            self._postpone(RETRY_SECONDS if self._broken else self._config.canary_wait_time)
        elif now >= self._due and (self._broken or self._config.health_check_enabled):
            await self._test()

    @property
    def _broken(self) -> bool:
        return not self._readiness.is_ready(self.endpoint)

    async def _test(self) -> None:
        result = await self.once()
        if self._broken:
            self._postpone(RETRY_SECONDS)
        elif result.kind == "bad":
            log.info("a canary of endpoint %s failed, the next follows at once: %s", self.endpoint, result.why)
        else:
            self._postpone(self._config.canary_wait_time)

    def _postpone(self, seconds: float) -> None:
        self._due = asyncio.get_running_loop().time() + seconds

    def _watch_progress(self, now: float) -> None:
        progress, load = self._traffic.measure()
        if self._progress.observe(progress, load, now):
            return
        if self._progress.stalled() and self._readiness.is_ready(self.endpoint):
            why = (
                f"the engine is busy ({progress.in_flight} in flight, phase {progress.phase}) and has made no progress "
                f"for {self._progress.silent_for():.1f} s (bound {self._progress.bound:.1f} s)"
            )
            self._readiness.failed(self.endpoint, self._registration, why, final=True)
