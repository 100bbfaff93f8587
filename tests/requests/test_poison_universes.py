"""Random universes with one killer among a hundred streams: workers lost, streams lost, and who waits how long."""

from __future__ import annotations

import asyncio
import random
from dataclasses import dataclass, replace

import pytest

from holdfast.base.errors import PoisonRequest
from holdfast.requests.placement import TRIAL_PATIENCE
from tests.requests.fakes import Client, FakeStream, Fleet
from tests.requests.machine import KillsAt, Machine
from tests.requests.test_poison_streams import KILLER, at_prefill, at_token, each_time_after, is_killer, lost
from tests.support.virtual_time import virtual

SEEDS = 60
STREAMS = 100


@dataclass(frozen=True)
class Universe:
    """What a seed decides."""

    seed: int
    workers: int
    restart_after: float | None
    step: float
    accept_delay: float
    prefill_batch: int
    length: int
    killer_at: int
    starts: tuple[float, ...]
    """Seconds after the beginning at which each stream starts, in order."""


def universe(seed: int, *, patient: bool = False) -> Universe:
    """Return what the seed says; ``patient``: streams are long enough, and workers enough, for a killer that waits."""
    rng = random.Random(seed)
    workers = rng.randint(2, 6)
    shape = rng.choice(["at once", "staggered", "joins", "burst"])
    spread = rng.choice([0.0005, 0.002, 0.01, 0.03])
    starts = {
        "at once": [0.0] * STREAMS,
        "staggered": sorted(rng.uniform(0, spread * STREAMS) for _ in range(STREAMS)),
        "joins": sorted([rng.uniform(0, 0.05) for _ in range(STREAMS - 1)] + [0.5]),
        "burst": sorted(rng.choice([0.0, 0.015, 0.3]) for _ in range(STREAMS)),
    }[shape]
    return Universe(
        seed=seed,
        workers=workers,
        restart_after=rng.choice([0.1, 0.6, 3.0, None] if workers > (3 if patient else 2) else [0.1, 0.6, 3.0, 8.0]),
        step=rng.choice([0.002, 0.005, 0.01, 0.02]),
        accept_delay=rng.choice([0.0005, 0.001, 0.006, 0.015]),
        prefill_batch=rng.choice([2, 8, 32, 1000]),
        length=rng.choice([30, 120] if patient else [5, 30, 120]),
        killer_at=STREAMS - 1 if shape == "joins" else rng.randrange(STREAMS),
        starts=tuple(starts),
    )


class Lived:
    """A universe after its end."""

    def __init__(self, one: Universe, clients: list[Client], all_machines: list[Machine]):
        self.one = one
        self.clients = clients
        self.deaths = sum(m.deaths for m in all_machines)
        innocent = [c for i, c in enumerate(clients) if i != one.killer_at]
        self.longest = max((m.gap_seconds for c in innocent for m in c.ending.moves), default=0.0)

    def check(self, *, deaths: int) -> None:
        one = self.one
        assert lost(self.clients) == [one.killer_at], one
        error = self.clients[one.killer_at].ending.error
        assert isinstance(error, PoisonRequest), one
        assert self.deaths <= deaths, f"{self.deaths} workers lost: {one}"
        assert self.longest <= self.bound(deaths), f"{self.longest:.2f} s: {one}"

    def bound(self, deaths: int) -> float:
        """Seconds: one patience per death, the workers' absence, and an engine's queue of prompts each time."""
        one = self.one
        queue = one.step * (STREAMS / one.prefill_batch + 10) + one.accept_delay
        return deaths * (TRIAL_PATIENCE + (one.restart_after or 0.0) + queue)


class Mute(Machine):
    """It dies of the killer's first attempt with the word unsent that it accepted it."""

    def _arrived(self, stream: FakeStream) -> None:
        if is_killer(stream) and stream.request.attempt == 1 and not stream.over:
            self.die()
        else:
            super()._arrived(stream)


def live(one: Universe, kills: KillsAt, kind: type[Machine] = Machine, trial_tokens: int = 1) -> Lived:
    @virtual
    async def play() -> Lived:
        fleet = Fleet(workers=one.workers, settings={"migration_trial_tokens": trial_tokens})
        all_machines = [
            kind(
                worker,
                kills=kills,
                restart_after=one.restart_after,
                prefill_batch=one.prefill_batch,
                accept_delay=one.accept_delay,
            )
            for worker in fleet.workers
        ]
        for machine in all_machines:
            machine.step = one.step
        loop = asyncio.get_running_loop()
        began = loop.time()
        clients = []
        for i, at in enumerate(one.starts):
            if began + at > loop.time():
                await asyncio.sleep(began + at - loop.time())
            clients.append(fleet.start(prompt=(KILLER if i == one.killer_at else i, i), length=one.length))
        for client in clients:
            await client.done(within=300)
        assert fleet.leases() == {}
        assert not fleet.services.inquest.moving
        return Lived(one, clients, all_machines)

    return play()


@pytest.mark.parametrize("tenth", range(10))
def test_a_killer_of_the_prompt_costs_two_workers_in_every_universe(tenth: int) -> None:
    for seed in range(tenth * SEEDS // 10, (tenth + 1) * SEEDS // 10):
        live(universe(seed), at_prefill).check(deaths=2)


@pytest.mark.parametrize("kills", [at_token(2), at_token(4), each_time_after(1), each_time_after(3)])
def test_a_killer_that_waits_costs_three_workers_in_every_universe(kills: KillsAt) -> None:
    for seed in range(1000, 1000 + SEEDS // 10):
        live(universe(seed, patient=True), kills).check(deaths=3)


@pytest.mark.parametrize(
    "kills", [at_prefill, at_token(2), at_token(4), at_token(20), each_time_after(1), each_time_after(3)]
)
def test_a_killer_costs_two_workers_where_all_with_so_few_tokens_are_tried(kills: KillsAt) -> None:
    for seed in range(3000, 3000 + SEEDS // 10):
        live(universe(seed, patient=True), kills, trial_tokens=24).check(deaths=2)


def test_a_killer_that_was_not_accepted_the_first_time_costs_two_workers_if_others_were() -> None:
    for seed in range(2000, 2000 + SEEDS // 6):
        one = universe(seed, patient=True)
        joins = one.accept_delay + 5 * one.step
        late = replace(one, starts=(*[0.0] * (STREAMS - 1), joins), killer_at=STREAMS - 1)
        live(late, at_prefill, Mute).check(deaths=2)
