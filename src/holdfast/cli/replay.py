"""`holdfast replay`: send the requests of a trace to a real cluster, or to a simulated one, and report what came of it.

Must never decide what the figures are; `replay` does.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import msgspec
import typer

from holdfast.base.errors import InvalidRequest
from holdfast.cli.app import parameter, takes_settings
from holdfast.cli.offline import (
    EXIT_INTERRUPTED,
    SECTIONS,
    EngineDefault,
    cluster_settings,
    ensure_repeatable,
    interruptible,
)
from holdfast.cli.options import Flags, Process
from holdfast.cli.show import is_terminal
from holdfast.frontend.config import FrontendConfig
from holdfast.replay.arrivals import Arrivals
from holdfast.replay.client import HttpDriver
from holdfast.replay.offline import Run, mode_names, run_all
from holdfast.replay.plot import curves, picture
from holdfast.replay.prompts import FIRST_TOKEN, Prompts
from holdfast.replay.record import Recording
from holdfast.replay.report import Report, summarise
from holdfast.replay.run import REQUEST_SECONDS, replay, what_happened
from holdfast.replay.tables import table
from holdfast.replay.trace import TRACE_BLOCK, chosen

_SETTINGS = Process(SECTIONS, lambda _: 0)
_PROFILE: EngineDefault = "reference"
_MOST_LOADS = 32
_WATCH_SECONDS = 1.0


def _option(name: str, kind: Any, default: Any, text: str) -> Any:
    flag = name.replace("_", "-")
    names = f"--{flag}/--no-{flag}" if kind is bool else f"--{flag}"
    return parameter(name, Annotated[kind, typer.Option(names, help=text)], default)


@takes_settings(
    _SETTINGS,
    parameter("trace", Annotated[Path, typer.Argument(help="Trace file, one JSON object a line.")], ...),
    _option("url", str, "", "Endpoint to send to, http(s)://host:port; without it a cluster is simulated."),
    _option("speedup", float | None, None, "Divide the trace's time by this; 1 when no pace is given."),
    _option("rate", float | None, None, "Requests a second, at random (Poisson), instead of the time stamps."),
    _option("concurrency", str, "", "Requests under way; alone, the time stamps do not matter. Simulated: 16,32,64."),
    _option("limit", int | None, None, "Only the first so many requests."),
    _option("max_output", int | None, None, "Shorten longer answers to so many tokens."),
    _option("model", str, "", "Model to ask for; the first of the endpoint when left out."),
    _option("api_key", str, "", "Bearer token; the variable OPENAI_API_KEY when left out."),
    _option("ignore_eos", bool, True, "Ask for answers of exactly the recorded length (vLLM's ignore_eos)."),
    _option("trace_block", int, TRACE_BLOCK, "Tokens for which one hash id of the trace stands."),
    _option("first_token", int, FIRST_TOKEN, "Prompts are made of this token id and the 255 after it."),
    _option("salt", str, "", "Another text makes other prompts of the same trace, for a cold cache."),
    _option("seed", int, 1, "Of the random arrivals."),
    _option("workers", int, 8, "Simulated: workers with a mock engine each."),
    _option("frontends", int, 1, "Simulated: frontends; clients take them in turn."),
    _option("profile", str, "", f"Simulated: speed and size of the engines (--mock-profile); {_PROFILE}."),
    _option("router", str, "", "Simulated: router modes to compare, separated by commas, or all; --router-mode."),
    _option("jobs", int, 1, "Simulated: runs side by side, a process and a core each."),
    _option("title", str, "", "Name of this run in the report."),
    _option("json", Path | None, None, "Write the report as JSON to this file; - for standard output, no table."),
    _option("plot", Path | None, None, "Write a picture (SVG) of the run to this file."),
)
def command(flags: Flags, **own: Any) -> int:
    """Send the requests of a trace to a running cluster, or to a simulated one, and report what came of them.

    The trace has one JSON object a line: timestamp (ms), input_length, output_length, hash_ids. Prompts are made from
    the hash ids, so that equal ids are equal tokens and prefix caches find what they found when it was recorded.
    Requests go out at their time stamps (--speedup), at a random --rate, or --concurrency at once; answers are
    streamed. Shows latencies, throughput, cache hits, and how evenly the workers were used. Ctrl-C ends it early and
    reports what there is. Exits with 1 when no request was answered.

    Without --url it runs on a virtual clock: the production code of frontends, routers and workers with simulated
    engines, whose settings are all flags here. Router modes and concurrencies can be compared then.
    """
    if not own["url"]:
        ensure_repeatable()
        return interruptible(lambda: _simulated(flags, own))
    for name in ("router", "profile"):
        if own[name]:
            raise InvalidRequest(f"--{name} is for simulated clusters; the one at --url has its own settings.")
    arrivals = _arrivals(own, own["concurrency"])
    patience = flags.load(FrontendConfig, "frontend").config.requests.request_timeout or REQUEST_SECONDS
    recording, interrupted = _run(own, arrivals, patience)
    report = summarise(recording, own["title"] or own["url"], arrivals.described)
    _write(own, [report], picture(report))
    _show([report], own["json"])
    if interrupted:
        return EXIT_INTERRUPTED
    return 0 if report.ok else 1


def _arrivals(own: dict[str, Any], concurrency: str) -> Arrivals:
    if concurrency and not concurrency.isdecimal():
        raise InvalidRequest(f"--concurrency {concurrency}: expected a number; several only for simulated clusters.")
    return Arrivals(own["speedup"], own["rate"], int(concurrency) if concurrency else None)


def _simulated(flags: Flags, own: dict[str, Any]) -> int:
    """Replay on a virtual clock, once for each router mode and concurrency."""
    settings = cluster_settings(flags, own, _PROFILE)
    modes = mode_names(own["router"]) if own["router"] else [settings.frontend.router_mode]
    loads = own["concurrency"].split(",")
    if len(loads) > _MOST_LOADS or (len(loads) > 1 and not all(load.isdecimal() for load in loads)):
        raise InvalidRequest(f"--concurrency {own['concurrency']}: expected up to {_MOST_LOADS} numbers, as in 16,32.")
    runs = [
        Run(
            title=own["title"] or mode,
            settings=msgspec.structs.replace(
                settings, frontend=msgspec.structs.replace(settings.frontend, router_mode=mode)
            ),
            arrivals=_arrivals(own, load),
            trace=own["trace"],
            block=own["trace_block"],
            limit=own["limit"],
            max_output=own["max_output"],
            first_token=own["first_token"],
            salt=own["salt"],
            seed=own["seed"],
        )
        for load in loads
        for mode in modes
    ]
    began = time.monotonic()
    found = run_all(runs, own["jobs"], _progress if is_terminal(sys.stderr) else lambda _: None)
    reports = [report for report, _ in found]
    _write(own, reports, picture(reports[0]) if len(reports) == 1 else _curves(own, runs, reports))
    if own["json"] == Path("-"):
        _show(reports, own["json"])
    else:
        for at in range(0, len(reports), len(modes)):  # one table for each load
            _show(reports[at : at + len(modes)], None)
    spent = sum(seconds for _, seconds in found)
    print(
        f"({sum(report.requests for report in reports):,} requests in {spent:,.1f} s of processor time, "
        f"{sum(report.requests for report in reports) / max(spent, 1e-3):,.0f} a second of it; "
        f"{time.monotonic() - began:,.0f} s by the clock)",
        file=sys.stderr,
    )
    return 0 if any(report.ok for report in reports) else 1


def _curves(own: dict[str, Any], runs: Sequence[Run], reports: Sequence[Report]) -> str:
    series: dict[str, list[tuple[float, Report]]] = {}
    for run, report in zip(runs, reports, strict=True):
        series.setdefault(report.title, []).append((float(run.arrivals.concurrency or 1), report))
    title = f"{own['trace'].name}: {runs[0].settings.workers} workers ({runs[0].settings.engine.profile})"
    return curves(title, "at once" if runs[0].arrivals.concurrency else reports[0].load, series)


def _progress(done: int) -> None:
    sys.stderr.write(f"\r{done} runs over ")
    sys.stderr.flush()


def _run(own: dict[str, Any], arrivals: Arrivals, patience: float) -> tuple[Recording, bool]:
    import uvloop  # noqa: PLC0415  only where something is sent

    kept: list[Recording] = []
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(_online(own, arrivals, patience, kept))
    except (KeyboardInterrupt, asyncio.CancelledError):
        if not kept:
            raise
        return kept[0], True
    except ExceptionGroup as group:
        raise what_happened(group) from None
    return kept[0], False


async def _online(own: dict[str, Any], arrivals: Arrivals, patience: float, kept: list[Recording]) -> None:
    loop = asyncio.get_running_loop()
    task = asyncio.current_task()
    assert task is not None
    loop.add_signal_handler(signal.SIGTERM, task.cancel)
    prompts = Prompts(block=own["trace_block"], first_token=own["first_token"], salt=own["salt"])
    extra = {"temperature": 0, **({"ignore_eos": True} if own["ignore_eos"] else {})}
    key = own["api_key"] or os.environ.get("OPENAI_API_KEY", "")
    driver = HttpDriver(own["url"], prompts, model=own["model"], api_key=key, extra=extra)
    await driver.find_model()
    recording = Recording(time.perf_counter)
    kept.append(recording)
    try:
        async with asyncio.TaskGroup() as tasks:
            watch = tasks.create_task(_watch(recording))
            await replay(
                chosen(own["trace"], own["trace_block"], own["limit"], own["max_output"]),
                driver,
                arrivals,
                random.Random(own["seed"]),
                recording=recording,
                patience=patience,
            )
            watch.cancel()
    finally:
        await driver.close()


async def _watch(recording: Recording) -> None:
    """Show how far it is, where somebody looks."""
    while is_terminal(sys.stderr):
        sent, under_way = len(recording.records), recording.in_flight
        sys.stderr.write(f"\r{sent:,} sent, {under_way:,} under way, {sent - under_way:,} over ")
        sys.stderr.flush()
        await asyncio.sleep(_WATCH_SECONDS)


def _write(own: dict[str, Any], reports: Sequence[Report], drawn: str) -> None:
    """Write the files that are wanted."""
    if own["plot"] is not None:
        own["plot"].write_text(drawn, encoding="utf-8")
    if own["json"] is not None and own["json"] != Path("-"):
        own["json"].write_bytes(_json(reports))


def _json(reports: Sequence[Report]) -> bytes:
    """Return one report as it is, and several as a list."""
    return msgspec.json.format(msgspec.json.encode(reports[0] if len(reports) == 1 else reports), indent=2) + b"\n"


def _show(reports: Sequence[Report], json: Path | None) -> None:
    """Print these reports side by side, or as JSON."""
    if json == Path("-"):
        print(_json(reports).decode(), end="")
        return
    from rich.console import Console  # noqa: PLC0415  only where a table is shown

    if is_terminal(sys.stderr):
        print(file=sys.stderr)
    width = None if is_terminal(sys.stdout) else max(140, 58 + 44 * len(reports))
    Console(width=width).print(table(reports))
