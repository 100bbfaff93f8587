"""A local cluster: frontends and workers of one machine under a supervisor, and the wait until it serves.

Used by `holdfast serve`, `holdfast demo` and the end-to-end tests. The processes are started as
``python -m holdfast worker …``; this room knows their flags, not their code.

Must never print; progress goes to a callback.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import signal
import sys
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Literal

import msgspec

from holdfast.base.errors import HoldfastError
from holdfast.base.ids import draw_epoch, draw_instance_id
from holdfast.local import http
from holdfast.local.backoff import RestartPolicy
from holdfast.local.child import ChildSpec, RelayLine
from holdfast.local.supervisor import Slot, Supervisor
from holdfast.runtime.discovery.contract import SUPERVISOR, Discovery, InstanceRecord

log = logging.getLogger(__name__)

_POLL_SECONDS = 0.05
_USABLE = frozenset({"ready", "saturated"})


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
    workers: int = 2
    worker_flags: tuple[str, ...] = ()
    flags_by_worker: tuple[tuple[str, ...], ...] = ()
    """Further flags of each single worker: what may not be the same for two, such as fixed ports."""
    frontend_flags: tuple[str, ...] = ()
    env: dict[str, str] = {}
    namespace: str = "dynamo"
    restart: RestartPolicy = RestartPolicy()
    stop_grace: float = 60.0


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
    """Starts, watches and stops the processes of a plan."""

    def __init__(
        self,
        plan: ClusterPlan,
        discovery: Discovery,
        rng: random.Random,
        environ: Mapping[str, str],
        relay: RelayLine,
    ):
        self.plan = plan
        self._discovery = discovery
        self._instance = draw_instance_id(rng)
        self._epoch = draw_epoch(rng)
        self._changed = asyncio.Event()
        self._serving: set[str] = set()
        environ = {"DYN_SYSTEM_PORT": "0", **environ}  # a status server for every process, each on a port of its own
        self.supervisor = Supervisor(_specs(plan, rng), environ, relay, self._changed.set)

    @property
    def base_urls(self) -> list[str]:
        """Return ``http://host:port`` of each frontend."""
        host = f"[{self.plan.http_host}]" if ":" in self.plan.http_host else self.plan.http_host
        return [f"http://{host}:{port}" for port in self.plan.http_ports]

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[asyncio.Task[int]]:
        """Run the cluster for the length of the block; yields the supervisor's task (its result: exit code)."""
        await self._discovery.start()
        running = asyncio.create_task(self.supervisor.run(), name="supervisor")  # owned: awaited below
        publishing = asyncio.create_task(self._publish(), name="supervisor-record")
        try:
            yield running
        finally:
            if not running.done():
                self.supervisor.stop()
            try:
                await running
            finally:
                publishing.cancel()
                await asyncio.wait([publishing])
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
        if name in self._ports():
            ready = name in self._serving
            return SlotView(name, "ready" if ready else "starting", slot.pid, slot.restarts, ready=ready)
        if record is None:
            return SlotView(name, "starting", slot.pid, slot.restarts)
        usable = record.state in _USABLE
        return SlotView(name, record.state, slot.pid, slot.restarts, record.instance, usable)

    def _ports(self) -> dict[str, str]:
        return {f"frontend-{i}": url for i, url in enumerate(self.base_urls)}

    async def _ask_frontends(self) -> None:
        """Note which frontends can use all workers by now."""
        for name, url in self._ports().items():
            if name in self._serving:
                continue
            with contextlib.suppress(HoldfastError, TimeoutError, msgspec.DecodeError):
                health = await http.get(f"{url}/health", timeout=1.0)
                usable = health.json().get("models", {}) if health.status == 200 else {}
                if max(usable.values(), default=0) < self.plan.workers:
                    continue
                models = await http.get(f"{url}/v1/models", timeout=1.0)
                # 401: the list is for those who have a key; the health above has said what can be said without one
                if models.status == 401 or (models.status == 200 and models.json().get("data")):
                    self._serving.add(name)

    def _raise_if_given_up(self) -> None:
        for slot in self.supervisor.slots.values():
            if slot.state == "gave-up":
                raise ClusterFailed(f"{slot.spec.slot} could not be started:\n{slot.last_exit}")

    async def _publish(self) -> None:
        """Keep the supervisor's own record up to date."""
        while True:
            self._changed.clear()
            states = {name: _published(slot.state) for name, slot in self.supervisor.slots.items()}
            record = InstanceRecord(
                namespace=self.plan.namespace,
                component=SUPERVISOR,
                endpoints=(),
                instance=self._instance,
                epoch=self._epoch,
                address="",
                meta=dict(states),
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


def _specs(plan: ClusterPlan, rng: random.Random) -> list[ChildSpec]:
    python = (sys.executable, "-m", "holdfast")
    frontends = [
        ChildSpec(
            slot=f"frontend-{i}",
            argv=(*python, "frontend", "--http-host", plan.http_host, "--http-port", str(port), *plan.frontend_flags),
            env=plan.env,
            restart=plan.restart,
            grace=plan.stop_grace,
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
        )
        for i in range(plan.workers)
    ]
    return [*frontends, *workers]
