"""What-ifs: the figures agree with each other and with the fault, settings have their effect, a seed repeats."""

from __future__ import annotations

import random

import msgspec
import pytest

from holdfast.engines.mock.config import MockConfig
from holdfast.replay.arrivals import Arrivals
from holdfast.replay.effects import Account
from holdfast.replay.loads import Lengths, MadeUp, MadeUpLoad, TraceLoad
from holdfast.replay.trace import parse_trace
from holdfast.replay.whatif import BURST, what_if
from holdfast.requests.config import RequestSettings
from holdfast.routing.config import AdmissionSettings
from tests.replay.whatifs import happen, scenario, with_frontend

BUSY = {"rate": 12.0, "seconds": 4.0}


def dump(account: Account) -> bytes:
    return msgspec.json.encode(account)


def test_the_same_seed_gives_the_same_bytes_and_another_one_others() -> None:
    first, again, other = (happen("kill-worker@1s", "freeze-worker@2s:3s", seed=seed)[1] for seed in (3, 3, 4))
    assert dump(first) == dump(again)
    assert first.digest == again.digest != other.digest


def test_a_quiet_run_has_no_gaps_and_no_faults() -> None:
    happened, account = happen()
    assert account.effects == []
    assert account.migrations == account.streams_lost == 0
    assert account.longest_gap < 0.1
    assert account.report.ok == account.report.requests == len(happened.recording.records)
    assert {piece.usable_workers for piece in account.slices} == {3}


@pytest.mark.parametrize(
    "spec",
    ["kill-worker@2s", "power-loss@2s", "freeze-worker@2s:4s", "hang-worker@2s:6s", "out-of-memory@2s",
     "engine-error@2s:2times", "engine-abort@2s:2times", "partition@2s:6s:worker-0:frontend-0", "reset@2s"],
)  # fmt: skip
def test_streams_of_a_lost_worker_move_and_none_is_lost(spec: str) -> None:
    happened, account = happen(spec, **BUSY)
    (effect,) = account.effects
    assert 0 < effect.moved <= effect.hit
    assert effect.lost == 0
    assert account.migrations == len(happened.moves) >= effect.moved
    assert account.report.ok == account.report.requests
    begun = {move.label for move in happened.moves if move.phase != "before accept"}
    assert all(len(happened.attempts[label]) > 1 for label in begun), "a moved stream has a second worker"


def test_a_freeze_shows_as_the_gap_that_the_detector_leaves() -> None:
    _, account = happen("freeze-worker@2s:4s", **BUSY)
    assert 1.4 < account.effects[0].longest_gap < 2.2, "1.5 s without a pong, and the move"
    _, patient = happen("freeze-worker@2s:4s", **BUSY, settings=with_frontend(freeze_after_secs=3.0))
    assert 2.9 < patient.effects[0].longest_gap < 3.8


def test_the_time_line_adds_up() -> None:
    _, account = happen("kill-worker@2s", "burst@3s:20times", **BUSY)
    report = account.report
    assert sum(piece.requests for piece in account.slices) == report.requests
    assert sum(piece.finished for piece in account.slices) == report.ok
    assert sum(piece.migrations for piece in account.slices) == account.migrations
    width = account.slices[1].at
    tokens = sum(p.tokens_per_second * min(width, report.seconds - p.at) for p in account.slices)
    assert tokens == pytest.approx(report.output_tokens)
    assert max(piece.longest_gap for piece in account.slices) == account.longest_gap
    assert min(piece.usable_workers for piece in account.slices) == 2


def test_a_burst_is_more_of_the_same_load() -> None:
    happened, account = happen("burst@2s:30times")
    assert sum(record.index >= BURST for record in happened.recording.records) == 30
    assert account.report.ok == account.report.requests


def test_thresholds_turn_requests_away_and_a_queue_lets_them_wait() -> None:
    engine = MockConfig(step_ms=25.0, num_blocks=64)
    admission = AdmissionSettings(active_decode_blocks_threshold=0.3)
    tight = msgspec.structs.replace(with_frontend(requests=RequestSettings(admission=admission)), engine=engine)
    _, turned_away = happen("burst@1s:60times", settings=tight)
    assert turned_away.report.rejected > 0
    reasons = {reason for piece in turned_away.slices for reason in piece.rejected}
    assert sum(sum(p.rejected.values()) for p in turned_away.slices) == turned_away.report.rejected
    assert reasons <= set(turned_away.report.errors)
    queue = msgspec.structs.replace(admission, admission_queue_limit=100)
    waiting = msgspec.structs.replace(with_frontend(requests=RequestSettings(admission=queue)), engine=engine)
    _, served = happen("burst@1s:60times", settings=waiting)
    assert served.report.rejected < turned_away.report.rejected


def test_without_migrations_a_dead_worker_takes_its_streams_with_it() -> None:
    _, account = happen("kill-worker@2s", **BUSY, settings=with_frontend(requests=RequestSettings(migration_limit=0)))
    assert account.effects[0].lost == account.report.failed > 0
    assert account.effects[0].moved == 0


def test_a_dead_frontend_breaks_its_clients_connections() -> None:
    happened, account = happen("kill-frontend@2s:frontend-1", **BUSY)
    (effect,) = account.effects
    assert effect.lost == account.report.failed == account.report.errors["disconnected"] == effect.hit > 0
    assert {s.frontend for s in happened.streams.values()} == {"frontend-0", "frontend-1"}


def test_what_befalls_a_stream_is_blamed_on_one_fault() -> None:
    _, account = happen("discovery-outage@1s:3s", "kill-worker@2s", "burst@2.5s:20times", **BUSY)
    moved = {effect.kind: effect.moved for effect in account.effects}
    assert moved["kill-worker"] > 0
    assert moved["discovery-outage"] == moved["burst"] == 0


def test_a_rolling_restart_lasts_as_long_as_it_takes_and_loses_nothing() -> None:
    _, account = happen("rolling-restart@1s", seconds=10.0)
    (effect,) = account.effects
    assert effect.until > effect.at + 1.0
    assert effect.lost == 0
    assert account.report.ok == account.report.requests


def test_a_trace_can_be_the_load() -> None:
    lines = [b'{"timestamp": %d, "input_length": 40, "output_length": 20, "hash_ids": [%d]}' % (at * 100, at)
             for at in range(20)]  # fmt: skip
    makes = MadeUp(Lengths(16, 16), Lengths(8, 8), random.Random(1))
    load = TraceLoad(lambda: parse_trace(lines), Arrivals(speedup=2.0), makes)
    happened = what_if(msgspec.structs.replace(scenario("burst@0.5s:3times"), load=load))
    records = happened.recording.records
    assert len(records) == 23
    assert max(r.due for r in records if r.index < BURST) == pytest.approx(0.95)


def test_a_closed_load_keeps_its_seats_taken() -> None:
    load = MadeUpLoad(MadeUp(Lengths(16, 16), Lengths(20, 20), random.Random(1)), 3.0, None, 5)
    happened = what_if(msgspec.structs.replace(scenario(), load=load))
    sent = [record.sent for record in happened.recording.records]
    assert sent[4] < 0.01 < sent[5]
    assert 2.0 < max(sent) <= 3.1
