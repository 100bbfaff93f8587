"""The ring: bounded, found by id or label, and what went wrong outlives what went well."""

from __future__ import annotations

from typing import Any

from holdfast.telemetry.explain import KEPT_CHANGES, RequestFacts, Ring, StreamFacts, WorkerChange, story


def stream(attempts: int = 1) -> StreamFacts:
    return StreamFacts(
        choice=0, state="done", finish="stop", error="", join="none", prompt_tokens=3, cached_tokens=0, tokens=5,
        timeline=[(0.1 * i, "attempt", f"w{i}") for i in range(attempts)], considered=[(1, ())] * attempts, offset=0.0,
        ticks=(0, 0), longest=(),
    )  # fmt: skip


def facts(name: str, code: str = "", seconds: float = 1.0, attempts: int = 1, label: str = "") -> RequestFacts:
    return RequestFacts(
        request_id=name, label=label or f"label-{name}", model="m", surface="chat_completions", kind="stream",
        trace_id=name, arrived=10**9, prepared=0.0, seconds=seconds, code=code, fault="", error=code,
        streams=[stream(attempts)],
    )  # fmt: skip


def names(found: list[RequestFacts]) -> list[str]:
    return [one.id for one in found]


def test_failures_and_moves_are_kept_when_good_requests_pass_by() -> None:
    ring = Ring(kept=10, notable=3)
    ring.add(facts("bad", code="no_workers"))
    ring.add(facts("moved", attempts=2))
    for number in range(50):
        ring.add(facts(f"good-{number}"))
    assert names(ring.select(failed=True)) == ["bad"]
    assert names(ring.select(moved=True)) == ["moved"]
    assert ring.find("bad") is not None
    assert ring.find("good-39") is None
    assert names(ring.select(limit=2)) == ["good-49", "good-48"]
    assert len(ring.select(limit=1000)) == 12


def test_a_label_names_the_latest_and_an_id_wins_over_a_label() -> None:
    ring = Ring()
    for name, label in (("a", "same"), ("b", "same"), ("c", "a")):
        ring.add(facts(name, label=label))
    same, named = ring.find("same"), ring.find("b")
    assert same is not None
    assert named is not None
    assert same.id == named.id
    found = ring.find("a")
    assert found is not None
    assert found.id == "a"
    assert names(ring.select(slow=0.5)) == ["c", "b", "a"]
    assert names(ring.select(slow=1.5)) == []


def test_nothing_is_kept_when_nothing_shall_be() -> None:
    ring = Ring(kept=0)
    ring.add(facts("a", code="internal"))
    assert ring.find("a") is None


def test_changes_are_bounded_and_chosen_by_time() -> None:
    ring = Ring()
    for at in range(KEPT_CHANGES + 100):
        ring.changed(WorkerChange(at, "w", "suspect", "peer_silent", "no pong"))
    assert [change.at for change in ring.changes(0, 101)] == [100, 101]


def test_a_request_that_never_had_a_stream_has_a_story_too() -> None:
    one = facts("a", code="invalid_request")
    one.streams = ()
    told: dict[str, Any] = story(one, [], lambda _: "then")
    assert told["stages"] == [{"stage": "preprocess", "at": 0.0, "seconds": 1.0}]
    assert told["error"]["code"] == "invalid_request"


def test_a_request_whose_prompt_is_being_computed_elsewhere_can_be_explained() -> None:
    one = facts("waiting", attempts=0)
    one.streams[0].timeline = [(0.1, "prefill", "p1"), (0.2, "prefill accepted", "")]
    told = story(one, [], str)
    assert told["choices"][0]["attempts"] == []
    assert [stage["stage"] for stage in told["stages"]] == ["preprocess", "route", "remote prefill", "finish"]
