"""A crowd is served in small groups between which the loop looks at the network, in order, and nobody is forgotten."""

from __future__ import annotations

import asyncio

import pytest

from holdfast.frontend.turns import AT_ONCE, Turns

pytestmark = pytest.mark.asyncio


async def rounds(waits: list[int], turns: Turns) -> list[int]:
    """Return the number of the loop's turn in which each of them was served."""
    now = 0
    served: dict[int, int] = {}

    async def one(number: int) -> None:
        if not turns.take():
            await turns.wait()
        served[number] = now

    tasks = [asyncio.ensure_future(one(number)) for number in waits]
    async with asyncio.timeout(10):
        while len(served) < len(waits):
            await asyncio.sleep(0)
            now += 1
    await asyncio.gather(*tasks)
    return [served[number] for number in waits]


async def test_a_crowd_is_served_in_order_a_few_at_a_time() -> None:
    at = await rounds([*range(5 * AT_ONCE)], Turns())
    assert at == sorted(at)
    assert max(at.count(turn) for turn in at) <= AT_ONCE
    assert max(at) - min(at) <= 10


async def test_a_few_do_not_wait_at_all() -> None:
    turns = Turns()
    assert all(turns.take() for _ in range(AT_ONCE))
    assert not turns.take()
    for _ in range(3):
        await asyncio.sleep(0)
    assert turns.take()


async def test_who_has_given_up_takes_nobodys_turn() -> None:
    turns = Turns()
    while turns.take():
        pass
    given_up = [asyncio.ensure_future(turns.wait()) for _ in range(3 * AT_ONCE)]
    last = asyncio.ensure_future(turns.wait())
    for task in given_up:
        await asyncio.sleep(0)
        task.cancel()
    async with asyncio.timeout(10):
        await last
