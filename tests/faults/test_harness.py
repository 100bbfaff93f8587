"""The harness itself, without any process: its plans, its client's framing, its sums."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable
from pathlib import Path

import msgspec
import pytest

from holdfast.sim.faults import kinds
from holdfast.sim.history import Failed, Fired, History, Violation
from holdfast.sim.plan import Plan
from tests.faults import campaign
from tests.faults.campaign import _alike
from tests.faults.clients import Body
from tests.faults.ledger import Ledger
from tests.faults.plans import drawn, sweep
from tests.faults.rounds import NEVER_READY, Result
from tests.faults.tally import SHOWN, Covered, Tally, covered
from tests.proof import record

CHUNKED = (
    b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
    b"6\r\ndata: \r\n1;x=y\r\n1\r\n0\r\n\r\n"
)
WHOLE = b"HTTP/1.1 404 Not Found\r\ncontent-length: 5\r\n\r\nnever"


@pytest.mark.parametrize("step", [1, 2, 3, 7, 1000])
@pytest.mark.parametrize(
    ("raw", "status", "content"), [(CHUNKED, 200, b"data: 1"), (WHOLE, 404, b"never")], ids=["chunked", "whole"]
)
def test_framing_in_any_pieces(raw: bytes, status: int, content: bytes, step: int) -> None:
    body = Body()
    got = b""
    for at in range(0, len(raw), step):
        assert not body.complete or raw[at:].strip() == b""
        got += body.feed(raw[at : at + step])
    assert (body.status, got, body.complete) == (status, content, True)


def test_an_empty_answer_is_complete() -> None:
    body = Body()
    assert body.feed(b"HTTP/1.1 503 No\r\ncontent-length: 0\r\n\r\n") == b""
    assert body.complete


def test_a_cut_answer_is_not() -> None:
    body = Body()
    assert body.feed(CHUNKED[:-7]) == b"data: 1"
    assert not body.complete


def told(seed: int, *broken: str) -> Covered:
    return Covered(seed, "plain", 1.0, 20, 1, {}, {}, list(broken))


def planted(monkeypatch: pytest.MonkeyPatch, broken: set[int]) -> list[int]:
    """Let rounds take no cluster; those of these seeds never get ready. Returns the seeds that were run."""
    ran: list[int] = []

    async def rounds(jobs: Iterable[campaign.Job], *_: object) -> AsyncIterator[Covered]:
        for seed, _setting, _plan in jobs:
            ran.append(seed)
            yield told(seed, *([f"liveness: {NEVER_READY} within 80 s"] if seed in broken else []))

    monkeypatch.setattr(campaign, "rounds", rounds)
    return ran


async def test_a_campaign_goes_on_where_it_was_broken_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ran = planted(monkeypatch, {2})
    state = tmp_path / "state"
    for seed in (1, 4):
        record.save(state, told(seed))
    tally = await campaign.run(range(1, 7), state, tmp_path / "keep", 60.0)
    assert sorted(ran) == [2, 3, 5, 6]
    assert len(tally.rounds) == 6
    assert [one.seed for one in record.load(state, Covered)] == [1, 4, *ran]
    assert "going on after 2 rounds" in (said := capsys.readouterr().out)
    assert said.count("min left") == 4


async def test_a_campaign_ends_when_clusters_do_not_even_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran = planted(monkeypatch, set(range(3, 99)))
    with pytest.raises(campaign.CannotStart, match="3 clusters in a row were never ready"):
        await campaign.run(range(1, 21), tmp_path / "state", tmp_path / "keep", 60.0)
    assert ran == [1, 2, 3, 4, 5]
    assert [one.seed for one in record.load(tmp_path / "state", Covered)] == [1, 2]


@pytest.mark.parametrize("seed", range(1, 6))
def test_a_sweep_has_every_kind_once(seed: int) -> None:
    struck = [fault.kind for plan in sweep(seed) for fault in plan.faults]
    assert sorted(struck) == sorted(kinds())


def test_plans_are_plain_data() -> None:
    """A plan that was written to a file is the same plan."""
    for seed in range(1, 12):
        plan = drawn(seed)[1]
        assert msgspec.json.decode(msgspec.json.encode(plan), type=Plan) == plan


def test_few_settings_for_many_plans() -> None:
    """Plans that share a cluster differ in nothing that a process is told when it starts."""
    plans = [drawn(seed) for seed in range(1, 80)]
    for setting in ("plain", "tight", "bulk", "caches"):
        same = [plan for name, plan in plans if name == setting]
        assert len(same) > 1
        assert all(_alike(plan, same[0]) for plan in same), setting
    guarded = [plan for name, plan in plans if name == "guarded"]
    assert not _alike(guarded[0], guarded[1])
    assert _alike(guarded[0], guarded[0])


def result(broken: int = 0) -> Result:
    history = History()
    history.fired = [Fired(1.0, 1.0, "crash", "worker-0", 3), Fired(2.0, 3.0, "freeze", "worker-1", 0)]
    history.see("fault crash")
    history.see("hit crash")
    history.see("fault freeze")
    failed = Failed(1.1, "frontend-0", "r001", 0, 1, "a0", "disconnected", "transport", "mid-stream", orderly=False)
    history.failures = [failed, failed]
    violations = [Violation("P1", "something else came", {"call": f"r{i}"}) for i in range(broken)]
    return Result(7, drawn(7)[1], history, violations, 12.34)


def test_tally() -> None:
    tally = Tally()
    tally.add(covered(result(), "plain"))
    tally.add(covered(result(broken=1), "tight"))
    assert tally.struck == 4
    assert set(tally.missing) == set(kinds()) - {"crash", "freeze"}
    assert tally.broken == ["seed 7 (tight): P1: something else came (call=r0)"]
    table = tally.table().splitlines()
    assert ["crash", "2", "2"] in [line.split() for line in table]
    assert ["freeze", "2", "0"] in [line.split() for line in table]
    assert ["disconnected", "mid-stream", "4"] in [line.split() for line in table]
    assert "violations: 1" in table


def test_one_cause_that_breaks_hundreds_is_shown_in_a_few_lines() -> None:
    broken = covered(result(broken=300), "plain").broken
    assert len(broken) == SHOWN + 1
    assert broken[-1] == f"… and {300 - SHOWN} more"


def test_a_run_goes_on_where_it_was(tmp_path: Path) -> None:
    path = tmp_path / "state"
    one = covered(result(), "plain")
    record.save(path, one)
    with path.open("ab") as file:
        file.write(b'{"seed": 8, "sett')
    assert record.load(path, type(one)) == [one]


def test_on_record(tmp_path: Path) -> None:
    """A row stands in its own part, behind the rows before it."""
    path = tmp_path / "record.md"
    record.append_soak(["a soak"], path)
    record.append_faults(["first"], path)
    record.append_universes(["a universe"], path)
    record.append_faults(["second"], path)
    text = path.read_text()
    part = text.partition("## Faults in real processes")[2].partition("\n## ")[0]
    assert part.index("| first |") < part.index("| second |")
    assert "a soak" not in part
    assert "a universe" not in part
    assert text.count("## Faults in real processes") == 1


def test_what_a_frontend_gets_wrong_about_a_cache(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "socket")

    def wrong() -> str:
        return ledger.cache_difference("frontend-0", "worker-0", "a0")

    assert wrong() == "nobody has told yet"
    ledger._take("worker-0", 1, "truth", (7, [[1, 2, 3]]))
    ledger._take("frontend-0", 1, "known", {})
    assert wrong() == "unknown"
    ledger._take("frontend-0", 1, "known", {"a0": ("stale", "a gap", 0, [])})
    assert wrong() == "stale: a gap"
    ledger._take("frontend-0", 1, "known", {"a0": ("exact", "", 6, [[1, 2, 3]])})
    assert wrong() == "it speaks of another start of the worker"
    ledger._take("frontend-0", 1, "known", {"a0": ("exact", "", 7, [[1, 2, 4, 5]])})
    assert wrong() == "rank 0: 2 blocks are not there, 1 are missing"
    ledger._take("frontend-0", 1, "known", {"a0": ("exact", "", 7, [[3, 2, 1]])})
    assert wrong() == ""
