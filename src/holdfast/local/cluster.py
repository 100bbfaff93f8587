"""A local cluster: frontends and workers of one machine under a supervisor, and the wait until it serves.

Used by `holdfast serve`, `holdfast demo` and the end-to-end tests. The processes are started as
``python -m holdfast worker …``; this room knows their flags, not their code.

Must never print; progress goes to a callback.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import random
import signal
import socket
import ssl
import sys
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Literal

import msgspec

from holdfast.base.errors import HoldfastError
from holdfast.base.ids import draw_epoch, draw_instance_id
from holdfast.health.config import SystemConfig
from holdfast.local import http
from holdfast.local.backoff import RestartPolicy
from holdfast.local.child import ChildSpec, RelayLine
from holdfast.local.rolling import Rolling
from holdfast.local.supervisor import Slot, Supervisor
from holdfast.local.vitals import SupervisorVitals
from holdfast.runtime.discovery.contract import SUPERVISOR, Discovery, InstanceRecord, MetaValue
from holdfast.runtime.shutdown import EXIT_CUT, EXIT_FINISHED, EXIT_HANDED_OVER

log = logging.getLogger(__name__)

_POLL_SECONDS = 0.05
_USABLE = frozenset({"ready", "saturated"})
ORDERLY_EXITS = frozenset({EXIT_FINISHED, EXIT_CUT, EXIT_HANDED_OVER})
"""How frontends and workers end that were asked to leave."""


class ClusterFailed(HoldfastError):
    """The cluster did not become ready, or nothing of it is left; the message quotes the last lines."""

    code = "cluster_failed"
    fault = "worker"
    status = 503
    hint = ""


class ClusterPlan(msgspec.Struct, frozen=True, kw_only=True):
    """What to start. ``…_flags`` are appended to the command lines, ``env`` to every child's environment."""

    http_host: str = "127.0.0.1"
    http_ports: tuple[int, ...]
    """One frontend for each."""
    shared_port: int = 0
    """Port that all frontends answer on beside their own, on the cluster's listener; 0: none."""
    workers: int = 2
    """All of them."""
    prefill_workers: int = 0
    """Of these, the last ones, compute prompts only."""
    worker_flags: tuple[str, ...] = ()
    flags_by_worker: tuple[tuple[str, ...], ...] = ()
    """Further flags of each single worker: what may not be the same for two, such as fixed ports."""
    frontend_flags: tuple[str, ...] = ()
    env: dict[str, str] = {}
    namespace: str = "dynamo"
    restart: RestartPolicy = RestartPolicy()
    stop_grace: float = 60.0
    start_timeout: float = 180.0
    """Seconds that a process of a rolling restart may take to be in service."""


class SlotView(msgspec.Struct, frozen=True):
    """One slot as an onlooker sees it. ``state`` is the worker's own state once it has published itself."""

    slot: str
    state: str
    pid: int | None
    restarts: int
    instance: str = ""
    ready: bool = False


OnProgress = Callable[[list[SlotView]], None]


class LocalCluster:
    """Starts, watches and stops the processes of a plan.

    Args:
        plan: what to start.
        discovery: not started; closed at the end.
        rng: for ids.
        environ: environment of the children.
        relay: takes their lines.
        listener: the socket of ``plan.shared_port``. It stays open here while frontends come and go, so that no
            connection is refused meanwhile, and is closed when everything stops.
        tls: how to call frontends that speak HTTPS; None: they speak HTTP.
        system: the supervisor's own status server; None: it has none.
    """

    def __init__(
        self,
        plan: ClusterPlan,
        discovery: Discovery,
        rng: random.Random,
        environ: Mapping[str, str],
        relay: RelayLine,
        *,
        listener: socket.socket | None = None,
        tls: ssl.SSLContext | None = None,
        system: SystemConfig | None = None,
    ):
        self.plan = plan
        self.tls = tls
        self._listener = listener
        self._discovery = discovery
        self._instance = draw_instance_id(rng)
        self._epoch = draw_epoch(rng)
        self._changed = asyncio.Event()
        self._serving: set[int | None] = set()
        """Processes of frontends that have been seen to use all workers."""
        environ = {"DYN_SYSTEM_PORT": "0", **environ}  # a status server for every process, each on a port of its own
        specs = _specs(plan, rng, -1 if listener is None else listener.fileno())
        self.supervisor = Supervisor(specs, environ, relay, self._changed.set)
        self.rolling = Rolling(self.supervisor, self._frontends, plan.start_timeout, self._changed.set, tls)
        self.vitals = SupervisorVitals(system or SystemConfig(), self.supervisor, self.rolling)

    @property
    def base_urls(self) -> list[str]:
        """Return ``http://host:port`` (or ``https://``) of every address that clients may use."""
        return [self._url(self.plan.shared_port)] if self.plan.shared_port else self.frontend_urls

    @property
    def frontend_urls(self) -> list[str]:
        """Return ``http://host:port`` of each single frontend."""
        return [self._url(port) for port in self.plan.http_ports]

    def _url(self, port: int) -> str:
        host = f"[{self.plan.http_host}]" if ":" in self.plan.http_host else self.plan.http_host
        return f"{'http' if self.tls is None else 'https'}://{host}:{port}"

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[asyncio.Task[int]]:
        """Run the cluster for the length of the block; yields the supervisor's task (its result: exit code)."""
        self.vitals.start()
        await self._discovery.start()
        running = asyncio.create_task(self.supervisor.run(), name="supervisor")  # owned: awaited below
        helpers = [
            asyncio.create_task(self._publish(), name="supervisor-record"),
            asyncio.create_task(self.rolling.serve_requests(), name="rolling-restarts"),
            asyncio.create_task(self._mind_listener(), name="listener"),
        ]
        try:
            yield running
        finally:
            if not running.done():
                self.supervisor.stop()
            try:
                await running
            finally:
                for helper in helpers:
                    helper.cancel()
                await asyncio.wait(helpers)
                self._close_listener()
                self.vitals.status.close()
                await self._discovery.close()

    async def until_ready(self, timeout: float, on_progress: OnProgress = lambda _: None) -> None:  # noqa: ASYNC109
        """Wait until every worker is ready and every frontend can use all of them.

        Raises:
            ClusterFailed: a slot gave up before, or ``timeout`` seconds have passed.
        """
        try:
            async with asyncio.timeout(timeout):
                while True:
                    await self._ask_frontends()
                    views = self.views()
                    on_progress(views)
                    self._raise_if_given_up()
                    if all(view.ready for view in views):
                        return
                    await asyncio.sleep(_POLL_SECONDS)
        except TimeoutError:
            waiting = ", ".join(f"{v.slot} ({v.state})" for v in self.views() if not v.ready)
            raise ClusterFailed(f"Not ready after {timeout:.0f} s: {waiting}. See their lines above.") from None

    def views(self) -> list[SlotView]:
        """Return the present state of every slot."""
        records = {r.pid: r for r in self._discovery.snapshot() if r.pid and r.component != SUPERVISOR}
        return [self._view(slot, records.get(slot.pid or -1)) for slot in self.supervisor.slots.values()]

    def kill(self, slot: str, number: signal.Signals = signal.SIGKILL) -> int:
        """Send a signal to the process of a slot; return its pid.

        Raises:
            ClusterFailed: nothing runs in that slot at the moment.
        """
        child = self.supervisor.slots[slot].child
        if child is None:
            raise ClusterFailed(f"{slot} is not running.")
        child.signal(number)
        return child.pid

    def slot_of(self, instance: str) -> str | None:
        """Return the slot whose process has published itself under this instance id."""
        return next((view.slot for view in self.views() if view.instance == instance), None)

    def _view(self, slot: Slot, record: InstanceRecord | None) -> SlotView:
        name = slot.spec.slot
        if slot.state != "running":
            return SlotView(name, slot.state, slot.pid, slot.restarts)
        if name in self._frontends():
            ready = slot.pid in self._serving
            return SlotView(name, "ready" if ready else "starting", slot.pid, slot.restarts, ready=ready)
        if record is None:
            return SlotView(name, "starting", slot.pid, slot.restarts)
        usable = record.state in _USABLE
        return SlotView(name, record.state, slot.pid, slot.restarts, record.instance, usable)

    def _frontends(self) -> dict[str, str]:
        return {f"frontend-{i}": url for i, url in enumerate(self.frontend_urls)}

    async def _ask_frontends(self) -> None:
        """Note which frontends can use all workers by now."""
        for name, url in self._frontends().items():
            pid = self.supervisor.slots[name].pid
            if pid in self._serving:
                continue
            with contextlib.suppress(HoldfastError, TimeoutError, msgspec.DecodeError):
                health = await http.get(f"{url}/health", 1.0, self.tls)
                told = health.json() if health.status == 200 else {}
                if not self._all_usable(told.get("models", {}), told.get("prefill", {})):
                    continue
                models = await http.get(f"{url}/v1/models", 1.0, self.tls)
                # 401: the list is for those who have a key; the health above has said what can be said without one
                if models.status == 401 or (models.status == 200 and models.json().get("data")):
                    self._serving.add(pid)

    def _all_usable(self, streams: Mapping[str, int], prompts: Mapping[str, int]) -> bool:
        """Whether a frontend can use every worker, by what its health says of each model."""
        plan = self.plan
        return (
            max(streams.values(), default=0) >= plan.workers - plan.prefill_workers
            and max(prompts.values(), default=0) >= plan.prefill_workers
        )

    def _raise_if_given_up(self) -> None:
        for slot in self.supervisor.slots.values():
            if slot.state == "gave-up":
                raise ClusterFailed(f"{slot.spec.slot} could not be started:\n{slot.last_exit}")

    async def _mind_listener(self) -> None:
        """Close the shared listener when nobody will accept from it any more: clients are told by a refusal."""
        while not self.supervisor.stopping and self._a_frontend_may_come():
            await self.supervisor.news()
        self._close_listener()

    def _a_frontend_may_come(self) -> bool:
        slots = self.supervisor.slots
        return any(slots[name].state != "gave-up" for name in self._frontends())

    def _close_listener(self) -> None:
        if self._listener is not None:
            self._listener.close()

    async def _publish(self) -> None:
        """Keep the supervisor's own record up to date."""
        while True:
            self._changed.clear()
            slots, report = self.supervisor.slots, self.rolling.report
            meta: dict[str, MetaValue] = {name: _published(slot.state) for name, slot in slots.items()}
            meta |= {f"pid.{name}": slot.pid for name, slot in slots.items() if slot.pid is not None}
            meta |= {f"rolling.{name}": value for name, value in msgspec.structs.asdict(report).items()}
            meta["rolling.under_way"] = self.rolling.under_way
            record = InstanceRecord(
                namespace=self.plan.namespace,
                component=SUPERVISOR,
                endpoints=(),
                instance=self._instance,
                epoch=self._epoch,
                address="",
                pid=os.getpid(),
                system_address=self.vitals.status.address or None,
                meta=meta,
            )
            try:
                await self._discovery.publish(record)
            except HoldfastError as error:
                log.warning("the supervisor's record could not be published: %s", error.message)
            await self._changed.wait()


def _published(state: str) -> Literal["running", "restarting", "gave-up"]:
    if state == "gave-up":
        return "gave-up"
    return "running" if state == "running" else "restarting"


def _specs(plan: ClusterPlan, rng: random.Random, listener: int) -> list[ChildSpec]:
    python = (sys.executable, "-m", "holdfast")
    shared = () if listener < 0 else (f"--http-listen-fd={listener}",)
    frontends = [
        ChildSpec(
            slot=f"frontend-{i}",
            argv=(
                *(*python, "frontend", "--http-host", plan.http_host, "--http-port", str(port)),
                *(*shared, *plan.frontend_flags),
            ),
            env={**plan.env, "DYN_SYSTEM_PORT": "0"},  # a fixed port is for the workers, which count up from it
            restart=plan.restart,
            grace=plan.stop_grace,
            fds=() if listener < 0 else (listener,),
            orderly=ORDERLY_EXITS,
        )
        for i, port in enumerate(plan.http_ports)
    ]
    workers = [
        ChildSpec(
            slot=f"worker-{i}",
            argv=(*python, "worker", *plan.worker_flags, *(plan.flags_by_worker[i] if plan.flags_by_worker else ())),
            env={**plan.env, "DYN_INSTANCE_ID": draw_instance_id(rng)},
            stage=1,
            restart=plan.restart,
            grace=plan.stop_grace,
            orderly=ORDERLY_EXITS,
        )
        for i in range(plan.workers)
    ]
    return [*frontends, *workers]
