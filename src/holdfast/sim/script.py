"""A universe as a file: its plan, its seed, and the choices that are not to be drawn from the seed.

A seed is worth what the code that draws from it is worth: one more choice anywhere, and every seed tells another
story. A script keeps its plan in plain words and so survives longer. Must never change what it replays.
"""

from __future__ import annotations

import contextlib
from pathlib import Path

import msgspec

from holdfast.base.errors import InvalidRequest
from holdfast.sim.guard import Escape
from holdfast.sim.history import History, Violation
from holdfast.sim.plan import Plan, Shape, draw_plan
from holdfast.sim.tally import Broken
from holdfast.sim.tape import Tape
from holdfast.sim.universe import Universe

PLAIN: dict[str, list[int]] = {"schedule": [], "network": [], "discovery": [], "workload": []}
"""Choices of a universe in which everything that is left to chance goes the plain way."""


class Script(msgspec.Struct, frozen=True, omit_defaults=True):
    """See the module."""

    seed: int
    plan: Plan
    choices: dict[str, list[int]] = {}
    """By stream; after the last one everything is plain. A stream that is not named is drawn from the seed."""
    digest: str = ""
    """Of the run that was written down; with other code another one may be right."""
    broken: list[Broken] = []
    """What it broke then."""


class Run(msgspec.Struct, frozen=True):
    """What became of a script."""

    script: Script
    history: History
    violations: list[Violation]
    digest: str
    choices: dict[str, list[int]]
    """All of them, drawn ones included."""
    callbacks: int = 0

    @property
    def signatures(self) -> set[tuple[str, str]]:
        """What was broken, without its evidence."""
        return {(violation.promise, violation.what) for violation in self.violations}


def script_of(seed: int, shape: Shape | None = None) -> Script:
    """Return the script of a seed: the same universe, callback by callback, with its plan written out. Runs it once.

    Requests that come with faults are drawn behind the plan's, from the same stream, so these choices are kept.
    """
    tape, drawn = Tape(seed), Tape(seed)
    plan = draw_plan(drawn, shape or Shape())
    with contextlib.suppress(Exception, Escape):  # what it raises is found again when the script is run
        Universe(tape, shape).run()
    return Script(seed, plan, {"workload": list(tape.workload.given)[len(drawn.workload.given) :]})


def run_script(script: Script, *, logs: bool = False) -> Run:
    """Run a script; what it raises becomes a violation.

    Args:
        script: what to run.
        logs: let production's log lines through.
    """
    tape = Tape(script.seed, script.choices)
    universe = Universe(tape, plan=script.plan, logs=logs)
    violations, digest, callbacks = [], "", 0
    try:
        outcome = universe.run()
        violations, digest, callbacks = outcome.violations, outcome.digest, outcome.callbacks
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # an Escape is no Exception, and just as much a finding
        violations = [Violation("harness", type(error).__name__, {"why": str(error)})]
    choices = {name: list(given) for name, given in tape.choices.items()}
    return Run(script, universe.history, violations, digest, choices, callbacks)


def written(run: Run) -> Script:
    """Return a run's script with what came of it."""
    broken = [
        Broken(v.promise, v.what, ", ".join(f"{name}={value}" for name, value in v.evidence.items()))
        for v in run.violations
    ]
    return msgspec.structs.replace(run.script, digest=run.digest, broken=broken)


def save(script: Script, path: Path) -> None:
    """Write a script to a file."""
    text = msgspec.json.format(msgspec.json.encode(script), indent=1)
    path.write_bytes(text + b"\n")


def load(path: Path) -> Script:
    """Read a script.

    Raises:
        InvalidRequest: it is none.
    """
    try:
        return msgspec.json.decode(path.read_bytes(), type=Script)
    except FileNotFoundError:
        raise InvalidRequest(f"There is no file {path}.") from None
    except msgspec.DecodeError as error:
        raise InvalidRequest(f"{path} is not a script of this version: {error}") from None
