"""`holdfast worker`: one process that hosts an engine. Must never import an engine that is not asked for."""

from __future__ import annotations

from holdfast.cli.catalogue import ENGINES, section
from holdfast.cli.options import Flags, Process, log_to_stderr
from holdfast.worker.config import WorkerConfig


def run(flags: Flags) -> int:
    """Run one worker: hosts an inference engine and serves it to frontends.

    It registers once its engine is ready, drains on SIGTERM (what does not finish within the grace moves to
    other workers), and exits with 1 when its engine dies. The engines' own settings are listed by engine.
    """
    log_to_stderr(flags, "worker")
    config = flags.load(WorkerConfig, "worker").config
    engine_config = flags.load(section(config.engine).config_type, config.engine).config
    from holdfast.worker.entry import run as run_worker  # noqa: PLC0415
    from holdfast.worker.hosted import make_engine  # noqa: PLC0415  after logging is set up

    return run_worker(config, lambda: make_engine(config.engine, engine_config, config.role))


PROCESS = Process(("worker", *ENGINES, "log"), run)
