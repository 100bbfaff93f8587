"""Random fault scripts on a simulated fleet, and the oracles of the promises P1 to P4 over what came out."""

from __future__ import annotations

import asyncio
import random
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

from holdfast.base.errors import EngineFailed, WorkerDraining, WorkerSaturated
from tests.requests.fakes import Client, FakeStream, Fleet, check_stream, truth
from tests.requests.machine import Machine, machines
from tests.support.virtual_time import virtual

WorkerFault = Literal[
    "die", "freeze", "drain", "refuse_full", "refuse_draining", "refuse_broken", "abort", "early", "error", "overlap",
    "gap", "slow", "fast", "no_way",
]  # fmt: skip
ClientFault = Literal["cancel", "block", "unblock", "shutdown"]
WORKER_FAULTS: tuple[WorkerFault, ...] = WorkerFault.__args__  # type: ignore[attr-defined]
CLIENT_FAULTS: tuple[ClientFault, ...] = ClientFault.__args__  # type: ignore[attr-defined]

EXPECTED = frozenset({"migration_exhausted", "poison_request", "no_workers", "worker_saturated", "capacity_exhausted"})
"""How a stream may fail under faults; everything else is a fault of ours."""


@dataclass(frozen=True)
class Act:
    """Something happens to worker or client ``who`` at ``at`` milliseconds."""

    at: int
    who: int
    what: WorkerFault | ClientFault


@dataclass(frozen=True)
class Script:
    workers: int
    clients: tuple[tuple[int, int, int], ...]
    """(start in milliseconds, tokens, choices)."""
    acts: tuple[Act, ...] = field(default=())


def random_script(seed: int) -> Script:
    rng = random.Random(seed)
    clients = tuple(
        (rng.randrange(300), rng.randint(1, 60), rng.choice((1, 1, 1, 2))) for _ in range(rng.randint(1, 6))
    )
    workers = rng.randint(1, 4)
    acts = [Act(rng.randrange(900), rng.randrange(workers), rng.choice(WORKER_FAULTS)) for _ in range(rng.randrange(9))]
    acts += [
        Act(rng.randrange(900), rng.randrange(len(clients)), rng.choice(CLIENT_FAULTS)) for _ in range(rng.randrange(4))
    ]
    return Script(workers, clients, tuple(acts))


def _drain(machine: Machine) -> None:
    """Everything running is sent elsewhere, new work is refused for a while."""
    worker = machine.worker
    worker.usable = False
    worker.fleet.tell("state", worker)
    for stream in list(worker.streams.values()):
        stream.end("error", WorkerDraining("leaving"))
    asyncio.get_running_loop().call_later(0.3, machine._restart)


def _overlap(stream: FakeStream) -> None:
    index = max(0, len(stream.ids) - 2)
    again = stream.ids[index:]
    stream.say(index, again + stream.think(1))


def _gap(stream: FakeStream) -> None:
    stream.think(1)
    stream.emit(1)


def _no_way(machine: Machine) -> None:
    machine.worker.open_error = EngineFailed("no way for the moment")
    asyncio.get_running_loop().call_later(0.2, setattr, machine.worker, "open_error", None)


def do_to_worker(machine: Machine, what: str) -> None:
    acts = {
        "die": machine.die,
        "freeze": partial(machine.freeze, 2.5),
        "drain": partial(_drain, machine),
        "refuse_full": partial(machine.refuse.append, WorkerSaturated("full")),
        "refuse_draining": partial(machine.refuse.append, WorkerDraining("leaving")),
        "refuse_broken": partial(machine.refuse.append, EngineFailed("broken")),
        "abort": partial(machine.spoil.append, lambda s: s.end("abort")),
        "early": partial(machine.spoil.append, lambda s: s.end("length")),
        "error": partial(machine.spoil.append, lambda s: s.end("error", EngineFailed("on command"))),
        "overlap": partial(machine.spoil.append, _overlap),
        "gap": partial(machine.spoil.append, _gap),
        "slow": partial(setattr, machine, "step", 0.08),
        "fast": partial(setattr, machine, "step", 0.002),
        "no_way": partial(_no_way, machine),
    }
    acts[what]()


class Played:
    """One run of a script."""

    def __init__(self, script: Script):
        self.script = script
        self.fleet = Fleet(workers=script.workers)
        self.machines = machines(self.fleet, restart_after=0.4)
        self.clients: list[Client] = []
        self.cancelled: dict[str, int] = {}
        """Attempts made by a request when it was cancelled."""

    async def play(self) -> None:
        loop = asyncio.get_running_loop()
        events = [(c[0], 0, i, partial(self._start, i)) for i, c in enumerate(sorted(self.script.clients))]
        events += [(a.at, 1, i, partial(self._act, a)) for i, a in enumerate(self.script.acts)]
        began = loop.time()
        for at, _, _, event in sorted(events, key=lambda e: e[:3]):
            await asyncio.sleep(max(0.0, began + at / 1000 - loop.time()))
            event()
        await asyncio.sleep(1)
        for client in self.clients:
            self._unblock(client)
        async with asyncio.timeout(400):
            await asyncio.gather(*(c.task for c in self.clients if c.task), return_exceptions=True)
        await asyncio.sleep(5)

    def _start(self, number: int) -> None:
        _, length, n = sorted(self.script.clients)[number]
        self.clients.append(self.fleet.start(prompt=(number,), length=length, n=n, first_token=5.0, inter_token=3.0))

    def _act(self, act: Act) -> None:
        if act.what in WORKER_FAULTS:
            do_to_worker(self.machines[act.who], act.what)
        elif act.who < len(self.clients):
            self._do_to_client(self.clients[act.who], act.what)

    def _do_to_client(self, client: Client, what: str) -> None:
        if what == "cancel":
            client.request.cancel("client_disconnected")
        elif what == "shutdown":
            assert client.task is not None
            client.task.cancel()
            return
        elif what == "block":
            for sink in client.sinks:
                if not sink.endings:
                    sink.blocked_since = asyncio.get_running_loop().time()
        else:
            self._unblock(client)
        if what == "cancel":
            self.cancelled[client.request.id] = self._attempts(client)

    def _unblock(self, client: Client) -> None:
        for sink, stream in zip(client.sinks, client.request.streams, strict=True):
            sink.blocked_since = None
            stream.deliver()

    def _attempts(self, client: Client) -> int:
        return sum(s.request.request_id in {p.request_id for p in client.plans} for s in self.fleet.attempts)

    # the oracles

    def check(self) -> None:
        assert len(self.clients) == len(self.script.clients)
        for client in self.clients:
            assert client.task is not None
            assert client.task.done(), "P5: a request outlived everything"
            assert client.task.cancelled() or client.task.exception() is None, client.task.exception()
            for one, sink in zip(client.plans, client.sinks, strict=True):
                check_stream(one, sink)
                ending = sink.endings[0]
                if ending.state in ("failed", "rejected"):
                    assert ending.error is not None
                    assert ending.error.code in EXPECTED, ending.error
            if client.request.id in self.cancelled:
                assert self._attempts(client) == self.cancelled[client.request.id], "an attempt after the cancel"
        for stream in self.fleet.attempts:
            true = truth(stream.request.prompt_ids, stream.begin)
            assert stream.ids[: stream.begin] == true, "P1: a worker was asked to continue something else"
            assert stream.first_index == stream.begin, "P1: caller and worker begin at different places"
            assert stream.over, "a worker still works for nobody"
        assert self.fleet.leases() == {}, "P4: leases at rest"
        assert all(held >= 0 for held in self.fleet.services.leases.sums().values()), "P4: given back twice"
        ended = self.fleet.seen.all("ended")
        assert len(ended) == sum(len(c.sinks) for c in self.clients), "P2: the observer saw other ends"


def run_script(script: Script) -> Played:
    """Play a script in virtual time and check all oracles."""

    @virtual
    async def play() -> Played:
        played = Played(script)
        await played.play()
        played.check()
        return played

    return play()
