"""Streams and the router: caches, ranks, pins, sessions, conditions; and nothing is held at the end."""

from __future__ import annotations

from array import array
from typing import Any

import msgspec
import pytest

from holdfast.base.errors import Disconnected, InvalidRequest, NoWorkers, WorkerSaturated
from holdfast.engines.contract import pack_ids
from holdfast.kv.hashes import block_hashes
from holdfast.requests.chain import Chain
from holdfast.routing.claims import Sums
from holdfast.routing.knowledge import Overlaps
from holdfast.routing.route import Route
from holdfast.routing.router_config import RouterSettings
from tests.requests.fakes import FakeWorker, Fleet, card, settle

BLOCK = 16


class Caches:
    """Remembers what was sent where."""

    def __init__(self) -> None:
        self.told: list[tuple[str, int, array[int]]] = []

    def lookup(self, hashes: array[int], _block_size: int, _now: float) -> Overlaps:
        found: dict[tuple[str, int], tuple[int, int, int]] = {}
        for instance, rank, held in self.told:
            run = next(
                (i for i, (a, b) in enumerate(zip(hashes, held, strict=False)) if a != b), min(len(hashes), len(held))
            )
            if run > found.get((instance, rank), (0, 0, 0))[0]:
                found[instance, rank] = (run, 0, 0)
        return Overlaps(found)

    def decided(self, instance: str, rank: int, hashes: array[int], _now: float) -> None:
        self.told.append((instance, rank, hashes))


def kv_fleet(workers: int = 3, **settings: Any) -> tuple[Fleet, Caches]:
    caches = Caches()
    return Fleet(workers, mode="kv", knowledge=caches, settings=settings), caches


def at_rest(fleet: Fleet) -> None:
    ledger = fleet.services.admission.ledger
    assert fleet.leases() == {}
    assert ledger.held() == 0
    for worker in fleet.workers:
        assert ledger.sums(worker, 0) == Sums(0, 0, 0)


async def serve(fleet: Fleet, prompt: range, **kwargs: Any) -> FakeWorker:
    client = fleet.start(prompt=list(prompt), length=2, **kwargs)
    await settle()
    stream = fleet.attempts[-1]
    stream.accept().emit(2).end("length")
    await client.done()
    return stream.worker


async def test_a_prompt_goes_where_its_prefix_is() -> None:
    fleet, caches = kv_fleet()
    home = await serve(fleet, range(100))
    for _ in range(4):
        assert await serve(fleet, range(120)) is home
    others = {(await serve(fleet, range(1000 * n, 1000 * n + 60))).instance for n in range(1, 5)}
    assert len(others) > 1
    assert caches.told[0][2] == block_hashes(list(range(100)), BLOCK)
    at_rest(fleet)


async def test_a_stream_that_moves_is_placed_by_all_its_tokens() -> None:
    fleet, caches = kv_fleet(2)
    client = fleet.start(prompt=list(range(30)), length=60)
    await settle()
    first = fleet.attempts[-1].accept().emit(40)
    first.worker.die()
    await settle()
    second = fleet.attempts[-1].accept().emit(20).end("length")
    await client.done()
    whole = array("I", memoryview(second.request.prompt_ids).cast("I"))
    whole.extend(memoryview(second.request.generated_ids).cast("I"))
    assert caches.told[1][2] == block_hashes(whole, BLOCK)
    assert len(caches.told[1][2]) == (31 + 40) // BLOCK
    at_rest(fleet)


@pytest.mark.parametrize("track", [False, True])
async def test_output_between_two_reports_counts_only_where_it_is_followed(track: bool) -> None:
    fleet, _ = kv_fleet(1, router=RouterSettings(router_track_output_blocks=track))
    client = fleet.start(prompt=list(range(30)), length=600, route=Route(expected_output=400))
    await settle()
    stream = fleet.attempts[-1].accept().emit(200)
    await settle()
    ledger = fleet.services.admission.ledger
    blocks = ledger.estimate(stream.worker, 0, BLOCK, 1).blocks
    assert blocks == (15 - round(15 * 0.5) if track else 2), "231 tokens, all its own, half of the answer is over"
    stream.emit(400).end("length")
    await client.done()
    at_rest(fleet)


async def test_the_choice_is_explained() -> None:
    fleet, _ = kv_fleet(2)
    await serve(fleet, range(100))
    client = fleet.start(prompt=list(range(160)), length=1)
    await settle()
    fleet.attempts[-1].accept().emit(1).end("length")
    await client.done()
    count, shown = client.stream.driver.considered[0]
    assert count == 2
    (rank, overlap, prefill, decode, cost) = shown[0][3]  # type: ignore[misc]
    assert shown[0][0] == fleet.attempts[-1].worker.instance
    assert (rank, overlap, decode) == (0, 6, 11)
    assert cost == pytest.approx(prefill + decode / 16)


async def test_the_rank_is_chosen_and_told() -> None:
    fleet, _ = kv_fleet(1)
    fleet.workers[0].cards["m"] = msgspec.structs.replace(card(), data_parallel_size=2)
    ranks = []
    for _ in range(3):
        await serve(fleet, range(100))
        ranks.append(fleet.attempts[-1].request.extra["data_parallel_rank"])
    assert len(set(ranks)) == 1, "where the prefix is"
    client = fleet.start(prompt=list(range(100)), length=2, route=Route(rank=1 - ranks[0]))
    await settle()
    assert fleet.attempts[-1].request.extra["data_parallel_rank"] == 1 - ranks[0]
    client.request.cancel("test")
    await client.done()
    at_rest(fleet)


async def test_other_modes_do_not_hash() -> None:
    fleet = Fleet(2)
    client = fleet.start()
    await settle()
    assert client.stream.need.chain is None
    fleet.attempts[-1].accept().emit(10).end("length")
    await client.done()
    at_rest(fleet)


async def test_a_named_worker_gets_it_while_it_is_there_and_a_stream_that_began_moves_anyway() -> None:
    fleet = Fleet(3)
    client = fleet.start(route=Route(worker="w3"))
    await settle()
    first = fleet.attempts[-1].accept().emit(2)
    assert first.worker.instance == "w3"
    first.worker.die()
    await settle()
    fleet.attempts[-1].accept().emit(8).end("length")
    await client.done()
    assert (await serve(fleet, range(3), route=Route(worker="w3"))).instance != "w3", "advice: it is gone"


async def test_direct_needs_a_name_that_is_there() -> None:
    fleet = Fleet(2, mode="direct")
    ending = await fleet.start().done()
    assert isinstance(ending.error, InvalidRequest)
    ending = await fleet.start(route=Route(worker="nobody")).done()
    assert isinstance(ending.error, NoWorkers)
    assert (await serve(fleet, range(3), route=Route(worker="w2"))).instance == "w2"


async def test_conditions_leave_workers_out() -> None:
    fleet = Fleet(3)
    fleet.workers[1].cards["m"] = msgspec.structs.replace(card(), taints=("dynamo.topology/zone=b",))
    zone = Route(required=frozenset({"dynamo.topology/zone=b"}))
    assert {(await serve(fleet, range(3), route=zone)).instance for _ in range(4)} == {"w2"}
    allowed = Route(allowed=frozenset({"w1", "w3"}))
    assert {(await serve(fleet, range(3), route=allowed)).instance for _ in range(4)} == {"w1", "w3"}


@pytest.mark.parametrize("mode", ["hard", "soft"])
async def test_a_session_stays_with_its_worker(mode: Any) -> None:
    router = RouterSettings(router_session_affinity_ttl_secs=60, router_session_affinity_mode=mode)
    fleet = Fleet(3, settings={"router": router})
    session = Route(session="s")
    home = await serve(fleet, range(3), route=session)
    assert {(await serve(fleet, range(3), route=session)).instance for _ in range(5)} == {home.instance}
    home.usable = False
    moved = await serve(fleet, range(3), route=session)
    home.usable = True
    assert (await serve(fleet, range(3), route=session)) is moved, "its cache is there now"


async def test_a_soft_session_gives_way_when_its_worker_refuses() -> None:
    router = RouterSettings(router_session_affinity_ttl_secs=60)
    fleet = Fleet(2, settings={"router": router})
    home = await serve(fleet, range(3), route=Route(session="s"))
    client = fleet.start(route=Route(session="s"), length=2)
    await settle()
    assert fleet.attempts[-1].worker is home
    fleet.attempts[-1].refuse(WorkerSaturated("full"))
    await settle()
    assert fleet.attempts[-1].worker is not home
    fleet.attempts[-1].accept().emit(2).end("length")
    await client.done()


async def test_a_routers_advice_is_a_preference_for_the_first_worker_alone() -> None:
    fleet = Fleet(3)
    advised = Route(advised="w2")
    assert {(await serve(fleet, range(3), route=advised)).instance for _ in range(4)} == {"w2"}
    client = fleet.start(route=advised, length=4)
    await settle()
    assert fleet.attempts[-1].worker.instance == "w2"
    fleet.attempts[-1].refuse(WorkerSaturated("full"))
    await settle()
    other = fleet.attempts[-1]
    assert other.worker.instance != "w2", "it gives way to one with room"
    other.accept().emit(2)
    other.handler.on_broken(Disconnected("killed"))
    await settle()
    assert fleet.attempts[-1].worker is not other.worker
    fleet.attempts[-1].accept().emit(2).end("length")
    await client.done()
    fleet.workers[1].usable = False
    assert (await serve(fleet, range(3), route=advised)).instance in {"w1", "w3"}
    kv, _ = kv_fleet()
    assert {(await serve(kv, range(40), route=Route(advised="w3"))).instance for _ in range(2)} == {"w3"}


def test_a_chain_grows_by_what_is_new() -> None:
    ids = list(range(500))
    chain = Chain(pack_ids(ids[:100]))
    first = chain.of(BLOCK)
    assert first == block_hashes(ids[:100], BLOCK)
    assert chain.of(BLOCK) is first
    for length in (103, 112, 300, 500):
        assert chain.of(BLOCK, pack_ids(ids[100:length])) == block_hashes(ids[:length], BLOCK)
    assert first == block_hashes(ids[:100], BLOCK), "what was handed out does not change"
    assert chain.of(64) == block_hashes(ids[:100], 64)
    assert Chain(pack_ids(ids), "salt").of(BLOCK) == block_hashes(ids, BLOCK, salt="salt")
    adapted = Chain(pack_ids(ids[:50]), "salt", "shy")
    assert adapted.of(BLOCK, pack_ids(ids[50:])) == block_hashes(ids, BLOCK, salt="salt", lora="shy")
