"""Runs many universes on many cores, and can go on where it was broken off.

Each universe is judged in the process that ran it; only its `Result` comes back, and is written to a file of JSON
lines before it counts. A universe that raises is a violation like any other, so that one bad seed never ends a night.

Must never let one universe see another's state: processes live for many universes, but each universe is built anew.
"""

from __future__ import annotations

import contextlib
import faulthandler
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import msgspec

from holdfast.base.lineage import OWNER_PID, die_with_owner
from holdfast.sim.plan import Shape
from holdfast.sim.tally import Broken, Result, result_of
from holdfast.sim.universe import run_universe

STUCK_SECONDS = 300.0
"""Real seconds after which a universe is taken for stuck; its process then ends with a stack trace."""
_AHEAD = 3
"""Universes handed out per process, so that none waits for work."""


def run_one(seed: int, shape: Shape | None = None) -> Result:
    """Run one universe and return its result; what it raises becomes a violation."""
    began = time.process_time()
    try:
        outcome = run_universe(seed, shape)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # an Escape is no Exception, and just as much a finding
        broken = Broken("harness", type(error).__name__, str(error)[:500])
        return Result(seed=seed, cpu_seconds=time.process_time() - began, broken=[broken])
    return result_of(outcome, time.process_time() - began)


def run_campaign(
    seeds: Iterable[int],
    *,
    jobs: int = 1,
    shape: Shape | None = None,
    log: Path | None = None,
    on_result: Callable[[Result], None] = lambda _: None,
    until: Callable[[], bool] = lambda: False,
) -> list[Result]:
    """Run a universe for each seed; returns all results, those of an earlier run included, by seed.

    Args:
        seeds: which universes.
        jobs: processes that run them; 1: this one alone, whose strings must hash as in any other (`ensure_hash_seed`).
        shape: size of the universes; None: the default.
        log: file of JSON lines; what it has already is not run again, what comes is added.
        on_result: told about each result that comes.
        until: asked after each result; True ends the campaign early.

    Raises:
        BrokenProcessPool: a process died (killed, or stuck for `STUCK_SECONDS`). Results so far are in ``log``.
    """
    wanted = list(dict.fromkeys(seeds))
    results = {result.seed: result for result in (read_log(log) if log is not None else ())}
    missing = [seed for seed in wanted if seed not in results]
    source = (run_one(seed, shape) for seed in missing) if jobs == 1 else _spread(missing, jobs, shape)
    with _writer(log) as write, contextlib.closing(_iterate(source)) as coming:
        for result in coming:
            write(result)
            results[result.seed] = result
            on_result(result)
            if until():
                break
    return [results[seed] for seed in sorted(set(wanted)) if seed in results]


def _iterate(source: Iterable[Result]) -> Generator[Result, None, None]:
    yield from source


def _spread(seeds: list[int], jobs: int, shape: Shape | None) -> Iterator[Result]:
    """Yield results as they come from so many processes."""
    todo = iter(seeds)
    with _pinned_hashes():
        pool = ProcessPoolExecutor(
            jobs, multiprocessing.get_context("spawn"), initializer=_begin_process, initargs=(os.getpid(),)
        )
        running: set[Future[Result]] = set()
        try:
            while True:
                for seed in todo:
                    running.add(pool.submit(_in_process, seed, shape))
                    if len(running) >= jobs * _AHEAD:
                        break
                if not running:
                    return
                done, running = wait(running, return_when=FIRST_COMPLETED)
                for future in done:
                    yield future.result()
        except BrokenProcessPool as error:
            hint = "its stack is above if it was stuck; results so far are kept, run the same command to go on"
            raise BrokenProcessPool(f"a process of the campaign died: {hint}") from error
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


@contextlib.contextmanager
def _pinned_hashes() -> Generator[None, None, None]:
    """Let processes that are started here hash strings alike."""
    before = os.environ.get("PYTHONHASHSEED")
    os.environ["PYTHONHASHSEED"] = "0"
    try:
        yield
    finally:
        if before is None:
            del os.environ["PYTHONHASHSEED"]
        else:
            os.environ["PYTHONHASHSEED"] = before


def _begin_process(owner: int) -> None:
    """A campaign's process does not outlive the campaign, which alone decides what Ctrl-C means."""
    die_with_owner({OWNER_PID: str(owner)})
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _in_process(seed: int, shape: Shape | None) -> Result:
    faulthandler.dump_traceback_later(STUCK_SECONDS, exit=True)
    try:
        return run_one(seed, shape)
    finally:
        faulthandler.cancel_dump_traceback_later()


# -- the file of results -----------------------------------------------------------------------------------


def read_log(path: Path) -> list[Result]:
    """Return what an earlier run has done; a last line that was cut off is dropped."""
    results = []
    for line in path.read_bytes().splitlines() if path.exists() else ():
        try:
            results.append(msgspec.json.decode(line, type=Result))
        except msgspec.DecodeError:
            continue
    return results


@contextlib.contextmanager
def _writer(path: Path | None) -> Generator[Callable[[Result], None], None, None]:
    """Give a function that adds a result to the file, with the system before the next one begins."""
    if path is None:
        yield lambda _: None
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab") as file:
        if file.tell() and not path.read_bytes().endswith(b"\n"):
            file.write(b"\n")  # a line that was cut off stays a line of its own

        def write(result: Result) -> None:
            file.write(msgspec.json.encode(result) + b"\n")
            file.flush()

        yield write
