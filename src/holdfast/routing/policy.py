"""Choosing one worker out of those that may be chosen.

A policy sees candidates, never connections. Health, draining, models and exclusions are settled before;
here only load and fairness count. Must never do I/O, wait or keep per-request state.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Literal, Protocol, TypeVar

import msgspec

RouterMode = Literal["round-robin", "random", "power-of-two", "least-loaded", "kv", "direct"]
"""``kv``: by caches and load (`kv`), least-loaded where caches are not known; ``direct``: the request says who."""


class Candidate(Protocol):
    """What a policy may know about a worker."""

    @property
    def instance(self) -> str:
        """Its instance id."""

    def fingerprint_of(self, model: str) -> str:
        """Return build, weights and CPU of its engine for that model."""

    @property
    def hesitant(self) -> bool:
        """A pong is overdue: not suspect yet, but others are better."""

    @property
    def in_flight(self) -> int:
        """Streams that this process has on it."""

    @property
    def queued(self) -> int:
        """Sequences waiting in its engine, as it last reported."""


C = TypeVar("C", bound=Candidate)


class Wish(msgspec.Struct, frozen=True):
    """What is wanted of a worker beside the model."""

    avoid: frozenset[str] = frozenset()
    """Instances that failed this stream; taken only when nothing else is left."""
    fingerprint: str = ""
    """Of the attempt to be continued: equal arithmetic is preferred."""
    prefer: str = ""
    """Instance that its session is bound to: taken when nothing speaks against it."""


class Policy:
    """One router mode over any number of models."""

    def __init__(self, mode: RouterMode, rng: random.Random):
        self.mode = mode
        self._rng = rng
        self._turn: dict[str, int] = {}
        self.considered: Sequence[Candidate] = ()
        """Whom the latest choice was made among; for explanations, read before anything else runs."""

    def choose(self, model: str, candidates: Sequence[C], wish: Wish) -> C | None:
        """Return the chosen worker, or None when there is no candidate.

        Preferences are applied in order, each only while it leaves somebody: not avoided, not hesitant,
        same fingerprint.
        """
        left = self.preferred(model, candidates, wish)
        if len(left) > 1:
            return self._pick(model, left)
        return left[0] if left else None

    def preferred(self, model: str, candidates: Sequence[C], wish: Wish) -> list[C]:
        """Return those among whom load or caches decide; preferences as in `choose`."""
        left = list(candidates)
        self.considered = left
        return _prefer(model, left, wish) if len(left) > 1 else left

    def _pick(self, model: str, left: list[C]) -> C:
        if self.mode == "random":
            return self._rng.choice(left)
        if self.mode == "power-of-two":
            return min(self._rng.sample(left, 2), key=_load)
        turn = self._turn.get(model, 0)
        self._turn[model] = turn + 1
        start = turn % len(left)
        if self.mode in ("round-robin", "direct"):
            return left[start]
        return min(left[start:] + left[:start], key=_load)


def _prefer(model: str, left: list[C], wish: Wish) -> list[C]:
    left = [c for c in left if c.instance not in wish.avoid] or left
    left = [c for c in left if not c.hesitant] or left
    if wish.fingerprint:
        left = [c for c in left if c.fingerprint_of(model) == wish.fingerprint] or left
    if wish.prefer:
        left = [c for c in left if c.instance == wish.prefer] or left
    return left


def _load(candidate: Candidate) -> int:
    return candidate.in_flight + candidate.queued
