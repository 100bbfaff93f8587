"""Prompts that are computed apart: the leg before an attempt, and every way in which it can go wrong.

The tokens of a fake worker follow from the ids that it was given, and `Client.done` compares them with the truth.
"""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from holdfast.base.errors import (
    AcceptOverdue,
    Disconnected,
    EngineFailed,
    HandoffLost,
    HandoffMismatch,
    HoldfastError,
    InvalidRequest,
    NoWorkers,
    PoisonRequest,
    StreamIncomplete,
    WorkerDraining,
    WorkerSaturated,
)
from holdfast.models.card import ModelCard
from holdfast.requests.config import DisaggSettings
from holdfast.routing.route import Route, route_of
from tests.requests.fakes import Client, FakeStream, FakeWorker, Fleet, card, settle
from tests.support.virtual_time import virtual

LENGTH = 12


def prefill_card(**more: Any) -> ModelCard:
    return card(role="prefill", **{"handoff": "mock", **more})


class Split(Fleet):
    """Prefill workers p1…, and decode workers w1…."""

    def __init__(self, prefill: int = 2, decode: int = 2, disagg: dict[str, Any] | None = None, **more: Any):
        both = more.pop("both", {})
        super().__init__(
            workers=0, settings={"disagg": DisaggSettings(**(disagg or {})), **more.pop("settings", {})}, **more
        )
        for i in range(decode):
            self.add(f"w{i + 1}", model_card=card(**{"role": "decode", "handoff": "mock", **both}))
        for i in range(prefill):
            self.add(f"p{i + 1}", model_card=prefill_card(**both))

    def named(self, name: str) -> FakeWorker:
        return next(w for w in self.workers if w.instance == name)

    @property
    def legs(self) -> list[FakeStream]:
        return [s for s in self.attempts if s.endpoint == "prefill"]

    @property
    def decodes(self) -> list[FakeStream]:
        return [s for s in self.attempts if s.endpoint == "generate"]

    @property
    def reasons(self) -> list[str]:
        return list(self.seen.all("decided"))


async def later(seconds: float) -> None:
    """Let virtual time pass."""
    await asyncio.sleep(seconds)
    await settle()


async def finish(fleet: Split, client: Client, *, local: bool = False) -> None:
    """Let the present decode attempt say everything, and check what it began from."""
    await settle()
    stream = fleet.decodes[-1]
    assert (stream.request.handoff is None) is local
    assert stream.request.leg == ("aggregated" if local else "decode")
    if not stream.accepted:
        stream.accept()
    stream.emit(LENGTH - len(stream.ids)).end("length")
    ending = await client.done()
    assert (ending.state, ending.completion_tokens) == ("done", LENGTH)
    assert fleet.leases() == {}
    assert fleet.services.admission.ledger.held() == 0
    assert not any(w.streams for w in fleet.workers), "a leg outlived its stream"


@virtual
async def test_a_prompt_is_computed_then_decoded_elsewhere() -> None:
    fleet = Split()
    client = fleet.start(length=LENGTH)
    await settle()
    (leg,) = fleet.legs
    assert fleet.decodes == []
    assert (leg.worker.instance[0], leg.request.leg, leg.headers.leg) == ("p", "prefill", "prefill")
    assert leg.request.stop == client.plans[0].stop
    leg.accept().hand_over()
    await settle()
    (decode,) = fleet.decodes
    assert decode.worker.instance[0] == "w"
    assert decode.request.handoff is not None
    assert decode.request.handoff.source == leg.worker.instance
    assert fleet.leases() == {"request": 1, "stream": 1, "attempt": 1, "prefill": 1}
    decode.accept().emit(1)
    assert leg.killed == "taken", "the blocks are not needed any more"
    assert fleet.leases()["attempt"] == 1
    await finish(fleet, client)
    assert fleet.reasons == ["remote"]
    assert fleet.seen.all("leg") == ["handed_over"]
    events = [event for _, event, _ in client.stream.timeline]
    assert events[:4] == ["prefill", "prefill accepted", "handed over", "attempt"]


@virtual
async def test_without_prefill_workers_nothing_is_different() -> None:
    fleet = Fleet()
    client = fleet.start(length=1)
    await settle()
    (stream,) = fleet.attempts
    assert (stream.request.leg, stream.request.handoff, stream.endpoint) == ("aggregated", None, "generate")
    stream.accept().emit(1).end("length")
    await client.done()
    assert fleet.seen.all("decided") == []


@virtual
async def test_prefill_workers_come_and_go() -> None:
    fleet = Split(prefill=0)
    client = fleet.start(length=LENGTH)
    await finish(fleet, client, local=True)
    assert fleet.reasons == []
    newcomer = fleet.add("p1", model_card=prefill_card())
    client = fleet.start(length=LENGTH)
    await settle()
    fleet.legs[-1].accept().hand_over()
    await finish(fleet, client)
    newcomer.usable = False
    client = fleet.start(length=LENGTH)
    await finish(fleet, client, local=True)
    assert fleet.reasons == ["remote", "no_prefill_worker"]


@pytest.mark.parametrize(
    "error",
    [WorkerSaturated("full"), WorkerDraining("leaving"), EngineFailed("cuda"), StreamIncomplete("early")],
    ids=lambda e: e.code,
)
@pytest.mark.parametrize("accepted", [False, True])
@virtual
async def test_another_prefill_worker_is_asked_and_then_nobody(error: HoldfastError, accepted: bool) -> None:
    fleet = Split()
    client = fleet.start(length=LENGTH)
    for _ in range(2):
        await settle()
        leg = fleet.legs[-1]
        if accepted:
            leg.accept().end("error", error)
        else:
            leg.refuse(error)
        await settle()
        assert leg.worker.failures == [error]
    await settle()
    assert {leg.worker.instance for leg in fleet.legs} == {"p1", "p2"}
    await finish(fleet, client, local=True)
    assert fleet.reasons == ["failed"]
    assert client.ending.attempts == 1
    assert client.ending.moves == ()


@virtual
async def test_a_prefill_worker_that_dies_is_no_end() -> None:
    fleet = Split()
    client = fleet.start(length=LENGTH)
    await settle()
    leg = fleet.legs[-1].accept()
    leg.worker.die()
    await settle()
    assert len(fleet.legs) == 1, "what may have killed it is not given to the next one"
    await finish(fleet, client, local=True)
    assert fleet.reasons == ["suspect"]


@virtual
async def test_a_connection_that_was_dead_already_accuses_nobody() -> None:
    fleet = Split()
    client = fleet.start(length=LENGTH)
    await settle()
    fleet.legs[-1].worker.die()
    await settle()
    assert len(fleet.legs) == 2
    fleet.legs[-1].accept().hand_over()
    await finish(fleet, client)


@virtual
async def test_a_killer_prompt_kills_two_workers_at_most() -> None:
    fleet = Split(prefill=2, decode=3)
    client = fleet.start(length=LENGTH)
    await settle()
    fleet.legs[-1].accept()
    fleet.legs[-1].worker.die()
    for _ in range(4):
        await settle()
        if client.sink.endings:
            break
        fleet.attempts[-1].accept()
        fleet.attempts[-1].worker.die()
    ending = await client.done()
    assert isinstance(ending.error, PoisonRequest)
    assert ending.state == "failed", "work had begun"
    assert fleet.deaths == 2
    assert fleet.leases() == {}


@virtual
async def test_an_innocent_stream_is_cleared_by_its_first_token() -> None:
    fleet = Split(prefill=1, decode=1)
    client = fleet.start(length=LENGTH)
    await settle()
    fleet.legs[-1].accept()
    fleet.legs[-1].worker.die()
    await settle()
    assert fleet.leases()["trial"] == 1
    fleet.decodes[-1].accept().emit(3)
    assert "trial" not in fleet.leases()
    await finish(fleet, client, local=True)


@virtual
async def test_silence_of_a_prefill_worker_is_bounded() -> None:
    fleet = Split(disagg={"prefill_timeout": 5.0})
    client = fleet.start(length=LENGTH)
    await settle()
    first = fleet.legs[-1]
    await later(0.6)  # no accept within the hedge
    assert first.killed
    second = fleet.legs[-1].accept()
    assert second.worker is not first.worker
    assert first.worker.failures == [], "it may merely be slow"
    await later(5.5)
    assert second.killed
    assert second.worker.failures[0].details["knob"] == "DYN_PREFILL_TIMEOUT_SECS"
    await finish(fleet, client, local=True)
    assert fleet.seen.all("leg") == [AcceptOverdue.code, "worker_stalled"]


@virtual
async def test_a_refused_hand_off_is_nobodys_fault() -> None:
    fleet = Split(decode=1)
    client = fleet.start(length=LENGTH)
    await settle()
    fleet.legs[-1].accept().hand_over(digest=1)
    await settle()
    decode = fleet.decodes[-1].refuse(HandoffMismatch("other tokens"))
    await settle()
    assert decode.worker.failures[0].fault == "internal"
    assert fleet.decodes[-1].worker is decode.worker, "the same worker computes it"
    await finish(fleet, client, local=True)
    assert fleet.reasons == ["remote", "handoff"]
    assert client.stream.driver.history.failures == 0


@virtual
async def test_lost_blocks_lead_to_local_prefill() -> None:
    fleet = Split()
    client = fleet.start(length=LENGTH)
    await settle()
    fleet.legs[-1].accept().hand_over()
    await settle()
    fleet.decodes[-1].accept().end("error", HandoffLost("no blocks"))
    await finish(fleet, client, local=True)


@virtual
async def test_an_engine_that_fails_on_a_hand_off_does_not_get_another() -> None:
    fleet = Split()
    client = fleet.start(length=LENGTH)
    await settle()
    fleet.legs[-1].accept().hand_over()
    await settle()
    fleet.decodes[-1].accept().end("error", EngineFailed("transfer engine"))
    await finish(fleet, client, local=True)


@virtual
async def test_a_decode_worker_that_does_not_take_it_costs_no_second_prefill() -> None:
    fleet = Split()
    client = fleet.start(length=LENGTH)
    await settle()
    leg = fleet.legs[-1].accept().hand_over()
    await settle()
    fleet.decodes[-1].refuse(WorkerSaturated("full"))
    await settle()
    assert len(fleet.legs) == 1
    assert not leg.killed
    assert len({d.worker.instance for d in fleet.decodes}) == 2
    await finish(fleet, client)


@virtual
async def test_a_decode_worker_that_dies_while_the_prompt_is_computed() -> None:
    fleet = Split()
    client = fleet.start(length=LENGTH)
    await settle()
    for worker in fleet.workers[:1]:
        worker.open_error = Disconnected("gone")
        worker.usable = False
    fleet.legs[-1].accept().hand_over()
    await finish(fleet, client)
    assert len(fleet.legs) == 1


@pytest.mark.parametrize("tokens", [0, 5])
@virtual
async def test_a_decode_worker_that_dies_is_followed_by_a_new_leg(tokens: int) -> None:
    fleet = Split(decode=3)
    client = fleet.start(length=LENGTH)
    await settle()
    fleet.legs[-1].accept().hand_over()
    await settle()
    decode = fleet.decodes[-1].accept()
    if tokens:
        decode.emit(tokens)
    decode.worker.die()
    await settle()
    if tokens:  # with none it is a suspect, and tried alone
        leg = fleet.legs[-1]
        assert len(leg.request.generated_ids) == 4 * tokens
        leg.accept().hand_over()
    await finish(fleet, client, local=not tokens)


@virtual
async def test_blocks_whose_owner_is_lost_are_not_waited_for() -> None:
    fleet = Split()
    client = fleet.start(length=LENGTH)
    await settle()
    leg = fleet.legs[-1].accept().hand_over()
    await settle()
    decode = fleet.decodes[-1].accept()
    leg.worker.die()
    await later(1.2)
    assert decode.killed
    await finish(fleet, client, local=True)


@virtual
async def test_a_decode_worker_that_has_begun_needs_nobody() -> None:
    fleet = Split()
    client = fleet.start(length=LENGTH)
    await settle()
    leg = fleet.legs[-1].accept().hand_over()
    await settle()
    fleet.decodes[-1].accept().emit(1)
    leg.worker.die()
    await later(2.0)
    await finish(fleet, client)
    assert client.ending.attempts == 1


@virtual
async def test_blocks_that_do_not_come_are_bounded() -> None:
    fleet = Split(disagg={"handoff_timeout": 3.0})
    client = fleet.start(length=LENGTH)
    await settle()
    fleet.legs[-1].accept().hand_over()
    await settle()
    decode = fleet.decodes[-1].accept()
    await later(2.5)
    assert not decode.killed
    await later(1.0)
    assert decode.killed
    assert decode.worker.failures[0].fault == "internal"
    await finish(fleet, client, local=True)


@pytest.mark.parametrize("stage", ["sent", "accepted", "handed over", "decoding"])
@virtual
async def test_a_cancel_reaches_both_legs(stage: str) -> None:
    fleet = Split()
    client = fleet.start(length=LENGTH)
    await settle()
    leg = fleet.legs[-1]
    if stage != "sent":
        leg.accept()
    if stage in ("handed over", "decoding"):
        leg.hand_over()
    if stage == "decoding":
        await settle()
        fleet.decodes[-1].accept()
    client.request.cancel("client left")
    ending = await client.done()
    assert ending.state == "cancelled"
    assert leg.killed
    assert all(decode.killed for decode in fleet.decodes)
    assert fleet.leases() == {}
    assert fleet.services.admission.ledger.held() == 0


@virtual
async def test_a_deadline_reaches_the_leg() -> None:
    fleet = Split()
    client = fleet.start(length=LENGTH, total=3.0)
    await settle()
    fleet.legs[-1].accept()
    ending = await client.done()
    assert ending.state == "expired"
    assert fleet.legs[-1].killed
    assert fleet.leases() == {}


@virtual
async def test_a_mistake_is_not_tried_elsewhere() -> None:
    fleet = Split()
    client = fleet.start(length=LENGTH)
    await settle()
    error = InvalidRequest("nonsense")
    fleet.legs[-1].refuse(error)
    ending = await client.done()
    assert (ending.error, ending.state) == (error, "rejected")
    assert len(fleet.attempts) == 1


@virtual
async def test_enforced_disaggregation_fails_without_prefill_workers() -> None:
    fleet = Split(prefill=0, disagg={"enforce_disagg": True})
    client = fleet.start(length=LENGTH)
    ending = await client.done()
    assert isinstance(ending.error, NoWorkers)
    assert "DYN_ENFORCE_DISAGG" in ending.error.message
    assert ending.error.retry_after
    assert ending.state == "rejected"
    assert fleet.attempts == []


@virtual
async def test_enforced_disaggregation_names_the_last_failure() -> None:
    fleet = Split(disagg={"enforce_disagg": True})
    client = fleet.start(length=LENGTH)
    for _ in range(2):
        await settle()
        fleet.legs[-1].accept().end("error", EngineFailed("boom"))
    ending = await client.done()
    assert isinstance(ending.error, NoWorkers)
    assert "boom" in ending.error.message
    assert ending.state == "failed"


@virtual
async def test_enforced_disaggregation_makes_a_new_hand_off_for_one_that_failed() -> None:
    fleet = Split(prefill=1, decode=1, disagg={"enforce_disagg": True})
    client = fleet.start(length=LENGTH)
    for number in range(2):
        await settle()
        assert len(fleet.legs) == number + 1
        fleet.legs[-1].accept().hand_over()
        await settle()
        if not number:
            fleet.decodes[-1].refuse(HandoffMismatch("other tokens"))
    await finish(fleet, client)


@virtual
async def test_a_pair_that_does_not_fit_is_not_used() -> None:
    fleet = Split(prefill=0)
    fleet.add("p1", model_card=prefill_card(handoff="nixl"))
    client = fleet.start(length=LENGTH)
    await finish(fleet, client, local=True)
    assert fleet.reasons == ["incompatible"]


@pytest.mark.parametrize(("longest", "reason"), [(0, "remote"), (3, "remote"), (4, "short")])
@virtual
async def test_short_prompts_stay(longest: int, reason: str) -> None:
    fleet = Split(disagg={"max_local_prefill_length": longest})
    client = fleet.start(length=LENGTH)  # four prompt tokens
    await settle()
    if reason == "remote":
        fleet.legs[-1].accept().hand_over()
    await finish(fleet, client, local=reason == "short")
    assert fleet.reasons == [reason]


@virtual
async def test_rendezvous_begins_the_prompt_once_the_stream_is_taken() -> None:
    both = {"handoff_phase": "rendezvous"}
    fleet = Split(prefill=0, decode=1, both=both)
    fleet.add("p1", model_card=prefill_card(**both, rendezvous="[::1]:8998", data_parallel_size=4))
    client = fleet.start(length=LENGTH)
    await settle()
    (decode,) = fleet.decodes
    assert fleet.legs == []
    decode.accept()
    (leg,) = fleet.legs
    handoff = leg.request.handoff
    assert handoff == decode.request.handoff
    assert handoff is not None
    params = handoff.params
    assert (params["bootstrap_host"], params["bootstrap_port"]) == ("::1", 8998)
    assert 0 <= params["bootstrap_room"] < 1 << 63
    assert params["bootstrap_room"] % 4 == params["prefill_rank"] == leg.request.extra["data_parallel_rank"]
    leg.accept()
    leg.end("stop")
    await finish(fleet, client)
    assert fleet.seen.all("leg") == ["handed_over"]


@pytest.mark.parametrize("how", ["refused", "dies", "fails"])
@virtual
async def test_rendezvous_with_a_lost_twin_is_noticed_at_once(how: str) -> None:
    fleet = Split(both={"handoff_phase": "rendezvous"})
    client = fleet.start(length=LENGTH)
    await settle()
    (decode,) = fleet.decodes
    decode.accept()
    (leg,) = fleet.legs
    if how == "refused":
        leg.refuse(WorkerSaturated("full"))
    elif how == "dies":
        leg.accept().worker.die()
    else:
        leg.accept().end("error", EngineFailed("boom"))
    await settle()
    assert decode.killed
    await finish(fleet, client, local=True)
    assert decode.worker.failures in ([], [f for f in decode.worker.failures if f.fault == "internal"])


@virtual
async def test_rendezvous_computes_nothing_for_a_stream_that_nobody_takes() -> None:
    fleet = Split(both={"handoff_phase": "rendezvous"})
    client = fleet.start(length=LENGTH)
    await settle()
    assert fleet.legs == [], "the decode worker's word comes first"
    fleet.decodes[-1].refuse(InvalidRequest("too long"))
    ending = await client.done()
    assert (ending.error.code, ending.attempts) == ("invalid_request", 1)
    client = fleet.start(length=LENGTH)
    await settle()
    while not client.sink.endings:
        fleet.decodes[-1].refuse(WorkerSaturated("full"))
        await settle()
        assert len(fleet.decodes) < 10
    ending = await client.done()
    assert ending.error.fault == "capacity", "all are full: turned away, for nothing has begun"
    assert fleet.legs == []
    assert fleet.leases() == {}


@virtual
async def test_choices_have_legs_of_their_own() -> None:
    fleet = Split(prefill=3, decode=3)
    client = fleet.start(length=LENGTH, n=2)
    await settle()
    assert len(fleet.legs) == 2
    for leg in list(fleet.legs):
        leg.accept().hand_over()
    await settle()
    for decode in list(fleet.decodes):
        decode.accept().emit(LENGTH).end("length")
    await client.done()
    assert fleet.leases() == {}


@virtual
async def test_a_decode_worker_that_computes_no_prompts_waits_for_a_prefill_worker() -> None:
    fleet = Split(prefill=1, decode=1, both={"handoff_phase": "rendezvous"})
    prefill = fleet.named("p1")
    client = fleet.start(length=LENGTH, wait=10.0)
    await settle()
    fleet.decodes[-1].accept()
    fleet.legs[-1].accept()
    prefill.die()
    await settle()
    fleet.decodes[-1].refuse(NoWorkers("one half only"))
    await later(1.0)
    assert client.sink.endings == []
    prefill.restart()
    await later(1.0)
    fleet.legs[-1].accept().end("stop")
    await finish(fleet, client)


@virtual
async def test_where_nobody_computes_prompts_the_wait_is_bounded() -> None:
    fleet = Split(prefill=1, decode=1, both={"handoff_phase": "rendezvous"})
    client = fleet.start(length=LENGTH, wait=4.0)
    await settle()
    fleet.decodes[-1].accept()
    fleet.legs[-1].accept()
    fleet.named("p1").die()
    await settle()
    fleet.decodes[-1].refuse(NoWorkers("one half only"))
    ending = await client.done(20.0)
    assert isinstance(ending.error, NoWorkers)
    assert "decode workers cannot" in ending.error.message
    assert fleet.leases() == {}


@virtual
async def test_hand_offs_that_always_fail_come_to_an_end() -> None:
    fleet = Split(prefill=1, decode=1)
    client = fleet.start(length=LENGTH, wait=3.0)
    for _ in range(200):
        await later(0.1)
        if client.sink.endings:
            break
        last = fleet.attempts[-1]
        if last.over:
            continue
        if last.endpoint == "prefill" and not last.accepted:
            last.accept().hand_over()
        elif last.endpoint == "generate":
            last.refuse(HandoffMismatch("x") if last.request.handoff is not None else NoWorkers("one half only"))
    ending = await client.done()
    assert isinstance(ending.error, NoWorkers)
    assert len(fleet.legs) <= 5
    assert fleet.leases() == {}


def dependent(**more: Any) -> Split:
    """Decode workers that compute no prompts, as SGLang's."""
    return Split(**{"both": {"local_prefill": False}, **more})


@pytest.mark.parametrize("prefill", [0, 1])
@virtual
async def test_without_a_prefill_worker_a_stream_waits_and_is_never_sent_to_one_that_cannot(prefill: int) -> None:
    fleet = dependent(prefill=prefill, decode=2)
    for worker in fleet.prefill("m"):
        worker.usable = False
    client = fleet.start(length=LENGTH, wait=30.0)
    await later(10.0)
    assert fleet.attempts == []
    if prefill:
        fleet.named("p1").usable = True
    else:
        fleet.add("p1", model_card=prefill_card())
    await later(1.0)
    fleet.legs[-1].accept().hand_over()
    await finish(fleet, client)
    assert fleet.reasons == ["remote"]


@virtual
async def test_the_wait_for_a_prefill_worker_ends_with_what_is_missing() -> None:
    fleet = dependent(prefill=0)
    client = fleet.start(length=LENGTH, wait=12.0)
    await later(11.0)
    assert not client.sink.endings
    ending = await client.done()
    assert isinstance(ending.error, NoWorkers)
    assert "within 12 s" in ending.error.message
    assert "cannot compute prompts themselves; start a prefill worker" in ending.error.message
    assert ending.error.details["reason"] == "no_prefill_worker"
    assert ending.error.retry_after
    assert (ending.state, fleet.attempts) == ("rejected", [])
    assert fleet.leases() == {}
    assert fleet.services.admission.ledger.held() == 0


@pytest.mark.parametrize("trouble", ["none there", "dies", "refuses", "saturated", "unfit"])
@virtual
async def test_what_nobody_computes_for_them_goes_to_one_that_does_the_whole(trouble: str) -> None:
    fleet = dependent(prefill=0 if trouble in ("none there", "unfit") else 1, decode=3)
    if trouble == "unfit":
        fleet.add("p1", model_card=prefill_card(handoff="nixl"))
    whole = fleet.add("a1", model_card=card(role="aggregated"))
    clients = [fleet.start(length=LENGTH) for _ in range(4)]
    await settle()
    for leg in list(fleet.legs):
        if trouble == "dies":
            leg.accept()
        elif trouble in ("refuses", "saturated"):
            leg.refuse(WorkerSaturated("full") if trouble == "saturated" else EngineFailed("cuda"))
    if trouble == "dies" and fleet.legs:
        fleet.named("p1").die()
    for _ in range(8):
        await later(0.5)
        for stream in fleet.decodes:
            if not stream.over and not stream.accepted:
                assert stream.worker is whole, "a prompt for one that computes none"
                assert stream.request.handoff is None
                stream.accept().emit(LENGTH).end("length")
    for client in clients:
        ending = await client.done()
        assert (ending.state, ending.completion_tokens) == ("done", LENGTH), ending
    assert fleet.leases() == {}


@virtual
async def test_one_that_does_the_whole_ends_the_wait_when_it_comes() -> None:
    fleet = dependent(prefill=0)
    client = fleet.start(length=LENGTH, wait=30.0)
    await later(5.0)
    fleet.add("a1", model_card=card(role="aggregated"))
    await later(0.5)
    assert fleet.decodes[-1].worker.instance == "a1"
    await finish(fleet, client, local=True)


@virtual
async def test_a_failed_hand_off_is_made_anew_where_the_decode_worker_cannot_compute() -> None:
    fleet = dependent(prefill=1, decode=1)
    client = fleet.start(length=LENGTH)
    for number in range(2):
        await settle()
        assert len(fleet.legs) == number + 1
        fleet.legs[-1].accept().hand_over()
        await settle()
        assert all(decode.request.handoff is not None for decode in fleet.decodes)
        if not number:
            fleet.decodes[-1].accept().end("error", HandoffLost("no blocks"))
    await finish(fleet, client)


@virtual
async def test_short_prompts_do_not_stay_where_they_cannot() -> None:
    fleet = dependent(disagg={"max_local_prefill_length": 1000})
    client = fleet.start(length=LENGTH)
    await settle()
    fleet.legs[-1].accept().hand_over()
    await finish(fleet, client)
    assert fleet.reasons == ["remote"]


@virtual
async def test_a_stream_that_moves_waits_for_a_prefill_worker_too() -> None:
    fleet = dependent(prefill=1, decode=2)
    client = fleet.start(length=LENGTH, wait=30.0)
    await settle()
    fleet.legs[-1].accept().hand_over()
    await settle()
    decode = fleet.decodes[-1].accept().emit(5)
    fleet.named("p1").usable = False
    decode.worker.die()
    await later(3.0)
    assert len(fleet.decodes) == 1
    fleet.named("p1").usable = True
    await later(0.5)
    assert len(fleet.legs[-1].request.generated_ids) == 4 * 5
    fleet.legs[-1].accept().hand_over()
    await finish(fleet, client)


def naming(prefill: str, **more: Any) -> Route:
    return route_of(None, None, None, {}, prefill=prefill, **more)


@pytest.mark.parametrize("wanted", ["p1", "p2", "p3"])
@virtual
async def test_a_request_can_name_its_prefill_worker(wanted: str) -> None:
    fleet = Split(prefill=3, disagg={"max_local_prefill_length": 1000})
    for _ in range(2):
        client = fleet.start(length=LENGTH, route=naming(wanted))
        await settle()
        leg = fleet.legs[-1]
        assert leg.worker.instance == wanted
        leg.accept().hand_over()
        await finish(fleet, client)
        assert client.stream.driver.prefilled_by == (wanted, -1)


@virtual
async def test_an_unknown_prefill_worker_is_an_error_before_any_work() -> None:
    for prefill in (0, 2):
        fleet = Split(prefill=prefill)
        client = fleet.start(length=LENGTH, route=naming("p9"))
        ending = await client.done()
        assert isinstance(ending.error, NoWorkers)
        assert "Prefill worker p9, which the request names" in ending.error.message
        assert f"{prefill} others" in ending.error.message
        assert (ending.state, fleet.attempts, fleet.leases()) == ("rejected", [], {})


@pytest.mark.parametrize("how", ["refuses", "away", "saturated"])
@virtual
async def test_another_one_does_it_where_the_named_one_cannot(how: str) -> None:
    fleet = Split(prefill=2)
    if how == "away":
        fleet.named("p2").usable = False
    client = fleet.start(length=LENGTH, route=naming("p2"))
    await settle()
    if how != "away":
        assert fleet.legs[-1].worker.instance == "p2"
        fleet.legs[-1].refuse(WorkerSaturated("full") if how == "saturated" else EngineFailed("cuda"))
        await settle()
    assert fleet.legs[-1].worker.instance == "p1"
    fleet.legs[-1].accept().hand_over()
    await finish(fleet, client)
