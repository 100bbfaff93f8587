"""Universes: they are quiet, they repeat to the last callback, and they are big enough to count."""

from __future__ import annotations

from collections import Counter

import msgspec
import pytest

from holdfast.sim.campaign import run_campaign
from holdfast.sim.faults import AnyFault, Crash, kinds
from holdfast.sim.plan import Plan, Shape, draw_plan
from holdfast.sim.tape import Tape
from holdfast.sim.universe import run_universe
from holdfast.sim.workload import MODEL, Wish


def test_the_first_universes_break_no_promise_and_most_of_them_count() -> None:
    outcomes = [run_universe(seed) for seed in range(24)]
    assert {o.seed: [str(v) for v in o.violations] for o in outcomes if o.violations} == {}
    assert sum(o.counted for o in outcomes) >= 12
    seen: Counter[str] = sum((o.counters for o in outcomes), Counter())
    assert seen["ended done"] > 300
    assert seen["join exact"] > 10


@pytest.mark.parametrize("seed", [3, 11])
def test_a_universe_repeats_itself(seed: int) -> None:
    first, again = run_universe(seed), run_universe(seed)
    assert again.digest == first.digest
    assert again.log == first.log
    scripted = run_universe(seed, script=first.choices)
    assert scripted.digest == first.digest
    assert run_universe(0, script=first.choices).plan == first.plan


def test_the_order_of_universes_in_a_process_changes_nothing() -> None:
    """Whatever universes leave in a process (the model's files, tables of tokens), nothing of it is seen by others."""
    seeds = [3, 11, 5, next(seed for seed in range(100) if draw_plan(Tape(seed), Shape()).profile == "bulk")]
    forwards, backwards = run_campaign(seeds), run_campaign(reversed(seeds))
    apart = run_campaign(seeds, jobs=2)
    assert len(forwards) == len(seeds)
    assert all(result.digest for result in forwards)
    digests = [[(one.seed, one.digest, one.seen) for one in results] for results in (forwards, backwards, apart)]
    assert digests[0] == digests[1] == digests[2]


def test_a_plan_can_be_written_down_and_read_back() -> None:
    plan = draw_plan(Tape(5), Shape())
    assert msgspec.json.decode(msgspec.json.encode(plan), type=Plan) == plan
    faults = msgspec.json.decode(msgspec.json.encode(plan.faults), type=tuple[AnyFault, ...])
    assert faults == plan.faults


def test_every_kind_of_fault_can_be_drawn() -> None:
    drawn = {fault.kind for seed in range(400) for fault in draw_plan(Tape(seed), Shape(requests=0)).faults}
    assert drawn == set(kinds())


def test_a_plan_of_ones_own() -> None:
    body = {
        "model": MODEL,
        "messages": [{"role": "user", "content": "hello"}],
        "max_tokens": 30,
        "stream": True,
        "seed": 7,
    }
    wishes = tuple(Wish(f"r{i}", 0.1, 0, body=body) for i in range(4))
    crash = Crash(at=0.3, target="worker-0", moment="stream", duration=1.0)
    outcome = run_universe(1, plan=Plan(Shape(), "mixed", wishes, (crash,)))
    assert outcome.violations == []
    assert outcome.counters["fault crash"] == outcome.counters["hit crash"] == 1
    assert outcome.counters["migration mid-stream"] >= 1
    assert {call.data for call in outcome.history.calls if not call.probe} != {b""}
