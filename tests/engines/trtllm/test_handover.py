"""Prefill and decode legs: the hand-off travels, every token comes once, and a transfer is never aborted under way."""

from __future__ import annotations

import asyncio
import json
from contextlib import asynccontextmanager

import msgspec
import pytest

from holdfast.base.errors import HandoffLost, HandoffMismatch, InvalidRequest, UnsupportedFeature
from holdfast.base.ids import SequenceKey
from holdfast.engines.contract import GenerateRequest
from holdfast.engines.trtllm import handover
from holdfast.health.payloads import payload_for, request_of
from tests.engines.conformance.recorder import Recorder
from tests.engines.conformance.subjects.trtllm import STAND_IN as SUBJECT
from tests.engines.trtllm.standin import engine


@asynccontextmanager
async def pair():
    """A prefill and a decode engine, started."""
    made = []
    for role in ("prefill", "decode"):
        one = engine()
        one.role = role
        made.append(Recorder(SUBJECT, one))
    try:
        for run in made:
            await run.start()
        yield made
    finally:
        for run in made:
            await run.engine.close()


async def handed_over(run, request):
    """Run the prefill leg and return its handle, as it arrives at the other worker."""
    key = run.submit(msgspec.structs.replace(request, leg="prefill"))
    assert await run.finish(key) == [[]], "the token of a prefill leg is nobody's"
    end = run.sequences[key].end
    assert end.finish == "stop"
    return msgspec.msgpack.decode(msgspec.msgpack.encode(end.handoff), type=type(end.handoff))


@pytest.mark.parametrize("count", [1, 2, 9])
async def test_the_decode_leg_delivers_every_token_once(count):
    async with pair() as (prefill, decode):
        request = prefill.request("Tell me about rivers.", count)
        (whole,) = await decode.generate(request)
        handle = await handed_over(prefill, request)
        (split,) = await decode.generate(msgspec.structs.replace(request, leg="decode", handoff=handle))
        assert split == whole
        assert len(split) == count
        prefill.blame()
        decode.blame()


async def test_a_restart_can_be_split_too_and_log_probabilities_come_along():
    async with pair() as (prefill, decode):
        request = prefill.request("Tell me about rivers.", 10, logprobs=2)
        (whole,) = await decode.generate(request)
        resumed = msgspec.structs.replace(
            request, generated_ids=prefill.request([1], generated=whole[:4]).generated_ids
        )
        handle = await handed_over(prefill, resumed)
        assert json.dumps(handle.params), "plain values only"
        key = decode.submit(msgspec.structs.replace(resumed, leg="decode", handoff=handle))
        assert await decode.finish(key) == [whole[4:]]
        assert len(decode.sequences[key].logprobs) == 6


async def test_an_end_as_the_first_token_ends_the_decode_leg():
    """The prefill leg ignores ends, because one that ends hands nothing over."""
    async with pair() as (prefill, decode):
        for number in range(60):
            request = prefill.request(f"{number} rivers", 6, ignore_eos=False)
            (whole,) = await decode.generate(request)
            if len(whole) == 1:
                break
        else:
            pytest.fail("no prompt ends at once")
        handle = await handed_over(prefill, request)
        key = decode.submit(msgspec.structs.replace(request, leg="decode", handoff=handle))
        assert await decode.finish(key) == [whole]
        assert decode.sequences[key].finish == "stop"


async def test_a_cancel_during_the_transfer_waits_for_the_first_token():
    async with pair() as (prefill, decode):
        assert decode.info.capabilities.cancel_until == "pre_handoff"
        request = prefill.request("Tell me about rivers.", 200)
        handle = await handed_over(prefill, request)
        key = decode.submit(msgspec.structs.replace(request, leg="decode", handoff=handle))
        await asyncio.sleep(0)
        decode.cancel(key)
        await decode.until("the sequence is let go", lambda: not decode.engine._tasks)
        assert decode.engine.llm.unsafe_aborts == 0, "aborted while blocks were on their way"
        assert decode.sequences[key].tokens == []
        decode.blame()
        assert len(await decode.one("Tell me about rivers.", 3)) == 3


async def test_the_stand_in_would_notice_an_abort_under_way():
    async with pair() as (prefill, decode):
        request = prefill.request("Tell me about rivers.", 20)
        handle = await handed_over(prefill, request)
        key = decode.submit(msgspec.structs.replace(request, leg="decode", handoff=handle))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        decode.engine._results[SequenceKey(key)].abort()
        assert decode.engine.llm.unsafe_aborts == 1


async def test_blocks_that_do_not_arrive_are_an_error_of_the_hand_off():
    async with pair() as (prefill, decode):
        request = prefill.request("Tell me about rivers.", 5)
        handle = await handed_over(prefill, request)
        decode.engine.llm.transfer_fails = True
        key = decode.submit(msgspec.structs.replace(request, leg="decode", handoff=handle))
        assert await decode.finish(key) == [[]]
        assert isinstance(decode.sequences[key].end.error, HandoffLost)
        assert not decode.deaths
        assert len(await decode.one("Tell me about rivers.", 3)) == 3, "the worker computes it itself"


async def test_foreign_handles_are_refused_before_any_work():
    async with pair() as (prefill, decode):
        request = prefill.request("Tell me about rivers.", 5)
        handle = await handed_over(prefill, request)
        other = decode.request("Tell me about mountains.", 5)
        with pytest.raises(HandoffMismatch):
            decode.submit(msgspec.structs.replace(other, leg="decode", handoff=handle))
        foreign = msgspec.structs.replace(handle, protocol="nixl")
        with pytest.raises(HandoffMismatch):
            decode.submit(msgspec.structs.replace(request, leg="decode", handoff=foreign))
        for broken in ({}, {**handle.params, "opaque_state": "not base64!"}):
            bad = msgspec.structs.replace(handle, params=broken)
            with pytest.raises(InvalidRequest, match="hand-off"):
                decode.submit(msgspec.structs.replace(request, leg="decode", handoff=bad))


async def test_an_aggregated_worker_hands_nothing_over():
    run = await Recorder(SUBJECT).start()
    try:
        with pytest.raises(UnsupportedFeature):
            run.submit(msgspec.structs.replace(run.request("a", 2), leg="prefill"))
    finally:
        await run.engine.close()


async def test_the_canary_does_both_halves_on_each_role():
    async with pair() as made:
        for run in made:
            payload = payload_for(run.info, role=run.info.role, override="")
            request = request_of(payload.to_dict(), model="tiny", request_id="c" * 32)
            assert isinstance(request, GenerateRequest)
            (tokens,) = await run.finish(run.submit(request))
            assert len(tokens) == 1
            assert run.engine.llm.requests[-1]["legs"].request_type == "context_and_generation"


def test_log_probabilities_survive_the_journey():
    class Entry:
        def __init__(self, logprob, rank):
            self.logprob, self.rank = logprob, rank

    class Api:
        Logprob = staticmethod(lambda logprob, rank: (logprob, rank))
        DisaggregatedParams = staticmethod(lambda **fields: fields)

    class Params:
        first_gen_tokens = (7,)
        opaque_state = b"\x00\xff"
        first_gen_log_probs = ([{7: Entry(-0.5, 1)}],)

    found = handover.unpack(Api, json.loads(json.dumps(handover.pack(Params))))
    assert found["opaque_state"] == b"\x00\xff"
    assert found["first_gen_log_probs"] == [[{7: (-0.5, 1)}]]
    assert found["request_type"] == "generation_only"
