"""`holdfast frontend`: one HTTP process. Must never import typer at the top (see `main`)."""

from __future__ import annotations

from holdfast.cli.options import Flags, Process, log_to_stderr
from holdfast.frontend.config import FrontendConfig


def run(flags: Flags) -> int:
    """Run one frontend: the OpenAI HTTP API over the workers that discovery finds.

    It routes each request to a worker and carries half-finished generations from a dead, frozen or draining
    worker to a healthy one. Stops on SIGTERM and SIGINT after running streams have had their grace.
    """
    log_to_stderr(flags, "frontend")
    from holdfast.frontend.process import run as run_frontend  # noqa: PLC0415  after logging is set up

    return run_frontend(flags.load(FrontendConfig, "frontend").config)


PROCESS = Process(("frontend", "log"), run)
