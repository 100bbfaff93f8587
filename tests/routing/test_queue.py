"""The wait queue: who is next, who is turned away, and that nobody waits for ever."""

from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from holdfast.routing.queue import LONGEST_HANDICAP, TOKENS_PER_SECOND, Rank, Waiting, WaitQueue


def fill(limit: int, *ranks: Rank, model: str = "m") -> tuple[WaitQueue[int], list[Waiting[int] | None]]:
    queue: WaitQueue[int] = WaitQueue(limit)
    return queue, [queue.join(i, model, rank, float(i) / 100)[0] for i, rank in enumerate(ranks)]


def serve(queue: WaitQueue[int], model: str = "m") -> list[int]:
    served = []
    while (head := queue.head(model)) is not None:
        served.append(head.item)
        queue.leave(head)
    return served


def test_first_come_first_served_within_a_priority_and_important_ones_first() -> None:
    queue, _ = fill(10, Rank(), Rank(), Rank(0, 5), Rank(0, 9), Rank(1), Rank(0, 5))
    assert len(queue) == 6
    assert serve(queue) == [4, 3, 2, 5, 0, 1]
    assert len(queue) == 0


def test_negative_priorities_keep_their_turn_and_are_shed_first() -> None:
    queue, _ = fill(3, Rank(0, -5), Rank(), Rank())
    place, loser = queue.join(9, "m", Rank(), 1.0)
    assert place is not None
    assert loser == 0
    queue, _ = fill(3, Rank(0, -5), Rank())
    assert serve(queue) == [0, 1]


def test_full_the_least_important_goes_and_a_newcomer_never_displaces_its_equal() -> None:
    queue, _ = fill(2, Rank(0, 3), Rank(0, 1))
    assert queue.join(7, "m", Rank(0, 1), 9.0) == (None, None)
    place, loser = queue.join(8, "other", Rank(0, 2), 9.0)
    assert place is not None
    assert loser == 1, "one bound over all models: the important model's request gets the place"
    assert queue.models() == ["m", "other"]


def test_waiting_makes_up_for_priority() -> None:
    """Ten points are ten seconds: who has waited for longer goes first, however many important ones come."""
    queue: WaitQueue[str] = WaitQueue(1000)
    queue.join("patient", "m", Rank(), 0.0)
    for i in range(100):
        queue.join(f"vip {i}", "m", Rank(0, 10), 9.0 + i / 20)
    served = 0
    while (head := queue.head("m")) is not None and head.item != "patient":
        queue.leave(head)
        served += 1
    assert served == 20, "only those that came within its first ten seconds"


def test_what_was_promised_goes_first_and_takes_no_place() -> None:
    queue, _ = fill(1, Rank(5, 5))
    place, loser = queue.join(42, "m", Rank(), 99.0, promised=True)
    assert (place is not None, loser) == (True, None)
    assert len(queue) == 1
    assert queue.before("m", Rank(9, 9), 99.0)
    assert queue.join(43, "m", Rank(9), 99.0)[1] == 0, "the promised one is never turned away"
    assert serve(queue) == [42, 43]


def test_before() -> None:
    queue, _ = fill(5, Rank(0, 1))
    assert queue.before("m", Rank(0, 1), 1.0)
    assert not queue.before("m", Rank(0, 9), 1.0), "a more important newcomer need not stand behind"
    assert not queue.before("other", Rank(), 1.0)


def test_off() -> None:
    assert fill(0, Rank())[1] == [None]


RANKS = st.builds(Rank, st.integers(0, 2), st.integers(-3, 3))
STEPS = st.lists(
    st.tuples(st.sampled_from(["join", "serve", "quit"]), st.sampled_from("ab"), RANKS, st.integers(0, 99)), max_size=80
)


@given(st.integers(0, 6), STEPS)
def test_the_queue_agrees_with_a_list(limit: int, steps: list) -> None:
    """Bound, service order, shedding order and bookkeeping, against the plainest model of them."""
    queue: WaitQueue[int] = WaitQueue(limit)
    model: list[Waiting[int]] = []
    for clock, (what, name, rank, pick) in enumerate(steps):
        if what == "join":
            place, loser = queue.join(clock, name, rank, float(clock))
            least = min(model, key=lambda p: (p.rank.strict, p.rank.priority, -p.arrived)) if model else None
            if len(model) >= limit:
                if least is None or (least.rank.strict, least.rank.priority) >= (rank.strict, rank.priority):
                    assert place is None
                    continue
                assert loser == least.item
                model.remove(least)
            assert place is not None
            model.append(place)
        elif model and what == "quit":
            queue.leave(model.pop(pick % len(model)))
        elif what == "serve":
            line = [p for p in model if p.model == name]
            head = queue.head(name)
            best = min(line, key=lambda p: (-p.rank.strict, p.arrived - max(0, p.rank.priority)), default=None)
            assert head is best
            if head is not None:
                queue.leave(head)
                model.remove(head)
        assert len(queue) == len(model) <= limit
        assert {name: queue.waiting(name) for name in queue.models()} == {
            name: n for name in "ab" if (n := sum(p.model == name for p in model))
        }


@given(st.lists(st.integers(0, 20), min_size=1, max_size=40))
def test_no_starvation(priorities: list[int]) -> None:
    """One request a second is served and one comes: no priority waits no longer than the others' points."""
    queue: WaitQueue[str] = WaitQueue(1000)
    queue.join("low", "m", Rank(), 0.0)
    for second in range(1, 60):
        queue.join("vip", "m", Rank(0, priorities[second % len(priorities)]), float(second))
        head = queue.head("m")
        assert head is not None
        queue.leave(head)
        if head.item == "low":
            assert second <= 21
            return
    raise AssertionError("starved")


def test_wspt_serves_what_is_quickly_computed_first_and_priority_divides() -> None:
    queue: WaitQueue[str] = WaitQueue(10, "wspt")
    for name, tokens, priority in (("long", 40_000, 0), ("short", 500, 0), ("urgent", 40_000, 99)):
        queue.join(name, "m", Rank(0, priority), 0.0, tokens=tokens)
    assert drain(queue) == ["urgent", "short", "long"]
    queue.join("long", "m", Rank(), 0.0, tokens=40_000)
    queue.join("strict", "m", Rank(1), 5.0, tokens=100_000)
    assert drain(queue) == ["strict", "long"]
    queue.join("long", "m", Rank(), 0.0, tokens=40_000)
    assert queue.before("m", Rank(), 21.0, 0), "20 seconds are what it can be overtaken by"
    assert not queue.before("m", Rank(), 19.0, 0)


@given(st.lists(st.tuples(st.floats(0, 100), st.integers(0, 200_000), st.integers(0, 5)), min_size=1, max_size=30))
def test_wspt_lets_nobody_be_overtaken_for_longer_than_its_own_handicap(
    requests: list[tuple[float, int, int]],
) -> None:
    """Ageing: whoever comes later than a request's handicap after it is served after it."""
    queue: WaitQueue[int] = WaitQueue(100, "wspt")
    for number, (arrived, tokens, priority) in enumerate(requests):
        queue.join(number, "m", Rank(0, priority), arrived, tokens=tokens)
    order = drain(queue)
    for place, number in enumerate(order):
        arrived, tokens, priority = requests[number]
        handicap = min(LONGEST_HANDICAP, tokens / TOKENS_PER_SECOND / (1 + priority))
        for earlier in order[:place]:
            assert requests[earlier][0] <= arrived + handicap


def test_lcfs_serves_the_last_one_first_and_strict_priorities_and_promises_before_it() -> None:
    queue: WaitQueue[str] = WaitQueue(10, "lcfs")
    queue.join("first", "m", Rank(), 0.0)
    queue.join("vip", "m", Rank(0, 5), 1.0)
    queue.join("second", "m", Rank(), 2.0)
    queue.join("strict", "m", Rank(1), 0.0)
    queue.join("promised", "m", Rank(), 9.0, promised=True)
    assert queue.before("m", Rank(2), 3.0), "promises go first whatever the policy"
    assert drain(queue) == ["promised", "strict", "vip", "second", "first"]
    queue.join("first", "m", Rank(), 0.0)
    assert not queue.before("m", Rank(), 1.0), "a newcomer need not stand behind"


def test_lcfs_starves_as_the_reference_does() -> None:
    """The first one is served last while one comes for each that is served: documented, only its deadline ends it."""
    queue: WaitQueue[str] = WaitQueue(1000, "lcfs")
    queue.join("patient", "m", Rank(), 0.0)
    for second in range(1, 100):
        queue.join(f"late {second}", "m", Rank(), float(second))
        head = queue.head("m")
        assert head is not None
        assert head.item == f"late {second}"
        queue.leave(head)
    assert drain(queue) == ["patient"]


def drain(queue: WaitQueue[Any]) -> list[Any]:
    served = []
    while (head := queue.head("m")) is not None:
        served.append(head.item)
        queue.leave(head)
    return served
