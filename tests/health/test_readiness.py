"""The readiness rule, step by step: every way to be not ready names what is missing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from holdfast.health.readiness import Readiness

Setup = Callable[[Readiness], Any]


def passed(readiness: Readiness, name: str = "generate") -> None:
    readiness.succeeded(name, readiness.target(name))


def served(readiness: Readiness) -> None:
    readiness.endpoint("artifact")
    readiness.serve()


def both(readiness: Readiness) -> None:
    passed(readiness, "a")
    readiness.target("b")


def held(readiness: Readiness) -> None:
    passed(readiness)
    readiness.hold("leaving", "this worker is draining")


RULES: list[tuple[str, dict[str, Any], Setup, bool, list[str]]] = [
    # name, settings, what happened, ready, words that the reasons must contain
    ("nothing yet", {}, lambda r: None, False, ["starting"]),
    ("nothing yet, and that counts as ready", {"starting": "ready"}, lambda r: None, True, []),
    ("loading", {}, lambda r: r.stage("the engine is loading: weights 40 %"), False, ["weights 40 %"]),
    ("served, nothing to probe", {}, served, True, []),
    ("served, nothing to probe, canaries on", {"canary": True}, served, True, []),
    ("a target that never answered", {}, lambda r: r.target("generate"), False, ["generate", "no successful probe"]),
    ("a target beats the plain status", {"starting": "ready"}, lambda r: r.target("generate"), False, ["generate"]),
    ("a target that answered", {}, passed, True, []),
    ("one of two targets", {}, both, False, ["endpoint b"]),
    ("listed: only that one counts", {"listed": ("a",)}, both, True, []),
    ("listed: all of them", {"listed": ("a", "b")}, both, False, ["endpoint b"]),
    ("listed without a target", {"listed": ("artifact",)}, served, True, []),
    ("listed, not served", {"listed": ("chat",)}, served, False, ["chat", "HEALTH_STATUS", "serves artifact"]),
    ("listed, loading", {"listed": ("g",)}, lambda r: r.stage("loading 3 %"), False, ["g is not served yet: loading"]),
    ("listed beats starting as ready", {"listed": ("g",), "starting": "ready"}, lambda r: None, False, ["g"]),
    ("a hold beats everything", {"listed": ("generate",)}, held, False, ["draining"]),
]


@pytest.mark.parametrize(("name", "settings", "setup", "ready", "words"), RULES, ids=[rule[0] for rule in RULES])
def test_the_rule(name: str, settings: dict[str, Any], setup: Setup, ready: bool, words: list[str]) -> None:
    readiness = Readiness(**settings)
    setup(readiness)
    verdict = readiness.verdict
    assert verdict.ready is ready
    assert verdict.status == ("ready" if ready else "notready")
    assert bool(verdict.reasons) is not ready
    for word in words:
        assert any(word in reason for reason in verdict.reasons), verdict.reasons


@pytest.mark.parametrize(
    ("failures", "successes", "results", "states"),
    [
        (2, 1, "gbbg", "++-+"),
        (2, 1, "gbgbgb", "++++++"),
        (1, 1, "gbg", "+-+"),
        (3, 2, "gggbbbgbgg", "-++++----+"),
        (2, 1, "bbb", "---"),
    ],
)
def test_results_count_when_consecutive(failures: int, successes: int, results: str, states: str) -> None:
    readiness = Readiness(failures=failures, successes=successes)
    registration = readiness.target("generate")
    seen = ""
    for result in results:
        if result == "g":
            readiness.succeeded("generate", registration)
        else:
            readiness.failed("generate", registration, "no token within 3 s")
        seen += "+" if readiness.is_ready("generate") else "-"
    assert seen == states
    if seen[-1] == "-":
        assert readiness.verdict.endpoints == {"generate": "notready"}


def test_a_stall_is_a_verdict_by_itself_and_says_so() -> None:
    readiness = Readiness(failures=5)
    registration = readiness.target("generate")
    readiness.succeeded("generate", registration)
    readiness.failed("generate", registration, "no progress for 61.0 s", final=True)
    assert readiness.verdict.reasons == ("endpoint generate: no progress for 61.0 s",)


def test_results_of_an_earlier_registration_do_not_count() -> None:
    readiness = Readiness()
    old = readiness.target("generate")
    new = readiness.target("generate")
    readiness.succeeded("generate", old)
    assert not readiness.is_ready("generate")
    readiness.succeeded("generate", new)
    for _ in range(5):
        readiness.failed("generate", old, "late")
    assert readiness.is_ready("generate")
    readiness.remove("generate")
    readiness.succeeded("generate", new)
    assert readiness.verdict.endpoints == {}


def test_every_change_is_told_once() -> None:
    told: list[bool] = []
    readiness = Readiness(on_change=lambda verdict: told.append(verdict.ready))
    registration = readiness.target("generate")
    told.clear()
    for _ in range(3):
        readiness.succeeded("generate", registration)
    assert told == [True]
    readiness.hold("a", "first")
    readiness.hold("a", "first")
    readiness.release("a")
    readiness.release("a")
    assert told == [True, False, True]


def test_holds_add_up() -> None:
    readiness = Readiness(starting="ready")
    readiness.hold("a", "first")
    readiness.hold("b", "second")
    readiness.release("a")
    assert readiness.verdict.reasons == ("second",)
    readiness.release("b")
    assert readiness.verdict.ready
