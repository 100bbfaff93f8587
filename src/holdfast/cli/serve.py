"""`holdfast serve`: a whole cluster on this machine under one supervisor. Must never host an engine itself."""

from __future__ import annotations

import asyncio
import os
import random
import secrets
import signal
import sys
from typing import Annotated

import msgspec
import typer

from holdfast.base.errors import HoldfastError
from holdfast.base.settings import InvalidSetting
from holdfast.cli.app import parameter, takes_settings
from holdfast.cli.catalogue import ENGINES, section
from holdfast.cli.options import Flags, Process, passed_on
from holdfast.cli.show import Relay, StartProgress, paint
from holdfast.frontend.config import FrontendConfig
from holdfast.local.backoff import RestartPolicy
from holdfast.local.cluster import ClusterPlan, LocalCluster
from holdfast.local.config import ServeConfig
from holdfast.local.demonstration import first_model
from holdfast.local.ports import claim_port
from holdfast.runtime.discovery.factory import open_discovery
from holdfast.telemetry.logs import LogConfig, setup_logging
from holdfast.worker.config import WorkerConfig

_WORKER_SECTIONS = ("worker", *ENGINES, "log")
_FRONTEND_SECTIONS = ("frontend", "log")
_OWN = frozenset({"http-host", "http-port", "tcp-rpc-port", "system-port", "instance-id"})
"""Settings that the plan decides for each process."""

PROCESS = Process(("serve", *_FRONTEND_SECTIONS, *_WORKER_SECTIONS[:-1]), lambda _: 0)
_JSON = parameter("as_json", Annotated[bool, typer.Option("--json", help="Print one JSON line when ready.")], False)


@takes_settings(PROCESS, _JSON)
def command(flags: Flags, *, as_json: bool) -> int:
    """Run frontends and workers on this machine, restarted when they crash.

    Starts --frontends HTTP processes and --workers engines, shows when they are ready, relays their output, and
    stops all of them in order on Ctrl-C or SIGTERM (a second one hurries). Whatever ends this process, none of
    its children outlives it. Settings of frontends and workers are passed on to them.
    """
    log = flags.load(LogConfig, "log").config
    writer = setup_logging(log, "supervisor" if log.as_json else "")
    plan, serve, frontend = make_plan(flags)
    rng = random.Random(secrets.randbits(128))
    discovery = open_discovery(frontend.discovery_backend, root=frontend.file_kv)
    cluster = LocalCluster(plan, discovery, rng, os.environ, Relay(writer, raw=log.as_json))
    try:
        return asyncio.run(_serve(cluster, serve.start_timeout, as_json))
    finally:
        writer.close()


def make_plan(flags: Flags) -> tuple[ClusterPlan, ServeConfig, FrontendConfig]:
    """Return what to start for these flags.

    Raises:
        InvalidSetting: a wrong value.
        PortTaken: naming who has the HTTP port.
    """
    serve = flags.load(ServeConfig, "serve").config
    frontend = flags.load(FrontendConfig, "frontend").config
    wanted = [frontend.http_port + i if frontend.http_port else 0 for i in range(serve.frontends)]
    fields = [f for name in PROCESS.sections for f in section(name).fields]
    worker = flags.load(WorkerConfig, "worker").config
    if "instance-id" in flags.values:
        raise InvalidSetting("--instance-id names one worker; the workers of a local cluster get ids of their own.")
    secret = {f.env: flags.values[f.flag] for f in fields if f.secret and f.flag in flags.values}
    plan = ClusterPlan(
        http_host=frontend.http_host,
        http_ports=tuple(claim_port(frontend.http_host, port) for port in wanted),
        workers=serve.workers,
        flags_by_worker=tuple(_fixed_ports(worker, i) for i in range(serve.workers)),
        worker_flags=passed_on(flags, [section(name) for name in _WORKER_SECTIONS], _OWN),
        frontend_flags=passed_on(flags, [section(name) for name in _FRONTEND_SECTIONS], _OWN),
        env=secret,
        namespace=frontend.namespace,
        restart=RestartPolicy(intensity=serve.restart_intensity, window=serve.restart_window),
        stop_grace=serve.stop_grace,
    )
    return plan, serve, frontend


def _fixed_ports(worker: WorkerConfig, number: int) -> tuple[str, ...]:
    """Return the ports of one worker: successive ones where the settings fix the first."""
    ports = {"tcp-rpc-port": worker.rpc_port, "system-port": worker.system.system_port}
    return tuple(f"--{flag}={port + number}" for flag, port in ports.items() if port > 0)


async def _serve(cluster: LocalCluster, start_timeout: float, as_json: bool) -> int:
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, cluster.supervisor.stop)
    async with cluster.running() as running:
        try:
            await _until_ready(cluster, running, start_timeout)
        except HoldfastError as error:
            print(f"holdfast: {error.message}", file=sys.stderr, flush=True)
            return 1
        if not running.done():
            await _announce(cluster, as_json)
        return await asyncio.shield(running)


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
    model = await first_model(url)
    views = cluster.views()
    if as_json:
        ready = {"base_urls": [f"{u}/v1" for u in cluster.base_urls], "slots": views, "pid": os.getpid()}
        print(msgspec.json.encode(ready).decode(), flush=True)
        return
    workers = " or ".join(str(view.pid) for view in views if view.slot.startswith("worker"))
    example = (
        f"  curl -N {url}/v1/chat/completions -H 'content-type: application/json' -d '{{\n"
        f'    "model": "{model}", "stream": true, "max_tokens": 400,\n'
        '    "messages": [{"role": "user", "content": "Tell me a story."}]}\''
    )
    print(
        f"\n{paint('Holdfast serves at ' + url, 'bold')}\n\n{example}\n\n"
        f"Kill a worker while it talks (kill -9 {workers}) and the sentence goes on. Ctrl-C stops everything.\n",
        flush=True,
    )
