"""Which worker gets a request: fairness of each mode, and what is preferred over what."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from holdfast.routing.policy import Policy, RouterMode, Wish

MODES: list[RouterMode] = ["round-robin", "random", "power-of-two", "least-loaded"]


@dataclass
class Worker:
    instance: str
    build: str = "a"
    hesitant: bool = False
    in_flight: int = 0
    queued: int = 0

    def fingerprint_of(self, model: str) -> str:
        return self.build


def policy(mode: RouterMode) -> Policy:
    return Policy(mode, random.Random(1))


def fleet(n: int) -> list[Worker]:
    return [Worker(f"w{i}") for i in range(n)]


@pytest.mark.parametrize("mode", MODES)
def test_nobody_and_only_one(mode: RouterMode) -> None:
    one = Worker("w", hesitant=True, build="other")
    assert policy(mode).choose("m", [], Wish()) is None
    assert policy(mode).choose("m", [one], Wish(frozenset({"w"}), "a")) is one


def test_round_robin_takes_turns_per_model() -> None:
    workers, chooser = fleet(3), policy("round-robin")
    chosen = [(chooser.choose("m", workers, Wish()), chooser.choose("other", workers, Wish())) for _ in range(6)]
    assert [m and m.instance for m, _ in chosen] == ["w0", "w1", "w2"] * 2
    assert [o and o.instance for _, o in chosen] == ["w0", "w1", "w2"] * 2


@pytest.mark.parametrize("mode", ["random", "power-of-two"])
def test_random_modes_are_even_and_repeatable(mode: RouterMode) -> None:
    workers = fleet(4)
    one, two = policy(mode), policy(mode)
    first = [one.choose("m", workers, Wish()) for _ in range(4_000)]
    assert first == [two.choose("m", workers, Wish()) for _ in range(4_000)]
    counts = Counter(w.instance for w in first if w)
    assert set(counts) == {"w0", "w1", "w2", "w3"}
    if mode == "random":
        assert max(counts.values()) < 1_150


def test_power_of_two_takes_the_lesser_of_two() -> None:
    workers = [Worker("idle"), Worker("busy", in_flight=5), Worker("full", in_flight=4, queued=9)]
    chooser = policy("power-of-two")
    counts = Counter(w.instance for _ in range(600) if (w := chooser.choose("m", workers, Wish())))
    assert counts["full"] == 0
    assert counts["idle"] > counts["busy"] > 0


def test_least_loaded_counts_own_streams_and_the_engines_queue_and_rotates_ties() -> None:
    workers = [
        Worker("a", in_flight=2),
        Worker("b", in_flight=1, queued=2),
        Worker("c", queued=1),
        Worker("d", queued=1),
    ]
    chooser = policy("least-loaded")
    assert {w.instance for _ in range(8) if (w := chooser.choose("m", workers, Wish()))} == {"c", "d"}


def test_least_loaded_fills_evenly() -> None:
    workers, chooser = fleet(5), policy("least-loaded")
    for _ in range(103):
        chosen = chooser.choose("m", workers, Wish())
        assert chosen is not None
        chosen.in_flight += 1
    assert max(w.in_flight for w in workers) - min(w.in_flight for w in workers) <= 1


@pytest.mark.parametrize("mode", MODES)
def test_preferences_in_order(mode: RouterMode) -> None:
    avoided = Worker("avoided", build="a")
    hesitant = Worker("hesitant", build="a", hesitant=True)
    other = Worker("other", build="b")
    good = Worker("good", build="a", in_flight=99)
    wish = Wish(frozenset({"avoided"}), "a")

    def first_of(*workers: Worker) -> set[str]:
        chooser = policy(mode)
        return {w.instance for _ in range(20) if (w := chooser.choose("m", workers, wish))}

    assert first_of(avoided, hesitant, other, good) == {"good"}
    assert first_of(avoided, hesitant, other) == {"other"}, "a hesitant worker is worse than another build"
    assert first_of(avoided, hesitant) == {"hesitant"}, "a worker that failed this stream is the last resort"
    assert first_of(avoided) == {"avoided"}


@given(
    st.sampled_from(MODES),
    st.lists(
        st.tuples(st.booleans(), st.booleans(), st.sampled_from("ab"), st.integers(0, 9), st.integers(0, 9)),
        min_size=1,
        max_size=8,
    ),
    st.sampled_from(["", "a", "b"]),
)
def test_the_choice_is_never_worse_than_another_candidate(
    mode: RouterMode, facts: list[tuple[bool, bool, str, int, int]], build: str
) -> None:
    workers = [Worker(f"w{i}", b, h, n, q) for i, (_, h, b, n, q) in enumerate(facts)]
    avoid = frozenset(w.instance for w, (a, *_) in zip(workers, facts, strict=True) if a)

    def rank(worker: Worker) -> tuple[bool, bool, bool]:
        return (worker.instance in avoid, worker.hesitant, bool(build) and worker.build != build)

    chosen = policy(mode).choose("m", workers, Wish(avoid, build))
    assert chosen is not None
    assert rank(chosen) == min(rank(w) for w in workers)
    if mode == "least-loaded":
        peers = [w for w in workers if rank(w) == rank(chosen)]
        assert chosen.in_flight + chosen.queued == min(w.in_flight + w.queued for w in peers)
