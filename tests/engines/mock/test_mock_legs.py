"""The mock engine's two halves: what is kept, how long blocks travel, and what happens when they do not come."""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec
import pytest

from holdfast.base.errors import HandoffLost, NoWorkers
from holdfast.base.ids import SequenceKey
from holdfast.engines.contract import GenerateRequest, SequenceStep
from holdfast.engines.handoff import KvHandoff, digest_of, verify
from holdfast.engines.mock import MockConfig, MockEngine
from holdfast.engines.mock.legs import transfer_seconds
from holdfast.engines.mock.ranks import DataParallelMock
from holdfast.engines.mock.rendezvous import TcpExchange
from tests.engines.mock.mockrun import request
from tests.support.virtual_time import virtual

PREFILL, DECODE = SequenceKey(1), SequenceKey(2)
TEXT = "a prompt of more than one block, for the sake of what is kept of it " * 3


class Half:
    """One engine in one role, and what it said."""

    def __init__(self, role: str, **config: Any):
        self.engine = MockEngine(MockConfig(**{"step_ms": 10, "kv_transfer_bandwidth": 0, **config}))
        self.engine.role = role  # type: ignore[assignment]
        self.steps: list[SequenceStep] = []

    async def start(self) -> Half:
        self.info = await self.engine.start(self.steps.extend, lambda _: None, lambda *_: None)
        return self

    @property
    def tokens(self) -> list[int]:
        return [token for step in self.steps for token in step.tokens]

    async def until_over(self, within: float = 5.0) -> SequenceStep:
        async with asyncio.timeout(within):
            while not self.steps or self.steps[-1].finish is None:  # noqa: ASYNC110  engines have no event for it
                await asyncio.sleep(0.001)
        return self.steps[-1]


def leg(generated: list[int] | None = None) -> GenerateRequest:
    return msgspec.structs.replace(request(TEXT, generated=generated), leg="prefill")


def decode_leg(handoff: KvHandoff, generated: list[int] | None = None) -> GenerateRequest:
    return msgspec.structs.replace(request(TEXT, generated=generated), leg="decode", handoff=handoff)


async def undisturbed() -> list[int]:
    whole = await Half("aggregated").start()
    whole.engine.submit(DECODE, request(TEXT))
    await whole.until_over()
    return whole.tokens


async def handed(half: Half, generated: list[int] | None = None) -> KvHandoff:
    half.engine.submit(PREFILL, leg(generated))
    step = await half.until_over()
    assert (step.tokens, step.finish, step.error) == ([], "stop", None)
    assert step.handoff is not None
    return step.handoff


@virtual
async def test_a_prompt_computed_here_is_continued_there() -> None:
    prefill, decode = await Half("prefill").start(), await Half("decode").start()
    handoff = await handed(prefill)
    verify(handoff, leg().prompt_ids, b"", protocol="mock")
    decode.engine.submit(DECODE, decode_leg(handoff))
    await decode.until_over()
    assert decode.tokens == await undisturbed()
    assert decode.engine.progress().prefilled < len(leg().prompt_ids) // 8, "nothing to speak of is computed again"
    assert prefill.info.role == "prefill"


@virtual
async def test_a_stream_goes_on_from_a_hand_off_in_its_middle() -> None:
    true = await undisturbed()
    prefill, decode = await Half("prefill").start(), await Half("decode").start()
    handoff = await handed(prefill, true[:7])
    decode.engine.submit(DECODE, decode_leg(handoff, true[:7]))
    await decode.until_over()
    assert (decode.steps[0].index, decode.tokens) == (7, true[7:])


@virtual
async def test_blocks_are_kept_until_they_are_let_go() -> None:
    prefill = await Half("prefill").start()
    await handed(prefill)
    load = prefill.engine.load()
    assert load.kv_used_blocks > 3
    assert (load.running, load.waiting) == (0, 0)
    prefill.engine.cancel(PREFILL)
    prefill.engine.cancel(PREFILL)
    assert prefill.engine.load().kv_used_blocks == 0


@virtual
async def test_ranks_keep_blocks_too() -> None:
    steps: list[SequenceStep] = []
    engine = DataParallelMock(MockConfig(step_ms=0, data_parallel_size=2))
    engine.role = "prefill"
    await engine.start(steps.extend, lambda _: None, lambda *_: None)
    engine.submit(PREFILL, leg())
    await asyncio.sleep(0.1)
    assert steps[-1].handoff is not None
    assert engine.load().kv_used_blocks
    engine.cancel(PREFILL)
    assert engine.load().kv_used_blocks == 0


@virtual
async def test_blocks_travel_as_fast_as_the_bandwidth_allows() -> None:
    config = MockConfig(kv_transfer_bandwidth=64, kv_bytes_per_token=131_072)
    assert transfer_seconds(config, 1000) == pytest.approx(1000 * 131_072 / 64e9)
    assert transfer_seconds(msgspec.structs.replace(config, kv_transfer_bandwidth=0), 1000) == 0
    prefill = await Half("prefill").start()
    handoff = await handed(prefill)
    slow = await Half("decode", kv_transfer_bandwidth=0.001).start()
    loop = asyncio.get_running_loop()
    began = loop.time()
    slow.engine.submit(DECODE, decode_leg(handoff))
    assert slow.engine.load().waiting == 0, "an engine that waits for blocks is not busy"
    while not slow.steps:  # noqa: ASYNC110  as above
        await asyncio.sleep(0.001)
    assert loop.time() - began >= transfer_seconds(slow.engine.config, handoff.tokens) > 1


@pytest.mark.parametrize("failure", ["recompute", "fail", "hang"])
@virtual
async def test_blocks_that_do_not_come(failure: str) -> None:
    prefill = await Half("prefill").start()
    prefill.engine.misbehave("lose")
    decode = await Half("decode", handoff_failure=failure).start()
    decode.engine.submit(DECODE, decode_leg(await handed(prefill)))
    if failure == "hang":
        await asyncio.sleep(60)
        assert decode.steps == []
        decode.engine.cancel(DECODE)
        assert decode.engine.in_hand == 0
        return
    end = await decode.until_over()
    if failure == "fail":
        assert isinstance(end.error, HandoffLost)
        assert decode.tokens == []
    else:
        assert decode.tokens == await undisturbed()


@virtual
async def test_a_foreign_hand_off_that_nobody_verifies_shows() -> None:
    prefill, decode = await Half("prefill").start(), await Half("decode").start()
    prefill.engine.misbehave("swap")
    handoff = await handed(prefill)
    assert handoff.digest != digest_of(leg().prompt_ids)
    decode.engine.submit(DECODE, decode_leg(handoff))
    await decode.until_over()
    assert decode.tokens != await undisturbed()


@pytest.mark.parametrize("until", ["anytime", "pre_handoff"])
@virtual
async def test_a_cancel_during_the_transfer(until: str) -> None:
    prefill = await Half("prefill").start()
    decode = await Half("decode", kv_transfer_bandwidth=0.001, cancel_until=until).start()
    assert decode.info.capabilities.cancel_until == until
    decode.engine.submit(DECODE, decode_leg(await handed(prefill)))
    decode.engine.cancel(DECODE)
    assert decode.engine.in_hand == (0 if until == "anytime" else 1), "a transfer under way is not interrupted"
    await asyncio.sleep(60)
    assert (decode.engine.in_hand, decode.steps) == (0, [])


async def meeting(prefill: Half, room: int = 12) -> KvHandoff:
    host, _, port = prefill.info.rendezvous.rpartition(":")
    ids = leg().prompt_ids
    params = {"bootstrap_host": host, "bootstrap_port": int(port), "bootstrap_room": room}
    return KvHandoff("mock", "rendezvous", len(ids) // 4, digest_of(ids), params=params)


@pytest.mark.parametrize("decode_first", [True, False])
async def test_two_legs_meet_over_tcp(decode_first: bool) -> None:
    prefill = await Half("prefill", handoff_phase="rendezvous", step_ms=1).start()
    decode = await Half("decode", handoff_phase="rendezvous", step_ms=1).start()
    handoff = await meeting(prefill)
    try:
        if decode_first:
            decode.engine.submit(DECODE, decode_leg(handoff))
        prefill.engine.submit(PREFILL, msgspec.structs.replace(leg(), handoff=handoff))
        assert (await prefill.until_over()).handoff is None
        if not decode_first:
            decode.engine.submit(DECODE, decode_leg(handoff))
        await decode.until_over()
        assert decode.tokens
        assert prefill.engine.load().kv_used_blocks == 0
    finally:
        await prefill.engine.close()
        await decode.engine.close()


async def test_a_meeting_with_nobody_is_lost() -> None:
    prefill = await Half("prefill", handoff_phase="rendezvous").start()
    decode = await Half("decode", handoff_phase="rendezvous", handoff_failure="fail", step_ms=1).start()
    handoff = await meeting(prefill)
    await prefill.engine.close()
    decode.engine.submit(DECODE, decode_leg(handoff))
    assert isinstance((await decode.until_over()).error, HandoffLost)
    await decode.engine.close()


async def test_those_who_wait_hear_that_the_other_side_closes() -> None:
    exchange, other = TcpExchange(), TcpExchange()
    address = await exchange.open()
    heard: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
    other.meet(address, 5, heard.set_result)
    await asyncio.sleep(0.05)
    await exchange.close()
    async with asyncio.timeout(5):
        assert await heard is False
    await other.close()


@virtual
async def test_a_decode_worker_that_computes_no_prompts_says_so_and_refuses_them() -> None:
    decode = await Half("decode", local_prefill=False).start()
    assert not decode.info.capabilities.local_prefill
    assert (await Half("prefill", local_prefill=False).start()).info.capabilities.local_prefill
    with pytest.raises(NoWorkers, match="computes no prompts"):
        decode.engine.submit(DECODE, request(TEXT))
    canary = msgspec.structs.replace(request(TEXT), prompt_ids=request(TEXT).prompt_ids[:4])
    decode.engine.submit(PREFILL, canary)
    await decode.until_over()
    decode.steps.clear()
    prefill = await Half("prefill", local_prefill=False).start()
    handoff = await handed(prefill)
    decode.engine.submit(DECODE, decode_leg(msgspec.structs.replace(handoff, params={**handoff.params, "lost": True})))
    step = await decode.until_over()
    assert isinstance(step.error, HandoffLost), "computed anew by one that cannot"
