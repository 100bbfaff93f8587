"""What can be made to go wrong in a what-if, as people write it on a command line: ``freeze-worker@60s:5s:worker-3``.

Reads specifications into the simulation's own vocabulary (`sim.faults`), with targets and durations filled in. Must
never act.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Sequence
from typing import Any, Literal

import msgspec

from holdfast.base.errors import InvalidRequest
from holdfast.sim import faults as f
from holdfast.sim.faults import AnyFault

Role = Literal["worker", "frontend", "either", "pair", "view", "nobody", "workers", "frontends"]


class BadFault(InvalidRequest):
    """A specification that can't be read; the message says what is wrong and what there is."""

    code = "bad_fault"


class Kind(msgspec.Struct, frozen=True):
    """One thing that can go wrong."""

    make: Callable[..., AnyFault]
    role: Role
    """Who suffers."""
    help: str
    duration: float = 0.0
    """Seconds, unless the specification says otherwise."""
    takes: tuple[str, ...] = ()
    """Of ``duration``, ``factor``, ``times``, ``seconds`` and ``one_way``: what can be said beside the target."""
    fixed: dict[str, Any] = {}
    """Fields with a value of their own."""


_FOR = ("duration",)
KINDS: dict[str, Kind] = {
    "kill-worker": Kind(f.Crash, "worker", "SIGKILL; the supervisor has it back after a second", 1.0, _FOR),
    "kill-frontend": Kind(f.Crash, "frontend", "the same for a frontend: its clients' connections break", 1.0, _FOR),
    "power-loss": Kind(f.PowerLoss, "worker", "its machine falls silent; back after half a minute", 30.0, _FOR),
    "freeze-worker": Kind(f.Freeze, "worker", "SIGSTOP, and SIGCONT after 5 s", 5.0, _FOR),
    "freeze-frontend": Kind(f.Freeze, "frontend", "the same for a frontend", 5.0, _FOR),
    "drain-worker": Kind(f.Terminate, "worker", "SIGTERM: it leaves in order; back after a second", 1.0, _FOR),
    "drain-frontend": Kind(f.Terminate, "frontend", "the same for a frontend", 1.0, _FOR),
    "rolling-restart": Kind(f.RollingRestart, "workers", "all workers are replaced, one after the other"),
    "rolling-restart-frontends": Kind(f.RollingRestart, "frontends", "all frontends are"),
    "slow-worker": Kind(
        f.EngineSlow,
        "worker",
        "every step takes four times as long, for 30 s",
        30.0,
        (*_FOR, "factor"),
        {"factor": 4.0},
    ),
    "slow-process": Kind(
        f.Slow,
        "either",
        "every callback of its event loop takes 20 times 50 µs, for 10 s",
        10.0,
        (*_FOR, "factor"),
        {"factor": 20.0},
    ),
    "hang-worker": Kind(
        f.EngineHang, "worker", "its engine stands still for 15 s while the process answers", 15.0, _FOR
    ),
    "compile-worker": Kind(f.EngineCompile, "worker", "its engine compiles for 8 s, and says so", 8.0, _FOR),
    "out-of-memory": Kind(f.OutOfMemory, "worker", "its engine dies and says so; back after a second", 1.0, _FOR),
    "engine-error": Kind(f.EngineError, "worker", "its next sequence ends with an error", takes=("times",)),
    "engine-abort": Kind(f.EngineAbort, "worker", "its next sequence ends without a reason", takes=("times",)),
    "engine-refuse": Kind(f.EngineRefuse, "worker", "its next submission is refused", takes=("times",)),
    "killer-prompt": Kind(f.KillerPrompt, "nobody", "a request that kills every worker that computes its prompt"),
    "burst": Kind(f.Overload, "nobody", "100 more requests at once", takes=("times",), fixed={"times": 100}),
    "partition": Kind(
        f.Partition, "pair", "no byte passes between a worker and a frontend for 5 s", 5.0, (*_FOR, "one_way")
    ),
    "reset": Kind(f.Reset, "pair", "all connections between a worker and a frontend are reset"),
    "delay": Kind(
        f.Delay,
        "pair",
        "everything between them takes 200 ms longer, for 10 s",
        10.0,
        (*_FOR, "seconds"),
        {"seconds": 0.2},
    ),
    "discovery-outage": Kind(f.DiscoveryOutage, "nobody", "nobody reaches discovery for 30 s", 30.0, _FOR),
    "discovery-stale": Kind(f.DiscoveryStale, "frontend", "its view of discovery stands still for 30 s", 30.0, _FOR),
    "discovery-partial": Kind(
        f.DiscoveryPartial, "view", "a frontend does not see one of the workers for 30 s", 30.0, _FOR
    ),
    "clock-jump": Kind(
        f.WallJump, "either", "its calendar clock jumps by an hour", takes=("seconds",), fixed={"seconds": 3600.0}
    ),
}
"""Everything that can be asked for."""

_UNITS = {"ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0, "": 1.0}
_TIME = re.compile(r"(\d+(?:\.\d+)?)(ms|s|m|h|)")
_NAME = re.compile(r"(worker|frontend)-(\d+)")
_FACTOR = re.compile(r"x(\d+(?:\.\d+)?)")
_TIMES = re.compile(r"(\d+)times")
FORM = (
    "KIND@TIME[:OPTION…], options: a duration (5s), a factor (x4), a number (3times), +200ms, one-way, worker-N, "
    "frontend-N"
)


def read_troubles(specs: Sequence[str], workers: int, frontends: int) -> tuple[AnyFault, ...]:
    """Return the faults that these specifications ask for, in order of time.

    Those that name nobody hit another worker (or frontend) each: worker-0, worker-1, …

    Args:
        specs: as `FORM` says.
        workers: how many there are.
        frontends: how many there are.

    Raises:
        BadFault: one of them can't be read, or names somebody who is not there.
    """
    reader = _Reader(workers, frontends)
    return tuple(sorted((reader.read(spec) for spec in specs), key=lambda fault: fault.at))


def seconds_of(text: str) -> float | None:
    """Return a time such as ``90``, ``90s``, ``1.5m`` or ``200ms`` in seconds; None when it is none."""
    found = _TIME.fullmatch(text)
    return float(found[1]) * _UNITS[found[2]] if found else None


def listing() -> str:
    """Return one line for each kind, for people."""
    return "\n".join(f"  {name:<26}{kind.help}" for name, kind in KINDS.items())


class _Reader:
    def __init__(self, workers: int, frontends: int):
        self._count = {"worker": workers, "frontend": frontends}
        self._turn = {"worker": 0, "frontend": 0}

    def read(self, spec: str) -> AnyFault:
        name, at_sign, rest = spec.partition("@")
        kind = KINDS.get(name)
        if kind is None:
            close = difflib.get_close_matches(name, KINDS, n=1)
            meant = f" Did you mean {close[0]}?" if close else ""
            raise BadFault(f"--fault {spec}: there is no {name!r}.{meant} There is:\n{listing()}\nForm: {FORM}.")
        when, *options = rest.split(":")
        at = seconds_of(when) if at_sign else None
        if at is None:
            raise BadFault(f"--fault {spec}: say when, as in {name}@30s. Form: {FORM}.")
        fields: dict[str, Any] = {"at": at, "duration": kind.duration, **kind.fixed}
        named: dict[str, str] = {}
        for option in options:
            self._option(spec, option, kind, fields, named)
        fields |= self._targets(spec, kind, named)
        return kind.make(**fields)

    def _option(self, spec: str, option: str, kind: Kind, fields: dict[str, Any], named: dict[str, str]) -> None:
        name = _NAME.fullmatch(option)
        if name is not None:
            named[name[1]] = self._known(spec, option, name[1], int(name[2]))
            return
        field, value = _value(option)
        if field == "":
            raise BadFault(f"--fault {spec}: {option!r} is no option. Form: {FORM}.")
        if field not in kind.takes:
            takes = ", ".join(_SHOWN[known] for known in kind.takes) or "no options but a target"
            raise BadFault(f"--fault {spec}: {option!r} means nothing here; this kind takes {takes}.")
        fields[field] = value

    def _known(self, spec: str, name: str, role: str, number: int) -> str:
        if number >= self._count[role]:
            raise BadFault(
                f"--fault {spec}: there is no {name}; {role}s are {role}-0 to {role}-{self._count[role] - 1}."
            )
        return name

    def _targets(self, spec: str, kind: Kind, named: dict[str, str]) -> dict[str, Any]:
        allowed = _TARGETS[kind.role]
        strange = next((name for role, name in named.items() if role not in allowed), None)
        if strange is not None:
            raise BadFault(f"--fault {spec}: {strange} can't be the target of this kind.")
        if kind.role in ("workers", "frontends"):
            return {"target": kind.role.removesuffix("s")}
        if kind.role == "either":
            return {"target": named.get("frontend") or named.get("worker") or self._next("worker")}
        found = {role: named.get(role) or self._next(role) for role in allowed}
        if kind.role == "view":
            return {"target": found["frontend"], "hidden": (found["worker"],)}
        return dict(zip(("target", "peer"), found.values(), strict=False))

    def _next(self, role: str) -> str:
        turn = self._turn[role]
        self._turn[role] = turn + 1
        return f"{role}-{turn % self._count[role]}"


_TARGETS: dict[Role, tuple[str, ...]] = {
    "worker": ("worker",),
    "frontend": ("frontend",),
    "either": ("worker", "frontend"),
    "pair": ("worker", "frontend"),
    "view": ("worker", "frontend"),
    "nobody": (),
    "workers": (),
    "frontends": (),
}
"""Whose names a specification may hold."""
_SHOWN = {
    "duration": "a duration (5s)",
    "factor": "a factor (x4)",
    "times": "a number (3times)",
    "seconds": "by how much (+200ms)",
    "one_way": "one-way",
}


def _value(option: str) -> tuple[str, Any]:
    """Return which field an option sets, and to what; "" for none."""
    if option == "one-way":
        return "one_way", True
    if option.startswith(("+", "-")):
        seconds = seconds_of(option[1:])
        return ("", None) if seconds is None else ("seconds", -seconds if option[0] == "-" else seconds)
    for pattern, field, convert in ((_FACTOR, "factor", float), (_TIMES, "times", int)):
        found = pattern.fullmatch(option)
        if found is not None:
            return field, convert(found[1])
    seconds = seconds_of(option)
    return ("", None) if seconds is None else ("duration", seconds)
