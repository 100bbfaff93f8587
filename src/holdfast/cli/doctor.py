"""`holdfast doctor`: is this installation fit to run, and if not, what to fix? Must never change anything."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import msgspec
import typer

from holdfast.cli.app import parameter, takes_settings
from holdfast.cli.options import Flags, Process
from holdfast.cli.show import paint
from holdfast.doctor.examine import Wish, examine, examine_engines
from holdfast.doctor.finding import Finding, Level, worst
from holdfast.frontend.config import FrontendConfig

_COLOURS: dict[Level, str] = {"ok": "green", "note": "dim", "warning": "yellow", "problem": "red"}
_PROCESS = Process(("frontend",), lambda _: 0)
_OWN = (
    parameter("area", Annotated[str, typer.Argument(help="What to look at: all, or engines.")], "all"),
    parameter("engine", Annotated[str, typer.Option("--engine", help="The engine that shall run here.")], ""),
    parameter("model", Annotated[str, typer.Option("--model", help="Model directory, GGUF file or cached name.")], ""),
    parameter("context", Annotated[int, typer.Option("--context-length", help="Tokens per sequence; 0: all.")], 0),
    parameter("sequences", Annotated[int, typer.Option("--max-num-seqs", help="Sequences at once.")], 1),
    parameter(
        "python",
        Annotated[list[Path] | None, typer.Option("--python", help="Interpreter of an environment; may be repeated.")],
        None,
    ),
    parameter("load", Annotated[bool, typer.Option("--import/--no-import", help="Import each engine, too.")], True),
    parameter("as_json", Annotated[bool, typer.Option("--json", help="JSON, for machines.")], False),
)


@takes_settings(_PROCESS, *_OWN)
def command(
    flags: Flags,
    *,
    area: str,
    engine: str,
    model: str,
    context: int,
    sequences: int,
    python: list[Path] | None,
    load: bool,
    as_json: bool,
) -> int:
    """Check this installation, and say what to fix.

    Engines and their versions (in this environment, those beside it, or those named with --python), GPU and driver,
    model files, memory for weights and KV cache, shared memory, limits of processes, and whether the frontend's ports
    are free. 'holdfast doctor engines' looks at the engines' part only. Exit code: 0 fit, 1 a problem, 2 wrong usage.
    """
    if area not in ("all", "engines"):
        sys.stderr.write(f"holdfast doctor looks at all or engines, not at {area!r}\n")
        return 2
    config = flags.load(FrontendConfig, "frontend").config
    wish = Wish(
        engine=engine,
        model=model,
        context_length=context,
        sequences=sequences,
        pythons=tuple(python or ()),
        load=load,
        ports={"HTTP API of the frontend": (config.http_host, config.http_port)},
    )
    findings = examine_engines(wish) if area == "engines" else examine(wish)
    verdict = worst(findings)
    if as_json:
        report = {"verdict": verdict, "findings": findings}
        sys.stdout.write(msgspec.json.format(msgspec.json.encode(report), indent=1).decode() + "\n")
    else:
        sys.stdout.write(_text(findings, verdict))
    return 1 if verdict == "problem" else 0


def _text(findings: list[Finding], verdict: Level) -> str:
    lines = []
    for finding in findings:
        lines.append(f"{paint(f'{finding.level:<8}', _COLOURS[finding.level])} {finding.area:<8} {finding.what}")
        if finding.fix:
            lines.append(f"{'':18}-> {finding.fix}")
    count = sum(finding.level == "problem" for finding in findings)
    summary = f"{count} problem{'s' * (count != 1)}: see the arrows" if count else "no problem found"
    lines.append(paint(f"{verdict}: {summary}", _COLOURS[verdict]))
    return "\n".join(lines) + "\n"
