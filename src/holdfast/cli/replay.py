"""`holdfast replay`: send the requests of a trace to a cluster and report what came of them.

Must never decide what the figures are; `replay` does.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import random
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import msgspec
import typer

from holdfast.base.errors import InvalidRequest
from holdfast.cli.app import parameter, takes_settings
from holdfast.cli.options import Flags, Process
from holdfast.cli.show import is_terminal
from holdfast.replay.arrivals import Arrivals
from holdfast.replay.client import HttpDriver
from holdfast.replay.plot import picture
from holdfast.replay.prompts import FIRST_TOKEN, Prompts
from holdfast.replay.record import Recording
from holdfast.replay.report import Report, summarise
from holdfast.replay.run import REQUEST_SECONDS, replay, what_happened
from holdfast.replay.tables import table
from holdfast.replay.trace import TRACE_BLOCK, TraceRequest, read_trace

EXIT_INTERRUPTED = 130
_NO_SETTINGS = Process((), lambda _: 0)
_WATCH_SECONDS = 1.0


def _option(name: str, kind: Any, default: Any, text: str) -> Any:
    flag = name.replace("_", "-")
    names = f"--{flag}/--no-{flag}" if kind is bool else f"--{flag}"
    return parameter(name, Annotated[kind, typer.Option(names, help=text)], default)


@takes_settings(
    _NO_SETTINGS,
    parameter("trace", Annotated[Path, typer.Argument(help="Trace file, one JSON object a line.")], ...),
    _option("url", str, "", "Endpoint to send to, http(s)://host:port."),
    _option("speedup", float | None, None, "Divide the trace's time by this; 1 when no pace is given."),
    _option("rate", float | None, None, "Requests a second, at random (Poisson), instead of the time stamps."),
    _option("concurrency", int | None, None, "Requests under way; alone, the time stamps do not matter."),
    _option("limit", int | None, None, "Only the first so many requests."),
    _option("max_output", int | None, None, "Shorten longer answers to so many tokens."),
    _option("model", str, "", "Model to ask for; the first of the endpoint when left out."),
    _option("api_key", str, "", "Bearer token; the variable OPENAI_API_KEY when left out."),
    _option("ignore_eos", bool, True, "Ask for answers of exactly the recorded length (vLLM's ignore_eos)."),
    _option("trace_block", int, TRACE_BLOCK, "Tokens for which one hash id of the trace stands."),
    _option("first_token", int, FIRST_TOKEN, "Prompts are made of this token id and the 255 after it."),
    _option("salt", str, "", "Another text makes other prompts of the same trace, for a cold cache."),
    _option("seed", int, 1, "Of the random arrivals."),
    _option("request_timeout", float, REQUEST_SECONDS, "Seconds that one request may take."),
    _option("title", str, "", "Name of this run in the report."),
    _option("json", Path | None, None, "Write the report as JSON to this file; - for standard output, no table."),
    _option("plot", Path | None, None, "Write a picture (SVG) of the run to this file."),
)
def command(_: Flags, **own: Any) -> int:
    """Send the requests of a trace to a running cluster, and report what came of them.

    The trace has one JSON object a line: timestamp (ms), input_length, output_length, hash_ids. Prompts are made from
    the hash ids, so that equal ids are equal tokens and prefix caches find what they found when it was recorded.
    Requests go out at their time stamps (--speedup), at a random --rate, or --concurrency at once; answers are
    streamed. Shows latencies, throughput, cache hits, and how evenly the workers were used. Ctrl-C ends it early and
    reports what there is. Exits with 1 when no request was answered.
    """
    if not own["url"]:
        raise InvalidRequest("Say where the requests go: --url http://host:port.")
    arrivals = Arrivals(own["speedup"], own["rate"], own["concurrency"])
    recording, interrupted = _run(own, arrivals)
    report = summarise(recording, own["title"] or own["url"], arrivals.described)
    _show(report, own["json"], own["plot"])
    if interrupted:
        return EXIT_INTERRUPTED
    return 0 if report.ok else 1


def _run(own: dict[str, Any], arrivals: Arrivals) -> tuple[Recording, bool]:
    import uvloop  # noqa: PLC0415  only where something is sent

    kept: list[Recording] = []
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(_online(own, arrivals, kept))
    except (KeyboardInterrupt, asyncio.CancelledError):
        if not kept:
            raise
        return kept[0], True
    except ExceptionGroup as group:
        raise what_happened(group) from None
    return kept[0], False


async def _online(own: dict[str, Any], arrivals: Arrivals, kept: list[Recording]) -> None:
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
                _chosen(own),
                driver,
                arrivals,
                random.Random(own["seed"]),
                recording=recording,
                patience=own["request_timeout"],
            )
            watch.cancel()
    finally:
        await driver.close()


def _chosen(own: dict[str, Any]) -> Iterator[TraceRequest]:
    """Yield the requests that are to be sent, shortened where that is wanted."""
    longest = own["max_output"]
    for request in itertools.islice(read_trace(own["trace"], own["trace_block"]), own["limit"]):
        if longest is not None and request.output_length > longest:
            yield msgspec.structs.replace(request, output_length=longest)
        else:
            yield request


async def _watch(recording: Recording) -> None:
    """Show how far it is, where somebody looks."""
    while is_terminal(sys.stderr):
        sent, under_way = len(recording.records), recording.in_flight
        sys.stderr.write(f"\r{sent:,} sent, {under_way:,} under way, {sent - under_way:,} over ")
        sys.stderr.flush()
        await asyncio.sleep(_WATCH_SECONDS)


def _show(report: Report, json: Path | None, plot: Path | None) -> None:
    text = msgspec.json.format(msgspec.json.encode(report), indent=2)
    if plot is not None:
        plot.write_text(picture(report), encoding="utf-8")
    if json == Path("-"):
        print(text.decode())
        return
    if json is not None:
        json.write_bytes(text + b"\n")
    from rich.console import Console  # noqa: PLC0415  only where a table is shown

    if is_terminal(sys.stderr):
        print(file=sys.stderr)
    width = None if is_terminal(sys.stdout) else 140
    Console(width=width).print(table([report]))
