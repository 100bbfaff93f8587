"""`holdfast demo`: kill a worker in mid-sentence and watch the sentence go on. Must never touch another cluster."""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
import random
import secrets
import signal
import statistics
import sys
import tempfile
import time
from collections import deque
from typing import Annotated, Any

import msgspec
import typer

from holdfast.base.errors import HoldfastError
from holdfast.cli.app import parameter, takes_settings
from holdfast.cli.catalogue import ENGINES, section
from holdfast.cli.options import Flags, Process, passed_on
from holdfast.cli.show import Relay, StartProgress, paint, table
from holdfast.local.backoff import RestartPolicy
from holdfast.local.cluster import ClusterPlan, LocalCluster
from holdfast.local.config import ServeConfig
from holdfast.local.demonstration import Demonstration, Question, Round, Transcript, first_model
from holdfast.local.ports import free_port
from holdfast.runtime.discovery.factory import open_discovery
from holdfast.telemetry.logs import LineWriter, LogConfig, setup_logging
from holdfast.worker.config import WorkerConfig

PROMPT = "Tell me the story of a lighthouse keeper who has to keep the light burning through a storm."
KEPT_LINES = 200
EXIT_INTERRUPTED = 130
_OWN = frozenset({"file-kv", "discovery-backend"})
_SECTIONS = Process(("serve", "worker", *ENGINES, "log"), lambda _: 0)
_MOCK_STEP = "mock-step-ms"
_MOCK_STEP_MS = "10"
"""Without it the mock would answer faster than an eye can follow."""


class Report(msgspec.Struct):
    """What a demonstration found; printed by ``--json``. Times in seconds unless the name says otherwise."""

    engine: str
    model: str
    seed: int
    start_seconds: float
    rounds: list[Round]
    exact: int = 0
    gap_ms_median: float = 0.0
    gap_ms_p99: float = 0.0
    gap_ms_max: float = 0.0


def _option(name: str, kind: type, default: Any, text: str) -> Any:
    return parameter(name, Annotated[kind, typer.Option("--" + name.replace("_", "-"), help=text)], default)


@takes_settings(
    _SECTIONS,
    _option("rounds", int, 1, "How many kills."),
    _option("prompt", str, PROMPT, "What to ask."),
    _option("max_tokens", int, 160, "Length of the answer in tokens."),
    _option("temperature", float, 0.8, "0 is greedy; sampling is seeded, so it continues exactly too."),
    _option("seed", int, 0, "Of the moments of the kills and of the sampling; 0 draws one."),
    _option("json", bool, False, "Print the report as JSON."),
)
def command(flags: Flags, **own: Any) -> int:
    """Kill a worker in mid-sentence and watch the sentence go on, token for token.

    Starts a frontend and two workers of their own, streams an answer undisturbed, then again while the worker
    that serves it is killed with SIGKILL at a random moment. Shows the gap in milliseconds and whether the text
    equals the undisturbed run. Exits with 1 if it does not.
    """
    seed = own["seed"] or secrets.randbelow(2**31 - 1) + 1
    kept: deque[str] = deque(maxlen=KEPT_LINES)
    writer = LineWriter(sys.stderr)
    verbose = "log-level" in flags.values
    log = flags.load(LogConfig, "log").config
    setup_logging(log if verbose else LogConfig(log="off"), "", writer)
    relay = Relay(writer, raw=log.as_json) if verbose else lambda slot, line: kept.append(f"{slot} | {line}")
    try:
        with tempfile.TemporaryDirectory(prefix="holdfast-demo-") as directory:
            plan = _plan(flags, directory, own["rounds"])
            discovery = open_discovery("file", root=directory)
            cluster = LocalCluster(plan, discovery, random.Random(seed), os.environ, relay)
            report = asyncio.run(_demonstrate(cluster, flags, own, seed))
    except (KeyboardInterrupt, asyncio.CancelledError):
        return EXIT_INTERRUPTED
    except (HoldfastError, TimeoutError) as error:
        print("\n".join(kept), file=sys.stderr)
        print(f"holdfast: {getattr(error, 'message', 'the answer took too long')}", file=sys.stderr)
        return 1
    finally:
        writer.close()
    if own["json"]:
        print(msgspec.json.format(msgspec.json.encode(report), indent=2).decode())
    return 0 if report.exact == len(report.rounds) else 1


def _plan(flags: Flags, directory: str, rounds: int) -> ClusterPlan:
    serve = flags.load(ServeConfig, "serve").config
    extra = () if _MOCK_STEP in flags.values else (f"--{_MOCK_STEP}={_MOCK_STEP_MS}",)
    parts = [section(name) for name in ("worker", *ENGINES, "log")]
    return ClusterPlan(
        http_ports=(free_port(),),
        workers=max(2, serve.workers),
        worker_flags=(*passed_on(flags, parts, _OWN), *extra),
        env={"DYN_DISCOVERY_BACKEND": "file", "DYN_FILE_KV": directory},
        restart=RestartPolicy(intensity=rounds + serve.restart_intensity),
        stop_grace=5.0,
    )


async def _demonstrate(cluster: LocalCluster, flags: Flags, own: dict[str, Any], seed: int) -> Report:
    _stop_on_sigterm()
    begin = time.monotonic()
    loud = not own["json"]
    engine = flags.load(WorkerConfig, "worker").config.engine
    async with cluster.running():
        with StartProgress() as progress:
            await cluster.until_ready(180.0, progress)
        started = time.monotonic() - begin
        model = await first_model(cluster.base_urls[0])
        question = Question(own["prompt"], own["max_tokens"], own["temperature"], seed, model)
        demonstration = Demonstration(cluster, question, random.Random(seed))
        expected = await _undisturbed(demonstration, loud)
        rounds = []
        for number in range(own["rounds"]):
            rounds.append(await _disturbed(demonstration, expected, loud and own["rounds"] == 1))
            if own["rounds"] > 1:
                _progress_line(number + 1, own["rounds"], rounds[-1])
                await demonstration.recovered()
    report = _summary(Report(engine, model, seed, started, rounds))
    if loud:
        _print_report(report, expected)
    return report


def _stop_on_sigterm() -> None:
    """End like on Ctrl-C, so that the cluster is stopped in order and its directory removed."""
    task = asyncio.current_task()
    assert task is not None
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)


async def _undisturbed(demonstration: Demonstration, loud: bool) -> Transcript:
    with _waiting("undisturbed run …") if loud else contextlib.nullcontext():
        expected = await demonstration.undisturbed()
    if loud:
        seconds = expected.pieces[-1].at - expected.pieces[0].at if expected.pieces else 0.0
        print(f"Undisturbed run: {len(expected.pieces)} pieces of text in {seconds:.1f} s.", flush=True)
    return expected


async def _disturbed(demonstration: Demonstration, expected: Transcript, show: bool) -> Round:
    colour = "bold"

    def on_piece(text: str) -> None:
        if show:
            sys.stdout.write(paint(text, colour))
            sys.stdout.flush()

    def on_kill(slot: str, pid: int) -> None:
        nonlocal colour
        colour = "green"
        if show:
            sys.stdout.write(paint(f" ⟨kill -9 {slot}, pid {pid}⟩", "red"))
            sys.stdout.flush()

    if show:
        print("The same question again; its worker will be killed:\n", flush=True)
    result = await demonstration.disturbed(expected, on_piece, on_kill)
    if show:
        print("\n")
    return result


def _summary(report: Report) -> Report:
    gaps = sorted(one.gap_ms for one in report.rounds)
    report.exact = sum(one.equal and one.usage_equal for one in report.rounds)
    report.gap_ms_median = statistics.median(gaps)
    report.gap_ms_p99 = gaps[math.ceil(0.99 * len(gaps)) - 1]
    report.gap_ms_max = gaps[-1]
    return report


def _progress_line(number: int, total: int, one: Round) -> None:
    verdict = paint("equal", "green", sys.stderr) if one.equal else paint("DIFFERENT", "red", sys.stderr)
    print(
        f"{number:>4}/{total}  {one.killed} killed after {one.after_pieces} of {one.pieces} pieces, "
        f"gap {one.gap_ms:.0f} ms, text {verdict}",
        file=sys.stderr,
        flush=True,
    )


def _print_report(report: Report, expected: Transcript) -> None:
    one = report.rounds[-1]
    counts = f"{expected.usage.get('prompt_tokens')} prompt tokens, {expected.usage.get('completion_tokens')} generated"
    same_text = all(one.equal for one in report.rounds)
    same_usage = all(one.usage_equal for one in report.rounds)
    rows = [
        ("engine", f"{report.engine}, model {report.model}, ready after {report.start_seconds:.1f} s"),
        ("text", f"{_verdict(same_text)}, sha256 {one.expected_sha256[:16]}…"),
        ("usage", f"{_verdict(same_usage)}: {counts}"),
    ]
    if len(report.rounds) == 1:
        rows[1:1] = [
            ("killed", f"{one.killed} (pid {one.killed_pid}), SIGKILL after {one.after_pieces} of {one.pieces} pieces"),
            ("gap", f"{one.gap_ms:.0f} ms; usually {one.usual_gap_ms:.0f} ms between two pieces"),
        ]
    else:
        gaps = f"median {report.gap_ms_median:.0f} ms, p99 {report.gap_ms_p99:.0f} ms, max {report.gap_ms_max:.0f} ms"
        rows[1:1] = [("kills", f"{len(report.rounds)}, exact {report.exact}"), ("gap", gaps)]
    rows.append(("seed", f"{report.seed} (repeat with --seed)"))
    print(table(rows), flush=True)


def _verdict(same: bool) -> str:
    return paint("equal to the undisturbed run", "green") if same else paint("DIFFERENT", "red")


@contextlib.contextmanager
def _waiting(text: str) -> Any:
    """Show a spinner on a terminal."""
    if not sys.stderr.isatty():
        yield
        return
    from rich.console import Console  # noqa: PLC0415  only where a person looks

    with Console(file=sys.stderr).status(text):
        yield
