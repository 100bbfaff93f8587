"""Where an attempt is cut, the next one continues: exactly there, whichever way and wherever it was cut."""

from __future__ import annotations

import asyncio

import pytest

from holdfast.base.errors import Disconnected, EngineFailed, PeerSilent, StreamIncomplete, WorkerDraining
from holdfast.engines.contract import Sampling
from holdfast.runtime.streams import NO_LOGPROB
from tests.requests.fakes import EOS, Client, FakeStream, Fleet, card, settle, truth
from tests.support.virtual_time import virtual

LENGTH = 6


async def started(fleet: Fleet, **kwargs: object) -> tuple[Client, FakeStream]:
    client = fleet.start(length=LENGTH, **kwargs)
    await settle()
    return client, fleet.attempts[-1]


def finish(stream: FakeStream) -> None:
    stream.accept()
    left = LENGTH - len(stream.ids)
    for _ in range(left):
        stream.emit()
    stream.end("length", cached=3)


CUTS = {
    "crash": lambda s: s.breaks(Disconnected("reset")),
    "frozen": lambda s: s.breaks(PeerSilent("silent")),
    "engine error": lambda s: s.end("error", EngineFailed("boom")),
    "abort": lambda s: s.end("abort"),
    "no reason": lambda s: s.end(""),
    "cancelled by the worker": lambda s: s.end("cancelled"),
    "length too soon": lambda s: s.end("length"),
    "drained": lambda s: s.end("error", WorkerDraining("leaving")),
    "broken stream": lambda s: s.breaks(StreamIncomplete("gap on the wire")),
}


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("at", range(LENGTH))
@virtual
async def test_exact_at_every_cut(cut: str, at: int) -> None:
    fleet = Fleet()
    client, first = await started(fleet)
    first.accept()
    for _ in range(at):
        first.emit()
    CUTS[cut](first)
    await settle()
    second = fleet.attempts[-1]
    assert second is not first
    assert second.worker is not first.worker
    assert second.ids == truth(client.plans[0].prompt_ids, at)
    assert (second.request.attempt, second.request.prompt_ids) == (2, client.plans[0].prompt_ids)
    finish(second)
    ending = await client.done()
    assert client.sink.tokens == truth(client.plans[0].prompt_ids, LENGTH)
    assert (ending.state, ending.finish, ending.attempts, len(ending.moves)) == ("done", "length", 2, 1)
    assert ending.join == ("exact" if at else "none")
    assert ending.cached_tokens == 3
    assert fleet.leases() == {}
    assert first.over


@pytest.mark.parametrize("cut", ["crash", "frozen"])
@virtual
async def test_cut_before_accept(cut: str) -> None:
    fleet = Fleet()
    client, first = await started(fleet)
    CUTS[cut](first)
    await settle()
    finish(fleet.attempts[-1])
    ending = await client.done()
    assert (ending.state, ending.attempts, ending.join) == ("done", 2, "none")
    assert fleet.leases() == {}


@pytest.mark.parametrize("cut", CUTS)
@virtual
async def test_after_the_last_token_nothing_is_missing(cut: str) -> None:
    fleet = Fleet()
    client, first = await started(fleet)
    first.accept().emit(LENGTH - 1)
    with fleet.read():
        first.emit()
        CUTS[cut](first)
    ending = await client.done()
    assert (ending.state, ending.finish, ending.attempts) == ("done", "length", 1)
    assert client.sink.tokens == truth(client.plans[0].prompt_ids, LENGTH)
    assert fleet.leases() == {}


@virtual
async def test_after_the_end_of_sequence_token_nothing_is_missing() -> None:
    fleet = Fleet()
    client, first = await started(fleet)
    first.worker.eos = lambda _: 3
    first.accept().emit(4).breaks()
    ending = await client.done()
    assert client.sink.tokens[-1] == EOS
    assert (ending.state, ending.finish, ending.attempts, ending.completion_tokens) == ("done", "stop", 1, 4)


@virtual
async def test_an_end_token_below_min_tokens_is_no_end() -> None:
    fleet = Fleet()
    client, first = await started(fleet, min_tokens=5)
    first.worker.eos = lambda _: 3
    first.accept().emit(4).breaks()
    await settle()
    assert len(fleet.attempts) == 2
    client.request.cancel("test")
    await client.done()


@virtual
async def test_a_full_context_is_complete() -> None:
    fleet = Fleet()
    client = fleet.start(length=100, context_length=9)
    await settle()
    first = fleet.attempts[-1]
    first.accept().emit(5).breaks()
    ending = await client.done()
    assert (ending.state, ending.finish, ending.completion_tokens, ending.attempts) == ("done", "length", 5, 1)


@virtual
async def test_a_context_that_ends_sooner_than_its_card_says_is_believed_of_two_workers() -> None:
    fleet = Fleet()
    client = fleet.start(length=100, context_length=10)
    await settle()
    fleet.attempts[-1].accept().emit(5).end("length")
    await settle()
    fleet.attempts[-1].accept().end("length")
    async with asyncio.timeout(10):
        await client.task
    assert (client.ending.state, client.ending.finish, client.ending.attempts) == ("done", "length", 2)
    assert len(client.sink.tokens) == 5


@virtual
async def test_overlap_is_dropped_and_a_gap_is_a_broken_stream() -> None:
    fleet = Fleet()
    client, first = await started(fleet)
    first.accept().emit(2)
    true = truth(client.plans[0].prompt_ids, LENGTH)
    first.say(0, [666]).say(1, [666, true[2]]).say(1, [666, 666])
    assert client.sink.tokens == true[:3]
    first.say(4, [666])
    assert first.killed == "gap"
    await settle()
    second = fleet.attempts[-1]
    assert second is not first
    assert second.ids == true[:3]
    finish(second)
    await client.done()
    assert client.sink.tokens == true


@virtual
async def test_overlap_cuts_log_probabilities_too() -> None:
    fleet = Fleet()
    client, first = await started(fleet)
    first.accept().emit(2, logprobs=True)
    true = truth(client.plans[0].prompt_ids, LENGTH)
    with fleet.read():
        first.handler.on_tokens(1, true[1:4], [(-1.0, []), (-2.0, []), (-3.0, [])])
    assert [p for p, _ in client.sink.logprobs] == [-0.5, -0.5, -2.0, -3.0]
    client.request.cancel("test")
    await client.done()


@virtual
async def test_more_tokens_than_asked_for_are_cut() -> None:
    fleet = Fleet()
    client, first = await started(fleet)
    first.accept().emit(LENGTH + 3, logprobs=True)
    ending = await client.done()
    assert (ending.finish, ending.completion_tokens) == ("length", LENGTH)
    assert len(client.sink.logprobs) == LENGTH


@virtual
async def test_late_words_of_an_abandoned_attempt_are_dropped() -> None:
    fleet = Fleet()
    client, first = await started(fleet)
    first.accept().emit(2)
    late = first.handler
    first.breaks(PeerSilent("frozen"))
    late.on_tokens(2, [666], None)
    await settle()
    second = fleet.attempts[-1]
    late.on_tokens(2, [666], None)
    late.on_accept()
    second.accept().emit(2)
    late.on_tokens(4, [666], None)
    late.on_end("stop", None, 9)
    late.on_refuse(EngineFailed("late"))
    late.on_broken(Disconnected("late"))
    fleet.flusher.flush()
    second.emit(2).end("length", cached=1)
    ending = await client.done()
    late.on_tokens(6, [666], None)
    late.on_end("stop", None, 9)
    fleet.flusher.flush()
    assert ending.cached_tokens == 1
    assert client.sink.tokens == truth(client.plans[0].prompt_ids, LENGTH)
    assert len(client.sink.endings) == 1


@virtual
async def test_only_the_first_failure_of_an_attempt_counts() -> None:
    fleet = Fleet()
    client, first = await started(fleet)
    first.accept()
    with fleet.read():
        first.handler.on_broken(Disconnected("one"))
        first.handler.on_broken(Disconnected("two"))
        first.handler.on_end("error", EngineFailed("three"), 0)
    await settle()
    assert len(fleet.attempts) == 2
    finish(fleet.attempts[-1])
    assert (await client.done()).attempts == 2


@virtual
async def test_a_message_on_a_token_stream_breaks_it() -> None:
    fleet = Fleet()
    client, first = await started(fleet)
    first.accept().handler.on_data(0, b"{}")
    await settle()
    assert first.killed == "protocol"
    finish(fleet.attempts[-1])
    assert (await client.done()).attempts == 2


@pytest.mark.parametrize(
    ("second_card", "temperature", "join"),
    [
        (card("build-1", "exact"), 1.0, "exact"),
        (card("build-2", "exact"), 1.0, "declared"),
        (card("build-1", "greedy"), 0.0, "exact"),
        (card("build-1", "greedy"), 0.7, "declared"),
        (card("build-1", "none"), 0.0, "declared"),
    ],
)
@virtual
async def test_the_join_is_declared_unless_it_is_exact(second_card: object, temperature: float, join: str) -> None:
    fleet = Fleet()
    fleet.workers[1].cards = {"m": second_card}
    client, first = await started(fleet, sampling=Sampling(temperature=temperature))
    assert first.worker is fleet.workers[0]
    first.accept().emit(2).breaks()
    await settle()
    finish(fleet.attempts[-1])
    assert (await client.done()).join == join


@virtual
async def test_an_attempt_without_tokens_does_not_spoil_the_join() -> None:
    fleet = Fleet(workers=3)
    fleet.workers[1].cards = {"m": card("other build")}
    fleet.workers[2].usable = False
    client, first = await started(fleet)
    first.accept().emit(2).breaks()
    await settle()
    other = fleet.attempts[-1]
    assert other.worker is fleet.workers[1]
    fleet.workers[2].usable = True
    other.accept().breaks()
    await settle()
    assert fleet.attempts[-1].worker is fleet.workers[2]
    finish(fleet.attempts[-1])
    ending = await client.done()
    assert (ending.join, ending.attempts) == ("exact", 3)


@virtual
async def test_a_continuation_prefers_the_same_build() -> None:
    fleet = Fleet(workers=4)
    for worker, build in zip(fleet.workers, ["a", "b", "c", "a"], strict=True):
        worker.cards = {"m": card(build)}
    client, first = await started(fleet)
    assert first.worker is fleet.workers[0]
    first.accept().emit(1).breaks()
    await settle()
    assert fleet.attempts[-1].worker is fleet.workers[3]
    client.request.cancel("test")
    await client.done()


@virtual
async def test_stop_string_over_the_cut_and_usage() -> None:
    fleet = Fleet()
    client, first = await started(fleet)
    client.sink.stop_at = 4
    first.accept().emit(2).breaks()
    await settle()
    second = fleet.attempts[-1]
    second.accept().emit(3)
    ending = await client.done()
    assert second.killed == "done"
    assert (ending.state, ending.finish, ending.completion_tokens) == ("done", "stop", 4)
    assert second.worker.successes == 1


@virtual
async def test_choices_of_one_request_move_alone() -> None:
    fleet = Fleet(workers=3)
    client = fleet.start(length=LENGTH, n=3)
    await settle()
    assert {s.worker.instance for s in fleet.attempts} == {"w1", "w2", "w3"}
    by_choice = {s.request.choice: s for s in fleet.attempts}
    for stream in by_choice.values():
        stream.accept().emit(1 + stream.request.choice)
    by_choice[1].breaks()
    await settle()
    moved = fleet.attempts[-1]
    assert (len(fleet.attempts), moved.request.choice) == (4, 1)
    for stream in (by_choice[0], by_choice[2]):
        stream.emit(LENGTH - len(stream.ids)).end("length")
    assert not client.sinks[1].endings
    finish(moved)
    await client.done()
    assert [e.endings[0].attempts for e in client.sinks] == [1, 2, 1]
    assert len({tuple(s.tokens) for s in client.sinks}) == 3
    assert fleet.leases() == {}


@virtual
async def test_log_probabilities_stay_with_their_tokens_when_only_one_of_two_workers_tells_them() -> None:
    fleet = Fleet()
    client, first = await started(fleet, sampling=Sampling(logprobs=1))
    first.accept().emit(2)
    await settle()
    first.emit(1).breaks(Disconnected("reset"))
    await settle()
    second = fleet.attempts[-1].accept().emit(LENGTH - 3, logprobs=True)
    second.end("length")
    await settle()
    told = client.sink.logprobs
    assert [known is not NO_LOGPROB for known in told] == [False] * 3 + [True] * (LENGTH - 3)
