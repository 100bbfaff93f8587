"""A worker as a process of its own: the event loop, what the settings name, and signals around one `WorkerProcess`.

Must never hold what belongs to the worker itself, so that tests and the simulation run the same one without all this.
"""

from __future__ import annotations

import asyncio
import gc
import os
import random
import secrets
import signal
import time
from collections.abc import Callable

from holdfast.base.lineage import die_with_owner
from holdfast.base.settings import load
from holdfast.engines.contract import Engine
from holdfast.health.fairness import let_threads_in
from holdfast.runtime.discovery.contract import Discovery
from holdfast.runtime.discovery.factory import open_discovery
from holdfast.telemetry.spans import open_spans
from holdfast.worker.config import WorkerConfig
from holdfast.worker.process import WorkerProcess


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
    let_threads_in()
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
        signals: whether this process is nothing but the worker: SIGTERM and SIGINT stop it (a second one hurries,
            a third one ends it).
    """
    rng = rng or random.Random(secrets.randbits(128))
    discovery = discovery or open_discovery(config.discovery_backend, root=config.file_kv)
    worker = WorkerProcess(
        config,
        make_engine(),
        discovery,
        rng,
        spans=open_spans(config.traces, "worker", config.instance_id),
        clock=time.monotonic_ns,
        on_ready=_settle if signals else lambda: None,
        owns_process=signals,
    )
    if signals:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, worker.stop)
    return await worker.run()


def _settle() -> None:
    """What is alive now lives as long as the process: the collector need not look at it again."""
    gc.collect()
    gc.freeze()
