"""Who is let in, who gives way, and what a step is made of."""

import pytest

from holdfast.base.ids import SequenceKey
from holdfast.engines.contract import pack_ids
from holdfast.engines.mock.cache import BlockPool
from holdfast.engines.mock.config import MockConfig
from holdfast.engines.mock.directives import NONE
from holdfast.engines.mock.scheduler import Batch, Scheduler
from holdfast.engines.mock.sequence import Sequence
from holdfast.engines.mock.validate import _surely_below
from holdfast.engines.mock.vocabulary import vocabulary
from tests.engines.mock.mockrun import request

BLOCK = 4


class Bench:
    """A scheduler without an engine: a step computes its batch and gives a token to who is done with the prompt."""

    def __init__(self, blocks: int, **options: object):
        self.config = MockConfig(num_blocks=blocks, block_size=BLOCK, **options)  # type: ignore[arg-type]
        self.pool = BlockPool(blocks, BLOCK)
        self.scheduler = Scheduler(self.config, self.pool)
        self._count = 0

    def add(self, tokens: int, first: int = 0) -> Sequence:
        self._count += 1
        wanted = request(max_tokens=1000)
        ids = pack_ids([first + self._count * 1000 % 3000 + at % 900 for at in range(tokens)])
        wanted = type(wanted)(wanted.request_id, wanted.model, ids, wanted.sampling, wanted.stop)
        sequence = Sequence(SequenceKey(self._count), wanted, vocabulary(), NONE, eos_chance=0.0, room=10_000)
        self.scheduler.add(sequence)
        return sequence

    def step(self) -> Batch:
        batch = self.scheduler.next_batch()
        for sequence in batch.sequences:
            sequence.advance(self.pool, sequence.scheduled, seal=True)
            if sequence.computed == len(sequence.ids):
                sequence.ids.append(7)
        return batch

    @property
    def running(self) -> list[int]:
        return list(self.scheduler.running)


def test_a_step_counts_what_it_costs():
    bench = Bench(100, max_num_batched_tokens=20)
    bench.add(10)
    bench.step()
    bench.add(30)
    batch = bench.step()
    assert (batch.decoding, batch.context, batch.prefill_tokens) == (1, 10, 19)
    assert batch.pairs == 19 * 9.5
    batch = bench.step()
    assert (batch.decoding, batch.context, batch.prefill_tokens) == (1, 11, 11)
    assert batch.pairs == 11 * (19 + 5.5)


def test_the_watermark_admits_whole_prompts_only_and_keeps_blocks_free():
    bench = Bench(20, watermark=0.25, max_num_batched_tokens=8)
    bench.add(24)
    bench.step()
    bench.add(40)  # 10 blocks: 20 - 2 - 10 leaves 8 at first, then the first one's 6 are there: 4 < 5
    bench.step()
    bench.step()
    bench.step()
    assert bench.running == [1]
    bench.scheduler.remove(bench.scheduler.running[SequenceKey(1)])
    bench.step()
    assert bench.running == [2]


def test_without_a_watermark_the_first_chunk_decides():
    bench = Bench(20, max_num_batched_tokens=8)
    bench.add(24)
    for _ in range(3):
        bench.step()
    bench.add(70)
    bench.step()
    assert bench.running == [1, 2]


def test_one_that_is_alone_is_let_in_whatever_the_watermark():
    bench = Bench(10, watermark=0.5)
    bench.add(36)
    bench.step()
    assert bench.running == [1]


def test_who_does_not_fit_is_asked_again_only_when_there_is_more(monkeypatch: pytest.MonkeyPatch):
    bench = Bench(12)
    bench.add(30)
    bench.step()
    bench.add(30)
    asked = 0
    adopt = Sequence.adopt_prefix

    def counted(sequence: Sequence, pool: BlockPool) -> None:
        nonlocal asked
        asked += 1
        adopt(sequence, pool)

    monkeypatch.setattr(Sequence, "adopt_prefix", counted)
    for _ in range(10):
        bench.step()
    assert asked == 1
    bench.scheduler.remove(bench.scheduler.running[SequenceKey(1)])
    bench.step()
    assert bench.running == [2]


@pytest.mark.parametrize(("twins", "running"), [(True, [1, 2]), (False, [1])])
def test_who_does_not_fit_is_asked_again_when_its_prefix_was_computed(twins: bool, running: list[int]):
    bench = Bench(10, max_num_batched_tokens=46)
    first, second = bench.add(30), bench.add(30)
    if twins:
        second.ids[:] = first.ids
    bench.step()
    assert bench.running == [1]
    assert second.cached_tokens is None
    bench.step()
    assert bench.running == running
    assert second.cached_tokens == (28 if twins else None)


def test_who_does_not_fit_is_asked_again_for_a_smaller_chunk():
    bench = Bench(10, max_num_batched_tokens=32)
    bench.add(16)
    bench.step()
    bench.add(30)
    bench.step()
    assert bench.running == [1]
    small = Batch()
    small.prefill_tokens = 24
    bench.scheduler.top_up(small)
    assert bench.running == [1, 2]


@pytest.mark.parametrize(("preemption", "victim"), [("lifo", 2), ("fifo", 1)])
def test_out_of_blocks_one_gives_way_and_comes_back_first(preemption: str, victim: int):
    bench = Bench(8, preemption=preemption)
    bench.add(15)
    bench.add(15)
    bench.step()
    while not bench.scheduler.preemptions:
        bench.step()
    assert [sequence.key for sequence in bench.scheduler.waiting] == [victim]
    assert bench.scheduler.waiting[0].computed == 0
    bench.scheduler.remove(next(iter(bench.scheduler.running.values())))
    bench.step()
    assert bench.running == [victim]
    # its own blocks were still in the cache, as far as they had not been taken
    assert bench.scheduler.running[SequenceKey(victim)].computed > 0


@pytest.mark.parametrize(
    ("ids", "limit", "sure"),
    [([0, 1, 5887], 6000, True), ([5888], 6000, False), ([6000], 6000, False), ([65_536], 6000, False),
     ([1 << 24], 6000, False), ([255], 256, True), ([], 6000, True), ([70_000], 100_000, False)],
)  # fmt: skip
def test_ids_that_are_surely_known(ids: list[int], limit: int, sure: bool):
    assert _surely_below(pack_ids(ids), limit) is sure
