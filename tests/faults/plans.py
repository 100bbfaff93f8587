"""Which plans real clusters go through: drawn as for a universe, and one that strikes with every kind once.

Starting processes costs seconds, so plans are given one of a few settings, and those of equal settings share a cluster.
Must never look at what happened.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from holdfast.sim.faults import AnyFault, Delay, Moment, Partition, Reset, kinds
from holdfast.sim.plan import _MAKERS, Plan, Shape, draw_plan
from holdfast.sim.profiles import Profile
from holdfast.sim.tape import Tape
from holdfast.sim.workload import Manner, Wish

Setting = Literal["plain", "tight", "bulk", "caches", "guarded"]
GUARDED_EVERY = 8
GROUPS: tuple[tuple[str, ...], ...] = (
    ("discovery-outage", "discovery-stale", "discovery-partial"),
    ("engine-error", "freeze", "engine-slow", "reset", "crash"),
    ("engine-miscount", "engine-hang", "engine-abort", "delay", "terminate"),
    ("partition", "engine-refuse", "slow", "overload", "out-of-memory"),
    ("engine-compile", "wall-jump", "power-loss", "killer-prompt"),
    ("kv-lost", "kv-repeated", "kv-reordered"),
    ("rolling-restart",),
)
"""What strikes together, so that the long shadows of some overlap. Discovery is alone, for P12 speaks of it alone."""


def settings(plan: Plan, seed: int) -> tuple[Setting, Plan]:
    """Return a plan with one of the few settings, and which one that is."""
    if plan.profile == "overload":
        return "tight", msgspec.structs.replace(
            plan,
            **{**_PLAIN, "seats": 2, "limit": 3, "queue": 4, "blocks": 24, "most_requests": 14, "most_waiting": 2},
        )
    if plan.profile in ("bulk", "caches"):
        return plan.profile, msgspec.structs.replace(plan, **{**_PLAIN, "blocks": plan.blocks})
    if seed % GUARDED_EVERY == 0:
        old = {"old": ("frontend-0", "worker-1"), "secret": "a shared secret", "canary": True}
        return "guarded", msgspec.structs.replace(plan, **{**_PLAIN, **old})
    return "plain", msgspec.structs.replace(plan, **_PLAIN)


_PLAIN = {
    "seats": 8,
    "limit": 0,
    "queue": 0,
    "queue_timeout": 3.0,
    "blocks": 256,
    "decode_threshold": None,
    "prefill_threshold": None,
    "most_requests": 1000,
    "most_waiting": 1000,
    "canary": False,
    "old": (),
    "kv_warm": False,
    "secret": "",
    "narrow": False,
    "kv_events": True,
}


def drawn(seed: int) -> tuple[Setting, Plan]:
    """Return the plan of a seed; its requests and faults are those that a universe of this seed would draw."""
    return settings(draw_plan(Tape(seed), Shape(split=False)), seed)


def sweep(seed: int) -> list[Plan]:
    """Return plans that together have every kind of fault once, and every manner of a client."""
    found = sorted(kind for group in GROUPS for kind in group)
    assert found == sorted(kinds()), f"not every kind is in a group: {set(kinds()) ^ set(found)}"
    return [_group(seed * len(GROUPS) + i, group) for i, group in enumerate(GROUPS)]


def _group(seed: int, group: tuple[str, ...]) -> Plan:
    tape = Tape(seed)
    profile: Profile = "discovery" if group[0].startswith("discovery") else "mixed"
    shape = Shape(
        split=False,
        profile=profile,
        requests=6 + 6 * len(group),
        more_requests=0,
        faults=0,
        more_faults=0,
        span=2.0 + len(group),
    )
    plan = draw_plan(tape, shape)
    faults: list[AnyFault] = []
    for i, kind in enumerate(group):
        moment: Moment = "now" if profile == "discovery" else "stream"
        faults.append(_aimed(_MAKERS[kind](tape, shape, 0.6 + i, moment), i, shape))
    wishes = (*plan.wishes, *_manners(len(plan.wishes)))
    return settings(msgspec.structs.replace(plan, faults=tuple(faults), wishes=wishes), 1)[1]


def _aimed(fault: AnyFault, number: int, shape: Shape) -> AnyFault:
    """Return a fault on one worker after the other, so that none finds its target dead by the fault before it."""
    if fault.kind.startswith("discovery") or fault.kind == "rolling-restart" or not fault.target:
        return fault
    worker, frontend = f"worker-{number % shape.workers}", f"frontend-{number % shape.frontends}"
    if isinstance(fault, Partition | Reset | Delay):
        return msgspec.structs.replace(fault, target=worker, peer=frontend)
    return msgspec.structs.replace(fault, target=worker)


def _manners(number: int) -> list[Wish]:
    """Return a client of each manner."""
    body = {"model": "mock", "messages": [{"role": "user", "content": "manners"}], "max_tokens": 30, "stream": True}
    manners = (
        Manner(reading="slowly", rate=4_000.0, buffer=512),
        Manner(reading="stalls", pause=1.5, buffer=256),
        Manner(leaves="tokens", after=6),
        Manner(leaves="time", after=0.4),
    )
    wishes = [
        Wish(f"r{number + 1 + i:03d}", 0.3 * i, i % 2, "chat", {**body, "seed": 1 + i}, manner=manner)
        for i, manner in enumerate(manners)
    ]
    late = {"x-holdfast-timeout-ms": "400"}
    return [*wishes, Wish(f"r{number + 5:03d}", 1.0, 0, "chat", {**body, "seed": 9}, late)]
