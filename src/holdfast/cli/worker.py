"""`holdfast worker`: one process that hosts an engine. Must never import an engine that is not asked for."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

import msgspec

from holdfast.base.settings import InvalidSetting
from holdfast.cli.catalogue import ENGINES, OUTSPOKEN, section
from holdfast.cli.options import Flags, Process, log_to_stderr
from holdfast.worker.config import WorkerConfig


def run(flags: Flags) -> int:
    """Run one worker: hosts an inference engine and serves it to frontends.

    It registers once its engine is ready, drains on SIGTERM (what does not finish within the grace moves to
    other workers), and exits with 1 when its engine dies. The engines' own settings are listed by engine. Flags of
    vLLM itself are passed on to it: holdfast worker --engine vllm --model DIR --max-model-len 4096.
    """
    log_to_stderr(flags, "worker")
    config = flags.load(WorkerConfig, "worker").config
    engine_config = flags.load(section(config.engine).config_type, config.engine).config
    if flags.rest:
        engine_config = msgspec.structs.replace(engine_config, args=_joined(engine_config, flags.rest))
    from holdfast.worker.entry import run as run_worker  # noqa: PLC0415
    from holdfast.worker.hosted import make_engine  # noqa: PLC0415  after logging is set up

    return run_worker(config, lambda: make_engine(config.engine, engine_config, config.role))


def _joined(engine_config: msgspec.Struct, rest: Sequence[str]) -> str:
    """Return the engine's own command line: what the settings say, then what the command line says."""
    said: str = getattr(engine_config, "args", "")
    return " ".join(part for part in (said, shlex.join(rest)) if part)


def narrow(argv: Sequence[str]) -> tuple[str, ...]:
    """Return the sections for an engine that has a command line of its own; empty for the others.

    vLLM has flags that other engines' settings also have (--block-size): only the settings of the engine that is meant
    count.
    """
    file = _value(argv, "--config-file")
    engine = _value(argv, "--engine")
    flags = Flags({"engine": engine} if engine else {}, Path(file) if file else None)
    try:
        meant = flags.load(WorkerConfig, "worker").config.engine
    except InvalidSetting:
        return ()  # loading says it again, with everything else
    return ("worker", meant, "log") if meant in OUTSPOKEN else ()


def _value(argv: Sequence[str], flag: str) -> str:
    """Return what a flag says, in either form; empty: nothing."""
    found = ""
    for at, word in enumerate(argv):
        name, given, value = word.partition("=")
        if name == flag:
            found = value if given else (argv[at + 1] if at + 1 < len(argv) else "")
    return found


PROCESS = Process(("worker", *ENGINES, "log"), run, narrow)
