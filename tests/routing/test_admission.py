"""Admit, queue or reject, and a reason that names layer, knob, threshold and measured value."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from holdfast.base.errors import CapacityExhausted, Disconnected, HoldfastError, WorkerSaturated
from holdfast.models.card import Artifact, ModelCard
from holdfast.routing.admission import Admission, Verdict
from holdfast.routing.saturation import NO_THRESHOLDS, Thresholds
from holdfast.routing.thresholds import ThresholdBook
from holdfast.wire.frames import Load, Pong, Progress

NOTHING = Artifact("0" * 64, 0)
CARD = ModelCard("m", NOTHING, NOTHING, 4096, (0,), 100, 16, total_kv_blocks=100, max_num_batched_tokens=1000)


@dataclass
class Worker:
    instance: str
    used: int = 0
    prefill: int = 0
    epoch: int = 1
    cards: dict[str, ModelCard] = field(default_factory=lambda: {"m": CARD})

    def __post_init__(self) -> None:
        self.pong = Pong(1, Progress(), Load(0, 0, self.used, 100, self.prefill))

    def card(self, model: str) -> ModelCard | None:
        return self.cards.get(model)


def admission(*thresholds: Any, enabled: bool = True) -> Admission:
    return Admission(ThresholdBook("a", Thresholds(*thresholds)), enabled=enabled)


def judge(
    judging: Admission, *workers: Worker, refused: dict[str, HoldfastError] | None = None, queueing: bool = False
) -> Verdict[Worker]:
    refusals = {(name, 1): error for name, error in (refused or {}).items()}
    return judging.judge("m", workers, refusals, queueing=queueing, ahead=0, now=100.0)


def test_without_thresholds_everybody_has_room() -> None:
    full = Worker("w1", used=100, prefill=10**6)
    assert list(judge(admission(), full).free) == [full]
    assert list(judge(admission(0.1, enabled=False), full).free) == [full]


def test_those_with_room_are_left() -> None:
    full, free = Worker("w1", used=71), Worker("w2", used=70)
    assert judge(admission(0.7), full, free).free == [free]


def test_nobody_there_is_no_matter_of_capacity() -> None:
    verdict = judge(admission(0.0))
    assert (verdict.decision, list(verdict.free)) == ("admit", [])


def test_all_saturated_is_rejected_in_numbers() -> None:
    verdict = judge(admission(0.7, 500), Worker("w1", used=95), Worker("w2", used=10, prefill=501))
    assert (verdict.decision, list(verdict.free)) == ("reject", [])
    error = verdict.error
    assert error is not None
    assert (error.status, error.retry, error.fault) == (503, "later", "capacity")
    assert error.details == {
        "layer": "frontend",
        "knob": "DYN_ACTIVE_PREFILL_TOKENS_THRESHOLD",
        "threshold": 500,
        "measured": 501,
        "worker": "w2",
        "workers": 2,
    }, "the worker nearest to having room explains it"
    assert "DYN_ACTIVE_PREFILL_TOKENS_THRESHOLD" in error.message
    assert error.retry_after is not None


def test_with_a_queue_it_queues() -> None:
    assert judge(admission(0.7), Worker("w1", used=95), queueing=True).decision == "queue"


def test_refused_by_some_and_saturated_others() -> None:
    refusal = WorkerSaturated("full", knob="DYN_ENGINE_REQUEST_LIMIT", threshold=4, actual=4, layer="worker")
    one, two = Worker("w1"), Worker("w2", used=90)
    verdict = judge(admission(0.7), one, two, refused={"w1": refusal})
    assert verdict.error is not None
    assert verdict.error.details["knob"] == "DYN_ACTIVE_DECODE_BLOCKS_THRESHOLD"
    assert verdict.error.details["workers"] == 2
    verdict = judge(admission(), one, refused={"w1": refusal})
    assert isinstance(verdict.error, WorkerSaturated)
    assert {k: verdict.error.details[k] for k in ("layer", "knob", "threshold", "measured")} == {
        "layer": "worker",
        "knob": "DYN_ENGINE_REQUEST_LIMIT",
        "threshold": 4,
        "measured": 4,
    }


def test_a_worker_that_cannot_be_reached_is_no_full_one() -> None:
    verdict = judge(admission(), Worker("w1"), refused={"w1": Disconnected("reset")})
    assert (verdict.decision, list(verdict.free)) == ("admit", []), "the stream waits for one that can be asked"


def test_own_claims_count_at_once_and_thresholds_change_at_once() -> None:
    judging, worker = admission(0.05), Worker("w1")
    admitted = 0
    while judge(judging, worker).decision == "admit":
        judging.ledger.take(worker, 32, 16)
        admitted += 1
    assert admitted == 3, "2 and 4 of 100 blocks are not over 5 %, 6 are"
    judging.book.set("m", {"active_decode_blocks_threshold": 0.5})
    assert judge(judging, worker).decision == "admit"
    judging.book.set("m", {"active_decode_blocks_threshold": 0.01})
    assert judge(judging, worker).decision == "reject"
    judging.book.set("m", {"active_decode_blocks_threshold": None})
    assert judging.book.of("m") == NO_THRESHOLDS
    assert judge(judging, worker).decision == "admit"


def test_retry_after_is_measured() -> None:
    judging = admission(0.0)
    for i in range(100):
        judging.drain.ended("m", 90.0 + i / 10)
    verdict = judging.judge("m", [Worker("w", used=5)], {}, queueing=False, ahead=99, now=100.0)
    assert isinstance(verdict.error, CapacityExhausted)
    assert verdict.error.retry_after is not None
    assert 5.0 < verdict.error.retry_after < 20.0
