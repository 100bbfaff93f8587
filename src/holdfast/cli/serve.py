"""`holdfast serve`: a whole cluster on this machine under one supervisor. Must never host an engine itself."""

from __future__ import annotations

import asyncio
import os
import random
import secrets
import signal
import socket
import sys
from typing import Annotated

import msgspec
import typer

from holdfast.base.errors import Conflict, HoldfastError
from holdfast.base.settings import InvalidSetting, Loaded
from holdfast.cli.app import parameter, takes_settings
from holdfast.cli.catalogue import ENGINES, section
from holdfast.cli.options import Flags, Process, passed_on
from holdfast.cli.show import Relay, StartProgress, paint
from holdfast.frontend.config import FrontendConfig
from holdfast.frontend.https import own_client_context
from holdfast.local.backoff import RestartPolicy
from holdfast.local.cluster import ClusterPlan, LocalCluster
from holdfast.local.config import ServeConfig
from holdfast.local.demonstration import first_model
from holdfast.local.ports import claim_port, free_port, open_listener
from holdfast.local.rolling import ROLES, Role
from holdfast.runtime.discovery.factory import open_discovery
from holdfast.runtime.tls_renewal import Renewal
from holdfast.telemetry.logs import LogConfig, setup_logging
from holdfast.worker.config import WorkerConfig

_WORKER_SECTIONS = ("worker", *ENGINES, "log")
_FRONTEND_SECTIONS = ("frontend", "log")
_OWN = frozenset({"http-host", "http-port", "tcp-rpc-port", "system-port", "instance-id"})
"""Settings that the plan decides for each process."""

_KILL_SLACK = 5.0
"""Seconds beyond a child's own budget before it is killed."""
RESTARTS: dict[signal.Signals, tuple[Role, ...]] = {
    signal.SIGHUP: ROLES,
    signal.SIGUSR1: ("worker",),
    signal.SIGUSR2: ("frontend",),
}
"""Which rolling restart a signal asks for."""

PROCESS = Process(("serve", *_FRONTEND_SECTIONS, *_WORKER_SECTIONS[:-1]), lambda _: 0)
_JSON = parameter("as_json", Annotated[bool, typer.Option("--json", help="Print one JSON line when ready.")], False)


@takes_settings(PROCESS, _JSON)
def command(flags: Flags, *, as_json: bool) -> int:
    """Run frontends and workers on this machine, restarted when they crash.

    Starts --frontends HTTP processes and --workers engines (and --prefill-workers, which compute prompts for them),
    shows when they are ready, relays their output, and stops all of them in order on Ctrl-C or SIGTERM: frontends
    drain first, then workers (a second one hurries, a third one kills). SIGHUP, or 'holdfast restart', replaces all
    workers and then all frontends one by one, without a failed request. Whatever ends this process, none of its
    children outlives it. Settings of frontends and workers are passed on to them.
    """
    log = flags.load(LogConfig, "log").config
    writer = setup_logging(log, "supervisor" if log.as_json else "")
    plan, serve, frontend, listener = make_plan(flags)
    rng = random.Random(secrets.randbits(128))
    discovery = open_discovery(frontend.discovery_backend, root=frontend.file_kv)
    renewal = Renewal()
    relay, tls = Relay(writer, raw=log.as_json), own_client_context(frontend.https, renewal)
    system = msgspec.structs.replace(
        flags.load(WorkerConfig, "worker").config.system, system_port=serve.serve_system_port
    )
    cluster = LocalCluster(plan, discovery, rng, os.environ, relay, listener=listener, tls=tls, system=system)
    try:
        return asyncio.run(_serve(cluster, serve.start_timeout, as_json, renewal))
    finally:
        writer.close()


def make_plan(flags: Flags) -> tuple[ClusterPlan, ServeConfig, FrontendConfig, socket.socket | None]:
    """Return what to start for these flags, and the socket that several frontends share.

    Raises:
        InvalidSetting: a wrong value.
        PortTaken: naming who has the HTTP port.
    """
    loaded = flags.load(ServeConfig, "serve")
    serve = loaded.config
    frontend = flags.load(FrontendConfig, "frontend").config
    fields = [f for name in PROCESS.sections for f in section(name).fields]
    worker = flags.load(WorkerConfig, "worker").config
    if "instance-id" in flags.values:
        raise InvalidSetting("--instance-id names one worker; the workers of a local cluster get ids of their own.")
    secret = {f.env: flags.values[f.flag] for f in fields if f.secret and f.flag in flags.values}
    listener = open_listener(frontend.http_host, frontend.http_port) if _shared(serve) else None
    plan = ClusterPlan(
        http_host=frontend.http_host,
        http_ports=_own_ports(frontend, serve.frontends, shared=listener is not None),
        shared_port=0 if listener is None else listener.getsockname()[1],
        workers=serve.workers + serve.prefill_workers,
        prefill_workers=serve.prefill_workers,
        flags_by_worker=tuple(
            (*_fixed_ports(worker, i), *_part(serve, i)) for i in range(serve.workers + serve.prefill_workers)
        ),
        worker_flags=passed_on(flags, [section(name) for name in _WORKER_SECTIONS], _OWN),
        frontend_flags=passed_on(flags, [section(name) for name in _FRONTEND_SECTIONS], _OWN),
        env=secret,
        namespace=frontend.namespace,
        restart=RestartPolicy(intensity=serve.restart_intensity, window=serve.restart_window),
        stop_grace=_stop_grace(loaded, frontend, worker),
        start_timeout=serve.start_timeout,
    )
    return plan, serve, frontend, listener


def _stop_grace(serve: Loaded[ServeConfig], frontend: FrontendConfig, worker: WorkerConfig) -> float:
    """Return how long a child may take to leave: what was asked for, else not less than its own budget needs."""
    if serve.origins["stop_grace"].source != "default":
        return serve.config.stop_grace
    leaving = frontend.http_drain_notice + frontend.http_graceful_shutdown_timeout_secs
    longest = max(leaving, worker.shutdown.shutdown_total_timeout)
    return max(serve.config.stop_grace, longest + _KILL_SLACK)


def _shared(serve: ServeConfig) -> bool:
    return serve.frontend_ports == "shared" or (serve.frontend_ports == "auto" and serve.frontends > 1)


def _own_ports(frontend: FrontendConfig, count: int, *, shared: bool) -> tuple[int, ...]:
    """Return a port for each frontend: successive ones; beside a shared port free ones will do instead."""
    first, host = frontend.http_port, frontend.http_host
    if not first:
        return tuple(free_port(host) for _ in range(count))
    if not shared:
        return tuple(claim_port(host, first + i) for i in range(count))
    ports = []
    for i in range(1, count + 1):
        try:
            ports.append(claim_port(host, first + i))
        except Conflict:
            ports.append(free_port(host))
    return tuple(ports)


def _part(serve: ServeConfig, number: int) -> tuple[str, ...]:
    """Return what tells a worker its part in a request, where there are parts."""
    if not serve.prefill_workers:
        return ()
    return (f"--disaggregation-mode={'decode' if number < serve.workers else 'prefill'}",)


def _fixed_ports(worker: WorkerConfig, number: int) -> tuple[str, ...]:
    """Return the ports of one worker: successive ones where the settings fix the first."""
    ports = {"tcp-rpc-port": worker.rpc_port, "system-port": worker.system.system_port}
    return tuple(f"--{flag}={port + number}" for flag, port in ports.items() if port > 0)


async def _serve(cluster: LocalCluster, start_timeout: float, as_json: bool, renewal: Renewal) -> int:
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, cluster.supervisor.stop)
    for number, roles in RESTARTS.items():
        loop.add_signal_handler(number, _restart, cluster, roles)
    async with cluster.running() as running:
        try:
            await _until_ready(cluster, running, start_timeout)
        except HoldfastError as error:
            print(f"holdfast: {error.message}", file=sys.stderr, flush=True)
            return 1
        if not running.done():
            await _announce(cluster, as_json)
        async with asyncio.TaskGroup() as tasks:
            renewing = tasks.create_task(renewal.run())
            code = await asyncio.shield(running)
            renewing.cancel()
        return code


def _restart(cluster: LocalCluster, roles: tuple[Role, ...]) -> None:
    for role in roles:
        cluster.rolling.ask(role)


async def _until_ready(cluster: LocalCluster, running: asyncio.Task[int], timeout: float) -> None:  # noqa: ASYNC109
    """Wait for readiness, or for the end of the supervisor, whichever comes first."""
    with StartProgress() as progress:
        waiting = asyncio.create_task(cluster.until_ready(timeout, progress))  # owned: awaited or cancelled here
        await asyncio.wait({waiting, running}, return_when=asyncio.FIRST_COMPLETED)
        if waiting.done():
            waiting.result()
        waiting.cancel()
        await asyncio.wait({waiting})


async def _announce(cluster: LocalCluster, as_json: bool) -> None:
    url = cluster.base_urls[0]
    model = await first_model(url, cluster.tls)
    views = cluster.views()
    if as_json:
        ready = {
            "base_urls": [f"{u}/v1" for u in cluster.base_urls],
            "frontend_urls": cluster.frontend_urls,
            "slots": views,
            "system_address": cluster.vitals.status.address,
            "pid": os.getpid(),
        }
        print(msgspec.json.encode(ready).decode(), flush=True)
        return
    workers = " or ".join(str(view.pid) for view in views if view.slot.startswith("worker"))
    ports = f" (by {len(cluster.frontend_urls)} frontends)" if cluster.plan.shared_port else ""
    example = (
        f"  curl -N {url}/v1/chat/completions -H 'content-type: application/json' -d '{{\n"
        f'    "model": "{model}", "stream": true, "max_tokens": 400,\n'
        '    "messages": [{"role": "user", "content": "Tell me a story."}]}\''
    )
    print(
        f"\n{paint('Holdfast serves at ' + url, 'bold')}{ports}\n\n{example}\n\n"
        f"Kill a worker while it talks (kill -9 {workers}) and the sentence goes on. Ctrl-C stops everything.\n",
        flush=True,
    )
