"""Universes in the middle of an upgrade: old workers are old on the wire, and nothing is lost between versions."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from holdfast.base.errors import ErrorInfo
from holdfast.requests.attempt import Attempt
from holdfast.sim.faults import AnyFault, Crash, RollingRestart
from holdfast.sim.plan import Plan, Shape, draw_plan
from holdfast.sim.tape import Tape
from holdfast.sim.universe import Outcome, Universe, run_universe
from holdfast.sim.versions import OldOutbox, OldWorkerConnection, shortened, version_changes
from holdfast.sim.workload import MODEL, Manner, Wish
from holdfast.wire.caller import CallerConnection
from holdfast.wire.codec import WORKER_FRAMES, encode
from holdfast.wire.columns import encode_items
from holdfast.wire.frames import Accept, Data, End, Hello, Load, Pong, Progress, Welcome, WorkerFrame
from holdfast.wire.framing import PREFIX_BYTES

SEEDS = 3

# -- on the wire -------------------------------------------------------------------------------------------


def fields(piece: bytes | bytearray) -> list[Any]:
    return list(msgspec.msgpack.decode(piece[PREFIX_BYTES:]))


@pytest.mark.parametrize(
    ("frame", "lost"),
    [
        (Welcome(1, "w", 7, ("x",), b"mac", 2), 1),
        (Pong(3, Progress(steps=4), Load(running=2), 9, "failed"), 1),
        (Data(1, 2, b"data", False), 1),
        (End(1, "error", ErrorInfo("internal", "no", "worker"), 4, 17), 1),
        (Accept(5), 0),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_frame_of_version_1_ends_where_it_ended_then(frame: WorkerFrame, lost: int) -> None:
    now, then = encode(frame), shortened(encode(frame))
    assert int.from_bytes(then[:PREFIX_BYTES], "little") == len(then) - PREFIX_BYTES
    assert fields(then) == fields(now)[: len(fields(now)) - lost]
    read = WORKER_FRAMES.read(then[PREFIX_BYTES:], "ready", lenient=False)
    assert type(read) is type(frame)


def test_items_of_version_1_have_no_log_probabilities() -> None:
    (piece,) = encode_items([(1, 0, [5, 6], [(-0.5, []), (-0.25, [])])])
    assert len(fields(shortened(piece))) == len(fields(piece)) - 1 == 5


def test_an_old_worker_chooses_version_1_and_reads_newer_callers() -> None:
    worker = OldWorkerConnection("w", 1, lambda _stream, _reason: None)
    worker.outbox = OldOutbox()
    caller = CallerConnection(Hello(1, 2, "c", "control"))
    worker.receive(caller.outbox.take())
    worker.join()
    caller.receive(bytes(worker.outbox.take()))
    assert caller.version == worker.version == 1
    assert caller.welcome == Welcome(1, "w", 1)


# -- in universes ------------------------------------------------------------------------------------------


def wishes(number: int, **more: Any) -> tuple[Wish, ...]:
    """Requests of which every fourth is read by a client that stalls."""
    found = []
    for i in range(number):
        body = {"model": MODEL, "messages": [{"role": "user", "content": f"s{i}"}], "max_tokens": 60, "seed": i + 1}
        stalls = Manner(reading="stalls", pause=1.5, buffer=256) if i % 4 == 1 else Manner()
        found.append(Wish(f"r{i:03d}", 0.1 * i, i % 2, "chat", {**body, "stream": True, **more}, manner=stalls))
    return tuple(found)


def universe(seed: int, old: tuple[str, ...], faults: tuple[AnyFault, ...], **more: Any) -> Outcome:
    plan = Plan(Shape(span=3.0), "mixed", wishes(24, **more), faults, old=old, migration_limit=6)
    return run_universe(seed, plan=plan)


CRASHES = tuple(Crash(at=0.5 + 0.4 * k, target=f"worker-{k % 3}", moment="stream", duration=1.0) for k in range(4))
UPGRADE = RollingRestart(at=0.8, target="worker")


@pytest.mark.parametrize("old", [("worker-0",), ("worker-0", "worker-2"), ("frontend-1", "worker-1")], ids=len)
def test_streams_move_between_versions_and_nothing_is_lost(old: tuple[str, ...]) -> None:
    outcomes = [universe(seed, old, CRASHES) for seed in range(SEEDS)]
    assert [str(v) for o in outcomes for v in o.violations] == []
    changes = [change for o in outcomes for change in version_changes(o.history)]
    assert {(1, 2), (2, 1)} <= set(changes)


def test_an_upgrade_of_all_workers_loses_nothing() -> None:
    outcome = universe(1, ("worker-0", "worker-1", "worker-2"), (UPGRADE,))
    assert [str(v) for v in outcome.violations] == []
    assert outcome.counters["moved to a newer version"] > 0
    lives = sorted((life.name, life.incarnation, life.version) for life in outcome.history.lives)
    assert [life for life in lives if "worker" in life[0]] == [
        (f"worker-{number}", start, start) for number in range(3) for start in (1, 2)
    ]


def test_a_worker_that_crashes_comes_back_as_old_as_it_was() -> None:
    outcome = universe(1, ("worker-1",), (Crash(at=0.5, target="worker-1", duration=0.5),))
    assert [life.version for life in outcome.history.lives if life.name == "worker-1"] == [1, 1]


def test_log_probabilities_of_an_old_worker_are_missing_and_shift_no_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch held back for a stalled client was a mixture of tokens with and without: its request failed."""
    chat: dict[str, Any] = {"logprobs": True, "top_logprobs": 1}

    def broken() -> list[str]:
        found = [universe(seed, ("worker-1",), CRASHES, **chat) for seed in range(SEEDS)]
        assert sum(o.counters["moved to a newer version"] for o in found) > 0
        return [str(v) for o in found for v in o.violations]

    assert broken() == []
    made = Attempt.__init__

    def planted(self: Attempt, *args: Any) -> None:
        made(self, *args)
        self.scored = False

    monkeypatch.setattr(Attempt, "__init__", planted)
    assert any("code=internal" in violation for violation in broken())


def test_one_universe_in_eight_is_in_the_middle_of_an_upgrade() -> None:
    plans = [draw_plan(Tape(seed), Shape(requests=1)) for seed in range(400)]
    mixed = [plan for plan in plans if any(name.startswith("worker") for name in plan.old)]
    assert 25 <= len(mixed) <= 80
    counts = {len([name for name in plan.old if name.startswith("worker")]) for plan in mixed}
    assert {1, 2, 3} <= counts <= {1, 2, 3, 4, 5}, "up to all; universes with workers for prompts have more"
    assert any(name.startswith("frontend") for plan in mixed for name in plan.old)


def test_callers_of_an_old_worker_speak_version_1_and_so_do_those_of_an_old_frontend(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    one = Universe(Tape(1), plan=Plan(Shape(span=0.5), "mixed", (), (), old=("worker-0", "frontend-1")))
    spoken: dict[tuple[str, str], int] = {}
    look = one._look

    def looked() -> None:
        look()
        for frontend in one.cluster.frontends:
            for worker in frontend.assembled.pool.all_workers():
                assert worker.link is not None
                assert worker.link.welcome is not None
                spoken[frontend.name, one.cluster.name_of(worker.instance)] = worker.link.welcome.version

    monkeypatch.setattr(one, "_look", looked)
    assert one.run().violations == []
    old = {("frontend-0", "worker-0"), *(("frontend-1", f"worker-{number}") for number in range(3))}
    assert {pair for pair, version in spoken.items() if version == 1} == old
    assert len(spoken) == 6
