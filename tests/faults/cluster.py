"""A real cluster that faults are thrown at: processes, sockets, a proxy before each worker, views of discovery.

The counterpart of `sim.cluster`: the same names, the same settings, the same supervisor's rules (a process that ends
is started again on its address, after as long as the fault says). Must never decide what goes wrong, or whether all
is well.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import re
import secrets
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, Literal

import msgspec

from holdfast.base.lineage import COOKIE
from holdfast.chaos.owners import owner_of
from holdfast.chaos.proxy import Proxy
from holdfast.chaos.views import View
from holdfast.local import http, sentinel
from holdfast.local.child import Child, ChildSpec
from holdfast.local.ports import free_port
from holdfast.sim.cluster import BACKOFF, HANG_FLOOR, INHIBITED, instance_of
from holdfast.sim.history import Life, Residue
from holdfast.sim.history import View as Seen
from holdfast.sim.plan import Plan, frontend_names, worker_names
from holdfast.wire.frames import OLDEST_VERSION, VERSION
from tests.faults import child
from tests.faults.ledger import Ledger

ROOT = Path(__file__).resolve().parents[2]
HELD = re.compile(r"inflight|active_requests|queued_requests|_leases|disconnected_clients|pool_active|waiting_sequences"
                  r"|running_sequences|stage_requests|active_tasks|prefill_tokens")  # fmt: skip
"""Gauges of what is in flight, waiting or leased; all of them are zero at rest."""
_NEVER = ("_total", "_bucket", "_sum", "_count", "_created", "_capacity")
_ASK_SECONDS = 2.0


class Process:
    """One start of a process."""

    def __init__(self, life: Life, running: Child, watch: asyncio.Task[None]):
        self.life, self.child, self.watch = life, running, watch
        self.stopped = 0
        """How many faults hold it at the moment."""

    @property
    def pid(self) -> int:
        return self.child.pid


class Cluster:
    """See the module; `running` starts and stops it.

    Args:
        plan: sizes and settings.
        root: an empty directory.
        rng: for the network's jitter and the links of orders.
        bug: planted into every process (`bugs`).
    """

    def __init__(self, plan: Plan, root: Path, rng: random.Random, bug: str = ""):
        self.plan, self.root, self.rng, self._bug = plan, root, rng, bug
        self.ledger = Ledger(root / "ledger")
        self.ledger.name_of = self.name_of
        self.processes: dict[str, Process] = {}
        self.rolling = False
        self.http_ports = {name: free_port() for name in self.frontends}
        self.rpc_ports = {name: free_port() for name in self.workers}
        self.proxies: dict[str, Proxy] = {}
        self.views: dict[str, View] = {}
        self._published: dict[str, str] = {}
        self._caches: dict[tuple[str, str], str] = {}
        """What each frontend got wrong about each worker's KV cache when both told last."""
        self._incarnations: dict[str, int] = {}
        self._back_after: dict[str, float] = {}
        self._upgraded: set[str] = set()
        self._stopping = False
        self._cookie = secrets.token_hex(16)
        self._tasks: asyncio.TaskGroup | None = None
        self._log = (root / "cluster.log").open("a")

    # -- names -----------------------------------------------------------------------------------------

    @property
    def frontends(self) -> list[str]:
        return frontend_names(self.plan.shape)

    @property
    def workers(self) -> list[str]:
        return worker_names(self.plan.shape)

    @property
    def names(self) -> list[str]:
        return [*self.workers, *self.frontends]

    def url(self, name: str) -> str:
        """Return the address of a frontend."""
        return f"http://127.0.0.1:{self.http_ports[name]}"

    def name_of(self, instance: str) -> str:
        """Return the name of a worker by its instance id."""
        return next((name for name in self.workers if instance_of(name) == instance), "")

    # -- life ------------------------------------------------------------------------------------------

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[Cluster]:
        """Run it for the length of the block; every process is gone afterwards, whatever happened."""
        guard = await asyncio.create_subprocess_exec(
            *(sys.executable, "-I", "-S", sentinel.__file__, f"{COOKIE}={self._cookie}"),
            stdin=asyncio.subprocess.PIPE,
            env={},
            start_new_session=True,
        )
        try:
            await self.ledger.start()
            for name in self.workers:
                await self._front(name)
            async with asyncio.TaskGroup() as self._tasks:
                try:
                    for name in self.names:
                        await self.boot(name)
                    yield self
                finally:
                    self._stopping = True
                    await self._end_all()
        finally:
            assert guard.stdin is not None
            guard.stdin.close()
            await guard.wait()
            for proxy in self.proxies.values():
                await proxy.close()
            await self.ledger.close()
            self._log.close()

    async def _front(self, name: str) -> None:
        """Put a proxy before a worker."""
        own: list[int] = []

        def peer_of(address: tuple[str, int]) -> str:
            pids = {n: p.pid for n, p in self.processes.items() if n in self.http_ports}
            return owner_of(address[1], own[0], pids)

        proxy = self.proxies[name] = Proxy(("127.0.0.1", self.rpc_ports[name]), peer_of, self.rng)
        self._published[name] = await proxy.start()
        own.append(int(self._published[name].rpartition(":")[2]))

    async def boot(self, name: str) -> None:
        """Start a process, unless it runs or everything ends."""
        if name in self.processes or self._stopping:
            return
        number = self._incarnations[name] = self._incarnations.get(name, 0) + 1
        role: Literal["frontend", "worker"] = "worker" if name in self.rpc_ports else "frontend"
        old = name in self.plan.old and name not in self._upgraded
        version = OLDEST_VERSION if old else VERSION
        life = Life(name, role, number, started=asyncio.get_running_loop().time(), version=version)
        self.ledger.lives[name, number] = life
        self.ledger.history.lives.append(life)
        if role == "worker":
            await self.proxies[name].listen()
        spec = ChildSpec(name, self._argv(name), self._env(name, number, old=old))
        started = await Child.start(spec, self._cookie, {k: v for k, v in os.environ.items() if k[:4] != "DYN_"})
        assert self._tasks is not None
        watch = self._tasks.create_task(self._watch(name, life, started), name=f"watch-{name}")
        self.processes[name] = Process(life, started, watch)

    async def _watch(self, name: str, life: Life, running: Child) -> None:
        loop = asyncio.get_running_loop()
        try:
            code = await running.wait(lambda slot, line: print(slot, line, file=self._log, flush=True))
        finally:
            running.kill_group()
        if not life.how:
            life.how, life.code, life.ended = ("crashed" if code < 0 else "exited"), code, loop.time()
        self.ledger.over(name, life.incarnation)
        if name in self.proxies:
            self.proxies[name].deafen()
        if name in self.processes and self.processes[name].life is life:
            del self.processes[name]
        if not self._stopping:
            await asyncio.sleep(self._back_after.pop(name, BACKOFF))
            await self.boot(name)

    async def _end_all(self) -> None:
        for process in self.processes.values():
            process.child.signal(signal.SIGCONT)
            process.child.kill_group()
        watches = [process.watch for process in self.processes.values()]
        if watches:
            await asyncio.wait(watches)

    def kill(self, name: str, back_after: float = BACKOFF) -> bool:
        """SIGKILL; returns whether it ran."""
        process = self.processes.get(name)
        if process is None:
            return False
        self._back_after[name] = back_after
        self.gone(process)
        process.child.kill_group()
        return True

    def gone(self, process: Process) -> None:
        """Write down that a process is as good as dead now."""
        life = process.life
        life.how, life.code, life.ended = life.how or "crashed", -9, life.ended or asyncio.get_running_loop().time()

    def terminate(self, name: str, back_after: float = BACKOFF) -> bool:
        """SIGTERM, for a process of today's version; returns whether it ran."""
        process = self.processes.get(name)
        if process is None:
            return False
        self._back_after[name] = back_after
        self._upgraded.add(name)
        if process.life.role == "frontend":
            process.life.draining = process.life.draining or asyncio.get_running_loop().time()
        process.child.signal(signal.SIGTERM)
        return True

    def back_after(self, name: str, seconds: float) -> None:
        """When this process ends, it is started again after so long."""
        self._back_after[name] = seconds

    # -- settings --------------------------------------------------------------------------------------

    def _argv(self, name: str) -> tuple[str, ...]:
        python, plan = (sys.executable, "-m", "tests.faults.child"), self.plan
        if name in self.http_ports:
            return (*python, "frontend", "--http-host", "127.0.0.1", "--http-port", str(self.http_ports[name]))
        limits = ("--max-num-seqs", str(plan.seats), "--mock-num-blocks", str(plan.blocks))
        size = ("--context-length", str(plan.blocks * 16), "--mock-step-ms", str(plan.shape.step_ms))
        events = "--mock-kv-events" if plan.kv_events else "--no-mock-kv-events"
        ports = ("--tcp-rpc-port", str(self.rpc_ports[name]))
        return (*python, "worker", "--engine", "mock", *ports, *limits, *size, events)

    def _env(self, name: str, incarnation: int, *, old: bool) -> dict[str, str]:
        plan = self.plan
        if name not in self.views:
            self.views[name] = View(self.root / f"discovery-{name}", self._directory())
        env = {
            "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'src'}",
            "DYN_FILE_KV": str(self.views[name].path),
            "DYN_SYSTEM_PORT": "0",
            "DYN_LOG": "warning",
            child.SOCKET: str(self.ledger.path),
            child.NAME: name,
            child.INCARNATION: str(incarnation),
            child.OLD: "yes" if old else "",
            child.BUG: self._bug,
        }
        if plan.secret:
            env["DYN_WIRE_SECRET"] = plan.secret
        env |= self._frontend_env() if name in self.http_ports else self._worker_env(name)
        return {key: value for key, value in env.items() if value != ""}

    def _directory(self) -> Path:
        real = self.root / "discovery"
        real.mkdir(mode=0o700, exist_ok=True)
        return real

    def _worker_env(self, name: str) -> dict[str, str]:
        plan = self.plan
        return {
            "DYN_INSTANCE_ID": instance_of(name),
            "DYN_WORKER_ADVERTISE": self._published[name],
            "DYN_ENGINE_REQUEST_LIMIT": str(plan.limit),
            "DYN_HEALTH_CHECK_ENABLED": str(plan.canary).lower(),
            "DYN_CANARY_WAIT_TIME": "1",
            "DYN_WORKER_SHUTDOWN_TOTAL_TIMEOUT_SECS": "8",
            "DYN_WORKER_SHUTDOWN_INFLIGHT_TIMEOUT_SECS": str(plan.drain),
        }

    def _frontend_env(self) -> dict[str, str]:
        plan = self.plan
        return {
            "DYN_HANG_FLOOR_SECS": str(HANG_FLOOR),
            "DYN_ROUTER_KV_EVENTS_ALWAYS": str(plan.kv_events).lower(),
            "DYN_RUNTIME_INHIBITED_DURATION_SECS": str(INHIBITED),
            "DYN_HTTP_GRACEFUL_SHUTDOWN_TIMEOUT_SECS": str(plan.grace),
            "DYN_HTTP_SSE_KEEP_ALIVE_INTERVAL_MS": "1500",
            "DYN_HTTP_MAX_REQUESTS": str(plan.most_requests),
            "DYN_MIGRATION_LIMIT": str(plan.migration_limit),
            "DYN_REQUEST_TIMEOUT": str(plan.request_timeout),
            "DYN_FIRST_TOKEN_TIMEOUT": "15",
            "DYN_INTER_TOKEN_TIMEOUT": "10",
            "DYN_CLIENT_STALL_TIMEOUT": str(plan.client_stall),
            "DYN_MIGRATION_WAIT_SECS": "20",
            "DYN_MIGRATION_MAX_WAITING": str(plan.most_waiting),
            "DYN_ACTIVE_DECODE_BLOCKS_THRESHOLD": _text(plan.decode_threshold),
            "DYN_ACTIVE_PREFILL_TOKENS_THRESHOLD": _text(plan.prefill_threshold),
            "DYN_ADMISSION_QUEUE_LIMIT": str(plan.queue),
            "DYN_ADMISSION_QUEUE_TIMEOUT_SECS": str(plan.queue_timeout),
        }

    # -- looking at it ---------------------------------------------------------------------------------

    async def ask(self, url: str) -> Any:
        """Return the JSON behind a URL, whatever its status; None when nobody answers properly."""
        with contextlib.suppress(Exception):
            return (await http.get(url, _ASK_SECONDS)).json()
        return None

    @property
    def complete(self) -> bool:
        """Whether every process runs, is ready, stays, and is not stopped."""
        return len(self.processes) == len(self.names) and all(
            (p.life.ready or p.life.role == "frontend") and not p.life.draining and not p.life.how and not p.stopped
            for p in self.processes.values()
        )

    async def instances(self, frontend: str) -> dict[str, dict[str, Any]]:
        """Return the workers as a frontend sees them, by name; empty when it does not answer."""
        health = await self.ask(f"{self.url(frontend)}/health")
        if not isinstance(health, dict):
            return {}
        process = self.processes.get(frontend)
        if process is not None and health.get("models") and not process.life.ready:
            process.life.ready = asyncio.get_running_loop().time()
        return {self.name_of(one["instance_id"]): one for one in health.get("instances", [])}

    async def in_use(self) -> bool:
        """Whether every frontend would send new work to every worker's present process."""
        if not self.complete:
            return False
        for frontend in self.frontends:
            seen = await self.instances(frontend)
            for name in self.workers:
                one, process = seen.get(name), self.processes.get(name)
                if one is None or process is None or one["pid"] != process.pid:
                    return False
                if one["state"] != "usable" or one["draining"]:
                    return False
        return True

    async def seen(self, served: set[tuple[str, str]]) -> list[Seen]:
        """Return what every frontend thinks of every worker."""
        views = []
        for frontend in self.frontends:
            shown = await self.instances(frontend)
            for name in self.workers:
                one, process = shown.get(name), self.processes.get(name)
                views.append(
                    Seen(
                        frontend,
                        name,
                        alive=process is not None,
                        known=one is not None,
                        eligible=one is not None and one["state"] == "usable" and not one["draining"],
                        current=one is not None and process is not None and one["pid"] == process.pid,
                        served=(frontend, name) in served,
                        state="" if one is None else str(one["state"]),
                        cache=self._caches.get((frontend, name), "") if self.plan.kv_events else "",
                    )
                )
        return views

    def caches_known(self) -> bool:
        """Whether every frontend knew what was in every KV cache when they last told; asks them anew."""
        ledger = self.ledger
        self._caches = {
            (frontend, name): ledger.cache_difference(frontend, name, instance_of(name))
            for frontend in self.frontends
            for name in self.workers
        }
        ledger.forget_caches()
        for name in self.names:
            ledger.tell(name, look=1.0)
        return not any(self._caches.values())

    async def residues(self) -> list[Residue]:
        """Return what every process holds, by its metrics, and a frontend's own list of leases and requests."""
        found = []
        for name in self.names:
            leases: dict[str, int] = {}
            in_hand = 0
            if name in self.http_ports:
                listed = await self.ask(f"{self.url(name)}/debug/requests") or {}
                leases, in_hand = dict(listed.get("leases", {})), len(listed.get("requests", []))
            gauges = await self._held(name)
            engine = sum(int(v) for k, v in gauges.items() if "running_sequences" in k or "waiting_sequences" in k)
            found.append(Residue(name, leases, gauges, in_hand, engine=engine if name in self.rpc_ports else 0))
        return found

    async def _held(self, name: str) -> dict[str, float]:
        held: dict[str, float] = {}
        try:
            address = self.url(name) if name in self.http_ports else self._status_address(name)
            text = (await http.get(f"{address}/metrics", _ASK_SECONDS)).body.decode()
        except FileNotFoundError:
            self.ledger.history.see("unprovoked absence of a record")
            return {"no record in discovery": 1.0}
        except Exception as error:
            return {f"metrics could not be read: {error!r}": 1.0}
        for line in text.splitlines():
            gauge = line.partition("{")[0].partition(" ")[0]
            if not line.startswith("#") and HELD.search(gauge) and not gauge.endswith(_NEVER):
                number = float(line.rsplit(" ", 1)[1])
                if number:
                    held[line.rsplit(" ", 1)[0]] = number
        return held

    def _status_address(self, name: str) -> str:
        record = json.loads((self._directory() / f"{instance_of(name)}.json").read_text())["record"]
        return f"http://{record['system_address']}"


def _text(value: float | None) -> str:
    return "" if value is None else str(value)


def settings_of(plan: Plan) -> Plan:
    """Return a plan without requests and faults: clusters of equal settings are the same."""
    return msgspec.structs.replace(plan, wishes=(), faults=(), profile="mixed")
