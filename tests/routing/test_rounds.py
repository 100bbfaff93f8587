"""Deficit round robin: shares by quantum whatever requests cost, and everybody's turn comes."""

from __future__ import annotations

import random
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from holdfast.routing.rounds import Rounds

QUANTA = st.lists(st.integers(1, 8192), min_size=1, max_size=5)


def names(quanta: list[int]) -> dict[str, int]:
    return {f"c{number}": quantum for number, quantum in enumerate(quanta)}


@pytest.mark.parametrize("cheap", [False, True])
def test_classes_that_always_wait_are_served_in_proportion_to_their_quanta(cheap: bool) -> None:
    quanta = {"batch": 1000, "chat": 4000, "tiny": 1000}
    rng = random.Random(1)
    rounds, got = Rounds(quanta), Counter[str]()
    heads = {name: rng.randint(1, 20_000) for name in quanta}
    for _ in range(30_000):
        name = rounds.order(heads)[0]
        rounds.served(name, heads)
        got[name] += heads[name]
        heads[name] = 10 if cheap and name == "tiny" else rng.randint(1, 20_000)
    assert got["chat"] / got["batch"] == pytest.approx(4, rel=0.1)
    assert got["tiny"] / got["batch"] == pytest.approx(1, rel=0.1), "not requests but tokens are shared out"


@given(QUANTA, st.integers(0, 2**32), st.integers(1, 100))
def test_nobody_starves(quanta: list[int], seed: int, rounds_wanted: int) -> None:
    """A class is served before any other one has got more than its share of the rounds that its request takes."""
    rng = random.Random(seed)
    shares = names(quanta)
    rounds, mine, got = Rounds(shares), "c0", Counter[str]()
    turns, cost = rounds_wanted, rounds_wanted * shares[mine]
    heads = {name: cost if name == mine else rng.randint(1, 5000) for name in shares}
    for _ in range(20_000):
        name = rounds.order(heads)[0]
        rounds.served(name, heads)
        if name == mine:
            return
        got[name] += heads[name]
        assert got[name] <= shares[name] * turns + 5000 + shares[name]
        heads[name] = rng.randint(shares[name] // 4 + 1, 5000 + shares[name])
    raise AssertionError("starved")


def test_who_stops_waiting_keeps_nothing() -> None:
    rounds = Rounds({"a": 10, "b": 10})
    for _ in range(5):
        rounds.served("a", {"a": 10, "b": 1000})
    rounds.served("a", {"a": 10})
    assert rounds.order({"a": 10, "b": 20})[0] == "a", "what b had saved went when it had nobody waiting"


def test_who_may_not_be_served_saves_no_more_than_its_request_costs_and_one_round() -> None:
    rounds = Rounds({"a": 10, "b": 10})
    for _ in range(1000):
        rounds.served("a", {"a": 10, "b": 30})
    served = 0
    while rounds.order({"a": 10, "b": 30})[0] == "b":
        rounds.served("b", {"a": 10, "b": 30})
        served += 1
    assert served == 1


@given(QUANTA, st.lists(st.tuples(st.integers(0, 4), st.integers(1, 50_000)), max_size=60))
def test_the_order_names_each_that_waits_once(quanta: list[int], steps: list[tuple[int, int]]) -> None:
    shares = names(quanta)
    rounds = Rounds(shares)
    for which, cost in steps:
        heads = {name: cost + place for place, name in enumerate(shares) if place != which}
        order = rounds.order(heads)
        assert sorted(order) == sorted(heads)
        if order:
            rounds.served(order[which % len(order)], heads)
