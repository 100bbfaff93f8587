"""`holdfast demo`: kill a worker in mid-sentence and watch the sentence go on. Must never touch another cluster."""

from __future__ import annotations

import asyncio
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
from holdfast.frontend.config import FrontendConfig
from holdfast.frontend.https import own_client_context
from holdfast.local.backoff import RestartPolicy
from holdfast.local.cluster import ClusterPlan, LocalCluster
from holdfast.local.config import ServeConfig
from holdfast.local.demonstration import Demonstration, Question, Round, first_model
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
    temperature: float
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

    Starts a frontend and two workers of their own, streams an answer and kills the worker that serves it with
    SIGKILL at a random moment. Shows the gap in milliseconds, asks the same question again undisturbed, and says
    whether the texts are equal. Exits with 1 if they are not.
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
            tls = own_client_context(flags.load(FrontendConfig, "frontend").config.https)
            cluster = LocalCluster(plan, discovery, random.Random(seed), os.environ, relay, tls=tls)
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
    engine = flags.load(WorkerConfig, "worker").config.engine
    async with cluster.running():
        with StartProgress() as progress:
            await cluster.until_ready(180.0, progress)
        started = time.monotonic() - begin
        model = await first_model(cluster.base_urls[0], cluster.tls)
        report = Report(engine, model, seed, own["temperature"], started, [])
        demonstration = Demonstration(cluster, random.Random(seed))
        for number in range(own["rounds"]):
            question = Question(own["prompt"], own["max_tokens"], own["temperature"], seed + number, model)
            if own["rounds"] == 1 and not own["json"]:
                report.rounds.append(await _shown(demonstration, question))
            else:
                report.rounds.append(await demonstration.round(question))
                _progress_line(number + 1, own["rounds"], report.rounds[-1])
    _summarise(report)
    if not own["json"]:
        _print_report(report)
    return report


def _stop_on_sigterm() -> None:
    """End like on Ctrl-C, so that the cluster is stopped in order and its directory removed."""
    task = asyncio.current_task()
    assert task is not None
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)


async def _shown(demonstration: Demonstration, question: Question) -> Round:
    """Run one round and write the answer to the terminal as it comes."""
    colour = "bold"

    def on_piece(text: str) -> None:
        sys.stdout.write(paint(text, colour))
        sys.stdout.flush()

    def on_kill(slot: str, pid: int) -> None:
        nonlocal colour
        colour = "green"
        sys.stdout.write(paint(f" ⟨kill -9 {slot}, pid {pid}⟩", "red"))
        sys.stdout.flush()

    def on_answered() -> None:
        print(f"\n\n{paint('(the same question again, undisturbed, to compare)', 'dim')}\n", flush=True)

    print(f"\n{paint(question.prompt, 'cyan')}\n", flush=True)
    return await demonstration.round(question, on_piece, on_kill, on_answered)


def _summarise(report: Report) -> None:
    gaps = sorted(one.gap_ms for one in report.rounds)
    report.exact = sum(one.equal and one.usage_equal for one in report.rounds)
    report.gap_ms_median = statistics.median(gaps)
    report.gap_ms_p99 = gaps[math.ceil(0.99 * len(gaps)) - 1]
    report.gap_ms_max = gaps[-1]


def _progress_line(number: int, total: int, one: Round) -> None:
    verdict = paint("equal", "green", sys.stderr) if one.equal else paint("DIFFERENT", "red", sys.stderr)
    print(
        f"{number:>4}/{total}  {one.killed} killed after {one.after_pieces} of {one.pieces} pieces, "
        f"gap {one.gap_ms:.0f} ms, text {verdict}",
        file=sys.stderr,
        flush=True,
    )


def _print_report(report: Report) -> None:
    one = report.rounds[-1]
    same_text = all(each.equal for each in report.rounds)
    same_usage = all(each.usage_equal for each in report.rounds)
    sampling = f"temperature {report.temperature:g}, seeded" if report.temperature else "greedy"
    rows = [("engine", f"{report.engine}, model {report.model}, {sampling}; ready after {report.start_seconds:.1f} s")]
    if len(report.rounds) == 1:
        rows += [
            ("killed", f"{one.killed} (pid {one.killed_pid}), SIGKILL after {one.after_pieces} of {one.pieces} pieces"),
            ("gap", f"{one.gap_ms:.0f} ms; usually {one.usual_gap_ms:.0f} ms between two pieces"),
            ("text", f"{_verdict(same_text)}, sha256 {one.sha256[:16]}…"),
            ("usage", f"{_verdict(same_usage)}: {one.prompt_tokens} + {one.completion_tokens} tokens"),
        ]
    else:
        gaps = f"median {report.gap_ms_median:.0f} ms, p99 {report.gap_ms_p99:.0f} ms, max {report.gap_ms_max:.0f} ms"
        rows += [
            ("kills", f"{len(report.rounds)}, exact {report.exact}"),
            ("gap", gaps),
            ("texts", _verdict(same_text)),
            ("usage", _verdict(same_usage)),
        ]
    rows.append(("seed", f"{report.seed} (repeat with --seed)"))
    print(table(rows), flush=True)


def _verdict(same: bool) -> str:
    return paint("equal to the undisturbed run", "green") if same else paint("DIFFERENT", "red")
