"""`holdfast router`: one router process. Must never import typer at the top (see `main`)."""

from __future__ import annotations

from holdfast.cli.options import Flags, Process, log_to_stderr
from holdfast.routerd.config import RouterConfig


def run(flags: Flags) -> int:
    """Run one stand-alone router: knows the workers' caches and load, for frontends and other programs to ask.

    It answers best_worker_id and get_overlap_scores over the wire and, with --system-port, as JSON over HTTP, and takes
    token streams itself (generate). Frontends ask it with --router-component router. Stops on SIGTERM and SIGINT.
    """
    log_to_stderr(flags, "router")
    from holdfast.routerd.entry import run as run_router  # noqa: PLC0415  after logging is set up

    return run_router(flags.load(RouterConfig, "router").config)


PROCESS = Process(("router", "log"), run)
