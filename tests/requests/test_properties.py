"""Whatever happens to workers and clients, the promises hold; and the oracles notice when they would not."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from holdfast.base.errors import StreamIncomplete
from holdfast.engines.contract import pack_ids
from holdfast.requests import poison
from holdfast.requests.attempt import Attempt
from holdfast.requests.driver import Driver
from holdfast.requests.generation import Generation
from holdfast.requests.leases import Lease
from holdfast.requests.need import Placed
from tests.requests import test_cancel, test_join, test_poison_streams
from tests.requests.scripts import CLIENT_FAULTS, WORKER_FAULTS, Act, Script, random_script, run_script


@st.composite
def scripts(draw: st.DrawFn) -> Script:
    workers = draw(st.integers(1, 4))
    clients = draw(
        st.lists(st.tuples(st.integers(0, 300), st.integers(1, 60), st.sampled_from((1, 1, 2))), min_size=1, max_size=6)
    )
    on_workers = st.builds(Act, st.integers(0, 900), st.integers(0, workers - 1), st.sampled_from(WORKER_FAULTS))
    on_clients = st.builds(Act, st.integers(0, 900), st.integers(0, len(clients) - 1), st.sampled_from(CLIENT_FAULTS))
    acts = draw(st.lists(st.one_of(on_workers, on_clients), max_size=14))
    return Script(workers, tuple(clients), tuple(acts))


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)
@given(scripts())
def test_the_promises_hold_under_random_faults(script: Script) -> None:
    run_script(script)


@pytest.mark.slow
@settings(max_examples=3_000, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(scripts())
def test_the_promises_hold_under_very_many_random_faults(script: Script) -> None:
    run_script(script)


def test_a_script_is_replayed_exactly() -> None:
    one, two = run_script(random_script(7)), run_script(random_script(7))
    assert [e.endings for c in one.clients for e in c.sinks] != []
    assert [[t[:2] for t in g.timeline] for c in one.clients for g in c.request.streams] == [
        [t[:2] for t in g.timeline] for c in two.clients for g in c.request.streams
    ]


# planted mistakes: each one is made, and the oracles must notice it


def caught(by: str, seeds: int = 60) -> None:
    """Run scripts until an oracle complains, and check that it is the right one."""
    seen = []
    for seed in range(seeds):
        try:
            run_script(random_script(seed))
        except (AssertionError, TimeoutError) as error:
            if by in str(error):
                return
            seen.append(str(error).split("\n")[0])
    pytest.fail(f"no oracle said {by!r}; heard: {seen}")


def test_without_a_mistake_the_same_scripts_pass() -> None:
    for seed in range(60):
        run_script(random_script(seed))


def test_planted_lease_given_back_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    def release(self: Placed) -> None:
        book = self.lease._book
        assert book is not None
        book._returned(self.lease)
        self.end_trial()
        book._sums[self.lease.kind] -= 1

    monkeypatch.setattr(Placed, "release", release)
    caught("P4")


def test_planted_lease_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    release = Lease.release

    def forgetful(self: Lease) -> None:
        if self.kind != "waiting":
            release(self)

    monkeypatch.setattr(Lease, "release", forgetful)
    caught("P4")


def test_planted_trial_that_is_never_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Placed, "release", lambda self: self.lease.release())
    monkeypatch.setattr(Placed, "end_trial", lambda self: None)
    caught("P4")


def test_planted_continuation_that_begins_one_too_early(monkeypatch: pytest.MonkeyPatch) -> None:
    """Overlap is dropped, so the client would never see this one: the worker's side must."""
    generated = Generation.generated_bytes

    def short(self: Generation) -> bytes:
        ids = generated(self)
        return ids[:-8] + ids[-4:]

    monkeypatch.setattr(Generation, "generated_bytes", short)
    caught("P1")


def test_planted_continuation_with_pending_tokens_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    def delivered_only(self: Generation) -> bytes:
        return pack_ids(self.generated[: self.delivered - 1] if self.delivered else ())

    plain = Attempt.on_tokens

    def trusting(self: Attempt, index: int, tokens: list[int], logprobs: None) -> None:
        if self.generation.attempt is self:
            plain(self, self.generation.count, tokens, logprobs)

    monkeypatch.setattr(Generation, "generated_bytes", delivered_only)
    monkeypatch.setattr(Attempt, "on_tokens", trusting)
    caught("P1")


def test_planted_overlap_off_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = Attempt.on_tokens

    def off_by_one(self: Attempt, index: int, tokens: list[int], logprobs: None) -> None:
        at = self.generation.count
        if 0 < index < at and self.generation.attempt is self:
            plain(self, at, tokens[at - index - 1 :], logprobs)
        else:
            plain(self, index, tokens, logprobs)

    monkeypatch.setattr(Attempt, "on_tokens", off_by_one)
    caught("P1")


def test_planted_gap_that_is_joined(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = Attempt.on_tokens

    def gapless(self: Attempt, index: int, tokens: list[int], logprobs: None) -> None:
        plain(self, min(index, self.generation.count), tokens, logprobs)

    monkeypatch.setattr(Attempt, "on_tokens", gapless)
    caught("P1")


def test_planted_end_that_is_believed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Generation, "doubt", lambda self, finish: None)
    caught("P1: ended by 'length' before the length")


def test_planted_second_terminal_event(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = Generation._conclude

    def twice(self: Generation, state: str, finish: str, error: object) -> None:
        before = self.ended
        plain(self, state, finish, error)  # type: ignore[arg-type]
        if before is not None:
            self._output.ended(before)

    monkeypatch.setattr(Generation, "_conclude", twice)
    caught("P2")


def test_planted_usage_that_counts_the_overlap(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = Driver.moved_on

    def inflating(self: Driver, attempt: Attempt, tokens: int) -> None:
        plain(self, attempt, tokens)
        self._generation.delivered += 1

    monkeypatch.setattr(Driver, "moved_on", inflating)
    caught("P3")


def test_planted_early_completion(monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker's death is taken for the end."""

    def complete(self: Generation, error: Exception) -> bool:
        if self.count and not isinstance(error, StreamIncomplete):
            self.worker_ended("length", 0)
            asyncio.get_running_loop().call_soon(self.flusher.flush)
            return True
        return False

    monkeypatch.setattr(Generation, "complete", complete)
    caught("P1: ended by 'length' before the length")


def fails(test: Callable[[], None]) -> bool:
    try:
        test()
    except AssertionError:
        return True
    return False


def test_planted_stale_attempt_that_still_writes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its tokens are foreign here: a pure engine would say the same ones and hide the mistake."""
    assert not fails(test_join.test_late_words_of_an_abandoned_attempt_are_dropped)
    plain = Attempt.on_tokens

    def stale(self: Attempt, index: int, tokens: list[int], logprobs: None) -> None:
        current, self.generation.attempt = self.generation.attempt, self
        plain(self, index, tokens, logprobs)
        if self.generation.attempt is self:
            self.generation.attempt = current

    monkeypatch.setattr(Attempt, "on_tokens", stale)
    assert fails(test_join.test_late_words_of_an_abandoned_attempt_are_dropped)


def test_planted_pending_move_that_survives_its_cancel(monkeypatch: pytest.MonkeyPatch) -> None:
    def cancelled_in_the_pacer() -> None:
        test_cancel.test_cancel(test_cancel.waiting_for_a_replacement, 2)

    assert not fails(cancelled_in_the_pacer)
    monkeypatch.setattr(Driver, "interrupt", lambda self: None)
    with pytest.raises((AssertionError, TimeoutError)):
        cancelled_in_the_pacer()


def test_planted_quarantine_that_lets_everybody_in(monkeypatch: pytest.MonkeyPatch) -> None:
    def killer() -> None:
        test_poison_streams.test_a_killer_prompt_costs_two_workers_and_one_stream(0, 0.0, 0.5)

    assert not fails(killer)
    monkeypatch.setattr(poison.Record, "suspect", property(lambda self: False))
    assert fails(killer)


def test_planted_inquest_that_convicts_everybody(monkeypatch: pytest.MonkeyPatch) -> None:
    def killer() -> None:
        test_poison_streams.test_a_killer_that_dies_at_a_fixed_token_costs_three_workers_and_one_stream(5)

    assert not fails(killer)
    plain = poison.Inquest.settle

    def harsh(self: poison.Inquest, record: poison.Record) -> bool:
        record.convicted = record.known >= poison.POISON_DEATHS
        return plain(self, record)

    monkeypatch.setattr(poison.Inquest, "settle", harsh)
    assert fails(killer)
