"""Defects that universes have found, as stories that would find them again; each is planted too, to show that.

Seeds change their meaning whenever the way plans are drawn changes; a plan of its own does not.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest

from holdfast.runtime.member import Worker
from holdfast.runtime.watch import Watch
from holdfast.sim.faults import AnyFault, Crash, Partition
from holdfast.sim.plan import Plan, Shape
from holdfast.sim.universe import run_universe
from tests.proof.record import TRACK_RECORD
from tests.sim.regressions import FOUND, Found, written

Patch = pytest.MonkeyPatch
SEEDS = 10


def lost_while_connecting(patch: Patch) -> None:
    """A worker stayed ejected when its old connection broke while a new one was being made (P13)."""
    connected = Watch.connected

    def planted(self: Watch, worker: Worker, link: object, epoch: int) -> None:
        ejected = worker.link is None and worker.state == "ejected"
        connected(self, worker, link, epoch)  # type: ignore[arg-type]
        if ejected:
            worker.state = "ejected"

    patch.setattr(Watch, "connected", planted)


STORIES: list[tuple[Callable[[Patch], None], tuple[AnyFault, ...]]] = [
    (
        lost_while_connecting,
        (
            Partition(at=0.5, target="worker-0", peer="frontend-1", duration=5.5),
            Crash(at=1.6, target="worker-0", duration=3.5),
        ),
    ),
]


def violations(seed: int, faults: tuple[AnyFault, ...]) -> list[str]:
    return [str(v) for v in run_universe(seed, plan=Plan(Shape(), "mixed", (), faults)).violations]


@pytest.mark.parametrize(("plant", "faults"), STORIES, ids=[plant.__name__ for plant, _ in STORIES])
def test_it_stays_away_and_would_be_found_again(
    plant: Callable[[Patch], None], faults: tuple[AnyFault, ...], monkeypatch: Patch
) -> None:
    for seed in range(SEEDS):
        assert violations(seed, faults) == []
    plant(monkeypatch)
    assert any(violations(seed, faults) for seed in range(3 * SEEDS))


@pytest.mark.parametrize("found", FOUND, ids=lambda found: f"{found.seed}-{found.promise}")
def test_the_seeds_that_found_something_are_quiet(found: Found) -> None:
    assert [str(v) for v in run_universe(found.seed, found.shape).violations] == []


def test_the_track_record_lists_what_was_found() -> None:
    text = TRACK_RECORD.read_text()
    assert written(text) == text, "run: python -m tests.sim.regressions"
    other = text + "\n## Another part\n\nProse.\n"
    assert written(other) == other
