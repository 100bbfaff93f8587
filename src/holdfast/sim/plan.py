"""One universe's plan: its size, its requests, its faults. Drawn from the tape, or read from a file.

Must never look at what happened.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import msgspec

from holdfast.base.ids import InstanceId
from holdfast.sim import faults as f
from holdfast.sim.bulk import BLOCKS, STEP_MS, bulk_wish
from holdfast.sim.disagg import MORE_WORKERS, Split, draw_split
from holdfast.sim.faults import AnyFault, Moment
from holdfast.sim.profiles import KINDS, PROFILES, Profile
from holdfast.sim.tape import Tape
from holdfast.sim.workload import Wish, Workload


class Shape(msgspec.Struct, frozen=True, kw_only=True):
    """The size of a universe, within which the tape draws."""

    frontends: int = 2
    workers: int = 3
    requests: int = 20
    more_requests: int = 5
    """The tape adds up to so many."""
    faults: int = 3
    more_faults: int = 3
    span: float = 6.0
    """Seconds over which requests arrive and faults begin."""
    longest: int = 40
    """Tokens of the longest answers."""
    step_ms: float = 25.0
    """Of the workers' engines."""
    profile: Profile | None = None
    """None: the tape chooses."""
    only: tuple[str, ...] = ()
    """Kinds of fault to draw from; empty: all of the profile."""
    split: bool | None = None
    """Whether prompts and streams are computed by different workers; None: the tape chooses."""


class Plan(msgspec.Struct, frozen=True):
    """What a universe will be asked to go through."""

    shape: Shape
    profile: Profile
    wishes: tuple[Wish, ...]
    faults: tuple[AnyFault, ...]
    seats: int = 8
    """Sequences that an engine runs at once."""
    limit: int = 0
    """Sequences that a worker accepts at once; 0: its own choice."""
    queue: int = 0
    """Streams that may wait in a frontend's queue …"""
    queue_timeout: float = 3.0
    """… and for how many seconds."""
    blocks: int = 256
    """KV blocks of an engine."""
    decode_threshold: float | None = None
    """Share of KV blocks over which a worker is saturated."""
    prefill_threshold: int | None = None
    """Prompt tokens in hand over which a worker is saturated."""
    most_requests: int = 1000
    """Requests that a frontend has in hand at once."""
    most_waiting: int = 1000
    """Streams that may wait for a worker at once."""
    narrow: bool = False
    """Little room in the network for what a reader has not read."""
    canary: bool = False
    """Workers test themselves when they are idle."""
    old: tuple[str, ...] = ()
    """Processes that speak the oldest protocol version until they are asked to leave: a rolling upgrade replaces
    them."""
    kv_events: bool = False
    """Workers tell frontends what is in their KV caches."""
    kv_warm: bool = True
    """Frontends have the model's files on their disk already."""
    secret: str = ""
    request_timeout: float = 40.0
    """Seconds from a request's arrival to its end."""
    client_stall: float = 4.0
    """Seconds for which a client may take nothing."""
    split: Split | None = None
    """Which workers compute prompts; None: all do everything."""
    migration_limit: int = 3
    """Moves of a stream because of faults."""
    drain: float = 0.6
    """Seconds that streams have to finish on a worker that leaves."""
    grace: float = 3.0
    """Seconds that requests have to finish at a frontend that leaves."""


def frontend_names(shape: Shape) -> list[str]:
    """Return the names of the frontends."""
    return [f"frontend-{i}" for i in range(shape.frontends)]


def worker_names(shape: Shape) -> list[str]:
    """Return the names of the workers."""
    return [f"worker-{i}" for i in range(shape.workers)]


def instance_of(name: str) -> InstanceId:
    """Return the instance id of a worker's slot, which stays the same over restarts."""
    return InstanceId(f"{0xA0 + int(name.rpartition('-')[2]):016x}")


def draw_plan(tape: Tape, shape: Shape) -> Plan:
    """Return a plan. Requests come from the tape's stream ``workload``, the rest from ``plan``."""
    drawn: Profile = tape.plan.pick(PROFILES, "profile")
    profile = drawn if shape.profile is None else shape.profile
    split = draw_split(tape, shape.workers, shape.span, shape.split)
    if split is not None:
        shape = msgspec.structs.replace(shape, workers=shape.workers + MORE_WORKERS)
    workload = Workload(tape.workload, shape.frontends, shape.longest)
    count = shape.requests + tape.plan.choose(shape.more_requests + 1, "more requests")
    times = sorted(tape.workload.uniform(0.0, shape.span, "arrival") for _ in range(count))
    wishes = tuple(workload.draw(at) for at in times)
    if profile == "bulk":
        shape = msgspec.structs.replace(shape, step_ms=STEP_MS)
        big = (bulk_wish(tape.workload, 1 + i, at, shape.frontends) for i, at in enumerate(times[::2]))
        small = (wish for wish in wishes if wish.valid)  # what is too long elsewhere is not too long here
        wishes = tuple(sorted((*small, *big), key=lambda wish: wish.at))
    number = shape.faults + tape.plan.choose(shape.more_faults + 1, "more faults")
    faults = tuple(_draw_fault(tape, shape, profile) for _ in range(number))
    if profile == "exodus":
        faults += _exodus(tape, shape)
    tight = profile == "overload"
    plan = Plan(
        shape,
        profile,
        wishes,
        tuple(sorted(faults, key=lambda fault: fault.at)),
        seats=2 if tight else 8,
        limit=3 if tight else 0,
        queue=tape.plan.pick((0, 4, 12), "queue") if tight else 0,
        queue_timeout=tape.plan.pick((3.0, 0.3), "queue timeout") if tight else 3.0,
        blocks=24 if tight else BLOCKS if profile == "bulk" else 24 if profile == "caches" else 256,
        narrow=profile == "bulk" and tape.plan.chance(0.6, "narrow"),
        decode_threshold=0.25 if tight and tape.plan.chance(0.4, "block threshold") else None,
        prefill_threshold=50 if tight and tape.plan.chance(0.4, "prefill threshold") else None,
        most_requests=14 if tight and tape.plan.chance(0.3, "few requests") else 1000,
        most_waiting=2 if tight and tape.plan.chance(0.5, "few waiting") else 1000,
        canary=tape.plan.chance(0.3, "canary"),
        old=(_frontend(tape, shape),) if tape.plan.chance(0.15, "old protocol") else (),
        kv_warm=not tape.plan.chance(0.1, "cold"),
        secret="a shared secret" if tape.plan.chance(0.25, "secret") else "",
        kv_events=profile == "caches" or tape.plan.chance(0.3, "KV events"),
        split=split,
    )
    return _mixed_fleet(tape, plan) if tape.plan.chance(0.12, "old workers") else plan


def _mixed_fleet(tape: Tape, plan: Plan) -> Plan:
    """Some workers, or all of them, speak the oldest protocol version; mostly somebody upgrades the fleet meanwhile."""
    names = worker_names(plan.shape)
    first, number = tape.plan.choose(len(names), "first old worker"), 1 + tape.plan.choose(len(names), "old workers")
    old = tuple(sorted(names[(first + i) % len(names)] for i in range(number)))
    faults = plan.faults
    if plan.profile != "discovery" and not plan.shape.only and tape.plan.chance(0.7, "upgrade"):
        upgrade = f.RollingRestart(at=tape.plan.uniform(0.4, plan.shape.span * 0.9, "upgrade at"), target="worker")
        faults = tuple(sorted((*faults, upgrade), key=lambda fault: fault.at))
    return msgspec.structs.replace(plan, old=(*plan.old, *old), faults=faults)


_STREAM_MOMENTS: tuple[Moment, ...] = ("stream", "dispatch", "accept", "first", "stream", "end", "now")


def _draw_fault(tape: Tape, shape: Shape, profile: Profile) -> AnyFault:
    plan = tape.plan
    kind = plan.pick(shape.only or KINDS[profile], "fault")
    at = plan.uniform(0.4, shape.span * 0.9, "fault at")
    moment = plan.pick(_STREAM_MOMENTS, "moment")
    return _MAKERS[kind](tape, shape, at, moment)


def _worker(tape: Tape, shape: Shape) -> str:
    return worker_names(shape)[tape.plan.choose(shape.workers, "which worker")]


def _frontend(tape: Tape, shape: Shape) -> str:
    return frontend_names(shape)[tape.plan.choose(shape.frontends, "which frontend")]


def _process(tape: Tape, shape: Shape) -> str:
    """Return a worker mostly: a frontend's death takes its streams with it, and little can be learnt from it."""
    return _frontend(tape, shape) if tape.plan.chance(0.15, "a frontend") else _worker(tape, shape)


def _pair(tape: Tape, shape: Shape) -> tuple[str, str]:
    return _worker(tape, shape), _frontend(tape, shape)


def _exodus(tape: Tape, shape: Shape) -> tuple[AnyFault, ...]:
    """All workers leave within a second, and stay away for a while."""
    first = tape.plan.uniform(0.4, shape.span * 0.8, "exodus at")
    gap, back = tape.plan.uniform(0.0, 0.5, "between them"), tape.plan.log_uniform(1.0, 8.0, "back after")
    names = worker_names(shape)
    return tuple(f.Terminate(at=first + gap * i, target=name, duration=back) for i, name in enumerate(names))


Maker = Callable[[Tape, Shape, float, Moment], AnyFault]


def _crash(tape: Tape, shape: Shape, at: float, moment: Moment) -> AnyFault:
    back = tape.plan.log_uniform(0.2, 5.0, "back after")
    return f.Crash(at=at, target=_process(tape, shape), moment=moment, duration=back)


def _power_loss(tape: Tape, shape: Shape, at: float, moment: Moment) -> AnyFault:
    back = tape.plan.log_uniform(2.0, 8.0, "back after")
    return f.PowerLoss(at=at, target=_process(tape, shape), moment=moment, duration=back)


def _freeze(tape: Tape, shape: Shape, at: float, moment: Moment) -> AnyFault:
    """Around the detector's bound of 1.5 s, and around the accept's hedge of 0.5 s."""
    duration = tape.plan.log_uniform(0.3, 4.0, "frozen for")
    return f.Freeze(at=at, target=_process(tape, shape), moment=moment, duration=duration)


def _terminate(tape: Tape, shape: Shape, at: float, moment: Moment) -> AnyFault:
    back = tape.plan.log_uniform(0.1, 2.0, "back after")
    signals = 2 if tape.plan.chance(0.25, "hurry") else 1
    return f.Terminate(at=at, target=_process(tape, shape), moment=moment, duration=back, signals=signals)


def _slow(tape: Tape, shape: Shape, at: float, moment: Moment) -> AnyFault:
    factor = tape.plan.log_uniform(3.0, 50.0, "slower by")
    duration = tape.plan.log_uniform(0.5, 3.0, "slow for")
    return f.Slow(at=at, target=_process(tape, shape), moment=moment, factor=factor, duration=duration)


def _partition(tape: Tape, shape: Shape, at: float, moment: Moment) -> AnyFault:
    """From a hiccup to well over the 5 s after which a worker gives up a silent caller."""
    worker, frontend = _pair(tape, shape)
    one_way = tape.plan.chance(0.5, "one way")
    if one_way and tape.plan.chance(0.5, "from the frontend"):
        worker, frontend = frontend, worker
    duration = tape.plan.log_uniform(0.3, 8.0, "partition for")
    return f.Partition(at=at, target=worker, peer=frontend, moment=moment, one_way=one_way, duration=duration)


def _reset(tape: Tape, shape: Shape, at: float, moment: Moment) -> AnyFault:
    worker, frontend = _pair(tape, shape)
    return f.Reset(at=at, target=worker, peer=frontend, moment=moment)


def _delay(tape: Tape, shape: Shape, at: float, moment: Moment) -> AnyFault:
    worker, frontend = _pair(tape, shape)
    seconds = tape.plan.log_uniform(0.05, 1.2, "delayed by")
    duration = tape.plan.log_uniform(0.5, 4.0, "delayed for")
    return f.Delay(at=at, target=worker, peer=frontend, moment=moment, seconds=seconds, duration=duration)


def _outage(tape: Tape, shape: Shape, at: float, moment: Moment) -> AnyFault:
    del shape, moment
    return f.DiscoveryOutage(at=at, duration=tape.plan.log_uniform(0.5, 20.0, "outage for"))


def _stale(tape: Tape, shape: Shape, at: float, moment: Moment) -> AnyFault:
    del moment
    duration = tape.plan.log_uniform(0.5, 8.0, "stale for")
    return f.DiscoveryStale(at=at, target=_frontend(tape, shape), duration=duration)


def _partial(tape: Tape, shape: Shape, at: float, moment: Moment) -> AnyFault:
    del moment
    names = worker_names(shape)
    first = tape.plan.choose(len(names), "hidden")
    hidden = tuple(names[(first + i) % len(names)] for i in range(1 + tape.plan.choose(2, "hidden ones")))
    duration = tape.plan.log_uniform(0.5, 8.0, "partial for")
    return f.DiscoveryPartial(at=at, target=_frontend(tape, shape), hidden=hidden, duration=duration)


def _engine_error(tape: Tape, shape: Shape, at: float, moment: Moment) -> AnyFault:
    times = 1 + tape.plan.choose(3, "times")
    return f.EngineError(at=at, target=_worker(tape, shape), moment=moment, times=times)


def _engine_abort(tape: Tape, shape: Shape, at: float, moment: Moment) -> AnyFault:
    times = 1 + tape.plan.choose(3, "times")
    return f.EngineAbort(at=at, target=_worker(tape, shape), moment=moment, times=times)


def _engine_refuse(tape: Tape, shape: Shape, at: float, moment: Moment) -> AnyFault:
    times = 1 + tape.plan.choose(4, "times")
    return f.EngineRefuse(at=at, target=_worker(tape, shape), moment=moment, times=times)


def _engine_hang(tape: Tape, shape: Shape, at: float, moment: Moment) -> AnyFault:
    """Around the detector's floor, which universes set to 2 s."""
    duration = tape.plan.log_uniform(0.5, 6.0, "hangs for")
    return f.EngineHang(at=at, target=_worker(tape, shape), moment=moment, duration=duration)


def _engine_slow(tape: Tape, shape: Shape, at: float, moment: Moment) -> AnyFault:
    factor = tape.plan.log_uniform(2.0, 20.0, "slower by")
    duration = tape.plan.log_uniform(0.5, 3.0, "slow for")
    return f.EngineSlow(at=at, target=_worker(tape, shape), moment=moment, factor=factor, duration=duration)


def _engine_compile(tape: Tape, shape: Shape, at: float, moment: Moment) -> AnyFault:
    duration = tape.plan.log_uniform(0.2, 4.0, "compiles for")
    return f.EngineCompile(at=at, target=_worker(tape, shape), moment=moment, duration=duration)


def _engine_miscount(tape: Tape, shape: Shape, at: float, moment: Moment) -> AnyFault:
    shift = tape.plan.pick((1, -1), "shift")
    return f.EngineMiscount(at=at, target=_worker(tape, shape), moment=moment, shift=shift)


def _kv_lost(tape: Tape, shape: Shape, at: float, moment: Moment) -> AnyFault:
    return f.KvLost(at=at, target=_worker(tape, shape), moment=moment, times=_few(tape), where=_where(tape))


def _kv_repeated(tape: Tape, shape: Shape, at: float, moment: Moment) -> AnyFault:
    return f.KvRepeated(at=at, target=_worker(tape, shape), moment=moment, times=_few(tape), where=_where(tape))


def _kv_reordered(tape: Tape, shape: Shape, at: float, moment: Moment) -> AnyFault:
    return f.KvReordered(at=at, target=_worker(tape, shape), moment=moment, times=_few(tape), where=_where(tape))


def _few(tape: Tape) -> int:
    return 1 + tape.plan.choose(4, "times")


def _where(tape: Tape) -> Literal["engine", "wire"]:
    return "engine" if tape.plan.chance(0.4, "between engine and log") else "wire"


def _out_of_memory(tape: Tape, shape: Shape, at: float, moment: Moment) -> AnyFault:
    back = tape.plan.log_uniform(0.2, 5.0, "back after")
    return f.OutOfMemory(at=at, target=_worker(tape, shape), moment=moment, duration=back)


def _wall_jump(tape: Tape, shape: Shape, at: float, moment: Moment) -> AnyFault:
    del moment
    return f.WallJump(at=at, target=_process(tape, shape), seconds=tape.plan.pick((3600.0, -7200.0), "jump"))


def _overload(tape: Tape, shape: Shape, at: float, moment: Moment) -> AnyFault:
    del shape, moment
    return f.Overload(at=at, times=8 + tape.plan.choose(16, "burst"))


def _killer(tape: Tape, shape: Shape, at: float, moment: Moment) -> AnyFault:
    del tape, shape, moment
    return f.KillerPrompt(at=at)


def _rolling(tape: Tape, shape: Shape, at: float, moment: Moment) -> AnyFault:
    del shape, moment
    return f.RollingRestart(at=at, target="frontend" if tape.plan.chance(0.25, "frontends") else "worker")


_MAKERS: dict[str, Maker] = {
    "crash": _crash,
    "power-loss": _power_loss,
    "freeze": _freeze,
    "terminate": _terminate,
    "slow": _slow,
    "partition": _partition,
    "reset": _reset,
    "delay": _delay,
    "discovery-outage": _outage,
    "discovery-stale": _stale,
    "discovery-partial": _partial,
    "engine-error": _engine_error,
    "engine-abort": _engine_abort,
    "engine-refuse": _engine_refuse,
    "engine-hang": _engine_hang,
    "engine-slow": _engine_slow,
    "engine-compile": _engine_compile,
    "engine-miscount": _engine_miscount,
    "kv-lost": _kv_lost,
    "kv-repeated": _kv_repeated,
    "kv-reordered": _kv_reordered,
    "out-of-memory": _out_of_memory,
    "wall-jump": _wall_jump,
    "overload": _overload,
    "killer-prompt": _killer,
    "rolling-restart": _rolling,
}
