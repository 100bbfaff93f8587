"""The list of checks. A check takes a started engine and raises AssertionError, or NotApplicable with its reason.

Each comes with the sentence that the support matrix shows. ``alone`` checks break the engine and get one of their own.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from tests.engines.conformance.recorder import Recorder

Body = Callable[[Recorder], Awaitable[dict[str, Any] | None]]


class NotApplicable(Exception):
    """The engine does not claim what the check is about."""


@dataclass(frozen=True)
class Check:
    """One promise of the contract. What its body returns is measured facts for the record."""

    name: str
    sentence: str
    body: Body
    alone: bool

    async def __call__(self, run: Recorder) -> dict[str, Any]:
        found = await self.body(run)
        run.blame()
        assert self.alone or not run.deaths, f"the engine died: {run.deaths[0].message}"
        return found or {}


CHECKS: list[Check] = []


def check(sentence: str, *, alone: bool = False) -> Callable[[Body], Body]:
    """Register a check under its function's name."""

    def register(body: Body) -> Body:
        CHECKS.append(Check(body.__name__, sentence, body, alone))
        return body

    return register


def named(name: str) -> Check:
    """Return a check by name."""
    return next(one for one in CHECKS if one.name == name)
