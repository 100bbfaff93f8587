"""`holdfast simulate`: what would happen if, on a virtual clock.

Must never decide what happens or what it means; `replay.whatif` and `replay.effects` do.
"""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import msgspec
import typer

from holdfast.base.errors import InvalidRequest
from holdfast.cli.app import parameter, takes_settings
from holdfast.cli.offline import EngineDefault, cluster_settings, ensure_repeatable, interruptible, variants
from holdfast.cli.options import Flags, Process
from holdfast.cli.show import is_terminal
from holdfast.replay.accounts import effects_table, timeline_table, totals_table
from holdfast.replay.arrivals import Arrivals
from holdfast.replay.effects import Account, account
from holdfast.replay.lanes import Window, comparison, drawing
from holdfast.replay.loads import MadeUp, MadeUpLoad, TraceLoad, read_lengths
from holdfast.replay.tables import table
from holdfast.replay.trace import TRACE_BLOCK, chosen
from holdfast.replay.troubles import FORM, listing, read_troubles, seconds_of
from holdfast.replay.whatif import Happened, Load, Scenario, what_if

_PROFILE: EngineDefault = "h100-qwen3-32b-tp2"
_WIDE = 140
_SETTINGS = Process(("frontend", "worker", "mock"), lambda _: 0)


def _option(name: str, kind: Any, default: Any, text: str) -> Any:
    return parameter(name, Annotated[kind, typer.Option(f"--{name.replace('_', '-')}", help=text)], default)


@takes_settings(
    _SETTINGS,
    _option("workers", int, 8, "Workers with a mock engine each."),
    _option("frontends", int, 1, "Frontends; clients take them in turn."),
    _option("profile", str, "", f"Speed and size of the engines (--mock-profile); {_PROFILE} when nothing is said."),
    _option("rate", float | None, None, "Requests a second, at random (Poisson); 20 when no load is named."),
    _option("concurrency", int | None, None, "Requests under way; alone, each comes when another one is over."),
    _option("duration", str, "60s", "For how long requests come; not for traces, which have --limit."),
    _option("input_length", str, "1024", "Tokens of the prompts: 1024, or 512-2048 for all in between."),
    _option("output_length", str, "200", "Tokens of the answers, likewise."),
    _option("trace", Path | None, None, "Take the requests of this trace instead (see holdfast replay)."),
    _option("speedup", float | None, None, "Divide the trace's time by this."),
    _option("limit", int | None, None, "Only the first so many requests of the trace."),
    _option("max_output", int | None, None, "Shorten longer answers of the trace to so many tokens."),
    _option("fault", list[str], [], f"What goes wrong, as often as wanted: {FORM}. --fault list shows the kinds."),
    _option("compare", str, "", "Run it once for each value of one setting: router-mode=round-robin,least-loaded."),
    _option("seed", int, 1, "Of everything that chance decides: the same seed gives the same result."),
    _option("title", str, "", "Name of this run."),
    _option("json", Path | None, None, "Write everything as JSON to this file; - for standard output, no tables."),
    _option("plot", Path | None, None, "Write a picture (SVG) to this file."),
    _option("window", str, "", "What the streams of the picture show: 25s-45s; around the faults when left out."),
)
def command(flags: Flags, **own: Any) -> int:
    """Show what clients would see when things go wrong, without a cluster.

    Runs the production code of frontends, routers and workers with simulated engines, network and discovery on a
    virtual clock: minutes pass in seconds, and the same seed gives the same result. Every setting of frontends and
    workers can be given, to see what it does. Prints a time line, what each fault did to the streams, and how much
    room was left. Exits with 1 when no request was answered.
    """
    if "list" in own["fault"]:
        print(f"Faults, as {FORM}:\n{listing()}")
        return 0
    ensure_repeatable()
    return interruptible(lambda: _simulate(flags, own))


def _simulate(flags: Flags, own: dict[str, Any]) -> int:
    window = _window(own["window"])
    began = time.process_time()
    runs = [(one, account(one, title)) for title, one in _run_all(flags, own)]
    spent = time.process_time() - began
    accounts = [found for _, found in runs]
    if own["plot"] is not None:
        picture = drawing(*runs[0], window) if len(runs) == 1 else comparison(accounts)
        own["plot"].write_text(picture, encoding="utf-8")
    _show(accounts, own["json"])
    requests = sum(found.report.requests for found in accounts)
    seconds = sum(found.report.seconds for found in accounts)
    print(
        f"({seconds:,.0f} s simulated in {spent:.1f} s of processor time, {requests / max(spent, 1e-3):,.0f} requests "
        "a second of it)",
        file=sys.stderr,
    )
    return 0 if any(found.report.ok for found in accounts) else 1


def _run_all(flags: Flags, own: dict[str, Any]) -> Sequence[tuple[str, Happened]]:
    cases = variants(flags, own, own["compare"])
    scenarios = [  # all are made before any runs: a mistake in the last one shows at once
        (title or own["title"] or "what if", _scenario(settings, mine)) for title, settings, mine in cases
    ]
    return [(title, what_if(scenario)) for title, scenario in scenarios]


def _scenario(flags: Flags, own: dict[str, Any]) -> Scenario:
    settings = cluster_settings(flags, own, _PROFILE)
    return Scenario(
        settings=settings,
        load=_load(own),
        troubles=read_troubles(own["fault"], settings.workers, settings.frontends),
        seed=own["seed"],
        watch=_Watch() if is_terminal(sys.stderr) else lambda _: None,
    )


def _load(own: dict[str, Any]) -> Load:
    lengths = [read_lengths(own[name], name.replace("_", "-")) for name in ("input_length", "output_length")]
    made_up = MadeUp(lengths[0], lengths[1], random.Random(f"{own['seed']}/load"))
    if own["trace"] is not None:
        arrivals = Arrivals(own["speedup"], own["rate"], own["concurrency"])
        return TraceLoad(lambda: chosen(own["trace"], TRACE_BLOCK, own["limit"], own["max_output"]), arrivals, made_up)
    for name in ("speedup", "limit", "max_output"):
        if own[name] is not None:
            raise InvalidRequest(f"--{name.replace('_', '-')} needs a --trace.")
    rate = 20.0 if own["rate"] is None and own["concurrency"] is None else own["rate"]
    return MadeUpLoad(made_up, _seconds(own["duration"], "duration"), rate, own["concurrency"])


def _seconds(text: str, flag: str) -> float:
    seconds = seconds_of(text)
    if not seconds:
        raise InvalidRequest(f"--{flag} {text}: expected a time, as in 90s or 2m.")
    return seconds


def _window(text: str) -> Window | None:
    if not text:
        return None
    begin, dash, end = text.partition("-")
    edges = seconds_of(begin), seconds_of(end)
    if not dash or edges[0] is None or edges[1] is None or edges[0] >= edges[1]:
        raise InvalidRequest(f"--window {text}: expected two times, as in 25s-45s.")
    return Window(edges[0], edges[1])


class _Watch:
    """Shows on a terminal how far it is, once a real second."""

    def __init__(self) -> None:
        self._shown = 0.0
        self._clock = time.monotonic  # taken before the simulation closes the way to it

    def __call__(self, seconds: float) -> None:
        now = self._clock()
        if now - self._shown >= 1.0:
            self._shown = now
            sys.stderr.write(f"\r{seconds:,.0f} s simulated ")
            sys.stderr.flush()


def _show(accounts: Sequence[Account], json: Path | None) -> None:
    text = msgspec.json.format(msgspec.json.encode({"runs": accounts}), indent=2) + b"\n"
    if json == Path("-"):
        sys.stdout.buffer.write(text)
        return
    if json is not None:
        json.write_bytes(text)
    from rich.console import Console  # noqa: PLC0415  only where tables are shown

    if is_terminal(sys.stderr):
        print(file=sys.stderr)
    width = None if is_terminal(sys.stdout) else max(_WIDE, 58 + 44 * len(accounts))
    console = Console(width=width)
    for found in accounts:
        heading = found.title if len(accounts) > 1 else ""
        console.print(*([f"[bold]{heading}[/bold]"] if heading else []), timeline_table(found), sep="\n")
        if found.effects:
            console.print(effects_table(found.effects))
    console.print(table([found.report for found in accounts]), totals_table(accounts))
