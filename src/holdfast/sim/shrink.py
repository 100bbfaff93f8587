"""Makes a failing universe small: fewer faults, requests and processes, plain choices, the same broken promise.

A universe whose plan has lost a request runs another schedule, and what went wrong may need one out of several. So each
smaller plan is tried with several tapes: the present one, the plain one (first come, first served, smallest delays),
and a few new ones; any of them that still breaks the promise will do.

Must never accept a universe that breaks another promise instead.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import msgspec

from holdfast.base.errors import InvalidRequest
from holdfast.sim.faults import AnyFault
from holdfast.sim.plan import Plan, frontend_names, worker_names
from holdfast.sim.script import PLAIN, Run, Script, run_script
from holdfast.sim.workload import Manner, Wish

T = TypeVar("T")

SECONDS = 240.0
"""Real seconds that shrinking may take."""
NEW_TAPES = 5
"""New schedules that are tried with each smaller plan."""
SMALLEST_BLOCK = 4
"""Choices are made plain in blocks, down to so many."""
_PLAIN_SETTINGS: tuple[str, ...] = (
    "canary", "old", "kv_warm", "secret", "decode_threshold", "prefill_threshold", "most_requests", "most_waiting",
    "queue", "limit", "seats", "blocks",
)  # fmt: skip
_KEPT_IN_BODIES = frozenset({"model", "messages", "prompt", "max_tokens", "seed", "stream"})


def reduce(items: Sequence[T], still: Callable[[tuple[T, ...]], bool]) -> tuple[T, ...]:
    """Return a small part of ``items`` for which ``still`` holds: no single one of it can be left out.

    Delta debugging (Zeller and Hildebrandt, 2002) without the step to subsets, which gains little here.

    Args:
        items: for all of which it holds.
        still: whether it holds for a part.
    """
    kept = tuple(items)
    if not kept or still(()):
        return ()
    size = max(1, len(kept) // 2)
    while kept:
        at, left_out = 0, False
        while at < len(kept):
            shorter = kept[:at] + kept[at + size :]
            if still(shorter):
                kept, left_out = shorter, True
            else:
                at += size
        if size == 1 and not left_out:
            break
        size = size if left_out and size == 1 else max(1, size // 2)
    return kept


class Shrinker:
    """Shrinks one script.

    Args:
        script: what fails.
        seconds: real time it may take; what is smallest by then is the result.
        tell: told how far it is.

    Raises:
        InvalidRequest: it does not fail.
    """

    def __init__(self, script: Script, *, seconds: float = SECONDS, tell: Callable[[str], None] = lambda _: None):
        self._until = time.monotonic() + seconds
        self._tell = tell
        self.runs = 0
        self.best = self._run(script)
        if not self.best.violations:
            raise InvalidRequest(f"Universe {script.seed} keeps every promise: there is nothing to shrink.")
        first = self.best.violations[0]
        self.wanted = (first.promise, first.what)
        """The promise that must stay broken, and how."""

    def shrink(self) -> Run:
        """Return the smallest run that was found and breaks the same promise in the same way."""
        before = None
        while before != self._plan and not self._late:
            before = self._plan
            self._drop("faults", lambda plan, faults: _replace(plan, faults=faults))
            self._drop("wishes", lambda plan, wishes: _replace(plan, wishes=wishes))
            for plan in self._smaller_clusters():
                self._try(plan)
            for name in _PLAIN_SETTINGS:
                self._try(_replace(self._plan, **{name: _DEFAULTS[name]}))
            self._plain_wishes()
            self._plain_faults()
        self._plain_choices()
        return self.best

    # -- trying ----------------------------------------------------------------------------------------

    @property
    def _plan(self) -> Plan:
        return self.best.script.plan

    @property
    def _late(self) -> bool:
        return time.monotonic() >= self._until

    def _run(self, script: Script) -> Run:
        self.runs += 1
        return run_script(script)

    def _try(self, plan: Plan, *, tapes: int = NEW_TAPES) -> bool:
        """Take over a plan if it breaks the promise with one of several tapes."""
        if plan == self._plan:
            return False
        for script in self._tapes(plan, tapes):
            if self._late:
                return False
            if self._take(script):
                return True
        return False

    def _tapes(self, plan: Plan, new: int) -> Iterator[Script]:
        best = self.best.script
        yield Script(best.seed, plan, best.choices)
        if best.choices != PLAIN:
            yield Script(best.seed, plan, PLAIN)
        later = {name: given for name, given in best.choices.items() if name == "workload"}
        for seed in range(best.seed + 1, best.seed + 1 + new):
            yield Script(seed, plan, later)

    def _take(self, script: Script) -> bool:
        run = self._run(script)
        if self.wanted not in run.signatures:
            return False
        self.best = run
        plan = script.plan
        self._tell(
            f"{self.runs} universes: {len(plan.faults)} faults, {len(plan.wishes)} requests, "
            f"{plan.shape.frontends} frontends, {plan.shape.workers} workers, {_weight(script)} choices"
        )
        return True

    # -- what is made smaller --------------------------------------------------------------------------

    def _drop(self, field: str, without: Callable[[Plan, tuple[Any, ...]], Plan]) -> None:
        reduce(getattr(self._plan, field), lambda part: self._try(without(self._plan, part)))

    def _smaller_clusters(self) -> Iterator[Plan]:
        """Yield plans with one process less, as long as they fail."""
        while self._plan.shape.workers > 1:
            smaller = _fewer(self._plan, workers=self._plan.shape.workers - 1)
            if smaller == self._plan:
                break
            yield smaller
            if self._plan is not smaller:
                break
        if self._plan.shape.frontends > 1:
            yield _fewer(self._plan, frontends=self._plan.shape.frontends - 1)

    def _plain_wishes(self) -> None:
        for index in range(len(self._plan.wishes)):
            for simpler in _simpler_wishes(self._plan.wishes[index]):
                self._try(_with_wish(self._plan, index, simpler), tapes=1)
                if self._plan.wishes[index] == simpler:
                    break

    def _plain_faults(self) -> None:
        for index in range(len(self._plan.faults)):
            for simpler in _simpler_faults(self._plan.faults[index]):
                faults = list(self._plan.faults)
                faults[index] = simpler
                self._try(_replace(self._plan, faults=tuple(faults)), tapes=1)

    def _plain_choices(self) -> None:
        """Make choices plain, stream by stream, in blocks that become smaller."""
        if self.best.script.choices == PLAIN or self._take(_with_choices(self.best.script, PLAIN)):
            return
        self._take(_with_choices(self.best.script, {name: _trim(row) for name, row in self.best.choices.items()}))
        for name in PLAIN:
            if not self._take_row(name, []):
                self._plain_row(name)

    def _plain_row(self, name: str) -> None:
        row = self.best.script.choices.get(name) or self.best.choices.get(name, [])
        size = max(SMALLEST_BLOCK, len(row) // 2)
        while not self._late:
            for at in range(0, len(row), size):
                if any(row[at : at + size]) and not self._late:
                    changed = [*row[:at], *([0] * len(row[at : at + size])), *row[at + size :]]
                    if self._take_row(name, changed):
                        row = changed
            if size == SMALLEST_BLOCK:
                return
            size = max(SMALLEST_BLOCK, size // 2)

    def _take_row(self, name: str, row: list[int]) -> bool:
        script = self.best.script
        return not self._late and self._take(_with_choices(script, {**script.choices, name: _trim(row)}))


def _weight(script: Script) -> str:
    """Return how many choices are not the plain ones."""
    if set(script.choices) >= set(PLAIN):
        return f"{sum(1 for row in script.choices.values() for value in row if value):,}"
    return "random"


def _trim(row: Sequence[int]) -> list[int]:
    """Return a row without the plain choices at its end."""
    kept = list(row)
    while kept and not kept[-1]:
        kept.pop()
    return kept


def _with_choices(script: Script, choices: dict[str, list[int]]) -> Script:
    return Script(script.seed, script.plan, choices)


def _replace(plan: Plan, **changes: Any) -> Plan:
    return msgspec.structs.replace(plan, **changes)


_DEFAULTS = {f.name: f.default for f in msgspec.structs.fields(Plan)}


def _fewer(plan: Plan, *, workers: int = 0, frontends: int = 0) -> Plan:
    """Return a plan for a smaller cluster; whoever is spoken of and is not there any more becomes the first of its
    kind."""
    old = plan.shape
    shape = msgspec.structs.replace(old, workers=workers or old.workers, frontends=frontends or old.frontends)
    present = {*worker_names(shape), *frontend_names(shape)}

    def there(name: str) -> str:
        known = name in present or "-" not in name
        return name if known else f"{name.partition('-')[0]}-0"

    def fault(one: AnyFault) -> AnyFault:
        changes: dict[str, Any] = {"target": there(one.target)}
        if hasattr(one, "peer"):
            changes["peer"] = there(one.peer)
        if hasattr(one, "hidden"):
            changes["hidden"] = tuple(sorted({there(name) for name in one.hidden}))
        return msgspec.structs.replace(one, **changes)

    wishes = [msgspec.structs.replace(wish, frontend=min(wish.frontend, shape.frontends - 1)) for wish in plan.wishes]
    faults = tuple(fault(one) for one in plan.faults)
    return _replace(
        plan, shape=shape, wishes=tuple(wishes), faults=faults, old=tuple(sorted({there(name) for name in plan.old}))
    )


def _with_wish(plan: Plan, index: int, wish: Wish) -> Plan:
    wishes = list(plan.wishes)
    wishes[index] = wish
    return _replace(plan, wishes=tuple(wishes))


def _simpler_wishes(wish: Wish) -> Iterator[Wish]:
    """Yield plainer requests, the plainest first."""
    bare = {name: value for name, value in wish.body.items() if name in _KEPT_IN_BODIES}
    yield msgspec.structs.replace(wish, body=bare, headers={}, manner=Manner())
    yield msgspec.structs.replace(wish, manner=Manner(), headers={})
    yield msgspec.structs.replace(wish, body=bare)
    yield msgspec.structs.replace(wish, headers={})
    yield msgspec.structs.replace(wish, manner=Manner())


def _simpler_faults(fault: AnyFault) -> Iterator[AnyFault]:
    """Yield the same fault at any moment, and with round figures."""
    if fault.moment != "now":
        yield msgspec.structs.replace(fault, moment="now")
    yield msgspec.structs.replace(fault, at=round(fault.at, 1), duration=round(fault.duration, 1))
