"""A failing universe becomes a short story, and its script replays it."""

from __future__ import annotations

from pathlib import Path

import pytest

from holdfast.base.errors import InvalidRequest
from holdfast.sim.plan import Shape
from holdfast.sim.script import Run, load, run_script, save, script_of, written
from holdfast.sim.shrink import Shrinker, reduce
from holdfast.sim.story import involved, tell
from holdfast.sim.universe import run_universe

from .test_oracles import CRASHES, FREEZES, SEEDS, seed_lost_on_migration, suspects_never_return


def test_reduce_leaves_what_is_needed() -> None:
    asked: list[tuple[int, ...]] = []

    def still(part: tuple[int, ...]) -> bool:
        asked.append(part)
        return {3, 11} <= set(part)

    assert reduce(range(20), still) == (3, 11)
    assert len(asked) < 60
    assert reduce(range(20), lambda part: True) == ()
    assert reduce([1], bool) == (1,)


@pytest.mark.parametrize("seed", [3, 11])
def test_a_script_is_the_same_universe(seed: int, tmp_path: Path) -> None:
    outcome = run_universe(seed)
    run = run_script(script_of(seed))
    assert run.digest == outcome.digest
    path = tmp_path / "script.json"
    save(written(run), path)
    assert load(path) == written(run)
    assert run_script(load(path)).digest == outcome.digest


def test_a_file_that_is_no_script_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="no file"):
        load(tmp_path / "nothing.json")
    (tmp_path / "other.json").write_text('{"seed": 1}')
    with pytest.raises(InvalidRequest, match="not a script"):
        load(tmp_path / "other.json")


def shrunk(shape: Shape, first: int = 0) -> Run:
    for seed in range(first, SEEDS):
        if run_universe(seed, shape).violations:
            shrinker = Shrinker(script_of(seed, shape), seconds=400.0)  # a few seconds on a machine of its own
            run = shrinker.shrink()
            assert shrinker.wanted in run.signatures
            return run
    raise AssertionError("the planted mistake was not found")


@pytest.mark.timeout(500)
def test_a_verdict_that_never_ends_becomes_one_freeze(monkeypatch: pytest.MonkeyPatch) -> None:
    suspects_never_return(monkeypatch)
    run = shrunk(FREEZES)
    plan = run.script.plan
    assert (len(plan.faults), len(plan.wishes), plan.shape.workers, plan.shape.frontends) == (1, 0, 1, 1)
    story = tell(run.history, plan, run.violations)
    assert "freeze of worker-0 for" in story
    assert "holds worker-0 for suspect" in story
    assert "VIOLATION P13" in story


@pytest.mark.timeout(500)
def test_a_lost_seed_becomes_one_stream_that_moves(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seed_lost_on_migration(monkeypatch)
    run = shrunk(CRASHES, 1)  # universe 0 breaks a rarer rule, which takes the company of other requests
    plan = run.script.plan
    assert len(plan.faults) <= 1
    assert len(plan.wishes) <= 2
    assert plan.shape.frontends == 1
    assert involved(run.violations)
    story = tell(run.history, plan, run.violations, only=involved(run.violations))
    assert "attempt 2" in story
    save(written(run), tmp_path / "story.json")
    assert run_script(load(tmp_path / "story.json")).digest == run.digest
    monkeypatch.undo()
    assert run_script(load(tmp_path / "story.json")).violations == []


def test_what_does_not_fail_is_not_shrunk() -> None:
    with pytest.raises(InvalidRequest, match="keeps every promise"):
        Shrinker(script_of(3))
