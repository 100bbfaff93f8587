"""`holdfast sim`: run simulated universes, replay one, make a failing one small.

Must never decide what is right or wrong in a universe; `sim` does.
"""

from __future__ import annotations

import os
import shutil
import sys
import time
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Annotated, Any, get_args

import msgspec
import typer

from holdfast.base.errors import InvalidRequest
from holdfast.cli.app import parameter, takes_settings
from holdfast.cli.options import Flags, Process
from holdfast.cli.show import is_terminal, paint, table
from holdfast.sim.campaign import run_campaign
from holdfast.sim.faults import kinds
from holdfast.sim.guard import ensure_hash_seed
from holdfast.sim.plan import Shape
from holdfast.sim.profiles import Profile
from holdfast.sim.script import Run, Script, load, run_script, save, script_of, written
from holdfast.sim.shrink import SECONDS, Shrinker
from holdfast.sim.story import involved, tell
from holdfast.sim.tally import Result, Tally, lines, tally

EXIT_BROKEN = 1
EXIT_DIFFERS = 3
EXIT_INTERRUPTED = 130
_NO_SETTINGS = Process((), lambda _: 0)
_LINE_EVERY = 10.0
"""Seconds between two lines about progress where nobody watches."""


def _option(name: str, kind: Any, default: Any, text: str) -> Any:
    return parameter(name, Annotated[kind, typer.Option(f"--{name.replace('_', '-')}", help=text)], default)


@takes_settings(
    _NO_SETTINGS,
    _option("seed", int | None, None, "Run this one universe and tell what happened."),
    _option("script", Path | None, None, "Run a universe from a file that --shrink or --out has written."),
    _option("seeds", str, "", "Run many universes: A..B, both included."),
    _option("count", int | None, None, "Run so many universes, from seed 0 or from the one given with --seed."),
    _option("jobs", int, 1, "Processes that run many universes; 0: one for each core."),
    _option("limit", float | None, None, "Seconds after which no more universes are begun."),
    _option("at_least", int, 0, "Fail when fewer universes than this count."),
    _option(
        "log",
        Path | None,
        None,
        "Keep results in this JSON-lines file; go on from what it has (of the same code and size).",
    ),
    _option("shrink", bool, False, "Make a failing universe small, and tell its story."),
    _option("shrink_limit", float, SECONDS, "Seconds that shrinking may take."),
    _option("out", Path | None, None, "Write the script of the universe (shrunk with --shrink) to this file."),
    _option("verify", bool, False, "Run a universe twice and compare; many: every one of them."),
    _option("story", bool, False, "Tell everything, not only what a violation is about."),
    _option("logs", bool, False, "Let the log lines of the simulated processes through (one universe)."),
    _option("json", bool, False, "Print JSON instead of text."),
    _option("workers", int, Shape().workers, "Workers of each universe."),
    _option("frontends", int, Shape().frontends, "Frontends of each universe."),
    _option("requests", int, Shape().requests, "Requests of each universe, at least."),
    _option("faults", int, Shape().faults, "Faults of each universe, at least."),
    _option("profile", str, "", f"What goes wrong: {', '.join(get_args(Profile))}. Left out: the seed chooses."),
    _option("only", str, "", f"Kinds of faults to draw from, separated by commas: {', '.join(kinds())}."),
)
def command(_: Flags, **own: Any) -> int:
    """Run whole clusters in simulation: production code on virtual hosts, clocks and networks, with faults.

    Everything that is left to chance follows from a seed: `holdfast sim --seed 17` is the same universe, callback for
    callback, each time. After each universe oracles look whether every promise of docs/guarantees.md was kept. No
    process is started, no port is opened, nothing waits: a universe takes a fraction of a second.

    One universe is told as a story of requests, workers and faults; many are summed up in a table. When one fails,
    `holdfast sim --seed N --shrink --out story.json` makes it small, and `holdfast sim --script story.json` replays
    it. A seed means the same only with the same code and the same size (--workers and so on); a script lives longer.

    Exits with 0 when all promises were kept, with 1 when one was broken (or when a campaign of 2,000 and more
    universes never came across something that it must), with 3 when --verify found two runs that differ. Ctrl-C ends
    a campaign early and sums up what there is.
    """
    ensure_hash_seed()
    shape = _shape(own)
    if own["script"] is not None:
        return _one(load(own["script"]), own)
    if own["seeds"] or own["count"] is not None:
        return _many(_seeds(own), shape, own)
    if own["seed"] is None:
        raise InvalidRequest("Which universe? --seed N for one, --seeds A..B or --count N for many, or --script FILE.")
    return _one(script_of(own["seed"], shape), own)


def _shape(own: dict[str, Any]) -> Shape:
    only = tuple(word.strip() for word in own["only"].split(",") if word.strip())
    unknown = [word for word in only if word not in kinds()]
    if unknown:
        raise InvalidRequest(f"There is no fault {unknown[0]!r}. There are: {', '.join(kinds())}.")
    if own["profile"] and own["profile"] not in get_args(Profile):
        raise InvalidRequest(f"There is no profile {own['profile']!r}; one of {', '.join(get_args(Profile))}.")
    sizes = {name: own[name] for name in ("workers", "frontends", "requests", "faults")}
    if min(sizes["workers"], sizes["frontends"]) < 1 or min(sizes.values()) < 0:
        raise InvalidRequest("A universe has at least one worker and one frontend, and no negative numbers.")
    return Shape(**sizes, profile=own["profile"] or None, only=only)


def _seeds(own: dict[str, Any]) -> range:
    if not own["seeds"]:
        first = own["seed"] or 0
        return range(first, first + own["count"])
    first, dots, last = own["seeds"].partition("..")
    if not (dots and first.isdigit() and last.isdigit() and int(first) <= int(last)):
        raise InvalidRequest(f"--seeds is A..B with A not over B, not {own['seeds']!r}.")
    found = range(int(first), int(last) + 1)
    return found if own["count"] is None else found[: own["count"]]


# -- one -----------------------------------------------------------------------------------------------------


def _one(script: Script, own: dict[str, Any]) -> int:
    run = run_script(script, logs=own["logs"])
    differs = own["verify"] and run_script(script).digest != run.digest
    if own["shrink"] and run.violations:
        shrinker = Shrinker(script, seconds=own["shrink_limit"], tell=lambda text: print(text, file=sys.stderr))
        run = shrinker.shrink()
    if own["out"] is not None:
        save(written(run), own["out"])
    if own["json"]:
        print(msgspec.json.encode(_facts(run, differs)).decode())
    else:
        _tell(run, own, differs)
    return EXIT_DIFFERS if differs else EXIT_BROKEN if run.violations else 0


def _facts(run: Run, differs: bool) -> dict[str, Any]:
    script = written(run)
    return {
        "seed": script.seed,
        "digest": run.digest,
        "repeats": not differs,
        "callbacks": run.callbacks,
        "broken": script.broken,
        "seen": dict(sorted(run.history.seen.items())),
    }


def _tell(run: Run, own: dict[str, Any], differs: bool) -> None:
    small = own["shrink"] or own["story"]
    if small or run.violations:
        only = () if small else involved(run.violations)
        print(tell(run.history, run.script.plan, run.violations, only=only))
    else:
        fired = ", ".join(f"{fault.kind}{' ' if fault.target else ''}{fault.target}" for fault in run.history.fired)
        print(f"profile {run.script.plan.profile}, {len(run.history.calls)} requests, faults: {fired or 'none'}")
        print(paint("every promise was kept", "green") + " (--story tells what happened)")
    print(f"digest {run.digest}, {run.callbacks:,} callbacks")
    if differs:
        print(paint("the same universe ran differently the second time", "red"))
    if own["out"] is not None:
        print(f"replay it: holdfast sim --script {own['out']}")
    elif run.violations and not own["shrink"]:
        print("make it small: add --shrink --out story.json")


# -- many ----------------------------------------------------------------------------------------------------


def _many(seeds: range, shape: Shape, own: dict[str, Any]) -> int:
    began = time.monotonic()
    jobs = own["jobs"] or os.cpu_count() or 1
    results, stopped = _campaign(seeds, shape, jobs, own)
    differing = _differing(results, shape, jobs) if own["verify"] and not stopped else []
    total = tally(results)
    if own["json"]:
        facts = {**msgspec.to_builtins(total), "missing": total.missing, "differing": differing}
        print(msgspec.json.encode(facts).decode())
    else:
        _sum_up(total, results, differing, time.monotonic() - began)
    if stopped:
        return stopped
    if total.counted < own["at_least"]:
        print(f"only {total.counted:,} universes count, {own['at_least']:,} were asked for", file=sys.stderr)
        return EXIT_BROKEN
    return EXIT_DIFFERS if differing else 0 if total.ok else EXIT_BROKEN


def _campaign(seeds: range, shape: Shape, jobs: int, own: dict[str, Any]) -> tuple[list[Result], int]:
    """Return what there is in the end, and the exit code if somebody or something stopped it."""
    began, limit = time.monotonic(), own["limit"]
    came: list[Result] = []
    with Progress(len(seeds)) as progress:

        def on_result(result: Result) -> None:
            came.append(result)
            progress(result)

        try:
            results = run_campaign(
                seeds,
                jobs=jobs,
                shape=shape,
                log=own["log"],
                on_result=on_result,
                until=lambda: limit is not None and time.monotonic() - began >= limit,
            )
        except KeyboardInterrupt:
            return came, EXIT_INTERRUPTED
        except BrokenProcessPool as error:
            print(f"holdfast: {error}", file=sys.stderr)
            return came, EXIT_BROKEN
    return results, 0


def _differing(results: list[Result], shape: Shape, jobs: int) -> list[int]:
    """Return the seeds whose universe runs differently the second time."""
    first = {result.seed: result.digest for result in results}
    again = run_campaign(first, jobs=jobs, shape=shape)
    return [result.seed for result in again if result.digest != first[result.seed]]


def _sum_up(total: Tally, results: list[Result], differing: list[int], seconds: float) -> None:
    width = shutil.get_terminal_size((140, 24)).columns if is_terminal(sys.stdout) else 0
    print(table(_wrapped(lines(total, seconds), width)))
    for result in [result for result in results if result.broken][:10]:
        for broken in result.broken[:2]:
            print(paint(f"seed {result.seed}: {broken.promise}: {broken.what} ({broken.evidence})", "red"))
    if differing:
        print(paint(f"ran differently the second time: {' '.join(map(str, differing[:20]))}", "red"))
    if total.failing:
        print(f"look at one: holdfast sim --seed {min(total.failing)} --shrink --out story.json")


def _wrapped(rows: list[tuple[str, str]], width: int) -> list[tuple[str, str]]:
    """Break long values at commas, so that the columns stay columns on a terminal."""
    if not width:
        return rows
    left = max(len(name) for name, _ in rows) + 2
    found: list[tuple[str, str]] = []
    for name, value in rows:
        line = ""
        for part in value.split(", "):
            if line and left + len(line) + len(part) + 2 > width:
                found.append((name, line + ","))
                name, line = "", part  # noqa: PLW2901  the name stands in the first line
            else:
                line = f"{line}, {part}" if line else part
        found.append((name, line))
    return found


class Progress:
    """How far a campaign is: a bar where a person looks, a line now and then elsewhere."""

    def __init__(self, total: int):
        self._total, self._done, self._failing = total, 0, 0
        self._next_line = time.monotonic() + _LINE_EVERY
        self._bar: Any = None
        self._task: Any = None

    def __enter__(self) -> Progress:
        if is_terminal(sys.stderr):
            from rich.console import Console  # noqa: PLC0415  only where a person looks
            from rich.progress import (  # noqa: PLC0415
                BarColumn,
                MofNCompleteColumn,
                Progress,
                TextColumn,
                TimeRemainingColumn,
            )

            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            self._bar = Progress(*columns, console=Console(file=sys.stderr), transient=True)
            self._bar.start()
            self._task = self._bar.add_task("universes", total=self._total)
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def __call__(self, result: Result) -> None:
        """One more is over."""
        self._done += 1
        self._failing += bool(result.broken)
        said = f"universes, {self._failing} failing" if self._failing else "universes"
        if self._bar is not None:
            self._bar.update(self._task, advance=1, description=said)
        elif time.monotonic() >= self._next_line:
            self._next_line = time.monotonic() + _LINE_EVERY
            print(f"{self._done:,} of {self._total:,} {said}", file=sys.stderr, flush=True)
