"""Claims: what was sent counts at once, is counted once when the pong knows it, and is gone when it is over."""

from __future__ import annotations

from array import array
from dataclasses import dataclass

from hypothesis import given
from hypothesis import strategies as st

from holdfast.kv.hashes import sequence_hashes
from holdfast.routing.claims import Claim, Ledger, Output
from holdfast.routing.saturation import RankLoad
from holdfast.wire.frames import Load, Pong, Progress

BLOCK = 16


@dataclass
class Worker:
    instance: str = "w"
    epoch: int = 1
    pong: Pong | None = None

    def say(self, last_open: int = 0, used: int = 0, prefill: int = 0, ranks: tuple[Load, ...] = ()) -> None:
        self.pong = Pong(0, Progress(), Load(0, 0, used, 100, prefill, ranks), last_open)


def load(ledger: Ledger, worker: Worker) -> RankLoad:
    (only,) = ledger.loads(worker, BLOCK, 100, 1)
    assert only is not None
    return only


def test_nothing_known_is_no_observation() -> None:
    assert Ledger().loads(Worker(), BLOCK, 100, 2) == [None, None]


def test_a_burst_counts_before_any_pong() -> None:
    ledger, worker = Ledger(), Worker()
    for _ in range(3):
        ledger.take(worker, 33, BLOCK)
    assert load(ledger, worker) == RankLoad(9, 100, 99)


def test_the_pong_takes_over_what_it_includes() -> None:
    ledger, worker = Ledger(), Worker()
    claims = [ledger.take(worker, 32, BLOCK) for _ in range(3)]
    for number, claim in enumerate(claims, 1):
        claim.sent(number)
    worker.say(last_open=2, used=3, prefill=16)
    assert load(ledger, worker) == RankLoad(3 + 1 + 2, 100, 16 + 32)


def test_what_ends_between_pongs_is_taken_off_again() -> None:
    ledger, worker = Ledger(), Worker()
    claim = ledger.take(worker, 32, BLOCK)
    claim.sent(1)
    worker.say(last_open=1, used=2, prefill=32)
    assert load(ledger, worker) == RankLoad(4, 100, 32)
    claim.computed()
    assert load(ledger, worker).prefill_tokens == 0
    claim.release()
    claim.release()
    assert load(ledger, worker) == RankLoad(2, 100, 0)
    worker.say(last_open=1)
    assert load(ledger, worker) == RankLoad(0, 100, 0), "and only once: the next pong knows it itself"
    assert ledger.held() == 0


def test_one_that_was_computed_before_the_pong_is_taken_off_with_all_that_it_grew_to() -> None:
    ledger, worker = Ledger(), Worker()
    claim = ledger.take(worker, 30, BLOCK)
    claim.sent(1)
    claim.computed()
    worker.say(last_open=1, used=4)
    claim.release(60)
    assert load(ledger, worker) == RankLoad(0, 100, 0)


def test_ranks() -> None:
    ledger, worker = Ledger(), Worker()
    worker.say(
        used=70, ranks=(Load(kv_used_blocks=60, kv_total_blocks=64), Load(kv_used_blocks=10, kv_total_blocks=64))
    )
    assert ledger.loads(worker, BLOCK, 64, 3) == [RankLoad(60, 64), RankLoad(10, 64), None]
    ledger.take(worker, BLOCK * 4, BLOCK)
    assert ledger.loads(worker, BLOCK, 64, 2) == [RankLoad(62, 64, 32), RankLoad(12, 64, 32)], "spread evenly"


def test_accounts_of_dead_processes_do_not_pile_up() -> None:
    ledger = Ledger()
    for epoch in range(100):
        ledger.take(Worker(epoch=epoch), 1, BLOCK).release()
    assert len(ledger._accounts) <= 1


@given(st.lists(st.tuples(st.sampled_from(["take", "compute", "release", "pong"]), st.integers(0, 9)), max_size=60))
def test_never_negative_never_less_than_the_unseen_and_zero_at_rest(steps: list[tuple[str, int]]) -> None:
    ledger, worker = Ledger(), Worker()
    live: list[Claim] = []
    sent = 0
    unseen: set[Claim] = set()
    for what, number in steps:
        if what == "take":
            claim = ledger.take(worker, 10 + number, BLOCK)
            sent += 1
            claim.sent(sent)
            live.append(claim)
            unseen.add(claim)
        elif what == "pong":
            worker.say(last_open=sent - number, used=number, prefill=number)
            unseen = {c for c in unseen if c.stream > sent - number}
        elif live:
            claim = live[number % len(live)]
            if what == "compute":
                claim.computed()
            else:
                claim.release()
                live.remove(claim)
                unseen.discard(claim)
        if worker.pong is not None or live:
            now = load(ledger, worker)
            assert now.active_blocks >= sum(c.blocks for c in unseen)
            assert now.prefill_tokens >= sum(c.tokens for c in unseen)
    for claim in live:
        claim.release()
    worker.say(last_open=sent)
    assert load(ledger, worker) == RankLoad(0, 100, 0)
    assert ledger.held() == 0


PROMPTS = st.lists(st.integers(0, 1), min_size=0, max_size=5)


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["take", "take", "compute", "release", "pong", "restart"]), PROMPTS, st.integers(0, 9)
        ),
        max_size=60,
    )
)
def test_sums_are_exact_under_any_order_and_zero_at_rest(steps: list[tuple[str, list[int], int]]) -> None:
    """Against a model that counts from scratch: distinct blocks per rank, tokens to compute, requests, and what of
    them the worker's report includes."""
    ledger, worker = Ledger(), Worker()
    live: list[tuple[Claim, int, int, array[int], int]] = []
    """Claim, epoch, rank, hashes, private blocks."""
    sent = 0
    for what, blocks, number in steps:
        rank = number % 2
        if what == "take":
            hashes = sequence_hashes(block + 1 for block in blocks)
            private = number % 3
            length = (len(blocks) + private) * BLOCK
            claim = ledger.take(worker, length, BLOCK, rank=rank, cached=number, hashes=hashes)
            sent += 1
            claim.sent(sent)
            live.append((claim, worker.epoch, rank, hashes, private))
        elif what == "pong":
            seen = [one for one in live if one[1] == worker.epoch and one[0].stream <= sent - number]
            said = [_truth(seen, worker.epoch, at) for at in range(2)]
            worker.say(sent - number, ranks=tuple(Load(r, 0, b, 100, 0) for b, _, r in said))
        elif what == "restart":
            worker.epoch += 1
            worker.pong = None
        elif live and what == "compute":
            live[number % len(live)][0].computed()
        elif live:
            live.pop(number % len(live))[0].release()
        for at in range(2):
            truth = _truth(live, worker.epoch, at)
            assert ledger.sums(worker, at) == truth
            estimate = ledger.estimate(worker, at, BLOCK, 2)
            assert (estimate.blocks, estimate.requests) == (truth[0], truth[2]), "reported - ours in it + ours now"
    for claim, *_ in live:
        claim.release()
    assert ledger.held() == 0
    assert [ledger.sums(worker, at) for at in range(2)] == [(0, 0, 0)] * 2


def _truth(live: list[tuple[Claim, int, int, array[int], int]], epoch: int, rank: int) -> tuple[int, int, int]:
    mine = [one for one in live if one[1] == epoch and one[2] == rank]
    union = {h for *_, hashes, _ in mine for h in hashes}
    return len(union) + sum(private for *_, private in mine), sum(one[0].tokens for one in mine), len(mine)


def test_what_other_frontends_have_there_counts_after_their_first_report() -> None:
    ledger, other, worker = Ledger(), Ledger(), Worker()
    ours = ledger.take(worker, 64, BLOCK, rank=0)
    ours.sent(1)
    theirs = other.take(worker, 160, BLOCK, rank=0)
    theirs.sent(1)
    assert ledger.estimate(worker, 0, BLOCK, 1).blocks == 4
    worker.pong = Pong(0, Progress(), Load(2, 0, 14, 100, 0), 1)
    assert ledger.estimate(worker, 0, BLOCK, 1) == (14, 0, 2)
    assert other.estimate(worker, 0, BLOCK, 1) == (14, 0, 2)
    ours.release()
    assert ledger.estimate(worker, 0, BLOCK, 1).blocks <= 10
    assert other.estimate(worker, 0, BLOCK, 1) == (14, 0, 2), "until the next report"


class Answer:
    """A stream that generates; ``claim`` once it has one."""

    def __init__(self, ledger: Ledger, worker: Worker, length: int, number: int, *, before: int = 0, expected: int = 0):
        self.count, self.length = before, length
        self.claim = ledger.take(worker, length, BLOCK, rank=0)
        self.claim.follow(Output(lambda: self.count, before, expected))
        self.claim.sent(number)
        self.began = before

    @property
    def blocks(self) -> int:
        """What an engine holds for it: room for one token more, once there is output."""
        more = self.count - self.began
        return -(-(self.length + more + (more > 0)) // BLOCK)


@given(
    st.lists(st.tuples(st.sampled_from(["take", "grow", "grow", "release", "pong"]), st.integers(0, 40)), max_size=60)
)
def test_followed_output_is_exact_between_reports_too(steps: list[tuple[str, int]]) -> None:
    """Against an engine that reports what it really holds, at whatever moments."""
    ledger, worker = Ledger(), Worker()
    live: list[Answer] = []
    sent = 0
    for what, number in steps:
        if what == "take":
            sent += 1
            live.append(Answer(ledger, worker, 10 + number, sent, before=number % 3))
        elif what == "pong":
            worker.pong = Pong(0, Progress(), Load(len(live), 0, sum(a.blocks for a in live), 100, 0), sent)
        elif live and what == "grow":
            live[number % len(live)].count += number
        elif live:
            one = live.pop(number % len(live))
            one.claim.release(one.length + one.count - one.began)
        truth = sum(one.blocks for one in live)
        assert ledger.estimate(worker, 0, BLOCK, 1).blocks == truth
        if worker.pong is not None:
            assert load(ledger, worker).active_blocks == truth
    for one in live:
        one.claim.release(one.length)
    assert ledger.held() == 0
    assert not any(account.growing for account in ledger._accounts.values())


def test_output_counts_for_an_engine_that_reports_nothing() -> None:
    ledger, worker = Ledger(), Worker()
    one = Answer(ledger, worker, 32, 1)
    one.count = 40
    worker.pong = Pong(0, Progress(), Load(), 1)
    assert ledger.estimate(worker, 0, BLOCK, 1).blocks == 5


def test_an_answer_near_its_announced_end_counts_less_but_what_others_share_counts_in_full() -> None:
    ledger, worker = Ledger(), Worker()
    shared = sequence_hashes([1, 2, 3, 4])
    counts = [0, 0]
    for number, hashes in enumerate((shared, sequence_hashes([1, 2, 9, 9]))):
        claim = ledger.take(worker, 4 * BLOCK, BLOCK, rank=0, hashes=hashes)
        claim.follow(Output(lambda number=number: counts[number], 0, 64 if not number else 0))
    assert ledger.estimate(worker, 0, BLOCK, 1).blocks == 6
    counts[0] = 48
    assert ledger.estimate(worker, 0, BLOCK, 1).blocks == 6 + 4 - round((2 + 4) * 48 / 64), "own: 2 of 4, and output"
    counts[0] = 500
    assert ledger.estimate(worker, 0, BLOCK, 1).blocks == 2 + 2, "an answer longer than announced is never negative"
    counts[1] = 16
    assert ledger.estimate(worker, 0, BLOCK, 1).blocks == 2 + 2 + 2, "where nobody said how long: in full"
    (seen,) = ledger.loads(worker, BLOCK, 100, 1)
    assert seen is None or seen.active_blocks > 30, "a threshold sees what is really there"
