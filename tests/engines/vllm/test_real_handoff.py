"""A prefill and a decode engine over NIXL in host memory: the same tokens, whatever becomes of the prefill side."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator

import msgspec
import pytest
import pytest_asyncio

from holdfast.base.errors import EngineFailed
from holdfast.engines.handoff import HandoffMismatch, KvHandoff
from tests.engines.vllm.harness import PATIENCE, Run, ask

pytestmark = [pytest.mark.vllm, pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(900)]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def legs(model: str) -> AsyncIterator[tuple[Run, Run]]:
    pytest.importorskip("nixl", reason="NIXL is not installed; tools/install_vllm.sh brings it")
    prefill, decode = Run(model, role="prefill"), Run(model, role="decode")
    try:
        await prefill.start()
        os.environ.pop("VLLM_NIXL_SIDE_CHANNEL_PORT")  # a process has one engine; this one has two
        await decode.start()
        yield prefill, decode
    finally:
        await asyncio.gather(prefill.engine.close(), decode.engine.close())


def prompt(step: int, length: int = 300) -> list[int]:
    return [(i * step) % 40_000 + 100 for i in range(length)]


async def hand_over(prefill: Run, ids: list[int], generated: list[int] | None = None) -> KvHandoff:
    key = prefill.submit(ask(ids, leg="prefill", generated=generated, max_tokens=24))
    await prefill.finished(key)
    end = prefill.ends[key]
    assert (end.finish, prefill.tokens[key]) == ("stop", [])
    assert end.handoff is not None
    return end.handoff


async def is_dead(run: Run) -> bool:
    try:
        await run.engine.check()
    except EngineFailed:
        return True
    return False


async def test_both_say_what_they_are(legs: tuple[Run, Run]) -> None:
    for run, role in zip(legs, ("prefill", "decode"), strict=True):
        assert run.info.role == role
        can = run.info.capabilities
        assert (can.handoff, can.handoff_phase, can.cancel_until) == ("nixl", "after_prefill", "pre_handoff")


async def test_tokens_equal_those_of_one_engine(legs: tuple[Run, Run]) -> None:
    prefill, decode = legs
    ids = prompt(7919)
    alone = await prefill.generate(ask(ids))
    handoff = await hand_over(prefill, ids)
    assert (handoff.protocol, handoff.phase, handoff.tokens) == ("nixl", "after_prefill", 300)
    travelled = msgspec.msgpack.decode(msgspec.msgpack.encode(handoff), type=KvHandoff)
    key = decode.submit(ask(ids, leg="decode", handoff=travelled))
    assert await decode.finished(key) == [alone]
    assert decode.ends[key].cached_tokens >= 256, "the blocks came over and were not computed"


async def test_a_stream_that_moves_is_handed_over_in_the_middle(legs: tuple[Run, Run]) -> None:
    prefill, decode = legs
    ids = prompt(104_729)
    whole = await prefill.generate(ask(ids))
    handoff = await hand_over(prefill, ids, generated=whole[:9])
    assert await decode.generate(ask(ids, leg="decode", handoff=handoff, generated=whole[:9])) == whole[9:]


async def test_blocks_of_other_tokens_are_refused(legs: tuple[Run, Run]) -> None:
    prefill, decode = legs
    handoff = await hand_over(prefill, prompt(31))
    with pytest.raises(HandoffMismatch):
        decode.submit(ask(prompt(37), leg="decode", handoff=handoff))
    assert len(await decode.generate(ask(prompt(31), leg="decode", handoff=handoff, max_tokens=2))) == 2


async def test_a_cancel_during_the_transfer_harms_nobody(legs: tuple[Run, Run]) -> None:
    prefill, decode = legs
    for step in (211, 223, 227):
        handoff = await hand_over(prefill, prompt(step))
        key = decode.submit(ask(prompt(step), leg="decode", handoff=handoff))
        await asyncio.sleep(0)
        decode.cancel(key)
        await decode.until(lambda: not decode.engine._tasks)
        assert decode.tokens[key] == []
    assert len(await decode.generate(ask(prompt(5), max_tokens=3))) == 3


async def test_a_decode_engine_does_the_whole_by_itself_too(legs: tuple[Run, Run]) -> None:
    prefill, decode = legs
    assert await decode.generate(ask(prompt(41))) == await prefill.generate(ask(prompt(41)))


async def test_nobody_at_the_other_end_means_computing_here(legs: tuple[Run, Run]) -> None:
    prefill, decode = legs
    ids = prompt(1_299_709)
    alone = await prefill.generate(ask(ids))
    handoff = await hand_over(prefill, ids)
    lost = {**handoff.params, "remote_engine_id": "nobody", "remote_port": 1}
    assert await decode.generate(ask(ids, leg="decode", handoff=msgspec.structs.replace(handoff, params=lost))) == alone


async def test_a_prefill_engine_that_died_with_the_blocks_means_computing_here(legs: tuple[Run, Run]) -> None:
    prefill, decode = legs
    ids = prompt(15_485_863)
    alone = await decode.generate(ask(ids))
    await decode.engine.clear_cache()
    handoff = await hand_over(prefill, ids)
    for pid in prefill.engine.child_pids():
        os.kill(pid, signal.SIGKILL)
    # nothing is in flight there, so its worker finds out by watching the processes and asking
    async with asyncio.timeout(PATIENCE):
        while not await is_dead(prefill):  # noqa: ASYNC110  it tells nobody by itself
            await asyncio.sleep(0.05)
    assert await decode.generate(ask(ids, leg="decode", handoff=handoff)) == alone
    assert await decode.generate(ask(prompt(43), max_tokens=3))
    await decode.engine.check()
