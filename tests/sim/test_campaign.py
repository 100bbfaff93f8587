"""Campaigns: counted, summed up, spread over processes, resumed, and failing for what never happened."""

from __future__ import annotations

import multiprocessing
import os
import signal
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import pytest

from holdfast.requests.attempt import Attempt
from holdfast.sim.campaign import read_log, run_campaign, run_one
from holdfast.sim.plan import Shape
from holdfast.sim.tally import ENOUGH, RARELY, SOMETIMES, Broken, Result, lines, tally

SEEDS = range(40, 46)


def test_a_result_says_what_became_of_a_universe() -> None:
    result = run_one(3)
    assert result.broken == []
    assert result.requests >= 20
    assert result.tokens > 50
    assert result.callbacks > 1000
    assert result.virtual_seconds > 5
    assert result.seen["ended done"] > 10


def test_a_campaign_goes_on_where_it_was_broken_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = tmp_path / "log.jsonl"
    told: list[int] = []
    first = run_campaign(SEEDS, log=log, on_result=lambda r: told.append(r.seed), until=lambda: len(told) == 2)
    assert [r.seed for r in first] == told == [40, 41]
    log.write_bytes(log.read_bytes() + b'{"seed": 42, "coun')  # the machine was switched off in the middle of a line
    monkeypatch.setattr("holdfast.sim.campaign.run_one", lambda seed, shape: told.append(-seed) or Result(seed=seed))
    rest = run_campaign(SEEDS, log=log)
    assert [r.seed for r in rest] == list(SEEDS)
    assert rest[:2] == first
    assert told[2:] == [-42, -43, -44, -45]
    assert {r.seed for r in read_log(log)} == set(SEEDS)


def test_processes_run_the_same_universes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONHASHSEED", "7")
    spread = run_campaign(SEEDS[:4], jobs=2)
    assert [r.seed for r in spread] == list(SEEDS[:4])
    assert [(r.digest, r.seen, r.broken) for r in spread] == [
        (r.digest, r.seen, r.broken) for r in run_campaign(SEEDS[:4])
    ]
    assert os.environ["PYTHONHASHSEED"] == "7", "only the processes got another one"


def test_a_process_that_dies_ends_the_campaign_and_keeps_what_there_is(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"

    def kill_them(_: Result) -> None:
        for child in multiprocessing.active_children():
            assert child.pid is not None
            os.kill(child.pid, signal.SIGKILL)

    with pytest.raises(BrokenProcessPool, match="run the same command to go on"):
        run_campaign(SEEDS, jobs=2, log=log, on_result=kill_them)
    assert 1 <= len(read_log(log)) < len(SEEDS)


def test_what_a_universe_raises_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    def planted(self: Attempt) -> None:
        os.urandom(4)

    monkeypatch.setattr(Attempt, "start", planted)
    result = run_one(0)
    assert [b.promise for b in result.broken] == ["harness"]
    assert "os.urandom" in result.broken[0].evidence
    assert tally([result]).failing == [0]


def test_big_campaigns_fail_for_what_never_happened() -> None:
    whole = Result(seed=0, counted=True, seen=dict.fromkeys(SOMETIMES, 1))
    dull = Result(seed=1, counted=True)
    most = [dull] * (ENOUGH - 1)
    assert tally([whole, *most]).ok
    assert tally([whole, *most]).missing == RARELY
    assert tally([dull, *most]).overdue == SOMETIMES
    assert tally(most).ok
    assert not tally([dull, *most]).ok
    small = tally([Result(seed=n) for n in range(ENOUGH)])
    assert small.ok, "universes that are too small to count do not count"


def test_the_summary_is_readable() -> None:
    broken = Result(seed=17, broken=[Broken("P4", "something was not given back", "name=frontend-0")])
    shown = dict(lines(tally([run_one(1, Shape(only=("crash",))), broken]), wall_seconds=2.0))
    assert shown["universes"].startswith("2 (")
    assert "crash" in shown["faults"]
    assert shown["violations"] == "P4 in 1; seeds 17"


@pytest.mark.timeout(400)
def test_a_small_campaign_breaks_no_promise_and_meets_most_of_what_it_must() -> None:
    """The minimum that every test run has; `make sim` runs several hundred."""
    results = run_campaign(range(1_000, 1_040), jobs=2)
    total = tally(results)
    print("\n".join(f"{name}: {value}" for name, value in lines(total)))
    assert [(r.seed, r.broken) for r in results if r.broken] == []
    assert total.counted >= 30
    assert len(total.missing) < len(SOMETIMES) // 2
    assert {f"migration {path}" for path in ("before accept", "before first token", "mid-stream")} <= set(total.seen)
