"""The inquest alone: who is suspected after which deaths, and what convicts."""

from __future__ import annotations

import pytest

from holdfast.base.errors import Disconnected, EngineFailed, InvalidRequest, PeerSilent, StreamIncomplete, WorkerStalled
from holdfast.requests.poison import OTHERWISE, TRUSTED, Inquest, Record, is_death

OLD = 500
"""New tokens of a stream that is nobody's suspect."""


def _lost(
    inquest: Inquest,
    worker: tuple[str, int],
    record: Record,
    *,
    tokens: int = 0,
    index: int | None = None,
    accepted: bool = True,
    now: float = 0.0,
) -> None:
    """Let a stream lose a worker that had brought it so many new tokens; ``index``: all that it has, if it has more."""
    progressed = tokens >= record.proof
    inquest.died(
        worker,
        record,
        tokens=tokens,
        index=tokens if index is None else index,
        progressed=progressed,
        accepted=accepted,
        now=now,
    )


W1, W2, W3 = ("w1", 1), ("w2", 1), ("w3", 1)


def test_one_suspect_with_two_deaths_is_convicted_and_clears_the_others() -> None:
    inquest, killer, other, fresh = Inquest(), Record(), Record(), Record()
    for record in (killer, other):
        _lost(inquest, W1, record)
    assert not inquest.settle(killer)
    assert killer.suspect
    assert other.suspect
    _lost(inquest, W2, killer)
    _lost(inquest, W2, fresh)
    assert inquest.settle(fresh), "whoever is judged first settles it for all"
    assert not inquest.settle(killer)
    assert (killer.convicted, other.convicted, fresh.convicted) == (True, False, False)
    assert not other.suspect
    assert not fresh.suspect
    assert (other.excused, fresh.excused) == (1, 1)


def test_two_who_may_have_done_it_are_tried_again() -> None:
    inquest, one, two = Inquest(), Record(), Record()
    for worker in (W1, W2):
        for record in (one, two):
            _lost(inquest, worker, record)
        assert not inquest.settle(one)
    assert not one.convicted
    assert not two.convicted
    assert one.suspect
    two.proven()
    _lost(inquest, W3, one)
    assert inquest.settle(one)
    assert one.convicted


def test_progress_proves_innocence_of_what_was_before() -> None:
    inquest, record = Inquest(), Record()
    _lost(inquest, W1, record)
    record.proven()
    assert not record.suspect
    _lost(inquest, W2, record)
    assert not inquest.settle(record)
    assert record.suspect
    assert record.proof == TRUSTED


def test_dead_connections_alone_convict_nobody_soon() -> None:
    inquest, record = Inquest(), Record()
    _lost(inquest, W1, record, accepted=False)
    assert not record.suspect
    _lost(inquest, W2, record, accepted=False)
    assert not inquest.settle(record)
    assert record.suspect
    _lost(inquest, W3, record, accepted=False)
    assert inquest.settle(record)


def test_who_was_not_accepted_is_suspected_when_its_worker_was_at_work() -> None:
    inquest, sent, taken = Inquest(), Record(), Record()
    _lost(inquest, W1, sent, accepted=False)
    assert not sent.suspect
    _lost(inquest, W1, taken, tokens=OLD)
    assert sent.suspect
    assert not taken.suspect


def test_two_workers_killed_together_convict_nobody_who_was_between_them() -> None:
    inquest, record = Inquest(), Record()
    _lost(inquest, W1, record)
    _lost(inquest, W2, record, accepted=False)
    assert not inquest.settle(record)
    _lost(inquest, W3, record)
    assert inquest.settle(record)


def test_deaths_that_do_not_look_alike_convict_only_after_a_third() -> None:
    inquest, record = Inquest(), Record()
    _lost(inquest, W1, record)
    _lost(inquest, W2, record, tokens=1)
    assert not inquest.settle(record)
    _lost(inquest, W3, record, tokens=1)
    assert inquest.settle(record)


@pytest.mark.parametrize(("tokens", "proof"), [(0, 2), (1, 3), (7, 9), (8, TRUSTED), (OLD, TRUSTED)])
def test_who_may_kill_a_few_tokens_after_each_start_must_bring_more_than_that(tokens: int, proof: int) -> None:
    inquest, record = Inquest(), Record()
    assert record.proof == 1
    _lost(inquest, W1, record, tokens=tokens)
    assert record.proof == proof


def _crowd(inquest: Inquest, worker: tuple[str, int], tokens: list[int], now: float = 0.0) -> list[Record]:
    """Let so many new streams lose a worker, each with so many tokens, and settle it."""
    records = [inquest.open(0.0) for _ in tokens]
    for record, count in zip(records, tokens, strict=True):
        _lost(inquest, worker, record, tokens=count, now=now)
    assert not inquest.settle(records[0])
    return records


@pytest.mark.parametrize(("trial_tokens", "suspects"), [(1, 1), (2, 2), (16, 3), (500, 4), (501, 5)])
def test_who_had_fewer_tokens_than_operators_want_is_a_suspect(trial_tokens: int, suspects: int) -> None:
    records = _crowd(Inquest(trial_tokens), W1, [0, 1, 15, 16, OLD])
    assert [record.suspect for record in records] == [i < suspects for i in range(5)]


def test_a_fresh_stream_at_the_same_place_at_two_deaths_is_convicted() -> None:
    inquest = Inquest(16)
    killer, other = _crowd(inquest, W1, [12, 12])
    _lost(inquest, W2, killer, index=12)
    assert inquest.settle(killer)
    assert killer.convicted
    assert not other.suspect


def test_a_fresh_stream_that_kills_as_many_tokens_after_each_start_is_convicted() -> None:
    inquest = Inquest(16)
    (killer,) = _crowd(inquest, W1, [5])
    _lost(inquest, W2, killer, tokens=5, index=10)
    assert inquest.settle(killer)


def test_a_fresh_stream_that_went_on_and_was_hit_again_is_tried_once_more() -> None:
    inquest = Inquest(16)
    (unlucky,) = _crowd(inquest, W1, [12])
    _lost(inquest, W2, unlucky, tokens=1, index=13)
    assert not inquest.settle(unlucky)
    assert unlucky.suspect


def test_streams_that_are_equally_old_cannot_be_told_apart_after_two_deaths() -> None:
    """They move together, and each stands where it stood: the third death decides, one at a time."""
    inquest = Inquest(16)
    records = _crowd(inquest, W1, [20, 20])
    for record in records:
        _lost(inquest, W2, record, index=20)
    assert not inquest.settle(records[0])
    assert [record.suspect for record in records] == [True, True]
    records[1].proven()
    _lost(inquest, W3, records[0], index=20)
    assert inquest.settle(records[0])


def test_the_most_suspected_is_tried_first_then_who_had_begun_last() -> None:
    inquest = Inquest(16)
    older, younger, sent = _crowd(inquest, W1, [12, 3, 0])
    assert sent.rank < younger.rank < older.rank
    _lost(inquest, W2, older, tokens=1, index=13)
    assert older.rank < sent.rank


def test_a_fresh_stream_that_was_proven_elsewhere_moves_like_all_others() -> None:
    """It has shown that neither the place of its first death nor a fresh start kills."""
    inquest = Inquest(16)
    (record,) = _crowd(inquest, W1, [12])
    record.proven()
    _lost(inquest, W2, record, tokens=10, index=22)
    assert not inquest.settle(record)
    assert not record.suspect


@pytest.mark.parametrize(
    ("at", "since", "suspects_left", "convicted"),
    [
        (100.0, 90.0, False, False),
        (100.0 - OTHERWISE, 0.0, False, True),
        (100.0, 101.0, False, True),
        (100.0, 90.0, True, True),
    ],
    ids=["lately", "long ago", "before it began", "of another killer perhaps"],
)
def test_where_workers_die_of_something_else_two_deaths_are_not_enough(
    at: float, since: float, suspects_left: bool, convicted: bool
) -> None:
    inquest = Inquest()
    _crowd(inquest, W1, [OLD, OLD, 0] if suspects_left else [OLD, OLD], now=at)
    record = inquest.open(since)
    for worker, now in ((W2, 104.0), (W3, 105.0)):
        _lost(inquest, worker, record, now=now)
        judged = inquest.settle(record)
    assert judged is convicted
    if not convicted:
        _lost(inquest, ("w4", 1), record, now=106.0)
        assert inquest.settle(record)


def test_trials_wait_until_everybody_else_has_moved() -> None:
    inquest, calls = Inquest(), []
    inquest.on_still = lambda: calls.append(1)
    mover, suspect = Record(), Record()
    for _ in range(2):
        _lost(inquest, W1, mover, tokens=9)
    _lost(inquest, W1, suspect)
    inquest.still(suspect)
    inquest.still(suspect)
    assert inquest.moving
    assert not calls
    inquest.still(mover)
    assert not inquest.moving
    assert calls == [1]


def test_a_restarted_worker_dies_another_death() -> None:
    inquest, record = Inquest(), Record()
    _lost(inquest, ("w", 1), record)
    _lost(inquest, ("w", 2), record)
    assert record.blamed == 2


def test_deaths_are_forgotten_with_their_victims_and_the_time_in_which_they_tell_something() -> None:
    inquest = Inquest()
    _crowd(inquest, W1, [OLD, OLD])
    assert len(inquest._deaths) == 1
    _crowd(inquest, W2, [OLD], now=OTHERWISE + 1)
    assert list(inquest._deaths) == [W2]


@pytest.mark.parametrize(
    ("error", "whole_stream", "death"),
    [
        (Disconnected(""), True, True),
        (PeerSilent(""), True, True),
        (WorkerStalled(""), True, True),
        (StreamIncomplete(""), True, False),
        (InvalidRequest(""), True, False),
        (EngineFailed(""), False, False),
        (EngineFailed("", engine_died=True), False, True),
        (WorkerStalled(""), False, False),
    ],
)
def test_what_counts_as_a_death(error: Exception, whole_stream: bool, death: bool) -> None:
    assert is_death(error, whole_stream=whole_stream) is death  # type: ignore[arg-type]
