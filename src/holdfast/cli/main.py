"""The entry point: finds the subcommand and loads only what that one needs.

`frontend` and `worker` are started by supervisors, many times and in a hurry: they take a short way that
loads neither typer nor rich. Everything else, and every ``--help``, goes through typer.

Must never import a subcommand before it is asked for.
"""

from __future__ import annotations

import importlib
import os
import sys
import types

from holdfast.base.lineage import die_with_owner

COMMANDS = {
    "serve": "Run a frontend and workers on this machine, restarted when they crash.",
    "frontend": "Run one frontend: the OpenAI HTTP API.",
    "worker": "Run one worker: hosts an inference engine.",
    "router": "Run one stand-alone router: where should a prompt go?",
    "demo": "Kill a worker in mid-sentence and watch the sentence go on, token for token.",
    "restart": "Replace the processes of a running serve one by one, without a failed request.",
    "status": "Show who is there, and in what state.",
    "explain": "Tell what became of a request: attempts, workers, when its tokens came.",
    "replay": "Send the requests of a trace, and report latencies, throughput, cache hits and balance.",
    "sim": "Run whole clusters in simulation, with faults; replay a seed, make a failing one small.",
    "simulate": "Show what clients would see when workers fail or settings change, on a virtual clock.",
    "doctor": "Check this installation: engines, GPUs, model files, memory, ports; and say what to fix.",
    "config": "Show every setting, its value and where it comes from.",
}
PROCESSES = ("frontend", "worker", "router")
"""Subcommands that take the short way."""
_HELP = {"--help", "-h"}


def main() -> None:
    """Run the command line and exit with its code."""
    die_with_owner(os.environ)
    argv = sys.argv[1:]
    if argv and argv[0] in PROCESSES and not _HELP & set(argv):
        from holdfast.cli.options import run_process  # noqa: PLC0415

        sys.exit(run_process(load_command(argv[0]).PROCESS, argv[1:]))
    from holdfast.cli.app import build_app  # noqa: PLC0415

    build_app(argv)()


def load_command(name: str) -> types.ModuleType:
    """Return the module of a subcommand."""
    return importlib.import_module(f"holdfast.cli.{name}")
