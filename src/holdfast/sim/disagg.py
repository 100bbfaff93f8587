"""Universes whose prompts and streams are computed by different workers: who plays which part, and what goes wrong.

A share of all universes is split. It is decided by a row of the tape of its own, so that nothing else shifts. Beside
the faults that strike every worker, hand-offs get lost or stand for other tokens. Must never look at what happened.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

import msgspec

from holdfast.engines.handoff import CancelUntil, HandoffPhase, Role
from holdfast.requests.config import DisaggSettings
from holdfast.sim.tape import Tape

if TYPE_CHECKING:
    from holdfast.sim.cluster import SimCluster
    from holdfast.sim.history import History
    from holdfast.sim.hosts import Host
    from holdfast.sim.plan import Plan
    from holdfast.sim.world import World

SHARE = 0.18
"""Of all universes."""
MORE_WORKERS = 2
"""That a split universe has: a part of three would be too small to lose anybody."""
HOLD = 6.0
"""Seconds for which a prefill worker keeps blocks that nobody lets go."""
SILENCING = ("freeze", "slow", "partition", "delay", "power-loss")
ROUND_TRIP = 0.002
"""Seconds between the two ends of a rendezvous."""


class Spoil(msgspec.Struct, frozen=True, omit_defaults=True):
    """Hand-offs of one worker that go wrong."""

    at: float
    worker: str
    do: Literal["lose", "swap"]
    times: int = 1


class Split(msgspec.Struct, frozen=True, omit_defaults=True):
    """How a universe is split."""

    prefill: int = 2
    """The first so many workers compute prompts."""
    decode: bool = True
    """The others are decode workers; otherwise they do everything when asked."""
    phase: HandoffPhase = "after_prefill"
    failure: Literal["recompute", "fail", "hang"] = "recompute"
    cancel_until: CancelUntil = "anytime"
    bandwidth: float = 0.0
    """GB/s; 0: blocks travel at once."""
    local: int = 0
    """Prompts up to this length are not handed over."""
    spoils: tuple[Spoil, ...] = ()

    def role(self, worker: str) -> Role:
        """Return what a worker does."""
        if int(worker.rpartition("-")[2]) < self.prefill:
            return "prefill"
        return "decode" if self.decode else "aggregated"

    def engine(self) -> dict[str, Any]:
        """Return settings of its mock engines."""
        return {
            "handoff_phase": self.phase,
            "handoff_failure": self.failure,
            "cancel_until": self.cancel_until,
            "kv_transfer_bandwidth": self.bandwidth,
        }

    def settings(self) -> DisaggSettings:
        """Return settings of its frontends."""
        return DisaggSettings(max_local_prefill_length=self.local, prefill_timeout=8.0, handoff_timeout=4.0)


def draw_split(tape: Tape, workers: int, span: float, wanted: bool | None) -> Split | None:
    """Return how a universe is split, or None.

    Args:
        tape: decides, by its row ``roles``.
        workers: that it has.
        span: seconds in which things go wrong.
        wanted: decided already; None: the tape decides.
    """
    row = tape.stream("roles")
    drawn = row.chance(SHARE, "split")
    if not (drawn if wanted is None else wanted):
        return None
    prefill = 2 if workers > 2 else 1
    spoils = tuple(
        Spoil(
            row.uniform(0.2, span, "spoilt at"),
            f"worker-{row.choose(prefill, 'which prefill worker')}",
            row.pick(("lose", "swap"), "how"),
            1 + row.choose(4, "times"),
        )
        for _ in range(row.choose(4, "spoilt hand-offs"))
    )
    return Split(
        prefill=prefill,
        decode=not row.chance(0.3, "aggregated workers"),
        phase="rendezvous" if row.chance(0.35, "rendezvous") else "after_prefill",
        failure=row.pick(("recompute", "fail", "hang"), "lost hand-offs"),
        cancel_until="pre_handoff" if row.chance(0.3, "late cancels") else "anytime",
        bandwidth=row.pick((0.0, 0.05, 0.005), "bandwidth"),
        local=25 if row.chance(0.2, "short prompts stay") else 0,
        spoils=spoils,
    )


def idle(plan: Plan, worker: str) -> bool:
    """Return whether a worker gets none of the probes: they are shorter than what it is for."""
    split = plan.split
    return split is not None and split.local > 0 and split.role(worker) == "prefill"


def kept_for(plan: Plan, history: History, now: float) -> float:
    """Return for how long a prefill worker may still keep blocks for a frontend that fell silent lately."""
    silent = any(fault.kind in SILENCING and fault.until >= now - HOLD for fault in history.fired)
    return HOLD if plan.split is not None and silent else 0.0


def spoil(cluster: SimCluster, split: Split) -> None:
    """Let hand-offs go wrong at their times."""
    for one in split.spoils:
        cluster.world.loop.call_later(one.at, _spoil, cluster, one, context=cluster.world.context)


def _spoil(cluster: SimCluster, one: Spoil) -> None:
    worker = cluster.worker(one.worker)
    if worker is not None and worker.life.ready:
        cluster.history.see(f"hand-offs {one.do}")
        worker.host.post(worker.engine.control, {"do": one.do, "times": one.times})


class Meetings:
    """All rooms of one universe."""

    def __init__(self, world: World):
        self._world = world
        self._ready: set[int] = set()
        self._waiting: dict[int, list[tuple[str, Host, Callable[[bool], None]]]] = {}
        self.open: dict[str, Host] = {}

    def opened(self, host: Host) -> str:
        """A prefill worker can be found."""
        address = f"{host.address}:{8998}"
        self.open[address] = host
        host.on_end.append(lambda silent: self._closed(address, host, silent=silent))
        return address

    def offer(self, room: int) -> None:
        """A prompt is computed."""
        self._ready.add(room)
        for _, host, done in self._waiting.pop(room, ()):
            self._tell(host, done, came=True)

    def meet(self, host: Host, address: str, room: int, done: Callable[[bool], None]) -> Callable[[], None]:
        """A decode leg waits."""
        if room in self._ready:
            self._tell(host, done, came=True)
        elif address not in self.open:
            self._tell(host, done, came=False)
        else:
            self._waiting.setdefault(room, []).append((address, host, done))
        return lambda: self._leave(room, done)

    def _leave(self, room: int, done: Callable[[bool], None]) -> None:
        left = [one for one in self._waiting.get(room, ()) if one[2] is not done]
        if left:
            self._waiting[room] = left
        else:
            self._waiting.pop(room, None)

    def _closed(self, address: str, host: Host, *, silent: bool) -> None:
        if self.open.get(address) is host:
            del self.open[address]
        if silent:
            return  # nobody hears anything
        for room in list(self._waiting):
            lost = [one for one in self._waiting[room] if one[0] == address]
            self._waiting[room] = [one for one in self._waiting[room] if one[0] != address]
            for _, waiting, done in lost:
                self._tell(waiting, done, came=False)

    def _tell(self, host: Host, done: Callable[[bool], None], *, came: bool) -> None:
        def arrive() -> None:
            if host.alive:
                host.post(done, came)

        self._world.loop.call_later(ROUND_TRIP, arrive, context=self._world.context)


class SimExchange:
    """One engine's way to others (`engines.mock.rendezvous.Exchange`)."""

    def __init__(self, meetings: Meetings, host: Host):
        self._meetings, self._host = meetings, host

    async def open(self) -> str:
        """See `Exchange`."""
        return self._meetings.opened(self._host)

    def offer(self, room: int) -> None:
        """See `Exchange`."""
        self._meetings.offer(room)

    def meet(self, address: str, room: int, done: Callable[[bool], None]) -> Callable[[], None]:
        """See `Exchange`."""
        return self._meetings.meet(self._host, address, room, done)

    async def close(self) -> None:
        """The host's end says it."""
