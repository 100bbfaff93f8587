"""Leases count until they are freed, expire, or lose their worker; reservations until the worker reports by itself."""

from __future__ import annotations

import asyncio

import pytest

from holdfast.base.errors import CapacityExhausted
from holdfast.routerd import reservations
from holdfast.routerd.reservations import RESERVE_SECONDS, SETTLE_SECONDS, Reservations
from holdfast.routing.claims import Claim, Ledger
from holdfast.wire.frames import Load, Pong, Progress
from tests.support.virtual_time import virtual

SIZE = 16


class Worker:
    """One that reports what it is told to."""

    instance, epoch = "w", 1

    def __init__(self) -> None:
        self.pong: Pong | None = None
        self.say(0)

    def say(self, requests: int) -> None:
        self.pong = Pong(0, Progress(), Load(requests, 0, 0, 1000, 160 * requests), 0)


class Scene:
    def __init__(self, expiry: float = 300.0) -> None:
        self.ledger, self.worker = Ledger(), Worker()
        self.held = Reservations(expiry)

    def take(self, request_id: str = "") -> Claim:
        claim = self.ledger.take(self.worker, 160, SIZE, rank=0)
        self.held.hold(claim, self.worker.instance, request_id)
        return claim

    @property
    def seen(self) -> tuple[int, int, int]:
        """Blocks, prompt tokens and requests in hand, as a choice would count them."""
        return tuple(self.ledger.estimate(self.worker, 0, SIZE, 1))  # type: ignore[return-value]


@virtual
async def test_a_lease_is_counted_once_before_and_after_the_worker_reports_it() -> None:
    scene = Scene()
    scene.take("a")
    assert scene.seen == (10, 160, 1)
    scene.worker.say(0)  # a report from before the request has come there
    assert scene.seen == (10, 160, 1)
    await asyncio.sleep(SETTLE_SECONDS * 1.5)
    scene.worker.say(1)
    assert scene.seen == (10, 160, 1), "once, not twice"
    assert scene.held.computed("a")
    assert scene.seen[1:] == (0, 1)
    assert scene.held.free("a")
    assert scene.seen[2] == 0, "less than the last report says, for it is over"
    scene.worker.say(0)
    assert scene.seen == (0, 0, 0)
    assert scene.ledger.held() == 0


@virtual
async def test_a_reservation_bridges_the_time_until_the_report() -> None:
    scene = Scene()
    scene.take()
    assert scene.seen[2] == 1
    await asyncio.sleep(SETTLE_SECONDS * 1.5)
    scene.worker.say(1)
    assert scene.seen[2] == 1
    await asyncio.sleep(RESERVE_SECONDS)
    scene.worker.say(1)
    assert (scene.seen[2], len(scene.held), scene.held.expired) == (1, 0, 0)


@virtual
async def test_leases_end_when_nobody_frees_them_and_with_their_worker() -> None:
    scene = Scene(expiry=5.0)
    scene.take("a")
    await asyncio.sleep(6.0)
    assert (len(scene.held), scene.held.expired, scene.ledger.held()) == (0, 1, 0)
    assert not scene.held.free("a")
    for name in ("b", "c"):
        scene.take(name)
    scene.held.forget("another")
    assert len(scene.held) == 2
    scene.held.forget("w")
    assert (len(scene.held), scene.ledger.held()) == (0, 0)


@virtual
async def test_an_id_that_comes_again_replaces_its_lease() -> None:
    scene = Scene()
    for _ in range(3):
        scene.take("a")
    assert (len(scene.held), scene.ledger.held()) == (1, 1)
    scene.held.close()
    assert scene.ledger.held() == 0


@virtual
async def test_leases_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reservations, "ACTIVE_REQUESTS", 2)
    scene = Scene()
    for name in "ab":
        scene.held.check_room()
        scene.take(name)
    with pytest.raises(CapacityExhausted, match="holds 2 leases"):
        scene.held.check_room()
    scene.held.close()
