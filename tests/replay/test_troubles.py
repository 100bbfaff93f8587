"""Specifications of faults: every kind is understood and does something, every mistake says what there is."""

from __future__ import annotations

from pathlib import Path

import pytest

from holdfast.replay.troubles import KINDS, BadFault, listing, read_troubles, seconds_of
from holdfast.sim import faults as f
from tests.replay.whatifs import happen


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_strikes_and_nothing_is_lost_but_at_a_dead_frontend(kind: str) -> None:
    happened, account = happen(f"{kind}@1.5s")
    assert kind in [effect.kind for effect in account.effects]
    assert account.effects[0].at == pytest.approx(1.5)
    assert account.report.requests > 15
    if kind == "killer-prompt":
        assert account.report.failed == 0, "only the prompt itself fails, and it is no part of the load"
    elif kind not in {"kill-frontend", "drain-frontend", "rolling-restart-frontends"}:
        assert account.report.failed == account.report.rejected == 0
    assert happened.samples[0].usable == 3


@pytest.mark.parametrize(
    ("spec", "fault"),
    [
        ("kill-worker@30s", f.Crash(at=30.0, target="worker-0", duration=1.0)),
        ("kill-worker@30:worker-2:10s", f.Crash(at=30.0, target="worker-2", duration=10.0)),
        ("freeze-worker@1m:500ms", f.Freeze(at=60.0, target="worker-0", duration=0.5)),
        ("drain-frontend@5s:frontend-1", f.Terminate(at=5.0, target="frontend-1", duration=1.0)),
        ("slow-worker@5s:x8:2s", f.EngineSlow(at=5.0, target="worker-0", duration=2.0, factor=8.0)),
        (
            "partition@5s:one-way:worker-1:frontend-1",
            f.Partition(at=5.0, target="worker-1", peer="frontend-1", duration=5.0, one_way=True),
        ),
        ("delay@5s:+1s", f.Delay(at=5.0, target="worker-0", peer="frontend-0", duration=10.0, seconds=1.0)),
        ("engine-error@5s:3times", f.EngineError(at=5.0, target="worker-0", times=3)),
        ("burst@5s:40times", f.Overload(at=5.0, times=40)),
        ("clock-jump@5s:-2h:frontend-0", f.WallJump(at=5.0, target="frontend-0", seconds=-7200.0)),
        (
            "discovery-partial@5s:worker-1",
            f.DiscoveryPartial(at=5.0, target="frontend-0", duration=30.0, hidden=("worker-1",)),
        ),
        ("rolling-restart@5s", f.RollingRestart(at=5.0, target="worker")),
        ("rolling-restart-frontends@5s", f.RollingRestart(at=5.0, target="frontend")),
        ("discovery-outage@5s:1m", f.DiscoveryOutage(at=5.0, duration=60.0)),
    ],
)
def test_specifications(spec: str, fault: f.AnyFault) -> None:
    assert read_troubles([spec], 3, 2) == (fault,)


def test_those_without_a_name_hit_one_after_the_other() -> None:
    found = read_troubles(["kill-worker@9s", "freeze-worker@2s", "kill-worker@3s", "reset@4s"], 3, 2)
    assert [(fault.at, fault.target) for fault in found] == [
        (2.0, "worker-1"), (3.0, "worker-2"), (4.0, "worker-0"), (9.0, "worker-0"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("kil-worker@3s", "Did you mean kill-worker?"),
        ("meteor@3s", "there is no 'meteor'"),
        ("kill-worker", "say when, as in kill-worker@30s"),
        ("kill-worker@noon", "say when"),
        ("kill-worker@3s:x4", "this kind takes a duration (5s)"),
        ("kill-worker@3s:worker-3", "there is no worker-3; workers are worker-0 to worker-2"),
        ("freeze-frontend@3s:worker-1", "worker-1 can't be the target of this kind"),
        ("rolling-restart@3s:worker-1", "worker-1 can't be the target of this kind"),
        ("kill-worker@3s:soon", "'soon' is no option"),
        ("delay@3s:+soon", "'+soon' is no option"),
        ("", "there is no ''"),
    ],
)
def test_mistakes_say_what_there_is(spec: str, said: str) -> None:
    with pytest.raises(BadFault) as caught:
        read_troubles([spec], 3, 2)
    assert said in caught.value.message


def test_an_unknown_kind_lists_all() -> None:
    with pytest.raises(BadFault) as caught:
        read_troubles(["x@1s"], 1, 1)
    assert all(kind in caught.value.message for kind in KINDS)
    assert len(listing().splitlines()) == len(KINDS)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90", 90.0), ("1.5m", 90.0), ("2h", 7200.0), ("20ms", 0.02), ("", None), ("-3s", None)],
)
def test_times(text: str, seconds: float | None) -> None:
    assert seconds_of(text) == seconds


def test_the_page_for_people_lists_every_kind() -> None:
    page = (Path(__file__).parents[2] / "docs" / "how-to" / "what-if.md").read_text(encoding="utf-8")
    for name, kind in KINDS.items():
        assert f"| `{name}` | {kind.help} |" in page
